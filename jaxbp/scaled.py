"""Factors of any size without overflow or underflow: the arithmetic behind `jaxbp.persample`.

Squares overflow and underflow long before the numbers do. So what is to be squared is first divided by r², r a power of
two, and is then near 1; this rounds nothing. r and not r² is kept, because the scale of a gradient is the product of
those of x and δ, which may overflow where the product of the r does not. A squared norm is a pair (a, r), worth a r⁴.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp import factor
from jaxbp.factor import FactorTree, Gather, Rank1, Sum, Whole
from jaxbp.mlp import Affine, Array, wide


class Scaled(NamedTuple):
    """A factor near 1: gₙ = rootₙ² × the gradient of f; root is (N,), or a number for all samples."""

    f: Any
    root: Array


def root_of(size: Array) -> Array:
    """A power of two r with r² within a factor of 4 of the size; r² and 1 / r² are normal numbers."""
    info = jnp.finfo(size.dtype)
    least = float(info.tiny) ** 0.5
    return jnp.clip(lax.reduce_precision(jnp.sqrt(size), info.nexp, 0), least, 1 / least)


def each_row(a: Array, least: float) -> tuple[Array, Array]:
    """Every sample divided by r², and r: of its largest number, or of `least` if that is larger."""
    root = root_of(jnp.maximum(jnp.max(jnp.abs(a), axis=tuple(range(1, a.ndim))), least))
    return a * (1 / (root * root)).reshape(-1, *(1,) * (a.ndim - 1)), root


def all_rows(a: Array, least: float) -> tuple[Array, Array]:
    """The array divided by one r², and r."""
    root = root_of(jnp.max(jnp.abs(a), initial=least))
    return a * (1 / (root * root)), root


def rows(factors: FactorTree) -> list[Scaled]:
    """The layers in float32 at least, each sample scaled by itself."""
    return [_scaled(part, each_row) for part in factor.parts(in_wide(factors))]


def alike(f: Any) -> Scaled:
    """One layer, all samples scaled alike."""
    return _scaled(f, all_rows)


def _scaled(f: Any, each: Callable[[Array, float], tuple[Array, Array]]) -> Scaled:
    match f:
        case Whole():
            leaves = [a.reshape(len(a), -1) for a in jax.tree.leaves(f.gradient)]
            flat, root = each(jnp.concatenate(leaves, axis=1), 0.0)
            return Scaled(Whole(_like(f.gradient, flat)), root)
        case Sum():
            uses = [_scaled(use, each) for use in f.uses]
            root = functools.reduce(jnp.maximum, [use.root for use in uses])
            shares = [jnp.broadcast_to((use.root / root) ** 2, (factor.batch(f),)) for use in uses]
            return Scaled(Sum(tuple(factor.times(use.f, p) for use, p in zip(uses, shares, strict=True))), root)
        case Gather():
            delta, root = each(f.delta, 0.0)
            return Scaled(replace(f, delta=delta), root)
        case _:
            (x, root_x), (delta, root_delta) = each(f.x, 1.0), each(f.delta, 0.0)
            one = jnp.broadcast_to(1 / (root_x * root_x), (len(x),))
            return Scaled(replace(f, x=x, delta=delta, one=one), root_x * root_delta)


def _like(tree: Any, flat: Array) -> Any:
    """The columns of (N, ·) as the leaves of a tree of (N, …)."""
    leaves, structure = jax.tree.flatten(tree)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf[0].size)
    parts = (flat[:, a:b].reshape(leaf.shape) for a, b, leaf in zip(ends, ends[1:], leaves, strict=False))
    return jax.tree.unflatten(structure, list(parts))


def squares(layer: Scaled) -> tuple[Array, Array]:
    """‖gₙ‖² of one layer as (a, r)."""
    return factor.squared_norm(layer.f), layer.root


def added(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The sum of squares (a, r) as one of them."""
    largest = functools.reduce(jnp.maximum, [root for _, root in pairs])
    terms = [a * (root / largest) ** 4 for a, root in pairs]
    return sum(terms[1:], terms[0]), largest


def unit_rows(factors: FactorTree) -> list[Any]:
    """The layers of gₙ / ‖gₙ‖; 0 where the gradient is 0."""
    layers = rows(factors)
    square, largest = added([squares(layer) for layer in layers])
    norm = jnp.where(square == 0, 1, jnp.sqrt(square))
    return [factor.times(layer.f, (layer.root / largest) ** 2 / norm) for layer in layers]


def columns(f: Any) -> tuple[Any, Any]:
    """The factor scaled alike for all samples, and the units of its gradient: g = g′ ∘ units.

    Where the gradients are of rank one every column has its own scale: those of one parameter all have the same.
    """
    if isinstance(f, Rank1):
        roots = [root_of(jnp.max(jnp.abs(a), axis=0, initial=0)) for a in (f.x, f.delta)]
        unit_x, unit_delta = (root * root for root in roots)
        x, delta = (a * (1 / unit)[None] for a, unit in ((f.x, unit_x), (f.delta, unit_delta)))
        w = unit_delta[:, None] * unit_x[None]
        return replace(f, x=x, delta=delta), Affine(w, unit_delta) if f.bias else w
    scaled, root = alike(f)
    return scaled, jax.tree.map(lambda _: root * root, jax.eval_shape(factor.total, f))


def in_units(squared: Any, units: Any) -> Any:
    """Squares of gradients that were computed from `columns`, in their own units."""
    return jax.tree.map(lambda a, unit: a * unit * unit, squared, units)


def in_wide(factors: FactorTree) -> FactorTree:
    """The factors in float32 at least."""
    return factor.floats(lambda a: a.astype(wide(a.dtype)), factors)
