"""The one table of settings, the variables and gradients to run them on, and the one tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np

from reference import Array, Reference

# --- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InverseTime:
    """The schedule of the table, as the oracle calls it; libraries build their own from it."""

    initial_learning_rate: float
    decay_steps: int
    decay_rate: float

    def __call__(self, calls: int) -> float:
        return self.initial_learning_rate / (1 + self.decay_rate * calls / self.decay_steps)


class Case(NamedTuple):
    """Constructor arguments, and the indices of the variables to exclude from weight decay."""

    settings: Mapping[str, Any]
    excluded: frozenset[int] = frozenset()

    def reference(self, variables: Sequence[Any], **settings: Any) -> Reference:
        """The oracle in this setting; more settings (epsilon_hat, dtype) go on top."""
        return Reference(variables, excluded=self.excluded, **{**self.settings, **settings})

    def settings_for(self, schedules: Any) -> dict[str, Any]:
        """The arguments with the schedule from `schedules`, a module like Keras's."""
        settings = dict(self.settings)
        rate = settings.get("learning_rate")
        if isinstance(rate, InverseTime):
            settings["learning_rate"] = schedules.InverseTimeDecay(
                rate.initial_learning_rate, rate.decay_steps, rate.decay_rate
            )
        return settings


# Each argument alone, at a value where it shows within STEPS steps (test_reference.py proves that
# it does, alone and in every pair). The thresholds are exact in every dtype, so that it is never
# the rounding of a threshold that a comparison sees.
_SINGLES: dict[str, Case] = {
    "learning_rate": Case({"learning_rate": 0.02}),
    "schedule": Case({"learning_rate": InverseTime(0.01, 4, 0.5)}),
    "beta_1": Case({"beta_1": 0.8}),
    "beta_2": Case({"beta_2": 0.95}),
    "epsilon": Case({"epsilon": 0.01}),
    "amsgrad": Case({"amsgrad": True}),
    "weight_decay": Case({"weight_decay": 0.5}),
    "excluded": Case({"weight_decay": 0.5}, frozenset({2, 4})),
    "clipnorm": Case({"clipnorm": 1.5}),
    "clipvalue": Case({"clipvalue": 0.125}),
    "global_clipnorm": Case({"global_clipnorm": 2.0}),
    "use_ema": Case({"use_ema": True}),
    "ema_momentum": Case({"use_ema": True, "ema_momentum": 0.75}),
    "ema_overwrite_frequency": Case({"use_ema": True, "ema_overwrite_frequency": 3}),
    "loss_scale_factor": Case({"loss_scale_factor": 20.0}),
    "gradient_accumulation_steps": Case({"gradient_accumulation_steps": 3}),
}
_CLIPS = {"clipnorm", "clipvalue", "global_clipnorm"}
_TRIPLES = [
    # The schedule sees calls, the bias correction iterations.
    ("schedule", "weight_decay", "gradient_accumulation_steps"),
    # Overwritten on micro-steps too: iterations + 1 is a multiple for n calls in a row.
    ("ema_momentum", "ema_overwrite_frequency", "gradient_accumulation_steps"),
    # Unscale, then add, then clip the mean: any other order shows.
    ("loss_scale_factor", "global_clipnorm", "gradient_accumulation_steps"),
    ("loss_scale_factor", "clipvalue", "gradient_accumulation_steps"),
    # Every slot at once, and the decay between clip and update.
    ("amsgrad", "excluded", "clipnorm", "ema_overwrite_frequency", "gradient_accumulation_steps"),
    (
        *("schedule", "beta_1", "beta_2", "epsilon", "amsgrad", "excluded", "global_clipnorm"),
        *("ema_momentum", "ema_overwrite_frequency", "loss_scale_factor"),
        "gradient_accumulation_steps",
    ),
]


def combined(names: Sequence[str]) -> Case | None:
    """All of these together, or None where two of them want the same argument."""
    settings: dict[str, Any] = {}
    for name in names:
        for key, value in _SINGLES[name].settings.items():
            if settings.setdefault(key, value) != value:
                return None
    if len(_CLIPS & settings.keys()) > 1:
        return None
    return Case(settings, frozenset().union(*(_SINGLES[name].excluded for name in names)))


def _table() -> dict[str, Case]:
    table = {"defaults": Case({})} | _SINGLES
    for names in [*combinations(_SINGLES, 2), *_TRIPLES]:
        case = combined(names)
        if case is not None and case not in table.values():
            table["+".join(names)] = case
    return table


CASES: dict[str, Case] = _table()

# In full the table is for the rule itself, on NumPy. The kernels, of which each takes seconds to
# compile, and each other library run a part of it in which every two settings still meet, as do
# each one and the lack of each other: a few rows at once.
_FACTORS = [
    *(["learning_rate", "schedule"], ["beta_1"], ["beta_2"], ["epsilon"], ["amsgrad"]),
    *(["weight_decay", "excluded"], sorted(_CLIPS), ["loss_scale_factor"]),
    *(["use_ema", "ema_momentum", "ema_overwrite_frequency"], ["gradient_accumulation_steps"]),
]


def _rows() -> Iterator[list[str]]:
    """Greedily: each row has a pair that no row had before, and as many more as it can."""
    levels = [["", *names] for names in _FACTORS]
    missing = {
        pair
        for (i, ones), (j, others) in combinations(enumerate(levels), 2)
        for pair in product([(i, one) for one in ones], [(j, other) for other in others])
    }
    while missing:
        row = dict(min(missing))
        for i in sorted(set(range(len(levels))) - row.keys()):
            met = [
                (sum(tuple(sorted([(i, level), other])) in missing for other in row.items()), level)
                for level in levels[i]
            ]
            row[i] = max(met)[1]
        missing -= set(combinations(sorted(row.items()), 2))
        yield [row[i] for i in sorted(row) if row[i]]


def _part() -> dict[str, Case]:
    part = {name: case for name, case in CASES.items() if name.count("+") > 1}
    part["defaults"] = CASES["defaults"]
    for names in _rows():
        case = combined(names)
        assert case is not None
        if case not in part.values():
            part["+".join(names)] = case
    return part


PART: dict[str, Case] = _part()
SINGLE: dict[str, Case] = {name: CASES[name] for name in _SINGLES}
# Each setting once, and all that go together at once.
WHOLE: dict[str, Case] = {
    "+".join(names): case
    for names in ([factor[i % len(factor)] for factor in _FACTORS] for i in range(3))
    if (case := combined(names))
}

# What Keras 3.15 raises on, the callables against its own documentation; betas below one half,
# with which it loses a small gradient beside a large old value; PyTorch's epsilon, which it has
# not: only the oracle compares.
BEYOND_KERAS: dict[str, Case] = {
    "callable_beta_1": Case({"beta_1": lambda: 0.8}),
    "callable_beta_2": Case({"beta_2": lambda: 0.95}),
    "callable_epsilon": Case({"epsilon": lambda: 0.01}),
    "integer_learning_rate": Case({"learning_rate": 1}),
    "no_memory": Case({"beta_1": 0.0, "beta_2": 0.0}),
    "short_beta_1": Case({"beta_1": 0.25}),
    "short_beta_2": Case({"beta_2": 0.375, "amsgrad": True}),
    "algorithm_1": Case({"epsilon_hat": False, "epsilon": 0.01}),
}

# --- Variables and gradients ---------------------------------------------------------------------

STEPS = 20
SMALL_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (3, 5), (2, 3, 4), (0, 3))
# The last one is more than one chunk of any kernel, and no multiple of a vector's width.
SHAPES: tuple[tuple[int, ...], ...] = (*SMALL_SHAPES, (8_209,))


def _rounded(values: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        import ml_dtypes  # comes with JAX and TensorFlow; NumPy itself has no bfloat16

        return np.asarray(values, ml_dtypes.bfloat16)
    return np.asarray(values, dtype)


def _log_uniform(
    rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float
) -> Array:
    """10**low to 10**high, of either sign, one in ten exactly zero."""
    sign = np.sign(rng.random(shape) - 0.5)
    values = sign * 10.0 ** rng.uniform(low, high, shape)
    return np.where(rng.random(shape) < 0.1, 0.0, values)


def variables(
    dtype: str = "float32", seed: int = 0, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Array]:
    """Values from 1e-3 to 1 and zeros: where |w| is small, the store of w hides no error."""
    rng = np.random.default_rng([seed, 1_000_000])
    return [_rounded(_log_uniform(rng, shape, -3, 0), dtype) for shape in shapes]


def gradients(
    step: int,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seed: int = 0,
    dtype: str = "float32",
) -> list[Array]:
    """The gradients of call `step` (0, 1, ...): from 1e-4 to 100, with zeros.

    Three elements of each larger variable are the hard ones: never a gradient (nothing may move:
    v = 0), alternating signs (m cancels), always the same (roundings all go one way).
    """
    rng = np.random.default_rng([seed, step])
    result = []
    for shape in shapes:
        g = _log_uniform(rng, shape, -4, 2)
        if g.size >= 7:
            g.flat[:3] = 0.0, 3.0 * (-1) ** step, 0.1
        result.append(_rounded(g, dtype))
    return result


def with_missing(step: int, grads: Sequence[Array]) -> list[Array | None]:
    """The same, but each variable goes without a gradient on one call in four."""
    return [None if (step + i) % 4 == 0 else g for i, g in enumerate(grads)]


def sparse_gradient(
    step: int, shape: tuple[int, ...], seed: int = 0, dtype: str = "float32"
) -> tuple[Array, Array]:
    """(indices, values) with as many entries as `shape` has rows: ids repeat, some never come."""
    rng = np.random.default_rng([seed, step, 7])
    count = shape[0]
    indices = rng.integers(0, (count + 1) // 2, count) if count else np.zeros(0, np.int64)
    return indices, _rounded(_log_uniform(rng, (count, *shape[1:]), -4, 2), dtype)


# --- The tolerance -------------------------------------------------------------------------------
#
# How far may a correct implementation be from the oracle? As far as its own roundings take it.
# Every rounding moves a result by at most half an ulp: eps / 2 of it. There are two kinds.
#
# Stores of w. Each rounds to the variable's dtype, by up to eps(dtype) / 2 * |w|. They may all go
# one way (a constant update smaller than half an ulp never moves w), so they add up without any
# square root: eps(dtype) / 2 * `stores`, where the oracle has summed |w| over the stores: one a
# step, one more with weight decay (a fused kernel makes one; others two), and for an average what
# the EMA mixes. It is allowed before anything is called an error. After many steps in a 16-bit
# dtype it is a large part of w: there, check step by step (`Reference.resync`).
#
# Roundings of the update, of the arithmetic's dtype: float32 for 16-bit variables. Counted in
# `tolerance`, each at most half an ulp of the oracle's `sizes`: what the sum would be if nothing
# cancelled. m = 0.9 m + 0.1 g may come out near zero; its error does not.
#
#   1.5 a step   Each of m and v is rounded as it is stored, and adds (g - m) * (1 - beta): its own
#                roundings and coefficient weigh 2 (1 - beta) <= 0.4 more on an old m. Worst case:
#                one large gradient, then small ones. No square root here either.
#   28 in all    m: subtract, multiply, 1 - beta_1                                             3
#                v: square, subtract, multiply, 1 - beta_2; the square root halves them        2
#                alpha_t: 1 when rounded from double; where t is traced in float32,
#                   log(beta) * t (2) through expm1 (4) twice, sqrt, two products             12
#                alpha_t * m, + epsilon, epsilon itself                                        3
#                sqrt, divide: a GPU's approximations are good to 1 and 2 ulp                  6
#                loss of weight: w * weight_decay * rate                                       2
#   gradient     loss scale 2; accumulation 1 a micro-step and 1 for the mean; clip by norm 3 and 32
#                for the norm: pairwise or in lanes, float32 sums of 200,000 squares came out within
#                2 of the sum (JAX, PyTorch); in a single lane 20,000 random roundings make about
#                sqrt(20,000 / 3) / 2 = 40, halved by the square root. Twice, as v squares it.
#
# In float64 the oracle's own roundings are as large: everything counts twice. And 1 - beta_2**t in
# plain double (PyTorch, Keras, optax) costs up to 1 / (2 (1 - beta_2**2)) = 250 roundings at t = 2,
# halved by the square root, less later: 256 more, or 6e-14. In float32 that is nothing.
#
# A bug is far outside: float32(0.999) for 0.999 makes 1 - beta_2 wrong by 1.3e-5, in v at 20 steps
# more than 200 roundings above the 58 allowed. test_reference.py proves both: honest arithmetic
# passes every case in every dtype, and one coefficient wrong by 2e-5 fails.


class Format(NamedTuple):
    eps: float
    smallest: float  # below it, results may be flushed to zero; in float16, they lose digits


FORMATS = {
    "float64": Format(2.0**-52, 2.0**-1022),
    "float32": Format(2.0**-23, 2.0**-126),
    "float16": Format(2.0**-10, 2.0**-24),
    "bfloat16": Format(2.0**-7, 2.0**-126),
}


def tolerance(reference: Reference, dtype: str = "float32") -> float:
    """The ulps that `error_in_ulps` may return: half of the roundings counted above."""
    on_gradient = 0
    if reference.loss_scale_factor is not None:
        on_gradient += 2
    if reference.gradient_accumulation_steps:
        on_gradient += reference.gradient_accumulation_steps + 1
    if reference.clips_by_norm:
        on_gradient += 3 + 32
    roundings = 1.5 * reference.calls + 28 + 2 * on_gradient
    return roundings + 256 if dtype == "float64" else roundings / 2


def error_in_ulps(
    got: Any,
    reference: Reference,
    index: int,
    slot: str = "variable",
    dtype: str = "float32",
) -> Array:
    """How far `got` is from the oracle, per element, in ulps of the update.

    got     the variable `index`, or its slot under Keras's name ("momentum", "velocity", ...)
    dtype   of the variable; the arithmetic is float32, or float64 for float64
    returns what exceeds the stores of w, in units of eps(arithmetic) * (size of the update);
            0 where both are the same NaN or infinity, inf where only one is or nothing may move
    """
    want = reference.state[slot][index]
    got = np.asarray(got, np.float64)
    if got.shape != want.shape:
        raise AssertionError(f"{slot} {index}: shape {got.shape}, expected {want.shape}")
    arithmetic = FORMATS["float64" if dtype == "float64" else "float32"]
    stored = FORMATS[dtype] if slot in reference.stores else arithmetic
    sides = 2 if dtype == "float64" else 1
    allowed = np.full(want.shape, (reference.calls + 1) * stored.smallest)
    if slot in reference.stores:
        allowed += sides * stored.eps / 2 * reference.stores[slot][index]
    with np.errstate(all="ignore"):
        error = np.abs(got - want) - allowed
        ulps = np.where(error > 0, error / (arithmetic.eps * reference.sizes[slot][index]), 0.0)
        unlike = ~(np.isfinite(got) & np.isfinite(want))
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        return np.where(unlike, np.where(same, 0.0, np.inf), ulps)


def assert_close(
    got: Sequence[Any], reference: Reference, slot: str = "variable", dtype: str = "float32"
) -> None:
    """All variables, or all of one slot, within the tolerance; the message names the worst."""
    limit = tolerance(reference, dtype)
    assert len(got) == len(reference.variables), f"{len(got)} x {slot}"
    for index, value in enumerate(got):
        error = error_in_ulps(value, reference, index, slot, dtype)
        worst = float(np.max(error, initial=0.0))
        if not worst <= limit:
            where = tuple(int(n) for n in np.unravel_index(error.argmax(), error.shape))
            want = reference.state[slot][index][where]
            raise AssertionError(
                f"{slot} {index} at {where} after {reference.calls} calls: {worst:.3g} ulps of the "
                f"update, allowed {limit:.3g}; got {np.asarray(value, np.float64)[where]!r}, "
                f"expected {want!r}"
            )
