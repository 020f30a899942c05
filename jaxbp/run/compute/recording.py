"""What a run with a [study] table records of a step's batch, from the factors and the gradient that the step has.

Samples of weight 0, which fill up the last batch of an epoch, do not count.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp import curvature, factor, persample, spectrum
from jaxbp.factor import FactorTree
from jaxbp.mlp import MLP, Array, wide
from jaxbp.network import Net, ParamTree
from jaxbp.run.config import choose
from jaxbp.run.errors import UserError

PRODUCTS = 30  # of Lanczos for a largest eigenvalue
QUARTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Of one step: network and parameters, inputs and targets, factors, the mean gradient of the samples that count,
    their weights of 1 (else 0), how many.
    """

    net: Any = dataclasses.field(metadata={"static": True})
    params: Any
    x: Array
    y: Array
    factors: FactorTree
    gradient: ParamTree
    weights: Array
    samples: Array


class Recording(NamedTuple):
    """Which quantities, by their names in QUANTITIES, at the steps 1, 1 + every, 1 + 2 · every …"""

    quantities: tuple[str, ...]
    every: int


def check(quantities: Sequence[str], net: Net) -> None:
    """UserError for a quantity that no run records, or that this network does not have."""
    for name in quantities:
        choose("study.quantities", "quantity", name, QUANTITIES)
        if name in CURVATURE and not isinstance(net, MLP):
            raise UserError(f'study.quantities: {name} is curvature, which only model.kind "mlp" has')


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
    squares = [[jnp.sum(leaf.astype(wide(leaf.dtype)) ** 2) for leaf in jax.tree.leaves(tree)] for tree in trees]
    return [sum(rest, first) for first, *rest in squares]


def _matrix(batch: Batch, kind: str) -> curvature.Linearized:
    """The Hessian or the Gauss-Newton matrix of the batch's mean loss."""
    return curvature.linearized(batch.net, batch.params, batch.x, batch.y, kind, batch.weights, batch.samples)


def _sharpness(batch: Batch) -> dict[str, Array]:
    """Both largest eigenvalues, each with its residual: it is no further from one of the matrix."""
    found: dict[str, Array] = {}
    for kind in ("hessian", "ggn"):
        top = spectrum.eigenpairs(_matrix(batch, kind), batch.params, 1, jax.random.key(0), PRODUCTS)
        found |= {kind: top.values[0], f"{kind}_residual": top.residuals[0]}
    return found


def _hessian_trace(batch: Batch) -> Array:
    """Of each layer's block, exactly, (L,)."""
    layers = curvature.hessian_trace(batch.net, batch.params, batch.x, batch.y)
    return jnp.stack([summary(layer, batch.weights)["mean"] for layer in layers])


def _gradient_curvature(batch: Batch) -> Array:
    """ḡᵀHḡ / ‖ḡ‖²; NaN for a gradient of 0."""
    along = summary(_matrix(batch, "hessian").quadratic(batch.gradient), batch.weights)["mean"]
    return along / sum(jnp.sum(leaf.astype(along.dtype) ** 2) for leaf in jax.tree.leaves(batch.gradient))


CURVATURE: dict[str, Callable[[Batch], Any]] = {
    "sharpness": _sharpness,
    "hessian_trace": _hessian_trace,
    "gradient_curvature": _gradient_curvature,
}
QUANTITIES: dict[str, Callable[[Batch], Any]] = {
    "squared_norms": _squared_norms,
    "grand": lambda batch: summary(persample.grand(batch.factors), batch.weights),
    "el2n": lambda batch: summary(persample.el2n(batch.factors), batch.weights),
    "noise_scale": _noise_scale,
    "diversity": _diversity,
    "coherence": lambda batch: persample.coherence_from_norms(*_mean_norms(batch)),
    "stiffness": lambda batch: persample.stiffness(batch.factors, weights=batch.weights)._asdict(),
    "variance": _variance,
    **CURVATURE,
}
"""Of a batch, by the names of `jaxbp.persample`; per-sample arrays as their `summary`."""
