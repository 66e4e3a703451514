"""HDF5 files of Keras and tf_keras: `.weights.h5`, and whole models as `.h5`.

A `.weights.h5` has the arrays of an optimizer by number, and neither its class nor its settings. An
`.h5` has both, and names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..saving import atomic
from ..saving.names import in_file
from ..saving.snapshot import OPTIMIZER_V2, Snapshot
from . import keras_state
from .hdf5 import Dataset, File, Part
from .keras_state import UNKNOWN, Change, Held, Known, Stored
from .source import Patch, Source, patched, reading


class _Look(NamedTuple):
    """What is in a file."""

    held: Held
    origin: Mapping[str, str]
    # Of a whole model, the text with the settings, and what it says.
    config: Part | None = None
    says: Mapping[str, Any] = {}


def read(path: Path, key: str | None, settings: Mapping[str, Any] | None) -> Snapshot:
    """The state in a file: see `formats.read`."""
    source = Source.open(path)
    with reading(path):
        look = _look(File(source), key, settings)
        return keras_state.snapshot(look.held, path, look.origin)


def write_into(given: Snapshot, path: Path, key: str | None, by: str) -> None:
    """Replace the state in a file: see `formats.write_into`."""
    source = Source.open(path)
    with reading(path, "written into"):
        look = _look(File(source), key, given.settings)
        patches = list(patches_of(keras_state.changes(look.held, given, by)))
        if look.config is not None:
            patches += _settings(look, look.config, given)

    def fill(file: IO[bytes]) -> None:
        for block in patched(source, patches):
            rest = memoryview(block)
            while rest:  # the system may take a part at a time
                rest = rest[file.write(rest) :]
        source.close()

    atomic.replace(path, fill)


def _look(file: File, key: str | None, settings: Mapping[str, Any] | None) -> _Look:
    file.check_places()
    children = file.children(file.root)
    if "model_weights" in children or "optimizer_weights" in children:
        if key not in (None, "optimizer"):
            raise ValueError(f"it has one optimizer, whose key is 'optimizer'. Received: {key!r}")
        return _whole_model(file, children)
    return _Look(by_number(file, key, UNKNOWN, settings), {})


# --- arrays by number ---


def by_number(
    file: File, key: str | None, known: Known, settings: Mapping[str, Any] | None
) -> Held:
    """State in a file of weights.

    Args:
        file: of Keras, or of tf_keras's format of the same name.
        key: the attribute of the model that is the optimizer.
        known: what is said of it beside the file.
        settings: what its user says of it.
    """
    key = "optimizer" if key is None else key.replace(".", "/")
    try:
        group = file.children(file.find(key))
    except LookupError as error:
        others = ", ".join(file.children(file.root)) or "nothing"
        raise ValueError(
            f"it holds no optimizer's state under '{key}' ({others} is there). Keras saves that "
            "of a model that is compiled and has made a step, and tf_keras that of optimizers that "
            "are not legacy"
        ) from error
    outer = _numbered(file, f"{key}/vars")
    if "inner_optimizer" not in group:
        return keras_state.ordered(outer, known, settings)
    # Of a LossScaleOptimizer: four variables of its own, and those of the optimizer once more.
    inner = _numbered(file, f"{key}/inner_optimizer/vars")
    copies = outer[len(outer) - len(inner) :]
    if [each.shape for each in copies] == [each.shape for each in inner]:
        inner = [
            each._replace(places=each.places + copy.places)
            for each, copy in zip(inner, copies, strict=True)
        ]
    return keras_state.ordered(inner, known, settings)


def _numbered(file: File, path: str) -> list[Stored]:
    children = file.children(file.find(path))
    if set(children) != {str(i) for i in range(len(children))}:
        raise ValueError(f"in '{path}' must be arrays 0, 1, ... Received: {sorted(children)[:12]}")
    return _stored(file, [file.find(f"{path}/{i}") for i in range(len(children))])


def _stored(file: File, addresses: Sequence[int]) -> list[Stored]:
    """Arrays of a file."""
    found = [file.dataset(address) for address in addresses]
    if len({each.stored.byteorder == ">" for each in found if each.stored.itemsize > 1}) > 1:
        raise ValueError("its arrays are in two orders of bytes, of which a machine has one")
    return [
        Stored(each.shape, each.dtype, lambda each=each: file.array(each), (each,))  # type: ignore[misc]
        for each in found
    ]


def patches_of(changes: Sequence[Change]) -> Iterator[Patch]:
    """What to write where."""
    for change in changes:
        for place in change.stored.places:
            if place.nbytes:
                yield Patch(place.place, place.nbytes, _bytes(change, place))


def _bytes(change: Change, place: Dataset) -> Any:
    def content() -> bytes:
        value = np.asarray(change.read(), order="C")
        if place.dtype == "bfloat16":
            value = value.view(np.uint16)
        return value.astype(place.stored, copy=False).tobytes()

    return content


# --- whole models ---


def _whole_model(file: File, children: Mapping[str, int | None]) -> _Look:
    root = file.attributes(file.root)
    if "training_config" not in root or children.get("optimizer_weights") is None:
        raise ValueError(
            "it holds no optimizer's state: the model was saved without, or had made no step"
        )
    _, texts = file.texts(root["training_config"])
    if len(texts) != 1:
        raise ValueError("its settings must be one text")
    says = keras_state.parsed(texts[0].content, "training_config")
    known = keras_state.of_config(says.get("optimizer_config"))
    group = file.find("optimizer_weights")
    names = [part.content.decode() for part in _names(file, group)]
    arrays = _stored(file, [file.find(name, group) for name in names])
    classes = _classes(file, root)
    if known.generation == OPTIMIZER_V2:
        held = _of_legacy(known, names, arrays, classes)
    else:
        arrays = arrays[_own_of_scaling(says["optimizer_config"], names) :]
        names = names[len(names) - len(arrays) :]
        weights = list(_weights(file, children))

        def named(slots: Mapping[str, int]) -> tuple[str, bool] | None:
            found = _name(names[slots["momentum"]], names[slots["velocity"]], weights)
            return None if found is None else in_file(found, classes)

        held = keras_state.ordered(arrays, known, None, named)
    version = file.text(root["keras_version"]) if "keras_version" in root else ""
    return _Look(held, {"keras": version}, texts[0], says)


def _names(file: File, group: int, name: str = "weight_names") -> Iterator[Part]:
    """A list of names, which may be cut in pieces."""
    attributes = file.attributes(group)
    if name in attributes:
        yield from file.texts(attributes[name])[1]
        return
    i = 0
    while f"{name}{i}" in attributes:
        yield from file.texts(attributes[f"{name}{i}"])[1]
        i += 1
    if i == 0:
        raise ValueError(f"it has no `{name}`")


def _own_of_scaling(config: Mapping[str, Any], names: Sequence[str]) -> int:
    """How many arrays a LossScaleOptimizer of Keras 3 has before those of its optimizer."""
    is_scaling = config.get("class_name") in keras_state.SCALING
    return 4 if is_scaling and any(name.endswith("dynamic_scale") for name in names[:4]) else 0


def _weights(file: File, children: Mapping[str, int | None]) -> Iterator[str]:
    """Names of the variables of the model."""
    group = children.get("model_weights")
    if group is not None:
        for layer in file.children(group).values():
            if layer is not None:
                yield from (part.content.decode() for part in _names(file, layer))


def _classes(file: File, root: Mapping[str, Any]) -> set[str]:
    """Of the layers."""
    if "model_config" not in root:
        return set()
    found: set[str] = set()
    _, texts = file.texts(root["model_config"])
    rest: list[Any] = [keras_state.parsed(text.content, "model_config") for text in texts]
    while rest:
        each = rest.pop()
        if isinstance(each, dict):
            if isinstance(each.get("class_name"), str):
                found.add(each["class_name"].rpartition(">")[2])
            rest += each.values()
        elif isinstance(each, list):
            rest += each
    return found


def _name(momentum: str, velocity: str, weights: Sequence[str]) -> str | None:
    """The name of a variable, by those of its slots; None if they do not tell."""
    found = of_tf_keras(momentum, velocity)
    if found is not None:
        return found
    # Keras's: `adam/dense_kernel_momentum`, with the slashes of the path gone.
    flat = momentum.rpartition("/")[2].removesuffix("_momentum")
    fitting = [name for name in weights if name.replace("/", "_") == flat]
    return fitting[0] if len(fitting) == 1 else None


def of_tf_keras(momentum: str, velocity: str) -> str | None:
    """`Adam/m/dense/kernel:0` and `Adam/v/dense/kernel:0`."""
    pairs = list(zip(momentum.split("/"), velocity.split("/"), strict=False))
    different = [i for i, (one, other) in enumerate(pairs) if one != other]
    if len(different) == 1 and pairs[different[0]] == ("m", "v") and momentum.endswith(":0"):
        return "/".join(one for one, _ in pairs[different[0] + 1 :])[:-2]
    if re.search(r"(^|/)[mv]/", momentum) and re.search(r"(^|/)[mv]/", velocity):
        raise ValueError(f"{momentum!r} and {velocity!r} are not of one variable")
    return None


def _of_legacy(
    known: Known, names: Sequence[str], arrays: Sequence[Stored], classes: set[str]
) -> Held:
    """`Adam/iter:0`, `Adam/dense/kernel/m:0`, ..."""
    if not names or not re.search(r"(^|/)(iter|iterations)(_\d+)?:0$", names[0]):
        raise ValueError(f"its optimizer has no count of steps. It has {list(names[:12])}")
    scope = names[0].rpartition("/")[0]
    words = {"m": "momentum", "v": "velocity", "vhat": "velocity_hat"}
    found: dict[str, dict[str, Stored]] = {}
    for name, array in zip(names[1:], arrays[1:], strict=True):
        match = re.fullmatch(r"(.+)/(m|v|vhat)(?:_\d+)?:0", name)
        if match is None or words[match[2]] in found.setdefault(match[1], {}):
            raise ValueError(f"{name!r} is no slot of an Adam, or is there twice")
        found[match[1]][words[match[2]]] = array
    kept = ["momentum", "velocity", *(["velocity_hat"] if known.settings.get("amsgrad") else [])]
    variables = []
    for base, slots in found.items():
        if list(slots) != kept:
            raise ValueError(f"of '{base}' it has {list(slots)}, and its Adam keeps {kept}")
        name = base.removeprefix(f"{scope}/")
        variables.append(keras_state.variable(*in_file(name, classes), slots))
    return Held(known, arrays[0], {}, tuple(variables))


def _settings(look: _Look, config: Part, given: Snapshot) -> list[Patch]:
    """The text with the settings, as long as it was: what is over is blanks."""
    theirs = look.says["optimizer_config"]
    changed = keras_state.changed_config(theirs, look.held, given)
    if changed == theirs:
        return []
    text = json.dumps({**look.says, "optimizer_config": changed}, separators=(",", ":")).encode()
    room = len(config.content)
    if len(text) > room:
        raise ValueError(
            f"the settings of the state take {len(text)} bytes, and the file has room for {room}: "
            "compile a model with them, and save that"
        )
    return [Patch(config.place, room, lambda: text.ljust(room))]
