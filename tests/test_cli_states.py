"""`omniadam inspect`, `diff` and `convert`: what they say of a state, and of files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import omniadam
from omniadam import Adam, AdamW, schedules
from omniadam.cli import main, measures, states
from omniadam.saving import file
from omniadam.saving.snapshot import ITERATION, KERAS, Snapshot, Tensor, Variable
from reference import Array

SOURCE = str(Path(omniadam.__file__).parents[1])


@dataclass
class Result:
    """What the command wrote, and its status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=pytest.fail)  # NaN is no JSON


def call(*arguments: object) -> Result:
    """The command in this process."""
    status: Any = 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    assert status is None or isinstance(status, int)
    return Result(status or 0, out.getvalue(), err.getvalue())


def made(values: Mapping[str, Mapping[str, Any]], **changes: Any) -> Snapshot:
    """A state with these slots, by variable and word."""
    tensors, variables = {ITERATION: np.array(7)}, []
    for name, slots in values.items():
        arrays = {f"{name}.{word}": np.asarray(value) for word, value in slots.items()}
        tensors |= arrays
        first = next(iter(arrays.values()))
        words = {word: f"{name}.{word}" for word in slots}
        variables.append(Variable(name, first.shape, first.dtype.name, words))
    found = Snapshot(
        kind="omniadam.Adam",
        generation=KERAS,
        settings={"learning_rate": 0.5},
        variables=tuple(variables),
        tensors={name: Tensor.of(value) for name, value in tensors.items()},
    )
    return replace(found, **changes)


def written(path: Path, values: Any, **changes: Any) -> Path:
    file.write(path, made(values, **changes))
    return path


def trained(steps: int, **settings: Any) -> Adam:
    w = {"dense/kernel": np.linspace(-1, 1, 6).reshape(2, 3), "dense/bias": np.ones(3, np.float32)}
    opt = Adam(**{"learning_rate": 0.1, **settings})
    opt.build(w)
    for _ in range(steps):
        opt.apply([2 * each for each in w.values()])
    return opt


# --- Numbers -------------------------------------------------------------------------------------

BIG = np.float64(3e300)
VALUES: dict[str, Any] = {
    "float64": np.random.default_rng(0).normal(size=(50, 7)),
    "no double's square": np.array([[BIG, -4 / 3 * BIG]]),
    "no square at all": np.array([3e-300, 4e-300]),
    "the smallest": np.array([3 * 5e-324, 4 * 5e-324]),
    "more than a part": np.arange(2 * measures._PART + 3, dtype=np.float32) - measures._PART,
    "float16": np.array([3.0, -4.0, 0.0, 0.0], np.float16),
    "integers": np.array([3, -4, 0], np.int64),
    "complex": np.array([3 + 4j, 0], np.complex64),
    "booleans": np.array([True, False]),
    "one": np.array(-2.5, np.float32),
    "zeros": np.zeros((4, 5), np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("name", VALUES)
def test_measures(name: str) -> None:
    value = VALUES[name]
    found = measures.measured(value)
    # math.hypot neither overflows nor underflows, and is right to an ulp.
    norm = math.hypot(*(abs(x) for x in value.reshape(-1).tolist()))
    assert found.norm == pytest.approx(norm, rel=1e-12, abs=0)
    assert found.largest == max((abs(x) for x in value.reshape(-1).tolist()), default=0.0)
    assert found.non_finite == 0
    if value.size:
        assert found.zeros == (value == 0).sum() / value.size
    else:
        assert math.isnan(found.zeros)
    same = measures.compared(pair_of(value, value.copy()))
    assert not same and (same.relative, same.largest, same.elements) == (0.0, 0.0, 0)


def pair_of(one: Any, other: Any) -> measures.Pair:
    return measures.Pair(measures.Place("x"), Tensor.of(one), Tensor.of(other))


def test_measures_of_what_is_not_finite() -> None:
    nan, inf = math.nan, math.inf
    found = measures.measured(np.array([1.0, nan, inf, 0.0], np.float32))
    assert math.isnan(found.norm) and math.isnan(found.largest)
    assert (found.non_finite, found.zeros) == (2, 0.25)
    found = measures.measured(np.array([-inf, 1.0]))
    assert (found.norm, found.largest, found.non_finite) == (inf, inf, 1)
    assert measures.measured(np.full(4, 1.5e308)).norm == inf  # which is what it is
    ml_dtypes = pytest.importorskip("ml_dtypes")
    found = measures.measured(np.array([3, 4, nan], ml_dtypes.bfloat16))
    assert math.isnan(found.norm) and found.non_finite == 1
    assert measures.measured(np.array([3, 4], ml_dtypes.bfloat16)).norm == 5.0


def test_differences() -> None:
    nan, inf = math.nan, math.inf

    def found(one: Any, other: Any) -> tuple[float, float, int]:
        one, other = np.asarray(one), np.asarray(other)
        there = measures.compared(pair_of(one, other))
        back = measures.compared(pair_of(other, one))
        assert there[1:] == back[1:]
        return there.relative, there.largest, there.elements

    assert found([3.0, 4.0], [3.0, 4.5]) == (
        pytest.approx(0.5 / math.hypot(3, 4.5), rel=1e-15),
        0.5,
        1,
    )
    assert found([nan, inf, -inf, 1.0], [nan, inf, -inf, 1.0]) == (0, 0, 0)
    assert found([nan, 1.0], [nan, 3.0]) == (pytest.approx(2 / 3), 2.0, 1)
    assert found([nan, 1.0], [1.0, 1.0]) == (inf, inf, 1)
    assert found([inf, 1.0], [-inf, 1.0]) == (inf, inf, 1)
    assert found([0.0], [-0.0]) == (0, 0, 0)
    assert found([0.0], [5e-324]) == (1.0, 5e-324, 1)
    assert found([BIG], [-BIG]) == (2.0, 2 * BIG, 1)
    assert found([1.7e308], [-1.7e308]) == (pytest.approx(2.0), inf, 1)
    # The last bit of one among many.
    one = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    other = one.copy()
    other[7] = np.nextafter(other[7], np.float32(9))
    relative, largest, count = found(one, other)
    assert count == 1 and largest == abs(float(one[7]) - float(other[7]))
    assert relative == pytest.approx(largest / max(map(np.linalg.norm, (one, other))), rel=1e-6)
    # In types that differ, the values are compared all the same.
    by_type = measures.compared(pair_of(np.ones(2, np.float32), np.ones(2)))
    assert by_type.problem == "dtype" and by_type and by_type.elements == 0
    assert measures.compared(pair_of(np.ones(2), np.ones((2, 1)))).problem == "shape"


# --- inspect -------------------------------------------------------------------------------------


def test_inspect(tmp_path: Path) -> None:
    opt = trained(5, weight_decay=0.01, gradient_accumulation_steps=2)
    omniadam.save(opt, path := tmp_path / "adam.safetensors")
    result = call("inspect", path, "--json")
    assert (result.status, result.err) == (0, "")
    found = result.json
    tensors = found.pop("tensors")
    assert found == {
        "file": str(path),
        "class": "omniadam.Adam",
        "generation": "keras 3",
        "written_by": {"omniadam": omniadam.__version__},
        "iterations": 2,
        "calls": 5,
        "learning_rate": 0.1,
        "state_hash": omniadam.state_hash(opt),
        "settings": opt.get_config(),
        "all_settings": True,
    }
    held = {f"{v.replace('/', '_')}_{s}": (v, s) for v in KNOWN for s in SLOTS}
    assert [(row["variable"], row["slot"]) for row in tensors] == [
        *((variable, slot) for variable in KNOWN for slot in SLOTS),
        (None, None),
    ]
    rows = {(row["variable"], row["slot"]): row for row in tensors}
    for name, value in opt.named_variables().items():
        if name in held:
            row = rows[held[name]]
            assert (row["shape"], row["dtype"]) == (list(value.shape), value.dtype.name)
            assert row["norm"] == pytest.approx(np.linalg.norm(value.astype(float)), rel=1e-12)
            assert row["zeros"] == np.mean(value == 0) and row["non_finite"] == 0
            assert row["largest"] == np.abs(value).max() and row["named"]
            assert (row["tensor"], row["extension"]) == (".".join(held[name]), 0)
    text = call("inspect", path)
    assert (text.status, text.err) == (0, "")
    lines = [line.split() for line in text.out.splitlines()]
    for words in (
        [str(path)],
        ["class", "omniadam.Adam", "(keras", "3)"],
        ["written", "by", "omniadam", omniadam.__version__],
        ["iterations", "2"],
        ["calls", "5"],
        ["state", "hash", omniadam.state_hash(opt)],
        ["weight_decay", "0.01"],
        ["amsgrad", "false"],
    ):
        assert words in lines
    for row in tensors:
        name, slot = row["variable"] or row["tensor"], row["slot"] or "-"
        (line,) = [words for words in lines if words[:2] == [name, slot]]
        shape = str(tuple(row["shape"])).replace(" ", "")
        assert line[2:4] == [shape, row["dtype"]] and float(line[4]) == float(f"{row['norm']:.6g}")
        assert line[6:] == [str(row["non_finite"]), f"{row['zeros']:.1%}"]


KNOWN = ("dense/kernel", "dense/bias")
SLOTS = ("momentum", "velocity", "gradient_accumulator")


def test_inspect_shows_what_is_wrong(tmp_path: Path) -> None:
    long = "block/" * 40 + "kernel"
    values = {
        long: {"momentum": np.array([1.0, math.nan, math.inf, 0.0], np.float32)},
        "evil\x1b[2J\nname": {"momentum": np.zeros((0, 2), np.float32)},
    }
    path = written(tmp_path / "a.safetensors", values)
    found = call("inspect", path, "--json")
    row, empty, _ = found.json["tensors"]
    assert (row["norm"], row["largest"], row["non_finite"], row["zeros"]) == (None, None, 2, 0.25)
    assert (empty["norm"], empty["zeros"]) == (0.0, None)
    text = call("inspect", path).out
    assert long in text and "\x1b" not in text and "evil\\x1b[2J\\nname" in text
    line = next(line for line in text.splitlines() if line.startswith(long))
    assert line.split()[1:] == ["momentum", "(4,)", "float32", "nan", "nan", "2", "25.0%"]


def test_inspect_says_what_a_file_does_not_tell(tmp_path: Path) -> None:
    values = {"w": {"momentum": np.ones(2)}, "head": {"momentum": np.ones(2)}}
    bare = made(values, settings={}, origin={})
    first, second = bare.variables
    extended = (first._replace(is_named=False), second._replace(extension=1))
    tensors = {**bare.tensors, "extension.1": Tensor.of(np.array(3))}
    path = tmp_path / "a.safetensors"
    file.write(path, replace(bare, variables=extended, tensors=tensors))
    found = call("inspect", path, "--json").json
    assert found["learning_rate"] is None and found["settings"] == {}
    assert not found["all_settings"]
    assert [row["named"] for row in found["tensors"]] == [False, True, True, True]
    assert [row["extension"] for row in found["tensors"]] == [0, 1, 0, 0]
    text = call("inspect", path).out
    assert "(the file does not tell others)" in text and "Extension 1 at iteration 3: head" in text
    assert "load(..., by='position')" in text and "learning rate" not in text
    # A schedule is asked for the rate that is next; one of the user's cannot be.
    rate = schedules.ExponentialDecay(0.5, 7, 0.5)
    for config, want in ((schedules.serialize(rate), 0.25), ({"class_name": "Own"}, None)):
        written(path, values, settings={"learning_rate": config})
        assert call("inspect", path, "--json").json["learning_rate"] == want
    # Of PyTorch each parameter has a count, and each group a rate.
    steps = {n: {"momentum": np.ones(2), "step": np.array(i)} for i, n in enumerate("ab", 4)}
    groups = {"groups": [{"lr": 0.5, "params": ["a"]}, {"lr": 0.5, "params": list("b" * 20)}]}
    of_torch = made(steps, settings=groups, generation="torch", kind="omniadam.torch.Adam")
    counted = {name: t for name, t in of_torch.tensors.items() if name != ITERATION}
    file.write(path, replace(of_torch, tensors=counted))
    found = call("inspect", path, "--json").json
    assert (found["iterations"], found["calls"], found["learning_rate"]) == (5, None, 0.5)
    assert found["settings"] == groups
    assert '"b"] and 12 more' in call("inspect", path).out


def test_one_tensor_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `inspect` and `convert`; `diff` has two."""
    alive: list[weakref.ref[Array]] = []

    def tensor(most: int) -> Tensor:
        def read() -> Array:
            assert sum(each() is not None for each in alive) < most
            value = np.ones(1000)
            alive.append(weakref.ref(value))
            return value

        return Tensor((1000,), "float64", read)

    def state(most: int) -> Snapshot:
        names = [f"v{i}.momentum" for i in range(5)]
        variables = [Variable(n[:2], (1000,), "float64", {"momentum": n}) for n in names]
        tensors = {name: tensor(most) for name in names}
        return Snapshot("omniadam.Adam", KERAS, {}, tuple(variables), tensors)

    for arguments, most in (("inspect", "a"), 1), (("diff", "a", "b"), 2):
        monkeypatch.setattr(states, "read", lambda *_, most=most, **kind: state(most))
        assert call(*arguments).status == 0
    assert len(alive) == 5 + 10


# --- diff ----------------------------------------------------------------------------------------


def test_diff_of_the_same(tmp_path: Path) -> None:
    opt = trained(3)
    omniadam.save(opt, one := tmp_path / "a.safetensors")
    again = omniadam.from_file(one)
    again.build({name: np.ones(s, d) for name, s, d in FORMS[::-1]})  # in another order
    omniadam.save(again, other := tmp_path / "b.safetensors")
    result = call("diff", one, other)
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{one} and {other} do not differ: 4 tensors compared.\n"
    found = call("diff", one, other, "--json").json
    assert found == {
        "files": [str(one), str(other)],
        "differs": False,
        "compared": 4,
        "about": [],
        "tensors": [],
    }


FORMS: list[tuple[str, tuple[int, ...], str]] = [
    ("dense/kernel", (2, 3), "float64"),
    ("dense/bias", (3,), "float32"),
]


def test_diff_has_the_largest_first(tmp_path: Path) -> None:
    base = {name: {"momentum": np.ones(4), "velocity": np.ones(4)} for name in "abcde"}
    other = {name: dict(slots) for name, slots in base.items()}
    other["a"]["momentum"] = np.array([1, 1, 1, 1.5])
    other["b"]["velocity"] = np.full(4, 3.0)
    other["c"]["momentum"] = np.array([1, 1, math.nan, 1])
    other["d"]["momentum"] = np.ones((4, 1))
    other["d"]["velocity"] = np.ones(4, np.float32)
    del other["e"]["velocity"]
    other["f"] = {"momentum": np.ones(2)}
    one = written(tmp_path / "one.safetensors", base)
    two = written(tmp_path / "two.safetensors", other)
    result = call("diff", one, two)
    assert (result.status, result.err) == (1, "")
    found = call("diff", one, two, "--json")
    assert found.status == 1 and found.json["differs"] and found.json["compared"] == 11
    assert found.json["about"] == [{"what": "variable f", "values": [False, True]}]
    rows = found.json["tensors"]
    assert [(row["tensor"], row["problem"]) for row in rows] == [
        ("c.momentum", None),
        ("d.momentum", "shape"),
        ("e.velocity", "missing"),
        ("f.momentum", "missing"),
        ("b.velocity", None),
        ("a.momentum", None),
        ("d.velocity", "dtype"),
    ]
    by_name = {row["tensor"]: row for row in rows}
    assert by_name["b.velocity"] == {
        "tensor": "b.velocity",
        "variable": "b",
        "slot": "velocity",
        "problem": None,
        "relative": pytest.approx(2 / 3),
        "largest": 2.0,
        "elements": 4,
        "forms": [{"shape": [4], "dtype": "float64"}] * 2,
    }
    assert by_name["c.momentum"]["relative"] is None and by_name["c.momentum"]["elements"] == 1
    assert by_name["f.momentum"]["forms"] == [None, {"shape": [2], "dtype": "float64"}]
    lines = [line.split() for line in result.out.splitlines()]
    for words in (
        ["c.momentum", "inf", "inf", "1", "of", "4"],
        ["d.momentum", "-", "-", "-", "(4,)", "in", "A,", "(4,1)", "in", "B"],
        ["e.velocity", "-", "-", "-", "only", "in", "A"],
        ["f.momentum", "-", "-", "-", "only", "in", "B"],
        ["b.velocity", "0.667", "2", "4", "of", "4"],
        ["d.velocity", "0", "0", "0", "of", "4", "float64", "in", "A,", "float32", "in", "B"],
    ):
        assert words in lines
    assert lines[-1] == ["7", "of", "11", "tensors", "differ."]


def test_diff_of_what_states_say(tmp_path: Path) -> None:
    """Class, count, settings: each is a difference."""
    values = {"w": {"momentum": np.ones(2)}}
    same = written(tmp_path / "same.safetensors", values)
    other = tmp_path / "other.safetensors"
    bare = made(values)
    extended = [v._replace(extension=1, dtype="float16") for v in bare.variables]
    later = {**bare.tensors, ITERATION: Tensor.of(np.array(8))}
    for changes, want in (
        ({"kind": "omniadam.AdamW"}, {"class": ["omniadam.Adam", "omniadam.AdamW"]}),
        ({"tensors": later}, {"iterations": [7, 8]}),
        (
            {"settings": {"learning_rate": 0.5, "gradient_accumulation_steps": 2}},
            {
                "iterations": [7, 3],
                "gradient_accumulation_steps": [None, 2],
            },
        ),
        ({"settings": {"learning_rate": 0.25}}, {"learning_rate": [0.5, 0.25]}),
        (
            {"settings": {"learning_rate": 0.5, "epsilon_hat": False}},
            {"epsilon_hat": [True, False]},
        ),
        (
            {"variables": tuple(extended)},
            {"dtype of w": ["float64", "float16"], "extension of w": [0, 1]},
        ),
        (
            {"settings": {"learning_rate": {"class_name": "Decay", "config": {"rate": 1}}}},
            {
                "learning_rate": [0.5, None],
                "learning_rate.class_name": [None, "Decay"],
                "learning_rate.config.rate": [None, 1],
            },
        ),
    ):
        file.write(other, replace(bare, **changes))
        found = call("diff", same, other, "--json")
        assert {row["what"]: row["values"] for row in found.json["about"]} == want
        assert found.status == 1 and found.json["tensors"] == []
        result = call("diff", same, other)
        assert result.status == 1 and all(name in result.out for name in want)
    # What is not told, or is of another generation, is no difference.
    for changes in {"settings": {}}, {"generation": "torch", "settings": {"groups": []}}:
        file.write(other, replace(bare, **changes))
        found = call("diff", same, other, "--json").json["about"]
        assert {row["what"] for row in found} <= {"generation"}
    # What is the default need not be said.
    file.write(other, replace(bare, settings={"learning_rate": 0.5, "epsilon_hat": True}))
    assert call("diff", same, other).status == 0


def test_diff_of_calls_that_make_no_step(tmp_path: Path) -> None:
    for name, count in ("one", 4), ("two", 5):
        omniadam.save(trained(count, gradient_accumulation_steps=2), tmp_path / name)
    found = call("diff", tmp_path / "one", tmp_path / "two", "--json").json["about"]
    assert found == [{"what": "calls", "values": [4, 5]}]


def test_diff_by_position(tmp_path: Path) -> None:
    one = written(tmp_path / "one.safetensors", {"x": {"momentum": np.ones(2)}})
    two = written(tmp_path / "two.safetensors", {"y": {"momentum": np.ones(2)}})
    assert call("diff", one, two).status == 1
    assert call("diff", one, two, "--by", "position").status == 0
    two = written(tmp_path / "two.safetensors", {"y": {"momentum": np.array([1.0, 1.5])}})
    (row,) = call("diff", one, two, "--by", "position", "--json").json["tensors"]
    assert (row["tensor"], row["elements"]) == ("x.momentum", 1)


# --- convert -------------------------------------------------------------------------------------


def test_convert(tmp_path: Path) -> None:
    opt = trained(3)
    omniadam.save(opt, source := tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    result = call("convert", source, target)
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{target}: 2 variables after 3 iterations\n"
    assert omniadam.state_hash(omniadam.from_file(target)) == omniadam.state_hash(opt)
    omniadam.save(trained(4), source)
    before = target.read_bytes()
    refused = call("convert", source, target)
    assert (refused.status, refused.out) == (2, "") and target.read_bytes() == before
    assert refused.err == f"Error: {target} is there already: --overwrite replaces it\n"
    assert call("convert", source, target, "--overwrite").status == 0
    assert call("diff", source, target).status == 0
    assert call("convert", target, target, "--overwrite").status == 0  # onto itself
    assert call("diff", source, target).status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_files_of_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of `omniadam.formats`, which has tests of its own."""
    asked: list[Any] = []

    def given(snapshot: Snapshot) -> str:
        return "".join(str(tensor.read().size) for tensor in snapshot.tensors.values())

    formats: Any = ModuleType("omniadam.formats")
    held = made({"w": {"momentum": np.ones(2)}}, settings={"weight_decay": 0.5})
    formats.read = lambda *a: asked.append(("read", *a)) or held
    formats.write = lambda state, *a: asked.append(("write", given(state), *a))
    formats.write_into = lambda state, *a: asked.append(("into", given(state), *a))
    monkeypatch.setitem(sys.modules, "omniadam.formats", formats)
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    source.write_bytes(b"some archive")
    said = ["--key", "model.optimizer", "--setting", "use_ema=true"]
    assert call("convert", source, target, *said).status == 0
    read = ("read", source, "model.optimizer", {"use_ema": True})
    assert asked == [read, ("write", "12", target)]
    asked.clear()
    assert call("convert", source, "--into", target).status == 0
    assert call("convert", source, "--into", target, "--into-key", "a.b", "--by", "position")
    plain = ("read", source, None, {})
    assert asked == [
        *(plain, ("into", "12", target, None, "name")),
        *(plain, ("into", "12", target, "a.b", "position")),
    ]
    asked.clear()
    ours = tmp_path / "b.safetensors"
    assert call("convert", source, ours, "--as", "omniadam.AdamW").status == 0
    assert call("inspect", ours, "--json").json["class"] == "omniadam.AdamW"
    kind = ["--as", "omniadam.Adam"]
    assert call("diff", source, ours, "--key-a", "x").status == 1
    assert call("diff", source, ours, "--key-a", "x", *kind).status == 0
    assert asked == [plain, *[("read", source, "x", {})] * 2]

    # Whatever a library says of a file is a line.
    def fail(*_: Any) -> Any:
        raise ModuleNotFoundError("torch is not installed:\n pip install 'omniadam[torch]'")

    formats.read = fail
    result = call("inspect", source)
    assert (result.status, result.out) == (2, "")
    assert result.err == (
        f"Error: {source}: torch is not installed: pip install 'omniadam[torch]'\n"
    )


@pytest.mark.needs("torch")
def test_pytorch_and_back(tmp_path: Path) -> None:
    """A run of torch.optim goes on in NumPy, and then in PyTorch, with PyTorch's numbers."""
    import torch

    def gradient(step: int) -> Array:
        return np.asarray(np.random.default_rng(step).normal(size=3) * 1e-8, np.float32)

    parameter = torch.zeros(3)
    theirs = torch.optim.Adam([("w", parameter)], lr=0.1)
    for step in range(2):
        parameter.grad = torch.from_numpy(gradient(step))
        theirs.step()
    source, ours, back = (tmp_path / name for name in ("a.pt", "b.safetensors", "c.pt"))
    torch.save({"model": {}, "optimizer": theirs.state_dict()}, source)
    assert call("inspect", source, "--json").json["iterations"] == 2
    to_ours = call("convert", source, ours, "--key", "optimizer", "--as", "omniadam.Adam")
    assert (to_ours.status, to_ours.err) == (0, "")
    w, opt = parameter.numpy().copy(), omniadam.from_file(ours)
    opt.apply([gradient(2)], {"w": w})
    parameter.grad = torch.from_numpy(gradient(2))
    theirs.step()
    np.testing.assert_allclose(w, parameter.numpy(), rtol=1e-6)
    omniadam.save(opt, ours)
    assert call("convert", ours, back, "--as", "omniadam.torch.Adam").status == 0
    again = torch.optim.Adam([("w", p := torch.from_numpy(w))], lr=0.1)
    again.load_state_dict(torch.load(back, weights_only=True))
    for each, of in (parameter, theirs), (p, again):
        each.grad = torch.from_numpy(gradient(3))
        of.step()
    np.testing.assert_allclose(p.numpy(), parameter.numpy(), rtol=1e-6)
    assert call("diff", ours, back, "--as", "omniadam.Adam").status == 0
    assert call("diff", ours, back).status == 1


def test_settings_that_a_file_does_not_tell(tmp_path: Path) -> None:
    values = {"w": {"momentum": np.ones(2)}}
    source = written(tmp_path / "a.safetensors", values, settings={})
    target = tmp_path / "b.safetensors"
    result = call("convert", source, target)
    assert result.status == 0
    assert result.err.startswith(f"Note: {source} does not tell") and str(target) in result.err
    said = ["--setting", "beta_1=0.5", "--setting", "use_ema=true", "--setting", "name=mine"]
    assert call("convert", source, target, "--overwrite", *said).err == ""
    want = {"beta_1": 0.5, "use_ema": True, "name": "mine"}
    for each in [target], [source, *said]:
        assert call("inspect", *each, "--json").json["settings"] == want
    result = call("inspect", target, "--setting", "beta_1=0.9")
    assert result.status == 2 and f"{target}: it has another value of beta_1" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "a.safetensors"], "Give OUT, or --into FILE"),
        (["convert", "a.safetensors", "b.safetensors", "--into", "c.keras"], "one of them"),
        (["convert", "a.safetensors", "--into", "c.keras", "--overwrite"], "--overwrite is for"),
        (["diff", "a.safetensors"], "required: B"),
        (["diff", "a.safetensors", "b.safetensors", "--by", "hand"], "invalid choice"),
        (["inspect"], "required: FILE"),
        (["inspect", "a.safetensors", "--setting", "use_ema"], "must be NAME=VALUE: 'use_ema'"),
    ],
)
def test_wrong_use(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert (result.status, result.out) == (2, "") and words in result.err
    assert len(result.err.splitlines()) == 2


def test_errors_are_a_line_that_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"w": {"momentum": np.ones(2)}})
    damaged = bytearray(path.read_bytes())
    damaged[-70] ^= 1
    for name, content in {
        "damaged": damaged,
        "short": damaged[:100],
        "empty": b"",
        "text": b"w = 1\n",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    missing = tmp_path / "missing.safetensors"
    wrong = [missing, tmp_path, *sorted(tmp_path.glob("[dest]*.safetensors"))]
    assert len(wrong) == 6
    for each in wrong:
        out = tmp_path / "out.safetensors"
        for arguments in (["inspect", each], ["diff", path, each], ["convert", each, out]):
            result = call(*arguments)
            assert (result.status, result.out) == (2, ""), arguments
            assert result.err.startswith("Error: ") and str(each) in result.err
            assert len(result.err.splitlines()) == 1 and "Traceback" not in result.err
        assert not out.exists()
    result = call("convert", path, tmp_path / "no folder" / "b.safetensors")
    assert result.status == 2 and "no folder" in result.err
    result = call("inspect", path, "--key", "optimizer")
    assert result.status == 2 and str(path) in result.err and "optimizer" in result.err


# --- progress ------------------------------------------------------------------------------------


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, of all bytes, and only if they take more than a second."""
    bars: list[Any] = []

    class Bar(contextlib.AbstractContextManager["Bar"]):
        def __init__(self, **settings: Any) -> None:
            self.settings, self.count = settings, 0
            bars.append(self)

        def update(self, count: int) -> None:
            self.count += count

        def __exit__(self, *error: object) -> None: ...

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    values = {"w": {"momentum": np.ones(2000), "velocity": np.ones(2000)}}
    path = written(tmp_path / "a.safetensors", values)
    commands: list[Sequence[object]] = [
        ["inspect", path],
        ["diff", path, path],
        ["convert", path, path, "--overwrite"],
    ]
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    for arguments in commands:
        assert call(*arguments).status == 0
    assert not bars  # where there is no terminal
    monkeypatch.setattr(io, "StringIO", Terminal)
    for arguments in commands:
        bars.clear()
        assert call(*arguments).err == ""
        assert len(bars) >= 2 and all(bar.settings["delay"] == 1 for bar in bars)
        for bar in bars:  # the header is verified, too, and not counted
            assert 0.9 * bar.settings["total"] < bar.count <= bar.settings["total"]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for arguments in commands:
        result = call(*arguments)
        assert (result.status, result.err) == (0, "")


def test_another_class_is_a_difference(tmp_path: Path) -> None:
    for kind, path in ((Adam, tmp_path / "a"), (AdamW, tmp_path / "b")):
        opt = kind(0.1)
        opt.build({"w": np.ones(2)})
        omniadam.save(opt, path)
    found = call("diff", tmp_path / "a", tmp_path / "b", "--json").json["about"]
    assert {row["what"] for row in found} == {"class", "name", "weight_decay"}


# --- a process of its own ------------------------------------------------------------------------

# What extras bring, and the libraries of other files.
EXTRAS = [
    *("autograd", "matplotlib", "sklearn", "threadpoolctl", "tqdm"),
    *("torch", "jax", "tensorflow", "keras", "tf_keras", "optax", "orbax", "h5py", "ml_dtypes"),
]


def test_no_extra_is_needed_for_files_of_ours(tmp_path: Path) -> None:
    omniadam.save(trained(2), tmp_path / "a.safetensors")
    script = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None
from omniadam.cli import main
main(["inspect", "a.safetensors"])
main(["convert", "a.safetensors", "b.safetensors"])
main(["diff", "a.safetensors", "b.safetensors"])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.endswith("do not differ: 4 tensors compared.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such pipes")
def test_who_reads_no_further_sees_no_traceback(tmp_path: Path) -> None:
    """As in `omniadam inspect FILE | head`."""
    values = {f"variable {i}": {"momentum": np.ones(2)} for i in range(2000)}
    path = written(tmp_path / "a.safetensors", values)
    with subprocess.Popen(
        [sys.executable, "-m", "omniadam", "inspect", str(path)],
        env=os.environ | {"PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
