"""What the documentation says is run: proofs in docs/, examples in README and examples/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def blocks(file: str) -> list[str]:
    return BLOCK.findall((ROOT / file).read_text(encoding="utf-8"))


def run(code: str, **environment: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def proofs(backend: str) -> list[str]:
    return [b for b in blocks("docs/deviations.md") if f"KERAS_BACKEND={backend}\n" in b]


@pytest.mark.needs("keras", "jax", "tensorflow", "torch")
@pytest.mark.parametrize("backend", ["numpy", "jax", "torch", "tensorflow"])
def test_each_deviation_has_a_proof(backend: str) -> None:
    """One process a backend, since each import of Keras takes seconds."""
    found = proofs(backend)
    assert found
    run("\n".join(f"exec({code!r}, {{}})" for code in found), KERAS_BACKEND=backend)


def test_every_proof_names_a_backend() -> None:
    backends = ("numpy", "jax", "torch", "tensorflow")
    assert sum(len(proofs(b)) for b in backends) == len(blocks("docs/deviations.md")) >= 10


@pytest.mark.needs("autograd")
def test_readme() -> None:
    found = blocks("README.md")
    assert found
    for code in found:
        run(code)


@pytest.mark.needs("torch", "jax", "keras", "tensorflow", "autograd")
@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_example(script: str) -> None:
    run((ROOT / "examples" / script).read_text(encoding="utf-8"), KERAS_BACKEND="jax")
