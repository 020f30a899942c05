"""The lecture's "without tricks, we have to keep in memory all the activations", and the trick: compute them again.

Here a *run* is some consecutive layers of an `MLP`, or of a `Chain`. It is itself a layer: its input is some x⁽ˡ⁾, and
the ∂ℓ/∂x at its end comes from the layers above. So a pass with checkpoints is `forward` and `backward` on runs. A
`Schedule` says which:

- A number n is a run of n layers that is stored whole: forward with a tape, then backward.
- A tuple is a longer run that consists of shorter ones. The forward pass keeps x⁽ˡ⁾ where each of them begins, its
  checkpoint, and forgets the rest. The backward pass takes the last one first, and computes each again from there.

``100`` stores all of a hundred layers. ``(10,) * 10`` has a checkpoint every ten. The factors of all layers never exist
at the same time, so gradients are formed run by run, as δ⁽ˡ⁾ appears.

XLA would undo this: it sees that x⁽ˡ⁾ is computed twice, and keeps the first one. `jax.checkpoint` puts an
`optimization_barrier` between the two; on CPUs, in JAX 0.10, XLA removes the barrier too early, and nothing is saved.
XLA never merges what is inside a `jax.lax.cond` with what is outside. So the second forward pass is inside one. Its
predicate is always true, but XLA cannot know that. Under a `jax.vmap` over parameters a cond becomes a select: the
numbers are the same, and nothing is saved. (A first input that XLA cannot know would do without a
cond, but XLA takes three to five times as long to compile one program of 2,000 layers as one program a run.)

Sources: T. Chen et al., *Training deep nets with sublinear memory cost*, 2016, §4; A. Griewank and A. Walther,
*Algorithm 799: Revolve*, ACM Transactions on Mathematical Software 26, 2000, §2.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbp import losses
from jaxbp.factor import FactorTree
from jaxbp.layers import Chain
from jaxbp.mlp import MLP, Array, weighted, wide
from jaxbp.network import (
    Net,
    Network,
    ParamTree,
    checked_batch,
    dtype_of,
    keys_of,
    mean_weights,
    passed,
    totals,
)

Schedule = int | tuple[Any, ...]
"""A run of n layers stored whole, or the schedules, first to last, of the runs that a longer one consists of."""

Quantity = Callable[[FactorTree], tuple[Any, ...]]
"""What is wanted of the factors of consecutive layers: a result a layer."""


class Run(NamedTuple):
    """Consecutive layers as one, an MLP or a Chain; their parameters; a key for each sample, or None."""

    layer: Any
    params: ParamTree
    keys: Array | None


Above = Callable[[Run, Array], tuple[Any, Array, FactorTree]]
"""The ∂ℓ/∂x of a run's input, and its factors, by what lies above: the loss, whose ℓₙ come first, or a ∂ℓ/∂x."""


# The schedules --------------------------------------------------------------------------------------------------------


def segments(layers: int, length: int | None = None) -> Schedule:
    """A checkpoint every `length` layers, √L (rounded up) by default.

    It holds ⌈L / length⌉ checkpoints and the inputs of one run. These are fewest at √L, namely 2√L − 1. All runs but
    the last one are computed twice: 2L − length forward evaluations of a layer, where length divides L.

    Args:
      layers: L.
      length: of a run; the last one has what is left.

    Raises:
      ValueError: a number below 1.

    Source: Chen et al. 2016, §4.1.

    Example:
      >>> segments(10), segments(10, length=5), segments(10, length=99)
      ((4, 4, 2), (5, 5), (10,))
    """
    _check_positive("layers", layers)
    length = math.isqrt(layers - 1) + 1 if length is None else length
    _check_positive("length", length)
    whole, rest = divmod(layers, length)
    return (length,) * whole + (rest,) * (rest > 0)


def revolve(layers: int, slots: int) -> Schedule:
    """The binomial schedule: the fewest forward evaluations of layers with a fixed number of checkpoints.

    C(s + t, s) layers need at most t evaluations of each. The recursion is Griewank and Walther's, over the length m of
    the first run: m evaluations to the next checkpoint, then both parts::

        T(L, s) = minₘ m + T(m, s) + T(L − m, s − 1)

    It ends differently here. They end at one layer, whose step with a tape is not counted, and get t(L, s) =
    t L − C(s + t, s + 1); with that step for each layer it is t(L, s) + L. Here the tape of a layer is no larger than
    its input. So what the slots can hold is stored whole: T(L, s) = L for L ≤ s + 1. With L = 100 and s = 8 this takes
    263 evaluations and theirs 345; storing all takes 100.

    Args:
      layers: L.
      slots: s, how many layer inputs are kept, x⁽⁰⁾ included, beside that of the layer at work; with L − 1 all is
        stored.

    Raises:
      ValueError: a number below 1.

    Source: Griewank and Walther 2000, §2.

    Example:
      >>> revolve(10, slots=2), evaluations(revolve(10, slots=2))
      (((3, 2, 1), (2, 1), 1), 26)
      >>> revolve(10, slots=9)
      10
    """
    _check_positive("layers", layers)
    _check_positive("slots", slots)
    return layers if layers <= slots + 1 else _split(_fewest(layers, slots), layers, slots)


def length(schedule: Schedule) -> int:
    """The number of layers of a schedule.

    Example:
      >>> length((4, (3, 2), 1))
      10
    """
    return schedule if isinstance(schedule, int) else sum(map(length, schedule))


def evaluations(schedule: Schedule) -> int:
    """How often a layer is computed forward, over all layers: L where all is stored.

    Example:
      >>> evaluations(10), evaluations((4, 4, 2)), evaluations((4, (3, 2), 1))
      (10, 18, 22)
    """
    if isinstance(schedule, int):
        return schedule
    return sum(map(length, schedule[:-1])) + sum(map(evaluations, schedule))


def inputs_held(schedule: Schedule) -> int:
    """The largest number of layer inputs x⁽ˡ⁻¹⁾ that are kept at the same time, x⁽⁰⁾ included.

    Each is (N, n₍ₗ₋₁₎). In a run that is stored whole, an activation whose σ′ needs s⁽ˡ⁾ keeps that too, and a layer of
    a chain all that its backward pass needs, which of attention is many arrays. For each level of the schedule the
    program holds about two arrays more: ∂ℓ/∂x and δ at the end of the run at work.

    Example:
      >>> inputs_held(10), inputs_held((4, 4, 2)), inputs_held(revolve(10, slots=2))
      (10, 5, 3)
    """
    if isinstance(schedule, int):
        return schedule
    return max(before + inputs_held(run) for before, run in enumerate(schedule))


def _fewest(layers: int, slots: int) -> list[np.ndarray]:
    """T(l, s) for s = 0 … slots, l = 0 … layers; without a slot one layer is all that can be passed backward."""
    table = [np.full(layers + 1, np.inf)]
    table[0][1] = 1
    for s in range(1, slots + 1):
        table.append(np.arange(layers + 1.0))  # T(l, s) = l, where all can be stored
        for l in range(s + 2, layers + 1):
            table[s][l] = _costs(table, l, s).min()
    return table


def _costs(table: list[np.ndarray], layers: int, slots: int) -> np.ndarray:
    """m + T(m, s) + T(L − m, s − 1), m = 1 … L − 1: by the length of the first run."""
    costs: np.ndarray = np.arange(1, layers) + table[slots][1:layers] + table[slots - 1][layers - 1 : 0 : -1]
    return costs


def _split(table: list[np.ndarray], layers: int, slots: int) -> Schedule:
    runs: list[Schedule] = []
    while layers > slots + 1:
        first = 1 + int(_costs(table, layers, slots).argmin())
        runs.append(_split(table, first, slots))
        layers, slots = layers - first, slots - 1
    return (*runs, layers) if runs else layers


def _shortest(schedule: Schedule) -> int:
    return schedule if isinstance(schedule, int) else min(map(_shortest, schedule), default=0)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, it has to be 1 or more")


# The pass -------------------------------------------------------------------------------------------------------------


def value_and_grad(
    net: Net,
    params: ParamTree,
    x: ArrayLike,
    y: ArrayLike,
    schedule: Schedule,
    weights: ArrayLike | None = None,
    normalize_by: ArrayLike | None = None,
    key: Array | None = None,
) -> tuple[Array, ParamTree]:
    """`jaxbp.value_and_grad` in less memory: Σₙ weightsₙ ℓₙ / N over a batch and its hand-derived gradient.

    It multiplies the same numbers as storing all, and gives the same bits with two exceptions. In large batches XLA
    sums the δ of the last layer of a run, its ∂ℓ/∂b, in another order; that changes it by N ε at most. And XLA may turn
    the formula of a σ or σ′ (gelu_tanh, silu) into fused multiply-adds in one of the two programs only; that changes it
    by an ulp, which is passed on from there.

    Args:
      net, params, x, y, weights, normalize_by, key: as for `jaxbp.value_and_grad`; the net is an `MLP` or a `Network`
        whose layer is a `Chain`.
      schedule: of L layers, by `segments` or `revolve` or any other. `evaluations` says what it costs in time,
        `inputs_held` what it takes in memory.

    Returns:
      The loss, a scalar in float32 at least, and the gradient, like the parameters.

    Raises:
      ValueError, TypeError: as `jaxbp.value_and_grad`; a schedule of another number of layers; another net.

    Example:
      >>> import jaxbp
      >>> net = MLP((3, *[4] * 5, 2), "tanh")
      >>> params = jaxbp.init(net, jax.random.key(0))
      >>> loss, grads = value_and_grad(net, params, jnp.ones((5, 3)), jnp.zeros(5, int), revolve(6, slots=3))
      >>> jax.tree.structure(grads) == jax.tree.structure(params)
      True
    """
    layer, (x, y) = _layers_of(net), checked_batch(net, params, x, y)
    scale = mean_weights(weights, len(x), normalize_by, wide(dtype_of(params)))
    if weights is not None and jnp.issubdtype(x.dtype, jnp.floating):
        x = weighted((scale != 0).astype(x.dtype), x)
    above = functools.partial(_top, losses.get(net.loss), y, scale)
    values, grads = _each_layer(totals, Run(layer, params, keys_of(key, len(x))), x, above, schedule)
    return jnp.sum(weighted(scale, values)), grads


def each_layer(
    quantity: Quantity,
    net: Net,
    params: ParamTree,
    x: ArrayLike,
    y: ArrayLike,
    schedule: Schedule,
    key: Array | None = None,
) -> tuple[Array, tuple[Any, ...]]:
    """The losses of a batch and a quantity of each layer's factors, which are forgotten as soon as it is formed.

    Args:
      quantity: the factors of some consecutive layers, as `jaxbp.factors` gives them ↦ a tuple of a pytree a layer.
        `jaxbp.gradient` is one; of an MLP so is any of `jaxbp.persample` with ``per_layer=True``.
      net, params, x, y, key: as for `jaxbp.factors`.
      schedule: as for `value_and_grad`, and so are the nets.

    Returns:
      ℓₙ, (N,), and the results of the L layers, first to last.

    Raises:
      ValueError, TypeError: as `jaxbp.factors`; a schedule of another number of layers; another net.

    Example:
      >>> import jaxbp
      >>> net = MLP((3, 4, 4, 2))
      >>> params, x, y = jaxbp.init(net, jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros(5, int)
      >>> norms = lambda f: jaxbp.persample.squared_norms(f, per_layer=True)
      >>> [norm.shape for norm in each_layer(norms, net, params, x, y, schedule=(2, 1))[1]]
      [(5,), (5,), (5,)]
    """
    layer, (x, y) = _layers_of(net), checked_batch(net, params, x, y)
    above = functools.partial(_top, losses.get(net.loss), y, jnp.ones(len(x), wide(dtype_of(params))))
    return _each_layer(quantity, Run(layer, params, keys_of(key, len(x))), x, above, schedule)


def _layers_of(net: Any) -> MLP | Chain:
    layer = net.layer if isinstance(net, Network) else net
    if isinstance(layer, MLP | Chain):
        return layer
    raise TypeError(f"net is of one {type(layer).__name__}, schedules are for the layers of an MLP or a Chain")


def _each_layer(
    quantity: Quantity, run: Run, x: Array, above: Above, schedule: Schedule
) -> tuple[Array, tuple[Any, ...]]:
    if (shortest := _shortest(schedule)) < 1:
        raise ValueError(f"schedule {schedule} has a run of {shortest} layers, each needs 1 or more")
    if length(schedule) != len(run.params):
        raise ValueError(f"schedule {schedule} has {length(schedule)} layers, the network has {len(run.params)}")
    values, _, results = _backward(quantity, run, x, above, schedule)
    return values, results


def _backward(
    quantity: Quantity, run: Run, x: Array, above: Above, schedule: Schedule
) -> tuple[Any, Array, tuple[Any, ...]]:
    """The losses where the run ends with the output, ∂ℓ/∂x of its input, and the results of its layers."""
    if isinstance(schedule, int):
        values, dl_dx, factors = above(run, x)
        return values, dl_dx, quantity(factors)
    runs = _runs(run, schedule)
    checkpoints = [x]
    for part in runs[:-1]:
        checkpoints.append(_output(part, checkpoints[-1]))
    values, dl_dx, results = _backward(quantity, runs[-1], checkpoints[-1], above, schedule[-1])
    for part, checkpoint, inner in reversed(list(zip(runs, checkpoints, schedule, strict=True))[:-1]):
        dl_dx, found = _again(quantity, part, checkpoint, dl_dx, inner)
        results = found + results
    return values, dl_dx, results


def _again(quantity: Quantity, run: Run, x: Array, dl_dx: Array, schedule: Schedule) -> tuple[Array, tuple[Any, ...]]:
    """A run forward a second time and backward, where XLA can't merge it with the first: inside a conditional."""

    @jax.jit  # so that it is traced once, not for each branch: nested runs would be traced 2, 4, 8 times
    def again(params: ParamTree, keys: Array | None, x: Array, dl_dx: Array) -> tuple[Array, tuple[Any, ...]]:
        below = functools.partial(_below, dl_dx)
        _, dl_dx_below, results = _backward(quantity, Run(run.layer, params, keys), x, below, schedule)
        return dl_dx_below, results

    def never(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(again, *arguments))

    always = ~(jnp.sum(dl_dx[:1]) < -jnp.inf)  # of NaN and of an empty batch too
    found: tuple[Array, tuple[Any, ...]] = jax.lax.cond(always, again, never, run.params, run.keys, x, dl_dx)
    return found


def _top(loss: losses.Loss, y: Array, scale: Array, run: Run, x: Array) -> tuple[Array, Array, FactorTree]:
    """Of scaleₙ ℓₙ; scale is (N,)."""
    return passed(run.layer, loss, run.params, x, y, scale, run.keys)


def _below(dl_dx: Array, run: Run, x: Array) -> tuple[None, Array, FactorTree]:
    def sample(x: Array, key: Array | None, dl_dx: Array) -> tuple[Array, FactorTree]:
        _, tape = run.layer.forward(run.params, x, key)
        below: tuple[Array, FactorTree] = run.layer.backward(run.params, tape, dl_dx)
        return below

    return None, *jax.vmap(sample)(x, run.keys, dl_dx)


def _output(run: Run, x: Array) -> Array:
    output: Array = jax.vmap(lambda x, key: run.layer.forward(run.params, x, key)[0])(x, run.keys)
    return output


def _runs(run: Run, schedule: tuple[Schedule, ...]) -> list[Run]:
    """The shorter runs that a schedule has."""
    ends = itertools.accumulate(map(length, schedule), initial=0)
    return [Run(_cut(run.layer, a, b), run.params[a:b], run.keys) for a, b in itertools.pairwise(ends)]


def _cut(layer: Any, a: int, b: int) -> MLP | Chain:
    """The layers from a on, up to b, as one."""
    if isinstance(layer, Chain):
        return Chain(*layer.layers[a:b], first=layer.first + a)
    sigmas = layer.activations
    return MLP(layer.sizes[a : b + 1], sigmas[a : b - 1], sigmas[b - 1], layer.loss)
