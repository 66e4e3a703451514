"""Files that are, at every moment, the old one or the new one and never a part of either."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

fcntl: Any = None
with suppress(ImportError):  # POSIX
    import fcntl

# Of the threads of this process, which have a lock on a file together; and which of them has it.
_turn, _holder = threading.Lock(), 0


def _forget_other_threads() -> None:
    global _turn, _holder
    _turn, _holder = threading.Lock(), 0


@contextmanager
def _in_turn() -> Iterator[None]:
    global _holder
    if _holder == threading.get_ident():  # which would wait for itself for ever
        raise OSError(
            errno.EDEADLK, "A file is being written by this thread, which a signal has interrupted"
        )
    with _turn:
        _holder = threading.get_ident()
        try:
            yield
        finally:
            _holder = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def replace(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Give the file `path` the content that `write` puts into the open file it is handed.

    The content goes to `.{name}.partial` in the same folder, to the disk, and only then to `path`:
    a process killed in between leaves that file behind, which the next call replaces, and `path`
    as it was. Of two calls for one path, one waits for the other.

    Args:
        path: of the file; of a link, the file that it leads to.
        write: is handed a file that is open for writing bytes.

    Raises:
        OSError: if it cannot be written; the file is as it was, and nothing is left beside it.
    """
    shown, path = os.fspath(path), Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a folder, and not the name of a file")
        with _in_turn(), _locked(partial) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                with suppress(OSError):  # there is none yet, or it is another user's
                    os.chmod(partial, path.stat().st_mode & 0o7777)
                if fcntl is None:  # Windows moves no file that is open
                    file.close()
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno, f"{reason}: {shown} was not written, and is as it was before"
        ) from error
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync_folder(path.parent)


@contextmanager
def _locked(partial: Path) -> Any:
    """The file, empty, and nobody else's while it is open."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        with open(descriptor, "r+b", buffering=0) as file:
            if fcntl is not None:
                # It is let go of when this process is gone, though forks of it may live on.
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
                # Whoever had it before has given it its name, or taken it away.
                if not _is_at(partial, descriptor):
                    continue
            file.truncate()
            yield file
            return


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk, where folders can be opened for it."""
    with suppress(PermissionError):  # a folder may be written to and not read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
