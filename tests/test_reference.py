"""The oracle itself: by hand, against Keras, PyTorch, optax and tf_keras, and its tolerance."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from decimal import Decimal, localcontext
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases import (
    BEYOND_KERAS,
    CASES,
    PART,
    SHAPES,
    SINGLE,
    SMALL_SHAPES,
    STEPS,
    WHOLE,
    Case,
    assert_close,
    combined,
    error_in_ulps,
    gradients,
    sparse_gradient,
    tolerance,
    variables,
    with_missing,
)
from reference import (
    Array,
    Reference,
    one_minus_power,
    reference_contrib_keras,
    reference_optimizer_v2,
)

# --- By hand -------------------------------------------------------------------------------------

# sqrt(1 - beta_2) = 1 - beta_1 = 1/2, so that alpha_1 = learning_rate and the rest is fractions.
EASY: dict[str, Any] = {"learning_rate": 0.75, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 0.5}
ALPHA_2 = 0.75 * (math.sqrt(7) / 4) / 0.75  # 1 - beta_2**2 = 7/16, 1 - beta_1**2 = 3/4


def easy(*values: Any, **settings: Any) -> Reference:
    return Reference(values, **{**EASY, **settings})


def close(got: Any, want: Any) -> bool:
    return bool(np.allclose(got, want, rtol=1e-15, atol=0, equal_nan=True))


def test_two_steps() -> None:
    adam = easy([1.0])
    adam.step([[2.0]])  # m = 2/2 = 1, v = 4/4 = 1: w = 1 - 3/4 * 1 / (1 + 1/2)
    assert close(adam.state["momentum"], [[1.0]])
    assert close(adam.state["velocity"], [[1.0]])
    assert close(adam.variables, [[0.5]])
    adam.step([[-2.0]])  # m = -1/2, v = 3/4 + 1
    assert close(adam.state["momentum"], [[-0.5]])
    assert close(adam.state["velocity"], [[1.75]])
    assert close(adam.variables, [[0.5 + ALPHA_2 * 0.5 / (math.sqrt(1.75) + 0.5)]])
    assert adam.calls == adam.iterations == 2


def test_epsilon_of_algorithm_1() -> None:
    adam = easy([1.0], epsilon_hat=False)
    adam.step([[2.0]])  # at t = 1 both corrections cancel: lr * g / (|g| + epsilon)
    assert close(adam.variables, [[1 - 0.75 * 2 / 2.5]])


def test_amsgrad_keeps_the_largest_velocity() -> None:
    adam = easy([1.0], amsgrad=True)
    adam.step([[2.0]])
    adam.step([[0.0]])
    assert close(adam.state["velocity"], [[0.75]])
    assert close(adam.state["velocity_hat"], [[1.0]])
    assert close(adam.variables, [[0.5 - ALPHA_2 * 0.5 / 1.5]])


@pytest.mark.parametrize(
    ("clip", "first", "second"),
    [
        ({"clipnorm": 2.5}, [1.5, 2.0], [0.0, 0.5]),
        ({"clipvalue": 3.5}, [3.0, 3.5], [0.0, 0.5]),
        ({"global_clipnorm": math.sqrt(25.25) / 2}, [1.5, 2.0], [0.0, 0.25]),
    ],
)
def test_clip(clip: dict[str, float], first: list[float], second: list[float]) -> None:
    adam = easy([0.0, 0.0], [0.0, 0.0], **clip)
    adam.step([[3.0, 4.0], [0.0, 0.5]])
    assert close(adam.state["momentum"], np.divide([first, second], 2))


@pytest.mark.parametrize(
    ("clip", "inf", "nan"),
    [
        ({}, [np.inf, 2.0, 2.0], [np.nan, 2.0, 2.0]),
        ({"clipvalue": 1.0}, [1.0, 1.0, 1.0], [np.nan, 1.0, 1.0]),
        ({"clipnorm": 1.0}, [np.nan, 0.0, 1.0], [np.nan, np.nan, 1.0]),
        ({"global_clipnorm": 1.0}, [np.nan] * 3, [np.nan] * 3),
    ],
)
def test_clip_of_infinity_and_nan(
    clip: dict[str, float], inf: list[float], nan: list[float]
) -> None:
    for bad, want in ((np.inf, inf), (np.nan, nan)):
        adam = easy([0.0, 0.0], [0.0], **clip)
        adam.step([[bad, 2.0], [2.0]])
        assert close(2 * np.concatenate(adam.state["momentum"]), want)


def test_weight_decay_comes_before_the_update() -> None:
    adam = easy([2.0], [2.0], weight_decay=0.5, excluded={1})
    adam.step([[2.0], [2.0]])  # 2 - 2 * 1/2 * 3/4, then - 1/2
    assert close(adam.variables, [[0.75], [1.5]])


def test_accumulation_takes_the_mean_and_the_schedule_sees_calls() -> None:
    seen: list[int] = []

    def schedule(calls: int) -> float:
        seen.append(calls)
        return 0.75

    adam = easy([1.0], learning_rate=schedule, gradient_accumulation_steps=2, weight_decay=0.0)
    adam.step([[1.0]])
    assert close(adam.variables, [[1.0]])
    assert close(adam.state["gradient_accumulator"], [[1.0]])
    adam.step([[3.0]])
    assert close(adam.variables, [[0.5]])
    assert close(adam.state["gradient_accumulator"], [[0.0]])
    adam.step([[1.0]])
    adam.step([[-5.0]])
    assert close(adam.variables, [[0.5 + ALPHA_2 * 0.5 / (math.sqrt(1.75) + 0.5)]])
    assert {1, 3} <= set(seen)
    assert (adam.calls, adam.iterations) == (4, 2)


def test_all_accumulators_are_assigned_zero() -> None:
    adam = easy([1.0], [1.0], gradient_accumulation_steps=2)
    adam.step([[np.nan], [1.0]])
    adam.step([[1.0], None])
    assert close(adam.state["gradient_accumulator"], [[0.0], [0.0]])
    assert close(adam.variables, [[np.nan], [1.0]])


def test_loss_scale() -> None:
    adam = easy([1.0], loss_scale_factor=4.0)
    adam.step([[8.0]])
    assert close(adam.variables, [[0.5]])


def test_average_starts_at_w_and_covers_every_variable() -> None:
    adam = easy([1.0], [4.0], use_ema=True, ema_momentum=0.75)
    adam.step([[2.0], None])
    assert close(adam.state["average"], [[0.5], [4.0]])
    adam.resync([[2.0], [8.0]])
    adam.step([[0.0], [0.0]])
    assert close(adam.state["average"][0], 0.75 * 0.5 + 0.25 * adam.variables[0])
    assert close(adam.state["average"][1], 0.75 * 4 + 0.25 * 8)


def test_average_overwrites_also_between_updates() -> None:
    adam = easy(
        [1.0],
        use_ema=True,
        ema_momentum=0.75,
        ema_overwrite_frequency=2,
        gradient_accumulation_steps=2,
    )
    overwritten = []
    for call in range(8):
        adam.resync([[float(call)]])
        adam.step([[0.0]])
        overwritten.append(bool(adam.variables[0] == adam.state["average"][0]))
    # iterations = 0 0 1 1 2 2 3 3; in the first iteration the average is w anyway
    assert overwritten == [True, True, True, True, False, False, True, True]


def test_missing_gradients() -> None:
    adam = easy([1.0], [1.0], weight_decay=0.5)
    adam.step([[2.0], None])
    assert close(adam.variables[1], [1.0])
    with pytest.raises(ValueError, match="No gradients"):
        adam.step([None, None])
    assert adam.calls == 1


def test_sparse_rows_are_summed_and_unused_rows_move() -> None:
    sparse, dense = easy(np.ones((4, 2))), easy(np.ones((4, 2)))
    for step in range(5):
        indices, values = sparse_gradient(step, (4, 2), dtype="float64")
        assert len(set(indices)) < len(indices)
        rows = np.zeros((4, 2))
        for index, value in zip(indices, values, strict=True):
            rows[index] += value
        sparse.step([(indices, values)])
        dense.step([rows])
    assert close(sparse.variables, dense.variables)


def test_callable_hyperparameters() -> None:
    plain: dict[str, Any] = {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.01}
    for name, value in plain.items():
        called = BEYOND_KERAS[f"callable_{name}"].reference([[1.0, 2.0]])
        number = Reference([[1.0, 2.0]], **{name: value})
        for g in ([3.0, -1.0], [0.5, 0.25]):
            called.step([g])
            number.step([g])
        assert close(called.variables, number.variables)


def test_bias_correction_is_exact() -> None:
    with localcontext(prec=60):
        for beta in (0.0, 0.5, 0.9, 0.999, 1 - 1e-8):
            for t in (1, 2, 10, 1000, 10**6):
                exact = 1 - Decimal(beta) ** t
                assert abs(one_minus_power(beta, t) / float(exact) - 1) < 1e-15


def test_contrib_keras_clips_all_by_one_norm_then_by_value() -> None:
    settings = {"lr": 0.75, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 0.5, "decay": 0.5}
    adam = reference_contrib_keras([[1.0], [1.0]], clipnorm=2.5, clipvalue=1.75, **settings)
    adam.step([[3.0], [4.0]])  # 1.5 and 2.0 by norm, 1.5 and 1.75 by value
    assert close(adam.state["momentum"], [[0.75], [0.875]])
    adam = reference_contrib_keras([[1.0]], **settings)
    adam.step([[2.0]])
    assert close(adam.variables, [[0.5]])
    adam.step([[-2.0]])
    change = ALPHA_2 / 1.5 * 0.5 / (math.sqrt(1.75) + 0.5)
    assert close(adam.variables, [[0.5 + change]])


# --- Against the peers ---------------------------------------------------------------------------
#
# Keras reads its backend once, at import, and JAX its precision: each runs in a process of its own,
# which runs this file. What Keras computes in float64 is not float64 everywhere:
#   NumPy, TensorFlow   round each beta, epsilon and threshold that meets `ops.cast` or a NumPy
#                       function as a Python float to float32: no use here
#   PyTorch             `ops.maximum(float64, 1.5)` is float32, and so are the norms that clip:
#                       such cases are held to float32's tolerance
#   JAX                 float64 throughout, but compiles anew at each call that accumulates (14
#                       seconds a case): it runs single settings, and PyTorch all of the part
#
# Where the n-th call has no gradient, Keras on JAX keeps that accumulator: not compared.

Run = tuple[str, Case, bool, str]  # a name, the settings, gradients missing?, exact to which dtype
WORKER_DTYPE = "float64"


def runs(backend: str) -> Iterator[Run]:
    for name, case in (SINGLE | PART).items():
        by_norm = not case.settings.keys().isdisjoint({"clipnorm", "global_clipnorm"})
        single = "+" not in name
        exact = "float32" if backend == "torch" and by_norm else "float64"
        if backend == "jax" and (not single or "gradient_accumulation_steps" in case.settings):
            continue
        yield name, case, False, exact
        if single:
            yield f"{name}, missing", case, True, exact


def calls(missing: bool, dtype: str = WORKER_DTYPE) -> Iterator[list[Any]]:
    for step in range(STEPS):
        grads = gradients(step, SMALL_SHAPES, dtype=dtype)
        yield with_missing(step, grads) if missing else list(grads)


def state_in_keras(case: Case, missing: bool) -> dict[str, Any]:
    import keras

    weights = [
        keras.Variable(w, dtype=WORKER_DTYPE) for w in variables(WORKER_DTYPE, 0, SMALL_SHAPES)
    ]
    adam = keras.optimizers.Adam(**case.settings_for(keras.optimizers.schedules))
    if case.excluded:
        adam.exclude_from_weight_decay([weights[i] for i in sorted(case.excluded)])
    adam.build(weights)
    for grads in calls(missing):
        adam.apply([None if g is None else keras.ops.convert_to_tensor(g) for g in grads])
    state = {"variable": weights, "momentum": adam._momentums, "velocity": adam._velocities}
    if adam.amsgrad:
        state["velocity_hat"] = adam._velocity_hats
    if adam.use_ema:
        state["average"] = adam._model_variables_moving_average
    if adam.gradient_accumulation_steps:
        state["gradient_accumulator"] = adam._accumulated_gradients
    return {slot: [v.numpy() for v in values] for slot, values in state.items()}


# It keeps hyperparameters in float32 variables whatever floatx says, hence values exact in float32.
_EXACT: dict[str, Any] = {"learning_rate": 2.0**-7, "beta_1": 0.875, "beta_2": 0.9921875}
LEGACY: dict[str, dict[str, Any]] = {
    "rate": _EXACT,
    "decay": _EXACT | {"decay": 0.25},
    "amsgrad": _EXACT | {"amsgrad": True, "epsilon": 0.01},
    "value, then norm": _EXACT | {"clipvalue": 0.125, "clipnorm": 0.25},
    "value, then all": _EXACT | {"clipvalue": 0.125, "global_clipnorm": 0.25},
}


def state_in_tf_keras(settings: dict[str, Any]) -> dict[str, Any]:
    import tensorflow as tf
    import tf_keras

    weights = [tf.Variable(w) for w in variables(WORKER_DTYPE, 0, SMALL_SHAPES)]
    adam = tf_keras.optimizers.legacy.Adam(**settings)
    for grads in calls(missing=False):
        adam.apply_gradients(zip(map(tf.constant, grads), weights, strict=True))
    slots = {"momentum": "m", "velocity": "v"}
    slots |= {"velocity_hat": "vhat"} if adam.amsgrad else {}
    state = {slot: [adam.get_slot(w, name) for w in weights] for slot, name in slots.items()}
    return {k: [v.numpy() for v in values] for k, values in ({"variable": weights} | state).items()}


def work(peer: str, path: str) -> None:
    """In the process of its own: run every case, and leave the states in one file."""
    warnings.simplefilter("ignore")
    if peer == "tf_keras":
        import tf_keras

        tf_keras.backend.set_floatx(WORKER_DTYPE)
        states = {name: state_in_tf_keras(settings) for name, settings in LEGACY.items()}
    else:
        import keras

        keras.config.set_floatx(WORKER_DTYPE)
        assert keras.backend.backend() == peer
        states = {name: state_in_keras(case, missing) for name, case, missing, _ in runs(peer)}
    np.savez(
        path,
        **{
            f"{name}|{slot}|{index}": value
            for name, state in states.items()
            for slot, values in state.items()
            for index, value in enumerate(values)
        },
    )


def states_of(peer: str, directory: Path) -> dict[str, dict[str, list[Array]]]:
    path = directory / f"{peer}.npz"
    environment = os.environ | {
        "KERAS_BACKEND": "tensorflow" if peer == "tf_keras" else peer,
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, __file__, peer, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states: dict[str, dict[str, list[Array]]] = {}
    with np.load(path) as file:
        for key in file.files:  # in the order of writing
            name, slot, _ = key.split("|")
            states.setdefault(name, {}).setdefault(slot, []).append(file[key])
    return states


def assert_same_state(
    state: dict[str, list[Array]], reference: Reference, dtype: str = WORKER_DTYPE
) -> None:
    assert state.keys() == reference.state.keys()
    for slot, values in state.items():
        assert_close(values, reference, slot, dtype)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_keras(backend: str, tmp_path: Path) -> None:
    if find_spec("keras") is None or find_spec(backend) is None:
        pytest.skip(f"needs keras and {backend}")
    states = states_of(backend, tmp_path)
    wrong = []
    for name, case, missing, exact in runs(backend):
        reference = case.reference(variables(WORKER_DTYPE, 0, SMALL_SHAPES))
        for grads in calls(missing):
            reference.step(grads)
        try:
            assert_same_state(states[name], reference, exact)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_tf_keras_legacy(tmp_path: Path) -> None:
    if find_spec("tf_keras") is None:
        pytest.skip("needs tf_keras")
    states = states_of("tf_keras", tmp_path)
    for name, settings in LEGACY.items():
        reference = reference_optimizer_v2(variables(WORKER_DTYPE, 0, SMALL_SHAPES), **settings)
        for grads in calls(missing=False):
            reference.step(grads)
        assert_same_state(states[name], reference)


@pytest.mark.parametrize(
    ("name", "settings", "arguments"),
    [
        ("Adam", {}, {}),
        ("Adam", {"learning_rate": 0.02, "epsilon": 0.01}, {"lr": 0.02, "eps": 0.01}),
        ("Adam", {"beta_1": 0.8, "beta_2": 0.95}, {"betas": (0.8, 0.95)}),
        ("Adam", {"amsgrad": True, "epsilon": 0.01}, {"amsgrad": True, "eps": 0.01}),
        ("AdamW", {"weight_decay": 0.5, "amsgrad": True}, {"weight_decay": 0.5, "amsgrad": True}),
        ("AdamW", {"weight_decay": 0.01}, {}),
        ("Adam", {}, {"fused": True}),
        ("Adam", {}, {"maximize": True}),
        ("Adam", {}, {"weight_decay": 0.5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_torch(name: str, settings: dict[str, Any], arguments: dict[str, Any], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    start = variables(dtype, 0, SMALL_SHAPES)
    reference = Reference(start, epsilon_hat=False, **{"epsilon": 1e-8, **settings})
    weights = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in start]
    adam = getattr(torch.optim, name)(weights, **arguments)
    # What Keras has no setting for is a change of the gradient: torch's maximize, and the weight
    # decay of its Adam.
    sign = -1 if arguments.get("maximize") else 1
    decay = arguments.get("weight_decay", 0.0) if name == "Adam" else 0.0
    for grads in calls(missing=False, dtype=dtype):
        for weight, g in zip(weights, grads, strict=True):
            weight.grad = torch.from_numpy(g.copy())
        reference.step(
            [sign * g + decay * w.detach().numpy() for g, w in zip(grads, weights, strict=True)]
        )
        adam.step()
    slots = {"momentum": "exp_avg", "velocity": "exp_avg_sq"}
    slots |= {"velocity_hat": "max_exp_avg_sq"} if arguments.get("amsgrad") else {}
    state = {slot: [adam.state[w][key].numpy() for w in weights] for slot, key in slots.items()}
    state["variable"] = [w.detach().numpy() for w in weights]
    assert_same_state(state, reference, dtype)


@pytest.mark.parametrize(
    "name",
    [
        *("defaults", "learning_rate", "schedule", "beta_1", "beta_2", "epsilon", "weight_decay"),
        *("excluded", "clipvalue", "global_clipnorm"),
        *("schedule+excluded", "weight_decay+clipvalue", "schedule+global_clipnorm"),
    ],
)
def test_optax(name: str) -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    from precision import double_precision

    case = CASES[name]
    settings: dict[str, Any] = {"learning_rate": 0.001, "epsilon": 1e-8} | dict(case.settings)
    start = variables(WORKER_DTYPE, 0, SMALL_SHAPES)
    reference = case.reference(start, epsilon=settings["epsilon"], epsilon_hat=False)
    with double_precision():
        shared = {
            "learning_rate": settings["learning_rate"],
            "b1": settings.get("beta_1", 0.9),
            "b2": settings.get("beta_2", 0.999),
            "eps": settings["epsilon"],
        }
        if "weight_decay" in settings:
            mask = [i not in case.excluded for i in range(len(start))]
            adam = optax.adamw(**shared, weight_decay=settings["weight_decay"], mask=mask)
        else:
            adam = optax.adam(**shared)
        if "clipvalue" in settings:
            adam = optax.chain(optax.clip(settings["clipvalue"]), adam)
        if "global_clipnorm" in settings:
            adam = optax.chain(optax.clip_by_global_norm(settings["global_clipnorm"]), adam)

        def step(grads: Any, state: Any, weights: Any) -> Any:
            updates, state = adam.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

        compiled = jax.jit(step)
        weights = [jax.numpy.asarray(w) for w in start]
        state = adam.init(weights)
        for grads in calls(missing=False):
            weights, state = compiled(grads, state, weights)
            reference.step(grads)
        assert_close([np.asarray(w) for w in weights], reference, dtype=WORKER_DTYPE)


# --- The table and the tolerance -----------------------------------------------------------------


def after(reference: Reference, shapes: Any, dtype: str = "float32") -> Reference:
    for step in range(STEPS):
        reference.step(gradients(step, shapes, dtype=dtype))
    return reference


def worst(got: Reference, reference: Reference, dtype: str = "float32") -> float:
    """The largest error, as a part of what is tolerated."""
    return max(
        float(np.max(error_in_ulps(value, reference, index, slot, dtype), initial=0.0))
        for slot, values in got.state.items()
        for index, value in enumerate(values)
    ) / tolerance(reference, dtype)


def test_every_setting_shows_alone_and_in_every_combination() -> None:
    start = variables(shapes=SMALL_SHAPES)
    for name, case in (CASES | PART | WHOLE).items():
        reference = after(case.reference(start), SMALL_SHAPES)
        names = name.split("+")
        for left_out in names if name != "defaults" else ():
            rest = combined([n for n in names if n != left_out])
            assert rest is not None
            less = after(rest.reference(start), SMALL_SHAPES)
            same_slots = less.state.keys() == reference.state.keys()
            assert not same_slots or worst(less, reference) > 10, (name, left_out)


def test_a_part_has_every_two_settings_together_and_each_without_the_other() -> None:
    singles = [name for name in CASES if "+" not in name and name != "defaults"]
    for one, other in permutations(singles, 2):
        if f"{one}+{other}" in CASES:
            rows = [set(name.split("+")) for name in PART]
            assert any({one, other} <= row for row in rows)
            assert any(one in row and other not in row for row in rows if len(row) > 1)
    assert {name for names in WHOLE for name in names.split("+")} == {*singles}


@pytest.mark.parametrize(
    ("dtype", "steps_apart"),
    [
        ("float64", False),
        ("float32", False),
        ("float16", True),
        ("bfloat16", True),
        ("bfloat16", False),
    ],
)
def test_tolerance_lets_honest_arithmetic_pass(dtype: str, steps_apart: bool) -> None:
    """The oracle's own code in `dtype`'s arithmetic, with one rounding to `dtype` at the store."""
    for name, case in CASES.items():
        large = name in ("defaults", "global_clipnorm") and dtype != "float64"
        shapes = SHAPES if large else SMALL_SHAPES
        start = variables(dtype, 0, shapes)
        if dtype == "float64":  # judged in more than float64
            honest, exact = case.reference(start), case.reference(start, dtype=np.longdouble)
        else:
            honest, exact = case.reference(start, dtype=np.float32), case.reference(start)
        for step in range(STEPS):
            grads = gradients(step, shapes, dtype=dtype)
            honest.step(grads)
            exact.step(grads)
            honest.resync([w.astype(start[0].dtype) for w in honest.variables])
            if steps_apart:
                assert worst(honest, exact, dtype) <= 1, (name, step)
                exact.resync(honest.variables)
        assert worst(honest, exact, dtype) <= 1, name


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("defaults", {"beta_2": float(np.float32(0.999))}),  # 1 - beta_2 is off by 1.3e-5
        ("defaults", {"beta_1": 0.9 + 2e-6}),
        ("defaults", {"learning_rate": 0.001 * (1 + 2e-5)}),
        ("defaults", {"epsilon": 1.01e-7}),
        ("defaults", {"epsilon_hat": False}),
        ("amsgrad", {"beta_2": float(np.float32(0.999))}),
        ("weight_decay", {"weight_decay": 0.501}),
        ("clipnorm", {"clipnorm": 1.5 * (1 + 2e-5)}),
        ("clipvalue", {"clipvalue": 0.125 * (1 + 2e-5)}),
        ("global_clipnorm", {"global_clipnorm": 2.0 * (1 + 2e-5)}),
        ("ema_momentum", {"ema_momentum": 0.75 * (1 + 2e-5)}),
        ("loss_scale_factor", {"loss_scale_factor": 20.0 * (1 + 2e-5)}),
    ],
    ids=str,
)
def test_tolerance_rejects_a_wrong_coefficient(name: str, wrong: dict[str, Any]) -> None:
    start = variables(shapes=SMALL_SHAPES)
    exact = after(CASES[name].reference(start), SMALL_SHAPES)
    assert worst(after(CASES[name].reference(start, **wrong), SMALL_SHAPES), exact) > 1


def test_an_element_without_gradient_may_not_move() -> None:
    reference = after(Reference(variables(shapes=[(7,)])), [(7,)])
    moved = np.nextafter(reference.variables[0].astype(np.float32), np.float32(1))
    error = error_in_ulps(moved, reference, 0)
    assert np.isinf(error[0])
    assert np.isfinite(error[1:]).all()


if __name__ == "__main__":
    work(*sys.argv[1:])
