"""Do "we have to keep in memory all the activations"? Bytes held against depth, without tricks and with them.

Of the same network, n-n-…-n, three programs are compiled for each depth L, and none of them is run:
* store all: `jaxbp.value_and_grad`;
* √L segments: `jaxbp.memory.value_and_grad` with `memory.segments(L)`, a checkpoint every √L layers;
* binomial: the same with `memory.revolve(L, slots)`, a fixed number of checkpoints.

Bytes are the temporary ones that XLA's buffer assignment states (`compiled.memory_analysis()`): parameters, data and
gradients, which every program has, are not among them. Beside them stands what the tape says: the bytes of `Tape` of
the batch, all x⁽ˡ⁾ and s⁽ˡ⁾, and of x⁽⁰⁾ … x⁽ᴸ⁻¹⁾ alone, which is all that the gradient needs where σ′ follows from
x⁽ˡ⁾, as relu's does: XLA keeps w x beside x = σ(w x + b) nevertheless. So the theory is: the checkpoints, x⁽ˡ⁾ and s⁽ˡ⁾
of the run at work, and one array for what is at work. x⁽⁰⁾ is counted though it is an argument; a last x⁽ᴸ⁾ or ∂ℓ/∂x⁽ᴸ⁾
takes its place.

Sources: F. Fleuret, Deep Learning (EE-559 / 14x050), lecture 3.6; T. Chen et al., Training deep nets with sublinear
memory cost, 2016; A. Griewank and A. Walther, Algorithm 799: Revolve, 2000.

Command: python -m experiments.activation_memory [--config CONFIG] [--out FOLDER]
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from matplotlib.figure import Figure

import jaxbp
from experiments import recipe, report
from jaxbp import memory
from jaxbp.run.config import STRICT
from jaxbp.run.errors import UserError

NAME = "activation_memory"
CONFIG = Path(__file__).parent / "configs" / f"{NAME}.toml"
MIB = 2**20
LABELS = {"store_all": "store all", "segments": "√L segments", "revolve": "binomial"}


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Settings:
    """experiments/configs/activation_memory.toml."""

    width: pydantic.PositiveInt
    batch_size: pydantic.PositiveInt
    depths: tuple[pydantic.PositiveInt, ...]
    hidden: str
    slots: pydantic.PositiveInt


def schedules(depth: int, slots: int) -> dict[str, memory.Schedule]:
    """The three schedules, by their keys in LABELS."""
    return {"store_all": depth, "segments": memory.segments(depth), "revolve": memory.revolve(depth, slots)}


def arrays_held(schedule: memory.Schedule) -> int:
    """How many (N, n) arrays a schedule holds at most: checkpoints, x⁽ˡ⁾ and s⁽ˡ⁾ of a run, and one more.

    Example:
      >>> arrays_held(100), arrays_held(memory.segments(100))
      (201, 30)
    """

    def tapes(schedule: memory.Schedule) -> int:
        if isinstance(schedule, int):
            return 2 * schedule
        return max(checkpoints + tapes(run) for checkpoints, run in enumerate(schedule))

    return tapes(schedule) + 1


def temporary_bytes(net: jaxbp.MLP, batch_size: int, schedule: memory.Schedule) -> int:
    """Of the compiled value and gradient; an int for a schedule is `jaxbp.value_and_grad`, which stores all."""

    def value_and_grad(params: jaxbp.Params, x: jax.Array, y: jax.Array) -> Any:
        if isinstance(schedule, int):
            return jaxbp.value_and_grad(net, params, x, y)
        return memory.value_and_grad(net, params, x, y, schedule)

    y = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    compiled = jax.jit(value_and_grad).lower(*_shapes(net, batch_size), y).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def tape_bytes(net: jaxbp.MLP, batch_size: int) -> dict[str, int]:
    """Of the whole tape of a batch, and of x⁽⁰⁾ … x⁽ᴸ⁻¹⁾ alone."""
    forward: Callable[..., jaxbp.Tape] = lambda params, x: jax.vmap(lambda x: jaxbp.forward(net, params, x))(x)  # noqa: E731
    tape = jax.eval_shape(forward, *_shapes(net, batch_size))
    return {"tape": _bytes(tape), "inputs": _bytes(tape.x[:-1])}


def _shapes(net: jaxbp.MLP, batch_size: int) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Of the parameters and of x, in float32."""
    params = jax.eval_shape(lambda: jaxbp.init(net, jax.random.key(0), dtype=jnp.float32))
    return params, jax.ShapeDtypeStruct((batch_size, net.sizes[0]), jnp.float32)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(config: Settings) -> dict[str, Any]:
    """Bytes and forward evaluations at each depth.

    Raises:
      UserError: an unknown activation.
    """
    one_array = 4 * config.batch_size * config.width
    rows = []
    for depth in config.depths:
        try:
            net = jaxbp.MLP((config.width,) * (depth + 1), config.hidden)
        except ValueError as error:
            raise UserError(f"hidden: {error}") from None
        row: dict[str, Any] = {"depth": depth, **tape_bytes(net, config.batch_size)}
        for name, schedule in schedules(depth, config.slots).items():
            row[name] = {
                "bytes": temporary_bytes(net, config.batch_size, schedule),
                "theory_bytes": arrays_held(schedule) * one_array,
                "inputs_held": memory.inputs_held(schedule),
                "evaluations": memory.evaluations(schedule),
            }
        rows.append(row)
        print(f"depth {depth}: compiled", flush=True)
    return {"config": dataclasses.asdict(config), "bytes_of_an_array": one_array, "rows": rows}


def show(results: dict[str, Any]) -> None:
    """The table: what the tape says beside what XLA allocates, MiB."""
    rows = []
    for row in results["rows"]:
        cells = [f"{row['tape'] / MIB:.0f}", f"{row['inputs'] / MIB:.0f}"]
        for name in LABELS:
            cells.append(f"{row[name]['theory_bytes'] / MIB:.0f} / {row[name]['bytes'] / MIB:.0f}")
        cells += [f"{row[name]['evaluations'] / row['depth']:.2f}" for name in ("segments", "revolve")]
        rows.append([row["depth"], *cells])
    config = results["config"]
    columns = ["L", "Tape", "x⁽⁰⁾ … x⁽ᴸ⁻¹⁾", *(f"{label}: theory / here" for label in LABELS.values())]
    columns += ["evaluations a layer: √L", "binomial"]
    title = f"MiB held, {config['width']}×L, batch {config['batch_size']}, {config['hidden']}, {config['slots']} slots"
    report.table(title, columns, rows)


def draw(results: dict[str, Any]) -> Figure:
    """Bytes against depth, and what they cost: forward evaluations of a layer."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    config, one, rows = results["config"], results["bytes_of_an_array"] / MIB, results["rows"]
    depths = np.array([row["depth"] for row in rows])
    every = np.arange(1, depths.max() + 1)
    for (name, label), colour in zip(LABELS.items(), ("tab:red", "tab:blue", "tab:green"), strict=True):
        left.plot(depths, [row[name]["bytes"] / MIB for row in rows], "o", color=colour, label=label)
        held = [one * arrays_held(schedules(int(depth), config["slots"])[name]) for depth in every]
        left.plot(every, held, color=colour, linewidth=1)
        costs = [memory.evaluations(schedules(int(depth), config["slots"])[name]) / depth for depth in every]
        right.plot(every, costs, color=colour, label=label)
    left.set(xlabel="depth L", ylabel="MiB", title="held; dots: XLA's temporary bytes, lines: theory")
    left.plot(every, one * every, color="tab:red", linestyle=":", label="x⁽⁰⁾ … x⁽ᴸ⁻¹⁾ alone")
    right.set(xlabel="depth L", ylabel="forward evaluations of a layer", title="what it costs", ylim=(0.9, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"{config['width']} units a layer, batch {config['batch_size']}, {config['slots']} slots for binomial"
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table, writes activation_memory.json and activation_memory.png."""
    parser = report.parser(__doc__, CONFIG, "width, batch, depths")
    with report.study(NAME, parser, arguments) as study:
        results = measure(recipe.read(Settings, study.options.config))
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
