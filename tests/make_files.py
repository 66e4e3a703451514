"""Write the files of state that later versions must load: python tests/make_files.py FOLDER

They are kept in tests/files, with what is in them as JSON beside them. A file that is there is not
written again: it stands for the version that wrote it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import omniadam
from omniadam.saving import file

NAMES = {"dense/kernel": (3, 2), "dense/bias": (2,), "scale": ()}


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in NAMES.items()}


def train(opt: Any, held: Mapping[str, Any], steps: int) -> None:
    for step in range(steps):
        rng = np.random.default_rng(step)
        grads = [rng.normal(size=v.shape).astype(np.float32) for v in held.values()]
        opt.apply_gradients(list(zip(grads, held.values(), strict=True)))


def optimizers() -> Iterator[tuple[str, Any]]:
    """By name: those whose state is kept."""
    everything: dict[str, Any] = {
        "learning_rate": 0.01,
        "amsgrad": True,
        "weight_decay": 0.1,
        "global_clipnorm": 1.0,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "gradient_accumulation_steps": 3,
        "epsilon_hat": False,
    }
    opt = omniadam.Adam(**everything)
    opt.build(held := arrays())
    train(opt, held, 5)
    yield "everything", opt
    opt = omniadam.AdamW(omniadam.schedules.CosineDecay(0.1, 100))
    opt.exclude_from_weight_decay(var_names=["bias"])
    opt.build(held := arrays())
    train(opt, held, 2)
    yield "schedule", opt
    opt = omniadam.Adam()
    held = arrays()
    train(opt, held, 2)
    yield "position", opt
    opt = omniadam.Adam()
    held = arrays()
    late = {"scale": held.pop("scale")}
    opt.build(held)
    train(opt, held, 2)
    opt.extend(late)
    train(opt, held | late, 2)
    yield "extended", opt
    from omniadam.compat import contrib_keras, optimizer_v2

    older = optimizer_v2.Adam(lr=0.01, decay=0.1, amsgrad=True, clipnorm=1.0)
    train(older, arrays(), 2)
    yield "optimizer_v2", older
    oldest: Any = contrib_keras.Adam(lr=0.01, decay=0.1)
    held = arrays()
    (update,) = oldest.get_updates([held["dense/kernel"]], {}, lambda w: (w * w).sum())
    update()
    yield "contrib_keras", oldest
    import torch

    from omniadam.torch import AdamW

    params = {name.replace("/", "."): torch.tensor(v) for name, v in arrays().items()}
    stepped = AdamW(params.items(), lr=0.01, amsgrad=True, use_ema=True)
    for p in list(params.values())[:2]:
        p.grad = torch.ones_like(p)
    stepped.step()
    yield "torch", stepped
    import jax.numpy as jnp

    from omniadam.optax import adamw

    solver = adamw(0.01)
    tree = {name: jnp.array(v) for name, v in arrays().items()}
    _, state = solver.update(tree, solver.init(tree), tree)
    yield "optax", state
    import keras

    from omniadam.keras import Adam as OfKeras

    variables = [keras.Variable(v, name=n.replace("/", "_")) for n, v in arrays().items()]
    of_keras = OfKeras(0.01, use_ema=True)
    of_keras.apply([np.ones(v.shape, np.float32) for v in variables], variables)
    yield "keras", of_keras


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, opt in optimizers():
        path = folder / f"{name}.safetensors"
        if path.exists():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            omniadam.save(opt, path)
        found = file.read(path)
        whole = found.snapshot
        told = {
            "state_hash": omniadam.state_hash(opt),
            "class": whole.kind,
            "by": "name" if all(v.is_named for v in whole.variables) else "position",
            "variables": [
                {"name": v.name, "shape": v.shape, "dtype": v.dtype} for v in whole.variables
            ],
            "config": opt.get_config() if hasattr(opt, "get_config") else None,
            "version": omniadam.__version__,
        }
        if hasattr(opt, "iterations"):
            told["iterations"] = int(opt.iterations)
        path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
