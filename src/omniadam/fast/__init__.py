"""What exists only to be fast: a file for each library, and one switch for all.

Here it is recognised that all is as at the last step, so that nothing need be checked again; steps
are compiled as a whole; and memory is read by its layout instead of by asking. Private names of
other projects are used in this folder, each tried before it is trusted. With `OMNIADAM_FAST=0` in
the environment nothing of it is used, and every step takes the long way, which is as right.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

T = TypeVar("T")


def once(trial: Callable[[], T]) -> Callable[[], T]:
    """`functools.cache` of what tries something, by one thread: two at once would disturb it."""
    found: list[T] = []
    turn = threading.RLock()

    @wraps(trial)
    def asked() -> T:
        if not found:
            with turn:
                if not found:
                    found.append(trial())
        return found[0]

    told: Any = asked
    told.cache_clear = found.clear
    return asked


@cache
def is_enabled() -> bool:
    """Whether OMNIADAM_FAST allows it, as it does unless it is 0. A process asks once."""
    choice = os.environ.get("OMNIADAM_FAST", "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"OMNIADAM_FAST must be 0 or 1. Received: {choice!r}")
    return choice != "0"
