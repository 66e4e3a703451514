"""What an optimizer keeps, under which names, and for which variables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import options
from .backends import backend_of
from .backends.base import Backend, Entry, received

Array = npt.NDArray[Any]


class State:
    """Counters, then slots in the order of their creation, which is the order of Keras's files.

    Before there are variables, counters are NumPy arrays; then they are the variables' library's.
    """

    # The entries of each extension, in the order of their state.
    extensions: tuple[tuple[Entry, ...], ...] = ()
    # Whether `stateless_apply` has returned what comes after it.
    is_given_away = False
    # The count then, if it is known: as long as it stays, the state here is behind.
    given_at: int | None = None

    def __init__(self) -> None:
        self.backend: Backend | None = None  # of the variables
        self.entries: tuple[Entry, ...] = ()
        self.index: dict[int, int] = {}  # id of a variable -> position of its entry
        self.iteration: Any = np.zeros((), np.int64)
        self.rate: Any = None  # the learning rate, if it is a number
        self.named: list[tuple[str, Any]] = [("iteration", self.iteration)]
        # From a pickle or a copy, until the variables that it is for are given.
        self.restored: Restored | None = None
        # What to set the slots to once they exist.
        self.awaited: Awaited | None = None
        self.is_filled = False  # whether those were set that every build creates
        # Of what is kept for a variable: the names of both, by what it stands under in `named`.
        self.slots: dict[str, tuple[str, str]] = {}
        self._names: UniqueNames | None = None

    def __copy__(self) -> State:
        """What it is now, to go back to."""
        new = object.__new__(State)
        new.__dict__ = self.__dict__ | {"named": self.named.copy(), "slots": self.slots.copy()}
        return new

    # --- counters ---

    def set_rate(self, rate: float | None) -> None:
        """Keep the learning rate as a number, or not at all."""
        self.named = [each for each in self.named if each[1] is not self.rate]
        self.rate = None if rate is None else self.create(np.array(rate, np.float64))
        if rate is not None:
            self.named.insert(1, ("learning_rate", self.rate))

    def create(self, value: Array) -> Any:
        """A state variable with this value."""
        return value if self.backend is None else self.backend.create(value)

    def read(self, scalar: Any) -> Any:
        """The number that a state variable holds."""
        # A counter may be of a library before that is known to be the variables'.
        return host(scalar).item() if self.backend is None else self.backend.value(scalar)

    def assign(self, variable: Any, value: Any) -> None:
        """Overwrite a variable of the model or of the state."""
        backend = self.backend
        if backend is None:
            kind = backend_of(variable)
            assert kind is not None
            backend = kind.over([variable])
        backend.assign(variable, value)

    def counted(self) -> int | None:
        """How many calls there were, if that can be known at this moment."""
        if self.backend is not None:
            return self.backend.counted(self.iteration)
        held = self.iteration
        return held.item() if isinstance(held, np.ndarray) else None

    def moved(self, value: Any) -> Any:
        """A counter that was made before the library was known, as that library's variable."""
        assert self.backend is not None
        is_own = self.backend.has(value)
        return value if is_own else self.backend.create(host(value))

    def replace_counter(self, value: Any, by: Any) -> None:
        """Count, or keep the rate, in another variable."""
        if value is self.iteration:
            self.iteration = by
        elif value is self.rate:
            self.rate = by
        self.named = [(name, by if each is value else each) for name, each in self.named]

    def is_counter(self, variable: Any) -> bool:
        """Whether it is there before there are variables."""
        return variable is self.iteration or variable is self.rate

    # --- variables ---

    def hold(self, entries: Iterable[Entry]) -> None:
        """Be for these variables, in this order."""
        self.entries = tuple(entries)
        self.index = {id(entry.key): i for i, entry in enumerate(self.entries)}

    def position(self, variable: Any) -> int:
        """Which of the variables it is; raises ValueError for others."""
        found = self.index.get(id(variable))
        if found is None:
            raise ValueError(
                f"Unknown variable: {received(variable)} of shape "
                f"{getattr(variable, 'shape', 'unknown')}. This optimizer was built with "
                f"{len(self.entries)} variables: {names_of(self.entries)}. It works on these "
                "objects only: add others by extend(variables), or create a new optimizer for "
                "them."
            )
        return found

    def track(
        self, owner: Any, name: str, variable: Any, slot: tuple[str, str] | None = None
    ) -> None:
        """Keep a new state variable under this name, or one like it that is not taken.

        It has the value that a pickle, a copy, or a checkpoint that `owner` reads has for it.

        Args:
            owner: the optimizer.
            name: the name.
            variable: what is kept.
            slot: if it is kept for a variable of the model, the name of that, and what it is.
        """
        assert self.backend is not None
        names = self._names
        if names is None or len(names) != len(self.named):
            names = self._names = UniqueNames(each for each, _ in self.named)
        unique = names.unique(name)
        self.named.append((unique, variable))
        if slot is not None:
            self.slots[unique] = slot
        if self.restored is not None:
            value = self.restored.state.get(unique)
            if value is None or value.shape != tuple(variable.shape):
                raise ValueError(
                    f"The state of this optimizer, from a pickle or a copy, has no '{unique}' of "
                    f"shape {tuple(variable.shape)}. It has {list(self.restored.state)}. Settings "
                    "that decide which state is kept cannot be changed."
                )
            with self.backend.untraced():
                self.assign(variable, value)
        if self.awaited is not None and self.is_filled:
            self.awaited.tracked(self, unique, variable)
        self.backend.created(owner, unique, variable)

    def names_for(self, backend: Backend, variables: Sequence[Any]) -> list[str]:
        """Names for variables that came without."""
        restored = self.restored
        if restored is not None and len(restored.variables) == len(variables):
            return [name for name, *_ in restored.variables]
        return list(
            map(UniqueNames().unique, (backend.name_of(v) or "variable" for v in variables))
        )

    def check_restored(self, entries: Sequence[Entry]) -> None:
        """Raise ValueError if a pickle or a copy is for other variables."""
        restored = self.restored
        if restored is None:
            return
        given = tuple((e.name, e.shape, e.dtype) for e in entries)
        for i, (name, shape, dtype, is_named) in enumerate(restored.variables):
            if len(given) == len(restored.variables) and given[i] == (name, shape, dtype):
                entries[i].is_named = entries[i].is_named or is_named
            else:
                found = given[i] if i < len(given) else "none"
                raise ValueError(
                    "The state of this optimizer, from a pickle or a copy, belongs to "
                    f"{len(restored.variables)} variables, of which number {i} is '{name}' of "
                    f"shape {shape} and dtype {dtype}. Received {len(given)} variables, of which "
                    f"number {i} is {found}. Pass all of them in the same order once, with "
                    "build(variables); afterwards a step may be given fewer."
                )

    # --- saved and set as a whole ---

    def await_weights(self, weights: Sequence[Any]) -> None:
        """Set the counters, and have slots set once they exist; or raise ValueError."""
        count = len(self.named)
        if len(weights) < count:
            raise ValueError(
                f"`set_weights` needs {[name for name, _ in self.named]} first, and then the state "
                f"of variables, which this optimizer is not built with yet. Received "
                f"{len(weights)} arrays."
            )
        counters = list(self.checked(self.named, weights[:count]))
        slots = list(self.real(weights[count:], count))
        for (_, variable), value in zip(self.named.copy(), counters, strict=True):
            self.assign(variable, value)
        self.restored = None
        self.awaited = Weights(slots) if slots else None

    @staticmethod
    def real(weights: Sequence[Any], begin: int) -> Iterator[Array]:
        """Copies of weights, of which more is not known yet.

        Args:
            weights: arrays.
            begin: which of the weights the first of them is, for messages.

        Raises:
            ValueError: if one does not hold real numbers.
        """
        for i, weight in enumerate(weights, begin):
            value = host(weight)
            if value.dtype.kind not in "fiuV" or isinstance(weight, np.ma.MaskedArray):
                raise ValueError(
                    f"Number {i} of the weights must hold real numbers. Received dtype "
                    f"{value.dtype} and shape {value.shape}."
                )
            yield np.array(value)

    def saved(self) -> dict[str, Array]:
        """Copies of the state by name, and of what still waits for the variables it is for."""
        # Before there are variables, a checkpoint may have brought counters of TensorFlow's.
        backend = self.backend
        read = copied if backend is None else backend.numpy
        with nullcontext() if backend is None else backend.turn:  # of one step, the whole state
            saved = {name: read(value) for name, value in self.named}
        if self.restored is not None:
            for name, value in self.restored.state.items():
                saved.setdefault(name, np.array(value))
        return saved

    def set(self, weights: Sequence[Any]) -> None:
        """Set all of it, or raise ValueError and set nothing."""
        if len(weights) != len(self.named):
            raise ValueError(
                f"`set_weights` needs {len(self.named)} arrays, one for each of "
                f"{[name for name, _ in self.named]}. Received {len(weights)}."
            )
        arrays = list(self.checked(self.named, weights))
        assert self.backend is not None
        with self.backend.turn:
            for (_, variable), value in zip(self.named, arrays, strict=True):
                self.backend.assign(variable, value)

    def form(self, variable: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and type of a state variable, as files have it."""
        if self.backend is not None:
            return self.backend.form(variable)
        value = host(variable)
        return value.shape, value.dtype

    def checked(self, named: Sequence[tuple[str, Any]], weights: Sequence[Any]) -> Iterator[Array]:
        """What state variables are to be set to, as arrays of their shapes and types.

        Raises:
            ValueError: if one does not fit.
        """
        for (name, variable), weight in zip(named, weights, strict=True):
            (shape, dtype), value = self.form(variable), host(weight)
            is_masked = isinstance(weight, np.ma.MaskedArray)
            fits = value.shape == shape and value.dtype.kind in "fiu" and not is_masked
            is_count = dtype.kind in "iu"
            if not fits or (is_count and not all(float(x).is_integer() for x in value.flat)):
                raise ValueError(
                    f"State variable '{name}' must be set to {'whole' if is_count else 'real'} "
                    f"numbers of shape {shape} (its dtype is {dtype}). Received shape "
                    f"{value.shape} and dtype {value.dtype}. Pass what get_weights() returned for "
                    "the same variables and settings."
                )
            if is_count:
                self._check_whole(name, variable, value, dtype)
            with np.errstate(over="ignore"):  # infinite in a smaller type, which a rate must not be
                value = value.astype(dtype)
            if variable is self.rate:
                options.rate(name, value)
            yield value

    def _check_whole(self, name: str, variable: Any, value: Array, dtype: np.dtype[Any]) -> None:
        """Raise ValueError if whole numbers cannot be held, or are none of what is counted."""
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        low = 0 if variable is self.iteration else low
        wrong = [x for x in map(int, value.ravel().tolist()) if not low <= x <= high]
        if wrong:
            raise ValueError(
                f"State variable '{name}' must be set to whole numbers from {low} to {high} (its "
                f"dtype is {dtype}). Received: {wrong[0]}."
            )

    def apart(self) -> State:
        """A copy without the variables, for which all but the counters then waits."""
        held = tuple((e.name, e.shape, e.dtype, e.is_named) for e in self.entries) or (
            self.restored.variables if self.restored else ()
        )
        new, saved = State(), self.saved()
        names = {id(value): name for name, value in self.named}
        new.iteration = saved.pop(names[id(self.iteration)])
        new.named = [("iteration", new.iteration)]
        if self.rate is not None:
            new.rate = saved.pop(names[id(self.rate)])
            new.named.append(("learning_rate", new.rate))
        new.restored = Restored(held, saved) if held else None
        new.awaited = self.awaited
        return new


class Restored(NamedTuple):
    """State from a pickle or a copy, until the variables that it is for are given."""

    # Name, shape, dtype, and whether its user named it.
    variables: tuple[tuple[str, tuple[int, ...], str, bool], ...]
    state: dict[str, Array]  # beside the counters


class Awaited(ABC):
    """Values for slots that there are none of yet."""

    @abstractmethod
    def fill(self, engine: Any, *, is_complete: bool) -> Awaited | None:
        """Set the slots that an engine was just built with.

        Args:
            engine: which has its variables and their slots.
            is_complete: whether it has all slots; else a user's `build` creates more.

        Returns:
            What waits for those; None if nothing does.

        Raises:
            ValueError: if the values do not fit. The build is taken back then.
        """

    def extensions(self, backend: Backend, entries: Sequence[Entry]) -> list[list[str]]:
        """The names of the variables of each extension, if that is told by what waits."""
        return []

    @abstractmethod
    def tracked(self, state: State, name: str, variable: Any) -> None:
        """A user's `build` has created a state variable: set it."""

    @abstractmethod
    def check_all_set(self) -> Awaited | None:
        """What still waits, now that there are all slots.

        Raises:
            ValueError: if a value is left for which there will be none.
        """

    @abstractmethod
    def values(self) -> list[Array]:
        """Copies of the values, in the order of the slots.

        Raises:
            ValueError: if the order is not known.
        """


class Weights(Awaited):
    """What `set_weights` was given before the build, or `migrate` took over: slots in order."""

    def __init__(self, slots: Sequence[Array]) -> None:
        self.slots = list(slots)

    def fill(self, engine: Any, *, is_complete: bool) -> Weights | None:
        """As of `Awaited`."""
        state: State = engine._state
        assert state.backend is not None
        own = [each for _, each in state.named]
        try:
            with state.backend.untraced():
                now = [np.asarray(state.read(each)) for each in own if state.is_counter(each)]
                count = len(self.slots) if is_complete else len(own) - len(now)
                state.set([*now, *self.slots[:count]])
        except ValueError as error:
            raise ValueError(f"{_OF_OTHERS} {error}") from error
        return None if is_complete else Weights(self.slots[count:])

    def tracked(self, state: State, name: str, variable: Any) -> None:
        """As of `Awaited`."""
        if not self.slots:
            raise ValueError(f"{_OF_OTHERS} There was no array for '{name}' in it.")
        (value,) = state.checked([(name, variable)], [self.slots.pop(0)])
        assert state.backend is not None
        with state.backend.untraced():
            state.assign(variable, value)

    def check_all_set(self) -> Weights | None:
        """As of `Awaited`."""
        if self.slots:
            raise ValueError(f"{_OF_OTHERS} {len(self.slots)} arrays of it were left over.")
        return None

    def values(self) -> list[Array]:
        """As of `Awaited`."""
        return list(map(np.array, self.slots))


_OF_OTHERS = "The state that was set before the build belongs to other variables."


class UniqueNames:
    """Keras's way to tell variables of one name apart: dense, dense_1, dense_2."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._last: dict[str, int] = {}  # the number that a name was given last

    def __len__(self) -> int:
        return len(self._taken)

    def unique(self, name: str) -> str:
        """The name, or with a number behind it if that is taken; taken from now on."""
        found, i = name, self._last.get(name, 0)
        while found in self._taken:
            i += 1
            found = f"{name}_{i}"
        self._last[name] = i
        self._taken.add(found)
        return found


def names_of(entries: Sequence[Entry]) -> list[str]:
    """Names of variables, for messages."""
    names = [entry.name for entry in entries]
    return names if len(names) <= 12 else [*names[:12], f"... ({len(names)} in all)"]


def initial(initializer: Any, shape: tuple[int, ...], dtype: str) -> Array:
    """The values that a state variable begins with."""
    if initializer == "zeros":
        return np.zeros(shape, dtype)
    if initializer == "ones":
        return np.ones(shape, dtype)
    if callable(initializer):
        value = np.asarray(initializer(shape, dtype), dtype)
        if value.shape == shape:
            return value
        raise ValueError(f"The initializer must return shape {shape}. Received {value.shape}.")
    raise ValueError(
        "`initializer` must be 'zeros', 'ones' or a callable (shape, dtype). Received: "
        f"{initializer!r}"
    )


def host(value: Any) -> Array:
    """A value of any library as a NumPy array."""
    backend = backend_of(value)
    return np.asarray(value) if backend is None else backend.over([value]).numpy(value)


def copied(value: Any) -> Array:
    """The same, as a copy."""
    return np.array(host(value))
