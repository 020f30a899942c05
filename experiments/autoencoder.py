"""Does K-FAC train an autoencoder in fewer epochs, and in fewer seconds, than SGD and Adam?

MNIST through 784-250-60-12-60-250-784, tanh, sigmoid cross-entropy of the pixels: a smaller sibling of the network with
which J. Martens and R. Grosse (2015) show K-FAC. Each optimiser is tuned alike: one epoch with each value of a grid of
five, then the best of it: K-FAC for all epochs, the others until they have had its seconds, too. SGD has the momentum
0.9. A run of the grid that diverges is out.

Command: python -m experiments.autoencoder [--epochs 10] [--samples 20000] [--out FOLDER]
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import report
from jaxbp.run import config as configs
from jaxbp.run import data, loop
from jaxbp.run.errors import Diverged, UserError

CONFIG = Path(__file__).parent.parent / "configs" / "mnist.toml"
SIZES, BATCH, MOST = [784, 250, 60, 12, 60, 250, 784], 500, 100_000  # epochs at most
GRIDS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"learning_rate": rate, "arguments": {"momentum": 0.9}} for rate in (0.003, 0.01, 0.03, 0.1, 0.3)],
    "adam": [{"learning_rate": rate} for rate in (0.0003, 0.001, 0.003, 0.01, 0.03)],
    "kfac": [{"learning_rate": 1.0, "arguments": {"damping": damping}} for damping in (0.1, 1.0, 10.0, 100.0, 1000.0)],
}
COLOURS = {"sgd": "tab:gray", "adam": "tab:orange", "kfac": "tab:blue"}


def images(config: Path, samples: int, to: Path) -> None:
    """A file whose targets are its inputs, from 0 to 1."""
    found = data.load(configs.read(config).data)
    x, x_test = ((x / 255).astype(np.float32).reshape(len(x), -1) for x in (found.x_train[:samples], found.x_test))
    np.savez(to, x=x, y=x, x_test=x_test, y_test=x_test)


def epochs(file: Path, name: str, values: dict[str, Any], count: int) -> Iterator[dict[str, float]]:
    """Trains; the losses after each epoch and the seconds up to then, without the first compilation."""
    tables: dict[str, Any] = {
        "data": {"name": str(file), "standardize": "none"},
        "model": {"sizes": SIZES, "hidden": "tanh", "loss": "sigmoid_cross_entropy"},
        "optimizer": {"name": name, **values},
        "train": {"epochs": count, "batch_size": BATCH},
    }
    seconds = 0.0
    for epoch in loop.epochs(loop.prepare(configs.validate(tables, name))):
        seconds += epoch.timing.seconds
        row = epoch.row.line()
        yield {"seconds": seconds, "train_loss": row["train_loss"], "test_loss": row["test_loss"]}


def trained(file: Path, name: str, values: dict[str, Any], count: int, seconds: float) -> list[dict[str, float]]:
    """At least so many epochs, and at least so many seconds."""
    rows: list[dict[str, float]] = []
    for row in epochs(file, name, values, MOST):
        rows.append(row)
        if len(rows) >= count and row["seconds"] >= seconds:
            break
    return rows


def tuned(file: Path, name: str) -> tuple[dict[str, Any], list[float | None]]:
    """The values of the grid with the least training loss after one epoch, and all those losses."""
    found: list[float | None] = []
    for values in GRIDS[name]:
        try:
            found.append(next(epochs(file, name, values, 1))["train_loss"])
        except Diverged:
            found.append(None)
        print(f"{name} {values}: {found[-1]}", flush=True)
    best = min((loss, i) for i, loss in enumerate(found) if loss is not None)[1]
    return GRIDS[name][best], found


def draw(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """The training loss against epochs and against seconds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("epoch", "seconds"), strict=True):
        for name, rows in runs.items():
            at = range(1, len(rows) + 1) if key == "epoch" else [row["seconds"] for row in rows]
            axes.plot(at, [row["train_loss"] for row in rows], marker=".", color=COLOURS[name], label=name)
        axes.set(xlabel=key, ylabel="training loss of an image", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(f"MNIST autoencoder {'-'.join(map(str, SIZES))}, each tuned on a grid of five")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes, trains, prints the table, writes autoencoder.json and autoencoder.png."""
    parser = report.parser(__doc__, CONFIG, "the data: images")
    parser.add_argument("--epochs", type=int, default=10, help="of the tuned runs")
    parser.add_argument("--samples", type=int, default=20_000, help="training images")
    with report.study("autoencoder", parser, arguments) as study, tempfile.TemporaryDirectory() as folder:
        if min(study.options.epochs, study.options.samples) < 1:
            raise UserError("--epochs and --samples should be 1 or more")
        file = Path(folder) / "images.npz"
        images(study.options.config, study.options.samples, file)
        grids = {name: tuned(file, name) for name in GRIDS}
        count, runs, seconds = study.options.epochs, dict[str, list[dict[str, float]]](), 0.0
        for name in reversed(GRIDS):  # K-FAC is the first
            runs[name] = trained(file, name, grids[name][0], count, seconds)
            seconds = runs["kfac"][-1]["seconds"]
        rows = []
        for name, found in runs.items():
            per_epoch = np.median(np.diff([row["seconds"] for row in found])) if len(found) > 1 else seconds
            losses = [f"{row[key]:.2f}" for row in (found[count - 1], found[-1]) for key in ("train_loss", "test_loss")]
            rows += [[name, str(grids[name][0]), *losses, len(found), f"{per_epoch:.2f}"]]
        after = f"{count} epochs", f"{seconds:.0f} s"
        of_each = [f"{which}, {when}" for when in after for which in ("training", "test")]
        columns = ("optimizer", "tuned", *of_each, "epochs", "s an epoch")
        report.table("MNIST autoencoder: losses", columns, rows)
        found = {name: {"values": v, "grid": g, "epochs": runs[name]} for name, (v, g) in grids.items()}
        study.save({"sizes": SIZES, "samples": study.options.samples, "optimizers": found}, draw(runs))


if __name__ == "__main__":
    main()
