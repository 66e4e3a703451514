"""The state of torch.optim's Adam and AdamW, and of ours, as a snapshot and back."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import torch as dropin
from ..backends import sharded
from ..backends.deferred import Rows
from ..backends.torch import making_state, zeros_like
from . import matching
from .matching import Left
from .optimizers import kind_of
from .snapshot import TORCH, Snapshot, Tensor, Variable

Array = npt.NDArray[Any]

# torch's names of what is kept for a parameter, by Keras's words, in the order of files.
NAMES = {
    "momentum": "exp_avg",
    "velocity": "exp_avg_sq",
    "velocity_hat": "max_exp_avg_sq",
    "average": "average",
    "step": "step",
}
_WORDS = {name: word for word, name in NAMES.items()}
_NO_SETTINGS = ("params", "param_names")


def turn(optimizer: Any) -> Any:
    """What nobody steps the optimizer within, while its state is read."""
    return optimizer._turn() if isinstance(optimizer, dropin.Adam) else nullcontext()


# --- to a snapshot ---


def snapshot(optimizer: torch.optim.Adam) -> Snapshot:
    """The state; its tensors are read when they are wanted, within `turn(optimizer)`.

    Raises:
        ValueError: if the parameters are shards, or something cannot be saved.
    """
    with turn(optimizer):
        groups = optimizer.param_groups
        _check_whole(optimizer)
        for p in _parameters(optimizer):
            if isinstance(p, Rows):
                p.flush()
        names, is_named = _names(groups)
        _check_known(optimizer, names)
        variables, tensors = [], dict[str, Tensor]()
        for p, name in zip(_parameters(optimizer), names, strict=True):
            slots = _slots(p, name, optimizer.state.get(p) or {})
            variable = _variable(name, p, slots, is_named)
            variables.append(variable)
            tensors |= {variable.slots[word]: tensor for word, tensor in slots.items()}
        return Snapshot(
            kind_of(optimizer),
            TORCH,
            {"groups": _saved_groups(groups, names, isinstance(optimizer, dropin.Adam))},
            tuple(variables),
            tensors,
            {"torch": torch.__version__},
        )


def _parameters(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_whole(optimizer: Any) -> None:
    """Raise ValueError if this process does not have whole parameters with values."""
    params = _parameters(optimizer)
    if any(isinstance(p, sharded.dtensor()) for p in params) or sharded.may_be_flat(params):
        raise ValueError(
            "The state of sharded parameters must be saved and loaded by all ranks together. Use "
            "get_optimizer_state_dict and set_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict with torch.distributed.checkpoint.save and "
            "load: `omniadam convert` reads the folder that those write."
        )
    if any(map(sharded.is_valueless, params)):
        raise ValueError(
            "The parameters must have values. Some are on the meta device, or fake tensors: "
            "materialize the model first."
        )


def _names(groups: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """Names of all parameters, and whether the user gave them: else they are positions."""
    count = sum(len(group["params"]) for group in groups)
    given = [str(name) for group in groups for name in group.get("param_names") or ()]
    is_named = len(given) == count == len(set(given))
    return (given if is_named else [str(i) for i in range(count)]), is_named


def _check_known(optimizer: Any, names: Sequence[str]) -> None:
    """Raise ValueError if something is kept that would be left out."""
    params = dict(zip(map(id, _parameters(optimizer)), names, strict=True))
    for p, held in optimizer.state.items():
        if id(p) not in params:
            what = f"a tensor of shape {tuple(p.shape)}" if isinstance(p, torch.Tensor) else repr(p)
            raise ValueError(
                f"All state must be of the optimizer's parameters, to be saved. There is some of "
                f"{what}, which is none of them. Remove it from `optimizer.state`."
            )
        unknown = sorted(str(key) for key in held or () if key not in _WORDS)
        if unknown:
            raise ValueError(
                f"The state of parameter '{params[id(p)]}' must be Adam's, {list(_WORDS)}, to be "
                f"saved. It has {unknown} besides. Keep those elsewhere."
            )


def _slots(p: Any, name: str, held: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter, as the next step would take it."""
    if not held:
        return {}
    dropin._check_complete(held, dropin._OWN, name)
    return {
        word: _count(held[key], name) if word == "step" else _moment(held[key], key, p, name)
        for word, key in NAMES.items()
        if held.get(key) is not None
    }


def _count(step: Any, name: str) -> Tensor:
    value = dropin._count(dropin._step(step, name, {"fused": None}))
    if not value.is_integer():
        raise ValueError(
            f"The state 'step' of parameter '{name}' must be a whole number. Received: {value}."
        )
    return Tensor.of(np.array(value, np.int64))


def _moment(value: Any, key: str, p: Any, name: str) -> Tensor:
    if not isinstance(value, torch.Tensor) or value.shape != p.shape:
        shape = tuple(getattr(value, "shape", ()))
        raise ValueError(
            f"The state '{key}' of parameter '{name}' must be a tensor of its shape, "
            f"{tuple(p.shape)}. Received: {type(value).__name__} of shape {shape}."
        )
    dtype = _slot_dtype(p.dtype)
    return Tensor(tuple(p.shape), _called(dtype), lambda: read(value, dtype))


def read(value: torch.Tensor, dtype: torch.dtype) -> Array:
    """The values of a tensor, on whatever device, in C order."""
    value = value.detach().to("cpu", dtype).resolve_conj().resolve_neg()
    found: Array = value.contiguous().numpy()
    return found


def _slot_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments of 16 bits do not train, and are of 32; what torch has of 16 is made so."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _variable(name: str, p: Any, words: Iterable[str], is_named: bool) -> Variable:
    dtype = _called(p.dtype)
    return Variable(
        name, tuple(p.shape), dtype, {word: f"{name}.{word}" for word in words}, is_named
    )


def _saved_groups(
    groups: Sequence[Mapping[str, Any]], names: Sequence[str], with_extras: bool
) -> list[dict[str, Any]]:
    """The settings of groups, as JSON holds them, each with the names of its parameters."""
    result, rest = [], iter(names)
    for i, group in enumerate(groups):
        defaults = {k: v.default for k, v in dropin._EXTRAS.items()} if with_extras else {}
        plain = {
            str(key): _plain(value, f"`{key}` of parameter group {i}")
            for key, value in {**defaults, **group}.items()
            if key not in _NO_SETTINGS
        }
        result.append({**plain, "params": [next(rest) for _ in group["params"]]})
    return result


def _plain(value: Any, where: str) -> Any:
    """A setting as JSON can hold it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each, where) for each in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(each, where) for key, each in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and np.prod(value.shape) == 1:
        return _plain(value.item(), where)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ValueError(
        f"{where} must be a number, a string, or lists or dictionaries of those, to be saved. "
        f"Received: {value!r}. Remove it from the group before, and put it back afterwards."
    )


# --- from a snapshot ---


def restore(optimizer: torch.optim.Adam, snapshot: Snapshot, *, by: str, strict: bool) -> Left:
    """Take over groups and state, as `load_state_dict` does, one tensor at a time.

    A group takes over the settings of the group that its parameters were in, and keeps what that
    does not tell. Parameters that had no state when it was saved have none afterwards.

    Args:
        optimizer: of `omniadam.torch` or of torch.optim.
        snapshot: of their generation.
        by: "name", or "position": the order of parameters over all groups.
        strict: whether all must fit.

    Raises:
        ValueError, RuntimeError: if it does not fit, or cannot be loaded now. Nothing has been
            changed then.
    """
    with turn(optimizer):
        if getattr(optimizer, "_own", None):
            raise RuntimeError("The parameters hold averages: load outside of averaged().")
        _check_whole(optimizer)
        params, (names, is_named) = _parameters(optimizer), _names(optimizer.param_groups)
        saved = _groups_of(snapshot)
        group_of = {name: i for i, group in enumerate(saved) for name in group["params"]}
        origins = [group_of.get(variable.name) for variable in snapshot.variables]
        if by == "name" and is_named:
            snapshot = _named_alike(snapshot, names)
        partners = _partners(snapshot, names, by)
        own = _wanted(optimizer, names, is_named, [variable for _, variable in partners])
        plan = matching.plan(snapshot, own, by=by, strict=strict)
        sources = [None if i is None else origins[i] for i, _ in partners]
        settings = _settings(optimizer, saved, sources, strict)
        found, left = _complete(own, [v for _, v in partners], dict(plan.pairs), plan.left)
        _check_slots(optimizer, settings, own, found)
        # From here on nothing can be wrong but the file, which was verified.
        for p in params:
            if isinstance(p, Rows):
                p.deferral.forget()
        for group, new in zip(optimizer.param_groups, settings, strict=True):
            group.update(new)
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        for p, group, slots in zip(params, groups, found, strict=True):
            if slots is not None:
                _set(optimizer, p, group, slots)
        return left


def _groups_of(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The saved groups; raises ValueError if they are none."""
    groups = snapshot.settings.get("groups")
    if snapshot.generation != TORCH:
        return []  # matching says what is wrong
    if not isinstance(groups, list) or not all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(isinstance(name, str) for name in group["params"])
        for group in groups
    ):
        raise ValueError(
            "The settings of torch.optim's state must be `groups`, each with its `params`. "
            f"Received: {snapshot.settings!r}"
        )
    return groups


def _named_alike(snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
    """The snapshot, with the optimizer's names where only wrappers make the difference."""
    theirs = [variable.name for variable in snapshot.variables]
    short = [(theirs, list(names))]
    for stripped in (dropin._unwrapped, dropin._bare):
        (a,), (b,) = stripped([theirs]), stripped([list(names)])
        if len(set(a)) == len(theirs) and len(set(b)) == len(names):
            short.append((a, b))
    a, b = max(short, key=lambda both: len(set(both[0]) & set(both[1])))
    full = dict(zip(b, names, strict=True))
    renamed = [full.get(each, name) for each, name in zip(a, theirs, strict=True)]
    variables = zip(snapshot.variables, renamed, strict=True)
    return replace(snapshot, variables=tuple(v._replace(name=name) for v, name in variables))


Partner = tuple[int, Variable] | tuple[None, None]


def _partners(snapshot: Snapshot, names: Sequence[str], by: str) -> list[Partner]:
    """For each parameter, which of the snapshot's variables it is."""
    given = snapshot.variables
    places: dict[Any, int] = {v.name if by == "name" else i: i for i, v in enumerate(given)}
    found = [places.get(name if by == "name" else i) for i, name in enumerate(names)]
    return [(None, None) if i is None else (i, given[i]) for i in found]


def _wanted(
    optimizer: Any, names: Sequence[str], is_named: bool, partners: Sequence[Variable | None]
) -> Snapshot:
    """The forms of what is to be loaded: each parameter may have state, or none, as it had."""
    variables, tensors = [], dict[str, Tensor]()
    for p, name, partner in zip(_parameters(optimizer), names, partners, strict=True):
        if partner is None:
            held = optimizer.state.get(p) or {}
            words = [word for word, key in NAMES.items() if key in held]
        else:
            words = [word for word in partner.slots if word in NAMES]
        variable = _variable(name, p, words, is_named)
        variables.append(variable)
        dtype = _called(_slot_dtype(p.dtype))
        for word, full in variable.slots.items():
            form = ((), "int64") if word == "step" else (tuple(p.shape), dtype)
            tensors[full] = Tensor(*form, _unread)
    return Snapshot(kind_of(optimizer), TORCH, {}, tuple(variables), tensors)


def _unread() -> Array:
    raise AssertionError("this is a form only")


def _settings(
    optimizer: Any, saved: Sequence[Mapping[str, Any]], sources: Sequence[int | None], strict: bool
) -> list[dict[str, Any]]:
    """For each group, what is to be set of it, checked.

    Args:
        optimizer: whose groups they are.
        saved: the groups of the file.
        sources: for each parameter, which of those it was in; None if the file has it not.
        strict: whether the groups must be the same.
    """
    result, wrong, rest = [], list[str](), iter(sources)
    for i, group in enumerate(optimizer.param_groups):
        found = [next(rest) for _ in group["params"]]
        known = {source for source in found if source is not None} if found else {i}
        source = known.pop() if len(known) == 1 else None
        if source is None or not 0 <= source < len(saved):
            is_same = False
        else:
            is_same = len(found) == len(saved[source]["params"]) and None not in found
        if strict and not is_same:
            raise ValueError(
                "The parameters of each group must be those of a group in the file, as each group "
                f"has settings. Group {i} has {len(found)} parameters, of groups "
                f"{sorted({str(s) for s in found})} of the file. Give the parameters to the "
                "optimizer in the same groups; or strict=False leaves the settings of groups that "
                "were none."
            )
        result.append({} if source is None else _updated(optimizer, group, saved[source], i, wrong))
    if wrong:
        raise ValueError(
            "The state in the file means something else than that of this optimizer: "
            f"{'; '.join(wrong)}. Create the optimizer with the settings of the file."
        )
    return result


# Of what torch's groups have not, that which decides what the state means.
_STRUCTURE = ("amsgrad", "epsilon_hat", "use_ema")


def _updated(
    optimizer: Any, group: Mapping[str, Any], saved: Mapping[str, Any], i: int, wrong: list[str]
) -> dict[str, Any]:
    """What is to be set of a group; `wrong` is given what may not differ."""
    is_ours = isinstance(optimizer, dropin.Adam)
    usual = {key: extra.default for key, extra in dropin._EXTRAS.items()}
    for key in _STRUCTURE if is_ours else ():
        theirs, ours = (each.get(key, usual.get(key, False)) for each in (saved, group))
        if bool(theirs) != bool(ours):
            wrong.append(f"`{key}` is {theirs!r} in the file, {ours!r} in group {i}")
    foreign = {k: v for k, v in saved.items() if k in usual and v != usual[k] and not is_ours}
    if foreign:
        raise ValueError(
            f"torch.optim has no equivalent of the settings {foreign} of the file. Load it into "
            "omniadam.torch."
        )
    new = {
        key: _like(group.get(key), value)
        for key, value in saved.items()
        if key not in (*_NO_SETTINGS, *dropin._REFUSED)
        # What is not used is no part of the groups, so that they have the keys of torch's own.
        and (key in group or usual.get(key, _UNUSUAL) != value)
    }
    if is_ours:
        whole = {**group, **new}
        new |= dropin._checked(whole, only=new)
        dropin._settings({**whole, **new}, False, False)
    return new


_UNUSUAL = object()


def _like(own: Any, value: Any) -> Any:
    """A saved setting in the form that the optimizer has it in."""
    if isinstance(own, torch.Tensor) and isinstance(value, int | float):
        return torch.full_like(own, value)
    if isinstance(own, tuple) and isinstance(value, list):
        each = own if len(own) == len(value) else [None] * len(value)
        return tuple(map(_like, each, value))
    return value


Slots = dict[str, Tensor]


def _complete(
    own: Snapshot,
    partners: Sequence[Variable | None],
    pairs: Mapping[str, Tensor],
    left: Left,
) -> tuple[list[Slots | None], Left]:
    """For each parameter all of its state, or None where it stays: no part of one is set."""
    found: list[Slots | None] = []
    different = list(left.different)
    for variable, partner in zip(own.variables, partners, strict=True):
        slots = {w: pairs[name] for w, name in variable.slots.items() if name in pairs}
        is_whole = partner is not None and len(slots) == len(partner.slots)
        found.append(slots if is_whole else None)
        if not is_whole:
            different += [f"{word} of '{variable.name}': stays, as the rest does" for word in slots]
    return found, left._replace(different=tuple(different))


def _check_slots(
    optimizer: Any,
    settings: Sequence[Mapping[str, Any]],
    own: Snapshot,
    found: Sequence[Slots | None],
) -> None:
    """Raise ValueError if a parameter would have a part of the state that its group asks for."""
    rest = zip(own.variables, found, strict=True)
    for group, new in zip(optimizer.param_groups, settings, strict=True):
        wanted = {_WORDS[name] for name in dropin._slot_names({**group, **new})}
        for _ in group["params"]:
            variable, slots = next(rest)
            missing = sorted(wanted - {*slots}) if slots else []
            if missing:
                raise ValueError(
                    f"The state of parameter '{variable.name}' must be complete, or not there at "
                    f"all. In the file it has {sorted(slots or ())} and lacks {missing}."
                )


def _set(optimizer: Any, p: Any, group: Mapping[str, Any], slots: Slots) -> None:
    """Give a parameter this state; memory that fits is used again."""
    if not slots:
        optimizer.state.pop(p, None)
        return
    held = optimizer.state.get(p) or {}
    new = {}
    with making_state():
        for key in ("step", *(NAMES[word] for word in slots if word != "step")):
            value = slots[_WORDS[key]].read()
            if key == "step":
                is_ours = isinstance(optimizer, dropin.Adam)
                new[key] = _new_step(int(value), p, group, is_ours)
                continue
            slot = held.get(key)
            if not _fits(slot, p):
                held.pop(key, None)  # one more tensor at a time, and not two
                slot = zeros_like(p, _slot_dtype(p.dtype))
            dropin._write(slot, torch.from_numpy(np.require(value, requirements=["C", "W"])))
            new[key] = slot
    optimizer.state[p] = new


def _fits(slot: Any, p: torch.Tensor) -> bool:
    """Whether memory can hold the state of a parameter as it is made for it."""
    return (
        isinstance(slot, torch.Tensor)
        and slot.layout == torch.strided
        and (slot.shape, slot.dtype, slot.device) == (p.shape, _slot_dtype(p.dtype), p.device)
        and sharded.lies_like(slot, p)
    )


def _new_step(count: int, p: torch.Tensor, group: Mapping[str, Any], is_ours: bool) -> Any:
    step = dropin._step(None, "", {"fused": group.get("fused")})
    if int(step.fill_(count)) != count:  # float32 counts to 2**24
        step = torch.tensor(count, dtype=torch.float64, device="cpu")
    is_on_device = not is_ours and (group.get("fused") or group.get("capturable"))
    return step.to(p.device, torch.float32) if is_on_device else step


def create(kind: Any, given: Snapshot, custom_objects: Mapping[str, Any], *, by: str) -> Any:
    """Raise ValueError: torch's optimizers are made with their parameters."""
    raise ValueError(
        f"An optimizer of PyTorch is made with its parameters, and not from a file alone: "
        f"optimizer = {given.kind.rpartition('.')[2]}(model.named_parameters()), then "
        "omniadam.load(path, optimizer), which restores its groups as well."
    )
