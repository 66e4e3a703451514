"""A Keras model in a loop of one's own, on TensorFlow, JAX or PyTorch: KERAS_BACKEND says which."""

import keras
import numpy as np

from omniadam import Adam

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
points = rng.uniform(-1, 1, (512, 2)).astype("float32")
labels = (points.prod(axis=1) > 0).astype("int32")  # like signs or not: no line separates them

model = keras.Sequential(
    [
        keras.Input((2,)),
        keras.layers.Dense(32, "relu", kernel_constraint=keras.constraints.MaxNorm(3)),
        keras.layers.Dense(2),
    ]
)
opt = Adam(keras.optimizers.schedules.CosineDecay(0.03, 200), global_clipnorm=1.0)


def loss(*weights):
    """Of values given from outside, so that each library can differentiate it, JAX too."""
    scores, _ = model.stateless_call(weights, model.non_trainable_variables, points)
    losses = keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=True)
    return keras.ops.mean(losses)


for _ in range(200):
    opt.minimize(loss, model.trainable_variables)

accuracy = (model.predict(points, verbose=0).argmax(axis=1) == labels).mean()
print(f"Keras on {keras.backend.backend()}: {int(opt.iterations)} steps, accuracy {accuracy:.1%}")
assert accuracy > 0.9
