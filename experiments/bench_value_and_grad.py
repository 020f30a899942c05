"""Time and memory of jaxbp.value_and_grad against jax.value_and_grad of the same network.

Both are compiled; they are called in turn in one process, first the one, then the other, and the order changes every
round. The time ratio is the median over the rounds of the ratio within a round. Memory is what the compiled program
allocates: temporary and output bytes, as XLA's buffer assignment states them.

Command: python -m experiments.bench_value_and_grad [--rounds 41] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxbp

SHAPES = {  # sizes, batch
    "784-256-256-10 / 128": ((784, 256, 256, 10), 128),
    "784-1024³-10 / 256": ((784, 1024, 1024, 1024, 10), 256),
    "784-512×20-10 / 256": ((784, *(512,) * 20, 10), 256),
    "784-2500-2000-1500-1000-500-10 / 512": ((784, 2500, 2000, 1500, 1000, 500, 10), 512),
}
SIGMAS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


def autodiff_loss(hidden: str) -> Callable[..., jax.Array]:
    """The mean cross-entropy of the network as one writes it for jax.grad."""

    def loss(params: jaxbp.Params, x: jax.Array, y: jax.Array) -> jax.Array:
        *hidden_layers, last = params
        for w, b in hidden_layers:
            x = SIGMAS[hidden](x @ w.T + b)
        log_p = jax.nn.log_softmax(x @ last.w.T + last.b)
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))

    return loss


def bytes_of(program: Any) -> int:
    """Temporary and output bytes of a compiled program."""
    memory = program.memory_analysis()
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)


def seconds(program: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def interleaved(programs: Sequence[Any], arguments: tuple[Any, ...], rounds: int) -> list[list[float]]:
    """Seconds of each call, in rounds of all; each round begins with another one. One round before that warms up."""
    measured: list[list[float]] = [[] for _ in programs]
    for program in programs:
        seconds(program, arguments)
    for n in range(rounds):
        for k in range(len(programs)):
            which = (n + k) % len(programs)
            measured[which].append(seconds(programs[which], arguments))
    return measured


def measure(sizes: tuple[int, ...], batch: int, hidden: str, rounds: int) -> dict[str, float]:
    """The figures of one network."""
    net = jaxbp.MLP(sizes, hidden)
    params = jaxbp.init(net, jax.random.key(0))
    arguments = (params, jax.random.normal(jax.random.key(1), (batch, sizes[0])), jnp.arange(batch) % sizes[-1])
    ours = jax.jit(lambda params, x, y: jaxbp.value_and_grad(net, params, x, y)).lower(*arguments).compile()
    theirs = jax.jit(jax.value_and_grad(autodiff_loss(hidden))).lower(*arguments).compile()
    a, b = interleaved((ours, theirs), arguments, rounds)
    return {
        "milliseconds": 1e3 * statistics.median(a),
        "time_ratio": statistics.median(x / y for x, y in zip(a, b, strict=True)),
        "memory_ratio": bytes_of(ours) / bytes_of(theirs),
        "extra_bytes": bytes_of(ours) - bytes_of(theirs),
    }


def main() -> None:
    """Prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table(title=f"jaxbp.value_and_grad ÷ jax.value_and_grad, float32, {jax.devices()[0].device_kind}")
    for column in ("network / batch", "σ", "jaxbp (ms)", "time ratio", "memory ratio", "extra bytes"):
        table.add_column(column, justify="left" if column in ("network / batch", "σ") else "right")
    results: list[dict[str, Any]] = []
    for name, (sizes, batch) in SHAPES.items():
        for hidden in SIGMAS:
            found = measure(sizes, batch, hidden, options.rounds)
            results.append({"network": name, "hidden": hidden, **found})
            ratios = (f"{found['time_ratio']:.3f}", f"{found['memory_ratio']:.4f}", f"{found['extra_bytes']:,}")
            table.add_row(name, hidden, f"{found['milliseconds']:.2f}", *ratios)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
