"""Every input and every error input that torch's wheel has for Adam and AdamW, here beside torch.

For test_torch_suite.py, in a process of its own: python torch_suite.py prints what ran, in JSON.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from cases import SMALL_SHAPES, gradients, variables
from test_torch_optim import FEW, KEYS, OURS, apart, assert_same, oracle, tensor

STEPS = 20
DTYPES = ("float32", "float64", "float16", "bfloat16", "complex64", "complex128")
REAL = {"complex64": "float32", "complex128": "float64"}
PAIRS = tuple((*shape, 2) for shape in SMALL_SHAPES)
INFOS = [info for info in optim_db if info.name in OURS]
counts: Counter[str] = Counter()


def inputs(info: Any) -> list[dict[str, Any]]:
    """What the wheel tries on any device, once each and in each implementation."""
    found: list[dict[str, Any]] = []
    for device in ("cpu", "cuda", "mps"):
        for given in info.optim_inputs_func(device=device):
            if repr(given.kwargs) not in map(repr, found):
                found.append(given.kwargs)
    return [
        {**copy.deepcopy(kwargs), **how}
        for kwargs in found
        for how in ({}, *({flag: True} for flag in info.supported_impls))
    ]


def as_float(value: Any) -> Any:
    return tuple(map(as_float, value)) if isinstance(value, tuple) else float(value)


def run(
    info: Any, settings: dict[str, Any], dtype: str, schedulers: list[Callable[[Any], Any]]
) -> None:
    """Some steps of ours beside torch's, and both beside the oracle."""
    real = REAL.get(dtype, dtype)
    shapes = PAIRS if dtype in REAL else SMALL_SHAPES

    def value_of(values: Any, widened: bool = False) -> Any:
        found = tensor(values)
        found = torch.complex(found[..., 0], found[..., 1]) if dtype in REAL else found
        return found.float() if widened else found

    # torch keeps 16-bit state: what steps as ours is its float32 copy of a parameter.
    is_half = real in ("float16", "bfloat16")
    start = variables(real, shapes=shapes)
    ours = [nn.Parameter(value_of(each)) for each in start]
    theirs = [nn.Parameter(value_of(each, is_half)) for each in start]
    sides = [OURS[info.name](ours, **settings), info.optim_cls(theirs, **copy.deepcopy(settings))]
    schedules = [[make(opt) for make in schedulers] for opt in sides]
    numbers = {
        k: as_float(v) if k in ("lr", "betas") else v
        for k, v in settings.items()
        if k not in ("foreach", "fused")
    }
    reference = oracle(start, numbers, 0.01 if info.name == "AdamW" else 0.0)
    rounded = any(isinstance(v, torch.Tensor) for v in settings.values())
    for step in range(STEPS):
        grads = gradients(step, shapes, dtype=real)
        for p, q, g in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = value_of(g), value_of(g, is_half)
            if is_half:
                q.data.copy_(p.detach())
        reference.learning_rate = float(sides[0].param_groups[0]["lr"])
        reference.step(grads)
        for opt, each in zip(sides, schedules, strict=True):
            opt.step()
            for schedule in each:
                plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
                schedule.step(*([1.0] if plateau else []))
        assert sides[0].param_groups[0]["lr"] == sides[1].param_groups[0]["lr"]
        if is_half:
            for p, q in zip(ours, theirs, strict=True):
                ulp = torch.finfo(p.dtype).eps
                torch.testing.assert_close(p.float(), q, rtol=ulp, atol=1e-7, equal_nan=True)
    if is_half:
        return
    limit = FEW * (2 if reference.penalty else 1)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        one, other = sides[0].state[p], sides[1].state[q]
        assert one.keys() == other.keys()
        assert_same(one["step"], other["step"])
        pairs = {"variable": (p, q)}
        pairs |= {slot: (one[k], other[k]) for slot, k in KEYS.items() if k in other}
        for slot, (a, b) in pairs.items():
            a, b = (torch.view_as_real(v.detach()) if dtype in REAL else v for v in (a, b))
            if rounded and real == "float64":  # torch rounds to what a tensor holds: docs/torch.md
                b = torch.from_numpy(reference.state[slot][i])
            assert apart(a, b, reference, slot, i, real) <= limit, (settings, slot)


def refused(info: Any, settings: dict[str, Any]) -> None:
    """What cannot be had is refused by the constructor here; on the CPU, torch refuses some."""
    name = next(name for name in ("capturable", "differentiable") if settings.get(name))
    try:
        OURS[info.name]([nn.Parameter(torch.ones(2))], **settings)
    except (RuntimeError, ValueError) as error:
        assert f"`{name}=True` cannot be honoured" in str(error) or "not support" in str(error)
    else:
        raise AssertionError(f"{settings} is taken")


def wrong(make: Any, given: Any) -> tuple[type, str]:
    """The error, or the warning, of one error input."""
    params, kwargs = given.optimizer_error_input.params, given.optimizer_error_input.kwargs
    params = [nn.Parameter(torch.ones(1, 1))] if params is None else params
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            opt = make(copy.copy(params), **kwargs)
            if given.error_on is OptimizerErrorEnum.STEP_ERROR:
                opt.step()
        except Exception as error:
            return type(error), str(error)
    raise AssertionError(f"{given.optimizer_error_input.desc}: no error")


def main() -> None:
    torch.set_num_threads(1)
    for info in INFOS:
        for settings in inputs(info):
            if settings.get("capturable") or settings.get("differentiable"):
                refused(info, settings)
                counts["refused"] += 1
                continue
            if settings.get("foreach") and isinstance(settings.get("lr"), torch.Tensor):
                continue  # one of the error inputs
            for dtype in DTYPES:
                if not (settings.get("fused") and dtype in REAL):  # torch's is for real numbers
                    run(info, settings, dtype, [])
                    counts["inputs"] += 1
        for schedulers in info.scheduler_inputs:
            run(info, {"weight_decay": 0.1, "lr": 0.01}, "float32", list(schedulers))
            counts["schedulers"] += 1
        for dtype in DTYPES:
            for given in info.optim_error_inputs_func("cpu", getattr(torch, dtype)):
                ours, theirs = (wrong(make, given) for make in (OURS[info.name], info.optim_cls))
                assert ours == theirs, (ours, theirs)
                assert issubclass(ours[0], given.error_type)
                assert re.search(given.error_regex, ours[1])
                counts["errors"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
