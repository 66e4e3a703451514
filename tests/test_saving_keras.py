"""`save`, `load` and `from_file` of `omniadam.keras`, on Keras's NumPy backend; the others, and
`fit`, are in keras_optimizers.py.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from cases import CASES, SMALL_SHAPES, combined, gradients, variables
from omniadam import schedules
from omniadam.saving import file, names

keras = pytest.importorskip("keras")

from omniadam.keras import Adam, AdamW  # noqa: E402

# Keras's arrays on NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
L = keras.layers


def made(values: list[Any], dtype: Any = None) -> list[Any]:
    return [keras.Variable(v, dtype=dtype, name=f"w{i}") for i, v in enumerate(values)]


def state(opt: Any) -> list[Any]:
    return [np.array(v.value) for v in opt.variables]


def same(a: list[Any], b: list[Any]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def loaded(path: Path, opt: Any) -> Any:
    assert not omniadam.load(path, opt)
    return opt


def built(opt: Any, params: list[Any]) -> Any:
    opt.build(params)
    return opt


# Each makes an optimizer that has the state of a file: of the path, one with the settings of the
# file but for the rate, and the variables.
WAYS: dict[str, Callable[[Path, Any, list[Any]], Any]] = {
    "from_file": lambda path, opt, params: omniadam.from_file(path),
    "load": lambda path, opt, params: loaded(path, opt),
    "load when built": lambda path, opt, params: loaded(path, built(opt, params)),
    "pickle": lambda path, opt, params: pickle.loads(pickle.dumps(loaded(path, opt))),
    "deepcopy": lambda path, opt, params: copy.deepcopy(loaded(path, opt)),
}


def test_a_run_that_stops_and_goes_on_is_one_that_never_stopped(tmp_path: Path) -> None:
    path = tmp_path / "adam.safetensors"
    settings = [["amsgrad", "clipnorm"], ["clipvalue", "excluded", "use_ema"]]
    for number, case_names in enumerate([*settings, list(CASES)[-1].split("+")]):
        case = combined(case_names)
        assert case is not None
        params = made(variables(shapes=SMALL_SHAPES))
        opt = Adam(**case.settings_for(schedules))
        opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
        steps = [gradients(i, SMALL_SHAPES) for i in range(5)]
        for grads in steps[:3]:  # of accumulation, the middle
            opt.apply(grads, params)
        omniadam.save(opt, path)
        kept, digest = [v.numpy().copy() for v in params], omniadam.state_hash(opt)
        assert file.read(path).state_hash == digest
        for grads in steps[3:]:
            opt.apply(grads, params)
        for way in WAYS if number == 2 else ("from_file", "load when built"):
            others = made(kept)
            new = Adam(**case.settings_for(schedules))
            new.exclude_from_weight_decay(var_names=[f"^w{i}$" for i in case.excluded])
            new = WAYS[way](path, new, others)
            assert omniadam.state_hash(new) == digest
            for grads in steps[3:]:
                new.apply(grads, others)
            same([v.numpy() for v in others], [v.numpy() for v in params])
            same(state(new), state(opt))


def test_files_of_keras_and_of_omniadam_go_into_each_other(tmp_path: Path) -> None:
    """Trained in Keras, on in NumPy, on in Keras."""
    path = tmp_path / "adam.safetensors"
    settings: Any = {"amsgrad": True, "use_ema": True, "weight_decay": 0.01}
    params = made(variables(shapes=SMALL_SHAPES))
    steps = [gradients(i, SMALL_SHAPES) for i in range(4)]
    opt = Adam(0.125, **settings)
    for grads in steps[:2]:
        opt.apply(grads, params)
    omniadam.save(opt, path)
    arrays = {f"w{i}": v.numpy().copy() for i, v in enumerate(params)}
    other = omniadam.Adam(0.5, **settings)
    omniadam.load(path, other)
    for grads in steps[2:3]:
        other.apply(grads, arrays)
    for grads in steps[2:3]:
        opt.apply(grads, params)
    assert other.iterations == 3 and other.learning_rate == 0.125
    assert omniadam.state_hash(other) == omniadam.state_hash(opt)
    omniadam.save(other, path)
    last = made(list(arrays.values()))
    again = loaded(path, built(Adam(0.5, **settings), last))
    again.apply(steps[3], last)
    opt.apply(steps[3], params)
    same([v.numpy() for v in last], [v.numpy() for v in params])
    same(state(again), state(opt))
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 9)
    for kind, rate in ((Adam, schedule), (omniadam.Adam, schedules.CosineDecay(0.5, 9))):
        omniadam.save(kind(rate), path)
        for each in (Adam(schedule), omniadam.Adam(schedules.CosineDecay(0.5, 9))):
            omniadam.load(path, each)  # without a warning
        assert omniadam.from_file(path).get_config() == kind(rate).get_config() | {
            "name": omniadam.from_file(path).name
        }


# --- names ---------------------------------------------------------------------------------------


def model(*layers: tuple[str | None, int], dtype: Any = None, **settings: Any) -> list[Any]:
    made = keras.Sequential([L.Dense(n, name=name, dtype=dtype) for name, n in layers], **settings)
    made.build((None, 3))
    found: list[Any] = made.trainable_variables
    return found


def trained(params: list[Any], **settings: Any) -> Any:
    opt = Adam(0.25, name="adam", **settings)
    opt.apply([np.full(v.shape, i + 1.0, "float32") for i, v in enumerate(params)], params)
    return opt


def test_names_are_those_that_the_user_gave(tmp_path: Path) -> None:
    class Block(L.Layer):  # type: ignore[misc]
        pass

    class OurModel(keras.Model):  # type: ignore[misc]
        pass

    for given, want in {
        "dense_3/kernel": None,
        "sequential/dense/kernel": None,
        "encoder/dense/kernel": None,
        "block/kernel": None,
        "sequential_2/encoder/kernel": "encoder/kernel",
        "our_model_1/functional/encoder/kernel": "encoder/kernel",
        "our_model/scale": "scale",
        "variable_4": None,
        "Variable:0": None,
        "Variable_7:0": None,
        "w:0": "w",
        "model/encoder_1/kernel:0": "encoder_1/kernel",
        "w0": "w0",
    }.items():
        (found,) = names.in_files([(given, False)])
        assert found == ((given, False) if want is None else (want, True)), given
    assert names.in_files([("dense/kernel", True)]) == [("dense/kernel", True)]
    # Nothing tells these apart but what was made up.
    pair = [("sequential/a/kernel", False), ("sequential_1/a/kernel", False)]
    assert names.in_files(pair) == pair
    assert names.in_files([("w", False), ("w", False)]) == [("w", False)] * 2
    del Block, OurModel


def test_another_order_and_another_model_around(tmp_path: Path) -> None:
    """Same shapes: nothing but the names tells which is which."""
    path = tmp_path / "adam.safetensors"
    opt = trained(model(("a", 3), ("b", 3)))
    omniadam.save(opt, path)
    want = {v.name: np.array(v.value) for v in opt.variables}
    for number in range(4):
        around = {"name": "net"} if number % 2 else {}
        params = model(("b", 3), ("a", 3), **around)
        if around:  # of a model that is loaded Keras leaves the name out
            omniadam.save(trained(model(("a", 3), ("b", 3), name="net")), path)
            params = model(("b", 3), ("a", 3))
            for v in params:
                v._path = v.path.partition("/")[2]
        other = Adam(0.5)
        if number < 2:
            other.build(params)
        omniadam.load(path, other)
        other.build(params)
        for v in other.variables[2:]:
            (name,) = [n for n in want if n.endswith(re.sub(".*(?=[ab]_)", "", v.name))]
            np.testing.assert_array_equal(v.value, want[name])
    assert float(other.learning_rate) == 0.25 and int(other.iterations) == 1


def test_what_does_not_fit_is_refused_with_the_full_list(tmp_path: Path) -> None:
    path = tmp_path / "adam.safetensors"
    omniadam.save(trained(model(("a", 3), ("b", 3))), path)
    cases: list[tuple[list[Any], str]] = [
        (
            model(("a", 3), ("b", 3), ("c", 3)),
            r"nothing was loaded. The file lacks: 'c/kernel', 'c/bias'\. Variables are told",
        ),
        (model(("a", 3)), r"The optimizer has no: 'b/kernel', 'b/bias'\. Variables"),
        (
            model(("a", 3), ("z", 3)),
            r"The file lacks: 'z/kernel', 'z/bias'\. The optimizer has no: 'b/kernel', 'b/bias'",
        ),
        (
            model(("a", 3), ("b", 2)),
            r"Different: momentum of 'b/kernel': float32 of shape \(3, 3\) in the file, float32 of "
            r"shape \(3, 2\) in the optimizer, velocity of 'b/kernel'.*momentum of 'b/bias'",
        ),
        (
            model(("a", 3), ("b", 3), dtype="float64"),
            "Different: momentum of 'a/kernel': float32 .* in the file, float64 of shape",
        ),
        (model(("a", 3), (None, 3)), "of the optimizer have no names .*dense.*by='position'"),
    ]
    for params, message in cases:
        opt = built(Adam(0.5), params)
        before = state(opt)
        with pytest.raises(ValueError, match=message):
            omniadam.load(path, opt)
        same(state(opt), before)
        for opt in (loaded(path, Adam(0.5)), omniadam.from_file(path)):
            with pytest.raises(ValueError, match=message):
                opt.build(params)
            with pytest.raises(ValueError, match=message):
                opt.apply([np.ones(v.shape, "float32") for v in params], params)
            assert not opt.built and len(opt.variables) == 2 and int(opt.iterations) == 1
    # What fits, where that is meant.
    opt = built(Adam(0.5), cases[2][0])
    left = omniadam.load(path, opt, strict=False)
    assert left.missing == ("'z/kernel'", "'z/bias'")
    assert left.unexpected == ("'b/kernel'", "'b/bias'") and not left.different
    assert np.array(opt.variables[2].value).any() and not np.array(opt.variables[6].value).any()


def test_names_that_keras_made_up(tmp_path: Path) -> None:
    path = tmp_path / "adam.safetensors"
    opt = trained(model((None, 4), (None, 3)))
    with pytest.warns(UserWarning, match=r"'sequential.*dense.*by='position'"):
        omniadam.save(opt, path)
    params = model((None, 4), (None, 3))
    for other in (built(Adam(), params), Adam()):
        with pytest.raises(ValueError, match=r"of the file have no names .*by='position'"):
            omniadam.load(path, other)
        omniadam.load(path, other, by="position")
        other.build(params)
        same(state(other), state(opt))
    other = omniadam.from_file(path, by="position")
    other.build(params)
    same(state(other), state(opt))
    for other in (built(Adam(), model((None, 3), (None, 4))), Adam()):
        with pytest.raises(ValueError, match="position"):
            omniadam.load(path, other, by="position")
            other.build(model((None, 3), (None, 4)))


# --- settings ------------------------------------------------------------------------------------


def test_settings_that_differ(tmp_path: Path) -> None:
    path, params = tmp_path / "adam.safetensors", model(("a", 2))
    omniadam.save(trained(params, weight_decay=0.5, beta_1=0.5), path)
    for opt in (built(Adam(beta_1=0.75), params), Adam(beta_1=0.75)):
        with pytest.warns(
            UserWarning, match=r"`weight_decay` is 0.5 .* `beta_1` is 0.5 in the file"
        ):
            omniadam.load(path, opt)
        assert opt.beta_1 == 0.75 and opt.weight_decay is None
        assert float(opt.learning_rate) == 0.25
    for settings in ({"amsgrad": True}, {"use_ema": True}, {"gradient_accumulation_steps": 2}):
        (name,) = settings
        for opt in (built(Adam(**settings), params), Adam(**settings)):
            before = state(opt)
            with pytest.raises(ValueError, match=f"`{name}` is (False|None) in the file, "):
                omniadam.load(path, opt)
            same(state(opt), before)
    # A schedule is no state.
    opt = Adam(keras.optimizers.schedules.CosineDecay(0.5, 9), beta_1=0.5, weight_decay=0.5)
    with pytest.warns(UserWarning, match=r"`learning_rate` is 0.25 in the file, .*CosineDecay"):
        omniadam.load(path, opt)
    opt.build(params)
    assert int(opt.iterations) == 1 and float(opt.learning_rate) != 0.25
    adamw = AdamW(0.5, 0.125)
    omniadam.save(adamw, path)
    again = omniadam.from_file(path)
    assert type(again) is AdamW and again.get_config() == adamw.get_config()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "adam.safetensors"
    for settings in ({"learning_rate": lambda: 0.5}, {"beta_1": lambda: 0.5}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"cannot hold a callable, which `{name}` is"):
            omniadam.save(Adam(**settings), path)
    params = model(("a", 2))
    wrapped = keras.optimizers.LossScaleOptimizer(Adam(0.25))
    wrapped.build(params)
    for call in (omniadam.save, lambda opt, path: omniadam.load(path, opt)):
        with pytest.raises(TypeError, match="pass its `inner_optimizer`"):
            if call is not omniadam.save:
                omniadam.save(wrapped.inner_optimizer, path)
            call(wrapped, path)
    omniadam.save(trained(params), path)
    omniadam.load(path, wrapped.inner_optimizer)
    same(state(wrapped.inner_optimizer), state(trained(params)))
    assert path.exists()


# --- before the build ----------------------------------------------------------------------------


def test_weights_that_are_set_before_the_build() -> None:
    params = model(("a", 2))
    want = state(trained(params, use_ema=True))

    def by_store(opt: Any) -> None:
        opt.load_own_variables({str(i): value for i, value in enumerate(want)})

    for set_them in (lambda opt: opt.set_weights(want), by_store):
        for again in (lambda opt: opt, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))):
            opt = Adam(use_ema=True)
            set_them(opt)
            opt = again(opt)
            assert int(opt.iterations) == 1 and float(opt.learning_rate) == 0.25
            store: dict[str, Any] = {}
            opt.save_own_variables(store)
            same([store[str(i)] for i in range(len(store))], want)
            opt.learning_rate = 0.125
            opt.iterations.assign(7)
            opt.build(params)
            same(state(opt)[2:], want[2:])
            assert int(opt.iterations) == 7 and float(opt.learning_rate) == 0.125
    for wrong, message in (
        (want[:-1], "needs 8 arrays"),
        ([*want[:2], *want[:1:-1]], "must be set to real numbers of shape"),
    ):
        opt = Adam(use_ema=True)
        opt.set_weights(wrong)
        with pytest.raises(ValueError, match=f"before the build belongs to other.*{message}"):
            opt.build(params)
        assert not opt.built and len(opt.variables) == 2
        opt.set_weights(want)
        built(opt, params)
        same(state(opt), want)
        with pytest.raises(ValueError, match=message):
            opt.set_weights(wrong)
        same(state(opt), want)
    for wrong, message in (
        ([1], "needs ['iteration', 'learning_rate'] first"),
        ([-1, 0.5], "whole numbers from 0"),
        ([1, -0.5, want[2]], "`learning_rate` must be"),
        ([1, 0.5, "a"], "Number 2 of the weights"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Adam().set_weights(wrong)


def test_what_waits_is_not_lost(tmp_path: Path) -> None:
    path, params = tmp_path / "adam.safetensors", model(("a", 2))
    opt = trained(params)
    omniadam.save(opt, path)
    digest = omniadam.state_hash(opt)
    waiting = loaded(path, Adam(0.5))
    assert omniadam.state_hash(waiting) == digest
    with pytest.raises(ValueError, match=r"waits for the variables.*opt.build"):
        waiting.save_own_variables({})
    waiting.iterations.assign(4)
    waiting.learning_rate = 0.75
    omniadam.save(waiting, path)  # over the file that it waits for
    again = built(omniadam.from_file(path), params)
    waiting.build(params)
    for each in (waiting, again):
        assert int(each.iterations) == 4 and float(each.learning_rate) == 0.75
        same(state(each)[2:], state(opt)[2:])
    unnamed = Adam()
    unnamed.set_weights(state(opt))
    with pytest.raises(ValueError, match=r"a file needs their names\. Build it before you save"):
        omniadam.save(unnamed, path)
    # Keras's own way to copy is by files, and leaves out what an optimizer is not built for.
    copied = copy.deepcopy(opt)
    copied.build(params)
    same(state(copied), state(opt))


def test_state_of_a_subclass(tmp_path: Path) -> None:
    class Counting(Adam):
        def build(self, var_list: Any) -> None:
            super().build(var_list)
            if not hasattr(self, "thirds"):
                self.thirds = self.add_optimizer_variables(var_list, "third")
                self.total = self.add_variable((2,), name="total")

    path, params = tmp_path / "adam.safetensors", model(("a", 2))
    opt = built(Counting(0.25), params)
    grads = [np.ones(v.shape, "float32") for v in params]
    opt.apply(grads, params)
    for i, v in enumerate((*opt.thirds, opt.total)):
        v.assign(np.full(v.shape, i + 3.0, "float32"))
    omniadam.save(opt, path)
    found = file.read(path).snapshot
    assert "a/kernel.third" in found.tensors and "total" in found.tensors
    weights = state(opt)
    by_weights = Counting()
    by_weights.set_weights(weights)
    ways = (
        loaded(path, Counting()),
        loaded(path, built(Counting(), params)),
        omniadam.from_file(path, custom_objects={"Counting": Counting}),
        by_weights,
    )
    for each in ways:
        each.build(params)
        same(state(each), weights)
        each.apply(grads, params)
    with pytest.raises(ValueError, match=r"does not know. Pass it as custom_objects"):
        omniadam.from_file(path)
    plain = loaded(path, Adam())
    with pytest.raises(ValueError, match=r"The optimizer has no: third of 'a/kernel'.*'total'"):
        plain.build(params)
    short = Counting()
    short.set_weights(weights[:-1])
    with pytest.raises(ValueError, match="There was no array for 'total'"):
        short.build(params)
