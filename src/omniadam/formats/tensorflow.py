"""TensorFlow's checkpoints of objects, in which there is an Adam of Keras, tf_keras or omniadam.

What a checkpoint has of an optimizer depends on whose it is; in none are its class or all of its
settings. Arrays and index have sums, which TensorFlow verifies. A checkpoint is several files, of
which the index says how many the others are: written anew, it has another number of them, so that
one rename of the index is the moment at which the new ones are its.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import versions
from ..saving.names import in_file
from ..saving.snapshot import OPTIMIZER_V2, Snapshot
from . import keras_state
from .keras_hdf5 import of_tf_keras
from .keras_state import UNKNOWN, Change, Held, Stored
from .source import Array, reading

with versions.imported("tensorflow", user="A checkpoint of TensorFlow"):
    import tensorflow as tf

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_PART = 1 << 28  # of the arrays that are in memory at once, unless one has more
# By our words, the lists in which Keras and tf_keras keep slots.
_LISTS = {
    "average": "_model_variables_moving_average",
    "gradient_accumulator": "_accumulated_gradients",
    "momentum": "_momentums",
    "velocity": "_velocities",
    "velocity_hat": "_velocity_hats",
}
_OLDER = {"m": "momentum", "v": "velocity", "vhat": "velocity_hat"}
_OURS = re.compile(rf"(.+)_({'|'.join(_LISTS)})((?:_\d+)?)")


def read(path: Path, key: str | None, settings: Mapping[str, Any] | None) -> Snapshot:
    """The state in a checkpoint: see `formats.read`."""
    with reading(path):
        held = _Checkpoint(_prefix(path)).held(key)
        return keras_state.snapshot(held, path, {"tensorflow": tf.__version__})


def write_into(given: Snapshot, path: Path, key: str | None, by: str) -> None:
    """Replace the state in a checkpoint: see `formats.write_into`."""
    with reading(path, "written into"):
        checkpoint = _Checkpoint(_prefix(path))
        changes = keras_state.changes(checkpoint.held(key), given, by)
    checkpoint.write({place: each for each in changes for place in each.stored.places})


def _prefix(path: Path) -> Path:
    """Of the files of a checkpoint; of a folder, that of its newest."""
    if not path.is_dir():
        return path
    found = tf.train.latest_checkpoint(os.fspath(path))
    if found is None or Path(found).resolve().parent != path.resolve():
        raise ValueError("the newest checkpoint that it names is not in it")
    return Path(found)


class _Checkpoint:
    """What is in the files with a prefix."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._reader: Any = _asked(tf.train.load_checkpoint, os.fspath(prefix))
        self._shapes = _asked(self._reader.get_variable_to_shape_map)
        self._types = {
            name: kind.name for name, kind in _asked(self._reader.get_variable_to_dtype_map).items()
        }
        if _GRAPH not in self._shapes:
            raise ValueError(
                "it is a checkpoint of names and not of objects, as TensorFlow 1 wrote them: "
                "tf.train.Checkpoint(model=model, optimizer=optimizer) restores and saves it anew"
            )
        self._bytes = sum(file.stat().st_size for file in self._data_files())
        self._nodes = _graph(self.array(_GRAPH).item())

    def _data_files(self) -> list[Path]:
        name = re.compile(re.escape(self.prefix.name) + r"\.data-\d{5}-of-\d{5}")
        return [each for each in self.prefix.parent.iterdir() if name.fullmatch(each.name)]

    def array(self, key: str) -> Array:
        """An array, whose sum is verified."""
        value: Array = _asked(self._reader.get_tensor, key)
        return _as_array(value)

    # --- whose it is ---

    def held(self, key: str | None) -> Held:
        """State of the optimizer."""
        found = {i: path for i, path in self._paths() if self._is_adam(i)}
        if key is not None:
            wanted = self._find(key.replace(".", "/"))
            found = {i: path for i, path in found.items() if i == wanted}
            if not found:
                raise ValueError(f"there is no Adam under '{key}'")
        if len(found) != 1:
            places = ", ".join(f"'{path}'" for path in found.values()) or "none"
            raise ValueError(
                f"it must hold one optimizer that is an Adam and has made a step, or its key must "
                f"say which. Received: {places}"
            )
        (i,) = found
        children = self._children(i)
        if "_momentums" in children:
            return self._of_keras(children)
        if "iter" in children:
            return self._of_optimizer_v2(i, children)
        return self._of_ours(children)

    def _children(self, i: int) -> dict[str, int]:
        return {child.local_name: child.node_id for child in self._node(i).children}

    def _node(self, i: int) -> Any:
        if not 0 <= i < len(self._nodes):
            raise ValueError("an object in it is missing")
        return self._nodes[i]

    def _paths(self) -> Iterator[tuple[int, str]]:
        """All objects, each by its shortest path."""
        seen, rest = {0}, deque([(0, "")])
        while rest:
            i, path = rest.popleft()
            yield i, path
            for name, child in self._children(i).items():
                if child not in seen:
                    seen.add(child)
                    rest.append((child, f"{path}/{name}" if path else name))

    def _find(self, path: str) -> int:
        i = 0
        for name in path.split("/"):
            children = self._children(i)
            if name not in children:
                raise ValueError(
                    f"there is no object '{path}'. Where it ends, it has {[*children]}"
                )
            i = children[name]
        return self._children(i).get("inner_optimizer", i)

    def _is_adam(self, i: int) -> bool:
        children = self._children(i)
        if "_momentums" in children:  # Nadam has these, too
            return {"_iterations", "_velocities"} <= children.keys() and not (
                children.keys() & {"_u_product"}
            )
        if "iter" in children:
            return {"m", "v"} <= {each.slot_name for each in self._node(i).slot_variables}
        return "iteration" in children and any(map(_OURS.fullmatch, children))

    def _stored(self, i: int) -> Stored:
        values = [each for each in self._node(i).attributes if each.name == "VARIABLE_VALUE"]
        if len(values) != 1:
            raise ValueError("an object that should be a variable is none")
        key = values[0].checkpoint_key
        if key not in self._shapes:
            raise ValueError(f"the array '{key}' is missing")
        shape, dtype = tuple(self._shapes[key]), self._types[key]
        if math.prod(shape) * tf.as_dtype(dtype).size > self._bytes:
            raise ValueError(f"'{key}' of shape {shape} is larger than its files")
        return Stored(shape, dtype, lambda: self._whole(key, shape, dtype), (key,))

    def _whole(self, key: str, shape: tuple[int, ...], dtype: str) -> Array:
        found = self.array(key)
        if (found.shape, found.dtype.name) != (shape, dtype):
            raise ValueError(f"'{key}' has changed since it was opened")
        return found

    def _name(self, i: int) -> str:
        return next((each.full_name for each in self._node(i).attributes), "")

    def _list(self, i: int) -> list[int]:
        children = self._children(i)
        if set(children) != {str(k) for k in range(len(children))}:
            raise ValueError("a list in it has gaps")
        return [children[str(k)] for k in range(len(children))]

    def _of_keras(self, children: Mapping[str, int]) -> Held:
        lists = {w: self._list(children[n]) for w, n in _LISTS.items() if n in children}
        lists = {word: nodes for word, nodes in lists.items() if nodes}
        is_tf_keras = "_trainable_variables" not in children
        own = [] if is_tf_keras else self._list(children["_trainable_variables"])
        count = len(lists.get("momentum", ()))
        if {len(nodes) for nodes in lists.values()} - {count} or (own and len(own) != count):
            raise ValueError("its lists of slots are not of one length")
        variables = []
        for k in range(count):
            slots = {word: self._stored(nodes[k]) for word, nodes in lists.items()}
            dtype = ""
            if own:
                name, dtype = self._name(own[k]), self._stored(own[k]).dtype
            else:
                pair = (f"{self._name(lists[word][k])}:0" for word in ("momentum", "velocity"))
                name = of_tf_keras(*pair) or ""
            variables.append((name, slots, dtype))
        rate = children.get("_learning_rate")
        told = {children["_iterations"], rate, *(i for nodes in lists.values() for i in nodes)}
        if not {*self._list(children["_variables"])} <= told:
            raise ValueError(
                "its optimizer keeps arrays of which a checkpoint does not tell what they are, "
                "such as those of variables that were added by `extend`. A .keras file does"
            )
        return Held(
            UNKNOWN._replace(is_tf_keras=is_tf_keras),
            self._stored(children["_iterations"]),
            {} if rate is None else {"learning_rate": self._stored(rate)},
            _variables(variables),
        )

    def _of_optimizer_v2(self, i: int, children: Mapping[str, int]) -> Held:
        slots: dict[int, dict[str, Stored]] = {}
        for each in self._node(i).slot_variables:
            word = _OLDER.get(each.slot_name)
            own = slots.setdefault(each.original_variable_node_id, {})
            if word is None or word in own:
                raise ValueError(
                    f"its slot '{each.slot_name}' is none of Adam's, or is there twice"
                )
            own[word] = self._stored(each.slot_variable_node_id)
        kinds = {tuple(sorted(each)) for each in slots.values()}
        if len(kinds) > 1:
            raise ValueError("its variables do not have the same slots")
        numbers = {
            name: self._stored(children[name])
            for name in ("learning_rate", "decay", "beta_1", "beta_2")
            if name in children
        }
        known = UNKNOWN._replace(
            kind="omniadam.compat.optimizer_v2.Adam",
            generation=OPTIMIZER_V2,
            settings={"amsgrad": any("velocity_hat" in kind for kind in kinds)},
        )
        named = [(self._name(node), each, self._type_of(node)) for node, each in slots.items()]
        return Held(known, self._stored(children["iter"]), numbers, _variables(named))

    def _type_of(self, i: int) -> str:
        return self._stored(i).dtype if self._node(i).attributes else ""

    def _of_ours(self, children: Mapping[str, int]) -> Held:
        slots: dict[tuple[str, str], dict[str, Stored]] = {}
        for name, i in children.items():
            match = _OURS.fullmatch(name)
            if match is not None:
                slots.setdefault((match[1], match[3]), {})[match[2]] = self._stored(i)
            elif name not in ("iteration", "learning_rate"):
                raise ValueError(f"its optimizer keeps '{name}', which is none of Adam's")
        names: dict[str, list[str]] = {}
        for i, _ in self._paths():
            for each in self._node(i).attributes:
                names.setdefault(each.full_name.replace("/", "_"), []).append(each.full_name)
        variables = []
        for (flat, number), each in slots.items():
            found = [] if number else names.get(flat, [])
            variables.append((found[0] if len(found) == 1 else "", each, ""))
        rate = children.get("learning_rate")
        return Held(
            UNKNOWN,
            self._stored(children["iteration"]),
            {} if rate is None else {"learning_rate": self._stored(rate)},
            _variables(variables),
        )

    # --- writing ---

    def write(self, changes: Mapping[str, Change]) -> None:
        """Write all arrays anew, some of them changed."""
        folder, name = self.prefix.parent, self.prefix.name
        old = self._data_files()
        taken = {int(file.name[-5:]) for file in old}
        parts = list(self._parts(taken))
        aside = folder / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        moved: list[Path] = []
        try:
            with reading(self.prefix), tf.device("CPU:0"):
                for i, keys in enumerate(parts):
                    arrays = [self._content(key, changes) for key in keys]
                    _asked(
                        tf.raw_ops.SaveV2,
                        prefix=os.fspath(aside / f"part{i}"),
                        tensor_names=keys,
                        shape_and_slices=[""] * len(keys),
                        tensors=arrays,
                    )
                _asked(
                    tf.raw_ops.MergeV2Checkpoints,
                    checkpoint_prefixes=[os.fspath(aside / f"part{i}") for i in range(len(parts))],
                    destination_prefix=os.fspath(aside / name),
                    delete_old_dirs=False,
                )
            self._reader = None  # which has the files open, and Windows replaces none that is
            for file in aside.iterdir():
                _sync(file)
                if file.name != f"{name}.index":
                    moved.append(folder / file.name)
                    os.replace(file, moved[-1])
            _sync(folder)
            os.replace(aside / f"{name}.index", folder / f"{name}.index")
        except BaseException:
            for file in moved:
                file.unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _sync(folder)
        for file in old:
            with suppress(OSError):  # nobody looks for them any more
                file.unlink()

    def _content(self, key: str, changes: Mapping[str, Change]) -> Any:
        value = changes[key].read() if key in changes else self.array(key)
        return tf.constant(value, tf.as_dtype(self._types[key]))

    def _parts(self, taken: set[int]) -> Iterator[list[str]]:
        """Names of arrays, in parts that fit in memory, whose number is another than it was."""
        parts: list[list[str]] = [[]]
        room = _PART
        for key in sorted(self._shapes):
            size = math.prod(self._shapes[key]) * tf.as_dtype(self._types[key]).size
            if parts[-1] and size > room:
                parts.append([])
                room = _PART
            parts[-1].append(key)
            room -= size
        while len(parts) in taken:
            large = next((part for part in parts if len(part) > 1), None)
            if large is None:
                raise ValueError(f"beside '{self.prefix}' there are files of too many checkpoints")
            parts.append([large.pop()])
        yield from parts


def _variables(found: Sequence[tuple[str, Mapping[str, Stored], str]]) -> tuple[Any, ...]:
    """With names, or positions where a name is missing or not the only one."""
    names = [name for name, _, _ in found]
    are_names = all(names) and len(set(names)) == len(names)
    return tuple(
        keras_state.variable(*(in_file(name) if are_names else (str(i), False)), slots, dtype)
        for i, (name, slots, dtype) in enumerate(found)
    )


def _graph(content: bytes) -> Any:
    """The objects of a checkpoint."""
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    _asked(graph.ParseFromString, content)
    if not graph.nodes:
        raise ValueError("its objects are missing")
    return graph.nodes


def _asked(ask: Any, *args: Any, **named: Any) -> Any:
    """What TensorFlow answers; its errors, of several types, as ValueErrors."""
    try:
        return ask(*args, **named)
    except Exception as error:
        raise ValueError(str(error).rstrip(".")) from error


def _as_array(value: Any) -> Array:
    import numpy as np

    return np.asarray(value)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
