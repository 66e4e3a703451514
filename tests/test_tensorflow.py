"""TensorFlow: variables eagerly, in functions, in graphs of TensorFlow 1, and on replicas.

An eager step is compiled: as TensorFlow's own operations ("graph"), by XLA as a whole ("xla"), or,
where variables are large, in parts ("parts"). What has no mode in its name runs as "graph", since
XLA takes a second for each set of settings.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from tensorflow.python.ops import control_flow_util as xla_contexts  # noqa: E402

import omniadam  # noqa: E402
from cases import (  # noqa: E402
    BEYOND_KERAS,
    CASES,
    PART,
    SMALL_SHAPES,
    STEPS,
    WHOLE,
    Case,
    assert_close,
    gradients,
    sparse_gradient,
    variables,
    with_missing,
)
from omniadam import Adam, AdamW, IndexedSlices, Optimizer, schedules  # noqa: E402
from omniadam.backends import tensorflow as plain  # noqa: E402
from omniadam.fast import tensorflow as fast  # noqa: E402
from reference import Array  # noqa: E402

EVERYTHING = list(CASES)[-1]  # the case with all settings at once
HALVES = ("float16", "bfloat16")
MODES = ("graph", "xla", "parts")
HERE = Path(__file__).parent

cached_gradients = cache(gradients)


@pytest.fixture(autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen = str(getattr(request, "param", "graph"))
    monkeypatch.setattr(fast.FastTensorFlow, "jit_compile", chosen != "graph")
    if chosen == "parts":
        monkeypatch.setattr(fast, "PART", 8)
    return chosen


in_every_mode = pytest.mark.parametrize("mode", MODES, indirect=True)


def made(values: Sequence[Array]) -> list[Any]:
    return [tf.Variable(v, name=f"w{i}") for i, v in enumerate(values)]


def tensors(values: Sequence[Any]) -> list[Any]:
    return [None if v is None else tf.constant(v) for v in values]


def array(value: Any) -> Array:
    """bfloat16 as float32."""
    value = value.numpy()
    return np.asarray(value, np.float32 if value.dtype.name == "bfloat16" else None)


def assert_same(one: Any, other: Any) -> None:
    """To the bit."""
    one, other = (x.numpy() if hasattr(x, "numpy") else np.asarray(x) for x in (one, other))
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    np.testing.assert_array_equal(one, other)


def build(case: Case, params: list[Any]) -> Adam:
    opt = Adam(**case.settings_for(schedules))
    opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
    opt.build({f"w{i}": p for i, p in enumerate(params)})
    return opt


def check(opt: Adam, params: list[Any], reference: Any, dtype: str = "float32") -> None:
    assert_close(list(map(array, params)), reference, "variable", dtype)
    state = opt.named_variables()
    for slot in reference.state:
        if slot != "variable":
            held = [array(state[f"w{i}_{slot}"]) for i in range(len(params))]
            assert_close(held, reference, slot, dtype)


def snapshot(opt: Adam, params: list[Any]) -> list[Array]:
    return [*map(array, params), *opt.get_weights()]


def assert_unchanged(before: list[Array], opt: Adam, params: list[Any]) -> None:
    for one, other in zip(before, snapshot(opt, params), strict=True):
        assert_same(one, other)


def programs(opt: Adam) -> list[Any]:
    kept = [s.prepared.programs.values() for s in opt._selections.values() if s.prepared]
    return [program for each in kept for program in each]


def run_script(code: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    source = str(Path(omniadam.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([source, str(HERE)])} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- The table -----------------------------------------------------------------------------------


def follow(name: str, dtype: str, shapes: Sequence[tuple[int, ...]], steps: int = STEPS) -> Adam:
    """A run against the oracle; of 16-bit variables each step by itself."""
    values = variables(dtype, shapes=shapes)
    params = made(values)
    case = (CASES | PART | WHOLE | BEYOND_KERAS)[name]
    opt, reference = build(case, params), case.reference(values)
    for step in range(steps):
        grads = cached_gradients(step, tuple(shapes), 0, dtype)
        calls = opt.apply_gradients(zip(tensors(grads), params, strict=True))
        assert int(calls) == step + 1
        reference.step(grads)
        if dtype in HALVES:
            check(opt, params, reference, dtype)
            reference.resync(list(map(array, params)))
    check(opt, params, reference, dtype)
    assert opt.iterations == reference.iterations
    return opt


@pytest.mark.parametrize("name", [*PART, *BEYOND_KERAS])
def test_every_setting(name: str) -> None:
    follow(name, "float32", SMALL_SHAPES)


@pytest.mark.parametrize("name", ["schedule", EVERYTHING])
def test_a_hundred_steps(name: str, mode: str) -> None:
    follow(name, "float32", SMALL_SHAPES, 100)


@pytest.mark.parametrize("dtype", ["float64", *HALVES])
@pytest.mark.parametrize("name", ["defaults", *WHOLE])
def test_every_dtype(name: str, dtype: str) -> None:
    follow(name, dtype, SMALL_SHAPES, 8)


@pytest.mark.parametrize("mode", ["xla", "parts"], indirect=True)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in ("defaults", *WHOLE)),
        *((EVERYTHING, dtype) for dtype in ("float64", *HALVES)),
    ],
)
def test_settings_compiled_by_xla(name: str, dtype: str, mode: str) -> None:
    opt = follow(name, dtype, SMALL_SHAPES)
    (program,) = programs(opt)
    assert program._is_jit and program._compiled
    assert program._is_large == (mode == "parts")


@in_every_mode
@pytest.mark.parametrize("name", ["global_clipnorm", EVERYTHING])
def test_larger_variables_and_numpy_agrees(name: str, mode: str) -> None:
    values = variables()
    params, arrays = made(values), [v.copy() for v in values]
    ours, numpys = build(CASES[name], params), build(CASES[name], arrays)
    reference = CASES[name].reference(values)
    for step in range(STEPS):
        grads = cached_gradients(step)
        ours.apply(tensors(grads), params)
        numpys.apply(grads, arrays)
        reference.step(grads)
    check(ours, params, reference)
    for one, other in zip(ours.get_weights(), numpys.get_weights(), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, 1e-4, 1e-6)


@in_every_mode
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_once(dtype: str, mode: str) -> None:
    """Decay and update are 3/8 of a spacing each: alone either would be rounded away."""
    w = tf.Variable(tf.ones(5, dtype))
    spacing = 2.0**-8 if dtype == "bfloat16" else 2.0**-11  # below 1
    opt = Adam(0.375 * spacing, epsilon=0.0, weight_decay=1.0, use_ema=True)
    opt.apply([tf.ones(5, dtype)], [w])
    assert np.all(array(w) == 1 - spacing)
    # The average is of what was stored.
    assert_same(opt.variables[2], np.full(5, 1 - spacing, np.float32))
    assert {v.dtype for v in opt.variables[2:]} == {tf.float32}


@pytest.mark.parametrize("mode", ["xla", "parts"], indirect=True)
def test_a_sum_of_many_squares(mode: str) -> None:
    """XLA's inner product of a million equal numbers is wrong by a hundredth."""
    g = tf.fill((1021, 1031), 0.1)
    w = tf.Variable(tf.zeros((1021, 1031)))
    opt = Adam(beta_1=0.0, global_clipnorm=1.0)
    opt.apply([g], [w])
    momentum = opt.get_weights()[2]
    np.testing.assert_allclose(momentum, 1 / np.sqrt(g.shape.num_elements()), rtol=1e-6)


@in_every_mode
def test_nan_and_infinity(mode: str) -> None:
    """As on NumPy: what is hidden by no clip, no maximum, no accumulator."""
    bad = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    for settings in (
        {"amsgrad": True},
        {"clipvalue": 1.0},
        {"global_clipnorm": 1.0},
        {"clipnorm": 1.0, "gradient_accumulation_steps": 2},
    ):
        w, want = tf.Variable(np.ones(4, np.float32)), np.ones(4, np.float32)
        ours, numpys = Adam(0.1, **settings), Adam(0.1, **settings)
        for g in (bad, np.ones(4, np.float32), np.ones(4, np.float32)):
            ours.apply([tf.constant(g)], [w])
            numpys.apply([g], [want])
        np.testing.assert_allclose(w.numpy(), want, 1e-6)


def test_learning_rate_is_kept_in_double() -> None:
    opt = Adam(0.1)
    opt.build([tf.Variable([1.0])])
    assert opt.learning_rate == 0.1 and type(opt.learning_rate) is float
    assert opt.variables[1].dtype == tf.float64


# --- Inside tf.function --------------------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize("name", ["defaults", "schedule", EVERYTHING])
def test_a_function_is_the_eager_step(name: str, jit_compile: bool | None) -> None:
    """One function, 100 calls, traced once: nothing of the state is a constant of the trace."""
    values = variables(shapes=SMALL_SHAPES)
    params, others = made(values), made(values)
    eager, traced = build(CASES[name], params), build(CASES[name], others)
    traces = []

    @tf.function(jit_compile=jit_compile)
    def step(grads: list[Any]) -> Any:
        traces.append(1)
        return traced.apply_gradients(zip(grads, others, strict=True))

    for i in range(100):
        grads = tensors(cached_gradients(i % 10, SMALL_SHAPES))
        eager.apply_gradients(zip(grads, params, strict=True))
        assert int(step(grads)) == i + 1
    assert len(traces) == 1
    assert traced.iterations == eager.iterations
    for one, other in zip(snapshot(eager, params), snapshot(traced, others), strict=True):
        np.testing.assert_allclose(one, other, 2e-5, 1e-6)


@pytest.mark.parametrize("mode", ["xla", "parts"], indirect=True)
@pytest.mark.parametrize("name", ["defaults", EVERYTHING])
def test_a_function_that_xla_does_not_compile_has_a_step_that_it_does(name: str, mode: str) -> None:
    values = variables(shapes=SMALL_SHAPES)
    params, others = made(values), made(values)
    eager, traced = build(CASES[name], params), build(CASES[name], others)

    @tf.function
    def step(grads: list[Any]) -> Any:
        return traced.apply_gradients(zip(grads, others, strict=True))

    for i in range(7):
        grads = tensors(cached_gradients(i, SMALL_SHAPES))
        eager.apply_gradients(zip(grads, params, strict=True))
        assert int(step(grads)) == i + 1
    operations = step.get_concrete_function(grads).graph.get_operations()
    is_compiled = any("_XlaMustCompile" in op.node_def.attr for op in operations)
    assert is_compiled or name == EVERYTHING  # which accumulates, in the branches of a condition
    assert not any(op.type == "Sqrt" and op.outputs[0].shape.rank for op in operations)
    for one, other in zip(snapshot(eager, params), snapshot(traced, others), strict=True):
        if name == EVERYTHING:  # a norm is added up in another order
            np.testing.assert_allclose(one, other, 2e-5, 1e-6)
        else:
            assert_same(one, other)


@pytest.mark.parametrize("jit_compile", [None, True])
def test_built_by_the_first_call_of_a_function(jit_compile: bool | None) -> None:
    w, want = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
    opt, other = Adam(0.1, use_ema=True), Adam(0.1, use_ema=True)

    @tf.function(jit_compile=jit_compile)
    def step(g: Any) -> Any:
        return opt.apply_gradients([(g, w)])

    for _ in range(3):
        step(tf.constant([1.0, -2.0]))
        other.apply_gradients([(tf.constant([1.0, -2.0]), want)])
    np.testing.assert_allclose(w, want, rtol=1e-6)
    assert opt.built and opt.iterations == 3
    assert all(isinstance(v, tf.Variable) for v in opt.variables)


def test_a_loop_in_a_function() -> None:
    w, want = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "use_ema": True}
    opt, other = Adam(0.1, **settings), Adam(0.1, **settings)

    @tf.function
    def train(n: Any) -> None:
        for _ in tf.range(n):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(w**2)
            opt.apply_gradients([(tape.gradient(loss, w), w)])

    train(tf.constant(20))
    for _ in range(20):
        other.apply([2 * want], [want])
    np.testing.assert_allclose(w, want, rtol=1e-5)
    assert opt.iterations == other.iterations == 6


@pytest.mark.parametrize("jit_compile", [None, True])
def test_state_set_between_calls_takes_effect(jit_compile: bool | None) -> None:
    w, opt = tf.Variable([1.0]), Adam(0.1)
    opt.build([w])

    @tf.function(jit_compile=jit_compile)
    def step() -> tuple[Any, ...]:
        opt.apply_gradients([(tf.ones(1), w)])
        return opt.iterations, opt.learning_rate

    for i, rate in enumerate((0.1, 0.5, 0.0)):
        opt.learning_rate = rate
        before = w.numpy()
        calls, seen = step()
        assert (int(calls), float(seen)) == (i + 1, rate)
        np.testing.assert_allclose(before - w.numpy(), rate, rtol=1e-5)
    opt.set_weights([np.int64(7), np.float64(0.25), np.zeros(1), np.zeros(1)])
    assert int(step()[0]) == 8
    assert step.experimental_get_tracing_count() == 1


def test_the_rate_is_set_in_a_function() -> None:
    w, opt = tf.Variable([1.0]), Adam(0.1)
    opt.build([w])

    @tf.function
    def halve() -> None:
        opt.learning_rate = opt.learning_rate / 2

    halve()
    halve()
    assert opt.learning_rate == 0.025


def test_functions_run_eagerly() -> None:
    w, want = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
    Adam(0.1).apply([tf.ones(2)], [want])
    tf.config.run_functions_eagerly(True)
    try:
        Adam(0.1).apply([tf.ones(2)], [w])
    finally:
        tf.config.run_functions_eagerly(False)
    np.testing.assert_allclose(w, want, rtol=1e-6)


def test_autograph_leaves_the_optimizer_alone(capfd: pytest.CaptureFixture[str]) -> None:
    w, opt = tf.Variable([1.0]), Adam(0.1)

    @tf.function
    def step() -> None:
        opt.minimize(lambda: tf.reduce_sum(w**2), [w])

    step()
    assert "AutoGraph" not in capfd.readouterr().err
    assert "__autograph_generated" not in str(Optimizer.apply_gradients)


def test_a_saved_model(tmp_path: Path) -> None:
    class Trainer(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w, self.opt = tf.Variable([1.0, 2.0]), Adam(0.1)
            self.opt.build([self.w])

        @tf.function(input_signature=[tf.TensorSpec([2])])
        def step(self, g: Any) -> Any:
            self.opt.apply_gradients([(g, self.w)])
            return self.w.read_value()

    trainer = Trainer()
    trainer.step(tf.ones(2))
    tf.saved_model.save(trainer, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for _ in range(2):
        np.testing.assert_allclose(trainer.step(tf.ones(2)), loaded.step(tf.ones(2)), rtol=1e-6)


# --- Graphs of TensorFlow 1 ----------------------------------------------------------------------

GRAPH = """
import sys, warnings
warnings.simplefilter("error")
import numpy as np, tensorflow as tf
tf1 = tf.compat.v1
if "v1" in sys.argv:
    tf1.disable_v2_behavior()
import omniadam
from omniadam import Adam
from cases import CASES, SMALL_SHAPES, assert_close, gradients, variables

NAMES = ("defaults", "clipnorm", "ema_momentum+ema_overwrite_frequency+gradient_accumulation_steps",
    list(CASES)[-1])
for name in NAMES if "v1" in sys.argv else NAMES[::3]:  # the defaults, and everything
    for is_resource in (True, False):
        case = CASES[name]
        with tf.Graph().as_default():
            ws = [tf1.Variable(v, use_resource=is_resource) for v in variables(shapes=SMALL_SHAPES)]
            gs = [tf1.placeholder(tf.float32, s) for s in SMALL_SHAPES]
            opt = Adam(**case.settings_for(omniadam.schedules))
            opt.exclude_from_weight_decay(var_list=[ws[i] for i in case.excluded])
            step = opt.apply_gradients(list(zip(gs, ws)))
            with tf1.Session() as session:
                session.run(tf1.global_variables_initializer())
                reference = case.reference(session.run(ws))
                for i in range(8):
                    g = gradients(i, shapes=SMALL_SHAPES)
                    assert session.run(step, dict(zip(gs, g))) == i + 1
                    reference.step(g)
                assert_close(session.run(ws), reference)
                assert session.run(opt.iterations) == reference.iterations
                weights = opt.get_weights()
                opt.set_weights([0 * w for w in weights])
                assert not any(w.any() for w in opt.get_weights())
                opt.set_weights(weights)
                if "learning_rate" in opt.named_variables():
                    opt.learning_rate = 0.5
                    assert session.run(opt.learning_rate) == 0.5

with tf.Graph().as_default():
    w = tf1.get_variable("w", initializer=np.float32([1.0, 2.0]))
    x = tf1.placeholder(tf.float32, [2])
    opt = Adam(0.1)
    loss = tf.reduce_sum(w * w * x)
    step = opt.minimize(loss, [w])
    gradient = opt.get_gradients(loss, [w])
    of_callable = Adam(0.1).minimize(lambda: tf.reduce_sum(w * w), [w])
    try:
        opt.get_weights()
    except RuntimeError as error:
        assert "session" in str(error)
    else:
        raise AssertionError
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        assert session.run(gradient, {x: [1, 2]})[0].tolist() == [2, 8]
        for _ in range(3):
            session.run(step, {x: [1, 1]})
        np.testing.assert_allclose(session.run(w), [0.7, 1.7], atol=0.01)
        assert session.run(opt.iterations) == 3
        session.run(of_callable)
        np.testing.assert_allclose(session.run(w), [0.6, 1.6], atol=0.01)

class Momentum(omniadam.Optimizer):
    def build(self, variables):
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum", "ones")

    def update_step(self, gradient, variable, learning_rate):
        m = self.momentums[self._get_variable_index(variable)]
        self.assign(m, 0.5 * m + gradient)
        self.assign_sub(variable, tf.cast(learning_rate, tf.float32) * m)

with tf.Graph().as_default():
    w = tf1.Variable([1.0, 2.0], use_resource=True)
    step = Momentum(0.1).apply_gradients([(tf.constant([1.0, 1.0]), w)])
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        for _ in range(2):
            session.run(step)
        np.testing.assert_allclose(session.run(w), [1 - 0.15 - 0.175, 2 - 0.325], rtol=1e-6)
    w = tf1.Variable([1.0, 2.0], use_resource=False)
    try:
        Momentum(0.1).apply_gradients([(tf.constant([1.0, 1.0]), w)])
    except TypeError as error:
        assert "enable_resource_variables" in str(error)
    else:
        raise AssertionError
print("all is well")
"""


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_graph_and_session(version: str, tmp_path: Path) -> None:
    """With the behavior of TensorFlow 2 and of 1, with resource variables and without."""
    assert "all is well" in run_script(GRAPH, tmp_path, version)


# --- Replicas ------------------------------------------------------------------------------------

REPLICAS = """
import warnings
warnings.simplefilter("error")
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import omniadam
from omniadam import Adam
from cases import CASES, SMALL_SHAPES, gradients, variables

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

def share():
    # A quarter of the gradient on one replica, three quarters on the other.
    i = tf.distribute.get_replica_context().replica_id_in_sync_group
    return 0.25 + 0.5 * tf.cast(i, tf.float32)

def compare(ws, want, opt, other):
    for w, v in zip(ws, want):
        for each in strategy.experimental_local_results(w):
            np.testing.assert_allclose(each, v, rtol=1e-5, atol=1e-6)
    assert opt.iterations == other.iterations
    for one, two in zip(opt.get_weights(), other.get_weights()):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)

for name in ("defaults", "global_clipnorm", list(CASES)[-1]):
    for is_function in (True, False) if name == list(CASES)[-1] else (True,):
        values = variables(shapes=SMALL_SHAPES)
        with strategy.scope():
            ws = [tf.Variable(v) for v in values]
        want = [tf.Variable(v) for v in values]
        opt, other = (Adam(**CASES[name].settings_for(omniadam.schedules)) for _ in range(2))

        def run(gs):
            def on_one():
                return opt.apply_gradients([(g * share(), w) for g, w in zip(gs, ws)])
            return strategy.run(on_one)

        step = tf.function(run) if is_function else run
        for i in range(4):
            gs = [tf.constant(g) for g in gradients(i, shapes=SMALL_SHAPES)]
            counts = strategy.experimental_local_results(step(gs))
            assert {int(c) for c in counts} == {i + 1}
            other.apply(gs, want)
        compare(ws, want, opt, other)
        devices = [[v.device[-5:] for v in strategy.experimental_local_results(slot)]
            for slot in opt.variables]
        assert devices == [["CPU:0", "CPU:1"]] * len(devices), devices

# Outside of the replicas; sparse; minimize; set from outside; checkpoint.
with strategy.scope():
    w = tf.Variable(np.ones((4, 2), np.float32), name="table")
    opt = Adam(0.1)
v, other = tf.Variable(np.ones((4, 2), np.float32), name="table"), Adam(0.1)
assert int(opt.apply_gradients([(tf.ones((4, 2)), w)])) == 1
other.apply([tf.ones((4, 2))], [v])
compare([w], [v], opt, other)
opt.learning_rate = other.learning_rate = 0.5

def each(i):
    opt.apply_gradients([(tf.IndexedSlices(tf.ones((2, 2)), tf.stack([i, 3]), (4, 2)), w)])

ids = strategy.experimental_distribute_values_from_function(
    lambda context: tf.constant(context.replica_id_in_sync_group))
tf.function(lambda: strategy.run(each, (ids,)))()
other.apply([tf.IndexedSlices(tf.ones((4, 2)), tf.constant([0, 1, 3, 3]), (4, 2))], [v])
compare([w], [v], opt, other)
# Gradients that each replica computed, applied outside.
ones = strategy.experimental_distribute_values_from_function(lambda context: tf.ones((4, 2)))
opt.apply([ones], [w])
other.apply([2 * tf.ones((4, 2))], [v])
compare([w], [v], opt, other)
import tempfile
with tempfile.TemporaryDirectory() as directory:
    path = tf.train.Checkpoint(w=w, opt=opt).save(directory + "/c")
    before = opt.get_weights()
    opt.apply([ones], [w])
    tf.train.Checkpoint(w=w, opt=opt).restore(path).assert_consumed()
    compare([w], [v], opt, other)
    again = Adam(0.7)  # on plain variables, built later
    u = tf.Variable(np.zeros((4, 2), np.float32), name="table")
    tf.train.Checkpoint(w=u, opt=again).restore(path)
    again.build([u])
    compare([w], [u], opt, again)

# Errors.
plain = tf.Variable(1.0)
for variables_, message in (([w, plain], "strategy"), ([plain], "strategy")):
    try:
        strategy.run(lambda: Adam().apply([tf.zeros(x.shape) for x in variables_], variables_))
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
try:
    opt.stateless_apply(opt.get_weights(), [tf.ones((4, 2))], [tf.ones((4, 2))])
except ValueError as error:
    assert "Strategy" in str(error)
else:
    raise AssertionError

# A rule of one's own.
class Momentum(omniadam.Optimizer):
    def build(self, variables):
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient, variable, learning_rate):
        m = self.momentums[self._get_variable_index(variable)]
        self.assign(m, 0.5 * m + gradient)
        variable.assign_sub(tf.cast(learning_rate, tf.float32) * m)

with strategy.scope():
    w = tf.Variable([1.0, 2.0])
opt = Momentum(0.1)
step = tf.function(lambda: strategy.run(lambda: opt.apply([share() * tf.ones(2)], [w])))
for _ in range(2):
    step()
for each in strategy.experimental_local_results(w):
    np.testing.assert_allclose(each, [0.75, 1.75], rtol=1e-6)
print("all is well")
"""


def test_mirrored_replicas(tmp_path: Path) -> None:
    """Gradients are summed, state is mirrored: all replicas are the run on the sum."""
    assert "all is well" in run_script(REPLICAS, tmp_path)


KERAS = """
from contextlib import nullcontext
import numpy as np, tensorflow as tf, keras
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from omniadam import Adam
from omniadam.fast.tensorflow import FastTensorFlow
from cases import SMALL_SHAPES, gradients, variables

FastTensorFlow.jit_compile = False  # XLA takes a second for each optimizer
CASES = [{}, {"amsgrad": True}, {"global_clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True},
    {"use_ema": True, "ema_overwrite_frequency": 2, "gradient_accumulation_steps": 2},
    {"loss_scale_factor": 4.0, "clipvalue": 0.5}]
shapes = [s for s in SMALL_SHAPES if 0 not in s]

def equal(ours, theirs):
    for one, two in zip(ours, theirs):
        np.testing.assert_allclose(one, two, rtol=3e-4, atol=2e-5)

for settings in CASES:
    ours, theirs = ([tf.Variable(v) for v in variables(shapes=shapes)] for _ in range(2))
    opt, peer = Adam(0.01, **settings), keras.optimizers.Adam(0.01, **settings)
    for i in range(4):
        gs = [tf.constant(g) for g in gradients(i, shapes=shapes)]
        opt.apply(gs, ours)
        peer.apply(gs, theirs)
    equal(ours, theirs)
    # What Keras saves in order, is our order.
    names = [v.path.split("/")[-1] for v in peer.variables]
    assert [v.shape for v in peer.variables] == [v.shape for v in opt.variables], names
    equal([v.numpy() for v in peer.variables[2:]], opt.get_weights()[2:])

# Keras's accumulators cannot be created inside a replica; the others can. It clips before it sums
# over replicas, so that the norm may be above the threshold: see docs/deviations.md.
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for settings in CASES[:3]:
    is_clipped = "global_clipnorm" in settings
    results = []
    for kind in (Adam, keras.optimizers.Adam):
        is_alone = is_clipped and kind is not Adam
        with nullcontext() if is_alone else strategy.scope():
            ws = [tf.Variable(v) for v in variables(shapes=shapes)]
            opt = kind(0.01, **settings)
            opt.build(ws)
        def on_one(gs):
            i = tf.distribute.get_replica_context().replica_id_in_sync_group
            opt.apply([g * (0.25 + 0.5 * tf.cast(i, g.dtype)) for g in gs], ws)
        step = tf.function(lambda gs: strategy.run(on_one, (gs,)))
        for i in range(4):
            gs = [tf.constant(g) for g in gradients(i, shapes=shapes)]
            opt.apply(gs, ws) if is_alone else step(gs)
        results.append([strategy.experimental_local_results(w)[-1] for w in ws])
    equal(*results)
schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
w = tf.Variable([1.0])
opt = Adam(schedule)
for _ in range(2):
    opt.apply([tf.ones(1)], [w])
np.testing.assert_allclose(w, [0.85], atol=1e-6)
print("all is well")
"""


@pytest.mark.needs("keras")
def test_keras_agrees(tmp_path: Path) -> None:
    out = run_script(KERAS, tmp_path, KERAS_BACKEND="tensorflow")
    assert "all is well" in out


# --- Gradients -----------------------------------------------------------------------------------

SLICES: dict[str, Callable[[Array, Array, tuple[int, ...]], Any]] = {
    "int32": lambda i, v, shape: tf.IndexedSlices(tf.constant(v), tf.constant(i, tf.int32), shape),
    "int64": lambda i, v, shape: tf.IndexedSlices(tf.constant(v), tf.constant(i), shape),
    "no shape": lambda i, v, shape: tf.IndexedSlices(tf.constant(v), tf.constant(i)),
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("form", SLICES)
@pytest.mark.parametrize("name", ["defaults", "global_clipnorm", "gradient_accumulation_steps"])
def test_missing_and_sparse_gradients(name: str, form: str) -> None:
    shapes = ((7,), (40, 5), (6, 2, 3))
    values = variables(shapes=shapes)
    params = made(values)
    opt, reference = build(CASES[name], params), CASES[name].reference(values)
    for step in range(STEPS):
        sparse: list[Any] = [sparse_gradient(step, s) for s in shapes]
        given: list[Any] = with_missing(step, sparse)
        slices = [g and SLICES[form](*g, shape) for g, shape in zip(given, shapes, strict=True)]
        opt.apply_gradients(zip(slices, params, strict=True))
        reference.step(given)
    check(opt, params, reference)


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sparse_equals_dense_to_the_bit(dtype: str, is_function: bool) -> None:
    shape = (50, 3)
    w, want = made([np.ones(shape, dtype)] * 2)
    opt, other = Adam(0.1, global_clipnorm=1.0), Adam(0.1, global_clipnorm=1.0)
    opt.build([w])
    apply = (
        tf.function(lambda g: opt.apply([g], [w]))
        if is_function
        else (lambda g: opt.apply([g], [w]))
    )
    for step in range(5):
        indices, values = sparse_gradient(step, shape, dtype=dtype)
        slices = tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant(shape))
        apply(slices)
        other.apply([tf.convert_to_tensor(slices)], [want])
        assert_same(w, want)


def test_a_sparse_tensor() -> None:
    indices, values = [[0, 1], [2, 0], [0, 1]], [1.0, 2.0, 3.0]  # the first one twice
    w, want = made([np.ones((3, 2), np.float32)] * 2)
    Adam(0.1).apply([tf.SparseTensor(indices, values, (3, 2))], [w])
    dense = np.array([[0, 4], [0, 0], [2, 0]], np.float32)
    Adam(0.1).apply([tf.constant(dense)], [want])
    assert_same(w, want)


def test_an_embedding() -> None:
    table, want = made([np.ones((6, 2), np.float32)] * 2)
    opt, other = Adam(0.1), Adam(0.1)
    ids = tf.constant([[1, 1], [4, 2]])
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, ids) ** 2)
        g = tape.gradient(loss, table)
        assert isinstance(g, tf.IndexedSlices)
        opt.apply([g], [table])
        other.apply([tf.convert_to_tensor(g)], [want])
    assert_same(table, want)


@pytest.mark.parametrize("dtype", ["float32", "float64", *HALVES])
@pytest.mark.parametrize("of", ["float32", "float64", *HALVES, "int32"])
def test_gradient_of_another_type(dtype: str, of: str) -> None:
    start = tf.constant(np.linspace(-1, 1, 7), dtype)
    g = tf.cast(tf.constant([1.0, -2.0, 3.0, 0.0, 5.0, -6.0, 7.0]), of)
    w, want = tf.Variable(start), tf.Variable(start)
    opt, other = Adam(0.1), Adam(0.1)
    for _ in range(3):
        opt.apply([g], [w])
        other.apply([tf.cast(g, dtype)], [want])
    assert_same(w, want)
    assert len(programs(opt)) == 1


def test_arrays_and_variables_as_gradients() -> None:
    g = np.array([1.0, -2.0])
    results = []
    for given in (g, g.astype(np.float32), tf.constant(g), tf.Variable(g), list(g), None):
        w = tf.Variable([1.0, 2.0])
        if given is None or isinstance(given, list):
            with pytest.raises((TypeError, ValueError)):
                Adam(0.1).apply([given], [w])
        else:
            Adam(0.1).apply([given], [w])
            results.append(w.numpy())
    assert len(results) == 4 and all(np.array_equal(r, results[0]) for r in results)
    w = tf.Variable(1.0)
    Adam(0.1).apply([np.float32(1.0)], [w])
    assert float(w) == pytest.approx(0.9)


def test_a_gradient_that_is_the_variable_or_a_slot() -> None:
    w = tf.Variable([1.0, 2.0])
    opt = Adam(0.1)
    opt.apply([w], [w])
    opt.apply([opt.variables[2]], [w])
    want, other = tf.Variable([1.0, 2.0]), Adam(0.1)
    other.apply([tf.constant([1.0, 2.0])], [want])
    other.apply([tf.identity(other.variables[2])], [want])
    assert_same(w, want)


def test_a_value_read_before_a_step_stays() -> None:
    w = tf.Variable(np.ones(1000, np.float32))
    opt = Adam(0.1)
    opt.build([w])
    held = [v.read_value() for v in (w, *opt.variables)]
    copies = [np.array(v) for v in held]
    for _ in range(2):
        calls = opt.apply_gradients([(tf.ones(1000), w)])
    for one, other in zip(held, copies, strict=True):
        assert_same(one, other)
    opt.apply([tf.ones(1000)], [w])
    assert int(calls) == 2


@pytest.mark.parametrize("mode", ["xla", "parts"], indirect=True)
def test_a_value_read_before_a_step_stays_by_xla(mode: str) -> None:
    test_a_value_read_before_a_step_stays()


def test_a_gradient_of_unknown_shape_in_a_function() -> None:
    w, opt = tf.Variable([1.0, 2.0]), Adam(0.1)
    opt.build([w])

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def step(g: Any) -> None:
        opt.apply([g], [w])

    step(tf.ones(2))
    before = snapshot(opt, [w])
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.ones(1))
    assert_unchanged(before, opt, [w])


# --- What is refused -----------------------------------------------------------------------------

BAD_VARIABLES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (lambda: tf.Variable([1, 2]), TypeError, "float32"),
    "booleans": (lambda: tf.Variable([True]), TypeError, "float32"),
    "complex": (lambda: tf.Variable([1j]), TypeError, "float32"),
    "strings": (lambda: tf.Variable(["a"]), TypeError, "float32"),
    "tensor": (lambda: tf.constant([1.0]), TypeError, r"tf\.Variable\(value\)"),
    "slices": (
        lambda: tf.IndexedSlices(tf.ones(1), tf.constant([0])),
        TypeError,
        "must be a tf.Variable",
    ),
    "module": (tf.Module, TypeError, "must be a tf.Variable"),
    "unknown shape": (
        lambda: tf.Variable([1.0], shape=tf.TensorShape([None])),
        ValueError,
        "fixed shape",
    ),
}


@pytest.mark.parametrize("kind", BAD_VARIABLES)
def test_what_cannot_be_trained(kind: str) -> None:
    make, error, message = BAD_VARIABLES[kind]
    w = tf.Variable([1.0])
    opt = Adam()
    with pytest.raises(error, match=message):
        opt.apply([tf.ones(1), tf.ones(1)], [w, make()])
    assert not opt.built and w.numpy() == 1.0
    with pytest.raises(error, match=message):
        opt.build({"bad": make()})


def test_variables_of_two_libraries_or_twice() -> None:
    w = tf.Variable([1.0])
    with pytest.raises(TypeError, match="tensorflow and variable 1 of numpy"):
        Adam().build([w, np.ones(1)])
    with pytest.raises(ValueError, match="the same object"):
        Adam().build([w, w])
    opt = Adam()
    opt.build([w])
    with pytest.raises(ValueError, match="given twice"):
        opt.apply([tf.ones(1)] * 2, [w, w])
    with pytest.raises(ValueError, match="Unknown variable"):
        opt.apply([tf.ones(1)], [tf.Variable([1.0])])


def test_a_variable_that_is_not_trainable_is_trained() -> None:
    w = tf.Variable([1.0], trainable=False)
    Adam(0.1).minimize(lambda: tf.reduce_sum(w**2), [w])
    np.testing.assert_allclose(w, [0.9], rtol=1e-6)


BAD_GRADIENTS: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (lambda: tf.ones(3), ValueError, r"\(3,\).*\(4, 2\)"),
    "broadcast": (lambda: tf.ones((1, 2)), ValueError, r"\(1, 2\)"),
    "scalar": (lambda: tf.constant(1.0), ValueError, r"\(\)"),
    "string": (lambda: "gradient", TypeError, "tf.Tensor"),
    "number": (lambda: 1.0, TypeError, "tf.Tensor"),
    "strings": (lambda: tf.constant([["a"] * 2] * 4), TypeError, "real numbers"),
    "booleans": (lambda: tf.ones((4, 2)) > 0, TypeError, "real numbers"),
    "complex": (lambda: tf.ones((4, 2), tf.complex64), TypeError, "real numbers"),
    "objects": (lambda: np.full((4, 2), None), TypeError, "real numbers"),
    "ragged": (lambda: tf.ragged.constant([[1.0], [1.0, 2.0]]), TypeError, "tf.Tensor"),
    "index": (
        lambda: tf.IndexedSlices(tf.ones((2, 2)), tf.constant([0, 4])),
        ValueError,
        r"Received index \[4\]",
    ),
    "negative index": (
        lambda: tf.IndexedSlices(tf.ones((2, 2)), tf.constant([-1, 0])),
        ValueError,
        r"Received index \[-1\]",
    ),
    "rows": (
        lambda: tf.IndexedSlices(tf.ones((2, 3)), tf.constant([0, 1])),
        ValueError,
        r"values of shape \(2, 3\)",
    ),
    "indices": (
        lambda: tf.IndexedSlices(tf.ones((2, 2)), tf.constant([0, 1, 2])),
        ValueError,
        r"indices of shape \(3,\)",
    ),
    "slices of another": (
        lambda: tf.IndexedSlices(tf.ones((2, 2)), tf.constant([0, 1]), tf.constant([5, 2])),
        ValueError,
        r"dense_shape \(5, 2\)",
    ),
    "sparse": (
        lambda: tf.SparseTensor([[0, 0]], [1.0], (4, 3)),
        ValueError,
        r"\(4, 3\)",
    ),
    "sparse index": (
        lambda: tf.SparseTensor([[0, 7]], [1.0], (4, 2)),
        ValueError,
        r"Received index \[0, 7\]",
    ),
    "of NumPy": (
        lambda: IndexedSlices(np.ones((1, 2)), np.array([0]), (4, 2)),
        TypeError,
        "IndexedSlices",
    ),
}


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_what_is_no_gradient(kind: str, built: bool) -> None:
    make, error, message = BAD_GRADIENTS[kind]
    params = made([np.ones(3, np.float32), np.ones((4, 2), np.float32)])
    opt = Adam(use_ema=True)
    if built:
        opt.apply([tf.ones(3), tf.ones((4, 2))], params)
    before = snapshot(opt, params)
    with pytest.raises(error, match=message) as caught:
        opt.apply([tf.ones(3), make()], params)
    assert "'w1'" in str(caught.value) and "(4, 2)" in str(caught.value)
    assert opt.built == built
    assert_unchanged(before, opt, params)
    opt.apply([tf.ones(3), tf.ones((4, 2))], params)


@in_every_mode
def test_an_index_out_of_range_in_a_function(mode: str) -> None:
    params, opt = [tf.Variable(tf.ones((4, 2))) for _ in range(3)], Adam(0.1)
    opt.build(params)

    @tf.function
    def step(i: Any) -> None:
        slices = tf.IndexedSlices(tf.ones((1, 2)), i)
        opt.apply([tf.ones((4, 2)), slices, tf.ones((4, 2))], params)

    step(tf.constant([3]))
    before = snapshot(opt, params)
    for i in (4, -1):
        with pytest.raises(tf.errors.InvalidArgumentError):
            step(tf.constant([i]))
    assert_unchanged(before, opt, params)


def test_a_gradient_unlike_the_last_one() -> None:
    """However the step before went, each gradient is checked, and computed with, as it is."""
    forms = [
        lambda: tf.constant([1.0, 2.0, 3.0]),
        lambda: tf.constant([1.0, 2.0, 3.0], tf.float64),
        lambda: tf.IndexedSlices(tf.constant([1.0, 2.0, 3.0]), tf.constant([0, 1, 2])),
        lambda: tf.constant([1.0, 2.0, 3.0], tf.float16),
        lambda: np.array([1, 2, 3]),
        lambda: tf.Variable([1.0, 2.0, 3.0]),
    ]
    w, want = tf.Variable(tf.zeros(3)), np.zeros(3, np.float32)
    opt, other = Adam(0.1), Adam(0.1)
    for form in [f for f in forms for _ in range(2)] + forms:
        opt.apply([form()], [w])
        other.apply([np.array([1.0, 2.0, 3.0], np.float32)], [want])
        with pytest.raises(ValueError, match="shape"):
            opt.apply([tf.ones(1)], [w])
    np.testing.assert_allclose(w, want, 1e-5)
    assert opt.iterations == other.iterations


def test_a_step_like_the_last_compiles_nothing() -> None:
    w, opt = tf.Variable([1.0, 2.0]), Adam(lambda: 0.1, beta_1=lambda: 0.9)
    for i in range(5):
        opt.apply([tf.constant([float(i), 1.0])], [w])
    (program,) = programs(opt)
    assert program._compiled.function.experimental_get_tracing_count() == 1
    recognised = opt._state.backend.recognise
    assert recognised(opt._recent, [tf.ones(2)], [w]) is not None
    assert recognised(opt._recent, [tf.ones(2, tf.float64)], [w]) is None
    assert recognised(opt._recent, [tf.ones(2)], [tf.Variable([1.0, 2.0])]) is None


def test_an_optimizer_lets_go_of_gradients() -> None:
    w, opt = tf.Variable(tf.ones(100)), Adam()
    g = tf.ones(100)
    opt.apply([g], [w])
    reference = weakref.ref(g)
    del g
    gc.collect()
    assert reference() is None
    many = made([np.ones(2, np.float32)] * 4)
    opt = Adam()
    opt.build(many)
    for version in range(12):
        opt.weight_decay = 0.01 * version
        opt.apply([tf.ones(2)], many[:1])
    assert len(programs(opt)) <= fast._KEPT


# --- Rates and hyperparameters -------------------------------------------------------------------


class Halving(schedules.LearningRateSchedule):
    """One that Python's `if` reads, which no trace can hold."""

    def __call__(self, step: Any) -> Any:
        return 0.1 if step < 2 else 0.05


class Table(schedules.LearningRateSchedule):
    """One of TensorFlow's own functions, of a step that is a whole number."""

    def __call__(self, step: Any) -> Any:
        return tf.gather(tf.constant([0.1, 0.1, 0.05, 0.05]), step)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((k, m) for k in ("callable", "variable", "Table") for m in MODES),
        *((k, m) for k in ("tensor", "Halving", "ours") for m in MODES[:2]),
    ],
    indirect=["mode"],
)
def test_rates(kind: str, mode: str) -> None:
    rates = iter([0.1, 0.1, 0.05, 0.05])
    held = tf.Variable(0.1)

    def next_rate() -> Any:
        rate = next(rates)
        held.assign(rate)
        return {"callable": rate, "tensor": tf.constant(rate), "variable": held}[kind]

    rate = {
        "Halving": Halving(),
        "Table": Table(),
        "ours": schedules.PiecewiseConstantDecay([1], [0.1, 0.05]),
    }.get(kind, next_rate)
    w, opt = tf.Variable([1.0, 2.0]), Adam(rate)
    for _ in range(4):
        opt.apply([tf.constant([1.0, -1.0])], [w])
    np.testing.assert_allclose(w, [0.7, 2.3], rtol=1e-5)
    assert len(programs(opt)) == 1


def test_a_rate_that_is_a_tensor_in_a_function() -> None:
    w, rate = tf.Variable([1.0]), tf.Variable(0.1)
    opt = Adam(lambda: rate * 2)

    @tf.function
    def step() -> None:
        opt.apply([tf.ones(1)], [w])

    step()
    rate.assign(0.2)
    step()
    np.testing.assert_allclose(w, [0.4], rtol=1e-5)


def test_a_rate_given_as_a_tensor() -> None:
    for rate in (tf.constant(0.25), tf.Variable(0.25), np.float32(0.25)):
        opt = Adam(rate)
        opt.build([tf.Variable([1.0])])
        assert opt.learning_rate == 0.25
        opt.learning_rate = tf.constant(0.5)
        assert opt.learning_rate == 0.5
    for bad in (tf.constant([0.1, 0.2]), tf.constant(-1.0), tf.constant("a")):
        with pytest.raises(ValueError, match="learning_rate"):
            Adam(bad)
        with pytest.raises(ValueError, match="learning_rate"):
            opt.learning_rate = bad
        w = tf.Variable([1.0])
        with pytest.raises(ValueError, match="learning_rate"):
            Adam(lambda bad=bad: bad).apply([tf.ones(1)], [w])
        assert w.numpy() == 1.0


@in_every_mode
def test_hyperparameters_that_change(mode: str) -> None:
    """Read at each step, compiled twice: the second program takes them as arguments."""
    betas = [0.5, 0.6, 0.7, 0.55, 0.9, 0.95]
    w, want = tf.Variable([1.0, 2.0]), np.array([1.0, 2.0], np.float32)
    ours, numpys = iter(betas), iter(betas)
    opt = Adam(0.1, beta_1=lambda: next(ours))
    other = Adam(0.1, beta_1=lambda: next(numpys))
    for g in np.float32([[1, 2], [3, -1], [2, 2], [0, 1], [1, 1], [-2, 1]]):
        opt.apply([tf.constant(g)], [w])
        other.apply([g], [want])
    np.testing.assert_allclose(w, want, 1e-5)
    (program,) = programs(opt)
    assert program._compiled.numbers_are_given
    assert program._compiled.function.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("name", ["weight_decay", "epsilon", "global_clipnorm", "ema_momentum"])
def test_settings_changed_between_steps(name: str) -> None:
    w, want = tf.Variable([1.0, 2.0]), np.array([1.0, 2.0], np.float32)
    opt, other = Adam(0.1, use_ema=True), Adam(0.1, use_ema=True)
    for value in (0.25, 0.5):
        for each in (opt, other):
            setattr(each, name, value)
        opt.apply([tf.constant([1.0, 2.0])], [w])
        other.apply([np.array([1.0, 2.0], np.float32)], [want])
    np.testing.assert_allclose(w, want, 1e-5)


# --- A rule of one's own -------------------------------------------------------------------------


class Momentum(Optimizer):
    """As written for Keras."""

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.seen = gradient
        m = self.momentums[self._get_variable_index(variable)]
        learning_rate = tf.cast(learning_rate, m.dtype)
        self.assign(m, 0.5 * m + gradient)
        self.assign_sub(variable, tf.cast(learning_rate * m, variable.dtype))


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "weight_decay": 0.1,
        "global_clipnorm": 1.0,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "loss_scale_factor": 2.0,
        "gradient_accumulation_steps": 2,
    },
}


class NumPyMomentum(Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        m = self.momentums[self._get_variable_index(variable)]
        self.assign(m, 0.5 * m + gradient)
        self.assign_sub(variable, learning_rate * m)


# Every two of the three meet.
@pytest.mark.parametrize(
    ("dtype", "settings", "is_function"),
    [
        (dtype, settings, (i + j) % 2 == 1)
        for i, dtype in enumerate(["float32", "float64", "float16"])
        for j, settings in enumerate(RULES.values())
    ],
)
def test_a_rule_of_ones_own(dtype: str, settings: dict[str, Any], is_function: bool) -> None:
    """It is given tensors, of float32 for half precision; the numbers are those on NumPy."""
    values = variables(dtype, shapes=((7,), (3, 5), ()))
    params, arrays = made(values), [v.copy() for v in values]
    ours, numpys = Momentum(0.1, **settings), NumPyMomentum(0.1, **settings)
    ours.build(params)

    def apply(grads: list[Any]) -> None:
        ours.apply(grads, params)

    step_of = tf.function(apply) if is_function else apply
    for step in range(6):
        grads = gradients(step, [v.shape for v in values], dtype=dtype)
        step_of(tensors(grads))
        numpys.apply(grads, arrays)
    assert ours.seen.dtype == (tf.float64 if dtype == "float64" else tf.float32)
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3}[dtype]
    for one, other in zip(params, arrays, strict=True):
        np.testing.assert_allclose(array(one), other, tolerance, tolerance)
    for one, other in zip(ours.get_weights(), numpys.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, tolerance, tolerance)


def test_update_step_of_adam() -> None:
    w, want = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
    opt, other = Adam(), Adam(0.1)
    opt.build([w])
    opt.update_step(tf.constant([1.0, -1.0]), w, 0.1)
    other.apply([tf.constant([1.0, -1.0])], [want])
    np.testing.assert_allclose(w, want, rtol=1e-6)
    assert opt.iterations == 0

    @tf.function
    def step() -> None:
        opt.update_step(tf.constant([1.0, -1.0]), w, 0.1)

    step()


def test_state_of_ones_own() -> None:
    w, opt = tf.Variable(tf.ones(3)), Adam()
    opt.build([w])
    table, count = opt.add_variable((2, 3), "ones"), opt.add_variable((), dtype="int64")
    filled = opt.add_variable_from_reference(w, "filled", lambda shape, dtype: np.full(shape, 2.0))
    opt.assign_add(table, 2.0)
    opt.assign_add(count, 1)
    opt.assign(w, np.array([1, 2, 3], np.float32))
    opt.assign_sub(w, tf.ones(3))
    assert np.all(table.numpy() == 3) and int(count) == 1 and np.all(filled.numpy() == 2)
    assert w.numpy().tolist() == [0, 1, 2]
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        opt.assign(w, np.ones(2))


# --- State ---------------------------------------------------------------------------------------


def settings_of_a_run() -> dict[str, Any]:
    return {"learning_rate": schedules.CosineDecay(0.1, 20), "use_ema": True, "amsgrad": True}


def go_on(opt: Adam, params: list[Any], steps: range) -> None:
    for step in steps:
        opt.apply(tensors(cached_gradients(step, SMALL_SHAPES)), params)


@pytest.mark.parametrize("carrier", ["pickle", "deepcopy"])
def test_a_copy_goes_on(carrier: str) -> None:
    values = variables(shapes=SMALL_SHAPES)
    params = made(values)
    opt = Adam(**settings_of_a_run(), weight_decay=0.1)
    opt.exclude_from_weight_decay(var_list=[params[2]])
    go_on(opt, params, range(4))
    other = pickle.loads(pickle.dumps(opt)) if carrier == "pickle" else copy.deepcopy(opt)
    others = [tf.Variable(p, name=p.name[:-2]) for p in params]
    go_on(opt, params, range(4, 8))
    go_on(other, others, range(4, 8))
    for one, two in zip(snapshot(opt, params), snapshot(other, others), strict=True):
        assert_same(one, two)
    assert list(opt.named_variables()) == list(other.named_variables())


def test_state_moves_between_libraries() -> None:
    """NumPy, TensorFlow, NumPy: a run that changes library twice is the run that never does."""
    values = variables(shapes=SMALL_SHAPES)
    case = CASES[EVERYTHING]
    want, numpys = [v.copy() for v in values], [v.copy() for v in values]
    never, first = build(case, want), build(case, numpys)
    for step in range(12):
        never.apply(cached_gradients(step, SMALL_SHAPES), want)
    for step in range(4):
        first.apply(cached_gradients(step, SMALL_SHAPES), numpys)
    params = made(numpys)
    second = build(case, params)
    second.set_weights(first.get_weights())
    go_on(second, params, range(4, 8))
    arrays = [np.array(p.numpy()) for p in params]
    third = build(case, arrays)
    third.set_weights(second.variables)
    for step in range(8, 12):
        third.apply(cached_gradients(step, SMALL_SHAPES), arrays)
    for one, other in zip(arrays, want, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-6)
    assert third.iterations == never.iterations


@pytest.mark.needs("torch")
def test_state_of_torch() -> None:
    import torch

    values = variables(shapes=SMALL_SHAPES)
    params, others = [torch.from_numpy(v.copy()) for v in values], made(values)
    opt, other = (Adam(0.01, amsgrad=True) for _ in range(2))
    grads = cached_gradients(0, SMALL_SHAPES)
    opt.apply([torch.from_numpy(g.copy()) for g in grads], params)
    other.build(others)
    other.set_weights(opt.variables)
    for one, two in zip(opt.get_weights(), other.get_weights(), strict=True):
        assert_same(one, two)


def test_get_weights_are_copies_and_set_weights_checks() -> None:
    params = made(variables(shapes=SMALL_SHAPES))
    opt = Adam(amsgrad=True)
    go_on(opt, params, range(2))
    weights = opt.get_weights()
    before = snapshot(opt, params)
    weights[2][...] = 7
    assert_unchanged(before, opt, params)
    for bad in (weights[:-1], [*weights[:-1], np.ones(9)], [np.float64(0.5), *weights[1:]]):
        with pytest.raises(ValueError, match="set"):
            opt.set_weights(bad)
        assert_unchanged(before, opt, params)
    store: dict[str, Any] = {}
    opt.save_own_variables(store)
    other = Adam(amsgrad=True)
    other.build(params)
    other.load_own_variables(store)
    assert_unchanged(before, other, params)


def test_names() -> None:
    kernel, bias = tf.Variable([1.0], name="dense/kernel"), tf.Variable([1.0], name="dense/bias")
    opt = AdamW(0.1, weight_decay=0.5)
    opt.exclude_from_weight_decay(var_names=["bias$"])
    opt.apply([tf.zeros(1), tf.zeros(1)], [kernel, bias])
    np.testing.assert_allclose([kernel, bias], [[0.95], [1.0]])
    names = ["iteration", "learning_rate", "dense_kernel_momentum", "dense_kernel_velocity"]
    assert list(opt.named_variables())[:4] == names
    assert opt.get_config()["exclude_from_weight_decay"]["var_names"] == ["bias$"]
    opt = Adam()
    opt.build({"a name/of one's own:0": kernel})
    assert list(opt.named_variables())[2] == "a name_of one's own_0_momentum"


def test_finalize() -> None:
    w, opt = tf.Variable([1.0]), Adam(0.5, use_ema=True, ema_momentum=0.5)
    opt.build([w])
    with pytest.raises(ValueError, match="average"):
        opt.finalize_variable_values([w])
    for _ in range(2):
        opt.apply([tf.ones(1)], [w])
    opt.finalize_variable_values([w])
    np.testing.assert_allclose(w, [0.25], rtol=1e-5)


@pytest.mark.parametrize("when", ["built", "before build", "before a function"])
def test_checkpoints(when: str, tmp_path: Path) -> None:
    values = variables(shapes=SMALL_SHAPES)
    params = made(values)
    opt = Adam(**settings_of_a_run(), gradient_accumulation_steps=2)
    go_on(opt, params, range(3))
    saved = tf.train.Checkpoint(opt=opt, params=params)
    manager = tf.train.CheckpointManager(saved, str(tmp_path), max_to_keep=2)
    path = manager.save()
    kept = snapshot(opt, params)
    go_on(opt, params, range(3, 7))
    want = snapshot(opt, params)

    others = [tf.Variable(tf.zeros_like(p), name=p.name[:-2]) for p in params]
    other = Adam(**settings_of_a_run(), gradient_accumulation_steps=2)
    if when == "built":
        other.build(others)
    status = tf.train.Checkpoint(opt=other, params=others).restore(path)
    if when == "before build":
        other.build(others)
    if when == "before a function":
        step = tf.function(lambda grads: other.apply(grads, others))
        for i in range(3, 7):
            step(tensors(cached_gradients(i, SMALL_SHAPES)))
        status.assert_consumed()
    else:
        status.assert_consumed()
        assert_unchanged(kept, other, others)
        go_on(other, others, range(3, 7))
    for one, two in zip(want, snapshot(other, others), strict=True):
        np.testing.assert_allclose(one, two, 1e-5, 1e-6)
    # And back, into the optimizer that saved it.
    saved.restore(manager.latest_checkpoint).assert_consumed()
    assert_unchanged(kept, opt, params)
    assert pickle.loads(pickle.dumps(opt)).get_weights()[0] == 3


def test_a_checkpoint_lists_state_by_name(tmp_path: Path) -> None:
    w, opt = tf.Variable([1.0], name="dense/kernel"), Adam()
    opt.build([w])
    tf.train.Checkpoint(opt=opt).save(str(tmp_path / "c"))
    names = [name for name, _ in tf.train.list_variables(str(tmp_path))]
    assert "opt/dense_kernel_momentum/.ATTRIBUTES/VARIABLE_VALUE" in names
    assert "opt/iteration/.ATTRIBUTES/VARIABLE_VALUE" in names
    # An optimizer of other variables has nothing that TensorFlow could save, and says so.
    other = Adam()
    other.build([np.ones(1)])
    with pytest.raises(ValueError, match="get_weights"):
        tf.train.Checkpoint(opt=other).save(str(tmp_path / "d"))


def test_made_before_tensorflow_is_imported(tmp_path: Path) -> None:
    code = """
from omniadam import Adam, Optimizer
opt = Adam(0.1)
assert all(base.__module__.startswith("omniadam.") for base in Optimizer.__bases__)
import tensorflow as tf
w = tf.Variable([1.0])
opt.apply([tf.ones(1)], [w])
path = tf.train.Checkpoint(opt=opt).save("CHECKPOINT")
opt.apply([tf.ones(1)], [w])
tf.train.Checkpoint(opt=opt).restore(path).assert_consumed()
print(opt.iterations)
""".replace("CHECKPOINT", str(tmp_path / "c"))
    assert run_script(code, tmp_path).strip() == "1"


# --- stateless_apply ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["defaults", "schedule", EVERYTHING])
@pytest.mark.parametrize("is_function", [False, True])
def test_stateless_apply(name: str, is_function: bool) -> None:
    """A function of tensors: Keras has none on TensorFlow."""
    values = variables(shapes=SMALL_SHAPES)
    params, others = made(values), made(values)
    opt, other = build(CASES[name], params), build(CASES[name], others)
    before = snapshot(opt, params)
    trainable, state = [p.read_value() for p in params], [v.read_value() for v in opt.variables]
    apply = tf.function(opt.stateless_apply) if is_function else opt.stateless_apply
    for step in range(4):
        grads = tensors(cached_gradients(step, SMALL_SHAPES))
        trainable, state = apply(state, grads, trainable)
        other.apply(grads, others)
    assert_unchanged(before, opt, params)
    for one, two in zip([*trainable, *state], [*others, *other.variables], strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, 1e-5, 1e-6)


def test_what_stateless_apply_refuses() -> None:
    w, opt = tf.Variable([1.0, 2.0]), Adam()
    opt.build([w])
    state, g = opt.get_weights(), tf.ones(2)
    with pytest.raises(ValueError, match="must have shape"):
        opt.stateless_apply(state, [g], [tf.ones(3)])
    with pytest.raises(ValueError, match="must have shape"):
        opt.stateless_apply([state[1], *state[1:]], [g], [tf.ones(2)])
    with pytest.raises(TypeError, match="takes tensors"):
        opt.stateless_apply(state, [g], ["w"])
    with pytest.raises(ValueError, match="shape"):
        opt.stateless_apply(state, [tf.ones(3)], [tf.ones(2)])
    own = Momentum(0.1)
    own.build([w])
    with pytest.raises(ValueError, match="update_step"):
        own.stateless_apply(own.get_weights(), [g], [tf.ones(2)])


# --- Differentiation -----------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "closure": lambda w, b: lambda: tf.reduce_sum(w**2) + b**2,
    "arguments": lambda w, b: lambda x, y: tf.reduce_sum(x**2) + y**2,
    "any arguments": lambda w, b: lambda *ws: tf.reduce_sum(ws[0] ** 2) + ws[1] ** 2,
}


# Every two of the three meet.
@pytest.mark.parametrize(
    ("form", "scale", "is_function"),
    [
        (form, scale, (i + j) % 2 == 1)
        for i, form in enumerate(LOSSES)
        for j, scale in enumerate([None, 1024.0])
    ],
)
def test_minimize(form: str, scale: float | None, is_function: bool) -> None:
    w, b = tf.Variable([1.0, 2.0]), tf.Variable(3.0)
    loss = LOSSES[form](w, b)
    opt = Adam(0.1, loss_scale_factor=scale)
    given = [g.numpy() for g in opt.get_gradients(loss, [w, b])]
    assert given[0].tolist() == [2.0, 4.0] and given[1] == 6.0
    minimize = (
        (lambda: opt.minimize(loss, [w, b]))
        if not is_function
        else tf.function(lambda: opt.minimize(loss, [w, b]), autograph=False)
    )
    for i in range(3):
        assert int(minimize()) == i + 1
    np.testing.assert_allclose(w, [0.7, 1.7], atol=0.01)
    np.testing.assert_allclose(b, 2.7, atol=0.01)
    if scale:
        momentum = opt.named_variables()["Variable_momentum"]
        assert abs(momentum.numpy()).max() < 2


def test_minimize_with_control_flow_and_a_symbolic_loss() -> None:
    w, opt = tf.Variable([3.0]), Adam(0.1)
    opt.build([w])

    def loss() -> Any:
        if w[0] > 1.0:  # noqa: SIM108 (AutoGraph's, inside a function)
            value = tf.reduce_sum(w**2)
        else:
            value = tf.reduce_sum(w)
        return value

    @tf.function
    def step() -> Any:
        return opt.minimize(loss, [w])

    @tf.function
    def symbolic() -> Any:
        return opt.minimize(tf.reduce_sum(w**2), [w])

    step()
    symbolic()
    np.testing.assert_allclose(w, [2.8], atol=0.01)
    assert opt.iterations == 2


def test_minimize_with_grad_loss_and_variables_that_a_loss_does_not_use() -> None:
    w, unused = tf.Variable([1.0, 2.0]), tf.Variable(1.0, name="unused")
    opt = Adam(0.1)
    with pytest.warns(UserWarning, match="unused"):
        opt.minimize(lambda: w * 3.0, [w, unused], grad_loss=np.array([1.0, 0.0]))
    np.testing.assert_allclose(w, [0.9, 2.0], rtol=1e-6)
    with pytest.raises(ValueError, match="grad_loss"):
        opt.minimize(lambda: w * 3.0, [w, unused], grad_loss=np.ones(3))
    with pytest.raises(ValueError, match="No gradients"):
        opt.minimize(lambda: tf.constant(1.0), [w, unused])


@pytest.mark.parametrize("kind", ["vector", "number", "integer", "none", "eager tensor", "string"])
def test_what_is_no_loss(kind: str) -> None:
    w, opt = tf.Variable([1.0, 2.0]), Adam()
    loss = {
        "vector": lambda: w * 2.0,
        "number": lambda: 1.0,
        "integer": lambda: tf.constant(1),
        "none": lambda: None,
        "eager tensor": tf.reduce_sum(w),
        "string": "loss",
    }[kind]
    with pytest.raises(ValueError, match="`loss` must"):
        opt.minimize(loss, [w])
    assert not opt.built and w.numpy().tolist() == [1.0, 2.0]


# --- The rest ------------------------------------------------------------------------------------


def test_two_optimizers_in_two_threads() -> None:
    results: dict[int, Any] = {}

    def run(i: int) -> None:
        params = made(variables(shapes=SMALL_SHAPES))
        opt = build(CASES[EVERYTHING], params)
        go_on(opt, params, range(10))
        results[i] = snapshot(opt, params)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(results[0], results[1], strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("mode", ["xla"], indirect=True)
def test_where_xla_cannot_compile(
    mode: str, slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is one of TensorFlow's own operations then, and nothing is lost."""

    class Strings(schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            return tf.py_function(lambda: 0.1, (), tf.float64)

    w, opt = tf.Variable([1.0, 2.0]), Adam(Strings())
    for _ in range(2):
        opt.apply([tf.constant([1.0, -1.0])], [w])
    np.testing.assert_allclose(w, [0.8, 2.2], rtol=1e-5)
    (program,) = programs(opt)
    assert program._compiled and not program._is_jit
    step = tf.function(lambda: opt.apply([tf.constant([1.0, -1.0])], [w]))
    for _ in range(2):
        step()
    np.testing.assert_allclose(w, [0.6, 2.4], rtol=1e-5)
    fast.is_xla_there.cache_clear()
    monkeypatch.setattr(tf, "constant", None)  # as where a build lacks what is tried
    with pytest.warns(RuntimeWarning, match="cannot compile by XLA"):
        assert not fast.is_xla_there()
    monkeypatch.undo()
    fast.is_xla_there.cache_clear()


@pytest.mark.filterwarnings("ignore:omniadam is slow here")
def test_what_is_private_may_be_missing(
    slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or mean something else; it is found out and said once, where it is used first."""
    function = tf.function(lambda x: [x * 2], input_signature=[tf.TensorSpec([2])])
    concrete, eager = function.get_concrete_function(), type(tf.ones(2))
    looks = fast.is_called_flat, fast.looks_of_tensors, fast.look_for_xla
    results = []
    for is_private in True, False:
        for look in looks:
            look.cache_clear()
        if not is_private:
            kind = type(concrete._inference_function)
            monkeypatch.setattr(kind, "call_flat", lambda self, *tensors: list(tensors))
            monkeypatch.setattr(xla_contexts, "GraphOrParentsInXlaContext", lambda graph: False)
            monkeypatch.setattr(tf, "zeros", lambda *args: WithoutPrivateNames())
        public = fast.is_called_flat(), fast.looks_of_tensors()[0], fast.look_for_xla()
        said = list(slow_reasons)
        monkeypatch.undo()
        assert (public[0], public[1] is eager._shape_tuple) == (is_private, is_private)
        assert (public[2] is not None) == is_private
        assert fast.caller(concrete)([tf.ones(2)])[0].numpy().tolist() == [2.0, 2.0]
        w, opt = tf.Variable(tf.ones(1000)), Adam(0.1, clipnorm=1.0)
        for _ in range(2):
            opt.apply([tf.fill([1000], 0.5)], [w])
        tf.function(lambda opt=opt, w=w: opt.apply([tf.fill([1000], 1e-30)], [w]))()
        results.append(snapshot(opt, [w]))
    for look in looks:
        look.cache_clear()
    gone = ("call_flat", "_shape_tuple", "GraphOrParentsInXlaContext")
    assert all(each in told for each, told in zip(gone, said, strict=True))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_info_tells_the_devices() -> None:
    assert "CPU:0" in omniadam.info()["devices"]["tensorflow"]


def test_a_graph_without_its_private_name(
    slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf, "executing_eagerly", lambda: False)
    monkeypatch.setattr(tf.compat.v1, "get_default_graph", object)
    with pytest.warns(RuntimeWarning, match="lacks `_add_control_dependencies`"):
        assert [plain.is_ordered(each) for each in (False, True)] == [False, True]
    assert len(slow_reasons) == 1


class WithoutPrivateNames:
    """No eager tensor."""


def test_only_tensorflow_is_imported(tmp_path: Path) -> None:
    code = """
import sys
import tensorflow as tf
from omniadam import Adam
before = set(sys.modules)
w = tf.Variable([1.0])
opt = Adam()
for _ in range(3):
    opt.minimize(lambda: tf.reduce_sum(w ** 2), [w])
opt.get_weights(), opt.get_config()
def found():
    names = {name.partition(".")[0] for name in set(sys.modules) - before}
    return sorted(names & {"autograd", "jax", "keras", "optax", "scipy", "tf_keras", "torch"})
print(found())
import torch
print("torch" in found())  # that this can fail
"""
    assert run_script(code, tmp_path).split() == ["[]", "True"]
