"""PyTorch's tensors that are not plain: shards of distributed ones, and complex numbers.

A step runs on the ordinary tensor of real numbers inside; norms are added up over the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def dtensor() -> Any:
    """The class of distributed tensors, if there can be any."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def local(tensor: Any) -> Any:
    """The part of a distributed tensor that lies on this rank; others are whole."""
    return tensor._local_tensor if isinstance(tensor, dtensor()) else tensor


def inner(tensor: Tensor) -> Tensor:
    """The tensor of real numbers that a step runs on, in the same memory."""
    tensor = local(tensor)
    if tensor.is_complex():
        return torch.view_as_real(tensor.detach())
    # A step may change the result of a computation that was told to keep its gradient.
    return tensor if tensor.is_leaf else tensor.detach()


def gradient_of(gradient: Any, p: Tensor) -> Any:
    """The gradient of `inner(p)`."""
    if isinstance(p, dtensor()):
        if not isinstance(gradient, dtensor()):
            raise TypeError(
                "The gradient of a DTensor must be a DTensor. Received: "
                f"{type(gradient).__qualname__} of shape {tuple(gradient.shape)}."
            )
        with torch.no_grad():
            if gradient.placements != p.placements:
                gradient = gradient.redistribute(placements=p.placements)
        gradient = gradient._local_tensor
        if hasattr(gradient, "wait"):  # of a communication that may still be under way
            gradient = gradient.wait()
    if isinstance(gradient, Tensor) and gradient.is_complex() and p.is_complex():
        return torch.view_as_real(gradient.detach().resolve_conj())
    return gradient


def is_valueless(tensor: Tensor) -> bool:
    """Whether it has a shape but no values: on the meta device, or in a FakeTensorMode."""
    fake: Any = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
    return tensor.is_meta or isinstance(tensor, fake)


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same elements of the same memory."""
    tensor = local(tensor)
    if tensor.layout != torch.strided or is_valueless(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def looks(tensor: Tensor) -> tuple[Any, ...]:
    """What of a parameter its state must follow."""
    tensor = local(tensor)
    return tensor.shape, tensor.dtype, tensor.device


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where and how a tensor that is whole, or the part of one, lies in memory."""
    return tensor.data_ptr(), tensor.stride(), tensor.is_conj(), tensor.is_neg(), *looks(tensor)


def lies_like(a: Tensor, b: Tensor) -> bool:
    """Whether a has the order of memory that a tensor made like b would have."""
    return bool(a.stride() == b.stride() or a.stride() == torch.empty_like(b).stride())


def has_values(gradient: Tensor) -> bool:
    """Whether any element of a gradient is not zero, on whatever rank."""
    if is_valueless(gradient):
        return True
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    norm = torch.linalg.vector_norm(gradient.detach(), ord=1)  # which does not underflow
    return bool(norm.full_tensor() if isinstance(norm, dtensor()) else norm)


class Mesh:
    """The parameters whose shards lie on the same ranks, along some dimensions of a device mesh."""

    def __init__(self, mesh: Any, dimensions: tuple[int, ...]) -> None:
        self._mesh, self._dimensions = mesh, dimensions
        self.positions: list[int] = []

    def add_up(self, places: Mapping[int, tuple[list[Any], int]]) -> None:
        """Replace sums over this rank's shards by those over all shards.

        Args:
            places: by the position of its parameter, the list that a sum stands in, and where.
                Parameters without one take part, so that no rank waits for what does not come.
        """
        found = [places.get(position) for position in self.positions]
        mine = [0.0 if place is None else place[0][place[1]] for place in found]
        device = self._mesh.device_type
        # Made there: a number that is copied to a device would be waited for.
        like = {"dtype": torch.float64, "device": device}
        total = torch.stack(
            [s.to(**like) if isinstance(s, Tensor) else torch.full((), s, **like) for s in mine]
        )
        for dimension in self._dimensions:
            torch.distributed.all_reduce(total, group=self._mesh.get_group(dimension))
        values = total.tolist() if device == "cpu" else list(total.unbind())
        for place, value in zip(found, values, strict=True):
            if place is not None:
                place[0][place[1]] = value


def meshes(params: Sequence[Tensor]) -> list[Mesh]:
    """The meshes that parameters are sharded over, with which of them are."""
    found: dict[Any, Mesh] = {}
    kind = dtensor()
    for position, p in enumerate(params):
        if isinstance(p, kind):
            sharded = tuple(i for i, each in enumerate(p.placements) if not each.is_replicate())
            if sharded:
                mesh = found.setdefault((p.device_mesh, sharded), Mesh(p.device_mesh, sharded))
                mesh.positions.append(position)
    return list(found.values())


def may_be_flat(params: Sequence[Tensor]) -> bool:
    """Whether some are shards of FSDP1, ordinary tensors that do not say what they are part of."""
    return any(map(_is_flat, params)) or not _are_flat_ones_marked()


def _is_flat(p: Tensor) -> bool:
    return hasattr(p, "_fsdp_flattened") or type(p).__name__ == "FlatParameter"


def _are_flat_ones_marked() -> bool:
    """Whether FSDP1, where it may be in use, marks its shards as `_is_flat` believes it does."""
    if "torch.distributed.fsdp" not in sys.modules or not torch.distributed.is_initialized():
        return True
    try:
        from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

        mark: Any = torch.empty(0, device="cpu")
        _set_fsdp_flattened(mark)
    except Exception:  # whatever another version may say to that
        return False
    return _is_flat(mark)
