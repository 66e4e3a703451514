"""JAX: Refs eagerly and in compiled functions, bare arrays through `stateless_apply`."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from cases import (
    BEYOND_KERAS,
    CASES,
    FORMATS,
    PART,
    SMALL_SHAPES,
    WHOLE,
    Case,
    assert_close,
    gradients,
    sparse_gradient,
    tolerance,
    variables,
    with_missing,
)
from omniadam import Adam, AdamW, Optimizer, schedules
from omniadam.fast import xla
from omniadam.kernels import cpu
from precision import double_precision
from reference import Array, Reference

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.experimental import sparse  # noqa: E402

from omniadam.backends import jax as backend  # noqa: E402
from omniadam.fast import jax as fast  # noqa: E402

STEPS = 20
TABLE = PART | BEYOND_KERAS
SHAPES = ((), (7,), (3, 5), (0, 3))
# A slot of every kind, and everything that a step does.
EVERYTHING: dict[str, Any] = {
    "learning_rate": 0.01,
    "amsgrad": True,
    "weight_decay": 0.5,
    "global_clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.75,
    "ema_overwrite_frequency": 2,
    "loss_scale_factor": 256.0,
}
ACCUMULATED = EVERYTHING | {"gradient_accumulation_steps": 3}
SETTINGS = {"plain": {"learning_rate": 0.01}, "everything": EVERYTHING, "accumulated": ACCUMULATED}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


# XLA of older ones does not state what the kernels have to know of it.
calls_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 8, 1), reason="XLA makes the step in this version of JAX"
)
never_waits = pytest.mark.skipif(
    jax.__version_info__ < (0, 8, 1),
    reason="this version waits for what is donated, and compiles for a value that was set",
)


@pytest.fixture(params=["kernels", "xla", "public"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Arrays taken out of Refs, by the kernels of the CPU and by XLA alone; and what is left if a
    version of JAX has them elsewhere.
    """
    if request.param == "xla":
        monkeypatch.setattr(fast, "kernels_work", lambda: False)
    if request.param == "public":
        monkeypatch.setattr(fast, "refs_are_open", lambda: False)
        monkeypatch.setattr(fast, "look_for_traces", lambda: backend.nothing_is_traced)
    return request.param


_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _compiled.append(event) if "backend_compile" in event else None
)


@contextmanager
def nothing_compiles() -> Iterator[None]:
    before = len(_compiled)
    yield
    assert len(_compiled) == before, "something was compiled"


def test_that_compilation_is_noticed() -> None:
    with pytest.raises(AssertionError), nothing_compiles():
        jax.jit(lambda x: x + 12345)(jnp.ones(3))


# --- Making variables and steps ------------------------------------------------------------------


def refs_of(values: Sequence[Any]) -> list[Any]:
    return [jax.new_ref(jnp.asarray(value)) for value in values]


def start(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: str = "float32") -> list[Array]:
    return variables(dtype, 0, shapes)


def grads(
    step: int, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: str = "float32"
) -> list[Any]:
    return [jnp.asarray(g) for g in gradients(step, shapes, dtype=dtype)]


def values_of(params: Sequence[Any]) -> list[Array]:
    """As float64; of Refs and of arrays."""
    return [np.asarray(p[...], np.float64) for p in params]


def build(case: Case, params: list[Any]) -> Adam:
    opt = Adam(**case.settings_for(omniadam.schedules))
    if case.excluded:
        opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
    opt.build({f"w{i}": p for i, p in enumerate(params)})
    return opt


def check(opt: Adam, params: list[Any], reference: Reference, dtype: str = "float32") -> None:
    assert_close(values_of(params), reference, "variable", dtype)
    state = opt.named_variables()
    for slot in reference.state:
        if slot != "variable":
            got = [state[f"w{i}_{slot}"] for i in range(len(params))]
            assert_close(values_of(got), reference, slot, dtype)


def everything(opt: Optimizer, params: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Everything that a step may change, to the bit."""
    values = [*(np.asarray(p[...]) for p in params), *opt.get_weights()]
    return [(v.dtype, v.shape, v.tobytes()) for v in values]


def assert_near(got: Sequence[Any], want: Sequence[Any], ulps: float = 8) -> None:
    """Within a few float32 ulps, of a value or of the updates of 0.01 to 0.1 that made it up: what
    XLA fuses differently it rounds differently.
    """
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=ulps * 2.0**-23, atol=ulps * 2.0**-28)


def numpy_run(
    settings: dict[str, Any], steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> tuple[Adam, list[Array]]:
    params, opt = start(shapes), Adam(**settings)
    for step in range(steps):
        opt.apply_gradients(zip(gradients(step, shapes), params, strict=True))
    return opt, params


# --- Numbers -------------------------------------------------------------------------------------


def run_case(case: Case, dtype: str, shapes: Sequence[tuple[int, ...]], steps: int = STEPS) -> None:
    params = refs_of(start(shapes, dtype))
    opt, reference = build(case, params), case.reference(start(shapes, dtype))
    for step in range(steps):
        given = gradients(step, shapes, dtype=dtype)
        opt.apply_gradients(zip(map(jnp.asarray, given), params, strict=True))
        reference.step(given)
        if FORMATS[dtype].eps > 1e-4:
            # What a 16-bit store loses is the dtype's doing; the next step starts from it.
            check(opt, params, reference, dtype)
            reference.resync(values_of(params))
    check(opt, params, reference, dtype)


@pytest.mark.parametrize("name", TABLE)
def test_every_setting(name: str) -> None:
    run_case(TABLE[name], "float32", SMALL_SHAPES)


SOME = {"defaults": CASES["defaults"]} | WHOLE


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", SOME)
def test_every_dtype(name: str, dtype: str) -> None:
    with double_precision(dtype == "float64"):
        run_case(SOME[name], dtype, SMALL_SHAPES, 9)


@pytest.mark.parametrize("name", ["schedule", list(CASES)[-1]])
def test_a_hundred_steps(name: str, path: str) -> None:
    run_case(CASES[name], "float32", SMALL_SHAPES, 100)


@pytest.mark.parametrize("path", ["xla"], indirect=True)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("defaults", "float64"),
        (list(WHOLE)[-1], "float64"),
        *((name, "bfloat16") for name in WHOLE),
    ],
)
def test_every_dtype_by_xla_alone(name: str, dtype: str, path: str) -> None:
    with double_precision(dtype == "float64"):
        run_case(SOME[name], dtype, SMALL_SHAPES, 9)


@pytest.mark.parametrize("name", ["defaults", "global_clipnorm", "clipnorm"])
def test_large_variables(name: str) -> None:
    run_case(CASES[name], "float32", (*SMALL_SHAPES, (20_003,), (300, 70)))


def test_float32_variables_where_double_precision_is_on() -> None:
    with double_precision():
        params = refs_of(start())
        opt = Adam(0.001)
        opt.build(params)
        assert [str(v.dtype) for v in opt.variables[:3]] == ["int64", "float64", "float32"]
        assert opt.learning_rate == 0.001
        run_case(CASES[list(CASES)[-1]], "float32", SMALL_SHAPES)


@each_setting
def test_the_numbers_are_those_of_numpy(settings: dict[str, Any]) -> None:
    opt, params = Adam(**settings), refs_of(start())
    for step in range(STEPS):
        opt.apply_gradients(zip(grads(step), params, strict=True))
    theirs, wanted = numpy_run(settings, STEPS)
    reference = Case(settings).reference(start())
    for step in range(STEPS):
        reference.step(gradients(step, SHAPES))
    # Both are that close to the oracle; to each other they are far closer.
    assert tolerance(reference) > 20
    assert_near(values_of(params), wanted)
    assert_near(opt.get_weights(), theirs.get_weights())


def test_bias_correction_is_exact_where_a_power_of_a_float32_would_not_be() -> None:
    # 1 - float32(0.999999)**1 is off by 5 %.
    params = refs_of([np.zeros(1, np.float32)])
    opt, reference = Adam(0.1, beta_2=0.999999), Reference([np.zeros(1)], learning_rate=0.1)
    reference.beta_2 = 0.999999
    for _ in range(3):
        opt.apply_gradients([(jnp.ones(1), params[0])])
        reference.step([np.ones(1)])
    assert_near(values_of(params), reference.variables)


def test_the_average_of_a_16_bit_variable_is_of_what_it_holds() -> None:
    for dtype in ("bfloat16", "float16"):
        (ref,) = refs_of([jnp.asarray([1.0, 3e-6], dtype)])
        opt = Adam(1.2345e-3, use_ema=True)
        opt.apply_gradients([(jnp.asarray([1.0, 1e-3], dtype), ref)])
        average = opt.named_variables()["variable_average"]
        np.testing.assert_array_equal(average[...], ref[...].astype(jnp.float32))


# --- Eager steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["plain", "accumulated"])
def test_both_paths_and_missing_gradients(settings: dict[str, Any], path: str) -> None:
    shapes = SHAPES[::2]
    opt, params = Adam(**settings), refs_of(start(shapes))
    opt.build(params)
    reference = Case(settings).reference(start(shapes))
    for step in range(8):
        given = with_missing(step, gradients(step, shapes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = opt.apply_gradients(zip(given, params, strict=True))
        assert int(count) == step + 1
        reference.step(given)
    assert_close(values_of(params), reference)


@never_waits
def test_a_second_step_and_a_new_rate_compile_nothing() -> None:
    for settings in ({}, EVERYTHING, ACCUMULATED, {"learning_rate": schedules.CosineDecay(1, 9)}):
        opt, params = Adam(**settings), refs_of(start())
        opt.apply_gradients(zip(grads(0), params, strict=True))
        opt.apply(grads(0))
        given = [grads(step) for step in range(5)]
        with nothing_compiles():
            for each in given:
                opt.apply_gradients(zip(each, params, strict=True))
                if opt._schedule is None:
                    opt.learning_rate = opt.learning_rate / 2
                assert isinstance(opt.iterations, int)
            opt.set_weights([w.astype(np.float64) for w in opt.get_weights()])
            opt.apply_gradients(zip(given[0], params, strict=True))


def test_a_changed_setting_takes_effect() -> None:
    opt, params = Adam(0.1, epsilon=0.0), refs_of([np.ones(2, np.float32)])
    g = [jnp.ones(2)]
    opt.apply_gradients(zip(g, params, strict=True))
    opt.learning_rate = 0.0
    before = values_of(params)
    opt.apply_gradients(zip(g, params, strict=True))
    np.testing.assert_array_equal(values_of(params), before)
    opt.learning_rate = schedules.PiecewiseConstantDecay([1], [0.0, 0.5])
    opt.apply_gradients(zip(g, params, strict=True))
    assert_near(values_of(params), [before[0] - 0.5])
    opt.learning_rate = lambda: 0.25
    opt.apply_gradients(zip(g, params, strict=True))
    assert_near(values_of(params), [before[0] - 0.75])
    opt.weight_decay = 2.0
    opt.learning_rate = lambda: jnp.asarray(0.25)
    opt.apply_gradients(zip(g, params, strict=True))
    assert_near(values_of(params), [(before[0] - 0.75) / 2 - 0.25])


CHANGING: dict[str, Sequence[float]] = {
    "weight_decay": (0.1, 0.2, 0.3, 0.05),
    "loss_scale_factor": (2.0, 3.0, 4.0, 5.0),
    "clipnorm": (1.0, 0.5, 2.0, 0.25),
    "global_clipnorm": (1.0, 0.5, 2.0, 0.25),
    "clipvalue": (1.0, 0.5, 2.0, 0.25),
    "ema_momentum": (0.999, 0.9, 0.5, 0.99),
    "beta_1": (0.9, 0.99, 0.6, 0.7),
    "beta_2": (0.999, 0.9999, 0.99, 0.9),
    "epsilon": (1e-8, 1e-3, 0.1, 0.5),
}


@pytest.mark.parametrize("how", ["refs", "bare"])
@pytest.mark.parametrize("name", CHANGING)
def test_settings_that_change_at_each_step_compile_nothing(name: str, how: str) -> None:
    """They are arguments of the program; what float32 would lose is computed before."""
    first, *others = CHANGING[name]
    settings = {"learning_rate": 0.1, "use_ema": name == "ema_momentum", name: first}
    opt, theirs = Adam(**settings), Adam(**settings)
    want = [np.array([10.0, -20.0], np.float32)]
    refs, arrays = refs_of(want), [jnp.asarray(w) for w in want]
    if how == "bare":
        opt.build(arrays)
        state = opt.variables
    given = [jnp.asarray([1.0, 3.0], jnp.float32)]

    def step() -> None:
        nonlocal arrays, state
        if how == "refs":
            opt.apply(given, refs)
        else:
            arrays, state = opt.stateless_apply(state, given, arrays)
        theirs.apply([np.array(given[0])], want)

    step()
    step()
    for value in others:
        setattr(opt, name, value)
        setattr(theirs, name, value)
        with nothing_compiles():
            step()
    assert_near(values_of(refs) if how == "refs" else arrays, want)
    if how == "refs":
        assert_near(opt.get_weights(), theirs.get_weights())


def test_a_callable_setting_compiles_nothing_and_may_cross_one_half() -> None:
    betas = [0.9, 0.8, 0.3, 0.95, 0.2, 0.7, 0.1]
    ours, numpys = iter(betas), iter(betas)
    opt, other = Adam(0.1, beta_1=lambda: next(ours)), Adam(0.1, beta_1=lambda: next(numpys))
    params, want = refs_of([np.ones(2, np.float32)]), [np.ones(2, np.float32)]
    for i in range(len(betas)):
        with nothing_compiles() if i > 2 else nullcontext():
            opt.apply([jnp.ones(2)], params)
        other.apply([np.ones(2, np.float32)], want)
    assert_near(values_of(params), want)


def test_many_sets_of_variables_in_turn() -> None:
    opt, params = Adam(0.1), refs_of(np.ones((40, 2), np.float32))
    opt.build(params)
    for _ in range(2):
        for ref in params:
            opt.apply([jnp.ones(2)], [ref])
    with nothing_compiles():
        for ref in params:
            opt.apply([jnp.ones(2)], [ref])
    assert opt.iterations == 120


@never_waits
def test_a_step_waits_for_nothing() -> None:
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: y @ y / jnp.max(y), x))
    x = jnp.ones((300, 300)) + jnp.eye(300)
    opt, params = Adam(use_ema=True, global_clipnorm=1.0), refs_of([np.ones((300, 300))])
    for _ in range(2):
        opt.apply_gradients([(slow(x), params[0])])
    for _ in range(5):  # the machine may stall between two lines
        g = slow(x)
        began = not g.is_ready()
        count = opt.apply_gradients([(g, params[0])])
        if began and not g.is_ready():
            break
    else:
        pytest.fail("a step waited for its gradient")
    assert isinstance(count, jax.Array) and int(count) == opt.iterations


def test_what_is_read_and_what_is_returned_is_no_memory_of_the_optimizer() -> None:
    opt, params = Adam(), refs_of(start())
    opt.build(params)
    held = [params[1][...], *(v[...] for v in opt.variables), jax.jit(lambda: params[1][...])()]
    counts = [opt.apply_gradients(zip(grads(0), params, strict=True)) for _ in range(3)]
    assert [int(c) for c in counts] == [1, 2, 3]
    for value in held:
        assert not value.is_deleted()
    np.testing.assert_array_equal(held[0], start()[1])
    given = jnp.full(7, 5.0)
    opt.assign(params[1], given)
    opt.apply_gradients(zip(grads(0), params, strict=True))
    np.testing.assert_array_equal(given, np.full(7, 5.0))


def test_numbers_outside_of_a_trace() -> None:
    opt, params = Adam(0.001), refs_of(start())
    opt.build(params)
    assert opt.learning_rate == 0.001 and type(opt.learning_rate) is float
    assert opt.get_config()["learning_rate"] == 0.001
    opt.apply_gradients(zip(grads(0), params, strict=True))
    assert opt.iterations == 1 and type(opt.iterations) is int
    assert [str(v.dtype) for v in opt.variables[:2]] == ["int32", "float32"]
    assert all(isinstance(v, jax.Ref) for v in opt.variables)
    assert opt.variables[3].shape == () and opt.variables[4].shape == (7,)


def test_an_interrupt_loses_nothing() -> None:
    """A step is there in whole or not at all, wherever Ctrl-C comes."""
    opt, params = Adam(0.5, epsilon=0.0), refs_of([np.zeros(3, np.float32) for _ in range(20)])
    pairs = [(jnp.ones(3), ref) for ref in params]
    for _ in range(3):  # JAX loses its own state where a trace is interrupted: there is none after
        opt.apply_gradients(pairs)
    interrupts = 0
    gc.disable()  # JAX is called as it begins, and there an interrupt comes to nothing
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for i in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 * (1 + i % 25))
                while True:
                    opt.apply_gradients(pairs)
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        gc.enable()
    count = opt.iterations
    assert interrupts == 150 and count > 1
    for value in values_of(params):
        np.testing.assert_allclose(value, -0.5 * count, rtol=1e-4)


def test_nan_in_debug_mode_raises_and_moves_nothing() -> None:
    opt, params = Adam(), refs_of(start())
    opt.apply_gradients(zip(grads(0), params, strict=True))
    before = everything(opt, params)
    bad = grads(1)
    bad[1] = bad[1] * np.nan
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        opt.apply_gradients(zip(bad, params, strict=True))
    assert everything(opt, params) == before


def test_without_jit() -> None:
    shapes = [(7,), (3, 5)]
    with jax.disable_jit():
        opt, params = Adam(**ACCUMULATED), refs_of(start(shapes))
        for step in range(6):
            opt.apply_gradients(zip(grads(step, shapes), params, strict=True))
    theirs, wanted = numpy_run(ACCUMULATED, 6, shapes)
    assert_near(values_of(params), wanted)
    assert_near(opt.get_weights(), theirs.get_weights())


def test_a_ref_of_a_python_number() -> None:
    for path_of in (lambda f: f, jax.jit):
        ref = jax.new_ref(1.0)
        opt = Adam(0.25, epsilon=0.0)
        opt.build([ref])
        g = jnp.asarray(1.0)
        step = path_of(lambda opt=opt, ref=ref, g=g: opt.apply_gradients([(g, ref)]))
        step()
        with nothing_compiles():
            step()
        assert float(ref[...]) == pytest.approx(0.5)


def test_two_threads() -> None:
    made = [(Adam(**EVERYTHING), refs_of(start())) for _ in range(2)]
    given = [grads(step) for step in range(30)]

    def train(opt: Adam, params: list[Any]) -> None:
        for each in given:
            opt.apply_gradients(zip(each, params, strict=True))

    threads = [threading.Thread(target=train, args=each) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Adam(**EVERYTHING), refs_of(start())
    train(*alone)
    assert everything(*made[0]) == everything(*made[1]) == everything(*alone)


@calls_kernels
def test_peak_memory() -> None:
    """No temporary array as large as a variable: sums of squares and scalars at most."""
    shapes = ((300, 400), (400,), (400, 200))
    for settings in SETTINGS["plain"], EVERYTHING | {"amsgrad": False}, EVERYTHING:
        opt, params = Adam(**settings), refs_of(start(shapes))
        given = grads(0, shapes)
        opt.apply_gradients(zip(given, params, strict=True))
        (program,) = opt._recent.prepared.programs.values()  # type: ignore[union-attr]
        compiled = program.lowered(given, rate_and_numbers(opt)).compile()
        memory = compiled.memory_analysis()
        largest = 4 * 300 * 400
        assert memory.alias_size_in_bytes > 3 * largest
        assert memory.temp_size_in_bytes < largest / 20
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000

        opt = Adam(**settings)
        arrays = [jnp.asarray(w) for w in start(shapes)]
        opt.build(arrays)
        pure = jax.jit(lambda w, s, g, o=opt: o.stateless_apply(s, g, w), donate_argnums=(0, 1))
        memory = pure.lower(arrays, opt.variables, given).compile().memory_analysis()
        assert memory.temp_size_in_bytes < largest / 20


# --- The kernels of the CPU ----------------------------------------------------------------------


def rate_and_numbers(opt: Optimizer) -> tuple[Any, Any]:
    return None, opt._rate_and_step()[1].numbers


def compiled_step(opt: Optimizer, given: list[Any]) -> str:
    """The one program that the steps of an optimizer were compiled to."""
    (program,) = opt._recent.prepared.programs.values()  # type: ignore[union-attr]
    text: str = program.lowered(given, rate_and_numbers(opt)).compile().as_text()
    return text


NORMS = {
    "overflow": ([[1e20, -1e20], [3e19, 1.0]], 1.0),
    "underflow": ([[1e-30, -1e-30], [2e-30, 0.0]], 1e-30),
    "both": ([[1e20, 1e-30], [1e-30, 2e-30]], 1.0),
    "beside zeros": ([[0.0, 0.0], [1e-30, 2e-30]], 1e-30),
    "zeros": ([[0.0, 0.0], [0.0, 0.0]], 1.0),
    "infinite": ([[np.inf, 1.0], [2.0, 2.0]], 1.0),
    "nan": ([[np.nan, 1.0], [2.0, 2.0]], 1.0),
}


# Every two of the three meet.
@pytest.mark.parametrize(
    ("clip", "name", "by"),
    [
        (clip, name, ("kernels", "xla")[(i + j) % 2])
        for i, clip in enumerate(["clipnorm", "global_clipnorm"])
        for j, name in enumerate(NORMS)
    ],
)
def test_norms_do_not_overflow(
    clip: str, name: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NumPy, which sums in double precision."""
    if by == "xla":
        monkeypatch.setattr(fast, "kernels_work", lambda: False)
    values, threshold = NORMS[name]
    dtype = "bfloat16" if name == "overflow" else "float32"
    given = [jnp.asarray(value, dtype) for value in values]
    settings: dict[str, Any] = {
        "learning_rate": 0.1,
        "epsilon": 0.0,
        "beta_1": 0.0,
        clip: threshold,
    }
    # Of squares as small as these the velocity knows nothing: what is seen is the momentum.
    theirs, ours = [np.ones(2, np.float32) for _ in given], refs_of(np.ones((2, 2), np.float32))
    numpy, refs = Adam(**settings), Adam(**settings)
    with np.errstate(all="ignore"):
        numpy.apply([np.asarray(g, np.float32) for g in given], theirs)
    refs.apply(given, ours)
    bare = Adam(**settings)
    arrays = [jnp.ones(2), jnp.ones(2)]
    bare.build(arrays)
    _, state = bare.stateless_apply(bare.variables, given, arrays)
    wanted = [v for name, v in numpy.named_variables().items() if "momentum" in name]
    for found in (
        [v for name, v in refs.named_variables().items() if "momentum" in name],
        state[2::2],
    ):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(a[...]), b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}])
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_derivative_through_a_clipped_step(clip: dict[str, float], at: float) -> None:
    """Where the gradient of one variable is zero, or of all."""
    with double_precision():
        opt, params = Adam(0.1, epsilon=1e-2, **clip), [jnp.ones(2), jnp.ones(1)]
        opt.build(params)
        state = opt.variables

        def after(s: Any) -> Any:
            given = [s * jnp.array([1.0, 2.0]), s * jnp.zeros(1)]
            new, _ = opt.stateless_apply(state, given, params)
            return (new[0] ** 2).sum() + (new[1] ** 2).sum()

        h = 1e-6
        wanted = float((after(at + h) - after(at - h)) / (2 * h))
        assert float(jax.grad(after)(at)) == pytest.approx(wanted, rel=1e-4)


@calls_kernels
@pytest.mark.parametrize("why_not", ["", "version", "OMNIADAM_KERNEL"])
def test_a_step_is_one_call_of_a_kernel(why_not: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not == "version":
        monkeypatch.setattr(fast, "kernels_work", lambda: False)
    if why_not == "OMNIADAM_KERNEL":
        monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    for settings, calls in (SETTINGS["plain"], 1), (EVERYTHING | {"amsgrad": False}, 2):
        opt, params = Adam(**settings), refs_of(start())
        for step in range(4):
            opt.apply_gradients(zip(grads(step), params, strict=True))
        text = compiled_step(opt, grads(0))
        assert text.count('custom_call_target="omniadam_kernel"') == (0 if why_not else calls)
        theirs, wanted = numpy_run(settings, 4)
        assert_near(values_of(params), wanted)
        assert_near(opt.get_weights(), theirs.get_weights())


def test_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over chunks are added in order of memory, whoever computed them."""
    shapes, results = ((700, 1000), (3,), (300, 400)), []
    for threads in "1", "3":
        monkeypatch.setenv("OMNIADAM_NUM_THREADS", threads)
        opt, params = Adam(**EVERYTHING), refs_of(start(shapes))
        for step in range(5):
            opt.apply_gradients(zip(grads(step, shapes), params, strict=True))
        results.append(everything(opt, params))
    assert results[0] == results[1]
    theirs, wanted = numpy_run(EVERYTHING, 5, shapes)
    assert_near(values_of(params), wanted)
    assert_near(opt.get_weights(), theirs.get_weights())


@calls_kernels
def test_every_chunk_is_done_when_a_step_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more threads than cores, one is often stopped in the middle of its last chunk."""
    monkeypatch.setenv("OMNIADAM_NUM_THREADS", "9")
    before, shape = set(xla._jobs), (701, 1009)  # of no other test
    (ref,), opt = refs_of([np.zeros(shape, np.float32)]), Adam()
    g, last = jnp.ones(shape), np.zeros(shape)
    for _ in range(150):
        opt.apply_gradients([(g, ref)])
        now = np.asarray(ref[...])
        assert np.all(now < last)
        last = now
    (job,) = [job for key, job in xla._jobs.items() if key not in before]
    # Each of the nine asked once more than there were chunks.
    asked, end = 0, time.monotonic() + 10
    while asked < 9 and time.monotonic() < end:
        asked = int(job._words[cpu.NEXT] - job._words[cpu.COUNT])
    assert asked >= 9  # more, if a helper came so late that it served the next step too


def test_an_optimizer_may_go_while_its_step_runs() -> None:
    shapes = ((1000, 1000),)
    given = grads(0, shapes)
    for _ in range(5):
        opt, params = Adam(), refs_of(start(shapes))
        count = opt.apply_gradients(zip(given, params, strict=True))
        del opt, params
        gc.collect()
    assert int(count) == 1


def test_many_variables_are_cut_into_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "IN_A_CALL", 2)
    opt, params = Adam(**EVERYTHING), refs_of(start())
    for step in range(5):
        opt.apply_gradients(zip(grads(step), params, strict=True))
    theirs, wanted = numpy_run(EVERYTHING, 5)
    assert_near(values_of(params), wanted)
    assert_near(opt.get_weights(), theirs.get_weights())


def test_frames_that_xla_states_to_be_of_another_form_are_left_alone() -> None:
    """The handler is given what XLA hands over, with other sizes and versions in it."""
    handler = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(xla.handler())

    def words(*values: int) -> Array:
        return np.array(values, np.int64)

    def answered(
        size: int = 168,
        api_size: int = 208,
        version_size: int = 24,
        major: int = 0,
        api: bool = True,
    ) -> list[int]:
        versions = np.array([major, 3], np.int32)
        metadata = words(48, 24, 0, 0, 0, 0)
        metadata[3:4].view(np.int32)[:] = 77
        table = words(api_size, 0, version_size, 0, 0, *[0] * 21)
        table[4:5].view(np.int32)[:] = versions
        extension = words(32, 1, 0, metadata.ctypes.data)
        frame = words(size, extension.ctypes.data, table.ctypes.data * api, *[0] * 18)
        assert handler(frame.ctypes.data) == 0
        found: list[int] = metadata[3:4].view(np.int32).tolist()
        return found

    assert answered() == [0, 3]
    assert answered(size=112) == [77, 77]
    for unknown in {"api_size": 136}, {"version_size": 32}, {"major": 1}, {"api": False}:
        assert answered(**unknown) == [-1, -1]  # type: ignore[arg-type]

    table = words(208, 0, 24, 0, 0, *[0] * 21)
    for args, rets in (48, 40), (40, 48):
        # With nothing where a call would have its arrays: to read them would end the process.
        frame = words(168, 0, table.ctypes.data, 0, 3, args, 0, 2, 0, 0, rets, 0, 1, 0, 0, *[0] * 6)
        assert handler(frame.ctypes.data) == 0
    buffer = words(56, 0, 0, 0, 0, 0)
    arrays = words(buffer.ctypes.data, 0)
    frame = words(
        168, 0, table.ctypes.data, 0, 3, 40, 0, 2, 0, arrays.ctypes.data, 40, 0, 1, 0, 0, *[0] * 6
    )
    assert handler(frame.ctypes.data) == 0


@calls_kernels
def test_a_program_of_another_process_says_what_to_do() -> None:
    form = jax.ShapeDtypeStruct((2,), np.float32)
    call = jax.ffi.ffi_call("omniadam_kernel", [form] * 3)
    assert fast.kernels_work()
    plan, x = np.array([1, 2], np.uint32), np.zeros(2, np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Trace the same step in this process"):
        jax.block_until_ready(jax.jit(call)(plan, np.zeros(12, np.float32), x, x, x, x))


def test_another_process_finds_the_program_in_the_cache_on_disk(tmp_path: Path) -> None:
    code = """
import os
import jax, jax.numpy as jnp
from omniadam import Adam
jax.config.update("jax_compilation_cache_dir", os.environ["CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
ref = jax.new_ref(jnp.ones(3))
Adam(0.1).apply_gradients([(jnp.ones(3), ref)])
print(ref[...].round(3).tolist(), sorted(os.listdir(os.environ["CACHE"])))
"""
    first = run_elsewhere(code, CACHE=str(tmp_path))
    assert "omniadam_step" in first
    assert run_elsewhere(code, CACHE=str(tmp_path)) == first


@calls_kernels
def test_equal_steps_have_one_job_and_wait_for_each_other() -> None:
    shapes: tuple[tuple[int, ...], ...] = ((300, 1001), (7,))
    results: list[Any] = []
    given = [grads(i, shapes) for i in range(20)]

    def work() -> None:
        opt, params = Adam(**EVERYTHING), refs_of(start(shapes))
        for each in given:
            opt.apply_gradients(zip(each, params, strict=True))
        results.append(everything(opt, params))

    work()
    before = set(xla._jobs)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(xla._jobs) == before
    assert results == results[:1] * 4


def test_the_process_may_end_while_a_step_runs() -> None:
    code = """
import jax, jax.numpy as jnp
from omniadam import Adam
x = jnp.ones((2000, 2000))
slow = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: y @ y / jnp.max(y), x))
ref, opt = jax.new_ref(x + 0), Adam()
opt.apply_gradients([(x, ref)])
opt.apply_gradients([(slow(x), ref)])
print("stepped")
"""
    assert run_elsewhere(code) == "stepped\n"


# --- In compiled functions -----------------------------------------------------------------------


@each_setting
def test_a_compiled_function_makes_the_steps_of_eager_ones(settings: dict[str, Any]) -> None:
    """100 calls; count, rate and phase are state, and so is a rate that is set between calls."""
    eager, params = Adam(**settings), refs_of(start())
    eager.build(params)
    opt, held = Adam(**settings), refs_of(start())
    opt.build(held)
    seen = []

    @jax.jit
    def step(given: list[Any]) -> Any:
        seen.append((opt.iterations, opt.learning_rate))
        return opt.apply_gradients(zip(given, held, strict=True)), opt.iterations

    for i in range(100):
        given = grads(i % 10)
        eager.apply_gradients(zip(given, params, strict=True))
        calls, iterations = step(given)
        assert int(calls) == i + 1
        assert int(iterations) == (i + 1) // settings.get("gradient_accumulation_steps", 1)
        if i == 50:
            eager.learning_rate = opt.learning_rate = 0.003
            with nothing_compiles():
                opt.learning_rate = 0.002
                eager.learning_rate = 0.002
    assert len(seen) == 1 and all(isinstance(x, jax.core.Tracer) for x in seen[0])
    assert opt.iterations == eager.iterations and opt.learning_rate == 0.002
    assert_near(values_of(held), values_of(params), 64)
    assert_near(opt.get_weights(), eager.get_weights(), 64)


def test_eager_and_compiled_steps_in_turn(path: str) -> None:
    opt, params = Adam(**ACCUMULATED), refs_of(start())
    opt.build(params)
    compiled = jax.jit(lambda given: opt.apply_gradients(zip(given, params, strict=True)))
    for step in range(12):
        given = grads(step)
        if step % 3 == 1:
            count = compiled(given)
        else:
            count = opt.apply_gradients(zip(given, params, strict=True))
        assert int(count) == step + 1
    theirs, wanted = numpy_run(ACCUMULATED, 12)
    assert_near(values_of(params), wanted)
    assert_near(opt.get_weights(), theirs.get_weights())


def test_gradients_that_are_constants_of_the_trace(path: str) -> None:
    """Nothing that a compiled function is given is traced, and yet it is no eager step."""
    opt, params, given = Adam(0.5, epsilon=0.0), refs_of([np.zeros(2, np.float32)]), [jnp.ones(2)]
    opt.build(params)
    step = jax.jit(lambda: opt.apply_gradients(zip(given, params, strict=True)))
    for i in range(4):
        assert int(step()) == i + 1
    assert_near(values_of(params), [np.full(2, -2.0)])


def test_refs_as_arguments(path: str) -> None:
    opt, params, others = Adam(**EVERYTHING), refs_of(start()), refs_of(start())
    opt.build(params)

    @jax.jit
    def step(refs: list[Any], given: list[Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return opt.apply_gradients(zip([None, *given[1:]], refs, strict=True))

    for i in range(5):
        assert int(step(others, grads(i))) == i + 1
    reference = Case(EVERYTHING).reference(start())
    for i in range(5):
        reference.step([None, *gradients(i, SHAPES)[1:]])
    assert_close(values_of(others), reference)
    np.testing.assert_array_equal(values_of(params)[1], start()[1])
    # The next eager step is on the Refs the optimizer was built with.
    opt.apply_gradients(zip(grads(5), params, strict=True))
    assert np.any(values_of(params)[1] != start()[1])

    few = jax.jit(lambda refs, given: opt.apply_gradients(zip(given, refs, strict=True)))
    for wrong in (others[:2], [*others[1:], others[0]]):
        with pytest.raises(ValueError, match=r"all 4 variables .* in that order.*close over"):
            few(wrong, [jnp.zeros(ref.shape) for ref in wrong])


def test_building_inside_a_trace() -> None:
    params = refs_of(start())
    for given in ((), (params,)):
        opt = Adam()

        @jax.jit
        def step(refs: list[Any] = params, opt: Adam = opt) -> None:
            opt.apply_gradients([(jnp.ones(ref.shape), ref) for ref in refs])

        with pytest.raises(ValueError, match=r"built outside .* Call build\(variables\) first"):
            step(*given)
        assert not opt.built and opt.iterations == 0
        opt.build(params)
        step()
        assert opt.iterations == 1


def test_scan_over_refs() -> None:
    opt, params = Adam(**EVERYTHING), refs_of(start())
    opt.build(params)
    stacked = [jnp.stack(each) for each in zip(*(grads(i) for i in range(6)), strict=True)]

    @jax.jit
    def run() -> Any:
        def step(carry: Any, given: list[Any]) -> Any:
            return carry, opt.apply_gradients(zip(given, params, strict=True))

        return jax.lax.scan(step, None, stacked)[1]

    assert run().tolist() == [1, 2, 3, 4, 5, 6]
    assert_near(values_of(params), numpy_run(EVERYTHING, 6)[1])


def test_reading_state_inside_a_trace_is_an_error() -> None:
    opt, params = Adam(), refs_of(start())
    opt.build(params)
    with pytest.raises(ValueError, match="inside a compiled function"):
        jax.jit(lambda: opt.get_weights() and None)()


def test_a_rate_set_inside_a_trace() -> None:
    opt, params = Adam(0.5, epsilon=0.0), refs_of([np.zeros(2, np.float32)])
    opt.build(params)

    @jax.jit
    def step(rate: Any) -> Any:
        opt.learning_rate = rate
        opt.apply_gradients([(jnp.ones(2), params[0])])
        return opt.learning_rate

    assert float(step(0.25)) == 0.25 and float(step(0.75)) == 0.75
    assert opt.learning_rate == 0.75
    assert_near(values_of(params), [np.full(2, -1.0)])
    with pytest.raises(ValueError, match="real scalar"):
        step(jnp.ones(3))


# --- stateless_apply -----------------------------------------------------------------------------


def bare(settings: dict[str, Any]) -> tuple[Adam, list[Any], list[Any]]:
    opt, params = Adam(**settings), [jnp.asarray(w) for w in start()]
    opt.build(params)
    return opt, params, opt.variables


@each_setting
@pytest.mark.parametrize("how", ["eager", "jit", "scan"])
def test_stateless_apply(settings: dict[str, Any], how: str) -> None:
    opt, params, state = bare(settings)
    forms = [(v.shape, v.dtype, v.weak_type) for v in (*params, *state)]
    if how == "scan":
        stacked = [jnp.stack(each) for each in zip(*(grads(i) for i in range(8)), strict=True)]

        @jax.jit
        def run(params: Any, state: Any) -> Any:
            def step(carry: Any, given: Any) -> Any:
                return opt.stateless_apply(carry[1], given, carry[0]), None

            return jax.lax.scan(step, (params, state), stacked)[0]

        params, state = run(params, state)
    else:
        step: Any = lambda w, s, g: opt.stateless_apply(s, g, w)  # noqa: E731
        if how == "jit":
            step = jax.jit(step, donate_argnums=(0, 1))
        for i in range(8):
            old, given = (params, state), grads(i)
            with nothing_compiles() if i > 1 else nullcontext():
                params, state = step(params, state, given)
            if how == "jit":
                assert all(x.is_deleted() for x in jax.tree.leaves(old) if x.size)
    assert [(v.shape, v.dtype, v.weak_type) for v in (*params, *state)] == forms
    theirs, wanted = numpy_run(settings, 8)
    assert_near(params, wanted)
    assert_near(state, theirs.get_weights())


def test_stateless_apply_changes_nothing() -> None:
    opt, params, state = bare(EVERYTHING)
    before = [np.array(x) for x in (*params, *state)]
    for _ in range(2):
        opt.stateless_apply(state, grads(0), params)
    for old, new in zip(before, (*params, *state), strict=True):
        np.testing.assert_array_equal(old, new)
    assert opt.iterations == 0
    assert all(a is b for a, b in zip(state, opt.variables, strict=True))


def test_stateless_apply_of_an_optimizer_of_refs() -> None:
    refs = refs_of(start())
    opt = Adam(**EVERYTHING)
    opt.build(refs)
    before = everything(opt, refs)
    params, state = [ref[...] for ref in refs], [v[...] for v in opt.variables]
    for i in range(3):
        params, state = opt.stateless_apply(state, grads(i), params)
    assert everything(opt, refs) == before
    assert_near(params, numpy_run(EVERYTHING, 3)[1])
    # And the state of another library's run goes on here, cast to what is kept here.
    theirs, wanted = numpy_run(EVERYTHING, 3)
    params, state = opt.stateless_apply(theirs.get_weights(), grads(3), wanted)
    assert_near(params, numpy_run(EVERYTHING, 4)[1])
    with pytest.raises(TypeError, match=r"takes values.*ref\[\.\.\.\]"):
        opt.stateless_apply(opt.variables, grads(0), params)


def test_missing_gradients_in_stateless_apply() -> None:
    opt, params, state = bare(ACCUMULATED)
    reference = Case(ACCUMULATED).reference(start())
    for step in range(6):
        given = with_missing(step % 2, gradients(step, SHAPES))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params, state = opt.stateless_apply(state, given, params)
        reference.step(given)
    assert_close(params, reference)


def test_vmap() -> None:
    opt, params, state = bare(ACCUMULATED)
    scales = jnp.array([0.5, 1.0, 3.0])
    many = [jax.tree.map(lambda x: jnp.stack([x] * 3), each) for each in (params, state)]
    step = jax.jit(jax.vmap(lambda w, s, g: opt.stateless_apply(s, g, w)))
    for i in range(7):
        given = [scales.reshape(-1, *[1] * g.ndim) * g for g in grads(i)]
        many = list(step(*many, given))
    for index, scale in enumerate(scales):
        one = params, state
        for i in range(7):
            one = opt.stateless_apply(one[1], [scale * g for g in grads(i)], one[0])
        assert_near([x[index] for x in many[0]], one[0], 32)
        assert_near([x[index] for x in many[1]], one[1], 32)


def test_derivative_through_steps() -> None:
    """By differences in double precision; where a gradient is zero, too."""
    with double_precision():
        start_at, slope = jnp.array([0.7, -0.3, 0.0]), jnp.array([2.0, 1.0, 0.0])
        opt = Adam(0.1, epsilon=1e-3, global_clipnorm=5.0, use_ema=True, amsgrad=True)
        opt.build([start_at])

        def after(w: Any) -> Any:
            params, state = [w], opt.variables
            for _ in range(3):
                params, state = opt.stateless_apply(state, [slope * params[0] ** 3], params)
            return jnp.sum(params[0] * jnp.array([1.0, 2.0, 3.0]))

        got = jax.jit(jax.grad(after))(start_at)
        for i in range(3):
            h = jnp.zeros(3).at[i].set(1e-6)
            want = (after(start_at + h) - after(start_at - h)) / 2e-6
            assert float(got[i]) == pytest.approx(float(want), rel=1e-5)
        assert np.all(np.isfinite(jax.jit(jax.hessian(after))(start_at)))


def test_saving_a_stateless_run() -> None:
    opt, params, state = bare(EVERYTHING)
    step = jax.jit(lambda w, s, g: opt.stateless_apply(s, g, w), donate_argnums=(0, 1))
    for i in range(3):
        params, state = step(params, state, grads(i))
    with pytest.raises(ValueError, match=r"donated .* set_weights\(state\)"):
        opt.get_weights()
    opt.set_weights(state)
    assert opt.iterations == 3
    assert_near(opt.get_weights(), state, 0)
    resumed = pickle.loads(pickle.dumps(opt))
    resumed.build(params)
    state = resumed.variables
    for i in range(3, 5):
        params, state = resumed.stateless_apply(state, grads(i), params)
    assert_near(params, numpy_run(EVERYTHING, 5)[1])


def test_bad_input_of_stateless_apply() -> None:
    opt, params, state = bare({})
    wrong_shape, wrong_dtype = [*params], [*params]
    wrong_shape[1], wrong_dtype[1] = jnp.ones(8), jnp.ones(7, jnp.float16)
    for trainable in (wrong_shape, wrong_dtype):
        with pytest.raises(ValueError, match=r"'variable_1' must have shape \(7,\) and dtype flo"):
            opt.stateless_apply(state, grads(0), trainable)
    with pytest.raises(ValueError, match=r"'iteration' must have shape \(\) and dtype int32"):
        opt.stateless_apply([jnp.asarray(0.5), *state[1:]], grads(0), params)
    with pytest.raises(TypeError, match="takes values"):
        opt.stateless_apply([0, *state[1:]], grads(0), params)
    with pytest.raises(ValueError, match="one value for each"):
        opt.stateless_apply(state[:-1], grads(0), params)
    with pytest.raises(ValueError, match=r"gradient of variable 'variable_1' .* shape \(8,\)"):
        opt.stateless_apply(state, wrong_shape, params)
    with pytest.raises(ValueError, match="No gradients"):
        opt.stateless_apply(state, [None] * 4, params)


# --- Sharding ------------------------------------------------------------------------------------

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cases import gradients, variables
from omniadam import Adam

SHAPES = ((16, 8), (8,), (), (4, 24))
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
places = [NamedSharding(mesh, p) for p in (P("data", "model"), P("model"), P(), P(None, "data"))]
assert len(jax.devices()) == 8
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
)
settings = {
    "amsgrad": True, "global_clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True,
    "gradient_accumulation_steps": 2,
}


def put(values):
    return [jax.device_put(v, place) for v, place in zip(values, places, strict=True)]


def same_places(values, of=places):
    pairs = zip(values, of, strict=True)
    return all(v.sharding.is_equivalent_to(p, len(v.shape)) for v, p in pairs)


def check(got):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a[...]), np.asarray(b[...]), rtol=2e-6, atol=1e-7)


given = [put(gradients(i, SHAPES)) for i in range(6)]
alone = [jax.new_ref(jnp.asarray(w)) for w in variables(shapes=SHAPES)]
opt = Adam(0.01, **settings)
for g in given:
    opt.apply_gradients(zip([jnp.asarray(np.asarray(x)) for x in g], alone, strict=True))
want = [*alone, *opt.variables]

# Refs, eagerly.
refs = [jax.new_ref(w) for w in put(variables(shapes=SHAPES))]
opt = Adam(0.01, **settings)
opt.build(refs)
by_name = opt.named_variables()
slots = ("average", "gradient_accumulator", "momentum", "velocity", "velocity_hat")
columns = [
    [v for name, v in by_name.items() if name.endswith(f"_{slot}")] for slot in slots
]
assert [len(column) for column in columns] == [4] * 5
opt.apply_gradients(zip(given[0], refs, strict=True))
before = len(compiled)
for g in given[1:]:
    opt.apply_gradients(zip(g, refs, strict=True))
opt.set_weights(opt.get_weights())
assert len(compiled) == before, "a later step compiled"
assert same_places(refs) and all(map(same_places, columns))
assert all(v.sharding.is_fully_replicated for v in opt.variables[:2])
check([*refs, *opt.variables])

# Refs, inside the user's jit.
refs = [jax.new_ref(w) for w in put(variables(shapes=SHAPES))]
opt = Adam(0.01, **settings)
opt.build(refs)
step = jax.jit(lambda g: opt.apply_gradients(zip(g, refs, strict=True)))
for g in given:
    step(g)
check([*refs, *opt.variables])
assert same_places(refs)

# Arrays, pure and donated; and eagerly.
for transformed in (lambda f: jax.jit(f, donate_argnums=(0, 1)), lambda f: f):
    params = put(variables(shapes=SHAPES))
    opt = Adam(0.01, **settings)
    opt.build(params)
    state = opt.variables
    homes = [v.sharding for v in state]
    step = transformed(lambda w, s, g: opt.stateless_apply(s, g, w))
    for g in given:
        params, state = step(params, state, g)
    check([*params, *state])
    assert same_places(params) and same_places(state, homes)
    assert same_places(state[2:6]) and same_places(state[10:18:2])

# Not on the same devices.
apart = [jax.new_ref(jax.device_put(jnp.ones(2), d)) for d in jax.devices()[:2]]
try:
    Adam().build(apart)
except ValueError as error:
    assert "must be on the same devices" in str(error), error
else:
    raise AssertionError("built on two devices")
# All on one that is not the first.
ref = jax.new_ref(jax.device_put(jnp.ones(2), jax.devices()[3]))
opt = Adam()
opt.apply_gradients([(jax.device_put(jnp.ones(2), jax.devices()[3]), ref)])
assert {d for v in opt.variables for d in v.sharding.device_set} == {jax.devices()[3]}
print("done")
"""


def run_elsewhere(code: str, **environment: str) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ
        | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'tests'}", "JAX_PLATFORMS": "cpu"}
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sharded_variables() -> None:
    flags = "--xla_force_host_platform_device_count=8"
    assert "done" in run_elsewhere(SHARDED, XLA_FLAGS=flags)


# --- Gradients -----------------------------------------------------------------------------------


def coordinates(values: Any, indices: Any, shape: tuple[int, ...]) -> Any:
    return sparse.BCOO((jnp.asarray(values), jnp.asarray(indices).reshape(-1, 1)), shape=shape)


@pytest.mark.parametrize("how", ["eager", "jit", "stateless"])
def test_sparse_gradients(how: str) -> None:
    """Ids repeat, some rows never come, and some are padding: as the dense gradient, to the bit."""
    shapes = ((40, 5), (6, 2, 3), (9,))
    opt, params = Adam(global_clipnorm=1.0, weight_decay=0.1), refs_of(start(shapes))
    reference = Case({"global_clipnorm": 1.0, "weight_decay": 0.1}).reference(start(shapes))
    opt.build(params)
    dense, twins = Adam(global_clipnorm=1.0, weight_decay=0.1), refs_of(start(shapes))

    def eager(given: list[Any]) -> None:
        opt.apply_gradients(zip(given, params, strict=True))

    def stateless(given: list[Any]) -> None:
        w, s = opt.stateless_apply([v[...] for v in opt.variables], given, [p[...] for p in params])
        for ref, value in zip((*params, *opt.variables), (*w, *s), strict=True):
            ref[...] = value

    step = {"eager": eager, "jit": jax.jit(eager), "stateless": stateless}[how]
    for i in range(5):
        plain = [sparse_gradient(i, shape) for shape in shapes]
        given = []
        for (indices, values), shape in zip(plain, shapes, strict=True):
            padded = np.concatenate([values, np.full_like(values[:1], np.nan)])
            given.append(coordinates(padded, [*indices, shape[0]], shape))
        step(given)
        reference.step(plain)
        dense.apply_gradients(zip([g.todense() for g in given], twins, strict=True))
    assert_close(values_of(params), reference)
    if how == "eager":
        assert everything(opt, params) == everything(dense, twins)


def test_repeated_rows_of_a_16_bit_gradient_are_summed_in_float32() -> None:
    (ref,) = refs_of([jnp.zeros((2, 1), jnp.bfloat16)])
    opt = Adam(beta_1=0.0)
    g = coordinates(jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16), [1, 1, 1], (2, 1))
    opt.apply_gradients([(g, ref)])
    np.testing.assert_array_equal(opt.named_variables()["variable_momentum"][...], [[0], [258]])


def test_a_negative_sparse_index() -> None:
    opt, params = Adam(), refs_of(start(((4, 2),)))
    g = coordinates(np.ones((2, 2), np.float32), [1, -1], (4, 2))
    with pytest.raises(ValueError, match=r"'variable' must have indices >= 0\. Received index -1"):
        opt.apply_gradients([(g, params[0])])
    assert not opt.built


@pytest.mark.parametrize("kind", ["numpy", "float64 numpy", "bfloat16", "integers"])
def test_gradients_of_other_types(kind: str) -> None:
    given = [np.round(8 * np.asarray(g)) for g in gradients(0, SHAPES)]
    convert: dict[str, Callable[[Any], Any]] = {
        "numpy": lambda g: np.asarray(g, np.float32),
        "float64 numpy": lambda g: np.asarray(g, np.float64),
        "bfloat16": lambda g: jnp.asarray(g, jnp.bfloat16),
        "integers": lambda g: np.asarray(g, np.int32),
    }
    theirs = [convert[kind](g) for g in given]
    opt, params = Adam(0.1), refs_of(start())
    reference = Reference(start(), learning_rate=0.1)
    for _ in range(3):
        opt.apply_gradients(zip(theirs, params, strict=True))
        reference.step([np.asarray(g, np.float64) for g in theirs])
    assert_close(values_of(params), reference)


# --- Bad input -----------------------------------------------------------------------------------


def deleted(array: Any) -> Any:
    array.delete()
    return array


BAD_VARIABLES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "integers": (TypeError, "dtype int32 must be float16", lambda: jax.new_ref(jnp.arange(3))),
    "booleans": (TypeError, "dtype bool must be", lambda: jax.new_ref(jnp.ones(3, bool))),
    "complex": (TypeError, "dtype complex64", lambda: jax.new_ref(jnp.ones(3, complex))),
    "keys": (TypeError, "must be float16", lambda: jax.new_ref(jax.random.key(0))),
    "an array among refs": (TypeError, "must be jax.Refs, or all", lambda: jnp.ones(3)),
    "a shape": (TypeError, "must be a jax.Ref", lambda: jax.ShapeDtypeStruct((3,), "float32")),
    "another library's": (TypeError, "one library", lambda: np.ones(3, np.float32)),
    "a number": (TypeError, "must be a variable of", lambda: 1.0),
}


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_variables_that_cannot_be_trained(name: str) -> None:
    error, message, make = BAD_VARIABLES[name]
    opt, good = Adam(), jax.new_ref(jnp.ones(3))
    with pytest.raises(error, match=message):
        opt.apply_gradients([(jnp.ones(3), good), (jnp.ones(3), make())])
    assert not opt.built and np.all(good[...] == 1)


def test_float64_without_double_precision() -> None:
    with double_precision():
        params = refs_of(start(dtype="float64"))
    with pytest.raises(ValueError, match="jax_enable_x64"):
        Adam().build(params)


def test_the_same_ref_twice() -> None:
    (ref,) = refs_of([np.ones(3, np.float32)])
    with pytest.raises(ValueError, match="are the same object"):
        Adam().build([ref, ref])
    opt = Adam()
    opt.build([ref])
    with pytest.raises(ValueError, match="given twice"):
        opt.apply_gradients([(jnp.ones(3), ref), (jnp.ones(3), ref)])


def test_bare_arrays_are_not_updated_in_place() -> None:
    array = jnp.ones(3)
    opt = Adam()
    hint = r"jax\.new_ref\(array\), or use .*stateless_apply"
    with pytest.raises(TypeError, match=hint):
        opt.apply_gradients([(jnp.ones(3), array)])
    assert not opt.built
    with pytest.raises(TypeError, match=hint):
        opt.minimize(lambda w: jnp.sum(w), [array])
    opt.build([array])
    for step in (opt.apply, jax.jit(opt.apply)):
        with pytest.raises(TypeError, match=hint):
            step([jnp.ones(3)])
    with pytest.raises(TypeError, match="cannot be assigned to"):
        opt.assign(array, jnp.zeros(3))
    with pytest.raises(TypeError, match="cannot be assigned to"):
        opt.assign(array, np.zeros(3))
    with pytest.raises(ValueError, match="has been deleted"):
        Adam().build([deleted(jnp.ones(2))])


BAD_GRADIENTS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "shape": (ValueError, r"Received shape \(8,\) and dtype float32.*\(7,\)", lambda: jnp.ones(8)),
    "rank": (ValueError, r"Received shape \(7, 1\)", lambda: jnp.ones((7, 1))),
    "scalar": (ValueError, r"Received shape \(\)", lambda: jnp.ones(())),
    "complex": (TypeError, "must hold real numbers", lambda: jnp.ones(7, complex)),
    "boolean": (TypeError, "must hold real numbers", lambda: jnp.ones(7, bool)),
    "number": (TypeError, r"Received: 1\.0 \(float\)", lambda: 1.0),
    "list": (TypeError, "Received: list", lambda: [1.0] * 7),
    "ref": (TypeError, "Received: jax.*Ref", lambda: jax.new_ref(jnp.ones(7))),
    "deleted": (ValueError, "has been deleted", lambda: deleted(jnp.ones(7))),
    "sparse shape": (
        ValueError,
        r"shape \(9,\)",
        lambda: coordinates(np.ones(1, np.float32), [0], (9,)),
    ),
    "string": (TypeError, "must hold real numbers", lambda: np.array(["a"] * 7)),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_a_bad_gradient_moves_nothing(name: str) -> None:
    error, message, make = BAD_GRADIENTS[name]
    opt, params = Adam(**EVERYTHING), refs_of(start())
    good = grads(0)
    with pytest.raises(error, match=rf"gradient of variable 'variable_1' .*{message}"):
        opt.apply_gradients(zip([good[0], make(), *good[2:]], params, strict=True))
    assert not opt.built
    opt.apply_gradients(zip(good, params, strict=True))
    opt.apply_gradients(zip(good, params, strict=True))
    before = everything(opt, params)
    with pytest.raises(error, match=rf"gradient of variable 'variable_1' .*{message}"):
        opt.apply_gradients(zip([good[0], make(), *good[2:]], params, strict=True))
    assert everything(opt, params) == before
    opt.apply_gradients(zip(good, params, strict=True))
    assert opt.iterations == 3


def test_a_gradient_of_another_library() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"must be a jax\.Array, a NumPy array .*torch\.Tensor"):
        Adam().apply_gradients([(torch.ones(3), jax.new_ref(jnp.ones(3)))])


def test_an_unknown_variable() -> None:
    opt, params = Adam(), refs_of(start())
    opt.apply_gradients(zip(grads(0), params, strict=True))
    with pytest.raises(ValueError, match="Unknown variable"):
        opt.apply_gradients(zip(grads(0), refs_of(start()), strict=True))


def test_set_weights_checks_before_it_writes() -> None:
    opt, params = Adam(), refs_of(start())
    opt.apply_gradients(zip(grads(0), params, strict=True))
    before = everything(opt, params)
    good = opt.get_weights()
    for wrong in (good[:-1], [*good[:-1], np.ones(9)], [np.asarray(0.5), *good[1:]]):
        with pytest.raises(ValueError):
            opt.set_weights(wrong)
    assert everything(opt, params) == before


# --- Schedules -----------------------------------------------------------------------------------


class Halving(schedules.LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 0.5 ** (1.0 + step)


class Branching(schedules.LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 0.5 if step < 2 else 0.25


def test_a_schedule_of_ones_own() -> None:
    opt, params = Adam(Halving(), epsilon=0.0), refs_of([np.zeros(2, np.float32)])
    for _ in range(3):
        opt.apply_gradients([(jnp.ones(2), params[0])])
    assert_near(values_of(params), [np.full(2, -0.875)])
    assert opt.learning_rate == 0.0625
    opt = Adam(Branching())
    opt.build(params)
    before = everything(opt, params)
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        opt.apply_gradients([(jnp.ones(2), params[0])])
    assert any("callable without arguments" in note for note in caught.value.__notes__)
    assert everything(opt, params) == before


@pytest.mark.needs("keras")
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_a_schedule_of_keras(how: str) -> None:
    """Keras here runs on NumPy, which cannot take a traced step."""
    import keras

    given = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.25)
    opt, params = Adam(given, epsilon=0.0), refs_of([np.zeros(2, np.float32)])
    opt.build(params)
    step: Any = lambda: opt.apply_gradients([(jnp.ones(2), params[0])])  # noqa: E731
    if how == "jit":
        step = jax.jit(step)
    for _ in range(3):
        step()
    assert_near(values_of(params), [np.full(2, -0.5 - 0.25 - 0.125)])
    assert opt.get_config()["learning_rate"]["class_name"] == "ExponentialDecay"


def test_a_rate_from_a_callable() -> None:
    rates = iter([0.5, jnp.asarray(0.25), np.float32(0.125), jnp.asarray([1.0])])
    opt, params = Adam(lambda: next(rates), epsilon=0.0), refs_of([np.zeros(2, np.float32)])
    for _ in range(4):
        opt.apply_gradients([(jnp.ones(2), params[0])])
    assert_near(values_of(params), [np.full(2, -1.875)])
    for bad in (-1.0, jnp.ones(3), jnp.ones((), complex), "fast"):
        before = everything(opt, params)
        opt.learning_rate = lambda bad=bad: bad
        with pytest.raises(ValueError, match="learning_rate"):
            opt.apply_gradients([(jnp.ones(2), params[0])])
        assert everything(opt, params) == before


# --- Differentiation -----------------------------------------------------------------------------


def squares(*values: Any) -> Any:
    return sum(jnp.sum(value**2) for value in values) / 2


@pytest.mark.parametrize("how", ["eager", "jit", "arguments"])
def test_minimize(how: str) -> None:
    opt, params = Adam(0.1, loss_scale_factor=1024.0), refs_of(start())
    opt.build(params)
    if how == "arguments":
        compiled = jax.jit(lambda refs: opt.minimize(squares, refs))
        step: Any = lambda: compiled(params)  # noqa: E731
    else:
        step = lambda: opt.minimize(squares, params)  # noqa: E731
        step = jax.jit(step) if how == "jit" else step
    reference = Reference(start(), learning_rate=0.1)
    for i in range(5):
        assert int(step()) == i + 1
        reference.step(reference.variables)
    assert_near(values_of(params), reference.variables, 64)


def test_get_gradients() -> None:
    opt, params = Adam(loss_scale_factor=8.0), refs_of(start())
    for given in (params, [jnp.asarray(w) for w in start()]):
        for gradient, w in zip(opt.get_gradients(squares, given), start(), strict=True):
            np.testing.assert_array_equal(gradient, w)
    assert not opt.built


def test_minimize_by_a_gradient_of_the_loss() -> None:
    opt, (ref,) = Adam(0.5, epsilon=1e-12), refs_of([np.zeros(3, np.float32)])
    opt.minimize(lambda w: w * jnp.array([1.0, 2.0, 3.0]), [ref], grad_loss=[1.0, 0.0, -1.0])
    assert_near(values_of([ref]), [np.array([-0.5, 0.0, 0.5])])
    with pytest.raises(ValueError, match=r"shape of the loss, \(3,\)\. Received shape \(2,\)"):
        opt.minimize(lambda w: w, [ref], grad_loss=[1.0, 0.0])


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda w: w, ValueError, r"real scalar\. Received.*shape \(3,\)"),
        (lambda w: jnp.argmax(w), ValueError, "real scalar.*int32"),
        (lambda w: "small", ValueError, "real scalar"),
        (lambda w: None, ValueError, "real scalar"),
        (lambda: jnp.zeros(()), TypeError, "one argument a variable.*closes over.*1 variables"),
        (jnp.zeros(()), TypeError, "must be a callable"),
    ],
)
def test_bad_losses(loss: Any, error: type[Exception], message: str) -> None:
    opt, (ref,) = Adam(), refs_of([np.ones(3, np.float32)])
    with pytest.raises(error, match=message):
        opt.minimize(loss, [ref])
    assert not opt.built and np.all(ref[...] == 1)


# --- State ---------------------------------------------------------------------------------------


@each_setting
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_state_moves_between_libraries(settings: dict[str, Any], library: str) -> None:
    if library == "torch":
        torch = pytest.importorskip("torch")
        make: Callable[[Any], Any] = lambda w: torch.from_numpy(np.array(w))  # noqa: E731
    else:
        make = np.array

    def steps(opt: Adam, params: list[Any], of: range, wrap: Callable[[Any], Any]) -> None:
        for i in of:
            given = [wrap(g) for g in gradients(i, SHAPES)]
            opt.apply_gradients(zip(given, params, strict=True))

    first, params = Adam(**settings), [make(w) for w in start()]
    steps(first, params, range(4), make)
    second, refs = Adam(**settings), refs_of([np.asarray(p) for p in params])
    second.build(refs)
    second.set_weights(first.get_weights())
    steps(second, refs, range(4, 8), jnp.asarray)
    third, params = Adam(**settings), [make(ref[...]) for ref in refs]
    third.build(params)
    third.set_weights(second.get_weights())
    steps(third, params, range(8, 12), make)
    theirs, wanted = numpy_run(settings, 12)
    assert third.iterations == theirs.iterations
    assert_near([np.asarray(p) for p in params], wanted)
    assert_near(third.get_weights(), theirs.get_weights())


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_pickle_and_deepcopy(carry: Callable[[Any], Any]) -> None:
    opt, params = AdamW(**EVERYTHING), refs_of(start())
    opt.exclude_from_weight_decay(var_list=[params[2]])
    for i in range(3):
        opt.apply_gradients(zip(grads(i), params, strict=True))
    other, others = carry(opt), refs_of([ref[...] for ref in params])
    for i in range(3, 6):
        opt.apply_gradients(zip(grads(i), params, strict=True))
        other.apply_gradients(zip(grads(i), others, strict=True))
    assert everything(other, others) == everything(opt, params)
    assert other.get_config() == opt.get_config()


def test_a_keras_optimizer_keeps_values_sharded() -> None:
    """Built on one device, as in Keras's guide to distributed training, and stepped on four."""
    code = """
import jax, jax.numpy as jnp, keras, numpy as np, omniadam.keras
from jax.sharding import AxisType, NamedSharding, PartitionSpec
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
sharded, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
w = keras.Variable(np.arange(8.0, dtype=np.float32))
opt = omniadam.keras.Adam(0.1, clipnorm=1.0)
opt.build([w])
state = [jax.device_put(v.value, sharded if v.shape else whole) for v in opt.variables]
given, value = (jax.device_put(x, sharded) for x in (jnp.ones(8), w.value))
traced = jax.jit(lambda s, g, p: opt.stateless_apply(s, [g], [p]))
step = traced.lower(state, given, value).compile()
(new,), state = step(state, given, value)
assert "all-gather(" not in step.as_text()
assert all(v.sharding.spec == PartitionSpec("x") for v in (new, *state) if v.shape)
"""
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"KERAS_BACKEND": "jax", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_finalize_inside_a_compiled_function() -> None:
    opt, params = Adam(0.1, use_ema=True), refs_of([np.ones(3, np.float32)])
    opt.build(params)
    end = jax.jit(lambda: opt.finalize_variable_values(params))
    end()  # of no step: it cannot raise, and leaves what there is
    np.testing.assert_array_equal(np.asarray(params[0][...]), np.ones(3))
    for _ in range(3):
        opt.apply([jnp.ones(3)], params)
    average = np.array(opt.variables[2][...])
    end()
    np.testing.assert_array_equal(np.asarray(params[0][...]), average)
    assert not np.allclose(average, 1.0)


def test_finalize() -> None:
    opt, params = Adam(0.1, use_ema=True), refs_of(start(dtype="bfloat16"))
    for i in range(3):
        opt.apply_gradients(zip(grads(i), params, strict=True))
    opt.finalize_variable_values(params)
    for ref, average in zip(params, opt.variables[2:6], strict=True):
        np.testing.assert_array_equal(ref[...], average[...].astype(jnp.bfloat16))
    opt.apply_gradients(zip(grads(0), params, strict=True))


# --- A rule of one's own -------------------------------------------------------------------------


class Momentum(Optimizer):
    """As one writes it for Keras."""

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self.momenta = self.add_optimizer_variables(list(variables), "momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        m = self.momenta[self._get_variable_index(variable)]
        self.assign(m, 0.5 * m[...] + gradient)
        self.assign_sub(variable, learning_rate * m[...])


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("n", [None, 2])
def test_an_update_step_of_ones_own(how: str, n: int | None) -> None:
    settings: dict[str, Any] = {"weight_decay": 0.25, "use_ema": True, "clipvalue": 1.0}
    opt = Momentum(0.5, gradient_accumulation_steps=n, **settings)
    params = refs_of([np.array([1.0, -2.0], np.float32), np.ones((), np.float32)])
    opt.build(params)
    step: Any = lambda given: opt.apply_gradients(zip(given, params, strict=True))  # noqa: E731
    step = jax.jit(step) if how == "jit" else step
    want = [(np.array([1.0, -2.0]), np.zeros(2)), (np.ones(()), np.zeros(()))]
    for call in range(6):
        assert int(step([jnp.asarray([3.0, -0.5]), jnp.asarray(0.25)])) == call + 1
        if n is None or call % 2:
            given = [np.array([1.0, -0.5]), np.array(0.25)]
            want = [
                (w - w * 0.125 - 0.5 * (0.5 * m + g), 0.5 * m + g)
                for (w, m), g in zip(want, given, strict=True)
            ]
    assert_near(values_of(params), [w for w, _ in want])
    assert_near(values_of(opt.momenta), [m for _, m in want])


def test_what_an_update_step_of_ones_own_cannot_do() -> None:
    opt, params = Momentum(0.5), refs_of([np.ones(2, np.float32)])
    opt.build(params)
    with pytest.raises(ValueError, match="close over them"):
        jax.jit(lambda refs: opt.apply_gradients([(jnp.ones(2), refs[0])]))(params)
    with pytest.raises(NotImplementedError, match="`update_step` of its own"):
        opt.stateless_apply([v[...] for v in opt.variables], [jnp.ones(2)], [params[0][...]])


def test_update_step_of_adam() -> None:
    opt, params = Adam(), refs_of(start())
    opt.build(params)
    opt.update_step(grads(0)[1], params[1], 0.25)
    reference = Reference([start()[1]], learning_rate=0.25)
    reference.step([gradients(0, SHAPES)[1]])
    assert_close(values_of([params[1]]), reference)
    assert opt.iterations == 0


# --- The rest ------------------------------------------------------------------------------------

STEP = """
import jax, jax.numpy as jnp, sys
from omniadam import Adam
ref = jax.new_ref(jnp.ones(3))
opt = Adam(use_ema=True)
opt.apply_gradients([(jnp.ones(3), ref)])
opt.minimize(lambda w: jnp.sum(w), [ref])
assert ref[0] != 1
print(*{m.partition(".")[0] for m in sys.modules})
"""


def test_importing_and_constructing_starts_nothing() -> None:
    """So that a process can set JAX up afterwards, as `jax.distributed.initialize` must."""
    code = """
import jax, omniadam, omniadam.optax, omniadam.backends.jax
from jax._src import xla_bridge
omniadam.Adam(0.1, weight_decay=0.1, global_clipnorm=1.0)
omniadam.optax.adamw(0.1), omniadam.optax.scale_by_adam(b1=0.4, eps_root=1e-3)
assert not xla_bridge.backends_are_initialized()
jax.config.update("jax_num_cpu_devices", 2)
assert len(jax.devices()) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_step_imports_jax_alone() -> None:
    foreign = {"torch", "tensorflow", "keras", "tf_keras", "optax"}
    assert not foreign & set(run_elsewhere(STEP).split())
    assert "optax" in run_elsewhere(f"import optax{STEP}").split()  # that this can fail


@calls_kernels
def test_this_version_of_jax_is_fast() -> None:
    assert re.match(r"\d+\.\d+", jax.__version__)
    assert fast.refs_are_open() and fast.kernels_work()
    assert fast.look_for_traces().__module__ == "jax._src.core"


def test_what_is_private_may_be_missing(
    slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or mean something else: it is found out and said, each by its name."""

    def fail(*_: Any) -> Any:
        raise TypeError

    monkeypatch.setattr(jax._src.core, "trace_state_clean", lambda: True)
    monkeypatch.setattr(jax, "new_ref", lambda value: value)
    monkeypatch.setattr(xla, "handler", fail)
    # As they are before anything is remembered, which other tests rely on.
    looks = [each.__wrapped__ for each in (fast.look_for_traces, fast.refs_are_open)]
    with pytest.warns(RuntimeWarning, match="slow here: jax"):
        found = [look() for look in (*looks, fast.kernels_work.__wrapped__)]
    assert found == [backend.nothing_is_traced, False, False]
    names = ["trace_state_clean", "_refs._buf"]
    # Before, it is usual that steps are XLA's, and nothing is said.
    names += ["foreign functions"] if jax.__version_info__ >= (0, 8, 1) else []
    assert all(name in each for name, each in zip(names, slow_reasons, strict=True))
    # Where kernels are not wanted, it is no surprise that there are none.
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    slow_reasons.clear()
    assert not fast.kernels_work.__wrapped__() and not slow_reasons


def test_info_tells_the_devices() -> None:
    first = jax.devices()[0]
    assert omniadam.info()["devices"]["jax"][0] == f"{first.platform}:0 ({first.device_kind})"


def test_gradients_of_types_in_turn_compile_nothing() -> None:
    params = [jax.new_ref(jnp.ones(3))]
    opt = Adam(0.1)
    grads = [jnp.ones(3, dtype) for dtype in ("float32", "bfloat16", "float16")]

    def one_round() -> None:
        for g in grads:
            opt.apply([g], params)

    one_round()
    with nothing_compiles():
        one_round()


def test_a_new_callable_at_each_step_compiles_nothing() -> None:
    params = [jax.new_ref(jnp.ones(3))]
    opt, g = Adam(0.1), [jnp.ones(3)]
    for i in range(4):
        opt.learning_rate = lambda i=i: 0.1 / (i + 1)
        with nothing_compiles() if i > 1 else nullcontext():
            opt.apply(g, params)
    np.testing.assert_allclose(params[0][...], 1 - 0.1 * (1 + 1 / 2 + 1 / 3 + 1 / 4), rtol=1e-6)


def test_state_of_arrays_is_not_set_in_a_compiled_function() -> None:
    params = [jnp.ones(3)]
    opt = Adam(0.1)
    opt.build(params)

    def set_rate(value: Any) -> None:
        opt.learning_rate = value

    with pytest.raises(ValueError, match="cannot be set inside a compiled function"):
        jax.jit(set_rate)(0.5)
    assert opt.learning_rate == 0.1


def test_state_is_read_while_another_thread_makes_steps() -> None:
    params = [jax.new_ref(jnp.ones(1000))]
    opt = Adam(0.1, amsgrad=True)
    opt.build(params)
    grads = [jnp.ones(1000)]

    def steps() -> None:
        for _ in range(200):
            opt.apply(grads, params)

    thread = threading.Thread(target=steps)
    thread.start()
    seen = []
    while thread.is_alive():
        seen.append(int(opt.iterations))
        assert len(opt.get_weights()) == 5
    thread.join()
    assert seen == sorted(seen) and int(opt.iterations) == 200
