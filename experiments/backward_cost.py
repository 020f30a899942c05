"""Is the backward pass "twice more expensive" than the forward pass? Counted exactly, by XLA, and by the clock.

A layer costs n₀n₁ multiply-adds a sample on the way forward (w x), and twice that on the way back: δ xᵀ for the
gradient and wᵀ δ for the layer below. The first layer has none below, since ∂ℓ/∂x⁽⁰⁾ is not needed. So the ratio of the
backward pass to the forward pass is 2 − n₀n₁ / Σₗ nₗ₋₁nₗ, and "twice" is its upper limit.

Three programs are compiled:
* forward: `jaxbp.forward` of a batch; its result is the whole tape, which the backward pass needs;
* backward: the tape and ∂ℓ/∂x⁽ᴸ⁾ are its arguments; `jaxbp.backward` and `jaxbp.gradient` of it: isolated, the forward
  pass is not in it;
* both: `jaxbp.value_and_grad`; (both − forward) / forward is the ratio again, by difference.

XLA's count is `compiled.cost_analysis()["flops"]`: elementwise operations are in it, a transcendental function is not.
Times are medians over rounds of the ratio within a round, the three programs called in turn.

Source: F. Fleuret, Deep Learning (EE-559 / 14x050), lecture 3.6.

Command: python -m experiments.backward_cost [--config CONFIG] [--out FOLDER]
"""

import dataclasses
import itertools
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from matplotlib.figure import Figure

import jaxbp
from experiments import recipe, report
from experiments.bench.timing import interleaved
from jaxbp.run.config import STRICT
from jaxbp.run.errors import UserError

NAME = "backward_cost"
CONFIG = Path(__file__).parent / "configs" / f"{NAME}.toml"


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Settings:
    """experiments/configs/backward_cost.toml."""

    networks: tuple[str, ...]
    hidden: str
    loss: str
    batch_size: pydantic.PositiveInt
    rounds: pydantic.PositiveInt


def sizes_of(network: str) -> tuple[int, ...]:
    """ "784-300×2-10" ↦ (784, 300, 300, 10).

    Raises:
      UserError: anything else.
    """
    try:
        parts = [[int(number) for number in part.split("×")] for part in network.split("-")]
        return tuple(size for part in parts for size in part[:1] * (part[1] if part[1:] else 1))
    except ValueError:
        raise UserError(f"networks: {network!r}, expected widths such as 784-300×2-10") from None


def exact_ratio(sizes: Sequence[int]) -> float:
    """2 − n₀n₁ / Σₗ nₗ₋₁nₗ: multiply-adds of the backward pass by those of the forward pass.

    Example:
      >>> exact_ratio((784, 1024, 1024, 10))
      1.5687568756875687
    """
    products = [inputs * outputs for inputs, outputs in itertools.pairwise(sizes)]
    return 2 - products[0] / sum(products)


def programs(net: jaxbp.MLP, batch_size: int) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """The three compiled programs, and the arguments of each."""
    params = jaxbp.init(net, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch_size, net.sizes[0]), jnp.float32)
    y = jnp.arange(batch_size) % net.sizes[-1]

    def forward(params: jaxbp.Params, x: jax.Array) -> jaxbp.Tape:
        return jax.vmap(lambda x: jaxbp.forward(net, params, x))(x)

    def backward(params: jaxbp.Params, tape: jaxbp.Tape, dl_dx: jax.Array) -> jaxbp.Params:
        deltas = jax.vmap(lambda tape, dl_dx: jaxbp.backward(net, params, tape, dl_dx))(tape, dl_dx)
        return jaxbp.gradient(jaxbp.Factors(tape.x[:-1], deltas))

    tape = jax.jit(forward)(params, x)
    dl_dx = jax.jit(jax.vmap(jaxbp.losses.get(net.loss).dl_dx))(tape.x[-1], y)
    arguments = {"forward": (params, x), "backward": (params, tape, dl_dx), "both": (params, x, y)}
    functions = {"forward": forward, "backward": backward, "both": lambda *p: jaxbp.value_and_grad(net, *p)}
    return {name: jax.jit(f).lower(*arguments[name]).compile() for name, f in functions.items()}, arguments


def measure_network(sizes: tuple[int, ...], config: Settings) -> dict[str, Any]:
    """Operations, seconds and the ratios of one network."""
    compiled, arguments = programs(jaxbp.MLP(sizes, config.hidden, loss=config.loss), config.batch_size)
    flops = {name: program.cost_analysis()["flops"] for name, program in compiled.items()}
    calls = [lambda name=name: compiled[name](*arguments[name]) for name in compiled]
    seconds = dict(zip(compiled, interleaved(calls, (), config.rounds), strict=True))
    forward, backward, both = (np.array(seconds[name]) for name in ("forward", "backward", "both"))
    return {
        "sizes": sizes,
        "exact": exact_ratio(sizes),
        "flops": flops,
        "xla": flops["backward"] / flops["forward"],
        "xla_by_difference": flops["both"] / flops["forward"] - 1,
        "milliseconds": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "time": float(np.median(backward / forward)),
        "time_quartiles": np.quantile(backward / forward, (0.25, 0.75)).tolist(),
        "time_by_difference": float(np.median(both / forward)) - 1,
    }


def measure(config: Settings) -> dict[str, Any]:
    """The figures of every network.

    Raises:
      UserError: a network, an activation or a loss that does not exist.
    """
    networks = {network: sizes_of(network) for network in config.networks}
    found = {}
    for network, sizes in networks.items():
        try:
            found[network] = measure_network(sizes, config)
        except ValueError as error:
            raise UserError(f"{network}: {error}") from None
        print(f"{network}: measured", flush=True)
    return {"config": dataclasses.asdict(config), "networks": found}


def show(results: dict[str, Any], published: dict[str, float]) -> None:
    """The table: a line a network."""
    rows = []
    for network, found in results["networks"].items():
        stated = f"{published[network]:.3f}" if network in published else "–"
        ratios = (found[key] for key in ("exact", "xla", "xla_by_difference", "time", "time_by_difference"))
        times = (f"{found['milliseconds'][name]:.2f}" for name in ("forward", "backward"))
        rows.append([network, stated, *(f"{ratio:.3f}" for ratio in ratios), *times])
    columns = (
        "network",
        "published",
        "exact",
        "XLA",
        "XLA, by diff.",
        "time",
        "time, by diff.",
        "forward ms",
        "back ms",
    )
    report.table(f"backward ÷ forward, batch {results['config']['batch_size']}, float32", columns, rows)


def draw(results: dict[str, Any]) -> Figure:
    """The ratio against the first layer's share of the multiply-adds: the theory is a straight line."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [2, 1], color="0.4", label="2 − n₀n₁ / Σ nₗ₋₁nₗ")
    axis.axhline(2, color="0.7", linestyle=":", zorder=0)
    axis.text(0.995, 2.01, "“twice more expensive”", color="0.4", ha="right", va="bottom")
    networks = results["networks"].values()
    shares = np.array([2 - found["exact"] for found in networks])
    axis.plot(shares, [found["xla"] for found in networks], "o", color="tab:blue", markersize=9, label="XLA's count")
    times = np.array([found["time"] for found in networks])
    spread = np.abs(np.array([found["time_quartiles"] for found in networks]).T - times)
    style = {"fmt": "D", "color": "tab:orange", "capsize": 3, "markersize": 6}
    axis.errorbar(shares, times, spread, **style, label="wall time, median and quartiles")
    for (network, found), share in zip(results["networks"].items(), shares, strict=True):
        offset = (-6, 14) if share < 0.1 else (12, 2) if share < 0.3 else (-10, -14)
        place = {"xytext": offset, "textcoords": "offset points", "ha": "left" if share < 0.3 else "right"}
        name = "-\n".join(textwrap.wrap(network.replace("-", " "), 17)).replace(" ", "-")
        axis.annotate(name, (share, found["exact"]), **place, fontsize=9)
    axis.set(xlabel="share of the first layer in the multiply-adds, n₀n₁ / Σ nₗ₋₁nₗ", ylabel="backward ÷ forward")
    axis.set(xlim=(-0.02, 1.02), ylim=(0.85, 2.15))
    axis.set_title(f"What the backward pass costs, batch {results['config']['batch_size']}")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table, writes backward_cost.json and backward_cost.png."""
    parser = report.parser(__doc__, CONFIG, "networks, batch, rounds")
    with report.study(NAME, parser, arguments) as study:
        results = measure(recipe.read(Settings, study.options.config))
        show(results, report.published(NAME)["ratios"])
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
