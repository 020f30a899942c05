"""Does back-propagation by hand repeat a published run digit by digit? Nielsen's `overfitting`, 400 epochs in float64.

784-30-10 on the first 1,000 images of MNIST: the training cost goes to 0, the test cost turns round early on. The
counts have to be the published ones, the costs to 1e-12. A second replay, with another learning rate, shows that with
a wrong constant they would not be.

Source: M. Nielsen, Neural Networks and Deep Learning, chapter 3; overfitting.json of its repository, 2014.

Command: python -m experiments.nielsen_overfitting [--config CONFIG]
         [--wrong-learning-rate 0.5001] [--out FOLDER]
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import nielsen, report
from experiments.nielsen import Script
from jaxbp.run.errors import UserError

CONFIG = Path(__file__).parent / "configs" / "nielsen_overfitting.toml"
NAME = "nielsen_overfitting"
COSTS, COUNTS = ("test_cost", "training_cost"), ("test_correct", "training_correct")
TOLERANCE = 1e-12


def published_rows() -> list[dict[str, Any]]:
    """The published figures, a row an epoch."""
    figures = report.published(NAME)
    return [dict(zip(figures["columns"], row, strict=True)) for row in figures["rows"]]


def compared(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Published and found figures of the epochs that were replayed, and their differences, found − published."""
    rows = []
    for published in published_rows():
        if published["epoch"] < len(found):
            here = found[published["epoch"]]
            difference = {key: here[key] - published[key] for key in (*COSTS, *COUNTS)}
            rows.append({"epoch": published["epoch"], "published": published, "here": here, "difference": difference})
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many rows have the published counts and costs, and how far the costs are off at most."""
    worst = [max(abs(row["difference"][key]) for key in COSTS) for row in rows]
    counts = [all(row["difference"][key] == 0 for key in COUNTS) for row in rows]
    equal = sum(same and error <= TOLERANCE for same, error in zip(counts, worst, strict=True))
    return {"rows": len(rows), "rows_equal": equal, "counts_equal": sum(counts), "largest_cost_difference": max(worst)}


def measure(script: Script, wrong_learning_rate: float) -> dict[str, Any]:
    """Replays the run, and again with the wrong learning rate.

    Raises:
      UserError: not one run, or one that does not monitor what was published; as `nielsen.load`.
    """
    if len(script.runs) != 1 or set(script.runs[0].monitor) != {*COSTS, *COUNTS}:
        raise UserError(f"runs: this study is of one run that monitors {', '.join((*COSTS, *COUNTS))}")
    images, (run,), replays = nielsen.load(), script.runs, {}
    for name, eta in (("right", run.learning_rate), ("wrong", wrong_learning_rate)):
        started = time.perf_counter()
        found = nielsen.figures(nielsen.with_learning_rate(script, eta), images)[run.name]
        rows = compared(found)
        seconds = time.perf_counter() - started
        replays[name] = {"learning_rate": eta, "seconds": seconds, **verdict(rows), "compared": rows}
        replays[name] |= {"epochs": found} if name == "right" else {}
    return {"config": dataclasses.asdict(script), **replays}


def show(results: dict[str, Any]) -> None:
    """The tables: published | here, and what the wrong learning rate makes of it; the costs first, then the counts."""
    right, wrong = results["right"], results["wrong"]
    for title, keys, form in (("cost", COSTS, "{:.15f}"), ("images classified right", COUNTS, "{:,}")):
        rows = []
        for row, other in zip(right["compared"], wrong["compared"], strict=True):
            found = [(row["published"][key], row["here"][key], other["here"][key]) for key in keys]
            rows.append([row["epoch"], *(form.format(value) for values in found for value in values)])
        names = ("published", "here", f"η = {wrong['learning_rate']:g}")
        columns = [f"{key.partition('_')[0]}, {name}" for key in keys for name in names]
        report.table(f"{title}, of the test and of the training set", ("epoch", *columns), rows)
    for replay in (right, wrong):
        equal = f"{replay['rows_equal']} of {replay['rows']} rows equal (counts exactly, costs to {TOLERANCE:g})"
        largest = f"largest cost difference {replay['largest_cost_difference']:.1e}, {replay['seconds']:.0f} s"
        print(f"η = {replay['learning_rate']:g}: {equal}, {largest}")


def draw(results: dict[str, Any]) -> Figure:
    """Costs and accuracies over the epochs with the published points, and how far the costs are from them."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    costs, shares, errors = figure.subplots(1, 3)
    right, run = results["right"], results["config"]["runs"][0]
    epochs = [row["epoch"] + 1 for row in right["epochs"]]
    points = [row["epoch"] + 1 for row in right["compared"]]
    sizes = {"test": 10_000, "training": run["training_images"]}
    for colour, (name, size) in zip(("tab:orange", "tab:blue"), sizes.items(), strict=True):
        for axis, key, scale in ((costs, f"{name}_cost", 1), (shares, f"{name}_correct", 100 / size)):
            axis.plot(epochs, [scale * row[key] for row in right["epochs"]], color=colour, label=f"{name}, here")
            published = [scale * row["published"][key] for row in right["compared"]]
            axis.plot(points, published, "o", mfc="none", color=colour, label=f"{name}, published")
    for name, colour, marker in (("wrong", "tab:red", "x"), ("right", "tab:green", "o")):
        rows, eta = results[name]["compared"], results[name]["learning_rate"]
        worst = [max(abs(row["difference"][key]) for key in COSTS) for row in rows]
        errors.plot(points, [max(error, 1e-17) for error in worst], marker, color=colour, label=f"η = {eta:g}")
    errors.axhline(TOLERANCE, color="0.5", linestyle="--", linewidth=1, label=f"tolerance {TOLERANCE:g}")
    costs.set(ylabel="cost", title="the training cost falls, the test cost turns", yscale="log")
    shares.set(ylabel="classified right (%)", title="the accuracy stays")
    errors.set(ylabel="|cost here − published|", title="a wrong constant shows", yscale="log", ylim=(1e-17, 10))
    for axis in (costs, shares, errors):
        axis.set(xlabel="epochs trained", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center right" if axis is errors else "best")
    shape, images = "-".join(map(str, run["sizes"])), run["training_images"]
    figure.suptitle(
        f"Nielsen's overfitting replayed: {shape} on {images:,} images, η = {run['learning_rate']:g}, float64"
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Replays the run, prints its table, writes nielsen_overfitting.json and nielsen_overfitting.png."""
    parser = report.parser(__doc__, CONFIG, "the run")
    parser.add_argument("--wrong-learning-rate", type=float, default=0.5001, help="η of the second replay")
    with report.study(NAME, parser, arguments) as study:
        results = measure(nielsen.read(study.options.config), study.options.wrong_learning_rate)
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
