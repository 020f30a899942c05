"""Activations: each σ with its hand-derived σ′ and σ″ on the next lines.

All are elementwise, x = σ(s). Conventions, the same for every one of them:

* At a kink σ′ is the slope on the left, so relu′(0) = 0 and leaky_relu′(0) = 0.01; σ″ is the limit from the left, so
  elu″(0) = 1 and soft_sign″(0) = 2.
* A NaN gives NaN, in the value and in the derivatives. The σ′ and σ″ of the identity stay 1 and 0.
* At ±inf, and where an intermediate result would overflow, value and derivatives are the mathematical limits.

>>> print(*ACTIVATIONS)
identity relu leaky_relu relu6 elu celu selu gelu gelu_tanh silu mish sigmoid log_sigmoid tanh
soft_sign softplus hard_tanh hard_sigmoid hard_silu squareplus
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp.names import lookup

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Activation:
    """σ, σ′ and σ″.

    σ′ may be computed from s or from x = σ(s), whichever is cheaper. If it never reads s, say ``needs_s=False``. Then
    `apply` passes None for s and does not keep s between forward and backward: a layer holds one array, its output.

    Args:
      name: shown by `repr` and in error messages.
      sigma: s ↦ σ(s), elementwise, any shape, dtype kept.
      dsigma: (s, x) ↦ σ′(s) where x = σ(s).
      needs_s: whether `dsigma` reads its first argument.
      d2sigma: (s, x) ↦ σ″(s), for `jaxbp.curvature`; Hessians cannot be had without it. It may always read s.

    Example:
      >>> square = Activation("square", lambda s: s**2, lambda s, x: 2 * s)
      >>> square
      Activation(name='square')
    """

    name: str
    sigma: Callable[[Array], Array] = dataclasses.field(repr=False)
    dsigma: Callable[[Array, Array], Array] = dataclasses.field(repr=False)
    needs_s: bool = dataclasses.field(default=True, repr=False)
    d2sigma: Callable[[Array, Array], Array] | None = dataclasses.field(default=None, repr=False)

    def __reduce__(self) -> Any:
        """One of this module is pickled by its name: its functions have none."""
        return self.name if ACTIVATIONS.get(self.name) is self else super().__reduce_ex__(2)


def _finite(s: Array) -> Array:
    """s with ±inf replaced by the largest finite numbers, so that 0·s is 0 in a limit; NaN goes through."""
    limit = float(jnp.finfo(s.dtype).max)
    return jnp.clip(s, -limit, limit)


def _where(condition: Array, s: Array, value: float) -> Array:
    """`value` where the condition holds, else 0; NaN where s is NaN."""
    return jnp.where(jnp.isnan(s), s, jnp.where(condition, value, 0.0).astype(s.dtype))


def no_curvature(s: Array, x: Array) -> Array:
    """The σ″ of a piecewise linear σ: 0, NaN where s is NaN. `jaxbp.curvature` leaves its terms out of products."""
    return jnp.where(jnp.isnan(s), s, jnp.zeros_like(s))


identity = Activation(
    "identity",
    lambda s: s,
    lambda s, x: jnp.ones_like(x),
    needs_s=False,
    d2sigma=lambda s, x: jnp.zeros_like(x),
)

relu = Activation(
    "relu",
    lambda s: jnp.maximum(s, 0),
    lambda s, x: jnp.sign(x),  # x ≥ 0, so sign(x) is 1 where s > 0 and 0 elsewhere; NaN goes through
    needs_s=False,
    d2sigma=no_curvature,
)

LEAK = 0.01
leaky_relu = Activation(
    "leaky_relu",
    lambda s: jnp.where(s > 0, s, LEAK * s),
    lambda s, x: jnp.where(jnp.isnan(x), x, jnp.where(x > 0, 1.0, LEAK).astype(x.dtype)),  # x has the sign of s
    needs_s=False,
    d2sigma=no_curvature,
)

relu6 = Activation(
    "relu6",
    lambda s: jnp.clip(s, 0, 6),
    lambda s, x: _where((s > 0) & (s <= 6), s, 1.0),
    d2sigma=no_curvature,
)


def _elu(name: str, scale: float, alpha: float) -> Activation:
    """scale · (s where s > 0, α (eˢ − 1) elsewhere). σ′ is α eˢ, never x + α, which cancels."""
    return Activation(
        name,
        lambda s: scale * jnp.where(s > 0, s, alpha * jnp.expm1(jnp.minimum(s, 0))),
        lambda s, x: scale * jnp.where(s > 0, 1.0, alpha * jnp.exp(jnp.minimum(s, 0))),
        d2sigma=lambda s, x: scale * jnp.where(s > 0, 0.0, alpha * jnp.exp(jnp.minimum(s, 0))),
    )


elu = _elu("elu", scale=1.0, alpha=1.0)
celu = _elu("celu", scale=1.0, alpha=1.0)  # α (e^{s/α} − 1) differs from ELU's α (eˢ − 1) only where α ≠ 1
selu = _elu("selu", scale=1.0507009873554805, alpha=1.6732632423543772)  # Klambauer et al. 2017, §2

SQRT_2 = 2.0**0.5
SQRT_2_PI = 2.5066282746310002  # √(2π)
SQRT_2_OVER_PI = 0.7978845608028654  # √(2/π)


def _gelu_cdf(s: Array) -> Array:
    return 0.5 * lax.erfc(-s / SQRT_2)  # Φ(s)


def _gelu_density(s: Array) -> Array:
    s = jnp.clip(s, -100, 100)  # φ is 0 exactly beyond |s| = 100, in f64 too: no s² to overflow, nor s·φ in σ″
    return jnp.exp(-0.5 * s * s) / SQRT_2_PI  # φ(s)


gelu = Activation(
    "gelu",
    lambda s: jnp.maximum(s, -jnp.finfo(s.dtype).max) * _gelu_cdf(s),
    lambda s, x: _gelu_cdf(s) + _finite(s) * _gelu_density(s),
    d2sigma=lambda s, x: _gelu_density(s) * (2 - jnp.clip(s, -100, 100) ** 2),  # φ(s) (2 − s²)
)


def _gelu_tanh_gate(s: Array) -> Array:
    """½(1 + tanh u) as the sigmoid of 2u, which keeps its digits where tanh u is near −1."""
    return lax.logistic(2 * SQRT_2_OVER_PI * (s + 0.044715 * s * s * s))


def _gelu_tanh_derivative(s: Array, x: Array) -> Array:
    s = jnp.clip(s, -100, 100)  # beyond |s| = 100 the gate is 0 or 1 exactly in f64: no s³ to overflow
    gate, du_ds = _gelu_tanh_gate(s), SQRT_2_OVER_PI * (1 + 3 * 0.044715 * s * s)
    return gate + 2 * s * gate * _gelu_tanh_gate(-s) * du_ds


def _gelu_tanh_second(s: Array, x: Array) -> Array:
    """p q (2z′ + s z″ + s z′² (q − p)), p = σ(z) the gate, q = σ(−z), z = 2u(s)."""
    s = jnp.clip(s, -100, 100)
    p, q = _gelu_tanh_gate(s), _gelu_tanh_gate(-s)
    dz, s_d2z = 2 * SQRT_2_OVER_PI * (1 + 3 * 0.044715 * s * s), 12 * SQRT_2_OVER_PI * 0.044715 * s * s
    return p * q * (2 * dz + s_d2z + s * dz * dz * (q - p))


gelu_tanh = Activation(
    "gelu_tanh",
    lambda s: jnp.maximum(s, -jnp.finfo(s.dtype).max) * _gelu_tanh_gate(jnp.clip(s, -100, 100)),
    _gelu_tanh_derivative,
    d2sigma=_gelu_tanh_second,
)


def _silu_second(s: Array, x: Array) -> Array:
    """p q (2 + s (q − p)), p = σ(s), q = σ(−s)."""
    p, q = lax.logistic(s), lax.logistic(-s)
    return p * q * (2 + _finite(s) * (q - p))


silu = Activation(
    "silu",
    lambda s: jnp.maximum(s, -jnp.finfo(s.dtype).max) * lax.logistic(s),
    lambda s, x: lax.logistic(s) * (1 + _finite(s) * lax.logistic(-s)),
    d2sigma=_silu_second,
)


def _mish_gate(s: Array) -> Array:
    """tanh(ln(1 + eˢ)) as p (1 + q) / (1 + q²), p = σ(s), q = σ(−s): nothing cancels on either side."""
    p, q = lax.logistic(s), lax.logistic(-s)
    return p * (1 + q) / (1 + q * q)


def _mish_derivative(s: Array, x: Array) -> Array:
    p, q = lax.logistic(s), lax.logistic(-s)
    sech = 2 * q / (1 + q * q)  # 1 / cosh(ln(1 + eˢ))
    return _mish_gate(s) + _finite(s) * p * sech * sech


def _mish_second(s: Array, x: Array) -> Array:
    """p sech² (2 + s (q − 2 p tanh)), tanh and sech of ln(1 + eˢ); multiplied out, so that no ∞ meets a 0."""
    p, q = lax.logistic(s), lax.logistic(-s)
    sech = 2 * q / (1 + q * q)
    return 2 * p * sech * sech + _finite(s) * p * sech * sech * (q - 2 * p * _mish_gate(s))


mish = Activation(
    "mish",
    lambda s: jnp.maximum(s, -jnp.finfo(s.dtype).max) * _mish_gate(s),
    _mish_derivative,
    d2sigma=_mish_second,
)

sigmoid = Activation(
    "sigmoid",
    lambda s: lax.logistic(s),
    lambda s, x: x * (1 - x),
    needs_s=False,
    d2sigma=lambda s, x: x * lax.logistic(-s) * (lax.logistic(-s) - x),
)

log_sigmoid = Activation(
    "log_sigmoid",
    lambda s: -jnp.logaddexp(-s, 0),
    lambda s, x: -jnp.expm1(x),  # 1 − σ(s), and x = ln σ(s)
    needs_s=False,
    d2sigma=lambda s, x: -lax.logistic(s) * lax.logistic(-s),
)

tanh = Activation(
    "tanh",
    lambda s: jnp.tanh(s),
    lambda s, x: (1 - x) * (1 + x),
    needs_s=False,
    d2sigma=lambda s, x: -2 * x * (1 - x) * (1 + x),
)

soft_sign = Activation(
    "soft_sign",
    lambda s: _finite(s) / (1 + jnp.abs(_finite(s))),
    lambda s, x: (1 / (1 + jnp.abs(s))) ** 2,
    d2sigma=lambda s, x: jnp.where(s > 0, -2.0, 2.0).astype(s.dtype) * (1 / (1 + jnp.abs(s))) ** 3,
)

softplus = Activation(
    "softplus",
    lambda s: jnp.logaddexp(s, 0),
    lambda s, x: -jnp.expm1(-x),  # σ(s) = 1 − e⁻ˣ, and x = ln(1 + eˢ)
    needs_s=False,
    d2sigma=lambda s, x: lax.logistic(s) * lax.logistic(-s),
)

hard_tanh = Activation(
    "hard_tanh",
    lambda s: jnp.clip(s, -1, 1),
    lambda s, x: _where((s > -1) & (s <= 1), s, 1.0),
    d2sigma=no_curvature,
)

hard_sigmoid = Activation(
    "hard_sigmoid",
    lambda s: jnp.clip(s + 3, 0, 6) / 6,  # s + 3 is exact near −3, where s/6 + ½ would cancel
    lambda s, x: _where((s > -3) & (s <= 3), s, 1 / 6),
    d2sigma=no_curvature,
)

hard_silu = Activation(
    "hard_silu",
    lambda s: jnp.where(s <= -3, 0.0, s * (jnp.clip(s + 3, 0, 6) / 6)),
    lambda s, x: jnp.where(s <= -3, 0.0, jnp.where(s > 3, 1.0, (s + 1.5) / 3)),
    d2sigma=lambda s, x: _where((s > -3) & (s <= 3), s, 1 / 3),
)


def _squareplus(s: Array) -> Array:
    root = jnp.abs(s) / 2 + jnp.hypot(_finite(s), jnp.full_like(s, 2)) / 2
    return jnp.where(s > 0, root, 1 / root)  # σ(s) σ(−s) = 1: no cancellation where s < 0


def _squareplus_derivative(s: Array | None, x: Array) -> Array:
    small, large = jnp.minimum(x, 1), 1 / jnp.maximum(x, 1)
    return small**2 / (small**2 + large**2)  # x² / (x² + 1) without the overflow of x² or 1/x²


squareplus = Activation(
    "squareplus",
    _squareplus,  # (s + √(s² + 4)) / 2
    _squareplus_derivative,  # x / √(s² + 4), and √(s² + 4) = x + 1/x
    needs_s=False,
    d2sigma=lambda s, x: 2 * (1 / jnp.hypot(_finite(s), jnp.full_like(s, 2))) ** 3,  # 2 / √(s² + 4)³
)

ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        *(identity, relu, leaky_relu, relu6, elu, celu, selu, gelu, gelu_tanh, silu, mish, sigmoid, log_sigmoid, tanh),
        *(soft_sign, softplus, hard_tanh, hard_sigmoid, hard_silu, squareplus),
    )
}


def get(activation: str | Activation) -> Activation:
    """The activation of that name; an Activation is returned as it is.

    Raises:
      ValueError: no activation has that name; the nearest one is given.

    Example:
      >>> get("tanh").sigma(jnp.float32(0.0))
      Array(0., dtype=float32)
    """
    return activation if isinstance(activation, Activation) else lookup("activation", activation, ACTIVATIONS)
