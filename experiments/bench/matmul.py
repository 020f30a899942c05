"""The share of the machine's own matmul peak that training reaches.

The peak is the best square jnp.matmul, called in turn with the program and, in each turn, as often as takes as long
as the program: the first product after another program finds cold caches. A share is the program's FLOP/s ÷ the
product's, where only the FLOPs of the matrix products count: 2 N in out for each of forward, ∂ℓ/∂w and, but for the
first layer, ∂ℓ/∂x.

Command: python -m experiments.bench --only matmul
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

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
    peak = machine.matmul_peak()
    product = timing.call(jax.jit(jnp.matmul), machine.squares(peak.side))
    programs = _programs(networks.case(sizes, batch))
    calls = [product, *programs.values()]
    for run in calls:
        run()
    once = [timing.seconds(run) for run in calls]
    times = max(1, round(once[1] / once[0]))

    def multiply() -> None:
        for _ in range(times):
            product()

    products, *measured = protocol.interleaved([multiply, *programs.values()], settings.rounds(3 * once[1]))
    work = flops(sizes, batch) / (2 * peak.side**3) / times
    made = []
    for name, seconds in zip(programs, measured, strict=True):
        share = timing.ratio([work * s for s in products], seconds)
        label, absolute = f"{NETWORK}, {name}", statistics.median(seconds)
        made.append(Row("share of the matmul peak", label, share.value, absolute, "s", SHARE, share.spread))
    return made


def _programs(case: networks.Case) -> dict[str, Callable[[], Any]]:
    params, x, y = case.arguments

    def step(params: jaxbp.Params, x: jax.Array, y: jax.Array) -> jaxbp.Params:
        return jaxbp.update(params, case.ours(params, x, y)[1], 1e-3)

    stepping = jax.jit(step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, params)

    def take_step() -> None:
        nonlocal state
        state = jax.block_until_ready(stepping(state, x, y))

    return {"value and gradient": timing.call(jax.jit(case.ours), case.arguments), "training step": take_step}


def flops(sizes: tuple[int, ...], batch: int) -> int:
    """Of the matrix products of a forward and a backward pass."""
    products = [2 * batch * a * b for a, b in itertools.pairwise(sizes)]
    return 3 * sum(products) - products[0]
