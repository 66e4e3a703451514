"""TensorFlow variables in a loop: train, checkpoint, and go on with the same numbers."""

import tempfile

import tensorflow as tf

from omniadam import AdamW, schedules

tf.random.set_seed(0)
points = tf.random.uniform((512, 2), -1.0, 1.0)
labels = tf.cast(tf.reduce_prod(points, axis=1) > 0, tf.int64)  # no line separates them


class Network(tf.Module):
    def __init__(self):
        super().__init__()
        self.hidden = tf.Variable(tf.random.normal((2, 32)), name="hidden/kernel")
        self.bias = tf.Variable(tf.zeros(32), name="hidden/bias")
        self.out = tf.Variable(tf.random.normal((32, 2)) / 4, name="out/kernel")

    def __call__(self, x):
        return tf.nn.relu(x @ self.hidden + self.bias) @ self.out


def optimizer():
    rate = schedules.CosineDecay(0.03, decay_steps=200)
    opt = AdamW(rate, weight_decay=0.01, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9)
    opt.exclude_from_weight_decay(var_names=["bias"])
    return opt


def trainer(network, opt):
    @tf.function  # jit_compile=True works, too
    def step():
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, network(points))
            loss = tf.reduce_mean(losses)
        weights = network.trainable_variables
        opt.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    return step


network, opt = Network(), optimizer()
step = trainer(network, opt)
for _ in range(100):
    step()

with tempfile.TemporaryDirectory() as directory:
    path = tf.train.Checkpoint(network=network, opt=opt).save(f"{directory}/checkpoint")
    for _ in range(100):
        step()

    again, resumed = optimizer(), Network()
    # What belongs to the optimizer is read when its first step creates it.
    status = tf.train.Checkpoint(network=resumed, opt=again).restore(path)
    step = trainer(resumed, again)
    for _ in range(100):
        step()
    status.assert_existing_objects_matched()

pairs = zip(network.trainable_variables, resumed.trainable_variables, strict=True)
assert all(bool(tf.reduce_all(weight == other)) for weight, other in pairs)

opt.finalize_variable_values(network.trainable_variables)  # the averages are the weights to use
accuracy = tf.reduce_mean(tf.cast(tf.argmax(network(points), axis=1) == labels, tf.float32))
print(f"TensorFlow: {opt.iterations} steps, accuracy {float(accuracy):.1%}")
assert accuracy > 0.9
