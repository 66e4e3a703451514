"""`omniadam.keras`: keras_optimizers.py in a process for each of Keras's backends."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inner import by_backend

pytest.importorskip("keras")

from keras_optimizers import BACKENDS as ON

HERE = Path(__file__).parent
DOCS = (HERE.parent / "docs" / "keras.md").read_text(encoding="utf-8")
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}  # read by JAX
check = by_backend("keras_optimizers.py", **DEVICES)
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS, re.S | re.M)


def run(backend: str, *arguments: str) -> str:
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    env = os.environ | DEVICES | {"KERAS_BACKEND": backend, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.needs("jax", "tensorflow", "torch", "sklearn")
@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in ON["test_configs"] for name in ON if backend in ON[name]],
)
def test_keras_optimizers(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    check(request)


@pytest.mark.needs("jax", "tensorflow", "torch")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_documentation(backend: str) -> None:
    """The examples of docs/keras.md, each on the backend that it names, or on JAX."""
    named = [b for b in BLOCKS if f"KERAS_BACKEND={backend}\n" in b]
    chosen = [b for b in BLOCKS if "KERAS_BACKEND" not in b] if backend == "jax" else []
    assert named or chosen
    run(backend, "-c", "\n".join(f"exec({code!r}, {{}})" for code in [*named, *chosen]))


def test_every_example_of_the_documentation_is_run() -> None:
    named = [re.search(r"KERAS_BACKEND=(\w+)\n", block) for block in BLOCKS]
    assert {each[1] for each in named if each} == {"jax", "torch"}
    assert len(BLOCKS) >= 5


def test_docstrings() -> None:
    import omniadam.keras

    failed, attempted = doctest.testmod(omniadam.keras)
    assert failed == 0 and attempted >= 8


def test_keras_is_imported_by_nothing_else() -> None:
    run("numpy", "-c", "import sys, omniadam; assert 'keras' not in sys.modules")
