"""The state of `omniadam.keras`, which Keras keeps: see `_KerasEngine.seen`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from .. import schedules
from ..schedules import is_schedule
from . import engine, matching
from .engine import Kept
from .matching import Left
from .optimizers import kind_of
from .snapshot import KERAS, Snapshot, Variable


def turn(optimizer: Any) -> Any:
    """As of every module that knows a class."""
    backend = optimizer._engine._state.backend
    return nullcontext() if backend is None else backend.turn


def snapshot(optimizer: Any, state: Sequence[Any] | None = None) -> Snapshot:
    """Class, settings and state.

    Args:
        optimizer: of `omniadam.keras`.
        state: what `stateless_apply` returned, if that is its user's.

    Raises:
        ValueError: if a setting is a callable, or state waits that has no names, or is its user's.
    """
    _check_callables(optimizer)
    inner = optimizer._engine
    if inner.built:
        inner._state.backend.check_readable()
        if state is None:
            engine.check_in_hand(inner.is_given_away())
        found = engine.contents(inner.seen(), state)
    elif state is not None:
        raise ValueError("`state` is of an optimizer that is built, for each of its `variables`.")
    else:
        seen = inner.seen()
        seen._state.awaited = inner._state.awaited
        found = engine.waiting(seen) or engine.contents(seen)
    return Snapshot(kind_of(optimizer), KERAS, optimizer.get_config(), *found)


def _check_callables(optimizer: Any) -> None:
    """Raise ValueError for what a file cannot hold."""
    rate = vars(optimizer)["_learning_rate"]
    settings = {name: getattr(optimizer, name) for name in optimizer._engine._read_names}
    if not is_schedule(rate) and not hasattr(rate, "assign"):  # no variable
        settings = {"learning_rate": rate} | settings
    engine.refuse_callables([name for name, value in settings.items() if callable(value)])


def restore(optimizer: Any, given: Snapshot, *, by: str, strict: bool) -> Left:
    """As of every module that knows a class."""
    inner, left = optimizer._engine, Left()
    with turn(optimizer):
        seen = inner.seen()
        own = Snapshot(kind_of(optimizer), KERAS, _settings(optimizer), *engine.contents(seen))
        if inner.built:
            found = _renamed(given, own.variables) if by == "name" else given
            pairs, left, _ = matching.plan(found, own, by=by, strict=strict)
            set_counters = engine.counters(seen, given)
            engine.assign(seen, pairs)
            set_counters()
        else:
            matching.check_meaning(given, own)
            if by == "name":
                matching.check_named(given)
            engine.counters(seen, given)()
            inner.wait_with(KeptForKeras(given, by, strict))
    matching.warn_of_settings(given, own, stacklevel=5)
    return left


def _settings(optimizer: Any) -> Mapping[str, Any]:
    """The settings, callables as they are."""
    rate = vars(optimizer)["_learning_rate"]
    settings = {name: getattr(optimizer, name) for name in optimizer._engine._read_names}
    excluded: dict[str, Any] = optimizer._engine.exclusion()
    return {"learning_rate": _told(rate)} | settings | excluded


def _told(rate: Any) -> Any:
    if is_schedule(rate):
        return schedules.serialize(rate)
    return 0.0 if hasattr(rate, "assign") else rate  # a variable is restored, and not compared


class KeptForKeras(Kept):
    """The state of a file, for an optimizer of Keras that is not built yet."""

    def _fitted(self, own: Sequence[Variable]) -> Snapshot:
        return _renamed(self.given, own) if self._by == "name" else self.given


def _renamed(given: Snapshot, own: Sequence[Variable]) -> Snapshot:
    """A file with the names that its variables have here: Keras leaves the model's name out of the
    paths in a model that is loaded.
    """
    theirs, ours = ([v.name for v in each if v.is_named] for each in (given.variables, own))
    for before, after in ((theirs, ours), (ours, theirs)):
        heads = {name.partition("/")[0] for name in before}
        tails = {name.partition("/")[2]: name for name in before}
        # All of them, and of a layer each: else it is no model's name that is left out.
        if len(heads) == 1 and set(tails) == set(after) and all("/" in name for name in after):
            names = {v: k for k, v in tails.items()} if before is theirs else tails
            variables = [v._replace(name=names.get(v.name, v.name)) for v in given.variables]
            return replace(given, variables=tuple(variables))
    return given


def create(kind: Any, given: Snapshot, custom_objects: Mapping[str, Any], *, by: str) -> Any:
    """As of every module that knows a class."""
    optimizer = kind.from_config(dict(given.settings), custom_objects=dict(custom_objects))
    restore(optimizer, given, by=by, strict=True)
    return optimizer
