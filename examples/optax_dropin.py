"""A training loop with optax as it stands everywhere, with one import changed."""

import jax
import jax.numpy as jnp
import optax

import omniadam.optax
from omniadam.optax import adamw  # was: from optax import adamw

points = jax.random.uniform(jax.random.key(0), (512, 2), minval=-1, maxval=1)
labels = (points.prod(axis=1) > 0).astype(jnp.int32)  # like signs or not: no line separates them


def weights():
    first, second = jax.random.split(jax.random.key(1))
    return {
        "hidden": {"kernel": jax.random.normal(first, (2, 32)), "bias": jnp.zeros(32)},
        "scores": {"kernel": jax.random.normal(second, (32, 2)) / 32**0.5, "bias": jnp.zeros(2)},
    }


def scores(params):
    hidden = jax.nn.relu(points @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["scores"]["kernel"] + params["scores"]["bias"]


@jax.jit
@jax.grad
def gradient(params):
    return optax.losses.softmax_cross_entropy_with_integer_labels(scores(params), labels).mean()


def kernels_only(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


solver = optax.chain(
    optax.clip_by_global_norm(1.0),
    adamw(optax.cosine_decay_schedule(0.03, 200), weight_decay=0.01, mask=kernels_only),
)

# As with optax: updates, and then parameters.
params = weights()
state = solver.init(params)
update = jax.jit(solver.update)
for _ in range(200):
    updates, state = update(gradient(params), state, params)
    params = optax.apply_updates(params, updates)

# Or both in one call, in place: the arrays that went in are gone.
again = weights()
state = solver.init(again)
step = omniadam.optax.step(solver)
for _ in range(200):
    again, state = step(gradient(again), state, again)

for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    assert jnp.allclose(one, other, atol=1e-3)
accuracy = (scores(again).argmax(axis=1) == labels).mean()
print(f"optax, drop-in: accuracy {accuracy:.1%}")
assert accuracy > 0.9
