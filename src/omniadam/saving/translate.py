"""State of one generation as that of another, where both mean the same.

Every generation is translated to Keras 3's and from it. What decides the numbers of the next step
comes along, the form of epsilon too, or is an error; shapes and names stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .snapshot import (
    CONTRIB_KERAS,
    ITERATION,
    KERAS,
    OPTAX,
    OPTIMIZER_V2,
    TORCH,
    Snapshot,
    Tensor,
    Variable,
)

# The generation of each class that a file may name.
GENERATIONS = {
    "omniadam.Adam": KERAS,
    "omniadam.AdamW": KERAS,
    "omniadam.keras.Adam": KERAS,
    "omniadam.keras.AdamW": KERAS,
    "omniadam.torch.Adam": TORCH,
    "omniadam.torch.AdamW": TORCH,
    "omniadam.compat.optimizer_v2.Adam": OPTIMIZER_V2,
    "omniadam.compat.contrib_keras.Adam": CONTRIB_KERAS,
    "optax": OPTAX,
}


def translated(snapshot: Snapshot, kind: str) -> Snapshot:
    """The same state for another class.

    Args:
        snapshot: of any class.
        kind: a name in `GENERATIONS`.

    Returns:
        The snapshot itself, if it is of that class. Tensors are read when they are wanted.

    Raises:
        ValueError: if the class is not known, or something has no equivalent there; it says what.
    """
    wanted = GENERATIONS.get(kind)
    if wanted is None:
        raise ValueError(f"State is translated for {', '.join(GENERATIONS)}. Received: {kind!r}.")
    if (snapshot.generation, snapshot.kind) == (wanted, kind):
        return snapshot
    if snapshot.generation == wanted != KERAS:
        return replace(snapshot, kind=kind)
    if snapshot.generation != KERAS:
        snapshot = _TO_KERAS[snapshot.generation](snapshot)
    if wanted == KERAS:
        return _of_class(snapshot, kind)
    return replace(_FROM_KERAS[wanted](snapshot), kind=kind, generation=wanted)


def _no_equivalent(what: str, hint: str) -> ValueError:
    return ValueError(f"There is no equivalent of {what}. {hint}")


def _of_class(snapshot: Snapshot, kind: str) -> Snapshot:
    """Of Keras 3, for one of its classes."""
    settings = dict(snapshot.settings)
    if kind.endswith("AdamW") and settings and settings.get("weight_decay") is None:
        settings["weight_decay"] = 0.0  # which must be a number there
    return replace(snapshot, kind=kind, settings=settings)


def _renamed(variables: Iterable[Variable], words: Sequence[str]) -> tuple[Variable, ...]:
    """Variables with these slots under their usual names."""
    return tuple(
        v._replace(slots={word: f"{v.name}.{word}" for word in words}, extension=0)
        for v in variables
    )


def _slots_of(
    variables: Sequence[Variable], snapshot: Snapshot, words: Sequence[str]
) -> dict[str, Tensor]:
    """Their tensors; raises ValueError if one lacks one."""
    tensors = {}
    for variable in variables:
        missing = [word for word in words if word not in variable.slots]
        if missing:
            raise ValueError(
                f"All variables must have {list(words)}. '{variable.name}' lacks {missing}: it "
                "never had a gradient, or it was saved with other settings."
            )
        for word in words:
            tensors[f"{variable.name}.{word}"] = snapshot.tensors[variable.slots[word]]
    return tensors


def _count(snapshot: Snapshot) -> int:
    """How many steps all variables have made; raises ValueError if that is no one number."""
    steps: dict[int, list[str]] = {}
    for variable in snapshot.variables:
        name = variable.slots.get("step")
        count = 0 if name is None else int(snapshot.tensors[name].read())
        steps.setdefault(count, []).append(variable.name)
    if len(steps) != 1:
        shown = "; ".join(f"{count}: {names[:4]}" for count, names in sorted(steps.items()))
        raise _no_equivalent(
            f"variables that have made steps of different numbers ({shown or 'there are none'})",
            "The others count for all variables together. (PyTorch counts no step for a parameter "
            "without a gradient.)",
        )
    return next(iter(steps))


def _counted(count: int) -> Tensor:
    return Tensor.of(np.array(count, np.int64))


# --- PyTorch ---

# What a group has for its implementation, or for what reads it beside the optimizer.
_NO_SETTINGS = {"params", "foreach", "fused", "capturable", "differentiable", "initial_lr"}
_EXTRAS = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum")


def _of_torch(snapshot: Snapshot) -> Snapshot:
    groups = snapshot.settings["groups"]
    group, excluded = _one_group(groups)
    if group.get("maximize"):
        raise _no_equivalent("`maximize=True`", "Negate the loss.")
    complex_ones = [v.name for v in snapshot.variables if v.dtype.startswith("complex")]
    if complex_ones:
        raise _no_equivalent(f"complex parameters, {complex_ones}", "They are PyTorch's alone.")
    decay = group.get("weight_decay", 0)
    if decay and not group.get("decoupled_weight_decay"):
        is_known = "decoupled_weight_decay" in group
        raise _no_equivalent(
            f"`weight_decay={decay}` "
            + ("as an L2 penalty" if is_known else "of which the file does not tell whether it is "
               "decoupled: it is of an older PyTorch"),
            "Only AdamW's decays parameters apart from the gradient."
            if is_known
            else "Load it into the optimizer that it is of, and save it again.",
        )  # fmt: skip
    beta_1, beta_2 = group["betas"]
    settings: dict[str, Any] = {
        "learning_rate": group["lr"],
        "beta_1": beta_1,
        "beta_2": beta_2,
        "epsilon": group["eps"],
        "amsgrad": bool(group["amsgrad"]),
        "epsilon_hat": bool(group.get("epsilon_hat")),
        **{key: group[key] for key in _EXTRAS if group.get(key) is not None},
    }
    if decay:
        settings["weight_decay"] = decay
    config = _config("AdamW" if decay else "Adam", settings)
    if excluded:
        config["exclude_from_weight_decay"] = {"var_names": [], "variables": excluded}
    words = ["momentum", "velocity"]
    words += ["velocity_hat"] if settings["amsgrad"] else []
    words += ["average"] if settings.get("use_ema") else []
    count = _count(snapshot)
    tensors = _slots_of(snapshot.variables, snapshot, words)
    return replace(
        snapshot,
        kind=f"omniadam.{'AdamW' if decay else 'Adam'}",
        generation=KERAS,
        settings=config,
        variables=_renamed(snapshot.variables, words),
        tensors={ITERATION: _counted(count), **tensors},
    )


def _one_group(groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The settings of all groups, and the parameters that alone do not decay."""
    plain = [{k: v for k, v in g.items() if k not in _NO_SETTINGS} for g in groups]
    decays = {g.get("weight_decay", 0) for g in plain}
    excluded: list[str] = []
    if len(decays) == 2 and 0 in decays and all(g.get("decoupled_weight_decay") for g in plain):
        decay = max(decays)
        excluded = [n for g in groups if not g.get("weight_decay", 0) for n in g["params"]]
        plain = [{**g, "weight_decay": decay} for g in plain]
    keys = dict.fromkeys(key for g in plain for key in g)
    differing = [k for k in keys if any(g.get(k) != plain[0].get(k) for g in plain)]
    if differing or not plain:
        raise _no_equivalent(
            f"parameter groups with settings of their own, {differing}",
            "The groups must agree in all but the weight decay, which some may not have.",
        )
    return plain[0], excluded


def _config(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config of an optimizer with these settings."""
    from .. import adam

    config: dict[str, Any] = getattr(adam, name)(**settings).get_config()
    return config


def _to_torch(snapshot: Snapshot) -> Snapshot:
    settings = _known_settings(snapshot)
    rate = settings["learning_rate"]
    if isinstance(rate, Mapping):
        raise _no_equivalent(
            "a learning rate that is a schedule",
            "PyTorch's schedulers stand beside the optimizer: set a number before you save.",
        )
    _refuse(settings, "loss_scale_factor", "Use torch.amp.GradScaler.")
    _refuse(settings, "gradient_accumulation_steps", "Add gradients up before each step.")
    if settings.get("use_ema"):
        _refuse(settings, "ema_overwrite_frequency", "Overwrite parameters in the loop.")
    decay = settings.get("weight_decay")
    group = {
        "lr": rate,
        "betas": [settings["beta_1"], settings["beta_2"]],
        "eps": settings["epsilon"],
        "weight_decay": decay or 0,
        "amsgrad": settings["amsgrad"],
        "maximize": False,
        "decoupled_weight_decay": bool(decay),
        "epsilon_hat": settings.get("epsilon_hat", True),
        **{key: settings[key] for key in _EXTRAS},
    }
    words = ["momentum", "velocity"]
    words += ["velocity_hat"] if settings["amsgrad"] else []
    words += ["average"] if settings["use_ema"] else []
    tensors = _slots_of(snapshot.variables, snapshot, words)
    _check_nothing_else(snapshot, ())
    count = int(snapshot.tensors[ITERATION].read())
    for v in snapshot.variables:
        since = int(snapshot.tensors[f"extension.{v.extension}"].read()) if v.extension else 0
        # -1: it has not made a step yet.
        tensors[f"{v.name}.step"] = _counted(count - since if since >= 0 else 0)
    names = [v.name for v in snapshot.variables]
    free = set(filter(_exclusion(settings), names)) if decay else set()
    groups = [{**group, "params": [name for name in names if name not in free]}]
    if free:
        without = {**group, "weight_decay": 0}
        groups.append({**without, "params": [name for name in names if name in free]})
    by_group = {name: i for i, g in enumerate(groups) for name in g["params"]}
    ordered = sorted(snapshot.variables, key=lambda v: by_group[v.name])
    return replace(
        snapshot,
        settings={"groups": groups},
        variables=_renamed(ordered, [*words, "step"]),
        tensors=tensors,
    )


def _exclusion(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a variable of this name does not decay."""
    excluded = settings.get("exclude_from_weight_decay") or {}
    patterns, exact = excluded.get("var_names") or (), excluded.get("variables") or ()
    return lambda name: name in exact or any(re.search(each, name) for each in patterns)


def _refuse(settings: Mapping[str, Any], key: str, hint: str) -> None:
    if settings.get(key) is not None:
        raise _no_equivalent(f"`{key}={settings[key]!r}`", hint)


def _known_settings(snapshot: Snapshot) -> Mapping[str, Any]:
    if not snapshot.is_complete or "epsilon" not in snapshot.settings:
        raise ValueError(
            "The settings must be known, to be translated. The file does not tell them, only "
            f"{sorted(snapshot.settings)}: give those of the optimizer that it is of."
        )
    return snapshot.settings


def _check_nothing_else(snapshot: Snapshot, kept: Iterable[str]) -> None:
    """Raise ValueError if there is state that none of the generations has."""
    own = {name for v in snapshot.variables for name in v.slots.values()} | {ITERATION, *kept}
    others = [n for n in snapshot.tensors if n not in own and not n.startswith("extension.")]
    words = {word for v in snapshot.variables for word in v.slots}
    others += sorted(words & {"gradient_accumulator"})
    if others:
        raise _no_equivalent(f"the state {others[:8]}", "It is of a rule or a setting of its own.")


# --- the older generations ---


def _of_older(snapshot: Snapshot) -> Snapshot:
    from ..compat.migration import migrate

    is_known = snapshot.is_complete and bool(snapshot.settings)
    settings = migrate(dict(snapshot.settings)).get_config() if is_known else {}
    return replace(snapshot, kind="omniadam.Adam", generation=KERAS, settings=settings)


def _to_optimizer_v2(snapshot: Snapshot) -> Snapshot:
    from ..compat import optimizer_v2

    settings = _older_settings(snapshot)
    rate, decay = _rate_and_decay(settings["learning_rate"])
    config = {
        "name": settings["name"],
        "learning_rate": rate,
        "decay": decay,
        "amsgrad": settings["amsgrad"],
        **{key: settings[key] for key in ("beta_1", "beta_2", "epsilon")},
    }
    clips = ("clipnorm", "clipvalue", "global_clipnorm")
    config |= {key: settings[key] for key in clips if settings.get(key) is not None}
    made: Any = optimizer_v2.Adam.from_config(config)
    return _as_older(snapshot, made.get_config(), settings["amsgrad"])


def _to_contrib_keras(snapshot: Snapshot) -> Snapshot:
    from ..compat import contrib_keras

    settings = _older_settings(snapshot)
    if settings["amsgrad"]:
        raise _no_equivalent("`amsgrad=True`", "TensorFlow 1.1 has none.")
    _refuse(settings, "clipnorm", "TensorFlow 1.1 clips by the norm of all gradients together.")
    rate, decay = _rate_and_decay(settings["learning_rate"])
    if isinstance(rate, Mapping):
        raise _no_equivalent("a learning rate that is a schedule", "Set a number.")
    config = {"lr": rate, "decay": decay}
    config |= {key: settings[key] for key in ("beta_1", "beta_2", "epsilon")}
    for key, theirs in (("global_clipnorm", "clipnorm"), ("clipvalue", "clipvalue")):
        if settings.get(key) is not None:
            config[theirs] = settings[key]
    made: Any = contrib_keras.Adam.from_config(config)
    return _as_older(snapshot, made.get_config(), False)


def _older_settings(snapshot: Snapshot) -> Mapping[str, Any]:
    settings = _known_settings(snapshot)
    for key in ("weight_decay", "loss_scale_factor", "gradient_accumulation_steps"):
        _refuse(settings, key, "The older generations have none.")
    if settings.get("use_ema"):
        raise _no_equivalent("`use_ema=True`", "The older generations keep no averages.")
    if not settings.get("epsilon_hat", True):
        raise _no_equivalent(
            "`epsilon_hat=False`", "The older generations have epsilon as Keras has it only."
        )
    if any(v.extension for v in snapshot.variables):
        raise _no_equivalent("`extend`", "The older generations count for all variables together.")
    return settings


def _rate_and_decay(rate: Any) -> tuple[Any, float]:
    """A schedule that the older generations have as a number beside the rate."""
    if isinstance(rate, Mapping) and rate.get("class_name") == "InverseTimeDecay":
        config = rate.get("config", {})
        if config.get("decay_steps") == 1 and not config.get("staircase"):
            return config["initial_learning_rate"], config["decay_rate"]
    return rate, 0.0


def _as_older(snapshot: Snapshot, config: Mapping[str, Any], amsgrad: bool) -> Snapshot:
    words = ["momentum", "velocity", *(["velocity_hat"] if amsgrad else [])]
    _check_nothing_else(snapshot, ())
    tensors = _slots_of(snapshot.variables, snapshot, words)
    return replace(
        snapshot,
        settings=config,
        variables=_renamed(snapshot.variables, words),
        tensors={ITERATION: snapshot.tensors[ITERATION], **tensors},
    )


# --- optax ---

# Of the leaves beside Adam's: counts of schedules, which go with the steps, and settings.
_BESIDE = re.compile(r"\.count$|\.hyperparams")
_NARROW = ("float16", "bfloat16")


def _of_optax(snapshot: Snapshot) -> Snapshot:
    """What optax keeps has no settings: only the form of epsilon is known, and that is optax's."""
    if not snapshot.variables:
        raise ValueError(
            "The tree must hold the state of one Adam (`count`, `mu` and `nu`), whose parameters "
            f"have names of their own, to be translated. It has {list(snapshot.tensors)[:12]}."
        )
    beside = [name for name in snapshot.tensors if _BESIDE.search(name)]
    _check_nothing_else(snapshot, beside)
    words = ("momentum", "velocity")
    tensors = _slots_of(snapshot.variables, snapshot, words)
    wrong = [name for name, t in tensors.items() if not t.dtype.startswith(("float", "bfloat"))]
    if wrong:
        raise _no_equivalent(f"state that is not of floating type, {wrong[:8]}", "")
    variables = _renamed(snapshot.variables, words)
    return replace(
        snapshot,
        kind="omniadam.Adam",
        generation=KERAS,
        settings={"epsilon_hat": False, **snapshot.settings},
        is_complete="epsilon" in snapshot.settings,
        # Of a list, names are positions.
        variables=tuple(v._replace(is_named=not _is_position(v.name)) for v in variables),
        tensors={
            ITERATION: _counted(_count(snapshot)),
            **{name: _widened(tensor) for name, tensor in tensors.items()},
        },
    )


def _is_position(name: str) -> bool:
    return all(part.isdecimal() for part in name.split("/"))


def _widened(tensor: Tensor) -> Tensor:
    if tensor.dtype not in _NARROW:
        return tensor
    return Tensor(tensor.shape, "float32", lambda: tensor.read().astype(np.float32))


def _to_optax(snapshot: Snapshot) -> Snapshot:
    """The state of `optax.adam` on parameters in nested dictionaries, whose keys are the names'."""
    settings = snapshot.settings
    if settings.get("amsgrad"):
        raise _no_equivalent("`amsgrad=True`", "optax keeps it as another state.")
    if settings.get("use_ema"):
        raise _no_equivalent("`use_ema=True`", "optax keeps averages elsewhere.")
    _refuse(settings, "gradient_accumulation_steps", "Use optax.MultiSteps.")
    if any(v.extension for v in snapshot.variables):
        raise _no_equivalent("`extend`", "optax counts for all parameters together.")
    _check_nothing_else(snapshot, ())
    moments = _slots_of(snapshot.variables, snapshot, ("momentum", "velocity"))
    count = int(snapshot.tensors[ITERATION].read())
    if count >= 2**31:
        raise _no_equivalent(f"{count} steps", "optax counts to 2**31 - 1.")
    tensors = {"[0].count": Tensor.of(np.array(count, np.int32))}
    variables = []
    for v in snapshot.variables:
        path = "".join(f"[{part!r}]" for part in v.name.split("/"))
        slots = {"momentum": f"[0].mu{path}", "velocity": f"[0].nu{path}", "step": "[0].count"}
        variables.append(v._replace(slots=slots))
        for word in ("momentum", "velocity"):
            tensors[slots[word]] = moments[f"{v.name}.{word}"]
    return replace(snapshot, variables=tuple(variables), tensors=tensors)


_TO_KERAS: Mapping[str, Callable[[Snapshot], Snapshot]] = {
    TORCH: _of_torch,
    OPTIMIZER_V2: _of_older,
    CONTRIB_KERAS: _of_older,
    OPTAX: _of_optax,
}
_FROM_KERAS: Mapping[str, Callable[[Snapshot], Snapshot]] = {
    TORCH: _to_torch,
    OPTIMIZER_V2: _to_optimizer_v2,
    CONTRIB_KERAS: _to_contrib_keras,
    OPTAX: _to_optax,
}
