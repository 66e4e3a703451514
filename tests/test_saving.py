"""`save`, `load`, `from_file`, `state_hash`: a run that goes on is one that never stopped."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from cases import CASES, Case, gradients, variables
from omniadam import Adam, AdamW, IndexedSlices, Optimizer, Table, schedules

SHAPES = {"dense/kernel": (3, 4), "dense/bias": (4,), "scale": (), "none": (0, 2)}
Arrays = dict[str, Any]


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adam.safetensors"


def arrays(dtype: str = "float32") -> Arrays:
    return dict(zip(SHAPES, variables(dtype, 0, tuple(SHAPES.values())), strict=True))


def tensors(dtype: str = "float32") -> Arrays:
    import torch

    return {name: torch.tensor(value) for name, value in arrays(dtype).items()}


def refs(dtype: str = "float32") -> Arrays:
    import jax

    return {name: jax.new_ref(jax.numpy.array(v)) for name, v in arrays(dtype).items()}


def tf_variables(dtype: str = "float32") -> Arrays:
    import tensorflow as tf

    return {name: tf.Variable(value) for name, value in arrays(dtype).items()}


def keras_variables(dtype: str = "float32") -> Arrays:
    import keras

    return {name: keras.Variable(value, name="v") for name, value in arrays(dtype).items()}


LIBRARIES: dict[str, Callable[..., Arrays]] = {
    "numpy": arrays,
    "torch": tensors,
    "jax": refs,
    "tensorflow": tf_variables,
    "keras": keras_variables,
}


def grads(step: int, held: Mapping[str, Any]) -> list[Any]:
    found = gradients(step, tuple(SHAPES.values()), dtype="float32")
    module = type(next(iter(held.values()))).__module__.partition(".")[0]
    by_name = dict(zip(SHAPES, found, strict=True))
    values = [by_name[name] for name in held]
    if module == "torch":
        import torch

        return [torch.tensor(value) for value in values]
    if module == "jax":
        import jax

        return [jax.numpy.array(value) for value in values]
    if module == "tensorflow":
        import tensorflow as tf

        return [tf.constant(value) for value in values]
    return values


def train(opt: Any, held: Mapping[str, Any], start: int, stop: int) -> None:
    for step in range(start, stop):
        opt.apply(grads(step, held), list(held.values()))


def value(variable: Any) -> np.ndarray:
    if hasattr(variable, "detach"):
        return np.array(variable.detach().numpy())
    if type(variable).__module__.startswith("keras"):
        import keras

        return np.array(keras.ops.convert_to_numpy(variable.value))
    if hasattr(variable, "numpy"):
        return np.array(variable.numpy())
    return np.array(variable[...])


def values(held: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: value(variable).tobytes() for name, variable in held.items()}


def put(held: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Give variables the values of others, as the user restores the weights of a model."""
    for name, variable in held.items():
        if hasattr(variable, "copy_"):
            variable.copy_(given[name])
        elif hasattr(variable, "assign"):
            variable.assign(given[name])
        else:
            variable[...] = given[name][...]


def built(held: Mapping[str, Any], **settings: Any) -> Adam:
    opt = Adam(**settings)
    opt.build(held)
    return opt


def settings_of(case: Case) -> dict[str, Any]:
    return case.settings_for(schedules)


EVERYTHING: dict[str, Any] = {
    "learning_rate": 2.0**-7,
    "amsgrad": True,
    "weight_decay": 0.5,
    "global_clipnorm": 2.0,
    "use_ema": True,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 3,
}

# --- a run that goes on ---


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_save_stop_load_continue_equals_never_stopped(case: Case, path: Path) -> None:
    held, settings = arrays(), settings_of(case)
    opt = built(held, **settings)
    train(opt, held, 0, 4)
    omniadam.save(opt, path)
    resumed = copy.deepcopy(held)
    train(opt, held, 4, 9)
    again = omniadam.from_file(path)
    again.build(dict(reversed(resumed.items())))
    train(again, resumed, 4, 9)
    assert values(resumed) == values(held)
    assert omniadam.state_hash(again) == omniadam.state_hash(opt)
    assert again.iterations == opt.iterations and again.get_config() == opt.get_config()


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_goes_on_where_it_stopped(library: str, path: Path) -> None:
    """In the middle of an accumulation; loaded before and after the build."""
    make = LIBRARIES[library]
    held = make()
    opt = built(held, **EVERYTHING)
    train(opt, held, 0, 5)
    omniadam.save(opt, path)
    stopped = {name: value(variable) for name, variable in held.items()}
    train(opt, held, 5, 9)
    early, late, both = Adam(**EVERYTHING), built(others := make(), **EVERYTHING), []
    assert not omniadam.load(path, early) and not omniadam.load(path, late)
    assert early.iterations == late.iterations == 1
    early.build(mine := make())
    for again, own in ((early, mine), (late, others)):
        put(own, {n: stopped[n] if library != "torch" else _tensor(stopped[n]) for n in own})
        train(again, own, 5, 9)
        both.append((values(own), omniadam.state_hash(again)))
    assert both == [(values(held), omniadam.state_hash(opt))] * 2


def _tensor(array: Any) -> Any:
    import torch

    return torch.tensor(array)


def test_one_state_has_one_hash_on_every_library(path: Path) -> None:
    """And a file of one is loaded into each other."""
    held = arrays()
    opt = built(held, **EVERYTHING)
    train(opt, held, 0, 5)
    omniadam.save(opt, path)
    expected = omniadam.state_hash(opt)
    for make in LIBRARIES.values():
        other = built(make(), **EVERYTHING)
        assert omniadam.state_hash(other) != expected
        omniadam.load(path, other)
        assert omniadam.state_hash(other) == expected
        omniadam.save(other, path)
    fortran = {name: np.asarray(array, order="F") for name, array in arrays().items()}
    omniadam.load(path, other := built(fortran, **EVERYTHING))
    assert omniadam.state_hash(other) == expected


def test_the_hash_is_of_all_state_and_nothing_else() -> None:
    held = arrays()
    opt = built(held, **EVERYTHING)
    train(opt, held, 0, 5)
    before = omniadam.state_hash(opt)
    opt.learning_rate, opt.weight_decay, opt.name = 0.5, 0.25, "other"
    assert omniadam.state_hash(opt) == before
    for name, array in opt.named_variables().items():
        if name == "learning_rate" or array.size == 0:
            continue
        kept = array.copy()
        array[...] = -0.0 if array.dtype.kind == "f" and not array.any() else array + 1
        assert omniadam.state_hash(opt) != before, name
        array[...] = kept
    assert omniadam.state_hash(opt) == before


def test_half_precision_variables(path: Path) -> None:
    """Their slots are float32, so that a run goes on in another precision."""
    held = {"w": np.ones(5, np.float16)}
    opt = built(held)
    opt.apply([np.arange(5, dtype=np.float16)])
    omniadam.save(opt, path)
    omniadam.load(path, wide := built({"w": np.ones(5, np.float32)}))
    assert omniadam.state_hash(wide) == omniadam.state_hash(opt)


def test_a_table_is_saved_up_to_date(path: Path) -> None:
    def slices(step: int) -> IndexedSlices:
        rng = np.random.default_rng(step)
        rows = rng.normal(size=(3, 2)).astype(np.float32)
        return IndexedSlices(rows, rng.integers(0, 50, 3), (50, 2))

    start = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    table, plain = Table(start, name="rows"), start.copy()
    opt, dense = built({"rows": table}), built({"rows": plain})
    for step in range(20):
        opt.apply([slices(step)])
        dense.apply([slices(step)])
    assert omniadam.state_hash(opt) == omniadam.state_hash(dense)
    omniadam.save(opt, path)
    again = omniadam.from_file(path)
    again.build([other := Table(table, name="rows")])  # a table has the name that it is given
    for step in range(20, 30):
        opt.apply([slices(step)])
        dense.apply([slices(step)])
        again.apply([slices(step)])
    assert np.array_equal(np.asarray(other), np.asarray(table))
    assert np.array_equal(np.asarray(other), plain)
    assert omniadam.state_hash(again) == omniadam.state_hash(opt) == omniadam.state_hash(dense)


def test_bare_jax_arrays_bring_their_state(path: Path) -> None:
    import jax
    import jax.numpy as jnp

    held = [jnp.array(v) for v in arrays().values()]
    opt = Adam(amsgrad=True)
    opt.build(dict(zip(SHAPES, held, strict=True)))
    given = [jnp.array(g) for g in gradients(0, tuple(SHAPES.values()), dtype="float32")]
    held, state = jax.jit(opt.stateless_apply)(opt.variables, given, held)
    for call in (lambda: omniadam.save(opt, path), lambda: omniadam.state_hash(opt)):
        with pytest.raises(ValueError, match=r"in your hands.*save\(optimizer, path, state=state"):
            call()
    assert not path.exists()
    omniadam.save(opt, path, state=state)
    again = omniadam.from_file(path)
    again.build(dict(zip(SHAPES, held, strict=True)))
    assert omniadam.state_hash(again, state=again.variables) == omniadam.state_hash(
        opt, state=state
    )
    for mine, theirs in zip(again.variables, state, strict=True):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    with pytest.raises(ValueError, match="one array for each of the 14"):
        omniadam.save(opt, path, state=state[1:])
    with pytest.raises(ValueError, match="Received one of shape"):
        omniadam.save(opt, path, state=[*state[:2], *reversed(state[2:])])
    with pytest.raises(ValueError, match="one array for each of the 14"):
        omniadam.save(built(arrays(), amsgrad=True), path, state=state[1:])


def test_a_state_that_is_in_its_users_hands(path: Path) -> None:
    """Of NumPy arrays, too: what the optimizer itself has is behind."""
    held = arrays()
    opt = built(held)
    state, values_ = opt.variables, list(held.values())
    for step in range(3):
        values_, state = opt.stateless_apply(state, grads(step, held), values_)
    with pytest.raises(ValueError, match="in your hands"):
        omniadam.save(opt, path)
    omniadam.save(opt, path, state=state)
    again = omniadam.from_file(path)
    again.build(held)
    assert again.iterations == 3
    assert [w.tobytes() for w in again.get_weights()] == [np.asarray(s).tobytes() for s in state]
    opt.set_weights(state)
    assert omniadam.state_hash(opt) == omniadam.state_hash(again)
    with pytest.raises(ValueError, match="must be a whole number"):
        omniadam.save(opt, path, state=[np.nan, *state[1:]])
    with pytest.raises(ValueError, match="`state` is of an optimizer that is built"):
        omniadam.save(Adam(), path, state=state)
    import torch

    from omniadam.torch import Adam as OfTorch

    stepped = OfTorch([("w", torch.nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match="stepped by stateless_apply"):
        omniadam.save(stepped, path, state=[])


# --- before the build ---


def test_what_is_set_after_a_load_stays_set(path: Path) -> None:
    held = arrays()
    opt = built(held, learning_rate=0.25)
    train(opt, held, 0, 3)
    omniadam.save(opt, path)
    stored: dict[str, Any] = {}
    opt.save_own_variables(stored)
    for load in (
        lambda new: omniadam.load(path, new),
        lambda new: new.set_weights(opt.get_weights()),
        lambda new: new.load_own_variables(stored),
    ):
        new = Adam(learning_rate=1.0)
        load(new)
        assert (new.iterations, new.learning_rate) == (3, 0.25)
        new.learning_rate = 0.5
        new.assign(new.variables[0], 7)
        again = pickle.loads(pickle.dumps(copy.deepcopy(new)))
        for each in (new, again):
            each.build(arrays())
            assert (each.iterations, each.learning_rate) == (7, 0.5)
            assert np.array_equal(each.get_weights()[2], opt.get_weights()[2])


@pytest.mark.parametrize("kind", ["file", "weights"])
def test_what_does_not_fit_is_found_at_the_build_and_changes_nothing(kind: str, path: Path) -> None:
    held = arrays()
    opt = built(held)
    train(opt, held, 0, 2)
    omniadam.save(opt, path)
    new = Adam()
    new.set_weights(opt.get_weights()) if kind == "weights" else omniadam.load(path, new)
    wrong = arrays() | {"scale": np.ones(3, np.float32)}
    before = values(wrong)
    for build in (lambda: new.build(wrong), lambda: new.apply(grads(0, wrong), wrong)):
        with pytest.raises(ValueError, match=r"shape \(3,\)|\(3,\)"):
            build()
        assert not new.built and new.iterations == 2 and values(wrong) == before
    new.build(held)
    assert omniadam.state_hash(new) == omniadam.state_hash(opt)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "needs .* first"),
        ([np.array(-1), np.array(0.1)], "whole numbers from 0"),
        ([np.array(2), np.array(np.nan)], "learning_rate"),
        ([np.array(2), np.array(0.1), np.array(["a"])], "Number 2 of the weights must hold real"),
    ],
)
def test_weights_that_can_never_fit(weights: list[Any], message: str) -> None:
    opt = Adam()
    with pytest.raises(ValueError, match=message):
        opt.set_weights(weights)
    assert (opt.iterations, opt.learning_rate) == (0, 0.001)


class Momentum(Optimizer):
    """A user's own, whose `build` creates slots after that of its base."""

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.sums = self.add_optimizer_variables(variables, "sum")
        self.seen = self.add_variable((), dtype="int32", name="seen")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        i = self._get_variable_index(variable)
        self.assign(self.sums[i], 0.5 * self.sums[i] + gradient)
        self.assign_sub(variable, learning_rate * self.sums[i])
        self.assign_add(self.seen, 1)


def test_a_users_own_class(path: Path) -> None:
    held = arrays()
    opt = Momentum(0.1, use_ema=True)
    opt.build(held)
    train(opt, held, 0, 3)
    omniadam.save(opt, path)
    resumed = copy.deepcopy(held)
    train(opt, held, 3, 5)
    with pytest.raises(ValueError, match=r"custom_objects=\{'Momentum'"):
        omniadam.from_file(path)
    weights = Momentum(0.1, use_ema=True)
    weights.build(copy.deepcopy(resumed))
    omniadam.load(path, weights)
    early = Momentum(0.1, use_ema=True)
    early.set_weights(weights.get_weights())
    for again in (omniadam.from_file(path, custom_objects={"Momentum": Momentum}), early):
        mine = copy.deepcopy(resumed)
        again.build(mine)
        train(again, mine, 3, 5)
        assert values(mine) == values(held)
        assert omniadam.state_hash(again) == omniadam.state_hash(opt)
    omniadam.save(built(arrays(), use_ema=True), path)
    lacking = pytest.raises(ValueError, match=r"'dense/kernel\.sum' must be float32")
    omniadam.load(path, new := Momentum(0.1, use_ema=True))
    with lacking:
        new.apply(grads(0, mine), mine)
    assert not new.built
    with lacking:
        new.build(mine)
    with lacking:
        train(new, mine, 0, 1)
    assert values(mine) == values(held)


# --- what does not fit ---


def saved(path: Path, names: Mapping[str, str] | None = None, **settings: Any) -> Adam:
    held = {(names or {}).get(name, name): array for name, array in arrays().items()}
    opt = built(held, **settings)
    opt.apply([np.full_like(v, 0.5) for v in held.values()])
    omniadam.save(opt, path)
    return opt


def refused(path: Path, opt: Adam, message: str, **how: Any) -> str:
    before = [weight.tobytes() for weight in opt.get_weights()]
    with pytest.raises(ValueError, match=message) as info:
        omniadam.load(path, opt, **how)
    assert [weight.tobytes() for weight in opt.get_weights()] == before
    return str(info.value)


def test_another_order_is_the_same_state(path: Path) -> None:
    """Of two variables of one shape, too, which by their order would be each other's."""
    held = {"a": np.ones(3), "b": np.full(3, 2.0)}
    opt = built(held)
    opt.apply([np.ones(3), np.full(3, -5.0)])
    omniadam.save(opt, path)
    omniadam.load(path, other := built({"b": held["b"].copy(), "a": held["a"].copy()}))
    assert other.named_variables()["a_momentum"].tolist() == opt.variables[2].tolist()
    assert omniadam.state_hash(other) == omniadam.state_hash(opt)


def test_a_renamed_an_added_and_a_removed_variable(path: Path) -> None:
    saved(path, {"scale": "gain"})
    new = built(arrays())
    refused(path, new, "lacks: 'scale'. The optimizer has no: 'gain'")
    left = omniadam.load(path, new, strict=False)
    assert left == (("'scale'",), ("'gain'",), ()) and bool(left)
    assert new.iterations == 1 and new.named_variables()["dense_kernel_momentum"].all()
    assert not new.named_variables()["scale_momentum"].any()
    refused(path, built({"gain": np.ones((), np.float32)}), "has no: 'dense/kernel', 'dense/bias'")
    refused(path, built(arrays() | {"gain": np.ones((), np.float32)}), "lacks: 'scale'\\. [^'],?")


def test_another_shape_and_another_dtype(path: Path) -> None:
    saved(path)
    wrong = arrays() | {"scale": np.ones(2, np.float32), "dense/bias": np.ones(4)}
    message = refused(path, built(wrong), "does not fit")
    for part in (
        "momentum of 'scale': float32 of shape () in the file, float32 of shape (2,) in the opt",
        "velocity of 'dense/bias': float32 of shape (4,) in the file, float64 of shape (4,) in",
    ):
        assert part in message


@pytest.mark.parametrize(
    "settings",
    [
        {"amsgrad": True},
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
        {"epsilon_hat": False},
    ],
    ids=str,
)
def test_settings_that_decide_what_state_means_must_agree(
    settings: dict[str, Any], path: Path
) -> None:
    (name,) = settings
    saved(path)
    refused(path, built(arrays(), **settings), f"`{name}` is .* in the file, .* in the optimizer")
    saved(path, **settings)
    refused(path, built(arrays()), f"`{name}`", strict=False)
    with pytest.raises(ValueError, match=f"`{name}`"):
        omniadam.load(path, new := Adam())
    assert new.iterations == 0


def test_other_settings_stay_and_are_named_in_one_warning(path: Path) -> None:
    saved(path, learning_rate=0.25, beta_1=0.8, weight_decay=0.5)
    for new in (built(arrays(), epsilon=1e-3), Adam(epsilon=1e-3)):
        with pytest.warns(UserWarning, match="settings stay") as caught:
            omniadam.load(path, new)
        (warning,) = caught
        for name in ("beta_1", "weight_decay", "epsilon"):
            assert f"`{name}` is " in str(warning.message)
        assert "learning_rate" not in str(warning.message) and warning.filename == __file__
        assert (new.learning_rate, new.beta_1, new.weight_decay) == (0.25, 0.9, None)
    schedule = schedules.ExponentialDecay(0.1, 10, 0.5)
    with pytest.warns(UserWarning, match="`learning_rate` is 0.25 in the file"):
        omniadam.load(path, built(arrays(), learning_rate=schedule, beta_1=0.8, weight_decay=0.5))


def test_generations_do_not_mix(path: Path) -> None:
    opt = saved(path)
    found = json.loads(_metadata(path)["settings"])
    assert found["learning_rate"] == 0.001
    from omniadam.saving import file

    read = file.read(path)
    file.write(path, read.snapshot.__class__(**{**vars(read.snapshot), "generation": "torch"}))
    refused(path, opt, "of torch.*omniadam convert --as omniadam.Adam", strict=False)


def test_names_that_a_library_made_up(path: Path) -> None:
    import tensorflow as tf

    made = {
        "numpy": lambda: [np.ones(3), np.ones(3)],
        "tensorflow": lambda: [tf.Variable(np.ones(3)), tf.Variable(np.ones(3))],
        "layers": lambda: [tf.Variable(np.ones(3), name=f"dense_{i}/kernel") for i in (3, 4)],
    }
    import keras  # noqa: F401 - whose layers are called so

    for make in made.values():
        opt = Adam()
        opt.build(variables := make())
        opt.apply([np.ones(3), np.full(3, 2.0)], variables)
        with pytest.warns(UserWarning, match=r"by='position'") as caught:
            omniadam.save(opt, path)
        assert caught[0].filename == __file__
        other = Adam()
        other.build(make())
        refused(path, other, "have no names by which")
        omniadam.load(path, other, by="position")
        assert [w.tobytes() for w in other.get_weights()] == [
            w.tobytes() for w in opt.get_weights()
        ]
        with pytest.raises(ValueError, match="have no names"):
            omniadam.from_file(path)
        again = omniadam.from_file(path, by="position")
        again.build(make())
        assert omniadam.state_hash(again) == omniadam.state_hash(opt)
    given = [tf.Variable(np.ones(3), name=name) for name in ("encoder/kernel", "encoder/bias")]
    opt = Adam()
    opt.build(given)
    omniadam.save(opt, path)
    omniadam.load(path, opt)
    refused(path, built({"a": np.ones(3)}), "lacks: 'encoder/bias'|has no", by="position")
    with pytest.raises(ValueError, match="`by` must be 'name' or 'position'"):
        omniadam.load(path, opt, by="order")


def test_a_callable_is_refused_by_name(path: Path) -> None:
    for name in ("learning_rate", "beta_1"):
        opt = built(arrays(), **{name: lambda: 0.5})
        with pytest.raises(ValueError, match=f"`{name}` is"):
            omniadam.save(opt, path)
        assert not path.exists()


def test_what_is_no_optimizer(path: Path) -> None:
    for wrong in (3, "adam", {"lr": 0.1}, np.ones):
        with pytest.raises(TypeError, match=r"Received: \w+\.\w+"):
            omniadam.save(wrong, path)
    saved(path)
    with pytest.raises(TypeError, match="one of them"):
        omniadam.load(path)


# --- files ---


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as opened:
        return dict(opened.metadata())


def test_the_real_library_reads_the_file(path: Path) -> None:
    from safetensors.numpy import load_file

    opt = saved(path, amsgrad=True, use_ema=True)
    found = load_file(path)
    for name in SHAPES:
        for word in ("momentum", "velocity", "velocity_hat", "average"):
            mine = opt.named_variables()[f"{name.replace('/', '_')}_{word}"]
            assert np.array_equal(found[f"{name}.{word}"], mine)
    assert found["iteration"] == 1 and found["iteration"].dtype == np.int64
    digests = found["omniadam.digests"]
    assert digests.shape == (64,) and digests[:32].tobytes().hex() == omniadam.state_hash(opt)
    assert _metadata(path)["class"] == "omniadam.Adam"
    schedule = schedules.CosineDecay(0.1, 100)
    again = saved(path, learning_rate=schedule)
    assert omniadam.from_file(path).get_config() == again.get_config()
    assert type(omniadam.from_file(path)) is Adam
    omniadam.save(AdamW(), path)
    assert type(omniadam.from_file(path)) is AdamW


def test_the_state_is_of_one_step_while_others_are_made(path: Path) -> None:
    held = {"w": np.zeros(50_000, np.float32)}
    opt = built(held)
    done = threading.Event()

    def steps() -> None:
        while not done.is_set():
            opt.apply([np.full(50_000, opt.iterations + 1.0, np.float32)])

    worker = threading.Thread(target=steps)
    worker.start()
    try:
        for _ in range(20):
            omniadam.save(opt, path)
            again = omniadam.from_file(path)
            again.build({"w": np.zeros(50_000, np.float32)})
            momentum = again.get_weights()[2]
            # The momentum tells the number of steps that it is of.
            expected = np.float32(0)
            for step in range(1, again.iterations + 1):
                expected += (np.float32(step) - expected) * np.float32(1 - 0.9)
            assert np.allclose(momentum, expected, rtol=1e-4)
    finally:
        done.set()
        worker.join()


def test_a_file_is_read_when_it_is_built_though_another_took_its_place(path: Path) -> None:
    first = saved(path)
    waiting = omniadam.from_file(path)
    expected = omniadam.state_hash(first)
    omniadam.save(waiting, other := path.with_name("other.safetensors"))
    saved(path, learning_rate=0.5)
    train(second := built(held := arrays()), held, 0, 5)
    omniadam.save(second, path)
    waiting.build(arrays())
    assert omniadam.state_hash(waiting) == expected
    again = omniadam.from_file(other)
    again.build(arrays())
    assert omniadam.state_hash(again) == expected


def test_memory_is_one_tensor() -> None:
    """Of save, of load, and of from_file: the largest beside what the optimizer has itself."""
    code = """
import resource, sys, tempfile, numpy as np, omniadam, os
os.environ["OMNIADAM_KERNEL"] = "numpy"
count, size = 12, 1 << 21  # of 8 MiB
held = {str(i): np.zeros(size, np.float32) for i in range(count)}
opt = omniadam.Adam()
opt.build(held)
for slot in opt.variables[2:]:
    slot[...] = 1.0
other = omniadam.Adam()
other.build(held)
for slot in other.variables[2:]:
    slot[...] = 2.0
path = tempfile.mkdtemp() + "/adam.safetensors"
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = omniadam.Adam()
small.build({"a": np.zeros(3)})
omniadam.save(small, path)
omniadam.load(path, small)
before = peak()
omniadam.save(opt, path)
omniadam.load(path, other)
print((peak() - before) / 1024)
assert omniadam.state_hash(other) == omniadam.state_hash(opt)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    # A tensor has 8 MiB, the state 192: two parts of a file that is read have 4 each.
    assert float(done.stdout) < 3 * 8, done.stdout
    assert re.match(r"\d", done.stdout)


# --- variables that came later ---


@pytest.mark.parametrize("library", LIBRARIES)
def test_extended_optimizers_go_on(library: str, path: Path) -> None:
    """Whatever the order of the variables: loaded into one that is extended likewise, and before
    the build, by a file alone and with settings of one's own.
    """
    make = LIBRARIES[library]
    held = make()
    opt = Adam(amsgrad=True, use_ema=True)
    order = ["dense/bias", "dense/kernel", "none", "scale"]
    first, second, third = order[:1], order[1:3], order[3:]
    opt.build({name: held[name] for name in first})
    opt.apply(grads(0, held_first := {n: held[n] for n in first}), list(held_first.values()))
    opt.extend({name: held[name] for name in second})
    some = {name: held[name] for name in first + second}
    train(opt, some, 1, 3)
    opt.extend({name: held[name] for name in third})
    train(opt, held, 3, 5)
    omniadam.save(opt, path)
    stopped = {name: value(variable) for name, variable in held.items()}
    train(opt, held, 5, 8)
    early, alike = Adam(amsgrad=True, use_ema=True), Adam(amsgrad=True, use_ema=True)
    omniadam.load(path, early)
    others = make()
    alike.build({name: others[name] for name in first})
    alike.extend({name: others[name] for name in second})
    alike.extend({name: others[name] for name in third})
    omniadam.load(path, alike)
    for again, own in (
        (omniadam.from_file(path), make()),
        (early, dict(reversed(make().items()))),
        (alike, others),
    ):
        if again is not alike:
            again.build(own)
        put(own, {n: stopped[n] if library != "torch" else _tensor(stopped[n]) for n in own})
        train(again, own, 5, 8)
        assert values(own) == values(held)
        assert omniadam.state_hash(again) == omniadam.state_hash(opt)
    refused(path, built(make(), amsgrad=True, use_ema=True), "added by extension 1 in the file")


def test_extended_ones_by_position(path: Path) -> None:
    opt = Adam()
    opt.build([a := np.ones(3)])
    opt.apply([a])
    opt.extend([b := np.ones(2)])
    opt.apply([a, b], [a, b])
    with pytest.warns(UserWarning, match="by='position'"):
        omniadam.save(opt, path)
    again = omniadam.from_file(path, by="position")
    again.build([a.copy(), b.copy()])
    assert omniadam.state_hash(again) == omniadam.state_hash(opt)


def test_extensions_are_told_by_their_variables(path: Path) -> None:
    """Not by their numbers, where some of them are left out."""
    w, a, b = np.ones(3), np.ones(2), np.ones(2)
    opt = Adam(0.1)
    opt.build({"w": w})
    for new in ({}, {"a": a}, {"b": b}):
        if new:
            opt.extend(new)
        held = dict(zip(("w", "a", "b"), (w, a, b), strict=True))
        known = {entry.name: held[entry.name] for entry in opt._state.entries}
        opt.apply([np.ones_like(v) for v in known.values()], list(known.values()))
    omniadam.save(opt, path)
    counts = [int(v) for name, v in opt.named_variables().items() if "extension" in name]
    assert counts == [1, 2]
    early = Adam(0.1)
    omniadam.load(path, early, strict=False)
    with pytest.warns(UserWarning, match="left out in part: .*'a'"):
        early.build({"w": w, "b": b})
    late = Adam(0.1)
    late.build({"w": w})
    late.extend({"b": b})
    assert omniadam.load(path, late, strict=False) == ((), ("'a'",), ())
    for each in (early, late):
        named = each.named_variables()
        assert int(named["extension"]) == 2 and each.iterations == 3
        assert np.array_equal(named["b_momentum"], opt.named_variables()["b_momentum"])
    other = Adam(0.1)
    other.build({"w": w, "a": a})
    message = refused(path, other, "does not fit")
    assert "by extension 1 in the file" in message and "from_file" in message


def test_a_file_that_is_written_to_after_it_was_opened(path: Path) -> None:
    opt = saved(path)
    waiting = omniadam.from_file(path)
    opt.apply([np.full_like(v, 0.25) for v in arrays().values()])
    omniadam.save(opt, other := path.with_name("other"))
    path.write_bytes(other.read_bytes())  # in place, as `cp` does
    with pytest.raises(ValueError, match="was written to since it was opened"):
        waiting.build(arrays())
    assert not waiting.built


def test_what_is_excluded_from_decay_is_compared(path: Path) -> None:
    opt = AdamW(0.1)
    opt.exclude_from_weight_decay(var_names=["bias"])
    opt.build(arrays())
    omniadam.save(opt, path)
    plain = AdamW(0.1)
    plain.build(arrays())
    with pytest.warns(UserWarning, match="`exclude_from_weight_decay` is .*bias.* in the file"):
        omniadam.load(path, plain)
    with pytest.warns(UserWarning, match="`learning_rate` is 0.1 in the file"):
        omniadam.load(path, built(arrays(), learning_rate=lambda: 0.5, weight_decay=0.004))


def test_settings_that_change_between_load_and_build(path: Path) -> None:
    saved(path, gradient_accumulation_steps=2)
    new = Adam(gradient_accumulation_steps=2)
    omniadam.load(path, new)
    new.gradient_accumulation_steps = 3
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 2 in the file, 3 in"):
        new.build(arrays())
    assert not new.built
