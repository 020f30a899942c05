"""What the tricks save and cost: checkpoints by √L and by the binomial schedule, parts of a batch, jax.checkpoint.

Networks of equal tanh layers, the mean gradient of a batch in float32. Bytes are the scratch memory of the compiled
program as XLA states it, without its arguments and without its result, the gradient; milliseconds are medians over
interleaved rounds, beside the ratio to storing all within a round. jax.checkpoint is measured twice: in
a loop over runs of √L layers, and in jax.lax.scan over such runs, for parameters that are kept stacked.

Command: python -m experiments.memory_tricks [--depths 100 1000] [--width 128] [--batch 256] [--rounds 11]
         [--out FOLDER]
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import jaxbp
from experiments import report
from experiments.bench.timing import interleaved
from jaxbp import MLP, memory
from jaxbp.mlp import Array, Params
from jaxbp.run.errors import UserError

SLOTS = {100: (3, 5, 8, 12, 20, 40), 1000: (16, 32, 64)}
"""By depth."""
PARTS = (4, 16)
FAMILIES = {
    "store-all": "tab:gray",
    "√L": "tab:blue",
    "slots": "tab:orange",
    "micro-batches": "tab:green",
    "jax.grad, jax.checkpoint": "tab:red",
}
Program = Callable[[Params, Array, Array], Any]


def programs(net: MLP) -> dict[str, Program]:
    """Value and gradient, by what is done about memory."""
    layers = len(net.sizes) - 1
    made: dict[str, Program] = {"store-all": lambda p, x, y: jaxbp.value_and_grad(net, p, x, y)}
    made["√L"] = checkpointed(net, memory.segments(layers))
    for slots in SLOTS.get(layers, (2, 4)):
        made[f"{slots} slots"] = checkpointed(net, memory.revolve(layers, slots))
    for parts in PARTS:
        made[f"{parts} micro-batches"] = in_parts(net, parts)
    made["jax.grad"] = jax.value_and_grad(autodiff(lambda run: run, 1))
    made["jax.checkpoint, √L"] = jax.value_and_grad(autodiff(jax.checkpoint, math.isqrt(layers)))
    made["jax.checkpoint, √L, scan"] = jax.value_and_grad(stacked_loss)
    return made


def checkpointed(net: MLP, schedule: memory.Schedule) -> Program:
    """`jaxbp.memory.value_and_grad`."""
    return lambda p, x, y: memory.value_and_grad(net, p, x, y, schedule)


def in_parts(net: MLP, parts: int) -> Program:
    """The same sum, a part of the batch after the other."""

    def run(params: Params, x: Array, y: Array) -> Any:
        def add(total: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
            found = jaxbp.value_and_grad(net, params, *part, normalize_by=len(x))
            return jax.tree.map(jnp.add, total, found), None

        zero = jnp.zeros((), x.dtype), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zero, (x.reshape(parts, -1, x.shape[1]), y.reshape(parts, -1, y.shape[1])))[0]

    return run


def autodiff(wrap: Callable[[Any], Any], length: int) -> Callable[[Params, Array, Array], Array]:
    """The mean loss, written as one would; `wrap` is done to each run of so many layers."""

    @wrap
    def run(layers: Params, x: Array) -> Array:
        for w, b in layers:
            x = jnp.tanh(x @ w.T + b[None])
        return x

    def loss(params: Params, x: Array, y: Array) -> Array:
        for start in range(0, len(params), length):
            x = run(params[start : start + length], x)
        return jnp.mean(jnp.sum((x - y) ** 2, axis=1) / 2)

    return loss


def stacked(params: Params) -> Params:
    """One Affine of (runs, layers a run, ·): runs of the longest length up to √L that divides L. Needs equal layers."""
    length = max(n for n in range(1, math.isqrt(len(params)) + 1) if len(params) % n == 0)
    one: Params = (jax.tree.map(lambda *a: jnp.stack(a).reshape(-1, length, *a[0].shape), *params),)
    return one


def stacked_loss(params: Params, x: Array, y: Array) -> Array:
    """The mean loss with parameters that are stacked."""

    @jax.checkpoint
    def run(x: Array, layers: Any) -> tuple[Array, None]:
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer.w.T + layer.b[None]), None), x, layers)[0], None

    x, _ = jax.lax.scan(run, x, params[0])
    return jnp.mean(jnp.sum((x - y) ** 2, axis=1) / 2)


def measure(depth: int, width: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row a program."""
    net = MLP((width,) * (depth + 1), "tanh", "tanh", "squared_error")
    x, y = jax.random.normal(jax.random.key(1), (2, batch, width), jnp.float32)
    params = jaxbp.init(net, jax.random.key(0), "glorot")
    rows: list[dict[str, Any]] = []
    calls = []
    for name, program in programs(net).items():
        own = stacked(params) if name.endswith("scan") else params
        started = time.perf_counter()
        compiled = jax.jit(program).lower(own, x, y).compile()
        seconds = time.perf_counter() - started
        scratch = compiled.memory_analysis().temp_size_in_bytes
        calls.append(functools.partial(compiled, own, x, y))
        rows.append({"depth": depth, "name": name, "scratch_bytes": scratch, "compile_seconds": seconds})
        print(f"{depth} layers, {name}: compiled in {seconds:.1f} s", flush=True)
    expected = jax.tree.leaves(stacked(calls[0]()[1]))
    times = interleaved(calls, (), rounds)
    for row, call, each in zip(rows, calls, times, strict=True):
        got = call()[1]
        leaves = jax.tree.leaves(got if row["name"].endswith("scan") else stacked(got))
        errors = [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(leaves, expected, strict=True)]
        row["milliseconds"] = 1e3 * statistics.median(each)
        row["time_ratio"] = statistics.median(a / b for a, b in zip(each, times[0], strict=True))
        row["largest_difference"] = max(errors)
        row |= counts(row["name"], depth)
    return rows


def counts(name: str, depth: int) -> dict[str, Any]:
    """What the schedule says: forward evaluations of a layer and layer inputs held."""
    schedule: memory.Schedule | None = {"store-all": depth, "√L": memory.segments(depth)}.get(name)
    if name.endswith(" slots"):
        schedule = memory.revolve(depth, int(name.split()[0]))
    if schedule is None:
        return {"evaluations": None, "inputs_held": None}
    return {"evaluations": memory.evaluations(schedule), "inputs_held": memory.inputs_held(schedule)}


def show(rows: list[dict[str, Any]], width: int, batch: int) -> None:
    """A table a depth."""
    columns = ("program", "scratch MB", "× less", "time ratio", "ms", "layers forward", "inputs held", "compile s")
    for depth in dict.fromkeys(row["depth"] for row in rows):
        chosen = [row for row in rows if row["depth"] == depth]
        cells = [
            [
                row["name"],
                f"{row['scratch_bytes'] / 1e6:.2f}",
                f"{chosen[0]['scratch_bytes'] / row['scratch_bytes']:.1f}",
                f"{row['time_ratio']:.2f}",
                f"{row['milliseconds']:.0f}",
                "" if row["evaluations"] is None else f"{row['evaluations']:,}",
                "" if row["inputs_held"] is None else row["inputs_held"],
                f"{row['compile_seconds']:.1f}",
            ]
            for row in chosen
        ]
        report.table(f"{depth} layers of width {width}, batch {batch}", columns, cells)


def draw(rows: list[dict[str, Any]], width: int, batch: int) -> Figure:
    """Time against scratch memory, a picture a depth."""
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    figure = Figure(figsize=(5.6 * len(depths), 4.6), layout="constrained")
    for axes, depth in zip(figure.subplots(1, len(depths), squeeze=False)[0], depths, strict=True):
        chosen = [row for row in rows if row["depth"] == depth]
        for family, colour in FAMILIES.items():
            key = "jax." if family.startswith("jax.") else family
            own = [row for row in chosen if key in row["name"] and (key == "jax." or "jax." not in row["name"])]
            x, y = [row["scratch_bytes"] / 1e6 for row in own], [row["time_ratio"] for row in own]
            line = "-" if len(own) > 1 and key != "jax." else ""
            axes.plot(x, y, marker="o", markersize=5, linestyle=line, color=colour, label=family)
            for row, a, b in zip(own, x, y, strict=True):
                if not row["name"].endswith((" slots", " micro-batches", "scan")):
                    continue
                text = row["name"].removesuffix(" slots").removesuffix(" micro-batches").removeprefix("jax.")
                axes.annotate(text, (a, b), textcoords="offset points", xytext=(4, 5), fontsize=7, color=colour)
        axes.set(xscale="log", xlabel="scratch memory (MB)", ylabel="time ÷ storing all", title=f"{depth} layers")
        axes.margins(x=0.2, y=0.12)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=8, loc="lower left")
    figure.suptitle(f"mean gradient, tanh layers of width {width}, batch {batch}, float32")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, writes memory_tricks.json and memory_tricks.png."""
    parser = report.parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[100, 1000], help="layers")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=11)
    with report.study("memory_tricks", parser, arguments) as study:
        depths, width, batch = study.options.depths, study.options.width, study.options.batch
        if batch % math.lcm(*PARTS) or min(depths) < 2:
            raise UserError(f"--batch: a multiple of {math.lcm(*PARTS)}; --depths: from 2 on")
        rows = [row for depth in depths for row in measure(depth, width, batch, study.options.rounds)]
        show(rows, width, batch)
        results = {"width": width, "batch": batch, "device": jax.devices()[0].device_kind, "rows": rows}
        study.save(results, draw(rows, width, batch))


if __name__ == "__main__":
    main()
