"""Losses: each ℓ with its hand-derived ∂ℓ/∂x and ∂²ℓ/∂x² on the next lines.

A loss belongs to one sample: x = x⁽ᴸ⁾ is the network's output, (C,), y its target. It sums over the C outputs and is
never divided by the number of samples. At a kink ∂ℓ/∂x is the slope on the left, as for activations, and ∂²ℓ/∂x² the
limit from the left. A NaN gives NaN.

>>> print(*LOSSES)
squared_error absolute_error huber log_cosh softmax_cross_entropy sigmoid_cross_entropy hinge kl_divergence poisson
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy

from jaxbp.names import lookup

Array = jax.Array
LN_2 = 0.6931471805599453
Rule = Callable[[Array, Array], Array]
Target = Literal["array", "label", "label or array"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """ℓ, ∂ℓ/∂x and H_ℓ = ∂²ℓ/∂x².

    Args:
      name: shown by `repr` and in error messages.
      ell: (x, y) ↦ ℓ(x, y), one sample: x is (C,), the result a scalar.
      dl_dx: (x, y) ↦ ∂ℓ/∂x, (C,).
      target: what y is: "array" (C,) numbers, "label" an integer in 0 … C − 1, or "label or array".
      positions: whether x and y have an axis of positions in front, see `over_positions`.
      padding: with positions, the label of those that do not count.
      hvp: (x, y, v) ↦ H_ℓ v, (C,), for `jaxbp.curvature`; without it there is no second derivative.
      root: (x, y) ↦ S, (C, R), with S Sᵀ = H_ℓ; a loss whose H_ℓ has negative eigenvalues has none.

    Example:
      >>> quartic = Loss("quartic", lambda x, y: jnp.sum((x - y) ** 4), lambda x, y: 4 * (x - y) ** 3)
      >>> quartic
      Loss(name='quartic')
    """

    name: str
    ell: Callable[[Array, Array], Array] = dataclasses.field(repr=False)
    dl_dx: Callable[[Array, Array], Array] = dataclasses.field(repr=False)
    target: Target = dataclasses.field(default="array", repr=False)
    positions: bool = dataclasses.field(default=False, repr=False)
    padding: int | None = dataclasses.field(default=None, repr=False)
    hvp: Callable[[Array, Array, Array], Array] | None = dataclasses.field(default=None, repr=False)
    root: Callable[[Array, Array], Array] | None = dataclasses.field(default=None, repr=False)

    def __reduce__(self) -> Any:
        """One of this module is pickled by its name: its functions have none."""
        return self.name if LOSSES.get(self.name) is self else super().__reduce_ex__(2)


def _elementwise(name: str, ell: Rule, dl_dx: Rule, d2l_dx2: Rule, target: Target = "array") -> Loss:
    """A loss with a diagonal H_ℓ, given as (C,): H_ℓ v = h ⊙ v, where ∞ · 0 is 0, and S = diag √h."""

    def hvp(x: Array, y: Array, v: Array) -> Array:
        h = d2l_dx2(x, y)
        return jnp.where((v == 0) & ~jnp.isnan(h), v, h * v)

    return Loss(name, ell, dl_dx, target, hvp=hvp, root=lambda x, y: jnp.diag(jnp.sqrt(d2l_dx2(x, y))))


def _no_curvature(dl_dx: Rule) -> Rule:
    """The H_ℓ of a piecewise linear loss: 0, and NaN where the slope is NaN."""

    def d2l_dx2(x: Array, y: Array) -> Array:
        slope = dl_dx(x, y)
        return jnp.where(jnp.isnan(slope), slope, jnp.zeros_like(slope))

    return d2l_dx2


squared_error = _elementwise(
    "squared_error",  # ½ ‖x − y‖²
    lambda x, y: 0.5 * jnp.sum((x - y) ** 2),
    lambda x, y: x - y,
    lambda x, y: jnp.ones_like(x),
)


def _absolute_error_gradient(x: Array, y: Array) -> Array:
    return jnp.where(x == y, -1.0, jnp.sign(x - y))  # −1 at x = y, the slope on the left


absolute_error = _elementwise(
    "absolute_error",  # Σ |x − y|
    lambda x, y: jnp.sum(jnp.abs(x - y)),
    _absolute_error_gradient,
    _no_curvature(_absolute_error_gradient),
)


def _huber(x: Array, y: Array) -> Array:
    """Σ h(x − y), h(e) = ½e² where |e| ≤ 1, |e| − ½ elsewhere (Huber 1964, δ = 1)."""
    inner = jnp.clip(x - y, -1, 1)
    return jnp.sum(0.5 * inner**2 + (jnp.abs(x - y) - jnp.abs(inner)))


huber = _elementwise(
    "huber",
    _huber,
    lambda x, y: jnp.clip(x - y, -1, 1),
    lambda x, y: jnp.where(jnp.isnan(x - y), x - y, ((x - y > -1) & (x - y <= 1)).astype(x.dtype)),
)


def _log_cosh(x: Array, y: Array) -> Array:
    """Σ ln cosh(x − y), as ½ log1p(sinh² e) where e = |x − y| < 1, as e + log1p(e^(−2e)) − ln 2 beyond."""
    e = jnp.abs(x - y)
    near = 0.5 * jnp.log1p(jnp.sinh(jnp.minimum(e, 1)) ** 2)
    return jnp.sum(jnp.where(e < 1, near, e + jnp.log1p(jnp.exp(-2 * e)) - LN_2))


log_cosh = _elementwise(
    "log_cosh",
    _log_cosh,
    lambda x, y: jnp.tanh(x - y),
    lambda x, y: (1 / jnp.cosh(x - y)) ** 2,  # 1 − tanh² would cancel
)


def _one_hot(x: Array, label: Array) -> Array:
    """(C,), 1 at the label; all NaN for a label outside 0 … C − 1, so that no wrong gradient can be finite."""
    largest = min(x.size - 1, jnp.iinfo(label.dtype).max)  # a uint8 label cannot be compared with C = 300
    known = (label >= 0) & (label <= largest)
    one_hot = jnp.arange(x.size, dtype=jnp.int32) == label.astype(jnp.int32)
    return jnp.where(known, one_hot.astype(x.dtype), jnp.nan)


@functools.cache
def smoothed_softmax_cross_entropy(label_smoothing: float) -> Loss:
    """−Σ pᵢ ln softmax(x)ᵢ, p = (1 − α) y + (α/C) Σy, α the label smoothing (Szegedy et al. 2016, §7).

    y is an integer label or C numbers, which need not sum to 1: ∂ℓ/∂x = (Σy) softmax(x) − p.

    Raises:
      ValueError: the label smoothing is not in [0, 1).

    Example:
      >>> loss = smoothed_softmax_cross_entropy(0.1)
      >>> loss.dl_dx(jnp.zeros(2, jnp.float32), jnp.int32(0))
      Array([-0.45,  0.45], dtype=float32)
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, allowed: 0 ≤ label_smoothing < 1")

    def target(x: Array, y: Array) -> Array:
        y = _one_hot(x, y) if y.ndim == 0 else y
        return (1 - label_smoothing) * y + label_smoothing / x.size * jnp.sum(y) if label_smoothing else y

    def ell(x: Array, y: Array) -> Array:
        p = target(x, y)
        return -jnp.sum(jnp.where(p == 0, 0.0, p * jax.nn.log_softmax(x)))

    def dl_dx(x: Array, y: Array) -> Array:
        p = target(x, y)
        return jnp.sum(p) * jax.nn.softmax(x) - p

    name = "softmax_cross_entropy" + (f"(label_smoothing={label_smoothing})" if label_smoothing else "")
    return Loss(name, ell, dl_dx, "label or array", hvp=_softmax_hvp(target), root=_softmax_root(target))


def _softmax_hvp(target: Rule) -> Callable[[Array, Array, Array], Array]:
    """H_ℓ v = (Σp) (q ⊙ v − q qᵀv), q = softmax(x), p the target as C numbers."""

    def hvp(x: Array, y: Array, v: Array) -> Array:
        q = jax.nn.softmax(x)
        return jnp.sum(target(x, y)) * q * (v - jnp.sum(q * v))

    return hvp


def _softmax_root(target: Rule) -> Rule:
    """S = √(Σp) (diag √q − q √qᵀ); NaN where Σp < 0, where no real root is."""

    def root(x: Array, y: Array) -> Array:
        q = jax.nn.softmax(x)
        return jnp.sqrt(jnp.sum(target(x, y)) * q)[None, :] * (jnp.eye(x.size, dtype=x.dtype) - q[:, None])

    return root


softmax_cross_entropy = smoothed_softmax_cross_entropy(0.0)


def _sigmoid_cross_entropy(x: Array, y: Array) -> Array:
    """Σ softplus(x) − x y, as max(x, 0) − x y + log1p(e^(−|x|)); y in [0, 1]. A matched ±inf costs 0."""
    linear = jnp.where(x > 0, x * (1 - y), -x * y)
    matched = jnp.where(x > 0, y == 1, y == 0)
    return jnp.sum(jnp.where(matched, 0.0, linear) + jnp.log1p(jnp.exp(-jnp.abs(x))))


sigmoid_cross_entropy = _elementwise(
    "sigmoid_cross_entropy",
    _sigmoid_cross_entropy,
    lambda x, y: jnp.where(x > 0, (1 - y) - lax.logistic(-x), lax.logistic(x) - y),  # σ(x) − y, kept exact near y = 1
    lambda x, y: lax.logistic(x) * lax.logistic(-x),
)


def _hinge_violation(x: Array, y: Array) -> tuple[Array, Array]:
    """The label's one-hot and the margins 1 + xᵢ − x_y of the other classes (0 at the label itself)."""
    one_hot = _one_hot(x, y)
    return one_hot, jnp.where(one_hot == 1, 0.0, 1 + x - jnp.sum(jnp.where(one_hot == 0, 0.0, one_hot * x)))


def _hinge(x: Array, y: Array) -> Array:
    """Σ_{i≠y} max(0, 1 + xᵢ − x_y) (Weston & Watkins 1999); y an integer label."""
    return jnp.sum(jnp.maximum(_hinge_violation(x, y)[1], 0))


def _hinge_gradient(x: Array, y: Array) -> Array:
    one_hot, margin = _hinge_violation(x, y)
    violated = jnp.where(jnp.isnan(margin), margin, (margin > 0).astype(x.dtype))
    return violated - one_hot * jnp.sum(violated)


hinge = _elementwise("hinge", _hinge, _hinge_gradient, _no_curvature(_hinge_gradient), target="label")

kl_divergence = Loss(
    "kl_divergence",  # Σ y (ln y − ln softmax(x)): x are logits, y probabilities; 0 ln 0 = 0
    lambda x, y: jnp.sum(xlogy(y, y) - jnp.where(y == 0, 0.0, y * jax.nn.log_softmax(x))),
    lambda x, y: jnp.sum(y) * jax.nn.softmax(x) - y,
    hvp=_softmax_hvp(lambda x, y: y),
    root=_softmax_root(lambda x, y: y),
)

poisson = _elementwise(
    "poisson",  # Σ eˣ − y x: x is the logarithm of the rate, y a count; ln y! is left out; 0 · (−∞) = 0
    lambda x, y: jnp.sum(jnp.exp(x) - jnp.where(y == 0, 0.0, y * jnp.minimum(x, 1000))),  # e¹⁰⁰⁰ = ∞: no ∞ − ∞
    lambda x, y: jnp.exp(x) - y,
    lambda x, y: jnp.exp(x),
)

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        *(squared_error, absolute_error, huber, log_cosh, softmax_cross_entropy, sigmoid_cross_entropy, hinge),
        *(kl_divergence, poisson),
    )
}


def over_positions(loss: str | Loss, reduction: str = "mean", padding: int | None = None) -> Loss:
    """The loss of a sequence, which is one sample: the mean, or the sum, of ℓ(x_t, y_t) over its positions.

    x is (T, C), y (T,) labels or (T, C) numbers.

    Args:
      loss: ℓ of one position.
      reduction: mean or sum; the mean is over the positions that count; without any it is 0.
      padding: the label of positions that do not count, such as −1.

    Raises:
      ValueError: padding for a loss without labels, another reduction, a loss that is over positions already.

    Example:
      >>> loss = over_positions("softmax_cross_entropy", padding=-1)
      >>> loss.ell(jnp.zeros((3, 2), jnp.float32), jnp.array([0, 1, -1]))  # ln 2
      Array(0.6931472, dtype=float32)
    """
    loss = get(loss)
    if loss.positions:
        raise ValueError(f"{loss.name} is over positions already")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, allowed: mean, sum")
    if padding is not None and "label" not in loss.target:
        raise ValueError(f"padding is {padding}, and {loss.name} has no labels")
    return _over_positions(loss, reduction, padding)


@functools.cache  # equal arguments, the same loss: it is a static argument of compiled functions
def _over_positions(loss: Loss, reduction: str, padding: int | None) -> Loss:
    def counted(x: Array, y: Array) -> tuple[Array, Array]:
        """1 at the positions that count, over their number for a mean; and labels that are in range everywhere."""
        counts = jnp.ones(len(y), bool) if padding is None or y.ndim > 1 else y != padding
        number = jnp.maximum(jnp.sum(counts), 1).astype(x.dtype) if reduction == "mean" else 1
        return counts.astype(x.dtype) / number, y if y.ndim > 1 else jnp.where(counts, y, 0)

    def ell(x: Array, y: Array) -> Array:
        share, y = counted(x, y)
        values = jax.vmap(loss.ell)(x, y)
        return jnp.sum(jnp.where(share == 0, 0, share * values))

    def dl_dx(x: Array, y: Array) -> Array:
        share, y = counted(x, y)
        return jnp.where(share[:, None] == 0, 0, share[:, None] * jax.vmap(loss.dl_dx)(x, y))

    name = f"{reduction} of {loss.name} over positions"
    return Loss(name, ell, dl_dx, loss.target, positions=True, padding=padding)


def get(loss: str | Loss) -> Loss:
    """The loss of that name; a Loss is returned as it is.

    Raises:
      ValueError: no loss has that name; the nearest one is given.

    Example:
      >>> get("huber").ell(jnp.float32([3.0]), jnp.float32([0.0]))
      Array(2.5, dtype=float32)
    """
    return loss if isinstance(loss, Loss) else lookup("loss", loss, LOSSES)
