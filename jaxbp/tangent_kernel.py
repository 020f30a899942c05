"""The empirical neural tangent kernel of an MLP, from the factors of its outputs, without a Jacobian.

Source: A. Jacot et al., *Neural tangent kernel*, 2018, §4; R. Novak et al., *Fast finite width neural tangent kernel*,
2022 (what a Jacobian would cost).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp.curvature import checked_inputs, output_factors
from jaxbp.mlp import MLP, Array, Factors, Params, wide

INPUTS: dict[str, Callable[[Array, Array], Array]] = {
    "all": lambda x, other: 1 + x @ other,
    "weights": lambda x, other: x @ other,
    "biases": lambda x, other: jnp.ones((), x.dtype),
}
OUTPUTS: dict[str, Callable[[Array, Array], Array]] = {
    "full": lambda delta, other: delta @ other.T,  # Δ_c · Δ_c′
    "trace": lambda delta, other: jnp.vdot(delta, other),
    "pseudo": lambda delta, other: jnp.vdot(delta, other),
}


def ntk(
    net: MLP,
    params: Params,
    x: ArrayLike,
    other: ArrayLike | None = None,
    kind: str = "full",
    per_layer: bool = False,
    parts: str = "all",
    chunk_size: int | None = None,
) -> Array | tuple[Array, ...]:
    """Θ_nmcc′ = ⟨∂f_c(xₙ)/∂(w, b), ∂f_c′(xₘ)/∂(w, b)⟩ = Σ_l (Δ_c · Δ_c′)ₙₘ (1 + x · x′)ₙₘ, of the outputs f = x⁽ᴸ⁾.

    Args:
      net, params: the network and its parameters.
      x: inputs, (N, n₀).
      other: inputs of the columns, (M, n₀), by default those of the rows.
      kind: full; trace, Σ_c Θ_nmcc, which is not divided by C; pseudo, the kernel of Σ_c f_c, which is Σ_cc′ Θ_nmcc′.
      per_layer: a tuple of one kernel a layer instead of their sum.
      parts: of which parameters: all, weights (x · x′ alone) or biases (the 1 alone).
      chunk_size: how many rows and columns at a time; only so many factors exist then, for 10,000 inputs, say. The
        columns' are computed anew for each chunk of rows. By default all at once.

    Returns:
      (N, M, C, C), or (N, M) for trace and pseudo, in float32 at least; or L of them.

    Raises:
      ValueError: a wrong shape, an unknown kind or parts, a chunk size below 1.
      TypeError: a `jaxbp.Network`.

    Example:
      >>> from jaxbp import Affine
      >>> one = (Affine(jnp.ones((2, 1)), jnp.zeros(2)),)
      >>> ntk(MLP((1, 2)), one, jnp.array([[1.0], [2.0]]), kind="trace").tolist()  # C (1 + x x′)
      [[4.0, 6.0], [6.0, 10.0]]
    """
    for name, value, allowed in (("kind", kind, OUTPUTS), ("parts", parts, INPUTS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, allowed: chunk_size ≥ 1")
    rows = checked_inputs(net, params, x)
    columns = rows if other is None else checked_inputs(net, params, other)
    cotangents = jnp.ones((1, net.sizes[-1])) if kind == "pseudo" else jnp.eye(net.sizes[-1])

    def factors(x: Array) -> Factors:
        f = output_factors(net, params, x[None], cotangents)
        return Factors(*(tuple(a[0].astype(wide(a.dtype)) for a in arrays) for arrays in f))

    def pair(f: Factors, g: Factors) -> list[Array]:
        layers = zip(f.x, f.delta, g.x, g.delta, strict=True)
        kernels = [INPUTS[parts](x, x_) * OUTPUTS[kind](delta, delta_) for x, delta, x_, delta_ in layers]
        return kernels if per_layer else [sum(kernels[1:], kernels[0])]

    def over(function: Callable[..., list[Array]], xs: Array) -> list[Array]:
        return jax.vmap(function)(xs) if chunk_size is None else jax.lax.map(function, xs, batch_size=chunk_size)

    def row(x: Array) -> list[Array]:
        f = factors(x)
        return over(lambda x_: pair(f, factors(x_)), columns)

    kernels = tuple(over(row, rows))
    return kernels if per_layer else kernels[0]
