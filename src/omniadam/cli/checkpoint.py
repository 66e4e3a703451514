"""Files that are, at every moment, the old one or the new one and never a part of either."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


def replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Give the file `path` the content that `write` puts into the open file it is handed.

    The content goes to a temporary name in the same folder, to the disk, and only then to `path`:
    a process killed in between leaves the temporary file behind and `path` as it was.
    """
    # The process's number keeps two runs on one folder out of each other's half-written files.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and its names are not cached
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays to a .npz file, all of them or nothing."""
    replace(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load(path: Path) -> dict[str, NDArray[Any]]:
    """Read what `save` wrote. A file that is something else raises ValueError."""
    try:
        # Opened here: NumPy leaves a file open that turns out to be no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # zipfile and NumPy each have their own for a damaged file
        raise ValueError(f"{path} is not a file that omniadam train wrote: {error}") from error
