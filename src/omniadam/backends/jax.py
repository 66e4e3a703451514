"""JAX: `jax.Ref`s updated in place, and bare arrays through `stateless_apply`; the step by XLA.

Outside a trace a step is one call of a compiled function of arrays. `jax.jit` takes Refs too, but
spends some 10 us of Python on each of them (JAX 0.10), while an array costs 1 us. So the arrays are
taken out of the Refs and donated, and the new ones are put back.
"""

from __future__ import annotations

import atexit
import inspect
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial, reduce, wraps
from itertools import chain, repeat
from operator import is_
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.core import Tracer

from .. import options, versions
from ..kernels import xla
from ..rule import Pass, RuleKey, make_adam
from .base import FLOATS, HALVES, Entry, Latest, Selection, received
from .functional import Cells, Functional
from .host import Numbers

versions.check("jax", jax.__version__)

try:
    from jax._src.core import trace_state_clean as nothing_is_traced
except ImportError:  # not public; this takes longer

    def nothing_is_traced() -> bool:
        """Whether no transformation of JAX is tracing the caller."""
        return not isinstance(lax.neg(np.float32(0)), Tracer)


try:  # Not the type of an array made for this, which would start JAX: a process may set it up.
    from jax._src.array import ArrayImpl
except ImportError:  # no array is of this type, and all are looked at longer
    ArrayImpl = jax.Array

_Array: Any = ArrayImpl
# A step for given gradients and a given learning rate (of a callable, else None).
Advance = Callable[[Any, Any], None]
# How many steps a selection keeps compiled, by what the settings make of a step.
_KEPT = 16
# How a step is traced: for the kernels of the CPU to run it, or to see what it overwrites.
_BY_KERNELS, _REHEARSED = "by kernels", "rehearsed"


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

    # As a Ref has it, for `Program`.
    @property
    def _refs(self) -> Held:
        return self

    @property
    def _buf(self) -> Any:
        return self.array

    @_buf.setter
    def _buf(self, array: Any) -> None:
        self.array = array


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


class Scalars(Numbers):
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
    functions: ClassVar[Any] = Scalars
    elementwise: ClassVar[Any] = Elementwise
    arrays: ClassVar[Any] = Arrays
    holder: ClassVar[Any] = HeldBy

    def __init__(self, variables: Sequence[Any] = ()) -> None:
        super().__init__()
        self._is_mutable = any(is_ref(v) for v in variables)
        # Where state lies that belongs to no variable.
        self._home = _home([v for v in variables if not isinstance(v, Tracer)])
        # The numbers of the latest step, whether in double precision, and as an array.
        self._numbers: tuple[tuple[Any, ...], bool, Any] | None = None
        # Whether a step in a function that a user compiles calls the kernels: see `prefer_kernels`.
        self._prefers_kernels = False

    @classmethod
    def over(cls, variables: Sequence[Any]) -> JAX:
        return cls(variables)

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
        if self._here.call is not None or isinstance(value, jax.Array) or not nothing_is_traced():
            self.write(variable, value)
        elif isinstance(variable, Held) or (is_ref(variable) and refs_are_open()):
            self._assign_from_host(variable, value)
        else:
            self.write(variable, value)

    def _assign_from_host(self, variable: Any, value: Any) -> None:
        """Overwrite a variable without compiling anything, whatever its shape."""
        # A copy, as an array in a Ref must be nobody else's memory; jnp.array would compile one.
        value = np.broadcast_to(np.asarray(value, variable.dtype), variable.shape).copy()
        array = jax.device_put(value, variable.sharding)
        if isinstance(variable, Held):
            variable.array = array
        else:
            variable._refs._buf = array

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
        if is_ref(variable) and nothing_is_traced() and refs_are_open():
            return variable._refs._buf
        return self.load(variable)

    def is_traced(self, value: Any) -> bool:
        return isinstance(value, Tracer)

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
        gradients = [_dense(g) if _is_sparse(g) else g for g in gradients]
        selection.prepared["known"] = None
        if all(type(g) is _Array for g in gradients):
            own = [entry.variable for entry in selection.entries]
            selection.prepared["known"] = own, *_forms(gradients)
        return gradients

    def _check_mutable(self) -> None:
        if not self._is_mutable:
            raise TypeError(
                "jax.Arrays cannot be updated in place. Train jax.Refs, made by "
                "jax.new_ref(array), or use `variables, state = opt.stateless_apply(state, "
                "gradients, variables)` with `state = opt.variables` at first."
            )

    def recognise(self, selection: Selection, gradients: list[Any], variables: list[Any]) -> Any:
        known = selection.prepared.get("known")
        if known is None or not nothing_is_traced():
            return None
        own, shapes, dtypes = known
        if (
            len(variables) == len(own)
            and all(map(is_, variables, own))
            and all(map(is_, map(type, gradients), repeat(_Array)))
            and _forms(gradients) == (shapes, dtypes)
            and not any(map(_Array.is_deleted, gradients))
        ):
            return gradients
        return None

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
        step: Callable[[Selection, Any, Any, Any], None],
        selection: Selection,
        gradients: Any,
        rate: Any,
        fixed: Any,
    ) -> None:
        def advance(gradients: Any, given: Any) -> None:
            rate, numbers = given
            step(selection, gradients, rate, fixed._replace(numbers=tuple(numbers)))

        given = rate, fixed.numbers
        if not nothing_is_traced() or _has_stand_ins(selection):
            if self._prefers_kernels:
                self._run_by_kernels(advance, selection, gradients, given)
            else:
                self.run_here(advance, selection, gradients, given)
            return
        is_open = refs_are_open() or not self._is_mutable
        programs = selection.prepared.setdefault("programs", Latest(_KEPT))
        programs.found(
            (is_open, *fixed[:2]),
            lambda: self._program(is_open, advance, selection, gradients, given),
        )(gradients, given)

    def _argument(self, numbers: tuple[Any, ...]) -> Any:
        """Numbers as an argument of a program: an array, which is made anew where they changed."""
        is_wide, known = bool(jax.config.jax_enable_x64), self._numbers
        if known is None or known[0] is not numbers or known[1] != is_wide:
            if not all(isinstance(x, float) for x in numbers):
                return numbers
            with np.errstate(over="ignore"):
                values = np.array(numbers, np.float64 if is_wide else np.float32)
            known = self._numbers = numbers, is_wide, jax.device_put(values)
        return known[2]

    def _program(
        self, is_open: bool, advance: Advance, selection: Selection, gradients: Any, rate: Any
    ) -> Advance:
        try:
            changed, kept = self._rehearse(advance, selection, gradients, rate)
        except _NotOurs:

            def in_turn(gradients: Any, rate: Any) -> None:
                with self.step_in_turn():
                    self.run_here(advance, selection, gradients, rate, has_turn=True)

            return in_turn
        except _UNTRACEABLE as error:
            error.add_note(_TRACEABLE)
            raise
        if is_open:
            return Program(self, advance, selection, changed, kept)

        def here(gradients: Any, rate: Any) -> None:
            self.run_here(advance, selection, gradients, rate)

        # Which closes over the Refs, as JAX documents it.
        compiled = InTurn(self, here)
        return lambda gradients, given: compiled.call(
            gradients, (given[0], self._argument(given[1]))
        )

    def run_here(
        self,
        advance: Advance,
        selection: Selection,
        gradients: Any,
        rate: Any,
        *,
        has_turn: bool = False,
    ) -> None:
        """Run a step on the Refs themselves: inside a trace, or one operation after the other."""
        cells: Cells = {}
        stored = self.inline(lambda: advance(gradients, rate), selection, cells, has_turn=has_turn)
        for key, cell in cells.items():
            if key in stored:
                self.store(*cell)

    def prefer_kernels(self, variables: Sequence[Any]) -> None:
        """Let steps in functions that are compiled call the kernels, if all is on one CPU.

        Values that such a function is given may lie elsewhere than these variables, and how they
        are sharded is not known before it is compiled: there must be no other device to lie on.
        """
        self._prefers_kernels = (
            jax.default_backend() == "cpu"
            and jax.device_count() == 1
            and all(map(_is_on_cpu, variables))
            and _kernels_work()
        )

    def _run_by_kernels(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any
    ) -> None:
        """A step inside a trace by the kernels, which XLA alone can differentiate."""
        try:
            changed, kept = self._rehearse(advance, selection, gradients, rate)
        except _NotOurs:
            self.run_here(advance, selection, gradients, rate)
            return

        def step(by: bool, values: list[Any], gradients: Any, rate: Any) -> list[Any]:
            cells = {id(v): (v, x) for v, x in zip((*changed, *kept), values, strict=True)}
            how = _BY_KERNELS if by else ""
            self.inline(lambda: advance(gradients, rate), selection, cells, how)
            return [cells[id(v)][1] for v in changed]

        by_kernels = jax.custom_jvp(partial(step, True))
        by_kernels.defjvp(partial(jax.jvp, partial(step, False)))
        values = [self.load(v) for v in (*changed, *kept)]
        new = by_kernels(values, gradients, rate)
        for variable, value in zip(changed, new, strict=True):
            self.store(variable, value)

    def _rehearse(
        self, advance: Advance, selection: Selection, gradients: Any, rate: Any
    ) -> tuple[list[Any], list[Any]]:
        """The variables that a step overwrites, and those it only reads; nothing is computed."""
        cells: Cells = {}
        stored: set[int] = set()

        def rehearsed(gradients: Any, rate: Any) -> None:
            step = lambda: advance(gradients, rate)  # noqa: E731
            stored.update(self.inline(step, selection, cells, _REHEARSED))

        jax.eval_shape(rehearsed, gradients, rate)
        changed = [v for key, (v, _) in cells.items() if key in stored]
        return changed, [v for key, (v, _) in cells.items() if key not in stored]

    def norms(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        gradients: Any,
        pass_c: Any,
        *,
        joint: bool,
    ) -> list[Any]:
        if self.how == _BY_KERNELS and xla.serves(rule):
            found = self._sums_by_kernels(kind, rule, selection, gradients, pass_c)
        else:
            applied = self._applied(kind, selection, gradients, pass_c)
            found = list(map(self.arrays.scaled_sum, applied))
        if joint:
            scale = reduce(jnp.maximum, [scale for _, scale in found])
            found = [(sum(total * (each / scale) ** 2 for total, each in found), scale)]
        return [self.arrays.sqrt(total) * scale for total, scale in found]

    def _sums_by_kernels(
        self, kind: Pass, rule: RuleKey, selection: Selection, gradients: Any, pass_c: Any
    ) -> list[tuple[Any, Any]]:
        """As `scaled_sum` of each gradient."""
        sums: dict[int, tuple[Any, Any]] = {}
        entries = selection.entries
        for dtype, gradient_dtype, _, chosen in _groups(kind, entries, gradients):
            wide = entries[chosen[0]].slot_dtype
            sizes = [math.prod(entries[i].shape) for i in chosen]
            job = xla.job(kind, rule, dtype, gradient_dtype, sizes, squares=True)
            arrays = [
                *(self.read(entries[i].accumulator) for i in chosen if kind.accumulated),
                *(_readable(gradients[i], wide) for i in chosen),
            ]
            coefficients = self._row((0.0,) * 4, pass_c, (), wide)
            form = jax.ShapeDtypeStruct((2, len(chosen)), wide)
            call = jax.ffi.ffi_call(_TARGET, form, vmap_method="sequential")
            found = call(job.plan, coefficients, *arrays)
            sums.update(zip(chosen, zip(*found, strict=True), strict=True))
        return [sums[i] for i in range(len(entries))]

    def sweep(
        self,
        kind: Pass,
        rule: RuleKey,
        selection: Selection,
        gradients: Any,
        factors: Sequence[Any],
        rule_c: Sequence[Any],
        pass_c: Sequence[Any],
    ) -> None:
        if self.how != _BY_KERNELS or not xla.serves(rule):
            super().sweep(kind, rule, selection, gradients, factors, rule_c, pass_c)
            return
        entries = selection.entries if kind.gradient else selection.rest
        for dtype, gradient_dtype, decayed, chosen in _groups(kind, entries, gradients):
            wide = entries[chosen[0]].slot_dtype
            sizes = [math.prod(entries[i].shape) for i in chosen]
            decaying = kind._replace(decayed=decayed)
            job = xla.job(decaying, rule, dtype, gradient_dtype, sizes)
            touched = [v for i in chosen for v in _streams(kind, entries[i])]
            is_stored = [v for i in chosen for v in _are_stored(kind, entries[i])]
            old = [self.read(v) for v in touched]
            stored = [i for i, is_ in enumerate(is_stored) if is_]
            call = jax.ffi.ffi_call(
                _TARGET,
                [jax.ShapeDtypeStruct(old[i].shape, old[i].dtype) for i in stored],
                vmap_method="sequential",
                input_output_aliases={2 + i: k for k, i in enumerate(stored)},
            )
            chosen_factors = [factors[i] for i in chosen if kind.clipped_by_factor]
            coefficients = self._row(rule_c, pass_c, chosen_factors, wide)
            given = [_readable(gradients[i], wide) for i in chosen if kind.gradient]
            for i, new in zip(stored, call(job.plan, coefficients, *old, *given), strict=True):
                self.write(touched[i], new)

    def _row(
        self, rule_c: Sequence[Any], pass_c: Sequence[Any], factors: Sequence[Any], dtype: str
    ) -> Any:
        """All coefficients as one array."""
        return jnp.stack([jnp.asarray(v, dtype) for v in (*rule_c, *pass_c, *factors)])

    def branch(self, condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
        if isinstance(condition, Tracer):
            super().branch(condition, yes, no)
        else:
            (yes if condition else no)()

    def cond(
        self, condition: Any, yes: Callable[..., Any], no: Callable[..., Any], values: list[Any]
    ) -> list[Any]:
        chosen: list[Any] = lax.cond(condition, yes, no, values)
        return chosen

    def update_each(self, kind: Pass, selection: Selection, *arguments: Any) -> None:
        if self.how == _REHEARSED:
            raise _NotOurs
        if _has_stand_ins(selection):
            raise ValueError(
                "An `update_step` of one's own works on the jax.Refs that the optimizer was built "
                "with: close over them, instead of passing them to the compiled function."
            )
        super().update_each(kind, selection, *arguments)

    def stateless_apply(
        self, optimizer: Any, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        entries, named = optimizer._entries, optimizer._state
        if not optimizer._is_fused:
            raise NotImplementedError(
                f"{type(optimizer).__name__} has an `update_step` of its own, which changes "
                "variables: that is no function of arrays. Train jax.Refs with apply_gradients."
            )
        values = [
            *(
                _fitting(value, e.name, e.variable, same=True)
                for value, e in zip(variables, entries, strict=True)
            ),
            *(
                _fitting(value, name, v, same=False)
                for value, (name, v) in zip(state, named, strict=True)
            ),
        ]
        present, gradients = optimizer._present(self, entries, gradients, depth=4)
        gradients = [_dense(g) if _is_sparse(g) else g for g in gradients]
        selection = optimizer._selection(present)
        rate, fixed = optimizer._rate_and_fixed()
        owners = [*(e.variable for e in entries), *(v for _, v in named)]

        def pure(values: list[Any], gradients: list[Any], rate: Any, numbers: Any) -> list[Any]:
            cells = {id(v): (v, x) for v, x in zip(owners, values, strict=True)}
            now = fixed._replace(numbers=tuple(numbers))
            self.inline(
                lambda: optimizer._advance(selection, gradients, rate, now), selection, cells
            )
            return [cells[id(v)][1] for v in owners]

        if any(isinstance(x, Tracer) for x in jax.tree.leaves((values, gradients, rate))):
            new = pure(values, gradients, rate, fixed.numbers)
        else:
            programs = selection.prepared.setdefault("stateless", Latest(_KEPT))
            program = programs.found(fixed[:2], lambda: jax.jit(pure))
            new = program(values, gradients, rate, self._argument(fixed.numbers))
        return new[: len(entries)], new[len(entries) :]

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


# --- the kernels of the CPU ---

_TARGET = "omniadam_kernel"
# XLA takes time by the square of the operands of a call and more: 27 s for 800 variables in one.
_MOST_IN_A_CALL = 64


def _groups(
    kind: Pass, entries: Sequence[Entry], gradients: Sequence[Any]
) -> list[tuple[str, str, bool, list[int]]]:
    """Positions of the entries that one call serves, under the types and whether they decay."""
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for i, entry in enumerate(entries):
        given = gradients[i].dtype.name if kind.gradient else entry.dtype
        given = given if given in FLOATS else entry.slot_dtype
        groups.setdefault((entry.dtype, given, kind.decayed and entry.decayed), []).append(i)
    return [
        (*key, chosen[i : i + _MOST_IN_A_CALL])
        for key, chosen in groups.items()
        for i in range(0, len(chosen), _MOST_IN_A_CALL)
    ]


def _streams(kind: Pass, entry: Entry) -> list[Any]:
    """What a pass touches of an entry, in the order that a `Job` takes it."""
    return [
        entry.variable,
        *(entry.slots if kind.updates else ()),
        *([entry.accumulator] if kind.accumulated else ()),
        *([entry.average] if kind.averaged else ()),
    ]


def _are_stored(kind: Pass, entry: Entry) -> list[bool]:
    return [kind.stores_variable, *[True] * (len(_streams(kind, entry)) - 1)]


def _readable(gradient: Any, dtype: str) -> Any:
    """A gradient of a type that kernels read."""
    return gradient if gradient.dtype.name in FLOATS else gradient.astype(dtype)


@cache
def _kernels_work() -> bool:
    """Whether this version of JAX calls the kernels: tried on two numbers that each move by 1."""
    try:
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(xla.handler()), platform="cpu")
        rule = RuleKey(make_adam, ("momentum", "velocity"), (("amsgrad", False),))
        job = xla.job(Pass(gradient=True, updates=True), rule, "float32", "float32", [2])
        form = jax.ShapeDtypeStruct((2,), np.float32)
        call = jax.ffi.ffi_call(_TARGET, [form] * 3, input_output_aliases={2: 0, 3: 1, 4: 2})
        w, g, zero, c = (
            np.array(x, np.float32) for x in ([1, 2], [3, -4], [0, 0], [1, 1, 1, 0, *[0] * 8])
        )
        with jax.default_device(jax.devices("cpu")[0]):
            w, m, v = jax.jit(call)(job.plan, c, w, zero, zero, g)
        atexit.register(_wait_for_steps)
        return [*w.tolist(), *m.tolist(), *v.tolist()] == [0.0, 3.0, 3.0, -4.0, 9.0, 16.0]
    except Exception:
        return False


def _wait_for_steps() -> None:
    """Before the interpreter goes, and the memory of the jobs with it."""
    with suppress(Exception):  # of a program that failed
        jax.block_until_ready(jax.live_arrays())


def _is_on_cpu(variable: Any) -> bool:
    devices = variable.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _has_stand_ins(selection: Selection) -> bool:
    return isinstance((selection.entries or selection.rest)[0].variable, Tracer)


class _NotOurs(Exception):
    """The step calls an `update_step` that a user wrote, which is run as it is."""


_UNTRACEABLE = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
_TRACEABLE = (
    "omniadam compiles the whole step, and the learning rate's schedule with it. A schedule of "
    "your own must take a traced step, using jax.numpy and no `if`. Or give a callable without "
    "arguments, which is called outside at each step."
)


class Program:
    """A step compiled for one selection, as a function of the arrays in its Refs."""

    def __init__(
        self,
        backend: JAX,
        advance: Advance,
        selection: Selection,
        changed: list[Any],
        kept: list[Any],
    ) -> None:
        counters = [v for v in changed if jnp.issubdtype(v.dtype, jnp.integer)]
        self._backend = backend
        # The array in a Ref is the Ref's alone; elsewhere users may have it in their hands.
        self._owns = all(is_ref(v) for v in changed)
        self._changed, self._kept = [v._refs for v in changed], [v._refs for v in kept]
        self._counters = [(id(v), _Place()) for v in counters]
        self._targets = [*self._changed, *(place for _, place in self._counters)]
        for each in self._changed:
            # As in jax.new_ref(1.0). What a step stores is not, and would compile a second step.
            with backend.turn:
                if each._buf.weak_type or not each._buf.committed:
                    strong = jnp.array(each._buf, each._buf.dtype)
                    each._buf = jax.device_put(strong, each._buf.sharding)

        def step(
            how: str, old: list[Any], others: list[Any], gradients: list[Any], rate: Any
        ) -> list[Any]:
            cells = {id(v): (v, x) for v, x in zip(changed, old, strict=True)}
            cells |= {id(v): (v, x) for v, x in zip(kept, others, strict=True)}
            backend.inline(lambda: advance(gradients, rate), selection, cells, how)
            # A count that is returned is no memory of a Ref, which the next step overwrites.
            return [cells[id(v)][1] for v in (*changed, *counters)]

        def omniadam_step(*arguments: Any) -> list[Any]:
            return step(_BY_KERNELS if has_kernels else "", *arguments)

        has_kernels = self._owns and all(map(_is_on_cpu, changed)) and _kernels_work()
        places = None
        if any(len(v.sharding.device_set) > 1 for v in changed):
            places = [v.sharding for v in (*changed, *counters)]
        self._compiled = InTurn(backend, omniadam_step, donate_argnums=0, out_shardings=places)
        self._keeping = InTurn(backend, partial(step, ""), out_shardings=places)

    def __call__(self, gradients: Any, rate: Any) -> None:
        # Where NaN raises an error, the old values are still needed then.
        config = jax.config
        keeps = config.jax_debug_nans or config.jax_debug_infs or config.jax_disable_jit
        donates = self._owns and not keeps
        given = rate[0], self._backend._argument(rate[1])
        run = self._compiled if donates else self._keeping

        def arguments() -> tuple[Any, ...]:
            old, others = [ref._buf for ref in self._changed], [ref._buf for ref in self._kept]
            return old, others, gradients, given

        def use(compiled: Any) -> None:
            # Once the old arrays are given away, the new ones must reach their Refs. This is one
            # call into C, so that a KeyboardInterrupt comes before it or after it.
            new = chain.from_iterable(map(compiled, *zip(arguments())))
            deque(map(setattr, self._targets, repeat("_buf"), new), maxlen=0)
            self._backend._here.counts = {key: place._buf for key, place in self._counters}

        run.by(use, arguments)


class _Untraced(Exception):
    """A compiled function is to be traced, and its caller has the turn."""


class InTurn:
    """A compiled function that is run in turn, but traced before: it may call users' functions."""

    def __init__(self, backend: JAX, function: Callable[..., Any], **settings: Any) -> None:
        self._backend, self._thread = backend, threading.local()
        self._function, self._settings = function, settings
        # By the forms of arguments. One for all would have to forget what it compiled for others:
        # calls of a function whose tracing failed once are slow from then on.
        self._of_forms = Latest(_KEPT)
        self.jitted = self._made()

    def _made(self) -> Any:
        function, thread = self._function, self._thread

        @wraps(function)
        def traced(*arguments: Any) -> Any:
            if getattr(thread, "has_turn", False):
                raise _Untraced
            return function(*arguments)

        return jax.jit(traced, **self._settings)

    def _traced(self, arguments: tuple[Any, ...]) -> Any:
        jitted = self._made()
        jitted.trace(*arguments)
        return jitted

    def call(self, *arguments: Any) -> None:
        self.by(lambda compiled: compiled(*arguments), lambda: arguments)

    def by(self, use: Callable[[Any], None], arguments: Callable[[], Any]) -> None:
        """Let it be used, by what calls the compiled function once, with these arguments."""
        if jax.config.jax_disable_jit:  # it is run as Python, and all that it calls
            use(self.jitted)
            return
        thread, latest = self._thread, self.jitted
        if len(self._of_forms) > 1:  # in turn, perhaps, and a call in vain takes long
            latest = self._of_forms.get(_form(arguments()), latest)
        try:
            with self._backend.step_in_turn():
                thread.has_turn = True
                use(latest)
                return
        except _Untraced:
            pass
        finally:
            thread.has_turn = False
        given = arguments()
        latest = self._of_forms.found(_form(given), lambda: self._traced(given))
        self.jitted = latest
        with self._backend.step_in_turn():
            use(latest)


def _form(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of these arguments is traced for."""
    leaves, tree = jax.tree.flatten(arguments)
    types = [(getattr(x, "dtype", type(x)), getattr(x, "weak_type", None)) for x in leaves]
    return tree, tuple(types), tuple(map(np.shape, leaves)), bool(jax.config.jax_enable_x64)


class _Place:
    """What has an array as a Ref has."""

    _buf: Any = None


@cache
def refs_are_open() -> bool:
    """Whether a Ref of this version of JAX holds its array where `Program` takes it out."""
    try:
        ref = jax.new_ref(jnp.zeros(()))
        is_known = type(ref._refs._buf) is _Array
        ref._refs._buf = jnp.ones(())
        return is_known and float(ref[...]) == 1.0 and float(jax.jit(lambda: ref[...])()) == 1.0
    except Exception:
        return False


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


def _forms(arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return [a.shape for a in arrays], [a.dtype for a in arrays]


def _is_real(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def _is_sparse(gradient: Any) -> bool:
    if type(gradient) is _Array:
        return False
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(gradient, sparse.BCOO)


def _dense_of(gradient: Any) -> Any:
    """A BCOO as an array: repeated indices are summed, in float32 at least, padding is dropped."""
    wide = jnp.float32 if gradient.dtype.name in HALVES else gradient.dtype
    data = gradient.data.astype(wide)
    return type(gradient)((data, gradient.indices), shape=gradient.shape).todense()


_dense = jax.jit(_dense_of)


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
