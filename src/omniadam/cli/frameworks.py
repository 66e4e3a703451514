"""The libraries that a training run can be made on: variables, and gradients of the loss.

Each is a class that imports its library when an object is made of it. The optimizer is not told
which it is: it knows a library by its variables.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from omniadam.cli import digits
from omniadam.cli.digits import Array, Examples, Functions


@contextmanager
def silence() -> Iterator[None]:
    """Without what TensorFlow's C++ writes when it is imported and looks for a GPU, unasked."""
    sys.stderr.flush()
    shown, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(nowhere)
        os.close(shown)


class Framework(ABC):
    """One library, for one run.

    Args:
        scale: what becomes of the loss before it is differentiated.
    """

    name: ClassVar[str]

    def __init__(self, scale: Callable[[Any], Any]) -> None:
        self.functions = self._functions()
        self._scale = scale

    @property
    def title(self) -> str:
        """The library and its version."""
        return f"{self.name} {version(self.name)}"

    @abstractmethod
    def _functions(self) -> Functions:
        """Import the library and say how it spells what the network needs."""

    def _loss(self, weights: Sequence[Any], images: Any, labels: Any) -> Any:
        return self._scale(digits.cross_entropy(weights, Examples(images, labels), self.functions))

    @abstractmethod
    def variable(self, value: Array) -> Any:
        """A new variable with this value."""

    @abstractmethod
    def numpy(self, variable: Any) -> Array:
        """A copy of a variable's value, when all is done that the library was asked for."""

    @abstractmethod
    def loss_and_gradients(
        self, variables: list[Any], batch: Examples
    ) -> tuple[float, Sequence[Any]]:
        """The scaled loss of a batch and its gradients, by the library's own differentiation."""


class NumPy(Framework):
    """Arrays, and HIPS autograd."""

    name = "numpy"

    def __init__(self, scale: Callable[[Any], Any]) -> None:
        super().__init__(scale)
        from autograd import value_and_grad

        self._differentiated = value_and_grad(self._loss)

    def _functions(self) -> Functions:
        return digits.on_numpy()

    def variable(self, value: Array) -> Array:
        return value.copy()

    def numpy(self, variable: Array) -> Array:
        return variable.copy()

    def loss_and_gradients(
        self, variables: list[Any], batch: Examples
    ) -> tuple[float, Sequence[Any]]:
        loss, gradients = self._differentiated(variables, batch.images, batch.digits)
        return float(loss), gradients


class Torch(Framework):
    """Tensors that require a gradient."""

    name = "torch"

    def _functions(self) -> Functions:
        import torch

        self._torch = torch
        return Functions(torch.matmul, torch.relu, lambda x: torch.log_softmax(x, dim=1), torch.sum)

    def variable(self, value: Array) -> Any:
        return self._torch.tensor(value, requires_grad=True)

    def numpy(self, variable: Any) -> Array:
        return np.array(variable.detach().cpu().numpy())

    def loss_and_gradients(
        self, variables: list[Any], batch: Examples
    ) -> tuple[float, Sequence[Any]]:
        place = variables[0].device
        images, labels = (
            self._torch.from_numpy(array).to(place) for array in (batch.images, batch.digits)
        )
        loss = self._loss(variables, images, labels)
        return loss.item(), self._torch.autograd.grad(loss, variables)


class Jax(Framework):
    """Refs. Reading and differentiating them is compiled."""

    name = "jax"

    def _functions(self) -> Functions:
        import jax

        def values(variables: list[Any]) -> list[Any]:
            return [variable[...] for variable in variables]

        def differentiated(variables: list[Any], images: Any, labels: Any) -> Any:
            return jax.value_and_grad(self._loss)(values(variables), images, labels)

        self._jax, self._values = jax, jax.jit(values)
        self._differentiated = jax.jit(differentiated)
        return Functions(jax.numpy.dot, jax.nn.relu, jax.nn.log_softmax, jax.numpy.sum)

    def variable(self, value: Array) -> Any:
        return self._jax.new_ref(self._jax.numpy.array(value))

    def numpy(self, variable: Any) -> Array:
        return np.array(self._values([variable])[0])

    def loss_and_gradients(
        self, variables: list[Any], batch: Examples
    ) -> tuple[float, Sequence[Any]]:
        loss, gradients = self._differentiated(variables, batch.images, batch.digits)
        return float(loss), gradients


class TensorFlow(Framework):
    """tf.Variables, and a gradient tape inside tf.function."""

    name = "tensorflow"

    def _functions(self) -> Functions:
        with silence():
            import tensorflow as tf

            tf.config.list_logical_devices()

        def differentiated(variables: list[Any], images: Any, labels: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = self._loss(variables, images, labels)
            return loss, tape.gradient(loss, variables)

        self._tf, self._differentiated = tf, tf.function(differentiated)
        return Functions(tf.matmul, tf.nn.relu, tf.nn.log_softmax, tf.reduce_sum)

    @property
    def title(self) -> str:
        return f"{self.name} {self._tf.__version__}"  # its package may be tensorflow-cpu

    def variable(self, value: Array) -> Any:
        return self._tf.Variable(value)

    def numpy(self, variable: Any) -> Array:
        return np.array(variable.numpy())

    def loss_and_gradients(
        self, variables: list[Any], batch: Examples
    ) -> tuple[float, Sequence[Any]]:
        images, labels = map(self._tf.constant, (batch.images, batch.digits))
        loss, gradients = self._differentiated(variables, images, labels)
        return float(loss), gradients


class Keras(Framework):
    """keras.Variables, differentiated by the library that Keras runs on."""

    name = "keras"

    def _functions(self) -> Functions:
        with silence():
            import keras

        library = keras.backend.backend()
        if library not in FRAMEWORKS:
            raise ValueError(f"Keras on {library} has no gradients: set KERAS_BACKEND to another.")
        self._keras, self._below = keras, FRAMEWORKS[library](lambda loss: self._scale(loss))
        return self._below.functions

    @property
    def title(self) -> str:
        return f"{super().title} on {self._below.name}"

    def variable(self, value: Array) -> Any:
        return self._keras.Variable(value)

    def numpy(self, variable: Any) -> Array:
        return self._below.numpy(variable.value)

    def loss_and_gradients(
        self, variables: list[Any], batch: Examples
    ) -> tuple[float, Sequence[Any]]:
        return self._below.loss_and_gradients([v.value for v in variables], batch)


FRAMEWORKS: dict[str, type[Framework]] = {
    kind.name: kind for kind in (NumPy, Torch, Jax, TensorFlow, Keras)
}
