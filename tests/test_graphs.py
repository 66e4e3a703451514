"""Graphs of TensorFlow in which only what something depends on is run.

In a graph of TensorFlow 1, in its branches and loops, and in what `wrap_function` makes, a step is
made when what `apply_gradients` returned is asked for, and is then whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from omniadam import Adam, migrate  # noqa: E402
from omniadam.backends import tensorflow as backend  # noqa: E402
from omniadam.compat import contrib_keras, optimizer_v2  # noqa: E402
from omniadam.fast.tensorflow import FastTensorFlow  # noqa: E402

v1 = tf.compat.v1
BEGIN = [1.0, -2.0]
STEPS = 5
Step = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by XLA, which takes a second for each optimizer: they are what graphs are compared to."""
    monkeypatch.setattr(FastTensorFlow, "jit_compile", False)


class Halved(Adam):
    """A rule of one's own."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient / 2, variable, learning_rate)
        self.assign_sub(variable, gradient / 100)


def applied(opt: Any, w: Any) -> Any:
    return opt.apply_gradients([(2 * w, w)])


def minimized(opt: Any, w: Any) -> Any:
    return opt.minimize(lambda: tf.reduce_sum(w**2), [w])


def updated(opt: Any, w: Any) -> Any:
    def loss() -> Any:
        return tf.reduce_sum(w**2)

    is_newer = isinstance(opt, optimizer_v2.Adam)
    (update,) = opt.get_updates(loss, [w]) if is_newer else opt.get_updates([w], {}, loss)
    return update() if callable(update) else update


KINDS: dict[str, tuple[Callable[[], Any], Step]] = {
    "plain": (lambda: Adam(0.1), applied),
    "minimize": (lambda: Adam(0.1), minimized),
    "accumulated": (lambda: Adam(0.1, gradient_accumulation_steps=2), applied),
    "averaged": (lambda: Adam(0.1, use_ema=True, ema_overwrite_frequency=2), applied),
    "clipped": (lambda: Adam(0.1, global_clipnorm=1.0, weight_decay=0.1), applied),
    "own": (lambda: Halved(0.1), applied),
    "2.0": (lambda: optimizer_v2.Adam(0.1, decay=0.1, amsgrad=True), applied),
    "2.0 minimize": (lambda: optimizer_v2.Adam(0.1), minimized),
    "2.0 get_updates": (lambda: optimizer_v2.Adam(0.1), updated),
    "1.1 get_updates": (lambda: contrib_keras.Adam(0.1, clipnorm=1.0), updated),
}


def depending(result: Any) -> Any:
    with tf.control_dependencies([result]):
        return tf.constant(1)


@contextmanager
def control_flow(version: int) -> Iterator[None]:
    if version == 1:
        v1.disable_control_flow_v2()
    try:
        yield
    finally:
        v1.enable_control_flow_v2()


def in_loop(step: Callable[[], Any]) -> Any:
    """A branch in a loop: a step at every other round."""

    def body(i: Any) -> Any:
        made = tf.cond(i % 2 < 1, lambda: depending(step()), lambda: tf.constant(0))
        with tf.control_dependencies([made]):
            return i + 1

    return tf.while_loop(lambda i: i < 2, body, [0])


PLACES = {"graph": lambda step: step(), "loop": in_loop}


@cache
def eager(kind: str) -> Any:
    make, step = KINDS[kind]
    w, opt = tf.Variable(BEGIN), make()
    for _ in range(STEPS):
        step(opt, w)
    return w.numpy()


@pytest.mark.parametrize(("place", "version"), [("graph", 2), ("loop", 1), ("loop", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_a_graph(kind: str, place: str, version: int) -> None:
    make, step = KINDS[kind]
    with control_flow(version), tf.Graph().as_default(), v1.Session() as session:
        w, opt = v1.get_variable("w", initializer=BEGIN, use_resource=True), make()
        result = PLACES[place](lambda: step(opt, w))
        session.run(v1.global_variables_initializer())
        for _ in range(STEPS):
            session.run(result)
        got = session.run(w)
    np.testing.assert_allclose(got, eager(kind), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_a_wrapped_function(kind: str) -> None:
    make, step = KINDS[kind]
    w, opt = tf.Variable(BEGIN), make()
    wrapped = v1.wrap_function(lambda: depending(step(opt, w)), [])
    for _ in range(STEPS):
        wrapped()
    np.testing.assert_allclose(w, eager(kind), rtol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "own"])
def test_a_step_on_replicas_in_a_graph(kind: str) -> None:
    make, step = KINDS[kind]
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with tf.Graph().as_default(), v1.Session() as session:
        with strategy.scope():
            w, opt = v1.get_variable("w", initializer=BEGIN, use_resource=True), make()
        result = strategy.experimental_local_results(strategy.run(lambda: step(opt, w)))
        session.run(v1.global_variables_initializer())
        for _ in range(STEPS):
            session.run(result)
        got = session.run(w)
    np.testing.assert_allclose(got, eager(kind), rtol=1e-5)


@pytest.mark.parametrize("is_known", [True, False])
def test_where_it_is_not_known_what_runs(is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name by which TensorFlow says so is private: without it all is right too."""
    if not is_known:

        def is_ordered(otherwise: bool = False) -> bool:
            return bool(tf.executing_eagerly()) or otherwise

        monkeypatch.setattr(backend, "is_ordered", is_ordered)
    w, opt, own = tf.Variable(BEGIN), Adam(0.1), Halved(0.1)

    @tf.function
    def step() -> Any:
        opt.apply([2 * w], [w])
        return own.apply_gradients([(2 * w, w)])

    for _ in range(STEPS):
        count = step()
    v, opt, own = tf.Variable(BEGIN), Adam(0.1), Halved(0.1)
    for _ in range(STEPS):
        opt.apply([2 * v], [v])
        own.apply([2 * v], [v])
    assert count.numpy() == STEPS
    np.testing.assert_allclose(w, v, rtol=1e-5)


NOTHING_RETURNED: dict[str, Callable[[Any, Any], Any]] = {
    "apply": lambda opt, w: opt.apply([2 * w], [w]),
    "update_step": lambda opt, w: opt.update_step(2 * w, w, 0.1),
    "assign": lambda opt, w: opt.assign(w, 2 * w),
    "assign_add": lambda opt, w: opt.assign_add(w, 2 * w),
    "assign_sub": lambda opt, w: opt.assign_sub(w, 2 * w),
    "learning_rate": lambda opt, w: setattr(opt, "learning_rate", tf.reduce_sum(w)),
}
IN_A_FUNCTION = {
    "set_weights": lambda opt, w: opt.set_weights([np.ones(x.shape) for x in opt.variables]),
    "learning_rate": lambda opt, w: setattr(opt, "learning_rate", 0.5),
}


@pytest.mark.parametrize("name", NOTHING_RETURNED)
def test_what_would_come_to_nothing_in_a_graph(name: str) -> None:
    with tf.Graph().as_default():
        w, opt = v1.get_variable("w", initializer=BEGIN, use_resource=True), Adam(0.1)
        opt.build([w])
        with pytest.raises(RuntimeError, match="only what something depends on is run"):
            NOTHING_RETURNED[name](opt, w)


@pytest.mark.parametrize("name", [*NOTHING_RETURNED, *IN_A_FUNCTION])
def test_what_would_come_to_nothing_in_a_wrapped_function(name: str) -> None:
    w, opt = tf.Variable(BEGIN), Adam(0.1, use_ema=True)
    opt.apply([tf.ones(2)], [w])
    before = [w.numpy(), *opt.get_weights()]

    def act() -> Any:
        (NOTHING_RETURNED | IN_A_FUNCTION)[name](opt, w)
        return tf.constant(1)

    with pytest.raises(RuntimeError, match="only what something depends on is run"):
        v1.wrap_function(act, [])
    for now, then in zip([w.numpy(), *opt.get_weights()], before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_state_of_a_session() -> None:
    """Numbers and variables are assigned in it, at once."""
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", initializer=BEGIN, use_resource=True)
        opt = Adam(0.1, use_ema=True)
        step = opt.apply_gradients([(tf.constant([1.0, 1.0]), w)])
        session.run(v1.global_variables_initializer())
        session.run(step)
        session.run(step)
        (average,) = [v for name, v in opt.named_variables().items() if "average" in name]
        opt.finalize_variable_values([w])
        np.testing.assert_array_equal(session.run(w), session.run(average))
        opt.assign(w, np.array([3.0, 4.0]))
        opt.learning_rate = 0.25
        assert session.run([w, opt.learning_rate])[0].tolist() == [3.0, 4.0]
        assert session.run(opt.learning_rate) == 0.25


@pytest.mark.parametrize("carrier", [copy.deepcopy, migrate])
@pytest.mark.parametrize("kind", [Adam, optimizer_v2.Adam])
@pytest.mark.parametrize("place", ["function", "wrapped"])
def test_state_that_is_set_while_a_function_is_traced(kind: Any, carrier: Any, place: str) -> None:
    """Is set once, not at each call of the function."""
    first, opt = tf.Variable(BEGIN, name="w"), kind(0.1)
    for _ in range(2):
        opt.apply_gradients([(tf.ones(2), first)])
    w, going_on = tf.Variable(first, name="w"), carrier(opt)

    def step() -> Any:
        return depending(going_on.apply_gradients([(2 * tf.ones(2), w)]))

    made = tf.function(step) if place == "function" else v1.wrap_function(step, [])
    for _ in range(3):
        made()
        opt.apply_gradients([(2 * tf.ones(2), first)])
    np.testing.assert_allclose(w, first, rtol=1e-5)
    assert going_on.get_weights()[0] == 5


def test_a_data_set_and_a_map_make_steps() -> None:
    """Their functions are ordered as those of tf.function are."""
    w, v, opt, other = tf.Variable(BEGIN), tf.Variable(BEGIN), Adam(0.1), Adam(0.1)
    opt.build([w])

    def step(x: Any) -> Any:
        return opt.apply_gradients([(2 * w, w)])

    assert [int(n) for n in tf.data.Dataset.range(STEPS).map(step)] == [1, 2, 3, 4, 5]
    tf.function(lambda: tf.map_fn(step, tf.ones(STEPS, tf.int64)))()
    for _ in range(2 * STEPS):
        other.apply([2 * v], [v])
    np.testing.assert_allclose(w, v, rtol=1e-5)
