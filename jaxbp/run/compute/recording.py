"""What a run with a [study] table records of a step's batch, from the factors and the gradient that the step has.

Samples of weight 0, which fill up the last batch of an epoch, do not count.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp import factor, persample
from jaxbp.factor import FactorTree
from jaxbp.mlp import Array, wide
from jaxbp.network import ParamTree
from jaxbp.run.config import choose

QUARTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


class Batch(NamedTuple):
    """Of one step: the factors, the mean gradient of the samples that count, their weights of 1 (else 0), how many."""

    factors: FactorTree
    gradient: ParamTree
    weights: Array
    samples: Array


class Recording(NamedTuple):
    """Which quantities, by their names in QUANTITIES, at the steps 1, 1 + every, 1 + 2 · every …"""

    quantities: tuple[str, ...]
    every: int


def check(quantities: Sequence[str]) -> None:
    """UserError for a quantity that no run records."""
    for name in quantities:
        choose("study.quantities", "quantity", name, QUANTITIES)


def record(recording: Recording, batch: Batch) -> dict[str, Any]:
    """The quantities of a batch as scalars and vectors of a number a layer."""
    return {name: QUANTITIES[name](batch) for name in recording.quantities}


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
    """Of all parameters, and what it is made from by layer. NaN for a batch of one, where 0/0 could round to ∞."""
    small, big = _mean_norms(batch)
    layers = _squared_norms(batch)["mean_by_layer"], jnp.stack(_squares(factor.split(batch.factors, batch.gradient)))
    whole, parts = (
        persample.noise_scale_from_norms(*norms, 1, batch.samples.astype(small.dtype))
        for norms in ((small, big), layers)
    )
    found = whole._asdict() | {f"{name}_by_layer": getattr(parts, name) for name in ("trace", "squared_gradient")}
    return {name: jnp.where(batch.samples > 1, value, jnp.nan) for name, value in found.items()}


def _coherence(batch: Batch) -> Array:
    return persample.coherence_from_norms(*_mean_norms(batch))


def _diversity(batch: Batch) -> Array:
    small, big = _mean_norms(batch)
    return persample.diversity_from_norms(small, big, batch.samples.astype(small.dtype))


def _variance(batch: Batch) -> Array:
    """The mean over a layer's parameters, (L,)."""
    found = persample.variance(batch.factors, batch.weights)
    layers = [jax.tree.leaves(part) for part in factor.split(batch.factors, found)]
    return jnp.stack([sum(map(jnp.sum, layer)) / sum(leaf.size for leaf in layer) for layer in layers])


def _mean_norms(batch: Batch) -> tuple[Array, Array]:
    """The mean of ‖gₙ‖² and ‖ḡ‖²; ḡ is the step's own, so that it is not computed again."""
    small = summary(persample.squared_norms(batch.factors), batch.weights)["mean"]
    return small, _squares([batch.gradient])[0]


def _squares(trees: Sequence[Any]) -> list[Array]:
    """The sum of the squares of each tree."""
    squares = [[jnp.sum(leaf.astype(wide(leaf.dtype)) ** 2) for leaf in jax.tree.leaves(tree)] for tree in trees]
    return [sum(rest, first) for first, *rest in squares]


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
