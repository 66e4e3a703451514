"""The step on an NVIDIA GPU: is it right, and how fast is it.

    python benchmarks/gpu.py [--budget SECONDS] [--only checks|speed] [--output FILE]

What is right comes first, then our own times, then those of the peers that are installed. Each row
is printed and written to benchmarks/gpu.json as it is done, and none is begun that the budget has
no time for. It needs PyTorch for CUDA with its Triton, NumPy, Numba and this repository, which need
not be installed; no network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sets import Shape, gpt2, many, mlp, resnet50, size
from torch import nn

HERE = Path(__file__).parent
Optimizer = Any
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of settings, those that a norm does not touch: a sum has another order on a GPU.
SETTINGS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "AMSGrad, penalty, maximize": {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "decay, average": {"weight_decay": 0.1, "decoupled_weight_decay": True, "use_ema": True},
    "clipvalue, short betas": {"clipvalue": 0.5, "betas": (0.3, 0.45)},
}
FULL = {"weight_decay": 0.01, "decoupled_weight_decay": True}
FULL |= {"global_clipnorm": 1.0, "use_ema": True}


class Table:
    """Rows, printed and written as they are done."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self.found: dict[str, Any] = {"machine": machine(), "rows": {}}

    def left(self) -> float:
        return self._end - time.monotonic()

    def row(self, name: str, about: float, measure: Callable[[], Any]) -> None:
        """Measure a row that takes about so many seconds."""
        if self.left() < about:
            result: Any = f"not begun: {self.left():.0f} s are left, it takes about {about:.0f}"
        else:
            try:
                result = measure()
            except Exception as error:
                traceback.print_exc()
                result = f"FAILED: {type(error).__name__}: {error}"
        self.found["rows"][name] = result
        print(f"{name:58} {result}", flush=True)
        self._path.write_text(json.dumps(self.found, indent=1, default=str) + "\n")


def machine() -> dict[str, str]:
    import triton

    from omniadam import __version__

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": str(triton.__version__),
        "omniadam": __version__,
    }


# --- what must be right ---


def parameters(
    shapes: list[Shape], device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Values that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(v.to(dtype).to(device)) for v in values]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        g = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 5 - 3)
        g = (g * scale).to(p.dtype).to(p.device)
        p.grad = g if p.grad is None else p.grad.copy_(g)


def states(opt: Optimizer) -> list[torch.Tensor]:
    every = [p for group in opt.param_groups for p in group["params"]]
    kept = [t for p in every for k, t in sorted(opt.state[p].items()) if k != "step"]
    return [t.detach().cpu() for t in (*every, *kept)]


def differences(one: list[torch.Tensor], other: list[torch.Tensor]) -> int:
    """Elements whose bits differ."""
    count = 0
    for a, b in zip(one, other, strict=True):
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        count += int((a.contiguous().view(words) != b.contiguous().view(words)).sum())
    return count


def said(count: int) -> str:
    return "equal" if count == 0 else f"WRONG: {count} elements differ"


ODD = [(n,) for n in range(0, 2100, 131)] + [(), (3, 5), (1024,), (1025,), (70_001,)]


def trained(device: str, dtype: torch.dtype, settings: dict[str, Any], steps: int) -> Any:
    from omniadam.torch import Adam

    # The CPU's bits are those of the rule on NumPy, which compiles nothing.
    os.environ["OMNIADAM_KERNEL"] = "numpy" if device == "cpu" else "triton"
    try:
        params = parameters(ODD, device, dtype)
        opt = Adam(params, lr=0.01, **settings)
        for step in range(steps):
            set_gradients(params, step)
            opt.step()
        return states(opt)
    finally:
        del os.environ["OMNIADAM_KERNEL"]


def bits(dtype: torch.dtype, settings: dict[str, Any]) -> str:
    return said(
        differences(trained("cuda", dtype, settings, 30), trained("cpu", dtype, settings, 30))
    )


def norms() -> str:
    ours, theirs = (trained(d, torch.float32, FULL, 30) for d in ("cuda", "cpu"))
    worst = max(
        float(((a - b).abs() / (b.abs() + 1e-6)).max()) if a.numel() else 0.0
        for a, b in zip(ours, theirs, strict=True)
    )
    return f"{'close' if worst < 1e-3 else 'WRONG'}: at most {worst:.1e} of a value apart"


def views() -> str:
    """Parameters that are views of one buffer, as of DDP and ZeRO, at every alignment."""
    from omniadam.torch import Adam

    def run(is_flat: bool) -> list[torch.Tensor]:
        plain = parameters(ODD, "cuda")
        params = plain
        if is_flat:
            first = torch.zeros(1, device="cuda")
            buffer = torch.cat([first, *(p.detach().view(-1) for p in plain)])
            cuts = np.cumsum([1, *(p.numel() for p in plain)])
            params = [
                nn.Parameter(buffer[a : a + p.numel()].view(p.shape))
                for a, p in zip(cuts, plain, strict=False)
            ]
        opt = Adam(params, lr=0.01)
        for step in range(5):
            set_gradients(params, step)
            opt.step()
        return states(opt)

    return said(differences(run(True), run(False)))


def channels_last() -> str:
    from omniadam.torch import Adam

    def run(layout: torch.memory_format) -> list[torch.Tensor]:
        (p,) = parameters([(8, 16, 5, 3)], "cuda")
        q = nn.Parameter(p.detach().to(memory_format=layout))
        opt = Adam([q], lr=0.01)
        for step in range(5):
            set_gradients([p], step)
            q.grad = p.grad.to(memory_format=layout)
            opt.step()
        return states(opt)

    return said(differences(run(torch.channels_last), run(torch.contiguous_format)))


def large() -> str:
    """More elements than 32 bits count."""
    from omniadam.torch import Adam

    if torch.cuda.mem_get_info()[0] < 36e9:
        return "not begun: it takes 36 GB"
    n = 2**31 + 1029
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    Adam([p], lr=0.5).step()
    wrong = sum(int((part != 0.5).sum()) for part in p.detach().split(2**28))
    del p
    torch.cuda.empty_cache()
    return said(wrong)


def capturable() -> tuple[list[nn.Parameter], Any]:
    from omniadam.torch import AdamW

    params = parameters(ODD, "cuda")
    rate = torch.tensor(0.01, device="cuda", dtype=torch.float64)
    opt = AdamW(params, lr=rate, capturable=True, global_clipnorm=1.0, use_ema=True)
    set_gradients(params, 0)
    return params, opt


def captured(opt: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


def warmed_up(opt: Any) -> None:
    """Three steps on a stream of their own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            opt.step()
    torch.cuda.current_stream().wait_stream(side)


def replayed() -> str:
    _, eager = capturable()
    for _ in range(103):
        eager.step()
    _, opt = capturable()
    warmed_up(opt)
    graph = captured(opt)
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    return said(differences(states(opt), states(eager)))


def two_graphs() -> str:
    """Two over the same gradients, steps between them, other values, another rate."""
    (params, opt), (others, eager) = capturable(), capturable()
    warmed_up(opt)
    first = captured(opt)
    second = captured(opt)
    for _ in range(3):
        eager.step()
    for step, make in enumerate((first.replay, opt.step, second.replay, opt.step, first.replay)):
        for each in (params, others):
            set_gradients(each, step + 1)
        for each in (opt, eager):
            each.param_groups[0]["lr"].fill_(0.01 / (step + 1))
        make()
        eager.step()
    torch.cuda.synchronize()
    return said(differences(states(opt), states(eager)))


def two_devices() -> str:
    from omniadam.torch import AdamW

    if torch.cuda.device_count() < 2:
        return "not begun: there is one device"

    def run(devices: tuple[str, str]) -> list[torch.Tensor]:
        halves = [parameters(ODD, device, seed=i) for i, device in enumerate(devices)]
        opt = AdamW([p for half in halves for p in half], lr=0.01, use_ema=True)
        for step in range(5):
            for half in halves:
                set_gradients(half, step)
            opt.step()
        return states(opt)

    return said(differences(run(("cuda:0", "cuda:1")), run(("cuda:0", "cuda:0"))))


def tried() -> str:
    from omniadam.backends import gpu

    problem = gpu.gpu_of(torch.empty(1, device="cuda")).problem
    return f"WRONG: {problem}" if problem else "its bits are those of NumPy"


def launches() -> str:
    """Of a step over 10,000 tensors, plain, with a norm, and counted on the device."""
    from omniadam.backends import gpu
    from omniadam.torch import AdamW

    found = []
    for settings in ({}, {"global_clipnorm": 1.0}, {"capturable": True}):
        params = parameters([(7,)] * 10_000, "cuda")
        for p in params:
            p.grad = torch.ones_like(p)
        opt = AdamW(params, lr=0.01, **settings)
        opt.step()
        device = gpu.gpu_of(params[0])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            opt.step()
            torch.cuda.synchronize()
        ours = sum(1 for e in profile.events() if e.name in ("sweep", "factor", "tell", "count"))
        every = sum(1 for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        found.append(f"{ours} of {every}")
        assert device.problem == ""
    return f"plain {found[0]}, a norm {found[1]}, capturable {found[2]}"


def without_waiting() -> str:
    from omniadam import Adam as Keras
    from omniadam.torch import AdamW

    modes: dict[str, Callable[[list[nn.Parameter]], Callable[[], Any]]] = {}

    def drop_in(**settings: Any) -> Callable[[list[nn.Parameter]], Callable[[], Any]]:
        return lambda params: AdamW(params, lr=0.01, **settings).step

    def scaled(params: list[nn.Parameter]) -> Callable[[], Any]:
        opt = AdamW(params, lr=0.01, fused=True)
        opt.found_inf = torch.zeros((), device="cuda")
        opt.grad_scale = torch.full((), 2.0, device="cuda")
        return opt.step

    def keras(params: list[nn.Parameter]) -> Callable[[], Any]:
        opt = Keras(0.01, global_clipnorm=1.0, weight_decay=0.01, use_ema=True)
        return lambda: opt.apply_gradients([(p.grad, p) for p in params])

    modes["plain"] = drop_in()
    modes["full"] = drop_in(global_clipnorm=1.0, use_ema=True)
    modes["clipnorm"] = drop_in(clipnorm=1.0)
    modes["capturable"] = drop_in(capturable=True)

    def changing(**settings: Any) -> Callable[[list[nn.Parameter]], Callable[[], Any]]:
        """Some gradients absent, others at new addresses, in each step."""

        def make(params: list[nn.Parameter]) -> Callable[[], Any]:
            opt = AdamW(params, lr=0.01, **settings)
            held = [p.grad for p in params]
            steps = itertools.count()

            def step() -> None:
                k = next(steps)
                for i, (p, g) in enumerate(zip(params, held, strict=True)):
                    p.grad = None if i == k % 5 and k else g.clone()
                opt.step()

            return step

        return make

    modes["scaler"], modes["omniadam.Adam"] = scaled, keras
    modes["changing gradients"] = changing()
    modes["changing gradients, capturable"] = changing(capturable=True)
    waits = []
    for name, make in modes.items():
        params = parameters(ODD, "cuda")
        set_gradients(params, 0)
        step = make(params)
        step()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                step()
        except RuntimeError as error:
            waits.append(f"{name} ({error})")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return f"WRONG: {'; '.join(waits)}" if waits else f"nothing waits in {', '.join(modes)}"


def scaler() -> str:
    from omniadam.torch import AdamW

    params = parameters(ODD, "cuda")
    opt = AdamW(params, lr=0.01, use_ema=True, fused=True)
    scale = torch.amp.GradScaler("cuda", init_scale=8.0)
    scale.scale(torch.ones((), device="cuda"))
    for step in range(3):
        set_gradients(params, step, 8.0)
        scale.step(opt)
        scale.update()
    before = states(opt)
    set_gradients(params, 3)
    params[3].grad[5] = math.inf
    scale.step(opt)
    scale.update()
    if differences(states(opt), before) or opt.state[params[0]]["step"].item() != 3:
        return "WRONG: a step with an infinite gradient changed something"
    return "skips on the device" if scale.get_scale() == 4.0 else "WRONG: the scale was not halved"


def sharded() -> str:
    """DTensors of fully_shard, on one rank."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from omniadam.torch import AdamW

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:

        def run(is_sharded: bool) -> list[torch.Tensor]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 7)).cuda()
            if is_sharded:
                fully_shard(model)
            opt = AdamW(model.parameters(), lr=0.01)
            for step in range(5):
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(16, 33, generator=generator).cuda()
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
            whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
            return [p.detach().cpu() for p in whole]

        return said(differences(run(True), run(False)))
    finally:
        dist.destroy_process_group()


def sanitized() -> str:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "compute-sanitizer is not installed"
    command = [program, "--tool", "memcheck", sys.executable, __file__, "--only", "sanitizer"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "not done after 120 s"
    last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return last[-1].strip("= ") if last else f"no summary: {done.stderr[-200:]}"


def check(table: Table) -> None:
    """Everything that must be right."""
    table.row("the step that is tried once on each device", 10, tried)
    for dtype in DTYPES:
        for name, settings in SETTINGS.items():
            title = f"CPU and GPU, {str(dtype).removeprefix('torch.')}, {name}"
            table.row(title, 10, lambda d=dtype, s=settings: bits(d, s))
    table.row("CPU and GPU, clipped by the global norm", 10, norms)
    table.row("views of one buffer, at every alignment", 5, views)
    table.row("channels last", 5, channels_last)
    table.row("100 replays of a graph and 100 steps", 10, replayed)
    table.row("two graphs, and steps between replays", 10, two_graphs)
    table.row("two devices", 10, two_devices)
    table.row("launches, of all that run", 15, launches)
    table.row("host waits for the device", 20, without_waiting)
    table.row("GradScaler", 5, scaler)
    table.row("fully_shard", 20, sharded)
    table.row("a tensor of 2**31 + 1029 elements", 15, large)
    table.row("compute-sanitizer", 60, sanitized)


# --- how fast ---


def large_model() -> list[Shape]:
    """1.3 billion parameters: 24 blocks of width 2048."""
    d = 2048
    block: list[Shape] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 24, (d,), (d,)]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "GPT-2 small": gpt2,
    "1.3 B": large_model,
    "ResNet-50": resnet50,
    "MLP": mlp,
    "10,000 tensors": lambda: [(1000,)] * len(many()),
}
Maker = Callable[[list[nn.Parameter], bool], Callable[[], Any]]


def ours(params: list[nn.Parameter], full: bool) -> Callable[[], Any]:
    from omniadam.torch import AdamW

    more = {"global_clipnorm": 1.0, "use_ema": True} if full else {}
    step: Callable[[], Any] = AdamW(params, lr=1e-3, weight_decay=0.01, **more).step
    return step


def with_all(params: list[nn.Parameter], full: bool, step: Callable[[], Any]) -> Callable[[], Any]:
    """A peer's step, with PyTorch's own clipping before it and an average after it."""
    if not full:
        return step
    averages = [p.detach().clone() for p in params]

    def steps() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        step()
        torch._foreach_lerp_(averages, [p.detach() for p in params], 0.01)

    return steps


def of_torch(**settings: Any) -> Maker:
    def make(params: list[nn.Parameter], full: bool) -> Callable[[], Any]:
        opt = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01, **settings)
        return with_all(params, full, opt.step)

    return make


def compiled(params: list[nn.Parameter], full: bool) -> Callable[[], Any]:
    rate = torch.tensor(1e-3, device="cuda")
    opt = torch.optim.AdamW(params, lr=rate, weight_decay=0.01, capturable=True)
    return with_all(params, full, torch.compile(opt.step, fullgraph=False))


def apex(params: list[nn.Parameter], full: bool) -> Callable[[], Any]:
    from apex.optimizers import FusedAdam

    return with_all(params, full, FusedAdam(params, lr=1e-3, weight_decay=0.01).step)


def bitsandbytes(params: list[nn.Parameter], full: bool) -> Callable[[], Any]:
    from bitsandbytes.optim import AdamW8bit

    return with_all(params, full, AdamW8bit(params, lr=1e-3, weight_decay=0.01).step)


def torchao(params: list[nn.Parameter], full: bool) -> Callable[[], Any]:
    from torchao.optim import AdamW8bit

    return with_all(params, full, AdamW8bit(params, lr=1e-3, weight_decay=0.01).step)


PEERS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "torch fused": (of_torch(fused=True), tuple(SETS)),
    "torch foreach": (of_torch(foreach=True), tuple(SETS)),
    "Apex FusedAdam": (apex, tuple(SETS)),
    "bitsandbytes AdamW8bit": (bitsandbytes, ("GPT-2 small", "ResNet-50")),
    "torchao AdamW8bit": (torchao, ("ResNet-50",)),
    "torch.compile of AdamW": (compiled, ("MLP", "ResNet-50")),
}


def bandwidth() -> dict[str, float]:
    """Of a copy that no cache holds: bytes read and written in a second."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    device, _ = times(lambda: b.copy_(a), 50)
    return {"TB/s": round(2 * a.numel() * 4 / device / 1e12, 3)}


def times(step: Callable[[], Any], most: int = 200) -> tuple[float, float]:
    """Seconds of a step on the device, and on the host: medians, with cold caches."""
    flushed = torch.empty(2**26, device="cuda")
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    on_device, on_host = [], []
    end = time.monotonic() + 3.0
    while len(on_device) < most and (len(on_device) < 5 or time.monotonic() < end):
        flushed.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        begun = time.perf_counter()
        step()
        on_host.append(time.perf_counter() - begun)
        stop.record()
        torch.cuda.synchronize()
        on_device.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(on_device), statistics.median(on_host)


def speed(make: Maker, shapes: list[Shape], full: bool) -> dict[str, float]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    params = [nn.Parameter(torch.randn(s, device="cuda", generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda", generator=generator) * 1e-2
    try:
        device, host = times(make(params, full))
    finally:
        for p in params:
            p.grad = None
        del params
        torch.cuda.empty_cache()
    moved = size(shapes) * (40 if full else 28)
    return {
        "us": round(device * 1e6, 1),
        "host us": round(host * 1e6, 1),
        "TB/s of what has to move": round(moved / device / 1e12, 3),
    }


def compare(table: Table) -> None:
    """Our own times, and then those of others."""
    table.row("bandwidth of a copy", 5, bandwidth)
    for name, make_set in SETS.items():
        for mode in ("plain", "full"):
            table.row(
                f"omniadam, {name}, {mode}",
                8,
                lambda s=make_set, m=mode: speed(ours, s(), m == "full"),
            )
    for peer, (make, sets) in PEERS.items():
        for name in sets:
            for mode in ("plain", "full"):
                table.row(
                    f"{peer}, {name}, {mode}",
                    60 if "compile" in peer else 8,
                    lambda s=SETS[name], m=mode, k=make: speed(k, s(), m == "full"),
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=480.0, help="seconds, 480 by default")
    parser.add_argument("--only", choices=("checks", "speed", "sanitizer"))
    parser.add_argument("--output", type=Path, default=HERE / "gpu.json")
    given = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print(
            f"There is no NVIDIA GPU here that PyTorch {torch.__version__} sees: nothing was run."
        )
        return 2
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE.parent / "src"))
    if find_spec("safetensors") is None:  # which steps do not need, and PyTorch does not bring
        sys.modules["safetensors"] = types.ModuleType("safetensors")
        vars(sys.modules["safetensors"])["safe_open"] = None
    if given.only == "sanitizer":
        print(views(), norms())
        return 0
    table = Table(given.output, given.budget)
    print(*(f"{k} {v}" for k, v in table.found["machine"].items()), sep=", ")
    if given.only != "speed":
        check(table)
    if given.only != "checks":
        compare(table)
    print(f"Written to {given.output}.")
    wrong = [k for k, v in table.found["rows"].items() if str(v).startswith(("WRONG", "FAILED"))]
    print(*(f"Not as it must be: {name}" for name in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
