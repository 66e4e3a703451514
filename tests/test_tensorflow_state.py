"""TensorFlow: constraints of variables, counters that a checkpoint brings, slices of any array."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from omniadam import Adam, schedules  # noqa: E402
from omniadam.backends import tensorflow as backend  # noqa: E402
from omniadam.compat import contrib_keras, optimizer_v2  # noqa: E402
from omniadam.fast import tensorflow as fast  # noqa: E402

v1 = tf.compat.v1
G = np.array([1.0, -1.0, 1.0], np.float32)


@pytest.fixture(autouse=True)
def without_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes a second for each program."""
    monkeypatch.setattr(fast.FastTensorFlow, "jit_compile", False)


# --- constraints ---


def within(w: Any) -> Any:
    return tf.clip_by_value(w, 0.95, 1.02)


def constrained(dtype: str = "float32", constraint: Any = within) -> Any:
    return tf.Variable(tf.ones(3, dtype), constraint=constraint)


def in_function(step: Callable[[], Any]) -> Callable[[], Any]:
    return tf.function(lambda: (step(), tf.constant(1))[1])  # type: ignore[no-any-return]


def by_xla(step: Callable[[], Any]) -> Callable[[], Any]:
    return tf.function(lambda: (step(), tf.constant(1))[1], jit_compile=True)  # type: ignore[no-any-return]


PLACES: dict[str, Any] = {"eager": lambda step: step, "function": in_function, "xla": by_xla}
CONSTRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped and decayed": {"global_clipnorm": 1.0, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "averaged": {"use_ema": True, "ema_overwrite_frequency": 2},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_constraint_is_applied_after_each_step(name: str, place: str) -> None:
    settings = CONSTRAINED[name]
    w, free, opt, other = constrained(), tf.Variable(tf.ones(3)), Adam(0.1, **settings), None
    other = Adam(0.1, **settings)
    step = PLACES[place](lambda: opt.apply([tf.constant(G)], [w]))
    for _ in range(3):
        step()
        other.apply([tf.constant(G)], [free])
        free.assign(within(free))
        np.testing.assert_allclose(w, free, rtol=1e-6)
    assert w.numpy().tolist() == [np.float32(0.95), np.float32(1.02), np.float32(0.95)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_constraint_sees_the_variables_dtype(dtype: str) -> None:
    seen = []
    w = constrained(dtype, lambda w: (seen.append(w.dtype.name), within(w))[1])
    Adam(0.1).apply([tf.constant(G)], [w])
    np.testing.assert_allclose(w.numpy().astype(float), [0.95, 1.02, 0.95], atol=0.01)
    assert set(seen) == {dtype}


def test_a_constraint_is_applied_at_micro_steps_too() -> None:
    """As in Keras, which applies them at each call."""
    w, opt = constrained(), Adam(0.1, gradient_accumulation_steps=2)
    w.assign([2.0, 2.0, 2.0])
    opt.apply([tf.constant(G)], [w])
    assert w.numpy().tolist() == [np.float32(1.02)] * 3
    opt.apply([tf.constant(G)], [w])
    np.testing.assert_allclose(w, [0.95, 1.02, 0.95], rtol=1e-6)


def test_only_variables_with_a_gradient_are_constrained() -> None:
    """As in Keras; and the others of the step are as they would be."""
    w, other, opt = constrained(), constrained(), Adam(0.1)
    opt.build([w, other])
    other.assign([2.0, 2.0, 2.0])
    opt.apply([tf.constant(G)], [w])
    assert other.numpy().tolist() == [2.0, 2.0, 2.0]


def test_a_constraint_that_changes_is_seen() -> None:
    bound = [1.5]
    w, opt = constrained(constraint=lambda w: tf.minimum(w, bound[0])), Adam(0.25)
    for bound[0] in (1.2, 1.1, 0.9):
        opt.apply([-tf.ones(3)], [w])
        np.testing.assert_allclose(w, [bound[0]] * 3, rtol=1e-6)


def test_a_constraint_of_numpy() -> None:
    w = constrained(constraint=lambda w: np.clip(w.numpy(), 0.95, 1.02))
    Adam(0.1).apply([tf.constant(G)], [w])
    np.testing.assert_allclose(w, [0.95, 1.02, 0.95], rtol=1e-6)


def test_a_constraint_in_stateless_apply() -> None:
    w, opt = constrained(), Adam(0.1)
    opt.build([w])
    (new,), _ = opt.stateless_apply(opt.variables, [tf.constant(G)], [tf.ones(3)])
    np.testing.assert_allclose(new, [0.95, 1.02, 0.95], rtol=1e-6)
    assert w.numpy().tolist() == [1.0, 1.0, 1.0]


def test_a_constraint_in_a_graph() -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", initializer=np.ones(3, "f"), constraint=within)
        step = Adam(0.1).apply_gradients([(tf.constant(G), w)])
        session.run(v1.global_variables_initializer())
        session.run(step)
        np.testing.assert_allclose(session.run(w), [0.95, 1.02, 0.95], rtol=1e-6)


def test_a_constraint_on_replicas() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        w, opt = constrained(), Adam(0.1)
    tf.function(lambda: strategy.run(lambda: opt.apply([tf.constant(G)], [w])))()
    np.testing.assert_allclose(w, [0.95, 1.02, 0.95], rtol=1e-6)


WRONG = {
    "shape": lambda w: w[:2],
    "scalar": tf.reduce_sum,
    "dtype": lambda w: tf.cast(w, tf.float64),
    "integers": lambda w: tf.cast(w, tf.int32),
    "nothing": lambda w: None,
    "text": lambda w: "w",
}


@pytest.mark.parametrize("place", ["eager", "function"])
@pytest.mark.parametrize("kind", [Adam, optimizer_v2.Adam])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_constraint_may_return(wrong: str, kind: Any, place: str) -> None:
    constraint: list[Any] = [within]
    w, other, opt = constrained(constraint=lambda w: constraint[0](w)), constrained(), kind(0.1)
    pairs = [(tf.constant(G), other), (tf.constant(G), w)]
    opt.apply_gradients(pairs)
    before = [w.numpy(), other.numpy(), *opt.get_weights()]
    constraint[0] = WRONG[wrong]
    with pytest.raises(ValueError, match="must return its shape"):
        PLACES[place](lambda: opt.apply_gradients(pairs))()
    for now, then in zip([w, other, *opt.get_weights()], before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_no_constraint_of_get_updates_may_return(library: str) -> None:
    w: Any = np.ones(3)
    if library == "torch":
        w = pytest.importorskip("torch").ones(3, requires_grad=True)
    opt = contrib_keras.Adam(0.1)
    (update,) = opt.get_updates([w], {id(w): lambda w: w[:2]}, lambda w: (w * w).sum())
    with pytest.raises(ValueError, match="must return its shape"):
        update()
    assert w.tolist() == [1.0, 1.0, 1.0]
    assert not any(np.any(x) for x in opt.get_weights())


@pytest.mark.parametrize("how", ["constrained", "traced"])
def test_an_interrupted_step_is_made_or_not(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it comes in what is done from Python."""
    w, other, opt = constrained(), constrained(), Adam(0.1)
    if how == "traced":
        w, other = (tf.Variable(tf.ones(3)) for _ in range(2))
    gradients = [tf.constant(G), tf.constant(G)]
    opt.apply(gradients, [w, other])
    before = [w.numpy(), other.numpy(), *opt.get_weights()]
    store, left = backend.TensorFlow.store, [0]

    def interrupted(self: Any, variable: Any, value: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return store(self, variable, value)

    monkeypatch.setattr(backend.TensorFlow, "store", interrupted)
    for left[0] in range(1, 8 if how == "constrained" else 1):
        with pytest.raises(KeyboardInterrupt):
            opt.apply(gradients, [w, other])
        for now, then in zip([w, other, *opt.get_weights()], before, strict=True):
            np.testing.assert_array_equal(now, then)
    opt.apply(gradients, [w, other])
    assert opt.iterations == 2


# --- checkpoints ---


def saved(path: Path, rate: Any = 0.1) -> str:
    w, opt = tf.Variable(tf.ones(3)), Adam(rate)
    for _ in range(3):
        opt.apply([tf.constant(G)], [w])
    return str(tf.train.Checkpoint(opt=opt, w=w).save(str(path / "c")))


def test_counters_of_a_checkpoint_are_there_before_the_first_step(tmp_path: Path) -> None:
    path = saved(tmp_path)
    w, opt = tf.Variable(tf.ones(3)), Adam(0.5)
    opt.learning_rate = 0.25  # and is overwritten
    status = tf.train.Checkpoint(opt=opt, w=w).restore(path)
    status.expect_partial()
    assert opt.iterations == 3 and opt.learning_rate == 0.1
    assert opt.get_config()["learning_rate"] == 0.1 and opt.get_weights()[0] == 3
    opt.learning_rate = 0.01
    assert opt.learning_rate == 0.01
    opt.build([w])
    status.assert_consumed()
    assert opt.iterations == 3 and opt.learning_rate == 0.01
    opt.apply([tf.constant(G)], [w])
    assert opt.iterations == 4 and opt.learning_rate == 0.01
    v, other = tf.Variable(tf.ones(3)), Adam(0.1)
    for i in range(4):
        other.learning_rate = 0.1 if i < 3 else 0.01
        other.apply([tf.constant(G)], [v])
    for one, two in zip([w, *opt.get_weights()], [v, *other.get_weights()], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("of", ["number", "schedule"])
@pytest.mark.parametrize("into", ["number", "schedule"])
def test_schedules_and_checkpoints(of: str, into: str, tmp_path: Path) -> None:
    rate = schedules.ExponentialDecay(0.1, 1, 0.5)
    path = saved(tmp_path, rate if of == "schedule" else 0.1)
    w, opt = tf.Variable(tf.ones(3)), Adam(rate if into == "schedule" else 0.5)
    tf.train.Checkpoint(opt=opt, w=w).restore(path).expect_partial()
    want = 0.1 * 0.5**3 if into == "schedule" else 0.1 if of == "number" else 0.5
    assert opt.iterations == 3
    np.testing.assert_allclose(opt.learning_rate, want, rtol=1e-12)
    opt.apply([tf.constant(G)], [w])
    assert opt.iterations == 4


def test_restored_twice_and_saved_before_the_first_step(tmp_path: Path) -> None:
    path = saved(tmp_path)
    w, opt = tf.Variable(tf.ones(3)), Adam(0.5)
    checkpoint = tf.train.Checkpoint(opt=opt, w=w)
    checkpoint.restore(path).expect_partial()
    opt.learning_rate = 0.2
    checkpoint.restore(path).expect_partial()
    assert opt.iterations == 3 and opt.learning_rate == 0.1


def test_a_checkpoint_into_what_is_then_numpys(tmp_path: Path) -> None:
    w, opt = np.ones(3, np.float32), Adam(0.5)
    tf.train.Checkpoint(opt=opt).restore(saved(tmp_path)).expect_partial()
    opt.apply([G], [w])
    assert opt.iterations == 4 and opt.learning_rate == 0.1 and type(opt.iterations) is int


@pytest.mark.parametrize("carried", [copy.deepcopy, pickle.dumps])
def test_moments_that_wait_are_not_lost_in_a_copy(carried: Any, tmp_path: Path) -> None:
    w, opt = tf.Variable(tf.ones(3)), Adam(0.5)
    tf.train.Checkpoint(opt=opt, w=w).restore(saved(tmp_path)).expect_partial()
    with pytest.raises(ValueError, match="moments wait"):
        carried(opt)
    opt.build([w])
    carried(opt)


def test_a_checkpoint_on_replicas(tmp_path: Path) -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        w, opt = tf.Variable(tf.ones(3)), Adam(0.5)
    status = tf.train.Checkpoint(opt=opt, w=w).restore(saved(tmp_path))
    assert opt.iterations == 3
    opt.learning_rate = 0.01
    step = tf.function(lambda: strategy.run(lambda: opt.apply([tf.constant(G)], [w])))
    step()
    status.expect_partial()
    assert int(opt.iterations) == 4 and float(opt.learning_rate) == 0.01


CENTRAL = """
import numpy as np, tensorflow as tf, tf_keras
import omniadam
from omniadam.compat import optimizer_v2
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
SETTINGS = [{}, {"amsgrad": True}]

def trained(kind, settings):
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"], "CPU:0")
    with strategy.scope():
        w, opt = tf.Variable([1.0, -2.0, 3.0]), kind(0.1, **settings)

    def on_one():
        i = tf.distribute.get_replica_context().replica_id_in_sync_group
        g = (w + 0.0) * (0.25 + 0.5 * tf.cast(i, tf.float32))
        return opt.apply_gradients([(g, w)])

    step = tf.function(lambda: (strategy.run(on_one), 0)[1])
    for _ in range(5):
        step()
    if kind is omniadam.Adam:
        assert int(opt.iterations) == 5
    return w.numpy()

for settings in SETTINGS:
    want = trained(tf_keras.optimizers.legacy.Adam, settings)
    for kind in (omniadam.Adam, optimizer_v2.Adam):
        np.testing.assert_allclose(trained(kind, settings), want, rtol=2e-5)
strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"], "CPU:0")
with strategy.scope():
    w, opt = tf.Variable([1.0, 2.0]), omniadam.Adam(0.1, use_ema=True, global_clipnorm=1.0)
tf.function(lambda: strategy.run(lambda: opt.apply([tf.fill([2], 1e20)], [w])))()
np.testing.assert_allclose(w, [0.9, 1.9], rtol=1e-5)
print("all is well")
"""


@pytest.mark.needs("tf_keras")
def test_central_storage(tmp_path: Path) -> None:
    """The numbers are those of the original."""
    script = tmp_path / "script.py"
    script.write_text(CENTRAL, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert "all is well" in done.stdout, done.stderr


# --- slices ---

VALUES = {
    "array": np.array,
    "list": np.ndarray.tolist,
    "tensor": tf.constant,
    "variable": tf.Variable,
}
INDICES: dict[str, Any] = {
    "array": np.array,
    "int32": lambda ids: np.array(ids, np.int32),
    "uint8": lambda ids: np.array(ids, np.uint8),
    "list": list,
    "tuple": tuple,
    "tensor": tf.constant,
}


@pytest.mark.parametrize("ids", INDICES)
@pytest.mark.parametrize("of", VALUES)
@pytest.mark.parametrize("kind", [Adam, optimizer_v2.Adam])
def test_slices_of_anything_that_holds_numbers(kind: Any, of: str, ids: str) -> None:
    rows, where = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32), [1, 1, 3]
    w, v, opt, other = (
        tf.Variable(tf.ones((4, 2))),
        tf.Variable(tf.ones((4, 2))),
        kind(0.1),
        kind(0.1),
    )
    dense = np.zeros((4, 2), np.float32)
    np.add.at(dense, where, rows)
    for i in range(2):
        values = VALUES[of](rows)
        if i and of == "list":
            values = tuple(map(tuple, values))
        opt.apply_gradients([(tf.IndexedSlices(values, INDICES[ids](where), (4, 2)), w)])
        other.apply_gradients([(tf.constant(dense), v)])
    np.testing.assert_array_equal(w, v)


@pytest.mark.parametrize("ids", [[0.0, 1.0], ["a", "b"], [0, 4], [-1, 0], [[0], [1]], [0, 1, 2]])
def test_slices_whose_indices_are_wrong(ids: Any) -> None:
    w, opt = tf.Variable(tf.ones((4, 2))), Adam(0.1)
    with pytest.raises((TypeError, ValueError), match=r"ind[ie]"):
        opt.apply([tf.IndexedSlices(np.ones((2, 2)), ids, (4, 2))], [w])
    assert w.numpy().tolist() == np.ones((4, 2)).tolist() and not opt.built


# --- averages ---


@pytest.mark.parametrize("place", ["function", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averages_in_a_function(dtype: str, place: str) -> None:
    w, opt = tf.Variable(tf.ones(3, dtype)), Adam(0.1, use_ema=True)
    opt.build([w])
    end = PLACES[place](lambda: opt.finalize_variable_values([w]))
    end()
    assert w.numpy().tolist() == [1.0, 1.0, 1.0]  # there is no average yet
    for _ in range(2):
        opt.apply([tf.constant(G)], [w])
    end()
    (average,) = [v for name, v in opt.named_variables().items() if "average" in name]
    np.testing.assert_array_equal(w, tf.cast(average, dtype))


# --- norms ---

CLIPS = ("clipnorm", "global_clipnorm")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", [1e20, 1e-30])
def test_norms_neither_overflow_nor_underflow(size: float, clip: str, place: str) -> None:
    w, opt = tf.Variable(tf.ones(300)), Adam(0.1, **{clip: size / 10})
    g = tf.constant(np.full(300, size, np.float32))
    PLACES[place](lambda: opt.apply([g], [w]))()
    want = 0.1 * size / 10 / np.sqrt(300)
    np.testing.assert_allclose(opt.get_weights()[2].astype(float), want, rtol=1e-5)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("form", ["xla", "parts", "bfloat16", "sparse", "accumulated", "replicas"])
def test_a_large_norm(form: str, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {clip: 1.0}
    if form in ("xla", "parts"):
        monkeypatch.setattr(fast.FastTensorFlow, "jit_compile", True)
    if form == "parts":
        monkeypatch.setattr(fast, "PART", 8)
    if form == "accumulated":
        settings["gradient_accumulation_steps"] = 2
    dtype = "bfloat16" if form == "bfloat16" else "float32"
    g: Any = tf.fill([20, 2], tf.constant(1e20, dtype))
    if form == "sparse":
        g = tf.IndexedSlices(g, tf.range(20), (20, 2))
    strategy = tf.distribute.MirroredStrategy(["CPU:0"]) if form == "replicas" else None
    with strategy.scope() if strategy else tf.init_scope():
        w, other = (tf.Variable(tf.ones((20, 2), dtype)) for _ in range(2))
        opt = Adam(0.1, **settings)

    def step() -> None:
        opt.apply([g, g], [w, other])

    for _ in range(2 if form == "accumulated" else 1):
        if strategy:
            tf.function(lambda: strategy.run(step))()
        else:
            step()
    want = 0.1 / np.sqrt(40 if clip == "clipnorm" else 80)
    momentum = opt.named_variables()["Variable_momentum"]
    np.testing.assert_allclose(momentum.numpy(), np.full((20, 2), want), rtol=1e-4)
    np.testing.assert_allclose(w.numpy().astype(float), 0.9, rtol=1e-2)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_derivative_of_a_clipped_step_at_zero(clip: str) -> None:
    opt, w = Adam(0.1, **{clip: 1.0}), tf.Variable(tf.ones(2))
    opt.build([w])
    for x in (0.0, 0.5):
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            (new,), _ = opt.stateless_apply(opt.variables, [tf.stack([x, x])], [w.read_value()])
            loss = tf.reduce_sum(new)
        assert np.isfinite(tape.gradient(loss, x).numpy())


@pytest.mark.parametrize("form", ["dense", "values", "indices"])
def test_what_is_masked(form: str) -> None:
    w, opt = tf.Variable(tf.ones((2, 2))), Adam(0.1)
    g, ids = np.ma.masked_array(np.ones((2, 2)), np.eye(2)), np.ma.masked_array([0, 1], [1, 0])
    slices = tf.IndexedSlices(
        *((g, [0, 1]) if form == "values" else (np.ones((2, 2)), ids)), (2, 2)
    )
    with pytest.raises(TypeError, match="must not be masked"):
        opt.apply([g if form == "dense" else slices], [w])
    assert w.numpy().tolist() == np.ones((2, 2)).tolist()


# --- what is compiled ---

CHANGING: dict[str, tuple[Any, dict[str, Any], Callable[[int], float]]] = {
    "weight_decay": (Adam, {"weight_decay": 0.1}, lambda i: 0.01 * i),
    "clipnorm": (Adam, {"clipnorm": 1.0}, lambda i: 0.1 * i),
    "global_clipnorm": (Adam, {"global_clipnorm": 1.0}, lambda i: 0.1 * i),
    "clipvalue": (Adam, {"clipvalue": 1.0}, lambda i: 0.1 * i),
    "ema_momentum": (Adam, {"use_ema": True}, lambda i: 0.9 + 0.01 * i),
    "loss_scale_factor": (Adam, {"loss_scale_factor": 2.0}, lambda i: 2.0**i),
    "beta_1": (Adam, {}, lambda i: 0.9 - 0.01 * i),
    "epsilon": (Adam, {}, lambda i: 1e-7 * i),
    "learning_rate": (Adam, {}, lambda i: 0.1 * i),
    "lr": (optimizer_v2.Adam, {}, lambda i: 0.1 * i),
    "decay": (optimizer_v2.Adam, {"decay": 0.1}, lambda i: 0.1 * i),
    "beta_2": (optimizer_v2.Adam, {}, lambda i: 0.99 - 0.01 * i),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_setting_that_changes_at_each_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is an argument of what is compiled, once it has changed."""
    compiled = []
    monkeypatch.setattr(
        fast.TensorFlowStep,
        "_compile",
        lambda self, *, compile=fast.TensorFlowStep._compile, **given: (
            compiled.append(given),
            compile(self, **given),
        )[1],
    )
    kind, settings, value = CHANGING[name]
    w, v, opt = tf.Variable(tf.ones(3)), tf.Variable(tf.ones(3)), kind(0.1, **settings)
    other = kind(0.1, **settings)
    for i in range(1, 7):
        setattr(opt, name, value(i))
        setattr(other, name, value(i))
        opt.apply_gradients([(tf.constant(G), w)])
        before = len(compiled)
        tf.function(lambda: (other.apply_gradients([(tf.constant(G), v)]), tf.constant(0))[1])()
        assert len(compiled) == before <= 3
        np.testing.assert_allclose(w, v, rtol=1e-5)


def test_many_sets_of_variables_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ws, opt = [tf.Variable(tf.ones(1)) for _ in range(40)], Adam(0.1)
    opt.build(ws)
    compile, compiled = fast.TensorFlowStep._compile, []

    def noted(self: Any, **given: Any) -> Any:
        compiled.append(self)
        return compile(self, **given)

    monkeypatch.setattr(fast.TensorFlowStep, "_compile", noted)
    for _ in range(2):
        for w in ws:
            opt.apply([tf.ones(1)], [w])
    assert len(compiled) == len(ws)


@pytest.mark.parametrize("kind", [Adam, optimizer_v2.Adam])
def test_state_is_not_read_in_a_function(kind: Any) -> None:
    w = tf.Variable([1.0, 2.0])
    opt = kind(0.1)
    opt.apply_gradients([(tf.ones(2), w)])

    @tf.function
    def step() -> None:
        opt.get_weights()

    with pytest.raises(ValueError, match=r"cannot be read inside a tf\.function"):
        step()
    assert opt.get_weights()[0] == 1
