"""JAX: `jax.Ref`s updated in place, and bare arrays through `stateless_apply`.

A step is operations on the Refs, inside a function that a user compiles or one after the other.
"""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import options, versions

with versions.imported("jax"):
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.core import Tracer

from .base import FLOATS, HALVES, Advance, Entry, Fast, Group, Selection, Stateless, Sums, received
from .functional import Functional, NotOurs, Pure
from .host import Numbers


def nothing_is_traced() -> bool:
    """Whether no transformation of JAX is tracing the caller."""
    return not isinstance(lax.neg(np.float32(0)), Tracer)


def is_ref(value: Any) -> bool:
    """Whether it is a Ref, or stands for one in a trace: jax 0.7.2 does not say so of that."""
    if isinstance(value, jax.Ref):
        return True
    return isinstance(value, Tracer) and type(value.aval).__name__ == "AbstractRef"


class Held:
    """A state variable of an optimizer for bare arrays: an array, which only replacing changes."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = self.array.dtype
        return found

    @property
    def sharding(self) -> Any:
        return self.array.sharding


class HeldBy(Held):
    """An array that another library's variable holds: its `value`, which `assign` replaces."""

    __slots__ = ("owner",)

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @property
    def array(self) -> Any:
        return self.owner.value

    @array.setter
    def array(self, array: Any) -> None:
        self.owner.assign(array)


class TracedNumbers(Numbers):
    """Functions of coefficients: of numbers in double precision, or of traced numbers."""

    @staticmethod
    def sqrt(x: Any) -> Any:
        return math.sqrt(x) if isinstance(x, float) else lax.sqrt(x)

    @staticmethod
    def expm1(x: Any) -> Any:
        return math.expm1(x) if isinstance(x, float) else lax.expm1(x)

    @staticmethod
    def log(x: Any) -> Any:
        return Numbers.log(x) if isinstance(x, float) else lax.log(x)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return jnp.maximum(a, b)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, bool):
            return a if condition else b
        return jnp.where(condition, a, b)


_sqrt: Any = jax.custom_jvp(lax.sqrt)


def _sqrt_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    # The velocity is 0 where every gradient was. The update does not depend on it there, and a
    # derivative through a step must not be 0 * infinity.
    root = _sqrt(*primals)
    is_zero = root == 0
    return root, tangents[0] * jnp.where(is_zero, 0, 0.5 / jnp.where(is_zero, 1, root))


_sqrt.defjvp(_sqrt_jvp)


# The bits of a number that are its exponent.
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "float32": (np.uint32, 0xFF << 23),
    "float64": (np.uint64, 0x7FF << 52),
}


class Arrays:
    """The functions that the rule is bound to."""

    sqrt, maximum, minimum = _sqrt, jnp.maximum, jnp.minimum
    divide, abs, sign = operator.truediv, jnp.abs, jnp.sign

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        return jnp.where(condition != 0, a, b)

    @staticmethod
    def cast(x: Any, dtype: str) -> Any:
        return x if x.dtype.name == dtype else lax.convert_element_type(x, dtype)

    @staticmethod
    def scaled_sum(x: Any) -> tuple[Any, Any]:
        """A sum of squares that neither overflows nor underflows, and by what x was divided."""
        # The power of two below the largest element, which changes no bits of what is summed.
        largest = jnp.max(jnp.abs(lax.stop_gradient(x)), initial=0)
        bits, exponent = _EXPONENTS[x.dtype.name]
        power = lax.bitcast_convert_type(
            lax.bitcast_convert_type(largest, bits) & bits(exponent), x.dtype
        )
        scale = jnp.clip(power, 2.0**-126, 2.0**126)
        scaled = x * (1 / scale)  # exact, and XLA repeats no division for each of its uses
        return jnp.sum(scaled * scaled), scale

    @staticmethod
    def sum_of_squares(x: Any) -> Any:
        total, scale = Arrays.scaled_sum(x)
        return total * scale**2

    @staticmethod
    def broadcast_like(value: Any, like: Any) -> Any:
        # Never of a weak type, which would change what `lax.cond` and `lax.scan` carry.
        value = jnp.asarray(value, like.dtype)
        return value if value.shape == like.shape else jnp.broadcast_to(value, like.shape)


class Elementwise:
    """Functions of an array of steps, for schedules."""

    minimum, maximum, where = jnp.minimum, jnp.maximum, jnp.where
    floor, ceil, cos, log, power = jnp.floor, jnp.ceil, jnp.cos, jnp.log, jnp.power

    @staticmethod
    def asarray_float(x: Any) -> Any:
        return x if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x, float)


class JAX(Functional):
    """Variables are `jax.Ref`s, or bare arrays, which only `stateless_apply` takes."""

    name: ClassVar[str] = "jax"
    functions: ClassVar[Any] = TracedNumbers
    elementwise: ClassVar[Any] = Elementwise
    arrays: ClassVar[Any] = Arrays
    holder: ClassVar[Any] = HeldBy

    def __init__(self, variables: Sequence[Any] = ()) -> None:
        super().__init__(variables)
        self._is_mutable = any(is_ref(v) for v in variables)
        # Where state lies that belongs to no variable.
        self._home = _home([v for v in variables if not isinstance(v, Tracer)])

    def make_fast(self) -> Fast:
        from ..fast.jax import FastJAX

        return FastJAX(self)

    def nothing_is_traced(self) -> bool:
        """Whether no transformation of JAX is tracing the caller."""
        return nothing_is_traced() if self.fast is None else self.fast.nothing_is_traced()

    # --- variables ---

    def name_of(self, variable: Any) -> None:
        return None

    def describe(self, variable: Any, name: str) -> Entry:
        if isinstance(variable, Tracer):
            raise ValueError(
                f"An optimizer must be built outside of compiled functions. Received variable "
                f"'{name}' as a tracer. Call build(variables) first, on the jax.Refs or arrays."
            )
        if not (is_ref(variable) or isinstance(variable, jax.Array)):
            raise TypeError(
                f"Variable '{name}' must be a jax.Ref or a jax.Array. Received: "
                f"{received(variable)}."
            )
        if is_ref(variable) != self._is_mutable:
            raise TypeError(
                "All variables of an optimizer must be jax.Refs, or all must be arrays. Received "
                f"variable '{name}' as a {received(variable)}. Make a Ref with jax.new_ref(array)."
            )
        what = f"Variable '{name}' of shape {variable.shape} and dtype {variable.dtype}"
        dtype = str(variable.dtype)
        if dtype not in FLOATS:
            raise TypeError(f"{what} must be float16, bfloat16, float32 or float64.")
        if dtype == "float64" and not jax.config.jax_enable_x64:
            raise ValueError(
                f"{what} needs double precision. Set jax.config.update('jax_enable_x64', True), or "
                "make it float32."
            )
        if not self._is_mutable and variable.is_deleted():
            raise ValueError(
                f"{what} has been deleted: its memory was donated to a compiled function. Build "
                "before that, or on what the function returned."
            )
        return Entry(variable, name, tuple(variable.shape), dtype)

    def check_distinct(self, entries: Sequence[Entry]) -> None:
        # No two Refs share memory, and arrays may, as nothing is written to them.
        devices = [e.variable.sharding.device_set for e in entries]
        for entry, each in zip(entries, devices, strict=True):
            if each != devices[0]:
                raise ValueError(
                    "All variables of an optimizer must be on the same devices. Received "
                    f"'{entries[0].name}' on {_spelled(devices[0])} and '{entry.name}' on "
                    f"{_spelled(each)}. Use one optimizer for each."
                )

    def zeros(self, entry: Entry, dtype: str) -> Any:
        like = entry.variable
        if not self._is_mutable:
            like = self.load(like)
        place = like.sharding if self._is_mutable or like.committed else None
        return self._new(jnp.zeros(entry.shape, dtype, device=place))

    def create(self, value: npt.NDArray[Any]) -> Any:
        return self._new(jnp.array(value, device=self._home))

    def _new(self, array: Any) -> Any:
        new = jax.new_ref(array) if self._is_mutable else Held(array)
        if isinstance(array, Tracer) or isinstance(new, Tracer):
            raise ValueError(
                "An optimizer must be built outside of compiled functions, as its state must "
                "outlive them. Call build(variables) first."
            )
        return new

    def shown(self, variable: Any) -> Any:
        return variable.array if isinstance(variable, Held) else variable

    def load(self, variable: Any) -> Any:
        if is_ref(variable):
            return variable[...]
        return variable.array if isinstance(variable, Held) else variable

    def store(self, variable: Any, value: Any) -> None:
        if isinstance(variable, Held):
            if type(variable) is Held and isinstance(value, Tracer):
                raise ValueError(
                    "State of arrays cannot be set inside a compiled function, which it would "
                    "outlive. Set it outside, or in the list that stateless_apply takes."
                )
            variable.array = value
        elif not is_ref(variable):
            raise TypeError(
                f"A jax.Array cannot be assigned to; this one has shape {variable.shape}. Train "
                "jax.Refs, made by jax.new_ref(array), or keep the arrays that stateless_apply "
                "returns."
            )
        else:
            variable[...] = value

    def assign(self, variable: Any, value: Any) -> None:
        if is_ref(value) or isinstance(value, Held):
            value = self.read(value)
        self._here.counts = None
        if self._here.call is not None or isinstance(value, jax.Array):
            self.write(variable, value)
        elif (is_ref(variable) or isinstance(variable, Held)) and self.nothing_is_traced():
            # A copy, as an array in a Ref must be nobody else's memory; jnp.array would compile
            # one for each shape.
            value = np.broadcast_to(np.asarray(value, variable.dtype), variable.shape).copy()
            array = jax.device_put(value, variable.sharding)
            if self.fast is None or not self.fast.put(variable, array):
                self.store(variable, array)
        else:
            self.write(variable, value)

    def value(self, variable: Any) -> Any:
        if self._here.call is not None:
            return self.read(variable)
        with self.turn:  # the next step overwrites what is read
            held = self._at_hand(variable)
            if isinstance(held, Tracer):
                return held
            number = np.asarray(held)[()]
        # The shortest decimal that stands for a float32 is what the user wrote.
        return float(str(number)) if number.dtype == np.float32 else number.item()

    def _at_hand(self, variable: Any) -> Any:
        """The present value for reading at once, without a copy of it where that is possible."""
        at_hand = None if self.fast is None else self.fast.value_at_hand(variable)
        return self.load(variable) if at_hand is None else at_hand

    def is_traced(self, value: Any) -> bool:
        return isinstance(value, Tracer)

    def is_symbolic(self, value: Any) -> bool:
        return True  # to compare arrays is an operation, which may be traced though they are not

    def check_untraced(self, what: str) -> None:
        if not self.nothing_is_traced():
            raise ValueError(
                f"{what} must be called outside of compiled functions, which its state would "
                "outlive."
            )

    def is_count(self, value: Any) -> bool:
        return bool(jnp.issubdtype(value.dtype, jnp.integer))

    def count(self, variable: Any) -> Any:
        counts, self._here.counts = self._here.counts, None
        found = None if counts is None else counts.get(id(variable))
        return self.load(variable) if found is None else found

    def array(self, variable: Any) -> Any:
        return self.read(variable) if (is_ref(variable) or isinstance(variable, Held)) else variable

    def form(self, variable: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
        return tuple(variable.shape), np.dtype(variable.dtype)

    def numpy(self, variable: Any) -> npt.NDArray[Any]:
        with self.turn:  # the next step overwrites what is read
            value = self._at_hand(variable)
            if isinstance(value, Tracer):
                raise ValueError(
                    "State cannot be read inside a compiled function, where it has no values yet. "
                    "Read it outside."
                )
            if value.is_deleted():
                raise ValueError(
                    "This state was donated to a compiled function, so that its values are gone. "
                    "Put in what the function returned, with set_weights(state)."
                )
            return np.array(value, np.float32 if value.dtype == jnp.bfloat16 else None)

    def rate(self, value: Any) -> Any:
        if not isinstance(value, jax.Array):
            return options.rate("learning_rate", value)
        if value.shape not in ((), (1,)) or not _is_real(value.dtype):
            raise ValueError(
                f"`learning_rate` must be a real scalar. Received shape {value.shape} and dtype "
                f"{value.dtype}."
            )
        return Elementwise.asarray_float(value.reshape(()))

    def rounded(self, value: Any, entry: Entry) -> Any:
        if entry.dtype == "bfloat16":  # XLA may leave out a cast there and back
            return lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
        return super().rounded(value, entry)

    # --- gradients ---

    def gradient(self, gradient: Any, entry: Entry) -> Any:
        expected = f"The variable has shape {entry.shape} and dtype {entry.dtype}."
        who = f"The gradient of variable '{entry.name}'"
        is_sparse = _is_sparse(gradient)
        if is_ref(gradient) or not (
            is_sparse or isinstance(gradient, (jax.Array, np.ndarray, np.generic))
        ):
            raise TypeError(
                f"{who} must be a jax.Array, a NumPy array or a jax.experimental.sparse.BCOO. "
                f"Received: {received(gradient)}. {expected}"
            )
        if tuple(gradient.shape) != entry.shape:
            raise ValueError(
                f"{who} must have the variable's shape. Received shape {tuple(gradient.shape)} and "
                f"dtype {gradient.dtype}. {expected}"
            )
        if not _is_real(gradient.dtype):
            raise TypeError(
                f"{who} must hold real numbers. Received dtype {gradient.dtype}. {expected}"
            )
        if is_sparse:
            return self._checked_sparse(gradient, who)
        if not isinstance(gradient, jax.Array):
            return jnp.asarray(gradient)
        if not isinstance(gradient, Tracer) and gradient.is_deleted():
            raise ValueError(
                f"{who} has been deleted: its memory was donated to a compiled function. {expected}"
            )
        return gradient

    def _checked_sparse(self, gradient: Any, who: str) -> Any:
        indices = gradient.indices
        if not isinstance(indices, Tracer) and np.any(np.asarray(indices) < 0):
            raise ValueError(
                f"{who} must have indices >= 0. Received index {np.min(np.asarray(indices))} in a "
                f"BCOO of shape {gradient.shape}. To pad, use the number of rows, which is dropped."
            )
        return gradient

    def gather(self, selection: Selection, gradients: list[Any]) -> list[Any]:
        self._check_mutable()
        gradients = self.densified(gradients)
        if self.fast is not None:
            self.fast.note(selection, gradients)
        return gradients

    def densified(self, gradients: list[Any]) -> list[Any]:
        of_sparse = dense if self.fast is None else self.fast.dense
        return [of_sparse(g) if _is_sparse(g) else g for g in gradients]

    @property
    def keeps_state(self) -> bool:
        """As of `Backend`."""
        return self._is_mutable

    def stands_for(self, variable: Any, entry: Entry) -> bool:
        # An array is a value: after each step a variable is another one.
        is_array = not self._is_mutable and isinstance(variable, jax.Array)
        return is_array and (tuple(variable.shape), str(variable.dtype)) == (
            entry.shape,
            entry.dtype,
        )

    def _check_mutable(self) -> None:
        if not self._is_mutable:
            raise TypeError(
                "jax.Arrays cannot be updated in place. Train jax.Refs, made by "
                "jax.new_ref(array), or use `variables, state = opt.stateless_apply(state, "
                "gradients, variables)` with `state = opt.variables` at first."
            )

    def stand_ins(self, entries: Sequence[Entry], variables: list[Any]) -> list[Entry] | None:
        self._check_mutable()
        if not any(isinstance(v, Tracer) for v in variables):
            return None
        forms = [(tuple(getattr(v, "shape", ())), str(getattr(v, "dtype", ""))) for v in variables]
        if not all(is_ref(v) for v in variables) or forms != [(e.shape, e.dtype) for e in entries]:
            raise ValueError(
                "Inside a compiled function, jax.Refs that are its arguments are told apart by "
                f"their position: they must be all {len(entries)} variables that the optimizer was "
                f"built with, in that order: {[(e.name, e.shape, e.dtype) for e in entries]}. "
                f"Received {len(variables)}: {forms}. Pass all of them (a gradient may be None), "
                "or close over the Refs."
            )
        return [replace(e, variable=v) for e, v in zip(entries, variables, strict=True)]

    # --- the step ---

    def run(
        self,
        advance: Advance,
        selection: Selection,
        gradients: Any,
        rate: Any,
        step: Any,
    ) -> None:
        is_traced = not self.nothing_is_traced() or _has_stand_ins(selection)
        if self.fast is not None:
            run = self.fast.run_in_trace if is_traced else self.fast.run
            run(advance, selection, gradients, rate, step)
        elif is_traced:
            self.run_here(lambda: advance(selection, gradients, rate, step), selection)
        else:
            super().run(advance, selection, gradients, rate, step)

    def run_here(self, step: Callable[[], None], selection: Selection) -> None:
        """Run a step on the Refs themselves, inside a trace."""
        for variable, value in self.changes(step, selection):
            self.store(variable, value)

    def prefer_kernels(self, variables: Sequence[Any]) -> None:
        """Let steps in functions that are compiled call the kernels, if all is on one CPU."""
        if self.fast is not None:
            self.fast.prefer_kernels(variables)

    def norms(self, group: Group, gradients: Any, *, joint: bool) -> list[Any]:
        if self.fast is not None and self.fast.is_by_kernels():
            found = self.fast.scaled_sums(group, gradients)
        else:
            found = list(map(self.arrays.scaled_sum, self._applied(group, gradients)))
        if joint:
            scale = reduce(jnp.maximum, [scale for _, scale in found])
            found = [(sum(total * (each / scale) ** 2 for total, each in found), scale)]
        return [self.arrays.sqrt(total) * scale for total, scale in found]

    def sweep(self, group: Group, gradients: Any) -> Sums:
        if self.fast is not None and self.fast.is_by_kernels():
            found: Sums = self.fast.sweep(group, gradients)
            return found
        return super().sweep(group, gradients)

    def branch(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
        if isinstance(condition, Tracer):
            super().branch(condition, yes, no)
        else:
            (yes if condition else no)()

    def cond(
        self, condition: Any, yes: Callable[..., Any], no: Callable[..., Any], values: list[Any]
    ) -> list[Any]:
        chosen: list[Any] = lax.cond(condition, yes, no, values)
        return chosen

    def update_each(
        self, group: Group, gradients: Any, update: Callable[[Any, Entry], None]
    ) -> None:
        if self.how:
            raise NotOurs
        if _has_stand_ins(group.selection):
            raise ValueError(
                "An `update_step` of one's own works on the jax.Refs that the optimizer was built "
                "with: close over them, instead of passing them to the compiled function."
            )
        super().update_each(group, gradients, update)

    def check_stateless(self, call: Stateless) -> None:
        if not call.is_fused:
            raise NotImplementedError(
                f"{type(call.optimizer).__name__} has an `update_step` of its own, which changes "
                "variables: that is no function of arrays. Train jax.Refs with apply_gradients."
            )

    def fitting(self, value: Any, name: str, variable: Any, *, is_state: bool) -> Any:
        return _fitting(value, name, variable, same=not is_state)

    def run_pure(
        self, pure: Pure, selection: Selection, arguments: tuple[Any, ...], step: Any
    ) -> list[Any]:
        is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments))
        if self.fast is None or is_traced:
            return pure(*arguments)
        new: list[Any] = self.fast.run_pure(pure, selection, arguments, step)
        return new

    # --- differentiation ---

    def differentiate(
        self, loss: Any, variables: Sequence[Any], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        values = [self.array(v) for v in variables]
        _check_loss(loss, values)

        def checked(*values: Any) -> Any:
            value = loss(*values)
            dtype, shape = getattr(value, "dtype", np.dtype(type(value))), np.shape(value)
            if not jnp.issubdtype(dtype, jnp.floating) or (grad_loss is None and shape != ()):
                raise ValueError(
                    f"`loss` must return a real scalar. Received: {received(value)} of shape "
                    f"{shape} and dtype {dtype}. Take its mean or sum, or pass `grad_loss` of the "
                    "same shape."
                )
            if grad_loss is not None and np.shape(grad_loss) != shape:
                raise ValueError(
                    f"`grad_loss` must have the shape of the loss, {shape}. Received shape "
                    f"{np.shape(grad_loss)}."
                )
            return scale(value)

        if grad_loss is None:
            return list(jax.grad(checked, argnums=tuple(range(len(values))))(*values))
        value, vjp = jax.vjp(checked, *values)
        return list(vjp(jnp.asarray(grad_loss, value.dtype)))


def _has_stand_ins(selection: Selection) -> bool:
    return isinstance((selection.entries or selection.rest)[0].variable, Tracer)


def _home(variables: Sequence[Any]) -> Any:
    """Where counters are placed: on all devices of the variables, if they are bound to any."""
    for v in variables:
        if (is_ref(v) or isinstance(v, jax.Array)) and v.committed:
            devices = v.sharding.device_set
            if len(devices) == 1:
                return v.sharding
            if isinstance(v.sharding, jax.sharding.NamedSharding):
                mesh = v.sharding.mesh
            else:
                ordered = sorted(devices, key=lambda device: device.id)
                mesh = jax.sharding.Mesh(np.array(ordered), ("devices",))
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return None


def _spelled(devices: Any) -> str:
    return ", ".join(sorted(map(str, devices)))


def _is_real(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def _is_sparse(gradient: Any) -> bool:
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(gradient, sparse.BCOO)


def dense(gradient: Any) -> Any:
    """A BCOO as an array: repeated indices are summed, in float32 at least, padding is dropped."""
    wide = jnp.float32 if gradient.dtype.name in HALVES else gradient.dtype
    data = gradient.data.astype(wide)
    return type(gradient)((data, gradient.indices), shape=gradient.shape).todense()


def _fitting(value: Any, name: str, variable: Any, *, same: bool) -> Any:
    """A value that `stateless_apply` is given, as an array of its variable's shape and dtype."""
    if is_ref(value) or not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(
            f"`stateless_apply` takes values. Received: {received(value)} for '{name}'. Pass "
            "ref[...] for a jax.Ref, and the state as stateless_apply returned it."
        )
    fits = value.dtype == variable.dtype
    if not fits and not same:
        is_float = (jnp.issubdtype(v.dtype, jnp.floating) for v in (value, variable))
        fits = next(is_float) == next(is_float)
    if tuple(value.shape) != tuple(variable.shape) or not fits:
        raise ValueError(
            f"The value for '{name}' must have shape {tuple(variable.shape)} and dtype "
            f"{variable.dtype}, as the optimizer was built. Received shape {tuple(value.shape)} "
            f"and dtype {value.dtype}."
        )
    if value.dtype == variable.dtype and not getattr(value, "weak_type", True):
        return value
    return jnp.asarray(value, variable.dtype)


def _check_loss(loss: Any, values: Sequence[Any]) -> None:
    if callable(loss):
        try:
            inspect.signature(loss).bind(*values)
            return
        except ValueError:  # it has none
            return
        except TypeError:
            pass
    raise TypeError(
        "`loss` must be a callable with one argument a variable, their values as arrays: JAX "
        "differentiates a function of its arguments, not of jax.Refs that it closes over. "
        f"Received: {received(loss)} for {len(values)} variables."
    )


BACKEND = JAX
