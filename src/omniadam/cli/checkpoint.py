"""What a run leaves on disk to go on from, and how it was before it was a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omniadam import Adam
from omniadam.saving import atomic, file, optimizers
from omniadam.saving.snapshot import Tensor

Array = NDArray[Any]

# Beside the optimizer's state, which `omniadam.load` reads, too.
MODEL, SETTINGS, HISTORY = "model/", "run/settings", "run/history"
# Of checkpoints before, which were .npz; one with another number is not read.
NPZ_FORMAT = 1


class Stored(NamedTuple):
    """A run as it was stored."""

    settings: Mapping[str, Any]
    history: Array  # an epoch a row
    weights: Mapping[str, Array]
    # Gives an optimizer with the run's settings, built with its variables, the stored state.
    restore: Callable[[Adam], object]


def write(
    path: Path,
    optimizer: Adam,
    settings: Mapping[str, Any],
    history: Sequence[Sequence[float]],
    weights: Mapping[str, Array],
) -> None:
    """Write all that a run needs to go on as if there had been no interruption."""
    text = json.dumps(settings).encode()
    beside: dict[str, Array] = {
        SETTINGS: np.frombuffer(text, np.uint8),
        HISTORY: np.array(history, np.float64).reshape(-1, 4),
        **{MODEL + name: weight for name, weight in weights.items()},
    }
    with optimizers.held(optimizer) as snapshot:
        file.write(path, snapshot, {name: Tensor.of(value) for name, value in beside.items()})


def read(path: Path) -> Stored:
    """Read what `write` wrote, or the .npz file that was written before.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is something else, or damaged.
    """
    if path.suffix == ".npz":
        return _read_npz(path)
    found = file.read(path)
    if not {SETTINGS, HISTORY} <= found.others.keys():
        raise ValueError(f"{path} is not a file that omniadam train wrote")
    beside = {name: tensor.read() for name, tensor in found.others.items()}
    return Stored(
        json.loads(beside[SETTINGS].tobytes()),
        beside[HISTORY],
        _below(MODEL, beside),
        lambda optimizer: optimizers.restore(optimizer, found.snapshot, by="name", strict=True),
    )


def _below(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _read_npz(path: Path) -> Stored:
    arrays = load(path)
    if "format" not in arrays or arrays["format"] != NPZ_FORMAT:
        raise ValueError("it was written by another version of omniadam, or by something else")
    return Stored(
        json.loads(str(arrays["settings"])),
        arrays["history"],
        _below(MODEL, arrays),
        lambda optimizer: optimizer.load_own_variables(_below("optimizer/", arrays)),
    )


def save(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write named arrays to a .npz file, all of them or nothing."""
    atomic.replace(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load(path: Path) -> dict[str, Array]:
    """Read what `save` wrote. A file that is something else raises ValueError."""
    try:
        # Opened here: NumPy leaves a file open that turns out to be no archive.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # zipfile and NumPy each have their own for a damaged file
        raise ValueError(f"{path} is not a file that omniadam train wrote: {error}") from error
