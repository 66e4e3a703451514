"""Run by test_cuda.py, in a process of Triton's interpreter: steps on what stands in for a GPU.

Its memory is the host's, and what is launched is interpreted; copies and launches are noted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from triton.runtime.interpreter import TensorHandle

import omniadam.torch as drop_in
from cases import PART, SMALL_SHAPES, Case, gradients, variables
from omniadam import Adam, schedules
from omniadam.backends import cuda
from omniadam.backends.cuda import Gpu, TorchCuda
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
    """A GPU in the host's memory."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.uploads = 0
        self.pins = 0
        self.capturing = False
        self.graph: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        super().__init__(CPU)

    def _tried(self) -> str:
        return ""

    def is_capturing(self) -> bool:
        return self.capturing

    def uploaded(self, values: Any, spare: Any = None) -> Tensor:
        found = super().uploaded(values, spare)
        self.uploads += 1
        return found

    def pinned(self, size: int) -> Tensor:
        assert not self.capturing, "memory of the host cannot be allocated in a capture"
        self.pins += 1
        return torch.empty(size, dtype=torch.int64)

    def event(self) -> Event:
        return Event()

    def release(self, table: Tensor) -> None:
        pass

    def _target(self) -> Any:
        return None

    def launch(self, kernel: Any, programs: int, *arguments: Any) -> None:
        if programs:
            function, fixed = kernel
            *rest, last = arguments
            last = tuple(map(double, last)) if isinstance(last, tuple) else double(last)
            self.launched.append(function.fn.__name__)
            function[(programs,)](*rest, last, *fixed)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """What all tensors are on."""
    monkeypatch.setenv("OMNIADAM_KERNEL", "")
    found = StandIn()
    monkeypatch.setattr(cuda, "gpu_of", lambda device: found)
    monkeypatch.setattr(cuda, "can_step", lambda variables: True)
    monkeypatch.setattr(cuda, "is_there", lambda value: getattr(value, "is_there", False))
    monkeypatch.setattr(cuda, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "is_capturing", lambda: found.capturing)
    monkeypatch.setattr(Torch, "kind_for", classmethod(lambda cls, variables: TorchCuda))
    monkeypatch.setattr(kernels, "_compiled", lambda function, constants, numbers, target: function)
    yield found


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
    assert [each.tolist() for each in found] == [(table + i).tolist() for i in range(3)]


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
    with pytest.warns(RuntimeWarning, match="Triton cannot compile the rule"):
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


def test_a_capture_takes_what_was_provided_and_keeps_it(gpu: StandIn) -> None:
    params = [*model(), *model(1, torch.bfloat16)]
    opt = drop_in.Adam(params, lr=0.01, capturable=True)

    def set_all(step: int) -> list[Any]:
        set_gradients(params[: len(SHAPES)], step)
        set_gradients(params[len(SHAPES) :], step)
        return [p.grad for p in params]

    held = [set_all(0)]
    opt.step()
    held.append(set_all(1))  # elsewhere, as in the memory of a graph
    gpu.capturing = True
    pins, pinned = gpu.pins, len(gpu._pinned)
    opt.step()
    assert gpu.pins == pins and len(gpu._pinned) == pinned and len(gpu._kept) == 2
    tables = [table[0].tolist() for table in gpu._kept]
    assert tables[0] + tables[1] == [p.grad.data_ptr() for p in params]
    before = bits(states(opt, params))
    held.append(set_all(2))
    with pytest.raises(RuntimeError, match="make at least one step"):
        opt.step()
    assert bits(states(opt, params)) == before
    gpu.capturing = False
    opt.step()
    assert [table[0].tolist() for table in gpu._kept] == tables, "a replay reads them again"
    gpu.capturing = True
    held.append(set_all(3))
    opt.step()
    assert len(gpu._kept) == 4


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
    params = model()
    opt = drop_in.Adam(params, lr=0.01)
    set_gradients(params, 0)
    opt.step()
    before, count = bits(states(opt, params)), len(gpu.launched)
    grad = torch.ones_like(params[3], device="meta")
    entry = opt._buckets[0].entries[3]
    with pytest.raises(ValueError, match="must be on the variable's device"):
        opt._buckets[0].backend.gradient(grad, entry)
    entry.slots = (entry.slots[0].to("meta"), entry.slots[1])
    with pytest.raises(ValueError, match="must stay on meta, where this optimizer was built"):
        opt._buckets[0].backend.gradient(params[3].grad, entry)
    assert bits(states(opt, params)) == before and len(gpu.launched) == count


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

    def fails(self: Any) -> None:
        raise OSError("no compiler\nhere")

    monkeypatch.setattr(Gpu, "_try", fails)
    monkeypatch.setattr(Gpu, "is_capturing", lambda self: False)
    found = Gpu(torch.device("cuda", 3)).problem
    assert found == "Triton fails on cuda:3 (OSError: no compiler here)"
    assert issubclass(TorchCuda, TorchDevice)


def test_what_a_capture_uploads_is_no_table_of_other_steps(gpu: StandIn) -> None:
    """It is filled when the graph is replayed; and the graph's tables live as long as it does."""
    params = model()
    opt = drop_in.Adam(params, lr=0.01, capturable=True, global_clipnorm=1.0)
    held = [params]
    set_gradients(params, 0)
    opt.step()
    held.append([p.grad for p in params])
    set_gradients(params, 1)
    gpu.capturing = True
    opt.step()
    kept = len(gpu._kept)
    opt.step()  # the same addresses, in another graph: from the same memory of the host
    assert len(gpu._kept) == kept and len(gpu._captured) >= 4
    gpu.capturing = False
    backend = opt._buckets[0].backend
    launches = [
        launch for plan in opt._buckets[0]._selection.prepared.plans.values() for launch in plan[0]
    ]
    assert backend is not None and all(len(launch.grads) == 1 for launch in launches)
    opt.step()
    assert all(len(launch.grads) == 2 for launch in launches if launch.kind.updates)


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
