"""An NVIDIA GPU as steps of PyTorch's tensors see it: its memory, its kernels, what is launched.

Nothing here waits for a device, except the step that is tried once on each. What a launch reads
beside the tensors, tables of addresses, stays on the device: that of the gradients is kept by the
addresses, of which an allocator returns the same few again and again, so that a step whose
addresses are known uploads nothing.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.layout import Operand
from ..rule import AdamCoefficients, Pass, PassCoefficients, Rule, make_adam
from .torch import _region_of, making_state

Int64s = npt.NDArray[np.int64]

# For how many sets of addresses a table of gradients is kept.
TABLES = 256
# So many sets of addresses that no step has met may be captured, until the next step that is not.
SPARES = 4


class CannotCompile(RuntimeError):
    """A kernel that Triton does not compile, or that cannot be loaded. It is not tried again."""


class Table:
    """Memory of a device that launches read or write, on whatever streams they are made.

    Args:
        tensor: the memory.
        stream: on which it was allocated, and filled.
    """

    __slots__ = ("_address", "_streams", "tensor")

    def __init__(self, tensor: Tensor, stream: Any) -> None:
        self.tensor, self._streams = tensor, {stream}
        self._address: int = tensor.data_ptr()

    def on(self, stream: Any) -> int:
        """Its address for a launch on a stream, which its memory then lives as long as."""
        if stream not in self._streams:
            self.tensor.record_stream(stream)
            self._streams.add(stream)
        return self._address


# Pinned memory of the host, and as much on a device.
Spare = tuple[Tensor, Table]
# What Triton has compiled, and the arguments that are fixed by that.
Kernel = tuple[Any, tuple[Any, ...]]


class Gpu:
    """A device: its memory, and what is launched on it.

    Args:
        device: of PyTorch, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kernels: dict[Any, Kernel | CannotCompile] = {}
        self._lock = threading.Lock()
        # Pinned memory, and what tells that it was copied.
        self._pinned: list[tuple[Tensor, Any]] = []
        self._kept: list[Any] = []  # whose addresses are in graphs
        self.problem = self._tried()

    def _tried(self) -> str:
        """Why nothing may be launched, in words; empty if it may.

        Raises:
            torch.OutOfMemoryError: if there is no memory to find out.
            RuntimeError: if a graph is captured, in which nothing can be found out.
        """
        if self.is_capturing():
            raise RuntimeError(WARM_UP)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            torch.cuda.set_sync_debug_mode("default")
            return "" if makes_a_step(self) else f"a step on {self.device} comes out wrong"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, of a file, of a driver
            said = " ".join(str(error).split())[:300]
            return f"Triton fails on {self.device} ({type(error).__name__}: {said})"
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def is_capturing(self) -> bool:
        """Whether what is launched becomes part of a graph, to be replayed."""
        return torch.cuda.is_current_stream_capturing()  # type: ignore[no-any-return]

    def stream(self) -> Any:
        """That on which work is done now."""
        return torch.cuda.current_stream(self.device)

    @making_state()
    def doubles(self, count: int) -> Table:
        """Memory for as many numbers."""
        values = torch.zeros(count, dtype=torch.float64, device=self.device)
        return Table(values, self.stream())

    def scratch(self, *shape: int) -> Tensor:
        """Memory for numbers that a launch leaves for those after it in the same step."""
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    @making_state()
    def uploaded(self, values: Int64s, spare: Spare | None = None) -> Table:
        """A table on the device. It is copied by the current stream, and nothing waits for it.

        In a capture it is copied through spare memory, which a replay reads again.
        """
        if self.is_capturing():
            if spare is None:
                raise RuntimeError(NO_PLACE)
            pinned, found = spare
            pinned.numpy()[:] = values.reshape(-1)
            self.copy(found.tensor, pinned)
            return found
        with self._lock:
            pinned = self._free(values.size)
        pinned.numpy()[: values.size] = values.reshape(-1)
        table = torch.empty(values.size, dtype=torch.int64, device=self.device)
        self.copy(table, pinned[: values.size])
        with self._lock:
            self._pinned.append((pinned, self.event()))
        return Table(table, self.stream())

    def _free(self, size: int) -> Tensor:
        """Pinned memory that nothing is copied from any more."""
        for k, (pinned, event) in enumerate(self._pinned):
            if pinned.numel() >= size and event.query():
                del self._pinned[k]
                return pinned
        return self.pinned(size)

    def copy(self, table: Tensor, pinned: Tensor) -> None:
        """Let the current stream copy from pinned memory."""
        table.copy_(pinned, non_blocking=True)

    def pinned(self, size: int) -> Tensor:
        """New memory of the host from which is copied without a wait."""
        return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)

    def event(self) -> Any:
        """What tells when the current stream has come this far."""
        event = torch.cuda.Event()
        event.record(self.stream())
        return event

    @making_state()
    def spare(self, size: int) -> Spare:
        """Memory for a table that is uploaded in a capture, where none can be allocated."""
        table = torch.empty(size, dtype=torch.int64, device=self.device)
        return self.pinned(size), Table(table, self.stream())

    def keep(self, *held: Any) -> None:
        """In a capture: keep this for the life of the process, as the graph has its addresses."""
        if self.is_capturing():
            self._kept.append(held)

    def kernel(self, compile: Callable[..., tuple[Any, dict[str, Any]]], *of: Hashable) -> Kernel:
        """A kernel, which `compile` makes of `of` and a target, and its fixed arguments.

        Raises:
            CannotCompile: if Triton does not, or it cannot be loaded. A launch does not fail then.
            RuntimeError: if a graph is captured, and the kernel is not here yet.
        """
        key = compile, *of
        found = self._kernels.get(key)
        if found is None:
            if self.is_capturing():
                raise RuntimeError(WARM_UP)
            try:
                kernel, constants = compile(*of, self._target())
                self._load(kernel)
                found = kernel, tuple(constants.values())
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of Triton, of a compiler of C, of the rule
                said = " ".join(str(error).split())[:300]
                rules = [each.make.__qualname__ for each in of if isinstance(each, Rule)]
                what = rules[0] if rules else "norms or clocks"
                found = CannotCompile(
                    f"Triton makes no kernel for {what} ({type(error).__name__}: {said})."
                )
            self._kernels[key] = found
        if isinstance(found, CannotCompile):
            raise found
        return found

    def _load(self, kernel: Any) -> None:
        """Build and load what a first launch would."""
        with torch.cuda.device(self.device):
            kernel[(1, 1, 1)]

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


NO_PLACE = (
    "This step meets its gradients at addresses that no step has met, and there is no memory left "
    f"to capture them: {SPARES} such sets can be captured after a step that is not. Make at least "
    "one step before this capture, with the same parameters, outside of a graph."
)
WARM_UP = (
    "A step can be captured in a CUDA graph once its kernels are compiled and its tables have a "
    "place: make at least one step with the same parameters and settings before, on a side stream, "
    "as the page on CUDA graphs of PyTorch's documentation shows."
)


# For the life of the process.
_gpus: dict[torch.device, Gpu] = {}


def gpu_of(tensor: Tensor) -> Gpu:
    """The device that a tensor lies on."""
    device = tensor.device
    found = _gpus.get(device)
    if found is None:
        found = _gpus.setdefault(device, Gpu(device))
    return found


def kernels_by_device() -> dict[str, str]:
    """Of the devices that were asked for, how steps are made there."""
    return {
        str(device): f"PyTorch's functions: {gpu.problem}" if gpu.problem else "compiled by Triton"
        for device, gpu in list(_gpus.items())
    }


# --- a pass ---


@dataclass(eq=False)
class Launch:
    """A pass over those variables of one device that have one type, and decay or do not."""

    gpu: Gpu
    kind: Pass
    rule: Rule
    dtype: str
    indices: Sequence[int]  # of the operands
    first: list[int]  # of each, its first chunk, and the end
    chunks: Table
    rows: Table
    partials: Table | None  # what a pass over gradients measures, a number for each chunk
    grads: dict[bytes, Table] = field(default_factory=dict)
    spares: list[Spare] = field(default_factory=list)
    # By addresses, what captures upload in each replay: nobody else finds it filled.
    captured: dict[bytes, Spare] = field(default_factory=dict)

    @classmethod
    def over(
        cls, gpu: Gpu, kind: Pass, rule: Rule, operands: Sequence[Operand], indices: Sequence[int]
    ) -> Launch:
        """The launch over operands, whose tables are uploaded."""
        from ..kernels import triton as kernels

        dtype, sizes = operands[0].dtype, [operand.variable.size for operand in operands]
        chunks = kernels.chunk_table(sizes, dtype)
        addresses = [
            [0 if region is None else region.address for region in operand.streams(kind)]
            for operand in operands
        ]
        rows = kernels.row_table(addresses, sizes, indices, rule)
        first = np.searchsorted(chunks >> 32, np.arange(len(sizes) + 1)).tolist()
        tables = gpu.uploaded(chunks), gpu.uploaded(rows)
        partials = gpu.doubles(len(chunks)) if kind.measured else None
        return cls(gpu, kind, rule, dtype, indices, first, *tables, partials)

    def prepared(
        self,
        addresses: array[int],
        numbers: Sequence[float],
        clock: Table | None = None,
        factors: Factors | None = None,
    ) -> Callable[[], None]:
        """What launches it, and cannot fail any more.

        Args:
            addresses: of the gradients of all operands.
            numbers: the coefficients of the pass and of the rule, if there is no clock.
            clock: what has them on the device.
            factors: what gradients are multiplied by.
        """
        from ..kernels import triton as kernels

        joint = factors is not None and factors.joint
        kernel = self.gpu.kernel(
            kernels.sweep_kernel, self.kind, self.rule, self.dtype, clock is not None, joint
        )
        grads = self._table(addresses, clock is not None) if self.kind.gradient else None
        scales = None if factors is None else factors.on(self.gpu.device)
        stream, held = self.gpu.stream(), (self.chunks, self.rows, grads, self.partials, clock)
        self.gpu.keep(*held)
        chunks, rows, gradients, partials, told = [0 if t is None else t.on(stream) for t in held]

        def launch() -> None:
            scaling = 0 if scales is None else scales.data_ptr()
            arguments = chunks, rows, gradients, scaling, partials, told, tuple(numbers)
            self.gpu.launch(kernel, self.first[-1], *arguments)

        return launch

    def _table(self, addresses: array[int], clocked: bool) -> Table:
        if len(self.indices) < len(addresses):
            addresses = array("q", [addresses[i] for i in self.indices])
        key = addresses.tobytes()
        found = self.grads.get(key)
        if found is None and self.gpu.is_capturing():
            return self._captured(key)
        if found is None:
            if len(self.grads) >= TABLES:
                self.grads.clear()
            found = self.grads[key] = self.gpu.uploaded(np.frombuffer(addresses, np.int64))
        # For a capture, which has a clock.
        if clocked and len(self.spares) < SPARES and not self.gpu.is_capturing():
            self.spares += [self.gpu.spare(len(addresses)) for _ in range(len(self.spares), SPARES)]
        return found

    def _captured(self, key: bytes) -> Table:
        """A table that each replay fills anew, from memory that nobody else writes to."""
        spare = self.captured.get(key)
        if spare is None and self.spares:
            spare = self.spares.pop()
        table = self.gpu.uploaded(np.frombuffer(key, np.int64), spare)  # raises without a spare one
        assert spare is not None
        self.captured[key] = spare
        self.gpu.keep(spare)
        return table


# --- what gradients are multiplied by ---


class Factors(Sequence[Tensor]):
    """What gradients are multiplied by, doubles on a device: one for each, or one for all."""

    def __init__(self, values: Tensor, count: int, joint: bool) -> None:
        self._values, self._count, self.joint = values, count, joint

    def on(self, device: torch.device) -> Tensor:
        """The values on a device, as kernels read them."""
        return self._values.to(device, torch.float64, non_blocking=True)

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


class Added:
    """Partial sums that are added up: of each variable, or of all."""

    def __init__(self, launches: Sequence[Launch], joint: bool) -> None:
        self._gpu, self._launches = launches[0].gpu, launches
        rows: list[tuple[int, int, int]] = []
        for launch in launches:
            assert launch.partials is not None
            at = launch.partials.tensor.data_ptr()
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

    def run(self, clip: Any, threshold: float) -> tuple[Tensor, Tensor]:
        """The sums, and what is made of each; both are as good as the next step is far."""
        from ..kernels import triton as kernels

        kernel = self._gpu.kernel(kernels.factor_kernel, clip)
        sums, factors = self._gpu.scratch(2, self._count).unbind()
        self._gpu.keep(self._segments, self._firsts)
        stream = self._gpu.stream()
        tables = self._segments.on(stream), self._firsts.on(stream)
        self._gpu.launch(
            kernel, self._count, *tables, sums.data_ptr(), factors.data_ptr(), threshold
        )
        return sums, factors


# --- numbers that the host does not know ---


_version_of = attrgetter("_version")


class Clock:
    """The numbers of steps that are counted on a device, or whose rate is there.

    Args:
        gpu: the device.
        counts: float32 tensors there without axes, each of which counts the same steps; none, if
            the host counts them.
        size: how many numbers there are, of a pass and its rule.
    """

    def __init__(self, gpu: Gpu, counts: Sequence[Tensor], size: int) -> None:
        self.gpu, self.counts, self._size = gpu, counts, size
        self.table = gpu.doubles(1 + size)
        self._places = None
        if counts:
            places = np.array(list(map(Tensor.data_ptr, counts)), np.int64)
            self._places = gpu.uploaded(places)
        self._tracked = [each for each in counts if not each.is_inference()]
        self._versions = self._seen()

    def _seen(self) -> list[int]:
        return list(map(_version_of, self._tracked))

    @property
    def is_current(self) -> bool:
        """Whether nobody else has written to the counts."""
        return self._seen() == self._versions

    def tell(
        self,
        make: Callable[..., Any],
        settings: tuple[Any, ...],
        known: Sequence[Any],
        skip: Tensor | None,
        host: Sequence[float],
    ) -> list[Tensor]:
        """The numbers of the next step, without axes, on the device: as `make` has them.

        Args:
            make: what makes them: see `tell_constants` in kernels/triton.py.
            settings: of that.
            known: t, what divides gradients, and the rate, each on the device or not; t is not if
                there are counts.
            skip: what is not zero if the step is to be skipped.
            host: the other numbers.
        """
        from ..kernels import triton as kernels

        t, scale, rate = known
        single = torch.float32
        step = self.counts[0] if self.counts else None
        there = [self._there(each, single) for each in (skip, scale)]
        is_double = isinstance(rate, Tensor) and rate.dtype == torch.float64
        there.append(self._there(rate, torch.float64 if is_double else single))
        numbers = tuple(0.0 if isinstance(x, Tensor) else float(x) for x in (t, scale, rate, *host))
        kind = "float64" if is_double else "float32"
        kernel = self.gpu.kernel(kernels.tell_kernel, make, settings, kind, self._size, len(host))
        at = self.table.on(self.gpu.stream())
        self.gpu.keep(self.table)
        places = [0 if x is None else x.data_ptr() for x in (step, *there)]
        self.gpu.launch(kernel, 1, at, *places, numbers)
        return list(self.table.tensor[1:].unbind())

    def _there(self, value: Any, dtype: torch.dtype) -> Tensor | None:
        if not isinstance(value, Tensor):
            return None
        return value.detach().to(self.gpu.device, dtype, non_blocking=True)

    def advanced(self) -> Callable[[], None]:
        """What counts the step, unless it was skipped, and cannot fail any more."""
        from ..kernels import triton as kernels

        if self._places is None:
            return lambda: None
        kernel = self.gpu.kernel(kernels.count_kernel)
        stream, count = self.gpu.stream(), len(self.counts)
        self.gpu.keep(self._places)
        arguments = self._places.on(stream), count, self.table.on(stream)

        def advance() -> None:
            self.gpu.launch(kernel, -(-count // kernels.COUNTED), *arguments)
            torch.autograd.graph.increment_version(list(self.counts))
            self._versions = self._seen()

        return advance


# --- whether a device can be trusted ---

_ADAM = Rule(make_adam, ("m", "v"), AdamCoefficients._fields, (("amsgrad", False),))


def makes_a_step(gpu: Gpu) -> bool:
    """Whether a step on the device gives the bits of the rule on NumPy. It is waited for.

    Of a whole chunk and a tail, and of memory that no vector may touch.
    """
    kind, sizes = Pass(gradient=True, updates=True), (1030, 7)
    element = layout.on_numpy(kind, _ADAM, "float32")
    rng = np.random.default_rng(0)
    pass_c, rule_c = PassCoefficients(), AdamCoefficients(0.01, 0.1, 0.001, 1e-7)
    held: list[list[Tensor]] = []
    wanted: list[npt.NDArray[np.float32]] = []
    with making_state():
        for offset, size in enumerate(sizes):
            w, g, m, v = rng.standard_normal((4, size)).astype(np.float32)
            v = v * v
            every = [torch.from_numpy(np.pad(x, (offset, 0))) for x in (w, m, v, g)]
            held.append([each.to(gpu.device)[offset:] for each in every])
            singles = [tuple(map(np.float32, c)) for c in (rule_c, pass_c)]
            new_w, slots, *_ = element(w, g, (m, v), None, None, None, *singles)
            wanted += [new_w, *slots]
        operands = [
            Operand("float32", _region_of(w), (_region_of(m), _region_of(v))) for w, m, v, _ in held
        ]
        launch = Launch.over(gpu, kind, _ADAM, operands, range(len(sizes)))
        addresses = array("q", [g.data_ptr() for *_, g in held])
        launch.prepared(addresses, [*pass_c, *rule_c])()
        found = [tensor.cpu().numpy() for tensors in held for tensor in tensors[:3]]
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, wanted, strict=True))
