"""The probes of benchmarks/conformance: what they say of ours and of torch's, and that each finds
the adapter that is wrong in just what it asks about.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from reference import Reference

FOLDER = Path(__file__).parents[1] / "benchmarks" / "conformance"


@pytest.fixture(scope="module")
def probes() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setattr(sys, "path", [*sys.path])
        yield importlib.import_module("probes")


def ask(probes: ModuleType, kind: Any, *names: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _, result in probes.ask(kind, names or tuple(probes.PROBES)):
        found |= result
    return found


class Plain:
    """Adam in float32 NumPy by the oracle's own lines, right in everything; then one fault each."""

    takes: frozenset[str] = frozenset({"amsgrad"})
    sparse, saves = True, "pickle"
    form = True

    def __init__(self, values: Any, dtype: str, settings: dict[str, Any]) -> None:
        self.names, self.dtype = list(values), dtype
        self.opt = Reference(list(values.values()), epsilon_hat=self.form, **settings)

    def gradients(self, gradients: Sequence[Any]) -> list[Any]:
        return [tuple(g) if isinstance(g, tuple) else g for g in gradients]

    def step(self, gradients: Sequence[Any]) -> None:
        self.opt.step(self.gradients(gradients))
        for w in self.opt.variables if self.dtype == "float32" else ():
            w[...] = w.astype(np.float32)

    def values(self) -> list[Any]:
        return [w.astype(np.float32) for w in self.opt.variables]

    def zero(self) -> None:
        for w in self.opt.variables:
            w[...] = 0

    def save(self) -> bytes:
        slots = {
            name: {slot: self.opt.state[slot][i] for slot in ("momentum", "velocity")}
            for i, name in enumerate(self.names)
        }
        return pickle.dumps((self.opt.calls, slots))

    def load(self, saved: bytes) -> None:
        self.opt.calls, slots = pickle.loads(saved)
        for i, name in enumerate(self.names):
            for slot, value in slots[name].items():
                self.opt.state[slot][i][...] = value


class Inside(Plain):
    form = False


class Inexact(Plain):
    """A coefficient that is wrong by 1e-5, as 1 - beta_2 is in single precision."""

    def __init__(self, values: Any, dtype: str, settings: dict[str, Any]) -> None:
        rate = settings["learning_rate"] * (1 + 1e-5)
        super().__init__(values, dtype, settings | {"learning_rate": rate})


class SpreadsNaN(Plain):
    def gradients(self, gradients: Sequence[Any]) -> list[Any]:
        broken = any(np.isnan(g).any() for g in gradients)
        return [g * np.nan if broken else g for g in gradients]


class ByPosition(Plain):
    def load(self, saved: bytes) -> None:
        calls, slots = pickle.loads(saved)
        renamed = dict(zip(self.names, slots.values(), strict=True))
        super().load(pickle.dumps((calls, renamed)))


class LosesCount(Plain):
    def load(self, saved: bytes) -> None:
        super().load(saved)
        self.opt.calls = 0


class OneByOne(Plain):
    """The square of the sum is replaced by the sum of squares, in the velocity alone."""

    def step(self, gradients: Sequence[Any]) -> None:
        if not isinstance(gradients[0], tuple):
            return super().step(gradients)
        velocity = [v.copy() for v in self.opt.state["velocity"]]
        variables = [w.copy() for w in self.opt.variables]
        super().step(gradients)
        t, b2, eps = self.opt.calls, 0.999, self.opt.epsilon
        alpha = 0.001 * np.sqrt(1 - b2**t) / (1 - 0.9**t)
        for i, (ids, values) in enumerate(gradients):
            squares = np.zeros_like(velocity[i])
            np.add.at(squares, ids, values.astype(float) ** 2)
            v = b2 * velocity[i] + (1 - b2) * squares
            self.opt.state["velocity"][i][...] = v
            update = alpha * self.opt.state["momentum"][i] / (np.sqrt(v) + eps)
            self.opt.variables[i][...] = variables[i] - update


class Lazy(Plain):
    def step(self, gradients: Sequence[Any]) -> None:
        if not isinstance(gradients[0], tuple):
            return super().step(gradients)
        before = [w.copy() for w in self.opt.variables]
        super().step(gradients)
        for w, old, (ids, _) in zip(self.opt.variables, before, gradients, strict=True):
            unused = np.setdiff1d(np.arange(len(w)), ids)
            w[unused] = old[unused]


class Rounds(Plain):
    """Weights rounded to the nearest of their type at each step."""

    def step(self, gradients: Sequence[Any]) -> None:
        super().step(gradients)
        for w in self.opt.variables:
            w[...] = self.rounded(w)

    def rounded(self, w: Any) -> Any:
        if self.dtype != "bfloat16":
            return w.astype(self.dtype)
        bits = w.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


class NarrowVelocity(Rounds):
    def step(self, gradients: Sequence[Any]) -> None:
        super().step(gradients)
        for v in self.opt.state["velocity"]:
            v[...] = self.rounded(v)


class Overflows(Plain):
    """Squares are float32's."""

    def gradients(self, gradients: Sequence[Any]) -> list[Any]:
        with np.errstate(over="ignore"):
            return [np.where(np.isinf(np.square(g)), np.nan, g) for g in gradients]


def test_what_is_right_is_said_to_be(probes: ModuleType) -> None:
    found = ask(probes, Plain)
    assert found.pop("one update") <= 0.51
    assert 0.99 < found.pop("later") < 1.01 and 0.99 < found.pop("bfloat16") < 1.01
    assert 0.99 < found.pop("float16") < 1.01
    assert found == {
        "epsilon": "outside",
        "error, defaults": 0.0,
        "error, worst": 0.0,
        "settings": 6,
        "worst setting": "defaults",
        "first step": [-37, 38],
        "first step, small epsilon": [-37, 38],
        "repeated ids": "summed",
        "unused rows": "moved",
        "nan": "stays",
        "resume": "same bits",
        "by name": "by name",
    }


@pytest.mark.parametrize(
    ("kind", "probe", "key", "value"),
    [
        (Inside, "epsilon", "epsilon", "inside"),
        (SpreadsNaN, "nan_stays", "nan", "spreads"),
        (ByPosition, "by_name", "by name", "by position"),
        (LosesCount, "by_name", "by name", "neither"),
        (LosesCount, "resume", "resume", "differs"),
        (OneByOne, "repeated_ids", "repeated ids", "squared one by one"),
        (Lazy, "unused_rows", "unused rows", "left alone"),
        (Rounds, "bfloat16", "bfloat16", 0.0),
        (Overflows, "first_step", "first step", [-37, 19]),
    ],
)
def test_a_fault_is_found(kind: Any, probe: str, key: str, value: Any, probes: ModuleType) -> None:
    assert ask(probes, kind, probe)[key] == value


def test_inexact_numbers_are_found(probes: ModuleType) -> None:
    assert ask(probes, Inexact, "one_update")["one update"] > 20
    assert ask(probes, NarrowVelocity, "smaller_gradients")["later"] < 0.5
    assert 0.9 < ask(probes, Rounds, "smaller_gradients")["later"] < 0.91


def test_what_fails_says_why(probes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Plain):
        def step(self, gradients: Sequence[Any]) -> None:
            raise ValueError("as it is")

    found = ask(probes, Broken, "epsilon", "repeated_ids", "nan_stays")
    assert found["epsilon: failed"] == "ValueError: as it is"
    assert found["nan_stays: failed"] == "ValueError: as it is"
    capsys.readouterr()  # what the traceback is printed to


@pytest.mark.needs("torch")
def test_rows_of_ours_and_of_torch(probes: ModuleType) -> None:
    ours, theirs = (
        ask(
            probes,
            probes.ROWS[name].kind,
            *("epsilon", "one_update", "first_step", "repeated_ids", "nan_stays", "by_name"),
        )
        for name in ("omniadam on NumPy", "torch, for-loop")
    )
    assert ours["epsilon"] == "outside" and theirs["epsilon"] == "inside"
    assert ours["one update"] < 4 and theirs["one update"] < 4
    assert ours["repeated ids"] == "summed" and theirs["repeated ids"] == "refused"
    assert ours["nan"] == theirs["nan"] == "stays"
    assert ours["by name"] == "refused" and theirs["by name"] == "by position"
    assert min(ours["first step"]) == min(theirs["first step"]) == -37


def test_the_page_says_where_ours_is_not_the_best(probes: ModuleType, tmp_path: Path) -> None:
    page = importlib.import_module("page")
    theirs = {**ask(probes, Plain), "on": "2000-01-01", "versions": {"torch": "1.0"}}
    del theirs["nan"]
    theirs["nan_stays: failed"] = "ValueError: with a `mark`"
    ours = {**theirs, "one update": 7.5, "bfloat16": "inf", "by name": "refused"}
    rows = {
        "omniadam on NumPy": ours,
        "torch, fused": theirs,
        "MLX": {"not run": "does not install", "on": "2000-01-01"},
    }
    page.write({"machine": "a machine", "rows": rows}, tmp_path)
    text = (tmp_path / "conformance.md").read_text(encoding="utf-8")
    best = f"{theirs['one update']:.2f}"
    assert f"- one update: {best} (torch, fused). omniadam on NumPy 7.50." in text
    assert "moved: 100 % (torch, fused). omniadam on NumPy ∞." in text
    assert "found by name (torch, fused). omniadam on NumPy refused." in text
    assert "- MLX: does not install" in text and "| MLX | not run |" in text
    assert "- torch, fused, nan stays refused: `ValueError: with a 'mark'`" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| torch, fused")}
    assert widths == {10, 5, 7, 4}
    assert (tmp_path / "conformance.png").stat().st_size > 10_000
