"""Per-sample gradients: every quantity follows from the factors (x, δ), layer by layer, without forming a gradient.

The gradient of sample n in layer l is gₙ⁽ˡ⁾ = (δₙ⁽ˡ⁾ (xₙ⁽ˡ⁻¹⁾)ᵀ, δₙ⁽ˡ⁾), a matrix of rank one and a bias; gₙ is all
layers together. Each function here is pure, takes `Factors` (from `jaxbp.factors`) and can be jitted and vmapped. The
einsum letters are n, m samples, i input, o output; x is (N, in), δ is (N, out).

The factors of a `jaxbp.Network` are a tree of the kinds in `jaxbp.factor`; every function takes them too. Its layers
are those with parameters, in the order of the tree, and what is L of `Affine` here is nested as its parameters are.
Second moments, variances and noise scales form the gradients of such layers, one sample after the other. Those of a
weight that is used twice (`jaxbp.layers.Tied`) are formed before they are scaled, and are right where gₙ is normal.

Scaling. gₙ belongs to ℓₙ, the loss of one sample, and is never divided by N. Means divide by the static batch length N
unless `normalize_by` is given. Statistics of the distribution of gradients (variance, signal to noise, noise scale,
diversity, coherence, stiffness) use the shares pₙ = weightsₙ / Σ weights, so that masked samples are not there at all.
A sample of weight 0 does not count, not even as NaN; an empty or all-masked batch gives zeros. Weights are ≥ 0.
Norms and products are over all parameters, biases included; `per_layer=True` gives a tuple of one result a layer.

Dtypes. Gradients come in the dtype of the factors, everything else in float32 at least. Matrix products follow
`jax_default_matmul_precision`: where a GPU multiplies float32 in TF32, Gram matrices and moments have its 3 digits.

Range. Factors are first scaled by powers of two, which rounds nothing. So nothing on the way overflows or underflows,
and what is right depends on the result alone. In float32 "normal" means 1.2e-38 … 3.4e38, in float64 2.2e-308 …
1.8e308; smaller numbers count as 0, because XLA flushes them on CPUs::

    grand, el2n                                            where the norm is normal
    squared_norms, gram, dot, influence                    where the product of the norms (‖gₙ‖², ‖gₙ‖ ‖v‖) is normal
    cosine, stiffness, clipped_mean, diversity, coherence  for all finite x and δ, even if gₙ overflows
    signal_to_noise, variance, second_moment, noise_scale  where the largest |x| times the largest |δ| is normal, and
                                                           its square too in all but the first
    gradients, mean_gradient                               where δ x is normal

Time and memory. A quantity costs at most a few matrix products (N, out) × (N, in), each as much as the batch gradient's
own. The gradients themselves are `gradients(factors)`, or one line of the lecture's code under `jax.vmap`::

    jax.vmap(lambda x, y: jaxbp.value_and_grad(net, params, x[None], y[None])[1])(x, y)

Both write N × (number of parameters) numbers: for 784-1024-1024-10 and N = 128 that is 1 GB, and they take as long as
writing it takes. Whatever is computed from them is faster here from the factors.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbp import factor, losses, scaled
from jaxbp.factor import FactorTree, Rank1
from jaxbp.mlp import MLP, Factors, Tree, weighted, wide
from jaxbp.network import Net, ParamTree, check_like, check_parameters, check_tokens, mean_weights, totals
from jaxbp.network import factors as batch_factors
from jaxbp.network import gradient as mean_gradient
from jaxbp.scaled import Scaled, in_wide
from jaxbp.shapes import check_params, check_shape, check_targets, uncut

Array = jax.Array

__all__ = [
    "Clipped",
    "NoiseScale",
    "Stiffness",
    "clipped_mean",
    "coherence",
    "coherence_from_norms",
    "cosine",
    "diversity",
    "diversity_from_norms",
    "dot",
    "el2n",
    "gradients",
    "gram",
    "gram_matrix",
    "grand",
    "influence",
    "map_chunks",
    "mean_gradient",
    "noise_scale",
    "noise_scale_from_norms",
    "second_moment",
    "signal_to_noise",
    "squared_norms",
    "stiffness",
    "variance",
]


class Clipped(NamedTuple):
    """What `clipped_mean` returns: the mean of the clipped gradients and the fraction of samples that were clipped."""

    mean: ParamTree
    fraction: Array | tuple[Array, ...]


class NoiseScale(NamedTuple):
    """Unbiased |G|² and tr Σ, and B_simple = tr Σ / |G|²; scalars."""

    squared_gradient: Array
    trace: Array
    scale: Array


class Stiffness(NamedTuple):
    """Mean sign and mean cosine of the gradients' products over pairs of samples; scalars."""

    sign: Array
    cosine: Array


# The gradients and their products -----------------------------------------------------------------------------------


def gradients(factors: FactorTree) -> ParamTree:
    """The gradients themselves, gₙ⁽ˡ⁾ = (δₙ xₙᵀ, δₙ): N × (number of parameters) numbers.

    Returns:
      L of `Affine`, w (N, out, in) and b (N, out), in the dtype of the factors; not divided by N.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> gradients(f)[0].w.tolist()
      [[[2.0, 4.0]], [[0.0, 1.0]]]
    """
    return factor.like(factors, [factor.gradients(part) for part in factor.parts(factors)])


@overload
def squared_norms(factors: FactorTree, per_layer: Literal[False] = False) -> Array: ...
@overload
def squared_norms(factors: FactorTree, per_layer: Literal[True]) -> tuple[Array, ...]: ...
def squared_norms(factors: FactorTree, per_layer: bool = False) -> Array | tuple[Array, ...]:
    """‖gₙ‖² = Σ_l ‖δₙ⁽ˡ⁾‖² (1 + ‖xₙ⁽ˡ⁻¹⁾‖²), the 1 being the bias.

    The square is ∞ from ‖gₙ‖ = 1.8e19 on and 0 below 1.1e-19 in float32 (1.3e154 and 1.5e-154 in float64): `grand` is
    right beyond.

    Source: I. Goodfellow, *Efficient per-example gradient computations*, 2015, §4 (weights; the bias is added here).

    Returns:
      (N,), or L of them with `per_layer`; not divided by N.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> squared_norms(f).tolist()
      [24.0, 2.0]
    """
    squares = _squares(factors, per_layer)
    layers = tuple(a * r * r * r * r for a, r in squares)
    return layers if per_layer else layers[0]


@overload
def dot(factors: FactorTree, tree: ParamTree, per_layer: Literal[False] = False) -> Array: ...
@overload
def dot(factors: FactorTree, tree: ParamTree, per_layer: Literal[True]) -> tuple[Array, ...]: ...
def dot(factors: FactorTree, tree: ParamTree, per_layer: bool = False) -> Array | tuple[Array, ...]:
    """⟨gₙ, v⟩ = Σ_l δₙ⁽ˡ⁾ · (V⁽ˡ⁾ xₙ⁽ˡ⁻¹⁾ + v_b⁽ˡ⁾) for every sample: the slope of ℓₙ along v.

    Args:
      factors: of N samples.
      tree: v = (V, v_b) of each layer, like the parameters; of numbers up to 1e30 (1e300 in float64).

    Returns:
      (N,), or L of them with `per_layer`; not divided by N.

    Raises:
      ValueError: v is not shaped like the parameters.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> from jaxbp import Affine
      >>> dot(f, (Affine(w=jnp.array([[1.0, 0.0]]), b=jnp.array([1.0])),)).tolist()
      [4.0, 1.0]
    """
    vs = [in_wide(v) for v in _vectors(factors, tree)]
    layers = tuple(_slopes(layer, v) for layer, v in zip(scaled.rows(factors), vs, strict=True))
    return layers if per_layer else _total(layers)


def _vectors(factors: FactorTree, tree: ParamTree) -> list[Any]:
    """The tree's part for each layer, checked."""
    if isinstance(factors, Factors):
        check_params((factors.x[0].shape[1], *(delta.shape[1] for delta in factors.delta)), tree)
    else:
        check_like("tree", tree, jax.eval_shape(totals, factors))
    return factor.split(factors, tree)


def _slopes(layer: Scaled, v: Any) -> Array:
    """⟨gₙ, v⟩ of one layer."""
    slopes: Array = factor.dot(layer.f, v) * layer.root * layer.root
    return slopes


@overload
def gram(factors: FactorTree, other: FactorTree | None = None, per_layer: Literal[False] = False) -> Array: ...
@overload
def gram(factors: FactorTree, other: FactorTree | None = None, *, per_layer: Literal[True]) -> tuple[Array, ...]: ...
def gram(factors: FactorTree, other: FactorTree | None = None, per_layer: bool = False) -> Array | tuple[Array, ...]:
    """⟨gₙ, g′ₘ⟩ = Σ_l (ΔΔ′ᵀ ∘ (1 + XX′ᵀ))ₙₘ, the empirical neural tangent kernel of the losses.

    Args:
      factors: of N samples.
      other: of M samples: another batch, or the same network at another checkpoint; the batch itself by default.

    Returns:
      (N, M), or L of them with `per_layer`; not divided by N.

    Raises:
      ValueError: the other factors are not of the same network.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> gram(f).tolist()
      [[24.0, 6.0], [6.0, 2.0]]
    """
    other = factors if other is None else other
    _check_same_widths(factors, other)
    pairs = list(zip(scaled.rows(factors), scaled.rows(other), strict=True))
    units = [layer.root[:, None] * layer_.root[None] for layer, layer_ in pairs]
    layers = tuple(factor.gram(a.f, b.f) * unit * unit for (a, b), unit in zip(pairs, units, strict=True))
    return layers if per_layer else _total(layers)


def cosine(factors: FactorTree, other: FactorTree | None = None) -> Array:
    """cos(gₙ, g′ₘ) = ⟨gₙ, g′ₘ⟩ / (‖gₙ‖ ‖g′ₘ‖), 0 where a gradient is 0.

    Args:
      factors, other: as for `gram`.

    Returns:
      (N, M).

    Raises:
      ValueError: the other factors are not of the same network.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> [round(cos, 3) for cos in cosine(f)[0].tolist()]
      [1.0, 0.866]
    """
    other = factors if other is None else other
    _check_same_widths(factors, other)
    return _total(list(map(factor.gram, scaled.unit_rows(factors), scaled.unit_rows(other))))


# Moments ------------------------------------------------------------------------------------------------------------


def second_moment(
    factors: FactorTree, weights: ArrayLike | None = None, normalize_by: ArrayLike | None = None
) -> ParamTree:
    """Σₙ weightsₙ gₙ² / N, elementwise: (Δ²)ᵀ X² and, for biases, Σₙ δₙ².

    Args:
      factors: of N samples.
      weights: (N,), ones by default; enter once, not squared.
      normalize_by: the divisor, the static batch length N by default; where it is 0 the result is 0.

    Returns:
      L of `Affine`, in float32 at least (squares of a narrower float underflow).

    Raises:
      ValueError: weights has a wrong shape.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> second_moment(f)[0].w.tolist()
      [[2.0, 8.5]]
    """
    scale = mean_weights(weights, factor.batch(factors), normalize_by, wide(factor.dtype(factors)))
    return _in_columns(factors, scale, lambda f, unit: scaled.in_units(factor.second_moment(f, scale), unit))


def _in_columns(factors: FactorTree, p: Array, quantity: Callable[[Any, Any], Any]) -> ParamTree:
    """Of the samples that count, a quantity of every layer's factor scaled by columns and their units."""
    layers = [scaled.columns(part) for part in factor.parts(_present(factors, p))]
    return factor.like(factors, [quantity(f, unit) for f, unit in layers])


def variance(factors: FactorTree, weights: ArrayLike | None = None, unbiased: bool = True) -> ParamTree:
    """The variance of each parameter's gradient over the samples, Σₙ pₙ (gₙ − ḡ)² / (1 − Σₙ pₙ²).

    pₙ = weightsₙ / Σ weights and ḡ = Σₙ pₙ gₙ. With equal weights the divisor makes it Σₙ (gₙ − ḡ)² / (N − 1), N the
    number of samples that are not masked; ``unbiased=False`` leaves it out: Σₙ (gₙ − ḡ)² / N. Summed over all
    parameters the unbiased one is the trace of `noise_scale`.

    E[g²] − ḡ² would cancel where the samples agree. Here both factors are centred, x = x̄ + e and δ = δ̄ + d, and

        Var(δ x) = δ̄² E[e²] + E[d²] x̄² + E[d²e²] + 2 δ̄ x̄ E[de] + 2 δ̄ E[de²] + 2 x̄ E[d²e] − E[de]²

    has terms no larger than the spread of the factors: the error is about ε (δ̄² E[e²] + E[d²] x̄² + E[d²e²]), it does
    not grow with ḡ². Four products instead of two. A rounding error below 0 is cut off.

    Args:
      factors: of N samples.
      weights: (N,), ones by default.
      unbiased: whether to divide by 1 − Σ pₙ².

    Returns:
      L of `Affine`, in float32 at least. The unbiased variance of a single sample is NaN: it is not defined.

    Raises:
      ValueError: weights has a wrong shape.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> variance(f)[0].w.tolist(), variance(f, unbiased=False)[0].w.tolist()
      ([[2.0, 4.5]], [[1.0, 2.25]])
    """
    p = _shares(factors, weights)
    return _in_columns(factors, p, lambda f, unit: scaled.in_units(_variance(f, p, unbiased), unit))


def _variance(f: Any, p: Array, unbiased: bool) -> Any:
    """The variance of one layer with the shares p."""
    divisor = _distinct(p) if unbiased else jnp.ones((), p.dtype)
    return jax.tree.map(lambda a: jnp.maximum(a, 0) / divisor, factor.spread(f, p))


def signal_to_noise(factors: FactorTree, weights: ArrayLike | None = None, unbiased: bool = True) -> ParamTree:
    """|ḡ| / √Var(g) of each parameter, over the samples: the signal of one gradient, not of a batch's mean.

    Where the variance is 0 it is infinite, and 0 where the mean is 0 as well: no gradient, no signal. A mean over N
    samples has √N times this ratio.

    Args:
      factors: of N samples.
      weights, unbiased: as for `variance`, and ḡ = Σₙ pₙ gₙ.

    Returns:
      L of `Affine`, in float32 at least; NaN for a single sample unless ``unbiased=False``.

    Raises:
      ValueError: weights has a wrong shape.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> [round(ratio, 3) for ratio in signal_to_noise(f)[0].w[0].tolist()]
      [0.707, 1.179]
    """
    p = _shares(factors, weights)

    def ratios(f: Any, _: Any) -> Any:  # the scale of a parameter is the same in ḡ and √Var
        mean, var = factor.total(factor.times(f, p)), _variance(f, p, unbiased)
        return jax.tree.map(lambda g, v: jnp.where(g == 0, 0 * v, jnp.abs(g) / jnp.sqrt(v)), mean, var)

    return _in_columns(factors, p, ratios)


# Clipping -----------------------------------------------------------------------------------------------------------


def clipped_mean(
    factors: FactorTree,
    max_norm: ArrayLike,
    weights: ArrayLike | None = None,
    normalize_by: ArrayLike | None = None,
    per_layer: bool = False,
) -> Clipped:
    """Σₙ weightsₙ gₙ min(1, C/‖gₙ‖) / N and the fraction of the samples that were clipped.

    Clipping comes first, then the weight; replacing one sample moves the result by at most 2C/N (weights ≤ 1), up to
    the rounding of float32 or float64. In bfloat16, whose rounding would exceed C, C (1 − 2⁻⁷) is clipped to instead.

    Source: M. Abadi et al., *Deep learning with differential privacy*, 2016, algorithm 1 (without the noise);
    X. Li et al., *Large language models can be strong differentially private learners*, 2022, §4 (from the factors).

    Args:
      factors: of N samples.
      max_norm: C ≥ 0, a number, or with `per_layer` L of them; infinity clips nothing.
      weights, normalize_by: as for `mean_gradient`.
      per_layer: clip each layer's gradient by its own norm; all layers together then have norm ≤ √(Σ_l C_l²).

    Returns:
      `Clipped`: the mean in the dtype of the factors; the fraction, ‖gₙ‖ > C among the samples whose weight is not 0,
      a scalar, or L of them with `per_layer`.

    Raises:
      ValueError: a negative max_norm (seen outside jit); weights or max_norm of a wrong shape.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> clipped = clipped_mean(f, max_norm=2.0)
      >>> [round(g, 3) for g in clipped.mean[0].w[0].tolist()], float(clipped.fraction)
      ([0.408, 1.316], 0.5)
    """
    parts, counted = factor.parts(in_wide(factors)), _weights(factors, weights) != 0
    bounds = _bounds(max_norm, [(), (len(parts),)] if per_layer else [()], factor.dtype(factors))
    clips = [_clip(*square, c, counted) for square, c in zip(_squares(factors, per_layer), bounds, strict=True)]
    pairs = zip(parts, clips * (len(parts) // len(clips)), strict=True)
    clipped = [factor.times(factor.times(part, a), b) for part, ((a, b), _) in pairs]  # min(1, C/‖g‖) g
    mean = factor.like(factors, [_mean(f, weights, normalize_by, factor.dtype(factors)) for f in clipped])
    return Clipped(mean, tuple(fraction for _, fraction in clips) if per_layer else clips[0][1])


def _mean(f: Any, weights: ArrayLike | None, normalize_by: ArrayLike | None, dtype: DTypeLike) -> Any:
    """The mean gradient of one layer, from factors that are weighted before they are rounded to the dtype."""
    scale = mean_weights(weights, factor.batch(f), normalize_by, factor.dtype(f))
    f = f if weights is None else factor.where(scale != 0, f)
    return factor.total(factor.floats(lambda a: a.astype(dtype), factor.times(f, scale)))


def _bounds(max_norm: ArrayLike, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> Array:
    """Bounds C of the last of the shapes, which are all that is allowed; less what a narrow dtype rounds off."""
    bound = jnp.asarray(max_norm, wide(dtype))
    check_shape("max_norm", bound.shape, *shapes)
    if not isinstance(bound, jax.core.Tracer) and not bool(jnp.all(bound >= 0)):
        raise ValueError(f"max_norm is {max_norm}, allowed: max_norm ≥ 0")
    rounding = float(jnp.finfo(dtype).eps - jnp.finfo(wide(dtype)).eps)  # half an ε each for δ and the mean; else 0
    return jnp.broadcast_to(bound * (1 - rounding), shapes[-1] or (1,))


def _clip(square: Array, root: Array, bound: Array, counted: Array) -> tuple[tuple[Array, Array], Array]:
    """min(1, C/‖gₙ‖) as two factors, because ‖gₙ‖ = √square root² may overflow, and the fraction with ‖gₙ‖ > C.

    A NaN norm is not clipped, so that it shows.
    """
    norm = jnp.sqrt(square)
    over = norm * root * root > bound
    factor = jnp.where(over, 1 / root, 1), jnp.where(over, bound / jnp.where(over, norm, 1) / root, 1)
    return factor, _ratio(jnp.sum(over & counted, dtype=norm.dtype), jnp.sum(counted, dtype=norm.dtype))


# How far the samples agree ------------------------------------------------------------------------------------------


@overload
def noise_scale(
    factors: FactorTree, weights: ArrayLike | None = None, per_layer: Literal[False] = False
) -> NoiseScale: ...
@overload
def noise_scale(
    factors: FactorTree, weights: ArrayLike | None = None, *, per_layer: Literal[True]
) -> tuple[NoiseScale, ...]: ...
def noise_scale(
    factors: FactorTree, weights: ArrayLike | None = None, per_layer: bool = False
) -> NoiseScale | tuple[NoiseScale, ...]:
    """The simple noise scale tr Σ / |G|² of one batch: tr Σ = Σₙ pₙ ‖gₙ − ḡ‖² / (1 − Σ pₙ²), |G|² = ‖ḡ‖² − Σ pₙ² tr Σ.

    G is the true gradient, Σ the covariance of gₙ. It is `noise_scale_from_norms` with batches of 1 and of N, unequal
    weights counting as N = 1 / Σ pₙ² samples. But the trace is the sum of `variance`, with its error: it doesn't cancel
    where the samples agree.

    Source: S. McCandlish et al., *An empirical model of large-batch training*, 2018, §2.2 and appendix A.1.

    Args:
      factors: of N samples.
      weights: (N,), ones by default.
      per_layer: one estimate for each layer's parameters.

    Returns:
      `NoiseScale` of scalars, or L of them with `per_layer`; for a single sample NaN: it is not defined.

    Raises:
      ValueError: weights has a wrong shape.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> [round(float(a), 3) for a in noise_scale(f)]
      [6.0, 7.0, 1.167]
    """
    p = _shares(factors, weights)
    layers = [_mean_and_spread(part, p) for part in factor.parts(_present(factors, p))]
    means, spreads = ([(pair[i], root) for *pair, root in layers] for i in (0, 1))
    if not per_layer:
        means, spreads = [scaled.added(means)], [scaled.added(spreads)]
    found = tuple(_noise_scale(mean, spread, root, p) for (mean, root), (spread, _) in zip(means, spreads, strict=True))
    return found if per_layer else found[0]


def _mean_and_spread(f: Any, p: Array) -> tuple[Array, Array, Array]:
    """‖ḡ‖² and Σₙ pₙ ‖gₙ − ḡ‖² of one layer and r, both in units of r⁴."""
    if isinstance(f, Rank1) and f.bias:
        return _rank1_mean_and_spread(f.x, f.delta, p)
    f, root = scaled.alike(f)
    mean, spread = factor.total(factor.times(f, p)), factor.spread(f, p)
    squared_mean, spread = (
        _total([jnp.sum(a) for a in jax.tree.leaves(tree)]) for tree in (jax.tree.map(jnp.square, mean), spread)
    )
    return squared_mean, spread, root


def _rank1_mean_and_spread(x: Array, delta: Array, p: Array) -> tuple[Array, Array, Array]:
    """The same from the factors alone.

    With x = x̄ + e, δ = δ̄ + d and C = E[d eᵀ] the mean is δ̄ x̄ᵀ + C, and gₙ − ḡ = d xᵀ + δ̄ eᵀ − C.
    """
    root_x, root_delta = (scaled.root_of(jnp.max(jnp.abs(a), initial=least)) for a, least in ((x, 1), (delta, 0)))
    one = 1 / (root_x * root_x)
    x, delta = x * one, delta * (1 / (root_delta * root_delta))
    share = p[:, None]
    x_mean, delta_mean = jnp.sum(share * x, axis=0), jnp.sum(share * delta, axis=0)
    e, d = x - x_mean[None], delta - delta_mean[None]
    c = (share * d).T @ e
    # fmt: off
    norms = (jnp.sum(d**2, axis=1) * (one**2 + jnp.sum(x**2, axis=1))   # ‖d‖² (1 + ‖x‖²)
             + jnp.sum(delta_mean**2) * jnp.sum(e**2, axis=1)           # + ‖δ̄‖² ‖e‖²
             + 2 * jnp.sum(d * delta_mean[None], axis=1) * jnp.sum(x * e, axis=1))  # + 2 (d · δ̄) (x · e)
    # fmt: on
    mean = jnp.sum((jnp.outer(delta_mean, x_mean) + c) ** 2) + one**2 * jnp.sum(delta_mean**2)
    return mean, jnp.maximum(jnp.sum(p * norms) - jnp.sum(c**2), 0), root_x * root_delta


def _noise_scale(mean: Array, spread: Array, root: Array, p: Array) -> NoiseScale:
    """From ‖ḡ‖² and Σₙ pₙ ‖gₙ − ḡ‖² in units of root⁴."""
    trace = spread / _distinct(p)
    squared_gradient = mean - trace * jnp.sum(p**2)
    unit = root * root
    return NoiseScale(squared_gradient * unit * unit, trace * unit * unit, _ratio(trace, squared_gradient))


def noise_scale_from_norms(
    small_norm: ArrayLike, big_norm: ArrayLike, small_batch: ArrayLike, big_batch: ArrayLike
) -> NoiseScale:
    """The noise scale from the mean squared norms of the mean gradients of small and of big batches.

    E|G_B|² = |G|² + tr Σ / B for a batch of B, so with b < B samples

        |G|² = (B |G_B|² − b |G_b|²) / (B − b),    tr Σ = (|G_b|² − |G_B|²) / (1/b − 1/B),

    both unbiased. |G|² can be negative where noise dominates; it is returned as it is, and so is the negative scale:
    the batch was too small to see the gradient. Average both over steps before dividing: the ratio is biased.

    Source: S. McCandlish et al., *An empirical model of large-batch training*, 2018, appendix A.1.

    The differences cancel where the samples agree: `noise_scale`, from the factors, keeps its digits there.

    Args:
      small_norm, big_norm: |G_b|² and |G_B|², squared norms, each a scalar (|G_b|² averaged over the small batches).
      small_batch, big_batch: b < B, whole or not. b = B gives NaN.

    Example:
      >>> [round(float(a), 3) for a in noise_scale_from_norms(13.0, 9.5, 1, 2)]
      [6.0, 7.0, 1.167]
    """
    small, big, *batches = _floats(small_norm, big_norm, small_batch, big_batch)
    inverse_small, inverse_big = (1 / batch for batch in batches)
    gap = jnp.where(inverse_small == inverse_big, jnp.nan, inverse_small - inverse_big)  # not ±inf, a rounding's sign
    squared_gradient = (big * inverse_small - small * inverse_big) / gap
    trace = (small - big) / gap
    return NoiseScale(squared_gradient, trace, _ratio(trace, squared_gradient))


def diversity(factors: FactorTree, weights: ArrayLike | None = None) -> Array:
    """The gradient diversity Σₙ ‖gₙ‖² / ‖Σₙ gₙ‖²: 1/N for equal gradients, 1 for orthogonal ones.

    N times it bounds the batch size up to which SGD speeds up linearly. Infinite where the sum is 0 and a gradient is
    not. An integer weight counts as so many copies of the sample.

    Source: D. Yin et al., *Gradient diversity: a key ingredient for scalable distributed learning*, 2018, definition 2.

    Returns:
      A scalar.

    Raises:
      ValueError: weights has a wrong shape.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> round(float(diversity(f)), 3)
      0.684
    """
    return diversity_from_norms(*_mean_norms(factors, _shares(factors, weights)), jnp.sum(_weights(factors, weights)))


def diversity_from_norms(small_norm: ArrayLike, big_norm: ArrayLike, samples: ArrayLike) -> Array:
    """`diversity` from the mean of ‖gₙ‖² and ‖ḡ‖² of N samples: their ratio / N, 0 where all gradients are 0.

    Args:
      small_norm, big_norm: the mean of ‖gₙ‖² and ‖ḡ‖², squared norms.
      samples: N, or the sum of the weights.

    Example:
      >>> round(float(diversity_from_norms(13.0, 9.5, 2)), 3)
      0.684
    """
    small, big, count = _floats(small_norm, big_norm, samples)
    return _ratio(_ratio(small, big), count)


def coherence(factors: FactorTree, weights: ArrayLike | None = None) -> Array:
    """The alignment α = ‖ḡ‖² / Σₙ pₙ ‖gₙ‖², ḡ = Σₙ pₙ gₙ: 1 for equal gradients, 1/N for orthogonal ones, 0 for ḡ = 0.

    The mean of ⟨gₙ, gₘ⟩ over all pairs, divided by its mean over n = m. N α, the m-coherence, is 1 / `diversity`: how
    many samples a step on one of them helps.

    Source: S. Chatterjee, *Coherent gradients*, 2020; S. Chatterjee and P. Zielinski, *Making coherence out of nothing
    at all*, 2020, §2 (α).

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: weights has a wrong shape.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> round(float(coherence(f)), 3)
      0.731
    """
    return coherence_from_norms(*_mean_norms(factors, _shares(factors, weights)))


def coherence_from_norms(small_norm: ArrayLike, big_norm: ArrayLike) -> Array:
    """`coherence` from the mean of ‖gₙ‖² and ‖ḡ‖²: ‖ḡ‖² / mean ‖gₙ‖², 0 where all gradients are 0.

    Args:
      small_norm, big_norm: the mean of ‖gₙ‖² and ‖ḡ‖², squared norms.

    Example:
      >>> round(float(coherence_from_norms(13.0, 9.5)), 3)
      0.731
    """
    small, big = _floats(small_norm, big_norm)
    return _ratio(big, small)


def stiffness(
    factors: FactorTree,
    other: FactorTree | None = None,
    weights: ArrayLike | None = None,
    other_weights: ArrayLike | None = None,
) -> Stiffness:
    """The mean of sign⟨gₙ, g′ₘ⟩ and of cos(gₙ, g′ₘ) over pairs: does a step on one sample help another?

    Within a batch the pairs are n ≠ m; pairs within and between classes follow from `cosine`, or from weights.

    Source: S. Fort et al., *Stiffness: a new perspective on generalization in neural networks*, 2019, §2.

    Args:
      factors: of N samples.
      other: of M samples, such as a test batch; by default the batch itself.
      weights: (N,), ones by default.
      other_weights: (M,), ones by default; only with `other`. A pair weighs weightsₙ · other_weightsₘ.

    Returns:
      `Stiffness`, scalars in [−1, 1]; 0 where there is no pair.

    Raises:
      ValueError: weights of a wrong shape, other_weights without other, factors of another network.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> [round(float(a), 3) for a in stiffness(f)]
      [1.0, 0.866]
    """
    if other is None and other_weights is not None:
        raise ValueError("other_weights is given without other, a batch has the same weights on both sides")
    first = _shares(factors, weights)
    second = first if other is None else _shares(other, other_weights)
    pairs = first[:, None] * second[None, :]
    if other is None:
        pairs = pairs * (1 - jnp.eye(len(first), dtype=pairs.dtype))
    share = _ratio(pairs, jnp.sum(pairs)[None, None])
    cosines = cosine(factors, other)
    return Stiffness(jnp.sum(weighted(share, jnp.sign(cosines))), jnp.sum(weighted(share, cosines)))


# Scores of single samples -------------------------------------------------------------------------------------------


def grand(factors: FactorTree) -> Array:
    """GraNd, the norm ‖gₙ‖ of each sample's gradient over all parameters.

    The paper's score is its expectation over initialisations: average it over several networks, early in training.

    Source: M. Paul et al., *Deep learning on a data diet*, 2021, definition 2.1.

    Returns:
      (N,), in float32 at least.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> [round(norm, 3) for norm in grand(f).tolist()]
      [4.899, 1.414]
    """
    ((a, r),) = _squares(factors, per_layer=False)
    return jnp.sqrt(a) * r * r


def el2n(factors: FactorTree) -> Array:
    """EL2N, the norm of the error ‖p(xₙ) − yₙ‖₂ as ‖δₙ⁽ᴸ⁾‖₂, p the softmax of the outputs.

    The two are the same where ``output="identity"`` and the loss is softmax_cross_entropy (or kl_divergence) of labels
    or probabilities that sum to 1, because then ∂ℓ/∂s⁽ᴸ⁾ = p − y; with label smoothing y is the smoothed label. The
    factors do not know their loss: for another one this is the norm of the output's delta, which is not EL2N.

    Source: M. Paul et al., *Deep learning on a data diet*, 2021, definition 2.2.

    Returns:
      (N,), in float32 at least.

    Raises:
      ValueError: the last layer of a `jaxbp.Network` is no affine map of one position.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[3.0, -4.0], [0.0, 0.0]]),))
      >>> el2n(f).tolist()
      [5.0, 0.0]
    """
    last = factor.parts(in_wide(factors))[-1]
    if not isinstance(last, Rank1):
        raise ValueError(f"the last layer's factors are {type(last).__name__}, EL2N is of outputs by one affine map")
    delta, root = scaled.each_row(last.delta, 0.0)
    return jnp.sqrt(jnp.sum(delta**2, axis=1)) * root * root


def influence(train: Sequence[FactorTree], test: Sequence[FactorTree], learning_rates: Sequence[ArrayLike]) -> Array:
    """TracIn: Σ_t η_t ⟨gₙ(w_t), g′ₘ(w_t)⟩ over checkpoints t: by how much steps on train sample n lowered test loss m.

    Positive where the train sample helped (a proponent), negative where it harmed. A sample's influence on itself is
    Σ_t η_t ‖gₙ(w_t)‖², from `squared_norms`.

    Source: G. Pruthi et al., *Estimating training data influence by tracing gradient descent*, 2020, §3.2 (TracInCP).

    Args:
      train: the factors of N training samples at each checkpoint.
      test: the factors of M test samples at each checkpoint.
      learning_rates: η_t of the mean gradient's step at each checkpoint.

    Returns:
      (N, M), in float32 at least.

    Raises:
      ValueError: no checkpoint, or not as many in each argument.

    Example:
      >>> f = Factors(x=(jnp.array([[1.0, 2.0], [0.0, 1.0]]),), delta=(jnp.array([[2.0], [1.0]]),))
      >>> influence([f, f], [f, f], [0.5, 0.25]).tolist()
      [[18.0, 4.5], [4.5, 1.5]]
    """
    if not len(train) == len(test) == len(learning_rates) or not train:
        raise ValueError(
            f"train, test and learning_rates have {len(train)}, {len(test)} and {len(learning_rates)} checkpoints, "
            "expected as many of each, at least one"
        )
    products = [gram(factors, other) for factors, other in zip(train, test, strict=True)]
    rates = [jnp.asarray(rate, product.dtype) for rate, product in zip(learning_rates, products, strict=True)]
    return _total([rate * product for rate, product in zip(rates, products, strict=True)])


# A whole data set ---------------------------------------------------------------------------------------------------


def map_chunks(
    quantity: Callable[[Array, FactorTree], Tree],
    net: Net,
    params: ParamTree,
    x: ArrayLike,
    y: ArrayLike,
    chunk_size: int,
) -> Tree:
    """A per-sample quantity of every sample of a data set, chunk by chunk, inside one compiled loop.

    Only one chunk's factors exist at a time: scratch memory grows with `chunk_size`, not with N. Nothing is padded: the
    last chunk starts early enough to be full, and computes a few samples a second time.

    Args:
      quantity: (losses, factors) of a chunk ↦ a pytree of arrays whose first axis is the chunk's samples. Each new
        function object is compiled anew, so define it once; the program is kept as long as the function is.
      net, params: the network and its parameters.
      x, y: inputs (N, n₀), of any dtype (a chunk is cast, not the data set), and targets, as for `jaxbp.factors`.
      chunk_size: how many samples at a time, ≥ 1.

    Returns:
      The pytree with first axes of N.

    Raises:
      ValueError, TypeError: as `jaxbp.factors`; a chunk size below 1; a quantity that is not one value a sample.

    Example:
      >>> import jaxbp
      >>> net = MLP((2, 3, 2))
      >>> params, x, y = jaxbp.init(net, jax.random.key(0)), jnp.ones((10, 2)), jnp.zeros(10, int)
      >>> map_chunks(lambda losses, f: {"loss": losses, "norm": grand(f)}, net, params, x, y, 4)["norm"].shape
      (10,)
    """
    x, y = _data_set(net, params, x, y, chunk_size)
    if quantity not in _programs:
        _programs[quantity] = _program(quantity)
    mapped: Tree = _programs[quantity](net, params, x, y, chunk_size)
    return mapped


_programs: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = weakref.WeakKeyDictionary()
"""The compiled map of each quantity that is alive: as a static argument of jax.jit a quantity would live for ever."""


def _program(quantity: Callable[[Array, FactorTree], Tree]) -> Callable[..., Tree]:
    alive = weakref.ref(quantity)  # not the quantity itself, which would keep itself alive through _programs

    def mapped(net: Net, params: ParamTree, x: Array, y: Array, chunk_size: int) -> Tree:
        return _map_chunks(cast(Callable[[Array, FactorTree], Tree], alive()), net, params, x, y, chunk_size)

    program: Callable[..., Tree] = jax.jit(mapped, static_argnums=(0, 4))
    return program


def gram_matrix(
    net: Net,
    params: ParamTree,
    x: ArrayLike,
    y: ArrayLike,
    chunk_size: int,
    other: tuple[ArrayLike, ArrayLike] | None = None,
) -> Array:
    """⟨gₙ, g′ₘ⟩ of all pairs of a data set, in blocks of chunk_size × chunk_size.

    Two chunks' factors, a strip of chunk_size rows and the result exist at a time. The factors of the columns are
    computed anew for each strip, which costs less than the products they enter unless the chunks are small.

    Args:
      net, params, x, y, chunk_size: as for `map_chunks`.
      other: x′ (M, n₀) and y′ of the columns; by default those of the rows.

    Returns:
      (N, M), not divided by N.

    Raises:
      ValueError, TypeError: as `map_chunks`.

    Example:
      >>> import jaxbp
      >>> net = MLP((2, 3, 2))
      >>> params, x, y = jaxbp.init(net, jax.random.key(0)), jnp.ones((10, 2)), jnp.zeros(10, int)
      >>> gram_matrix(net, params, x, y, chunk_size=4, other=(x[:5], y[:5])).shape
      (10, 5)
    """
    rows = _data_set(net, params, x, y, chunk_size)
    columns = rows if other is None else _data_set(net, params, *other, chunk_size)
    matrix: Array = jax.jit(_gram_matrix, static_argnums=(0, 4))(net, params, rows, columns, chunk_size)
    return matrix


def _data_set(net: Net, params: ParamTree, x: ArrayLike, y: ArrayLike, chunk_size: int) -> tuple[Array, Array]:
    """x and y as arrays, checked; x keeps its dtype, unless JAX would cut its integers."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, allowed: chunk_size ≥ 1")
    shape, outputs, dtype = check_parameters(net, params)
    x, y = uncut(x), uncut(y)
    check_shape("x", x.shape, ("N", *shape))
    check_tokens(net, x)
    check_targets(losses.get(net.loss), y, len(x), outputs)
    # labels and tokens are in range, whatever their dtype
    cut = [isinstance(net, MLP) and a.ndim == 2 and a.dtype.kind in "iu" and a.dtype.itemsize == 8 for a in (x, y)]
    x, y = (jnp.asarray(a, wide(dtype) if is_cut else None) for a, is_cut in zip((x, y), cut, strict=True))
    return x, y


def _map_chunks(
    quantity: Callable[[Array, FactorTree], Tree], net: Net, params: ParamTree, x: Array, y: Array, chunk_size: int
) -> Tree:
    total, size = len(x), min(chunk_size, len(x))

    def chunk(start: ArrayLike) -> Tree:
        return quantity(*batch_factors(net, params, *(lax.dynamic_slice_in_dim(a, start, size) for a in (x, y))))

    def body(index: Array, results: Tree) -> Tree:
        start = jnp.minimum(index * size, total - size)  # the last chunk reaches back over samples that are done
        update = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        updated: Tree = jax.tree.map(update, results, chunk(start))
        return updated

    shapes = jax.eval_shape(chunk, 0)
    for leaf in jax.tree.leaves(shapes):
        if leaf.shape[:1] != (size,):
            raise ValueError(f"quantity returned the shape {leaf.shape} for {size} samples, expected ({size}, …)")
    results: Tree = jax.tree.map(lambda leaf: jnp.zeros((total, *leaf.shape[1:]), leaf.dtype), shapes)
    results = lax.fori_loop(0, -(-total // max(size, 1)), body, results)
    return results


def _gram_matrix(
    net: Net, params: ParamTree, rows: tuple[Array, Array], columns: tuple[Array, Array], chunk_size: int
) -> Array:
    def strip(_: Array, row: FactorTree) -> Array:
        return _map_chunks(lambda _, column: gram(column, row), net, params, *columns, chunk_size).T

    return _map_chunks(strip, net, params, *rows, chunk_size)


# Shared -------------------------------------------------------------------------------------------------------------


def _floats(*values: ArrayLike) -> list[Array]:
    """The values in one float dtype; integers among them cut nothing."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(float, *values)
    return [jnp.asarray(value, wide(dtype)) for value in values]


def _weights(factors: FactorTree, weights: ArrayLike | None) -> Array:
    """The weights, or ones, (N,), in float32 at least."""
    return mean_weights(weights, factor.batch(factors), 1, wide(factor.dtype(factors)))


def _shares(factors: FactorTree, weights: ArrayLike | None) -> Array:
    """pₙ = weightsₙ / Σ weights, (N,); zeros where all weights are 0."""
    w = _weights(factors, weights)
    root = scaled.root_of(jnp.max(w, initial=0))  # sums of weights near the largest number overflow
    w = w / root / root
    return mean_weights(w, len(w), jnp.sum(w), w.dtype)


def _distinct(p: Array) -> Array:
    """1 − Σ pₙ² = Σ_{n≠m} pₙ pₘ, the chance that two draws differ, without cancelling beside a share near 1.

    With the largest share q and the sum r of the others it is 2 q r + r² − Σ′ pₙ². 1 where all weights are 0.
    """
    ordered = jnp.sort(p)
    others, q = ordered[:-1], jnp.sum(ordered[-1:])
    r = jnp.sum(others)
    return jnp.where(q == 0, 1, 2 * q * r + (r * r - jnp.sum(others**2)))


def _present(factors: FactorTree, p: Array) -> FactorTree:
    """The factors in float32 at least, zeros (not NaN) in the rows of samples that do not count."""
    return factor.where(p != 0, in_wide(factors))


def _squares(factors: FactorTree, per_layer: bool) -> list[tuple[Array, Array]]:
    """‖gₙ‖² as the pairs of `scaled`, of each layer or in a list of one."""
    layers = [scaled.squares(layer) for layer in scaled.rows(factors)]
    return layers if per_layer else [scaled.added(layers)]


def _mean_norms(factors: FactorTree, p: Array) -> tuple[Array, Array]:
    """Σₙ pₙ ‖gₙ‖² and ‖Σₙ pₙ gₙ‖² in a unit of the size of the largest ‖gₙ‖²."""
    layers = scaled.rows(_present(factors, p))
    largest = jnp.max(jnp.stack([layer.root for layer in layers]), initial=float(jnp.finfo(p.dtype).tiny) ** 0.5)
    small, big = [], []
    for layer in layers:
        unit = (layer.root / largest) ** 2
        mean = factor.total(factor.times(layer.f, p * unit))
        small.append(jnp.sum(p * unit**2 * scaled.squares(layer)[0]))
        big.append(_total([jnp.sum(a**2) for a in jax.tree.leaves(mean)]))
    return _total(small), _total(big)


def _total(layers: Sequence[Array]) -> Array:
    """The sum over layers."""
    return sum(layers[1:], layers[0])


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where a is 0 even if b is 0."""
    return jnp.where(a == 0, 0, a / jnp.where((a == 0) & (b == 0), 1, b))


def _check_same_widths(factors: FactorTree, other: FactorTree) -> None:
    """ValueError unless both are of networks with the same layers."""
    ours, theirs = ([a.shape[1:] for a in jax.tree.leaves(f)] for f in (factors, other))
    if ours != theirs or str(jax.tree.structure(factors)) != str(jax.tree.structure(other)):
        raise ValueError(f"other has factors of shapes {theirs}, expected {ours}: not the same network")
