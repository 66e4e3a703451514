"""Tests of a script that need a process of their own, such as one for each of Keras's backends.

pytest runs them there; here each has its name and its outcome.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent


class Skipped(str):
    """Why a test was left out."""


def outcomes(
    script: str, names: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str | None]:
    """Run these tests of `script` in one process, and say of each what failed, or None."""
    paths = os.pathsep.join((str(HERE.parent / "src"), str(HERE)))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # Warnings are not errors there: they are Keras's and its backends'.
    options = ["-c", os.devnull, "--rootdir", str(HERE), "-p", "no:cacheprovider", "-p", "no:xdist"]
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-v", "--color=no", *options),
                *(f"--junit-xml={report}", *(f"{HERE / script}::{name}" for name in names)),
            ],
            env=inherited | {"PYTHONPATH": paths} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # A process that died has written nothing; what it printed says at which test.
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        found: dict[str, str | None] = dict.fromkeys(names, done.stdout)
        for case in cases:
            failed = [part.text or part.tag for part in case if part.tag != "skipped"]
            left_out = [part.get("message", "") for part in case if part.tag == "skipped"]
            outcome = "\n".join(failed) or (Skipped(*left_out) if left_out else None)
            found[case.get("name", "")] = outcome
    return found


def by_backend(script: str, **environment: str) -> Callable[[pytest.FixtureRequest], None]:
    """What a test with the parameters `backend` and `name` calls: it fails as the one in there did.

    All that are asked for of one backend run in one process, at the first of them.
    """
    ended: dict[str, dict[str, str | None]] = {}

    def check(request: pytest.FixtureRequest) -> None:
        this = request.node
        backend, name = this.callspec.params["backend"], this.callspec.params["name"]
        if backend not in ended:
            items = [each for each in request.session.items if each.parent is this.parent]
            chosen = [
                each.callspec.params["name"]
                for each in items
                if getattr(each, "originalname", None) == this.originalname
                and each.callspec.params["backend"] == backend
            ]
            ended[backend] = outcomes(script, chosen, environment | {"KERAS_BACKEND": backend})
        failed = ended[backend][name]
        if isinstance(failed, Skipped):
            pytest.skip(failed)
        if failed is not None:
            pytest.fail(failed, pytrace=False)

    return check


def interpreted(script: str) -> Callable[[pytest.FixtureRequest], None]:
    """What a test with the parameter `name` calls: Triton interprets kernels in there.

    All that are asked for run in one process; a name may stand for several cases.
    """
    ended: dict[str, str | None] = {}

    def check(request: pytest.FixtureRequest) -> None:
        this = request.node
        if not ended:
            items = [each for each in request.session.items if each.parent is this.parent]
            chosen = [
                each.callspec.params["name"]
                for each in items
                if getattr(each, "originalname", None) == this.originalname
            ]
            ended.update(outcomes(script, chosen, {"TRITON_INTERPRET": "1"}))
        name = this.callspec.params["name"]
        cases = [k for k in ended if k.startswith(f"{name}[")] or [name]
        for case in cases:
            failed = ended[case]
            assert not isinstance(failed, Skipped)
            if failed is not None:
                pytest.fail(f"{case}: {failed}", pytrace=False)

    return check
