"""The step of the older generations: their clipping and `decay`, variables that come later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from .. import options
from ..adam import AdamEngine
from ..backends import backend_of
from ..backends.base import Backend, Entry, Selection, check_constrained
from ..backends.functional import Functional
from ..backends.host import HostMemory
from ..options import Option
from ..rule import (
    NOTHING,
    AdamCoefficients,
    Rule,
    clip_factor_joint,
    decayed_rate,
    make_element,
    make_gradient,
)
from ..settings import Clips
from ..step import Step, pass_coefficients

# What each hyperparameter may be, in the order that a step takes them.
CHECKS: dict[str, options.Check] = {
    "decay": options.rate,
    "beta_1": options.decay_rate,
    "beta_2": options.decay_rate,
    "epsilon": options.small_constant,
}


class OlderEngine(AdamEngine):
    """Adam with the settings of TensorFlow 2.0, under Keras 3's names."""

    decay = Option[Any](options.rate, or_callable=True)
    clipvalue = Option[float | None](options.limit)

    _exclusive_clips: ClassVar[tuple[str, ...]] = ("clipnorm", "global_clipnorm")
    _value_first: ClassVar[bool] = True
    # Whether TensorFlow's own operation is what this generation computed.
    uses_operation: ClassVar[bool] = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.decay = 0.0
        # By identity of a variable, a function of its new value.
        self.constraints: dict[int, Callable[[Any], Any]] = {}
        # What a pickle or a copy keeps the slots of each variable under.
        self._names_of_slots: list[list[str]] = []
        # Makes a step by an operation of the library, if it can.
        self.by_operation: Callable[[Backend, Selection, Any], bool] | None = None
        # Creates a slot under the name that TensorFlow's files know it by.
        self.new_slot: Callable[[Backend, Entry, str, Any], Any] | None = None

    def _hyperparameters(self) -> tuple[Any, ...]:
        return tuple(self._now(name, check) for name, check in CHECKS.items())

    def _now(self, name: str, check: options.Check) -> Any:
        """A setting at this step: a number, or what is symbolic in a graph."""
        value = getattr(self, name)
        value = value() if callable(value) else value
        if options.as_float(value) is None and backend_of(value) is not None:
            assert self._state.backend is not None
            try:
                return self._state.backend.rate(value)
            except ValueError as error:  # which is of the rate, in the backend's words
                raise ValueError(str(error).replace("learning_rate", name)) from error
        return check(name, value)

    def _rule_of(self, hyperparameters: Sequence[Any]) -> Rule:
        # One form for every beta: its bits are those of the older generations.
        return self.rule

    def _step_by(self, functions: Any, hyperparameters: tuple[Any, ...]) -> Step:
        # They may be symbolic, which are not compared.
        return self._make_step(functions, hyperparameters)

    def numbers(self, functions: Any, *hyperparameters: Any) -> tuple[Any, ...]:
        """As of `Adam`, after `decay`."""
        decay, *others = hyperparameters
        return (decay, *super().numbers(functions, *others))

    def coefficients(
        self, functions: Any, learning_rate: Any, t: Any, *numbers: Any
    ) -> AdamCoefficients:
        """As of `Adam`, by the rate that has decayed."""
        decay, *others = numbers
        if not isinstance(decay, float) or decay > 0.0:
            learning_rate = decayed_rate(learning_rate, decay, t)
        return super().coefficients(functions, learning_rate, t, *others)

    def constrain(
        self, variables: Sequence[Any], constraints: dict[int, Callable[[Any], Any]]
    ) -> None:
        """Set these variables, by identity, to a function of their new values after each step."""
        others = {id(v) for v in variables}
        kept = {key: value for key, value in self.constraints.items() if key not in others}
        if self.constraints != kept | constraints:
            self.constraints = kept | constraints
            for entry in self._state.entries:
                entry.constraint = self.constraints.get(id(entry.key), self._own(entry))
            self._version += 1  # what was compiled has the former ones
            self._forget()

    def _own(self, entry: Entry) -> Callable[[Any], Any] | None:
        """The constraint that a variable of TensorFlow came with."""
        assert self._state.backend is not None
        return self._state.backend.describe(entry.key, entry.name).constraint

    def _run(self, backend: Backend, selection: Selection, gradients: Any) -> Any:
        by_operation = self.by_operation
        if by_operation is not None and by_operation(backend, selection, gradients):
            return None
        return super()._run(backend, selection, gradients)

    def _advance(self, selection: Selection, gradients: Any, rate: Any, fixed: Any) -> None:
        if selection.constrained and isinstance(self._state.backend, HostMemory):
            self._try_constraints(selection)
        super()._advance(selection, gradients, rate, fixed)

    def _try_constraints(self, selection: Selection) -> None:
        """Where a step is made in place: an error is raised before the first."""
        backend = self._state.backend
        assert backend is not None
        for entry in () if selection.is_tried else selection.constrained:
            assert entry.constraint is not None
            value = copy.deepcopy(backend.array(entry.variable))
            check_constrained(entry.constraint(value), entry)
        selection.is_tried = True

    # --- variables that come later ---

    def include(self, variables: Sequence[Any]) -> None:
        """Create the state of those variables that have none yet."""
        if self._state.backend is None:
            self.build(variables)
        elif new := [v for v in variables if id(v) not in self._state.index]:
            with self._unbuilt_on_error():
                self._grow(new)

    def extend(self, variables: Any) -> None:
        """As `include`, outside of functions that are traced, and of variables that have names."""
        if self._state.backend is None:
            self.build(variables)
            return
        later = self._described_later(variables)
        if later:
            with self._unbuilt_on_error():
                self._state.hold((*self._state.entries, *later))
                self._forget()
                self._create_slots(later)

    def _grow(self, new: list[Any]) -> None:
        held = [entry.key for entry in self._state.entries]
        # Described together, so that all are of one library, and none is another.
        backend, entries = self._described([*held, *new])
        if type(backend) is not type(self._state.backend):
            raise ValueError(
                "Variables that come later must be where the others are. Received "
                f"{[e.name for e in entries[len(held) :]]}. Use one optimizer for each device."
            )
        self._state.hold((*self._state.entries, *entries[len(held) :]))
        self._forget()
        self._create_slots(self._state.entries[len(held) :])

    def _apply(self, grads: list[Any], variables: list[Any]) -> Any:
        if not self.built or all(id(v) in self._state.index for v in variables):
            return super()._apply(grads, variables)
        assert self._state.backend is not None
        if self._state.backend.stand_ins(self._state.entries, variables) is not None:
            return super()._apply(grads, variables)
        with self._unbuilt_on_error():
            self._grow([v for v in variables if id(v) not in self._state.index])
            return super()._apply(grads, variables)

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """As in `Engine`, under the name that TensorFlow's files know the slot by."""
        if self.new_slot is None:
            return super().add_variable_from_reference(reference_variable, name, initializer)
        assert self._state.backend is not None
        entry = self._entry(reference_variable)
        slot = self.new_slot(self._state.backend, entry, name or "var", initializer)
        prefix = entry.name.replace("/", "_").replace(":", "_")
        self._state.track(self, f"{prefix}_{name}", slot, (entry.name, name or "var"))
        return slot

    def reorder(self, order: Sequence[int]) -> None:
        """Hold the variables in another order, which lists their present positions."""
        self._state.hold([self._state.entries[i] for i in order])
        self._forget()

    def slots(self) -> list[Sequence[Any]]:
        """Of each variable; NumPy arrays in a pickle or a copy, which waits for its variables."""
        if self._state.restored is None or self.built:
            return [entry.slots for entry in self._state.entries]
        state = self._state.restored.state
        return [[state[name] for name in names] for names in self._names_of_slots]

    def __getstate__(self) -> dict[str, Any]:
        names = {id(variable): name for name, variable in self._state.named}
        held = [[names.get(id(slot), "") for slot in entry.slots] for entry in self._state.entries]
        return super().__getstate__() | {"_names_of_slots": held or self._names_of_slots}

    def put_slot(self, entry: Entry, position: int, slot: Any) -> None:
        """Keep another variable as a slot, under the name and in the place of the former."""
        slots = list(entry.slots)
        former, slots[position] = slots[position], slot
        for name, each in self._state.named:
            if each is slot:
                del self._state.slots[name]
        held = [each for each in self._state.named if each[1] is not slot]
        self._state.named = [(name, slot if each is former else each) for name, each in held]
        entry.slots = tuple(slots)
        self._forget()

    # --- scalars ---

    def count_in(self, variable: Any) -> None:
        """Count the steps in this variable, of a library that may not be known yet."""
        self._state.iteration = variable
        self._state.named[0] = ("iteration", variable)

    def _moved(self, value: Any) -> Any:
        if value is self._state.iteration and isinstance(
            self._state.backend, backend_of(value) or ()
        ):
            return value  # the user's own, or seen by the user
        return super()._moved(value)

    # --- gradients as a step applies them ---

    def clipped(
        self, gradients: Sequence[Any], variables: Sequence[Any], clips: Clips
    ) -> list[Any]:
        """What a step with these thresholds makes of gradients before Adam; no state is needed or
        created.
        """
        step = self._step_with(clips, NOTHING, ())
        kind = step.passes.step
        if not (kind.clipped_by_factor or kind.clipped_by_value):
            return list(gradients)
        backend, entries = self._described(list(variables))
        selection = Selection(entries, ())
        dense = [g.to_dense() if hasattr(g, "to_dense") else g for g in gradients]
        gathered = backend.gather(
            selection, [backend.gradient(g, e) for g, e in zip(dense, entries, strict=True)]
        )
        pass_c = pass_coefficients(backend.functions, kind, step.settings, 0.0, 0)
        factors = step.factors(backend, selection, gathered, pass_c) or [1.0] * len(dense)
        if isinstance(backend, Functional):
            factors = [
                backend._coefficients([factor], entry.dtype)[0]
                for factor, entry in zip(factors, entries, strict=True)
            ]
        functions = backend.arrays
        element = make_element(
            kind,
            lambda w, g, slots, coefficients: (g, slots),
            make_gradient(kind, functions),
            functions,
            rounded=lambda w: w,
        )
        with np.errstate(all="ignore"):
            return [
                element(g, g, (), None, None, factor, (), pass_c)[0]
                for g, factor in zip(dense, factors, strict=True)
            ]


class JointlyClipped(OlderEngine):
    """The clipping of TensorFlow 1.1: one norm over all gradients, then the value."""

    _exclusive_clips: ClassVar[tuple[str, ...]] = ()
    _value_first: ClassVar[bool] = False
    uses_operation: ClassVar[bool] = False
    _clip_factor_of_all: ClassVar[Callable[[Any, Any, Any], Any]] = staticmethod(clip_factor_joint)
