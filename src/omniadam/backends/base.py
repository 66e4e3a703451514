"""What the optimizer asks of a library, each a sentence of contract.

A backend object belongs to one optimizer. It is made when the optimizer is built on variables of
its library, and may keep what it prepared for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..rule import Pass, RuleKey

HALVES = ("float16", "bfloat16")
FLOATS = ("float32", "float64", *HALVES)


@dataclass(eq=False)
class Entry:
    """A variable with everything the optimizer knows about it and keeps for it."""

    variable: Any
    name: str
    shape: tuple[int, ...]
    dtype: str  # one of FLOATS
    decayed: bool = True
    slots: tuple[Any, ...] = ()
    accumulator: Any = None
    average: Any = None

    @property
    def slot_dtype(self) -> str:
        """Slots of float16 and bfloat16 variables are float32, as the arithmetic is."""
        return "float32" if self.dtype in HALVES else self.dtype


@dataclass(eq=False)
class Selection:
    """The entries that one step has gradients for, and the rest, which only has an average."""

    entries: tuple[Entry, ...]
    rest: tuple[Entry, ...]
    # What the backend prepared for these entries.
    prepared: dict[Any, Any] = field(default_factory=dict)


class Backend(ABC):
    """One array library."""

    name: ClassVar[str]
    # Functions of a number, for the coefficients of a step: sqrt, expm1, log, maximum, where.
    functions: ClassVar[Any]
    # Functions of a number or an array of the library, for schedules: see `functions_of`.
    elementwise: ClassVar[Any]

    @abstractmethod
    def describe(self, variable: Any, name: str) -> Entry:
        """The entry of a variable; raises TypeError or ValueError if it cannot be trained."""

    @abstractmethod
    def name_of(self, variable: Any) -> str | None:
        """The name or path that the library gave the variable, if it has one."""

    @abstractmethod
    def check_distinct(self, entries: Sequence[Entry]) -> None:
        """Raise ValueError if two variables share memory."""

    @abstractmethod
    def zeros(self, entry: Entry, dtype: str) -> Any:
        """A slot like the variable, in its memory layout and where it is placed."""

    @abstractmethod
    def create(self, value: npt.NDArray[Any]) -> Any:
        """A state variable with this value, not tied to any variable of the model."""

    @abstractmethod
    def value(self, variable: Any) -> Any:
        """The number that a state variable holds: of Python on the host, else maybe traced."""

    @abstractmethod
    def rate(self, value: Any) -> Any:
        """A learning rate that a schedule or callable returned, checked as far as it is known."""

    @abstractmethod
    def numpy(self, variable: Any) -> npt.NDArray[Any]:
        """The present value as a NumPy array; bfloat16 as float32."""

    @abstractmethod
    def assign(self, variable: Any, value: Any) -> None:
        """Overwrite a variable or slot by a value of its shape."""

    @abstractmethod
    def gradient(self, gradient: Any, entry: Entry) -> Any:
        """A gradient, sparse ones coalesced, or an error naming the variable."""

    @abstractmethod
    def gather(self, selection: Selection, gradients: list[Any]) -> Any:
        """Checked gradients, one an entry, in the form that `sweep` takes."""

    def recognise(self, selection: Selection, gradients: list[Any], variables: list[Any]) -> Any:
        """What `gather` would return, if a glance shows that all is as at the last step; else None.

        Only there to be fast: whatever is not recognised is checked at length.
        """
        return None

    @abstractmethod
    def square_sums(
        self, kind: Pass, rule: RuleKey, selection: Selection, gradients: Any, pass_c: Any
    ) -> list[Any]:
        """The sum of squares of each gradient, in at least the precision of the arithmetic."""

    @abstractmethod
    def sweep(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        gradients: Any,
        factors: Sequence[Any],
        rule_c: Sequence[Any],
        pass_c: Sequence[Any],
    ) -> None:
        """Take every element of the selection (of its rest, if `kind` has no gradient) through
        `rule.make_element`, in place.
        """

    @abstractmethod
    def update_each(
        self,
        kind: Pass,
        selection: Selection,
        gradients: Any,
        factors: Sequence[Any],
        pass_c: Sequence[Any],
        update: Callable[[Any, Entry], None],
    ) -> None:
        """As `sweep`, with `update(gradient, entry)` for a rule, one variable after another."""

    @abstractmethod
    def stateless_apply(
        self, optimizer: Any, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """New variables and new state, with everything that is passed in as it was."""

    @abstractmethod
    def branch(self, condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
        """Do one or the other, by a condition that may be traced."""

    @abstractmethod
    def differentiate(
        self, loss: Any, variables: Sequence[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        """Gradients of `scale(loss)` by the library's own differentiation."""


def received(value: Any) -> str:
    """How an error describes a value that is no usable array."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, (int, float, complex, str, type(None), np.generic)):
        return f"{value!r} ({kind})"
    return kind
