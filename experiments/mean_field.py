"""What a wide random layer does to the length of a signal and of δ, by Gauss–Hermite quadrature in float64.

Weights of variance σ_w²/n and biases of variance σ_b² make every component of s normal, of some variance q:
q⁽ˡ⁺¹⁾ = σ_w² E[σ(√q⁽ˡ⁾ z)²] + σ_b², z standard normal, and on the way back ‖δ⁽ˡ⁾‖² = χ₁ ‖δ⁽ˡ⁺¹⁾‖² with
χ₁ = σ_w² E[σ′(√q⁽ˡ⁾ z)²]. Where q has come to its fixed point q*, χ₁ is the same in every layer.

Sources: B. Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016; S. Schoenholz
et al., Deep information propagation, 2017, §2 and §4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxbp import activations

NODES = 200  # an even number: no node on the kink of relu, whose halves then come out exactly

Values = npt.NDArray[np.float64]


def second_moment(hidden: str, q: npt.ArrayLike) -> Values:
    """E[σ(√q z)²] for each q.

    Example:
      >>> second_moment("relu", [1.0, 4.0]).round(12)
      array([0.5, 2. ])
    """
    sigma = activations.get(hidden)
    with jax.enable_x64(True):
        s, weights = _nodes(q)
        return np.asarray(sigma.sigma(jnp.asarray(s))) ** 2 @ weights


def slope_moment(hidden: str, q: npt.ArrayLike, k: int = 1) -> Values:
    """μₖ = E[σ′(√q z)²ᵏ] for each q; χ₁ = σ_w² μ₁.

    Example:
      >>> slope_moment("relu", 1.0).round(12), slope_moment("identity", 1.0, k=2).round(12)
      (np.float64(0.5), np.float64(1.0))
    """
    sigma = activations.get(hidden)
    with jax.enable_x64(True):
        s, weights = _nodes(q)
        slope = sigma.dsigma(jnp.asarray(s), sigma.sigma(jnp.asarray(s)))
        return np.asarray(slope) ** (2 * k) @ weights


def fixed_point(hidden: str, var_w: float, var_b: float = 0.0, iterations: int = 200) -> float:
    """q*: what the recursion makes of q = 1 in that many layers; never less than 1e-200, since relu′(0) is no limit.

    Where σ_w² σ′(0)² = 1, as for tanh with σ_w = 1, q* is 0 and q falls to it as slowly as 1/l.

    Example:
      >>> round(fixed_point("tanh", var_w=2.0), 6)
      0.617965
    """
    q = 1.0
    for _ in range(iterations):
        q = max(var_w * float(second_moment(hidden, q)) + var_b, 1e-200)
    return q


def critical(hidden: str, q: float) -> tuple[float, float]:
    """(σ_w², σ_b²) with χ₁ = 1 and q* = q: the line between order and chaos.

    Example:
      >>> var_w, var_b = critical("tanh", 0.1)
      >>> round(var_w, 4), round(var_w * float(second_moment("tanh", 0.1)) + var_b, 12)
      (1.1776, 0.1)
    """
    var_w = 1 / float(slope_moment(hidden, q))
    return var_w, q - var_w * float(second_moment(hidden, q))


def _nodes(q: npt.ArrayLike) -> tuple[Values, Values]:
    """√q z, (…, nodes), and the weights of the nodes."""
    z, weights = _hermite()
    return np.sqrt(np.asarray(q, np.float64))[..., None] * z, weights


@functools.cache  # an eigenvalue problem, and a fixed point asks for it 200 times
def _hermite() -> tuple[Values, Values]:
    z, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return z, weights / weights.sum()
