"""Weights at every position, and an activation of every number."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp import activations, initializers
from jaxbp.activations import Activation
from jaxbp.factor import Rank1, Shared
from jaxbp.mlp import Affine, Array

Scheme = str | initializers.Initializer


@dataclasses.dataclass(frozen=True)
class Dense:
    """s_t = w x_t + b at every position t, with the same w (out, in) and b (out,).

    x is (in,), one position, or (positions…, in).

    Args:
      size: out.
      bias: without one the parameter is w alone.
      scheme: how w is drawn, where it is not drawn as the network's.

    Example:
      >>> params, shape = Dense(4).init(jax.random.key(0), (5, 3))
      >>> params.w.shape, shape
      ((4, 3), (5, 4))
    """

    size: int
    bias: bool = True
    scheme: Scheme | None = None

    def init(
        self, key: Array, shape: tuple[int, ...], scheme: Scheme = "he", dtype: DTypeLike = jnp.float32
    ) -> tuple[Any, tuple[int, ...]]:
        draw = initializers.weights(self.scheme or scheme)
        w = draw(key, (self.size, shape[-1]), dtype)
        return Affine(w, jnp.zeros(self.size, dtype)) if self.bias else w, (*shape[:-1], self.size)

    # fmt: off
    def forward(self, params: Any, x: Array, key: Array | None = None) -> tuple[Array, Array]:
        w, b = params if self.bias else (params, None)
        x = x.astype(w.dtype)
        s = x @ w.T                                                     # s_t = w x_t + b
        return (s if b is None else s + b.reshape(*(1,) * (s.ndim - 1), -1)), x

    def backward(self, params: Any, x: Array, dl_ds: Array) -> tuple[Array, Any]:
        w = params.w if self.bias else params
        kind = Rank1 if x.ndim == 1 else Shared
        x_t, delta = (a.reshape(-1, a.shape[-1]) if a.ndim > 1 else a for a in (x, dl_ds))
        return dl_ds @ w, kind(x_t, delta, bias=self.bias)              # ∂ℓ/∂x_t = wᵀ ∂ℓ/∂s_t
    # fmt: on


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """x = σ(s) of every number; σ is a name or an `Activation`.

    Example:
      >>> Elementwise("tanh").init(jax.random.key(0), (5, 3))
      ((), (5, 3))
    """

    sigma: str | Activation

    def __post_init__(self) -> None:
        activations.get(self.sigma)  # raises for a name that is unknown

    def init(
        self, key: Array, shape: tuple[int, ...], scheme: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        return (), shape

    def forward(self, params: tuple[()], s: Array, key: Array | None = None) -> tuple[Array, Any]:
        sigma = activations.get(self.sigma)
        x = sigma.sigma(s)  # x = σ(s)
        return x, (s if sigma.needs_s else None, x)

    def backward(self, params: tuple[()], tape: Any, dl_dx: Array) -> tuple[Array, tuple[()]]:
        dsigma = activations.get(self.sigma).dsigma(*jax.lax.optimization_barrier(tape))
        return dl_dx * dsigma, ()  # ∂ℓ/∂s = ∂ℓ/∂x ⊙ σ′(s)
