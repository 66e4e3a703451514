"""Files of torch.optim, torch.distributed.checkpoint and orbax: runs go on in ours, and back."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
orbax = pytest.importorskip("orbax.checkpoint")

import jax.numpy as jnp  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import omniadam  # noqa: E402
import omniadam.optax  # noqa: E402
from cases import assert_close, gradients, variables  # noqa: E402
from omniadam import formats  # noqa: E402
from omniadam.saving import file  # noqa: E402
from omniadam.saving import torch as saving  # noqa: E402
from omniadam.saving.optimizers import held  # noqa: E402
from omniadam.saving.snapshot import state_hash  # noqa: E402
from omniadam.saving.translate import translated  # noqa: E402
from omniadam.torch import Adam, AdamW  # noqa: E402
from reference import Reference  # noqa: E402

SHAPES = ((3, 4), (5,), ())
NAMES = ("dense/kernel", "dense/bias", "scale")
HALF = 3  # of the steps are made before the state is saved
WHOLE = 6


@contextmanager
def quiet() -> Iterator[None]:
    """In which torch.distributed does not say that it is one process, and orbax nothing either."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Run:
    """A run of torch.optim, or of ours, on the variables of the table."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        self.params = [torch.nn.Parameter(torch.tensor(w)) for w in variables(shapes=SHAPES)]
        self.opt = kind(list(zip(NAMES, self.params, strict=True)), **settings)

    def go(self, *steps: int) -> Any:
        for step in range(*steps):
            for p, g in zip(self.params, gradients(step, SHAPES), strict=True):
                p.grad = torch.tensor(g)
            self.opt.step()
        return self

    def values(self) -> list[Any]:
        return [p.detach().numpy().copy() for p in self.params]


def kept(opt: Any, state: Any = None) -> Any:
    with held(opt, state) as snapshot:
        return snapshot


def continued(snapshot: Any, kind: str, values: list[Any], path: Path) -> list[Any]:
    """NumPy variables after the rest of the steps, by an optimizer made of the snapshot."""
    file.write(path, translated(snapshot, kind))
    opt = omniadam.from_file(path)
    opt.build(dict(zip(NAMES, values, strict=True)))
    for step in range(HALF, WHOLE):
        opt.apply(gradients(step, SHAPES))
    return values


def reference(**settings: Any) -> Reference:
    made = Reference(variables(shapes=SHAPES), **settings)
    for step in range(WHOLE):
        made.step(gradients(step, SHAPES))
    return made


# By name: torch's class, its settings, and those of the oracle.
TORCHS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Adam": ("Adam", {"lr": 0.01}, {"learning_rate": 0.01}),
    "amsgrad": (
        "Adam",
        {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-3},
        {
            "learning_rate": 0.01,
            "amsgrad": True,
            "beta_1": 0.8,
            "beta_2": 0.95,
            "epsilon": 1e-3,
        },
    ),
    "AdamW": (
        "AdamW",
        {"lr": 0.01, "weight_decay": 0.5},
        {"learning_rate": 0.01, "weight_decay": 0.5},
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_a_run_of_torch_goes_on_in_numpy_and_back(name: str, tmp_path: Path) -> None:
    kind, settings, wanted = TORCHS[name]
    oracle = reference(**{"epsilon": 1e-8, **wanted}, epsilon_hat=False)
    theirs = Run(getattr(torch.optim, kind), **settings).go(HALF)
    torch.save(theirs.opt.state_dict(), tmp_path / "adam.pt")
    given = formats.read(tmp_path / "adam.pt")
    assert given.kind == f"omniadam.torch.{kind}"
    values = continued(given, f"omniadam.{kind}", theirs.values(), tmp_path / "ours.safetensors")
    theirs.go(HALF, WHOLE)
    assert_close(values, oracle)
    assert_close(theirs.values(), oracle)
    # And back: ours in NumPy, then a file that torch.optim loads.
    epsilon = {"epsilon": 1e-8, **wanted}
    opt = getattr(omniadam, kind)(**epsilon, epsilon_hat=False)
    values = variables(shapes=SHAPES)
    opt.build(dict(zip(NAMES, values, strict=True)))
    for step in range(HALF):
        opt.apply(gradients(step, SHAPES))
    formats.write(kept(opt), tmp_path / "back.pt")
    for cls in (getattr(torch.optim, kind), {"Adam": Adam, "AdamW": AdamW}[kind]):
        again = Run(cls)
        for p, w in zip(again.params, values, strict=True):
            p.data.copy_(torch.tensor(w))
        again.opt.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
        again.go(HALF, WHOLE)
        assert_close(again.values(), oracle)
        assert again.opt.param_groups[0]["lr"] == 0.01


def test_what_is_ours_on_both_sides_is_the_same_to_the_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "eps": 1e-5, "amsgrad": True, "use_ema": True}
    for more in ({}, {"epsilon_hat": True}, {"global_clipnorm": 1.0, "ema_momentum": 0.5}):
        ours = Run(Adam, **settings, **more).go(HALF)
        with pytest.warns(UserWarning, match=r"that torch\.optim ignores.*'use_ema'\]"):
            formats.write(kept(ours.opt), tmp_path / "ours.pt")
        given = formats.read(tmp_path / "ours.pt")
        values = continued(given, "omniadam.Adam", ours.values(), tmp_path / "a.safetensors")
        again = Run(Adam, **settings, **more).go(HALF)
        again.opt.load_state_dict(torch.load(tmp_path / "ours.pt"))
        again.go(HALF, WHOLE)
        ours.go(HALF, WHOLE)
        for a, b, c in zip(values, again.values(), ours.values(), strict=True):
            np.testing.assert_array_equal(a, c)
            np.testing.assert_array_equal(b, c)


def test_positions_are_no_names(tmp_path: Path) -> None:
    theirs = Run(torch.optim.Adam)
    theirs.opt = torch.optim.Adam(theirs.params, lr=0.01)
    torch.save(theirs.go(HALF).opt.state_dict(), tmp_path / "adam.pt")
    path = tmp_path / "ours.safetensors"
    file.write(path, translated(formats.read(tmp_path / "adam.pt"), "omniadam.Adam"))
    with pytest.raises(ValueError, match="by='position'"):
        omniadam.from_file(path)
    opt, values = omniadam.from_file(path, by="position"), theirs.values()
    opt.build(values)
    for step in range(HALF, WHOLE):
        opt.apply(gradients(step, SHAPES))
    assert_close(values, reference(learning_rate=0.01, epsilon=1e-8, epsilon_hat=False))


def test_parameters_that_do_not_decay(tmp_path: Path) -> None:
    ours = Run(AdamW)
    pairs = list(zip(NAMES, ours.params, strict=True))
    ours.opt = AdamW([{"params": pairs[:1]}, {"params": pairs[1:], "weight_decay": 0}], lr=0.01)
    ours.go(HALF)
    given = kept(ours.opt)
    keras = translated(given, "omniadam.AdamW")
    excluded = keras.settings["exclude_from_weight_decay"]
    assert excluded == {"var_names": [], "variables": list(NAMES[1:])}
    values = continued(given, "omniadam.AdamW", ours.values(), tmp_path / "a.safetensors")
    oracle = reference(
        learning_rate=0.01, epsilon=1e-8, weight_decay=0.01, excluded=(1, 2), epsilon_hat=False
    )
    ours.go(HALF, WHOLE)
    assert_close(values, oracle)
    assert_close(ours.values(), oracle)
    back = translated(keras, "omniadam.torch.AdamW")
    groups = [(g["weight_decay"], g["params"]) for g in back.settings["groups"]]
    assert groups == [(0.01, [NAMES[0]]), (0, list(NAMES[1:]))]


# --- .pt -----------------------------------------------------------------------------------------


def test_the_optimizer_in_a_checkpoint(tmp_path: Path) -> None:
    run = Run(torch.optim.Adam).go(2)
    state = run.opt.state_dict()
    path = tmp_path / "all.pt"
    names = [v.name for v in saving.snapshot(run.opt).variables]

    torch.save({"model": {"w": torch.ones(2)}, "optimizer": state, "epoch": 3}, path)
    for key in (None, "optimizer"):
        assert [v.name for v in formats.read(path, key).variables] == names
    torch.save({"optimizer_states": [state, state], "x.y": {"z": state}}, path)
    assert (
        formats.read(path, "optimizer_states.1").tensors.keys()
        == saving.snapshot(run.opt).tensors.keys()
    )
    assert formats.read(path, "x/y").variables
    for key, message in (
        (None, r"holds 3 optimizers. Name one as the key: \['optimizer_states.0', "),
        ("optimizer_states", r"holds 2 optimizers"),
        ("optim", r"holds no optimizer at the key 'optim'. There are: "),
    ):
        with pytest.raises(ValueError, match=message):
            formats.read(path, key)
    torch.save({"model": {"w": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"with 'state' and 'param_groups'\. It has none"):
        formats.read(path)


def test_what_a_file_of_torch_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "adam.pt"
    # Moments of 16 bits; counts that are numbers; parameters without state, without names.
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    never = torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.Adam([half, never], lr=torch.tensor(0.5))
    half.grad = torch.full((3,), 0.3, dtype=torch.bfloat16)
    opt.step()
    state = opt.state_dict()
    state["state"][0]["step"] = 1
    torch.save(state, path)
    found = formats.read(path)
    assert [(v.name, v.is_named, v.shape, dict(v.slots) != {}) for v in found.variables] == [
        ("0", False, (3,), True),
        ("1", False, (), False),
    ]
    moment = found.tensors["0.momentum"]
    assert moment.dtype == "float32"
    wanted = state["state"][0]["exp_avg"].float().numpy()
    np.testing.assert_array_equal(moment.read(), wanted)
    ours = Adam([half, never])
    assert not saving.restore(ours, found, by="position", strict=True)
    assert ours.param_groups[0]["lr"] == 0.5 and len(ours.state) == 1
    # The form that torch.save had before archives.
    torch.save(state, path, _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(formats.read(path).tensors["0.momentum"].read(), wanted)

    def refused(change: Callable[[Any], None], message: str) -> None:
        changed = opt.state_dict()
        changed["state"] = {k: dict(v) for k, v in changed["state"].items()}
        changed["param_groups"] = [dict(g) for g in changed["param_groups"]]
        change(changed)
        torch.save(changed, path)
        with pytest.raises(ValueError, match=message):
            formats.read(path)

    refused(lambda s: s["param_groups"][0].pop("amsgrad"), r"lack \['amsgrad'\]")  # as RAdam's
    refused(lambda s: s["state"][0].pop("exp_avg_sq"), r"'0' lacks \['exp_avg_sq'\]")
    refused(lambda s: s["state"][0].update(mu_product=1.0), r"has \['mu_product'\] besides")
    refused(lambda s: s["state"][0].update(step=torch.tensor(0.5)), "must be a whole number")
    refused(lambda s: s["state"][0].update(exp_avg=torch.ones(4)), r"of the shape of the others")
    refused(lambda s: s["state"].update({9: {}, 8: {}}), r"in no parameter group: \[9, 8\]")
    refused(lambda s: s.update(param_groups=[{"lr": 1}]), "a list of groups with 'params'")
    refused(lambda s: s["param_groups"][0].update(params=[0, 0]), "each once")
    refused(lambda s: s["param_groups"][0].update(param_names=["a"]), "a name of each parameter")
    refused(lambda s: s["param_groups"][0].update(lr=torch.ones(2)), "`lr` of parameter group 0")
    refused(lambda s: s["param_groups"][0].update(lr="fast"), "`lr` and `eps` are numbers")
    refused(lambda s: s["param_groups"][0].update(betas=(0.9,)), "and `betas` two")
    with pytest.raises(FileNotFoundError, match="no file"):
        formats.read(tmp_path / "none.pt")
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="must be a file with the state of an optimizer"):
        formats.read(path)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["OMNIADAM_EVIL"],)


def test_a_file_of_torch_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = tmp_path / "made"
    monkeypatch.setenv("OMNIADAM_EVIL", str(evil))
    path = tmp_path / "evil.pt"
    state = Run(torch.optim.Adam).go(1).opt.state_dict()
    for legacy in (False, True):
        torch.save({**state, "x": Evil()}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"holds other objects than tensors.*any code"):
            formats.read(path)
    folder = tmp_path / "evil"
    formats.write(kept(Run(Adam).go(1).opt), tmp_path / "evil.dcp")
    shutil.move(tmp_path / "evil.dcp", folder)
    metadata = (folder / ".metadata").read_bytes()
    for protocol in (0, 2, 4):
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(), protocol))
        with pytest.raises(ValueError, match=r"it asks for (posix|nt|os)\.mkdir"):
            formats.read(folder)
    (folder / ".metadata").write_bytes(metadata)
    # A number in a part of its own, which torch itself would load with whatever it says.
    with quiet():
        dcp.save(
            {"state": {"a": {"step": torch.ones(())}}, "param_groups": [{"params": Evil()}]},
            checkpoint_id=tmp_path / "number",
            no_dist=True,
        )
    with pytest.raises(ValueError, match="cannot be read"):
        formats.read(tmp_path / "number")
    assert not evil.exists()


def digest_of(path: Path) -> str:
    found = formats.read(path)
    return state_hash(found) + repr(found.settings) + repr(found.variables)


def damaged(content: bytes, count: int, seed: int = 0) -> Any:
    """Contents with a byte changed, and the beginnings of it."""
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(content), count):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(0, 8))
        yield bytes(changed)
    for end in rng.integers(0, len(content), count // 8):
        yield content[:end]


def test_no_altered_byte_of_a_file_of_torch_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "adam.pt"
    torch.save(Run(torch.optim.Adam).go(1).opt.state_dict(), path)
    good = digest_of(path)
    errors = 0
    for content in damaged(path.read_bytes(), 300):
        path.write_bytes(content)
        try:
            assert digest_of(path) == good  # of what nothing depends on: a date, padding
        except ValueError as error:
            errors += 1
            assert str(path) in str(error), error
    assert errors > 100
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 1_000_000)
    with pytest.raises(ValueError, match=r"the part 'a/data\.pkl'"):
        formats.read(path)


# --- torch.distributed.checkpoint ----------------------------------------------------------------


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)

    def steps(self, opt: Any, *steps: int) -> None:
        for step in range(*steps):
            for i, p in enumerate(self.parameters()):
                p.grad = torch.full_like(p, 0.1 * (step + 1) + i)
            opt.step()


def model_of(other: Any = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Model()
    if other is not None:
        model.load_state_dict(other.state_dict())
    groups = [
        {"params": list(model.first.named_parameters("first"))},
        {"params": list(model.second.named_parameters("second")), "lr": 0.5, "amsgrad": True},
    ]
    return model, groups


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_of_torch_distributed(flat: bool, tmp_path: Path) -> None:
    model, groups = model_of()
    opt = torch.optim.AdamW(groups, lr=0.1)
    model.steps(opt, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    with quiet():
        state = get_optimizer_state_dict(model, opt, options=options)
        dcp.save(
            {"app": {"optim": state, "model": model.state_dict()}},
            checkpoint_id=tmp_path / "theirs",
            no_dist=True,
        )
    given = formats.read(tmp_path / "theirs", None if flat else "app.optim")
    copy, groups = model_of(model)
    ours = AdamW(groups, lr=7.0)
    assert not saving.restore(ours, given, by="name", strict=True)
    model.steps(opt, 3, 6)
    copy.steps(ours, 3, 6)
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)
    # And back.
    folder = tmp_path / "ours.dcp"
    formats.write(kept(Adam([("a", torch.zeros(2))])), folder)
    formats.write(kept(ours), folder)  # in the place of that
    (tmp_path / "other.dcp").mkdir()
    with pytest.raises(FileExistsError, match="Give another name"):
        formats.write(kept(ours), tmp_path / "other.dcp")
    (tmp_path / "other.dcp").rmdir()
    back, groups = model_of(copy)
    theirs = torch.optim.AdamW(groups, lr=7.0)
    with quiet():
        wanted = {"optimizer": get_optimizer_state_dict(back, theirs)}
        dcp.load(wanted, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(back, theirs, wanted["optimizer"])
    copy.steps(ours, 6, 8)
    back.steps(theirs, 6, 8)
    for p, q in zip(copy.parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)
    assert [g["lr"] for g in theirs.param_groups] == [0.1, 0.5]
    assert sorted(os.listdir(tmp_path)) == ["ours.dcp", "theirs"]


def test_damaged_folders_of_torch_distributed(tmp_path: Path) -> None:
    folder = tmp_path / "adam.dcp"
    run = Run(Adam).go(1)
    formats.write(kept(run.opt), folder)
    good = digest_of(folder)
    names = sorted(os.listdir(folder))
    assert names == [".metadata", "__0_0.distcp"]
    for name, count in zip(names, (40, 30), strict=True):
        content, errors = (folder / name).read_bytes(), 0
        for changed in damaged(content, count):
            (folder / name).write_bytes(changed)
            try:
                found = digest_of(folder)
                # Nothing in the folder tells whether a name is what was written.
                assert found == good or name == ".metadata"
            except ValueError as error:
                errors += 1
                assert str(folder) in str(error), error
        assert errors > count / 4
        (folder / name).write_bytes(content)
    assert digest_of(folder) == good
    (folder / "__0_0.distcp").rename(tmp_path / "__0_0.distcp")
    with pytest.raises(ValueError, match="lacks"):
        formats.read(folder)
    unnamed = Adam([torch.zeros(2)])
    with pytest.raises(ValueError, match="given named_parameters"):
        formats.write(kept(unnamed), tmp_path / "other.dcp")


# --- orbax ---------------------------------------------------------------------------------------


def tree() -> dict[str, Any]:
    values = variables(shapes=SHAPES)
    return {
        "dense": {"kernel": jnp.asarray(values[0]), "bias": jnp.asarray(values[1])},
        "scale": jnp.asarray(values[2]),
    }


def gradient_tree(step: int) -> Any:
    kernel, bias, scale = map(jnp.asarray, gradients(step, SHAPES))
    return {"dense": {"kernel": kernel, "bias": bias}, "scale": scale}


def advance(solver: Any, params: Any, state: Any, *steps: int) -> tuple[Any, Any]:
    update = jax.jit(solver.update)
    for step in range(*steps):
        updates, state = update(gradient_tree(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def listed(params: Any) -> list[Any]:
    parts = (params["dense"]["kernel"], params["dense"]["bias"], params["scale"])
    return [np.array(part) for part in parts]


def stored(path: Path, item: Any, by: Any = None) -> None:
    saver = (by or orbax.StandardCheckpointer)()
    with quiet():
        saver.save(path, item)
        if hasattr(saver, "wait_until_finished"):
            saver.wait_until_finished()
        saver.close()


def near(got: list[Any], oracle: Reference, library: Any) -> None:
    """Within the tolerance; optax computes 1 - b2**t in float32, and is 1e-4 of an update off."""
    if library is omniadam.optax:
        assert_close(got, oracle)
    else:
        for a, b in zip(got, oracle.variables, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("library", [optax, omniadam.optax], ids=["optax", "ours"])
def test_a_run_of_optax_goes_on_in_numpy_and_back(library: Any, tmp_path: Path) -> None:
    solver = optax.chain(optax.clip(1e9), library.adam(lambda count: 0.01 / (1 + count)))
    params, state = advance(solver, tree(), solver.init(tree()), HALF)
    oracle = reference(
        learning_rate=lambda count: 0.01 / (1 + count), epsilon=1e-8, epsilon_hat=False
    )
    for by in (orbax.StandardCheckpointer, orbax.PyTreeCheckpointer):
        folder = tmp_path / by.__name__
        stored(folder, {"opt_state": state, "params": params}, by)
        given = formats.read(folder)
        # The tree that it is of, by key path.
        file.write(tmp_path / "tree.safetensors", given)
        again = omniadam.load(tmp_path / "tree.safetensors", like=state)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
    # What optax does not keep is said: an optimizer that has it takes the state.
    keras = translated(given, "omniadam.Adam")
    assert not keras.is_complete and keras.settings == {"epsilon_hat": False}
    rate = omniadam.schedules.InverseTimeDecay(0.01, 1, 1.0)
    opt = omniadam.Adam(rate, epsilon=1e-8, epsilon_hat=False)
    values = dict(zip(NAMES, listed(params), strict=True))
    opt.build(values)
    file.write(tmp_path / "ours.safetensors", keras)
    with pytest.raises(ValueError, match="settings"):
        omniadam.from_file(tmp_path / "ours.safetensors")
    omniadam.load(tmp_path / "ours.safetensors", opt)
    for step in range(HALF, WHOLE):
        opt.apply(gradients(step, SHAPES))
    near(list(values.values()), oracle, library)
    params, state = advance(solver, params, state, HALF, WHOLE)
    near(listed(params), oracle, library)
    # And back, into the folder of a run that began: its schedule goes on with the steps.
    begun = tmp_path / "begun"
    stored(begun, {"opt_state": solver.init(tree()), "params": tree(), "epoch": jnp.asarray(7)})
    formats.write_into(kept(opt), begun)
    with quiet():
        like = {"opt_state": state, "params": params, "epoch": jnp.asarray(0)}
        back = orbax.StandardCheckpointer().restore(begun, like)
    assert int(back["epoch"]) == 7
    for a, b in zip(listed(back["params"]), listed(tree()), strict=True):
        np.testing.assert_array_equal(a, b)
    counts = [int(leaf) for leaf in jax.tree.leaves(back["opt_state"]) if leaf.dtype == jnp.int32]
    assert counts == [WHOLE, WHOLE]
    start = {
        "dense": {"kernel": values[NAMES[0]], "bias": values[NAMES[1]]},
        "scale": values[NAMES[2]],
    }
    start = jax.tree.map(jnp.asarray, start)
    ours, _ = advance(solver, start, back["opt_state"], WHOLE, WHOLE + 2)
    theirs, _ = advance(solver, params, state, WHOLE, WHOLE + 2)
    for step in (WHOLE, WHOLE + 1):
        oracle.step(gradients(step, SHAPES))
    near(listed(ours), oracle, library)
    near(listed(theirs), oracle, library)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_which_state_of_a_folder_is_meant(tmp_path: Path) -> None:
    solver = omniadam.optax.adam(0.1)
    params = {"w": jnp.ones(2)}
    state = solver.init(params)
    folder = tmp_path / "two"
    stored(folder, {"g": state, "d": {"inner": state}})
    with pytest.raises(ValueError, match=r"holds 2 optimizers. Name one as the key: \['d.inner'"):
        formats.read(folder)
    for key in ("g", "d", "d.inner", "d/inner"):
        found = formats.read(folder, key)
        assert [v.name for v in found.variables] == ["w"]
    with quiet():
        manager = orbax.CheckpointManager(tmp_path / "steps")
        args = orbax.args.StandardSave({"opt": state})
        manager.save(3, args=orbax.args.Composite(train=args))
        manager.wait_until_finished()
        manager.close()
    assert formats.read(tmp_path / "steps" / "3").variables == found.variables
    stored(tmp_path / "none", {"params": params})
    with pytest.raises(ValueError, match=r"`count`, `mu` and `nu`.*It has none"):
        formats.read(tmp_path / "none")
    # What does not fit, and what is damaged: the folder stays as it is.
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = solver.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"momentum of 'w': float32 of shape \(3,\)"):
        formats.write_into(kept(other), folder, "g")
    with pytest.raises(ValueError, match=r"The file lacks: 'w'\. The optimizer has no: 'v'"):
        formats.write_into(kept(solver.init({"v": jnp.ones(2)})), folder, "g")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    moved = jax.tree.map(lambda x: x + 1, solver.init([jnp.ones(2)]))
    formats.write_into(kept(moved), folder, "g", by="position")
    for key, value in (("g", 1.0), ("d.inner", 0.0)):
        found = formats.read(folder, key)
        np.testing.assert_array_equal(found.tensors["[0].mu['w']"].read(), value)
    for name in ("_METADATA", "manifest.ocdbt"):
        kept_bytes = (folder / name).read_bytes()
        (folder / name).write_bytes(kept_bytes[: len(kept_bytes) // 2])
        with pytest.raises(ValueError, match=r"two/?' cannot be read"):
            found = formats.read(folder, "g")
            [tensor.read() for tensor in found.tensors.values()]
        (folder / name).write_bytes(kept_bytes)


# --- from one generation to another --------------------------------------------------------------


def test_the_generations_of_keras(tmp_path: Path) -> None:
    from omniadam.compat import contrib_keras, optimizer_v2

    opt = omniadam.Adam(
        omniadam.schedules.InverseTimeDecay(0.1, 1, 0.5), global_clipnorm=1.0, epsilon=1e-5
    )
    w = np.ones(3)
    opt.build({"w": w})
    opt.apply([np.full(3, 2.0)])
    given = kept(opt)
    older = translated(given, "omniadam.compat.optimizer_v2.Adam")
    assert older.settings["decay"] == 0.5 and older.settings["learning_rate"] == 0.1
    assert optimizer_v2.Adam.from_config(dict(older.settings)).get_config() == older.settings
    oldest = translated(given, "omniadam.compat.contrib_keras.Adam")
    assert oldest.settings["clipnorm"] == 1.0 and oldest.settings["lr"] == 0.1
    assert contrib_keras.Adam.from_config(dict(oldest.settings)).get_config() == oldest.settings
    for each in (older, oldest):
        back = translated(each, "omniadam.Adam")
        assert back.settings["global_clipnorm"] == 1.0 and back.settings["epsilon"] == 1e-5
        assert back.settings["learning_rate"] == given.settings["learning_rate"]
        values = continued_one(back, w.copy(), tmp_path / "a.safetensors")
        np.testing.assert_array_equal(values, continued_one(given, w.copy(), tmp_path / "b"))
    assert translated(older, "omniadam.compat.contrib_keras.Adam").settings == oldest.settings


def continued_one(snapshot: Any, value: Any, path: Path) -> Any:
    file.write(path, snapshot)
    opt = omniadam.from_file(path)
    opt.build({"w": value})
    opt.apply([np.full(3, -1.0)])
    return value


def test_what_has_no_equivalent(tmp_path: Path) -> None:
    def keras(**settings: Any) -> Any:
        opt = omniadam.Adam(**{"learning_rate": 0.1, **settings})
        opt.build({"w": np.ones(2)})
        return kept(opt)

    def ours(**settings: Any) -> Any:
        return kept(Run(Adam, **settings).go(1).opt)

    def uneven() -> Any:
        run = Run(Adam).go(1)
        run.params[0].grad = torch.ones_like(run.params[0])
        run.params[1].grad = run.params[2].grad = None
        run.opt.step()
        return kept(run.opt)

    def grouped() -> Any:
        run = Run(Adam)
        pairs = list(zip(NAMES, run.params, strict=True))
        run.opt = Adam([{"params": pairs[:1]}, {"params": pairs[1:], "lr": 0.5}])
        return kept(run.go(1).opt)

    def old() -> Any:
        state = Run(torch.optim.AdamW).go(1).opt.state_dict()
        del state["param_groups"][0]["decoupled_weight_decay"]
        torch.save(state, tmp_path / "old.pt")
        return formats.read(tmp_path / "old.pt")

    def of_optax() -> Any:
        solver = optax.chain(optax.trace(0.9), omniadam.optax.adam(0.1))
        return kept(solver.init({"w": jnp.ones(2)}))

    schedule = omniadam.schedules.CosineDecay(0.1, 10)
    v2, v1 = "omniadam.compat.optimizer_v2.Adam", "omniadam.compat.contrib_keras.Adam"
    to_torch, to_keras = "omniadam.torch.Adam", "omniadam.Adam"
    for given, kind, message in (
        (ours(weight_decay=0.1), to_keras, r"`weight_decay=0.1` as an L2 penalty"),
        (old(), to_keras, "does not tell whether it is decoupled"),
        (ours(maximize=True), to_keras, "`maximize=True`"),
        (uneven(), to_keras, r"different numbers \(1: \['dense/bias', 'scale'\]; 2: \['dense/ker"),
        (grouped(), to_keras, r"settings of their own, \['lr'\]"),
        (keras(learning_rate=schedule), to_torch, "a learning rate that is a schedule"),
        (keras(learning_rate=schedule), v1, "a learning rate that is a schedule"),
        (keras(loss_scale_factor=2.0), to_torch, "`loss_scale_factor=2.0`"),
        (keras(gradient_accumulation_steps=2), to_torch, "`gradient_accumulation_steps=2`"),
        (keras(gradient_accumulation_steps=2), "optax", "`gradient_accumulation_steps=2`"),
        (keras(use_ema=True, ema_overwrite_frequency=3), to_torch, "`ema_overwrite_frequency=3`"),
        (keras(use_ema=True), v2, "`use_ema=True`"),
        (keras(use_ema=True), "optax", "`use_ema=True`"),
        (keras(amsgrad=True), v1, "`amsgrad=True`"),
        (keras(amsgrad=True), "optax", "`amsgrad=True`"),
        (keras(clipnorm=1.0), v1, "`clipnorm=1.0`"),
        (keras(weight_decay=0.1), v2, "`weight_decay=0.1`"),
        (ours(), v2, "`epsilon_hat=False`"),
        (of_optax(), to_keras, r"the state \[\"\[0\].trace"),
        (kept(omniadam.optax.adam(0.1).init({"w": jnp.ones(2)})), to_torch, "must be known"),
        (kept({"a": jnp.ones(2)}), to_keras, "must hold the state of one Adam"),
        (ours(), "omniadam.SGD", "State is translated for"),
    ):
        with pytest.raises(ValueError, match=message):
            translated(given, kind)
    assert "velocity_hat" in translated(keras(amsgrad=True), v2).variables[0].slots
    assert translated(ours(), "omniadam.AdamW").settings["weight_decay"] == 0.0
