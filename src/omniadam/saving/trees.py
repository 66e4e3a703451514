"""The state of optax's transformations, and of ours like them: trees of arrays, by key path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.core import Tracer
from jax.tree_util import keystr

from . import matching
from .matching import Left
from .snapshot import OPTAX, Snapshot, Tensor, Variable

Array = npt.NDArray[Any]

KIND = "optax"
_NUMBERS = (bool, int, float, complex)


def is_tree(value: Any) -> bool:
    """Whether a value is a tree with an array among its leaves, or one of JAX's shapes."""
    return any(isinstance(leaf, _ARRAYS) for leaf in jax.tree.leaves(value))


_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)


def turn(tree: Any) -> Any:
    """As of every module that knows a class: what lies in a tree does not change."""
    return nullcontext()


# --- to a snapshot ---


def snapshot(tree: Any) -> Snapshot:
    """The leaves of a tree by their key paths; what Adam keeps of which parameter is noted.

    Raises:
        ValueError: if a leaf is no array or number whose values can be read now.
    """
    tensors = {}
    for name, leaf in _leaves(tree):
        if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
            raise ValueError(
                f"The leaf '{name}' must have values, to be saved. Received: {leaf}. Save outside "
                "of jax.jit and other transformations."
            )
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"The leaf '{name}' was donated to a computation, and its values are gone. Save "
                "what that returned."
            )
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"The leaf '{name}' lies on devices of other processes, too. Save it by orbax: "
                "`omniadam convert` reads its folders."
            )
        tensors[name] = Tensor(*_form(leaf), _reader(leaf))
    return Snapshot(KIND, OPTAX, {}, tuple(_variables(tree)), tensors, {"jax": jax.__version__})


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Names and leaves, checked: arrays and numbers."""
    found = [(keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"Two leaves of a tree must not have one path. Received: {twice}")
    for name, leaf in found:
        if not isinstance(leaf, _ARRAYS) and type(leaf) not in _NUMBERS:
            raise ValueError(
                f"The leaf '{name}' must be an array or a number. Received: "
                f"{type(leaf).__module__}.{type(leaf).__qualname__}."
            )
        if jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.extended):
            raise ValueError(
                f"The leaf '{name}' must hold numbers. Received dtype {leaf.dtype}. A random key "
                "is kept as jax.random.key_data(key), and is made of that by wrap_key_data."
            )
    return found


def _form(leaf: Any) -> tuple[tuple[int, ...], str]:
    leaf = np.asarray(leaf) if type(leaf) in _NUMBERS else leaf
    return tuple(leaf.shape), leaf.dtype.name


def _reader(leaf: Any) -> Any:
    def read() -> Array:
        value = leaf
        if isinstance(leaf, jax.Array) and not _is_on_host(leaf):
            # JAX keeps what it has copied to the host as long as there is the array.
            value = leaf.copy()
        found = np.asarray(value)
        return np.asarray(found, found.dtype.newbyteorder("="), order="C")

    return read


def _is_on_host(leaf: jax.Array) -> bool:
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _variables(tree: Any) -> Iterator[Variable]:
    """The parameters that an Adam in the tree is for, as long as each has a name of its own."""
    found = []
    nodes = jax.tree.leaves_with_path(tree, is_leaf=_is_adam)
    for place, node in ((keystr(path), node) for path, node in nodes if _is_adam(node)):
        for path, leaf in jax.tree.leaves_with_path(node.mu):
            slots = {
                "momentum": f"{place}.mu{keystr(path)}",
                "velocity": f"{place}.nu{keystr(path)}",
                "step": f"{place}.count",
            }
            name = keystr(path, simple=True, separator="/")
            shape, _ = _form(leaf)
            # The momentum may be of another type than its parameter, which is not there.
            found.append(Variable(name, shape, _form(leaf)[1], slots))
    if len({variable.name for variable in found}) == len(found):
        yield from found


def _is_adam(node: Any) -> bool:
    """Whether a node is what optax, and ours, keep of Adam."""
    if getattr(node, "_fields", None) != ("count", "mu", "nu"):
        return False
    return bool(jax.tree.structure(node.mu) == jax.tree.structure(node.nu))


# --- from a snapshot ---


def restored(given: Snapshot, like: Any, *, strict: bool) -> Any:
    """A tree of the structure, shapes, types and places of another, with saved values.

    Args:
        given: what was saved of a tree like it.
        like: a tree of arrays, numbers, or `jax.ShapeDtypeStruct`s; its values may be gone.
        strict: whether the key paths must be the same. Otherwise what is missing stays as it is.

    Raises:
        ValueError: if something does not fit, with all that does not.
    """
    leaves = _leaves(like)
    for name, leaf in leaves:
        if isinstance(leaf, Tracer):
            raise ValueError(f"State is loaded outside of jax.jit. Traced is the leaf '{name}'.")
    own = Snapshot(KIND, OPTAX, {}, (), {n: Tensor(*_form(leaf), _unread) for n, leaf in leaves})
    plan = matching.plan(replace(given, variables=()), own, by="name", strict=strict)
    found = dict(plan.pairs)
    valueless = [n for n, x in leaves if isinstance(x, jax.ShapeDtypeStruct) and n not in found]
    if valueless:
        raise ValueError(
            f"The leaves {valueless} must be in the file, as `like` has no values of them: they "
            "are jax.ShapeDtypeStruct. Pass the state itself."
        )
    new = [_placed(found[n].read(), leaf) if n in found else leaf for n, leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), new)


def _unread() -> Array:
    raise AssertionError("this is a form only")


def _placed(value: Array, leaf: Any) -> Any:
    """The value as a leaf of the same kind, where the other is."""
    if type(leaf) in _NUMBERS:
        return type(leaf)(value.item())
    if isinstance(leaf, np.generic):
        return value[()]
    if isinstance(leaf, np.ndarray):
        return np.array(value)
    # A shape is nowhere, unless it has a sharding.
    is_committed = getattr(leaf, "committed", leaf.sharding is not None)
    place = leaf.sharding if is_committed else None
    if not leaf.weak_type:
        return jax.device_put(value, place, may_alias=False)
    # A weak type gives way to that of other arrays, and is part of what jax.jit compiles for.
    kind = {"f": float, "i": int, "c": complex}[value.dtype.kind]
    weak = jnp.full(value.shape, kind(0)).at[...].set(value)
    return jax.device_put(weak, place)


def restore(tree: Any, snapshot: Snapshot, *, by: str, strict: bool) -> Left:
    """Raise TypeError: arrays of JAX cannot be set."""
    raise TypeError(
        "Arrays of JAX cannot be changed: new_state = omniadam.load(path, like=state) returns a "
        "new tree."
    )


def create(kind: Any, given: Snapshot, custom_objects: Any, *, by: str) -> Any:
    """Raise ValueError: a tree has no class."""
    raise ValueError("A tree of arrays is read by omniadam.load(path, like=state).")
