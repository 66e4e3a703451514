"""One peer beside omniadam in one process: interleaved steps, medians, as JSON on stdout.

    python benchmarks/pair.py PEER SET MODE

PEER is one of PEERS, SET one of sets.SETS, MODE is plain or full. Run by run.py, which sets the
threads and Keras's backend for the process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sets import SETS, arrays, size

import omniadam
from omniadam.kernels import cpu
from omniadam.rule import Pass, RuleKey

Step = Callable[[], Any]
OURS = {"plain": {}, "full": {"global_clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True}}
SECONDS = 2.0


def ours_numpy(w: list[Any], g: list[Any], mode: str) -> Step:
    opt = omniadam.Adam(**OURS[mode])
    return lambda: opt.apply_gradients(zip(g, w, strict=True))


def ours_torch(w: list[Any], g: list[Any], mode: str) -> Step:
    import torch

    params = [torch.from_numpy(x).requires_grad_() for x in w]
    grads = [torch.from_numpy(x) for x in g]
    return ours_numpy(params, grads, mode)


def ours_jax(w: list[Any], g: list[Any], mode: str) -> Step:
    import jax
    import jax.numpy as jnp

    refs = [jax.new_ref(jnp.asarray(x)) for x in w]
    opt, grads = omniadam.Adam(**OURS[mode]), [jnp.asarray(x) for x in g]

    def step() -> None:
        opt.apply_gradients(zip(grads, refs, strict=True))
        jax.block_until_ready([ref[...] for ref in refs[-1:]])

    return step


def ours_jax_stateless(w: list[Any], g: list[Any], mode: str) -> Step:
    import jax
    import jax.numpy as jnp

    params, grads = [jnp.asarray(x) for x in w], [jnp.asarray(x) for x in g]
    opt = omniadam.Adam(**OURS[mode])
    opt.build(params)
    held = [params, opt.variables]

    @jax.jit(donate_argnums=(0, 2))
    def apply(state: Any, grads: Any, params: Any) -> Any:
        return opt.stateless_apply(state, grads, params)

    def step() -> None:
        held[0], held[1] = apply(held[1], grads, held[0])
        jax.block_until_ready(held[0])

    return step


def ours_tensorflow(w: list[Any], g: list[Any], mode: str) -> Step:
    import tensorflow as tf

    return ours_numpy([tf.Variable(x) for x in w], [tf.constant(x) for x in g], mode)


def plain_numpy(w: list[Any], g: list[Any], mode: str) -> Step:
    """What one writes by hand, in place, one array at a time."""
    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    average, t = [x.copy() for x in w], 0

    def step() -> None:
        nonlocal t
        t += 1
        alpha = 1e-3 * float(np.sqrt(1 - 0.999**t)) / (1 - 0.9**t)
        factor = 1.0
        if mode == "full":
            norm = float(np.sqrt(sum(float(np.vdot(x, x)) for x in g)))
            factor = 1.0 / max(norm, 1.0)
        for i, x in enumerate(w):
            gradient = g[i] * factor if mode == "full" else g[i]
            if mode == "full":
                x -= x * (0.01 * 1e-3)
            m[i] += (gradient - m[i]) * 0.1
            v[i] += (gradient * gradient - v[i]) * 0.001
            x -= alpha * m[i] / (np.sqrt(v[i]) + 1e-7)
            if mode == "full":
                average[i] += (x - average[i]) * 0.01

    return step


def torch_step(kind: str) -> Callable[..., Step]:
    def make(w: list[Any], g: list[Any], mode: str) -> Step:
        import torch

        params = [torch.from_numpy(x).requires_grad_() for x in w]
        for p, x in zip(params, g, strict=True):
            p.grad = torch.from_numpy(x)
        if mode == "plain":
            return torch.optim.Adam(params, 1e-3, **{kind: True}).step
        opt = torch.optim.AdamW(params, 1e-3, weight_decay=0.01, **{kind: True})
        values = [p.detach() for p in params]
        averages = [x.clone() for x in values]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            torch._foreach_lerp_(averages, values, 0.01)

        return step

    return make


def optax_step(w: list[Any], g: list[Any], mode: str) -> Step:
    import jax
    import jax.numpy as jnp
    import optax

    adam = optax.adam(1e-3)
    if mode == "full":
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.01))
    params, grads = [jnp.asarray(x) for x in w], [jnp.asarray(x) for x in g]
    held = [params, adam.init(params), [x + 0 for x in params] if mode == "full" else []]

    @jax.jit(donate_argnums=(0, 1, 2))
    def apply(params: Any, state: Any, averages: Any, grads: Any) -> Any:
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        averages = [0.99 * a + 0.01 * p for a, p in zip(averages, params, strict=False)]
        return params, state, averages

    def step() -> None:
        held[:] = apply(*held, grads)
        jax.block_until_ready(held[0])

    return step


def keras_step(w: list[Any], g: list[Any], mode: str) -> Step:
    import keras

    variables = [keras.Variable(x) for x in w]
    opt = keras.optimizers.Adam(**OURS[mode])
    opt.build(variables)
    backend = keras.backend.backend()
    grads = [keras.ops.convert_to_tensor(x) for x in g]
    if backend == "torch":
        return lambda: opt.apply(grads, variables)
    if backend == "jax":
        import jax

        held = [[v.value for v in variables], [v.value for v in opt.variables]]

        @jax.jit(donate_argnums=(0, 1))
        def apply(params: Any, state: Any, grads: Any) -> Any:
            return opt.stateless_apply(state, grads, params)

        def step() -> None:
            held[:] = apply(*held, grads)
            jax.block_until_ready(held[0])

        return step
    import tensorflow as tf

    def better() -> Step:
        """With XLA or without, whichever is faster here."""
        ways = []
        for jit_compile in (False, True):
            apply = tf.function(lambda: opt.apply(grads, variables), jit_compile=jit_compile)
            apply()
            ways.append((min(timed(apply) for _ in range(5)), apply))
        return min(ways, key=lambda way: way[0])[1]

    return better()


def make_stream(sqrt: Any, maximum: Any) -> Any:
    """Adam's traffic without Adam's arithmetic: reads g, reads and writes w, m and v."""
    return lambda w, g, slots, c: (w + g, (slots[0] + g, slots[1] + g))


def streaming(w: list[Any], g: list[Any], mode: str) -> Step:
    from array import array

    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    rows = [[a.ctypes.data for a in each] + [0, 0] for each in zip(w, m, v, strict=True)]
    rule = RuleKey(make_stream, ("m", "v"))
    kind = Pass(gradient=True, updates=True)
    sweep = cpu.Sweep(kind, rule, "float32", "float32", rows, [x.size for x in w])
    addresses = array("q", [x.ctypes.data for x in g])
    zeros = array("d", [0.0] * 8)
    keep = (w, g, m, v)  # the kernel knows addresses only
    return lambda: (sweep.run(addresses, zeros, zeros, zeros), keep)


PEERS: dict[str, tuple[Callable[..., Step], Callable[..., Step]]] = {
    "torch fused": (ours_numpy, torch_step("fused")),
    "torch foreach": (ours_numpy, torch_step("foreach")),
    "optax": (ours_numpy, optax_step),
    "Keras on TensorFlow": (ours_numpy, keras_step),
    "Keras on JAX": (ours_numpy, keras_step),
    "Keras on PyTorch": (ours_numpy, keras_step),
    "plain NumPy": (ours_numpy, plain_numpy),
    "streaming": (ours_numpy, streaming),
    "PyTorch: torch fused": (ours_torch, torch_step("fused")),
    "PyTorch: Keras on PyTorch": (ours_torch, keras_step),
    "JAX Refs: optax": (ours_jax, optax_step),
    "JAX stateless: optax": (ours_jax_stateless, optax_step),
    "JAX Refs: Keras on JAX": (ours_jax, keras_step),
    "TensorFlow: Keras on TensorFlow": (ours_tensorflow, keras_step),
}


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(peer: str, name: str, mode: str) -> None:
    shapes = SETS[name]()
    make_ours, make_theirs = PEERS[peer]
    steps = []
    for make in (make_ours, make_theirs):
        # Separate arrays: neither may find the other's in a cache.
        steps.append(make(arrays(shapes, 0, 0.05), arrays(shapes, 1, 0.01), mode))
    for _ in range(3):
        for step in steps:
            step()
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + SECONDS
    while len(times[0]) < 7 or (time.perf_counter() < end and len(times[0]) < 2000):
        for step, taken in zip(steps, times, strict=True):
            taken.append(timed(step))
    ours, theirs = (statistics.median(taken) for taken in times)
    print(json.dumps({"ours": ours, "theirs": theirs, "n": size(shapes), "runs": len(times[0])}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
