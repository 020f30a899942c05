"""optax: contrib.differentially_private_aggregate on the gradients of vmap(jax.grad), with noise 0.

It clips with min(1, C/‖gₙ‖) and returns the mean. It draws the noise, P numbers, even where the multiplier is 0.
"""

import jax
import optax
import optax.contrib
import protocol
from jax_network import Params, batch_gradient, compiled, loss
from protocol import BATCH, Case, Quantity


def quantities(case: Case) -> dict[str, Quantity]:
    aggregate = optax.contrib.differentially_private_aggregate(
        l2_norm_clip=case.max_norm, noise_multiplier=0.0, key=jax.random.key(0)
    )

    def clipped(params: Params, x: jax.Array, y: jax.Array) -> Params:
        grads = jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(x, y)
        mean: Params = aggregate.update(grads, aggregate.init(params))[0]
        return mean

    return {BATCH: batch_gradient(case), "clipped_mean": compiled(case, clipped)}


if __name__ == "__main__":
    protocol.main(f"optax {optax.__version__}, jax {jax.__version__}", quantities)
