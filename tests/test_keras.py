"""`keras.Variable`s in a custom loop: keras_variables.py in a process for each of its backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.needs("keras", "jax", "tensorflow", "torch")
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "tensorflow"])
def test_keras_variables(backend: str) -> None:
    env = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)]),
    }
    code = [sys.executable, str(HERE / "keras_variables.py"), backend]
    done = subprocess.run(code, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    script = (HERE / "keras_variables.py").read_text(encoding="utf-8")
    assert done.stdout.count("test_") == script.count("\ndef test_") >= 10
