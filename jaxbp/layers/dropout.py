"""Dropout by a key: without one, every number stays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.mlp import Array


@dataclasses.dataclass(frozen=True)
class Dropout:
    """x ∘ m / (1 − rate), m drawn by the sample's key: 0 with probability `rate`, else 1. Without a key it is x.

    Source: N. Srivastava et al., *Dropout*, 2014.

    Example:
      >>> x, _ = Dropout(0.5).forward((), jax.numpy.ones(3))
      >>> x.tolist()
      [1.0, 1.0, 1.0]
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate is {self.rate}, allowed: 0 ≤ rate < 1")

    def init(
        self, key: Array | None, shape: tuple[int, ...], scheme: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        return (), shape

    def forward(self, params: tuple[()], x: Array, key: Array | None = None) -> tuple[Array, Any]:
        if key is None:
            return x, None
        kept = jax.random.bernoulli(key, jnp.float32(1 - self.rate), x.shape)  # a Python float: another draw under x64
        mask = kept.astype(x.dtype) / (1 - self.rate)
        return x * mask, mask

    def backward(self, params: tuple[()], mask: Array | None, dl_dx: Array) -> tuple[Array, tuple[()]]:
        return (dl_dx if mask is None else dl_dx * mask), ()  # the mask of the forward pass
