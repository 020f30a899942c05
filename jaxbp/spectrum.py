"""Spectra, traces and solves of a symmetric matrix A that is known as a function v ↦ A v of pytrees.

`jaxbp.curvature.linearized` makes such an operator, any other will do; `like` is a pytree such as the parameters. Every
estimate comes with its error. Loops are compiled; Lanczos keeps `steps` vectors, each as large as `like`.

Why no library does this: matfree 0.6.3 goes on after the last vector that A adds, and finds eigenvalues that A does not
have (in 8 steps 1.38, of a matrix with 1, 2 and 5). lineax 0.1.1 says nothing of negative curvature. For 30 products
with the Gauss-Newton matrix of 784-256-256-10 Lanczos takes no longer than matfree's, and half its scratch.

Sources: G. Golub and G. Meurant, *Matrices, moments and quadrature*, 2010; B. Ghorbani et al., *An investigation into
neural net optimization via Hessian eigenvalue density*, 2019; R. Meyer et al., *Hutch++*, 2021; N. Agarwal et al.,
*Second-order stochastic optimization for machine learning in linear time*, 2017 (LiSSA).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from jaxbp.mlp import Array

Operator = Callable[[Any], Any]


class Lanczos(NamedTuple):
    """A ≈ Vᵀ T V: T has alpha on its diagonal and beta beside it, (steps,); the rows of V are vectors, (steps, P).

    The first `rank` of them count: where A adds nothing to their span, as at once for A = I, there are no more. What it
    would add has the size beta[rank − 1].
    """

    alpha: Array
    beta: Array
    vectors: Array
    rank: Array


def lanczos(operator: Operator, start: Any, steps: int) -> Lanczos:
    """Lanczos' recursion from a pytree. All vectors are made orthogonal: else eigenvalues appear again and again.

    Example:
      >>> int(lanczos(lambda v: jnp.array([1.0, 2.0, 2.0]) * v, jnp.ones(3), steps=3).rank)  # of the values 1 and 2
      2
    """
    q, unflatten = ravel_pytree(start)
    steps = min(_at_least(1, "steps", steps), q.size)
    zeros, eps = jnp.zeros(steps, q.dtype), 100 * float(jnp.finfo(q.dtype).eps)

    def going(state: tuple[Lanczos, Array, Array]) -> Array:
        found, q, _ = state
        return (found.rank < steps) & jnp.any(q != 0)

    def body(state: tuple[Lanczos, Array, Array]) -> tuple[Lanczos, Array, Array]:
        (alpha, beta, vectors, rank), q, size = state
        vectors, w = vectors.at[rank].set(q), _flat(operator(unflatten(q)))
        alpha, size = alpha.at[rank].set(q @ w), jnp.maximum(size, jnp.linalg.norm(w))
        for _ in range(2):  # once leaves an error of ε ‖A q‖ / β
            w = w - vectors.T @ (vectors @ w)
        norm = jnp.linalg.norm(w)
        norm = jnp.where(norm > eps * size, norm, 0)
        return Lanczos(alpha, beta.at[rank].set(norm), vectors, rank + 1), w * _inverse(norm), size

    found = Lanczos(zeros, zeros, jnp.zeros((steps, q.size), q.dtype), jnp.zeros((), jnp.int32))
    result: Lanczos = jax.lax.while_loop(going, body, (found, q * _inverse(jnp.linalg.norm(q)), zeros[0]))[0]
    return result


def _ritz(found: Lanczos) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of T, the largest first; what is beyond the rank comes last, apart from the rest."""
    below = -2 * jnp.max(jnp.abs(found.alpha)) - 4 * jnp.max(found.beta) - 1  # by Gershgorin
    alpha = jnp.where(jnp.arange(len(found.alpha), dtype=jnp.int32) < found.rank, found.alpha, below)
    values, vectors = jnp.linalg.eigh(jnp.diag(alpha) + jnp.diag(found.beta[:-1], 1) + jnp.diag(found.beta[:-1], -1))
    return values[::-1], vectors[:, ::-1]


class Eigenpairs(NamedTuple):
    """The largest eigenvalues, (k,), their vectors, a pytree of (k, …), and the residuals ‖A u − λ u‖, (k,)."""

    values: Array
    vectors: Any
    residuals: Array


def eigenpairs(operator: Operator, like: Any, k: int, key: Array, steps: int = 50) -> Eigenpairs:
    """The k largest eigenvalues, by Lanczos from a random start with `steps` products and k for the
    residuals; NaN beyond the last.

    A multiple eigenvalue is found once, but after many steps rounding may find it again: 80 steps found one of nine
    vectors nine times. Each is within its residual of an eigenvalue of A.

    Example:
      >>> largest = jax.jit(lambda d: eigenpairs(lambda v: d * v, d, 2, jax.random.key(0)).values.round(3))
      >>> largest(jnp.array([1.0, 2.0, 5.0])).tolist()
      [5.0, 2.0]
    """
    flat, unflatten = ravel_pytree(like)
    found = lanczos(operator, unflatten(jax.random.normal(key, flat.shape, flat.dtype)), steps)
    if not 1 <= k <= len(found.alpha):
        raise ValueError(f"k is {k}, allowed: 1 … {len(found.alpha)}, the number of steps or of parameters")
    values, vectors = (a[..., :k] for a in _ritz(found))
    there = jnp.arange(k, dtype=jnp.int32) < found.rank
    values, vectors = jnp.where(there, values, jnp.nan), jnp.where(there[:, None], vectors.T @ found.vectors, jnp.nan)
    products = _products(operator, unflatten, vectors)  # T's own residuals, β |s|, know nothing of rounding
    residuals = jnp.linalg.norm(products - values[:, None] * vectors, axis=1)
    return Eigenpairs(values, jax.vmap(unflatten)(vectors), residuals)


class Density(NamedTuple):
    """The spectral density (1/P) Σ δ(λ − λᵢ): nodes and weights, (probes, steps), of which each probe's sum to 1.

    Smoothed by a Gaussian it is `value` at `at`, with the standard error `error` over the probes, all (points,).
    """

    nodes: Array
    weights: Array
    at: Array
    value: Array
    error: Array


def spectral_density(
    operator: Operator, like: Any, key: Array, probes: int = 8, steps: int = 64, points: int = 200, width: float = 0.01
) -> Density:
    """The spectral density by stochastic Lanczos quadrature from random probes, with `steps` products for each.

    Args:
      width: the standard deviation of the Gaussian, as a share of the range of the nodes.

    Example:
      >>> density = jax.jit(lambda d: spectral_density(lambda v: d * v, d, jax.random.key(0), probes=2))
      >>> jnp.sum(density(jnp.array([1.0, 1.0, 2.0, 2.0])).weights, axis=1).round(5).tolist()
      [1.0, 1.0]
    """
    flat, unflatten = ravel_pytree(like)

    def probe(key: Array) -> tuple[Array, Array]:
        found = lanczos(operator, unflatten(jax.random.rademacher(key, flat.shape, flat.dtype)), steps)
        values, vectors = _ritz(found)
        return jnp.where(jnp.arange(len(values), dtype=jnp.int32) < found.rank, values, values[0]), vectors[0] ** 2

    nodes, weights = jax.lax.map(probe, jax.random.split(key, _at_least(1, "probes", probes)))
    low, high, size = jnp.min(nodes), jnp.max(nodes), jnp.max(jnp.abs(nodes))
    spread = width * jnp.where(high - low > 1e-6 * size, high - low, jnp.where(size > 0, size, 1))  # of A = I it is 0
    at = jnp.linspace(low - 3 * spread, high + 3 * spread, points, dtype=nodes.dtype)
    bumps = jnp.exp(-0.5 * ((at[None, :, None] - nodes[:, None, :]) / spread) ** 2) / (spread * (2 * jnp.pi) ** 0.5)
    return Density(nodes, weights, at, *_mean_and_error(jnp.sum(weights[:, None, :] * bumps, axis=2)))


class Estimate(NamedTuple):
    """A mean over random probes and its standard error."""

    value: Array
    error: Array


def trace(operator: Operator, like: Any, key: Array, products: int = 30, probes: str = "sign") -> Estimate:
    """tr A by Hutch++: on a subspace that A favours it is exact, in the rest a mean over random probes.

    Args:
      products: how many A v; a third for the subspace, a third on it, a third for the probes; at least 4.
      probes: their distribution, ±1 or normal.

    Example:
      >>> float(jax.jit(lambda d: trace(lambda v: -v, d, jax.random.key(0)).value.round(4))(jnp.ones(5)))
      -5.0
    """
    if probes not in ("sign", "normal"):
        raise ValueError(f"probes is {probes!r}, allowed: sign, normal")
    flat, unflatten = ravel_pytree(like)
    size = min(_at_least(4, "products", products) // 3, flat.size)
    draw = jax.random.rademacher if probes == "sign" else jax.random.normal
    sketch, rest = jnp.split(draw(key, (products - size, flat.size), flat.dtype), [size])

    times = functools.partial(_products, operator, unflatten)
    basis = jnp.linalg.qr(times(sketch).T)[0].T
    rest = rest - (rest @ basis.T) @ basis
    mean, error = _mean_and_error(jnp.sum(rest * times(rest), axis=1))
    return Estimate(jnp.sum(basis * times(basis)) + mean, error)


class Solution(NamedTuple):
    """x, and ‖b − A x‖, computed from x; the number of steps; the least pᵀA p / pᵀp that was met, ∞ if none was.

    Where that is not positive A is not positive definite: `cg` stopped before that step.
    """

    x: Any
    residual: Array
    steps: Array
    curvature: Array


def cg(operator: Operator, b: Any, damping: ArrayLike = 0.0, tolerance: float = 1e-6, steps: int = 100) -> Solution:
    """Conjugate gradients for (A + damping · I) x = b, until ‖b − A x‖ ≤ tolerance ‖b‖ or for so many steps.

    Example:
      >>> solution = cg(lambda v: jnp.array([1.0, -1.0]) * v, jnp.ones(2))
      >>> solution.x.tolist(), float(solution.curvature)
      ([0.0, 0.0], 0.0)
    """
    flat, unflatten = ravel_pytree(b)
    times, target = _damped(operator, unflatten, damping), tolerance * jnp.linalg.norm(flat)

    def going(state: tuple[Array, Array, Array, Array, Array]) -> Array:
        _, r, _, step, curvature = state
        return jnp.logical_and(jnp.linalg.norm(r) > target, (step < steps) & (curvature > 0))

    def body(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        x, r, p, step, curvature = state
        ap = times(p)
        curvature = jnp.minimum(curvature, (p @ ap) / (p @ p))
        rate = jnp.where(curvature > 0, (r @ r) * _inverse(p @ ap), 0)
        rest = r - rate * ap
        return x + rate * p, rest, rest + (rest @ rest) / (r @ r) * p, step + 1, curvature

    state = jnp.zeros_like(flat), flat, flat, jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, flat.dtype)
    x, _, _, step, curvature = jax.lax.while_loop(going, body, state)
    return Solution(unflatten(x), jnp.linalg.norm(flat - times(x)), step, curvature)


def lissa(operator: Operator, b: Any, scale: ArrayLike, damping: ArrayLike = 0.0, steps: int = 100) -> Solution:
    """(A + damping · I)⁻¹ b by the series of LiSSA, u ← b + u − (A + damping · I) u / scale; u / scale is the result.

    Args:
      scale: at least the largest eigenvalue of A + damping · I, else the series diverges.

    Example:
      >>> lissa(lambda v: jnp.array([1.0, 4.0]) * v, jnp.ones(2), scale=4.0, steps=200).x.round(4).tolist()
      [1.0, 0.25]
    """
    flat, unflatten = ravel_pytree(b)
    times, scale = _damped(operator, unflatten, damping), jnp.asarray(scale, flat.dtype)
    x = jax.lax.fori_loop(0, steps, lambda _, u: flat + u - times(u) / scale, flat) / scale
    none = jnp.full((), jnp.inf, flat.dtype)
    return Solution(unflatten(x), jnp.linalg.norm(flat - times(x)), jnp.asarray(steps, jnp.int32), none)


def _damped(operator: Operator, unflatten: Callable[[Array], Any], damping: ArrayLike) -> Callable[[Array], Array]:
    """u ↦ (A + damping · I) u on vectors."""
    return lambda u: _flat(operator(unflatten(u))) + jnp.asarray(damping, u.dtype) * u


def _products(operator: Operator, unflatten: Callable[[Array], Any], rows: Array) -> Array:
    """A times each row, one after the other."""
    products: Array = jax.lax.map(lambda row: _flat(operator(unflatten(row))), rows)
    return products


def _flat(tree: Any) -> Array:
    flat: Array = ravel_pytree(tree)[0]
    return flat


def _inverse(a: Array) -> Array:
    """1 / a, and 0 where a is 0."""
    return jnp.where(a == 0, 0, 1 / jnp.where(a == 0, 1, a))


def _mean_and_error(samples: Array) -> tuple[Array, Array]:
    """Over the first axis; the standard error of one sample is not defined, NaN."""
    mean, spread = jnp.mean(samples, axis=0), jnp.full(samples.shape[1:], jnp.nan, samples.dtype)
    return mean, spread if len(samples) < 2 else jnp.std(samples, axis=0, ddof=1) / len(samples) ** 0.5


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise ValueError(f"{name} is {value}, allowed: {name} ≥ {least}")
    return value
