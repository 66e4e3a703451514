"""Run by test_cuda.py, in a process of Triton's interpreter: steps on what stands in for a GPU.

Its memory is the host's, and what is launched is interpreted; copies and launches are noted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle

import omniadam.torch as drop_in
from cases import PART, SMALL_SHAPES, Case, gradients, variables
from omniadam import Adam, schedules
from omniadam.backends import cuda
from omniadam.backends import gpu as gpu_module
from omniadam.backends.cuda import TorchCuda
from omniadam.backends.gpu import SPARES, CannotCompile, Gpu, Table, makes_a_step
from omniadam.backends.torch import Torch, TorchDevice, TorchMemory
from omniadam.kernels import triton as kernels

SHAPES = (*SMALL_SHAPES, (1031,))
CPU = torch.device("cpu")


def double(x: float) -> Any:
    """A number as a kernel has it; the interpreter would make a float single."""
    return tl.tensor(TensorHandle(np.array([x], np.float64), tl.float64), tl.float64)


class Event:
    """Is over when a test says so."""

    is_over = True

    def query(self) -> bool:
        return self.is_over


class StandIn(Gpu):
    """A GPU in the host's memory. A graph is what is not done before it is replayed."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.uploads = 0
        self.pins = 0
        self.capturing = False
        self.graph: list[Callable[[], Any]] = []
        self.pool: list[Tensor] = []  # which a graph has to itself
        self.at: Any = "a stream"
        super().__init__(CPU)

    def _tried(self) -> str:
        return ""

    def is_capturing(self) -> bool:
        return self.capturing

    def stream(self) -> Any:
        return self.at

    def uploaded(self, values: Any, spare: Any = None) -> Table:
        found = super().uploaded(values, spare)
        self.uploads += 1
        return found

    def scratch(self, *shape: int) -> Tensor:
        found = super().scratch(*shape)
        if self.capturing:
            self.pool.append(found)
        return found

    def copy(self, table: Tensor, pinned: Tensor) -> None:
        self._done(lambda: table.copy_(pinned))

    def pinned(self, size: int) -> Tensor:
        assert not self.capturing, "memory of the host cannot be allocated in a capture"
        self.pins += 1
        return torch.empty(size, dtype=torch.int64)

    def event(self) -> Event:
        return Event()

    def _target(self) -> Any:
        return None

    def _load(self, kernel: Any) -> None:
        pass

    def launch(self, kernel: Any, programs: int, *arguments: Any) -> None:
        if programs:
            function, fixed = kernel
            *rest, last = arguments
            if isinstance(last, tuple):
                last = tuple(map(double, last))
            elif isinstance(last, float):
                last = double(last)
            self.launched.append(function.fn.__name__)
            self._done(lambda: function[(programs,)](*rest, last, *fixed))

    def _done(self, work: Callable[[], Any]) -> None:
        if self.capturing:
            self.graph.append(work)
        else:
            work()

    @contextmanager
    def captured(self) -> Iterator[list[Callable[[], Any]]]:
        """What is launched and copied meanwhile, to be called again and again."""
        self.capturing, self.graph = True, []
        try:
            yield self.graph
        finally:
            self.capturing = False


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """What all tensors are on."""
    monkeypatch.setenv("OMNIADAM_KERNEL", "")
    found = StandIn()
    set_devices(monkeypatch, lambda tensor: found)
    monkeypatch.setattr(libdevice, "expm1", lambda x: double(np.expm1(x.handle.data.item())))
    monkeypatch.setattr(cuda, "can_step", lambda variables: True)
    monkeypatch.setattr(cuda, "is_there", lambda value: getattr(value, "is_there", False))
    monkeypatch.setattr(cuda, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "is_capturing", lambda: found.capturing)
    monkeypatch.setattr(Torch, "kind_for", classmethod(lambda cls, variables: TorchCuda))
    monkeypatch.setattr(kernels, "_compiled", lambda function, constants, numbers, target: function)
    yield found


def set_devices(monkeypatch: pytest.MonkeyPatch, gpu_of: Callable[[Tensor], Gpu]) -> None:
    monkeypatch.setattr(cuda, "gpu_of", gpu_of)
    monkeypatch.setattr(gpu_module, "gpu_of", gpu_of)


class Counted(TorchFunctionMode):
    """Notes the functions of torch that compute numbers."""

    COMPUTE = ("stack", "full", "sum", "add", "mul", "div", "rdiv", "reciprocal", "sqrt", "clamp")

    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name.strip("_") in self.COMPUTE:
            self.names.append(name)
        return function(*arguments, **(named or {}))


def there(value: float, dtype: torch.dtype = torch.float32) -> Any:
    """A number on the GPU."""
    found: Any = torch.tensor(value, dtype=dtype)
    found.is_there = True
    return found


def bits(tensors: Any) -> list[bytes]:
    plain = [t.detach() for t in tensors]
    words = [t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in plain]
    return [t.numpy().tobytes() for t in words]


def as_tensor(values: Any) -> Tensor:
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(values))


# --- numbers ---


def trained(
    case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch, kind: type[Torch], steps: int = 3
) -> list[Tensor]:
    """Variables and state after some steps of `omniadam.Adam`."""
    with monkeypatch.context() as patch:
        if kind is TorchMemory:
            patch.setenv("OMNIADAM_KERNEL", "numpy")  # the CPU's bits, and nothing is compiled
        patch.setattr(Torch, "kind_for", classmethod(lambda cls, variables: kind))
        params = [as_tensor(v) for v in variables(dtype, shapes=SHAPES)]
        opt = Adam(**case.settings_for(schedules))
        opt.exclude_from_weight_decay([params[i] for i in case.excluded])
        for step in range(steps):
            grads = [as_tensor(g) for g in gradients(step, SHAPES, dtype=dtype)]
            if step == 1:
                grads[1] = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the one without a gradient
                opt.apply_gradients(zip(grads, params, strict=True))
        return [*params, *opt.variables]


@pytest.mark.parametrize("name", PART)
def test_table_of_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PART[name]
    ours = trained(case, "float32", monkeypatch, TorchCuda)
    theirs = trained(case, "float32", monkeypatch, TorchMemory)
    if case.settings.keys() & {"clipnorm", "global_clipnorm"}:  # a sum has another order
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    else:
        assert bits(ours) == bits(theirs)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case({"weight_decay": 0.5, "use_ema": True, "amsgrad": True}, frozenset({2}))
    ours = trained(case, dtype, monkeypatch, TorchCuda)
    assert bits(ours) == bits(trained(case, dtype, monkeypatch, TorchMemory))


def test_variables_that_come_later(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    results = []
    for kind in (TorchCuda, TorchMemory):
        with monkeypatch.context() as patch:
            patch.setattr(Torch, "kind_for", classmethod(lambda cls, v, kind=kind: kind))
            patch.setenv("OMNIADAM_KERNEL", "" if kind is TorchCuda else "numpy")
            params = [as_tensor(v) for v in variables(shapes=SHAPES)]
            opt = Adam(0.01, use_ema=True)
            opt.build(params[:3])
            for step in range(3):
                grads = list(map(as_tensor, gradients(step, SHAPES)))
                if step == 1:
                    opt.extend(params[3:])
                count = 3 if step == 0 else len(params)
                opt.apply_gradients(zip(grads[:count], params[:count], strict=True))
            results.append(bits([*params, *opt.variables]))
    assert results[0] == results[1]
    assert gpu.launched == ["sweep"] * 5


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    found = variables("float64", seed, SHAPES)
    return [nn.Parameter(torch.from_numpy(np.array(v)).to(dtype)) for v in found]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    for p, g in zip(params, gradients(step, SHAPES), strict=True):
        p.grad = (torch.from_numpy(np.array(g)) * scale).to(p.dtype)


def states(opt: Any, params: list[nn.Parameter]) -> list[Tensor]:
    found = [t for p in params for k, t in sorted(opt.state[p].items()) if k != "step"]
    return [*params, *found]


TORCHS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "penalty": {"weight_decay": 0.1, "maximize": True, "amsgrad": True},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "use_ema": True},
    "clips": {"clipvalue": 0.5, "betas": (0.3, 0.9)},
}


@pytest.mark.parametrize("name", TORCHS)
def test_torch_drop_in(name: str, monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    results = []
    for kind in (TorchCuda, TorchMemory):
        with monkeypatch.context() as patch:
            patch.setattr(Torch, "kind_for", classmethod(lambda cls, v, kind=kind: kind))
            if kind is TorchMemory:
                patch.setenv("OMNIADAM_KERNEL", "numpy")
            params = model()
            opt = drop_in.Adam(params, lr=0.01, **TORCHS[name])
            for step in range(3):
                set_gradients(params, step)
                opt.step()
            results.append(bits(states(opt, params)))
            assert opt.state[params[0]]["step"] == 3
    assert results[0] == results[1]
    assert gpu.launched == ["sweep"] * 3


# --- launches and copies ---


def test_one_launch_and_nothing_uploaded_at_a_step_that_is_known(gpu: StandIn) -> None:
    params = [*model(), *model(1, torch.bfloat16)]
    opt = drop_in.AdamW(params, lr=0.01)
    for step in range(3):
        for p in params:
            if p.grad is None:
                p.grad = torch.ones_like(p)  # in one memory, as an allocator gives it again
        before = gpu.uploads
        gpu.launched.clear()
        opt.step()
        assert gpu.launched == ["sweep", "sweep"], "one for each element type"
        # Chunks, rows and gradients' addresses of each, and then nothing.
        assert gpu.uploads - before == (6 if step == 0 else 0)


def test_a_norm_is_two_launches_more(gpu: StandIn) -> None:
    for settings in ({"global_clipnorm": 1.0}, {"clipnorm": 1.0}):
        params = model()
        opt = drop_in.AdamW(params, lr=0.01, **settings)
        set_gradients(params, 0)
        for step in range(3):
            gpu.launched.clear()
            before = gpu.uploads
            opt.step()
            assert gpu.launched == ["sweep", "factor", "sweep"]
            assert step == 0 or gpu.uploads == before


def test_groups_are_clipped_by_one_norm(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    results = []
    for kind in (TorchCuda, TorchMemory):
        with monkeypatch.context() as patch:
            patch.setattr(Torch, "kind_for", classmethod(lambda cls, v, kind=kind: kind))
            patch.setenv("OMNIADAM_KERNEL", "" if kind is TorchCuda else "numpy")
            params = model()
            groups = [
                {"params": params[:2], "global_clipnorm": 0.5},
                {"params": params[2:4], "global_clipnorm": 2.0, "weight_decay": 0.1},
                {"params": params[4:5], "clipnorm": 0.3},
                {"params": params[5:]},
            ]
            opt = drop_in.Adam(groups, lr=0.01)
            for step in range(2):
                set_gradients(params, step)
                opt.step()
            results.append(states(opt, params))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    # A norm of all for each of two limits, and one of its own.
    assert gpu.launched[: len(gpu.launched) // 2].count("factor") == 3


def test_gradients_elsewhere_upload_their_table_alone(gpu: StandIn) -> None:
    params = model()
    opt = drop_in.Adam(params, lr=0.01)
    keep = []
    for _ in range(3):
        set_gradients(params, 0)
        keep.append([p.grad for p in params])  # so that the next ones lie elsewhere
        before = gpu.uploads
        opt.step()
    assert gpu.uploads - before == 1


def test_what_moved_has_new_tables(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    params, others = model(), model()
    opt, plain = drop_in.Adam(params, lr=0.01), drop_in.Adam(others, lr=0.01)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        opt.step()
        plain.step()
        before = gpu.uploads
        params[3].data = params[3].data.clone()
        opt.state[params[4]]["exp_avg"].data = opt.state[params[4]]["exp_avg"].data.clone()
    set_gradients(params, 3)
    opt.step()
    assert gpu.uploads - before == 3
    set_gradients(others, 3)
    plain.step()
    assert bits(states(opt, params)) == bits(states(plain, others))


def test_pinned_memory_is_used_again_once_it_was_copied(
    monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    table = np.arange(5)
    gpu.uploaded(table)
    gpu.uploaded(table)
    assert gpu.pins == 1
    monkeypatch.setattr(Event, "is_over", False)
    found = [gpu.uploaded(table + i) for i in range(3)]
    assert gpu.pins == 4, "what may still be copied is not overwritten, nor waited for"
    assert [each.tensor.tolist() for each in found] == [(table + i).tolist() for i in range(3)]


def test_versions_of_what_is_written(gpu: StandIn) -> None:
    params = model()
    opt = drop_in.Adam(params, lr=0.01, use_ema=True)
    set_gradients(params, 0)
    opt.step()
    every = states(opt, params)
    before = [t._version for t in every]
    opt.step()
    assert all(t._version > v for t, v in zip(every, before, strict=True))
    loss = (params[3] * params[3]).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_orders_of_memory_and_views_of_one_buffer(gpu: StandIn) -> None:
    """As of convolutions, and of DDP, ZeRO and FSDP: at any alignment, in one launch."""
    shapes = [(4, 3, 5, 2), (33, 31), (1,), (1025,), ()]
    plain = [torch.sin(torch.arange(1.0 + math.prod(s)))[1:].reshape(s) for s in shapes]
    grads = [torch.cos(100 * p) for p in plain]
    buffer = torch.cat([torch.zeros(1), *(p.reshape(-1) for p in plain)])
    starts = np.cumsum([1, *(p.numel() for p in plain)])
    views = [buffer[a : a + p.numel()].view(p.shape) for a, p in zip(starts, plain, strict=False)]

    def last(x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x.to(memory_format=torch.channels_last)
        return x.t().contiguous().t() if x.dim() == 2 else x.clone()

    results = []
    for params, given in (
        ([p.clone() for p in plain], grads),
        (views, [g.clone() for g in grads]),
        (list(map(last, plain)), list(map(last, grads))),
    ):
        held = [nn.Parameter(p) for p in params]
        opt = drop_in.AdamW(held, lr=0.01, use_ema=True)
        gpu.launched.clear()
        for _ in range(2):
            for p, g in zip(held, given, strict=True):
                p.grad = g
            opt.step()
        assert gpu.launched == ["sweep"] * 2
        results.append(bits([t.contiguous() for t in states(opt, held)]))
    assert results[1] == results[0] and results[2] == results[0]
    assert buffer[0] == 0.0, "what lies before is left alone"


# --- what no kernel takes ---


def test_gradients_that_no_kernel_takes_go_the_way_of_other_devices(gpu: StandIn) -> None:
    shape = (33, 31)
    start = torch.linspace(-1, 1, 33 * 31).reshape(shape)
    params = [nn.Parameter(start.clone()) for _ in range(3)]
    opt = drop_in.Adam(params, lr=0.01)
    g = torch.sin(100 * start)
    for _ in range(2):
        params[0].grad = g.clone()
        params[1].grad = g.t().contiguous().t()
        params[2].grad = g.to_sparse()
        gpu.launched.clear()
        opt.step()
        assert gpu.launched == ["sweep"]
    for other in params[1:]:
        torch.testing.assert_close(other.data, params[0].data, rtol=0, atol=2e-7)


def test_a_gradient_that_lies_in_what_is_written_is_copied() -> None:
    p, q = nn.Parameter(torch.ones(2000)), nn.Parameter(torch.ones(2000))
    p.grad, q.grad = p.data, torch.ones(2000)
    opt = drop_in.Adam([p], lr=0.01)
    drop_in.Adam([q], lr=0.01).step()
    opt.step()
    assert bits([p]) == bits([q])


def test_a_rule_that_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from omniadam import Optimizer
    from omniadam.rule import Rule

    class Descent(Optimizer):
        rule = Rule(make_lambda, (), ("rate",))

        def coefficients(self, functions: Any, rate: Any, t: Any) -> tuple[Any, ...]:
            return (rate,)

    w = torch.ones(3)
    with pytest.warns(RuntimeWarning, match="no kernel for make_lambda .*written with `def`"):
        Descent(0.5).apply_gradients([(torch.ones(3), w)])
    assert w.tolist() == [0.5] * 3


def make_lambda(functions: Any) -> Any:
    return lambda w, g, slots, c: (w - c[0] * g, ())


# --- clocks ---


def test_a_scaler_skips_on_the_device(gpu: StandIn) -> None:
    params, others = model(), model()
    opt, plain = (
        drop_in.AdamW(params, lr=0.01, use_ema=True, fused=True),
        drop_in.AdamW(others, lr=0.01, use_ema=True),
    )
    for step, found in enumerate([0.0, 1.0, 0.0]):
        set_gradients(params, step, 8.0)
        set_gradients(others, step, 1.0)
        opt.found_inf, opt.grad_scale = there(found), there(8.0)
        before = bits(states(opt, params)) if step else None
        opt.step()
        if found:
            assert bits(states(opt, params)) == before
        else:
            plain.step()
    assert [opt.state[p]["step"].item() for p in params] == [2.0] * len(params)
    for one, other in zip(states(opt, params), states(plain, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    del opt.found_inf, opt.grad_scale


def test_a_count_goes_on_when_it_moves_to_the_device_and_through_a_state(gpu: StandIn) -> None:
    params = model()
    opt = drop_in.Adam(params, lr=0.01, global_clipnorm=1.0)
    for step in range(2):
        set_gradients(params, step)
        opt.step()
    opt.found_inf, opt.grad_scale = there(0.0), None
    opt.step()
    assert opt.state[params[0]]["step"] == 3
    others = model()
    twin = drop_in.Adam(others, lr=0.01, global_clipnorm=1.0)
    twin.load_state_dict(opt.state_dict())
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    set_gradients(params, 3)
    set_gradients(others, 3)
    opt.step()
    twin.step()
    assert twin.state[others[0]]["step"] == 4
    for one, other in zip(states(opt, params), states(twin, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_rate_on_the_device_is_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    params, others = model(), model()
    rate = there(0.5, torch.float64)
    opt = drop_in.AdamW(params, lr=rate, weight_decay=0.1, capturable=True)
    plain = drop_in.AdamW(others, lr=0.5, weight_decay=0.1)
    for step in range(3):
        rate.fill_(0.01 * (step + 1))
        plain.param_groups[0]["lr"] = rate.item()
        set_gradients(params, step)
        set_gradients(others, step)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "item", refused)
            patch.setattr(Tensor, "__float__", refused)
            patch.setattr(Tensor, "__bool__", refused)
            patch.setattr(Tensor, "tolist", refused)
            opt.step()
        plain.step()
    for one, other in zip(states(opt, params), states(plain, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def refused(self: Any, *arguments: Any) -> Any:
    raise AssertionError("the host waits for the device")


# --- graphs ---


GRAPHS: dict[str, dict[str, Any]] = {
    "plain": {"capturable": True},
    "full": {"capturable": True, "global_clipnorm": 1.0, "use_ema": True, "weight_decay": 0.1},
    "each": {"capturable": True, "clipnorm": 0.3, "maximize": True},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_replay_is_a_step(name: str, gpu: StandIn) -> None:
    params, others = model(), model()
    rates = there(0.01), there(0.01)
    opt = drop_in.AdamW(params, lr=rates[0], **GRAPHS[name])
    eager = drop_in.AdamW(others, lr=rates[1], **GRAPHS[name])

    def set_all(step: int) -> None:
        for p, q in zip(params, others, strict=True):
            g = torch.sin(torch.arange(p.numel()) + step).reshape(p.shape)
            p.grad = g if p.grad is None else p.grad.copy_(g)
            q.grad = g.clone()

    set_all(0)
    opt.step()
    before = bits(states(opt, params))
    with gpu.captured() as graph:
        opt.step()
    assert bits(states(opt, params)) == before
    eager.step()
    for step in range(1, 4):
        set_all(step)
        for rate in rates:
            rate.fill_(0.01 * step)
        for work in graph:
            work()
        eager.step()
        if step == 2:  # beside the graph
            set_all(9)
            opt.step()
            eager.step()
    assert bits(states(opt, params)) == bits(states(eager, others))
    assert [opt.state[p]["step"].item() for p in params] == [5.0] * len(params)


def test_a_capture_takes_what_was_provided_and_keeps_it(gpu: StandIn) -> None:
    params = [*model(), *model(1, torch.bfloat16)]
    opt = drop_in.Adam(params, lr=0.01, capturable=True)
    held = []

    def set_all(step: int) -> None:
        set_gradients(params[: len(SHAPES)], step)
        set_gradients(params[len(SHAPES) :], step)
        held.append([p.grad for p in params])

    set_all(0)
    opt.step()
    set_all(1)  # elsewhere, as in the memory of a graph
    pins, pinned = gpu.pins, len(gpu._pinned)
    with gpu.captured() as first:
        opt.step()
    assert gpu.pins == pins and len(gpu._pinned) == pinned
    set_all(2)
    before = bits(states(opt, params))
    with gpu.captured():
        for step in range(2, 1 + SPARES):
            set_all(step)
            opt.step()
        set_all(9)
        with pytest.raises(RuntimeError, match="no memory left to capture them"):
            opt.step()  # at addresses for which no step has left spare memory
    assert bits(states(opt, params)) == before
    opt.step()
    set_all(3)
    with gpu.captured() as second:
        opt.step()
    for graph, count in zip((first, second), (3.0, 4.0), strict=True):
        for work in graph:
            work()
        assert opt.state[params[0]]["step"] == count


def test_a_capture_needs_a_step_before_it_and_a_count_on_the_device(gpu: StandIn) -> None:
    params = model()
    set_gradients(params, 0)
    gpu.capturing = True
    opt = drop_in.Adam(params, lr=0.01, capturable=True)
    before = bits(params)
    with pytest.raises(RuntimeError, match="make at least one step"):
        opt.step()
    assert not opt.state and bits(params) == before
    gpu.capturing = False
    opt.step()
    plain = drop_in.Adam(params, lr=0.01)
    plain.step()
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="capturable=True"):
        plain.step()


# --- errors ---


def test_errors_come_before_anything_is_changed(gpu: StandIn) -> None:
    params = [torch.ones(3), torch.ones(1031)]
    opt = Adam(0.01)
    grads = [torch.ones_like(p) for p in params]
    opt.apply(grads, params)
    before, count = bits([*params, *opt.variables]), len(gpu.launched)
    with pytest.raises(ValueError, match="must be on the variable's device"):
        opt.apply([grads[0], grads[1].to("meta")], params)
    assert bits([*params, *opt.variables]) == before and len(gpu.launched) == count
    opt.apply(grads, params)
    assert bits([*params, *opt.variables]) != before


def test_state_that_was_moved(gpu: StandIn) -> None:
    params = model()
    opt = drop_in.Adam(params, lr=0.01)
    set_gradients(params, 0)
    opt.step()
    entry = opt._buckets[0].entries[3]
    entry.slots = (entry.slots[0].to("meta"), entry.slots[1])
    with pytest.raises(ValueError, match="must stay on meta, where this optimizer was built"):
        opt._buckets[0].backend.gradient(params[3].grad, entry)


def test_without_kernels_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from omniadam import slow

    monkeypatch.undo()
    monkeypatch.setattr(slow, "reasons", [])
    monkeypatch.setattr(cuda, "is_there", lambda value: True)
    for choice, problem in (("", "it is broken"), ("numba", ""), ("numpy", "")):
        monkeypatch.setenv("OMNIADAM_KERNEL", choice)
        monkeypatch.setattr(cuda, "_problem", lambda problem=problem: problem)
        if problem:
            with pytest.warns(RuntimeWarning, match="kernels for GPUs cannot be used: it is broke"):
                assert not cuda.can_step([torch.ones(1)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not cuda.can_step([torch.ones(1)])
    monkeypatch.setenv("OMNIADAM_KERNEL", "triton")
    monkeypatch.setattr(cuda, "_problem", lambda: "it is broken")
    with pytest.raises(RuntimeError, match="OMNIADAM_KERNEL=triton asks for"):
        cuda.can_step([torch.ones(1)])


def test_a_device_that_nothing_can_be_launched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    modes = [2]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(Gpu, "is_capturing", lambda self: False)

    def fails(gpu: Any) -> bool:
        assert modes[-1] == "default", "the step that is tried may be waited for"
        raise OSError("no compiler\nhere")

    for tried, problem in (
        (fails, "Triton fails on cuda:3 (OSError: no compiler here)"),
        (lambda gpu: False, "a step on cuda:3 comes out wrong"),
        (lambda gpu: True, ""),
    ):
        monkeypatch.setattr(gpu_module, "makes_a_step", tried)
        assert Gpu(torch.device("cuda", 3)).problem == problem
        assert modes[-1] == 2
    assert issubclass(TorchCuda, TorchDevice)


def test_what_a_capture_uploads_is_no_table_of_other_steps(gpu: StandIn) -> None:
    """It is filled when the graph is replayed; and the graph's tables live as long as it does."""
    params, others = model(), model()
    opt = drop_in.Adam(params, lr=0.01, capturable=True, clipvalue=1.0)
    twin = drop_in.Adam(others, lr=0.01, capturable=True, clipvalue=1.0)
    held = []
    for step in range(2):
        set_gradients(params, step)
        set_gradients(others, step)
        held.append([p.grad for p in params])
        if step == 0:
            opt.step()
            twin.step()
    graphs = []
    for _ in range(2):  # the second over the same addresses, from the same memory of the host
        with gpu.captured() as graph:
            opt.step()
        graphs.append(graph)
    opt.step()  # nothing was replayed, and the table of these addresses is not filled
    twin.step()
    assert bits(states(opt, params)) == bits(states(twin, others))
    for graph in graphs:
        for work in graph:
            work()
        twin.step()
    assert bits(states(opt, params)) == bits(states(twin, others))


def test_a_table_lives_as_long_as_any_stream_needs_it(
    monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    recorded: list[tuple[int, Any]] = []
    monkeypatch.setattr(
        Tensor, "record_stream", lambda t, s: recorded.append((t.data_ptr(), s)), raising=False
    )
    params = model()
    opt = drop_in.Adam(params, lr=0.01, global_clipnorm=1.0, capturable=True)
    set_gradients(params, 0)
    opt.step()
    opt.step()
    assert not recorded
    gpu.at = "another stream"
    opt.step()
    # Chunks, rows and addresses of a norm and of a step, partial sums, two of what adds them, the
    # clock, and the counts.
    assert len({at for at, _ in recorded}) == 11 and len(recorded) == 11
    opt.step()
    assert len(recorded) == 11


def test_two_devices_have_launches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[dict[str, Any]] = [
        {"use_ema": True},
        {"global_clipnorm": 1.0},
        {"capturable": True, "clipnorm": 0.5},
    ]
    for given in settings:
        params, others = model(), model()
        devices = StandIn(), StandIn()
        places = {p.data_ptr(): devices[i % 2] for i, p in enumerate(params)}
        with monkeypatch.context() as patch:
            set_devices(patch, lambda t, places=places: places[t.data_ptr()])
            opt = drop_in.Adam(params, lr=0.01, **given)
            for step in range(2):
                set_gradients(params, step)
                opt.step()
        twin = drop_in.Adam(others, lr=0.01, **given)
        for step in range(2):
            set_gradients(others, step)
            twin.step()
        for one, other in zip(states(opt, params), states(twin, others), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        for each in devices:
            assert each.launched.count("sweep") == (2 if "use_ema" in given else 4)


def test_a_count_that_somebody_changed(gpu: StandIn) -> None:
    params, others = model(), model()
    opt = drop_in.Adam(params, lr=0.01, capturable=True)
    twin = drop_in.Adam(others, lr=0.01)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        if step == 2:
            opt.state[params[2]]["step"].fill_(7.0)
            twin.state[others[2]]["step"].fill_(7.0)
        opt.step()
        twin.step()
    assert opt.state[params[2]]["step"] == 8 and opt.state[params[1]]["step"] == 3
    for one, other in zip(states(opt, params), states(twin, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_settings_that_a_graph_cannot_read(gpu: StandIn) -> None:
    params = model()
    opt = drop_in.Adam(params, lr=0.01, capturable=True, weight_decay=torch.tensor(0.5))
    set_gradients(params, 0)
    opt.step()
    with gpu.captured(), pytest.raises(RuntimeError, match="reads `lr` alone on the device"):
        opt.step()


def test_steps_without_fast_paths_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    monkeypatch.setattr("omniadam.fast.is_enabled", lambda: False)
    params = model()
    opt = drop_in.Adam(params, lr=0.01, capturable=True)
    set_gradients(params, 0)
    opt.step()
    with gpu.captured() as graph:
        opt.step()
    for work in graph:
        work()
    assert opt.state[params[0]]["step"] == 2


def test_a_group_that_is_empty_or_has_no_values_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "can_step", lambda variables: bool(variables))
    params = model()
    drop_in.Adam([{"params": params}, {"params": []}], lr=0.01, capturable=True)
    drop_in.Adam([torch.ones(3, device="meta")], lr=0.01, capturable=True)


class Elsewhere(str):
    """The host, as a device that is not the host."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


@pytest.mark.parametrize("settings", [{"clipnorm": 0.3}, {"global_clipnorm": 1.0}], ids=str)
def test_shards_are_clipped_in_a_few_operations(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        others = [nn.Parameter(torch.full((7, 3), 0.1 * k)) for k in range(20)]
        params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in others]
        opt, twin = (drop_in.AdamW(each, lr=0.01, **settings) for each in (params, others))
        for step in range(3):
            for k, (p, q) in enumerate(zip(params, others, strict=True)):
                q.grad = torch.sin(torch.arange(21.0) + step + k).reshape(7, 3)
                p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
            if step == 1:
                here = opt._meshes[0]._mesh
                elsewhere = SimpleNamespace(device_type=Elsewhere("cpu"), get_group=here.get_group)
                monkeypatch.setattr(opt._meshes[0], "_mesh", elsewhere)
            gpu.launched.clear()
            with Counted() as counted:
                opt.step()
            assert gpu.launched == ["sweep", "factor", "sweep"]
            twin.step()
            # Whatever the number of parameters.
            assert step == 0 or 3 < len(counted.names) < 15, counted.names
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-6, atol=1e-9)
    finally:
        dist.destroy_process_group()


# --- whether a device can be trusted ---


def test_a_device_is_tried(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    assert makes_a_step(gpu)
    assert gpu.launched == ["sweep"]
    launch = gpu.launch

    def wrong(kernel: Any, programs: int, *arguments: Any) -> None:
        launch(kernel, programs - 1, *arguments)

    monkeypatch.setattr(gpu, "launch", wrong)
    assert not makes_a_step(gpu)


def test_a_report_says_how_steps_are_made(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    import omniadam

    wrong = StandIn()
    wrong.problem = "a step on cuda:1 comes out wrong"
    places = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(gpu_module, "_gpus", dict(zip(places, (gpu, wrong), strict=True)))
    said = {
        "cuda:0": "compiled by Triton",
        "cuda:1": "PyTorch's functions: a step on cuda:1 comes out wrong",
    }
    assert omniadam.info()["gpu_kernels"] == said
    assert all(words in omniadam.environment.as_text(omniadam.info()) for words in said.values())


def failing(
    monkeypatch: pytest.MonkeyPatch, *names: str, error: Exception | None = None
) -> list[Any]:
    """Let Triton fail to compile kernels of these names, and note the attempts."""
    from omniadam import slow

    attempts = []
    compiled = kernels._compiled

    def compile(function: Any, *others: Any) -> Any:
        if function.fn.__name__ not in names:
            return compiled(function, *others)
        attempts.append(function)
        raise error or OSError("no space\nis left")

    monkeypatch.setattr(slow, "reasons", [])
    monkeypatch.setattr(kernels, "_compiled", compile)
    return attempts


@pytest.mark.parametrize("name", ["sweep", "factor"])
@pytest.mark.parametrize("settings", [{"global_clipnorm": 1.0}, {"clipnorm": 0.3}], ids=str)
def test_what_triton_fails_to_compile(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    attempts = failing(monkeypatch, name)
    params, others = model(), model()
    opt = drop_in.Adam(params, lr=0.01, **settings)
    for step in range(2):
        set_gradients(params, step)
        if step == 0:
            with pytest.warns(RuntimeWarning, match="OSError: no space is left"):
                opt.step()
            first = len(attempts)
        else:
            opt.step()
    assert len(attempts) == first, "what fails is not tried again"
    monkeypatch.setattr(Torch, "kind_for", classmethod(lambda cls, v: TorchDevice))
    plain = drop_in.Adam(others, lr=0.01, **settings)
    for step in range(2):
        set_gradients(others, step)
        plain.step()
    for one, other in zip(states(opt, params), states(plain, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["tell", "count", "sweep"])
def test_without_a_clock_the_host_decides(
    name: str, monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    failing(monkeypatch, name)
    params, others = model(), model()
    opt = drop_in.AdamW(params, lr=0.01, use_ema=True, fused=True)
    twin = drop_in.AdamW(others, lr=0.01, use_ema=True)
    for step, found in enumerate([0.0, 1.0, 0.0]):
        set_gradients(params, step, math.inf if found else 8.0)
        set_gradients(others, step)
        opt.found_inf, opt.grad_scale = there(found), there(8.0)
        if step == 0:
            with pytest.warns(RuntimeWarning, match="The host waits for the numbers"):
                opt.step()
        else:
            opt.step()
        if not found:
            twin.step()
    for one, other in zip(states(opt, params), states(twin, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert opt.state[params[0]]["step"] == 2
    rated = drop_in.AdamW(model(), lr=there(0.01))
    set_gradients(rated.param_groups[0]["params"], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rated.step()


def test_what_is_captured_needs_its_clock(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    failing(monkeypatch, "tell")
    params = model()
    opt = drop_in.AdamW(params, lr=0.01, capturable=True)
    set_gradients(params, 0)
    before = bits(params)
    with pytest.raises(CannotCompile, match="no space is left"):
        opt.step()
    assert bits(params) == before and not opt.state


def test_a_kernel_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    failing(monkeypatch, "sweep")
    monkeypatch.setenv("OMNIADAM_KERNEL", "triton")
    opt = drop_in.AdamW(model(), lr=0.01)
    set_gradients(opt.param_groups[0]["params"], 0)
    with pytest.raises(CannotCompile, match="no space is left"):
        opt.step()


def test_what_fails_for_want_of_memory_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "sweep", error=torch.OutOfMemoryError("2 GiB"))
        opt = drop_in.AdamW(model(), lr=0.01)
        set_gradients(opt.param_groups[0]["params"], 0)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    opt.step()
    assert gpu.launched == ["sweep"]


def test_gradients_that_come_and_go_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    params, others = model(), model()
    opt = drop_in.AdamW(params, lr=0.01, capturable=True)
    twin = drop_in.AdamW(others, lr=0.01)
    rng = np.random.default_rng(0)
    for step in range(5):
        set_gradients(params, step)
        set_gradients(others, step)
        for i in rng.choice(len(params), 2, replace=False) if step else ():
            params[i].grad = others[i].grad = None
        with monkeypatch.context() as patch:
            if step:
                for name in ("item", "__float__", "__bool__", "tolist", "cpu"):
                    patch.setattr(Tensor, name, refused)
            opt.step()
        twin.step()
    for p, q in zip(params, others, strict=True):
        assert opt.state[p]["step"] == twin.state[q]["step"]
    for one, other in zip(states(opt, params), states(twin, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_parameter_that_begins_anew(gpu: StandIn) -> None:
    """Beside those whose counts the clock knows to be alike."""
    params, others = model(), model()
    opt, twin = drop_in.Adam(params, lr=0.01, capturable=True), drop_in.Adam(others, lr=0.01)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        if step == 2:
            del opt.state[params[0]], twin.state[others[0]]
        opt.step()
        twin.step()
    assert [opt.state[p]["step"].item() for p in params[:2]] == [1.0, 3.0]
    for one, other in zip(states(opt, params), states(twin, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_scaler_where_no_kernel_takes_a_gradient(gpu: StandIn) -> None:
    shape = (33, 31)
    start = torch.linspace(-1, 1, 33 * 31).reshape(shape)
    params, others = ([nn.Parameter(start.clone()) for _ in range(2)] for _ in range(2))
    opt = drop_in.AdamW(params, lr=0.01, fused=True, capturable=True)
    twin = drop_in.AdamW(others, lr=0.01)
    for found in (0.0, 1.0, 0.0):
        g = torch.sin(100 * start) * (math.inf if found else 1.0)
        params[0].grad = 8.0 * g
        params[1].grad = (8.0 * g).t().contiguous().t()
        opt.found_inf, opt.grad_scale = there(found), there(8.0)
        if found:
            with gpu.captured(), pytest.raises(RuntimeError, match="kernels make all of it"):
                opt.step()
            opt.found_inf, opt.grad_scale = there(found), there(8.0)
        opt.step()
        if not found:
            for q in others:
                q.grad = g.clone()
            twin.step()
    for one, other in zip(states(opt, params), states(twin, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_where_a_count_is() -> None:
    """All memory is the host's here, so that this is asked for by itself."""
    count, there = torch.zeros(()), torch.zeros((), device="meta")
    assert drop_in._counts_on(count, CPU) and drop_in._counts_on(there, there.device)
    for step, device in (
        (count, there.device),
        (count.double(), CPU),
        (torch.zeros(1), CPU),
        (2.0, CPU),
        (None, CPU),
    ):
        assert not drop_in._counts_on(step, device)


def test_what_is_pinned_and_copied_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda *size, **given: noted.append((size, given)))
    Gpu.pinned(object.__new__(Gpu), 7)
    like = {"dtype": torch.int64, "device": "cpu", "pin_memory": True}
    assert noted == [((7,), like)]
    monkeypatch.undo()
    monkeypatch.setattr(Tensor, "copy_", lambda *given, **named: noted.append(named))
    Gpu.copy(object.__new__(Gpu), torch.zeros(1), torch.zeros(1))
    assert noted[1:] == [{"non_blocking": True}]


def test_plans_are_few(gpu: StandIn) -> None:
    """Each has tables of all chunks; what no kernel takes may be others at each step."""
    params = [nn.Parameter(torch.ones(3, 5)) for _ in range(4)]
    opt = drop_in.Adam(params, lr=0.01)
    for step in range(16):
        for k, p in enumerate(params):
            p.grad = torch.ones(5, 3).t() if step >> k & 1 else torch.ones(3, 5)
        opt.step()
        assert len(opt._buckets[0]._selection.prepared.plans) <= 8
    assert gpu.launched.count("sweep") == 15


def test_omniadam_adam_is_not_captured(monkeypatch: pytest.MonkeyPatch, gpu: StandIn) -> None:
    from omniadam import Adam

    params = model()
    opt = Adam()
    opt.apply([torch.ones_like(p) for p in params], params)
    monkeypatch.setattr(cuda, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="counts steps on the host"):
        opt.apply([torch.ones_like(p) for p in params], params)


def test_state_of_another_type_is_refused(gpu: StandIn) -> None:
    params = model()
    opt = drop_in.Adam(params, lr=0.01)
    set_gradients(params, 0)
    opt.step()
    slot = opt.state[params[0]]["exp_avg"]
    slot.data = slot.data.to(torch.bfloat16)
    set_gradients(params, 1)
    with pytest.raises(ValueError, match="dtype"):
        opt.step()
