"""The benchmark's network in JAX as one writes it for jax.grad, for the peers that are built on it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from protocol import Case, Quantity

Params = list[tuple[jax.Array, jax.Array]]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy of a batch."""
    *hidden, (w, b) = params
    for w_, b_ in hidden:
        x = jax.nn.relu(x @ w_.T + b_)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w.T + b), y[:, None], axis=1))


def compiled(case: Case, program: Callable[..., Any]) -> Quantity:
    """The program on (params, x, y), compiled; its value is the leaves: w, b, w, b, …"""
    arguments = jax.tree.map(jnp.asarray, (case.layers, case.x, case.y))
    made = jax.jit(program)
    return Quantity(lambda: jax.block_until_ready(made(*arguments)), jax.tree.leaves)


def batch_gradient(case: Case) -> Quantity:
    """Loss and gradient, of which the gradient is the value."""
    run, leaves = compiled(case, jax.value_and_grad(loss))
    return Quantity(run, lambda result: leaves(result[1]))
