"""`omniadam.compat.optimizer_v2.Adam`: live against `tf_keras.optimizers.legacy.Adam`."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases import assert_close, gradients, sparse_gradient, variables
from older import LIBRARIES, Library, imported, spelled
from omniadam import migrate, schedules
from omniadam.compat import optimizer_v2
from omniadam.compat.optimizer_v2 import Adam
from reference import Array, reference_optimizer_v2

STEPS = 50
SHAPES: tuple[tuple[int, ...], ...] = ((), (7,), (3, 5))

# tf_keras holds hyperparameters in float32. These are exact there, so that in float64 it must agree
# to the roundings of its own arithmetic; of the defaults, 1 - float32(0.999) is wrong by 1e-5.
EXACT = {"learning_rate": 2.0**-6, "beta_1": 0.875, "beta_2": 0.9375, "epsilon": 2.0**-20}
# Its schedules, too, are float32: the rates of the first are exact there.
SCHEDULE = ("PiecewiseConstantDecay", ([3, 17], [0.0625, 0.03125, 0.125]))
ROUNDED = ("InverseTimeDecay", (0.0625, 4, 0.5))

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "learning_rate": {"learning_rate": 0.125},
    "beta_1": {"beta_1": 0.5},
    "beta_2": {"beta_2": 0.5},
    "epsilon": {"epsilon": 0.25},
    "amsgrad": {"amsgrad": True},
    "decay": {"decay": 0.25},
    "schedule": {"learning_rate": SCHEDULE},
    "schedule, then decay": {"learning_rate": SCHEDULE, "decay": 0.25},
    "rounded schedule": {"learning_rate": ROUNDED},
    "callable": {"learning_rate": lambda: 0.25},
    "clipnorm": {"clipnorm": 2.0},
    "clipvalue": {"clipvalue": 0.125},
    "global_clipnorm": {"global_clipnorm": 2.0},
    "clipvalue, then clipnorm": {"clipvalue": 0.5, "clipnorm": 0.75},
    "clipvalue, then global_clipnorm": {"clipvalue": 0.5, "global_clipnorm": 1.5},
    "all": {
        "learning_rate": SCHEDULE,
        "beta_1": 0.5,
        "beta_2": 0.5,
        "epsilon": 0.25,
        "amsgrad": True,
        "decay": 0.25,
        "clipvalue": 0.5,
        "clipnorm": 0.75,
    },
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    found = LIBRARIES[request.param]
    for name in found.needs:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if request.param == "tensorflow":
        request.getfixturevalue("tf")
    return found


@pytest.fixture
def tf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorFlow; by its own kernels, as XLA compiles each of so many steps for a second."""
    if find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")
    module = imported("tensorflow")
    fast = imported("omniadam.fast.tensorflow")
    monkeypatch.setattr(fast.FastTensorFlow, "jit_compile", False)
    return module


@pytest.fixture(scope="module")
def tf_keras() -> Any:
    if find_spec("tf_keras") is None:
        pytest.skip("tf_keras is not installed")
    return imported("tf_keras")


def arguments(settings: dict[str, Any], schedules: Any) -> dict[str, Any]:
    """With the schedule from a module like Keras's."""
    rate = settings.get("learning_rate")
    if isinstance(rate, tuple):
        return {**settings, "learning_rate": getattr(schedules, rate[0])(*rate[1])}
    return settings


# --- The documentation, to the letter -------------------------------------------------------------


def test_signatures() -> None:
    assert spelled(Adam) == (
        "(learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-07, amsgrad=False, "
        "name='Adam', **kwargs)"
    )
    documented = {
        "add_slot": "(var, slot_name, initializer='zeros')",
        "add_weight": (
            "(name, shape, dtype=None, initializer='zeros', trainable=None, "
            "synchronization=tf.VariableSynchronization.AUTO, "
            "aggregation=tf.compat.v1.VariableAggregation.NONE)"
        ),
        "apply_gradients": "(grads_and_vars, name=None)",
        "from_config": "(config, custom_objects=None)",
        "get_config": "()",
        "get_gradients": "(loss, params)",
        "get_slot": "(var, slot_name)",
        "get_slot_names": "()",
        "get_updates": "(loss, params)",
        "get_weights": "()",
        "minimize": "(loss, var_list, grad_loss=None, name=None)",
        "set_weights": "(weights)",
        "variables": "()",
    }
    assert {name: spelled(getattr(Adam, name)) for name in documented} == documented
    assert isinstance(inspect.getattr_static(Adam, "from_config"), classmethod)
    for name in ("iterations", "weights"):
        assert isinstance(inspect.getattr_static(Adam, name), property)


# --- The numbers, live against the original -------------------------------------------------------

Run = tuple[list[Array], list[Array]]


def steps_of(kind: str, steps: int = STEPS) -> Iterator[list[Any]]:
    for step in range(steps):
        grads: list[Any] = gradients(step, SHAPES, dtype="float64")
        indices, values = sparse_gradient(step, SHAPES[2], dtype="float64")
        if kind == "sparse":
            grads[2] = (values, indices)
        if kind == "densified":
            grads[2] = np.zeros(SHAPES[2])
            np.add.at(grads[2], indices, values)
        yield grads


def run(opt: Any, library: Library, kind: str, dtype: str = "float64", steps: int = STEPS) -> Run:
    """Variables and weights after some steps."""
    params = [library.variable(w) for w in variables(dtype, shapes=SHAPES)]
    for grads in steps_of(kind, steps):
        given = [
            library.sparse(g[0].astype(dtype), g[1], SHAPES[i])
            if isinstance(g, tuple)
            else library.array(g.astype(dtype))
            for i, g in enumerate(grads)
        ]
        opt.apply_gradients(zip(given, params, strict=True))
    return [library.numpy(w) for w in params], opt.get_weights()


@cache
def original(name: str, kind: str) -> Run:
    keras = imported("tf_keras")
    settings = arguments({**EXACT, **SETTINGS[name]}, keras.optimizers.schedules)
    return run(keras.optimizers.legacy.Adam(**settings), LIBRARIES["tensorflow"], kind)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", SETTINGS)
def test_numbers(name: str, kind: str, library: Library, tf_keras: Any) -> None:
    if library is LIBRARIES["keras"] and kind == "sparse":
        pytest.skip("Keras on NumPy has no sparse gradients")
    settings = arguments({**EXACT, **SETTINGS[name]}, schedules)
    opt = Adam(**settings)
    # The original clips the rows of a sparse gradient before it sums those that repeat, against its
    # sentence that sparse is equivalent to dense.
    is_clipped = not settings.keys().isdisjoint({"clipnorm", "clipvalue", "global_clipnorm"})
    theirs, weights = original(name, "densified" if kind == "sparse" and is_clipped else kind)
    if library.double:
        params, ours = run(opt, library, kind)
        # Of either side: about 2 roundings a step in m and v, as many in the sum of updates.
        tolerance = {"rtol": 1e-12, "atol": 1e-14}
        if name == "rounded schedule":
            tolerance = {"rtol": 1e-6, "atol": 1e-7}
    else:
        params, ours = run(opt, library, kind, "float32")
        tolerance = {"rtol": 2e-5, "atol": 2e-6}
    for got, want in zip(params + ours, theirs + weights, strict=True):
        np.testing.assert_allclose(got, want, **tolerance)
    assert int(ours[0]) == STEPS


def test_defaults_are_those_of_the_original(tf_keras: Any) -> None:
    """In its float32, where beta_2 = 0.999 makes the velocity wrong by 1e-5 and updates by less."""
    theirs = run(tf_keras.optimizers.legacy.Adam(), LIBRARIES["tensorflow"], "dense", "float32")
    ours = run(Adam(), LIBRARIES["numpy"], "dense", "float32")
    start = variables("float32", shapes=SHAPES)
    for got, want, w in zip(ours[0], theirs[0], start, strict=True):
        np.testing.assert_allclose(got - w, want - w, rtol=2e-5, atol=5e-8)
    for got, want in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-8)


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_are_those_of_the_oracle(name: str) -> None:
    settings = arguments(SETTINGS[name], schedules)
    params, weights = run(Adam(**settings), LIBRARIES["numpy"], "dense", "float32")
    rate = settings.get("learning_rate", 0.001)
    if callable(rate) and not isinstance(rate, schedules.LearningRateSchedule):
        settings = {**settings, "learning_rate": rate()}
    reference = reference_optimizer_v2(variables("float32", shapes=SHAPES), **settings)
    for grads in steps_of("dense"):
        reference.step([np.asarray(g, np.float32) for g in grads])
    n = len(SHAPES)
    assert_close(params, reference)
    assert_close(weights[1 : 1 + n], reference, "momentum")
    assert_close(weights[1 + n : 1 + 2 * n], reference, "velocity")
    if settings.get("amsgrad"):
        assert_close(weights[1 + 2 * n :], reference, "velocity_hat")


def test_sparse_paragraph(library: Library) -> None:
    """A row that is not used moves by its momentum, which decays: as with a gradient of zero."""
    if library is LIBRARIES["keras"]:
        pytest.skip("Keras on NumPy has no sparse gradients")
    w = library.variable(np.ones((3, 2), np.float32))
    opt = Adam(0.125)
    first = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    opt.apply_gradients([(library.sparse(first, np.array([0, 0]), (3, 2)), w)])
    np.testing.assert_allclose(library.numpy(opt.get_slot(w, "m"))[0], [0.4, 0.6], rtol=1e-6)
    before = np.array(library.numpy(w))
    assert np.all(before[0] != 1.0) and np.all(before[1:] == 1.0)
    opt.apply_gradients([(library.sparse(first[:1], np.array([2]), (3, 2)), w)])
    after = library.numpy(w)
    assert np.all(after[0] < before[0]) and np.all(after[1] == 1.0) and np.all(after[2] < 1.0)
    np.testing.assert_allclose(library.numpy(opt.get_slot(w, "m"))[0], [0.36, 0.54], rtol=1e-6)


# --- Hyperparameters ------------------------------------------------------------------------------


def stepped(opt: Adam, library: Library, times: int = 1) -> list[float]:
    """How far a variable moves at each step with the gradient 1: the rate, and epsilon's share."""
    w = library.variable(np.zeros(1, np.float32))
    moves = []
    for _ in range(times):
        before = float(library.numpy(w)[0])
        opt.apply_gradients([(library.array(np.ones(1, np.float32)), w)])
        moves.append(before - float(library.numpy(w)[0]))
    return moves


def test_attributes_are_read_and_set(library: Library) -> None:
    opt = Adam(lr=0.5, decay=0.25, clipvalue=3.0)
    names = ("learning_rate", "lr", "decay", "beta_1", "beta_2", "epsilon")
    values = [float(getattr(opt, name)) for name in names]
    assert values == pytest.approx([0.5, 0.5, 0.25, 0.9, 0.999, 1e-7], rel=1e-7)
    assert (opt.clipnorm, opt.clipvalue, opt.global_clipnorm) == (None, 3.0, None)
    assert opt.amsgrad is False
    assert stepped(opt, library, 2) == pytest.approx([0.5, 0.4], rel=1e-5)
    w = library.variable(np.zeros(1, np.float32))
    g = library.array(np.ones(1, np.float32))
    for rate in (0.25, 0.125):
        opt.lr, opt.decay = rate, 0.0
        assert float(opt.learning_rate) == rate
        opt.set_weights([np.zeros_like(x) for x in opt.get_weights()])
        before = float(library.numpy(w)[0])
        opt.apply_gradients([(g, w)])
        assert before - float(library.numpy(w)[0]) == pytest.approx(rate, rel=1e-5)
    opt.set_weights([np.zeros_like(x) for x in opt.get_weights()])
    opt.beta_1, opt.beta_2, opt.epsilon = 0.5, 0.75, 1.0
    opt.apply_gradients([(g, w)])
    slots = [float(library.numpy(opt.get_slot(w, name))[0]) for name in ("m", "v")]
    assert slots == pytest.approx([0.5, 0.25], rel=1e-6)
    opt.learning_rate = schedules.InverseTimeDecay(0.5, 1, 1.0)
    opt.lr = 2.0  # over a schedule, too
    assert float(opt.lr) == 2.0
    opt.clipvalue, opt.clipnorm = None, 0.5
    opt.apply_gradients([(g, w)])
    assert float(library.numpy(opt.get_slot(w, "m"))[0]) == pytest.approx(0.5, rel=1e-6)
    assert json.loads(json.dumps(opt.get_config()))["clipnorm"] == 0.5


@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "beta_2", "epsilon"])
def test_callables_are_called_at_each_step(name: str, library: Library) -> None:
    now = 0.5
    opt = Adam(**{**EXACT, name: lambda: now})
    plain = Adam(**{**EXACT, name: 0.5})
    pairs = []
    for each in (opt, plain):
        w = library.variable(np.ones(3, np.float32))
        for value in (0.5, 0.25):
            if each is opt:
                now = value
            else:
                setattr(plain, name, value)
            g = library.array(np.array([1.0, -2.0, 4.0 * value], np.float32))
            each.apply_gradients([(g, w)])
        pairs.append(library.numpy(w))
    np.testing.assert_allclose(pairs[0], pairs[1], rtol=1e-7)
    assert float(getattr(opt, name)) == 0.25 == opt.get_config()[name]


@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "beta_2", "epsilon"])
def test_tensors_are_read_at_each_step(name: str, library: Library) -> None:
    tensor = library.variable(np.array(0.5, np.float32))
    opt, plain = Adam(**{**EXACT, name: tensor}), Adam(**{**EXACT, name: 0.5})
    assert getattr(opt, name) is tensor
    moves = [stepped(each, library, 2) for each in (opt, plain)]
    assert moves[0] == pytest.approx(moves[1], rel=1e-6)
    assert opt.get_config()[name] == 0.5


def test_epsilon_of_nothing_is_the_default() -> None:
    for nothing in (None, 0, 0.0):
        assert Adam(epsilon=nothing).get_config()["epsilon"] == 1e-7


def test_clipping_at_zero_leaves_nothing() -> None:
    for settings in ({"clipnorm": 0.0}, {"global_clipnorm": 0}, {"clipvalue": 0.0}):
        w = np.ones(2)
        Adam(**settings).apply_gradients([(np.array([1.0, 0.0]), w)])
        assert w.tolist() == [1.0, 1.0]


# --- State ----------------------------------------------------------------------------------------


def ones(library: Library, *shapes: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    return (
        [library.array(np.ones(shape, np.float32)) for shape in shapes],
        [library.variable(np.ones(shape, np.float32)) for shape in shapes],
    )


def test_weights_are_the_count_then_all_m_v_and_vhat(library: Library) -> None:
    grads, params = ones(library, (2, 3), (3,))
    opt = Adam(amsgrad=True)
    assert opt.weights == [] == opt.variables() == opt.get_weights() == opt.get_slot_names()
    opt.apply_gradients(zip(grads, params, strict=True))
    shapes = [weight.shape for weight in opt.get_weights()]
    assert shapes == [(), (2, 3), (3,), (2, 3), (3,), (2, 3), (3,)]
    assert opt.get_slot_names() == ["m", "v", "vhat"]
    assert [id(v) for v in opt.weights] == [id(v) for v in opt.variables()]
    assert opt.weights[0] is opt.iterations
    for i, (slot, w) in enumerate((s, w) for s in ("m", "v", "vhat") for w in params):
        assert opt.get_slot(w, slot) is opt.weights[1 + i]
    means = [float(np.mean(w)) for w in opt.get_weights()]
    # TensorFlow's own operation computes with 1 - float32(0.999), which is wrong by 1.3e-5.
    np.testing.assert_allclose(means, [1, 0.1, 0.1, 1e-3, 1e-3, 1e-3, 1e-3], rtol=2e-5)


def test_get_slot_of_what_has_none() -> None:
    w, opt = np.ones(2), Adam()
    with pytest.raises(KeyError, match="'m'"):
        opt.get_slot(w, "m")
    opt.apply_gradients([(np.ones(2), w)])
    for variable, name in ((w, "vhat"), (w, "momentum"), (np.ones(2), "m"), (object(), "m")):
        with pytest.raises(KeyError, match=name):
            opt.get_slot(variable, name)


def test_variables_that_come_later(library: Library) -> None:
    """As in the original, they get slots, after those that there are."""
    grads, params = ones(library, (2,), (3,), (4,))
    opt = Adam(0.5)
    opt.apply_gradients([(grads[0], params[0])])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        opt.apply_gradients([(None, params[2]), (grads[1], params[1])])
    assert [w.shape for w in opt.get_weights()] == [(), (2,), (2,), (3,), (3,)]
    opt.apply_gradients(zip(grads, params, strict=True))
    assert [w.shape[0] for w in opt.get_weights()[1:]] == [2, 2, 3, 3, 4, 4]
    assert int(opt.get_weights()[0]) == 3
    # An error takes nothing with it.
    before, later = opt.get_weights(), library.variable(np.ones(5, np.float32))
    with pytest.raises((TypeError, ValueError)):
        opt.apply_gradients([(grads[0], later)])
    assert len(opt.get_weights()) == len(before)
    opt.apply_gradients([(library.array(np.ones(5, np.float32)), later)])
    assert len(opt.get_weights()) == len(before) + 2


def test_iterations_are_a_variable(library: Library) -> None:
    grads, params = ones(library, (2,))
    opt = Adam()
    assert int(opt.iterations) == 0  # of TensorFlow, where that is imported
    opt.apply_gradients(zip(grads, params, strict=True))
    assert int(opt.get_weights()[0]) == 1
    assert opt.iterations is opt.iterations is opt.weights[0]
    if library is LIBRARIES["tensorflow"]:
        assert repr(opt.iterations) == ("<tf.Variable 'Adam/iter:0' shape=() dtype=int64, numpy=1>")
    with pytest.raises(RuntimeError, match="`iterations` cannot be set"):
        opt.iterations = opt.iterations


def test_iterations_may_be_set_before_there_are_weights(library: Library) -> None:
    count = library.array(np.array(3))
    if library in (LIBRARIES["tensorflow"], LIBRARIES["keras"], LIBRARIES["jax"]):
        count = library.variable(np.array(3, np.int32))
    opt = Adam(0.5, decay=1.0)
    opt.iterations = count
    assert opt.iterations is count and [int(w) for w in opt.get_weights()] == [3]
    grads, params = ones(library, (1,))
    opt.apply_gradients(zip(grads, params, strict=True))
    assert opt.iterations is count and int(np.asarray(library.numpy(count))) == 4
    assert int(opt.get_weights()[0]) == 4
    # t = 4, and the rate is 0.5 / (1 + 3): m / sqrt(v) = 0.1 / sqrt(0.001), then corrected.
    move = 0.125 * 0.1 / (1 - 0.9**4) * np.sqrt((1 - 0.999**4) / 0.001)
    assert 1.0 - float(library.numpy(params[0])[0]) == pytest.approx(move, rel=1e-4)
    with pytest.raises(RuntimeError, match="`iterations` cannot be set"):
        opt.iterations = count
    for wrong in (3, 2.5, "3", np.ones(2, np.int64), np.array(1.0)):
        with pytest.raises(TypeError, match="`iterations` must be"):
            Adam().iterations = wrong


def test_add_slot(library: Library) -> None:
    grads, (w, b) = ones(library, (2,), (3,))
    opt = Adam(0.0)
    slot = opt.add_slot(w, "rms", "ones")
    assert opt.add_slot(w, "rms") is slot is opt.get_slot(w, "rms")
    assert library.numpy(slot).tolist() == [1.0, 1.0]
    assert opt.get_slot_names() == ["rms"] and [x.shape for x in opt.get_weights()] == [(), (2,)]
    first = opt.add_slot(b, "m", lambda shape, dtype: np.full(shape, 10.0, dtype))
    opt.apply_gradients(zip(grads, (w, b), strict=True))
    assert opt.get_slot(b, "m") is first
    np.testing.assert_allclose(library.numpy(first), 0.9 * 10 + 0.1, rtol=1e-6)
    np.testing.assert_allclose(library.numpy(opt.get_slot(w, "m")), 0.1, rtol=1e-6)
    assert opt.get_slot_names() == ["rms", "m", "v"]
    shapes = [x.shape for x in opt.get_weights()]
    assert shapes == [(), (2,), (3,), (2,), (2,), (3,)]  # rms, m of b; m of w; both v
    value = np.array([1.0, 2.0, 3.0], np.float32)
    assert library.numpy(opt.add_slot(b, "value", value)).tolist() == [1.0, 2.0, 3.0]
    opt.set_weights([np.zeros_like(x) for x in opt.get_weights()])
    assert library.numpy(opt.get_slot(b, "value")).tolist() == [0.0] * 3
    with pytest.raises(KeyError):
        opt.get_slot(b, "rms")


def test_initializers_of_keras(library: Library) -> None:
    imported("keras")
    w = library.variable(np.ones((200, 5), np.float32))
    slot = library.numpy(Adam().add_slot(w, "noise", "random_uniform"))
    assert 0.02 < np.abs(slot).max() <= 0.05
    with pytest.raises(ValueError, match="nonsense"):
        Adam().add_slot(w, "noise", "nonsense")


def test_add_weight(library: Library) -> None:
    grads, params = ones(library, (2,))
    opt = Adam()
    opt.apply_gradients(zip(grads, params, strict=True))
    plain = opt.add_weight("plain", (2, 3))
    assert library.numpy(plain).dtype == np.float32 and not library.numpy(plain).any()
    full = opt.add_weight(
        "full",
        shape=[3],
        dtype="int32",
        initializer="ones",
        trainable=False,
        synchronization=optimizer_v2.VariableSynchronization.ON_READ,
        aggregation=optimizer_v2.VariableAggregation.SUM,
    )
    assert library.numpy(full).tolist() == [1, 1, 1] and library.numpy(full).dtype == np.int32
    if library is not LIBRARIES["keras"]:
        assert type(plain) is type(opt.get_slot(params[0], "m"))
    assert len(opt.weights) == 3  # of which an added weight is none
    value = opt.add_weight("value", (), np.float32, initializer=7.0)
    assert float(library.numpy(value)) == 7.0
    with pytest.raises(ValueError, match="ON_READ cannot be trainable"):
        opt.add_weight("x", (), trainable=True, synchronization="ON_READ")


def test_types_of_add_weight() -> None:
    w, opt = np.ones(1), Adam()
    opt.apply_gradients([(w, w)])
    types: list[Any] = [None, "float64", np.float16, np.dtype("int64"), float]
    names = ["float32", "float64", "float16", "int64", "float64"]
    for name, module in (("torch", "torch"), ("tensorflow", "tensorflow")):
        if find_spec(module) is not None:
            types.append(imported(name).float64)
            names.append("float64")
    assert [opt.add_weight("x", (1,), dtype).dtype.name for dtype in types] == names


def test_set_weights_goes_on_where_the_original_stopped(library: Library, tf_keras: Any) -> None:
    settings = {**EXACT, "amsgrad": True, "decay": 0.25}
    theirs = tf_keras.optimizers.legacy.Adam(**settings)
    tensorflow = LIBRARIES["tensorflow"]
    originals = [tensorflow.variable(w) for w in variables(shapes=SHAPES)]
    steps = [[np.asarray(g, np.float32) for g in grads] for grads in steps_of("dense", 20)]
    for grads in steps[:10]:
        theirs.apply_gradients(zip(map(tensorflow.array, grads), originals, strict=True))
    params = [library.variable(tensorflow.numpy(w)) for w in originals]
    opt = Adam(**settings)
    opt.apply_gradients(
        [(library.array(np.zeros_like(g)), w) for g, w in zip(steps[0], params, strict=True)]
    )
    opt.set_weights(theirs.get_weights())
    for grads in steps[10:]:
        theirs.apply_gradients(zip(map(tensorflow.array, grads), originals, strict=True))
        opt.apply_gradients(zip(map(library.array, grads), params, strict=True))
    for got, want in zip(params, originals, strict=True):
        np.testing.assert_allclose(library.numpy(got), want.numpy(), rtol=1e-5, atol=1e-6)
    for got, want in zip(opt.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    theirs.set_weights(opt.get_weights())


def test_set_weights_drops_the_vhats_of_a_v1_list() -> None:
    params = [np.ones(2), np.ones(3)]
    opt = Adam()
    opt.apply_gradients([(np.ones_like(w), w) for w in params])
    list_of_v1 = [np.array(7)] + [np.full(n, k) for k in (0.5, 0.25, 9.0) for n in (2, 3)]
    opt.set_weights(list_of_v1)
    got = opt.get_weights()
    assert len(got) == 5
    assert all(np.array_equal(a, b) for a, b in zip(got, list_of_v1, strict=False))
    with_hats = Adam(amsgrad=True)
    with_hats.apply_gradients([(np.ones_like(w), w) for w in params])
    with_hats.set_weights(list_of_v1)
    assert with_hats.get_weights()[-1].tolist() == [9.0] * 3


def test_set_weights_errors() -> None:
    opt = Adam()
    opt.set_weights([])
    _ = opt.iterations
    opt.set_weights([np.array(5)])
    assert int(opt.iterations) == 5
    with pytest.raises(ValueError, match="whole number"):
        opt.set_weights([np.array(5.5)])
    opt.apply_gradients([(np.ones(2), np.ones(2))])
    before = opt.get_weights()
    for wrong in (
        [np.array(3), np.zeros(2), np.zeros(3)],
        [np.array(3), np.zeros(2)],
        [np.array(3), *[np.zeros(2)] * 4],
        [np.array(3.5), np.zeros(2), np.zeros(2)],
        [np.array(3), np.zeros(2), np.array(["a", "b"])],
    ):
        with pytest.raises(ValueError, match=r"weights|State variable"):
            opt.set_weights(wrong)
        assert all(np.array_equal(a, b) for a, b in zip(before, opt.get_weights(), strict=True))
    with pytest.raises(ValueError, match="whole number"):
        opt.set_weights([np.array(-1), np.zeros(2), np.zeros(2)])
    with pytest.raises(TypeError, match="list of arrays"):
        opt.set_weights(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole number"):
        Adam().iterations = np.array(-1)
    assert all(np.array_equal(a, b) for a, b in zip(before, opt.get_weights(), strict=True))


def test_a_copy_has_a_moment_that_began_otherwise() -> None:
    grads, params = ones(LIBRARIES["numpy"], (2,), (3,))
    opt = Adam(0.1)
    opt.add_slot(params[0], "m", "ones")
    other, others = copy.deepcopy(opt), [w.copy() for w in params]
    for each, those in ((opt, params), (other, others)):
        each.apply_gradients([(grads[0], those[0])])
        np.testing.assert_allclose(each.get_slot(those[0], "m"), [1.0, 1.0])
    np.testing.assert_array_equal(params[0], others[0])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_has_the_weights(again: Callable[[Adam], Adam]) -> None:
    """They are there before it sees a variable, and so is what they are set to."""
    grads, params = ones(LIBRARIES["numpy"], (2,), (3,))
    opt = Adam(amsgrad=True)
    opt.apply_gradients(zip(grads, params, strict=True))
    other = again(again(opt))
    for weights in (other.get_weights(), other.weights):
        for a, b in zip(opt.get_weights(), weights, strict=True):
            assert np.array_equal(a, b)
    for wrong in ([1, *other.get_weights()[:0:-1]], [-1, *other.get_weights()[1:]]):
        with pytest.raises(ValueError, match="weights"):
            other.set_weights(wrong)
    assert np.array_equal(other.get_weights()[2], opt.get_weights()[2])
    for each, those in ((opt, params), (other, [w.copy() for w in params])):
        each.set_weights([np.array(7), *(2.0 * x for x in each.get_weights()[1:])])
        each.apply_gradients(zip(grads, those, strict=True))
    assert int(other.iterations) == 8
    for a, b in zip(opt.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_goes_on(again: Callable[[Adam], Adam]) -> None:
    library = LIBRARIES["numpy"]
    grads, params = ones(library, (2,), (3,))
    opt = Adam(0.5, amsgrad=True, decay=0.5, clipvalue=0.5, clipnorm=1.0)
    opt.apply_gradients(zip(grads, params, strict=True))
    other, copies = again(opt), [w.copy() for w in params]
    assert other.get_config() == opt.get_config() and int(other.iterations) == 1
    for each, those in ((opt, params), (other, copies)):
        each.apply_gradients(zip(grads, those, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(params, copies, strict=True))
    for a, b in zip(opt.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(a, b)
    assert isinstance(other, Adam) and type(other).__name__ == "Adam"


# --- Steps ----------------------------------------------------------------------------------------


def test_minimize(library: Library) -> None:
    _, params = ones(library, (2,), (3,))
    now = [np.full(2, 2.0, np.float32), np.full(3, -1.0, np.float32)]
    loss = library.loss(params, lambda: now)
    opt = Adam(0.5)
    result = opt.minimize(loss, params)
    assert int(np.asarray(library.numpy(result) if hasattr(result, "shape") else result)) == 1
    np.testing.assert_allclose(library.numpy(params[0]), 0.5, rtol=1e-5)
    np.testing.assert_allclose(library.numpy(params[1]), 1.5, rtol=1e-5)
    opt.minimize(loss, lambda: params)
    opt.minimize(loss, tuple(params), name="step")
    opt.minimize(loss, params, grad_loss=library.array(np.array(-100.0, np.float32)))
    m = library.numpy(opt.get_slot(params[0], "m"))
    np.testing.assert_allclose(m, 0.9 * (2 * (1 - 0.9**3)) - 20.0, rtol=1e-5)


@pytest.mark.parametrize("how", ["eager", "function", "graph"])
@pytest.mark.parametrize(
    "settings", [{}, {"amsgrad": True, "decay": 0.25}, {"learning_rate": SCHEDULE}], ids=str
)
def test_minimize_as_the_original(
    settings: dict[str, Any], how: str, tf: Any, tf_keras: Any
) -> None:
    """A loss with rows that repeat, and rows that are not used; `grad_loss`; a callable list."""
    v1, rows = tf.compat.v1, np.array([1, 1, 3])
    settings = arguments({**EXACT, **settings}, tf_keras.optimizers.schedules)
    results = []
    for make in (Adam, tf_keras.optimizers.legacy.Adam):
        with tf.Graph().as_default() if how == "graph" else nullcontext():
            opt = make(**settings)
            w, table = tf.Variable([1.0, -2.0], dtype=tf.float64), tf.Variable(np.ones((4, 2)))

            def loss(w: Any = w, table: Any = table) -> Any:
                return tf.reduce_sum(w**4) + tf.reduce_sum(tf.gather(table, rows) ** 2)

            def step(opt: Any = opt, loss: Any = loss, w: Any = w, table: Any = table) -> Any:
                return opt.minimize(
                    loss, lambda: [w, table], grad_loss=tf.constant(0.5, tf.float64)
                )

            if how == "graph":
                operation = step()
                with v1.Session() as session:
                    session.run(v1.global_variables_initializer())
                    for _ in range(STEPS):
                        session.run(operation)
                    results.append(session.run([w, table, *opt.weights]))
                continue

            def untold(step: Any = step) -> None:  # a function returns no operation
                step()

            run_once = tf.function(untold, autograph=False) if how == "function" else step
            for _ in range(STEPS):
                run_once()
            results.append([w.numpy(), table.numpy(), *opt.get_weights()])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


def test_variables_that_the_loss_creates() -> None:
    torch = pytest.importorskip("torch")
    created: list[Any] = []
    calls = []

    def loss() -> Any:
        calls.append(1)
        if not created:
            created.append(torch.ones(1, requires_grad=True))
        return (created[0] ** 2).sum()

    opt = Adam(0.25)
    for _ in range(2):
        opt.minimize(loss, lambda: created)
    assert len(calls) == 2
    assert created[0].item() == pytest.approx(0.5, abs=0.01)


def test_minimize_errors(library: Library) -> None:
    """Of the documentation: "ValueError: If some of the variables are not `Variable` objects"."""
    w = library.variable(np.ones(2, np.float32))
    loss = library.loss([w], lambda: [np.ones(2, np.float32)])
    for wrong in (["w"], [w, 1.0], [None], [library.array(np.arange(2))], "w", 3.0):
        with pytest.raises(ValueError, match="must hold variables"):
            Adam().minimize(loss, wrong)
    with pytest.raises(ValueError, match=r"scalar|one real number"):
        Adam().minimize(lambda w=w: w * 2, [w])
    assert library.numpy(w).tolist() == [1.0, 1.0]


def test_apply_gradients_errors(library: Library) -> None:
    """Of the documentation: malformed is a TypeError, no gradient a ValueError."""
    [g], [w] = ones(library, (2,))
    opt = Adam()
    for wrong in (3, [w], [(w,)], [(g, w, w)], [None], None, [(g, "w")], [("g", w)]):
        with pytest.raises(TypeError):
            opt.apply_gradients(wrong)  # type: ignore[arg-type]
    for nothing in ([], [(None, w)], iter(())):
        with pytest.raises(ValueError, match="No gradients provided"):
            opt.apply_gradients(nothing)
    with pytest.raises(ValueError, match="shape"):
        opt.apply_gradients([(library.array(np.ones(3, np.float32)), w)])
    assert library.numpy(w).tolist() == [1.0, 1.0] and opt.get_weights() == []


def test_get_gradients_are_not_clipped(library: Library) -> None:
    _, params = ones(library, (2,), (3,))
    now = [np.full(2, 200.0, np.float32), np.full(3, -100.0, np.float32)]
    opt = Adam(clipnorm=1.0, clipvalue=0.5)
    got = opt.get_gradients(library.loss(params, lambda: now), params)
    assert [library.numpy(g).tolist() for g in got] == [g.tolist() for g in now]
    assert opt.get_weights() == []


def test_get_gradients_errors() -> None:
    """Of the documentation: "ValueError: In case any gradient cannot be computed"."""
    torch = pytest.importorskip("torch")
    from autograd.extend import primitive

    w, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="number 1, has no gradient"):
        Adam().get_gradients(lambda: w.sum(), [w, v])
    with pytest.raises(ValueError, match="cannot be computed"):
        Adam().get_gradients(lambda w: primitive(lambda x: x * 2)(w).sum(), [np.ones(2)])


def test_get_updates(library: Library) -> None:
    _, params = ones(library, (2,))
    now = [np.ones(2, np.float32)]
    opt = Adam(0.25)
    updates = opt.get_updates(library.loss(params, lambda: now), params)
    assert library.numpy(params[0]).tolist() == [1.0, 1.0]
    assert [weight.tolist() for weight in opt.get_weights()] == [0, [0.0, 0.0], [0.0, 0.0]]
    for expected in (0.75, 0.5):
        for update in updates:
            update()
        np.testing.assert_allclose(library.numpy(params[0]), expected, rtol=1e-5)
    now[0] = np.full(2, -4.0, np.float32)
    for update in updates:
        update()
    assert np.all(library.numpy(params[0]) > 0.5)


# --- Configuration --------------------------------------------------------------------------------


def test_config(tf_keras: Any) -> None:
    for settings in SETTINGS.values():
        if callable(settings.get("learning_rate")):
            continue
        theirs = tf_keras.optimizers.legacy.Adam(
            **arguments({**EXACT, **settings}, tf_keras.optimizers.schedules)
        ).get_config()
        ours = Adam(**arguments({**EXACT, **settings}, schedules)).get_config()
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, dict):
                assert value["class_name"] == theirs[key]["class_name"]
                named = {"name": value["config"]["name"]}  # None, in the original
                assert value["config"] == theirs[key]["config"] | named
            else:
                assert value == theirs[key], key
        json.dumps(ours)
        assert Adam.from_config(ours).get_config() == ours
        assert Adam.from_config(theirs).get_config() == theirs
        tf_keras.optimizers.legacy.Adam.from_config(copy.deepcopy(ours))


def test_from_config() -> None:
    config = {"lr": 0.5, "name": "A", "clipnorm": 1.0}
    opt = Adam.from_config(config)
    assert config == {"lr": 0.5, "name": "A", "clipnorm": 1.0}
    assert opt.get_config()["learning_rate"] == 0.5 and opt.get_config()["name"] == "A"
    with pytest.raises(TypeError, match="'momentum'"):
        Adam.from_config({"momentum": 0.9})


class Halved(schedules.LearningRateSchedule):
    def __init__(self, first: float) -> None:
        self.first = first

    def __call__(self, step: Any) -> Any:
        return self.first * 0.5**step

    def get_config(self) -> dict[str, Any]:
        return {"first": self.first}


def test_custom_objects() -> None:
    config = Adam(Halved(0.5)).get_config()
    with pytest.raises(ValueError, match="Halved"):
        Adam.from_config(config)
    opt = Adam.from_config(config, {"Halved": Halved})
    assert isinstance(opt.learning_rate, Halved)
    assert stepped(opt, LIBRARIES["numpy"], 3) == pytest.approx([0.5, 0.25, 0.125], rel=1e-5)
    functions = {"warm": lambda: 0.25, "slow": lambda: 0.5}
    named = {"learning_rate": "warm", "beta_1": "slow"}
    opt = Adam.from_config(named, custom_objects=functions)
    assert (opt.learning_rate, opt.beta_1) == (0.25, 0.5)
    with pytest.raises(ValueError, match="'warm'"):
        Adam.from_config(named)


# --- Settings that are wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"momentum": 0.9}, TypeError, "'momentum'"),
        ({"clip": 1.0}, TypeError, "'clip'"),
        ({"clipnorm": -1.0}, ValueError, "clipnorm"),
        ({"clipvalue": -1.0}, ValueError, "clipvalue"),
        ({"global_clipnorm": -1.0}, ValueError, "global_clipnorm"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"decay": -1.0}, ValueError, "decay"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate"),
        ({"beta_1": 1.0}, ValueError, "beta_1"),
        ({"beta_2": "high"}, ValueError, "beta_2"),
        ({"epsilon": -1e-9}, ValueError, "epsilon"),
        ({"amsgrad": "yes"}, ValueError, "amsgrad"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, ValueError, "Only one of"),
    ],
)
def test_settings_are_checked(
    settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Adam(**settings)


def test_attributes_are_checked() -> None:
    opt = Adam(clipnorm=1.0)
    config = opt.get_config()
    for name, value in (
        *(("lr", -1.0), ("decay", -1.0), ("beta_1", 1.0), ("beta_2", "high")),
        *(("epsilon", -1.0), ("clipvalue", -1.0), ("global_clipnorm", 1.0)),
    ):
        with pytest.raises(ValueError, match=r"must be|Only one"):
            setattr(opt, name, value)
        assert opt.get_config() == config
    opt.apply_gradients([(np.ones(1), np.ones(1))])
    with pytest.raises(ValueError, match="amsgrad"):
        opt.amsgrad = True
    opt.beta_1 = lambda: 1.5
    with pytest.raises(ValueError, match="beta_1"):
        opt.apply_gradients([(np.ones(1), np.ones(1))])


def test_tensors_are_checked(library: Library) -> None:
    for wrong in (np.full(2, 0.5, np.float32), np.array(-1.0, np.float32)):
        for name in ("learning_rate", "beta_1", "beta_2", "epsilon"):
            if library is LIBRARIES["jax"] and name == "learning_rate" and wrong.ndim == 0:
                continue  # a rate on a device is not waited for
            [g], [w] = ones(library, (2,))
            with pytest.raises(ValueError, match=f"`{name}`"):
                Adam(**{name: library.variable(wrong)}).apply_gradients([(g, w)])
            assert library.numpy(w).tolist() == [1.0, 1.0]


# --- JAX ------------------------------------------------------------------------------------------


def test_inside_jit() -> None:
    jax = pytest.importorskip("jax")
    library, traces = LIBRARIES["jax"], []
    opt, other = (Adam(lr=0.125, decay=0.5, amsgrad=True, clipnorm=1.0) for _ in range(2))
    w, v = (library.variable(np.array([1.0, -2.0], np.float32)) for _ in range(2))
    steps = [library.array(g) for g in np.random.default_rng(0).normal(size=(4, 2))]

    @jax.jit
    def step(g: Any) -> None:
        traces.append(1)
        opt.apply_gradients([(g, w)])

    opt.apply_gradients([(steps[0], w)])  # which creates the state
    for g in steps[1:]:
        step(g)
    for g in steps:
        other.apply_gradients([(g, v)])
    assert len(traces) == 1
    for a, b in zip([w[...], *opt.get_weights()], [v[...], *other.get_weights()], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# --- TensorFlow -----------------------------------------------------------------------------------


def given_to(tf: Any, grads: list[Any]) -> list[Any]:
    return [
        tf.IndexedSlices(*map(tf.constant, g), tf.constant(SHAPES[i]))
        if isinstance(g, tuple)
        else tf.constant(g)
        for i, g in enumerate(grads)
    ]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["exact", "amsgrad", "schedule, then decay", "callable", "all"])
def test_numbers_inside_a_function(name: str, kind: str, tf: Any, tf_keras: Any) -> None:
    opt = Adam(**arguments({**EXACT, **SETTINGS[name]}, tf_keras.optimizers.schedules))
    params = [tf.Variable(w) for w in variables("float64", shapes=SHAPES)]

    @tf.function
    def step(grads: Any) -> None:
        operation = opt.apply_gradients(zip(grads, params))  # noqa: B905 (AutoGraph)
        assert isinstance(operation, tf.Operation)

    for grads in steps_of(kind):
        step(given_to(tf, grads))
    assert_as_original(name, kind, [w.numpy() for w in params], opt.get_weights())


def assert_as_original(name: str, kind: str, params: list[Array], weights: list[Array]) -> None:
    is_clipped = not SETTINGS[name].keys().isdisjoint({"clipnorm", "clipvalue"})
    want = original(name, "densified" if kind == "sparse" and is_clipped else kind)
    for a, b in zip(params + weights, want[0] + want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["exact", "amsgrad", "schedule, then decay", "all"])
def test_numbers_in_a_graph(name: str, kind: str, tf: Any, tf_keras: Any) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        params = [
            v1.get_variable(f"w{i}", initializer=w, use_resource=True)
            for i, w in enumerate(variables("float64", shapes=SHAPES))
        ]
        given: list[Any] = [v1.placeholder(tf.float64, shape) for shape in SHAPES]
        if kind == "sparse":
            given[2] = tf.IndexedSlices(
                v1.placeholder(tf.float64, (3, 5)), v1.placeholder(tf.int64, 3), (3, 5)
            )
        opt = Adam(**arguments({**EXACT, **SETTINGS[name]}, tf_keras.optimizers.schedules))
        step = opt.apply_gradients(zip(given, params, strict=True), name="train")
        assert isinstance(step, tf.Operation) and step.name == "train"
        session.run(v1.global_variables_initializer())
        for grads in steps_of(kind):
            fed = dict(zip(given[:2], grads[:2], strict=True))
            if kind == "sparse":
                fed |= {given[2].values: grads[2][0], given[2].indices: grads[2][1]}
            else:
                fed[given[2]] = grads[2]
            session.run(step, fed)
        ours, weights = session.run(params), opt.get_weights()
        names = [v.name for v in opt.weights]
        assert names[:3] == ["Adam/iter:0", "Adam/w0/m:0", "Adam/w1/m:0"]
    assert_as_original(name, kind, ours, weights)  # which runs eagerly


PLAIN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "rounded in float32": {"learning_rate": 0.0123, "beta_1": 0.87, "epsilon": 1e-3, "decay": 0.3},
    "schedule, amsgrad, decay": {"learning_rate": SCHEDULE, "amsgrad": True, "decay": 0.1},
    "callables": {"learning_rate": lambda: 0.02, "beta_2": lambda: 0.95},
}


@pytest.mark.parametrize("where", ["eagerly", "in a function", "by XLA", "in a graph"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_steps_have_the_bits_of_the_original(
    name: str, dtype: str, where: str, tf: Any, tf_keras: Any
) -> None:
    if where == "by XLA" and PLAIN[name].get("amsgrad"):
        pytest.skip("XLA does not know the original's operation")

    def trained(make: Any) -> list[bytes]:
        opt = make(**arguments(PLAIN[name], tf_keras.optimizers.schedules))
        given = [gradients(t, SHAPES, dtype=dtype) for t in range(9)]
        if where == "in a graph":
            v1 = tf.compat.v1
            with tf.Graph().as_default(), v1.Session() as session:
                params = [
                    v1.Variable(w, use_resource=True) for w in variables(dtype, shapes=SHAPES)
                ]
                fed = [v1.placeholder(dtype, shape) for shape in SHAPES]
                step = opt.apply_gradients(zip(fed, params, strict=True))
                session.run(v1.global_variables_initializer())
                for grads in given:
                    session.run(step, dict(zip(fed, grads, strict=True)))
                return [value.tobytes() for value in session.run(params + opt.weights)]
        params = [tf.Variable(w) for w in variables(dtype, shapes=SHAPES)]

        def apply(grads: Any) -> None:
            opt.apply_gradients(list(zip(grads, params)))  # noqa: B905 (AutoGraph)

        if where != "eagerly":
            apply = tf.function(apply, jit_compile=where == "by XLA" or None)
        for grads in given:
            apply(list(map(tf.constant, grads)))
        return [value.numpy().tobytes() for value in params + opt.weights]

    assert trained(Adam) == trained(tf_keras.optimizers.legacy.Adam)


def test_by_xla(monkeypatch: pytest.MonkeyPatch, tf_keras: Any) -> None:
    library = LIBRARIES["tensorflow"]
    opt = Adam(**arguments({**EXACT, **SETTINGS["all"]}, schedules))
    params, weights = run(opt, library, "dense")
    assert_as_original("all", "dense", params, weights)


def test_of_a_loss_in_a_graph(tf: Any, tf_keras: Any) -> None:
    """`minimize`, `get_updates` and `get_gradients`, beside the original's."""
    v1, results = tf.compat.v1, []
    for make in (Adam, tf_keras.optimizers.legacy.Adam):
        with tf.Graph().as_default(), v1.Session() as session:
            w = v1.get_variable("w", initializer=np.array([1.0, -2.0]), use_resource=True)
            opt = make(**EXACT, clipnorm=1.0)
            gradient = opt.get_gradients(tf.reduce_sum(w**3), [w])
            [update] = opt.get_updates(tf.reduce_sum(w**2), [w])
            step = opt.minimize(lambda w=w: tf.reduce_sum(w**4), [w], name="step")
            weighted = opt.minimize(
                lambda w=w: tf.reduce_sum(w**2),
                lambda w=w: [w],
                grad_loss=tf.constant(-2.0, w.dtype),
            )
            assert all(isinstance(each, tf.Operation) for each in (update, step, weighted))
            with pytest.raises(ValueError, match="gradient"):
                opt.get_gradients(tf.constant(1.0), [w])
            session.run(v1.global_variables_initializer())
            results.append([session.run(gradient)[0]])
            for each in (update, step, weighted, update):
                session.run(each)
                results[-1].append(session.run(w))
            assert session.run(opt.iterations) == 4
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_what_the_original_returns(tf: Any) -> None:
    w = tf.Variable([1.0, 2.0])
    opt = Adam(0.1)
    result = opt.minimize(lambda: tf.reduce_sum(w**2), [w])
    assert result is opt.iterations and result.numpy() == 1
    assert opt.apply_gradients([(w + 0.0, w)]).numpy() == 2


def test_hyperparameters_are_variables_that_a_traced_function_reads(tf: Any, tf_keras: Any) -> None:
    results = []
    for make in (Adam, tf_keras.optimizers.legacy.Adam):
        opt, w = make(**EXACT), tf.Variable(np.array([1.0, -2.0]))

        @tf.function
        def traced(opt: Any = opt, w: Any = w) -> Any:
            opt.minimize(lambda: tf.reduce_sum(w**2), [w])
            return w + 0.0

        traced()
        traces = traced.experimental_get_tracing_count()
        opt.lr = 0.25
        traced()
        opt.beta_1 = 0.5
        traced()
        opt.learning_rate.assign(0.125)
        opt.beta_2.assign(0.75)
        results.append(traced().numpy())
        assert traced.experimental_get_tracing_count() == traces
        assert (float(opt.lr), float(opt.beta_1), float(opt.beta_2)) == (0.125, 0.5, 0.75)
        assert opt.get_config()["beta_2"] == 0.75
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)


def test_config_where_values_are_symbolic(tf: Any) -> None:
    """As the number that was set as long as the variable holds it, and else as what it holds."""
    opt, w = Adam(0.1), tf.Variable([1.0, 2.0])
    seen = []

    @tf.function(autograph=False)
    def step() -> None:
        opt.apply_gradients([(w + 0.0, w)])
        seen.append(opt.get_config()["learning_rate"])

    step()
    assert set(seen) == {0.1} and opt.get_config()["learning_rate"] == 0.1
    opt.lr.assign(0.25)
    assert opt.get_config()["learning_rate"] == 0.25
    v1 = tf.compat.v1
    with tf.Graph().as_default():
        other = Adam(0.1, beta_1=tf.constant(0.5))
        other.lr  # noqa: B018 (its variable is created)
        with pytest.raises(RuntimeError, match="session"):
            other.get_config()
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            config = other.get_config()
            assert (config["learning_rate"], config["beta_1"]) == (0.1, 0.5)
            other.lr = 0.25
            assert other.get_config()["learning_rate"] == 0.25 == session.run(other.lr)


def test_placeholders_are_hyperparameters(tf: Any) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        rate, beta = v1.placeholder(tf.float32, ()), v1.placeholder(tf.float32, ())
        w = v1.get_variable("w", initializer=[1.0], use_resource=True)
        opt = Adam(rate, beta_1=beta)
        step = opt.apply_gradients([(tf.constant([1.0]), w)])
        session.run(v1.global_variables_initializer())
        session.run(step, {rate: 0.25, beta: 0.75})
        # Of m / sqrt(v), which bias correction makes 1, epsilon takes its share.
        moved = 0.25 * 0.001**0.5 / (0.001**0.5 + 1e-7)
        np.testing.assert_allclose(session.run(w), 1 - moved, rtol=np.finfo(np.float32).eps)
        np.testing.assert_allclose(session.run(opt.get_slot(w, "m")), 0.25)


def test_number_that_was_set_is_computed_with(tf: Any) -> None:
    """Not its float32, but for plain steps, which have the bits of the original."""
    w = tf.Variable([1.0])
    opt = Adam(beta_2=0.999, clipvalue=10.0)
    assert opt.beta_2.dtype == tf.float32 and opt.get_config()["beta_2"] == 0.999
    tf.function(lambda: opt.apply_gradients([(w + 0.0, w)]) and None, autograph=False)()
    assert abs(opt.get_slot(w, "v").numpy()[0] / 0.001 - 1) < 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", ["from the original", "to the original", "between ours"])
def test_checkpoints(way: str, when: str, tf: Any, tf_keras: Any, tmp_path: Any) -> None:
    theirs = tf_keras.optimizers.legacy.Adam
    writer = theirs if way == "from the original" else Adam
    reader = theirs if way == "to the original" else Adam
    settings = {**EXACT, "decay": 0.25, "amsgrad": True}
    steps = [given_to(tf, grads) for grads in steps_of("dense", 12)]
    params = [tf.Variable(w) for w in variables("float64", shapes=SHAPES)]
    opt = writer(**settings)
    for grads in steps[:5]:
        opt.apply_gradients(zip(grads, params, strict=True))
    path = tf.train.Checkpoint(optimizer=opt, model=params).save(str(tmp_path / "checkpoint"))

    copies = [tf.Variable(tf.zeros_like(w)) for w in params]
    other = reader(**settings | {"learning_rate": 0.5, "beta_1": 0.5})
    if when == "after":
        other.apply_gradients(zip(steps[7], copies, strict=True))
    status = tf.train.Checkpoint(optimizer=other, model=copies).restore(path)
    if when == "after" or reader is Adam:
        status.assert_consumed()
        assert other.iterations.numpy() == 5
        assert float(other.learning_rate) == EXACT["learning_rate"]
    for grads in steps[5:]:
        opt.apply_gradients(zip(grads, params, strict=True))
        other.apply_gradients(zip(grads, copies, strict=True))
    status.assert_consumed()
    for a, b in zip(params, copies, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)
        for name in ("m", "v", "vhat"):
            slots = [o.get_slot(w, name).numpy() for o, w in ((opt, a), (other, b))]
            np.testing.assert_allclose(*slots, rtol=1e-12)
    if reader is Adam:  # whose weights are in their order; the original's then are in the file's
        shapes = [x.shape for x in other.get_weights()]
        assert shapes == [(), *SHAPES, *SHAPES, *SHAPES]


@pytest.mark.parametrize("kind", ["the original", "ours"])
def test_order_after_a_checkpoint(kind: str, tf: Any, tf_keras: Any, tmp_path: Any) -> None:
    """A checkpoint has none, and variables of one shape could be taken for each other."""
    opt = (tf_keras.optimizers.legacy.Adam if kind == "the original" else Adam)(0.125)
    params = [tf.Variable([float(i)]) for i in range(4)]
    grads = [tf.constant([float(i + 1)]) for i in range(4)]
    opt.apply_gradients(zip(grads, params, strict=True))
    # By these names a file has them in another order.
    held = {f"v{i}": w for i, w in zip((2, 0, 3, 1), params, strict=True)}
    path = tf.train.Checkpoint(optimizer=opt, **held).save(str(tmp_path / "checkpoint"))
    copies = [tf.Variable(w) for w in params]
    held = {f"v{i}": w for i, w in zip((2, 0, 3, 1), copies, strict=True)}

    def restored() -> Adam:
        other = Adam()
        tf.train.Checkpoint(optimizer=other, **held).restore(path).assert_consumed()
        return other

    other = restored()
    weights = opt.get_weights()
    for use in (
        Adam.get_weights,
        lambda other: other.set_weights(weights),
        migrate,
        copy.deepcopy,
        pickle.dumps,
    ):
        with pytest.raises(ValueError, match="Make one step first"):
            use(other)

    @tf.function
    def step() -> None:
        other.apply_gradients(zip(grads, copies, strict=True))

    opt.apply_gradients(zip(grads, params, strict=True))
    step()
    for got in (other.get_weights(), copy.deepcopy(other).get_weights()):
        for a, b in zip(got, opt.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    new = migrate(other)
    new.build([w.numpy() for w in copies])
    moments = [float(x[0]) for x in new.get_weights()[2:]]
    got = [float(x[0]) for x in other.get_weights()[1:]]
    assert moments == [x for pair in zip(got[:4], got[4:], strict=True) for x in pair]
    step()
    assert int(other.iterations) == 3

    # In two parts, between which the order of the others is open still.
    other = restored()
    other.apply_gradients([(grads[2], copies[2])])
    with pytest.raises(ValueError, match="Make one step first"):
        other.get_weights()
    late = tf.Variable([4.0])
    other.apply_gradients(zip([*grads[:2], *grads], [late, *copies[:2], copies[3]], strict=False))
    order = [copies[2], late, *copies[:2], copies[3]]
    slots = [other.get_slot(w, name) for name in ("m", "v") for w in order]
    assert {id(w) for w in other.weights[1:]} == {id(slot) for slot in slots}
    assert [float(x[0]) for x in migrate(other)._state.awaited.slots[::2]] == [
        float(slot[0]) for slot in slots[:5]
    ]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("ours_reads", [True, False])
def test_checkpoints_in_a_graph(
    ours_reads: bool, when: str, tf: Any, tf_keras: Any, tmp_path: Any
) -> None:
    kinds = [tf_keras.optimizers.legacy.Adam, Adam]
    v1, path, written = tf.compat.v1, "", []
    for kind, is_reader in zip(kinds if ours_reads else kinds[::-1], (False, True), strict=True):
        with tf.Graph().as_default(), v1.Session() as session, session.as_default():
            w = v1.get_variable("w", initializer=np.ones(3), use_resource=True)
            opt = kind(**EXACT if not is_reader else {})
            checkpoint = tf.train.Checkpoint(optimizer=opt, w=w)
            status = checkpoint.restore(path) if is_reader and when == "before" else None
            step = opt.apply_gradients([(w * 2.0, w)])
            if is_reader and when == "after":
                status = checkpoint.restore(path)
            session.run(v1.global_variables_initializer())
            if status is not None:
                status.assert_consumed().run_restore_ops(session)
                for got, want in zip(session.run(opt.weights), written, strict=True):
                    np.testing.assert_array_equal(got, want)
                assert session.run(opt.lr) == EXACT["learning_rate"]
            else:
                session.run(step)
                session.run(step)
                path = checkpoint.save(str(tmp_path / "checkpoint"))
                written = session.run(opt.weights)


def test_models_of_tf_keras(tf: Any, tf_keras: Any, tmp_path: Any) -> None:
    """The example of `get_weights`, with callbacks, and files; and the original's numbers."""
    data, labels = np.arange(100, dtype=np.float32).reshape(5, 20) / 50, np.zeros(5)
    callback = tf_keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 / (1 + epoch))
    fitted = []
    for make in (Adam, tf_keras.optimizers.legacy.Adam):
        tf_keras.utils.set_random_seed(0)
        opt = make()
        model = tf_keras.models.Sequential([tf_keras.layers.Dense(10)])
        model.compile(opt, loss="mse")
        model.fit(data, labels, epochs=3, shuffle=False, verbose=0, callbacks=[callback])
        assert len(opt.get_weights()) == 5 and int(opt.iterations) == 3
        fitted.append(model.get_weights()[0])
        assert float(opt.lr) == pytest.approx(0.1 / 3)
        if make is Adam:
            assert isinstance(opt, tf_keras.optimizers.legacy.Optimizer)
            model.save(tmp_path / "model.keras")  # in which such optimizers have no state
            loaded = tf_keras.models.load_model(tmp_path / "model.keras").optimizer
            assert type(loaded) is type(opt) and loaded.get_config() == opt.get_config()
            with pytest.warns(UserWarning, match="HDF5"):
                model.save(tmp_path / "model.h5")
            loaded = tf_keras.models.load_model(tmp_path / "model.h5").optimizer
            for a, b in zip(loaded.get_weights(), opt.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
            model.save_weights(tmp_path / "model", save_format="tf")
            again, other = make(), tf_keras.models.Sequential([tf_keras.layers.Dense(10)])
            other.compile(again, loss="mse")
            other.load_weights(tmp_path / "model").expect_partial()
            other.fit(data, labels, shuffle=False, verbose=0)
            model.fit(data, labels, shuffle=False, verbose=0)
            for a, b in zip(again.get_weights(), opt.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
        opt.set_weights([np.array(10), *[np.ones([20, 10]), np.zeros([10])] * 2])
        assert repr(opt.iterations) == (
            "<tf.Variable 'Adam/iter:0' shape=() dtype=int64, numpy=10>"
        )
    np.testing.assert_allclose(*fitted, rtol=1e-4, atol=1e-6)


def test_models_of_tf_keras_with_a_class_of_ones_own(tf: Any, tf_keras: Any, tmp_path: Any) -> None:
    kind = type("Mine", (Adam,), {})
    model = tf_keras.models.Sequential([tf_keras.layers.Dense(1)])
    model.compile(kind(0.125), loss="mse")
    model.fit(np.ones((4, 2)), np.ones(4), verbose=0)
    with pytest.warns(UserWarning, match="HDF5"):
        model.save(tmp_path / "model.h5")
    loaded = tf_keras.models.load_model(tmp_path / "model.h5", custom_objects={"Mine": kind})
    assert isinstance(loaded.optimizer, kind)
    for a, b in zip(loaded.optimizer.get_weights(), model.optimizer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_of_tf_keras(policy: str, tf: Any, tf_keras: Any) -> None:
    """Of float16 a model scales the loss, by a `LossScaleOptimizer` around the optimizer."""
    results, rng = [], np.random.default_rng(0)
    data, labels = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    before = tf_keras.mixed_precision.global_policy()
    try:
        tf_keras.mixed_precision.set_global_policy(policy)
        for make in (Adam, tf_keras.optimizers.legacy.Adam):
            model = tf_keras.models.Sequential(
                [tf_keras.layers.Dense(2, kernel_initializer="ones")]
            )
            model.compile(make(**EXACT), loss="mse")
            # Once, in order: of 16 bits, a later gradient depends on the last bit of a weight.
            model.fit(data, labels, epochs=1, shuffle=False, verbose=0)
            results.append([*model.get_weights(), *model.optimizer.get_weights()])
    finally:
        tf_keras.mixed_precision.set_global_policy(before)
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_names_are_those_of_the_original(tf: Any, tf_keras: Any, tmp_path: Any) -> None:
    """So that what a `Saver` wrote in a graph loads, too."""
    v1, path, names = tf.compat.v1, str(tmp_path / "saved"), []
    for make in (tf_keras.optimizers.legacy.Adam, Adam):
        with tf.Graph().as_default(), v1.Session() as session:
            with v1.variable_scope("dense"):
                w = v1.get_variable("kernel", initializer=np.ones(3), use_resource=True)
            opt = make(**EXACT, amsgrad=True, name="Train")
            step = opt.apply_gradients([(w * 2.0, w)])
            session.run(v1.global_variables_initializer())
            names.append([v.name for v in v1.global_variables()])
            if make is Adam:
                assert step.name == "Train"
                v1.train.Saver().restore(session, path)
                assert opt.get_weights()[0] == 1
                assert not np.any(session.run(opt.get_slot(w, "vhat")) == 0)
            else:
                session.run(step)
                v1.train.Saver().save(session, path)
    assert names[0] == names[1]


def test_get_updates_inside_a_function(tf: Any, tf_keras: Any) -> None:
    results = []
    for make in (Adam, tf_keras.optimizers.legacy.Adam):
        opt, w = make(**EXACT), tf.Variable(np.array([1.0, -2.0]))

        @tf.function(autograph=False)
        def step(opt: Any = opt, w: Any = w) -> None:
            [update] = opt.get_updates(tf.reduce_sum(w**2), [w])
            assert isinstance(update, tf.Operation)

        for _ in range(STEPS):
            step()
        results.append([w.numpy(), *opt.get_weights()])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_scripts_of_tensorflow_1(tf_keras: Any) -> None:
    script = Path(__file__).with_name("tensorflow_1.py")
    assert in_a_process(script.read_text(encoding="utf-8")).count("test_") == 3


REPLICAS = """
import warnings
import numpy as np
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorflow as tf, tf_keras
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from omniadam.compat import contrib_keras, optimizer_v2

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
exact = {"beta_1": 0.875, "beta_2": 0.9375, "decay": 0.25}

def follow(make, is_made_inside):
    with strategy.scope():
        w = tf.Variable(np.array([1.0, -2.0]))
        opt = make(0.125, clipnorm=1.0, **exact) if is_made_inside else None
    opt = opt or make(0.125, clipnorm=1.0, **exact)
    if is_made_inside:  # what is created outside of the replicas is for them
        assert opt.iterations.numpy() == 0 and opt.lr.numpy() == 0.125

    @tf.function
    def step():
        def on_one():
            i = tf.distribute.get_replica_context().replica_id_in_sync_group
            opt.minimize(lambda: tf.reduce_sum(w**2) * (1.0 + tf.cast(i, tf.float64)), [w])
        strategy.run(on_one)

    for _ in range(3):
        step()
    opt.lr = 0.5
    step()
    assert opt.iterations.numpy() == 4
    return [v.numpy() for v in (w, *opt.weights)]

for is_made_inside in (True, False):
    ours = follow(optimizer_v2.Adam, is_made_inside)
    theirs = follow(tf_keras.optimizers.legacy.Adam, is_made_inside)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)

with strategy.scope():
    w, opt = tf.Variable([1.0]), optimizer_v2.Adam()
summed = {"experimental_aggregate_gradients": False}
try:
    strategy.run(lambda: opt.apply_gradients([(tf.ones(1), w)], **summed))
except NotImplementedError as error:
    assert "sums the gradients of replicas" in str(error)
    print("all is well")
"""


def test_replicas(tf_keras: Any) -> None:
    assert "all is well" in in_a_process(REPLICAS)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_in_tensorflow(again: Callable[[Adam], Adam], tf: Any) -> None:
    opt, w = Adam(0.5, decay=0.5), tf.Variable([1.0, 2.0])
    opt.apply_gradients([(tf.ones(2), w)])
    opt.learning_rate.assign(0.25)
    other, v = again(opt), tf.Variable(w)
    assert float(other.lr) == 0.25 and other.iterations is not opt.iterations
    for each, variable in ((opt, w), (other, v)):
        each.apply_gradients([(tf.ones(2), variable)])
        assert int(each.iterations) == 2
    assert np.array_equal(w.numpy(), v.numpy())
    assert isinstance(other, Adam)


def test_constraints_of_variables(tf: Any, tf_keras: Any) -> None:
    results = []
    for make in (Adam, tf_keras.optimizers.legacy.Adam):
        w = tf.Variable([1.0, -1.0], constraint=lambda x: tf.clip_by_value(x, -1.0, 0.75))
        make(0.5).apply_gradients([(tf.constant([-1.0, 1.0]), w)])
        results.append(w.numpy().tolist())
    assert results == [[0.75, -1.0]] * 2


def test_variables_that_the_loss_creates_in_tensorflow(tf: Any, tf_keras: Any) -> None:
    results = []
    for make in (Adam, tf_keras.optimizers.legacy.Adam):
        created: list[Any] = []
        calls = []

        def loss(created: list[Any] = created, calls: list[int] = calls) -> Any:
            calls.append(1)
            if not created:
                created.append(tf.Variable(2.0))
            return created[0] ** 2

        opt = make(**EXACT)
        for _ in range(3):
            opt.minimize(loss, lambda created=created: created)
        assert len(calls) == 3
        results.append(created[0].numpy())
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_slots_and_weights_in_a_graph(tf: Any) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", initializer=[1.0, 2.0], use_resource=True)
        opt = Adam(0.25)
        m = opt.add_slot(w, "m", "ones")
        three = opt.add_weight("three", (2,), tf.int32, lambda shape, dtype: tf.fill(shape, 3))
        opt.apply_gradients([(tf.zeros(2), w)])
        step = opt.apply_gradients([(tf.zeros(2), w)])
        session.run(v1.global_variables_initializer())
        session.run(step)
        np.testing.assert_allclose(session.run(m), 0.9)
        assert session.run(three).tolist() == [3, 3] and three.name == "Adam/three:0"
        assert opt.get_slot(w, "m") is m and len(opt.weights) == 3
        with pytest.raises(RuntimeError, match="session"), tf.Graph().as_default():
            other = Adam()
            assert other.lr is not None
            other.lr = 0.5


def test_add_weight_in_tensorflow(tf: Any) -> None:
    opt = Adam()
    weight = opt.add_weight(
        "x",
        (2,),
        tf.float64,
        "ones",
        synchronization=tf.VariableSynchronization.ON_WRITE,
        aggregation=tf.VariableAggregation.MEAN,
    )
    assert weight.trainable and weight.dtype == tf.float64
    assert weight.synchronization == tf.VariableSynchronization.ON_WRITE
    assert weight.aggregation == tf.VariableAggregation.MEAN
    read = tf.VariableSynchronization.ON_READ
    assert not opt.add_weight("y", (), synchronization=read).trainable
    with pytest.raises(ValueError, match="ON_READ cannot be trainable"):
        opt.add_weight("z", (), synchronization=read, trainable=True)


def test_before_a_variable_is_seen_they_are_tensorflows(tf: Any) -> None:
    opt = Adam(0.5, decay=0.25)
    assert isinstance(opt.iterations, tf.Variable) and isinstance(opt.lr, tf.Variable)
    opt.lr.assign(0.25)
    opt.iterations.assign(3)
    opt.apply_gradients([(np.ones(1), np.ones(1))])
    assert opt.lr == 0.25 and type(opt.lr) is float and opt.decay == 0.25
    assert type(opt.iterations) is np.ndarray and opt.iterations == 4


def test_a_hyperparameter_is_set_in_a_function(tf: Any) -> None:
    w = tf.Variable([1.0, 1.0])
    opt = Adam(0.1, epsilon=1e-7)
    opt.apply_gradients([(tf.ones(2), w)])

    @tf.function
    def step(rate: Any) -> None:
        opt.learning_rate = rate
        opt.apply_gradients([(tf.ones(2), w)])

    step(tf.constant(0.2))
    step(tf.constant(0.3))
    assert opt.get_config()["learning_rate"] == pytest.approx(0.3)
    opt.apply_gradients([(tf.ones(2), w)])
    np.testing.assert_allclose(w.numpy(), 1.0 - 0.1 - 0.2 - 0.3 - 0.3, atol=1e-5)
    opt.learning_rate = 0.1
    opt.apply_gradients([(tf.ones(2), w)])
    np.testing.assert_allclose(w.numpy(), 0.0, atol=1e-5)


def test_a_hyperparameter_that_would_outlive_its_function(tf: Any) -> None:
    w = tf.Variable([1.0, 1.0])
    opt = Adam(lambda: 0.1)
    opt.apply_gradients([(tf.ones(2), w)])

    @tf.function
    def step(rate: Any) -> None:
        opt.learning_rate = rate

    with pytest.raises(ValueError, match="cannot be set to"):
        step(tf.constant(0.2))
    opt.apply_gradients([(tf.ones(2), w)])
    np.testing.assert_allclose(w.numpy(), 0.8, rtol=1e-5)


def test_a_hyperparameter_that_would_outlive_its_function_of_jax() -> None:
    jax = pytest.importorskip("jax")
    w = jax.new_ref(jax.numpy.ones(2))
    opt = Adam(0.1)
    opt.apply_gradients([(jax.numpy.ones(2), w)])

    def set_rate(rate: Any) -> None:
        opt.learning_rate = rate

    with pytest.raises(ValueError, match="cannot be set to"):
        jax.jit(set_rate)(0.2)
    assert opt.learning_rate == 0.1


def in_a_process(code: str) -> str:
    here = Path(__file__).parent
    found = os.pathsep.join([str(here.parent / "src"), str(here)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": found},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tensorflow_is_not_imported() -> None:
    code = """
        import sys
        import numpy as np
        from omniadam.compat import contrib_keras, optimizer_v2
        w = np.ones(2)
        opt = optimizer_v2.Adam(lr=0.5)
        opt.minimize(lambda w: (w * w).sum(), lambda: [w])
        opt.add_weight("x", ())
        assert type(opt.lr) is float and opt.iterations == 1
        for update in contrib_keras.Adam().get_updates([w], {}, lambda w: (w * w).sum()):
            update()
        found = {"tensorflow", "torch", "jax", "keras", "tf_keras"} & set(sys.modules)
        assert not found, found
        """
    in_a_process(code)
