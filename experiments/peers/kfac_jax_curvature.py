"""kfac-jax: products with its implicit curvature, Kronecker factors of its blocks.

It looks for the products ``x @ w`` in a jaxpr, so that each w is transposed here. Its A has the 1 of the bias, which is
left out where factors are compared. Its empirical B is divided by N once more. Its last release, 0.0.8, fails with
JAX 0.10.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import protocol
from jax_network import ACTIVATIONS, batch_gradient
from protocol import BATCH, Case, Quantity


def quantities(case: Case) -> dict[str, Quantity]:
    arguments = (_transposed(case.layers), (jnp.asarray(case.x), jnp.asarray(case.y)))
    direction = _transposed(protocol.direction(case))

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        for l, (w, b) in enumerate(params, 1):
            x = x @ w + b
            x = ACTIVATIONS[case.hidden](x) if l < len(params) else x
        kfac_jax.register_softmax_cross_entropy_loss(x, y)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=1))

    implicit = kfac_jax.ImplicitExactCurvature(loss)

    def product(multiply: Callable[..., Any]) -> Quantity:
        made = jax.jit(multiply)
        run = lambda: jax.block_until_ready(made(arguments, direction))  # noqa: E731
        return Quantity(run, lambda v: jax.tree.leaves(_transposed(v)))

    def factors(mode: str) -> Quantity:
        blocks = kfac_jax.BlockDiagonalCurvature(loss, default_estimation_mode=mode)

        def program(arguments: Any) -> Any:
            state = blocks.init(jax.random.key(0), arguments, None, None)
            numbers = (0.0, 1.0, 0.0, len(case.x))  # weights of old and new, of the identity; the batch
            state = blocks.update_curvature_matrix_estimate(state, *numbers, jax.random.key(0), arguments)
            return [[factor.value for factor in block.factors] for block in state.blocks_states]

        made = jax.jit(program)
        run = lambda: jax.block_until_ready(made(arguments))  # noqa: E731
        scale = len(case.x) if mode == "fisher_empirical" else 1
        return Quantity(run, lambda blocks: [f for a, b in blocks for f in (a[:-1, :-1], scale * b)])

    return {
        BATCH: batch_gradient(case),
        "Hv": product(implicit.multiply_hessian),
        "Gv": product(implicit.multiply_ggn),
        "K-FAC empirical": factors("fisher_empirical"),
        "K-FAC mc": factors("fisher_gradients")._replace(value=lambda blocks: []),
        "K-FAC exact": factors("fisher_exact"),
    }


def _transposed(layers: Any) -> Any:
    return [(jnp.asarray(w).T, jnp.asarray(b)) for w, b in layers]


if __name__ == "__main__":
    protocol.main(f"kfac-jax {importlib.metadata.version('kfac-jax')}, jax {jax.__version__}", quantities)
