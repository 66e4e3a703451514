"""TensorFlow: an eager step is one call of a function, which XLA compiles where it takes it.

Private names of TensorFlow, each tried on what is made for it: of an eager tensor `_shape_tuple`
and `_datatype_enum`; of a concrete function `_inference_function.call_flat`; and
`GraphOrParentsInXlaContext`, which tells what compiles a user's function. Without the first two
tensors are recognised by their public looks, without the third a call takes longer, and without
the last norms in a user's function are summed as they are without this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from .. import slow
from ..backends import tensorflow as plain
from ..backends.base import (
    Advance,
    Entry,
    Fast,
    Group,
    Latest,
    Selection,
    Sums,
    nothing_measured,
)
from ..backends.functional import Functional, NotOurs
from ..tuned import LANES, PART
from . import once

# How many steps a selection keeps compiled, by what the settings make of a step.
_KEPT = 16
# How a step is traced as a program: in one part, or in parts that XLA compiles one by one.
_WHOLE, _IN_PARTS, _WITHIN = "whole", "in parts", "whole, within a user's function"
# Whether what is traced now as part of an eager step is compiled by XLA; None if it is no part.
_by_xla: ContextVar[bool | None] = ContextVar("omniadam_by_xla", default=None)


class FastTensorFlow(Fast):
    """Knows tensors by their types and forms, and keeps what was compiled for a selection."""

    # Whether eager steps are compiled by XLA; where it cannot, they are not.
    jit_compile: ClassVar[bool] = True

    def __init__(self, backend: plain.TensorFlow) -> None:
        self._backend = backend

    # --- recognising ---

    def note(self, selection: Selection, gathered: list[Any]) -> None:
        if tf.executing_eagerly() and not any(map(tf.is_symbolic_tensor, gathered)):
            _prepared(selection).before = TensorsBefore(selection, gathered)

    def recognise(
        self, selection: Selection, gradients: list[Any], variables: list[Any]
    ) -> list[Any] | None:
        prepared: PreparedByTensorFlow | None = selection.prepared
        before = None if prepared is None else prepared.before
        if before is None or not tf.executing_eagerly() or tf.distribute.has_strategy():
            return None
        return gradients if before.fits(gradients, variables) else None

    # --- an eager step ---

    def run(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any]:
        """A step; the counters after it."""
        program = _prepared(selection).programs.found(
            (step.version, rate is None, *(g.dtype for g in gradients)),
            lambda: TensorFlowStep(
                self._backend, self.jit_compile, advance, selection, gradients, rate, step
            ),
        )
        counts: dict[int, Any] = program(gradients, rate, step.numbers)
        return counts

    # --- a step in a user's function ---

    def is_by_xla(self) -> bool | None:
        """Whether XLA compiles what is traced now; None if that cannot be told."""
        return is_by_xla()

    def takes(self, selection: Selection, step: Any) -> bool:
        """Whether XLA is to compile a step that is traced in a user's function, which it does not
        compile: of variables on the host, and without functions of the user's in its middle.
        """
        return (
            self.jit_compile
            and step.update is None
            and not selection.constrained
            and is_by_xla() is False
            and _are_on_host((*selection.entries, *selection.rest))
            and is_xla_there()
        )

    def run_in_function(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any]:
        """Such a step; the counters after it."""
        arguments = advance, selection, gradients, rate, step
        # If computing a gradient is an error, nothing is to be stored.
        with tf.control_dependencies(gradients):
            if len(_parts((*selection.entries, *selection.rest))) == 1:
                with suppress(NotOurs):
                    return self._run_within(arguments)
            counts: dict[int, Any] = self._backend.run_here(*arguments, _IN_PARTS)
        return counts

    def _run_within(self, arguments: tuple[Advance, Selection, Any, Any, Any]) -> dict[int, Any]:
        keys: list[int] = []

        def omniadam_step() -> list[Any]:
            token = _by_xla.set(True)
            try:
                counts = self._backend.run_here(*arguments, _WITHIN)
            finally:
                _by_xla.reset(token)
            keys[:] = counts
            return list(counts.values())

        compiled = tf.function(omniadam_step, autograph=False, jit_compile=True)
        return dict(zip(keys, compiled(), strict=True))

    def check_aside(self) -> None:
        """Raise NotOurs where a function of the user's would be compiled by XLA, which may not be
        able to: nobody would know before the program runs.
        """
        if self._backend.how == _WITHIN:
            raise NotOurs

    # --- a step that XLA compiles in parts ---

    def is_in_parts(self) -> bool:
        """Whether the step that this thread is in the middle of is compiled so."""
        return self._backend.how == _IN_PARTS

    def branch(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
        """As `Backend.branch`, by a symbolic condition."""
        self._backend.flush()
        tf.cond(condition, self._flushing(yes), self._flushing(no))

    def _flushing(self, action: Callable[[], Any]) -> Callable[[], Any]:
        def act() -> Any:
            action()
            self._backend.flush()
            return tf.constant(0)

        return act

    def sweep(self, group: Group, gradients: Any) -> Sums:
        """As `Backend.sweep`."""
        self._backend.flush()
        found: list[tuple[Any, ...]] = []
        for part in _parts(group.entries):
            chosen = tuple(group.entries[i] for i in part)
            has_gradients = group.kind.gradient
            one = group._replace(
                selection=Selection(chosen, ()) if has_gradients else Selection((), chosen),
                factors=[group.factors[i] for i in part] if len(group.factors) else (),
            )
            found += self._sweep_by_xla(one, [gradients[i] for i in part if has_gradients])
        return (lambda: found) if group.kind.measured else nothing_measured

    def _sweep_by_xla(self, group: Group, gradients: list[Any]) -> list[tuple[Any, ...]]:
        def omniadam_part() -> list[tuple[Any, ...]]:
            token = _by_xla.set(True)
            try:
                sums = Functional.sweep(self._backend, group, gradients)
                self._backend.flush()
                return sums()
            finally:
                _by_xla.reset(token)

        compiled = tf.function(omniadam_part, autograph=False, jit_compile=True)
        found: list[tuple[Any, ...]] = compiled()
        return found

    # --- norms ---

    def square_sums(self, applied: list[Any]) -> list[Any]:
        """The sum of squares of each gradient that is to be applied.

        In the precision of the gradients, as far as it is known how that is summed; in double
        precision where that loses anything.
        """
        exactly = partial(_in_double, applied)
        compiles = is_by_xla()
        if compiles is None:
            sums = exactly()
        else:
            sum_of_squares = _sum_by_halves if compiles else _sum_by_eigen
            sums = tf.stack([tf.cast(sum_of_squares(g), tf.float64) for g in applied])
            # Squares of float32 overflow at 1e19, and lose digits below 1e-16: seldom.
            least = [_least(g) for g in applied]
            is_exact = tf.reduce_all(tf.math.is_finite(sums) & (sums >= least))
            if tf.is_symbolic_tensor(is_exact):
                quick = sums
                sums = tf.cond(is_exact, lambda: quick, exactly)
            elif not is_exact:
                sums = exactly()
        return list(tf.unstack(sums, num=len(applied)))


def is_by_xla() -> bool | None:
    """Whether XLA compiles what is traced now; None if that cannot be told."""
    own = _by_xla.get()
    if own is not None:
        return own
    if tf.executing_eagerly():
        return False
    look = look_for_xla()
    return None if look is None else look(tf.compat.v1.get_default_graph())


def _in_double(gradients: Sequence[Any]) -> Any:
    return tf.stack(list(map(plain.Arrays.sum_of_squares, gradients)))


def _least(gradient: Any) -> float:
    """The sum of squares above which those that underflow do not count."""
    info: Any = np.finfo(gradient.dtype.as_numpy_dtype)
    size: int = gradient.shape.num_elements()
    return size * 4.0 * float(info.tiny) / float(info.eps)


def _sum_by_eigen(x: Any) -> Any:
    """Of TensorFlow's own operation, which adds in pairs."""
    return 2 * tf.nn.l2_loss(x)


def _sum_by_halves(x: Any) -> Any:
    """By halves, which XLA vectorises, as it does not its own sum."""
    x = x * x
    whole = math.prod(x.shape) // LANES * LANES
    if not whole:
        return tf.reduce_sum(tf.cast(x, tf.float64))
    flat = tf.reshape(x, [-1])
    columns, lanes = tf.reshape(flat[:whole], [-1, LANES]), LANES
    while lanes > 16:
        lanes //= 2
        columns = columns[:, :lanes] + columns[:, lanes:]
    # It also loses digits of a long sum, so that it is given double precision.
    total = tf.reduce_sum(tf.cast(columns, tf.float64))
    return total + tf.reduce_sum(tf.cast(flat[whole:], tf.float64))


# --- what is kept for a selection ---


class TensorsBefore:
    """What a step expects of its gradients, to be recognised by: the types of variables.

    Args:
        selection: the entries that they are for.
        gradients: eager tensors.
    """

    def __init__(self, selection: Selection, gradients: Sequence[Any]) -> None:
        self._own = [entry.variable for entry in selection.entries]
        self._shapes = [entry.shape for entry in selection.entries]
        self._dtypes = [tf.as_dtype(entry.dtype).as_datatype_enum for entry in selection.entries]
        self._types = list(map(type, gradients))
        self._looks = looks_of_tensors()

    def fits(self, gradients: list[Any], variables: list[Any]) -> bool:
        """Whether these are such gradients, for the same variables."""
        shape_of, dtype_of = self._looks
        return (
            len(variables) == len(self._own)
            and all(map(is_, variables, self._own))
            and list(map(type, gradients)) == self._types
            and list(map(shape_of, gradients)) == self._shapes
            and list(map(dtype_of, gradients)) == self._dtypes
        )


@dataclass(eq=False)
class PreparedByTensorFlow:
    """What is kept for a selection."""

    before: TensorsBefore | None = None
    # By `Step.version` and the types of what is given.
    programs: Latest = field(default_factory=lambda: Latest(_KEPT))


def _prepared(selection: Selection) -> PreparedByTensorFlow:
    found: PreparedByTensorFlow | None = selection.prepared
    if found is None:
        found = selection.prepared = PreparedByTensorFlow()
    return found


# --- programs ---

# What tracing raises on Python that asks for a value, as a schedule of the user's may.
_UNTRACEABLE = (
    NotOurs,
    NotImplementedError,
    tf.errors.OperatorNotAllowedInGraphError,
)


class TensorFlowStep:
    """A step of one selection compiled as a whole, or run as it is if it cannot be."""

    def __init__(
        self,
        backend: plain.TensorFlow,
        is_jit: bool,
        advance: Advance,
        selection: Selection,
        gradients: Any,
        rate: Any,
        step: Any,
    ) -> None:
        self._backend, self._advance, self._selection = backend, advance, selection
        self._step, self._numbers = step, step.numbers
        self._signature = [tf.TensorSpec(g.shape, g.dtype) for g in gradients]
        if rate is not None:
            self._signature.append(tf.TensorSpec((), tf.float64))
        self._is_jit = is_jit
        entries = (*selection.entries, *selection.rest)
        self._is_large = len(_parts(entries)) > 1 and _are_on_host(entries)
        self._is_proven = False
        self._compiled = self._compile(
            numbers_are_given=not all(isinstance(x, float) for x in self._numbers)
        )

    def _compile(self, *, numbers_are_given: bool) -> Compiled | None:
        """What runs a step; None if it cannot be traced."""
        backend, n = self._backend, len(self._selection.entries)
        has_rate = len(self._signature) > n
        signature = list(self._signature)
        if numbers_are_given:
            signature += [tf.TensorSpec((), tf.float64)] * len(self._numbers)
        is_whole = self._is_jit and not self._is_large
        keys: list[int] = []

        def omniadam_step(*tensors: Any) -> list[Any]:
            gradients, rate = list(tensors[:n]), tensors[n] if has_rate else None
            numbers = tensors[n + has_rate :] if numbers_are_given else self._numbers
            step = self._step.by(numbers)
            token = _by_xla.set(is_whole)
            try:
                counts = backend.run_here(
                    self._advance,
                    self._selection,
                    gradients,
                    rate,
                    step,
                    _IN_PARTS if self._is_jit and self._is_large else _WHOLE,
                )
            finally:
                _by_xla.reset(token)
            keys[:] = counts
            return list(counts.values())

        function = tf.function(
            omniadam_step,
            input_signature=signature,
            autograph=False,
            jit_compile=is_whole or None,
        )
        try:
            concrete = function.get_concrete_function()
        except _UNTRACEABLE:
            return None
        return Compiled(keys, caller(concrete), numbers_are_given, function)

    def __call__(self, gradients: list[Any], rate: Any, numbers: Any) -> dict[int, Any]:
        # One look, as other threads may compile another one. Nobody waits while it is traced.
        compiled = self._compiled
        if compiled and not compiled.numbers_are_given and numbers != self._numbers:
            # Of a callable that returns something else each time: no constant of the program.
            compiled = self._compiled = self._compile(numbers_are_given=True)
        if compiled is None:
            step = self._step.by(numbers)
            return self._backend.run_in_turn(self._advance, self._selection, gradients, rate, step)
        tensors = list(gradients)
        if rate is not None:
            tensors.append(plain.of_dtype(rate, tf.float64))
        if compiled.numbers_are_given:
            tensors += [plain.of_dtype(x, tf.float64) for x in numbers]
        if self._is_proven or not self._is_jit:
            return self._run(compiled, tensors)
        try:
            counts = self._run(compiled, tensors)
        except tf.errors.OpError:
            # XLA compiles before anything runs: nothing has been changed.
            self._is_jit = False
            self._compiled = self._compile(numbers_are_given=compiled.numbers_are_given)
            return self(gradients, rate, numbers)
        self._is_proven = True
        return counts

    def _run(self, compiled: Compiled, tensors: list[Any]) -> dict[int, Any]:
        with self._backend.step_in_turn():
            return dict(zip(compiled.keys, compiled.call(tensors), strict=True))


class Compiled(NamedTuple):
    """What runs a step."""

    keys: list[int]  # of the counters that it returns
    call: Callable[[list[Any]], Any]
    numbers_are_given: bool
    function: Any  # keeps what is called alive


def _are_on_host(entries: Sequence[Entry]) -> bool:
    return all("CPU" in entry.variable.device for entry in entries)


def _parts(entries: Sequence[Entry]) -> list[list[int]]:
    """Positions of entries, in parts of at least so many elements."""
    parts: list[list[int]] = [[]]
    size = 0
    for i, entry in enumerate(entries):
        if size >= PART:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += math.prod(entry.shape)
    return parts


# --- private names of TensorFlow ---


def caller(concrete: Any) -> Callable[[list[Any]], Any]:
    """A call of a function that has one signature and that no tape records."""
    return _flat_caller(concrete) if is_called_flat() else lambda tensors: concrete(*tensors)


def _flat_caller(concrete: Any) -> Callable[[list[Any]], Any]:
    call = concrete._inference_function.call_flat
    captured = list(concrete.captured_inputs)
    return lambda tensors: call(*tensors, *captured)


@once
def is_called_flat() -> bool:
    """Whether functions are called so, what they capture among their arguments."""
    try:
        with tf.init_scope():
            two = tf.constant(2.0)
            variable = tf.Variable(two)

            def decoy(x: Any, y: Any) -> list[Any]:
                variable.assign_add(x)
                return [variable.read_value(), x - y]

            one = tf.TensorSpec((), tf.float32)
            function = tf.function(decoy, input_signature=[one, one], autograph=False)
            found = _flat_caller(function.get_concrete_function())([two, tf.constant(1.0)])
            values = [float(each) for each in found]
            is_right = values == [4.0, 1.0] and float(variable) == 4.0
    except Exception:  # whatever another version may say to that
        is_right = False
    if not is_right:
        _say_that_it_is_gone("`call_flat` of a concrete function", "each step takes longer to call")
    return is_right


def _say_that_it_is_gone(names: str, cost: str) -> None:
    slow.warn_gone("tensorflow", tf.__version__, names, cost)


Looks = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@once
def looks_of_tensors() -> Looks:
    """The shape of an eager tensor and the number of its type: quickly, where that is right."""
    public: Looks = (
        lambda tensor: tuple(tensor.shape),
        lambda tensor: tensor.dtype.as_datatype_enum,
    )
    try:
        with tf.init_scope():
            decoys = [tf.zeros(()), tf.zeros((2, 3), tf.bfloat16), tf.zeros((0, 1), tf.int64)]
            kind: Any = type(decoys[0])
            private = kind._shape_tuple, kind._datatype_enum
            is_right = all(
                [look(each) for look in private] == [look(each) for look in public]
                for each in decoys
            )
    except Exception:
        is_right = False
    if is_right:
        return private
    names = "`_shape_tuple` or `_datatype_enum` of an eager tensor"
    _say_that_it_is_gone(names, "each step takes longer to look at its gradients")
    return public


@once
def is_xla_there() -> bool:
    """Whether a function can be compiled by XLA on the host: a build of TensorFlow may lack it."""
    try:
        with tf.init_scope(), tf.device("CPU"):
            one = tf.constant(1.0)
            two = tf.function(lambda: one + one, autograph=False, jit_compile=True)()
            is_there = float(two) == 2.0
    except Exception:  # whatever a build may say
        is_there = False
    if not is_there:
        slow.warn(
            f"this build of tensorflow {tf.__version__} cannot compile by XLA, so that steps in a "
            "tf.function are TensorFlow's own operations."
        )
    return is_there


@once
def look_for_xla() -> Callable[[Any], bool] | None:
    """What tells of a graph whether XLA compiles it, if it is right about some that are made here;
    None if it is not.
    """
    try:
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

        found: list[bool] = []

        def decoy() -> Any:
            found.append(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))
            return tf.constant(0)

        def outer() -> Any:
            return tf.function(decoy, autograph=False)()

        with tf.Graph().as_default():
            for function in decoy, outer:
                for by_xla in None, True:
                    tf.function(function, autograph=False, jit_compile=by_xla)()
        is_right = [each is True for each in found] == [False, True] * 2
    except Exception:
        is_right = False
    if is_right:
        tells: Callable[[Any], bool] = GraphOrParentsInXlaContext
        return tells
    cost = "steps in a tf.function are not compiled by XLA"
    _say_that_it_is_gone("`GraphOrParentsInXlaContext`", f"{cost}, and their norms are in double")
    return None
