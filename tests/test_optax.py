"""omniadam.optax beside optax, live: the same numbers, the same surface, the same state."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import omniadam.optax  # noqa: E402
from cases import FORMATS, SMALL_SHAPES, assert_close, gradients, variables  # noqa: E402
from omniadam import schedules  # noqa: E402
from omniadam.optax import adam, adamw, step  # noqa: E402
from precision import double_precision  # noqa: E402
from reference import Reference  # noqa: E402

ours: Any = omniadam.optax
NAMES = ("adam", "adamw", "scale_by_adam")
partition: Any = getattr(optax, "partition", optax.multi_transform)  # its name before optax 0.2.5

# --- The surface ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    theirs = inspect.signature(getattr(optax, name)).parameters
    got = dict(inspect.signature(getattr(ours, name)).parameters)
    extra = got.pop("epsilon_hat")
    assert (extra.kind, extra.default) == (extra.KEYWORD_ONLY, False)
    assert list(got) == list(theirs)
    for each in theirs:
        assert (got[each].kind, got[each].default) == (theirs[each].kind, theirs[each].default)


@pytest.mark.parametrize("name", NAMES)
def test_type(name: str) -> None:
    arguments = () if name == "scale_by_adam" else (0.1,)
    made = getattr(ours, name)(*arguments)
    assert type(made) is type(getattr(optax, name)(*arguments))


def test_omniadam_itself_imports_neither() -> None:
    code = "import omniadam, sys; print(*{m.partition('.')[0] for m in sys.modules})"
    done = run(code)
    assert "omniadam" in done.split() and not {"jax", "optax"} & set(done.split())
    assert {"jax", "optax"} <= set(run(code.replace("omniadam,", "omniadam.optax,")).split())


def run(code: str, **environment: str) -> str:
    source = str(Path(omniadam.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": source} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- The same numbers ----------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    settings: dict[str, Any]


def mask_all(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


TABLE = {
    "defaults": Case("adam", {}),
    "numbers": Case("adam", {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 0.01}),
    "b1 zero": Case("adam", {"b1": 0, "b2": 0.95}),
    "b2 zero": Case("adam", {"b1": 0.3, "b2": 0.0}),
    "eps_root": Case("adam", {"eps_root": 1e-3}),
    "nesterov": Case("adam", {"nesterov": True}),
    "nesterov, all": Case("adam", {"nesterov": True, "b1": 0.3, "eps_root": 1e-4, "eps": 1e-3}),
    "schedule": Case("adam", {"learning_rate": optax.cosine_decay_schedule(0.01, 120)}),
    "no learning_rate": Case("adam", {"learning_rate": None}),
    "mu_dtype": Case("adam", {"mu_dtype": "bfloat16"}),
    "mu_dtype, nesterov": Case("adam", {"mu_dtype": jnp.bfloat16, "nesterov": True}),
    "adamw": Case("adamw", {"learning_rate": schedules.CosineDecay(0.01, 120)}),
    "weight_decay": Case("adamw", {"weight_decay": 0.5, "nesterov": True}),
    "decay schedule": Case("adamw", {"weight_decay": lambda count: 0.5 / (count + 1)}),
    "mask": Case("adamw", {"weight_decay": 0.5, "mask": [True, False]}),
    "mask callable": Case("adamw", {"weight_decay": 0.5, "mask": mask_all}),
}
# The oldest optax has no schedule of the decay yet, always a rate, and floats of integers.
IS_OLD = tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 8)
if IS_OLD:
    del TABLE["no learning_rate"], TABLE["decay schedule"]
STEPS = 100
SHAPES = ((2003,), ())


def made(library: Any, case: Case) -> Any:
    return getattr(library, case.name)(**{"learning_rate": 1e-3} | case.settings)


@cache
def data() -> tuple[list[Any], list[Any]]:
    """Gradients of all steps, stacked, and parameters."""
    steps = [gradients(i, SHAPES) for i in range(STEPS)]
    return [np.stack(each) for each in zip(*steps, strict=True)], variables("float32", 0, SHAPES)


def updates_of(solver: Any, dtype: str, rounded: str = "float32") -> Callable[[bool], list[Any]]:
    """All updates, one row a step: of the gradients, or of all absolute values.

    The absolute values make the size of an update, to which roundings are proportional: what it
    would be if nothing cancelled.
    """

    @jax.jit
    def all_steps(grads: Any, params: Any) -> Any:
        def advance(state: Any, g: Any) -> Any:
            updates, state = solver.update(g, state, params)
            return state, updates

        return jax.lax.scan(advance, solver.init(params), grads)[1]

    def run(absolute: bool) -> list[Any]:
        made = [[jnp.asarray(x, rounded).astype(dtype) for x in each] for each in data()]
        if absolute:
            made = jax.tree.map(jnp.abs, made)
        return [np.asarray(u, np.float64) for u in all_steps(*made)]

    return run


def ulps(got: list[Any], want: list[Any], sizes: list[Any], dtype: str) -> float:
    worst = 0.0
    for a, b, size in zip(got, want, sizes, strict=True):
        size = np.maximum(np.abs(size), FORMATS[dtype].smallest)
        worst = max(worst, float(np.max(np.abs(a - b) / size)) / FORMATS[dtype].eps)
    return worst


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE)
def test_updates_are_those_of_optax(case: Case) -> None:
    """100 updates each, against optax in double precision.

    What optax itself is away from its formula sets the limits where both are in one precision:
    - 1 - b2**t is a difference of numbers near 1, 0.001 at t = 1: half an ulp of 1 is 500 ulps of
      it there; the square root halves it.
    - A bfloat16 `mu` is rounded at each step by each, half an ulp a time; after 1 / (1 - b1) steps
      of it what was added at first is gone. optax also multiplies in bfloat16.
    Ours in float32 is within 16 ulps of optax in double: the roundings of m and v, of the
    coefficients, and 8 of a float32 cosine.
    """
    with double_precision():
        # Exact: without the roundings of a narrow `mu`.
        exact = Case(case.name, {k: v for k, v in case.settings.items() if k != "mu_dtype"})
        theirs = updates_of(made(optax, exact), "float64")
        want, sizes = theirs(False), theirs(True)
        double = updates_of(made(ours, case), "float64")(False)
    single = updates_of(made(ours, case), "float32")(False)
    if "mu_dtype" in case.settings:
        theirs_single = updates_of(made(optax, case), "float32")(False)
        for got in (double, single):
            assert 0.25 < ulps(got, want, sizes, "bfloat16") < 4
        assert ulps(single, theirs_single, sizes, "bfloat16") < 10
        return
    assert ulps(double, want, sizes, "float64") < 300
    assert ulps(single, want, sizes, "float32") < 16


@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_updates_of_bfloat16_parameters(b2: float) -> None:
    """The momentum is bfloat16 in both; ours is computed in float32 and rounded as it is stored.

    In optax so is the velocity, and 0.999 is 1: what is less than half an ulp of it is lost.
    """
    case = Case("adam", {"b2": b2})
    with double_precision():
        exact = updates_of(made(optax, case), "float64", "bfloat16")
        want, sizes = exact(False), exact(True)
    got = updates_of(made(ours, case), "bfloat16")(False)
    theirs = updates_of(made(optax, case), "bfloat16")(False)
    limit = 4 if b2 == 0.9 else 8
    assert ulps(got, want, sizes, "bfloat16") < limit
    assert ulps(got, theirs, sizes, "bfloat16") < 3 * limit
    assert ulps(got, want, sizes, "bfloat16") < ulps(theirs, want, sizes, "bfloat16")


def test_small_float16_gradients() -> None:
    """The square of 1e-4, and eps, are 0 in float16: a step computes in float32."""
    params, grads = jnp.ones(2, jnp.float16), jnp.array([1e-4, -1e-4], jnp.float16)
    updates, _ = adam(0.1).update(grads, adam(0.1).init(params))
    assert updates.dtype == jnp.float16
    np.testing.assert_allclose(updates, [-0.1, 0.1], rtol=2e-3)
    theirs, _ = optax.adam(0.1).update(grads, optax.adam(0.1).init(params))
    assert not np.isfinite(theirs).any()


@pytest.mark.parametrize(
    ("epsilon_hat", "dtype", "settings"),
    [
        (True, "float32", {}),
        (True, "float64", {"weight_decay": 0.5}),
        (False, "float32", {"weight_decay": 0.5}),
        (False, "float64", {}),
    ],
)
def test_the_oracle(epsilon_hat: bool, dtype: str, settings: dict[str, Any]) -> None:
    """With `epsilon_hat`, Keras's numbers. Every two of the three meet."""
    with double_precision(dtype == "float64"):
        params = [jnp.asarray(x) for x in variables(dtype, 0, SMALL_SHAPES)]
        # Its update is of the parameter that the decay has left; the difference is a rounding.
        reference = Reference(
            [np.asarray(x) for x in params], epsilon=0.01, epsilon_hat=epsilon_hat, **settings
        )
        make = adamw if settings else adam
        solver = make(1e-3, eps=0.01, epsilon_hat=epsilon_hat, **settings)
        state, advance = solver.init(params), step(solver)
        for i in range(20):
            grads = gradients(i, SMALL_SHAPES, dtype=dtype)
            reference.step(grads)
            params, state = advance([jnp.asarray(g) for g in grads], state, params)
        assert_close([np.asarray(x) for x in params], reference, "variable", dtype)
        assert_close([np.asarray(x) for x in state[0].mu], reference, "momentum", dtype)
        assert_close([np.asarray(x) for x in state[0].nu], reference, "velocity", dtype)


# --- The same state ------------------------------------------------------------------------------


def tree() -> dict[str, Any]:
    w, b, scale = variables("float32", 0, ((3, 5), (5,), ()))
    layer = {"w": jnp.asarray(w), "b": jnp.asarray(b)}
    return {"layer": layer, "rest": [jnp.asarray(scale), None, ()]}


def tree_gradients(i: int) -> dict[str, Any]:
    leaves = gradients(i, [leaf.shape for leaf in jax.tree.leaves(tree())])
    return jax.tree.unflatten(jax.tree.structure(tree()), [jnp.asarray(x) for x in leaves])


def forms(state: Any) -> list[Any]:
    found = [(x.shape, x.dtype.name, x.weak_type) for x in jax.tree.leaves(state)]
    return [jax.tree.structure(state), *found]


def train(solver: Any, state: Any, params: Any, steps: range) -> tuple[Any, Any]:
    update = jax.jit(solver.update)
    for i in steps:
        updates, state = update(tree_gradients(i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_near(one: Any, other: Any, rtol: float = 1e-4) -> None:
    """After a few steps, where it is semantics that would differ and not roundings."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=1e-7
        )


STATES = {"defaults", "schedule", "mu_dtype", "adamw", "decay schedule", "mask callable"}


def with_velocity(state: Any, dtype: Any) -> Any:
    return optax.tree_utils.tree_set(
        state, nu=optax.tree_utils.tree_cast(optax.tree_utils.tree_get(state, "nu"), dtype)
    )


@pytest.mark.parametrize("name", sorted(STATES & TABLE.keys()))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_state_has_the_form_of_theirs(name: str, dtype: str) -> None:
    """But for the velocity of 16-bit parameters, of which `update` keeps the type that it has."""
    params = jax.tree.map(lambda x: x.astype(dtype), tree())
    grads = jax.tree.map(lambda x: x.astype(dtype), tree_gradients(0))
    solver, theirs = made(ours, TABLE[name]), made(optax, TABLE[name])
    state, want = solver.init(params), theirs.init(params)
    assert forms(state) == forms(with_velocity(want, jnp.float32))
    want_updates, want_after = jax.eval_shape(theirs.update, grads, want, params)
    for given, kind in ((want, dtype), (state, jnp.float32)):
        updates, after = jax.eval_shape(solver.update, grads, given, params)
        assert forms(updates) == forms(want_updates)
        assert forms(after) == forms(
            jax.eval_shape(lambda state, kind=kind: with_velocity(state, kind), want_after)
        )


@pytest.mark.parametrize("name", ["defaults", "schedule", "nesterov", "weight_decay"])
def test_state_goes_either_way_in_the_middle_of_a_run(name: str) -> None:
    first, second = made(ours, TABLE[name]), made(optax, TABLE[name])
    want = train(second, second.init(tree()), tree(), range(15))
    for a, b in ((first, second), (second, first)):
        params, state = train(a, a.init(tree()), tree(), range(5))
        params, state = train(b, state, params, range(5, 10))
        assert_near(train(a, state, params, range(10, 15)), want)


@pytest.mark.needs("orbax")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("back", [False, True])
def test_checkpoint_of_one_is_read_into_the_other(tmp_path: Path, back: bool) -> None:
    from orbax import checkpoint

    case = TABLE["schedule"]
    writer, reader = (made(x, case) for x in ((optax, ours) if back else (ours, optax)))
    params, state = train(writer, writer.init(tree()), tree(), range(5))
    with checkpoint.StandardCheckpointer() as file:
        file.save(tmp_path / "step", {"params": params, "state": state})
        file.wait_until_finished()
        like = {"params": tree(), "state": reader.init(tree())}
        read = file.restore(tmp_path / "step", jax.tree.map(jnp.zeros_like, like))
    assert_near(read, {"params": params, "state": state}, rtol=0)
    want = train(writer, state, params, range(5, 10))
    assert_near(train(reader, read["state"], read["params"], range(5, 10)), want)


# --- Every leaf that optax takes -----------------------------------------------------------------

COMPLEX: dict[str, Case] = {
    "defaults": Case("adam", {}),
    "nesterov": Case("adam", {"nesterov": True, "eps_root": 1e-3, "eps": 0.01}),
    "weight_decay": Case("adamw", {"weight_decay": 0.5, "b1": 0.3, "b2": 0.2}),
}


def complex_values(seed: int, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    pairs = {"a": rng.standard_normal((2, 3, 4)), "real": rng.standard_normal((1, 5))}
    values = {k: jnp.asarray(x[0] if k == "real" else x[0] + 1j * x[1]) for k, x in pairs.items()}
    return {"a": values["a"].astype(dtype), "real": values["real"]}


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("case", COMPLEX.values(), ids=COMPLEX)
def test_complex_parameters(case: Case, dtype: str) -> None:
    """The velocity is of the size of a gradient, and both its parts move by it together."""
    results = []
    with double_precision(dtype == "complex128"):
        for library in (ours, optax):
            solver, params = made(library, case), complex_values(0, dtype)
            state, update = solver.init(params), jax.jit(solver.update)
            kept = [forms(state)]
            for i in range(1, 8):
                updates, state = update(complex_values(i, dtype), state, params)
                params = optax.apply_updates(params, updates)
                kept.append(forms([updates, state]))
            results.append([params, state, kept])
    (params, state, kept), (their_params, their_state, their_kept) = results
    assert kept == their_kept
    rtol = 1e-11 if dtype == "complex128" else 1e-4
    for got, want in ((params, their_params), (state, their_state)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-3 * rtol)


def test_complex_epsilon_hat_and_derivative() -> None:
    g = jnp.array([3.0 - 4.0j, 0.0])
    solver = adam(1.0, eps=0.1, epsilon_hat=True)
    updates, _ = solver.update(g, solver.init(g))
    want = -(0.001**0.5) * g / (0.001**0.5 * jnp.abs(g) + 0.1)
    np.testing.assert_allclose(updates, want, rtol=1e-5)

    def size(x: Any) -> Any:
        updates, _ = solver.update(x * g, solver.init(g))
        return jnp.sum(jnp.abs(updates[0]))

    slope = (size(1.001) - size(0.999)) / 0.002
    np.testing.assert_allclose(jax.grad(size)(1.0), slope, rtol=1e-2)


LEAVES = {
    "int32": jnp.array([3, -2]),
    "uint8": jnp.array([3], jnp.uint8),
    "bool": jnp.array([True, False]),
    "int": 3,
    "float": 2.0,
    "numpy float64": np.float64(2.0),
    "numpy int64": np.int64(3),
    "numpy": np.array(2.0),
    "complex": jnp.array([1.0 + 2.0j]),
    "no elements": jnp.zeros((0, 3)),
    "no integers": jnp.zeros(0, int),
    "raw key": jax.random.PRNGKey(0),
    "masked": optax.MaskedNode(),
    "none": None,
}


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16", "float32"])
@pytest.mark.filterwarnings("ignore:.*(C|c)omplex.*")
def test_leaves(mu_dtype: Any) -> None:
    """Values and types of `init` and of two updates; the types may be weak in theirs.

    All in one tree: XLA takes as long for one leaf as for all.
    """
    grads, results = dict(LEAVES), []
    if IS_OLD:  # which treats integers in another way
        for name, leaf in LEAVES.items():
            kinds = [jnp.result_type(x) for x in jax.tree.leaves(leaf)]
            if not all(jnp.issubdtype(kind, jnp.inexact) for kind in kinds):
                del grads[name]
    for library in (ours, optax):
        solver = library.scale_by_adam(mu_dtype=mu_dtype)
        state = solver.init(grads)
        results.append([state])
        update = jax.jit(solver.update)
        for _ in range(2):
            updates, state = update(grads, state, grads)
            results[-1] += [updates, state]
    got, want = ([jax.tree.map(jnp.asarray, x) for x in each] for each in results)
    assert forms(got[0]) == forms(want[0])
    assert [jax.tree.structure(x) for x in got] == [jax.tree.structure(x) for x in want]
    rtol = 1e-2 if mu_dtype == "bfloat16" else 1e-4
    for (where, a), (_, b) in zip(*map(jax.tree.leaves_with_path, (got, want)), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        one, other = (np.asarray(x).astype(complex) for x in (a, b))
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6, err_msg=str(where))


def test_an_integer_leaf_beside_what_is_trained() -> None:
    """A counter in a model: `init` takes it, and a mask leaves it out of the steps."""
    params = {"w": jnp.ones(3), "n": jnp.array([3])}
    assert adam(0.1).init(params)[0].nu["n"].dtype == params["n"].dtype
    solver = optax.masked(adam(0.1), {"w": True, "n": False})
    updates, _ = solver.update({"w": jnp.ones(3), "n": jnp.array([0])}, solver.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-5)
    assert updates["n"].tolist() == [0]


def test_parameters_that_have_no_gradient() -> None:
    """A model may hold functions, where the gradients and the state hold None."""
    params, trained = {"w": jnp.ones(3), "f": jnp.tanh}, {"w": jnp.ones(3), "f": None}
    updates, _ = adam(0.1).update(trained, adam(0.1).init(trained), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-5)


# --- 16-bit parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_velocity_of_narrow_parameters(dtype: str) -> None:
    """0.999 of it is nothing less in 16 bits, and what comes on top is half an ulp."""
    params = jnp.ones(2, dtype)
    solver = adam(0.1)
    state = solver.init(params)
    assert (state[0].mu.dtype, state[0].nu.dtype) == (params.dtype, jnp.float32)
    update = jax.jit(solver.update)
    for _ in range(100):
        _, state = update(params, state, params)
    np.testing.assert_allclose(state[0].nu, 1 - 0.999**100, rtol=1e-5)
    wide = adam(0.1, mu_dtype=jnp.float32).init(params)[0]
    assert (wide.mu.dtype, wide.nu.dtype) == (jnp.float32, jnp.float32)


KINDS = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("mu_dtype", [None, *KINDS])
@pytest.mark.parametrize("of_gradients", KINDS)
@pytest.mark.parametrize("of_parameters", KINDS)
def test_updates_have_the_types_of_theirs(
    of_parameters: str, of_gradients: str, mu_dtype: str | None
) -> None:
    """Whatever the type of the velocity is."""
    params, grads = jnp.ones(2, of_parameters), jnp.ones(2, of_gradients)
    solver, theirs = (m.adamw(0.1, mu_dtype=mu_dtype) for m in (ours, optax))
    want, after = jax.eval_shape(theirs.update, grads, theirs.init(params), params)
    for given in (theirs.init(params), solver.init(params)):
        got, state = jax.eval_shape(solver.update, grads, given, params)
        assert got.dtype == want.dtype
        assert state[0].mu.dtype == after[0].mu.dtype
        assert state[0].nu.dtype == given[0].nu.dtype


@pytest.mark.parametrize("mu_dtype", [None, "float32"])
@pytest.mark.parametrize("widened", [False, True])
def test_16_bit_state_in_scan_and_cond(widened: bool, mu_dtype: Any) -> None:
    params = jnp.ones(2, jnp.bfloat16)
    solver, theirs = (m.adam(0.1, mu_dtype=mu_dtype) for m in (ours, optax))
    start = (solver if widened else theirs).init(params)

    def advance(carry: Any, g: Any) -> Any:
        w, state = carry
        updates, new = solver.update(g, state, w)
        state = jax.lax.cond(jnp.any(g != 0), lambda: new, lambda: state)
        return (optax.apply_updates(w, updates), state), updates

    grads = jnp.ones((3, 2), jnp.bfloat16)
    (_, state), _ = jax.jit(lambda c: jax.lax.scan(advance, c, grads))((params, start))
    assert forms(state) == forms(start) and state[0].count == 3


# --- Trees, and what optax has around a solver ---------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


@pytest.mark.parametrize(
    "params",
    [
        1.0,
        np.float32(1.0),
        {},
        None,
        [None, {"a": None}],
        Layer(jnp.ones((2, 2)), None),
        {"deep": ({"er": [Layer(jnp.ones(2), jnp.ones(()))]},), "empty": (), "zero": jnp.ones(0)},
    ],
    ids=lambda params: type(params).__name__,
)
def test_trees(params: Any) -> None:
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    results = []
    for library in (ours, optax):
        solver = library.adam(0.1)
        updates, state = solver.update(grads, solver.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        results.append([updates, state])
    assert_near(*results)


def many_steps(solver: Any) -> Any:
    return train(solver, solver.init(tree()), tree(), range(6))


COMPOSED: dict[str, Callable[[Any], Any]] = {
    "chain": lambda m: optax.chain(optax.clip_by_global_norm(1.0), m.adamw(0.01)),
    "scale_by": lambda m: optax.chain(m.scale_by_adam(b1=0.8), optax.scale(-0.01)),
    "inject": lambda m: optax.inject_hyperparams(m.adamw)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.5
    ),
    "multisteps": lambda m: optax.MultiSteps(m.adam(0.01), 3),
    "masked": lambda m: optax.masked(m.adam(0.01), {"layer": True, "rest": False}),
    "partition": lambda m: partition(
        {"fast": m.adam(0.1), "slow": m.adamw(0.001, nesterov=True), "no": optax.set_to_zero()},
        {"layer": {"w": "fast", "b": "slow"}, "rest": "no"},
    ),
    "finite": lambda m: optax.apply_if_finite(m.adam(0.01), 2),
    "extra": lambda m: optax.chain(m.adam(0.01), optax.add_decayed_weights(0.1)),
    "every other": lambda m: optax.conditionally_mask(m.adam(0.1), lambda n, **_: n % 2 == 0),
    "named": lambda m: optax.named_chain(("clip", optax.clip(0.5)), ("adam", m.adam(0.01))),
    "scheduled b1": lambda m: optax.inject_hyperparams(m.adam)(
        learning_rate=0.1, b1=optax.linear_schedule(0.9, 0.3, 5)
    ),
}


@pytest.mark.parametrize("compose", COMPOSED.values(), ids=COMPOSED)
def test_composition(compose: Callable[[Any], Any]) -> None:
    assert_near(many_steps(compose(ours)), many_steps(compose(optax)))


@pytest.mark.needs("flax")
def test_train_state_of_flax() -> None:
    from flax import serialization
    from flax.training.train_state import TrainState

    results = []
    for library in (ours, optax):
        state = TrainState.create(apply_fn=None, params=tree(), tx=library.adamw(1e-3))
        for i in range(3):
            state = state.apply_gradients(grads=tree_gradients(i))
        start = TrainState.create(apply_fn=None, params=tree(), tx=ours.adamw(1e-3))
        state = serialization.from_bytes(start, serialization.to_bytes(state))
        results.append(state.apply_gradients(grads=tree_gradients(3)))
    got, want = ((each.step, each.params, each.opt_state) for each in results)
    assert_near(got, want)


def test_injected_hyperparameters_can_be_set() -> None:
    solver = optax.inject_hyperparams(adam)(learning_rate=0.1, b1=0.0, eps=0.0)
    params, grads = jnp.ones(2), jnp.array([3.0, -2.0])
    state = solver.init(params)
    update = jax.jit(solver.update)
    for rate in (0.1, 0.5):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(updates, [-rate, rate], rtol=1e-5)
    assert not isinstance(state.hyperparams.get("nesterov"), jax.Array)


def test_an_update_that_is_not_finite_is_skipped() -> None:
    solver = optax.apply_if_finite(adam(0.1), 3)
    params = jnp.ones(2)
    state = solver.init(params)
    updates, state = jax.jit(solver.update)(jnp.array([jnp.nan, 1.0]), state, params)
    assert updates.tolist() == [0.0, 0.0] and state.inner_state[0].count == 0
    updates, state = adam(0.1).update(jnp.array([jnp.nan, 1.0]), state.inner_state, params)
    assert np.isnan(updates[0]) and updates[1] < 0


def test_vmap() -> None:
    solver = adamw(0.1)
    params, grads = jnp.arange(6.0).reshape(3, 2), jnp.linspace(-1, 1, 6).reshape(3, 2)
    states = jax.vmap(solver.init)(params)
    updates, states = jax.vmap(solver.update)(grads, states, params)
    for i in range(3):
        want, state = solver.update(grads[i], solver.init(params[i]), params[i])
        np.testing.assert_allclose(updates[i], want, rtol=1e-6)
        np.testing.assert_allclose(states[0].nu[i], state[0].nu, rtol=1e-6)


def test_settings_may_be_traced() -> None:
    def first_update(rate: Any, b1: Any, b2: Any, eps: Any, eps_root: Any) -> Any:
        solver = adam(rate, b1, b2, eps, eps_root, nesterov=True)
        return solver.update(jnp.array([3.0]), solver.init(jnp.ones(1)))[0]

    settings = (0.1, 0.3, 0.99, 0.1, 0.2)
    want = first_update(*settings)
    np.testing.assert_allclose(jax.jit(first_update)(*settings), want, rtol=1e-5)
    rates = jnp.array([0.1, 0.2])
    both = jax.vmap(lambda rate: first_update(rate, *settings[1:]))(rates)
    np.testing.assert_allclose(both, [want, 2 * want], rtol=1e-5)


def test_derivative_through_steps_is_finite() -> None:
    """Where the velocity is 0, a derivative of its root must not be 0 * infinity."""

    def trained(rate: Any) -> Any:
        solver, params = adam(rate), jnp.array([1.0, -2.0, 0.0])
        state = solver.init(params)
        for _ in range(3):
            updates, state = solver.update(2 * params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    h = 1e-2
    want = (trained(0.1 + h) - trained(0.1 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(trained)(0.1), want, rtol=1e-2)


def test_16_bit_gradients_of_float32_parameters() -> None:
    params, grads = jnp.ones(3), jnp.full(3, 0.5, jnp.bfloat16)
    got, want = (
        library.adam(0.1).update(grads, library.adam(0.1).init(params)) for library in (ours, optax)
    )
    assert forms(got) == forms(want)
    assert_near(got, want, rtol=1e-2)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax, omniadam.optax
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("data", "model"))
assert len(jax.devices()) == 8
specs = {"w": P("data", "model"), "b": P("model"), "whole": P()}
shapes = {"w": (16, 8), "b": (8,), "whole": (3,)}
rng = np.random.default_rng(0)
values = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
grads = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
def same(x, y):
    return x.sharding.is_equivalent_to(y.sharding, x.ndim)
def place(tree):
    return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
solver = omniadam.optax.adamw(0.1)
params, alone = place(values), {k: jnp.asarray(x) for k, x in values.items()}
state, state_alone = solver.init(params), solver.init(alone)
for k in specs:
    for each in (state[0].mu, state[0].nu):
        assert same(each[k], params[k]), k
sharded = place(grads)
text = jax.jit(solver.update).lower(sharded, state, params).compile().as_text()
assert not any(op in text for op in ("all-reduce", "all-gather", "all-to-all", "permute"))
updates, _ = jax.jit(solver.update)(sharded, state, params)
assert all(same(updates[k], params[k]) for k in specs)
step = omniadam.optax.step(solver)
pointers = {s.data.unsafe_buffer_pointer() for s in params["w"].addressable_shards}
for _ in range(3):
    params, state = step(sharded, state, params)
    alone, state_alone = step({k: jnp.asarray(g) for k, g in grads.items()}, state_alone, alone)
assert {s.data.unsafe_buffer_pointer() for s in params["w"].addressable_shards} == pointers
for k in specs:
    for each in (params, state[0].mu, state[0].nu):
        assert same(each[k], sharded[k]), k
    np.testing.assert_allclose(params[k], alone[k], rtol=1e-6)
print("done")
"""


def test_sharded_parameters() -> None:
    flags = "--xla_force_host_platform_device_count=8"
    assert run(SHARDED, XLA_FLAGS=flags, JAX_PLATFORMS="cpu") == "done\n"


# --- Parameters in, parameters out ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name"),
    [*((ours, name) for name in ("defaults", "schedule", "mu_dtype")), (optax, "weight_decay")],
)
def test_step_is_update_and_apply_updates(library: Any, name: str) -> None:
    """Of any solver; theirs has the setting that needs the parameters."""
    solver = made(library, TABLE[name])
    params, state, advance = tree(), solver.init(tree()), step(solver)
    for i in range(5):
        params, state = advance(tree_gradients(i), state, params)
    assert_near((params, state), train(solver, solver.init(tree()), tree(), range(5)), rtol=1e-5)


def test_step_works_in_place() -> None:
    params = {"a": jnp.ones((30, 40)), "b": [jnp.ones(7), jnp.ones((30, 40))]}
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    solver = adamw(0.1)
    state = solver.init(params)
    old = params, state

    def places(each: Any) -> list[int]:
        return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(each) if x.size > 1]

    before, advance = places(old), step(solver)
    for _ in range(2):
        params, state = advance(grads, state, params)
        assert places((params, state)) == before
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("make", [adam, adamw])
def test_step_needs_no_memory_of_its_own(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def jit(function: Any, **options: Any) -> Any:
        compiled.append(compiling(function, **options))
        return compiled[-1]

    compiling = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    solver = make(0.1)
    step(solver)
    params = [jnp.ones(s) for s in ((64, 3, 7, 7), (64,), (256, 64, 1, 1), (256, 64, 1, 1))]
    state = solver.init(params)
    program = compiled[-1].lower(params, state, params, {}).compile()
    memory, floats = program.memory_analysis(), sum(x.size for x in params)
    assert memory.alias_size_in_bytes >= 3 * 4 * floats
    assert memory.temp_size_in_bytes < 1024
    assert not re.search(r"f32\[\d[^=]*\bcopy\(", program.as_text())


def test_step_passes_extra_arguments_on_and_traces_once() -> None:
    seen = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        seen.append(value)
        return jax.tree.map(lambda g: value * g, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    solver = optax.chain(adam(0.1), scaled)
    advance, params = step(solver), jnp.ones(2)
    state = solver.init(params)
    for value in (2.0, 0.0):
        before = np.asarray(params).copy()
        params, state = advance(jnp.ones(2), state, params, value=value)
        np.testing.assert_allclose(params, before - 0.1 * value, rtol=1e-5)
    assert len(seen) == 1


def test_step_inside_a_compiled_function() -> None:
    advance, params = step(adam(0.1)), jnp.ones(2)
    state = adam(0.1).init(params)
    new, _ = jax.jit(lambda p, s: advance(2 * p, s, p))(params, state)
    np.testing.assert_allclose(new, [0.9, 0.9], rtol=1e-5)
    assert not params.is_deleted()


def test_step_changes_nothing_on_an_error() -> None:
    solver, params = adam(0.1), jnp.ones(2)
    state = solver.init(params)
    with pytest.raises(ValueError, match="shape"):
        step(solver)(jnp.ones(3), state, params)
    assert params.tolist() == [1.0, 1.0] and state[0].count == 0


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "eps_root", "epsilon_hat"])
@pytest.mark.parametrize("make", [adam, adamw], ids=["adam", "adamw"])
def test_bad_setting(make: Callable[..., Any], name: str) -> None:
    for bad in (-0.1, float("nan"), "0.9", None):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            make(0.1, **{name: bad})


@pytest.mark.parametrize("bad", [np.zeros(2, jax.dtypes.float0), jax.random.key(0)], ids=str)
def test_gradients_that_are_no_numbers(bad: Any) -> None:
    params = {"a": jnp.ones(bad.shape)}
    with pytest.raises(
        TypeError, match=r"gradient of parameter \"\['a'\]\" must hold numbers.*mask"
    ):
        adam(0.1).update({"a": bad}, adam(0.1).init(params))


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "eps_root"])
def test_bad_setting_in_an_array(name: str) -> None:
    for bad in (-0.1, jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            adam(0.1, **{name: jnp.array(bad)})


def test_a_setting_that_16_bits_round_out_of_its_range() -> None:
    """What inject_hyperparams makes of 0.999 is 1 for bfloat16 parameters."""
    params = jnp.ones(2, jnp.bfloat16)
    inject = optax.inject_hyperparams
    with pytest.raises(ValueError, match=r"`b2` must be.*1\.0.*bfloat16.*hyperparam_dtype"):
        inject(adam)(0.1).init(params)
    solver = inject(adam, hyperparam_dtype=jnp.float32)(0.1)
    updates, state = solver.update(params, solver.init(params), params)
    np.testing.assert_allclose(updates.astype(float), [-0.1, -0.1], rtol=1e-2)
    # Set later, where nothing is compiled.
    state.hyperparams["b1"] = jnp.array(1.0, jnp.bfloat16)
    with pytest.raises(ValueError, match="`b1` must be"):
        inject(adam)(0.1).update(params, state, params)


def test_gradients_that_do_not_fit() -> None:
    params = {"a": jnp.ones((2, 3))}
    solver = adam(0.1)
    state = solver.init(params)
    with pytest.raises(ValueError, match=r"\"\['a'\]\".*\(3,\).*\(2, 3\)"):
        solver.update({"a": jnp.ones(3)}, state)
    for wrong in ({"b": jnp.ones((2, 3))}, {"a": None}, [jnp.ones((2, 3))], {}):
        with pytest.raises(ValueError, match="a tree like the parameters"):
            solver.update(wrong, state)
    with pytest.raises(ValueError, match="a tree like the parameters"):
        solver.update(params, solver.init({"a": None}))
    with pytest.raises(ValueError, match="params"):
        adamw(0.1).update(params, adamw(0.1).init(params))


def test_step_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"GradientTransformation.*Received: function"):
        step(adam)


# --- A model -------------------------------------------------------------------------------------


@pytest.mark.needs("sklearn")
def test_digits() -> None:
    """The same weights as by optax after five epochs on real data, and they have learnt it."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    def weights() -> dict[str, Any]:
        first, second = jax.random.split(jax.random.key(0))
        return {
            "w1": jax.random.normal(first, (64, 48)) / 8,
            "b1": jnp.zeros(48),
            "w2": jax.random.normal(second, (48, 10)) / 7,
            "b2": jnp.zeros(10),
        }

    def scores(w: Any, x: Any) -> Any:
        return jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]

    @jax.jit
    @jax.grad
    def gradient(w: Any, i: Any) -> Any:
        x, y = (jax.lax.dynamic_slice_in_dim(a, 32 * i, 32) for a in (images, labels))
        return optax.losses.softmax_cross_entropy_with_integer_labels(scores(w, x), y).mean()

    def trained(library: Any) -> Any:
        params = weights()
        solver = library.adamw(optax.cosine_decay_schedule(0.01, 280), weight_decay=0.01)
        advance, state = step(solver), solver.init(params)
        for i in range(280):
            params, state = advance(gradient(params, i % 56), state, params)
        return params

    got, want, start = trained(ours), trained(optax), weights()
    for name in got:
        moved = float(jnp.linalg.norm(want[name] - start[name]))
        apart = float(jnp.linalg.norm(got[name] - want[name]))
        assert apart < 1e-3 * moved, (name, apart, moved)
    accuracy = float((scores(got, images).argmax(axis=1) == labels).mean())
    assert accuracy > 0.97


# --- Documentation -------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "optax.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_page(block: int) -> None:
    exec(BLOCKS[block], {})


def test_page_has_examples() -> None:
    assert len(BLOCKS) >= 5
