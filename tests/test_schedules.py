"""Schedules: against Keras, against their formulas in exact arithmetic, and traced."""

import copy
import doctest
import inspect
import json
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniadam import Adam, schedules
from omniadam.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
    deserialize,
    serialize,
)

SIX = (
    ExponentialDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
    InverseTimeDecay,
    CosineDecay,
    CosineDecayRestarts,
)

# Every argument of every schedule, in and out of its default.
CASES = [
    ExponentialDecay(0.1, 10, 0.5),
    ExponentialDecay(0.1, 7, 0.96, staircase=True),
    ExponentialDecay(0.1, 41, 0.96, staircase=True),
    ExponentialDecay(0.001, 2.5, 0.9, True),
    ExponentialDecay(0.001, 1000, 1.1),
    ExponentialDecay(0.1, 10, 0.0),
    PiecewiseConstantDecay([10, 20], [1.0, 0.5, 0.1]),
    PiecewiseConstantDecay([0], [0.0, 0.1]),
    PiecewiseConstantDecay([2.5, 41, 100], [0.1, 0.2, 0.0, 0.3], name="steps"),
    PolynomialDecay(0.1, 10),
    PolynomialDecay(0.1, 41, 0.01, power=0.5),
    PolynomialDecay(0.1, 41, 0.01, power=2, cycle=True),
    PolynomialDecay(0.1, 7, 0.0, 0.5, True),
    PolynomialDecay(0.01, 10, 0.1, power=0),
    PolynomialDecay(0.01, 12.5, 0.1, cycle=True),
    InverseTimeDecay(0.1, 1.0, 0.5),
    InverseTimeDecay(0.1, 41, 0.5, staircase=True),
    InverseTimeDecay(0.1, 10, 0.0),
    CosineDecay(0.1, 100),
    CosineDecay(0.1, 41, alpha=0.1),
    CosineDecay(0.1, 41, 2.0, "rising"),
    CosineDecay(0.0, 100, warmup_target=0.1, warmup_steps=10),
    CosineDecay(0.2, 41, 0.5, warmup_target=0.1, warmup_steps=41),
    CosineDecay(0.2, 41, warmup_target=0.1),
    CosineDecay(0.2, 41, warmup_steps=10),
    CosineDecayRestarts(0.1, 10),
    CosineDecayRestarts(0.1, 41, t_mul=1.0, m_mul=0.9),
    CosineDecayRestarts(0.1, 7, 3, 0.5, 0.1),
    CosineDecayRestarts(0.1, 8, t_mul=1.5, m_mul=1.1),
    CosineDecayRestarts(0.1, 10, t_mul=1.25, alpha=0.5, name="sgdr"),
]
STEPS = [*range(130), 150, 151, 200, 217, 218, 310, 311, 319, 320, 999, 1000, 1001]


def peak(schedule):
    """The greatest rate within STEPS."""
    return float(schedule(np.array(STEPS)).max())


def assert_rates(rates, schedule):
    """Rates of STEPS in float32 are those of the schedule in double precision.

    Both are a handful of roundings apart, each of at most 2**-24 of a number not above the peak:
    a step divided by its period, the function of it, the products. A jump on the wrong step would
    be off by a thousandth of the peak or more.
    """
    np.testing.assert_allclose(
        rates, schedule(np.array(STEPS)), rtol=0, atol=2**-20 * peak(schedule)
    )


def label(schedule):
    if not isinstance(schedule, LearningRateSchedule):
        return ""
    config = schedule.get_config()
    return f"{type(schedule).__name__}-{'-'.join(str(value) for value in config.values())}"


each_case = pytest.mark.parametrize("schedule", CASES, ids=label)


# --- Keras -------------------------------------------------------------------------------------

# In a process of its own: the tests next door may have Keras on another library, and Keras warns.
ASK_KERAS = """
import inspect, json, sys
import numpy as np
from keras.optimizers import schedules

answers = {"signatures": {}, "cases": []}
asked = json.load(sys.stdin)
for name in asked["names"]:
    kind = getattr(schedules, name)
    answers["signatures"][name] = [
        [p.name, None if p.default is p.empty else p.default, p.default is p.empty]
        for p in inspect.signature(kind).parameters.values()
    ]
for ours in asked["cases"]:
    schedule = schedules.deserialize(ours)
    answers["cases"].append(
        {
            "serialized": schedules.serialize(schedule),
            "rates": [float(np.asarray(schedule(step))) for step in asked["steps"]],
        }
    )
json.dump(answers, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """What Keras makes of CASES, which it reads from our own serialization."""
    answers = tmp_path_factory.mktemp("keras") / "answers.json"
    question = {
        "names": [kind.__name__ for kind in SIX],
        "cases": [serialize(schedule) for schedule in CASES],
        "steps": STEPS,
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK_KERAS, str(answers)],
        input=json.dumps(question),
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(answers.read_text())


@pytest.mark.parametrize("kind", SIX)
@pytest.mark.needs("keras")
def test_signature_is_that_of_keras(keras, kind):
    ours = [
        [p.name, None if p.default is p.empty else p.default, p.default is p.empty]
        for p in inspect.signature(kind).parameters.values()
    ]
    assert ours == keras["signatures"][kind.__name__]


@each_case
@pytest.mark.needs("keras")
def test_rates_are_those_of_keras(keras, schedule):
    assert_rates(keras["cases"][CASES.index(schedule)]["rates"], schedule)


@each_case
@pytest.mark.needs("keras")
def test_serialization_is_that_of_keras(keras, schedule):
    theirs = keras["cases"][CASES.index(schedule)]["serialized"]
    assert serialize(schedule) == theirs
    assert list(schedule.get_config()) == list(theirs["config"])
    assert deserialize(theirs) == schedule


# --- The formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (ExponentialDecay(0.1, 1000, 0.5), {0: 0.1, 1000: 0.05, 1500: 0.1 / math.sqrt(8)}),
        (ExponentialDecay(0.1, 1000, 0.5, True), {0: 0.1, 999: 0.1, 1000: 0.05, 2999: 0.025}),
        (PiecewiseConstantDecay([10], [1, 0.5]), {0: 1.0, 10: 1.0, 11: 0.5, 10**12: 0.5}),
        (PolynomialDecay(0.1, 100, 0.01, 0.5), {0: 0.1, 75: 0.055, 100: 0.01, 101: 0.01}),
        (
            PolynomialDecay(1.0, 10, 0.0, cycle=True),
            {0: 1.0, 5: 0.5, 10: 0.0, 11: 0.45, 15: 0.25, 20: 0.0, 21: 0.3},
        ),
        (InverseTimeDecay(0.1, 1.0, 0.5), {0: 0.1, 1: 0.1 / 1.5, 2: 0.05, 18: 0.01}),
        (InverseTimeDecay(0.1, 10, 0.5, True), {9: 0.1, 10: 0.1 / 1.5, 29: 0.05, 30: 0.04}),
        (CosineDecay(1.0, 90, 0.1), {0: 1.0, 30: 0.775, 45: 0.55, 60: 0.325, 90: 0.1, 91: 0.1}),
        (
            CosineDecay(0.5, 90, warmup_target=1.0, warmup_steps=10),
            {0: 0.5, 1: 0.55, 9: 0.95, 10: 1.0, 40: 0.75, 55: 0.5, 100: 0.0, 101: 0.0},
        ),
        (CosineDecay(0, 90, warmup_target=1, warmup_steps=10), {0: 0.0, 5: 0.5, 10: 1.0}),
        (
            CosineDecayRestarts(1.0, 30, 2.0, 0.5),
            {0: 1.0, 10: 0.75, 20: 0.25, 30: 0.5, 50: 0.375, 60: 0.25, 90: 0.25, 210: 0.125},
        ),
        (CosineDecayRestarts(1.0, 30, 1, 0.5, 0.2), {15: 0.6, 30: 0.6, 60: 0.4, 90: 0.3}),
    ],
    ids=label,
)
def test_rates_computed_by_hand(schedule, rates):
    computed = {step: schedule(step) for step in rates}
    assert computed == pytest.approx(rates, rel=1e-14, abs=1e-16)


def restarts_until(last, first, t_mul):
    """Begin and length of each period that begins by step `last`, in rational numbers."""
    begin, length, growth = Fraction(0), Fraction(str(first)), Fraction(str(t_mul))
    while begin <= last:
        yield begin, length
        begin, length = begin + length, length * growth


FIRSTS = [1, 7, 10, 100, 1000, 12.5]
T_MULS = [1, 1.1, 1.3, 1.5, 2, 3, 7]


@pytest.mark.parametrize("t_mul", T_MULS)
@pytest.mark.parametrize("first", FIRSTS)
def test_every_step_is_in_the_period_of_exact_arithmetic(first, t_mul):
    steps = np.arange(4000)
    expected = np.empty(len(steps))
    for k, (begin, length) in enumerate(restarts_until(3999, first, t_mul)):
        inside = steps[math.ceil(begin) :]
        done = (inside - float(begin)) / float(length)
        expected[math.ceil(begin) :] = 0.999**k * (1 + np.cos(np.pi * done)) / 2
    schedule = CosineDecayRestarts(1.0, first, t_mul, m_mul=0.999)
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("t_mul", T_MULS)
@pytest.mark.parametrize("first", FIRSTS)
def test_restart_is_on_the_first_step_of_its_period(first, t_mul):
    schedule = CosineDecayRestarts(1.0, first, t_mul, m_mul=0.5)
    for k, (begin, length) in enumerate(islice(restarts_until(10**9, first, t_mul), 1000)):
        done = (math.ceil(begin) - begin) / length
        assert schedule(math.ceil(begin)) == pytest.approx(cosine(k, done), rel=1e-6)
        if begin.denominator == 1:
            assert schedule(int(begin)) == 0.5**k
        end = begin + length
        done = (math.ceil(end) - 1 - begin) / length
        assert schedule(math.ceil(end) - 1) == pytest.approx(cosine(k, done), rel=1e-3, abs=1e-12)


def cosine(k, done):
    return 0.5**k * math.cos(math.pi * done / 2) ** 2


# --- Traced ------------------------------------------------------------------------------------


@each_case
@pytest.mark.needs("jax")
def test_jax_jit_is_the_host(schedule):
    import jax

    traced = jax.jit(schedule)(jax.numpy.array(STEPS))
    assert traced.dtype == jax.numpy.float32
    assert_rates(traced, schedule)


@pytest.mark.parametrize("step", [0, 10, 41, 1000, -3])
@each_case
@pytest.mark.needs("jax")
def test_jax_scalar_is_its_array(schedule, step):
    import jax

    traced = jax.jit(schedule)(jax.numpy.int32(step))
    assert traced.shape == ()
    assert float(traced) == pytest.approx(schedule(step), rel=0, abs=2**-20 * peak(schedule))


@pytest.mark.parametrize("t_mul", T_MULS)
@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.needs("jax")
def test_restart_on_a_whole_step_is_exact_in_float32(first, t_mul):
    import jax

    periods = enumerate(islice(restarts_until(2**24, first, t_mul), 24))
    whole = [(k, int(begin), length) for k, (begin, length) in periods if begin.denominator == 1]
    ks, begins, lengths = (np.array(column, float) for column in zip(*whole, strict=True))
    traced = jax.jit(CosineDecayRestarts(1.0, first, t_mul, m_mul=0.5))
    np.testing.assert_allclose(traced(begins), 0.5**ks, rtol=2**-20)
    # And the step before is still of the period before, if that is one of more than two steps.
    before = lengths / t_mul > 2
    last = traced(begins - 1) / 0.5 ** (ks - 1)
    assert np.all(last[before & (ks > 0)] < 0.51)


@pytest.mark.parametrize("length", [1, 3, 41, 47, 55, 61, 1000, 2.5, 1.1, 2.7, 0.3, 0.1])
@pytest.mark.needs("jax")
def test_stairs_fall_on_their_steps_in_float32(length):
    import jax

    schedule = InverseTimeDecay(1.0, length, 0.5, staircase=True)
    traced = jax.jit(schedule)
    late = 2**24 - 20_000 if isinstance(length, int) else 20_000
    for steps in (np.arange(20_000), np.arange(late, late + 20_000)):
        decays = np.array([step / Fraction(str(length)) // 1 for step in steps.tolist()], float)
        np.testing.assert_allclose(1 / schedule(steps), 1 + decays / 2, rtol=1e-14)
        stairs = np.round((1 / np.asarray(traced(steps), float) - 1) * 2)
        np.testing.assert_array_equal(stairs[decays < 2**20], decays[decays < 2**20])


# 1.3 and 2.3 are no binary fractions: their multiples are rounded, and the root magnifies that.
@pytest.mark.parametrize(
    ("length", "atol"),
    [(41, 0), (47, 0), (55, 0), (61, 0), (1000, 0), (2.5, 0), (1.3, 1e-3), (2.3, 1e-3)],
)
@pytest.mark.needs("jax")
def test_cycles_end_on_their_steps_in_float32(length, atol):
    import jax

    schedule = PolynomialDecay(1.0, length, 0.0, power=0.5, cycle=True)
    traced = jax.jit(schedule)
    ends = np.array([i for i in range(1, 20_000) if (i / Fraction(str(length))).denominator == 1])
    np.testing.assert_allclose(schedule(ends), 0, atol=atol * 1e-4)
    np.testing.assert_allclose(traced(ends), 0, atol=atol)
    np.testing.assert_allclose(traced(ends + 1), schedule(ends + 1), rtol=2**-20, atol=atol)


@each_case
@pytest.mark.needs("tensorflow")
def test_tensorflow_graph_is_the_host(schedule):
    import tensorflow as tf

    traced = tf.function(schedule)(tf.constant(STEPS, tf.int64))
    assert traced.dtype == tf.float32
    assert_rates(traced, schedule)


@each_case
@pytest.mark.needs("torch")
def test_torch_is_the_host(schedule):
    import torch

    rates = schedule(torch.tensor(STEPS))
    assert rates.dtype == torch.float32
    assert_rates(rates, schedule)


# --- What kind of number -----------------------------------------------------------------------


@each_case
def test_arrays_are_their_scalars(schedule):
    steps = np.array(STEPS).reshape(2, -1)
    rates = schedule(steps)
    assert rates.dtype == np.float64
    assert rates.shape == steps.shape
    scalars = [schedule(step) for step in STEPS]
    # NumPy's functions of an array and of a scalar may round differently.
    np.testing.assert_allclose(rates.ravel(), scalars, rtol=1e-14, atol=1e-15 * peak(schedule))


@each_case
def test_integer_gives_a_python_float(schedule):
    for step in (3, np.int64(3), np.int32(3), np.uint8(3), np.array(3), 10**6):
        assert type(schedule(step)) is float
    assert schedule(3) == schedule(np.uint8(3)) == schedule(np.array(3)) == schedule(3.0)


OVERFLOWING = [
    ExponentialDecay(0.1, 10, 2.0),
    ExponentialDecay(0.1, 10, 2.0, staircase=True),
    ExponentialDecay(0.1, 1e-320, 2.0, staircase=True),
    CosineDecayRestarts(0.1, 10, t_mul=1.0, m_mul=2.0),
    CosineDecayRestarts(0.1, 1, t_mul=1.5, m_mul=1e300),
]


@pytest.mark.parametrize("schedule", OVERFLOWING, ids=label)
def test_what_is_too_large_for_a_float_is_infinite(schedule):
    """As in Keras; an optimizer then has its error of the rate."""
    step = 2**31 + 1
    tensor = pytest.importorskip("torch").tensor(step)
    rates = [schedule(step), schedule(np.array([step]))[0], schedule(tensor).item()]
    assert rates == [math.inf] * 3
    w, opt = np.ones(2), Adam(schedule)
    opt.build([w])
    opt.set_weights([np.array(step), *opt.get_weights()[1:]])
    with pytest.raises(ValueError, match="`learning_rate` must be a number with 0 <= value < inf"):
        opt.apply_gradients([(np.ones(2), w)])
    assert opt.iterations == step and w.tolist() == [1, 1]


def test_no_schedule_has_an_error_where_a_float_ends():
    for schedule in (
        ExponentialDecay(0.1, 5e-324, 0.5, staircase=True),
        PolynomialDecay(1e308, 5e-324, power=0.5, cycle=True),
        InverseTimeDecay(0.1, 5e-324, 1e308, staircase=True),
        CosineDecay(1e308, 5e-324, alpha=1e308, warmup_target=1e308, warmup_steps=5e-324),
        CosineDecayRestarts(0.1, 5e-324, t_mul=1.0),
        CosineDecayRestarts(0.1, 5e-324, t_mul=1e308, m_mul=1e308),
    ):
        for step in (0, 1, 2**62):
            assert schedule(step) >= 0 or math.isnan(schedule(step))
            schedule(np.array([step]))


@each_case
def test_negative_step_is_step_0(schedule):
    assert schedule(-1) == schedule(0)
    assert schedule(np.array([-(10**6)]))[0] == schedule(np.array([0]))[0]


# --- Properties --------------------------------------------------------------------------------

rates = st.floats(0, 10)
fractions = st.floats(0, 1)
lengths = st.integers(1, 10**6)
counts = st.integers(0, 10**5)


@given(rates, lengths, fractions, counts, fractions)
def test_staircase_is_constant_between_stairs(rate, length, decay, stair, where):
    first, last = stair * length, stair * length + length - 1
    inside = first + int(where * (last - first))
    for kind, expected in (
        (ExponentialDecay, rate * decay**stair),
        (InverseTimeDecay, rate / (1 + decay * stair)),
    ):
        schedule = kind(rate, length, decay, staircase=True)
        assert schedule(first) == schedule(inside) == schedule(last)
        assert schedule(first) == pytest.approx(expected, rel=1e-12)


@given(rates, lengths, fractions, st.integers(0, 10**7))
def test_cosine_falls_from_the_rate_to_its_fraction(rate, length, alpha, step):
    schedule = CosineDecay(rate, length, alpha)
    assert schedule(0) == pytest.approx(rate, rel=1e-15)
    assert schedule(length) == schedule(length + step) == pytest.approx(rate * alpha, abs=1e-15)
    assert rate * alpha * (1 - 1e-15) <= schedule(step) <= rate * (1 + 1e-15)
    assert schedule(step + 1) <= schedule(step) * (1 + 1e-15)


@given(rates, rates, lengths, lengths, st.integers(0, 10**6))
def test_warmup_is_a_line_then_the_cosine(start, target, length, warmup, step):
    schedule = CosineDecay(start, length, warmup_target=target, warmup_steps=warmup)
    if step < warmup:
        assert schedule(step) == pytest.approx(start + (target - start) * step / warmup, rel=1e-12)
    assert schedule(warmup + step) == CosineDecay(target, length)(step)


@given(lengths, st.integers(1, 10), st.floats(0, 2), st.integers(0, 40))
def test_restart_is_exact(first, t_mul, m_mul, k):
    begin = first * sum(t_mul**i for i in range(k))
    if begin < 2**53:  # a greater one may not be a double
        schedule = CosineDecayRestarts(1.0, first, t_mul, m_mul)
        assert schedule(begin) == pytest.approx(m_mul**k, rel=1e-13)


@given(rates, lengths, rates, st.floats(0, 3), st.integers(0, 10**7))
def test_polynomial_stays_between_its_ends(start, length, end, power, step):
    low, high = sorted((start, end))
    for cycle in (False, True):
        schedule = PolynomialDecay(start, length, end, power, cycle)
        assert low - 1e-14 <= schedule(step) <= high + 1e-14
        assert schedule(0) == pytest.approx(start, rel=1e-14, abs=1e-14)
    if power:
        assert schedule(length) == schedule((step + 1) * length) == end


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8, unique=True), st.data())
def test_piecewise_is_a_lookup(boundaries, data):
    boundaries.sort()
    values = data.draw(st.lists(rates, min_size=len(boundaries) + 1, max_size=len(boundaries) + 1))
    step = data.draw(st.integers(0, 1100))
    expected = values[sum(step > boundary for boundary in boundaries)]
    assert PiecewiseConstantDecay(boundaries, values)(step) == expected


# --- Copies ------------------------------------------------------------------------------------


@each_case
def test_copies_are_equal(schedule):
    schedule(5)
    for same in (
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
        type(schedule).from_config(json.loads(json.dumps(schedule.get_config()))),
        deserialize(json.loads(json.dumps(serialize(schedule)))),
        eval(repr(schedule)),
    ):
        assert same == schedule
        assert hash(same) == hash(schedule)
        assert same(17) == schedule(17)
        assert repr(same) == repr(schedule)


def test_equality_is_of_class_and_config():
    schedule = ExponentialDecay(0.1, 10, 0.5)
    assert schedule == ExponentialDecay(np.float64(0.1), np.int64(10), 0.5)
    assert schedule == ExponentialDecay(0.1, 10.0, 0.5)
    assert hash(schedule) == hash(ExponentialDecay(0.1, 10.0, 0.5))
    assert schedule != ExponentialDecay(0.1, 10, 0.5, name="other")
    assert schedule != InverseTimeDecay(0.1, 10, 0.5, name="ExponentialDecay")
    assert schedule != 0.1
    assert len({*CASES, *copy.deepcopy(CASES)}) == len(CASES)


def test_numpy_arguments_make_a_json_config():
    schedule = PiecewiseConstantDecay(np.array([1, 2]), np.array([1, 0.5, 0.1], np.float32))
    assert json.loads(json.dumps(schedule.get_config()))["boundaries"] == [1, 2]
    assert type(ExponentialDecay(0.1, np.int32(10), 0.5).decay_steps) is int


def test_list_given_is_not_kept():
    boundaries = [1, 2]
    schedule = PiecewiseConstantDecay(boundaries, [1, 2, 3])
    boundaries[0] = schedule.get_config()["boundaries"][0] = 7
    assert schedule.boundaries == (1, 2)


def test_schedule_does_not_change():
    with pytest.raises(AttributeError, match="decay_steps"):
        ExponentialDecay(0.1, 10, 0.5).decay_steps = 20


# --- Your own ----------------------------------------------------------------------------------


class Half(ExponentialDecay):
    def __init__(self, rate, floor=0.0):
        super().__init__(rate, decay_steps=10, decay_rate=0.5)
        self.floor = floor

    def __call__(self, step):
        return super().__call__(step) + self.floor

    def get_config(self):
        return {"rate": self.initial_learning_rate, "floor": self.floor}


class Constant(LearningRateSchedule):
    def __call__(self, step):
        return 0.1


def test_own_schedule_from_custom_objects():
    schedule = Half(0.1, floor=0.25)
    config = serialize(schedule)
    assert config == {
        "module": __name__,
        "class_name": "Half",
        "config": {"rate": 0.1, "floor": 0.25},
        "registered_name": "Half",
    }
    same = deserialize(config, custom_objects={"Half": Half})
    assert type(same) is Half
    assert same == schedule != Half(0.1)
    assert same(10) == 0.3
    by_registered_name = config | {"registered_name": "mine>Half"}
    assert deserialize(by_registered_name, {"mine>Half": Half}) == schedule
    assert deserialize(by_registered_name, {"Half": Half}) == schedule


def test_own_class_of_a_known_name_is_not_ours():
    own = type("CosineDecay", (Half,), {"__module__": "elsewhere"})
    config = serialize(own(0.1))
    with pytest.raises(ValueError, match="Received: 'CosineDecay' of module 'elsewhere'"):
        deserialize(config)
    assert type(deserialize(config, {"CosineDecay": own})) is own


def test_own_schedule_without_config():
    with pytest.raises(NotImplementedError, match=r"Constant does not give\. Define get_config"):
        serialize(Constant())


def test_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        LearningRateSchedule()


def test_deserialize_without_module():
    config = {"class_name": "CosineDecay", "config": {"initial_learning_rate": 1, "decay_steps": 9}}
    assert deserialize(config) == CosineDecay(1, 9)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("CosineDecay", TypeError, r"must be a dictionary\. Received: 'CosineDecay'\. Give what"),
        ({"class_name": "CosineDecay"}, ValueError, r"must have a 'class_name' and a 'config'"),
        ({"config": {}}, ValueError, r"must have a 'class_name' and a 'config'.*Received: \{"),
        ({"class_name": "CosineDecay", "config": None}, ValueError, r"a dictionary of the arg"),
        (
            {"class_name": "Cosine", "config": {}},
            ValueError,
            r"Received: 'Cosine' of module 'omniadam\.schedules'; known are CosineDecay, "
            r"CosineDecayRestarts, Exp.*Give your own class as custom_objects=\{'Cosine': Cosine\}",
        ),
    ],
)
def test_deserialize_says_what_is_wrong(config, error, message):
    with pytest.raises(error, match=message):
        deserialize(config)


@pytest.mark.parametrize("given", [0.1, None, CosineDecay])
def test_serialize_says_what_is_wrong(given):
    with pytest.raises(TypeError, match=r"must have get_config\(\)\. Received: .* Give a Learning"):
        serialize(given)


# --- Bad arguments -----------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


DECAY = {"initial_learning_rate": 0.1, "decay_steps": 10}
BAD = [-0.1, NAN, INF, -INF, pytest.param(10**400, id="1e400"), True, "0.1", [0.1], 1j]
NUMBERS = [
    (ExponentialDecay, DECAY | {"decay_rate": 0.5}, {"decay_steps": "> 0"}),
    (PolynomialDecay, DECAY | {"end_learning_rate": 0.1, "power": 1}, {"decay_steps": "> 0"}),
    (InverseTimeDecay, DECAY | {"decay_rate": 0.5}, {"decay_steps": "> 0"}),
    (
        CosineDecay,
        DECAY | {"alpha": 0.1, "warmup_target": 0.1, "warmup_steps": 10},
        {"decay_steps": "> 0"},
    ),
    (
        CosineDecayRestarts,
        {"initial_learning_rate": 1, "first_decay_steps": 1, "t_mul": 2, "m_mul": 1, "alpha": 0},
        {"first_decay_steps": "> 0", "t_mul": ">= 1"},
    ),
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("kind", "good", "name", "holds"),
    [
        pytest.param(kind, good, name, bounds.get(name, ">= 0"), id=f"{kind.__name__}-{name}")
        for kind, good, bounds in NUMBERS
        for name in good
    ],
)
def test_bad_number(kind, good, name, holds, bad):
    number = isinstance(bad, int | float) and bad is not True
    with pytest.raises(ValueError if number else TypeError) as error:
        kind(**good | {name: bad})
    assert str(error.value).startswith(
        f"{kind.__name__}: {name} must be a finite number {holds}. Received: {bad!r}. Give "
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ExponentialDecay(0.1, 0, 0.5),
            ValueError,
            "ExponentialDecay: decay_steps must be a finite number > 0. Received: 0. "
            "Give a number of steps, such as 10000.",
        ),
        (
            lambda: CosineDecayRestarts(0.1, 10, t_mul=0.5),
            ValueError,
            "CosineDecayRestarts: t_mul must be a finite number >= 1. Received: 0.5. "
            "Give how many times as long each period is as the last, such as 2.",
        ),
        (
            lambda: InverseTimeDecay(0.1, 10, 0.5, "name"),
            TypeError,
            "InverseTimeDecay: staircase must be a bool. Received: 'name'. Give True or False.",
        ),
        (
            lambda: PolynomialDecay(0.1, 10, cycle=1),
            TypeError,
            "PolynomialDecay: cycle must be a bool. Received: 1. Give True or False.",
        ),
        (
            lambda: CosineDecay(0.1, 10, name=3),
            TypeError,
            "CosineDecay: name must be a str. Received: 3. Give a name, or None.",
        ),
        (
            lambda: PiecewiseConstantDecay(10, [0.1, 0.2]),
            TypeError,
            "PiecewiseConstantDecay: boundaries must be a list of numbers. Received: 10. "
            "Give a list, in order.",
        ),
        (
            lambda: PiecewiseConstantDecay([10], "ab"),
            TypeError,
            "PiecewiseConstantDecay: values must be a list of numbers. Received: 'ab'. "
            "Give a list, in order.",
        ),
        (
            lambda: PiecewiseConstantDecay([10, -1], [0.1, 0.2, 0.3]),
            ValueError,
            "PiecewiseConstantDecay: boundaries[1] must be a finite number >= 0. Received: -1. "
            "Give a number of steps; 0 is the first step.",
        ),
        (
            lambda: PiecewiseConstantDecay([10], [0.1, NAN]),
            ValueError,
            "PiecewiseConstantDecay: values[1] must be a finite number >= 0. Received: nan. "
            "Give a learning rate, such as 0.001.",
        ),
        (
            lambda: PiecewiseConstantDecay([], [0.1]),
            ValueError,
            "PiecewiseConstantDecay: boundaries must hold at least one step. "
            "Received: boundaries=[]. "
            "For a constant rate, give the number itself to the optimizer.",
        ),
        (
            lambda: PiecewiseConstantDecay([5, 5], [0.1, 0.2, 0.3]),
            ValueError,
            "PiecewiseConstantDecay: boundaries must be strictly increasing. "
            "Received: boundaries=[5, 5]. Sort them together with their values, and drop repeats.",
        ),
        (
            lambda: PiecewiseConstantDecay([5, 6], [0.1, 0.2]),
            ValueError,
            "PiecewiseConstantDecay: values must be one more than boundaries. "
            "Received: boundaries=[5, 6] (2) and values=[0.1, 0.2] (2). "
            "Give one value before the first boundary and one after each.",
        ),
    ],
)
def test_message(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_examples_of_the_docstrings():
    assert doctest.testmod(schedules).failed == 0
    assert all(">>>" in kind.__doc__ for kind in SIX)
