"""Embeddings of PyTorch whose rows catch up: the same bits as torch's module with our optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import omniadam  # noqa: E402
import omniadam.torch as ours  # noqa: E402

ROWS, WIDTH = 40, 6
Make = Callable[[Any], Any]


class Model(nn.Module):  # type: ignore[misc]
    def __init__(self, bag: bool = False) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.embedding = kind(ROWS, WIDTH, sparse=True)
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, ids: Any) -> Any:
        return self.layer(self.embedding(ids)).square().sum()


class Both:
    """A model with torch's module, and the same one deferred."""

    def __init__(self, make: Make, bag: bool = False) -> None:
        torch.manual_seed(0)
        self.models = [Model(bag), Model(bag)]
        self.models[1].load_state_dict(self.models[0].state_dict())
        assert ours.defer(self.models[1]) is self.models[1]
        self.optimizers = [make(model) for model in self.models]
        self.rng = np.random.default_rng(0)

    def step(self, ids: Any) -> None:
        ids = torch.as_tensor(np.asarray(ids, np.int64))
        losses = []
        for model, opt in zip(self.models, self.optimizers, strict=True):
            model.zero_grad()
            loss = model(ids)
            loss.backward()
            if isinstance(opt, omniadam.Adam):
                opt.apply_gradients([(p.grad, p) for p in model.parameters()])
            else:
                opt.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]

    def run(self, steps: int = 60, skewed: bool = True) -> None:
        for step in range(steps):
            few = self.rng.integers(0, ROWS, (2, 3)) if step % 20 < 2 else [[step % 3]]
            self.step(few)
        self.check()

    def check(self) -> None:
        for a, b in zip(*(model.state_dict().values() for model in self.models), strict=True):
            assert torch.equal(a, b)
        first, second = self.optimizers
        if isinstance(first, omniadam.Adam):
            states = [opt.get_weights() for opt in self.optimizers]
            assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))
        else:
            a, b = (opt.state_dict()["state"] for opt in (first, second))
            assert a.keys() == b.keys()
            for k in a:
                assert all(torch.equal(a[k][name], b[k][name]) for name in a[k])


OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda m: ours.Adam(m.parameters(), lr=0.01),
    "AdamW": lambda m: ours.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "clipped": lambda m: ours.Adam(m.parameters(), lr=0.01, global_clipnorm=0.5, maximize=True),
    "penalised": lambda m: ours.Adam(m.parameters(), lr=0.01, weight_decay=0.1),
    "averaged": lambda m: ours.Adam(m.parameters(), lr=0.01, use_ema=True),
    "omniadam": lambda m: omniadam.Adam(0.01, clipnorm=0.5),
    "omniadam, decayed": lambda m: omniadam.AdamW(0.01),
}


@pytest.mark.parametrize("bag", [False, True], ids=["embedding", "bag"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_bits(name: str, bag: bool) -> None:
    both = Both(OPTIMIZERS[name], bag)
    both.run()
    if name in ("Adam", "clipped", "omniadam"):
        both.step([[5, 6]])
        rows = both.models[1].embedding.weight
        assert rows.deferral.is_behind, "no row was put off"


def test_rows_are_put_off_and_come_back_by_a_forward_pass_alone() -> None:
    both = Both(OPTIMIZERS["Adam"])
    for _ in range(3):
        both.step([[1, 2]])
    both.step([[3]])
    weights = [model.embedding.weight for model in both.models]
    plain = weights[1].plain()
    assert not torch.equal(plain[1], weights[0][1]) and torch.equal(plain[3], weights[0][3])
    with torch.no_grad():
        for model in both.models:
            model.eval()(torch.tensor([[1]]))
    assert torch.equal(plain[1], weights[0][1]) and not torch.equal(plain[2], weights[0][2])
    both.check()
    assert torch.equal(plain, weights[0])


READS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda m: m.embedding.weight.sum(),
    "index": lambda m: m.embedding.weight[2],
    "tied": lambda m: nn.functional.linear(torch.ones(WIDTH), m.embedding.weight),
    "numpy": lambda m: torch.from_numpy(m.embedding.weight.detach().numpy().copy()),
    "data": lambda m: m.embedding.weight.data.clone(),
    "state_dict": lambda m: m.state_dict()["embedding.weight"].clone(),
    "copy": lambda m: copy.deepcopy(m).embedding.weight.detach(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).embedding.weight.detach(),
    "double": lambda m: copy.deepcopy(m).double().embedding.weight.detach(),
    "average": lambda m: torch.optim.swa_utils.AveragedModel(m).module.embedding.weight.detach(),
    "list": lambda m: torch.cat([m.embedding.weight, m.embedding.weight]),
    "norm": lambda m: nn.utils.parameters_to_vector(m.parameters()),
    "functional": lambda m: nn.functional.embedding(torch.tensor([2]), m.embedding.weight),
    "repr": lambda m: torch.tensor(list(map(ord, repr(m.embedding.weight.detach())))),
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "init": lambda m: nn.init.constant_(m.embedding.weight, 0.25),
    "copy_": lambda m: m.embedding.weight.data.copy_(torch.ones(ROWS, WIDTH)),
    "row": lambda m: _set_row(m.embedding.weight),
    "data": lambda m: setattr(m.embedding.weight, "data", torch.full((ROWS, WIDTH), 0.5)),
    "load": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
}


def _set_row(weight: Any) -> None:
    with torch.no_grad():
        weight[2] = 1.0


@pytest.mark.parametrize("name", READS)
def test_what_reads_the_weight_sees_it_up_to_date(name: str) -> None:
    both = Both(OPTIMIZERS["Adam"])
    for ids in ([[1, 2]], [[1, 2]], [[3]]):
        both.step(ids)
    a, b = (READS[name](model) for model in both.models)
    assert torch.equal(a, b)
    both.run(5)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("optimizer", ["Adam", "omniadam"])
def test_what_writes_the_weight_does_not_have_missed_steps_put_on_it(
    name: str, optimizer: str
) -> None:
    both = Both(OPTIMIZERS[optimizer])
    for ids in ([[1, 2]], [[1, 2]], [[3]]):
        both.step(ids)
    for model in both.models:
        WRITES[name](model)
    both.run(25)


def test_state_is_saved_and_loaded_up_to_date() -> None:
    both = Both(OPTIMIZERS["AdamW"])
    both.run(25)
    for ids in ([[1, 2]], [[3]]):
        both.step(ids)
    file = io.BytesIO()
    torch.save([both.models[1].state_dict(), both.optimizers[1].state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file)  # with weights_only: nothing of ours is in it
    other = Both(OPTIMIZERS["AdamW"])
    for model, opt in zip(other.models, other.optimizers, strict=True):
        model.load_state_dict(weights)
        opt.load_state_dict(state)
    for each in (both, other):
        each.rng = np.random.default_rng(1)
        each.run(30)
    assert torch.equal(*(each.models[1].state_dict()["embedding.weight"] for each in (both, other)))


def test_two_optimizers_take_turns() -> None:
    both = Both(OPTIMIZERS["Adam"])
    both.run(10)
    kept = both.optimizers
    both.optimizers = [OPTIMIZERS["AdamW"](model) for model in both.models]
    both.run(10)
    both.optimizers = kept
    both.run(10)


def test_torchs_own_optimizers_see_an_ordinary_parameter() -> None:
    torch.manual_seed(0)
    embedding = ours.Embedding(5, 2)
    start = embedding.weight.detach().clone()
    opt = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    opt.step()
    assert (embedding.weight != start).any(dim=1).tolist() == [False, True, False, False, False]


def test_the_modules() -> None:
    embedding = ours.Embedding(5, 2, padding_idx=0)
    assert isinstance(embedding, nn.Embedding) and embedding.sparse
    assert isinstance(embedding.weight, nn.Parameter) and embedding.weight.is_leaf
    assert type(ours.Embedding(5, 2, sparse=False).weight) is nn.Parameter
    assert "sparse=True" in repr(embedding) or "Embedding(5, 2" in repr(embedding)
    pretrained = ours.Embedding.from_pretrained(torch.ones(3, 2), freeze=False, sparse=True)
    assert pretrained(torch.tensor([2])).tolist() == [[1.0, 1.0]]
    for wrong in (
        lambda: ours.Embedding(5, 2, scale_grad_by_freq=True),
        lambda: ours.EmbeddingBag(5, 2, scale_grad_by_freq=True),
        lambda: ours.EmbeddingBag(5, 2, mode="max"),
    ):
        with pytest.raises(ValueError, match="no sparse gradient"):
            wrong()
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        embedding(torch.tensor([5]))


def test_defer_keeps_objects_and_names_what_it_leaves() -> None:
    class Own(nn.Embedding):  # type: ignore[misc]
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Embedding(4, 2),
            "bag": nn.EmbeddingBag(4, 2),
            "max": nn.EmbeddingBag(4, 2, mode="max"),
            "own": Own(4, 2),
            "tied": nn.Embedding(4, 2),
            "head": nn.Linear(2, 4),
            "frozen": nn.Embedding.from_pretrained(torch.ones(2, 2)),
            "normed": nn.utils.parametrizations.weight_norm(nn.Embedding(4, 2)),
        }
    )
    model["head"].weight = model["tied"].weight
    calls: list[Any] = []
    model["plain"].register_forward_hook(lambda *_: calls.append(1))
    modules, parameters = list(model.modules()), list(model.parameters())
    with pytest.warns(UserWarning, match=r"max.*own.*tied.*normed"):
        ours.defer(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    kinds = {name: type(module).__module__.split(".")[0] for name, module in model.items()}
    assert [name for name, kind in kinds.items() if kind == "omniadam"] == ["plain", "bag"]
    model["plain"](torch.tensor([1]))
    assert calls == [1]


def test_an_optimizer_that_holds_the_parameter_goes_on() -> None:
    both = Both(OPTIMIZERS["Adam"])
    both.run(5)
    torch.manual_seed(0)
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    both.models, both.optimizers = models, [OPTIMIZERS["Adam"](m) for m in models]
    for ids in ([[1, 2]], [[1, 2]]):
        both.step(ids)
    ours.defer(models[1])
    both.run(20)


def test_no_gradient_is_no_step() -> None:
    both = Both(OPTIMIZERS["Adam"])
    both.run(5)
    for model, opt in zip(both.models, both.optimizers, strict=True):
        model.zero_grad()
        model.layer(torch.ones(1, WIDTH)).sum().backward()
        opt.step()
    both.run(5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_training_step() -> None:
    both = Both(OPTIMIZERS["Adam"])
    both.run(3)
    model, opt = both.models[1], both.optimizers[1]

    def train(ids: Any) -> Any:
        model.zero_grad()
        loss = model(ids)
        loss.backward()
        opt.step()
        return loss

    compiled = torch.compile(train, backend="aot_eager")
    for ids in ([[1, 2]], [[3]], [[1]]):
        both.models[0].zero_grad()
        loss = both.models[0](torch.tensor(ids))
        loss.backward()
        both.optimizers[0].step()
        assert torch.allclose(compiled(torch.tensor(ids)), loss)
    torch._dynamo.reset()
    weights = [model.embedding.weight.detach() for model in both.models]
    assert torch.allclose(*weights)
