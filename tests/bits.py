"""Digests of variables and state after some steps, by library, setting and dtype.

    python tests/bits.py [LIBRARY ...] > digests.txt

A refactoring leaves them as they are: run it with the sources of both commits, on one machine
(`PYTHONPATH=../before/src python tests/bits.py > before.txt`), and compare the two files. It uses
public names only.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cases import CASES, SMALL_SHAPES, Case, gradients, variables
from omniadam import Adam, schedules

SHAPES = (*SMALL_SHAPES, (9001,))
STEPS = 4
# Every setting alone, and the rows that have many.
NAMES = [name for name in CASES if name.count("+") != 1]
DTYPES = ("float32", "float64", "float16", "bfloat16")
Arrays = list[Any]


def digest(arrays: Arrays) -> str:
    whole = hashlib.sha256()
    for each in arrays:
        whole.update(np.ascontiguousarray(each).tobytes())
    return whole.hexdigest()[:16]


def optimizer(case: Case, params: Arrays) -> Adam:
    opt = Adam(**case.settings_for(schedules))
    if case.excluded:
        opt.exclude_from_weight_decay([params[i] for i in case.excluded])
    opt.build(params)
    return opt


def steps(case: Case, dtype: str, variable: Callable[[Any], Any], tensor: Callable[[Any], Any],
          read: Callable[[Any], Any]) -> str:  # fmt: skip
    params = [variable(value) for value in variables(dtype, shapes=SHAPES)]
    opt = optimizer(case, params)
    for step in range(STEPS):
        given = [tensor(g) for g in gradients(step, SHAPES, dtype=dtype)]
        opt.apply_gradients(zip(given, params, strict=True))
    return digest([*map(read, params), *opt.get_weights()])


def on_numpy(case: Case, dtype: str) -> str:
    return steps(case, dtype, lambda x: x, lambda x: x, lambda x: x)


def on_torch(case: Case, dtype: str) -> str:
    import torch

    def tensor(value: Any) -> Any:
        return torch.tensor(np.asarray(value, np.float64)).to(getattr(torch, dtype))

    return steps(case, dtype, tensor, tensor, lambda x: x.double().numpy())


def on_jax(case: Case, dtype: str) -> str:
    import jax
    import jax.numpy as jnp

    def read(ref: Any) -> Any:
        return np.asarray(ref[...], np.float64)

    return steps(case, dtype, lambda x: jax.new_ref(jnp.array(x)), jnp.array, read)


def on_jax_stateless(case: Case, dtype: str) -> str:
    import jax.numpy as jnp

    params = [jnp.array(value) for value in variables(dtype, shapes=SHAPES)]
    opt = optimizer(case, params)
    state = opt.variables
    for step in range(STEPS):
        given = list(map(jnp.array, gradients(step, SHAPES, dtype=dtype)))
        params, state = opt.stateless_apply(state, given, params)
    return digest([np.asarray(x, np.float64) for x in (*params, *state)])


def on_tensorflow(case: Case, dtype: str) -> str:
    import tensorflow as tf

    def read(variable: Any) -> Any:
        return tf.cast(variable, tf.float64).numpy()

    return steps(case, dtype, lambda x: tf.Variable(x), tf.constant, read)


def of_torch_drop_in(case: Case, dtype: str) -> str:
    import torch

    from omniadam.torch import Adam as TorchAdam

    renamed = {"learning_rate": "lr", "epsilon": "eps", "weight_decay": "weight_decay"}
    taken = {"clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum", "amsgrad"}
    given = case.settings
    settings = {renamed.get(k, k): v for k, v in given.items() if k in taken or k in renamed}
    if callable(settings.get("lr")):
        settings["lr"] = 0.01
    settings["betas"] = given.get("beta_1", 0.9), given.get("beta_2", 0.999)
    params = [
        torch.tensor(np.asarray(value, np.float64)).to(getattr(torch, dtype))
        for value in variables(dtype, shapes=SHAPES)
    ]
    opt = TorchAdam(params, decoupled_weight_decay=True, **settings)
    for step in range(STEPS):
        for p, g in zip(params, gradients(step, SHAPES, dtype=dtype), strict=True):
            p.grad = torch.tensor(np.asarray(g, np.float64)).to(p.dtype)
        opt.step()
    state = [v for p in params for v in opt.state[p].values()]
    return digest([x.double().numpy() for x in (*params, *state)])


def of_optax(case: Case, dtype: str) -> str:
    import jax.numpy as jnp
    import optax

    from omniadam.optax import adamw

    given = case.settings
    settings = {"b1": given.get("beta_1", 0.9), "b2": given.get("beta_2", 0.999)}
    solver = adamw(0.01, **settings, weight_decay=given.get("weight_decay", 0.0))
    params = [jnp.array(value) for value in variables(dtype, shapes=SHAPES)]
    state = solver.init(params)
    for step in range(STEPS):
        given_gradients = list(map(jnp.array, gradients(step, SHAPES, dtype=dtype)))
        updates, state = solver.update(given_gradients, state, params)
        params = optax.apply_updates(params, updates)
    return digest([np.asarray(x, np.float64) for x in (*params, *state[0].mu, *state[0].nu)])


def of_compat(case: Case, dtype: str) -> str:
    from omniadam.compat.optimizer_v2 import Adam as Older

    taken = {"learning_rate", "beta_1", "beta_2", "epsilon", "amsgrad", "clipnorm", "clipvalue"}
    settings = {k: v for k, v in case.settings.items() if k in taken and not callable(v)}
    params = variables(dtype, shapes=SHAPES)
    opt = Older(**settings)
    for step in range(STEPS):
        given = gradients(step, SHAPES, dtype=dtype)
        opt.apply_gradients(zip(given, params, strict=True))
    return digest([*params, *opt.get_weights()])


LIBRARIES: dict[str, tuple[Callable[[Case, str], str], tuple[str, ...]]] = {
    "numpy": (on_numpy, DTYPES),
    "torch": (on_torch, DTYPES),
    "jax": (on_jax, ("float32", "float16", "bfloat16")),
    "jax-stateless": (on_jax_stateless, ("float32", "bfloat16")),
    "tensorflow": (on_tensorflow, DTYPES),
    "omniadam.torch": (of_torch_drop_in, DTYPES),
    "omniadam.optax": (of_optax, ("float32", "bfloat16")),
    "compat": (of_compat, ("float32", "float64", "float16")),
}


def digests(libraries: list[str]) -> Iterator[str]:
    for library in libraries:
        run, dtypes = LIBRARIES[library]
        for name in NAMES:
            for dtype in dtypes:
                yield f"{library} {name} {dtype} {run(CASES[name], dtype)}"


if __name__ == "__main__":
    for line in digests(sys.argv[1:] or list(LIBRARIES)):
        print(line, flush=True)
