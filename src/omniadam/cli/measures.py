"""What `omniadam inspect` and `omniadam diff` find out of tensors, one or two of which are read at
a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from omniadam.saving.snapshot import SLOTS, Snapshot, Tensor, Variable

Array = npt.NDArray[Any]
# Elements that are in double precision at once.
_PART = 1 << 18


class Place(NamedTuple):
    """A tensor of a state, by what it is kept for."""

    tensor: str
    variable: str | None = None
    slot: str | None = None


def places(snapshot: Snapshot) -> list[Place]:
    """Of all tensors: of variables in the optimizer's order, then of the others by name."""
    found = [
        Place(variable.slots[word], variable.name, word)
        for variable in snapshot.variables
        for word in _sorted(variable.slots)
    ]
    known = {place.tensor for place in found}
    return found + [Place(name) for name in sorted(snapshot.tensors.keys() - known)]


def _sorted(slots: Mapping[str, str]) -> list[str]:
    usual = [word for word in SLOTS if word in slots]
    return usual + sorted(slots.keys() - set(usual))


def size(tensor: Tensor) -> int:
    """Its bytes."""
    width = 2 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).itemsize
    return math.prod(tensor.shape) * width


# --- of one tensor ---


class Measures(NamedTuple):
    """What is known of the values of a tensor. As IEEE has it: with a NaN in it, NaN."""

    norm: float  # Euclidean, neither overflows nor underflows
    largest: float  # of the absolute values; 0 where there are none
    non_finite: int
    zeros: float  # their share; NaN where there are no elements


def measured(value: Array) -> Measures:
    """Of a tensor of any type."""
    with np.errstate(all="ignore"):
        return _measured(value)


def _measured(value: Array) -> Measures:
    largest, non_finite, zeros = 0.0, 0, 0
    for part in _parts(value):
        largest = max(largest, float(np.abs(part).max()), key=_order)
        non_finite += int(np.count_nonzero(~np.isfinite(part)))
        zeros += int(np.count_nonzero(part == 0))
    share = zeros / value.size if value.size else math.nan
    if not math.isfinite(largest):
        return Measures(largest, largest, non_finite, share)
    exponent = math.frexp(largest)[1]
    squares = sum(_square(np.abs(_divided(part, exponent))) for part in _parts(value))
    return Measures(_multiplied(math.sqrt(squares), exponent), largest, non_finite, share)


def _parts(value: Array) -> Iterator[Array]:
    """In double precision, some elements at a time."""
    flat = value.reshape(-1)
    for i in range(0, flat.size, _PART):
        part = flat[i : i + _PART]
        yield part.astype(np.complex128 if part.dtype.kind == "c" else np.float64)


def _order(value: float) -> float:
    """For `max`: NaN is above infinity."""
    return math.inf if math.isnan(value) else min(value, sys.float_info.max)


def _square(part: Array) -> float:
    return float(np.square(part).sum())


def _divided(part: Array, exponent: int) -> Array:
    """By a power of two, after which no square overflows: exactly, but for what is nothing then."""
    half = -exponent // 2  # the power itself may be no double
    return part * 2.0**half * 2.0 ** (-exponent - half)


def _multiplied(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:  # a norm that no double can hold
        return math.inf


# --- of two ---


class Pair(NamedTuple):
    """A tensor of one state and its like in another; None where it has none."""

    place: Place
    ours: Tensor | None
    theirs: Tensor | None


class Difference(NamedTuple):
    """How a tensor of one state differs from its like."""

    pair: Pair
    # Norm of the difference over the larger of the two norms; infinite where one has NaN or
    # infinity and the other has not, and NaN where nothing can be compared.
    relative: float
    largest: float  # absolute difference of two elements
    elements: int  # that differ

    @property
    def problem(self) -> str:
        """Why there is nothing to compare, or what else differs than values; empty if nothing."""
        _, ours, theirs = self.pair
        if ours is None or theirs is None:
            return "missing"
        if ours.shape != theirs.shape:
            return "shape"
        return "" if ours.dtype == theirs.dtype else "dtype"

    def __bool__(self) -> bool:
        return self.elements > 0 or self.problem != ""

    @property
    def order(self) -> tuple[float, str]:
        """The largest first."""
        relative = math.inf if math.isnan(self.relative) else self.relative
        return -relative, self.pair.place.tensor


def partners(
    ours: Snapshot, theirs: Snapshot, by: str
) -> list[tuple[Variable | None, Variable | None]]:
    """Variables of two states that are the same ones; None where one lacks."""
    if by == "position":
        return list(zip_longest(ours.variables, theirs.variables))
    others = {variable.name: variable for variable in theirs.variables}
    found = [(variable, others.pop(variable.name, None)) for variable in ours.variables]
    return [*found, *((None, variable) for variable in others.values())]


def pairs(ours: Snapshot, theirs: Snapshot, by: str) -> list[Pair]:
    """Tensors of two states that are to be compared.

    Args:
        ours: one state.
        theirs: the other.
        by: "name"; or "position": the first variable with the first, whatever they are called.
    """
    found = []
    for pair in partners(ours, theirs, by):
        sides = [{} if each is None else dict(each.slots) for each in pair]
        shown = next(each for each in pair if each is not None)
        for word in _sorted(sides[0] | sides[1]):
            names = [side.get(word) for side in sides]
            place = Place(names[0] or names[1] or "", shown.name, word)
            found.append(_pair(place, ours, names[0], theirs, names[1]))
    others = [{p.tensor for p in places(each) if p.variable is None} for each in (ours, theirs)]
    for name in sorted(others[0] | others[1]):
        sides_of = [name if name in each else None for each in others]
        found.append(_pair(Place(name), ours, sides_of[0], theirs, sides_of[1]))
    return found


def _pair(
    place: Place, ours: Snapshot, name: str | None, theirs: Snapshot, other: str | None
) -> Pair:
    return Pair(
        place,
        None if name is None else ours.tensors[name],
        None if other is None else theirs.tensors[other],
    )


def compared(pair: Pair) -> Difference:
    """How two tensors differ: NaN is like NaN, and zero like minus zero."""
    ours, theirs = pair.ours, pair.theirs
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Difference(pair, math.nan, math.nan, 0)
    with np.errstate(all="ignore"):
        return Difference(pair, *_difference(ours.read(), theirs.read()))


def _difference(one: Array, other: Array) -> tuple[float, float, int]:
    """Relative norm, largest element, number of elements."""
    largest = 0.0
    for part in (*_parts(one), *_parts(other)):
        largest = max(largest, float(np.abs(part[np.isfinite(part)]).max(initial=0.0)))
    exponent = math.frexp(largest)[1]
    apart, of_one, of_other, furthest, count = 0.0, 0.0, 0.0, 0.0, 0
    for a, b in zip(_parts(one), _parts(other), strict=True):
        is_other = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        count += int(np.count_nonzero(is_other))
        is_finite = np.isfinite(a) & np.isfinite(b)
        if (is_other & ~is_finite).any():
            apart = furthest = math.inf
        a, b = (np.where(is_finite, _divided(each, exponent), 0.0) for each in (a, b))
        distance = np.abs(a - b)
        furthest = max(furthest, float(distance.max()))
        apart += _square(distance)
        of_one += _square(np.abs(a))
        of_other += _square(np.abs(b))
    norm = math.sqrt(max(of_one, of_other))
    relative = math.sqrt(apart) / norm if norm and apart else apart
    return relative, _multiplied(furthest, exponent), count
