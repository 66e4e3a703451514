"""Learning rates that change with the step: the six schedules of Keras 3, and a base for your own.

A schedule is a function of the step. What it returns is of the kind of what it is given:

- an integer (Python's or NumPy's): a Python float, computed in double precision;
- a NumPy array of steps: a float64 array of the same shape, for plots;
- a tensor, traced or not: a tensor of its library's default floating type. No formula branches on
  the value of the step, so that `jax.jit`, `tf.function` and `torch.compile` trace them. float32
  holds every step up to 2**24 = 16.8 million; a later one counts as its nearest float32.

A negative step counts as step 0. Schedules do not change after construction: they compare equal
where class and config are equal, and a traced program cannot hold numbers that are out of date.

Source of all six: `keras/src/optimizers/schedules/learning_rate_schedule.py` of Keras 3.15. The
numbers are Keras's up to rounding, which differs where Keras's own makes a jump: here a stair or a
restart falls on its step, in float32 as well.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Protocol, Self, SupportsFloat, TypeAlias, overload

import numpy as np

from .backends import functions_of

__all__ = [
    "CosineDecay",
    "CosineDecayRestarts",
    "ExponentialDecay",
    "InverseTimeDecay",
    "LearningRate",
    "LearningRateSchedule",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "deserialize",
    "serialize",
]


def __dir__() -> list[str]:
    return __all__


class LearningRateSchedule(ABC):
    """Base of every schedule. Your own defines `__call__`, and `get_config` to be saved.

    Example:
        >>> class InverseSquareRoot(LearningRateSchedule):
        ...     def __init__(self, peak):
        ...         self.peak = peak
        ...     def __call__(self, step):
        ...         return self.peak / (step + 1) ** 0.5
        ...     def get_config(self):
        ...         return {"peak": self.peak}
        >>> InverseSquareRoot(0.1)(3)
        0.05
    """

    @abstractmethod
    def __call__(self, step: Any) -> Any:
        """Learning rate of the step (0, 1, 2, ...), which may be a traced tensor."""

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor by name, for JSON."""
        raise NotImplementedError(
            f"A schedule is saved by its config, which {type(self).__name__} does not give. "
            "Define get_config(self), returning the arguments of its constructor by name."
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Schedule whose `get_config()` this is."""
        return cls(**config)


class KerasSchedule(Protocol):
    """What type checkers know a schedule of Keras by."""

    def __call__(self, step: Any) -> Any:
        """Learning rate of the step."""

    def get_config(self) -> Any:
        """Arguments of the constructor by name."""


# What a learning rate may be: a number (of Python, or an array of one element), a schedule, or a
# callable without arguments, which is called at each step.
LearningRate: TypeAlias = (
    float | SupportsFloat | LearningRateSchedule | KerasSchedule | Callable[[], SupportsFloat]
)

# What a constructor checks. A check takes the argument's name and what was given, and returns what
# is kept: Python numbers, so that a config is JSON whatever the arguments were.
Check = Callable[[str, Any], Any]


def _finite(low: float, hint: str, *, above: bool = False) -> Check:
    """Check for a finite number >= `low`, or > `low` with `above`."""

    def check(name: str, value: Any) -> int | float:
        is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        is_number = is_whole or isinstance(value, float | np.floating)
        if is_number:
            number = int(value) if is_whole else float(value)
            if low <= number <= sys.float_info.max and not (above and number == low):
                return number
        raise (ValueError if is_number else TypeError)(
            f"{name} must be a finite number {'>' if above else '>='} {low:g}. "
            f"Received: {value!r}. {hint}"
        )

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _each(check: Check) -> Check:
    """Check for a list whose every element passes `check`; kept as a tuple."""

    def check_all(name: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise TypeError(
                f"{name} must be a list of numbers. Received: {value!r}. Give a list, in order."
            )
        return tuple(check(f"{name}[{i}]", element) for i, element in enumerate(value))

    return check_all


def _is(kind: type, hint: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}. Received: {value!r}. {hint}")
        return value

    return check


_rate = _finite(0, "Give a learning rate, such as 0.001.")
_RATE = {"check": _rate}
_OPTIONAL_RATE = {"check": _optional(_rate)}
_RATES = {"check": _each(_rate)}
_LENGTH = {"check": _finite(0, "Give a number of steps, such as 10000.", above=True)}
_STEPS = {"check": _finite(0, "Give a number of steps; 0 is the first step.")}
_BOUNDARIES = {"check": _each(_STEPS["check"])}
_FACTOR = {"check": _finite(0, "Give what the rate is multiplied by, such as 0.96.")}
_FRACTION = {"check": _finite(0, "Give a fraction of the learning rate, such as 0.01.")}
_POWER = {"check": _finite(0, "Give an exponent, such as 0.5; 1 is a straight line.")}
_GROWTH = {
    "check": _finite(1, "Give how many times as long each period is as the last, such as 2.")
}
_FLAG = {"check": _is(bool, "Give True or False.")}
_NAME = {"check": _optional(_is(str, "Give a name, or None."))}


@dataclass(frozen=True, eq=False)
class _Formula(LearningRateSchedule):
    """A schedule that is a formula of its fields, which are the arguments of its constructor."""

    def __post_init__(self) -> None:
        for each in fields(self):
            name = f"{type(self).__name__}: {each.name}"
            value = each.metadata["check"](name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)

    @overload
    def __call__(self, step: int) -> float: ...

    @overload
    def __call__(self, step: Any) -> Any: ...

    def __call__(self, step: Any) -> Any:
        """Learning rate of a step: a float for an integer, else an array of the step's library."""
        f = functions_of(step)
        with np.errstate(all="ignore"):
            rate = self._rate(f.maximum(f.asarray_float(step), 0.0), f)
        return float(rate) if isinstance(rate, float | np.ndarray) and not np.ndim(rate) else rate

    @abstractmethod
    def _rate(self, step: Any, f: Any) -> Any:
        """Learning rate of a step >= 0 of floating type, by the functions of the step's library."""

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor by name, for JSON."""
        config = {each.name: getattr(self, each.name) for each in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Formula) or type(other) is not type(self):
            return NotImplemented
        return self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, each.name) for each in fields(self))))


def _slack(step: Any, length: float, f: Any) -> Any:
    """How many steps short of a multiple of `length` still count as there: what rounding can lose.

    At most half a step, so that a boundary on a whole step is exact as long as the step is.
    """
    in_double = isinstance(step, float | np.ndarray)
    return f.minimum(step * (2.0**-48 if in_double else 2.0**-20), min(length, 1.0) / 2)


def _divide(step: Any, length: float, f: Any) -> tuple[Any, Any]:
    """Whole lengths in `step`, and the steps left over: 0 to length, short of 0 by the slack.

    The floor of a quotient may be one off in either direction: XLA, for one, multiplies by the
    reciprocal of a constant, and 41 * (1 / 41) is less than 1 in float32.
    """
    slack = _slack(step, length, f)
    count = f.floor(step / length)
    left = step - count * length
    count = f.where(left >= length - slack, count + 1.0, count)
    count = f.where(left < -slack, count - 1.0, count)
    return count, step - count * length


def _power(base: Any, exponent: Any) -> Any:
    """A power of what is not negative; infinity where it is too large, of Python's floats too."""
    try:
        return base**exponent
    except OverflowError:
        return math.inf


def _half_cosine(fraction: Any, f: Any) -> Any:
    """From 1 at `fraction` 0 down to 0 at 1."""
    return 0.5 * (1.0 + f.cos(math.pi * fraction))


@dataclass(frozen=True, eq=False)
class ExponentialDecay(_Formula):
    """Multiplies the rate by `decay_rate` every `decay_steps` steps, gradually or in stairs.

        rate = initial_learning_rate * decay_rate ** (step / decay_steps)

    Args:
        initial_learning_rate: rate of step 0, a number >= 0.
        decay_steps: steps in which the rate decays once, a number > 0.
        decay_rate: factor of one decay, a number >= 0.
        staircase: whether step / decay_steps is rounded down.
        name: kept in the config; nothing else uses it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of its range or not finite.

    Example:
        >>> schedule = ExponentialDecay(0.1, decay_steps=1000, decay_rate=0.5)
        >>> schedule(0), schedule(1000), schedule(2000)
        (0.1, 0.05, 0.025)
    """

    initial_learning_rate: float = field(metadata=_RATE)
    decay_steps: float = field(metadata=_LENGTH)
    decay_rate: float = field(metadata=_FACTOR)
    staircase: bool = field(default=False, metadata=_FLAG)
    name: str | None = field(default="ExponentialDecay", metadata=_NAME)

    def _rate(self, step: Any, f: Any) -> Any:
        length = float(self.decay_steps)
        decays = _divide(step, length, f)[0] if self.staircase else step / length
        return self.initial_learning_rate * _power(self.decay_rate, decays)


@dataclass(frozen=True, eq=False)
class PiecewiseConstantDecay(_Formula):
    """Holds `values[i]` up to and including step `boundaries[i]`, and the last value after all.

        rate = values[0]    where                 step <= boundaries[0]
        rate = values[i]    where boundaries[i-1] < step <= boundaries[i]
        rate = values[-1]   where boundaries[-1]  < step

    Args:
        boundaries: last step of each value but the last, numbers >= 0, strictly increasing.
        values: rates, numbers >= 0, one more than boundaries.
        name: kept in the config; nothing else uses it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of its range or not finite, boundaries are empty or not
            strictly increasing, or values are not one more.

    Example:
        >>> schedule = PiecewiseConstantDecay(boundaries=[1000, 2000], values=[1.0, 0.5, 0.1])
        >>> schedule(1000), schedule(1001), schedule(2001)
        (1.0, 0.5, 0.1)
    """

    boundaries: Sequence[float] = field(metadata=_BOUNDARIES)
    values: Sequence[float] = field(metadata=_RATES)
    name: str | None = field(default="PiecewiseConstant", metadata=_NAME)

    def __post_init__(self) -> None:
        super().__post_init__()
        who, given = type(self).__name__, f"Received: boundaries={list(self.boundaries)}"
        if not self.boundaries:
            raise ValueError(
                f"{who}: boundaries must hold at least one step. {given}. "
                "For a constant rate, give the number itself to the optimizer."
            )
        if any(b <= a for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(
                f"{who}: boundaries must be strictly increasing. {given}. "
                "Sort them together with their values, and drop repeats."
            )
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{who}: values must be one more than boundaries. {given} ({len(self.boundaries)}) "
                f"and values={list(self.values)} ({len(self.values)}). "
                "Give one value before the first boundary and one after each."
            )

    def _rate(self, step: Any, f: Any) -> Any:
        rate: Any = float(self.values[-1])
        for boundary, value in zip(self.boundaries[::-1], self.values[-2::-1], strict=True):
            rate = f.where(step <= float(boundary), float(value), rate)
        return rate


@dataclass(frozen=True, eq=False)
class PolynomialDecay(_Formula):
    """Goes from `initial_learning_rate` to `end_learning_rate` in `decay_steps`, and stays there.

        left = (end - min(step, end)) / end                 where end = decay_steps
        rate = (initial_learning_rate - end_learning_rate) * left**power + end_learning_rate

    With `cycle`, end = decay_steps * max(1, ceil(step / decay_steps)): at each multiple of
    decay_steps the end rate is reached, and the decay to the next multiple starts over, from
    where a decay of that length would be by then.

    Args:
        initial_learning_rate: rate of step 0, a number >= 0.
        decay_steps: steps until the end rate, a number > 0.
        end_learning_rate: rate at the end, a number >= 0.
        power: exponent, a number >= 0; 1 is a straight line.
        cycle: whether the decay starts over at the end.
        name: kept in the config; nothing else uses it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of its range or not finite.

    Example:
        >>> schedule = PolynomialDecay(0.5, decay_steps=1000, end_learning_rate=0.0, power=2.0)
        >>> schedule(0), schedule(500), schedule(1000), schedule(1001)
        (0.5, 0.125, 0.0, 0.0)
    """

    initial_learning_rate: float = field(metadata=_RATE)
    decay_steps: float = field(metadata=_LENGTH)
    end_learning_rate: float = field(default=0.0001, metadata=_RATE)
    power: float = field(default=1.0, metadata=_POWER)
    cycle: bool = field(default=False, metadata=_FLAG)
    name: str | None = field(default="PolynomialDecay", metadata=_NAME)

    def _rate(self, step: Any, f: Any) -> Any:
        end: Any = float(self.decay_steps)
        if self.cycle:
            count, over = _divide(step, end, f)
            count = f.where(over > _slack(step, end, f), count + 1.0, count)
            end = end * f.maximum(count, 1.0)
        left = f.maximum(end - step, 0.0) / end  # not 1 - step / end, so that it ends at 0 exactly
        drop = self.initial_learning_rate - self.end_learning_rate
        return drop * _power(left, self.power) + self.end_learning_rate


@dataclass(frozen=True, eq=False)
class InverseTimeDecay(_Formula):
    """Divides the rate by a number that grows by `decay_rate` every `decay_steps` steps.

        rate = initial_learning_rate / (1 + decay_rate * step / decay_steps)

    Args:
        initial_learning_rate: rate of step 0, a number >= 0.
        decay_steps: steps in which the divisor grows once, a number > 0.
        decay_rate: growth of the divisor, a number >= 0.
        staircase: whether step / decay_steps is rounded down.
        name: kept in the config; nothing else uses it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of its range or not finite.

    Example:
        >>> schedule = InverseTimeDecay(0.1, decay_steps=1000, decay_rate=1.0)
        >>> schedule(0), schedule(1000), schedule(3000)
        (0.1, 0.05, 0.025)
    """

    initial_learning_rate: float = field(metadata=_RATE)
    decay_steps: float = field(metadata=_LENGTH)
    decay_rate: float = field(metadata=_FACTOR)
    staircase: bool = field(default=False, metadata=_FLAG)
    name: str | None = field(default="InverseTimeDecay", metadata=_NAME)

    def _rate(self, step: Any, f: Any) -> Any:
        length = float(self.decay_steps)
        decays = _divide(step, length, f)[0] if self.staircase else step / length
        return self.initial_learning_rate / (1.0 + self.decay_rate * decays)


@dataclass(frozen=True, eq=False)
class CosineDecay(_Formula):
    """Falls along half a cosine from its peak to `alpha` times its peak, after a linear warmup.

        peak = initial_learning_rate where warmup_target is None (no warmup), else warmup_target
        rate = initial_learning_rate + (peak - initial_learning_rate) * step / warmup_steps
                                                                where step < warmup_steps
        done = min((step - warmup_steps) / decay_steps, 1)
        rate = peak * (alpha + (1 - alpha) * (1 + cos(pi * done)) / 2)     from there on

    Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983 (the cosine); Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677 (the warmup).

    Args:
        initial_learning_rate: rate of step 0, a number >= 0.
        decay_steps: steps of the decay, after those of the warmup, a number > 0.
        alpha: last rate as a fraction of the peak, a number >= 0.
        name: kept in the config; nothing else uses it.
        warmup_target: rate at the end of the warmup, a number >= 0; None for no warmup.
        warmup_steps: steps of the warmup, a number >= 0; without a warmup_target it is ignored.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of its range or not finite.

    Example:
        >>> schedule = CosineDecay(0.0, decay_steps=1000, warmup_target=0.1, warmup_steps=100)
        >>> [round(schedule(step), 6) for step in (0, 50, 100, 600, 1100)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """

    initial_learning_rate: float = field(metadata=_RATE)
    decay_steps: float = field(metadata=_LENGTH)
    alpha: float = field(default=0.0, metadata=_FRACTION)
    name: str | None = field(default="CosineDecay", metadata=_NAME)
    warmup_target: float | None = field(default=None, metadata=_OPTIONAL_RATE)
    warmup_steps: float = field(default=0, metadata=_STEPS)

    def _rate(self, step: Any, f: Any) -> Any:
        start, length = self.initial_learning_rate, float(self.decay_steps)
        peak, warmup = start, 0.0
        if self.warmup_target is not None:
            peak, warmup = self.warmup_target, float(self.warmup_steps)
        done = f.minimum(f.maximum(step - warmup, 0.0), length) / length
        rate = peak * ((1.0 - self.alpha) * _half_cosine(done, f) + self.alpha)
        if not warmup:
            return rate
        return f.where(step < warmup, start + (peak - start) * (step / warmup), rate)


@lru_cache
def _periods(first: float, growth: float) -> tuple[tuple[float, float, float], ...]:
    """Runs of ..., 8, 4, 2, 1 periods, from the longest that is over within 2**63 steps.

    A run is (periods, their length together, length of the next period), the lengths in units of
    its first period.
    """
    runs, run = [], (1.0, 1.0, growth)
    while first * run[1] < 2.0**63:
        runs.append(run)
        count, total, after = run
        run = (2.0 * count, total + after * total, after * after)
    return tuple(reversed(runs))


@dataclass(frozen=True, eq=False)
class CosineDecayRestarts(_Formula):
    """Falls along half a cosine, then restarts, each time `t_mul` times as long, `m_mul` as high.

        k     = restarts so far; period k is first_decay_steps * t_mul**k steps long
        begin = first_decay_steps * (t_mul**k - 1) / (t_mul - 1), or first_decay_steps * k if t_mul
                is 1: the step where period k begins
        done  = (step - begin) / (first_decay_steps * t_mul**k)
        rate  = initial_learning_rate * (alpha + (1 - alpha) * m_mul**k * (1 + cos(pi * done)) / 2)

    SGDR, Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983, equation 5.

    Args:
        initial_learning_rate: rate of step 0, a number >= 0.
        first_decay_steps: steps of the first period, a number > 0.
        t_mul: length of a period over that of the period before, a number >= 1.
        m_mul: height of a restart over that of the restart before, a number >= 0.
        alpha: floor of the rate as a fraction of initial_learning_rate, a number >= 0.
        name: kept in the config; nothing else uses it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of its range or not finite. t_mul < 1 is refused: such periods
            are over after first_decay_steps / (1 - t_mul) steps, and Keras returns NaN from there.

    Example:
        >>> schedule = CosineDecayRestarts(0.1, first_decay_steps=100, t_mul=2.0, m_mul=0.5)
        >>> [round(schedule(step), 6) for step in (0, 50, 100, 200, 299, 300)]
        [0.1, 0.05, 0.05, 0.025, 3e-06, 0.025]
    """

    initial_learning_rate: float = field(metadata=_RATE)
    first_decay_steps: float = field(metadata=_LENGTH)
    t_mul: float = field(default=2.0, metadata=_GROWTH)
    m_mul: float = field(default=1.0, metadata=_FACTOR)
    alpha: float = field(default=0.0, metadata=_FRACTION)
    name: str | None = field(default="SGDRDecay", metadata=_NAME)

    def _rate(self, step: Any, f: Any) -> Any:
        restarts, done = self._period(step, f)
        height = _power(self.m_mul, restarts)
        return self.initial_learning_rate * (
            (1.0 - self.alpha) * height * _half_cosine(done, f) + self.alpha
        )

    def _period(self, step: Any, f: Any) -> tuple[Any, Any]:
        """Restarts before `step`, and how much of the current period is done, 0 to 1.

        With t_mul > 1 the restarts are counted in binary: a logarithm would be a formula for them,
        but its rounding misses restarts (Keras, in float32: 32767 with first_decay_steps=1).
        Sums and products of whole numbers are exact.
        """
        first = float(self.first_decay_steps)
        if self.t_mul == 1:
            restarts, left = _divide(step, first, f)
            return restarts, left / first
        slack = _slack(step, first, f)
        zero = step * 0.0
        restarts, left, length = zero, step, zero + first
        for count, total, after in _periods(first, float(self.t_mul)):
            over = left >= length * total - slack
            restarts = f.where(over, restarts + count, restarts)
            left = f.where(over, left - length * total, left)
            length = f.where(over, length * after, length)
        return restarts, left / length


_SCHEDULES: dict[str, type[_Formula]] = {
    each.__name__: each
    for each in (
        ExponentialDecay,
        PiecewiseConstantDecay,
        PolynomialDecay,
        InverseTimeDecay,
        CosineDecay,
        CosineDecayRestarts,
    )
}
_KERAS = "keras.optimizers.schedules"


def serialize(schedule: Any) -> dict[str, Any]:
    """Schedule as a dictionary for JSON, in Keras's form; `deserialize` is the inverse.

    Args:
        schedule: a schedule of ours, of yours or of Keras: anything with `get_config`.

    Raises:
        TypeError: it has no `get_config`.
        NotImplementedError: it is your own and does not define `get_config`.

    Example:
        >>> serialize(PiecewiseConstantDecay([10], [0.1, 0.01]))["config"]
        {'boundaries': [10], 'values': [0.1, 0.01], 'name': 'PiecewiseConstant'}
    """
    kind = type(schedule)
    if isinstance(schedule, type) or not hasattr(schedule, "get_config"):
        raise TypeError(
            f"A schedule to serialize must have get_config(). Received: {schedule!r}. "
            "Give a LearningRateSchedule object."
        )
    module, name = kind.__module__, kind.__name__
    if module.split(".")[0] in ("keras", "tf_keras"):
        module = _KERAS
    known = name in _SCHEDULES and module in (__name__, _KERAS)
    return {
        "module": _KERAS if known else module,  # which Keras, too, makes its own of that name
        "class_name": name,
        "config": schedule.get_config(),
        "registered_name": None if known else name,
    }


def traceable(schedule: Any) -> Any:
    """Ours for a schedule of Keras, whose own is traced only by the library Keras runs on."""
    kind = type(schedule)
    is_keras = kind.__module__.split(".")[0] in ("keras", "tf_keras")
    if not is_keras or kind.__name__ not in _SCHEDULES:
        return schedule
    return _SCHEDULES[kind.__name__].from_config(schedule.get_config())


def deserialize(
    config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
) -> LearningRateSchedule:
    """Schedule from its dictionary, whether `serialize` made it or Keras did.

    Args:
        config: has at least `class_name` and `config`. A schedule of Keras becomes ours of the
            same name.
        custom_objects: your own classes by name. They come before ours.

    Raises:
        TypeError: config is no dictionary.
        ValueError: a key is missing, or the class is not known.

    Example:
        >>> schedule = CosineDecay(0.1, 1000)
        >>> deserialize(serialize(schedule)) == schedule
        True
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"A serialized schedule must be a dictionary. Received: {config!r}. "
            "Give what serialize() returned."
        )
    if not isinstance(config.get("config"), Mapping) or "class_name" not in config:
        raise ValueError(
            "A serialized schedule must have a 'class_name' and a 'config', a dictionary of the "
            f"arguments. Received: {dict(config)!r}. Give what serialize() returned."
        )
    name, module = config["class_name"], config.get("module", __name__)
    custom = custom_objects or {}
    kind: Any = custom.get(config.get("registered_name") or name) or custom.get(name)
    if kind is None and module in (__name__, _KERAS):
        kind = _SCHEDULES.get(name)
    if kind is None:
        raise ValueError(
            f"The class of a serialized schedule must be known. Received: {name!r} of module "
            f"{module!r}; known are {', '.join(sorted([*_SCHEDULES, *custom]))}. "
            f"Give your own class as custom_objects={{{name!r}: {name}}}."
        )
    schedule: LearningRateSchedule = kind.from_config(config["config"])
    return schedule


def is_schedule(value: Any) -> bool:
    """Whether it is a schedule, of ours or of Keras, which is not imported to find out."""
    return any(base.__name__ == "LearningRateSchedule" for base in type(value).__mro__)
