"""A step is made as a whole or not at all, and the steps of several threads follow one another."""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from omniadam import Adam, schedules
from omniadam.kernels import cpu

Arrays = list[np.ndarray[Any, Any]]
PLACES: dict[str, Callable[[], Arrays]] = {
    "flat": lambda: [np.ones(1 << 16), np.ones(5)],
    "strided": lambda: [np.ones((1 << 12, 2))[:, 0], np.ones(5)],
    "two types": lambda: [np.ones(1 << 14), np.ones(1 << 14, np.float32)],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"use_ema": True},
    "accumulation": {"gradient_accumulation_steps": 2, "clipnorm": 1e9},
}


def steps_seen(velocity: Any) -> float:
    """How many steps of a gradient of one have been made: its velocity is 1 - beta_2**t."""
    return math.log1p(-float(np.ravel(velocity)[-1])) / math.log(0.999)


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """What Ctrl-C does, so often and at such times as no hand can: after so many seconds."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers here")

    armed = False

    def interrupt(*_: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # JAX has a hook there, from which no interrupt comes out

    def after(seconds: float) -> None:
        """Of 0: from now on none comes, not even one that is on its way."""
        nonlocal armed
        armed = seconds > 0
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield after
    after(0)
    gc.enable()
    signal.signal(signal.SIGALRM, before)


# Every two of the three meet.
@pytest.mark.parametrize(
    ("name", "place", "kernel"),
    [
        (name, place, ("numba", "numpy")[(i + j) % 2])
        for i, name in enumerate(SETTINGS)
        for j, place in enumerate(PLACES)
    ],
    indirect=["kernel"],
)
def test_an_interrupted_step_is_made_and_counted_or_neither(
    name: str, place: str, kernel: str, alarm: Callable[[float], None]
) -> None:
    params = PLACES[place]()
    opt = Adam(1e-6, **SETTINGS[name])
    grads = [np.ones_like(p) for p in params]
    opt.build(dict(zip("ab", params, strict=True)))
    for _ in range(2):  # in which kernels are compiled
        opt.apply(grads, params)
    rng, interrupts = np.random.default_rng(0), 0
    end = time.monotonic() + 0.6
    # After some thousands the velocity is so near to one that float32 no longer tells how many.
    while time.monotonic() < end and opt.iterations < 3000:
        try:
            alarm(rng.uniform(1e-4, 4e-3))
            while time.monotonic() < end + 1:
                opt.apply(grads, params)
            alarm(0)
        except KeyboardInterrupt:
            interrupts += 1
        for which in "ab":
            velocity = opt.named_variables()[f"{which}_velocity"]
            assert abs(steps_seen(velocity) - opt.iterations) < 0.1
    assert interrupts > 1


@pytest.mark.parametrize("name", SETTINGS)
def test_an_interrupted_step_that_helpers_share(
    name: str, alarm: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNIADAM_NUM_THREADS", "2")
    monkeypatch.setattr(cpu, "PARALLEL", 0)
    test_an_interrupted_step_is_made_and_counted_or_neither(name, "two types", "numba", alarm)


def test_several_threads_step_one_optimizer(kernel: str) -> None:
    params = [np.ones(1 << 15), np.ones(3)]
    grads = [np.ones_like(p) for p in params]
    opt = Adam(schedules.InverseTimeDecay(1e-6, 10, 0.5))
    counts: list[int] = []

    def train() -> None:
        for _ in range(50):
            counts.append(opt.apply_gradients(zip(grads, params, strict=True)))

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == list(range(1, 201)) and opt.iterations == 200
    alone = [np.ones(1 << 15), np.ones(3)]
    other = Adam(schedules.InverseTimeDecay(1e-6, 10, 0.5))
    for _ in range(200):
        other.apply(grads, alone)
    for got, want in zip([*params, *opt.variables], [*alone, *other.variables], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("is_built", [True, False])
def test_no_lock_is_held_while_a_schedule_runs(is_built: bool) -> None:
    w, g = np.ones(3), np.ones(3)
    waited: list[bool] = []

    class Waiting(schedules.LearningRateSchedule):
        """Lets another thread make a step in the middle of this one."""

        def __call__(self, step: Any) -> float:
            if threading.current_thread() is threading.main_thread() and not waited:
                waited.append(True)
                thread = threading.Thread(target=opt.apply, args=([g], [w]), daemon=True)
                thread.start()
                thread.join(20)
                assert not thread.is_alive()
            return 0.1

    opt = Adam(Waiting())
    if is_built:
        opt.build([w])
    assert opt.apply_gradients([(g, w)]) == 2
    np.testing.assert_allclose(w, 0.8, rtol=1e-6)


@pytest.mark.parametrize("setting", ["OMNIADAM_NUM_THREADS", "OMNIADAM_KERNEL"])
def test_a_wrong_setting_is_an_error_before_anything_is_written(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = np.ones(3), np.ones((1024, 1024), np.float32)
    opt = Adam(0.1)
    monkeypatch.setitem(os.environ, setting, "two")
    with pytest.raises(ValueError, match=f"{setting} must be .*'two'"):
        opt.apply([small.copy(), large.copy()], [small, large])
    assert not opt.built and (small == 1).all() and (large == 1).all()
    monkeypatch.delitem(os.environ, setting)
    opt.apply([small.copy(), large.copy()], [small, large])
    monkeypatch.setitem(os.environ, setting, "two")
    values = [v.copy() for v in (small, large, *opt.variables)]
    with pytest.raises(ValueError, match=f"{setting} must be .*'two'"):
        opt.apply([small.copy(), large.astype(np.float64)], [small, large])
    for got, want in zip((small, large, *opt.variables), values, strict=True):
        np.testing.assert_array_equal(got, want)


def drop_in(*sizes: int) -> tuple[Any, list[Any]]:
    """`omniadam.torch.Adam` with a group for each parameter."""
    torch = pytest.importorskip("torch")
    kind = pytest.importorskip("omniadam.torch").Adam
    params = [torch.ones(size, dtype=torch.float64) for size in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    return kind([{"params": [p]} for p in params], lr=1e-6), params


@pytest.mark.needs("torch")
def test_an_interrupted_step_of_the_torch_drop_in(
    kernel: str, alarm: Callable[[float], None]
) -> None:
    opt, params = drop_in(1 << 15, 5)
    opt.step()
    rng, interrupts = np.random.default_rng(0), 0
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            alarm(rng.uniform(1e-4, 4e-3))
            while time.monotonic() < end + 1:
                opt.step()
            alarm(0)
        except KeyboardInterrupt:
            interrupts += 1
        states = [opt.state[p] for p in params]
        counts = [state["step"].item() for state in states]
        assert counts[0] == counts[1]
        for state in states:
            assert abs(steps_seen(state["exp_avg_sq"].numpy()) - counts[0]) < 0.1
    assert interrupts > 1


@pytest.mark.needs("torch")
def test_several_threads_step_one_torch_drop_in(kernel: str) -> None:
    opt, params = drop_in(1 << 14, 3)
    other, alone = drop_in(1 << 14, 3)

    def train() -> None:
        for _ in range(25):
            opt.step()

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(100):
        other.step()
    for p, q in zip(params, alone, strict=True):
        assert opt.state[p]["step"].item() == 100
        assert (p == q).all() and (opt.state[p]["exp_avg"] == other.state[q]["exp_avg"]).all()


@pytest.mark.needs("torch")
def test_a_wrong_setting_is_an_error_before_the_torch_drop_in_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMNIADAM_NUM_THREADS", "two")
    opt, params = drop_in(3, 1 << 20)
    with pytest.raises(ValueError, match="OMNIADAM_NUM_THREADS must be"):
        opt.step()
    assert all((p == 1).all() for p in params) and not opt.state
