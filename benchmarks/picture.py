"""The picture of README: how long peers take for a step, and how far they are from the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, OTHERS = "#2a6f97", "#b8bfc6"
# The set and the kind of step that is drawn.
DRAWN = ("ResNet-50", "full")
# What `make conformance` calls them.
_ROWS = {
    "omniadam": "omniadam on NumPy",
    "torch fused": "torch, fused",
    "torch foreach": "torch, foreach",
    "optax": "optax",
    "Keras on JAX": "Keras on JAX",
    "Keras on TensorFlow": "Keras on TensorFlow",
    "Keras on PyTorch": "Keras on PyTorch",
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw what `make bench` has measured, of the section "numpy", and `make conformance`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results["numpy"]["rows"] if (r["set"], r["mode"]) == DRAWN]
    times = {row["peer"]: row["theirs"] / row["ours"] for row in rows}
    times = {"omniadam": 1.0, **dict(sorted(times.items(), key=lambda each: each[1]))}
    exactness = json.loads((path.parent / "conformance.json").read_text())["rows"]
    errors = {name: exactness[_ROWS[name]]["one update"] for name in times if name in _ROWS}

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.2), width_ratios=(3, 2), layout="constrained"
    )
    _bars(left, times, "{:.1f}")
    left.set_title("Time of a step (omniadam = 1)", fontsize=10, loc="left")
    machine = results["numpy"]["machine"].split(";")[0]
    left.set_xlabel(
        "ResNet-50, 25.6 M parameters, with a norm clip, weight decay and an average\n" + machine,
        fontsize=8,
    )
    _bars(right, errors, "{:.2g}")
    right.set_xscale("log")
    right.set_xlim(0.5, 200)
    right.set_ylim(left.get_ylim())
    right.set_title("Largest error of an update, in ulps", fontsize=10, loc="left")
    right.set_xlabel("float32, default settings, 50 steps\n(docs/conformance.md)", fontsize=8)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _bars(axes: Any, values: Mapping[str, float], form: str) -> None:
    names = list(values)
    colours = [OURS if name == "omniadam" else OTHERS for name in names]
    bars = axes.barh(names, list(values.values()), color=colours, height=0.7)
    axes.bar_label(bars, [form.format(v) for v in values.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw_pauses(found: Sequence[Sequence[float]], path: Path) -> None:
    """Draw how long rows take to catch up after pauses, beside the steps that this replaces."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pauses, own, dense = zip(*found, strict=True)
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.loglog(
        pauses, dense, "o-", color=OTHERS, label="the passes over all rows that it replaces"
    )
    axes.loglog(pauses, own, "o-", color=OURS, label="4,096 rows catch up")
    axes.set_title("Time to catch up, 1,000,000 x 64 float32", fontsize=10, loc="left")
    axes.set_xlabel("steps without a gradient", fontsize=9)
    axes.set_ylabel("seconds", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)
