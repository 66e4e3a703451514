"""`compat.contrib_keras.Adam`: TensorFlow 1.1, which no longer installs, by its formulas."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from cases import assert_close, gradients, variables
from older import LIBRARIES, Library, imported, spelled
from omniadam.compat import contrib_keras
from omniadam.compat.contrib_keras import Adam
from reference import Array, Reference, reference_contrib_keras

STEPS = 50
SHAPES: tuple[tuple[int, ...], ...] = ((), (7,), (3, 5))

SETTINGS: dict[str, dict[str, float]] = {
    "defaults": {},
    "lr": {"lr": 0.02},
    "beta_1": {"beta_1": 0.8},
    "beta_2": {"beta_2": 0.95},
    "epsilon": {"epsilon": 0.01},
    "decay": {"decay": 0.25},
    "clipnorm": {"clipnorm": 2.0},
    "clipvalue": {"clipvalue": 0.125},
    "clipnorm, then clipvalue": {"clipnorm": 4.0, "clipvalue": 0.5},
    "all": {
        "lr": 0.02,
        "beta_1": 0.8,
        "beta_2": 0.95,
        "epsilon": 0.01,
        "decay": 0.25,
        "clipnorm": 4.0,
        "clipvalue": 0.5,
    },
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    found = LIBRARIES[request.param]
    for name in found.needs:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if request.param == "tensorflow":
        request.getfixturevalue("tf")
    return found


@pytest.fixture
def tf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorFlow; by its own kernels, as XLA compiles each of so many steps for a second."""
    if find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")
    module = imported("tensorflow")
    fast = imported("omniadam.fast.tensorflow")
    monkeypatch.setattr(fast.FastTensorFlow, "jit_compile", False)
    return module


# --- The documentation, to the letter -------------------------------------------------------------


def test_signatures() -> None:
    assert spelled(Adam) == (
        "(lr=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-08, decay=0.0, **kwargs)"
    )
    documented = {
        "from_config": "(config)",
        "get_config": "()",
        "get_gradients": "(loss, params)",
        "get_updates": "(params, constraints, loss)",
        "get_weights": "()",
        "set_weights": "(weights)",
    }
    assert {name: spelled(getattr(Adam, name)) for name in documented} == documented
    assert isinstance(inspect.getattr_static(Adam, "from_config"), classmethod)
    assert Adam.__module__ == contrib_keras.__name__


# --- The numbers ----------------------------------------------------------------------------------


def train(
    library: Library, settings: dict[str, Any], dtype: str = "float32", steps: int = STEPS
) -> tuple[Adam, list[Any], Reference]:
    start = variables(dtype, shapes=SHAPES)
    params = [library.variable(value) for value in start]
    now: list[Array] = []
    opt = Adam(**settings)
    updates = opt.get_updates(params, {}, library.loss(params, lambda: now))
    reference = reference_contrib_keras(start, **settings)
    for step in range(steps):
        now[:] = gradients(step, SHAPES, dtype=dtype)
        for update in updates:
            update()
        reference.step(now)
    return opt, params, reference


def assert_as_in(
    reference: Reference, params: Sequence[Array], weights: Sequence[Array], dtype: str = "float32"
) -> None:
    n = len(SHAPES)
    assert int(weights[0]) == reference.calls and len(weights) == 1 + 2 * n
    assert_close(params, reference, dtype=dtype)
    assert_close(weights[1 : 1 + n], reference, "momentum", dtype)
    assert_close(weights[1 + n :], reference, "velocity", dtype)


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers(name: str, library: Library) -> None:
    dtype = "float64" if library.double and name in ("decay", "all") else "float32"
    opt, params, reference = train(library, SETTINGS[name], dtype)
    assert_as_in(reference, [library.numpy(w) for w in params], opt.get_weights(), dtype)


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "clipnorm, then clipvalue", "defaults"])
def test_get_gradients_clips_all_by_one_norm_then_by_value(name: str, library: Library) -> None:
    settings = SETTINGS[name]
    params = [library.variable(np.ones(2, np.float32)) for _ in range(2)]
    given = [np.array([3.0, -0.0625], np.float32), np.array([0.0, 4.0], np.float32)]
    opt = Adam(**settings)
    for scale in (1.0, 2.0**-10):  # beyond the threshold, and below
        now = [g * np.float32(scale) for g in given]
        want = [np.asarray(g, np.float64) for g in now]
        norm = np.sqrt(sum(np.sum(g * g) for g in want))
        if "clipnorm" in settings and norm >= settings["clipnorm"]:
            want = [g * settings["clipnorm"] / norm for g in want]
        if "clipvalue" in settings:
            want = [np.clip(g, -settings["clipvalue"], settings["clipvalue"]) for g in want]
        got = opt.get_gradients(library.loss(params, lambda now=now: now), params)  # type: ignore[misc]
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(library.numpy(g), w, rtol=1e-6)
    assert opt.get_weights() == []  # and it has created nothing


@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_sparse_gradients_are_clipped_as_their_sum(name: str, request: Any) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "tensorflow":
        tf = request.getfixturevalue("tf")
        w = tf.Variable(np.ones((3, 1)))

        def loss() -> Any:
            return tf.reduce_sum(tf.gather(w, [0, 0, 2]))

    else:
        torch = imported("torch")
        w = torch.ones((3, 1), dtype=torch.float64, requires_grad=True)

        def loss() -> Any:
            return torch.nn.functional.embedding(torch.tensor([0, 0, 2]), w, sparse=True).sum()

    [g] = Adam(clipnorm=5**0.5, clipvalue=1.5).get_gradients(loss, [w])
    assert np.asarray(g).tolist() == [[1.5], [0.0], [1.0]]
    opt = Adam(clipvalue=1.5)
    opt.get_updates([w], {}, loss)[0]()
    np.testing.assert_allclose(opt.get_weights()[1], [[0.15], [0.0], [0.1]], rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clipnorm_of_a_norm_that_is_no_number(value: float, library: Library) -> None:
    """`g * c / n if n >= c else g`: NaN is not >= c, so that the others keep their gradients."""
    params = [library.variable(np.ones(1, np.float32)) for _ in range(2)]
    now = [np.array([value], np.float32), np.array([3.0], np.float32)]
    got = Adam(clipnorm=1.0).get_gradients(library.loss(params, lambda: now), params)
    got = [float(library.numpy(g)[0]) for g in got]
    assert np.isnan(got[0])
    assert got[1] == (3.0 if np.isnan(value) else 0.0)


def test_zero_is_no_clipping() -> None:
    w, v = np.ones(2), np.ones(2)
    opt = Adam(clipnorm=0, clipvalue=0.0)
    opt.get_updates([w], {}, lambda w: 300.0 * w.sum())[0]()
    Adam().get_updates([v], {}, lambda v: 300.0 * v.sum())[0]()
    assert w.tolist() == v.tolist()
    np.testing.assert_allclose(opt.get_weights()[1], 30.0)


# --- get_updates ----------------------------------------------------------------------------------


def test_updates_are_run_as_often_as_wanted(library: Library) -> None:
    w = library.variable(np.ones(2, np.float32))
    now = [np.ones(2, np.float32)]
    opt = Adam(lr=0.5)
    updates = opt.get_updates([w], {}, library.loss([w], lambda: now))
    assert updates is opt.updates and all(callable(update) for update in updates)
    assert int(opt.get_weights()[0]) == 0 and library.numpy(w).tolist() == [1.0, 1.0]
    for expected in (0.5, 0.0):
        for update in updates:
            update()
        np.testing.assert_allclose(library.numpy(w), expected, atol=1e-6)
    now[0] = -now[0]  # the gradients are those at that moment
    for update in updates:
        update()
    assert np.all(np.abs(library.numpy(w)) < 0.4)
    assert int(opt.get_weights()[0]) == 3


def test_constraints(library: Library) -> None:
    params = [library.variable(np.full(2, 0.5, np.float32)) for _ in range(2)]
    now = [np.array([1.0, -1.0], np.float32)] * 2
    opt = Adam(lr=1.0)

    def not_negative(value: Any) -> Any:
        return (value + abs(value)) / 2

    updates = opt.get_updates(
        params, [(params[1], not_negative)], library.loss(params, lambda: now)
    )
    for update in updates:
        update()
    np.testing.assert_allclose(library.numpy(params[0]), [-0.5, 1.5], atol=1e-6)
    np.testing.assert_allclose(library.numpy(params[1]), [0.0, 1.5], atol=1e-6)
    np.testing.assert_allclose(opt.get_weights()[2], [0.1, -0.1], rtol=1e-6)


def test_keys_of_constraints() -> None:
    torch = pytest.importorskip("torch")
    w = torch.ones(1, requires_grad=True)
    halved: Callable[[Any], Any] = lambda value: value * 0.5  # noqa: E731
    for constraints in ({w: halved}, {id(w): halved}, [(w, halved)]):
        with torch.no_grad():
            w.fill_(1.0)
        Adam(lr=0.0).get_updates([w], constraints, lambda: w.sum())[0]()
        assert w.item() == 0.5
    Adam(lr=0.0).get_updates([w], None, lambda: w.sum())[0]()
    assert w.item() == 0.5
    with pytest.raises(ValueError, match="1 others"):
        Adam().get_updates([w], {torch.ones(1): halved}, lambda: w.sum())


def test_constraints_are_of_one_call() -> None:
    a, b = np.full(1, 0.05), np.full(1, 3.0)
    opt = Adam(lr=0.1)

    def loss(w: Any) -> Any:
        return w.sum()

    [first] = opt.get_updates([a], {id(a): lambda value: np.maximum(value, 0.0)}, loss)
    [second] = opt.get_updates([b], {}, loss)
    first()
    second()
    assert a.tolist() == [0.0] and b[0] < 3.0
    [without] = opt.get_updates([a], {}, loss)
    without()
    assert a[0] < 0.0
    first()
    assert a.tolist() == [0.0]


def test_constraints_are_checked() -> None:
    w, b = np.full(2, 0.5), np.full(3, 0.5)
    opt = Adam()
    for wrong in (None, 5):
        constraints: Any = {id(b): wrong}
        with pytest.raises(TypeError, match=r"of variable of shape \(3,\) must be a callable"):
            opt.get_updates([w, b], constraints, lambda w, b: w.sum() + b.sum())
    assert opt.get_weights() == []
    for wrong in (lambda value: np.zeros(2), lambda value: 1.0):
        [update] = Adam().get_updates([w, b], {id(b): wrong}, lambda w, b: w.sum() + b.sum())
        with pytest.raises(ValueError, match=r"variable 'variable_1' must return its shape"):
            update()


# --- State and configuration ----------------------------------------------------------------------


def test_weights_are_the_count_then_all_m_then_all_v(library: Library) -> None:
    w, b = (library.variable(np.ones(s, np.float32)) for s in ((3, 2), (2,)))
    now = [np.full((3, 2), 2.0, np.float32), np.full(2, 4.0, np.float32)]
    opt = Adam()
    assert opt.get_weights() == [] == opt.weights
    updates = opt.get_updates([w, b], {}, library.loss([w, b], lambda: now))
    for update in updates:
        update()
    count, *moments = opt.get_weights()
    assert count.shape == () and count == 1
    means = [float(m.mean()) for m in moments]
    assert [m.shape for m in moments] == [(3, 2), (2,), (3, 2), (2,)]
    np.testing.assert_allclose(means, [0.2, 0.4, 0.004, 0.016], rtol=1e-5)
    assert len(opt.weights) == 5
    assert all(type(weight) is np.ndarray for weight in opt.get_weights())


def test_set_weights_goes_on_where_another_stopped(library: Library) -> None:
    opt, params, reference = train(library, SETTINGS["all"], steps=7)
    weights = opt.get_weights()
    weights[0] = np.float32(7.0)  # TensorFlow 1.1 counts in floats
    copies = [library.variable(np.array(library.numpy(w))) for w in params]
    now: list[Array] = []
    other = Adam(**SETTINGS["all"])
    updates = other.get_updates(copies, {}, library.loss(copies, lambda: now))
    other.set_weights(weights)
    for step in range(7, 14):
        now[:] = gradients(step, SHAPES)
        for update in updates:
            update()
        reference.step(now)
    assert_as_in(reference, [library.numpy(w) for w in copies], other.get_weights())


def test_set_weights_errors() -> None:
    """Of the documentation: "ValueError: in case of incompatible weight shapes"."""
    opt = Adam()
    opt.set_weights([])
    w = np.ones(2)
    opt.get_updates([w], {}, lambda w: w.sum())[0]()
    before = opt.get_weights()
    for wrong in (
        [np.array(3), np.zeros(2), np.zeros(3)],
        [np.array(3), np.zeros(2)],
        [np.array(3.5), np.zeros(2), np.zeros(2)],
        [np.array(3), np.zeros(2), np.array(["a", "b"])],
        [np.zeros(2), np.zeros(2), np.zeros(2)],
    ):
        with pytest.raises(ValueError, match=r"weights|State variable"):
            opt.set_weights(wrong)
        assert all(np.array_equal(a, b) for a, b in zip(before, opt.get_weights(), strict=True))


def test_config() -> None:
    config = Adam().get_config()
    assert config == {"lr": 0.001, "beta_1": 0.9, "beta_2": 0.999, "decay": 0.0, "epsilon": 1e-08}
    for settings in SETTINGS.values():
        opt = Adam.from_config(Adam(**settings).get_config())
        assert opt.get_config() == config | settings
        assert opt.get_weights() == []
    opt = Adam(clipnorm=1.0)
    opt.lr, opt.beta_1, opt.decay, opt.clipvalue = 0.5, 0.25, 0.125, 2.0
    want = {"lr": 0.5, "beta_1": 0.25, "decay": 0.125, "clipnorm": 1.0, "clipvalue": 2.0}
    assert opt.get_config() == config | want
    values = [float(x) for x in (opt.lr, opt.beta_2, opt.epsilon)]
    assert values == pytest.approx([0.5, 0.999, 1e-08], rel=1e-6)


def test_attributes_take_effect(library: Library) -> None:
    w = library.variable(np.zeros(1, np.float32))
    opt = Adam(lr=1.0)
    updates = opt.get_updates([w], {}, library.loss([w], lambda: [np.ones(1, np.float32)]))
    for rate, expected in ((1.0, -1.0), (0.25, -1.25), (0.0, -1.25)):
        opt.lr = rate
        for update in updates:
            update()
        np.testing.assert_allclose(library.numpy(w), expected, rtol=1e-5)
        assert float(opt.lr) == rate
    opt.lr, opt.decay = 1.0, 1.0  # 1 / (1 + 3)
    for update in updates:
        update()
    np.testing.assert_allclose(library.numpy(w), -1.5, rtol=1e-5)
    assert int(np.asarray(opt.get_weights()[0])) == 4


@pytest.mark.parametrize("again", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_goes_on(again: Callable[[Adam], Adam]) -> None:
    opt, params, reference = train(LIBRARIES["numpy"], SETTINGS["all"], steps=5)
    opt.updates = []  # they hold the loss
    now = gradients(5, SHAPES)
    other = again(opt)
    copies = [w.copy() for w in params]
    for update in other.get_updates(copies, {}, LIBRARIES["numpy"].loss(copies, lambda: now)):
        update()
    reference.step(now)
    assert_as_in(reference, copies, other.get_weights())
    assert type(other).__name__ == "Adam" and isinstance(other, Adam)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"clip": 1.0}, TypeError, "'clip'"),
        ({"amsgrad": True}, TypeError, "'amsgrad'"),
        ({"global_clipnorm": 1.0}, TypeError, "'global_clipnorm'"),
        ({"lr": -1.0}, ValueError, "learning_rate"),
        ({"lr": "fast"}, ValueError, "learning_rate"),
        ({"beta_1": 1.0}, ValueError, "beta_1"),
        ({"beta_2": -0.5}, ValueError, "beta_2"),
        ({"epsilon": -1e-8}, ValueError, "epsilon"),
        ({"decay": -0.1}, ValueError, "decay"),
        ({"clipnorm": -1.0}, ValueError, "clipnorm"),
        ({"clipvalue": -1.0}, ValueError, "clipvalue"),
    ],
)
def test_settings_are_checked(
    settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Adam(**settings)
    if kind is ValueError:
        opt = Adam()
        with pytest.raises(kind, match=message):
            setattr(opt, *next(iter(settings.items())))
        assert opt.get_config() == Adam().get_config()


@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_no_gradient(name: str, request: Any) -> None:
    """The other libraries give zeros where a loss does not depend on a variable."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "tensorflow":
        request.getfixturevalue("tf")
    library = LIBRARIES[name]
    w, v = (library.variable(np.ones(1)) for _ in range(2))
    loss = library.loss([w], lambda: [np.ones(1)])
    with pytest.raises(ValueError, match="number 1, has no gradient"):
        Adam().get_gradients(loss, [w, v])
    [update] = Adam().get_updates([w, v], {}, loss)
    with pytest.raises(ValueError, match="number 1, has no gradient"):
        update()


@pytest.mark.needs("autograd")
def test_gradient_that_is_not_implemented() -> None:
    from autograd.extend import primitive

    with pytest.raises(ValueError, match="cannot be computed"):
        Adam().get_gradients(lambda w: primitive(lambda x: x * 2)(w).sum(), [np.ones(2)])


def test_params_are_checked() -> None:
    for wrong in ([np.arange(3)], ["w"], [np.ones(2), np.float64(1.0)]):
        with pytest.raises(TypeError):
            Adam().get_updates(wrong, {}, lambda *w: w[0].sum())
    w = np.ones(2)
    with pytest.raises(ValueError, match="same"):
        Adam().get_updates([w, w], {}, lambda *w: w[0].sum())


# --- JAX ------------------------------------------------------------------------------------------


def test_updates_inside_jit() -> None:
    jax = pytest.importorskip("jax")
    library = LIBRARIES["jax"]
    params = [library.variable(np.array([1.0, -2.0], np.float32)) for _ in range(2)]
    made = [
        Adam(lr=0.125, decay=0.5, clipnorm=1.0).get_updates([w], {}, lambda w: (w**2).sum())
        for w in params
    ]

    @jax.jit
    def step() -> None:
        for update in made[0]:
            update()

    for _ in range(3):
        step()
        for update in made[1]:
            update()
    np.testing.assert_allclose(*map(library.numpy, params), rtol=1e-6)


# --- TensorFlow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["defaults", "all"])
def test_updates_are_operations_in_a_graph(name: str, tf: Any) -> None:
    start = variables(shapes=SHAPES)
    reference = reference_contrib_keras(start, **SETTINGS[name])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        params = [
            tf.compat.v1.get_variable(f"w{i}", initializer=w, use_resource=True)
            for i, w in enumerate(start)
        ]
        given = [tf.compat.v1.placeholder(tf.float32, w.shape) for w in start]
        loss = tf.add_n([tf.reduce_sum(w * g) for w, g in zip(params, given, strict=True)])
        opt = Adam(**SETTINGS[name])
        clipped = opt.get_gradients(loss, params)
        updates = opt.get_updates(params, {}, loss)
        assert updates and all(isinstance(update, tf.Operation) for update in updates)
        session.run(tf.compat.v1.global_variables_initializer())
        for step in range(STEPS):
            now = gradients(step, SHAPES)
            session.run(updates, dict(zip(given, now, strict=True)))
            reference.step(now)
        assert_as_in(reference, session.run(params), opt.get_weights())
        got = session.run(clipped, dict(zip(given, now, strict=True)))
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in got))
        if name == "all":
            assert norm <= 4.0 * (1 + 1e-6) and max(np.abs(g).max() for g in got) <= 0.5
        else:
            assert all(np.array_equal(a, b) for a, b in zip(got, now, strict=True))
        opt.lr = 0.5  # by the session
        assert session.run(opt.lr) == 0.5
        opt.set_weights([np.zeros_like(weight) for weight in opt.get_weights()])
        assert not any(weight.any() for weight in opt.get_weights())


@pytest.mark.parametrize("key", [lambda w: w, lambda w: w.ref()], ids=["itself", "ref"])
def test_constraints_in_a_graph(key: Callable[[Any], Any], tf: Any) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        w = tf.compat.v1.get_variable("w", initializer=[0.5, 0.5], use_resource=True)
        given = tf.constant([1.0, -1.0])
        updates = Adam(lr=1.0).get_updates(
            [w], {key(w): lambda value: tf.maximum(value, 0.0)}, tf.reduce_sum(w * given)
        )
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(updates)
        np.testing.assert_allclose(session.run(w), [0.0, 1.5], atol=1e-6)
        session.run(updates)
        np.testing.assert_allclose(session.run(w), [0.0, 2.5], atol=1e-5)


def test_inside_a_function(tf: Any) -> None:
    start = variables(shapes=SHAPES)
    reference = reference_contrib_keras(start, **SETTINGS["all"])
    params, opt = [tf.Variable(w) for w in start], Adam(**SETTINGS["all"])

    @tf.function(autograph=False)
    def step(grads: Any) -> None:
        loss = tf.add_n([tf.reduce_sum(w * g) for w, g in zip(params, grads, strict=True)])
        updates = opt.get_updates(params, {}, loss)
        assert all(isinstance(update, tf.Operation) for update in updates)

    for i in range(STEPS):
        now = gradients(i, SHAPES)
        step([tf.constant(g) for g in now])
        reference.step(now)
    assert_as_in(reference, [w.numpy() for w in params], opt.get_weights())
