"""With OMNIADAM_FAST=0 every library is as right, and nothing of the folder `fast` is imported.

Each library makes its steps in a process of its own, which `python -m test_fast WAY` is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from cases import (
    BEYOND_KERAS,
    CASES,
    SMALL_SHAPES,
    Case,
    assert_close,
    gradients,
    variables,
    with_missing,
)
from omniadam import Adam, fast, schedules
from reference import Array, Reference

pytestmark = pytest.mark.slow

TABLE = CASES | BEYOND_KERAS
NAMES = (
    *("defaults", "schedule", "amsgrad", "excluded", "clipnorm", "clipvalue", "global_clipnorm"),
    *("ema_overwrite_frequency", "gradient_accumulation_steps", "callable_beta_1"),
    list(CASES)[-1],
)
STEPS = 7
SHAPES = (*SMALL_SHAPES, (20_003,))

# What makes a step of given gradients, and what reads the variables and then a slot by its name.
Step = Callable[[list[Any]], Any]
Read = Callable[[Any], Array]


def build(case: Case, params: Sequence[Any]) -> Adam:
    opt = Adam(**case.settings_for(schedules))
    opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
    opt.build({f"w{i}": p for i, p in enumerate(params)})
    return opt


def follow(
    case: Case, opt: Adam, params: Sequence[Any], read: Read, tensor: Callable[[Array], Any],
    step: Step, *, missing: bool = True,
) -> None:  # fmt: skip
    """Steps against the oracle, which is told of the same gradients."""
    reference = case.reference(variables(shapes=SHAPES))
    for i in range(STEPS):
        given: list[Array | None] = list(gradients(i, SHAPES))
        if missing:
            given = with_missing(i, given)  # type: ignore[arg-type]
        step([None if g is None else tensor(g) for g in given])
        reference.step(given)
    assert_close(list(map(read, params)), reference)
    state = opt.named_variables()
    for slot in reference.state.keys() - {"variable"}:
        held = [read(state[f"w{i}_{slot}"]) for i in range(len(params))]
        assert_close(held, reference, slot)


def numpy(case: Case) -> None:
    params = variables(shapes=SHAPES)
    opt = build(case, params)
    follow(case, opt, params, np.asarray, np.copy, lambda given: opt.apply(given, params))


def torch(case: Case) -> None:
    import torch

    params = list(map(torch.from_numpy, variables(shapes=SHAPES)))
    opt = build(case, params)
    step = lambda given: opt.apply(given, params)  # noqa: E731
    follow(case, opt, params, np.asarray, torch.from_numpy, step)


def torch_elsewhere(case: Case) -> None:
    from omniadam.backends import torch as backend

    backend._is_on_host = lambda variable: False  # type: ignore[assignment]
    torch(case)


def torch_optim(case: Case) -> None:
    import torch

    from omniadam.torch import AdamW

    same = {"amsgrad", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum"}
    settings = {k: v for k, v in case.settings.items() if k in same}
    start = variables(shapes=SHAPES)
    params = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in start]
    opt = AdamW(params, lr=0.01, eps=1e-3, weight_decay=0.1, **settings)
    wanted = {"learning_rate": 0.01, "epsilon": 1e-3, "weight_decay": 0.1, "epsilon_hat": False}
    reference = Reference(start, **wanted, **settings)  # type: ignore[arg-type]
    for i in range(STEPS):
        given = gradients(i, SHAPES)
        for p, g in zip(params, given, strict=True):
            p.grad = torch.from_numpy(g)
        opt.step()
        reference.step(given)
    assert_close([p.detach().numpy() for p in params], reference)


def jax(case: Case, compiled: bool = False) -> None:
    import jax
    import jax.numpy as jnp

    params = [jax.new_ref(jnp.asarray(value)) for value in variables(shapes=SHAPES)]
    opt = build(case, params)
    step = lambda given: opt.apply(given, params)  # noqa: E731
    step = jax.jit(step) if compiled else step
    follow(case, opt, params, lambda x: np.asarray(x[...]), jnp.asarray, step)


def jax_compiled(case: Case) -> None:
    jax(case, compiled=True)


def jax_stateless(case: Case) -> None:
    import jax.numpy as jnp

    params = [jnp.asarray(value) for value in variables(shapes=SHAPES)]
    opt = build(case, params)
    now = [params, opt.variables]

    def step(given: list[Any]) -> None:
        now[:] = opt.stateless_apply(now[1], given, now[0])
        opt.set_weights(now[1])
        params[:] = now[0]

    follow(case, opt, params, np.asarray, jnp.asarray, step, missing=False)


def tensorflow(case: Case, **compiled: Any) -> None:
    import tensorflow as tf

    params = [tf.Variable(value) for value in variables(shapes=SHAPES)]
    opt = build(case, params)
    step = lambda given: opt.apply(given, params)  # noqa: E731
    if compiled:
        step = tf.function(lambda given: (opt.apply(given, params), tf.constant(0))[1], **compiled)
    read, missing = lambda x: x.numpy(), not compiled
    follow(case, opt, params, read, tf.constant, step, missing=missing)


def tensorflow_function(case: Case) -> None:
    tensorflow(case, jit_compile=None)


def tensorflow_function_by_xla(case: Case) -> None:
    tensorflow(case, jit_compile=True)


ALL = {name: TABLE[name] for name in NAMES}
FEW = {name: TABLE[name] for name in ("defaults", "global_clipnorm", NAMES[-1])}
WAYS: dict[str, tuple[Callable[[Case], None], dict[str, Case], str]] = {
    "numpy": (numpy, ALL, "numpy"),
    "torch": (torch, ALL, "torch"),
    "torch_elsewhere": (torch_elsewhere, ALL, "torch"),
    "torch_optim": (torch_optim, ALL, "torch"),
    "jax": (jax, ALL, "jax"),
    "jax_compiled": (jax_compiled, FEW, "jax"),
    "jax_stateless": (jax_stateless, FEW, "jax"),
    "tensorflow": (tensorflow, ALL, "tensorflow"),
    "tensorflow_function": (tensorflow_function, FEW, "tensorflow"),
    "tensorflow_function_by_xla": (tensorflow_function_by_xla, FEW, "tensorflow"),
}


def main(ways: Iterable[str]) -> None:
    """Run these ways, and print what was imported of the folder."""
    import warnings

    warnings.filterwarnings("ignore", "Gradients do not exist")
    for way in ways:
        run, cases, _ = WAYS[way]
        for case in cases.values():
            run(case)
    print("imported", *sorted(m for m in sys.modules if m.startswith("omniadam.fast")))


def in_a_process(way: str, **environment: str) -> list[str]:
    paths = [str(Path(omniadam.__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-m", "test_fast", way],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.needs(needs)) for way, (_, _, needs) in WAYS.items()],
)
def test_without_the_folder(way: str) -> None:
    assert in_a_process(way, OMNIADAM_FAST="0") == ["omniadam.fast"]


def test_with_it() -> None:
    assert "omniadam.fast.numpy" in in_a_process("numpy", OMNIADAM_FAST="")


@pytest.mark.parametrize("value", ["no", "2"])
def test_of_the_switch_itself(value: str) -> None:
    with pytest.raises(AssertionError, match="OMNIADAM_FAST must be 0 or 1"):
        in_a_process("numpy", OMNIADAM_FAST=value)


# --- a step in whole or not at all ---


def interrupted(opt: Adam, params: list[Any], tensor: Any, read: Read) -> None:
    """Whenever an interrupt comes as values are stored, all are as they were."""
    given = [tensor(np.ones(3, np.float32)) for _ in params]
    opt.apply(given, params)
    before = [*map(read, params), *opt.get_weights()]
    backend: Any = opt._state.backend
    store, left = backend.store, [0]

    def interrupting(variable: Any, value: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return store(variable, value)

    backend.store = interrupting
    for left[0] in range(1, 8):  # two variables, two slots of each, and the count
        with pytest.raises(KeyboardInterrupt):
            opt.apply(given, params)
        for now, then in zip([*map(read, params), *opt.get_weights()], before, strict=True):
            np.testing.assert_array_equal(now, then)
    opt.apply(given, params)
    assert opt.iterations == 2


@pytest.mark.parametrize("library", ["jax", "tensorflow"])
def test_an_interrupt_without_it_loses_nothing(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = pytest.importorskip(library)
    monkeypatch.setattr(fast, "is_enabled", lambda: False)
    opt = Adam(0.1)
    if library == "jax":
        asarray, one = module.numpy.asarray, lambda: module.new_ref(module.numpy.ones(3))
        interrupted(opt, [one(), one()], asarray, lambda x: np.asarray(x[...]))
    else:
        params = [module.Variable(module.ones(3)) for _ in range(2)]
        interrupted(opt, params, module.constant, lambda x: x.numpy())


if __name__ == "__main__":
    main(sys.argv[1:])


def test_what_is_tried_is_tried_by_one_thread() -> None:
    """Two trials at once may disturb each other, and both find that it does not work."""
    calls: list[int] = []

    def trial() -> bool:
        calls.append(1)
        time.sleep(0.05)
        return True

    asked = fast.once(trial)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: asked(), range(4)))
    assert calls == [1]
    asked.cache_clear()
    assert asked() and calls == [1, 1]
