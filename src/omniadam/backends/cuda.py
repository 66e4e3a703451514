"""PyTorch's tensors on NVIDIA GPUs, which the kernels of `kernels/triton.py` step.

A step is a launch for each device, element type and decay, and two more with a norm. What is
launched, and with which memory, is in `gpu.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import slow
from ..kernels import cpu, layout
from ..kernels.layout import Operand
from ..rule import Pass, Rule, clip_factor
from .base import Entry, Group, Part, Selection, Sums, nothing_measured
from .gpu import Added, CannotCompile, Factors, Launch, Table, gpu_of
from .host import Gradients, _overlaps, _spans
from .torch import TorchDevice, _is_plain, _region_of, _tensors, _written

# How many plans are kept of a selection: each has tables of all of its chunks.
_PLANS = 8


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
        problem = next(filter(None, (gpu_of(v).problem for v in variables)), "")
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


# --- what is prepared ---


@dataclass(eq=False)
class Located:
    """What is prepared for a selection for as long as its variables and state lie where they do."""

    places: list[Any]
    memory: list[tuple[int, int]]  # the spans that a step writes to, in order
    operands: list[Operand | None]  # None of what no kernel takes as it lies in memory
    odd_rest: tuple[int, ...]
    # By the identities of a pass and a rule, which are kept for ever, and what is odd.
    plans: dict[Any, tuple[list[Launch], list[Tensor], Pass, Rule]] = field(default_factory=dict)
    sums: dict[Any, Added] = field(default_factory=dict)
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

    # What has the coefficients of a step on the device, and whether it is to be skipped.
    clock: Table | None = None

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
        if kernels.why_not(group.kind):
            return super().sweep(group, gradients.native)
        for call in self.prepared(group, gradients):
            call()
        return nothing_measured

    def prepared(self, group: Group, gradients: Any) -> list[Callable[[], Any]]:
        """What makes a pass, when it is called: all of it that can fail is done."""
        kind, located = group.kind, gradients.located
        odd = tuple(gradients.odd) if kind.gradient else located.odd_rest
        launches, written = self._planned(group, located, odd)
        factors = _factors(group) if kind.clipped_by_factor else None
        try:
            calls = self._launches(launches, group, gradients, factors)
        except CannotCompile as error:
            if self.clock is not None:  # which operations do not look at
                raise
            _warn_of(error)
            return [partial(super().sweep, group, gradients.native)]
        if odd:
            calls.append(partial(self._sweep_odd, group, gradients, odd))
        return [*calls, partial(torch.autograd.graph.increment_version, written)]

    def _launches(
        self, launches: Sequence[Launch], group: Group, gradients: Any, factors: Factors | None
    ) -> list[Callable[[], Any]]:
        numbers = [*group.pass_c, *group.rule_c]
        told = [0.0] * len(numbers) if self.clock is not None else list(map(float, numbers))
        return [
            launch.prepared(gradients.addresses, told, self.clock, factors) for launch in launches
        ]

    def _sweep_odd(self, group: Group, gradients: Any, odd: Sequence[int]) -> None:
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
            if len(located.plans) >= _PLANS:
                located.plans.clear()
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
                key = gpu_of(entry.variable), entry.dtype, decayed
                groups.setdefault(key, []).append(i)
        launches = [
            Launch.over(
                gpu,
                group.kind._replace(decayed=decayed),
                group.rule,
                [operands[i] for i in by],  # type: ignore[misc]  # none of which is odd
                by,
            )
            for (gpu, _, decayed), by in groups.items()
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
            try:
                values, _ = _added(gradients.located, mine, joint=False).run(None, 0.0)
            except CannotCompile as error:
                _warn_of(error)
                return super().square_sums(group, gradients.native)
            order = sorted(i for launch in mine for i in launch.indices)
            for i, value in zip(order, values.unbind(), strict=True):
                sums[i] = value
        first = sums[0].device
        return [each.to(first, non_blocking=True) for each in sums]

    def _measured(self, group: Group, gradients: Any) -> list[Launch] | None:
        """Launches whose partial sums are of all gradients; None if kernels do not see some."""
        if gradients.odd:
            return None
        launches, _ = self._planned(group, gradients.located, ())
        try:
            calls = self._launches(launches, group, gradients, None)
        except CannotCompile as error:
            _warn_of(error)
            return None
        for call in calls:
            call()
        return launches

    def clip_factors(
        self, group: Group, gradients: Any, clip: Any, threshold: float
    ) -> Sequence[Any]:
        found = measured([(self, group, gradients)])
        if found is None:
            return super().clip_factors(group, gradients, clip, threshold)
        values = factors_of(found[0], gradients.located, clip, threshold)
        if values is None:
            return super().clip_factors(group, gradients, clip, threshold)
        return Factors(values, len(group.entries), clip.joint)

    def update_each(
        self, group: Group, gradients: Any, update: Callable[[Any, Entry], None]
    ) -> None:
        super().update_each(group, gradients.native, update)


def measured(parts: Iterable[tuple[TorchCuda, Group, Any]]) -> list[list[Launch]] | None:
    """The launches, made, that measure the gradients of some passes.

    Args:
        parts: backends, the passes that measure, and what was gathered for them.

    Returns:
        Of each its launches; None if a kernel does not see all gradients, or they lie on several
        devices.
    """
    parts = list(parts)
    if any(gradients.odd for _, _, gradients in parts):
        return None
    planned = [backend._planned(group, each.located, ())[0] for backend, group, each in parts]
    if len({launch.gpu for launches in planned for launch in launches}) != 1:
        return None
    found = [backend._measured(group, gradients) for backend, group, gradients in parts]
    return None if None in found else found  # type: ignore[return-value]


def factors_of(
    launches: Sequence[Launch], located: Located, clip: Any, threshold: float
) -> Tensor | None:
    """What gradients are multiplied by whose norms were measured: one each, or one for all.

    Args:
        launches: those of `measured`.
        located: what keeps what is prepared.
        clip: a `NormClip`.
        threshold: of the norm.

    Returns:
        None if there is no kernel for it.
    """
    function = clip.factor if clip.joint else clip_factor
    try:
        _, values = _added(located, launches, clip.joint).run(function, threshold)
    except CannotCompile as error:
        _warn_of(error)
        return None
    return values


def _added(located: Located, launches: Sequence[Launch], joint: bool) -> Added:
    key = (joint, *map(id, launches))
    found = located.sums.get(key)
    if found is None:
        if len(located.sums) >= _PLANS:
            located.sums.clear()
        found = located.sums[key] = Added(launches, joint)
    return found


def _warn_of(error: CannotCompile) -> None:
    """Say that PyTorch's functions do what a kernel was to do; raise where that is not wanted."""
    if cpu.choice() == "triton":
        raise error
    slow.warn(f"{error} PyTorch's own functions do that part of steps.")


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
