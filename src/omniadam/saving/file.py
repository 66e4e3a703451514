"""Our file: safetensors, with the optimizer's settings in its metadata, and digests at its end.

    8 bytes         the length of the header, little-endian
    header          JSON: dtype, shape and place of each tensor; `__metadata__`, strings only
    tensors         little-endian, in C order, one behind the other
    last tensor     "omniadam.digests", 64 bytes: the state's hash, and SHA-256 of all before the
                    tensors; 32 more where there are tensors beside the state: the hash of those

Any reader of safetensors reads the tensors. It is written tensor by tensor, as the library's own
writer wants all of them in memory at once. It is read through the library's `safe_open`, whose
parser has been audited: what that refuses is not read. Source: the format's page,
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from . import atomic
from .snapshot import Snapshot, Tensor, Variable, digest, hash_of

Array = npt.NDArray[Any]

FORMAT = "1"
DIGESTS = "omniadam.digests"
# safetensors' names of types. Those that it has beside these, nobody keeps state in.
_TYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}
_NAMES = {theirs: ours for ours, theirs in _TYPES.items()}
# What is read at once to be hashed.
_PART = 1 << 22
_TURN = threading.Lock()


# --- writing ---


def write(
    path: str | os.PathLike[str],
    snapshot: Snapshot,
    others: Mapping[str, Tensor] | None = None,
    told: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a state to a file, or nothing.

    Args:
        path: of the file.
        snapshot: what is written.
        others: tensors beside those of the state, which do not count for its hash.
        told: called with the number of bytes of each tensor that has been written.

    Raises:
        OSError: if it cannot be written: the file is as it was.
        ValueError: if a tensor is of a type that safetensors has not.
    """
    every = _ordered({**snapshot.tensors, **(others or {})})
    header = _header(every, _metadata(snapshot, others or {}), 96 if others else 64)

    is_large = sum(_size(each.dtype, each.shape) for each in every.values()) > 1 << 26

    def fill(file: IO[bytes]) -> None:
        _put(file, header)
        found, synced = {}, None
        # A tensor is hashed while it is written: one is in memory at a time. What was written goes
        # to the disk meanwhile: a gigabyte takes 3.1 s then, and 4.7 if that is left to the end.
        with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
            for name, tensor in every.items():
                value = _little(np.asarray(tensor.read(), order="C"))
                if (value.shape, value.dtype.name) != (tensor.shape, tensor.dtype):
                    raise ValueError(
                        f"The tensor '{name}' must be of shape {tensor.shape} and dtype "
                        f"{tensor.dtype}, as it was when the file was begun. It is of shape "
                        f"{value.shape} and dtype {value.dtype.name}."
                    )
                found[name] = hashing.submit(digest, value)
                _put(file, value.reshape(-1).view(np.uint8).data)
                found[name].result()
                told(value.nbytes)
                if is_large and (synced is None or synced.done()):
                    _check(synced)
                    synced = syncing.submit(os.fsync, file.fileno())
                del value  # before the next one is read
            _check(synced)
        digests = {name: each.result() for name, each in found.items()}
        _put(file, _state_hash(every, digests, others or {}) + hashlib.sha256(header).digest())
        if others:
            _put(file, _hash_beside(others, digests))

    atomic.replace(path, fill)


def _check(synced: Future[None] | None) -> None:
    """Raise what was raised: of a disk that fails, an error is told once."""
    if synced is not None:
        synced.result()


def _put(file: IO[bytes], content: bytes | memoryview) -> None:
    """Write all of it, though the system may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the widest elements first, so that each begins at a multiple of its elements' size."""
    sizes = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise ValueError(
                f"The tensor '{name}' must be of one of the types {', '.join(_TYPES)}. Received: "
                f"{tensor.dtype}."
            )
        if name in (DIGESTS, "__metadata__"):
            raise ValueError(f"A tensor cannot be called '{name}', which the file itself needs.")
        sizes[name] = _dtype(tensor.dtype).itemsize
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: -sizes[name])}


def _metadata(snapshot: Snapshot, others: Mapping[str, Tensor]) -> dict[str, str]:
    from .. import __version__

    variables = [
        {
            "name": v.name,
            "shape": list(v.shape),
            "dtype": v.dtype,
            "slots": dict(v.slots),
            "is_named": v.is_named,
            "extension": v.extension,
        }
        for v in snapshot.variables
    ]
    return {
        "omniadam_format": FORMAT,
        "omniadam_version": __version__,
        "class": snapshot.kind,
        "generation": snapshot.generation,
        "settings": _json(snapshot.settings),
        "is_complete": _json(snapshot.is_complete),
        "variables": _json(variables),
        "not_state": _json(sorted(others)),
    }


def _json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The settings must be what JSON can hold, to be saved: {error}. Received: {value!r}"
        ) from error


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], digests: int) -> bytes:
    """The length and the header, padded so that the tensors begin at a multiple of 8."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    forms = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    forms[DIGESTS] = "uint8", (digests,)
    for name, (dtype, shape) in forms.items():
        end = begin + _size(dtype, shape)
        content[name] = {
            "dtype": _TYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _state_hash(
    tensors: Mapping[str, Tensor], found: Mapping[str, bytes], others: Mapping[str, Any]
) -> bytes:
    forms = {name: (t.dtype, t.shape) for name, t in tensors.items() if name not in others}
    return hash_of(forms, found)


def _hash_beside(others: Mapping[str, Tensor], found: Mapping[str, bytes]) -> bytes:
    return hash_of({name: (t.dtype, t.shape) for name, t in others.items()}, found)


# --- reading ---


class Read(NamedTuple):
    """What is in a file of ours, whose digests were found right."""

    snapshot: Snapshot
    others: Mapping[str, Tensor]
    state_hash: str


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of ours, damaged perhaps."""
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 12)
    except OSError:
        return False
    return start[8:9] == b"{" and b'"__metadata__"' in start[:32] and b"omniadam_format" in start


def read(path: str | os.PathLike[str], told: Callable[[int], object] = lambda count: None) -> Read:
    """Open a file of ours, and verify all of it; tensors are read when they are wanted.

    The file stays open as long as something may read it: if another takes its place, this one's
    state is read. Memory: the header, of at most 100 MB by the format, and two parts of 4 MiB.

    Args:
        path: of the file.
        told: called with the number of bytes of each part that has been verified.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is none of ours, or damaged, or of a later version.
    """
    if Path(path).is_dir():
        raise ValueError(f"{os.fspath(path)} is a folder, and no file that omniadam wrote.")
    opened = _Opened(path)
    tensors = opened.tensors()
    metadata = opened.metadata
    if "omniadam_format" not in metadata:
        raise ValueError(
            f"{opened.shown} is a safetensors file, but not of omniadam: its metadata has no "
            f"'omniadam_format'. It has {sorted(metadata)}."
        )
    if metadata["omniadam_format"] != FORMAT:
        raise ValueError(
            f"{opened.shown} has format {metadata['omniadam_format']!r}, and this version of "
            f"omniadam reads format {FORMAT!r}. Use omniadam "
            f"{metadata.get('omniadam_version', 'of a later version')}, which wrote it."
        )
    state_hash, header_digest, hash_beside = opened.digests()
    if header_digest != opened.header_digest:
        raise opened.damaged("its header is not what was written")
    try:
        others = json.loads(metadata["not_state"])
        snapshot = _snapshot(metadata, {k: v for k, v in tensors.items() if k not in others})
        beside = {name: tensors[name] for name in others}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise opened.damaged(f"its header lacks what it must have ({error!r})") from error
    found = dict(zip(tensors, opened.hashed(told), strict=True))
    if _state_hash(tensors, found, beside) != state_hash or hash_beside != (
        _hash_beside(beside, found) if beside else b""
    ):
        raise opened.damaged("its tensors are not what was written")
    return Read(snapshot, beside, state_hash.hex())


class _Opened:
    """A file whose form has been checked by the library."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.shown = os.fspath(path)
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        self._then = self._now()
        try:
            with safe_open(self.shown, framework="numpy") as checked:
                self.metadata: dict[str, str] = dict(checked.metadata() or {})
                self._forms = {
                    name: (part.get_dtype(), tuple(part.get_shape()))
                    for name in checked.offset_keys()
                    for part in [checked.get_slice(name)]
                }
        except SafetensorError as error:
            raise self.damaged(f"{error}") from error
        length = int.from_bytes(self._at(0, 8), "little")
        header = self._at(8, length)
        self.header_digest = hashlib.sha256(length.to_bytes(8, "little") + header).digest()
        self._begins, place = {}, 8 + length
        for name, (theirs, shape) in self._forms.items():
            if theirs not in _NAMES:
                raise self.damaged(f"tensor '{name}' is of type {theirs}, which none is written of")
            self._begins[name] = place
            place += _size(_NAMES[theirs], shape)
        # What was opened twice was the same file, then: the library checks that nothing is over.
        if place != os.fstat(self._file).st_size:
            raise self.damaged("its tensors are not as long as the file")

    def _now(self) -> tuple[int, ...]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def damaged(self, why: str) -> ValueError:
        """The error."""
        return ValueError(
            f"{self.shown} cannot be read: {why}. It is damaged, or no file that omniadam wrote. "
            "Nothing has been changed."
        )

    def tensors(self) -> dict[str, Tensor]:
        """All but the digests."""
        return {
            name: Tensor(shape, _NAMES[theirs], partial(self._tensor, name))
            for name, (theirs, shape) in self._forms.items()
            if name != DIGESTS
        }

    def digests(self) -> tuple[bytes, bytes, bytes]:
        """Of the state, of the header, and of what is beside the state; empty if nothing is."""
        form = self._forms.get(DIGESTS)
        if form not in (("U8", (64,)), ("U8", (96,))):
            raise self.damaged(f"it lacks '{DIGESTS}'")
        all_three = bytes(self._at(self._begins[DIGESTS], form[1][0]))
        return all_three[:32], all_three[32:64], all_three[64:]

    def hashed(self, told: Callable[[int], object]) -> Iterator[bytes]:
        """SHA-256 of each tensor's bytes, in order; two at a time."""
        names = [name for name in self._forms if name != DIGESTS]
        if os.fstat(self._file).st_size < _PART:  # threads would take longer to begin
            yield from (self._hash(name, told) for name in names)
            return
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(lambda name: self._hash(name, told), names)

    def _hash(self, name: str, told: Callable[[int], object]) -> bytes:
        theirs, shape = self._forms[name]
        place, end = self._begins[name], self._begins[name] + _size(_NAMES[theirs], shape)
        found = hashlib.sha256()
        while place < end:
            part = self._at(place, min(_PART, end - place))
            found.update(part)
            place += len(part)
            told(len(part))
        return found.digest()

    def _at(self, place: int, size: int) -> bytearray:
        content = bytearray(size)
        self._read_into(memoryview(content), place)
        return content

    def _tensor(self, name: str) -> Array:
        theirs, shape = self._forms[name]
        value = np.empty(shape, _dtype(_NAMES[theirs]))
        self._read_into(value.reshape(-1).view(np.uint8).data, self._begins[name])
        if self._now() != self._then:  # it was verified before, and not since
            raise self.damaged("it was written to since it was opened")
        return value if sys.byteorder == "little" else value.byteswap()

    def _read_into(self, target: memoryview, place: int) -> None:
        """Fill memory with what is at a place of the file, which two threads may do at once."""
        while target:
            count = _read_at(self._file, target, place)
            if count == 0:
                raise self.damaged("it ends before its last tensor")
            target, place = target[count:], place + count


def _read_at(file: int, target: memoryview, place: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [target], place)
    with _TURN:  # Windows, macOS before 11
        os.lseek(file, place, os.SEEK_SET)
        part = os.read(file, min(len(target), _PART))
    target[: len(part)] = part
    return len(part)


def _snapshot(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Snapshot:
    """What metadata and tensors say together; raises KeyError, TypeError or ValueError."""
    variables = tuple(
        Variable(
            _typed(each["name"], str),
            tuple(_typed(size, int) for size in each["shape"]),
            _typed(each["dtype"], str),
            {_typed(word, str): _typed(name, str) for word, name in each["slots"].items()},
            _typed(each["is_named"], bool),
            _typed(each["extension"], int),
        )
        for each in json.loads(metadata["variables"])
    )
    missing = [name for v in variables for name in v.slots.values() if name not in tensors]
    if missing:
        raise ValueError(f"the tensors {missing} are missing")
    named = [v.name for v in variables if v.is_named]
    if len(set(named)) < len(named):
        raise ValueError("a variable is there twice")
    settings = _typed(json.loads(metadata["settings"]), dict)
    origin = {"omniadam": metadata["omniadam_version"]}
    kind, generation = metadata["class"], metadata["generation"]
    is_complete = _typed(json.loads(metadata.get("is_complete", "true")), bool)
    return Snapshot(kind, generation, settings, variables, tensors, origin, is_complete)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} must be a {kind.__name__}")
    return value


# --- types ---


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes  # which comes with JAX and TensorFlow

        name = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(name)
    return found


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    width = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    size = width
    for each in shape:
        size *= each
    return size


def _little(value: Array) -> Array:
    return value if sys.byteorder == "little" else value.byteswap()
