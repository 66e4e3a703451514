"""Files of Keras, tf_keras and TensorFlow: read, continued beside the library that wrote them, and
given back to it. Run by test_formats_keras.py, in a process with Keras on TensorFlow.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import omniadam
import omniadam.keras
from cases import assert_close
from omniadam import formats
from omniadam.compat import optimizer_v2
from omniadam.fast import tensorflow as fast
from omniadam.formats import hdf5
from omniadam.formats.source import Source, reading
from omniadam.saving import optimizers
from omniadam.saving.snapshot import ITERATION, Snapshot, Tensor, Variable
from reference import Reference, reference_optimizer_v2

RNG = np.random.default_rng(15)
NAMES = ("a/kernel", "a/bias", "b/kernel", "b/bias")
SHAPES = ((3, 4), (4,), (4, 2), (2,))
START = [RNG.normal(size=shape).astype(np.float32) for shape in SHAPES]
GRADIENTS = [[RNG.normal(size=shape).astype(np.float32) for shape in SHAPES] for _ in range(12)]
BEFORE, AFTER = GRADIENTS[:7], GRADIENTS[7:]
EVERYTHING = {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}


@pytest.fixture(autouse=True)
def without_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes a second for each program."""
    monkeypatch.setattr(fast.FastTensorFlow, "jit_compile", False)


# --- the libraries ---


def model_of(library: Any, optimizer: Any) -> Any:
    """Two layers, whose variables have the names, shapes and values above."""
    inputs = library.Input((3,))
    model = library.Model(
        inputs, library.layers.Dense(2, name="b")(library.layers.Dense(4, name="a")(inputs))
    )
    for variable, value in zip(model.trainable_variables, START, strict=True):
        variable.assign(value)
    model.compile(optimizer, loss=library.losses.MeanSquaredError())
    return model


def step(model: Any, gradients: Sequence[Any]) -> None:
    optimizer, variables = model.optimizer, model.trainable_variables
    factor = 1.0
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        if not optimizer.built:
            optimizer.build(variables)
        factor = float(optimizer.dynamic_scale)
    scaled = [tf.constant(np.float32(factor) * g) for g in gradients]
    optimizer.apply_gradients(list(zip(scaled, variables, strict=True)))


def values(model: Any) -> list[Any]:
    return [np.array(v) for v in model.trainable_variables]


def trained(library: Any, optimizer: Any, gradients: Sequence[Any] = BEFORE) -> Any:
    model = model_of(library, optimizer)
    for each in gradients:
        step(model, each)
    return model


def write(model: Any, folder: Path, ending: str) -> Path:
    path = folder / f"file{ending}"
    if ending == ".weights.h5":
        model.save_weights(path)
    elif ending == "":
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(path))
    elif ending == ".tf":
        model.save_weights(str(path), save_format="tf")
    else:
        model.save(path)
    return path


def loaded(path: Path, ending: str, library: Any, make: Callable[[], Any]) -> Any:
    """What the library that wrote a file makes of it."""
    if ending in (".keras", ".h5"):
        load = (library.saving if library is keras else library.models).load_model
        return load(path)
    model = model_of(library, make())
    if library is keras:
        model.optimizer.build(model.trainable_variables)
    elif hasattr(model.optimizer, "build"):
        model.optimizer.build(model.trainable_variables)
    if ending == "":
        done = tf.train.Checkpoint(model=model, optimizer=model.optimizer).restore(str(path))
        done.expect_partial()
    else:
        model.load_weights(path if ending == ".weights.h5" else str(path))
    return model


# --- ours ---


def continued(given: Snapshot, weights: Sequence[Any], settings: Any = None) -> Any:
    """Ours, on NumPy, from what was read: (optimizer, variables) after the other gradients."""
    variables = [np.array(w) for w in weights]
    named = dict(zip(NAMES, variables, strict=True))
    if given.generation == "tensorflow 2.0":
        optimizer: Any = optimizer_v2.Adam.from_config(
            dict(given.settings) if settings is None else settings
        )
        slots = [
            given.tensors[v.slots[word]].read()
            for word in ("momentum", "velocity", "velocity_hat")
            for v in by_name(given)
            if word in v.slots
        ]
        zeros = [(np.zeros_like(v), v) for v in variables]
        kept = [v.copy() for v in variables]
        optimizer.apply_gradients(zeros)
        for v, w in zip(variables, kept, strict=True):
            v[...] = w
        optimizer.set_weights([given.tensors[ITERATION].read(), *slots])
    else:
        if settings is None:
            optimizer = optimizers.create(given, {}, by="position")
            optimizer.build(named)
        else:
            optimizer = omniadam.Adam.from_config(settings)
            optimizer.build(named)
            by = "name" if all(v.is_named for v in given.variables) else "position"
            optimizers.restore(optimizer, given, by=by, strict=True)
    for each in AFTER:
        optimizer.apply_gradients(list(zip(each, variables, strict=True)))
    return optimizer, variables


def by_name(given: Snapshot) -> list[Any]:
    if not all(v.is_named for v in given.variables):
        return list(given.variables)
    found = {v.name: v for v in given.variables}
    return [found[name] for name in NAMES]


def check_oracle(given: Snapshot, weights: Sequence[Any], ours: Any, settings: Any = None) -> None:
    """Whether ours went on from the state in the file as the oracle does, from the same state."""
    settings = dict(given.settings if settings is None else settings)
    rate = settings.pop("learning_rate")
    settings.pop("name", None)
    if isinstance(rate, dict):
        schedule = keras.optimizers.schedules.deserialize(rate)
        rate = lambda calls: float(schedule(calls))  # noqa: E731
    if given.generation == "tensorflow 2.0":
        reference = reference_optimizer_v2(weights, learning_rate=rate, **settings)
    else:
        reference = Reference(weights, learning_rate=rate, **settings)
    reference.calls = int(given.tensors[ITERATION].read())
    for i, variable in enumerate(by_name(given)):
        for word, name in variable.slots.items():
            value = given.tensors[name].read().astype(np.float64)
            reference.state[word][i][...] = value
            reference.sizes[word][i][...] = np.abs(value)
    for each in AFTER:
        reference.step(each)
    assert_close(ours, reference)


def check_alike(ours: Sequence[Any], theirs: Sequence[Any], since: Sequence[Any]) -> None:
    """Whether two went the same way, but for the digits that Keras loses: 1 - 0.999 in float32."""
    for mine, other, old in zip(ours, theirs, since, strict=True):
        moved = np.abs(other.astype(np.float64) - old)
        assert np.all(moved > 0)
        assert np.max(np.abs(mine - other)) <= 3e-4 * moved.max()


# --- read ---

SCHEDULE = {"initial_learning_rate": 0.1, "decay_steps": 9, "alpha": 0.25}
ADAMS: dict[str, tuple[Any, Callable[[], Any], Sequence[str]]] = {
    "keras": (
        keras,
        lambda: keras.optimizers.Adam(0.02, epsilon=1e-3, beta_1=0.8),
        (".keras", ".h5", ".weights.h5", ""),
    ),
    "keras, every slot": (
        keras,
        lambda: keras.optimizers.Adam(0.02, **EVERYTHING),
        (".keras", ".h5", ".weights.h5", ""),
    ),
    "keras, schedule": (
        keras,
        lambda: keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(**SCHEDULE), clipnorm=1.0
        ),
        (".keras", ".h5", ".weights.h5"),
    ),
    "keras, loss scale": (
        keras,
        lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.AdamW(0.02, weight_decay=0.1, use_ema=True), initial_scale=64.0
        ),
        (".keras", ".weights.h5", ""),
    ),
    "omniadam.keras": (
        keras,
        lambda: omniadam.keras.AdamW(0.02, amsgrad=True, global_clipnorm=1.0),
        (".keras", ".weights.h5", ""),
    ),
    "tf_keras": (
        tf_keras,
        lambda: tf_keras.optimizers.Adam(0.02, amsgrad=True, use_ema=True, ema_momentum=0.8),
        (".keras", ".h5", ".weights.h5", ".tf"),
    ),
    "tf_keras, loss scale": (
        tf_keras,
        lambda: tf_keras.mixed_precision.LossScaleOptimizer(
            tf_keras.optimizers.AdamW(0.02, weight_decay=0.1)
        ),
        (".h5", ""),
    ),
    "tf_keras, legacy": (
        tf_keras,
        lambda: tf_keras.optimizers.legacy.Adam(0.02, amsgrad=True, decay=0.1, clipnorm=1.0),
        (".h5", ".tf", ""),
    ),
}


def settings_of(optimizer: Any) -> dict[str, Any]:
    """As ours has them."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    config = dict(inner.get_config())
    for name in ("jit_compile", "is_legacy_optimizer"):
        config.pop(name, None)
    return config


@pytest.mark.parametrize("name", ADAMS)
def test_read_and_continued(name: str, tmp_path: Path) -> None:
    library, make, endings = ADAMS[name]
    model = trained(library, make())
    paths = {ending: write(model, tmp_path, ending) for ending in endings}
    since, settings = values(model), settings_of(model.optimizer)
    for each in AFTER:
        step(model, each)
    for ending, path in paths.items():
        given = formats.read(path, settings=settings if ending == ".weights.h5" else None)
        is_whole = ending in (".keras", ".h5")
        assert given.is_complete == is_whole
        assert int(given.tensors[ITERATION].read()) == len(BEFORE)
        if ending in (".h5", "", ".tf"):
            assert [v.name for v in by_name(given)] == list(NAMES)
        if is_whole:
            assert {k: v for k, v in settings.items() if given.settings[k] != v} == {}
        else:
            said = {k: settings.get(k) for k in given.settings}
            assert dict(given.settings) == pytest.approx(said)
        optimizer, ours = continued(given, since, None if is_whole else settings)
        check_oracle(given, since, ours, settings)
        check_alike(ours, values(model), since)
        if not is_whole:
            with pytest.raises(ValueError, match="does not tell all settings"):
                optimizers.create(given, {}, by="position")


# --- write into ---


def ours(generation: str, settings: dict[str, Any]) -> tuple[Any, list[Any], Snapshot]:
    """An optimizer of ours after the first gradients, its variables, and its state."""
    variables = [w.copy() for w in START]
    is_older = generation == "tensorflow 2.0"
    optimizer: Any = (optimizer_v2.Adam if is_older else omniadam.Adam).from_config(settings)
    if not is_older:
        optimizer.build(dict(zip(NAMES, variables, strict=True)))
    for each in BEFORE:
        optimizer.apply_gradients(list(zip(each, variables, strict=True)))
    if not is_older:
        with optimizers.held(optimizer) as found:
            return optimizer, variables, found.in_memory()
    count, *slots = optimizer.get_weights()
    words = ("momentum", "velocity", "velocity_hat")[: len(slots) // len(NAMES)]
    tensors = {ITERATION: Tensor.of(np.array(int(count), np.int64))}
    for word in words:
        tensors |= {f"{name}.{word}": Tensor.of(slots.pop(0)) for name in NAMES}
    named = tuple(
        Variable(name, shape, "float32", {word: f"{name}.{word}" for word in words})
        for name, shape in zip(NAMES, SHAPES, strict=True)
    )
    config = optimizer.get_config()
    return optimizer, variables, Snapshot("", generation, config, named, tensors)


def contents(path: Path) -> dict[str, Any]:
    """All that is in a file beside its optimizer, through the format's own library."""
    found: dict[str, Any] = {}
    if not path.is_file():
        reader = tf.train.load_checkpoint(str(path))
        names = reader.get_variable_to_shape_map()
        keep = [n for n in names if "optimizer" not in n and ".OPTIMIZER_SLOT" not in n]
        return {name: np.asarray(reader.get_tensor(name)).tobytes() for name in keep}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                found[info.filename] = [info.date_time, info.external_attr, info.compress_type]
                if info.filename not in ("config.json", "model.weights.h5"):
                    found[info.filename].append(archive.read(info))
            config = json.loads(archive.read("config.json"))
            del config["compile_config"]["optimizer"]
            found["config"] = config
            with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
                return found | _arrays(file)
    with h5py.File(path) as file:
        return _arrays(file)


def _arrays(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(name: str, each: Any) -> None:
        found[f"{name} attributes"] = {k: str(v) for k, v in each.attrs.items()}
        if isinstance(each, h5py.Dataset) and not name.startswith("optimizer"):
            found[name] = (each.dtype, each[()].tobytes())

    file.visititems(visit)
    for name, value in file.attrs.items():
        found[name] = json.loads(value) if name.endswith("_config") else value
    found.get("training_config", {}).pop("optimizer_config", None)
    return found


PLAIN = {"learning_rate": 0.02, "beta_1": 0.8, "epsilon": 1e-3, "weight_decay": 0.1}
OLD = {"learning_rate": 0.02, "decay": 0.1, "epsilon": 1e-3, "clipnorm": 1.0, "amsgrad": True}
INTO: dict[str, tuple[Any, str, dict[str, Any], Callable[..., Any], Sequence[str]]] = {
    # Keras itself takes no optimizer's state from an `.h5`: it builds it for no variables.
    "keras": (keras, "", PLAIN, keras.optimizers.AdamW, (".keras", ".weights.h5", "")),
    "keras, every slot": (
        *(keras, "", {"learning_rate": 0.02, **EVERYTHING}, keras.optimizers.Adam),
        (".keras", ".weights.h5", ""),
    ),
    "keras, loss scale": (
        *(keras, "", PLAIN),
        lambda **s: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(**s), initial_scale=64.0
        ),
        (".keras", ".weights.h5", ""),
    ),
    "omniadam.keras": (
        *(keras, "", PLAIN | {"clipvalue": 0.5}, omniadam.keras.Adam),
        (".keras", ".weights.h5", ""),
    ),
    "tf_keras": (
        *(tf_keras, "", PLAIN | {"use_ema": True}, tf_keras.optimizers.Adam),
        (".keras", ".h5", ".tf"),
    ),
    "tf_keras, legacy": (
        *(tf_keras, "tensorflow 2.0", OLD, tf_keras.optimizers.legacy.Adam),
        (".h5", ".tf", ""),
    ),
}
STRUCTURE = ("amsgrad", "use_ema", "gradient_accumulation_steps")


@pytest.mark.parametrize("name", INTO)
def test_written_into_and_continued(name: str, tmp_path: Path) -> None:
    library, generation, settings, make, endings = INTO[name]
    optimizer, variables, given = ours(generation, settings)
    since = [w.copy() for w in variables]
    for each in AFTER:
        optimizer.apply_gradients(list(zip(each, variables, strict=True)))
    for ending in endings:
        is_whole = ending in (".keras", ".h5")
        # A whole file takes the settings, too; of others the optimizer has its own.
        before = {k: v for k, v in settings.items() if k in STRUCTURE} if is_whole else settings
        if generation:
            before = before | {"clipnorm": 3.0}  # which is in the config only if it is set
        path = write(trained(library, make(**before), BEFORE[:2]), tmp_path, ending)
        rest, size = contents(path), path.stat().st_size if path.is_file() else 0
        is_named = ending in (".h5", ".tf", "")
        if not is_named:
            with pytest.raises(ValueError, match="no names to tell them by"):
                formats.write_into(given, path)
        formats.write_into(given, path, by="name" if is_named else "position")
        assert contents(path) == rest
        assert ending != ".h5" or path.stat().st_size == size
        again = formats.read(path, settings=given.settings)
        pairs = zip(by_name(again), by_name(given), strict=True)
        for theirs, mine in pairs:
            for word, slot in mine.slots.items():
                kept = again.tensors[theirs.slots[word]].read()
                assert kept.tobytes() == given.tensors[slot].read().tobytes()
        model = loaded(path, ending, library, lambda make=make: make(**settings))
        if hasattr(model.optimizer, "_create_all_weights") and not is_whole:
            model.optimizer._create_all_weights(model.trainable_variables)
        for variable, value in zip(model.trainable_variables, since, strict=True):
            variable.assign(value)
        for each in AFTER:
            step(model, each)
        assert int(model.optimizer.iterations) == int(optimizer.iterations)
        check_alike(variables, values(model), since)
        assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith(".")) == []
