"""JAX, both ways: Refs updated in place inside one compiled step, and arrays in and out of one."""

from functools import partial

import jax
import jax.numpy as jnp

from omniadam import Adam, schedules

points = jax.random.uniform(jax.random.key(0), (512, 2), minval=-1, maxval=1)
labels = (points.prod(axis=1) > 0).astype(jnp.int32)  # like signs or not: no line separates them


def weights():
    first, second = jax.random.split(jax.random.key(1))
    return {
        "hidden/kernel": jax.random.normal(first, (2, 32)),
        "hidden/bias": jnp.zeros(32),
        "scores/kernel": jax.random.normal(second, (32, 2)) / 32**0.5,
        "scores/bias": jnp.zeros(2),
    }


def scores(kernel, bias, last_kernel, last_bias):
    return jax.nn.relu(points @ kernel + bias) @ last_kernel + last_bias


def loss(*values):
    return -jnp.mean(jax.nn.log_softmax(scores(*values))[jnp.arange(512), labels])


def optimizer(variables):
    opt = Adam(schedules.CosineDecay(0.03, decay_steps=200), global_clipnorm=1.0, use_ema=True)
    opt.build(variables)  # outside of compiled functions, as its state outlives them
    return opt


# Refs: forward, backward and step are one compiled function, which changes weights and state.
refs = {name: jax.new_ref(value) for name, value in weights().items()}
opt = optimizer(refs)


@jax.jit
def train():
    opt.minimize(loss, refs)


for _ in range(200):
    train()

# Arrays: a pure function. Results in the order of the arguments, so that donation needs no copies.
values = list(weights().values())
pure = optimizer(dict(zip(refs, values, strict=True)))
state = pure.variables


@partial(jax.jit, donate_argnums=(0, 1))
def step(values, state):
    gradients = jax.grad(loss, argnums=tuple(range(len(values))))(*values)
    return pure.stateless_apply(state, gradients, values)


for _ in range(200):
    values, state = step(values, state)

accuracy = jnp.mean(scores(*values).argmax(axis=1) == labels)
print(f"{opt.iterations} steps on Refs, {state[0]} on arrays, accuracy {accuracy:.1%}")
assert accuracy > 0.95
assert all(
    jnp.allclose(ref[...], x, atol=1e-3) for ref, x in zip(refs.values(), values, strict=True)
)
