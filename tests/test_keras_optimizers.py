"""`omniadam.keras`: keras_optimizers.py in a process for each of Keras's backends."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inner import by_backend

pytest.importorskip("keras")

from keras_optimizers import BACKENDS as ON

HERE = Path(__file__).parent
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}  # read by JAX
check = by_backend("keras_optimizers.py", **DEVICES)


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


def test_docstrings() -> None:
    import omniadam.keras

    failed, attempted = doctest.testmod(omniadam.keras)
    assert failed == 0 and attempted >= 8


def test_keras_is_imported_by_nothing_else() -> None:
    run("numpy", "-c", "import sys, omniadam; assert 'keras' not in sys.modules")
