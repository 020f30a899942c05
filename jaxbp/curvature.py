"""Curvature of an MLP by hand: Hessian, Gauss-Newton and Fisher products, their diagonals, Jacobians.

`backward` is linear in ∂ℓ/∂x⁽ᴸ⁾, so other vectors in that place give Jacobians (unit vectors) and the Gauss-Newton
matrix (columns of a root S of H_ℓ = ∂²ℓ/∂x⁽ᴸ⁾²). The Hessian needs a second pair of passes: `r_forward` and
`r_backward` differentiate each line of `forward` and `backward` along v = (V, v_b), a direction like the parameters.
R· is that derivative, g⁽ˡ⁾ = ∂ℓ/∂x⁽ˡ⁾, δ = g ⊙ σ′(s). There is no autodiff.

Everywhere x and y are inputs (N, n₀) and targets as for `jaxbp.factors`. What is a matrix over the parameters belongs
to the mean loss Σₙ weightsₙ ℓₙ / N, with weights and normalize_by as for `jaxbp.gradient`. A sample of weight 0 does
not count, not even as NaN. Numbers of single samples belong to ℓₙ, have no 1/N and come in float32 at least. Products
come in the dtype of the parameters. Unlike in `jaxbp.persample` nothing is rescaled on the way. At a kink σ″ and H_ℓ
are limits from the left, so a relu network is taken as piecewise linear.

Raised are ValueError for a wrong shape, an unknown kind, an activation without σ″ or a loss without H_ℓ or S where they
are needed, and TypeError for a `jaxbp.Network`.

Sources: B. Pearlmutter, *Fast exact multiplication by the Hessian*, 1994, §3 (the passes); N. Schraudolph, *Fast
curvature matrix-vector products for second-order gradient descent*, 2002, §4 (Gauss-Newton); F. Dangel et al.,
*BackPACK: packing more into backprop*, 2020, §2.3 and appendix A.3 (the diagonals).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp import factor, losses, persample
from jaxbp.activations import no_curvature
from jaxbp.mlp import MLP, Affine, Array, Factors, Params, Tape, backward, forward, outer_sums, weighted, wide
from jaxbp.network import checked_batch, mean_weights, totals
from jaxbp.network import factors as batch_factors
from jaxbp.shapes import check_params, check_shape

Share = ArrayLike | None


# The second pair of passes ------------------------------------------------------------------------------------------


def r_forward(net: MLP, params: Params, tape: Tape, v: Params) -> Tape:
    """The forward pass differentiated along v, one sample: Rs⁽ˡ⁾ = V x⁽ˡ⁻¹⁾ + v_b + w Rx⁽ˡ⁻¹⁾, Rx⁽ˡ⁾ = σ′ ⊙ Rs⁽ˡ⁾.

    Returns:
      A `Tape` of Rx⁽⁰⁾ … Rx⁽ᴸ⁾ and Rs⁽¹⁾ … Rs⁽ᴸ⁾; Rx⁽ᴸ⁾ is the Jacobian of the outputs times v.

    Example:
      >>> one = (Affine(jnp.ones((1, 1)), jnp.ones(1)),)
      >>> r_forward(MLP((1, 1)), one, forward(MLP((1, 1)), one, jnp.array([3.0])), v=one).x[-1].tolist()  # x + 1
      [4.0]
    """
    v = _direction(net, params, v)
    # fmt: off
    rss: list[Array] = []
    rxs = [jnp.zeros_like(tape.x[0])]                                   # Rx⁽⁰⁾ = 0
    layers = zip(params, v, net.activations, tape.x, tape.s, tape.x[1:], strict=False)
    for (w, _), (v_w, v_b), sigma, x_before, s, x in layers:
        rs = v_w @ x_before + v_b                                       # Rs⁽ˡ⁾ = V x⁽ˡ⁻¹⁾ + v_b + w Rx⁽ˡ⁻¹⁾
        rs = rs + w @ rxs[-1] if rss else rs
        rss.append(rs)
        rxs.append(sigma.dsigma(s, x) * rs)                             # Rx⁽ˡ⁾ = σ′(s⁽ˡ⁾) ⊙ Rs⁽ˡ⁾
    return Tape(tuple(rxs), tuple(rss))
    # fmt: on


def r_backward(
    net: MLP, params: Params, tape: Tape, dl_dx: tuple[Array, ...], v: Params, rtape: Tape, rdl_dx: ArrayLike
) -> tuple[Array, ...]:
    """The backward pass differentiated along v, one sample: Rδ = Rg ⊙ σ′ + g ⊙ σ″ ⊙ Rs, Rg⁽ˡ⁻¹⁾ = Vᵀδ + wᵀRδ.

    The Hessian times v follows: Rδ⁽ˡ⁾ (x⁽ˡ⁻¹⁾)ᵀ + δ⁽ˡ⁾ (Rx⁽ˡ⁻¹⁾)ᵀ for w⁽ˡ⁾, Rδ⁽ˡ⁾ for b⁽ˡ⁾.

    Args:
      dl_dx: ∂ℓ/∂x⁽¹⁾ … ∂ℓ/∂x⁽ᴸ⁾, as `backward_x` returns them.
      rtape: what `r_forward` returned for v.
      rdl_dx: Rg⁽ᴸ⁾ = H_ℓ Rx⁽ᴸ⁾, (n_L,).

    Returns:
      Rδ⁽¹⁾ … Rδ⁽ᴸ⁾, first layer first.

    Example:
      >>> net, one = MLP((1, 1), loss="squared_error"), (Affine(jnp.ones((1, 1)), jnp.ones(1)),)
      >>> tape = forward(net, one, jnp.array([3.0]))
      >>> dl_dx, rtape = backward_x(net, one, tape, tape.x[-1]), r_forward(net, one, tape, v=one)
      >>> r_backward(net, one, tape, dl_dx, one, rtape, rdl_dx=rtape.x[-1])[0].tolist()
      [4.0]
    """
    v, rdl_dx = _direction(net, params, v), jnp.asarray(rdl_dx, params[0].w.dtype)
    check_shape("rdl_dx", rdl_dx.shape, net.sizes[-1:])
    # fmt: off
    # Vᵀ δ stands as δ @ V: under vmap XLA's CPU compiler makes v_w.T @ δ + w.T @ Rδ twice as slow.
    rdeltas = []
    layers = zip(params, v, net.activations, tape.s, tape.x[1:], rtape.s, dl_dx, strict=True)
    for (w, _), (v_w, _), sigma, s, x, rs, g in reversed(list(layers)):
        dsigma = sigma.dsigma(s, x)
        rdl_ds = rdl_dx * dsigma                                        # Rδ⁽ˡ⁾ = Rg⁽ˡ⁾ ⊙ σ′
        if sigma.d2sigma is not no_curvature:                           # else g⁽¹⁾, a product, is not needed
            rdl_ds = rdl_ds + g * _second(sigma)(s, x) * rs             #         + g⁽ˡ⁾ ⊙ σ″ ⊙ Rs⁽ˡ⁾
        rdl_dx = (g * dsigma) @ v_w + rdl_ds @ w                        # Rg⁽ˡ⁻¹⁾ = Vᵀ δ⁽ˡ⁾ + (w⁽ˡ⁾)ᵀ Rδ⁽ˡ⁾
        rdeltas.append(rdl_ds)
    return tuple(reversed(rdeltas))
    # fmt: on


def backward_x(net: MLP, params: Params, tape: Tape, dl_dx: ArrayLike) -> tuple[Array, ...]:
    """∂ℓ/∂x⁽¹⁾ … ∂ℓ/∂x⁽ᴸ⁾ of one sample, from the arguments of `backward`: ∂ℓ/∂x⁽ˡ⁻¹⁾ = (w⁽ˡ⁾)ᵀ δ⁽ˡ⁾."""
    deltas = backward(net, params, tape, dl_dx)  # a compiler sees that the products below are those in here
    inner = tuple(w.T @ delta for (w, _), delta in zip(params[1:], deltas[1:], strict=True))
    return *inner, jnp.asarray(dl_dx, params[0].w.dtype)


# Products -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linearized:
    """The Hessian or Gauss-Newton matrix A of the mean loss at one point: ``operator(v)`` is A v. See `linearized`.

    It is a pytree of arrays, so that it goes through jit and loops.
    """

    net: MLP = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    params: Params
    tape: Tape
    dl_dx: tuple[Array, ...]
    delta: tuple[Array, ...]
    y: Array
    scale: Array

    def __call__(self, v: Params) -> Params:
        """A v: Σₙ weightsₙ (Rδ xᵀ + δ Rxᵀ) / N for each w, Σₙ weightsₙ Rδ / N for each b; δ Rxᵀ is the Hessian's."""
        rx, rdelta = self._passes(v)
        scaled = [weighted(self.scale, rd) for rd in rdelta]
        if self.kind == "ggn":
            return outer_sums(Factors(self.tape.x[:-1], tuple(scaled)))
        # As one product over 2N rows, (x, Rx)ᵀ and (Rδ, δ): XLA's two products and their sum take longer.
        xs = [self.tape.x[0], *(jnp.concatenate(pair) for pair in zip(self.tape.x[1:-1], rx[1:], strict=True))]
        deltas = [weighted(self.scale, d) for d in self.delta]
        rows = [scaled[0], *(jnp.concatenate(pair) for pair in zip(scaled[1:], deltas[1:], strict=True))]
        product = outer_sums(Factors(tuple(xs), tuple(rows)))
        return tuple(Affine(w, jnp.sum(rd, axis=0)) for (w, _), rd in zip(product, scaled, strict=True))

    def quadratic(self, v: Params) -> Array:
        """vᵀAₙv of every sample, see the function `quadratic`."""
        net, v = self.net, _direction(self.net, self.params, v)
        # fmt: off

        def sample(tape: Tape, dl_dx: tuple[Array, ...], delta: tuple[Array, ...], y: Array) -> Array:
            rtape = r_forward(net, self.params, tape, v)
            rx = _wide(rtape.x[-1])
            terms = [rx * _output_hvp(net, tape, y, rx)]                # (Rx⁽ᴸ⁾)ᵀ H_ℓ Rx⁽ᴸ⁾
            for sigma, s, x, rs, g in zip(net.activations, tape.s, tape.x[1:], rtape.s, dl_dx, strict=False):
                terms.append(g * _second(sigma)(s, x) * rs * rs)        # (g ⊙ σ″) · Rs²
            for (v_w, _), r, d in zip(v[1:], rtape.x[1:], delta[1:], strict=False):
                terms.append(2 * d * (v_w @ r))                         # 2 δ · V Rx⁽ˡ⁻¹⁾
            return _total([jnp.sum(term, dtype=wide(term.dtype)) for term in terms])

        # fmt: on
        values: Array = jax.vmap(sample)(self.tape, self.dl_dx, self.delta, self.y)
        return values

    def squared_norms(self, v: Params) -> Array:
        """‖Aₙv‖² of every sample, see `hvp_squared_norms`."""
        rx, rdelta = self._passes(v)
        # fmt: off
        terms = [_dots(rd, rd) * (1 + _dots(x, x)) for rd, x in zip(rdelta, self.tape.x, strict=False)]
        for rd, d, x, r in zip(rdelta[1:], self.delta[1:], self.tape.x[1:], rx[1:], strict=False):
            terms.append(2 * _dots(rd, d) * _dots(x, r)                 # 2 (Rδ · δ) (x · Rx)
                         + _dots(d, d) * _dots(r, r))                   # + ‖δ‖² ‖Rx‖²
        # fmt: on
        return _total(terms)

    def _passes(self, v: Params) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Rx⁽⁰⁾ … Rx⁽ᴸ⁻¹⁾ and Rδ⁽¹⁾ … Rδ⁽ᴸ⁾ of every sample; of Gauss-Newton Rδ is `backward` of H_ℓ Rx⁽ᴸ⁾."""

        def sample(tape: Tape, dl_dx: tuple[Array, ...], y: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            rtape = r_forward(self.net, self.params, tape, v)
            rdl_dx = _output_hvp(self.net, tape, y, rtape.x[-1])
            if self.kind == "ggn":
                return rtape.x[:-1], backward(self.net, self.params, tape, rdl_dx)
            return rtape.x[:-1], r_backward(self.net, self.params, tape, dl_dx, v, rtape, rdl_dx)

        return jax.vmap(sample)(self.tape, self.dl_dx, self.y)


def linearized(
    net: MLP,
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    kind: str = "hessian",
    weights: Share = None,
    normalize_by: Share = None,
) -> Linearized:
    """The Hessian or Gauss-Newton matrix of the mean loss as a function of v: what does not depend on v is kept.

    Args:
      kind: hessian, Σₙ weightsₙ ∂²ℓₙ/∂(w, b)² / N, or ggn, Σₙ weightsₙ JₙᵀH_ℓJₙ / N, Jₙ the Jacobian of the outputs.

    Returns:
      `Linearized`: ``operator(v)``, ``operator.quadratic(v)`` and ``operator.squared_norms(v)``.

    Example:
      >>> one = (Affine(jnp.ones((1, 1)), jnp.zeros(1)),)
      >>> operator = linearized(MLP((1, 1), loss="squared_error"), one, jnp.full((1, 1), 3.0), jnp.zeros((1, 1)))
      >>> operator(operator(one))[0].w.tolist()
      [[90.0]]
    """
    if kind not in ("hessian", "ggn"):
        raise ValueError(f"kind is {kind!r}, allowed: hessian, ggn")
    x, y = checked(net, params, x, y)
    scale = mean_weights(weights, len(x), normalize_by, wide(x.dtype))
    if weights is not None:
        x = weighted((scale != 0).astype(x.dtype), x)

    def sample(x: Array, y: Array) -> tuple[Tape, tuple[Array, ...], tuple[Array, ...]]:
        tape = forward(net, params, x)
        if kind == "ggn":
            return tape, (), ()
        dl_dx = losses.get(net.loss).dl_dx(_wide(tape.x[-1]), y)
        return tape, backward_x(net, params, tape, dl_dx), backward(net, params, tape, dl_dx)

    return Linearized(net, kind, params, *jax.vmap(sample)(x, y), y, scale)


def hvp(
    net: MLP, params: Params, x: ArrayLike, y: ArrayLike, v: Params, weights: Share = None, normalize_by: Share = None
) -> Params:
    """The Hessian of the mean loss times v, in about two gradients; for many v there is `linearized`.

    Returns:
      L of `Affine`, in the dtype of the parameters.

    Example:
      >>> one = (Affine(jnp.ones((1, 1)), jnp.zeros(1)),)  # ½ (w x + b − y)²
      >>> hvp(MLP((1, 1), loss="squared_error"), one, jnp.full((1, 1), 3.0), jnp.zeros((1, 1)), one)[0].w.tolist()  # x²
      [[9.0]]
    """
    return linearized(net, params, x, y, "hessian", weights, normalize_by)(v)


def ggn_vp(
    net: MLP, params: Params, x: ArrayLike, y: ArrayLike, v: Params, weights: Share = None, normalize_by: Share = None
) -> Params:
    """The Gauss-Newton matrix of the mean loss times v, as `hvp`; no σ″. For softmax it is the Fisher matrix."""
    return linearized(net, params, x, y, "ggn", weights, normalize_by)(v)


def fisher_vp(
    net: MLP, params: Params, x: ArrayLike, y: ArrayLike, v: Params, weights: Share = None, normalize_by: Share = None
) -> Params:
    """The empirical Fisher matrix times v, Σₙ weightsₙ gₙ ⟨gₙ, v⟩ / N, as `hvp`; gₙ is taken at the given targets."""
    x, y = checked(net, params, x, y)
    scale = mean_weights(weights, len(x), normalize_by, wide(x.dtype))
    f = factor.where(scale != 0, batch_factors(net, params, x, y)[1])
    product: Params = totals(factor.times(f, scale * persample.dot(f, v)))
    return product


def quadratic(net: MLP, params: Params, x: ArrayLike, y: ArrayLike, v: Params, kind: str = "hessian") -> Array:
    """vᵀHₙv or vᵀGₙv of every sample, (N,), by forward passes alone: no product is formed.

    vᵀHₙv = Σ_l [2 δ · V Rx⁽ˡ⁻¹⁾ + (g ⊙ σ″) · Rs²] + (Rx⁽ᴸ⁾)ᵀ H_ℓ Rx⁽ᴸ⁾; vᵀGₙv is the last term.

    Example:
      >>> one = (Affine(jnp.ones((1, 1)), jnp.zeros(1)),)
      >>> quadratic(MLP((1, 1), loss="squared_error"), one, jnp.array([[3.0], [2.0]]), jnp.zeros((2, 1)), one).tolist()
      [9.0, 4.0]
    """
    return linearized(net, params, x, y, kind).quadratic(v)


def hvp_squared_norms(net: MLP, params: Params, x: ArrayLike, y: ArrayLike, v: Params) -> Array:
    """‖Hₙv‖² of every sample, (N,). Hₙv has rank two in each layer, so that it is not formed.

    ‖Hₙv‖² = Σ_l ‖Rδ‖² (1 + ‖x‖²) + 2 (Rδ · δ) (x · Rx) + ‖δ‖² ‖Rx‖².
    """
    return linearized(net, params, x, y).squared_norms(v)


# Jacobians and diagonals --------------------------------------------------------------------------------------------


def output_factors(net: MLP, params: Params, x: ArrayLike, cotangents: ArrayLike) -> Factors:
    """The factors of functions of the outputs: `backward` from each cotangent in the place of ∂ℓ/∂x⁽ᴸ⁾.

    Unit vectors, ``jnp.eye(C)``, give the Jacobian: ∂x⁽ᴸ⁾_c/∂w⁽ˡ⁾ = Δ_c (x⁽ˡ⁻¹⁾)ᵀ.

    Args:
      cotangents: (R, C), the same for all samples, or (N, R, C).

    Returns:
      `Factors` with an axis for the cotangents: x (N, in), δ (N, R, out).

    Example:
      >>> one = (Affine(jnp.ones((2, 1)), jnp.zeros(2)),)
      >>> output_factors(MLP((1, 2)), one, jnp.ones((5, 1)), jnp.eye(2)).delta[0].shape
      (5, 2, 2)
    """
    x = checked_inputs(net, params, x)
    cotangents = jnp.asarray(cotangents, x.dtype)
    check_shape("cotangents", cotangents.shape, ("R", net.sizes[-1]), (len(x), "R", net.sizes[-1]))

    def sample(x: Array, cotangents: Array) -> Factors:
        tape = forward(net, params, x)
        return Factors(tape.x[:-1], jax.vmap(lambda dl_dx: backward(net, params, tape, dl_dx))(cotangents))

    return jax.vmap(sample, in_axes=(0, None if cotangents.ndim == 2 else 0))(x, cotangents)


def jacobian_vp(net: MLP, params: Params, x: ArrayLike, v: Params) -> Array:
    """The Jacobian of the outputs times v, Rx⁽ᴸ⁾ of every sample, (N, n_L): see `r_forward`."""
    x = checked_inputs(net, params, x)
    product: Array = jax.vmap(lambda x: r_forward(net, params, forward(net, params, x), v).x[-1])(x)
    return product


def root_factors(net: MLP, params: Params, x: ArrayLike, y: ArrayLike, key: Array | None = None) -> Factors:
    """The factors of the columns of S, H_ℓ = S Sᵀ, whose gradients' squares add up to the Gauss-Newton matrix.

    With a key, of one combination S ε of them, ε = ±1, whose square has Gauss-Newton as its mean. So has the gradient
    at a label that is drawn from the model, if the loss has one; S ε serves for every loss.

    Returns:
      `Factors` with an axis for the columns: x (N, in), δ (N, R, out), which belong to ℓₙ.
    """
    x, y = checked(net, params, x, y)
    loss = losses.get(net.loss)
    if loss.root is None:
        raise ValueError(f"loss {loss.name!r} has no root of ∂²ℓ/∂x²: it is the field root of Loss")
    root = loss.root
    columns = jax.vmap(lambda x, y: root(_wide(forward(net, params, x).x[-1]), y).T)(x, y)
    if key is not None:
        signs = jax.random.rademacher(key, columns.shape[:2], columns.dtype)
        columns = jnp.einsum("nr,nrc->nc", signs, columns)[:, None]
    return output_factors(net, params, x, columns)


def diag_ggn(
    net: MLP,
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    kind: str = "exact",
    key: Array | None = None,
    weights: Share = None,
    normalize_by: Share = None,
) -> Params:
    """The diagonal of the Gauss-Newton matrix, Σₙ weightsₙ (Σ_c Δ̂_c²) xₙ² / N, for biases without x².

    Args:
      kind: exact, with all columns of `root_factors`; or mc, an unbiased estimate from one, in about a gradient.
      key: for mc, a key of `jax.random.key`.

    Returns:
      L of `Affine`, in float32 at least.

    Example:
      >>> one = (Affine(jnp.ones((1, 1)), jnp.ones(1)),)
      >>> diag_ggn(MLP((1, 1), loss="squared_error"), one, jnp.array([[3.0]]), jnp.zeros((1, 1)))[0].w.tolist()
      [[9.0]]
    """
    f = root_factors(net, params, x, y, checked_kind(kind, key, ("exact", "mc")))
    return _squares(f.x, [jnp.sum(_wide(delta) ** 2, axis=1) for delta in f.delta], weights, normalize_by)


def diag_hessian(
    net: MLP, params: Params, x: ArrayLike, y: ArrayLike, weights: Share = None, normalize_by: Share = None
) -> Params:
    """The exact diagonal of the Hessian, Σₙ weightsₙ diag(H_s) xₙ² / N, like `diag_ggn`.

    H_s = σ′ (∂²ℓ/∂x²) σ′ + diag(g ⊙ σ″), and ∂²ℓ/∂x⁽ˡ⁻¹⁾² = wᵀ H_s⁽ˡ⁾ w goes from layer to layer as a matrix: (width)³
    operations, one sample after the other.
    """
    return _squares(*_hessian_diagonals(net, params, x, y), weights, normalize_by)


def hessian_trace(net: MLP, params: Params, x: ArrayLike, y: ArrayLike) -> tuple[Array, ...]:
    """The exact traces of every sample's Hessian, tr H_s (1 + ‖x‖²): L of (N,), for the price of `diag_hessian`."""
    xs, diagonals = _hessian_diagonals(net, params, x, y)
    return tuple(jnp.sum(d, axis=1) * (1 + _dots(x, x)) for x, d in zip(xs, diagonals, strict=True))


def _hessian_diagonals(net: MLP, params: Params, x: ArrayLike, y: ArrayLike) -> tuple[tuple[Array, ...], list[Array]]:
    """x⁽ˡ⁻¹⁾ (N, in) and the diagonals of H_s⁽ˡ⁾ (N, out), first layer first."""
    at = linearized(net, params, x, y)

    def sample(each: tuple[Tape, tuple[Array, ...], Array]) -> list[Array]:
        tape, dl_dx, y = each
        units = jnp.eye(net.sizes[-1], dtype=wide(tape.x[-1].dtype))
        h, diagonals = jax.vmap(lambda unit: _output_hvp(net, tape, y, unit))(units), []  # ∂²ℓ/∂x⁽ᴸ⁾²
        layers = zip(params, net.activations, tape.s, tape.x[1:], dl_dx, strict=True)
        for (w, _), sigma, s, x, g in reversed(list(layers)):
            dsigma, w = _wide(sigma.dsigma(s, x)), _wide(jnp.asarray(w))
            h = dsigma[:, None] * h * dsigma[None, :] + jnp.diag(_wide(g * _second(sigma)(s, x)))  # H_s
            diagonals.append(jnp.diag(h))
            h = w.T @ h @ w  # ∂²ℓ/∂x⁽ˡ⁻¹⁾²
        return diagonals[::-1]

    return at.tape.x[:-1], jax.lax.map(sample, (at.tape, at.dl_dx, at.y))


# Shared -------------------------------------------------------------------------------------------------------------


def checked(net: MLP, params: Params, x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """x and y as arrays, for an MLP alone."""
    _check_mlp(net)
    return checked_batch(net, params, x, y)


def checked_inputs(net: MLP, params: Params, x: ArrayLike) -> Array:
    """x (N, n₀) in the dtype of the parameters, for an MLP alone."""
    _check_mlp(net)
    check_params(net.sizes, params)
    x = jnp.asarray(x, params[0].w.dtype)
    check_shape("x", x.shape, ("N", net.sizes[0]))
    return x


def checked_kind(kind: str, key: Array | None, allowed: tuple[str, ...]) -> Array | None:
    """The key for mc, None for the other kinds."""
    if kind not in allowed or (kind == "mc") != (key is not None):
        given = f"kind is {kind!r} {'without' if key is None else 'with'} a key"
        raise ValueError(f"{given}, allowed: {', '.join(allowed)}; mc, and mc alone, takes a key")
    return key


def _check_mlp(net: Any) -> None:
    if not isinstance(net, MLP):
        given = type(net).__name__
        raise TypeError(f"net is a {given}: curvature needs the second pair of passes, which only an MLP has")


def _direction(net: MLP, params: Params, v: Params) -> Params:
    """v in the dtype of the parameters, both checked."""
    check_params(net.sizes, params)
    check_params(net.sizes, v)
    return tuple(Affine(*(a.astype(params[0].w.dtype) for a in layer)) for layer in v)


def _second(sigma: Any) -> Any:
    """σ″."""
    if sigma.d2sigma is None:
        raise ValueError(f"activation {sigma.name!r} has no σ″: it is the field d2sigma of Activation")
    return sigma.d2sigma


def _output_hvp(net: MLP, tape: Tape, y: Array, v: Array) -> Array:
    """H_ℓ v at the output of the tape, in the dtype of v, computed in float32 at least."""
    loss = losses.get(net.loss)
    if loss.hvp is None:
        raise ValueError(f"loss {loss.name!r} has no ∂²ℓ/∂x²: it is the field hvp of Loss")
    return loss.hvp(_wide(tape.x[-1]), y, _wide(v)).astype(v.dtype)


def _wide(a: Array) -> Array:
    return a.astype(wide(a.dtype))


def _dots(a: Array, b: Array) -> Array:
    """The product of each sample's rows, (N,), in float32 at least."""
    return jnp.sum(_wide(a) * _wide(b), axis=1)


def _total(terms: list[Array]) -> Array:
    return sum(terms[1:], terms[0])


def _squares(xs: tuple[Array, ...], diagonals: list[Array], weights: Share, normalize_by: Share) -> Params:
    """Σₙ scaleₙ dₙ (xₙ²)ᵀ for each w, Σₙ scaleₙ dₙ for each b, d (N, out)."""
    scale = mean_weights(weights, len(xs[0]), normalize_by, wide(xs[0].dtype))
    squares = tuple(jnp.where(scale[:, None] == 0, 0, _wide(x) ** 2) for x in xs)
    return outer_sums(Factors(squares, tuple(weighted(scale, d) for d in diagonals)))
