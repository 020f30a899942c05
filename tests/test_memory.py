"""Checkpointed passes against storing all and against jax.grad; what they save, by XLA's own account of the program."""

import functools
import itertools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from oracles import assert_close, assert_same_bits, leaf_errors
from tiers import one_in

import jaxbp
from jaxbp import MLP, memory
from jaxbp.layers import Chain, Dense, Dropout, Elementwise, Embedding, LayerNorm, Residual, SelfAttention

checkpointed = jax.jit(memory.value_and_grad, static_argnames=("net", "schedule"))
stored = jax.jit(jaxbp.value_and_grad, static_argnames="net")
oracle = jax.jit(oracles.value_and_grad, static_argnames="net")

WIDTHS = (5, 7, 6, 9, 4, 8, 4)
NET = MLP(WIDTHS, ("relu", "tanh", "sigmoid", "elu", "leaky_relu"), loss="squared_error")
SCHEDULES = [(3, 3), ((2, (1, 1)), ((2,),)), memory.revolve(6, 2)]


# The gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.production
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("schedule", one_in(3, SCHEDULES), ids=str)
def test_the_gradient_is_that_of_storing_all_bit_for_bit(schedule, dtype):
    """Widths and activations that all differ; jax.grad beside it, in f64 to the contract's 1e-12."""
    data = oracles.data(NET, seed=1, batch=6, dtype=dtype)
    got = checkpointed(NET, *data, schedule=schedule)
    assert_same_bits(got, stored(NET, *data))
    assert_close(got, oracle(NET, *data), oracles.tolerance(dtype, 6, 9))


@pytest.mark.production
def test_in_a_large_batch_only_the_biases_that_end_a_run_are_summed_in_another_order():
    """Losses, δ and so every ∂ℓ/∂w have the same bits, float64; a sum of N numbers has N roundings."""
    net = MLP((8,) * 7, "tanh", "tanh", "squared_error")
    data = oracles.data(net, seed=7, batch=256)
    (loss, got), (want_loss, want) = checkpointed(net, *data, schedule=(2, 2, 2)), stored(net, *data)
    assert_same_bits((loss, [layer.w for layer in got]), (want_loss, [layer.w for layer in want]))
    assert_same_bits([got[i].b for i in (0, 2, 4, 5)], [want[i].b for i in (0, 2, 4, 5)])
    assert_close(got, want, 256 * np.finfo(float).eps)


@pytest.mark.production
def test_where_fused_multiply_adds_differ_it_is_a_few_ulps():
    """A σ′ of one rounding more or less, which a layer passes on to those below it: one ε a layer and direction."""
    net = MLP(WIDTHS, ("gelu_tanh", "silu", "mish", "gelu", "softplus"), "tanh", "squared_error")
    data = oracles.data(net, seed=1, batch=6)
    got = checkpointed(net, *data, schedule=(1,) * 6)
    assert max(leaf_errors(got, stored(net, *data))) <= 2 * 6 * np.finfo(float).eps
    assert_close(got, oracle(net, *data), 1e-12)


@pytest.mark.production
@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "hinge"])
def test_weights_labels_and_a_masked_nan(loss):
    net = MLP(WIDTHS, "tanh", loss=loss)
    params, x, y = oracles.data(net, seed=2, batch=6)
    x = x.at[1].set(jnp.nan)
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    got = checkpointed(net, params, x, y, schedule=(2, 2, 2), weights=weights, normalize_by=3)
    assert_same_bits(got, stored(net, params, x, y, weights, 3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("batch", [0, 4])
def test_an_empty_or_all_masked_batch_gives_zeros(batch):
    params, x, y = oracles.data(NET, seed=3, batch=batch)
    got = checkpointed(NET, params, x * jnp.nan, y, schedule=(2, 2, 2), weights=jnp.zeros(batch))
    assert_same_bits(got, jax.tree.map(jnp.zeros_like, (got[0], params)))


@pytest.mark.production
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_comes_through(value):
    """The conditional is taken whatever the deltas are: NaN does not lead to the zeros of the branch never taken."""
    net = MLP(WIDTHS, "identity", loss="squared_error")
    params, x, y = oracles.data(net, seed=4, batch=3)
    y = jnp.full_like(y, value)
    assert_same_bits(checkpointed(net, params, x, y, schedule=(3, 3)), stored(net, params, x, y))
    assert not np.isfinite(checkpointed(net, params, x, y, schedule=(3, 3))[1][0].b).any()


@pytest.mark.production
def test_one_layer():
    net = MLP((3, 4), loss="squared_error")
    data = oracles.data(net, seed=5, batch=2)
    for schedule in (1, (1,), memory.segments(1), memory.revolve(1, 1)):
        assert_same_bits(checkpointed(net, *data, schedule=schedule), stored(net, *data))


@pytest.mark.production
def test_a_quantity_of_each_layer_is_that_of_all_factors():
    """Per-sample norms by layer, which need no gradient: against the Factors of all layers at once."""
    data = oracles.data(NET, seed=6, batch=5)
    norms = functools.partial(jaxbp.persample.squared_norms, per_layer=True)
    losses, got = jax.jit(lambda *data: memory.each_layer(norms, NET, *data, schedule=(2, 3, 1)))(*data)
    want, f = jax.jit(jaxbp.factors, static_argnums=0)(NET, *data)
    assert_same_bits(losses, want)
    assert_close(got, jax.jit(norms)(f), 1e-14)


@pytest.mark.slow
def test_the_layers_of_a_chain_are_passed_in_runs():
    """Tokens, attention and dropout: the gradient is that of storing all, and so is what is of each layer."""
    block = Residual(Chain(LayerNorm(), SelfAttention(2, causal=True), Dropout(0.5)))
    chain = Chain(Embedding(7, 4), block, Elementwise("tanh"), Dropout(0.5), block, Dense(7))
    net = jaxbp.Network(chain, jaxbp.losses.over_positions("softmax_cross_entropy"), (3,))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jax.device_put(rng.standard_normal(a.shape)), net.parameters)
    x, y = jax.device_put(rng.integers(0, 7, (2, 2, 3)))
    weights, key = jnp.array([0.5, 2.0]), jax.random.key(0)
    want = jax.jit(lambda p: jaxbp.value_and_grad(net, p, x, y, weights, key=key))(params)
    schedule = (1, (2, 1), 2)
    got = jax.jit(lambda p: memory.value_and_grad(net, p, x, y, schedule, weights, key=key))(params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_close(got, want, 1e-13)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda data: memory.value_and_grad(NET, *data, schedule=(3, 2)), r"schedule \(3, 2\) has 5 layers, the netw"),
        (lambda data: memory.value_and_grad(NET, *data, schedule=(7, -1)), r"schedule \(7, -1\) has a run of -1 layer"),
        (lambda data: memory.segments(4, 0), "length is 0, it has to be 1 or more"),
        (lambda data: memory.segments(0), "layers is 0, it has to be 1 or more"),
        (lambda data: memory.revolve(4, 0), "slots is 0, it has to be 1 or more"),
    ],
)
def test_what_does_not_fit(call, said):
    with pytest.raises(ValueError, match=said):
        call(oracles.data(NET, seed=0, batch=2))


# What it saves --------------------------------------------------------------------------------------------------------


def depth(schedule):
    return 0 if isinstance(schedule, int) else 1 + max(map(depth, schedule))


@functools.cache
def layer_inputs(schedule, layers=40, batch=64, width=32, sigma="tanh"):
    """The compiled program's scratch memory, in arrays of the size of a layer's input."""
    net = MLP((width,) * (layers + 1), sigma, loss="squared_error")
    params = jaxbp.init(net, jax.random.key(0))
    x = jnp.ones((batch, width), jnp.float32)
    program = checkpointed.lower(net, params, x, x, schedule=schedule).compile()
    return program.memory_analysis().temp_size_in_bytes / (batch * width * 4)


@pytest.mark.production
@pytest.mark.parametrize(
    "schedule", one_in(3, [memory.segments(40), memory.segments(40, 10), memory.revolve(40, 4)]), ids=str
)
def test_the_compiled_program_holds_what_the_schedule_says(schedule):
    """XLA has not merged the second forward pass with the first. x⁽⁰⁾ is an argument; δ and ∂ℓ/∂x are held as well."""
    held = memory.inputs_held(schedule)
    assert held - 1 <= layer_inputs(schedule) <= held + 2 * depth(schedule) + 1 <= layer_inputs(40) / 1.5


@pytest.mark.production
def test_a_deep_chain_takes_less_memory():
    """Sixteen blocks of attention: between two checkpoints of four there is a quarter of what they keep."""
    block = Residual(Chain(LayerNorm(), SelfAttention(2)))
    net = jaxbp.Network(Chain(*[block] * 16), jaxbp.losses.over_positions("squared_error"), (16, 8))
    x = jnp.ones((8, 16, 8), jnp.float32)
    scratch = [
        checkpointed.lower(net, net.parameters, x, x, schedule=schedule).compile().memory_analysis().temp_size_in_bytes
        for schedule in (16, (4,) * 4)
    ]
    assert scratch[1] < scratch[0] / 2.5


# The schedules --------------------------------------------------------------------------------------------------------


def repeats(schedule):
    """How often each layer is computed forward."""
    if isinstance(schedule, int):
        return [1] * schedule
    last = len(schedule) - 1
    return [count + (i < last) for i, run in enumerate(schedule) for count in repeats(run)]


schedules = st.recursive(st.integers(1, 5), lambda inner: st.lists(inner, min_size=1, max_size=4).map(tuple))


@pytest.mark.slow
@given(schedules)
def test_counts_are_those_of_the_definition(schedule):
    assert memory.length(schedule) == len(repeats(schedule))
    assert memory.evaluations(schedule) == sum(repeats(schedule))


@functools.cache
def fewest(layers, slots, whole):
    """Every first run, tried. `whole`: how many layers the slots s can store whole, as a function of s."""
    if layers <= whole(slots):
        return 0
    if slots == 0:
        return math.inf
    parts = ((m, fewest(m, slots, whole), fewest(layers - m, slots - 1, whole)) for m in range(1, layers))
    return min(sum(part) for part in parts)


def one(slots):
    return 1


def one_more(slots):
    return slots + 1


def closed_form(layers, slots):
    """Griewank and Walther's t(L, s), and the smallest t with L ≤ C(s + t, s)."""
    t = next(t for t in itertools.count() if math.comb(slots + t, slots) >= layers)
    return t * layers - math.comb(slots + t, slots + 1), t


@pytest.mark.parametrize("slots", range(1, 7))
def test_revolve_is_the_minimum_and_reaches_the_binomial(slots):
    """The recursion with their end gives their formula; with ours `revolve`, which is never more."""
    for layers in range(1, 60):
        schedule = memory.revolve(layers, slots)
        theirs, t = closed_form(layers, slots)
        assert fewest(layers, slots, one) == theirs
        assert memory.evaluations(schedule) == layers + fewest(layers, slots, one_more) <= layers + theirs
        assert memory.length(schedule) == layers
        assert memory.inputs_held(schedule) == min(layers, slots + 1)
        assert max(repeats(schedule)) == max(t, 1)


def test_figures_of_the_docstrings():
    assert memory.evaluations(memory.revolve(100, 8)) == 263
    assert closed_form(100, 8)[0] + 100 == 345
    assert memory.evaluations(memory.segments(100)) == 190 and memory.inputs_held(memory.segments(100)) == 19
    assert memory.revolve(100, 99) == memory.revolve(100, 500) == 100
    assert min(memory.inputs_held(memory.segments(100, n)) for n in range(1, 101)) == 19
