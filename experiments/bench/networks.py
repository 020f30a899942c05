"""The networks that are measured, by hand and as one writes them for jax.grad."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxbp

NETWORKS = {  # sizes, batch
    "64-128-64-10 / 32": ((64, 128, 64, 10), 32),
    "784-256-256-10 / 128": ((784, 256, 256, 10), 128),
    "784-1024³-10 / 256": ((784, 1024, 1024, 1024, 10), 256),
    "784-512×20-10 / 256": ((784, *(512,) * 20, 10), 256),
    "784-2500-2000-1500-1000-500-10 / 512": ((784, 2500, 2000, 1500, 1000, 500, 10), 512),
}
SIGMAS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": lambda s: jax.nn.gelu(s, approximate=False),
}


class Case(NamedTuple):
    """Value and gradient of the mean cross-entropy by hand and by autodiff, and (params, x, y)."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    arguments: tuple[jaxbp.Params, jax.Array, jax.Array]


def autodiff_loss(hidden: str) -> Callable[..., jax.Array]:
    """The mean cross-entropy of the network as one writes it for jax.grad."""

    def loss(params: jaxbp.Params, x: jax.Array, y: jax.Array) -> jax.Array:
        *hidden_layers, last = params
        for w, b in hidden_layers:
            x = SIGMAS[hidden](x @ w.T + b)
        log_p = jax.nn.log_softmax(x @ last.w.T + last.b)
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))

    return loss


def case(sizes: tuple[int, ...], batch: int, hidden: str = "relu") -> Case:
    """He's parameters, normal inputs, every class in turn; float32."""
    net = jaxbp.MLP(sizes, hidden)
    params = jaxbp.init(net, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, sizes[0]), jnp.float32)
    return Case(
        lambda params, x, y: jaxbp.value_and_grad(net, params, x, y),
        jax.value_and_grad(autodiff_loss(hidden)),
        (params, x, jnp.arange(batch) % sizes[-1]),
    )
