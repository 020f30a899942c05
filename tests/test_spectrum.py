"""Lanczos, trace, densities and solves against dense matrices, where others found ghosts, stopped early or got NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import one_in

from jaxbp import spectrum

KEY = jax.random.key(0)


def times(matrix):
    return lambda v: jnp.asarray(matrix) @ v


@functools.cache
def uniform():
    """U + Uᵀ of 100 uniform numbers: one eigenvalue near 100, the others below 8."""
    u = np.random.default_rng(0).random((100, 100))
    return u + u.T


@functools.cache
def found():
    return jax.jit(lambda matrix: spectrum.eigenpairs(times(matrix), jnp.ones(100), 100, KEY, 100))(uniform())


def test_every_eigenvalue_is_found_once():
    """Without reorthogonalisation the largest is there nine times after 100 steps."""
    values, vectors, residuals = found()
    np.testing.assert_allclose(values[:60], np.linalg.eigvalsh(uniform())[::-1][:60], rtol=1e-9)
    assert np.sum(values > 50) == 1
    np.testing.assert_allclose(uniform() @ vectors[0], values[0] * vectors[0], atol=1e-10)
    assert residuals[0] < 1e-10


@pytest.mark.slow
def test_a_residual_is_what_it_says():
    """After 12 steps nothing but the top has converged."""
    pairs = jax.jit(lambda m: spectrum.eigenpairs(times(m), jnp.ones(100), 4, KEY, 12))(uniform())
    vectors, values = np.asarray(pairs.vectors).T, np.asarray(pairs.values)
    want = np.linalg.norm(uniform() @ vectors - vectors * values, axis=0)
    np.testing.assert_allclose(pairs.residuals, want, atol=1e-10)
    assert want[3] > 1e-3


@jax.jit
def broken(diagonal):
    def operator(v):
        return diagonal * v

    pairs = spectrum.eigenpairs(operator, diagonal, 3, KEY)
    rank = spectrum.lanczos(operator, jnp.arange(5.0), 5).rank
    return pairs.values, rank, spectrum.spectral_density(operator, diagonal, KEY, 3)


@pytest.mark.parametrize(("diagonal", "rank"), [([1.0] * 5, 1), ([0.0] * 5, 1), ([1.0, 2.0, 1.0, 2.0, 2.0], 2)])
def test_breakdown_stops_without_nan(diagonal, rank):
    values, steps, density = broken(jnp.asarray(diagonal))
    assert steps == rank
    np.testing.assert_allclose(values[:rank], np.unique(diagonal)[::-1], atol=1e-14)
    assert np.isnan(values[rank:]).all()
    np.testing.assert_allclose(np.sum(density.weights, axis=1), 1, rtol=1e-13)
    assert all(np.isfinite(a).all() for a in density)
    np.testing.assert_allclose(np.sum(density.weights * density.nodes, axis=1), np.mean(diagonal), atol=1e-13)


@pytest.mark.slow
def test_density_has_mass_one_and_its_moments():
    """Each probe's quadrature is exact for zᵀA²z, whose mean over the probes is ‖A‖² / P; the curve integrates to 1."""
    got = jax.jit(lambda m: spectrum.spectral_density(times(m), jnp.ones(100), KEY, probes=40, steps=20))(uniform())
    second = np.sum(got.weights * got.nodes**2, axis=1)
    error = np.std(second, ddof=1) / 40**0.5
    assert abs(np.mean(second) - np.sum(uniform() ** 2) / 100) < 4 * error
    assert np.trapezoid(got.value, got.at) == pytest.approx(1, abs=1e-3) and np.all(got.error >= 0)


@pytest.mark.parametrize("probes", one_in(2, ["sign", "normal"]))
def test_trace(probes):
    """diag(1, 2, 3) and −I: the sum over the probes is divided by their number, and none is left out."""
    estimate = jax.jit(lambda d: spectrum.trace(lambda v: d * v, d, KEY, 12, probes))
    for diagonal in ([1.0, 2.0, 3.0], [-1.0] * 3, [0.0] * 3):
        value, error = estimate(jnp.array(diagonal))
        np.testing.assert_allclose(value, np.sum(diagonal), atol=1e-13)
        assert error < 1e-12
    value, error = jax.jit(lambda m: spectrum.trace(times(m), jnp.ones(100), KEY, 60, probes))(uniform())
    assert abs(value - np.trace(uniform())) < 4 * error < 40


def solved(matrix, b, **options):
    return jax.jit(lambda m, b: spectrum.cg(times(m), b, **options))(jnp.asarray(matrix, float), jnp.asarray(b, float))


def test_conjugate_gradients():
    matrix = uniform() @ uniform().T / 100 + np.eye(100)
    solution = solved(matrix, np.arange(100.0), damping=0.5, tolerance=1e-12, steps=200)
    want = np.linalg.solve(matrix + 0.5 * np.eye(100), np.arange(100.0))
    np.testing.assert_allclose(solution.x, want, rtol=1e-8)
    assert solution.residual < 1e-9 and solution.curvature > 0 and solution.steps < 200


@pytest.mark.slow
def test_the_residual_of_an_early_end_is_the_true_one():
    matrix = uniform() @ uniform().T / 100 + np.eye(100)
    solution = solved(matrix, np.arange(100.0), steps=3)
    assert solution.steps == 3
    np.testing.assert_allclose(solution.residual, np.linalg.norm(np.arange(100.0) - matrix @ solution.x), rtol=1e-12)
    assert solution.residual > 1e-3


def test_negative_curvature_is_reported():
    solution = solved(np.diag([1.0, -1.0]), [1.0, 1.0])
    assert solution.curvature == 0 and np.isfinite(solution.x).all() and solution.residual == pytest.approx(2**0.5)
    solution = solved(np.diag([2.0, -1.0]), [1.0, 0.5])
    assert solution.curvature <= 2 and np.isfinite(solution.x).all()


def test_zero_is_solved_by_zero():
    solution = solved(np.eye(2), [0.0, 0.0])
    assert not np.any(solution.x) and solution.residual == 0 and solution.steps == 0


def test_lissa():
    solution = spectrum.lissa(times(np.diag([1.0, 3.0])), jnp.ones(2), scale=3.0, steps=200)
    np.testing.assert_allclose(solution.x, [1, 1 / 3], rtol=1e-12)
    assert solution.residual < 1e-12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda v: spectrum.eigenpairs(lambda u: u, v, 4, KEY), "k is 4, allowed: 1 … 3"),
        (lambda v: spectrum.lanczos(lambda u: u, v, 0), "steps is 0, allowed: steps ≥ 1"),
        (lambda v: spectrum.trace(lambda u: u, v, KEY, 3), "products is 3, allowed: products ≥ 4"),
        (
            lambda v: spectrum.trace(lambda u: u, v, KEY, 9, "rademacher"),
            "probes is 'rademacher', allowed: sign, normal",
        ),
        (lambda v: spectrum.spectral_density(lambda u: u, v, KEY, 0), "probes is 0, allowed: probes ≥ 1"),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(jnp.ones(3))
