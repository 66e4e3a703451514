"""Time `omniadam.save` and `load` of a gigabyte beside safetensors' own functions.

    python benchmarks/saving.py [MEGABYTES]

Prints JSON: seconds by name, with the lowest and highest of the rounds. Of the two that are
compared, one follows the other, into one folder of the temporary files: `save` beside `save_file`
and an fsync of its file, `load` beside `load_file` and a copy into the tensors that there are.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import omniadam

ROUNDS = 7


def main() -> None:
    count = 24  # of variables, which have two slots each
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) * (1 << 20) // (2 * count * 4)
    opt = omniadam.Adam()
    opt.build({f"layer_{i}/kernel": np.zeros(size, np.float32) for i in range(count)})
    rng = np.random.default_rng(0)
    slots = {name: v for name, v in opt.named_variables().items() if v.ndim}
    for slot in slots.values():
        slot[...] = rng.standard_normal(size, np.float32)

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")

        def save_theirs() -> None:
            save_file(slots, theirs)
            descriptor = os.open(theirs, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        def load_theirs() -> None:
            for name, value in load_file(theirs).items():
                slots[name][...] = value

        actions: dict[str, Callable[[], Any]] = {
            "save": lambda: omniadam.save(opt, ours),
            "save_file": save_theirs,
            "load": lambda: omniadam.load(ours, opt),
            "load_file": load_theirs,
            "hash": lambda: omniadam.state_hash(opt),
        }
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(ROUNDS + 1):
            for name, action in actions.items():
                start = time.perf_counter()
                action()
                times[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {"gigabytes": sum(slot.nbytes for slot in slots.values()) / 1e9}
    for name, taken in times.items():
        found[name] = [statistics.median(taken[1:]), min(taken[1:]), max(taken[1:])]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
