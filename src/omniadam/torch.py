"""Adam and AdamW with the interface of torch.optim: change the import, keep everything else.

Nothing is computed here. Parameters become entries of a backend; those of one group that have made
the same number of steps form a bucket, and a step is one sweep over each bucket. torch's state of a
parameter (`exp_avg` and so on) is what the kernels work on: there are no copies of it.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, repeat
from operator import is_, itemgetter, setitem
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np

from . import fast, options, slow, versions

with versions.imported("torch", user="omniadam.torch"):
    import torch
    from torch import Tensor
    from torch.optim.optimizer import ParamsT

from .adam import ADAM, AMSGRAD, by_memory
from .backends import cuda, gpu, sharded
from .backends.base import Entry, Group, Selection
from .backends.deferred import Rows
from .backends.host import Numbers
from .backends.torch import (
    DeviceNumbers,
    Torch,
    TorchDevice,
    TorchMemory,
    _is_plain,
    _writing,
    making_state,
    zeros_like,
)
from .embedding import Embedding, EmbeddingBag, defer
from .kernels.cpu import Work
from .rule import NOTHING, Pass, PassCoefficients, Rule, adam_coefficients_by, memory
from .step import NormClip, Passes, StepSettings, known, pass_coefficients, passes_of

__all__ = ["Adam", "AdamW", "Embedding", "EmbeddingBag", "defer"]

T = TypeVar("T")


def __dir__() -> list[str]:
    return __all__


class _Extra(NamedTuple):
    """A setting that torch.optim does not have."""

    default: Any
    check: options.Check


_EXTRAS = {
    "epsilon_hat": _Extra(False, options.boolean),
    "clipnorm": _Extra(None, options.threshold),
    "clipvalue": _Extra(None, options.threshold),
    "global_clipnorm": _Extra(None, options.threshold),
    "use_ema": _Extra(False, options.boolean),
    "ema_momentum": _Extra(0.99, options.momentum),
}


class Adam(torch.optim.Adam):  # type: ignore[misc]
    """`torch.optim.Adam` with the same arguments, errors, state and numbers, in one pass.

    It is a `torch.optim.Adam` for `isinstance`, and their `state_dict`s load into each other.
    docs/torch.md says what differs.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in
            `torch.optim.Adam`. `weight_decay` is an L2 penalty unless it is decoupled.
        foreach, fused: accepted; there is one implementation. With `fused=True` a
            `torch.amp.GradScaler` leaves it to the step to unscale, as with torch's own.
        capturable: whether steps are counted on the device, so that CUDA graphs can capture them.
            It needs the kernels for NVIDIA GPUs; the first step cannot be captured.
        differentiable: must be False.
        epsilon_hat: whether `eps` is the "epsilon hat" of Keras, outside of the bias correction.
        clipnorm: number > 0, or None. The gradient of each parameter is scaled down to have at
            most this Euclidean norm.
        clipvalue: number > 0, or None. Each element of a gradient is clipped to +- this value.
        global_clipnorm: number > 0, or None. The norm over the gradients of all groups, and over
            all ranks where they are `DTensor`s, is scaled down to at most this.
        use_ema: whether to keep a moving average of each parameter, in
            `state[parameter]["average"]`: see `averaged`.
        ema_momentum: 0 <= number <= 1; average <- momentum * average + (1 - momentum) * parameter.

    Each of these may also stand in a parameter group; at most one of the clips in each.

    Raises:
        ValueError: if a setting is out of its range, or more than one clip is set.
        RuntimeError: if `differentiable` is set, or `capturable` where it cannot be had.

    Example:
        >>> import torch
        >>> from omniadam.torch import Adam
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = Adam([w], lr=0.1)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     (w * w).sum().backward()
        ...     opt.step()
        >>> [round(x, 3) for x in w.tolist()]
        [0.702, -1.701]

    Sources: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980; torch/optim/adam.py.
    """

    # What was given beside torch's own arguments. A pickle or a copy has it in `defaults`.
    _given: Mapping[str, Any] = {}
    # While parameters hold their averages: each with its own values. What wraps an optimizer in a
    # class that inherits from both (Lightning) finds it here, unless it is a class's attribute.
    _own: list[tuple[Tensor, Tensor]]
    # What the last step was prepared for: see `_forget`.
    _is_watched: bool | None = None
    # Whether steps are counted on the GPUs of the parameters, where a step may be skipped, captured
    # in a graph, or both.
    _is_clocked = False  # whether steps are counted on GPUs
    _has_clocks = True  # whether GPUs have the kernels for that
    _params: Sequence[Tensor] = ()
    _sizes: Sequence[int] = ()
    _absent: Sequence[bool] = ()
    _buckets: Sequence[_Bucket] = ()
    _meshes: Sequence[sharded.Mesh] = ()
    _are_flat = False
    # The keys of the state and what they had.
    _known: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    @options.leads_on("torch")
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        epsilon_hat: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
    ) -> None:
        if isinstance(params, (torch.nn.Module, int, float)):
            raise TypeError(
                "The first argument must be the parameters: model.parameters() or "
                f"model.named_parameters(). Received: {type(params).__name__}."
            )
        given = {
            "epsilon_hat": epsilon_hat,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "use_ema": use_ema,
            "ema_momentum": ema_momentum,
        }
        # What is not used is no part of the groups, which then have the keys of torch's own: a
        # checkpoint of one can be read into the other by whatever compares them.
        self._given = {k: v for k, v in _checked(given).items() if v != _EXTRAS[k].default}
        self._own = []
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        # Else a GradScaler unscales by itself, in a pass of its own. As with torch's own: there are
        # scalers (FSDP1's) that look at all ranks only then.
        if fused:
            self._step_supports_amp_scaling = _is_grad_scaler_known()

    if not TYPE_CHECKING:
        extend = options.Elsewhere(
            "torch",
            "PyTorch's way is add_param_group({'params': [...]}): the new parameters have no state "
            "yet, so that their own count of steps begins at 1, and the others keep theirs.",
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as in torch.optim.

        Args:
            param_group: `{"params": ...}` and any of the constructor's settings; the others are as
                they were given to it.
        """
        self.defaults.update(self._given)
        if isinstance(param_group, dict):
            if param_group.get("capturable", self.defaults["capturable"]):
                _check_capturable(param_group)
            param_group.update(_checked({**self.defaults, **param_group}, only=param_group))
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], T]) -> T: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: if a parameter cannot be trained, or its gradient does not fit.
                Nothing has been changed then.
        """
        if self._is_observed():
            return self._observed_step() if closure is None else self._observed_step(closure)
        return self._closed_step(closure)

    # torch would wrap `step` in what calls hooks and names it to profilers, which takes about as
    # long as all else around a small step: it is left out where nobody looks.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_observed(self) -> bool:
        if type(self).step is not _STEP:  # then torch has wrapped that one
            return False
        return _is_observed(self)

    def _closed_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What is being compiled calls a step and does not trace it. To say so takes as long as all
        # checks of a small step, and is left out elsewhere.
        (self._untraced_step if torch.compiler.is_compiling() else self._step)()
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_closed_step)

    def _step(self) -> None:
        # Steps follow one another, whichever threads make them. A closure runs outside of it.
        with self._turn():
            try:
                self._step_in_turn()
            except BaseException:
                # A GradScaler takes these away only after a step that went well, and would multiply
                # the scale of the next step by that of this one.
                if "found_inf" in self.__dict__:
                    for name in ("found_inf", "grad_scale"):
                        self.__dict__.pop(name, None)
                raise

    _untraced_step = torch.compiler.disable(_step)

    def _turn(self) -> Any:
        """The lock of whoever writes to the parameters."""
        return self.__dict__.setdefault("_lock", threading.RLock())

    def _step_in_turn(self) -> None:
        # What a GradScaler leaves here for a step that unscales by itself.
        found_inf, given = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        count = len(self.state)
        if not self._is_clocked and self._wants_clock(found_inf):
            self._is_clocked = True
            self._forget()
        replaced: list[Replaced] = []
        whole = Work()
        try:
            if self._own:
                raise RuntimeError("The parameters hold averages: step outside of averaged().")
            self._check_captured()
            is_asked = found_inf is not None and not self._is_clocked
            is_skipped = is_asked and _number("found_inf", found_inf) != 0.0
            scale: Any = 1.0 if given is None else given
            if not self._is_clocked and given is not None:
                scale = _number("grad_scale", given, unknown=1.0)
            work = self._arranged(replaced)
            if self._is_clocked and not all(b.is_decided_there(found) for b, found in work):
                if found_inf is not None and cuda.is_capturing():
                    raise RuntimeError(
                        "A step that a GradScaler may skip can be captured if kernels make all of "
                        "it: each gradient of its parameter's dtype and layout, on a GPU."
                    )
                is_skipped = found_inf is not None and _number("found_inf", found_inf) != 0.0
                scale = 1.0 if given is None else _number("grad_scale", given, unknown=1.0)
                found_inf = None
            if is_skipped or (count == 0 and self._is_initialisation()):
                return
            skip = found_inf if self._is_clocked else None
            groups = self.param_groups
            plan = [
                bucket.planned(groups[bucket.group], scale, skip, self._has_clocks)
                for bucket, _ in work
            ]
            factors = self._clip_factors(work)
            if factors:
                plan = [
                    each and each._replace(factors=factors.get(bucket, ()))
                    for (bucket, _), each in zip(work, plan, strict=True)
                ]
            for (bucket, gradients), planned in zip(work, plan, strict=True):
                bucket.add_to(whole, gradients, planned)
            launches = [
                bucket.prepared(gradients, planned)
                for (bucket, gradients), planned in zip(work, plan, strict=True)
            ]
        except BaseException as error:
            self._undo(replaced, count)
            if isinstance(error, gpu.CannotCompile) and self._can_do_without_clock():
                self._has_clocks = self._is_clocked = False
                slow.warn(f"{error} The host waits for the numbers that a device has.")
                return self._step_in_turn()
            raise
        whole.whole(whole.do)
        for (bucket, _), planned, calls in zip(work, plan, launches, strict=True):
            bucket.advance(planned, calls)
        # On a GPU they stay as they are: nobody there knows yet whether they are to be divided.
        if not isinstance(scale, Tensor) and scale != 1.0:
            self._unscale(scale)

    def _can_do_without_clock(self) -> bool:
        """Whether a step may wait for what a GPU was to read by itself."""
        groups = self.param_groups
        is_read = self._is_clocked or any(cuda.is_there(group["lr"]) for group in groups)
        return (
            self._has_clocks
            and is_read
            and not any(group.get("capturable") for group in groups)
            and not cuda.is_capturing()
        )

    def _wants_clock(self, found_inf: Any) -> bool:
        """Whether steps are to be counted on a GPU from now on."""
        if not self._has_clocks:
            return False
        if found_inf is not None and cuda.is_there(found_inf):
            return True
        return any(group.get("capturable") for group in self.param_groups)

    def _check_captured(self) -> None:
        """Raise RuntimeError if a graph is captured of what cannot be replayed."""
        if not cuda.is_capturing():
            return
        for group in self.param_groups:
            if not group.get("capturable"):
                raise RuntimeError(
                    "A step that is captured in a CUDA graph must count on the device: create the "
                    "optimizer with `capturable=True`. Received capturable=False."
                )
            read = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            values = [*group["betas"], group["eps"], group["weight_decay"]]
            if any(isinstance(each, Tensor) and cuda.is_on_gpu(each) for each in values):
                raise RuntimeError(
                    "Of the settings, a graph reads `lr` alone on the device. Pass the others as "
                    f"numbers. Received: {read}"
                )

    def _undo(self, replaced: list[Replaced], count: int) -> None:
        """Leave all as it was before a step that cannot be made."""
        self._forget()
        for held, values in reversed(replaced):
            held.clear()
            held.update(values)
        while len(self.state) > count:
            self.state.popitem()

    # --- which parameters step together ---

    def _arranged(self, replaced: list[Replaced]) -> list[tuple[_Bucket, Any]]:
        """What is to be done: buckets with their gradients, checked. Nothing is updated yet.

        Args:
            replaced: is given what the state of a parameter was, wherever that is replaced.
        """
        groups, state = self.param_groups, self.state
        sizes = [len(group["params"]) for group in groups]
        params = [p for group in groups for p in group["params"]]
        gradients = [p.grad for p in params]
        absent = [g is None for g in gradients]
        is_watched = _is_watched()
        if (
            sizes != self._sizes
            or not all(map(is_, params, self._params))
            or is_watched is not self._is_watched
        ):
            self._sizes, self._params, self._is_watched = sizes, params, is_watched
            self._meshes, self._are_flat = sharded.meshes(params), sharded.may_be_flat(params)
            self._buckets, self._absent = _buckets(params, sizes), ()
        if absent != self._absent:
            self._absent = absent
            self._buckets = [part for bucket in self._buckets for part in bucket.split(absent)]
        # As iterated: to look a tensor up calls its `__hash__`, a function in Python.
        keys, held = self._known
        is_known = len(state) == len(keys) and all(map(is_, state, keys))
        is_known = is_known and all(map(is_, state.values(), held))
        if not all(
            bucket.is_current(state, groups[bucket.group], is_known) for bucket in self._buckets
        ):
            if cuda.is_capturing():  # counts are read by the host, which would have to wait
                raise RuntimeError(gpu.WARM_UP)
            self._buckets = [
                part
                for bucket in self._buckets
                for part in bucket.renewed(state, groups[bucket.group], replaced, self._is_clocked)
            ]
            for bucket in self._buckets:
                if bucket.has_state:
                    bucket.backend.turn = self._turn()
        if not is_known:
            self._known = list(state), list(state.values())
        work, has_moved = [], False
        for bucket in self._buckets:
            if bucket.has_state:
                found = bucket.gathered([gradients[i] for i in bucket.positions])
                if found is None:  # parameters were converted or moved, and take their state along
                    self._forget()
                    return self._arranged(replaced)
                work.append((bucket, found))
                has_moved = has_moved or bucket.has_moved
        if has_moved:
            _check_distinct([bucket for bucket, _ in work])
        return work

    def _forget(self) -> None:
        for name in _PREPARED:
            self.__dict__.pop(name, None)

    def _is_initialisation(self) -> bool:
        """Whether this is no step of training: torch.distributed.checkpoint makes an optimizer
        create its state by a step with rates and gradients of zero, which must do nothing else.
        """
        rates = [group["lr"] for group in self.param_groups]
        if any(map(cuda.is_there, rates)):  # which the host does not read, and nobody set to zero
            return False
        return not any(_number("lr", rate) for rate in rates) and not any(
            sharded.has_values(p.grad) for p in self._params if p.grad is not None
        )

    # --- what gradients are multiplied by ---

    def _unscale(self, scale: float) -> None:
        """Divide the gradients by a GradScaler's scale, as torch's fused optimizers do.

        The step itself has divided what it read, and is made: nothing may fail here.
        """
        # A gradient of two parameters is divided once.
        found = {sharded.memory_of(p.grad): p for p in self._params if p.grad is not None}
        with torch.no_grad():
            for p in found.values():
                try:
                    p.grad.div_(scale)
                except RuntimeError:  # its elements share memory, or it is of inference mode
                    p.grad = p.grad / scale

    def _clip_factors(self, work: Sequence[tuple[_Bucket, Any]]) -> dict[_Bucket, Sequence[Any]]:
        """What the gradients of each bucket are multiplied by, where a norm clips them."""
        groups = self.param_groups
        is_global = any(group.get("global_clipnorm") is not None for group in groups)
        if not is_global and all(group.get("clipnorm") is None for group in groups):
            return {}
        if self._are_flat:
            raise RuntimeError(
                "`clipnorm` and `global_clipnorm` need whole gradients, or DTensors as those of "
                "fully_shard. FullyShardedDataParallel keeps parts of them in ordinary tensors: "
                "call its clip_grad_norm_() before the step instead."
            )
        if not self._meshes:
            found = self._factors_by_kernels([w for w in work if not w[0].is_absent])
            if found is not None:
                return found
        sums = {b: b.square_sums(gradients) for b, gradients in work if not b.is_absent}
        if self._meshes:
            places = {i: (s, k) for b, s in sums.items() for k, i in enumerate(b.positions)}
            for mesh in self._meshes:
                mesh.add_up(places)
        norm = math.nan
        if is_global:
            totals = [_total(squares) for squares in sums.values()]
            devices = [each.device for each in totals if isinstance(each, Tensor)]
            norm = DeviceNumbers.sqrt(
                sum(e.to(devices[0]) if isinstance(e, Tensor) else e for e in totals)
            )
        factors: dict[_Bucket, Sequence[Any]] = {}
        for bucket, squares in sums.items():
            group = groups[bucket.group]
            limit, global_limit = group.get("clipnorm"), group.get("global_clipnorm")
            if limit is not None:
                factors[bucket] = _each_clipped(squares, limit)
            elif global_limit is not None:
                (factor,) = NormClip(joint=True).factors(DeviceNumbers, [norm], global_limit)
                factors[bucket] = bucket.shared(factor, len(squares))
        return factors

    def _factors_by_kernels(
        self, work: Sequence[tuple[_Bucket, Any]]
    ) -> dict[_Bucket, Sequence[Any]] | None:
        """The same, where one launch on a GPU makes them of partial sums; None elsewhere."""
        if not work or not all(isinstance(b.backend, cuda.TorchCuda) for b, _ in work):
            return None
        found = cuda.measured((b.backend, b.norm(), gradients) for b, gradients in work)
        if found is None:
            return None
        every = [launch for each in found for launch in each]
        joint: dict[float, Tensor] = {}
        factors: dict[_Bucket, Sequence[Any]] = {}
        for (bucket, gradients), launches in zip(work, found, strict=True):
            group, count = self.param_groups[bucket.group], len(bucket.entries)
            limit, global_limit = group.get("clipnorm"), group.get("global_clipnorm")
            if limit is not None:
                values = cuda.factors_of(launches, gradients.located, NormClip(), limit)
                if values is None:
                    return None
                factors[bucket] = gpu.Factors(values, count, joint=False)
            elif global_limit is not None:
                if global_limit not in joint:
                    first = work[0][1].located
                    values = cuda.factors_of(every, first, NormClip(joint=True), global_limit)
                    if values is None:
                        return None
                    joint[global_limit] = values
                factors[bucket] = gpu.Factors(joint[global_limit], count, joint=True)
        return factors

    # --- averages ---

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters have the values of their averages, to evaluate or to save the model.

        Afterwards they have their own values again. A parameter without an average keeps its
        value.

        Raises:
            RuntimeError: if called again, or if a step is made, before that; or if there can be no
                averages, as no group has `use_ema=True`.

        Example:
            >>> import torch
            >>> from omniadam.torch import Adam
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> opt = Adam(model.parameters(), lr=0.1, use_ema=True, ema_momentum=0.5)
            >>> for _ in range(2):
            ...     model.weight.grad = torch.ones(1, 1)
            ...     opt.step()
            >>> after = model.weight.item()
            >>> with opt.averaged():
            ...     average = model.weight.item()
            >>> round(average - after, 4), model.weight.item() == after
            (0.05, True)
        """
        is_begun = False
        try:
            with self._turn():  # another thread may be in the middle of a step
                if self._own:
                    raise RuntimeError("The parameters hold their averages already.")
                has_averages = any("average" in each for each in self.state.values())
                if not has_averages and not any(g.get("use_ema") for g in self.param_groups):
                    raise RuntimeError(
                        "There are no averages: `averaged()` needs an optimizer, or a group, with "
                        "`use_ema=True`."
                    )
                is_begun = True
                for p, state in self.state.items():
                    if isinstance(p, Tensor) and "average" in state:
                        self._own.append((p, p.detach().clone()))
                        _write(p, state["average"])
            yield
        finally:
            try:
                if is_begun:
                    self._restore()
            finally:  # Ctrl-C may come there, too
                if is_begun:
                    self._restore()

    def _restore(self) -> None:
        """Give parameters their own values; what has its own again is no longer in the list."""
        failed = None
        with self._turn():
            while self._own:
                try:
                    _write(*self._own[-1])
                except Exception as error:  # of one, which may have another shape by now
                    failed = error
                self._own.pop()
        if failed is not None:
            raise failed

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """The state, as in torch.optim; the rows of embeddings are brought up to date before."""
        self._catch_up()
        return super().state_dict()  # type: ignore[no-any-return]

    def _catch_up(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(p, Rows):
                    p.flush()

    def __getstate__(self) -> dict[str, Any]:
        self._catch_up()
        return super().__getstate__()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state that `state_dict` of this class, or of torch's, returned.

        Settings of the groups are taken over too, as in torch.optim; the settings that torch does
        not have stay as they are if the state has none. Values are copied.

        Args:
            state_dict: of parameters of the same shapes; in the same order, unless both sides
                have names for them.

        Raises:
            ValueError: if groups, names or shapes do not fit. Nothing has been changed then.
        """
        self._catch_up()
        # After all hooks of the user, before torch casts everything to the parameters' dtypes.
        handle = self.register_load_state_dict_pre_hook(_prepared)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for slots in state.get("state", {}).values():
            if isinstance(slots, dict):
                slots.update({k: v.value for k, v in slots.items() if isinstance(v, _Kept)})
        super().__setstate__(state)
        self.__dict__.setdefault("_own", [])
        self._forget()


_STEP = Adam.step
if fast.is_enabled():
    from .fast.torch import is_observed as _is_observed
else:

    def _is_observed(stepping: Any) -> bool:
        return True  # torch's own wrapper looks


_PREPARED = (
    "_is_watched",
    "_params",
    "_sizes",
    "_absent",
    "_buckets",
    "_meshes",
    "_are_flat",
    "_known",
)


def _write(variable: Tensor, value: Tensor) -> None:
    with _writing(variable):
        variable.copy_(value)


class AdamW(Adam, torch.optim.AdamW):  # type: ignore[misc]
    """`torch.optim.AdamW`: `Adam` with decoupled weight decay, 0.01 if not given.

    The arguments are those of `torch.optim.AdamW`, and the further ones of `Adam`.

    Example:
        >>> import torch
        >>> from omniadam.torch import AdamW
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> w.grad = torch.zeros(1)
        >>> AdamW([w], lr=0.1, weight_decay=0.5).step()
        >>> round(w.item(), 6)
        0.95

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    @options.leads_on("torch")
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        epsilon_hat: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            epsilon_hat=epsilon_hat,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
        )


# --- settings ---


def _checked(settings: Mapping[str, Any], only: Iterable[str] = _EXTRAS) -> dict[str, Any]:
    """The settings of a group that torch has not, checked and converted: those in `only`."""
    if settings.get("differentiable"):
        why = _REFUSED["differentiable"]
        raise RuntimeError(f"`differentiable=True` cannot be honoured: {why}")
    options.check_clips({name: settings.get(name) for name in options.CLIPS})
    return {k: _EXTRAS[k].check(k, settings[k]) for k in _EXTRAS if k in only and k in settings}


def _are_on_gpus(params: Sequence[Tensor]) -> bool:
    """Whether the kernels of GPUs step all of these."""
    return all(map(cuda.is_on_gpu, params)) and cuda.can_step(list(map(sharded.inner, params)))


def _check_capturable(group: dict[str, Any]) -> None:
    """Raise RuntimeError unless the kernels of GPUs step all of a group's parameters."""
    params = group.get("params", ())
    if not isinstance(params, (Tensor, set)):  # sets are refused by torch
        group["params"] = params = list(params)
    every = (
        [params]
        if isinstance(params, Tensor)
        else [each[1] if isinstance(each, tuple) else each for each in params]
    )
    # Of what has no values yet, the first step sees where it is then.
    tensors = [each for each in every if isinstance(each, Tensor) and not each.is_meta]
    if tensors and not _are_on_gpus(tensors):
        raise RuntimeError(f"`capturable=True` cannot be honoured: {_REFUSED['capturable']}")


def _number(name: str, value: Any, unknown: float = 0.0) -> float:
    """A number, or what a tensor of one holds; of a tensor without values, what is unknown."""
    if isinstance(value, Tensor) and sharded.is_valueless(value):
        return unknown
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"`{name}` must be a number, or a tensor that holds one. Received: {value!r}")


_REFUSED = {
    "capturable": "the coefficients of a step are computed on the host, and the graph of a device "
    "would repeat those of one step for ever, except by the kernels for NVIDIA GPUs, which need "
    "Triton and all parameters there. Use torch.optim to capture steps.",
    "differentiable": "a step is one pass over memory outside of autograd, through which no "
    "gradient flows. Use torch.optim to differentiate steps.",
}


def make_numbers(functions: Any, kind: Pass, epsilon_hat: bool, is_double: bool) -> Any:
    """What makes the coefficients of a step: by numbers of the host, or compiled for a GPU.

    Args:
        functions: `rule.NumberFunctions`, with `single`, which rounds a number to float32.
        kind: the pass that makes a step.
        epsilon_hat: whether epsilon is that of the paper.
        is_double: whether parameters are float64.

    Returns:
        A function of the rate, the steps that were made, what divides gradients, and
        `GroupSettings.host`. It returns the fields of `PassCoefficients` and `AdamCoefficients`.
    """
    decayed = kind.decayed
    single = functions.single

    def numbers(rate: Any, t: Any, scale: Any, host: Any) -> Any:
        settings = StepSettings(scale, host[0], host[1], host[2], host[3], 0.0)
        c = pass_coefficients(functions, kind, settings, rate, t)
        decay = c[3]
        if decayed:
            # As torch rounds what is left: it multiplies by that in the parameter's type, in which
            # 1 - 1e-5 is 1.36e-8 too small.
            left = 1.0 - decay
            decay = 1.0 - left if is_double else 1.0 - single(left)
        r = adam_coefficients_by(
            functions, rate, t + 1.0, host[4], host[5], host[6], host[7], host[8], epsilon_hat
        )
        # Triton knows no tuple that others are unpacked into.
        return c[0], c[1], c[2], decay, c[4], c[5], c[6], c[7], r[0], r[1], r[2], r[3]

    return numbers


class _HostNumbers(Numbers):
    @staticmethod
    def single(x: float) -> float:
        return float(np.float32(x))


_PASS_C = len(PassCoefficients._fields)


class GroupSettings(NamedTuple):
    """What stands in a parameter group, as a step uses it."""

    rate: float
    # Of `make_numbers`: its settings after the functions, what it makes, what that has from here.
    of_numbers: tuple[Pass, bool, bool]
    numbers: Callable[..., Sequence[Any]]
    host: tuple[float, ...]
    passes: Passes
    rule: Rule


_TORCHS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
_READ = (*_TORCHS, *_REFUSED, *_EXTRAS)


def _is_fixed(group: Mapping[str, Any]) -> bool:
    """Whether settings are what they were for as long as they are the same objects."""
    betas, others = group["betas"], [group.get(name) for name in _READ if name != "betas"]
    plain = (float, int, bool, type(None))
    return type(betas) is tuple and all(type(each) in plain for each in (*betas, *others))


def _settings(
    group: Mapping[str, Any], scaled: bool, is_double: bool = False, is_there: bool = False
) -> GroupSettings:
    """The settings that stand in a group now, whoever put them there.

    Args:
        group: one of `param_groups`.
        scaled: whether gradients are divided.
        is_double: whether parameters are float64.
        is_there: whether parameters are where the kernels for GPUs step them.

    Raises:
        ValueError, RuntimeError: if a step cannot be made with them.
    """
    extras = {k: v.default for k, v in _EXTRAS.items()} | _checked(group, only=group)
    rate = group["lr"]
    # What lies on a GPU is read there, if its kernels make the step.
    rate = math.nan if is_there and cuda.is_there(rate) else _number("lr", rate)
    decay = _number("weight_decay", group["weight_decay"])
    try:
        first, second = group["betas"]
    except (TypeError, ValueError):
        first = second = math.nan
    beta_1, beta_2 = _number("betas", first), _number("betas", second)
    if not (0.0 <= beta_1 < 1.0 and 0.0 <= beta_2 < 1.0):
        raise ValueError(
            f"`betas` must be two numbers with 0 <= value < 1. Received: {group['betas']!r}"
        )
    decoupled, clipvalue = bool(group["decoupled_weight_decay"]), extras["clipvalue"]
    step = Pass(
        gradient=True,
        updates=True,
        scaled=scaled,
        clipped_by_factor=extras["clipnorm"] is not None or extras["global_clipnorm"] is not None,
        clipped_by_value=clipvalue is not None,
        negated=bool(group["maximize"]),
        penalised=decay != 0.0 and not decoupled,
        decayed=decay != 0.0 and decoupled,
        averaged=extras["use_ema"],
    )
    short_1, short_2 = beta_1 < 0.5, beta_2 < 0.5
    momentum = extras["ema_momentum"]
    passes = passes_of(step)
    of_numbers = passes.step, bool(extras["epsilon_hat"]), is_double
    return GroupSettings(
        rate=rate,
        of_numbers=of_numbers,
        numbers=make_numbers(_HostNumbers, *of_numbers),
        host=(
            *(clipvalue or 0.0, decay, momentum, 1.0 - momentum),
            *memory(Numbers, beta_1, short_1),
            *memory(Numbers, beta_2, short_2),
            _number("eps", group["eps"]),
        ),
        passes=passes,
        rule=known(by_memory(AMSGRAD if group["amsgrad"] else ADAM, short_1, short_2)),
    )


# A dictionary that holds the state of a parameter, and what it held before.
Replaced = tuple[dict[str, Any], dict[str, Any]]


def _is_grad_scaler_known() -> bool:
    """Whether this version's GradScaler tells a step what a step here listens to."""
    try:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.ones((), device="cpu"))
        listener = _Listener()
        scaler.step(listener)
        return listener.heard == (2.0, 0.0)
    except Exception:  # whatever another version may say to such a call
        return False


class _Listener:
    """An optimizer that does nothing but listen to a GradScaler."""

    _step_supports_amp_scaling = True
    heard: tuple[float, float] | None = None

    def __init__(self) -> None:
        parameter = torch.zeros(1, device="cpu")
        parameter.grad = torch.ones_like(parameter)
        self.param_groups = [{"params": [parameter]}]

    def step(self) -> None:
        told: Any = self  # by attributes that it is given
        self.heard = float(told.grad_scale), float(told.found_inf)


# --- what steps together ---


def _is_watched() -> bool:
    """Whether what torch does is traced, planned or counted by a TorchDispatchMode.

    It would not see what a kernel does: torch's own functions make the step then.
    """
    try:
        return bool(torch._C._len_torch_dispatch_stack())
    except AttributeError:  # it is no public interface
        slow.warn_gone(
            "torch",
            torch.__version__,
            "`torch._C._len_torch_dispatch_stack`",
            "steps of omniadam.torch are made by torch's own functions, not by the kernels",
        )
        return True


def _kind_for(variables: Sequence[Tensor]) -> type[Torch]:
    return TorchDevice if _is_watched() else Torch.kind_for(variables)


@cache
def _describing(kind: type[Torch]) -> Torch:
    """A backend that describes variables, for any bucket."""
    return kind()


class _Bucket:
    """Parameters of one group that have made the same number of steps, and make the next together.

    Those that never had a gradient have no state, and nothing is prepared for them. Buckets are
    never joined: what was prepared for one serves again whenever its parameters step.
    """

    def __init__(self, group: int, positions: list[int], params: list[Tensor]) -> None:
        self.group, self.positions, self.params = group, positions, params
        self.is_absent = False  # whether they have no gradient in this step
        self.has_state = False
        self.is_clocked = False  # whether they are counted on their device
        # Whether its memory is not where it was compared with that of all others.
        self.has_moved = False
        self._place: Any = None
        self._names: tuple[str, ...] = ()
        # What has the numbers of a step on a GPU, once one needs it.
        self._clock: gpu.Clock | None = None
        # That of the bucket that this is a part of: it counted the same steps for all.
        self._counted_by: gpu.Clock | None = None
        # The group's settings as they were read last, and whether they are numbers, which stay.
        self._held: list[Any] = []
        self._is_fixed = False

    def split(self, absent: Sequence[bool]) -> list[_Bucket]:
        """The bucket parted by whether its parameters have a gradient in this step."""
        if len({absent[i] for i in self.positions}) == 1:
            self.is_absent = absent[self.positions[0]]
            return [self]
        without = [k for k, i in enumerate(self.positions) if absent[i]]
        having = [k for k, i in enumerate(self.positions) if not absent[i]]
        return [self._part(having, False), self._part(without, True)]

    def _part(self, indices: list[int], is_absent: bool) -> _Bucket:
        positions = [self.positions[k] for k in indices]
        part = _Bucket(self.group, positions, [self.params[k] for k in indices])
        part.is_absent, part._names = is_absent, self._names
        part._counted_by = self._clock if self.is_clocked else self._counted_by
        return part

    def renewed(
        self,
        state: Any,
        group: Mapping[str, Any],
        replaced: list[Replaced],
        is_clocked: bool,
    ) -> list[_Bucket]:
        """The bucket by the state that its parameters have now, parted by what must be alike.

        With `is_clocked`, steps are counted on GPUs.
        """
        if self.is_current(state, group, False):
            return [self]
        names = dict(zip(map(id, group["params"]), _names(group), strict=True))
        clock = self._clock if self.is_clocked else self._counted_by
        counted = () if clock is None or not clock.is_current else set(map(id, clock.counts))
        parts: dict[Any, tuple[list[int], list[Entry]]] = {}
        with making_state():
            for k, p in enumerate(self.params):
                key: Any = None
                entry = None
                held = state.get(p)
                if not self.is_absent or held:
                    entry, kind, count = _entry(
                        *(p, names[id(p)], state, group, self._names, replaced, is_clocked),
                        counted,
                    )
                    key = kind, entry.slot_dtype, count
                    if kind is cuda.TorchCuda:  # a clock is of one device
                        key = *key, gpu.gpu_of(entry.variable)
                indices, entries = parts.setdefault(key, ([], []))
                indices.append(k)
                entries += [] if entry is None else [entry]
        result = []
        for indices, entries in parts.values():
            part = self._part(indices, self.is_absent)
            part._prepare(entries, state, group, is_clocked)
            part._counted_by = None
            result.append(part)
        return result

    def _prepare(
        self, entries: list[Entry], state: Any, group: Mapping[str, Any], is_clocked: bool
    ) -> None:
        self._names = _slot_names(group)
        self.has_state = bool(entries)
        if not entries:
            return
        self._slots = itemgetter(*self._names)
        self._states = list(map(state.get, self.params))
        self._is_plain = all(e.variable is p for e, p in zip(entries, self.params, strict=True))
        self._tensors = list(map(sharded.local, self._reached()))
        self._places, self._looks = self._placed(), list(map(sharded.looks, self.params))
        steps = [each["step"] for each in self._states]
        is_watched = _is_watched()
        self._variables = [entry.variable for entry in entries]
        self._backend: Any = _kind_for(self._variables)()
        self.is_clocked = is_clocked and isinstance(self._backend, cuda.TorchCuda)
        self._unreachable = [step for step in steps if is_watched or not _is_plain(step)]
        self._steps = [] if is_watched else list(filter(_is_plain, steps))
        self.count_places = list(map(Tensor.data_ptr, self._steps))
        self._counts = [] if self.is_clocked else [step.numpy() for step in self._steps]
        self._t: Any = 0.0 if self.is_clocked else _count(steps[0])
        self._ts = [self._t] * len(self._counts)
        self._is_double = entries[0].slot_dtype == "float64"
        if self.is_clocked:
            self._clock = self._new_clock(self._steps)
        self._selection = Selection(tuple(entries), ())
        if isinstance(self._backend, TorchMemory) and self._backend.fast is not None:
            self._backend.fast.note_built(self._selection.entries)  # they were described just now
        self._idle = Selection((), tuple(entries))

    def _reached(self) -> list[Tensor]:
        return [*self.params, *chain.from_iterable(map(self._slots, self._states))]

    def _placed(self) -> list[tuple[Any, ...]]:
        # Of plain tensors the backend sees it; of others it sees only what was taken out of them.
        return [] if self._is_plain else [sharded.place(t) for t in self._tensors]

    def is_current(self, state: Any, group: Mapping[str, Any], is_known: bool) -> bool:
        """Whether the state is what was prepared for, and counts what it was left to count.

        Args:
            state: of the optimizer.
            group: of the parameters.
            is_known: whether each parameter has in the state what it had at the last step.
        """
        # Elsewhere counts are compared by the host, which would wait for a device.
        if not fast.is_enabled() and not self.is_clocked:
            return False
        if self._clock is not None and not self._clock.is_current:
            return False
        if _slot_names(group) != self._names:
            return False
        if not self.has_state:
            return self.is_absent and not any(map(state.get, self.params))
        if self._unreachable:  # nobody can tell cheaply
            return False
        if not (is_known or all(map(is_, map(state.get, self.params), self._states))):
            return False
        try:
            tensors: Iterable[Tensor] = self._reached()
        except KeyError:
            return False
        if not self._is_plain:
            tensors = map(sharded.local, tensors)
        return (
            all(map(is_, tensors, self._tensors))
            # Its `data` may have been replaced, as it is to move state to another device.
            and list(map(Tensor.data_ptr, self._steps)) == self.count_places
            and list(map(np.ndarray.item, self._counts)) == self._ts
            and self._placed() == self._places
        )

    def gathered(self, gradients: list[Any]) -> Any:
        """The gradients in the backend's form; None if the parameters are not what they were."""
        selection, variables = self._selection, self._variables
        if self.is_absent:
            selection, gradients, variables = self._idle, [], []
        elif not self._is_plain:
            gradients = list(map(sharded.gradient_of, gradients, self.params))
        backend, entries = self._backend, selection.entries
        found = backend.recognise(selection, gradients, variables)
        if found is None and list(map(sharded.looks, self.params)) == self._looks:
            checked = [backend.gradient(g, e) for g, e in zip(gradients, entries, strict=True)]
            found = backend.gather(selection, checked)
            place = backend.place(selection)
            self.has_moved = self.has_moved or place != self._place
            self._place = place
        return found

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The parameters with their state."""
        return self._selection.entries

    @property
    def backend(self) -> Any:
        """What steps them."""
        return self._backend

    def norm(self) -> Group:
        """The pass that measures gradients, of what of them is here; once a step is planned."""
        kind, scale = self._settings.passes.norm, self._scale
        return Group(kind, NOTHING, self._selection, (), PassCoefficients(scale))

    def is_decided_there(self, gradients: Any) -> bool:
        """Whether kernels alone make the step, which read on their device if it is to be made."""
        return self.is_clocked and not (gradients.odd or gradients.located.odd_rest)

    def square_sums(self, gradients: Any) -> list[Any]:
        """The sum of squares of each gradient, of the part of it that is here."""
        found: list[Any] = self._backend.square_sums(self.norm(), gradients)
        return found

    def shared(self, factor: Any, count: int) -> Sequence[Any]:
        """A factor for as many gradients, that may be on another device."""
        if isinstance(self._backend, TorchMemory):
            return [float(factor)] * count
        if isinstance(self._backend, cuda.TorchCuda) and isinstance(factor, Tensor):
            return gpu.Factors(factor.reshape(1), count, joint=True)
        return [factor] * count

    def planned(
        self, group: Mapping[str, Any], scale: Any, skip: Tensor | None, has_clocks: bool
    ) -> Group | None:
        """What the backend is to do in this step, apart from clipping by norms; without gradients,
        only the averages.

        Args:
            group: of the parameters.
            scale: what gradients are divided by.
            skip: on a GPU, not zero if it is to skip the step.
            has_clocks: whether a GPU can read the rate there.
        """
        if group.get("capturable") and not (self.is_clocked or _is_watched()):
            raise RuntimeError(f"`capturable=True` cannot be honoured: {_REFUSED['capturable']}")
        scaled = isinstance(scale, Tensor) or scale != 1.0
        self._scale = scale
        held = [scaled, *map(group.get, _READ)]
        if not self._is_fixed or not all(map(is_, held, self._held)):
            is_there = has_clocks and isinstance(self._backend, cuda.TorchCuda)
            self._settings = _settings(group, scaled, self._is_double, is_there)
            self._held, self._is_fixed = held, _is_fixed(group)
        now = self._settings
        passes = now.passes
        if self.is_absent and not passes.average.averaged:
            return None
        is_told = False
        if isinstance(self._backend, cuda.TorchCuda):
            self._backend.clock = None
            is_told = self.is_clocked or (has_clocks and cuda.is_there(group["lr"]))
        numbers: Sequence[Any]
        if is_told:
            numbers = self._told(group["lr"], scale, skip)
        else:
            numbers = now.numbers(now.rate, self._t, scale, now.host)
        pass_c = PassCoefficients(*numbers[:_PASS_C])
        if self.is_absent:
            return Group(passes.average, NOTHING, self._idle, (), pass_c)
        return Group(passes.step, now.rule, self._selection, numbers[_PASS_C:], pass_c)

    def _told(self, rate: Any, scale: Any, skip: Tensor | None) -> list[Any]:
        """The numbers of a step where some of them are on a GPU, which makes all the others."""
        now, backend = self._settings, self._backend
        if self._clock is None:
            self._clock = self._new_clock(())
        known = self._t, scale, rate if cuda.is_there(rate) else now.rate
        numbers = self._clock.tell(make_numbers, now.of_numbers, known, skip, now.host)
        backend.clock = self._clock.table
        # Which the host knows: they are not of those that change.
        told = PassCoefficients(*numbers[:_PASS_C])._replace(steps=1.0, overwrite=0.0, zero=0.0)
        return [*told, *numbers[_PASS_C:]]

    def _new_clock(self, counts: Sequence[Tensor]) -> gpu.Clock:
        device = gpu.gpu_of(self._variables[0])
        return gpu.Clock(device, counts, _PASS_C + len(ADAM.coefficients))

    def add_to(self, whole: Work, gradients: Any, planned: Group | None) -> None:
        """Make the step, and its count, part of what is done as a whole, in the host's memory."""
        if planned is None or not isinstance(self._backend, TorchMemory):
            return
        gradients.work = whole
        self._backend.sweep(planned, gradients)
        if not self.is_absent:
            counted = map(setitem, self._counts, repeat(...), repeat(self._t + 1.0))
            whole.calls.append((list, counted))

    def prepared(self, gradients: Any, planned: Group | None) -> list[Callable[[], Any]]:
        """What makes the step elsewhere: on a GPU, all that can fail is done."""
        if planned is None or isinstance(self._backend, TorchMemory):
            return []
        if isinstance(self._backend, cuda.TorchCuda):
            calls = self._backend.prepared(planned, gradients)
            if self.is_clocked and not self.is_absent:
                assert self._clock is not None
                calls.append(self._clock.advanced())
            return calls
        return [partial(self._backend.sweep, planned, gradients)]

    def advance(self, planned: Group | None, calls: Sequence[Callable[[], Any]]) -> None:
        """Make the step elsewhere, and note that it was made."""
        if planned is None:
            return
        is_on_host = isinstance(self._backend, TorchMemory)
        for call in calls:
            call()
        if self.is_absent:
            return
        if not self._is_plain:
            torch.autograd.graph.increment_version(self.params)
        if self.is_clocked:  # one of the calls has counted
            return
        t = self._t + 1.0
        for count in () if is_on_host else self._counts:
            count[()] = t
        if self._unreachable:
            with torch.no_grad():
                for step in self._unreachable:
                    step.fill_(t)
        self._t = self._counts[0].item() if self._counts else t  # float32 counts to 2**24
        self._ts = [self._t] * len(self._counts)


def _total(squares: Sequence[Any]) -> Any:
    """Their sum: of those on a device in one operation."""
    there = [each for each in squares if isinstance(each, Tensor)]
    here = sum(each for each in squares if not isinstance(each, Tensor))
    return torch.stack(there).sum() + here if there else here


def _each_clipped(squares: Sequence[Any], limit: float) -> Sequence[Any]:
    """What gradients are multiplied by, each by its own norm: on a device in a few operations."""
    clip, sqrt = NormClip(), DeviceNumbers.sqrt
    if all(isinstance(each, Tensor) for each in squares):
        (values,) = clip.factors(DeviceNumbers, [sqrt(torch.stack(list(squares)))], limit)
        return gpu.Factors(values, len(squares), joint=False)
    return clip.factors(DeviceNumbers, map(sqrt, squares), limit)


def _names(group: Mapping[str, Any]) -> list[str]:
    """What errors call the parameters; some may have been put into the group without a name."""
    given = group.get("param_names") or ()
    numbers = range(len(group["params"]))
    return [str(given[i]) if i < len(given) else f"params[{i}]" for i in numbers]


def _buckets(params: list[Tensor], sizes: Sequence[int]) -> list[_Bucket]:
    buckets, start = [], 0
    for group, size in enumerate(sizes):
        if size:
            positions = list(range(start, start + size))
            buckets.append(_Bucket(group, positions, params[start : start + size]))
        start += size
    return buckets


def _check_distinct(buckets: Sequence[_Bucket]) -> None:
    """Raise ValueError if two parameters share memory, in whatever groups they stand."""
    for kind in (TorchMemory, TorchDevice):
        found = [bucket for bucket in buckets if isinstance(bucket.backend, kind)]
        # In one bucket, what lies in the host's memory was compared as it was gathered.
        if len(found) > (kind is TorchMemory):
            kind().check_distinct([entry for bucket in found for entry in bucket.entries])
    counts = [place for bucket in buckets for place in bucket.count_places]
    if len(set(counts)) < len(counts):
        raise ValueError(
            "Each parameter must have a count of its own in the state. Received one tensor 'step' "
            "of two parameters, which would be counted twice or once. Pass clone() of it."
        )
    for bucket in buckets:
        bucket.has_moved = False


# --- the state of a parameter ---


def _slot_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under which a parameter's state is kept, in the order of the rule's slots."""
    return _NAMES[bool(group.get("amsgrad")), bool(group.get("use_ema"))]


_OWN = ("step", "exp_avg", "exp_avg_sq")
_NAMES = {
    (False, False): _OWN,
    (True, False): (*_OWN, "max_exp_avg_sq"),
    (False, True): (*_OWN, "average"),
    (True, True): (*_OWN, "max_exp_avg_sq", "average"),
}


def _entry(
    p: Tensor,
    name: str,
    state: Any,
    group: Mapping[str, Any],
    known: Sequence[str],
    replaced: list[Replaced],
    is_clocked: bool,
    counted: Collection[int] = (),
) -> tuple[Entry, type[Torch], float]:
    """A parameter with its state, which is created, or brought into the form that a step needs,
    the kind of backend that steps it, and how many steps it has made.

    `known` are the names of what the last step kept, if there was one: that may not be missing.
    With `is_clocked`, steps are counted on a GPU. Counts whose identities are in `counted` are
    equal, and are not read, which would wait for the device: -1.0 stands for them.
    """
    variable = sharded.inner(p)
    kind = _kind_for([variable])
    entry = _describing(kind).describe(variable, name)
    names, held = _slot_names(group), state[p]
    if held != {}:
        _check_complete(held, (*_OWN, *known), name)
    replaced.append((held, dict(held)))
    on_gpu = is_clocked and kind is cuda.TorchCuda
    count = 0.0
    if on_gpu and id(held.get("step")) in counted:
        count = -1.0
    elif held.get("step") is not None:
        count = _count(_slot("step", held["step"], p, name, group))
    if on_gpu and not _counts_on(held.get("step"), variable.device):
        like = {"dtype": torch.float32, "device": variable.device}
        held["step"] = torch.full((), count, **like)
    kept = {"step"} if on_gpu else ()
    held |= {key: _slot(key, held.get(key), p, name, group) for key in names if key not in kept}
    entry.slots = tuple(sharded.inner(held[key]) for key in names[1:] if key != "average")
    if group.get("use_ema"):
        entry.average = sharded.inner(held["average"])
    return entry, kind, count


def _counts_on(step: Any, device: torch.device) -> bool:
    """Whether it is a count on a GPU already."""
    is_count = isinstance(step, Tensor) and _is_plain(step) and step.dtype == torch.float32
    is_count = is_count and step.shape == ()
    return is_count and step.device == device


def _check_complete(held: Any, names: Iterable[str], name: str) -> None:
    """Raise ValueError if there is a state, but not all of it: the rest would begin at zero."""
    if not isinstance(held, dict):
        raise ValueError(
            f"The state of parameter '{name}' must be a dictionary. Received: {held!r}"
        )
    missing = sorted({key for key in names if held.get(key) is None})
    if missing and any(key in held for key in _NAMES[True, True]):
        raise ValueError(
            f"The state of parameter '{name}' must be complete, or not there at all. It has "
            f"{sorted(key for key in held if held[key] is not None)} and lacks {missing}. Load "
            "a state that has it, or remove what is left to begin anew."
        )


def _slot(key: str, value: Any, p: Tensor, name: str, group: Mapping[str, Any]) -> Tensor:
    """A state tensor as a step needs it: itself, if it is so."""
    if key == "step":
        return _step(value, name, group)
    if value is not None and not isinstance(value, Tensor):
        raise ValueError(
            f"The state '{key}' of parameter '{name}' must be a tensor. Received: {value!r}"
        )
    # float16 and bfloat16 are computed in float32, and so is their state.
    dtype = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
    if value is None:
        slot = zeros_like(p, dtype)
        return slot.copy_(p) if key == "average" else slot
    kind = sharded.dtensor()
    if value.shape != p.shape:
        raise ValueError(
            f"The state '{key}' of parameter '{name}' must have its shape, {tuple(p.shape)}. "
            f"Received shape {tuple(value.shape)}. Give the parameters to the optimizer in the "
            "order of the state, or with names on both sides."
        )
    if value.is_complex() != p.is_complex():
        raise ValueError(
            f"The state '{key}' of parameter '{name}' must be real or complex as it is, of "
            f"dtype {p.dtype}. Received dtype {value.dtype}. Load the state of a parameter of "
            "its kind."
        )
    if isinstance(value, kind) != isinstance(p, kind):
        raise ValueError(
            f"The state '{key}' of parameter '{name}' must be sharded as it is: the parameter "
            f"is a {type(p).__name__}, the state a {type(value).__name__}. Load it by "
            "set_optimizer_state_dict of torch.distributed.checkpoint.state_dict."
        )
    if isinstance(p, kind) and value.placements != p.placements:
        value = value.redistribute(p.device_mesh, p.placements)
    mine, of_p = sharded.local(value), sharded.local(p)
    if (mine.dtype, mine.device) == (dtype, of_p.device) and sharded.lies_like(mine, of_p):
        return value
    return zeros_like(p, dtype).copy_(value)


def _step(value: Any, name: str, group: Mapping[str, Any]) -> Tensor:
    """The count of a parameter's steps, as a tensor on the host."""
    if value is None:
        wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
        return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
    # 16 bits do not count to a thousand, 8 not to 256, and a bool not to two.
    dtype = getattr(value, "dtype", torch.float32)
    dtype = dtype if dtype in _COUNTING else torch.float32
    try:
        if isinstance(value, Tensor) and value.is_complex():
            raise TypeError("torch would drop the imaginary part")
        # On a device it would be waited for at each step.
        step = torch.as_tensor(value, dtype=dtype).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The state 'step' of parameter '{name}' must be a number >= 0. Received: {value!r}"
        ) from error
    step = step.detach().clone() if step.requires_grad else step
    if step.numel() != 1 or not 0.0 <= _count(step) < math.inf:
        raise ValueError(
            f"The state 'step' of parameter '{name}' must be a number >= 0. Received: {value!r}"
        )
    return step


_COUNTING = (torch.float32, torch.float64, torch.int32, torch.int64)


def _count(step: Tensor) -> float:
    # Where torch is asked for a number, it may belong to a device.
    return float(step.numpy().item() if _is_plain(step) else _number("step", step))


@dataclass(frozen=True, eq=False)
class _Kept:
    """A state tensor on its way through torch's `load_state_dict`, which would cast it."""

    value: Tensor


def _prepared(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """What is about to be loaded, in the order and the form that the optimizer needs."""
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in own] != [len(g["params"]) for g in saved]:
        return None  # torch says what is wrong
    kept = (*_EXTRAS, *_REFUSED)
    saved = _matched(own, saved)
    state = dict(state_dict["state"])
    with making_state():
        for group, s in zip(own, saved, strict=True):
            for p, key, name in zip(group["params"], s["params"], _names(s), strict=True):
                if key in state:
                    # What the state's own groups say that they keep.
                    _check_complete(state[key], _slot_names(s), str(name))
                    state[key] = _copied(
                        state[key], p, str(name), optimizer.state.get(p, {}), group
                    )
    saved = [
        {**{k: o[k] for k in kept if k in o}, **{k: v for k, v in s.items() if k not in _REFUSED}}
        for o, s in zip(own, saved, strict=True)
    ]
    saved = [s | _checked(s, only=s) for s in saved]
    return {**state_dict, "param_groups": saved, "state": state}


def _copied(
    slots: dict[str, Any], p: Tensor, name: str, own: Mapping[str, Any], group: Mapping[str, Any]
) -> dict[str, Any]:
    result = dict(slots)
    for key, value in slots.items():
        if key not in _NAMES[True, True]:
            continue
        fitting = _slot(key, value, p, name, group)
        # What a checkpoint was read into in place is the optimizer's own already.
        is_own = own.get(key) is value
        result[key] = fitting if fitting is not value or is_own else fitting.detach().clone()
        if key != "step":
            result[key] = _Kept(result[key])
    return result


def _matched(own: Sequence[Any], saved: Sequence[Any]) -> list[dict[str, Any]]:
    """The saved groups with their parameters in the order of the optimizer's, by their names."""
    is_named = all("param_names" in group for group in (*own, *saved))
    # Names for keys: torch.distributed.checkpoint has found the parameters by name itself.
    if not is_named or any(isinstance(key, str) for group in saved for key in group["params"]):
        return list(saved)
    ours = [list(group["param_names"]) for group in own]
    theirs = [list(group["param_names"]) for group in saved]
    for stripped in (list, _unwrapped, _bare):
        order = _order(stripped(ours), stripped(theirs), ours, theirs)
        if order is not None:
            return [
                {
                    **saved[i],
                    "params": [saved[i]["params"][k] for k in places],
                    "param_names": list(group["param_names"]),
                }
                for group, (i, places) in zip(own, order, strict=True)
            ]
    raise ValueError(
        "The parameters of each group must be those whose state is loaded. The groups hold "
        f"{ours}, the state is of {theirs}. Give the parameters to the optimizer in the same "
        "groups; or, to load by position, delete 'param_names' from the groups of the state."
    )


Names = list[list[str]]


def _order(
    ours: Names, theirs: Names, full: Names, their_full: Names
) -> list[tuple[int, list[int]]] | None:
    """For each group the saved one with the same names, and where in it each name stands.

    None if there is none, or if names that are distinct in full are the same here.
    """
    for short, long in ((ours, full), (theirs, their_full)):
        if len(set(chain(*short))) < len(set(chain(*long))):
            return None
    order = list(range(len(ours)))
    if [sorted(names) for names in ours] != [sorted(names) for names in theirs]:
        places = {frozenset(names): i for i, names in enumerate(theirs)}
        order = [places.get(frozenset(names), -1) for names in ours]
    found = []
    for names, i in zip(ours, order, strict=True):
        if i < 0 or sorted(names) != sorted(theirs[i]):
            return None
        if names == theirs[i]:
            found.append((i, list(range(len(names)))))
        elif len(set(names)) == len(names):
            stands = {name: k for k, name in enumerate(theirs[i])}
            found.append((i, [stands[name] for name in names]))
        else:
            return None
    return found


# What wrappers of a module put into the names of its parameters.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(rf"module\.|{_WRAPPERS.pattern}")


def _unwrapped(groups: Names) -> Names:
    """Names without what wrappers of the whole module put before all of them."""
    while found := _OUTER.match(next(chain(*groups), "")):
        if not all(name.startswith(found[0]) for name in chain(*groups)):
            break
        groups = [[name.removeprefix(found[0]) for name in names] for names in groups]
    return groups


def _bare(groups: Names) -> Names:
    """Names without what wrappers of parts of it put into them, either."""
    return _unwrapped([[_WRAPPERS.sub("", name) for name in names] for names in groups])
