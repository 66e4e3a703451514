"""State: its order and names, and that whatever carries it elsewhere carries all of it."""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases import Case, InverseTime, assert_close, gradients, variables
from omniadam import Adam, AdamW, IndexedSlices, Optimizer, schedules
from reference import Array, Reference

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")

SHAPES = {"dense/kernel": (3, 4), "dense/bias": (4,), "scale": ()}
Arrays = dict[str, Array]

# Exact in float32, so that Keras, which keeps some of them in float32, computes with the same.
EXACT: dict[str, Any] = {
    "learning_rate": 2.0**-7,
    "beta_1": 0.875,
    "beta_2": 0.9921875,
    "epsilon": 2.0**-20,
}
# A slot of every kind, and everything that a step does; accumulation over three calls.
EVERYTHING = EXACT | {
    "amsgrad": True,
    "weight_decay": 0.5,
    "global_clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.75,
    "ema_overwrite_frequency": 2,
    "loss_scale_factor": 256.0,
    "gradient_accumulation_steps": 3,
}
SCHEDULE = schedules.InverseTimeDecay(2.0**-6, 4, 0.5)


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel matters, the fixture `kernel` says otherwise."""
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")


def arrays(dtype: str = "float32") -> Arrays:
    return dict(zip(SHAPES, variables(dtype, 0, tuple(SHAPES.values())), strict=True))


def grads(step: int, dtype: str = "float32") -> list[Array]:
    return gradients(step, tuple(SHAPES.values()), dtype=dtype)


def train(opt: Any, params: Mapping[str, Any], start: int, stop: int) -> None:
    for step in range(start, stop):
        dtype = "float64" if "float64" in str(next(iter(params.values())).dtype) else "float32"
        opt.apply_gradients(zip(grads(step, dtype), params.values(), strict=True))


def bits(opt: Optimizer, params: Mapping[str, Array]) -> dict[str, tuple[Any, ...]]:
    """Everything that a step may change, to the bit."""
    values = {**params, **dict(zip(opt.named_variables(), opt.get_weights(), strict=True))}
    return {name: (v.dtype, v.shape, v.tobytes()) for name, v in values.items()}


def keras_variables(params: Mapping[str, Array]) -> dict[str, Any]:
    import keras

    found = {}
    for path, value in params.items():
        *scopes, name = path.split("/")
        with ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(keras.name_scope(scope))
            found[path] = keras.Variable(value, name=name, dtype=str(value.dtype))
        assert found[path].path == path
    return found


# --- Order and names -----------------------------------------------------------------------------


def test_order_of_state() -> None:
    opt = Adam(**EVERYTHING)
    opt.build({"a/b": np.zeros(2), "c": np.zeros(3)})
    assert list(opt.named_variables()) == [
        "iteration",
        "learning_rate",
        "a_b_average",
        "c_average",
        "a_b_gradient_accumulator",
        "c_gradient_accumulator",
        "a_b_momentum",
        "a_b_velocity",
        "c_momentum",
        "c_velocity",
        "a_b_velocity_hat",
        "c_velocity_hat",
    ]
    for each, same, named in zip(
        opt.variables, opt.weights, opt.named_variables().values(), strict=True
    ):
        assert each is same is named
    opt.variables[4][...] = 7.0  # these are the slots themselves, and get_weights copies of them
    assert opt.get_weights()[4].tolist() == [7.0, 7.0]
    opt.get_weights()[4][...] = 8.0
    assert opt.variables[4].tolist() == [7.0, 7.0]


@pytest.mark.needs("keras")
@pytest.mark.parametrize("rate", ["number", "schedule", "callable"])
@pytest.mark.parametrize(
    ("use_ema", "steps", "amsgrad"), list(product([False, True], [None, 2], [False, True]))
)
def test_order_of_state_is_that_of_keras(
    use_ema: bool, steps: int | None, amsgrad: bool, rate: str
) -> None:
    import keras

    settings: dict[str, Any] = {
        "use_ema": use_ema,
        "gradient_accumulation_steps": steps,
        "amsgrad": amsgrad,
    }
    rates = {"number": 0.5, "callable": lambda: 0.5}
    rates["schedule"] = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    ours, theirs = (kind(rates[rate], **settings) for kind in (Adam, keras.optimizers.Adam))
    assert list(ours.named_variables()) == [v.name for v in theirs.variables]
    ours.build(arrays())
    theirs.build(list(keras_variables(arrays()).values()))
    assert list(ours.named_variables()) == [v.name for v in theirs.variables]
    assert [v.shape for v in ours.variables] == [v.shape for v in theirs.variables]
    assert [v.dtype.kind for v in ours.get_weights()] == [
        np.dtype(v.dtype).kind for v in theirs.variables
    ]


@pytest.mark.needs("keras")
def test_variables_without_names_are_called_as_in_keras() -> None:
    import keras

    theirs, ours = keras.optimizers.Adam(), Adam()
    keras.utils.clear_session()
    theirs.build([keras.Variable(w) for w in arrays().values()])
    ours.build(list(arrays().values()))
    assert list(ours.named_variables()) == [v.name for v in theirs.variables]


def test_time_to_build_grows_with_the_number_of_variables_alone() -> None:
    def seconds(count: int) -> float:
        params = [np.ones(1) for _ in range(count)]
        start = time.process_time()
        Adam().build(params)
        return time.process_time() - start

    few, many = (min(seconds(count) for _ in range(3)) for count in (1500, 6000))
    assert many < 8 * few


def test_names_that_sanitise_to_the_same_are_told_apart() -> None:
    opt = Adam()
    opt.build({"a/b": np.zeros(1), "a_b": np.zeros(2)})
    assert list(opt.named_variables())[2:] == [
        *("a_b_momentum", "a_b_velocity", "a_b_momentum_1", "a_b_velocity_1")
    ]


# --- Config --------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "learning_rate": {"learning_rate": 0.25},
    "betas": {"beta_1": 0.5, "beta_2": 0.75, "epsilon": 0.25},
    "amsgrad": {"amsgrad": True},
    "clipnorm": {"clipnorm": 1.5},
    "clipvalue": {"clipvalue": 1.5},
    "everything": EVERYTHING,
    "name": {"name": "mine"},
}
SCHEDULES = {
    "ExponentialDecay": (0.5, 10, 0.5, True),
    "PiecewiseConstantDecay": ([2, 4], [0.5, 0.25, 0.125]),
    "PolynomialDecay": (0.5, 10, 0.25, 2.0, True),
    "InverseTimeDecay": (0.5, 10, 0.5, True),
    "CosineDecay": (0.5, 10, 0.25, "CosineDecay", 1.0, 2),
    "CosineDecayRestarts": (0.5, 10, 2.0, 0.5, 0.25),
}


@pytest.mark.needs("keras")
@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("name", SETTINGS)
def test_config_is_that_of_keras(kind: type[Adam], name: str) -> None:
    import keras

    theirs = getattr(keras.optimizers, kind.__name__)
    settings = {"name": "adam"} | SETTINGS[name]
    want, got = theirs(**settings).get_config(), kind(**settings).get_config()
    assert got == want | {"learning_rate": pytest.approx(want["learning_rate"], rel=1e-7)}
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in want.items()}
    assert theirs.from_config(dict(got)).get_config() == want
    assert kind.from_config(want).get_config() == want
    assert kind.from_config(json.loads(json.dumps(got))).get_config() == got


@pytest.mark.needs("keras")
@pytest.mark.parametrize("name", SCHEDULES)
def test_config_with_a_schedule_is_that_of_keras(name: str) -> None:
    import keras

    theirs = getattr(keras.optimizers.schedules, name)(*SCHEDULES[name])
    ours = getattr(schedules, name)(*SCHEDULES[name])
    want = keras.optimizers.Adam(theirs, name="adam").get_config()
    assert Adam(ours).get_config() == Adam(theirs).get_config() == want
    assert Adam.from_config(want).get_config() == want
    assert Adam.from_config(want)._schedule == ours
    there = keras.optimizers.Adam.from_config(Adam(ours).get_config())
    assert type(there._learning_rate) is type(theirs)
    assert there.get_config() == want
    assert json.loads(json.dumps(want)) == want


def test_from_config_leaves_the_config_alone() -> None:
    config = Adam(SCHEDULE, weight_decay=0.5).get_config()
    config["exclude_from_weight_decay"] = {"var_names": ["bias"], "variables": []}
    before = copy.deepcopy(config)
    assert Adam.from_config(config).get_config() == config == before


class OwnSchedule(schedules.LearningRateSchedule):
    def __init__(self, peak: float) -> None:
        self.peak = peak

    def __call__(self, step: Any) -> Any:
        return self.peak / (step + 1)

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak}


def test_config_with_an_own_schedule_or_a_callable() -> None:
    config = Adam(OwnSchedule(0.5)).get_config()
    again = Adam.from_config(config, custom_objects={"OwnSchedule": OwnSchedule})
    assert again.learning_rate == 0.5 and again.get_config() == config
    with pytest.raises(ValueError, match=r"Received: 'OwnSchedule'.* custom_objects"):
        Adam.from_config(config)

    def rate() -> float:
        return 0.5

    opt = Adam(rate, beta_1=rate)
    assert opt.get_config()["learning_rate"] is opt.get_config()["beta_1"] is rate
    assert Adam.from_config(opt.get_config()).learning_rate == 0.5


def test_config_after_a_change_of_settings() -> None:
    opt = Adam(clipnorm=1.0)
    opt.learning_rate, opt.beta_1, opt.clipnorm, opt.clipvalue = 0.5, 0.25, None, 2
    config = Adam(0.5, 0.25, clipvalue=2.0).get_config()
    assert opt.get_config() == config


@pytest.mark.parametrize("rate", [0.25, SCHEDULE, OwnSchedule(1.0), len])
def test_repr_shows_the_settings_in_any_state(rate: Any) -> None:
    opt = Adam(rate, weight_decay=0.5)
    opt.exclude_from_weight_decay(var_list=[np.zeros(1)])
    assert repr(opt).startswith(f"Adam(learning_rate={rate!r}, name='adam', weight_decay=0.5, ")


# --- Carried elsewhere ---------------------------------------------------------------------------

Carrier = Callable[[Adam, Arrays, Path], tuple[Adam, Arrays]]


def copies(params: Arrays) -> Arrays:
    return {name: w.copy() for name, w in params.items()}


def from_config(opt: Adam, params: Arrays) -> tuple[Adam, Arrays]:
    config = json.loads(json.dumps(opt.get_config()))
    other, params = type(opt).from_config(config), copies(params)
    other.build(params)
    return other, params


def by_weights(opt: Adam, params: Arrays, folder: Path) -> tuple[Adam, Arrays]:
    other, params = from_config(opt, params)
    other.set_weights(opt.get_weights())
    return other, params


def by_dict(opt: Adam, params: Arrays, folder: Path) -> tuple[Adam, Arrays]:
    store: dict[str, Array] = {}
    opt.save_own_variables(store)
    assert list(store) == [str(i) for i in range(len(opt.variables))]
    other, params = from_config(opt, params)
    other.load_own_variables(dict(reversed(store.items())))
    return other, params


def by_h5py(opt: Adam, params: Arrays, folder: Path) -> tuple[Adam, Arrays]:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "state.h5", "w") as file:
        opt.save_own_variables(file.create_group("optimizer"))
    other, params = from_config(opt, params)
    with h5py.File(folder / "state.h5") as file:
        other.load_own_variables(file["optimizer"])
    return other, params


CARRIERS: dict[str, Carrier] = {
    "weights": by_weights,
    "dict": by_dict,
    "h5py": by_h5py,
    "pickle": lambda opt, params, _: (pickle.loads(pickle.dumps(opt)), copies(params)),
    "deepcopy": lambda opt, params, _: (copy.deepcopy(opt), copies(params)),
    "pickle with variables": lambda opt, params, _: pickle.loads(pickle.dumps((opt, params))),
    "copy of a copy": lambda opt, params, _: (copy.copy(copy.deepcopy(opt)), copies(params)),
}


def excluding(settings: dict[str, Any]) -> Adam:
    opt = Adam(**settings)
    opt.exclude_from_weight_decay(var_names=["bias"])
    return opt


@pytest.mark.parametrize("at", [1, 4, 6])  # of 8 calls; 4 is in the middle of an accumulation
@pytest.mark.parametrize("settings", ["number", "schedule", "everything", "halves"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_continuing_is_as_never_stopped(
    carrier: str, settings: str, at: int, kernel: str, tmp_path: Path
) -> None:
    dtype = "float16" if settings == "halves" else "float32"
    chosen: Any = {"schedule": EVERYTHING | {"learning_rate": SCHEDULE}, "everything": EVERYTHING}
    params, opt = arrays(dtype), excluding(chosen.get(settings, {}))
    opt.build(params)
    train(opt, params, 0, at)
    saved = bits(opt, params)
    other, others = CARRIERS[carrier](opt, params, tmp_path)
    assert [w.tobytes() for w in other.get_weights()] == [w.tobytes() for w in opt.get_weights()]
    assert (other.iterations, other.learning_rate) == (opt.iterations, opt.learning_rate)
    assert other.get_config() == opt.get_config()
    train(other, others, at, 8)
    assert bits(opt, params) == saved  # nothing is shared with what it was carried to
    train(opt, params, at, 8)
    assert bits(other, others) == bits(opt, params)


@pytest.mark.parametrize("carrier", [pickle.dumps, copy.deepcopy])
def test_before_it_is_built(carrier: Callable[[Any], Any]) -> None:
    opt = excluding({"weight_decay": 0.5})
    opt.learning_rate = 0.25
    copied = carrier(opt)
    other = pickle.loads(copied) if isinstance(copied, bytes) else copied
    assert not other.built
    assert other.get_config() == opt.get_config()
    assert [w.tolist() for w in other.get_weights()] == [0, 0.25]
    one, two = arrays(), arrays()
    for each, params in ((opt, one), (other, two)):
        each.build(params)
        train(each, params, 0, 2)
    assert bits(opt, one) == bits(other, two)
    other.learning_rate = 0.5
    assert opt.learning_rate == 0.25


def restored(settings: dict[str, Any] = EVERYTHING) -> tuple[Adam, Arrays, Adam]:
    """An optimizer after 4 calls, its variables, and the optimizer from a pickle of it."""
    opt, params = Adam(**settings), arrays()
    opt.build(params)
    train(opt, params, 0, 4)
    return opt, params, pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w: dict(list(w.items())[:2]), "Received 2 variables, of which number 0 is"),
        (lambda w: w | {"more": np.zeros(1)}, "Received 4 variables"),
        (lambda w: dict(reversed(w.items())), r"number 0 is \('scale', \(\), 'float32'\)"),
        (lambda w: w | {"scale": np.zeros(3, "f")}, r"number 2 is \('scale', \(3,\), 'float32'\)"),
        (lambda w: w | {"scale": np.zeros(())}, r"number 2 is \('scale', \(\), 'float64'\)"),
        (lambda w: {f"my_{k}": v for k, v in w.items()}, r"number 0 is \('my_dense/kernel'"),
    ],
)
def test_a_copy_refuses_variables_it_has_no_state_for(
    change: Callable[[Arrays], Arrays], part: str
) -> None:
    opt, params, other = restored()
    before = [w.tobytes() for w in other.get_weights()]
    with pytest.raises(ValueError, match=r"belongs to 3 variables, of which number .*" + part):
        other.build(change(params))
    assert not other.built
    assert [w.tobytes() for w in other.get_weights()] == before
    others = copies(params)
    train(opt, params, 4, 6)
    train(other, others, 4, 6)
    assert bits(opt, params) == bits(other, others)


def test_a_copy_is_built_on_all_variables_then_takes_some() -> None:
    opt, params, other = restored()
    others = copies(params)
    with pytest.raises(ValueError, match=r"with build\(variables\); afterwards a step"):
        other.apply(grads(4)[:1], list(others.values())[:1])
    other.build(list(others.values()))  # the names are known
    assert list(other.named_variables()) == list(opt.named_variables())
    for each, those in ((opt, params), (other, others)):
        each.apply(grads(4)[:1], list(those.values())[:1])
        train(each, those, 5, 7)
    assert bits(opt, params) == bits(other, others)


def test_settings_of_a_copy_may_change_before_it_is_built() -> None:
    opt, params, other = restored()
    others = copies(params)
    opt.learning_rate = other.learning_rate = SCHEDULE
    opt.global_clipnorm = other.global_clipnorm = 0.25
    train(opt, params, 4, 8)
    train(other, others, 4, 8)
    assert bits(opt, params) == bits(other, others)


def test_a_copy_does_not_make_up_state() -> None:
    other = restored({})[2]
    other.use_ema = True
    with pytest.raises(ValueError, match=r"has no 'dense_kernel_average' of shape \(3, 4\)"):
        train(other, arrays(), 4, 5)
    assert not other.built
    other.use_ema = False
    train(other, arrays(), 4, 5)
    assert other.iterations == 5


def test_the_values_of_a_copy_can_be_set() -> None:
    opt, params, other = restored()
    other.build(others := copies(params))
    weights = [w * 2 for w in opt.get_weights()]
    for each, those in ((opt, params), (other, others)):
        each.set_weights(weights)
        train(each, those, 8, 9)
    assert bits(opt, params) == bits(other, others)


def host(variable: Any) -> Array:
    return variable if isinstance(variable, np.ndarray) else variable.numpy()


@pytest.mark.needs("keras")
@pytest.mark.parametrize("name", ["plain", "everything", "schedule"])
@pytest.mark.parametrize("order", ["to Keras", "from Keras"])
def test_state_of_keras_is_ours_and_ours_is_keras(name: str, order: str, kernel: str) -> None:
    """Four calls by one, the state saved and loaded, four by the other: the oracle's eight."""
    import keras

    case = Case(EXACT if name == "plain" else EVERYTHING)
    if name == "schedule":
        case = Case(EVERYTHING | {"learning_rate": InverseTime(2.0**-6, 4, 0.5)})
    params: dict[str, Any] = arrays()
    reference = case.reference(list(params.values()))
    for step in range(8):
        reference.step(grads(step))
    ours = Adam(**case.settings_for(schedules))
    theirs = keras.optimizers.Adam(**case.settings_for(keras.optimizers.schedules))
    names: list[str] = []
    store: dict[str, Any] = {}
    for start, opt in enumerate([ours, theirs] if order == "to Keras" else [theirs, ours]):
        params = params if opt is ours else keras_variables(params)
        opt.build(params if opt is ours else list(params.values()))
        names = list(ours.named_variables()) if opt is ours else [v.name for v in opt.variables]
        if store:
            opt.load_own_variables(store)
            assert [host(v).tolist() for v in opt.variables] == [v.tolist() for v in store.values()]
        train(opt, params, 4 * start, 4 * start + 4)
        store = {}
        opt.save_own_variables(store)
        params = {path: host(w) for path, w in params.items()}
    assert_close(list(params.values()), reference)
    for slot in reference.state.keys() - {"variable"}:
        found = [names.index(f"{path.replace('/', '_')}_{slot}") for path in SHAPES]
        assert_close([store[str(i)] for i in found], reference, slot)


# --- Weight decay exclusion ----------------------------------------------------------------------

EXCLUSIONS: dict[str, dict[str, Any]] = {
    "all": {"var_names": [""]},
    "names": {"var_names": ["bias", "^sc"]},
    "one name": {"var_names": "kernel"},
    "patterns": {"var_names": ["(?i)BIAS", r"(.)\1"]},
    "list": {"var_list": ["dense/bias"]},
    "both": {"var_list": ["scale"], "var_names": ["bias"]},
    "none": {},
}
EXCLUDED: dict[str, set[str]] = {
    "all": set(SHAPES),
    "names": {"dense/bias", "scale"},
    "one name": {"dense/kernel"},
    "patterns": {"dense/bias"},
    "list": {"dense/bias"},
    "both": {"dense/bias", "scale"},
    "none": set(),
}


@pytest.mark.parametrize("carrier", [None, "weights", "pickle", "deepcopy", "copy of a copy"])
@pytest.mark.parametrize("name", EXCLUSIONS)
def test_exclusion_from_weight_decay(name: str, carrier: str | None, tmp_path: Path) -> None:
    opt: Adam = AdamW(weight_decay=0.5, learning_rate=0.5)
    params, chosen = arrays(), dict(EXCLUSIONS[name])
    if "var_list" in chosen:
        chosen["var_list"] = [params[n] for n in chosen["var_list"]]
    opt.exclude_from_weight_decay(**chosen)
    opt.build(params)
    config = opt.get_config()
    if carrier:
        opt, params = CARRIERS[carrier](opt, params, tmp_path)
    start = copies(params)
    opt.apply([np.zeros_like(w) for w in params.values()], list(params.values()))
    for path, w in params.items():
        assert np.array_equal(w, start[path] * (1 if path in EXCLUDED[name] else 0.75)), path
    assert opt.get_config() == config
    assert ("exclude_from_weight_decay" in config) == bool(EXCLUDED[name])


def test_exclusion_takes_the_place_of_an_earlier_one() -> None:
    opt, params = AdamW(weight_decay=0.5, learning_rate=0.5), arrays()
    opt.exclude_from_weight_decay(var_list=list(params.values()), var_names=["."])
    one: Any = params["dense/bias"]  # a single variable will do
    opt.exclude_from_weight_decay(var_list=one)
    start = copies(params)
    opt.apply([np.zeros_like(w) for w in params.values()], list(params.values()))
    assert [np.array_equal(start[p], params[p]) for p in SHAPES] == [False, True, False]


# --- stateless_apply -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"learning_rate": SCHEDULE}])
def test_stateless_apply_is_apply_and_changes_nothing(settings: dict[str, Any]) -> None:
    opt, params = excluding(settings), arrays()
    opt.build(params)
    train(opt, params, 0, 2)
    state, values, given = opt.get_weights(), copies(params), grads(2)
    before = bits(opt, params)
    for step in range(2, 6):  # a chain of states that the optimizer itself never sees
        inputs = [state, given, list(values.values())]
        kept = copy.deepcopy(inputs)
        new_values, new_state = opt.stateless_apply(*inputs)
        for held, same in zip(inputs, kept, strict=True):
            assert [w.tobytes() for w in held] == [w.tobytes() for w in same]
        assert bits(opt, params) == before
        values = dict(zip(values, new_values, strict=True))
        state, given = new_state, grads(step + 1)
    train(opt, params, 2, 6)
    assert [w.tobytes() for w in values.values()] == [w.tobytes() for w in params.values()]
    assert [w.tobytes() for w in state] == [w.tobytes() for w in opt.get_weights()]


def test_stateless_apply_takes_read_only_values() -> None:
    opt, params = Adam(), arrays()
    opt.build(params)
    values = [np.broadcast_to(w, w.shape) for w in copies(params).values()]
    new, _ = opt.stateless_apply(opt.get_weights(), grads(0), values)
    opt.apply(grads(0))
    assert [w.tobytes() for w in new] == [w.tobytes() for w in params.values()]


# --- The learning rate ---------------------------------------------------------------------------


class Recorded(schedules.LearningRateSchedule):
    """Halves at each call, and remembers for which."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: Any) -> Any:
        self.steps.append(step)
        return 0.5 ** (step + 1)


def test_a_schedule_sees_calls_and_iterations_are_updates() -> None:
    schedule = Recorded()
    opt, params = Adam(schedule, gradient_accumulation_steps=3), arrays()
    for call in range(7):
        assert (opt.iterations, opt.learning_rate) == (call // 3, 0.5 ** (call + 1))
        schedule.steps.clear()
        result = opt.apply_gradients(zip(grads(call), params.values(), strict=True))
        assert result == call + 1 and set(schedule.steps) == {call}
    assert opt.iterations == 2
    assert [name for name in opt.named_variables() if "rate" in name] == []


RATES: dict[str, Callable[[Iterator[float]], Any]] = {
    "ours": lambda rates: SCHEDULE,
    "own": lambda rates: OwnSchedule(0.5),
    "callable": lambda rates: lambda: next(rates),
    "callable of NumPy": lambda rates: lambda: np.float32(next(rates)),
}


@pytest.mark.parametrize("name", [*RATES, "Keras"])
def test_rate_by_schedule_or_callable_is_as_set_by_hand(name: str) -> None:
    if name == "Keras":
        keras = pytest.importorskip("keras")
        rate: Any = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)
    else:
        rate = RATES[name](iter([0.5, 0.25, 0.125, 0.0625]))
    values = [0.5, 0.25, 0.125, 0.0625]
    if "callable" not in name:
        values = [float(rate(step)) for step in range(4)]
    opt, by_hand = Adam(rate, weight_decay=0.5), Adam(0.0, weight_decay=0.5)
    one, two = arrays(), arrays()
    for step, value in enumerate(values):
        train(opt, one, step, step + 1)
        by_hand.learning_rate = value
        assert by_hand.learning_rate == value
        train(by_hand, two, step, step + 1)
    assert [w.tobytes() for w in one.values()] == [w.tobytes() for w in two.values()]


@pytest.mark.parametrize("built", [False, True])
def test_kinds_of_rate_follow_each_other(built: bool) -> None:
    opt, params = Adam(0.5), arrays()
    if built:
        opt.build(params)
    slots = list(opt.named_variables())[2:]
    for rate, present in [(0.25, 0.25), (lambda: 0.125, 0.125), (1, 1.0), (SCHEDULE, 2.0**-6)]:
        opt.learning_rate = rate
        assert opt.learning_rate == present
        number = ["learning_rate"] if isinstance(rate, float | int) else []
        assert list(opt.named_variables()) == ["iteration", *number, *slots]
    opt.learning_rate = OwnSchedule(0.5)
    assert opt.learning_rate == 0.5
    train(opt, params, 0, 1)
    assert opt.learning_rate == 0.25


# --- A subclass written for Keras ----------------------------------------------------------------


def sgd(base: Any) -> Any:
    """The example of Keras's BaseOptimizer, in operators instead of Keras's `ops`."""

    class SGD(base):
        def __init__(self, learning_rate: float = 2.0**-6, momentum: float = 0.75, **kwargs: Any):
            super().__init__(learning_rate=learning_rate, **kwargs)
            self.momentum = momentum

        def build(self, variables: Any) -> None:
            super().build(variables)
            self.momentums = []
            for variable in variables:
                self.momentums.append(
                    self.add_variable_from_reference(reference_variable=variable, name="momentum")
                )

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            m = self.momentums[self._get_variable_index(variable)]
            self.assign(m, m * self.momentum - gradient * learning_rate)
            self.assign_add(variable, m)

        def get_config(self) -> dict[str, Any]:
            return super().get_config() | {"momentum": self.momentum}

    return SGD


OwnSGD = sgd(Optimizer)
OwnSGD.__qualname__ = "OwnSGD"  # where pickle finds it

SUBCLASS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipnorm": {"clipnorm": 1.5},
    "global_clipnorm": {"global_clipnorm": 2.0},
    "clipvalue": {"clipvalue": 0.125},
    "weight_decay": {"weight_decay": 8.0},
    "ema": {"use_ema": True, "ema_momentum": 0.75},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 3},
    "loss_scale": {"loss_scale_factor": 256.0},
    "everything": {
        "weight_decay": 8.0,
        "clipnorm": 1.5,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 2,
        "loss_scale_factor": 2.0,
        "gradient_accumulation_steps": 2,
    },
}


def some(step: int) -> list[Array | None]:
    """The gradients of a step; the second variable goes without on calls 2, 5, ..."""
    found: list[Array | None] = [g / 16 for g in grads(step)]
    if step % 3 == 2:
        found[1] = None
    return found


@pytest.mark.needs("keras")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("name", SUBCLASS)
def test_a_subclass_is_that_of_keras(name: str, kernel: str) -> None:
    import keras

    ours, theirs = OwnSGD(**SUBCLASS[name]), sgd(keras.optimizers.Optimizer)(**SUBCLASS[name])
    params = arrays()
    twins = keras_variables(params)
    ours.build(list(params.values()))
    theirs.build(list(twins.values()))
    for step in range(8):
        ours.apply(some(step), list(params.values()))
        theirs.apply(some(step), list(twins.values()))
    assert len(ours.variables) == len(theirs.variables)
    # Each of 8 steps rounds some ten times, and nothing is larger than 4.
    for got, want in zip(
        [*params.values(), *ours.variables], [*twins.values(), *theirs.variables], strict=True
    ):
        np.testing.assert_allclose(got, host(want), rtol=0, atol=80 * 4 * 2.0**-24)


def test_a_subclass_by_hand() -> None:
    opt = OwnSGD(0.5, weight_decay=0.5, clipvalue=1.0, gradient_accumulation_steps=2)
    w = np.array([4.0])
    for g in (1.0, 3.0, -1.0, 0.0):  # 4 - 4/4 - 1/2 = 2.5; 2.5 - 2.5/4 + (-3/8 + 1/4)
        opt.apply([np.array([g])], [w])
    assert w.tolist() == [1.75]
    assert opt.named_variables()["variable_momentum"].tolist() == [-0.125]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_subclass_takes_sparse_and_other_gradients(dtype: str) -> None:
    slices = IndexedSlices(np.array([[1.0], [2.0], [4.0]]), [1, 1, 2], (4, 1))
    results = []
    for gradient in (slices, slices.to_dense(), slices.to_dense().astype(np.float16)):
        w = np.full((4, 1), 0.5, dtype)
        opt = OwnSGD(0.25, clipnorm=2.5, loss_scale_factor=2.0)  # the norm is 2.5
        opt.apply([gradient], [w])
        opt.apply([gradient], [w])
        results.append((w.tolist(), opt.get_weights()[2].tolist(), opt.get_weights()[2].dtype))
    slot = np.float32 if dtype == "float16" else np.dtype(dtype)
    want = [0.5, 0.5 - 0.375 * 2.75, 0.5 - 0.5 * 2.75, 0.5]
    assert results[0][2] == slot and results[0] == results[1] == results[2]
    assert np.ravel(results[0][0]).tolist() == want


def test_a_subclass_is_carried() -> None:
    opt, params = OwnSGD(use_ema=True, gradient_accumulation_steps=2), arrays()
    train(opt, params, 0, 3)
    for other in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        others = copies(params)
        assert other.momentum == 0.75 and other.iterations == 1
        again, twin = copy.deepcopy((opt, params))
        train(other, others, 3, 6)
        train(again, twin, 3, 6)
        assert [w.tobytes() for w in others.values()] == [w.tobytes() for w in twin.values()]
    other = OwnSGD.from_config(opt.get_config())
    other.build(list((others := copies(params)).values()))
    other.set_weights(opt.get_weights())
    values, _ = opt.stateless_apply(opt.get_weights(), grads(3), list(copies(params).values()))
    train(other, others, 3, 4)
    train(opt, params, 3, 4)
    assert bits(other, others) == bits(opt, params)
    assert [w.tobytes() for w in values] == [w.tobytes() for w in params.values()]


class Own(Adam):
    """Adam through `update_step`, which the fused step does not call, and a slot of its own."""

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.seen = self.add_variable((), dtype="int64", name="seen")
        self.sums = self.add_optimizer_variables(variables, "sum", initializer="ones")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_add(self.seen, 1)
        self.assign_add(self.sums[self._get_variable_index(variable)], gradient)
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("settings", [EXACT, EVERYTHING])
def test_adam_with_an_update_step_of_its_own(
    settings: dict[str, Any], dtype: str, kernel: str
) -> None:
    opt, params = Own(**settings), arrays(dtype)
    reference = Reference(list(params.values()), **settings)
    for step in range(8):
        given = some(step)
        opt.apply(given, list(params.values()))
        reference.step(given)
    assert_close(list(params.values()), reference, dtype=dtype)
    n = settings.get("gradient_accumulation_steps", 1)
    state = opt.named_variables()
    assert state["seen"] == sum(g is not None for s in range(n - 1, 8, n) for g in some(s))
    for slot in reference.state.keys() - {"variable"}:
        found = [v for k, v in state.items() if k.endswith(f"_{slot}")]
        assert_close(found, reference, slot, dtype=dtype)


def test_adam_with_a_slot_of_its_own_is_carried() -> None:
    opt, params = Own(), arrays()
    train(opt, params, 0, 3)
    other, others = pickle.loads(pickle.dumps(opt)), copies(params)
    assert [w.tobytes() for w in other.get_weights()] == [w.tobytes() for w in opt.get_weights()]
    train(opt, params, 3, 5)
    train(other, others, 3, 5)
    assert bits(opt, params) == bits(other, others)
    assert other.seen == 15


def test_a_twice_as_large_gradient_in_update_step() -> None:
    class Doubled(Adam):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(2 * gradient, variable, learning_rate)

    one, two = (Doubled(0.5), arrays()), (Adam(0.5), arrays())
    for step in range(3):
        one[0].apply(grads(step), list(one[1].values()))
        two[0].apply([2 * g for g in grads(step)], list(two[1].values()))
    assert bits(*one) == bits(*two)
