"""What both older generations are made of: an engine under their names, in their orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, SupportsFloat, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import options
from ..backends import backend_of, of_tensorflow
from ..backends.base import Backend, received
from ..engine import refuse_variables
from ..schedules import is_schedule
from ..settings import as_it_is
from ..state import Awaited, State, host, initial, names_of
from .engine import CHECKS, OlderEngine

Array = npt.NDArray[Any]
Pairs = list[tuple[Any, Any]]
# What a hyperparameter may be: a number, a tensor, or a callable without arguments.
Number: TypeAlias = float | SupportsFloat | Callable[[], SupportsFloat]


class Hyperparameter:
    """An attribute of an older optimizer: a number, a schedule, a callable, or a tensor.

    Args:
        name: what the engine calls it.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else instance._get_hyper(self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        instance._set_hyper(self._name, value)


class Clip:
    """A threshold of clipping as an attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else instance._clips[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance._set_clips({**instance._clips, self._name: value})


class TensorValue:
    """A tensor as a callable: read at each step, when it may have changed."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __call__(self) -> Any:
        """The tensor, to compute with."""
        if hasattr(self.tensor, "read_value"):  # of tf.Variables, for a graph to read each time
            return self.tensor.read_value()
        backend = backend_of(self.tensor)
        assert backend is not None
        return backend.over([self.tensor]).array(self.tensor)


class Older(options.LeadsOn):
    """An optimizer of an older generation."""

    # What the moments are called, in the order of the engine's slots.
    _slot_names: ClassVar[tuple[str, ...]] = ("m", "v", "vhat")

    beta_1 = Hyperparameter("beta_1")
    beta_2 = Hyperparameter("beta_2")
    epsilon = Hyperparameter("epsilon")
    decay = Hyperparameter("decay")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Of a class that TensorFlow tracks, where that is imported."""
        tensorflow = _tensorflow()
        kind: type[Self] = cls if tensorflow is None else tensorflow.tracked(cls)
        return object.__new__(kind)

    def __init__(self, engine: OlderEngine, hyper: dict[str, Any], clips: dict[str, Any]) -> None:
        self._engine = engine
        # Where TensorFlow is imported, and until a variable of another library is seen.
        self._scalars: Any = None
        # What a checkpoint restores into slots once they exist.
        self._deferred: dict[tuple[str, int], list[Any]] = {}
        self._hyper: dict[str, Any] = {}
        self._clips: dict[str, Any] = {}
        self._counts = False  # whether there is a count of iterations among the weights
        self._count_is_given = False
        # Slots in the order they were created: a name, and the position of the variable.
        self._created: list[tuple[str, int]] = []
        # How many variables are in the order of steps; a checkpoint brings others in its own.
        self._in_order = 0
        self._extra: dict[tuple[str, int], Any] = {}
        for name, value in hyper.items():
            self._set_hyper(name, value)
        self._set_clips(clips)
        if (tensorflow := _tensorflow()) is not None:
            self._scalars = tensorflow.ScalarVariables(self)

    # --- settings ---

    def _get_hyper(self, name: str) -> Any:
        value = self._hyper[name]
        if is_schedule(value):
            return value
        if callable(value):
            return value()
        if self._scalars is None or name == "epsilon" or not isinstance(value, float):
            return value
        return self._scalars.number(name)

    def _set_hyper(self, name: str, value: Any) -> None:
        if name == "learning_rate":
            refuse_variables(value, type(self).__name__)
        if name in self._hyper and _is_traced(value):
            self._set_hyper_in_function(name, value)
            return
        if callable(value) or _is_tensor(value):
            self._hyper[name] = value
            self._feed_engine(name)
            return
        check = options.rate if name == "learning_rate" else CHECKS[name]
        number = check(name, value)
        was_number = isinstance(self._hyper.get(name), float)
        if was_number and name in getattr(self, "_deferred_dependencies", ()):
            self._get_hyper(name)  # what a checkpoint has for it comes first, and not at the build
        has_variable = self._is_variable(name)
        if has_variable:
            self._scalars.set(name, number)
        self._hyper[name] = number
        if not (has_variable and was_number):
            self._feed_engine(name)

    def _set_hyper_in_function(self, name: str, value: Any) -> None:
        if not self._is_variable(name) or not isinstance(self._hyper[name], float):
            raise ValueError(
                f"`{name}` cannot be set to {received(value)} of a function that is traced, which "
                "the optimizer would outlive. Give it a callable, or a variable, and assign to "
                "that."
            )
        self._scalars.set(name, value)

    def _feed(self, name: str) -> Any:
        """A hyperparameter as the engine takes it."""
        value = self._hyper[name]
        if self._is_variable(name) and isinstance(value, float):
            return self._scalars.reader(name)
        return TensorValue(value) if _is_tensor(value) else value

    def _is_variable(self, name: str) -> bool:
        return self._scalars is not None and name in self._scalars

    def _feed_engine(self, name: str) -> None:
        engine, given = self._engine, self._feed(name)
        if name == "learning_rate" and engine._schedule is not None:
            engine._set_learning_rate(given)  # a number may take the place of a schedule here
        else:
            setattr(engine, name, given)

    def _number(self, name: str) -> float:
        """A hyperparameter as it is in a config: what a callable returns, or a tensor holds."""
        value = self._hyper[name]
        if self._is_variable(name) and isinstance(value, float):
            value = self._scalars.value(name)
        value = value() if callable(value) else value
        number = options.as_float(host(value) if _is_tensor(value) else value)
        if number is None:
            raise ValueError(f"`{name}` is no number that a config can hold. Received: {value!r}")
        return number

    def _clipping(self, clips: Mapping[str, Any]) -> Mapping[str, Any]:
        """The engine's thresholds for one's own."""
        raise NotImplementedError

    def _set_clips(self, clips: dict[str, Any]) -> None:
        checked = {name: options.limit(name, value) for name, value in clips.items()}
        options.check_clips(checked, self._engine._exclusive_clips)
        for name in options.CLIPS:
            setattr(self._engine, name, None)
        for name, value in self._clipping(checked).items():
            setattr(self._engine, name, value)
        self._clips = checked

    # --- state ---

    def _iterations(self) -> Any:
        self._counts = True
        if self._scalars is not None and self._engine._state.backend is None:
            self._scalars.count()
        return self._shown(self._engine._state.iteration)

    def _shown(self, variable: Any) -> Any:
        """A state variable as the user is given it."""
        backend = self._engine._state.backend
        return variable if backend is None else backend.shown(variable)

    def _set_iterations(self, variable: Any) -> None:
        if self._counts or self._engine.built:
            raise RuntimeError(
                "`iterations` cannot be set to another variable once the optimizer has weights. "
                f"Received: {received(variable)}. Set it before, or assign to its value."
            )
        dtype = str(getattr(variable, "dtype", type(variable).__name__))
        if not _is_tensor(variable) or "int" not in dtype or tuple(variable.shape) != ():
            raise TypeError(
                "`iterations` must be a variable of shape () that holds an integer. Received: "
                f"{received(variable)}."
            )
        tensorflow = _tensorflow()
        if tensorflow is None or not tensorflow.in_graph():
            options.count("iterations", host(variable))
        self._engine.count_in(variable)
        self._counts = self._count_is_given = True

    @property
    def weights(self) -> list[Any]:
        """The state variables: the count of iterations, then slots in the order of creation."""
        return [self._shown(variable) for variable in self._held()]

    def _held(self) -> list[Any]:
        """The same, as the engine holds them."""
        if not self._counts:
            return []
        self._iterations()
        return [self._engine._state.iteration, *(self._slot(name, i) for name, i in self._created)]

    def _slot(self, name: str, i: int) -> Any:
        if (name, i) in self._extra:
            return self._extra[name, i]
        slots = (
            self._engine._state.entries[i].slots if self._engine.built else self._engine.slots()[i]
        )
        return slots[self._slot_names.index(name)]

    def _create_slots(self, variables: Sequence[Any]) -> None:
        """Name the slots of variables that the engine has created: all m, all v, all vhat."""
        self._counts = True
        engine = self._engine
        if self._in_order < len(engine._state.entries):
            self._put_in_order(variables)
        names = self._slot_names[: len(engine._state.entries[0].slots)]
        if len(self._created) - len(self._extra) == len(names) * len(engine._state.entries):
            return  # as at every step but the first
        known, positions = set(self._created), [engine._state.index.get(id(v)) for v in variables]
        for name in names:
            self._created += [
                (name, i) for i in positions if i is not None and (name, i) not in known
            ]

    def get_weights(self) -> list[Array]:
        """Returns the current value of the weights of the optimizer.

        Returns:
            A list of NumPy arrays: the count of iterations, and the slots in the order of creation.
            Before the first step, what set_weights() was given.

        Raises:
            ValueError: if a checkpoint or a file has brought slots, and no step has told their
                order yet.
        """
        self._check_order()
        state = self._engine._state
        backend = state.backend
        if backend is not None:
            backend.check_readable()
        read = host if backend is None else backend.numpy
        awaited = None if self._engine.built else state.awaited
        return [
            *(np.array(read(variable)) for variable in self._held()),
            *(awaited.values() if awaited else ()),
        ]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the weights of the optimizer, from NumPy arrays.

        Args:
            weights: a list of arrays as `get_weights` returns. Their number and shapes must match
                those of the optimizer's weights. Before the first step, the count is set at once,
                and the slots when they are created.

        Raises:
            TypeError: if it is no list.
            ValueError: if their number, a shape or a type is wrong: of the first step, if it could
                not be known before. Nothing has been changed then.
        """
        self._check_order()
        variables, weights, engine = self._held(), _listed(weights), self._engine
        is_new = not engine.built and not self._created
        if len(weights) != len(variables) and not (is_new and weights):
            raise ValueError(
                f"`set_weights` needs {len(variables)} arrays, one for each of this optimizer's "
                f"weights. Received {len(weights)}."
            )
        if not weights:
            return
        count = options.count("iterations` of the weights, `weights[0]", host(weights[0]))
        if is_new:
            arrays = list(engine._state.real(weights[1:], 1))
            self._set_count(count)
            engine._state.awaited = WeightsInColumns(arrays) if arrays else None
            return
        if engine._state.backend is None:
            slots = [host(value) for value in weights[1:]]
            for i, (value, variable) in enumerate(zip(slots, variables[1:], strict=True), 1):
                if value.shape != tuple(variable.shape) or value.dtype.kind not in "fiu":
                    raise ValueError(
                        f"Number {i} of the weights must be real, of shape {variable.shape}. "
                        f"Received shape {value.shape} and dtype {value.dtype}."
                    )
            values: list[Any] = [count, *slots]
            for variable, new in zip(variables, values, strict=True):
                backend = backend_of(variable)
                assert backend is not None
                backend.over([variable]).assign(variable, new)
            return
        given = {id(v): value for v, value in zip(variables, weights, strict=True)}
        read = engine._state.backend.numpy
        engine._state.set(
            [given[id(v)] if id(v) in given else read(v) for _, v in engine._state.named]
        )

    def _forget_slots(self) -> None:
        """Drop what a pickle or a copy has, of an optimizer that is not built."""
        self._engine._state.restored = None
        self._created, self._in_order, self._extra = [], 0, {}
        self._deferred = {}

    def _set_count(self, count: int) -> None:
        self._iterations()
        state = self._engine._state
        state.assign(state.iteration, count)

    def _build(self, variables: list[Any]) -> None:
        """Create what a step of these variables needs."""
        self._prepare(variables)
        self._engine.include(variables)
        self._create_slots(variables)

    def _add_slot(self, variable: Any, name: str, initializer: Any) -> Any:
        engine = self._engine
        self._prepare([variable])
        engine.include([variable])
        i = engine._get_variable_index(variable)
        if (name, i) not in self._created:
            entry = engine._state.entries[i]
            is_moment = name in self._slot_names[: len(entry.slots)]
            if not is_moment or initializer != "zeros":
                slot = engine.add_variable_from_reference(variable, name, initializer)
                if is_moment:
                    engine.put_slot(entry, self._slot_names.index(name), slot)
                else:
                    self._extra[name, i] = slot
            self._counts = True
            self._created.append((name, i))
        return self._shown(self._slot(name, i))

    def _put_in_order(self, variables: Sequence[Any]) -> None:
        """Give what a checkpoint has brought the order that a step, with these, gives to others."""
        engine, begin = self._engine, self._in_order
        indices = [engine._state.index.get(id(v), -1) for v in variables]
        given = dict.fromkeys(i for i in indices if i >= begin)
        count = len(engine._state.entries)
        order = [*range(begin), *given, *(i for i in range(begin, count) if i not in given)]
        if order != [*range(count)]:
            engine.reorder(order)
            place = {i: k for k, i in enumerate(order)}
            self._created = [(name, place[i]) for name, i in self._created]
            self._extra = {(name, place[i]): slot for (name, i), slot in self._extra.items()}
        self._in_order += len(given)
        self._sort_slots(begin)

    def _sort_slots(self, begin: int) -> None:
        """The slots of variables from this one on, as first steps create them: all m, all v."""
        names = self._slot_names

        def place(slot: tuple[str, int]) -> tuple[int, ...]:
            name, i = slot
            if i < begin:
                return (0,)
            return 1 + (i >= self._in_order), (*names, name).index(name), i

        self._created.sort(key=place)

    def _check_order(self) -> None:
        if len(self._engine._state.entries) - self._in_order > 1:
            raise ValueError(
                "This optimizer was restored from a checkpoint, which has no order of variables, "
                "so that its weights have none yet. Make one step first, with the variables in "
                "their order."
            )

    def _add_weight(
        self, name: str, shape: tuple[int, ...], dtype: str, initializer: Any, **arguments: Any
    ) -> Any:
        if self._scalars is not None:
            return self._scalars.weight(name, shape, dtype, initializer, **arguments)
        value, backend = initial(initializer, shape, dtype), self._engine._state.backend
        return value if backend is None else backend.create(value)

    # --- steps ---

    def _prepare(self, variables: Sequence[Any]) -> None:
        """Make ready for the library of the first variables."""
        engine = self._engine
        if engine._state.backend is not None or not variables:
            return
        tensorflow = _tensorflow()
        if tensorflow is not None and tensorflow.is_variable(variables[0]):
            if self._scalars is None:
                # TensorFlow was imported since, and its checkpoints take objects of its own class
                # only: this one becomes that, as the user already has it.
                self.__class__ = tensorflow.tracked(type(self))
                self._scalars = tensorflow.ScalarVariables(self)
            self._scalars.create_all(variables)
        elif self._scalars is not None:
            numbers = {n: self._number(n) for n, v in self._hyper.items() if isinstance(v, float)}
            self._hyper |= numbers
            self._scalars = None
            for name in self._hyper:
                self._feed_engine(name)

    def _plain(self, name: str) -> Any:
        """A hyperparameter as the engine takes it, without TensorFlow's variables."""
        is_number = isinstance(self._hyper[name], float)
        return self._number(name) if is_number else self._feed(name)

    def _apply(self, pairs: Pairs, name: str | None) -> Any:
        variables = [variable for _, variable in pairs]
        self._prepare(variables)
        engine = self._engine
        result = engine._counted(engine._apply([g for g, _ in pairs], variables))
        self._create_slots(variables)
        if self._scalars is None:
            return result
        return self._scalars.result(result, name or self._engine.name)

    def _get_gradients(self, loss: Any, variables: list[Any]) -> list[Any]:
        try:
            gradients = self._engine._differentiated(loss, variables)
        except (NotImplementedError, LookupError) as error:
            raise ValueError(
                "A gradient cannot be computed, as an operation between the loss and a variable "
                f"has none: {error}"
            ) from error
        for i, gradient in enumerate(gradients):
            if gradient is None:
                raise ValueError(
                    f"Variable {_name_of(variables[i])}, number {i}, has no gradient: the loss "
                    "does not depend on it, or by an operation that has none."
                )
        return gradients

    def _evaluated(self, loss: Callable[[], Any]) -> tuple[Any, Callable[..., list[Any]]]:
        """The value of a loss, and what differentiates it once its variables are known."""
        tensorflow = _tensorflow()
        if tensorflow is None:
            return loss(), self._engine._differentiated
        value, tape = tensorflow.evaluated(loss)
        if tape is None:
            return value, self._engine._differentiated

        def differentiate(value: Any, variables: list[Any], grad_loss: Any, _: Any) -> list[Any]:
            entries = self._engine._described(variables)[1]
            gradients = tape.gradient(value, [entry.variable for entry in entries], grad_loss)
            return list(gradients)

        return value, differentiate

    def _updates(self, step: Callable[[], Any], variables: Sequence[Any]) -> list[Any]:
        """What makes a step when it is run: an operation if a graph is being built."""
        tensorflow = _tensorflow()
        if tensorflow is None or not tensorflow.in_graph():
            return [step]
        return [step()] if tensorflow.is_variable(variables[0]) else [step]


as_it_is(Older)


class WeightsInColumns(Awaited):
    """What `set_weights` was given before the first step: all m, all v, perhaps all vhat."""

    def __init__(self, slots: Sequence[Array]) -> None:
        self.slots = list(slots)

    def fill(self, engine: Any, *, is_complete: bool) -> None:
        """As of `Awaited`."""
        state: State = engine._state
        backend, columns = state.backend, list(zip(*(e.slots for e in state.entries), strict=True))
        assert backend is not None
        own = [slot for column in columns for slot in column]
        count = len(state.entries)
        # A list of a V1 optimizer may have all vhat without `amsgrad`.
        is_of_v1 = len(columns) == 2 and len(self.slots) == 3 * count
        given = self.slots[: len(own)] if is_of_v1 else self.slots
        if len(given) != len(own):
            raise ValueError(
                "The weights that were set before the first step must be those of the variables "
                f"that it has: 1 array, and {len(columns)} for each of {names_of(state.entries)}. "
                f"Received {1 + len(self.slots)}. Let the first step have the same variables, with "
                "gradients, as the optimizer whose weights they are."
            )
        names = {id(each): name for name, each in state.named}
        with backend.untraced():
            named = [(names[id(slot)], slot) for slot in own]
            for slot, value in zip(own, list(state.checked(named, given)), strict=True):
                backend.assign(slot, value)

    def tracked(self, state: State, name: str, variable: Any) -> None:
        """As of `Awaited`: all was set by `fill`."""

    def check_all_set(self) -> None:
        """As of `Awaited`."""

    def values(self) -> list[Array]:
        """As of `Awaited`."""
        return list(map(np.array, self.slots))


def _tensorflow() -> Any:
    """What is only for TensorFlow, if that is imported."""
    return of_tensorflow(".tensorflow", __package__)


def _listed(weights: Any) -> list[Any]:
    try:
        return list(weights)
    except TypeError as error:
        raise TypeError(
            "`weights` must be a list of arrays, as get_weights() returns it. Received: "
            f"{received(weights)}."
        ) from error


def _is_tensor(value: Any) -> bool:
    """Whether it is an array of some library, which may hold another value at the next step."""
    if callable(value) or isinstance(value, np.generic):
        return False
    return backend_of(value) is not None


def _is_traced(value: Any) -> bool:
    """Whether it is a tensor without a value yet, of a function that is traced now."""
    return _is_tensor(value) and _backend_over(value).is_traced(value)


def _backend_over(value: Any) -> Backend:
    kind = backend_of(value)
    assert kind is not None
    return kind.over([value])


def _name_of(variable: Any) -> str:
    backend = backend_of(variable)
    name = None if backend is None else backend.over([variable]).name_of(variable)
    return repr(name) if name else f"of shape {tuple(getattr(variable, 'shape', ()))}"
