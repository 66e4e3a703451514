"""TensorFlow: `tf.Variable`s, eagerly, inside a `tf.function`, and in a graph of TensorFlow 1.

An eager step is one call of a function that is compiled for it, by XLA where XLA takes it. Inside
a user's `tf.function` the step is traced in place. In a graph of TensorFlow 1 it is an operation,
and under a `tf.distribute.Strategy` it runs once on each replica, on the sum of the gradients.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, partial
from itertools import count
from operator import is_
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .. import options, versions
from ..rule import Pass, RuleKey
from ..sparse import unmasked
from .base import FLOATS, HALVES, Entry, Latest, Selection, received, takes_arguments
from .functional import Cells, Functional
from .host import Numbers

versions.check("tensorflow", tf.__version__)

try:  # Not public, and only there to be fast.
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext as _is_for_xla
except ImportError:  # pragma: no cover

    def _is_for_xla(graph: Any) -> bool:
        return True  # for which norms are slower, and exact everywhere


Step = Callable[[Selection, Any, Any, Any], None]
# How many steps a selection keeps compiled, by what the settings make of a step.
_KEPT = 16
_made = count()
# How a step is traced as a program: in one part, or in parts that XLA compiles one by one. Or it is
# computed at once, and stored later.
_WHOLE, _IN_PARTS, _APART = "whole", "in parts", "apart"
# Whether what is traced now is compiled by XLA as part of an eager step.
_by_xla: ContextVar[bool] = ContextVar("omniadam_by_xla", default=False)
# Whether the order of reads and writes is what the step says of it, and nothing else.
_spelled_out: ContextVar[bool] = ContextVar("omniadam_spelled_out", default=False)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tf.Tensor)


def _cast(value: Any, dtype: Any) -> Any:
    """A tensor of a number too, which `tf.cast` would round to float32 first."""
    return tf.cast(value, dtype) if _is_tensor(value) else tf.constant(value, dtype)


# `tf.maximum` and `tf.minimum` lose a NaN where XLA of TensorFlow 2.19 compiles them.
def _maximum(a: Any, b: Any) -> Any:
    return tf.where((a > b) | tf.math.is_nan(a), a, b)


def _minimum(a: Any, b: Any) -> Any:
    return tf.where((a < b) | tf.math.is_nan(a), a, b)


class Scalars(Numbers):
    """Functions of the coefficients of a step: of numbers of the host, or of float64 tensors."""

    @staticmethod
    def sqrt(x: Any) -> Any:
        if not _is_tensor(x):
            return math.sqrt(x)
        # At zero the derivative is taken to be zero: infinity times nothing would be NaN.
        is_positive = x > 0
        return tf.where(is_positive, tf.sqrt(tf.where(is_positive, x, 1.0)), x)

    @staticmethod
    def expm1(x: Any) -> Any:
        return tf.math.expm1(x) if _is_tensor(x) else math.expm1(x)

    @staticmethod
    def log(x: Any) -> Any:
        return tf.math.log(x) if _is_tensor(x) else Numbers.log(x)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return _maximum(a, b) if _is_tensor(a) else Numbers.maximum(a, b)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not _is_tensor(condition):
            return a if condition else b
        return tf.where(condition, _cast(a, tf.float64), _cast(b, tf.float64))


class Arrays:
    """The functions that the rule is bound to."""

    sqrt, maximum, minimum = tf.sqrt, _maximum, _minimum

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        return tf.where(condition > 0, a, b)

    @staticmethod
    def cast(x: Any, dtype: str) -> Any:
        return tf.cast(x, dtype) if _is_tensor(x) else float(x)

    @staticmethod
    def sum_of_squares(x: Any) -> Any:
        total = _sum_by_halves(x * x) if _in_xla() else 2 * tf.nn.l2_loss(x)
        return tf.cast(total, tf.float64)

    @staticmethod
    def broadcast_like(value: Any, like: Any) -> Any:
        value = _cast(value, like.dtype)
        return value if value.shape == like.shape else tf.broadcast_to(value, like.shape)


def _in_xla() -> bool:
    return _by_xla.get() or bool(_is_for_xla(tf.compat.v1.get_default_graph()))


def _least(gradient: Any) -> float:
    """The sum of squares above which those that underflow do not count."""
    info: Any = np.finfo(gradient.dtype.as_numpy_dtype)
    size: int = gradient.shape.num_elements()
    return size * 4.0 * float(info.tiny) / float(info.eps)


def _in_double(gradients: Sequence[Any]) -> Any:
    """Sums of squares that do neither overflow nor underflow, of what is float32."""
    return tf.stack([tf.reduce_sum(tf.square(tf.cast(g, tf.float64))) for g in gradients])


_LANES = 128


def _sum_by_halves(x: Any) -> Any:
    """XLA's own sum takes a nanosecond for each element on a CPU; adding halves is vectorised."""
    whole = math.prod(x.shape) // _LANES * _LANES
    if not whole:
        return tf.reduce_sum(tf.cast(x, tf.float64))
    flat = tf.reshape(x, [-1])
    columns, lanes = tf.reshape(flat[:whole], [-1, _LANES]), _LANES
    while lanes > 16:
        lanes //= 2
        columns = columns[:, :lanes] + columns[:, lanes:]
    # It also loses digits of a long sum, so that it is given double precision.
    total = tf.reduce_sum(tf.cast(columns, tf.float64))
    return total + tf.reduce_sum(tf.cast(flat[whole:], tf.float64))


class Elementwise:
    """Functions of a tensor of steps, for schedules; either argument may be a number."""

    minimum, maximum, where = tf.minimum, tf.maximum, tf.where
    floor, ceil, cos, log, power = tf.floor, tf.math.ceil, tf.cos, tf.math.log, tf.pow

    @staticmethod
    def asarray_float(x: Any) -> Any:
        x = tf.convert_to_tensor(x)
        return x if x.dtype.is_floating else tf.cast(x, tf.float32)


class TensorFlow(Functional):
    """Variables are `tf.Variable`s, those of a strategy among them."""

    name: ClassVar[str] = "tensorflow"
    functions: ClassVar[Any] = Scalars
    elementwise: ClassVar[Any] = Elementwise
    arrays: ClassVar[Any] = Arrays
    # Whether eager steps are compiled by XLA; where it cannot, they are not.
    jit_compile: ClassVar[bool] = True

    def __init__(self, variables: Sequence[Any] = ()) -> None:
        super().__init__()
        first = variables[0] if variables else None
        self._strategy: Any = _strategy_of(first)
        self._home = getattr(first, "device", None)  # where state lies that belongs to no variable

    @classmethod
    def over(cls, variables: Sequence[Any]) -> TensorFlow:
        return cls(variables)

    # --- variables ---

    def name_of(self, variable: Any) -> str | None:
        name = getattr(variable, "name", None)
        return None if name is None else str(name).partition(":")[0]

    def describe(self, variable: Any, name: str) -> Entry:
        if not isinstance(variable, tf.Variable):
            raise TypeError(
                f"Variable '{name}' must be a tf.Variable. Received: {received(variable)}. A "
                "tensor cannot be updated in place: use tf.Variable(value)."
            )
        dtype = variable.dtype.base_dtype.name
        what = f"Variable '{name}' of shape {variable.shape} and dtype {dtype}"
        if dtype not in FLOATS:
            raise TypeError(f"{what} must be float16, bfloat16, float32 or float64.")
        if not variable.shape.is_fully_defined():
            raise ValueError(f"{what} must have a fixed shape. Create it with one.")
        if _strategy_of(variable) is not self._strategy:
            raise ValueError(
                f"{what} and the first variable must be of one tf.distribute.Strategy, or of none. "
                "Create all of them under strategy.scope()."
            )
        return Entry(variable, name, tuple(variable.shape), dtype, constraint=variable.constraint)

    def check_distinct(self, entries: Sequence[Entry]) -> None:
        seen: dict[int, Entry] = {}
        for entry in entries:
            has_handle = self._strategy is None and hasattr(entry.variable, "handle")
            handle = entry.variable.handle if has_handle else entry.variable
            other = seen.setdefault(id(handle), entry)
            if other is not entry:
                raise ValueError(
                    f"Variables must not share memory. Received '{other.name}' and '{entry.name}' "
                    f"of shape {entry.shape}, which do. Pass each variable once."
                )

    def zeros(self, entry: Entry, dtype: str) -> Any:
        name = re.sub(r"[^A-Za-z0-9_./-]", "_", f"{entry.name}/slot").lstrip("_/-")
        return self._new(lambda: tf.zeros(entry.shape, dtype), dtype, entry.variable, name=name)

    def filled(self, entry: Entry, dtype: str, value: npt.NDArray[Any]) -> Any:
        # In a graph there may be no session yet, so that this must be what it is initialised with.
        return self._new(lambda: tf.constant(value, dtype), dtype, entry.variable)

    def create(self, value: npt.NDArray[Any]) -> Any:
        return self._new(
            lambda: tf.constant(value),
            value.dtype.name,
            None,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def untraced(self) -> Any:
        return tf.init_scope()

    def is_traced(self, value: Any) -> bool:
        # In a graph of TensorFlow 1 what is done at once is done in a session.
        return bool(tf.is_symbolic_tensor(value)) and not _in_graph_of_1()

    def has(self, variable: Any) -> bool:
        return isinstance(variable, tf.Variable) and _strategy_of(variable) is self._strategy

    def _new(self, value: Callable[[], Any], dtype: str, near: Any, **arguments: Any) -> Any:
        if tf.inside_function() and not _is_ordered():
            # `tf.compat.v1.wrap_function` knows variables by their names.
            arguments["name"] = f"{arguments.get('name', 'state')}_{next(_made)}"
        # State outlives the function that is traced.
        with tf.init_scope(), self._place(near):
            return tf.Variable(value, trainable=False, dtype=dtype, **arguments)

    @contextmanager
    def _place(self, near: Any) -> Iterator[None]:
        """Where a variable is created: near another, or where all counters are."""
        if self._strategy is None:
            with tf.device(self._home if near is None else near.device):
                yield
        else:
            strategy = self._strategy
            # A replica is in the scope already: the first one to come creates for all.
            with nullcontext() if tf.distribute.get_strategy() is strategy else strategy.scope():
                is_near = near is not None
                with strategy.extended.colocate_vars_with(near) if is_near else nullcontext():
                    yield

    def created(self, optimizer: Any, name: str, variable: Any) -> None:
        if isinstance(variable, tf.__internal__.tracking.Trackable):
            with tf.init_scope():  # what a checkpoint that was restored before had for it
                optimizer._handle_deferred_dependencies(name, variable)

    def load(self, variable: Any) -> Any:
        return variable.read_value()

    def store(self, variable: Any, value: Any) -> Any:
        return variable.assign(value, read_value=False)

    def value(self, variable: Any) -> Any:
        if self._here.call is None and tf.executing_eagerly():
            return variable.numpy().item()
        return self.read(variable)

    def assign(self, variable: Any, value: Any) -> None:
        self._here.counts = None
        if self._here.call is None and _in_graph_of_1() and not tf.is_symbolic_tensor(value):
            is_variable = isinstance(value, tf.Variable)
            self._assign_in_session(variable, self.numpy(value) if is_variable else value)
            return
        if isinstance(value, tf.Variable):
            value = self.read(value)
        if self._here.call is None:
            self.check_run()
        self.write(variable, value)

    def _assign_in_session(self, variable: Any, value: Any) -> None:
        value = np.asarray(value, variable.dtype.base_dtype.as_numpy_dtype)
        initializer = variable.initializer
        _session(variable).run(
            initializer, {initializer.inputs[1]: np.broadcast_to(value, tuple(variable.shape))}
        )

    def numpy(self, variable: Any) -> npt.NDArray[Any]:
        with tf.init_scope():
            value = variable.numpy() if tf.executing_eagerly() else _session(variable).run(variable)
        return np.array(value, np.float32 if value.dtype == tf.bfloat16.as_numpy_dtype else None)

    def check_readable(self) -> None:
        if tf.inside_function():
            raise ValueError(
                "State cannot be read inside a tf.function, where it has no values yet. Read it "
                "outside, or use `variables`, which are read when the function is run."
            )

    def form(self, variable: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
        dtype = variable.dtype.base_dtype
        return tuple(variable.shape), np.dtype(
            np.float32 if dtype == tf.bfloat16 else dtype.as_numpy_dtype
        )

    def rate(self, value: Any) -> Any:
        if isinstance(value, tf.Variable):
            value = self.read(value)
        if not _is_tensor(value):
            return options.rate("learning_rate", value)
        # Of an unknown shape, as of a tf.py_function, the reshape below is the check.
        is_scalar = any(value.shape.is_compatible_with(shape) for shape in ((), (1,)))
        if not is_scalar or not _is_real(value.dtype):
            raise ValueError(
                f"`learning_rate` must be a real scalar. Received shape {value.shape} and dtype "
                f"{value.dtype.name}."
            )
        if not tf.is_symbolic_tensor(value) and "CPU" in value.device:
            options.rate("learning_rate", value)
        return tf.cast(tf.reshape(value, ()), tf.float64)

    # --- gradients ---

    def gradient(self, gradient: Any, entry: Entry) -> Any:
        expected = f"The variable has shape {entry.shape} and dtype {entry.dtype}."
        who = f"The gradient of variable '{entry.name}'"
        if _is_distributed(gradient):  # of each replica, given outside of them
            assert self._strategy is not None
            gradient = self._strategy.reduce(tf.distribute.ReduceOp.SUM, gradient, axis=None)
        if isinstance(gradient, tf.IndexedSlices):
            values, indices = gradient.values, gradient.indices
            gradient = tf.IndexedSlices(
                _tensor("values", values), _tensor("indices", indices), gradient.dense_shape
            )
        if isinstance(gradient, (tf.Variable, np.ndarray, np.generic)):
            if isinstance(gradient, np.ma.MaskedArray):
                raise TypeError(f"{who} must not be masked, of numpy.ma. Fill it: g.filled(0).")
            if getattr(gradient.dtype, "kind", "f") in "OSUM":
                raise TypeError(
                    f"{who} must hold real numbers. Received dtype {gradient.dtype}. {expected}"
                )
            gradient = tf.convert_to_tensor(gradient)
        if not isinstance(gradient, (tf.Tensor, tf.IndexedSlices, tf.SparseTensor)):
            raise TypeError(
                f"{who} must be a tf.Tensor, tf.IndexedSlices, tf.SparseTensor or NumPy array. "
                f"Received: {received(gradient)}. {expected}"
            )
        if not _is_real(gradient.dtype):
            raise TypeError(
                f"{who} must hold real numbers. Received dtype {gradient.dtype.name}. {expected}"
            )
        if isinstance(gradient, tf.IndexedSlices):
            return _sum_of_slices(gradient, entry, who, expected)
        if not gradient.shape.is_compatible_with(entry.shape):
            raise ValueError(
                f"{who} must have the variable's shape. Received shape {gradient.shape} and dtype "
                f"{gradient.dtype.name}. {expected}"
            )
        if isinstance(gradient, tf.SparseTensor):
            return _scattered(gradient.indices, gradient.values, entry, who)
        if not gradient.shape.is_fully_defined():
            gradient = tf.ensure_shape(gradient, entry.shape)
        return gradient

    def gather(self, selection: Selection, gradients: list[Any]) -> list[Any]:
        if self._strategy is not None:
            context = tf.distribute.get_replica_context()
            if context is not None:
                # Of its own on each replica, or TensorFlow does not know that it is to be summed.
                gradients = [tf.identity(g) for g in gradients]
                return list(context.all_reduce(tf.distribute.ReduceOp.SUM, gradients))
        elif tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError(
                "The variables were created outside of the tf.distribute.Strategy that runs now, "
                "so that every replica would update the same ones. Create them under "
                "strategy.scope()."
            )
        return gradients

    def recognise(
        self, selection: Selection, gradients: list[Any], variables: list[Any]
    ) -> list[Any] | None:
        known = selection.prepared.get("known")
        if known is None:
            known = selection.prepared["known"] = Known(selection)
        if self._strategy is None and tf.executing_eagerly() and not tf.distribute.has_strategy():
            return gradients if known.fits(gradients, variables) else None
        return None

    # --- a step ---

    def run(self, step: Step, selection: Selection, gradients: Any, rate: Any, fixed: Any) -> None:
        if self._strategy is not None:
            run = self._run_on_replicas
        elif tf.executing_eagerly():
            run = self._run_eagerly
        elif _is_ordered():
            run = self._run_here
        else:
            run = self._run_as_operation
        self._here.counts = run(step, selection, gradients, rate, fixed)

    def _run_here(
        self,
        step: Step,
        selection: Selection,
        gradients: Any,
        rate: Any,
        fixed: Any,
        how: str = "",
        *,
        has_turn: bool = False,
    ) -> dict[int, Any]:
        """A step where the call is, on tensors that may be symbolic; the counters after it."""
        cells: Cells = {}
        stored = self.inline(
            lambda: step(selection, gradients, rate, fixed),
            selection,
            cells,
            how,
            has_turn=has_turn,
        )
        changed = [cell for key, cell in cells.items() if key in stored]
        if tf.executing_eagerly():
            self._store_all(changed)
        else:
            # If computing a gradient is an error, nothing is to be stored, the count neither.
            with nullcontext() if how else tf.control_dependencies(gradients):
                for variable, value in changed:
                    self.store(variable, value)
        return {id(v): value for v, value in changed if value.dtype.is_integer}

    def _store_all(self, changed: Sequence[tuple[Any, Any]]) -> None:
        """Or nothing, if this is interrupted."""
        before = [(variable, self.load(variable)) for variable, _ in changed]
        try:
            for variable, value in changed:
                self.store(variable, value)
        except BaseException:
            for variable, value in before:
                self.store(variable, value)
            raise

    def _run_eagerly(
        self, step: Step, selection: Selection, gradients: Any, rate: Any, fixed: Any
    ) -> dict[int, Any]:
        if selection.constrained:
            return self._run_constrained(step, selection, gradients, rate, fixed)
        version, rule, numbers = fixed
        programs = selection.prepared.setdefault("programs", Latest(_KEPT))
        program = programs.found(
            (version, rule, rate is None, *(g.dtype for g in gradients)),
            lambda: Program(self, step, selection, gradients, rate, fixed),
        )
        new: dict[int, Any] = program(gradients, rate, numbers)
        return new

    def _run_constrained(self, *arguments: Any) -> dict[int, Any]:
        """A step with functions of the user's, which are called anew and see what is then so."""
        try:
            counts = None
            while counts is None:  # as long as other threads make steps meanwhile
                counts = self._run_apart(*arguments)
            return counts
        except NotOurs:
            with self.step_in_turn():
                return self._run_here(*arguments, has_turn=True)

    def _run_apart(
        self, step: Step, selection: Selection, gradients: Any, rate: Any, fixed: Any
    ) -> dict[int, Any] | None:
        """A step that has the turn only to store what was computed; None if it is of no use now."""
        cells: Cells = {}
        stored = self.inline(
            lambda: step(selection, gradients, rate, fixed), selection, cells, _APART
        )
        changed = [cell for key, cell in cells.items() if key in stored]
        counts = [(variable, value) for variable, value in changed if value.dtype.is_integer]
        with self.step_in_turn():
            if any(self.load(variable) + 1 != value for variable, value in counts):
                return None
            self._store_all(changed)
        return {id(variable): value for variable, value in counts}

    def _run_on_replicas(
        self, step: Step, selection: Selection, gradients: Any, rate: Any, fixed: Any
    ) -> dict[int, Any]:
        run = self._run_here if _is_ordered() else self._run_spelled_out

        # What reads and writes a variable here, once a replica, does so on that replica's own.
        def here(_: Any, gradients: Any, rate: Any) -> dict[int, Any]:
            return run(step, selection, gradients, rate, fixed)

        def on_each(strategy: Any, gradients: Any, rate: Any) -> Any:
            first = selection.entries[0].variable
            return strategy.extended.update(first, here, args=(gradients, rate))

        merge = tf.__internal__.distribute.interim.maybe_merge_call
        counts = merge(on_each, self._strategy, gradients, rate)
        local = self._strategy.experimental_local_results
        return {key: local(count)[0] for key, count in counts.items()}

    def _run_as_operation(
        self, step: Step, selection: Selection, gradients: Any, rate: Any, fixed: Any
    ) -> dict[int, Any]:
        """A step in a graph that runs only what is asked for: whoever asks for a count of those
        returned has the whole of it.
        """
        entries = (*selection.entries, *selection.rest)
        if not all(hasattr(e.variable, "handle") for e in entries):
            # No resources, which a function cannot write to.
            return self._run_spelled_out(step, selection, gradients, rate, fixed)
        keys: list[int] = []

        def omniadam_step(gradients: list[Any], rate: Any) -> list[Any]:
            counts = self._run_here(step, selection, gradients, rate, fixed)
            keys.extend(counts)
            return list(counts.values())

        counts = tf.function(omniadam_step, autograph=False)(gradients, rate)
        return dict(zip(keys, counts, strict=True))

    def _run_spelled_out(
        self, step: Step, selection: Selection, gradients: Any, rate: Any, fixed: Any
    ) -> dict[int, Any]:
        """The same without a function: read when the gradients are there, write when all is
        computed, and only then count.
        """
        cells: Cells = {}
        token = _spelled_out.set(True)
        try:
            with tf.control_dependencies(gradients):
                stored = self.inline(
                    lambda: step(selection, gradients, rate, fixed), selection, cells
                )
        finally:
            _spelled_out.reset(token)
        changed = [cell for key, cell in cells.items() if key in stored]
        with tf.control_dependencies([value for _, value in changed]):
            stores = [self.store(variable, value) for variable, value in changed]
        with tf.control_dependencies(stores):
            return {id(v): tf.identity(x) for v, x in changed if x.dtype.is_integer}

    def check_run(self) -> None:
        # Without the private name, functions are taken for what they mostly are.
        if not _is_ordered(otherwise=tf.inside_function()):
            raise RuntimeError(
                "In this graph only what something depends on is run, and this returns nothing to "
                "depend on. Use what `apply_gradients` or `minimize` returns, or build the graph "
                "by tf.function."
            )

    def cond(
        self, condition: Any, yes: Callable[..., Any], no: Callable[..., Any], values: list[Any]
    ) -> list[Any]:
        return list(tf.cond(condition, lambda: yes(values), lambda: no(values)))

    def branch(self, condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
        if not tf.is_symbolic_tensor(condition):
            (yes if condition else no)()
        elif self.how == _IN_PARTS:
            self._flush_cells()
            tf.cond(condition, self._flushing(yes), self._flushing(no))
        else:
            super().branch(condition, yes, no)

    def _flushing(self, action: Callable[[], None]) -> Callable[[], Any]:
        def act() -> Any:
            action()
            self._flush_cells()
            return tf.constant(0)

        return act

    def _flush_cells(self) -> None:
        call = self._here.call
        assert call is not None
        self._flush(call)

    def square_sums(
        self, kind: Pass, rule: RuleKey, selection: Selection, gradients: Any, pass_c: Any
    ) -> list[Any]:
        applied = self._applied(kind, selection, gradients, pass_c)
        sums = tf.stack([self.arrays.sum_of_squares(g) for g in applied])
        # Squares of float32 overflow at 1e19, and lose digits below 1e-16: seldom.
        least = [_least(g) for g in applied]
        is_exact = tf.reduce_all(tf.math.is_finite(sums) & (sums >= least))
        exactly = partial(_in_double, applied)
        if tf.is_symbolic_tensor(is_exact):
            sums = tf.cond(is_exact, lambda: sums, exactly)
        elif not is_exact:
            sums = exactly()
        return list(tf.unstack(sums, num=len(applied)))

    def sweep(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        gradients: Any,
        factors: Sequence[Any],
        rule_c: Sequence[Any],
        pass_c: Sequence[Any],
    ) -> None:
        if self.how != _IN_PARTS:
            super().sweep(kind, rule, selection, gradients, factors, rule_c, pass_c)
            return
        self._flush_cells()
        entries = selection.entries if kind.gradient else selection.rest
        for part in _parts(entries):
            chosen = tuple(entries[i] for i in part)
            self._sweep_by_xla(
                kind,
                rule,
                Selection(chosen, ()) if kind.gradient else Selection((), chosen),
                [gradients[i] for i in part] if kind.gradient else [],
                [factors[i] for i in part] if len(factors) else (),
                rule_c,
                pass_c,
            )

    def _sweep_by_xla(self, *arguments: Any) -> None:
        def omniadam_part() -> None:
            token = _by_xla.set(True)
            try:
                Functional.sweep(self, *arguments)
                self._flush_cells()
            finally:
                _by_xla.reset(token)

        tf.function(omniadam_part, autograph=False, jit_compile=True)()

    def update_each(self, *args: Any) -> None:
        if self.how:
            raise NotOurs
        super().update_each(*args)

    def _outside(self, action: Callable[[], None]) -> None:
        if _spelled_out.get():
            raise TypeError(
                "An `update_step` of your own needs resource variables of no strategy in a graph "
                "that was not built by tf.function. Call tf.compat.v1.enable_resource_variables() "
                "first, or use tf.function."
            )
        super()._outside(action)

    def stateless_apply(
        self, optimizer: Any, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        if self._strategy is not None:
            raise ValueError(
                "stateless_apply is not supported for the variables of a tf.distribute.Strategy."
            )
        if not optimizer._is_fused:
            raise ValueError(
                f"stateless_apply cannot be used with {type(optimizer).__name__}, whose "
                "update_step changes variables: that is no function of tensors."
            )
        entries, named = optimizer._entries, optimizer._state
        cells = {}
        for value, (name, variable) in zip(
            (*variables, *state), (*((e.name, e.variable) for e in entries), *named), strict=True
        ):
            cells[id(variable)] = variable, _fitting(value, name, variable)
        owners = [variable for variable, _ in cells.values()]
        present, gradients = optimizer._present(self, entries, gradients, depth=4)
        rate, fixed = optimizer._rate_and_fixed()
        selection = optimizer._selection(present)
        self.inline(lambda: optimizer._advance(selection, gradients, rate, fixed), selection, cells)
        new = [cells[id(variable)][1] for variable in owners]
        return new[: len(entries)], new[len(entries) :]

    # --- differentiation ---

    def differentiate(
        self, loss: Any, variables: Sequence[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        if _is_tensor(loss) or not callable(loss):
            return self._differentiate_in_graph(loss, variables, grad_loss, scale)
        if tf.inside_function():
            autograph = tf.__internal__.autograph
            loss, given = autograph.tf_convert(loss, autograph.control_status_ctx()), loss
        else:
            given = loss
        arguments = variables if takes_arguments(given) else ()
        if _in_graph_of_1():
            return self._differentiate_in_graph(loss(*arguments), variables, grad_loss, scale)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            value = _checked_loss(loss(*arguments), grad_loss)
            scaled = scale(value)
        return list(tape.gradient(scaled, list(variables), _like(grad_loss, value)))

    def _differentiate_in_graph(
        self, loss: Any, variables: Sequence[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        value = _checked_loss(loss, grad_loss)
        if not tf.is_symbolic_tensor(value):
            raise ValueError(
                "Outside of a graph `loss` must be a callable: the value of a loss does not tell "
                "what it was computed from. Pass `lambda: loss`, or use tf.GradientTape and "
                "apply_gradients."
            )
        return list(tf.gradients(scale(value), list(variables), _like(grad_loss, value)))


class NotOurs(Exception):
    """The step calls an `update_step` that a user wrote, which is run as it is."""


# What tracing raises on Python that asks for a value, as a schedule of the user's may.
_UNTRACEABLE = (
    NotOurs,
    NotImplementedError,
    tf.errors.OperatorNotAllowedInGraphError,
)


class Program:
    """A step of one selection compiled as a whole, or run as it is if it cannot be."""

    def __init__(
        self,
        backend: TensorFlow,
        step: Step,
        selection: Selection,
        gradients: Any,
        rate: Any,
        fixed: Any,
    ) -> None:
        self._backend, self._step, self._selection = backend, step, selection
        self._fixed, self._numbers = fixed, fixed.numbers
        self._signature = [tf.TensorSpec(g.shape, g.dtype) for g in gradients]
        if rate is not None:
            self._signature.append(tf.TensorSpec((), tf.float64))
        self._is_jit = backend.jit_compile
        entries = (*selection.entries, *selection.rest)
        on_host = all("CPU" in entry.variable.device for entry in entries)
        self._is_large = len(_parts(entries)) > 1 and on_host
        self._is_proven = False
        self._compiled = self._compile(
            numbers_are_given=not all(isinstance(x, float) for x in self._numbers)
        )

    def _compile(self, *, numbers_are_given: bool) -> _Compiled | None:
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
            fixed = self._fixed._replace(numbers=numbers)
            token = _by_xla.set(is_whole)
            try:
                counts = backend._run_here(
                    self._step,
                    self._selection,
                    gradients,
                    rate,
                    fixed,
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
        return _Compiled(keys, _caller(concrete), numbers_are_given, function)

    def __call__(self, gradients: list[Any], rate: Any, numbers: Any) -> dict[int, Any]:
        # One look, as other threads may compile another one. Nobody waits while it is traced.
        compiled = self._compiled
        if compiled and not compiled.numbers_are_given and numbers != self._numbers:
            # Of a callable that returns something else each time: no constant of the program.
            compiled = self._compiled = self._compile(numbers_are_given=True)
        if compiled is None:
            fixed = self._fixed._replace(numbers=numbers)
            with self._backend.step_in_turn():
                return self._backend._run_here(
                    self._step, self._selection, gradients, rate, fixed, has_turn=True
                )
        tensors = list(gradients)
        if rate is not None:
            tensors.append(_cast(rate, tf.float64))
        if compiled.numbers_are_given:
            tensors += [_cast(x, tf.float64) for x in numbers]
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

    def _run(self, compiled: _Compiled, tensors: list[Any]) -> dict[int, Any]:
        with self._backend.step_in_turn():
            return dict(zip(compiled.keys, compiled.call(tensors), strict=True))


class _Compiled(NamedTuple):
    keys: list[int]  # of the counters that it returns
    call: Callable[[list[Any]], Any]
    numbers_are_given: bool
    function: Any  # keeps what is called alive


# XLA splits each of its loops over the threads and waits for all of them, 500 times a step of
# ResNet-50. Parts of a step that TensorFlow runs side by side do not wait for each other.
_PART = 2**18


def _parts(entries: Sequence[Entry]) -> list[list[int]]:
    """Positions of entries, in parts of at least so many elements."""
    parts: list[list[int]] = [[]]
    size = 0
    for i, entry in enumerate(entries):
        if size >= _PART:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += math.prod(entry.shape)
    return parts


def _caller(concrete: Any) -> Callable[[list[Any]], Any]:
    """A call of a function that has one signature and that no tape records."""
    function = getattr(concrete, "_inference_function", None)
    call = getattr(function, "call_flat", None)
    if call is None:  # pragma: no cover
        return lambda tensors: concrete(*tensors)
    captured = list(concrete.captured_inputs)
    return lambda tensors: call(*tensors, *captured)


class Known:
    """What a step expects of its tensors, so that a glance shows whether all is as before."""

    def __init__(self, selection: Selection) -> None:
        self._own = [entry.variable for entry in selection.entries]
        self._shapes = [entry.shape for entry in selection.entries]
        self._dtypes = [tf.as_dtype(entry.dtype).as_datatype_enum for entry in selection.entries]
        self._types = [_EagerTensor] * len(self._own)

    def fits(self, gradients: list[Any], variables: list[Any]) -> bool:
        return (
            len(variables) == len(self._own)
            and all(map(is_, variables, self._own))
            and list(map(type, gradients)) == self._types
            and list(map(_shape_of, gradients)) == self._shapes
            and list(map(_dtype_of, gradients)) == self._dtypes
        )


# A tensor made here to ask for its type would start TensorFlow, which is then configured for good.
_EagerTensor: Any = getattr(tf.__internal__, "EagerTensor", tf.Tensor)
_shape_of: Callable[[Any], Any] = getattr(
    _EagerTensor, "_shape_tuple", lambda tensor: tuple(tensor.shape)
)
_dtype_of: Callable[[Any], Any] = getattr(
    _EagerTensor, "_datatype_enum", lambda tensor: tensor.dtype.as_datatype_enum
)


def _strategy_of(variable: Any) -> Any:
    """The `tf.distribute.Strategy` that a variable is distributed by; None for other variables."""
    is_variable = isinstance(variable, tf.Variable)
    return getattr(variable, "distribute_strategy", None) if is_variable else None


def _is_distributed(value: Any) -> bool:
    return isinstance(value, tf.distribute.DistributedValues)


def _is_real(dtype: Any) -> bool:
    return bool(dtype.is_floating or dtype.is_integer) and not dtype.is_quantized


def _is_ordered(otherwise: bool = False) -> bool:
    """Whether what is stored here is stored in order, and though nothing depends on it: eagerly,
    and in what tf.function traces. Not in a graph of TensorFlow 1, nor in the branches and loops
    of one, nor in a function of `tf.compat.v1.wrap_function`.
    """
    # Not public; without it a step in a function is an operation too, which is slower to trace.
    return tf.executing_eagerly() or bool(
        getattr(tf.compat.v1.get_default_graph(), "_add_control_dependencies", otherwise)
    )


def _in_graph_of_1() -> bool:
    return not tf.executing_eagerly() and not tf.inside_function()


def _has_session(keras: Any, graph: Any) -> bool:
    session = getattr(keras._SESSION, "session", None)
    return session is not None and session.graph is graph


def _session(variable: Any) -> Any:
    session = tf.compat.v1.get_default_session()
    keras = sys.modules.get("tf_keras.src.backend")  # whose models are run in a session of its own
    if session is None and keras is not None and _has_session(keras, variable.graph):
        session = keras.get_session([variable])
    if session is None or session.graph is not variable.graph:
        raise RuntimeError(
            "In a graph the values of variables are in a session. Do this inside `with "
            "session.as_default():`, of a session of the variable's graph."
        )
    return session


def _tensor(name: str, value: Any) -> Any:
    """Values or indices of `tf.IndexedSlices`, which may be anything that holds numbers."""
    if _is_tensor(value):
        return value
    return tf.convert_to_tensor(value if isinstance(value, tf.Variable) else unmasked(name, value))


def _sum_of_slices(slices: Any, entry: Entry, who: str, expected: str) -> Any:
    """`tf.IndexedSlices` as a dense gradient, the rows of each index summed."""
    values, indices = slices.values, slices.indices
    if not indices.dtype.is_integer:
        raise TypeError(
            f"{who} must have integers as indices. Received dtype {indices.dtype.name}. {expected}"
        )
    if indices.dtype not in (tf.int32, tf.int64):
        indices = tf.cast(indices, tf.int64)
    form = f"values of shape {values.shape} and indices of shape {indices.shape}"
    fits = (
        entry.shape != ()
        and indices.shape.rank in (1, None)
        and values.shape.is_compatible_with((None, *entry.shape[1:]))
        and values.shape[:1].is_compatible_with(indices.shape)
    )
    if fits and slices.dense_shape is not None:
        dense = tf.get_static_value(tf.convert_to_tensor(slices.dense_shape))
        fits = dense is None or tuple(dense) == entry.shape
        form += f" and dense_shape {None if dense is None else tuple(map(int, dense))}"
    if not fits:
        raise ValueError(
            f"{who} must have the variable's shape. Received tf.IndexedSlices with {form}. "
            f"{expected}"
        )
    return _scattered(indices[:, None], values, entry, who)


def _scattered(indices: Any, values: Any, entry: Entry, who: str) -> Any:
    """The sum of the values at each index; an error if one is out of range."""
    if tf.executing_eagerly():
        given = indices.numpy()
        outside = ((given < 0) | (given >= np.array(entry.shape[: given.shape[1]]))).any(axis=1)
        if outside.any():
            raise ValueError(
                f"{who} must have indices from 0 up to the variable's shape {entry.shape}. "
                f"Received index {given[outside][0].tolist()}. Drop padding ids, or enlarge the "
                "table."
            )
    if entry.dtype in HALVES or values.dtype.name in HALVES:
        values = tf.cast(values, tf.float32)  # so that repeated rows are summed in float32
    shape = tf.constant(entry.shape, indices.dtype)
    return tf.scatter_nd(indices, values, shape)


def _fitting(value: Any, name: str, variable: Any) -> Any:
    """A value that `stateless_apply` is given, as a tensor of its variable's shape and dtype."""
    if isinstance(value, tf.Variable):
        value = value.read_value()
    if not isinstance(value, (tf.Tensor, np.ndarray, np.generic)):
        raise TypeError(
            f"`stateless_apply` takes tensors. Received: {received(value)} for '{name}'."
        )
    value = tf.convert_to_tensor(value)
    dtype = variable.dtype.base_dtype
    if not value.shape.is_compatible_with(variable.shape) or (
        value.dtype.is_floating != dtype.is_floating
    ):
        raise ValueError(
            f"The value for '{name}' must have shape {tuple(variable.shape)} and dtype "
            f"{dtype.name}, as the optimizer was built. Received shape {value.shape} and dtype "
            f"{value.dtype.name}."
        )
    return tf.ensure_shape(tf.cast(value, dtype), variable.shape)


def _checked_loss(value: Any, grad_loss: Any) -> Any:
    shape: Any = getattr(value, "shape", None)
    is_real = _is_tensor(value) and value.dtype.is_floating
    if not is_real or (grad_loss is None and shape.rank not in (0, None)):
        dtype = f" and dtype {value.dtype.name}" if _is_tensor(value) else ""
        raise ValueError(
            f"`loss` must return a real scalar tensor. Received: {received(value)} of shape "
            f"{shape}{dtype}. Take its mean or sum, or pass `grad_loss` of the same shape."
        )
    if grad_loss is not None and not shape.is_compatible_with(np.shape(grad_loss)):
        raise ValueError(
            f"`grad_loss` must have the shape of the loss, {shape}. Received shape "
            f"{np.shape(grad_loss)}."
        )
    return value


def _like(grad_loss: Any, value: Any) -> Any:
    return None if grad_loss is None else _cast(grad_loss, value.dtype)


# --- checkpoints ---


class Tracked(tf.__internal__.tracking.Trackable):  # type: ignore[misc]
    """What `tf.train.Checkpoint` asks of an object: the variables that are its state, by name."""

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)
        optimizer: Any = self
        state = self._tracked_state()
        if optimizer.built and not state and save_type == "checkpoint":
            raise ValueError(
                f"A checkpoint of TensorFlow holds its variables, and those of {optimizer!r} are "
                "of another library. Save what get_weights() returns."
            )
        return children | state

    def _lookup_dependency(self, name: str, cached_dependencies: Any = None) -> Any:
        self._make_counter(name)
        found = self._tracked_state().get(name)
        return super()._lookup_dependency(name, cached_dependencies) if found is None else found

    def _make_counter(self, name: str) -> None:
        """Have a counter that a checkpoint looks for, of an optimizer that is not built, so that
        it can be read and set before there are other variables.
        """
        optimizer: Any = self
        value = None if optimizer.built else optimizer.named_variables().get(name)
        if isinstance(value, np.ndarray) and tf.executing_eagerly():
            optimizer._replace_counter(value, TensorFlow().create(value))

    def _tracked_state(self) -> dict[str, Any]:
        optimizer: Any = self
        tracked = tf.__internal__.tracking.Trackable
        return {n: v for n, v in optimizer.named_variables().items() if isinstance(v, tracked)}


@cache
def _is_found() -> bool:
    """Whether a checkpoint finds the state of an object by the names, some of them private, that
    `Tracked` has; else it would be left out without a word.
    """
    trackable: Any = tf.__internal__.tracking.Trackable
    child = trackable()

    class Decoy(trackable):  # type: ignore[misc]
        def _trackable_children(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"state": child}

    decoy = Decoy()
    names = ("_lookup_dependency", "_handle_deferred_dependencies")
    children = tf.train.TrackableView(decoy).children(decoy)
    return children.get("state") is child and all(hasattr(decoy, name) for name in names)


def introduce(kind: type) -> None:
    """Make a class one that `tf.train.Checkpoint` takes, which asks for a base of its own, and
    says so where that is not there.
    """
    if Tracked not in kind.__bases__ and _is_found():
        kind.__bases__ = (*kind.__bases__, Tracked)


BACKEND = TensorFlow
