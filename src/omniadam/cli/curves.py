"""The picture of a training run."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omniadam.saving import atomic

LEARN, TEST, INK, FAINT, GRID = "#8da0b3", "#d1495b", "#2f3b46", "#6b7885", "#e6eaee"


def best_epoch(history: NDArray[np.float64]) -> int:
    """The row with the most test accuracy; of several, the one with the least test loss."""
    return int(np.lexsort((history[:, 2], -history[:, 3]))[0])


def draw(path: Path, history: NDArray[np.float64], title: str, result: str) -> None:
    """Draw loss and accuracy over the epochs into a PNG file.

    Args:
        path: the file to write.
        history: an epoch a row: training loss and accuracy, test loss and accuracy.
        title: one line above the curves.
        result: another below it.

    The epoch with the best test accuracy is marked in both panels.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

    class Plain(LogFormatter):  # which decides what is labelled, but not as a power of ten
        def __call__(self, x: float, pos: Any = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    epochs, best = np.arange(1, len(history) + 1), best_epoch(history)
    marker = "o" if len(history) == 1 else None
    style: Any = {  # matplotlib types its 300 keys one by one
        "font.size": 11,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    # A Figure of its own, not pyplot: Agg without touching the caller's backend.
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, name, column in zip(
            panels, ("loss, log scale", "accuracy"), (0, 1), strict=True
        ):
            for label, color, values in (
                ("training", LEARN, history[:, column]),
                ("test", TEST, history[:, column + 2]),
            ):
                panel.plot(epochs, values, color=color, lw=2, label=label, marker=marker)
            panel.axvline(epochs[best], color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
            panel.plot(
                epochs[best],
                history[best, column + 2],
                "o",
                color=TEST,
                mec="white",
                ms=8,
                zorder=3,
            )
            panel.set_xlabel("epoch")
            panel.set_ylabel(name)
            panel.xaxis.set_major_locator(
                MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
            )
            panel.grid(axis="y", color=GRID)
            panel.tick_params(which="both", length=0)
            panel.margins(x=0.02)
        loss, accuracy = panels
        loss.set_yscale("log")
        loss.yaxis.set_major_formatter(Plain())
        loss.yaxis.set_minor_formatter(Plain())
        for panel in panels:
            panel.legend(loc="best", frameon=False)
        # Above the axes, where they begin; it may run on over the second.
        loss.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=26)
        result += f"; best: {history[best, 3]:.2%} after {epochs[best]}, marked"
        below = {"transform": loss.transAxes, "fontsize": 10, "color": FAINT}
        loss.text(0, 1.04, result, **below).set_in_layout(False)
        accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        atomic.replace(path, lambda file: figure.savefig(file, format="png"))
