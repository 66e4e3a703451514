"""The picture of a training run."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omniadam.cli import checkpoint

LEARN, TEST, INK, GRID = "#8da0b3", "#d1495b", "#2f3b46", "#e6eaee"


def draw(path: Path, history: NDArray[np.float64], title: str) -> None:
    """Draw loss and accuracy over the epochs into a PNG file.

    Args:
        path: the file to write.
        history: an epoch a row: training loss and accuracy, test loss and accuracy.
        title: one line above the curves.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    epochs = np.arange(1, len(history) + 1)
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
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        panels = figure.subplots(1, 2)
        for panel, name, column in zip(
            panels, ("loss, log scale", "accuracy"), (0, 1), strict=True
        ):
            for label, color, values in (
                ("training", LEARN, history[:, column]),
                ("test", TEST, history[:, column + 2]),
            ):
                panel.plot(epochs, values, color=color, lw=2, label=label, marker=marker)
            panel.set_xlabel("epoch")
            panel.set_title(name, loc="left", fontsize=11)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            panel.grid(axis="y", color=GRID)
            panel.tick_params(which="both", length=0)
            panel.margins(x=0.02)
        loss, accuracy = panels
        loss.set_yscale("log")
        loss.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        loss.legend(frameon=False)
        accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        checkpoint.replace(path, lambda file: figure.savefig(file, format="png"))
