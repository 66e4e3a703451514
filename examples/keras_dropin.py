"""A Keras model, compiled and fitted as everywhere, with one import changed."""

import tempfile

import keras
import numpy as np

from omniadam.keras import AdamW  # was: from keras.optimizers import AdamW

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
points = rng.uniform(-1, 1, (512, 2)).astype("float32")
labels = (points.prod(axis=1) > 0).astype("int32")  # like signs or not: no line separates them

model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(2)])
# Clipping, decay and averaging are part of the one pass that makes the step.
schedule = keras.optimizers.schedules.CosineDecay(0.03, 400)
optimizer = AdamW(schedule, weight_decay=0.01, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9)
optimizer.exclude_from_weight_decay(var_names=["bias"])
model.compile(
    optimizer,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(points, labels, batch_size=64, epochs=25, verbose=0)

with tempfile.TemporaryDirectory() as folder:
    model.save(f"{folder}/model.keras")
    again = keras.saving.load_model(f"{folder}/model.keras")
assert type(again.optimizer) is AdamW and int(again.optimizer.iterations) == 200

for each in (model, again):
    each.fit(points, labels, batch_size=64, epochs=25, verbose=0, shuffle=False)
pairs = zip(model.get_weights(), again.get_weights(), strict=True)
assert all(np.array_equal(weight, other) for weight, other in pairs)

accuracy = again.evaluate(points, labels, verbose=0, return_dict=True)["accuracy"]
print(f"Keras on {keras.backend.backend()}, drop-in: accuracy {accuracy:.1%}")
assert accuracy > 0.9
