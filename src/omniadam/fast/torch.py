"""PyTorch: a step is recognised by comparing all of its tensors in one call.

Private names of torch: `torch._C._dynamo.guards.TensorGuards`, which is tried on decoys;
`torch._dynamo.trace_rules.add`; and what tells whether anybody observes a step.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter, is_
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer

from .. import slow
from ..backends.base import Entry, Fast, Selection
from ..backends.host import Gradients
from ..kernels.cpu import Team
from . import openmp


class FastTorch(Fast):
    """Knows tensors by their types, forms and addresses: see `Placed` and `Known`."""

    def __init__(self) -> None:
        self._built: Placed | None = None
        self.hide_from_compiler()

    def note(self, selection: Selection, gathered: Gradients) -> None:
        located = gathered.located
        if located.known is None or not located.known.placed.holds():
            entries = selection.entries + selection.rest
            if self._built is None or not self.is_as_built(entries):
                self._built = Placed(entries)
            located.known = Known(self._built)
        located.known.like = None
        if not gathered.odd:
            located.known.like = Like(selection.entries, gathered.native, located.memory)

    def recognise(
        self, selection: Selection, gradients: list[Any], variables: list[Any]
    ) -> Gradients | None:
        self.hide_from_compiler()
        located = selection.prepared
        known = None if located is None else located.known
        if known is None or known.like is None:
            return None
        addresses = known.like.addresses(gradients, variables)
        if addresses is None or not known.placed.holds():
            return None
        return Gradients(addresses, gradients, {}, located)

    def is_located(self, selection: Selection) -> bool:
        """Whether everything lies where it did when it was located last."""
        known = selection.prepared.known
        return known is not None and known.placed.holds()

    def is_as_built(self, entries: Sequence[Entry]) -> bool:
        """Whether these are as they were when that was noted."""
        built = self._built
        return (
            built is not None
            and len(built.entries) == len(entries)
            and all(map(is_, built.entries, entries))
            and built.holds()
        )

    def note_built(self, entries: Sequence[Entry]) -> None:
        """Note that these are as they were built."""
        self._built = Placed(entries)

    def team(self) -> Team | None:
        """The threads that torch computes with, if they can be asked."""
        return openmp.team()

    def hide_from_compiler(self) -> None:
        """Let torch.compile call a step, if it is imported by now."""
        if "torch._dynamo" in sys.modules:
            _hide_from_compiler()


@cache
def _hide_from_compiler() -> None:
    """Let torch.compile call a step, not trace it: it would meet pointers, and compile in vain."""
    try:
        sys.modules["torch._dynamo"].trace_rules.add(__name__.partition(".")[0])
    except Exception:  # it is no public interface; steps are right without it, too
        slow.warn_gone(
            "torch",
            torch.__version__,
            "`torch._dynamo.trace_rules.add`",
            "torch.compile traces steps in vain before it calls them",
        )


def prefer_huge_pages(tensor: Tensor) -> None:
    """Have memory that nobody has written to in huge pages, as NumPy has its own.

    A step reads and writes the state from one end to the other: with pages of 4 KiB it waits for
    the processor to look up where they are.
    """
    advise, page = _madvise(), mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if advise is not None and stop > start:
        advise(start, stop - start, mmap.MADV_HUGEPAGE)  # what is refused changes nothing


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # of Linux
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return cast(Callable[[int, int, int], int], found)


def is_observed(stepping: Any) -> bool:
    """Whether torch's hooks or its profiler want to know of a step of this optimizer."""
    try:
        hooks = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
        if hooks or stepping._optimizer_step_pre_hooks or stepping._optimizer_step_post_hooks:
            return True
        # What is being compiled cannot ask.
        return not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()
    except AttributeError as error:  # another version of torch has other names for them
        slow.warn_gone(
            "torch",
            torch.__version__,
            f"what tells whether anybody observes a step ({error})",
            "each step of omniadam.torch runs torch's hooks and its profiler's record",
        )
        return True


class Known:
    """What is known of a selection: where it lies, and what its gradients were like."""

    def __init__(self, placed: Placed) -> None:
        self.placed = placed
        self.like: Like | None = None


_variable_of = attrgetter("variable")


class Placed:
    """Tensors as they are and where they lie, so that a glance shows whether that still holds."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        state = [each for e in entries for each in (*e.slots, e.accumulator, e.average)]
        every = [*map(_variable_of, entries), *(each for each in state if each is not None)]
        self._every, self._alike = every, _comparison(every)
        self._places = list(map(Tensor.data_ptr, every))

    def holds(self) -> bool:
        # A Keras variable may have another tensor by now.
        if not all(map(is_, map(_variable_of, self.entries), self._every)):
            return False
        every = self._every
        try:
            return self._alike(*every) and list(map(Tensor.data_ptr, every)) == self._places
        except RuntimeError:  # no memory
            return False


class Like:
    """What gradients looked like in the last step that was checked at length.

    Args:
        entries: that they were for.
        gradients: all in the variables' own types and orders of memory.
        spans: the memory that a step writes to, in order.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        gradients: Sequence[Tensor],
        spans: Sequence[tuple[int, int]],
    ) -> None:
        self._variables = [entry.variable for entry in entries]
        self._alike = _comparison(gradients)
        self._sizes = [(g.numel() * g.element_size(), g.element_size()) for g in gradients]
        self._starts = [start for start, _ in spans]
        self._stops = [stop for _, stop in spans]
        # By where they lay: allocators return the same few addresses again and again.
        self._seen: dict[tuple[int, ...], array[int]] = {}

    def addresses(self, gradients: list[Any], variables: list[Any]) -> array[int] | None:
        """The gradients' addresses, if they are for these variables and as they were."""
        own = self._variables
        if len(variables) != len(own) or not all(map(is_, variables, own)):
            return None
        try:
            # A nested tensor has no strides, and to be asked for them ends the process.
            if any(map(_is_nested, gradients)) or not self._alike(*gradients):
                return None
            places = tuple(map(Tensor.data_ptr, gradients))
        except (RuntimeError, TypeError):  # no memory, or no tensor
            return None
        return self._seen.get(places) or self._checked(places)

    def _checked(self, places: tuple[int, ...]) -> array[int] | None:
        for address, (size, alignment) in zip(places, self._sizes, strict=True):
            # Of the spans, which are disjoint, the last that begins before the gradient ends.
            i = bisect_left(self._starts, address + size) - 1
            overlaps = i >= 0 and self._stops[i] > address
            if size and (overlaps or address == 0 or address % alignment):
                return None
        if len(self._seen) >= 256:
            self._seen.clear()
        self._seen[places] = array("q", places)
        return self._seen[places]


_is_nested: Callable[[Any], bool] = Tensor.is_nested.__get__

# A comparison of tensors with those of an earlier step: the same types, devices, shapes, strides.
Comparison = Callable[..., bool]


def _comparison(tensors: Sequence[Tensor]) -> Comparison:
    compare = _compiled_comparison if _is_compiled_comparison_right() else _plain_comparison
    return compare(tensors)


def _compiled_comparison(tensors: Sequence[Tensor]) -> Comparison:
    # What torch.compile guards its functions with: all tensors in one call, some 60 ns for each.
    # It is no public interface, hence `_is_compiled_comparison_right`.
    from torch._C._dynamo.guards import TensorGuards

    sizes: list[Any] = [list(tensor.size()) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    found: Comparison = guards.check
    return found


@cache
def _is_compiled_comparison_right() -> bool:
    """Whether this version of torch has it, and it means here what this file believes it means."""
    try:
        is_right = _tells_apart(_compiled_comparison)
    except Exception:  # whatever another version may say to such a call
        is_right = False
    if not is_right:
        slow.warn_gone(
            "torch",
            torch.__version__,
            "`torch._C._dynamo.guards.TensorGuards`",
            "each step compares its tensors one by one",
        )
    return is_right


def _plain_comparison(tensors: Sequence[Tensor]) -> Comparison:
    expected = list(map(_looks, tensors))
    return lambda *given: list(map(_looks, given)) == expected


def _looks(value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    kind = type(value), value.device, value.dtype, value.is_neg()
    return *kind, value.size(), value.stride()


def _tells_apart(compare: Callable[[Sequence[Tensor]], Comparison]) -> bool:
    """Whether a comparison knows its own kind from all others."""
    with torch.inference_mode(False):
        own = torch.zeros(2, 3)
        alike = compare([own])
        others = (
            torch.zeros(2, 3, dtype=torch.float64),
            torch.zeros(2, 3, dtype=torch.int32),
            torch.zeros(3, 2),
            torch.zeros(6),
            torch.zeros(3, 2).t(),
            torch.zeros(2, 6)[:, :3],
            torch.zeros(2, 3, device="meta"),
            torch.zeros(2, 3).to_sparse(),
            torch.zeros(2, 3, dtype=torch.complex64).conj().imag,
            Parameter(own, requires_grad=False),
            np.zeros((2, 3), np.float32),
            None,
        )
        return alike(own) and alike(own.clone()) and not any(map(alike, others))
