"""Folders of torch.distributed.checkpoint with what get_optimizer_state_dict returned.

Its metadata is a pickle, and so is every number in it: none is read that needs more than what
torch.distributed.checkpoint itself puts there. One process reads all shards.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp

from ..saving.snapshot import Snapshot
from . import folders
from .places import place_in
from .torch import STATE_DICT, Stored, check_archive, snapshot_of, state_dict_of

METADATA = ".metadata"
# What torch.distributed.checkpoint pickles: records of this module, and
_RECORDS = "torch.distributed.checkpoint.metadata"
_NAMES = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device", *(n for n in dir(torch) if type(getattr(torch, n)) is torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}
# dcp.load warns that it is one process, each time: what is warned of is one setting of a process.
_TURN = threading.Lock()


def read(path: Path, key: str | None = None, settings: Mapping[str, Any] | None = None) -> Snapshot:
    """As `formats.read`; the state_dict may have been flattened."""
    folder = _Folder(path)
    found = place_in(dict(_places(folder.paths)), key, path, STATE_DICT)
    groups, state = _groups(folder, found), _state(folder, found)
    return snapshot_of(groups, state, path)


# --- opening ---


class _Unpickler(pickle.Unpickler):
    """Makes what torch.distributed.checkpoint's metadata is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == _RECORDS and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class _Reader(dcp.FileSystemReader):  # type: ignore[misc]
    """Reads a folder by metadata that is there already."""

    def __init__(self, path: Path, metadata: Any) -> None:
        super().__init__(path)
        self._known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return self._known


class _Planner(dcp.DefaultLoadPlanner):  # type: ignore[misc]
    """Loads what is no tensor without running what it says."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _alone() -> dict[str, Any]:
    """How to say that no other process takes part, where there are others."""
    distributed = torch.distributed
    is_one_of_many = distributed.is_available() and distributed.is_initialized()
    return {"no_dist": True} if is_one_of_many else {}


class _Folder:
    """A folder whose metadata was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with (path / METADATA).open("rb") as file:
                metadata = _Unpickler(file).load()
            kinds = dict(metadata.state_dict_metadata)
            places = getattr(metadata, "planner_data", None) or {}
            self.paths = {tuple(places.get(name, (name,))): name for name in kinds}
            # Of tensors.
            self._forms = {
                name: (tuple(map(int, kind.size)), kind.properties.dtype)
                for name, kind in kinds.items()
                if isinstance(kind, dcp.TensorStorageMetadata)
            }
            self._parts: dict[str, list[tuple[str, int, int]]] = {}
            for index, info in metadata.storage_data.items():
                part = str(info.relative_path), int(info.offset), int(info.length)
                self._parts.setdefault(index.fqn, []).append(part)
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = dcp.metadata.StorageMeta()
        except Exception as error:  # as many kinds as there are ways to alter a pickle
            raise self.damaged(error) from error
        self._metadata = metadata
        self._checked: set[str] = set()

    def damaged(self, error: BaseException) -> ValueError:
        """The error of ours for one of torch's."""
        text = " ".join(str(error).split())[:200]
        return ValueError(
            f"'{self.path}' cannot be read: it is damaged, or no folder of "
            f"torch.distributed.checkpoint. {type(error).__name__}: {text}"
        )

    def entry(self, name: str) -> Any:
        """What is kept under a name: a tensor that is read when it is wanted, or another value."""
        if name not in self._forms:
            return self.values([name])[name]
        return Stored(*self._forms[name], lambda: self.values([name])[name])

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """What is kept under names, read at once."""
        made: dict[str, Any] = {}
        try:
            for name in names:
                self._check(name)
                # As much memory as a damaged size asks for is not there.
                form = self._forms.get(name)
                made[name] = b"" if form is None else torch.empty(form[0], dtype=form[1])
            with _TURN, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(
                    made,
                    storage_reader=_Reader(self.path, self._metadata),
                    planner=_Planner(False, False),
                    **_alone(),
                )
        except (Exception, dcp.CheckpointException) as error:
            raise self.damaged(error) from error
        return made

    def _check(self, name: str) -> None:
        """Raise ValueError if a part is not what was written, or lies in another folder."""
        if name in self._checked:
            return
        for relative, begin, length in self._parts.get(name, ()):
            file = self.path / relative
            is_inside = file.resolve().is_relative_to(self.path.resolve())
            size = file.stat().st_size if is_inside and file.is_file() else -1
            if not (begin >= 0 and length >= 0 and begin + length <= size):
                raise ValueError(f"the file '{relative}' lacks '{name}'")
            check_archive(self.path, _Part(file, begin, length))
        self._checked.add(name)


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: Path, begin: int, length: int) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._begin, self._length, self._at = begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if begin + offset < 0:
            raise OSError("before the beginning")
        self._at = begin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        count = max(min(len(buffer), self._length - self._at), 0)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


# --- finding the optimizer ---

Paths = Mapping[tuple[Any, ...], str]


def _places(paths: Paths) -> Iterator[tuple[str, dict[tuple[Any, ...], str]]]:
    """All state_dicts of optimizers, by the keys that lead to them: the paths inside of each."""
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], str]] = {}
    for path, name in paths.items():
        # Of a flattened one, all names are one key.
        whole = tuple(str(path[-1]).split(".")) if isinstance(path[-1], str) else path[-1:]
        split = (*path[:-1], *whole)
        for full in dict.fromkeys((path, split)):
            marks = [i for i, part in enumerate(full) if part in ("state", "param_groups")]
            if marks:
                place, rest = full[: marks[0]], full[marks[0] :]
                found.setdefault(place, {})[rest] = name
                break
    for place, inside in found.items():
        if {"state", "param_groups"} <= {path[0] for path in inside}:
            yield ".".join(map(str, place)), inside


def _state(folder: _Folder, inside: Paths) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for path, name in inside.items():
        if path[0] == "state" and len(path) > 2:
            parameter = ".".join(map(str, path[1:-1]))
            state.setdefault(parameter, {})[str(path[-1])] = folder.entry(name)
    return state


def _groups(folder: _Folder, inside: Paths) -> list[dict[str, Any]]:
    """The groups: as they are, or of a flattened state_dict put together of its parameters."""
    values: dict[Any, dict[str, Any]] = {}
    own = {path: name for path, name in inside.items() if path[0] == "param_groups"}
    read = folder.values(own.values())
    for path, name in own.items():
        if len(path) > 2:
            where = path[1] if len(path) == 3 and isinstance(path[1], int) else path[1:-1]
            values.setdefault(where, {})[str(path[-1])] = read[name]
    if all(isinstance(where, int) for where in values):
        return [values[i] for i in sorted(values)]
    groups: list[dict[str, Any]] = []
    for where, settings in values.items():
        parameter = ".".join(map(str, where if isinstance(where, tuple) else (where,)))
        settings.pop("param_names", None)
        same = [g for g in groups if {k: v for k, v in g.items() if k != "params"} == settings]
        if same:
            same[0]["params"].append(parameter)
        else:
            groups.append({**settings, "params": [parameter]})
    return groups


# --- writing ---


def write(snapshot: Snapshot, path: Path) -> None:
    """As `formats.write`: a folder with the state_dict by names under the key "optimizer"."""
    if not all(variable.is_named for variable in snapshot.variables):
        raise ValueError(
            "torch.distributed.checkpoint tells parameters by their names. The state has none: "
            "save it of an optimizer that was given named_parameters()."
        )
    if path.exists() and not (path / METADATA).is_file():
        raise FileExistsError(
            f"'{path}' is there, and is no folder of torch.distributed.checkpoint that could be "
            "replaced. Give another name."
        )

    def fill(partial: Path) -> None:
        with (
            state_dict_of(snapshot, path, by_name=True) as made,
            _TURN,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            writer = dcp.FileSystemWriter(partial)
            dcp.save({"optimizer": made}, storage_writer=writer, **_alone())

    folders.replace(path, fill)
