"""The compiled part of a run: an epoch is one `lax.scan` over data that live on the device; so is an evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp import losses
from jaxbp.mlp import MLP, Array, Params, forward, wide
from jaxbp.run import recording as recordings
from jaxbp.run.optimizers import Optimizer
from jaxbp.run.recording import Batch, Recording
from jaxbp.run.tricks import Tricks, of_batch

EVALUATED_AT_ONCE = 1000  # samples; bounds the memory of an evaluation


class State(NamedTuple):
    """What a step takes and returns. `alive` is False once a loss or gradient was not finite: then nothing changes."""

    params: Params
    optimizer: Any
    alive: Array


class Steps(NamedTuple):
    """What the steps of an epoch measured, in order; S steps, L layers.

    loss: (S,), the mean over the batch;  delta, gradient: (S, L), mean squares over the elements of δ⁽ˡ⁾ (and the
    samples) and of ∂ℒ/∂(w⁽ˡ⁾, b⁽ˡ⁾), ℒ the mean loss of the batch;  recorded: what `recording.record` returns, stacked,
    NaN in the steps that do not record; None in a run without records.
    """

    loss: Array
    delta: Array
    gradient: Array
    recorded: Any = None


class Evaluation(NamedTuple):
    """Of every sample: the loss (N,) and the network's output (N, C)."""

    loss: Array
    output: Array


@functools.partial(
    jax.jit, static_argnames=("net", "optimizer", "batch_size", "recording", "tricks"), donate_argnames="state"
)
def epoch(
    net: MLP,
    optimizer: Optimizer,
    batch_size: int,
    state: State,
    x: Array,
    y: Array,
    key: Array,
    recording: Recording | None = None,
    done: ArrayLike = 0,
    tricks: Tricks = Tricks(),  # noqa: B008  (a NamedTuple of constants)
) -> tuple[State, Steps]:
    """One pass over the samples in an order drawn from the key; `done` counts the steps before it, for the recording.

    The last batch is filled up with samples of weight 0, so that every step has the same shape and none is dropped.
    """
    samples = len(x)
    batch_size = min(batch_size, samples)
    steps = -(-samples // batch_size)
    order = jnp.resize(jax.random.permutation(key, samples), (steps, batch_size))
    weights = (jnp.arange(steps * batch_size) < samples).astype(x.dtype).reshape(steps, batch_size)
    records = recording and (jnp.arange(steps) + done) % recording.every == 0

    def step(state: State, batch: tuple[Array, Array, Array | None]) -> tuple[State, Steps]:
        rows, weights, records = batch

        def taken(state: State) -> tuple[State, Steps]:
            return _step(net, optimizer, recording, tricks, state, x[rows], y[rows], weights, records)

        return jax.lax.cond(
            state.alive, taken, lambda state: (state, _nothing(lambda state: taken(state)[1], state)), state
        )

    return jax.lax.scan(step, state, (order, weights, records))


@functools.partial(jax.jit, static_argnames="net")
def evaluate(net: MLP, params: Params, x: Array, y: Array) -> Evaluation:
    """Loss and output of every sample, EVALUATED_AT_ONCE samples at a time."""
    loss = losses.get(net.loss)

    def sample(batch: tuple[Array, Array]) -> Evaluation:
        output = forward(net, params, batch[0]).x[-1].astype(wide(x.dtype))
        return Evaluation(loss.ell(output, batch[1]), output)

    return jax.lax.map(sample, (x, y), batch_size=EVALUATED_AT_ONCE)


def _step(
    net: MLP,
    optimizer: Optimizer,
    recording: Recording | None,
    tricks: Tricks,
    state: State,
    x: Array,
    y: Array,
    weights: Array,
    records: Array | None,
) -> tuple[State, Steps]:
    count = jnp.sum(weights, dtype=jnp.float32)  # bfloat16 counts to 256
    keep = recording is not None
    loss, grads, deltas, factors = of_batch(net, state.params, x, y, weights, count, tricks, keep_factors=keep)
    squares = _gradient_squares(grads)
    alive = jnp.isfinite(loss) & jnp.all(jnp.isfinite(squares))
    params, inner = optimizer.step(state.params, grads, state.optimizer)
    stepped = State(params, inner, alive)
    kept: State = jax.tree.map(lambda new, old: jnp.where(alive, new, old), stepped, state._replace(alive=alive))
    recorded = recording and factors and _record(recording, Batch(factors, grads, weights, count), records)
    return kept, Steps(loss, jnp.stack(deltas), squares, recorded)


def _record(recording: Recording, batch: Batch, records: Array | None) -> dict[str, Any]:
    """What the step records; NaN, at no cost, where it does not."""
    record = functools.partial(recordings.record, recording)
    return jax.lax.cond(records, record, functools.partial(_nothing, record), batch)


def _gradient_squares(grads: Params) -> Array:
    """(L,) mean squares of the elements of each layer's gradient."""
    sums = [sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in layer) for layer in grads]
    return jnp.stack(sums) / jnp.array([sum(leaf.size for leaf in layer) for layer in grads], jnp.float32)


def _nothing(measure: Callable[[Any], Any], argument: Any) -> Any:
    """NaN in the shape of what `measure` would return: floats."""

    def nothing(leaf: jax.ShapeDtypeStruct) -> Array:
        return jnp.full(leaf.shape, jnp.nan, leaf.dtype)

    return jax.tree.map(nothing, jax.eval_shape(measure, argument))
