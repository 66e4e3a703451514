"""`save`, `load` and `from_file` of `omniadam.compat`, on NumPy and on TensorFlow."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from omniadam import schedules
from omniadam.compat import contrib_keras, optimizer_v2
from omniadam.saving import file

V2, TF1 = optimizer_v2.Adam, contrib_keras.Adam
# Of NumPy arrays, which have no names, there are only positions.
BY = pytest.mark.filterwarnings("ignore:Variables without names of their user")


@pytest.fixture(autouse=True)
def eager_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On TensorFlow not by XLA, which takes a second for each optimizer."""
    marker = request.node.get_closest_marker("needs")
    if marker is not None and "tensorflow" in marker.args:
        from omniadam.fast.tensorflow import FastTensorFlow

        monkeypatch.setattr(FastTensorFlow, "jit_compile", False)


def arrays() -> list[Any]:
    return [np.array([1.0, -2.0], np.float32), np.array([[3.0, 1.0]], np.float32)]


def variables(names: str = "ab", values: Sequence[Any] = ()) -> list[Any]:
    import tensorflow as tf

    held = dict(zip("ab", arrays(), strict=True)) | {"c": np.ones(3, np.float32)}
    return [
        tf.Variable(v, name=n)
        for n, v in zip(names, values or [held[n] for n in names], strict=True)
    ]


def host(values: Sequence[Any]) -> list[Any]:
    return [np.array(v if isinstance(v, np.ndarray) else v.numpy()) for v in values]


def step(opt: Any, params: list[Any], count: int = 1) -> Any:
    """Gradients that depend on nothing but the count."""
    for _ in range(count):
        t = int(np.asarray(opt.iterations)) + 1
        grads = [
            np.full(tuple(w.shape), (-1.0) ** t * (i + t), "float32") for i, w in enumerate(params)
        ]
        if isinstance(opt, V2):
            opt.apply_gradients(zip(grads, params, strict=True))
        else:
            opt._apply(list(zip(grads, params, strict=True)), None)
    return opt


def same(a: Sequence[Any], b: Sequence[Any]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def loaded(path: Path, opt: Any, by: str) -> Any:
    assert not omniadam.load(path, opt, by=by)
    return opt


WAYS: dict[str, Callable[[Path, Any, list[Any], str], Any]] = {
    "from_file": lambda path, opt, params, by: omniadam.from_file(path, by=by),
    "load": lambda path, opt, params, by: loaded(path, opt, by),
    "load when built": lambda path, opt, params, by: (opt._build(params), loaded(path, opt, by))[1],
    "pickle": lambda path, opt, params, by: pickle.loads(pickle.dumps(loaded(path, opt, by))),
    "deepcopy": lambda path, opt, params, by: copy.deepcopy(loaded(path, opt, by)),
}
SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (V2, {"amsgrad": True, "decay": 0.125, "clipnorm": 1.0, "clipvalue": 2.0}),
    (V2, {"beta_1": 0.75, "beta_2": 0.875, "epsilon": 1e-3, "global_clipnorm": 1.0}),
    (TF1, {"decay": 0.125, "clipnorm": 1.0, "clipvalue": 2.0}),
]


@BY
@pytest.mark.needs("tensorflow")
@pytest.mark.parametrize("library", ["numpy", "tensorflow"])
def test_a_run_that_stops_and_goes_on_is_one_that_never_stopped(
    library: str, tmp_path: Path
) -> None:
    path, by = tmp_path / "adam.safetensors", "position" if library == "numpy" else "name"
    for kind, settings in SETTINGS:
        params = arrays() if library == "numpy" else variables()
        opt = step(kind(0.25, **settings), params, 3)
        omniadam.save(opt, path)
        found = file.read(path).snapshot
        assert found.kind == f"{kind.__module__}.Adam"
        assert found.generation == ("tensorflow 2.0" if kind is V2 else "tensorflow 1.1")
        assert set(found.variables[0].slots) == {"momentum", "velocity"} | (
            {"velocity_hat"} if "amsgrad" in settings else set()
        )
        digest, kept, weights = omniadam.state_hash(opt), host(params), opt.get_weights()
        step(opt, params, 2)
        for way in (*WAYS, "set_weights"):
            others = [w.copy() for w in kept] if library == "numpy" else variables(values=kept)
            if way == "set_weights":
                new = kind(0.25, **settings)
                new.set_weights(weights)
                same(new.get_weights(), weights)
            else:
                new = WAYS[way](path, kind(0.5, **settings), others, by)
                assert omniadam.state_hash(new) == digest
            assert type(new).__mro__[0].__name__ == "Adam" and int(np.asarray(new.iterations)) == 3
            assert float(np.asarray(new.lr)) == 0.25
            step(new, others, 2)
            same(host(others), host(params))
            same(new.get_weights(), opt.get_weights())
            assert omniadam.state_hash(new) == omniadam.state_hash(opt)


@BY
def test_weights_that_are_set_before_the_first_step() -> None:
    opt = step(V2(0.25), arrays(), 2)
    want = opt.get_weights()
    for again in (lambda opt: opt, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))):
        # All vhat of a V1 list are dropped.
        for given in (want, [*want, *want[3:]]):
            new = V2(0.25)
            new.set_weights(given)
            new = again(new)
            assert int(np.asarray(new.iterations)) == 2
            same(new.get_weights(), given)
            count = new.iterations  # of TensorFlow, where that is imported
            count.assign(5) if hasattr(count, "assign") else count.fill(5)
            step(new, params := arrays(), 1)
            assert int(np.asarray(new.iterations)) == 6
            twin = V2(0.25)
            twin._build(twins := arrays())
            twin.set_weights([np.array(5), *want[1:]])
            step(twin, twins)
            same([*params, *new.get_weights()], [*twins, *twin.get_weights()])
    for wrong, message in (
        (want[:-1], r"those of the variables that it has: 1 array, and 2 for each of.*Received 4"),
        ([*want, want[1]], "Received 6"),
        (
            [want[0], *want[:0:-1]],
            r"'variable_momentum' must be set to real numbers of shape \(2,\)",
        ),
    ):
        new, params = V2(0.25), arrays()
        new.set_weights(wrong)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                step(new, params)
            same([*params], arrays())
            assert not new._engine.built and int(np.asarray(new.iterations)) == 2
        with pytest.raises(ValueError, match="waits for its first step"):
            omniadam.migrate(new)
        new.set_weights(want)
        step(new, params)
        assert int(np.asarray(new.iterations)) == 3
    for bad in ([-1, *want[1:]], [0.5], [1, "a"]):
        with pytest.raises(ValueError, match=r"whole number|weights must hold real"):
            V2().set_weights(bad)
    assert V2().get_weights() == []
    unnamed = V2()
    unnamed.set_weights(want)
    with pytest.raises(ValueError, match="a file needs their names"):
        omniadam.state_hash(unnamed)


@pytest.mark.needs("tensorflow")
def test_by_name_whatever_the_order(tmp_path: Path) -> None:
    import tensorflow as tf

    path = tmp_path / "adam.safetensors"
    pair = [tf.Variable([float(i), 1.0], name=n) for i, n in enumerate("ab")]
    opt = step(V2(0.25), pair, 2)
    omniadam.save(opt, path)
    a, b = (opt.get_slot(v, "m").numpy() for v in pair)
    assert not np.array_equal(a, b)
    for is_built in (False, True):
        swapped = [tf.Variable([0.0, 1.0], name=n) for n in "ba"]
        new = V2(0.5)
        if is_built:
            new._build(swapped)
        omniadam.load(path, new)
        new._build(swapped)
        same([new.get_slot(v, "m").numpy() for v in swapped], [b, a])
        # The order of weights is its own, of creation.
        same(new.get_weights()[1:3], [b, a])


@pytest.mark.needs("tensorflow")
def test_what_does_not_fit_is_refused_with_the_full_list(tmp_path: Path) -> None:
    path = tmp_path / "adam.safetensors"
    omniadam.save(step(V2(0.25), variables("ab")), path)
    double = [np.asarray(v, np.float64) for v in arrays()]
    for params, message in (
        (variables("abc"), r"nothing was loaded\. The file lacks: 'c'\. Variables"),
        (variables("a"), r"The optimizer has no: 'b'\. Variables are told by their names"),
        (variables("ac"), r"The file lacks: 'c'\. The optimizer has no: 'b'"),
        (
            variables("ab", arrays()[::-1]),
            r"Different: momentum of 'a': float32 of shape \(2,\) in the file, float32 of shape "
            r"\(1, 2\) in the optimizer, velocity of 'a'.*momentum of 'b'",
        ),
        (variables("ab", double), r"Different: momentum of 'a': float32 .* float64 of shape"),
    ):
        opt = V2(0.5)
        opt._build(params)
        before = opt.get_weights()
        with pytest.raises(ValueError, match=message):
            omniadam.load(path, opt)
        same(opt.get_weights(), before)
        for opt in (loaded(path, V2(0.5), "name"), omniadam.from_file(path)):
            kept = host(params)
            for _ in range(2):
                with pytest.raises(ValueError, match=message):
                    opt.apply_gradients([(np.ones(v.shape), v) for v in params])
                same(host(params), kept)
                assert not opt._engine.built and int(opt.iterations.numpy()) == 1


@pytest.mark.needs("tensorflow")
def test_variables_that_come_later_take_what_waits(tmp_path: Path) -> None:
    path = tmp_path / "adam.safetensors"
    params = variables("ab")
    opt = step(V2(0.25), params)
    opt.add_slot(params[0], "extra", np.full(2, 7.0))
    omniadam.save(opt, path)
    digest = omniadam.state_hash(opt)
    a, b = variables("ab")
    new = V2(0.5)
    omniadam.load(path, new, strict=False)
    new._build([a])
    assert new.get_slot_names() == ["m", "v"] and omniadam.state_hash(new) == digest
    step(new, [a])
    again = pickle.loads(pickle.dumps(new))  # before they come
    again._build(variables("a"))
    assert omniadam.state_hash(again) == omniadam.state_hash(new) != digest
    new = V2(0.5)
    omniadam.load(path, new, strict=False)
    new._build([a])
    omniadam.save(new, path)
    assert file.read(path).state_hash == digest
    np.testing.assert_array_equal(new.add_slot(a, "extra").numpy(), [7.0, 7.0])
    new._build([b])
    same([new.get_slot(b, "v").numpy()], [opt.get_slot(params[1], "v").numpy()])
    assert omniadam.state_hash(new) == digest
    again = omniadam.from_file(path)
    again._build(fresh := variables("ab"))
    assert omniadam.state_hash(again) == digest and len(again.get_weights()) == 5
    np.testing.assert_array_equal(again.add_slot(fresh[0], "extra").numpy(), [7.0, 7.0])
    assert again.add_slot(fresh[1], "extra").numpy().sum() == 0  # the file has none
    # A moment that began otherwise is one slot.
    other = V2()
    other.add_slot(fresh[0], "m", "ones")
    omniadam.save(other, path)
    assert set(file.read(path).snapshot.variables[0].slots) == {"momentum", "velocity"}


@BY
@pytest.mark.needs("tensorflow")
def test_settings(tmp_path: Path) -> None:
    import tensorflow as tf

    path = tmp_path / "adam.safetensors"
    for kind, name in ((V2, "learning_rate"), (TF1, "lr")):
        params = variables()
        opt = step(kind(0.25, decay=0.5, beta_1=0.75), params)
        assert hasattr(opt.lr, "numpy")  # a variable of TensorFlow
        omniadam.save(opt, path)
        assert file.read(path).snapshot.settings[name] == 0.25
        for new in (kind(0.5), step(kind(0.5), params)):
            with pytest.warns(UserWarning, match=r"(?=.*`decay` is 0\.5)(?=.*`beta_1` is 0\.75)"):
                omniadam.load(path, new)
            assert float(np.asarray(new.lr)) == 0.25 and float(np.asarray(new.decay)) == 0.0
            new.lr = 0.125  # what is set after a load
            step(new, params)
            assert float(np.asarray(new.lr)) == 0.125 and int(np.asarray(new.iterations)) == 2
        for value in (lambda: 0.5, lambda: tf.constant(0.5)):
            with pytest.raises(ValueError, match="cannot hold a callable, which `beta_1` is"):
                omniadam.save(kind(0.5, beta_1=value), path)
        held = tf.Variable(0.5)
        omniadam.save(kind(held), path)  # a number that it is now
        assert file.read(path).snapshot.settings[name] == 0.5
        new = kind(held)
        omniadam.load(path, new)
        assert new.lr is held
    scheduled = V2(schedules.CosineDecay(0.5, 9))
    omniadam.save(scheduled, path)
    assert omniadam.from_file(path).get_config() == scheduled.get_config()
    for given, own, message in (
        (V2(), TF1(), r"of tensorflow 2.0, .* is of tensorflow 1.1.*omniadam convert --as"),
        (V2(), omniadam.Adam(), r"of tensorflow 2.0, .* is of keras 3"),
        (TF1(), V2(), r"of tensorflow 1.1, .* is of tensorflow 2.0"),
        (V2(amsgrad=True), V2(), "`amsgrad` is True in the file, False in the optimizer"),
    ):
        omniadam.save(given, path)
        with pytest.raises(ValueError, match=message):
            omniadam.load(path, own)


@pytest.mark.needs("keras", "tensorflow")
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_of_a_checkpoint_and_a_file_the_later_one_wins(tmp_path: Path) -> None:
    """Before the build, and what is set after either stays set."""
    import tensorflow as tf

    for kind in (omniadam.Adam, V2):
        params = variables()
        opt = kind(0.25)
        opt.apply_gradients([(np.ones(v.shape), v) for v in params])

        def checkpoint(opt: Any, params: list[Any]) -> Any:
            named = {"params": params} if isinstance(opt, V2) else {}
            return tf.train.Checkpoint(opt=opt, **named)

        def slots(opt: Any) -> list[Any]:
            weights: list[Any] = opt.get_weights()
            return weights[-4:]

        prefix = checkpoint(opt, params).save(str(tmp_path / "checkpoint"))
        one = slots(opt)
        opt.apply_gradients([(np.ones(v.shape), v) for v in params])
        opt.learning_rate = 0.125
        two, weights, path = slots(opt), opt.get_weights(), tmp_path / "adam.safetensors"
        omniadam.save(opt, path)
        for order, want, rate in (
            ("restore", one, 0.25),
            ("set restore", one, 0.25),
            ("load restore", one, 0.25),
            ("restore set", two, 0.25 if kind is V2 else 0.125),
            ("restore load", two, 0.125),
            ("restore rate", one, 0.75),
            ("load rate", two, 0.75),
        ):
            if kind is V2 and order == "restore set":
                continue  # below
            others, new = variables(), kind(0.5)
            for part in order.split():
                if part == "restore":
                    checkpoint(new, others).restore(prefix)
                elif part == "set":
                    new.set_weights(weights)
                elif part == "load":
                    omniadam.load(path, new)
                else:
                    new.learning_rate = 0.75
            (new._build if kind is V2 else new.build)(others)
            same(slots(new), want)
            assert int(np.asarray(new.iterations)) == (1 if want is one else 2), order
            assert float(np.asarray(new.learning_rate)) == rate, order
        if kind is omniadam.Adam:
            waiting = kind()
            checkpoint(waiting, []).restore(prefix)
            with pytest.raises(ValueError, match=r"a file needs their names"):
                omniadam.save(waiting, path)
    others, new = variables(), V2()
    checkpoint(new, others).restore(prefix)
    with pytest.raises(ValueError, match="which has no order of variables"):
        new.set_weights(weights)
