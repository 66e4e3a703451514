"""Which module here knows the state of which class of optimizers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from .matching import Left
from .snapshot import Snapshot

# By module and name of a class, the module here for it and for those that inherit from it. Each has
#     turn(optimizer)                            a lock: no step is made meanwhile
#     snapshot(optimizer) -> Snapshot            with tensors that are read under that lock
#     restore(optimizer, snapshot, *, by, strict) -> Left
#     create(kind, snapshot, custom_objects, *, by) -> optimizer
_MODULES = {
    ("omniadam.optimizer", "Optimizer"): "engine",
    ("omniadam.keras", "Adam"): "keras",
    ("omniadam.compat.older", "Older"): "older",
    ("omniadam.torch", "Adam"): "torch",
}
# Those of which the state may be in the user's hands.
_WITH_STATE = ("engine", "keras")
# Where classes are that a file names.
_CLASSES = {
    "omniadam.Adam": "omniadam.adam",
    "omniadam.AdamW": "omniadam.adam",
    "omniadam.keras.Adam": "omniadam.keras",
    "omniadam.keras.AdamW": "omniadam.keras",
    "omniadam.torch.Adam": "omniadam.torch",
    "omniadam.torch.AdamW": "omniadam.torch",
    "omniadam.compat.optimizer_v2.Adam": "omniadam.compat.optimizer_v2",
    "omniadam.compat.contrib_keras.Adam": "omniadam.compat.contrib_keras",
}
_KINDS = {(place, kind.rpartition(".")[2]): kind for kind, place in _CLASSES.items()}
# Of a tree, which is no optimizer.
TREE = "optax"


def _home(kind: type) -> Any:
    """The module that knows a class; None if it is none of ours."""
    for base in kind.__mro__:
        found = _MODULES.get((base.__module__, base.__name__))
        if found is not None:
            return import_module(f".{found}", __package__)
    return None


def _home_of(optimizer: Any) -> Any:
    home = _home(type(optimizer))
    if home is not None:
        return home
    kind = type(optimizer)
    if hasattr(optimizer, "inner_optimizer"):
        raise TypeError(
            f"{kind.__name__} scales the loss for another optimizer, whose state it is that is "
            "saved and loaded: pass its `inner_optimizer`. The scale is found again by itself."
        )
    if "jax" in sys.modules:
        trees = import_module(".trees", __package__)
        if trees.is_tree(optimizer):
            return trees
    raise TypeError(
        "State is saved and loaded of an optimizer of omniadam (Adam, AdamW, an Optimizer of "
        "yours, those of omniadam.keras, omniadam.torch and omniadam.compat), or of a tree of JAX "
        f"arrays. Received: {kind.__module__}.{kind.__qualname__}."
    )


def kind_of(optimizer: Any) -> str:
    """What a file calls the class of an optimizer."""
    kind = type(optimizer)
    return _KINDS.get((kind.__module__, kind.__name__), f"{kind.__module__}.{kind.__qualname__}")


@contextmanager
def held(optimizer: Any, state: Any = None) -> Iterator[Snapshot]:
    """The state of an optimizer, which no step changes meanwhile.

    Args:
        optimizer: of omniadam, or a tree.
        state: of an optimizer on bare arrays.
    """
    home = _home_of(optimizer)
    if state is not None and home.__name__.rpartition(".")[2] not in _WITH_STATE:
        raise ValueError(
            "`state` is of an optimizer that is stepped by stateless_apply(), of omniadam.Adam or "
            f"omniadam.keras. Received a {type(optimizer).__qualname__}."
        )
    with home.turn(optimizer):
        yield home.snapshot(optimizer) if state is None else home.snapshot(optimizer, state)


def restore(optimizer: Any, given: Snapshot, *, by: str, strict: bool) -> Left:
    """Set an optimizer to a state, or raise ValueError and change nothing."""
    left: Left = _home_of(optimizer).restore(optimizer, given, by=by, strict=strict)
    return left


def tree_like(given: Snapshot, like: Any, *, strict: bool) -> Any:
    """A tree with the state of a file."""
    trees = import_module(".trees", __package__)
    return trees.restored(given, like, strict=strict)


def create(given: Snapshot, custom_objects: Mapping[str, Any], *, by: str) -> Any:
    """An optimizer of the class, with the settings and the state of a file."""
    name = given.kind
    if name == TREE:
        raise ValueError(
            "The file holds a tree of arrays, of no class. Read it by load(path, like=state), with "
            "`state` of the transformation that it is for: solver.init(params)."
        )
    if not given.is_complete:
        raise ValueError(
            "The file does not tell all settings of its optimizer, only these: "
            f"{dict(given.settings)}. Create the optimizer with the settings that it had, and "
            "load(path, optimizer)."
        )
    if name in _CLASSES:
        kind = getattr(import_module(_CLASSES[name]), name.rpartition(".")[2])
    else:
        kind = custom_objects.get(name) or custom_objects.get(name.rpartition(".")[2])
        if not isinstance(kind, type):
            raise ValueError(
                f"The file is of an optimizer of class {name}, which omniadam does not know. Pass "
                f"it as custom_objects={{'{name.rpartition('.')[2]}': ...}}."
            )
    home = _home(kind)
    if home is None:
        raise ValueError(f"{name} must be a class that inherits from one of omniadam's.")
    try:
        return home.create(kind, given, custom_objects, by=by)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"The settings in the file make no {name}: {error!r}.") from error


def warn_of_names(saved: Snapshot, stacklevel: int) -> None:
    """Warn if a file can be loaded by position only."""
    made_up = [variable.name for variable in saved.variables if not variable.is_named]
    if made_up:
        warnings.warn(
            f"Variables without names of their user are told by their position: {made_up[:8]}"
            f"{f' ... ({len(made_up)} in all)' if len(made_up) > 8 else ''}. The file will need "
            "load(..., by='position'), with the variables in this order. Names are given by a "
            "mapping for build(), by named_parameters(), or by `name=` of layers.",
            stacklevel=stacklevel,
        )
