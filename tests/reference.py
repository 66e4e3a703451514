"""The oracle: one step of Adam in float64 NumPy. It shares no code with omniadam.

Written from the papers and from Keras 3.15 (`base_optimizer.py`, `adam.py`), in Keras's order of
one step. It favours reading over speed: every line is one line of a paper or of Keras.

    Kingma & Ba 2014, Algorithm 1      m_t = beta_1 m_{t-1} + (1 - beta_1) g_t
                                       v_t = beta_2 v_{t-1} + (1 - beta_2) g_t^2
    the end of its Section 2           alpha_t = alpha sqrt(1 - beta_2^t) / (1 - beta_1^t)
                                       theta_t = theta_{t-1} - alpha_t m_t / (sqrt(v_t) + eps_hat)
    Algorithm 1, last line             the same with eps_hat = epsilon sqrt(1 - beta_2^t)
    Reddi et al. 2018, Algorithm 2     v_hat_t = max(v_hat_{t-1}, v_t) stands for v_t
    Loshchilov & Hutter 2019, Alg. 2   theta loses weight_decay * alpha * theta besides; Keras
                                       subtracts it first, which moves nothing: Adam reads only g

Beside each number the oracle carries what its rounding errors are proportional to (`sizes`,
`stores`), so that `cases.error_in_ulps` can judge without a tolerance found by trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, np.dtype[Any]]
Number = float | Callable[[], float]


@dataclass(frozen=True)
class Gradient:
    """A gradient, and `size`: the same sum over the absolute values of its terms.

    The two differ only after accumulation or repeated sparse rows. A sum that nearly cancels keeps
    the rounding errors of its terms: they are proportional to `size`, not to `value`.
    """

    value: Array
    size: Array

    def __add__(self, other: Gradient) -> Gradient:
        return Gradient(self.value + other.value, self.size + other.size)

    def __mul__(self, factor: float) -> Gradient:
        return Gradient(self.value * factor, self.size * factor)

    def __truediv__(self, divisor: float) -> Gradient:
        return Gradient(self.value / divisor, self.size / divisor)


Clip = Callable[[dict[int, Gradient]], dict[int, Gradient]]


def norm(gradients: Collection[Gradient]) -> float:
    squares: float = sum(np.sum(np.square(g.value)) for g in gradients)
    return np.sqrt(squares)  # type: ignore[no-any-return]  # a NumPy scalar: 1 / 0 is inf


def clip_each_by_norm(limit: float) -> Clip:
    """Keras `_clip_by_norm`. A norm of inf gives zeros, and NaN where g is inf; NaN gives NaN."""
    return lambda gradients: {
        i: g * limit / np.maximum(norm([g]), limit) for i, g in gradients.items()
    }


def clip_by_global_norm(limit: float) -> Clip:
    """Keras `clip_by_global_norm`. `+ (total - total)`: an inf or NaN anywhere makes all NaN."""

    def clip(gradients: dict[int, Gradient]) -> dict[int, Gradient]:
        total = norm(gradients.values())
        scale = limit * np.minimum(1.0 / total, 1.0 / limit) + (total - total)
        return {i: g * scale for i, g in gradients.items()}

    return clip


def clip_by_value(limit: float) -> Clip:
    """Keras `ops.clip`. NaN stays NaN; a clipped element is exact, whatever errors it had."""
    return lambda gradients: {
        i: Gradient(
            np.clip(g.value, -limit, limit),
            np.where(np.abs(g.value) < limit, g.size, limit),
        )
        for i, g in gradients.items()
    }


def mixed(old: Array, new: Array, beta: float) -> Array:
    """An average with a new value: a small beta leaves none of the old one's rounding."""
    return new + (old - new) * beta if beta < 0.5 else old + (new - old) * (1 - beta)


def one_minus_power(beta: float, t: int) -> float:
    """1 - beta**t. With beta = 0.999 the plain difference would lose three digits at t = 1."""
    return 1.0 if beta == 0 else -math.expm1(t * math.log(beta))


def read(number: Number) -> float:
    return number() if callable(number) else number


class Reference:
    """Keras 3's Adam on float64 copies of `variables`; the settings are those of Keras 3, plus:

    learning_rate   a number, or a callable of the number of calls made so far (a schedule)
    epsilon_hat     False: Algorithm 1 of the paper (PyTorch, optax)
    excluded        the indices of the variables without weight decay
    dtype           the arithmetic. Not float64 only where a test simulates an implementation.

    `state` holds "variable" and the slots under Keras's names, each a list of arrays updated in
    place, one a variable. `sizes` and `stores` have the same form:

    sizes   the length of everything added up so far, as if nothing had ever cancelled: of m for
            "momentum", and for "variable" of all updates, the errors of m and v in full
    stores  for "variable" and "average", the sum of |w| over the roundings to the variable's dtype
    """

    def __init__(
        self,
        variables: Sequence[ArrayLike],
        *,
        learning_rate: float | Callable[[int], float] = 0.001,
        beta_1: Number = 0.9,
        beta_2: Number = 0.999,
        epsilon: Number = 1e-7,
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
        epsilon_hat: bool = True,
        excluded: Collection[int] = (),
        dtype: Any = np.float64,
    ) -> None:
        self.learning_rate = learning_rate
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.amsgrad = amsgrad
        self.weight_decay = weight_decay
        self.use_ema = use_ema
        self.ema_momentum = ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.loss_scale_factor = loss_scale_factor
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.epsilon_hat = epsilon_hat
        self.excluded = frozenset(excluded)
        self.dtype = dtype

        self.clips: list[Clip] = []
        if clipnorm:
            self.clips.append(clip_each_by_norm(clipnorm))
        if global_clipnorm:
            self.clips.append(clip_by_global_norm(global_clipnorm))
        if clipvalue:
            self.clips.append(clip_by_value(clipvalue))
        if len(self.clips) > 1:
            raise ValueError("Only one of clipnorm, global_clipnorm and clipvalue can be set.")
        self.clips_by_norm = bool(clipnorm or global_clipnorm)

        self.calls = 0
        self.since = [0 for _ in variables]  # of each, the iterations when it was added
        slots = ["momentum", "velocity"]
        slots += ["velocity_hat"] if amsgrad else []
        slots += ["average"] if use_ema else []
        slots += ["gradient_accumulator"] if gradient_accumulation_steps else []
        self.state = {"variable": [np.array(w, dtype) for w in variables]}
        self.state |= {slot: self._zeros() for slot in slots}
        self.sizes = {name: self._zeros() for name in ("variable", "average", *slots)}
        self.stores = {name: self._zeros() for name in ("variable", "average")}

    def _zeros(self) -> list[Array]:
        return [np.zeros_like(w) for w in self.state["variable"]]

    @property
    def variables(self) -> list[Array]:
        return self.state["variable"]

    @property
    def iterations(self) -> int:
        return self.calls // (self.gradient_accumulation_steps or 1)

    def extend(self, variables: Sequence[ArrayLike]) -> None:
        """Variables that come later: as new ones, with numbers of steps of their own."""
        for name, arrays in self.state.items():
            arrays += [
                np.array(w, self.dtype) if name == "variable" else np.zeros_like(w, self.dtype)
                for w in variables
            ]
        for of in (self.sizes, self.stores):
            for arrays in of.values():
                arrays += [np.zeros_like(w, self.dtype) for w in variables]
        self.since += [self.iterations for _ in variables]

    def resync(self, variables: Sequence[ArrayLike]) -> None:
        """Continue from these values. A test that does so after each step checks steps one by one,
        so that what the stores of a 16-bit dtype lost before does not hide what this step did.
        """
        for i, value in enumerate(variables):
            self.state["variable"][i][...] = value
            self.sizes["variable"][i][...] = 0
            self.stores["variable"][i][...] = 0

    def step(self, gradients: Sequence[Any]) -> None:
        """One call. A gradient is an array, None, or (indices, values) for rows of the variable."""
        with np.errstate(all="ignore"):  # NaN and inf go where IEEE sends them
            self._step(gradients)

    def _step(self, gradients: Sequence[Any]) -> None:
        # 1. Variables without a gradient take no part (but see the EMA).
        present = {
            i: self._dense(g, w)
            for i, (g, w) in enumerate(zip(gradients, self.variables, strict=True))
            if g is not None
        }
        if not present:
            raise ValueError("No gradients provided for any variable.")
        # 2. Undo `scale_loss`.
        if self.loss_scale_factor is not None:
            present = {i: g / self.loss_scale_factor for i, g in present.items()}
        # 3. Accumulate; n - 1 of n calls end here, but for the EMA and the count.
        if self.gradient_accumulation_steps:
            present = self._accumulate(present, self.gradient_accumulation_steps)
        # 4. Clip. Keras 3 allows one way, the older generations several in a row.
        for clip in self.clips:
            present = clip(present)
        # 5. and 6. A schedule sees the calls, not the iterations.
        if callable(self.learning_rate):
            learning_rate = float(self.learning_rate(self.calls))
        else:
            learning_rate = self.learning_rate
        for i, g in present.items():
            if self.weight_decay is not None and i not in self.excluded:
                self._decay_weight(i, self.weight_decay, learning_rate)
            self._update(i, g, learning_rate)
        # 7. Every variable, gradient or not, on every call.
        if self.use_ema:
            self._average()
        # 8. is about constraints, which are not the optimizer's. 9. Count one call.
        self.calls += 1

    def _dense(self, gradient: Any, variable: Array) -> Gradient:
        if isinstance(gradient, tuple):
            indices, values = gradient
            value, size = np.zeros_like(variable), np.zeros_like(variable)
            np.add.at(value, np.asarray(indices), np.asarray(values, self.dtype))
            np.add.at(size, np.asarray(indices), np.abs(np.asarray(values, self.dtype)))
            return Gradient(value, size)
        value = np.asarray(gradient, self.dtype)
        if value.shape != variable.shape:
            raise ValueError(f"gradient {value.shape}, variable {variable.shape}")
        return Gradient(value, np.abs(value))

    def _accumulate(self, present: dict[int, Gradient], steps: int) -> dict[int, Gradient]:
        accumulators = self.state["gradient_accumulator"]
        sizes = self.sizes["gradient_accumulator"]
        total = {i: Gradient(accumulators[i], sizes[i]) + g for i, g in present.items()}
        if (self.calls + 1) % steps == 0:
            # All are cleared, also those of variables that got no gradient on this very call.
            for array in (*accumulators, *sizes):
                array[...] = 0
            return {i: g / steps for i, g in total.items()}
        for i, g in total.items():
            accumulators[i][...], sizes[i][...] = g.value, g.size
        return {}

    def _decay_weight(self, i: int, weight_decay: float, learning_rate: float) -> None:
        w = self.variables[i]
        loss = w * weight_decay * learning_rate
        w -= loss
        self.sizes["variable"][i] += np.abs(loss)
        self.stores["variable"][i] += np.where(loss != 0, np.abs(w), 0)

    def _update(self, i: int, g: Gradient, learning_rate: float) -> None:
        t = self.iterations - self.since[i] + 1
        beta_1, beta_2, epsilon = read(self.beta_1), read(self.beta_2), read(self.epsilon)
        correction_1, correction_2 = one_minus_power(beta_1, t), one_minus_power(beta_2, t)
        alpha = learning_rate * math.sqrt(correction_2) / correction_1
        if not self.epsilon_hat:
            epsilon = epsilon * math.sqrt(correction_2)

        w, m, v = (self.state[name][i] for name in ("variable", "momentum", "velocity"))
        m_size, v_size = self.sizes["momentum"][i], self.sizes["velocity"][i]
        m[...] = mixed(m, g.value, beta_1)
        v[...] = mixed(v, np.square(g.value), beta_2)
        m_size[...] = beta_1 * m_size + (1 - beta_1) * g.size
        v_size[...] = beta_2 * v_size + (1 - beta_2) * np.square(g.size)
        if self.amsgrad:
            v_hat, v_hat_size = self.state["velocity_hat"][i], self.sizes["velocity_hat"][i]
            v_hat[...] = np.maximum(v_hat, v)
            v_hat_size[...] = np.maximum(v_hat_size, v_size)
            v, v_size = v_hat, v_hat_size
        w -= alpha * m / (np.sqrt(v) + epsilon)

        # k roundings of g, m and v make an error of at most k m_size in m, and in v of at most
        # k sqrt(v v_size) (Cauchy-Schwarz), half of which, relatively, is left by the square root.
        from_v = np.where(v > 0, 0.5 * np.abs(m) * np.sqrt(v_size / v), 0)
        length = np.where(m_size > 0, alpha * (m_size + from_v) / (np.sqrt(v) + epsilon), 0)
        self.sizes["variable"][i] += length
        self.stores["variable"][i] += np.where(length != 0, np.abs(w), 0)

    def _average(self) -> None:
        frequency = self.ema_overwrite_frequency
        overwrites = bool(frequency and (self.iterations + 1) % frequency == 0)
        for i, w in enumerate(self.variables):
            # The first iteration starts the average at w, not at 0.
            momentum = self.ema_momentum if self.iterations != self.since[i] else 0.0
            average = self.state["average"][i]
            old, new = momentum * average, (1 - momentum) * w
            average[...] = old + new
            # The average inherits w's errors; coefficient, product and sum round each term thrice.
            for of, rounded in ((self.sizes, 0.0), (self.stores, 3 * (np.abs(old) + np.abs(new)))):
                w_of, average_of = of["variable"][i], of["average"][i]
                average_of[...] = momentum * average_of + (1 - momentum) * w_of + rounded
                if overwrites:
                    w_of[...] = average_of
            if overwrites:
                w[...] = average
                self.stores["variable"][i] += np.abs(w)


def _decayed(learning_rate: float | Callable[[int], float], decay: float) -> Callable[[int], float]:
    def rate(iterations: int) -> float:
        now = learning_rate(iterations) if callable(learning_rate) else learning_rate
        return now / (1.0 + decay * iterations)

    return rate


def reference_contrib_keras(
    variables: Sequence[ArrayLike],
    *,
    lr: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    decay: float = 0.0,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
) -> Reference:
    """`tf.contrib.keras.optimizers.Adam` of TensorFlow 1.1: the norm over all gradients, then the
    value. Its `clip_norm` is `g * c / n if n >= c else g`: with n = NaN no gradient changes.
    """

    def clip_all(limit: float) -> Clip:
        def clip(gradients: dict[int, Gradient]) -> dict[int, Gradient]:
            total = norm(gradients.values())
            if not total >= limit:
                return gradients
            return {i: g * limit / total for i, g in gradients.items()}

        return clip

    reference = Reference(
        variables,
        learning_rate=_decayed(lr, decay),
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
    )
    if clipnorm:
        reference.clips.append(clip_all(clipnorm))
        reference.clips_by_norm = True
    if clipvalue:
        reference.clips.append(clip_by_value(clipvalue))
    return reference


def reference_optimizer_v2(
    variables: Sequence[ArrayLike],
    *,
    learning_rate: float | Callable[[int], float] = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    decay: float = 0.0,
    clipvalue: float | None = None,
    clipnorm: float | None = None,
    global_clipnorm: float | None = None,
) -> Reference:
    """`tf.keras.optimizers.Adam` of TensorFlow 2.0 (`tf_keras` legacy): the value, then the norm of
    each variable, then the norm of all.
    """
    reference = Reference(
        variables,
        learning_rate=_decayed(learning_rate, decay),
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        amsgrad=amsgrad,
    )
    if clipvalue is not None:
        reference.clips.append(clip_by_value(clipvalue))
    if clipnorm is not None:
        reference.clips.append(clip_each_by_norm(clipnorm))
    if global_clipnorm is not None:
        reference.clips.append(clip_by_global_norm(global_clipnorm))
    reference.clips_by_norm = clipnorm is not None or global_clipnorm is not None
    return reference
