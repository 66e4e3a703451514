"""The kernels for NVIDIA GPUs, without one: what they compute, and what machine code they become.

Triton's interpreter runs them on NumPy's memory (triton_interpreted.py, in a process of its own),
and its compiler makes code for two generations of GPUs. What only a GPU can show is in
benchmarks/gpu.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, on Linux")

import triton
from triton.backends.compiler import GPUTarget

from inner import interpreted, outcomes
from omniadam.kernels import cpu
from omniadam.kernels import triton as kernels
from omniadam.rule import Pass, Rule
from triton_passes import PASSES

HERE = Path(__file__).parent
THREADS = 32 * kernels.WARPS
# Registers of a thread, above which fewer than four programs run at a time on a processor.
REGISTERS = {"step": 80, "full": 96, "everything": 128}


# --- what they compute ---

INTERPRETED = re.findall(r"^def (test_\w+)", (HERE / "triton_interpreted.py").read_text(), re.M)


check = interpreted("triton_interpreted.py")


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str, request: pytest.FixtureRequest) -> None:
    check(request)


# --- how they are launched ---


def test_what_the_driver_is_handed() -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler is None or not header.exists():
        pytest.skip("Triton's launcher needs a compiler of C, and Python's headers")
    script = "triton_launched.py"
    names = re.findall(r"^def (test_\w+)", (HERE / script).read_text(), re.M)
    assert outcomes(script, names, {"CC": compiler}) == dict.fromkeys(names)


# --- what machine code they become ---


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def machine_code(name: str, dtype: str, generation: int, clocked: bool = False) -> Any:
    target = GPUTarget("cuda", generation, 32)
    return kernels.sweep_kernel(*PASSES[name], dtype, clocked, False, target)[0]


def moved(kind: Pass, rule: Rule, dtype: str) -> tuple[int, int]:
    """Bytes of an element that a pass has to load, and to store."""
    stored = np.dtype(cpu.STORAGE[dtype]).itemsize
    real = np.dtype(cpu.ARITHMETIC[dtype]).itemsize
    slots = real * len(rule.slots) * kind.stores_slots
    reads_variable = not kind.measures_only and (kind.updates or kind.averaged)
    loads = stored * (kind.gradient + reads_variable) + slots
    loads += real * (kind.accumulated + kind.averaged)
    stores = stored * kind.stores_variable + slots
    return loads, stores + real * (kind.stores_accumulator + kind.averaged)


ACCESS = re.compile(r"\b(ld|st)\.(?:volatile\.)?global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.b(\d+)\b")


def vectors(ptx: str) -> dict[str, list[int]]:
    """Bytes of each access of a thread that is one of a vector."""
    found: dict[str, list[int]] = {"ld": [], "st": []}
    for what, count, bits in ACCESS.findall(ptx):
        if count:
            found[what].append(int(count) * int(bits) // 8)
    return found


def said_by(program: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / program
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


CASES = [
    *((name, "float32", generation) for name in PASSES for generation in (80, 90)),
    *((name, "bfloat16", 90) for name in PASSES),
    *(("step", dtype, 80) for dtype in ("float64", "float16")),
]


@pytest.mark.parametrize(("name", "dtype", "generation"), CASES)
def test_machine_code(name: str, dtype: str, generation: int, tmp_path: Path) -> None:
    kind, rule = PASSES[name]
    found = machine_code(name, dtype, generation)
    ptx: str = found.asm["ptx"]
    # Every byte that a chunk has to move moves by 16, and no other does in that branch.
    loads, stores = moved(kind, rule, dtype)
    per_thread = vectors(ptx)
    assert sum(per_thread["ld"]) * THREADS == loads * kernels.block_of(dtype)
    assert sum(per_thread["st"]) * THREADS == stores * kernels.block_of(dtype)
    # By 16 bytes: of a 16-bit variable beside its state, by 8.
    narrow = dtype in ("float16", "bfloat16") and (per_thread["st"] or kind.accumulated)
    for each in per_thread.values():
        assert set(each) <= {16, 8 if narrow else 16}
    # Nothing is contracted, approximated or flushed; what is divided is so as IEEE says.
    assert not re.findall(r"\bfma\b|approx|ftz|div\.full|cvt\.\w+\.bf16|\.local", ptx)
    assert ("div.rn" in ptx) == ((kind.updates and not kind.measures_only) or kind.scaled)
    assert ("sqrt.rn" in ptx) == bool(rule.slots)
    # Where vectors are, a chunk waits for no other thread; a sum does, at its end.
    if not kind.measured:
        assert "bar.sync" not in ptx
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    usage = said_by("cuobjdump", "-res-usage", str(cubin))
    counts = {what: int(count) for what, count in re.findall(r"(\w+):(\d+)", usage)}
    assert counts["LOCAL"] == 0 and counts["REG"] <= REGISTERS.get(name, 64), usage
    sass = said_by("cuobjdump", "-sass", str(cubin))
    assert len(re.findall(r"LDG\S*\.128", sass)) == per_thread["ld"].count(16)
    assert len(re.findall(r"STG\S*\.128", sass)) == per_thread["st"].count(16)
    # Of its own; NVIDIA's division of subnormal numbers, which stands behind it, may save a word.
    own = sass.rpartition("EXIT")[0]
    assert len(own) > len(sass) / 3 and not re.findall(r"\b(?:LDL|STL)\b", own)


def test_a_clock_costs_no_vector_and_one_way_out() -> None:
    ptx = machine_code("full", "float32", 90, clocked=True).asm["ptx"]
    assert vectors(ptx) == vectors(machine_code("full", "float32", 90).asm["ptx"])
    # Before anything else is read.
    first = re.search(r"ld\.global[^;]*;(.*?)ld\.global", ptx, re.S)
    assert first is not None and "bra" in first.group(1)


@pytest.mark.parametrize("generation", [80, 90])
def test_machine_code_of_a_clock(generation: int) -> None:
    """What is not of CUDA's own `expm1` is rounded as it is on the host."""
    from omniadam.torch import make_numbers

    target = GPUTarget("cuda", generation, 32)
    kind = PASSES["full"][0]
    settings = (kind, False, False), "float32", 12, 9
    ptx = kernels.tell_kernel(make_numbers, *settings, target)[0].asm["ptx"]
    assert not re.findall(r"approx|ftz|\.local", ptx)
    assert ptx.count("div.rn.f64") == 1 and ptx.count("sqrt.rn.f64") == 1
    assert ptx.count("cvt.rn.f32.f64") == 1, "what decay leaves is rounded as torch rounds it"
    ptx = kernels.count_kernel(target)[0].asm["ptx"]
    assert "add.f32" in ptx or "add.rn.f32" in ptx


@pytest.mark.parametrize("generation", [80, 90])
def test_machine_code_of_a_factor(generation: int) -> None:
    from omniadam.rule import clip_factor, clip_factor_global, clip_factor_joint

    for clip in (None, clip_factor, clip_factor_global, clip_factor_joint):
        ptx = kernels.factor_kernel(clip, GPUTarget("cuda", generation, 32))[0].asm["ptx"]
        assert not re.findall(r"\bfma\b|approx|ftz|\.f32|\.local", ptx)
        assert ("div.rn.f64" in ptx) == (clip is not None)


def test_what_is_compiled_is_told_apart() -> None:
    """Closures of one source that captured other settings are other kernels."""
    keys = set()
    for name, (kind, rule) in PASSES.items():
        form = kernels.form_of(kind, rule, "float32", "float32")
        constants = kernels.constants_of(kind, rule, form)
        keys.add((constants["ELEMENT"].cache_key, str(form)))
        again = kernels.constants_of(kind, rule, form)
        assert again["ELEMENT"] is constants["ELEMENT"], name
    assert len(keys) == len(PASSES)
    assert "TRITON_INTERPRET" not in os.environ
