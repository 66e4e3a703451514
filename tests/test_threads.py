"""Several threads on one optimizer, and a step inside a user's function of another one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest

from omniadam import Adam, Optimizer

THREADS, STEPS = 4, 12
EVERYTHING: dict[str, Any] = {
    "learning_rate": 0.01,
    "amsgrad": True,
    "weight_decay": 0.5,
    "global_clipnorm": 2.0,
    "use_ema": True,
    "ema_overwrite_frequency": 3,
    "gradient_accumulation_steps": 2,
}


class Library:
    """How variables and gradients of a library are made, and read."""

    def __init__(self, name: str) -> None:
        self._library: Any = pytest.importorskip(name)
        self.name = name

    def variable(self, value: Any) -> Any:
        value = np.array(value, np.float32)
        if self.name == "jax":
            return self._library.new_ref(self._library.numpy.asarray(value))
        if self.name == "tensorflow":
            return self._library.Variable(value)
        return self.gradient(value)

    def gradient(self, value: Any) -> Any:
        value = np.array(value, np.float32)
        if self.name == "jax":
            return self._library.numpy.asarray(value)
        if self.name == "tensorflow":
            return self._library.constant(value)
        return value if self.name == "numpy" else self._library.from_numpy(value)

    def host(self, variable: Any) -> Any:
        if self.name in ("torch", "tensorflow"):
            return variable.numpy()
        return np.array(variable[...])


@pytest.fixture(params=["numpy", "torch", "jax", "tensorflow"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """On TensorFlow XLA, which takes a second for each optimizer, compiles the plain steps, and
    below those of variables with a constraint.
    """
    chosen = Library(request.param)
    if chosen.name == "tensorflow":
        from omniadam.fast.tensorflow import FastTensorFlow

        monkeypatch.setattr(FastTensorFlow, "jit_compile", "plain" in request.node.name)
    return chosen


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What each thread returned; its error is raised here."""
    results: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread waits for ever"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def problem(library: Library, **settings: Any) -> tuple[Adam, list[Any], list[Any]]:
    opt = Adam(**settings)
    params = [library.variable(np.linspace(-1, 1, n)) for n in (3, 5)]
    return opt, params, [library.gradient(np.linspace(1, 2, n)) for n in (3, 5)]


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.01}, EVERYTHING, {"learning_rate": lambda count: 0.1 / (count + 1)}],
    ids=["plain", "everything", "schedule"],
)
def test_every_step_is_made_and_counted(
    library: Library, settings: dict[str, Any], is_built: bool
) -> None:
    if callable(settings["learning_rate"]):
        settings = {"learning_rate": Slowing()}
    opt, params, grads = problem(library, **settings)
    alone, theirs, _ = problem(library, **settings)
    if is_built:
        opt.build(params)

    def work(_: int) -> list[int]:
        pairs = list(zip(grads, params, strict=True))
        return [int(opt.apply_gradients(pairs)) for _ in range(STEPS)]

    counts = sorted(chain.from_iterable(in_threads(work)))
    for _ in range(THREADS * STEPS):
        alone.apply_gradients(zip(grads, theirs, strict=True))
    if library.name in ("jax", "tensorflow"):
        assert counts == list(range(1, THREADS * STEPS + 1))
    assert int(opt._calls()) == THREADS * STEPS
    for a, b in zip(params, theirs, strict=True):
        np.testing.assert_array_equal(library.host(a), library.host(b))
    for x, y in zip(opt.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)


class LearningRateSchedule:
    """What a schedule of Keras has for a base, by name."""


class Slowing(LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 0.1 if step is None else 0.125 * 0.5 ** (step / 100)


class Waiting(LearningRateSchedule):
    """A schedule, or what else calls it, that other threads' steps must not wait for."""

    def __init__(self, others: Callable[[], None]) -> None:
        self.others, self.calls = others, 0

    def __call__(self, *step: Any) -> float:
        self.calls += 1
        if self.calls == 1:
            thread = threading.Thread(target=self.others)
            thread.start()
            thread.join(60)
            assert not thread.is_alive(), "the step of another thread waits for this function"
        return 0.1


class Own(Optimizer):
    """An update of the user's."""

    def __init__(self, hook: Callable[[], float]) -> None:
        super().__init__(0.1)
        self.hook = hook

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.hook()
        self.assign_sub(variable, gradient * 0.1)


@pytest.mark.parametrize("where", ["schedule", "rate", "beta", "update_step"])
def test_nobody_waits_for_a_function_of_the_users(library: Library, where: str) -> None:
    params = [library.variable([1.0, 2.0])]
    pairs = [(library.gradient([1.0, 1.0]), params[0])]
    waiting = Waiting(lambda: opt.apply_gradients(pairs))
    opt: Any
    if where == "update_step":
        opt = Own(waiting)
    elif where == "schedule":
        opt = Adam(waiting)
    else:
        setting = "learning_rate" if where == "rate" else "beta_1"
        opt = Adam(**{setting: lambda: waiting()})  # type: ignore[arg-type]
    opt.build(params)
    opt.apply_gradients(pairs)
    opt.apply_gradients(pairs)
    assert waiting.calls >= 1
    assert int(opt.iterations) == 3


@pytest.mark.parametrize("where", ["schedule", "rate", "update_step"])
def test_a_step_inside_of_another_optimizers(library: Library, where: str) -> None:
    inner, outer = library.variable([1.0, 2.0]), library.variable([1.0, 2.0])
    g = library.gradient([1.0, -1.0])
    a = Adam(0.1, epsilon=0.0)
    a.build([inner])
    b: Any

    def hook(*step: Any) -> float:
        a.apply_gradients([(g, inner)])
        return 0.1

    if where == "update_step":
        b = Own(hook)
    elif where == "rate":
        b = Adam(hook, epsilon=0.0)
    else:
        b = Adam(type("Calling", (LearningRateSchedule,), {"__call__": hook})(), epsilon=0.0)
    b.build([outer])
    for _ in range(3):
        b.apply_gradients([(g, outer)])
    assert int(b.iterations) == 3
    np.testing.assert_allclose(library.host(outer), [0.7, 2.3], rtol=1e-5)
    n = int(a.iterations)
    # A schedule is traced, and so is a step in it: it belongs to the compiled step or to none.
    assert n == 3 or (where == "schedule" and n >= 1)
    np.testing.assert_allclose(library.host(inner), [1 - 0.1 * n, 2 + 0.1 * n], rtol=1e-5)


def test_state_that_is_read_or_set_while_another_thread_makes_steps() -> None:
    w = np.zeros(1 << 22, np.float32)  # a step of it takes milliseconds
    g, opt = np.ones_like(w), Adam(0.1)
    opt.apply([g], [w])
    state = opt.get_weights()
    is_over = False

    def steps() -> None:
        while not is_over:
            opt.apply([g], [w])

    thread = threading.Thread(target=steps)
    thread.start()
    read = []
    for i in range(20):
        read.append([*opt.get_weights(), *opt.__getstate__()["_state"].restored.state.values()])
        if i % 2:
            opt.set_weights(state)
    is_over = True
    thread.join()
    for each in chain(*read, opt.variables):
        assert each.min() == each.max()


def test_settings_that_are_called_are_those_of_their_own_step(library: Library) -> None:
    def problem_of_its_count() -> tuple[Adam, Any]:
        def rate() -> float:
            count = int(opt.iterations)
            time.sleep(0.001)  # in which others make steps
            return 0.1 * 0.9**count

        opt = Adam(rate, beta_1=lambda: 0.9 - 0.01 * int(opt.iterations))
        variable = library.variable([1.0, -2.0])
        opt.build([variable])
        return opt, variable

    g = library.gradient([1.0, -1.0])
    (opt, variable), (alone, other) = problem_of_its_count(), problem_of_its_count()
    in_threads(lambda _: [opt.apply_gradients([(g, variable)]) for _ in range(5)])
    for _ in range(THREADS * 5):
        alone.apply_gradients([(g, other)])
    np.testing.assert_array_equal(library.host(variable), library.host(other))
    assert int(opt.iterations) == THREADS * 5


def test_a_setting_that_makes_a_step_is_called_once(library: Library) -> None:
    variable, other = library.variable([1.0, 2.0]), library.variable([1.0, 2.0])
    g, calls = library.gradient([1.0, -1.0]), []

    def rate() -> float:
        calls.append(0)
        if len(calls) == 1:
            opt.apply_gradients([(g, other)])
        return 0.1

    opt = Adam(rate)
    opt.build([variable, other])
    opt.apply_gradients([(g, variable)])
    assert len(calls) == 2
    assert int(opt.iterations) == 2


def test_nobody_waits_for_the_constraint_of_a_variable() -> None:
    tf: Any = pytest.importorskip("tensorflow")
    other = tf.Variable([1.0, 2.0])
    waiting = Waiting(lambda: opt.apply_gradients([(tf.constant([1.0, 1.0]), other)]))

    def constraint(value: Any) -> Any:
        waiting()
        return tf.clip_by_value(value, 0.95, 1.0)

    variable = tf.Variable([1.0, 1.0], constraint=constraint)
    opt = Adam(0.1)
    opt.build([variable, other])
    opt.apply_gradients([(tf.constant([1.0, 1.0]), variable)])
    assert int(opt.iterations) == 2
    np.testing.assert_allclose(variable.numpy(), 0.95)
    np.testing.assert_allclose(other.numpy(), [0.9, 1.9], rtol=1e-6)


@pytest.mark.parametrize("storing_is_slow", [False, True])
def test_every_step_with_a_constraint_is_made_and_counted(
    monkeypatch: pytest.MonkeyPatch, storing_is_slow: bool
) -> None:
    tf: Any = pytest.importorskip("tensorflow")
    if storing_is_slow:  # so that others read while a part of a step is stored
        from omniadam.backends.tensorflow import TensorFlow

        store = TensorFlow.store

        def slowly(self: Any, variable: Any, value: Any) -> Any:
            stored = store(self, variable, value)
            time.sleep(0.001)
            return stored

        monkeypatch.setattr(TensorFlow, "store", slowly)

    def problem_with_a_constraint() -> tuple[Adam, Any]:
        variable = tf.Variable([1.0, 1.0], constraint=lambda x: tf.clip_by_value(x, 0.5, 1.0))
        opt = Adam(0.01, amsgrad=True)
        opt.build([variable])
        return opt, variable

    g, steps = tf.constant([1.0, -1.0]), 3 if storing_is_slow else STEPS
    (opt, variable), (alone, theirs) = problem_with_a_constraint(), problem_with_a_constraint()
    in_threads(lambda _: [opt.apply_gradients([(g, variable)]) for _ in range(steps)])
    for _ in range(THREADS * steps):
        alone.apply_gradients([(g, theirs)])
    for x, y in zip(opt.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(variable.numpy(), theirs.numpy())
