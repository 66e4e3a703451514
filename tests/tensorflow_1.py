"""Run by test_optimizer_v2.py, in a process without eager execution: scripts of TensorFlow 1.

Variables are no resources, operations run in a session, a model of Keras in a session of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import autograd.numpy as anp
    import tensorflow.compat.v1 as tf
    import tf_keras

    tf.disable_v2_behavior()

from omniadam import migrate
from omniadam.compat import contrib_keras, optimizer_v2

# Exact in the float32 of the original's hyperparameters.
EXACT: dict[str, Any] = {"beta_1": 0.875, "beta_2": 0.9375, "decay": 0.25}
STEPS = 50
ROWS = np.array([1, 1, 2])


def variables(scope: str) -> list[Any]:
    with tf.variable_scope(scope):
        w = tf.get_variable("w", initializer=np.array([1.0, -2.0]))
        return [w, tf.get_variable("table", initializer=np.ones((4, 2)))]


def loss(w: Any, table: Any) -> Any:
    return tf.reduce_sum(w**2) + tf.reduce_sum(tf.gather(table, ROWS) ** 4)


def test_get_updates_of_tensorflow_1_1() -> None:
    settings = {"lr": 0.125, "clipnorm": 1.0, "clipvalue": 0.5, **EXACT}
    params = variables("contrib")
    assert type(params[0]).__name__ == "RefVariable"
    opt = contrib_keras.Adam(**settings)
    constraints = {params[0]: lambda value: tf.maximum(value, -1.25)}
    updates = opt.get_updates(params, constraints, loss(*params))
    assert all(isinstance(update, tf.Operation) for update in updates)

    copies = [np.array([1.0, -2.0]), np.ones((4, 2))]
    other = contrib_keras.Adam(**settings)
    [step] = other.get_updates(
        copies,
        {id(copies[0]): lambda value: np.maximum(value, -1.25)},
        lambda w, table: anp.sum(w**2) + anp.sum(table[ROWS] ** 4),
    )
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(STEPS):
            session.run(updates)
            step()
        for got, want in zip(session.run(params), copies, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)
        for got, want in zip(opt.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)
        assert opt.get_config() == other.get_config()


def test_operations_of_tensorflow_2_0() -> None:
    params = variables("v2")
    opt = optimizer_v2.Adam(lr=0.125, amsgrad=True, clipnorm=1.0, **EXACT)
    steps = [
        opt.minimize(lambda: loss(*params), params, name="step"),
        *opt.get_updates(loss(*params), params),
        opt.apply_gradients(
            zip(opt.get_gradients(loss(*params), params), params, strict=True), name="train"
        ),
    ]
    assert all(isinstance(step, tf.Operation) for step in steps)
    assert (steps[0].name, steps[2].name) == ("step", "train")
    copies = [np.array([1.0, -2.0]), np.ones((4, 2))]
    other = optimizer_v2.Adam(lr=0.125, amsgrad=True, clipnorm=1.0, **EXACT)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for i in range(6):
            session.run(steps[i % 3])
            other.minimize(lambda w, table: anp.sum(w**2) + anp.sum(table[ROWS] ** 4), copies)
        for got, want in zip(opt.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)
        new = migrate(opt)
        assert new.iterations == 6 and new.get_config() == migrate(other).get_config()
        new.minimize(lambda w, table: anp.sum(w**2) + anp.sum(table[ROWS] ** 4), copies)
        session.run(steps[0])
        for got, want in zip(session.run(params), copies, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_model_of_keras() -> None:
    """Which has no session that is entered: the optimizer finds that of the model."""
    data, labels = np.arange(100, dtype=np.float32).reshape(5, 20) / 50, np.zeros((5, 10))
    results = []
    for make in (optimizer_v2.Adam, tf_keras.optimizers.legacy.Adam):
        tf_keras.backend.clear_session()
        opt = make(0.125, clipvalue=0.5, **EXACT)
        model = tf_keras.models.Sequential(
            [tf_keras.layers.Dense(10, input_shape=(20,), kernel_initializer="ones")]
        )
        model.compile(opt, loss="mse")
        model.fit(data, labels, epochs=4, shuffle=False, verbose=0)
        assert opt.get_config()["learning_rate"] == 0.125
        assert migrate(opt).iterations == 4
        weights = opt.get_weights()
        assert weights[0] == 4 and len(weights) == 5
        opt.set_weights([np.zeros_like(weight) for weight in weights])
        tf_keras.backend.set_value(opt.lr, 0.25)
        model.fit(data, labels, epochs=2, shuffle=False, verbose=0)
        results.append([*model.get_weights(), *opt.get_weights()])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(name)
