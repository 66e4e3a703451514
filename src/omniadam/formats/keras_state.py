"""What files of Keras, tf_keras and TensorFlow keep of an Adam: which settings, and which arrays.

Files with the arrays in a list, by number, are told apart by the settings, which say what was kept;
where a file has none, by the shapes, if only one order of arrays has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..saving.names import in_file
from ..saving.snapshot import ITERATION, KERAS, OPTIMIZER_V2, Snapshot, Tensor, Variable
from .source import Array, tensor

# In the configs of tf_keras; neither changes a number.
_WITHOUT_EFFECT = ("jit_compile", "is_legacy_optimizer")
# The order in which Keras keeps them; momentum and velocity alternate.
_BEFORE, _AFTER = ("average", "gradient_accumulator"), ("velocity_hat",)
# Which settings say that a slot is kept.
KEPT = {
    "average": "use_ema",
    "gradient_accumulator": "gradient_accumulation_steps",
    "velocity_hat": "amsgrad",
}
# Of a config. All that it says is in memory.
MOST_TEXT = 1 << 26
# Optimizers around an Adam: Keras's and tf_keras's.
SCALING = ("LossScaleOptimizer", "LossScaleOptimizerV3")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Known(NamedTuple):
    """What a file says of an optimizer beside its state."""

    kind: str
    generation: str
    settings: Mapping[str, Any]
    is_complete: bool = True
    is_tf_keras: bool = False  # of its optimizers that are not legacy


UNKNOWN = Known("omniadam.Adam", KERAS, {}, is_complete=False)


class Stored(NamedTuple):
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]
    places: tuple[Any, ...]  # all of which have it; what they are is the format's


class Held(NamedTuple):
    """The state in a file."""

    known: Known
    iteration: Stored
    # Settings that are kept as arrays, the learning rate above all.
    numbers: Mapping[str, Stored]
    variables: tuple[tuple[Variable, Mapping[str, Stored]], ...]
    # Of each extension, its count.
    counts: tuple[Stored, ...] = ()


# --- settings ---


def parsed(text: str | bytes, what: str) -> Mapping[str, Any]:
    """What JSON says, which must be a mapping."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"its {what} has {len(text)} bytes. At most {MOST_TEXT} are read")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"its {what} is no mapping")
    return found


def of_config(config: Any) -> Known:
    """Of an optimizer as Keras serializes it: class and settings.

    Raises:
        ValueError: if it is no Adam, or a setting is none of Adam's, or is out of its range.
    """
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise ValueError("it does not say what its optimizer is")
    name, settings = config.get("class_name"), dict(config["config"])
    if name in SCALING:
        return of_config(settings.get("inner_optimizer"))
    module = str(config.get("module") or "")
    owner = str(config.get("registered_name") or name).rpartition(">")[0]
    plain = str(name).rpartition(">")[2]
    if plain not in ("Adam", "AdamW") or owner not in ("", "omniadam", "Custom"):
        shown = config.get("registered_name") or name
        raise ValueError(f"its optimizer is {shown!r}, and only Adam and AdamW are known")
    if "lr" in settings:
        raise ValueError(
            "its optimizer is of a Keras before TensorFlow 2, whose setting is `lr`: load it "
            "there, and pass its config and its weights to omniadam.compat"
        )
    is_tf_keras = any(key in settings for key in _WITHOUT_EFFECT)
    for key in _WITHOUT_EFFECT:
        settings.pop(key, None)
    if "decay" in settings or module.endswith(".legacy"):
        kind, generation = "omniadam.compat.optimizer_v2.Adam", OPTIMIZER_V2
        if plain != "Adam":
            raise ValueError(f"its optimizer is {name!r} of TensorFlow 2.0, which had only Adam")
    else:
        kind, generation = f"omniadam.{plain}", KERAS
    known = Known(kind, generation, settings, is_tf_keras=is_tf_keras and generation == KERAS)
    check_settings(known)
    return known


def class_of(known: Known) -> Any:
    """Our class."""
    from .. import adam
    from ..compat import optimizer_v2

    return (
        optimizer_v2.Adam
        if known.generation == OPTIMIZER_V2
        else getattr(adam, known.kind.rpartition(".")[2])
    )


def check_settings(known: Known) -> None:
    """Raise ValueError if our class does not have these settings."""
    settings = dict(known.settings)
    settings.pop("extensions", None)
    if isinstance(settings.get("learning_rate"), dict):  # a schedule, of its user's perhaps
        settings["learning_rate"] = 0.001
    try:
        class_of(known).from_config(settings)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the settings of its optimizer are none of Adam's: {error}") from error


# --- arrays by number ---


class _Order(NamedTuple):
    """Which of the arrays is what."""

    has_rate: bool
    variables: tuple[tuple[int, Mapping[str, int]], ...]  # extension, and numbers by word
    counts: tuple[int, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.variables[0][1]) if self.variables else ()


def ordered(
    stored: Sequence[Stored],
    known: Known,
    settings: Mapping[str, Any] | None,
    names: Callable[[Mapping[str, int]], tuple[str, bool] | None] = lambda slots: None,
) -> Held:
    """State of a list of arrays.

    Args:
        stored: the arrays, in order.
        known: what the file says of the optimizer.
        settings: what its user says of it, for what the file does not.
        names: of the numbers of a variable's slots, its name and whether it is its user's.
    """
    if not stored or not _is_count(stored[0]):
        raise ValueError("its optimizer has no count of steps where Keras keeps it")
    says = {**(settings or {}), **known.settings}
    orders = list(_orders(stored, known, says))
    if not orders:
        raise ValueError(
            f"its optimizer has {len(stored)} arrays of shapes {_some(stored)}, in which there is "
            + f"no order that an Adam's {'with these settings ' if says else ''}have"
        )
    words = {order.words for order in orders}
    if len(orders) > 1 and (len(words) > 1 or orders[0].variables):
        raise ValueError(
            "it does not tell what its arrays are: they may be "
            + ", or ".join(
                f"{len(o.variables)} variables with {', '.join(o.words)}" for o in orders
            )
            + ". Pass the settings of the optimizer, or use a .keras file, which holds them"
        )
    order = orders[0]
    later = iter([name for part in _extensions(says) for name in part])
    variables = []
    for i, (extension, slots) in enumerate(order.variables):
        if extension:
            name = next(later)
            found = in_file(name)
        else:
            found = names(slots) or (str(i), False)
        variables.append(_variable(*found, {w: stored[k] for w, k in slots.items()}, extension))
    if len({variable.name for variable, _ in variables}) < len(variables):
        variables = [
            (v._replace(name=str(i), is_named=False), s) for i, (v, s) in enumerate(variables)
        ]
    return Held(
        known,
        stored[0],
        {"learning_rate": stored[1]} if order.has_rate else {},
        tuple(variables),
        tuple(stored[k] for k in order.counts),
    )


def variable(
    name: str, is_named: bool, slots: Mapping[str, Stored], dtype: str = "", extension: int = 0
) -> tuple[Variable, Mapping[str, Stored]]:
    """A variable and what is kept for it.

    Raises:
        ValueError: if its slots are not of one shape, or hold no floats.
    """
    found = _variable(name, is_named, slots, extension, dtype)
    shapes = {each.shape for each in slots.values()}
    types = {each.dtype for each in slots.values()}
    if len(shapes) != 1 or not types <= set(_FLOATS):
        raise ValueError(
            f"what is kept for '{name}' must be floats of one shape. Received: "
            + ", ".join(f"{w} {s.dtype} {s.shape}" for w, s in slots.items())
        )
    return found


def _variable(
    name: str,
    is_named: bool,
    slots: Mapping[str, Stored],
    extension: int = 0,
    dtype: str = "",
) -> tuple[Variable, Mapping[str, Stored]]:
    first = slots["momentum"]
    tensors = {word: f"{name}.{word}" for word in slots}
    return Variable(name, first.shape, dtype or first.dtype, tensors, is_named, extension), slots


def _orders(stored: Sequence[Stored], known: Known, says: Mapping[str, Any]) -> Iterator[_Order]:
    """Every order in which they could be an Adam's."""

    def may(word: str) -> tuple[bool, ...]:
        setting = KEPT[word]
        if known.is_complete or setting in says:
            return (bool(says.get(setting)),)
        return (False, True)

    rates: tuple[bool, ...] = (False, True)
    if known.is_complete:
        rates = (not known.is_tf_keras and not isinstance(says.get("learning_rate"), dict),)
    later = tuple(map(len, _extensions(says)))
    for has_rate, *kept in product(rates, *(may(word) for word in (*_BEFORE, *_AFTER))):
        words = [w for w, is_kept in zip((*_BEFORE, *_AFTER), kept, strict=True) if is_kept]
        each = 2 + len(words)
        first = 1 + has_rate
        rest = len(stored) - first - sum(1 + each * count for count in later)
        if rest < 0 or rest % each or (has_rate and not _is_rate(stored[1])):
            continue
        at, variables, counts = first, [], []
        for extension, count in enumerate((rest // each, *later)):
            if extension:
                counts.append(at)
                at += 1
            variables += [(extension, slots) for slots in _slots(at, count, words)]
            at += each * count
        are_alike = all(
            stored[k].shape == stored[slots["momentum"]].shape and stored[k].dtype in _FLOATS
            for _, slots in variables
            for k in slots.values()
        )
        if are_alike and all(_is_count(stored[k]) for k in counts):
            yield _Order(has_rate, tuple(variables), tuple(counts))


def _extensions(says: Mapping[str, Any]) -> list[list[str]]:
    """Names of the variables that came with each, as omniadam's configs have them."""
    found = says.get("extensions") or []
    is_list = isinstance(found, list) and all(isinstance(part, list) and part for part in found)
    if not is_list or not all(isinstance(name, str) and name for part in found for name in part):
        raise ValueError(f"its `extensions` must be lists of names. Received: {found!r}")
    return list(found)


def _slots(at: int, count: int, words: Sequence[str]) -> list[Mapping[str, int]]:
    found: list[dict[str, int]] = [{} for _ in range(count)]
    for word in _BEFORE:
        if word in words:
            for slots in found:
                slots[word], at = at, at + 1
    for slots in found:
        slots["momentum"], slots["velocity"], at = at, at + 1, at + 2
    for word in _AFTER:
        if word in words:
            for slots in found:
                slots[word], at = at, at + 1
    return list(found)


def _is_count(stored: Stored) -> bool:
    return stored.shape == () and stored.dtype in ("int32", "int64", "uint32", "uint64")


def _is_rate(stored: Stored) -> bool:
    return stored.shape == () and stored.dtype in _FLOATS


def _some(stored: Sequence[Stored]) -> str:
    shapes = ", ".join(str(each.shape) for each in stored[:12])
    return shapes + (", ..." if len(stored) > 12 else "")


# --- reading ---


def snapshot(held: Held, path: Path, origin: Mapping[str, str]) -> Snapshot:
    """State of a file in the common form.

    Raises:
        ValueError: if a counter or the rate is none.
    """
    tensors = {ITERATION: Tensor.of(_count(held.iteration))}
    settings = dict(held.known.settings)
    for name, stored in held.numbers.items():
        number = float(stored.read())
        if not (stored.shape == () and math.isfinite(number) and number >= 0):
            raise ValueError(f"its {name.replace('_', ' ')} is {number}")
        settings[name] = number
    if held.known.generation == KERAS and not held.known.is_complete:
        words = {word for _, slots in held.variables for word in slots}
        if held.variables:
            settings |= {"amsgrad": "velocity_hat" in words, "use_ema": "average" in words}
            if "gradient_accumulator" not in words:
                settings["gradient_accumulation_steps"] = None
    if held.known.is_tf_keras and settings.get("use_ema") and tensors[ITERATION].read() == 0:
        raise ValueError(
            "its optimizer has made no step yet, and the first moving average of tf_keras is "
            "another than Keras's. Save it after its first step"
        )
    for number, count in enumerate(held.counts, 1):
        tensors[f"extension.{number}"] = Tensor.of(_count(count, -1))
    for each, slots in held.variables:
        for word, stored in slots.items():
            tensors[each.slots[word]] = tensor(path, stored.shape, stored.dtype, stored.read)
    return Snapshot(
        held.known.kind,
        held.known.generation,
        settings,
        tuple(each for each, _ in held.variables),
        tensors,
        origin,
        held.known.is_complete,
    )


def _count(stored: Stored, least: int = 0) -> Array:
    value = stored.read()
    if not _is_count(stored) or not least <= int(value) < 1 << 63:
        raise ValueError(
            f"its count of steps must be a whole number >= {least}. Received: {value!r}"
        )
    return np.array(int(value), np.int64)


# --- writing ---


class Change(NamedTuple):
    """What a place of a file is to hold."""

    stored: Stored
    read: Callable[[], Array]  # of the stored shape and type


def changes(held: Held, given: Snapshot, by: str) -> list[Change]:
    """What to write into a file, so that its optimizer goes on with a state.

    Raises:
        ValueError: if the state does not fit the optimizer in the file, with all that does not.
    """
    if by not in ("name", "position"):
        raise ValueError(f"`by` must be 'name' or 'position'. Received: {by!r}")
    if given.generation != held.known.generation:
        raise ValueError(
            f"the state is of {given.kind}, an Adam of {given.generation}, and the optimizer in "
            f"the file is one of {held.known.generation}: what they keep does not mean the same"
        )
    found = [_counted(held.iteration, given.tensors.get(ITERATION), "count of steps")]
    for number, count in enumerate(held.counts, 1):
        name = f"extension.{number}"
        found.append(_counted(count, given.tensors.get(name), name, -1))
    for name, stored in held.numbers.items():
        wanted = given.settings.get(name)
        if isinstance(wanted, Mapping):
            raise ValueError(
                "the learning rate of the state is a schedule, and that in the file is a number: "
                "make the file of a model that was compiled with the schedule"
            )
        if wanted is not None:
            kept = np.array(wanted, stored.dtype)  # Keras keeps it in this type
            found.append(Change(stored, lambda kept=kept: kept))  # type: ignore[misc]
    wrong: list[str] = []
    for theirs, slots, ours in _pairs(held, given, by):
        for word in dict.fromkeys((*slots, *ours.slots)):
            if word not in slots or word not in ours.slots:
                where = "file" if word in slots else "state"
                wrong.append(f"{word} of '{theirs.name}' is only in the {where}")
                continue
            old, new = slots[word], given.tensors[ours.slots[word]]
            if new.shape != old.shape or not _fits(new.dtype, old.dtype):
                wrong.append(
                    f"{word} of '{theirs.name}' is {old.dtype} {old.shape} in the file, "
                    f"{new.dtype} {new.shape} in the state"
                )
            found.append(Change(old, _as(new, old.dtype)))
        if theirs.extension != ours.extension:
            wrong.append(f"'{theirs.name}' came with another extension")
    if wrong:
        raise ValueError(
            f"the state does not fit: {'; '.join(wrong)}. What an optimizer keeps is decided by "
            "`amsgrad`, `use_ema` and `gradient_accumulation_steps`, and by the variables"
        )
    return found


def _pairs(
    held: Held, given: Snapshot, by: str
) -> list[tuple[Variable, Mapping[str, Stored], Variable]]:
    theirs, ours = held.variables, given.variables
    are_named = all(v.is_named for v in ours), all(v.is_named for v, _ in theirs)
    if by == "position" or not any(are_named):
        if len(theirs) != len(ours):
            raise ValueError(
                f"the optimizer in the file has {len(theirs)} variables, and the state is of "
                f"{len(ours)}"
            )
        return [(v, slots, w) for (v, slots), w in zip(theirs, ours, strict=True)]
    if not all(are_named):
        lacking = "the state" if are_named[1] else "the optimizer in the file"
        raise ValueError(
            f"the variables of {lacking} have no names to tell them by. If their order is the "
            "same, pass by='position'"
        )
    named = {v.name: (v, slots) for v, slots in theirs}
    names = {v.name for v in ours}
    if named.keys() != names:
        raise ValueError(
            f"only in the file are {sorted(named.keys() - names)}, only in the state "
            f"{sorted(names - named.keys())}"
        )
    return [(*named[v.name], v) for v in ours]


def _counted(stored: Stored, value: Tensor | None, what: str, least: int = 0) -> Change:
    if value is None:
        raise ValueError(f"the state has no {what}")
    count = int(value.read())
    if not least <= count <= np.iinfo(stored.dtype).max:
        raise ValueError(f"the {what} is {count}, which the file cannot hold as {stored.dtype}")
    return Change(stored, lambda: np.array(count, stored.dtype))


def _fits(given: str, kept: str) -> bool:
    if given == kept:
        return True
    if "bfloat16" in (given, kept):
        return given == "bfloat16" and kept in ("float32", "float64")
    return np.can_cast(given, kept, "safe")


def _as(value: Tensor, dtype: str) -> Callable[[], Array]:
    return value.read if value.dtype == dtype else lambda: value.read().astype(dtype)


def changed_config(config: Mapping[str, Any], held: Held, given: Snapshot) -> dict[str, Any]:
    """An optimizer as Keras serializes it, with the settings of a state.

    Raises:
        ValueError: if the class in the file does not have a setting.
    """
    inner = dict(config["config"])
    if config.get("class_name") in SCALING:
        inner["inner_optimizer"] = changed_config(inner["inner_optimizer"], held, given)
        return {**config, "config": inner}
    usual = class_of(held.known).from_config({}).get_config()
    structural = {*KEPT.values(), "extensions"}
    for name, value in given.settings.items():
        if name == "learning_rate" and isinstance(inner.get(name), Mapping):
            if not isinstance(value, Mapping) or _schedule(inner[name]) != _schedule(value):
                raise ValueError(
                    f"the learning rate in the file is the schedule {inner[name]}, in the state "
                    f"{value}. Make the file of a model with the schedule of the state"
                )
        elif name in inner and name not in ("name", *structural):
            is_same = inner[name] == value or (
                name == "learning_rate" and isinstance(value, Mapping)
            )
            inner[name] = inner[name] if is_same else value
        elif name not in inner and name not in ("name", *structural) and value != usual.get(name):
            raise ValueError(f"the optimizer in the file has no setting `{name}`, here {value!r}")
    steps = "gradient_accumulation_steps"
    if given.settings.get(steps, inner.get(steps)) != inner.get(steps):
        raise ValueError(
            f"`{steps}` is {given.settings[steps]} in the state, {inner.get(steps)} in the file"
        )
    return {**config, "config": inner}


def _schedule(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class and settings, without what is the same for all."""
    name = str(config.get("class_name")).rpartition(">")[2]
    inner = config.get("config")
    given = inner if isinstance(inner, Mapping) else {}
    return name, {k: v for k, v in given.items() if k != "name" and v is not None}
