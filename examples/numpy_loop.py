"""Softmax regression on NumPy arrays, gradients by hand; stopped half-way, and gone on with."""

import numpy as np

from omniadam import Adam, schedules

rng = np.random.default_rng(0)
labels = rng.integers(3, size=600)
points = np.array([[-2, 0], [2, 0], [0, 3]])[labels] + rng.standard_normal((600, 2))


def probabilities(weights):
    scores = points @ weights["dense/kernel"] + weights["dense/bias"]
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def step(opt, weights):
    error = (probabilities(weights) - np.eye(3)[labels]) / len(points)
    gradients = [points.T @ error, error.sum(axis=0)]
    opt.apply_gradients(zip(gradients, weights.values(), strict=True))


def optimizer(weights):
    rate = schedules.CosineDecay(0.1, decay_steps=100)
    opt = Adam(rate, weight_decay=1e-3, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9)
    opt.build(weights)  # a mapping: state is kept under these names
    return opt


weights = {"dense/kernel": np.zeros((2, 3)), "dense/bias": np.zeros(3)}
opt = optimizer(weights)
for _ in range(50):
    step(opt, weights)

# All that a run consists of: the weights and the optimizer's state, both NumPy arrays.
saved = {name: value.copy() for name, value in weights.items()}, opt.get_weights()

for _ in range(50):
    step(opt, weights)

resumed, state = saved
again = optimizer(resumed)
again.set_weights(state)
for _ in range(50):
    step(again, resumed)
assert all((weights[name] == resumed[name]).all() for name in weights)  # to the bit

opt.finalize_variable_values(weights)  # the averages are the weights to use
accuracy = (probabilities(weights).argmax(axis=1) == labels).mean()
print(f"NumPy: {opt.iterations} steps, accuracy {accuracy:.1%}")
assert accuracy > 0.9
