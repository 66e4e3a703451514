"""Which names of variables are their user's, and which a library made up."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

# What TensorFlow and Keras call a variable, or a model, that is given no name.
_USUAL = {"variable", "sequential", "functional", "model", "seed_generator_state"}


def is_made_up(name: str, layers: Iterable[str] = ()) -> bool:
    """Whether a part of a path was made up by Keras or TensorFlow: `Variable:0`, `dense_3/kernel`.

    They number what has no name, in a process from 0 on, so that it may have another name the next
    time. A layer's is that of its class.

    Args:
        name: of a variable.
        layers: classes of layers beside those of the libraries that are imported.
    """
    classes = _USUAL | set(_names_of_layers()) | set(map(_snake, layers))
    *above, last = (re.sub(r"(_\d+)?(:\d+)?$", "", part).lower() for part in name.split("/"))
    # The last part of a path is what a layer calls its variable, such as "bias", though there be a
    # layer of that name, too.
    return not classes.isdisjoint(above) or last in (_USUAL if above else classes)


def _names_of_layers() -> Iterator[str]:
    """What Keras calls layers without a name, of every class that there is."""
    for library in ("keras", "tf_keras"):
        layers: Any = getattr(sys.modules.get(library), "layers", None)
        kinds = [layers.Layer] if hasattr(layers, "Layer") else []
        while kinds:
            kind = kinds.pop()
            yield _snake(kind.__name__)
            kinds += type.__subclasses__(kind)


@cache  # each name is asked for the classes of all layers that there are
def _snake(name: str) -> str:
    """As Keras makes a name of a class's."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
