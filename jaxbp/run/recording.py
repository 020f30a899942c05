"""What a run with a [study] table records of a step's batch, from the factors and the gradient that the step has.

Samples of weight 0, which fill up the last batch of an epoch, do not count.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import persample
from jaxbp.mlp import Array, Factors, Params, wide

QUARTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


class Batch(NamedTuple):
    """Of one step: the factors, the mean gradient of the samples that count, their weights of 1 (else 0), how many."""

    factors: Factors
    gradient: Params
    weights: Array
    samples: Array


class Recording(NamedTuple):
    """Which quantities, by their names in QUANTITIES, at the steps 1, 1 + every, 1 + 2 · every …"""

    quantities: tuple[str, ...]
    every: int


def record(recording: Recording, batch: Batch) -> dict[str, Any]:
    """The quantities of a batch as scalars and vectors of a number a layer."""
    return {name: QUANTITIES[name](batch) for name in recording.quantities}


def rows(recording: Recording, recorded: Any, loss: np.ndarray, epoch: int, done: int) -> list[dict[str, Any]]:
    """Lines for metrics.jsonl from an epoch's stacked records; `loss` is that of its steps, `done` counts those before.

    A line belongs to the parameters before its step.
    """
    arrays = {name: jax.tree.map(np.asarray, recorded[name]) for name in recording.quantities}  # jax.jit sorts by name

    def row(i: int) -> dict[str, Any]:
        values = {name: jax.tree.map(lambda array: array[i].tolist(), arrays[name]) for name in arrays}
        return {"epoch": epoch, "step": done + i + 1, "batch_loss": float(loss[i]), **values}

    return [row(i) for i in range(-done % recording.every, len(loss), recording.every)]


def summary(values: Array, weights: Array) -> dict[str, Array]:
    """Mean, extremes and quartiles (linear between samples) of the values whose weight is not 0."""
    counted = weights != 0
    count = jnp.sum(counted, dtype=values.dtype)
    ordered = jnp.sort(jnp.where(counted, values, jnp.inf))
    position = jnp.asarray(list(QUARTILES.values()), values.dtype) * (count - 1)
    below, above = (ordered[f(position).astype(jnp.int32)] for f in (jnp.floor, jnp.ceil))
    found = jnp.where(below == above, below, below + (position - jnp.floor(position)) * (above - below))
    mean = jnp.sum(jnp.where(counted, values, 0)) / count
    return {"mean": mean, **{name: found[i] for i, name in enumerate(QUARTILES)}}


def _squared_norms(batch: Batch) -> dict[str, Array]:
    layers = persample.squared_norms(batch.factors, per_layer=True)
    means = jnp.stack([summary(layer, batch.weights)["mean"] for layer in layers])
    return {**summary(persample.squared_norms(batch.factors), batch.weights), "mean_by_layer": means}


def _noise_scale(batch: Batch) -> dict[str, Array]:
    """NaN for a batch of one, where rounding could make the 0/0 infinite."""
    small, big = _mean_norms(batch)
    found = persample.noise_scale_from_norms(small, big, 1, batch.samples.astype(small.dtype))
    return {name: jnp.where(batch.samples > 1, value, jnp.nan) for name, value in found._asdict().items()}


def _coherence(batch: Batch) -> Array:
    small, big = _mean_norms(batch)
    return jnp.where(small == 0, 0, big / jnp.where(small == 0, 1, small))


def _diversity(batch: Batch) -> Array:
    small, big = _mean_norms(batch)
    return jnp.where(small == 0, 0, small / (big * batch.samples.astype(small.dtype)))


def _variance(batch: Batch) -> Array:
    """The mean over a layer's parameters, (L,)."""
    layers = persample.variance(batch.factors, batch.weights)
    return jnp.stack([(jnp.sum(w) + jnp.sum(b)) / (w.size + b.size) for w, b in layers])


def _mean_norms(batch: Batch) -> tuple[Array, Array]:
    """The mean of ‖gₙ‖² and ‖ḡ‖²; ḡ is the step's own, so that it is not computed again."""
    small = summary(persample.squared_norms(batch.factors), batch.weights)["mean"]
    leaves = [leaf.astype(wide(leaf.dtype)) for leaf in jax.tree.leaves(batch.gradient)]
    return small, sum((jnp.sum(leaf**2) for leaf in leaves[1:]), jnp.sum(leaves[0] ** 2))


QUANTITIES: dict[str, Callable[[Batch], Any]] = {
    "squared_norms": _squared_norms,
    "grand": lambda batch: summary(persample.grand(batch.factors), batch.weights),
    "el2n": lambda batch: summary(persample.el2n(batch.factors), batch.weights),
    "noise_scale": _noise_scale,
    "diversity": _diversity,
    "coherence": _coherence,
    "stiffness": lambda batch: persample.stiffness(batch.factors, weights=batch.weights)._asdict(),
    "variance": _variance,
}
"""Of a batch, by the names of `jaxbp.persample`; per-sample arrays as their `summary`."""


def noise_scales(recorded: Sequence[dict[str, Any]], window: int) -> np.ndarray:
    """tr Σ / |G|² from means of both over `window` records (the ratio is biased); NaN where |G|² comes out negative."""
    parts = [[row["noise_scale"][key] for row in recorded] for key in ("trace", "squared_gradient")]
    trace, gradient = (_running_mean(np.array(part, np.float64), window) for part in parts)
    return np.divide(trace, gradient, out=np.full_like(trace, np.nan), where=gradient > 0)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Of the values that are numbers, around each place; narrower at both ends."""
    known, ones = np.nan_to_num(values), np.isfinite(values).astype(np.float64)
    places = np.arange(len(values))
    first, last = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    total, count = (np.concatenate([[0], np.cumsum(a)]) for a in (known, ones))
    counts = count[last] - count[first]
    return np.divide(total[last] - total[first], counts, out=np.full(len(values), np.nan), where=counts > 0)
