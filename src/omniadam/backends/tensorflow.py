"""TensorFlow: `tf.Variable`s, eagerly, inside a `tf.function`, and in a graph of TensorFlow 1.

An eager step is one operation after the other. Inside a user's `tf.function` the step is traced in
place. In a graph of TensorFlow 1 it is an operation, and under a `tf.distribute.Strategy` it runs
once on each replica, on the sum of the gradients.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from itertools import count
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import options, slow, versions

with versions.imported("tensorflow"):
    import tensorflow as tf

from ..sparse import unmasked
from .base import (
    FLOATS,
    HALVES,
    Advance,
    Entry,
    Fast,
    Group,
    Selection,
    Stateless,
    Sums,
    received,
    takes_arguments,
)
from .functional import Functional, NotOurs
from .host import Numbers

_made = count()
# How a step is run: computed at once, and stored later.
_APART = "apart"
# Whether the order of reads and writes is what the step says of it, and nothing else.
_spelled_out: ContextVar[bool] = ContextVar("omniadam_spelled_out", default=False)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tf.Tensor)


def of_dtype(value: Any, dtype: Any) -> Any:
    """A tensor of a number too, which `tf.cast` would round to float32 first."""
    return tf.cast(value, dtype) if _is_tensor(value) else tf.constant(value, dtype)


# `tf.maximum` and `tf.minimum` lose a NaN where XLA of TensorFlow 2.19 compiles them.
def _maximum(a: Any, b: Any) -> Any:
    return tf.where((a > b) | tf.math.is_nan(a), a, b)


def _minimum(a: Any, b: Any) -> Any:
    return tf.where((a < b) | tf.math.is_nan(a), a, b)


class TensorNumbers(Numbers):
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
        return tf.where(condition, of_dtype(a, tf.float64), of_dtype(b, tf.float64))


class Arrays:
    """The functions that the rule is bound to."""

    sqrt, maximum, minimum = tf.sqrt, _maximum, _minimum
    divide, abs, sign = operator.truediv, tf.abs, tf.sign

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        is_truth = _is_tensor(condition) and condition.dtype == tf.bool
        # In a graph of TensorFlow 1, != compares objects.
        return tf.where(condition if is_truth else tf.not_equal(condition, 0), a, b)

    @staticmethod
    def cast(x: Any, dtype: str) -> Any:
        return tf.cast(x, dtype) if _is_tensor(x) else float(x)

    @staticmethod
    def sum_of_squares(x: Any) -> Any:
        # In double precision it neither overflows, nor underflows, nor loses digits of a long sum,
        # whatever compiles it.
        return tf.reduce_sum(tf.square(tf.cast(x, tf.float64)))

    @staticmethod
    def broadcast_like(value: Any, like: Any) -> Any:
        value = of_dtype(value, like.dtype)
        return value if value.shape == like.shape else tf.broadcast_to(value, like.shape)


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
    functions: ClassVar[Any] = TensorNumbers
    elementwise: ClassVar[Any] = Elementwise
    arrays: ClassVar[Any] = Arrays

    def __init__(self, variables: Sequence[Any] = ()) -> None:
        super().__init__(variables)
        first = variables[0] if variables else None
        self._strategy: Any = _strategy_of(first)
        self._home = getattr(first, "device", None)  # where state lies that belongs to no variable

    def make_fast(self) -> Fast:
        from ..fast.tensorflow import FastTensorFlow

        return FastTensorFlow(self)

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

    def is_symbolic(self, value: Any) -> bool:
        return bool(tf.is_symbolic_tensor(value))

    def check_untraced(self, what: str) -> None:
        if tf.inside_function():
            raise ValueError(
                f"{what} must be called outside of a tf.function, which its state would outlive, "
                "and in which the variables have no values yet."
            )

    def is_count(self, value: Any) -> bool:
        return bool(value.dtype.is_integer)

    def has(self, variable: Any) -> bool:
        return isinstance(variable, tf.Variable) and _strategy_of(variable) is self._strategy

    def _new(self, value: Callable[[], Any], dtype: str, near: Any, **arguments: Any) -> Any:
        if tf.inside_function() and not is_ordered():
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
        is_tracked = isinstance(variable, tf.__internal__.tracking.Trackable)
        if is_tracked and isinstance(optimizer, Tracked):
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
            if isinstance(value, np.ndarray) and value.shape == tuple(variable.shape):
                # Not read: one that a function which is traced created has no value yet.
                self.store(variable, value.astype(self.form(variable)[1], copy=False))
                return
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
        elif self.fast is not None:
            self.fast.note(selection, gradients)
        return gradients

    # --- a step ---

    def run(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> None:
        if self._strategy is not None:
            run = self._run_on_replicas
        elif tf.executing_eagerly():
            run = self._run_eagerly
        elif is_ordered():
            run = self._run_in_function
        else:
            run = self._run_as_operation
        self.note_counts(run(advance, selection, gradients, rate, step))

    def run_here(
        self,
        advance: Advance,
        selection: Selection,
        gradients: Any,
        rate: Any,
        step: Any,
        how: str = "",
        *,
        has_turn: bool = False,
    ) -> dict[int, Any]:
        """A step where the call is, on tensors that may be symbolic; the counters after it."""
        changed = self.changes(
            lambda: advance(selection, gradients, rate, step), selection, how, has_turn=has_turn
        )
        if tf.executing_eagerly():
            self.store_all(changed)
        else:
            # If computing a gradient is an error, nothing is to be stored, the count neither.
            with nullcontext() if how else tf.control_dependencies(gradients):
                for variable, value in changed:
                    self.store(variable, value)
        return self.counts_in(changed)

    def _run_eagerly(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any]:
        arguments = advance, selection, gradients, rate, step
        if selection.constrained:
            return self._run_constrained(*arguments)
        if self.fast is not None:
            counts: dict[int, Any] = self.fast.run(*arguments)
            return counts
        return self.run_in_turn(*arguments)

    def run_in_turn(self, *arguments: Any) -> dict[int, Any]:
        """A step as it is, eagerly."""
        with self.step_in_turn():
            return self.run_here(*arguments, has_turn=True)

    def _run_constrained(self, *arguments: Any) -> dict[int, Any]:
        """A step with functions of the user's, which are called anew and see what is then so."""
        try:
            counts = None
            while counts is None:  # as long as other threads make steps meanwhile
                counts = self._run_apart(*arguments)
            return counts
        except NotOurs:
            return self.run_in_turn(*arguments)

    def _run_apart(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any] | None:
        """A step that has the turn only to store what was computed; None if it is of no use now."""
        changed = self.changes(lambda: advance(selection, gradients, rate, step), selection, _APART)
        counts = [(variable, value) for variable, value in changed if self.is_count(value)]
        with self.step_in_turn():
            # What is negative until now tells when variables were added: see `begun`.
            now = [(self.load(variable), value) for variable, value in counts]
            if any(before >= 0 and before + 1 != after for before, after in now):
                return None
            self.store_all(changed)
        return self.counts_in(changed)

    def _run_on_replicas(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any]:
        run = self.run_here if is_ordered() else self._run_spelled_out

        # What reads and writes a variable here, once a replica, does so on that replica's own.
        def here(_: Any, gradients: Any, rate: Any) -> dict[int, Any]:
            return run(advance, selection, gradients, rate, step)

        def on_each(strategy: Any, gradients: Any, rate: Any) -> Any:
            first = selection.entries[0].variable
            return strategy.extended.update(first, here, args=(gradients, rate))

        merge = tf.__internal__.distribute.interim.maybe_merge_call
        counts = merge(on_each, self._strategy, gradients, rate)
        local = self._strategy.experimental_local_results
        return {key: local(count)[0] for key, count in counts.items()}

    def _run_in_function(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any]:
        """A step in the middle of a user's function."""
        arguments = advance, selection, gradients, rate, step
        if self.fast is None or not self.fast.takes(selection, step):
            return self.run_here(*arguments)
        counts: dict[int, Any] = self.fast.run_in_function(*arguments)
        return counts

    def _run_as_operation(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any]:
        """A step in a graph that runs only what is asked for: whoever asks for a count of those
        returned has the whole of it.
        """
        entries = (*selection.entries, *selection.rest)
        if not all(hasattr(e.variable, "handle") for e in entries):
            # No resources, which a function cannot write to.
            return self._run_spelled_out(advance, selection, gradients, rate, step)
        keys: list[int] = []

        def omniadam_step(gradients: list[Any], rate: Any) -> list[Any]:
            counts = self.run_here(advance, selection, gradients, rate, step)
            keys.extend(counts)
            return list(counts.values())

        counts = tf.function(omniadam_step, autograph=False)(gradients, rate)
        return dict(zip(keys, counts, strict=True))

    def _run_spelled_out(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any, step: Any
    ) -> dict[int, Any]:
        """The same without a function: read when the gradients are there, write when all is
        computed, and only then count.
        """
        token = _spelled_out.set(True)
        try:
            with tf.control_dependencies(gradients):
                changed = self.changes(lambda: advance(selection, gradients, rate, step), selection)
        finally:
            _spelled_out.reset(token)
        with tf.control_dependencies([value for _, value in changed]):
            stores = [self.store(variable, value) for variable, value in changed]
        with tf.control_dependencies(stores):
            return {key: tf.identity(x) for key, x in self.counts_in(changed).items()}

    def check_run(self) -> None:
        # Without the private name, functions are taken for what they mostly are.
        if not is_ordered(otherwise=tf.inside_function()):
            raise RuntimeError(
                "In this graph only what something depends on is run, and this returns nothing to "
                "depend on. Use what `apply_gradients` or `minimize` returns, or build the graph "
                "by tf.function."
            )

    def cond(
        self, condition: Any, yes: Callable[..., Any], no: Callable[..., Any], values: list[Any]
    ) -> list[Any]:
        return list(tf.cond(condition, lambda: yes(values), lambda: no(values)))

    @contextmanager
    def aside(self) -> Iterator[None]:
        if self.fast is not None:
            self.fast.check_aside()
        with super().aside():
            yield

    def branch(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
        if not tf.is_symbolic_tensor(condition):
            (yes if condition else no)()
        elif self.fast is not None and self.fast.is_in_parts():
            self.fast.branch(condition, yes, no)
        else:
            super().branch(condition, yes, no)

    def square_sums(self, group: Group, gradients: Any) -> list[Any]:
        if self.fast is None:
            return super().square_sums(group, gradients)
        sums: list[Any] = self.fast.square_sums(self._applied(group, gradients))
        return sums

    def sweep(self, group: Group, gradients: Any) -> Sums:
        if self.fast is not None and self.fast.is_in_parts():
            found: Sums = self.fast.sweep(group, gradients)
            return found
        return super().sweep(group, gradients)

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

    def check_stateless(self, call: Stateless) -> None:
        if self._strategy is not None:
            raise ValueError(
                "stateless_apply is not supported for the variables of a tf.distribute.Strategy."
            )
        if not call.is_fused:
            raise ValueError(
                f"stateless_apply cannot be used with {type(call.optimizer).__name__}, whose "
                "update_step changes variables: that is no function of tensors."
            )

    def fitting(self, value: Any, name: str, variable: Any, *, is_state: bool) -> Any:
        return _fitting(value, name, variable)

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


def _strategy_of(variable: Any) -> Any:
    """The `tf.distribute.Strategy` that a variable is distributed by; None for other variables."""
    is_variable = isinstance(variable, tf.Variable)
    return getattr(variable, "distribute_strategy", None) if is_variable else None


def _is_distributed(value: Any) -> bool:
    return isinstance(value, tf.distribute.DistributedValues)


def _is_real(dtype: Any) -> bool:
    return bool(dtype.is_floating or dtype.is_integer) and not dtype.is_quantized


def is_ordered(otherwise: bool = False) -> bool:
    """Whether what is stored here is stored in order, and though nothing depends on it: eagerly,
    and in what tf.function traces. Not in a graph of TensorFlow 1, nor in the branches and loops
    of one, nor in a function of `tf.compat.v1.wrap_function`.
    """
    if tf.executing_eagerly():
        return True
    graph, name = tf.compat.v1.get_default_graph(), "_add_control_dependencies"
    if not hasattr(graph, name):  # it is not public
        cost = "a step in a tf.function is an operation, which is slower to trace"
        slow.warn_gone("tensorflow", tf.__version__, f"`{name}` of a graph", cost)
    return bool(getattr(graph, name, otherwise))


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
    return None if grad_loss is None else of_dtype(grad_loss, value.dtype)


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
            optimizer._state.replace_counter(value, TensorFlow().create(value))
        if value is not None:
            optimizer._state.awaited = optimizer._state.restored = None  # it takes their place

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

    The one class that changes as a program runs: TensorFlow may be imported after it was made, and
    an optimizer that was made before must be found, too.
    """
    if Tracked not in kind.__bases__ and _is_found():
        kind.__bases__ = (*kind.__bases__, Tracked)


BACKEND = TensorFlow
