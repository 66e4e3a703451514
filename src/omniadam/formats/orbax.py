"""Folders of orbax.checkpoint with the state of optax's adam, in whatever chain it stands.

A file of JSON says what is in a folder. tensorstore, by which orbax writes, reads and writes the
arrays one by one. Nothing in such a folder tells whether an array was altered after it was written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import versions
from ..saving import matching
from ..saving.snapshot import OPTAX, Snapshot, Tensor, Variable
from ..saving.translate import translated
from . import folders
from .places import place_in

with versions.imported("optax", user="A folder of orbax"):
    import optax
try:
    import tensorstore
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"A folder of orbax needs {error.name}, which is not installed: pip install "
        "'omniadam[orbax]'.",
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

    The folder is copied beside itself, and the copy takes its name: see `folders.replace`.
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

    def fill(partial: Path) -> None:
        shutil.copytree(path, partial)
        for leaf in found.leaves:
            if leaf.name in pairs:
                leaf.write(partial / found.item, pairs[leaf.name].read())

    folders.replace(path, fill)


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

    def form(self) -> tuple[tuple[int, ...], str]:
        """Shape and type."""
        try:
            found = self._opened(self.folder, read=True)
            return tuple(found.shape), found.dtype.numpy_dtype.name
        except Exception as error:  # tensorstore's own, by what is wrong
            raise _damaged(self.folder, error) from error

    def read(self) -> Any:
        """The array."""
        try:
            value = self._opened(self.folder, read=True).read().result()
        except Exception as error:
            raise _damaged(self.folder, error) from error
        return np.asarray(value, order="C")

    def write(self, folder: Path, value: Any) -> None:
        """Overwrite it in a copy of the folder."""
        self._opened(folder, write=True).write(value).result()

    def _opened(self, folder: Path, **how: bool) -> Any:
        if (folder / "manifest.ocdbt").exists():
            inside = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{self.stored}/"}
        elif "/" in self.stored or "\\" in self.stored:
            raise ValueError(f"the array '{self.stored}' would lie in another folder")
        else:
            inside = {"driver": "file", "path": f"{folder / self.stored}/"}
        spec = {"driver": self.driver, "kvstore": inside}
        return tensorstore.open(spec, open=True, **how).result()


class _Found(NamedTuple):
    """The state of an optimizer in a folder."""

    leaves: list[_Leaf]  # all, from the key on
    item: str  # the folder in it that has the tree; "." for itself
    adams: list[tuple[Any, ...]]  # paths of the nodes with `count`, `mu` and `nu`


def _found(path: Path, key: str | None) -> _Found:
    places = {}
    for item in _items(path):
        try:
            tree, driver = _metadata(path / item)
        except Exception as error:  # as many kinds as there are ways to alter JSON
            raise _damaged(path, error) from error
        for root in _roots(tree, key if item == "." else None):
            name = ".".join(map(str, (*(() if item == "." else (item,)), *root)))
            inside = {
                p[len(root) :]: stored for p, stored in tree.items() if p[: len(root)] == root
            }
            places[name] = item, inside, driver
    item, inside, driver = place_in(places, key, path, _STATE)
    adams, leaves = list(_adams(inside)), []
    for keys, stored in inside.items():
        leaf = _Leaf(
            keys, _keystr(keys, inside, adams), stored, (), "", driver, (path / item).absolute()
        )
        shape, dtype = leaf.form()
        leaves.append(leaf._replace(shape=shape, dtype=dtype))
    return _Found(leaves, item, adams)


def _items(path: Path) -> list[str]:
    if (path / METADATA).is_file():
        return ["."]
    return sorted(each.name for each in path.iterdir() if (each / METADATA).is_file())


# What arrays are called, by their paths in the tree.
Tree = dict[tuple[Any, ...], str]


def _metadata(path: Path) -> tuple[Tree, str]:
    """All arrays of a folder, and tensorstore's driver for them."""
    told = json.loads((path / METADATA).read_bytes())
    tree = {}
    for entry in told["tree_metadata"].values():
        value = entry["value_metadata"]
        # What is empty, or a text, is no array.
        if not value.get("skip_deserialize") and value.get("value_type") != "string":
            keys = entry["key_metadata"]
            names = [str(part["key"]) for part in keys]
            places = [part["key_type"] == 1 for part in keys]
            pairs = zip(names, places, strict=True)
            tree[tuple(int(n) if is_place else n for n, is_place in pairs)] = ".".join(names)
    return tree, "zarr3" if told.get("use_zarr3") else "zarr"


def _damaged(path: Path, error: Exception) -> ValueError:
    text = " ".join(str(error).split())[:200]
    return ValueError(
        f"'{path}' cannot be read: it is damaged, or no folder of orbax. {type(error).__name__}: "
        f"{text}"
    )


def _roots(tree: Tree, key: str | None) -> set[tuple[Any, ...]]:
    """Where states of optimizers begin: at a key that is given, or where dictionaries end."""
    roots = set()
    wanted = None if key is None else key.replace("/", ".").strip(".")
    for adam in _adams(tree):
        length = 0
        while length < len(adam) and isinstance(adam[length], str):
            if _is_tuple(adam[:length], tree):
                break
            length += 1
        for i in range(len(adam) + 1):
            if ".".join(map(str, adam[:i])) == wanted:
                length = i
        roots.add(adam[:length])
    return roots


def _adams(leaves: Tree) -> Iterator[tuple[Any, ...]]:
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


def _is_tuple(node: tuple[Any, ...], leaves: Tree) -> bool:
    """Whether it is a named tuple of optax, by the names of what it holds."""
    children = _children(node, leaves)
    # What holds nothing, an empty state, is not among the leaves.
    return any(children <= fields and "count" in children for fields in _TUPLES) or (
        frozenset(children) in _TUPLES
    )


def _keystr(path: tuple[Any, ...], leaves: Tree, adams: list[tuple[Any, ...]]) -> str:
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
    tensors = {leaf.name: Tensor(leaf.shape, leaf.dtype, leaf.read) for leaf in found.leaves}
    return Snapshot(OPTAX, OPTAX, dict(settings or {}), tuple(variables), tensors)


def _of_variables(snapshot: Snapshot) -> Snapshot:
    """With Adam's state alone."""
    own = {name for v in snapshot.variables for name in v.slots.values()}
    return replace(snapshot, tensors={n: t for n, t in snapshot.tensors.items() if n in own})
