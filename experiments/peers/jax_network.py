"""The benchmark's network in JAX as one writes it for jax.grad, for the peers that are built on it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from protocol import Case, Quantity

Params = list[tuple[jax.Array, jax.Array]]


ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


def outputs(params: Params, x: jax.Array, hidden: str = "relu") -> jax.Array:
    """x⁽ᴸ⁾ of a batch."""
    *inner, (w, b) = params
    for w_, b_ in inner:
        x = ACTIVATIONS[hidden](x @ w_.T + b_)
    return x @ w.T + b


def loss(params: Params, x: jax.Array, y: jax.Array, hidden: str = "relu") -> jax.Array:
    """The mean cross-entropy of a batch."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs(params, x, hidden)), y[:, None], axis=1))


def compiled(case: Case, program: Callable[..., Any], *more: Any) -> Quantity:
    """The program on (params, x, y, …), compiled; its value is the leaves: w, b, w, b, …"""
    arguments = jax.tree.map(jnp.asarray, (case.layers, case.x, case.y, *more))
    made = jax.jit(program)
    return Quantity(lambda: jax.block_until_ready(made(*arguments)), jax.tree.leaves)


def batch_gradient(case: Case) -> Quantity:
    """Loss and gradient, of which the gradient is the value."""
    run, leaves = compiled(case, lambda params, x, y: jax.value_and_grad(loss)(params, x, y, case.hidden))
    return Quantity(run, lambda result: leaves(result[1]))
