"""NumPy: arrays updated in place, by the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import versions
from ..kernels import layout
from ..kernels.cpu import SparseRows
from ..kernels.layout import Operand, Region
from ..kernels.rows import Clock, Step, is_deferrable
from ..rule import Pass, Rule
from ..sparse import IndexedSlices
from ..table import Deferred, Slot, Table
from .base import FLOATS, Entry, Fast, received
from .host import HostMemory

versions.check("numpy", np.__version__)

Array = npt.NDArray[Any]


class NumPy(HostMemory):
    """Variables are writable `np.ndarray`s, and tables."""

    name: ClassVar[str] = "numpy"

    def make_fast(self) -> Fast:
        from ..fast.numpy import FastNumPy

        return FastNumPy()

    def region(self, values: Any) -> Region:
        return layout.region_of(memory_of(values))

    def operand(self, entry: Entry) -> Operand:
        table = entry.variable
        if isinstance(table, Table) and entry.slots and not table.owned_by(self):
            raise ValueError(
                f"Table '{entry.name}' of shape {entry.shape} does not belong to this optimizer "
                "any more: its release() was called. Create a new optimizer for it."
            )
        for held in (*entry.slots, entry.accumulator, entry.average):
            if held is not None and not memory_of(held).flags.writeable:
                raise ValueError(
                    f"The optimizer's state for variable '{entry.name}' must stay writable, as it "
                    "was built. One of its arrays of shape "
                    f"{held.shape} is read-only: set its flags.writeable = True."
                )
        return super().operand(entry)

    def dtype(self, values: Array) -> str:
        return values.dtype.name

    def value(self, variable: Array) -> Any:
        return variable.item()  # without a look at the name of its type, which takes longer

    def floats(self, values: Any, entry: Entry) -> Array:
        return memory_of(values).astype(entry.slot_dtype, copy=False)

    def name_of(self, variable: Any) -> str | None:
        return variable.name if isinstance(variable, Table) else None

    def shown(self, variable: Any) -> Any:
        return variable.present() if isinstance(variable, Deferred) else variable

    def array(self, variable: Any) -> Any:
        return self.shown(variable)

    def describe(self, variable: Any, name: str) -> Entry:
        if isinstance(variable, Table):
            return Entry(variable, name, variable.shape, variable.dtype.name)
        if not isinstance(variable, np.ndarray) or isinstance(variable, np.ma.MaskedArray):
            raise TypeError(
                f"Variable '{name}' must be a writable NumPy array. Received: "
                f"{received(variable)}. A number or a NumPy scalar cannot be updated in place: "
                "use np.array(value)."
            )
        if not variable.dtype.isnative:
            raise TypeError(
                f"Variable '{name}' has the byte order of another machine (dtype "
                f"{variable.dtype.str}). Convert it with "
                "variable.astype(variable.dtype.newbyteorder('='))."
            )
        if variable.dtype.name not in FLOATS:
            raise TypeError(
                f"Variable '{name}' must be float16, float32 or float64. Received dtype "
                f"{variable.dtype} with shape {variable.shape}."
            )
        if not variable.flags.writeable:
            raise ValueError(
                f"Variable '{name}' of shape {variable.shape} is read-only, so it cannot be "
                "updated in place. Pass a writable copy, or set variable.flags.writeable = True."
            )
        if variable.size and not layout.is_injective(
            variable.shape, variable.strides, variable.itemsize
        ):
            raise ValueError(
                f"Variable '{name}' of shape {variable.shape} has elements that share memory "
                f"(strides {variable.strides}), as np.broadcast_to makes. Pass a copy of it."
            )
        return Entry(variable, name, variable.shape, variable.dtype.name)

    def zeros(self, entry: Entry, dtype: str) -> Any:
        table = entry.variable
        if not isinstance(table, Table):
            return np.zeros_like(table, dtype, subok=False)
        table.claim(self, self.turn, Clock(len(table), self.turn, self.team))
        return Slot(np.zeros(table.shape, dtype), table)

    def is_apart(self, entry: Entry) -> bool:
        return isinstance(entry.variable, Table)

    def pass_over(
        self, kind: Pass, rule: Rule, entry: Entry, operand: Operand, gradient: Any, dtype: str
    ) -> Any:
        table = entry.variable
        if isinstance(table, Table):
            if isinstance(gradient, SparseRows) and is_deferrable(kind, rule):
                held = table.memory, *(slot.memory for slot in entry.slots)
                return Step(table.clock, kind, rule, operand, held, gradient, dtype)
            if not kind.measures_only:
                table.forget()
        return super().pass_over(kind, rule, entry, operand, gradient, dtype)

    def create(self, value: Array) -> Array:
        return np.array(value)

    def numpy(self, variable: Any) -> Array:
        variable = self.shown(variable)
        is_bfloat16 = variable.dtype.name == "bfloat16"  # of the package ml_dtypes
        return np.array(variable, np.float32 if is_bfloat16 else None)

    def assign(self, variable: Any, value: Any) -> None:
        if isinstance(variable, Deferred):
            variable.assign(value)
        else:
            variable[...] = value

    def gradient(self, gradient: Any, entry: Entry) -> Any:
        if isinstance(gradient, IndexedSlices):
            _check_shape(gradient, entry)
            rows, values = gradient.coalesce()
            return SparseRows(rows, _usable(values))
        if not isinstance(gradient, np.ndarray) or isinstance(gradient, np.ma.MaskedArray):
            # A 0-d result of a reduction is a NumPy scalar, which autograd returns too.
            if not isinstance(gradient, np.generic):
                raise TypeError(
                    f"The gradient of variable '{entry.name}' must be a NumPy array or "
                    f"omniadam.IndexedSlices. Received: {received(gradient)}. The variable has "
                    f"shape {entry.shape} and dtype {entry.dtype}."
                )
            gradient = np.asarray(gradient)
        _check_shape(gradient, entry)
        if gradient.dtype.kind not in "fiu" and gradient.dtype.name not in FLOATS:
            raise TypeError(
                f"The gradient of variable '{entry.name}' must hold real numbers. Received dtype "
                f"{gradient.dtype}; the variable has dtype {entry.dtype}."
            )
        return _usable(np.asarray(gradient))

    def differentiate(
        self, loss: Any, variables: Sequence[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        with versions.imported(
            "autograd",
            user="Differentiating a loss over NumPy arrays",
            hint="Or compute the gradients yourself, and call "
            "apply_gradients(zip(gradients, variables)).",
        ):
            from autograd import make_vjp
            from autograd.tracer import getval
        if not callable(loss):
            raise TypeError(
                "`loss` must be a callable with one argument a variable, written with "
                f"autograd.numpy. Received: {received(loss)}."
            )

        def checked(each: list[Any]) -> Any:
            boxed = loss(*each)
            value = getval(boxed)
            kind = getattr(getattr(value, "dtype", None), "kind", type(value).__name__)
            if kind not in ("f", "float") or (grad_loss is None and np.shape(value) != ()):
                raise ValueError(
                    f"`loss` must return a real scalar. Received: {received(value)} of shape "
                    f"{np.shape(value)}. Take its mean or sum, or pass `grad_loss` of the same "
                    "shape."
                )
            if grad_loss is not None and np.shape(grad_loss) != np.shape(value):
                raise ValueError(
                    f"`grad_loss` must have the shape of the loss, {np.shape(value)}. Received "
                    f"shape {np.shape(grad_loss)}."
                )
            return scale(boxed)

        vjp, value = make_vjp(checked, 0)(list(variables))
        return list(vjp(np.ones_like(value) if grad_loss is None else grad_loss))


def memory_of(values: Any) -> Array:
    """The array that a variable or a slot is, or is in."""
    return values.memory if isinstance(values, Deferred) else values


def _usable(gradient: Array) -> Array:
    """A gradient in a type that kernels read."""
    usable = gradient.dtype.name in FLOATS and gradient.dtype.isnative
    return gradient if usable else gradient.astype(np.float64)


def _check_shape(gradient: Any, entry: Entry) -> None:
    if tuple(gradient.shape) != entry.shape:
        raise ValueError(
            f"The gradient of variable '{entry.name}' must have the variable's shape "
            f"{entry.shape} (dtype {entry.dtype}). Received shape {tuple(gradient.shape)} (dtype "
            f"{gradient.dtype})."
        )


BACKEND = NumPy
