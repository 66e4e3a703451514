"""The CPU kernels inside a program of XLA: one custom call, in place on the buffers that XLA gives.

XLA makes a loop of each array that a step returns: momentum, velocity and variable are passed over
one after the other, and each loop of each variable is a task of its own. The kernels of `cpu.py`
pass once over all of them. XLA calls them through its stable interface for foreign functions
(`xla/ffi/api/c_api.h`, shipped with jaxlib), as machine code: no Python runs, and no lock of the
interpreter is needed, so that a step stays as asynchronous as any other program of JAX.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from .. import rule as arithmetic
from ..kernels import cpu, jit
from ..rule import Pass, Rule
from ..tuned import PARALLEL

# What a job holds beside the words that a kernel reads.
_KERNEL, _TASK, _HELPERS, _YIELD, _COUNT_OF_PLACES, _PLACES, _COEFFICIENTS = range(
    cpu.WORDS, cpu.WORDS + 7
)
_COUNT_OF_COEFFICIENTS, _FIRST_CHUNKS, _TENSORS, _MEASURED = range(cpu.WORDS + 7, cpu.WORDS + 11)
_ARGUMENTS = cpu.WORDS + 11  # five words, of which XLA's functions take their arguments
_BUSY = _ARGUMENTS + 5  # by whom a call was begun that is not over: one, or those who wait as well
_KEY, _LINK = _BUSY + 1, _BUSY + 2  # what a program knows a job by, and the next job
_WORDS = _BUSY + 3
# Sizes in bytes of the structures that XLA hands over, as it states them; of those that may grow at
# their ends, how much of them is read.
_FRAME, _API, _EXTENSION = 15 * 8, 18 * 8, 24
_VERSION, _ARRAYS, _BUFFER = 24, 40, 48


def _primitives() -> tuple[Any, Any]:
    """Calls of functions by their address: of C, and of Numba's kernels."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    word, status = ir.IntType(64), ir.IntType(32)

    @intrinsic
    def call(_: Any, function: Any, argument: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(word, [word])
            return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])

        return types.int64(types.int64, types.int64), generate

    @intrinsic
    def call_kernel(_: Any, function: Any, result: Any, argument: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(status, [word, word, word])
            kernel = builder.inttoptr(args[0], kind.as_pointer())
            builder.call(kernel, [args[1], word(0), args[2]])
            return args[2]

        return types.int64(types.int64, types.int64, types.int64), generate

    return call, call_kernel


def _build_handler() -> Any:
    """What XLA calls: it is given a frame, whose words are those of `XLA_FFI_CallFrame`.

    Its argument is where the address of that frame stands, and behind it that of `_root`.
    """
    import numba

    p = cpu._primitives()
    call, call_kernel = _primitives()
    int64, float64, view, to_pointer = p.int64, p.float64, p.view, p.to_pointer
    int32, float32 = numba.types.int32, numba.types.float32
    fetch_add, exchange = p.fetch_add, p.exchange

    @p.njit
    def data_of(buffer: int) -> Any:
        return view(to_pointer(buffer + 24, int64), (1,))[0]

    @p.njit
    def version_of(api: int) -> Any:
        """XLA's minor version, where it states the sizes and the major version known here."""
        if api == 0:  # XLA of jaxlib 0.8.0 and before registers without stating any
            return -1
        sizes = view(to_pointer(api, int64), (3,))
        if sizes[0] < _API or sizes[2] != _VERSION:
            return -1
        given = view(to_pointer(api + 32, int32), (2,))
        return int64(given[1]) if given[0] == 0 else -1

    def handler(given_addresses: int) -> Any:
        frame, root_address = view(to_pointer(given_addresses, int64), (2,))
        f = view(to_pointer(frame, int64), (15,))
        if f[0] < _FRAME:
            return 0
        minor = version_of(f[2])
        if f[1] != 0:
            extension = view(to_pointer(f[1], int64), (1,))
            kind = view(to_pointer(f[1] + 8, int32), (1,))[0]
            if extension[0] >= _EXTENSION and kind == 1:  # XLA asks what this is written for
                metadata = view(to_pointer(f[1] + 24, int64), (1,))[0]
                version = view(to_pointer(metadata + 24, int32), (2,))
                version[0], version[1] = (0 if minor >= 0 else -1), minor
                return 0
        # What has another size than here is left alone: `kernels_work` sees that nothing is done.
        if minor < 0 or f[5] != _ARRAYS or f[10] != _ARRAYS:
            return 0
        if view(to_pointer(frame + 32, int32), (1,))[0] != 3:  # not the stage of execution
            return 0
        arguments = view(to_pointer(f[9], int64), (f[7],))
        if view(to_pointer(arguments[0], int64), (1,))[0] != _BUFFER:
            return 0
        key = view(to_pointer(data_of(arguments[0]), int64), (1,))[0]
        job = view(to_pointer(root_address, int64), (1,))[0]
        while job != 0:
            j = view(to_pointer(job, int64), (_WORDS,))
            if j[_KEY] == key:
                break
            job = j[_LINK]
        if job == 0:
            return call(view(to_pointer(f[2] + 48, int64), (1,))[0], root_address + 8)
        j = view(to_pointer(job, int64), (_WORDS,))
        # A program may run several times at once: on other devices, or on what does not depend on
        # each other. A job has room for one.
        while fetch_add(job + 8 * _BUSY, 1) != 0:
            fetch_add(job + 8 * _BUSY, -1)
            if j[_YIELD] != 0:
                call(j[_YIELD], 0)
        n = j[_COUNT_OF_COEFFICIENTS]
        to = view(to_pointer(j[_COEFFICIENTS], float64), (n,))
        if view(to_pointer(arguments[1] + 16, int32), (1,))[0] == 12:  # XLA_FFI_DataType_F64
            wide = view(to_pointer(data_of(arguments[1]), float64), (n,))
            for i in range(n):
                to[i] = wide[i]
        else:
            narrow = view(to_pointer(data_of(arguments[1]), float32), (n,))
            for i in range(n):
                to[i] = float64(narrow[i])
        places = view(to_pointer(j[_PLACES], int64), (j[_COUNT_OF_PLACES],))
        for i in range(j[_COUNT_OF_PLACES]):
            view(to_pointer(places[i], int64), (1,))[0] = data_of(arguments[2 + i])
        # A helper may come as late as this from the step before: it finds nothing to do until all
        # the rest is in its place.
        exchange(job + 8 * cpu.DONE, 0)
        exchange(job + 8 * cpu.NEXT, 0)
        for _ in range(j[_HELPERS]):
            j[_ARGUMENTS], j[_ARGUMENTS + 1], j[_ARGUMENTS + 2] = 40, 0, f[3]
            j[_ARGUMENTS + 3], j[_ARGUMENTS + 4] = j[_TASK], job
            schedule = view(to_pointer(f[2] + 136, int64), (1,))[0]
            error = call(schedule, job + 8 * _ARGUMENTS)
            if error != 0:  # there is no pool of threads
                j[_ARGUMENTS], j[_ARGUMENTS + 1], j[_ARGUMENTS + 2] = 24, 0, error
                destroy = view(to_pointer(f[2] + 64, int64), (1,))[0]
                call(destroy, job + 8 * _ARGUMENTS)
        call_kernel(j[_KERNEL], job + 8 * cpu._RESULT, job)
        while fetch_add(job + 8 * cpu.DONE, 0) < j[cpu.COUNT]:
            if j[_YIELD] != 0:
                call(j[_YIELD], 0)
        m = j[_MEASURED]
        if m != 0:
            partials = view(to_pointer(j[cpu._PARTIALS], float64), (j[cpu.COUNT] * m,))
            first = view(to_pointer(j[_FIRST_CHUNKS], int64), (j[_TENSORS] + 1,))
            # What was measured is the last result.
            result = view(to_pointer(f[14], int64), (f[12],))[f[12] - 1]
            n = j[_TENSORS]
            sums = view(to_pointer(data_of(result), float32), (2, n, m))
            sums_wide = view(to_pointer(data_of(result), float64), (2, n, m))
            is_wide = view(to_pointer(result + 16, int32), (1,))[0] == 12
            for at in range(n * m):
                tensor, which = at // m, at % m
                total, scale = 0.0, 1.0
                for k in range(first[tensor], first[tensor + 1]):
                    total += partials[k * m + which]
                # The sum of what was divided by the scale, for float32 to hold it.
                while 2.0**64 < total < np.inf and scale < 2.0**96:
                    total, scale = total * 2.0**-64, scale * 2.0**32
                while 0.0 < total < 2.0**-64 and scale > 2.0**-96:
                    total, scale = total * 2.0**64, scale * 2.0**-32
                if total == 0.0:  # of no weight beside others
                    scale = 2.0**-126
                if is_wide:
                    sums_wide[0, tensor, which], sums_wide[1, tensor, which] = total, scale
                else:
                    sums[0, tensor, which] = float32(total)
                    sums[1, tensor, which] = float32(scale)
        fetch_add(job + 8 * _BUSY, -1)
        return 0

    return handler


def _build_task() -> Any:
    """What a helper runs: a kernel, by the address of its job."""
    p = cpu._primitives()
    _, call_kernel = _primitives()
    int64, view, to_pointer = p.int64, p.view, p.to_pointer

    def task(job: int) -> Any:
        j = view(to_pointer(job, int64), (_WORDS,))
        return call_kernel(j[_KERNEL], job + 8 * cpu.IGNORED, job)

    return task


def _compiled(build: Any) -> jit.Kernel:
    sources = (jit.source_of(__name__), jit.source_of(cpu.__name__))
    return jit.compiled(build, build.__name__, sources, frozenset())


@cache
def _entry(build: Any, *further: int) -> int:
    """The address of a kernel as C calls it: with its argument alone, returning its result.

    With `further` words the kernel takes the address of an array of the argument and these.
    """
    from llvmlite import ir

    word, status = ir.IntType(64), ir.IntType(32)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(word, [word]), "entry")
    builder = ir.IRBuilder(function.append_basic_block())
    result, argument = builder.alloca(word), function.args[0]
    if further:
        words = builder.alloca(word, word(1 + len(further)))
        for i, each in enumerate((argument, *map(word, further))):
            builder.store(each, builder.gep(words, [word(i)]))
        argument = builder.ptrtoint(words, word)
    kernel = ir.FunctionType(status, [word, word, word]).as_pointer()
    target = builder.inttoptr(word(jit.address_of(_compiled(build))), kernel)
    builder.call(target, [builder.ptrtoint(result, word), word(0), argument])
    builder.ret(builder.load(result))
    return jit.linked(module, "entry")


# The last job that was made, and the arguments of an error: `XLA_FFI_Error_Create_Args`.
_root = np.zeros(5, np.int64)
_MESSAGE = ctypes.create_string_buffer(
    b"This program was compiled by another process, in which an omniadam optimizer was traced. "
    b"Trace the same step in this process, too; or compile with OMNIADAM_KERNEL=numpy in the "
    b"environment, which leaves the step to XLA."
)
_FAILED_PRECONDITION = 9
_root[1:] = 28, 0, ctypes.addressof(_MESSAGE), _FAILED_PRECONDITION


@cache
def handler() -> int:
    """The address of what XLA is to call."""
    return _entry(_build_handler, _root.ctypes.data)


@cache
def _yield() -> int:
    try:
        return jit.address_of(ctypes.CDLL(None).sched_yield)
    except (AttributeError, OSError, TypeError):  # it waits without then
        return 0


# Programs name their jobs by key, whoever keeps a program for how long; and a helper may ask for
# work when the step that it was called for is over. A job is never freed.
_jobs: dict[int, Job] = {}
_making = threading.Lock()  # of two jobs that were linked at once, one would not be found


def job(kind: Pass, rule: Rule, dtype: str, gradient_dtype: str, sizes: Sequence[int]) -> Job:
    """The job of these arguments, those of `Job`; one for all programs that ask for the same."""
    what = (kind, rule.identity, dtype, gradient_dtype, tuple(sizes))
    digest = hashlib.sha256(repr(what).encode())
    # Of another version of the code it is another key: caches on disk keep programs.
    for module in (__name__, cpu.__name__, arithmetic.__name__, rule.make.__module__):
        digest.update(jit.source_of(module).encode())
    key = int.from_bytes(digest.digest()[:8], "little", signed=True)
    with _making:
        if key not in _jobs:
            _jobs[key] = Job(key, kind, rule, dtype, gradient_dtype, sizes)
    _jobs[key].choose_threads()
    return _jobs[key]


class Job:
    """A pass over variables of one element type, whose memory is known when it runs.

    The operands of the call are `plan`, the coefficients (those of the pass, the rule's, and a
    factor a variable if the pass clips by one), and the arrays: variable by variable what the pass
    touches beside the gradient, in the order of `Operand.streams`, and then all gradients. Its
    results are what is overwritten of these, and what is measured, of shape (2, variables,
    measures): sums of squares of what was divided by a scale, and the scales.

    Args:
        key: what programs know it by.
        kind: what the pass does.
        rule: the optimizer's rule.
        dtype: of the variables; float32, float64, float16 or bfloat16.
        gradient_dtype: of every gradient; likewise.
        sizes: in elements, one a variable.
    """

    def __init__(
        self,
        key: int,
        kind: Pass,
        rule: Rule,
        dtype: str,
        gradient_dtype: str,
        sizes: Sequence[int],
    ) -> None:
        n, slots = len(sizes), len(rule.slots)
        kernel, width = cpu._kernel(kind, rule, dtype, gradient_dtype), slots + 3
        columns = [] if kind.measures_only else [0]
        columns += range(1, slots + 1) if kind.stores_slots else ()
        columns += [slots + 1] if kind.accumulated else []
        columns += [slots + 2] if kind.averaged else []
        self._chunks = cpu._dense_chunks(sizes)
        self._addresses = np.zeros(n * width + n, np.int64)
        rows = self._addresses.ctypes.data
        gradients = rows + 8 * n * width
        places = [rows + 8 * (i * width + column) for i in range(n) for column in columns]
        if kind.gradient:
            places += range(gradients, gradients + 8 * n, 8)
        self._places = np.array(places, np.int64)
        fixed, measured = len(rule.coefficients) + cpu.PASS_C, len(kind.measured)
        self._coefficients = np.zeros(fixed + n)
        at = self._coefficients.ctypes.data
        self._partials = np.zeros(len(self._chunks) * measured)
        first = np.searchsorted(self._chunks[:, 0], np.arange(n + 1))
        self._first = np.ascontiguousarray(first, np.int64)
        self._elements = sum(sizes)
        self._words = words = np.zeros(_WORDS, np.int64)
        words[cpu._ADDRESSES], words[cpu._GRADIENTS] = rows, gradients
        words[cpu._CHUNKS], words[cpu.COUNT] = self._chunks.ctypes.data, len(self._chunks)
        words[cpu.COEFFICIENTS] = at
        words[cpu._FACTORS] = at + 8 * fixed
        words[cpu._PARTIALS] = self._partials.ctypes.data
        words[_KERNEL], words[_TASK] = jit.address_of(kernel), _entry(_build_task)
        words[_YIELD] = _yield()
        words[_PLACES], words[_COUNT_OF_PLACES] = self._places.ctypes.data, len(places)
        words[_COEFFICIENTS] = at
        words[_COUNT_OF_COEFFICIENTS] = fixed + n * kind.clipped_by_factor
        words[_FIRST_CHUNKS], words[_TENSORS] = self._first.ctypes.data, n
        words[_MEASURED] = measured

        words[_KEY], words[_LINK] = key, _root[0]
        _root[0] = words.ctypes.data  # from now on it can be found

    def choose_threads(self) -> None:
        """Let the next calls use as many threads as are asked for now."""
        is_large = self._elements >= PARALLEL
        most = min(cpu.threads(), len(self._chunks)) if is_large else 1
        self._words[_HELPERS] = max(0, most - 1)

    @property
    def plan(self) -> Any:
        """The first operand: the key, as two numbers of 32 bits."""
        return self._words[_KEY : _KEY + 1].view(np.uint32).copy()
