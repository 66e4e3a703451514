"""Sparse gradients: some rows of a variable, the others zero."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from .kernels.rows import sums_of_rows


class IndexedSlices:
    """The gradient of an embedding lookup: one row of values for each index that was looked up.

    An index may occur several times; its rows are summed before anything else is done with the
    gradient, so that a step equals the step with `to_dense()` to the bit; where a norm clips, the
    last bit may differ, as the norm is summed over these rows alone. Rows that do not occur have a
    gradient of zero and still move by their momentum and weight decay.

    Args:
        values: array of shape `(*indices.shape, *row)`, any float type.
        indices: integer array of any shape, each from 0 to `dense_shape[0] - 1`, in any order. It
            is kept as one of shape `(n,)`, and the values as `(n, *row)`.
        dense_shape: the shape of the variable, `(rows, *row)`.

    Raises:
        TypeError: if indices are not integers, values are no array of floats, or one is masked.
        ValueError: if the shapes do not fit together, or an index is out of range.

    Example:
        >>> import numpy as np
        >>> from omniadam import IndexedSlices
        >>> g = IndexedSlices(np.array([[1.0], [2.0], [4.0]]), np.array([1, 1, 2]), (4, 1))
        >>> g.to_dense().ravel().tolist()
        [0.0, 3.0, 4.0, 0.0]

    Source: the fields of TensorFlow's `tf.IndexedSlices`.
    """

    __slots__ = ("dense_shape", "indices", "values")

    def __init__(self, values: Any, indices: Any, dense_shape: Any) -> None:
        self.values: npt.NDArray[Any] = unmasked("values", values)
        self.indices: npt.NDArray[Any] = unmasked("indices", indices)
        self.dense_shape: tuple[int, ...] = tuple(operator.index(n) for n in dense_shape)
        shape = self.indices.shape
        if len(shape) != 1 and self.values.shape == (*shape, *self.dense_shape[1:]):
            self.indices = self.indices.reshape(-1)
            self.values = self.values.reshape(-1, *self.dense_shape[1:])
        _check(self)

    def __repr__(self) -> str:
        return (
            f"IndexedSlices(values of shape {self.values.shape} and dtype {self.values.dtype}, "
            f"{len(self.indices)} indices, dense_shape={self.dense_shape})"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense gradient."""
        return self.dense_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the values."""
        return self.values.dtype

    def to_dense(self) -> npt.NDArray[Any]:
        """The same gradient as an array of shape `dense_shape`."""
        rows, values = self.coalesce()
        dense = np.zeros(self.dense_shape, values.dtype)
        dense[rows] = values
        return dense

    def coalesce(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """The distinct indices, ascending, and the sum of the rows of each.

        Rows are added in the order of their occurrence; float16 and bfloat16 are summed in float32
        and left there, as the rest of the step is computed in float32.

        Returns:
            Indices of shape `(m,)` and values of shape `(m, *row)`, C-contiguous.
        """
        _check(self)  # the arrays may have been written to since
        held = self.values.dtype
        wide = np.dtype(np.float32) if held.name in ("float16", "bfloat16") else held
        order = np.argsort(self.indices, kind="stable").astype(np.int64, copy=False)
        rows = self.indices[order].astype(np.int64, copy=False)
        is_first = np.ones(len(rows) + 1, bool)
        is_first[1:-1] = rows[1:] != rows[:-1]
        values = np.ascontiguousarray(self.values.astype(wide, copy=False))
        return rows[is_first[:-1]], sums_of_rows(values, order, np.flatnonzero(is_first))


def unmasked(name: str, given: Any) -> npt.NDArray[Any]:
    """An array of what was given: it would lose a mask without a word."""
    parts = given if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise TypeError(
            f"`{name}` of IndexedSlices must not be masked, of numpy.ma. Leave masked rows out, "
            "or fill them: values.filled(0)."
        )
    return np.asarray(given)


def _check(g: IndexedSlices) -> None:
    unmasked("values", g.values)
    unmasked("indices", g.indices)
    # The bfloat16 of ml_dtypes is none of NumPy's own floats.
    if not (np.issubdtype(g.values.dtype, np.floating) or g.values.dtype.name == "bfloat16"):
        raise TypeError(
            "`values` of IndexedSlices must be an array of floating-point numbers. "
            f"Received dtype {g.values.dtype}."
        )
    if not np.issubdtype(g.indices.dtype, np.integer):
        raise TypeError(
            f"`indices` of IndexedSlices must be integers. Received dtype {g.indices.dtype}."
        )
    if not g.dense_shape:
        raise ValueError("`dense_shape` of IndexedSlices must have at least one dimension.")
    expected = (*g.indices.shape, *g.dense_shape[1:])
    if g.indices.ndim != 1 or g.values.shape != expected:
        raise ValueError(
            "IndexedSlices needs `values` of shape (*indices.shape, *dense_shape[1:]). "
            f"Received indices of shape {g.indices.shape}, values of shape "
            f"{g.values.shape}, dense_shape {g.dense_shape}."
        )
    if g.indices.size:
        low, high = int(g.indices.min()), int(g.indices.max())
        if low < 0 or high >= g.dense_shape[0]:
            wrong = low if low < 0 else high
            raise ValueError(
                f"`indices` of IndexedSlices must be from 0 to {g.dense_shape[0] - 1}, the rows of "
                f"dense_shape {g.dense_shape}. Received index {wrong}. Drop padding ids, or "
                "enlarge the table."
            )
