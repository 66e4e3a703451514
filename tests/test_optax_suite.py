"""The tests in optax's wheel of adam, and of what is built on it, with ours in its place."""

from __future__ import annotations

from typing import NamedTuple

import pytest

optax = pytest.importorskip("optax")

from suites import run_suite  # noqa: E402

pytestmark = pytest.mark.slow
COUNTED = "0.2.8"


class Suite(NamedTuple):
    passed: int
    modules: tuple[str, ...]
    chosen: str
    double: bool = False


SUITES = {
    "solvers": Suite(96, ("optax._src.alias_test",), "AliasTest"),
    "contrib": Suite(20, ("optax.contrib._common_test",), "ContribTest"),
    "around": Suite(
        47,
        (
            "optax._src.transform_test",
            "optax._src.float64_test",
            "optax._src.combine_test",
            "optax.schedules._inject_test",
            "optax.tree_utils._state_utils_test",
            "optax.contrib._sam_test",
            "optax.contrib._complex_valued_test",
        ),
        "inject or Inject or StateUtils or chain or labels or extra_args or SAM or lamb or"
        " (adam and not adamax and not radam and not rms)",
    ),
    # Beside other solvers of optax, with the roundings of each: in float32 those of optax are 1e-4.
    "double": Suite(
        2,
        ("optax._src.transform_test", "optax.contrib._schedule_free_test"),
        "rms_match_adam or free_adamw",
        double=True,
    ),
}


@pytest.mark.needs("flax")
@pytest.mark.skipif(optax.__version__ != COUNTED, reason=f"counted in optax {COUNTED}")
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suite(suite: Suite) -> None:
    precision = {"JAX_ENABLE_X64": str(int(suite.double))}
    counts = run_suite("optax_suite", *suite.modules, "-k", suite.chosen, **precision)
    assert counts["passed"] == suite.passed
    assert not counts.keys() & {"failed", "error", "errors"}
