"""`tf.keras.optimizers.Adam` of TensorFlow 2.0, on the arrays of any library.

What differs from `omniadam.Adam`: `decay`; clipping by value before clipping by norm; the order of
the weights; hyperparameters that may be set as attributes; variables that may come later.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Self, TypedDict, Unpack

import numpy as np

from .. import options, schedules
from ..backends.base import received, takes_arguments
from ..engine import as_list
from ..schedules import LearningRate, is_schedule
from ..settings import as_it_is
from .engine import OlderEngine
from .older import Clip, Hyperparameter, Number, Older, _listed, _name_of

__all__ = ["Adam", "VariableAggregation", "VariableSynchronization"]


def __dir__() -> list[str]:
    return __all__


_KWARGS = ("clipnorm", "clipvalue", "global_clipnorm", "lr", "decay")


# What subclasses of TensorFlow's optimizer may override, and nobody calls here.
_NEVER_CALLED = frozenset(
    (
        "_aggregate_gradients",
        "_apply_dense",
        "_apply_sparse",
        "_assert_valid_dtypes",
        "_call_if_callable",
        "_clip_gradients",
        "_compute_gradients",
        "_create_all_weights",
        "_create_hypers",
        "_create_slots",
        "_decayed_lr",
        "_dense_apply_args",
        "_distributed_apply",
        "_fallback_apply_state",
        "_get_gradients",
        "_get_hyper",
        "_prepare",
        "_prepare_local",
        "_resource_apply_dense",
        "_resource_apply_sparse",
        "_resource_apply_sparse_duplicate_indices",
        "_resource_scatter_add",
        "_resource_scatter_update",
        "_restore_slot_variable",
        "_set_hyper",
        "_sparse_apply_args",
        "_transform_gradients",
        "_transform_loss",
        "_transform_unaggregated_gradients",
        "_valid_dtypes",
        "add_slot",
        "get_slot",
    )
)


class VariableSynchronization(Enum):
    """When the replicas of a distributed variable are brought together; TensorFlow's words."""

    AUTO = 0
    NONE = 1
    ON_WRITE = 2
    ON_READ = 3

    def __repr__(self) -> str:
        return f"tf.{self}"


class VariableAggregation(Enum):
    """How replicas of a distributed variable are combined; TensorFlow's words."""

    NONE = 0
    SUM = 1
    MEAN = 2
    ONLY_FIRST_REPLICA = 3

    def __repr__(self) -> str:
        return f"tf.compat.v1.{self}"


class _Kwargs(TypedDict, total=False):
    """What type checkers know of the settings by keyword."""

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    lr: LearningRate
    decay: Number


class Adam(Older):
    """Adam as TensorFlow 2.0 documents it.

    The update is that of `omniadam.Adam`, with the learning rate divided by
    1 + decay * iterations. A sparse gradient is applied as the dense one that it stands for: rows
    that it leaves out still move by their momentum, and their moments decay.

    Args:
        learning_rate: a number >= 0, a schedule, a tensor, or a callable without arguments.
        beta_1: 0 <= number < 1, the decay rate of the 1st moment; or a tensor, or a callable.
        beta_2: likewise, of the 2nd moment.
        epsilon: a number > 0, a tensor or a callable: "epsilon hat" of the paper. As in TensorFlow,
            0 and None, where they are given themselves, stand for 1e-7.
        amsgrad: whether to divide by the largest 2nd moment so far.
        name: of the operations that apply gradients.
        **kwargs: `clipvalue`, each element of a gradient is clipped to +- it; then `clipnorm`, each
            gradient is scaled to have at most this norm, or `global_clipnorm`, all together;
            `decay`, see above; `lr`, another name of `learning_rate`. None are 0.

    Raises:
        TypeError: if another keyword is given.
        ValueError: if a setting is negative or out of its range.

    Example:
        >>> import numpy as np
        >>> from omniadam.compat.optimizer_v2 import Adam
        >>> w = np.array([1.0, -2.0])
        >>> opt = Adam(lr=0.1, decay=0.5)
        >>> for _ in range(3):
        ...     steps = opt.apply_gradients([(2 * w, w)])
        >>> int(steps), w.round(3).tolist(), [slot.shape for slot in opt.get_weights()]
        (3, [0.784, -1.784], [(), (2,), (2,)])

    Source: `tf_keras/src/optimizers/legacy/adam.py`.
    """

    learning_rate = Hyperparameter("learning_rate")
    lr = Hyperparameter("learning_rate")
    clipnorm = Clip()
    clipvalue = Clip()
    global_clipnorm = Clip()

    @options.leads_on("keras", *_KWARGS)
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: Number = 0.9,
        beta_2: Number = 0.999,
        epsilon: Number | None = 1e-07,
        amsgrad: bool = False,
        name: str = "Adam",
        **kwargs: Unpack[_Kwargs],
    ) -> None:
        options.check_overrides(
            type(self),
            Adam,
            _NEVER_CALLED,
            "Override `apply_gradients`, which every step goes through, or write a rule of your "
            "own as the `update_step` of an omniadam.Optimizer.",
        )
        for key, value in kwargs.items():
            if key not in _KWARGS:
                raise TypeError(
                    f"Unexpected keyword argument: '{key}'. Beside its named arguments this "
                    f"optimizer takes {', '.join(_KWARGS)}."
                )
            number = None if callable(value) else options.as_float(value)
            if number is not None and number < 0:
                raise ValueError(f"`{key}` must be >= 0. Received: {value!r}")
        super().__init__(
            OlderEngine(amsgrad=amsgrad, name=name or "Adam"),
            {
                "learning_rate": kwargs.get("lr", learning_rate),
                "decay": kwargs.get("decay", 0.0),
                "beta_1": beta_1,
                "beta_2": beta_2,
                "epsilon": epsilon,
            },
            {key: kwargs.get(key) for key in ("clipnorm", "clipvalue", "global_clipnorm")},
        )

    # --- settings ---

    @property
    def amsgrad(self) -> bool:
        """Whether to divide by the largest 2nd moment so far; fixed once there are slots."""
        return bool(self._engine.amsgrad)

    @amsgrad.setter
    def amsgrad(self, value: bool) -> None:
        self._engine.amsgrad = value

    def _clipping(self, clips: Mapping[str, Any]) -> Mapping[str, Any]:
        # A norm of at most 0 and values of at most 0 both leave nothing, and a norm divides.
        return {"clipvalue": 0.0} if 0 in clips.values() else clips

    def _set_hyper(self, name: str, value: Any) -> None:
        if name == "epsilon" and (value is None or options.as_float(value) == 0):
            value = 1e-7  # TensorFlow: `epsilon or backend_config.epsilon()`
        super()._set_hyper(name, value)

    # --- state ---

    @property
    def iterations(self) -> Any:
        """The variable that counts the steps; before there are weights, another may be set."""
        return self._iterations()

    @iterations.setter
    def iterations(self, variable: Any) -> None:
        self._set_iterations(variable)

    def variables(self) -> list[Any]:
        """The variables of this optimizer in the order of their creation: its `weights`."""
        return self.weights

    def get_slot_names(self) -> list[str]:
        """The names of the slots that there are: m, v, and with `amsgrad` vhat."""
        return list(dict.fromkeys(name for name, _ in self._created))

    def get_slot(self, var: Any, slot_name: str) -> Any:
        """The slot of a variable.

        Args:
            var: a variable that the optimizer has slots for.
            slot_name: "m", "v", "vhat", or what `add_slot` was given.

        Raises:
            KeyError: if there is none.
        """
        i = self._engine._state.index.get(id(var))
        if i is None or (slot_name, i) not in self._created:
            raise KeyError(f"There is no slot '{slot_name}' of this variable: {received(var)}")
        return self._shown(self._slot(slot_name, i))

    def add_slot(self, var: Any, slot_name: str, initializer: Any = "zeros") -> Any:
        """Create a slot of a variable, unless it is there.

        Args:
            var: a variable.
            slot_name: a name; "m", "v" and "vhat" are those that the step works on.
            initializer: "zeros", "ones", a callable of shape and dtype, the value itself, or the
                name of an initializer of Keras, if Keras is imported.

        Returns:
            The slot.
        """
        slot = self._add_slot(var, slot_name, _initializer(initializer))
        if self._in_order < len(self._engine._state.entries):
            self._put_in_order([var])
        return slot

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        dtype: Any = None,
        initializer: Any = "zeros",
        trainable: bool | None = None,
        synchronization: Any = VariableSynchronization.AUTO,
        aggregation: Any = VariableAggregation.NONE,
    ) -> Any:
        """Create a variable that belongs to the optimizer, but not to its `weights`.

        It is of the library of the variables that are trained. Before one was seen, it is
        TensorFlow's if that is imported, and NumPy's otherwise.

        Args:
            name: of the variable.
            shape: tuple of integers.
            dtype: of any library; float32 if None.
            initializer: as in `add_slot`.
            trainable: whether TensorFlow counts it among the trainable variables; by default, if
                `synchronization` is not ON_READ.
            synchronization: TensorFlow's, for variables that are distributed.
            aggregation: likewise.

        Returns:
            The variable.

        Raises:
            ValueError: if it is to be trainable and synchronized ON_READ.
        """
        if getattr(synchronization, "name", synchronization) == "ON_READ":
            if trainable:
                raise ValueError(
                    "A variable with synchronization ON_READ cannot be trainable. Received: "
                    f"trainable={trainable}, synchronization={synchronization}."
                )
            trainable = False
        return self._add_weight(
            name,
            tuple(shape),
            _dtype_name(dtype),
            _initializer(initializer),
            trainable=trainable is None or bool(trainable),
            synchronization=synchronization,
            aggregation=aggregation,
        )

    def extend(self, variables: Any) -> None:
        """Create the slots of variables that come later, as their first step does otherwise.

        As in TensorFlow 2.0, one count of steps is of all variables: the bias correction of the
        new ones is that of the others. `omniadam.Adam.extend` counts theirs from 1.

        Args:
            variables: list of variables, or a mapping from names to them. Those that have slots
                are left alone.

        Raises:
            TypeError, ValueError: if a variable cannot be trained, shares memory with another, is
                of another library, or has a name that is known; inside of a function that is
                compiled. Nothing has been changed then.

        Example:
            >>> import numpy as np
            >>> from omniadam.compat.optimizer_v2 import Adam
            >>> opt, w, later = Adam(), np.zeros(2), np.zeros(3)
            >>> steps = opt.apply_gradients([(np.ones(2), w)])
            >>> opt.extend([w, later])
            >>> [slot.shape for slot in opt.get_weights()]
            [(), (2,), (2,), (3,), (3,)]
        """
        given = variables if isinstance(variables, Mapping) else as_list(variables)
        if listed := as_list(given):
            self._prepare(listed)
            self._engine.extend(given)
            self._create_slots(listed)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the state to values as `get_weights` returns.

        Args:
            weights: a list of arrays: the count of iterations, all m, all v, and with `amsgrad` all
                vhat. A list of a V1 optimizer may have all vhat without `amsgrad`.

        Raises:
            TypeError: if it is no list.
            ValueError: if their number, a shape or a type is wrong. Nothing has been changed then.
        """
        weights = _listed(weights)
        slots = len(self.weights) - 1
        if not self.amsgrad and slots > 0 and len(weights) == 1 + slots // 2 * 3:
            weights = weights[: 1 + slots]
        super().set_weights(weights)

    # --- steps ---

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]], name: str | None = None
    ) -> Any:
        """Update variables by their gradients.

        Args:
            grads_and_vars: pairs (gradient, variable). A gradient may be None, or sparse.
            name: of the operation that is returned in a TensorFlow graph; the optimizer's if None.

        Returns:
            In a TensorFlow graph an operation, in TensorFlow otherwise `iterations`; elsewhere the
            number of steps.

        Raises:
            TypeError: if something is no pair, no variable or no gradient.
            ValueError: if no variable has a gradient.
        """
        try:
            pairs = [_pair(each) for each in grads_and_vars]
        except (TypeError, ValueError) as error:
            raise TypeError(
                "`grads_and_vars` must be a list of pairs (gradient, variable). Received: "
                f"{received(grads_and_vars)} ({error})."
            ) from error
        present = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
        missing = [_name_of(variable) for gradient, variable in pairs if gradient is None]
        if not present:
            raise ValueError(f"No gradients provided for any variable: {missing}.")
        if missing:
            warnings.warn(
                f"Gradients do not exist for variables {missing}; they are not updated.",
                stacklevel=2,
            )
        return self._apply(present, name)

    def minimize(
        self, loss: Any, var_list: Any, grad_loss: Any = None, name: str | None = None
    ) -> Any:
        """Differentiate a loss and apply the gradients.

        Args:
            loss: a callable that returns the value to minimize. It takes no arguments where the
                library can trace a closure (PyTorch, TensorFlow, Keras on these), and otherwise one
                argument a variable (NumPy, JAX).
            var_list: a list of variables, or a callable that returns it, for variables that are
                created when `loss` is first called.
            grad_loss: what the gradient of the loss itself is taken to be; ones if None.
            name: as in `apply_gradients`.

        Returns:
            As `apply_gradients`.

        Raises:
            ValueError: if some of the variables are no variables, or none has a gradient.
        """
        gradients, variables = self._differentiated(loss, var_list, grad_loss)
        return self.apply_gradients(list(zip(gradients, variables, strict=True)), name)

    def _differentiated(
        self, loss: Any, var_list: Any, grad_loss: Any
    ) -> tuple[list[Any], list[Any]]:
        variables = var_list
        engine, differentiate = self._engine, self._engine._differentiated
        if callable(var_list):
            if callable(loss) and not takes_arguments(loss):
                # It may create the variables, so it is called before their list.
                loss, differentiate = self._evaluated(loss)
            var_list = var_list()
        try:
            variables = as_list(var_list)
            if any(id(v) not in engine._state.index for v in variables):
                engine._described(variables)
        except TypeError as error:
            raise ValueError(f"`var_list` must hold variables. {error}") from error
        return differentiate(loss, variables, grad_loss, lambda value: value), variables

    def get_gradients(self, loss: Any, params: Any) -> list[Any]:
        """Gradients of a loss, not clipped.

        Args:
            loss: as in `minimize`; in a TensorFlow graph a tensor.
            params: list of variables.

        Returns:
            A list with one gradient a variable.

        Raises:
            ValueError: if one cannot be computed.
        """
        return self._get_gradients(loss, as_list(params))

    def get_updates(self, loss: Any, params: Any) -> list[Any]:
        """Create the moments of variables, and the updates that make one step of them.

        Args:
            loss: as in `get_gradients`.
            params: list of variables.

        Returns:
            A list: of an operation in a TensorFlow graph, elsewhere of a callable without arguments
            that differentiates the loss as it then is and makes a step, as often as it is called.

        Raises:
            ValueError: if a gradient cannot be computed.
        """
        variables = as_list(params)
        self._build(variables)
        return self._updates(
            lambda: self.apply_gradients(
                list(zip(self.get_gradients(loss, variables), variables, strict=True))
            ),
            variables,
        )

    # --- configuration ---

    def get_config(self) -> dict[str, Any]:
        """The settings; `from_config` makes the same optimizer of them, without its state.

        Returns:
            A dictionary. A hyperparameter that is a callable or a tensor stands in it with its
            present value, a schedule as a dictionary.
        """
        rate = self._hyper["learning_rate"]
        config: dict[str, Any] = {"name": self._engine.name}
        config |= {key: value for key, value in self._clips.items() if value is not None}
        has_schedule = is_schedule(rate)
        config["learning_rate"] = (
            schedules.serialize(rate) if has_schedule else self._number("learning_rate")
        )
        numbers = ("decay", "beta_1", "beta_2", "epsilon")
        return config | {key: self._number(key) for key in numbers} | {"amsgrad": self.amsgrad}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """An optimizer with the settings of `get_config()`.

        Args:
            config: a dictionary; it is not changed. `lr` may stand for `learning_rate`.
            custom_objects: by name, classes of schedules of your own, and functions that the config
                names as hyperparameters.

        Returns:
            An optimizer without state.

        Raises:
            ValueError: if a name is not known.
        """
        config = dict(config)
        if "lr" in config:
            config["learning_rate"] = config.pop("lr")
        rate = config.get("learning_rate")
        if isinstance(rate, Mapping):
            config["learning_rate"] = schedules.deserialize(rate, custom_objects)
        for key in ("learning_rate", "decay", "beta_1", "beta_2", "epsilon"):
            value = config.get(key)
            if isinstance(value, str):
                if value not in (custom_objects or {}):
                    raise ValueError(
                        f"`{key}` is the name '{value}' in this config. Pass what it means as "
                        f"custom_objects={{'{value}': ...}}."
                    )
                config[key] = (custom_objects or {})[value]
        return cls(**config)


as_it_is(Adam)


def _pair(given: Any) -> tuple[Any, Any]:
    if not isinstance(given, (tuple, list)):  # an array of two elements is none
        raise TypeError(f"{received(given)} is no pair")
    gradient, variable = given
    return gradient, variable


def _dtype_name(dtype: Any) -> str:
    """The name of a type of NumPy, TensorFlow, PyTorch, JAX, or in a string."""
    if dtype is None:
        return "float32"
    name = getattr(dtype, "name", None)  # of np.dtype and tf.DType
    if not isinstance(name, str):
        name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    return str(np.dtype(name)) if name in np.sctypeDict else name


def _initializer(initializer: Any) -> Any:
    """What the engine knows: "zeros", "ones", or a callable of shape and dtype."""
    if initializer in ("zeros", "ones") if isinstance(initializer, str) else callable(initializer):
        return initializer
    if isinstance(initializer, str):
        for library in ("tf_keras", "keras"):
            if library in sys.modules:
                return sys.modules[library].initializers.get(initializer)
        raise ValueError(
            "`initializer` must be 'zeros', 'ones', a callable of shape and dtype, or a value; the "
            f"other names are Keras's, which is not imported. Received: {initializer!r}"
        )
    return lambda shape, dtype: np.broadcast_to(np.asarray(initializer, dtype), shape)
