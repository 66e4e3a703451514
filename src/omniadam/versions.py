"""The oldest version of each library that omniadam works with, as pyproject.toml has it."""

from __future__ import annotations

import re
from typing import Any

OLDEST = {
    "numba": "0.62",
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


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]
