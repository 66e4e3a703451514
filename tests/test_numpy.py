"""NumPy against the float64 oracle: every setting, every dtype, both ways of running the rule."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest

import omniadam
from cases import (
    BEYOND_KERAS,
    CASES,
    PART,
    SINGLE,
    STEPS,
    WHOLE,
    Case,
    assert_close,
    error_in_ulps,
    gradients,
    sparse_gradient,
    variables,
    with_missing,
)
from omniadam import Adam, IndexedSlices
from omniadam.kernels import cpu
from reference import Array, Reference

STEPS_OF_KERAS = 12  # which takes its time
BY_NUMPY = CASES | BEYOND_KERAS
BY_NUMBA = SINGLE | PART | BEYOND_KERAS
TABLE = BY_NUMPY | BY_NUMBA
EVERYTHING = list(CASES)[-1]

cached_gradients = cache(gradients)


def build(case: Case, params: list[Any]) -> Adam:
    opt = Adam(**case.settings_for(omniadam.schedules))
    if case.excluded:
        opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
    opt.build({f"w{i}": p for i, p in enumerate(params)})
    return opt


def slots_of(opt: Adam, slot: str, count: int) -> list[Array]:
    state = opt.named_variables()
    return [state[f"w{i}_{slot}"] for i in range(count)]


def check(opt: Adam, params: list[Array], reference: Reference, dtype: str = "float32") -> None:
    assert_close(params, reference, "variable", dtype)
    for slot in reference.state:
        if slot != "variable":
            assert_close(slots_of(opt, slot, len(params)), reference, slot, dtype)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [*(("numba", name) for name in BY_NUMBA), *(("numpy", name) for name in BY_NUMPY)],
    indirect=["kernel"],
)
def test_every_setting(name: str, kernel: str) -> None:
    params = variables()
    opt, reference = build(TABLE[name], params), TABLE[name].reference(params)
    for step in range(100 if name in ("defaults", EVERYTHING) else STEPS):
        grads = cached_gradients(step)
        assert opt.apply_gradients(zip(grads, params, strict=True)) == step + 1
        reference.step(grads)
    check(opt, params, reference)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("name", ["defaults", *WHOLE])
def test_every_dtype(name: str, dtype: str, kernel: str) -> None:
    params, case = variables(dtype), (CASES | WHOLE)[name]
    opt, reference = build(case, params), case.reference(params)
    for step in range(STEPS):
        grads = gradients(step, dtype=dtype)
        opt.apply_gradients(zip(grads, params, strict=True))
        reference.step(grads)
        # What a 16-bit store loses is the dtype's doing; the next step starts from it.
        check(opt, params, reference, dtype)
        if dtype == "float16":
            reference.resync(params)


@pytest.mark.parametrize(
    "name", ["defaults", "global_clipnorm", "use_ema", "gradient_accumulation_steps"]
)
def test_missing_and_sparse_gradients(name: str, kernel: str) -> None:
    shapes = ((7,), (40, 5), (6, 2, 3))
    params = variables(shapes=shapes)
    opt, reference = build(CASES[name], params), CASES[name].reference(params)
    for step in range(STEPS):
        sparse = [sparse_gradient(step, shape) for shape in shapes]
        given = with_missing(step, sparse)  # type: ignore[arg-type]
        ours = [
            None if g is None else IndexedSlices(g[1], g[0], shape)
            for g, shape in zip(given, shapes, strict=True)
        ]
        missing = any(g is None for g in given)
        with pytest.warns(UserWarning, match="'w") if missing else nullcontext():
            opt.apply_gradients(zip(ours, params, strict=True))
        reference.step(given)
    check(opt, params, reference)


@pytest.mark.needs("ml_dtypes")
def test_sparse_bfloat16_is_summed_in_float32(kernel: str) -> None:
    import ml_dtypes

    values = np.array([[256.0], [1.0], [1.0], [3.0]], ml_dtypes.bfloat16)  # 257 is no bfloat16
    sparse = IndexedSlices(values, np.array([1, 1, 1, 2]), (4, 1))
    assert sparse.to_dense().ravel().tolist() == [0, 258, 3, 0]
    assert str(sparse.dtype) == "bfloat16"
    w, dense = (np.ones((4, 1), ml_dtypes.bfloat16) for _ in range(2))
    for gradient, variable in ((sparse, w), (sparse.to_dense(), dense)):
        Adam(0.1).apply_gradients([(gradient, variable)])
    np.testing.assert_array_equal(w, dense)


def plans_alive() -> int:
    gc.collect()
    return sum(type(each) is cpu.Sweep for each in gc.get_objects())


@pytest.mark.parametrize("kind", [omniadam.Adam, "torch"])
def test_plans_of_few_sets_of_gradients_are_kept(kind: Any) -> None:
    """However many of them are of another type in each step."""
    params: list[Any] = [np.ones(2) for _ in range(8)]
    if kind == "torch":
        kind = pytest.importorskip("omniadam.torch").Adam
        params = [pytest.importorskip("torch").from_numpy(p) for p in params]
        opt = kind(params)
    else:
        opt = kind()
    before = plans_alive()
    for step in range(100):
        grads = [p + 0 for p in params]
        for i, g in enumerate(grads):
            if step >> i & 1:
                g = g.astype(np.float32) if isinstance(g, np.ndarray) else g[None].T[:, 0].float()
                grads[i] = g
        if hasattr(opt, "apply"):
            opt.apply(grads, params)
        else:
            for p, g in zip(params, grads, strict=True):
                p.grad_dtype = None
                p.grad = g
            opt.step()
    assert plans_alive() - before < 50


@pytest.mark.needs("keras")
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")  # Keras
def test_closer_to_the_oracle_than_keras(capsys: pytest.CaptureFixture[str]) -> None:
    """Over all settings the largest error of ours is smaller than that of Keras itself."""
    import keras

    largest = {"omniadam": 0.0, "keras": 0.0}
    for name in ("defaults", *WHOLE):
        case, params = (CASES | WHOLE)[name], variables()
        reference = case.reference(params)
        theirs = [keras.Variable(p) for p in params]
        peer = keras.optimizers.Adam(**case.settings_for(keras.optimizers.schedules))
        if case.excluded:
            peer.exclude_from_weight_decay(var_list=[theirs[i] for i in case.excluded])
        opt = build(case, params)
        for step in range(STEPS_OF_KERAS):
            grads = cached_gradients(step)
            opt.apply_gradients(zip(grads, params, strict=True))
            peer.apply_gradients(zip(grads, theirs, strict=True))
            reference.step(grads)
        for who, values in (("omniadam", params), ("keras", [v.numpy() for v in theirs])):
            for i, value in enumerate(values):
                error = float(np.max(error_in_ulps(value, reference, i), initial=0.0))
                largest[who] = max(largest[who], error)
    with capsys.disabled():
        print(f"\nlargest error in ulps of the update after {STEPS_OF_KERAS} steps: {largest}")
    assert largest["omniadam"] < largest["keras"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", 0.5),
        ("clipvalue", 0.01),
        ("clipnorm", 0.01),
        ("global_clipnorm", 0.01),
        ("loss_scale_factor", 8.0),
        ("beta_1", 0.25),
        ("beta_2", 0.5),
        ("epsilon", 1.0),
    ],
)
def test_a_setting_that_is_changed_takes_effect(name: str, value: float, kernel: str) -> None:
    """As in an optimizer that had it from the beginning, and the state of this one."""
    g, w = np.linspace(-1, 1, 7), np.linspace(1, 2, 7)
    opt = Adam(0.1)
    for _ in range(2):
        opt.apply([g], [w])
    before, other = w.copy(), w.copy()
    fresh = Adam(0.1, **{name: value})
    fresh.build([other])
    fresh.set_weights(opt.get_weights())
    unchanged = Adam(0.1)
    unchanged.build([before])
    unchanged.set_weights(opt.get_weights())
    setattr(opt, name, value)
    for each, variable in ((opt, w), (fresh, other), (unchanged, before)):
        each.apply([g], [variable])
    np.testing.assert_array_equal(w, other)
    assert (w != before).any()
