"""Keras: `keras.Variable`s on whichever backend Keras runs on, in a custom loop.

The step is that of the library the values lie in; added here is what a Keras variable has beside a
value: a path, a constraint, and perhaps `overwrite_with_gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np

from .. import versions

with versions.imported("keras"):
    import keras

from . import backend_of
from .base import Backend, Entry, Selection


def native(variable: Any) -> Any:
    """What a Keras variable holds: a tensor, a tf.Variable or an array. Others are left alone."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def settle(variable: keras.Variable) -> None:
    """Give a value the type that its variable states.

    Keras on NumPy makes float32 of what an initializer returns in float64, up to the first
    assignment.
    """
    value = variable.value
    if isinstance(value, np.ndarray) and value.dtype.name != variable.dtype:
        variable.assign(value)


class KerasVariables(Backend):
    """Put before the backend of the values' library, whose variables it takes out and puts back."""

    name: ClassVar[str] = "keras"

    @classmethod
    def over(cls, variables: Sequence[Any]) -> Backend:
        values = [native(variable) for variable in variables]
        library = backend_of(values[0])
        if library is None:
            raise TypeError(
                f"Keras's {keras.backend.backend()} backend keeps its values in a library that "
                f"omniadam does not know: {type(values[0])}."
            )
        return _combined(library.kind_for(values))(values)

    def name_of(self, variable: Any) -> str | None:
        return str(variable.path)

    def describe(self, variable: Any, name: str) -> Entry:
        if not isinstance(variable, keras.Variable):  # one of an entry that is looked at again
            return super().describe(native(variable), name)  # type: ignore[safe-super]
        settle(variable)
        entry = super().describe(native(variable), name)  # type: ignore[safe-super]
        entry.key = variable
        entry.variable = self._taken(variable)
        entry.replaced = bool(getattr(variable, "overwrite_with_gradient", False))
        return entry

    def _taken(self, variable: Any) -> Any:
        """What the library's backend is given for a Keras variable."""
        return native(variable) if self.holder is None else self.holder(variable)

    def _new(self, array: Any, *more: Any, **settings: Any) -> Any:
        """State of a library whose arrays cannot be overwritten lies in Keras variables too."""
        if self.holder is None:
            return super()._new(array, *more, **settings)  # type: ignore[misc]
        return self.holder(keras.Variable(array, dtype=array.dtype.name, trainable=False))

    def shown(self, variable: Any) -> Any:
        return variable.owner if self.holder is not None else variable

    @property
    def keeps_state(self) -> bool:
        """As of `Backend`."""
        return True

    def _check_mutable(self) -> None:
        """Keras's variables are, whatever their values."""

    def gradient(self, gradient: Any, entry: Entry) -> Any:
        return super().gradient(native(gradient), entry)  # type: ignore[safe-super]

    def gather(self, selection: Selection, gradients: list[Any]) -> Any:
        if self.holder is None:
            # A Keras variable on NumPy has a new array after each assignment.
            for entry in (*selection.entries, *selection.rest):
                entry.variable = native(entry.key)
        return super().gather(selection, gradients)  # type: ignore[safe-super]

    def recognise(self, selection: Selection, gradients: list[Any], variables: list[Any]) -> Any:
        if self.holder is None:
            given = [native(variable) for variable in variables]
            if any(native(e.key) is not e.variable for e in selection.rest):
                return None
        else:
            given = [held_for(v, e) for v, e in zip(variables, selection.entries, strict=False)]
        return super().recognise(selection, gradients, given)

    def value(self, variable: Any) -> Any:
        return super().value(native(variable))  # type: ignore[safe-super]

    def writing(self, variable: Any, value: int) -> Any:
        return super().writing(native(variable), value)  # type: ignore[misc]

    def numpy(self, variable: Any) -> Any:
        return super().numpy(native(variable))  # type: ignore[safe-super]

    def assign(self, variable: Any, value: Any) -> None:
        if isinstance(variable, keras.Variable):
            variable = self._taken(variable)
        super().assign(variable, native(value))  # type: ignore[safe-super]

    def replace(self, entry: Entry, gradient: Any, iteration: Any, steps: int | None) -> None:
        ops, variable = keras.ops, entry.key
        if steps is None:
            variable.assign(gradient)
            return
        largest = ops.maximum(gradient, self.array(entry.accumulator))
        is_last = (self.value(iteration) + 1) % steps == 0
        variable.assign(ops.where(is_last, largest, native(variable)))
        self.assign(entry.accumulator, ops.where(is_last, ops.zeros_like(largest), largest))

    def constrain(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.key.constraint is not None:
                entry.key.assign(entry.key.constraint(native(entry.key)))
                self.check_run()

    def differentiate(
        self, loss: Any, variables: Sequence[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        values = [native(variable) for variable in variables]
        return super().differentiate(loss, values, grad_loss, scale)  # type: ignore[safe-super]


def held_for(variable: Any, entry: Entry) -> Any:
    """What stands for a variable in an entry, if it is the entry's."""
    return entry.variable if variable is entry.key else variable


@cache
def _combined(library: type[Backend]) -> type[Backend]:
    return type(f"Keras{library.__name__}", (KerasVariables, library), {})


BACKEND = KerasVariables
