"""The kinds of factors: what a backward pass leaves of every sample's gradient, and what follows from each kind.

Layers are many, kinds are few. A layer's `backward` returns, for one sample, the factor of its gradient gₙ; `jax.vmap`
puts the sample axis n in front. Each quantity is one function here, with a case for each kind. `gradients` is what a
kind means: every other case gives what follows from it, but cheaper. Where nothing is cheaper, gradients are formed.

The einsum letters are n, m sample, t position, i input, o output. δ belongs to ℓₙ and is never divided by N.

Sources: I. Goodfellow, *Efficient per-example gradient computations*, 2015 (`Rank1`); G. Rochette et al., *Efficient
per-example gradient computations in convolutional neural networks*, 2019 (`Convolved`); X. Li et al., *Large language
models can be strong differentially private learners*, 2022, §4 (`Shared`).
"""

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp.mlp import Affine, Array, Factors, accurate_sum, weighted, wide

STATIC = {"static": True}
Padding = tuple[tuple[int, int], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rank1:
    """gₙ = (δₙ xₙᵀ, δₙ oneₙ), an `Affine`: a matrix of rank one, and the bias whose input is 1.

    x: (N, in);  delta: (N, out);  one: (N,), or None for ones;  bias: without one gₙ is δₙ xₙᵀ alone.
    """

    x: Array
    delta: Array
    one: Array | None = None
    bias: bool = field(default=True, metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """gₙ = Σ_t (δₙₜ xₙₜᵀ, δₙₜ oneₙ): the same weights at T positions. x: (N, T, in);  delta: (N, T, out)."""

    x: Array
    delta: Array
    one: Array | None = None
    bias: bool = field(default=True, metadata=STATIC)


@dataclass(frozen=True)
class Window:
    """Which inputs a convolution sees, by axis of space: position p sees those at p · stride + k · dilation − low.

    size: of the window;  padding: (low, high);  groups: of channels, each of which sees its own inputs only.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Convolved:
    """gₙ = Σ_p (δₙₚ ⊗ the window of xₙ at p, δₙₚ oneₙ). x: (N, space…, in);  delta: (N, positions…, out).

    w of gₙ is (out, in / groups, size…). Windows overlap; they are unfolded only where the gradient is not enough.
    """

    x: Array
    delta: Array
    window: Window = field(metadata=STATIC)
    one: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gather:
    """gₙ[idₙₜ] += δₙₜ, the gradient of a table of which the sample read some rows. ids: (N, T);  delta: (N, T, d)."""

    ids: Array
    delta: Array
    rows: int = field(metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Whole:
    """The gradients themselves: of scales and shifts, which are no larger than an activation. A tree of (N, …)."""

    gradient: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """The gradient of a weight that is used more than once: the sum of the gradients of its uses."""

    uses: tuple[Any, ...]


Kind = Rank1 | Shared | Convolved | Gather | Whole | Sum
FactorTree = Any
"""`Factors` of an MLP, a kind, or a tuple of these, nested as the layers are; () where a layer has no parameters."""


# A network's factors --------------------------------------------------------------------------------------------------


def _is_part(node: Any) -> bool:
    return isinstance(node, Factors | Kind)


def parts(factors: FactorTree) -> list[Any]:
    """The kinds, first layer first; each layer of an MLP is a `Rank1`."""
    found: list[Any] = []
    for part in jax.tree.leaves(factors, is_leaf=_is_part):
        found += map(Rank1, part.x, part.delta) if isinstance(part, Factors) else [part]
    return found


def layers(factors: FactorTree) -> list[FactorTree]:
    """The factors of each layer of an MLP, or of a chain."""
    if not isinstance(factors, Factors):
        return list(factors)
    return [Factors((x,), (delta,)) for x, delta in zip(factors.x, factors.delta, strict=True)]


def like(factors: FactorTree, results: list[Any]) -> Any:
    """A result for each of `parts`, nested as the factors (and the parameters) are."""
    rest = iter(results)
    leaves, structure = jax.tree.flatten(factors, is_leaf=_is_part)
    nested = [tuple(next(rest) for _ in part.x) if isinstance(part, Factors) else next(rest) for part in leaves]
    return jax.tree.unflatten(structure, nested)


def split(factors: FactorTree, tree: Any) -> list[Any]:
    """Of a tree that is nested as the factors are, what belongs to each of `parts`."""
    found: list[Any] = []

    def collect(part: Any, inner: Any) -> None:
        found.extend(inner if isinstance(part, Factors) else [inner])

    jax.tree.map(collect, factors, tree, is_leaf=_is_part)
    return found


def batch(factors: FactorTree) -> int:
    """N."""
    return len(jax.tree.leaves(factors)[0])


def dtype(factors: FactorTree) -> Any:
    """That of the numbers, ids aside."""
    return next(a.dtype for a in jax.tree.leaves(factors) if jnp.issubdtype(a.dtype, jnp.floating))


def where(kept: Array, factors: FactorTree) -> FactorTree:
    """The factors with zeros, not NaN, in the rows of samples that are not kept; kept is (N,)."""
    return jax.tree.map(lambda a: jnp.where(_along(kept, a), a, jnp.zeros((), a.dtype)), factors)


def floats(fn: Callable[[Array], Array], f: Any) -> Any:
    """The function of every array but the ids."""
    return jax.tree.map(lambda a: fn(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, f)


# Every quantity of each kind ------------------------------------------------------------------------------------------


def gradients(f: Any) -> Any:
    """gₙ of every sample, a tree of (N, …)."""
    match f:
        case Rank1():
            return _affine(f, f.delta[:, :, None] * f.x[:, None, :], f.delta)  # no,ni->noi
        case Shared():
            return _affine(f, jnp.einsum("nto,nti->noi", f.delta, f.x), _sum_positions(f.delta))
        case Convolved():
            unfolded = unfold(f)
            g = jax.vmap(gradients)(unfolded)  # (groups, N, out / groups, in / groups · size)
            w, b = (jnp.moveaxis(a, 0, 1).reshape(len(f.x), -1, *a.shape[3:]) for a in g)
            return Affine(w.reshape(*w.shape[:2], -1, *f.window.size), b)
        case Gather():
            table = jnp.zeros((len(f.ids), f.rows, f.delta.shape[-1]), f.delta.dtype)
            return table.at[jnp.arange(len(f.ids))[:, None], f.ids].add(f.delta)
        case Whole():
            return f.gradient
        case Sum():
            return jax.tree.map(_total, *map(gradients, f.uses))


def total(f: Any) -> Any:
    """Σₙ gₙ, in the dtype of the factor."""
    match f:
        case Rank1():
            return _affine(f, f.delta.T @ f.x, f.delta, accurate_sum)  # no,ni->oi
        case Shared():
            x, delta = (a.reshape(-1, a.shape[-1]) for a in (f.x, f.delta))
            biases = f.delta if f.one is None else f.delta * f.one[:, None, None]
            return Affine(delta.T @ x, accurate_sum(biases.reshape(delta.shape))) if f.bias else delta.T @ x
        case Convolved():
            biases = f.delta if f.one is None else f.delta * _along(f.one, f.delta)
            return Affine(_convolved_total(f), accurate_sum(biases.reshape(-1, f.delta.shape[-1])))
        case Gather():
            table = jnp.zeros((f.rows, f.delta.shape[-1]), wide(f.delta.dtype))
            return table.at[f.ids].add(f.delta.astype(table.dtype)).astype(f.delta.dtype)
        case Whole():
            return jax.tree.map(accurate_sum, f.gradient)
        case Sum():
            return jax.tree.map(_total, *map(total, f.uses))


def times(factors: FactorTree, a: Array) -> FactorTree:
    """The factors of aₙ gₙ; a is (N,). What a sample of weight 0 holds does not count, not even NaN."""

    def one(f: Any) -> Any:
        match f:
            case Factors():
                return Factors(f.x, tuple(weighted(a, delta) for delta in f.delta))
            case Whole():
                return Whole(jax.tree.map(lambda g: weighted(a, g), f.gradient))
            case Sum():
                return Sum(tuple(map(one, f.uses)))
            case _:
                return replace(f, delta=weighted(a, f.delta))

    return jax.tree.map(one, factors, is_leaf=_is_part)


def squared_norm(f: Any) -> Any:
    """‖gₙ‖², (N,)."""
    match f:
        case Rank1():
            return jnp.sum(f.delta**2, axis=1) * (_ones(f) ** 2 + jnp.sum(f.x**2, axis=1))  # ‖δ‖² (1 + ‖x‖²)
        case Shared() if pairs_are_cheaper(f.x.shape[1], f.x.shape[2], f.delta.shape[2]):
            xx = jnp.einsum("nti,nsi->nts", f.x, f.x) + (_ones(f) ** 2)[:, None, None]
            return jnp.sum(xx * jnp.einsum("nto,nso->nts", f.delta, f.delta), axis=(1, 2))  # Σ_ts (1 + xxᵀ) ∘ δδᵀ
        case Convolved():
            return jnp.sum(jax.vmap(squared_norm)(unfold(f)), axis=0)
        case Gather() if f.ids.shape[1] <= f.rows:
            same = f.ids[:, :, None] == f.ids[:, None]
            products = jnp.einsum("ntd,nsd->nts", f.delta, f.delta)
            return jnp.sum(jnp.where(same, products, 0), axis=(1, 2))  # Σ_ts [id_t = id_s] δ_t · δ_s
        case Sum((Gather() as read, Shared() as out)) if pairs_are_cheaper(out.x.shape[1], out.x.shape[2], read.rows):
            products = jnp.einsum("ntd,nsd->nts", read.delta, out.x)
            met = jnp.take_along_axis(jnp.swapaxes(out.delta, 1, 2), read.ids[:, :, None], axis=1)
            crossed = jnp.sum(products * met, axis=(1, 2))  # Σ_ts (δ_t · x_s) δ′_s[id_t]: both uses meet in row id_t
            return squared_norm(read) + 2 * crossed + squared_norm(out)
        case _:
            return _total([jnp.sum(_rows(g) ** 2, axis=1) for g in jax.tree.leaves(gradients(f))])


def gram(f: Any, h: Any) -> Any:
    """⟨gₙ, hₘ⟩ of all pairs of samples, (N, M); h is another batch of the same kind."""
    match f:
        case Rank1():
            one = _ones(f)[:, None] * _ones(h)[None]
            return (f.delta @ h.delta.T) * (one + f.x @ h.x.T)  # no,mo->nm ∘ (1 + ni,mi->nm)
        case _:
            pairs = zip(*(jax.tree.leaves(gradients(a)) for a in (f, h)), strict=True)
            return _total([_rows(a) @ _rows(b).T for a, b in pairs])


def dot(f: Any, v: Any) -> Any:
    """⟨gₙ, v⟩, (N,); v is like the parameters."""
    match f:
        case Rank1() | Shared():
            w, b = v if f.bias else (v, jnp.zeros(f.delta.shape[-1], f.x.dtype))
            slopes = f.x @ w.T + _along(_ones(f), f.x) * b.reshape(*(1,) * (f.x.ndim - 1), -1)
            return jnp.sum(_rows(f.delta * slopes), axis=1)  # Σ_t δ_t · (V x_t + v_b)
        case Convolved():
            slopes = convolve(f.x, v.w, f.window) + _along(_ones(f), f.x) * v.b.reshape(*(1,) * (f.x.ndim - 1), -1)
            return jnp.sum(_rows(f.delta * slopes), axis=1)
        case Gather():
            return jnp.sum(f.delta * v[f.ids], axis=(1, 2))  # Σ_t δ_t · V[id_t]
        case Whole():
            products = jax.tree.map(lambda g, v: jnp.sum(_rows(g * v[None]), axis=1), f.gradient, v)
            return _total(jax.tree.leaves(products))
        case Sum():
            return _total([dot(use, v) for use in f.uses])


def second_moment(f: Any, p: Array) -> Any:
    """Σₙ pₙ gₙ², elementwise."""
    match f:
        case Rank1():
            squared = Rank1(f.x**2, p[:, None] * f.delta**2, _ones(f) ** 2, f.bias)  # (δ xᵀ)² = δ² (x²)ᵀ
            return total(squared)
        case _:
            return _sum_over_samples(f, lambda g, p: jax.tree.map(lambda g: p * g**2, g), p)


def spread(f: Any, p: Array) -> Any:
    """Σₙ pₙ (gₙ − ḡ)², elementwise, ḡ = Σₙ pₙ gₙ."""
    match f:
        case Rank1():
            w, b = _rank1_spread(f.x, f.delta, p)
            return Affine(w, b) if f.bias else w
        case _:
            mean = total(times(f, p))
            return _sum_over_samples(f, lambda g, p: jax.tree.map(lambda g, m: p * (g - m) ** 2, g, mean), p)


def _rank1_spread(x: Array, delta: Array, p: Array) -> Affine:
    """Σₙ pₙ (gₙ − ḡ)² without a gradient formed. Means are sums, not products, which a GPU may round to TF32."""
    p = p[:, None]
    x_mean, delta_mean = jnp.sum(p * x, axis=0), jnp.sum(p * delta, axis=0)
    e, d = x - x_mean[None], delta - delta_mean[None]
    pd, pd2 = p * d, p * d * d
    # fmt: off
    e2_mean, d2_mean, de_mean = jnp.sum(p * e * e, axis=0), jnp.sum(pd2, axis=0), pd.T @ e
    w = (jnp.outer(delta_mean**2, e2_mean)                              # δ̄² E[e²]
         + jnp.outer(d2_mean, x_mean**2)                                # E[d²] x̄²
         + pd2.T @ (e * e)                                              # E[d²e²]
         + 2 * jnp.outer(delta_mean, x_mean) * de_mean                  # 2 δ̄ x̄ E[de]
         + 2 * delta_mean[:, None] * (pd.T @ (e * e))                   # 2 δ̄ E[de²]
         + 2 * (pd2.T @ e) * x_mean[None]                               # 2 x̄ E[d²e]
         - de_mean**2)                                                  # − E[de]²
    # fmt: on
    return Affine(w=w, b=d2_mean)


def _sum_over_samples(f: Any, term: Callable[[Any, Array], Any], p: Array) -> Any:
    """Σₙ term(gₙ, pₙ) with one gradient at a time in memory."""

    def add(sums: Any, sample: tuple[Any, Array]) -> tuple[Any, None]:
        part, share = sample
        g = jax.tree.map(lambda g: g[0], gradients(jax.tree.map(lambda a: a[None], part)))
        return jax.tree.map(operator.add, sums, term(g, share)), None

    like_one = jax.eval_shape(lambda f: total(f), f)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like_one)
    return lax.scan(add, zeros, (f, p))[0]


def pairs_are_cheaper(positions: int, inputs: int, outputs: int) -> bool:
    """Whether ‖Σ_t δ_t x_tᵀ‖² costs fewer multiplications from pairs of positions, T² (i + o), than formed, T i o."""
    return positions * (inputs + outputs) <= inputs * outputs


# Convolutions ---------------------------------------------------------------------------------------------------------


def convolve(x: Array, w: Array, window: Window) -> Array:
    """s_p = Σ_k w_k x at p · stride + k · dilation − low. x: (N, space…, in), w: (out, in / groups, size…)."""
    around = window.padding, (1,) * len(window.size), window.dilation
    return _convolution(x, _size_first(w), window.stride, *around, groups=window.groups)


def convolve_transposed(delta: Array, w: Array, window: Window, space: tuple[int, ...]) -> Array:
    """∂ℓ/∂x of `convolve`: each δ_p goes back to the inputs that its window saw, through the flipped w."""
    groups, (out, inner) = window.groups, w.shape[:2]
    flipped = jnp.flip(w, range(2, w.ndim)).reshape(groups, out // groups, inner, *window.size)
    flipped = jnp.swapaxes(flipped, 1, 2).reshape(groups * inner, out // groups, *window.size)
    padding = []
    for size, positions, k, step, (low, _), apart in _axes(window, space, delta.shape[1:-1]):
        before = (k - 1) * apart - low
        padding.append((before, size - (positions - 1) * step - 1 - before + (k - 1) * apart))
    around = padding, window.stride, window.dilation
    return _convolution(delta, _size_first(flipped), (1,) * len(space), *around, groups=groups)


def _convolved_total(f: Convolved) -> Array:
    """Σₙ of ∂ℓₙ/∂w as one convolution: samples are summed as channels are, positions as a window is."""
    space = f.x.shape[1:-1]
    padding = [
        (low, (k - 1) * apart + (positions - 1) * step + 1 - size - low)
        for size, positions, k, step, (low, _), apart in _axes(f.window, space, f.delta.shape[1:-1])
    ]
    x, delta = jnp.swapaxes(f.x, 0, -1), jnp.moveaxis(f.delta, 0, -2)
    around = padding, (1,) * len(space), f.window.stride
    w = _convolution(x, delta, f.window.dilation, *around, samples=f.window.groups)
    return jnp.moveaxis(w, (-1, 0), (0, 1))


def _convolution(
    x: Array, w: Array, stride: Any, padding: Any, between: Any, dilation: Any, groups: int = 1, samples: int = 1
) -> Array:
    """x (N, space…, in), w (size…, in / groups, out): in this order of axes alone XLA is fast in a loop on a CPU."""
    space = "HWD"[: w.ndim - 2]
    axes = f"N{space}C", f"{space}IO", f"N{space}C"
    return lax.conv_general_dilated(x, w, stride, padding, between, dilation, axes, groups, samples)


def _size_first(w: Array) -> Array:
    """(out, in, size…) → (size…, in, out)."""
    return jnp.moveaxis(w, (0, 1), (-1, -2))


def _axes(window: Window, space: tuple[int, ...], positions: tuple[int, ...]) -> Any:
    return zip(space, positions, window.size, window.stride, window.padding, window.dilation, strict=True)


def unfold(f: Convolved) -> Shared:
    """A convolution as weights shared over positions: its windows side by side, an axis for the groups in front."""
    window, groups, positions = f.window, f.window.groups, f.delta.shape[1:-1]
    x = lax.pad(f.x, jnp.zeros((), f.x.dtype), [(0, 0, 0), *((*ends, 0) for ends in window.padding), (0, 0, 0)])
    spans = [(count - 1) * step + 1 for count, step in zip(positions, window.stride, strict=True)]
    seen = []  # slices: lax's patches take up to twenty times as long on a CPU, and more in a loop
    for place in itertools.product(*map(range, window.size)):
        low = [k * apart for k, apart in zip(place, window.dilation, strict=True)]
        high = map(operator.add, low, spans)
        seen.append(lax.slice(x, (0, *low, 0), (len(x), *high, x.shape[-1]), (1, *window.stride, 1)))
    x, delta = (_by_group(a, groups) for a in (jnp.stack(seen, axis=-1).reshape(len(x), *positions, -1), f.delta))
    one = None if f.one is None else jnp.broadcast_to(f.one, (groups, len(f.one)))
    return Shared(x, delta, one)


def _by_group(a: Array, groups: int) -> Array:
    """(N, positions…, channels) → (groups, N, positions, channels / groups)."""
    return jnp.moveaxis(a.reshape(len(a), -1, groups, a.shape[-1] // groups), 2, 0)


# Shared ---------------------------------------------------------------------------------------------------------------


def _affine(f: Any, w: Array, delta: Array, reduce: Callable[[Array], Array] = lambda a: a) -> Any:
    if not f.bias:
        return w
    return Affine(w, reduce(delta if f.one is None else delta * _along(f.one, delta)))


def _ones(f: Any) -> Array:
    """The input of the bias of every sample: 1 until the factor is scaled, and 0 where there is no bias."""
    if not getattr(f, "bias", True):
        return jnp.zeros(len(f.x), f.x.dtype)
    return jnp.ones(len(f.x), f.x.dtype) if f.one is None else f.one


def _along(p: Array, a: Array) -> Array:
    """p (N,) with as many axes as a (N, …)."""
    return p.reshape(-1, *(1,) * (a.ndim - 1))


def _rows(a: Array) -> Array:
    """(N, …) → (N, ·)."""
    return a.reshape(len(a), -1)


def _sum_positions(delta: Array) -> Array:
    return jnp.sum(delta, axis=1, dtype=wide(delta.dtype)).astype(delta.dtype)


def _total(*terms: Any) -> Any:
    """The sum of the terms, or of those in one list."""
    return functools.reduce(operator.add, terms[0] if len(terms) == 1 else terms)
