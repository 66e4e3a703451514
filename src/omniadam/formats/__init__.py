"""Files of other libraries, which hold the state of an optimizer among other things.

A module a format, which is imported for a file of that format only, and imports its library:

    read(path, key, settings) -> Snapshot
    write(snapshot, path)                   if such a file can be made
    write_into(snapshot, path, key, by)     if the optimizer's part of one can be replaced

What a file holds is not trusted: whatever is wrong with it is a ValueError that names it, raised
before anything is written.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..saving.snapshot import Snapshot


class Format(NamedTuple):
    """A row of the table."""

    name: str  # as messages have it
    module: str  # in this package
    recognise: Callable[[Path], bool]  # by what is in the file or the folder, without its library


def _starts_with(path: Path, *magic: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(max(map(len, magic))).startswith(magic)


def members(path: Path) -> frozenset[str]:
    """Names of what is in a zip file; none if it is no such file."""
    if not _starts_with(path, b"PK\x03\x04"):
        return frozenset()
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return frozenset()


def _is_keras(path: Path) -> bool:
    return "config.json" in members(path)


def _is_hdf5(path: Path) -> bool:
    return _starts_with(path, b"\x89HDF\r\n\x1a\n")


def _is_tensorflow(path: Path) -> bool:
    """A path is the prefix of a checkpoint's files, or a folder that says which is its newest."""
    return Path(f"{path}.index").is_file() or (
        path.is_dir() and _starts_with(path / "checkpoint", b"model_checkpoint_path")
    )


def _is_dcp(path: Path) -> bool:
    return path.is_dir() and (path / ".metadata").is_file()


def _is_orbax(path: Path) -> bool:
    """Of a tree, or with items that are trees, as CheckpointManager has them."""
    name = "_METADATA"
    return path.is_dir() and any((each / name).is_file() for each in (path, *path.iterdir()))


def _is_torch(path: Path) -> bool:
    """An archive of torch.save, damaged perhaps, or a file in the form that it had before."""
    if _starts_with(path, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        return True
    is_named = path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".tar")
    return _starts_with(path, b"PK\x03\x04") and (
        is_named or any(name.endswith("/data.pkl") for name in members(path))
    )


# The first that recognises a file reads it.
FORMATS: tuple[Format, ...] = (
    Format("Keras's .keras", "keras_archive", _is_keras),
    Format("HDF5 of Keras or tf_keras", "keras_hdf5", _is_hdf5),
    Format("a checkpoint of TensorFlow", "tensorflow", _is_tensorflow),
    Format("a folder of torch.distributed.checkpoint", "dcp", _is_dcp),
    Format("a folder of orbax", "orbax", _is_orbax),
    Format("a file of torch.save", "torch", _is_torch),
)
# What can be made anew: by the end of its name, the module.
MADE: dict[str, str] = {".pt": "torch", ".pth": "torch", ".dcp": "dcp"}


def read(
    path: str | os.PathLike[str],
    key: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Snapshot:
    """The state of an optimizer in a file of another library.

    Args:
        path: a file, a folder, or the prefix of a TensorFlow checkpoint.
        key: where in the file the optimizer is, if there is more than one place: names with dots
            or slashes between them.
        settings: of the optimizer that the state is for, as `get_config()` has them; they tell what
            is what where the file does not, as in a `.weights.h5` with a moving average.

    Returns:
        What the file tells: settings that it does not hold are not there (`Snapshot.is_complete`).
        Tensors are read from the file when they are wanted, one by one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of no format that is known, is damaged, or holds no Adam.
        ModuleNotFoundError: if the library that reads it is missing; it names the extra.
    """
    path = Path(path)
    snapshot: Snapshot = _module_for(path).read(path, key, settings)
    return snapshot


def write_into(
    snapshot: Snapshot,
    path: str | os.PathLike[str],
    key: str | None = None,
    by: str = "name",
) -> None:
    """Replace the state of the optimizer in an existing file, and nothing else that is in it.

    The file is made anew beside the old one and takes its place at the end: at any instant, one of
    them is there as a whole.

    Args:
        snapshot: what the optimizer in the file shall go on with. It has the same slots, for
            variables of the same shapes.
        path: as in `read`.
        key: as in `read`.
        by: "name"; or "position", where names of variables are missing in the file or in the state,
            and the order is the same.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as `read`.
        ValueError: as `read`; if the state is of another generation or does not fit; if files of
            this format are written as a whole. The file is as it was then.
    """
    path = Path(path)
    module = _module_for(path)
    if not hasattr(module, "write_into"):
        raise ValueError(
            f"The optimizer's part of '{path}' cannot be replaced: a file of this format is "
            f"written as a whole. Use `write`, to a name that ends in {_ends()}."
        )
    module.write_into(snapshot, path, key, by)


def write(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Make a file of another library that holds this state.

    Args:
        snapshot: the state.
        path: its ending says the format.

    Raises:
        ValueError: if no format with this ending can be made, or it cannot hold this state.
        ModuleNotFoundError: if the library that writes it is missing; it names the extra.
    """
    path = Path(path)
    module = MADE.get(path.suffix)
    if module is None:
        raise ValueError(
            f"A file is made for a name that ends in {_ends()}. Received: '{path}'. In an existing "
            "file of Keras or TensorFlow, the optimizer's part can be replaced: `write_into`."
        )
    _import(module).write(snapshot, path)


def _module_for(path: Path) -> Any:
    for each in FORMATS:
        if each.recognise(path):
            return _import(each.module)
    if not path.exists():
        raise FileNotFoundError(f"There is no file '{path}'.")
    raise ValueError(
        f"'{path}' must be a file with the state of an optimizer: "
        f"{', '.join(each.name for each in FORMATS)}. It is none, or its beginning is damaged."
    )


def _import(module: str) -> Any:
    return import_module(f".{module}", __name__)


def _ends() -> str:
    return " or ".join(f"'{each}'" for each in MADE) or "that of no format yet"
