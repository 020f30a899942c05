"""Differentially private training: which samples a step takes, what is released of them, and what it costs.

A step of DP-SGD takes each of N samples with probability q, independently of the others (Poisson sampling). It clips
the gradient of each to the norm C, adds noise to their sum, and divides by the public number q N::

    (Σₙ gₙ min(1, C/‖gₙ‖) + σ C z) / (q N),    z ~ N(0, 1) for each parameter

The divisor is never the number of samples that were drawn, which is private. What follows from the noisy mean, any
optimiser, costs nothing more. ε and δ bound how well anybody can tell from it whether a sample was in the data
(adjacency "add-or-remove-one") or was another one ("replace-one"). dp-accounting computes them: ``pip install
'.[private]'``. A number ε says nothing without δ, accountant, adjacency, sampling and number of steps.

ε does not cover losses, scores and norms of training samples, the time that a program takes, or attacks on the lowest
bits of floating-point noise (I. Mironov, *On significance of the least significant bits for differential privacy*,
2012). Noise is as secret as its key.

Source: M. Abadi et al., *Deep learning with differential privacy*, 2016, algorithm 1.
"""

import bisect
import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp import factor, persample, scaled
from jaxbp.factor import FactorTree
from jaxbp.mlp import Array, wide
from jaxbp.network import ParamTree

Accountant = Literal["pld", "rdp"]
Adjacency = Literal["add-or-remove-one", "replace-one"]

LEAST_EPSILON = 0.01  # for which noise is looked for: below, an accountant may take gigabytes
MOST_NOISE = 2.0**20  # with which it is looked for: beside it steps cost nothing
FINE = (
    1e-4  # to which "pld" rounds the losses of privacy; 10⁻³ is as good for few steps, but makes ε of 9,300 4 % larger
)


# A step ---------------------------------------------------------------------------------------------------------------


def poisson_batch(key: Array, samples: int, rate: float, capacity: int) -> tuple[Array, Array]:
    """The rows of a Poisson batch in an array of fixed length, and whether they count.

    Each of N samples is in the batch with probability q, rounded down to a multiple of 2⁻³². What is left of the array
    has row 0. Of a batch larger than the array the last samples are left out: take a `capacity` that is never reached.

    Args:
      key: of `jax.random`, consumed.
      samples, rate, capacity: N, q and the length of the array, static.

    Returns:
      Rows, (capacity,) int32, and weights, (capacity,) bool.

    Raises:
      ValueError: a rate that is not between 0 and 1.

    Example:
      >>> rows, weights = poisson_batch(jax.random.key(0), samples=8, rate=0.5, capacity=8)
      >>> rows[weights].tolist()
      [2, 3, 5, 6]
    """
    _check_rate(rate)
    threshold = jnp.uint32(min(int(rate * 2**32), 2**32 - 1))
    drawn = (jax.random.bits(key, (samples,), jnp.uint32) < threshold) | (rate == 1)
    (rows,) = jnp.nonzero(drawn, size=capacity, fill_value=0)
    return rows.astype(jnp.int32), jnp.arange(capacity) < jnp.sum(drawn)


def noisy_clipped_mean(
    factors: FactorTree,
    max_norm: ArrayLike,
    noise_multiplier: ArrayLike,
    key: Array,
    normalize_by: ArrayLike,
    weights: ArrayLike | None = None,
    per_layer: bool = False,
) -> ParamTree:
    """(Σₙ weightsₙ gₙ min(1, C/‖gₙ‖) + σ C z) / (q N): the gradient of a private step.

    A sample whose gradient or its norm is not finite contributes 0. An empty batch gives the noise alone.

    Args:
      factors: of a `poisson_batch`; computed in float32 at least.
      max_norm: C > 0 or, with `per_layer`, one C_l for each layer, clipped by itself; then C² = Σ_l C_l².
      noise_multiplier: σ, of which `epsilon` says what it costs.
      key: of `jax.random`, consumed; each array of the parameters gets noise of its own.
      normalize_by: q N, a public number.
      weights: those of the batch, 0 or 1; ones by default.

    Returns:
      Like the parameters, in float32 at least.

    Raises:
      ValueError: weights or max_norm of a wrong shape.

    Example:
      >>> import jaxbp, optax
      >>> net, optimizer = jaxbp.MLP((2, 3, 2)), optax.sgd(0.1)
      >>> x, y = jnp.ones((100, 2)), jnp.zeros(100, int)
      >>> @jax.jit
      ... def step(params, state, key):
      ...     key_batch, key_noise = jax.random.split(key)
      ...     rows, weights = poisson_batch(key_batch, samples=100, rate=0.2, capacity=60)
      ...     _, f = jaxbp.factors(net, params, x[rows], y[rows])
      ...     grads = noisy_clipped_mean(f, 1.0, 1.5, key_noise, 0.2 * 100, weights)
      ...     updates, state = optimizer.update(grads, state)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jaxbp.init(net, jax.random.key(0))
      >>> params, state = step(params, optimizer.init(params), jax.random.key(1))
      >>> jax.tree.map(jnp.shape, params)
      (Affine(w=(3, 2), b=(3,)), Affine(w=(2, 3), b=(2,)))
    """
    mean = clipped_mean(factors, max_norm, normalize_by, weights, per_layer)
    norm = jnp.sqrt(jnp.sum(jnp.asarray(max_norm, wide(factor.dtype(factors))) ** 2))
    return noisy(mean, noise_multiplier * norm / normalize_by, key)


def clipped_mean(
    factors: FactorTree,
    max_norm: ArrayLike,
    normalize_by: ArrayLike,
    weights: ArrayLike | None = None,
    per_layer: bool = False,
) -> ParamTree:
    """`noisy_clipped_mean` without the noise: a sample more or less moves the sum by at most C."""
    factors = scaled.in_wide(factors)
    kept = jnp.isfinite(persample.grand(factors))
    weights = kept if weights is None else jnp.where(kept, jnp.asarray(weights, factor.dtype(factors)), 0)
    with full_precision():
        return persample.clipped_mean(factors, max_norm, weights, normalize_by, per_layer).mean


def clip_weights(norms: Array, max_norm: ArrayLike, weights: Array) -> Array:
    """weightsₙ min(1, C/‖gₙ‖), 0 where ‖gₙ‖ is not finite."""
    return jnp.where(jnp.isfinite(norms), weights * jnp.minimum(1, max_norm / norms), 0)


def full_precision() -> Any:
    """For the sum over the samples: a GPU's TF32 would round the share of each by 10⁻³, and some to more than C."""
    return jax.default_matmul_precision("highest")


def within(norms: Array, max_norm: ArrayLike, weights: Array) -> Array:
    """Σₙ weightsₙ (1[‖gₙ‖ ≤ C] − ½): a sample more or less moves it by ½, one whose norm is not finite by 0."""
    return jnp.sum(jnp.where(jnp.isfinite(norms), weights * jnp.where(norms <= max_norm, 0.5, -0.5), 0))


def noisy(tree: ParamTree, deviation: ArrayLike, key: Array) -> ParamTree:
    """The tree plus Gaussian noise of this standard deviation, drawn from a key of its own for each array."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    noised = [a + jnp.asarray(deviation, a.dtype) * jax.random.normal(k, a.shape, a.dtype) for k, a in pairs]
    return jax.tree.unflatten(structure, noised)


@dataclasses.dataclass(frozen=True)
class AdaptiveNorm:
    """C that follows a quantile of the norms: C ← C exp(−η (b̃ − γ)), b̃ the share of the norms ≤ C, with noise.

    b̃ = ½ + (`within` + σ_b z) / (q N). A sample moves `within` by at most ½. So its noise has the multiplier 2σ_b, and
    that of the gradients has to be σ_Δ, for both together to cost what σ costs: σ⁻² = σ_Δ⁻² + (2σ_b)⁻².

    quantile: γ;  learning_rate: η;  count_noise: σ_b, of which q N / 20 is enough.

    Raises:
      ValueError: a quantile that is not between 0 and 1.

    Source: G. Andrew et al., *Differentially private learning with adaptive clipping*, 2021, algorithm 1.

    Example:
      >>> how = AdaptiveNorm(quantile=0.5, learning_rate=0.2, count_noise=5.0)
      >>> round(how.gradient_noise(1.0), 4)
      1.005
      >>> count = within(jnp.full(100, 3.0), 1.0, weights=jnp.ones(100))  # all norms are larger than C
      >>> bool(how.following(1.0, count, jax.random.key(0), normalize_by=100.0) > 1.0)
      True
    """

    quantile: float
    learning_rate: float
    count_noise: float

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"adaptive.quantile is {self.quantile}, allowed: between 0 and 1")

    def gradient_noise(self, noise_multiplier: float) -> float:
        """σ_Δ > σ; ValueError where the noise of the count alone costs more than σ."""
        if 2 * self.count_noise <= noise_multiplier:
            least = f"more than half of noise_multiplier, {noise_multiplier:.4g}"
            raise ValueError(f"adaptive.count_noise is {self.count_noise}, allowed: {least}")
        return float((noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5)

    def following(self, max_norm: ArrayLike, within: Array, key: Array, normalize_by: ArrayLike) -> Array:
        """The C of the next step;  normalize_by: q N."""
        noised = within + self.count_noise * jax.random.normal(key, dtype=within.dtype)
        share = 0.5 + noised / jnp.asarray(normalize_by, within.dtype)
        return jnp.asarray(max_norm, within.dtype) * jnp.exp(-self.learning_rate * (share - self.quantile))


# What it costs --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Accounting:
    """All that ε depends on but the noise of the steps.

    rate: q, with which a sample is in a batch; 1 takes all samples each time;  steps: T;  delta: δ, well below 1/N;
    accountant: "pld", by privacy loss distributions, is tight; "rdp", by Rényi divergences, gives more;
    adjacency: what two data sets differ in; "replace-one" is for "pld" alone;
    pca_noise: σ of a private PCA of the same samples, a Gaussian mechanism besides the steps; None: there is none.

    Raises:
      ValueError: a number that is out of range, an unknown accountant or adjacency.
    """

    rate: float
    steps: int
    delta: float
    accountant: Accountant = "pld"
    adjacency: Adjacency = "add-or-remove-one"
    pca_noise: float | None = None

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, allowed: 1 or more")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}, allowed: between 0 and 1")
        for name, allowed in {"accountant": Accountant, "adjacency": Adjacency}.items():
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"{name} is {value!r}, allowed: {', '.join(get_args(allowed))}")
        if (self.accountant, self.adjacency) == ("rdp", "replace-one"):
            raise ValueError('accountant "rdp" has no adjacency "replace-one" for Poisson sampling, "pld" has it')

    def epsilon(self, noise_multiplier: float, losses: float = FINE) -> float:
        """ε with this σ;  losses: to which "pld" rounds the losses of privacy."""
        return float(self._accountant(losses).compose(self.event(noise_multiplier)).get_epsilon(self.delta))

    def noise_multiplier(self, epsilon: float) -> float:
        """The smallest σ, to one part in 10³, with which ε is at most this one."""
        if not LEAST_EPSILON <= epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}, allowed: {LEAST_EPSILON} or more")
        dp, high, losses = _dp_accounting(), 1.0, max(FINE, min(10 * FINE, epsilon / 100, 1 / self.steps))
        if self.epsilon(MOST_NOISE, losses) > epsilon:
            pca = " after the PCA" if self.pca_noise else ""
            raise ValueError(f"epsilon is {epsilon}, too little for {self.steps} steps{pca}, whatever their noise")
        while self.epsilon(high, losses) > epsilon:
            high *= 2
        while self.epsilon(high / 2, losses) <= epsilon:
            high /= 2
        make, bracket = lambda: self._accountant(losses), dp.ExplicitBracketInterval(high / 2, high)
        return float(dp.calibrate_dp_mechanism(make, self.event, epsilon, self.delta, bracket, tol=1e-7 * high))

    def event(self, noise_multiplier: float) -> Any:
        """The mechanism as an event of dp-accounting, which its accountants compose with others."""
        if not 0 < noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is {noise_multiplier}, allowed: a number above 0")
        dp = _dp_accounting()
        gaussian = dp.GaussianDpEvent(noise_multiplier)
        step = gaussian if self.rate == 1 else dp.PoissonSampledDpEvent(self.rate, gaussian)
        steps = dp.SelfComposedDpEvent(step, self.steps)
        return steps if self.pca_noise is None else dp.ComposedDpEvent([dp.GaussianDpEvent(self.pca_noise), steps])

    def _accountant(self, losses: float) -> Any:
        """A new one of dp-accounting."""
        dp = _dp_accounting()
        relation = dp.NeighboringRelation[self.adjacency.replace("-", "_").upper()]
        if self.accountant == "pld":
            return dp.pld.PLDAccountant(relation, losses)
        return dp.rdp.RdpAccountant(None, relation)


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float, accountant: Accountant = "pld") -> float:
    """ε of a number of private steps, at δ; of more, such as another adjacency, see `Accounting`.

    Args:
      noise_multiplier: σ > 0, the noise's standard deviation in units of C.
      rate, steps, delta, accountant: q, T, δ and how ε is computed, as in `Accounting`.

    Raises:
      ValueError: a number that is out of range, an unknown accountant.
      ModuleNotFoundError: dp-accounting is not installed.

    Example:
      >>> round(epsilon(noise_multiplier=0.7, rate=0.01, steps=120, delta=1e-5, accountant="rdp"), 3)
      3.239
    """
    return Accounting(rate, steps, delta, accountant).epsilon(noise_multiplier)


def noise_multiplier(epsilon: float, rate: float, steps: int, delta: float, accountant: Accountant = "pld") -> float:
    """The smallest σ, to one part in 10³, with which `epsilon` of a number of private steps is at most ε.

    Args:
      epsilon: ε ≥ 0.01.
      rate, steps, delta, accountant: as for `epsilon`.

    Raises:
      ValueError, ModuleNotFoundError: as `epsilon`; an ε below 0.01.

    Example:
      >>> round(noise_multiplier(epsilon=8.0, rate=0.04, steps=2250, delta=1e-5, accountant="rdp"), 3)
      1.416
    """
    return Accounting(rate, steps, delta, accountant).noise_multiplier(epsilon)


def capacity(samples: int, rate: float, steps: int, delta: float, epsilon: float) -> int:
    """Room for every batch: batches that are cut off cost a part in a million of δ, in all steps together.

    The smallest c with (1 + e^ε) T P(size > c) ≤ 10⁻⁶ δ, size ~ Binomial(N, q). Steps with and without the cut are
    alike but for the chance T P(size > c), so from (ε, δ) without it follows (ε, (1 + 10⁻⁶) δ) with it.

    Example:
      >>> capacity(samples=60_000, rate=0.01, steps=6_000, delta=1e-5, epsilon=3.9)
      815
    """
    from scipy import stats

    chance = 1e-6 * delta / steps / (1 + math.exp(min(epsilon, 600.0)))
    fits = lambda size: bool(stats.binom.sf(size, samples, rate) <= chance)  # noqa: E731
    return max(1, bisect.bisect_left(range(samples), True, key=fits))


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}, allowed: above 0 and at most 1")


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ModuleNotFoundError:
        hint = "the package dp_accounting is missing: pip install '.[private]' in the clone of jaxbp installs it"
        raise ModuleNotFoundError(hint, name="dp_accounting") from None
    return dp_accounting
