"""State of any optimizer in a file, and back: by name, verified, all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from . import file, optimizers, snapshot
from .matching import Left, check_by

__all__ = ["Left", "from_file", "load", "save", "state_hash"]

Path = str | os.PathLike[str]
_ABSENT: Any = object()


def save(optimizer: Any, path: Path, *, state: Any = None) -> None:
    """Write class, settings and state of an optimizer to a safetensors file.

    The file is, at every moment, the old one or the new one. Tensors are written one by one, also
    from a device: beside the optimizer, one is in memory. docs/saving.md describes the file.

    Args:
        optimizer: any of omniadam, or a tree of arrays, such as the state of `omniadam.optax`.
        path: of the file, by convention `*.safetensors`. What is there is replaced.
        state: of an optimizer that is stepped by `stateless_apply`, what that returned last: one
            array for each of `optimizer.variables`.

    Raises:
        TypeError: if it is no optimizer of omniadam, and no tree of arrays.
        ValueError: if a setting is a callable, which a file cannot hold; or if the state is in the
            user's hands, and is not given.
        OSError: if the file cannot be written: it is as it was.

    Example:
        >>> import numpy as np, omniadam
        >>> w = np.array([1.0, -2.0])
        >>> opt = omniadam.Adam(0.1)
        >>> opt.build({"w": w})
        >>> opt.apply([2 * w])
        >>> omniadam.save(opt, "adam.safetensors")
        >>> again = omniadam.from_file("adam.safetensors")
        >>> again.iterations, omniadam.state_hash(again) == omniadam.state_hash(opt)
        (1, True)
    """
    with optimizers.held(optimizer, state) as found:
        optimizers.warn_of_names(found, stacklevel=3)
        file.write(path, found)


def load(
    path: Path,
    optimizer: Any = _ABSENT,
    *,
    like: Any = _ABSENT,
    by: str = "name",
    strict: bool = True,
) -> Any:
    """Set an optimizer to the state in a file: all of it, by name, or nothing.

    State, count and, if it is a number, the learning rate are restored. Settings stay as the
    optimizer has them, and a warning names those that the file has otherwise; only the groups of
    `omniadam.torch` become those of the file, as with `load_state_dict`. The file is verified
    before anything is changed. An optimizer that is not built yet is given its count and rate now,
    and the rest when its variables come; what is set in between stays set.

    Args:
        path: of a file that `save` wrote.
        optimizer: of the generation that the file is of, built or not.
        like: instead of an optimizer, a tree of arrays: state as `omniadam.optax` has it. What is
            returned is a tree like it, of the same shapes, types and places.
        by: "name"; or "position", for variables that have no names of their user: they come in the
            order in which they were saved.
        strict: whether everything in the file and everything in the optimizer must have its like in
            the other.

    Returns:
        What was left as it was, a `Left` of names: it is empty unless `strict=False`. Before the
        build nothing is known of that yet: a warning at the build names it. With `like` a new tree.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is damaged; if the state means something else (`amsgrad`, `use_ema`,
            accumulation, the form of epsilon, generation); if something is missing, is left over,
            or has another shape or type, with the full list. Nothing has been changed then.
        RuntimeError: inside of `averaged()` of `omniadam.torch`.

    Example:
        >>> import numpy as np, omniadam
        >>> a, b = np.ones(2), np.ones(3)
        >>> opt = omniadam.Adam(0.1)
        >>> opt.build({"a": a, "b": b})
        >>> opt.apply([a, b])
        >>> omniadam.save(opt, "adam.safetensors")
        >>> other = omniadam.Adam(0.1)
        >>> other.build({"b": b, "a": a})  # another order
        >>> bool(omniadam.load("adam.safetensors", other)), other.iterations
        (False, 1)
    """
    check_by(by)
    if (optimizer is _ABSENT) == (like is _ABSENT):
        raise TypeError("`load` takes an optimizer, or `like=` a tree of arrays: one of them.")
    if optimizer is _ABSENT and by != "name":
        raise ValueError("`by` is of optimizers: the leaves of a tree are told by their paths.")
    given = file.read(path).snapshot
    if optimizer is _ABSENT:
        return optimizers.tree_like(given, like, strict=strict)
    return optimizers.restore(optimizer, given, by=by, strict=strict)


def from_file(
    path: Path, *, custom_objects: Mapping[str, Any] | None = None, by: str = "name"
) -> Any:
    """The optimizer in a file: its class, its settings, and its state.

    Its count and learning rate are there at once. Its slots are read from the file that was opened
    when it is built, by `build` or its first step, on variables of any library.

    Args:
        path: of a file that `save` wrote.
        custom_objects: by name, classes of your own: of optimizers and of schedules.
        by: as for `load`.

    Returns:
        An optimizer that is not built.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is damaged; if its class is not known; or if an optimizer of the class
            cannot be made without its variables (`omniadam.torch`): make it, and `load`. Of `build`
            and the first step, if the variables are not those of the file, with the full list; the
            optimizer is as before then.

    Example:
        >>> import numpy as np, omniadam
        >>> w = np.array([1.0, -2.0])
        >>> opt = omniadam.AdamW(0.1, global_clipnorm=1.0)
        >>> opt.build({"w": w})
        >>> opt.apply([2 * w])
        >>> omniadam.save(opt, "adam.safetensors")
        >>> again = omniadam.from_file("adam.safetensors")
        >>> type(again).__name__, again.global_clipnorm, again.iterations
        ('AdamW', 1.0, 1)
        >>> again.apply([2 * w], {"w": w})
        >>> again.iterations
        2
    """
    check_by(by)
    return optimizers.create(file.read(path).snapshot, custom_objects or {}, by=by)


def state_hash(optimizer: Any, *, state: Any = None) -> str:
    """A short string that is equal if and only if the state of two optimizers is.

    It is SHA-256 over name, dtype, shape and digest of each tensor. Settings (the learning rate
    among them), the library of the variables and their layout in memory do not count.

    Args:
        optimizer: as for `save`.
        state: as for `save`.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError, ValueError: as `save`.
    """
    with optimizers.held(optimizer, state) as found:
        return snapshot.state_hash(found)
