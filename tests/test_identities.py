"""Two ways to the same numbers must agree to the bit, whatever the numbers are.

Gradients here are multiples of 2**-6 up to 16: sums of them and of their squares are exact, in any
order and in float16 too, so that not even the rounding of a norm may tell two ways apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from cases import variables
from omniadam import Adam, IndexedSlices
from omniadam.fast import ndarrays
from omniadam.kernels import cpu, jit
from omniadam.tuned import CHUNK
from reference import Array

pytestmark = pytest.mark.usefixtures("kernel")

DTYPES = ["float32", "float64", "float16"]
STEPS = 3
# More than a vector and its remainder, more than a chunk, and what has no neighbours.
SHAPES = ((), (1,), (37,), (5, 7), (2, 3, 5), (0, 3), (CHUNK + 21,))

ALL: dict[str, Any] = {"amsgrad": True, "weight_decay": 0.5, "loss_scale_factor": 4.0}
ALL |= {"use_ema": True, "ema_overwrite_frequency": 2}
CLIPS: dict[str, dict[str, Any]] = {
    "unclipped": {},
    "clipnorm": {"clipnorm": 3.0},
    "global_clipnorm": {"global_clipnorm": 3.0},
    "clipvalue": {"clipvalue": 0.5},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"all, {name}": ALL | clip for name, clip in CLIPS.items()},
    "accumulated": ALL | CLIPS["clipnorm"] | {"gradient_accumulation_steps": 2},
}


def exact(shape: tuple[int, ...], dtype: str, seed: Any) -> Array:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.integers(-1024, 1025, shape) / 64, dtype)


def all_exact(step: int, dtype: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Array]:
    return [exact(shape, dtype, [step, i]) for i, shape in enumerate(shapes)]


def state(opt: Adam, params: Sequence[Array]) -> list[tuple[str, bytes]]:
    """Everything that a step changes, to the bit, in the order of the elements."""
    named = [(f"variable {i}", w) for i, w in enumerate(params)]
    return [(name, np.asarray(w).tobytes()) for name, w in (*named, *opt.named_variables().items())]


def trained(
    settings: dict[str, Any],
    dtype: str,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    *,
    variable: Callable[[Array], Array] = lambda w: w,
    gradient: Callable[[Array], Any] = lambda g: g,
    steps: int = STEPS,
) -> tuple[Adam, list[Array]]:
    """After some steps on variables and gradients that were given another form."""
    params = [variable(w) for w in variables(dtype, shapes=shapes)]
    opt = Adam(**settings)
    for step in range(steps):
        grads = [gradient(g) for g in all_exact(step, dtype, shapes)]
        opt.apply_gradients(zip(grads, params, strict=True))
    return opt, params


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETTINGS[request.param]


# --- Steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("clip", ["global_clipnorm", "clipvalue"])
def test_accumulated_micro_steps_are_one_step_on_the_mean(clip: str, dtype: str) -> None:
    settings = CLIPS[clip] | {"weight_decay": 0.5, "amsgrad": True}
    n = 4
    params, want = variables(dtype, shapes=SHAPES), variables(dtype, shapes=SHAPES)
    opt = Adam(**settings, gradient_accumulation_steps=n)
    want_opt = Adam(**settings)
    for step in range(STEPS):
        total = [np.zeros(shape) for shape in SHAPES]
        for micro in range(n):
            before = [w.copy() for w in params]
            grads = all_exact(n * step + micro, dtype)
            opt.apply_gradients(zip(grads, params, strict=True))
            for of_all, g in zip(total, grads, strict=True):
                of_all += g
            if micro < n - 1:
                assert [w.tobytes() for w in params] == [w.tobytes() for w in before]
        want_opt.apply_gradients((of_all / n, w) for of_all, w in zip(total, want, strict=True))
    assert [w.tobytes() for w in params] == [w.tobytes() for w in want]
    got, expected = opt.named_variables(), want_opt.named_variables()
    for name in expected.keys() - {"iteration"}:
        assert got[name].tobytes() == expected[name].tobytes(), name
    for name in got.keys() - expected.keys():
        assert not got[name].any(), name


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue"])
@pytest.mark.parametrize("threshold", [math.inf, 1e300])
def test_clip_at_infinity_is_none(clip: str, threshold: float, dtype: str) -> None:
    assert state(*trained(ALL | {clip: threshold}, dtype)) == state(*trained(ALL, dtype))


@pytest.mark.parametrize("factor", [2.0**10, 2.0**-10])
@pytest.mark.parametrize("clip", CLIPS)
def test_loss_scale_of_a_power_of_two_changes_nothing(clip: str, factor: float, dtype: str) -> None:
    wide = "float64" if dtype == "float64" else "float32"  # float16 would overflow
    settings = ALL | CLIPS[clip]
    scaled = trained(
        settings | {"loss_scale_factor": factor * ALL["loss_scale_factor"]},
        dtype,
        gradient=lambda g: g.astype(wide) * np.asarray(factor, wide),
    )
    assert state(*scaled) == state(*trained(settings, dtype))


def test_first_average_is_the_variable(dtype: str) -> None:
    opt, params = trained(ALL, dtype, steps=1)
    for average, w in zip(opt.variables[2:], params, strict=False):
        np.testing.assert_array_equal(average, w)


def test_momentum_of_the_average_at_its_ends(dtype: str) -> None:
    """0: it is the variable. 1: it stays what it was first."""
    opt, params = trained(ALL | {"ema_momentum": 0}, dtype)
    for average, w in zip(opt.variables[2:], params, strict=False):
        np.testing.assert_array_equal(average, w)
    opt, _ = trained(ALL | {"ema_momentum": 1}, dtype)
    _, first = trained(ALL, dtype, steps=1)
    for average, w in zip(opt.variables[2:], first, strict=False):
        np.testing.assert_array_equal(average, w)


def test_second_step_compiles_nothing(
    settings: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does another optimizer with other numbers in its settings, on other shapes."""
    asked: list[str] = []
    compiled = jit.compiled

    def counted(build: Any, specialisation: str, *rest: Any, **more: Any) -> jit.Kernel:
        asked.append(specialisation)
        return compiled(build, specialisation, *rest, **more)

    monkeypatch.setattr(jit, "compiled", counted)
    for kernel in (cpu._kernel, ndarrays._kernel):
        kernel.cache_clear()
    w = np.ones((3, 5), dtype)
    opt = Adam(**settings)
    for step in range(2 * (settings.get("gradient_accumulation_steps") or 1)):
        opt.apply_gradients([(exact(w.shape, dtype, step), w)])
    first = len(asked)
    assert len(set(asked)) == first and (first > 0) == cpu.available()
    for step in range(4):
        opt.apply_gradients([(exact(w.shape, dtype, step), w)])
    other = settings | {"learning_rate": 0.5, "beta_1": 0.5, "epsilon": 1e-3}
    trained(other | {name: 9.0 for name in settings if name.startswith("clip")}, dtype)
    assert len(asked) == first


# --- Variables ------------------------------------------------------------------------------------


def test_order_of_variables_does_not_matter(settings: dict[str, Any], dtype: str) -> None:
    order = [3, 6, 0, 5, 2, 4, 1]
    opt, want = trained(settings, dtype)
    params = variables(dtype, shapes=SHAPES)
    permuted = Adam(**settings)
    permuted.build({f"variable_{i}" if i else "variable": params[i] for i in order})
    for step in range(STEPS):
        grads = all_exact(step, dtype)
        permuted.apply_gradients((grads[i], params[i]) for i in order)
    assert sorted(state(permuted, params)) == sorted(state(opt, want))
    for step in range(STEPS):  # and pairs in another order than they were built in
        grads = all_exact(step, dtype)
        permuted.apply_gradients((grads[i], params[i]) for i in order[::-1])
        opt.apply_gradients(zip(grads, want, strict=True))
    assert sorted(state(permuted, params)) == sorted(state(opt, want))


def test_elements_do_not_know_of_each_other(dtype: str) -> None:
    """Each piece, of any length, moves as the whole does: in vectors as in what is left of them."""
    settings = ALL | {"clipvalue": 0.5}
    (whole,), cuts = variables(dtype, shapes=[(700,)]), np.cumsum(range(1, 37))
    pieces = {f"piece_{i}": piece for i, piece in enumerate(np.split(whole.copy(), cuts))}
    opt, pieces_opt = Adam(**settings), Adam(**settings)
    opt.build({"whole": whole})
    pieces_opt.build(pieces)
    for step in range(STEPS):
        g = exact((700,), dtype, step)
        opt.apply([g])
        pieces_opt.apply(np.split(g, cuts))
    state, pieces_state = opt.named_variables(), pieces_opt.named_variables()
    state["whole_w"] = whole
    pieces_state |= {f"{name}_w": piece for name, piece in pieces.items()}
    for slot in ("w", "momentum", "velocity", "velocity_hat", "average"):
        found = np.concatenate([pieces_state[f"{name}_{slot}"] for name in pieces])
        assert found.tobytes() == state[f"whole_{slot}"].tobytes()


@pytest.mark.parametrize("missing", ["left out", "None"])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_variables_without_gradient_keep_their_value_while_their_average_moves(
    missing: str, dtype: str
) -> None:
    opt, params = trained(ALL | {"ema_overwrite_frequency": 99}, dtype)
    before = [w.copy() for w in params]
    slots = {name: value.copy() for name, value in opt.named_variables().items()}
    chosen = (1, 4)
    pairs = [
        (exact(w.shape, dtype, i) if i in chosen else None, w)
        for i, w in enumerate(params)
        if i in chosen or missing == "None"
    ]
    opt.apply_gradients(pairs)
    for i, (w, old) in enumerate(zip(params, before, strict=True)):
        name = f"variable_{i}" if i else "variable"
        assert (w.tobytes() == old.tobytes()) == (i not in chosen or not w.size)
        for slot in ("momentum", "velocity", "average"):
            held, was = opt.named_variables()[f"{name}_{slot}"], slots[f"{name}_{slot}"]
            moves = bool(w.size) and (slot == "average" or i in chosen)
            assert (held.tobytes() != was.tobytes()) == moves, (name, slot)


# --- Layouts --------------------------------------------------------------------------------------


def every_other(values: Array) -> Array:
    shape = tuple(2 * n for n in values.shape)
    view: Array = np.zeros(shape, values.dtype)[(*(slice(1, None, 2),) * values.ndim, ...)]
    view[...] = values
    return view


def axes_reversed(values: Array) -> Array:
    """The last axis first in memory, as `.T` and Fortran order have it."""
    return np.array(values, order="F")


def middle_first(values: Array) -> Array:
    """Dense, but in neither order."""
    axes = (1, 0, 2)[: values.ndim] if values.ndim > 1 else range(values.ndim)
    return np.array(values.transpose(axes)).transpose(axes)


def negative(values: Array) -> Array:
    reverse = (*(slice(None, None, -1),) * values.ndim, ...)
    return values[reverse].copy()[reverse]


def unaligned(values: Array) -> Array:
    memory = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(values.shape)
    memory[...] = values
    return memory


def column(values: Array) -> Array:
    """A field of a record."""
    records = np.zeros(values.shape, np.dtype([("tag", "u1"), ("value", values.dtype)]))
    records["value"] = values
    return records["value"]


def contiguous(values: Array) -> Array:
    return values


LAYOUTS = [every_other, axes_reversed, middle_first, negative, unaligned, column]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["variable", "gradient", "both", "each another"])
@pytest.mark.parametrize("name", ["plain", "all, global_clipnorm", "accumulated"])
def test_layout_changes_nothing(
    name: str, of: str, layout: Callable[[Array], Array], dtype: str
) -> None:
    forms: dict[str, Any] = {
        "variable": {"variable": layout},
        "gradient": {"gradient": layout},
        "both": {"variable": layout, "gradient": layout},
        "each another": {"variable": layout, "gradient": axes_reversed},
    }
    settings = SETTINGS[name]
    assert state(*trained(settings, dtype, **forms[of])) == state(*trained(settings, dtype))


ALIASES: dict[str, Callable[[Adam, list[Array]], Any]] = {
    "the variable": lambda opt, params: params[0],
    "the variable, reversed": lambda opt, params: params[0][::-1],
    "the variable, transposed": lambda opt, params: params[0].T,
    "a row of it for all rows": lambda opt, params: np.broadcast_to(params[0][2], (9, 9)),
    "another variable": lambda opt, params: params[1],
    "the momentum": lambda opt, params: opt.named_variables()["variable_momentum"],
    "another's average, reversed": lambda opt, params: opt.named_variables()["variable_1_average"][
        ::-1
    ],
    "the accumulator": lambda opt, params: opt.named_variables()["variable_gradient_accumulator"],
    "sparse": lambda opt, params: params[0][:4],
}


@pytest.mark.parametrize("name", ALIASES)
def test_gradient_in_memory_that_the_step_writes_to_is_its_copy(name: str, dtype: str) -> None:
    settings, shapes = SETTINGS["accumulated"], [(9, 9), (9, 9)]
    states = []
    for form in (np.copy, lambda g: g):
        params = variables(dtype, shapes=shapes)
        opt = Adam(**settings)
        opt.build(params)
        for step in range(3):
            first, second = all_exact(step, dtype, shapes)
            opt.apply([first, second])
            g = form(ALIASES[name](opt, params))
            sparse = IndexedSlices(g, [1, 0, 5, 1], shapes[0]) if name == "sparse" else None
            opt.apply([sparse or g, second])
        states.append(state(opt, params))
    assert states[0] == states[1]


@pytest.mark.parametrize("other", ["float64", "float32", "float16", ">f4", "longdouble", "int8"])
def test_gradient_of_another_type_is_its_cast(other: str, dtype: str) -> None:
    """To what the variable's step is computed in, which is float32 for float16."""
    arithmetic = "float64" if dtype == "float64" else "float32"
    settings = SETTINGS["all, clipnorm"]
    cast = trained(settings, dtype, gradient=lambda g: g.astype(other).astype(arithmetic))
    assert state(*trained(settings, dtype, gradient=lambda g: g.astype(other))) == state(*cast)


def test_gradient_that_needs_rounding_is_rounded_once() -> None:
    g = np.random.default_rng(0).normal(size=1000)
    states = []
    for given in (g, g.astype(np.float32)):
        w = np.zeros(1000, np.float32)
        opt = Adam()
        opt.apply_gradients([(given, w)])
        states.append(state(opt, [w]))
    assert states[0] == states[1]


# --- Sparse gradients -----------------------------------------------------------------------------

ROWS = 50
TABLES = [(ROWS,), (ROWS, 3), (ROWS, 200), (ROWS, 2, 5), (ROWS, 0)]
INDICES: dict[str, Callable[[np.random.Generator], Any]] = {
    "repeated and unsorted": lambda rng: rng.integers(3, ROWS // 2, ROWS),
    "one": lambda rng: [ROWS - 1],
    "first and last": lambda rng: [ROWS - 1, 0],
    "none": lambda rng: [],
    "all": lambda rng: rng.permutation(ROWS),
    "all the same": lambda rng: [7] * 9,
    "a run": lambda rng: np.arange(10, 20, dtype=np.uint8),
}


def sparse(
    shape: tuple[int, ...], indices: Any, dtype: str, step: int
) -> tuple[IndexedSlices, Array]:
    """A sparse gradient, and the dense one in a type that holds the sums."""
    indices = np.asarray(indices, getattr(indices, "dtype", np.int64))
    values = exact((len(indices), *shape[1:]), dtype, [step, *shape])
    wide = np.float64 if dtype == "float64" else np.float32
    dense = np.zeros(shape, wide)
    np.add.at(dense, indices, values.astype(wide))
    return IndexedSlices(values, indices, shape), dense


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, contiguous) for name in INDICES),
        *(("repeated and unsorted", layout) for layout in (every_other, axes_reversed, unaligned)),
    ],
)
def test_sparse_is_dense(
    name: str, layout: Callable[[Array], Array], settings: dict[str, Any], dtype: str
) -> None:
    rng = np.random.default_rng(0)
    tables = [layout(w) for w in variables(dtype, shapes=TABLES)]
    want = variables(dtype, shapes=TABLES)
    opt, want_opt = Adam(**settings), Adam(**settings)
    for step in range(STEPS):
        indices = INDICES[name](rng)
        given, dense = zip(*(sparse(s, indices, dtype, step) for s in TABLES), strict=True)
        for g, d in zip(given, dense, strict=True):
            np.testing.assert_array_equal(g.to_dense(), d)
        opt.apply_gradients(zip(given, tables, strict=True))
        want_opt.apply_gradients(zip(dense, want, strict=True))
    assert state(opt, tables) == state(want_opt, want)


def test_sparse_beside_dense(settings: dict[str, Any], dtype: str) -> None:
    """And rows longer than a chunk."""
    shapes = [(3, CHUNK + 5), (4, 3), (7,)]
    params, want = variables(dtype, shapes=shapes), variables(dtype, shapes=shapes)
    opt, want_opt = Adam(**settings), Adam(**settings)
    for step in range(STEPS):
        given, dense = sparse(shapes[0], [2, 0, 2], dtype, step)
        rest = all_exact(step, dtype, shapes[1:])
        opt.apply_gradients(zip([given, *rest], params, strict=True))
        want_opt.apply_gradients(zip([dense, *rest], want, strict=True))
    assert state(opt, params) == state(want_opt, want)


def test_sparse_sums_in_the_order_of_occurrence() -> None:
    """Where the order shows: as np.add.at on float32, also for float16 values."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 3, 1000)
    for dtype in ("float32", "float16"):
        values = rng.normal(size=1000).astype(dtype)
        want = np.zeros(3, np.float32)
        np.add.at(want, indices, values.astype(np.float32))
        np.testing.assert_array_equal(IndexedSlices(values, indices, (3,)).to_dense(), want)


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm"])
def test_norms_of_any_layout_agree_to_their_last_digits(name: str) -> None:
    """Sums of inexact squares are rounded in the order of memory: in double, the last digits."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(200, 300))
    rows = np.arange(0, 200, 3)
    masked = np.zeros_like(g)
    masked[rows] = g[rows]
    forms = [masked, axes_reversed(masked), every_other(masked)]
    results = []
    for form in (*forms, IndexedSlices(g[rows], rows, g.shape)):
        w = np.zeros_like(g)
        settings: dict[str, Any] = {name: 0.5, "epsilon": 1.0}
        Adam(**settings).apply_gradients([(form, w)])
        results.append(w)
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-14, atol=0)
