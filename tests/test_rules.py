"""Rules of one's own on every library: one, one and four slots; two, three, seven coefficients."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omniadam import Optimizer
from omniadam.backends.base import Group
from omniadam.rule import Pass, PassCoefficients, Rule

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("own_rule", ROOT / "examples" / "own_rule.py")
assert _spec is not None and _spec.loader is not None
own_rule: Any = importlib.util.module_from_spec(_spec)
sys.modules[own_rule.__name__] = own_rule  # where its source is looked for
_spec.loader.exec_module(own_rule)


def make_momentum(functions: Any) -> Any:
    def momentum(w: Any, g: Any, slots: Any, coefficients: Any) -> Any:
        learning_rate, keep = coefficients
        trace = keep * slots[0] + g
        return w - learning_rate * trace, (trace,)

    return momentum


class Momentum(Optimizer):
    """Two coefficients, and no settings but the rate."""

    rule = Rule(make_momentum, ("trace",), ("learning_rate", "keep"))

    def coefficients(self, functions: Any, learning_rate: Any, t: Any, *numbers: Any) -> Any:
        return learning_rate, 0.75


def make_adan(functions: Any) -> Any:
    sqrt, divide, where = functions.sqrt, functions.divide, functions.where

    def adan(w: Any, g: Any, slots: Any, coefficients: Any) -> Any:
        learning_rate, weight_1, weight_2, weight_3, keep_2, epsilon, is_first = coefficients
        m, v, n, former = slots
        change = g - where(is_first, g, former)
        m = m + (g - m) * weight_1
        v = v + (change - v) * weight_2
        ahead = g + keep_2 * change
        n = n + (ahead * ahead - n) * weight_3
        step = divide(m + keep_2 * v, sqrt(n) + epsilon)
        return w - learning_rate * step, (m, v, n, g)

    return adan


class Adan(Optimizer):
    """Four slots (https://arxiv.org/abs/2208.06677, without its bias correction)."""

    rule = Rule(
        make_adan,
        ("momentum", "difference", "square", "former"),
        ("learning_rate", "weight_1", "weight_2", "weight_3", "keep_2", "epsilon", "is_first"),
    )
    hyperparameters = ("beta_1", "beta_2", "beta_3", "epsilon")

    def __init__(self, learning_rate: Any = 0.01, **settings: Any) -> None:
        super().__init__(learning_rate, **settings)
        self.beta_1, self.beta_2, self.beta_3, self.epsilon = 0.98, 0.92, 0.99, 1e-3

    def numbers(self, functions: Any, *hyperparameters: Any) -> Any:
        beta_1, beta_2, beta_3, epsilon = hyperparameters
        return 1 - beta_1, 1 - beta_2, 1 - beta_3, beta_2, epsilon

    def coefficients(self, functions: Any, learning_rate: Any, t: Any, *numbers: Any) -> Any:
        return learning_rate, *numbers, functions.where(t <= 1, 1.0, 0.0)


# --- the same rules in float64, and everything around them ----------------------------------------


def momentum(w: Any, g: Any, slots: list[Any], rate: float, t: int) -> Any:
    slots[0] = 0.75 * slots[0] + g
    return w - rate * slots[0]


def lion(w: Any, g: Any, slots: list[Any], rate: float, t: int) -> Any:
    direction = np.sign(0.9 * slots[0] + 0.1 * g)
    slots[0] = 0.99 * slots[0] + 0.01 * g
    return w - rate * direction


def adan(w: Any, g: Any, slots: list[Any], rate: float, t: int) -> Any:
    change = g - (g if t == 1 else slots[3])
    slots[0] = 0.98 * slots[0] + 0.02 * g
    slots[1] = 0.92 * slots[1] + 0.08 * change
    slots[2] = 0.99 * slots[2] + 0.01 * (g + 0.92 * change) ** 2
    slots[3] = g
    return w - rate * (slots[0] + 0.92 * slots[1]) / (np.sqrt(slots[2]) + 1e-3)


KINDS: dict[str, tuple[Any, Any, int]] = {
    "momentum": (Momentum, momentum, 1),
    "lion": (own_rule.Lion, lion, 1),
    "adan": (Adan, adan, 4),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.5},
    "everything": {
        "weight_decay": 0.5,
        "global_clipnorm": 1.0,
        "use_ema": True,
        "ema_momentum": 0.5,
        "loss_scale_factor": 8.0,
        "gradient_accumulation_steps": 2,
    },
    "clipped": {"clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 2},
}
SHAPES, CALLS, RATE = ((3, 5), (7,)), 6, 0.01


def gradients(call: int) -> list[Any]:
    rng = np.random.default_rng(call)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def expected(kind: str, settings: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Variables, slots and averages after all calls, in float64, by the order of Keras's step."""
    _, rule, slots = KINDS[kind]
    variables: list[Any] = [np.ones(shape) for shape in SHAPES]
    state = [[np.zeros(shape) for _ in range(slots)] for shape in SHAPES]
    averages: list[Any] = [np.zeros(shape) for shape in SHAPES]
    n, updates = settings.get("gradient_accumulation_steps", 1), 0
    accumulated: list[Any] = [np.zeros(shape) for shape in SHAPES]
    for call in range(CALLS):
        found = [g.astype(float) / settings.get("loss_scale_factor", 1) for g in gradients(call)]
        accumulated = [a + g for a, g in zip(accumulated, found, strict=True)]
        is_step = (call + 1) % n == 0
        if is_step:
            applied = [a / n for a in accumulated]
            accumulated = [np.zeros(shape) for shape in SHAPES]
            norm = np.sqrt(sum((g**2).sum() for g in applied))
            for i, g in enumerate(applied):
                if "global_clipnorm" in settings:
                    g = g / max(norm / settings["global_clipnorm"], 1)
                if "clipnorm" in settings:
                    g = g / max(np.sqrt((g**2).sum()) / settings["clipnorm"], 1)
                variables[i] = variables[i] * (1 - settings.get("weight_decay", 0) * RATE)
                variables[i] = rule(variables[i], g, state[i], RATE, updates + 1)
        if "use_ema" in settings:
            keep = settings.get("ema_momentum", 0.99) if updates else 0.0
            averages = [keep * a + (1 - keep) * w for a, w in zip(averages, variables, strict=True)]
            every = settings.get("ema_overwrite_frequency")
            if every and (updates + 1) % every == 0:
                variables = [a.copy() for a in averages]
        updates += is_step
    return variables, [slot for each in state for slot in each], averages


def on(library: str) -> Any:
    """How variables and gradients of a library are made, and read."""
    if library.startswith("numpy"):
        return (lambda x: x.copy()), (lambda x: x), np.asarray
    if library.startswith("torch"):
        torch = pytest.importorskip("torch")
        return (lambda x: torch.tensor(x)), torch.tensor, lambda x: x.numpy()
    if library == "jax":
        jax = pytest.importorskip("jax")
        return (lambda x: jax.new_ref(jax.numpy.array(x))), jax.numpy.asarray, lambda x: x[...]
    tf = pytest.importorskip("tensorflow")
    return tf.Variable, tf.constant, lambda x: x.numpy()


LIBRARIES = ["numpy", "numpy without numba", "torch", "torch on a device", "jax", "tensorflow"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_of_ones_own(
    kind: str, settings: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "numpy without numba":
        monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    if library == "torch on a device":
        pytest.importorskip("torch")
        from omniadam.backends import torch as backend

        monkeypatch.setattr(backend, "_is_on_host", lambda variable: False)
    if library == "tensorflow" and settings != "decay":
        # XLA takes a second for each optimizer: it has each rule once.
        from omniadam.fast.tensorflow import FastTensorFlow

        monkeypatch.setattr(FastTensorFlow, "jit_compile", False)
    variable, gradient, read = on(library)
    opt = KINDS[kind][0](RATE, **SETTINGS[settings])
    params = [variable(np.ones(shape, np.float32)) for shape in SHAPES]
    half = copy.deepcopy(opt)
    for call in range(CALLS):
        if call == CALLS // 2:  # go on with a copy that was saved and restored
            weights = opt.get_weights()
            opt, half = half, opt
            opt.build(params)
            opt.set_weights(weights)
        opt.apply_gradients(zip(map(gradient, gradients(call)), params, strict=True))
    variables, slots, averages = expected(kind, SETTINGS[settings])
    names = KINDS[kind][0].rule.slots
    state = opt.named_variables()
    found = [v for name, v in state.items() if name.endswith(tuple(f"_{slot}" for slot in names))]
    averaged = [v for name, v in state.items() if name.endswith("_average")]
    assert len(found) == len(slots)
    by_variable = [slots[i * len(names) + k] for i, k in order(len(names))]
    for got, want in zip([*params, *found], [*variables, *by_variable], strict=True):
        np.testing.assert_allclose(read(got), want, rtol=2e-5, atol=2e-6)
    for got, want in zip(averaged, averages, strict=False):
        np.testing.assert_allclose(read(got), want, rtol=2e-5, atol=2e-6)
    assert bool(averaged) == ("use_ema" in SETTINGS[settings])


def order(slots: int) -> list[tuple[int, int]]:
    """Of each state variable the variable and the slot: by variable within the first two slots,
    and then within the rest, as Keras's files have them.
    """
    groups = [range(slots)[:2], range(slots)[2:]]
    return [(i, k) for group in groups for i in range(len(SHAPES)) for k in group]


@pytest.mark.parametrize("library", ["jax", "tensorflow"])
def test_stateless_and_traced(library: str) -> None:
    variables, _, _ = expected("adan", SETTINGS["everything"])
    opt = Adan(RATE, **SETTINGS["everything"])
    if library == "jax":
        jax = pytest.importorskip("jax")
        params = [jax.numpy.ones(shape) for shape in SHAPES]
        opt.build(params)
        state, step = opt.variables, jax.jit(opt.stateless_apply)
        for call in range(CALLS):
            params, state = step(state, gradients(call), params)
    else:
        tf: Any = pytest.importorskip("tensorflow")
        params = [tf.Variable(np.ones(shape, np.float32)) for shape in SHAPES]
        opt.build(params)

        @tf.function
        def train(grads: Any) -> Any:
            opt.apply_gradients(zip(grads, params, strict=True))

        for call in range(CALLS):
            train([tf.constant(g) for g in gradients(call)])
    for got, want in zip(params, variables, strict=True):
        np.testing.assert_allclose(np.asarray(got), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_pass_returns_what_it_measures(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each variable the squares of its gradient, and those of what the step changed."""
    if library == "numpy without numba":
        monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    if library == "torch on a device":
        pytest.importorskip("torch")
        from omniadam.backends import torch as backend_of_torch

        monkeypatch.setattr(backend_of_torch, "_is_on_host", lambda variable: False)
    variable, gradient, read = on(library)
    params = [variable(np.ones(shape, np.float32)) for shape in SHAPES]
    grads = list(map(gradient, gradients(0)))
    opt = Momentum(RATE)
    opt.apply_gradients(zip(grads, params, strict=True))
    before = [np.array(read(p), float) for p in params]
    backend, selection = opt._state.backend, opt._recent
    assert backend is not None and selection is not None
    kind = Pass(gradient=True, updates=True, measured=("gradient", "change"))
    group = Group(kind, Momentum.rule, selection, (RATE, 0.75), PassCoefficients())
    found = backend.sweep(group, backend.gather(selection, grads))()
    for row, g, p, was in zip(found, gradients(0), params, before, strict=True):
        change = np.array(read(p), float) - was
        wanted = (g.astype(float) ** 2).sum(), (change**2).sum()
        np.testing.assert_allclose([float(each) for each in row], wanted, rtol=1e-5)
        assert (change != 0).all()


def test_settings_can_change_and_be_saved() -> None:
    """And what is equal is prepared once, though the rule is an object made anew each time."""

    class Anew(own_rule.Lion):  # type: ignore[misc, name-defined]
        rule = property(lambda self: Rule(*own_rule.Lion.rule))

    w, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = Anew(0.5, beta_2=0.75)
    for _ in range(5):
        opt.apply_gradients([(g, w)])
    assert w.tolist() == [-1.5] * 3
    plans = opt._recent.prepared.plans
    kept = len(plans)
    opt.beta_2 = 0.5
    before = float(opt.named_variables()["variable_momentum"][0])
    opt.apply_gradients([(g, w)])
    assert opt.named_variables()["variable_momentum"][0] == np.float32((before + 1) / 2)
    for _ in range(5):
        opt.apply_gradients([(g, w)])
    assert len(plans) == kept
    config = opt.get_config()
    assert config["beta_1"] == 0.9 and config["beta_2"] == 0.5
    again = Anew.from_config(config)
    assert again.beta_2 == 0.5 and again.name == "lion"


def test_a_callable_setting_is_read_at_each_step() -> None:
    w, g, betas = np.zeros(1), np.ones(1), iter([0.5, 0.25])
    opt = own_rule.Lion(0.5, beta_2=lambda: next(betas))
    opt.build([w])
    for wanted in (0.5, 0.875):
        opt.apply_gradients([(g, w)])
        assert opt.named_variables()["variable_momentum"].tolist() == [wanted]


@pytest.mark.parametrize("library", LIBRARIES[::2])
def test_too_few_coefficients_change_nothing(library: str) -> None:
    class Wrong(Momentum):
        def coefficients(self, functions: Any, learning_rate: Any, t: Any, *numbers: Any) -> Any:
            return (learning_rate,)

    variable, gradient, read = on(library)
    w = variable(np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"coefficients \('learning_rate', 'keep'\). Received 1"):
        Wrong(0.5).apply_gradients([(gradient(np.ones(2, np.float32)), w)])
    assert np.asarray(read(w)).tolist() == [1, 1]


def test_an_update_step_of_a_rule_is_one_step() -> None:
    w = np.zeros(2)
    opt = Momentum(0.5, weight_decay=0.5)
    opt.build([w])
    opt.update_step(np.array([1.0, 2.0]), w, 0.25)
    assert w.tolist() == [-0.25, -0.5] and opt.iterations == 0


def test_the_page_shows_the_example() -> None:
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    text = (ROOT / "examples" / "own_rule.py").read_text(encoding="utf-8")
    assert block.strip() in text
