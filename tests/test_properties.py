"""Whatever the shapes, strides, types and settings: the oracle's numbers."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

import omniadam
from cases import CASES, Case, assert_close
from omniadam import Adam, IndexedSlices
from reference import Array

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=bool(os.environ.get("CI")))

# Each has kernels of its own, compiled when the first example draws it.
NAMES = (
    "defaults",
    "amsgrad",
    "excluded",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "ema_overwrite_frequency",
    "gradient_accumulation_steps",
    [*CASES][-1],  # everything at once
)
SHAPES = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
EXTREMES = st.sampled_from([1e-3, 1.0, 1e3])


@st.composite
def laid_out(draw: Any, shape: tuple[int, ...]) -> Any:
    """A function that gives an array of this shape another place in memory."""
    axes = draw(st.permutations(range(len(shape))))
    steps = draw(
        st.lists(st.sampled_from([1, 1, 2, 3, -1, -2]), min_size=len(shape), max_size=len(shape))
    )
    margin = draw(st.integers(0, 2))

    def place(values: Array) -> Array:
        sides = [abs(step) * n + margin for step, n in zip(steps, shape, strict=True)]
        base = np.zeros([sides[axis] for axis in axes], values.dtype)
        back = np.argsort(axes) if axes else []
        slices = [
            slice(margin, margin + step * n, step) if step > 0 else slice(None, None, step)
            for step, n in zip(steps, shape, strict=True)
        ]
        view = base.transpose(back)[(*slices, ...)]
        view = view[(*(slice(n) for n in shape), ...)]
        view[...] = values
        assert view.base is not None or not view.ndim
        return view

    return place


def checked(opt: Adam, params: list[Array], reference: Any, dtype: str) -> None:
    assert_close(params, reference, "variable", dtype)
    state = opt.named_variables()
    for slot in set(reference.state) - {"variable"}:
        assert_close([state[f"w{i}_{slot}"] for i in range(len(params))], reference, slot, dtype)


def built(case: Case, params: list[Array]) -> Adam:
    opt = Adam(**case.settings_for(omniadam.schedules))
    opt.exclude_from_weight_decay(var_list=[w for i, w in enumerate(params) if i in case.excluded])
    opt.build({f"w{i}": w for i, w in enumerate(params)})
    return opt


def random(seed: int, shape: tuple[int, ...], dtype: str, size: float) -> Array:
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * size, dtype)


@pytest.mark.parametrize("kernel_name", ["numba", "numpy"])
@EXAMPLES
@given(data=st.data())
def test_any_layout_in_any_setting(kernel_name: str, data: Any) -> None:
    case = CASES[data.draw(st.sampled_from(NAMES))]
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    size = data.draw(EXTREMES)
    params: list[Array] = []
    places = []
    for i, shape in enumerate(data.draw(st.lists(SHAPES, min_size=1, max_size=4))):
        params.append(data.draw(laid_out(shape))(random(i, shape, dtype, 1.0)))
        places.append(data.draw(laid_out(shape)))
    with mock.patch.dict(os.environ, OMNIADAM_KERNEL=kernel_name):
        opt, reference = built(case, params), case.reference(params)
        for step in range(4):
            grads = [
                place(random(10 * step + i, w.shape, dtype, size))
                for i, (place, w) in enumerate(zip(places, params, strict=True))
            ]
            kept = [g.copy() for g in grads]
            missing = data.draw(st.integers(0, 2 * len(params)), "missing")
            pairs = [
                (g, w) for i, (g, w) in enumerate(zip(grads, params, strict=True)) if i != missing
            ]
            if not pairs:
                continue
            opt.apply_gradients(pairs)
            reference.step([None if i == missing else g for i, g in enumerate(grads)])
            for g, before in zip(grads, kept, strict=True):
                np.testing.assert_array_equal(g, before)
            checked(opt, params, reference, dtype)
            reference.resync(params)


@pytest.mark.parametrize("kernel_name", ["numba", "numpy"])
@EXAMPLES
@given(data=st.data())
def test_any_types_of_variables_and_gradients(kernel_name: str, data: Any) -> None:
    types = st.lists(
        st.tuples(
            st.sampled_from(["float32", "float64", "float16"]),
            st.sampled_from(["float32", "float64", "float16", ">f8", "longdouble", "int16"]),
        ),
        min_size=1,
        max_size=3,
    )
    pairs = data.draw(types)
    shapes = [data.draw(SHAPES) for _ in pairs]
    case = CASES["defaults"]
    params = [
        random(i, shape, own, 1.0)
        for i, (shape, (own, _)) in enumerate(zip(shapes, pairs, strict=True))
    ]
    with mock.patch.dict(os.environ, OMNIADAM_KERNEL=kernel_name):
        opt = built(case, params)
        references = [case.reference([w]) for w in params]
        for step in range(3):
            grads = [
                random(10 * step + i, w.shape, other, 4.0)
                for i, (w, (_, other)) in enumerate(zip(params, pairs, strict=True))
            ]
            opt.apply_gradients(zip(grads, params, strict=True))
            for g, w, reference, (own, _) in zip(grads, params, references, pairs, strict=True):
                # The rounding of a gradient to the type that is computed in is not an error.
                reference.step([g.astype("float64" if own == "float64" else "float32")])
                assert_close([w], reference, "variable", own)
                reference.resync([w])


@pytest.mark.parametrize("kernel_name", ["numba", "numpy"])
@EXAMPLES
@given(data=st.data())
def test_any_sparse_gradient_in_any_setting(kernel_name: str, data: Any) -> None:
    case = CASES[data.draw(st.sampled_from(NAMES))]
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    shape = data.draw(array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=7))
    place = data.draw(st.one_of(st.just(lambda w: w), laid_out(shape)))
    params = [place(random(0, shape, dtype, 1.0)), random(1, (5,), dtype, 1.0)]
    with mock.patch.dict(os.environ, OMNIADAM_KERNEL=kernel_name):
        opt, reference = built(case, params), case.reference(params)
        for step in range(4):
            indices = np.array(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=9)), int)
            values = random(step, (len(indices), *shape[1:]), dtype, 1.0)
            beside = random(step, (5,), dtype, 1.0)
            g = IndexedSlices(values, indices, shape)
            opt.apply_gradients([(g, params[0]), (beside, params[1])])
            reference.step([(indices, values), beside])
            checked(opt, params, reference, dtype)
            reference.resync(params)
