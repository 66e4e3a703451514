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
from typing import Any

from ..rule import MEASURES, make_element, make_gradient
from .base import Advance, Backend, Entry, Group, Selection, Stateless, Sums, nothing_measured

# A variable and its present value.
Cell = tuple[Any, Any]
# Each by identity of its variable.
Cells = dict[int, Cell]
# A step as a function of values, gradients, a rate or None, and numbers: the new values.
Pure = Callable[..., list[Any]]


@dataclass(eq=False)
class Call:
    """What a step is in the middle of."""

    cells: Cells
    reachable: list[Any]  # the variables that it may touch
    how: str  # it runs, in a word of who runs it; nothing for a step that is run as it is
    has_turn: bool
    stored: set[int] = field(default_factory=set)  # by identity: variables that are overwritten


class _OfThread(threading.local):
    call: Call | None = None
    # After a step: by identity of a counter, its value, for who made the step.
    counts: dict[int, Any] | None = None


class NotOurs(Exception):
    """The step calls an `update_step` that a user wrote, which is run as it is."""


class Functional(Backend):
    """A backend whose step is a function of arrays."""

    # `arrays` has more: cast(x, dtype), sum_of_squares, broadcast_like(x, array).

    def __init__(self, variables: Sequence[Any] = ()) -> None:
        super().__init__(variables)
        self._here = _OfThread()

    @abstractmethod
    def load(self, variable: Any) -> Any:
        """The present value as an array of the library."""

    @abstractmethod
    def store(self, variable: Any, value: Any) -> None:
        """Overwrite the variable by an array of its shape and type."""

    def is_count(self, value: Any) -> bool:
        """Whether a value is of an integer type, as counters are and nothing else."""
        raise NotImplementedError

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

    def is_symbolic(self, value: Any) -> bool:
        """Whether Python cannot ask for a value, since it stands for one that comes later."""
        return False

    def begun(self, variable: Any, updates: Any, gradients: Any) -> Any:
        since = self.value(variable)
        if not self.is_symbolic(since):
            return super().begun(variable, updates, gradients)
        since = self.arrays.where(since < 0, updates, since)
        self.assign(variable, since)
        return since

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

    def changes(
        self,
        step: Callable[[], None],
        selection: Selection,
        how: str = "",
        *,
        has_turn: bool = False,
    ) -> list[Cell]:
        """The variables that a step overwrites, with their new values; nothing is stored."""
        cells: Cells = {}
        stored = self.inline(step, selection, cells, how, has_turn=has_turn)
        return [cell for key, cell in cells.items() if key in stored]

    def counts_in(self, changed: Sequence[Cell]) -> dict[int, Any]:
        """The counters among what a step changed, by their identities."""
        return {id(variable): value for variable, value in changed if self.is_count(value)}

    def store_all(self, changed: Sequence[Cell]) -> None:
        """Or nothing, if this is interrupted."""
        before = [(variable, self.load(variable)) for variable, _ in changed]
        try:
            for variable, value in changed:
                self.store(variable, value)
        except BaseException:
            for variable, value in before:
                self.store(variable, value)
            raise

    def note_counts(self, counts: dict[int, Any]) -> None:
        """Note what a step counted up to, for the thread that made it to ask for by `count`."""
        self._here.counts = counts

    def run(
        self,
        advance: Advance,
        selection: Selection,
        gradients: Any,
        rate: Any,
        step: Any,
    ) -> None:
        with self.step_in_turn():
            changed = self.changes(
                lambda: advance(selection, gradients, rate, step), selection, has_turn=True
            )
            self.store_all(changed)
        self.note_counts(self.counts_in(changed))

    @contextmanager
    def aside(self) -> Iterator[None]:
        call = self._here.call
        if call is None or not call.has_turn:
            yield
            return
        self.flush()
        with super().aside():
            yield

    def flush(self) -> None:
        """Store what is in cells, and forget it: what comes now reads the variables."""
        call = self._here.call
        assert call is not None
        for key, cell in call.cells.items():
            if key in call.stored:
                self.store(*cell)
        # The dictionary stays the one that the step was begun with.
        call.cells.clear()
        call.stored.clear()

    def branch(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
        # Both ways must return the same cells, so it is all that a step can touch.
        call = self._here.call
        assert call is not None
        touched = {id(v): v for v in call.reachable}
        for variable in touched.values():
            self.read(variable)
        before, keys = call.cells, list(touched)

        def on(action: Callable[[], Any]) -> Callable[[list[Any]], list[Any]]:
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

    # --- a step as a function ---

    def check_stateless(self, call: Stateless) -> None:
        """Raise an error if this optimizer's step is no function of values."""

    def fitting(self, value: Any, name: str, variable: Any, *, is_state: bool) -> Any:
        """A value that `stateless_apply` is given, in its variable's shape and dtype."""
        raise NotImplementedError

    def densified(self, gradients: list[Any]) -> list[Any]:
        """Checked gradients, none of them sparse any more."""
        return gradients

    def run_pure(
        self, pure: Pure, selection: Selection, arguments: tuple[Any, ...], step: Any
    ) -> list[Any]:
        """What a pure function returns, or a program that is compiled of it."""
        return pure(*arguments)

    def stateless_apply(
        self, call: Stateless, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        self.check_stateless(call)
        owners = [*((e.name, e.variable) for e in call.entries), *call.named]
        count = len(call.entries)
        values = [
            self.fitting(value, name, variable, is_state=i >= count)
            for i, (value, (name, variable)) in enumerate(
                zip((*variables, *state), owners, strict=True)
            )
        ]
        selection, gradients = call.examined(gradients)
        gradients = self.densified(gradients)
        rate, step = call.rate_and_step()

        def pure(values: list[Any], gradients: list[Any], rate: Any, numbers: Any) -> list[Any]:
            cells = {id(v): (v, x) for (_, v), x in zip(owners, values, strict=True)}
            now = step.by(numbers)
            self.inline(lambda: call.advance(selection, gradients, rate, now), selection, cells)
            return [cells[id(v)][1] for _, v in owners]

        new = self.run_pure(pure, selection, (values, gradients, rate, step.numbers), step)
        return new[:count], new[count:]

    # --- passes ---

    def gather(self, selection: Selection, gradients: list[Any]) -> list[Any]:
        return gradients

    def _coefficients(self, values: Sequence[Any], dtype: str) -> tuple[Any, ...]:
        # What was computed on the host stays a number, which takes the type of what it meets.
        return tuple(v if isinstance(v, float) else self.arrays.cast(v, dtype) for v in values)

    def square_sums(self, group: Group, gradients: Any) -> list[Any]:
        return [self.arrays.sum_of_squares(g) for g in self._applied(group, gradients)]

    def _applied(self, group: Group, gradients: Any) -> list[Any]:
        """Gradients as they are to be applied, before they are clipped by a norm."""
        kind = group.kind
        gradient_of = make_gradient(kind, self.arrays)
        applied = []
        for entry, g in zip(group.entries, gradients, strict=True):
            accumulator = self.read(entry.accumulator) if kind.accumulated else None
            g = self.arrays.cast(g, entry.slot_dtype)
            coefficients = self._coefficients(group.pass_c, entry.slot_dtype)
            applied.append(gradient_of(g, accumulator, coefficients))
        return applied

    def sweep(self, group: Group, gradients: Any) -> Sums:
        update = group.rule.bind(self.arrays)
        found = [
            self._pass_over(
                group,
                update,
                entry,
                gradients[i] if group.kind.gradient else None,
                group.factors[i] if len(group.factors) else None,
                entry.slots if group.kind.stores_slots else (),
                self._coefficients(group.rule_c, entry.slot_dtype),
            )
            for i, entry in enumerate(group.entries)
        ]
        return (lambda: found) if group.kind.measured else nothing_measured

    def _pass_over(
        self,
        group: Group,
        update: Any,
        entry: Entry,
        gradient: Any,
        factor: Any,
        slots: Sequence[Any],
        rule_c: Sequence[Any],
    ) -> tuple[Any, ...]:
        arrays, dtype, kind = self.arrays, entry.slot_dtype, group.kind
        pass_c = self._coefficients(group.pass_c, dtype)
        gradient_of = make_gradient(kind, arrays)
        element = make_element(
            kind._replace(decayed=kind.decayed and entry.decayed),
            update,
            gradient_of,
            arrays,
            rounded=lambda w: w if entry.dtype == dtype else self.rounded(w, entry),
        )
        before = arrays.cast(self.read(entry.variable), dtype)
        gradient = None if gradient is None else arrays.cast(gradient, dtype)
        accumulated = self.read(entry.accumulator) if kind.accumulated else None
        w, new_slots, accumulator, average = element(
            before,
            gradient,
            tuple(map(self.read, slots)),
            accumulated,
            self.read(entry.average) if kind.averaged else None,
            factor if factor is None else arrays.cast(factor, dtype),
            rule_c,
            pass_c,
        )
        # Before anything is stored: what was read may be the variable's own memory.
        g = gradient_of(gradient, accumulated, pass_c) if kind.measured else None
        values = [MEASURES[name](arrays)(g, before, w) for name in kind.measured]
        sums = tuple(map(arrays.sum_of_squares, values))
        for slot, new in zip(slots, new_slots, strict=True):
            self.write(slot, new)
        if kind.stores_accumulator:
            self.write(entry.accumulator, accumulator)
        if kind.averaged:
            self.write(entry.average, average)
        if kind.stores_variable:
            self.write(entry.variable, arrays.cast(w, entry.dtype))
        return sums

    def rounded(self, value: Any, entry: Entry) -> Any:
        """What is left of a value in a 16-bit variable, in the type of the arithmetic."""
        return self.arrays.cast(self.arrays.cast(value, entry.dtype), entry.slot_dtype)

    def update_each(
        self, group: Group, gradients: Any, update: Callable[[Any, Entry], None]
    ) -> None:
        for i, entry in enumerate(group.entries):

            def rule(w: Any, g: Any, slots: Any, c: Any, entry: Entry = entry) -> Any:
                self.write(entry.variable, self.arrays.cast(w, entry.dtype))
                self._outside(lambda: update(g, entry))
                return self.arrays.cast(self.read(entry.variable), entry.slot_dtype), slots

            factor = group.factors[i] if len(group.factors) else None
            self._pass_over(group, rule, entry, gradients[i], factor, (), ())

    def _outside(self, action: Callable[[], None]) -> None:
        """Do what reads and writes variables by itself: they must hold what the cells do."""
        here = self._here
        call = here.call
        if call is None:
            action()
            return
        self.flush()
        with self.aside():
            here.call = None
            try:
                action()
            finally:
                here.call = call
