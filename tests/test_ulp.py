"""σ, σ′, ℓ and ∂ℓ/∂x in units of the last place, over the whole range of a dtype; the ruler itself."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest
from mpmath import mpf
from tiers import one_in

from experiments import ulp_table
from jaxbp.activations import ACTIVATIONS
from jaxbp.losses import LOSSES

WIDE = one_in(2, [jnp.float32, jnp.float64])
POINTS = 60
TINY, SPACING = float(np.finfo(np.float32).tiny), 2.0**-23

# The factor by which σ multiplies the relative error of the argument of its exponential; s itself where the gate is
# flushed to 0 before s multiplies it.
STEEPNESS = {
    "gelu": lambda s: s**2,
    "gelu_tanh": lambda s: 1.6 * (np.abs(s) + 0.045 * np.abs(s) ** 3),
    "silu": np.abs,
    "mish": np.abs,
}


def size_of_terms(name: str, s: np.ndarray) -> np.ndarray:
    """What σ′ is the difference of: numbers near 1 where it knows x alone; about 1/4, left of 0, at its zero."""
    if name in ("sigmoid", "tanh"):
        return np.ones_like(s)
    return np.where((name in STEEPNESS) & (s > -2) & (s < 0), 0.25, 0.0)


@pytest.mark.production
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_the_truth_to_a_few_ulps(name, dtype):
    """8 + 2 × the steepness: XLA's own tanh is within 7, its expm1 within 4. Beyond s = −2 ln(1/tiny) σ and σ′ are 0 in
    every formula. No NaN, no ±∞ out of place."""
    s = oracles.lattice(dtype, POINTS)
    value, slope, *_ = ulp_table.curves(name, jnp.asarray(s))
    points = s.astype(float)
    saturated = -2 * np.log(float(jnp.finfo(dtype).tiny))
    steep = STEEPNESS.get(name, np.zeros_like)(np.clip(np.nan_to_num(points), -saturated, 0))
    assert np.all(np.array(ulp_table.errors(name, value, s, 0)) <= 8 + 2 * steep)
    assert np.all(np.array(ulp_table.errors(name, slope, s, 1, size_of_terms(name, points))) <= 8 + 2 * steep)


def terms_of_second(name: str, s: np.ndarray) -> np.ndarray:
    """The largest of the terms that σ″ is the sum or the product of, where they cancel; 0 elsewhere."""
    with np.errstate(all="ignore"):
        p, q = 1 / (1 + np.exp(-s)), 1 / (1 + np.exp(s))
        sizes = {
            "gelu": np.exp(-(s**2) / 2) * (2 + s**2),
            "gelu_tanh": np.where(np.abs(s) < 12, 4 * (1 + np.abs(s) ** 5) * np.exp(-1.59 * np.abs(s)), 0),
            "silu": p * q * (2 + np.abs(s)),
            "mish": p * q * (4 + 4 * np.abs(s)),
            "sigmoid": p * q,
            "tanh": np.full_like(s, 2),
        }
    return np.nan_to_num(sizes.get(name, np.zeros_like(s)))


@pytest.mark.production
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivative_is_the_truth_to_a_few_ulps(name, dtype):
    """As for σ′; the gate falls on both sides. Subnormal points aside, which XLA flushes to a kink at 0."""
    s = oracles.lattice(dtype, POINTS)
    s = s[~(np.abs(s.astype(float)) < float(jnp.finfo(dtype).tiny)) | (s == 0)]
    sigma, points = ACTIVATIONS[name], s.astype(float)
    got = np.asarray(jax.jit(lambda s: sigma.d2sigma(s, sigma.sigma(s)))(s)).astype(float)
    saturated = -2 * np.log(float(jnp.finfo(dtype).tiny))
    steep = STEEPNESS.get(name, np.zeros_like)(np.minimum(np.abs(np.nan_to_num(points)), saturated))
    truth = oracles.D2SIGMA_TRUTH[name]
    want = [
        None if np.isnan(p) and name != "identity" else truth(oracles.exact(np.nan_to_num(p, posinf=p, neginf=p)))
        for p in points
    ]
    found = [
        oracles.ulps(*both, dtype, size) for *both, size in zip(got, want, terms_of_second(name, points), strict=True)
    ]
    assert np.all(np.array(found) <= 8 + 2 * steep)


@pytest.mark.production
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_the_truth_to_a_few_ulps_of_its_largest_term(name, dtype):
    """8 = C + 3: five terms summed, three roundings in a term. A softmax is exp(x − max), which multiplies the rounding
    of x − max by its size, at most ln(1/tiny) where the exponential is not 0. ½e² may be ∞ where e² overflows."""
    scores = ulp_table.loss_scores(name, dtype, POINTS)
    steep = -np.log(float(jnp.finfo(dtype).tiny)) if name in ("softmax_cross_entropy", "kl_divergence") else 0
    assert scores["value"].worst <= 8 and (not scores["value"].wrong or name == "squared_error")
    assert scores["derivative"].worst <= 8 + steep and not scores["derivative"].wrong


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_closed_form_of_the_truth_is_its_difference_quotient(name):
    """80 digits: half of them are lost to e^−40 beside a value near 1 or 0.045 s³ beside 1."""
    for s in map(mpf, (-40, -7.5, -2.25, -0.7, 0.3, 2.5, 5.5, 9, 40)):
        quotient = mpmath.diff(oracles.SIGMA_TRUTH[name], s)
        assert abs(oracles.DSIGMA_TRUTH[name](s) - quotient) <= mpf("1e-30")


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "hinge"])
def test_terms_of_a_slope_are_the_difference_quotient_of_the_terms_of_the_loss(name):
    x, y = [mpf("0.3"), mpf("-1.7"), mpf("2.2")], [mpf("0.2"), mpf("0.5"), mpf("0.3")]
    for i in range(3):

        def ell(a, i=i):
            return mpmath.fsum(oracles.LOSS_TRUTH[name]([*x[:i], a, *x[i + 1 :]], y)[0])

        slope = mpmath.fsum(oracles.LOSS_TRUTH[name](x, y)[1][i])
        assert abs(mpmath.diff(ell, x[i]) - slope) <= mpf("1e-30")


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        *(
            (1.0, mpf(1), 0),
            (1 + SPACING, mpf(1), 1),
            (1 - SPACING / 2, mpf(1), 0.5),
            (-4.0, 4 + mpf(SPACING), 2.0**24),
        ),
        *((np.nan, None, 0), (0.0, None, np.inf), (np.nan, mpf(0), np.inf), (np.inf, mpf(1), np.inf)),
        *((np.inf, mpf(2) ** 128, 0), (3e38, mpf(2) ** 128, np.inf), (-np.inf, mpf(2) ** 128, np.inf)),
        *((0.0, mpf(TINY) / 4, 0.25), (0.0, mpf(TINY), 1), (0.0, 50 * mpf(TINY), 50)),
    ],
)
def test_the_ruler(got, want, error):
    """By hand, f32: the spacing at 1 is 2⁻²³, 2⁻²¹ at 4; ∞ must be ∞; a flushed number costs its multiple of tiny."""
    assert oracles.ulps(got, want, jnp.float32) == pytest.approx(error, rel=1e-6)


def test_the_ruler_at_the_largest_term():
    assert oracles.ulps(3 * SPACING, mpf(0), jnp.float32, size=1) == 3


def test_lattice_has_what_it_says():
    s = oracles.lattice(np.float32, POINTS).astype(float)
    assert len(s) > 3 * POINTS and np.isnan(s[-1]) and np.isinf(s[[0, -3]]).all()
    for point in (TINY, TINY / 2, TINY * SPACING, 1e20, 0.0, 3.0, float(np.finfo(np.float32).max)):
        assert np.isin(np.float32([point, -point]), s).all()
    assert np.signbit(s[s == 0]).tolist() == [False, True]


@pytest.mark.parametrize("name", ["hinge", "huber"])  # of classes and of single elements
def test_a_few_points_are_enough_for_a_row(name):
    assert {"value", "derivative", "raw value", "optax value"} <= ulp_table.loss_scores(name, jnp.float32, 3).keys()
