"""Checks that need two processes, for test_torch_optim.py: python distributed_torch.py FOLDER.

Each writes "passed", or why not, to FOLDER/<name>.txt.
"""

from __future__ import annotations

import copy
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

RANKS = 2


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.LayerNorm(3))


def batches(count: int) -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator))
        for _ in range(count)
    ]


def train(module: Any, opt: Any, data: list[tuple[Any, Any]], part: slice = slice(None)) -> None:
    for x, y in data:
        opt.zero_grad()
        (module(x[part]) - y[part]).square().mean().backward()
        opt.step()


def whole(values: Any) -> list[Any]:
    return [v.full_tensor() if hasattr(v, "full_tensor") else v.detach() for v in values]


def assert_equal(one: Any, other: Any) -> None:
    for i, (a, b) in enumerate(zip(whole(one), whole(other), strict=True)):
        assert torch.equal(a, b), f"{i}: {(a - b).abs().max()}"


def assert_near(one: Any, other: Any) -> None:
    for a, b in zip(whole(one), whole(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def mine(rank: int) -> slice:
    return slice(4 * rank, 4 * rank + 4)


def sharded(mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    module = model()
    for part in (module[0], module[2]):
        fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh)


EVERYTHING = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True, "global_clipnorm": 0.3}
EVERYTHING |= {"use_ema": True, "ema_momentum": 0.5}


def ddp(rank: int, mesh: Any) -> None:
    from omniadam.torch import AdamW

    ends = []
    for optimizer in (AdamW, torch.optim.AdamW):
        wrapped = nn.parallel.DistributedDataParallel(model(), gradient_as_bucket_view=True)
        train(wrapped, optimizer(wrapped.parameters(), lr=0.05), batches(5), mine(rank))
        ends.append(list(wrapped.parameters()))
    assert_near(*ends)


def fsdp(rank: int, mesh: Any) -> None:
    """Against torch's own optimizer on shards, with a batch of its own on each rank."""
    from omniadam.torch import AdamW

    ends = []
    for optimizer in (AdamW, torch.optim.AdamW):
        module = sharded(mesh)
        opt = optimizer(module.parameters(), lr=0.05)
        train(module, opt, batches(5), mine(rank))
        first = next(iter(module.parameters()))
        assert type(opt.state[first]["exp_avg"]).__name__ == "DTensor"
        assert type(opt.state[first]["step"]) is torch.Tensor
        ends.append([*module.parameters(), *(opt.state[p]["exp_avg"] for p in module.parameters())])
    assert_near(*ends)


def fsdp_of_flat_shards(rank: int, mesh: Any) -> None:
    """The older FullyShardedDataParallel: steps, but norms over its shards are refused."""
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel, _common_utils

    from omniadam.torch import AdamW

    warnings.simplefilter("ignore")  # it is deprecated
    mark = _common_utils.FSDP_FLATTENED
    # And if another version of torch marks what is a shard in another way.
    for original, _common_utils.FSDP_FLATTENED in ((False, mark), (True, mark), (True, "_other")):
        ends = []
        for optimizer in (AdamW, torch.optim.AdamW):
            module = FullyShardedDataParallel(
                model(), device_id=torch.device("cpu"), use_orig_params=original
            )
            opt = optimizer(module.parameters(), lr=0.05)
            train(module, opt, batches(3), mine(rank))
            ends.append(list(module.parameters()))
        assert_near(*ends)
        opt = AdamW(module.parameters(), clipnorm=1.0)
        before = [p.detach().clone() for p in module.parameters()]
        try:
            train(module, opt, batches(1), mine(rank))
        except RuntimeError as error:
            assert "clip_grad_norm_" in str(error)
        else:
            raise AssertionError("not refused")
        assert_equal(module.parameters(), before)
        assert not opt.state
    _common_utils.FSDP_FLATTENED = mark


def fsdp_one_process(rank: int, mesh: Any) -> None:
    """To the bit, where the ranks' gradients average exactly: each has the whole batch."""
    from omniadam.torch import AdamW

    ends = []
    for module in (model(), sharded(mesh)):
        opt = AdamW(module.parameters(), **EVERYTHING)
        train(module, opt, batches(5))
        own = list(module.parameters())
        with opt.averaged():
            averages = [each.clone() for each in whole(own)]
        ends.append([*own, *averages, *(opt.state[p]["max_exp_avg_sq"] for p in own)])
    assert_equal(*ends)
    # And to roundings where each has a part of it.
    module, alone = sharded(mesh), model()
    train(module, AdamW(module.parameters(), **EVERYTHING), batches(5), mine(rank))
    train(alone, AdamW(alone.parameters(), **EVERYTHING), batches(5))
    assert_near(module.parameters(), alone.parameters())


def clipping(rank: int, mesh: Any) -> None:
    """Norms are over all shards; also where a rank holds nothing, or a gradient is missing."""
    from omniadam.torch import Adam

    for settings in ({"clipnorm": 0.05}, {"global_clipnorm": 0.1}, {"clipvalue": 0.01}):
        ends = []
        for module in (model(), sharded(mesh)):
            opt = Adam(module.parameters(), lr=0.05, **settings)
            for i, (x, y) in enumerate(batches(4)):
                opt.zero_grad()
                (module(x) - y).square().mean().backward()
                if i % 2:
                    module[0].bias.grad = None
                opt.step()
            ends.append(list(module.parameters()))
        assert_equal(*ends)
    # Nobody waits for a rank that has no gradients at all.
    if rank:
        opt.zero_grad()
    opt.param_groups[0].pop("clipvalue")
    opt.param_groups[0]["global_clipnorm"] = 1.0
    opt.step()


def checkpoint(rank: int, mesh: Any) -> None:
    """Through files, onto a new model and onto a whole one; the initialising step has no trace."""
    from torch.distributed import checkpoint as files
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )

    from omniadam.torch import AdamW

    folder = str(Path(sys.argv[1]) / "checkpoint")
    module = sharded(mesh)
    opt = AdamW(module.named_parameters(), **EVERYTHING)
    get_state_dict(module, opt)  # before the first step: initialises
    train(module, opt, batches(6)[:3])
    untouched = sharded(mesh)
    train(untouched, AdamW(untouched.parameters(), **EVERYTHING), batches(6)[:3])
    assert_equal(module.parameters(), untouched.parameters())

    model_state, opt_state = get_state_dict(module, opt)
    files.save({"model": model_state, "opt": opt_state}, checkpoint_id=folder)
    train(module, opt, batches(6)[3:])

    again = sharded(mesh)
    again_opt = AdamW(again.named_parameters(), **EVERYTHING)
    model_state, opt_state = get_state_dict(again, again_opt)
    held = {"model": model_state, "opt": opt_state}
    files.load(held, checkpoint_id=folder)
    set_state_dict(again, again_opt, model_state_dict=held["model"], optim_state_dict=held["opt"])
    assert all(s["step"] == 3 for s in again_opt.state.values())
    train(again, again_opt, batches(6)[3:])
    assert_equal(module.parameters(), again.parameters())
    assert_equal(
        [opt.state[p]["average"] for p in module.parameters()],
        [again_opt.state[p]["average"] for p in again.parameters()],
    )

    # The whole state, from shards and onto shards.
    options = StateDictOptions(full_state_dict=True)
    full_model, full_opt = get_state_dict(again, again_opt, options=options)
    new = sharded(mesh)
    new_opt = AdamW(new.named_parameters(), **EVERYTHING)
    set_state_dict(
        new,
        new_opt,
        model_state_dict=copy.deepcopy(full_model),
        optim_state_dict=copy.deepcopy(full_opt),
        options=options,
    )
    train(new, new_opt, batches(2))
    train(again, again_opt, batches(2))
    assert_equal(new.parameters(), again.parameters())
    set_model_state_dict(new, get_model_state_dict(again))


def zero(rank: int, mesh: Any) -> None:
    """ZeroRedundancyOptimizer, its consolidated state and back."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    from omniadam.torch import AdamW

    ends = []
    for optimizer in (AdamW, torch.optim.AdamW):
        wrapped = nn.parallel.DistributedDataParallel(model())
        opt = ZeroRedundancyOptimizer(
            wrapped.parameters(), optimizer, lr=0.05, parameters_as_bucket_view=True
        )
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
        train(wrapped, opt, batches(3), mine(rank))
        schedule.step()
        opt.consolidate_state_dict(to=0)
        states = [opt.state_dict() if rank == 0 else None]
        distributed.broadcast_object_list(states, src=0)
        other = nn.parallel.DistributedDataParallel(copy.deepcopy(wrapped.module))
        resumed = ZeroRedundancyOptimizer(other.parameters(), optimizer, lr=0.05)
        resumed.load_state_dict(copy.deepcopy(states[0]))  # which it shares on rank 0
        train(wrapped, opt, batches(2), mine(rank))
        train(other, resumed, batches(2), mine(rank))
        assert_equal(wrapped.parameters(), other.parameters())
        ends.append(list(wrapped.parameters()))
    assert_near(*ends)


def tensor_parallel(rank: int, mesh: Any) -> None:
    """Shards along either axis, replicas, and plain parameters in one optimizer."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from omniadam.torch import Adam

    ends = []
    for split in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.LayerNorm(3))
        if split:
            parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        groups = [
            {"params": list(module[0].parameters())},
            {"params": list(module[2].parameters())},
            {"params": list(module[3].parameters())},
        ]
        opt = Adam(groups, lr=0.05, weight_decay=0.1, global_clipnorm=0.1)
        version = module[0].weight._version
        train(module, opt, batches(4))
        assert module[0].weight._version >= version + 4  # what autograd looks at
        # A gradient that is not sharded as its parameter is becomes so.
        weight = module[0].weight
        opt.zero_grad()
        weight.grad = torch.ones(weight.shape)
        if split:
            whole_on_each = [distributed.tensor.Replicate()]
            weight.grad = distributed.tensor.DTensor.from_local(weight.grad, mesh, whole_on_each)
        opt.step()
        ends.append(list(module.parameters()))
    assert_near(*ends)


CHECKS: list[Callable[[int, Any], None]] = [
    ddp,
    fsdp,
    fsdp_of_flat_shards,
    fsdp_one_process,
    clipping,
    checkpoint,
    zero,
    tensor_parallel,
]
NAMES = [check.__name__ for check in CHECKS]


def main(rank: int, port: int, folder: str) -> None:
    sys.argv[1:] = [folder]
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    for check in CHECKS:
        try:
            check(rank, mesh)
            result = ""
        except Exception:
            result = f"rank {rank}: {traceback.format_exc()}"
        results = [""] * RANKS
        distributed.all_gather_object(results, result)
        if rank == 0:
            text = "\n".join(filter(None, results)) or "passed"
            Path(folder, f"{check.__name__}.txt").write_text(text, encoding="utf-8")
        if any(results):
            break  # the others' communications may be out of step
    # All is said. Threads that torch leaves running now and then abort a process which ends as
    # processes do.
    os._exit(0)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        chosen = free.getsockname()[1]
    torch.multiprocessing.spawn(main, (chosen, sys.argv[1]), nprocs=RANKS)
