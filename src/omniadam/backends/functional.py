"""What libraries share whose step computes new values by the library's own functions.

During a step values are kept in cells, one for each variable and slot that the step has read. New
values replace old ones in the cells, and are stored once at the end. A step is therefore a function
of arrays, whatever the library makes of it: it can be traced, compiled, branched on a traced
condition, or run on arrays that belong to no variable at all.

What a step is in the middle of is its thread's: other threads trace and run steps of the same
optimizer at the same time.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..rule import Pass, RuleKey, make_element, make_gradient
from .base import Backend, Entry, Selection

# Each by identity of a variable: the variable and its present value.
Cells = dict[int, tuple[Any, Any]]


@dataclass(eq=False)
class Call:
    """What a step is in the middle of."""

    cells: Cells
    reachable: list[Any]  # the variables that it may touch
    how: str  # the library runs it, in a word of that library's
    has_turn: bool
    stored: set[int] = field(default_factory=set)  # by identity: variables that are overwritten


class _OfThread(threading.local):
    call: Call | None = None
    # After a step: by identity of a counter, its value, for who made the step.
    counts: dict[int, Any] | None = None


class Functional(Backend):
    """A backend whose step is a function of arrays."""

    # sqrt, maximum, minimum, cast(x, dtype), sum_of_squares, broadcast_like(x, array), and
    # where(c, a, b): a where the number c is not zero, else b.
    arrays: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__()
        self._here = _OfThread()

    @abstractmethod
    def load(self, variable: Any) -> Any:
        """The present value as an array of the library."""

    @abstractmethod
    def store(self, variable: Any, value: Any) -> None:
        """Overwrite the variable by an array of its shape and type."""

    def cond(
        self, condition: Any, yes: Callable[..., Any], no: Callable[..., Any], values: list[Any]
    ) -> list[Any]:
        """`yes(values)` or `no(values)`, by a condition that may be traced."""
        raise NotImplementedError

    # --- cells ---

    @property
    def how(self) -> str:
        """How the step runs that this thread is in the middle of."""
        call = self._here.call
        return "" if call is None else call.how

    def read(self, variable: Any) -> Any:
        """The value at this point of the step, or the stored one outside a step."""
        call = self._here.call
        if call is None:
            return self.load(variable)
        if id(variable) not in call.cells:
            call.cells[id(variable)] = variable, self.load(variable)
        return call.cells[id(variable)][1]

    def write(self, variable: Any, value: Any) -> None:
        """Replace the value; stored at the end of the step, or at once outside one."""
        value = self.arrays.broadcast_like(value, self.read(variable))
        call = self._here.call
        if call is None:
            self.store(variable, value)
        else:
            # Stored where it was read: in the variable, or in what stands in for it.
            call.cells[id(variable)] = call.cells[id(variable)][0], value
            call.stored.add(id(variable))

    def value(self, variable: Any) -> Any:
        return self.read(variable)

    def overwrite(self, entry: Entry, calls: Any) -> None:
        if not self.is_traced(calls):
            super().overwrite(entry, calls)
            return
        average = self.arrays.cast(self.read(entry.average), entry.dtype)
        value = self.arrays.where(calls, average, self.read(entry.variable))
        self.assign(entry.variable, value)

    def present(self, variable: Any) -> Any:
        return self.read(variable)

    def assign(self, variable: Any, value: Any) -> None:
        self.write(variable, value)

    def count(self, variable: Any) -> Any:
        counts, self._here.counts = self._here.counts, None
        found = None if counts is None else counts.get(id(variable))
        return self.value(variable) if found is None else found

    def inline(
        self,
        step: Callable[[], None],
        selection: Selection,
        cells: Cells,
        how: str = "",
        *,
        has_turn: bool = False,
    ) -> set[int]:
        """Run a step on cells, which hold the new values afterwards; nothing is stored.

        Returns:
            By identity, the variables that it overwrites.
        """
        reachable = [
            variable
            for e in (*selection.entries, *selection.rest)
            for variable in (e.variable, *e.slots, e.accumulator, e.average)
            if variable is not None
        ]
        call, here = Call(cells, reachable, how, has_turn), self._here
        outer = here.call
        try:
            here.call = call
            step()
        finally:
            here.call = outer
        return call.stored

    def run(
        self,
        step: Callable[[Selection, Any, Any, Any], None],
        selection: Selection,
        gradients: Any,
        rate: Any,
        fixed: Any,
    ) -> None:
        cells: Cells = {}
        with self.step_in_turn():
            stored = self.inline(
                lambda: step(selection, gradients, rate, fixed), selection, cells, has_turn=True
            )
            for key in stored:
                self.store(*cells[key])

    @contextmanager
    def aside(self) -> Iterator[None]:
        call = self._here.call
        if call is None or not call.has_turn:
            yield
            return
        self._flush(call)
        with super().aside():
            yield

    def _flush(self, call: Call) -> None:
        """Store what is in cells, and forget it: what comes now reads the variables."""
        for key, cell in call.cells.items():
            if key in call.stored:
                self.store(*cell)
        # The dictionary stays the one that the step was begun with.
        call.cells.clear()
        call.stored.clear()

    def branch(self, condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
        # Both ways must return the same cells, so it is all that a step can touch.
        call = self._here.call
        assert call is not None
        touched = {id(v): v for v in call.reachable}
        for variable in touched.values():
            self.read(variable)
        before, keys = call.cells, list(touched)

        def on(action: Callable[[], None]) -> Callable[[list[Any]], list[Any]]:
            def run(values: list[Any]) -> list[Any]:
                call.cells = dict(before)
                for key, value in zip(keys, values, strict=True):
                    call.cells[key] = before[key][0], value
                action()
                result = [self.read(touched[key]) for key in keys]
                call.cells = before
                return result

            return run

        after = self.cond(condition, on(yes), on(no), [before[key][1] for key in keys])
        for key, value in zip(keys, after, strict=True):
            before[key] = before[key][0], value
        call.stored.update(keys)

    # --- passes ---

    def gather(self, selection: Selection, gradients: list[Any]) -> list[Any]:
        return gradients

    def _coefficients(self, values: Sequence[Any], dtype: str) -> tuple[Any, ...]:
        # What was computed on the host stays a number, which takes the type of what it meets.
        return tuple(v if isinstance(v, float) else self.arrays.cast(v, dtype) for v in values)

    def square_sums(
        self, kind: Pass, rule: RuleKey, selection: Selection, gradients: Any, pass_c: Any
    ) -> list[Any]:
        return [
            self.arrays.sum_of_squares(g) for g in self._applied(kind, selection, gradients, pass_c)
        ]

    def _applied(self, kind: Pass, selection: Selection, gradients: Any, pass_c: Any) -> list[Any]:
        """Gradients as they are to be applied, before they are clipped by a norm."""
        gradient_of = make_gradient(kind, self.arrays.minimum, self.arrays.maximum)
        applied = []
        for entry, g in zip(selection.entries, gradients, strict=True):
            accumulator = self.read(entry.accumulator) if kind.accumulated else None
            g = self.arrays.cast(g, entry.slot_dtype)
            coefficients = self._coefficients(pass_c, entry.slot_dtype)
            applied.append(gradient_of(g, accumulator, coefficients))
        return applied

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
        for i, entry in enumerate(selection.entries if kind.gradient else selection.rest):
            self._pass_over(
                kind,
                rule.bind(self.arrays.sqrt, self.arrays.maximum),
                entry,
                gradients[i] if kind.gradient else None,
                factors[i] if len(factors) else None,
                self._coefficients(rule_c, entry.slot_dtype),
                self._coefficients(pass_c, entry.slot_dtype),
            )

    def _pass_over(
        self,
        kind: Pass,
        rule: Any,
        entry: Entry,
        gradient: Any,
        factor: Any,
        rule_c: Sequence[Any],
        pass_c: Sequence[Any],
    ) -> None:
        arrays, dtype = self.arrays, entry.slot_dtype

        element = make_element(
            kind._replace(decayed=kind.decayed and entry.decayed),
            rule,
            make_gradient(kind, arrays.minimum, arrays.maximum),
            minimum=arrays.minimum,
            maximum=arrays.maximum,
            where=arrays.where,
            rounded=lambda w: w if entry.dtype == dtype else self.rounded(w, entry),
        )
        w, slots, accumulator, average = element(
            arrays.cast(self.read(entry.variable), dtype),
            None if gradient is None else arrays.cast(gradient, dtype),
            tuple(self.read(slot) for slot in entry.slots) if kind.updates else (),
            self.read(entry.accumulator) if kind.accumulated else None,
            self.read(entry.average) if kind.averaged else None,
            factor if factor is None else arrays.cast(factor, dtype),
            rule_c,
            pass_c,
        )
        if kind.updates:
            for slot, new in zip(entry.slots, slots, strict=True):
                self.write(slot, new)
        if kind.accumulated:
            self.write(entry.accumulator, accumulator)
        if kind.averaged:
            self.write(entry.average, average)
        if kind.stores_variable:
            self.write(entry.variable, arrays.cast(w, entry.dtype))

    def rounded(self, value: Any, entry: Entry) -> Any:
        """What is left of a value in a 16-bit variable, in the type of the arithmetic."""
        return self.arrays.cast(self.arrays.cast(value, entry.dtype), entry.slot_dtype)

    def update_each(
        self,
        kind: Pass,
        selection: Selection,
        gradients: Any,
        factors: Sequence[Any],
        pass_c: Sequence[Any],
        update: Callable[[Any, Entry], None],
    ) -> None:
        for i, entry in enumerate(selection.entries):

            def rule(w: Any, g: Any, slots: Any, c: Any, entry: Entry = entry) -> Any:
                self.write(entry.variable, self.arrays.cast(w, entry.dtype))
                self._outside(lambda: update(g, entry))
                return self.arrays.cast(self.read(entry.variable), entry.slot_dtype), slots

            self._pass_over(
                kind,
                rule,
                entry,
                gradients[i],
                factors[i] if len(factors) else None,
                (),
                self._coefficients(pass_c, entry.slot_dtype),
            )

    def _outside(self, action: Callable[[], None]) -> None:
        """Do what reads and writes variables by itself: they must hold what the cells do."""
        here = self._here
        call = here.call
        if call is None:
            action()
            return
        self._flush(call)
        with self.aside():
            here.call = None
            try:
                action()
            finally:
                here.call = call
