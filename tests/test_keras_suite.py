"""The tests of optimizers that Keras ships, with ours in the place of its Adam and AdamW."""

from __future__ import annotations

import pytest

from suites import run_suite

NAMES = ("adam", "adamw", "optimizer", "multi_optimizer", "loss_scale_optimizer")
MODULES = [f"keras.src.optimizers.{name}_test" for name in NAMES]


@pytest.mark.needs("keras", "tensorflow", "torch")
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_optimizers_of_keras(backend: str) -> None:
    ended = run_suite("keras_suite", *MODULES, KERAS_BACKEND=backend)
    assert ended["failed"] == ended["error"] == 0 and ended["passed"] >= 95, ended
