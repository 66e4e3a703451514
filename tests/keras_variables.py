"""Run by test_keras.py, in a process for each of Keras's backends: `keras.Variable`s in a loop."""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import omniadam
from cases import (
    CASES,
    SMALL_SHAPES,
    Case,
    assert_close,
    combined,
    gradients,
    sparse_gradient,
    variables,
)
from omniadam import Adam
from omniadam.compat import contrib_keras, optimizer_v2
from omniadam.keras import Adam as DropIn
from reference import reference_contrib_keras, reference_optimizer_v2

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    from omniadam.fast.tensorflow import FastTensorFlow
STEPS = 12
EVERYTHING = list(CASES)[-1]  # with one kind of clipping; a row below has each of the other two
ROWS = [
    *([], ["gradient_accumulation_steps"], ["schedule", "excluded", "clipnorm"]),
    ["amsgrad", "clipvalue", "loss_scale_factor", "ema_overwrite_frequency"],
    EVERYTHING.split("+"),
]


@pytest.fixture(autouse=True)
def eager_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On TensorFlow not by XLA, which takes a second for each optimizer: the numbers of both ways
    are in test_tensorflow.py, and one test has XLA's here.
    """
    if BACKEND == "tensorflow":
        by_xla = request.function is test_bfloat16_trains
        monkeypatch.setattr(FastTensorFlow, "jit_compile", by_xla)


def made(values: list[Any]) -> list[Any]:
    return [keras.Variable(v, name=f"w{i}") for i, v in enumerate(values)]


def tensors(values: list[Any]) -> list[Any]:
    return [ops.convert_to_tensor(v) for v in values]


def build(case: Case, params: list[Any]) -> Adam:
    opt = Adam(**case.settings_for(omniadam.schedules))
    opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
    return opt


def host(values: Any) -> list[Any]:
    return [ops.convert_to_numpy(v) for v in values]


def same(a: Any, b: Any, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Within a few float32 roundings a step, of what Keras's own optimizer left."""
    for one, other in zip(host(a), host(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def raises(kind: type[Exception], *words: str) -> Any:
    class Expected:
        def __enter__(self) -> None: ...

        def __exit__(self, got: Any, value: Any, trace: Any) -> bool:
            assert got is not None and issubclass(got, kind), (kind, got)
            assert all(word in str(value) for word in words), (words, str(value))
            return True

    return Expected()


def test_settings_against_the_oracle() -> None:
    for names in ROWS:  # the first is the defaults
        case = combined(names)
        assert case is not None
        params = made(variables(shapes=SMALL_SHAPES))
        opt, reference = build(case, params), case.reference([p.numpy() for p in params])
        for step in range(STEPS):
            g = gradients(step, shapes=SMALL_SHAPES)
            opt.apply_gradients(zip(tensors(g), params, strict=True))
            reference.step(g)
        assert int(opt.iterations) == reference.iterations
        assert_close([p.numpy() for p in params], reference)


def test_bfloat16_trains() -> None:
    w = keras.Variable(np.ones(3), dtype="bfloat16")
    opt = Adam(0.1)
    for _ in range(2):
        opt.apply_gradients([(ops.ones(3, "bfloat16"), w)])
    assert np.allclose(ops.convert_to_numpy(ops.cast(w, "float32")), 0.8, atol=0.01)


def test_constraints() -> None:
    w = keras.Variable(np.array([1.0, -2.0], np.float32))
    w.constraint = keras.constraints.NonNeg()
    Adam(0.1).apply_gradients([(ops.ones(2), w)])
    assert np.allclose(w.numpy(), [0.9, 0.0])


def test_overwrite_with_gradient() -> None:
    """As Keras's own optimizer: the new value, or under accumulation the largest of n."""
    for settings in ({}, {"gradient_accumulation_steps": 2}, {"use_ema": True}):
        results = []
        for kind in (Adam, keras.optimizers.Adam):
            w, scale = made([np.ones(2, np.float32), np.ones(2, np.float32)])
            scale.overwrite_with_gradient = True
            opt, seen = kind(0.1, **settings), []
            for value in ([5.0, 1.0], [2.0, 3.0], [4.0, 0.5]):
                opt.apply([ops.ones(2), ops.convert_to_tensor(np.float32(value))], [w, scale])
                seen += [w.numpy().copy(), scale.numpy().copy()]
            results.append(seen)
        assert np.allclose(results[0], results[1], atol=1e-6), (settings, results)


def test_names_and_exclusion() -> None:
    params = made([np.ones(2, np.float32)] * 2)
    opt = Adam(0.1, weight_decay=0.5)
    opt.exclude_from_weight_decay(var_names=["w1"])
    opt.apply_gradients([(ops.zeros(2), p) for p in params])
    assert [float(p.numpy()[0]) for p in params] == [np.float32(0.95), 1.0]
    assert list(opt.named_variables())[2:4] == ["w0_momentum", "w0_velocity"]


def test_assignments_between_steps_count() -> None:
    w = keras.Variable(np.ones(2, np.float32))
    opt = Adam(0.1)
    opt.apply_gradients([(ops.ones(2), w)])
    w.assign(ops.full((2,), 5.0))
    opt.apply_gradients([(ops.ones(2), w)])
    assert np.allclose(w.numpy(), 4.9)


def test_missing_gradient() -> None:
    params = made([np.ones(2, np.float32)] * 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Adam(0.1).apply([ops.ones(2), None], params)
    assert "w1" in str(caught[-1].message)
    assert params[0].numpy()[0] < 1.0 == params[1].numpy()[0]


def sparse_form(indices: Any, values: Any, shape: tuple[int, ...]) -> Any:
    """A gradient of an embedding as the backend's library has it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant(shape))
    if BACKEND == "torch":
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.sparse_coo_tensor(indices[None], torch.tensor(values), shape)
    if BACKEND == "jax":
        import jax.numpy as jnp
        from jax.experimental.sparse import BCOO

        return BCOO((jnp.asarray(values), jnp.asarray(indices[:, None])), shape=shape)
    return omniadam.IndexedSlices(values, indices, shape)


def test_sparse_gradients() -> None:
    """Repeats are summed first, and rows that do not occur still move by their momentum."""
    shape = (6, 2)
    for name in ("defaults", "global_clipnorm", "gradient_accumulation_steps"):
        params = made([np.ones(shape, np.float32)])
        opt, reference = build(CASES[name], params), CASES[name].reference([np.ones(shape)])
        for step in range(STEPS):
            indices, values = sparse_gradient(step, shape)
            dense = np.zeros(shape, np.float32)
            np.add.at(dense, indices, values)
            opt.apply_gradients([(sparse_form(indices, values, shape), params[0])])
            reference.step([dense])
        assert_close([params[0].numpy()], reference)


def test_a_compiled_function() -> None:
    """100 calls of one are 100 eager steps, and a rate that is set between them takes effect."""
    if BACKEND not in ("tensorflow", "jax"):
        return  # they compile nothing
    values = variables(shapes=SMALL_SHAPES)
    case = CASES[EVERYTHING]
    eager, compiled = made(values), made(values)
    one, other = build(case, eager), build(case, compiled)
    one.build(eager)
    other.build(compiled)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(lambda g: other.apply(g, compiled))
    else:
        import jax

        pure = jax.jit(lambda w, s, g: other.stateless_apply(s, g, w), donate_argnums=(0, 1))

        def step(g: Any) -> None:
            held = [*compiled, *other.variables]
            values = [v.value for v in held]
            new = pure(values[: len(compiled)], values[len(compiled) :], g)
            for variable, value in zip(held, [*new[0], *new[1]], strict=True):
                variable.assign(value)

    for i in range(100):
        g = tensors(gradients(i % 10, shapes=SMALL_SHAPES))
        if i == 50 and not callable(case.settings.get("learning_rate")):
            one.learning_rate = other.learning_rate = 0.125
        one.apply(g, eager)
        step(g)
    for a, b in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-5, atol=1e-6)
    assert int(one.iterations) == int(other.iterations)


def test_kernels_in_compiled_functions() -> None:
    """A step of `omniadam.keras` calls the CPU kernels, and yet is a function like others of JAX.

    Here, and not in keras_optimizers.py: on its eight devices the step is XLA's.
    """
    if BACKEND != "jax":
        return
    import jax
    import jax.numpy as jnp

    if jax.__version_info__ < (0, 8, 1):
        pytest.skip("XLA makes the step in this version of JAX")
    made_of = [np.linspace(-1, 1, n, dtype=np.float32) for n in (5, 200_000)]
    settings = {"learning_rate": 0.1, "global_clipnorm": 1.0, "use_ema": True}
    stepped = []
    for kind in (DropIn, keras.optimizers.Adam):
        params = made(made_of)
        opt = kind(**settings)
        opt.build(params)
        state = [v.value for v in opt.variables]

        def step(values: Any, grads: Any, opt: Any = opt, state: Any = state) -> Any:
            return opt.stateless_apply(state, list(grads), values)[0]

        stepped.append(step)
    ours, theirs = stepped
    values, grads = tensors(made_of), [jnp.cos(9 * jnp.asarray(v)) for v in made_of]
    assert "omniadam_kernel" in jax.jit(ours).lower(values, grads).as_text()
    compiled_step = jax.jit(ours)
    same(compiled_step(values, grads), jax.jit(theirs)(values, grads))

    def slope(step: Any) -> Any:
        return jax.grad(lambda g: sum(jnp.sum(w**2) for w in step(values, g)))

    wanted = jax.jit(slope(theirs))(grads)
    for slope_of_ours in (jax.jit(slope(ours)), slope(ours)):
        same(slope_of_ours(grads), wanted, rtol=1e-3, atol=1e-6)
    both = jax.jit(jax.vmap(ours))(*[[jnp.stack([x, 2 * x]) for x in v] for v in (values, grads)])
    for i in (0, 1):
        alone = compiled_step(*[[x * (i + 1) for x in v] for v in (values, grads)])
        same([w[i] for w in both], alone, rtol=1e-6)

    # Runs of one program at once do not get in each other's way.
    expected = [host(compiled_step([w * k for w in values], grads)) for k in range(4)]

    def repeat(k: int) -> list[bool]:
        mine = [w * k for w in values]
        runs = (host(compiled_step(mine, grads)) for _ in range(50))
        return [all(map(np.array_equal, run, expected[k])) for run in runs]

    with ThreadPoolExecutor(4) as pool:
        assert all(map(all, pool.map(repeat, range(4))))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "d")
    for spec in (jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")):
        place = jax.sharding.NamedSharding(mesh, spec)
        spread = [values[0], jax.device_put(values[1], place)]
        spread[0] = jax.device_put(spread[0], jax.sharding.NamedSharding(mesh, type(spec)()))
        small, large = compiled_step(spread, grads)
        for shard in small.addressable_shards:
            same([shard.data], expected[1][:1], rtol=1e-6)
        for shard in large.addressable_shards:
            same([shard.data], [expected[1][1][shard.index]], rtol=1e-6)


def test_state_moves_to_numpy_and_back() -> None:
    case = CASES["amsgrad+gradient_accumulation_steps"]
    start, steps = variables(shapes=SMALL_SHAPES), range(3, 7)
    params, arrays = made(start), [v.copy() for v in start]
    theirs, ours = build(case, params), build(case, arrays)
    for step in range(3):
        g = gradients(step, shapes=SMALL_SHAPES)
        theirs.apply(tensors(g), params)
    for array, p in zip(arrays, params, strict=True):
        array[...] = p.numpy()
    ours.build({p.path: a for p, a in zip(params, arrays, strict=True)})
    ours.set_weights(theirs.get_weights())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(theirs)))
    for step in steps:
        g = gradients(step, shapes=SMALL_SHAPES)
        twin.apply(tensors(g), params)
        ours.apply(g, arrays)
    for array, p in zip(arrays, params, strict=True):
        assert np.allclose(array, p.numpy(), rtol=1e-5, atol=1e-6)


def test_keras_schedule_as_it_is() -> None:
    w = keras.Variable(np.ones(1, np.float32))
    opt = Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))
    for _ in range(2):
        opt.apply_gradients([(ops.ones(1), w)])
    assert np.allclose(w.numpy(), 1 - 0.1 - 0.05, atol=1e-6)


def test_bad_input() -> None:
    w = keras.Variable(np.ones((2, 3), np.float32), name="kernel")
    with raises(ValueError, "kernel", "(2, 3)", "(3,)"):
        Adam().apply_gradients([(ops.ones(3), w)])
    with raises(TypeError, "kernel"):
        Adam().apply_gradients([("no array", w)])
    with raises(TypeError):
        Adam().build([keras.Variable(np.ones(2), dtype="int32", trainable=False)])
    with raises(TypeError, "keras", "numpy"):
        Adam().build([w, np.ones(2)])
    assert np.all(w.numpy() == 1.0)


def test_minimize() -> None:
    if BACKEND == "numpy":
        with raises((TypeError, ImportError)):  # type: ignore[arg-type]
            Adam().minimize(lambda: 1.0, [keras.Variable(1.0)])
        return
    w = keras.Variable(np.array([1.0, 2.0], np.float32))

    def closure() -> Any:
        return ops.sum(ops.square(w.value))

    loss = (lambda x: ops.sum(ops.square(x))) if BACKEND == "jax" else closure
    opt = Adam(0.1)
    first = [ops.convert_to_numpy(g) for g in opt.get_gradients(loss, [w])]
    assert np.allclose(first, [[2.0, 4.0]])
    for _ in range(200):
        opt.minimize(loss, [w])
    assert np.all(abs(w.numpy()) < 1e-2)


def test_older_generations() -> None:
    """On NumPy test_optimizer_v2.py and test_contrib_keras.py see to them."""
    for generation, reference_of in (
        (contrib_keras.Adam, reference_contrib_keras),
        (optimizer_v2.Adam, reference_optimizer_v2),
    ):
        if BACKEND == "numpy":
            break
        settings: dict[str, Any] = {"decay": 0.25, "clipnorm": 1.0, "clipvalue": 0.5}
        start, now = variables(shapes=SMALL_SHAPES), gradients(0, shapes=SMALL_SHAPES)
        params, reference = made(start), reference_of(start, **settings)

        def dot(*ws: Any, now: Any = now, params: Any = params) -> Any:
            return sum(ops.sum(w * g) for w, g in zip(ws or params, now, strict=True))

        opt = generation(**settings)
        loss = dot if BACKEND == "jax" else lambda dot=dot: dot()
        is_v2 = generation is optimizer_v2.Adam
        updates = opt.get_updates(*((loss, params) if is_v2 else (params, {}, loss)))
        for step in range(STEPS):
            now[:] = gradients(step, shapes=SMALL_SHAPES)
            for update in updates:
                update()
            reference.step(now)
        assert int(opt.get_weights()[0]) == STEPS
        assert_close([p.numpy() for p in params], reference)
