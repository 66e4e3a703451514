"""Bytes of a file, read at any place, for as long as something may read them."""

from __future__ import annotations

import os
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..saving.snapshot import Tensor

Array = npt.NDArray[Any]


class Source:
    """A part of an open file, which stays open: what takes its place later is not read.

    Args:
        file: opened for reading in binary mode.
        start: where the part begins.
        size: how long it is; None is up to the end.
    """

    def __init__(self, file: IO[bytes], start: int = 0, size: int | None = None) -> None:
        self._file, self._start = file, start
        whole = os.fstat(file.fileno()).st_size
        self.size = whole - start if size is None else size
        if not 0 <= start <= start + self.size <= whole:
            raise ValueError("it ends before what it should hold")
        self._turn = threading.Lock()
        weakref.finalize(self, file.close)

    @classmethod
    def open(cls, path: Path) -> Source:
        """All of a file."""
        return cls(open(path, "rb"))

    def close(self) -> None:
        """Let go of the file, so that another may take its place: Windows replaces no open one."""
        self._file.close()

    def part(self, start: int, size: int) -> Source:
        """A part of this part."""
        found = Source.__new__(Source)
        found.__dict__.update(self.__dict__, _start=self._start + start, size=size, _whole=self)
        if not 0 <= start <= start + size <= self.size:
            raise ValueError("it ends before what it should hold")
        return found

    def at(self, place: int, count: int) -> bytes:
        """Bytes from a place on."""
        if not 0 <= place <= place + count <= self.size:
            raise ValueError("it refers to what is beyond its end")
        with self._turn:
            self._file.seek(self._start + place)
            found = self._file.read(count)
        if len(found) != count:
            raise ValueError("it has become shorter since it was opened")
        return found

    def blocks(self, block: int = 1 << 22) -> Iterator[bytes]:
        """All of it, a block after another."""
        for place in range(0, self.size, block):
            yield self.at(place, min(block, self.size - place))

    def array(self, place: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array that is stored as it is, in the machine's byte order."""
        count = int(np.prod(shape, dtype=object)) if shape else 1
        found = np.frombuffer(self.at(place, count * dtype.itemsize), dtype).reshape(shape)
        return found.astype(dtype.newbyteorder("="), copy=False)


class Patch(NamedTuple):
    """What a place is to hold instead."""

    place: int
    size: int
    content: Callable[[], bytes]


def patched(source: Source, patches: Iterable[Patch]) -> Iterator[bytes]:
    """All bytes, with those of patches in their places; one patch is in memory at a time."""
    at = 0
    for patch in sorted(patches, key=lambda patch: patch.place):
        yield from source.part(at, patch.place - at).blocks()
        content = patch.content()
        if len(content) != patch.size:
            raise ValueError("what is written must be as long as what was there")
        yield content
        at = patch.place + patch.size
    yield from source.part(at, source.size - at).blocks()


@contextmanager
def reading(path: Path, done: str = "read") -> Iterator[None]:
    """Around whatever looks at what is in a file: errors name it, and are ValueErrors."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        EOFError,
        MemoryError,
        OSError,  # those of opening it are raised before
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        why = str(error) if type(error) is ValueError else f"it is damaged ({error!r})"
        raise ValueError(f"'{path}' cannot be {done}: {why.rstrip('.')}.") from error


def tensor(path: Path, shape: tuple[int, ...], dtype: str, read: Callable[[], Array]) -> Tensor:
    """A tensor of a file, with errors that name it."""

    def read_it() -> Array:
        with reading(path):
            return read()

    return Tensor(shape, dtype, read_it)
