"""Which of the optimizers in a file is meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def place_in(places: Mapping[str, Any], key: str | None, path: Path, what: str) -> Any:
    """The one that is meant.

    Args:
        places: what there is, by the keys that lead to it, with dots between.
        key: such keys, or the first of them, with dots or slashes between; None for the only one.
        path: of the file.
        what: is looked for, for messages.

    Raises:
        ValueError: if there is none, or it is not clear which is meant.
    """
    wanted = None if key is None else key.replace("/", ".").strip(".")
    found = [
        place
        for place in places
        if wanted is None or place == wanted or place.startswith(f"{wanted}.")
    ]
    if len(found) == 1:
        return places[found[0]]
    shown = sorted(place or "(the whole file)" for place in (found or places))
    if not places:
        raise ValueError(f"'{path}' must hold the state of an Adam: {what}. It has none.")
    if key is None or found:
        raise ValueError(f"'{path}' holds {len(shown)} optimizers. Name one as the key: {shown}.")
    raise ValueError(f"'{path}' holds no optimizer at the key '{key}'. There are: {shown}.")
