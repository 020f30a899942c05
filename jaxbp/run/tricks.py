"""How a step computes the gradient of its batch: [train] memory, micro_batches and precision.

All that a step needs of a batch are sums over its samples, formed layer by layer as δ⁽ˡ⁾ appears: so the layers can be
passed with checkpoints (`jaxbp.memory`) and the batch in parts.

Mixed precision casts parameters and inputs to bfloat16 here, at the step's border, and the gradient back: the core runs
in bfloat16, each product accumulated in float32 and rounded once, loss and bias sums in float32; the update and the
parameters it changes are in float32. The matmul precision BF16_BF16_F32 of JAX would leave the core in float32, but XLA
ignores it on CPUs (JAX 0.10: the bits of float32).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbp import memory
from jaxbp.memory import Schedule
from jaxbp.mlp import MLP, Affine, Array, Factors, Params, gradient, wide
from jaxbp.run.config import Config, TrainConfig
from jaxbp.run.errors import UserError


class Tricks(NamedTuple):
    """The schedule of `jaxbp.memory`, None for storing all; into how many parts a batch is cut; whether in bfloat16."""

    schedule: Schedule | None = None
    micro_batches: int = 1
    mixed: bool = False


class OfBatch(NamedTuple):
    """The mean loss of the samples that count; of each layer the mean gradient and the mean square of δ⁽ˡ⁾.

    factors: those of the batch where they were asked for, else None.
    """

    loss: Array
    gradient: Params
    delta_squares: tuple[Array, ...]
    factors: Factors | None = None


def check(config: Config, samples: int) -> None:
    """UserError for tricks that do not go together with the rest of a run on so many training samples."""
    train = config.train
    batch = min(train.batch_size, samples)
    if batch % train.micro_batches:
        raise UserError(f"train.micro_batches: {train.micro_batches} does not divide the {batch} samples of a batch")
    if train.precision == "mixed" and config.model.dtype != "float32":
        raise UserError(f'train.precision: "mixed" needs model.dtype "float32", it is "{config.model.dtype}"')
    if config.study.quantities and (train.memory != "store-all" or train.micro_batches > 1):
        key = "memory" if train.memory != "store-all" else "micro_batches"
        raise UserError(f"train.{key}: [study] quantities need all layers of the whole batch: leave out one of the two")


def tricks(config: TrainConfig, net: MLP) -> Tricks:
    """Those of a [train] table."""
    layers = len(net.sizes) - 1
    schedule: Schedule | None = None
    if isinstance(config.memory, Mapping):
        schedule = memory.revolve(layers, config.memory["slots"])
    elif config.memory == "sqrt":
        schedule = memory.segments(layers)
    return Tricks(schedule, config.micro_batches, config.precision == "mixed")


def of_batch(
    net: MLP, params: Params, x: Array, y: Array, weights: Array, count: Array, tricks: Tricks, keep_factors: bool
) -> OfBatch:
    """What a step needs of its batch; samples of weight 0 do not count, `count` is the number of those that do."""
    low = params
    if tricks.mixed:
        low, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    parts = tricks.micro_batches
    if parts == 1:
        found = _of_part(net, low, x, y, weights, count, tricks, keep_factors)
    else:

        def add(total: OfBatch, part: tuple[Array, Array, Array]) -> tuple[OfBatch, None]:
            x, y, weights = part
            found = _of_part(net, low, x, y, weights, count, tricks, keep_factors=False)
            return jax.tree.map(lambda t, a: t + a.astype(t.dtype), total, found), None

        split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (x, y, weights))
        zero, zeros = jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), params)
        total = OfBatch(zero.astype(wide(x.dtype)), zeros, (zero,) * len(params))
        found, _ = jax.lax.scan(add, total, split)
    return found._replace(gradient=jax.tree.map(lambda g, p: g.astype(p.dtype), found.gradient, params))


def _of_part(
    net: MLP, params: Params, x: Array, y: Array, weights: Array, count: Array, tricks: Tricks, keep_factors: bool
) -> OfBatch:
    """Of some of the samples that count, as their share of the mean."""

    def quantity(f: Factors) -> tuple[tuple[Affine, Array, tuple[Array, Array] | None], ...]:
        kept = zip(f.x, f.delta, strict=True) if keep_factors else (None for _ in f.x)
        return tuple(zip(gradient(f, weights, normalize_by=count), _squares(f, weights, count), kept, strict=True))

    schedule = len(params) if tricks.schedule is None else tricks.schedule
    losses, layers = memory.each_layer(quantity, net, params, x, y, schedule)
    loss = jnp.sum(jnp.where(weights == 0, 0, losses)) / count.astype(losses.dtype)
    grads, squares, kept = zip(*layers, strict=True)
    return OfBatch(loss, grads, squares, Factors(*zip(*kept, strict=True)) if keep_factors else None)


def _squares(f: Factors, weights: Array, count: Array) -> tuple[Array, ...]:
    """The mean square of each δ⁽ˡ⁾, over its elements and the samples that count."""
    squares = [jnp.mean(jnp.square(delta.astype(jnp.float32)), axis=1) for delta in f.delta]
    return tuple(jnp.sum(jnp.where(weights == 0, 0, square)) / count for square in squares)
