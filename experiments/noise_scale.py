"""How does the noise scale grow while the loss falls? tr Σ / |G|² of every step of a training run on MNIST.

A run with a [study] table records tr Σ and |G|² of each batch, both estimated without bias from the norms of its
samples' gradients. One batch is noisy, and the ratio of two noisy numbers is biased: both are averaged first, here over
windows that grow with the step, and divided then. After each epoch the same quantity comes from the whole training set,
which knows |G|² far better, but for the parameters of that one moment.

Source: S. McCandlish et al., An empirical model of large-batch training, 2018, §2.2 and appendix A.1: the noise scale
B = tr Σ / |G|² grows as the loss falls; up to about B samples a step a larger batch saves steps in proportion.

Command: python -m experiments.noise_scale [--config configs/mnist_noise_scale.toml] [--windows 25] [--out FOLDER]
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import report
from jaxbp.mlp import Params
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.config import Config
from jaxbp.run.errors import UserError
from jaxbp.run.problem import Problem
from jaxbp.run.report.metrics import StepRecord
from jaxbp.run.report.plots import noise_scales
from jaxbp.run.study import measure as study
from jaxbp.run.study.measure import Subject

CONFIG = Path(__file__).parent.parent / "configs" / "mnist_noise_scale.toml"
CHUNK = 1000


def window_edges(records: int, windows: int) -> list[int]:
    """Where windows over the records begin and end: even in the logarithm, none of them empty."""
    edges = np.unique(np.geomspace(1, records + 1, windows + 1).round().astype(int)) - 1
    return [int(edge) for edge in edges]


def averaged(recorded: Sequence[StepRecord]) -> dict[str, float | None]:
    """The noise scale of all these records together, from the means of tr Σ and of |G|²; None where |G|² < 0."""
    scale = float(noise_scales(recorded, 2 * len(recorded) + 1)[0])
    return {
        "step": float(np.exp(np.mean(np.log([row.step for row in recorded])))),
        "loss": float(np.mean([row.batch_loss for row in recorded])),
        "noise_scale": scale if np.isfinite(scale) else None,
    }


def of_the_training_set(problem: Problem, params: Params) -> float:
    """tr Σ / |G|² over all training samples: what `jaxbp study` prints."""
    model, split = problem.model(params), problem.on_device("train")
    subject = Subject(Path("noise_scale"), problem, model, "train", split, *problem.raw("train"))
    numbers = study.measure(subject, ("noise_scale",), CHUNK).numbers
    return next(value for name, value in numbers.items() if name.startswith("noise scale"))


def measure(config: Config, windows: int) -> tuple[dict[str, Any], list[StepRecord]]:
    """Trains, and averages the records over windows and over epochs; gives the records as well, for the picture.

    Raises:
      UserError: a config that does not record the noise scale; as `loop.prepare`.
      Diverged: as `loop.epochs`.
    """
    if "noise_scale" not in config.study.quantities or windows < 1:
        raise UserError('study.quantities: this study needs "noise_scale" among them, and a window or more')
    setup = loop.prepare(config)
    recorded: list[StepRecord] = []
    whole = [{"epoch": 0, "step": 0, "noise_scale": of_the_training_set(setup.problem, setup.problem.initial())}]
    for epoch in loop.epochs(setup):
        found, row = of_the_training_set(setup.problem, setup.program.params), epoch.row.line()
        recorded += [record for record in epoch.rows if isinstance(record, StepRecord)]
        whole.append({name: row[name] for name in ("epoch", "step", "train_loss", "test_accuracy")})
        whole[-1]["noise_scale"] = found
        print(f"epoch {row['epoch']}: loss {row['train_loss']:.3g}, noise scale {found:,.0f} samples", flush=True)
    edges = window_edges(len(recorded), windows)
    epochs = [[row for row in recorded if row.epoch == at["epoch"]] for at in whole[1:]]
    results = {
        "config": configs.to_dict(config),
        "records": len(recorded),
        "records_with_negative_squared_gradient": int(np.isnan(noise_scales(recorded, 1)).sum()),
        "windows": [averaged(recorded[a:b]) for a, b in itertools.pairwise(edges)],
        "epochs": [{"epoch": i, **averaged(rows)} for i, rows in enumerate(epochs, 1) if rows],
        "training_set": whole,
    }
    return results, recorded


def show(results: dict[str, Any]) -> None:
    """The table: epoch by epoch."""
    after = {row["epoch"]: row for row in results["training_set"]}
    rows = [
        [
            row["epoch"],
            f"{row['loss']:.4f}",
            "–" if row["noise_scale"] is None else f"{row['noise_scale']:,.0f}",
            f"{after[row['epoch']]['train_loss']:.4f}",
            f"{after[row['epoch']]['noise_scale']:,.0f}",
            f"{100 * after[row['epoch']]['test_accuracy']:.2f} %",
        ]
        for row in results["epochs"]
    ]
    report.table(
        f"{results['records']:,} batches, {results['records_with_negative_squared_gradient']:,} of them with |G|² < 0; "
        f"noise scale of the training set at initialisation {after[0]['noise_scale']:,.0f}",
        (
            "epoch",
            "loss, batches",
            "noise scale, batches",
            "loss at its end",
            "noise scale at its end",
            "test accuracy",
        ),
        rows,
    )


def draw(results: dict[str, Any], recorded: Sequence[StepRecord]) -> Figure:
    """Loss above, noise scale below, over the steps; all axes logarithmic."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps, windows, whole = [row.step for row in recorded], results["windows"], results["training_set"][1:]
    at, after = [row["step"] for row in windows], [row["step"] for row in whole]
    dots = {"linestyle": "", "marker": ".", "markersize": 2, "color": "0.75", "label": "one batch"}
    marks = {"linestyle": "", "marker": "D", "markersize": 5, "color": "tab:orange", "label": "whole training set"}
    top.plot(steps, [row.batch_loss for row in recorded], **dots)
    top.plot(at, [row["loss"] for row in windows], color="tab:blue", label="mean over a window of steps")
    top.plot(after, [row["train_loss"] for row in whole], **marks)
    bottom.plot(steps, noise_scales(recorded, 1), **dots)
    scales = [np.nan if row["noise_scale"] is None else row["noise_scale"] for row in windows]
    bottom.plot(at, scales, color="tab:blue", label="means of tr Σ and of |G|² over the window, divided")
    bottom.plot(after, [row["noise_scale"] for row in whole], **marks)
    config = results["config"]
    batch = config["train"]["batch_size"]
    bottom.axhline(batch, color="tab:green", linewidth=1, label=f"the batch, {batch} samples")
    top.set(ylabel="mean loss of a sample (nats)", title="the loss falls", xscale="log", yscale="log")
    bottom.set(xlabel="step", ylabel="noise scale tr Σ / |G|² (samples)", title="the noise scale grows", yscale="log")
    figure.suptitle(f"{config['data']['name']}, {'-'.join(map(str, config['model']['sizes']))}, batches of {batch}")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", markerscale=1.5)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table, writes noise_scale.json and noise_scale.png."""
    parser = report.parser(__doc__, CONFIG, 'the run; its [study] records "noise_scale"')
    parser.add_argument("--windows", type=int, default=25, help="windows of steps that are averaged over")
    with report.study("noise_scale", parser, arguments) as study:
        results, recorded = measure(configs.read(study.options.config), study.options.windows)
        show(results)
        study.save(results, draw(results, recorded))


if __name__ == "__main__":
    main()
