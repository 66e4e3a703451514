"""What TensorFlow adds to an older optimizer: scalars that are variables, and its checkpoints.

Imported only where TensorFlow is.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from typing import Any

import numpy as np
import tensorflow as tf

from ..backends import backend_of
from ..backends.base import Entry, Latest, Selection
from ..backends.tensorflow import is_ordered
from ..rule import Pass
from ..schedules import is_schedule
from ..state import host
from .engine import CHECKS


class ScalarVariables:
    """The count of iterations and the numbers among the hyperparameters, as TensorFlow has them.

    float32, as in its checkpoints. But 1 - float32(0.999) is wrong by 1e-5, so that as long as a
    variable holds what it was set to, the number it was set to is what is computed with.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._variables: dict[str, Any] = {}
        self._strategy = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None

    def _create(self, name: str, value: Any, dtype: str, **arguments: Any) -> Any:
        """A variable of the optimizer, part of its checkpoints."""
        optimizer, strategy = self._optimizer, self._strategy
        name_in_graph = f"{optimizer._engine.name}/{name}"
        scope: Any = nullcontext()
        if strategy is not None and not tf.distribute.has_strategy():
            scope = strategy.scope()
        with tf.init_scope(), scope:
            variable = tf.Variable(value, dtype=dtype, name=name_in_graph, **arguments)
            _to_initialize(variable)
        optimizer._track_trackable(variable, name, overwrite=True)
        return variable

    def create_all(self, variables: Sequence[Any]) -> None:
        """What TensorFlow's optimizer creates before its slots, where the variables are."""
        backend: Any = backend_of(variables[0])
        self._strategy = backend.over(variables)._strategy or self._strategy
        engine = self._optimizer._engine
        engine.new_slot = self.slot
        if engine.uses_operation:
            engine.by_operation = ByOperation(self._optimizer)
        self.count()
        for name, value in sorted(self._optimizer._hyper.items()):
            if isinstance(value, float) and name != "epsilon":
                self.number(name)

    def count(self) -> None:
        """Count the iterations in a variable of TensorFlow."""
        optimizer, engine = self._optimizer, self._optimizer._engine
        if "iter" in self._variables:
            return
        if optimizer._count_is_given:
            if isinstance(engine._state.iteration, tf.Variable):
                self._variables["iter"] = engine._state.iteration
                optimizer._track_trackable(engine._state.iteration, "iter", overwrite=True)
            return
        begin = engine._state.read(engine._state.iteration)
        self._variables["iter"] = self._create("iter", begin, "int64", **_OF_ONE_REPLICA)
        engine.count_in(self._variables["iter"])

    def number(self, name: str) -> Any:
        """The variable of a hyperparameter."""
        if name not in self._variables:
            value = self._optimizer._hyper[name]
            self._variables[name] = self._create(name, value, "float32", **_OF_ONE_REPLICA)
            self._optimizer._feed_engine(name)
        return self._variables[name]

    def set(self, name: str, value: float) -> None:
        """Give a variable that there is another value."""
        variable = self._variables[name]
        backend: Any = backend_of(variable)
        backend.over([variable]).assign(variable, value)

    def value(self, name: str) -> float:
        """The value of a hyperparameter outside of any graph."""
        return self._exact(name, float(host(self._variables[name])))

    def _exact(self, name: str, held: float) -> float:
        number: float = self._optimizer._hyper[name]
        return number if held == np.float32(number) else held

    def reader(self, name: str) -> Callable[[], Any]:
        """What reads the variable of a hyperparameter, in double precision."""
        return partial(self._read, name)

    def _read(self, name: str) -> Any:
        held, number = tf.convert_to_tensor(self._variables[name]), self._optimizer._hyper[name]
        if not tf.is_symbolic_tensor(held):
            return self._exact(name, held.numpy().item())
        return tf.where(
            tf.equal(held, np.float32(number)),
            tf.constant(number, tf.float64),
            tf.cast(held, tf.float64),
        )

    def __contains__(self, name: str) -> bool:
        return name in self._variables

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        initializer: Any,
        *,
        trainable: bool,
        synchronization: Any,
        aggregation: Any,
    ) -> Any:
        """A variable that `add_weight` adds."""
        return self._create(
            name,
            _initial(initializer, shape, dtype),
            dtype,
            trainable=trainable,
            synchronization=tf.VariableSynchronization[_word(synchronization)],
            aggregation=tf.VariableAggregation[_word(aggregation)],
        )

    def slot(self, backend: Any, entry: Entry, name: str, initializer: Any) -> Any:
        """A slot, where the backend would create it."""
        owner, name = entry.variable.name.partition(":")[0], _SLOTS.get(name, name)
        value = _initial(initializer, entry.shape, entry.slot_dtype)
        with tf.init_scope(), backend._place(entry.variable):
            slot = tf.Variable(
                value,
                dtype=entry.slot_dtype,
                name=f"{self._optimizer._engine.name}/{owner}/{name}",
                trainable=False,
            )
            _to_initialize(slot)
        return slot

    def result(self, result: Any, name: str) -> Any:
        """What `apply_gradients` returns."""
        optimizer = self._optimizer
        for (slot_name, key), positions in list(optimizer._deferred.items()):
            i = optimizer._engine._state.index.get(key)
            if i is not None and (slot_name, i) in optimizer._created:
                del optimizer._deferred[slot_name, key]
                for position in sorted(positions, key=lambda p: p.restore_uid, reverse=True):
                    position.restore(optimizer._slot(slot_name, i))
        if not in_graph():
            return optimizer._engine._state.iteration
        with tf.control_dependencies([result]):
            return tf.no_op(name=name)


class ByOperation:
    """Plain steps by TensorFlow's own operation: what TensorFlow 2.0 computed, to the bit.

    `ResourceApplyAdam` overwrites a variable and its moments in one pass. Its coefficients are of
    the variable's type, so that 1 - beta has some four digits in float32, and the numbers they are
    computed from are float32: this is for who comes from TensorFlow 2.0, and expects its numbers.

    Source: `tensorflow/python/keras/optimizer_v2/adam.py` of TensorFlow 2.0.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._functions = Latest(_KEPT)

    def __reduce__(self) -> Any:
        return ByOperation, (self._optimizer,)

    def __call__(self, backend: Any, selection: Selection, gradients: list[Any]) -> bool:
        """Make a step, if it is plain and the operation is there; else say no."""
        engine = self._optimizer._engine
        if not self._fits(backend, selection):
            return False
        if is_ordered() and not tf.executing_eagerly():
            count = self._apply(selection, gradients, self._given(None))
        elif not tf.executing_eagerly():
            # Whoever asks for the count has the whole of the step.
            function = tf.function(partial(self._apply, selection), autograph=False)
            count = function(gradients, self._given(None))
        else:
            count = self._run(backend, selection, gradients)
        backend.note_counts({id(engine._state.iteration): count})
        return True

    def _fits(self, backend: Any, selection: Selection) -> bool:
        engine = self._optimizer._engine
        kinds = {entry.dtype for entry in selection.entries}
        return (
            engine._passes_with(engine._clips()).step == _PLAIN
            and not selection.constrained
            and kinds <= {"float32", "float64"}
            and _has_operation(backend, selection)
        )

    def _run(self, backend: Any, selection: Selection, gradients: list[Any]) -> Any:
        """Eagerly, as one function."""
        engine = self._optimizer._engine
        hyper = self._optimizer._hyper
        names = tuple(name for name, value in hyper.items() if not isinstance(value, float))
        function = self._functions.found(
            (id(selection), names),  # which the function keeps: its slots may be replaced
            lambda: tf.function(partial(self._apply, selection), autograph=False),
        )
        while True:
            calls = backend.calls(engine._state.iteration)
            # TensorFlow rounds all but epsilon to float32 before anything else.
            given = {n: tf.cast(v, tf.float64) for n, v in self._given(calls).items()}
            for name in ("decay", "epsilon"):  # which are no variables, and may be set at any time
                if name not in given:
                    dtype = tf.float64 if name == "epsilon" else tf.float32
                    given[name] = tf.constant(hyper[name], dtype)
            with backend.step_in_turn():
                if backend.value(engine._state.iteration) == calls:
                    return function(gradients, given)

    def _given(self, calls: Any) -> dict[str, Any]:
        """What callables and tensors are now, and a schedule if it is known for which step."""
        engine = self._optimizer._engine
        given = {}
        for name, value in self._optimizer._hyper.items():
            if is_schedule(value):
                if calls is not None:
                    given[name] = engine._scheduled(calls)
            elif isinstance(value, float):
                continue
            elif name == "learning_rate":
                given[name] = engine._state.backend.rate(engine._rate_function())
            else:
                given[name] = engine._now(name, CHECKS[name])
        return given

    def _apply(self, selection: Selection, gradients: list[Any], given: dict[str, Any]) -> Any:
        """The operations of a step; the count after it."""
        iteration = self._optimizer._engine._state.iteration
        coefficients: dict[Any, dict[str, Any]] = {}
        updates = []
        # If computing a gradient is an error, nothing is updated.
        with tf.control_dependencies(gradients):
            calls = iteration.read_value()
            for entry, gradient in zip(selection.entries, gradients, strict=True):
                gradient = tf.cast(gradient, entry.dtype)
                dtype = gradient.dtype
                if dtype not in coefficients:
                    coefficients[dtype] = self._coefficients(dtype, calls, given)
                handles = [each.handle for each in (entry.variable, *entry.slots)]
                operation = tf.raw_ops.ResourceApplyAdam
                if len(handles) == 4:
                    operation = tf.raw_ops.ResourceApplyAdamWithAmsgrad
                named = dict(zip(("var", "m", "v", "vhat"), handles, strict=False))
                updates.append(operation(**named, **coefficients[dtype], grad=gradient))
        with tf.control_dependencies(updates):
            iteration.assign_add(1, read_value=False)
            return iteration.read_value()

    def _coefficients(self, dtype: Any, calls: Any, given: dict[str, Any]) -> dict[str, Any]:
        optimizer = self._optimizer

        def now(name: str) -> Any:
            value = optimizer._hyper[name]
            if name in given:
                return tf.cast(given[name], dtype)
            if is_schedule(value):
                return tf.cast(optimizer._engine._scheduled(calls), dtype)
            if name == "epsilon":  # which TensorFlow keeps as it is
                return tf.constant(value, dtype)
            if name == "decay":
                return tf.cast(value, dtype)  # by way of float32
            return tf.cast(optimizer._scalars.number(name), dtype)

        # Not rule.py's arithmetic: TensorFlow's, in its types and its order, for its bits.
        step, rate = tf.cast(calls + 1, dtype), now("learning_rate")
        beta_1, beta_2 = now("beta_1"), now("beta_2")
        return {
            "beta1_power": tf.pow(beta_1, step),
            "beta2_power": tf.pow(beta_2, step),
            "lr": rate / (1.0 + now("decay") * tf.cast(calls, dtype)),
            "beta1": beta_1,
            "beta2": beta_2,
            "epsilon": now("epsilon"),
        }


def _has_operation(backend: Any, selection: Selection) -> bool:
    held = [each for e in selection.entries for each in (e.variable, *e.slots)]
    if backend._strategy is not None or not all(hasattr(each, "handle") for each in held):
        return False
    if len(selection.entries[0].slots) < 3 or tf.executing_eagerly():
        return True
    # XLA does not know the one of AMSGrad.
    if backend.fast is None:
        return False
    return backend.fast.is_by_xla() is False


_PLAIN = Pass(gradient=True, updates=True)
# How many sets of variables have a function of their own.
_KEPT = 16

# TensorFlow's names for what the engine calls its slots.
_SLOTS = {"momentum": "m", "velocity": "v", "velocity_hat": "vhat"}
_OF_ONE_REPLICA = {
    "trainable": False,
    "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA,
}


def _to_initialize(variable: Any) -> None:
    """Have a model of `tf_keras` in a graph initialize it, as it does its own variables."""
    if (keras := sys.modules.get("tf_keras")) is not None:
        keras.__internal__.backend.track_variable(variable)


def _word(member: Any) -> str:
    return str(getattr(member, "name", member))


def _initial(initializer: Any, shape: tuple[int, ...], dtype: str) -> Any:
    if initializer == "zeros":
        return np.zeros(shape, tf.as_dtype(dtype).as_numpy_dtype)
    if initializer == "ones":
        return np.ones(shape, tf.as_dtype(dtype).as_numpy_dtype)
    return lambda: tf.reshape(tf.cast(initializer(shape, dtype), dtype), shape)


def is_variable(variable: Any) -> bool:
    """Whether it is a variable of TensorFlow, or of Keras on TensorFlow."""
    backend = backend_of(variable)
    if backend is None:
        return False
    try:
        native = backend.over([variable]).describe(variable, "variable").variable
    except (TypeError, ValueError):
        return False
    return isinstance(native, tf.Variable)


def in_graph() -> bool:
    """Whether what is called now adds operations to a graph."""
    return not tf.executing_eagerly()


def evaluated(loss: Callable[[], Any]) -> tuple[Any, Any]:
    """The value of a loss, and the tape of it if it is TensorFlow's."""
    if tf.inside_function():
        autograph = tf.__internal__.autograph
        loss = autograph.tf_convert(loss, autograph.control_status_ctx())
    with tf.GradientTape() as tape:
        value = loss()
    return value, tape if isinstance(value, tf.Tensor) else None


# --- checkpoints ---


class Trackable:
    """The methods by which `tf.train.Checkpoint` finds the slots of an optimizer."""

    def _create_or_restore_slot_variable(
        self,
        slot_variable_position: Any,
        slot_name: str,
        variable: Any,
        slot_variable_shape: Any = None,
    ) -> Any:
        """The slot to restore; None if it is to be restored once it is created."""
        optimizer: Any = self
        if not optimizer._engine.built:
            optimizer._engine._state.awaited = None  # what is restored takes its place
        if tf.executing_eagerly():
            slot = optimizer._add_slot(variable, slot_name, "zeros")
            optimizer._sort_slots(optimizer._in_order)
            return slot
        try:
            return optimizer.get_slot(variable, slot_name)
        except KeyError:
            key = slot_name, id(variable)
            optimizer._deferred.setdefault(key, []).append(slot_variable_position)
            return None


_SUMS = (
    "This optimizer sums the gradients of replicas as it applies them. Pass those of each replica, "
    "and leave `experimental_aggregate_gradients` as it is."
)


def _for_tf_keras(kind: Any) -> dict[str, Any]:
    """What the models of `tf_keras` and its LossScaleOptimizer call, of later versions."""

    def minimize(
        self: Any,
        loss: Any,
        var_list: Any,
        grad_loss: Any = None,
        name: str | None = None,
        tape: Any = None,
    ) -> Any:
        if tape is None:
            return kind.minimize(self, loss, var_list, grad_loss, name)
        pairs = self._compute_gradients(loss, var_list, grad_loss, tape)
        return self.apply_gradients(pairs, name)

    def _compute_gradients(
        self: Any, loss: Any, var_list: Any, grad_loss: Any = None, tape: Any = None
    ) -> list[tuple[Any, Any]]:
        if tape is None:
            return list(zip(*self._differentiated(loss, var_list, grad_loss), strict=True))
        with tape:
            loss = loss() if callable(loss) else loss
        variables = list(var_list() if callable(var_list) else var_list)
        return list(zip(tape.gradient(loss, variables, grad_loss), variables, strict=True))

    def _aggregate_gradients(self: Any, grads_and_vars: Any) -> Any:
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise NotImplementedError(_SUMS)
        return grads_and_vars

    def apply_gradients(
        self: Any,
        grads_and_vars: Any,
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> Any:
        if not experimental_aggregate_gradients:
            self._aggregate_gradients(())
        return kind.apply_gradients(self, grads_and_vars, name)

    def _create_all_weights(self: Any, var_list: Any) -> None:
        self._build(list(var_list))

    functions = (
        minimize,
        apply_gradients,
        _compute_gradients,
        _aggregate_gradients,
        _create_all_weights,
    )
    methods = {each.__name__: each for each in functions}
    for method in methods.values():
        vars(method)["autograph_info__"] = {}  # as in `settings.as_it_is`
    return methods if hasattr(kind, "minimize") else {}


@cache
def _tracked(kind: type, base: type) -> type:
    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = _new(kind)
        new.__dict__.update(copy.deepcopy(_state(self), memo))
        return new

    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_untracked": kind,
        # Not those of the base, which look up hyperparameters by name.
        "__getattribute__": object.__getattribute__,
        "__setattr__": object.__setattr__,
        "__dir__": kind.__dir__,
        "__deepcopy__": deepcopy,
        "__reduce_ex__": lambda self, protocol: (_new, (kind,), _state(self)),
    }
    if base is not tf.__internal__.tracking.Trackable:
        namespace |= _for_tf_keras(kind)
    return type(kind.__name__, (kind, Trackable, base), namespace)


def tracked(kind: type) -> type:
    """A class of optimizers as one that TensorFlow tracks, and `tf_keras` takes for its own."""
    kind = getattr(kind, "_untracked", kind)
    return _tracked(kind, _base())


def _base() -> Any:
    keras = sys.modules.get("tf_keras")
    with suppress(Exception):  # a Keras that is broken, or not installed, has no models to take it
        if keras is None and os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
            keras = tf.keras
        if keras is not None:
            return keras.optimizers.legacy.Optimizer
    return tf.__internal__.tracking.Trackable


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def _state(optimizer: Any) -> dict[str, Any]:
    """Without what TensorFlow keeps on an object that it tracks."""
    optimizer._check_order()  # a copy goes by the order of variables
    return {k: v for k, v in optimizer.__dict__.items() if not k.startswith("_self_")}
