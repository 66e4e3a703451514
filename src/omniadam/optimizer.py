"""The surface of a Keras 3 optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt

from . import options, schedules
from .backends import Backend, introduce
from .backends.base import Entry, Selection, Stateless, received
from .engine import Engine, as_list
from .schedules import LearningRate
from .settings import as_it_is
from .state import names_of

Array = npt.NDArray[Any]
T = TypeVar("T")


class Optimizer(Engine, options.LeadsOn):
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

    @options.leads_on("keras")
    def __init__(
        self,
        learning_rate: LearningRate,
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
    ) -> None:
        introduce(Optimizer)
        options.check_overrides(
            type(self),
            Optimizer,
            self._never_called,
            "Override `apply`, which every step goes through, or `update_step`, which is the rule; "
            "a schedule or a callable is a learning rate of one's own.",
        )
        super().__init__(
            learning_rate,
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
        )

    def _build(self, backend: Backend, entries: tuple[Entry, ...]) -> None:
        introduce(Optimizer)
        super()._build(backend, entries)

    @contextmanager
    def _built_by(self, named: Mapping[str, Any]) -> Iterator[None]:
        """Around the first step of variables with names: built with these, unless it fails."""
        with ExitStack() as stack:
            with self._building:
                if not self.built:
                    stack.enter_context(self._unbuilt_on_error())
                self.build(named)
            yield

    # --- a step ---

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> int | Any:
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
        return self._counted(calls)

    def apply(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> None:
        """Update variables by a list of gradients, one a variable.

        Args:
            grads: as in `apply_gradients`. If the list is empty, nothing is done.
            trainable_variables: the variables, or a mapping from names to them as in `build`; all
                that the optimizer was built with if None.

        Raises:
            TypeError, ValueError: as `apply_gradients`; and if the lengths differ, or variables
                are left out before the optimizer was built.
        """
        grads = list(grads)
        if not grads:
            return
        if not self.built and isinstance(trainable_variables, Mapping):
            with self._built_by(trainable_variables):
                Optimizer.apply(self, grads)  # to all of them, in their order
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "`apply(grads)` without variables needs a built optimizer. Call "
                    "build(variables) first, or pass the variables."
                )
            variables = [entry.key for entry in self._state.entries]
        else:
            given = trainable_variables
            variables = list(given) if isinstance(given, list) else as_list(given)
        if len(grads) != len(variables):
            raise ValueError(
                f"There must be one gradient a variable. Received {len(grads)} gradients for "
                f"{len(variables)} variables: {names_of(self._state.entries)}."
            )
        self._apply(grads, variables)
        assert self._state.backend is not None
        self._state.backend.check_run()

    @property
    def _update(self) -> Callable[[Any, Any, Any], None] | None:
        is_fused = self.rule is not None and type(self).update_step is Optimizer.update_step
        return None if is_fused else self._update_entry

    def _update_entry(self, gradient: Any, entry: Entry, learning_rate: Any) -> None:
        self.update_step(gradient, entry.key, learning_rate)

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
        self._update_one(gradient, variable, learning_rate)

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
        trainable_variables: Sequence[T],
    ) -> tuple[list[T], list[Any]]:
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
        self._state.is_given_away, self._state.given_at = True, self._state.counted()

        def examined(gradients: list[Any]) -> tuple[Selection, list[Any]]:
            present, checked = self._present(backend, entries, gradients, depth=5)
            return self._selection(present), checked

        call = Stateless(
            self,
            self._update is None,
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

    def minimize(
        self,
        loss: Callable[..., Any],
        var_list: Any,
        grad_loss: Any = None,
    ) -> int | Any:
        """Differentiate a loss and apply the gradients.

        Args:
            loss: for NumPy and JAX a callable with one argument a variable, written with
                `autograd.numpy` or `jax.numpy`, that returns a real scalar; elsewhere it may take
                no argument.
            var_list: the variables; a list, a mapping from names to them as in `build`, a callable
                that returns one of these, or a single variable. The loss takes them in this order.
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
        variables: Any = var_list() if callable(var_list) else var_list
        variables = variables if isinstance(variables, Mapping) else as_list(variables)
        gradients = self._differentiated(loss, variables, grad_loss, self.scale_loss)
        is_named = not self.built and isinstance(variables, Mapping)
        with self._built_by(variables) if is_named else nullcontext():
            return self.apply_gradients(zip(gradients, as_list(variables), strict=True))

    def get_gradients(self, loss: Callable[..., Any], params: Any) -> list[Any]:
        """Gradients of a loss by the library's own differentiation, neither scaled nor clipped.

        Args:
            loss: as in `minimize`.
            params: the variables, as in `minimize`.

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
        return self._differentiated(loss, params() if callable(params) else params)

    def scale_loss(self, loss: T) -> T:
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
        factor = self.loss_scale_factor
        scaled: Any = loss
        return loss if factor is None else scaled * factor

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
            A list with a NumPy array, a copy, for each of `variables`. Before the build, what
            set_weights() was given, as far as it waits.

        Raises:
            ValueError: in a function that is traced, where the state has no values yet. Before the
                build, if state was loaded by name, which is in no order yet.
        """
        state = self._state
        if state.backend is not None:
            state.backend.check_readable()
        awaited = state.awaited if not self.built else None
        return [*state.saved().values(), *(awaited.values() if awaited else ())]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the state to values as `get_weights` returns, of this or another library.

        Before the build, the counters are set at once, and the slots when they are created. What
        is set in between stays set.

        Args:
            weights: one array for each of `variables`, of its shape; floats where it holds floats.

        Raises:
            ValueError: if the number of arrays, a shape or a type is wrong, or a count or rate is
                none that there can be: what can be known only when the variables come, of `build`
                or the first step. Nothing has been changed then.
        """
        if self.built:
            self._state.set(list(weights))
        else:
            self._state.await_weights(list(weights))
            self._forget_checkpoint()

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
        count = len(self._state.named) if self.built else max(len(keys), 1)
        if keys != [str(i) for i in range(count)]:
            raise ValueError(
                f"The store must have the keys '0' to '{count - 1}', the state of optimizer "
                f"'{self.name}'. Received {len(keys)} keys: {keys[:8]}."
            )
        self.set_weights([store[key] for key in keys])

    def get_config(self) -> dict[str, Any]:
        """The settings; `from_config` makes the same optimizer of them, without its state.

        Returns:
            A dictionary with Keras's keys and values. It can be written as JSON unless a setting
            is a callable. What is excluded from weight decay, if anything is, stands under one
            more key, "exclude_from_weight_decay"; and the names of the variables that were added
            by `extend`, if any were, under "extensions": what is built with all variables, in
            whichever order, then keeps its state in the same one.

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
        if extensions := self._extension_names():
            config["extensions"] = [list(names) for names in extensions]
        return config

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
        extensions = config.pop("extensions", ())
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
        optimizer._extended_names = tuple(map(tuple, extensions))
        return optimizer

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self._settings().items())
        return f"{type(self).__name__}({settings})"


as_it_is(Optimizer)
