"""Which memory goes through which kernel.

Flat memory of one element type goes through one kernel in one call. Strided memory goes through
the same kernel in buffers of bounded size, so that no array of a variable's size is ever made.
Without Numba everything goes through such buffers, and the rule runs on NumPy's own functions.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import rule as arithmetic
from ..rule import MEASURES, Pass, Rule
from ..tuned import BUFFERED, BUFFERED_ON_NUMPY, CHUNK
from . import cpu
from .cpu import ARITHMETIC, HELPERS, PASS_C, STORAGE, SparseRows, Sums, Sweep, Team, Work

Array = npt.NDArray[Any]


class Region(NamedTuple):
    """Where a view lies in memory: `strides` and `itemsize` are in bytes.

    The memory is not held: whoever has the view must keep it for as long as this is used.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def span(self) -> tuple[int, int]:
        """The first byte, and the one after the last."""
        low = self.address
        high = low + self.itemsize
        for stride, n in zip(self.strides, self.shape, strict=True):
            if stride < 0:
                low += stride * (n - 1)
            else:
                high += stride * (n - 1)
        return low, high

    def array(self, dtype: Any) -> Array:
        """The memory as an array, whose dtype has this itemsize."""
        if self.size == 0:
            return np.empty(self.shape, dtype)
        low, high = self.span()
        memory: Any = (ctypes.c_char * (high - low)).from_address(low)
        return np.ndarray(self.shape, dtype, memory, self.address - low, self.strides)


def region_of(values: Array) -> Region:
    """Where an array lies."""
    return Region(values.ctypes.data, values.shape, values.strides, values.itemsize)


@dataclass(frozen=True, eq=False)
class Operand:
    """Where one variable and its state lie. `dtype` is the variable's, one of `cpu.STORAGE`."""

    dtype: str
    variable: Region
    slots: tuple[Region, ...] = ()
    accumulator: Region | None = None
    average: Region | None = None

    def streams(self, kind: Pass) -> list[Region | None]:
        """What a pass touches beside the gradient, None for what it does not."""
        return [
            self.variable,
            *(self.slots if kind.stores_slots else ()),
            self.accumulator if kind.accumulated else None,
            self.average if kind.averaged else None,
        ]

    def every(self) -> list[Region]:
        """All that there is."""
        every = (self.variable, *self.slots, self.accumulator, self.average)
        return [region for region in every if region is not None]


def _is_flat(region: Region) -> bool:
    """Whether the elements lie densely in memory, in whatever order of the axes."""
    reach = region.itemsize
    for stride, n in sorted(zip(region.strides, region.shape, strict=True)):
        if n > 1:
            if stride != reach:
                return False
            reach *= n
    return True


def is_in_order(region: Region) -> bool:
    """Whether the elements lie densely in memory, the last axis first."""
    reach = region.itemsize
    for stride, n in zip(reversed(region.strides), reversed(region.shape), strict=True):
        if n > 1:
            if stride != reach:
                return False
            reach *= n
    return True


def _addresses(streams: Sequence[Region | None]) -> list[int]:
    return [0 if each is None else each.address for each in streams]


class Plan:
    """A pass over some operands whose gradients are flat, in the operands' own types.

    The kernels are grouped by element type and by whether weight decay applies.
    """

    def __init__(
        self,
        kind: Pass,
        rule: Rule,
        operands: Sequence[Operand],
        decayed: Sequence[bool],
        team: Team = HELPERS,
    ) -> None:
        groups: dict[tuple[str, bool], list[int]] = {}
        for i, (operand, is_decayed) in enumerate(zip(operands, decayed, strict=True)):
            groups.setdefault((operand.dtype, kind.decayed and is_decayed), []).append(i)
        self._groups = [
            (
                indices,
                Sweep(
                    kind._replace(decayed=is_decayed),
                    rule,
                    dtype,
                    dtype,
                    [_addresses(operands[i].streams(kind)) for i in indices],
                    [operands[i].variable.size for i in indices],
                    team=team,
                ),
            )
            for (dtype, is_decayed), indices in groups.items()
        ]

    def add_to(
        self,
        work: Work,
        gradients: array[int],
        factors: array[float],
        coefficients: array[float],
    ) -> Sums:
        """As `Sweep.add_to`, with an address and a factor an operand, in their order."""
        if len(self._groups) == 1:
            return self._groups[0][1].add_to(work, gradients, factors, coefficients)
        parts = []
        for indices, sweep in self._groups:
            chosen = _chosen(gradients, indices), _chosen(factors, indices)
            parts.append((indices, sweep.add_to(work, *chosen, coefficients)))
        return lambda: in_order(parts)


def in_order(parts: Sequence[tuple[Sequence[int], Sums]]) -> list[tuple[float, ...]]:
    """What several passes measured, by the positions of the operands."""
    rows = {i: row for indices, sums in parts for i, row in zip(indices, sums(), strict=False)}
    return [rows[i] for i in sorted(rows)]


def _chosen(values: array[Any], indices: list[int]) -> array[Any]:
    return array(values.typecode, [values[i] for i in indices]) if values else values


def _buffers(
    streams: Sequence[Array | None],
    stored: Sequence[bool],
    size: int,
    dtypes: Sequence[Any],
    order: str,
) -> Iterator[list[Array | None]]:
    """The streams in flat pieces of at most `size` elements, written back where `stored`."""
    present = [i for i, each in enumerate(streams) if each is not None]
    # Of an array without axes NumPy 2.0 hands out a buffer that it has not filled.
    at_least_1d = [np.atleast_1d(streams[i]) for i in present]  # type: ignore[arg-type]
    iterator = np.nditer(  # type: ignore[call-overload]
        at_least_1d,
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readwrite" if stored[i] else "readonly", "contig", "aligned"] for i in present],
        op_dtypes=[dtypes[i] for i in present],
        order=order,
        casting="unsafe",  # only a gradient has another type than it is read as
        buffersize=size,
    )
    with iterator:
        if iterator.itersize == 0:
            return
        for pieces in iterator:
            found: list[Array | None] = [None] * len(streams)
            for i, piece in zip(present, pieces if len(present) > 1 else (pieces,), strict=True):
                found[i] = piece
            yield found


class Odd:
    """A pass over one operand that no `Plan` can take: strided memory, a gradient of another
    element type or order, sparse rows, or no Numba.
    """

    def __init__(
        self,
        kind: Pass,
        rule: Rule,
        operand: Operand,
        gradient: Region | SparseRows | None,
        gradient_dtype: str,
        team: Team = HELPERS,
    ) -> None:
        if kind.measures_only and not kind.accumulated and isinstance(gradient, SparseRows):
            # The rows alone, in order: zeros add nothing. Of the variable nothing is read.
            values = gradient.values
            gradient, blank = region_of(values), values
            if not cpu.available():
                blank = np.zeros(values.shape, STORAGE[operand.dtype])
            operand = Operand(operand.dtype, region_of(blank))
            self._rows = values, blank
        self._kind, self._rule, self._operand = kind, rule, operand
        self._team = team
        self._gradient_dtype = gradient_dtype
        self._compiled = cpu.available()
        self._sparse = gradient if isinstance(gradient, SparseRows) else None
        self._dense = None if isinstance(gradient, SparseRows) else gradient
        self._sweep: Sweep | None = None
        in_order = self._sparse is None or is_in_order(operand.variable)
        if self._compiled and in_order and is_regular(operand, self._dense):
            self._address = array("q", _addresses([self._dense]))
            addresses = _addresses(operand.streams(kind))
            self._sweep = self._over(addresses, operand.variable.size, self._sparse)

    def _over(self, addresses: list[int], size: int, sparse: SparseRows | None = None) -> Sweep:
        return Sweep(
            self._kind,
            self._rule,
            self._operand.dtype,
            self._gradient_dtype,
            [addresses],
            [size],
            sparse,
            self._team,
        )

    def _pieces(self) -> Iterator[tuple[list[Array | None], Array | None]]:
        kind, operand = self._kind, self._operand
        regions = [*operand.streams(kind), self._dense]
        stored = [each is not None for each in regions]
        stored[0], stored[-1] = kind.stores_variable, False
        stored[-3] = stored[-3] and kind.stores_accumulator
        real = ARITHMETIC[operand.dtype]
        dtypes = [STORAGE[operand.dtype], *[real] * (len(regions) - 2), None]
        if self._dense is not None:
            dtypes[-1] = STORAGE[self._gradient_dtype]
        pairs = zip(regions, dtypes, strict=True)
        streams = [None if each is None else each.array(dtype) for each, dtype in pairs]
        size = CHUNK * (BUFFERED if self._compiled else BUFFERED_ON_NUMPY)
        stop = 0
        order = "K" if self._sparse is None else "C"  # of memory; of rows
        for *pieces, gradient in _buffers(streams, stored, size, dtypes, order):
            if self._sparse is not None:
                start, stop = stop, stop + pieces[0].size  # type: ignore[union-attr]
                gradient = self._sparse.dense(start, stop)
            yield pieces, gradient

    def add_to(self, work: Work, factors: array[float], coefficients: array[float]) -> Sums:
        """As `Sweep.add_to` for this operand."""
        if self._sweep is not None:
            return self._sweep.add_to(work, self._address, factors, coefficients)
        if self._compiled:  # what can fail comes before anything is written
            cpu._kernel(self._kind, self._rule, self._operand.dtype, self._gradient_dtype)
        totals = [0.0] * len(self._kind.measured)
        work.add_python(self._run_by_pieces, totals, factors, coefficients)
        return lambda: [tuple(totals)] if totals else []

    def _run_by_pieces(
        self,
        totals: list[float],
        factors: array[float],
        coefficients: array[float],
    ) -> None:
        element = on_numpy(self._kind, self._rule, self._operand.dtype)
        factor = factors[0] if factors else 1.0
        for pieces, gradient in self._pieces():
            if self._compiled:
                addresses = [0 if each is None else each.ctypes.data for each in pieces]
                sweep = self._over(addresses, pieces[0].size)  # type: ignore[union-attr]
                at = array("q", [0 if gradient is None else gradient.ctypes.data])
                found = sweep.run(at, factors, coefficients)
                sums: Sequence[float] = found[0] if found else ()
            else:
                w, *rest = pieces
                with np.errstate(all="ignore"):
                    sums = self._interpret(element, w, rest, gradient, factor, coefficients)
            for k, each in enumerate(sums):
                totals[k] += each

    def _interpret(
        self,
        element: Any,
        w: Any,
        rest: list[Any],
        gradient: Any,
        factor: float,
        coefficients: array[float],
    ) -> list[float]:
        *slots, accumulator, average = rest
        kind, dtype = self._kind, self._operand.dtype
        pass_c = tuple(coefficients[:PASS_C])
        if gradient is not None:
            real = np.dtype(ARITHMETIC[dtype])
            gradient = widened(gradient, self._gradient_dtype).astype(real, copy=False)
        after = before = widened(w, dtype)
        if not kind.measures_only:
            new = element(
                before,
                gradient,
                tuple(slots),
                accumulator,
                average,
                factor,
                tuple(coefficients[PASS_C:]),
                pass_c,
            )
            after = new[0]
        sums = []
        if kind.measured:
            g = arithmetic.make_gradient(kind, OnNumPy)(gradient, accumulator, pass_c)
            for name in kind.measured:
                values = MEASURES[name](OnNumPy)(g, before, after)
                # np.dot would round as BLAS divides the sum among its threads.
                sums.append(float(np.sum(np.square(values.astype(np.float64, copy=False)))))
        if kind.stores_slots:
            for slot, value in zip(slots, new[1], strict=True):
                slot[...] = value
        if kind.stores_accumulator:
            accumulator[...] = new[2]
        if kind.averaged:
            average[...] = new[3]
        if kind.stores_variable:
            w[...] = narrowed(after, dtype)
        return sums


def widened(values: Array, dtype: str) -> Array:
    """The floats that stored values stand for, in the type that is computed in."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float16":
        return values.view(np.float16).astype(np.float32)
    return values


def narrowed(values: Array, dtype: str) -> Array:
    """The stored form of floats, rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        kept = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> 16
        return np.where(np.isnan(values), np.uint32(0x7FC0), kept).astype(np.uint16)
    if dtype == "float16":
        return np.asarray(values, np.float32).astype(np.float16).view(np.uint16)
    return values


class OnNumPy:
    """`rule.Functions` of whole arrays."""

    sqrt, divide, abs, sign = np.sqrt, np.divide, np.abs, np.sign
    minimum, maximum, where = np.minimum, np.maximum, np.where


def on_numpy(kind: Pass, rule: Rule, dtype: str) -> Callable[..., Any]:
    """`rule.make_element` on NumPy's functions, of whole arrays."""
    return arithmetic.make_element(
        kind,
        rule.bind(OnNumPy),
        arithmetic.make_gradient(kind, OnNumPy),
        OnNumPy,
        lambda x: widened(narrowed(x, dtype), dtype),
    )


def is_regular(operand: Operand, gradient: Region | None = None) -> bool:
    """Whether a kernel could take an operand and its gradient as they lie in memory."""
    rest = (*operand.slots, operand.accumulator, operand.average, gradient)
    return (
        _is_flat(operand.variable)
        and operand.variable.address % operand.variable.itemsize == 0
        and all(each is None or lies_like(each, operand.variable) for each in rest)
    )


def lies_like(region: Region, variable: Region) -> bool:
    """Whether a region is aligned, and its elements lie in the order of a flat variable's."""
    itemsize, strides = region.itemsize, variable.strides
    if region.address % itemsize:
        return False
    if itemsize != variable.itemsize:
        strides = tuple(stride // variable.itemsize * itemsize for stride in strides)
    return region.strides == strides or all(
        a == b or n <= 1 for a, b, n in zip(region.strides, strides, region.shape, strict=True)
    )


def is_injective(shape: Sequence[int], strides: Sequence[int], itemsize: int = 1) -> bool:
    """Whether no two elements of a view with elements lie at the same address."""
    axes = sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1)
    reach = itemsize
    for stride, n in axes:
        if stride < reach:
            return False
        reach = stride * (n - 1) + reach
    return True


def overlapping(regions: Sequence[Region]) -> tuple[int, int] | None:
    """Two of the regions, none of which overlaps itself, that have a byte in common, if any do.

    Views may lie between each other's elements, as the columns of a matrix do.
    """
    spans = sorted((*r.span(), i) for i, r in enumerate(regions) if 0 not in r.shape)
    between: list[int] = []  # that may overlap
    reach = 0
    for low, high, i in spans:
        if low >= reach and between:
            if found := _overlapping_between(regions, between):
                return found
            between = []
        between.append(i)
        reach = max(reach, high)
    return _overlapping_between(regions, between)


def _overlapping_between(regions: Sequence[Region], chosen: list[int]) -> tuple[int, int] | None:
    if len(chosen) < 2:
        return None
    spans = [regions[i].span() for i in chosen]
    low, high = min(a for a, _ in spans), max(b for _, b in spans)
    unit = high - low
    for i in chosen:
        address, shape, strides, itemsize = regions[i]
        steps = [s for s, n in zip(strides, shape, strict=True) if n > 1]
        unit = math.gcd(unit, address - low, itemsize, *steps)
    # One mark for each unit of memory: comparing all pairs would take time quadratic in their
    # number, and for some pairs exponential time.
    marks = np.zeros((high - low) // unit, bool)

    def marks_of(i: int) -> npt.NDArray[np.bool_]:
        address, shape, strides, itemsize = regions[i]
        axes = [(n, s // unit) for n, s in zip(shape, strides, strict=True) if n > 1]
        axes.append((itemsize // unit, 1))
        sizes, steps = zip(*axes, strict=True)
        return np.ndarray(sizes, bool, marks, (address - low) // unit, steps)

    for k, i in enumerate(chosen):
        if marks_of(i).any():
            marks[...] = False
            marks_of(i)[...] = True
            return next((j, i) for j in chosen[:k] if marks_of(j).any())
        marks_of(i)[...] = True
    return None
