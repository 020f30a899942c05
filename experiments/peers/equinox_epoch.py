"""A plain training loop with Equinox and optax: a compiled step, called from Python for every batch."""

from collections.abc import Callable

import epochs
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax


def build(case: epochs.Case) -> tuple[Callable[[], None], Callable[[], float]]:
    inputs, width, *_, outputs = case.sizes
    if set(case.sizes[1:-1]) != {width}:
        raise ValueError(f"eqx.nn.MLP has one width, not {case.sizes[1:-1]}")
    model = eqx.nn.MLP(inputs, outputs, width, len(case.sizes) - 2, jax.nn.relu, key=jax.random.key(0))
    optimizer = optax.sgd(case.learning_rate)
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    order = np.random.default_rng(0)

    def loss(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y))

    @eqx.filter_jit
    def step(model: eqx.nn.MLP, state: optax.OptState, x: jax.Array, y: jax.Array) -> tuple[eqx.nn.MLP, optax.OptState]:
        updates, state = optimizer.update(eqx.filter_grad(loss)(model, x, y), state)
        return eqx.apply_updates(model, updates), state

    def epoch() -> None:
        nonlocal model, state
        rows = order.permutation(len(case.x_train))
        for start in range(0, len(rows), case.batch_size):
            batch = rows[start : start + case.batch_size]
            model, state = step(model, state, case.x_train[batch], case.y_train[batch])
        jax.block_until_ready(eqx.filter(model, eqx.is_array))

    def test_accuracy() -> float:
        return float(np.mean(np.argmax(jax.vmap(model)(case.x_test), axis=1) == case.y_test))

    return epoch, test_accuracy


if __name__ == "__main__":
    epochs.main(build)
