"""PyTorch's tensors on NVIDIA GPUs: what `kernels/triton.py` compiles, its tables and its launches.

A step is a launch for each device, element type and decay, and two more with a norm. Nothing waits
for a device. What a launch reads beside the tensors, tables of addresses, stays on the device: that
of the gradients is kept by the addresses, of which an allocator returns the same few again and
again, so that a step whose addresses are known uploads nothing.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import slow
from ..kernels import cpu, layout
from ..kernels.layout import Operand
from ..rule import Pass, Rule, clip_factor
from .base import Entry, Group, Part, Selection, Sums, nothing_measured
from .host import Gradients, _overlaps, _spans
from .torch import TorchDevice, _is_plain, _region_of, _tensors, _written, making_state

Int64s = npt.NDArray[np.int64]

# For how many sets of addresses a table of gradients is kept.
_TABLES = 256


# --- whether there are kernels ---


def why_not() -> str:
    """Why the kernels for a GPU cannot be used, in words; empty if they can."""
    choice = cpu.choice()
    if choice not in ("", "triton"):
        return f"OMNIADAM_KERNEL is {choice}"
    if torch.version.hip is not None:
        return "they are for NVIDIA's GPUs"
    return _problem()


@cache
def _problem() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed, which comes with PyTorch's packages for CUDA on Linux"
    try:
        from ..kernels import triton as _  # noqa: F401
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return ""


def can_step(variables: Sequence[Any]) -> bool:
    """Whether the kernels can step these variables: plain tensors, on NVIDIA GPUs all of them."""
    if not variables or not all(map(is_there, variables)):
        return False
    problem = why_not()
    if not problem:
        problem = next(filter(None, (gpu_of(v.device).problem for v in variables)), "")
    if problem and cpu.choice() == "triton":
        raise RuntimeError(
            f"OMNIADAM_KERNEL=triton asks for the kernels of GPUs, which cannot be used: {problem}."
        )
    if problem and cpu.choice() == "":
        slow.warn(
            f"the kernels for GPUs cannot be used: {problem}. Steps are made by PyTorch's own "
            "functions, a dozen launches for each parameter. Where that is meant, "
            "OMNIADAM_KERNEL=numba says so."
        )
    return not problem


def is_there(variable: Any) -> bool:
    """Whether it is a plain tensor on an NVIDIA GPU."""
    return isinstance(variable, Tensor) and is_on_gpu(variable) and _is_plain(variable)


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether it is on a GPU, itself or what it is made of."""
    return bool(tensor.device.type == "cuda")


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    # Asked of what is in use only: to look for a device begins CUDA, and a fork must not.
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def count_up(steps: list[Tensor], skip: Tensor | None) -> None:
    """Count a step on the device that these counts are on, unless it was skipped."""
    with torch.no_grad():
        if skip is None:
            torch._foreach_add_(steps, 1.0)
        else:
            made = (skip == 0).reshape(()).to(torch.float32)
            torch._foreach_add_(steps, made.to(steps[0].device, non_blocking=True))


# --- a device ---


# Pinned memory of the host, and as much on a device.
Spare = tuple[Tensor, Tensor]
# What Triton has compiled, and the arguments that are fixed by that.
Kernel = tuple[Any, tuple[Any, ...]]


class Gpu:
    """A device as steps see it: its memory, and what is launched on it.

    Args:
        device: of PyTorch, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kernels: dict[Any, Kernel] = {}
        self._lock = threading.Lock()
        # Pinned memory, and what tells that it was copied.
        self._pinned: list[tuple[Tensor, Any]] = []
        self._kept: list[Spare] = []  # of captures
        self._captured: list[tuple[Any, ...]] = []  # whose addresses are in graphs
        self.problem = self._tried()

    def _tried(self) -> str:
        """Why nothing can be launched, in words; empty if it can."""
        if self.is_capturing():
            return ""
        try:
            self._try()
        except Exception as error:  # of a compiler, of a file, of a driver
            said = " ".join(str(error).split())[:300]
            return f"Triton fails on {self.device} ({type(error).__name__}: {said})"
        return ""

    def _try(self) -> None:
        from ..kernels import triton as kernels

        table, out = self.uploaded(np.zeros(2, np.int64)), self.doubles(2)
        at = table.data_ptr()
        # Of no segment: it adds nothing up, and is otherwise the kernel that norms need.
        kernel = self.kernel(kernels.factor_kernel, None)
        self.launch(kernel, 1, at, at, out.data_ptr(), out.data_ptr(), 1.0)

    def is_capturing(self) -> bool:
        """Whether what is launched becomes part of a graph, to be replayed."""
        return torch.cuda.is_current_stream_capturing()  # type: ignore[no-any-return]

    @making_state()
    def doubles(self, count: int) -> Tensor:
        """Memory for as many numbers."""
        return torch.zeros(count, dtype=torch.float64, device=self.device)

    @making_state()
    def uploaded(self, values: Int64s, spare: Spare | None = None) -> Tensor:
        """A table on the device. It is copied by the current stream, and nothing waits for it.

        In a capture it is copied through spare memory, which a replay reads again.
        """
        if self.is_capturing():
            if spare is None:
                raise RuntimeError(WARM_UP)
            self._kept.append(spare)
            pinned, table = spare
            pinned.numpy()[:] = values.reshape(-1)
            return table.copy_(pinned, non_blocking=True)
        with self._lock:
            pinned = self._free(values.size)
        pinned.numpy()[: values.size] = values.reshape(-1)
        table = torch.empty(values.size, dtype=torch.int64, device=self.device)
        table.copy_(pinned[: values.size], non_blocking=True)
        with self._lock:
            self._pinned.append((pinned, self.event()))
        return table

    def _free(self, size: int) -> Tensor:
        """Pinned memory that nothing is copied from any more."""
        for k, (pinned, event) in enumerate(self._pinned):
            if pinned.numel() >= size and event.query():
                del self._pinned[k]
                return pinned
        return self.pinned(size)

    def pinned(self, size: int) -> Tensor:
        """New memory of the host from which is copied without a wait."""
        return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)

    def event(self) -> Any:
        """What tells when the current stream has come this far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    @making_state()
    def spare(self, size: int) -> Spare:
        """Memory for a table that is uploaded in a capture, where none can be allocated."""
        return self.pinned(size), torch.empty(size, dtype=torch.int64, device=self.device)

    def keep(self, *tables: Any) -> None:
        """In a capture: keep them for the life of the process, as the graph has their addresses."""
        if self.is_capturing():
            self._captured.append(tables)

    def release(self, table: Tensor) -> None:
        """Let memory be used again, once the current stream has done with it."""
        table.record_stream(torch.cuda.current_stream(self.device))

    def kernel(self, compile: Callable[..., tuple[Any, dict[str, Any]]], *of: Any) -> Kernel:
        """A kernel, which `compile` makes of `of` and a target, and its fixed arguments."""
        key = compile, *of
        found = self._kernels.get(key)
        if found is None:
            if self.is_capturing():
                raise RuntimeError(WARM_UP)
            kernel, constants = compile(*of, self._target())
            found = self._kernels[key] = kernel, tuple(constants.values())
        return found

    def launch(self, kernel: Kernel, programs: int, *arguments: Any) -> None:
        """Launch so many programs of a kernel on the current stream."""
        if programs:
            code, fixed = kernel
            # Without a tensor among the arguments, nothing else says which device it is.
            with torch.cuda.device(self.device):
                code[(programs, 1, 1)](*arguments, *fixed)

    def _target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = torch.cuda.get_device_capability(self.device)
        return GPUTarget("cuda", 10 * major + minor, 32)


WARM_UP = (
    "A step can be captured in a CUDA graph once its kernels are compiled and its tables have a "
    "place: make at least one step with the same parameters and settings before, on a side stream, "
    "as the page on CUDA graphs of PyTorch's documentation shows."
)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """What is kept for a device, for the life of the process."""
    return Gpu(device)


# --- what is prepared ---


@dataclass(eq=False)
class Launch:
    """A pass over those variables of one device that have one type, and decay or do not."""

    gpu: Gpu
    kind: Pass
    rule: Rule
    dtype: str
    indices: list[int]  # of the operands
    first: list[int]  # of each, its first chunk, and the end
    chunks: Tensor
    rows: Tensor
    partials: Tensor | None  # what a pass over gradients measures, a number for each chunk
    grads: dict[bytes, Tensor] = field(default_factory=dict)
    spare: Spare | None = None
    # By addresses, what captures upload in each replay: nobody else finds it filled.
    captured: dict[bytes, Spare] = field(default_factory=dict)

    def prepared(
        self,
        addresses: array[int],
        numbers: Sequence[float],
        on_device: tuple[int, ...],
        clock: Tensor | None,
        factors: Factors | None,
    ) -> Callable[[], None]:
        """What launches it, and cannot fail any more."""
        from ..kernels import triton as kernels

        joint = factors is not None and factors.joint
        scales = None if factors is None else factors.on(self.gpu.device)
        grads = self._table(addresses) if self.kind.gradient else None
        of = self.kind, self.rule, self.dtype, on_device, joint
        kernel = self.gpu.kernel(kernels.sweep_kernel, *of)
        held = self.chunks, self.rows, grads, scales, self.partials, clock
        self.gpu.keep(self.chunks, self.rows, grads, self.partials)

        def launch() -> None:
            self.gpu.launch(kernel, self.first[-1], *map(_address, held), tuple(numbers))

        return launch

    def _table(self, addresses: array[int]) -> Tensor:
        if len(self.indices) < len(addresses):
            addresses = array("q", [addresses[i] for i in self.indices])
        key = addresses.tobytes()
        found = self.grads.get(key)
        if found is None and self.gpu.is_capturing():
            return self._captured(key)
        if found is None:
            if len(self.grads) >= _TABLES:
                for table in self.grads.values():
                    self.gpu.release(table)
                self.grads.clear()
            found = self.grads[key] = self.gpu.uploaded(np.frombuffer(addresses, np.int64))
        if self.spare is None and not self.gpu.is_capturing():
            self.spare = self.gpu.spare(len(addresses))
        return found

    def _captured(self, key: bytes) -> Tensor:
        """A table that each replay fills anew, from memory that nobody else writes to."""
        pair = self.captured.get(key)
        if pair is not None:
            return pair[1].copy_(pair[0], non_blocking=True)
        pair, self.spare = self.spare, None
        table = self.gpu.uploaded(np.frombuffer(key, np.int64), pair)  # raises without a spare one
        assert pair is not None
        self.captured[key] = pair
        return table


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Factors(Sequence[Tensor]):
    """What gradients are multiplied by, doubles on a device: one for each, or one for all."""

    def __init__(self, values: Tensor, count: int, joint: bool) -> None:
        self._values, self._count, self.joint = values, count, joint

    def on(self, device: torch.device) -> Tensor:
        """The values on a device."""
        return self._values.to(device, non_blocking=True)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self._count))

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            raise TypeError("factors are asked for one by one")
        return self._values[0 if self.joint else i]


@dataclass(eq=False)
class Located:
    """What is prepared for a selection for as long as its variables and state lie where they do."""

    places: list[Any]
    memory: list[tuple[int, int]]  # the spans that a step writes to, in order
    operands: list[Operand | None]  # None of what no kernel takes as it lies in memory
    odd_rest: tuple[int, ...]
    # By the identities of a pass and a rule, which are kept for ever, and what is odd.
    plans: dict[Any, tuple[list[Launch], list[Tensor], Pass, Rule]] = field(default_factory=dict)
    sums: dict[Any, Any] = field(default_factory=dict)
    # Of the parts of the selection, by the identities of what they are known by.
    parts: dict[int, Located] = field(default_factory=dict)
    known: Any = None  # of `FastTorch`

    def part(self, part: Part, count: int) -> Located:
        """The same of a part, of a selection with so many gradients."""
        found = self.parts.get(id(part.since))
        if found is None:
            operands = [self.operands[i] for i in part.positions]
            operands += [self.operands[count + i] for i in part.rest]
            odd = tuple(k for k, i in enumerate(part.rest) if i in self.odd_rest)
            found = self.parts[id(part.since)] = Located(self.places, self.memory, operands, odd)
        return found


class TorchCuda(TorchDevice):
    """Tensors on NVIDIA GPUs. What no kernel takes goes the way of other devices."""

    # What is not zero, on the device, if this step is not to be made.
    skip: Tensor | None = None

    def place(self, selection: Selection) -> Any:
        return selection.prepared.places

    def gather(self, selection: Selection, gradients: list[Any]) -> Any:
        located = self._located(selection)
        plain = array("q", [0] * len(gradients))
        odd: dict[int, Any] = {}
        for i, (gradient, entry) in enumerate(zip(gradients, selection.entries, strict=True)):
            operand = located.operands[i]
            if operand is None or not _is_plain(gradient):
                odd[i] = gradient
                continue
            region = _region_of(gradient)
            if _overlaps(region, located.memory):
                gradients[i] = gradient = gradient.clone()
                region = _region_of(gradient)
            alike = gradient.dtype == entry.variable.dtype
            if alike and (not region.size or layout.lies_like(region, operand.variable)):
                plain[i] = region.address
            else:
                odd[i] = gradient
        gathered = Gradients(plain, gradients, odd, located)  # type: ignore[arg-type]
        if self.fast is not None:
            self.fast.note(selection, gathered)
        return gathered

    def part(self, gradients: Any, part: Part) -> Any:
        positions = part.positions
        return Gradients(
            array("q", [gradients.addresses[i] for i in positions]),
            [gradients.native[i] for i in positions],
            {k: gradients.odd[i] for k, i in enumerate(positions) if i in gradients.odd},
            gradients.located.part(part, len(gradients.native)),
        )

    def _located(self, selection: Selection) -> Located:
        before: Located | None = selection.prepared
        if before is not None and self.fast is not None and self.fast.is_located(selection):
            return before
        entries = selection.entries + selection.rest
        held = [_tensors(entry) for entry in entries]
        places = [
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            for each in held
            for tensor in each
        ]
        if before is not None and before.places == places:
            return before
        operands = [_operand(entry) for entry in entries]
        count = len(selection.entries)
        rest = (i for i, each in enumerate(operands[count:]) if each is None)
        regions = [_region_of(tensor) for each in held for tensor in each]
        selection.prepared = located = Located(places, _spans(regions), operands, tuple(rest))
        return located

    def sweep(self, group: Group, gradients: Any) -> Sums:
        from ..kernels import triton as kernels

        if is_capturing():
            raise RuntimeError(
                "omniadam.Adam counts steps on the host: a CUDA graph would repeat one of them for "
                "ever. Use omniadam.torch with capturable=True."
            )
        if kernels.why_not(group.kind) or not _can_compile(group.rule):
            return super().sweep(group, gradients.native)
        for call in self.prepared(group, gradients):
            call()
        return nothing_measured

    def prepared(self, group: Group, gradients: Any) -> list[Callable[[], Any]]:
        """What makes a pass that kernels take, when it is called: all that can fail is done."""
        kind, located = group.kind, gradients.located
        odd = tuple(gradients.odd) if kind.gradient else located.odd_rest
        launches, written = self._planned(group, located, odd)
        factors = _factors(group) if kind.clipped_by_factor else None
        numbers = [*group.pass_c, *group.rule_c]
        every = [self.skip, *numbers]
        on_device = tuple(k for k, number in enumerate(every) if isinstance(number, Tensor))
        host = [0.0 if isinstance(number, Tensor) else float(number) for number in numbers]
        clocks: dict[torch.device, Tensor | None] = {}
        calls: list[Callable[[], Any]] = []
        for launch in launches:
            device = launch.gpu.device
            if device not in clocks:
                clocks[device] = _clock([every[k] for k in on_device], device)
            calls.append(
                launch.prepared(gradients.addresses, host, on_device, clocks[device], factors)
            )
        if odd:
            calls.append(partial(self._sweep_odd, group, gradients, odd))
        return [*calls, partial(torch.autograd.graph.increment_version, written)]

    def _sweep_odd(self, group: Group, gradients: Any, odd: Sequence[int]) -> None:
        assert self.skip is None, "what skips a step on the device is read by kernels alone"
        entries = tuple(group.entries[i] for i in odd)
        selection = Selection(entries, ()) if group.kind.gradient else Selection((), entries)
        factors = [group.factors[i] for i in odd] if len(group.factors) else ()
        part = group._replace(selection=selection, factors=factors)
        given = [gradients.native[i] for i in odd] if group.kind.gradient else []
        super().sweep(part, given)

    def _planned(
        self, group: Group, located: Located, odd: Sequence[int]
    ) -> tuple[list[Launch], list[Tensor]]:
        key = (id(group.kind), id(group.rule), group.pass_c.overwrite != 0, *odd)
        found = located.plans.get(key)
        if found is None:
            found = located.plans[key] = *self._plan(group, located, odd), group.kind, group.rule
        launches, written, *_ = found
        return launches, written

    def _plan(
        self, group: Group, located: Located, odd: Sequence[int]
    ) -> tuple[list[Launch], list[Tensor]]:
        count = len(group.selection.entries)
        operands = located.operands[:count] if group.kind.gradient else located.operands[count:]
        groups: dict[Any, list[int]] = {}
        for i, entry in enumerate(group.entries):
            if i not in odd:
                decayed = group.kind.decayed and entry.decayed
                key = entry.variable.device, entry.dtype, decayed
                groups.setdefault(key, []).append(i)
        launches = [
            _launch(gpu_of(device), group.kind._replace(decayed=decayed), group.rule, found, by)
            for (device, _, decayed), by in groups.items()
            if (found := [operands[i] for i in by])
        ]
        regular = [entry for i, entry in enumerate(group.entries) if i not in odd]
        overwrites = group.pass_c.overwrite != 0
        return launches, _written(group.kind, regular, bool(overwrites))

    # --- norms ---

    def square_sums(self, group: Group, gradients: Any) -> list[Any]:
        found = self._measured(group, gradients)
        if found is None:
            return super().square_sums(group, gradients.native)
        sums: list[Any] = [None] * len(group.entries)
        for gpu in {launch.gpu for launch in found}:
            mine = [launch for launch in found if launch.gpu is gpu]
            values, _ = Added.over(gradients.located, mine, joint=False).run(None, 0.0)
            order = sorted(i for launch in mine for i in launch.indices)
            for i, value in zip(order, values.unbind(), strict=True):
                sums[i] = value
        first = sums[0].device
        return [each.to(first, non_blocking=True) for each in sums]

    def _measured(self, group: Group, gradients: Any) -> list[Launch] | None:
        """Launches whose partial sums are of all gradients; None if some are odd."""
        if gradients.odd:
            return None
        launches, _ = self._planned(group, gradients.located, ())
        on_device = tuple(k + 1 for k, c in enumerate(group.pass_c) if isinstance(c, Tensor))
        host = [0.0 if isinstance(c, Tensor) else float(c) for c in group.pass_c]
        for launch in launches:
            clock = _clock([group.pass_c[k - 1] for k in on_device], launch.gpu.device)
            launch.prepared(gradients.addresses, host, on_device, clock, None)()
        return launches

    def clip_factors(
        self, group: Group, gradients: Any, clip: Any, threshold: float
    ) -> Sequence[Any]:
        found = clip_factors([(self, group, gradients)], clip, [threshold])
        if found is None:
            return super().clip_factors(group, gradients, clip, threshold)
        return found[0][0]

    def update_each(
        self, group: Group, gradients: Any, update: Callable[[Any, Entry], None]
    ) -> None:
        super().update_each(group, gradients.native, update)


def clip_factors(
    parts: Sequence[tuple[TorchCuda, Group, Any]], clip: Any, thresholds: Sequence[float]
) -> list[list[Factors]] | None:
    """What the gradients of some passes are multiplied by, for each threshold a list.

    Args:
        parts: backends, the passes that measure gradients, and what was gathered.
        clip: a `NormClip`.
        thresholds: of the norm.

    Returns:
        None if a kernel cannot see all gradients, or they lie on several devices.
    """
    if any(gradients.odd for _, _, gradients in parts):
        return None
    devices = {e.variable.device for _, group, _ in parts for e in group.entries}
    if len(devices) != 1:
        return None
    launches = [backend._measured(group, gradients) or [] for backend, group, gradients in parts]
    every = [launch for each in launches for launch in each]
    located = parts[0][2].located
    joint = clip.joint
    function = clip.factor if joint else clip_factor
    counts = [len(group.entries) for _, group, _ in parts]
    found = []
    for threshold in thresholds:
        _, values = Added.over(located, every, joint).run(function, threshold)
        found.append([Factors(values, count, joint) for count in counts])
    return found


class Added:
    """Partial sums that are added up: of each variable, or of all."""

    def __init__(self, launches: Sequence[Launch], joint: bool) -> None:
        self._gpu, self._launches = launches[0].gpu, launches
        rows: list[tuple[int, int, int]] = []
        for launch in launches:
            at = _address(launch.partials)
            if joint:
                rows.append((0, at, launch.first[-1]))
            else:
                bounds = zip(launch.indices, launch.first, launch.first[1:], strict=False)
                rows += [(i, at + 8 * start, stop - start) for i, start, stop in bounds]
        rows.sort()
        self._count = 1 if joint else len(rows)
        firsts = [0, len(rows)] if joint else range(len(rows) + 1)
        self._segments = self._gpu.uploaded(np.array([row[1:] for row in rows], np.int64))
        self._firsts = self._gpu.uploaded(np.array(firsts, np.int64))

    @classmethod
    def over(cls, located: Located, launches: Sequence[Launch], joint: bool) -> Added:
        """What is prepared for these, or is so now."""
        key = (joint, *map(id, launches))
        found = located.sums.get(key)
        if found is None:
            if len(located.sums) >= _TABLES:
                located.sums.clear()
            found = located.sums[key] = cls(launches, joint)
        made: Added = found
        return made

    def run(self, clip: Any, threshold: float) -> tuple[Tensor, Tensor]:
        """The sums, and what is made of each; both are as good as the next step is far."""
        from ..kernels import triton as kernels

        values = torch.empty(2, self._count, dtype=torch.float64, device=self._segments.device)
        sums, factors = values.unbind()
        self._gpu.keep(self._segments, self._firsts)
        arguments = (*map(_address, (self._segments, self._firsts, sums, factors)), threshold)
        kernel = self._gpu.kernel(kernels.factor_kernel, clip)
        self._gpu.launch(kernel, self._count, *arguments)
        return sums, factors


@cache
def _can_compile(rule: Rule) -> bool:
    """Whether Triton takes a rule; those of users may be written in what it does not know."""
    from ..kernels import triton as kernels

    try:
        kernels.bound(rule.bind(kernels.Functions))
    except Exception as error:
        slow.warn(
            f"Triton cannot compile the rule of {rule.make.__qualname__}: {error} Steps are made "
            "by PyTorch's own functions."
        )
        return False
    return True


def _operand(entry: Entry) -> Operand | None:
    """Where a variable and its state lie; None if no kernel takes them so."""
    every = _tensors(entry)
    device = entry.variable.device
    kinds = [entry.dtype, *[entry.slot_dtype] * (len(every) - 1)]
    for tensor, kind in zip(every, kinds, strict=True):
        name = str(tensor.dtype).removeprefix("torch.")
        if name != kind or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"Variable '{entry.name}' and its state must be as they were built: of shape "
                f"{entry.shape} and dtype {kind}. Received shape {tuple(tensor.shape)} and dtype "
                f"{name}. Create a new optimizer for it."
            )
    if not all(_is_plain(tensor) and tensor.device == device for tensor in every):
        return None
    operand = Operand(
        entry.dtype,
        _region_of(entry.variable),
        tuple(map(_region_of, entry.slots)),
        None if entry.accumulator is None else _region_of(entry.accumulator),
        None if entry.average is None else _region_of(entry.average),
    )
    return operand if not operand.variable.size or layout.is_regular(operand) else None


def _launch(
    gpu: Gpu, kind: Pass, rule: Rule, operands: Sequence[Any], indices: list[int]
) -> Launch:
    from ..kernels import triton as kernels

    dtype, sizes = operands[0].dtype, [operand.variable.size for operand in operands]
    chunks = kernels.chunk_table(sizes, dtype)
    addresses = [
        [0 if region is None else region.address for region in operand.streams(kind)]
        for operand in operands
    ]
    rows = kernels.row_table(addresses, sizes, indices, rule)
    first = np.searchsorted(chunks >> 32, np.arange(len(sizes) + 1)).tolist()
    return Launch(
        gpu,
        kind,
        rule,
        dtype,
        indices,
        first,
        gpu.uploaded(chunks),
        gpu.uploaded(rows),
        gpu.doubles(len(chunks)) if kind.measured else None,
    )


def _clock(values: Sequence[Any], device: torch.device) -> Tensor | None:
    if not values:
        return None
    return torch.stack([value.detach().reshape(()).to(device, torch.float64) for value in values])


def _factors(group: Group) -> Factors:
    """Those of a group, whoever has computed them."""
    if isinstance(group.factors, Factors):
        return group.factors
    device = group.entries[0].variable.device
    values = [
        torch.as_tensor(each, dtype=torch.float64).to(device, non_blocking=True)
        for each in group.factors
    ]
    return Factors(torch.stack(values), len(values), joint=False)
