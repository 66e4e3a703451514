"""Which names of variables are their user's, and which a library made up."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

# What TensorFlow and Keras call a variable, or a model, that is given no name.
_VARIABLES = {"variable", "seed_generator_state"}
_MODELS = {"sequential", "functional", "model"}


def in_files(given: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """What the variables of an optimizer are called in a file, and whether by their user.

    Of a path that Keras or TensorFlow made, that is what the user gave: `encoder/kernel` for
    `sequential_3/encoder/kernel`, `w` for `w:0`. If a layer's name was made up (`dense_3/kernel`),
    or nothing else tells two variables apart, the path is no name: they number what has no name, in
    a process from 0 on, so that it may have another the next time.

    Args:
        given: by variable, a name, and whether it is known to be the user's.
    """
    given = list(given)
    classes, models = _made_up(()), _MODELS | set(_names_of("Model"))
    found = [name if own else _of_user(name, classes, models) for name, own in given]
    times = Counter(found)
    return [
        (name, False) if short is None or times[short] > 1 else (short, True)
        for (name, _), short in zip(given, found, strict=True)
    ]


def _of_user(path: str, classes: set[str], models: set[str]) -> str | None:
    """The part of a path that its user gave; None if it does not tell the variable."""
    parts = re.sub(r":\d+$", "", path).split("/")
    while len(parts) > 1 and _unnumbered(parts[0]) in models:
        parts = parts[1:]
    name = "/".join(parts)
    return None if _is_among(classes, name) else name


def in_file(name: str, layers: Iterable[str] = ()) -> tuple[str, bool]:
    """The same of one variable, in a file that Keras or TensorFlow wrote.

    Args:
        name: of a variable.
        layers: classes of layers beside those of the libraries that are imported.
    """
    short = _of_user(name, _made_up(layers), _MODELS | set(_names_of("Model")))
    return (name, False) if short is None else (short, True)


def _made_up(layers: Iterable[str]) -> set[str]:
    return _VARIABLES | _MODELS | set(_names_of("Layer")) | set(map(_snake, layers))


def _is_among(classes: set[str], name: str) -> bool:
    *above, last = map(_unnumbered, name.split("/"))
    # The last part of a path is what a layer calls its variable, such as "bias", though there be a
    # layer of that name, too.
    return not classes.isdisjoint(above) or last in (_VARIABLES | _MODELS if above else classes)


def _unnumbered(part: str) -> str:
    return re.sub(r"(_\d+)?(:\d+)?$", "", part).lower()


def _names_of(kind: str) -> Iterator[str]:
    """What Keras calls layers, or models, without a name, of every class that there is."""
    for library in ("keras", "tf_keras"):
        module = sys.modules.get(library)
        module = module if kind == "Model" else getattr(module, "layers", None)
        kinds: list[Any] = [getattr(module, kind)] if hasattr(module, kind) else []
        while kinds:
            each = kinds.pop()
            yield _snake(each.__name__)
            kinds += type.__subclasses__(each)


@cache  # each name is asked for the classes of all layers that there are
def _snake(name: str) -> str:
    """As Keras makes a name of a class's."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
