"""An epoch, the compiled part of a run: one `lax.scan` over data that live on the device. So is an evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp import losses
from jaxbp.mlp import MLP, Array, Params, forward, wide
from jaxbp.run.compute.step import State, Steps, StepSpec, step

EVALUATED_AT_ONCE = 1000  # samples; bounds the memory of an evaluation


class Evaluation(NamedTuple):
    """Of every sample: the loss (N,) and the network's output (N, C)."""

    loss: Array
    output: Array


def epoch(spec: StepSpec, state: State, x: Array, y: Array, key: Array, done: ArrayLike = 0) -> tuple[State, Steps]:
    """One pass over the samples in an order drawn from the key; `done` counts the steps before it, for records."""
    rows, present = drawn(key, len(x), spec.batch_size)
    return scan(spec, state, rows, present.astype(x.dtype), lambda rows: (x[rows], y[rows]), done)


@functools.partial(jax.jit, static_argnames=("samples", "batch_size"))
def drawn(key: Array, samples: int, batch_size: int) -> tuple[Array, Array]:
    """The rows of each step of an epoch, (S, B), and whether they count: each sample once, in an order from the key.

    The last batch is filled up with samples of weight 0, so that every step has the same shape and none is dropped.
    """
    batch_size = min(batch_size, samples)
    steps = -(-samples // batch_size)
    order = jnp.resize(jax.random.permutation(key, samples), (steps, batch_size))
    return order, (jnp.arange(steps * batch_size) < samples).reshape(steps, batch_size)


def scan(
    spec: StepSpec,
    state: State,
    batches: Any,
    weights: Array,
    read: Callable[[Any], tuple[Array, Array]],
    done: ArrayLike,
) -> tuple[State, Steps]:
    """The steps of an epoch, weights (S, B): `read` gives inputs and targets of the batch of a step."""
    records = spec.recording and (jnp.arange(len(weights)) + done) % spec.recording.every == 0

    def one(state: State, batch: tuple[Any, Array, Array | None]) -> tuple[State, Steps]:
        rows, weights, records = batch
        return step(spec, state, *read(rows), weights, records)

    return jax.lax.scan(one, state, (batches, weights, records))


@functools.partial(jax.jit, static_argnames="net")
def evaluate(net: MLP, params: Params, x: Array, y: Array) -> Evaluation:
    """Loss and output of every sample, EVALUATED_AT_ONCE samples at a time."""
    return jax.lax.map(functools.partial(evaluated, net, params), (x, y), batch_size=EVALUATED_AT_ONCE)


def evaluated(net: MLP, params: Params, sample: tuple[Array, Array]) -> Evaluation:
    """Loss and output of one sample."""
    output = forward(net, params, sample[0]).x[-1].astype(wide(params[0].w.dtype))
    return Evaluation(losses.get(net.loss).ell(output, sample[1]), output)


def order_key(seed: int) -> Array:
    """The key of the order of the samples; epoch e, from 1 on, draws from ``fold_in(key, e)``."""
    return jax.random.fold_in(jax.random.key(seed), 0)
