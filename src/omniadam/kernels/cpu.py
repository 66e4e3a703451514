"""The step on a CPU: one call over all variables, one pass over their memory.

The work is a list of chunks of at most `CHUNK` elements. Whoever runs a kernel takes chunks from a
shared counter until none is left: the calling thread always, and for large work helper threads
that are woken beside it. A helper that the operating system has no core for takes nothing and is
not waited for, so that a busy machine delays a step by one chunk at most; and as a chunk's result
depends on its own elements only, results are the same to the bit for any number of threads.
"""

from __future__ import annotations

import math
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from importlib.metadata import version
from itertools import pairwise, starmap
from operator import call
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import rule as arithmetic
from .. import slow, versions
from ..rule import MEASURES, Pass, PassCoefficients, Rule
from ..tuned import CHUNK, PARALLEL
from . import jit

# Element types a kernel reads: storage in memory, arithmetic in registers.
STORAGE = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.uint16,
    "bfloat16": np.uint16,
}
ARITHMETIC = {
    "float32": "float32",
    "float64": "float64",
    "float16": "float32",
    "bfloat16": "float32",
}

# No flag: every operation is rounded as it is written, so that a rule gives the same bits wherever
# it is compiled, and a NaN stays one. A sum of squares may be reordered, which vectorises it; the
# order is then fixed in the machine code.
_ELEMENTWISE = frozenset[str]()
_REDUCING = frozenset({"reassoc"})
PASS_C, _ZERO = len(PassCoefficients._fields), PassCoefficients._fields.index("zero")

# The words of a job, a small array of int64 that a kernel is given the address of.
_ADDRESSES, _GRADIENTS, _CHUNKS, COUNT, _FACTORS, COEFFICIENTS, _PARTIALS = range(7)
NEXT, DONE, _RESULT, IGNORED, KERNEL = 7, 8, 9, 10, 11
WORDS = 12

Int64s = npt.NDArray[np.int64]


def available() -> bool:
    """Whether the compiled kernels can be used: Numba is there and OMNIADAM_KERNEL allows it."""
    if _switched_off():
        return False
    if problem := _numba_problem():
        needed = f"numba>={versions.OLDEST['numba']}"
        slow.warn(
            f"{problem}, so that steps run on NumPy, several times slower: pip install '{needed}'. "
            "Where that is meant, OMNIADAM_KERNEL=numpy says so."
        )
    return not problem


def why_not() -> str:
    """Why the compiled kernels cannot be used, in words; empty if they can."""
    return _switched_off() or _numba_problem()


def choice() -> str:
    """What OMNIADAM_KERNEL asks for.

    Nothing, the fastest there is; "triton", that the kernels of GPUs be used; "numba", the CPU's
    alone; "numpy", none.
    """
    found = os.environ.get("OMNIADAM_KERNEL", "")
    if found not in ("", "triton", "numba", "numpy"):
        raise ValueError(
            f"OMNIADAM_KERNEL must be 'triton', 'numba' or 'numpy'. Received: {found!r}"
        )
    return found


def _switched_off() -> str:
    if choice() == "numpy":
        return "OMNIADAM_KERNEL is numpy"
    off = os.environ.get("NUMBA_DISABLE_JIT", "0")
    return f"NUMBA_DISABLE_JIT is {off}" if off not in ("", "0") else ""


@cache
def _numba_problem() -> str:
    from importlib.util import find_spec

    if missing := [name for name in ("numba", "llvmlite") if find_spec(name) is None]:
        return f"{missing[0]} is not installed"
    found = version("numba")
    if versions.is_too_old("numba", found):
        return (
            f"omniadam's kernels need numba {versions.OLDEST['numba']} or newer; "
            f"numba {found} is installed"
        )
    return ""


# --- what the kernels are made of; everything below this line up to `_kernel` runs inside Numba ---

# Most of the time that a kernel takes to compile goes to the small functions that it calls. They
# are made once in a process, so that Numba compiles each once for its types, and not each time.


@cache
def _primitives() -> Any:
    """Loads, stores and conversions in Numba's terms."""
    import numba
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def pointer(_: Any, address: Any, kind: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target = context.get_value_type(kind.dtype).as_pointer()
            return builder.inttoptr(args[0], target)

        return types.CPointer(kind.dtype)(address, kind), generate

    def atomic(operation: str) -> Any:
        @intrinsic
        def on_word(_: Any, address: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                target = builder.inttoptr(args[0], cgutils.intp_t.as_pointer())
                return builder.atomic_rmw(operation, target, args[1], "seq_cst")

            return types.int64(types.int64, types.int64), generate

        return on_word

    def convert(source: Any, target: Any, path: Callable[[Any, Any], Any]) -> Any:
        @intrinsic
        def conversion(_: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return path(builder, args[0])

            return target(source), generate

        return conversion

    half, single = ir.HalfType(), ir.FloatType()
    # Nobody calls such a function from Python, and what would let one is half of what is compiled.
    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    inline = numba.njit(fastmath=set(_ELEMENTWISE), **options)
    summing = numba.njit(fastmath=set(_REDUCING), **options)
    double = np.float64

    @inline
    def stored(array: Any, i: int, value: Any) -> Any:
        array[i] = value
        return value

    @summing
    def squared(x: Any) -> Any:
        return double(x) * double(x)

    class primitives:
        int64, float64 = types.int64, types.float64
        view = staticmethod(numba.carray)
        to_pointer = staticmethod(pointer)
        fetch_add = staticmethod(atomic("add"))
        exchange = staticmethod(atomic("xchg"))
        njit, reducing = staticmethod(inline), staticmethod(summing)
        put, square = staticmethod(stored), staticmethod(squared)
        half_to_single = convert(
            types.uint16,
            types.float32,
            lambda b, x: b.fpext(b.bitcast(x, half), single),
        )
        single_to_half = convert(
            types.float32,
            types.uint16,
            lambda b, x: b.bitcast(b.fptrunc(x, half), ir.IntType(16)),
        )
        single_to_bits = convert(
            types.float32, types.uint32, lambda b, x: b.bitcast(x, ir.IntType(32))
        )
        bits_to_single = convert(types.uint32, types.float32, lambda b, x: b.bitcast(x, single))

    return primitives


@cache
def _conversions(p: Any, dtype: str) -> tuple[Any, Any, Any]:
    """From what is stored for an element of `dtype` to the float that is computed with, and back.

    The third rounds such a float to one that can be stored.
    """
    if dtype == "float16":
        half_to_single, single_to_half = p.half_to_single, p.single_to_half
        widen, narrow = p.njit(lambda x: half_to_single(x)), p.njit(lambda x: single_to_half(x))
    elif dtype == "bfloat16":
        single_to_bits, bits_to_single = p.single_to_bits, p.bits_to_single
        uint16, uint32 = np.uint16, np.uint32
        # Half of a unit in the last place that is kept, one less so that ties go to the even one.
        half, one, quiet = np.uint32(0x7FFF), np.uint32(1), np.uint16(0x7FC0)

        @p.njit
        def widen(x: Any) -> Any:
            return bits_to_single(uint32(x) << uint32(16))

        @p.njit
        def narrow(x: Any) -> Any:
            bits = single_to_bits(x)
            kept = uint16((bits + (half + ((bits >> uint32(16)) & one))) >> uint32(16))
            return quiet if x != x else kept

    else:
        identity = p.njit(lambda x: x)
        return identity, identity, identity
    return widen, narrow, p.njit(lambda x: widen(narrow(x)))


@cache
def _functions(p: Any) -> Any:
    """`rule.Functions` as Numba compiles them."""

    class functions:
        sqrt = staticmethod(math.sqrt)
        divide = staticmethod(p.njit(lambda a, b: a / b))
        minimum = staticmethod(p.njit(lambda a, b: a if a < b or a != a else b))
        maximum = staticmethod(p.njit(lambda a, b: a if a > b or a != a else b))
        where = staticmethod(p.njit(lambda condition, a, b: a if condition != 0 else b))
        abs = staticmethod(p.njit(lambda x: abs(x)))
        sign = staticmethod(p.njit(lambda x: np.sign(x)))

    return functions


@cache
def _update(p: Any, rule: Rule) -> Any:
    return p.njit(rule.bind(_functions(p)))


@cache
def _tuple(njit: Any, arguments: str, item: str, count: int, **names: Any) -> Any:
    """A function that returns a tuple of so many items, in which {k} is 0, 1, ...

    Numba has no loop over what a tuple is made of: the items are written out.
    """
    items = "".join(f"{item.format(k=k)}, " for k in range(count))
    return njit(eval(f"lambda {arguments}: ({items})", names))


def _build_pass(kind: Pass, rule: Rule, dtype: str, gradient_dtype: str) -> Any:
    """The kernel that takes every element of its chunks through `kind`.

    The sums of squares of what is measured go to the partial results, in double.
    """
    import numba

    p = _primitives()
    stored, read = STORAGE[dtype], STORAGE[gradient_dtype]
    real, double = np.dtype(ARITHMETIC[dtype]).type, np.float64
    stored_type, read_type = numba.from_dtype(np.dtype(stored)), numba.from_dtype(np.dtype(read))
    real_type = numba.from_dtype(np.dtype(real))
    stored_size, read_size = np.dtype(stored).itemsize, np.dtype(read).itemsize
    real_size = np.dtype(real).itemsize
    int64, float64, view, to_pointer = p.int64, p.float64, p.view, p.to_pointer
    fetch_add = p.fetch_add

    functions = _functions(p)
    widen, narrow, rounded = _conversions(p, dtype)
    widen_gradient, _, _ = _conversions(p, gradient_dtype)
    gradient = p.njit(arithmetic.make_gradient(kind, functions))
    update = _update(p, rule)
    element = p.njit(arithmetic.make_element(kind, update, gradient, functions, rounded))
    measures = [p.njit(MEASURES[name](functions)) for name in kind.measured]

    slots, coefficients, measured = len(rule.slots), len(rule.coefficients), len(measures)
    width = slots + 3  # w, slots, accumulator, average
    has_gradient, accumulated, averaged = kind.gradient, kind.accumulated, kind.averaged
    runs, stores, factored = not kind.measures_only, kind.stores_variable, kind.clipped_by_factor
    accumulates, held = kind.stores_accumulator, slots if kind.stores_slots else 0

    names = {"real": real, "real_type": real_type, "view": view, "to_pointer": to_pointer}
    pass_numbers = _tuple(p.njit, "c", "real(c[{k}])", PASS_C, **names)
    rule_numbers = _tuple(p.njit, "c", f"real(c[{PASS_C} + {{k}}])", coefficients, **names)
    slot = "view(to_pointer(row[{k} + 1] + at, real_type), (n,))"
    slots_of = _tuple(p.njit, "row, at, n", slot, held, **names)
    values_of = _tuple(p.njit, "arrays, i", "arrays[{k}][i]", held)
    put_values = _tuple(p.njit, "arrays, i, x", "put(arrays[{k}], i, x[{k}])", held, put=p.put)
    measure = {f"measure_{k}": each for k, each in enumerate(measures)} | {"square": p.square}
    squares = "total[{k}] + square(measure_{k}(g, before, after))"
    nothing = _tuple(p.njit, "zero", "double(zero)", measured, double=double)
    added = _tuple(p.reducing, "total, g, before, after", squares, measured, **measure)
    put_sums = _tuple(p.njit, "to, i, x", "put(to, i + {k}, x[{k}])", measured, put=p.put)

    def kernel(job: int) -> Any:
        j = view(to_pointer(job, int64), (WORDS,))
        count = j[COUNT]
        while True:
            # Nothing but the job is read before a chunk is taken: without one, the step may be over
            # and its arrays gone.
            k = fetch_add(job + 8 * NEXT, 1)
            if k >= count:
                break
            c = view(to_pointer(j[COEFFICIENTS], float64), (PASS_C + coefficients,))
            pass_c, rule_c = pass_numbers(c), rule_numbers(c)
            zero = pass_c[_ZERO]
            chunks = view(to_pointer(j[_CHUNKS], int64), (5 * count,))
            tensor, offset, n = chunks[5 * k], chunks[5 * k + 1], chunks[5 * k + 2]
            row = view(to_pointer(j[_ADDRESSES] + 8 * width * tensor, int64), (width,))
            w = view(to_pointer(row[0] + offset * stored_size, stored_type), (n,))
            at = offset * real_size
            s = slots_of(row, at, n)
            accumulator = view(to_pointer(row[slots + 1] + at, real_type), (n,))
            average = view(to_pointer(row[slots + 2] + at, real_type), (n,))
            if has_gradient:
                sources = view(to_pointer(j[_GRADIENTS] + 8 * chunks[5 * k + 3], int64), (1,))
                start = sources[0] + chunks[5 * k + 4] * read_size
                g = view(to_pointer(start, read_type), (n,))
            if factored:
                factor = real(view(to_pointer(j[_FACTORS] + 8 * tensor, float64), (1,))[0])
            else:
                factor = zero
            totals = nothing(zero)
            for i in range(n):
                x = real(widen_gradient(g[i])) if has_gradient else zero
                if runs:
                    before = widen(w[i])
                    new_w, new_slots, new_accumulator, new_average = element(
                        before,
                        x,
                        values_of(s, i),
                        accumulator[i] if accumulated else zero,
                        average[i] if averaged else zero,
                        factor,
                        rule_c,
                        pass_c,
                    )
                else:
                    before, new_w = zero, zero
                if measured:
                    x = gradient(x, accumulator[i] if accumulated else zero, pass_c)
                    totals = added(totals, x, before, new_w)
                if runs:
                    put_values(s, i, new_slots)
                    if accumulates:
                        accumulator[i] = new_accumulator
                    if averaged:
                        average[i] = new_average
                    if stores:
                        w[i] = narrow(new_w)
            if measured:
                partials = view(to_pointer(j[_PARTIALS], float64), (count * measured,))
                put_sums(partials, k * measured, totals)
            fetch_add(job + 8 * DONE, 1)
        return fetch_add(job + 8 * DONE, 0)

    return kernel


# --- running kernels ---


@cache
def _kernel(kind: Pass, rule: Rule, dtype: str, gradient_dtype: str) -> jit.Kernel:
    return jit.compiled(
        lambda: _build_pass(kind, rule, dtype, gradient_dtype),
        repr((kind, rule.identity, dtype, gradient_dtype)),
        (
            jit.source_of(__name__),
            jit.source_of(arithmetic.__name__),
            jit.source_of(rule.make.__module__),
        ),
        _REDUCING if kind.measured else _ELEMENTWISE,
    )


class _Helpers:
    """Threads that wait to share a kernel's chunks, started when first needed."""

    def __init__(self) -> None:
        # A function, its arguments, and what must live as long as it runs.
        self._queue: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], Any]] = SimpleQueue()
        self._running = 0

    def started(self, count: int) -> int:
        """Start threads until there are so many, and return how many of them there are."""
        # None can be started while the interpreter exits; the caller does the work alone then.
        with suppress(RuntimeError):
            while self._running < count:
                threading.Thread(target=self._serve, name="omniadam", daemon=True).start()
                self._running += 1
        return min(count, self._running)

    def wakers(self, count: int, kernel: jit.Kernel, job: array[int]) -> list[tuple[Any, ...]]:
        """Calls that let so many helpers take chunks of a job."""
        address, _ = job.buffer_info()
        # What a step waits for is written by its own thread alone.
        task = kernel, (address + 8 * IGNORED, 0, address), job
        return [(self._queue.put, task)] * self.started(count)

    def result(self, action: Callable[[], Any]) -> Any:
        """What an action returns that is done by a helper, which no signal interrupts."""
        if not self.started(1):
            return action()
        results, errors, begun = list[Any](), list[BaseException](), list[bool]()
        gate = threading.Lock()  # an Event is written in Python, and an interrupt can break it
        gate.acquire()

        def task() -> None:
            try:
                results.append(action())
            except BaseException as error:  # raised where it is waited for
                errors.append(error)
            gate.release()

        # In one call, the wait included: an interrupt finds a task that is to be waited for, which
        # is then done below, or none.
        task_and_wait = [(self._queue.put, (task, (), None)), (begun.append, True), (gate.acquire,)]
        try:
            list(starmap(call, task_and_wait))
        finally:
            if begun:
                _until(lambda: bool(results or errors), gate.acquire)
        if errors:
            raise errors[0]
        return results[0]

    def _serve(self) -> None:
        while True:
            function, arguments, held = self._queue.get()
            function(*arguments)
            del function, arguments, held  # else the last arrays would live until the next step


def _until(is_done: Callable[[], bool], wait: Callable[[], Any]) -> None:
    """Wait until it is so, however often Ctrl-C is pressed; the last time is then raised."""
    try:
        while not is_done():
            wait()
    finally:
        if not is_done():
            _until(is_done, wait)


_helpers = _Helpers()


def _forget_helpers() -> None:
    global _helpers
    _helpers = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def threads(most: int | None = None) -> int:
    """How many threads a large step uses: OMNIADAM_NUM_THREADS if that is set.

    Else the cores of this process, but no more than OMP_NUM_THREADS says or than `most`, which a
    library may have been set to.
    """
    setting = os.environ.get("OMNIADAM_NUM_THREADS", "")
    if setting:
        return _chosen_threads(setting)
    found = _default_threads(os.environ.get("OMP_NUM_THREADS", ""))
    return found if most is None else min(found, most)


@cache
def _chosen_threads(setting: str) -> int:
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"OMNIADAM_NUM_THREADS must be an integer >= 1. Received: {setting!r}")
    return int(setting)


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@cache
def _default_threads(openmp: str) -> int:
    most = cores()
    outermost = openmp.partition(",")[0].strip()  # it may be a list, by depth of nesting
    return min(most, int(outermost)) if outermost.isdecimal() and int(outermost) else most


class Work:
    """What a step writes: prepared first, kernel by kernel, and then done as a whole or not at all.

    What can fail, or may be interrupted, belongs to the preparation. The whole is one call of the
    interpreter's own functions, among which no signal handler runs and no other error comes up.
    """

    _jobs: Sequence[tuple[jit.Kernel, array[int]]] = ()  # that helpers share
    _is_native = True

    def __init__(self) -> None:
        # Functions with their arguments, in order; written in C, and such as cannot fail.
        self.calls: list[tuple[Any, ...]] = []
        self._held: list[Any] = []  # what kernels read

    def add_python(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Add a call of a function in Python, which touches nothing but memory."""
        self._is_native = False
        self.calls.append((function, *arguments))

    def add_kernel(
        self, kernel: jit.Kernel, job: array[int], helpers: int, held: tuple[Any, ...]
    ) -> None:
        """Add all chunks of a job, which as many helpers may share."""
        if helpers > 0:
            self.calls += _helpers.wakers(helpers, kernel, job)
            self._jobs = [*self._jobs, (kernel, job)]
        address, _ = job.buffer_info()
        self.add_call((kernel, address + 8 * _RESULT, 0, address), job, held)

    def add_call(self, call: tuple[Any, ...], *held: Any) -> None:
        """Add a call of a function in C, and what must live until it is done."""
        self.calls.append(call)
        self._held.append(held)

    def whole(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """What an action returns that ends in `do`; it is not interrupted once it has begun that.

        Signals are handled in the main thread, between any two steps of a function in Python.
        """
        if self._is_native or threading.current_thread() is not threading.main_thread():
            return action(*arguments)
        return _helpers.result(partial(action, *arguments))

    def do(self) -> None:
        """Do all of it, and return when all is done."""
        calls = starmap(call, self.calls)  # after which an interrupt may come, so that none is done
        try:
            list(calls)  # one call of C, of nothing but C
        finally:  # helpers must not outlive the memory that they work on
            if self._jobs:
                for kernel, job in self._jobs:
                    _finish(kernel, job)


def _finish(kernel: jit.Kernel, job: array[int]) -> None:
    """Wait for a helper that is in the middle of its last chunk."""
    address, _ = job.buffer_info()

    def look() -> None:
        time.sleep(0)
        kernel(address + 8 * _RESULT, 0, address)

    _until(lambda: job[_RESULT] >= job[COUNT], look)


class Team:
    """The threads that share large work: the one that has it to do, and helpers.

    Args:
        most: how many threads there may be, if a library says so; asked at each step.
    """

    def __init__(self, most: Callable[[], int | None] = lambda: None) -> None:
        self._most = most

    @property
    def smallest(self) -> int:
        """Elements in a step, below which one thread does it."""
        return PARALLEL

    def size(self) -> int:
        """How many threads there are now."""
        return threads(self._most())

    def add_to(
        self, work: Work, kernel: jit.Kernel, job: array[int], size: int, held: tuple[Any, ...]
    ) -> None:
        """Add all chunks of a job, for so many threads; what is held lives until they are done."""
        work.add_kernel(kernel, job, size - 1, held)


HELPERS = Team()


class SparseRows(NamedTuple):
    """A gradient that is zero but for some rows: sorted distinct rows, and a row of values each."""

    rows: Int64s
    values: npt.NDArray[Any]

    def dense(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements `start` to `stop` of the whole gradient, counted in C order."""
        width = math.prod(self.values.shape[1:])
        first, last = self._used_before(start, width), self._used_before(stop, width)
        used = np.arange(first, last)
        dense = np.zeros(stop - start, self.values.dtype)
        at = self.rows[used // width] * width + used % width - start
        dense[at] = self.values.reshape(-1)[first:last]
        return dense

    def _used_before(self, position: int, width: int) -> int:
        row, column = divmod(position, width)
        i = int(np.searchsorted(self.rows, row))
        is_used = i < len(self.rows) and self.rows[i] == row
        return i * width + (column if is_used else 0)


def _dense_chunks(sizes: Sequence[int]) -> Int64s:
    """Rows of (tensor, offset, length, gradient, gradient offset)."""
    every = np.array(sizes, np.int64)
    counts = -(-every // CHUNK)
    tensors = np.repeat(np.arange(len(every)), counts)
    chunks = np.empty((len(tensors), 5), np.int64)
    chunks[:, 0] = chunks[:, 3] = tensors
    first = np.repeat(np.cumsum(counts) - counts, counts)
    chunks[:, 1] = chunks[:, 4] = (np.arange(len(tensors)) - first) * CHUNK
    chunks[:, 2] = np.minimum(CHUNK, every[tensors] - chunks[:, 1])
    return chunks


def _sparse_chunks(size: int, rows: SparseRows) -> Int64s:
    """As `_dense_chunks` for one tensor, where gradient 0 is the rows' values and 1 is zeros.

    Consecutive rows that are used, or not, form runs; a run is cut into chunks.
    """
    used, width = rows.rows, math.prod(rows.values.shape[1:])
    breaks = np.flatnonzero(np.diff(used) != 1) + 1
    first = used[np.concatenate(([0], breaks))] if len(used) else used
    last = used[np.concatenate((breaks - 1, [len(used) - 1]))] if len(used) else used
    # Runs in order of memory: the gap before each run of used rows, that run, and the last gap.
    starts = np.zeros(2 * len(first) + 1, np.int64)
    starts[1::2], starts[2::2] = first * width, (last + 1) * width
    lengths = np.diff(np.append(starts, size))
    is_used = np.arange(len(starts)) % 2 == 1
    base = np.zeros(len(starts), np.int64)
    base[is_used] = np.concatenate(([0], np.cumsum(lengths[is_used])))[:-1]
    cuts = -(-lengths // CHUNK)
    run = np.repeat(np.arange(len(starts)), cuts)
    within = (np.arange(len(run)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * CHUNK
    chunks = np.zeros((len(run), 5), np.int64)
    chunks[:, 1] = starts[run] + within
    chunks[:, 2] = np.minimum(CHUNK, lengths[run] - within)
    chunks[:, 3] = ~is_used[run]
    chunks[:, 4] = np.where(is_used[run], base[run] + within, 0)
    return chunks


def _address(values: npt.NDArray[Any]) -> int:
    return int(values.ctypes.data)


_zeros = np.zeros(CHUNK, np.float64)  # the gradient of unused rows, whatever its type

# What a pass measured, of each variable in order, to be asked for when the pass is done.
Sums = Callable[[], list[tuple[float, ...]]]
_NO_PARTIALS = array("d")


def _nothing_measured() -> list[tuple[float, ...]]:
    return []


class Sweep:
    """A pass over flat memory of one element type, prepared once and run at each step.

    Args:
        kind: what the pass does.
        rule: the optimizer's rule.
        dtype: of the variables; float32, float64, float16 or bfloat16.
        gradient_dtype: of every gradient; likewise.
        addresses: a row a variable, of the addresses of the variable, its slots, its accumulator
            and its average, 0 where `kind` has no use for one.
        sizes: in elements, one a variable.
        sparse: the rows of the gradient, for a single variable whose gradient is sparse.
        team: who shares the work, if there is much.
    """

    def __init__(
        self,
        kind: Pass,
        rule: Rule,
        dtype: str,
        gradient_dtype: str,
        addresses: Sequence[Sequence[int]],
        sizes: Sequence[int],
        sparse: SparseRows | None = None,
        team: Team = HELPERS,
    ) -> None:
        self._of = kind, rule, dtype, gradient_dtype
        self._team = team
        self._elements = sum(sizes)
        self._chunks = _sparse_chunks(sizes[0], sparse) if sparse else _dense_chunks(sizes)
        self._addresses = np.array(addresses, np.int64)
        # A variable without elements has no chunk and must not take its neighbour's sum.
        self._first_chunk = np.searchsorted(self._chunks[:, 0], np.arange(len(sizes) + 1)).tolist()
        self._sources = array("q", [_address(sparse.values), _address(_zeros)]) if sparse else None
        self._job = array("q", [0] * WORDS)
        self._job[_ADDRESSES] = _address(self._addresses)
        self._job[_CHUNKS] = _address(self._chunks)
        self._job[COUNT] = len(self._chunks)

    # Found on first use: a pass that is only prepared compiles nothing.
    @cached_property
    def _kernel(self) -> jit.Kernel:
        return _kernel(*self._of)

    def _prepared(
        self,
        gradients: array[int],
        factors: array[float],
        coefficients: array[float],
    ) -> array[int]:
        job = self._job[:]  # each run has its own counters: a helper may come late to an old one
        job[_GRADIENTS] = (self._sources or gradients).buffer_info()[0]
        job[_FACTORS] = factors.buffer_info()[0]
        job[COEFFICIENTS] = coefficients.buffer_info()[0]
        return job

    def add_to(
        self,
        work: Work,
        gradients: array[int],
        factors: array[float],
        coefficients: array[float],
    ) -> Sums:
        """Prepare to update the variables.

        Args:
            work: that it becomes a part of.
            gradients: an address a variable; not used if the gradient is sparse, or if there is
                none.
            factors: what each gradient is multiplied by, if the pass clips by a factor.
            coefficients: the fields of `PassCoefficients`, and then the rule's coefficients.

        Returns:
            What the pass measures, once the work is done: a row a variable.
        """
        job = self._prepared(gradients, factors, coefficients)
        measured = len(self._of[0].measured)
        partials = _NO_PARTIALS
        if measured:
            partials = array("d", bytes(8 * len(self._chunks) * measured))
            job[_PARTIALS] = partials.buffer_info()[0]
        held = self, gradients, factors, coefficients, partials
        team = self._team
        if self._elements < team.smallest or (size := min(team.size(), len(self._chunks))) < 2:
            work.add_kernel(self._kernel, job, 0, held)
        else:
            team.add_to(work, self._kernel, job, size, held)
        return partial(self._sums, partials, measured) if measured else _nothing_measured

    def _sums(self, partials: array[float], measured: int) -> list[tuple[float, ...]]:
        # In the order of memory, so that a sum does not depend on who computed which chunk.
        return [
            tuple(
                sum(partials[start * measured + k : stop * measured : measured])
                for k in range(measured)
            )
            for start, stop in pairwise(self._first_chunk)
        ]

    def run(self, *arguments: array[Any]) -> list[tuple[float, ...]]:
        """Update the variables at once, by the arguments of `add_to` but the first.

        Returns:
            What the pass measures: a row a variable.
        """
        work = Work()
        sums = self.add_to(work, *arguments)
        work.whole(work.do)
        return sums()
