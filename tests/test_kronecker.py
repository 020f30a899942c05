"""Kronecker factors, the tangent kernel, and what their inverses give, against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close

import jaxbp
from experiments import curvature as study
from jaxbp import MLP, Affine, kronecker
from jaxbp.influence import influence_function, log_det, log_evidence, natural_gradient, predictive_variance, trak
from jaxbp.tangent_kernel import ntk

N, SIZES = 5, (3, 3, 3, 3)
NET = MLP(SIZES, "tanh")
LINEAR = MLP((3, 2, 4, 2), "identity", loss="squared_error")
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 1.0])


@functools.cache
def case(net=NET, batch=N):
    """params, x, y, and the dense matrices."""
    params, x, y = oracles.data(net, 0, batch)
    return params, x, y, oracles.dense(net, params, x, y)


def joined(net, rows):
    """Of dense (…, P) the layers in the order of [w|b]: (…, out (in + 1))."""
    layers, start = [], 0
    for i, o in zip(net.sizes, net.sizes[1:], strict=False):
        w, b = rows[..., start : start + i * o], rows[..., start + i * o : start + (i + 1) * o]
        w = w.reshape(*rows.shape[:-1], o, i)
        layers.append(np.concatenate([w, b[..., None]], axis=-1).reshape(*rows.shape[:-1], -1))
        start += (i + 1) * o
    return layers


def flat(layers):
    """L of `Affine` as one vector in the order of the dense matrices."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(layers)])


def matrix(block):
    """A layer's matrix in the order of [w|b]."""
    if isinstance(block, kronecker.Kronecker):
        return np.kron(block.b, block.a)
    q = np.kron(block.q_b, block.q_a)
    return q @ np.diag(np.ravel(block.values)) @ q.T


@functools.partial(jax.jit, static_argnums=0)
def factorised(net, params, x, y, weights):
    share = (None, weights, None)
    kinds = {kind: kronecker.kfac(net, params, x, y, kind, *share) for kind in ("exact", "empirical", "kfra")}
    return kinds | {"ekfac": kronecker.ekfac(net, params, x, y, "exact", *share)}


@pytest.mark.slow
def test_factors_are_those_of_the_definition():
    """With a masked row. EK-FAC is nearer to the block than K-FAC (George et al. 2018), which is not equal to it."""
    params, x, y, dense = case()
    p, scale = WEIGHTS / WEIGHTS.sum(), WEIGHTS / N
    got = jax.tree.map(np.asarray, factorised(NET, params, x.at[1].set(jnp.nan), y, jnp.asarray(WEIGHTS)))
    inputs = [np.concatenate([a, np.ones((N, 1))], 1) for a in jaxbp.factors(NET, params, x, y)[1].x]
    jacobians, gradients = joined(NET, dense.jacobian), joined(NET, dense.gradient)
    for l, x1 in enumerate(inputs):
        j = jacobians[l].reshape(N, 3, 3, -1)[..., -1]  # Δ_c: the derivative by the biases
        d = gradients[l].reshape(N, 3, -1)[..., -1]
        a, b = np.einsum("n,ni,nj->ij", p, x1, x1), np.einsum("n,nco,ncd,ndp->op", scale, j, dense.output_hessian, j)
        assert_close(tuple(got["exact"][l]), (a, b), 1e-12, "exact")
        assert_close(tuple(got["empirical"][l]), (a, np.einsum("n,no,np->op", scale, d, d)), 1e-12, "empirical")
        g = np.einsum("n,ncp,ncd,ndq->pq", scale, jacobians[l], dense.output_hessian, jacobians[l])
        ekfac, kfac = (np.linalg.norm(g - matrix(got[kind][l])) for kind in ("ekfac", "exact"))
        assert ekfac <= kfac * (1 + 1e-12) and kfac > 1e-3 * np.linalg.norm(g)
    last, w, x1 = got["exact"][-1].b, np.asarray(params[-1].w), inputs[-1][:, :-1]
    dsigma = 1 - x1**2
    assert_close(got["kfra"][-1].b, last, 1e-12, "kfra")
    assert_close(got["kfra"][-2].b, (w.T @ last @ w) * np.einsum("n,no,np->op", p, dsigma, dsigma), 1e-12, "kfra")


@pytest.mark.slow
def test_type_2_depends_neither_on_the_label_nor_on_a_doubled_batch():
    """Empirical labels where drawn ones belong would change it; so would δ that holds 1/N already."""
    params, x, y, _ = case()
    ones, want = np.ones(N), factorised(NET, params, x, y, np.ones(N))
    other = factorised(NET, params, x, (y + 1) % 3, ones)
    assert_close(other["exact"], want["exact"], 1e-15)
    assert np.max(np.abs(other["empirical"][-1].b - want["empirical"][-1].b)) > 1e-2
    assert_close(factorised(NET, params, np.tile(x, (2, 1)), np.tile(y, 2), np.ones(2 * N)), want, 1e-11)


def test_deep_linear_network():
    """Type 2 is the block, the last B is I (no factor C), and Θ = Σ_l W_{L:l+1} W_{L:l+1}ᵀ ⊗ (1 + x · x′)."""
    params, x, y, dense = case(LINEAR)
    both = jax.jit(lambda params, x, y: (kronecker.kfac(LINEAR, params, x, y), ntk(LINEAR, params, x)))
    blocks, kernel = both(params, x, y)
    for block, rows in zip(blocks, joined(LINEAR, dense.jacobian), strict=True):
        assert_close(matrix(block), np.einsum("ncp,ncq->pq", rows, rows) / N, 1e-12)
    assert_close(blocks[-1].b, np.eye(2), 1e-15)
    xs, after, want = [np.asarray(a) for a in jaxbp.factors(LINEAR, params, x, y)[1].x], np.eye(2), 0
    for (w, _), a in reversed(list(zip(params, xs, strict=True))):
        want, after = want + np.einsum("cd,nm->nmcd", after @ after.T, 1 + a @ a.T), after @ np.asarray(w)
    assert_close(kernel, want, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1)])
def test_for_one_sample_it_is_the_block(sizes):
    net = MLP(sizes, "tanh", loss="sigmoid_cross_entropy")
    params, x, y, dense = case(net, 1)
    blocks = jax.jit(kronecker.kfac, static_argnums=0)(net, params, x, y)
    for block, rows in zip(blocks, joined(net, dense.jacobian), strict=True):
        assert_close(matrix(block), np.einsum("cp,cd,dq->pq", rows[0], dense.output_hessian[0], rows[0]), 1e-11)


def test_two_equal_solves_are_equal_and_right():
    """Damping that is added in place at each product would make the second another one."""
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((4, 4)), rng.standard_normal((3, 3))
    block, v = kronecker.Kronecker(*(jnp.asarray(r @ r.T) for r in roots)), rng.standard_normal((3, 4))
    a, b, damping = np.asarray(block.a), np.asarray(block.b), 0.3
    pi = np.sqrt((np.trace(a) / 4) / (np.trace(b) / 3))
    split = np.kron(b + damping**0.5 / pi * np.eye(3), a + pi * damping**0.5 * np.eye(4))
    wanted = {"heuristic": split, "exact": matrix(block) + damping * np.eye(12)}

    @jax.jit
    def solved(block, v):
        v = Affine(v[:, :-1], v[:, -1])
        solves = {kind: [block.solve(v, damping, kind) for _ in range(2)] for kind in wanted}
        return solves, block.matvec(v), block.eigh().matvec(v)

    solves, product, in_eigenvectors = solved(block, v)
    assert_close(product, in_eigenvectors, 1e-12)
    for kind, dense in wanted.items():
        oracles.assert_same_bits(*solves[kind])
        got = np.concatenate([solves[kind][0].w, solves[kind][0].b[:, None]], axis=1)
        assert_close(got, np.linalg.solve(dense, v.ravel()).reshape(v.shape), 1e-11, kind)
    with pytest.raises(ValueError, match="kind is 'both', allowed: heuristic, exact"):
        block.solve(Affine(v[:, :-1], v[:, -1]), damping, "both")


# The tangent kernel -------------------------------------------------------------------------------------------------


def test_the_tangent_kernel_is_the_product_of_jacobians():
    params, x, _, dense = case()
    kernels = jax.jit(lambda params, x, other: (ntk(NET, params, x), ntk(NET, params, x, other, "pseudo", True)))
    whole, layers = kernels(params, x, x[:3])
    want = np.einsum("ncp,mdp->nmcd", dense.jacobian, dense.jacobian)
    assert_close(whole, want, 1e-11)
    for layer, j in zip(layers, joined(NET, dense.jacobian), strict=True):
        assert_close(layer, j.sum(1) @ j[:3].sum(1).T, 1e-11)
    square = np.moveaxis(np.asarray(whole), 2, 1).reshape(3 * N, 3 * N)
    np.testing.assert_allclose(square, square.T, rtol=1e-13)
    assert np.linalg.eigvalsh(square).min() >= -1e-12 * np.linalg.eigvalsh(square).max()


@pytest.mark.slow
def test_its_trace_parts_and_chunks():
    params, x, _, dense = case()

    @jax.jit
    def kernels(params, x):
        k = functools.partial(ntk, NET, params, x)
        return k(kind="trace"), k(parts="biases"), k(parts="weights"), k(chunk_size=2), k(x[:3], chunk_size=9)

    trace, biases, weights, chunked, between = kernels(params, x)
    want = np.einsum("ncp,mdp->nmcd", dense.jacobian, dense.jacobian)
    by_biases = [j.reshape(N, 3, 3, -1)[..., -1] for j in joined(NET, dense.jacobian)]
    assert_close(trace, np.einsum("nmcc->nm", want), 1e-11)
    assert_close(biases, sum(np.einsum("nco,mdo->nmcd", j, j) for j in by_biases), 1e-11)
    assert_close(biases + weights, want, 1e-11)
    assert_close(chunked, want, 1e-11)
    assert_close(between, want[:, :3], 1e-11)


@pytest.mark.slow
def test_rank_of_gauss_newton_under_softmax():
    """At most N (C − 1): 9 of 68."""
    _, _, _, dense = case(MLP((3, 8, 4), "tanh"), 3)
    assert np.linalg.matrix_rank(dense.ggn.mean(0), tol=1e-10) == 3 * 3


@pytest.mark.slow
def test_a_wide_network_has_the_arc_cosine_kernel():
    """Cho and Saul's κ₁ + ρ κ₀ at 60°; the mean of 40 networks of width 256 within 4 standard errors."""
    assert study.limit() == pytest.approx(0.942331114378, rel=1e-12)
    kernels = study.kernel(256, 40)
    assert abs(kernels.mean() - study.limit()) < 4 * kernels.std(ddof=1) / 40**0.5 < 0.1


# What the inverse gives ---------------------------------------------------------------------------------------------


def test_natural_gradient_is_that_of_the_dense_fisher():
    params, x, y, dense = case()
    g, scale = dense.gradient, WEIGHTS / N
    fisher = np.einsum("n,np,nq->pq", scale, g, g)
    f = jaxbp.factors(NET, params, x.at[1].set(jnp.nan), y)[1]
    got = jax.jit(natural_gradient)(f, 0.1, jnp.asarray(WEIGHTS))
    assert_close(flat(got), np.linalg.solve(fisher + 0.1 * np.eye(len(fisher)), scale @ g), 1e-11)


@pytest.mark.slow
def test_log_evidence_is_that_of_the_dense_matrix():
    params, x, y, dense = case()
    total, theta = dense.ggn.sum(0) + 0.7 * np.eye(dense.ggn.shape[1]), flat(params)
    loss = float(np.sum(jaxbp.factors(NET, params, x, y)[0]))
    want = -loss - 0.35 * theta @ theta + 0.5 * len(theta) * np.log(0.7) - 0.5 * np.linalg.slogdet(total)[1]
    assert float(jax.jit(log_evidence, static_argnums=0)(NET, params, x, y, 0.7)) == pytest.approx(want, rel=1e-12)


def test_predictive_variance_of_a_line():
    """Of P = [[4, 2], [2, 3]]: the covariance is [[.375, −.25], [−.25, .5]], and not that of L in the place of Lᵀ."""
    net = MLP((1, 1), loss="squared_error")
    params, x = (Affine(jnp.zeros((1, 1)), jnp.zeros(1)),), np.array([[1 + 0.5**0.5], [1 - 0.5**0.5]])

    @jax.jit
    def variance(x, at):
        blocks = tuple(block.eigh() for block in kronecker.kfac(net, params, x, jnp.zeros((2, 1))))
        return predictive_variance(net, params, at, blocks, count=2, prior=1.0)

    assert_close(variance(x, np.array([[0.0], [1.0], [-1.0]]))[:, 0, 0], np.array([0.5, 0.375, 1.375]), 1e-13)


@pytest.mark.slow
def test_predictive_variance_is_that_of_the_dense_blocks():
    params, x, y, dense = case()
    blocks, want = jax.jit(kronecker.ekfac, static_argnums=0)(NET, params, x, y), 0
    for block, j in zip(blocks, joined(NET, dense.jacobian), strict=True):
        want = want + j @ np.linalg.inv(N * matrix(block) + 0.3 * np.eye(j.shape[-1])) @ np.swapaxes(j, 1, 2)
    assert_close(jax.jit(predictive_variance, static_argnums=0)(NET, params, x, blocks, N, 0.3), want, 1e-11)
    det = sum(np.linalg.slogdet(np.eye(12) + N * matrix(block) / 0.3)[1] for block in blocks)
    assert float(log_det(blocks, N, 0.3)) == pytest.approx(det, rel=1e-12)
    loss, theta = float(np.sum(jaxbp.factors(NET, params, x, y)[0])), flat(params)
    want = -loss - 0.15 * theta @ theta - 0.5 * det
    assert float(log_evidence(NET, params, x, y, 0.3, blocks)) == pytest.approx(want, rel=1e-12)


@pytest.mark.slow
def test_trak_is_that_of_the_gradients_of_the_margins():
    """log(p / (1 − p)) of the label: by its finite definition in autodiff, and the dense solve."""
    params, x, y, dense = case()

    def margin(output, y):
        p = jax.nn.log_softmax(output)
        return p[y] - jnp.log(-jnp.expm1(p[y]))

    outputs = jax.vmap(lambda x: jaxbp.forward(NET, params, x).x[-1])(x)
    phi = np.einsum("nc,ncp->np", jax.vmap(jax.grad(margin))(outputs, y), dense.jacobian)
    p = np.take_along_axis(np.asarray(jax.nn.softmax(outputs)), np.asarray(y)[:, None], 1)
    want = (1 - p) * np.linalg.solve(phi @ phi.T + 0.2 * np.eye(N), phi @ phi[:3].T)
    assert_close(jax.jit(trak, static_argnums=0)(NET, params, (x, y), (x[:3], y[:3]), 0.2), want, 1e-11)


@functools.cache
def ridge():
    """A ridge regression; the rise of three test losses when each of its samples is left out, by retraining."""
    rng, damping, count = np.random.default_rng(0), 0.1, 60
    x, noise = rng.standard_normal((count, 2)), rng.standard_normal((count, 1))
    y, x_test, y_test = x @ [[1.0], [-2.0]] + noise, rng.standard_normal((3, 2)), np.zeros((3, 1))
    x1, t1 = (np.concatenate([a, np.ones((len(a), 1))], axis=1) for a in (x, x_test))

    def fitted(kept):
        return np.linalg.solve(x1[kept].T @ x1[kept] / count + damping * np.eye(3), x1[kept].T @ y[kept] / count)

    def loss(theta):
        return 0.5 * (t1 @ theta - y_test)[:, 0] ** 2

    theta = fitted(np.arange(count))
    without = np.array([loss(fitted(np.delete(np.arange(count), n))) - loss(theta) for n in range(count)])
    return (Affine(theta[:2].T, theta[2]),), (x, y), (x_test, y_test), damping, without


@pytest.mark.parametrize("solver", ["cg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ekfac", "lissa"))])
def test_influence_is_the_rise_of_the_test_loss_without_the_sample(solver):
    """The same sign, and N times the rise, to first order."""
    params, train, test, damping, want = ridge()
    net = MLP((2, 1), loss="squared_error")
    scored = jax.jit(
        lambda params, train, test: influence_function(net, params, train, test, damping, solver, steps=400)
    )
    scores, residuals = scored(*jax.tree.map(jnp.asarray, (params, train, test)))
    assert np.corrcoef(scores.ravel(), want.ravel())[0, 1] > 0.99
    assert np.polyfit(want.ravel(), scores.ravel() / 60, 1)[0] == pytest.approx(1, abs=0.15)
    assert np.all(residuals < 1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, x, y: kronecker.kfac(NET, p, x, y, "kflr"), "kind is 'kflr' without a key, allowed: exact, mc"),
        (lambda p, x, y: kronecker.ekfac(NET, p, x, y, "kfra"), "kind is 'kfra', allowed: exact, mc, empirical"),
        (lambda p, x, y: ntk(NET, p, x, kind="trases"), "kind is 'trases', allowed: full, trace, pseudo"),
        (lambda p, x, y: ntk(NET, p, x, parts="bias"), "parts is 'bias', allowed: all, weights, biases"),
        (lambda p, x, y: ntk(NET, p, x, chunk_size=0), "chunk_size is 0, allowed: chunk_size ≥ 1"),
        (
            lambda p, x, y: influence_function(NET, p, (x, y), (x, y), 0.1, "gmres").scores,
            "solver is 'gmres', allowed: cg, ekfac, lissa",
        ),
    ],
)
def test_errors(wrong, message):
    """Traced, not run."""
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(wrong, *oracles.data(NET, 0, N))
