"""An epoch, the compiled part of a run: one `lax.scan` over data that live on the device. So is an evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp import losses
from jaxbp.mlp import MLP, Array, wide
from jaxbp.network import Net, ParamTree, dtype_of, layer_of
from jaxbp.private import poisson_batch
from jaxbp.run.compute.privacy import Privacy, secret
from jaxbp.run.compute.step import State, Steps, StepSpec, step
from jaxbp.run.config import Config

EVALUATED_AT_ONCE = 1000  # samples; bounds the memory of an evaluation


class Evaluation(NamedTuple):
    """Of every sample: the loss (N,) and the network's output (N, C); of positions with labels the largest, (N, T)."""

    loss: Array
    output: Array


def epoch(
    spec: StepSpec, state: State, x: Array, y: Array, key: Array, done: ArrayLike = 0, weights: Array | None = None
) -> tuple[State, Steps]:
    """One pass over the samples in an order drawn from the key; `done` counts the steps before it, for records.

    weights: (N,), what each sample counts in the mean of its batch; None: they count alike.
    """
    rows, counted = drawn(key, len(x), spec.batch_size, spec.privacy, weights)
    if spec.text:
        x, y = moved(key, x), moved(key, y)
    counted = counted.astype(dtype_of(state.params))
    return scan(spec, state, rows, counted, lambda rows: (x[rows], y[rows]), done, key)


def moved(key: Array, blocks: Array) -> Array:
    """The blocks of a text, (N, T), cut less than a block later, by the key; the end joins the start."""
    by = jax.random.randint(jax.random.fold_in(key, 1), (), 0, blocks.shape[1])
    return jnp.roll(blocks.ravel(), -by).reshape(blocks.shape)


@functools.partial(jax.jit, static_argnames=("samples", "batch_size", "privacy"))
def drawn(
    key: Array, samples: int, batch_size: int, privacy: Privacy | None = None, weights: Array | None = None
) -> tuple[Array, Array]:
    """The rows of each step of an epoch, (S, B), and what they count: each sample once, in an order from the key.

    Of a private run Poisson batches. Batches are filled up with samples that do not count, so that every step has the
    same shape and no sample is dropped. weights: (N,); those of a step then add up to the count of its samples.
    """
    if privacy is not None:
        keys = jax.random.split(jax.random.fold_in(key, 3), -(-samples // batch_size))
        rate, capacity = privacy.accounting.rate, privacy.capacity
        return jax.lax.map(lambda key: poisson_batch(key, samples, rate, capacity), keys)
    batch_size = min(batch_size, samples)
    steps = -(-samples // batch_size)
    order = jnp.resize(jax.random.permutation(key, samples), (steps, batch_size))
    present = (jnp.arange(steps * batch_size) < samples).reshape(steps, batch_size)
    if weights is None:
        return order, present
    found = jnp.where(present, weights[order], 0)
    total, count = jnp.sum(found, axis=1, keepdims=True), jnp.sum(present, axis=1, keepdims=True, dtype=found.dtype)
    return order, found * count / total


def scan(
    spec: StepSpec,
    state: State,
    batches: Any,
    weights: Array,
    read: Callable[[Any], tuple[Array, Array]],
    done: ArrayLike,
    key: Array | None = None,
) -> tuple[State, Steps]:
    """The steps of an epoch, weights (S, B): `read` gives inputs and targets of the batch of a step."""
    records = spec.recording and (jnp.arange(len(weights)) + done) % spec.recording.every == 0
    keys = None
    if key is not None and (spec.privacy or not isinstance(spec.net, MLP)):
        keys = jax.random.split(jax.random.fold_in(key, 2), len(weights))

    def one(state: State, batch: tuple[Any, Array, Array | None, Array | None]) -> tuple[State, Steps]:
        rows, weights, records, key = batch
        return step(spec, state, (*read(rows), weights), records, key)

    return jax.lax.scan(one, state, (batches, weights, records, keys))


@functools.partial(jax.jit, static_argnames="net")
def evaluate(net: Net, params: ParamTree, x: Array, y: Array) -> Evaluation:
    """Loss and output of every sample, so many samples at a time."""
    at_once = EVALUATED_AT_ONCE if isinstance(net, MLP) else EVALUATED_AT_ONCE // 10
    return jax.lax.map(functools.partial(evaluated, net, params), (x, y), batch_size=at_once)


def evaluated(net: Net, params: ParamTree, sample: tuple[Array, Array]) -> Evaluation:
    """Loss and output of one sample."""
    output, loss = layer_of(net).forward(params, sample[0])[0].astype(wide(dtype_of(params))), losses.get(net.loss)
    found = jnp.argmax(output, axis=-1) if loss.positions and loss.target != "array" else output
    return Evaluation(loss.ell(output, sample[1]), found)


def run_key(config: Config) -> Array:
    """The key of all that is drawn in a run; epoch e, from 1 on, draws from ``fold_in(key, e)``."""
    return secret(config) if config.privacy.enabled else order_key(config.train.seed)


def order_key(seed: int) -> Array:
    """The key of a run that is not private, for the order of the samples and dropout."""
    return jax.random.fold_in(jax.random.key(seed), 0)
