"""Tables of which each step uses a few rows: the others catch up when they are used next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .kernels.rows import Clock
from .sparse import unmasked

Array = npt.NDArray[Any]


class Deferred:
    """An array whose rows may be steps behind: a table, or what an optimizer keeps for one.

    `memory` is the array as it is. Whatever else reads or writes it brings it up to date before.
    """

    __slots__ = ("memory",)

    def __init__(self, memory: Array) -> None:
        self.memory = memory

    def flush(self) -> None:
        """Bring every row up to date."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of rows, and the shape of one."""
        return self.memory.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements."""
        return self.memory.dtype

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.memory.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.memory.size

    def __len__(self) -> int:
        return len(self.memory)

    def present(self) -> Array:
        """A copy, up to date."""
        self.flush()
        return self.memory.copy()

    def assign(self, values: Any) -> None:
        """Overwrite it as a whole.

        Args:
            values: array of its shape, or of one that broadcasts to it.

        Raises:
            ValueError: if the values do not fit; nothing has been changed then.
        """
        new = np.broadcast_to(unmasked("values", values), self.shape)
        self.flush()  # the steps that rows missed are not for the new values
        self.memory[...] = new


class Slot(Deferred):
    """What an optimizer keeps for a table, row by row."""

    __slots__ = ("_table",)

    def __init__(self, memory: Array, table: Table) -> None:
        super().__init__(memory)
        self._table = table

    def flush(self) -> None:
        """Bring every row of the table up to date, and of its slots."""
        self._table.flush()

    def assign(self, values: Any) -> None:
        """Overwrite it as a whole, as `Deferred.assign` does."""
        super().assign(values)
        self._table.forget()


class Table(Deferred):
    """Rows that are trained as one variable, at the cost of those that a step uses.

    Adam moves every row at every step, by its momentum, also those that the batch did not use. A
    table puts that off until a row is looked up or used next, and then makes the steps that it
    missed, in order, with the learning rates and norms that they had. Values are the same to the
    bit as if the array was trained, with the same `IndexedSlices`.

    It is given to `omniadam.Adam` as a variable. Steps are put off for gradients that are
    `IndexedSlices`; a dense gradient, `gradient_accumulation_steps`, `use_ema` and rules that are
    not Adam's are a pass over all rows, as for an array.

    Args:
        array: of shape `(rows, *row)`, float16, bfloat16, float32 or float64. It is copied.
        name: what the state is kept under.

    Raises:
        TypeError: if it is no array of floats.
        ValueError: if it has no rows' axis.

    Example:
        >>> import numpy as np
        >>> from omniadam import Adam, IndexedSlices, Table
        >>> table = Table(np.zeros((4, 2), np.float32), name="embeddings")
        >>> opt = Adam(0.1)
        >>> gradient = IndexedSlices(np.ones((1, 2), np.float32), [2], table.shape)
        >>> for _ in range(2):
        ...     calls = opt.apply_gradients([(gradient, table)])
        >>> table.lookup([2, 0]).astype(float).round(4).tolist()
        [[-0.2, -0.2], [0.0, 0.0]]

    Source: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, with all rows at all steps, as
    TensorFlow documents it for `tf.IndexedSlices`.
    """

    __slots__ = ("__weakref__", "_clock", "_owner", "_turn", "name")

    def __init__(self, array: Any, name: str | None = None) -> None:
        values = np.array(unmasked("array", array), order="C")
        if values.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise TypeError(
                "A Table must be of float16, bfloat16, float32 or float64. Received dtype "
                f"{values.dtype} with shape {values.shape}."
            )
        if values.ndim == 0:
            raise ValueError("A Table must have an axis of rows. Received an array of shape ().")
        super().__init__(values)
        self.name = name
        self._clock: Clock | None = None
        self._owner: Callable[[], Any] = lambda: None
        self._turn: Any = threading.RLock()

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"Table(shape={self.shape}, dtype={self.dtype}{name})"

    def lookup(self, ids: Any) -> Array:
        """Rows, up to date, as a copy.

        Args:
            ids: integers of any shape, each from 0 to the number of rows - 1.

        Returns:
            Array of shape `(*ids.shape, *row)`.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if one is out of range.
        """
        wanted = checked_ids(ids, len(self))
        with self._turn:
            if self._clock is not None:
                self._clock.catch_up_with(wanted)
            found: Array = self.memory.take(wanted, axis=0)
        return found

    def flush(self) -> None:
        """Bring every row up to date."""
        with self._turn:
            if self._clock is not None:
                self._clock.flush()

    def forget(self) -> None:
        """Be ready for a pass over all rows, or for other state: rows are not as they began."""
        with self._turn:
            self.flush()
            if self._clock is not None:
                self._clock.is_fresh = False

    def release(self) -> None:
        """Bring every row up to date, and leave the optimizer, which then refuses to step it."""
        with self._turn:
            self.flush()
            self._clock, self._owner = None, lambda: None

    def __getitem__(self, key: Any) -> Any:
        return self.present()[key] if not isinstance(key, (int, np.integer)) else self._row(key)

    def _row(self, key: Any) -> Any:
        at = int(key) + (len(self) if key < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"row {key} is out of range for a table of {len(self)} rows")
        return self.lookup(at)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(
                "A Table cannot be seen without a copy: rows are brought up to date when they are "
                "used. Use np.asarray(table), or table.lookup(ids) for some rows."
            )
        return self.present().astype(self.dtype if dtype is None else dtype, copy=False)

    def __reduce__(self) -> Any:
        return Table, (self.present(), self.name)

    def __deepcopy__(self, memo: Any) -> Table:
        return Table(self.present(), self.name)

    # --- of the optimizer that has it ---

    def owned_by(self, owner: Any) -> bool:
        """Whether this is what steps it."""
        return self._owner() is owner

    def claim(self, owner: Any, turn: Any, clock: Clock) -> None:
        """Be stepped by one optimizer only, from now on.

        Raises:
            ValueError: if there is another one.
        """
        other = self._owner()
        if other is not None and other is not owner:
            raise ValueError(
                f"A Table belongs to one optimizer. This one of shape {self.shape} is in use by "
                "another: call its release() before, or give each optimizer a table of its own."
            )
        if other is None:
            self.flush()
            self._clock, self._owner, self._turn = clock, weakref.ref(owner), turn

    @property
    def clock(self) -> Clock:
        """Of the optimizer that has it."""
        assert self._clock is not None
        return self._clock


def checked_ids(ids: Any, rows: int) -> npt.NDArray[np.int64]:
    """Row numbers as int64, of their own shape."""
    found = np.asarray(ids)
    if found.size == 0 and found.dtype.kind == "f":  # of an empty list
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu":
        raise TypeError(f"`ids` must be integers. Received dtype {found.dtype}.")
    if found.size:
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise ValueError(
                f"`ids` must be from 0 to {rows - 1}, the rows of the table. Received {wrong}."
            )
    return found.astype(np.int64, copy=False)
