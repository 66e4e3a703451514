"""The variables that are stepped over: shapes of real models, float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

Shape = tuple[int, ...]


def mlp() -> list[Shape]:
    """784-128-64-10 with biases."""
    widths = (784, 128, 64, 10)
    return [s for a, b in pairwise(widths) for s in ((a, b), (b,))]


def resnet50() -> list[Shape]:
    """He et al. 2015, as in torchvision: 53 convolutions, each with a normalisation, and a head."""

    def convolutions() -> Iterator[Shape]:
        yield 64, 3, 7, 7
        before = 64
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                yield width, before, 1, 1
                yield width, width, 3, 3
                yield 4 * width, width, 1, 1
                if block == 0:
                    yield 4 * width, before, 1, 1
                before = 4 * width

    shapes = [s for c in convolutions() for s in (c, (c[0],), (c[0],))]
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[Shape]:
    """Radford et al. 2019, the small one: 12 blocks of width 768."""
    d = 768
    block: list[Shape] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def many(count: int = 10_000) -> list[Shape]:
    """A model of small parameters."""
    return [(100,)] * count


def odd() -> list[Shape]:
    """Sizes that no vector divides."""
    return [(n,) for n in range(1, 4000, 13)]


SETS = {
    "MLP": mlp,
    "ResNet-50": resnet50,
    "GPT-2 small": gpt2,
    "10,000 tensors": many,
    "odd sizes": odd,
}
# Elements by which arrays miss the boundaries of cache lines.
OFFSETS = {"odd sizes": 1}


def size(shapes: list[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def arrays(shapes: list[Shape], seed: int, scale: float, offset: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)

    def array(shape: Shape) -> np.ndarray:
        values = np.empty(math.prod(shape) + offset, np.float32)[offset:]
        rng.standard_normal(dtype=np.float32, out=values)
        values *= scale
        return values.reshape(shape)

    return list(map(array, shapes))
