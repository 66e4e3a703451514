"""Files of torch.save: state_dicts of torch.optim's Adam and AdamW, and of ours.

They are read with `weights_only=True` and mapped into memory. Nothing of torch's compares the sums
that the archive has of its contents, so that is done here.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from .. import torch as dropin
from ..saving import atomic
from ..saving import torch as saving
from ..saving.snapshot import TORCH, Snapshot, Tensor, Variable
from ..saving.translate import translated
from .places import place_in

STATE_DICT = "a state_dict of torch.optim, with 'state' and 'param_groups'"
_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def read(path: Path, key: str | None = None, settings: Mapping[str, Any] | None = None) -> Snapshot:
    """As `formats.read`. Moments of 16 bits, which torch.optim has, become float32.

    A checkpoint names places by keys and positions with dots between: "optimizer", "states.0".
    """
    found = place_in(dict(_places(_loaded(path))), key, path, STATE_DICT)
    groups, state = found["param_groups"], found["state"]
    slots = {
        name: {k: Stored.of(v) for k, v in held.items()} if isinstance(held, dict) else held
        for name, held in (state.items() if isinstance(state, dict) else ())
    }
    return snapshot_of(groups, slots, path)


# --- opening ---


def _loaded(path: Path) -> Any:
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        check_archive(path, path.open("rb"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of typed storages, and of what is no optimizer's
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive or None)
    except Exception as error:  # as many kinds as there are ways to alter a pickle
        raise refusal(path, error) from error


def refusal(path: Path, error: Exception) -> ValueError:
    """What to say of a file that torch.load does not take."""
    text = " ".join(str(error).split())
    if "weights_only" in text or "GLOBAL" in text:
        # torch's text ends with how to switch its check off.
        what = text.partition("WeightsUnpickler error:")[2].partition("Please use")[0].strip()
        return ValueError(
            f"'{path}' holds other objects than tensors, numbers, strings, lists and dictionaries "
            f"of those, or is damaged: {what or text[:200]} It is not read, as such a file can run "
            "any code. If you trust it, load it by torch.load(..., weights_only=False), and save "
            "optimizer.state_dict() by itself."
        )
    return ValueError(
        f"'{path}' cannot be read: it is damaged, or no file of torch.save. "
        f"{type(error).__name__}: {text[:200]}"
    )


def check_archive(path: Path, file: Any) -> None:
    """Raise ValueError if an archive's contents are not what was written; closes the file."""
    try:
        with file, zipfile.ZipFile(file) as archive:
            packed = [i.filename for i in archive.infolist() if i.compress_type != 0]
            # torch packs nothing, and a small packed file may be a large one.
            wrong = packed[0] if packed else archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise refusal(path, error) from error
    except RuntimeError as error:  # it says that it is encrypted
        raise refusal(path, error) from error
    if wrong is not None:
        raise ValueError(
            f"'{path}' is damaged: the part '{wrong}' is not what was written, by the sum (CRC-32) "
            "that is beside it. (Files that torch.serialization.set_crc32_options(False) left "
            "without sums are not read.)"
        )


# --- finding the optimizer ---


def _places(value: Any, name: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """All state_dicts of optimizers, with the keys that lead to them."""
    if id(value) in above or len(above) > 32:  # a pickle may hold itself
        return
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        yield name, value
        return
    parts: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list | tuple):
        parts = enumerate(value)
    for key, part in parts:
        yield from _places(part, f"{name}.{key}" if name else str(key), (*above, id(value)))


# --- a state_dict as a snapshot ---


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, value: Any) -> Any:
        """A tensor that was loaded, or what else there is."""
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return value
        if value.layout != torch.strided or value.is_meta:
            return value
        return cls(tuple(value.shape), value.dtype, lambda: value)


def snapshot_of(groups: Any, state: Mapping[Any, Any], path: Path) -> Snapshot:
    """The snapshot of a state_dict whose tensors are `Stored`.

    Args:
        groups: `param_groups`, of which nothing is known.
        state: `state`, of which the keys are those in `params` of the groups.
        path: for messages.
    """
    keys = _check_groups(groups, path)
    foreign = [key for key in state if key not in keys]
    if foreign:
        raise ValueError(f"'{path}' has state of what is in no parameter group: {foreign[:8]}.")
    if all(isinstance(key, str) for key in keys):
        groups = [{**group, "param_names": group["params"]} for group in groups]
    names, is_named = saving._names(groups)
    variables, tensors = [], dict[str, Tensor]()
    for name, key in zip(names, keys, strict=True):
        slots = _slots(state.get(key) or {}, name, path)
        # The shape of what has no state is not in the file, and no parameter's type is.
        first = slots.get("momentum", _UNKNOWN)
        full = {word: f"{name}.{word}" for word in slots}
        variables.append(Variable(name, first.shape, first.dtype, full, is_named))
        tensors |= {full[word]: tensor for word, tensor in slots.items()}
    settings = saving._saved_groups(groups, names, with_extras=False)
    for group in settings:
        betas = group["betas"]
        numbers = [group["lr"], group["eps"], *(betas if isinstance(betas, list) else [None])]
        if len(numbers) != 4 or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(
                f"'{path}' must have groups whose `lr` and `eps` are numbers, and `betas` two. "
                f"Received: {group['lr']!r}, {group['eps']!r}, {betas!r}"
            )
    is_decoupled = all(group.get("decoupled_weight_decay") for group in settings)
    kind = f"omniadam.torch.Adam{'W' if is_decoupled else ''}"
    return Snapshot(kind, TORCH, {"groups": settings}, tuple(variables), tensors)


_UNKNOWN = Tensor.of(np.zeros((), np.float32))


def _check_groups(groups: Any, path: Path) -> list[Any]:
    """The keys of all parameters, in order; raises ValueError if the groups are none of Adam's."""
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise ValueError(f"'{path}' must have 'param_groups', a list of groups with 'params'.")
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, int | str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(f"The 'params' in '{path}' must be numbers or names, each once.")
    missing = [k for k in ("lr", "betas", "eps", "amsgrad") if any(k not in g for g in groups)]
    if missing:
        raise ValueError(
            f"'{path}' must hold the state of Adam or AdamW, with the settings of torch.optim. Its "
            f"groups lack {missing}: they have {sorted(map(str, groups[0]))}."
        )
    for group in groups:
        given = group.get("param_names")
        if given is not None and (
            not isinstance(given, list) or len(given) != len(group["params"])
        ):
            raise ValueError(f"'{path}' must have a name of each parameter, or of none.")
    return keys


def _slots(held: Any, name: str, path: Path) -> dict[str, Tensor]:
    if not held:
        return {}
    unknown = sorted(str(key) for key in held if key not in saving.NAMES.values())
    missing = sorted({"step", "exp_avg", "exp_avg_sq"} - held.keys())
    if unknown or missing:
        raise ValueError(
            f"'{path}' must hold Adam's state, {list(saving.NAMES.values())}. That of parameter "
            f"'{name}' lacks {missing} and has {unknown} besides."
        )
    slots, shape = {}, getattr(held["exp_avg"], "shape", None)
    for word, key in saving.NAMES.items():
        value = held.get(key)
        if word == "step" or value is None:
            continue
        if not isinstance(value, Stored) or value.shape != shape or value.dtype not in _DTYPES:
            raise ValueError(
                f"The state '{key}' of parameter '{name}' in '{path}' must be a tensor of floating "
                f"type, of the shape of the others, {shape}. Received: "
                f"{value[:2] if isinstance(value, Stored) else type(value).__name__}."
            )
        slots[word] = _moment(value)
    step = held["step"]
    slots["step"] = saving._count(step.read() if isinstance(step, Stored) else step, name)
    return slots


def _moment(value: Stored) -> Tensor:
    dtype = saving._slot_dtype(value.dtype)
    return Tensor(value.shape, saving._called(dtype), lambda: saving.read(value.read(), dtype))


# --- writing ---


def write(snapshot: Snapshot, path: Path) -> None:
    """As `formats.write`: a state_dict that torch.optim and omniadam.torch load."""
    with state_dict_of(snapshot, path, by_name=False) as made:

        def fill(file: Any) -> None:
            buffered = io.BufferedWriter(file)
            torch.save(made, buffered)
            buffered.flush()
            buffered.detach()

        atomic.replace(path, fill)


@contextmanager
def state_dict_of(snapshot: Snapshot, path: Path, by_name: bool) -> Iterator[dict[str, Any]]:
    """The state_dict of a snapshot, whose tensors lie in a file beside `path` meanwhile.

    torch.save wants all of them at once, which may be more than the memory.

    Args:
        snapshot: of any generation that can be translated.
        path: of what is to be written.
        by_name: whether parameters are called by their names, as torch.distributed has it.
    """
    snapshot = translated(snapshot, "omniadam.torch.Adam")
    with tempfile.TemporaryFile(dir=path.absolute().parent) as scratch:
        keys = {v.name: v.name if by_name else i for i, v in enumerate(snapshot.variables)}
        state = {}
        for variable in snapshot.variables:
            tensors = {w: snapshot.tensors[n] for w, n in variable.slots.items()}
            if tensors:
                state[keys[variable.name]] = {
                    key: _step(tensors[word]) if word == "step" else _mapped(tensors[word], scratch)
                    for word, key in (("step", "step"), *saving.NAMES.items())
                    if word in tensors
                }
        is_named = all(variable.is_named for variable in snapshot.variables)
        groups = [_group(group, keys, is_named) for group in snapshot.settings["groups"]]
        extra = sorted({key for group in groups for key in group if key in dropin._EXTRAS})
        if extra:
            warnings.warn(
                f"'{path}' has settings that torch.optim ignores, and omniadam.torch does not: "
                f"{extra}. A run goes on with the same numbers in omniadam.torch only.",
                stacklevel=5,
            )
        yield {"state": state, "param_groups": groups}


def _step(tensor: Tensor) -> torch.Tensor:
    count = int(tensor.read())
    step = torch.tensor(float(count), dtype=torch.float32)
    return step if int(step) == count else torch.tensor(count, dtype=torch.float64)


def _mapped(tensor: Tensor, scratch: IO[bytes]) -> torch.Tensor:
    value = tensor.read()
    if value.nbytes == 0:
        return torch.from_numpy(np.array(value))
    place = -(-scratch.seek(0, os.SEEK_END) // 64) * 64
    scratch.truncate(place + value.nbytes)
    mapped: Any = np.memmap(scratch, value.dtype, "r+", place, value.shape)
    mapped[...] = value
    # Of a shape without dimensions, a memmap has one.
    return torch.from_numpy(mapped.view(np.ndarray).reshape(value.shape))


def _group(group: Mapping[str, Any], keys: Mapping[str, Any], is_named: bool) -> dict[str, Any]:
    """A group as torch.optim has it: with its settings all, and of ours those that are used."""
    usual = {key: extra.default for key, extra in dropin._EXTRAS.items()}
    own = {k: v for k, v in group.items() if k != "params" and usual.get(k, _UNUSUAL) != v}
    own["betas"] = tuple(own["betas"])
    names: Sequence[str] = group["params"]
    named = {"param_names": list(names)} if is_named else {}
    return {**_TORCHS, **named, **own, "params": [keys[name] for name in names]}


_UNUSUAL = object()
_TORCHS = {
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
