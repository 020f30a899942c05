"""The compiled part of a run: an epoch is one `lax.scan` over data that live on the device; so is an evaluation."""

import functools
from collections.abc import Callable, Mapping
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


class Program(NamedTuple):
    """How a run computes, on one device (`one_device`) or on several (`mesh.program`).

    place: a state, in host memory or on a device ↦ the state that an epoch takes away;  host: a tree of arrays ↦ NumPy;
    epoch: (state, key of the order, steps done) ↦ (state, steps);  evaluate: (net, parameters, "train" or "test").
    """

    place: Callable[[State], State]
    host: Callable[[Any], Any]
    epoch: Callable[[State, Array, int], tuple[State, Steps]]
    evaluate: Callable[[MLP, Params, str], Evaluation]


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
    """One pass over the samples in an order drawn from the key; `done` counts the steps before it, for records."""
    rows, present = drawn(key, len(x), batch_size)
    weights = present.astype(x.dtype)
    return scan(net, optimizer, recording, tricks, state, rows, weights, lambda rows: (x[rows], y[rows]), done)


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
    net: MLP,
    optimizer: Optimizer,
    recording: Recording | None,
    tricks: Tricks,
    state: State,
    batches: Any,
    weights: Array,
    read: Callable[[Any], tuple[Array, Array]],
    done: ArrayLike,
) -> tuple[State, Steps]:
    """The steps of an epoch, weights (S, B): `read` gives inputs and targets of the batch of a step."""
    records = recording and (jnp.arange(len(weights)) + done) % recording.every == 0

    def step(state: State, batch: tuple[Any, Array, Array | None]) -> tuple[State, Steps]:
        rows, weights, records = batch

        def taken(state: State) -> tuple[State, Steps]:
            return _step(net, optimizer, recording, tricks, state, *read(rows), weights, records)

        return jax.lax.cond(
            state.alive, taken, lambda state: (state, _nothing(lambda state: taken(state)[1], state)), state
        )

    return jax.lax.scan(step, state, (batches, weights, records))


@functools.partial(jax.jit, static_argnames="net")
def evaluate(net: MLP, params: Params, x: Array, y: Array) -> Evaluation:
    """Loss and output of every sample, EVALUATED_AT_ONCE samples at a time."""
    return jax.lax.map(functools.partial(evaluated, net, params), (x, y), batch_size=EVALUATED_AT_ONCE)


def evaluated(net: MLP, params: Params, sample: tuple[Array, Array]) -> Evaluation:
    """Loss and output of one sample."""
    output = forward(net, params, sample[0]).x[-1].astype(wide(params[0].w.dtype))
    return Evaluation(losses.get(net.loss).ell(output, sample[1]), output)


def one_device(
    net: MLP,
    optimizer: Optimizer,
    batch_size: int,
    sets: Mapping[str, tuple[Array, Array]],
    recording: Recording | None,
    state: State,
    tricks: Tricks,
) -> Program:
    """A run on one device; `sets` are "train" and "test", `state` shows the shapes."""
    key, train = jax.random.key(0), sets["train"]
    compiled = epoch.lower(net, optimizer, batch_size, state, *train, key, recording, 0, tricks).compile()
    return Program(
        place=lambda state: state,
        host=jax.device_get,
        epoch=lambda state, key, done: compiled(state, *train, key, done),
        evaluate=lambda net, params, name: evaluate(net, params, *sets[name]),
    )


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
