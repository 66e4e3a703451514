"""The state of `omniadam.Adam` and of every other `omniadam.Optimizer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import copy
from typing import Any

import numpy as np

from .. import options
from ..backends.base import Backend, Entry
from ..engine import Engine
from ..state import Array, Awaited, State, host
from . import matching, names
from .matching import Left
from .optimizers import kind_of
from .snapshot import ITERATION, KERAS, Snapshot, Tensor, Variable


def turn(optimizer: Any) -> Any:
    """As of every module that knows a class."""
    backend = optimizer._state.backend
    return nullcontext() if backend is None else backend.turn


def snapshot(optimizer: Any, state: Sequence[Any] | None = None) -> Snapshot:
    """Class, settings and state.

    Args:
        optimizer: an `omniadam.Optimizer`.
        state: of bare JAX arrays, what `stateless_apply` returned.

    Raises:
        ValueError: if a setting is a callable; if there is state in the user's hands, or is none.
    """
    _check_callables(optimizer)
    backend = optimizer._state.backend
    if backend is not None:
        backend.check_readable()
    if state is not None and backend is None:
        raise ValueError("`state` is of an optimizer that is built, for each of its `variables`.")
    if state is None and backend is not None:
        held = optimizer._state
        is_given_away = held.given_at is not None and held.given_at == held.counted()
        check_in_hand(is_given_away or not backend.keeps_state)
    settings = optimizer.get_config()
    found = waiting(optimizer) if backend is None else None
    return Snapshot(kind_of(optimizer), KERAS, settings, *(found or contents(optimizer, state)))


def waiting(engine: Engine) -> tuple[tuple[Variable, ...], dict[str, Tensor]] | None:
    """The same as `contents` of what was loaded and waits for its variables; None if nothing does.

    Raises:
        ValueError: if it waits without its variables' names.
    """
    held = engine._state
    if isinstance(held.awaited, Kept):
        given = held.awaited.given
        return given.variables, {**given.tensors, ITERATION: _count_of(engine, None)}
    if held.awaited or held.restored or getattr(engine, "_deferred_dependencies", None):
        raise ValueError(
            "This optimizer was given state by set_weights(), load_own_variables(), a pickle, a "
            "copy or a checkpoint, which waits for the variables, and a file needs their names. "
            "Build it before you save it: opt.build(variables)."
        )
    return None


def check_in_hand(is_given_away: bool) -> None:
    """Raise ValueError if the state that there is here is behind the one that its user has."""
    if is_given_away:
        raise ValueError(
            "The state of this optimizer is in your hands: it is what stateless_apply() returned "
            "last. Pass it: save(optimizer, path, state=state)."
        )


def contents(
    engine: Engine, state: Sequence[Any] | None = None
) -> tuple[tuple[Variable, ...], dict[str, Tensor]]:
    """Variables and tensors of what makes steps."""
    held = engine._state
    backend = held.backend
    values = [own for _, own in held.named] if state is None else list(state)
    if len(values) != len(held.named):
        raise ValueError(
            f"`state` must have one array for each of the {len(held.named)} `variables` of the "
            f"optimizer. Received {len(values)}."
        )
    given = {id(own): value for (_, own), value in zip(held.named, values, strict=True)}
    tensors = {ITERATION: _count_of(engine, given.get(id(held.iteration)))}
    called = called_in_files(held)
    slots: dict[str, dict[str, str]] = {name: {} for name, _ in called.values()}
    counts = {id(part[0].since) for part in held.extensions}
    for name, (_, own) in names_in_files(engine):
        shape, dtype = held.form(own)
        if id(own) in counts:
            shape, dtype = (), np.dtype(np.int64)  # as the count of calls is
        read = _reader(backend, own, given[id(own)], shape, dtype)
        if name in tensors:
            raise ValueError(
                f"Two state variables would be '{name}' in a file. Name variables otherwise."
            )
        tensors[name] = Tensor(shape, dtype.name, read)
    for variable, word in held.slots.values():
        name, _ = called[variable]
        slots[name][word] = f"{name}.{word}"
    later = {id(e): k for k, part in enumerate(held.extensions, 1) for e in part}
    variables = []
    for e in held.entries:
        name, is_named = called[e.name]
        extension = later.get(id(e), 0)
        variables.append(Variable(name, e.shape, e.dtype, slots[name], is_named, extension))
    return tuple(variables), tensors


def names_in_files(engine: Engine) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Of the state but the counters: its names in files, here, and the state variables."""
    held = engine._state
    called = called_in_files(held)
    counts = {id(part[0].since): f"extension.{k}" for k, part in enumerate(held.extensions, 1)}
    for unique, own in held.named:
        if not held.is_counter(own):
            slot = held.slots.get(unique)
            name = counts.get(id(own), unique)
            yield name if slot is None else f"{called[slot[0]][0]}.{slot[1]}", (unique, own)


def called_in_files(held: State) -> dict[str, tuple[str, bool]]:
    """By the names of variables here, those in files, and whether these are their user's."""
    return called_of(held.backend, held.entries)


def called_of(backend: Backend | None, entries: Sequence[Entry]) -> dict[str, tuple[str, bool]]:
    """The same of entries that are still to be held."""
    given = []
    for entry in entries:
        # Keras and TensorFlow may have given the same name to several.
        own = None if entry.is_named or backend is None else backend.name_of(entry.key)
        given.append((own or entry.name, entry.is_named))
    return {
        entry.name: (name if is_named else entry.name, is_named)
        for entry, (name, is_named) in zip(entries, names.in_files(given), strict=True)
    }


def _reader(
    backend: Any, own: Any, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Callable[[], Array]:
    if value is own:
        return lambda: backend.numpy(own).astype(dtype, copy=False)

    def read() -> Array:
        found = host(value)
        if (found.shape, found.dtype) != (shape, dtype):
            raise ValueError(
                f"`state` must hold arrays as those of `optimizer.variables`. Received one of "
                f"shape {found.shape} and dtype {found.dtype} instead of {shape} and {dtype}."
            )
        return found

    return read


def _count_of(engine: Engine, given: Any) -> Tensor:
    """The number of calls, of the type that it has in every library's files."""
    held = engine._state

    def read() -> Array:
        is_own = given is None or given is held.iteration
        count = held.read(held.iteration) if is_own else host(given)
        return np.array(options.count("iteration", count), np.int64)

    return Tensor((), "int64", read)


def _check_callables(optimizer: Any) -> None:
    """Raise ValueError for what a file cannot hold."""
    called = [
        name
        for name in dict.fromkeys(
            ("learning_rate", *optimizer._option_names, *optimizer.hyperparameters)
        )
        if name in optimizer._called
    ]
    refuse_callables(called)


def refuse_callables(called: Sequence[str]) -> None:
    """Raise ValueError if there are settings that a file cannot hold."""
    if called:
        raise ValueError(
            f"A file cannot hold a callable, which `{'`, `'.join(called)}` "
            f"{'is' if len(called) == 1 else 'are'}. Set a number or a LearningRateSchedule before "
            "you save."
        )


# --- the way back ---


def name_in_file(state: State, name: str) -> str:
    """The name in files of a state variable that is tracked under this one."""
    variable, word = state.slots.get(name, (None, name))
    return word if variable is None else f"{called_in_files(state)[variable][0]}.{word}"


class Kept(Awaited):
    """The state of a file, for an optimizer that is not built yet."""

    def __init__(self, given: Snapshot, by: str, strict: bool) -> None:
        self.given, self._by, self._strict = given, by, strict
        # For what a user's `build` creates, and what did not fit that.
        self._rest: dict[str, Tensor] = {}
        self._wrong = ""

    def extensions(self, backend: Backend, entries: Sequence[Entry]) -> list[list[str]]:
        """As of `Awaited`."""
        called = called_of(backend, entries)
        mine = [Variable(called[e.name][0], e.shape, e.dtype, {}) for e in entries]
        theirs = self._fitted(mine).variables
        at = {v.name: i for i, v in enumerate(mine)} if self._by == "name" else {}
        parts: dict[int, list[str]] = {}
        for i, variable in enumerate(theirs):
            place = at.get(variable.name, len(entries)) if self._by == "name" else i
            if variable.extension and place < len(entries):
                parts.setdefault(variable.extension, []).append(entries[place].name)
        return [parts[number] for number in sorted(parts)]

    def _fitted(self, own: Sequence[Variable]) -> Snapshot:
        """What is kept, with the names that variables have in this optimizer."""
        return self.given

    def fill(self, engine: Engine, *, is_complete: bool) -> Kept | None:
        """As of `Awaited`."""
        # They may have been changed since the file was loaded.
        now = {n: getattr(engine, n) for n in matching.STRUCTURE if hasattr(engine, n)}
        own = Snapshot("", self.given.generation, now, *contents(engine))
        given, grows = self._fitted(own.variables), not is_complete
        found = matching.plan(given, own, by=self._by, strict=self._strict, may_grow=grows)
        if found.left and is_complete:
            warnings.warn(f"What was loaded was left out in part: {found.left}.", stacklevel=2)
        assign(engine, found.pairs)
        if is_complete:
            return None
        rest = type(self)(self.given, self._by, self._strict)
        rest._rest = dict(found.rest)
        return rest

    def tracked(self, state: State, name: str, variable: Any) -> None:
        """As of `Awaited`."""
        known = name_in_file(state, name)
        tensor, (shape, dtype) = self._rest.get(known), state.form(variable)
        if tensor is not None and (tensor.shape, tensor.dtype) == (shape, dtype.name):
            assert state.backend is not None
            with state.backend.untraced():
                state.assign(variable, tensor.read())
            del self._rest[known]
        elif self._strict:
            found = "none" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"
            # Whoever calls `build` may go on after this: no step is made then.
            self._wrong = (
                f"The state in the file does not fit the optimizer: '{known}' must be {dtype} of "
                f"shape {shape}. The file has {found}."
            )
            raise ValueError(self._wrong)

    def check_all_set(self) -> Kept | None:
        """As of `Awaited`."""
        if self._wrong:
            raise ValueError(self._wrong)
        if self._rest and self._strict:
            raise ValueError(
                "The state in the file does not fit the optimizer, which has no "
                f"{', '.join(self._rest)}. Where that is meant, load it with strict=False."
            )
        return None

    def values(self) -> list[Array]:
        """As of `Awaited`."""
        raise ValueError(
            "The state that was loaded waits for the variables, whose order says in which order "
            "weights are. Build the optimizer first: opt.build(variables)."
        )

    def __deepcopy__(self, memo: Any) -> Kept:
        new = copy(self)  # the tensors are the file's, and not written to
        new._rest = dict(self._rest)
        return new

    def __reduce__(self) -> Any:
        return type(self), (self.given.in_memory(), self._by, self._strict)


def restore(optimizer: Any, given: Snapshot, *, by: str, strict: bool) -> Left:
    """As of every module that knows a class."""
    engine: Engine = optimizer
    variables, tensors = contents(engine)
    own = Snapshot(kind_of(optimizer), KERAS, config_of(optimizer), variables, tensors)
    left = Left()
    with turn(optimizer):
        if engine.built:
            pairs, left, _ = matching.plan(given, own, by=by, strict=strict)
            set_counters = counters(engine, given)
            assign(engine, pairs)
            set_counters()
        else:
            matching.check_meaning(given, own)
            if by == "name":
                matching.check_named(given)
            counters(engine, given)()
            engine._state.restored, engine._state.awaited = None, Kept(given, by, strict)
            engine._forget_checkpoint()
    matching.warn_of_settings(given, own, stacklevel=5)
    return left


def config_of(optimizer: Any) -> Mapping[str, Any]:
    """The settings, callables as they are."""
    config: dict[str, Any] = optimizer._settings()
    with suppress(ValueError, TypeError, NotImplementedError):  # what has no form in a config
        config = optimizer.get_config()
    return config


def counters(engine: Engine, given: Snapshot) -> Callable[[], None]:
    """What sets the number of calls and the learning rate to those of a file, which are checked."""
    state = engine._state
    named = [(name, own) for name, own in state.named if state.is_counter(own)]
    now = {name: state.read(own) for name, own in named}
    if ITERATION in given.tensors:
        now["iteration"] = given.tensors[ITERATION].read()
    rate = given.settings.get("learning_rate")
    if isinstance(rate, (int, float)) and state.rate is not None:
        now["learning_rate"] = rate
    values = list(state.checked(named, [np.asarray(now[name]) for name, _ in named]))
    for name in {f"extension.{v.extension}" for v in given.variables if v.extension}:
        since = int(given.tensors[name].read()) if name in given.tensors else None
        if since is None or not -1 <= since <= int(now["iteration"]):
            raise ValueError(
                f"'{name}' in the file must be a count of iterations, at most that of the file. "
                f"Received: {since}."
            )

    def set_them() -> None:
        for (_, own), value in zip(named, values, strict=True):
            state.assign(own, value)

    return set_them


def assign(engine: Engine, pairs: Sequence[tuple[str, Tensor]]) -> None:
    """Set slots, one after another, to what was compared with them."""
    own = {name: each for name, (_, each) in names_in_files(engine)}
    backend = engine._state.backend
    assert backend is not None
    with backend.untraced():
        for name, tensor in pairs:
            if name in own:
                backend.assign(own[name], tensor.read())


def create(kind: Any, given: Snapshot, custom_objects: Mapping[str, Any], *, by: str) -> Any:
    """As of every module that knows a class."""
    optimizer = kind.from_config(dict(given.settings), custom_objects=custom_objects)
    restore(optimizer, given, by=by, strict=True)
    return optimizer
