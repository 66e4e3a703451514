"""Folders of orbax.checkpoint with the state of optax's adam, in whatever chain it stands.

orbax says what is in a folder, and tensorstore, by which orbax writes, reads and writes the arrays
one by one. Nothing in such a folder tells whether an array was altered after it was written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import versions
from ..saving import matching
from ..saving.snapshot import OPTAX, Snapshot, Tensor, Variable
from ..saving.translate import translated
from .places import place_in

with versions.imported("optax", "jax", user="omniadam.formats.orbax"):
    import jax
    import optax
try:
    import tensorstore
    from orbax import checkpoint as orbax
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "A folder of orbax is read by orbax, which is not installed: pip install orbax-checkpoint.",
        name=error.name,
    ) from error

METADATA = "_METADATA"
_STATE = "`count`, `mu` and `nu`, as optax.adam keeps them"
# The names of what optax keeps in named tuples, which orbax saves as dictionaries.
_TUPLES = {
    frozenset(kind._fields)
    for kind in vars(optax).values()
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
}


def read(path: Path, key: str | None = None, settings: Mapping[str, Any] | None = None) -> Snapshot:
    """As `formats.read`; parameters are called by their keys, with slashes between.

    The folder is of a tree that was saved by StandardCheckpointer or PyTreeCheckpointer, by itself
    or as an item of CheckpointManager. optax's state has no settings: those that are given, in
    Keras's words, go with it.
    """
    return _snapshot(_found(path, key), settings)


def write_into(snapshot: Snapshot, path: Path, key: str | None = None, by: str = "name") -> None:
    """As `formats.write_into`: Adam's arrays, and counts that were as Adam's, of schedules.

    The folder is copied beside itself, and the copy takes its name: while that is done, the old one
    is there as `.{name}.old`.
    """
    found = _found(path, key)
    own = _snapshot(found, None)
    given = _of_variables(translated(snapshot, OPTAX))
    plan = matching.plan(given, _of_variables(own), by=by, strict=True)
    pairs = dict(plan.pairs)
    counts = {int(own.tensors[n].read()): t for n, t in plan.pairs if n.endswith(".count")}
    for leaf in found.leaves:
        # A schedule counts the steps that Adam counts, and is to go on with them.
        if leaf.name.endswith(".count") and leaf.name not in pairs:
            same = counts.get(int(own.tensors[leaf.name].read()))
            pairs |= {} if same is None else {leaf.name: same}
    whole = Path(os.path.realpath(path))
    partial, old = (whole.with_name(f".{whole.name}.{end}") for end in ("partial", "old"))
    for each in (partial, old):
        shutil.rmtree(each, ignore_errors=True)
    try:
        shutil.copytree(whole, partial)
        for leaf in found.leaves:
            if leaf.name in pairs:
                leaf.write(partial / found.item, pairs[leaf.name].read())
        os.rename(whole, old)
        try:
            os.rename(partial, whole)
        except BaseException:
            os.rename(old, whole)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# --- what is in a folder ---


class _Leaf(NamedTuple):
    """An array of a folder."""

    path: tuple[Any, ...]  # keys and positions, from the optimizer's state on
    name: str  # the key path that it has in the state
    stored: str  # what orbax calls it
    shape: tuple[int, ...]
    dtype: str
    driver: str
    folder: Path

    def read(self) -> Any:
        """The array."""
        return self._opened(self.folder, read=True).read().result()

    def write(self, folder: Path, value: Any) -> None:
        """Overwrite it in a copy of the folder."""
        self._opened(folder, write=True).write(value).result()

    def _opened(self, folder: Path, **how: bool) -> Any:
        inside: dict[str, Any] = {"driver": "file", "path": f"{folder / self.stored}/"}
        if (folder / "manifest.ocdbt").exists():
            inside = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{self.stored}/"}
        spec = {"driver": self.driver, "kvstore": inside}
        return tensorstore.open(spec, open=True, **how).result()


class _Found(NamedTuple):
    """The state of an optimizer in a folder."""

    leaves: list[_Leaf]
    item: str  # the folder in it that has the tree; "." for itself
    adams: list[tuple[Any, ...]]  # paths of the nodes with `count`, `mu` and `nu`


def _found(path: Path, key: str | None) -> _Found:
    places = {}
    for item in _items(path):
        try:
            tree, driver = _metadata(path / item)
        except Exception as error:  # orbax's own, by what is wrong with the text
            raise _damaged(path, error) from error
        for root, leaves in _roots(tree, key if item == "." else None).items():
            name = ".".join(map(str, (*(() if item == "." else (item,)), *root)))
            places[name] = _Found([], item, []), leaves, driver, root
    chosen: tuple[_Found, Leaves, str, tuple[Any, ...]] = place_in(places, key, path, _STATE)
    found, leaves, driver, root = chosen
    by_path = {p[len(root) :]: leaf for p, leaf in leaves.items()}
    adams = list(_adams(by_path))
    for inside, leaf in by_path.items():
        name = _keystr(inside, by_path, adams)
        form = tuple(leaf.shape), np.dtype(leaf.dtype).name
        found.leaves.append(
            _Leaf(inside, name, leaf.name, *form, driver, (path / found.item).absolute())
        )
    return found._replace(adams=adams)


def _items(path: Path) -> list[str]:
    if (path / METADATA).is_file():
        return ["."]
    return sorted(each.name for each in path.iterdir() if (each / METADATA).is_file())


Leaves = dict[tuple[Any, ...], Any]


def _metadata(path: Path) -> tuple[Leaves, str]:
    """All arrays of a folder by their paths, and tensorstore's driver for them."""
    metadata = orbax.PyTreeCheckpointer().metadata(path.absolute())
    metadata = getattr(metadata, "item_metadata", metadata)
    leaves = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            leaves[tuple(map(_key, keys))] = leaf
    return leaves, "zarr3" if metadata.use_zarr3 else "zarr"


def _key(key: Any) -> Any:
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return getattr(key, field)
    return str(key)


def _damaged(path: Path, error: Exception) -> ValueError:
    text = " ".join(str(error).split())[:200]
    return ValueError(
        f"'{path}' cannot be read: it is damaged, or no folder of orbax. {type(error).__name__}: "
        f"{text}"
    )


def _roots(leaves: Leaves, key: str | None) -> dict[tuple[Any, ...], Leaves]:
    """Where states of optimizers begin: at a key that is given, or where dictionaries end."""
    roots: dict[tuple[Any, ...], Leaves] = {}
    wanted = None if key is None else key.replace("/", ".").strip(".")
    for adam in _adams(leaves):
        length = 0
        while length < len(adam) and isinstance(adam[length], str):
            if _is_tuple(adam[:length], leaves):
                break
            length += 1
        for i in range(len(adam) + 1):
            if ".".join(map(str, adam[:i])) == wanted:
                length = i
        root = adam[:length]
        roots[root] = {p: leaf for p, leaf in leaves.items() if p[:length] == root}
    return roots


def _adams(leaves: Leaves) -> Iterator[tuple[Any, ...]]:
    """The nodes that hold `count`, `mu` and `nu`, and nothing else."""
    for path in leaves:
        node = path[:-1]
        if path[-1:] == ("count",) and _children(node, leaves) == {"count", "mu", "nu"}:
            inside = [
                {p[len(node) + 1 :] for p in leaves if p[: len(node) + 1] == (*node, name)}
                for name in ("mu", "nu")
            ]
            if inside[0] == inside[1]:
                yield node


def _children(node: tuple[Any, ...], leaves: Iterable[tuple[Any, ...]]) -> set[Any]:
    length = len(node)
    return {path[length] for path in leaves if len(path) > length and path[:length] == node}


def _is_tuple(node: tuple[Any, ...], leaves: Leaves) -> bool:
    """Whether it is a named tuple of optax, by the names of what it holds."""
    children = _children(node, leaves)
    # What holds nothing, an empty state, is not among the leaves.
    return any(children <= fields and "count" in children for fields in _TUPLES) or (
        frozenset(children) in _TUPLES
    )


def _keystr(path: tuple[Any, ...], leaves: Leaves, adams: list[tuple[Any, ...]]) -> str:
    """The key path of a leaf as JAX writes it, in the state that optax returned."""
    inside = next((len(node) + 1 for node in adams if path[: len(node)] == node), len(path))
    parts = []
    for i, part in enumerate(path):
        is_field = i < inside and isinstance(part, str) and _is_tuple(path[:i], leaves)
        parts.append(f".{part}" if is_field else f"[{part!r}]")
    return "".join(parts)


def _snapshot(found: _Found, settings: Mapping[str, Any] | None) -> Snapshot:
    names = {leaf.path: leaf.name for leaf in found.leaves}
    variables: list[Variable] = []
    for node in found.adams:
        for leaf in found.leaves:
            if leaf.path[: len(node) + 1] != (*node, "mu"):
                continue
            inside = leaf.path[len(node) + 1 :]
            slots = {
                "momentum": leaf.name,
                "velocity": names[(*node, "nu", *inside)],
                "step": names[(*node, "count")],
            }
            name = "/".join(map(str, inside))
            variables.append(Variable(name, leaf.shape, leaf.dtype, slots))
    tensors = {leaf.name: Tensor(leaf.shape, leaf.dtype, _reader(leaf)) for leaf in found.leaves}
    return Snapshot(
        OPTAX, OPTAX, dict(settings or {}), tuple(variables), tensors, {"orbax": orbax.__version__}
    )


def _reader(leaf: _Leaf) -> Callable[[], Any]:
    def read() -> Any:
        try:
            value = np.asarray(leaf.read(), order="C")
        except Exception as error:  # tensorstore's own, by what is wrong
            raise _damaged(leaf.folder, error) from error
        if (value.shape, value.dtype.name) != (leaf.shape, leaf.dtype):
            text = f"'{leaf.stored}' is of shape {value.shape} and dtype {value.dtype.name}"
            raise _damaged(leaf.folder, ValueError(text))
        return value

    return read


def _of_variables(snapshot: Snapshot) -> Snapshot:
    """With Adam's state alone."""
    own = {name for v in snapshot.variables for name in v.slots.values()}
    return replace(snapshot, tensors={n: t for n, t in snapshot.tensors.items() if n in own})
