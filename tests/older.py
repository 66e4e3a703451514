"""Variables of each library, and a loss over them whose gradients are given, for the tests of the
older generations.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reference import Array


class Library:
    """One library: how a test makes variables, gradients and losses, and reads what came out."""

    needs: tuple[str, ...] = ()
    double = True  # whether float64 is there

    def variable(self, value: Array) -> Any:
        raise NotImplementedError

    def array(self, value: Array) -> Any:
        """A gradient."""
        raise NotImplementedError

    def numpy(self, value: Any) -> Array:
        return np.asarray(value)

    def sparse(self, values: Array, indices: Array, shape: tuple[int, ...]) -> Any:
        raise NotImplementedError

    def loss(self, variables: Sequence[Any], gradients: Callable[[], Sequence[Array]]) -> Any:
        """A linear loss, whose gradients are what `gradients()` returns at that moment."""
        return lambda: sum(
            self.dot(w, self.array(g)) for w, g in zip(variables, gradients(), strict=True)
        )

    def dot(self, w: Any, g: Any) -> Any:
        return (w * g).sum()


class NumPyLibrary(Library):
    needs = ("autograd",)

    def variable(self, value: Array) -> Any:
        return np.array(value)

    array = variable

    def sparse(self, values: Array, indices: Array, shape: tuple[int, ...]) -> Any:
        from omniadam import IndexedSlices

        return IndexedSlices(values, indices, shape)

    def loss(self, variables: Sequence[Any], gradients: Callable[[], Sequence[Array]]) -> Any:
        def loss(*ws: Any) -> Any:
            import autograd.numpy as anp

            return sum(anp.sum(w * g) for w, g in zip(ws, gradients(), strict=True))

        return loss


class TorchLibrary(Library):
    needs = ("torch",)

    def variable(self, value: Array) -> Any:
        import torch

        return torch.tensor(value, requires_grad=True)

    def array(self, value: Array) -> Any:
        import torch

        return torch.tensor(value)

    def numpy(self, value: Any) -> Array:
        return value.detach().numpy()

    def sparse(self, values: Array, indices: Array, shape: tuple[int, ...]) -> Any:
        import torch

        at = torch.tensor(np.asarray(indices)[None])
        return torch.sparse_coo_tensor(at, torch.tensor(values), shape, check_invariants=True)


class JAXLibrary(Library):
    needs = ("jax",)
    double = False

    def variable(self, value: Array) -> Any:
        import jax

        return jax.new_ref(self.array(value))

    def array(self, value: Array) -> Any:
        import jax.numpy as jnp

        return jnp.array(value)

    def numpy(self, value: Any) -> Array:
        return np.asarray(value[...])

    def sparse(self, values: Array, indices: Array, shape: tuple[int, ...]) -> Any:
        from jax.experimental.sparse import BCOO

        return BCOO((self.array(values), self.array(np.asarray(indices)[:, None])), shape=shape)

    def loss(self, variables: Sequence[Any], gradients: Callable[[], Sequence[Array]]) -> Any:
        return lambda *ws: sum(
            self.dot(w, self.array(g)) for w, g in zip(ws, gradients(), strict=True)
        )


class TensorFlowLibrary(Library):
    needs = ("tensorflow",)

    def variable(self, value: Array) -> Any:
        import tensorflow as tf

        return tf.Variable(value)

    def array(self, value: Array) -> Any:
        import tensorflow as tf

        return tf.constant(value)

    def numpy(self, value: Any) -> Array:
        return value.numpy()

    def sparse(self, values: Array, indices: Array, shape: tuple[int, ...]) -> Any:
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant(shape))

    def dot(self, w: Any, g: Any) -> Any:
        import tensorflow as tf

        return tf.reduce_sum(w * g)


class KerasLibrary(NumPyLibrary):
    """Keras variables, on the backend of the tests' process."""

    needs = ("keras", "autograd")

    def variable(self, value: Array) -> Any:
        import keras

        return keras.Variable(value, dtype=value.dtype.name)

    def numpy(self, value: Any) -> Array:
        return np.asarray(getattr(value, "value", value))


LIBRARIES: dict[str, Library] = {
    "numpy": NumPyLibrary(),
    "torch": TorchLibrary(),
    "jax": JAXLibrary(),
    "tensorflow": TensorFlowLibrary(),
    "keras": KerasLibrary(),
}


def spelled(function: Callable[..., Any]) -> str:
    """A signature without its annotations and without self, as the documentation writes it."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    bare = [p for p in bare if p.name != "self"]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def imported(name: str) -> Any:
    """A module that warns as it is imported."""
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
