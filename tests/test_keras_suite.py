"""The tests of optimizers that Keras ships, with ours in the place of its Adam and AdamW."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest

from suites import run_suite

pytestmark = pytest.mark.slow
COUNTED = "3.15.1"
NAMES = ("adam", "adamw", "optimizer", "multi_optimizer", "loss_scale_optimizer")


@pytest.mark.needs("keras", "tensorflow", "torch")
@pytest.mark.skipif(
    find_spec("keras") is not None and version("keras") != COUNTED,
    reason=f"counted in Keras {COUNTED}, and not every version ships its tests",
)
@pytest.mark.parametrize(
    ("backend", "more", "chosen", "passed"),
    [
        # `set_weights` of Keras is an error before the build; ours waits for it, which is in
        # test_saving_keras.py. Of the tests of sparse gradients, which are for TensorFlow and JAX,
        # those of Adam.
        (
            "tensorflow",
            ["optimizer_sparse"],
            "not test_set_weights and (not SparseTest or adam and not adamax and not nadam)",
            102,
        ),
        ("torch", [], "not test_set_weights", 99),
        # Where Keras has no `fit`.
        (
            "numpy",
            [],
            "not test_set_weights and not fit and not test_ema and not test_swap_ema",
            93,
        ),
    ],
)
def test_optimizers_of_keras(backend: str, more: list[str], chosen: str, passed: int) -> None:
    modules = [f"keras.src.optimizers.{name}_test" for name in (*NAMES, *more)]
    ended = run_suite("keras_suite", *modules, "-k", chosen, KERAS_BACKEND=backend)
    assert ended["failed"] == ended["error"] == 0 and ended["passed"] >= passed, ended
