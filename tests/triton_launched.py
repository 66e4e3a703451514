"""Run by test_triton.py, in a process of its own: what Triton's launcher hands to CUDA's driver.

The driver is cuda_driver.c, which notes it. Kernels are compiled, loaded and launched as they are
where there is a GPU, by the same code.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from omniadam.adam import ADAM
from omniadam.backends.gpu import CannotCompile, Gpu
from omniadam.kernels import triton as kernels
from omniadam.rule import clip_factor
from omniadam.torch import make_numbers
from triton_passes import EVERYTHING, STEP

TARGET = GPUTarget("cuda", 90, 32)
STREAM, FUNCTION = 42, 77


class Utilities:
    """Triton's own, but for what asks of a device."""

    def __init__(self) -> None:
        self._own = nvidia.CudaUtils()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def load_binary(self, name: str, kernel: bytes, *others: Any) -> tuple[int, ...]:
        assert kernel[:4] == b"\x7fELF"
        return 1, FUNCTION, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}


class Driver:
    """A device, number 0, that nothing runs on."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self) -> None:
        self.utils = Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return TARGET


class Device(Gpu):
    """A GPU that is launched on by that."""

    def _tried(self) -> str:
        return ""

    def is_capturing(self) -> bool:
        return False

    def _target(self) -> GPUTarget:
        return TARGET


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("driver")
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("cuda_driver.c")
    options = ["-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([os.environ["CC"], *options, "-o", path, source], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.setattr(torch.cuda, "device", guard)
        found = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        driver.set_active(Driver())
        yield found


# The devices that were the current one for a while.
entered: list[torch.device] = []


@contextmanager
def guard(device: torch.device) -> Iterator[None]:
    entered.append(device)
    yield


def launched(library: ctypes.CDLL, compile: Any, *of: Any, given: tuple[Any, ...]) -> None:
    """Launch a kernel, and compare what arrives."""
    flat = [*given[:-1], *(given[-1] if isinstance(given[-1], tuple) else given[-1:])]
    ctypes.c_int.in_dll(library, "wanted").value = len(flat)
    device = Device(torch.device("cpu"))
    entered.clear()
    kernel = device.kernel(compile, *of)
    assert entered == [device.device], "it is loaded for the device"
    before = ctypes.c_int.in_dll(library, "launches").value
    device.launch(kernel, 5, *given)
    assert entered == [device.device] * 2, "and launched there"
    assert ctypes.c_int.in_dll(library, "launches").value == before + 1
    device.launch(kernel, 0, *given)
    assert ctypes.c_int.in_dll(library, "launches").value == before + 1
    parameters = (ctypes.c_uint64 * 64).in_dll(library, "parameters")[: len(flat)]
    wanted = [struct.pack("d" if isinstance(x, float) else "q", x) for x in flat]
    assert struct.pack(f"{len(flat)}Q", *parameters) == b"".join(wanted)
    noted = {
        "programs": ctypes.c_uint.in_dll(library, "programs").value,
        "threads": ctypes.c_uint.in_dll(library, "threads").value,
        "stream": ctypes.c_uint64.in_dll(library, "stream").value,
        "function": ctypes.c_uint64.in_dll(library, "function").value,
    }
    threads = 32 * kernels.WARPS
    assert noted == {"programs": 5, "threads": threads, "stream": STREAM, "function": FUNCTION}


ADDRESSES = (2**47 + 16, 0, 3, 2**40, 5, 6)


def test_a_sweep(library: ctypes.CDLL) -> None:
    numbers = tuple(1.1 * k for k in range(kernels.PASS_C + len(ADAM.coefficients)))
    for kind in (STEP, EVERYTHING):
        for clocked in (False, True):
            of = kind, ADAM, "float32", clocked, False
            launched(library, kernels.sweep_kernel, *of, given=(*ADDRESSES, numbers))


def test_what_norms_and_clocks_need(library: ctypes.CDLL) -> None:
    launched(library, kernels.factor_kernel, clip_factor, given=(*ADDRESSES[:4], 2.5))
    launched(library, kernels.count_kernel, given=(2**41, 1000, 16))
    numbers = tuple(0.3 * k for k in range(12))
    of = make_numbers, (EVERYTHING, False, False), "float64", 12, 9
    launched(library, kernels.tell_kernel, *of, given=(*ADDRESSES[:5], numbers))


def test_what_cannot_be_loaded(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise OSError("no memory is left")

    monkeypatch.setattr(Utilities, "load_binary", fails)
    device = Device(torch.device("cpu"))
    with pytest.raises(CannotCompile, match="OSError: no memory is left"):
        device.kernel(kernels.factor_kernel, None)
