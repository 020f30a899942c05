"""ℓ and ∂ℓ/∂x against optax, plain jnp and autodiff; kinks, edges, label dtypes and the table of edge values."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import oracles
import pytest

import jaxbp
from jaxbp import losses
from jaxbp.losses import LOSSES, smoothed_softmax_cross_entropy

N, C = 64, 5
value_and_grad = jax.jit(jaxbp.value_and_grad, static_argnums=0)
WIDE = [jnp.float64, jnp.float32]
every_loss = pytest.mark.parametrize("name", LOSSES)
both_targets = pytest.mark.parametrize(
    ("name", "labels"), [*((name, True) for name in LOSSES), ("softmax_cross_entropy", False)]
)


def batch(name, dtype, labels=True, scale=3.0):
    """x (N, C) that reaches both branches of every piecewise rule, and y."""
    rng = np.random.default_rng(7)
    x = jnp.asarray((scale * rng.standard_normal((N, C))).astype(dtype))
    return x, oracles.targets(name, rng, (N, C), dtype, labels)


@functools.cache
def compiled(loss):
    return jax.jit(jax.vmap(lambda x, y: (loss.ell(x, y), loss.dl_dx(x, y))))


def both(loss, x, y):
    """ℓₙ (N,) and ∂ℓₙ/∂x (N, C)."""
    value, slope = compiled(loss)(x, y)
    return np.asarray(value), np.asarray(slope)


def one(name, x, y, dtype=jnp.float32):
    """ℓ and ∂ℓ/∂x of one sample."""
    y = np.array([y]) if isinstance(y, int) else np.array([y], dtype)
    value, slope = both(losses.get(name), np.array([x], dtype), y)
    return value[0], slope[0]


def test_every_loss_has_its_oracle():
    assert LOSSES.keys() == oracles.LOSSES.keys()
    assert all(name == loss.name for name, loss in LOSSES.items())


@pytest.mark.parametrize("dtype", WIDE)
@both_targets
def test_value_and_gradient_against_an_independent_formula(name, labels, dtype):
    """The reference runs in f64 on the same numbers. (C + 8) ε (1 + max|x|): C terms summed, about eight roundings in a
    term, and eˣ multiplies the relative error of its argument by |x|; relative to what is added, max(|ℓ|, eˣ, 1)."""
    x, y = batch(name, dtype, labels)
    value, slope = both(LOSSES[name], x, y)
    exact = x.astype(jnp.float64), (y if y.dtype.kind == "i" else y.astype(jnp.float64))
    want, want_slope = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(oracles.LOSSES[name])))(*exact))
    bound = (C + 8) * np.finfo(dtype).eps * (1 + np.max(np.abs(exact[0])))
    terms = np.max(np.exp(exact[0]), axis=1) if name == "poisson" else 1.0
    assert np.all(abs(value - want) <= bound * np.maximum(abs(want), terms))
    assert np.all(abs(slope - want_slope) <= bound * np.maximum(1, abs(want_slope)))


@pytest.mark.parametrize("dtype", WIDE)
@both_targets
def test_gradient_is_autodiff_of_the_librarys_own_ell(name, labels, dtype):
    """The same bound, twice: autodiff rounds as often as we do."""
    x, y = batch(name, dtype, labels)
    slope = both(LOSSES[name], x, y)[1]
    want = np.asarray(jax.jit(jax.vmap(jax.grad(LOSSES[name].ell)))(x, y))
    bound = 2 * (C + 8) * np.finfo(dtype).eps * (1 + np.max(np.abs(x)))
    assert np.all(abs(slope - want) <= bound * np.maximum(1, abs(want)))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@both_targets
def test_dtype_is_kept(name, labels, dtype):
    x, y = batch(name, dtype, labels)
    value, slope = both(LOSSES[name], x, y)
    assert value.dtype == slope.dtype == dtype and value.shape == (N,) and slope.shape == (N, C)


@both_targets
def test_sum_over_outputs_of_one_sample(name, labels):
    """Per sample, never divided by C or N: doubling the outputs of an elementwise loss doubles it."""
    if LOSSES[name].target == "array" and name != "kl_divergence":
        x, y = batch(name, jnp.float64)
        once, twice = both(LOSSES[name], x, y)[0], both(LOSSES[name], jnp.tile(x, 2), jnp.tile(y, 2))[0]
        np.testing.assert_allclose(twice, 2 * once, rtol=1e-14)
    assert both(LOSSES[name], *batch(name, jnp.float64, labels))[0].shape == (N,)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9])
def test_label_smoothing_is_optax(alpha, dtype):
    loss = smoothed_softmax_cross_entropy(alpha)
    x, y = batch("softmax_cross_entropy", dtype)
    smooth = optax.smooth_labels(jax.nn.one_hot(y, C, dtype=jnp.float64), alpha)
    autodiff = jax.jit(jax.vmap(jax.value_and_grad(optax.softmax_cross_entropy)))
    want, slope = map(np.asarray, autodiff(x.astype(jnp.float64), smooth))
    bound = (C + 8) * np.finfo(dtype).eps * (1 + np.max(np.abs(x)))
    for got in (both(loss, x, y), both(loss, x, jax.nn.one_hot(y, C, dtype=dtype))):
        assert np.all(abs(got[0] - want) <= bound * np.maximum(1, abs(want)))
        assert np.all(abs(got[1] - slope) <= bound)


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_label_smoothing_out_of_range(alpha):
    with pytest.raises(ValueError, match=rf"label_smoothing is {alpha}, allowed: 0 ≤ label_smoothing < 1"):
        smoothed_softmax_cross_entropy(alpha)


def test_smoothed_losses_are_one_object_each():
    """So that an MLP with one is the same static argument of jit every time."""
    assert smoothed_softmax_cross_entropy(0.1) is smoothed_softmax_cross_entropy(0.1)


def test_integer_and_one_hot_labels_agree():
    x, y = batch("softmax_cross_entropy", jnp.float64)
    loss = LOSSES["softmax_cross_entropy"]
    oracles.assert_same_bits(both(loss, x, y), both(loss, x, jax.nn.one_hot(y, C, dtype=x.dtype)))


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "hinge"])
def test_every_integer_dtype_is_the_same_label(name, kind):
    """C = 300: a uint8 label compared as uint8 would match class 256 + label too. Sums of integers have no rounding."""
    x = jax.random.randint(jax.random.key(1), (2, 300), -9, 10).astype(jnp.float32)
    y = jnp.array([3, 127], kind)
    oracles.assert_same_bits(both(LOSSES[name], x, y), both(LOSSES[name], x, y.astype(jnp.int32)))


@pytest.mark.parametrize("name", LOSSES)
def test_nan_goes_through(name):
    """A NaN in x is a NaN in ℓ and in its own ∂ℓ/∂x, never a finite number; so is one in a target."""
    x, y = batch(name, jnp.float32)
    value, slope = both(LOSSES[name], x.at[3, 1].set(jnp.nan), y)
    assert np.isnan(value[3]) and np.isnan(slope[3, 1])
    assert np.isfinite(np.delete(value, 3)).all() and np.isfinite(np.delete(slope, 3, axis=0)).all()
    if y.ndim == 2:
        value, slope = both(LOSSES[name], x, y.at[3, 1].set(jnp.nan))
        assert np.isnan(value[3]) and np.isnan(slope[3, 1])


# Kinks, branches, extremes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE)
def test_absolute_error_at_zero_takes_the_left_slope(dtype):
    value, slope = one("absolute_error", [2.0, 2.0, 2.0], [2.0, 1.0, 3.0], dtype)
    assert value == 2 and slope.tolist() == [-1, 1, -1]


@pytest.mark.parametrize("dtype", WIDE)
def test_hinge_at_margin_zero_is_inactive(dtype):
    """Class 1 is exactly 1 below the label, class 2 violates; the label's slope is minus the number of violations."""
    value, slope = one("hinge", [3.0, 2.0, 2.5], 0, dtype)
    assert value == 0.5 and slope.tolist() == [-1, 0, 1]


@pytest.mark.parametrize("dtype", WIDE)
def test_huber_on_both_branches_and_where_they_meet(dtype):
    e = [0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 1e20]
    for error, value, slope in zip(
        e, [0.125, 0.125, 0.5, 0.5, 2.5, 2.5, 1e20], [0.5, -0.5, 1, -1, 1, -1, 1], strict=True
    ):
        got, got_slope = one("huber", [error], [0.0], dtype)
        assert got == np.asarray(value, dtype) and got_slope == slope


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("e", [1e-8, 1e-4, 0.3, 0.999, 1.0, 1.001, 5.0, 50.0, 1e4])
def test_log_cosh_keeps_relative_accuracy(e, dtype):
    """ln cosh e = e²/2 for small e and e − ln 2 for large: 8 ε relative, against mpmath. cosh overflows at 1e4."""
    value, slope = one("log_cosh", [e], [0.0], dtype)
    exact = mpmath.mpf(float(np.asarray(e, dtype)))
    for got, want in ((value, mpmath.log(mpmath.cosh(exact))), (slope[0], mpmath.tanh(exact))):
        assert abs(mpmath.mpf(float(got)) / want - 1) <= 8 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("x", [100.0, -100.0, 20.0, -20.0, 0.0])
@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
def test_sigmoid_cross_entropy_keeps_its_digits(x, y, dtype):
    """ln(1 + eˣ) − x y and σ(x) − y against mpmath, 4 ε relative where the truth is a normal number, even at y = 1."""
    got = one("sigmoid_cross_entropy", [x], [y], dtype)
    want = mpmath.log1p(mpmath.exp(mpmath.mpf(x))) - mpmath.mpf(x) * y, 1 / (1 + mpmath.exp(-mpmath.mpf(x))) - y
    for g, w in zip((got[0], got[1][0]), want, strict=True):
        assert abs(float(g) - float(w)) <= max(4 * np.finfo(dtype).eps * abs(float(w)), np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", WIDE)
def test_sigmoid_cross_entropy_at_infinity(dtype):
    """Matched: exactly 0. Not matched: ∞, slope ∓1."""
    for x, y, value, slope in ((np.inf, 1, 0, 0), (-np.inf, 0, 0, 0), (np.inf, 0, np.inf, 1), (-np.inf, 1, np.inf, -1)):
        got = one("sigmoid_cross_entropy", [x], [float(y)], dtype)
        assert got[0] == value and got[1] == slope


@pytest.mark.parametrize("dtype", WIDE)
def test_poisson_of_rate_zero(dtype):
    """x = −∞ is the rate 0: with a count of 0 it costs nothing, 0 · ∞ is 0 here."""
    assert [float(a) for a in map(np.squeeze, one("poisson", [-np.inf], [0.0], dtype))] == [0, 0]
    assert one("poisson", [-np.inf], [1.0], dtype)[0] == np.inf


# The table of verification.md, line by line, f32 --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "kl_divergence", "hinge"])
@pytest.mark.parametrize("as_label", [True, False])
def test_table_minus_infinite_logit_with_the_label_elsewhere(name, as_label):
    """The impossible class drops out: the same as without it."""
    x, without = [1.0, -np.inf, 2.0], [1.0, 2.0]
    if name == "hinge" or (as_label and name == "softmax_cross_entropy"):
        target, target_without = 2, 1
    else:
        target, target_without = [0.25, 0.0, 0.75], [0.25, 0.75]
    value, slope = one(name, x, target)
    want, want_slope = one(name, without, target_without)
    assert np.isfinite(value) and value == pytest.approx(want, rel=1.2e-7)
    np.testing.assert_allclose(slope, [want_slope[0], 0, want_slope[1]], rtol=2.4e-7)


LABEL_LOSSES = ["softmax_cross_entropy", "hinge", smoothed_softmax_cross_entropy(0.1)]


@pytest.mark.parametrize("loss", LABEL_LOSSES, ids=str)
@pytest.mark.parametrize(
    ("kind", "label"),
    [
        *(("int32", -1), ("int32", 3), ("int8", -128), ("uint8", 255), ("uint32", 2**32 - 1)),
        *(("int64", 2**32), ("int64", -1), ("uint64", 2**64 - 1)),
    ],
)
def test_table_label_out_of_range_is_nan(loss, kind, label):
    """Loss and gradient all NaN, whatever wraps where: 2³² is 0 as an int32."""
    value, slope = both(losses.get(loss), jnp.ones((2, 3)), jnp.asarray(np.array([2, label], kind)))
    assert np.isfinite(value[0]) and np.isfinite(slope[0]).all()
    assert np.isnan(value[1]) and np.isnan(slope[1]).all()


@pytest.mark.parametrize(
    ("loss", "kind", "label"), [*zip(LABEL_LOSSES, ("int64", "uint8", "int32"), (-1, 3, -1), strict=True)]
)
def test_table_label_out_of_range_in_a_network(loss, kind, label):
    """Outside jit: a ValueError that names the row. Inside: NaN loss and NaN gradient, never a finite wrong one."""
    net = jaxbp.MLP((2, 3), loss=loss)
    params, x = jaxbp.init(net, jax.random.key(0)), jnp.ones((3, 2))
    y = jnp.asarray(np.array([0, 2, label], kind))
    for function in (jaxbp.factors, jaxbp.value_and_grad):
        with pytest.raises(ValueError, match=rf"y\[2\] is {label}, expected a label in 0 … 2"):
            function(net, params, x, y)

    value, factors = jax.jit(jaxbp.factors, static_argnums=0)(net, params, x, y)
    assert np.isfinite(value[:2]).all() and np.isnan(value[2])
    assert np.isfinite(factors.delta[-1][:2]).all() and np.isnan(factors.delta[-1][2]).all()
    value, grads = value_and_grad(net, params, x, y)
    assert np.isnan(value) and all(np.isnan(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("loss", LOSSES)
def test_table_every_row_masked(loss):
    net = jaxbp.MLP((2, 3), loss=loss)
    params, x, y = oracles.data(net, seed=0, batch=5, dtype=jnp.float32)
    value, grads = value_and_grad(net, params, x, y, weights=jnp.zeros(5))
    assert value == 0 and all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "kl_divergence"])
def test_table_soft_labels_that_do_not_sum_to_one(name):
    """∂ℓ/∂x = (Σy) softmax(x) − y. 8 ε."""
    x, y = np.array([1.0, -2.0, 0.5]), np.array([0.5, 2.0, 0.25])
    want = y.sum() * np.exp(x) / np.exp(x).sum() - y
    np.testing.assert_allclose(one(name, x, y)[1], want, rtol=0, atol=8 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    ("x", "y", "value", "slope"),
    [
        *((100.0, 1.0, 0.0, 0.0), (-100.0, 0.0, 0.0, 0.0), (100.0, 0.0, 100.0, 1.0), (-100.0, 1.0, 100.0, -1.0)),
        *((np.inf, 1.0, 0.0, 0.0), (-np.inf, 0.0, 0.0, 0.0)),
    ],
)
def test_table_sigmoid_cross_entropy(x, y, value, slope):
    """e⁻¹⁰⁰ is 3.8e-44, below the smallest normal f32."""
    got = one("sigmoid_cross_entropy", [x], [y])
    np.testing.assert_allclose([got[0], got[1][0]], [value, slope], atol=1e-43)


@every_loss
def test_unknown_name_shows_the_nearest(name):
    with pytest.raises(ValueError, match=f"unknown loss '{name}s', did you mean '{name}'"):
        losses.get(name + "s")
    assert losses.get(LOSSES[name]) is LOSSES[name] is losses.get(name)
