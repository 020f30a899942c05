"""Checkpoints, parts of a batch and bfloat16 in the compiled epoch, against the plain one; what they do not go with."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import oracles
import pytest
from oracles import assert_close, assert_same_bits

import jaxbp
from jaxbp import MLP, memory
from jaxbp.run import loop
from jaxbp.run.compute import step as steps
from jaxbp.run.compute.epoch import epoch
from jaxbp.run.compute.optimizers import build
from jaxbp.run.compute.step import Samples, State, StepSpec, batch_gradient
from jaxbp.run.config import OptimizerConfig, read
from jaxbp.run.errors import UserError

NET = MLP((4, 7, 5, 6, 3), "tanh")
PARAMS = jaxbp.init(NET, jax.random.key(0))
PLAIN = StepSpec(NET, build(OptimizerConfig(learning_rate=0.3), PARAMS), 8)
EPOCH = jax.jit(epoch, static_argnums=0)


@functools.cache
def trained(spec: StepSpec, dtype: Any = jnp.float64) -> Any:
    """Two steps of 8 samples and one of the 5 that are left."""
    params, x, y = oracles.data(NET, seed=1, batch=21, dtype=dtype)
    state, steps = EPOCH(spec, start(params), x, y, jax.random.key(0))
    return state.params, steps


def start(params: Any) -> State:
    return State(params, PLAIN.optimizer.init(params), jnp.array(True))


def spec(**changes: Any) -> StepSpec:
    return dataclasses.replace(PLAIN, **changes)


@pytest.mark.production
def test_an_epoch_with_checkpoints_has_the_same_bits() -> None:
    assert_same_bits(trained(spec(schedule=((2, 1), 1))), trained(PLAIN))


def test_an_epoch_in_micro_batches_has_the_same_numbers() -> None:
    """To rounding: the sum over the samples is cut into four. The last batch has a part of padding alone."""
    (params, steps), (plain, plain_steps) = trained(spec(schedule=(2, 2), micro_batches=4)), trained(PLAIN)
    assert_close((params, steps.loss), (plain, plain_steps.loss), 1e-14)
    assert_close((steps.delta, steps.gradient), (plain_steps.delta, plain_steps.gradient), 1e-6)  # float32


def test_bfloat16_adds_its_micro_batches_up_in_float32() -> None:
    """Gradients of 64 samples in 64 parts: a running sum in bfloat16 would lose what is below 2⁻⁸ of it."""
    params, x, y = oracles.data(NET, seed=2, batch=64, dtype=jnp.bfloat16)
    batch = Samples(x, y, jnp.ones(64, jnp.bfloat16), jnp.float32(64))
    found = jax.jit(batch_gradient, static_argnums=0)
    got = found(spec(micro_batches=64), params, batch).gradient
    parts = [found(PLAIN, params, Samples(*(a[i : i + 1] for a in batch[:3]), batch.counted)) for i in range(64)]
    want = jax.tree.map(lambda *a: sum(one.astype(jnp.float32) for one in a), *(part.gradient for part in parts))
    assert_close(got, want, 2.0**-8)  # rounded once; such a running sum is off by 4.6 × 2⁻⁸


@pytest.mark.slow
def test_mixed_is_the_bfloat16_network_with_a_float32_update() -> None:
    params, x, y = oracles.data(NET, seed=1, batch=8, dtype=jnp.float32)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    grads = jax.jit(lambda *data: jaxbp.gradient(jaxbp.factors(NET, *data)[1]))(low, x, y)
    expected = jaxbp.update(params, jax.tree.map(lambda g: g.astype(jnp.float32), grads), 0.3)
    state, _ = EPOCH(spec(mixed=True), start(params), x, y, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    # The epoch has the samples in another order: sums of 8 in float32, then a rounding to bfloat16.
    assert_close(state.params, expected, 0.3 * 2.0**-8)
    assert max(oracles.leaf_errors(state.params, trained(PLAIN, jnp.float32)[0])) > 1e-4


def scratch(**changes: Any) -> int:
    """Bytes of a compiled epoch beside its arguments and results."""
    net = MLP((32,) * 26, "tanh", loss="squared_error")
    params = jaxbp.init(net, jax.random.key(0))
    optimizer = build(OptimizerConfig(learning_rate=0.1), params)
    state = State(params, optimizer.init(params), jnp.array(True))
    x = jnp.ones((512, 32), jnp.float32)
    found = StepSpec(net, optimizer, 256, **changes)
    jitted = jax.jit(epoch, static_argnums=0, donate_argnums=1)
    program = jitted.lower(found, state, x, x, jax.random.key(0)).compile()
    return int(program.memory_analysis().temp_size_in_bytes)


@pytest.mark.production
@pytest.mark.slow
def test_an_epoch_takes_less_memory() -> None:
    """25 layers, of which √L holds 9; a gradient of their weights, 100 kB, is there as well."""
    plain, gradients, inputs = scratch(), 25 * 33 * 32 * 4, 256 * 32 * 4
    assert plain > 25 * inputs
    assert scratch(schedule=memory.segments(25)) < (9 + 4) * inputs + 2 * gradients < plain / 1.4
    assert scratch(micro_batches=8) < plain / 8 + 2 * inputs + 3 * gradients < plain / 1.4


DIGITS = """
[data]
name = "digits"
[model]
sizes = [64, 10]
[optimizer]
learning_rate = 0.1
[train]
epochs = 1
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('memory = "all"', "train.memory: got 'all', it should be 'store-all' or 'sqrt'"),
        ("memory = {slots = 0}", "slots': 0}, it should be 'store-all' or 'sqrt'"),
        ("memory = {slot = 8}", "train.memory: got"),
        ("memory = {}", "train.memory: got {}"),
        ("micro_batches = 3", "train.micro_batches: 3 does not divide the 128 samples of a batch"),
        ("batch_size = 5000\nmicro_batches = 2", "train.micro_batches: 2 does not divide the 1437 samples of a batch"),
        ('memory = "sqrt"\n[study]\nquantities = ["grand"]', r"train.memory: [study] quantities need all layers of"),
        ('micro_batches = 2\n[study]\nquantities = ["grand"]', "train.micro_batches: [study] quantities need all la"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, more: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(DIGITS + more)
    with pytest.raises(UserError) as error:
        loop.prepare(read(path))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_mixed_needs_float32(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(DIGITS)
    with pytest.raises(UserError, match='precision: "mixed" needs model'):
        loop.prepare(read(path, ["--train.precision", "mixed", "--model.dtype", "bfloat16"]))


def test_a_config_becomes_its_step(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(DIGITS + 'memory = {slots = 2}\nmicro_batches = 4\nprecision = "mixed"')
    plain = ["--train.memory", "store-all", "--train.micro-batches", "1", "--train.precision", "full"]
    slots, root, none = (
        steps.spec(read(path, more), NET, PLAIN.optimizer) for more in ((), ["--train.memory", "sqrt"], plain)
    )
    expected = spec(batch_size=128, schedule=memory.revolve(4, 2), micro_batches=4, mixed=True)
    assert slots == expected and root == dataclasses.replace(expected, schedule=(2, 2))
    assert none == spec(batch_size=128)
