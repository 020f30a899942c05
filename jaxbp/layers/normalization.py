"""Normalisation of one sample: each position, or each group of channels, by its own mean and variance."""

import dataclasses
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp.factor import Whole
from jaxbp.mlp import Array

Shape = tuple[int, ...]


class Scale(NamedTuple):
    """The parameters of a normalisation: γ (channels,) and β (channels,)."""

    gamma: Array
    beta: Array


def _new(channels: int, dtype: DTypeLike) -> Scale:
    return Scale(jnp.ones(channels, dtype), jnp.zeros(channels, dtype))


def _over_positions(a: Array) -> Array:
    return jnp.sum(a.reshape(-1, a.shape[-1]), axis=0)


def _row(a: Array, like: Array) -> Array:
    """(channels,) with as many axes as the other array."""
    return a.reshape(*(1,) * (like.ndim - 1), -1)


def _normalized(x: Array, epsilon: float) -> tuple[Array, Array]:
    """x̂ = (x − μ) / √(Var x + ε) along the last axis, and 1 / √(Var x + ε)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = 1 / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _through(x_hat: Array, inverse: Array, dl_dx_hat: Array) -> Array:
    """∂ℓ/∂x = (∂ℓ/∂x̂ − mean ∂ℓ/∂x̂ − x̂ mean(∂ℓ/∂x̂ ∘ x̂)) / √(Var x + ε): μ and Var x depend on x too."""
    mean = jnp.mean(dl_dx_hat, axis=-1, keepdims=True)
    return inverse * (dl_dx_hat - mean - x_hat * jnp.mean(dl_dx_hat * x_hat, axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """γ ∘ x̂ + β, x̂ = (x − μ) / √(Var x + ε), μ and Var over the channels of each position.

    Source: J. Ba et al., *Layer normalization*, 2016.

    Example:
      >>> params, _ = LayerNorm().init(None, (5, 3))
      >>> x, _ = LayerNorm().forward(params, jnp.array([1.0, 2.0, 3.0], jnp.float32))
      >>> [round(number, 3) for number in x.tolist()]
      [-1.225, 0.0, 1.225]
    """

    epsilon: float = 1e-5

    def init(
        self, key: Array | None, shape: Shape, scheme: Any = None, dtype: DTypeLike = jnp.float32
    ) -> tuple[Scale, Shape]:
        return _new(shape[-1], dtype), shape

    def forward(self, params: Scale, x: Array, key: Array | None = None) -> tuple[Array, Any]:
        x_hat, inverse = _normalized(x, self.epsilon)
        return x_hat * _row(params.gamma, x) + _row(params.beta, x), (x_hat, inverse)

    def backward(self, params: Scale, tape: Any, dl_dx: Array) -> tuple[Array, Whole]:
        x_hat, inverse = tape
        # ∂ℓ/∂γ = Σ_t ∂ℓ/∂x_t ∘ x̂_t, ∂ℓ/∂β = Σ_t ∂ℓ/∂x_t
        factor = Whole(Scale(_over_positions(dl_dx * x_hat), _over_positions(dl_dx)))
        return _through(x_hat, inverse, dl_dx * _row(params.gamma, dl_dx)), factor


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """γ ∘ x̂, x̂ = x / √(mean x² + ε), the mean over the channels of each position.

    Source: B. Zhang and R. Sennrich, *Root mean square layer normalization*, 2019.

    Example:
      >>> params, _ = RMSNorm().init(None, (5, 2))
      >>> x, _ = RMSNorm().forward(params, jnp.array([3.0, 4.0], jnp.float32))
      >>> [round(number, 3) for number in x.tolist()]
      [0.849, 1.131]
    """

    epsilon: float = 1e-6

    def init(
        self, key: Array | None, shape: Shape, scheme: Any = None, dtype: DTypeLike = jnp.float32
    ) -> tuple[Array, Shape]:
        return jnp.ones(shape[-1], dtype), shape

    def forward(self, params: Array, x: Array, key: Array | None = None) -> tuple[Array, Any]:
        inverse = 1 / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon)
        x_hat = x * inverse
        return x_hat * _row(params, x), (x_hat, inverse)

    def backward(self, params: Array, tape: Any, dl_dx: Array) -> tuple[Array, Whole]:
        x_hat, inverse = tape
        factor = Whole(_over_positions(dl_dx * x_hat))  # ∂ℓ/∂γ = Σ_t ∂ℓ/∂x_t ∘ x̂_t
        dl_dx_hat = dl_dx * _row(params, dl_dx)
        # ∂ℓ/∂x = (∂ℓ/∂x̂ − x̂ mean(∂ℓ/∂x̂ ∘ x̂)) / √(mean x² + ε)
        return inverse * (dl_dx_hat - x_hat * jnp.mean(dl_dx_hat * x_hat, axis=-1, keepdims=True)), factor


@dataclasses.dataclass(frozen=True)
class GroupNorm:
    """γ ∘ x̂ + β, x̂ by mean and variance over all positions and the channels of one group.

    Source: Y. Wu and K. He, *Group normalization*, 2018.

    Example:
      >>> GroupNorm(2).init(None, (8, 8, 6))[1]
      (8, 8, 6)
    """

    groups: int
    epsilon: float = 1e-5

    def init(
        self, key: Array | None, shape: Shape, scheme: Any = None, dtype: DTypeLike = jnp.float32
    ) -> tuple[Scale, Shape]:
        if shape[-1] % self.groups:
            raise ValueError(f"its {shape[-1]} channels can't be split into {self.groups} groups")
        return _new(shape[-1], dtype), shape

    def _by_group(self, x: Array) -> Array:
        """(positions…, channels) → (groups, positions · channels / groups)."""
        return jnp.swapaxes(x.reshape(-1, self.groups, x.shape[-1] // self.groups), 0, 1).reshape(self.groups, -1)

    def _by_position(self, a: Array, like: Array) -> Array:
        """The inverse of `_by_group`."""
        a = a.reshape(self.groups, -1, like.shape[-1] // self.groups)
        return jnp.swapaxes(a, 0, 1).reshape(like.shape)

    def forward(self, params: Scale, x: Array, key: Array | None = None) -> tuple[Array, Any]:
        x_hat, inverse = _normalized(self._by_group(x), self.epsilon)
        return self._by_position(x_hat, x) * _row(params.gamma, x) + _row(params.beta, x), (x_hat, inverse)

    def backward(self, params: Scale, tape: Any, dl_dx: Array) -> tuple[Array, Whole]:
        x_hat, inverse = tape
        scaled = dl_dx * self._by_position(x_hat, dl_dx)
        factor = Whole(Scale(_over_positions(scaled), _over_positions(dl_dx)))
        dl_dx_hat = self._by_group(dl_dx * _row(params.gamma, dl_dx))
        return self._by_position(_through(x_hat, inverse, dl_dx_hat), dl_dx), factor


def BatchNorm(*_: Any, **__: Any) -> NoReturn:
    """Refused: it couples the samples of a batch."""
    raise ValueError(
        "batch norm takes its mean over the samples, so no gradient belongs to one sample: use LayerNorm or GroupNorm"
    )
