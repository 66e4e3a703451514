"""Adam and AdamW with the interface of optax: change the import, keep everything else.

Nothing is computed here. The state is optax's own (`optax.ScaleByAdamState` in the tuple that
`optax.chain` makes), so that states and checkpoints of either are those of the other; so are
`chain`, the learning rate and the weight decay. Only the direction of a step comes from our rule,
and the velocity of narrow parameters begins as float32, since nothing moves it in their own type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import options, versions

with versions.imported("optax", "jax", user="omniadam.optax"):
    import jax
    import jax.numpy as jnp
    import optax
    from jax import lax
    from jax.core import Tracer
    from jax.typing import ArrayLike, DTypeLike

from .backends.jax import Arrays, TracedNumbers
from .rule import adam_coefficients, make_adam, optax_coefficients

__all__ = ["adam", "adamw", "scale_by_adam", "step"]


def __dir__() -> list[str]:
    return __all__


@options.leads_on("optax")
def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    epsilon_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam` with the same arguments, state and numbers; docs/optax.md says what differs.

    Args:
        learning_rate: a number, a scalar array, or a schedule: a callable that maps the count of
            steps before this one to a number, such as those of optax and of `omniadam.schedules`.
        b1: 0 <= number < 1, or a scalar array, as are the next three; what the momentum keeps.
        b2: what the velocity keeps.
        eps: number >= 0, added to the root of the corrected velocity.
        eps_root: number >= 0, added to the corrected velocity under the root.
        mu_dtype: type of the momentum in the state; None for that of the parameters. The velocity
            has that of the parameters, but float32 where they are of 16 bits.
        nesterov: whether to use Nesterov's momentum: `optax.nadam`.
        epsilon_hat: whether `eps` and `eps_root` are outside of the bias correction: the "epsilon
            hat" of the paper, as in Keras.

    Returns:
        An `optax.GradientTransformationExtraArgs`: `init(params)` gives the state, and
        `update(grads, state, params)` updates of the shapes and types of the gradients, and the
        new state.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: of `update`, for a gradient that does not hold numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from omniadam.optax import adam
        >>> solver = adam(0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = solver.init(params)
        >>> for _ in range(3):
        ...     grads = jax.grad(lambda w: jnp.sum(w * w))(params)
        ...     updates, state = solver.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> [round(float(x), 3) for x in params]
        [0.702, -1.701]

    Sources: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980; Dozat 2016,
    https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ; optax/_src/alias.py.
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, epsilon_hat=epsilon_hat),
        optax.scale_by_learning_rate(learning_rate),
    )


@options.leads_on("optax")
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    epsilon_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw`: `adam` with decoupled weight decay.

    Args:
        learning_rate: as in `adam`.
        b1: as in `adam`.
        b2: as in `adam`.
        eps: as in `adam`.
        eps_root: as in `adam`.
        mu_dtype: as in `adam`.
        weight_decay: a number or a schedule. A step takes this, times the learning rate, of each
            parameter away.
        mask: which parameters decay: a tree of booleans like the parameters or like the top of
            their tree, or a callable that makes it from the parameters; None for all.
        nesterov: as in `adam`: `optax.nadamw`.
        epsilon_hat: as in `adam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its `update` needs the parameters.

    Raises:
        ValueError: if a setting is out of its range; of `update`, if it is not given `params`.
        TypeError: as of `adam`.

    Example:
        >>> import jax.numpy as jnp
        >>> from omniadam.optax import adamw
        >>> solver = adamw(0.1, weight_decay=0.5, mask={"w": True, "b": False})
        >>> params = {"w": jnp.ones(1), "b": jnp.ones(1)}
        >>> updates, _ = solver.update({"w": jnp.zeros(1), "b": jnp.zeros(1)},
        ...                            solver.init(params), params)
        >>> round(float(updates["w"][0]), 3), abs(float(updates["b"][0]))
        (-0.05, 0.0)

    Sources: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101; optax/_src/alias.py.
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, epsilon_hat=epsilon_hat),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@options.leads_on("optax")
def scale_by_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    epsilon_hat: bool = False,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam`: the direction of Adam's step, for a chain of one's own.

    Args:
        b1: as in `adam`.
        b2: as in `adam`.
        eps: as in `adam`.
        eps_root: as in `adam`.
        mu_dtype: as in `adam`.
        nesterov: as in `adam`.
        epsilon_hat: as in `adam`.

    Returns:
        An `optax.GradientTransformation`, whose updates are to be subtracted.

    Raises:
        ValueError: if a setting is out of its range; of `update`, if the gradients have other
            shapes or another tree than the state.
        TypeError: as of `adam`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from omniadam.optax import scale_by_adam
        >>> solver = optax.chain(optax.clip(1.0), scale_by_adam(), optax.scale(-0.1))
        >>> params = jnp.ones(2)
        >>> updates, _ = solver.update(jnp.array([5.0, -0.5]), solver.init(params), params)
        >>> [round(float(x), 3) for x in updates]
        [-0.1, 0.1]

    Sources: Kingma & Ba 2014, Algorithm 1; optax/_src/transform.py.
    """
    b1, b2 = (_setting(n, x, options.decay_rate) for n, x in (("b1", b1), ("b2", b2)))
    eps = _setting("eps", eps, options.small_constant)
    eps_root = _setting("eps_root", eps_root, options.small_constant)
    nesterov, epsilon_hat = bool(nesterov), options.boolean("epsilon_hat", epsilon_hat)
    mu_dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)
    # Of an array, which may be traced, nothing is known: it gets what is right for every value.
    short = {f"short_{i}": isinstance(b, float) and b < 0.5 for i, b in ((1, b1), (2, b2))}
    is_rooted = eps_root != 0.0 if isinstance(eps_root, float) else True
    rule = make_adam(
        Arrays,
        amsgrad=False,
        nesterov=nesterov,
        rooted=is_rooted,
        square=_square,
        **short,
    )

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda x: jnp.zeros_like(x, mu_dtype), params),
            nu=jax.tree.map(_velocity, params),
        )

    def update(
        updates: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        t = jnp.asarray(count, float)
        coefficients: tuple[Any, ...] = adam_coefficients(
            TracedNumbers, -1.0, t, b1, b2, eps, epsilon_hat=epsilon_hat, **short
        )
        if nesterov or is_rooted:
            more = optax_coefficients(TracedNumbers, t, b1, b2, eps_root, epsilon_hat=epsilon_hat)
            coefficients = (*coefficients, *more)
        # By path, as a model may have leaves here that have no gradient.
        given = dict(jax.tree.leaves_with_path(params))

        def direction(path: Any, g: Any, mu: Any, nu: Any) -> tuple[Any, Any, Any]:
            _check_number(path, g)
            if jnp.shape(g) != jnp.shape(mu) or jnp.shape(g) != jnp.shape(nu):
                raise ValueError(
                    f"The gradient of parameter {_named(path)} must have the shape of the "
                    f"parameter that its state was made for. Received a gradient of shape "
                    f"{jnp.shape(g)}, and `mu` and `nu` of shapes {jnp.shape(mu)} and "
                    f"{jnp.shape(nu)}."
                )
            # The types that optax ends with, by its order of operations: integers become floating,
            # and the velocity has the type of the parameter, which is that of its gradient.
            mean = jnp.result_type(g, mu, 1.0)
            own = jnp.result_type(given.get(path, g))
            end = jnp.result_type(mean, own if _is_narrow(own) else jnp.result_type(nu, 1.0))
            wide = "float32" if _is_narrow(end) else jnp.finfo(end).dtype.name
            c = tuple(x if isinstance(x, float) else Arrays.cast(x, wide) for x in coefficients)
            both = jnp.result_type(wide, 1j).name if _is_complex(mean) else wide
            g, m = (Arrays.cast(jnp.asarray(x), both) for x in (g, mu))
            v = Arrays.cast(jnp.real(nu), wide)
            # Where the rule takes zero, at a rate of -1: no rounding of a variable is in it.
            u, (m, v) = rule(0.0, g, (m, v), c)
            return (
                u.astype(end),
                m.astype(mean if mu_dtype is None else mu_dtype),
                v.astype(jnp.result_type(nu)),
            )

        leaves, tree = jax.tree.flatten_with_path(updates)
        for moments in (state.mu, state.nu):
            if jax.tree.structure(moments) != tree:
                raise ValueError(
                    "The gradients must be a tree like the parameters that the state was made for. "
                    f"Received a tree {tree}, and state for {jax.tree.structure(moments)}."
                )
        new = [
            direction(path, g, mu, nu)
            for (path, g), mu, nu in zip(
                leaves, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True
            )
        ]
        directions, mu, nu = (tree.unflatten([each[i] for each in new]) for i in range(3))
        return directions, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def step(transformation: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """Compile a transformation and `optax.apply_updates` into one call that works in place.

    For those who do not need the updates in between. Parameters and state are donated: the new ones
    take their memory, and the old ones cannot be used any more.

    Args:
        transformation: of this module, of optax, or any chain of both.

    Returns:
        A function that takes what `transformation.update` takes, `(grads, state, params)` and any
        extra arguments by name, and returns `(params, state)`.

    Raises:
        TypeError: if it is no transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import omniadam.optax
        >>> solver = optax.chain(optax.clip_by_global_norm(1.0), omniadam.optax.adam(0.1))
        >>> step = omniadam.optax.step(solver)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = solver.init(params)
        >>> for _ in range(3):
        ...     params, state = step(jax.grad(lambda w: jnp.sum(w * w))(params), state, params)
        >>> [round(float(x), 3) for x in params]
        [0.701, -1.7]
    """
    if not isinstance(transformation, optax.GradientTransformation):
        raise TypeError(
            "`step` takes an optax.GradientTransformation, such as omniadam.optax.adam(1e-3). "
            f"Received: {type(transformation).__name__}."
        )
    update = optax.with_extra_args_support(transformation).update

    # JAX pairs what is donated with the outputs of the same shape and type in the order of both.
    # Were it another, nearly every array would get another's memory, and XLA would copy it first.
    def omniadam_step(params: Any, state: Any, grads: Any, extra: Any) -> tuple[Any, Any]:
        updates, state = update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(omniadam_step, donate_argnums=(0, 1))

    def step(grads: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        new: tuple[Any, Any] = compiled(params, state, grads, extra)
        return new

    return step


def _setting(name: str, value: Any, check: options.Check) -> Any:
    """A number in double precision, or an array, of which nothing is known while it is traced."""
    if not isinstance(value, jax.Array):
        return check(name, value)
    try:
        for each in () if isinstance(value, Tracer) else np.asarray(value, float).flat:
            check(name, float(each))
    except ValueError as error:
        if not _is_narrow(value.dtype):
            raise
        raise ValueError(
            f"{error}, to which a {value.dtype} may have been rounded. optax.inject_hyperparams "
            "gives numbers the type of the parameters: pass it hyperparam_dtype=jnp.float32."
        ) from None
    return jnp.asarray(value, float)


def _velocity(leaf: Any) -> Any:
    """Zeros like a parameter, but of float32 for a narrow one: its own type could not be moved."""
    return jnp.zeros_like(leaf, "float32" if _is_narrow(jnp.result_type(leaf)) else None)


def _square(g: Any) -> Any:
    return lax.real(g) * lax.real(g) + lax.imag(g) * lax.imag(g) if _is_complex(g.dtype) else g * g


def _is_narrow(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


def _named(path: Any) -> str:
    return repr(jax.tree_util.keystr(path)) if path else "''"


def _check_number(path: Any, gradient: Any) -> None:
    dtype = jnp.result_type(gradient)
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(
            f"The gradient of parameter {_named(path)} must hold numbers. Received dtype {dtype}. "
            "To leave it out, use optax.masked or optax.partition."
        )
