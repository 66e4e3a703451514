"""What `omniadam train` learns: handwritten digits, by a multilayer perceptron, in any library."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

WIDTHS = (64, 512, 256, 10)


@dataclass(frozen=True)
class Examples:
    """Images as rows of 64 pixels in [0, 1], and their digits as rows of a one-hot matrix."""

    images: Any  # of NumPy, or inside a loss of the library that differentiates it
    digits: Any

    def __len__(self) -> int:
        return int(self.images.shape[0])


def load() -> tuple[Examples, Examples]:
    """The 1,797 images of 8 by 8 pixels inside scikit-learn: four fifths to learn, a fifth to test.

    The split is the same in every run, whatever its seed, and has each digit in proportion.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32)
    digits = np.eye(10, dtype=np.float32)[labels]
    split = train_test_split(images, digits, test_size=0.2, stratify=labels, random_state=0)
    learn_images, test_images, learn_digits, test_digits = split
    return Examples(learn_images, learn_digits), Examples(test_images, test_digits)


def initial_parameters(seed: int) -> dict[str, Array]:
    """Names and arrays in the order of the layers; kernels after He et al. 2015, biases zero."""
    random = np.random.default_rng([seed, 0])
    parameters = {}
    for layer, (inputs, outputs) in enumerate(pairwise(WIDTHS), start=1):
        kernel = random.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        parameters[f"dense_{layer}/kernel"] = kernel.astype(np.float32)
        parameters[f"dense_{layer}/bias"] = np.zeros(outputs, np.float32)
    return parameters


def batches(examples: Examples, size: int, seed: int, epoch: int) -> Iterator[Examples]:
    """All examples once, in an order that depends on the seed and the epoch and nothing else."""
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(examples))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield Examples(examples.images[chosen], examples.digits[chosen])


class Functions(NamedTuple):
    """How a library spells what the network needs of it beside + and *."""

    dot: Callable[[Any, Any], Any]  # of matrices
    relu: Callable[[Any], Any]
    log_softmax: Callable[[Any], Any]  # of the rows of a matrix
    sum: Callable[[Any], Any]  # of all elements


def numpy_relu(x: Any) -> Any:
    """As maximum(x, 0), whose derivative in autograd is float64. autograd can trace it."""
    return x * (x > 0)


@cache
def on_numpy() -> Functions:
    """NumPy's functions as autograd can trace them. It is imported here: --help needs none."""
    import autograd.numpy as anp
    from autograd.tracer import getval

    def log_softmax(x: Any) -> Any:
        # Against overflow; no part of the derivative.
        x = x - np.max(getval(x), axis=1, keepdims=True)
        return x - anp.log(anp.sum(anp.exp(x), axis=1, keepdims=True))

    return Functions(anp.dot, numpy_relu, log_softmax, anp.sum)


def log_probabilities(
    parameters: Sequence[Any], images: Any, functions: Functions | None = None
) -> Any:
    """The network: relu between dense layers, log-softmax at the end."""
    functions = functions or on_numpy()
    *hidden, (kernel, bias) = zip(parameters[::2], parameters[1::2], strict=True)
    x = images
    for weights, offset in hidden:
        x = functions.relu(functions.dot(x, weights) + offset)
    return functions.log_softmax(functions.dot(x, kernel) + bias)


def cross_entropy(
    parameters: Sequence[Any], examples: Examples, functions: Functions | None = None
) -> Any:
    """The mean of -log(probability of the right digit)."""
    functions = functions or on_numpy()
    right = examples.digits * log_probabilities(parameters, examples.images, functions)
    return functions.sum(right) * np.float32(-1 / len(examples))


def loss_and_accuracy(parameters: Sequence[Array], examples: Examples) -> tuple[float, float]:
    """How well the network does on all of `examples`."""
    scores = log_probabilities(parameters, examples.images)
    right = scores.argmax(axis=1) == examples.digits.argmax(axis=1)
    return float(-(examples.digits * scores).sum() / len(examples)), float(right.mean())
