"""Steps on NVIDIA GPUs, without one: cuda_stand_in.py in a process of Triton's interpreter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inner import interpreted

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, on Linux")

SCRIPT = "cuda_stand_in.py"
NAMES = re.findall(r"^def (test_\w+)", (Path(__file__).parent / SCRIPT).read_text("utf-8"), re.M)
check = interpreted(SCRIPT)


@pytest.mark.parametrize("name", NAMES)
def test_stand_in(name: str, request: pytest.FixtureRequest) -> None:
    check(request)
