"""PyTorch's own threads, to share a kernel's chunks.

They are those of the OpenMP runtime that torch is linked with, and between two operations they spin
for a while: helpers of ours would be woken to wait for the cores that these have. GNU's runtime has
`GOMP_parallel(function, argument, threads, flags)`, by which compiled code has a function run by a
team of threads; LLVM's and Intel's have it, too, for what GNU's compiler has made. It is looked up
in the library that torch's own functions are in, and tried before it is trusted.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import slow
from ..kernels import cpu, jit
from ..kernels.cpu import Team, Work
from ..tuned import SPINNING
from . import once

# A function, its argument, how many threads run it, and flags.
Parallel = Callable[[int, int, int, int], None]


class OpenMP(Team):
    """The threads of torch's OpenMP runtime, as many as torch uses."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__(torch.get_num_threads)
        self._parallel = parallel
        self._entry = 0  # where the threads begin, once that is tried
        self._is_useless = False

    @property
    def smallest(self) -> int:
        """As of `Team`."""
        return super().smallest if self._is_useless else SPINNING

    def add_to(
        self, work: Work, kernel: jit.Kernel, job: array[int], size: int, held: tuple[Any, ...]
    ) -> None:
        """As `Team.add_to`. All of the team are waited for, as in every operation of torch."""
        if not self._entry and not self._is_useless:
            self._begin()
        if self._is_useless:
            super().add_to(work, kernel, job, size, held)
            return
        address, _ = job.buffer_info()
        job[cpu.KERNEL] = jit.address_of(kernel)
        work.add_call((self._parallel, self._entry, address, size, 0), job, held)

    def _begin(self) -> None:
        """Try whether a function is run by two threads, which are through when that returns."""
        counted = array("q", [0])
        self._parallel(_counting(), counted.buffer_info()[0], 2, 0)
        self._is_useless = not 1 <= counted[0] <= 2
        if self._is_useless:
            _say_that_it_is_gone()
        self._entry = _running()

    def give_up(self) -> None:
        """Let helpers of ours do it: in the child of a fork the runtime waits for threads that it
        has no more.
        """
        self._is_useless = True


def team() -> OpenMP | None:
    """Torch's threads; None where its runtime is none that is known, or no kernel is compiled."""
    # Not within `once`: a process may switch the kernels off for a while.
    return _team() if cpu.available() else None


@once
def _team() -> OpenMP | None:
    parallel = _runtime()
    if parallel is None:
        return None
    found = OpenMP(parallel)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=found.give_up)
    return found


def _runtime() -> Parallel | None:
    if not torch.backends.openmp.is_available():
        return None
    name = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}.get(sys.platform)
    if name is None:
        return None
    with suppress(OSError, AttributeError):
        # Looked up in what it is linked with, too: there may be several runtimes in a process.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        found: Any = library.GOMP_parallel
        found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        found.restype = None
        return found  # type: ignore[no-any-return]
    _say_that_it_is_gone()
    return None


def _say_that_it_is_gone() -> None:
    slow.warn_gone(
        "torch",
        torch.__version__,
        "`GOMP_parallel` in the OpenMP runtime that it is linked with",
        "threads of omniadam's own wait for the cores that torch's threads hold",
    )


def _running() -> int:
    """The address of what each thread of a team calls with a job: it runs the job's kernel."""
    from llvmlite import ir

    word, status = ir.IntType(64), ir.IntType(32)

    def body(builder: Any, job: Any) -> None:
        place = builder.add(job, word(8 * cpu.KERNEL))
        kernel = builder.load(builder.inttoptr(place, word.as_pointer()))
        kind = ir.FunctionType(status, [word, word, word]).as_pointer()
        # What it returns is written where nobody reads it.
        result = builder.add(job, word(8 * cpu.IGNORED))
        builder.call(builder.inttoptr(kernel, kind), [result, word(0), job])

    return jit.assembled(body)


def _counting() -> int:
    """The address of a function that adds one to the word at an address."""
    from llvmlite import ir

    word = ir.IntType(64)
    return jit.assembled(
        lambda builder, at: builder.atomic_rmw(
            "add", builder.inttoptr(at, word.as_pointer()), word(1), "seq_cst"
        )
    )
