"""`jaxbp.private`: published figures, the law of a Poisson batch, and five faults of private steps that others had."""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close
from scipy import stats
from tiers import slow

import jaxbp
from jaxbp import MLP, layers, losses, private
from jaxbp.persample import clipped_mean
from jaxbp.private import (
    Accounting,
    AdaptiveNorm,
    capacity,
    epsilon,
    noise_multiplier,
    noisy_clipped_mean,
    poisson_batch,
)

NET = MLP((4, 5, 3), "tanh")
DELTA = 1e-5
TUTORIAL = (1.1, 256 / 60_000, 14_063)  # σ, q and steps of TF-Privacy's


# --- accounting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "accountant", "printed"),
    [
        (0.7, 0.01, 120, "rdp", "3.2392676"),
        (0.7, 0.01, 120, "pld", "2.4612381"),
        (1.3, 0.0025, 6000, "rdp", "0.7242234026"),  # TF-Privacy's tests
        *slow(
            (1.5, 0.04, 2250, "rdp", "7.32933"),  # Opacus's tests, whose orders give 7.32911
            (*TUTORIAL, "rdp", "2.60"),
            (*TUTORIAL, "pld", "2.38"),
            (1.1, 0.01, 6000, "pld", "3.89977"),
        ),
    ],
)
def test_published_epsilons(noise: float, rate: float, steps: int, accountant: Any, printed: str) -> None:
    digits = len(printed.partition(".")[2])
    assert f"{epsilon(noise, rate, steps, DELTA, accountant):.{digits}f}" == printed


def classical(noise: float, rate: float, steps: int) -> float:
    """ε by the conversion of 2017, min over α of rdp(α) − ln δ / (α − 1)."""
    accountant = dp_accounting.rdp.RdpAccountant().compose(Accounting(rate, steps, DELTA).event(noise))
    return float(np.min(accountant.rdp - math.log(DELTA) / (accountant.orders - 1)))


@pytest.mark.slow
def test_published_epsilons_by_the_classical_conversion() -> None:
    assert f"{classical(4.0, 0.01, 10_000):.2f}" == "1.26"  # Abadi et al. 2016, figure 2
    assert f"{classical(*TUTORIAL):.2f}" == "3.01"


@pytest.mark.slow
def test_published_noise() -> None:
    assert f"{noise_multiplier(8.0, 0.04, 2250, DELTA, 'rdp'):.3f}" == "1.416"


def test_the_noise_of_one_gaussian_is_the_exact_one() -> None:
    """Balle and Wang 2018, algorithm 1."""
    assert f"{noise_multiplier(1.0, 1.0, 1, 1e-6):.6f}" == "4.224679"


@pytest.mark.parametrize(
    ("asked", "rate", "accountant"),
    slow((3.0, 1.0, "pld"), (0.01, 0.02, "rdp"), (3.0, 0.02, "rdp"), *((e, 0.02, "pld") for e in (0.01, 3.0, 20.0))),
)
def test_noise_never_ends_above_the_epsilon_asked_for(asked: float, rate: float, accountant: Any) -> None:
    noise = noise_multiplier(asked, rate, 500, DELTA, accountant)
    assert asked * (1 - 1e-3) < epsilon(noise, rate, 500, DELTA, accountant) <= asked


@pytest.mark.slow
def test_noise_of_many_steps_is_no_larger_than_it_has_to_be() -> None:
    accounting = Accounting(0.01, 9300, DELTA)
    assert 0.5 * (1 - 1e-3) < accounting.epsilon(accounting.noise_multiplier(0.5)) <= 0.5


@pytest.mark.slow
def test_replacing_a_sample_costs_what_adding_one_costs_with_half_the_noise() -> None:
    replaced = Accounting(1.0, 3, DELTA, adjacency="replace-one").epsilon(2.0)
    assert replaced == pytest.approx(epsilon(1.0, 1.0, 3, DELTA), rel=1e-3)
    assert Accounting(0.02, 30, DELTA, adjacency="replace-one").epsilon(2.0) > epsilon(2.0, 0.02, 30, DELTA)


def truncated(cap: int) -> float:
    step = dp_accounting.TruncatedSubsampledGaussianDpEvent(60_000, 0.01, cap, 1.1)
    return float(
        dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
        .compose(dp_accounting.SelfComposedDpEvent(step, 6000))
        .get_epsilon(DELTA)
    )


@pytest.mark.slow
def test_a_batch_of_the_capacity_costs_what_an_unlimited_one_costs() -> None:
    room = capacity(60_000, 0.01, 6000, DELTA, 3.9)
    assert truncated(room) == pytest.approx(truncated(2 * room), rel=1e-6)
    assert truncated(650) == pytest.approx(6.551, abs=2e-3)


def test_the_capacity_is_the_smallest_that_its_rule_allows() -> None:
    room = capacity(1000, 0.05, 200, DELTA, 2.0)
    lost = [(1 + math.exp(2.0)) * 200 * stats.binom.sf(c, 1000, 0.05) for c in (room - 1, room)]
    assert lost[1] <= 1e-6 * DELTA < lost[0]
    assert capacity(10, 1.0, 5, DELTA, 1e9) == 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rate": 1.5}, "rate is 1.5, allowed: above 0 and at most 1"),
        ({"rate": 0.0}, "rate is 0.0, allowed: above 0 and at most 1"),
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0, allowed: a number above 0"),
        ({"steps": 0}, "steps is 0, allowed: 1 or more"),
        ({"delta": 1.0}, "delta is 1.0, allowed: between 0 and 1"),
        ({"adjacency": "replace-one", "accountant": "rdp"}, 'accountant "rdp" has no adjacency "replace-one"'),
    ],
)
def test_what_can_not_be_accounted_is_said(change: dict[str, Any], said: str) -> None:
    arguments = {"noise_multiplier": 1.0, "rate": 0.1, "steps": 10, "delta": DELTA} | change
    noise = arguments.pop("noise_multiplier")
    with pytest.raises(ValueError, match=said):
        Accounting(**arguments).epsilon(noise)


def test_an_epsilon_that_is_too_small_is_said() -> None:
    with pytest.raises(ValueError, match=r"epsilon is 0\.001, allowed: 0\.01 or more"):
        noise_multiplier(0.001, 0.1, 10, DELTA)


def test_without_dp_accounting_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^the package dp_accounting is missing: pip install '\.\[private\]'"
    ):
        epsilon(1.0, 0.1, 10, DELTA)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_poisson_batch_has_the_binomial_law() -> None:
    """Sizes by χ² against Binomial(N, q); each sample, and each pair of samples, as often as independent ones."""
    draws, samples, rate = 4000, 30, 0.3
    keys = jax.random.split(jax.random.key(1), draws)
    rows, weights = jax.jit(jax.vmap(lambda key: poisson_batch(key, samples, rate, 30)))(keys)
    chosen = np.zeros((draws, samples), int)
    np.add.at(chosen, (np.nonzero(weights)[0], np.asarray(rows)[np.asarray(weights)]), 1)
    assert chosen.max() == 1
    sizes = chosen.sum(axis=1)
    law = stats.binom.pmf(np.arange(4, 16), samples, rate)
    seen = [np.sum(sizes == size) for size in range(4, 16)]
    rest = 1 - law.sum()
    assert stats.chisquare([*seen, draws - sum(seen)], draws * np.array([*law, rest])).pvalue > 1e-3
    error = 5 * math.sqrt(rate / draws)
    np.testing.assert_allclose(chosen.mean(axis=0), rate, atol=error)
    pairs = chosen.T @ chosen / draws
    np.testing.assert_allclose(pairs[~np.eye(samples, dtype=bool)], rate**2, atol=error)


def test_a_batch_that_is_cut_off_and_one_of_all_samples() -> None:
    rows, weights = poisson_batch(jax.random.key(0), 9, 1.0, 12)
    assert rows[weights].tolist() == list(range(9))
    rows, weights = poisson_batch(jax.random.key(0), 9, 1.0, 4)
    assert rows.tolist() == [0, 1, 2, 3] and bool(weights.all())


# --- an adaptive bound ------------------------------------------------------------------------------------------------


def test_gradients_and_count_cost_together_what_the_noise_multiplier_costs() -> None:
    """By dp-accounting, as two mechanisms of one step: σ_Δ, and 2σ_b because a sample moves the count by ½."""
    both = [dp_accounting.GaussianDpEvent(s) for s in (AdaptiveNorm(0.5, 0.2, 2.0).gradient_noise(1.5), 4.0)]
    found = dp_accounting.rdp.RdpAccountant().compose(dp_accounting.ComposedDpEvent(both), 10)
    assert found.get_epsilon(DELTA) == pytest.approx(epsilon(1.5, 1.0, 10, DELTA, "rdp"), rel=1e-9)


def test_an_adaptive_bound_finds_its_quantile() -> None:
    how, norms, bound = AdaptiveNorm(0.8, 0.2, 5.0), np.random.default_rng(0).lognormal(2.0, 1.0, 1000), jnp.ones(())
    for key in jax.random.split(jax.random.key(0), 100):
        bound = how.following(bound, private.within(jnp.asarray(norms), bound, jnp.ones(1000)), key, 1000.0)
    assert np.mean(norms <= bound) == pytest.approx(0.8, abs=0.02)


# --- a step, and the faults that others had ---------------------------------------------------------------------------

Mean = Callable[..., Any]
"""Like `noisy_clipped_mean`."""
STEP = jax.jit(noisy_clipped_mean, static_argnames="per_layer")
SUM = jax.jit(private.clipped_mean)


@functools.cache
def batch() -> Any:
    params, x, y = oracles.data(NET, seed=3, batch=6)
    return jaxbp.factors(NET, params, x, y)[1]


def rows_of(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def is_the_clipped_sum_of_the_oracle(mean: Mean) -> None:
    params, x, y = oracles.data(NET, seed=3, batch=6)
    flat = np.concatenate(oracles.gradient_rows(NET, params, x, y), axis=1)
    bound = float(np.median(np.linalg.norm(flat, axis=1)))
    clipped = flat * np.minimum(1, bound / np.linalg.norm(flat, axis=1))[:, None]
    found = mean(batch(), bound, 0.0, jax.random.key(0), 4.0, np.ones(6))
    np.testing.assert_allclose(rows_of(found), clipped.sum(axis=0) / 4.0, rtol=1e-10, atol=1e-14)


def divides_by_the_public_number(mean: Mean) -> None:
    """Half of the batch gone takes half of the sum away; the divisor stays."""
    parts = [mean(batch(), 1.0, 0.0, jax.random.key(0), 4.0, weights) for weights in np.eye(2).repeat(3, axis=1)]
    both = mean(batch(), 1.0, 0.0, jax.random.key(0), 4.0, np.ones(6))
    assert_close(jax.tree.map(jnp.add, *parts), both, 1e-12)


def has_noise_of_the_sum_over_the_divisor(mean: Mean) -> None:
    drawn = rows_of(mean(wide(), 2.0, 3.0, jax.random.key(5), 40.0, np.zeros(6)))
    assert np.std(drawn) == pytest.approx(2.0 * 3.0 / 40.0, rel=4 / math.sqrt(2 * drawn.size))
    assert abs(np.mean(drawn)) < 4 * 2.0 * 3.0 / 40.0 / math.sqrt(drawn.size)


def has_a_key_for_each_array(mean: Mean) -> None:
    drawn = jax.tree.leaves(mean(wide(), 1.0, 1.0, jax.random.key(5), 1.0, np.zeros(6)))
    first, second = (np.ravel(leaf)[:2000] for leaf in drawn if leaf.size >= 2000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(2000)


def leaves_out_what_is_not_finite(mean: Mean) -> None:
    f = batch()
    want = mean(f, 1.0, 0.0, jax.random.key(0), 4.0, (np.arange(6) != 2) * 1.0)
    for bad in (np.nan, np.inf):
        for place in range(2):
            x = tuple(a.at[2].set(bad) if layer == place else a for layer, a in enumerate(f.x))
            assert_close(mean(f._replace(x=x), 1.0, 0.0, jax.random.key(0), 4.0, np.ones(6)), want, 1e-12)


@functools.cache
def wide() -> Any:
    net = MLP((60, 60, 60))
    params, x, y = oracles.data(net, seed=0, batch=6)
    return jaxbp.factors(net, params, x, y)[1]


@functools.partial(jax.jit, static_argnames="fault")
def planted(factors: Any, bound: Any, sigma: Any, key: Any, by: Any, weights: Any = None, *, fault: str) -> Any:
    weights = jnp.ones(6) if weights is None else jnp.asarray(weights, float)
    if fault == "NaN let through":
        return private.noisy(clipped_mean(factors, bound, weights, by).mean, sigma * bound / by, key)
    if fault == "clipped after the mean":
        mean = jaxbp.gradient(factors, weights, by)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(mean)))
        clipped = jax.tree.map(lambda leaf: leaf * jnp.minimum(1, bound / by / norm), mean)
        return private.noisy(clipped, sigma * bound / by, key)
    by = jnp.maximum(weights.sum(), 1) if fault == "actual batch" else by
    mean = private.clipped_mean(factors, bound, by, weights)
    deviation = sigma * bound / (1 if fault == "noise of the sum on the mean" else by)
    if fault == "one key":
        return jax.tree.map(lambda leaf: leaf + deviation * jax.random.normal(key, leaf.shape, leaf.dtype), mean)
    return private.noisy(mean, deviation, key)


CHECKS = {
    "clipped after the mean": is_the_clipped_sum_of_the_oracle,
    "actual batch": divides_by_the_public_number,
    "noise of the sum on the mean": has_noise_of_the_sum_over_the_divisor,
    "one key": has_a_key_for_each_array,
    "NaN let through": leaves_out_what_is_not_finite,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(CHECKS))
def test_a_private_step_has_none_of_five_faults_and_each_is_caught(fault: str) -> None:
    CHECKS[fault](STEP)
    with pytest.raises(AssertionError):
        CHECKS[fault](functools.partial(planted, fault=fault))


@pytest.mark.slow
def test_an_empty_batch_is_noise_alone() -> None:
    found = STEP(batch(), 1.0, 1.0, jax.random.key(2), 4.0, np.zeros(6))
    zeros = jax.tree.map(jnp.zeros_like, found)
    assert_close(found, private.noisy(zeros, 0.25, jax.random.key(2)), 1e-12)


@pytest.mark.slow
def test_layers_that_are_clipped_by_themselves_get_noise_for_all_together() -> None:
    """C² = Σ_l C_l²; each layer is clipped to its own C_l."""
    key, bounds = jax.random.key(7), np.array([0.03, 0.04])
    found = STEP(batch(), bounds, 2.0, key, 4.0, per_layer=True)
    mean = clipped_mean(batch(), bounds, normalize_by=4.0, per_layer=True).mean
    assert_close(found, private.noisy(mean, 2.0 * 0.05 / 4.0, key), 1e-12)


@pytest.mark.slow
def test_bfloat16_is_summed_in_float32() -> None:
    """600 equal samples and one more: rounded to bfloat16 their sum would move by more than C, or by nothing."""
    params, x, y = oracles.data(NET, seed=1, batch=1, dtype=jnp.bfloat16)
    _, f = jaxbp.factors(NET, params, jnp.repeat(x, 601, axis=0), jnp.repeat(y, 601, axis=0))
    sums = [SUM(f, 1e-3, 1.0, np.arange(601) < count) for count in (600, 601)]
    moved = np.linalg.norm(rows_of(sums[1]) - rows_of(sums[0]))
    assert jax.tree.leaves(sums[0])[0].dtype == jnp.float32
    assert moved == pytest.approx(1e-3, rel=1e-2) and moved <= 1e-3 * (1 + 600 * 2**-23)


@pytest.mark.slow
def test_layers_whose_norms_others_got_wrong() -> None:
    """A bias at many positions and a table that is used twice: ‖Σ_t δ_t‖², not Σ_t ‖δ_t‖²; both uses in one norm."""
    layer = layers.Tied(
        layers.Embedding(7, 4),
        layers.Chain(layers.Dense(4), layers.Elementwise("tanh")),
    )
    net = jaxbp.Network(layer, losses.over_positions("softmax_cross_entropy"), (5,))
    params = jaxbp.init(net, jax.random.key(0), dtype=jnp.float64)
    tokens = jax.random.randint(jax.random.key(1), (6, 5), 0, 7)
    _, f = jaxbp.factors(net, params, tokens, tokens)
    ones = [jaxbp.value_and_grad(net, params, t[None], t[None])[1] for t in tokens]
    flat = np.stack([rows_of(one) for one in ones])
    bound = float(np.median(np.linalg.norm(flat, axis=1)))
    clipped = flat * np.minimum(1, bound / np.linalg.norm(flat, axis=1))[:, None]
    found = STEP(f, bound, 0.0, jax.random.key(0), 1.0)
    np.testing.assert_allclose(rows_of(found), clipped.sum(axis=0), rtol=1e-10, atol=1e-13)
