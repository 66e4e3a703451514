"""Variables that come later: `extend`, on every library, against the oracle.

The oracle numbers the steps of each variable by itself (`Reference.extend`).
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest

from cases import PART, SMALL_SHAPES, WHOLE, Case, assert_close, gradients, variables, with_missing
from omniadam import Adam, IndexedSlices, Optimizer, Table, schedules
from omniadam.compat import optimizer_v2

pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")

# When extensions come, by the number of calls before them: 7 and 8 are in the middle of gathering
# three gradients, 9 is not.
FIRST, SECOND, STEPS = 3, 7, 13
SHAPES = SMALL_SHAPES
# Which variables there are from the beginning, and which each extension brings.
PARTS = ([0, 3, 5], [2, 4], [1])


class Library(NamedTuple):
    """How variables and gradients of a library are made and read."""

    variable: Callable[[Any], Any]
    tensor: Callable[[Any], Any]
    read: Callable[[Any], Any]


def numpy_arrays() -> Library:
    return Library(np.array, np.array, np.asarray)


def torch_tensors() -> Library:
    torch = pytest.importorskip("torch")
    return Library(torch.tensor, torch.tensor, lambda v: v.detach().numpy())


def jax_refs() -> Library:
    jax = pytest.importorskip("jax")
    return Library(
        lambda x: jax.new_ref(jax.numpy.array(x)), jax.numpy.array, lambda v: np.asarray(v[...])
    )


def tensorflow_variables() -> Library:
    tf = pytest.importorskip("tensorflow")
    return Library(tf.Variable, tf.constant, lambda v: v.numpy())


def keras_variables() -> Library:
    keras = pytest.importorskip("keras")  # on NumPy: the other backends are in inner.py
    return Library(keras.Variable, np.array, lambda v: np.asarray(v.value))


LIBRARIES = {
    each.__name__: each
    for each in (numpy_arrays, torch_tensors, jax_refs, tensorflow_variables, keras_variables)
}


def named(indices: Sequence[int], params: dict[int, Any]) -> dict[str, Any]:
    return {f"w{i}": params[i] for i in indices}


def optimizer(case: Case, **more: Any) -> Adam:
    opt = Adam(**case.settings_for(schedules) | more)
    if case.excluded:
        opt.exclude_from_weight_decay(var_names=[f"^w{i}$" for i in case.excluded])
    return opt


def missing(step: int, grads: Sequence[Any]) -> list[Any]:
    """Seldom, as each set of gradients is compiled anew."""
    return with_missing(step, grads) if step in (5, 10) else list(grads)


def check(opt: Adam, oracle: Any, order: list[int], of: Library, params: dict[int, Any]) -> None:
    assert int(opt.iterations) == oracle.iterations
    assert_close([of.read(params[i]) for i in order], oracle)
    state = dict(zip(opt.named_variables(), opt.get_weights(), strict=True))
    for slot in oracle.state:
        if slot != "variable":
            assert_close([state[f"w{i}_{slot}"] for i in order], oracle, slot)


def trained(case: Case, of: Library, steps: int = STEPS) -> tuple[Adam, dict[int, Any]]:
    """Extended twice while it trains, and compared with the oracle."""
    values = variables(shapes=SHAPES)
    params = {i: of.variable(values[i]) for i in range(len(values))}
    order = list(PARTS[0])
    opt = optimizer(case)
    opt.build(named(order, params))
    # Indices of the oracle are positions in `order`.
    oracle = case._replace(
        excluded=frozenset([*chain(*PARTS)].index(i) for i in case.excluded)
    ).reference([values[i] for i in order])
    for step in range(steps):
        for at, part in ((FIRST, PARTS[1]), (SECOND, PARTS[2])):
            if step == at:
                opt.extend(named([*order, *part] if at == FIRST else part, params))
                oracle.extend([values[i] for i in part])
                order += part
        given = gradients(step, SHAPES)
        mine = missing(step, [given[i] for i in order])
        pairs = [
            (None if g is None else of.tensor(g), params[i])
            for g, i in zip(mine, order, strict=True)
        ]
        assert int(opt.apply_gradients(pairs)) == step + 1
        oracle.step(mine)
    check(opt, oracle, order, of, params)
    return opt, params


@pytest.mark.parametrize("name", PART)
def test_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in WHOLE:  # of others no kernels are compiled
        monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    trained(PART[name], numpy_arrays())


@pytest.mark.parametrize("library", list(LIBRARIES)[1:])
def test_numbers_on_every_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "tensorflow_variables":
        from omniadam.fast.tensorflow import FastTensorFlow

        # Not by XLA, which takes seconds for each set of gradients: see `test_in_a_tf_function`.
        monkeypatch.setattr(FastTensorFlow, "jit_compile", False)
    trained(list(WHOLE.values())[-1], LIBRARIES[library]())


# --- what is added, and what is not --------------------------------------------------------------


def built(**settings: Any) -> tuple[Adam, dict[str, Any]]:
    """Three steps of two variables."""
    params = {"a": np.array([1.0, -2.0]), "b": np.array([[0.5]])}
    opt = Adam(0.1, **settings)
    opt.build(params)
    for step in range(3):
        opt.apply([np.array([0.5, step]), np.array([[-1.0]])])
    return opt, params


def test_state_is_a_tail_and_known_variables_are_left_alone() -> None:
    opt, params = built(use_ema=True, amsgrad=True, gradient_accumulation_steps=2)
    before = {name: (value, value.copy()) for name, value in opt.named_variables().items()}
    c, d, e = np.ones(2), np.ones(()), np.ones(1)
    opt.extend(params)  # nothing new
    opt.extend(list(params.values()))
    assert list(opt.named_variables()) == list(before)
    assert "extensions" not in opt.get_config()
    opt.extend({"c": c, **params, "d": d})
    opt.extend([e])
    state = opt.named_variables()
    for name, (value, copied) in before.items():
        assert state[name] is value and np.array_equal(value, copied)
    assert list(state)[len(before) :] == [
        *("extension", "c_average", "d_average"),
        *("c_gradient_accumulator", "d_gradient_accumulator"),
        *("c_momentum", "c_velocity", "d_momentum", "d_velocity"),
        *("c_velocity_hat", "d_velocity_hat"),
        *("extension_1", "variable_average", "variable_gradient_accumulator"),
        *("variable_momentum", "variable_velocity", "variable_velocity_hat"),
    ]
    counts = [state["extension"], state["extension_1"]]
    assert [(int(x), x.dtype) for x in counts] == [(1, np.int64), (1, np.int64)]  # 3 calls // 2
    config = opt.get_config()
    assert config["extensions"] == [["c", "d"], ["variable"]]
    assert json.loads(json.dumps(config)) == config
    # The order of a list that has all is that of `apply`.
    opt.apply([np.zeros(2), np.zeros(2), np.zeros((1, 1)), np.zeros(()), np.zeros(1)])
    opt.finalize_variable_values([c])
    assert c.tolist() == [1.0, 1.0]


def test_before_the_build_it_is_the_build() -> None:
    for given in ({"w": np.ones(2)}, [np.ones(2)]):
        one, other = Adam(), Adam()
        one.build(given)
        other.extend(given)
        assert list(one.named_variables()) == list(other.named_variables())
    Adam().extend([])


def test_refused_with_nothing_changed() -> None:
    torch = pytest.importorskip("torch")
    opt, params = built(use_ema=True)
    frozen = np.ones(2)
    frozen.flags.writeable = False
    twice = np.ones(3)
    before = [*opt.named_variables().items(), *opt.get_weights()]
    for wrong, kind, message in (
        ({"a": np.ones(2)}, ValueError, "'a'.*a name under which this optimizer has another"),
        ({"c": params["a"][:1]}, ValueError, "'c'.*'a'.*overlap"),
        ({"c": opt.variables[-1]}, ValueError, "'b'.*'c'.*overlap"),
        ({"c": frozen}, ValueError, "'c'.*read-only"),
        ({"c": twice, "d": twice}, ValueError, "same object"),
        ({"c": torch.zeros(2)}, TypeError, "one library.*numpy.*torch"),
        ({"c": np.arange(3)}, TypeError, "'c' must be float"),
        ({"c": [1.0]}, TypeError, "'c' must be a variable of one of"),
        ({"": np.ones(1)}, TypeError, "non-empty strings"),
        ({"good": np.ones(1), "c": frozen}, ValueError, "read-only"),
        ([np.ones(1), torch.zeros(1)], TypeError, "one library"),
        (3, TypeError, "given as a list"),
    ):
        with pytest.raises(kind, match=message):
            opt.extend(wrong)
    now = [*opt.named_variables().items(), *opt.get_weights()]
    for one, other in zip(before, now, strict=True):
        same = one[1] is other[1] if isinstance(one, tuple) else np.array_equal(one, other)
        assert same
    assert "extensions" not in opt.get_config()
    assert opt.apply_gradients([(np.ones(2), params["a"])]) == 4


def test_a_failure_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, params = built()
    before = list(opt.named_variables())
    with monkeypatch.context() as patch:
        kind = type(opt._state.backend)
        patch.setattr(kind, "zeros", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            opt.extend({"c": np.ones(2)})
    assert list(opt.named_variables()) == before
    assert opt.apply_gradients([(np.ones(2), params["a"])]) == 4
    opt.extend({"c": np.ones(2)})


def test_a_build_of_ones_own_cannot_be_extended() -> None:
    class Own(Optimizer):
        def build(self, variables: Any) -> None:
            super().build(variables)
            self.momentums = self.add_optimizer_variables(variables, "momentum")

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            self.assign_sub(variable, learning_rate * gradient)

    opt, w = Own(0.1), np.ones(2)
    opt.extend([w])  # the build
    opt.apply([np.ones(2)])
    opt.extend([w])
    with pytest.raises(ValueError, match=r"Own has a `build` of its own"):
        opt.extend([np.ones(3)])


def test_the_error_for_unknown_variables_names_it() -> None:
    opt, _ = built()
    with pytest.raises(ValueError, match=r"Unknown variable.*add others by extend\(variables\)"):
        opt.apply_gradients([(np.ones(3), np.ones(3))])


# --- numbers of steps ----------------------------------------------------------------------------


def test_an_update_step_of_ones_own_and_that_of_adam() -> None:
    class Descent(Optimizer):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            self.assign_sub(variable, learning_rate * gradient)

    opt, w, later = Descent(0.5, use_ema=True, ema_momentum=0.5), np.ones(2), np.ones(2)
    opt.apply_gradients([(np.ones(2), w)])
    opt.extend([later])
    opt.apply_gradients([(np.ones(2), w), (np.ones(2), later)])
    assert (w.tolist(), later.tolist()) == ([0.0, 0.0], [0.5, 0.5])
    averages = [v.tolist() for n, v in opt.named_variables().items() if n.endswith("average")]
    assert averages == [[0.25, 0.25], [0.5, 0.5]]

    adam, params = built()
    c = np.zeros(1)
    adam.extend([c])
    for variable, step in ((params["b"], -0.1), (c, -0.1)):
        before = variable.copy()
        adam.update_step(np.ones_like(variable), variable, 0.1)
        if variable is c:
            assert np.allclose(variable - before, step)


def test_in_the_middle_of_an_accumulation() -> None:
    """As if the variable had had no gradient in the calls before: the mean is over all n."""
    ends = []
    for at in (3, 4, 5):
        opt, params = built(gradient_accumulation_steps=3)
        c = np.array([1.0, 2.0])
        for call in range(3, 9):
            if call == at:
                opt.extend({"c": c})
            g = None if call < 5 else np.array([1.0, -0.25 * call])
            pairs = [(np.ones(2), params["a"]), (np.ones((1, 1)), params["b"])]
            opt.apply_gradients(pairs + [(g, c)] * (call >= at))
        ends.append([c, *(np.asarray(x) for x in opt.get_weights())])
    for other in ends[1:]:
        assert all(
            one.tobytes() == each.tobytes() for one, each in zip(ends[0], other, strict=True)
        )
    state = dict(zip(opt.named_variables(), ends[0][1:], strict=True))
    # Of three calls one had a gradient, and then of three all.
    first, then = np.array([1.0, -1.25]) / 3, np.array([1.0, -0.25 * 7])
    assert np.allclose(state["c_momentum"], 0.9 * 0.1 * first + 0.1 * then)


def test_a_count_that_is_set_back() -> None:
    opt, _ = built()
    c = np.zeros(1)
    opt.extend([c])
    opt.assign(opt._state.iteration, 0)
    opt.apply_gradients([(np.ones(1), c)])
    assert np.allclose(c, -0.1)


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that comes later, beside another, is to the bit as an array is."""
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")  # what is noted of a step is the same
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((9, 3)).astype(np.float32) for _ in range(2)]
    arrays, tables = [v.copy() for v in values], [Table(v) for v in values]
    opts = [Adam(0.01, weight_decay=0.1, global_clipnorm=1.0) for _ in range(2)]
    for step in range(40):
        slices = [
            IndexedSlices(rng.standard_normal((3, 3)), rng.integers(0, 9, 3), (9, 3))
            for _ in range(2)
        ]
        for opt, own in zip(opts, (arrays, tables), strict=True):
            if step == 7:
                opt.extend(own)
            count = 1 if step < 7 else 2
            opt.apply_gradients(list(zip(slices[:count], own[:count], strict=True)))
    for array, table in zip(arrays, tables, strict=True):
        assert np.asarray(table).tobytes() == array.tobytes()
    for one, other in zip(*(opt.get_weights() for opt in opts), strict=True):
        assert one.tobytes() == other.tobytes()


# --- copies, configs -----------------------------------------------------------------------------


def steps_of(opt: Adam, params: dict[str, Any], steps: range) -> None:
    for step in steps:
        rng = np.random.default_rng(step)
        opt.apply_gradients([(rng.standard_normal(v.shape), v) for v in params.values()])


EVERYTHING = {"use_ema": True, "amsgrad": True, "gradient_accumulation_steps": 2}


def extended() -> tuple[Adam, dict[str, Any]]:
    """Two extensions, one in the middle of an accumulation."""
    opt, params = built(**EVERYTHING)
    for name, at in (("c", 3), ("d", 6)):
        params[name] = np.full(3, 0.5)
        opt.extend(params if name == "c" else {"d": params["d"]})
        steps_of(opt, params, range(at, at + 3))
    return opt, params


@pytest.mark.parametrize("order", ["abcd", "dacb"])
def test_rebuilt_from_a_config(order: str) -> None:
    opt, params = extended()
    again = Adam.from_config(json.loads(json.dumps(opt.get_config())))
    assert again.get_config() == opt.get_config()
    own = {name: params[name].copy() for name in order}
    again.build(own)
    assert again.get_config() == opt.get_config()
    assert list(again.named_variables()) == list(opt.named_variables())
    again.set_weights(opt.get_weights())
    steps_of(opt, params, range(20, 25))
    steps_of(again, {name: own[name] for name in params}, range(20, 25))
    for name, value in params.items():
        assert own[name].tobytes() == value.tobytes()
    for one, other in zip(opt.get_weights(), again.get_weights(), strict=True):
        assert one.tobytes() == other.tobytes()


def test_built_from_a_config_without_some() -> None:
    opt, params = extended()
    config = opt.get_config()
    again = Adam.from_config(config)
    again.build({name: params[name].copy() for name in "ab"})  # as the first one was
    assert "extensions" not in again.get_config()
    config["extensions"] = [["c", "d"]]
    again = Adam.from_config(config)
    with pytest.raises(ValueError, match=r"\['c', 'd'\].*Received of them \['c'\]"):
        again.build({name: params[name].copy() for name in "abc"})
    assert not again.built
    again.build({name: params[name].copy() for name in "abcd"})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies(copied: Callable[[Adam], Adam]) -> None:
    opt, params = extended()
    again, own = copied(copied(opt)), {name: value.copy() for name, value in params.items()}
    again.build(own)
    assert list(again.named_variables()) == list(opt.named_variables())
    for each, variables_ in ((opt, params), (again, own)):
        variables_["e"] = np.ones(2)
        each.extend(variables_)  # before the copy has made a step
        steps_of(each, variables_, range(20, 25))
    for name, value in params.items():
        assert own[name].tobytes() == value.tobytes()
    for one, other in zip(opt.get_weights(), again.get_weights(), strict=True):
        assert one.tobytes() == other.tobytes()


# --- as a function of values, and in functions that are compiled ---------------------------------


def test_stateless() -> None:
    """`[*state, *opt.variables[len(state):]]` goes on, and equals a run in place."""
    opt, params = built(**EVERYTHING)
    c = np.array([1.0, -1.0])
    other = Adam(0.1, **EVERYTHING)
    values = {"a": np.array([1.0, -2.0]), "b": np.array([[0.5]])}
    other.build(values)
    state, now = other.variables, list(values.values())
    for step in range(3):
        now, state = other.stateless_apply(state, [np.array([0.5, step]), np.array([[-1.0]])], now)
    opt.extend({"c": c})
    other.extend({"c": c.copy()})
    state, now = [*state, *other.variables[len(state) :]], [*now, c.copy()]
    for step in range(3, 8):
        g = [np.random.default_rng(step).standard_normal(v.shape) for v in now]
        opt.apply(g)
        now, state = other.stateless_apply(state, g, now)
    for one, each in zip([*params.values(), c, *opt.variables], [*now, *state], strict=True):
        assert np.asarray(one).tobytes() == np.asarray(each).tobytes()
    assert int(state[len(opt.variables) - 6]) == 1


def test_stateless_on_jax_with_donated_arrays() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    opt = Adam(0.1, **EVERYTHING)
    params = {"a": jnp.ones(2), "b": jnp.ones((1, 1))}
    opt.build(params)
    step = jax.jit(opt.stateless_apply, donate_argnums=(0, 2))
    oracle = Case({"learning_rate": 0.1, **EVERYTHING}).reference([np.ones(2), np.ones((1, 1))])
    state, now = opt.variables, list(params.values())
    for i in range(9):
        if i == 5:
            known = dict(zip("ab", now, strict=True))
            with pytest.raises(ValueError, match=r"'a'.*another name"):
                opt.extend({"a": jnp.ones(3)})
            opt.extend({**known, "c": jnp.full(3, 0.5)})
            state, now = [*state, *opt.variables[len(state) :]], [*now, jnp.full(3, 0.5)]
            oracle.extend([np.full(3, 0.5)])
        g = [np.random.default_rng(i).standard_normal(v.shape).astype("float32") for v in now]
        now, state = step(state, list(map(jnp.array, g)), now)
        oracle.step(g)
    assert_close(list(map(np.asarray, now)), oracle)
    names = list(opt.named_variables())
    assert int(state[names.index("extension")]) == 2


def test_in_jax_jit() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    a, b = (jax.new_ref(jnp.ones(n)) for n in (2, 3))
    opt = Adam(0.1, global_clipnorm=1.0)
    oracle = Case({"learning_rate": 0.1, "global_clipnorm": 1.0}).reference([np.ones(2)])
    opt.build([a])

    @jax.jit
    def wrong(g: Any) -> Any:
        opt.extend([b])
        return g

    @jax.jit
    def alone(g: Any) -> Any:
        return opt.apply_gradients([(g, a)])

    @jax.jit
    def both(one: Any, other: Any) -> Any:
        return opt.apply_gradients([(one, a), (other, b)])

    for i in range(7):
        g = [np.random.default_rng(i).standard_normal(n).astype("float32") for n in (2, 3)]
        if i == 3:
            before = list(opt.named_variables())
            with pytest.raises(ValueError, match=r"`extend`.*outside of compiled functions"):
                wrong(g[0])
            assert list(opt.named_variables()) == before
            opt.extend([b])
            oracle.extend([np.ones(3)])
        if i < 3:
            alone(g[0])
            oracle.step(g[:1])
        else:
            both(*g)
            oracle.step(g)
    assert_close([np.asarray(v[...]) for v in (a, b)], oracle)


def test_in_a_tf_function(monkeypatch: pytest.MonkeyPatch) -> None:
    tf = pytest.importorskip("tensorflow")
    from omniadam.fast.tensorflow import FastTensorFlow

    monkeypatch.setattr(FastTensorFlow, "jit_compile", False)
    a, b = (tf.Variable(np.ones(n, np.float32)) for n in (2, 3))
    settings = {"learning_rate": 0.1, "global_clipnorm": 1.0, "gradient_accumulation_steps": 2}
    opt, oracle = Adam(**settings), Case(settings).reference([np.ones(2)])
    opt.build([a])

    @tf.function
    def wrong() -> None:
        opt.extend([b])

    @tf.function
    def alone(g: Any) -> Any:
        return opt.apply_gradients([(g, a)])

    @tf.function
    def both(one: Any, other: Any) -> Any:
        return opt.apply_gradients([(one, a), (other, b)])

    for i in range(8):
        g = [np.random.default_rng(i).standard_normal(n).astype("float32") for n in (2, 3)]
        if i == 3:
            before = list(opt.named_variables())
            with pytest.raises(ValueError, match=r"`extend`.*outside of a tf.function"):
                wrong()
            assert list(opt.named_variables()) == before
            opt.extend([b])
            oracle.extend([np.ones(3)])
            monkeypatch.setattr(FastTensorFlow, "jit_compile", True)
        if i < 3:
            alone(tf.constant(g[0]))
            oracle.step(g[:1])
        else:
            both(*map(tf.constant, g))
            oracle.step(g)
    assert_close([v.numpy() for v in (a, b)], oracle)
    monkeypatch.setattr(FastTensorFlow, "jit_compile", False)
    # As a function: of values, whose count is not the optimizer's.
    again = Adam(0.1)
    again.build([a])
    state, now = [v.read_value() for v in again.variables], [tf.constant(a)]
    now, state = again.stateless_apply(state, [tf.ones(2)], now)
    again.extend([b])
    state = [*state, *(v.read_value() for v in again.variables[len(state) :])]
    now, state = again.stateless_apply(state, [tf.ones(2), tf.ones(3)], [*now, tf.ones(3)])
    np.testing.assert_allclose(now[1], 0.9, rtol=1e-6)
    assert int(state[4]) == 1


# --- the other interfaces ------------------------------------------------------------------------


def test_of_tensorflow_2_0() -> None:
    """One count for all, as a step with new variables has it."""
    ends = []
    for ahead in (False, True):
        opt, params = optimizer_v2.Adam(0.1, amsgrad=True), [np.ones(2), np.ones(1)]
        for step in range(5):
            now = params if step > 2 else params[:1]
            if step == 3 and ahead:
                opt.extend({"b": params[1], "a": params[0]})
            opt.apply_gradients([(np.full(w.shape, step - 2.5), w) for w in now])
        ends.append([*params, *opt.get_weights()])
        with pytest.raises(TypeError, match="one library"):
            opt.extend([pytest.importorskip("torch").zeros(1)])
        assert len(opt.get_weights()) == 7
    assert all(np.array_equal(one, other) for one, other in zip(*ends, strict=True))
    fresh = optimizer_v2.Adam()
    fresh.extend([])
    fresh.extend([np.ones(2)])
    assert len(fresh.get_weights()) == 3


def test_of_torch_it_leads_on() -> None:
    torch = pytest.importorskip("torch")
    import omniadam.torch

    opt = omniadam.torch.Adam([torch.nn.Parameter(torch.zeros(2))])
    assert not hasattr(opt, "extend")
    with pytest.raises(AttributeError, match=r"'extend'.*add_param_group"):
        opt.extend([torch.nn.Parameter(torch.zeros(2))])
