"""Adam on one element: the only arithmetic in the project.

The functions here are written once and bound to a compiler's or a library's own functions: Numba
compiles them into the CPU kernels, Triton into those of a GPU, XLA traces them, and NumPy or
PyTorch runs them on whole arrays. They therefore use nothing but operators and the functions they
are given, they hold no number of their own (a Python constant would widen float32 in a compiled
kernel, so that zero arrives as a coefficient too), and they never branch on a value, only on
settings fixed before compilation.

Letters are the paper's (Kingma & Ba 2014, https://arxiv.org/abs/1412.6980); in the public surface
they have Keras's names:

    w variable    g gradient    m momentum    v velocity    v_hat velocity_hat
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

# A value of one element: a scalar inside a kernel, an array elsewhere.
Value = Any
Values = tuple[Value, ...]
# What a rule's maker returns: (w, g, slots, coefficients) -> (w, slots).
Update = Callable[[Value, Value, Values, Values], tuple[Value, Values]]


class Functions(Protocol):
    """The functions of elements that a maker is given, those of one library or compiler.

    `minimum` and `maximum` keep a NaN on either side. The condition of `where` is a comparison, or
    a coefficient, which holds unless it is zero. `sign` of zero is zero.
    """

    def sqrt(self, x: Value, /) -> Value: ...
    def divide(self, a: Value, b: Value, /) -> Value: ...
    def maximum(self, a: Value, b: Value, /) -> Value: ...
    def minimum(self, a: Value, b: Value, /) -> Value: ...
    def where(self, condition: Value, a: Value, b: Value, /) -> Value: ...
    def abs(self, x: Value, /) -> Value: ...
    def sign(self, x: Value, /) -> Value: ...


class NumberFunctions(Protocol):
    """The functions that coefficients are computed with: of numbers of the host, or traced ones."""

    def sqrt(self, x: Value, /) -> Value: ...
    def expm1(self, x: Value, /) -> Value: ...
    def log(self, x: Value, /) -> Value: ...
    def maximum(self, a: Value, b: Value, /) -> Value: ...
    def where(self, condition: Value, a: Value, b: Value, /) -> Value: ...


class Rule(NamedTuple):
    """An update rule, by what makes it: so it can be bound to a library, compiled, and cached.

    Args:
        make: a function at the top level of a module, `(functions, **settings) -> update`, where
            `functions` are `Functions` and `update(w, g, slots, coefficients)` returns the new
            `(w, slots)` of one element. It uses operators, `functions` and its arguments only: it
            holds no number of its own and branches on nothing but settings.
        slots: the names of the state that is kept for each variable, in order.
        coefficients: the names of the numbers that change from step to step, in order.
        settings: names and values of the maker's settings, which are fixed before compilation.

    Example:
        >>> from omniadam.rule import Rule
        >>> def make_descent(functions):
        ...     def descent(w, g, slots, coefficients):
        ...         (learning_rate,) = coefficients
        ...         return w - learning_rate * g, slots
        ...     return descent
        >>> Rule(make_descent, slots=(), coefficients=("learning_rate",)).make is make_descent
        True
    """

    make: Callable[..., Update]
    slots: tuple[str, ...]
    coefficients: tuple[str, ...]
    settings: tuple[tuple[str, bool], ...] = ()

    def bind(self, functions: Functions) -> Update:
        """The update of one element by the functions of a library or compiler."""
        return self.make(functions, **dict(self.settings))

    @property
    def identity(self) -> str:
        """What it is, in words that are the same in another process."""
        make = self.make
        return repr((make.__module__, make.__qualname__, *self[1:]))


class AdamCoefficients(NamedTuple):
    """What Adam's arithmetic needs beside the arrays, once a step."""

    alpha: Value  # learning_rate * sqrt(1 - beta_2**t) / (1 - beta_1**t)
    weight_1: Value  # 1 - beta_1, what g weighs in m; of a short memory beta_1, what m weighs
    weight_2: Value  # likewise, of v
    epsilon: Value  # "epsilon hat" of the paper, whatever the caller's epsilon was


def adam_coefficients(
    functions: NumberFunctions,
    learning_rate: Value,
    t: Value,
    beta_1: Value,
    beta_2: Value,
    epsilon: Value,
    *,
    epsilon_hat: bool,
    short_1: bool = False,
    short_2: bool = False,
) -> AdamCoefficients:
    """Coefficients of step t = 1, 2, ... (Kingma & Ba, the form just before Section 2.1).

    With `epsilon_hat=False`, epsilon is the one of Algorithm 1, which PyTorch and optax use:
    multiplying numerator and denominator by sqrt(1 - beta_2**t) makes it epsilon hat.
    """
    memories = memory(functions, beta_1, short_1), memory(functions, beta_2, short_2)
    return adam_coefficients_by(
        functions, learning_rate, t, *memories[0], *memories[1], epsilon, epsilon_hat=epsilon_hat
    )


def memory(functions: NumberFunctions, beta: Value, short: bool = False) -> tuple[Value, Value]:
    """What coefficients need of a beta: its logarithm, and the weight of a mean by it."""
    return functions.log(beta), beta if short else 1 - beta


def adam_coefficients_by(
    functions: NumberFunctions,
    learning_rate: Value,
    t: Value,
    log_1: Value,
    weight_1: Value,
    log_2: Value,
    weight_2: Value,
    epsilon: Value,
    epsilon_hat: bool,
) -> AdamCoefficients:
    """`adam_coefficients` by the `memory` of each beta.

    These are lost on float32 unless they were computed in double precision before.
    """
    # 1 - beta**t by expm1, since beta**t is close to 1 in the first steps and the difference would
    # cancel where t is traced in float32.
    correction_1 = -functions.expm1(t * log_1)
    correction_2 = functions.sqrt(-functions.expm1(t * log_2))
    # By position: this is done at every step.
    return AdamCoefficients(
        learning_rate * correction_2 / correction_1,
        weight_1,
        weight_2,
        epsilon if epsilon_hat else epsilon * correction_2,
    )


class OptaxCoefficients(NamedTuple):
    """What `nesterov` and `rooted` need, after those of Adam; only optax has these two."""

    ahead: Value  # what m weighs in the step
    fresh: Value  # and g
    root: Value  # what is added to v under the square root


def optax_coefficients(
    functions: NumberFunctions,
    t: Value,
    beta_1: Value,
    beta_2: Value,
    epsilon_root: Value,
    *,
    epsilon_hat: bool,
) -> OptaxCoefficients:
    """Coefficients of step t = 1, 2, ...; `epsilon_root` is corrected as v is, unless it is hat."""
    log_1 = functions.log(beta_1)
    correction_1, next_1 = -functions.expm1(t * log_1), -functions.expm1((t + 1) * log_1)
    correction_2 = -functions.expm1(t * functions.log(beta_2))
    return OptaxCoefficients(
        ahead=beta_1 * correction_1 / next_1,
        fresh=1 - beta_1,
        root=epsilon_root if epsilon_hat else epsilon_root * correction_2,
    )


def make_adam(
    functions: Functions,
    *,
    amsgrad: bool,
    short_1: bool = False,
    short_2: bool = False,
    nesterov: bool = False,
    rooted: bool = False,
    square: Callable[[Value], Value] | None = None,
) -> Update:
    """Adam (Kingma & Ba 2014) or, with `amsgrad`, AMSGrad (Reddi et al. 2018, Algorithm 2).

    Slots are (m, v), or (m, v, v_hat) with `amsgrad`. Coefficients are `AdamCoefficients`, and with
    `nesterov` or `rooted` those of `OptaxCoefficients` after them. `short_1` and `short_2` are for
    a beta below one half: the mean is then taken from the gradient's side, so that of a far larger
    old value no more than its share is left, not its rounding as well. With `nesterov` the step is
    made by the momentum that the next one would have if its gradient were this one again (Dozat
    2016, as optax has it); with `rooted` a constant is under the square root. `square` is for
    numbers that may be complex: the square of their size, which is real.
    """
    sqrt, divide, maximum = functions.sqrt, functions.divide, functions.maximum
    has_more = nesterov or rooted

    def adam(w: Value, g: Value, slots: Values, coefficients: Values) -> tuple[Value, Values]:
        if has_more:
            alpha, weight_1, weight_2, epsilon, ahead, fresh, under_root = coefficients
        else:
            alpha, weight_1, weight_2, epsilon = coefficients
        m, v = slots[0], slots[1]
        squared = g * g if square is None else square(g)
        m = g + (m - g) * weight_1 if short_1 else m + (g - m) * weight_1
        v = squared + (v - squared) * weight_2 if short_2 else v + (squared - v) * weight_2
        step = m * ahead + g * fresh if nesterov else m
        largest = maximum(slots[2], v) if amsgrad else v
        root = sqrt(largest + under_root) if rooted else sqrt(largest)
        slots = (m, v, largest) if amsgrad else (m, v)
        # One way out: Triton compiles what follows a `return`, too, and wants one type of all.
        return w - divide(alpha * step, root + epsilon), slots

    return adam


def make_nothing(functions: Functions) -> Update:
    """Of passes that are no step."""

    def nothing(w: Value, g: Value, slots: Values, coefficients: Values) -> tuple[Value, Values]:
        return w, slots

    return nothing


NOTHING = Rule(make_nothing, slots=(), coefficients=())


class Pass(NamedTuple):
    """What one pass over the elements of a variable does: each field is fixed before compilation.

    A pass with `gradient` and `updates` is a step, one with `gradient` alone is a micro-step of
    gradient accumulation, and one without `gradient` only maintains the moving average.
    """

    gradient: bool
    updates: bool = False
    scaled: bool = False  # loss_scale_factor
    accumulated: bool = False  # gradient_accumulation_steps
    clipped_by_factor: bool = False  # clipnorm, global_clipnorm
    clipped_by_value: bool = False  # clipvalue
    value_first: bool = False  # before any norm, which is then of what that left (TF 2.0)
    negated: bool = False  # maximize, of torch.optim
    penalised: bool = False  # weight_decay as an L2 penalty, of torch.optim.Adam
    decayed: bool = False  # weight_decay
    averaged: bool = False  # use_ema
    overwritten: bool = False  # ema_overwrite_frequency
    # Names of `MEASURES`: what is summed over the elements of each variable.
    measured: tuple[str, ...] = ()
    measures_only: bool = False  # and nothing is overwritten

    @property
    def stores_variable(self) -> bool:
        return (self.updates or self.overwritten) and not self.measures_only

    @property
    def stores_slots(self) -> bool:
        return self.updates and not self.measures_only

    @property
    def stores_accumulator(self) -> bool:
        return self.accumulated and not self.measures_only


class PassCoefficients(NamedTuple):
    """What a pass needs beside the rule's own coefficients, once a step."""

    scale: Value = 1.0
    steps: Value = 1.0
    clipvalue: Value = 0.0
    decay: Value = 0.0  # weight_decay * learning_rate; of a penalty, weight_decay alone
    momentum: Value = 0.0
    one_minus_momentum: Value = 1.0
    overwrite: Value = 0.0  # 1.0 on the calls that overwrite the variable by its average
    zero: Value = 0.0


def make_gradient(kind: Pass, functions: Functions) -> Callable[[Value, Value, Values], Value]:
    """The gradient whose norm is taken: unscaled, and the mean of what accumulated."""
    minimum, maximum, divide = functions.minimum, functions.maximum, functions.divide
    scaled, averages = kind.scaled, kind.accumulated and kind.updates
    by_value = kind.updates and kind.clipped_by_value and kind.value_first

    def gradient(g: Value, accumulator: Value, coefficients: Values) -> Value:
        scale, steps, clipvalue, _, _, _, _, _ = coefficients
        if scaled:
            g = divide(g, scale)
        if averages:
            g = divide(g + accumulator, steps)
        if by_value:
            g = minimum(maximum(g, -clipvalue), clipvalue)
        return g

    return gradient


def make_element(
    kind: Pass,
    update: Update,
    gradient: Callable[[Value, Value, Values], Value],
    functions: Functions,
    rounded: Callable[[Value], Value],
) -> Callable[..., tuple[Value, Values, Value, Value]]:
    """One element through one call of the optimizer, in the order of Keras's base_optimizer.py.

    `update` is a rule's and `gradient` that of `make_gradient`, both compiled where that is needed;
    `rounded` rounds a value to what the variable can store, for float16 and bfloat16, and is the
    identity elsewhere.
    """
    minimum, maximum, where = functions.minimum, functions.maximum, functions.where
    has_gradient, updates, accumulated = kind.gradient, kind.updates, kind.accumulated
    by_factor, decayed = kind.clipped_by_factor, kind.decayed
    by_value = kind.clipped_by_value and not kind.value_first
    negated, penalised = kind.negated, kind.penalised
    averaged, overwritten = kind.averaged, kind.overwritten

    def element(
        w: Value,
        g: Value,
        slots: Values,
        accumulator: Value,
        average: Value,
        factor: Value,
        rule_coefficients: Values,
        coefficients: Values,
    ) -> tuple[Value, Values, Value, Value]:
        _, _, clipvalue, decay, momentum, fresh, overwrite, zero = coefficients
        if has_gradient:
            g = gradient(g, accumulator, coefficients)
            if updates:
                if accumulated:
                    accumulator = zero  # cleared by assignment: 0 * NaN would stay NaN
                if by_factor:
                    g = g * factor
                if by_value:
                    g = minimum(maximum(g, -clipvalue), clipvalue)
                if negated:
                    g = -g
                if penalised:
                    g = g + w * decay
                if decayed:
                    w = w - w * decay
                w, slots = update(w, g, slots, rule_coefficients)
                w = rounded(w)
            else:
                accumulator = accumulator + g
        if averaged:
            average = momentum * average + fresh * w
            if overwritten:
                w = rounded(where(overwrite, average, w))
        return w, slots, accumulator, average

    return element


# --- what a pass measures: of each variable, the sum of the squares of one of these values ---

# (g, w before the pass, w after it) -> value, where g is the gradient of `make_gradient`.
Measure = Callable[[Value, Value, Value], Value]


def make_gradient_measure(functions: Functions) -> Measure:
    """Its sum is the square of the norm of a gradient."""

    def measured(g: Value, before: Value, after: Value) -> Value:
        return g

    return measured


def make_change_measure(functions: Functions) -> Measure:
    """Its sum is the square of the norm of what a step changed."""

    def measured(g: Value, before: Value, after: Value) -> Value:
        return after - before

    return measured


MEASURES: dict[str, Callable[[Functions], Measure]] = {
    "gradient": make_gradient_measure,
    "change": make_change_measure,
}


def clip_factor(functions: Any, norm: Value, threshold: Value) -> Value:
    """What a gradient of this Euclidean norm is multiplied by to have at most the threshold's.

    1 where it has already, as with an infinite threshold; NaN for a NaN norm (Keras
    `clip_by_norm`).
    """
    return 1.0 / functions.maximum(norm / threshold, 1.0)


def clip_factor_global(functions: Any, norm: Value, threshold: Value) -> Value:
    """As `clip_factor`, over all gradients together; NaN for an infinite norm too.

    Else one infinity would be hidden by scaling every finite gradient to zero (Keras
    `clip_by_global_norm`).
    """
    return clip_factor(functions, norm, threshold) + (norm - norm)


def clip_factor_joint(functions: Any, norm: Value, threshold: Value) -> Value:
    """As `clip_factor`, over all gradients together in TensorFlow 1.1: a NaN norm clips nothing."""
    return 1.0 / functions.where(norm >= threshold, norm / threshold, 1.0)


def decayed_rate(rate: Value, decay: Value, t: Value) -> Value:
    """The learning rate of step t = 1, 2, ... by the `decay` of the older generations."""
    return rate / (1.0 + decay * (t - 1))
