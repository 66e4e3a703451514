"""PyTorch: tensors updated in place; on the CPU by the CPU kernels, on their own memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import setitem
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from .. import fast, options, versions
from ..kernels import layout
from ..kernels.cpu import SparseRows, Team
from ..kernels.layout import Operand, Region
from ..kernels.rows import Clock, Step, is_deferrable
from ..rule import Pass, Rule
from ..sparse import IndexedSlices
from ..tuned import HUGE
from . import sharded
from .base import (
    HALVES,
    Backend,
    Entry,
    Fast,
    Group,
    Selection,
    Stateless,
    Sums,
    received,
    takes_arguments,
)
from .deferred import Rows
from .functional import Functional
from .host import HostMemory, Numbers, check_distinct, twin_apply

versions.check("torch", torch.__version__)

Array = npt.NDArray[Any]

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_NO_MEMORY = (
    "has no memory that could be reached: its storage was freed, as by resize_(0), or it belongs "
    "to a transformation of torch.func or torch.compile. Step outside of those, on ordinary "
    "tensors."
)


class Elementwise:
    """Functions of tensors, any argument of which may be a number."""

    floor, ceil, cos, log, power = torch.floor, torch.ceil, torch.cos, torch.log, torch.pow

    @staticmethod
    def asarray_float(x: Tensor) -> Tensor:
        return x if x.is_floating_point() else x.to(torch.get_default_dtype())

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        return torch.where(torch.as_tensor(condition), a, b)

    # A number stays one: as a tensor it would be copied to the device, which waits for it.
    @staticmethod
    def minimum(a: Any, b: Any) -> Tensor:
        a, b = (a, b) if isinstance(a, Tensor) else (b, a)
        return torch.minimum(a, b) if isinstance(b, Tensor) else torch.clamp(a, max=b)

    @staticmethod
    def maximum(a: Any, b: Any) -> Tensor:
        a, b = (a, b) if isinstance(a, Tensor) else (b, a)
        return torch.maximum(a, b) if isinstance(b, Tensor) else torch.clamp(a, min=b)


class Tensors(Elementwise):
    """The functions that the rule is bound to on whole tensors."""

    sqrt, divide, abs, sign = torch.sqrt, torch.divide, torch.abs, torch.sign

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not isinstance(condition, Tensor):  # a coefficient, which is known on the host
            return a if condition else b
        return torch.where(condition != 0, a, b)

    @staticmethod
    def cast(x: Any, dtype: str) -> Any:
        return x.to(_BY_NAME[dtype]) if isinstance(x, Tensor) else float(x)

    @staticmethod
    def sum_of_squares(x: Tensor) -> Tensor:
        return torch.sum(x * x)

    @staticmethod
    def broadcast_like(value: Any, like: Tensor) -> Any:
        return value


class Torch(Backend):
    """What holds on every device."""

    name: ClassVar[str] = "torch"
    elementwise: ClassVar[Any] = Elementwise

    def __init__(self, variables: Sequence[Any] = ()) -> None:
        super().__init__(variables)
        # Counters live on the host, so that no step reads one back from a device: each tensor, an
        # array over its memory, and where that is.
        self._counters: dict[int, tuple[Tensor, Array, int]] = {}
        self._rows: dict[int, Rows] = {}  # whose slot it is, by the identity of that
        self._device = torch.device("cpu")  # of what is created for no variable in particular

    def make_fast(self) -> Fast:
        from ..fast.torch import FastTorch

        return FastTorch()

    @classmethod
    def kind_for(cls, variables: Sequence[Any]) -> type[Torch]:
        if all(map(_is_on_host, variables)):
            return TorchMemory
        from . import cuda

        return cuda.TorchCuda if cuda.can_step(variables) else TorchDevice

    def name_of(self, variable: Tensor) -> None:
        return None

    def stand_ins(self, entries: Sequence[Entry], variables: list[Any]) -> None:
        if self.fast is not None:
            self.fast.hide_from_compiler()

    def describe(self, variable: Any, name: str) -> Entry:
        if not isinstance(variable, Tensor):
            raise TypeError(
                f"Variable '{name}' must be a torch.Tensor. Received: {received(variable)}. Of a "
                "module, pass list(module.parameters()) or dict(module.named_parameters())."
            )
        if is_lazy(variable):
            raise ValueError(
                f"Variable '{name}' has no shape yet, as a parameter of a lazy module. Run the "
                "module once, then create the optimizer."
            )
        if variable.is_nested or variable.layout != torch.strided:
            raise TypeError(
                f"Variable '{name}' must be a dense tensor. Received one of layout "
                f"{'nested' if variable.is_nested else variable.layout} and dtype "
                f"{variable.dtype}. Train the dense tensors that it is made of."
            )
        dtype, shape = _DTYPES.get(variable.dtype), tuple(variable.shape)
        fault = None if dtype is None else self._fault(variable)
        if dtype is not None and fault is None:
            if isinstance(variable, Rows):
                return Entry(variable.plain(), name, shape, dtype, key=variable)
            return Entry(variable, name, shape, dtype)
        what = f"Variable '{name}' of shape {shape} and dtype {variable.dtype}"
        if dtype is None:
            advice = " Train torch.view_as_real() of it." if variable.is_complex() else ""
            raise TypeError(f"{what} must be float16, bfloat16, float32 or float64.{advice}")
        raise ValueError(f"{what} {fault}")

    def _fault(self, variable: Tensor) -> str | None:
        """Why a dense tensor of floats cannot be trained, if it cannot."""
        if variable.requires_grad and not variable.is_leaf:
            return (
                "is the result of a computation, so that no step can change it. Pass the leaf "
                "tensors it was computed from, or detach() of it."
            )
        if variable.is_neg():
            return "is a view with its sign flipped. Pass resolve_neg() of it."
        if not variable.is_contiguous() and not layout.is_injective(
            variable.shape, variable.stride()
        ):
            return (
                f"has elements that share memory (strides {variable.stride()}), as expand() "
                "makes. Pass clone() of it."
            )
        return _NO_MEMORY if self._lacks_memory(variable) else None

    def _lacks_memory(self, tensor: Tensor) -> bool:
        """Whether a dense tensor has not all of the memory that it speaks of."""
        return _is_plain(tensor) and not tensor.is_meta and not _has_memory(tensor)

    def zeros(self, entry: Entry, dtype: str) -> Tensor:
        with making_state():
            slot = zeros_like(entry.variable, _BY_NAME[dtype])
        if isinstance(entry.key, Rows):
            self._rows[id(slot)] = entry.key
        return slot

    def shown(self, variable: Tensor) -> Tensor:
        rows = self._rows.get(id(variable))
        if rows is None:
            return variable
        rows.flush()
        return variable.detach().clone()

    def create(self, value: Array) -> Tensor:
        with torch.inference_mode(False):
            held = np.array(value)
            tensor = torch.from_numpy(held)
            if held.ndim:
                return tensor.to(self._device)
        self._counters[id(tensor)] = tensor, held, _place_of(tensor)
        return tensor

    def _counter(self, variable: Tensor) -> Array | None:
        """The memory of a counter as an array; None of other tensors."""
        found = self._counters.get(id(variable))
        if found is None:
            return None
        tensor, held, address = found
        if _place_of(tensor) == address:
            return held
        # Its `data` was replaced.
        held = np.asarray(tensor.detach().cpu().numpy())
        tensor.data = torch.from_numpy(held)
        self._counters[id(tensor)] = tensor, held, _place_of(tensor)
        return held

    def value(self, variable: Tensor) -> Any:
        counter = self._counter(variable)
        return variable.item() if counter is None else counter.item()

    def writing(self, variable: Tensor, value: int) -> tuple[Any, ...]:
        counter = self._counter(variable)
        return (variable.fill_, value) if counter is None else (setitem, counter, ..., value)

    def rate(self, value: Any) -> float:
        return options.rate("learning_rate", value)  # type: ignore[no-any-return]

    def numpy(self, variable: Tensor) -> Array:
        tensor = self.shown(variable).detach().cpu().clone()
        return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())

    def assign(self, variable: Tensor, value: Any) -> None:
        counter = self._counter(variable)
        if counter is not None:
            counter[...] = value.item() if isinstance(value, Tensor) else value
            return
        if (rows := self._rows.get(id(variable))) is not None:
            rows.deferral.forget()
        with _writing(variable):
            if isinstance(value, (int, float)):
                variable.fill_(value)
            else:
                variable.copy_(value if isinstance(value, Tensor) else _of_numpy(value))

    def branch(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
        yes() if condition else no()

    def gradient(self, gradient: Any, entry: Entry) -> Any:
        """A dense or sparse COO tensor of floats that belongs to no graph."""
        variable = entry.variable
        what = f"The gradient of variable '{entry.name}'"
        if not isinstance(gradient, Tensor):
            raise TypeError(
                f"{what} must be a torch.Tensor. Received: {received(gradient)}. {_built(entry)}"
            )
        if isinstance(gradient, Parameter) and not isinstance(variable, Parameter):
            raise TypeError(
                f"{what} is an nn.Parameter, and the variable is none: pairs are (gradient, "
                f"variable), in this order. {_built(entry)}"
            )
        if gradient.is_nested or tuple(gradient.shape) != entry.shape:
            received_shape = "nested" if gradient.is_nested else tuple(gradient.shape)
            raise ValueError(
                f"{what} must have the variable's shape. Received shape {received_shape} and "
                f"dtype {gradient.dtype}. {_built(entry)}"
            )
        if gradient.is_complex() or gradient.dtype == torch.bool or gradient.is_quantized:
            raise TypeError(
                f"{what} must hold real numbers. Received dtype {gradient.dtype}. {_built(entry)}"
            )
        if gradient.device != variable.device:
            raise ValueError(
                f"{what} must be on the variable's device, {variable.device}. Received one on "
                f"{gradient.device}."
            )
        gradient = gradient.detach() if gradient.requires_grad else gradient
        if gradient.dtype not in _DTYPES:
            gradient = gradient.to(_BY_NAME[entry.slot_dtype])
        if gradient.layout == torch.sparse_coo:
            # In float32, so that repeated rows are summed in it.
            return gradient.float() if _DTYPES[gradient.dtype] in HALVES else gradient
        if gradient.layout != torch.strided:
            return gradient.to_dense()
        if gradient._is_zerotensor():
            return torch.zeros_like(gradient)
        if self._lacks_memory(gradient):
            raise ValueError(f"{what} {_NO_MEMORY}")
        return gradient.resolve_neg()

    def copied(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def place(self, selection: Selection) -> Any:
        """Where everything lay when it was gathered, to compare with where it lay before."""
        raise NotImplementedError

    def update_each(
        self, group: Group, gradients: Any, update: Callable[[Any, Entry], None]
    ) -> None:
        with torch.no_grad():  # of a user's arithmetic on parameters
            super().update_each(group, gradients, update)  # type: ignore[safe-super]

    def stateless_apply(
        self, call: Stateless, state: list[Any], gradients: list[Any], variables: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        return twin_apply(call.optimizer, state, gradients, variables, self.copied)

    def differentiate(
        self, loss: Any, variables: Sequence[Tensor], grad_loss: Any, scale: Callable[[Any], Any]
    ) -> list[Any]:
        with torch.inference_mode(False), torch.enable_grad():
            sources = list(variables)
            value = loss
            if not isinstance(loss, Tensor) and callable(loss):
                if takes_arguments(loss):
                    sources = [v if v.requires_grad else _recording(v) for v in variables]
                    value = loss(*sources)
                else:
                    value = loss()
            _check_loss(value, grad_loss)
            frozen = [i for i, v in enumerate(sources) if not v.requires_grad]
            if frozen:
                raise ValueError(
                    f"Variables {frozen} of {len(sources)} do not require gradients. Call "
                    "requires_grad_() on them, leave them out, or give a loss that takes the "
                    "variables as arguments."
                )
            if not value.requires_grad:
                raise ValueError(
                    "`loss` does not depend on any variable: nothing on its way to the value "
                    "recorded a gradient. Was it computed under torch.no_grad(), or detached?"
                )
            if grad_loss is not None:
                grad_loss = torch.as_tensor(grad_loss, dtype=value.dtype, device=value.device)
                if grad_loss.shape != value.shape:
                    raise ValueError(
                        f"`grad_loss` must have the shape of the loss, {tuple(value.shape)}. "
                        f"Received shape {tuple(grad_loss.shape)}."
                    )
            return list(torch.autograd.grad(scale(value), sources, grad_loss, allow_unused=True))


def _check_loss(value: Any, grad_loss: Any) -> None:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    if not is_real or (grad_loss is None and value.numel() != 1):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        dtype = f" and dtype {value.dtype}" if isinstance(value, Tensor) else ""
        raise ValueError(
            f"`loss` must be, or return, a tensor of one real number. Received: {received(value)}"
            f"{shape}{dtype}. Take its mean or sum, or pass `grad_loss` of the same shape."
        )


@contextmanager
def making_state() -> Iterator[None]:
    """In which tensors that are made are ordinary ones, whatever the context."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def zeros_like(variable: Tensor, dtype: torch.dtype) -> Tensor:
    """A slot, whatever the variable it is made for."""
    slot = torch.empty_like(variable, dtype=dtype, requires_grad=False)
    if slot.numel() * slot.element_size() >= HUGE and fast.is_enabled() and _is_on_host(slot):
        from ..fast.torch import prefer_huge_pages

        prefer_huge_pages(slot)
    return slot.zero_()


def _built(entry: Entry) -> str:
    return f"The variable has shape {entry.shape} and dtype {entry.dtype}."


def _recording(variable: Tensor) -> Tensor:
    """The same memory as a leaf that records gradients."""
    if variable.is_inference():
        variable = variable.clone()
    return variable.detach().requires_grad_()


def _writing(variable: Tensor) -> Any:
    """The context in which a variable can be written to in place."""
    return torch.inference_mode() if variable.is_inference() else torch.no_grad()


def _of_numpy(value: Any) -> Tensor:
    copy = np.array(value)  # torch warns of an array that it could not write to
    return torch.from_numpy(copy.astype(np.float32) if copy.dtype.name == "bfloat16" else copy)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor itself: of a DTensor, say, the values lie in other tensors."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _place_of(tensor: Tensor) -> int:
    """Where a plain tensor lies; others would not be asked without a warning."""
    return tensor.data_ptr() if _is_plain(tensor) else 0


def _is_on_host(variable: Any) -> bool:
    is_tensor = isinstance(variable, Tensor)
    return not is_tensor or (variable.device.type == "cpu" and _is_plain(variable))


def _has_memory(tensor: Tensor) -> bool:
    """Whether a dense tensor lies within a storage that is there."""
    try:
        # Inside a transformation detach() wraps an ordinary tensor, too.
        return tensor.numel() == 0 or _is_held(tensor.detach())
    except (RuntimeError, NotImplementedError):
        return False


def _is_held(tensor: Tensor) -> bool:
    """The same of what is no part of a transformation."""
    try:
        end = (tensor.storage_offset() + _reach(tensor)) * tensor.element_size()
        held = tensor.untyped_storage().nbytes()
        return _place_of(tensor) != 0 and bool(end <= held)
    except (RuntimeError, NotImplementedError):
        return False


def _tensors(entry: Entry) -> list[Tensor]:
    """All that a step may write to."""
    every = (entry.variable, *entry.slots, entry.accumulator, entry.average)
    return [tensor for tensor in every if tensor is not None]


def _reach(tensor: Tensor) -> int:
    """The number of elements from the first in memory to the last, those between included."""
    if tensor.is_contiguous():
        return tensor.numel()  # type: ignore[no-any-return]
    return 1 + int(sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True)))


def _region_of(tensor: Tensor) -> Region:
    """Where a plain tensor lies. `Tensor.numpy()` would hold the memory, but never again let the
    user resize it, as FSDP does.
    """
    size = tensor.element_size()
    strides = tuple([size * stride for stride in tensor.stride()])
    return Region(tensor.data_ptr(), tuple(tensor.shape), strides, size)


_HELPERS = Team(torch.get_num_threads)


class TorchMemory(Torch, HostMemory):
    """Tensors on the CPU."""

    functions: ClassVar[Any] = Numbers
    arrays: ClassVar[Any] = Tensors

    def region(self, values: Tensor) -> Region:
        return _region_of(values)

    def operand(self, entry: Entry) -> Operand:
        # Variables and gradients were looked at before.
        for held in (*entry.slots, entry.accumulator, entry.average):
            if held is not None and held.numel() and not _is_held(held):
                raise ValueError(
                    f"The optimizer's state for variable '{entry.name}' has no memory any more. "
                    "Write to state variables in place, or use set_weights()."
                )
        return super().operand(entry)

    def dtype(self, values: Tensor) -> str:
        return _DTYPES.get(values.dtype, "")

    def floats(self, values: Any, entry: Entry) -> Tensor:
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values.detach()
        return tensor.to(_BY_NAME[entry.slot_dtype])

    @property
    def team(self) -> Team:
        own = None if self.fast is None else self.fast.team()
        return _HELPERS if own is None else own

    def describe(self, variable: Any, name: str) -> Entry:
        entry = super().describe(variable, name)
        if not _is_on_host(variable):
            raise ValueError(
                f"Variable '{name}' must stay on the CPU, where this optimizer was built. It is "
                f"now on {variable.device}. Create the optimizer after moving the module."
            )
        return entry

    def gradient(self, gradient: Any, entry: Entry) -> Any:
        gradient = super().gradient(gradient, entry)
        if gradient.layout != torch.sparse_coo:
            if not _is_plain(gradient):
                raise TypeError(
                    f"The gradient of variable '{entry.name}' must be an ordinary tensor, as the "
                    f"variable is. Received: {received(gradient)}."
                )
            return gradient
        if gradient.sparse_dim() != 1:
            return gradient.to_dense()
        values, (rows,) = gradient._values().resolve_neg(), gradient._indices()
        of_values, of_rows = np.dtype(_DTYPES[values.dtype]), np.dtype(np.int64)
        slices = IndexedSlices(
            _region_of(values).array(of_values), _region_of(rows).array(of_rows), entry.shape
        )
        return SparseRows(*slices.coalesce())

    def place(self, selection: Selection) -> Any:
        return selection.prepared.places

    def is_located(self, selection: Selection) -> bool:
        for entry in (*selection.entries, *selection.rest):
            if isinstance(entry.key, Rows):
                now = entry.key.plain()
                if sharded.place(now) != sharded.place(entry.variable):
                    entry.variable = now  # its `data` was replaced
        return self.fast is not None and bool(self.fast.is_located(selection))

    def is_apart(self, entry: Entry) -> bool:
        return isinstance(entry.key, Rows)

    def pass_over(
        self, kind: Pass, rule: Rule, entry: Entry, operand: Operand, gradient: Any, dtype: str
    ) -> Any:
        if isinstance(entry.key, Rows):
            deferral = entry.key.deferral
            is_flat = layout.is_in_order(operand.variable) and layout.is_regular(operand)
            if isinstance(gradient, SparseRows) and is_flat and is_deferrable(kind, rule):
                clock = deferral.claim(self, self.turn, lambda: self._clock(entry))
                return Step(clock, kind, rule, operand, _tensors(entry), gradient, dtype)
            if not kind.measures_only:
                deferral.forget()
        return super().pass_over(kind, rule, entry, operand, gradient, dtype)

    def _clock(self, entry: Entry) -> Clock:
        clock = Clock(entry.shape[0], self.turn, self.team)
        integers = torch.int64 if entry.slot_dtype == "float64" else torch.int32
        # Slots that are in the user's hands, in a state of torch's, may be written to at any time.
        clock.is_fresh = all(
            id(slot) in self._rows and not slot.view(integers).any() for slot in entry.slots
        )
        return clock

    def check_built(self, entries: Sequence[Entry]) -> None:
        if self.fast is None or not self.fast.is_as_built(entries):
            super().check_built(entries)
            if self.fast is not None:
                self.fast.note_built(entries)

    def clear(self, selection: Selection, gradients: Any) -> None:
        torch.autograd.graph.increment_version([entry.accumulator for entry in selection.rest])
        super().clear(selection, gradients)

    def sweep(self, group: Group, gradients: Any) -> Sums:
        # As any operation in place: autograd must notice that what a graph saved is gone.
        kind, overwrites = group.kind, group.pass_c.overwrite != 0
        key, found = (id(kind), overwrites), gradients.located.written
        written = found.get(key)
        if written is None:
            written = found[key] = _written(kind, group.entries, overwrites)
        torch.autograd.graph.increment_version(written)
        return super().sweep(group, gradients)


def _written(kind: Pass, entries: Sequence[Entry], overwrites: bool) -> list[Tensor]:
    """The tensors that a pass changes, and that keep count of changes."""
    tensors: list[Any] = []
    for entry in entries:
        tensors += [entry.variable] if kind.updates or overwrites else []
        tensors += entry.slots if kind.updates else ()
        tensors += [entry.accumulator] if kind.accumulated else []
        tensors += [entry.average] if kind.averaged else []
    return tensors


class DeviceNumbers(Numbers):
    """Coefficients that may be on a device: norms are, so that no step waits for them."""

    @staticmethod
    def sqrt(x: Any) -> Any:
        return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return torch.clamp(a, min=b) if isinstance(a, Tensor) else Numbers.maximum(a, b)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not isinstance(condition, Tensor):
            return a if condition else b
        # Filled on the device: a number that is copied there would be waited for.
        # In double precision, unless it is a device that has none, which then has no such number.
        kinds = [x.dtype for x in (a, b) if isinstance(x, Tensor)]
        like = {"dtype": kinds[0] if kinds else torch.float64, "device": condition.device}
        found = [x if isinstance(x, Tensor) else torch.full((), x, **like) for x in (a, b)]
        return torch.where(condition, *found)


class TorchDevice(Torch, Functional):
    """Tensors elsewhere: the rule on torch's own functions, nothing read back by the host."""

    functions: ClassVar[Any] = DeviceNumbers
    arrays: ClassVar[Any] = Tensors

    # Nothing is traced: each value is stored as soon as it is known, so that a step needs no more
    # memory than one variable's.
    run = Backend.run

    def load(self, variable: Tensor) -> Any:
        return Torch.value(self, variable) if id(variable) in self._counters else variable.detach()

    def store(self, variable: Tensor, value: Any) -> None:
        Torch.assign(self, variable, value)

    def value(self, variable: Tensor) -> Any:
        return Torch.value(self, variable)

    def assign(self, variable: Tensor, value: Any) -> None:
        Torch.assign(self, variable, value)

    def check_distinct(self, entries: Sequence[Entry]) -> None:
        self._device = entries[0].variable.device
        regions: dict[torch.device, list[tuple[Entry, Region]]] = {}
        for entry in entries:
            for v in _tensors(entry):
                if _is_plain(v) and not v.is_meta:
                    regions.setdefault(v.device, []).append((entry, _region_of(v)))
        for each in regions.values():
            check_distinct(each)

    def place(self, selection: Selection) -> Any:
        tensors = [v for e in (*selection.entries, *selection.rest) for v in _tensors(e)]
        return [v.data_ptr() for v in tensors if _is_plain(v) and not v.is_meta]

    def gradient(self, gradient: Any, entry: Entry) -> Tensor:
        for held in (*entry.slots, entry.accumulator, entry.average):
            if held is not None and held.device != entry.variable.device:
                raise ValueError(
                    f"Variable '{entry.name}' must stay on {held.device}, where this optimizer "
                    f"was built. It is now on {entry.variable.device}. Create the optimizer after "
                    "moving the module."
                )
        gradient = super().gradient(gradient, entry)
        return gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient

    def sweep(self, group: Group, gradients: Any) -> Sums:
        if len(group.factors):  # norms over several devices were added up on one
            devices = [entry.variable.device for entry in group.entries]
            factors = [
                f.to(d, non_blocking=True) for f, d in zip(group.factors, devices, strict=True)
            ]
            group = group._replace(factors=factors)
        with torch.no_grad():
            return super().sweep(group, gradients)

    def square_sums(self, group: Group, gradients: Any) -> list[Any]:
        with torch.no_grad():
            sums = super().square_sums(group, gradients)
        device = next((s.device for s in sums if s.device.type != "cpu"), sums[0].device)
        return [each.to(device, non_blocking=True) for each in sums]


BACKEND = Torch
