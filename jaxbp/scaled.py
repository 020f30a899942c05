"""Factors of any size without overflow or underflow: the arithmetic behind `jaxbp.persample`.

Squares overflow and underflow long before the numbers do. So what is to be squared is first divided by r², r a power of
two, and is then near 1; this rounds nothing. r and not r² is kept, because the scale of a gradient is the product of
those of x and δ, which may overflow where the product of the r does not. A squared norm is a pair (a, r), worth a r⁴.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp.mlp import Affine, Array, Factors, Params, wide


class Rows(NamedTuple):
    """One layer, with each sample's factors near 1: gₙ = rootₙ² δₙ (xₙ, oneₙ)ᵀ, oneₙ being the input of the bias."""

    x: Array
    one: Array
    delta: Array
    root: Array


def root_of(size: Array) -> Array:
    """A power of two r with r² within a factor of 4 of the size; r² and 1 / r² are normal numbers."""
    info = jnp.finfo(size.dtype)
    least = float(info.tiny) ** 0.5
    return jnp.clip(lax.reduce_precision(jnp.sqrt(size), info.nexp, 0), least, 1 / least)


def each_row(a: Array, least: float) -> tuple[Array, Array]:
    """The rows divided by r², and r: of a row's largest number, or of `least` if that is larger."""
    root = root_of(jnp.maximum(jnp.max(jnp.abs(a), axis=1), least))
    return a * (1 / (root * root))[:, None], root


def rows(factors: Factors) -> list[Rows]:
    """The layers in float32 at least, each sample scaled by itself."""
    layers = []
    for x, delta in layers_of(in_wide(factors)):
        (x, root_x), (delta, root_delta) = each_row(x, 1.0), each_row(delta, 0.0)
        layers.append(Rows(x, 1 / (root_x * root_x), delta, root_x * root_delta))
    return layers


def squares(layer: Rows) -> tuple[Array, Array]:
    """‖gₙ‖² of one layer as (a, r)."""
    return jnp.sum(layer.delta**2, axis=1) * (layer.one**2 + jnp.sum(layer.x**2, axis=1)), layer.root  # ‖δ‖² (1 + ‖x‖²)


def added(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The sum of squares (a, r) as one of them."""
    largest = functools.reduce(jnp.maximum, [root for _, root in pairs])
    terms = [a * (root / largest) ** 4 for a, root in pairs]
    return sum(terms[1:], terms[0]), largest


def products(layer: Rows, other: Rows) -> Array:
    """⟨gₙ, g′ₘ⟩ of one layer, (N, M), divided by rootₙ² root′ₘ²."""
    one = layer.one[:, None] * other.one[None]
    return (layer.delta @ other.delta.T) * (one + layer.x @ other.x.T)  # no,mo->nm ∘ (1 + ni,mi->nm)


def unit_rows(factors: Factors) -> list[Rows]:
    """The layers of gₙ / ‖gₙ‖, with roots of 1; 0 where the gradient is 0."""
    layers = rows(factors)
    square, largest = added([squares(layer) for layer in layers])
    norm = jnp.where(square == 0, 1, jnp.sqrt(square))
    lengths = [(layer.root / largest) ** 2 / norm for layer in layers]
    ones = jnp.ones_like(norm)
    return [Rows(r.x, r.one, r.delta * length[:, None], ones) for r, length in zip(layers, lengths, strict=True)]


def columns(factors: Factors) -> tuple[Factors, Factors]:
    """The factors with each column divided by r², and the r: a parameter's gradients all have one scale."""
    roots = jax.tree.map(lambda a: root_of(jnp.max(jnp.abs(a), axis=0, initial=0)), factors)
    return jax.tree.map(lambda a, root: a * (1 / (root * root))[None], factors, roots), roots


def in_units(squared: Params, roots: Factors) -> Params:
    """Squares of gradients that were computed from `columns`, in their own units."""
    layers = []
    for (w, b), root_x, root_delta in zip(squared, roots.x, roots.delta, strict=True):
        unit_b, unit_x = root_delta * root_delta, root_x * root_x
        unit = unit_b[:, None] * unit_x[None]
        layers.append(Affine(w * unit * unit, b * unit_b * unit_b))
    return tuple(layers)


def layers_of(factors: Factors) -> list[tuple[Array, Array]]:
    """(x⁽ˡ⁻¹⁾, δ⁽ˡ⁾) of each layer."""
    return list(zip(factors.x, factors.delta, strict=True))


def in_wide(factors: Factors) -> Factors:
    """The factors in float32 at least."""
    return Factors(*jax.tree.map(lambda a: a.astype(wide(a.dtype)), tuple(factors)))
