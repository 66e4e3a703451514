"""Variables and state stay as they were built, or it is an error: address, size, strides, type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from omniadam import Adam


def resized(array: Any) -> None:
    array.resize(100_000, refcheck=False)


def narrowed(array: Any) -> None:
    array.dtype = np.float32


def whole(array: Any) -> None:
    array.dtype = np.int64


def reshaped(array: Any) -> None:
    array.shape = (2, 2)


CHANGES: dict[str, Callable[[Any], None]] = {
    f.__name__: f for f in (resized, narrowed, whole, reshaped)
}


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning", "ignore:Gradients do not")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("which", ["variable", "momentum", "average", "average of another"])
def test_numpy_memory_that_is_changed_in_place(
    which: str, steps: int, name: str, kernel: str
) -> None:
    w, other, g = np.ones(4), np.ones(4), np.ones(4)
    opt = Adam(0.1, use_ema=True)
    opt.build({"w": w, "other": other})
    for _ in range(steps):
        opt.apply([g, None], [w, other])
    state = opt.named_variables()
    changed = {
        "variable": w,
        "momentum": state["w_momentum"],
        "average": state["w_average"],
        "average of another": state["other_average"],
    }[which]
    CHANGES[name](changed)
    changed[...] = 7
    before = [v.copy() for v in (w, other, *opt.variables)]
    with pytest.raises((ValueError, TypeError), match=r"must stay as it was built|must be float16"):
        opt.apply([np.ones(w.shape, w.dtype), None], [w, other])
    for got, want in zip((w, other, *opt.variables), before, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("which", ["parameter", "state"])
def test_torch_memory_that_is_transposed_in_place(which: str, steps: int, kernel: str) -> None:
    """The numbers are those of who was given the same values in new memory."""
    import torch

    def run(change: Callable[[Any], None]) -> list[Any]:
        torch.manual_seed(0)
        w = torch.randn(3, 3)
        opt = Adam(0.1)
        opt.build([w])
        for i in range(steps + 2):
            if i == steps:
                change(w if which == "parameter" else opt.variables[2])
            opt.apply([torch.randn(3, 3)], [w])
        return [w, *opt.variables]

    def in_place(t: Any) -> None:
        t.t_()

    def anew(t: Any) -> None:
        t.copy_(t.t().clone())

    def by_data(t: Any) -> None:
        t.data = t.data.T

    want = run(anew)
    for change in (in_place, by_data):
        for got, expected in zip(run(change), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.needs("torch")
def test_torch_state_that_is_changed_in_place(kernel: str) -> None:
    import torch

    changes: list[Callable[[Any], None]] = [
        lambda t: t.resize_(2),
        lambda t: t.resize_(1000),
        lambda t: setattr(t, "data", t.data.view(torch.int32)),
        lambda t: setattr(t, "data", t.data.view(2, 2)),
        lambda t: t.unsqueeze_(0),
    ]
    for change in changes:
        w, opt = torch.ones(4), Adam(0.1)
        for _ in range(2):
            opt.apply([torch.ones(4)], [w])
        before = w.clone()
        change(opt.variables[2])
        with pytest.raises(ValueError, match="must stay as it was built"):
            opt.apply([torch.ones(4)], [w])
        assert torch.equal(w, before) and opt.iterations == 2


@pytest.mark.needs("torch")
def test_torch_counter_whose_data_is_replaced() -> None:
    import torch

    w, opt = torch.ones(4), Adam(0.1)
    opt.apply([torch.ones(4)], [w])
    opt.variables[0].data = torch.tensor(5)
    assert opt.iterations == 5
    opt.apply([torch.ones(4)], [w])
    assert opt.iterations == 6 == opt.variables[0].item() == opt.get_weights()[0]


@pytest.mark.needs("torch")
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("which", ["parameter", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_torch_drop_in_and_other_strides(steps: int, which: str, dtype: str) -> None:
    """The numbers are those of torch.optim, given the same change."""
    import torch

    from omniadam import torch as ours

    def run(kind: Any, change: Callable[[Any], None]) -> list[Any]:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(2, 2, dtype=getattr(torch, dtype)))
        opt = kind([p], lr=0.1)
        for i in range(steps + 2):
            if i == steps:
                change(p if which == "parameter" else opt.state[p][which])
            p.grad = torch.randn(2, 2, dtype=p.dtype)
            opt.step()
        return [p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]]

    def by_data(t: Any) -> None:
        t.data = t.data.T

    def in_place(t: Any) -> None:
        t.data.t_() if which == "parameter" else t.t_()

    for change in (by_data, in_place):
        for got, want in zip(run(ours.Adam, change), run(torch.optim.Adam, change), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
