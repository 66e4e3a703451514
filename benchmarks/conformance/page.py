"""docs/conformance.md and its picture, from what the probes found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from adapters import ROWS

from cases import SINGLE, WHOLE

Found = Mapping[str, Any]


def is_ours(name: str) -> bool:
    return name.startswith("omniadam")


def sentence(text: str) -> str:
    """For between two backticks."""
    return text.replace("\n", " ").replace("`", "'")


def status(found: Found, probe: str) -> str | None:
    """Why there is no value, if there is none."""
    if "not run" in found:
        return "not run"
    if f"{probe}: n/a" in found:
        return "n/a"
    return "refused" if f"{probe}: failed" in found else None


def number(x: Any) -> str:
    if isinstance(x, str):
        return "∞" if "inf" in x else "NaN"
    return f"{x:.2f}" if x < 10 else f"{x:,.0f}"


def percent(x: Any) -> str:
    if isinstance(x, str):
        return number(x)
    return f"{round(100 * x) + 0:,} %" if abs(x) < 100 else "> 10,000 %"


def upper(x: Any) -> str:
    return "none" if x is None else f"1e{x[1]}"


def lower(x: Any) -> str:
    return "none" if x is None else f"1e{x[0]}"


class Column:
    """A title, the probe, the key of what it found, how to write it, and how bad it is.

    `badness` is what a smaller value of is better, or None where there is no better and worse.
    """

    def __init__(
        self,
        title: str,
        probe: str,
        key: str,
        text: Callable[[Any], str] = str,
        badness: Callable[[Any], float] | None = None,
    ) -> None:
        self.title, self.probe, self.key = title, probe, key
        self.text, self.badness = text, badness

    def value(self, found: Found) -> str:
        if (told := status(found, self.probe)) is not None:
            return told
        return self.text(found[self.key]) if self.key in found else "not run"


def _plain(x: Any) -> float:
    return float(x)


def _from_one(x: Any) -> float:
    """16-bit weights: how far from the whole way."""
    return abs(float(x) - 1)


NUMBERS = [
    Column("ε stands", "epsilon", "epsilon"),
    Column("one update", "one_update", "one update", number, _plain),
    Column("50 steps, defaults", "errors", "error, defaults", number, _plain),
    Column("50 steps, worst setting", "errors", "error, worst", number, _plain),
    Column("settings", "errors", "settings"),
    Column("largest gradient", "first_step", "first step", upper, lambda x: -x[1] if x else 99.0),
    Column("smallest gradient", "first_step", "first step", lower, lambda x: x[0] if x else 99.0),
    Column(
        "smallest, ε = 1e-30",
        "first_step",
        "first step, small epsilon",
        lower,
        lambda x: x[0] if x else 99.0,
    ),
]
NARROW = [
    Column("bfloat16 at 1.0, moved", "bfloat16", "bfloat16", percent, _from_one),
    Column("bfloat16, later steps", "smaller_gradients", "later", percent, _from_one),
    Column("float16 at 1.0, moved", "float16", "float16", percent, _from_one),
]
BEHAVIOUR = [
    Column("repeated ids", "repeated_ids", "repeated ids"),
    Column("unused rows", "unused_rows", "unused rows"),
    Column("a NaN in another tensor", "nan_stays", "nan"),
    Column("resumed", "resume", "resume"),
    Column("state, when the order changes", "by_name", "by name"),
]

INTRODUCTION = """\
# How exact is your Adam?

Implementations of Adam differ in the last digits, in where they put epsilon, and in what they do
with 16-bit weights, sparse gradients and saved state. This page measures that: each cell is a run
on a CPU, of the library as it installs from the package index, beside an oracle that computes the
paper in float64 NumPy. omniadam is measured by the same probes as everyone else.

A difference is not always a mistake. Libraries document different choices, and some trade digits
for speed on purpose. Where ε stands was measured first, and each row is compared with the exact
numbers of *its own* form, so that the other form is not counted as an error.

`make conformance` writes this page anew, and `make conformance ARGS="torch optax"` measures these
libraries again. One row alone, in the environment of its library:

    .venv-conformance/torch/bin/python benchmarks/conformance/probes.py "torch, fused"

The probes are in `benchmarks/conformance/probes.py`, how each library is asked in `adapters.py`
beside it. What is on this page stands in [conformance.json](conformance.json) too. If a library of
yours is used in a way that you would not use it, that is a mistake of this page.

![Error of one update, and the gradients for which the first step is right](conformance.png)
"""
ABOUT_NUMBERS = """\
## Digits

float32. Errors are in ulps of the update: units of 2⁻²³ times its size. The best values of a
column are bold.

- **ε stands** outside of the bias correction, as in Keras: `m / (sqrt(v) + ε)`, or inside, as in
  Algorithm 1 of the paper: `m̂ / (sqrt(v̂) + ε)`.
- **one update**: the largest error of a single step, over the first 50, with the default
  settings. All weights are set to 0 before each, so that nothing but the update is rounded. A
  result that is rounded correctly has at most 0.5.
- **50 steps**: the largest error of a weight after 50 steps, beyond what the rounding of the
  weights alone can explain: 0 says no more than that. With the default settings, and the largest
  over the **settings** that the optimizer itself can express, of {settings}: each argument alone
  (rates, betas, ε, AMSGrad, decay, clips, averages, accumulation), and all that go together at
  once. More settings are more opportunities for an error.
- **largest gradient** and **smallest gradient**: the powers of ten up to and down to which the
  first step is right to 0.1 %; asked for are 1e-37 to 1e38. With ε = 1e-30 the first step is ±
  the learning rate for a gradient however small, as long as its square can be held.
"""
ABOUT_NARROW = """\
## 16-bit weights

Learning rate 1e-3, ε 1e-8, and exact steps are 100 %.

- **at 1.0**: how far weights move that start at 1.0, in 300 steps with the same gradient of 2⁻¹⁰.
  In bfloat16 a step of 1e-3 is less than half of the distance to the next number below 1: a
  weight that is rounded to the nearest stays where it is, whatever computed the step. Libraries
  that keep what rounding lost (Kahan summation, correction bits) or round at random do move. In
  float16 the square of this gradient times 0.001, and ε, are below the smallest number: state
  that is held in float16 is zero, and the division is by zero or by little.
- **later steps**: the length of a step in bfloat16 after 100 steps with gradients of 1 and 2,000
  with gradients of 1/64. A second moment held in bfloat16 cannot be multiplied by 0.999, which
  rounds to 1. With exact state 90 % remain when only the weight is rounded.
"""
ABOUT_BEHAVIOUR = """\
## Sparse gradients, NaN, state

- **repeated ids**: of a row that is looked up twice, the gradients are summed and then squared,
  or squared one by one; other numbers are neither.
- **unused rows** of a sparse gradient are moved by their momentum, as by a dense gradient, or
  left alone. `SparseAdam` documents that it leaves them alone, `tf_keras` that it moves them.
- **a NaN in another tensor** for one step: the other tensors end on the same bits as without it.
- **resumed**: five steps, state saved and loaded into a new optimizer, five more, against ten.
- **state, when the order changes**: two parameters of one shape are given to the second
  optimizer in the other order; their state is found by name, by position, or loading is refused.
"""


def shown(column: Column, found: Found, best: str | None) -> str:
    text = column.value(found)
    return f"**{text}**" if text == best else text


def _best(column: Column, rows: Mapping[str, Found]) -> str | None:
    """The text of the best value, or None where there is no better and worse."""
    if column.badness is None:
        return None
    there = [f for f in rows.values() if status(f, column.probe) is None and column.key in f]
    if not there:
        return None
    return column.text(min((f[column.key] for f in there), key=column.badness))


def table(columns: list[Column], rows: Mapping[str, Found]) -> list[str]:
    best = [_best(column, rows) for column in columns]
    lines = ["| | " + " | ".join(c.title for c in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, found in rows.items():
        if "not run" in found:
            continue
        cells = [shown(c, found, b) for c, b in zip(columns, best, strict=True)]
        if columns is BEHAVIOUR and ROWS[name].kind.saves and cells[-1] != "n/a":
            cells[-1] += f" (`{ROWS[name].kind.saves}`)"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def not_best(rows: Mapping[str, Found]) -> list[str]:
    """Where the best value of a column is no row of ours, and what each row of ours has."""
    lines = []
    for column in [*NUMBERS, *NARROW]:
        best = _best(column, rows)
        if best is None:
            continue
        behind = {
            name: column.value(found)
            for name, found in rows.items()
            if is_ours(name) and status(found, column.probe) is None and column.value(found) != best
        }
        first = [
            name
            for name, found in rows.items()
            if not is_ours(name) and column.value(found) == best
        ]
        if not behind or not first:
            continue
        ours = "; ".join(f"{name} {text}" for name, text in behind.items())
        lines.append(f"- {column.title}: {best} ({', '.join(first)}). {ours}.")
    named = [n for n, f in rows.items() if f.get("by name") == "by name" and not is_ours(n)]
    others = [n for n, f in rows.items() if f.get("by name", "by name") != "by name" and is_ours(n)]
    if named and others:
        lines.append(
            f"- state, when the order changes: found by name ({', '.join(named)}). "
            + "; ".join(f"{n} {rows[n]['by name']}" for n in others)
            + "."
        )
    return lines


def reasons(rows: Mapping[str, Found]) -> list[str]:
    """What did not run, failed or was refused, in the words of the library."""
    lines = []
    for name, found in rows.items():
        if "not run" in found:
            lines.append(f"- {name}: {sentence(found['not run'])}")
        told: dict[str, list[str]] = {}
        for key, value in found.items():
            what, _, how = key.rpartition(": ")
            if how == "failed":
                told.setdefault(value, []).append(f"{what.replace('_', ' ')} refused")
            elif key.endswith(", why"):
                told.setdefault(value, []).append(f"{key[:-5]} refused")
        for why, which in told.items():
            lines.append(f"- {name}, {', '.join(which)}: `{sentence(why)}`")
    return lines


def versions(rows: Mapping[str, Found]) -> list[str]:
    lines = ["| | versions | measured |", "|---|---|---|"]
    for name, found in rows.items():
        held = ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items())
        lines.append(f"| {name} | {held or 'not run'} | {found['on']} |")
    return lines


def picture(rows: Mapping[str, Found], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there = {n: f for n, f in rows.items() if isinstance(f.get("first step"), list)}
    names = list(there)[::-1]
    colors = ["#c2410c" if is_ours(n) else "#334155" for n in names]
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(11, 1.6 + 0.27 * len(names)), layout="constrained"
    )
    for i, name in enumerate(names):
        found = there[name]
        x = found.get("one update")
        if isinstance(x, float):
            left.plot([0.1, x], [i, i], color=colors[i], linewidth=1, alpha=0.35)
            left.plot(x, i, "o", color=colors[i])
            left.annotate(f" {number(x)}", (x, i), va="center", xytext=(5, 0),
                          textcoords="offset points", fontsize=8, color=colors[i])  # fmt: skip
        else:
            left.annotate("n/a", (0.11, i), va="center", fontsize=8, color=colors[i])
        low, high = found["first step"]
        right.plot([low, high], [i, i], color=colors[i], linewidth=5, solid_capstyle="butt")
        right.annotate(f"1e{high}", (high, i), va="center", xytext=(5, 0),
                       textcoords="offset points", fontsize=8, color=colors[i])  # fmt: skip
    left.set_xscale("log")
    left.set_xlim(0.1, 300)
    left.axvline(0.5, color="#94a3b8", linestyle=":", linewidth=1)
    left.set_yticks(range(len(names)), names)
    for label, color in zip(left.get_yticklabels(), colors, strict=True):
        label.set_color(color)
    left.set_xlabel("ulps of the update, float32 (dotted: rounded correctly)")
    left.set_title("Largest error of one update, default settings", fontsize=10)
    right.set_xlim(-38, 39)
    ticks = range(-30, 31, 15)
    right.set_xticks(ticks, [f"1e{t}" if t else "1" for t in ticks])
    right.set_xlabel("size of the gradient")
    right.set_title("Where the first step is right to 0.1 %", fontsize=10)
    for axis in (left, right):
        axis.grid(axis="x", color="#e2e8f0")
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(found: Mapping[str, Any], docs: Path) -> None:
    rows: dict[str, Found] = found["rows"]
    parts = [
        INTRODUCTION,
        ABOUT_NUMBERS.format(settings=len(SINGLE) + len(WHOLE) + 1)
        + "\n"
        + "\n".join(table(NUMBERS, rows)),
        ABOUT_NARROW + "\n" + "\n".join(table(NARROW, rows)),
        ABOUT_BEHAVIOUR + "\n" + "\n".join(table(BEHAVIOUR, rows)),
        "## Where omniadam is not the best\n\n"
        "The best value of a column, and what has it; then what rows of omniadam have instead.\n\n"
        + "\n".join(not_best(rows) or ["- Nowhere on this page."]),
        "## What is behind some rows\n\n"
        + "\n".join([*(f"- {name}: {ROWS[name].note}" for name in rows if ROWS[name].note)]),
        "## What did not run, and what was refused\n\n" + "\n".join(reasons(rows) or ["Nothing."]),
        f"## Versions\n\n{found['machine']}.\n\n" + "\n".join(versions(rows)),
    ]
    text = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    (docs / "conformance.md").write_text(text, encoding="utf-8")
    picture(rows, docs / "conformance.png")
