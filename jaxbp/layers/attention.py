"""Multi-head self-attention."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp.layers.dense import Dense, Scheme
from jaxbp.mlp import Array

Shape = tuple[int, ...]


class Projections(NamedTuple):
    """The parameters of `SelfAttention`, or what belongs to them: of q, k and v together, and of the output."""

    qkv: Any
    out: Any


@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """Every position reads from the others: in each head  a = softmax(q kᵀ / √d),  z = a v.

    q, k and v are parts of one affine map of x, (positions, channels); z goes through another one. d is the number of
    channels of a head. The softmax has no weights: the factors are those of the two affine maps.

    Source: A. Vaswani et al., *Attention is all you need*, 2017, §3.2.

    Args:
      heads: they share the channels.
      causal: position t reads positions ≤ t only.
      bias: of the affine maps.
      out_scheme: how the weights of the output are drawn, where they are not drawn as the network's.

    Example:
      >>> SelfAttention(2, causal=True).init(jax.random.key(0), (5, 8))[1]
      (5, 8)
    """

    heads: int
    causal: bool = False
    bias: bool = True
    out_scheme: Scheme | None = None

    def init(
        self, key: Array, shape: Shape, scheme: Scheme = "he", dtype: DTypeLike = jnp.float32
    ) -> tuple[Projections, Shape]:
        if len(shape) != 2:
            raise ValueError("it takes (positions, channels)")
        if shape[-1] % self.heads:
            raise ValueError(f"its {shape[-1]} channels can't be shared by {self.heads} heads")
        keys = jax.random.split(key)
        qkv, _ = Dense(3 * shape[-1], self.bias).init(keys[0], shape, scheme, dtype)
        out, _ = Dense(shape[-1], self.bias, self.out_scheme).init(keys[1], shape, scheme, dtype)
        return Projections(qkv, out), shape

    # fmt: off
    def forward(self, params: Projections, x: Array, key: Array | None = None) -> tuple[Array, Any]:
        s, tape_in = self._dense(3 * x.shape[-1]).forward(params.qkv, x)
        q, k, v = self._heads(s)                                        # each (heads, positions, d)
        scores = jnp.einsum("htd,hsd->hts", q / q.shape[-1] ** 0.5, k)  # divided after, XLA rounds them in two ways
        if self.causal:
            scores = jnp.where(jnp.tri(len(x), dtype=bool)[None], scores, -jnp.inf)
        a = jax.nn.softmax(scores)                                      # a = softmax(q kᵀ / √d)
        z = jnp.einsum("hts,hsd->htd", a, v)                            # z = a v
        y, tape_out = self._dense(x.shape[-1]).forward(params.out, _joined(z))
        return y, (tape_in, (q, k, v), a, tape_out)

    def backward(self, params: Projections, tape: Any, dl_dy: Array) -> tuple[Array, Projections]:
        tape_in, (q, k, v), a, tape_out = tape
        dl_dz, out = self._dense(dl_dy.shape[-1]).backward(params.out, tape_out, dl_dy)
        dl_dz = _split(dl_dz, self.heads)
        dl_dv = jnp.einsum("hts,htd->hsd", a, dl_dz)                    # ∂ℓ/∂v = aᵀ ∂ℓ/∂z
        dl_da = jnp.einsum("htd,hsd->hts", dl_dz, v)                    # ∂ℓ/∂a = ∂ℓ/∂z vᵀ
        mean = jnp.sum(a * dl_da, axis=-1, keepdims=True)
        dl_ds = a * (dl_da - mean) / q.shape[-1] ** 0.5                 # ∂ℓ/∂(q kᵀ), row by row; 0 if masked
        dl_dq = jnp.einsum("hts,hsd->htd", dl_ds, k)
        dl_dk = jnp.einsum("hts,htd->hsd", dl_ds, q)
        dl_ds = jnp.concatenate([_joined(part) for part in (dl_dq, dl_dk, dl_dv)], axis=-1)
        dl_dx, qkv = self._dense(dl_ds.shape[-1]).backward(params.qkv, tape_in, dl_ds)
        return dl_dx, Projections(qkv, out)
    # fmt: on

    def _dense(self, size: int) -> Dense:
        return Dense(size, self.bias)

    def _heads(self, s: Array) -> list[Array]:
        return [_split(part, self.heads) for part in jnp.split(s, 3, axis=-1)]


def _split(x: Array, heads: int) -> Array:
    """(positions, heads · d) → (heads, positions, d)."""
    return jnp.swapaxes(x.reshape(len(x), heads, -1), 0, 1)


def _joined(z: Array) -> Array:
    """(heads, positions, d) → (positions, heads · d)."""
    return jnp.swapaxes(z, 0, 1).reshape(z.shape[1], -1)
