"""The two older generations of Keras's Adam: their names, orders and errors, on the same step.

`contrib_keras` is that of TensorFlow 1.1, `optimizer_v2` that of TensorFlow 2.0.
"""

from . import contrib_keras, optimizer_v2

__all__ = ["contrib_keras", "optimizer_v2"]


def __dir__() -> list[str]:
    return __all__
