"""Files of Keras, tf_keras and TensorFlow: read, continued beside the library that wrote them, and
given back to it. Run by test_formats_keras.py, in a process with Keras on TensorFlow.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from omniadam.formats import hdf5, keras_state
from omniadam.formats.keras_state import Stored
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
    if library is keras or hasattr(model.optimizer, "build"):
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
        _, ours = continued(given, since, None if is_whole else settings)
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
        rest, old = contents(path), path.read_bytes() if path.is_file() else b""
        is_named = ending in (".h5", ".tf", "")
        if not is_named:
            with pytest.raises(ValueError, match="no names to tell them by"):
                formats.write_into(given, path)
        formats.write_into(given, path, by="name" if is_named else "position")
        assert contents(path) == rest
        if ending.endswith(".h5"):
            kept = np.frombuffer(path.read_bytes(), np.uint8) == np.frombuffer(old, np.uint8)
            for begin, end in unprotected(path, "optimizer"):
                kept[begin:end] = True
            assert kept.all()
        again = formats.read(path, settings=given.settings)
        pairs = zip(by_name(again), by_name(given), strict=True)
        for theirs, mine in pairs:
            for word, slot in mine.slots.items():
                kept = again.tensors[theirs.slots[word]].read()
                assert kept.tobytes() == given.tensors[slot].read().tobytes()
        if name == "keras, loss scale" and ending == ".weights.h5":
            with h5py.File(path) as file:  # which has all of them twice
                inner, outer = (file[f"optimizer/{n}vars"] for n in ("inner_optimizer/", ""))
                for i in range(len(inner)):
                    copy = outer[str(i + len(outer) - len(inner))]
                    assert copy[()].tobytes() == inner[str(i)][()].tobytes()
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


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = trained(keras, keras.optimizers.Adam(0.02), BEFORE[:2])
    archive, weights = (write(model, tmp_path, ending) for ending in (".keras", ".weights.h5"))
    checkpoint = write(model, tmp_path, "")
    files = [each for each in tmp_path.iterdir() if each.is_file()]
    before = {each: each.read_bytes() for each in files}
    _, _, given = ours("", {"learning_rate": 0.01})
    first = given.variables[0]

    def refused(state: Snapshot, match: str, path: Path = archive, by: str = "position") -> None:
        with pytest.raises(ValueError, match=match) as caught:
            formats.write_into(state, path, by=by)
        assert str(path) in str(caught.value)
        assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before

    for path in (archive, weights, checkpoint):
        refused(ours("", EVERYTHING)[2], "velocity_hat of '.*' is only in the state|no order", path)
        refused(replace(given, variables=given.variables[1:]), "4 variables, .* of 3", path)
        swapped = replace(given, variables=(given.variables[1], first, *given.variables[2:]))
        refused(swapped, r"momentum of '.*' is float32 \(3, 4\) in the file, float32 \(4,\)", path)
        refused(ours("tensorflow 2.0", OLD)[2], "an Adam of tensorflow 2.0|no order", path)
        wide = {
            k: Tensor.of(t.read().astype("f8")) if t.shape else t for k, t in given.tensors.items()
        }
        refused(replace(given, tensors=wide), "float64", path)
    schedule = {"class_name": "CosineDecay", "config": SCHEDULE}
    refused(replace(given, settings=dict(given.settings) | {"learning_rate": schedule}), "schedule")
    refused(given, "'position'. Received: 'order'", by="order")
    other = first._replace(name="c/kernel")
    refused(replace(given, variables=(other, *given.variables[1:])), "c/kernel", checkpoint, "name")
    with pytest.raises(ValueError, match="is made for a name"):
        formats.write(given, tmp_path / "new.keras")


def test_a_checkpoint_has_the_new_files_when_its_index_is_renamed(tmp_path: Path) -> None:
    path = write(trained(keras, keras.optimizers.Adam(0.02), BEFORE[:2]), tmp_path, "")
    _, _, given = ours("", {"learning_rate": 0.01})
    seen = set()
    for _ in range(3):
        old = set(tmp_path.iterdir())
        formats.write_into(given, path)
        new = set(tmp_path.iterdir())
        assert old & new == {path.with_name("file.index")}
        seen.add(frozenset(new))
    assert len(seen) > 1


def test_a_checkpoint_that_cannot_be_replaced_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(trained(keras, keras.optimizers.Adam(0.02), BEFORE[:2]), tmp_path, "")
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    _, _, given = ours("", {"learning_rate": 0.01})
    whole = os.replace

    def fails(old: Any, new: Any) -> None:
        if str(new).endswith(".index"):
            raise OSError("no room")
        whole(old, new)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(os, "replace", fails)
        formats.write_into(given, path)
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before
    (tmp_path / ".file.partial").mkdir()  # of a process that was killed
    formats.write_into(given, path)
    assert formats.read(path).settings["learning_rate"] == pytest.approx(0.01)
    assert not list(tmp_path.glob(".*"))


# --- what was altered ---


def read_all(path: Path, **options: Any) -> dict[str, bytes]:
    found = formats.read(path, **options)
    return {name: tensor.read().tobytes() for name, tensor in found.tensors.items()} | {
        "settings": json.dumps(dict(found.settings)).encode()
    }


def refused(path: Path, match: str = "", **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read_all(path, **options)
    assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for library in (keras, tf_keras):
        model = trained(library, library.optimizers.Adam(0.02, amsgrad=True), BEFORE[:3])
        for ending in (".keras", ".h5", ".weights.h5", ""):
            place = folder / f"of {library.__name__}{ending}"
            place.mkdir()
            found[f"{library.__name__}{ending}"] = write(model, place, ending)
    return found


def test_cut_off_anywhere(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("keras.keras", "keras.weights.h5", "tf_keras.h5", "keras"):
        path = tmp_path / files[name].name
        for old in files[name].parent.iterdir():
            shutil.copy(old, tmp_path)
        cut = [path] if path.is_file() else [*tmp_path.glob("file.*-of-*"), Path(f"{path}.index")]
        for each in cut:
            whole = each.read_bytes()
            lengths = {*range(0, len(whole), max(1, len(whole) // 40)), 7, len(whole) - 1}
            for length in lengths:
                each.write_bytes(whole[:length])
                refused(path)
            each.write_bytes(whole)
        assert read_all(path) == read_all(files[name])
        for each in tmp_path.iterdir():
            each.unlink()


def damaged(content: bytes, random: random.Random, begin: int, end: int) -> bytes:
    new = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        i = random.randrange(begin, end)
        new[i] = random.choice((new[i] ^ (1 << random.randrange(8)), random.randrange(256), 0, 255))
    return bytes(new)


VARIANTS = int(os.environ.get("OMNIADAM_VARIANTS", "200"))


@pytest.mark.parametrize("name", ["keras.keras", "keras.weights.h5", "tf_keras.h5", "keras.h5"])
def test_altered_bytes(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    """An error that names the file, or what was read before. Only the bytes of an array, and the
    text of settings, can be others without a sum; a .keras has sums.
    """
    path = tmp_path / files[name].name
    whole, state = files[name].read_bytes(), read_all(files[name])
    # The bytes of arrays and of text, which HDF5 has no sums for.
    free = [] if name == "keras.keras" else list(unprotected(files[name]))
    chance, errors = random.Random(name), 0
    for _ in range(VARIANTS):
        altered = damaged(whole, chance, 0, len(whole))
        if any(altered[a:b] != whole[a:b] for a, b in free):
            continue
        path.write_bytes(altered)
        try:
            found = read_all(path)
        except ValueError as error:
            assert str(path) in str(error)
            errors += 1
        else:
            assert found == state, [i for i in range(len(whole)) if whole[i] != altered[i]]
    assert errors > VARIANTS / 50


def unprotected(path: Path, start: str = "") -> Iterator[tuple[int, int]]:
    """Where arrays are, and the text of settings."""
    with h5py.File(path) as file:
        found: list[Any] = []
        file.visititems(lambda name, each: found.append(each) if name.startswith(start) else None)
        for each in found:
            if isinstance(each, h5py.Dataset):
                begin = each.id.get_offset()
                yield begin, begin + each.nbytes
    content = path.read_bytes()
    for key in (b'{"loss"', *(() if start else (b'{"class_name"',))):
        begin = content.find(key)
        if begin >= 0:
            yield begin, content.find(b"\0", begin)


def test_altered_checkpoints(files: dict[str, Path], tmp_path: Path) -> None:
    for old in files["keras"].parent.iterdir():
        shutil.copy(old, tmp_path)
    path, state, chance, errors = tmp_path / "file", read_all(files["keras"]), random.Random(1), 0
    for each in tmp_path.iterdir():
        whole = each.read_bytes()
        for _ in range(VARIANTS // 10):
            each.write_bytes(damaged(whole, chance, 0, len(whole)))
            try:
                assert read_all(path) == state
            except ValueError as error:
                assert str(path) in str(error)
                errors += 1
        each.write_bytes(whole)
    assert errors > 10


def edited(old: Path, new: Path, edit: Callable[[Any], object]) -> Path:
    shutil.copy(old, new)
    with h5py.File(new, "r+") as file:
        edit(file)
    return new


def put(name: str, value: Any, **options: Any) -> Callable[[Any], object]:
    def edit(file: Any) -> None:
        del file[name]
        file.create_dataset(name, data=value, **options)

    return edit


def linked(name: str, link: Any) -> Callable[[Any], object]:
    def edit(file: Any) -> None:
        del file[name]
        file[name] = link

    return edit


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((3, 4), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3, 4))
    del file[M0]
    file.create_virtual_dataset(M0, layout)


def outside(file: Any) -> None:
    del file[M0]
    file.create_dataset(M0, (3, 4), "f4", external=[("other.bin", 0, 48)])


def config(change: Callable[[Any], object]) -> Callable[[Any], object]:
    def edit(file: Any) -> None:
        says = json.loads(file.attrs["training_config"])
        file.attrs["training_config"] = json.dumps(change(says["optimizer_config"]) or says)

    return edit


V = "optimizer/vars"
M0 = f"{V}/2"
Z = np.zeros((3, 4), np.float32)
WEIGHTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "external link": (linked(M0, h5py.ExternalLink("other.h5", "x")), "links are not followed"),
    "link": (linked(M0, h5py.SoftLink("/layers/dense/vars/0")), "links are not followed"),
    "linked group": (linked("optimizer", h5py.ExternalLink("o.h5", "x")), "links are not followed"),
    "virtual": (virtual, "stored as it is"),
    "outside": (outside, "in another file"),
    "in pieces": (put(M0, Z, chunks=(3, 2)), "h5repack"),
    "compressed": (put(M0, np.zeros((1 << 22,), "f4"), compression="gzip"), "compressed"),
    "integers": (put(M0, Z.astype("i4")), "no order that an Adam's"),
    "complex": (put(M0, Z.astype("c8")), "floats or integers"),
    "text": (put(M0, "x"), "floats or integers"),
    "shape": (put(M0, Z[:2]), "no order that an Adam's"),
    "too few": (lambda file: file.pop(f"{V}/13"), "no order that an Adam's"),
    "a gap": (lambda file: file.pop(M0), "arrays 0, 1"),
    "a count that is none": (put(f"{V}/0", 1.5), "no count of steps"),
    "a negative count": (put(f"{V}/0", np.int64(-1)), "whole number >= 0"),
    "a rate that is none": (put(f"{V}/1", np.float32("nan")), "learning rate is nan"),
    "a negative rate": (put(f"{V}/1", np.float32(-1)), "learning rate is -1"),
    "two orders of bytes": (put(M0, Z.astype(">f4")), "two orders of bytes"),
    "no optimizer": (lambda file: file.pop("optimizer"), "no optimizer's state"),
}
CONFIGS: dict[str, tuple[Callable[[Any], object], str]] = {
    "another class": (lambda o: o.update(class_name="SGD"), "'SGD', and only Adam"),
    "a user's class": (lambda o: o.update(class_name="mine>Adam"), "'mine>Adam', and only"),
    "beta": (lambda o: o["config"].update(beta_1=2.0), "beta_1"),
    "not a number": (lambda o: o["config"].update(epsilon="x"), "epsilon"),
    "other slots": (lambda o: o["config"].update(amsgrad=False), "no order that an Adam's"),
    "unknown": (lambda o: o["config"].update(new=1), "new"),
    "older": (lambda o: o["config"].update(lr=1.0), "before TensorFlow 2"),
    "no mapping": (lambda o: [1], "no mapping"),
    "nested": (lambda o: {"optimizer_config": nested(200)}, "does not say|damaged"),
}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


def test_hostile_hdf5(files: dict[str, Path], tmp_path: Path) -> None:
    old = files["keras.weights.h5"]
    for edit, match in WEIGHTS.values():
        refused(edited(old, tmp_path / "w.weights.h5", edit), match)
    # The place of an array, changed to that of another one of its size, which the model has.
    with h5py.File(old) as file:
        places = [file[name].id.get_offset() for name in (M0, "layers/dense/vars/0")]
    one, other = (struct.pack("<BBQQ", 3, 1, place, 48) for place in places)
    (moved := tmp_path / "moved.weights.h5").write_bytes(old.read_bytes().replace(one, other))
    refused(moved, "in one place")
    old = files["tf_keras.h5"]
    for name, (change, match) in CONFIGS.items():
        refused(edited(old, tmp_path / f"{name}.h5", config(change)), match)

    def crossed(file: Any) -> None:
        names = [*file["optimizer_weights"].attrs["weight_names"]]
        names[1], names[2] = names[2], names[1]
        file["optimizer_weights"].attrs["weight_names"] = names

    refused(edited(old, tmp_path / "crossed.h5", crossed), "not of one variable")
    deep = tmp_path / "deep.h5"
    edited(old, deep, lambda file: file.attrs.update(training_config="[" * 60_000))
    refused(deep)


def test_hostile_archives(files: dict[str, Path], tmp_path: Path) -> None:
    old, path = files["keras.keras"], tmp_path / "new.keras"
    with zipfile.ZipFile(old) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def written(**changed: Any) -> Path:
        with zipfile.ZipFile(path, "w") as new:
            for name, content in parts.items():
                new.writestr(name, *changed.get(name.partition(".")[0], (content,)))
        return path

    state = read_all(old)
    assert read_all(written(model=(parts["model.weights.h5"], zipfile.ZIP_DEFLATED))) == state
    bomb = (b" " * ((1 << 26) + 1), zipfile.ZIP_DEFLATED)
    refused(written(model=bomb), "says that it has 67108865 bytes")
    refused(written(config=bomb), "says that it has 67108865 bytes")
    refused(written(model=(b"\x89HDF\r\n\x1a\n" + bytes(200),)), "form that Keras does not write")
    refused(written(config=(b"[]",)), "no mapping")
    refused(written(config=(b"{}",)), "holds no optimizer")
    # The size that is declared is not that which is there.
    written(model=bomb)
    content = bytearray(path.read_bytes())
    for magic, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        place = content.index(b"model.weights.h5", content.index(magic) if at == 24 else 0)
        struct.pack_into("<I", content, place - (30 - at if at == 22 else 46 - at), 1 << 20)
    path.write_bytes(content)
    refused(path)
    with zipfile.ZipFile(path := tmp_path / "twice.keras", "w") as new, pytest.warns(UserWarning):
        for name in ("config.json", *parts):
            new.writestr(name, parts[name])
    refused(path, "must have one 'config.json'")


def test_hostile_checkpoints(tmp_path: Path) -> None:
    one, two = (trained(keras, keras.optimizers.Adam(r), BEFORE[:2]) for r in (0.1, 0.2))
    path = tmp_path / "both"
    tf.train.Checkpoint(gen=one, dis=two).write(str(path))
    refused(path, "Received: 'gen/optimizer', 'dis/optimizer'|'dis/optimizer', 'gen/optimizer'")
    refused(path, "no Adam under 'gen'", key="gen")
    assert formats.read(path, key="dis.optimizer").settings["learning_rate"] == pytest.approx(0.2)
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("w", (2,))
        session.run(variable.initializer)
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "names"))
    refused(tmp_path / "names", "of names and not of objects")
    tf.train.Checkpoint(v=tf.Variable(1.0)).write(str(tmp_path / "none"))
    refused(tmp_path / "none", "Received: none")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "checkpoint").write_text('model_checkpoint_path: "../both"\n')
    refused(folder, "not in it")
    tf.train.Checkpoint(model=one).save(str(folder / "ck"))
    assert formats.read(folder).settings["learning_rate"] == pytest.approx(0.1)


def test_what_a_file_of_weights_does_not_tell(files: dict[str, Path], tmp_path: Path) -> None:
    path = write(trained(keras, keras.optimizers.Adam(use_ema=True)), tmp_path, ".weights.h5")
    refused(path, "gradient_accumulator, momentum.*, or .*average, momentum")
    settings = keras.optimizers.Adam(use_ema=True).get_config()
    assert "average" in formats.read(path, settings=settings).variables[0].slots
    with pytest.raises(FileNotFoundError):
        formats.read(tmp_path / "none.keras")
    (tmp_path / "text.keras").write_text("nothing")
    refused(tmp_path / "text.keras", "It is none")


def test_variables_that_were_added_later() -> None:
    """Base state, then of each extension its count and its state, as omniadam's configs say."""
    shapes = [(), (), (2,), (2,), (2,), (), (3,), (4,), (3,), (3,), (4,), (4,)]
    values = [np.full(s, i, "f4") for i, s in enumerate(shapes)]
    values[0], values[5] = np.int64(9), np.int64(-1)
    arrays = [Stored(v.shape, v.dtype.name, v.__array__, (i,)) for i, v in enumerate(values)]
    settings = {"learning_rate": 0.1, "use_ema": True, "extensions": [["c/kernel", "dense/bias"]]}
    known = keras_state.Known("omniadam.Adam", "keras 3", settings)
    held = keras_state.ordered(arrays, known, None)
    given = keras_state.snapshot(held, Path("file"), {})
    assert [(v.name, v.is_named, v.extension, v.shape) for v in given.variables] == [
        ("0", False, 0, (2,)),
        ("c/kernel", True, 1, (3,)),
        ("dense/bias", False, 1, (4,)),
    ]
    numbers = [
        [int(given.tensors[name].read().flat[0]) for name in v.slots.values()]
        for v in given.variables
    ]
    assert numbers == [[2, 3, 4], [6, 8, 9], [7, 10, 11]]
    assert given.tensors["extension.1"].read() == -1
    changes = keras_state.changes(held, given, "position")
    assert sorted(each.stored.places[0] for each in changes) == list(range(12))
    with pytest.raises(ValueError, match="lists of names"):
        wrong = known._replace(settings={"extensions": [2]})
        keras_state.ordered(arrays, wrong, None)


READS = """
import sys
from omniadam import formats
for path in sys.argv[1:]:
    assert [tensor.read() for tensor in formats.read(path).tensors.values()]
print(sorted({"h5py", "keras", "tensorflow", "tf_keras", "torch", "jax"} & set(sys.modules)))
"""


def test_files_of_keras_need_no_library(files: dict[str, Path]) -> None:
    paths = [path for name, path in files.items() if path.is_file()]
    assert len(paths) == 6
    done = subprocess.run([sys.executable, "-c", READS, *paths], stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().strip() == "[]"


def test_every_version_of_hdf5(tmp_path: Path) -> None:
    """What is read is what HDF5's own library reads, however the file is made."""
    for version in ("earliest", "v108", "v110", "v112", "v114", "latest"):
        for count, order in ((3, True), (30, False), (600, True))[: 2 + (version == "v108")]:
            path = tmp_path / f"{version}{count}.h5"
            with h5py.File(path, "w", libver=version, track_order=order) as file:
                group = file.create_group("a/b")
                for i in range(count):
                    group[str(i)] = np.asarray(
                        RNG.normal(size=(2,) * (i % 3)), ("f4", ">f8")[i % 2]
                    )
                for i in range(12):  # more than fit beside one another in a header
                    group.attrs[f"n{i}"] = ["x" * j for j in range(i + 1)]
                group.attrs["fixed"] = np.array([b"ab", b"cde"])
            with reading(path):
                ours = hdf5.File(Source.open(path))
                ours.check_places()
            address = ours.find("a/b")
            with h5py.File(path) as file:
                group = file["a/b"]
                assert set(ours.children(address)) == set(group)
                for name in group:
                    value = ours.array(ours.dataset(ours.find(name, address)))
                    assert value.tobytes() == group[name][()].astype(value.dtype).tobytes()
                for name, mark in ours.attributes(address).items():
                    texts = [part.content.decode() for part in ours.texts(mark)[1]]
                    given = group.attrs[name].tolist()
                    assert texts == [t.decode() if isinstance(t, bytes) else t for t in given]
