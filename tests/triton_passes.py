"""The passes that kernels for a GPU are tested on: every setting of a pass, and each by itself."""

from __future__ import annotations

from omniadam.adam import ADAM, AMSGRAD
from omniadam.rule import NOTHING, Pass, Rule

STEP = Pass(gradient=True, updates=True)
# What may stand in one step: an L2 penalty and decoupled decay too, though no optimizer has both.
EVERYTHING = STEP._replace(
    scaled=True,
    accumulated=True,
    clipped_by_factor=True,
    clipped_by_value=True,
    negated=True,
    penalised=True,
    decayed=True,
    averaged=True,
    overwritten=True,
)
NORM = STEP._replace(scaled=True, measured=("gradient",), measures_only=True)

PASSES: dict[str, tuple[Pass, Rule]] = {
    "step": (STEP, ADAM),
    "full": (STEP._replace(clipped_by_factor=True, decayed=True, averaged=True), ADAM),
    "everything": (EVERYTHING, AMSGRAD),
    "micro-step": (Pass(gradient=True, scaled=True, accumulated=True), NOTHING),
    "average": (Pass(gradient=False, averaged=True, overwritten=True), NOTHING),
    "norm": (NORM, NOTHING),
    "norm of a mean": (NORM._replace(accumulated=True, clipped_by_value=True), NOTHING),
}
