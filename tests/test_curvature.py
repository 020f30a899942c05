"""Second derivatives by hand against autodiff's dense matrices, and the traps that others fell into.

Everything is in float64. A network has two hidden layers and biases, so that σ″, g and V are nonzero at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from beartype.roar import BeartypeCallHintViolation
from jax.flatten_util import ravel_pytree
from oracles import assert_close

import jaxbp
from jaxbp import MLP, Activation, Affine, Loss, curvature
from jaxbp.activations import ACTIVATIONS
from jaxbp.layers import Dense
from jaxbp.losses import LOSSES

N, SIZES = 5, (3, 4, 3, 2)
NET = MLP((3, 3, 3, 3), "tanh")  # equal widths, so that nothing but numbers can tell a wrong layer
NETS = [
    MLP(SIZES, ("relu", "gelu"), loss="sigmoid_cross_entropy"),
    MLP(SIZES, ("squareplus", "softplus"), "tanh", loss="poisson"),
]
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 1.0])


@functools.cache
def case(net=NET, batch=N):
    """params, x, y, a direction v, and the dense matrices."""
    params, x, y = oracles.data(net, 0, batch)
    v, _, _ = oracles.data(net, 1, 1)
    return params, x, y, v, oracles.dense(net, params, x, y)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@functools.partial(jax.jit, static_argnums=0)
def everything(net, params, x, y, v, weights):
    """One program: products with masked and weighted rows, and what is one number a sample."""
    c, share = curvature, (weights, 3.0)
    masked = x.at[1].set(jnp.nan)  # the weight of sample 1 is 0
    return {
        "hvp": c.hvp(net, params, masked, y, v, *share),
        "ggn_vp": c.ggn_vp(net, params, masked, y, v, *share),
        "fisher_vp": c.fisher_vp(net, params, masked, y, v, *share),
        "diag_ggn": c.diag_ggn(net, params, masked, y, "exact", None, *share),
        "diag_hessian": c.diag_hessian(net, params, masked, y, *share),
        "quadratic": c.quadratic(net, params, x, y, v),
        "quadratic ggn": c.quadratic(net, params, x, y, v, "ggn"),
        "hvp_squared_norms": c.hvp_squared_norms(net, params, x, y, v),
        "hessian_trace": c.hessian_trace(net, params, x, y),
        "jacobian_vp": c.jacobian_vp(net, params, x, v),
    }


def by_layer(net, diagonal):
    """Vectors of P numbers, layer by layer."""
    ends = np.cumsum([(i + 1) * o for i, o in zip(net.sizes, net.sizes[1:], strict=False)])[:-1]
    return np.split(diagonal, ends, axis=-1)


def check_everything(net):
    params, x, y, v, dense = case(net)
    u, w = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)]), WEIGHTS / 3
    got = everything(net, params, x, y, v, jnp.asarray(WEIGHTS))
    want = {
        "hvp": np.einsum("n,npq,q->p", w, dense.hessian, u),
        "ggn_vp": np.einsum("n,npq,q->p", w, dense.ggn, u),
        "fisher_vp": np.einsum("n,np,nq,q->p", w, dense.gradient, dense.gradient, u),
        "diag_ggn": np.einsum("n,npp->p", w, dense.ggn),
        "diag_hessian": np.einsum("n,npp->p", w, dense.hessian),
        "quadratic": np.einsum("p,npq,q->n", u, dense.hessian, u),
        "quadratic ggn": np.einsum("p,npq,q->n", u, dense.ggn, u),
        "hvp_squared_norms": np.sum((dense.hessian @ u) ** 2, axis=1),
        "hessian_trace": np.concatenate([d.sum(-1) for d in by_layer(net, np.einsum("npp->np", dense.hessian))]),
        "jacobian_vp": np.ravel(dense.jacobian @ u),
    }
    for name, value in want.items():
        ours = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(got[name])])
        assert_close(ours, value, 1e-11, f"{net} {name}")
    assert got.keys() == want.keys()


def test_everything_is_the_dense_matrix():
    check_everything(NET)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{'-'.join(net.hidden)}-{net.loss}")
def test_everything_is_the_dense_matrix_of_other_networks(net):
    """σ and ℓ enter apart from each other, so that not each pair is needed."""
    check_everything(net)


# Planted bugs -------------------------------------------------------------------------------------------------------

STEPS = {
    "Rs": lambda V, v_b, w, x, rx, rx_before: V @ x + v_b + w @ rx,
    "Rδ": lambda rg, dsigma, g, d2sigma, rs: rg * dsigma + g * d2sigma * rs,
    "Rg": lambda V, w, delta, rdelta: V.T @ delta + w.T @ rdelta,
    "w": lambda rdelta, x, delta, rx: np.outer(rdelta, x) + np.outer(delta, rx),
    "H_ℓ": lambda p, v: p * v - p * (p @ v),
    "mean": lambda total, n: total / n,
}
BUGS = {
    "missing σ″ term": {"Rδ": lambda rg, dsigma, g, d2sigma, rs: rg * dsigma},
    "σ″ times δ for g": {"Rδ": lambda rg, dsigma, g, d2sigma, rs: rg * dsigma + g * dsigma * d2sigma * rs},
    "σ′ for σ″": {"Rδ": lambda rg, dsigma, g, d2sigma, rs: rg * dsigma + g * dsigma * rs},
    "missing Vᵀδ": {"Rg": lambda V, w, delta, rdelta: w.T @ rdelta},
    "missing wᵀRδ": {"Rg": lambda V, w, delta, rdelta: V.T @ delta},
    "missing δ Rxᵀ": {"w": lambda rdelta, x, delta, rx: np.outer(rdelta, x)},
    "missing v_b": {"Rs": lambda V, v_b, w, x, rx, rx_before: V @ x + w @ rx},
    "missing w Rx": {"Rs": lambda V, v_b, w, x, rx, rx_before: V @ x + v_b},
    "Rx of the wrong layer": {"Rs": lambda V, v_b, w, x, rx, rx_before: V @ x + v_b + w @ rx_before},
    "H_ℓ without its rank-one term": {"H_ℓ": lambda p, v: p * v},
    "H_ℓ twice its rank-one term": {"H_ℓ": lambda p, v: p * v - 2 * p * (p @ v)},
    "no H_ℓ": {"H_ℓ": lambda p, v: v},
    "1/N twice": {"mean": lambda total, n: total / n / n},
    "no 1/N": {"mean": lambda total, n: total},
}


def product(bug):
    """Hv in NumPy, step by step, with some of the steps replaced."""
    steps = STEPS | bug
    params, x, y, v, _ = case(NET)
    total = 0
    for sample, label in zip(np.asarray(x), np.asarray(y), strict=True):
        xs, ss, rxs, rss = [sample], [], [0 * sample, 0 * sample], []
        for number, ((w, b), (V, v_b)) in enumerate(zip(params, v, strict=True)):
            w, b, V, v_b = map(np.asarray, (w, b, V, v_b))
            ss.append(w @ xs[-1] + b)
            rss.append(steps["Rs"](V, v_b, w, xs[-1], rxs[-1], rxs[-2]))
            last = number == len(params) - 1
            xs.append(ss[-1] if last else np.tanh(ss[-1]))
            rxs.append(rss[-1] if last else (1 - xs[-1] ** 2) * rss[-1])
        p = np.exp(xs[-1]) / np.sum(np.exp(xs[-1]))
        g, rg, grads = p - np.eye(3)[label], steps["H_ℓ"](p, rxs[-1]), []
        rxs = rxs[1:]
        for l in reversed(range(len(params))):
            last = l == len(params) - 1
            dsigma = np.ones(3) if last else 1 - xs[l + 1] ** 2
            d2sigma = np.zeros(3) if last else -2 * xs[l + 1] * dsigma
            delta, rdelta = g * dsigma, steps["Rδ"](rg, dsigma, g, d2sigma, rss[l])
            grads = [steps["w"](rdelta, xs[l], delta, rxs[l]).ravel(), rdelta, *grads]
            w, V = np.asarray(params[l].w), np.asarray(v[l].w)
            g, rg = w.T @ delta, steps["Rg"](V, w, delta, rdelta)
        total = total + np.concatenate(grads)
    return steps["mean"](total, len(case(NET)[1]))


def test_the_steps_are_right():
    _, _, _, v, dense = case(NET)
    assert_close(product({}), dense.hessian.mean(0) @ flat(v), 1e-12)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    """By the comparison that the library has to pass: it is off by far more than its tolerance."""
    _, _, _, v, dense = case(NET)
    assert oracles.leaf_errors(product(BUGS[bug]), dense.hessian.mean(0) @ flat(v))[0] > 1e-3


# σ″ and ∂²ℓ/∂x² -----------------------------------------------------------------------------------------------------

KINKS = [(name, kink) for name, kinks in (oracles.KINKS | {"soft_sign": [0]}).items() for kink in kinks]
POINTS = [-40, -7.5, -2.25, -1.0, -0.7, -1e-3, 0.0, 1e-3, 0.3, 1.0, 2.5, 5.5, 6, 9, 40, 1e20, -1e20, -3, 3]
STEP = 1e-6


@functools.cache
def second_derivatives():
    """σ′ and σ″ of every activation at POINTS, ±∞ and NaN, and twice on the left of every kink, in one program."""
    kinks = sorted({kink for _, kink in KINKS})
    s = np.array([*POINTS, np.inf, -np.inf, np.nan, *(k - STEP for k in kinks), *(k - 2 * STEP for k in kinks)])

    @jax.jit
    def at(s):
        xs = {name: sigma.sigma(s) for name, sigma in ACTIVATIONS.items()}
        return {name: (sigma.dsigma(s, xs[name]), sigma.d2sigma(s, xs[name])) for name, sigma in ACTIVATIONS.items()}

    slopes = jax.tree.map(np.asarray, at(s))
    return {name: (dict(zip(s, first, strict=True)), second) for name, (first, second) in slopes.items()}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivative_is_the_truth(name):
    """8 ε max(1, largest term) in f64. Kinks, ±∞ and NaN are among the points."""
    got = second_derivatives()[name][1]
    want = oracles.truth(oracles.D2SIGMA_TRUTH[name], POINTS)
    assert np.all(oracles.absolute_errors(got[: len(POINTS)], want) <= 8 * np.finfo(float).eps)
    up, down, nan = got[len(POINTS) : len(POINTS) + 3]
    assert up == down == 0 and (np.isnan(nan) or name == "identity")


@pytest.mark.parametrize(("name", "kink"), KINKS)
def test_at_a_kink_it_is_the_limit_from_the_left(name, kink):
    """The difference quotient of σ′ on the left. Autodiff twice gives 0.5 for elu and −0.25 for squareplus at 0."""
    slopes, second = second_derivatives()[name]
    quotient = (slopes[kink - STEP] - slopes[kink - 2 * STEP]) / STEP
    np.testing.assert_allclose(second[POINTS.index(kink)], quotient, atol=1e-5)


def test_values_at_zero_that_autodiff_gets_wrong():
    at_zero = {name: second[POINTS.index(0.0)] for name, (_, second) in second_derivatives().items()}
    want = {"squareplus": 0.25, "elu": 1.0, "selu": 1.7580993408473766}
    assert {name: at_zero[name] for name in want} == pytest.approx(want, rel=1e-15)


@functools.cache
def of_losses():
    """H_ℓ by its columns, S Sᵀ, and autodiff's H_ℓ, at points away from kinks, of every loss, in one program."""
    rng = np.random.default_rng(3)
    x = 2 * rng.standard_normal((16, 4))
    y = {name: oracles.targets(name, rng, x.shape, jnp.float64) for name in LOSSES}

    def of(name, x, y):
        columns = jax.vmap(lambda v: LOSSES[name].hvp(x, y, v))(jnp.eye(4))
        s = LOSSES[name].root(x, y)
        return columns, s @ s.T, jax.hessian(oracles.LOSSES[name])(x, y)

    program = jax.jit(lambda x, y: {name: jax.vmap(functools.partial(of, name))(x, y[name]) for name in LOSSES})
    return jax.tree.map(np.asarray, program(x, y))


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_of_a_loss(name):
    """Autodiff of the naive formula in f64, by columns; a root's square is the same matrix."""
    h, square, want = of_losses()[name]
    assert_close(h, want, 1e-13, name)
    assert_close(square, want, 1e-13, name)


def test_second_derivative_of_a_loss_at_kinks_and_extremes():
    """Huber at e = ±1 as on the left. No ∞ · 0: a rate of e⁸⁰⁰ leaves the other outputs alone."""
    one, nan, inf = np.ones(2), np.array([np.nan, 1.0]), np.inf
    cases = {
        "huber": ([1.0, -1.0], 0 * one, one, [1, 0]),
        "absolute_error": ([1.0, 0.0], 0 * one, one, [0, 0]),
        "log_cosh": ([1e4, -inf], 0 * one, one, [0, 0]),
        "sigmoid_cross_entropy": ([inf, -inf], 0 * one, one, [0, 0]),
        "poisson": ([800.0, 0.0], one, np.array([0.0, 1.0]), [0, 1]),
        "hinge": ([3.0, 1.0], np.int32(0), one, [0, 0]),
        "softmax_cross_entropy": ([1.0, 2.0], np.int32(2), one, [np.nan] * 2),  # a label out of range
    }

    @jax.jit
    def both():
        at = {
            name: LOSSES[name].hvp(jnp.array(x), jnp.asarray(y), jnp.asarray(v)) for name, (x, y, v, _) in cases.items()
        }
        through = {
            name: LOSSES[name].hvp(jnp.asarray(nan), jnp.asarray(y), jnp.ones(2))
            for name, (_, y, _, _) in cases.items()
        }
        return at, through

    found, through = both()
    for name, (*_, want) in cases.items():
        np.testing.assert_array_equal(found[name], want, err_msg=name)
        assert np.isnan(through[name][0]), name


# The contract and the traps -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def means(net, params, x, y, v):
    return curvature.hvp(net, params, x, y, v), curvature.diag_ggn(net, params, x, y)


@pytest.mark.slow
def test_doubling_the_samples_changes_nothing_and_chunks_add_up():
    """δ that held 1/N already would halve the second; an accumulation that kept the last chunk would show."""
    params, x, y, v, _ = case(batch=7)
    whole = means(NET, params, x, y, v)
    assert_close(means(NET, params, np.tile(x, (2, 1)), np.tile(y, 2), v), whole, 1e-12)
    chunks = [(0, 3), (3, 6), (6, 7)]
    parts = [jax.tree.map(lambda a, n=b - a: n / 7 * a, means(NET, params, x[a:b], y[a:b], v)) for a, b in chunks]
    assert_close(jax.tree.map(lambda *a: sum(a), *parts), whole, 1e-12)


@pytest.mark.slow
def test_an_empty_or_masked_batch_gives_zeros():
    params, x, y, v, _ = case()
    product = jax.jit(lambda x, y, weights: curvature.hvp(NET, params, x, y, v, weights))
    for samples in (0, N):
        got = product(x[:samples], y[:samples], jnp.zeros(samples))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(got))


@pytest.mark.slow
def test_monte_carlo_is_right_in_the_mean():
    """2,000 draws: within 5 standard errors, everywhere."""
    params, x, y, _, dense = case()
    draw = jax.jit(jax.vmap(lambda key: curvature.diag_ggn(NET, params, x, y, "mc", key)))
    leaves = jax.tree.leaves(draw(jax.random.split(jax.random.key(0), 2000)))
    draws = np.concatenate([np.asarray(leaf).reshape(2000, -1) for leaf in leaves], axis=1)
    error = np.std(draws, axis=0) / 2000**0.5
    assert np.all(np.abs(draws.mean(0) - np.einsum("npp->p", dense.ggn) / N) <= 5 * error + 1e-15)


def test_one_linearisation_serves_many_products_inside_jit_and_loops():
    params, x, y, v, dense = case()
    operator = jax.jit(curvature.linearized, static_argnums=0)(NET, params, x, y)
    twice = jax.jit(lambda operator, v: jax.lax.fori_loop(0, 2, lambda _, v: operator(v), v))(operator, v)
    h = dense.hessian.mean(0)
    assert_close(flat(twice), h @ (h @ flat(v)), 1e-11)


@pytest.mark.slow
def test_bfloat16_and_float32_keep_their_dtype():
    params, x, y, v, dense = case()
    both = jax.jit(lambda p, v: (curvature.hvp(NET, p, x, y, v), curvature.quadratic(NET, p, x, y, v)))
    for dtype, bound in ((jnp.bfloat16, 0.1), (jnp.float32, 1e-5)):
        product, squares = both(*(jax.tree.map(lambda a, d=dtype: a.astype(d), tree) for tree in (params, v)))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(product)) and squares.dtype == jnp.float32
        assert_close(flat(product).astype(float), dense.hessian.mean(0) @ flat(v), bound)


def dense_product(product, net, params, x, y, **share):
    """The matrix whose columns are the products with unit vectors."""
    unflatten = ravel_pytree(params)[1]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    columns = jax.jit(jax.vmap(lambda v: ravel_pytree(product(net, params, x, y, unflatten(v), **share))[0]))
    return np.asarray(columns(np.eye(size))).T


def test_softmax_and_logistic_regression():
    """H = (1/N) Σ (diag p − ppᵀ) ⊗ x̃x̃ᵀ: at w = 0 the eigenvalues of X̃ᵀX̃/N over C, each C − 1 times, the rest 0.

    With one logistic output p (1 − p) x̃x̃ᵀ. A product through a fused loss that comes out as 0 would be seen here.
    """
    net, rng = MLP((3, 4)), np.random.default_rng(0)
    x, y = rng.standard_normal((9, 3)), rng.integers(4, size=9)
    h = dense_product(curvature.hvp, net, (Affine(np.zeros((4, 3)), np.zeros(4)),), x, y)
    x1 = np.concatenate([x, np.ones((9, 1))], axis=1)
    want = np.sort([*np.repeat(np.linalg.eigvalsh(x1.T @ x1 / 9) / 4, 3), *np.zeros(4)])
    np.testing.assert_allclose(np.linalg.eigvalsh(h), want, atol=1e-13)
    w, net = rng.standard_normal(4), MLP((3, 1), loss="sigmoid_cross_entropy")
    p = 1 / (1 + np.exp(-x1 @ w))
    h = dense_product(curvature.hvp, net, (Affine(w[None, :3], w[3:]),), x, np.ones((9, 1)))
    assert_close(h, np.einsum("n,ni,nj->ij", p * (1 - p) / 9, x1, x1), 1e-13)


def test_the_diagonal_is_not_the_matrix_times_ones():
    """[[2, 1], [1, 3]] → (2, 3): Σ weights (x², x; x, 1) of two samples."""
    net, root = MLP((1, 1), loss="squared_error"), (2 + 10**0.5) / 6
    params, x, y = (Affine(np.zeros((1, 1)), np.zeros(1)),), np.array([[1 - 2 * root], [root]]), np.zeros((2, 1))
    share = {"weights": np.array([1.0, 2.0]), "normalize_by": 1}
    both = (curvature.diag_hessian, curvature.diag_ggn)
    for diagonal in jax.jit(lambda: [f(net, params, x, y, **share) for f in both])():
        assert_close(flat(diagonal), np.array([2.0, 3.0]), 1e-14)


def test_the_diagonal_of_the_fisher_is_not_the_squared_mean_gradient():
    params, x, y, _, dense = case()
    fisher = dense_product(curvature.fisher_vp, NET, params, x, y)
    assert_close(fisher, np.einsum("np,nq->pq", dense.gradient, dense.gradient) / N, 1e-12)
    assert_close(np.diag(fisher), np.mean(dense.gradient**2, axis=0), 1e-12)
    assert np.min(np.diag(fisher) - dense.gradient.mean(0) ** 2) >= 0 and np.trace(fisher) > 1.1 * np.sum(
        dense.gradient.mean(0) ** 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1)])
def test_one_sample_one_output_widths_of_one(sizes):
    net = MLP(sizes, "tanh", loss="sigmoid_cross_entropy")
    params, x, y, _, dense = case(net, 1)
    assert_close(dense_product(curvature.hvp, net, params, x, y), dense.hessian[0], 1e-11)


# Errors -------------------------------------------------------------------------------------------------------------

SQUARE = Activation("square", lambda s: s**2, lambda s, x: 2 * s)  # a user's, with σ and σ′ alone
BARE = MLP((3, 4, 2), SQUARE, loss="squared_error")
OWN = MLP((3, 4, 2), loss=Loss("own", lambda x, y: jnp.sum(x), lambda x, y: jnp.ones_like(x)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, x, y: curvature.hvp(BARE, p, x, y, p), "'square' has no σ″: it is the field d2sigma"),
        (lambda p, x, y: curvature.ggn_vp(OWN, p, x, y, p), "'own' has no ∂²ℓ/∂x²: it is the field hvp"),
        (lambda p, x, y: curvature.diag_ggn(OWN, p, x, y), "'own' has no root of ∂²ℓ/∂x²: it is the field root"),
        (lambda p, x, y: curvature.quadratic(BARE, p, x, y, p, "hesian"), "kind is 'hesian', allowed: hessian, ggn"),
        (lambda p, x, y: curvature.ggn_vp(BARE, p, x, y, p[:1]), "params has 1 layers"),
        (lambda p, x, y: curvature.diag_ggn(BARE, p, x, y, "mc"), "'mc' without a key, allowed: exact, mc"),
        (lambda p, x, y: curvature.jacobian_vp(BARE, p, x[:, :2], p), r"x has shape \(5, 2\), expected \(N, 3\)"),
        (lambda p, x, y: curvature.output_factors(BARE, p, x, y[:, :1]), r"cotangents has shape \(5, 1\), expected"),
    ],
)
def test_errors(wrong, message):
    """Traced, not run."""
    params, x, y = oracles.data(BARE, 0, N)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(wrong, params, x, y)


def test_other_networks_are_refused_in_one_line():
    """The annotation refuses them first where annotations are checked, as they are here."""
    net = jaxbp.Network(Dense(2), "squared_error", (3,))
    with pytest.raises(
        TypeError, match="net is a Network: curvature needs the second pair of passes, which only an MLP"
    ):
        curvature._check_mlp(net)
    with pytest.raises((TypeError, BeartypeCallHintViolation)):
        curvature.hvp(net, (), jnp.ones((5, 3)), jnp.ones((5, 2)), ())
