"""The surface of a Keras 3 optimizer, and the order of one step."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import isfunction
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from . import options, schedules
from .backends import Backend, backend_of, introduce, supported
from .backends.base import Entry, Group, Latest, Selection, Stateless, received
from .options import Option
from .rule import NOTHING, Pass, PassCoefficients, Rule, clip_factor_global
from .state import State, initial, names_of
from .step import NormClip, Passes, Step, StepSettings, checked, known, passes_of

Array = npt.NDArray[Any]


class _Base:
    """Python lets bases be added to a class that has one already: see `backends.introduce`."""


class Optimizer(_Base):
    """Base class of optimizers: everything but the arithmetic of one rule.

    A subclass gives its arithmetic in one of two ways. `Adam` has a `rule`, which is compiled and
    fused with everything else that a step does. A subclass written for Keras overrides `build` and
    `update_step`, and runs unchanged, variable by variable.

    Args:
        learning_rate: a number >= 0, a `LearningRateSchedule` (of `omniadam.schedules` or of
            Keras), or a callable without arguments that returns the rate, called at each step.
        weight_decay: number >= 0, or None. Decoupled: w <- w - w * weight_decay * learning_rate
            before the update.
        clipnorm: number > 0, or None. The gradient of each variable is scaled down to have at
            most this Euclidean norm.
        clipvalue: number > 0, or None. Each element of a gradient is clipped to +- this value.
        global_clipnorm: number > 0, or None. All gradients are scaled down together so that the
            norm over all of them is at most this.
        use_ema: whether to keep an exponential moving average of each variable.
        ema_momentum: 0 <= number <= 1; average <- momentum * average + (1 - momentum) * w.
        ema_overwrite_frequency: integer >= 1, or None: every so many `iterations` the variables
            are overwritten by their averages. With None, `finalize_variable_values` does it.
        loss_scale_factor: number > 0, or None. `scale_loss` multiplies by it, and gradients are
            divided by it.
        gradient_accumulation_steps: integer >= 2, or None. Variables change on every n-th call
            only, by the mean of the gradients of n calls.
        name: name of the optimizer.

    Raises:
        ValueError: if a setting is out of its range, or more than one clip is set.

    Example:
        >>> import numpy as np
        >>> from omniadam import Optimizer
        >>> class Descent(Optimizer):
        ...     def update_step(self, gradient, variable, learning_rate):
        ...         self.assign_sub(variable, learning_rate * gradient)
        >>> w = np.array([1.0, -2.0])
        >>> Descent(0.1, global_clipnorm=1.0).apply_gradients([(np.array([3.0, 4.0]), w)])
        1
        >>> w.round(3).tolist()
        [0.94, -2.08]

    docs/rules.md has a rule that is compiled.
    """

    weight_decay = Option(options.weight_decay)
    clipnorm = Option(options.threshold)
    clipvalue = Option(options.threshold)
    global_clipnorm = Option(options.threshold)
    use_ema = Option(options.boolean, structural=True)
    ema_momentum = Option(options.momentum)
    ema_overwrite_frequency = Option(options.whole(1))
    loss_scale_factor = Option(options.scale)
    gradient_accumulation_steps = Option(options.whole(2), structural=True)
    name = Option(options.text)

    # What `get_config` holds beside the learning rate; a subclass adds its own.
    _option_names: ClassVar[tuple[str, ...]] = (
        "name",
        "weight_decay",
        "clipnorm",
        "global_clipnorm",
        "clipvalue",
        "use_ema",
        "ema_momentum",
        "ema_overwrite_frequency",
        "loss_scale_factor",
        "gradient_accumulation_steps",
    )
    # What subclasses of Keras's optimizers may override, and nobody calls here.
    _never_called: ClassVar[frozenset[str]] = frozenset(
        (
            "_apply_weight_decay",
            "_backend_apply_gradients",
            "_backend_increment_gradient_accumulators",
            "_backend_reset_gradient_accumulators",
            "_backend_update_step",
            "_clip_by_norm",
            "_clip_gradients",
            "_filter_empty_gradients",
            "_get_current_learning_rate",
            "_overwrite_model_variables_with_average_value",
            "_overwrite_variable_with_gradient",
            "_overwrite_variables_directly_with_gradients",
            "_update_model_variables_moving_average",
            "_use_weight_decay",
            "iterations",
            "learning_rate",
        )
    )
    # The older generations clip in another order, and in more than one way at once.
    _exclusive_clips: ClassVar[tuple[str, ...]] = options.CLIPS
    _value_first: ClassVar[bool] = False
    _clip_factor_of_all: ClassVar[Callable[[Any, Any, Any], Any]] = staticmethod(clip_factor_global)
    # Of the settings that are callables, which are called at each step.
    _called: frozenset[str] = frozenset()

    def __init__(
        self,
        learning_rate: Any,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: bool = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: str | None = None,
    ) -> None:
        introduce(Optimizer)
        options.check_overrides(
            type(self),
            Optimizer,
            self._never_called,
            "Override `apply`, which every step goes through, or `update_step`, which is the rule; "
            "a schedule or a callable is a learning rate of one's own.",
        )
        self.built = False
        self._building = threading.RLock()
        self._state = State()
        self._forget()
        self._passes: Passes | None = None
        # The rule's settings of the latest step, and what was made of them.
        self._latest: tuple[tuple[Any, ...], Step] | None = None
        self._version = 0  # of what a compiled step calls
        self._excluded_variables: list[Any] = []
        self._excluded_names: tuple[str, ...] = ()
        self._excluded_exact: tuple[str, ...] = ()
        options.check_clips(
            {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm},
            self._exclusive_clips,
        )
        self.weight_decay = weight_decay
        self.clipnorm, self.clipvalue = clipnorm, clipvalue
        self.global_clipnorm = global_clipnorm
        self.use_ema, self.ema_momentum = use_ema, ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.loss_scale_factor = loss_scale_factor
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.name = type(self).__name__.lower() if name is None else name
        # The learning rate, if it is no number, which is a variable of the state.
        self._schedule: Callable[[Any], Any] | None = None
        self._rate_function: Callable[[], Any] | None = None
        self._set_learning_rate(learning_rate)

    def _forget(self) -> None:
        """Drop what was prepared for the sets of variables that have had gradients together."""
        # By the identities of their entries.
        self._selections = Latest(_SELECTIONS)
        self._recent: Selection | None = None

    # --- settings ---

    def _settings_changed(self, name: str) -> None:
        self._passes = self._latest = None
        self._note_called(name, self.__dict__[name])
        exclusive = self._exclusive_clips
        if name in exclusive:
            held = self.__dict__
            if held[name] is not None and sum(held.get(n) is not None for n in exclusive) > 1:
                rejected = {n: held.get(n) for n in exclusive}
                held[name] = None
                options.check_clips(rejected, exclusive)

    def _note_called(self, name: str, value: Any) -> None:
        """Note whether a setting is a callable, which is called at each step."""
        others = self._called - {name}
        self._called = others | {name} if callable(value) else others

    def _set_learning_rate(self, value: Any) -> None:
        self._version += 1
        self._latest = None
        is_schedule = _is_schedule(value)
        is_function = callable(value) and not is_schedule
        number = None if is_schedule or is_function else options.rate("learning_rate", value)
        self._schedule = value if is_schedule else None
        self._rate_function = value if is_function else None
        self._note_called("learning_rate", self._rate_function)
        self._state.set_rate(number)

    @property
    def learning_rate(self) -> Any:
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
    def learning_rate(self, value: Any) -> None:
        is_number = not _is_schedule(value) and not callable(value)
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
    def iterations(self) -> Any:
        """How often the variables were updated: calls // `gradient_accumulation_steps`."""
        n = self.gradient_accumulation_steps
        return self._calls() // n if n else self._calls()

    def _calls(self) -> Any:
        return self._state.read(self._state.iteration)

    # --- building ---

    @property
    def rule(self) -> Rule | None:
        """The update rule, which is compiled and fused with all else that a step does; None if
        `update_step` is the rule. A subclass sets it: a `Rule`, or a property.
        """
        return None

    # The settings that the rule's coefficients are computed from: names of attributes that hold a
    # number, or a callable without arguments that returns it at each step.
    hyperparameters: ClassVar[tuple[str, ...]] = ()

    def numbers(self, functions: Any, *hyperparameters: Any) -> tuple[Any, ...]:
        """What `coefficients` needs of the hyperparameters, in double precision.

        A step of JAX computes in single precision, in which 1 - 0.999 has four digits: what loses
        digits is computed here, on the host.

        Args:
            functions: `sqrt`, `expm1`, `log`, `maximum` and `where` of numbers.
            *hyperparameters: the values of `hyperparameters` at this step.

        Returns:
            Numbers, as many for all values; the hyperparameters themselves by default.
        """
        return hyperparameters

    def coefficients(
        self, functions: Any, learning_rate: Any, t: Any, *numbers: Any
    ) -> Sequence[Any]:
        """The rule's coefficients at step t = 1, 2, ..., one for each name in `rule.coefficients`.

        Args:
            functions: as of `numbers`. Its arguments may be traced, so that Python's `if` and
                `math` are none for them.
            learning_rate: a number.
            t: the number of the step, a float.
            *numbers: what `numbers` returned.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `coefficients(functions, learning_rate, t, "
            "*numbers)`, as it has a `rule`."
        )

    def _rule_of(self, hyperparameters: Sequence[Any]) -> Rule:
        """The rule of a step with these values of its settings; it has the slots of `rule`."""
        return self.rule or NOTHING

    @property
    def _is_fused(self) -> bool:
        """Whether a step runs the rule itself; no, if a subclass overrides `update_step`."""
        return self.rule is not None and type(self).update_step is Optimizer.update_step

    def build(self, variables: Any) -> None:
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
            if [id(v) for v in _as_list(variables)] != [id(e.key) for e in self._state.entries]:
                held = self._state.entries
                raise ValueError(
                    f"This optimizer was built with {len(held)} variables: {names_of(held)}. It "
                    "cannot be built again with others; create a new optimizer for them."
                )
            return
        given = variables if isinstance(variables, Mapping) else _as_list(variables)
        if not given:
            return
        with self._unbuilt_on_error():
            self._build(*self._described(given))

    @contextmanager
    def _unbuilt_on_error(self) -> Iterator[None]:
        """Take a build back if it fails, or the first step does that it was for."""
        before = self.__dict__ | {"_state": copy.copy(self._state)}
        calls = self._state.counted()
        try:
            yield
        except BaseException:
            # A step was made if an interrupt came after it, or if another thread has made one.
            if self._state.counted() in (calls, None) or calls is None:
                self.__dict__ = before
            raise

    def _described(self, variables: Any) -> tuple[Backend, tuple[Entry, ...]]:
        """Entries for variables that may be built on; nothing is changed yet."""
        given, names = _as_list(variables), None
        if isinstance(variables, Mapping):
            names = list(variables)
            if not all(isinstance(name, str) and name for name in names):
                raise TypeError(f"Names of variables must be non-empty strings. Received: {names}")
        if not given:
            raise ValueError("An optimizer needs at least one variable. Received: none.")
        kinds = [backend_of(variable) for variable in given]
        for i, (variable, kind) in enumerate(zip(given, kinds, strict=True)):
            if kind is None:
                raise TypeError(
                    f"Variable {i if names is None else names[i]!r} must be a variable of one of "
                    f"these libraries: {supported()}. Received: {received(variable)}."
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
        backend = first.over(given)
        if names is None:
            names = self._state.names_for(backend, given)
        entries = tuple(backend.describe(v, n) for v, n in zip(given, names, strict=True))
        seen: dict[int, str] = {}
        for entry in entries:
            if id(entry.key) in seen:
                raise ValueError(
                    f"Variables '{seen[id(entry.key)]}' and '{entry.name}' are the same "
                    f"object, of shape {entry.shape}. Pass each variable once."
                )
            seen[id(entry.key)] = entry.name
        backend.check_distinct(entries)
        self._state.check_restored(entries)
        return backend, entries

    def _build(self, backend: Backend, entries: tuple[Entry, ...]) -> None:
        introduce(Optimizer)
        state = self._state
        state.backend = backend
        state.hold(entries)
        self._forget()
        excluded = {id(v) for v in self._excluded_variables}
        for entry in entries:
            entry.decayed = not (
                id(entry.key) in excluded
                or entry.name in self._excluded_exact
                or any(re.search(pattern, entry.name) for pattern in self._excluded_names)
            )
        for _, counter in state.named.copy():
            state.replace_counter(counter, self._moved(counter))
        for name, counter in state.named:
            backend.created(self, name, counter)
        self._create_slots(entries)
        self.built = True
        if self._state.awaited is not None:
            try:
                with backend.untraced():
                    self.set_weights(self._state.awaited)
            except ValueError as error:
                raise ValueError(
                    f"The state that was migrated belongs to other variables. {error}"
                ) from error
            self._state.awaited = None

    def _create_slots(self, entries: Sequence[Entry]) -> None:
        variables = [entry.key for entry in entries]
        if self.use_ema:
            averages = self.add_optimizer_variables(variables, "average")
            for entry, average in zip(entries, averages, strict=True):
                entry.average = average
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
        self._state.track(self, f"{prefix}_{name or 'var'}", created)
        return created

    def add_optimizer_variables(
        self, trainable_variables: Sequence[Any], name: Any, initializer: Any = "zeros"
    ) -> Any:
        """Add one state variable, or one for each of several names, for each variable.

        Args:
            trainable_variables: the model's variables.
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
        for variable in trainable_variables:
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
        self._excluded_variables = [] if var_list is None else _as_list(var_list)
        self._excluded_names = tuple(names)
        self._excluded_exact = ()

    # --- a step ---

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Any:
        """Update variables by their gradients.

        Args:
            grads_and_vars: pairs (gradient, variable). A gradient has the variable's shape, and
                any float type; or is None, or sparse (`IndexedSlices`).

        Returns:
            The number of calls so far, including this one; of JAX an array, which is not waited
            for.

        Raises:
            TypeError: if something is no pair, no trainable variable or no gradient.
            ValueError: if no pair has a gradient, shapes differ, or a variable is unknown. Nothing
                has been changed then.

        Example:
            >>> import numpy as np
            >>> from omniadam import Adam
            >>> w = np.array([1.0, 2.0])
            >>> Adam(learning_rate=0.1).apply_gradients([(np.array([1.0, -1.0]), w)])
            1
            >>> w.round(4).tolist()
            [0.9, 2.1]
        """
        try:
            grads, variables = [], []
            for gradient, variable in grads_and_vars:
                grads.append(gradient)
                variables.append(variable)
        except (TypeError, ValueError) as error:
            raise TypeError(
                "`grads_and_vars` must be an iterable of pairs (gradient, variable). Received: "
                f"{received(grads_and_vars)} ({error})."
            ) from error
        if not grads:
            raise ValueError("No gradients provided for any variable: `grads_and_vars` is empty.")
        calls = None
        if type(self).apply is Optimizer.apply:
            calls = self._apply(grads, variables)
        else:
            self.apply(grads, variables)
        assert self._state.backend is not None
        return self._state.backend.count(self._state.iteration) if calls is None else calls

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Update variables by a list of gradients, one a variable.

        Args:
            grads: as in `apply_gradients`. If the list is empty, nothing is done.
            trainable_variables: the variables; all that the optimizer was built with if None.

        Raises:
            TypeError, ValueError: as `apply_gradients`; and if the lengths differ, or variables
                are left out before the optimizer was built.
        """
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "`apply(grads)` without variables needs a built optimizer. Call "
                    "build(variables) first, or pass the variables."
                )
            variables = [entry.key for entry in self._state.entries]
        else:
            variables = list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                f"There must be one gradient a variable. Received {len(grads)} gradients for "
                f"{len(variables)} variables: {names_of(self._state.entries)}."
            )
        self._apply(grads, variables)
        assert self._state.backend is not None
        self._state.backend.check_run()

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
        if stand_ins is None:
            self._recent = selection = self._selection(present)
        else:
            selection = _selected(present, stand_ins)
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
            key, lambda: _selected(present, self._state.entries)
        )
        return found

    def _build_by(self, variables: list[Any], backend: Backend, entries: tuple[Entry, ...]) -> None:
        """Build on variables already described, by a subclass's own `build` if it has one."""
        if type(self).build is Optimizer.build:
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
        rate = None
        if self._rate_function is not None:
            assert self._state.backend is not None
            rate = self._state.backend.rate(self._rate_function())
        return rate, self._step_by(self._hyperparameters())

    def _step_by(self, hyperparameters: tuple[Any, ...]) -> Step:
        latest = self._latest
        if latest is None or latest[0] != hyperparameters:
            latest = self._latest = hyperparameters, self._make_step(hyperparameters)
        return latest[1]

    def _make_step(self, hyperparameters: tuple[Any, ...]) -> Step:
        assert self._state.backend is not None
        return self._make_step_of(
            self._passes or self._make_passes(),
            known(self._rule_of(hyperparameters)),
            self._settings_now(),
            tuple(self.numbers(self._state.backend.functions, *hyperparameters)),
        )

    def _make_step_of(
        self, passes: Passes, rule: Rule, settings: StepSettings, numbers: tuple[Any, ...]
    ) -> Step:
        version = (
            # What a callable returns is an argument, whichever it is.
            self._version if "learning_rate" not in self._called else None,
            *map(id, passes),  # each kept for ever, as the rule is
            id(rule),
            self.clipnorm is None,
            self.ema_overwrite_frequency,
            self.gradient_accumulation_steps,
        )
        return Step(
            version,
            passes,
            rule,
            self.coefficients,
            NormClip(self.clipnorm is None, type(self)._clip_factor_of_all),
            settings,
            numbers,
            (*settings, *numbers),
            self.gradient_accumulation_steps,
            self.ema_overwrite_frequency,
            None if self._is_fused else self._update_entry,
        )

    def _settings_now(self) -> StepSettings:
        threshold = self.global_clipnorm if self.clipnorm is None else self.clipnorm
        return StepSettings(
            self.loss_scale_factor or 1.0,
            self.clipvalue or 0.0,
            self.weight_decay or 0.0,
            float(self.ema_momentum),
            1.0 - self.ema_momentum,
            threshold or 0.0,
        )

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

    def _update_entry(self, gradient: Any, entry: Entry, learning_rate: Any) -> None:
        self.update_step(gradient, entry.key, learning_rate)

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

    def _make_passes(self) -> Passes:
        self._passes = passes_of(
            Pass(
                gradient=True,
                updates=True,
                scaled=self.loss_scale_factor is not None,
                accumulated=self.gradient_accumulation_steps is not None,
                clipped_by_factor=self.clipnorm is not None or self.global_clipnorm is not None,
                clipped_by_value=self.clipvalue is not None,
                value_first=self.clipvalue is not None and self._value_first,
                decayed=self.weight_decay is not None,
                averaged=self.use_ema,
                overwritten=self.use_ema and self.ema_overwrite_frequency is not None,
            )
        )
        return self._passes

    def _hyperparameters(self) -> tuple[Any, ...]:
        """The values of `hyperparameters` at this step: numbers, of callables too."""
        return tuple([options.present(self, name) for name in self.hyperparameters])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable by its gradient, by the rule, as step `iterations` + 1.

        Nothing is clipped, decayed, averaged or counted. A subclass without a `rule` overrides it.

        Args:
            gradient: of the variable's shape.
            variable: one of those the optimizer was built with.
            learning_rate: a number.

        Raises:
            NotImplementedError: if there is no rule, and no override.
        """
        if self.rule is None:
            raise NotImplementedError(
                f"{type(self).__name__} must override `update_step(gradient, variable, "
                "learning_rate)`, or have a `rule`."
            )
        entry, backend = self._entry(variable), self._state.backend
        assert backend is not None
        hyperparameters = self._hyperparameters()
        rule = known(self._rule_of(hyperparameters))
        selection = self._selection((entry,))
        gradients = backend.gather(selection, [backend.gradient(gradient, entry)])
        functions = backend.functions
        rule_c = self.coefficients(
            functions,
            backend.rate(learning_rate),
            (self.iterations + 1) / 1,
            *self.numbers(functions, *hyperparameters),
        )
        group = Group(_UPDATE, rule, selection, checked(rule, rule_c), PassCoefficients())
        backend.sweep(group, gradients)
        backend.check_run()

    def assign(self, variable: Any, value: Any) -> None:
        """Set a variable.

        Args:
            variable: of the model, or a state variable.
            value: of its shape.

        Raises:
            ValueError: if it is a count or a learning rate that there cannot be.
        """
        if self._state.rate is not None and variable is self._state.rate:
            self.learning_rate = value
            return
        if variable is self._state.iteration and isinstance(
            value, (int, float, np.ndarray, np.generic)
        ):
            value = options.count("iteration", value)
        self._state.assign(variable, value)

    def _value_of(self, variable: Any) -> Any:
        backend = self._state.backend
        return variable if backend is None else backend.array(variable)

    def assign_add(self, variable: Any, value: Any) -> None:
        """Add to a variable.

        Args:
            variable: of the model, or a state variable.
            value: of its shape.
        """
        self.assign(variable, self._value_of(variable) + value)

    def assign_sub(self, variable: Any, value: Any) -> None:
        """Subtract from a variable.

        Args:
            variable: of the model, or a state variable.
            value: of its shape.
        """
        self.assign(variable, self._value_of(variable) - value)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """A step as a function: nothing that is passed in changes, nor does the optimizer.

        A step of no variables returns what it is given. In `jax.jit` with donation, let the
        function take variables and state in the order in which it returns them: JAX pairs donated
        memory with results by order, and else copies it all.

        Args:
            optimizer_variables: values for `variables`, in that order.
            grads: one gradient a variable, as in `apply_gradients`.
            trainable_variables: values for the variables the optimizer was built with.

        Returns:
            The new `(trainable_variables, optimizer_variables)`.

        Raises:
            ValueError: if the optimizer is not built, or a list has the wrong length.
            TypeError, ValueError: if a value or a gradient does not fit, as in `apply_gradients`.

        Example:
            >>> import numpy as np
            >>> from omniadam import Adam
            >>> w, opt = np.array([1.0, 2.0]), Adam(learning_rate=0.1)
            >>> opt.build([w])
            >>> (new,), state = opt.stateless_apply(opt.variables, [np.array([1.0, -1.0])], [w])
            >>> new.round(3).tolist(), w.tolist(), int(state[0])
            ([0.9, 2.1], [1.0, 2.0], 1)
        """
        if not len(grads) and not len(trainable_variables):
            return [], list(optimizer_variables)
        if not self.built:
            raise ValueError(
                "`stateless_apply` needs a built optimizer. Call build(variables) first."
            )
        if len(optimizer_variables) != len(self._state.named):
            raise ValueError(
                "`optimizer_variables` must have one value for each of the "
                f"{len(self._state.named)} `variables` of the optimizer. Received "
                f"{len(optimizer_variables)}."
            )
        if len(trainable_variables) != len(self._state.entries):
            raise ValueError(
                "`trainable_variables` must have one value for each of the "
                f"{len(self._state.entries)} variables the optimizer was built with. Received "
                f"{len(trainable_variables)}."
            )
        backend, entries = self._state.backend, self._state.entries
        assert backend is not None

        def examined(gradients: list[Any]) -> tuple[Selection, list[Any]]:
            present, checked = self._present(backend, entries, gradients, depth=5)
            return self._selection(present), checked

        call = Stateless(
            self,
            self._is_fused,
            entries,
            self._state.named,
            examined,
            self._rate_and_step,
            self._advance,
        )
        return backend.stateless_apply(
            call, list(optimizer_variables), list(grads), list(trainable_variables)
        )

    # --- differentiation ---

    def minimize(self, loss: Any, var_list: Any, grad_loss: Any = None) -> Any:
        """Differentiate a loss and apply the gradients.

        Args:
            loss: for NumPy and JAX a callable with one argument a variable, written with
                `autograd.numpy` or `jax.numpy`, that returns a real scalar; elsewhere it may take
                no argument.
            var_list: the variables; a list, a callable that returns one, or a single variable.
            grad_loss: what the gradient of the loss itself is taken to be, of its shape; ones if
                None.

        Returns:
            As `apply_gradients`.

        Raises:
            TypeError, ValueError: as `apply_gradients`; or if the loss returns no scalar.
            ImportError: if the library's differentiation is not installed.

        Example:
            >>> import numpy as np
            >>> from omniadam import Adam
            >>> w = np.array([1.0, -2.0])
            >>> opt = Adam(learning_rate=0.1)
            >>> for _ in range(3):
            ...     calls = opt.minimize(lambda w: (w * w).sum(), [w])
            >>> calls, w.round(3).tolist()
            (3, [0.702, -1.701])
        """
        variables = _as_list(var_list() if callable(var_list) else var_list)
        gradients = self._differentiated(loss, variables, grad_loss, self.scale_loss)
        return self.apply_gradients(zip(gradients, variables, strict=True))

    def get_gradients(self, loss: Any, params: Any) -> list[Any]:
        """Gradients of a loss by the library's own differentiation, neither scaled nor clipped.

        Args:
            loss: as in `minimize`.
            params: list of variables.

        Returns:
            A list with one gradient a variable, of its shape; None where the library says that the
            loss does not depend on it.

        Raises:
            TypeError, ValueError: if the loss returns no scalar, or a variable cannot be trained.
            ImportError: if the library's differentiation is not installed.

        Example:
            >>> import numpy as np
            >>> from omniadam import Adam
            >>> Adam().get_gradients(lambda w: (w * w).sum(), [np.array([1.0, -2.0])])
            [array([ 2., -4.])]
        """
        return self._differentiated(loss, _as_list(params), None, lambda value: value)

    def _differentiated(
        self, loss: Any, variables: list[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        backend = self._state.backend if self.built else None
        if backend is None:
            # Differentiating changes nothing, but an error about the variables should come first.
            backend = self._described(variables)[0]
        return backend.differentiate(loss, variables, grad_loss, scale)

    def scale_loss(self, loss: Any) -> Any:
        """The loss as it must be differentiated for `loss_scale_factor`, which the step undoes.

        Args:
            loss: a number or tensor.

        Returns:
            The loss times `loss_scale_factor`; without one, the loss itself.

        Example:
            >>> import numpy as np
            >>> from omniadam import Adam
            >>> opt, w = Adam(learning_rate=0.1, loss_scale_factor=1024.0), np.array([1.0])
            >>> opt.scale_loss(2.0)
            2048.0
            >>> opt.apply_gradients([(np.array([2.0 * 1024]), w)])
            1
            >>> w.round(3).tolist()
            [0.9]
        """
        return loss if self.loss_scale_factor is None else loss * self.loss_scale_factor

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
        entries = [self._entry(variable) for variable in _as_list(var_list)]
        calls, backend = self._calls(), self._state.backend
        assert backend is not None
        if not backend.is_traced(calls) and calls == 0:
            raise ValueError("There is no moving average before the first step.")
        for entry in entries:
            if not entry.replaced:
                backend.overwrite(entry, calls)

    # --- state ---

    @property
    def variables(self) -> list[Any]:
        """The state: iteration, learning rate (if it is a number), averages, accumulators, slots.

        These are the variables themselves, not copies; for bare JAX arrays, which cannot be
        overwritten, the arrays that `stateless_apply` begins with.
        """
        return list(self.named_variables().values())

    @property
    def weights(self) -> list[Any]:
        """The same as `variables`."""
        return self.variables

    def named_variables(self) -> dict[str, Any]:
        """The state by name, in the order of `variables`: Keras's names.

        A slot is called `{name of the variable, / as _}_{momentum | velocity | velocity_hat |
        average | gradient_accumulator}`.
        """
        backend = self._state.backend
        return {name: v if backend is None else backend.shown(v) for name, v in self._state.named}

    def get_weights(self) -> list[Array]:
        """The state, to save it or to set it elsewhere.

        Returns:
            A list with a NumPy array, a copy, for each of `variables`.

        Raises:
            ValueError: in a function that is traced, where the state has no values yet.
        """
        if self._state.backend is not None:
            self._state.backend.check_readable()
        return list(self._state.saved().values())

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the state to values as `get_weights` returns, of this or another library.

        Args:
            weights: one array for each of `variables`, of its shape; floats where it holds floats.

        Raises:
            ValueError: if the optimizer is not built, or the number of arrays, a shape or a type
                is wrong, or a count or rate is none that there can be. Nothing has been changed
                then.
        """
        if not self.built:
            raise ValueError(
                "`set_weights` needs a built optimizer, whose state has its shapes. Call "
                "build(variables) first."
            )
        self._state.set(list(weights))

    def save_own_variables(self, store: Any) -> None:
        """Write the state in Keras's layout: `store["0"]`, `store["1"]`, ... in order.

        Args:
            store: a dict, an `h5py.Group`, or anything that takes item assignment.
        """
        for i, value in enumerate(self.get_weights()):
            store[str(i)] = value

    def load_own_variables(self, store: Any) -> None:
        """Read state that `save_own_variables` wrote, here or in Keras.

        Args:
            store: a mapping with keys "0", "1", ...

        Raises:
            ValueError: if it does not fit the optimizer. (Keras warns and goes on without.)
        """
        keys = sorted(store.keys(), key=lambda key: int(key) if key.isdecimal() else -1)
        if keys != [str(i) for i in range(len(self._state.named))]:
            hint = "" if self.built else " Call build(variables) first."
            raise ValueError(
                f"The store must have the keys '0' to '{len(self._state.named) - 1}', the state of "
                f"optimizer '{self.name}'. Received {len(keys)} keys: {keys[:8]}.{hint}"
            )
        if not self.built and len(keys) > 0:
            raise ValueError("`load_own_variables` needs a built optimizer. Call build(variables).")
        self.set_weights([store[key] for key in keys])

    def get_config(self) -> dict[str, Any]:
        """The settings; `from_config` makes the same optimizer of them, without its state.

        Returns:
            A dictionary with Keras's keys and values. It can be written as JSON unless a setting
            is a callable. What is excluded from weight decay, if anything is, stands under one
            more key, "exclude_from_weight_decay".

        Raises:
            ValueError: if variables were excluded from weight decay by `var_list` and the
                optimizer is not built, so that they have no names yet.
        """
        config = self._settings()
        if self._schedule is not None:
            config["learning_rate"] = schedules.serialize(self._schedule)
        exact = self._excluded_by_name()
        if self._excluded_names or exact:
            config["exclude_from_weight_decay"] = {
                "var_names": list(self._excluded_names),
                "variables": list(exact),
            }
        return config

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

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments as they are now: the learning rate may be a schedule."""
        rate = self._schedule or self._rate_function
        settings = {"learning_rate": rate or float(self._state.read(self._state.rate))}
        names = (*self._option_names, *self.hyperparameters)
        return settings | {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """An optimizer with the settings of `get_config()`.

        Args:
            config: a dictionary; it is not changed.
            custom_objects: classes of schedules by name, where they are the user's own.

        Returns:
            An optimizer that is not built.

        Raises:
            ValueError: if it holds a setting that the class does not have.
        """
        config = dict(config)
        excluded = config.pop("exclude_from_weight_decay", None)
        rate = config.get("learning_rate")
        if isinstance(rate, Mapping):
            config["learning_rate"] = schedules.deserialize(rate, custom_objects)
        try:
            optimizer = cls(**config)
        except TypeError as error:
            raise ValueError(f"The config does not fit {cls.__name__}: {error}") from error
        if excluded:
            optimizer.exclude_from_weight_decay(var_names=excluded["var_names"])
            optimizer._excluded_exact = tuple(excluded["variables"])
        return optimizer

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
            "_passes": None,
            "_latest": None,
            "_excluded_variables": [],
            "_excluded_exact": self._excluded_by_name(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._building = threading.RLock()
        self._forget()

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self._settings().items())
        return f"{type(self).__name__}({settings})"


# AutoGraph, which rewrites what a tf.function calls, leaves alone what has this attribute.
for _method in [each for each in vars(Optimizer).values() if isfunction(each)]:
    vars(_method)["autograph_info__"] = {}

_UPDATE = passes_of(Pass(gradient=True, updates=True)).step
# For how many sets of variables with gradients an optimizer keeps what was prepared.
_SELECTIONS = 1024


def _slot_groups(rule: Rule | None) -> list[tuple[str, ...]]:
    """Slots are created variable by variable within a group, as Keras does: all but the third
    of Adam together, since its files have all `velocity_hat`s at the end.
    """
    slots = () if rule is None else rule.slots
    return [group for group in (slots[:2], slots[2:]) if group]


def _selected(present: Sequence[Entry], entries: Sequence[Entry]) -> Selection:
    chosen = set(map(id, present))
    return Selection(
        tuple(present), tuple(e for e in entries if id(e) not in chosen and not e.replaced)
    )


def _as_list(variables: Any) -> list[Any]:
    if isinstance(variables, Mapping):
        return list(variables.values())
    if isinstance(variables, (list, tuple)):
        return list(variables)
    if backend_of(variables) is not None:
        return [variables]
    if isinstance(variables, Iterable) and not isinstance(variables, (str, bytes)):
        return list(variables)
    raise TypeError(
        f"Variables must be given as a list, or a mapping from names. Received: "
        f"{received(variables)}."
    )


def _is_schedule(value: Any) -> bool:
    """Whether it is a schedule, of ours or of Keras, which is not imported to find out."""
    return any(base.__name__ == "LearningRateSchedule" for base in type(value).__mro__)
