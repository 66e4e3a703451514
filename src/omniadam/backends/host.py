"""What libraries share whose variables lie in the host's memory: the CPU kernels reach them."""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import options
from ..kernels import layout
from ..kernels.cpu import SparseRows
from ..kernels.layout import Odd, Operand, Plan
from ..rule import Pass, RuleKey, make_element, make_gradient
from .base import Backend, Entry, Selection

Array = npt.NDArray[Any]


class Host:
    """Functions of the host: `math` in double precision for scalars."""

    sqrt = staticmethod(math.sqrt)
    expm1 = staticmethod(math.expm1)

    @staticmethod
    def log(x: float) -> float:
        return math.log(x) if x > 0.0 else -math.inf

    @staticmethod
    def where(condition: bool, a: float, b: float) -> float:
        return a if condition else b

    @staticmethod
    def maximum(a: float, b: float) -> float:
        return a if a > b or a != a else b


class Elementwise:
    """What schedules are computed with: numbers or arrays of steps, in double precision."""

    minimum, where = staticmethod(np.minimum), staticmethod(np.where)
    floor, ceil, cos = staticmethod(np.floor), staticmethod(np.ceil), staticmethod(np.cos)
    log, power = staticmethod(np.log), staticmethod(np.power)
    maximum = staticmethod(np.maximum)

    @staticmethod
    def asarray_float(x: Any) -> Any:
        return np.asarray(x, np.float64)[()]


class Gradients:
    """Gradients of one step: addresses of the regular ones, and by position the odd ones.

    `native` are the gradients themselves, which must live as long as their addresses are used.
    """

    __slots__ = ("addresses", "native", "odd")

    def __init__(self, addresses: array[int], native: list[Any], odd: dict[int, Any]) -> None:
        self.addresses, self.native, self.odd = addresses, native, odd


class HostMemory(Backend):
    """A backend whose variables lie in the host's memory, so that the CPU kernels reach them."""

    functions: ClassVar[Any] = Host
    elementwise: ClassVar[Any] = Elementwise

    def view(self, variable: Any) -> Array:
        """The memory of a variable or slot as an array."""
        raise NotImplementedError

    def operand(self, entry: Entry) -> Operand:
        return Operand(
            entry.dtype,
            self.view(entry.variable),
            tuple(self.view(slot) for slot in entry.slots),
            None if entry.accumulator is None else self.view(entry.accumulator),
            None if entry.average is None else self.view(entry.average),
        )

    def check_distinct(self, entries: Sequence[Entry]) -> None:
        spans = []
        for entry in entries:
            values = self.view(entry.variable)
            spans.append((*np.lib.array_utils.byte_bounds(values), entry, values))
        spans.sort(key=lambda span: span[:2])
        reach: list[Any] = []
        for low, high, entry, values in spans:
            reach = [other for other in reach if other[1] > low]
            for _, _, other, others in reach:
                if values.size and others.size and np.shares_memory(values, others):
                    raise ValueError(
                        f"Variables must not share memory. Received '{other.name}' of shape "
                        f"{other.shape} and '{entry.name}' of shape {entry.shape}, which overlap. "
                        "Pass each variable once, or pass the array that both are views of."
                    )
            reach.append((low, high, entry, values))

    def gather(self, selection: Selection, gradients: list[Any]) -> Gradients:
        plain = array("q", [0] * len(gradients))
        odd: dict[int, Any] = {}
        written = selection.prepared.get("memory")
        if written is None:
            written = selection.prepared["memory"] = self._written(selection)
        for i, (gradient, entry) in enumerate(zip(gradients, selection.entries, strict=True)):
            if isinstance(gradient, SparseRows):
                odd[i] = gradient, gradient.values.dtype.name
                continue
            values, dtype = gradient
            if _overlaps(values, written):
                values = values.copy()
            operand = self._operands(selection)[i]
            if dtype == entry.dtype and layout.compiled_for(operand.variable, values):
                plain[i] = values.ctypes.data
            else:
                odd[i] = values, dtype
            gradients[i] = values, dtype
        return Gradients(plain, gradients, odd)

    def _operands(self, selection: Selection) -> list[Operand]:
        found = selection.prepared.get("operands")
        if found is None:
            found = [self.operand(entry) for entry in selection.entries]
            selection.prepared["operands"] = found
        return found

    def _written(self, selection: Selection) -> list[tuple[int, int]]:
        """The spans of memory that a step writes to, in order, overlaps of spans merged."""
        spans = []
        for entry in (*selection.entries, *selection.rest):
            o = self.operand(entry)
            for values in (o.variable, *o.slots, o.accumulator, o.average):
                if values is not None and values.size:
                    spans.append(np.lib.array_utils.byte_bounds(values))
        merged: list[tuple[int, int]] = []
        for low, high in sorted(spans):
            if merged and low < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return merged

    def _plan(
        self, kind: Pass, rule: RuleKey, selection: Selection, odd: dict[int, Any]
    ) -> tuple[Plan | None, list[int]]:
        """The plan for the regular entries (of the rest, if the pass reads no gradient)."""
        key = (kind, rule, tuple(odd))
        found = selection.prepared.get(key)
        if found is None:
            if kind.gradient:
                operands, entries = self._operands(selection), selection.entries
            else:
                operands, entries = [self.operand(e) for e in selection.rest], selection.rest
            regular = [i for i in range(len(operands)) if i not in odd]
            plan = None
            if regular:
                plan = Plan(
                    kind,
                    rule,
                    [operands[i] for i in regular],
                    [entries[i].decayed for i in regular],
                )
            found = selection.prepared[key] = (plan, regular)
        return found

    def _odd_of(self, kind: Pass, selection: Selection, gradients: Gradients) -> dict[int, Any]:
        if kind.gradient:
            return gradients.odd
        found = selection.prepared.get("odd rest")
        if found is None:
            found = selection.prepared["odd rest"] = {
                i: (None, entry.dtype)
                for i, entry in enumerate(selection.rest)
                if not layout.compiled_for(self.view(entry.variable), None)
            }
        return found

    def _odd_pass(self, kind: Pass, rule: RuleKey, selection: Selection, i: int, odd: Any) -> Odd:
        entry = (selection.entries if kind.gradient else selection.rest)[i]
        gradient, dtype = odd
        if not kind.gradient:
            gradient = None
        kind = kind._replace(decayed=kind.decayed and entry.decayed)
        return Odd(kind, rule, self.operand(entry), gradient, dtype)

    def square_sums(
        self, kind: Pass, rule: RuleKey, selection: Selection, gradients: Any, pass_c: Any
    ) -> list[float]:
        pass_c = array("d", pass_c)
        odd = gradients.odd
        plan, regular = self._plan(kind, rule, selection, odd)
        if not odd and plan is not None:
            return plan.square_sums(gradients.addresses, pass_c)
        sums = [0.0] * len(selection.entries)
        if plan is not None:
            addresses = array("q", [gradients.addresses[i] for i in regular])
            for i, value in zip(regular, plan.square_sums(addresses, pass_c), strict=True):
                sums[i] = value
        for i, each in odd.items():
            sums[i] = self._odd_pass(kind, rule, selection, i, each).square_sum(pass_c)
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
        rule_c, pass_c, factors = array("d", rule_c), array("d", pass_c), array("d", factors)
        odd = self._odd_of(kind, selection, gradients)
        plan, regular = self._plan(kind, rule, selection, odd)
        addresses = gradients.addresses
        if odd:
            if kind.gradient:
                addresses = array("q", [addresses[i] for i in regular])
            chosen = array("d", [factors[i] for i in regular]) if factors else factors
            if plan is not None:
                plan.run(addresses, chosen, rule_c, pass_c)
            for i, each in odd.items():
                one = array("d", [factors[i]]) if factors else factors
                self._odd_pass(kind, rule, selection, i, each).run(one, rule_c, pass_c)
        elif plan is not None:
            plan.run(addresses, factors, rule_c, pass_c)

    def value(self, variable: Any) -> Any:
        return self.view(variable).item()

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
        for i, entry in enumerate(selection.entries):

            def rule(w: Any, g: Any, slots: Any, c: Any, entry: Entry = entry) -> Any:
                if kind.decayed and entry.decayed:
                    self.assign(entry.variable, w)
                update(g, entry)
                return entry.variable, slots

            element = make_element(
                kind._replace(decayed=kind.decayed and entry.decayed),
                rule,
                make_gradient(kind),
                minimum=np.minimum,
                maximum=np.maximum,
                where=np.where,
                rounded=lambda w: w,
            )
            gradient = gradients.native[i]
            factor = factors[i] if factors else 1.0
            w, _, accumulator, average = element(
                entry.variable, gradient, (), entry.accumulator, entry.average, factor, (), pass_c
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
        twin = copy.deepcopy(optimizer)
        copies = [copy.deepcopy(variable) for variable in variables]
        twin.build(copies)
        twin.set_weights(state)
        twin.apply(gradients, copies)
        return copies, twin.variables

    def branch(self, condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
        yes() if condition else no()


def _overlaps(values: Array, spans: list[tuple[int, int]]) -> bool:
    if not values.size:
        return False
    low, high = np.lib.array_utils.byte_bounds(values)
    return any(start < high and stop > low for start, stop in spans)
