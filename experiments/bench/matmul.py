"""The share of the machine's own matmul peak that training reaches.

The peak is the best square jnp.matmul, called in turn with the program; a share is the program's FLOP/s ÷ the
product's, where only the FLOPs of the matrix products count: 2 N in out for each of forward, ∂ℓ/∂w and, but for the
first layer, ∂ℓ/∂x.

Command: jaxbp bench --only matmul
"""

import itertools

import jax
import jax.numpy as jnp

import jaxbp
from experiments.bench import machine, networks, timing
from experiments.bench.rows import Row, Settings, Target
from experiments.peers import protocol

NETWORK = "784-2500-2000-1500-1000-500-10 / 512"
SHARE = Target("≥", 0.85)


def rows(settings: Settings) -> list[Row]:
    """The gradient, and a whole step w ← w − η ∂ℓ/∂w, whose parameters are donated."""
    sizes, batch = networks.NETWORKS[NETWORK]
    case, peak = networks.case(sizes, batch), machine.matmul_peak()
    params, x, y = case.arguments

    def step(params: jaxbp.Params, x: jax.Array, y: jax.Array) -> jaxbp.Params:
        return jaxbp.update(params, case.ours(params, x, y)[1], 1e-3)

    stepping = jax.jit(step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, params)

    def take_step() -> None:
        nonlocal state
        state = jax.block_until_ready(stepping(state, x, y))

    calls = [
        timing.call(jax.jit(jnp.matmul), machine.squares(peak.side)),
        timing.call(jax.jit(case.ours), case.arguments),
        take_step,
    ]
    for run in calls:
        run()
    rounds = settings.rounds(sum(map(timing.seconds, calls)))
    product, *programs = protocol.interleaved(calls, rounds)
    work = flops(sizes, batch) / (2 * peak.side**3)
    made = []
    for name, seconds in zip(("value and gradient", "training step"), programs, strict=True):
        share = timing.ratio([work * s for s in product], seconds)
        absolute = timing.ratio(seconds, product).seconds
        made.append(
            Row("share of the matmul peak", f"{NETWORK}, {name}", share.value, absolute, "s", SHARE, share.spread)
        )
    return made


def flops(sizes: tuple[int, ...], batch: int) -> int:
    """Of the matrix products of a forward and a backward pass."""
    products = [2 * batch * a * b for a, b in itertools.pairwise(sizes)]
    return 3 * sum(products) - products[0]
