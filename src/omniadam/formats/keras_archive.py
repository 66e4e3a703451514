"""Keras's `.keras` files: a zip file with a model's config, and its weights in HDF5.

Bounds, checked before anything is inflated: the config has at most 64 MiB; weights that are
compressed, which Keras does not do, at most 64 MiB or a hundred times what they take in the file.
They are inflated to a temporary file. The sums (CRC-32) of both are verified before they are used.
"""

from __future__ import annotations

import copy
import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..saving import atomic
from ..saving.snapshot import Snapshot
from . import keras_state
from .hdf5 import File
from .keras_hdf5 import by_number, patches_of
from .keras_state import UNKNOWN, Held
from .source import Source, patched, reading

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_MOST = keras_state.MOST_TEXT
_MOST_TIMES = 100


def read(path: Path, key: str | None, settings: Mapping[str, Any] | None) -> Snapshot:
    """The state in a file: see `formats.read`."""
    file = open(path, "rb")  # noqa: SIM115 - of the source, as long as something may be read
    whole = Source(file)
    with reading(path):
        archive = _Archive(whole, file)
        held = archive.held(key, settings)
        return keras_state.snapshot(held, path, archive.origin)


def write_into(given: Snapshot, path: Path, key: str | None, by: str) -> None:
    """Replace the state in a file: see `formats.write_into`."""
    file = open(path, "rb")  # noqa: SIM115 - of the source
    whole = Source(file)
    with reading(path, "written into"):
        archive = _Archive(whole, file)
        held = archive.held(key, given.settings)
        patches = list(patches_of(keras_state.changes(held, given, by)))
        config = archive.config
        if held.known.is_complete and given.settings:
            compiled = config["compile_config"]
            changed = keras_state.changed_config(compiled["optimizer"], held, given)
            if changed != compiled["optimizer"]:
                config = {**config, "compile_config": {**compiled, "optimizer": changed}}
    text = None if config is archive.config else json.dumps(config).encode()

    def contents(info: zipfile.ZipInfo) -> Iterator[bytes]:
        if info.filename == _WEIGHTS:
            return patched(archive.weights, patches)
        if info.filename == _CONFIG and text is not None:
            return iter([text])
        return archive.blocks(info)

    def fill(out: IO[bytes]) -> None:
        archive.write(out, contents)
        whole.close()

    atomic.replace(path, fill)


class _Archive:
    """A file that was looked at as far as it tells the state of an optimizer."""

    def __init__(self, whole: Source, file: IO[bytes]) -> None:
        self._whole = whole
        self._zip = zipfile.ZipFile(file)
        self._parts = self._zip.infolist()
        self.config = keras_state.parsed(self._text(_CONFIG), _CONFIG)
        self.weights = self._weights()
        self.origin = self._origin()

    def _part(self, name: str) -> zipfile.ZipInfo:
        found = [info for info in self._parts if info.filename == name]
        if len(found) != 1:
            raise ValueError(f"it must have one '{name}'. It has {len(found)}")
        info = found[0]
        if info.flag_bits & 0x41:
            raise ValueError(f"its '{name}' is encrypted")
        is_stored = info.compress_type == zipfile.ZIP_STORED
        most = self._whole.size if is_stored else max(_MOST, _MOST_TIMES * info.compress_size)
        if name != _WEIGHTS:
            most = min(most, _MOST)
        if info.file_size > most or info.compress_size > self._whole.size:
            raise ValueError(
                f"its '{name}' says that it has {info.file_size} bytes, in {info.compress_size} of "
                f"the file. At most {most} are read"
            )
        return info

    def _text(self, name: str) -> str:
        return self._zip.read(self._part(name)).decode()

    def _origin(self) -> dict[str, str]:
        if not any(info.filename == _METADATA for info in self._parts):
            return {}
        says = keras_state.parsed(self._text(_METADATA), _METADATA)
        return {"keras": str(says.get("keras_version", ""))}

    def _weights(self) -> Source:
        info = self._part(_WEIGHTS)
        if info.compress_type != zipfile.ZIP_STORED:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - of the source
            with self._zip.open(info) as part:
                while block := part.read(1 << 20):
                    file.write(block)
            file.flush()
            return Source(file)
        head = self._whole.at(info.header_offset, 30)
        if head[:4] != b"PK\x03\x04" or info.compress_size != info.file_size:
            raise ValueError(f"its '{_WEIGHTS}' is not where it should be")
        begin = info.header_offset + 30
        begin += int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        found = self._whole.part(begin, info.file_size)
        sum_ = 0
        for block in found.blocks():
            sum_ = zlib.crc32(block, sum_)
        if sum_ != info.CRC:
            raise ValueError(f"its '{_WEIGHTS}' is not what was written: its sum is another")
        return found

    def held(self, key: str | None, settings: Mapping[str, Any] | None) -> Held:
        """The state of the optimizer."""
        if key not in (None, "optimizer"):
            return by_number(File(self.weights), key, UNKNOWN, settings)
        compiled = self.config.get("compile_config")
        optimizer = compiled.get("optimizer") if isinstance(compiled, dict) else None
        if optimizer is None:
            raise ValueError("it holds no optimizer: the model was not compiled when it was saved")
        known = keras_state.of_config(optimizer)
        return by_number(File(self.weights), key, known, settings)

    def blocks(self, info: zipfile.ZipInfo) -> Iterator[bytes]:
        """What a part holds."""
        with self._zip.open(info) as part:
            while block := part.read(1 << 20):
                yield block

    def write(self, out: IO[bytes], contents: Any) -> None:
        """Make the file anew, each part as it was but for what it holds."""
        with zipfile.ZipFile(out, "w", allowZip64=True) as new:
            new.comment = self._zip.comment
            for info in self._parts:
                fresh = copy.copy(info)
                is_large = info.file_size >= 1 << 31
                with new.open(fresh, "w", force_zip64=is_large) as part:
                    for block in contents(info):
                        part.write(block)
                # What the writer sets where there was nothing.
                fresh.external_attr = info.external_attr
