"""Tests of other projects, run as they are installed and with ours in the place of theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import omniadam

TESTS = Path(__file__).parent
SOURCE = Path(omniadam.__file__).parents[1]


def run_suite(plugin: str, *arguments: str, **environment: str) -> Counter[str]:
    """Run pytest in a process of its own, and count what its last line counts.

    Args:
        plugin: a module of this folder that pytest loads before it collects anything. It puts ours
            in the place of theirs, and may select tests by pytest's hooks.
        arguments: of pytest: names of modules, such as `optax._src.alias_test`, or paths, and `-k`.
        environment: variables of the process, such as `KERAS_BACKEND`.

    Returns:
        How many tests ended how: "passed", "failed", "skipped", "deselected", "error", ...
        What the process printed is shown where the calling test fails.
    """
    # Neither our settings, of which warnings as errors are one, nor files beside theirs.
    options = ["-c", os.devnull, "--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-p", "no:xdist", "-q", "--color=no", "-p", plugin, "--pyargs"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    paths = os.pathsep.join((str(SOURCE), str(TESTS)))
    own = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    with TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--rootdir", empty, *options, *arguments],
            cwd=empty,
            env=inherited | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    print(done.stdout)
    last = re.findall(r"^(?:=+ )?(\d+ .*) in [\d.]+s\b", done.stdout, re.M)
    assert last, f"pytest ended with {done.returncode} and counted nothing"
    return Counter({what: int(n) for n, what in re.findall(r"(\d+) ([a-z ]+)", last[-1])})
