"""Adam and AdamW with the interface of torch.optim: change the import, keep everything else.

Nothing is computed here. Parameters become entries of a backend; those of one group that have made
the same number of steps form a bucket, and a step is one sweep over each bucket. torch's state of a
parameter (`exp_avg` and so on) is what the kernels work on: there are no copies of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import is_, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer

from . import options
from .adam import _ADAM, _AMSGRAD, by_memory
from .backends import sharded
from .backends.base import Entry, Selection
from .backends.host import Numbers
from .backends.torch import Scalars, Torch, TorchMemory
from .rule import (
    Pass,
    PassCoefficients,
    adam_coefficients,
    clip_factor,
    clip_factor_global,
)

if not issubclass(torch.optim.AdamW, torch.optim.Adam):
    raise ImportError(f"omniadam.torch needs torch 2.7 or newer. Found torch {torch.__version__}.")


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
        capturable, differentiable: must be False.
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
        RuntimeError: if `capturable` or `differentiable` is set.

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
    _is_averaged = False
    # What the last step was prepared for: see `_forget`.
    _params: Sequence[Tensor] = ()
    _sizes: Sequence[int] = ()
    _absent: Sequence[bool] = ()
    _buckets: Sequence[_Bucket] = ()
    _meshes: Sequence[sharded.Mesh] = ()
    _are_flat = False

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as in torch.optim.

        Args:
            param_group: `{"params": ...}` and any of the constructor's settings; the others are as
                they were given to it.
        """
        self.defaults.update(self._given)
        if isinstance(param_group, dict):
            param_group.update(_checked({**self.defaults, **param_group}, only=param_group))
        super().add_param_group(param_group)

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
        if type(self).step is not Adam.step:  # then torch has wrapped that one
            return False
        hooks = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
        if hooks or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return True
        # What is being compiled cannot ask.
        return not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()

    def _closed_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_closed_step)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self) -> None:
        if self._is_averaged:
            raise RuntimeError("The parameters hold their averages: step outside of averaged().")
        # What a GradScaler leaves here for a step that unscales by itself.
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        is_skipped = found_inf is not None and bool(found_inf.item())
        if scale is not None and not is_skipped:
            self._unscale(scale.item())
        before = len(self.state)
        try:
            work = self._arranged()
            is_idle = is_skipped or (before == 0 and self._is_initialisation())
            factors = {} if is_idle else self._clip_factors(work)
        except BaseException:
            self._forget()
            while len(self.state) > before:
                self.state.popitem()
            raise
        for bucket, gradients in [] if is_idle else work:
            bucket.advance(self.param_groups[bucket.group], gradients, factors.get(bucket, ()))

    # --- which parameters step together ---

    def _arranged(self) -> list[tuple[_Bucket, Any]]:
        """What is to be done: buckets with their gradients, checked. Nothing is updated yet."""
        groups, state = self.param_groups, self.state
        sizes = [len(group["params"]) for group in groups]
        params = [p for group in groups for p in group["params"]]
        gradients = [p.grad for p in params]
        absent = [g is None for g in gradients]
        if sizes != self._sizes or not all(map(is_, params, self._params)):
            self._sizes, self._params = sizes, params
            self._meshes, self._are_flat = sharded.meshes(params), any(map(sharded.is_flat, params))
            self._buckets, self._absent = _buckets(params, sizes), ()
        if absent != self._absent:
            self._absent = absent
            self._buckets = [part for bucket in self._buckets for part in bucket.split(absent)]
        if not all(bucket.is_current(state, groups[bucket.group]) for bucket in self._buckets):
            self._buckets = [
                part
                for bucket in self._buckets
                for part in bucket.renewed(state, groups[bucket.group])
            ]
        work = []
        for bucket in self._buckets:
            if bucket.has_state:
                found = bucket.gathered([gradients[i] for i in bucket.positions])
                if found is None:  # parameters were converted or moved, and take their state along
                    self._forget()
                    return self._arranged()
                work.append((bucket, found))
        return work

    def _forget(self) -> None:
        for name in ("_params", "_sizes", "_absent", "_buckets", "_meshes", "_are_flat"):
            self.__dict__.pop(name, None)

    def _is_initialisation(self) -> bool:
        """Whether this is no step of training: torch.distributed.checkpoint makes an optimizer
        create its state by a step with rates and gradients of zero, which must do nothing else.
        """
        return all(float(group["lr"]) == 0 for group in self.param_groups) and not any(
            sharded.has_values(p.grad) for p in self._params if p.grad is not None
        )

    # --- what gradients are multiplied by ---

    def _unscale(self, scale: float) -> None:
        """Divide the gradients by a GradScaler's scale, as torch's fused optimizers do."""
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale)

    def _clip_factors(self, work: Sequence[tuple[_Bucket, Any]]) -> dict[_Bucket, list[Any]]:
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
        sums = {b: b.square_sums(gradients) for b, gradients in work if not b.is_absent}
        if self._meshes:
            places = {i: (s, k) for b, s in sums.items() for k, i in enumerate(b.positions)}
            for mesh in self._meshes:
                mesh.add_up(places)
        every = [each for squares in sums.values() for each in squares]
        devices = [each.device for each in every if isinstance(each, Tensor)]
        norm = Scalars.sqrt(sum(e.to(devices[0]) if isinstance(e, Tensor) else e for e in every))
        factors: dict[_Bucket, list[Any]] = {}
        for bucket, squares in sums.items():
            group = groups[bucket.group]
            limit, global_limit = group.get("clipnorm"), group.get("global_clipnorm")
            if limit is not None:
                factors[bucket] = [clip_factor(Scalars, Scalars.sqrt(s), limit) for s in squares]
            elif global_limit is not None:
                factor = bucket.number(clip_factor_global(Scalars, norm, global_limit))
                factors[bucket] = [factor] * len(squares)
        return factors

    # --- averages ---

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters have the values of their averages, to evaluate or to save the model.

        Afterwards they have their own values again. A parameter without an average keeps its
        value.

        Raises:
            RuntimeError: if called again, or if a step is made, before that.

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
        if self._is_averaged:
            raise RuntimeError("The parameters hold their averages already.")
        held = []
        with torch.no_grad():
            for p, state in self.state.items():
                if isinstance(p, Tensor) and "average" in state:
                    held.append((p, p.detach().clone()))
                    p.copy_(state["average"])
        self._is_averaged = True
        try:
            yield
        finally:
            self._is_averaged = False
            with torch.no_grad():
                for p, value in held:
                    p.copy_(value)

    # --- state ---

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
        self._forget()


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

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
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
    for name, why in _REFUSED.items():
        if settings.get(name):
            raise RuntimeError(f"`{name}=True` cannot be honoured: {why}")
    options.check_clips({name: settings.get(name) for name in options.CLIPS})
    return {k: _EXTRAS[k].check(k, settings[k]) for k in _EXTRAS if k in only and k in settings}


_REFUSED = {
    "capturable": "the coefficients of a step are computed on the host, and the graph of a device "
    "would repeat those of one step for ever. Use torch.optim to capture steps.",
    "differentiable": "a step is one pass over memory outside of autograd, through which no "
    "gradient flows. Use torch.optim to differentiate steps.",
}


_pass = cache(Pass)  # a plan belongs to one of these objects


_AVERAGE = Pass(gradient=False, averaged=True)
_SQUARES = Pass(gradient=True, updates=True)


# --- what steps together ---


class _Bucket:
    """Parameters of one group that have made the same number of steps, and make the next together.

    Those that never had a gradient have no state, and nothing is prepared for them. Buckets are
    never joined: what was prepared for one serves again whenever its parameters step.
    """

    def __init__(self, group: int, positions: list[int], params: list[Tensor]) -> None:
        self.group, self.positions, self.params = group, positions, params
        self.is_absent = False  # whether they have no gradient in this step
        self.has_state = False
        self._names: tuple[str, ...] = ()

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
        part.is_absent = is_absent
        return part

    def renewed(self, state: Any, group: Mapping[str, Any]) -> list[_Bucket]:
        """The bucket by the state that its parameters have now, parted by what must be alike."""
        if self.is_current(state, group):
            return [self]
        own = group["params"]
        names = dict(zip(map(id, own), group.get("param_names") or _numbered(own), strict=True))
        parts: dict[Any, tuple[list[int], list[Entry]]] = {}
        for k, p in enumerate(self.params):
            key, entry = None, None
            if not self.is_absent or state.get(p):
                entry = _entry(p, names[id(p)], state, group)
                backend = type(Torch.over([entry.variable]))
                key = backend, entry.slot_dtype, state[p]["step"].numpy().item()
            indices, entries = parts.setdefault(key, ([], []))
            indices.append(k)
            entries += [] if entry is None else [entry]
        result = []
        for indices, entries in parts.values():
            part = self._part(indices, self.is_absent)
            part._prepare(entries, state, group)
            result.append(part)
        return result

    def _prepare(self, entries: list[Entry], state: Any, group: Mapping[str, Any]) -> None:
        self._names = _slot_names(group)
        self.has_state = bool(entries)
        if not entries:
            return
        self._slots = itemgetter(*self._names)
        self._states = list(map(state.get, self.params))
        self._is_plain = all(e.variable is p for e, p in zip(entries, self.params, strict=True))
        self._tensors = list(map(sharded.local, self._reached()))
        self._places, self._looks = self._placed(), list(map(sharded.looks, self.params))
        self._steps = [each["step"] for each in self._states]
        self._count_places = list(map(Tensor.data_ptr, self._steps))
        self._counts = [step.numpy() for step in self._steps]
        self._t: float = self._counts[0].item()
        self._ts = [self._t] * len(entries)
        self._is_double = entries[0].slot_dtype == "float64"
        self._variables = [entry.variable for entry in entries]
        self._backend: Any = Torch.over(self._variables)
        self._selection = Selection(tuple(entries), ())
        self._idle = Selection((), tuple(entries))

    def _reached(self) -> list[Tensor]:
        return [*self.params, *(slot for each in map(self._slots, self._states) for slot in each)]

    def _placed(self) -> list[int]:
        # Of plain parameters the backend sees it.
        return [] if self._is_plain else [sharded.local(p).data_ptr() for p in self.params]

    def is_current(self, state: Any, group: Mapping[str, Any]) -> bool:
        """Whether the state is what was prepared for, and counts what it was left to count."""
        if _slot_names(group) != self._names:
            return False
        if not self.has_state:
            return self.is_absent and not any(map(state.get, self.params))
        if not all(map(is_, map(state.get, self.params), self._states)):
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
            and list(map(Tensor.data_ptr, self._steps)) == self._count_places
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
        return found

    def square_sums(self, gradients: Any) -> list[Any]:
        """The sum of squares of each gradient, of the part of it that is here."""
        found: list[Any] = self._backend.square_sums(
            _SQUARES, _ADAM, self._selection, gradients, PassCoefficients()
        )
        return found

    def number(self, factor: Any) -> Any:
        """A factor that may be on another device, in the form that the backend takes."""
        return float(factor) if isinstance(self._backend, TorchMemory) else factor

    def advance(self, group: Mapping[str, Any], gradients: Any, factors: Sequence[Any]) -> None:
        """Make the step; without gradients, only bring the averages up to date."""
        averaged = bool(group.get("use_ema"))
        # The first average is the parameter itself, not a step from zero towards it.
        momentum = group.get("ema_momentum", _EXTRAS["ema_momentum"].default) if self._t else 0.0
        if self.is_absent:
            if averaged:
                pass_c = PassCoefficients(momentum=momentum, one_minus_momentum=1.0 - momentum)
                self._backend.sweep(_AVERAGE, _ADAM, self._idle, gradients, (), _NO_RULE_C, pass_c)
            return
        rate, weight_decay = float(group["lr"]), float(group["weight_decay"])
        clipvalue, decoupled = group.get("clipvalue"), bool(group["decoupled_weight_decay"])
        kind = _pass(
            gradient=True,
            updates=True,
            clipped_by_factor=bool(factors),
            clipped_by_value=clipvalue is not None,
            negated=bool(group["maximize"]),
            penalised=weight_decay != 0.0 and not decoupled,
            decayed=weight_decay != 0.0 and decoupled,
            averaged=averaged,
        )
        decay = self._lost(weight_decay * rate) if decoupled else weight_decay
        pass_c = PassCoefficients(1.0, 1.0, clipvalue or 0.0, decay, momentum, 1.0 - momentum)
        t, (beta_1, beta_2) = self._t + 1.0, map(float, group["betas"])
        epsilon, epsilon_hat = float(group["eps"]), bool(group.get("epsilon_hat"))
        short = {"short_1": beta_1 < 0.5, "short_2": beta_2 < 0.5}
        rule_c = adam_coefficients(
            Numbers, rate, t, beta_1, beta_2, epsilon, epsilon_hat=epsilon_hat, **short
        )
        rule = by_memory(_AMSGRAD if group["amsgrad"] else _ADAM, **short)
        self._backend.sweep(kind, rule, self._selection, gradients, factors, rule_c, pass_c)
        if not self._is_plain:
            torch.autograd.graph.increment_version(self.params)
        for count in self._counts:
            count[()] = t
        self._t = self._counts[0].item()  # float32 counts to 2**24
        self._ts = [self._t] * len(self._counts)

    def _lost(self, decay: float) -> float:
        """The part of a parameter that decoupled decay takes away, as torch rounds it: it
        multiplies by the rest in the parameter's type, in which 1 - 1e-5 is 1.36e-8 too small.
        """
        rest = 1.0 - decay
        return 1.0 - (rest if self._is_double else float(np.float32(rest)))


_NO_RULE_C = (0.0, 0.0, 0.0, 0.0)


def _numbered(params: Sequence[Tensor]) -> list[str]:
    return [f"params[{i}]" for i in range(len(params))]


def _buckets(params: list[Tensor], sizes: Sequence[int]) -> list[_Bucket]:
    buckets, start = [], 0
    for group, size in enumerate(sizes):
        if size:
            positions = list(range(start, start + size))
            buckets.append(_Bucket(group, positions, params[start : start + size]))
        start += size
    return buckets


# --- the state of a parameter ---


def _slot_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under which a parameter's state is kept, in the order of the rule's slots."""
    return _NAMES[bool(group["amsgrad"]), bool(group.get("use_ema"))]


_OWN = ("step", "exp_avg", "exp_avg_sq")
_NAMES = {
    (False, False): _OWN,
    (True, False): (*_OWN, "max_exp_avg_sq"),
    (False, True): (*_OWN, "average"),
    (True, True): (*_OWN, "max_exp_avg_sq", "average"),
}


def _entry(p: Tensor, name: str, state: Any, group: Mapping[str, Any]) -> Entry:
    """A parameter with its state, which is created, or brought into the form that a step needs."""
    variable = sharded.inner(p)
    entry = Torch.over([variable]).describe(variable, name)
    held = state[p]
    held |= {key: _slot(key, held.get(key), p, name, group) for key in _slot_names(group)}
    entry.slots = tuple(
        sharded.inner(held[key]) for key in _slot_names(group)[1:] if key != "average"
    )
    if group.get("use_ema"):
        entry.average = sharded.inner(held["average"])
    return entry


def _slot(key: str, value: Any, p: Tensor, name: str, group: Mapping[str, Any]) -> Tensor:
    """A state tensor as a step needs it: itself, if it is so."""
    if key == "step":
        if value is None:
            wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
            return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
        # On a device it would be waited for at each step.
        return torch.as_tensor(value, dtype=getattr(value, "dtype", torch.float32)).cpu()
    # float16 and bfloat16 are computed in float32, and so is their state.
    dtype = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
    with torch.inference_mode(False), torch.no_grad():
        if value is None:
            slot = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            return slot.copy_(p) if key == "average" else slot
        kind = sharded.dtensor()
        if value.shape != p.shape:
            raise ValueError(
                f"The state '{key}' of parameter '{name}' must have its shape, {tuple(p.shape)}. "
                f"Received shape {tuple(value.shape)}. Give the parameters to the optimizer in the "
                "order of the state, or with names on both sides."
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
        return torch.zeros_like(p, dtype=dtype, requires_grad=False).copy_(value)


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
    saved = [
        {**{k: o[k] for k in kept if k in o}, **{k: v for k, v in s.items() if k not in _REFUSED}}
        for o, s in zip(own, _matched(own, saved), strict=True)
    ]
    state = dict(state_dict["state"])
    for group, s in zip(own, saved, strict=True):
        names = s.get("param_names") or _numbered(s["params"])
        for p, key, name in zip(group["params"], s["params"], names, strict=True):
            if isinstance(state.get(key), dict):
                state[key] = _copied(state[key], p, str(name), optimizer.state.get(p, {}), group)
    return {**state_dict, "param_groups": saved, "state": state}


def _copied(
    slots: dict[str, Any], p: Tensor, name: str, own: Mapping[str, Any], group: Mapping[str, Any]
) -> dict[str, Any]:
    result = dict(slots)
    for key, value in slots.items():
        if key not in _NAMES[True, True] or not isinstance(value, Tensor):
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
    ours = [_bare(group["param_names"]) for group in own]
    theirs = [_bare(group["param_names"]) for group in saved]
    order = list(range(len(own)))
    if [sorted(names) for names in ours] != [sorted(names) for names in theirs]:
        places = {frozenset(names): i for i, names in enumerate(theirs)}
        order = [places.get(frozenset(names), -1) for names in ours]
    result = []
    for group, names, i in zip(own, ours, order, strict=True):
        is_unique = len(set(names)) == len(names)
        if i < 0 or sorted(names) != sorted(theirs[i]) or (not is_unique and names != theirs[i]):
            raise ValueError(
                "The parameters of each group must be those whose state is loaded. The groups hold "
                f"{ours}, the state is of {theirs}. Give the parameters to the optimizer in the "
                "same groups; or, to load by position, delete 'param_names' from the groups of "
                "the state."
            )
        keys = dict(zip(theirs[i], saved[i]["params"], strict=True)) if is_unique else {}
        result.append(
            {
                **saved[i],
                "params": [keys[n] for n in names] if keys else saved[i]["params"],
                "param_names": list(group["param_names"]),
            }
        )
    return result


# What wrappers of a module put into the names of its parameters.
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


def _bare(names: Sequence[str]) -> list[str]:
    bare = [_WRAPPERS.sub("", name) for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare
