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


# Each runs in a fork of one process, which has imported TensorFlow and done nothing with it.
WITH_TENSORFLOW = {
    # And by a step on another library's arrays too.
    "configured": [MADE, STEPS, CONFIGURED],
    "tf_keras": ["import tf_keras", MADE, CONFIGURED],
    "keras": ["import keras, omniadam.keras", MADE, CONFIGURED],
    "a legacy Keras that is broken": [
        "import os, sys",
        "os.environ['TF_USE_LEGACY_KERAS'], sys.modules['tf_keras'] = '1', None",
        MADE,
        STEPS,
    ],
    # Its names for state are private: where they are others, it refuses the optimizer.
    "state that a checkpoint would not find": [
        """
tf.train.TrackableView.children = classmethod(lambda cls, obj, *args, **kwargs: {})
import omniadam
opt = omniadam.Adam()
try:
    tf.train.Checkpoint(opt=opt)
except ValueError as error:
    assert "trackable" in str(error), error
else:
    raise AssertionError
"""
    ],
}
FORKS = f"""
import os, traceback
import tensorflow as tf
for name, code in {[(name, chr(10).join(code)) for name, code in WITH_TENSORFLOW.items()]!r}:
    child = os.fork()
    if not child:
        try:
            exec(code, {{"tf": tf}})
        except BaseException:
            traceback.print_exc(file=open(1, "w", closefd=False))
            os._exit(1)
        os._exit(0)
    print(f"{{name}} ended with {{os.waitpid(child, 0)[1]}}", flush=True)
"""


@pytest.fixture(scope="module")
def forks() -> str:
    return run(FORKS, KERAS_BACKEND="tensorflow")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.needs("tensorflow", "keras", "tf_keras")
@pytest.mark.parametrize("name", WITH_TENSORFLOW)
def test_after_tensorflow(name: str, forks: str) -> None:
    assert f"{name} ended with 0\n" in forks, forks


@pytest.mark.needs("tensorflow")
def test_before_tensorflow() -> None:
    run("\n".join([MADE, "import tensorflow as tf", MADE, STEPS, CONFIGURED]))


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
