"""Run by test_docs.py, in a process for each of Keras's backends: what the documentation shows."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.S | re.M)
# Pages whose examples want a process with settings of its own: test_torch_optim.py (warnings are
# errors), test_migrate.py (TF_USE_LEGACY_KERAS), test_optax.py, test_rules.py (it is an example).
ELSEWHERE = {"docs/torch.md", "docs/migration.md", "docs/optax.md", "docs/rules.md"}
PAGES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
WITHOUT = "# where omniadam is not installed\n"


def shown(file: str) -> list[tuple[str, str]]:
    """The examples of a page, each with what the page says that it prints, or ""."""
    return BLOCK.findall((ROOT / file).read_text(encoding="utf-8"))


def blocks(file: str) -> list[str]:
    return [code for code, _ in shown(file)]


def backend_of(code: str) -> str:
    """The one that it names, or the library that it imports, or JAX."""
    named = re.search(r"KERAS_BACKEND=(\w+)\n", code)
    library = re.search(r"^import .*\b(torch|tensorflow)\b", code, re.M)
    found = named or library
    return found[1] if found else "jax"


def is_pinned() -> bool:
    """Whether those whose messages are quoted are of the versions that constraints.txt has."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return all(
        f"{library}=={version(library).split('+')[0]}" in pins
        for library in ("jax", "keras", "numpy", "optax", "torch")
    )


SHOWN = {
    f"{file}:{i}": example
    for file in PAGES
    if file not in ELSEWHERE
    for i, example in enumerate(shown(file))
}
SHOWN |= {
    f"examples/{path.name}": (path.read_text(encoding="utf-8"), "")
    for path in sorted(ROOT.glob("examples/keras*.py"))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages save what they save: a later example loads what an earlier one wrote."""
    return tmp_path_factory.mktemp("shown")


@pytest.mark.parametrize(
    "where", [each for each in SHOWN if backend_of(SHOWN[each][0]) == os.environ["KERAS_BACKEND"]]
)
def test_shown(where: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = SHOWN[where]
    monkeypatch.chdir(folder)
    if code.startswith(WITHOUT):
        done = [sys.executable, "-c", f"import sys; sys.modules['omniadam'] = None\n{code}"]
        subprocess.run(done, check=True)
        return
    run = compile(code, where, "exec")
    if not said:
        exec(run, {"__name__": "__main__"})
        return
    printed, kind = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            exec(run, {"__name__": "__main__"})
        except Exception as error:
            kind = type(error).__name__
            print(f"{kind}: {error}")
    assert said.startswith(kind)
    if is_pinned():  # others say it in other words
        assert printed.getvalue() == said
