"""Run by test_docs.py, in a process for each of Keras's backends: what the documentation shows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def blocks(file: str) -> list[str]:
    return BLOCK.findall((ROOT / file).read_text(encoding="utf-8"))


def backend_of(code: str) -> str:
    """The one that it names, or JAX."""
    named = re.search(r"KERAS_BACKEND=(\w+)\n", code)
    return named[1] if named else "jax"


SHOWN = {
    f"{file}:{i}": code
    for file in ("docs/deviations.md", "docs/keras.md")
    for i, code in enumerate(blocks(file))
}
SHOWN |= {
    f"examples/{path.name}": path.read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("examples/keras*.py"))
}


@pytest.mark.parametrize(
    "where", [each for each in SHOWN if backend_of(SHOWN[each]) == os.environ["KERAS_BACKEND"]]
)
def test_shown(where: str) -> None:
    exec(compile(SHOWN[where], where, "exec"), {"__name__": "__main__"})
