"""Importing omniadam and constructing its classes starts no library, and fails because of none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MADE = """
import omniadam, omniadam.schedules
from omniadam.compat import contrib_keras, optimizer_v2
opts = [omniadam.Adam(), omniadam.AdamW(clipnorm=1.0), omniadam.Optimizer(0.1),
    omniadam.Adam(omniadam.schedules.ExponentialDecay(0.1, 10, 0.5)),
    optimizer_v2.Adam(lr=0.1, decay=0.1), contrib_keras.Adam(clipvalue=1.0)]
for opt in opts:
    opt.get_config()
"""
STEPS = """
import numpy as np
w = np.ones(2)
for opt in opts:
    if hasattr(opt, "apply_gradients") and type(opt) is not omniadam.Optimizer:
        opt.apply_gradients([(np.ones(2), w)])
"""
CONFIGURED = """
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
assert len(tf.config.list_logical_devices("CPU")) == 2
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.needs("tensorflow")
@pytest.mark.parametrize("order", ["first", "last"])
def test_tensorflow_can_still_be_configured(order: str) -> None:
    """And by a step on another library's arrays too."""
    parts = (
        ["import tensorflow as tf", MADE]
        if order == "first"
        else [MADE, "import tensorflow as tf", MADE]
    )
    run("\n".join([*parts, STEPS, CONFIGURED]))


@pytest.mark.needs("tf_keras")
def test_with_tf_keras_imported() -> None:
    run("\n".join(["import tensorflow as tf, tf_keras", MADE, CONFIGURED]))


@pytest.mark.needs("keras")
@pytest.mark.needs("tensorflow")
def test_with_keras_on_tensorflow() -> None:
    code = ["import tensorflow as tf, keras, omniadam.keras", MADE, CONFIGURED]
    run("\n".join(code), KERAS_BACKEND="tensorflow")


STUBS = {
    "empty": "",
    "without what is internal": "module.Variable = type('Variable', (), {})",
    "which raises": """
class Raising(types.ModuleType):
    def __getattr__(self, name):
        raise RuntimeError("no libtensorflow.so")
module = Raising("NAME")
""",
    "which makes anything": """
from unittest.mock import MagicMock
module = MagicMock()
""",
    "none": "module = None",
}


LIBRARIES = ("tensorflow", "tf_keras", "keras", "torch", "jax", "optax")


@pytest.mark.parametrize("stub", STUBS)
def test_libraries_that_are_broken(stub: str) -> None:
    """Nobody uses them."""
    code = ["import sys, types"]
    for name in LIBRARIES:
        code += ["module = types.ModuleType('NAME')", STUBS[stub], "sys.modules['NAME'] = module"]
        code = [line.replace("NAME", name) for line in code]
    run("\n".join([*code, MADE, STEPS]))


@pytest.mark.needs("tensorflow")
def test_a_legacy_keras_that_is_broken() -> None:
    code = "import sys, tensorflow as tf\nsys.modules['tf_keras'] = None\n"
    run(code + MADE + STEPS, TF_USE_LEGACY_KERAS="1")


@pytest.mark.needs("tensorflow")
def test_state_that_a_checkpoint_would_not_find() -> None:
    """TensorFlow's names for it are private: where they are others, it refuses the optimizer."""
    run("""
import tensorflow as tf
tf.train.TrackableView.children = classmethod(lambda cls, obj, *args, **kwargs: {})
import omniadam
opt = omniadam.Adam()
try:
    tf.train.Checkpoint(opt=opt)
except ValueError as error:
    assert "trackable" in str(error), error
else:
    raise AssertionError
""")
