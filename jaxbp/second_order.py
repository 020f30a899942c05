"""Second-order optimisers in Optax's interface: natural gradient, Gauss-Newton by conjugate gradients, K-FAC.

Beside the gradient their `update` takes the batch that it is of, for the curvature of the batch's mean loss::

    optimizer = natural_gradient(net, learning_rate=0.1)
    updates, state = optimizer.update(grads, state, params, batch=Batch(x, y))

Gauss-Newton and K-FAC minimise a quadratic model of the loss at each step, M(d) = ⟨g, d⟩ + ½ dᵀ(G + λ)d, G the
Gauss-Newton matrix, and move by η d. So η = 1 is a whole step. λ, the damping, is adapted as by Levenberg and
Marquardt: it grows where the loss falls by less than a quarter of what M promises, and shrinks above three quarters.
Optax is in the extra [run]. Errors are those of `jaxbp.curvature`.

Sources: J. Martens, *Deep learning via Hessian-free optimization*, 2010, §4.1 (λ); J. Martens and R. Grosse,
*Optimizing neural networks with Kronecker-factored approximate curvature*, 2015, §5
(averages), §6.4 and §7 (step and momentum from the model), §6.5 (λ); Y. Ren and D. Goldfarb, *Efficient subsampled
Gauss-Newton and natural gradient methods*, 2019.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs as Optimizer

from jaxbp import influence, kronecker, losses
from jaxbp.curvature import Linearized, Share, linearized
from jaxbp.kronecker import Kronecker
from jaxbp.mlp import MLP, Array, Params, forward, wide
from jaxbp.network import factors
from jaxbp.spectrum import cg

Rate = ArrayLike | Callable[[Array], ArrayLike]
KEEP = 0.95  # of the averages of Kronecker factors, once there are twenty
EVERY = 5  # steps from one change of λ to the next, by DECAY to the power of EVERY
DECAY = 19 / 20


class Batch(NamedTuple):
    """Inputs and targets, with weights and normalize_by as for `jaxbp.gradient`."""

    x: ArrayLike
    y: ArrayLike
    weights: Share = None
    normalize_by: Share = None


class Adapted(NamedTuple):
    """How many steps there were, and λ."""

    steps: Array
    damping: Array


class Kfac(NamedTuple):
    """How many steps there were, λ, the averages of the factors, the inverses in use, the last step d."""

    steps: Array
    damping: Array
    blocks: tuple[Kronecker, ...]
    inverses: tuple[Kronecker, ...]
    last: Params


def natural_gradient(net: MLP, learning_rate: Rate, damping: float = 0.01) -> Optimizer:
    """−η (F + λ)⁻¹ g with the empirical Fisher matrix F of the batch, see `jaxbp.influence.natural_gradient`.

    Args:
      net: the network.
      learning_rate: η, or η of the count of steps.
      damping: λ > 0, fixed.

    Returns:
      A `GradientTransformationExtraArgs` of Optax; its state is the count of steps.

    Raises:
      ValueError: a damping that is not positive.
    """
    _positive(damping)

    def update(grads: Params, count: Array, params: Params, *, batch: Batch) -> tuple[Any, Array]:
        f = factors(net, params, batch.x, batch.y)[1]
        d = influence.natural_gradient(f, damping, batch.weights, batch.normalize_by)
        return _times(-_rate(learning_rate, count), d), count + 1

    return Optimizer(lambda params: jnp.zeros((), jnp.int32), update)


def gauss_newton(net: MLP, learning_rate: Rate, damping: float = 1.0, products: int = 20) -> Optimizer:
    """−η (G + λ)⁻¹ g by conjugate gradients, with as many products G v as `products` at most.

    Args:
      net, learning_rate: as for `natural_gradient`.
      damping: λ > 0 of the first step; then it is adapted.
      products: at which CG stops; before, where ‖g − (G + λ) d‖ ≤ 10⁻³ ‖g‖.

    Returns:
      A `GradientTransformationExtraArgs` of Optax; its state is `Adapted`.

    Raises:
      ValueError: a damping that is not positive.
    """
    _positive(damping)

    def init(params: Params) -> Adapted:
        return Adapted(jnp.zeros((), jnp.int32), jnp.asarray(damping, wide(params[0].w.dtype)))

    def update(grads: Params, state: Adapted, params: Params, *, batch: Batch) -> tuple[Params, Adapted]:
        matrix = linearized(net, params, batch.x, batch.y, "ggn", batch.weights, batch.normalize_by)
        d = cg(matrix, _times(-1, grads), state.damping, tolerance=1e-3, steps=products).x
        step = _times(_rate(learning_rate, state.steps), d)
        adapted = _adapted(matrix, grads, step, state.damping, state.steps)
        return step, Adapted(state.steps + 1, adapted)

    return Optimizer(init, update)


def kfac(net: MLP, learning_rate: Rate, damping: float = 1.0, inverse_every: int = 20, seed: int = 0) -> Optimizer:
    """η d, d = α Δ + μ d_last: Δ = −(K-FAC + λ)⁻¹ g, and M is least at α and μ, the momentum.

    The factors are those of `jaxbp.kronecker.kfac` with kind mc, averaged over steps.

    Args:
      net, learning_rate: as for `natural_gradient`.
      damping: λ > 0 of the first step; then it is adapted.
      inverse_every: steps from one inverse of the factors to the next; the first three steps have their own.
      seed: of the random columns of mc.

    Returns:
      A `GradientTransformationExtraArgs` of Optax; its state is `Kfac`.

    Raises:
      ValueError: a damping that is not positive.
    """
    _positive(damping)

    def init(params: Params) -> Kfac:
        dtype = wide(params[0].w.dtype)
        zeros = tuple(
            Kronecker(jnp.zeros((w.shape[1] + 1,) * 2, dtype), jnp.zeros((len(w),) * 2, dtype)) for w, _ in params
        )
        zero = jax.tree.map(jnp.zeros_like, params)
        return Kfac(jnp.zeros((), jnp.int32), jnp.asarray(damping, dtype), zeros, zeros, zero)

    def update(grads: Params, state: Kfac, params: Params, *, batch: Batch) -> tuple[Params, Kfac]:
        count, key = state.steps, jax.random.fold_in(jax.random.key(seed), state.steps)
        found = kronecker.kfac(net, params, *batch[:2], "mc", key, *batch[2:])
        keep = jnp.minimum(1 - 1 / (count + 1).astype(state.damping.dtype), KEEP)
        blocks = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.blocks, found)
        inverses = jax.lax.cond(
            (count < 3) | (count % inverse_every == 0),
            lambda blocks: tuple(block.inverse(state.damping) for block in blocks),
            lambda _: state.inverses,
            blocks,
        )
        matrix = linearized(net, params, batch.x, batch.y, "ggn", batch.weights, batch.normalize_by)
        delta = _times(-1, tuple(inverse.matvec(g) for inverse, g in zip(inverses, grads, strict=True)))
        step = _times(_rate(learning_rate, count), _least(matrix, grads, delta, state.last, state.damping))
        adapted = _adapted(matrix, grads, step, state.damping, count)
        return step, Kfac(count + 1, adapted, blocks, inverses, step)

    return Optimizer(init, update)


def _least(matrix: Linearized, g: Params, delta: Params, last: Params, damping: Array) -> Params:
    """α Δ + μ d_last at which M is least; d_last is 0 in the first step, and then α Δ."""
    # fmt: off
    directions = (delta, last)
    products = [_plus(matrix(d), _times(damping, d)) for d in directions]    # (G + λ) d
    a = jnp.stack([jnp.stack([_dot(d, p) for p in products]) for d in directions])
    b = -jnp.stack([_dot(g, d) for d in directions])
    alone = jnp.stack([b[0] / a[0, 0], jnp.zeros_like(b[0])])
    det = a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]
    both = jnp.stack([a[1, 1] * b[0] - a[0, 1] * b[1], a[0, 0] * b[1] - a[1, 0] * b[0]])
    parallel = det <= 1e-4 * a[0, 0] * a[1, 1]                               # as at first, where d_last is 0
    alpha, mu = jnp.where(parallel, alone, both / jnp.where(parallel, 1, det))
    found: Params = _plus(_times(alpha, delta), _times(mu, last))
    return found
    # fmt: on


def _adapted(matrix: Linearized, g: Params, step: Params, damping: Array, count: Array) -> Array:
    """λ after a step d: by (19/20)⁵ less, or more, every fifth step."""

    def changed() -> Array:
        promised = _dot(g, step) + 0.5 * (_dot(step, matrix(step)) + damping * _dot(step, step))
        before, after = (_mean_loss(matrix, params) for params in (matrix.params, _plus(matrix.params, step)))
        ratio, by = (after - before) / jnp.where(promised < 0, promised, jnp.nan), DECAY**EVERY
        return jnp.where(ratio > 0.75, damping * by, jnp.where(ratio < 0.25, damping / by, damping))

    adapted: Array = jax.lax.cond(count % EVERY == 0, changed, lambda: damping)
    return adapted


def _mean_loss(matrix: Linearized, params: Params) -> Array:
    """Of the batch, at other parameters."""
    net, loss, x = matrix.net, losses.get(matrix.net.loss), matrix.tape.x[0]
    found = jax.vmap(lambda x, y: loss.ell(forward(net, params, x).x[-1].astype(matrix.scale.dtype), y))(x, matrix.y)
    return jnp.sum(jnp.where(matrix.scale == 0, 0, matrix.scale * found))


def _rate(learning_rate: Rate, count: Array) -> Array:
    return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)


def _times(scale: ArrayLike, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(scale, leaf.dtype) * leaf, tree)


def _plus(tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), tree, other)


def _dot(tree: Any, other: Any) -> Array:
    """In float32 at least."""
    products = jax.tree.map(lambda a, b: jnp.vdot(a.astype(wide(a.dtype)), b.astype(wide(a.dtype))), tree, other)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def _positive(damping: float) -> None:
    if not damping > 0:
        raise ValueError(f"damping is {damping}, allowed: damping > 0")
