"""The versions of other libraries: what is promised is tested, and what is older is told so."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from omniadam.versions import OLDEST, is_too_old

ROOT = Path(__file__).parents[1]


def bounds() -> dict[str, set[str]]:
    """What pyproject.toml asks for: library -> the lower bounds that it is given."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    found: dict[str, set[str]] = {}
    for requirement in [*project["dependencies"], *(each for extra in extras for each in extra)]:
        if match := re.match(r"([\w-]+)>=([\d.]+)", requirement):
            found.setdefault(match[1].removesuffix("-cpu"), set()).add(match[2])
    return found


@pytest.mark.parametrize("library", OLDEST)
def test_the_bound_is_the_one_of_the_package(library: str) -> None:
    assert bounds()[library] == {OLDEST[library]}


@pytest.mark.parametrize(
    "library", sorted(set(bounds()) - {"codespell", "mkdocs-material", "mypy", "ruff", "torch"})
)
def test_the_oldest_versions_are_tested(library: str) -> None:
    """Or the oldest that install together with the others."""
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    pinned = pins.get(library) or pins[f"{library}-cpu"]
    (bound,) = bounds()[library]
    assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pinned)


def test_versions_are_compared_as_numbers() -> None:
    assert all(is_too_old("jax", each) for each in ("0.7.1", "0.7", "0.6.10", "0.7.1.dev3+g1"))
    newer = ("0.7.2", "0.10.0", "1.0", "0.7.2rc1", "0.8.0.dev20260101", "unknown")
    assert not any(is_too_old("jax", each) for each in newer)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


VARIABLES = {
    "torch": "torch.ones(1)",
    "jax": "jax.new_ref(jax.numpy.ones(1))",
    "tensorflow": "tensorflow.Variable([1.0])",
    "keras": "keras.Variable([1.0])",
}


@pytest.fixture(scope="module")
def refused() -> list[str]:
    """What is said of each, twice, in a process in which all are too old."""
    code = f"""
import importlib, os
os.environ |= {{"KERAS_BACKEND": "numpy", "TF_CPP_MIN_LOG_LEVEL": "3"}}
import numpy
from omniadam import Adam
for library, variable in {VARIABLES}.items():
    module = importlib.import_module(library)
    module.__version__ = "0.7.1"
    w = eval(variable, {{library: module}})
    for _ in range(2):
        opt = Adam()
        try:
            opt.build([w])
        except ImportError as error:
            print(error)
    Adam().build([numpy.ones(1)])  # which needs no other library
"""
    return run(code).splitlines()


@pytest.mark.needs(*VARIABLES)
@pytest.mark.parametrize("library", VARIABLES)
def test_a_library_that_is_too_old_is_named(library: str, refused: list[str]) -> None:
    expected = f"omniadam needs {library} {OLDEST[library]} or newer. Found {library} 0.7.1:"
    assert sum(line.startswith(expected) for line in refused) == 2
    assert len(refused) == 2 * len(VARIABLES)


@pytest.mark.parametrize("drop_in", ["torch", "optax"])
def test_a_drop_in_of_a_library_that_is_too_old_is_an_error(drop_in: str) -> None:
    pytest.importorskip(drop_in)
    code = f"""
import {drop_in}
{drop_in}.__version__ = "0.2.3"
try:
    import omniadam.{drop_in}
except ImportError as error:
    print(error)
"""
    assert f"needs {drop_in} {OLDEST[drop_in]} or newer" in run(code)


def test_a_numba_that_is_too_old_is_slow() -> None:
    code = """
import importlib.metadata, warnings
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.61.2" if name == "numba" else version(name)
import numpy
from omniadam import Adam
w = numpy.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    opt = Adam(0.1)
    for _ in range(2):
        opt.apply_gradients([(numpy.ones(3), w)])
assert abs(w - 0.8).max() < 1e-6
print(*(each.message for each in caught), sep="\\n")
"""
    lines = run(code).splitlines()
    assert len(lines) == 1
    assert "numba 0.62 or newer. Found numba 0.61.2: steps run on NumPy" in lines[0]
