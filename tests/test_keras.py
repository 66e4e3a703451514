"""`keras.Variable`s in a custom loop: keras_variables.py in a process for each of its backends."""

from __future__ import annotations

import pytest

from inner import by_backend

pytest.importorskip("keras")

import keras_variables

NAMES = [name for name in vars(keras_variables) if name.startswith("test_")]
check = by_backend("keras_variables.py")


@pytest.mark.needs("jax", "tensorflow", "torch")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "tensorflow"])
def test_keras_variables(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    check(request)
