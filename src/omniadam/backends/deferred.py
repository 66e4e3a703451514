"""A parameter of PyTorch whose rows catch up when they are used: the weight of an embedding.

It keeps to itself which of its rows are behind, and `kernels.rows` says how they are brought up to
date. A forward pass does so with the rows that it looks up; whatever else reads or writes the
parameter through a function of PyTorch, with all of them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.rows import Clock

# Where functions of PyTorch see ordinary tensors (documented in "Extending PyTorch").
OUTSIDE = torch._C.DisableTorchFunctionSubclass


class Rows(nn.Parameter):  # type: ignore[misc]
    """A parameter of whose rows each step uses a few: see `omniadam.torch.Embedding`."""

    _deferral: Deferral | None = None

    @property
    def deferral(self) -> Deferral:
        """Which of the rows are behind, for the optimizer that steps them."""
        if self._deferral is None:
            self._deferral = Deferral()
        return self._deferral

    def flush(self) -> None:
        """Bring every row up to date.

        What reads the weight's memory past PyTorch's functions needs this before: `data_ptr()`, a
        tensor that `data` or `detach()` returned earlier, a broadcast of DistributedDataParallel.
        """
        if self._deferral is not None:
            self._deferral.flush()

    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor, as it is."""
        with OUTSIDE():
            tensor = self.detach()
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _unread():
            for each in _parameters((args, kwargs)):
                each.flush()
        with OUTSIDE():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.data, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        copied = memo[id(self)] = _rebuilt(self.data.clone(), self.requires_grad)
        return copied


def _rebuilt(data: Tensor, requires_grad: bool) -> Rows:
    return Rows(data, requires_grad)


def _parameters(value: Any) -> Iterator[Rows]:
    if isinstance(value, Rows):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _parameters(each)
    elif isinstance(value, dict):
        yield from _parameters(list(value.values()))


_UNREAD: set[Any] = set()


def _unread() -> set[Any]:
    """The functions that neither read nor write values."""
    if not _UNREAD:
        attributes = (
            "shape dtype device layout grad requires_grad is_leaf grad_fn _version ndim is_sparse "
            "is_cuda is_cpu is_meta is_quantized is_nested itemsize nbytes output_nr names "
            "_backward_hooks _post_accumulate_grad_hooks _grad retains_grad"
        )
        methods = (
            "size dim numel nelement stride storage_offset element_size is_contiguous data_ptr "
            "__len__ __hash__ register_hook register_post_accumulate_grad_hook requires_grad_ "
            "retain_grad is_complex is_floating_point is_inference is_neg is_conj "
            "untyped_storage is_same_size ndimension"
        )
        for name in attributes.split():
            found = getattr(Tensor, name, None)
            for verb in ("__get__", "__set__", "__delete__"):
                if hasattr(found, verb):
                    _UNREAD.add(getattr(found, verb))
        _UNREAD.update(getattr(Tensor, name) for name in methods.split() if hasattr(Tensor, name))
    return _UNREAD


class Deferral:
    """Which optimizer steps a parameter, and how far each of its rows has come."""

    def __init__(self) -> None:
        self.clock: Clock | None = None
        self._owner: Callable[[], Any] = lambda: None
        self._turn = threading.RLock()

    def claim(self, owner: Any, turn: Any, make: Callable[[], Clock]) -> Clock:
        """Be stepped by one optimizer from now on, whose lock this is; all rows come up to date."""
        if self._owner() is not owner or self.clock is None:
            self.flush()
            self._owner, self.clock, self._turn = weakref.ref(owner), make(), turn
        return self.clock

    def flush(self) -> None:
        """Bring every row up to date."""
        with self._turn:
            if self.clock is not None:
                self.clock.flush()

    def forget(self) -> None:
        """Be ready for what somebody is about to write to the state: rows are not as they began."""
        with self._turn:
            self.flush()
            if self.clock is not None:
                self.clock.is_fresh = False

    @property
    def is_behind(self) -> bool:
        """Whether there may be rows that have missed a step."""
        return self.clock is not None and self.clock.is_behind

    def catch_up(self, ids: Tensor) -> None:
        """Bring the rows with these numbers up to date; others, too, where there is no such row."""
        with self._turn:
            clock = self.clock
            if clock is None or not clock.is_behind:
                return
            rows = ids.detach().cpu().numpy().astype(np.int64, copy=False)
            if rows.size and rows.min() >= 0 and rows.max() < len(clock.seen):
                clock.catch_up_with(rows)  # else PyTorch says what is wrong
