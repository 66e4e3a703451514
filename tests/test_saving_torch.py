"""State of omniadam.torch and of trees of optax in our file: to the bit, by name, or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import omniadam  # noqa: E402
import omniadam.optax  # noqa: E402
from omniadam.saving import file  # noqa: E402
from omniadam.torch import Adam, AdamW, Embedding  # noqa: E402

SHAPES = {"w": (3, 4), "b": (4,), "never": (2,), "half": (5,)}
POSITION = "Variables without names"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "adam.safetensors")


# --- PyTorch -------------------------------------------------------------------------------------


def values(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made = {
        name: torch.from_numpy(rng.normal(size=shape)).float() for name, shape in SHAPES.items()
    }
    made["half"] = made["half"].bfloat16()
    made["z"] = torch.complex(made["w"], -made["w"])
    made["wide"] = made["w"].double().T  # not in the order of C
    return {name: torch.nn.Parameter(value) for name, value in made.items()}


def give(params: dict[str, Any], step: int) -> None:
    for i, (name, p) in enumerate(params.items()):
        g = np.random.default_rng([step, i]).normal(size=(*p.shape, 2))
        g = torch.view_as_complex(torch.from_numpy(g))
        if name != "never" and (name != "b" or step % 2):
            p.grad = (g if p.is_complex() else g.real).to(p.dtype)
        else:
            p.grad = None


def train(params: dict[str, Any], opt: Any, steps: range) -> None:
    for step in steps:
        give(params, step)
        opt.step()


def continued(params: dict[str, Any]) -> dict[str, Any]:
    """The model, as its own checkpoint brings it back."""
    return {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}


def groups_of(params: dict[str, Any], named: bool) -> list[dict[str, Any]]:
    pairs = list(params.items()) if named else list(params.values())
    return [
        {"params": pairs[:2], "lr": 0.1, "amsgrad": True, "initial_lr": 0.5},
        {"params": pairs[2:], "weight_decay": 0.1, "betas": (0.8, 0.99)},
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"use_ema": True, "ema_momentum": 0.5, "clipvalue": 0.9},
    "keras": {"epsilon_hat": True, "global_clipnorm": 1.0, "maximize": True},
    "tensor": {"lr": torch.tensor(0.01), "eps": 1e-3},
}


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("by", ["name", "position"])
@pytest.mark.filterwarnings(f"ignore:{POSITION}")
def test_a_stopped_run_is_one_that_never_stopped(kind: Any, name: str, by: str, path: str) -> None:
    settings = SETTINGS[name]
    params = values()
    opt = kind(groups_of(params, by == "name"), **settings)
    train(params, opt, range(3))
    for group in opt.param_groups:
        group["lr"] = group["lr"] * 0.5  # as schedules do
    more = {"new": torch.nn.Parameter(torch.ones(2))}
    late = {"params": list(more.items()) if by == "name" else list(more.values()), "eps": 1e-4}
    opt.add_param_group(late)
    params |= more
    train(params, opt, range(3, 5))
    omniadam.save(opt, path)
    copy = continued(params)
    other = list(copy.items()) if by == "name" else list(copy.values())
    again = kind(groups_of(dict(list(copy.items())[:-1]), by == "name"), **settings)
    again.add_param_group({"params": other[-1:]})
    give(copy, 77)
    again.step()  # whatever it holds is replaced
    for p, q in zip(copy.values(), params.values(), strict=True):
        p.data.copy_(q.data)
    assert not omniadam.load(path, again, by=by)
    assert omniadam.state_hash(again) == omniadam.state_hash(opt)
    train(params, opt, range(5, 8))
    train(copy, again, range(5, 8))
    for p, q in zip(params.values(), copy.values(), strict=True):
        assert torch.equal(p, q)
    one, two = opt.state_dict(), again.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert len(one["state"]) == len(two["state"]) == len(params) - 1
    for i, a in one["state"].items():
        b = two["state"][i]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    kinds = [type(group["lr"]) for group in again.param_groups]
    assert kinds == [type(group["lr"]) for group in opt.param_groups]


def test_names_and_not_places_say_which_state_is_whose(path: str) -> None:
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    opt = Adam([("encoder.a", a), ("encoder.b", b)], lr=0.1)
    a.grad, b.grad = torch.ones(3), torch.full((3,), -2.0)
    opt.step()
    omniadam.save(opt, path)
    for prefix, reverse in [
        ("", True),
        ("module.", False),
        ("_orig_mod.module.", True),
        ("inner", True),
    ]:
        names = [f"{prefix}encoder.a", f"{prefix}encoder.b"]
        if prefix == "inner":
            names = ["encoder._orig_mod.a", "encoder.b"]
        pairs = list(zip(names, (a.detach().clone(), b.detach().clone()), strict=True))
        other = Adam(reversed(pairs) if reverse else pairs, lr=0.1)
        omniadam.load(path, other)
        own = dict(pairs)
        for name, p in zip(names, (a, b), strict=True):
            assert torch.equal(other.state[own[name]]["exp_avg"], opt.state[p]["exp_avg"])


def two(names: str = "ab", shapes: Any = ((3,), (2,)), **settings: Any) -> Any:
    """An optimizer of two parameters that has made a step."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    opt = Adam(list(zip(names, params, strict=True)), **settings)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    opt.step()
    return opt


def doubled() -> Any:
    return Adam([(n, torch.zeros(k, dtype=torch.float64)) for n, k in (("a", 3), ("b", 2))])


def unnamed() -> Any:
    return Adam([torch.zeros(3), torch.zeros(2)])


def grouped() -> Any:
    return Adam([{"params": [(n, torch.zeros(s))]} for n, s in (("a", 3), ("b", 2))])


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "renamed": (
        lambda: two("ac"),
        {},
        "The file lacks: 'c'. The optimizer has no: 'b'.",
    ),
    "missing": (lambda: two("a", ((3,),)), {}, "The optimizer has no: 'b'."),
    "extra": (
        lambda: two("abc", ((3,), (2,), ())),
        {},
        "The file lacks: 'c'.",
    ),
    "untrained": (lambda: Adam([("a", torch.zeros(3))]), {}, "The optimizer has no: 'b'."),
    "shape": (
        lambda: two(shapes=((3,), (4,))),
        {},
        "momentum of 'b': float32 of shape (2,) in the file, float32 of shape (4,) in the opt",
    ),
    "dtype": (doubled, {}, "momentum of 'a': float32 of shape (3,) in the file, float64 of"),
    "positions": (unnamed, {}, "have no names by which they could be told again: 0, 1"),
    "order": (
        lambda: two("ba", ((2,), (3,))),
        {"by": "position"},
        "momentum of 'a' -> 'b': float32 of shape (3,) in the file, float32 of shape (2,)",
    ),
    "groups": (grouped, {}, "The parameters of each group must be those of a group in the file"),
    "epsilon": (
        lambda: two(epsilon_hat=True),
        {},
        "means something else than that of this optimizer: `epsilon_hat` is False in the file, "
        "True in group 0",
    ),
    "averages": (lambda: two(use_ema=True), {}, "`use_ema` is False in the file, True in"),
    "averages of some": (
        lambda: two(use_ema=True),
        {"strict": False},
        "`use_ema` is False in the file, True in",
    ),
    "by": (two, {"by": "order"}, "`by` must be 'name' or 'position'"),
    "other kind": (
        lambda: omniadam.Adam(0.1),
        {},
        "an Adam of torch, and the optimizer omniadam.Adam is of keras 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_listed_and_changes_nothing(name: str, path: str) -> None:
    make, more, message = REFUSED[name]
    opt = two(lr=0.25)
    omniadam.save(opt, path)
    other = make()
    is_torch = isinstance(other, Adam)
    before = (omniadam.state_hash(other), repr(other)) if is_torch else None
    with pytest.raises(ValueError, match=re.escape(message)):
        omniadam.load(path, other, **more)
    assert before == ((omniadam.state_hash(other), repr(other)) if is_torch else None)


def test_groups_are_restored_as_load_state_dict_does(path: str) -> None:
    opt = two(lr=0.25, betas=(0.5, 0.75), amsgrad=True, weight_decay=0.125, clipnorm=2.0)
    opt.param_groups[0]["note"] = {"who": ["me", 1, None]}
    omniadam.save(opt, path)
    by_file, by_dict = two(amsgrad=True), two(amsgrad=True)
    omniadam.load(path, by_file)
    by_dict.load_state_dict(opt.state_dict())
    one, other = by_file.state_dict(), by_dict.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert [*one["state"][0]] == [*other["state"][0]]
    opt.param_groups[0]["note"] = print
    with pytest.raises(ValueError, match="`note` of parameter group 0 must be a number"):
        omniadam.save(opt, path)
    opt.param_groups[0]["note"], opt.param_groups[0]["lr"] = None, float("nan")
    with pytest.raises(ValueError, match="JSON"):
        omniadam.save(opt, path)


def test_what_fits_is_loaded_where_that_is_asked_for(path: str) -> None:
    opt = two(lr=0.25)
    opt.step()
    omniadam.save(opt, path)
    other = two("acb", ((3,), (1,), (7,)))
    new = other.param_groups[0]["params"]
    held = {p: {k: v.clone() for k, v in other.state[p].items()} for p in new}
    left = omniadam.load(path, other, strict=False)
    assert left.missing == ("'c'",)
    assert left.unexpected == ()
    assert [row.partition(":")[0] for row in left.different] == [
        "momentum of 'b'",
        "velocity of 'b'",
        "step of 'b'",
    ]
    first = opt.state[opt.param_groups[0]["params"][0]]
    assert all(torch.equal(other.state[new[0]][key], first[key]) for key in first)
    for p in new[1:]:  # as they were, all of their parts
        assert all(torch.equal(other.state[p][key], held[p][key]) for key in held[p])
    assert other.param_groups[0]["lr"] == 0.25
    # A group of parameters of two groups, and one of none, stay as they are.
    mixed = grouped()
    mixed.add_param_group({"params": [("c", torch.zeros(1))]})
    left = omniadam.load(path, mixed, strict=False)
    assert left.missing == ("'c'",)
    assert [group["lr"] for group in mixed.param_groups] == [0.25, 0.25, 0.001]


def test_counts_are_whole_numbers_however_large(path: str) -> None:
    opt = two()
    p, q = opt.param_groups[0]["params"]
    opt.state[p]["step"] = torch.tensor(2.0**24 + 3, dtype=torch.float64)
    opt.state[q]["step"] = 7
    omniadam.save(opt, path)
    other = two()
    omniadam.load(path, other)
    p_, q_ = other.param_groups[0]["params"]
    assert (other.state[p_]["step"].item(), other.state[q_]["step"].item()) == (2**24 + 3, 7)
    assert other.state[q_]["step"].dtype == torch.float32
    for wrong in (1.5, -1.0, float("inf"), float("nan"), "one"):
        opt.state[p]["step"] = torch.tensor(wrong) if isinstance(wrong, float) else wrong
        with pytest.raises(ValueError, match=r"'step' of parameter 'a' must be a"):
            omniadam.save(opt, path)


def test_state_that_would_be_left_out_is_an_error(path: str) -> None:
    opt = two()
    p = opt.param_groups[0]["params"][0]
    opt.state[p]["mine"] = 1
    with pytest.raises(ValueError, match=r"'a' must be Adam's.*It has \['mine'\] besides"):
        omniadam.save(opt, path)
    del opt.state[p]["mine"]
    opt.state["all"] = {"count": 1}
    with pytest.raises(ValueError, match=r"There is some of 'all'"):
        omniadam.save(opt, path)
    del opt.state["all"]
    del opt.state[p]["exp_avg"]
    with pytest.raises(ValueError, match="must be complete, or not there at all"):
        omniadam.save(opt, path)
    meta = Adam([("a", torch.zeros(2, device="meta"))])
    with pytest.raises(ValueError, match="must have values"):
        omniadam.save(meta, path)


def test_parts_of_a_parameters_state_are_no_state(path: str) -> None:
    """A file that says so was made by somebody else: its digests are right."""
    opt = two()
    omniadam.save(opt, path)
    whole = file.read(path).snapshot
    a, b = whole.variables
    slots = {word: name for word, name in a.slots.items() if word != "step"}
    tensors = {name: t for name, t in whole.tensors.items() if name != "a.step"}
    group = dict(whole.settings["groups"][0])
    for wrong, message in (
        ({"variables": (a._replace(slots=slots), b), "tensors": tensors}, r"lacks \['step'\]"),
        ({"settings": {"groups": [{**group, "amsgrad": True}]}}, "`amsgrad` is True in the file"),
        ({"settings": {}}, "must be `groups`"),
        ({"settings": {"groups": [{"lr": 1.0}]}}, "must be `groups`"),
        ({"settings": {"groups": [{**group, "params": [["a"]]}]}}, "must be `groups`"),
        ({"settings": {"groups": [{**group, "params": ["a", "x"]}]}}, "must be those of a group"),
        ({"settings": {"groups": [{**group, "betas": [2.0, 0.9]}]}}, "`betas` must be two"),
        ({"settings": {"groups": [{**group, "lr": "fast"}]}}, "`lr` must be a number"),
        ({"settings": {"groups": [{**group, "clipnorm": -1.0}]}}, "clipnorm"),
    ):
        parts = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
        before = omniadam.state_hash(opt), repr(opt)
        file.write(path, type(whole)(**{**parts, **wrong}))
        with pytest.raises(ValueError, match=message):
            omniadam.load(path, opt)
        assert (omniadam.state_hash(opt), repr(opt)) == before


def test_averages_in_the_place_of_parameters(path: str) -> None:
    opt = two(use_ema=True, ema_momentum=0.5)
    before = omniadam.state_hash(opt)
    with opt.averaged():  # the state is what it was
        omniadam.save(opt, path)
        assert omniadam.state_hash(opt) == before
        with pytest.raises(RuntimeError, match=r"load outside of averaged\(\)"):
            omniadam.load(path, opt)
    omniadam.load(path, opt)


def test_rows_that_are_behind_have_come_up_to_date(path: str) -> None:
    def embedded() -> Any:
        embedding = Embedding(50, 2, _weight=torch.arange(100.0).reshape(50, 2) / 50)
        return embedding, AdamW(embedding.named_parameters(), lr=0.1)

    def look_up(embedding: Any, opt: Any, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            embedding(torch.tensor([step, 7, step])).square().sum().backward()
            opt.step()

    embedding, opt = embedded()
    look_up(embedding, opt, range(4))
    assert embedding.weight.deferral.is_behind
    omniadam.save(opt, path)
    assert not embedding.weight.deferral.is_behind
    other, again = embedded()
    look_up(other, again, range(9, 12))
    with torch.no_grad():
        other.weight.copy_(embedding.weight)
    look_up(other, again, range(1))  # rows are behind again, and what they missed is dropped
    with torch.no_grad():
        other.weight.copy_(embedding.weight)
    omniadam.load(path, again)
    look_up(embedding, opt, range(4, 9))
    look_up(other, again, range(4, 9))
    assert torch.equal(embedding.weight.detach(), other.weight.detach())
    assert omniadam.state_hash(opt) == omniadam.state_hash(again)


def test_no_step_is_made_while_state_is_written(path: str) -> None:
    import threading

    opt = two()
    params = opt.param_groups[0]["params"]
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            opt.step()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(20):
            omniadam.save(opt, path)
            saved = file.read(path).snapshot.tensors
            assert saved["a.step"].read() == saved["b.step"].read()
            a, b = saved["a.velocity"].read(), saved["b.velocity"].read()
            assert a[0] == b[0]  # gradients are the same
    finally:
        stop.set()
        thread.join()
    assert len(params) == 2


def test_shards_are_a_case_for_torch(path: str, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
        opt = Adam([("a", p)])
        with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint\.state_dict"):
            omniadam.save(opt, path)
        omniadam.save(two("a", ((2,),)), path)
        with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint\.state_dict"):
            omniadam.load(path, opt)
    finally:
        dist.destroy_process_group()


def test_torchs_own_optimizer(path: str) -> None:
    """Its state goes to ours and back by snapshots; 16-bit moments become float32."""
    from omniadam.saving import torch as saving

    p, half = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3).bfloat16())
    theirs = torch.optim.AdamW([("p", p), ("half", half)], lr=0.1)
    for step in range(2):
        p.grad, half.grad = torch.full((3,), 0.3 + step), torch.full((3,), 0.3).bfloat16()
        theirs.step()
    ours = AdamW([("p", p), ("half", half)])
    saving.restore(ours, saving.snapshot(theirs), by="name", strict=True)
    for each in (p, half):
        for key, value in theirs.state[each].items():
            found = ours.state[each][key]
            assert found.dtype == torch.float32 and torch.equal(found, value.float())
    again = torch.optim.AdamW([("p", torch.ones(3))])
    only = Adam([("p", p)], clipnorm=1.0)
    with pytest.raises(ValueError, match=r"no equivalent of the settings \{'clipnorm': 1.0\}"):
        saving.restore(again, saving.snapshot(only), by="name", strict=True)
    with pytest.raises(ValueError, match="made with its parameters"):
        omniadam.save(only, path)
        omniadam.from_file(path)


# --- trees ---------------------------------------------------------------------------------------


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": jnp.asarray(rng.normal(size=2), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=2), jnp.bfloat16),
        "none": None,
        "list": [jnp.ones(2)],
    }


SOLVERS: dict[str, Callable[[], Any]] = {
    "ours": lambda: omniadam.optax.adamw(0.1),
    "of float16": lambda: omniadam.optax.adam(0.1, mu_dtype="float16", nesterov=True),
    "optax": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.1, 0.01, 5))
    ),
    "injected": lambda: optax.inject_hyperparams(omniadam.optax.adam)(learning_rate=0.1),
    "masked": lambda: optax.masked(
        omniadam.optax.adam(0.1),
        {"dense": True, "half": False, "none": None, "list": True},
    ),
}


def advance(solver: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
    @jax.jit
    def one(step: Any, params: Any, state: Any) -> Any:
        grads = jax.tree.map(lambda x: (x * (0.5 + step)).astype(x.dtype), params)
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in steps:
        params, state = one(step, params, state)
    return params, state


@pytest.mark.parametrize("name", SOLVERS)
def test_a_tree_comes_back_to_the_bit(name: str, path: str) -> None:
    solver, params = SOLVERS[name](), tree()
    params, state = advance(solver, params, solver.init(params), range(3))
    omniadam.save(state, path)
    for like in (state, solver.init(tree(1)), jax.eval_shape(solver.init, params)):
        again = omniadam.load(path, like=like)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
            assert (a.dtype, a.weak_type, a.committed) == (b.dtype, b.weak_type, b.committed)
            assert a.sharding == b.sharding
            np.testing.assert_array_equal(a, b)
        one, other = (advance(solver, params, each, range(3, 6)) for each in (state, again))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    assert omniadam.state_hash(again) == omniadam.state_hash(state)


def test_every_kind_of_leaf(path: str) -> None:
    state = {
        "number": (1, 2.5, True),
        "numpy": [np.arange(3), np.float32(0.5), np.asfortranarray(np.ones((2, 3)))],
        "swapped": np.arange(3, dtype=">i4"),
        "types": [jnp.ones(2, t) for t in ("float16", "int8", "uint32", "bool", "bfloat16")],
        "weak": (jnp.asarray(0.1), jnp.full((2,), 3), jnp.full((2, 2), 1j)),
        "complex": jnp.full(3, 1 - 2j),
        "empty": jnp.zeros((0, 2)),
        "there": jax.device_put(jnp.ones(2), jax.devices()[0]),
    }
    omniadam.save(state, path)
    again = omniadam.load(path, like=state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)
        if isinstance(a, jax.Array):
            assert (a.weak_type, a.committed) == (b.weak_type, b.committed)
    again["numpy"][0][0] = 5  # it is the user's
    donated = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    used = {"a": jnp.ones(3)}
    omniadam.save(used, path)
    donated(used)
    np.testing.assert_array_equal(omniadam.load(path, like=used)["a"], 1.0)
    with pytest.raises(ValueError, match=r"\['a'\]' was donated"):
        omniadam.save(used, path)


def test_a_tree_lies_where_the_other_does(path: str) -> None:
    """On two devices, in a process that has them."""
    import subprocess
    import sys

    code = f"""if True:
        import jax, jax.numpy as jnp, numpy as np, omniadam
        from jax.sharding import NamedSharding, PartitionSpec as P
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        split = NamedSharding(mesh, P("x"))
        state = {{"a": jax.device_put(jnp.arange(4.0), split), "b": jnp.ones(2),
                 "c": jax.device_put(jnp.ones(3), jax.devices()[1])}}
        omniadam.save(state, {path!r})
        assert state["a"]._npy_value is None  # not kept on the host beside it
        again = omniadam.load({path!r}, like=state)
        shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=split)
        wanted = omniadam.load({path!r}, like=state | {{"a": shape}})
        for found in (again, wanted):
            for name in state:
                assert found[name].sharding == state[name].sharding, name
                assert found[name].committed == state[name].committed, name
                np.testing.assert_array_equal(found[name], state[name])
        """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    import os

    source = str(Path(omniadam.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "JAX_PLATFORMS": "cpu"}


def test_trees_that_do_not_fit(path: str) -> None:
    solver, params = omniadam.optax.adam(0.1), {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = solver.init(params)
    omniadam.save(state, path)

    def refused(like: Any, *parts: str) -> None:
        with pytest.raises(ValueError) as caught:
            omniadam.load(path, like=like)
        for part in parts:
            assert part in str(caught.value), caught.value

    refused(solver.init({"a": jnp.ones(2), "c": jnp.ones(3)}), "'[0].mu['c']'", "'[0].nu['b']'")
    refused(solver.init({"a": jnp.ones(2)}), "The optimizer has no: '[0].mu['b']'")
    refused(
        solver.init({"a": jnp.ones(4), "b": jnp.ones(3)}),
        "'[0].mu['a']': float32 of shape (2,) in the file, float32 of shape (4,)",
        "'[0].nu['a']'",
    )
    refused(
        omniadam.optax.adam(0.1, mu_dtype="bfloat16").init(params),
        "'[0].mu['a']': float32 of shape (2,) in the file, bfloat16",
    )
    refused(optax.chain(optax.clip(1.0), solver).init(params), "'[1][0].count'", "'[0].count'")
    some = solver.init({"a": jnp.full(2, 7.0), "c": jnp.full(3, 7.0)})
    some = jax.tree.map(lambda x: x + 1, some)
    loaded = omniadam.load(path, like=some, strict=False)
    np.testing.assert_array_equal(loaded[0].mu["c"], some[0].mu["c"])
    np.testing.assert_array_equal(loaded[0].mu["a"], 0.0)
    with pytest.raises(ValueError, match=r"\['c'\].*must be in the file, as `like` has no values"):
        omniadam.load(path, like=jax.eval_shape(lambda: some), strict=False)
    with pytest.raises(TypeError, match=r"load\(path, like=state\)"):
        omniadam.load(path, state)
    with pytest.raises(ValueError, match=r"load\(path, like=state\)"):
        omniadam.from_file(path)
    with pytest.raises(ValueError, match="an Adam of optax, and the optimizer omniadam"):
        omniadam.load(path, two())


def test_leaves_that_no_file_holds(path: str) -> None:
    ones = jnp.ones(2)
    for leaf, message in (
        (jax.random.key(0), r"\['x'\]' must hold numbers.*jax.random.key_data"),
        ("text", r"\['x'\]' must be an array or a number. Received: builtins.str"),
        (print, r"must be an array or a number"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "must have values, to be saved"),
        (jnp.ones(2, jnp.int4), "int4"),
    ):
        with pytest.raises(ValueError, match=message):
            omniadam.save({"a": ones, "x": leaf}, path)
    assert not Path(path).exists()

    @jax.jit
    def traced(x: Any) -> Any:
        with pytest.raises(ValueError, match=r"outside of jax\.jit"):
            omniadam.save({"a": x}, path)
        return x

    traced(ones)
    with pytest.raises(TypeError, match="a tree of JAX arrays"):
        omniadam.save(["nothing"], path)
