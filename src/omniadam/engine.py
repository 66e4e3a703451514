"""What makes steps: settings on a state. Optimizers and drop-ins add how they are called."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import numpy as np

from . import options, schedules
from .backends import Backend, backend_of, supported
from .backends.base import Entry, Group, Latest, Selection, received
from .rule import Pass, PassCoefficients, Rule
from .schedules import LearningRate, is_schedule
from .settings import Settings, as_it_is
from .state import State, UniqueNames, initial, names_of
from .step import Step, checked, known, passes_of, updates_since


class Engine(Settings):
    """Settings, the state that they need for some variables, and the steps of both.

    Args:
        learning_rate: a number >= 0, a `LearningRateSchedule` (of `omniadam.schedules` or of
            Keras), or a callable without arguments that returns the rate, called at each step.
        **settings: of `Settings`.
    """

    # Of each extension that the next build makes, as a config, a pickle or a copy says.
    _extended_names: tuple[tuple[str, ...], ...] = ()

    def __init__(self, learning_rate: LearningRate, **settings: Any) -> None:
        self._building = threading.RLock()
        self._state = State()
        self._forget()
        self._excluded_variables: list[Any] = []
        self._excluded_names: tuple[str, ...] = ()
        self._excluded_exact: tuple[str, ...] = ()
        super().__init__(**settings)
        # The learning rate, if it is no number, which is a variable of the state.
        self._schedule: Callable[[Any], Any] | None = None
        self._rate_function: Callable[[], Any] | None = None
        self._set_learning_rate(learning_rate)

    def _forget(self) -> None:
        """Drop what was prepared for the sets of variables that have had gradients together."""
        # By the identities of their entries.
        self._selections = Latest(_SELECTIONS)
        self._recent: Selection | None = None

    def _set_learning_rate(self, value: Any) -> None:
        refuse_variables(value, type(self).__name__)
        self._version += 1
        self._latest = None
        self._schedule = value if is_schedule(value) else None
        self._rate_function = value if callable(value) and self._schedule is None else None
        number = None if callable(value) else options.rate("learning_rate", value)
        self._note_called("learning_rate", self._rate_function)
        self._state.set_rate(number)

    @property
    def learning_rate(self) -> float | Any:
        """The present rate: of the schedule at the present step, of the callable, or the number.

        Settable, to a number, a schedule or a callable, unless the optimizer was made with a
        schedule: then setting a number raises TypeError.
        """
        if self._schedule is not None:
            return self._scheduled(self._calls())
        if self._rate_function is not None:
            return self._rate_function()
        return self._state.read(self._state.rate)

    @learning_rate.setter
    def learning_rate(self, value: LearningRate) -> None:
        is_number = not is_schedule(value) and not callable(value)
        if is_number and self._schedule is not None:
            raise TypeError(
                "This optimizer was created with a `LearningRateSchedule` as its `learning_rate`, "
                f"so it cannot be set to a number. Received: {value!r}. Set another schedule, or "
                "create the optimizer with a number."
            )
        state = self._state
        if is_number and state.rate is not None:
            check = partial(options.rate, "learning_rate")
            state.assign(state.rate, (state.backend.rate if state.backend else check)(value))
        else:
            self._set_learning_rate(value)

    def _scheduled(self, calls: Any) -> Any:
        assert self._schedule is not None
        if isinstance(calls, int):
            return self._schedule(calls)
        schedule = schedules.traceable(self._schedule)
        # Ours keeps the precision of a float, which a traced count divided is in every library.
        is_ours = type(schedule).__module__ == schedules.__name__
        return schedule(calls / 1 if is_ours else calls)

    @property
    def iterations(self) -> int | Any:
        """How often the variables were updated: calls // `gradient_accumulation_steps`."""
        n = self.gradient_accumulation_steps
        return self._calls() // n if n else self._calls()

    def _calls(self) -> Any:
        return self._state.read(self._state.iteration)

    # --- building ---

    def build(self, variables: Iterable[Any] | Mapping[str, Any]) -> None:
        """Create the state for these variables; the first `apply` does it otherwise.

        Args:
            variables: list of variables of one library, or a mapping from names to them. Names
                are what state is kept under and what `exclude_from_weight_decay` matches. If
                there are none, nothing is done, and the optimizer is still to be built.

        Raises:
            TypeError, ValueError: if a variable cannot be trained, shares memory with another, or
                is of another library than the first; or if the optimizer was built with others.

        Example:
            >>> import numpy as np
            >>> from omniadam import Adam
            >>> opt = Adam()
            >>> opt.build({"dense/kernel": np.zeros((2, 3)), "dense/bias": np.zeros(3)})
            >>> [name for name in opt.named_variables()][2:4]
            ['dense_kernel_momentum', 'dense_kernel_velocity']
        """
        with self._building:
            self._build_or_check(variables)

    def _build_or_check(self, variables: Any) -> None:
        if self.built:
            if [id(v) for v in as_list(variables)] != [id(e.key) for e in self._state.entries]:
                held = self._state.entries
                raise ValueError(
                    f"This optimizer was built with {len(held)} variables: {names_of(held)}. It "
                    "cannot be built again with others; create a new optimizer for them."
                )
            return
        given = variables if isinstance(variables, Mapping) else as_list(variables)
        if not given:
            return
        with self._unbuilt_on_error():
            self._build(*self._described(given))

    @contextmanager
    def _unbuilt_on_error(self) -> Iterator[None]:
        """Take a build back if it fails, or the first step does that it was for."""
        before = vars(self) | {"_state": copy(self._state)}
        calls = self._state.counted()
        try:
            yield
        except BaseException:
            # A step was made if an interrupt came after it, or if another thread has made one.
            if self._state.counted() in (calls, None) or calls is None:
                attributes = vars(self)
                for name in attributes.keys() - before.keys():
                    del attributes[name]
                attributes.update(before)
            raise

    def _described(self, variables: Any) -> tuple[Backend, tuple[Entry, ...]]:
        """Entries for variables that may be built on; nothing is changed yet."""
        given, names = as_list(variables), None
        if isinstance(variables, Mapping):
            names = list(variables)
            if not all(isinstance(name, str) and name for name in names):
                raise TypeError(f"Names of variables must be non-empty strings. Received: {names}")
        if not given:
            raise ValueError("An optimizer needs at least one variable. Received: none.")
        backend, is_named = self._library_of(given, names).over(given), names is not None
        if names is None:
            names = self._state.names_for(backend, given)
        entries = self._entries_of(backend, given, names, is_named=is_named)
        backend.check_distinct(entries)
        self._state.check_restored(entries)
        return backend, entries

    @staticmethod
    def _library_of(given: list[Any], names: Sequence[str] | None) -> type[Backend]:
        """The library that all of the variables are of."""
        kinds = [backend_of(variable) for variable in given]
        for i, (variable, kind) in enumerate(zip(given, kinds, strict=True)):
            if kind is None:
                is_pair = isinstance(variable, tuple) and isinstance([*variable, None][0], str)
                raise TypeError(
                    f"Variable {i if names is None else names[i]!r} must be a variable of one of "
                    f"these libraries: {supported()}. Received: {received(variable)}."
                    + (" With names, give a mapping: dict(named_parameters())." * is_pair)
                )
        first = kinds[0]
        assert first is not None
        for i, kind in enumerate(kinds):
            if kind is not first:
                assert kind is not None
                raise TypeError(
                    "All variables of an optimizer must be of one library. Received variable 0 of "
                    f"{first.name} and variable {i} of {kind.name}. Use one optimizer for each."
                )
        return first

    @staticmethod
    def _entries_of(
        backend: Backend, given: list[Any], names: Sequence[str], *, is_named: bool
    ) -> tuple[Entry, ...]:
        entries = tuple(backend.describe(v, n) for v, n in zip(given, names, strict=True))
        for entry in entries:
            entry.is_named = is_named
        seen: dict[int, str] = {}
        for entry in entries:
            if id(entry.key) in seen:
                raise ValueError(
                    f"Variables '{seen[id(entry.key)]}' and '{entry.name}' are the same "
                    f"object, of shape {entry.shape}. Pass each variable once."
                )
            seen[id(entry.key)] = entry.name
        return entries

    def _build(self, backend: Backend, entries: tuple[Entry, ...]) -> None:
        first, later = self._in_parts(backend, entries)
        state = self._state
        state.backend = backend
        state.hold(entries)
        self._forget()
        self._decide_decay(entries)
        for _, counter in state.named.copy():
            state.replace_counter(counter, self._moved(counter))
        for name, counter in state.named:
            backend.created(self, name, counter)
        self._create_slots(first)
        for part in later:
            self._add_extension(part, -1)
        self._extended_names = ()
        self.built = True
        if state.awaited is not None:
            is_complete = type(self).build is Engine.build
            state.awaited = state.awaited.fill(self, is_complete=is_complete)
            state.is_filled = True

    def _decide_decay(self, entries: Sequence[Entry]) -> None:
        excluded = {id(v) for v in self._excluded_variables}
        for entry in entries:
            entry.decayed = not (
                id(entry.key) in excluded
                or entry.name in self._excluded_exact
                or any(re.search(pattern, entry.name) for pattern in self._excluded_names)
            )

    # --- variables that come later ---

    def extend(self, variables: Iterable[Any] | Mapping[str, Any]) -> None:
        """Add variables to a built optimizer, as after unfreezing a layer; before, build it.

        The others keep their state, and nothing else changes for them. The new ones begin as a new
        optimizer's do: their bias correction counts from their own first step on, and their first
        moving average is the variable itself. `iterations`, schedules and
        `ema_overwrite_frequency` go on for all. While gradients accumulate, new variables are
        those that had no gradient in the calls before. What is excluded from weight decay by name
        is excluded among the new ones, too.

        Their state stands at the end of `variables`: the `iterations` when they were added, under
        the name "extension" (-1 until the first step if the optimizer cannot know it, as the state
        may be in your hands), and then what `build` creates.

        A function that was compiled before, by `jax.jit` or `tf.function`, goes on without the new
        variables: compile it anew.

        Args:
            variables: list of variables, or a mapping from names to them. Those that the optimizer
                has are left alone, so that it may be all that are trained now. If it is, their
                order is from now on that of `apply` without variables, and of `stateless_apply`;
                else the new ones come last there.

        Raises:
            TypeError, ValueError: as `build`; or if a new variable has a name that is known; inside
                of a function that is compiled; or if a subclass has a `build` of its own, whose
                state nobody else can add to. Nothing has been changed then.

        Example:
            >>> import numpy as np
            >>> from omniadam import Adam
            >>> head, body = np.array([1.0]), np.array([1.0])
            >>> opt = Adam(learning_rate=0.1)
            >>> for _ in range(9):
            ...     calls = opt.apply_gradients([(np.array([1.0]), head)])
            >>> opt.extend({"body": body})
            >>> opt.apply_gradients([(np.array([1.0]), head), (np.array([1.0]), body)])
            10
            >>> head.round(3).tolist(), body.round(3).tolist()
            ([0.0], [0.9])
            >>> [name for name in opt.named_variables()][4:]
            ['extension', 'body_momentum', 'body_velocity']
        """
        with self._building:
            if not self.built:
                self.build(variables)
                return
            given = variables if isinstance(variables, Mapping) else as_list(variables)
            described = self._described_later(given)
            if described:
                with self._unbuilt_on_error():
                    self._extend(described, self._ordered(given, described))

    def _described_later(self, given: Mapping[str, Any] | list[Any]) -> list[Entry]:
        """Entries for the variables that are new and may be added; nothing is changed yet."""
        state, backend = self._state, self._state.backend
        assert backend is not None
        names, new = self._new_among(given)
        if not new:
            return []
        self._check_extensible()
        backend.check_untraced("`extend` with new variables")
        first = state.entries[0]
        self._library_of([first.key, *new], [first.name, *names])
        is_named = isinstance(given, Mapping)
        later = self._entries_of(backend, new, names, is_named=is_named)
        backend.check_distinct((*state.entries, *later))
        return list(later)

    def _new_among(self, given: Mapping[str, Any] | list[Any]) -> tuple[list[str], list[Any]]:
        """Those of the variables that the optimizer has not, and the names they are to have."""
        state, backend = self._state, self._state.backend
        assert backend is not None
        known = {entry.name: entry for entry in state.entries}
        kind = backend_of(state.entries[0].key)
        if not isinstance(given, Mapping):
            new = [variable for variable in given if id(variable) not in state.index]
            own = [backend.name_of(v) if backend_of(v) is kind else None for v in new]
            unique = UniqueNames(known).unique
            return [unique(name or "variable") for name in own], new
        names, new = [], []
        for name, variable in given.items():
            if id(variable) in state.index:
                continue
            if not (isinstance(name, str) and name):
                raise TypeError(f"Names of variables must be non-empty strings. Received: {name!r}")
            if name in known and backend.stands_for(variable, known[name]):
                continue
            if name in known:
                raise ValueError(
                    f"A variable that is added must have a name of its own. Received '{name}' of "
                    f"shape {getattr(variable, 'shape', 'unknown')}, a name under which this "
                    f"optimizer has another variable, of shape {known[name].shape}. Give it "
                    "another name; or create a new optimizer, if it takes the place of that."
                )
            names.append(name)
            new.append(variable)
        return names, new

    def _check_extensible(self) -> None:
        if type(self).build is not Engine.build:
            raise ValueError(
                f"{type(self).__name__} has a `build` of its own, so that `extend` does not know "
                "which state a variable needs. Create a new optimizer for all variables, or give "
                "the class a `rule`, whose slots are known."
            )

    def _ordered(self, given: Mapping[str, Any] | list[Any], later: Sequence[Entry]) -> list[Entry]:
        """All entries as the user lists them; if some are missing there, new ones come last."""
        every = [*self._state.entries, *later]
        known = {id(entry.key): entry for entry in every}
        if isinstance(given, Mapping):
            named = {entry.name: entry for entry in every}
            listed = [known.get(id(v)) or named[name] for name, v in given.items()]
        else:
            listed = [known[id(variable)] for variable in given]
        order = list({id(entry): entry for entry in listed}.values())
        return order if len(order) == len(every) else every

    def _extend(self, later: Sequence[Entry], order: Sequence[Entry]) -> None:
        state, backend = self._state, self._state.backend
        assert backend is not None
        state.restored = None  # what was pickled or copied is in its variables now
        with backend.turn:
            # Whoever has given a state away, or has made no step, may be behind the user's.
            calls = 0 if state.is_given_away else int(backend.numpy(state.iteration))
            since = calls // (self.gradient_accumulation_steps or 1) if calls else -1
            self._decide_decay(later)
            state.hold(order)
            self._forget()
            self._add_extension(later, since)

    def _add_extension(self, entries: Sequence[Entry], since: int) -> None:
        state = self._state
        count = state.create(np.array(since, np.int64))
        state.track(self, "extension", count)
        for entry in entries:
            entry.since = count
        self._create_slots(entries)
        state.extensions = (*state.extensions, tuple(entries))

    def _first_average(self, entry: Entry, shape: tuple[int, ...], dtype: str) -> Any:
        """The value of a variable that is added: its average until there is a step."""
        assert self._state.backend is not None
        return self._state.backend.numpy(entry.variable)

    def _extension_names(self) -> tuple[tuple[str, ...], ...]:
        """The names of the variables of each extension, of those still to be built, too."""
        held = tuple(tuple(entry.name for entry in part) for part in self._state.extensions)
        return held or self._extended_names

    def _in_parts(
        self, backend: Backend, entries: Sequence[Entry]
    ) -> tuple[list[Entry], list[list[Entry]]]:
        """Which entries were built on first, and which were added then, by what a config says, or
        what is loaded and waits for them.
        """
        later, given = [], list(map(list, self._extended_names))
        if self._state.awaited is not None:
            given = self._state.awaited.extensions(backend, entries) or given
        for names in given:
            part = [entry for name in names for entry in entries if entry.name == name]
            if part and len(part) != len(names):
                found = [entry.name for entry in part]
                raise ValueError(
                    f"The variables {list(names)} were added to this optimizer together, by "
                    f"`extend`, as its config or pickle says. Received of them {found}, among "
                    f"{names_of(entries)}. Build it with all variables, or with those only that "
                    "it was built with first."
                )
            later += [part] if part else []
        added = {id(entry) for part in later for entry in part}
        return [entry for entry in entries if id(entry) not in added], later

    def _forget_checkpoint(self) -> None:
        """Drop what a checkpoint of TensorFlow has for slots that will be set otherwise."""
        deferred = getattr(self, "_deferred_dependencies", None)
        if deferred:
            deferred.clear()

    def _create_slots(self, entries: Sequence[Entry]) -> None:
        variables = [entry.key for entry in entries]
        for entry in entries if self.use_ema else ():
            start = "zeros" if entry.since is None else partial(self._first_average, entry)
            (entry.average,) = self.add_optimizer_variables([entry.key], "average", start)
        if self.gradient_accumulation_steps:
            for entry in entries:
                entry.accumulator = self.add_variable_from_reference(
                    entry.key, "gradient_accumulator"
                )
        for group in _slot_groups(self.rule):
            columns = self.add_optimizer_variables(variables, list(group))
            for entry, slots in zip(entries, zip(*columns, strict=True), strict=True):
                entry.slots = (*entry.slots, *slots)

    def _moved(self, value: Any) -> Any:
        return self._state.moved(value)

    def add_variable(
        self,
        shape: Sequence[int],
        initializer: Any = "zeros",
        dtype: str | None = None,
        aggregation: str | None = "none",
        layout: Any = None,
        name: str | None = None,
    ) -> Any:
        """Add a state variable that belongs to no variable of the model.

        Args:
            shape: tuple of integers.
            initializer: "zeros", "ones", or a callable `(shape, dtype)` that returns the values.
            dtype: a float or integer type; float32 if None.
            aggregation: how replicas combine it, for libraries that distribute variables.
            layout: where it is placed, likewise.
            name: what the state is kept under.

        Returns:
            The variable, of the library of the model's variables.

        Raises:
            ValueError: before `build`, when that library is not known yet.
        """
        if self._state.backend is None:
            raise ValueError(
                "`add_variable` needs to know the library of the model's variables. Call it in "
                "`build`, after super().build(variables)."
            )
        created = self._state.create(initial(initializer, tuple(shape), dtype or "float32"))
        self._state.track(self, name or "variable", created)
        return created

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Add a state variable of the shape, type and memory layout of a variable of the model.

        Args:
            reference_variable: one of the variables that the optimizer is built with. The slot of
                a float16 or bfloat16 variable is float32.
            name: the state is kept under `{variable's name}_{name}`.
            initializer: as for `add_variable`.

        Returns:
            The variable.
        """
        entry = self._entry(reference_variable)
        assert self._state.backend is not None
        dtype = entry.slot_dtype
        if isinstance(initializer, str) and initializer == "zeros":
            created = self._state.backend.zeros(entry, dtype)
        else:
            value = initial(initializer, entry.shape, dtype)
            created = self._state.backend.filled(entry, dtype, value)
        prefix = entry.name.replace("/", "_").replace(":", "_")
        slot = entry.name, name or "var"
        self._state.track(self, f"{prefix}_{slot[1]}", created, slot)
        return created

    def add_optimizer_variables(
        self,
        trainable_variables: Iterable[Any] | Mapping[str, Any],
        name: str | Sequence[str],
        initializer: Any = "zeros",
    ) -> Any:
        """Add one state variable, or one for each of several names, for each variable.

        Args:
            trainable_variables: the model's variables, as in `build`.
            name: a name, or a list of names.
            initializer: one for all names, or a list with one for each.

        Returns:
            A list with one state variable a variable; for a list of names, a tuple of such lists.
            None stands for the state of a Keras variable with `overwrite_with_gradient`.

        Raises:
            ValueError: if there are not as many initializers as names.
        """
        names = [name] if isinstance(name, str) else list(name)
        if isinstance(initializer, (list, tuple)):
            initializers = list(initializer)
        else:
            initializers = [initializer] * len(names)
        if len(names) != len(initializers):
            raise ValueError(
                "There must be one initializer for all names, or one for each. Received "
                f"{len(names)} names, {names}, and {len(initializers)} initializers."
            )
        columns: tuple[list[Any], ...] = tuple([] for _ in names)
        for variable in as_list(trainable_variables):
            replaced = self._entry(variable).replaced
            for column, each, start in zip(columns, names, initializers, strict=True):
                column.append(
                    None if replaced else self.add_variable_from_reference(variable, each, start)
                )
        return columns[0] if isinstance(name, str) else columns

    def _entry(self, variable: Any) -> Entry:
        return self._state.entries[self._get_variable_index(variable)]

    def _get_variable_index(self, variable: Any) -> int:
        return self._state.position(variable)

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from weight decay; must be called before the optimizer is built.

        Args:
            var_list: variables to exclude.
            var_names: strings; a variable is excluded if any of them, as a regular expression,
                is found in its name.

        Raises:
            ValueError: if the optimizer is built, or a string is no regular expression.

        Example:
            >>> from omniadam import AdamW
            >>> opt = AdamW(1e-3)
            >>> opt.exclude_from_weight_decay(var_names=["bias", "layer_norm"])
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` must be called before the optimizer is built, which "
                "the first step does."
            )
        names = [var_names] if isinstance(var_names, str) else list(var_names or ())
        for name in names:
            try:
                re.compile(name)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"`var_names` must hold regular expressions. Received: {name!r} ({error})"
                ) from error
        self._excluded_variables = [] if var_list is None else as_list(var_list)
        self._excluded_names = tuple(names)
        self._excluded_exact = ()

    # --- a step ---

    def _counted(self, calls: Any) -> Any:
        """The number of calls, by what a step returned."""
        assert self._state.backend is not None
        return self._state.backend.count(self._state.iteration) if calls is None else calls

    def _apply(self, grads: list[Any], variables: list[Any]) -> Any:
        """A step; the number of calls after it, if the backend knows that without being asked."""
        selection = self._recent
        if selection is not None:
            assert self._state.backend is not None
            gradients = self._state.backend.recognise(selection, grads, variables)
            if gradients is not None:
                return self._step(selection, gradients)
        if self.built:
            return self._step(*self._examined(grads, variables))
        with ExitStack() as stack:
            with self._building:  # one thread builds, and others find it built
                if not self.built:
                    stack.enter_context(self._unbuilt_on_error())
                examined = self._examined(grads, variables)
            return self._step(*examined)

    def _examined(self, grads: list[Any], variables: list[Any]) -> tuple[Selection, Any]:
        """Step 1: every check, and the gradients that are there. Builds if that is still to do."""
        new = stand_ins = None
        held = self._state.entries
        if self.built:
            backend = self._state.backend
            assert backend is not None
            stand_ins = backend.stand_ins(self._state.entries, variables)
            entries = stand_ins or [self._entry(variable) for variable in variables]
            if len({id(entry) for entry in entries}) != len(entries):
                raise ValueError(
                    f"A variable is given twice in one step. Received: {names_of(entries)}."
                )
            backend.check_built(self._state.entries)
        else:
            new = self._described(variables)
            backend, entries = new[0], list(new[1])
        present, checked = self._present(backend, entries, grads, depth=5)
        if new is not None:
            self._build_by(variables, *new)
            present = [self._entry(entry.key) for entry in present]
        self._state.restored = None  # what was pickled or copied is in its variables now
        if self._state.awaited is not None:
            self._state.awaited = self._state.awaited.check_all_set()
        if stand_ins is None:
            self._recent = selection = self._selection(present)
            if new is None and self._state.entries is not held:  # another thread has added to them
                self._recent = None
        else:
            selection = selected(present, stand_ins)
        if any(entry.replaced for entry in present):
            self._recent = None
            others, checked = self._replace(present, checked)
            selection = self._selection(others)
        return selection, backend.gather(selection, checked)

    def _present(
        self, backend: Backend, entries: Sequence[Entry], grads: Sequence[Any], depth: int
    ) -> tuple[list[Entry], list[Any]]:
        """The entries that have gradients, and these, checked; warns of the others."""
        missing = [e.name for g, e in zip(grads, entries, strict=True) if g is None]
        if len(missing) == len(entries):
            raise ValueError(
                f"No gradients provided for any variable. Received None for all of {missing}."
            )
        pairs = [(e, g) for g, e in zip(grads, entries, strict=True) if g is not None]
        checked = [backend.gradient(g, e) for e, g in pairs]
        if missing:
            warnings.warn(
                f"Gradients do not exist for variables {missing}; they are not updated.",
                stacklevel=depth,
            )
        return [e for e, _ in pairs], checked

    def _replace(
        self, present: Sequence[Entry], gradients: Sequence[Any]
    ) -> tuple[list[Entry], list[Any]]:
        """Serve the variables whose gradient is their new value; the others are left for a step."""
        backend, others, left = self._state.backend, [], []
        assert backend is not None
        for entry, gradient in zip(present, gradients, strict=True):
            if entry.replaced:
                backend.replace(
                    entry, gradient, self._state.iteration, self.gradient_accumulation_steps
                )
            else:
                others.append(entry)
                left.append(gradient)
        return others, left

    def _selection(self, present: Sequence[Entry]) -> Selection:
        key = tuple(map(id, present))
        found: Selection = self._selections.found(
            key, lambda: selected(present, self._state.entries)
        )
        return found

    def _build_by(self, variables: list[Any], backend: Backend, entries: tuple[Entry, ...]) -> None:
        """Build on variables already described, by a subclass's own `build` if it has one."""
        if type(self).build is Engine.build:
            self._build(backend, entries)
        else:
            self.build(variables)
            if not self.built:
                raise RuntimeError(
                    f"{type(self).__name__}.build must call super().build(variables)."
                )

    def _step(self, selection: Selection, gradients: Any) -> Any:
        """Steps 2 to 9, run at once or as a compiled whole, as the library does such things."""
        backend = self._state.backend
        assert backend is not None
        if not selection.entries:  # all were replaced
            self._state.assign(self._state.iteration, self._calls() + 1)
            return None
        if self._called:
            calls = backend.by_latest(lambda: self._run(backend, selection, gradients))
        else:
            calls = self._run(backend, selection, gradients)
        backend.constrain(selection.entries)
        return calls

    def _run(self, backend: Backend, selection: Selection, gradients: Any) -> Any:
        rate, step = self._rate_and_step()
        return backend.run(self._advance, selection, gradients, rate, step)

    def _rate_and_step(self) -> tuple[Any, Step]:
        """What `_advance` takes beside gradients, of the settings as they are at this step."""
        backend = self._state.backend
        assert backend is not None
        function = self._rate_function
        rate = None if function is None else backend.rate(function())
        return rate, self._step_by(backend.functions, self._hyperparameters())

    def _advance(self, selection: Selection, gradients: Any, rate: Any, step: Step) -> None:
        """A step between its counts: see `Step.advance`.

        Args:
            selection: the entries with gradients.
            gradients: what the backend gathered.
            rate: the learning rate, if it is a callable's.
            step: what is compiled, and the numbers that it takes.
        """
        backend = self._state.backend
        assert backend is not None
        if self._schedule is not None:
            calls, rate = self._count_and_rate(backend)
        else:
            calls = backend.calls(self._state.iteration)
            rate = backend.value(self._state.rate) if rate is None else rate
        step.advance(backend, selection, gradients, calls, rate)
        if step.update is not None:
            calls = backend.value(self._state.iteration)  # others may have made steps meanwhile
        backend.count_up(self._state.iteration, calls, gradients)

    def _count_and_rate(self, backend: Backend) -> tuple[Any, Any]:
        """The number of calls so far, and the rate that the schedule has for it."""
        calls = backend.calls(self._state.iteration)
        while True:
            with backend.aside():
                rate = backend.rate(self._scheduled(calls))
            now = backend.calls(self._state.iteration)
            if now is calls or now == calls:
                return calls, rate
            calls = now  # others made steps while the schedule ran

    def _update_one(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The rule, and nothing else of a step, on one variable, as step `iterations` + 1."""
        entry, backend = self._entry(variable), self._state.backend
        assert backend is not None
        hyperparameters = self._hyperparameters()
        rule = known(self._rule_of(hyperparameters))
        selection = self._selection((entry,))
        gradients = backend.gather(selection, [backend.gradient(gradient, entry)])
        functions = backend.functions
        updates = self.iterations
        if entry.since is not None:
            updates = updates_since(functions, updates, backend.value(entry.since))
        rule_c = self.coefficients(
            functions,
            backend.rate(learning_rate),
            (updates + 1) / 1,
            *self.numbers(functions, *hyperparameters),
        )
        group = Group(_UPDATE, rule, selection, checked(rule, rule_c), PassCoefficients())
        backend.sweep(group, gradients)
        backend.check_run()

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Overwrite variables by their moving averages, at the end of training.

        Args:
            var_list: variables that the optimizer was built with. Without `use_ema` nothing is
                done.

        Raises:
            ValueError: if a variable is unknown, or no step has been made. In a function that is
                traced, variables then stay what they are.
        """
        if not self.use_ema:
            return
        entries = [self._entry(variable) for variable in as_list(var_list)]
        calls, backend = self._calls(), self._state.backend
        assert backend is not None
        if not backend.is_traced(calls) and calls == 0:
            raise ValueError("There is no moving average before the first step.")
        for entry in entries:
            if not entry.replaced:
                backend.overwrite(entry, calls)

    def _differentiated(
        self,
        loss: Any,
        variables: Any,
        grad_loss: Any = None,
        scale: Callable[[Any], Any] = lambda loss: loss,
    ) -> list[Any]:
        """Gradients of `scale(loss)`, by the library of the variables."""
        backend = self._state.backend if self.built else None
        if backend is None:
            # Differentiating changes nothing, but an error about the variables should come first.
            backend = self._described(variables)[0]
        return backend.differentiate(loss, as_list(variables), grad_loss, scale)

    # --- copies ---

    def _excluded_by_name(self) -> tuple[str, ...]:
        """The names of the variables that are excluded from weight decay one by one."""
        if self._excluded_variables and not self.built:
            raise ValueError(
                "Variables were excluded from weight decay by `var_list`, which a config, a pickle "
                "or a copy holds by their names. Build the optimizer first, or exclude by "
                "`var_names`."
            )
        excluded = {id(variable) for variable in self._excluded_variables}
        names = [entry.name for entry in self._state.entries if id(entry.key) in excluded]
        return (*self._excluded_exact, *names)

    def __getstate__(self) -> dict[str, Any]:
        """The settings and the state, without the variables it is for.

        What is unpickled or copied takes up the variables of its next `build` or step, which must
        have the same names and shapes in the same order.
        """
        if not self.built and getattr(self, "_deferred_dependencies", None):
            raise ValueError(
                "A checkpoint of TensorFlow was restored into this optimizer, and its moments wait "
                "for the variables. Build it, or make a step, before it is copied or pickled."
            )
        # Without what TensorFlow notes on an object that it tracks.
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_self_")}
        del state["_building"]
        return state | {
            "built": False,
            "_state": self._state.apart(),
            "_selections": {},
            "_recent": None,
            "_latest": None,
            "_excluded_variables": [],
            "_excluded_exact": self._excluded_by_name(),
            "_extended_names": self._extension_names(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._building = threading.RLock()
        self._forget()


as_it_is(Engine)


_UPDATE = passes_of(Pass(gradient=True, updates=True)).step
# For how many sets of variables with gradients an optimizer keeps what was prepared.
_SELECTIONS = 1024


def _slot_groups(rule: Rule | None) -> list[tuple[str, ...]]:
    """Slots are created variable by variable within a group, as Keras does: all but the third
    of Adam together, since its files have all `velocity_hat`s at the end.
    """
    slots = () if rule is None else rule.slots
    return [group for group in (slots[:2], slots[2:]) if group]


def selected(present: Sequence[Entry], entries: Sequence[Entry]) -> Selection:
    """Those that have a gradient, and the rest of all entries."""
    chosen = set(map(id, present))
    return Selection(
        tuple(present), tuple(e for e in entries if id(e) not in chosen and not e.replaced)
    )


def as_list(variables: Any) -> list[Any]:
    """Variables, as they may be given: a list, a mapping from names, or one."""
    if isinstance(variables, (list, tuple)):
        return list(variables)
    if isinstance(variables, Mapping):
        return list(variables.values())
    if backend_of(variables) is not None:
        return [variables]
    if isinstance(variables, Iterable) and not isinstance(variables, (str, bytes)):
        return list(variables)
    raise TypeError(
        f"Variables must be given as a list, or a mapping from names. Received: "
        f"{received(variables)}."
    )


def refuse_variables(rate: Any, kind: str) -> None:
    """Raise TypeError for a learning rate that is what other optimizers take first: a model, or the
    variables of one.

    Args:
        rate: what a learning rate is to be.
        kind: the class that is made, for the message.
    """
    if callable(rate) and hasattr(rate, "trainable_variables"):
        library = "keras"
    elif isinstance(rate, Iterator) or (callable(rate) and hasattr(rate, "parameters")):
        library = "torch"
    else:
        first = rate
        while isinstance(first, (list, tuple, set, Mapping)) and first:
            # Of torch's groups their parameters; of pairs with a name what comes after it.
            held = list(first.values()) if isinstance(first, Mapping) else list(first)
            first = held[-1] if isinstance(first, tuple) else held[0]
        backend = None if first is rate else backend_of(first)
        if backend is None:
            return  # no number, if it is none of the other things that a rate may be
        library = backend.name
    drop_in = "AdamW" if kind == "AdamW" else "Adam"
    leads = {
        "torch": options.instead("torch", kind),
        "keras": f"For `model.compile`, `import omniadam.keras`: omniadam.keras.{drop_in}().",
    }
    steps = (
        "Variables are given to a step, with their gradients: "
        "opt.apply_gradients([(gradient, variable), ...]); or to opt.minimize(loss, variables)."
    )
    raise TypeError(
        "`learning_rate` comes first here, and must be a number, a schedule, or a callable without "
        f"arguments. Received: {received(rate)}, which looks like the variables of a model. "
        f"{leads.get(library, steps)}"
    )
