"""The [privacy] table: the private part of a step, what the run spends, and the key that its secrets come from."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp import factor, persample, private, scaled
from jaxbp.factor import FactorTree
from jaxbp.mlp import Array
from jaxbp.network import ParamTree, gradient
from jaxbp.private import Accounting, AdaptiveNorm
from jaxbp.run.config import Config
from jaxbp.run.data.text import is_text
from jaxbp.run.errors import UserError
from jaxbp.run.host import processes

_epsilon = functools.lru_cache(maxsize=1024)(Accounting.epsilon)  # asked for before, in and after a run
UNRECORDED = "not recorded: ε would not cover it"  # the digest of the data of a private run
Clip = Callable[[FactorTree, Array], tuple[ParamTree, Array | None]]
"""Factors and the divisor ↦ the mean of clipped gradients and, where C is adaptive, `private.within`."""


@dataclasses.dataclass(frozen=True)
class Privacy:
    """The private part of a step, static, and how it is accounted.

    max_norm: C;  per_layer: the norm C/√L to which each layer is clipped by itself, None: C for all together;
    noise_multiplier: σ;  expected: q N, the divisor of sums;  capacity: the length of the arrays of a batch;
    accounting: of the whole run;  adaptive: how C, the first one then, follows the norms.
    """

    max_norm: float
    per_layer: float | None
    noise_multiplier: float
    expected: int
    capacity: int
    accounting: Accounting
    adaptive: AdaptiveNorm | None = None

    def clipping(self, weights: Array, max_norm: ArrayLike | None, passed: Callable[..., Any] | None) -> Clip:
        """How the gradients of samples are clipped, to max_norm or else to C.

        passed: what finds a quantity of each layer, where a schedule never has all of them at the same time; a first
        pass finds the norms then, and C/‖gₙ‖ is a weight.
        """
        bound = self.max_norm if max_norm is None else max_norm
        if self.per_layer or passed is None:
            return functools.partial(self._clipped, weights, bound)
        _, layers = passed(_squares)
        square, root = scaled.added([pair for layer in layers for pair in layer])
        norms = jnp.sqrt(square) * root * root
        shares, within = private.clip_weights(norms, bound, weights), self._within(norms, bound, weights)
        return lambda f, count: (_mean(f, shares, count), within)

    def released(
        self, mean: ParamTree, within: Array | None, max_norm: Array | None, keys: Sequence[Array]
    ) -> tuple[ParamTree, Array | None]:
        """The mean with noise of the standard deviation σ C / (q N), σ_Δ for σ with an adaptive C, and the next C."""
        if self.adaptive is None or within is None or max_norm is None:
            return private.noisy(mean, self.noise_multiplier * self.max_norm / self.expected, keys[0]), None
        noise = self.adaptive.gradient_noise(self.noise_multiplier)
        noised = private.noisy(mean, noise * max_norm / self.expected, keys[0])
        return noised, self.adaptive.following(max_norm, within, keys[1], self.expected)

    def epsilon(self, steps: int | None = None) -> float:
        """ε after a number of steps, by default at the end."""
        accounting = dataclasses.replace(self.accounting, steps=self.accounting.steps if steps is None else steps)
        return _epsilon(accounting, self.noise_multiplier)

    def describe(self) -> str:
        """ε of the run, in a line with all that it depends on."""
        layers, how = "/√L for each layer" if self.per_layer else "", self.accounting
        share = f", at first, then the {self.adaptive.quantile:g} quantile of the norms" if self.adaptive else ""
        pca = f"a PCA with σ = {how.pca_noise:g} and " if how.pca_noise else ""
        return (
            f"private: ε = {self.epsilon():.4g} at δ = {how.delta:g} ({how.adjacency}, "
            f"{how.accountant.upper()} accountant) after {pca}{how.steps:,} steps of Poisson sampling with "
            f"q = {how.rate:.4g}, σ = {self.noise_multiplier:.4g}, C = {self.max_norm:g}{layers}{share}"
        )

    def provenance(self) -> dict[str, Any]:
        """The run as an event that dp-accounting and its accountants take, and what it was made from."""
        event = repr(self.accounting.event(self.noise_multiplier))
        found = {"epsilon": self.epsilon(), "event": event, "dp_accounting": version("dp-accounting")}
        return {"privacy": found | dataclasses.asdict(self)}

    def _clipped(
        self, weights: Array, max_norm: ArrayLike, f: FactorTree, count: Array
    ) -> tuple[ParamTree, Array | None]:
        """A `Clip`, of the factors of all layers."""
        if self.per_layer:
            bounds = jnp.full(len(factor.parts(f)), self.per_layer)
            return private.clipped_mean(f, bounds, count, weights, per_layer=True), None
        within = self._within(persample.grand(f), max_norm, weights)
        return private.clipped_mean(f, max_norm, count, weights), within

    def _within(self, norms: Array, max_norm: ArrayLike, weights: Array) -> Array | None:
        return private.within(norms, max_norm, weights.astype(norms.dtype)) if self.adaptive else None


def _squares(f: FactorTree) -> tuple[list[tuple[Array, Array]], ...]:
    return tuple([scaled.squares(part) for part in scaled.rows(layer)] for layer in factor.layers(f))


def _mean(f: FactorTree, weights: Array, count: Array) -> ParamTree:
    with private.full_precision():
        return gradient(scaled.in_wide(f), weights, count)


def plan(config: Config, samples: int, devices: int) -> Privacy | None:
    """The private part of a config's steps, with the σ that its ε allows; None where the config has no [privacy].

    devices: over which a batch is split; the length of its arrays is a multiple of them and of the micro-batches.

    Raises:
      UserError: what does not go together, or can't be accounted.
    """
    table, train = config.privacy, config.train
    if not table.enabled:
        return None
    norm = _checked(config)
    expected, steps = min(train.batch_size, samples), train.epochs * -(-samples // train.batch_size)
    rate = expected / samples
    try:
        how = Accounting(rate, steps, table.delta, table.accountant, table.adjacency, table.pca_noise)
        sigma = table.noise_multiplier or how.noise_multiplier(table.epsilon or 0.0)
        spent = _epsilon(how, sigma)
        adaptive = _adaptive(table.adaptive, expected, sigma)
    except ValueError as error:
        raise UserError(f"privacy.{error}") from None
    parts = math.lcm(train.micro_batches, devices)
    room = parts * -(-private.capacity(samples, rate, steps, table.delta, spent) // parts)
    per_layer = norm / math.sqrt(len(config.model.sizes or ()) - 1) if table.per_layer else None
    _warn(config, samples)
    return Privacy(norm, per_layer, sigma, expected, room, how, adaptive)


def _adaptive(given: Mapping[Any, float] | None, expected: int, sigma: float) -> AdaptiveNorm | None:
    """With the numbers of Andrew et al. for what is not given; ValueError where they do not fit each other or σ."""
    if given is None:
        return None
    found = AdaptiveNorm(**({"quantile": 0.5, "learning_rate": 0.2, "count_noise": expected / 20} | dict(given)))
    found.gradient_noise(sigma)
    return found


def secret(config: Config) -> Array:
    """The key of the batches and the noise of a private run: 64 bits of the operating system's, or from a seed."""
    if config.privacy.seed is not None:
        return jax.random.fold_in(jax.random.key(config.privacy.seed), config.train.seed)
    words = processes.from_first(lambda: list(os.urandom(8)))
    return jax.random.wrap_key_data(jnp.array(words, jnp.uint8).view(jnp.uint32))


def _checked(config: Config) -> float:
    """C; UserError for what does not go together."""
    table, data = config.privacy, config.data
    if table.max_norm is None:
        raise UserError("privacy.max_norm: set it; noise protects clipped gradients only")
    if (table.noise_multiplier is None) == (table.epsilon is None):
        both = "neither is" if table.epsilon is None else "both are"
        raise UserError(f"privacy.epsilon: set it or privacy.noise_multiplier; {both} set")
    if (table.pca_noise is None) != (data.pca is None):
        raise UserError("privacy.pca_noise: it goes with data.pca, which takes all samples: set both or neither")
    if config.study.quantities:
        raise UserError("study.quantities: they are of single samples, which [privacy] hides: leave out one of the two")
    if table.per_layer and config.model.kind != "mlp":
        raise UserError('privacy.per_layer: only layers of model.kind "mlp" are clipped by themselves')
    if table.per_layer and table.adaptive is not None:
        raise UserError("privacy.adaptive: it is of one C for all layers: leave out privacy.per_layer")
    if is_text(data.name):
        raise UserError("privacy: a text is cut at other places in each epoch, so no block of it stays a sample")
    if config.model.dtype == "bfloat16":
        raise UserError('model.dtype: "bfloat16" rounds sums of gradients, [privacy] needs "float32" or "float64"')
    of_all = {key: getattr(data, key) for key in ("standardize", "standardize_targets", "missing")}
    for key, value in of_all.items():
        if value in ("feature", "global", "mean", True):
            hint = 'take "none" or {mean = …, scale = …}' if key == "standardize" else "leave it out"
            raise UserError(f"data.{key}: {value} comes from all training samples, which ε does not cover: {hint}")
    return table.max_norm


def _warn(config: Config, samples: int) -> None:
    """Says on standard error what makes a run less private than it looks."""
    table, said = config.privacy, []
    if table.delta >= 1 / samples:
        said += [f"delta: {table.delta:g} is not below 1/N = {1 / samples:.2g}: it allows to publish a sample"]
    if table.seed is not None:
        said += [f"seed: {table.seed}: whoever knows it can take the noise away: for tests only"]
    for line in said if processes.leads() else ():
        print(f"jaxbp: warning: privacy.{line}", file=sys.stderr)
