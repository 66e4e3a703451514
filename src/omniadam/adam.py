"""Adam and AdamW: their settings, their slots, their rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Self

from . import options
from .optimizer import Optimizer
from .options import Option
from .rule import RuleKey, adam_coefficients_by, make_adam, memory


class Adam(Optimizer):
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
        epsilon: a number >= 0 or a callable; "epsilon hat" of the paper, in the formula just
            before its Section 2.1. PyTorch and optax use the epsilon of Algorithm 1 instead.
        amsgrad: whether to divide by the largest velocity so far (Reddi et al. 2018).
        weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
            ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, name: see
            `Optimizer`.

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

    beta_1 = Option(options.or_callable(options.decay_rate))
    beta_2 = Option(options.or_callable(options.decay_rate))
    epsilon = Option(options.or_callable(options.small_constant))
    amsgrad = Option(options.boolean, structural=True)

    _option_names: ClassVar[tuple[str, ...]] = (
        *Optimizer._option_names,
        "beta_1",
        "beta_2",
        "epsilon",
        "amsgrad",
    )
    # Whether epsilon is the paper's "epsilon hat"; the drop-ins for PyTorch and optax say no.
    _epsilon_hat: ClassVar[bool] = True

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: bool = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: str = "adam",
    ) -> None:
        super().__init__(
            learning_rate,
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
        )
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.amsgrad = amsgrad

    @property
    def _rule(self) -> RuleKey:
        return _AMSGRAD if self.amsgrad else _ADAM

    def _rule_of(self, hyperparameters: Sequence[Any]) -> RuleKey:
        beta_1, beta_2, _ = hyperparameters
        return by_memory(self._rule, beta_1 < 0.5, beta_2 < 0.5)

    @property
    def _is_fused(self) -> bool:
        return type(self).update_step is Adam.update_step

    def _hyperparameters(self) -> tuple[float, ...]:
        return (
            _present("beta_1", self.beta_1, options.decay_rate),
            _present("beta_2", self.beta_2, options.decay_rate),
            _present("epsilon", self.epsilon, options.small_constant),
        )

    def _numbers(
        self, functions: Any, rule: RuleKey, hyperparameters: Sequence[Any]
    ) -> tuple[Any, ...]:
        beta_1, beta_2, epsilon = hyperparameters
        short_1, short_2 = ((name, True) in rule.settings for name in _SHORT)
        memories = memory(functions, beta_1, short_1), memory(functions, beta_2, short_2)
        return (*memories[0], *memories[1], epsilon)

    def _coefficients(
        self, rule: RuleKey, functions: Any, learning_rate: Any, t: Any, *numbers: Any
    ) -> Sequence[Any]:
        return adam_coefficients_by(
            functions, learning_rate, t, *numbers, epsilon_hat=self._epsilon_hat
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The Adam update of one variable, as step `iterations` + 1: nothing is clipped, decayed,
        averaged or counted.

        Args:
            gradient: of the variable's shape.
            variable: one of those the optimizer was built with.
            learning_rate: a number.
        """
        self._update_one(gradient, variable, learning_rate)


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

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: Any = 0.004,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: bool = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: str = "adamw",
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
_ADAM = RuleKey(make_adam, _SLOTS, (("amsgrad", False),))
_AMSGRAD = RuleKey(make_adam, (*_SLOTS, "velocity_hat"), (("amsgrad", True),))
_SHORT = ("short_1", "short_2")


def by_memory(rule: RuleKey, short_1: bool, short_2: bool) -> RuleKey:
    """Adam's rule for betas that are, or are not, below one half: see `make_adam`."""
    return _by_memory(rule, short_1, short_2) if short_1 or short_2 else rule


@cache  # what was compiled for a rule is found by its identity
def _by_memory(rule: RuleKey, *short: bool) -> RuleKey:
    chosen = (each for each in zip(_SHORT, short, strict=True) if each[1])
    return rule._replace(settings=(*rule.settings, *chosen))


def _present(name: str, value: Any, check: options.Check) -> Any:
    """A setting's value at this step: what a callable returns is checked as a number would be."""
    return check(name, value()) if callable(value) else value
