"""`epsilon_hat=False` of `omniadam.Adam`: the numbers of torch.optim, which is asked for them."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest

from cases import SMALL_SHAPES, STEPS, assert_close, gradients, variables
from older import LIBRARIES
from omniadam import Adam, AdamW, IndexedSlices, Table
from reference import Array, Reference

# Of torch.optim; gradients are made as small, so that where epsilon stands decides every step.
EPSILON = 1e-8
PEERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Adam": ({}, {}),
    "AdamW": ({"amsgrad": True, "weight_decay": 0.5}, {"amsgrad": True, "weight_decay": 0.5}),
}


def small(step: int) -> list[Array]:
    return [np.asarray(g * EPSILON, np.float32) for g in gradients(step, SMALL_SHAPES)]


@pytest.mark.needs("torch")
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_numbers_of_torch(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = LIBRARIES[library]
    for needed in of.needs:
        pytest.importorskip(needed)
    import torch

    if library == "tensorflow":  # XLA takes a second for each optimizer
        from omniadam.fast.tensorflow import FastTensorFlow

        monkeypatch.setattr(FastTensorFlow, "jit_compile", False)
    for name, (settings, theirs) in PEERS.items():
        start = variables(shapes=SMALL_SHAPES)
        kind = {"Adam": Adam, "AdamW": AdamW}[name]
        opt: Adam = kind(0.1, epsilon=EPSILON, epsilon_hat=False, **settings)
        params, peers = [of.variable(w) for w in start], [torch.tensor(w) for w in start]
        peer = getattr(torch.optim, name)(peers, lr=0.1, eps=EPSILON, **theirs)
        wanted: dict[str, Any] = {"learning_rate": 0.1, "epsilon": EPSILON, **settings}
        reference = Reference(start, **wanted, epsilon_hat=False)
        other = Reference(start, **wanted)
        for step in range(STEPS):
            given = small(step)
            for p, g in zip(peers, given, strict=True):
                p.grad = torch.from_numpy(g)
            peer.step()
            opt.apply([of.array(g) for g in given], params)
            reference.step(given)
            other.step(given)
        # Both within the tolerance, from which Keras's epsilon is far.
        assert_close([p.numpy() for p in peers], reference)
        assert_close([of.numpy(w) for w in params], reference)
        with pytest.raises(AssertionError, match="ulps"):
            assert_close([of.numpy(w) for w in params], other)


def test_it_is_in_a_config_where_keras_would_differ_and_kept_by_copies() -> None:
    for kind in (Adam, AdamW):
        assert "epsilon_hat" not in kind().get_config() and "epsilon_hat" not in repr(kind())
        config = kind(epsilon_hat=False).get_config()
        assert config == kind().get_config() | {"epsilon_hat": False}
        w, opt = np.ones(2, np.float32), kind.from_config(json.loads(json.dumps(config)))
        opt.apply([np.full(2, 1e-8, np.float32)], [w])
        assert repr(opt).endswith(", epsilon_hat=False)")
        ends = []
        for each in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt), opt):
            v = w.copy() if each is not opt else w
            each.apply([np.full(2, -1e-8, np.float32)], [v])
            assert each.epsilon_hat is False
            ends.append(v.tolist())
        assert ends[0] == ends[1] == ends[2]
    with pytest.raises(TypeError, match="positional argument"):
        Adam(*[None] * 15, False)  # type: ignore[misc, arg-type]


def test_rows_that_are_put_off() -> None:
    """Of a table: the bits of the dense step, whose epsilon is another at each step."""
    rows, start = 50, np.linspace(-1.0, 1.0, 200, dtype=np.float32).reshape(50, 4)
    table, dense = Table(start.copy()), start.copy()
    ours, plain = (Adam(0.1, epsilon=1e-4, epsilon_hat=False) for _ in range(2))
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(0, rows, 5)
        values = np.asarray(rng.normal(size=(5, 4)) * 1e-4, np.float32)
        ours.apply([IndexedSlices(values, ids, (rows, 4))], [table])
        plain.apply([IndexedSlices(values, ids, (rows, 4)).to_dense()], [dense])
    assert np.array_equal(np.asarray(table), dense)
