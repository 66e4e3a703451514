"""JAX: a step is one call of a compiled function of arrays, and on the CPU one call of the kernels.

`jax.jit` takes Refs too, but spends some 10 us of Python on each of them (JAX 0.10), while an array
costs 1 us. So the arrays are taken out of the Refs and donated, and the new ones are put back.

Private names of JAX: `jax._src.core.trace_state_clean`, which is tried in and out of functions that
are traced; and the `_refs._buf` of a Ref, which is where its array lies, tried on a Ref. Without
them it is asked by an operation, and a compiled step closes over the Refs.
"""

from __future__ import annotations

import atexit
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import chain, repeat
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import slow
from ..backends import jax as plain
from ..backends.base import FLOATS, Advance, Entry, Fast, Group, Latest, Selection, Sums
from ..backends.functional import Functional, NotOurs, Pure
from ..kernels import cpu
from ..rule import AdamCoefficients, Pass, Rule, make_adam
from ..tuned import IN_A_CALL
from . import once, xla

# A step for given gradients, and a given rate (of a callable, else None) and numbers.
Call = Callable[[Any, Any], None]
# How many steps a selection keeps compiled, by what the settings make of a step.
_KEPT = 16
# How a step is traced: for the kernels of the CPU to run it, or to see what it overwrites.
_BY_KERNELS, _REHEARSED = "by kernels", "rehearsed"


class FastJAX(Fast):
    """Knows arrays by their types and forms, and keeps what was compiled for a selection."""

    def __init__(self, backend: plain.JAX) -> None:
        self._backend = backend
        self.nothing_is_traced: Callable[[], bool] = look_for_traces()
        # The numbers of the latest step, whether in double precision, and as an array.
        self._numbers: tuple[tuple[Any, ...], bool, Any] | None = None
        # Whether a step in a function that a user compiles calls the kernels: see `prefer_kernels`.
        self._prefers_kernels = False

    # --- recognising ---

    def note(self, selection: Selection, gathered: list[Any]) -> None:
        _prepared(selection).before = ArraysBefore.of(selection, gathered)

    def recognise(
        self, selection: Selection, gradients: list[Any], variables: list[Any]
    ) -> list[Any] | None:
        prepared: PreparedByJAX | None = selection.prepared
        before = None if prepared is None else prepared.before
        if before is None or not self.nothing_is_traced():
            return None
        return gradients if before.fits(gradients, variables) else None

    # --- one variable ---

    def value_at_hand(self, variable: Any) -> Any:
        """The array of a Ref itself, to be read before anything overwrites it; None of others."""
        if isinstance(variable, jax.Ref) and self.nothing_is_traced() and refs_are_open():
            return variable._refs._buf
        return None

    def put(self, variable: Any, array: Any) -> bool:
        """Give a Ref an array that is nobody else's, without compiling anything; whether it did."""
        if not (isinstance(variable, jax.Ref) and refs_are_open()):
            return False
        variable._refs._buf = array
        return True

    @staticmethod
    def dense(gradient: Any) -> Any:
        """A BCOO as an array."""
        return _dense(gradient)

    # --- a step ---

    def run(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> None:
        """A step where nothing is traced."""
        call, given = _call(advance, selection, step), (rate, step.numbers)
        program = _prepared(selection).programs.found(
            step.version, lambda: self._program(call, selection, gradients, given)
        )
        program(gradients, given)

    def run_in_trace(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> None:
        """A step in a function that a user transforms or compiles."""
        call, given = _call(advance, selection, step), (rate, step.numbers)
        if self._prefers_kernels:
            self._run_by_kernels(call, selection, gradients, given)
        else:
            self._backend.run_here(lambda: call(gradients, given), selection)

    def run_pure(
        self, pure: Pure, selection: Selection, arguments: tuple[Any, ...], step: Any
    ) -> list[Any]:
        """What `pure(*arguments)` returns, by a program for all of `step.version`."""
        stateless = _prepared(selection).stateless
        program = stateless.found(step.version, lambda: jax.jit(pure))
        *given, _ = arguments
        new: list[Any] = program(*given, self.argument(step.numbers))
        return new

    def argument(self, numbers: tuple[Any, ...]) -> Any:
        """Numbers as an argument of a program: an array, which is made anew where they changed."""
        is_wide, known = bool(jax.config.jax_enable_x64), self._numbers
        if known is None or known[0] is not numbers or known[1] != is_wide:
            if not all(isinstance(x, float) for x in numbers):
                return numbers
            with np.errstate(over="ignore"):
                values = np.array(numbers, np.float64 if is_wide else np.float32)
            known = self._numbers = numbers, is_wide, jax.device_put(values)
        return known[2]

    def _program(self, call: Call, selection: Selection, gradients: Any, given: Any) -> Call:
        backend = self._backend
        try:
            changed, kept = self._rehearse(call, selection, gradients, given)
        except NotOurs:

            def in_turn(gradients: Any, given: Any) -> None:
                Functional.run(
                    backend,
                    lambda selection, gradients, given, step: call(gradients, given),
                    selection,
                    gradients,
                    given,
                    None,
                )

            return in_turn
        except _UNTRACEABLE as error:
            error.add_note(_TRACEABLE)
            raise
        if refs_are_open() or not any(isinstance(v, jax.Ref) for v in changed):
            return JAXStep(backend, self, call, selection, changed, kept)

        def here(gradients: Any, given: Any) -> None:
            backend.run_here(lambda: call(gradients, given), selection)

        # Which closes over the Refs, as JAX documents it.
        compiled = InTurn(backend, here)
        return lambda gradients, given: compiled.call(
            gradients, (given[0], self.argument(given[1]))
        )

    def _rehearse(
        self, call: Call, selection: Selection, gradients: Any, given: Any
    ) -> tuple[list[Any], list[Any]]:
        """The variables that a step overwrites, and those it only reads; nothing is computed."""
        cells: dict[int, tuple[Any, Any]] = {}
        stored: set[int] = set()

        def rehearsed(gradients: Any, given: Any) -> None:
            step = lambda: call(gradients, given)  # noqa: E731
            stored.update(self._backend.inline(step, selection, cells, _REHEARSED))

        jax.eval_shape(rehearsed, gradients, given)
        changed = [v for key, (v, _) in cells.items() if key in stored]
        return changed, [v for key, (v, _) in cells.items() if key not in stored]

    # --- by the kernels of the CPU ---

    def prefer_kernels(self, variables: Sequence[Any]) -> None:
        """Let steps in functions that are compiled call the kernels, if all is on one CPU.

        Values that such a function is given may lie elsewhere than these variables, and how they
        are sharded is not known before it is compiled: there must be no other device to lie on.
        """
        self._prefers_kernels = (
            jax.default_backend() == "cpu"
            and jax.device_count() == 1
            and all(map(_is_on_cpu, variables))
            and kernels_work()
        )

    def _run_by_kernels(self, call: Call, selection: Selection, gradients: Any, given: Any) -> None:
        """A step inside a trace by the kernels, which XLA alone can differentiate."""
        backend = self._backend
        try:
            changed, kept = self._rehearse(call, selection, gradients, given)
        except NotOurs:
            backend.run_here(lambda: call(gradients, given), selection)
            return

        def step(by: bool, values: list[Any], gradients: Any, given: Any) -> list[Any]:
            cells = {id(v): (v, x) for v, x in zip((*changed, *kept), values, strict=True)}
            how = _BY_KERNELS if by else ""
            backend.inline(lambda: call(gradients, given), selection, cells, how)
            return [cells[id(v)][1] for v in changed]

        by_kernels = jax.custom_jvp(partial(step, True))
        by_kernels.defjvp(partial(jax.jvp, partial(step, False)))
        values = [backend.load(v) for v in (*changed, *kept)]
        new = by_kernels(values, gradients, given)
        for variable, value in zip(changed, new, strict=True):
            backend.store(variable, value)

    def is_by_kernels(self) -> bool:
        """Whether the passes of the step that this thread is in the middle of call the kernels."""
        return self._backend.how == _BY_KERNELS and cpu.available()

    def scaled_sums(self, group: Group, gradients: Any) -> list[tuple[Any, Any]]:
        """As `Arrays.scaled_sum` of each gradient that is to be applied."""
        totals, scales = self._sweep(group, gradients)
        return list(zip(totals[:, 0], scales[:, 0], strict=True))

    def sweep(self, group: Group, gradients: Any) -> Sums:
        """As `Backend.sweep`."""
        totals, scales = self._sweep(group, gradients)
        measured = group.kind.measured
        return lambda: list(zip(*(totals * scales**2).T, strict=True)) if measured else []

    def _sweep(self, group: Group, gradients: Any) -> tuple[Any, Any]:
        """Do a pass, and return what it measures: sums of what was divided by a scale, and that."""
        kind, entries, measured = group.kind, group.entries, len(group.kind.measured)
        found: dict[int, Any] = {}
        for dtype, gradient_dtype, decayed, chosen in _calls(kind, entries, gradients):
            wide = entries[chosen[0]].slot_dtype
            sizes = [math.prod(entries[i].shape) for i in chosen]
            decaying = kind._replace(decayed=decayed)
            job = xla.job(decaying, group.rule, dtype, gradient_dtype, sizes)
            streams = [each for i in chosen for each in _streams(kind, entries[i])]
            old = [self._backend.read(variable) for variable, _ in streams]
            stored = [i for i, (_, is_stored) in enumerate(streams) if is_stored]
            forms = [jax.ShapeDtypeStruct(old[i].shape, old[i].dtype) for i in stored]
            if measured:
                forms.append(jax.ShapeDtypeStruct((2, len(chosen), measured), wide))
            call = jax.ffi.ffi_call(
                _TARGET,
                forms,
                vmap_method="sequential",
                input_output_aliases={2 + i: k for k, i in enumerate(stored)},
            )
            factors = [group.factors[i] for i in chosen if kind.clipped_by_factor]
            coefficients = _row((*group.pass_c, *group.rule_c, *factors), wide)
            given = [_readable(gradients[i], wide) for i in chosen if kind.gradient]
            new = call(job.plan, coefficients, *old, *given)
            for i, value in zip(stored, new, strict=False):
                self._backend.write(streams[i][0], value)
            if measured:
                found.update(zip(chosen, jnp.moveaxis(new[-1], 1, 0), strict=True))
        if not measured:
            return None, None
        both = jnp.stack([found[i] for i in range(len(entries))])
        return both[:, 0], both[:, 1]


# --- what is kept for a selection ---


class ArraysBefore:
    """What gradients looked like in the last step that was checked at length.

    Args:
        selection: the entries that they were for.
        gradients: all of the one type that arrays have.
    """

    def __init__(self, selection: Selection, gradients: Sequence[Any]) -> None:
        self._own = [entry.variable for entry in selection.entries]
        self._type: Any = type(gradients[0])
        self._forms = _forms(gradients)

    @classmethod
    def of(cls, selection: Selection, gradients: Sequence[Any]) -> ArraysBefore | None:
        """None if there is nothing to know them by."""
        types = set(map(type, gradients))
        is_usual = len(types) == 1 and not issubclass(next(iter(types)), Tracer)
        return cls(selection, gradients) if is_usual else None

    def fits(self, gradients: list[Any], variables: list[Any]) -> bool:
        """Whether these are such gradients, for the same variables."""
        return (
            len(variables) == len(self._own)
            and all(map(is_, variables, self._own))
            and all(map(is_, map(type, gradients), repeat(self._type)))
            and _forms(gradients) == self._forms
            and not any(map(self._type.is_deleted, gradients))
        )


@dataclass(eq=False)
class PreparedByJAX:
    """What is kept for a selection."""

    before: ArraysBefore | None = None
    # By `Step.version`.
    programs: Latest = field(default_factory=lambda: Latest(_KEPT))
    stateless: Latest = field(default_factory=lambda: Latest(_KEPT))


def _prepared(selection: Selection) -> PreparedByJAX:
    found: PreparedByJAX | None = selection.prepared
    if found is None:
        found = selection.prepared = PreparedByJAX()
    return found


def _forms(arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return [a.shape for a in arrays], [a.dtype for a in arrays]


# --- programs ---


_UNTRACEABLE = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
_TRACEABLE = (
    "omniadam compiles the whole step, and the learning rate's schedule with it. A schedule of "
    "your own must take a traced step, using jax.numpy and no `if`. Or give a callable without "
    "arguments, which is called outside at each step."
)


def _call(advance: Advance, selection: Selection, step: Any) -> Call:
    def call(gradients: Any, given: Any) -> None:
        rate, numbers = given
        advance(selection, gradients, rate, step.by(numbers))

    return call


class JAXStep:
    """A step compiled for one selection, as a function of the arrays in its Refs."""

    def __init__(
        self,
        backend: plain.JAX,
        fast: FastJAX,
        call: Call,
        selection: Selection,
        changed: list[Any],
        kept: list[Any],
    ) -> None:
        self._backend, self._fast = backend, fast
        # The array in a Ref is the Ref's alone; elsewhere users may have it in their hands.
        self._owns = all(isinstance(v, jax.Ref) for v in changed)
        # Where arrays lie, and under which name.
        self._name = "_buf" if self._owns else "array"
        self._array_of = attrgetter(self._name)
        self._changed, self._kept = (
            [v._refs if self._owns else v for v in each] for each in (changed, kept)
        )
        counters = [v for v in changed if backend.is_count(v)]
        self._counters = [(id(v), SimpleNamespace()) for v in counters]
        self._targets = [*self._changed, *(place for _, place in self._counters)]
        for each in self._changed:
            # As in jax.new_ref(1.0). What a step stores is not, and would compile a second step.
            with backend.turn:
                array = self._array_of(each)
                if array.weak_type or not array.committed:
                    strong = jax.device_put(jnp.array(array, array.dtype), array.sharding)
                    setattr(each, self._name, strong)

        def step(
            how: str, old: list[Any], others: list[Any], gradients: list[Any], given: Any
        ) -> list[Any]:
            cells = {id(v): (v, x) for v, x in zip(changed, old, strict=True)}
            cells |= {id(v): (v, x) for v, x in zip(kept, others, strict=True)}
            backend.inline(lambda: call(gradients, given), selection, cells, how)
            # A count that is returned is no memory of a Ref, which the next step overwrites.
            return [cells[id(v)][1] for v in (*changed, *counters)]

        def omniadam_step(*arguments: Any) -> list[Any]:
            return step(_BY_KERNELS if has_kernels else "", *arguments)

        has_kernels = self._owns and all(map(_is_on_cpu, changed)) and kernels_work()
        places = None
        if any(len(v.sharding.device_set) > 1 for v in changed):
            places = [v.sharding for v in (*changed, *counters)]
        self._compiled = InTurn(backend, omniadam_step, donate_argnums=0, out_shardings=places)
        self._keeping = InTurn(backend, partial(step, ""), out_shardings=places)

    def __call__(self, gradients: Any, given: Any) -> None:
        # Where NaN raises an error, the old values are still needed then.
        config = jax.config
        keeps = config.jax_debug_nans or config.jax_debug_infs or config.jax_disable_jit
        run = self._compiled if self._owns and not keeps else self._keeping
        arguments = partial(self.arguments, gradients, given)

        def use(compiled: Any) -> None:
            # Once the old arrays are given away, the new ones must reach their Refs. This is one
            # call into C, so that a KeyboardInterrupt comes before it or after it.
            new = chain.from_iterable(map(compiled, *zip(arguments())))
            deque(map(setattr, self._targets, repeat(self._name), new), maxlen=0)
            array_of = self._array_of
            self._backend.note_counts({key: array_of(place) for key, place in self._counters})

        run.by(use, arguments)

    def arguments(self, gradients: Any, given: Any) -> tuple[Any, ...]:
        """What the compiled function is called with."""
        old, others = (
            list(map(self._array_of, self._changed)),
            list(map(self._array_of, self._kept)),
        )
        return old, others, gradients, (given[0], self._fast.argument(given[1]))

    def lowered(self, gradients: Any, given: Any) -> Any:
        """The function before it is compiled, to look at."""
        return self._compiled.jitted.lower(*self.arguments(gradients, given))


class _Untraced(Exception):
    """A compiled function is to be traced, and its caller has the turn."""


class InTurn:
    """A compiled function that is run in turn, but traced before: it may call users' functions."""

    def __init__(self, backend: plain.JAX, function: Callable[..., Any], **settings: Any) -> None:
        self._backend, self._thread = backend, threading.local()
        self._function, self._settings = function, settings
        # By the forms of arguments. One for all would have to forget what it compiled for others:
        # calls of a function whose tracing failed once are slow from then on.
        self._of_forms = Latest(_KEPT)
        self.jitted = self._made()

    def _made(self) -> Any:
        function, thread = self._function, self._thread

        @wraps(function)
        def traced(*arguments: Any) -> Any:
            if getattr(thread, "has_turn", False):
                raise _Untraced
            return function(*arguments)

        return jax.jit(traced, **self._settings)

    def _traced(self, arguments: tuple[Any, ...]) -> Any:
        jitted = self._made()
        jitted.trace(*arguments)
        return jitted

    def call(self, *arguments: Any) -> None:
        """Call it."""
        self.by(lambda compiled: compiled(*arguments), lambda: arguments)

    def by(self, use: Callable[[Any], None], arguments: Callable[[], Any]) -> None:
        """Let it be used, by what calls the compiled function once, with these arguments."""
        if jax.config.jax_disable_jit:  # it is run as Python, and all that it calls
            use(self.jitted)
            return
        thread, latest = self._thread, self.jitted
        if len(self._of_forms) > 1:  # in turn, perhaps, and a call in vain takes long
            latest = self._of_forms.get(_form(arguments()), latest)
        try:
            with self._backend.step_in_turn():
                thread.has_turn = True
                use(latest)
                return
        except _Untraced:
            pass
        finally:
            thread.has_turn = False
        given = arguments()
        latest = self._of_forms.found(_form(given), lambda: self._traced(given))
        self.jitted = latest
        with self._backend.step_in_turn():
            use(latest)


def _form(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of these arguments is traced for."""
    leaves, tree = jax.tree.flatten(arguments)
    types = [(getattr(x, "dtype", type(x)), getattr(x, "weak_type", None)) for x in leaves]
    return tree, tuple(types), tuple(map(np.shape, leaves)), bool(jax.config.jax_enable_x64)


_dense = jax.jit(plain.dense)


# --- private names of JAX ---


@once
def look_for_traces() -> Callable[[], bool]:
    """What says whether nothing is traced: JAX's own, if it means what is believed here."""
    try:
        from jax._src.core import trace_state_clean

        def looked(x: Any) -> Any:
            found.append(trace_state_clean())
            return x

        found: list[bool] = []
        thread = threading.Thread(target=looked, args=(None,))  # in which nothing is
        thread.start()
        thread.join()
        jax.eval_shape(looked, jax.ShapeDtypeStruct((2,), np.float32))
        jax.vmap(looked)(np.zeros(2, np.float32))
        is_right = [each is True for each in found] == [True, False, False]
    except Exception:  # whatever another version may say to that
        is_right = False
    if is_right:
        own: Callable[[], bool] = trace_state_clean
        return own
    slow.warn_gone(
        "jax",
        jax.__version__,
        "`jax._src.core.trace_state_clean`",
        "each step runs an operation to learn whether it is traced",
    )
    return plain.nothing_is_traced


@once
def refs_are_open() -> bool:
    """Whether a Ref of this version of JAX holds its array where `JAXStep` takes it out."""
    try:
        ref, other = jax.new_ref(jnp.zeros(())), jnp.ones(())
        is_known = type(ref._refs._buf) is type(other)
        ref._refs._buf = other
        is_read = float(ref[...]) == 1.0 and float(jax.jit(lambda: ref[...])()) == 1.0
        is_right = is_known and is_read
    except Exception:
        is_right = False
    if not is_right:
        slow.warn_gone(
            "jax",
            jax.__version__,
            "`_refs._buf` of a Ref",
            "each step spends some 10 us of Python on each Ref",
        )
    return is_right


# --- the kernels of the CPU ---

_TARGET = "omniadam_kernel"


def _calls(
    kind: Pass, entries: Sequence[Entry], gradients: Sequence[Any]
) -> list[tuple[str, str, bool, list[int]]]:
    """Positions of the entries that one call serves, under the types and whether they decay."""
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for i, entry in enumerate(entries):
        given = gradients[i].dtype.name if kind.gradient else entry.dtype
        given = given if given in FLOATS else entry.slot_dtype
        groups.setdefault((entry.dtype, given, kind.decayed and entry.decayed), []).append(i)
    return [
        (*key, chosen[i : i + IN_A_CALL])
        for key, chosen in groups.items()
        for i in range(0, len(chosen), IN_A_CALL)
    ]


def _streams(kind: Pass, entry: Entry) -> list[tuple[Any, bool]]:
    """What a pass touches of an entry, in the order that a `Job` takes it, and whether it is
    overwritten.
    """
    return [
        *([] if kind.measures_only else [(entry.variable, kind.stores_variable)]),
        *((slot, True) for slot in entry.slots if kind.stores_slots),
        *([(entry.accumulator, kind.stores_accumulator)] if kind.accumulated else []),
        *([(entry.average, True)] if kind.averaged else []),
    ]


def _readable(gradient: Any, dtype: str) -> Any:
    """A gradient of a type that kernels read."""
    return gradient if gradient.dtype.name in FLOATS else gradient.astype(dtype)


def _row(coefficients: Sequence[Any], dtype: str) -> Any:
    """All coefficients as one array."""
    return jnp.stack([jnp.asarray(v, dtype) for v in coefficients])


def _is_on_cpu(variable: Any) -> bool:
    devices = variable.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


# The first version of JAX that calls the kernels. Those before leave every step to XLA, as usual.
_CALLS_KERNELS = (0, 8, 1)


@once
def kernels_work() -> bool:
    """Whether this version of JAX calls the kernels: tried on two numbers that each move by 1."""
    if jax.__version_info__ < _CALLS_KERNELS:
        return False
    try:
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(xla.handler()), platform="cpu")
        slots = "momentum", "velocity"
        rule = Rule(make_adam, slots, AdamCoefficients._fields, (("amsgrad", False),))
        job = xla.job(Pass(gradient=True, updates=True), rule, "float32", "float32", [2])
        form = jax.ShapeDtypeStruct((2,), np.float32)
        call = jax.ffi.ffi_call(_TARGET, [form] * 3, input_output_aliases={2: 0, 3: 1, 4: 2})
        w, g, zero, c = (
            np.array(x, np.float32) for x in ([1, 2], [3, -4], [0, 0], [*[0] * 8, 1, 1, 1, 0])
        )
        with jax.default_device(jax.devices("cpu")[0]):
            w, m, v = jax.jit(call)(job.plan, c, w, zero, zero, g)
        atexit.register(_wait_for_steps)
        is_right = [*w.tolist(), *m.tolist(), *v.tolist()] == [0.0, 3.0, 3.0, -4.0, 9.0, 16.0]
    except Exception:
        is_right = False
    if not is_right and cpu.available():  # else it is known why
        slow.warn_gone(
            "jax",
            jax.__version__,
            "foreign functions that take machine code",
            "steps on the CPU are left to XLA, which passes over memory once for each array",
        )
    return is_right


def _wait_for_steps() -> None:
    """Before the interpreter goes, and the memory of the jobs with it."""
    with suppress(Exception):  # of a program that failed
        jax.block_until_ready(jax.live_arrays())
