"""What libraries share whose variables lie in the host's memory: the CPU kernels reach them."""

from __future__ import annotations

import copy
import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import setitem
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import options
from ..kernels import cpu, layout
from ..kernels.cpu import HELPERS, SparseRows, Team, Work
from ..kernels.layout import Odd, Operand, Plan, Region, in_order
from ..rule import Pass, Rule, make_element, make_gradient
from .base import (
    Advance,
    Backend,
    Entry,
    Group,
    Latest,
    Overtaken,
    Part,
    Selection,
    Stateless,
    Sums,
)

Array = npt.NDArray[Any]


class Numbers:
    """Functions of Python numbers, in double precision."""

    sqrt, expm1 = staticmethod(math.sqrt), staticmethod(math.expm1)
    power, asarray_float = staticmethod(math.pow), float

    @staticmethod
    def cos(x: float) -> float:
        return math.cos(x) if math.isfinite(x) else math.nan

    @staticmethod
    def log(x: float) -> float:
        return math.log(x) if x > 0.0 else -math.inf

    @staticmethod
    def floor(x: float) -> float:
        return float(math.floor(x)) if math.isfinite(x) else x

    @staticmethod
    def ceil(x: float) -> float:
        return float(math.ceil(x)) if math.isfinite(x) else x

    @staticmethod
    def where(condition: bool, a: float, b: float) -> float:
        return a if condition else b

    @staticmethod
    def maximum(a: float, b: float) -> float:
        return a if a > b or a != a else b

    @staticmethod
    def minimum(a: float, b: float) -> float:
        return a if a < b or a != a else b


class Elementwise:
    """Functions of NumPy arrays, in double precision."""

    minimum, maximum, where = np.minimum, np.maximum, np.where
    floor, ceil, cos = np.floor, np.ceil, np.cos
    log, power = np.log, np.power

    @staticmethod
    def asarray_float(x: Any) -> Any:
        return np.asarray(x, np.float64)


_NO_FACTORS = array("d")
# For how many sets of gradients, some of which no kernel takes as they lie in memory, the plans for
# the others are kept.
_PLANS = 32


Plans = tuple[Plan | None, list[int], Pass, Rule]


@dataclass(eq=False)
class Located:
    """What is prepared for a selection for as long as its variables and state lie where they do.

    Another thread may be in the middle of a step with one that was made before.
    """

    places: list[Any]  # the region and the dtype of each
    held: list[Any]  # those whose regions these are
    memory: list[tuple[int, int]]  # the spans that a step writes to, in order
    operands: list[Operand]
    compiled: list[bool]  # whether kernels take an operand as it lies in memory
    odd_rest: dict[int, Any]  # those of the rest that they do not
    # By the identities of a pass and a rule, which are kept for ever.
    plans: dict[Any, Plans] = field(default_factory=dict)
    # Likewise beside some gradients that no kernel takes as they lie in memory.
    odd_plans: Latest = field(default_factory=lambda: Latest(_PLANS))
    # Of the parts of the selection, by the identities of what they are known by.
    parts: dict[int, Located] = field(default_factory=dict)
    # What tells that all is as it was, of the library's `Fast`.
    known: Any = None
    # What passes write to and must say so, by their identities (PyTorch).
    written: dict[Any, list[Any]] = field(default_factory=dict)

    def part(self, part: Part, count: int) -> Located:
        """The same of a part, of a selection with so many gradients."""
        found = self.parts.get(id(part.since))
        if found is None:
            of_rest = [count + i for i in part.rest]
            chosen = (*part.positions, *of_rest)
            found = self.parts[id(part.since)] = Located(
                self.places,
                self.held,
                self.memory,
                [self.operands[i] for i in chosen],
                [self.compiled[i] for i in chosen],
                {k: self.odd_rest[i] for k, i in enumerate(part.rest) if i in self.odd_rest},
            )
        return found


class Gradients:
    """Gradients of one step: addresses of the regular ones, and by position the odd ones.

    `native` are the gradients themselves, which must live as long as their addresses are used, and
    `located` is what the selection had prepared when they were gathered. While `work` is set,
    passes over them are not done but added to it.
    """

    __slots__ = ("addresses", "located", "native", "odd", "work")

    def __init__(
        self,
        addresses: array[int],
        native: list[Any],
        odd: dict[int, Any],
        located: Located,
    ) -> None:
        self.addresses, self.native, self.odd, self.located = addresses, native, odd, located
        self.work: StepWork | None = None


class StepWork(Work):
    """What a step writes, and the counter of steps that it is for."""

    counter: Any = None
    steps: int = 0  # that were counted before
    # Whether a user's `update_step` has written to variables already.
    is_begun = False


class HostMemory(Backend):
    """A backend whose variables lie in the host's memory, so that the CPU kernels reach them."""

    functions: ClassVar[Any] = Numbers
    elementwise: ClassVar[Any] = Elementwise
    arrays: ClassVar[Any] = layout.OnNumPy

    def region(self, values: Any) -> Region:
        """Where a variable, slot or gradient lies in memory."""
        raise NotImplementedError

    def copied(self, values: Any) -> Any:
        """A variable or gradient in memory of its own."""
        return copy.deepcopy(values)

    def dtype(self, values: Any) -> str:
        """What that memory holds: one of FLOATS, of what can be trained."""
        raise NotImplementedError

    def floats(self, values: Any, entry: Entry) -> Any:
        """A variable, or its gradient (or that as an array), in the type that is computed in."""
        raise NotImplementedError

    @property
    def team(self) -> Team:
        """The threads that share a large step."""
        return HELPERS

    def operand(self, entry: Entry) -> Operand:
        return Operand(
            entry.dtype,
            self.region(entry.variable),
            tuple(map(self.region, entry.slots)),
            None if entry.accumulator is None else self.region(entry.accumulator),
            None if entry.average is None else self.region(entry.average),
        )

    def check_distinct(self, entries: Sequence[Entry]) -> None:
        _check_distinct(entries, map(self.operand, entries))

    def gather(self, selection: Selection, gradients: list[Any]) -> Gradients:
        plain = array("q", [0] * len(gradients))
        odd: dict[int, Any] = {}
        located = self._located(selection)
        written, operands, compiled = located.memory, located.operands, located.compiled
        for i, (gradient, entry) in enumerate(zip(gradients, selection.entries, strict=True)):
            if isinstance(gradient, SparseRows):
                odd[i] = gradient, gradient.values.dtype.name
                continue
            region, dtype = self.region(gradient), self.dtype(gradient)
            if _overlaps(region, written):
                gradients[i] = self.copied(gradient)
                region = self.region(gradients[i])
            variable = operands[i].variable
            if compiled[i] and dtype == entry.dtype and layout.lies_like(region, variable):
                plain[i] = region.address
            else:
                odd[i] = region, dtype
        gathered = Gradients(plain, gradients, odd, located)
        if self.fast is not None:
            self.fast.note(selection, gathered)
        return gathered

    def part(self, gradients: Gradients, part: Part) -> Gradients:
        positions, count = part.positions, len(gradients.native)
        own = Gradients(
            array("q", [gradients.addresses[i] for i in positions]),
            [gradients.native[i] for i in positions],
            {k: gradients.odd[i] for k, i in enumerate(positions) if i in gradients.odd},
            gradients.located.part(part, count),
        )
        own.work = gradients.work
        return own

    def begun(self, variable: Any, updates: int, gradients: Gradients) -> int:
        since: int = self.value(variable)
        if since >= 0:
            return since
        assert gradients.work is not None
        gradients.work.calls.append(self.writing(variable, updates))
        return updates

    def is_located(self, selection: Selection) -> bool:
        """Whether a glance shows that everything lies where it did when it was located last."""
        return False

    def is_apart(self, entry: Entry) -> bool:
        """Whether no kernel takes a variable together with others."""
        return False

    def pass_over(
        self, kind: Pass, rule: Rule, entry: Entry, operand: Operand, gradient: Any, dtype: str
    ) -> Any:
        """A pass over one variable by itself, which is done by its `add_to`."""
        return Odd(kind, rule, operand, gradient, dtype, self.team)

    def _located(self, selection: Selection) -> Located:
        """What is prepared for where variables and state lie now."""
        before: Located | None = selection.prepared
        if before is not None and self.is_located(selection):
            return before
        entries = selection.entries + selection.rest
        self.check_built(entries)
        operands = [self.operand(entry) for entry in entries]
        held = [each for entry in entries for each in _written_of(entry)]
        regions = [region for operand in operands for region in operand.every()]
        places = [(region, each.dtype) for region, each in zip(regions, held, strict=True)]
        if before is not None and before.places == places:
            return before
        for entry in entries:
            self._check_state(entry)
        _check_distinct(entries, operands)
        are_compiled = cpu.available()
        compiled = [
            are_compiled and layout.is_regular(operand) and not self.is_apart(entry)
            for entry, operand in zip(entries, operands, strict=True)
        ]
        rest = zip(selection.rest, compiled[len(selection.entries) :], strict=True)
        selection.prepared = located = Located(
            places,
            held,
            _spans(regions),
            operands,
            compiled,
            {i: (None, entry.dtype) for i, (entry, is_) in enumerate(rest) if not is_},
        )
        return located

    def _check_state(self, entry: Entry) -> None:
        """Raise ValueError if somebody replaced the memory of a slot by some of another form."""
        for held in _written_of(entry)[1:]:
            if tuple(held.shape) != entry.shape or self.dtype(held) != entry.slot_dtype:
                raise ValueError(
                    f"The optimizer's state for variable '{entry.name}' must stay as it was built, "
                    f"of shape {entry.shape} and dtype {entry.slot_dtype}. It now has shape "
                    f"{tuple(held.shape)} and dtype {held.dtype}. Write to state variables in "
                    "place, or use set_weights()."
                )

    def _plan(
        self, group: Group, located: Located, odd: dict[int, Any]
    ) -> tuple[Plan | None, list[int]]:
        """The plan for the regular entries (of the rest, if the pass reads no gradient)."""
        # The planner keeps passes and rules, and to hash what they hold takes a microsecond.
        key = (id(group.kind), id(group.rule), *odd)
        if odd:  # in ever other sets of gradients, perhaps
            found = located.odd_plans.found(key, lambda: self._new_plan(group, located, odd))
        else:
            found = located.plans.get(key)
            if found is None:
                found = located.plans[key] = self._new_plan(group, located, odd)
        plan, regular, *_ = found
        return plan, regular

    def _new_plan(self, group: Group, located: Located, odd: dict[int, Any]) -> Plans:
        entries, operands = group.entries, self._operands(group, located)
        regular = [i for i in range(len(entries)) if i not in odd]
        plan = None
        if regular:
            plan = Plan(
                group.kind,
                group.rule,
                [operands[i] for i in regular],
                [entries[i].decayed for i in regular],
                self.team,
            )
        # The pass and the rule live as long as the key that has their identities.
        return plan, regular, group.kind, group.rule

    def _operands(self, group: Group, located: Located) -> list[Operand]:
        of_gradients = len(group.selection.entries)
        operands = located.operands
        return operands[:of_gradients] if group.kind.gradient else operands[of_gradients:]

    def _add_to(self, work: Work, group: Group, gradients: Gradients) -> Sums:
        """Make a pass part of what is done as a whole."""
        coefficients = array("d", (*group.pass_c, *group.rule_c))
        factors = array("d", group.factors) if group.factors else _NO_FACTORS
        located = gradients.located
        odd = gradients.odd if group.kind.gradient else located.odd_rest
        plan, regular = self._plan(group, located, odd)
        addresses = gradients.addresses
        if plan is not None and not odd:
            return plan.add_to(work, addresses, factors, coefficients)
        parts: list[tuple[list[int], Sums]] = []
        if plan is not None:
            if group.kind.gradient:
                addresses = array("q", [addresses[i] for i in regular])
            chosen = array("d", [factors[i] for i in regular]) if factors else factors
            parts.append((regular, plan.add_to(work, addresses, chosen, coefficients)))
        entries, operands = group.entries, self._operands(group, located)
        for i, (gradient, dtype) in odd.items():
            kind = group.kind._replace(decayed=group.kind.decayed and entries[i].decayed)
            one = array("d", [factors[i]]) if factors else factors
            each = self.pass_over(kind, group.rule, entries[i], operands[i], gradient, dtype)
            parts.append(([i], each.add_to(work, one, coefficients)))
        return lambda: in_order(parts)

    def square_sums(self, group: Group, gradients: Any) -> list[float]:
        work = Work()
        sums = self._add_to(work, group, gradients)
        work.do()
        return [total for (total,) in sums()]

    def sweep(self, group: Group, gradients: Any) -> Sums:
        if gradients.work is not None:
            return self._add_to(gradients.work, group, gradients)
        work = Work()
        sums = self._add_to(work, group, gradients)
        work.whole(work.do)
        return sums

    def clear(self, selection: Selection, gradients: Any) -> None:
        operands = gradients.located.operands
        for operand in operands[len(selection.entries) :]:
            assert operand.accumulator is not None
            accumulator = operand.accumulator.array(cpu.ARITHMETIC[operand.dtype])
            gradients.work.calls.append((accumulator.fill, 0.0))

    def writing(self, variable: Any, value: int) -> tuple[Any, ...]:
        """A function of C and its arguments: the call writes a number to a state variable."""
        return setitem, variable, ..., value

    def count_up(self, variable: Any, calls: int, gradients: Any) -> None:
        work = gradients.work
        work.counter, work.steps = variable, calls
        # Before all else: what cannot be counted is not done.
        work.calls.insert(0, self.writing(variable, calls + 1))

    def run(
        self,
        advance: Advance,
        selection: Selection,
        gradients: Any,
        rate: Any,
        step: Any,
    ) -> int:
        """Prepare the step, in which users' functions are run, and then do it: whole or not at all.

        If another thread has made a step meanwhile, this one is prepared anew to follow it.
        """
        while True:
            gradients.work = work = StepWork()
            advance(selection, gradients, rate, step)
            calls: int | None = work.whole(self._made, work)
            if calls is not None:
                if selection.constrained:
                    super().constrain_within(selection.constrained)
                return calls
            if self.is_overtaken():
                raise Overtaken

    def constrain_within(self, entries: Sequence[Entry]) -> None:
        """Nothing while a step is prepared: it is of the new values, after it was done."""

    def _made(self, work: StepWork) -> int | None:
        """Do a step and return its number; None if it was prepared to follow another step."""
        with self.turn:
            calls: int = self.value(work.counter)
            if self.is_overtaken() and not work.is_begun:
                return None
            if calls != work.steps:
                if not work.is_begun:
                    return None
                work.calls.append(self.writing(work.counter, calls + 1))
            work.do()
            self.steps += 1
            return calls + 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield  # nobody has the turn while a step is prepared

    def counted(self, variable: Any) -> int:
        return int(self.value(variable))

    def rate(self, value: Any) -> float:
        return options.rate("learning_rate", value)  # type: ignore[no-any-return]

    def update_each(
        self, group: Group, gradients: Any, update: Callable[[Any, Entry], None]
    ) -> None:
        gradients.work.is_begun = True
        kind, functions = group.kind, self.arrays
        for i, entry in enumerate(group.entries):
            gradient, w = gradients.native[i], self.floats(entry.variable, entry)
            if isinstance(gradient, SparseRows):
                rows, gradient = gradient, np.zeros(entry.shape, entry.slot_dtype)
                gradient[rows.rows] = rows.values
            g = self.floats(gradient, entry)

            def rule(w: Any, g: Any, slots: Any, c: Any, entry: Entry = entry) -> Any:
                if kind.decayed and entry.decayed:
                    self.assign(entry.variable, w)
                with self.aside():
                    update(g, entry)
                return self.floats(entry.variable, entry), slots

            element = make_element(
                kind._replace(decayed=kind.decayed and entry.decayed),
                rule,
                make_gradient(kind, functions),
                functions,
                rounded=lambda w: w,
            )
            factor = group.factors[i] if group.factors else 1.0
            w, _, accumulator, average = element(
                w, g, (), entry.accumulator, entry.average, factor, (), group.pass_c
            )
            if kind.accumulated:
                self.assign(entry.accumulator, accumulator)
            if kind.averaged:
                self.assign(entry.average, average)
            if kind.overwritten:
                self.assign(entry.variable, w)

    def stateless_apply(
        self, call: Stateless, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        return twin_apply(call.optimizer, state, gradients, variables, self.copied)

    def branch(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
        yes() if condition else no()


def twin_apply(
    optimizer: Any,
    state: list[Any],
    gradients: list[Any],
    variables: list[Any],
    copied: Callable[[Any], Any],
) -> tuple[list[Any], list[Any]]:
    """A step of a copy of an optimizer on copies of the variables."""
    twin = copy.deepcopy(optimizer)
    copies = [copied(variable) for variable in variables]
    twin.build(copies)
    twin.set_weights(state)
    twin.apply(gradients, copies)
    return copies, twin.variables


def _check_distinct(entries: Sequence[Entry], operands: Iterable[Operand]) -> None:
    check_distinct(
        (entry, region)
        for entry, operand in zip(entries, operands, strict=True)
        for region in operand.every()
    )


def check_distinct(regions: Iterable[tuple[Entry, Region]]) -> None:
    """Raise ValueError if two of the regions that entries have in one memory overlap."""
    held = list(regions)
    found = layout.overlapping([region for _, region in held])
    if found is not None:
        one, other = (held[i][0] for i in found)
        raise ValueError(
            "Variables must not share memory, nor with the optimizer's state. Received "
            f"'{one.name}' of shape {one.shape} and '{other.name}' of shape {other.shape}, which "
            "overlap. Pass each variable once, or pass the array that both are views of."
        )


def _written_of(entry: Entry) -> list[Any]:
    """The variable and its state, in the order of `Operand.every`."""
    every = (entry.variable, *entry.slots, entry.accumulator, entry.average)
    return [each for each in every if each is not None]


def _spans(regions: Sequence[Region]) -> list[tuple[int, int]]:
    """The spans of memory that a step writes to, in order, overlaps of spans merged."""
    spans = [region.span() for region in regions if 0 not in region.shape]
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _overlaps(region: Region, spans: list[tuple[int, int]]) -> bool:
    if 0 in region.shape:
        return False
    low, high = region.span()
    i = bisect_left(spans, (high,))  # the spans that begin before the region ends
    return i > 0 and spans[i - 1][1] > low
