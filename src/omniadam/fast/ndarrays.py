"""Check all gradients and variables of a step in one compiled call.

Asking an ndarray for its address, shape and type from Python costs about a microsecond a question;
a step over small variables would spend most of its time there. The kernel here reads the same
fields from the C structures, whose layout NumPy's and CPython's binary interfaces promise
(`PyArrayObject` in ndarraytypes.h, `PyListObject` in cpython/listobject.h). It only ever says
"all as expected" or not; what it does not recognise is looked at in Python, with clear errors.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import slow
from ..kernels import cpu, jit

_HEADER = object.__basicsize__
_TYPE = _HEADER - 8
_ITEMS = _HEADER + 8  # of a list
_DATA, _RANK, _DIMENSIONS = _HEADER, _HEADER + 8, _HEADER + 16
_DESCRIPTOR, _FLAGS = _HEADER + 40, _HEADER + 48

_C_ORDER, _FORTRAN_ORDER, _ALIGNED, _WRITEABLE = 0x1, 0x2, 0x100, 0x400

# Words of a job.
_COUNT, _EXPECTED, _GRADIENTS, _VARIABLES, _FOUND, _STARTS, _STOPS, _INTERVALS, _NDARRAY = range(9)
_OTHERS = 9
_WORDS = 10
# Words of what is expected of a variable, then its dimensions.
_OBJECT, _ADDRESS, _BYTES, _ORDER, _ELEMENT, _NDIM = range(6)
_MAX_NDIM = 8
_WIDTH = 6 + _MAX_NDIM


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def usable() -> bool:
    """Whether there are compiled kernels, and the structures are laid out as this file believes."""
    return cpu.available() and _is_laid_out()


@cache
def _is_laid_out() -> bool:
    if sys.implementation.name != "cpython" or sys.maxsize < 2**62:
        return False
    probe = np.zeros((2, 3), np.float32)
    holder = [None, probe]
    a = id(probe)
    is_right = (
        _word(_word(id(holder) + _ITEMS) + 8) == a
        and _word(a + _TYPE) == id(np.ndarray)
        and _word(a + _DATA) == probe.ctypes.data
        and _word(a + _RANK) & 0xFFFFFFFF == 2
        and [_word(_word(a + _DIMENSIONS) + 8 * i) for i in range(2)] == [2, 3]
        and _word(a + _DESCRIPTOR) == id(np.dtype(np.float32))
        and _word(a + _FLAGS) & 0xFFFFFFFF == probe.flags.num
    )
    if not is_right:
        slow.warn_gone(
            "numpy", np.__version__, "the layout of an array", "each step asks each array in Python"
        )
    return is_right


def _build() -> Any:
    import numba

    p = cpu._primitives()
    int64, view, to_pointer = p.int64, p.view, p.to_pointer
    int32 = numba.int32

    def word(address: Any) -> Any:
        return view(to_pointer(address, int64), (1,))[0]

    def half_word(address: Any) -> Any:
        return view(to_pointer(address, int32), (1,))[0]

    word, half_word = p.njit(word), p.njit(half_word)

    def is_expected(item: Any, e: Any, wanted: Any, ndarray: Any) -> Any:
        if word(item + _TYPE) != ndarray or word(item + _DESCRIPTOR) != e[_ELEMENT]:
            return False
        flags = half_word(item + _FLAGS)
        if flags & wanted != wanted or half_word(item + _RANK) != e[_NDIM]:
            return False
        dimensions = word(item + _DIMENSIONS)
        for d in range(e[_NDIM]):  # noqa: SIM110 (compiled)
            if word(dimensions + 8 * d) != e[6 + d]:
                return False
        return True

    is_expected = p.njit(is_expected)

    def kernel(job: int) -> Any:
        j = view(to_pointer(job, int64), (_WORDS,))
        n, intervals, others = j[_COUNT], j[_INTERVALS], j[_OTHERS]
        expected = view(to_pointer(j[_EXPECTED], int64), ((n + others) * _WIDTH,))
        found = view(to_pointer(j[_FOUND], int64), (n,))
        starts = view(to_pointer(j[_STARTS], int64), (intervals,))
        stops = view(to_pointer(j[_STOPS], int64), (intervals,))
        gradients, variables = word(j[_GRADIENTS] + _ITEMS), word(j[_VARIABLES] + _ITEMS)
        for i in range(n):
            e = expected[i * _WIDTH : (i + 1) * _WIDTH]
            order = e[_ORDER] | _ALIGNED
            w, g = word(variables + 8 * i), word(gradients + 8 * i)
            if w != e[_OBJECT] or not is_expected(w, e, order | _WRITEABLE, j[_NDARRAY]):
                return i
            if word(w + _DATA) != e[_ADDRESS] or not is_expected(g, e, order, j[_NDARRAY]):
                return i
            start = word(g + _DATA)
            stop = start + e[_BYTES]
            # The last interval that begins before the gradient ends must end before it begins.
            low, high = 0, intervals
            while low < high:
                middle = (low + high) >> 1
                if starts[middle] < stop:
                    low = middle + 1
                else:
                    high = middle
            if low > 0 and stops[low - 1] > start and stop > start:
                return i
            found[i] = start
        for i in range(n, n + others):
            e = expected[i * _WIDTH : (i + 1) * _WIDTH]
            order = e[_ORDER] | _ALIGNED | _WRITEABLE
            if not is_expected(e[_OBJECT], e, order, j[_NDARRAY]):
                return -1
            if word(e[_OBJECT] + _DATA) != e[_ADDRESS]:
                return -1
        return n

    return kernel


@cache
def _kernel() -> jit.Kernel:
    return jit.compiled(
        _build,
        repr((__name__, _HEADER, np.__version__)),
        (jit.source_of(__name__), jit.source_of(cpu.__name__)),
        frozenset(),
        holds_lock=True,
    )


class Inspector:
    """What a step expects of its arrays: these variables, unmoved, and gradients like them.

    Args:
        variables: those with gradients; all must have passed the optimizer's checks.
        others: what else a step writes to, state and variables without gradients; likewise.
        memory: disjoint (start, stop) addresses that a step writes to, so that a gradient which
            shares memory with any of them is noticed.
    """

    def __init__(
        self,
        variables: Sequence[npt.NDArray[Any]],
        others: Sequence[npt.NDArray[Any]],
        memory: Sequence[tuple[int, int]],
    ) -> None:
        rows = []
        for v in (*variables, *others):
            order = v.flags.num & (_C_ORDER | _FORTRAN_ORDER)
            # An array that is both (a vector, say) needs only one of the flags.
            order = _C_ORDER if order & _C_ORDER else order
            row = [id(v), v.ctypes.data, v.nbytes, order, id(v.dtype), v.ndim, *v.shape]
            rows.append(row + [0] * (_WIDTH - len(row)))
        spans = sorted(span for span in memory if span[0] < span[1])
        self._held = (
            array("q", [word for row in rows for word in row]),
            array("q", [start for start, _ in spans] or [0]),
            array("q", [stop for _, stop in spans] or [0]),
            [*variables, *others],
        )
        self._job = array("q", [0] * _WORDS)
        self._job[_COUNT], self._job[_OTHERS] = len(variables), len(others)
        self._job[_EXPECTED] = self._held[0].buffer_info()[0]
        self._job[_STARTS] = self._held[1].buffer_info()[0]
        self._job[_STOPS] = self._held[2].buffer_info()[0]
        self._job[_INTERVALS] = len(spans)
        self._job[_NDARRAY] = id(np.ndarray)
        self._blank = array("q", [0] * max(len(variables), 1))
        self._result = array("q", [0])
        self._run = _kernel()

    @staticmethod
    def takes(variable: npt.NDArray[Any]) -> bool:
        """Whether a variable is of the kind that can be inspected."""
        return (
            type(variable) is np.ndarray
            and variable.ndim <= _MAX_NDIM
            and (variable.flags.c_contiguous or variable.flags.f_contiguous)
            and variable.flags.aligned
            and variable.dtype is np.dtype(variable.dtype.str)
        )

    def addresses(self, gradients: list[Any], variables: list[Any]) -> array[int] | None:
        """The gradients' addresses, or None if anything is not as expected."""
        count = self._job[_COUNT]
        if len(gradients) != count or len(variables) != count:
            return None
        job, found, result = self._job[:], self._blank[:], self._result[:]
        job[_GRADIENTS], job[_VARIABLES] = id(gradients), id(variables)
        job[_FOUND] = found.buffer_info()[0]
        self._run(result.buffer_info()[0], 0, job.buffer_info()[0])
        return found if result[0] == count else None
