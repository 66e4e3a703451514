"""From any generation of Keras's Adam to `omniadam.Adam`, with its state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import options, schedules
from ..adam import Adam, AdamW
from ..schedules import is_schedule
from ..state import Weights, host
from . import contrib_keras, optimizer_v2
from .older import Older

Array = npt.NDArray[Any]

_CLASSES: dict[str, type[Adam]] = {"Adam": Adam, "AdamW": AdamW}
# In the configs of tf_keras; neither changes a number.
_WITHOUT_EFFECT = ("jit_compile", "is_legacy_optimizer")


def migrate(optimizer: Any) -> Adam:
    """An `omniadam.Adam` that goes on where an optimizer of any generation of Keras stands.

    Args:
        optimizer: an Adam or AdamW of TensorFlow 1.1 or 2.0 as `omniadam.compat` has them, of
            `tf_keras` (legacy or not), of Keras 3, or of omniadam; or what its `get_config()` or
            Keras's `serialize()` returned.

    Returns:
        An optimizer of the same behaviour, with the count of iterations, and with the moments: they
        are for as many variables, of the same shapes and in the same order, which it is built with
        next. What is passed in is not changed.

    Raises:
        TypeError: if it is no optimizer and no dictionary.
        ValueError: if it is no Adam, or a setting has no equivalent; it says which. If a checkpoint
            was restored into it and it has made no step since, which tells the order of variables.

    Example:
        >>> from omniadam import migrate
        >>> from omniadam.compat import optimizer_v2
        >>> old = optimizer_v2.Adam(lr=0.1, decay=0.5, clipnorm=1.0)
        >>> migrate(old).learning_rate, migrate(old.get_config()).clipnorm
        (0.1, 1.0)
    """
    if isinstance(optimizer, Mapping):
        return _of_config(optimizer)
    if isinstance(optimizer, Adam):
        return copy.deepcopy(optimizer)
    if isinstance(optimizer, Older):
        return _of_older(optimizer)
    kind = type(optimizer)
    library, _, module = kind.__module__.partition(".")
    if library not in ("keras", "tf_keras") or not hasattr(optimizer, "get_config"):
        raise TypeError(
            "`migrate` takes an Adam of omniadam, Keras or tf_keras, or its config. Received: "
            f"{kind.__module__}.{kind.__qualname__}."
        )
    if kind.__name__ not in _CLASSES:
        raise ValueError(f"Only Adam and AdamW can be migrated. Received: {kind.__name__}.")
    if "optimizers.legacy" in module:
        return _of_legacy(optimizer)
    return _of_keras(optimizer, is_tf_keras=library == "tf_keras")


def _of_config(config: Mapping[str, Any]) -> Adam:
    if isinstance(config.get("config"), Mapping):
        name = config.get("class_name")
        if name not in _CLASSES:
            raise ValueError(f"Only Adam and AdamW can be migrated. Received: {name!r}.")
        inner = dict(config["config"])
        # The class is known here, where otherwise its settings have to tell.
        if name == "AdamW" or "weight_decay" in inner:
            return _CLASSES[name].from_config(_without_effect(inner))
        return _of_config(inner)
    config = _without_effect(config)
    if "lr" in config and "name" not in config:
        # Of the Keras between the two generations, where epsilon may be None.
        amsgrad = config.pop("amsgrad", False)
        if config.get("epsilon", 0.0) is None:
            config["epsilon"] = 1e-7
        older: Older = _checked(contrib_keras.Adam.from_config, config)
        adam = _of_older(older)
        adam.amsgrad = amsgrad
        return adam
    if "decay" in config or "lr" in config:
        return _of_older(_checked(optimizer_v2.Adam.from_config, config))
    return Adam.from_config(config)


def _without_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}


def _checked(from_config: Callable[[Any], Any], config: Mapping[str, Any]) -> Any:
    try:
        return from_config(config)
    except TypeError as error:
        raise ValueError(f"The config is of no known generation of Adam: {error}") from error


def _of_older(optimizer: Older) -> Adam:
    engine = optimizer._engine
    if engine.constraints:
        raise _no_equivalent("`constraints`", "Apply them to the variables after each step.")
    if isinstance(optimizer, contrib_keras.Adam) and optimizer._has_own_gradients:
        raise _no_equivalent("`get_gradients` of your own", "Apply the gradients it returns.")
    if optimizer._extra:
        names = sorted({name for name, _ in optimizer._extra})
        raise _no_equivalent(f"`add_slot` of {names}", "Keep those values yourself.")
    if not engine.built and engine._state.awaited is not None:
        raise ValueError(
            "State was loaded into this optimizer, or set, and waits for its first step. Make one, "
            "and migrate it then."
        )
    settings = {name: optimizer._plain(name) for name in optimizer._hyper}
    count, *_ = optimizer.get_weights() or [np.array(0)]
    read = host if engine._state.backend is None else engine._state.backend.numpy
    columns = zip(*engine.slots(), strict=True)
    state = [[read(slot) for slot in column] for column in columns] or None
    return _adam(
        settings,
        {name: getattr(engine, name) for name in ("clipnorm", "clipvalue", "global_clipnorm")},
        amsgrad=engine.amsgrad,
        name=engine.name,
        iterations=int(count),
        slots=state,
    )


def _of_legacy(optimizer: Any) -> Adam:
    """Of `tf_keras.optimizers.legacy`, which is TensorFlow 2.0's."""
    if optimizer.gradient_transformers:
        raise _no_equivalent("`gradient_transformers`", "Change gradients before applying them.")
    config = optimizer.get_config()
    settings = {name: float(config[name]) for name in ("decay", "beta_1", "beta_2", "epsilon")}
    for name, value in optimizer._hyper.items():  # a config would hold what it now returns
        if callable(value):
            settings[name] = value
    settings.setdefault("learning_rate", config["learning_rate"])
    weights = [np.asarray(weight) for weight in optimizer.get_weights()]
    slots = None
    if len(weights) > 1:
        kinds = 3 if optimizer.amsgrad else 2
        count = (len(weights) - 1) // kinds
        if optimizer.get_slot_names()[:kinds] != ["m", "v", "vhat"][:kinds] or (
            len(weights) != 1 + kinds * count
        ):
            names = sorted(set(optimizer.get_slot_names()) - {"m", "v", "vhat"})
            raise _no_equivalent(f"slots {names or 'of variables of their own'}", "Keep them.")
        slots = [weights[1 + k * count : 1 + (k + 1) * count] for k in range(kinds)]
    return _adam(
        settings,
        {name: config.get(name) for name in ("clipnorm", "clipvalue", "global_clipnorm")},
        amsgrad=optimizer.amsgrad,
        name=config["name"],
        iterations=int(weights[0]) if weights else 0,
        slots=slots,
    )


def _adam(
    settings: dict[str, Any],
    clips: Mapping[str, Any],
    *,
    amsgrad: bool,
    name: str,
    iterations: int,
    slots: Sequence[Sequence[Array]] | None,
) -> Adam:
    """Of the settings of an older generation: `slots` are all m, all v, and perhaps all vhat."""
    given = {name: value for name, value in clips.items() if value is not None}
    if len(given) > 1:
        raise _no_equivalent(f"{' and '.join(f'`{name}`' for name in given)} together", "Use one.")
    if 0 in given.values():
        raise _no_equivalent(f"clipping at 0, {given}", "Nothing is learned with it.")
    rate, decay = settings["learning_rate"], settings.pop("decay")
    if callable(decay):
        raise _no_equivalent("`decay` that is a callable or tensor", "Give a number.")
    if decay and callable(rate):
        what = "schedule" if is_schedule(rate) else "callable or tensor"
        raise _no_equivalent(
            f"`decay` with a learning rate that is a {what}",
            "Write one schedule that does both.",
        )
    if decay:
        settings["learning_rate"] = schedules.InverseTimeDecay(float(rate), 1, decay)
    elif is_schedule(rate):
        settings["learning_rate"] = schedules.traceable(rate)
    adam = Adam(**settings, **given, amsgrad=amsgrad, name=name)
    adam._state.iteration[...] = options.count("iterations", iterations)
    if slots is not None:
        moments = [slot for pair in zip(*slots[:2], strict=True) for slot in pair]
        hats = [slot for column in slots[2:] for slot in column]
        adam._state.awaited = Weights([*moments, *hats])
    return adam


def _of_keras(optimizer: Any, *, is_tf_keras: bool) -> Adam:
    """Of Keras 3, and of `tf_keras` as of TensorFlow 2.11, whose settings have the same names."""
    config = _without_effect(optimizer.get_config())
    if is_tf_keras and config.get("use_ema"):
        raise _no_equivalent("the first moving average of tf_keras", "Use `use_ema=False`.")
    if getattr(optimizer, "_exclude_from_weight_decay", None):
        raise _no_equivalent(
            "exclude_from_weight_decay(var_list)", "Exclude variables by `var_names`."
        )
    rate = optimizer.__dict__.get("_learning_rate")
    if callable(rate):  # a schedule of the user's is in a config by its name only
        config["learning_rate"] = schedules.traceable(rate)
    adam = _CLASSES[type(optimizer).__name__].from_config(config)
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if pattern is not None:
        adam.exclude_from_weight_decay(var_names=[pattern.pattern])
    variables = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
    weights = [_floats(variable) for variable in variables]
    adam._state.iteration[...] = options.count("iterations", weights[0])
    slots = weights[1 if is_tf_keras else len(adam.variables) :]  # which has no rate among them
    if slots:
        adam._state.awaited = Weights(slots)
    return adam


def _floats(variable: Any) -> Array:
    value = host(variable)
    return value if value.dtype.kind in "iuf" else value.astype(np.float32)


def _no_equivalent(what: str, hint: str) -> ValueError:
    return ValueError(f"omniadam.Adam has no equivalent of {what}. {hint}")
