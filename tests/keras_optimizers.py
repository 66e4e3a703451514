"""Run by test_keras_optimizers.py, in a process for each of Keras's backends: `omniadam.keras`."""

from __future__ import annotations

import inspect
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import omniadam
from cases import CASES, SMALL_SHAPES, assert_close, combined, gradients, variables
from omniadam import schedules
from omniadam.keras import Adam, AdamW
from reference import Reference

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf

    from omniadam.fast.tensorflow import FastTensorFlow

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
Theirs = keras.optimizers.Adam
TRAINING = ("torch", "jax", "tensorflow")  # Keras on NumPy has no fit
IS_OLD = keras.__version__.startswith("3.10.")
BACKENDS: dict[str, tuple[str, ...]] = {}  # of each test

# Of weights and state that Keras's own optimizer left: a few float32 roundings a step.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def on(*backends: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A test for these backends, or for all."""

    def register(test: Callable[[], None]) -> Callable[[], None]:
        BACKENDS[test.__name__] = backends or ("numpy", *TRAINING)
        return test

    return register


@pytest.fixture(autouse=True)
def eager_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On TensorFlow not by XLA, which takes a second for each optimizer: the numbers of both ways
    are in test_tensorflow.py, and one test has XLA's here.
    """
    if BACKEND == "tensorflow":
        by_xla = request.function is test_half_precision_against_the_oracle
        monkeypatch.setattr(FastTensorFlow, "jit_compile", by_xla)


class raises:
    def __init__(self, kind: Any, *words: str) -> None:
        self.kind, self.words = kind, words

    def __enter__(self) -> None: ...

    def __exit__(self, got: Any, value: Any, trace: Any) -> bool:
        assert got is not None and issubclass(got, self.kind), (self.kind, got)
        assert all(word in str(value) for word in self.words), (self.words, str(value))
        return True


# --- models and data -----------------------------------------------------------------------------

_rng = np.random.default_rng(0)
X = _rng.standard_normal((24, 5)).astype("float32")
Y = np.abs(X).argmax(axis=1) % 3


def begin(seed: int = 1) -> None:
    kept = keras.distribution.distribution() if BACKEND == "jax" else None
    if BACKEND != "tensorflow" or not __import__("tensorflow").distribute.has_strategy():
        # Names are given anew; what is garbage, Python finds by itself in less time.
        keras.backend.clear_session(free_memory=False)
    if kept is not None:
        keras.distribution.set_distribution(kept)
    keras.utils.set_random_seed(seed)


def model(dtype: Any = None) -> Any:
    """Of the same names and values at each call."""
    begin()
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, "tanh", dtype=dtype),
            keras.layers.Dense(3, dtype=dtype),
        ]
    )


def compiled(optimizer: Callable[[], Any], dtype: Any = None, **settings: Any) -> Any:
    """On TensorFlow not by XLA, which takes long; three tests ask for Keras's own choice."""
    settings = {"jit_compile": "auto" if BACKEND == "jax" else False} | settings
    net = model(dtype)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(optimizer(), loss, **settings)
    return net


def fit(net: Any, epochs: int = 2, **settings: Any) -> Any:
    return net.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, shuffle=False, **settings)


def host(values: Any) -> list[Any]:
    return [ops.convert_to_numpy(ops.cast(v, "float32")) for v in values]


def same(a: Any, b: Any, **close: Any) -> None:
    for one, other in zip(host(a), host(b), strict=True):
        np.testing.assert_allclose(one, other, **(close or CLOSE))


def same_training(ours: Any, theirs: Any, **close: Any) -> None:
    same(ours.weights, theirs.weights, **close)
    one, other = ours.optimizer.variables, theirs.optimizer.variables
    assert [(v.name, v.path, v.shape) for v in one] == [(v.name, v.path, v.shape) for v in other]
    same(one, other, **close)


def made(values: list[Any], dtype: Any = None) -> list[Any]:
    return [keras.Variable(v, dtype=dtype, name=f"w{i}") for i, v in enumerate(values)]


def tensors(values: list[Any]) -> list[Any]:
    return [ops.convert_to_tensor(v) for v in values]


# --- numbers -------------------------------------------------------------------------------------


@on()
def test_settings_against_the_oracle() -> None:
    # The last one has everything, with one kind of clipping; the others have the other two.
    for names in (["clipnorm"], ["clipvalue", "excluded", "use_ema"], list(CASES)[-1].split("+")):
        case = combined(names)
        assert case is not None
        params = made(variables(shapes=SMALL_SHAPES))
        opt = Adam(**case.settings_for(schedules))
        opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
        reference = case.reference([p.numpy() for p in params])
        for step in range(12):
            g = gradients(step, shapes=SMALL_SHAPES)
            assert int(opt.apply_gradients(zip(tensors(g), params, strict=True))) == step + 1
            reference.step(g)
        assert int(opt.iterations) == reference.iterations
        assert_close([p.numpy() for p in params], reference)
        assert_close([v.numpy() for v in opt._velocities], reference, "velocity")


@on()
def test_half_precision_against_the_oracle() -> None:
    dtype = "float16" if BACKEND == "numpy" else "bfloat16"
    case = CASES["weight_decay+clipnorm"]
    params = made(variables(dtype, shapes=SMALL_SHAPES), dtype)
    start = [np.asarray(x, np.float64) for x in host(params)]
    opt, reference = Adam(**case.settings), case.reference(start)
    for step in range(5):
        g = gradients(step, shapes=SMALL_SHAPES, dtype=dtype)
        opt.apply([ops.cast(ops.convert_to_tensor(np.float32(x)), dtype) for x in g], params)
        reference.step([np.asarray(x, np.float64) for x in g])
    assert_close(host(params), reference, dtype=dtype)
    assert {v.dtype for v in opt._momentums} == {"float32"}


@on("numpy", "torch", "tensorflow")
def test_double_precision_as_keras_does() -> None:
    if IS_OLD and keras.backend.backend() == "jax":
        pytest.skip("this Keras warns that it makes single precision of it")
    for settings in ({}, {"use_ema": True, "gradient_accumulation_steps": 2, "amsgrad": True}):
        ends = []
        for kind in (Adam, Theirs):
            begin()
            # Their first values come from initializers, as those of the state do.
            layer = keras.layers.Dense(3, dtype="float64")
            layer.build((None, 5))
            opt = kind(0.125, epsilon=0.25, **settings)
            for step in range(1, 5):
                g = [np.full(v.shape, step / 3) for v in layer.variables]
                opt.apply([ops.convert_to_tensor(each, "float64") for each in g], layer.variables)
            ends.append([*layer.variables, *opt.variables])
        assert all(ops.dtype(v.value) == v.dtype for v in ends[0])
        same(ends[0], ends[1])


@on(*TRAINING)
def test_fit_as_keras_does() -> None:
    decay = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.5)
    ema = {"use_ema": True, "ema_overwrite_frequency": 2}
    for settings in (
        {"learning_rate": decay, "amsgrad": True, "clipnorm": 0.1, "loss_scale_factor": 8.0},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "global_clipnorm": 0.5, **ema},
    ):
        ours, theirs = (partial(kind, **settings) for kind in (Adam, Theirs))
        nets = [compiled(ours, jit_compile="auto"), compiled(theirs)]
        assert all(fit(net).history["loss"][0] > 0 for net in nets)
        same_training(*nets)


@on(*TRAINING)
def test_digits() -> None:
    """A real model: the same accuracy, and after 50 steps the same weights."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    nets = []
    for kind in (AdamW, keras.optimizers.AdamW):
        begin()
        net = keras.Sequential(
            [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        jit_compile = "auto" if BACKEND == "jax" or kind is AdamW else False  # see `compiled`
        # Older versions of Keras give this class another name than its own by default.
        default = inspect.signature(keras.optimizers.AdamW).parameters["name"].default
        named = {} if default is None else {"name": default}
        opt = kind(0.01, 0.01, global_clipnorm=1.0, **named)
        net.compile(opt, loss, jit_compile=jit_compile)
        net.fit(images[:1500], labels[:1500], batch_size=60, epochs=2, verbose=0, shuffle=False)
        nets.append(net)
    # The gradients themselves differ by then: a step's error goes into the next gradient.
    same_training(*nets, rtol=1e-3, atol=1e-4)
    ours, theirs = (
        np.mean(ops.convert_to_numpy(net(images[1500:])).argmax(axis=1) == labels[1500:])
        for net in nets
    )
    assert ours > 0.8 and abs(ours - theirs) < 0.01


@on(*TRAINING)
def test_train_on_batch_and_evaluate() -> None:
    nets = [compiled(kind) for kind in (Adam, Theirs)]
    for net in nets:
        losses = [float(net.train_on_batch(X, Y)) for _ in range(3)]
        assert losses[2] < losses[0]
        assert float(net.evaluate(X, Y, verbose=0)) < losses[2]
    same_training(*nets)


def loop(net: Any, opt: Any, steps: int) -> None:
    """A training loop of one's own, as the documentation of each library writes it."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained = net.trainable_variables
    if BACKEND == "torch":
        for _ in range(steps):
            net.zero_grad()
            loss(Y, net(X)).backward()
            with __import__("torch").no_grad():
                opt.apply([v.value.grad for v in trained], trained)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                value = loss(Y, net(X))
            opt.apply(tape.gradient(value, trained), trained)
            return value

        for _ in range(steps):
            step()
    else:
        import jax

        opt.build(trained)

        def value_of(weights: Any) -> Any:
            return loss(Y, net.stateless_call(weights, net.non_trainable_variables, X)[0])

        @jax.jit
        def step(weights: Any, state: Any) -> Any:
            return opt.stateless_apply(state, jax.grad(value_of)(weights), weights)

        weights, state = [v.value for v in trained], [v.value for v in opt.variables]
        for _ in range(steps):
            weights, state = step(weights, state)
        for v, value in zip([*trained, *opt.variables], [*weights, *state], strict=True):
            v.assign(value)


@on(*TRAINING)
def test_custom_loop() -> None:
    nets = []
    for kind in (Adam, Theirs):
        net = model()
        net.optimizer = kind(0.01, clipvalue=0.05)
        loop(net, net.optimizer, 5)
        nets.append(net)
    same_training(*nets)


@on(*TRAINING)
def test_compiled_unrolled_and_eager() -> None:
    optimizer = partial(Adam, 0.01, global_clipnorm=0.3, weight_decay=0.1)
    net = compiled(optimizer, jit_compile=False)
    fit(net, 1)
    ways: dict[str, dict[str, Any]] = {
        "compiled": {"jit_compile": True},
        "eager": {"run_eagerly": True},
        "unrolled": {"steps_per_execution": 3, "jit_compile": False},
    }
    if BACKEND == "torch":  # whose compiler takes long
        del ways["compiled"], ways["unrolled"]
    if BACKEND == "jax":  # where what is not compiled is eager, as `net` is
        del ways["eager"]
    for settings in ways.values():
        other = compiled(optimizer, **settings)
        fit(other, 1)
        same_training(other, net)


# --- files, configs ------------------------------------------------------------------------------


@on(*TRAINING)
def test_files_of_keras_load_into_ours_and_back() -> None:
    # With an average Keras's own can fit once only on JAX: see docs/keras.md.
    settings = {"learning_rate": 0.02, "use_ema": True, "amsgrad": True, "weight_decay": 0.1}
    ours, theirs = (compiled(partial(kind, **settings)) for kind in (Adam, Theirs))
    with tempfile.TemporaryDirectory() as folder:
        for net in (ours, theirs):
            fit(net, 1)
            net.save(f"{folder}/{type(net.optimizer).__module__}.keras")
            net.save_weights(f"{folder}/{type(net.optimizer).__module__}.weights.h5")
        states = [host(net.optimizer.variables) for net in (ours, theirs)]
        same(*states)
        fit(ours, 1)
        for kind, written, state in ((Theirs, ours, states[0]), (Adam, theirs, states[1])):
            net = compiled(partial(kind, **settings))
            net.optimizer.build(net.trainable_variables)
            for suffix in (".keras", ".weights.h5"):
                for v in net.optimizer.variables:
                    v.assign(ops.zeros_like(v.value))
                net.load_weights(f"{folder}/{type(written.optimizer).__module__}{suffix}")
                same(net.optimizer.variables, state, rtol=0, atol=0)
            fit(net, 1)
            same_training(net, ours)  # which did not stop


@on(*TRAINING)
def test_a_saved_model_has_our_optimizer() -> None:
    net = compiled(partial(AdamW, 0.02, 0.1))
    net.optimizer.exclude_from_weight_decay(
        var_list=[net.trainable_variables[0]], var_names=["bias"]
    )
    fit(net, 1)
    with tempfile.TemporaryDirectory() as folder:
        net.save(f"{folder}/model.keras")
        again = keras.saving.load_model(f"{folder}/model.keras")
    assert type(again.optimizer) is AdamW
    same(again.optimizer.variables, net.optimizer.variables, rtol=0, atol=0)
    decayed = [again.optimizer._use_weight_decay(v) for v in again.trainable_variables]
    assert decayed == [False, False, True, False]
    for each in (net, again):
        fit(each, 1)
    same(again.weights, net.weights, rtol=0, atol=0)


@on()
def test_extend_against_the_oracle() -> None:
    """Variables that come later, in the order in which a model lists them: in front."""
    case = combined(list(CASES)[-1].split("+"))  # which has everything
    assert case is not None
    params = made(variables(shapes=SMALL_SHAPES))
    later, first = params[:3], params[3:]
    opt = Adam(**case.settings_for(schedules))
    opt.exclude_from_weight_decay(var_names=[f"^{params[i].path}$" for i in case.excluded])
    place = [3, 4, 5, 0, 1, 2]
    excluded = frozenset(place.index(i) for i in case.excluded)
    reference = case._replace(excluded=excluded).reference([p.numpy() for p in first])
    for step in range(13):
        if step == 4:
            with raises(ValueError, "Unknown variable", "w0", "extend"):
                opt.apply([None, *tensors(gradients(0, shapes=SMALL_SHAPES)[3:])][:1], later[:1])
            opt.extend(params)
            reference.extend([p.numpy() for p in later])
        now = params if step >= 4 else first
        g = gradients(step, shapes=SMALL_SHAPES)[-len(now) :]
        opt.apply(tensors(g), None if step > 4 else now)
        reference.step([*g[-3:], *g[:-3]])
    assert_close([p.numpy() for p in [*first, *later]], reference)
    for slot, held in (("velocity", opt._velocities), ("momentum", opt._momentums)):
        assert_close([v.numpy() for v in held], reference, slot)
    assert opt.get_config()["extensions"] == [[v.path for v in later]]
    with raises(ValueError, "path of its own", params[0].path):
        opt.extend([keras.Variable(1.0, name=params[0].name)])
    before = len(opt.variables)
    for wrong in ([made([np.zeros(2)])[0], params[0].value], [np.zeros(2)]):
        with raises((ValueError, TypeError)):
            opt.extend(wrong)
    assert len(opt.variables) == before


@on(*TRAINING)
def test_fit_and_extend_and_fit() -> None:
    """Without compile; and saved and loaded it goes on as if it had not stopped."""
    everything = {"use_ema": True, "ema_overwrite_frequency": 2, "amsgrad": True}
    everything |= {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5, "weight_decay": 0.1}
    for settings, is_wrapped in (({}, False), (everything, False), ({}, True)):
        net = model()
        net.layers[0].trainable = False
        own = Adam(0.02, **settings)
        own.exclude_from_weight_decay(var_names=["bias"])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        wrapped = keras.optimizers.LossScaleOptimizer(own) if is_wrapped else own
        net.compile(wrapped, loss, jit_compile="auto" if BACKEND == "jax" else False)
        fit(net)
        # Copies: memory may be used again.
        frozen, before = [list(map(np.array, host(layer.weights))) for layer in net.layers]
        slots = {v.path: np.array(v.numpy()) for v in own.variables}
        net.layers[0].trainable = True
        own.extend(net.trainable_variables)
        assert [v.path for v in own.variables][: len(slots)] == list(slots)
        assert all(np.array_equal(v.numpy(), slots[v.path]) for v in own.variables[: len(slots)])
        count = own.variables[len(slots)]
        assert count.name == "extension" and int(count.numpy()) == int(own.iterations) > 0
        net.fit(X, Y, batch_size=24, verbose=0)  # a step
        if not settings:  # of the learning rate, as the first one of any Adam is
            moved = [a - b for a, b in zip(host(net.layers[0].weights), frozen, strict=True)]
            assert all(np.isclose(np.median(np.abs(x)), 0.02, rtol=1e-2) for x in moved)
            assert np.any(host(net.layers[1].weights)[0] != before[0])
        with tempfile.TemporaryDirectory() as folder:
            net.save(f"{folder}/model.keras")
            again = keras.saving.load_model(f"{folder}/model.keras")
        shorter = [[v.path for v in again.layers[0].weights]]
        assert is_wrapped or again.optimizer.get_config()["extensions"] == shorter
        same(again.optimizer.variables, net.optimizer.variables, rtol=0, atol=0)
        for each in (net, again):
            fit(each, 1)
        same(again.weights, net.weights, rtol=0, atol=0)
        same(again.optimizer.variables, net.optimizer.variables, rtol=0, atol=0)


@on()
def test_configs() -> None:
    made_with = {"learning_rate": 0.25, "beta_1": 0.8, "clipnorm": 2.0, "name": "mine"}
    for kind, base in ((Adam, Theirs), (AdamW, keras.optimizers.AdamW)):
        opt = kind(**made_with)
        assert isinstance(opt, base) and isinstance(opt, keras.optimizers.Optimizer)
        assert opt.get_config() == base(**made_with).get_config()
        held = keras.saving.serialize_keras_object(opt)
        assert held["registered_name"] == f"omniadam>{kind.__name__}"
        again = (
            keras.saving.deserialize_keras_object(held),
            keras.optimizers.deserialize(keras.optimizers.serialize(opt)),
            keras.optimizers.get(keras.optimizers.serialize(opt)),
            kind.from_config(base(**made_with).get_config()),
        )
        assert [type(each) for each in again] == [kind] * len(again)
        assert all(each.get_config() == opt.get_config() for each in again)
        assert keras.optimizers.get(opt) is opt
    assert type(keras.optimizers.get("adam")) is not Adam
    assert AdamW().weight_decay == 0.004 and AdamW(0.1, 0.5).weight_decay == 0.5

    opt = AdamW()
    opt.exclude_from_weight_decay(var_names=["bias"])
    again = AdamW.from_config(opt.get_config())
    assert again.get_config() == opt.get_config() != AdamW().get_config()
    kernel, bias = made([np.ones(2, np.float32)] * 2)
    bias._path = "dense/bias"
    again.build([kernel, bias])
    assert [again._use_weight_decay(v) for v in (kernel, bias)] == [True, False]
    with raises(ValueError, "before the optimizer is built"):
        again.exclude_from_weight_decay(var_names=["kernel"])


@on()
def test_learning_rates() -> None:
    w = keras.Variable(np.ones(1, np.float32))
    opt = Adam(1)  # an integer is a number
    opt.learning_rate = 0.5
    opt.apply([ops.ones(1)], [w])
    np.testing.assert_allclose(w.numpy(), 0.5, rtol=1e-5)
    for rate in (
        schedules.ExponentialDecay(0.1, 1, 0.5),
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5),
    ):
        w.assign(np.ones(1, np.float32))
        opt = Adam.from_config(Adam(rate).get_config())
        for _ in range(2):
            opt.apply([ops.ones(1)], [w])
        np.testing.assert_allclose(w.numpy(), 1 - 0.1 - 0.05, rtol=1e-5)
    rates, w = iter([0.1, 0.3]), keras.Variable(np.ones(1, np.float32))
    opt = Adam(lambda: next(rates))
    for _ in range(2):
        opt.apply([ops.ones(1)], [w])
    np.testing.assert_allclose(w.numpy(), 0.6, rtol=1e-5)


# --- what Keras puts around an optimizer ---------------------------------------------------------


@on(*TRAINING)
def test_loss_scale_and_mixed_precision() -> None:
    """The layers compute in float16, the variables are float32, and the loss is scaled."""
    nets = []
    for kind in (Adam, Theirs):
        inner = partial(kind, 0.01, clipvalue=0.05)
        net = compiled(
            lambda inner=inner: keras.optimizers.LossScaleOptimizer(
                inner(), dynamic_growth_steps=2
            ),
            keras.DTypePolicy("mixed_float16"),
        )
        fit(net)
        nets.append(net)
    same_training(*nets, rtol=1e-4, atol=1e-4)
    before = host(nets[0].weights)
    nets[0].fit(X * np.inf, Y, batch_size=8, verbose=0)  # steps that are skipped
    same(nets[0].weights, before, rtol=0, atol=0)
    assert int(nets[0].optimizer.iterations) == 6

    net = compiled(partial(Adam, 0.05), keras.DTypePolicy("mixed_bfloat16"))
    losses = fit(net, 4).history["loss"]
    assert losses[-1] < losses[0]


@on(*TRAINING)
def test_float16_variables_train() -> None:
    optimizer = partial(Adam, 0.05, use_ema=True, gradient_accumulation_steps=2)
    net = compiled(optimizer, "float16")
    losses = fit(net, 8).history["loss"]
    assert {v.dtype for v in net.trainable_variables} == {"float16"}
    assert {v.dtype for v in net.optimizer.variables[2:]} == {"float32"}
    assert losses[-1] < 0.9 * losses[0]


@on(*TRAINING)
def test_callbacks() -> None:
    class Rates(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            rates.append(float(ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    nets = []
    for kind in (Adam, Theirs):
        rates: list[float] = []
        net = compiled(partial(kind, 0.04, use_ema=True, ema_momentum=0.5))
        fit(
            net,
            3,
            validation_data=(X, Y),
            callbacks=[
                keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
                keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=9.0),
                keras.callbacks.SwapEMAWeights(),
                Rates(),
            ],
        )
        nets.append(net)
        np.testing.assert_allclose(rates, [0.02, 0.005, 0.00125], rtol=1e-6)
    same_training(*nets)


@on(*TRAINING)
def test_backup_and_restore() -> None:
    """Killed in the second epoch and started again, training ends on the same bits."""

    class Killed(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    never_stopped = compiled(partial(Adam, 0.02))
    fit(never_stopped)
    with tempfile.TemporaryDirectory() as folder:
        backup = keras.callbacks.BackupAndRestore(folder)
        with raises(KeyboardInterrupt):
            fit(compiled(partial(Adam, 0.02)), callbacks=[backup, Killed()])
        again = compiled(partial(Adam, 0.02))
        fit(again, callbacks=[keras.callbacks.BackupAndRestore(folder)])
    assert int(again.optimizer.iterations) == 6
    same_training(again, never_stopped, rtol=0, atol=0)


@on(*TRAINING)
def test_multi_optimizer() -> None:
    if IS_OLD:
        pytest.skip("this Keras has no OptimizerMap")
    nets = []
    for kind in (Adam, Theirs):
        net = model()
        optimizers = keras.optimizers.OptimizerMap(
            kind(0.01), {".*bias": kind(0.1, clipnorm=0.1), ".*_1/kernel": keras.optimizers.SGD()}
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        jit_compile = "auto" if BACKEND == "jax" or kind is Adam else False  # see `compiled`
        net.compile(keras.optimizers.MultiOptimizer(optimizers), loss, jit_compile=jit_compile)
        fit(net)
        nets.append(net)
    same(nets[0].weights, nets[1].weights)
    same(nets[0].optimizer.variables, nets[1].optimizer.variables)


@on("tensorflow")
def test_mirrored_strategy() -> None:
    """Two replicas with half of a batch each do what one does with all of it."""
    import tensorflow as tf

    settings = {"learning_rate": 0.02, "global_clipnorm": 0.3, "use_ema": True}
    alone = compiled(partial(Adam, **settings), jit_compile=False)
    fit(alone)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for more in ({}, {"gradient_accumulation_steps": 2}):
        with strategy.scope():
            net = compiled(partial(Adam, **settings, **more), jit_compile=False)
        fit(net)
        values = net.trainable_variables[0].value.values
        assert len(values) == 2
        np.testing.assert_array_equal(*[v.numpy() for v in values])
        assert int(net.optimizer._iterations.numpy()) == 6
        if not more:
            same(net.weights, alone.weights)


@on("tensorflow")
def test_checkpoint() -> None:
    """What `tf.train.Checkpoint` wrote for Keras's optimizer, ours reads."""
    import tensorflow as tf

    nets = [compiled(kind) for kind in (Theirs, Adam)]
    fit(nets[0], 1)
    nets[1].optimizer.build(nets[1].trainable_variables)
    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(model=nets[0], optimizer=nets[0].optimizer).save(folder + "/c")
        tf.train.Checkpoint(model=nets[1], optimizer=nets[1].optimizer).restore(
            path
        ).assert_existing_objects_matched()
    same_training(nets[1], nets[0])


@on("jax")
def test_distribution() -> None:
    """On 8 devices as on one; slots lie as the variables do."""
    if IS_OLD:
        pytest.skip("this Keras cannot build the model that is sharded")
    settings = {"learning_rate": 0.02, "global_clipnorm": 0.3, "weight_decay": 0.1, "use_ema": True}
    alone = compiled(partial(Adam, **settings))
    fit(alone)
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"])
    layout = keras.distribution.LayoutMap(mesh)
    layout["dense.*kernel"] = (None, "model")
    for distribution in (
        keras.distribution.DataParallel(),
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"),
    ):
        with distribution.scope():
            net = compiled(partial(Adam, **settings))
            fit(net)
            kernel, momentum = net.trainable_variables[0], net.optimizer._momentums[0]
            assert len(kernel.value.sharding.device_set) == 8
            assert kernel.value.sharding == momentum.value.sharding
            same_training(net, alone)
            # And outside of `fit`: eagerly.
            trained = net.trainable_variables
            net.optimizer.apply([ops.ones_like(v.value) for v in trained], trained)
            assert len(kernel.value.sharding.device_set) == 8


@on("numpy", "torch", "jax")
def test_steps_of_threads() -> None:
    """Stateless ones do not meet; others follow one another, and each has the rate of its count."""
    size, start = 20_000, keras.Variable(np.ones(20_000, np.float32))
    pure = Adam(0.1, amsgrad=True)
    pure.build([start])
    begin = [ops.copy(v.value) for v in pure.variables]

    def stateless(k: int) -> list[Any]:
        values, state = [ops.full((size,), float(k), "float32")], begin
        for i in range(10):
            grads = [ops.full((size,), k * (-1.0) ** i, "float32")]
            values, state = pure.stateless_apply(state, grads, values)
        return [*values, *state]

    expected = [stateless(k) for k in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(stateless, range(1, 5)), expected, strict=True):
            same(found, alone, rtol=0, atol=0)
    same([start], [np.ones(size)])

    class Waiting(keras.optimizers.schedules.ExponentialDecay):  # type: ignore[misc]
        def __call__(self, step: Any) -> Any:
            time.sleep(0.001)  # in which others make steps
            return super().__call__(step)

    g, results = ops.ones(2), []
    for threads in (4, 1):
        w, opt = keras.Variable(np.ones(2, np.float32)), Adam(Waiting(0.1, 1, 0.9))
        opt.build([w])

        def steps(count: int, w: Any = w, opt: Any = opt) -> None:
            for _ in range(count):
                opt.apply([g], [w])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(steps, [20 // threads] * threads))
        assert int(opt.iterations) == 20
        results.append([w, *opt.variables])
    same(*results, rtol=0, atol=0)


@on()
def test_constraints_and_overwriting() -> None:
    w = keras.Variable(np.array([1.0, -2.0], np.float32))
    w.constraint = keras.constraints.NonNeg()
    Adam(0.1).apply([ops.ones(2)], [w])
    np.testing.assert_allclose(w.numpy(), [0.9, 0.0], rtol=1e-5)
    for settings in ({}, {"gradient_accumulation_steps": 2}, {"use_ema": True}):
        results = []
        for kind in (Adam, Theirs):
            w, scale = made([np.ones(2, np.float32)] * 2)
            scale.overwrite_with_gradient = True
            opt, seen = kind(0.1, **settings), []
            for value in ([5.0, 1.0], [2.0, 3.0], [4.0, 0.5]):
                opt.apply([ops.ones(2), ops.convert_to_tensor(np.float32(value))], [w, scale])
                seen += [w.numpy().copy(), scale.numpy().copy()]
            results.append([*seen, *host(opt.variables)])
        same(*results)


@on(*TRAINING)
def test_sparse_gradients() -> None:
    """With repeated ids: what the dense gradient gives."""
    ends = []
    for sparse in (True, False):
        table = keras.Variable(np.ones((5, 2), np.float32))
        opt = Adam(0.1, clipnorm=0.5)
        for ids in ([1, 1, 3], [0, 2, 2], [1, 1, 1]):
            values = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
            dense = np.zeros((5, 2), np.float32)
            np.add.at(dense, ids, values)
            opt.apply([sparse_tensor(values, ids) if sparse else tensors([dense])[0]], [table])
        ends.append(table.numpy())
    np.testing.assert_allclose(*ends, rtol=1e-6)
    ends = []
    ids = np.array([[1, 1, 2], [5, 0, 1]])
    for sparse in (True, False):
        begin()
        first = keras.layers.Embedding(6, 3) if sparse else keras.layers.Dense(3, use_bias=False)
        net = keras.Sequential([keras.Input((3,) if sparse else (3, 6)), first])
        first.set_weights([np.arange(18, dtype=np.float32).reshape(6, 3)])
        net.compile(Adam(0.1), "mse", jit_compile=False)
        for _ in range(3):
            net.train_on_batch(ids if sparse else np.eye(6)[ids], np.zeros((2, 3, 3), np.float32))
        ends.append(net)
    same(ends[0].weights, ends[1].weights)


def sparse_tensor(values: Any, ids: list[int]) -> Any:
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values), tf.constant(ids), (5, 2))
    if BACKEND == "jax":
        from jax.experimental import sparse

        return sparse.BCOO((values, np.array(ids)[:, None]), shape=(5, 2))
    import torch

    return torch.sparse_coo_tensor([ids], torch.tensor(values), (5, 2), check_invariants=False)


# --- the surface of an optimizer -----------------------------------------------------------------


@on("jax", "torch", "numpy")
def test_stateless_apply() -> None:
    settings = {"learning_rate": 0.1, "use_ema": True, "clipvalue": 0.5}
    params = made([np.ones((2, 3), np.float32), np.zeros(4, np.float32)])
    opt, twin = Adam(**settings), made([p.numpy() for p in params])
    opt.build(params)
    stateful = Adam(**settings)
    stateful.build(twin)
    given = [[p.value for p in params], [v.value for v in opt.variables]]
    before = [host(each) for each in given]
    values, state = given
    for step in range(3):
        g = gradients(step, shapes=[(2, 3), (4,)])
        values, state = opt.stateless_apply(state, tensors(g), values)
        stateful.apply(tensors(g), twin)
    for each, held in zip(given, before, strict=True):
        same(each, held, rtol=0, atol=0)
    same(params, before[0], rtol=0, atol=0)
    same(values, twin)
    same(state, stateful.variables)
    # And the optimizer's own state is found again.
    opt.apply(tensors(gradients(0, shapes=[(2, 3), (4,)])), params)
    assert int(opt.iterations) == 1 and not np.array_equal(params[0].numpy(), before[0][0])


@on()
def test_values_assigned_between_steps_count() -> None:
    w = keras.Variable(np.ones(2, np.float32))
    opt = Adam(0.1)
    opt.apply([ops.ones(2)], [w])
    w.assign(ops.full((2,), 5.0))
    saved = [v.numpy() for v in opt.variables]
    opt.set_weights([np.zeros_like(v) if i != 1 else v for i, v in enumerate(saved)])
    opt.apply([ops.ones(2)], [w])
    np.testing.assert_allclose(w.numpy(), 4.9, rtol=1e-5)
    same(opt.variables, saved)
    opt.set_weights([np.zeros_like(v) if i != 1 else v for i, v in enumerate(saved)])
    opt.apply([ops.ones(2)], [w])
    same(opt.variables, saved)
    opt.weight_decay, opt.clipnorm = 1.0, 0.5
    opt.clipnorm, opt.clipvalue = None, 0.5
    opt.apply([ops.ones(2)], [w])
    assert w.numpy()[0] < 4.8 - 0.4


@on()
def test_update_step_and_subclasses() -> None:
    class Halved(Adam):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient, variable, learning_rate / 2)

    w = keras.Variable(np.ones(2, np.float32))
    opt = Halved(0.1, weight_decay=1.0, name="halved")
    opt.apply([ops.ones(2)], [w])
    np.testing.assert_allclose(w.numpy(), 1 - 0.1 - 0.05, rtol=1e-5)
    assert int(opt.iterations) == 1


def recording(kind: Any, name: str, calls: list[str]) -> Any:
    """A subclass that notes when this method is called."""

    def method(self: Any, *arguments: Any, **settings: Any) -> Any:
        calls.append(name)
        return getattr(super(made_of, self), name)(*arguments, **settings)

    made_of = type("Recording", (kind,), {name: method})
    return made_of


@on()
def test_what_is_overridden_of_keras_is_called() -> None:
    """Whatever methods Keras has by now: a subclass's own is called where Keras calls it."""
    settings = {"weight_decay": 0.1, "clipnorm": 0.5, "gradient_accumulation_steps": 2}
    settings |= {"use_ema": True, "ema_overwrite_frequency": 1}
    names = [n for n in dir(Theirs) if inspect.isfunction(getattr(Theirs, n)) and n[:2] != "__"]

    def end(kind: Any, *names: str) -> tuple[list[Any], set[str]]:
        calls: list[str] = []
        for name in names:
            kind = recording(kind, name, calls)
        w = keras.Variable(np.ones(2, np.float32))
        opt = kind(0.1, **settings)
        for _ in range(2):
            opt.apply([ops.ones(2)], [w])
        opt.finalize_variable_values([w])
        return [w, *opt.variables], set(calls)

    theirs, called = end(Theirs, *names)
    assert len(called) >= 18 and {"update_step", "assign_sub", "_use_weight_decay"} <= called
    # One by one, as each alone decides how we make a step, and all that Keras does not call.
    for overridden in [*([name] for name in sorted(called)), [n for n in names if n not in called]]:
        ours, found = end(Adam, *overridden)
        assert found >= called & {*overridden}, overridden
        same(ours, theirs)


@on()
def test_an_override_on_the_object() -> None:
    w = keras.Variable(np.ones(2, np.float32))
    opt = Adam(0.1)
    opt.apply([ops.ones(2)], [w])
    opt._clip_gradients = lambda grads: [-g for g in grads]
    for _ in range(4):
        opt.apply([ops.ones(2)], [w])
    assert w.numpy()[0] > 0.9


@on()
def test_missing_gradients_and_averages() -> None:
    a, b = params = made([np.ones(2, np.float32)] * 2)
    opt = Adam(0.1, use_ema=True, ema_momentum=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.apply([ops.ones(2), None], params)
    assert "w1" in str(caught[-1].message)
    assert a.numpy()[0] < 1.0 == b.numpy()[0]
    opt.apply([ops.ones(2), ops.ones(2)], params)
    opt.finalize_variable_values(params)
    np.testing.assert_allclose(a.numpy(), 0.85, rtol=1e-5)
    with raises(ValueError, "No gradients"):
        opt.apply([None, None], params)
    fresh = Adam(use_ema=True)
    fresh.build(params)
    with raises(ValueError, "before the first step"):
        fresh.finalize_variable_values(params)


@on()
def test_bad_input_changes_nothing() -> None:
    for wrong in ({"beta_1": 1.5}, {"epsilon": -1.0}, {"clipnorm": -3.0}, {"learning_rate": -1.0}):
        with raises(ValueError, next(iter(wrong))):
            Adam(**wrong)
    with raises(ValueError, "clip"):
        Adam(clipnorm=1.0, clipvalue=1.0)
    with raises(ValueError, "momentum_decay"):
        Adam(momentum_decay=0.5)
    kernel, bias = made([np.ones((2, 3), np.float32), np.ones(3, np.float32)])
    opt = Adam(0.1)
    opt.build([kernel, bias])
    ones = ops.ones((2, 3))
    for error, grads, given in (
        (ValueError, [ones, ops.ones(2)], [kernel, bias]),
        (TypeError, [ones, "no array"], [kernel, bias]),
        (ValueError, [ones], [kernel, bias]),
        (ValueError, [ones, ones], [kernel, kernel]),
        (ValueError, [ones, ones], [kernel, keras.Variable(np.ones((2, 3), np.float32))]),
    ):
        with raises(error):
            opt.apply(grads, given)
        assert np.all(kernel.numpy() == 1.0) and int(opt.iterations) == 0
        assert all(np.all(v.numpy() == 0) for v in opt._momentums)
    with raises(ValueError, "build"):
        Adam().apply([ones])
    with raises(TypeError, "int32"):
        Adam().build([keras.Variable(np.ones(2), dtype="int32", trainable=False)])
    with raises(ValueError, "use_ema", "cannot be changed"):
        opt.use_ema = True
        opt.apply([ones, ops.ones(3)], [kernel, bias])


# --- nothing to train, and builds that fail -------------------------------------------------------


@on()
def test_a_step_of_nothing() -> None:
    opt = Adam(0.1, use_ema=True)
    opt.build([])
    opt.apply([], [])
    opt.finalize_variable_values([])
    given = [v.value for v in opt.variables]
    variables, state = opt.stateless_apply(given, [], [])
    assert variables == [] and all(a is b for a, b in zip(state, given, strict=True))
    assert not opt.built and int(opt.iterations) == 0
    w = keras.Variable(np.ones(2, np.float32))
    opt.apply([ops.ones(2)], [w])
    np.testing.assert_allclose(w.numpy(), 0.9, rtol=1e-5)
    assert opt.stateless_apply([v.value for v in opt.variables], [], [])[0] == []


def unfrozen(net: Any) -> Any:
    net.trainable = True
    net.train_function = None
    return net


@on(*TRAINING)
def test_a_model_with_nothing_to_train() -> None:
    """It is fit, saved and loaded as others are, and once it is unfrozen it trains."""
    optimizer = partial(Adam, 0.02, use_ema=True)
    expected = compiled(optimizer, jit_compile=False)
    fit(expected)
    for wrapped in (False, True):
        kind = (lambda: keras.optimizers.LossScaleOptimizer(optimizer())) if wrapped else optimizer
        net = compiled(kind, jit_compile=False)
        net.trainable = False
        before = host(net.weights)
        # On TensorFlow Keras does not build an optimizer for nothing.
        callbacks = [keras.callbacks.SwapEMAWeights()] if BACKEND != "tensorflow" else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's on PyTorch and TensorFlow: nothing to train
            fit(net, 1, validation_data=(X, Y), callbacks=callbacks)
            net.train_on_batch(X, Y)
            net.evaluate(X, Y, verbose=0)
            with tempfile.TemporaryDirectory() as folder:
                net.save_weights(f"{folder}/model.weights.h5")
                net.load_weights(f"{folder}/model.weights.h5")
                for suffix in ("keras",) if wrapped else ("keras", "h5"):
                    net.save(f"{folder}/model.{suffix}")
                    again = keras.saving.load_model(f"{folder}/model.{suffix}")
                    assert again.predict(X, verbose=0).shape == (24, 3)
                    fit(again, 1)
                    same(again.weights, before, rtol=0, atol=0)
        inner = net.optimizer.inner_optimizer if wrapped else net.optimizer
        assert not inner.built and int(inner.iterations) == 0
        same(net.weights, before, rtol=0, atol=0)
        if not wrapped:  # Keras's LossScaleOptimizer is built on what there is once
            fit(unfrozen(net))
            same(net.weights, expected.weights, rtol=0, atol=0)
    expected.trainable = False  # after the build
    expected.train_function = None
    before = host(expected.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(expected, 1)
    same(expected.weights, before, rtol=0, atol=0)


@on(*TRAINING)
def test_h5() -> None:
    """The optimizer of a model saved whole as .h5 goes on, set before its build by Keras."""
    net = compiled(partial(Adam, 0.02))
    fit(net, 1)
    with tempfile.TemporaryDirectory() as folder:
        net.save(f"{folder}/model.h5")
        again = keras.saving.load_model(f"{folder}/model.h5")
    assert type(again.optimizer) is Adam and not again.optimizer.built
    same(again.weights, net.weights, rtol=0, atol=0)
    for each in (again, net):
        fit(each, 1)
    same(again.weights, net.weights)


@on(*TRAINING)
def test_saved_and_loaded() -> None:
    """In the middle of an accumulation: goes on as if it had not stopped, wherever it is loaded."""
    settings = {"use_ema": True, "gradient_accumulation_steps": 2, "amsgrad": True}

    def net(optimizer: Any) -> Any:
        begin()
        made = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(4, "tanh", name="a"),
                keras.layers.Dense(3, name="b"),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        made.compile(optimizer, loss, jit_compile="auto" if BACKEND == "jax" else False)
        return made

    class Save(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 0:
                omniadam.save(self.model.optimizer, path)
                kept.append(self.model.get_weights())

    with tempfile.TemporaryDirectory() as folder:
        path, kept = f"{folder}/adam.safetensors", []
        one = net(Adam(0.02, **settings))
        fit(one, 2, callbacks=[Save()])  # of three steps each
        after = Adam(0.5, **settings)
        omniadam.load(path, after)
        within = net(Adam(0.5, **settings))
        fit(within, 1)  # its step is compiled
        within.set_weights(kept[0])
        omniadam.load(path, within.optimizer)
        by_file = f"{folder}/a.weights.h5"
        for other in (net(omniadam.from_file(path)), net(after), within):
            other.set_weights(kept[0])
            assert int(other.optimizer._iterations) == 3
            fit(other, 1)
            same(other.weights, one.weights, rtol=0, atol=0)
            same(other.optimizer.variables, one.optimizer.variables, rtol=0, atol=0)
            assert omniadam.state_hash(other.optimizer) == omniadam.state_hash(one.optimizer)
        # Keras's own file, into an optimizer that is not built.
        one.save_weights(by_file)
        last = net(Adam(0.5, **settings))
        last.load_weights(by_file)
        for each in (one, last):
            fit(each, 1)
        same(last.weights, one.weights, rtol=0, atol=0)
        same(last.optimizer.variables, one.optimizer.variables, rtol=0, atol=0)
        # A layer more: the build is taken back, and the model is fit with another optimizer.
        begin()
        more = keras.Sequential(
            [keras.Input((5,)), *(keras.layers.Dense(3, name=name) for name in "abc")]
        )
        opt = omniadam.from_file(path)
        more.compile(opt, keras.losses.SparseCategoricalCrossentropy(), jit_compile=False)
        with raises(ValueError, "'c/kernel'", "Different: average of 'a/kernel'"):
            more.fit(X, Y, verbose=0)
        assert not opt.built and int(opt._iterations) == 3


REFUSED: dict[str, list[Any]] = {
    "weight_decay": [-1.0, "a"],
    "clipnorm": [-1.0, 0.0],
    "clipvalue": [float("nan"), True],
    "global_clipnorm": [-1.0],
    "use_ema": [3],
    "ema_momentum": [1.5],
    "ema_overwrite_frequency": [0, 2.5],
    "loss_scale_factor": [0.0],
    "gradient_accumulation_steps": [1],
    "beta_1": [1.0, lambda: 2.0],
    "beta_2": [-0.5],
    "epsilon": [-1.0, lambda: "a"],
    "amsgrad": ["yes"],
    "epsilon_hat": ["no"],
    "learning_rate": [lambda: -1.0, lambda: 1 / 0],
}


@on()
def test_the_epsilon_of_pytorch() -> None:
    """In a step, in a config, in a file; and where a user's override makes the step."""
    settings: dict[str, Any] = {"learning_rate": 0.02, "epsilon": 0.01, "epsilon_hat": False}
    start = variables(shapes=SMALL_SHAPES)

    class Clipping(Adam):
        def _clip_gradients(self, grads: Any) -> Any:
            return super()._clip_gradients(grads)

    for kind in (Adam, AdamW, Clipping):
        decay = 0.5 if kind is AdamW else None
        params, opt = made(start), kind(weight_decay=decay, **settings)
        reference = Reference(start, weight_decay=decay, **settings)
        for step in range(5):
            given = gradients(step, SMALL_SHAPES)
            opt.apply(list(map(ops.convert_to_tensor, given)), params)
            reference.step(given)
            if step == 1:
                config = opt.get_config()
                assert config["epsilon_hat"] is False
                again = kind.from_config(config)
                again.build(params)
                again.set_weights([ops.convert_to_numpy(v) for v in opt.variables])
                opt = again
        assert_close([ops.convert_to_numpy(w) for w in params], reference)
        with raises(ValueError, "`epsilon_hat` decides what the optimizer's state means"):
            opt.epsilon_hat = True
            opt.apply(list(map(ops.convert_to_tensor, given)), params)
    assert "epsilon_hat" not in Adam().get_config() | AdamW().get_config()
    assert Adam.from_config(Theirs().get_config()).epsilon_hat

    class Assigning(Adam):
        def assign_sub(self, variable: Any, value: Any) -> None:
            super().assign_sub(variable, value)

    w = made([np.ones(2, np.float32)])
    with raises(ValueError, "Assigning overrides", "`epsilon_hat=False`"):
        Assigning(epsilon_hat=False).apply([ops.ones(2)], w)
    Assigning().apply([ops.ones(2)], w)


@on()
def test_a_setting_refused_at_the_first_step() -> None:
    """Nothing is left of the step or of the build, nor of a setting that was right."""
    fine, twin = keras.Variable(np.ones(2, np.float32)), Adam(0.1)
    twin.apply([ops.ones(2)], [fine])
    for name, values in REFUSED.items():
        for value in values:
            w, opt = keras.Variable(np.ones(2, np.float32)), Adam(0.1)
            setting = "_learning_rate" if name == "learning_rate" else name
            right = getattr(opt, setting)
            opt.weight_decay = 0.5
            setattr(opt, setting, value)
            with raises(Exception):
                opt.apply([ops.ones(2)], [w])
            assert not opt.built and len(opt.variables) == 2, name
            opt.weight_decay = None
            setattr(opt, setting, right)
            opt.apply([ops.ones(2)], [w])
            same([w, *opt.variables], [fine, *twin.variables], rtol=0, atol=0)
    w, other = made([np.ones(2, np.float32)] * 2)
    opt = Adam(0.1)
    with raises(ValueError, "w1"):
        opt.apply([ops.ones(3)], [other])
    opt.apply([ops.ones(2)], [w])  # it has not been built on the other one


@on()
def test_a_build_that_fails() -> None:
    """At whichever state variable: the optimizer is as before, and is built the next time."""
    left = [-1]
    error: BaseException

    class Failing(Adam):
        def add_variable(self, *arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise error
            return super().add_variable(*arguments, **settings)

    settings = {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}
    twins, twin = made([np.ones(2, np.float32)] * 2), Failing(0.1, name="adam", **settings)
    for _ in range(2):
        twin.apply([ops.ones(2)] * 2, twins)
    for failing in range(10):
        params, opt = made([np.ones(2, np.float32)] * 2), Failing(0.1, name="adam", **settings)
        left[0], before = failing, set(vars(opt))
        error = KeyboardInterrupt() if failing % 2 else MemoryError()
        with raises(type(error)):
            opt.apply([ops.ones(2)] * 2, params) if failing % 3 else opt.build(params)
        assert set(vars(opt)) == before and not opt.built and len(opt.variables) == 2
        checkpoint(opt, [])
        for _ in range(2):
            opt.apply([ops.ones(2)] * 2, params)
        same([*params, *opt.variables], [*twins, *twin.variables], rtol=0, atol=0)
        checkpoint(opt, params)


def checkpoint(opt: Any, params: list[Any]) -> None:
    """On TensorFlow: what is saved of an optimizer is restored to another."""
    if BACKEND != "tensorflow":
        return
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(optimizer=opt).save(folder + "/c")
        again = type(opt).from_config(opt.get_config())
        again.build(params)
        tf.train.Checkpoint(optimizer=again).restore(path).assert_consumed()
    same(again.variables, opt.variables, rtol=0, atol=0)
