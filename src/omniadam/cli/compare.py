"""The table of `omniadam train --framework all`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from omniadam.cli.digits import Array
from omniadam.cli.run import Run

# Seen on the default run: at step 60 a relu's input is -2e-7 on NumPy and above zero on PyTorch.
REMARK = """\
Libraries round matrix products differently: weights agree to a few roundings until a relu's input
falls on the other side of zero in one of them, where runs part. Steps that compile are not timed.
Below a library is its own Adam, in the same run. PyTorch's and optax's have epsilon elsewhere, and
Keras's rounds otherwise.
"""


@dataclass
class Result:
    """What a run in one library came to; `problem` if there was none."""

    title: str
    problem: str = ""
    is_own: bool = False  # of the library's own Adam, and no run of omniadam's
    loss: float = 0.0
    accuracy: float = 0.0
    seconds: list[float] = field(default_factory=list)  # of the optimizer in each step
    early: list[Array] = field(default_factory=list)  # weights after the first epoch
    late: list[Array] = field(default_factory=list)  # and after the last

    def note(self, run: Run) -> None:
        """Take down what is to be said of a run; called after each epoch."""
        self.title = run.title
        self.loss, _, _, self.accuracy = run.history[-1]
        self.seconds = run.optimizer_seconds
        self.late = run.weights()
        self.early = self.early or self.late

    def milliseconds(self) -> float:
        """Of a usual step: the first, which compile, are left out."""
        return 1000 * median(self.seconds[min(10, len(self.seconds) // 2) :])


def largest_difference(weights: Sequence[Array], others: Sequence[Array]) -> float:
    """Between two values of one weight."""
    return float(max(np.abs(a - b).max() for a, b in zip(weights, others, strict=True)))


def table(results: Sequence[Result], epochs: int) -> str:
    """A row a run. The first is what the others are compared with."""
    first, *others = results
    titles = ["  " * result.is_own + result.title for result in results]
    width = max(map(len, titles))
    reference = first.title.partition(" ")[0]
    lines = [
        f"{'':{width}}   final      test  optimizer  largest difference from {reference}'s weights",
        f"{'':{width}}    loss  accuracy  ms a step  after epoch 1  after epoch {epochs}",
        f"{first.title:{width}}{measured(first)}",
    ]
    for result, title in zip(others, titles[1:], strict=True):
        row = f"{title:{width}}"
        if result.problem:
            row += f"  {result.problem}"
        else:
            early = largest_difference(result.early, first.early)
            late = largest_difference(result.late, first.late)
            row += f"{measured(result)}{early:15.1e}{late:15.1e}"
        lines.append(row)
    return "\n".join([*lines, "", REMARK])


def measured(result: Result) -> str:
    """The columns that a run has by itself."""
    return f"{result.loss:8.4f}{result.accuracy:10.2%}{result.milliseconds():11.3f}"
