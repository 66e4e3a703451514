"""`tf.contrib.keras.optimizers.Adam` of TensorFlow 1.1, on the arrays of any library.

What differs from `omniadam.Adam`: `decay`; `clipnorm`, which is of all gradients together, and
`clipvalue` after it; the order of the weights; and `get_updates`, which makes a step to run later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, TypedDict, Unpack

from .. import options
from ..backends.base import received
from ..engine import as_list
from ..settings import Clips, as_it_is
from .engine import JointlyClipped
from .older import Clip, Hyperparameter, Number, Older, _name_of

__all__ = ["Adam"]


def __dir__() -> list[str]:
    return __all__


_KWARGS = ("clipnorm", "clipvalue")


class _Kwargs(TypedDict, total=False):
    """What type checkers know of the settings by keyword."""

    clipnorm: float | None
    clipvalue: float | None


class Adam(Older):
    """Adam as TensorFlow 1.1 documents it.

    The update is that of `omniadam.Adam`, with the learning rate lr / (1 + decay * iterations).

    Args:
        lr: a number >= 0, the learning rate.
        beta_1: 0 <= number < 1, the decay rate of the 1st moment.
        beta_2: likewise, of the 2nd moment.
        epsilon: a number >= 0, "epsilon hat" of the paper.
        decay: a number >= 0, how fast the learning rate falls.
        **kwargs: `clipnorm`, all gradients together are scaled to have at most this norm; then
            `clipvalue`, each element of a gradient is clipped to +- it. 0 is no clipping.

    Raises:
        TypeError: if another keyword is given.
        ValueError: if a setting is negative or out of its range.

    Example:
        >>> import numpy as np
        >>> from omniadam.compat.contrib_keras import Adam
        >>> w = np.array([1.0, -2.0])
        >>> opt = Adam(lr=0.1)
        >>> updates = opt.get_updates([w], {}, lambda w: (w * w).sum())
        >>> for _ in range(3):
        ...     for update in updates:
        ...         calls = update()
        >>> w.round(3).tolist(), [weight.shape for weight in opt.get_weights()]
        ([0.702, -1.701], [(), (2,), (2,)])

    Source: `tensorflow/contrib/keras/python/keras/optimizers.py` of TensorFlow 1.1.
    """

    lr = Hyperparameter("learning_rate")
    clipnorm = Clip()
    clipvalue = Clip()

    @options.leads_on("keras", *_KWARGS)
    def __init__(
        self,
        lr: Number = 0.001,
        beta_1: Number = 0.9,
        beta_2: Number = 0.999,
        epsilon: Number = 1e-08,
        decay: Number = 0.0,
        **kwargs: Unpack[_Kwargs],
    ) -> None:
        for key in kwargs:
            if key not in _KWARGS:
                raise TypeError(
                    f"Unexpected keyword argument: '{key}'. Beside its named arguments this "
                    f"optimizer takes {' and '.join(_KWARGS)}."
                )
        super().__init__(
            JointlyClipped(name="Adam"),
            {
                "learning_rate": lr,
                "beta_1": beta_1,
                "beta_2": beta_2,
                "epsilon": epsilon,
                "decay": decay,
            },
            {key: kwargs.get(key) for key in _KWARGS},
        )
        self.updates: list[Any] = []

    @property
    def _has_own_gradients(self) -> bool:
        """Whether a subclass overrides `get_gradients`: a step applies what that returns."""
        return type(self).get_gradients is not Adam.get_gradients

    def _clipping(self, clips: Mapping[str, Any]) -> Mapping[str, Any]:
        return {} if self._has_own_gradients else self._thresholds(clips)

    def _thresholds(self, clips: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            "global_clipnorm": clips.get("clipnorm") or None,
            "clipvalue": clips.get("clipvalue") or None,
        }

    @property
    def iterations(self) -> Any:
        """The variable that counts the steps."""
        return self._iterations()

    def get_gradients(self, loss: Any, params: Any) -> list[Any]:
        """Gradients of a loss, clipped.

        Args:
            loss: a callable that returns the loss. It takes no arguments where the library can
                trace a closure (PyTorch, TensorFlow, Keras on these), and otherwise one argument a
                variable (NumPy, JAX). In a TensorFlow graph a tensor.
            params: list of variables.

        Returns:
            A list with one gradient a variable.

        Raises:
            ValueError: if one cannot be computed.
        """
        variables, thresholds = as_list(params), self._thresholds(self._clips)
        clips = Clips(None, thresholds["clipvalue"], thresholds["global_clipnorm"])
        return self._engine.clipped(self._get_gradients(loss, variables), variables, clips)

    def get_updates(
        self,
        params: Any,
        constraints: Mapping[Any, Callable[[Any], Any]] | None,
        loss: Any,
    ) -> list[Any]:
        """Create the moments of variables, and the updates that make one step of them.

        Args:
            params: list of variables.
            constraints: from a variable to a function of its new value, whose result it is then
                set to. Variables that are no keys of a dictionary (NumPy's, JAX's) are given by
                their `id`, or as a list of pairs.
            loss: as in `get_gradients`.

        Returns:
            A list: of operations in a TensorFlow graph, elsewhere of callables without arguments.
            To run them in order is one step, with the gradients of the loss at that moment; they
            may be run as often as wanted.

        Raises:
            TypeError: if a constraint is no callable.
            ValueError: if a gradient cannot be computed, or there is a constraint of another
                variable; in a step, if a constraint returns another shape.
        """
        variables = as_list(params)
        pairs = constraints.items() if isinstance(constraints, Mapping) else constraints or ()
        held = {key if isinstance(key, int) else id(_variable(key)): c for key, c in pairs}
        unknown = set(held) - {id(variable) for variable in variables}
        if unknown:
            raise ValueError(
                f"`constraints` must be of variables in `params`. Received {len(unknown)} others."
            )
        for variable in variables:
            if not callable(held.get(id(variable), abs)):
                raise TypeError(
                    f"The constraint of variable {_name_of(variable)} must be a callable. "
                    f"Received: {received(held[id(variable)])}."
                )
        self._build(variables)
        self._engine.constrain(variables, held)

        def step() -> Any:
            # Another call may have given the same variables other constraints since.
            self._engine.constrain(variables, held)
            own = self._has_own_gradients
            gradients = (self.get_gradients if own else self._get_gradients)(loss, variables)
            return self._apply(list(zip(gradients, variables, strict=True)), None)

        self.updates = self._updates(step, variables)
        return self.updates

    def get_config(self) -> dict[str, Any]:
        """The settings; `from_config` makes the same optimizer of them, without its state.

        Returns:
            A dictionary.
        """
        names = ("beta_1", "beta_2", "decay", "epsilon")
        config = {"lr": self._number("learning_rate")} | {key: self._number(key) for key in names}
        return config | {key: value for key, value in self._clips.items() if value is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """An optimizer with the settings of `get_config()`.

        Args:
            config: a dictionary.

        Returns:
            An optimizer without state.
        """
        return cls(**config)


as_it_is(Adam)


def _variable(key: Any) -> Any:
    """What a key of `constraints` stands for: `variable.ref()` is TensorFlow's way to hash one."""
    return key.deref() if hasattr(key, "deref") else key
