"""`omniadam.migrate`: the optimizer it makes goes on as the old one would have."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from older import LIBRARIES, Library, imported
from omniadam import Adam, AdamW, migrate, schedules
from omniadam.compat import contrib_keras, optimizer_v2
from shown import ROOT, blocks

SHAPES = ((3, 2), (2,), ())
STEPS = 5
# Exact in the float32 of tf_keras and Keras.
EXACT = {"learning_rate": 2.0**-4, "beta_1": 0.875, "beta_2": 0.9375, "epsilon": 2.0**-20}


def grads_of(step: int) -> list[Any]:
    rng = np.random.default_rng(step)
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]


def begin(library: Library) -> list[Any]:
    return [library.variable(np.ones(shape, np.float32)) for shape in SHAPES]


def train(apply: Callable[[Any], Any], library: Library, params: Sequence[Any], steps: Any) -> None:
    for step in steps:
        apply(list(zip(map(library.array, grads_of(step)), params, strict=True)))


def assert_goes_on(old: Any, library: Library, params: list[Any]) -> Adam:
    """The same steps by the old optimizer, and by the new one on NumPy."""
    copies = [np.array(library.numpy(w)) for w in params]
    new = migrate(old)
    assert isinstance(new, Adam) and new.iterations == STEPS
    train(old.apply_gradients, library, params, range(STEPS, 2 * STEPS))
    train(new.apply_gradients, LIBRARIES["numpy"], copies, range(STEPS, 2 * STEPS))
    for got, want in zip(copies, params, strict=True):
        np.testing.assert_allclose(got, library.numpy(want), rtol=1e-6, atol=1e-7)
    assert new.iterations == 2 * STEPS
    return new


V2: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"decay": 0.25},
    "amsgrad": {"amsgrad": True},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.25},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "callable": {"learning_rate": lambda: 0.125},
}


@pytest.mark.parametrize("name", V2)
@pytest.mark.parametrize("kind", ["numpy", "torch", "tensorflow", "tf_keras"])
def test_optimizer_v2(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    if kind == "tensorflow" and name != "decay":  # XLA takes a second for each optimizer
        from omniadam.fast.tensorflow import FastTensorFlow

        monkeypatch.setattr(FastTensorFlow, "jit_compile", False)
    library = LIBRARIES["tensorflow" if kind == "tf_keras" else kind]
    keras = imported("tf_keras") if kind == "tf_keras" else None
    make = optimizer_v2.Adam if keras is None else keras.optimizers.legacy.Adam
    params, old = begin(library), make(**{**EXACT, **V2[name]})
    train(old.apply_gradients, library, params, range(STEPS))
    new = assert_goes_on(old, library, params)
    assert new.name == "Adam"
    if name == "decay":
        assert new.get_config()["learning_rate"] == schedules.serialize(
            schedules.InverseTimeDecay(2.0**-4, 1, 0.25)
        )
    # The config alone: the same settings, no state.
    other = migrate(old.get_config())
    assert other.iterations == 0
    if name != "callable":  # of which a config holds the present value
        assert other.get_config() == new.get_config()


@pytest.mark.needs("tf_keras")
def test_in_a_graph() -> None:
    """The state is what the session holds."""
    tf, keras = imported("tensorflow"), imported("tf_keras")
    v1 = tf.compat.v1
    for make in (optimizer_v2.Adam, keras.optimizers.legacy.Adam):
        with tf.Graph().as_default(), v1.Session() as session:
            w = v1.get_variable("w", initializer=np.array([1.0, -2.0]), use_resource=True)
            old = make(**EXACT, decay=0.25)
            step = old.apply_gradients([(w * 2.0, w)])
            session.run(v1.global_variables_initializer())
            session.run(step)
            new, copied = migrate(old), session.run(w)
            assert new.iterations == 1
            new.apply_gradients([(copied * 2.0, copied)])
            session.run(step)
            np.testing.assert_allclose(copied, session.run(w), rtol=1e-12)


@pytest.mark.parametrize("kind", ["numpy", "tf_keras"])
def test_schedule(kind: str) -> None:
    if find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    library, library_of = LIBRARIES["numpy"], schedules
    make: Any = optimizer_v2.Adam
    if kind == "tf_keras":
        keras = imported("tf_keras")
        library, make = LIBRARIES["tensorflow"], keras.optimizers.legacy.Adam
        library_of = keras.optimizers.schedules
    rate = library_of.PiecewiseConstantDecay([2, 6], [0.25, 0.125, 0.5])
    params, old = begin(library), make(**EXACT | {"learning_rate": rate})
    train(old.apply_gradients, library, params, range(STEPS))
    new = assert_goes_on(old, library, params)
    assert new.learning_rate == 0.5
    assert migrate(old.get_config()).learning_rate == 0.25


@pytest.mark.needs("autograd")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"epsilon": 1e-8}),
        ({"clipnorm": 0.5}, {"global_clipnorm": 0.5, "clipnorm": None}),
        ({"clipvalue": 0.25}, {"clipvalue": 0.25}),
        ({"clipvalue": 0.25, "clipnorm": 0}, {"clipvalue": 0.25}),
        ({"lr": 0.5, "decay": 0.5}, {}),
    ],
)
def test_contrib_keras(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    library = LIBRARIES["numpy"]
    params, now = begin(library), [0]
    old = contrib_keras.Adam(**settings)
    updates = old.get_updates(params, {}, library.loss(params, lambda: grads_of(now[0])))
    for step in range(STEPS):
        now[0] = step
        for update in updates:
            update()
    new, copies = migrate(old), [w.copy() for w in params]
    train(new.apply_gradients, library, copies, range(STEPS, 2 * STEPS))
    for step in range(STEPS, 2 * STEPS):
        now[0] = step
        for update in updates:
            update()
    for got, want in zip(copies, params, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    config = new.get_config()
    assert {key: config[key] for key in expected} == expected
    assert migrate(old.get_config()).get_config() == config


def test_what_is_already_there() -> None:
    library = LIBRARIES["numpy"]
    params, old = begin(library), AdamW(0.125, amsgrad=True, use_ema=True)
    train(old.apply_gradients, library, params, range(STEPS))
    new = assert_goes_on(old, library, params)
    assert type(new) is AdamW and new.get_config() == old.get_config()


KERAS = """
import json, sys
import keras, numpy as np
import omniadam
from omniadam import migrate
from test_migrate import SHAPES, STEPS, grads_of

ones = lambda: [keras.Variable(np.ones(shape, np.float32)) for shape in SHAPES]
pairs = lambda step, ws: [(keras.ops.convert_to_tensor(g), w) for g, w in zip(grads_of(step), ws)]
for name, settings in json.loads(sys.argv[1]):
    settings = {"beta_1": 0.875, "beta_2": 0.9375} | settings
    old, params = getattr(keras.optimizers, name)(**settings), ones()
    if "weight_decay" in settings:
        old.exclude_from_weight_decay(var_names=["nothing like this"])
    for step in range(STEPS):
        old.apply_gradients(pairs(step, params))
    new = migrate(old)
    assert type(new).__name__ == name and new.name == old.name, (new, old)
    copies = [np.array(keras.ops.convert_to_numpy(w)) for w in params]
    n = settings.get("gradient_accumulation_steps", 1)
    assert new.iterations == STEPS // n
    for step in range(STEPS, 2 * STEPS):
        old.apply_gradients(pairs(step, params))
        new.apply_gradients(zip(grads_of(step), copies))
    for got, want in zip(copies, params):
        want = keras.ops.convert_to_numpy(want)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    config = migrate(old).get_config()
    config.pop("exclude_from_weight_decay", None)  # which Keras's configs do not hold
    assert migrate(old.get_config()).get_config() == config
    serialized = keras.optimizers.serialize(old)
    assert type(migrate(serialized)).__name__ == name
    assert migrate(serialized).get_config() == config
excluded = keras.optimizers.AdamW(0.1)
excluded.exclude_from_weight_decay(var_list=ones())
try:
    migrate(excluded)
except ValueError as error:
    assert "var_list" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.needs("keras", "jax")
def test_keras() -> None:
    cases = [
        ("Adam", {}),
        ("Adam", {"learning_rate": 0.125, "amsgrad": True, "clipnorm": 0.5}),
        ("Adam", {"use_ema": True, "ema_overwrite_frequency": 3, "clipvalue": 0.25}),
        ("Adam", {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5, "name": "a"}),
        ("AdamW", {"weight_decay": 0.25, "learning_rate": 0.125}),
    ]
    root = Path(__file__).parents[1]
    env = os.environ | {
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", KERAS, json.dumps(cases)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.needs("tf_keras")
def test_later_tf_keras() -> None:
    keras, library = imported("tf_keras"), LIBRARIES["tensorflow"]
    for settings in ({}, {"amsgrad": True}, {"weight_decay": 0.25}, {"global_clipnorm": 0.5}):
        params, old = begin(library), keras.optimizers.Adam(**EXACT, **settings)
        train(old.apply_gradients, library, params, range(STEPS))
        assert_goes_on(old, library, params)
    with pytest.raises(ValueError, match="moving average"):
        migrate(keras.optimizers.Adam(use_ema=True))


def test_state_is_of_the_variables_it_was_of() -> None:
    library = LIBRARIES["numpy"]
    params, old = begin(library), optimizer_v2.Adam()
    train(old.apply_gradients, library, params, range(STEPS))
    for wrong in (params[:2], params[::-1], [*params, np.ones(1)]):
        new = migrate(old)
        with pytest.raises(ValueError, match="set before the build belongs to other variables"):
            new.build([w.copy() for w in wrong])
        assert not new.built
        new.build({f"layer/{i}": w for i, w in enumerate(params)})
        assert len(new.get_weights()) == 2 + 2 * len(params)
        assert np.array_equal(new.get_weights()[2], old.get_weights()[1])
    # What was not built holds a count alone.
    early = optimizer_v2.Adam()
    early.iterations = np.array(7)
    assert migrate(early).iterations == 7


class Renamed(optimizer_v2.Adam):
    pass


def constrained() -> contrib_keras.Adam:
    w, opt = np.ones(1), contrib_keras.Adam()
    opt.get_updates([w], {id(w): lambda value: value}, lambda w: w.sum())
    return opt


def with_slot() -> optimizer_v2.Adam:
    opt = optimizer_v2.Adam()
    opt.add_slot(np.ones(1), "extra")
    return opt


@pytest.mark.parametrize(
    ("old", "kind", "message"),
    [
        (lambda: optimizer_v2.Adam(clipnorm=1.0, clipvalue=1.0), ValueError, "`clipnorm` and `cl"),
        (lambda: contrib_keras.Adam(clipnorm=1.0, clipvalue=1.0), ValueError, "together"),
        (lambda: optimizer_v2.Adam(clipnorm=0.0), ValueError, "clipping at 0"),
        (lambda: optimizer_v2.Adam(lambda: 0.1, decay=0.1), ValueError, "`decay` with a learning"),
        (
            lambda: optimizer_v2.Adam(schedules.CosineDecay(0.1, 10), decay=0.1),
            ValueError,
            "is a schedule",
        ),
        (lambda: optimizer_v2.Adam(decay=lambda: 0.1), ValueError, "`decay` that is a callable"),
        (constrained, ValueError, "`constraints`"),
        (with_slot, ValueError, "`add_slot` of .'extra'"),
        (lambda: {"class_name": "SGD", "config": {"learning_rate": 0.1}}, ValueError, "'SGD'"),
        (lambda: {"lr": 0.1, "momentum": 0.9}, ValueError, "momentum"),
        (lambda: {"learning_rate": 0.1, "decay": 0.0, "rho": 0.9}, ValueError, "rho"),
        (lambda: {"learning_rate": 0.1, "rho": 0.9}, ValueError, "rho"),
        (lambda: "adam", TypeError, "str"),
        (lambda: None, TypeError, "NoneType"),
        (lambda: Adam, TypeError, "type"),
        (lambda: omniadam.Optimizer(0.1), TypeError, "Optimizer"),
    ],
)
def test_errors(old: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        migrate(old())


@pytest.mark.needs("tf_keras")
def test_errors_of_tf_keras() -> None:
    keras = imported("tf_keras")
    with pytest.raises(ValueError, match="SGD"):
        migrate(keras.optimizers.legacy.SGD())
    with pytest.raises(ValueError, match="gradient_transformers"):
        migrate(keras.optimizers.legacy.Adam(gradient_transformers=[lambda pairs: pairs]))


def test_a_config_between_the_generations() -> None:
    """Keras 2.1 to 2.2: TensorFlow 1.1's words, with amsgrad."""
    config = {"lr": 0.5, "beta_1": 0.9, "beta_2": 0.999, "decay": 0.0, "epsilon": 1e-7}
    new = migrate(config | {"amsgrad": True, "clipnorm": 1.0})
    assert (new.learning_rate, new.amsgrad, new.global_clipnorm) == (0.5, True, 1.0)
    assert migrate({"class_name": "Adam", "config": config}).epsilon == 1e-7
    # Of its documentation: "If `None`, defaults to `K.epsilon()`".
    assert migrate(config | {"epsilon": None}).epsilon == 1e-7


def test_a_config_of_todays_with_the_alias() -> None:
    new = migrate({"lr": 0.5, "name": "mine", "global_clipnorm": 1.0})
    assert (new.learning_rate, new.name, new.global_clipnorm) == (0.5, "mine", 1.0)
    assert new.epsilon == 1e-7


def test_of_a_copy() -> None:
    """What a copy waits for is not lost."""
    w, opt = np.ones(2), optimizer_v2.Adam()
    opt.apply_gradients([(np.ones(2), w)])
    found = [migrate(each) for each in (opt, copy.deepcopy(opt))]
    for new in found:
        new.build([w])
    for a, b in zip(*(new.get_weights() for new in found), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.needs("autograd", "torch", "tensorflow", "tf_keras")
@pytest.mark.parametrize("is_with_tensorflow", [True, False])
def test_page(is_with_tensorflow: bool) -> None:
    """Few processes: each import of TensorFlow takes seconds.

    One without it, since some versions of it and of what PyTorch's optimizers import, Triton, end a
    process that has both.
    """
    found = [x for x in blocks("docs/migration.md") if ("tensorflow" in x) is is_with_tensorflow]
    assert len(found) >= 3
    code = "\n".join(f"exec({code!r}, {{}})" for code in found)
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
