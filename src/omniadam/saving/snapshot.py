"""The state of an optimizer apart from any optimizer and any library: what is in a file.

Every optimizer makes one and takes one: `saving.optimizers` says which module does it for which
class. Every file format is read to one and written from one: `saving.file` is ours, `formats` are
those of others.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# What state means by the documentation that it is of. State of one is not state of another: `lr`
# and `clipnorm` are others, and epsilon stands elsewhere.
KERAS = "keras 3"
OPTIMIZER_V2 = "tensorflow 2.0"
CONTRIB_KERAS = "tensorflow 1.1"
TORCH = "torch"
OPTAX = "optax"  # a tree, and not variables with slots

# What is kept for a variable, in Keras's words, which stand for those of every library.
SLOTS = ("momentum", "velocity", "velocity_hat", "average", "gradient_accumulator", "step")
# The number of calls: int64, shape (). `step` of a variable, of PyTorch, is likewise.
ITERATION = "iteration"


class Tensor(NamedTuple):
    """A tensor that is read when it is wanted."""

    shape: tuple[int, ...]
    dtype: str  # as NumPy, or ml_dtypes, calls it
    # Of this shape and type, in C order, of the machine's byte order. It may be the memory of the
    # optimizer itself: it is not written to, and not kept.
    read: Callable[[], Array]

    @classmethod
    def of(cls, value: Array) -> Tensor:
        """What is in memory already."""
        return cls(value.shape, value.dtype.name, InMemory(value))


class InMemory:
    """Reads an array that is there; can be pickled, as no other way to read can."""

    def __init__(self, value: Array) -> None:
        self._value = np.asarray(value, order="C")

    def __call__(self) -> Array:
        """The array."""
        return self._value


class Variable(NamedTuple):
    """A variable that there is state for. Its values are not part of the state."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    # By their words, under which names its slots are among the tensors. May be empty: PyTorch has
    # none for a parameter that never had a gradient.
    slots: Mapping[str, str]
    # Whether its name is its user's. What a library made up, or where it stood in a list, names
    # another variable the next time.
    is_named: bool = True
    # 0: it was there at the build; else number 1, 2, ... of the extensions. Since when it is there
    # stands in the tensor `extension.{number}`, int64, shape ().
    extension: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Class, settings and state of an optimizer."""

    # The class's public name, "omniadam.AdamW", or module and name of a user's own.
    kind: str
    generation: str
    # What JSON can hold, as the class's `get_config` has it; PyTorch's are groups. A learning rate
    # that is a number is here, and is no tensor.
    settings: Mapping[str, Any]
    # In the order of the optimizer.
    variables: tuple[Variable, ...]
    # By name. Those of variables are `{variable}.{word of the slot}`.
    tensors: Mapping[str, Tensor]
    # Of the file that it was read from: what wrote it.
    origin: Mapping[str, str] = field(default_factory=dict)
    # Whether `settings` are all there are. If not, the file told no others: an optimizer that has
    # them may take the state, and none can be made of it.
    is_complete: bool = True

    def in_memory(self) -> Snapshot:
        """The same, with all tensors read."""
        tensors = {name: Tensor.of(tensor.read()) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)


def digests(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """SHA-256 of each tensor's bytes, in order: one is read while another is hashed."""
    with ThreadPoolExecutor(2) as hashing:
        begun: deque[Future[bytes]] = deque()
        for tensor in tensors:
            # Read by this thread, which may have the lock of the optimizer.
            begun.append(hashing.submit(digest, tensor.read()))
            if len(begun) > 1:
                yield begun.popleft().result()
        yield from (each.result() for each in begun)


def digest(value: Array) -> bytes:
    """SHA-256 of what is in memory, in C order."""
    return hashlib.sha256(value.reshape(-1).view(np.uint8).data).digest()


def hash_of(forms: Mapping[str, tuple[str, tuple[int, ...]]], found: Mapping[str, bytes]) -> bytes:
    """One hash of all tensors: of name, dtype, shape and digest of each, sorted by name.

    Args:
        forms: by name, dtype and shape.
        found: by name, the digests.
    """
    whole = hashlib.sha256()
    for name in sorted(forms):
        dtype, shape = forms[name]
        # Each part ends where its length says, so that no two states are written alike.
        for part in (name.encode(), dtype.encode(), repr(tuple(shape)).encode(), found[name]):
            whole.update(len(part).to_bytes(8, "little") + part)
    return whole.digest()


def state_hash(snapshot: Snapshot) -> str:
    """Equal if and only if the state is: settings, library and layout do not count."""
    tensors = snapshot.tensors
    found = dict(zip(tensors, digests(tensors.values()), strict=True))
    return hash_of({name: (t.dtype, t.shape) for name, t in tensors.items()}, found).hex()
