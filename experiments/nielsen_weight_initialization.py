"""Do smaller initial weights learn faster? Nielsen's `weight_initialization`, 30 hidden units, replayed in float64.

784-30-10 on 50,000 images of MNIST: 30 epochs from weights of standard deviation 1/√in, 30 from weights of standard
deviation 1. All 60 counts of the validation set have to be the published ones. A second replay, with another learning
rate, shows how many would be with a wrong constant.

Source: M. Nielsen, Neural Networks and Deep Learning, chapter 3; weight_initialization_30.json of its repository.

Command: python -m experiments.nielsen_weight_initialization [--config CONFIG]
         [--wrong-learning-rate 0.1001] [--out FOLDER]
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import nielsen, report
from experiments.nielsen import Script
from jaxbp.run.errors import UserError

CONFIG = Path(__file__).parent / "configs" / "nielsen_weight_initialization.toml"
NAME = "nielsen_weight_initialization"
RUNS = {"default": "standard deviation 1/√in", "large": "standard deviation 1"}
MONITORED = "validation_correct"


def measure(script: Script, wrong_learning_rate: float) -> dict[str, Any]:
    """Replays both runs, and again with the wrong learning rate.

    Raises:
      UserError: other runs than "default" and "large", or one that does not monitor what was published; as
        `nielsen.load`.
    """
    if {run.name for run in script.runs} != set(RUNS) or any(run.monitor != (MONITORED,) for run in script.runs):
        raise UserError(f"runs: this study is of the runs {', '.join(RUNS)}, which monitor {MONITORED}")
    images, published, replays = nielsen.load(), report.published(NAME), {}
    for name, wrong in (("right", None), ("wrong", wrong_learning_rate)):
        started = time.perf_counter()
        replayed = script if wrong is None else nielsen.with_learning_rate(script, wrong)
        found = {run: [row[MONITORED] for row in rows] for run, rows in nielsen.figures(replayed, images).items()}
        seconds = time.perf_counter() - started
        pairs = [pair for run in RUNS for pair in zip(found[run], published[run], strict=False)]
        equal = sum(here == there for here, there in pairs)
        eta = replayed.runs[0].learning_rate
        replays[name] = {"learning_rate": eta, "seconds": seconds, "counts": len(pairs), "equal": equal, "runs": found}
    return {"config": dataclasses.asdict(script), "published": {run: published[run] for run in RUNS}, **replays}


def show(results: dict[str, Any]) -> None:
    """The table: published | here of both runs, and what the wrong learning rate makes of it."""
    right, wrong = results["right"], results["wrong"]
    columns = [results["published"], right["runs"], wrong["runs"]]
    rows = [
        [i, *(f"{count:,}" for counts in epoch for count in counts)]
        for i, epoch in enumerate(zip(*(zip(*(c[run] for c in columns), strict=False) for run in RUNS), strict=False))
    ]
    names = ("published", "here", f"η = {wrong['learning_rate']:g}")
    header = ("epoch", *(f"{run}, {name}" for run in RUNS for name in names))
    report.table("validation images classified right, of 10,000", header, rows)
    for replay in (right, wrong):
        equal = f"{replay['equal']} of {replay['counts']} counts equal"
        print(f"η = {replay['learning_rate']:g}: {equal}, {replay['seconds']:.0f} s")


def draw(results: dict[str, Any]) -> Figure:
    """The accuracies with the published points, and how far the counts are from them."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    shares, errors = figure.subplots(1, 2)
    for colour, (run, label) in zip(("tab:blue", "tab:orange"), RUNS.items(), strict=True):
        here, there = (np.array(counts[run]) / 100 for counts in (results["right"]["runs"], results["published"]))
        shares.plot(range(1, len(here) + 1), here, color=colour, label=f"{label}, here")
        shares.plot(range(1, len(there) + 1), there, "o", mfc="none", markersize=5, color=colour, label="published")
    for name, colour in (("wrong", "tab:red"), ("right", "tab:green")):
        replay = results[name]
        for run, marker in zip(RUNS, "os", strict=True):
            pairs = list(zip(replay["runs"][run], results["published"][run], strict=False))
            label = f"η = {replay['learning_rate']:g}, {run}"
            differences = [here - there for here, there in pairs]
            errors.plot(range(1, len(pairs) + 1), differences, marker, markersize=4, color=colour, label=label)
    replays = (results["right"], results["wrong"])
    shares.set(ylabel="validation images classified right (%)", title="smaller initial weights start ahead")
    title = "; ".join(f"η = {r['learning_rate']:g}: {r['equal']} of {r['counts']} equal" for r in replays)
    errors.set(ylabel="images, here − published", title=title)
    for axis in (shares, errors):
        axis.set(xlabel="epochs trained")
        axis.grid(alpha=0.3)
    shares.legend(fontsize="small")
    errors.legend(fontsize="small", ncols=2, loc="lower center")
    errors.yaxis.set_major_locator(MaxNLocator(integer=True))
    errors.margins(y=0.35)
    figure.suptitle("Nielsen's weight_initialization replayed: 784-30-10, 50,000 images, float64")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Replays both runs, prints the table, writes nielsen_weight_initialization.json and .png."""
    parser = report.parser(__doc__, CONFIG, "both runs")
    parser.add_argument("--wrong-learning-rate", type=float, default=0.1001, help="η of the second replay")
    with report.study(NAME, parser, arguments) as study:
        results = measure(nielsen.read(study.options.config), study.options.wrong_learning_rate)
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
