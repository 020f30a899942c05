"""`jaxbp predict --laplace`: how sure a trained MLP is, by Laplace's approximation with Kronecker factors.

The parameters are taken as normal around the trained ones, with the precision N G + τ: G by EK-FAC at the training
samples, and τ where the evidence is largest. For labels the variance of the outputs makes probabilities less extreme,
softmax(xᶜ / √(1 + π σ_c² / 8)) (D. MacKay, *The evidence framework applied to classification networks*, 1992). For
numbers it gives a standard deviation, with the mean squared residual of the training samples as the noise.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import losses
from jaxbp.influence import log_det, predictive_variance
from jaxbp.kronecker import Eigen, ekfac
from jaxbp.mlp import MLP, Params
from jaxbp.run import problem as problems
from jaxbp.run.compute.epoch import evaluate
from jaxbp.run.errors import UserError
from jaxbp.run.problem import drawn
from jaxbp.run.store.model import Model

SAMPLES = 10_000  # of the training set at most, whose Kronecker factors are taken
PRIORS = np.logspace(-4, 6, 101)
AT_ONCE = 1000


class Posterior(NamedTuple):
    """Blocks of G, N divided by the variance of the noise, τ, and that variance, 0 for labels; of scaled targets."""

    blocks: tuple[Eigen, ...]
    samples: float
    prior: float
    noise: float


def posterior(run: Path, model: Model) -> Posterior:
    """At the training samples of a finished run.

    Raises:
      UserError: no MLP, another loss than softmax_cross_entropy of labels or squared_error; other data than the run's.
    """
    net, loss = model.net, losses.get(model.net.loss).name
    if not isinstance(net, MLP):
        raise UserError('--laplace: it takes curvature, which only model.kind "mlp" has')
    if loss != "squared_error" and not (model.classes and loss == "softmax_cross_entropy"):
        raise UserError(f"--laplace: it is for labels with softmax_cross_entropy, and squared_error; {run} has {loss}")
    problem = problems.of_run(run, model)
    if problem.weights is not None:
        raise UserError(f"--laplace: it takes samples that count alike, {run} was trained with weights")
    x, y = problem.on_device("train")
    rows, noise = drawn(len(x), SAMPLES), 0.0
    if loss == "squared_error":
        noise = float(2 * jnp.mean(evaluate(problem.scored, model.params, x, y).loss)) / net.sizes[-1]
    count = len(x) / (noise or 1.0)
    blocks = jax.jit(ekfac, static_argnums=0)(problem.scored, model.params, x[rows], y[rows])
    return Posterior(blocks, count, _prior(blocks, count, model.params), noise)


def _prior(blocks: tuple[Eigen, ...], count: float, params: Params) -> float:
    """τ at which the evidence is largest, among PRIORS: −½ τ ‖(w, b)‖² − ½ log det(I + N G/τ)."""
    norm = sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in jax.tree.leaves(params))
    dets = jax.jit(jax.vmap(lambda prior: log_det(blocks, count, prior)))(jnp.asarray(PRIORS, jnp.float32))
    return float(PRIORS[np.argmax(-PRIORS * norm - np.asarray(dets, np.float64))])


def header(model: Model) -> list[str]:
    """The names of the columns of `rows`."""
    if model.classes:
        return ["class", *(f"p {name}" for name in model.classes)]
    return [name for k in range(model.sample.outputs) for name in (f"y{k}", f"sd{k}")]


def rows(model: Model, found: Posterior, x: np.ndarray) -> list[list[object]]:
    """For raw inputs a row each: the class and the probability of every class, or each output and its deviation.

    The deviation is that of a new target, with the noise, in its units.
    """
    output = model.predict(x)
    variance = np.concatenate([_variance(model, found, x[i : i + AT_ONCE]) for i in range(0, len(x), AT_ONCE)])
    if model.classes:
        moderate = output / np.sqrt(1 + np.pi / 8 * variance)
        powers = np.exp(moderate - moderate.max(axis=1, keepdims=True))
        p = powers / powers.sum(axis=1, keepdims=True)
        return [[model.classes[k], *row.tolist()] for k, row in zip(p.argmax(axis=1), p, strict=True)]
    unit = 1.0 if model.targets is None else model.targets.scale
    deviation = np.sqrt(variance + found.noise) * unit
    return np.stack([output, deviation], axis=2).reshape(len(x), -1).tolist()


def _variance(model: Model, found: Posterior, x: np.ndarray) -> np.ndarray:
    """Of every output, (N, C)."""
    variance = jax.jit(predictive_variance, static_argnums=0)
    covariance = variance(model.net, model.params, model.scaled(x), found.blocks, found.samples, found.prior)
    return np.asarray(jnp.diagonal(covariance, axis1=1, axis2=2), np.float64)
