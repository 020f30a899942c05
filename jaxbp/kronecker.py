"""Kronecker-factored curvature: every layer's block of the Gauss-Newton or Fisher matrix as B ⊗ A.

x̃ = (x⁽ˡ⁻¹⁾, 1) is a layer's input with the 1 of the bias, and [w|b] its parameters as a matrix (out, in + 1).
A = Σₙ pₙ x̃ₙx̃ₙᵀ with pₙ = weightsₙ / Σ weights, and B is a mean of outer products of δ with weightsₙ / N: B ⊗ A scales
as the matrices of `jaxbp.curvature`, 1/N once. Arguments and errors are those there.

Sources: J. Martens and R. Grosse, *Optimizing neural networks with Kronecker-factored approximate curvature*, 2015, §3
and §6.3 (damping); A. Botev et al., *Practical Gauss-Newton optimisation for deep learning*, 2017 (exact, "KFLR", and
KFRA); T. George et al., *Fast approximate natural gradient descent in a Kronecker-factored eigenbasis*, 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp.curvature import Share, checked, checked_kind, root_factors
from jaxbp.mlp import MLP, Affine, Array, Factors, Params, forward, weighted, wide
from jaxbp.network import factors as batch_factors
from jaxbp.network import mean_weights


class Eigen(NamedTuple):
    """A layer's block as Q diag(values) Qᵀ, Q = Q_B ⊗ Q_A; values are (out, in + 1), like [w|b]."""

    q_a: Array
    q_b: Array
    values: Array

    def matvec(self, v: Affine) -> Affine:
        """The block times v."""
        return self._scaled(v, self.values)

    def solve(self, v: Affine, damping: ArrayLike) -> Affine:
        """(block + damping · I)⁻¹ v."""
        return self._scaled(v, 1 / (self.values + jnp.asarray(damping, self.values.dtype)))

    def _scaled(self, v: Affine, by: Array) -> Affine:
        return _apart(self.q_b @ (by * (self.q_b.T @ _joined(v) @ self.q_a)) @ self.q_a.T)


class Kronecker(NamedTuple):
    """A layer's block B ⊗ A: a is A, (in + 1, in + 1), b is B, (out, out).

    Example:
      >>> block = Kronecker(a=jnp.diag(jnp.array([2.0, 1.0])), b=jnp.array([[3.0]]))
      >>> v = Affine(w=jnp.ones((1, 1)), b=jnp.ones(1))
      >>> block.matvec(v).w.tolist()
      [[6.0]]
      >>> block.solve(v, damping=2.0, kind="exact").w.tolist()
      [[0.125]]
    """

    a: Array
    b: Array

    def matvec(self, v: Affine) -> Affine:
        """The block times v: B [V|v_b] A."""
        return _apart(self.b @ _joined(v) @ self.a)

    def solve(self, v: Affine, damping: ArrayLike, kind: str = "heuristic") -> Affine:
        """(block + damping · I)⁻¹ v, v like the layer's parameters; each layer may have its own damping λ > 0.

        Args:
          kind: exact, by `eigh`; heuristic, (B + √λ/π I)⁻¹ [V|v_b] (A + π√λ I)⁻¹, π² the mean eigenvalue of A over B's.
        """
        if kind not in ("heuristic", "exact"):
            raise ValueError(f"kind is {kind!r}, allowed: heuristic, exact")
        if kind == "exact":
            return self.eigh().solve(v, damping)
        return self.inverse(damping).matvec(v)

    def inverse(self, damping: ArrayLike) -> "Kronecker":
        """The inverse of the heuristic damping, (A + π√λ I)⁻¹ and (B + √λ/π I)⁻¹, for many v."""
        mean_a, mean_b = (jnp.maximum(jnp.trace(m) / len(m), jnp.finfo(m.dtype).tiny) for m in self)
        root, pi = jnp.sqrt(jnp.asarray(damping, mean_a.dtype)), jnp.sqrt(mean_a / mean_b)
        damped = (m + by * jnp.eye(len(m), dtype=m.dtype) for m, by in zip(self, (root * pi, root / pi), strict=True))
        return Kronecker(*map(jnp.linalg.inv, damped))

    def eigh(self) -> Eigen:
        """Its eigenvectors, and its eigenvalues λᴮᵢ λᴬⱼ."""
        (values_a, q_a), (values_b, q_b) = jnp.linalg.eigh(self.a), jnp.linalg.eigh(self.b)
        return Eigen(q_a, q_b, values_b[:, None] * values_a[None, :])


def kfac(
    net: MLP,
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    kind: str = "exact",
    key: Array | None = None,
    weights: Share = None,
    normalize_by: Share = None,
) -> tuple[Kronecker, ...]:
    """Each layer's block of the Gauss-Newton or the empirical Fisher matrix, as if x̃ and δ were independent.

    Args:
      kind: what B is the mean of: exact, Σ_c Δ̂_c Δ̂_cᵀ, the columns of a root of H_ℓ ("type 2"); mc, one random
        combination of them, in about a gradient; empirical, δδᵀ at the targets; kfra, a recursion of means,
        B⁽ˡ⁾ = (wᵀB⁽ˡ⁺¹⁾w) ⊙ Σₙ pₙ σ′σ′ᵀ.
      key: for mc, a key of `jax.random.key`.

    Returns:
      L of `Kronecker`, in float32 at least. exact equals the block for one sample, and in deep linear networks under
      the squared error.

    Example:
      >>> net, one = MLP((1, 1), loss="squared_error"), (Affine(jnp.ones((1, 1)), jnp.zeros(1)),)
      >>> block = jax.jit(kfac, static_argnums=0)(net, one, jnp.array([[3.0]]), jnp.ones((1, 1)))[0]
      >>> block.a.tolist(), block.b.tolist()
      ([[9.0, 3.0], [3.0, 1.0]], [[1.0]])
    """
    x, y = checked(net, params, x, y)
    f, p, scale = _columns(net, params, x, y, kind, key, weights, normalize_by)
    b = [_moment(delta, scale) for delta in f.delta]
    if kind == "kfra":
        b = _kfra(net, params, weighted((p != 0).astype(x.dtype), x), b[-1], p)
    return tuple(Kronecker(_moment(inputs[:, None], p), b) for inputs, b in zip(map(with_one, f.x), b, strict=True))


def ekfac(
    net: MLP,
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    kind: str = "exact",
    key: Array | None = None,
    weights: Share = None,
    normalize_by: Share = None,
) -> tuple[Eigen, ...]:
    """`kfac` in its eigenvectors with the best eigenvalues, Σₙ weightsₙ (Σ_c (Δ̂_c Q_B)²)ᵀ (x̃ₙ Q_A)² / N.

    ‖block − EKFAC‖_F ≤ ‖block − KFAC‖_F, always. Arguments as for `kfac`, kfra aside.

    Returns:
      L of `Eigen`, in float32 at least.

    Example:
      >>> one = (Affine(jnp.ones((1, 1)), jnp.zeros(1)),)
      >>> block = ekfac(MLP((1, 1), loss="squared_error"), one, jnp.ones((1, 1)), jnp.ones((1, 1)))[0]
      >>> block.values.round(3).tolist()  # of [[1, 1], [1, 1]]
      [[0.0, 2.0]]
    """
    if kind == "kfra":
        raise ValueError("kind is 'kfra', allowed: exact, mc, empirical")
    f, p, scale = _columns(net, params, *checked(net, params, x, y), kind, key, weights, normalize_by)

    def layer(inputs: Array, delta: Array) -> Eigen:
        q_a, q_b, _ = Kronecker(_moment(inputs[:, None], p), _moment(delta, scale)).eigh()
        squares = jnp.sum((delta.astype(q_b.dtype) @ q_b) ** 2, axis=1)
        return Eigen(q_a, q_b, weighted(scale, squares).T @ (inputs @ q_a) ** 2)

    return tuple(map(layer, map(with_one, f.x), f.delta))


def _columns(
    net: MLP, params: Params, x: Array, y: Array, kind: str, key: Array | None, weights: Share, normalize_by: Share
) -> tuple[Factors, Array, Array]:
    """The factors whose outer products B averages, x (N, in) and δ (N, R, out); weightsₙ / Σ weights; weightsₙ / N."""
    key = checked_kind(kind, key, ("exact", "mc", "empirical", "kfra"))
    ones = mean_weights(weights, len(x), 1, wide(x.dtype))
    x = x if weights is None else weighted((ones != 0).astype(x.dtype), x)
    if kind == "empirical":
        f = batch_factors(net, params, x, y)[1]
        f = Factors(f.x, tuple(delta[:, None] for delta in f.delta))
    else:
        f = root_factors(net, params, x, y, key)
    return (
        f,
        mean_weights(ones, len(x), jnp.sum(ones), ones.dtype),
        mean_weights(ones, len(x), normalize_by, ones.dtype),
    )


def _kfra(net: MLP, params: Params, x: Array, last: Array, p: Array) -> list[Array]:
    """B⁽¹⁾ … B⁽ᴸ⁾ from B⁽ᴸ⁾."""
    tape, found = jax.vmap(lambda x: forward(net, params, x))(x), [last]
    for (w, _), sigma, s, x in reversed(list(zip(params[1:], net.activations, tape.s, tape.x[1:], strict=False))):
        w = w.astype(last.dtype)
        found.append((w.T @ found[-1] @ w) * _moment(sigma.dsigma(s, x)[:, None], p))
    return found[::-1]


def with_one(x: Array) -> Array:
    """x̃ = (x, 1) of every sample, (N, in + 1), in float32 at least."""
    x = x.astype(wide(x.dtype))
    return jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1)


def _moment(rows: Array, scale: Array) -> Array:
    """Σₙ scaleₙ Σ_c rₙ_c rₙ_cᵀ of (N, R, width), in float32 at least."""
    rows = weighted(jnp.sqrt(scale), rows.astype(scale.dtype)).reshape(-1, rows.shape[-1])
    return rows.T @ rows


def _joined(v: Affine) -> Array:
    """[w|b], (out, in + 1), in float32 at least."""
    return jnp.concatenate([v.w, v.b[:, None]], axis=1).astype(wide(v.w.dtype))


def _apart(matrix: Array) -> Affine:
    return Affine(matrix[:, :-1], matrix[:, -1])
