"""One peer beside omniadam in one process: interleaved steps, medians, as JSON on stdout.

    python benchmarks/pair.py PEER SET MODE

PEER is one of PEERS and SET one of sets.SETS; or PEER is one of LOOPS and SET "MLP loop",
"transformer loop", "CNN loop", "MLP fit", or "first step of" so many tensors. MODE is plain or
full. Run by run.py, which sets the threads and Keras's backend for the process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from sets import OFFSETS, SETS, arrays, many, size

import omniadam
from omniadam.kernels import cpu
from omniadam.rule import Pass, Rule

Step = Callable[[], Any]
OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"global_clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True},
}
SECONDS = 2.0


@dataclass
class Loop:
    """A step that comes after something which is not timed."""

    prepare: Callable[[], Any]
    step: Step

    def __call__(self) -> None:
        self.step()


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
        # The count is a result of the program that updates the Refs: ready when that is over.
        jax.block_until_ready(opt.apply_gradients(zip(grads, refs, strict=True)))

    return step


def ours_jax_stateless(w: list[Any], g: list[Any], mode: str) -> Step:
    import jax
    import jax.numpy as jnp

    params, grads = [jnp.asarray(x) for x in w], [jnp.asarray(x) for x in g]
    opt = omniadam.Adam(**OURS[mode])
    opt.build(params)
    held = [params, opt.variables]

    @partial(jax.jit, donate_argnums=(0, 1))
    def apply(params: Any, state: Any, grads: Any) -> Any:
        return opt.stateless_apply(state, grads, params)

    def step() -> None:
        held[:] = apply(*held, grads)
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


def torch_parameters(w: list[Any], g: list[Any]) -> list[Any]:
    import torch

    params = [torch.from_numpy(x).requires_grad_() for x in w]
    for p, x in zip(params, g, strict=True):
        p.grad = torch.from_numpy(x)
    return params


def torch_optim(params: list[Any], mode: str, kind: str) -> Step:
    import torch

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


def torch_dropin(params: list[Any], mode: str) -> Step:
    from omniadam.torch import AdamW

    return AdamW(params, 1e-3, **{"weight_decay": 0.0, **OURS[mode]}).step


def torch_step(kind: str) -> Callable[..., Step]:
    return lambda w, g, mode: torch_optim(torch_parameters(w, g), mode, kind)


def ours_torch_dropin(w: list[Any], g: list[Any], mode: str) -> Step:
    return torch_dropin(torch_parameters(w, g), mode)


def torch_model(name: str) -> tuple[Any, Any]:
    """A model and its input: the MLP of the sets, a CNN, or two layers of a transformer."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "CNN":
        channels = [
            x
            for a, b in ((3, 32), (32, 64), (64, 128))
            for x in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
        ]
        return nn.Sequential(*channels, nn.Flatten(), nn.Linear(2048, 100)), torch.randn(
            32, 3, 32, 32
        )
    if name == "MLP":
        widths = (784, 128, 64, 10)
        layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1]), torch.randn(64, 784)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Embedding(1000, 128), nn.TransformerEncoder(layer, 2), nn.Linear(128, 1000)
    )
    return model, torch.randint(1000, (8, 64))


def torch_loop(make_step: Callable[[list[Any], str], Step]) -> Callable[[str, str], Loop]:
    """The step in a real loop, where torch's threads and caches have just been used."""

    def make(name: str, mode: str) -> Loop:
        model, x = torch_model(name)
        params = list(model.parameters())

        def prepare() -> None:
            model.zero_grad()
            model(x).square().mean().backward()

        prepare()
        return Loop(prepare, make_step(params, mode))

    return make


def torch_apply(params: list[Any], mode: str) -> Step:
    opt = omniadam.Adam(**OURS[mode])
    return lambda: opt.apply_gradients([(p.grad, p) for p in params])


def first_step(make_step: Callable[[list[Any], str], Step]) -> Callable[[str, str], Loop]:
    """To make an optimizer and its first step, which creates its state."""

    def make(name: str, mode: str) -> Loop:
        shapes = many(int(name.split()[-2].replace(",", "")))
        w, g = arrays(shapes, 0, 0.05), arrays(shapes, 1, 0.01)
        held: list[Any] = []

        def prepare() -> None:
            held[:] = torch_parameters([x.copy() for x in w], g)

        return Loop(prepare, lambda: make_step(list(held), mode)())

    return make


def chained(adam: Any, adamw: Any, mode: str) -> Any:
    import optax

    if mode == "plain":
        return adam(1e-3)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw(1e-3, weight_decay=0.01))


def optax_loop(transformation: Any, w: list[Any], g: list[Any], mode: str) -> Step:
    import jax
    import jax.numpy as jnp
    import optax

    params, grads = [jnp.asarray(x) for x in w], [jnp.asarray(x) for x in g]
    averages = [x + 0 for x in params] if mode == "full" else []
    held = [params, transformation.init(params), averages]

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def apply(params: Any, state: Any, averages: Any, grads: Any) -> Any:
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        averages = [0.99 * a + 0.01 * p for a, p in zip(averages, params, strict=False)]
        return params, state, averages

    def step() -> None:
        held[:] = apply(*held, grads)
        jax.block_until_ready(held[0])

    return step


def optax_step(w: list[Any], g: list[Any], mode: str) -> Step:
    import optax

    return optax_loop(chained(optax.adam, optax.adamw, mode), w, g, mode)


def ours_optax(w: list[Any], g: list[Any], mode: str) -> Step:
    import omniadam.optax as ours

    return optax_loop(chained(ours.adam, ours.adamw, mode), w, g, mode)


def keras_optimizer(is_ours: bool, mode: str) -> Any:
    import keras

    if not is_ours:
        return keras.optimizers.Adam(**OURS[mode])
    from omniadam.keras import Adam

    return Adam(**OURS[mode])


def fit(is_ours: bool) -> Callable[[str, str], Loop]:
    """An epoch of 32 batches of 64, with everything that Keras does around a step."""

    def make(name: str, mode: str) -> Loop:
        import keras

        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(n, activation="relu") for n in (128, 64)]
        model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
        model.compile(optimizer=keras_optimizer(is_ours, mode), loss="mse")
        rng = np.random.default_rng(0)
        x, y = (rng.standard_normal((2048, n), dtype=np.float32) for n in (784, 10))

        def prepare() -> None:
            # At the end of an epoch Keras on JAX lets a variable and its average be one array,
            # which the next one could not donate twice.
            for variable in model.trainable_variables:
                variable.assign(keras.ops.copy(variable))

        return Loop(prepare, lambda: model.fit(x, y, batch_size=64, verbose=0))

    return make


def in_function(make: Any, w: list[Any], g: list[Any], mode: str) -> Step:
    """A step within a function of the user's, as in a training loop of one's own."""
    import tensorflow as tf

    opt, variables = make(mode, w)
    grads = [tf.constant(x) for x in g]

    def apply(grads: list[Any]) -> None:
        opt.apply_gradients(list(zip(grads, variables, strict=True)))

    function = tf.function(apply, autograph=False)
    return lambda: function(grads)


def _tensorflow(mode: str, w: list[Any]) -> tuple[Any, list[Any]]:
    import tensorflow as tf

    return omniadam.Adam(**OURS[mode]), [tf.Variable(x) for x in w]


def _keras(mode: str, w: list[Any]) -> tuple[Any, list[Any]]:
    import keras

    opt, variables = keras_optimizer(False, mode), [keras.Variable(x) for x in w]
    opt.build(variables)
    return opt, variables


def _older(is_ours: bool, mode: str, w: list[Any]) -> tuple[Any, list[Any]]:
    import tensorflow as tf

    if is_ours:
        from omniadam.compat.optimizer_v2 import Adam
    else:
        from tf_keras.optimizers.legacy import Adam
    settings = {} if mode == "plain" else {"global_clipnorm": 1.0}
    return Adam(**settings), [tf.Variable(x) for x in w]


def keras_step(w: list[Any], g: list[Any], mode: str, is_ours: bool = False) -> Step:
    import keras

    variables = [keras.Variable(x) for x in w]
    opt = keras_optimizer(is_ours, mode)
    opt.build(variables)
    backend = keras.backend.backend()
    grads = [keras.ops.convert_to_tensor(x) for x in g]
    if backend == "torch":
        return lambda: opt.apply(grads, variables)
    if backend == "jax":
        import jax

        held = [[v.value for v in variables], [v.value for v in opt.variables]]

        @partial(jax.jit, donate_argnums=(0, 1))
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


def make_stream(functions: Any) -> Any:
    """Adam's traffic without Adam's arithmetic: reads g, reads and writes w, m and v."""
    return lambda w, g, slots, c: (w + g, (slots[0] + g, slots[1] + g))


def streaming(w: list[Any], g: list[Any], mode: str) -> Step:
    from array import array

    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    rows = [[a.ctypes.data for a in each] + [0, 0] for each in zip(w, m, v, strict=True)]
    rule = Rule(make_stream, ("m", "v"), ())
    kind = Pass(gradient=True, updates=True)
    sweep = cpu.Sweep(kind, rule, "float32", "float32", rows, [x.size for x in w])
    addresses = array("q", [x.ctypes.data for x in g])
    zeros = array("d", [0.0] * 8)
    keep = (w, g, m, v)  # the kernel knows addresses only
    return lambda: (sweep.run(addresses, zeros, zeros), keep)


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
    "omniadam.torch: torch fused": (ours_torch_dropin, torch_step("fused")),
    "PyTorch: Keras on PyTorch": (ours_torch, keras_step),
    "JAX Refs: optax": (ours_jax, optax_step),
    "JAX stateless: optax": (ours_jax_stateless, optax_step),
    "JAX Refs: Keras on JAX": (ours_jax, keras_step),
    "TensorFlow: Keras on TensorFlow": (ours_tensorflow, keras_step),
    "omniadam.optax: optax": (ours_optax, optax_step),
    "TensorFlow, in a tf.function: Keras on TensorFlow": (
        partial(in_function, _tensorflow),
        partial(in_function, _keras),
    ),
    "compat.optimizer_v2, in a tf.function: tf_keras legacy": (
        partial(in_function, partial(_older, True)),
        partial(in_function, partial(_older, False)),
    ),
}
KERAS = ("Keras on TensorFlow", "Keras on JAX", "Keras on PyTorch")
for keras_peer in KERAS:
    PEERS[f"omniadam.keras: {keras_peer}"] = partial(keras_step, is_ours=True), keras_step

LOOPS: dict[str, tuple[Callable[[str, str], Loop], Callable[[str, str], Loop]]] = {
    f"omniadam.keras: {peer}": (fit(True), fit(False)) for peer in KERAS
}
LOOPS |= {
    f"{ours}: torch {theirs}": (
        torch_loop(make),
        torch_loop(partial(torch_optim, kind=theirs)),
    )
    for ours, make in (("PyTorch", torch_apply), ("omniadam.torch", torch_dropin))
    for theirs in ("fused", "foreach")
}


FIRST = {
    f"{ours}: torch fused": (make, partial(torch_optim, kind="fused"))
    for ours, make in (("PyTorch", torch_apply), ("omniadam.torch", torch_dropin))
}


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(peer: str, name: str, mode: str) -> None:
    steps: list[Step] = []
    if name in SETS:
        shapes = SETS[name]()
        offset = OFFSETS.get(name, 0)
        for make in PEERS[peer]:
            # Separate arrays: neither may find the other's in a cache.
            w, g = arrays(shapes, 0, 0.05, offset), arrays(shapes, 1, 0.01, offset)
            steps.append(make(w, g, mode))
        elements = size(shapes)
    elif name.startswith("first step"):
        steps += [first_step(make)(name, mode) for make in FIRST[peer]]
        elements = 0
    else:
        name = name.removesuffix(" loop").removesuffix(" fit")
        steps += [make(name, mode) for make in LOOPS[peer]]
        elements = 0
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + SECONDS
    for i in range(2000):
        if i >= (3 if name.startswith("first step") else 10) and time.perf_counter() > end:
            break
        for step, taken in zip(steps, times, strict=True):
            if isinstance(step, Loop):
                step.prepare()
            taken.append(timed(step))
    # The first calls find nothing in any cache; of a first step each call is one.
    ours, theirs = (taken[0 if name.startswith("first step") else 3 :] for taken in times)
    count = min(5, len(ours))
    parts = [(ours[i::count], theirs[i::count]) for i in range(count)]
    ratios = sorted(statistics.median(b) / statistics.median(a) for a, b in parts)
    result = {
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        # Of interleaved fifths of the run, the lowest and the highest ratio.
        "spread": [ratios[0], ratios[-1]],
        # The 95th percentile as a multiple of the median.
        "tails": [float(np.quantile(x, 0.95)) / statistics.median(x) for x in (ours, theirs)],
        "n": elements,
        "runs": len(ours),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:4])
