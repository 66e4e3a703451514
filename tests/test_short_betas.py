"""A beta below one half: of a far larger old value its share is left, not its rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from cases import assert_close
from omniadam import Adam
from omniadam.kernels import jit
from reference import Array, Reference

# In float32 each gradient's square is lost beside the one before it.
GRADIENTS = [np.array(g, np.float32) for g in ([30, -3e3], [3e-3, 0.2], [1e-5, 1e-4], [2, -1])]
BETAS = {"beta_1": (0.9, 0.2, 0.0, 0.6), "beta_2": (0.999, 0.999, 0.1, 0.0, 0.5)}


def trained(make: Callable[[Array], Any], gradient: Callable[[Array], Any], opt: Adam) -> Any:
    variable = make(np.array([1.0, -2.0], np.float32))
    for g in GRADIENTS * 3:
        opt.apply_gradients([(gradient(g), variable)])
    return variable


def on_numpy(opt: Adam) -> Array:
    result: Array = trained(np.array, np.array, opt)
    return result


def on_torch(opt: Adam) -> Array:
    torch = pytest.importorskip("torch")
    return np.asarray(trained(torch.tensor, torch.tensor, opt).numpy())


def on_jax(opt: Adam) -> Array:
    jax = pytest.importorskip("jax")
    return np.array(trained(jax.new_ref, jax.numpy.asarray, opt)[...])


def on_tensorflow(opt: Adam) -> Array:
    tf = pytest.importorskip("tensorflow")
    return np.asarray(trained(tf.Variable, tf.constant, opt).numpy())


LIBRARIES = [on_numpy, on_torch, on_jax, on_tensorflow]


def in_turn(values: tuple[float, ...]) -> Callable[[], float]:
    turn: Iterator[float] = cycle(values)
    return lambda: next(turn)


@pytest.mark.parametrize("run", LIBRARIES)
def test_a_callable_may_cross_one_half(run: Callable[[Adam], Array]) -> None:
    ours = Adam(0.1, **{name: in_turn(values) for name, values in BETAS.items()})
    oracle = Reference(
        [[1.0, -2.0]],
        learning_rate=0.1,
        **{name: in_turn(values) for name, values in BETAS.items()},
    )
    for g in GRADIENTS * 3:
        oracle.step([g])
    assert_close([run(ours)], oracle)


@pytest.mark.parametrize("run", LIBRARIES)
def test_a_gradient_is_not_lost_beside_a_large_one(run: Callable[[Adam], Array]) -> None:
    """Without memory a step is the rate, whatever the gradient's size."""
    w = run(Adam(0.125, beta_1=0.0, beta_2=0.0, epsilon=0.0))
    signs = np.sign(GRADIENTS).sum(axis=0) * 3
    np.testing.assert_array_equal(w, [1.0, -2.0] - 0.125 * signs)


def test_each_side_of_one_half_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    original = jit.compiled
    monkeypatch.setattr(jit, "compiled", lambda *a, **k: compiled.append(a) or original(*a, **k))
    w, opt = (
        np.ones(3, np.float16),
        Adam(beta_1=in_turn((0.9, 0.1)), beta_2=in_turn((0.9,) * 2 + (0.1,) * 2)),
    )
    for _ in range(12):
        opt.apply_gradients([(np.ones(3, np.float16), w)])
    assert len(compiled) <= 4
