"""What the inverse of the curvature gives: influence functions, natural gradients, Laplace's approximation.

Arguments and scaling are those of `jaxbp.curvature`; results come in float32 at least.

Sources: P. W. Koh and P. Liang, *Understanding black-box predictions via influence functions*, 2017; R. Grosse et al.,
*Studying large language model generalization with influence functions*, 2023 (EK-FAC); Y. Ren and D. Goldfarb,
*Efficient subsampled Gauss-Newton and natural gradient methods*, 2019 (the dual); D. MacKay, *A practical Bayesian
framework for backpropagation networks*, 1992; H. Ritter et al., *A scalable Laplace approximation*, 2018.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp import factor, persample, spectrum
from jaxbp.curvature import Share, checked, linearized, output_factors, root_factors
from jaxbp.factor import FactorTree
from jaxbp.kronecker import Eigen, ekfac, with_one
from jaxbp.mlp import MLP, Array, Factors, Params, forward, wide
from jaxbp.network import ParamTree, mean_weights, totals
from jaxbp.network import factors as batch_factors


class Influence(NamedTuple):
    """scores, (N, M), and ‖b − (A + λ) u‖ of each test sample's solve, (M,); it is 0 for ekfac, which is direct."""

    scores: Array
    residuals: Array


def influence_function(
    net: MLP,
    params: Params,
    train: tuple[ArrayLike, ArrayLike],
    test: tuple[ArrayLike, ArrayLike],
    damping: ArrayLike,
    solver: str = "cg",
    kind: str = "ggn",
    steps: int = 100,
) -> Influence:
    """g_testᵀ (A + λ)⁻¹ gₙ, A the curvature of the mean training loss: positive where train sample n helps.

    Sign and scale are those of `persample.influence`; divided by N it is by how much the test loss rises, to first
    order, when the sample is removed. One test sample after the other takes one solve and one product with all factors.

    Args:
      train, test: inputs and targets, of N and of M samples.
      damping: λ.
      solver: cg; ekfac, which is direct, with A approximated; or lissa. The last is scaled by the largest eigenvalue.
      kind: A is the ggn or, for cg and lissa, the hessian.
      steps: of the solver at most.

    Example:
      >>> import jaxbp
      >>> one = (jaxbp.Affine(jnp.ones((2, 1)), jnp.zeros(2)),)
      >>> of_four = lambda x, y: influence_function(MLP((1, 2)), one, (x, y), (x[:4], y[:4]), damping=0.1).scores
      >>> jax.eval_shape(of_four, jnp.ones((5, 1)), jnp.zeros(5, int)).shape
      (5, 4)
    """
    x, y = checked(net, params, *train)
    solve, f = _solver(solver, net, params, x, y, kind, damping, steps), batch_factors(net, params, x, y)[1]

    def column(sample: tuple[Array, Array]) -> tuple[Array, Array]:
        u, residual = solve(totals(batch_factors(net, params, *(a[None] for a in sample))[1]))
        return persample.dot(f, u), residual

    scores, residuals = jax.lax.map(column, checked(net, params, *test))
    return Influence(scores.T, residuals)


def _solver(
    solver: str, net: MLP, params: Params, x: Array, y: Array, kind: str, damping: ArrayLike, steps: int
) -> Callable[[Params], tuple[Params, Array]]:
    """b ↦ u with (A + λ) u ≈ b, and the residual."""
    if solver == "ekfac":
        blocks, none = ekfac(net, params, x, y), jnp.zeros((), wide(x.dtype))
        return lambda b: (tuple(block.solve(v, damping) for block, v in zip(blocks, b, strict=True)), none)
    operator = linearized(net, params, x, y, kind)
    if solver == "cg":
        return lambda b: spectrum.cg(operator, b, damping, steps=steps)[:2]
    if solver != "lissa":
        raise ValueError(f"solver is {solver!r}, allowed: cg, ekfac, lissa")
    largest = spectrum.eigenpairs(operator, params, 1, jax.random.key(0), steps=20).values[0]
    scale = 1.1 * largest + jnp.asarray(damping, largest.dtype)
    return lambda b: spectrum.lissa(operator, b, scale, damping, steps)[:2]


def trak(
    net: MLP, params: Params, train: tuple[ArrayLike, ArrayLike], test: tuple[ArrayLike, ArrayLike], damping: ArrayLike
) -> Array:
    """TRAK of one network without random projection, (N, M): positive where train sample n helps a test sample.

    φ is the gradient of the margin log(p / (1 − p)), p the softmax probability of the label. With the φₙ of the
    training samples as rows of Φ the scores are (1 − pₙ) ((ΦΦᵀ + λ)⁻¹ Φ φ_test)ₙ. The matrix is (N, N), and no φ is
    formed.

    Args:
      train, test: inputs and integer labels, of N and of M samples.
      damping: λ.

    Example:
      >>> import jaxbp
      >>> one = (jaxbp.Affine(jnp.ones((2, 1)), jnp.zeros(2)),)
      >>> of_four = lambda x, y: trak(MLP((1, 2)), one, (x, y), (x[:4], y[:4]), damping=0.1)
      >>> jax.eval_shape(of_four, jnp.ones((5, 1)), jnp.zeros(5, int)).shape
      (5, 4)

    Source:
      S. M. Park et al., *TRAK: attributing model behavior at scale*, 2023, §3.
    """

    def margins(x: ArrayLike, y: ArrayLike) -> tuple[Array, Factors]:
        x, y = checked(net, params, x, y)
        output = jax.vmap(lambda x: forward(net, params, x).x[-1])(x)
        label = jax.nn.one_hot(y, net.sizes[-1], dtype=output.dtype)
        others = jax.nn.softmax(jnp.where(label > 0, -jnp.inf, output))
        f = output_factors(net, params, x, (label - others)[:, None])
        p = jnp.sum(label * jax.nn.softmax(output), axis=1)
        return 1 - p, Factors(f.x, tuple(delta[:, 0] for delta in f.delta))

    (rest, f), (_, g) = margins(*train), margins(*test)
    kernel, products = persample.gram(f), persample.gram(f, g)
    damped = kernel + jnp.asarray(damping, kernel.dtype) * jnp.eye(len(kernel), dtype=kernel.dtype)
    scores: Array = rest.astype(kernel.dtype)[:, None] * jnp.linalg.solve(damped, products)
    return scores


def natural_gradient(
    factors: FactorTree, damping: ArrayLike, weights: Share = None, normalize_by: Share = None
) -> ParamTree:
    """(F + λ)⁻¹ ḡ with the empirical Fisher matrix F = Σₙ sₙ gₙgₙᵀ and ḡ = Σₙ sₙ gₙ, sₙ = weightsₙ / N.

    By its dual, Σₙ √sₙ αₙ gₙ with α = (√s K √s + λ)⁻¹ √s and K = `persample.gram`: N equations, whatever the network.

    Returns:
      Like the parameters, in the dtype of the factors.

    Example:
      >>> import jaxbp
      >>> f = jaxbp.Factors(x=(jnp.array([[2.0]]),), delta=(jnp.array([[1.0]]),))  # g = (2, 1), ‖g‖² = 5
      >>> round(float(jax.jit(natural_gradient)(f, 5.0)[0].w[0, 0]), 4)
      0.2
    """
    scale = mean_weights(weights, factor.batch(factors), normalize_by, wide(factor.dtype(factors)))
    f, root = factor.where(scale != 0, factors), jnp.sqrt(scale)
    kernel = root[:, None] * persample.gram(f) * root[None, :]
    alpha = jnp.linalg.solve(kernel + jnp.asarray(damping, root.dtype) * jnp.eye(len(root), dtype=root.dtype), root)
    return totals(factor.times(f, root * alpha))


def log_evidence(
    net: MLP, params: Params, x: ArrayLike, y: ArrayLike, prior: ArrayLike, blocks: tuple[Eigen, ...] | None = None
) -> Array:
    """The logarithm of the evidence by Laplace's approximation with the Gauss-Newton matrix G of the mean loss.

    −Σₙ ℓₙ − τ ‖(w, b)‖² / 2 − ½ log det(I + N G/τ). ℓ has to be a negative log-likelihood. What it leaves out, such as
    ½ ln 2π, is left out here. The determinant is exact by its dual, log det(I + K/τ), K the products of all
    `root_factors`: for small sets, of N C numbers squared. For others there are blocks.

    Args:
      prior: τ, the precision of the parameters' normal prior with mean 0.
      blocks: in the place of G, of `jaxbp.kronecker.ekfac` at x, or of `kfac` by `eigh`.

    Example:
      >>> import jaxbp
      >>> net, x, y = MLP((1, 1), loss="squared_error"), jnp.zeros((1, 1)), jnp.zeros((1, 1))
      >>> zero = (jaxbp.Affine(jnp.zeros((1, 1)), jnp.zeros(1)),)
      >>> round(float(jax.jit(log_evidence, static_argnums=0)(net, zero, x, y, 1.0)), 4)  # −½ ln 2
      -0.3466
    """
    x, y = checked(net, params, x, y)
    dtype = wide(x.dtype)
    prior = jnp.asarray(prior, dtype)
    det = _exact_log_det(net, params, x, y, prior) if blocks is None else log_det(blocks, len(x), prior)
    norm = jnp.sum(jnp.stack([jnp.sum(leaf.astype(dtype) ** 2) for leaf in jax.tree.leaves(params)]))
    evidence: Array = -jnp.sum(batch_factors(net, params, x, y)[0]) - 0.5 * prior * norm - 0.5 * det
    return evidence


def log_det(blocks: tuple[Eigen, ...], count: ArrayLike, prior: ArrayLike) -> Array:
    """log det(I + N G/τ) = Σ log(1 + N values/τ), G by its blocks; count is N, prior is τ."""
    terms = [jnp.sum(jnp.log1p(jnp.asarray(count, v.dtype) / jnp.asarray(prior, v.dtype) * v)) for _, _, v in blocks]
    return sum(terms[1:], terms[0])


def _exact_log_det(net: MLP, params: Params, x: Array, y: Array, prior: Array) -> Array:
    f, dtype = root_factors(net, params, x, y), prior.dtype
    layers = [(inputs @ inputs.T, d.astype(dtype)) for inputs, d in zip(map(with_one, f.x), f.delta, strict=True)]
    kernels = [jnp.einsum("nro,mso->nrms", d, d) * alike[:, None, :, None] for alike, d in layers]
    count = kernels[0].shape[0] * kernels[0].shape[1]
    kernel = sum(kernels[1:], kernels[0]).reshape(count, count)
    det: Array = jnp.linalg.slogdet(jnp.eye(count, dtype=dtype) + kernel / prior)[1]
    return det


def predictive_variance(
    net: MLP, params: Params, x: ArrayLike, blocks: tuple[Eigen, ...], count: ArrayLike, prior: ArrayLike
) -> Array:
    """The covariance of the outputs, (M, C, C), under Laplace's approximation with Kronecker factors; no Jacobian.

    Σ_l Σᵢⱼ (Q_BᵀΔ_c)ᵢ (Q_BᵀΔ_c′)ᵢ (Q_Aᵀx̃)ⱼ² / (N valuesᵢⱼ + τ).

    Args:
      x: inputs, (M, n₀).
      blocks: at the training data, of `jaxbp.kronecker.ekfac`, or of `kfac` by `eigh`.
      count: N, the number of training samples: the blocks are of their mean loss.
      prior: τ, as for `log_evidence`.

    Example:
      >>> import jaxbp
      >>> net, one = MLP((1, 1)), (jaxbp.Affine(jnp.ones((1, 1)), jnp.ones(1)),)
      >>> block = Eigen(q_a=jnp.eye(2), q_b=jnp.eye(1), values=jnp.array([[1.0, 0.0]]))
      >>> predictive_variance(net, one, jnp.array([[2.0]]), (block,), count=3, prior=1.0).tolist()  # 2²/4 + 1
      [[[2.0]]]
    """
    f, terms = output_factors(net, params, x, jnp.eye(net.sizes[-1])), []
    for inputs, delta, (q_a, q_b, values) in zip(map(with_one, f.x), f.delta, blocks, strict=True):
        inverse = 1 / (jnp.asarray(count, values.dtype) * values + jnp.asarray(prior, values.dtype))
        shares, turned = (inputs @ q_a) ** 2 @ inverse.T, delta.astype(q_b.dtype) @ q_b
        terms.append(jnp.einsum("nco,no,ndo->ncd", turned, shares, turned))
    return sum(terms[1:], terms[0])
