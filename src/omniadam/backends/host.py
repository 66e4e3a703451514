"""What libraries share whose variables lie in the host's memory: the CPU kernels reach them."""

from __future__ import annotations

import copy
import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import setitem
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import options
from ..kernels import layout
from ..kernels.cpu import STORAGE, SparseRows, Work, threads
from ..kernels.layout import Odd, Operand, Plan
from ..rule import Pass, RuleKey, make_element, make_gradient
from .base import Backend, Entry, Latest, Overtaken, Selection

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


class Arrays:
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


class Gradients:
    """Gradients of one step: addresses of the regular ones, and by position the odd ones.

    `native` are the gradients themselves, which must live as long as their addresses are used, and
    `prepared` is what the selection had prepared when they were gathered. While `work` is set,
    passes over them are not done but added to it.
    """

    __slots__ = ("addresses", "native", "odd", "prepared", "work")

    def __init__(
        self,
        addresses: array[int],
        native: list[Any],
        odd: dict[int, Any],
        prepared: dict[Any, Any],
    ) -> None:
        self.addresses, self.native, self.odd, self.prepared = addresses, native, odd, prepared
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
    elementwise: ClassVar[Any] = Arrays

    def view(self, variable: Any) -> Array:
        """The memory of a variable, slot or gradient as an array."""
        raise NotImplementedError

    def copied(self, values: Any) -> Any:
        """A variable or gradient in memory of its own."""
        return copy.deepcopy(values)

    def dtype(self, variable: Any) -> str:
        """What that memory holds: one of FLOATS."""
        raise NotImplementedError

    def floats(self, values: Any, entry: Entry) -> Any:
        """A variable, or its gradient (or that as an array), in the type that is computed in."""
        raise NotImplementedError

    def threads(self) -> int:
        """How many threads a large step uses."""
        return threads()

    def operand(self, entry: Entry) -> Operand:
        return Operand(
            entry.dtype,
            self.view(entry.variable),
            tuple(self.view(slot) for slot in entry.slots),
            None if entry.accumulator is None else self.view(entry.accumulator),
            None if entry.average is None else self.view(entry.average),
        )

    def check_distinct(self, entries: Sequence[Entry]) -> None:
        check_distinct(
            (entry, layout.Region(a.ctypes.data, a.shape, a.strides, a.itemsize))
            for entry in entries
            for a in _arrays(self.operand(entry))
        )

    def gather(self, selection: Selection, gradients: list[Any]) -> Gradients:
        plain = array("q", [0] * len(gradients))
        odd: dict[int, Any] = {}
        prepared = self._located(selection)
        written, operands, compiled = prepared["memory"], prepared["operands"], prepared["compiled"]
        for i, (gradient, entry) in enumerate(zip(gradients, selection.entries, strict=True)):
            if isinstance(gradient, SparseRows):
                odd[i] = gradient, gradient.values.dtype.name
                continue
            values, dtype = self.view(gradient), self.dtype(gradient)
            if _overlaps(values, written):
                gradients[i] = self.copied(gradient)
                values = self.view(gradients[i])
            if compiled[i] and dtype == entry.dtype and layout.lies_like(values, operands[i]):
                plain[i] = values.ctypes.data
            else:
                odd[i] = values, dtype
        return Gradients(plain, gradients, odd, prepared)

    def is_located(self, selection: Selection) -> bool:
        """Whether a glance shows that everything lies where it did when it was located last."""
        return False

    def _located(self, selection: Selection) -> dict[Any, Any]:
        """What is prepared for where variables and state lie now; for other places it is dropped.

        Another thread may be in the middle of a step with what was prepared before.
        """
        if self.is_located(selection):
            return selection.prepared
        entries = *selection.entries, *selection.rest
        Backend.check_built(self, entries)
        operands = [self.operand(entry) for entry in entries]
        places = [
            (a.ctypes.data, a.shape, a.strides, a.dtype) for o in operands for a in _arrays(o)
        ]
        if selection.prepared.get("places") != places:
            for entry, operand in zip(entries, operands, strict=True):
                _check_state(entry, operand)
            self.check_distinct(entries)
            selection.prepared = {
                "places": places,
                "memory": _spans(operands),
                "operands": operands,
                "compiled": [layout.compiled_for(operand, None) for operand in operands],
                "odd plans": Latest(_PLANS),
            }
        return selection.prepared

    def _plan(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        prepared: dict[Any, Any],
        odd: dict[int, Any],
    ) -> tuple[Plan | None, list[int]]:
        """The plan for the regular entries (of the rest, if the pass reads no gradient)."""
        # The optimizer keeps its passes and rule, and to hash what they hold takes a microsecond.
        key = (id(kind), id(rule), *odd)
        if odd:  # in ever other sets of gradients, perhaps
            found = prepared["odd plans"].found(
                key, lambda: self._new_plan(kind, rule, selection, prepared, odd)
            )
        else:
            found = prepared.get(key)
            if found is None:
                found = prepared[key] = self._new_plan(kind, rule, selection, prepared, odd)
        plan, regular, *_ = found
        return plan, regular

    def _new_plan(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        prepared: dict[Any, Any],
        odd: dict[int, Any],
    ) -> tuple[Plan | None, list[int], Pass, RuleKey]:
        operands: list[Operand] = prepared["operands"]
        if kind.gradient:
            entries = selection.entries
        else:
            operands, entries = operands[len(selection.entries) :], selection.rest
        regular = [i for i in range(len(entries)) if i not in odd]
        plan = None
        if regular:
            plan = Plan(
                kind,
                rule,
                [operands[i] for i in regular],
                [entries[i].decayed for i in regular],
                self.threads,
            )
        # The pass and the rule live as long as the key that has their identities.
        return plan, regular, kind, rule

    def _odd_of(self, kind: Pass, selection: Selection, gradients: Gradients) -> dict[int, Any]:
        if kind.gradient:
            return gradients.odd
        prepared = gradients.prepared
        found: dict[int, Any] | None = prepared.get("odd rest")
        if found is None:
            compiled = prepared["compiled"][len(selection.entries) :]
            found = prepared["odd rest"] = {
                i: (None, selection.rest[i].dtype) for i, is_ in enumerate(compiled) if not is_
            }
        return found

    def _odd_pass(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        prepared: dict[Any, Any],
        i: int,
        odd: Any,
    ) -> Odd:
        entry = (selection.entries if kind.gradient else selection.rest)[i]
        operands: list[Operand] = prepared["operands"]
        operand = operands[i if kind.gradient else len(selection.entries) + i]
        gradient, dtype = odd
        kind = kind._replace(decayed=kind.decayed and entry.decayed)
        return Odd(kind, rule, operand, gradient, dtype, self.threads)

    def square_sums(
        self, kind: Pass, rule: RuleKey, selection: Selection, gradients: Any, pass_c: Any
    ) -> list[float]:
        pass_c = array("d", pass_c)
        odd, prepared = gradients.odd, gradients.prepared
        plan, regular = self._plan(kind, rule, selection, prepared, odd)
        if not odd and plan is not None:
            return plan.square_sums(gradients.addresses, pass_c)
        sums = [0.0] * len(selection.entries)
        if plan is not None:
            addresses = array("q", [gradients.addresses[i] for i in regular])
            for i, value in zip(regular, plan.square_sums(addresses, pass_c), strict=True):
                sums[i] = value
        for i, each in odd.items():
            odd_pass = self._odd_pass(kind, rule, selection, prepared, i, each)
            sums[i] = odd_pass.square_sum(pass_c)
        return sums

    def sweep(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        gradients: Any,
        factors: Sequence[float],
        rule_c: Sequence[float],
        pass_c: Sequence[float],
    ) -> None:
        # An array is made of a plain tuple in half the time that one of named fields takes.
        rule_c, pass_c = array("d", tuple(rule_c)), array("d", tuple(pass_c))
        factors = array("d", factors) if factors else _NO_FACTORS
        odd, prepared = self._odd_of(kind, selection, gradients), gradients.prepared
        plan, regular = self._plan(kind, rule, selection, prepared, odd)
        addresses = gradients.addresses
        work = Work() if gradients.work is None else gradients.work
        if odd:
            if kind.gradient:
                addresses = array("q", [addresses[i] for i in regular])
            chosen = array("d", [factors[i] for i in regular]) if factors else factors
            if plan is not None:
                plan.add_to(work, addresses, chosen, rule_c, pass_c)
            for i, each in odd.items():
                one = array("d", [factors[i]]) if factors else factors
                odd_pass = self._odd_pass(kind, rule, selection, prepared, i, each)
                odd_pass.add_to(work, one, rule_c, pass_c)
        elif plan is not None:
            plan.add_to(work, addresses, factors, rule_c, pass_c)
        if gradients.work is None:
            work.whole(work.do)

    def clear(self, selection: Selection, gradients: Any) -> None:
        operands: list[Operand] = gradients.prepared["operands"]
        for operand in operands[len(selection.entries) :]:
            assert operand.accumulator is not None
            gradients.work.calls.append((operand.accumulator.fill, 0.0))

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
        step: Callable[[Selection, Any, Any, Any], None],
        selection: Selection,
        gradients: Any,
        rate: Any,
        fixed: Any,
    ) -> int:
        """Prepare the step, in which users' functions are run, and then do it: whole or not at all.

        If another thread has made a step meanwhile, this one is prepared anew to follow it.
        """
        while True:
            gradients.work = work = StepWork()
            step(selection, gradients, rate, fixed)
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
        self,
        kind: Pass,
        selection: Selection,
        gradients: Any,
        factors: Sequence[float],
        pass_c: Sequence[float],
        update: Callable[[Any, Entry], None],
    ) -> None:
        gradients.work.is_begun = True
        for i, entry in enumerate(selection.entries):
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
                make_gradient(kind, self.elementwise.minimum, self.elementwise.maximum),
                minimum=self.elementwise.minimum,
                maximum=self.elementwise.maximum,
                where=Numbers.where,  # whether to overwrite is the same for all elements
                rounded=lambda w: w,
            )
            factor = factors[i] if factors else 1.0
            w, _, accumulator, average = element(
                w, g, (), entry.accumulator, entry.average, factor, (), pass_c
            )
            if kind.accumulated:
                self.assign(entry.accumulator, accumulator)
            if kind.averaged:
                self.assign(entry.average, average)
            if kind.overwritten:
                self.assign(entry.variable, w)

    def stateless_apply(
        self, optimizer: Any, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        return twin_apply(optimizer, state, gradients, variables, self.copied)

    def branch(self, condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
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


def check_distinct(regions: Iterable[tuple[Entry, layout.Region]]) -> None:
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


def _arrays(operand: Operand) -> list[Array]:
    every = (operand.variable, *operand.slots, operand.accumulator, operand.average)
    return [values for values in every if values is not None]


def _check_state(entry: Entry, operand: Operand) -> None:
    """Raise ValueError if somebody replaced the memory of a slot by some of another form."""
    stored = np.dtype(STORAGE[entry.slot_dtype])
    for values in _arrays(operand)[1:]:
        if (values.shape, values.dtype) != (entry.shape, stored):
            raise ValueError(
                f"The optimizer's state for variable '{entry.name}' must stay as it was built, of "
                f"shape {entry.shape} and dtype {entry.slot_dtype}. It now has shape "
                f"{values.shape} and dtype {values.dtype}. Write to state variables in place, or "
                "use set_weights()."
            )


def _spans(operands: Sequence[Operand]) -> list[tuple[int, int]]:
    """The spans of memory that a step writes to, in order, overlaps of spans merged."""
    spans = [
        np.lib.array_utils.byte_bounds(values)
        for operand in operands
        for values in _arrays(operand)
        if values.size
    ]
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _overlaps(values: Array, spans: list[tuple[int, int]]) -> bool:
    if not values.size:
        return False
    low, high = np.lib.array_utils.byte_bounds(values)
    i = bisect_left(spans, (high,))  # the spans that begin before the array ends
    return i > 0 and spans[i - 1][1] > low
