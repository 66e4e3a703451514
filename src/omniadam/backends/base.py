"""What the optimizer asks of a library, each a sentence of contract.

A backend object belongs to one optimizer. It is made when the optimizer is built on variables of
its library, and may keep what it prepared for them.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import fast
from ..rule import Pass, PassCoefficients, Rule

HALVES = ("float16", "bfloat16")
FLOATS = ("float32", "float64", *HALVES)


@dataclass(eq=False)
class Entry:
    """A variable with everything the optimizer knows about it and keeps for it."""

    variable: Any
    name: str
    shape: tuple[int, ...]
    dtype: str  # one of FLOATS
    decayed: bool = True
    # Whether its user gave it its name, and not its library.
    is_named: bool = False
    slots: tuple[Any, ...] = ()
    accumulator: Any = None
    average: Any = None
    # Of a Keras variable: whether its gradient is its new value.
    replaced: bool = False
    # The state variable that holds the `iterations` when it was added; None if that was the build.
    since: Any = None
    # A function of its new value that it is set to at the end of each step.
    constraint: Callable[[Any], Any] | None = None
    # What the user knows the variable by: the variable itself, or what it was taken out of.
    key: Any = None

    def __post_init__(self) -> None:
        if self.key is None:
            self.key = self.variable

    @property
    def slot_dtype(self) -> str:
        """Slots of float16 and bfloat16 variables are float32, as the arithmetic is."""
        return "float32" if self.dtype in HALVES else self.dtype


class Latest(dict[Any, Any]):
    """What was prepared for the keys that were asked for last.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def found(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is kept for a key, or is made for it now."""
        value = self.pop(key, None)
        if value is None:
            value = make()
        self[key] = value  # the last one now
        if len(self) > self._most:
            for oldest in list(self)[: -self._most]:  # another thread may have dropped it
                self.pop(oldest, None)
        return value


@dataclass(eq=False)
class Selection:
    """The entries that one step has gradients for, and the rest, which only has an average."""

    entries: tuple[Entry, ...]
    rest: tuple[Entry, ...]
    # What the backend prepared for these entries, in a form of its own.
    prepared: Any = None
    constrained: tuple[Entry, ...] = field(init=False)
    # Whether their constraints have been tried once.
    is_tried: bool = False

    def __post_init__(self) -> None:
        self.constrained = tuple(e for e in self.entries if e.constraint is not None)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """By when entries were added, if any of them came after the build; else nothing."""
        every = (*self.entries, *self.rest)
        since = {id(e.since): e.since for e in every}
        if all(each is None for each in since.values()):
            return ()
        return tuple(Part.of(self, each) for each in since.values())


class Part(NamedTuple):
    """The entries of a selection that were added at once, whose steps are counted alike."""

    since: Any  # as of an `Entry`
    selection: Selection
    # Their positions in the whole: of those with gradients, and of the rest.
    positions: tuple[int, ...]
    rest: tuple[int, ...]

    @classmethod
    def of(cls, whole: Selection, since: Any) -> Part:
        """The part of a selection that this state variable is for."""
        chosen, rest = (
            {i: entry for i, entry in enumerate(entries) if entry.since is since}
            for entries in (whole.entries, whole.rest)
        )
        selection = Selection(tuple(chosen.values()), tuple(rest.values()))
        return cls(since, selection, tuple(chosen), tuple(rest))


class Group(NamedTuple):
    """What one pass does with entries that share coefficients."""

    kind: Pass
    rule: Rule
    selection: Selection
    rule_c: Sequence[Any]
    pass_c: PassCoefficients
    factors: Sequence[Any] = ()  # what each gradient is multiplied by, if the pass clips by that

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Those with gradients, or of a pass without gradients the rest."""
        return self.selection.entries if self.kind.gradient else self.selection.rest


# What a pass measured, to be called once the step is done: of each entry, in order, a sum for each
# name in `Pass.measured`, as numbers or as the library's scalars.
Sums = Callable[[], list[tuple[Any, ...]]]


def nothing_measured() -> list[tuple[Any, ...]]:
    """Of a pass that measures nothing."""
    return []


# What makes a step: of a selection, with gradients as they were gathered, a rate or None for the
# optimizer's own, and a `step.Step`.
Advance = Callable[[Selection, Any, Any, Any], None]


class Fast(ABC):
    """What a library has only to be fast; `OMNIADAM_FAST=0` leaves it out. One backend's."""

    @abstractmethod
    def note(self, selection: Selection, gathered: Any) -> None:
        """Note what was just checked at length and gathered, to recognise it at the next step."""

    @abstractmethod
    def recognise(self, selection: Selection, gradients: list[Any], variables: list[Any]) -> Any:
        """What `Backend.gather` would return, if a glance shows that all is as at the last step;
        else None.
        """


class Stateless(NamedTuple):
    """An optimizer as a function of values: what `Backend.stateless_apply` needs of it."""

    optimizer: Any  # of which a copy can make a step in place
    is_fused: bool  # whether there is no `update_step` of a user's
    entries: tuple[Entry, ...]
    named: Sequence[tuple[str, Any]]  # the state
    # Gradients, checked, and the selection that has them.
    examined: Callable[[list[Any]], tuple[Selection, list[Any]]]
    rate_and_step: Callable[[], tuple[Any, Any]]
    advance: Advance


class Overtaken(Exception):
    """Another thread has made a step since the settings of this one were read."""


class _Basis(threading.local):
    # How many steps there were when the settings of a thread's step were read.
    steps: int | None = None


class Backend(ABC):
    """One array library."""

    name: ClassVar[str]
    # Functions of a number, for the coefficients of a step: sqrt, expm1, log, maximum, where.
    functions: ClassVar[Any]
    # Functions of a number or an array of the library, for schedules: see `functions_of`.
    elementwise: ClassVar[Any]
    # `rule.Functions` of the library's arrays.
    arrays: ClassVar[Any]

    # Where values cannot be overwritten: makes what stands for a variable of another library that
    # holds such a value, by its `value` and `assign`.
    holder: ClassVar[Any] = None

    def __init__(self, variables: Sequence[Any] = ()) -> None:
        # Steps follow one another, whichever threads make them: what reads state and overwrites
        # it has this.
        self.turn = threading.RLock()
        self.steps = 0  # that were made in turn
        self._basis = _Basis()
        self.fast: Any = self.make_fast() if fast.is_enabled() else None

    def make_fast(self) -> Fast | None:
        """What this library has only to be fast."""
        return None

    @contextmanager
    def step_in_turn(self) -> Iterator[None]:
        """Have the turn for a step; raises Overtaken if its settings were read before another."""
        with self.turn:
            if self.is_overtaken():
                raise Overtaken
            yield
            self.steps += 1

    def is_overtaken(self) -> bool:
        """Whether there was a step since the settings of this thread's step were read."""
        return self._basis.steps not in (None, self.steps)

    def by_latest(self, step: Callable[[], Any]) -> Any:
        """Do a step that reads its settings: anew, if another thread makes one meanwhile."""
        basis = self._basis
        outer = basis.steps
        try:
            while True:
                basis.steps = self.steps
                with suppress(Overtaken):
                    return step()
        finally:
            # A step within a function that is read for another one comes before that.
            basis.steps = None if outer is None else self.steps

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around a user's function in the middle of a step: the turn is others' meanwhile."""
        self.turn.release()
        try:
            yield
        finally:
            self.turn.acquire()

    @classmethod
    def kind_for(cls, variables: Sequence[Any]) -> type[Backend]:
        """The class for these variables, all of its library."""
        return cls

    @classmethod
    def over(cls, variables: Sequence[Any]) -> Backend:
        """A backend for these variables, all of its library."""
        return cls.kind_for(variables)(variables)

    @abstractmethod
    def describe(self, variable: Any, name: str) -> Entry:
        """The entry of a variable; raises TypeError or ValueError if it cannot be trained."""

    @abstractmethod
    def name_of(self, variable: Any) -> str | None:
        """The name or path that the library gave the variable, if it has one."""

    @abstractmethod
    def check_distinct(self, entries: Sequence[Entry]) -> None:
        """Raise ValueError if two variables share memory."""

    @abstractmethod
    def zeros(self, entry: Entry, dtype: str) -> Any:
        """A slot like the variable, in its memory layout and where it is placed."""

    def filled(self, entry: Entry, dtype: str, value: npt.NDArray[Any]) -> Any:
        """A slot like the variable that begins with this value."""
        slot = self.zeros(entry, dtype)
        self.assign(slot, value)
        return slot

    @abstractmethod
    def create(self, value: npt.NDArray[Any]) -> Any:
        """A state variable with this value, not tied to any variable of the model."""

    @abstractmethod
    def value(self, variable: Any) -> Any:
        """The number that a state variable holds: of Python on the host, else maybe traced."""

    @abstractmethod
    def rate(self, value: Any) -> Any:
        """A learning rate that a schedule or callable returned, checked as far as it is known."""

    def is_traced(self, value: Any) -> bool:
        """Whether a value is known only when the function runs that is traced now."""
        return False

    def overwrite(self, entry: Entry, calls: Any) -> None:
        """Set a variable to its average, once there have been calls."""
        self.assign(entry.variable, entry.average)

    def has(self, variable: Any) -> bool:
        """Whether it is a state variable that `create` could have made."""
        return False

    @abstractmethod
    def numpy(self, variable: Any) -> npt.NDArray[Any]:
        """The present value as a NumPy array; bfloat16 as float32."""

    @abstractmethod
    def assign(self, variable: Any, value: Any) -> None:
        """Overwrite a variable or slot by a value of its shape."""

    def created(self, optimizer: Any, name: str, variable: Any) -> None:
        """Note that this is a state variable: its value may have been waiting for it."""

    def form(self, variable: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """The shape and type of what `numpy` would return."""
        value = self.numpy(variable)
        return value.shape, value.dtype

    def array(self, variable: Any) -> Any:
        """The present value, to compute with."""
        return variable

    def shown(self, variable: Any) -> Any:
        """What users are given of a state variable: itself, where it can be overwritten."""
        return variable

    def count(self, variable: Any) -> Any:
        """The number of calls after a step, for `apply_gradients` to return without a wait."""
        return self.value(variable)

    def stand_ins(self, entries: Sequence[Entry], variables: list[Any]) -> list[Entry] | None:
        """The entries of variables that stand for those the optimizer was built with, as the
        arguments of a traced function may; None if these are the variables themselves.
        """
        return None

    def stands_for(self, variable: Any, entry: Entry) -> bool:
        """Whether a variable under the name of an entry is the same one, though another object."""
        return False

    def check_built(self, entries: Sequence[Entry]) -> None:
        """Raise an error if a variable is not any more what the optimizer was built with."""
        for entry in entries:
            now = self.describe(entry.key, entry.name)
            if (now.shape, now.dtype) != (entry.shape, entry.dtype):
                raise ValueError(
                    f"Variable '{entry.name}' must stay as it was built, of shape {entry.shape} "
                    f"and dtype {entry.dtype}. It now has shape {now.shape} and dtype "
                    f"{now.dtype}. Create a new optimizer for it."
                )

    @abstractmethod
    def gradient(self, gradient: Any, entry: Entry) -> Any:
        """A gradient, sparse ones coalesced, or an error naming the variable."""

    @abstractmethod
    def gather(self, selection: Selection, gradients: list[Any]) -> Any:
        """Checked gradients, one an entry, in the form that `sweep` takes."""

    def recognise(self, selection: Selection, gradients: list[Any], variables: list[Any]) -> Any:
        """What `gather` would return, if a glance shows that all is as at the last step; else None.

        Only there to be fast: whatever is not recognised is checked at length.
        """
        if self.fast is None:
            return None
        return self.fast.recognise(selection, gradients, variables)

    def run(
        self,
        advance: Advance,
        selection: Selection,
        gradients: Any,
        rate: Any,
        step: Any,
    ) -> Any:
        """Do `advance(selection, gradients, rate, step)`, as a compiled whole where that pays.

        `gradients` and `rate` change from call to call, and so may the numbers of `step`; a
        compiled step serves one `step.version`. What is returned is the number of calls after this
        one, or None to have it read.
        """
        with self.step_in_turn():
            advance(selection, gradients, rate, step)

    def part(self, gradients: Any, part: Part) -> Any:
        """What was gathered for a selection, of one of its parts."""
        return [gradients[i] for i in part.positions]

    def begun(self, variable: Any, updates: Any, gradients: Any) -> Any:
        """The `iterations` when variables were added, by the state variable that holds them.

        While it is negative, that is not known: then it is `updates`, the present number, which is
        stored as part of this step.
        """
        since = self.value(variable)
        if since >= 0:
            return since
        self.assign(variable, updates)
        return updates

    def check_untraced(self, what: str) -> None:
        """Raise ValueError in a function that is traced now, which what is done would outlive."""

    def untraced(self) -> AbstractContextManager[Any]:
        """In which what is assigned is no part of a function that is traced now."""
        return nullcontext()

    @property
    def keeps_state(self) -> bool:
        """Whether the state is kept here; else it is in the hands of who calls functions."""
        return True

    def check_readable(self) -> None:
        """Raise an error where state has no values yet, or others when what is traced is run."""

    def check_run(self) -> None:
        """Raise an error where what was done comes to nothing unless its result is asked for."""

    def clear(self, selection: Selection, gradients: Any) -> None:
        """Drop what has accumulated for the variables that have no gradient in this step."""
        for entry in selection.rest:
            self.assign(entry.accumulator, 0.0)

    def count_up(self, variable: Any, calls: Any, gradients: Any) -> None:
        """Count a step after `calls` others, the last thing that it does."""
        self.assign(variable, calls + 1)

    def calls(self, variable: Any) -> Any:
        """The count of steps as a step that is to follow them begins.

        Nobody is in the middle of storing one: what is read by this count is from after it.
        """
        with self.turn:
            return self.value(variable)

    def counted(self, variable: Any) -> int | None:
        """How many steps were counted so far, if that can be known at this moment."""
        return None

    def replace(self, entry: Entry, gradient: Any, iteration: Any, steps: int | None) -> None:
        """Make a gradient the value of its variable (Keras's `overwrite_with_gradient`).

        Of `steps` gradients under accumulation it is the largest, element by element.
        """
        raise NotImplementedError

    def constrain(self, entries: Sequence[Entry]) -> None:
        """Apply the constraints that Keras variables have, after a step."""

    def constrain_within(self, entries: Sequence[Entry]) -> None:
        """Apply the constraints of these entries, within a step."""
        for entry in entries:
            assert entry.constraint is not None
            with self.aside():
                value = entry.constraint(self.present(entry.variable))
            check_constrained(value, entry)
            self.assign(entry.variable, value)

    def present(self, variable: Any) -> Any:
        """The value at this point of a step, to compute with."""
        return self.array(variable)

    @abstractmethod
    def square_sums(self, group: Group, gradients: Any) -> list[Any]:
        """What a pass finds that measures gradients only: the sum of squares of each, in at least
        the precision of the arithmetic.
        """

    def norms(self, group: Group, gradients: Any, *, joint: bool) -> list[Any]:
        """The Euclidean norm of each gradient; or, alone in a list, that over all of them."""
        sums = self.square_sums(group, gradients)
        return list(map(self.functions.sqrt, [sum(sums)] if joint else sums))

    def clip_factors(
        self, group: Group, gradients: Any, clip: Any, threshold: Any
    ) -> Sequence[Any]:
        """What each gradient is multiplied by, as a `step.NormClip` says of what a pass finds that
        measures gradients only.
        """
        norms = self.norms(group, gradients, joint=clip.joint)
        factors: list[Any] = clip.factors(self.functions, norms, threshold)
        return factors * len(group.entries) if clip.joint else factors

    @abstractmethod
    def sweep(self, group: Group, gradients: Any) -> Sums:
        """Take every element of the group through `rule.make_element`, in place.

        Returns:
            What the pass measures.
        """

    @abstractmethod
    def update_each(
        self, group: Group, gradients: Any, update: Callable[[Any, Entry], None]
    ) -> None:
        """As `sweep`, with `update(gradient, entry)` for a rule, one variable after another."""

    @abstractmethod
    def stateless_apply(
        self, call: Stateless, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """New variables and new state, with everything that is passed in as it was."""

    @abstractmethod
    def branch(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
        """Do one or the other, by a condition that may be traced."""

    @abstractmethod
    def differentiate(
        self, loss: Any, variables: Sequence[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        """Gradients of `scale(loss)` by the library's own differentiation."""


def check_constrained(value: Any, entry: Entry) -> None:
    """Raise an error if a constraint returned what its variable cannot be set to."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    shape = np.shape(value) if shape is None else shape
    # A shape of TensorFlow may be known in part, or not at all: it is then checked as it runs.
    fits = getattr(shape, "rank", 0) is None or (
        len(shape) == len(entry.shape)
        and all(a in (None, b) for a, b in zip(shape, entry.shape, strict=True))
    )
    if isinstance(value, (np.ndarray, np.generic)) or dtype is None:
        is_typed = np.asarray(value).dtype.kind in "fiuV"  # which libraries convert
    else:
        is_typed = str(getattr(dtype, "name", dtype)).removeprefix("torch.") == entry.dtype
    if not fits or not is_typed:
        raise ValueError(
            f"The constraint of variable '{entry.name}' must return its shape, {entry.shape}, and "
            f"its dtype, {entry.dtype}. Received: {received(value)} of shape {shape} and dtype "
            f"{getattr(dtype, 'name', dtype)}."
        )


def takes_arguments(loss: Callable[..., Any]) -> bool:
    """Whether a loss wants the variables, rather than reading them from its closure."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(
        p.kind is p.VAR_POSITIONAL or (p.kind in positional and p.default is p.empty)
        for p in parameters
    )


def received(value: Any) -> str:
    """How an error describes a value that is no usable array."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, (int, float, complex, str, type(None), np.generic)):
        return f"{value!r} ({kind})"
    return kind
