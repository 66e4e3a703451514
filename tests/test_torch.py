"""PyTorch: the CPU kernels on tensors' own memory, and the rule on torch's functions elsewhere.

No test needs a GPU. What runs on one is run here on tensors of the CPU, against the oracle, and on
fake tensors, which know everything about a tensor but its numbers: whatever reads one on the
host, or mixes devices, is an error there.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import omniadam.torch  # noqa: E402
from cases import (  # noqa: E402
    CASES,
    PART,
    SMALL_SHAPES,
    STEPS,
    Case,
    assert_close,
    gradients,
    sparse_gradient,
    variables,
    with_missing,
)
from omniadam import Adam, AdamW, Optimizer, schedules  # noqa: E402
from omniadam.backends import torch as backend  # noqa: E402
from omniadam.fast import openmp  # noqa: E402
from omniadam.fast import torch as fast  # noqa: E402
from omniadam.kernels import cpu  # noqa: E402
from reference import Array  # noqa: E402

EVERYTHING = list(CASES)[-1]  # the case with all settings at once
PLACES = ("memory", "device")
HALVES = ("float16", "bfloat16")
SUBMODULE = "torch_of_omniadam"

cached_gradients = cache(gradients)


# --- From arrays to tensors and back -------------------------------------------------------------


def tensor(values: Array) -> Tensor:
    """A copy; NumPy has bfloat16 by ml_dtypes only, which torch does not know."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def array(tensor: Tensor) -> Array:
    """A copy; bfloat16 as float32."""
    tensor = tensor.detach().clone()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def parameters(values: list[Array]) -> list[Tensor]:
    return [nn.Parameter(tensor(each)) for each in values]


def assert_same(one: Any, other: Any) -> None:
    """To the bit."""
    one, other = (array(x) if isinstance(x, Tensor) else np.asarray(x) for x in (one, other))
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    np.testing.assert_array_equal(one, other)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors lie: for both, on the CPU, but "device" is treated as if they did not."""
    on(request.param, monkeypatch)
    return str(request.param)


def on(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = backend.TorchMemory if place == "memory" else backend.TorchDevice
    monkeypatch.setattr(backend.Torch, "over", lambda variables: chosen())


def build(case: Case, params: list[Any]) -> Adam:
    opt = Adam(**case.settings_for(schedules))
    if case.excluded:
        opt.exclude_from_weight_decay(var_list=[params[i] for i in case.excluded])
    opt.build({f"w{i}": p for i, p in enumerate(params)})
    return opt


def check(opt: Adam, params: list[Any], reference: Any, dtype: str = "float32") -> None:
    assert_close(list(map(array, params)), reference, "variable", dtype)
    state = opt.named_variables()
    for slot in reference.state:
        if slot != "variable":
            held = [array(state[f"w{i}_{slot}"]) for i in range(len(params))]
            assert_close(held, reference, slot, dtype)


def snapshot(opt: Adam, params: list[Any]) -> list[Array]:
    return [*map(array, params), *opt.get_weights()]


def assert_unchanged(before: list[Array], opt: Adam, params: list[Any]) -> None:
    for one, other in zip(before, snapshot(opt, params), strict=True):
        assert_same(one, other)


# --- The table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PART)
def test_every_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the bits of NumPy; elsewhere as near to the oracle as they are."""
    values = variables()
    arrays, in_memory, on_device = [v.copy() for v in values], parameters(values), None
    reference = PART[name].reference(values)
    ours, numpys = build(PART[name], in_memory), build(PART[name], arrays)
    on("device", monkeypatch)
    on_device = parameters(values)
    elsewhere = build(PART[name], on_device)
    for step in range(STEPS):
        grads = cached_gradients(step)
        tensors = list(map(tensor, grads))
        assert ours.apply_gradients(zip(tensors, in_memory, strict=True)) == step + 1
        elsewhere.apply(tensors, on_device)
        numpys.apply(grads, arrays)
        reference.step(grads)
    check(ours, in_memory, reference)
    check(elsewhere, on_device, reference)
    for one, other in zip(in_memory, arrays, strict=True):
        assert_same(one, other)
    for one, other in zip(ours.get_weights(), numpys.get_weights(), strict=True):
        assert_same(one, other)
    assert (type(ours._state.backend), type(elsewhere._state.backend)) == (
        backend.TorchMemory,
        backend.TorchDevice,
    )


@pytest.mark.parametrize("dtype", ["float64", *HALVES])
@pytest.mark.parametrize(
    "name", ["amsgrad", "excluded", "clipnorm", "ema_overwrite_frequency", EVERYTHING]
)
def test_every_dtype(name: str, dtype: str, place: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    values = variables(dtype, shapes=(*SMALL_SHAPES, (3_001,)))
    params = parameters(values)
    opt, reference = build(CASES[name], params), CASES[name].reference(values)
    for step in range(STEPS):
        grads = gradients(step, [v.shape for v in values], dtype=dtype)
        opt.apply(list(map(tensor, grads)), params)
        reference.step(grads)
        # What a 16-bit store loses is the dtype's doing; the next step starts from it.
        check(opt, params, reference, dtype)
        if dtype in HALVES:
            reference.resync(list(map(array, params)))
    wide = torch.float32 if dtype in HALVES else torch.float64
    assert {v.dtype for n, v in opt.named_variables().items() if "_" in n[2:] and n[0] == "w"} == {
        wide
    }


@pytest.mark.parametrize("name", ["defaults", "amsgrad", "global_clipnorm", EVERYTHING])
def test_a_hundred_steps(name: str, place: str) -> None:
    """Longer than the table: what goes wrong a little at each step has time to show."""
    values = variables(shapes=SMALL_SHAPES)
    params = parameters(values)
    opt, reference = build(CASES[name], params), CASES[name].reference(values)
    for step in range(100):
        grads = cached_gradients(step, SMALL_SHAPES)
        opt.apply(list(map(tensor, grads)), params)
        reference.step(grads)
    check(opt, params, reference)


def test_half_precision_is_rounded_once(place: str) -> None:
    """Decay and update are 3/8 of a spacing each: alone either would be rounded away."""
    w = torch.ones(5, dtype=torch.bfloat16)
    Adam(1.5 * 2.0**-10, epsilon=0.0, weight_decay=1.0).apply([torch.ones(5)], [w])
    assert (w == 1 - 2.0**-8).all()


@pytest.mark.parametrize(
    "name", ["defaults", "amsgrad", "clipnorm", "clipvalue", "global_clipnorm", EVERYTHING]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(bad: float, name: str, place: str) -> None:
    """They go where they go on NumPy, and out of an accumulator when it is cleared."""
    values = variables(shapes=((7,), (3, 5), (9,)))[:2] * 3
    params, arrays = parameters(values), [v.copy() for v in values]
    ours, numpys = build(CASES[name], params), build(CASES[name], arrays)
    for step in range(7):
        grads = gradients(step, [v.shape for v in values])
        if step == 1:
            grads[0][3] = bad
        ours.apply(list(map(tensor, grads)), params)
        numpys.apply(grads, arrays)
        for one, other in zip(params, arrays, strict=True):
            np.testing.assert_allclose(array(one), other, 1e-5, 1e-6)
    for one, other in zip(ours.get_weights(), numpys.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, 1e-5, 1e-6)


@pytest.mark.parametrize("name", ["defaults", "amsgrad", "global_clipnorm"])
def test_another_library_agrees(name: str) -> None:
    """torch.optim, whose epsilon is Algorithm 1's: with epsilon 0 there is no difference."""
    values = variables("float64", shapes=((7,), (3, 5)))
    amsgrad = name == "amsgrad"
    clip = 2.0 if name == "global_clipnorm" else None
    ours, theirs = parameters(values), parameters(values)
    opt = Adam(0.01, epsilon=0.0, amsgrad=amsgrad, global_clipnorm=clip)
    peer = torch.optim.Adam(theirs, lr=0.01, eps=0.0, amsgrad=amsgrad)
    for step in range(10):
        grads = [tensor(g + 0.5) for g in gradients(step, ((7,), (3, 5)), dtype="float64")]
        opt.apply(grads, ours)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        peer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


# --- Gradients -----------------------------------------------------------------------------------


def stepped(
    make: Callable[[], Tensor], gradient: Callable[[Tensor], Any], steps: int = 3, **settings: Any
) -> tuple[Adam, Tensor]:
    """A variable after some steps."""
    w = make()
    opt = Adam(0.1, **settings)
    for _ in range(steps):
        opt.apply([gradient(w)], [w])
    return opt, w


def flipped(x: Tensor) -> Tensor:
    """The same values as a view with its sign bit set."""
    flip = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert flip.is_neg() and torch.equal(flip, x)
    return flip


def expanded(x: Tensor) -> Tensor:
    return x[:1, :1].expand_as(x)


def differentiable(x: Tensor) -> Tensor:
    """As `torch.autograd.grad(..., create_graph=True)` returns them."""
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((y**2 / 2).sum(), y, create_graph=True)
    assert g.requires_grad and torch.equal(g, x)
    return g


def inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def misaligned(x: Tensor) -> Tensor:
    values = np.ndarray(tuple(x.shape), np.float32, bytearray(4 * x.numel() + 1), 1)
    values[...] = x.numpy()
    return torch.from_numpy(values)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: torch.stack([g, g], dim=-1)[..., 0],
    "expanded": expanded,
    "float64": lambda g: g.double(),
    "float16": lambda g: g.half(),
    "bfloat16": lambda g: g.bfloat16(),
    "integers": lambda g: g.int(),
    "sign bit": flipped,
    "create_graph": differentiable,
    "inference": inferred,
    "parameter": nn.Parameter,
    "efficient zeros": lambda g: torch._efficientzerotensor(g.shape),
    "COO": lambda g: g.to_sparse(),
    "COO of rows": lambda g: g.to_sparse(1),
    "CSR": lambda g: g.to_sparse_csr(),
    "CSC": lambda g: g.to_sparse_csc(),
}


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_form_of_a_gradient(form: str, clip: float | None, place: str) -> None:
    """A gradient in any form does what its values do, at every step."""
    torch.manual_seed(0)
    start = torch.randn(6, 4)
    source = torch.randint(-3, 4, (6, 4)).float()
    convert = FORMS[form]
    plain = convert(source).detach()
    plain = (plain if plain.layout == torch.strided else plain.to_dense()).resolve_neg()
    plain = (torch.zeros(6, 4) + plain).contiguous()
    opt, w = stepped(
        lambda: nn.Parameter(start.clone()), lambda w: convert(source), global_clipnorm=clip
    )
    other, want = stepped(
        lambda: nn.Parameter(start.clone()), lambda w: plain, global_clipnorm=clip
    )
    if clip is None or place == "device":  # in another order of memory a sum of squares is another
        assert_same(w, want)
    torch.testing.assert_close(w, want, rtol=1e-6, atol=0)
    for one, two in zip(opt.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_a_misaligned_gradient() -> None:
    source = torch.randn(50)
    g = misaligned(source)
    assert g.data_ptr() % 4 and torch.equal(g, source)
    _, w = stepped(lambda: torch.zeros(50), lambda w: g)
    _, want = stepped(lambda: torch.zeros(50), lambda w: source)
    assert_same(w, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gradient_of_another_float_type(dtype: Any, of: Any, place: str) -> None:
    start, g = torch.randn(300).to(dtype), torch.randn(300).to(of)
    _, w = stepped(start.clone, lambda w: g)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = start.to(wide)
    opt = Adam(0.1)
    for _ in range(3):  # from what each store left
        opt.apply([g.to(wide)], [want])
        want.copy_(want.to(dtype).to(wide))
    assert_same(w, want.to(dtype))


def coo(indices: Any, values: Any, shape: tuple[int, ...]) -> Tensor:
    indices, values = torch.as_tensor(indices), torch.as_tensor(values)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


@pytest.mark.parametrize("name", ["defaults", "global_clipnorm", "gradient_accumulation_steps"])
def test_missing_and_sparse_gradients(name: str, place: str) -> None:
    shapes = ((7,), (40, 5), (6, 2, 3))
    values = variables(shapes=shapes)
    params = parameters(values)
    opt, reference = build(CASES[name], params), CASES[name].reference(values)
    for step in range(STEPS):
        sparse: list[Any] = [sparse_gradient(step, s) for s in shapes]
        given: list[Any] = with_missing(step, sparse)
        ours = [
            None if g is None else coo(g[0][None], g[1], shape)
            for g, shape in zip(given, shapes, strict=True)
        ]
        missing = any(g is None for g in given)
        with pytest.warns(UserWarning, match="'w") if missing else nullcontext():
            opt.apply(ours, params)
        reference.step(given)
    check(opt, params, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
def test_sparse_equals_dense_to_the_bit(dtype: Any, sparse_dim: int, place: str) -> None:
    torch.manual_seed(0)
    shape = (50, 3, 4)
    start = torch.randn(shape).to(dtype)
    indices = torch.stack([torch.randint(0, n, (200,)) for n in shape[:sparse_dim]])
    sparse = coo(indices, torch.randn(200, *shape[sparse_dim:]).to(dtype), shape)
    assert not sparse.is_coalesced()
    _, w = stepped(start.clone, lambda w: sparse)
    _, want = stepped(start.clone, lambda w: sparse.float().to_dense())
    assert_same(w, want)


def test_an_embedding() -> None:
    """`nn.Embedding(sparse=True)` by its own gradients; rows that were not looked up move, too."""
    torch.manual_seed(0)
    ids = torch.tensor([[1, 1, 4], [2, 4, 1]])
    tables = [nn.Embedding(6, 3, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    opts = [Adam(0.1, weight_decay=0.1) for _ in tables]
    for _ in range(4):
        for table, opt in zip(tables, opts, strict=True):
            table.zero_grad()
            (table(ids) ** 2).sum().backward()
            assert table.weight.grad.is_sparse == table.sparse
            opt.apply([table.weight.grad], [table.weight])
        ids = ids % 5
    assert_same(tables[0].weight, tables[1].weight)


def test_a_gradient_that_is_the_variable_or_a_slot(place: str) -> None:
    for step in range(2):
        start = torch.randn(2_000)
        w, v = start.clone(), start.clone()
        ours, theirs = Adam(0.1), Adam(0.1)
        for _ in range(step):
            ours.apply([w.clone()], [w])
            theirs.apply([v.clone()], [v])
        ours.apply([w], [w])
        theirs.apply([v.clone()], [v])
        assert_same(w, v)
        ours.apply([ours.variables[2]], [w])
        theirs.apply([theirs.variables[2].clone()], [v])
        assert_same(w, v)
        part, whole = w[:1_000], Adam(0.1)
        whole.apply([w[500:1_500]], [part])
        Adam(0.1).apply([v[500:1_500].clone()], [v[:1_000]])
        assert_same(w, v)


def test_grad_is_a_new_tensor_each_step() -> None:
    """As `zero_grad(set_to_none=True)` makes it, the default; or the same one, zeroed."""
    torch.manual_seed(0)
    start, x = nn.Linear(5, 3), torch.randn(9, 5)
    models = [copy.deepcopy(start) for _ in range(2)]
    for model, to_none in zip(models, (True, False), strict=True):
        opt = Adam(0.1)
        for _ in range(5):
            kept = [torch.empty(3, 5), torch.empty(3)] if to_none else []
            model.zero_grad(set_to_none=to_none)
            model(x).square().mean().backward()
            opt.apply([p.grad for p in model.parameters()], model.parameters())
            del kept
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same(one, other)


# --- Variables -----------------------------------------------------------------------------------


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": strided,
    "a part": lambda x: torch.cat([x, x])[2:5].copy_(x),
    "inference": inferred,
}


@pytest.mark.parametrize("name", ["defaults", EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_gradient", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize("of_variable", LAYOUTS)
def test_layouts(of_variable: str, of_gradient: str, dtype: Any, name: str, place: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 4, 5, 6).to(dtype)
    w, plain = LAYOUTS[of_variable](start), start.clone()
    strides = w.stride()
    ours, theirs = (Adam(**CASES[name].settings_for(schedules)) for _ in range(2))
    for _ in range(5):
        g = torch.randn(3, 4, 5, 6).to(dtype)
        ours.apply([LAYOUTS[of_gradient](g)], [w])
        theirs.apply([g], [plain])
    torch.testing.assert_close(w, plain, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    if name == "defaults":  # no sum whose order depends on that of memory
        assert_same(w, plain)
    assert w.stride() == strides and not torch.equal(w, start)


def test_views_of_one_tensor() -> None:
    """Together they are the tensor; what lies between them is not touched."""
    torch.manual_seed(0)
    base, g = torch.randn(10, 6), torch.randn(10, 6)
    whole = base.clone()
    parts = [base[:, :2], base[:, 2:3], base[7:, 4:]]
    opt, other = Adam(0.1), Adam(0.1)
    for _ in range(3):
        opt.apply([g[:, :2], g[:, 2:3], g[7:, 4:]], parts)
        other.apply([g], [whole])
    assert_same(base[:, :3], whole[:, :3])
    assert_same(base[7:, 4:], whole[7:, 4:])
    torch.manual_seed(0)
    untouched = torch.randn(10, 6)
    assert_same(base[:7, 3:], untouched[:7, 3:])
    assert_same(base[:, 3], untouched[:, 3])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1, 1, 1, 1, 1, 1, 1, 1, 1)])
def test_shapes(shape: tuple[int, ...], place: str) -> None:
    w = nn.Parameter(torch.ones(shape))
    opt = Adam(0.1, global_clipnorm=1e9, use_ema=True)
    for _ in range(3):
        opt.apply([torch.full(shape, 2.0)], [w])
    assert_same(w, torch.full(shape, 1.0 - 0.3, dtype=torch.float32) if 0 in shape else w)
    assert w.shape == shape and torch.allclose(w, torch.tensor(0.7))


def quietly(make: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta, or deprecated
        return make()


def freed(size: int = 0) -> Tensor:
    x = torch.randn(3)
    x.untyped_storage().resize_(size)
    return x


def quantized() -> Tensor:
    return quietly(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))


def nested(layout: Any = torch.strided) -> Tensor:
    parts = [torch.ones(2), torch.ones(3)]
    return quietly(lambda: torch.nested.nested_tensor(parts, layout=layout))


UNTRAINABLE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "module": (lambda: nn.Linear(2, 2), TypeError, r"torch.Tensor.*module.parameters\(\)"),
    "integers": (
        lambda: torch.ones(3, dtype=torch.int64),
        TypeError,
        r"'w' of shape \(3,\) and dtype torch.int64.*float32",
    ),
    "booleans": (lambda: torch.ones(3).bool(), TypeError, "torch.bool must be float16"),
    "complex": (lambda: torch.ones(3).cfloat(), TypeError, "view_as_real"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e5m2), TypeError, "e5m2 must be float16"),
    "quantized": (quantized, TypeError, "qint8 must be float16"),
    "lazy": (lambda: nn.LazyLinear(3).weight, ValueError, "lazy module. Run the module once"),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, "layout torch.sparse_coo"),
    "CSR": (lambda: quietly(torch.eye(3).to_sparse_csr), TypeError, "layout torch.sparse_csr"),
    "nested": (nested, TypeError, "layout nested"),
    "jagged": (lambda: nested(torch.jagged), TypeError, "layout nested"),
    "MKL-DNN": (lambda: torch.ones(3, 3).to_mkldnn(), TypeError, "layout torch._mkldnn"),
    "no leaf": (lambda: torch.ones(3, requires_grad=True) * 2, ValueError, "a computation"),
    "expanded": (lambda: torch.ones(3, 1).expand(3, 3), ValueError, "share memory"),
    "overlapping": (lambda: torch.ones(9).as_strided((3, 3), (1, 1)), ValueError, "share memory"),
    "sign bit": (lambda: flipped(torch.ones(3)), ValueError, "resolve_neg"),
    "freed": (freed, ValueError, "storage was freed"),
    "shrunk": (lambda: freed(8), ValueError, "storage was freed"),
    "number": (lambda: 3.0, TypeError, "must be a variable of one of these libraries"),
}


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_what_cannot_be_trained(kind: str, place: str) -> None:
    make, error, message = UNTRAINABLE[kind]
    variable, good = make(), torch.ones(2)
    opt = Adam()
    with pytest.raises(error, match=message):
        opt.build({"good": good, "w": variable})
    assert not opt.built
    with pytest.raises(error):
        opt.apply([torch.ones(2), torch.ones(3)], [good, variable])
    assert not opt.built and (good == 1).all()


def test_variables_of_two_libraries_or_twice(place: str) -> None:
    w = torch.ones(4)
    with pytest.raises(TypeError, match="variable 0 of torch and variable 1 of numpy"):
        Adam().build([w, np.ones(3)])
    with pytest.raises(ValueError, match="same object"):
        Adam().build([w, w])
    for other in (w.detach(), w[1:], w.view(2, 2)):
        with pytest.raises(ValueError, match="must not share memory"):
            Adam().build([w, other])


NO_GRADIENT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "array": (lambda: np.ones(3, np.float32), TypeError, "must be a torch.Tensor.*numpy.ndarray"),
    "number": (lambda: 1.0, TypeError, "must be a torch.Tensor"),
    "shape": (
        lambda: torch.ones(4),
        ValueError,
        r"Received shape \(4,\) and dtype torch.float32.*shape \(3,\) and dtype float32",
    ),
    "rank": (lambda: torch.ones(3, 1), ValueError, r"Received shape \(3, 1\)"),
    "complex": (lambda: torch.ones(3).cfloat(), TypeError, "torch.complex64"),
    "booleans": (lambda: torch.ones(3).bool(), TypeError, "real numbers"),
    "quantized": (quantized, TypeError, "real numbers"),
    "another device": (lambda: torch.ones(3, device="meta"), ValueError, "device, cpu.*on meta"),
    "freed": (freed, ValueError, "storage was freed"),
    "nested": (nested, ValueError, "nested"),
    "jagged": (lambda: nested(torch.jagged), ValueError, "nested"),
}


@pytest.mark.parametrize("kind", NO_GRADIENT)
def test_what_is_no_gradient(kind: str, place: str) -> None:
    """An error names the variable, and leaves everything as it was: at the first step and later."""
    make, error, message = NO_GRADIENT[kind]
    bad = make()
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    opt = Adam()
    with pytest.raises(error, match=message):
        opt.apply([torch.ones(2), bad], params)
    assert not opt.built
    opt.build({"a": params[0], "b": params[1]})
    for _ in range(2):
        before = snapshot(opt, params)
        with pytest.raises(error, match=f"The gradient of variable 'b'.*{message}"):
            opt.apply([torch.ones(2), bad], params)
        assert_unchanged(before, opt, params)
        opt.apply([torch.ones(2), torch.ones(3)], params)


def test_a_pair_the_wrong_way_round() -> None:
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"\(gradient, variable\), in this order"):
        Adam().apply_gradients([(w, torch.ones(3))])


# --- What may happen between two steps ------------------------------------------------------------


def optimized(**settings: Any) -> tuple[Adam, list[Any], Callable[[], list[Tensor]]]:
    """An optimizer some steps on, its variables, and gradients for them: always the same."""
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))]
    opt = Adam(0.1, **settings)
    opt.build({"a": params[0], "b": params[1]})
    sources = [torch.randn(6, 4), torch.randn(5)]

    def grads() -> list[Tensor]:
        return [g.clone() for g in sources]

    for _ in range(3):
        opt.apply(grads(), params)
    return opt, params, grads


def moved(x: Tensor) -> Tensor:
    return x.detach().clone()


# What is done to the variable `a`: values stay, but are elsewhere, or lie there otherwise.
MOVES: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda p: setattr(p, "data", moved(p)),
    "data, strided": lambda p: setattr(p, "data", strided(p.detach())),
    "data, transposed": lambda p: setattr(p, "data", p.detach().t().contiguous().t()),
    "data, a part": lambda p: setattr(p, "data", torch.cat([p.detach(), p.detach()])[:6]),
    "set_": lambda p: p.detach().set_(moved(p)),
    "shared memory": lambda p: p.share_memory_(),
    "resized": lambda p: p.untyped_storage().resize_(4_000),
    "swapped": lambda p: torch.utils.swap_tensors(p, nn.Parameter(moved(p))),
    "module.to": lambda p: nn.ParameterList([p]).to(memory_format=torch.channels_last),
    "requires_grad": lambda p: p.requires_grad_(False),
}


@pytest.mark.parametrize("comparison", ["compiled", "plain"])
@pytest.mark.parametrize("name", ["defaults", "ema"])
@pytest.mark.parametrize("move", MOVES)
def test_a_variable_that_moves(
    move: str, name: str, comparison: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step follows, slots stay, and nothing is written where it lay."""
    if comparison == "plain":
        monkeypatch.setattr(fast, "_is_compiled_comparison_right", lambda: False)
    settings: dict[str, Any] = {} if name == "defaults" else {"use_ema": True}
    opt, params, grads = optimized(**settings)
    other, want, _ = optimized(**settings)
    at = params[0].data_ptr()
    old = params[0].detach()
    before, kept = old.clone(), old.untyped_storage()
    MOVES[move](params[0])
    for i in range(3):
        # Also where it is one of those without a gradient, which have only an average.
        chosen = slice(1, 2) if i == 0 and name == "ema" else slice(None)
        opt.apply(grads()[chosen], params[chosen])
        other.apply(grads()[chosen], want[chosen])
    for one, two in zip(params, want, strict=True):
        assert_same(one, two)
    for one, two in zip(opt.get_weights(), other.get_weights(), strict=True):
        assert_same(one, two)
    if params[0].data_ptr() != at and kept.data_ptr() == at:
        assert torch.equal(old, before)


def replace_slot(opt: Adam, i: int, value: Tensor) -> None:
    opt.variables[i].data = value


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("move", ["data", "transposed", "shared memory"])
def test_a_slot_that_moves(move: str, rest: bool) -> None:
    """The kernel follows it: `named_variables` are the state, not copies of it."""
    opt, params, grads = optimized(use_ema=True)
    other, want, _ = optimized(use_ema=True)
    assert list(opt.named_variables())[2:6] == [
        "a_average",
        "b_average",
        "a_momentum",
        "a_velocity",
    ]
    for slot in opt.variables[2:6]:
        if move == "shared memory":
            slot.share_memory_()
        else:
            slot.data = moved(slot) if move == "data" else slot.t().contiguous().t()
    chosen = slice(1, 2) if rest else slice(None)
    for _ in range(2):
        opt.apply(grads()[chosen], params[chosen])
        other.apply(grads()[chosen], want[chosen])
    for one, two in zip(opt.get_weights(), other.get_weights(), strict=True):
        assert_same(one, two)


BREAKS: dict[str, tuple[Callable[[Adam, list[Any]], Any], str]] = {
    "to(float64)": (
        lambda opt, ps: nn.ParameterList(ps).double(),
        "Variable 'a' must stay as it was built, of shape .6, 4. and dtype float32.*float64",
    ),
    "to(bfloat16)": (lambda opt, ps: nn.ParameterList(ps).bfloat16(), "float32.*bfloat16"),
    "to(meta)": (
        lambda opt, ps: torch.utils.swap_tensors(ps[0], nn.Parameter(ps[0].to("meta"))),
        "must stay on (the CPU|cpu), where this optimizer was built. It is now on meta",
    ),
    "another shape": (lambda opt, ps: setattr(ps[0], "data", torch.ones(3)), "It now has shape"),
    "expanded": (
        lambda opt, ps: setattr(ps[0], "data", torch.ones(1).expand(6, 4)),
        "share memory",
    ),
    "freed": (lambda opt, ps: ps[0].untyped_storage().resize_(0), "storage was freed"),
    "shrunk": (lambda opt, ps: ps[0].untyped_storage().resize_(8), "storage was freed"),
    "of another variable": (
        lambda opt, ps: setattr(ps[1], "data", ps[0].data.view(-1)[2:7]),
        "must not share memory.*'a'.*'b'",
    ),
    "its own average": (
        lambda opt, ps: setattr(ps[0], "data", opt.named_variables()["a_average"].data),
        "nor with the optimizer's state",
    ),
    "slot of another shape": (lambda opt, ps: replace_slot(opt, 4, torch.ones(2)), "state for"),
    "slot freed": (
        lambda opt, ps: opt.variables[4].untyped_storage().resize_(0),
        "state for variable 'a' has no memory any more",
    ),
    "slot of another dtype": (
        lambda opt, ps: replace_slot(opt, 4, torch.ones(6, 4).double()),
        "state for variable 'a' must stay.*float32. It now has",
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_variable_that_cannot_be_followed(how: str) -> None:
    opt, params, grads = optimized(use_ema=True)
    damage, message = BREAKS[how]
    damage(opt, params)
    whole = [p for p in params if not p.is_meta and p.untyped_storage().nbytes() >= 20]
    before = snapshot(opt, whole) if how != "slot freed" else []
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opt.apply(grads(), params)
        if how != "slot freed":
            assert_unchanged(before, opt, whole)


@pytest.mark.parametrize("how", ["to(float64)", "to(meta)", "another shape"])
def test_a_variable_that_cannot_be_followed_elsewhere(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("device", monkeypatch)
    test_a_variable_that_cannot_be_followed(how)


# Gradients for a later step, where a glance might take them for those of the first.
HOSTILE: dict[str, Callable[[Tensor, Adam, Tensor], Tensor]] = {
    "alike": lambda g, opt, w: g.clone(),
    "the variable": lambda g, opt, w: w.detach(),
    "a slot": lambda g, opt, w: opt.variables[2],
    "a slot's alias": lambda g, opt, w: opt.variables[3].view(2, 8),
    "float64": lambda g, opt, w: g.double(),
    "float16": lambda g, opt, w: g.half(),
    "transposed": lambda g, opt, w: g.t().contiguous().t(),
    "strided": lambda g, opt, w: strided(g),
    "expanded": lambda g, opt, w: expanded(g),
    "sign bit": lambda g, opt, w: flipped(g),
    "create_graph": lambda g, opt, w: differentiable(g),
    "inference": lambda g, opt, w: inferred(g),
    "parameter": lambda g, opt, w: nn.Parameter(g.clone()),
    "COO": lambda g, opt, w: g.to_sparse(),
    "zeros": lambda g, opt, w: torch._efficientzerotensor(2, 8),
    "misaligned": lambda g, opt, w: misaligned(g),
}


@pytest.mark.parametrize("comparison", ["compiled", "plain"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_gradient_unlike_the_last_one(
    kind: str, comparison: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comparison == "plain":
        monkeypatch.setattr(fast, "_is_compiled_comparison_right", lambda: False)
    torch.manual_seed(0)
    start, g = torch.randn(2, 8), torch.randn(2, 8)
    ws = [nn.Parameter(start.clone()) for _ in range(2)]
    opts = [Adam(0.1), Adam(0.1)]
    for opt, w in zip(opts, ws, strict=True):
        for _ in range(2):
            opt.apply([g.clone()], [w])
    given = HOSTILE[kind](g, opts[0], ws[0])
    dense = given.detach().clone()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    dense = (torch.zeros(2, 8) + dense.resolve_neg()).contiguous()
    for _ in range(2):
        opts[0].apply([given], [ws[0]])
        opts[1].apply([dense.clone()], [ws[1]])
        if kind in ("the variable", "a slot", "a slot's alias"):
            break
    assert_same(*ws)
    for one, two in zip(opts[0].get_weights(), opts[1].get_weights(), strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("shift", [3, -3])
def test_a_gradient_that_overlaps_its_variable_is_its_copy(shift: int) -> None:
    """Alike in all but where it lies: what the step writes first is not what it reads then."""
    size = 20_000
    memory = torch.linspace(-1, 1, size + 6)
    ws = [memory[3:-3], memory[3:-3].clone()]
    gs = [memory[3 + shift : size + 3 + shift], None]
    opts = [Adam(0.1), Adam(0.1)]
    for opt, w in zip(opts, ws, strict=True):
        for _ in range(2):
            opt.apply([torch.ones(size)], [w])
    gs[1] = gs[0].clone()
    for opt, g, w in zip(opts, gs, ws, strict=True):
        opt.apply([g], [w])
    assert_same(*ws)


def test_the_comparison_that_is_compiled_is_right() -> None:
    """This version of torch has it; both tell every kind apart, and the test of that can fail."""
    assert fast._is_compiled_comparison_right()
    assert fast._tells_apart(fast._compiled_comparison)
    assert fast._tells_apart(fast._plain_comparison)
    assert not fast._tells_apart(lambda tensors: lambda *given: True)
    assert not fast._tells_apart(lambda tensors: lambda *given: False)


def recognises(opt: Adam, grads: list[Tensor], params: list[Tensor]) -> bool:
    """Whether a glance is enough for this step."""
    assert opt._state.backend is not None and opt._recent is not None
    return opt._state.backend.recognise(opt._recent, grads, params) is not None


@pytest.mark.parametrize("missing", [AttributeError, TypeError])
def test_a_torch_without_that_comparison(
    missing: type[Exception], slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(tensors: Any) -> Any:
        raise missing

    monkeypatch.setattr(fast, "_compiled_comparison", compare)
    fast._is_compiled_comparison_right.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="lacks .*TensorGuards"):
            assert not fast._is_compiled_comparison_right()
        opt, params, grads = optimized()
        assert recognises(opt, grads(), params)
    finally:
        fast._is_compiled_comparison_right.cache_clear()


@pytest.mark.parametrize("name", ["trace_rules.add", "anybody observes a step", "GOMP_parallel"])
def test_a_torch_without_other_private_names(
    name: str, slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow way is taken, and that is said."""
    with pytest.warns(RuntimeWarning, match=f"lacks .*{name}"):
        if name == "trace_rules.add":
            monkeypatch.setitem(sys.modules, "torch._dynamo", SimpleNamespace())
            fast._hide_from_compiler.__wrapped__()
        elif name == "GOMP_parallel":
            monkeypatch.setattr(openmp, "ctypes", SimpleNamespace(CDLL=lambda name: object()))
            assert openmp._runtime() is None
        else:
            assert fast.is_observed(SimpleNamespace())


def test_info_tells_the_devices() -> None:
    assert omniadam.info()["devices"]["torch"][0] == "cpu"


def test_a_step_like_the_last_is_recognised() -> None:
    """Else every step would be checked at length; and what lies elsewhere is no less alike."""
    opt, params, grads = optimized(use_ema=True)
    for _ in range(300):  # more addresses than are remembered
        assert recognises(opt, grads(), params)
    assert not recognises(opt, grads(), params[::-1])
    assert not recognises(opt, grads()[:1], params[:1])
    for p in params:
        p.requires_grad_(False)
    opt.apply(grads(), params)
    assert recognises(opt, grads(), params)
    with torch.inference_mode():
        opt.apply([g.clone() for g in grads()], params)
        assert recognises(opt, grads(), params)


# --- Autograd -------------------------------------------------------------------------------------


def versions(tensors: list[Any]) -> list[int]:
    return [t._version for t in tensors]


def test_a_stale_graph_is_an_error(place: str) -> None:
    """What the graph saved was written to by the step, as by any operation in place."""
    w = nn.Parameter(torch.ones(3))
    opt = Adam(0.1)
    for _ in range(3):  # the first step, and those that are recognised
        loss = (w**2).sum()
        opt.apply([torch.ones(3)], [w])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        (w**2).sum().backward()


def test_a_stale_graph_over_state_is_an_error() -> None:
    """An average as a teacher, say: it is a tensor like any other."""
    opt, params, grads = optimized(use_ema=True)
    average = opt.named_variables()["a_average"]
    loss = (params[0] * average).sum()
    opt.apply(grads()[1:], params[1:])  # only the average of `a` moves
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_versions_count_what_was_written() -> None:
    params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(5))]
    opt = Adam(gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=3)
    opt.build({"a": params[0], "b": params[1]})
    grads = [torch.ones(6, 4), torch.ones(5)]
    state = opt.named_variables()
    slots = [v for name, v in state.items() if "momentum" in name or "velocity" in name]
    averages = [v for name, v in state.items() if "average" in name]
    accumulators = [v for name, v in state.items() if "accumulator" in name]

    def grew(action: Callable[[], Any]) -> list[list[bool]]:
        groups = [params, slots, averages, accumulators]
        before = list(map(versions, groups))
        action()
        after = list(map(versions, groups))
        return [
            [a > b for a, b in zip(x, y, strict=True)] for x, y in zip(after, before, strict=True)
        ]

    both, none, last = [True, True], [False, False], [False, True]
    b_only = [False, False, True, True]

    def with_all() -> None:
        opt.apply(grads, params)

    def without_a() -> None:
        opt.apply(grads[1:], params[1:])

    assert grew(with_all) == [none, none * 2, both, both]  # a micro-step
    assert grew(with_all) == [both, both * 2, both, both]
    assert grew(without_a) == [none, none * 2, both, last]
    assert grew(without_a) == [last, b_only, both, both]  # the accumulator of `a` is cleared
    # Before the third update each call overwrites variables by averages, a micro-step, too.
    assert grew(without_a) == [both, none * 2, both, last]
    assert grew(without_a) == [both, b_only, both, both]
    assert grew(without_a) == [none, none * 2, both, last]


def test_hooks_and_graphs_stay() -> None:
    """A step changes numbers; everything else about a parameter is as before."""
    model = nn.Linear(3, 2)
    seen: list[str] = []
    handles = [
        model.weight.register_hook(lambda g: seen.append("hook")),
        model.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated")),
    ]
    opt = Adam(0.1)
    for _ in range(3):
        seen.clear()
        model(torch.ones(1, 3)).sum().backward()
        assert seen == ["hook", "accumulated"]
        weight, bias = model.parameters()
        grad = weight.grad
        opt.apply([weight.grad, bias.grad], [weight, bias])
        assert weight.grad is grad and weight.is_leaf and weight.requires_grad
        assert weight.grad_fn is None and next(model.parameters()) is weight
    for handle in handles:
        handle.remove()


def test_a_step_in_a_hook_of_the_backward_pass() -> None:
    """One optimizer a parameter, so that no gradient outlives its step."""
    torch.manual_seed(0)
    start, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(8, 4)
    models = [copy.deepcopy(start) for _ in range(2)]
    opts = {p: Adam(0.1) for p in models[0].parameters()}

    def step(p: Tensor) -> None:
        opts[p].apply([p.grad], [p])
        p.grad = None

    for p in models[0].parameters():
        p.register_post_accumulate_grad_hook(step)
    together = Adam(0.1)
    for _ in range(4):
        models[0](x).square().sum().backward()
        models[1].zero_grad()
        models[1](x).square().sum().backward()
        together.apply([p.grad for p in models[1].parameters()], models[1].parameters())
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("name", ["defaults", EVERYTHING])
def test_tensors_without_values(name: str) -> None:
    """On the meta device and in a FakeTensorMode all is there but the numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def trained(device: str) -> list[Any]:
        w = torch.ones(3, 2, device=device)
        opt = Adam(**CASES[name].settings_for(schedules))
        for _ in range(6):
            opt.apply([torch.ones_like(w)], [w])
        return [opt.iterations, *((tuple(v.shape), v.dtype) for v in opt.variables)]

    found = [trained("cpu"), trained("meta")]
    with FakeTensorMode():
        found.append(trained("cpu"))
    assert found[0] == found[1] == found[2]


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "inference_mode off": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
    "deterministic": lambda: torch.random.fork_rng([]),
    "default float64": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
}


class default_dtype:
    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("built_inside", [False, True])
@pytest.mark.parametrize("name", ["defaults", EVERYTHING])
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts(context: str, name: str, built_inside: bool, place: str) -> None:
    """The same step in all of them, and slots that are ordinary tensors."""
    torch.manual_seed(0)
    start, g = torch.randn(30), torch.randn(30)
    settings = CASES[name].settings_for(schedules)
    w, want = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt, other = Adam(**settings), Adam(**settings)
    if not built_inside:
        opt.build([w])
    for i in range(6):
        with CONTEXTS[context]() if i % 3 else nullcontext():
            opt.apply([g], [w])
            if i == 2:
                opt.set_weights(opt.get_weights())
                opt.assign(w, w)
        other.apply([g], [want])
    assert_same(w, want)
    for value in opt.variables:
        assert not value.is_inference() and not value.requires_grad
        assert value.device.type == "cpu" and value.dtype in (
            torch.float32,
            torch.float64,
            torch.int64,
        )


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # by jvp itself
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_an_error(transform: str, place: str) -> None:
    """What a transformation gives has no memory of its own to be updated in place."""
    w, good = torch.ones(3), torch.ones(3)
    opt = Adam()
    opt.apply([good], [w])
    before = snapshot(opt, [w])

    def of_gradient(x: Tensor) -> Tensor:
        opt.apply([x], [w])
        return x.sum()

    def of_variable(x: Tensor) -> Tensor:
        Adam().apply([good], [x])
        return x.sum()

    for f in (of_gradient, of_variable):
        with pytest.raises(ValueError, match=r"transformation of torch.func"):
            TRANSFORMS[transform](f, torch.ones(3))
    assert_unchanged(before, opt, [w])
    opt.apply([good], [w])


def test_a_transform_around_a_step() -> None:
    """Ordinary tensors in a function that is being transformed: refused before anything is done."""
    w, g = torch.ones(3), torch.ones(3)
    opt = Adam()
    opt.apply([g], [w])
    before = snapshot(opt, [w])

    def f(x: Tensor) -> Tensor:
        opt.apply([g], [w])
        return x.sum()

    with pytest.raises(ValueError, match=r"transformation of torch.func"):
        torch.func.grad(f)(torch.ones(3))
    assert_unchanged(before, opt, [w])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_training_step() -> None:
    """It leaves a step to us, whether or not it was imported when the optimizer was built."""
    code = """
import sys
import torch
from omniadam import Adam
def train(compiled):
    w, opt = torch.nn.Parameter(torch.ones(3)), Adam(0.1)
    if compiled == "built before":
        opt.build([w])
    def step(x):
        ((w - x) ** 2).sum().backward()
        opt.apply([w.grad], [w])
        w.grad = None
    if compiled:
        step = torch.compile(step, backend="eager")
    for i in range(6):
        step(torch.full((3,), float(i)))
    return w.detach(), opt.iterations
want, n = train(None)
assert "torch._dynamo" not in sys.modules
for compiled in ("built before", "built inside"):
    got, m = train(compiled)
    assert n == m == 6 and torch.equal(got, want), (compiled, got, want)
"""
    run_script(code, "-W", "ignore")


def run_script(code: str, *options: str, **environment: str) -> str:
    source = str(Path(omniadam.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=os.environ | {"PYTHONPATH": source} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- A rule of one's own --------------------------------------------------------------------------


class Momentum(Optimizer):
    """As written for Keras, on whatever library the variables are of."""

    def build(self, variables: Any) -> None:
        if not self.built:
            super().build(variables)
            self.moments = self.add_optimizer_variables(list(variables), "moment")
            self.count = self.add_variable((2,), name="count")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.seen = gradient
        m = self.moments[self._get_variable_index(variable)]
        self.assign(m, 0.9 * m + gradient)
        self.assign_sub(variable, learning_rate * m)
        self.assign_add(self.count, 1.0)


class InPlace(Optimizer):
    """As written for PyTorch."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        variable.sub_(gradient, alpha=learning_rate)


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "weight_decay": 0.1,
        "global_clipnorm": 1.0,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "loss_scale_factor": 2.0,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_rule_of_ones_own(dtype: str, settings: dict[str, Any], place: str) -> None:
    """It is given tensors, of float32 for half precision; the numbers are those on NumPy."""
    values = variables(dtype, shapes=((7,), (3, 5), ()))
    params, arrays = parameters(values), [v.copy() for v in values]
    ours, numpys = Momentum(0.1, **settings), Momentum(0.1, **settings)
    for step in range(6):
        grads = gradients(step, [v.shape for v in values], dtype=dtype)
        ours.apply(list(map(tensor, grads)), params)
        numpys.apply(grads, arrays)
    assert ours.seen.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert isinstance(ours.seen, Tensor) and not ours.seen.requires_grad
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3}[dtype]
    for one, other in zip(params, arrays, strict=True):
        np.testing.assert_allclose(array(one), other, tolerance, tolerance)
    for one, other in zip(ours.get_weights(), numpys.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, tolerance, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rule_that_works_in_place(dtype: Any, place: str) -> None:
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    loss = (w**2).sum()
    rows = coo([[0, 0, 2]], torch.tensor([1.0, 2.0, 4.0]).to(dtype), (3,))
    InPlace(0.5).apply([rows], [w])
    assert w.tolist() == [-0.5, 1.0, -1.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_update_step_of_adam(place: str) -> None:
    """On its own, as Keras allows; however often, nothing is kept for it."""
    start = torch.randn(5, 4)
    w, want = nn.Parameter(start.clone()), start.clone()
    opt, other = Adam(), Adam()
    opt.build([w])
    prepared = []
    for _ in range(4):
        loss = (w**2).sum()
        opt.update_step(torch.ones(5, 4), w, 0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        other.build([want])
        other.update_step(torch.ones(5, 4), want, 0.1)
        prepared.append([len(s.prepared.plans) for s in opt._selections.values() if s.prepared])
    assert_same(w, want)
    assert opt.iterations == 0 and prepared[1:] == prepared[:-1]


def test_state_of_ones_own_lies_with_the_variables(place: str) -> None:
    w = torch.ones(3)
    opt = Adam()
    opt.build([w])
    table, count = opt.add_variable((2, 3), "ones"), opt.add_variable((), dtype="int64")
    opt.assign_add(table, 2.0)
    opt.assign_add(count, 1)
    opt.assign(w, np.array([1, 2, 3], np.float32))
    opt.assign_sub(w, torch.ones(3))
    assert table.device == w.device and (table == 3).all() and int(count) == 1
    assert w.tolist() == [0, 1, 2]
    frozen = np.ones(3)
    frozen.flags.writeable = False
    opt.assign(w, frozen)
    assert w.tolist() == [1, 1, 1]


# --- State ----------------------------------------------------------------------------------------


def network(dtype: Any = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def train(model: nn.Module, opt: Any, steps: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        model.zero_grad()
        x = torch.randn(16, 5, dtype=next(model.parameters()).dtype)
        model(x).square().mean().backward()
        opt.apply([p.grad for p in model.parameters()], model.parameters())


def settings_of_a_run() -> dict[str, Any]:
    return {"learning_rate": schedules.CosineDecay(0.1, 20), "use_ema": True, "amsgrad": True}


CARRIERS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_copy_of_model_and_optimizer_goes_on(carrier: str, place: str) -> None:
    model = network()
    opt = AdamW(0.1, weight_decay=0.1, use_ema=True)
    opt.exclude_from_weight_decay(var_list=[model[0].bias])
    opt.build(dict(model.named_parameters()))
    train(model, opt, 5)
    other_model, other = CARRIERS[carrier]((model, opt))
    train(model, opt, 5, seed=1)
    train(other_model, other, 5, seed=1)
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert_same(one, two)
    assert list(opt.named_variables()) == list(other.named_variables())
    assert "0.weight_momentum" in opt.named_variables()
    for one, two in zip(opt.get_weights(), other.get_weights(), strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("what", ["get_weights", "variables"])
def test_saved_by_torch(what: str, tmp_path: Path, place: str) -> None:
    model, other_model = network(), network()
    opt, other = Adam(**settings_of_a_run()), Adam(**settings_of_a_run())
    train(model, opt, 5)
    state = opt.get_weights() if what == "get_weights" else opt.variables
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=what == "variables")
    other_model.load_state_dict(saved["model"])
    other.build(list(other_model.parameters()))
    other.set_weights(saved["optimizer"])
    train(model, opt, 5, seed=1)
    train(other_model, other, 5, seed=1)
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert_same(one, two)


def test_state_moves_between_libraries(place: str) -> None:
    """NumPy, torch, NumPy: a run that changes library twice is the run that never does."""
    values = variables()
    case = CASES[EVERYTHING]
    want, numpys = [v.copy() for v in values], [v.copy() for v in values]
    never, first = build(case, want), build(case, numpys)
    for step in range(12):
        never.apply(cached_gradients(step), want)
    for step in range(4):
        first.apply(cached_gradients(step), numpys)
    params = parameters(numpys)
    second = build(case, params)
    second.set_weights(first.get_weights())
    for step in range(4, 8):
        second.apply(list(map(tensor, cached_gradients(step))), params)
    arrays = list(map(array, params))
    third = build(case, arrays)
    third.set_weights(second.variables)
    for step in range(8, 12):
        third.apply(cached_gradients(step), arrays)
    for one, other in zip(arrays, want, strict=True):
        if place == "memory":
            assert_same(one, other)
        np.testing.assert_allclose(one, other, 1e-5, 1e-6)
    assert third.iterations == never.iterations


def test_get_weights_are_copies_and_set_weights_checks(place: str) -> None:
    opt, params, _ = optimized()
    weights = opt.get_weights()
    assert all(isinstance(w, np.ndarray) for w in weights)
    before = snapshot(opt, params)
    weights[2][...] = 7
    assert_unchanged(before, opt, params)
    for wrong in (weights[:-1], [*weights[:-1], np.ones(9)], [np.array(0.5), *weights[1:]]):
        with pytest.raises(ValueError, match=r"set_weights|State variable"):
            opt.set_weights(wrong)
    assert_unchanged(before, opt, params)
    assert [v.dtype for v in opt.variables[:2]] == [torch.int64, torch.float64]
    opt.variables[1].fill_(0.5)  # they are the state
    assert opt.learning_rate == 0.5


def test_names_of_parameters_exclude_from_decay(place: str) -> None:
    model = network()
    opt = AdamW(0.1, weight_decay=0.5)
    opt.exclude_from_weight_decay(var_names=["bias", r"^1\."])
    opt.build(dict(model.named_parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.apply([torch.zeros_like(p) for p in model.parameters()])
    for name, p in model.named_parameters():
        decays = name in ("0.weight", "3.weight")
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays else 1.0))


def test_finalize_and_learning_rates(place: str) -> None:
    """A rate may be a tensor or return one; averages become the weights in the end."""
    for rate in (
        torch.tensor(0.1),
        torch.tensor([0.1]),
        lambda: torch.tensor(0.1),
        np.float32(0.1),
    ):
        w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        opt = Adam(rate, use_ema=True, ema_momentum=0.5, epsilon=0.0)
        for _ in range(2):
            opt.apply([torch.ones(3, dtype=torch.float64)], [w])
        torch.testing.assert_close(w.detach(), torch.full_like(w, 0.8), rtol=1e-6, atol=0)
        opt.finalize_variable_values([w])
        torch.testing.assert_close(w.detach(), torch.full_like(w, 0.85), rtol=1e-6, atol=0)
    opt = Adam(lambda: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="learning_rate"):
        opt.apply([torch.ones(3)], [torch.ones(3)])
    opt = Adam(torch.tensor(0.1))
    opt.build([torch.ones(3)])
    opt.learning_rate = torch.tensor(0.2)
    assert opt.learning_rate == pytest.approx(0.2)


@pytest.mark.needs("keras")
def test_a_schedule_of_keras(place: str) -> None:
    import keras

    ends = []
    for module in (schedules, keras.optimizers.schedules):
        w = torch.ones(3)
        opt = Adam(module.CosineDecay(0.1, 4, warmup_target=0.3, warmup_steps=2))
        for _ in range(6):
            opt.apply([torch.ones(3)], [w])
        ends.append(w)
    assert ends[0][0] < 0.5
    torch.testing.assert_close(*ends)


SCHEDULES = [
    schedules.ExponentialDecay(0.1, 7, 0.5, staircase=True),
    schedules.PiecewiseConstantDecay([3, 8], [1.0, 0.5, 0.1]),
    schedules.PolynomialDecay(0.1, 7, 0.01, power=2.0, cycle=True),
    schedules.InverseTimeDecay(0.1, 7, 0.5),
    schedules.CosineDecay(0.1, 9, warmup_target=0.3, warmup_steps=4),
    schedules.CosineDecayRestarts(0.1, 3),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_schedule_of_a_tensor(schedule: Any, dtype: Any) -> None:
    for step in range(20):
        got = schedule(torch.tensor(step, dtype=dtype))
        assert float(got) == pytest.approx(schedule(step), rel=1e-5)


# --- A step as a function -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["defaults", EVERYTHING])
def test_stateless_apply(name: str, place: str) -> None:
    values = variables(shapes=SMALL_SHAPES)
    params = parameters(values)
    opt, reference = build(CASES[name], params), CASES[name].reference(values)
    untouched = snapshot(opt, params)
    weights: list[Any] = [p.detach() for p in params]
    state: list[Any] = opt.variables
    for step in range(8):
        grads = gradients(step, SMALL_SHAPES)
        kept = list(map(array, [*weights, *state]))
        old = [*weights, *state]
        weights, state = opt.stateless_apply(state, list(map(tensor, grads)), weights)
        for one, other in zip(old, kept, strict=True):
            assert_same(one, other)
        assert all(type(w) is Tensor and not w.requires_grad for w in weights)
        reference.step(grads)
    assert_close(list(map(array, weights)), reference)
    assert_unchanged(untouched, opt, params)
    assert int(state[0]) == 8 and opt.iterations == 0
    model = nn.Linear(2, 1)
    opt = Adam(0.1)
    opt.build(list(model.parameters()))
    new, _ = opt.stateless_apply(
        opt.get_weights(), [torch.ones(1, 2), torch.ones(1)], list(model.parameters())
    )
    called = torch.func.functional_call(
        model, dict(zip(["weight", "bias"], new, strict=True)), torch.ones(1, 2)
    )
    assert called.shape == (1, 1)
    with pytest.raises(ValueError, match="`trainable_variables` must have one value"):
        opt.stateless_apply(opt.variables, [torch.ones(1, 2)], new[:1])
    with pytest.raises(ValueError, match="must have the variable's shape"):
        opt.stateless_apply(opt.variables, [torch.ones(3), torch.ones(1)], new)


# --- Differentiation ------------------------------------------------------------------------------


POINTS, VALUES = torch.arange(6.0).view(3, 2), torch.arange(3.0)


def regression(form: str, w: Tensor, b: Tensor) -> Any:
    def loss(w: Tensor, b: Tensor) -> Tensor:
        return (POINTS @ w + b - VALUES).square().mean()

    if form == "closure":
        return lambda: loss(w, b)
    if form == "arguments":
        return loss
    if form == "any arguments":
        return lambda *weights: loss(*weights)
    return loss(w, b)


@pytest.mark.parametrize("form", ["closure", "arguments", "any arguments", "tensor"])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_minimize(form: str, scale: float | None, place: str) -> None:
    w, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(()))
    v, c = (p.detach().clone().requires_grad_() for p in (w, b))
    opt, other = Adam(0.1, loss_scale_factor=scale), Adam(0.1)
    for step in range(5):
        context = torch.no_grad() if form != "tensor" and step % 2 else nullcontext()
        with context:
            assert opt.minimize(regression(form, w, b), [w, b]) == step + 1
        assert w.grad is None and w.requires_grad
        grads = torch.autograd.grad(regression("tensor", v, c), [v, c])
        other.apply(grads, [v, c])
    assert_same(w, v)
    assert_same(b, c)
    got = opt.get_gradients(regression(form, w, b), [w, b])
    want = torch.autograd.grad(regression("tensor", v, c), [v, c])
    for one, two in zip(got, want, strict=True):
        assert_same(one, two)
    if form != "tensor":
        with torch.inference_mode():
            opt.minimize(regression(form, w, b), lambda: [w, b])
        opt.minimize(regression(form, w, b), [w, b])


def test_minimize_takes_variables_that_record_nothing(place: str) -> None:
    """With one argument a variable nothing need require gradients, as on NumPy and JAX."""
    w, frozen, inference = torch.ones(2), nn.Parameter(torch.ones(2)), inferred(torch.ones(2))
    frozen.requires_grad_(False)
    variables = [w, frozen, inference]
    opt = Adam(0.1)
    for _ in range(2):
        opt.minimize(lambda a, b, c: (a * b * c).sum(), variables)
    assert all(torch.allclose(v, torch.tensor(0.8), atol=2e-3) for v in variables)
    assert not any(v.requires_grad or v.grad_fn for v in variables)
    with pytest.raises(ValueError, match=r"Variables \[0, 1, 2\] of 3 do not require gradients"):
        opt.minimize(lambda: (w * frozen).sum(), variables)


def test_minimize_with_grad_loss_and_unused_variables(place: str) -> None:
    w, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    opt = Adam(0.1)
    opt.build({"w": w, "unused": unused})
    for weight in (torch.tensor([1.0, 0.0, -1.0]), [1.0, 0.0, -1.0], np.array([1.0, 0.0, -1.0])):
        with pytest.warns(UserWarning, match="'unused'"):
            opt.minimize(lambda: w * 2, [w, unused], grad_loss=weight)
    torch.testing.assert_close(w.detach(), torch.tensor([0.7, 1.0, 1.3]))
    assert_same(unused, torch.ones(2))
    assert opt.get_gradients(lambda: w.sum(), [w, unused])[1] is None
    with pytest.raises(ValueError, match="No gradients provided"):
        opt.minimize(lambda: w.sum(), [unused])


def test_minimize_frees_the_graph_as_backward_does() -> None:
    w = nn.Parameter(torch.ones(3))
    opt = Adam(0.1)
    loss = (w**2).sum()
    opt.minimize(loss, [w])
    with pytest.raises(RuntimeError, match=r"second time|inplace operation"):
        opt.minimize(loss, [w])
    kept = (w * 2).sum()
    kept.backward(retain_graph=True)
    opt.minimize(kept, [w])


LOSSES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "vector": (lambda w: w * 2, r"one real number.*shape \(3,\)"),
    "number": (lambda w: 3.0, "one real number. Received: 3.0"),
    "nothing": (lambda w: None, "one real number. Received: None"),
    "array": (lambda w: np.ones(()), "one real number. Received: numpy"),
    "complex": (lambda w: (w * 1j).sum(), "dtype torch.complex64"),
    "integer": (lambda w: w.sum().long(), "dtype torch.int64"),
    "detached": (lambda w: w.detach().sum(), "does not depend on any variable"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_is_no_loss(kind: str) -> None:
    w = nn.Parameter(torch.ones(3))
    loss, message = LOSSES[kind]
    opt = Adam()
    for form in (loss, lambda: loss(w)):
        with pytest.raises(ValueError, match=message):
            opt.minimize(form, [w])
    assert not opt.built
    with pytest.raises(ValueError, match=r"shape of the loss, \(3,\). Received shape \(2,\)"):
        opt.minimize(lambda: w * 2, [w], grad_loss=torch.ones(2))
    with pytest.raises(TypeError, match=r"must be a torch.Tensor"):
        opt.minimize(loss, [nn.Linear(2, 2)])


# --- Other devices --------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):  # type: ignore[misc]
    """Everything that torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# What makes the host wait for a device, or copies to it.
WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "to_copy")


@pytest.mark.parametrize("name", ["defaults", "clipnorm", "clipvalue", EVERYTHING])
def test_no_step_reads_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on("device", monkeypatch)
    values = variables(shapes=SMALL_SHAPES)
    params = parameters(values)
    opt = build(CASES[name], params)
    for step in range(7):
        grads = list(map(tensor, gradients(step, SMALL_SHAPES)))
        with Recorded() as recorded:
            opt.apply(grads, params)
        assert recorded.names
        assert not [n for n in recorded.names if any(w in n for w in WAITING)]
        # A number that becomes a tensor is one that is copied.
        assert not [n for n in recorded.names if "lift_fresh" in n or "scalar_tensor" in n]


# A kind of device whose name every build of torch knows; fake tensors say that they are on it.
ELSEWHERE = ("lazy:0", "lazy:1")


@pytest.fixture
def fakes() -> Any:
    """Tensors without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@pytest.mark.parametrize("name", ["defaults", "clipnorm", "amsgrad", EVERYTHING])
@pytest.mark.parametrize("devices", [ELSEWHERE[:1], ELSEWHERE])
def test_devices_that_cannot_be_read(name: str, devices: tuple[str, ...], fakes: Any) -> None:
    """On tensors that have no numbers to be read, and complain where devices are mixed."""
    with fakes:
        params = [
            nn.Parameter(torch.ones(4, 3, device=devices[i % len(devices)], dtype=dtype))
            for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64] * 2)
        ]
        opt = build(CASES[name], params)
        assert type(opt._state.backend) is backend.TorchDevice
        for step in range(7):
            chosen = params[step % 3 == 2 :]
            opt.apply([torch.ones_like(p) for p in chosen], chosen)
        assert opt._calls() == 7
        state = opt.named_variables()
        for i, p in enumerate(params):
            assert state[f"w{i}_momentum"].device == p.device
        assert opt.add_variable((3,)).device.type == "lazy"
        with pytest.raises(ValueError, match="must be on the variable's device"):
            opt.apply([torch.ones(4, 3)] * 6, params)
        opt.minimize(lambda: sum(p.float().sum().to(devices[0]) for p in params), params)


def test_one_device_and_another(fakes: Any) -> None:
    """A module that moves after the build, and variables here and there in one optimizer."""
    with fakes:
        w = nn.Parameter(torch.ones(3))
        remote = nn.Parameter(torch.ones(3, device=ELSEWHERE[0]))
        opt = Adam(clipnorm=1.0)
        opt.apply([torch.ones(3), torch.ones(3, device=ELSEWHERE[0])], [w, remote])
        remote.fake_device = torch.device(ELSEWHERE[1])  # as `remote.data = ...` does to a real one
        with pytest.raises(ValueError, match=r"must stay on lazy:0.*now on lazy:1"):
            opt.apply([torch.ones(3), torch.ones(3, device=ELSEWHERE[1])], [w, remote])
    host = nn.Parameter(torch.ones(3))
    opt = Adam()
    opt.apply([torch.ones(3)], [host])
    with fakes:
        moved = nn.Parameter(torch.ones(3, device=ELSEWHERE[0]))
    torch.utils.swap_tensors(host, moved)
    with pytest.raises(ValueError, match=r"must stay on the CPU.*now on lazy:0"):
        opt.apply([torch.ones(3)], [host])


# --- The machine ----------------------------------------------------------------------------------


def test_two_optimizers_in_two_threads() -> None:
    """Large enough that both use helper threads, at once."""
    torch.manual_seed(0)
    start, g = torch.randn(700_000), torch.randn(700_000)
    want, alone = start.clone(), Adam(0.1, global_clipnorm=1.0)
    for _ in range(20):
        alone.apply([g], [want])
    results: list[Tensor] = []

    def run() -> None:
        w, opt = start.clone(), Adam(0.1, global_clipnorm=1.0)
        for _ in range(20):
            opt.apply([g], [w])
        results.append(w)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        assert_same(result, want)


def test_torchs_threads_are_found_once_the_kernels_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """That they were off when somebody asked first is not remembered."""
    openmp._team.cache_clear()
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    assert openmp.team() is None
    monkeypatch.delenv("OMNIADAM_KERNEL")
    assert openmp.team() is openmp.team() is not None


def test_threads_follow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNIADAM_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "_default_threads", lambda openmp: int(openmp or 4))
    memory, before = backend.TorchMemory(), torch.get_num_threads()
    woken: list[int] = []
    monkeypatch.setattr(cpu._helpers, "wakers", lambda count, *rest: woken.append(count) or [])
    asked = parallel_calls(monkeypatch)
    try:
        torch.set_num_threads(1)
        assert (memory.team.size(), cpu.threads()) == (1, 4)
        for own in (True, False):
            if not own:  # where torch's threads cannot be asked
                monkeypatch.setattr(openmp, "team", lambda: None)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                Adam().apply([torch.ones(600_000)], [torch.ones(600_000)])
        assert (asked, woken) == ([3], [2])
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert memory.team.size() == 2
        monkeypatch.setenv("OMNIADAM_NUM_THREADS", "6")
        assert memory.team.size() == 6
    finally:
        torch.set_num_threads(before)


def parallel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads torch's runtime is asked for, call by call."""
    team, asked = openmp.team(), []
    assert team is not None, "torch's OpenMP runtime was not found"
    parallel = team._parallel
    if not team._entry:
        team._begin()

    def counted(function: int, job: int, threads: int, flags: int) -> None:
        asked.append(threads)
        parallel(function, job, threads, flags)

    monkeypatch.setattr(team, "_parallel", counted)
    return asked


@pytest.mark.parametrize("settings", [{}, {"global_clipnorm": 1.0, "amsgrad": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_threads_change_no_bit(
    dtype: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(threads: int) -> list[Tensor]:
        monkeypatch.setenv("OMNIADAM_NUM_THREADS", str(threads))
        torch.manual_seed(0)
        params = [torch.randn(n).to(dtype) for n in (70_001, 3, 40_000)]
        opt = Adam(**settings)
        for _ in range(3):
            opt.apply([torch.randn(w.shape).to(dtype) for w in params], params)
        return [*params, *opt.variables]

    asked = parallel_calls(monkeypatch)
    want = run(1)
    assert asked == []
    for threads in (2, 5):
        for ours, other in zip(run(threads), want, strict=True):
            assert_same(ours, other)
    assert set(asked) == {2, 5}


@pytest.mark.parametrize("runs", [0, 3])
def test_a_runtime_of_another_kind_is_not_trusted(
    runs: int, slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = openmp._runtime()
    assert real is not None

    def parallel(function: int, argument: int, threads: int, flags: int) -> None:
        for _ in range(runs):
            real(function, argument, 1, flags)

    team = openmp.OpenMP(parallel)
    monkeypatch.setattr(openmp, "team", lambda: team)
    monkeypatch.setenv("OMNIADAM_NUM_THREADS", "2")
    w = torch.ones(100_000)
    with pytest.warns(RuntimeWarning, match="lacks `GOMP_parallel`"):
        Adam(0.5).apply([torch.ones(100_000)], [w])
    assert w.eq(w[0]).all() and w[0] < 0.6
    assert team._is_useless and team.smallest == cpu.PARALLEL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_after_torchs_threads_were_used() -> None:
    code = """
import os, time, torch
from omniadam import Adam
def run():
    w, opt = torch.ones(100_000), Adam(0.1)
    for i in range(3):
        opt.apply([torch.full((100_000,), 1.0 + i)], [w])
    return float(w.double().sum()), float(w[0])
torch.set_num_threads(2)
want = run()
child = os.fork()
if not child:
    torch.set_num_threads(1)  # for the sum
    from omniadam.kernels import cpu
    os.environ["OMNIADAM_NUM_THREADS"] = "2"
    os._exit(run()[1] != want[1])
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
assert ended == child and status == 0, status
assert run() == want
"""
    run_script(code, "-W", "ignore", OMNIADAM_NUM_THREADS="2")


def test_state_in_huge_pages_is_an_ordinary_tensor(tmp_path: Path) -> None:
    asked: list[int] = []
    w = nn.Parameter(torch.ones(3 << 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_madvise", lambda: lambda start, size, _: asked.append(size))
        opt = Adam(0.1)
        opt.build([w])
    assert len(asked) == 2 and min(asked) > 11 << 20
    momentum = opt.variables[2]
    assert not momentum.any()
    assert torch.equal(pickle.loads(pickle.dumps(momentum)), momentum)
    momentum.share_memory_()
    other = omniadam.torch.Adam([w])
    w.grad = torch.ones_like(w)
    other.step()
    held = other.state[w]["exp_avg"]
    held.untyped_storage().resize_(0)
    held.untyped_storage().resize_(4 * w.numel())


def test_a_fork_after_steps() -> None:
    """As a DataLoader makes: workers step optimizers of their own, and the parent goes on."""
    code = """
import torch
from omniadam import Adam
def run(steps=5):
    w, opt = torch.ones(700_000), Adam(0.1)
    for i in range(steps):
        opt.apply([torch.full((700_000,), 1.0 + i)], [w])
    return w
class Steps(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return run()[:3]
want = run()
loader = torch.utils.data.DataLoader(Steps(), num_workers=2, multiprocessing_context="fork")
for _ in range(2):
    for batch in loader:
        assert torch.equal(batch[0], want[:3]), batch
        assert torch.equal(run(), want)
"""
    run_script(code, "-W", "ignore", OMNIADAM_NUM_THREADS="2")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_no_temporary_of_a_parameters_size() -> None:
    """Slots and gradients are all that a step needs: 100 MB more would show."""
    code = """
import torch
from omniadam import Adam

def resident(name):  # in megabytes
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

def stepped(form, n):
    w = torch.zeros(n, n, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
    g = torch.ones(n, n, dtype=w.dtype)
    if form == "transposed gradient":
        g = g.t()
    if form == "strided":
        w = torch.zeros(n, n + 1)[:, :n]
    opt = Adam(global_clipnorm=1.0, weight_decay=0.1, use_ema=True)
    opt.build([w])
    for value in opt.variables:
        value.add_(0)  # else its memory would be taken from the system in the first step
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    before = resident("VmRSS")
    for _ in range(2):
        opt.apply([g], [w])
    return resident("VmHWM") - before

for form in ("flat", "bfloat16", "transposed gradient", "strided"):
    stepped(form, 1_000)  # what a first step loads or compiles
    grown = stepped(form, 5_000)
    assert grown < 25, (form, grown)
"""
    run_script(code, OMNIADAM_NUM_THREADS="2")


def test_an_optimizer_lets_go_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step stays but what is prepared for its variables."""
    import weakref

    opt, params, grads = optimized()
    given = grads()
    references = [weakref.ref(g) for g in given]
    opt.apply(given, params)
    del given
    assert [r() for r in references] == [None, None]
    monkeypatch.setattr("omniadam.engine._SELECTIONS", 40)
    patterns = 60
    extra = [nn.Parameter(torch.ones(2)) for _ in range(patterns)]
    many = Adam()
    many.build(extra)
    for i in range(patterns):  # a new set of gradients at each step, as with random depth
        many.apply([torch.ones(2)], [extra[i]])
    assert len(many._selections) <= 40


def test_only_torch_is_imported() -> None:
    code = """
import sys
import torch
from omniadam import Adam
before = set(sys.modules)
w = torch.nn.Parameter(torch.ones(3))
opt = Adam()
for _ in range(3):
    opt.minimize(lambda: (w ** 2).sum(), [w])
opt.get_weights(), opt.get_config()
names = {name.partition(".")[0] for name in sys.modules}
foreign = {"autograd", "jax", "keras", "optax", "scipy", "sklearn", "tensorflow", "tf_keras"}
print(sorted(names & foreign), "torch._dynamo" in sys.modules and "torch._dynamo" not in before)
"""
    assert run_script(code).split("\n")[0] == "[] False"
    assert run_script(f"import autograd\n{code}").startswith("['autograd'")
