"""The state of the older generations: slots m, v and vhat, under Keras's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import options, schedules
from ..compat.older import Older
from ..schedules import is_schedule
from ..state import State
from . import engine, matching
from .engine import Kept
from .matching import Left
from .optimizers import kind_of
from .snapshot import CONTRIB_KERAS, ITERATION, OPTIMIZER_V2, Snapshot, Tensor, Variable


def turn(optimizer: Any) -> Any:
    """As of every module that knows a class."""
    return engine.turn(optimizer._engine)


def snapshot(optimizer: Any) -> Snapshot:
    """Class, settings and state.

    Raises:
        ValueError: if a setting is a callable, or state waits that has no names.
    """
    hyper = optimizer._hyper
    engine.refuse_callables([n for n, v in hyper.items() if callable(v) and not is_schedule(v)])
    inner = optimizer._engine
    backend, awaited = inner._state.backend, inner._state.awaited
    if backend is not None:
        backend.check_readable()
    found = engine.waiting(inner) if backend is None else None
    variables, tensors = found or engine.contents(inner)
    if backend is not None and isinstance(awaited, KeptForOlder):
        variables, tensors = awaited.added_to(variables, tensors)
    settings = optimizer.get_config()
    return Snapshot(kind_of(optimizer), _generation(optimizer), settings, variables, tensors)


def _generation(optimizer: Any) -> str:
    is_contrib = any(
        kind.__module__.endswith("compat.contrib_keras") for kind in type(optimizer).__mro__
    )
    return CONTRIB_KERAS if is_contrib else OPTIMIZER_V2


def restore(optimizer: Any, given: Snapshot, *, by: str, strict: bool) -> Left:
    """As of every module that knows a class."""
    inner, left = optimizer._engine, Left()
    rate = given.settings.get("learning_rate", given.settings.get("lr"))
    if rate is not None:
        given = replace(given, settings={**given.settings, "learning_rate": rate})
    own = Snapshot(
        kind_of(optimizer), _generation(optimizer), _settings(optimizer), *engine.contents(inner)
    )
    with turn(optimizer):
        if inner.built:
            plan = matching.plan(given, own, by=by, strict=strict)
            left, set_counters = plan.left, _counters(optimizer, given)
            engine.assign(inner, plan.pairs)
        else:
            matching.check_meaning(given, own)
            if by == "name":
                matching.check_named(given)
            set_counters = _counters(optimizer, given)
            optimizer._forget_slots()
            inner._state.awaited = KeptForOlder(given, by, strict)
        set_counters()
    matching.warn_of_settings(given, own, stacklevel=5)
    return left


def _settings(optimizer: Any) -> Mapping[str, Any]:
    """The settings, callables and tensors as they are."""
    settings: dict[str, Any] = {
        name: optimizer._number(name) if isinstance(value, float) else value
        for name, value in optimizer._hyper.items()
    }
    rate = settings["learning_rate"]
    if is_schedule(rate):
        settings["learning_rate"] = schedules.serialize(rate)
    settings |= {name: value for name, value in optimizer._clips.items() if value is not None}
    return settings | {"amsgrad": optimizer._engine.amsgrad}


def _counters(optimizer: Any, given: Snapshot) -> Callable[[], None]:
    """What sets the count and a rate that is a number to those of a file, which are checked."""
    count = given.tensors[ITERATION].read() if ITERATION in given.tensors else np.array(0)
    calls = options.count("iteration` of the file, `iterations", count)
    rate = given.settings.get("learning_rate")
    is_number = isinstance(rate, (int, float)) and isinstance(
        optimizer._hyper["learning_rate"], float
    )
    if is_number:
        options.rate("learning_rate", rate)

    def set_them() -> None:
        optimizer._set_count(calls)
        if is_number:
            optimizer._set_hyper("learning_rate", rate)

    return set_them


class KeptForOlder(Kept):
    """The state of a file, for variables that may come one after another."""

    _is_begun = False  # whether the first have come: what they took is theirs

    def fill(self, inner: Any, *, is_complete: bool) -> KeptForOlder | None:
        """As of `Awaited`: slots of the user's own may be added later, and, if it was loaded with
        strict=False, variables.
        """
        given = self.given
        if self._is_begun:
            return self
        own = Snapshot("", given.generation, {}, *engine.contents(inner))
        found = matching.plan(given, own, by=self._by, strict=False)
        others = [name for name in found.left.unexpected if name.startswith("'")]  # variables
        if self._strict and (found.left.missing or found.left.different or others):
            matching.plan(given, own, by=self._by, strict=True)
        engine.assign(inner, found.pairs)
        taken = {id(tensor) for _, tensor in found.pairs}
        places = [at for variable in given.variables for at in variable.slots.values()]
        rest = KeptForOlder(given, self._by, self._strict)
        rest._is_begun = True
        rest._rest = {at: given.tensors[at] for at in places if id(given.tensors[at]) not in taken}
        return rest if rest._rest else None

    def tracked(self, state: State, name: str, variable: Any) -> None:
        """As of `Awaited`."""
        own, word = state.slots[name]
        if self._by == "position":
            i = [entry.name for entry in state.entries].index(own)
            theirs = list(self.given.variables[i : i + 1])
        else:
            own, _ = engine.called_in_files(state)[own]
            theirs = [each for each in self.given.variables if each.name == own]
        at = theirs[0].slots.get(word) if theirs else None
        if at not in self._rest:
            return  # a variable, or a slot, that is new
        tensor, (shape, dtype) = self._rest[at], state.form(variable)
        if (tensor.shape, tensor.dtype) != (shape, dtype.name):
            raise ValueError(
                f"The state in the file does not fit the optimizer: {word} of '{own}' is "
                f"{tensor.dtype} of shape {tensor.shape} in the file, {dtype} of shape {shape} in "
                "the optimizer."
            )
        assert state.backend is not None
        with state.backend.untraced():
            state.assign(variable, tensor.read())
        self._rest = {name: each for name, each in self._rest.items() if name != at}

    def check_all_set(self) -> KeptForOlder | None:
        """As of `Awaited`: what is left waits on."""
        return self if self._rest else None

    def added_to(
        self, variables: Sequence[Variable], tensors: Mapping[str, Tensor]
    ) -> tuple[tuple[Variable, ...], dict[str, Tensor]]:
        """What an optimizer has, and what waits for variables and slots that it has not yet."""
        held = {variable.name: variable for variable in variables}
        for each in self.given.variables:
            slots = {word: at for word, at in each.slots.items() if at in self._rest}
            if slots:
                now = held.get(each.name)
                more = slots if now is None else {**slots, **now.slots}
                held[each.name] = (now or each)._replace(slots=more)
        return tuple(held.values()), {**self._rest, **tensors}

    def __reduce__(self) -> Any:
        held = self.given.in_memory()
        return _again, (held, self._by, self._strict, [*self._rest], self._is_begun)


def _again(given: Snapshot, by: str, strict: bool, rest: list[str], is_begun: bool) -> KeptForOlder:
    kept = KeptForOlder(given, by, strict)
    kept._is_begun = is_begun
    kept._rest = {name: given.tensors[name] for name in rest}
    return kept


def create(
    kind: type[Older], given: Snapshot, custom_objects: Mapping[str, Any], *, by: str
) -> Older:
    """As of every module that knows a class."""
    from_config: Any = kind.from_config  # type: ignore[attr-defined]
    more = {"custom_objects": custom_objects}
    if "custom_objects" not in inspect.signature(from_config).parameters:
        more = {}
    optimizer: Older = from_config(dict(given.settings), **more)
    restore(optimizer, given, by=by, strict=True)
    return optimizer
