"""What is asked of each Adam: the probes of one row of docs/conformance.md.

    python benchmarks/conformance/probes.py ROW [PROBE ...]

Runs in the environment of the row's library, prints what each probe found and, last, all of it as
one line of JSON. The oracle (float64, from the paper), the settings and the measure of an error are
those of the tests: tests/reference.py and tests/cases.py.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]

from adapters import ROWS, Adapter, NotOffered, Sparse  # noqa: E402

from cases import CASES, SHAPES, SINGLE, WHOLE, Case, error_in_ulps, variables  # noqa: E402
from cases import gradients as made_gradients  # noqa: E402
from reference import Reference  # noqa: E402

Array = np.ndarray[Any, np.dtype[Any]]
Kind = type[Adapter]
Found = dict[str, Any]
STEPS = 50
# The arguments that every step needs; the oracle's defaults.
DEFAULTS = {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}
# Of the tests' table each argument alone, and, in three rows, all that go together at once.
SETTINGS: dict[str, Case] = {"defaults": CASES["defaults"], **SINGLE, **WHOLE}
gradients = cache(made_gradients)
OUTSIDE, INSIDE = "outside", "inside"


def named(arrays: Sequence[Array]) -> dict[str, Array]:
    return {f"w{i}": a for i, a in enumerate(arrays)}


def made(kind: Kind, arrays: Sequence[Array], dtype: str = "float32", **settings: Any) -> Adapter:
    return kind(named(arrays), dtype, {**DEFAULTS, **settings})


def exact(arrays: Sequence[Array], form: str, **settings: Any) -> Reference:
    return Reference(arrays, epsilon_hat=form == OUTSIDE, **{**DEFAULTS, **settings})


# --- Where epsilon stands ------------------------------------------------------------------------


def _forms(g: Array, steps: int, rate: float, b1: float, b2: float, eps: float) -> dict[str, Array]:
    """The sum of `steps` updates with the same gradient, for each place that epsilon may have."""
    m, v = np.zeros_like(g), np.zeros_like(g)
    names = (OUTSIDE, INSIDE, "under the root, outside", "under the root, inside", "no correction")
    sums = {name: np.zeros_like(g) for name in names}
    for t in range(1, steps + 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        c1, c2 = 1 - b1**t, 1 - b2**t
        for name, update in (
            (OUTSIDE, math.sqrt(c2) / c1 * m / (np.sqrt(v) + eps)),
            (INSIDE, m / c1 / (np.sqrt(v / c2) + eps)),
            ("under the root, outside", math.sqrt(c2) / c1 * m / np.sqrt(v + eps)),
            ("under the root, inside", m / c1 / np.sqrt(v / c2 + eps)),
            ("no correction", m / (np.sqrt(v) + eps)),
        ):
            sums[name] -= rate * update
    return sums


def epsilon_form(kind: Kind) -> str:
    """Found with an epsilon as large as the gradients, where the forms are far apart."""
    g = np.array([0.01, 0.1, 1.0, -10.0], np.float32)
    settings = {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 0.125}
    opt = made(kind, [np.zeros(4, np.float32)], **settings)
    for _ in range(3):
        opt.step([g])
    (got,) = opt.values()
    for name, want in _forms(g.astype(float), 3, *settings.values()).items():
        if np.allclose(got, want, rtol=1e-4, atol=0):
            return name
    return "another"


def standard_form(kind: Kind) -> str:
    form = epsilon_form(kind)
    if form not in (OUTSIDE, INSIDE):
        raise NotOffered(f"epsilon: {form}; the oracle has no such form")
    return form


def epsilon(kind: Kind) -> Found:
    return {"epsilon": epsilon_form(kind)}


# --- How far from the oracle ---------------------------------------------------------------------


def largest_error(kind: Kind, case: Case, form: str, steps: int = STEPS) -> float:
    start = variables(shapes=SHAPES)
    reference = case.reference(start, epsilon_hat=form == OUTSIDE)
    settings = {**DEFAULTS, **case.settings}
    if case.excluded:
        settings["excluded"] = case.excluded
    opt = kind(named(start), "float32", settings)
    for i in range(steps):
        grads = gradients(i)
        reference.step(grads)
        opt.step(grads)
    errors = (error_in_ulps(got, reference, i) for i, got in enumerate(opt.values()))
    return max(float(np.max(error, initial=0.0)) for error in errors)


def one_update(kind: Kind) -> Found:
    """The error of one update, wherever it comes in 50 steps: before each, all weights are 0.

    So no rounding of a larger weight hides what the step did. In units of float32's epsilon times
    the size of the update; 0.5 is the rounding of the result itself.
    """
    start = [np.zeros(shape, np.float32) for shape in SHAPES]
    reference, opt = exact(start, standard_form(kind)), made(kind, start)
    worst = 0.0
    for i in range(STEPS):
        reference.resync(start)
        opt.zero()
        grads = gradients(i)
        reference.step(grads)
        opt.step(grads)
        for k, got in enumerate(opt.values()):
            size = reference.sizes["variable"][k] * 2.0**-23
            error = np.abs(got.astype(float) - reference.variables[k])
            ulps = np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0)
            worst = max(worst, float(np.max(ulps, initial=0.0)))
    return {"one update": finite(worst)}


def errors(kind: Kind) -> Found:
    form = standard_form(kind)
    found, refused = {}, {}
    for name in expressible(kind):
        try:
            found[name] = largest_error(kind, SETTINGS[name], form)
        except Exception as error:
            refused[f"setting {name}: failed"] = said(error)
    worst = max(found, key=lambda name: found[name])
    return {
        **refused,
        "error, defaults": finite(found["defaults"]),
        "error, worst": finite(found[worst]),
        "settings": len(found),
        "worst setting": worst,
    }


def expressible(kind: Kind) -> list[str]:
    """Of `SETTINGS`, those that the optimizer itself can express."""
    return [name for name, case in SETTINGS.items() if _can(kind, case)]


def _can(kind: Kind, case: Case) -> bool:
    wanted = set(case.settings) - DEFAULTS.keys()
    if callable(case.settings.get("learning_rate")):
        wanted.add("schedule")
    if case.excluded:
        wanted.add("excluded")
    return wanted <= kind.takes


# --- The first step, from tiny to huge gradients -------------------------------------------------

EXPONENTS = range(-37, 39)


def _right(kind: Kind, form: str, eps: float) -> Iterator[int]:
    """The k next to 0 for which the first step with the gradient 10**k is right to 0.1 %."""
    grads = [np.array([10.0**k], np.float32) for k in EXPONENTS]
    start = [np.zeros(1, np.float32) for _ in grads]
    reference, opt = exact(start, form, epsilon=eps), made(kind, start, epsilon=eps)
    reference.step(grads)
    opt.step(grads)
    pairs = zip(opt.values(), reference.variables, strict=True)
    right = [bool(abs(got[0] / want[0] - 1) < 1e-3) for got, want in pairs]
    one = EXPONENTS.index(0)
    for ks in (range(one, -1, -1), range(one, len(right))):
        for i in ks:
            if not right[i]:
                break
            yield EXPONENTS[i]


def first_step(kind: Kind) -> Found:
    form = standard_form(kind)
    found: Found = {}
    for name, eps in (("first step", 1e-7), ("first step, small epsilon", 1e-30)):
        ks = list(_right(kind, form, eps))
        found[name] = [min(ks), max(ks)] if ks else None
    return found


# --- 16-bit weights ------------------------------------------------------------------------------


def _moved(kind: Kind, dtype: str) -> float | str:
    """300 steps down from 1.0 with the same gradient, of the way that exact steps go."""
    opt = made(kind, [np.ones(8, np.float32)], dtype, epsilon=1e-8)
    g = np.full(8, 2.0**-10, np.float32)
    for _ in range(300):
        opt.step([g])
    return finite(np.mean(1 - opt.values()[0]) / (300 * DEFAULTS["learning_rate"]))


def finite(x: Any) -> float | str:
    """As JSON can say it."""
    return float(x) if np.isfinite(x) else str(float(x))


def bfloat16(kind: Kind) -> Found:
    return {"bfloat16": _moved(kind, "bfloat16")}


def float16(kind: Kind) -> Found:
    return {"float16": _moved(kind, "float16")}


def smaller_gradients(kind: Kind) -> Found:
    """Does the velocity follow gradients that become smaller? The length of late steps tells.

    Signs alternate in blocks of five, so that a weight stays near 0, where bfloat16 is fine.
    """
    rate, block = DEFAULTS["learning_rate"], 5
    opt = made(kind, [np.zeros(8, np.float32)], "bfloat16", epsilon=1e-8)
    reference = exact([np.zeros(8)], INSIDE, epsilon=1e-8)
    sizes = [1.0] * 100 + [2.0**-6] * 2000
    for i, size in enumerate(sizes):
        g = np.full(8, size * (-1) ** (i // block), np.float32)
        opt.step([g])
        reference.step([g])
    before, exactly_before = opt.values()[0], reference.variables[0].copy()
    last = np.full(8, 2.0**-6 * (-1) ** (len(sizes) // block), np.float32)
    for _ in range(2 * block):
        opt.step([last])
        reference.step([last])
    moved = np.mean(opt.values()[0] - before)
    assert abs(np.mean(reference.variables[0] - exactly_before)) > rate / 100
    return {"later": finite(moved / np.mean(reference.variables[0] - exactly_before))}


# --- Sparse gradients ----------------------------------------------------------------------------


def _one_by_one(start: Array, steps: Sequence[Sparse], form: str) -> Array:
    """Adam whose velocity gets the square of each repeated row, and not that of their sum."""
    rate, b1, b2, eps = DEFAULTS.values()
    w, m, v = start.astype(float), np.zeros(start.shape), np.zeros(start.shape)
    for t, (ids, values) in enumerate(steps, 1):
        total, squares = np.zeros_like(w), np.zeros_like(w)
        np.add.at(total, ids, values.astype(float))
        np.add.at(squares, ids, values.astype(float) ** 2)
        m, v = b1 * m + (1 - b1) * total, b2 * v + (1 - b2) * squares
        w -= rate * _forms_update(m, v, t, b1, b2, eps, form)
    return w


def _forms_update(m: Array, v: Array, t: int, b1: float, b2: float, eps: float, form: str) -> Array:
    c1, c2 = 1 - b1**t, 1 - b2**t
    if form == OUTSIDE:
        return np.asarray(math.sqrt(c2) / c1 * m / (np.sqrt(v) + eps))
    return np.asarray(m / c1 / (np.sqrt(v / c2) + eps))


def _only_sparse(kind: Kind) -> None:
    if not kind.sparse:
        raise NotOffered("no sparse gradients")


def repeated_ids(kind: Kind) -> Found:
    _only_sparse(kind)
    form = standard_form(kind)
    start = np.zeros((3, 2), np.float32)
    ids = np.array([0, 1, 1, 2])  # all rows are used, so that only the repetition matters
    steps = [Sparse(ids, np.full((4, 2), x, np.float32)) for x in (1.0, 0.5, -0.25)]
    opt = made(kind, [start])
    reference = exact([start], form)
    try:
        for each in steps:
            opt.step([each])
            reference.step([tuple(each)])
    except NotOffered:
        raise
    except Exception as error:
        return {"repeated ids": "refused", "repeated ids, why": said(error)}
    (got,) = opt.values()
    if np.allclose(got, reference.variables[0], rtol=1e-4, atol=0):
        return {"repeated ids": "summed"}
    if np.allclose(got, _one_by_one(start, steps, form), rtol=1e-4, atol=0):
        return {"repeated ids": "squared one by one"}
    return {"repeated ids": "other numbers"}


def unused_rows(kind: Kind) -> Found:
    _only_sparse(kind)
    form = standard_form(kind)
    start = np.zeros((3, 2), np.float32)
    ones = np.ones((2, 2), np.float32)
    steps = [Sparse(np.array([0, 1]), ones), Sparse(np.array([1, 2]), ones)]
    opt, reference = made(kind, [start]), exact([start], form)
    after = []
    try:
        for each in steps:
            opt.step([each])
            reference.step([tuple(each)])
            after.append(np.array(opt.values()[0]))
    except NotOffered:
        raise
    except Exception as error:
        return {"unused rows": "refused", "unused rows, why": said(error)}
    if np.array_equal(after[0][0], after[1][0]):
        return {"unused rows": "left alone"}
    moved = np.allclose(after[1][0], reference.variables[0][0], rtol=1e-4, atol=0)
    return {"unused rows": "moved" if moved else "moved, other numbers"}


# --- A NaN, and state ----------------------------------------------------------------------------


def nan_stays(kind: Kind) -> Found:
    """NaN in the gradient of one tensor at one step; the other ends on the same bits as without."""
    ends = []
    for wrong in (False, True):
        opt = made(kind, [np.zeros(4, np.float32), np.zeros(4, np.float32)])
        for i in range(4):
            grads = [np.full(4, 0.5, np.float32), np.full(4, -0.25, np.float32)]
            if wrong and i == 1:
                grads[0][2] = np.nan
            opt.step(grads)
        ends.append(np.array(opt.values()[1]))
    return {"nan": "stays" if np.array_equal(*ends) else "spreads"}


def resume(kind: Kind) -> Found:
    """Ten steps, against five, everything saved, a new optimizer that loads, and five."""
    start = variables(shapes=SHAPES[1:])

    def through(opt: Adapter, steps: range) -> Adapter:
        for i in steps:
            opt.step(gradients(i, SHAPES[1:]))
        return opt

    straight = through(made(kind, start), range(10)).values()
    first = through(made(kind, start), range(5))
    saved, values = first.save(), [np.array(v) for v in first.values()]
    second = made(kind, values)
    second.load(saved)
    ended = through(second, range(5, 10)).values()
    if all(map(np.array_equal, straight, ended)):
        return {"resume": "same bits"}
    gaps = [np.max(np.abs(a - b), initial=0) for a, b in zip(straight, ended, strict=True)]
    return {"resume": "differs", "resume, by": finite(max(gaps))}


def by_name(kind: Kind) -> Found:
    """State of a and b goes to an optimizer that was given b and a."""
    form = standard_form(kind)
    grads = {"a": np.array([1.0, 0.5], np.float32), "b": np.array([-0.25, 2.0], np.float32)}
    zeros = {name: np.zeros(2, np.float32) for name in grads}
    first = kind(zeros, "float32", dict(DEFAULTS))
    reference = exact(list(zeros.values()), form)
    for _ in range(3):
        first.step(list(grads.values()))
        reference.step(list(grads.values()))
    saved = first.save()
    values = dict(zip(grads, [np.array(v) for v in first.values()], strict=True))
    other = {name: values[name] for name in ("b", "a")}
    second = kind(other, "float32", dict(DEFAULTS))
    try:
        second.load(saved)
        second.step([grads[name] for name in other])
    except NotOffered:
        raise
    except Exception as error:
        return {"by name": "refused", "by name, why": said(error)}
    got = [second.values()[1], second.values()[0]]
    wants = {}
    for name in ("by name", "by position"):
        copy = exact(reference.variables, form)
        copy.calls = reference.calls
        for slot in ("momentum", "velocity"):
            state = reference.state[slot] if name == "by name" else reference.state[slot][::-1]
            copy.state[slot] = [s.copy() for s in state]
        copy.step(list(grads.values()))
        wants[name] = copy.variables
    for name, want in wants.items():
        if all(np.allclose(g, w, rtol=1e-4, atol=0) for g, w in zip(got, want, strict=True)):
            return {"by name": name}
    return {"by name": "neither"}


# --- A row ---------------------------------------------------------------------------------------

PROBES: dict[str, Callable[[Kind], Found]] = {
    "epsilon": epsilon,
    "one_update": one_update,
    "errors": errors,
    "first_step": first_step,
    "bfloat16": bfloat16,
    "smaller_gradients": smaller_gradients,
    "float16": float16,
    "repeated_ids": repeated_ids,
    "unused_rows": unused_rows,
    "nan_stays": nan_stays,
    "resume": resume,
    "by_name": by_name,
}


def said(error: BaseException) -> str:
    # Without what is of this machine: paths, and where in somebody's code it was.
    text = re.sub(r"(?<![\w.])/\S+", "…", " ".join(str(error).split()).split(" from user code")[0])
    return f"{type(error).__name__}: {text[:200]}"


def ask(kind: Kind, probes: Sequence[str] = tuple(PROBES)) -> Iterator[tuple[str, Found]]:
    """Each probe by itself: one that fails, or that the library has no notion of, says why."""
    for name in probes:
        try:
            yield name, PROBES[name](kind)
        except NotOffered as why:
            yield name, {f"{name}: n/a": str(why)}
        except Exception as error:
            traceback.print_exc()
            yield name, {f"{name}: failed": said(error)}


def versions(packages: Sequence[str]) -> Mapping[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    np.seterr(all="ignore")
    name, *probes = sys.argv[1:]
    row = ROWS[name]
    found: Found = {"versions": versions(row.packages)}
    for probe, result in ask(row.kind, probes or tuple(PROBES)):
        print(f"{time.process_time():7.1f} s  {probe}: {result}", file=sys.stderr, flush=True)
        found |= result
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
