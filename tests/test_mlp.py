"""The lecture's equations one by one, the network's gradient against autodiff, and the scaling contract."""

import ast
import functools
import pathlib
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracles import assert_close, assert_same_bits, leaf_errors, tolerance
from tiers import one_in

import jaxbp
from jaxbp import MLP, Activation, Affine, Factors, Loss, activations, losses

WIDE = [jnp.float64, jnp.float32]
in_both_dtypes = pytest.mark.parametrize("dtype", one_in(2, WIDE))

forward = jax.jit(jaxbp.forward, static_argnums=0)
backward = jax.jit(jaxbp.backward, static_argnums=0)
factors = jax.jit(jaxbp.factors, static_argnums=0)
gradient = jax.jit(jaxbp.gradient)
value_and_grad = jax.jit(jaxbp.value_and_grad, static_argnums=0)
oracle = jax.jit(oracles.value_and_grad, static_argnums=0)

NET = MLP((5, 7, 6, 4), hidden=("tanh", "gelu"), output="softplus", loss="squared_error")
NETS = [
    NET,
    MLP((3, 4), loss="squared_error"),
    MLP((5, 8, 3), "silu"),
    MLP((5, 7, 6, 4), ("relu", "elu"), loss="hinge"),
]


def tol(dtype, net):
    return tolerance(dtype, len(net.sizes), max(net.sizes))


# The lecture --------------------------------------------------------------------------------------------------------


@in_both_dtypes
def test_forward_is_the_lectures_recursion(dtype):
    """x⁽⁰⁾ = x, s⁽ˡ⁾ = w⁽ˡ⁾ x⁽ˡ⁻¹⁾ + b⁽ˡ⁾, x⁽ˡ⁾ = σ(s⁽ˡ⁾): each line by itself, from the tape's own x⁽ˡ⁻¹⁾."""
    params, x, _ = oracles.data(NET, seed=0, batch=1, dtype=dtype)
    tape = forward(NET, params, x[0])
    assert_same_bits(tape.x[0], x[0])
    assert len(tape.x) == 4 and len(tape.s) == 3
    for (w, b), sigma, x_in, s, x_out in zip(params, oracles.sigmas(NET), tape.x, tape.s, tape.x[1:], strict=False):
        assert_close(s, w @ x_in + b, tol(dtype, NET), "s")
        assert_close(x_out, sigma(s), tol(dtype, NET), "x")


@pytest.mark.parametrize(("net", "dtype"), [(NET, jnp.float32), *((net, jnp.float64) for net in NETS)], ids=str)
def test_each_equation_of_the_backward_pass(net, dtype):
    """∂ℓ/∂x⁽ˡ⁾, ∂ℓ/∂s⁽ˡ⁾, ∂ℓ/∂w⁽ˡ⁾, ∂ℓ/∂b⁽ˡ⁾ for every l, each against jax.grad of the rest of the network there:
    a wrong layer's w or σ′, a missing transpose, is caught where it is, not only in a final gradient."""
    params, x, y = oracles.data(net, seed=1, batch=1, dtype=dtype)
    y, sigmas, ell = y[0], oracles.sigmas(net), oracles.LOSSES[net.loss]

    @jax.jit
    def ours(params, x):
        tape = jaxbp.forward(net, params, x)
        dl_dx = losses.get(net.loss).dl_dx(tape.x[-1], y)
        deltas = jaxbp.backward(net, params, tape, dl_dx)
        dl_dxs = [w.T @ delta for (w, _), delta in zip(params, deltas, strict=True)]  # ∂ℓ/∂x⁽ˡ⁻¹⁾ = (w⁽ˡ⁾)ᵀ ∂ℓ/∂s⁽ˡ⁾
        grads = [Affine(w=jnp.outer(delta, x), b=delta) for delta, x in zip(deltas, tape.x[:-1], strict=True)]
        return tape, [*dl_dxs, dl_dx], deltas, grads

    @jax.jit
    def autodiff(tape):
        def rest_from_x(layer, x):
            return ell(oracles.network(sigmas[layer:], params[layer:], x), y)

        def rest_from_s(layer, s):
            return rest_from_x(layer + 1, sigmas[layer](s))

        def rest_from_params(layer, affine):
            return rest_from_s(layer, affine.w @ tape.x[layer] + affine.b)

        layers = range(len(params))
        return (
            [jax.grad(rest_from_x, 1)(layer, x) for layer, x in enumerate(tape.x)],
            [jax.grad(rest_from_s, 1)(layer, tape.s[layer]) for layer in layers],
            [jax.grad(rest_from_params, 1)(layer, params[layer]) for layer in layers],
        )

    tape, dl_dx, deltas, grads = ours(params, x[0])
    want_dx, want_ds, want_params = autodiff(tape)
    assert_close(dl_dx, want_dx, tol(dtype, net), "∂ℓ/∂x")
    assert_close(deltas, want_ds, tol(dtype, net), "∂ℓ/∂s")
    assert_close(grads, want_params, tol(dtype, net), "∂ℓ/∂w, ∂ℓ/∂b")


@in_both_dtypes
def test_network_jacobian_is_the_product_of_the_layers_jacobians(dtype):
    """J_f = Π diag(σ′(s⁽ˡ⁾)) w⁽ˡ⁾, against jax.jacfwd of our forward, which is plain JAX."""
    params, x, _ = oracles.data(NET, seed=2, batch=1, dtype=dtype)
    tape = forward(NET, params, x[0])
    product = jnp.eye(NET.sizes[0], dtype=dtype)
    for (w, _), sigma, s, x_out in zip(params, NET.activations, tape.s, tape.x[1:], strict=True):
        product = jnp.diag(sigma.dsigma(s, x_out)) @ w @ product
    assert_close(
        product, jax.jit(jax.jacfwd(lambda x: jaxbp.forward(NET, params, x).x[-1]))(x[0]), tol(dtype, NET), "J"
    )


def test_forward_has_forward_mode():
    """⟨Jv, u⟩ = ⟨v, Jᵀu⟩: jvp through forward, Jᵀu by our backward."""
    params, x, _ = oracles.data(NET, seed=2, batch=2)
    _, jv = jax.jvp(lambda x: jaxbp.forward(NET, params, x).x[-1], (x[0],), (x[1],))
    u = jnp.arange(1.0, 5)
    jtu = params[0].w.T @ backward(NET, params, forward(NET, params, x[0]), u)[0]
    np.testing.assert_allclose(jv @ u, x[1] @ jtu, rtol=1e-12)


@pytest.mark.production
@in_both_dtypes
def test_backward_is_linear(dtype):
    """In dl_dx: 0 gives exactly 0, a power of two comes out exactly, and sums add up."""
    params, x, _ = oracles.data(NET, seed=3, batch=1, dtype=dtype)
    tape = forward(NET, params, x[0])
    u, v = jax.random.normal(jax.random.key(0), (2, 4), dtype)
    du, dv = (backward(NET, params, tape, a) for a in (u, v))
    assert_same_bits(backward(NET, params, tape, jnp.zeros(4, dtype)), jax.tree.map(jnp.zeros_like, du))
    for scale in (2.0**20, -(2.0**-20)):
        assert_same_bits(backward(NET, params, tape, scale * u), jax.tree.map(lambda d, c=scale: c * d, du))
    assert_close(backward(NET, params, tape, u + v), jax.tree.map(jnp.add, du, dv), 4 * tol(dtype, NET), "linear")


# The gradient against autodiff --------------------------------------------------------------------------------------

ARRAY_LOSSES = [name for name, loss in losses.LOSSES.items() if "array" in loss.target]
LABEL_LOSSES = [name for name, loss in losses.LOSSES.items() if "label" in loss.target]


@functools.cache
def any_activation_any_loss(names, target):
    """Ours and the oracle's value and gradient with hidden and output σ number i and loss number j: one compilation."""
    ours, theirs = [losses.LOSSES[name] for name in names], [oracles.LOSSES[name] for name in names]
    table = list(activations.ACTIVATIONS.values())

    @jax.jit
    def run(i, j, params, x, y):
        sigma = Activation(
            "any",
            lambda s: jax.lax.switch(i, [a.sigma for a in table], s),
            lambda s, x: jax.lax.switch(i, [a.dsigma for a in table], s, x),
        )
        loss = Loss(
            "any",
            lambda x, y: jax.lax.switch(j, [loss.ell for loss in ours], x, y),
            lambda x, y: jax.lax.switch(j, [loss.dl_dx for loss in ours], x, y),
            target=target,
        )

        def mean(params):
            s = lambda s: jax.lax.switch(i, [oracles.SIGMAS[a.name] for a in table], s)  # noqa: E731
            f = lambda x: oracles.network([s, s], params, x)  # noqa: E731
            return jnp.mean(jax.vmap(lambda x, y: jax.lax.switch(j, theirs, f(x), y))(x, y))

        net = MLP((4, 6, 5), hidden=sigma, output=sigma, loss=loss)
        return jaxbp.value_and_grad(net, params, x, y), jax.value_and_grad(mean)(params)

    return run


@pytest.mark.parametrize("loss", one_in(9, [*losses.LOSSES]))
def test_every_activation_with_every_loss(loss):
    """20 × 9 networks in f64, value and every leaf."""
    names, target = (tuple(LABEL_LOSSES), "label") if loss in LABEL_LOSSES else (tuple(ARRAY_LOSSES), "array")
    run = any_activation_any_loss(names, target)
    for i, sigma in enumerate(activations.ACTIVATIONS):
        params, x, y = oracles.data(MLP((4, 6, 5), loss=loss), seed=i, batch=8)
        got, want = run(i, names.index(loss), params, x, y)
        assert max(map(np.max, map(np.abs, jax.tree.leaves(want)))) > 1e-3, "no gradient to compare"
        assert_close(got, want, 1e-12, f"{sigma}, {loss}")


@st.composite
def networks(draw):
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 17, 33]), min_size=2, max_size=7))
    sigma = st.sampled_from(sorted(activations.ACTIVATIONS))
    hidden = [draw(sigma) for _ in sizes[2:]]
    return tuple(sizes), hidden, draw(sigma), draw(st.sampled_from(sorted(losses.LOSSES)))


@jax.jit
def to_float64(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, tree)


@pytest.mark.slow
@pytest.mark.production
@settings(max_examples=8)
@given(network=networks(), batch=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_generated_networks(network, batch, seed):
    """f64: 1e-12 a leaf. f32: our error against f64 at most four times jax.grad's own. Where jax is exact by luck the
    floor is 2 ε a layer: s, x, δ and wᵀδ are rounded once each, by ε/2."""
    net = MLP(*network)  # not in the strategy: beartype draws random numbers
    params, x, y = oracles.data(net, seed, batch, jnp.float32)

    @jax.jit
    def run(params, x, y):
        wide = to_float64((params, x, y))
        return [f(net, *a) for a in ((params, x, y), wide) for f in (jaxbp.value_and_grad, oracles.value_and_grad)]

    ours32, jax32, ours64, jax64 = run(params, x, y)
    assert_close(ours64, jax64, 1e-12, str(net))
    floor = 2 * float(jnp.finfo(jnp.float32).eps) * len(params)
    for ours, theirs in zip(leaf_errors(ours32, jax64), leaf_errors(jax32, jax64), strict=True):
        assert ours <= max(4 * theirs, floor)


def bfloat16_bound(params, x, y):
    """First-order running error analysis of the tanh network with ½‖x − y‖², u = 2⁻⁸ a rounding, sums in f32: how far
    off each leaf may be. `e_·` bounds the error of `·`: a product passes on |w| e and adds its own roundings."""
    u, e_x, tape = 2.0**-8, jnp.zeros_like(x), []
    for w, b in params:
        s = x @ w.T + b[None]
        e_s = e_x @ abs(w.T) + u * (abs(x @ w.T) + abs(s))  # the product and the sum are rounded
        tape.append((w, x, e_x))
        x = jnp.tanh(s)
        e_x = e_s + 2 * u  # |tanh′| ≤ 1; tanh is good to two roundings
        tape[-1] += (x, e_x)
    d, e_d, bounds = (x - y) / len(x), (e_x + u * abs(x - y)) / len(x), []
    for w, x_in, e_in, x, e_x in reversed(tape):
        slope, e_slope = 1 - x**2, 2 * e_x + 4 * u  # (1 − x)(1 + x)
        delta = d * slope
        e_delta = e_d * slope + abs(d) * e_slope + u * abs(delta)
        gw, gb = delta.T @ x_in, delta.sum(0)
        bounds.append(Affine(e_delta.T @ abs(x_in) + abs(delta).T @ e_in + u * abs(gw), e_delta.sum(0) + u * abs(gb)))
        d, e_d = delta @ w, e_delta @ abs(w) + u * abs(delta @ w)
    return tuple(reversed(bounds))


@pytest.mark.production
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_bfloat16_is_within_the_running_error_bound(depth):
    """Elementwise; the bound grows with u × depth. N = 8, so that 1/N is exact."""
    net = MLP((6, *[8] * (depth - 1), 4), hidden="tanh", output="tanh", loss="squared_error")
    low = oracles.data(net, seed=depth, batch=8, dtype=jnp.bfloat16, spread=1.0)
    exact = jax.tree.map(lambda a: a.astype(jnp.float64), low)
    loss, grads = value_and_grad(net, *low)
    want_grads = oracle(net, *exact)[1]
    bound = jax.jit(bfloat16_bound)(*exact)
    for got, exact_leaf, limit in zip(*map(jax.tree.leaves, (grads, want_grads, bound)), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.all(np.abs(np.asarray(got, float) - exact_leaf) <= limit)
    assert loss.dtype == jnp.float32


def test_bfloat16_mean_loss_is_the_mean_of_the_float32_losses():
    """1/N is not rounded to bf16, where 1/3 is off by 0.2 %. N ε: a sum of N positive terms."""
    net = MLP((6, 4, 4), loss="squared_error")
    params, x, y = oracles.data(net, seed=0, batch=3, dtype=jnp.bfloat16)
    per_sample = factors(net, params, x, y)[0]
    assert per_sample.dtype == jnp.float32
    np.testing.assert_allclose(value_and_grad(net, params, x, y)[0], np.mean(per_sample), rtol=3 * 1.2e-7)


@pytest.mark.production
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float64, jnp.uint8])
def test_dtypes_follow_the_parameters(dtype, x_dtype):
    """Whatever x and y are: float64 from NumPy, uint8 pixels. The result is that of the x cast beforehand."""
    net = MLP((5, 4, 3), loss="squared_error")
    params, x, y = oracles.data(net, seed=0, batch=4, dtype=dtype)
    x, y = jnp.abs(jnp.round(10 * x)).astype(x_dtype), y.astype(jnp.float64)
    loss, grads = value_and_grad(net, params, x, y)
    assert loss.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert_same_bits(grads, value_and_grad(net, params, x.astype(dtype), y)[1])
    for tree in (grads, jaxbp.update(params, grads, 0.1), jaxbp.update(params, grads, jnp.float64(0.1))):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(tree))


# The scaling contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "batch", "dtype"),
    [(NET, 9, jnp.float32), (NET, 1, jnp.float64), *((net, 9, jnp.float64) for net in NETS)],
    ids=str,
)
def test_gradient_of_factors_is_value_and_grad_is_autodiff(net, batch, dtype):
    @jax.jit
    def run(*data):
        per_sample, f = jaxbp.factors(net, *data)
        ours = jaxbp.value_and_grad(net, *data), (jnp.mean(per_sample), jaxbp.gradient(f))
        return per_sample, ours, oracles.value_and_grad(net, *data)

    per_sample, ours, want = run(*oracles.data(net, seed=4, batch=batch, dtype=dtype))
    for got in ours:
        assert_close(got, want, tol(dtype, net), str(net))
    assert per_sample.shape == (batch,)


@in_both_dtypes
def test_factors_belong_to_one_sample(dtype):
    """Row n of the factors is what the batch of sample n alone gives: no 1/N, no leak between rows; so the samples'
    losses and gradients are autodiff's, and their sum is the batch's."""
    params, x, y = oracles.data(NET, seed=5, batch=6, dtype=dtype)
    per_sample, f = factors(NET, params, x, y)
    for n in range(6):
        loss, alone = factors(NET, params, x[n : n + 1], y[n : n + 1])
        assert_close(
            (loss, alone), (per_sample[n : n + 1], jax.tree.map(lambda a, n=n: a[n : n + 1], f)), tol(dtype, NET)
        )
    grads = jax.tree.map(lambda a: a.sum(0), jax.jit(oracles.per_sample_gradients, static_argnums=0)(NET, params, x, y))
    assert_close(gradient(f, normalize_by=1), grads, tol(dtype, NET), "sum of the samples")
    assert_close(per_sample, oracles.losses(NET, params, x, y), tol(dtype, NET), "ℓₙ")


@pytest.mark.production
@pytest.mark.parametrize("hidden", ["gelu", "silu"])
def test_nothing_but_the_tape_is_kept_for_the_backward_pass(hidden):
    """s and x of a layer, as relu keeps them; what σ and σ′ have in common, such as erfc, would be more."""

    def scratch(hidden):
        net = MLP((20, 200, 200, 10), hidden)
        params, x, y = oracles.data(net, seed=0, batch=128, dtype=jnp.float32)
        return value_and_grad.lower(net, params, x, y).compile().memory_analysis().temp_size_in_bytes

    assert scratch(hidden) <= scratch("relu")


@pytest.mark.production
def test_two_calls_give_the_same_bits():
    data = oracles.data(NET, seed=6, batch=5, dtype=jnp.float32)
    assert_same_bits(value_and_grad(NET, *data), value_and_grad(NET, *data))
    assert_same_bits(factors(NET, *data), factors(NET, *data))


@pytest.mark.production
def test_jit_is_eager():
    """Fusion may change roundings, nothing else."""
    net = MLP((5, 3), output="tanh")
    data = oracles.data(net, seed=6, batch=5, dtype=jnp.float32)
    assert_close(value_and_grad(net, *data), jaxbp.value_and_grad(net, *data), tol(jnp.float32, net), "jit")


@in_both_dtypes
def test_weights_and_normalize_by(dtype):
    """Σₙ weightsₙ gₙ / N, and / normalize_by where given, a traced one too."""
    weights, divisors = jnp.array([1.0, 0.0, 0.5, -2.0, 3.0], dtype), [(None, 5), (2.5, 2.5), (jnp.int32(4), 4)]

    @jax.jit
    def run(params, x, y):
        triples = []
        each, ell = oracles.per_sample_gradients(NET, params, x, y), oracles.losses(NET, params, x, y)
        _, f = jaxbp.factors(NET, params, x, y)
        for normalize_by, divisor in divisors:
            want = weights @ ell / divisor, jax.tree.map(lambda g, d=divisor: jnp.tensordot(weights, g, 1) / d, each)
            ours = jaxbp.value_and_grad(NET, params, x, y, weights, normalize_by)
            triples.append((ours, (want[0], jaxbp.gradient(f, weights, normalize_by)), want))
        return triples

    for ours, by_factors, want in run(*oracles.data(NET, seed=7, batch=5, dtype=dtype)):
        assert_close(ours, want, 2 * tol(dtype, NET), "weights")  # a factor and a divisor more
        assert_close(by_factors, want, 2 * tol(dtype, NET), "weights")


@pytest.mark.parametrize("where", ["x", "y", "both"])
def test_a_nan_sample_of_weight_zero_does_not_leak(where):
    """And one of weight 1 does show."""
    params, x, y = oracles.data(NET, seed=8, batch=4)
    bad_x, bad_y = x.at[2].set(jnp.nan if where != "y" else 1), y.at[2].set(jnp.nan if where != "x" else 1)
    weights, rest = jnp.array([1.0, 1, 0, 1]), jnp.array([0, 1, 3])
    want = value_and_grad(NET, params, x[rest], y[rest])
    assert_close(value_and_grad(NET, params, bad_x, bad_y, weights, 3), want, 1e-12)
    assert_close(gradient(factors(NET, params, bad_x, bad_y)[1], weights, 3), want[1], 1e-12)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(value_and_grad(NET, params, bad_x, bad_y)))


def test_unequal_batches_add_up():
    """3 + 4 samples with normalize_by=7 are the mean over 7."""
    params, x, y = oracles.data(NET, seed=9, batch=7)
    parts = [value_and_grad(NET, params, x[rows], y[rows], None, 7) for rows in (slice(3), slice(3, 7))]
    assert_close(jax.tree.map(jnp.add, *parts), value_and_grad(NET, params, x, y), 1e-12, "3 + 4")


@pytest.mark.parametrize("net", NETS[1:3], ids=str)
@pytest.mark.parametrize("batch", [0, 3])
def test_an_empty_or_all_masked_batch_is_zero(net, batch):
    """Loss 0 and gradient 0, not 0/0, also where normalize_by is the sum of the weights."""
    params, x, y = oracles.data(net, seed=0, batch=3, dtype=jnp.float32)

    @jax.jit
    def run(params, x, y, weights):
        f = jaxbp.factors(net, params, x, y)[1]
        options = [(weights,), (weights, jnp.sum(weights))] + ([] if batch else [()])
        return [(jaxbp.value_and_grad(net, params, x, y, *o), (0.0, jaxbp.gradient(f, *o))) for o in options]

    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(run(params, x[:batch], y[:batch], jnp.zeros(batch))))


@pytest.mark.devices
def test_sharded_batch_gives_the_same_gradient():
    """Samples over four devices, parameters on all of them."""
    params, x, y = oracles.data(NET, seed=10, batch=8)
    mesh = Mesh(np.array(jax.devices()), ("n",))
    want = value_and_grad(NET, params, x, y)
    x, y = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("n")))
    assert len(x.sharding.device_set) == 4
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert_close(value_and_grad(NET, params, x, y), want, 1e-12, "sharded")
    assert_close(gradient(factors(NET, params, x, y)[1]), want[1], 1e-12, "sharded")


# update, init, MLP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_update_is_the_step_on_any_pytree(dtype):
    tree = {"a": jnp.array([1.0, 2.0], dtype), "b": [jnp.array(3.0, dtype)]}
    new = jaxbp.update(tree, jax.tree.map(lambda a: 2 * a, tree), 0.25)
    assert_same_bits(new, {"a": jnp.array([0.5, 1.0], dtype), "b": [jnp.array(1.5, dtype)]})


def test_update_descends():
    """Sign: a small step lowers the loss by about η‖g‖²; the remainder is of second order, here below 10 %."""
    params, x, y = oracles.data(NET, seed=11, batch=5)
    loss, grads = value_and_grad(NET, params, x, y)
    after = value_and_grad(NET, jaxbp.update(params, grads, 1e-5), x, y)[0]
    np.testing.assert_allclose(
        loss - after, 1e-5 * sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads)), rtol=0.1
    )


def test_init_shapes_keys_and_layers():
    net = MLP((6, 6, 6, 3))
    params = jaxbp.init(net, jax.random.key(0), bias="normal")
    assert [(p.w.shape, p.b.shape) for p in params] == [((6, 6), (6,)), ((6, 6), (6,)), ((3, 6), (3,))]
    assert_same_bits(params, jaxbp.init(net, jax.random.key(0), bias="normal"))
    other = jaxbp.init(net, jax.random.key(1), bias="normal")
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))
    assert np.any(params[0].w != params[1].w) and np.any(params[0].b != params[1].b)
    assert np.all(jaxbp.init(net, jax.random.key(0))[0].b == 0)


def test_mlp_is_a_static_argument():
    """Equal nets hash alike, so that jit compiles once; a list of hidden activations is accepted too."""
    nets = [MLP((2, 3, 3, 1), hidden, loss="huber") for hidden in (["relu", "tanh"], ("relu", "tanh"))]
    assert nets[0] == nets[1] and hash(nets[0]) == hash(nets[1])
    assert [a.name for a in nets[0].activations] == ["relu", "tanh", "identity"]
    traces = []
    run = jax.jit(lambda net, x: (traces.append(net), x)[1], static_argnums=0)
    run(nets[0], 1.0), run(nets[1], 1.0)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (3,)}, r"sizes is \(3,\), it needs at least an input and an output size"),
        ({"sizes": (3, 0)}, r"sizes has 0, every size must be a positive integer"),
        ({"sizes": (3, -1, 2)}, r"sizes has -1, every size"),
        ({"sizes": (3, True)}, r"sizes has True, every size"),
        ({"sizes": (3, 2, 1), "hidden": ("relu", "tanh")}, r"hidden has 2 activations, sizes \(3, 2, 1\) has 1 hidden"),
        ({"sizes": (3, 2, 1), "hidden": "rellu"}, r"unknown activation 'rellu', did you mean 'relu'"),
        ({"sizes": (3, 1), "output": "tan"}, r"unknown activation 'tan', did you mean 'tanh'"),
        ({"sizes": (3, 1), "loss": "hubert"}, r"unknown loss 'hubert', did you mean 'huber'"),
    ],
)
def test_a_bad_network_is_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(**arguments)


LABELS = MLP((3, 4, 2))
NUMBERS = MLP((3, 4, 2), loss="squared_error")
PARAMS = (Affine(jnp.ones((4, 3)), jnp.ones(4)), Affine(jnp.ones((2, 4)), jnp.ones(2)))
TAPE = jaxbp.Tape((jnp.ones(3), jnp.ones(4), jnp.ones(2)), (jnp.ones(4), jnp.ones(2)))
X, Y = jnp.ones((5, 3)), jnp.zeros(5, int)
WRONG_W, WRONG_B = (
    (Affine(jnp.ones((3, 4)), jnp.ones(4)), PARAMS[1]),
    (PARAMS[0], Affine(jnp.ones((2, 4)), jnp.ones(4))),
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxbp.forward(LABELS, PARAMS, jnp.ones(4)), ValueError, r"x has shape \(4,\), expected \(3,\)"),
        (lambda: jaxbp.forward(LABELS, PARAMS, X), ValueError, r"x has shape \(5, 3\), expected \(3,\)"),
        (lambda: jaxbp.forward(LABELS, PARAMS[:1], X[0]), ValueError, r"params has 1 layers, sizes \(3, 4, 2\) has 2"),
        (
            lambda: jaxbp.forward(LABELS, WRONG_W, X[0]),
            ValueError,
            r"w of layer 1 has shape \(3, 4\), expected \(4, 3\)",
        ),
        (lambda: jaxbp.forward(LABELS, WRONG_B, X[0]), ValueError, r"b of layer 2 has shape \(4,\), expected \(2,\)"),
        (
            lambda: jaxbp.backward(LABELS, PARAMS, TAPE, jnp.ones(3)),
            ValueError,
            r"dl_dx has shape \(3,\), expected \(2,\)",
        ),
        (lambda: jaxbp.backward(LABELS, WRONG_W, TAPE, jnp.ones(2)), ValueError, r"w of layer 1 has shape \(3, 4\)"),
        (lambda: jaxbp.factors(LABELS, PARAMS, X[0], Y), ValueError, r"x has shape \(3,\), expected \(N, 3\)"),
        (
            lambda: jaxbp.factors(LABELS, PARAMS, X, Y[:4]),
            ValueError,
            r"y .* has shape \(4,\), expected \(5, 2\) or \(5,\)",
        ),
        (
            lambda: jaxbp.factors(NUMBERS, PARAMS, X, Y),
            ValueError,
            r"y of squared_error has shape \(5,\), expected \(5, 2\)",
        ),
        (lambda: jaxbp.factors(LABELS, PARAMS, X, Y + 2), ValueError, r"y\[0\] is 2, expected a label in 0 … 1"),
        (lambda: jaxbp.factors(LABELS, PARAMS, X, jnp.ones(5)), TypeError, r"y holds labels and has dtype float64"),
        (
            lambda: jaxbp.value_and_grad(LABELS, PARAMS, X[:, :2], Y),
            ValueError,
            r"x has shape \(5, 2\), expected \(N, 3\)",
        ),
        (
            lambda: jaxbp.value_and_grad(LABELS, PARAMS, X, jnp.ones(5)),
            TypeError,
            r"labels have to be integers in 0 … 1",
        ),
        (
            lambda: jaxbp.value_and_grad(LABELS, PARAMS, X, Y, X),
            ValueError,
            r"weights has shape \(5, 3\), expected \(5,\)",
        ),
        (
            lambda: jaxbp.value_and_grad(LABELS, WRONG_B, X, Y),
            ValueError,
            r"b of layer 2 has shape \(4,\), expected \(2,\)",
        ),
        (
            lambda: jaxbp.gradient(Factors((X,), (X,)), jnp.ones(4)),
            ValueError,
            r"weights has shape \(4,\), expected \(5,\)",
        ),
        (lambda: jaxbp.apply(LABELS, PARAMS, jnp.ones((2, 4))), ValueError, r"x has shape \(4,\), expected \(3,\)"),
        (lambda: jaxbp.apply(LABELS, PARAMS[:1], X), ValueError, r"params has 1 layers, sizes \(3, 4, 2\) has 2"),
    ],
)
def test_wrong_arguments_name_themselves_and_both_shapes(call, error, message):
    with pytest.raises(error, match=message):
        call()


# What the library does not do ---------------------------------------------------------------------------------------

SOURCE = pathlib.Path(jaxbp.__file__).parent
AUTODIFF = {
    "grad",
    "value_and_grad",
    "vjp",
    "jvp",
    "linearize",
    "linear_transpose",
    "jacfwd",
    "jacrev",
    "jacobian",
    "hessian",
}


def autodiff_in(source):
    """Names of autodiff that the source takes from jax: jax.grad, `from jax import grad`, jax.ad_checkpoint.…"""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in ("jax", "jnp", "lax"):
            names.add(node.attr)
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("jax")
            and not node.module.startswith("jaxbp")
        ):
            names |= {alias.name for alias in node.names}
    return names & AUTODIFF


MODULES = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != "checker"]  # compares with it


def test_the_gradient_path_has_these_modules():
    found = {path.relative_to(SOURCE).with_suffix("").parts[0] for path in MODULES}
    assert {"activations", "losses", "mlp", "interop", "memory", "persample", "run"} < found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_autodiff_in_the_gradient_path(path):
    assert autodiff_in(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("line", ["jax.grad(f)(x)", "from jax import vjp", "jax.jvp(f, x, v)", "jax.value_and_grad(f)"])
def test_the_search_for_autodiff_finds_it(line):
    assert autodiff_in(line)


def test_import_has_no_side_effects():
    """No global setting, no backend, none of the runner's libraries."""
    script = """
import sys, jax
from jax._src import xla_bridge
before = dict(jax.config.values)
import jaxbp
assert dict(jax.config.values) == before, "jax.config"
assert not xla_bridge._backends, "a backend was started"
heavy = {"optax", "matplotlib", "pydantic", "sklearn", "chex", "tyro", "rich"} & sys.modules.keys()
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=SOURCE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_what_is_almost_right_is_named():
    """As a user's process sees it, whose types beartype does not check first."""
    script = """
import jax, jaxbp
wrongs = (
    lambda: jaxbp.MLP(4, 8, 3),
    lambda: jaxbp.MLP((4, 3), jax.nn.relu),
    lambda: jaxbp.MLP((4, 3), loss=lambda x, y: x),
    lambda: jaxbp.init(jaxbp.MLP((4, 3)), 0),
)
for wrong in wrongs:
    try:
        wrong()
    except TypeError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=SOURCE.parent, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "sizes is 4, expected all widths in one sequence, such as MLP((4, 8, 3))",
        "hidden is a function, expected a name or, with its derivative, a jaxbp.Activation(name, sigma, dsigma)",
        "loss is a function, expected a name or, with its derivative, a jaxbp.Loss(name, ell, dl_dx)",
        "key is 0, expected a key of jax.random, such as jax.random.key(0)",
    ]


def test_factors_and_tapes_are_shown_by_their_shapes():
    f = jaxbp.Factors((np.zeros((9, 4), np.float32), np.zeros((9, 8))), (np.zeros((9, 8)), np.zeros((9, 3))))
    assert repr(f) == "Factors(x=(float32[9, 4], float64[9, 8]), delta=(float64[9, 8], float64[9, 3]))"
    assert repr(jaxbp.Tape((np.zeros(2), None), (0,))) == "Tape(x=(float64[2], None), s=(0))"
    assert jaxbp.Tape(("a", "b"), ("c",))._repr_html_() == (
        "<table><tr><td>x</td><td>s</td></tr><tr><td>'a'</td><td>'c'</td></tr><tr><td>'b'</td><td></td></tr></table>"
    )
