"""Tables of which a sample reads rows: of the tokens, and of the positions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp.factor import Gather, Whole
from jaxbp.mlp import Array

Shape = tuple[int, ...]


def rows_of(table: Array, ids: Array) -> Array:
    """table[id_t], and NaN for an id that is not in the table: no wrong number can be finite."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"x has dtype {ids.dtype}, an embedding takes integer tokens")
    known = (ids >= 0) & (ids < len(table))
    return jnp.where(known[..., None], table[jnp.where(known, ids, 0)], jnp.nan)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """x_t = E[id_t], E (tokens, channels); the sample is a sequence of integer tokens, (positions,).

    Args:
      tokens: how many there are, 0 … tokens − 1.
      channels: of a row.
      deviation: E is drawn from a normal distribution of this standard deviation.

    Example:
      >>> Embedding(65, 8).init(jax.random.key(0), (5,))[1]
      (5, 8)
    """

    tokens: int
    channels: int
    deviation: float = 0.02

    def init(self, key: Array, shape: Shape, scheme: Any = None, dtype: DTypeLike = jnp.float32) -> tuple[Array, Shape]:
        if len(shape) != 1:
            raise ValueError("it takes (positions,), a sequence of tokens")
        return self.deviation * jax.random.normal(key, (self.tokens, self.channels), dtype), (*shape, self.channels)

    def forward(self, table: Array, ids: Array, key: Array | None = None) -> tuple[Array, Array]:
        return rows_of(table, ids), ids

    def backward(self, table: Array, ids: Array, dl_dx: Array) -> tuple[Array, Gather]:
        return jnp.zeros(ids.shape, dl_dx.dtype), Gather(ids, dl_dx, len(table))  # ∂ℓ/∂E[id_t] += ∂ℓ/∂x_t


@dataclasses.dataclass(frozen=True)
class PositionEmbedding:
    """x_t + P_t, P (positions, channels), a row for each position.

    Example:
      >>> PositionEmbedding().init(jax.random.key(0), (5, 8))[0].shape
      (5, 8)
    """

    deviation: float = 0.02

    def init(self, key: Array, shape: Shape, scheme: Any = None, dtype: DTypeLike = jnp.float32) -> tuple[Array, Shape]:
        if len(shape) != 2:
            raise ValueError("it takes (positions, channels)")
        return self.deviation * jax.random.normal(key, shape, dtype), shape

    def forward(self, table: Array, x: Array, key: Array | None = None) -> tuple[Array, tuple[()]]:
        return x + table, ()

    def backward(self, table: Array, tape: tuple[()], dl_dx: Array) -> tuple[Array, Whole]:
        return dl_dx, Whole(dl_dx)  # ∂ℓ/∂P_t = ∂ℓ/∂x_t
