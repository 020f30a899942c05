"""σ and σ′ against 80-digit truth, jax.nn and autodiff; kinks, edges, dtypes, and the table of edge values."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest
from beartype.roar import BeartypeCallHintViolation

from jaxbp.activations import ACTIVATIONS, get

LATTICE = [0.1, 0.5, 0.7, 1.5, 2.5, 4.0, 5.7, 7.0, 10.0, 20.0, 40.0, 88.0, 100.0, 1e-4]
LATTICE = np.array([*LATTICE, *(-s for s in LATTICE)])
SPECIAL = np.array([1e4, -1e4, 1e20, -1e20, -np.inf, np.inf, np.nan, 0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0])
DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16]
WIDE = DTYPES[:2]

every_activation = pytest.mark.parametrize("sigma", ACTIVATIONS.values(), ids=ACTIVATIONS)


class Curves(NamedTuple):
    """Of one activation at one array s."""

    s: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    autodiff: np.ndarray  # of the library's own σ
    curvature: np.ndarray  # autodiff of the library's σ′
    jax_value: np.ndarray
    jax_slope: np.ndarray

    def __getitem__(self, points):
        """The curves at these points of s."""
        where = [np.flatnonzero((self.s == p) | (np.isnan(p) & np.isnan(self.s)))[0] for p in points]
        return Curves(*(curve[where] for curve in self))


@functools.cache
def curves(name: str, dtype) -> Curves:
    """Everything at LATTICE, SPECIAL and two subnormals, compiled once for an activation and a dtype."""
    sigma, naive = ACTIVATIONS[name], oracles.SIGMAS[name]
    tiny = 3 * float(jnp.finfo(dtype).smallest_subnormal)
    s = jnp.asarray(np.array([*LATTICE, *SPECIAL, tiny, -tiny]).astype(dtype))

    @jax.jit
    @jax.vmap
    def at(s):
        x = sigma.sigma(s)
        slope = sigma.dsigma(s, x)
        second = jax.grad(lambda s: sigma.dsigma(s, sigma.sigma(s)))(s)
        return s, x, slope, jax.grad(sigma.sigma)(s), second, naive(s), jax.grad(naive)(s)

    return Curves(*(np.asarray(curve) for curve in at(s)))


def at(name: str, dtype, points) -> Curves:
    return curves(name, dtype)[np.asarray(points).astype(dtype)]


@functools.cache
def truths(name: str, dtype, order: int) -> list:
    """σ, σ′ or σ″ on the lattice as the dtype rounds it."""
    f = oracles.SIGMA_TRUTH[name]
    return oracles.truth(lambda s: mpmath.diff(f, s, order) if order else f(s), LATTICE.astype(dtype))


def test_every_activation_has_its_oracle():
    assert ACTIVATIONS.keys() == oracles.SIGMAS.keys() == oracles.SIGMA_TRUTH.keys()
    assert all(name == sigma.name for name, sigma in ACTIVATIONS.items())


@pytest.mark.parametrize("dtype", WIDE)
@every_activation
def test_value_and_derivative_are_the_truth(sigma, dtype):
    """4 ε max(1, |truth|): four roundings of quantities of the size of the result or of 1."""
    here = at(sigma.name, dtype, LATTICE)
    for got, want in ((here.value, truths(sigma.name, dtype, 0)), (here.slope, truths(sigma.name, dtype, 1))):
        bound = 4 * np.finfo(dtype).eps * np.maximum(1, np.abs(np.array(want, float)))
        assert np.all(oracles.absolute_errors(got, want) <= bound)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - {"tanh", "sigmoid", "hard_sigmoid", "hard_silu"}))
def test_derivative_keeps_its_digits_where_it_is_tiny(name, dtype):
    """Relative error ≤ 8 ε (1 + s²): e^{−s²/2} multiplies the relative error of its argument by its size. A naive x + 1
    for elu′ or 1 − gate for mish′ loses all digits here. Left out: what e⁻ˢ cannot hold in f32, and σ′ = x (1 − x) and
    (1 − x)(1 + x), which never read s: theirs is an absolute error, no larger than jax's (below)."""
    want = truths(name, dtype, 1)
    size = np.abs(np.array(want, float))
    held = (size > np.finfo(dtype).tiny / np.finfo(dtype).eps) & (np.abs(LATTICE) < 80)  # no intermediate is subnormal
    error = oracles.absolute_errors(at(name, dtype, LATTICE).slope, want)
    assert np.all(error[held] <= (8 * np.finfo(dtype).eps * (1 + LATTICE**2) * size)[held])


GATE_STEEPNESS = {
    "mish": lambda s: 1.0,
    "silu": lambda s: 1.0,
    "gelu_tanh": lambda s: 1.6 * (1 + 0.134 * s**2),
}  # u′(s)


@pytest.mark.parametrize("dtype", WIDE)
@every_activation
def test_derivative_is_autodiff_of_the_librarys_own_sigma(sigma, dtype):
    """8 ε max(1, |σ′|), 4 ε on either side. Of s · gate(u(s)) autodiff takes gate′ = p (1 − p), wrong by ε where p is
    nearly 1, and multiplies it by s u′(s), so its own error is that much larger. |s| ≤ 10, where nothing overflows."""
    s = LATTICE[np.abs(LATTICE) <= 10]
    here = at(sigma.name, dtype, s)
    steep = 1 + np.abs(s) * GATE_STEEPNESS.get(sigma.name, lambda s: 0.0)(s)
    bound = 8 * np.finfo(dtype).eps * steep * np.maximum(1, abs(here.autodiff))
    assert np.all(abs(here.slope - here.autodiff) <= bound)


@pytest.mark.parametrize("dtype", WIDE)
@every_activation
def test_no_worse_than_jax(sigma, dtype):
    """Against the truth: our worst error over the lattice is at most jax's own (4 ε where jax happens to be exact)."""
    here = at(sigma.name, dtype, LATTICE)
    for order, ours, theirs in ((0, here.value, here.jax_value), (1, here.slope, here.jax_slope)):
        want = truths(sigma.name, dtype, order)
        size = np.maximum(1, np.abs(np.array(want, float)))
        ours, theirs = (np.max(oracles.absolute_errors(x, want) / size) for x in (ours, theirs))
        assert ours <= max(theirs, 4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@every_activation
def test_dtype_is_kept(sigma, dtype):
    """Under strict promotion, where an f64 constant in an f32 or bf16 rule is an error or shows in the result."""
    here = curves(sigma.name, dtype)
    assert here.value.dtype == here.slope.dtype == dtype


@every_activation
def test_bfloat16_is_the_float64_value_rounded_a_few_times(sigma):
    """8 roundings of u = 2⁻⁸ of quantities of at most max(1, |s|), the gate times s; |s| ≤ 10 is exact in neither."""
    s = LATTICE[np.abs(LATTICE) <= 10].astype(jnp.bfloat16)
    low, exact = at(sigma.name, jnp.bfloat16, s), jnp.asarray(s.astype(float))
    truth = sigma.sigma(exact), sigma.dsigma(exact, sigma.sigma(exact))
    for got, want in zip((low.value, low.slope), truth, strict=True):
        assert np.all(abs(got.astype(float) - want) <= 8 * 2**-8 * np.maximum(1, abs(s.astype(float))))


# Limits: (σ(−∞), σ(+∞), σ′(−∞), σ′(+∞))
RECTIFIER, SATURATING = (0.0, np.inf, 0.0, 1.0), (-1.0, 1.0, 0.0, 0.0)
SELU_SCALE, SELU_ALPHA = float(oracles.SELU[0]), float(oracles.SELU[1])
LIMITS = {
    **dict.fromkeys(("relu", "gelu", "gelu_tanh", "silu", "mish", "softplus", "hard_silu", "squareplus"), RECTIFIER),
    **dict.fromkeys(("tanh", "soft_sign", "hard_tanh"), SATURATING),
    **dict.fromkeys(("elu", "celu"), (-1.0, np.inf, 0.0, 1.0)),
    **dict.fromkeys(("sigmoid", "hard_sigmoid"), (0.0, 1.0, 0.0, 0.0)),
    "selu": (-SELU_SCALE * SELU_ALPHA, np.inf, 0.0, SELU_SCALE),
    "identity": (-np.inf, np.inf, 1.0, 1.0),
    "leaky_relu": (-np.inf, np.inf, 0.01, 1.0),
    "relu6": (0.0, 6.0, 0.0, 0.0),
    "log_sigmoid": (-np.inf, 0.0, 1.0, 0.0),
}


@pytest.mark.parametrize("dtype", WIDE)
@every_activation
def test_infinity_gives_the_limit(sigma, dtype):
    here = at(sigma.name, dtype, [-np.inf, np.inf])
    np.testing.assert_allclose([*here.value, *here.slope], LIMITS[sigma.name], rtol=2 * np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", WIDE)
@every_activation
def test_huge_arguments_are_at_the_truth_not_nan(sigma, dtype):
    """±1e20, where s² and s³ overflow in f32; −1e20 · 0 is 0. 4 ε; squareplus(−1e20) is 1e-20."""
    low, high, slope_low, slope_high = LIMITS[sigma.name]
    here = at(sigma.name, dtype, [-1e20, 1e20])
    value = [slope_low * -1e20 if np.isinf(low) else low, slope_high * 1e20 if np.isinf(high) else high]
    np.testing.assert_allclose(here.value, value, rtol=4 * np.finfo(dtype).eps, atol=1e-19)
    np.testing.assert_allclose(here.slope, [slope_low, slope_high], rtol=4 * np.finfo(dtype).eps, atol=1e-19)


@pytest.mark.parametrize("dtype", DTYPES)
@every_activation
def test_nan_goes_through(sigma, dtype):
    here = at(sigma.name, dtype, [np.nan])
    assert np.isnan(here.value.astype(float)).all()
    assert np.isnan(here.slope.astype(float)).all() or sigma.name == "identity"  # 1 whatever s is


def one_sided_slopes(name: str, kink: float) -> tuple[float, float]:
    f, step = oracles.SIGMA_TRUTH[name], mpmath.mpf("1e-30")
    return tuple(float(mpmath.diff(f, mpmath.mpf(kink) + side * step)) for side in (-1, 1))


@pytest.mark.parametrize("dtype", WIDE)
@every_activation
def test_zeros_and_subnormals(sigma, dtype):
    """+0 and −0 agree; at a subnormal, which XLA may flush to 0, the slope is one of the two at 0. 4 ε."""
    eps = 4 * np.finfo(dtype).eps
    everything = curves(sigma.name, dtype)
    near = Curves(*(curve[np.abs(everything.s) < 1e-30] for curve in everything))  # ±0 and the subnormals
    assert near.s.size == 4
    np.testing.assert_allclose(near.value, float(oracles.SIGMA_TRUTH[sigma.name](mpmath.mpf(0))), rtol=eps, atol=1e-30)
    left, right = one_sided_slopes(sigma.name, 0)
    assert np.all((abs(near.slope - left) <= eps) | (abs(near.slope - right) <= eps))
    assert near.slope[0] == near.slope[1] and abs(near.slope[0] - left) <= eps


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("name", "kink"), [(name, kink) for name, kinks in oracles.KINKS.items() for kink in kinks])
def test_at_a_kink_the_slope_is_the_one_on_the_left(name, kink, dtype):
    left = one_sided_slopes(name, kink)[0]
    np.testing.assert_allclose(at(name, dtype, [kink]).slope, left, rtol=2 * np.finfo(dtype).eps, atol=1e-29)


@pytest.mark.parametrize(
    ("name", "s", "slope"),
    [
        ("relu", 0, 0),
        ("leaky_relu", 0, 0.01),
        ("relu6", 0, 0),
        ("relu6", 6, 1),
        ("hard_tanh", -1, 0),
        ("hard_tanh", 1, 1),
        *(("hard_sigmoid", -3, 0), ("hard_sigmoid", 3, 1 / 6), ("hard_silu", -3, 0), ("hard_silu", 3, 1.5)),
        *(("elu", 0, 1), ("celu", 0, 1), ("selu", 0, SELU_SCALE * SELU_ALPHA)),
    ],
)
def test_kinks_as_documented(name, s, slope):
    assert at(name, jnp.float32, [s]).slope == pytest.approx(slope, rel=1.2e-7)  # ε


@every_activation
def test_needs_s_says_the_truth(sigma):
    """`needs_s=False` promises a rule that works without s, which `apply` then drops; True, that s is read."""
    s = jnp.asarray([*LATTICE, np.nan, np.inf, -np.inf, 0.0], jnp.float32)
    x = sigma.sigma(s)
    if sigma.needs_s:
        with pytest.raises((TypeError, AttributeError, BeartypeCallHintViolation)):
            sigma.dsigma(None, x)
    else:
        np.testing.assert_array_equal(sigma.dsigma(None, x), sigma.dsigma(s, x))


@pytest.mark.parametrize("dtype", DTYPES)
@every_activation
def test_second_derivative_is_finite(sigma, dtype):
    """Gradient of a gradient: a select between an overflowing branch and a good one gives 0 · ∞ here."""
    here = at(sigma.name, dtype, [*LATTICE, 1e4, -1e4, 1e20, -1e20, np.inf, -np.inf, 0.0])
    assert np.isfinite(here.curvature.astype(float)).all()


@every_activation
def test_second_derivative_is_the_truth(sigma):
    """Autodiff of our σ′ in f64: 8 ε (1 + s²), s² as above."""
    here = np.abs(LATTICE) <= 10
    got = at(sigma.name, jnp.float64, LATTICE).curvature
    error = oracles.absolute_errors(got, truths(sigma.name, jnp.float64, 2))
    assert np.all(error[here] <= 8 * np.finfo(float).eps * (1 + LATTICE[here] ** 2))


def test_unknown_name_shows_the_nearest():
    with pytest.raises(ValueError, match=r"unknown activation 'rellu', did you mean 'relu'\? Allowed: identity, relu"):
        get("rellu")
    assert get(ACTIVATIONS["relu"]) is ACTIVATIONS["relu"] is get("relu")


# The table of verification.md, line by line, f32 --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "s", "value", "slope"),
    [
        ("relu", 0.0, 0.0, 0.0),
        ("relu", np.nan, np.nan, np.nan),
        ("leaky_relu", 0.0, 0.0, 0.01),
        ("elu", -20.0, np.expm1(-20.0), np.exp(-20.0)),  # jax: 0
        ("gelu", np.inf, np.inf, 1.0),  # jax, torch: NaN, and so on
        ("gelu", -np.inf, 0.0, 0.0),
        ("gelu", 1e20, 1e20, 1.0),
        ("gelu", -1e20, 0.0, 0.0),
        ("gelu_tanh", np.inf, np.inf, 1.0),
        ("gelu_tanh", -np.inf, 0.0, 0.0),
        ("gelu_tanh", 1e20, 1e20, 1.0),
        ("gelu_tanh", -1e20, 0.0, 0.0),
        ("silu", np.inf, np.inf, 1.0),
        ("silu", -np.inf, 0.0, 0.0),
        ("silu", 1e20, 1e20, 1.0),
        ("silu", -1e20, 0.0, 0.0),
        ("softplus", 100.0, 100.0, 1.0),
        ("softplus", -100.0, 0.0, 0.0),  # 3.8e-44 is subnormal
    ],
)
def test_table_of_edge_values(name, s, value, slope):
    sigma = ACTIVATIONS[name]
    x = sigma.sigma(jnp.float32(s))
    np.testing.assert_allclose(
        [x, sigma.dsigma(jnp.float32(s), x)], [value, slope], rtol=4 * np.finfo(np.float32).eps, atol=1e-43
    )


@pytest.mark.parametrize(("name", "s"), [("elu", -20.0), ("sigmoid", 20.0), ("sigmoid", -20.0), ("tanh", 10.0)])
@pytest.mark.parametrize("dtype", WIDE)
def test_table_saturated_derivatives_are_no_worse_than_jax(name, s, dtype):
    here, want = at(name, dtype, [s]), oracles.truth(lambda s: mpmath.diff(oracles.SIGMA_TRUTH[name], s), [s])
    assert oracles.absolute_errors(here.slope, want) <= oracles.absolute_errors(here.jax_slope, want)
