"""Is the noise scale of a GPT that of its normalisation layers? tr Σ / |G|² by layer, at every step of a run.

A run with a [study] table records tr Σ and |G|² of each batch, without bias and by layer. Both are averaged over
windows of steps and divided then. The noise scale of some layers is the ratio of their sums. That of all parameters is
compared with that of scales and shifts alone: how large the one is beside the other, and how well logarithms correlate.

What the records cost is measured before, on a tenth of the text: epochs with and without them, one after the other.

Source: G. Gray et al., *Normalization layer per-example gradients are sufficient to predict gradient noise scale in
transformers*, 2024.

Command: python -m experiments.gpt_noise_scale [--config configs/shakespeare.toml] [--text PATH] [--window 50]
         [--rounds 5] [--out FOLDER]
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import report
from experiments.bench import timing
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.config import Config
from jaxbp.run.errors import UserError
from jaxbp.run.report.metrics import StepRecord

CONFIG = Path(__file__).parent / "configs" / "gpt_noise_scale.toml"
RECORDED = ("--study.quantities", "noise_scale", "--study.every", "1")
COLOURS = {"normalisation": "tab:orange", "attention": "tab:blue", "perceptron": "tab:green", "tables and head": "0.5"}


def kinds_of(net: Any) -> list[str]:
    """What each part of the parameters belongs to, in the order of the records: normalisation, attention …"""
    parts = jax.tree.leaves_with_path(net.parameters, is_leaf=lambda node: hasattr(node, "b") or hasattr(node, "gamma"))
    kinds = []
    for path, part in parts:
        name = jax.tree_util.keystr(path)
        if hasattr(part, "gamma"):
            kinds.append("normalisation")
        elif re.search(r"\.(qkv|out)$", name):
            kinds.append("attention")
        else:  # in a residual block, or one of the chain's own layers
            kinds.append("perceptron" if name.count("[") > 1 else "tables and head")
    return kinds


def slowdown(config: Config, rounds: int) -> dict[str, Any]:
    """Seconds of an epoch with records ÷ without, median and quartiles over epochs one after the other."""
    short = [configs.override(config, ["--data.test_fraction", "0.9", "--train.epochs", str(rounds), *more])
             for more in ((), RECORDED)]  # fmt: skip
    runs = [loop.epochs(loop.prepare(each)) for each in short]
    seconds = np.array([[epoch.timing.seconds for epoch in pair] for pair in zip(*runs, strict=True)]).T
    return timing.ratio(list(seconds[1]), list(seconds[0]))._asdict()


def windows(recorded: Sequence[StepRecord], kinds: Sequence[str], window: int) -> dict[str, list[float]]:
    """The noise scale in each window of steps, of all parameters and of each kind of layer; NaN where |G|² < 0."""
    trace, gradient = (
        np.array([row.quantities["noise_scale"][f"{name}_by_layer"] for row in recorded])
        for name in ("trace", "squared_gradient")
    )
    count = len(recorded) // window
    means = [a[: count * window].reshape(count, window, -1).mean(axis=1) for a in (trace, gradient)]
    found = {}
    for kind in ("all", *COLOURS):
        chosen = np.array([kind in ("all", each) for each in kinds])
        top, bottom = (mean[:, chosen].sum(axis=1) for mean in means)
        found[kind] = np.divide(top, bottom, out=np.full(count, np.nan), where=bottom > 0).tolist()
    return found


def prediction(total: Sequence[float], of_norms: Sequence[float]) -> dict[str, float]:
    """total ≈ slope × of_norms by least squares of the logarithms, their correlation, and how far off it typically is.

    Example:
      >>> found = prediction([2.0, 4.0, 20.0], [1.0, 2.0, 10.0])
      >>> [round(found[name], 6) for name in ("slope", "correlation", "typical_factor")]
      [2.0, 1.0, 1.0]
    """
    pairs = np.log(np.array([total, of_norms], np.float64))
    y, x = pairs[:, np.isfinite(pairs).all(axis=0)]
    residual = y - x - np.mean(y - x)
    return {
        "windows": len(y),
        "slope": float(np.exp(np.mean(y - x))),
        "correlation": float(np.corrcoef(x, y)[0, 1]),
        "typical_factor": float(np.exp(np.std(residual))),
    }


def measure(config: Config, window: int) -> dict[str, Any]:
    """Trains with records, and compares."""
    setup = loop.prepare(configs.override(config, RECORDED))
    kinds = kinds_of(setup.problem.net)
    recorded, scores = [], []
    for epoch in loop.epochs(setup):
        recorded += [row for row in epoch.rows if isinstance(row, StepRecord)]
        scores.append(epoch.row.scores())
        print(f"epoch {epoch.row.epoch}: {epoch.row.scores()}", flush=True)
    if len(recorded) < 3 * window:
        raise UserError(f"--window: {len(recorded)} steps have fewer than 3 windows of {window}")
    scales = windows(recorded, kinds, window)
    losses = [row.batch_loss for row in recorded]
    starts = range(0, len(recorded) - window + 1, window)
    return {
        "config": configs.to_dict(config),
        "kinds": kinds,
        "scores": scores,
        "window": window,
        "step": [start + (window + 1) / 2 for start in starts],
        "loss": [float(np.mean(losses[start : start + window])) for start in starts],
        "noise_scale": {kind: [v if np.isfinite(v) else None for v in values] for kind, values in scales.items()},
        "prediction": {kind: prediction(scales["all"], scales[kind]) for kind in COLOURS},
    }


def show(results: dict[str, Any]) -> None:
    """A row for each kind of layer: how well it predicts the noise scale of all."""
    rows = [
        (
            f"{kind} ({results['kinds'].count(kind)})",
            *(f"{found[name]:.3g}" for name in ("correlation", "slope", "typical_factor")),
        )
        for kind, found in results["prediction"].items()
    ]
    ratio = results["slowdown"]
    title = f"records at every step: {ratio['value']:.2f} × the time without; windows of {results['window']} steps"
    report.table(title, ("layers", "correlation of logarithms", "all ÷ these", "scatter, ×"), rows)


def draw(results: dict[str, Any]) -> Figure:
    """The noise scale by kind of layer over the steps, and that of all against that of the normalisation layers."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = {kind: np.array(values, np.float64) for kind, values in results["noise_scale"].items()}
    for kind, values in scales.items():
        colour = COLOURS.get(kind, "black")
        left.plot(results["step"], values, color=colour, label=kind, linewidth=2 if kind == "all" else 1)
    left.set(xlabel="step", ylabel="noise scale tr Σ / |G|² (sequences)", yscale="log", title="by kind of layer")
    found = results["prediction"]["normalisation"]
    dots = right.scatter(scales["normalisation"], scales["all"], c=results["step"], s=14, cmap="viridis")
    ends = np.array([np.nanmin(scales["normalisation"]), np.nanmax(scales["normalisation"])])
    right.plot(ends, found["slope"] * ends, color="black", linewidth=1, label=f"all = {found['slope']:.2f} × these")
    right.set(
        xlabel="noise scale of the normalisation layers alone",
        ylabel="noise scale of all parameters",
        xscale="log",
        yscale="log",
        title=f"correlation of the logarithms {found['correlation']:.2f}",
    )
    figure.colorbar(dots, ax=right, label="step")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table, writes gpt_noise_scale.json and gpt_noise_scale.png."""
    parser = report.parser(__doc__, CONFIG, "the run")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare, if it is not imported")
    parser.add_argument("--window", type=int, default=50, help="steps that are averaged over")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of epochs that the slowdown comes from")
    with report.study("gpt_noise_scale", parser, arguments) as study:
        options = study.options
        config = configs.read(options.config, ["--data.name", str(options.text)] if options.text else [])
        ratio = slowdown(config, options.rounds)
        print(f"with records {ratio['value']:.2f} × the time without", flush=True)
        results = measure(config, options.window) | {"slowdown": ratio}
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
