"""Adam and AdamW as Keras optimizers: change the import, keep everything else.

Nothing is computed here. State, settings, files and the learning rate are Keras's own, by
inheritance; `apply` hands the variables and their slots, as they are, to an engine, which
makes the step in one sweep.
"""

from __future__ import annotations

import gc
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain, repeat
from operator import is_
from typing import Any, Never, Self

import numpy as np

from . import options, schedules, versions

with versions.imported(
    "keras", user="omniadam.keras", hint="Keras computes with the library that KERAS_BACKEND names."
):
    import keras

from .adam import AdamEngine
from .backends.base import Backend, Entry, Selection
from .backends.keras import KerasVariables, native, settle
from .engine import as_list, selected
from .schedules import LearningRate
from .settings import as_it_is
from .state import State, UniqueNames, host, names_of

__all__ = ["Adam", "AdamW"]

# Where a step writes to the memory of the values. (Elsewhere it makes new ones, and stores them.)
_IN_PLACE = keras.backend.backend() in ("numpy", "torch")
# What a user may override and have honoured: called around a step, or in ours too.
_HONOURED = (
    "add_optimizer_variables",
    "add_variable",
    "add_variable_from_reference",
    "apply",
    "apply_gradients",
    "build",
    "exclude_from_weight_decay",
    "finalize_variable_values",
    "from_config",
    "get_config",
    "learning_rate",
    "load_own_variables",
    "save_own_variables",
    "scale_loss",
    "set_weights",
    "stateless_apply",
    "variables",
    "_get_current_learning_rate",
)


def __dir__() -> list[str]:
    return __all__


@keras.saving.register_keras_serializable("omniadam")
class Adam(keras.optimizers.Adam):  # type: ignore[misc]
    """`keras.optimizers.Adam` with the same arguments, state and files, in one pass.

    It is a `keras.optimizers.Adam` for `isinstance`, on Keras's TensorFlow, JAX, PyTorch and NumPy
    backends. docs/keras.md says what differs.

    Args:
        learning_rate: a number >= 0, a schedule of Keras or of `omniadam.schedules`, or a callable
            without arguments.
        beta_1, beta_2, epsilon, amsgrad, weight_decay, clipnorm, clipvalue, global_clipnorm,
            use_ema, ema_momentum, ema_overwrite_frequency, loss_scale_factor,
            gradient_accumulation_steps, name: as in `keras.optimizers.Adam`, and checked as in
            `omniadam.Adam`.
        epsilon_hat: as in `omniadam.Adam`: False is the epsilon of PyTorch and optax.
        **kwargs: what Keras takes beside these, as it does: `decay`, which it warns of.

    Raises:
        ValueError: if a setting is out of its range, or more than one clip is set.

    Example:
        >>> import keras, numpy as np
        >>> import omniadam.keras
        >>> w = keras.Variable(np.array([1.0, -2.0], np.float32))
        >>> opt = omniadam.keras.Adam(learning_rate=0.1)
        >>> for _ in range(3):
        ...     opt.apply([2 * w.value], [w])
        >>> isinstance(opt, keras.optimizers.Adam), [round(float(x), 3) for x in w.value]
        (True, [0.702, -1.701])

    Sources: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980; keras/src/optimizers/adam.py.
    """

    @options.leads_on("keras")
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: float | Callable[[], float] = 0.9,
        beta_2: float | Callable[[], float] = 0.999,
        epsilon: float | Callable[[], float] = 1e-7,
        amsgrad: bool = False,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        epsilon_hat: bool = True,
        **kwargs: Never,  # so that a type checker finds misspelled names, as Keras does
    ) -> None:
        super().__init__(
            learning_rate=_rate(learning_rate),
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.epsilon_hat = options.boolean("epsilon_hat", epsilon_hat)
        # Hidden from what Keras and TensorFlow track: it has no state of its own.
        object.__setattr__(self, "_engine", _KerasEngine(self))
        self._look_for_overrides()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _HOOKS:
            self._look_for_overrides()

    def _look_for_overrides(self) -> None:
        """Note which parts of Keras's step are not ours: any of them, and Keras's step is made."""
        kind, own = type(self), vars(self)
        overridden = frozenset(
            name
            for name, ours in _HOOKS.items()
            if name in own or inspect.getattr_static(kind, name, None) is not ours
        )
        object.__setattr__(self, "_overridden", overridden)

    def _concerns(self, method: Any) -> bool:
        """Whether a method of Keras uses what is overridden."""
        code = getattr(inspect.unwrap(method), "__code__", None)
        return not self._overridden.isdisjoint(self._overridden if code is None else code.co_names)

    @contextmanager
    def _unbuilt_on_error(self) -> Iterator[None]:
        """Take a build back if it fails, or the first step does that it was for."""
        tracked = self._variables
        # TensorFlow's lists note what they hold once more, for checkpoints.
        parts = [self.__dict__, getattr(tracked, "__dict__", {})]
        before = [dict(part) for part in parts]
        values = [value for part in parts for value in part.values()]
        lists = [(value, [*value]) for value in values if isinstance(value, list)]
        tables = [(value, dict(value)) for value in values if isinstance(value, dict)]
        size = len(tracked)
        self._engine.note_count()
        with self._engine._unbuilt_on_error():
            try:
                yield
            except BaseException:
                for variable in tracked[size:]:
                    self._untrack_variable(variable)
                for part, held in zip(parts, before, strict=True):
                    part.clear()
                    part.update(held)
                for each, content in lists:
                    if len(each) != len(content) or not all(map(is_, each, content)):
                        each[:] = content
                for table, items in tables:
                    for key in table.keys() - items.keys():
                        del table[key]
                    for key in items:
                        if table[key] is not items[key]:
                            table[key] = items[key]
                raise

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the state for these variables; the first step does it otherwise.

        Args:
            var_list: list of variables. If it is empty, the optimizer is still to be built.

        Raises:
            TypeError, ValueError: if a variable cannot be trained, or shares memory with another;
                or if a setting is out of its range. The optimizer is as before then.
        """
        if self._engine.built:
            return
        variables = list(var_list)
        with self._engine._building:  # one thread builds, and others find it built
            if self.built:
                return
            with self._unbuilt_on_error():
                self._look_for_overrides()
                self._engine._reread()
                if not variables:
                    super().build(variables)
                    self.built: bool = False
                    return
                backend, entries = self._engine.described(variables)
                first, later = self._engine._in_parts(backend, entries)
                super().build([entry.key for entry in first])
                for part in later:
                    count = self._add_extension([entry.key for entry in part], -1)
                    self._engine.note_extension(backend, part, count)
                self._put_in_order(variables)
                self._engine.adopt(backend, [*first, *chain.from_iterable(later)])
                self._engine.fill(is_complete=type(self).build is Adam.build)

    def extend(self, variables: Any) -> None:
        """Add variables to a built optimizer, as after unfreezing a layer; before, build it.

        It is `omniadam.Adam.extend`: the others keep their state, and the new ones begin as those
        of a new optimizer do. Between two calls of `fit` nothing else is needed: the model is not
        compiled again, as that would not keep what an optimizer by name has learned, and its
        function of one step is made anew.

        Args:
            variables: list of variables, or a mapping whose values they are (their names are
                their paths): all that are trained now, as `model.trainable_variables`, or those
                that are new.

        Raises:
            TypeError, ValueError: as `build`; or if a new variable has the path of another; inside
                of a function that is compiled; or if a subclass overrides parts of Keras's step,
                which knows one count for all. Nothing has been changed then.

        Example:
            >>> import keras, numpy as np
            >>> import omniadam.keras
            >>> head, body = (keras.Variable([1.0], name=name) for name in ("head", "body"))
            >>> opt = omniadam.keras.Adam(learning_rate=0.1)
            >>> for _ in range(9):
            ...     opt.apply([np.ones(1, "float32")], [head])
            >>> opt.extend([body, head])
            >>> opt.apply([np.ones(1, "float32")] * 2)
            >>> [round(float(v.value[0]), 3) for v in (head, body)]
            [0.0, 0.9]
        """
        variables = as_list(variables)
        with self._engine._building:
            if not self.built:
                self.build(variables)
                return
            later = self._engine.described_later(variables)
            if not later:
                return
            since = self._engine.present_iterations()
            with self._unbuilt_on_error():
                count = self._add_extension([entry.key for entry in later], since)
                self._put_in_order(self._engine.adopt_later(later, count, variables))
        for user in _users_of(self):
            if isinstance(user, keras.Model):
                user.make_train_function(force=True)
            else:
                object.__setattr__(user, "_trainable_variables", self._trainable_variables)

    def _add_extension(self, variables: list[Any], since: int) -> Any:
        """Create the state of variables that are added, behind all other; the count of them."""
        self._check_extensible()
        names = UniqueNames(variable.name for variable in self._variables)
        count = self.add_variable(
            (), "zeros", "int", aggregation="only_first_replica", name=names.unique("extension")
        )
        count.assign(since)
        position = len(self._momentums)
        if self.use_ema:
            averages = self.add_optimizer_variables(variables, "average")
            for average, variable in zip(averages, variables, strict=True):
                if average is not None:  # what the variable would be set to before the first step
                    average.assign(_copied(variable))
            self._model_variables_moving_average.extend(averages)
        if self.gradient_accumulation_steps:
            for variable in variables:
                accumulator = self.add_variable_from_reference(variable, "gradient_accumulator")
                self._accumulated_gradients.append(accumulator)
        momentums, velocities = self.add_optimizer_variables(variables, ["momentum", "velocity"])
        self._momentums.extend(momentums)
        self._velocities.extend(velocities)
        if self.amsgrad:
            self._velocity_hats.extend(self.add_optimizer_variables(variables, "velocity_hat"))
        for i, variable in enumerate(variables, position):
            self._trainable_variables_indices[self._var_key(variable)] = i
        return count

    def _put_in_order(self, variables: list[Any]) -> None:
        """Take variables in this order in `apply` without them, and in `stateless_apply`."""
        # Not tracked, as in Keras: they are the model's.
        object.__setattr__(self, "_trainable_variables", variables)

    def _check_extensible(self) -> None:
        if self._overridden:
            raise ValueError(
                f"{type(self).__name__} overrides {sorted(self._overridden)}, so that Keras's own "
                "step is made, which counts the steps of all variables alike: none can be added. "
                "Create a new optimizer for all variables."
            )

    def _check_variables_are_known(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            if self._var_key(variable) not in self._trainable_variables_indices:
                raise ValueError(
                    f"Unknown variable: '{_path(variable)}' of shape {tuple(variable.shape)}. This "
                    f"optimizer was built with {len(self._trainable_variables)} variables: "
                    f"{names_of(self._engine._state.entries)}. Add others, as after unfreezing a "
                    "layer, by optimizer.extend(model.trainable_variables), which keeps all state."
                )

    def add_variable(
        self,
        shape: Sequence[int],
        initializer: Any = "zeros",
        dtype: Any = None,
        *arguments: Any,
        **settings: Any,
    ) -> Any:
        """Add a state variable: as in Keras, but float32 instead of float16 or bfloat16.

        Args:
            shape: tuple of integers.
            initializer: initializer, or the name of one.
            dtype: its type; Keras's `floatx` if None.
            *arguments: the others by position, as in Keras.
            **settings: the others by name.

        Returns:
            The variable.
        """
        if keras.backend.standardize_dtype(dtype) in ("float16", "bfloat16"):
            dtype = "float32"  # as the arithmetic is
        created = super().add_variable(shape, initializer, dtype, *arguments, **settings)
        self._engine.created(created)
        return created

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Add a state variable of the shape of a variable of the model, as in Keras.

        Args:
            reference_variable: one of the variables that the optimizer is built with.
            name: the state is kept under `{variable's path}_{name}`.
            initializer: initializer, or the name of one.

        Returns:
            The variable.
        """
        with self._engine.slot_of(reference_variable, name or "var"):
            return super().add_variable_from_reference(reference_variable, name, initializer)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Update variables by a list of gradients, one a variable.

        Args:
            grads: tensors of the variables' shapes, or None, or sparse. If the list is empty,
                nothing is done.
            trainable_variables: the variables; all that the optimizer was built with if None.

        Raises:
            TypeError, ValueError: if a gradient does not fit its variable, there is none at all,
                or a variable is unknown. Nothing has been updated then.
        """
        if self._overridden:
            super().apply(grads, trainable_variables)
            return
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        elif self.built:
            trainable_variables = self._trainable_variables
        else:
            raise ValueError(
                "`apply(grads)` without variables needs a built optimizer. Call "
                "build(variables) first, or pass the variables."
            )
        if self._engine.built:
            self._engine.step(grads, trainable_variables)
            return
        with ExitStack() as stack:
            with self._engine._building:
                if not self.built:
                    stack.enter_context(self._unbuilt_on_error())
                self.build(trainable_variables)
            self._engine.step(grads, trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The Adam update of one variable: nothing is clipped, decayed, averaged or counted.

        Args:
            gradient: of the variable's shape.
            variable: one of those the optimizer was built with.
            learning_rate: a number.
        """
        if self._concerns(keras.optimizers.Adam.update_step):
            if not self.epsilon_hat:
                raise ValueError(
                    f"{type(self).__name__} overrides what Keras's `update_step` calls, which is "
                    "then called, and knows no `epsilon_hat=False`. Leave that out, or override "
                    "`update_step` itself."
                )
            super().update_step(gradient, variable, learning_rate)
        else:
            self._engine.update_one(gradient, variable, native(learning_rate))

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """A step as a function: nothing that is passed in changes, nor does the optimizer.

        A step of no variables returns what it is given.

        Args:
            optimizer_variables: values for `variables`, in that order.
            grads: one gradient a variable.
            trainable_variables: values for the variables the optimizer was built with.

        Returns:
            The new `(trainable_variables, optimizer_variables)`.

        Raises:
            ValueError: if the optimizer is not built, or a list has the wrong length; and always
                on TensorFlow, as in Keras.
        """
        if not len(grads) and not len(trainable_variables):
            return [], list(map(native, optimizer_variables))
        if _IN_PLACE:
            optimizer_variables = list(map(_copied, optimizer_variables))
            trainable_variables = list(map(_copied, trainable_variables))
        if self.built and len(trainable_variables) != len(self._trainable_variables):
            raise ValueError(
                "`trainable_variables` must have one value for each of the "
                f"{len(self._trainable_variables)} variables the optimizer was built with: "
                f"{names_of(self._engine._state.entries)}. Received {len(trainable_variables)}. "
                "Add others, as after unfreezing a layer, by "
                "optimizer.extend(model.trainable_variables), which keeps all state."
            )
        new: tuple[list[Any], list[Any]]
        self._engine.note_given_away()
        with self._engine.stateless():
            new = super().stateless_apply(optimizer_variables, grads, trainable_variables)
        return new

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Overwrite variables by their moving averages, at the end of training.

        Args:
            var_list: variables that the optimizer was built with. Without `use_ema` nothing is
                done.

        Raises:
            ValueError: if a variable is unknown, or no step has been made.
        """
        if self._concerns(keras.optimizers.Adam.finalize_variable_values):
            super().finalize_variable_values(var_list)
        elif self.use_ema:
            self._engine.finalize_variable_values(list(var_list))

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from weight decay; must be called before the optimizer is built.

        Args:
            var_list: variables to exclude.
            var_names: strings; a variable is excluded if any of them, as a regular expression,
                is found in its path.

        Raises:
            ValueError: if the optimizer is built, or a string is no regular expression.
        """
        self._engine.exclude_from_weight_decay(var_list, var_names)

    def _use_weight_decay(self, variable: Any) -> bool:
        return bool(self._engine._entry(variable).decayed)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the state to values of `variables`.

        Before the build, the counters are set at once, and the slots when they are created. What
        is set in between stays set.

        Args:
            weights: one array for each of `variables`, of its shape; floats where it holds floats.

        Raises:
            ValueError: if the number of arrays, a shape or a type is wrong: what can be known only
                when the variables come, of `build` or the first step. Nothing has been changed
                then.
        """
        self._engine.set_weights(list(weights))

    def save_own_variables(self, store: Any) -> None:
        """Write the state as Keras does, and before the build what waits for it.

        Args:
            store: takes item assignment: `store["0"]`, `store["1"]`, ...

        Raises:
            ValueError: before the build, if state was loaded by name, which is in no order yet.
        """
        values = self._engine.waiting()
        super().save_own_variables(store)
        for i, value in enumerate(values, len(self._variables)):
            store[str(i)] = value

    def load_own_variables(self, store: Any) -> None:
        """Read the state as Keras does; before the build as `set_weights`.

        Args:
            store: a mapping with keys "0", "1", ...

        Raises:
            ValueError: as `set_weights`, before the build. (After it, Keras warns of state of
                another length, and goes on without.)
        """
        keys = list(map(str, range(len(store.keys()))))
        if self._engine.built or set(keys) != set(store.keys()) or len(keys) < len(self.variables):
            super().load_own_variables(store)
        else:
            self._engine.set_weights([store[key] for key in keys])

    def __reduce__(self) -> Any:
        """As Keras has it, and with what was loaded and waits for the build."""
        state = self._engine._state
        awaited, state.awaited = state.awaited, None
        try:
            reduced = super().__reduce__()
        finally:
            state.awaited = awaited
        return reduced if awaited is None else (_waiting, (*reduced, awaited))

    def get_config(self) -> dict[str, Any]:
        """The settings, as in Keras, and what is excluded from weight decay, if anything is, and
        which variables were added by `extend`, if any were.

        `epsilon_hat` is among them where it is False, which Keras does not know.

        Returns:
            A dictionary; `from_config` makes the same optimizer of it, without its state.
        """
        config: dict[str, Any] = super().get_config()
        if not self.epsilon_hat:
            config["epsilon_hat"] = False
        config.update(self._engine.exclusion())
        if extensions := self._engine._extension_names():
            config["extensions"] = [list(names) for names in extensions]
        return config

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """An optimizer with the settings of `get_config()`, of this class or of Keras's.

        Args:
            config: a dictionary; it is not changed.
            custom_objects: classes by name, where they are the user's own.

        Returns:
            An optimizer that is not built.
        """
        config = dict(config)
        excluded = config.pop("exclude_from_weight_decay", None)
        extensions = config.pop("extensions", ())
        optimizer: Self = super().from_config(config, custom_objects)
        optimizer._engine._extended_names = tuple(map(tuple, extensions))
        if excluded:
            optimizer._engine.exclude(excluded)
        return optimizer


@keras.saving.register_keras_serializable("omniadam")
class AdamW(Adam, keras.optimizers.AdamW):  # type: ignore[misc]
    """`keras.optimizers.AdamW`: `Adam` with `weight_decay=0.004` if not given.

    The arguments and their order are those of `keras.optimizers.AdamW`, in which `weight_decay`
    comes second.

    Example:
        >>> import keras, numpy as np
        >>> import omniadam.keras
        >>> w = keras.Variable(np.ones(1, np.float32))
        >>> opt = omniadam.keras.AdamW(0.1, 0.5)
        >>> opt.apply([np.zeros(1, np.float32)], [w])
        >>> round(float(w.value[0]), 6)
        0.95

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    @options.leads_on("keras")
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        weight_decay: float = 0.004,
        beta_1: float | Callable[[], float] = 0.9,
        beta_2: float | Callable[[], float] = 0.999,
        epsilon: float | Callable[[], float] = 1e-7,
        amsgrad: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        epsilon_hat: bool = True,
        **kwargs: Never,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            epsilon_hat=epsilon_hat,
            **kwargs,
        )


# By name, what Keras's optimizer is made of and may be overridden, as it is here.
_HOOKS = {
    name: inspect.getattr_static(Adam, name)
    for kind in keras.optimizers.Adam.__mro__
    for name, value in vars(kind).items()
    if kind.__module__.startswith("keras.")
    and not name.startswith("__")
    and name not in _HONOURED
    and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
}


def _waiting(make: Any, arguments: Any, awaited: Any) -> Adam:
    """An optimizer from a pickle or a copy, with what waits for its build."""
    optimizer: Adam = make(*arguments)
    optimizer._engine.wait_with(awaited)
    return optimizer


class _OfThread(threading.local):
    # Whether it makes a step on values that are others than the variables'.
    is_stateless = False
    # The variable that a slot is being created for, and what the slot is.
    reference: tuple[Any, str] | None = None


class Seen:
    """What has a state, as far as those ask that save and load it."""

    def __init__(self, state: State) -> None:
        self._state = state


class _KerasEngine(AdamEngine):
    """Adam with the settings and on the state of a Keras optimizer."""

    # What is read from the Keras optimizer at each step: there it is a plain attribute.
    _read_names = (
        *(name for name in AdamEngine._option_names if name != "name"),
        "epsilon_hat",
    )

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._here = _OfThread()
        # By identity, variables of Keras's that are slots: with what for, and what they are.
        self._slots: dict[int, tuple[Any, Any, str]] = {}
        self._restored: Any = None  # the checkpoint before what waits for the build
        # The value of the count when `stateless_apply` last returned what comes after it, which is
        # another as soon as that is put in.
        self._given_away: Any = None
        self._seen: list[Any] = [getattr(owner, name) for name in self._read_names]
        super().__init__(
            lambda: native(owner.learning_rate),
            **dict(zip(self._read_names, self._seen, strict=True)),
        )

    def _reread(self) -> None:
        now = list(map(getattr, repeat(self._owner), self._read_names))
        if not all(map(is_, now, self._seen)):
            changed = [
                i for i, (a, b) in enumerate(zip(now, self._seen, strict=True)) if a is not b
            ]
            # One clip may take another's place: what is None now goes first.
            for i in sorted(changed, key=lambda i: now[i] is not None):
                setattr(self, self._read_names[i], now[i])
                self._seen[i] = now[i]

    # --- building ---

    def described(self, variables: list[Any]) -> tuple[Any, list[Entry]]:
        """Entries for variables that may be built on; nothing is changed yet."""
        backend = KerasVariables.over(variables)
        entries = [backend.describe(variable, _path(variable)) for variable in variables]
        backend.check_distinct(entries)
        self._decide_decay_among(entries, entries)
        return backend, entries

    def _decide_decay_among(self, entries: Sequence[Entry], every: Sequence[Entry]) -> None:
        excluded = set(map(id, self._excluded_variables))
        paths = [entry.name for entry in every]
        exact = {_found(path, paths) for path in self._excluded_exact}
        for entry in entries:
            entry.decayed = not (
                id(entry.key) in excluded
                or entry.name in exact
                or any(re.search(pattern, entry.name) for pattern in self._excluded_names)
            )

    def described_later(self, variables: list[Any]) -> list[Entry]:
        """Entries for those that are new and may be added; nothing is changed yet."""
        entries, backend = self._state.entries, self._state.backend
        assert backend is not None
        known = {id(entry.key) for entry in entries}
        new = [variable for variable in variables if id(variable) not in known]
        if not new:
            return []
        self._owner._check_extensible()
        backend.check_untraced("`extend` with new variables")
        self._library_of([entries[0].key, *new], None)
        taken, paths = {entry.name for entry in entries}, list(map(_path, new))
        for path in paths:
            if path in taken:
                raise ValueError(
                    f"A variable that is added must have a path of its own. Received '{path}', "
                    "which is the path of another variable of this optimizer. Give its layer "
                    "another name; or create a new optimizer, if it takes the place of that."
                )
        later = list(self._entries_of(backend, new, paths, is_named=False))
        if _IN_PLACE:
            self._locate(entries)
        backend.check_distinct((*entries, *later))
        self._decide_decay_among(later, (*entries, *later))
        return later

    def present_iterations(self) -> int:
        """The `iterations`; -1 if the user may have a state in hand that is ahead."""
        count = self._count()
        if count is None:
            raise ValueError(
                "`extend` must be called between two calls of `fit`: during one, Keras's trainer "
                "on JAX has the state of the optimizer in hand."
            )
        calls = 0 if count is self._given_away else int(keras.ops.convert_to_numpy(count))
        return calls // (self._owner.gradient_accumulation_steps or 1) if calls else -1

    def note_given_away(self) -> None:
        """Note that somebody is told the state that comes after this one."""
        self._given_away = self._count()

    def is_given_away(self) -> bool:
        """Whether the state that comes after this one is its user's, or Keras's trainer's."""
        count = self._count()
        return count is None or count is self._given_away

    def _count(self) -> Any:
        """The value of the count; None while Keras's trainer has it, and will put it back."""
        try:
            return native(self._owner._iterations)
        except TypeError:
            return None

    def note_extension(self, backend: Any, part: Sequence[Entry], count: Any) -> None:
        """Note with which count entries were added."""
        since = self._held(backend, count)
        for entry in part:
            entry.since = since
        self._state.extensions = (*self._state.extensions, tuple(part))

    def adopt_later(self, later: Sequence[Entry], count: Any, variables: list[Any]) -> list[Any]:
        """Take over the state of those that were added.

        Returns:
            All variables in the order that the user lists them; if some are missing there, new ones
            come last.
        """
        self.note_extension(self._state.backend, later, count)
        self._forget()
        self.adopt(self._state.backend, (*self._state.entries, *later))
        every = [*self._owner._trainable_variables, *(entry.key for entry in later)]
        given = {id(variable): variable for variable in variables}
        return list(given.values()) if given.keys() >= set(map(id, every)) else every

    @staticmethod
    def _held(backend: Any, variable: Any) -> Any:
        """A counter as the backend takes it."""
        return variable if backend.holder is None else backend.holder(variable)

    def _in_parts(
        self, backend: Backend, entries: Sequence[Entry]
    ) -> tuple[list[Entry], list[list[Entry]]]:
        # A model that is loaded may have shorter paths. Layers that were frozen again are not
        # trained: Keras says then that the state in the file is for others.
        paths = [entry.name for entry in entries]
        now = [[_sought(path, paths) for path in part] for part in self._extended_names]
        self._extended_names = tuple(tuple(path for path in part if path) for part in now)
        parts = super()._in_parts(backend, entries)
        self._extended_names = ()
        return parts

    def adopt(self, backend: Any, entries: Sequence[Entry]) -> None:
        """Take over the state that Keras has created for these variables."""
        state = self._state
        state.backend, state.entries = backend, tuple(entries)
        for variable in self._owner._variables:
            settle(variable)
        state.iteration = self._held(backend, self._owner._iterations)
        self._locate(state.entries)
        if backend.holder is not None:
            backend.prefer_kernels([entry.variable for entry in state.entries])
        self.built = True

    # --- state as a whole ---

    def seen(self) -> Seen:
        """The state, which Keras keeps, as an engine would."""
        owner, held, seen = self._owner, self._state, Seen(State())
        state, backend = seen._state, held.backend
        state.backend = backend
        unique = UniqueNames().unique
        entries = [replace(entry, name=unique(entry.name)) for entry in held.entries]
        state.hold(entries)
        mine = {id(old): new for old, new in zip(held.entries, entries, strict=True)}
        state.extensions = tuple(tuple(mine[id(e)] for e in part) for part in held.extensions)
        # Which variable of Keras's is the count of an extension.
        counts = {id(getattr(p[0].since, "owner", p[0].since)): p for p in state.extensions}
        names = {id(entry.key): entry.name for entry in entries}
        # On NumPy a variable has another array after each assignment.
        is_kept = keras.backend.backend() != "numpy"
        taken = backend._taken if is_kept and isinstance(backend, KerasVariables) else _itself
        rate = vars(owner).get("_learning_rate")
        state.named = []
        unique = UniqueNames(("iteration", "learning_rate")).unique
        for variable in owner._variables:
            name, value = variable.name, taken(variable)
            if variable is owner._iterations:
                name, state.iteration = "iteration", value
            elif variable is rate:
                name, state.rate = "learning_rate", value
            else:
                name = unique(name)
                for entry in counts.get(id(variable), ()):
                    entry.since = value
                _, reference, word = self._slots.get(id(variable), (None, None, ""))
                if id(reference) in names:
                    state.slots[name] = names[id(reference)], word
            state.named.append((name, value))
        return seen

    def note_count(self) -> None:
        """Know the count before the build, which may have been loaded."""
        if not self.built:
            with suppress(TypeError):  # it has no value in a function that is traced
                self._state.iteration = np.asarray(host(self._owner._iterations))

    @contextmanager
    def slot_of(self, reference: Any, word: str) -> Iterator[None]:
        """In which a variable that is created is a slot of another."""
        self._here.reference = reference, word
        try:
            yield
        finally:
            self._here.reference = None

    def created(self, variable: Any) -> None:
        """Note a state variable, and set it to what waits for it."""
        reference = self._here.reference
        if reference is not None:
            self._slots[id(variable)] = variable, *reference
        awaited = self._state.awaited
        if awaited is not None and self._state.is_filled:
            seen = self.seen()._state
            name, value = seen.named[-1]
            awaited.tracked(seen, name, value)

    def fill(self, *, is_complete: bool) -> None:
        """Set the slots to what waits for them, or raise ValueError."""
        state = self._state
        if self._restored != self._checkpoint():
            state.awaited = None  # a checkpoint that was restored later has brought all
        if state.awaited is not None:
            state.awaited = state.awaited.fill(self.seen(), is_complete=is_complete)
            state.is_filled = True

    def waiting(self) -> list[Any]:
        """What waits for the build, as arrays in their order."""
        awaited = None if self.built else self._state.awaited
        return [] if awaited is None else awaited.values()

    def set_weights(self, weights: list[Any]) -> None:
        """Set the state, now or when it is built; or raise ValueError."""
        seen = self.seen()._state
        if self.built:
            seen.set(weights)
        else:
            seen.await_weights(weights)
            self.wait_with(seen.awaited)

    def wait_with(self, awaited: Any) -> None:
        """Have slots set once they exist."""
        self._state.awaited, self._restored = awaited, self._checkpoint()

    def _checkpoint(self) -> Any:
        """Which checkpoint of TensorFlow was restored last."""
        return getattr(self._owner, "_self_update_uid", None)

    def _locate(self, entries: Sequence[Entry]) -> None:
        """Note where the values of variables and slots are."""
        owner, backend = self._owner, self._state.backend
        assert isinstance(backend, KerasVariables)
        slots = [owner._momentums, owner._velocities]
        if owner.amsgrad:
            slots.append(owner._velocity_hats)
        for i, entry in enumerate(entries):
            entry.variable = backend._taken(entry.key)
            if not entry.replaced:
                entry.slots = tuple(backend._taken(each[i]) for each in slots)
                if owner.use_ema:
                    entry.average = backend._taken(owner._model_variables_moving_average[i])
            if owner.gradient_accumulation_steps:
                entry.accumulator = backend._taken(owner._accumulated_gradients[i])

    def _get_variable_index(self, variable: Any) -> int:
        self._owner._check_variables_are_known([variable])
        index: int = self._owner._get_variable_index(variable)
        return index

    # --- a step ---

    def step(self, grads: list[Any], variables: list[Any]) -> None:
        """A step of the Keras optimizer."""
        if len(grads) != len(variables):
            raise ValueError(
                f"There must be one gradient a variable. Received {len(grads)} gradients for "
                f"{len(variables)} variables."
            )
        self._reread()
        self._apply(grads, variables)
        assert self._state.backend is not None
        self._state.backend.check_run()

    def _examined(self, grads: list[Any], variables: list[Any]) -> tuple[Selection, Any]:
        backend = self._state.backend
        assert backend is not None
        entries = [self._entry(variable) for variable in variables]
        if len(set(map(id, entries))) != len(entries):
            raise ValueError("A variable is given twice in one step.")
        if self._state.awaited is not None:
            self._state.awaited = self._state.awaited.check_all_set()
        if _IN_PLACE and self._here.is_stateless:
            return self._examined_by_itself(grads, variables)
        if _IN_PLACE:
            self._relocate(self._state.entries)
        present, gradients = self._present(backend, entries, grads, depth=6)
        selection = self._selection(present)
        is_replaced = any(entry.replaced for entry in present)
        # On NumPy assigning to a Keras variable gives it another array, and to a slot as well.
        self._recent = None if is_replaced or keras.backend.backend() == "numpy" else selection
        if is_replaced:
            others, gradients = self._replace(present, gradients)
            selection = self._selection(others)
        return selection, backend.gather(selection, gradients)

    def _examined_by_itself(self, grads: list[Any], variables: list[Any]) -> tuple[Selection, Any]:
        """The same with entries of this call's own: those of others are elsewhere meanwhile."""
        backend = self._state.backend
        assert backend is not None
        own = [replace(entry) for entry in self._state.entries]
        self._relocate(own)
        entries = [own[self._get_variable_index(variable)] for variable in variables]
        present, gradients = self._present(backend, entries, grads, depth=7)
        others, gradients = self._replace(present, gradients)
        selection = selected(others, own)
        return selection, backend.gather(selection, gradients)

    @contextmanager
    def stateless(self) -> Iterator[None]:
        """Around a step of this thread on values that a StatelessScope gives."""
        here = self._here
        outer, here.is_stateless = here.is_stateless, True
        try:
            yield
        finally:
            here.is_stateless = outer

    def _relocate(self, entries: Sequence[Entry]) -> None:
        """Find values where they are now: assigned anew on NumPy, or given by a StatelessScope."""
        assert self._state.backend is not None
        self._locate(entries)
        self._state.backend.check_built(entries)

    def update_one(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Keras's `update_step`."""
        self._entry(variable)
        self._reread()
        if _IN_PLACE:
            self._relocate(self._state.entries)
        self._update_one(gradient, variable, learning_rate)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """As in `Engine`."""
        if not var_list:
            return
        if _IN_PLACE and self.built:
            self._relocate(self._state.entries)
        super().finalize_variable_values(var_list)
        if getattr(self._state.backend, "holder", None) is not None:
            # An array that were a variable's and its average's could not be donated for both.
            for variable in var_list:
                variable.assign(keras.ops.copy(variable))

    # --- weight decay ---

    def exclude(self, excluded: Mapping[str, Sequence[str]]) -> None:
        """Exclude what `exclusion` returned."""
        self.exclude_from_weight_decay(var_names=excluded["var_names"])
        self._excluded_exact = tuple(excluded["variables"])

    def exclusion(self) -> dict[str, Any]:
        """What is excluded from weight decay, as part of a config."""
        exact = [*self._excluded_exact, *map(_path, self._excluded_variables)]
        if not exact and not self._excluded_names:
            return {}
        names = list(self._excluded_names)
        return {"exclude_from_weight_decay": {"var_names": names, "variables": exact}}


def _path(variable: Any) -> str:
    return str(getattr(variable, "path", None) or variable.name)


def _sought(path: str, paths: Sequence[str]) -> str | None:
    """The path now of a variable that had this one: in a model that is loaded it is shorter."""

    def is_tail(short: str, long: str) -> bool:
        return f"/{long}".endswith(f"/{short}")

    tails = [each for each in paths if is_tail(each, path)]
    if tails:
        return max(tails, key=len)
    longer = {each for each in paths if is_tail(path, each)}
    return longer.pop() if len(longer) == 1 else None


def _found(path: str, paths: Sequence[str]) -> str:
    """The same of a variable that must be there."""
    found = _sought(path, paths)
    if found is None:
        raise ValueError(
            f"Variable '{path}' was excluded from weight decay, and it cannot be told which it is "
            f"among {list(paths)}. Exclude it by exclude_from_weight_decay() again."
        )
    return found


def _users_of(optimizer: Any) -> list[Any]:
    """What knows the variables that an optimizer had: the models that are compiled with it and have
    a function that makes a step, and each LossScaleOptimizer around it.

    Keras does not tell an optimizer of them. On TensorFlow such a function is one of the variables
    that were trained when it was first called.
    """
    kinds = keras.Model, keras.optimizers.LossScaleOptimizer
    every = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    wrappers = [each for each in every if vars(each).get("inner_optimizer") is optimizer]
    owners = {id(optimizer), *map(id, wrappers)}
    models = [each for each in every if id(vars(each).get("optimizer")) in owners]
    return wrappers + [each for each in models if vars(each).get("train_function") is not None]


def _itself(variable: Any) -> Any:
    return variable


def _copied(value: Any) -> Any:
    copy = keras.ops.copy(native(value))
    return copy.detach() if hasattr(copy, "detach") else copy  # of a tensor that records gradients


def _rate(value: Any) -> Any:
    """A learning rate in a form that Keras takes."""
    if isinstance(value, schedules.LearningRateSchedule):
        kind: Any = getattr(keras.optimizers.schedules, type(value).__name__, None)
        if kind is None:
            raise TypeError(
                "A schedule of your own must be a keras.optimizers.schedules.LearningRateSchedule, "
                f"which Keras can save. Received: {value!r}."
            )
        return kind.from_config(value.get_config())
    return value if callable(value) else options.rate("learning_rate", value)


as_it_is(Adam)
as_it_is(_KerasEngine)
