"""Initial weights and biases by their names in the literature; the draws themselves are `jax.nn.initializers`'."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.names import lookup

Initializer = Callable[..., jax.Array]
"""(key, shape, dtype) ↦ an array, as in `jax.nn.initializers`."""

Tree = TypeVar("Tree")

AXES = {"in_axis": 1, "out_axis": 0}  # weights are (out, in)

WEIGHTS: dict[str, Initializer] = {
    "he_normal": initializers.he_normal(**AXES),  # He et al. 2015
    "he_uniform": initializers.he_uniform(**AXES),
    "glorot_normal": initializers.glorot_normal(**AXES),  # Glorot & Bengio 2010
    "glorot_uniform": initializers.glorot_uniform(**AXES),
    "lecun_normal": initializers.lecun_normal(**AXES),  # LeCun et al. 1998
    "lecun_uniform": initializers.lecun_uniform(**AXES),
    "orthogonal": initializers.orthogonal(),  # Saxe et al. 2013
    "normal": initializers.normal(0.01),
}
WEIGHTS |= {name: WEIGHTS[f"{name}_normal"] for name in ("he", "glorot", "lecun")}

BIASES: dict[str, Initializer] = {"zeros": initializers.zeros, "normal": initializers.normal(0.01)}


def weights(scheme: str | Initializer) -> Initializer:
    """The weight initialiser of that name, or the callable that was given; ValueError for an unknown name."""
    return lookup("scheme", scheme, WEIGHTS) if isinstance(scheme, str) else scheme


def biases(scheme: str | Initializer) -> Initializer:
    """The bias initialiser of that name, or the callable that was given; ValueError for an unknown name."""
    return lookup("bias", scheme, BIASES) if isinstance(scheme, str) else scheme


def in_a_loop(draw: Callable[[jax.Array], Tree], layers: Sequence[int]) -> list[Tree]:
    """draw(layer) for each of the layers, and perhaps a few more, in a program whose size is that of one draw.

    A thousand draws in a row take XLA minutes to compile, and so do a thousand slices of a stack, each a kernel of its
    own. Moves in a queue are none. A queue of √n blocks of √n layers moves each layer 2 √n times.
    """
    size = math.isqrt(len(layers) - 1) + 1
    count = -(-len(layers) // size)
    numbers = jnp.resize(jnp.array(layers), (size * count,))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw, numbers[0]))

    def block(k: jax.Array, queue: list[Tree]) -> list[Tree]:
        drawn = jax.lax.fori_loop(0, size, lambda i, q: [*q[1:], draw(numbers[k * size + i])], [empty] * size)
        return [*queue[size:], *drawn]

    queue: list[Tree] = jax.lax.fori_loop(0, count, block, [empty] * (size * count))
    return queue
