"""Tables whose rows catch up when they are used: the same bits as the array, whatever happens."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from omniadam import Adam, AdamW, IndexedSlices, Table, schedules
from omniadam.compat import optimizer_v2
from omniadam.kernels import rows

ROWS, WIDTH = 60, 5
Ids = Callable[[np.random.Generator, int], Any]


def uniform(rng: np.random.Generator, step: int) -> Any:
    return rng.integers(0, ROWS, 4)


def skewed(rng: np.random.Generator, step: int) -> Any:
    return np.minimum(rng.zipf(1.2, 12), ROWS) - 1


def in_bursts(rng: np.random.Generator, step: int) -> Any:
    """Empty batches, and rows that are used again after many steps, or never."""
    return rng.integers(0, ROWS // 2, 30) if step % 150 in (0, 1) else np.zeros(0, np.int64)


class Pair:
    """A table, and an array that is trained alike."""

    def __init__(self, make: Callable[[], Any], dtype: Any = np.float32, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        values = (rng.standard_normal((ROWS, WIDTH)) * 0.1).astype(dtype)
        values[0], values[1] = 0.0, -0.0
        self.rng, self.array, self.table = rng, values.copy(), Table(values, "table")
        self.biases = [np.ones(3, dtype), np.ones(3, dtype)]
        self.optimizers = [make(), make()]

    def step(self, ids: Any, zeros: bool = False) -> None:
        ids = np.asarray(ids, np.int64)
        values = self.rng.standard_normal((*ids.shape, WIDTH)).astype(self.array.dtype)
        values = np.zeros_like(values) if zeros else values
        bias = self.rng.standard_normal(3).astype(self.array.dtype)
        gradient = IndexedSlices(values, ids, self.array.shape)
        for opt, w, b in zip(self.optimizers, (self.array, self.table), self.biases, strict=True):
            opt.apply_gradients([(gradient, w), (bias, b)])

    def check(self) -> None:
        of_array, of_table = (
            list(opt.variables() if callable(opt.variables) else opt.variables)
            for opt in self.optimizers
        )
        pairs = zip([self.array, *of_array], [np.asarray(self.table), *of_table], strict=True)
        for a, b in pairs:
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert self.biases[0].tobytes() == self.biases[1].tobytes()

    def run(self, ids: Ids, steps: int, rate: Callable[[int], float] | None = None) -> None:
        for step in range(steps):
            if rate is not None:
                for opt in self.optimizers:
                    opt.learning_rate = rate(step)
            self.step(ids(self.rng, step))
            if step % 7 == 3:
                wanted = self.rng.integers(0, ROWS, (2, 3))
                assert self.table.lookup(wanted).tobytes() == self.array[wanted].tobytes()
        self.check()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "weight_decay": {"weight_decay": 0.02},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.125},
    "loss_scale_factor": {"loss_scale_factor": 4.0},
    "beta_1 0": {"beta_1": 0.0},
    "beta_1 0.99": {"beta_1": 0.99, "beta_2": 0.9},
    "short": {"beta_1": 0.25, "beta_2": 0.375},
    "epsilon 0": {"epsilon": 0.0},
    "schedule": {"learning_rate": schedules.CosineDecay(0.02, 100, warmup_steps=20)},
    "callables": {"learning_rate": lambda: 0.01, "beta_1": lambda: 0.9},
    "use_ema": {"use_ema": True, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3, "clipnorm": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_bits(name: str, kernel: str) -> None:
    steps = 400 if kernel == "numba" else 40
    for ids in (uniform, skewed, in_bursts):
        Pair(lambda: Adam(**SETTINGS[name])).run(ids, steps)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "weight_decay"])
def test_same_bits_in_other_types(name: str, dtype: Any) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    Pair(lambda: Adam(0.01, **SETTINGS[name]), dtype).run(in_bursts, 400)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizer_v2.Adam(0.01, epsilon=1e-8, amsgrad=True),
        lambda: AdamW(0.01),
    ],
    ids=["TF 2.0", "AdamW"],
)
def test_all_generations(make: Callable[[], Any]) -> None:
    Pair(make).run(skewed, 60)


def test_a_table_without_weight_decay_beside_variables_with_it() -> None:
    pair = Pair(lambda: AdamW(0.01, weight_decay=0.1))
    for opt, w in zip(pair.optimizers, (pair.array, pair.table), strict=True):
        opt.exclude_from_weight_decay(var_list=[w])
    pair.run(in_bursts, 310)


def test_rates_that_rise_again() -> None:
    """What rested at a small rate moves at a large one."""
    Pair(lambda: Adam(0.01)).run(in_bursts, 620, lambda step: 1e-9 if step % 150 < 140 else 0.5)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_long_pauses(kind: str) -> None:
    """Until moments are denormal and stay so."""
    pair = Pair(lambda: Adam(0.01, beta_2=0.99), kind)
    pair.step(range(ROWS))
    for pause in (1, 10, 130, 1000, 12000):
        for _ in range(pause):
            pair.step([])
        wanted = pair.rng.integers(0, ROWS, 7)
        assert pair.table.lookup(wanted).tobytes() == pair.array[wanted].tobytes()
        pair.step(pair.rng.integers(0, ROWS, 3))
    pair.check()


def test_rows_end_early_and_only_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN in a norm reaches every row, and weights that change end nothing early."""
    pair = Pair(lambda: Adam(0.01, global_clipnorm=1.0))
    pair.step([3, 4])
    with np.errstate(all="ignore"):
        pair.rng = type("", (), {"standard_normal": staticmethod(lambda s: np.full(s, np.nan))})()
        pair.step([5])
    pair.check()
    assert np.isnan(np.asarray(pair.table)).all()

    beta = [0.9]
    pair = Pair(lambda: Adam(0.01, beta_1=lambda: beta[0]))
    pair.step(range(ROWS))
    for step in range(900):
        beta[0] = 0.9 if step < 850 else 0.5
        pair.step([])
    pair.check()


def test_histories_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_STEPS", 16)
    pair = Pair(lambda: Adam(0.01))
    pair.run(uniform, 100)
    clock = pair.table.clock
    assert clock.steps == 100 and clock.seen.nbytes == 4 * ROWS
    pair.step([1])
    assert clock.waiting <= 16


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.lists(st.integers(0, ROWS - 1), max_size=6)),
    st.tuples(st.just("pause"), st.integers(1, 200)),
    st.tuples(st.just("rate"), st.sampled_from([0.0, 1e-8, 0.01, 0.3])),
    st.tuples(st.just("lookup"), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4)),
    st.tuples(st.sampled_from(["flush", "assign", "dense", "weights", "none"]), st.none()),
    st.tuples(st.just("saved"), st.none()),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ACTIONS, max_size=25), st.sampled_from(["plain", "amsgrad", "weight_decay"]))
def test_whatever_happens(actions: list[tuple[str, Any]], name: str) -> None:
    def make() -> Adam:
        return Adam(**SETTINGS[name])

    pair = Pair(make)
    for action, value in actions:
        w, opts = (pair.array, pair.table), pair.optimizers
        for opt, each, bias in zip(opts, w, pair.biases, strict=True):
            opt.build([each, bias])
        if action == "step":
            pair.step(value)
        elif action == "pause":
            for _ in range(value):
                pair.step([])
        elif action == "rate":
            for opt in opts:
                opt.learning_rate = value
        elif action == "lookup":
            assert pair.table.lookup(value).tobytes() == pair.array[value].tobytes()
        elif action == "flush":
            pair.table.flush()
        elif action == "assign":
            new = pair.rng.standard_normal(pair.array.shape).astype(np.float32)
            pair.array[...] = new
            pair.table.assign(new)
        elif action == "dense":
            g = pair.rng.standard_normal(pair.array.shape).astype(np.float32)
            for opt, each in zip(opts, w, strict=True):
                opt.apply_gradients([(g, each)])
        elif action == "none":  # no step of the table
            for opt, b in zip(opts, pair.biases, strict=True):
                opt.apply_gradients([(np.ones_like(b), b)])
        elif action == "weights":
            for opt in opts:
                opt.set_weights([x if x.ndim == 0 else 0.5 * x for x in opt.get_weights()])
        elif action == "saved":
            pair.table = pickle.loads(pickle.dumps(pair.table))
            pair.optimizers[1] = pickle.loads(pickle.dumps(pair.optimizers[1]))
            pair.array = pair.array.copy()
            pair.optimizers[0] = pickle.loads(pickle.dumps(pair.optimizers[0]))
    pair.check()


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMNIADAM_NUM_THREADS", threads)
        rng = np.random.default_rng(0)
        table = Table(rng.standard_normal((3000, 64)).astype(np.float32))
        opt = Adam()
        for _ in range(20):
            ids = rng.integers(0, 3000, 1500)
            g = rng.standard_normal((1500, 64)).astype(np.float32)
            opt.apply_gradients([(IndexedSlices(g, ids, table.shape), table)])
        ends.append(np.asarray(table).tobytes())
    assert ends[0] == ends[1]


# --- The surface ---------------------------------------------------------------------------------


def test_a_table_is_a_copy_that_names_itself() -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    table = Table(values, name="items")
    values[...] = 0
    assert (table.shape, table.dtype, table.ndim, table.size, len(table)) == (
        (3, 2), np.float32, 2, 6, 3,
    )  # fmt: skip
    assert repr(table) == "Table(shape=(3, 2), dtype=float32, name='items')"
    assert table[-1].tolist() == [4, 5] and table[1:].tolist() == [[2, 3], [4, 5]]
    assert np.asarray(table, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.array(table, copy=False)
    with pytest.raises(IndexError, match="out of range"):
        table[3]
    opt = Adam()
    opt.build([table])
    assert "items_momentum" in opt.named_variables()


def test_indices_of_any_shape() -> None:
    g = IndexedSlices(np.ones((2, 3, 4)), np.array([[0, 1, 1], [2, 0, 0]]), (5, 4))
    assert g.to_dense()[:, 0].tolist() == [3, 2, 1, 0, 0]
    table = Table(np.zeros((5, 4)))
    assert table.lookup([[0, 1], [2, 3]]).shape == (2, 2, 4)
    assert table.lookup([]).shape == (0, 4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: Table(np.zeros(3, int)), TypeError, "float16, bfloat16, float32 or float64"),
        (lambda: Table(np.float32(1.0)), ValueError, "axis of rows"),
        (lambda: Table(np.zeros((2, 1))).lookup([0.5]), TypeError, "must be integers"),
        (lambda: Table(np.zeros((2, 1))).lookup([2]), ValueError, "from 0 to 1"),
        (lambda: Table(np.zeros((2, 1))).lookup([-1]), ValueError, "from 0 to 1"),
        (lambda: Table(np.zeros((2, 1))).assign(np.zeros((3, 1))), ValueError, "broadcast"),
    ],
)
def test_bad_input(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_one_optimizer_at_a_time() -> None:
    table, g = Table(np.zeros((4, 2))), IndexedSlices(np.ones((1, 2)), [1], (4, 2))
    first, second = Adam(0.1), Adam(0.1)
    first.apply_gradients([(g, table)])
    first.apply_gradients([(IndexedSlices(np.ones((1, 2)), [2], (4, 2)), table)])
    with pytest.raises(ValueError, match="release"):
        second.apply_gradients([(g, table)])
    assert not second.built
    table.release()
    before = np.asarray(table)
    assert before[1, 0] < -0.15  # the step that the row missed was made
    with pytest.raises(ValueError, match="release"):
        first.apply_gradients([(g, table)])
    assert first.iterations == 2
    second.apply_gradients([(g, table)])
    assert np.asarray(table)[1, 0] < before[1, 0]
    del second
    gc.collect()
    Adam(0.1).build([table])  # of one that is gone


def test_wrong_gradients_change_nothing() -> None:
    pair = Pair(lambda: Adam(0.1))
    pair.run(uniform, 5)
    opt, before = pair.optimizers[1], np.asarray(pair.table)
    for wrong in (
        IndexedSlices(np.ones((1, 2)), [1], (4, 2)),
        np.ones(3),
        "a gradient",
    ):
        with pytest.raises((ValueError, TypeError)):
            opt.apply_gradients([(wrong, pair.table), (pair.biases[1], pair.biases[1])])
    assert opt.iterations == 5 and np.asarray(pair.table).tobytes() == before.tobytes()
    pair.check()


def test_copies() -> None:
    pair = Pair(lambda: Adam(0.1))
    pair.run(uniform, 5)
    other = copy.deepcopy(pair.table)
    assert np.asarray(other).tobytes() == pair.array.tobytes()
    pair.run(uniform, 5)
    assert np.asarray(other).tobytes() != pair.array.tobytes()
    state = pair.optimizers[1].get_weights()
    variables, _ = pair.optimizers[1].stateless_apply(
        pair.optimizers[1].variables,
        [IndexedSlices(np.ones((1, WIDTH), np.float32), [1], pair.table.shape), np.ones(3)],
        [pair.table, pair.biases[1]],
    )
    assert np.asarray(variables[0]).tobytes() != pair.array.tobytes()
    for a, b in zip(state, pair.optimizers[1].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    pair.check()


def test_threads_that_step_look_up_and_flush(kernel: str) -> None:
    """As if the steps had followed one another: no row makes one twice, and none is lost."""
    table, opt = Table(np.zeros((50, 4), np.float32)), Adam(0.01)
    ones = IndexedSlices(np.ones((50, 4), np.float32), np.arange(50), table.shape)
    one = IndexedSlices(np.ones((1, 4), np.float32), [7], table.shape)
    opt.apply_gradients([(ones, table)])
    errors: list[BaseException] = []

    def do(action: Callable[[], Any]) -> None:
        try:
            for _ in range(60):
                action()
        except BaseException as error:
            errors.append(error)

    actions = [
        lambda: opt.apply_gradients([(one, table)]),
        lambda: opt.apply_gradients([(one, table)]),
        lambda: table.lookup(np.arange(0, 50, 3)),
        table.flush,
    ]
    threads = [threading.Thread(target=do, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and opt.iterations == 121
    array, other = np.zeros((50, 4), np.float32), Adam(0.01)
    other.apply_gradients([(ones, array)])
    for _ in range(120):
        other.apply_gradients([(one, array)])
    assert np.asarray(table).tobytes() == array.tobytes()
