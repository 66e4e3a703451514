"""The versions of other libraries: what is promised is tested, and what is older is told so."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import omniadam
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


# What makes the package and its pages.
TOOLS = {
    "build",
    "check-jsonschema",
    "codespell",
    "hatch-fancy-pypi-readme",
    "hatchling",
    "mkdocs-material",
    "mypy",
    "ruff",
    "twine",
}


@pytest.mark.parametrize("library", sorted(set(bounds()) - TOOLS - {"torch"}))
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


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^version: (.*)$", text) == [omniadam.__version__]


def test_what_builds_the_package_is_in_the_environment_that_builds_it() -> None:
    """`make dist` builds without isolation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = project["build-system"]["requires"]
    assert {*needed} <= {*project["project"]["optional-dependencies"]["lint"]}


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
    """What is said of each by every class, in a process in which all are too old."""
    code = f"""
import importlib, os
os.environ |= {{"KERAS_BACKEND": "numpy", "TF_CPP_MIN_LOG_LEVEL": "3"}}
import numpy
given = lambda made, v: (v, {{}}, abs) if made is contrib_keras.Adam else (abs, v)
from omniadam import Adam
from omniadam.compat import contrib_keras, optimizer_v2
for library, variable in {VARIABLES}.items():
    module = importlib.import_module(library)
    module.__version__ = "0.7.1"
    w = eval(variable, {{library: module}})
    for made in (Adam, Adam, contrib_keras.Adam, optimizer_v2.Adam):
        try:
            opt = made()
            build = opt.build if made is Adam else lambda v: opt.get_updates(*given(made, v))
            build([w])
        except ImportError as error:
            print(error)
    Adam().build([numpy.ones(1)])  # which needs no other library
"""
    return run(code).splitlines()


@pytest.mark.needs(*VARIABLES)
@pytest.mark.parametrize("library", VARIABLES)
def test_a_library_that_is_too_old_is_named(library: str, refused: list[str]) -> None:
    expected = f"omniadam needs {library} {OLDEST[library]} or newer. Found {library} 0.7.1:"
    assert sum(line.startswith(expected) for line in refused) == 4
    assert len(refused) == 4 * len(VARIABLES)


DROP_INS = {"torch": "torch", "keras": "keras", "optax": "optax", "jax": "optax"}


@pytest.fixture(scope="module")
def refused_drop_ins() -> list[str]:
    """What is said of each: too old, without what is imported of it, and not to be imported."""
    return run(f"""
import importlib.metadata, os, sys
os.environ["KERAS_BACKEND"] = "numpy"
importlib.metadata.version = lambda name: "0.2.3"
for library, drop_in in {DROP_INS}.items():
    whole, empty = importlib.import_module(library), type(sys)(library)
    version = whole.__version__
    for now in (whole, empty, None):
        sys.modules[library] = now
        if now is not None:
            now.__version__ = "0.2.3"
        try:
            importlib.import_module(f"omniadam.{{drop_in}}")
        except ImportError as error:
            print(error)
    sys.modules[library], whole.__version__ = whole, version
""").splitlines()


@pytest.mark.needs(*DROP_INS)
@pytest.mark.parametrize("library", DROP_INS)
def test_a_drop_in_of_a_library_that_is_too_old_is_an_error(
    library: str, refused_drop_ins: list[str]
) -> None:
    expected = f"omniadam needs {library} {OLDEST[library]} or newer. Found {library} 0.2.3:"
    assert sum(line.startswith(expected) for line in refused_drop_ins) == 3
    assert len(refused_drop_ins) == 3 * len(DROP_INS)


def test_a_numpy_that_is_too_old_is_named() -> None:
    code = """
import numpy
numpy.__version__ = "1.26.4"
import omniadam
try:
    omniadam.Adam().build([numpy.ones(1)])
except ImportError as error:
    print(error)
"""
    assert "omniadam needs numpy 2.0 or newer. Found numpy 1.26.4: pip install" in run(code)


# --- What is not installed -----------------------------------------------------------------------

# The library that is not there, who needs it, what is said of that, and how it is installed.
MISSING = {
    "torch": ("import omniadam.torch", "omniadam.torch", "torch]'."),
    "keras": ("import omniadam.keras", "omniadam.keras", "keras]'. Keras computes with"),
    "tensorflow": ("import omniadam.keras", "omniadam.keras", "tensorflow]'. Keras computes with"),
    "optax": ("import omniadam.optax", "omniadam.optax", "optax]'."),
    "jax": ("import omniadam.optax", "omniadam.optax", "optax]'."),
    "autograd": (
        "omniadam.Adam().minimize(lambda w: w, [numpy.ones(())])",
        "Differentiating a loss over NumPy arrays",
        "autograd]'. Or compute the gradients yourself",
    ),
}


@pytest.fixture(scope="module")
def missing() -> list[str]:
    """What is said, in the order of `MISSING`, in a process in which each is missing in turn."""
    return run(f"""
import os, sys
import numpy, omniadam
os.environ["KERAS_BACKEND"] = "tensorflow"
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == library:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for library, use in { {name: use for name, (use, *_) in MISSING.items()}!r}.items():
    sys.modules.pop(library, None)
    try:
        exec(use)
    except ModuleNotFoundError as error:
        print(error.name, error)
# What is broken is not missing.
library, sys.modules["jax.core"] = None, None
try:
    import omniadam.optax
except ModuleNotFoundError as error:
    print(error.name, error)
""").splitlines()


@pytest.mark.needs("keras", "jax")
@pytest.mark.parametrize("library", MISSING)
def test_what_is_not_installed_is_named_with_its_extra(library: str, missing: list[str]) -> None:
    _, user, rest = MISSING[library]
    said = missing[list(MISSING).index(library)]
    expected = f"{library} {user} needs {library}, which is not installed: pip install 'omniadam["
    assert said.startswith(expected + rest)
    assert missing[len(MISSING) :] == ["jax.core import of jax.core halted; None in sys.modules"]


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
    assert "numba 0.62 or newer; numba 0.61.2 is installed, so that steps run on NumPy" in lines[0]
