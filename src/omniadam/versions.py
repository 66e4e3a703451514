"""The oldest version of each library that omniadam works with, as pyproject.toml has it.

What needs a library imports it inside of `imported(...)`, which says what to install where it is
missing or too old.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

OLDEST = {
    "numpy": "2.0",
    "numba": "0.62",
    "safetensors": "0.7",
    "autograd": "1.8",
    "torch": "2.7",
    "jax": "0.7.2",
    "tensorflow": "2.19",
    "keras": "3.10",
    "optax": "0.2.4",
}


def is_too_old(library: str, version: Any) -> bool:
    """Whether a version is known to be older than the oldest; by its release."""
    found = re.match(r"\d+(?:\.\d+)*", str(version))
    return found is not None and _numbers(found.group()) < _numbers(OLDEST[library])


def check(library: str, version: Any) -> None:
    """Raise ImportError if a library that is imported is too old.

    Where omniadam came without the extra that asks for it, no installer has looked.
    """
    if is_too_old(library, version):
        raise ImportError(
            f"omniadam needs {library} {OLDEST[library]} or newer. Found {library} {version}: "
            f"pip install '{library}>={OLDEST[library]}'."
        )


@contextmanager
def imported(*libraries: str, user: str = "omniadam", hint: str = "") -> Iterator[None]:
    """Around the imports of libraries: a missing one is named with the extra that installs it, and
    one that is too old is refused, also where it fails to import because of that.

    Args:
        *libraries: names of packages.
        user: what needs them, as the subject of a sentence. The extra of omniadam that installs
            them has the name of the first.
        hint: what else may be done where one is missing: a sentence.

    Raises:
        ModuleNotFoundError: if one is missing; its `name` is the library's, as Python's error has.
        ImportError: if one is too old.
    """
    try:
        yield
    except Exception as error:
        for library in libraries:
            check(library, _version(library))
        missing = getattr(error, "name", None)
        # A library may need another: Keras its backend.
        if not isinstance(error, ModuleNotFoundError) or missing not in (*libraries, *OLDEST):
            raise
        extra = libraries[0] if missing in libraries else missing
        parts = [
            f"{user} needs {missing}, which is not installed: pip install 'omniadam[{extra}]'.",
            hint,
        ]
        raise ModuleNotFoundError(" ".join(filter(None, parts)), name=missing) from error
    for library in libraries:
        check(library, _version(library))


def _version(library: str) -> str:
    """The version of what is imported, or else of what is installed; empty if there is none."""
    found = getattr(sys.modules.get(library), "__version__", None)
    return _installed(library) if found is None else str(found)


@cache
def _installed(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]
