"""Time sparse steps of a table beside the passes over all rows, and beside SparseAdam.

    python benchmarks/sparse.py ROWS WIDTH zipf|uniform cold|aged [WEIGHT_DECAY]
    python benchmarks/sparse.py pauses

Prints JSON: seconds by name, with the lowest and highest of five fifths of the run. A step is a
lookup of 4,096 ids and an update by them; what takes long is made at every tenth step only. A table
that is aged had a gradient for every row once, a thousand steps before.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from omniadam import Adam, IndexedSlices, Table

IDS, WARM, STEPS, EVERY = 4096, 50, 200, 10
PAUSES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
Step = Callable[[Any], None]


def ours(w: Any, g: Any, settings: dict[str, Any], table: bool, aged: bool) -> Step:
    held: Any = Table(w) if table else w.copy()
    opt = Adam(1e-3, **settings)
    if aged and table:
        every = np.arange(len(w))
        opt.apply_gradients(
            [(IndexedSlices(np.broadcast_to(g[:1], w.shape), every, w.shape), held)]
        )
        for _ in range(1000):
            opt.apply_gradients([(IndexedSlices(g[:0], every[:0], w.shape), held)])

    def step(ids: Any) -> None:
        held.lookup(ids) if table else held[ids]
        opt.apply_gradients([(IndexedSlices(g, ids, w.shape), held)])

    return step


def keras_on_tensorflow(w: Any, g: Any, settings: dict[str, Any]) -> Step:
    import keras
    import tensorflow as tf

    held, opt = keras.Variable(w), keras.optimizers.Adam(1e-3, **settings)
    opt.build([held])
    values = tf.constant(g)

    @tf.function
    def step(ids: Any) -> None:
        tf.gather(held.value, ids)
        opt.apply([tf.IndexedSlices(values, ids, w.shape)], [held])

    return lambda ids: step(tf.constant(ids))


def sparse_adam(w: Any, g: Any, settings: dict[str, Any]) -> Step:
    import torch

    held = torch.nn.Parameter(torch.from_numpy(w.copy()))
    opt, values = torch.optim.SparseAdam([held], lr=1e-3), torch.from_numpy(g)

    def step(given: Any) -> None:
        ids = torch.from_numpy(given)
        held.detach()[ids]
        held.grad = torch.sparse_coo_tensor(ids[None], values, w.shape, check_invariants=False)
        opt.step()

    return step


def rows(count: int, width: int, how: str, state: str, decay: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(count)
    w = rng.standard_normal((count, width), np.float32) * np.float32(0.05)
    g = rng.standard_normal((IDS, width), np.float32) * np.float32(0.01)
    settings = {"weight_decay": decay} if decay else {}
    often = {"table": ours(w, g, settings, True, state == "aged")}
    if not decay:  # it has none
        often["SparseAdam"] = sparse_adam(w, g, settings)
    seldom = {
        "dense": ours(w, g, settings, False, False),
        "Keras on TensorFlow": keras_on_tensorflow(w, g, settings),
    }
    times: dict[str, list[float]] = {name: [] for name in (*often, *seldom)}
    for i in range(WARM + STEPS):
        ids = rng.zipf(1.2, IDS) if how == "zipf" else rng.integers(0, count, IDS)
        ids = shuffled[np.minimum(ids, count - 1)]
        for name, step in (often | seldom if i % EVERY == 0 else often).items():
            start = time.perf_counter()
            step(ids)
            if i >= WARM:
                times[name].append(time.perf_counter() - start)
    result: dict[str, Any] = {}
    for name, taken in times.items():
        fifths = [statistics.median(taken[k::5]) for k in range(5)]
        result[name] = [statistics.median(taken), min(fifths), max(fifths)]
    return result


def pauses() -> list[list[float]]:
    """For each pause: seconds that 4,096 rows take to catch up, and of the steps they replace."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1_000_000, 64), np.float32) * np.float32(0.05)
    g = rng.standard_normal((IDS, 64), np.float32) * np.float32(0.01)
    dense, taken = ours(w, g, {}, False, False), []
    for _ in range(6):
        ids = rng.integers(0, len(w), IDS)
        start = time.perf_counter()
        dense(ids)
        taken.append(time.perf_counter() - start)
    result = []
    for pause in PAUSES:
        table, opt, ids = Table(w), Adam(1e-3), rng.permutation(len(w))[:IDS]
        opt.apply_gradients([(IndexedSlices(g, ids, w.shape), table)])
        nothing = IndexedSlices(g[:0], ids[:0], w.shape)
        for _ in range(pause):
            opt.apply_gradients([(nothing, table)])
        start = time.perf_counter()
        table.lookup(ids)
        result.append([pause, time.perf_counter() - start, pause * statistics.median(taken[1:])])
    return result


if __name__ == "__main__":
    if sys.argv[1] == "pauses":
        found: Any = pauses()
    else:
        decay = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
        found = rows(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], decay)
    print(json.dumps(found))
