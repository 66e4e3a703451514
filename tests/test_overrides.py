"""Subclasses that override what their original calls: it is called here too, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from omniadam import Adam, AdamW, Optimizer, migrate
from omniadam.compat import contrib_keras, optimizer_v2

W, G = np.array([1.0, -2.0]), np.array([0.5, 0.25])


def subclass(base: type, name: str, value: Any = lambda self, *arguments: None) -> Any:
    return type("Mine", (base,), {name: value})


@pytest.mark.parametrize(
    "name",
    [
        "_resource_apply_dense",
        "_resource_apply_sparse",
        "_get_hyper",
        "_set_hyper",
        "_prepare",
        "_prepare_local",
        "_create_slots",
        "_decayed_lr",
        "_compute_gradients",
        "add_slot",
        "_transform_gradients",
        "_aggregate_gradients",
        "_create_hypers",
    ],
)
@pytest.mark.parametrize("form", ["subclass", "its subclass", "mixin"])
def test_hooks_of_tensorflow_2_0_are_refused(name: str, form: str) -> None:
    kind = subclass(optimizer_v2.Adam, name)
    if form == "its subclass":
        kind = type("Further", (kind,), {})
    elif form == "mixin":
        kind = type("Mixed", (subclass(object, name), optimizer_v2.Adam), {})
    with pytest.raises(TypeError, match=f"Mine overrides `{name}`.*apply_gradients"):
        kind(0.1)


@pytest.mark.parametrize(
    "name",
    [
        "_backend_apply_gradients",
        "_backend_update_step",
        "_clip_gradients",
        "_apply_weight_decay",
        "_get_current_learning_rate",
        "learning_rate",
        "iterations",
    ],
)
@pytest.mark.parametrize("kind", [Adam, AdamW, Optimizer])
def test_hooks_of_keras_3_are_refused(name: str, kind: type) -> None:
    with pytest.raises(TypeError, match=f"Mine overrides `{name}`.*update_step"):
        subclass(kind, name)(learning_rate=0.1)


def test_an_override_of_apply_sees_every_step() -> None:
    class Doubled(Adam):
        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            super().apply([2 * g for g in grads], trainable_variables)

    for step in (
        lambda opt, w: opt.apply([G], [w]),
        lambda opt, w: opt.apply_gradients([(G, w)]),
        lambda opt, w: opt.minimize(lambda w: (G * w).sum(), [w]),
    ):
        ours, theirs, opt, other = W.copy(), W.copy(), Doubled(0.1), Adam(0.1)
        for _ in range(2):
            step(opt, ours)
            other.apply([2 * G], [theirs])
        np.testing.assert_allclose(opt.get_weights()[2], other.get_weights()[2], rtol=1e-12)
        assert opt.iterations == 2


@pytest.mark.parametrize("kind", [optimizer_v2.Adam, contrib_keras.Adam])
def test_public_methods_of_the_older_generations_are_called(kind: Any) -> None:
    class Doubled(kind):  # type: ignore[misc]
        def get_gradients(self, loss: Any, params: Any) -> Any:
            return [2 * g for g in super().get_gradients(loss, params)]

    def steps(opt: Any, factor: float) -> Any:
        w = W.copy()

        def loss(w: Any) -> Any:
            return factor * (G * w).sum()

        is_newer = kind is optimizer_v2.Adam
        (update,) = opt.get_updates(loss, [w]) if is_newer else opt.get_updates([w], {}, loss)
        for _ in range(3):
            update()
        return [w, *opt.get_weights()]

    for one, two in zip(steps(Doubled(), 1.0), steps(kind(), 2.0), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_what_get_gradients_of_ones_own_returns_is_not_clipped_again() -> None:
    class Doubled(contrib_keras.Adam):
        def get_gradients(self, loss: Any, params: Any) -> Any:
            return [2 * g for g in super().get_gradients(loss, params)]

    def loss(w: Any) -> Any:
        return 8 * (G * w).sum()

    w, opt = W.copy(), Doubled(clipnorm=1.0)
    (update,) = opt.get_updates([w], {}, loss)
    update()
    clipped = G / np.sqrt((G * G).sum())
    np.testing.assert_allclose(opt.get_gradients(loss, [w])[0], 2 * clipped, rtol=1e-12)
    np.testing.assert_allclose(opt.get_weights()[1], 0.1 * 2 * clipped, rtol=1e-12)
    assert opt.get_config()["clipnorm"] == 1.0
    with pytest.raises(ValueError, match="get_gradients"):
        migrate(opt)


def test_what_nobody_would_call_may_be_overridden() -> None:
    class Mine(optimizer_v2.Adam):
        def apply_gradients(self, grads_and_vars: Any, name: Any = None) -> Any:
            return super().apply_gradients([(2 * g, w) for g, w in grads_and_vars], name)

    w = W.copy()
    Mine(0.1).apply_gradients([(G, w)])
    np.testing.assert_allclose(w, W - 0.1, rtol=1e-6)
