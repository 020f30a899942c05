"""What bfloat16 does to the accuracy of MNIST and to the time of a step: [train] precision and [model] dtype.

The config is trained in float32, in mixed precision (forward and backward in bfloat16, parameters and their update in
float32) and in bfloat16 altogether, with the same seeds: the same initial parameters (rounded) and batches. The runs
of a seed take turns, an epoch each. A time ratio is the median over these rounds, without the first, which compiles.

Command: python -m experiments.precision [--config configs/mnist.toml] [--seeds 3] [--out FOLDER]
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import report
from experiments.bench import timing
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.config import Config
from jaxbp.run.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "mnist.toml"
WAYS = {
    "float32": ("full", "float32", "tab:gray"),
    "mixed": ("mixed", "float32", "tab:blue"),
    "bfloat16": ("full", "bfloat16", "tab:orange"),
}


def epochs(config: Config, way: str, seed: int) -> Iterator[dict[str, Any]]:
    """Trains; the metrics after each epoch."""
    precision, dtype, _ = WAYS[way]
    train = dataclasses.replace(config.train, precision=precision, seed=seed)
    model = dataclasses.replace(config.model, dtype=dtype)
    for epoch in loop.epochs(loop.prepare(dataclasses.replace(config, train=train, model=model))):
        yield epoch.row.line() | epoch.timing.line()


def measure(config: Config, seeds: int) -> dict[str, Any]:
    """Trains every way with every seed.

    Raises:
      UserError: as `loop.prepare`.
      Diverged: as `loop.epochs`.
    """
    runs: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        rounds = list(zip(*(epochs(config, way, seed) for way in WAYS), strict=True))
        for way, run in zip(WAYS, zip(*rounds, strict=True), strict=True):
            runs[way].append(list(run))
            print(f"seed {seed}, {way}: test accuracy {100 * run[-1]['test_accuracy']:.2f} %", flush=True)
    summary = {way: _summary(runs[way], runs["float32"]) for way in WAYS}
    return {"config": configs.to_dict(config), "runs": runs, "summary": summary}


def _summary(runs: list[list[dict[str, Any]]], float32: list[list[dict[str, Any]]]) -> dict[str, Any]:
    last = {key: float(np.mean([run[-1][key] for run in runs])) for key in ("test_accuracy", "test_loss", "train_loss")}
    times = timing.ratio(_seconds(runs), _seconds(float32))
    return last | {"seconds": times.seconds, "ratio": times.value, "quartiles": times.spread}


def _seconds(runs: list[list[dict[str, Any]]]) -> list[float]:
    return [row["seconds"] for run in runs for row in run[1:] or run]


def show(results: dict[str, Any]) -> None:
    """The table: a line a precision."""
    rows = []
    for way, found in results["summary"].items():
        each = " ".join(f"{100 * run[-1]['test_accuracy']:.2f}" for run in results["runs"][way])
        cells = [
            f"{100 * found['test_accuracy']:.2f} %",
            each,
            f"{found['test_loss']:.4f}",
            f"{found['train_loss']:.4f}",
        ]
        quartiles = "–".join(f"{q:.2f}" for q in found["quartiles"])
        rows.append([way, *cells, f"{found['seconds']:.2f}", f"{found['ratio']:.2f}", quartiles])
    columns = (
        "precision",
        "test accuracy",
        "each seed (%)",
        "test loss",
        "training loss",
        "s",
        "÷ float32",
        "quartiles",
    )
    report.table("MNIST in lower precision", columns, rows)


def draw(results: dict[str, Any]) -> Figure:
    """Test accuracy and training loss over the epochs, every seed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for way, (_, _, colour) in WAYS.items():
        for number, run in enumerate(results["runs"][way]):
            label = way if number == 0 else None
            epochs = [row["epoch"] for row in run]
            accuracy.plot(epochs, [100 * row["test_accuracy"] for row in run], color=colour, label=label)
            loss.plot(epochs, [row["train_loss"] for row in run], color=colour, label=label)
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    loss.set(xlabel="epoch", ylabel="training loss")
    accuracy.legend(loc="lower right")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    name, sizes = results["config"]["data"]["name"], "-".join(map(str, results["config"]["model"]["sizes"]))
    figure.suptitle(f"{name}, {sizes}, seeds: {len(results['runs']['mixed'])}")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints the table, writes precision.json and precision.png."""
    parser = report.parser(__doc__, CONFIG, "the run in float32, a classification")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each precision")
    with report.study("precision", parser, arguments) as study:
        if study.options.seeds < 1:
            raise UserError(f"--seeds: got {study.options.seeds}, it should be 1 or more")
        results = measure(configs.read(study.options.config), study.options.seeds)
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
