"""Run by test_triton.py, in a process of Triton's interpreter: kernels on NumPy's memory.

The interpreter takes the same functions that are compiled for a GPU, one program at a time, and
reaches memory by plain addresses. What it cannot show, roundings that are only nearly right, is
looked for in the machine code.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle

from omniadam.adam import ADAM, AMSGRAD, by_memory
from omniadam.backends.host import Numbers
from omniadam.kernels import cpu, layout
from omniadam.kernels import triton as kernels
from omniadam.rule import (
    NOTHING,
    Pass,
    PassCoefficients,
    Rule,
    clip_factor,
    clip_factor_global,
    clip_factor_joint,
)
from omniadam.torch import make_numbers
from triton_passes import EVERYTHING, NORM, PASSES, STEP

FLOATS = tuple(cpu.STORAGE)
# Chunks have 1024 elements: none, a few, one less, all, one more.
SIZES = (0, 1, 3, 1023, 1024, 1025)
ALIGNMENT = 16


@pytest.fixture(autouse=True)
def interpreted_expm1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter calls no function of CUDA's library."""

    def expm1(x: Any) -> Any:
        return double(np.expm1(x.handle.data.item()))

    monkeypatch.setattr(libdevice, "expm1", expm1)


def double(x: float) -> Any:
    """A number as a kernel has it; the interpreter would make a float single."""
    return tl.tensor(TensorHandle(np.array([x], np.float64), tl.float64), tl.float64)


class Memory(NamedTuple):
    """What a pass goes over: of each variable `Operand.streams`, and its gradient."""

    streams: list[list[npt.NDArray[Any] | None]]
    gradients: list[npt.NDArray[Any]]

    def copy(self) -> Memory:
        copies = [[None if x is None else at_offset(x) for x in row] for row in self.streams]
        return Memory(copies, self.gradients)

    def bits(self) -> list[bytes]:
        return [b"" if x is None else x.tobytes() for row in self.streams for x in row]


def at_offset(values: npt.NDArray[Any], offset: int = 0) -> npt.NDArray[Any]:
    """The values in memory that begins so many elements after a multiple of 16 bytes."""
    size = values.dtype.itemsize
    memory = np.zeros(values.size + 2 * ALIGNMENT + offset, values.dtype)
    start = -memory.ctypes.data % ALIGNMENT // size + offset
    found = memory[start : start + values.size]
    found[...] = values
    assert found.ctypes.data % ALIGNMENT == offset * size % ALIGNMENT
    return found


def memory_for(
    kind: Pass,
    rule: Rule,
    dtype: str,
    sizes: Sequence[int],
    offset: int = 0,
    gradient_offset: int = 0,
) -> Memory:
    rng = np.random.default_rng(len(sizes))
    real = np.dtype(cpu.ARITHMETIC[dtype])

    def drawn(size: int, spread: float, offset: int) -> npt.NDArray[Any]:
        values = rng.standard_normal(size) * 10.0 ** rng.uniform(-spread, 1, size)
        values[rng.random(size) < 0.1] = 0.0
        return at_offset(values.astype(real), offset)

    def stored(size: int, offset: int) -> npt.NDArray[Any]:
        return at_offset(layout.narrowed(drawn(size, 3, 0), dtype), offset)

    streams, gradients = [], []
    for size in sizes:
        slots = [drawn(size, 4, offset), *(abs(drawn(size, 6, offset)) for _ in rule.slots[1:])]
        streams.append(
            [
                stored(size, offset),
                *(slots[: len(rule.slots)] if kind.stores_slots else ()),
                drawn(size, 3, offset) if kind.accumulated else None,
                drawn(size, 3, offset) if kind.averaged else None,
            ]
        )
        gradients.append(stored(size, gradient_offset))
    return Memory(streams, gradients)


def numbers_for(rule: Rule) -> list[float]:
    given = PassCoefficients(3.0, 2.0, 0.25, 0.01, 0.9, 0.1, 0.0, 0.0)
    named = {"alpha": 0.01, "weight_1": 0.1, "weight_2": 0.001, "epsilon": 1e-7}
    return [*given, *(named.get(name, 0.5) for name in rule.coefficients)]


def launch(
    kind: Pass,
    rule: Rule,
    dtype: str,
    memory: Memory,
    numbers: Sequence[float],
    factors: Sequence[float],
    clock: npt.NDArray[Any] | None = None,
    joint: bool = False,
) -> npt.NDArray[Any]:
    """What a GPU does in one launch; the partial sums."""
    sizes = [row[0].size for row in memory.streams]
    addresses = [[0 if x is None else x.ctypes.data for x in row] for row in memory.streams]
    chunks, rows = (
        kernels.chunk_table(sizes, dtype),
        kernels.row_table(addresses, sizes, range(len(sizes)), rule),
    )
    grads = np.array([g.ctypes.data for g in memory.gradients], np.int64)
    scales, partials = np.array(factors), np.zeros(len(chunks))
    form = kernels.form_of(kind, rule, dtype, dtype, clocked=clock is not None, joint=joint)
    kernels.sweep[(len(chunks),)](
        *(x.ctypes.data for x in (chunks, rows, grads, scales, partials)),
        0 if clock is None else clock.ctypes.data,
        tuple(map(double, numbers)),
        **kernels.constants_of(kind, rule, form),
    )
    return partials


def on_cpu(
    kind: Pass,
    rule: Rule,
    dtype: str,
    memory: Memory,
    numbers: Sequence[float],
    factors: Sequence[float],
) -> None:
    """The same by the rule on NumPy, which has the bits of the CPU kernels (test_kernels.py)."""
    element = layout.on_numpy(kind, rule, dtype)
    n, real = len(PassCoefficients._fields), np.dtype(cpu.ARITHMETIC[dtype]).type
    for (w, *rest), g, factor in zip(memory.streams, memory.gradients, factors, strict=True):
        *slots, accumulator, average = rest
        with np.errstate(all="ignore"):
            new_w, new_slots, new_accumulator, new_average = element(
                layout.widened(w, dtype),
                layout.widened(g, dtype),
                tuple(slots),
                accumulator,
                average,
                real(factor),
                tuple(map(real, numbers[n:])),
                tuple(map(real, numbers[:n])),
            )
        for slot, value in zip(slots, new_slots, strict=kind.stores_slots):
            slot[...] = value
        if kind.stores_accumulator:
            accumulator[...] = new_accumulator
        if kind.averaged:
            average[...] = new_average
        if kind.stores_variable:
            w[...] = layout.narrowed(new_w, dtype)


def check(
    kind: Pass, rule: Rule, dtype: str, sizes: Sequence[int], *offsets: int, passes: int = 1
) -> None:
    ours = memory_for(kind, rule, dtype, sizes, *offsets)
    theirs, before = ours.copy(), ours.bits()
    numbers, factors = numbers_for(rule), [1.0 + 0.3 * i for i in range(len(sizes))]
    for _ in range(passes):
        launch(kind, rule, dtype, ours, numbers, factors)
        on_cpu(kind, rule, dtype, theirs, numbers, factors)
    assert ours.bits() == theirs.bits(), (kind, rule.settings, dtype)
    assert ours.bits() != before


# --- bits ---


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pass_gives_the_bits_of_the_cpu(dtype: str) -> None:
    for kind, rule in PASSES.values():
        if not kind.measures_only:
            check(kind, rule, dtype, SIZES)


def test_rules_of_other_betas_and_of_optax() -> None:
    for rule in (by_memory(ADAM, True, True), by_memory(AMSGRAD, True, False)):
        check(STEP, rule, "float32", (5, 1030))


def test_two_passes_over_many_chunks() -> None:
    check(STEP, ADAM, "float32", (70_001,), passes=2)


def test_one_pass_against_the_compiled_kernel_of_the_cpu() -> None:
    memory = memory_for(EVERYTHING, AMSGRAD, "bfloat16", SIZES)
    theirs, numbers = memory.copy(), numbers_for(AMSGRAD)
    factors = [0.5 + i for i in range(len(SIZES))]
    launch(EVERYTHING, AMSGRAD, "bfloat16", memory, numbers, factors)
    addresses = [[x.ctypes.data for x in row] for row in theirs.streams]
    gradients = array("q", [g.ctypes.data for g in theirs.gradients])
    sweep = cpu.Sweep(EVERYTHING, AMSGRAD, "bfloat16", "bfloat16", addresses, SIZES)
    sweep.run(gradients, array("d", factors), array("d", numbers))
    assert memory.bits() == theirs.bits()


@pytest.mark.parametrize("offsets", [(1, 1), (0, 1), (1, 0), (3, 2)])
def test_memory_that_no_vector_may_touch(offsets: tuple[int, int]) -> None:
    check(EVERYTHING, AMSGRAD, "float32", (1, 1027), *offsets)
    check(STEP, ADAM, "bfloat16", (1, 1027), *offsets)


def test_what_is_not_finite() -> None:
    for dtype in FLOATS:
        memory = memory_for(STEP, ADAM, dtype, (8,))
        values = [math.nan, math.inf, -math.inf, 3e38, 1e-40, -0.0, 65519.0, 65520.0]
        real = np.dtype(cpu.ARITHMETIC[dtype])
        with np.errstate(over="ignore"):
            memory.streams[0][0][...] = layout.narrowed(np.array(values, real), dtype)
            memory.gradients[0][...] = layout.narrowed(np.array(values[::-1], real), dtype)
        theirs, numbers = memory.copy(), numbers_for(ADAM)
        with np.errstate(all="ignore"):
            launch(STEP, ADAM, dtype, memory, numbers, [1.0])
            on_cpu(STEP, ADAM, dtype, theirs, numbers, [1.0])
        for ours, wanted in zip(memory.streams[0], theirs.streams[0], strict=True):
            if ours is not None:
                kind = dtype if ours is memory.streams[0][0] else ""
                np.testing.assert_array_equal(
                    layout.widened(ours, kind), layout.widened(wanted, kind)
                )


def make_signs(functions: Any) -> Any:
    """A rule that uses the functions that Adam does not."""
    sign, absolute, where, minimum = (
        functions.sign,
        functions.abs,
        functions.where,
        functions.minimum,
    )

    def signs(w: Any, g: Any, slots: Any, c: Any) -> Any:
        rate, limit = c
        trace = minimum(absolute(g), limit)
        return where(g == g, w - rate * sign(g) * trace, w), (trace,)

    return signs


def test_a_rule_of_the_users() -> None:
    check(STEP, Rule(make_signs, ("trace",), ("rate", "limit")), "float32", (1026,))


def test_a_rule_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="written with `def`"):
        kernels.bound(lambda w, g, slots, c: (w, slots))


# --- tables ---


def test_tables_are_of_where_memory_lies_now() -> None:
    numbers = numbers_for(ADAM)
    memory = memory_for(STEP, ADAM, "float32", (1025, 7))
    theirs = memory.copy()
    for _ in range(2):
        launch(STEP, ADAM, "float32", memory, numbers, [1.0, 1.0])
        on_cpu(STEP, ADAM, "float32", theirs, numbers, [1.0, 1.0])
        memory = memory.copy()  # elsewhere
    assert memory.bits() == theirs.bits()


def test_a_table_has_a_word_for_each_chunk_of_a_large_variable() -> None:
    chunks = kernels.chunk_table([3, 0, 5_000_000_000, 1025], "float32")
    tensors, indices = chunks >> 32, chunks & 0xFFFFFFFF
    large = -(-5_000_000_000 // kernels.block_of("float32"))
    assert np.bincount(tensors).tolist() == [1, 0, large, 2]
    assert indices[:2].tolist() == [0, 0] and indices[large] == large - 1
    assert indices[-2:].tolist() == [0, 1]


# --- the clock ---


def test_a_flag_on_the_device_skips_a_pass() -> None:
    memory = memory_for(EVERYTHING, AMSGRAD, "float32", (5, 1030))
    before, numbers = memory.bits(), numbers_for(AMSGRAD)
    for flag in (1.0, math.nan):
        clock = np.array([flag, *numbers])
        launch(EVERYTHING, AMSGRAD, "float32", memory, numbers, [1.0, 1.0], clock)
    assert memory.bits() == before
    clock[0] = 0.0
    launch(EVERYTHING, AMSGRAD, "float32", memory, numbers, [1.0, 1.0], clock)
    assert memory.bits() != before


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_numbers_on_the_device_give_the_bits_of_those_of_the_host(dtype: str) -> None:
    memory = memory_for(EVERYTHING, AMSGRAD, dtype, (5, 1030))
    theirs, numbers = memory.copy(), numbers_for(AMSGRAD)
    factors = [0.7, 1.9]
    launch(EVERYTHING, AMSGRAD, dtype, theirs, numbers, factors)
    clock, nothing = np.array([0.0, *numbers]), [math.nan] * len(numbers)
    launch(EVERYTHING, AMSGRAD, dtype, memory, nothing, factors, clock)
    assert memory.bits() == theirs.bits()


class Numbers32(Numbers):
    single = staticmethod(lambda x: float(np.float32(x)))


@pytest.mark.parametrize("rate", ["float32", "float64"])
@pytest.mark.parametrize(
    "settings", [(True, True, False), (True, False, True), (False, False, True)]
)
def test_a_device_tells_the_numbers_that_the_host_would(
    settings: tuple[bool, bool, bool], rate: str
) -> None:
    decayed, epsilon_hat, is_double = settings
    kind = EVERYTHING._replace(decayed=decayed, penalised=not decayed, overwritten=False)
    host = (0.25, 0.01, 0.9, 0.1, math.log(0.9), 0.1, math.log(0.999), 0.001, 1e-8)
    of_numbers = kind, epsilon_hat, is_double
    constants = kernels.tell_constants(make_numbers, of_numbers, rate, 12)
    wanted = make_numbers(Numbers32, *of_numbers)
    step, skip, scale = np.float32([0.0]), np.float32([0.0]), np.float32([8.0])
    learning_rate = np.array([0.01], rate)
    held = step, skip, scale, learning_rate
    told = np.zeros(13)
    for t in (0, 1, 1000):
        step[0], skip[0] = t, t == 1
        for given in (held, (None, skip, None, None)):
            numbers = (t, 8.0, learning_rate[0]) if given[0] is None else (math.nan,) * 3
            kernels.tell[(1,)](
                told.ctypes.data,
                *(0 if x is None else x.ctypes.data for x in given),
                tuple(map(double, (*numbers, *host))),
                **constants,
            )
            assert told[0] == skip[0]
            assert told[1:].tolist() == list(wanted(float(learning_rate[0]), float(t), 8.0, host))


def test_counts_are_counted_up_unless_a_step_is_skipped() -> None:
    counts = np.arange(1100, dtype=np.float32)
    steps = counts.ctypes.data + 4 * np.arange(1100)
    for flag, wanted in ((1.0, 0), (0.0, 1), (math.nan, 1), (0.0, 2)):
        clock = np.array([flag])
        kernels.count[(2,)](steps.ctypes.data, 1050, clock.ctypes.data, COUNTED=kernels.COUNTED)
        assert (counts[:1050] - np.arange(1050) == wanted).all()
    assert (counts[1050:] == np.arange(1050, 1100)).all()


# --- norms ---


def test_sums_of_squares_and_what_they_clip_by() -> None:
    memory = memory_for(NORM, NOTHING, "float32", (70, 2049, 0, 1024))
    # What would overflow in single precision, or vanish.
    memory.gradients[0][...] = 1e30
    memory.gradients[3][...] = 1e-30
    partials = launch(NORM, NOTHING, "float32", memory, numbers_for(NOTHING), [])
    scale = np.float32(numbers_for(NOTHING)[0])
    squares = [math.fsum((np.float64(x / scale)) ** 2 for x in g) for g in memory.gradients]
    starts = [0, 1, 4, 4, 5]
    segments = np.array([[partials.ctypes.data + 8 * a, b - a] for a, b in pairwise(starts)])
    every, joint = np.arange(5), np.array([0, 4])
    for clip in (clip_factor, clip_factor_global, clip_factor_joint, None):
        for firsts in (every, joint):
            wanted = squares if firsts is every else [math.fsum(squares)]
            sums, factors = np.zeros(len(wanted)), np.zeros(len(wanted))
            kernels.factor[(len(wanted),)](
                *(x.ctypes.data for x in (segments, firsts, sums, factors)),
                double(3.0),
                **kernels.factor_constants(clip),
            )
            np.testing.assert_allclose(sums, wanted, rtol=1e-14)
            if clip is not None:
                norms = map(math.sqrt, sums)
                assert factors.tolist() == [clip(Numbers, norm, 3.0) for norm in norms]


def test_one_factor_may_clip_all() -> None:
    clipped = STEP._replace(clipped_by_factor=True)
    memory = memory_for(clipped, ADAM, "float32", (5, 7))
    theirs, numbers = memory.copy(), numbers_for(ADAM)
    launch(clipped, ADAM, "float32", memory, numbers, [0.3], joint=True)
    on_cpu(clipped, ADAM, "float32", theirs, numbers, [0.3, 0.3])
    assert memory.bits() == theirs.bits()
