"""The step on an NVIDIA GPU: one launch over all variables, one pass over their memory.

The rule's own closures become functions of Triton, and one kernel takes every variable of an
element type through a pass. It is given tables of addresses and nothing else: a word for each chunk
of `block_of` elements, a row for each variable and, apart from these, since they alone change from
step to step, the addresses of the gradients. Here is what is compiled and what the tables hold; who
has the memory, and launches, is `backends/cuda.py`.

Division and root are rounded as IEEE says and nothing is contracted, so that an element has the
bits that the CPU kernels give it. A norm may differ in its last bit: its sum has another order.

The file has no `from __future__ import annotations`: Triton reads the annotations.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .. import rule as arithmetic
from ..rule import Pass, PassCoefficients, Rule
from .cpu import ARITHMETIC

Int64s = npt.NDArray[np.int64]

# Bytes of arithmetic in a chunk, which one program takes: eight floats for each thread of four
# warps, or four doubles. Twice as many need twice the registers.
BYTES, WARPS = 4096, 4
# Partial sums that the one program of `factor` adds at a time.
ADDED = 4096
PASS_C = len(PassCoefficients._fields)
_PASS_C = tl.constexpr(PASS_C)
# Counts that a program of `count` counts up.
COUNTED = 1024
_ZERO = tl.constexpr(PassCoefficients._fields.index("zero"))
# Always given: the default of the first has changed between versions of Triton.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

_BITS = {"float32": tl.float32, "float64": tl.float64, "float16": tl.float16, "bfloat16": tl.uint16}
_ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


# --- the functions that the rule is bound to ---


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def _where(condition, a, b):
    return tl.where(condition != 0, a, b)


@triton.jit
def _abs(x):
    return tl.abs(x)


@triton.jit
def _sign(x):
    return tl.where(x != x, x, (x > 0).to(x.dtype) - (x < 0).to(x.dtype))


@triton.jit
def _expm1(x):
    return libdevice.expm1(x)


@triton.jit
def _single(x):
    return x.to(tl.float32).to(tl.float64)


class Functions:
    """`rule.Functions` as Triton compiles them: its own builtins, captured, would not be found.

    Those of `rule.NumberFunctions` too, without `log`, which the host takes; and `single`, a double
    as float32 has it.
    """

    sqrt, divide, abs, sign = _sqrt, _divide, _abs, _sign
    minimum, maximum, where = _minimum, _maximum, _where
    expm1, single = _expm1, _single

    def __repr__(self) -> str:
        """By what Triton's cache on disk tells one version of them from another."""
        every = [value for name, value in vars(Functions).items() if not name.startswith("__")]
        return f"Functions({', '.join(each.cache_key for each in every)})"


FUNCTIONS = Functions()


# Between what is stored for an element and the float that is computed with. In integers for
# bfloat16: as the CPU kernels have it, and Triton's interpreter would cut off what they round.


@triton.jit
def _widen(x):
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _narrow(x, STORED: tl.constexpr):
    if STORED == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return tl.where(x != x, 0x7FC0, kept).to(tl.uint16)
    elif STORED == tl.float16:
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def _round_bfloat16(x):
    return _widen(_narrow(x, tl.uint16))


@triton.jit
def _round_float16(x):
    return _widen(_narrow(x, tl.float16))


@triton.jit
def _same(x):
    return x


_ROUNDED = {"bfloat16": _round_bfloat16, "float16": _round_float16}


# --- the rule as functions of Triton ---

_ANNOTATIONS = ("Any", "Value", "Values", "bool", "NumberFunctions")


def bound(function: Any) -> Any:
    """A closure of the rule, and whatever it calls, as functions of Triton.

    It may have no parameter that is given by name alone, and neither may what it calls. What it
    captured stands among its globals, as Triton's interpreter wants it: settings as constants,
    functions compiled likewise. Each has a dictionary of its own, since Triton compares what a name
    means in one.

    Raises:
        ValueError: if it is no function with a `def` in a file.
    """
    if isinstance(function, (bool, Pass, Functions)):
        # The interpreter takes it as it is.
        return tl.constexpr(function) if isinstance(_same, triton.JITFunction) else function
    if not isinstance(function, types.FunctionType):
        return function
    if function.__name__ == "<lambda>":
        raise ValueError("Triton compiles functions that are written with `def`, and this is none.")
    # Triton looks at annotations.
    scope = dict(function.__globals__, tl=tl) | dict.fromkeys(_ANNOTATIONS)
    for name in function.__code__.co_names:  # what it calls by its name
        if isinstance(scope.get(name), types.FunctionType):
            scope[name] = bound(scope[name])
    cells = []
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in closure:
        scope[name] = value = bound(cell.cell_contents)
        cells.append(types.CellType(value))
    made = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return triton.jit(made)


@dataclass(frozen=True)
class Form:
    """What is fixed before a kernel is compiled, beside the rule: settings of a pass, and types."""

    dtype: str
    gradient_dtype: str
    slots: int  # that the pass reads and writes
    width: int  # words of a row
    vector: int  # elements that a thread accesses at once: 16 bytes of the widest stream
    rule_c: int
    has_gradient: bool
    runs: bool
    stores_variable: bool
    accumulated: bool
    stores_accumulator: bool
    averaged: bool
    factored: bool
    factors: int  # 1 if each variable has one of its own, 0 if there is one for all
    measured: bool
    clocked: bool  # whether coefficients are read from a clock, after the flag that skips a step


def block_of(dtype: str) -> int:
    """The elements in a chunk of variables of this type."""
    return BYTES // _ITEMSIZE[ARITHMETIC[dtype]]


def row_width(rule: Rule) -> int:
    """The words of a variable's row: w, slots, accumulator, average, where its factor is, size."""
    return len(rule.slots) + 5


def form_of(
    kind: Pass,
    rule: Rule,
    dtype: str,
    gradient_dtype: str,
    *,
    clocked: bool = False,
    joint: bool = False,
) -> Form:
    """The form of the kernel of a pass.

    Args:
        kind: what the pass does.
        rule: the optimizer's rule.
        dtype: of the variables.
        gradient_dtype: of the gradients.
        clocked: whether its coefficients are on the device.
        joint: whether one factor clips all gradients.
    """
    streams = [gradient_dtype] if kind.gradient else []
    if not (kind.measures_only and not kind.accumulated):
        streams += [dtype, ARITHMETIC[dtype]]
    return Form(
        dtype=dtype,
        gradient_dtype=gradient_dtype,
        slots=len(rule.slots) if kind.stores_slots else 0,
        width=row_width(rule),
        vector=16 // max(_ITEMSIZE[each] for each in streams),
        rule_c=len(rule.coefficients),
        has_gradient=kind.gradient,
        runs=not kind.measures_only,
        stores_variable=kind.stores_variable,
        accumulated=kind.accumulated,
        stores_accumulator=kind.stores_accumulator,
        averaged=kind.averaged,
        factored=kind.clipped_by_factor,
        factors=0 if joint else 1,
        measured=bool(kind.measured),
        clocked=clocked,
    )


def why_not(kind: Pass) -> str:
    """Why no kernel makes a pass, in words; empty if one does."""
    if kind.measured and not (kind.measures_only and kind.measured == ("gradient",)):
        return f"a pass that measures {kind.measured} while it writes"
    return ""


# --- the kernels ---


@triton.jit
def _at(address, offset, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + offset


@triton.jit
def _word(address, at):
    return tl.load(address.to(tl.pointer_type(tl.int64)) + at)


@triton.jit
def _elements(
    row,
    grad,
    offset,
    i,
    mask,
    factor,
    rule_c,
    pass_c,
    ELEMENT: tl.constexpr,
    GRADIENT: tl.constexpr,
    F: tl.constexpr,
    SLOTS: tl.constexpr,
    STORED: tl.constexpr,
    READ: tl.constexpr,
    REAL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Take the elements at `offset + i` through a pass; the sum of squares that it measures."""
    zero = pass_c[_ZERO]
    g = zero
    accumulator = zero
    average = zero
    if F.has_gradient:
        g = tl.load(_at(grad, offset, READ, ALIGNED) + i, mask=mask)
        g = _widen(g).to(REAL)
    if F.accumulated:
        accumulator = tl.load(_at(row[SLOTS + 1], offset, REAL, ALIGNED) + i, mask=mask)
    if F.averaged:
        average = tl.load(_at(row[SLOTS + 2], offset, REAL, ALIGNED) + i, mask=mask)
    if F.runs:
        w = _widen(tl.load(_at(row[0], offset, STORED, ALIGNED) + i, mask=mask))
        slots = ()
        for k in tl.static_range(SLOTS):
            slots = slots + (tl.load(_at(row[k + 1], offset, REAL, ALIGNED) + i, mask=mask),)
        w, slots, accumulator, average = ELEMENT(
            w, g, slots, accumulator, average, factor, rule_c, pass_c
        )
        for k in tl.static_range(SLOTS):
            tl.store(_at(row[k + 1], offset, REAL, ALIGNED) + i, slots[k], mask=mask)
        if F.stores_accumulator:
            tl.store(_at(row[SLOTS + 1], offset, REAL, ALIGNED) + i, accumulator, mask=mask)
        if F.averaged:
            tl.store(_at(row[SLOTS + 2], offset, REAL, ALIGNED) + i, average, mask=mask)
        if F.stores_variable:
            tl.store(_at(row[0], offset, STORED, ALIGNED) + i, _narrow(w, STORED), mask=mask)
    if F.measured:
        x = GRADIENT(g, accumulator, pass_c).to(tl.float64)
        return tl.sum(tl.where(mask, x * x, 0.0))
    else:
        return 0.0


@triton.jit
def sweep(
    chunks,
    rows,
    grads,
    factors,
    partials,
    clock,
    numbers,
    ELEMENT: tl.constexpr,
    GRADIENT: tl.constexpr,
    F: tl.constexpr,
    SLOTS: tl.constexpr,
    RULE_C: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    STORED: tl.constexpr,
    READ: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A pass over the chunk of this program."""
    pass_c = ()
    rule_c = ()
    if F.clocked:
        told = clock.to(tl.pointer_type(tl.float64))
        if tl.load(told) != 0:
            return
        for k in tl.static_range(_PASS_C):
            pass_c = pass_c + (tl.load(told + 1 + k).to(REAL),)
        for k in tl.static_range(RULE_C):
            rule_c = rule_c + (tl.load(told + 1 + _PASS_C + k).to(REAL),)
    else:
        for k in tl.static_range(_PASS_C):
            pass_c = pass_c + (numbers[k].to(REAL),)
        for k in tl.static_range(RULE_C):
            rule_c = rule_c + (numbers[k + _PASS_C].to(REAL),)
    k = tl.program_id(0)
    word = _word(chunks, k)
    tensor = word >> 32
    offset = tl.multiple_of((word & 0xFFFFFFFF) * BLOCK, BLOCK)
    at = tensor * WIDTH
    n = tl.minimum(_word(rows, at + WIDTH - 1) - offset, BLOCK).to(tl.int32)
    row = ()
    together = tensor * 0
    for j in tl.static_range(WIDTH - 2):
        # Words of what the pass does not touch are zero.
        address = _word(rows, at + j)
        row = row + (address,)
        together = together | address
    if F.has_gradient:
        grad = _word(grads, tensor)
        together = together | grad
    else:
        grad = together
    if F.factored:
        factor = tl.load(
            factors.to(tl.pointer_type(tl.float64)) + _word(rows, at + WIDTH - 2) * F.factors
        ).to(REAL)
    else:
        factor = pass_c[_ZERO]
    # A thread takes as many neighbours from a narrow stream as from a wide one: else values would
    # be exchanged between threads.
    i = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    if together & 15 == 0:
        # A bound that is known to be a multiple lets whole vectors be accessed, or none.
        whole = tl.multiple_of(n & -VECTOR, VECTOR)
        total = _elements(
            row, grad, offset, i, i < whole, factor, rule_c, pass_c,
            ELEMENT, GRADIENT, F, SLOTS, STORED, READ, REAL, True,
        )  # fmt: skip
        if whole < n:
            rest = whole + tl.arange(0, VECTOR)
            total += _elements(
                row, grad, offset, rest, rest < n, factor, rule_c, pass_c,
                ELEMENT, GRADIENT, F, SLOTS, STORED, READ, REAL, False,
            )  # fmt: skip
    else:
        # Of two axes, since Triton would take over the layout of what has the form of vectors, and
        # exchange values between threads before it stores them.
        each = tl.arange(0, BLOCK // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
        total = _elements(
            row, grad, offset, each, each < n, factor, rule_c, pass_c,
            ELEMENT, GRADIENT, F, SLOTS, STORED, READ, REAL, False,
        )  # fmt: skip
    if F.measured:
        tl.store(partials.to(tl.pointer_type(tl.float64)) + k, total)


@triton.jit
def factor(
    segments,
    firsts,
    sums,
    factors,
    threshold,
    FACTOR: tl.constexpr,
    FUNCTIONS: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Add up partial sums in their order, and make of the norm what gradients are multiplied by.

    Program p adds the segments `firsts[p]` to `firsts[p + 1]`, rows of an address and a count.
    """
    p = tl.program_id(0)
    total = tl.full((ADDED,), 0.0, tl.float64)
    i = tl.arange(0, ADDED)
    # By `while`: the interpreter of 3.6 has no `range` of what is read, on NumPy 2.4.
    s = _word(firsts, p)
    while s < _word(firsts, p + 1):
        values = _word(segments, 2 * s).to(tl.pointer_type(tl.float64))
        count = _word(segments, 2 * s + 1)
        at = s * 0
        while at < count:
            total += tl.load(values + at + i, mask=at + i < count, other=0.0)
            at += ADDED
        s += 1
    squares = tl.sum(total, axis=0)
    tl.store(sums.to(tl.pointer_type(tl.float64)) + p, squares)
    if FACTOR is not None:
        value = FACTOR(FUNCTIONS, tl.sqrt(squares), threshold)
        tl.store(factors.to(tl.pointer_type(tl.float64)) + p, value)


@triton.jit
def tell(
    clock,
    step,
    skip,
    scale,
    rate,
    numbers,
    NUMBERS: tl.constexpr,
    RATE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Fill a clock with the numbers of a step: whether it is skipped, its pass's, its rule's.

    Where an address is zero, the host knows: t, scale and rate are the first of `numbers`.
    """
    t = numbers[0]
    divisor = numbers[1]
    learning_rate = numbers[2]
    if step != 0:
        t = tl.load(step.to(tl.pointer_type(tl.float32))).to(tl.float64)
    if scale != 0:
        divisor = tl.load(scale.to(tl.pointer_type(tl.float32))).to(tl.float64)
    if rate != 0:
        learning_rate = tl.load(rate.to(tl.pointer_type(RATE))).to(tl.float64)
    is_skipped = t * 0.0
    if skip != 0:
        is_skipped = tl.load(skip.to(tl.pointer_type(tl.float32))).to(tl.float64)
    values = NUMBERS(learning_rate, t, divisor, numbers[3:])
    p = clock.to(tl.pointer_type(tl.float64))
    tl.store(p, is_skipped)
    for k in tl.static_range(COUNT):
        tl.store(p + 1 + k, values[k])


@triton.jit
def count(steps, n, clock, COUNTED: tl.constexpr):
    """Count a step, unless the clock says that it is skipped; `steps` are addresses of counts."""
    i = tl.program_id(0) * COUNTED + tl.arange(0, COUNTED)
    if tl.load(clock.to(tl.pointer_type(tl.float64))) == 0:
        p = tl.load(steps.to(tl.pointer_type(tl.int64)) + i, mask=i < n, other=0)
        p = p.to(tl.pointer_type(tl.float32))
        tl.store(p, tl.load(p, mask=i < n) + 1.0, mask=i < n)


# --- what is compiled ---


@cache
def _elements_of(kind: Pass, rule: Rule, dtype: str) -> tuple[Any, Any]:
    """The pass on one element, and its gradient, as functions of Triton."""
    gradient = bound(arithmetic.make_gradient(kind, Functions))
    rounded = _ROUNDED.get(dtype, _same)
    update = bound(rule.bind(Functions))
    element = arithmetic.make_element(kind, update, gradient, Functions, rounded)
    return bound(element), gradient


def constants_of(kind: Pass, rule: Rule, form: Form) -> dict[str, Any]:
    """The arguments of `sweep` that are fixed before it is compiled."""
    element, gradient = _elements_of(kind, rule, form.dtype)
    return {
        "ELEMENT": element,
        "GRADIENT": gradient,
        "F": form,
        "SLOTS": form.slots,
        "RULE_C": form.rule_c,
        "WIDTH": form.width,
        "VECTOR": form.vector,
        "STORED": _BITS[form.dtype],
        "READ": _BITS[form.gradient_dtype],
        "REAL": _BITS[ARITHMETIC[form.dtype]],
        "BLOCK": block_of(form.dtype),
    }


def factor_constants(clip: Callable[..., Any] | None) -> dict[str, Any]:
    """Likewise of `factor`; `clip` is one of the rule's, or None for sums alone."""
    return {"FACTOR": bound(clip), "FUNCTIONS": FUNCTIONS, "ADDED": ADDED}


def tell_constants(
    make: Callable[..., Any], settings: tuple[Any, ...], rate: str, count: int
) -> dict[str, Any]:
    """Likewise of `tell`.

    Args:
        make: a function at the top level of a module, `(functions, *settings) -> numbers`, where
            `numbers(rate, t, scale, host)` returns so many numbers: a pass's, then its rule's.
        settings: of it.
        rate: the type of the rate that is on the device.
        count: how many numbers there are.
    """
    return {"NUMBERS": bound(make(FUNCTIONS, *settings)), "RATE": _BITS[rate], "COUNT": count}


def sweep_kernel(
    kind: Pass, rule: Rule, dtype: str, clocked: bool, joint: bool, target: Any
) -> tuple[Any, dict[str, Any]]:
    """The kernel of a pass over variables and gradients of one type, and its fixed arguments.

    It is what `form_of` says, compiled for a `GPUTarget` of Triton.
    """
    form = form_of(kind, rule, dtype, dtype, clocked=clocked, joint=joint)
    constants = constants_of(kind, rule, form)
    return _compiled(sweep, constants, PASS_C + form.rule_c, target), constants


def factor_kernel(clip: Callable[..., Any] | None, target: Any) -> tuple[Any, dict[str, Any]]:
    """Likewise what adds partial sums up, and makes factors of them as `clip` says."""
    constants = factor_constants(clip)
    return _compiled(factor, constants, 0, target), constants


def tell_kernel(
    make: Callable[..., Any],
    settings: tuple[Any, ...],
    rate: str,
    count: int,
    host: int,
    target: Any,
) -> tuple[Any, dict[str, Any]]:
    """Likewise what fills a clock; of the numbers that it needs the host gives so many."""
    constants = tell_constants(make, settings, rate, count)
    return _compiled(tell, constants, 3 + host, target), constants


def count_kernel(target: Any) -> tuple[Any, dict[str, Any]]:
    """Likewise what counts steps up."""
    constants = {"COUNTED": COUNTED}
    return _compiled(count, constants, 0, target), constants


def _compiled(function: Any, constants: dict[str, Any], numbers: int, target: Any) -> Any:
    types_of: dict[str, Any] = {"numbers": ("fp64",) * numbers, "threshold": "fp64"}
    signature = {
        name: "constexpr" if name in constants else types_of.get(name, "i64")
        for name in function.arg_names
    }
    source = triton.compiler.ASTSource(function, signature, constants)
    return triton.compile(source, target=target, options=OPTIONS)


# --- tables ---


def chunk_table(sizes: Sequence[int], dtype: str) -> Int64s:
    """A word for each chunk: the number of its variable, and in the lower half its own."""
    counts = -(-np.array(sizes, np.int64) // block_of(dtype))
    tensors = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return (tensors << 32) | (np.arange(len(tensors)) - first)


def row_table(
    addresses: Sequence[Sequence[int]], sizes: Sequence[int], places: Sequence[int], rule: Rule
) -> Int64s:
    """A row for each variable.

    Args:
        addresses: of each the variable, its slots, its accumulator and its average, 0 where the
            pass has no use for one; without the slots if it stores none.
        sizes: in elements.
        places: where the factor of each stands among all.
        rule: the optimizer's rule.
    """
    table = np.zeros((len(sizes), row_width(rule)), np.int64)
    for row, found in zip(table, addresses, strict=True):
        row[: len(found)] = found
    table[:, -2], table[:, -1] = places, sizes
    return table
