"""Folders that take the place of others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, fill: Callable[[Path], object]) -> None:
    """Give the folder `path` the content that `fill` puts into another, new or not, beside it.

    The old one is renamed, the new one takes the name, and the old one is removed: a process killed
    between the two leaves it as `.{name}.old`. If anything fails, it is as it was.
    """
    whole = Path(os.path.realpath(path))
    partial, old = (whole.with_name(f".{whole.name}.{end}") for end in ("partial", "old"))
    for each in (partial, old) if whole.exists() else (partial,):
        shutil.rmtree(each, ignore_errors=True)
    try:
        fill(partial)
        if whole.exists():
            os.rename(whole, old)
        try:
            os.rename(partial, whole)
        except BaseException:
            if old.exists():
                os.rename(old, whole)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
