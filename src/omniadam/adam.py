"""Adam and AdamW: their settings, their slots, their rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from . import options
from .engine import Engine
from .optimizer import Optimizer
from .options import Option
from .rule import AdamCoefficients, Rule, adam_coefficients_by, make_adam, memory
from .schedules import LearningRate


class AdamEngine(Engine):
    """An engine with Adam's settings, slots and rule."""

    beta_1 = Option[float | Callable[[], float]](options.decay_rate, or_callable=True)
    beta_2 = Option[float | Callable[[], float]](options.decay_rate, or_callable=True)
    epsilon = Option[float | Callable[[], float]](options.small_constant, or_callable=True)
    amsgrad = Option[bool](options.boolean, structural=True)
    # Whether epsilon is the paper's "epsilon hat". It is in a config only where it is not, so that
    # every other config is one of Keras's.
    epsilon_hat = Option[bool](options.boolean, structural=True)

    _option_names: ClassVar[tuple[str, ...]] = (
        *Engine._option_names,
        "beta_1",
        "beta_2",
        "epsilon",
        "amsgrad",
    )
    hyperparameters = ("beta_1", "beta_2", "epsilon")

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: float | Callable[[], float] = 0.9,
        beta_2: float | Callable[[], float] = 0.999,
        epsilon: float | Callable[[], float] = 1e-7,
        amsgrad: bool = False,
        epsilon_hat: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(learning_rate, **settings)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.amsgrad, self.epsilon_hat = amsgrad, epsilon_hat

    @property
    def rule(self) -> Rule:
        """Adam's, or AMSGrad's."""
        return AMSGRAD if self.amsgrad else ADAM

    def _rule_of(self, hyperparameters: Sequence[Any]) -> Rule:
        beta_1, beta_2, _ = hyperparameters
        return by_memory(self.rule, beta_1 < 0.5, beta_2 < 0.5)

    def numbers(self, functions: Any, *hyperparameters: Any) -> tuple[Any, ...]:
        """Of each beta its `rule.memory`, and epsilon."""
        beta_1, beta_2, epsilon = hyperparameters
        short = dict(self._rule_of(hyperparameters).settings)
        return (
            *memory(functions, beta_1, "short_1" in short),
            *memory(functions, beta_2, "short_2" in short),
            epsilon,
        )

    def coefficients(
        self, functions: Any, learning_rate: Any, t: Any, *numbers: Any
    ) -> AdamCoefficients:
        """`rule.adam_coefficients_by` of these numbers."""
        given = *numbers, self.epsilon_hat
        return adam_coefficients_by(functions, learning_rate, t, *given)


class Adam(AdamEngine, Optimizer):
    """Adam as Keras 3 documents it, on the arrays of any library.

    For a variable w with gradient g at step t = 1, 2, ...:

        alpha_t = learning_rate * sqrt(1 - beta_2**t) / (1 - beta_1**t)
        m <- m + (g - m) * (1 - beta_1)
        v <- v + (g*g - v) * (1 - beta_2)
        v_hat <- max(v_hat, v)                       with amsgrad; it then stands for v below
        w <- w - alpha_t * m / (sqrt(v) + epsilon)

    Variables may be float32, float64, float16 or (where the library has it) bfloat16; the last
    two are computed in float32, rounded once a step, and have float32 slots.

    Args:
        learning_rate: a number >= 0, a schedule, or a callable without arguments.
        beta_1: 0 <= number < 1, the decay rate of the momentum; or a callable without arguments,
            read at each step.
        beta_2: likewise, of the velocity.
        epsilon: a number >= 0 or a callable; see `epsilon_hat`.
        amsgrad: whether to divide by the largest velocity so far (Reddi et al. 2018).
        weight_decay: number >= 0, or None. Decoupled: w <- w - w * weight_decay * learning_rate
            before the update.
        clipnorm: number > 0, or None. The gradient of each variable is scaled down to have at
            most this Euclidean norm.
        clipvalue: number > 0, or None. Each element of a gradient is clipped to +- this value.
        global_clipnorm: number > 0, or None. All gradients are scaled down together so that the
            norm over all of them is at most this.
        use_ema: whether to keep an exponential moving average of each variable.
        ema_momentum: 0 <= number <= 1; average <- momentum * average + (1 - momentum) * w.
        ema_overwrite_frequency: integer >= 1, or None: every so many `iterations` the variables
            are overwritten by their averages. With None, `finalize_variable_values` does it.
        loss_scale_factor: number > 0, or None. `scale_loss` multiplies by it, and gradients are
            divided by it.
        gradient_accumulation_steps: integer >= 2, or None. Variables change on every n-th call
            only, by the mean of the gradients of n calls.
        name: name of the optimizer.
        epsilon_hat: whether epsilon is "epsilon hat" of the paper, in the formula just before its
            Section 2.1, as in Keras. False is its Algorithm 1, as in PyTorch and optax: epsilon
            stands for epsilon * sqrt(1 - beta_2**t). It cannot be changed once the optimizer is
            built.

    Raises:
        ValueError: if a setting is out of its range, or more than one clip is set.

    Example:
        >>> import numpy as np
        >>> from omniadam import Adam
        >>> w = np.array([1.0, -2.0], np.float32)
        >>> opt = Adam(learning_rate=0.1)
        >>> for _ in range(3):
        ...     calls = opt.apply_gradients([(2 * w, w)])
        >>> calls, w.astype(float).round(3).tolist()
        (3, [0.702, -1.701])

    Sources: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980; keras/src/optimizers/adam.py.
    """

    @options.leads_on("keras")
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: float | Callable[[], float] = 0.9,
        beta_2: float | Callable[[], float] = 0.999,
        epsilon: float | Callable[[], float] = 1e-7,
        amsgrad: bool = False,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "adam",
        *,
        epsilon_hat: bool = True,
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            amsgrad,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            epsilon_hat=epsilon_hat,
        )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | ({} if self.epsilon_hat else {"epsilon_hat": False})


class AdamW(Adam):
    """Adam with decoupled weight decay: `Adam` with `weight_decay=0.004`.

    The order of the arguments is Keras's, in which `weight_decay` comes second. Source: Loshchilov
    & Hutter 2019, https://arxiv.org/abs/1711.05101.

    Example:
        >>> import numpy as np
        >>> from omniadam import AdamW
        >>> w = np.array([1.0])
        >>> AdamW(learning_rate=0.1, weight_decay=0.5).apply_gradients([(np.array([0.0]), w)])
        1
        >>> w.tolist()
        [0.95]
    """

    @options.leads_on("keras")
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        weight_decay: float = 0.004,
        beta_1: float | Callable[[], float] = 0.9,
        beta_2: float | Callable[[], float] = 0.999,
        epsilon: float | Callable[[], float] = 1e-7,
        amsgrad: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "adamw",
        *,
        epsilon_hat: bool = True,
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            amsgrad,
            weight_decay,
            clipnorm,
            clipvalue,
            global_clipnorm,
            use_ema,
            ema_momentum,
            ema_overwrite_frequency,
            loss_scale_factor,
            gradient_accumulation_steps,
            name,
            epsilon_hat=epsilon_hat,
        )
        if self.weight_decay is None:
            raise ValueError("`weight_decay` of AdamW must be a number. Received: None")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """As of every `Optimizer`; None for `weight_decay`, too, which it may be set to later."""
        config = dict(config)
        is_off = config.get("weight_decay", 0.0) is None
        if is_off:
            del config["weight_decay"]
        optimizer = super().from_config(config, custom_objects)
        if is_off:
            optimizer.weight_decay = None
        return optimizer


_SLOTS = ("momentum", "velocity")
_NAMES = AdamCoefficients._fields
ADAM = Rule(make_adam, _SLOTS, _NAMES, (("amsgrad", False),))
AMSGRAD = Rule(make_adam, (*_SLOTS, "velocity_hat"), _NAMES, (("amsgrad", True),))


def by_memory(rule: Rule, short_1: bool, short_2: bool) -> Rule:
    """Adam's rule for betas that are, or are not, below one half: see `make_adam`."""
    short = {"short_1": short_1, "short_2": short_2}
    chosen = [(name, True) for name, is_short in short.items() if is_short]
    return rule._replace(settings=(*rule.settings, *chosen)) if chosen else rule
