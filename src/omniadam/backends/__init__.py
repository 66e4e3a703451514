"""Which library a variable comes from.

No library is imported before one of its variables is seen.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from .base import Backend, received
from .host import Numbers

# The package that defines a variable's type, and the module here that knows it. A subclass of a
# library's type is known by its bases.
_MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "keras": "keras",
    "jax": "jax",
    "jaxlib": "jax",
    "tensorflow": "tensorflow",
}


@cache
def _of_type(kind: type) -> str | None:
    for base in kind.__mro__:
        if base.__module__ == "omniadam.table":
            return "numpy"
        package = base.__module__.partition(".")[0]
        if package in _MODULES:
            return package
    return None


def backend_of(variable: Any) -> type[Backend] | None:
    """The backend for a variable, by its type; None if no library here knows it."""
    kind: Any = type(variable)
    library = _of_type(kind)
    if library is None or library not in sys.modules:
        return None
    found: type[Backend] = import_module(f".{_MODULES[library]}", __name__).BACKEND
    return found


def supported() -> str:
    """The libraries whose variables can be trained, for messages."""
    return ", ".join(sorted(set(_MODULES.values())))


def functions_of(value: Any) -> Any:
    """The elementwise functions of the library that a value belongs to.

    The namespace has `minimum, maximum, where, floor, ceil, cos, log, power` and `asarray_float`,
    which converts to the library's float type; numbers are computed with in double precision.
    """
    if isinstance(value, (int, float, np.generic)):
        return Numbers
    backend = backend_of(value)
    if backend is None:
        raise TypeError(
            f"A step must be a number or an array of one of these libraries: {supported()}. "
            f"Received: {received(value)}."
        )
    return backend.elementwise


def of_tensorflow(module: str, package: str) -> Any:
    """A module of ours that is only for TensorFlow; None where that is not imported, or is broken:
    who uses it is told when a variable of it comes.
    """
    with suppress(Exception):
        if isinstance(sys.modules["tensorflow"].Variable, type):
            return import_module(module, package)
    return None


def introduce(kind: type) -> None:
    """Let a library that is there know a class of optimizers, as TensorFlow does to save them."""
    if (tensorflow := of_tensorflow(".tensorflow", __name__)) is not None:
        with suppress(Exception):
            tensorflow.introduce(kind)


__all__ = ["Backend", "backend_of", "functions_of", "introduce", "of_tensorflow", "supported"]
