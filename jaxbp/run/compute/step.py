"""One step: the gradient of a batch by `jaxbp.memory`, then the update. [train] memory, micro_batches and precision.

All that a step needs of a batch are sums over its samples, formed layer by layer as δ⁽ˡ⁾ appears: so the layers can be
passed with checkpoints and the batch in parts.

Mixed precision casts parameters and inputs to bfloat16 here, at the step's border, and the gradient back: the core runs
in bfloat16, each product accumulated in float32 and rounded once, loss and bias sums in float32; the update and the
parameters it changes are in float32. The matmul precision BF16_BF16_F32 of JAX would leave the core in float32, but XLA
ignores it on CPUs (JAX 0.10: the bits of float32).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp import factor, memory, second_order
from jaxbp.factor import FactorTree
from jaxbp.memory import Schedule
from jaxbp.mlp import MLP, Array, Factors, wide
from jaxbp.network import Net, ParamTree, by_layer, dtype_of, gradient
from jaxbp.run import data
from jaxbp.run.compute import recording as recordings
from jaxbp.run.compute.optimizers import Optimizer
from jaxbp.run.compute.privacy import Clip, Privacy
from jaxbp.run.compute.recording import Batch, Recording
from jaxbp.run.config import Config, TrainConfig
from jaxbp.run.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """All of a step that is static. Hashable, so that it is one static argument of jit.

    schedule: of `jaxbp.memory`, None stores all;  micro_batches: parts that a batch is cut into;  mixed: forward and
    backward pass in bfloat16;  recording: what [study] records;  text: whether the samples are blocks of a text, which
    each epoch cuts at other places;  privacy: what [privacy] clips and adds.
    """

    net: Net
    optimizer: Optimizer
    batch_size: int
    schedule: Schedule | None = None
    micro_batches: int = 1
    mixed: bool = False
    recording: Recording | None = None
    text: bool = False
    privacy: Privacy | None = None


class State(NamedTuple):
    """What a step takes and returns. `alive` is False once a loss or gradient was not finite: then nothing changes.

    max_norm: the C of the next private step, where it is adaptive;  best: in checkpoints alone, the parameters of the
    best epoch where a score is monitored.
    """

    params: ParamTree
    optimizer: Any
    alive: Array
    max_norm: Array | None = None
    best: ParamTree | None = None


class Steps(NamedTuple):
    """What the steps of an epoch measured, in order; S steps, L layers, see `network.by_layer`.

    loss: (S,), the mean over the batch;  alive: (S,), whether loss and gradient were finite so far;
    delta, gradient: (S, L), mean squares over the elements of δ⁽ˡ⁾ (and the samples) and of ∂ℒ/∂(w⁽ˡ⁾, b⁽ˡ⁾), ℒ the
    mean loss of the batch; δ⁽ˡ⁾ are the deltas that the factors of a layer hold, NaN where they hold none;
    recorded: what `recording.record` returns, stacked, NaN in the steps that do not record; None without [study];
    max_norm: (S,), C after each private step, where it is adaptive.
    """

    loss: Array
    alive: Array
    delta: Array
    gradient: Array
    recorded: Any = None
    max_norm: Array | None = None


class Samples(NamedTuple):
    """Of a batch or a part of it; weights: (N,);  counted: how many of the batch have a weight that is not 0."""

    x: Array
    y: Array
    weights: Array
    counted: Array


class BatchGradient(NamedTuple):
    """The mean loss of the samples that count; of each layer the mean gradient and the mean square of δ⁽ˡ⁾.

    factors: those of the batch where a record needs them, else None;  within: `private.within` where C is adaptive.
    """

    loss: Array
    gradient: ParamTree
    delta_squares: tuple[Array, ...]
    factors: FactorTree | None = None
    within: Array | None = None


def spec(config: Config, net: Net, optimizer: Optimizer, privacy: Privacy | None = None) -> StepSpec:
    """The step of a config."""
    train, study = config.train, config.study
    recording = Recording(study.quantities, study.every) if study.quantities else None
    schedule, mixed = _schedule(train, net), train.precision == "mixed"
    text = data.text.is_text(config.data.name)
    return StepSpec(net, optimizer, train.batch_size, schedule, train.micro_batches, mixed, recording, text, privacy)


def check(config: Config, samples: int) -> None:
    """UserError where memory, micro_batches and precision do not fit each other, [study] or the training samples."""
    train = config.train
    batch = min(train.batch_size, samples)
    if batch % train.micro_batches and not config.privacy.enabled:  # whose batches are filled up
        raise UserError(f"train.micro_batches: {train.micro_batches} does not divide the {batch} samples of a batch")
    if train.precision == "mixed" and config.model.dtype != "float32":
        raise UserError(f'train.precision: "mixed" needs model.dtype "float32", it is "{config.model.dtype}"')
    if config.study.quantities and (train.memory != "store-all" or train.micro_batches > 1):
        key = "memory" if train.memory != "store-all" else "micro_batches"
        raise UserError(f"train.{key}: [study] quantities need all layers of the whole batch: leave out one of the two")


def check_weighted(config: Config) -> None:
    """UserError where samples with weights meet [privacy] or [study]."""
    where = "train.class_weights" if config.train.class_weights else f"data.name: {config.data.name} has weights"
    for table, used in (("privacy", config.privacy.enabled), ("study", config.study.quantities)):
        if used:
            raise UserError(f"{where}: [{table}] is for samples that count alike: leave out one of the two")


def step(
    spec: StepSpec, state: State, batch: tuple[Array, Array, Array], records: Array | None, key: Array | None = None
) -> tuple[State, Steps]:
    """One step on a batch: x, y and weights (N,), of which those of 0 do not count. `records` says whether it records.

    key: of dropout, and of the noise of a private step, all of whose results depend on the noisy gradient alone.
    """
    count = jnp.sum(batch[2], dtype=wide(dtype_of(state.params)))  # bfloat16 counts to 256
    if spec.privacy:
        count, (key, *noise) = jnp.float32(spec.privacy.expected), jax.random.split(key, 3)  # type: ignore[arg-type]
    found = batch_gradient(spec, state.params, Samples(*batch, count), key, state.max_norm)
    grads, max_norm, finite = found.gradient, None, [jnp.isfinite(found.loss)]
    if spec.privacy:
        (grads, max_norm), finite = spec.privacy.released(grads, found.within, state.max_norm, noise), []
    finite += [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]
    alive = state.alive & jnp.all(jnp.stack(finite))
    params, inner = spec.optimizer.step(state.params, grads, state.optimizer, second_order.Batch(*batch, count))
    stepped = State(params, inner, alive, max_norm)
    kept: State = jax.tree.map(lambda new, old: jnp.where(alive, new, old), stepped, state._replace(alive=alive))
    recorded = None
    if spec.recording and found.factors:
        x, y, weights = batch
        whole = Batch(spec.net, state.params, x, y, found.factors, grads, weights, count)
        recorded = _record(spec.recording, whole, records)
    squares = jnp.stack(found.delta_squares), _gradient_squares(by_layer(spec.net, grads))
    return kept, Steps(found.loss, alive, *squares, recorded, kept.max_norm)


def batch_gradient(
    spec: StepSpec, params: ParamTree, batch: Samples, key: Array | None = None, max_norm: Array | None = None
) -> BatchGradient:
    """The mean gradient over the samples of a batch that count, in the dtype of the parameters.

    max_norm: C of a private step; None: that of the config.
    """
    low = params
    if spec.mixed:
        low, x = factor.floats(lambda a: a.astype(jnp.bfloat16), (params, batch.x))
        batch = batch._replace(x=x)
    part = functools.partial(_part, spec, low, max_norm)
    if spec.micro_batches == 1:
        found = part(batch, key)
    else:

        def add(total: BatchGradient, each: tuple[Any, Array | None]) -> tuple[BatchGradient, None]:
            (x, y, weights), key = each

            def added(total: BatchGradient) -> BatchGradient:
                found = part(Samples(x, y, weights, batch.counted), key)
                return jax.tree.map(lambda t, a: t + a.astype(t.dtype), total, found)

            # of what fills a batch up, nothing is computed
            return jax.lax.cond(jnp.any(weights != 0), added, lambda total: total, total), None

        parts = jax.tree.map(lambda a: a.reshape(spec.micro_batches, -1, *a.shape[1:]), batch[:3])
        keys = None if key is None else jax.random.split(key, spec.micro_batches)
        zero, zeros = jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), params)
        first = BatchGradient(zero.astype(wide(dtype_of(low))), zeros, (zero,) * len(by_layer(spec.net, params)))
        if spec.privacy and spec.privacy.adaptive:
            first = first._replace(within=first.loss)
        found, _ = jax.lax.scan(add, first, (parts, keys))
    return found._replace(gradient=jax.tree.map(lambda g, p: g.astype(p.dtype), found.gradient, params))


def _part(
    spec: StepSpec, params: ParamTree, max_norm: Array | None, batch: Samples, key: Array | None
) -> BatchGradient:
    """Of some samples of a batch, as their share of its mean."""
    weights, count = batch.weights, batch.counted
    schedule = len(params) if spec.schedule is None else spec.schedule

    def passed(quantity: Callable[[FactorTree], Any]) -> Any:
        return memory.each_layer(quantity, spec.net, params, batch.x, batch.y, schedule, key)

    clip: Clip = lambda f, count: (gradient(f, weights, count), None)  # noqa: E731
    if spec.privacy:
        clip = spec.privacy.clipping(weights, max_norm, None if isinstance(schedule, int) else passed)
    keep = spec.recording is not None

    def quantity(f: FactorTree) -> tuple[tuple[Any, Array, FactorTree | None, Array | None], ...]:
        grads, within = clip(f, count)
        squares = [_delta_squares(layer, weights, count) for layer in factor.layers(f)]
        kept = factor.layers(f) if keep else [None] * len(squares)
        return tuple(zip(grads, squares, kept, [within] * len(squares), strict=True))

    losses, layers = passed(quantity)
    loss = jnp.sum(jnp.where(weights == 0, 0, losses)) / count.astype(losses.dtype)
    grads, every, kept, (within, *_) = zip(*layers, strict=True)
    squares = tuple(square for square, layer in zip(every, params, strict=True) if jax.tree.leaves(layer))
    if keep and isinstance(spec.net, MLP):
        kept = Factors(*(sum(arrays, ()) for arrays in zip(*kept, strict=True)))
    return BatchGradient(loss, grads, squares, kept if keep else None, within)


def _delta_squares(layer: FactorTree, weights: Array, count: Array) -> Array:
    """The mean square of all δ in the factors of a layer, over the samples that count; NaN without any."""
    uses = [use for part in factor.parts(layer) for use in getattr(part, "uses", (part,))]
    deltas = [use.delta.reshape(len(weights), -1) for use in uses if hasattr(use, "delta")]
    if not deltas:
        return jnp.array(jnp.nan, jnp.float32)
    sums = sum(jnp.sum(jnp.square(delta.astype(jnp.float32)), axis=1) for delta in deltas)
    numbers = count.astype(jnp.float32) * sum(delta.shape[1] for delta in deltas)
    return jnp.sum(jnp.where(weights == 0, 0, sums)) / numbers


def _schedule(config: TrainConfig, net: Net) -> Schedule | None:
    layers = len(net.sizes) - 1 if isinstance(net, MLP) else len(net.layer.layers)
    if isinstance(config.memory, Mapping):
        return memory.revolve(layers, config.memory["slots"])
    return memory.segments(layers) if config.memory == "sqrt" else None


def _gradient_squares(grads: list[Any]) -> Array:
    """(L,) mean squares of the elements of each layer's gradient."""
    layers = [jax.tree.leaves(layer) for layer in grads]
    sums = [sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in layer) for layer in layers]
    return jnp.stack(sums) / jnp.array([sum(leaf.size for leaf in layer) for layer in layers], jnp.float32)


def _record(recording: Recording, batch: Batch, records: Array | None) -> dict[str, Any]:
    """What the step records; NaN, at no cost, where it does not."""
    record = functools.partial(recordings.record, recording)

    def nothing(batch: Batch) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), jax.eval_shape(record, batch))

    return jax.lax.cond(records, record, nothing, batch)
