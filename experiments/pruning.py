"""Can the easiest 30 % of MNIST be left out? Pruned by EL2N, against 30 % pruned at random and against all samples.

EL2N is measured after the first epoch and averaged over networks that take no further part; the samples with the lowest
score are pruned. Each training set is trained on for the same number of steps with the same schedule, by networks of
several seeds; each of them draws its own random 30 %. Inputs are scaled by all samples in every case.

Source: M. Paul et al., Deep learning on a data diet, 2021, §3: on CIFAR-10 half of the samples can go that way.

Command: python -m experiments.pruning [--config configs/mnist_pruning.toml] [--pruned 0.3] [--seeds 3]
         [--scoring-seeds 5] [--out FOLDER]
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import report
from experiments.mislabelled import scores_over_training, seeded
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.config import Config
from jaxbp.run.data import Dataset
from jaxbp.run.errors import UserError
from jaxbp.run.loop import Setup

CONFIG = Path(__file__).parent.parent / "configs" / "mnist_pruning.toml"
NAMES = {"all": "all samples", "el2n": "easiest pruned (EL2N)", "random": "pruned at random"}


def early_el2n(config: Config, seeds: Sequence[int]) -> np.ndarray:
    """EL2N after one epoch of the config's run, averaged over networks of these seeds, (N,)."""
    one = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1))
    scores: np.ndarray = np.mean([scores_over_training(setup)[0]["el2n"][-1] for setup in seeded(one, seeds)], axis=0)
    return scores


def subsets(scores: np.ndarray, pruned: float, seed: int) -> dict[str, np.ndarray]:
    """Which rows are kept: all of them, or all but round(pruned · N) of the lowest score or drawn at random."""
    samples = len(scores)
    count = round(pruned * samples)
    drawn = np.random.default_rng(seed).permutation(samples)
    orders = {"el2n": np.argsort(scores, kind="stable"), "random": drawn}
    return {"all": np.arange(samples), **{name: np.sort(order[count:]) for name, order in orders.items()}}


def trained_on(setup: Setup, kept: np.ndarray) -> list[dict[str, Any]]:
    """Metrics of each epoch of a run on some of the samples: as many steps as on all, to the nearest epoch."""
    problem, train, dataset = setup.problem, setup.problem.config.train, setup.problem.dataset
    steps, all_steps = (-(-samples // train.batch_size) for samples in (len(kept), len(dataset.x_train)))
    epochs = max(1, round(train.epochs * all_steps / steps))
    fewer = dataclasses.replace(
        problem,
        config=dataclasses.replace(problem.config, train=dataclasses.replace(train, epochs=epochs)),
        dataset=dataset._replace(x_train=dataset.x_train[kept], y_train=dataset.y_train[kept]),
    )
    wanted = ("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    lines = (epoch.row.line() for epoch in loop.epochs(loop.assemble(fewer)))
    return [{name: line[name] for name in wanted} for line in lines]


def measure(config: Config, pruned: float, seeds: int, scoring_seeds: int) -> dict[str, Any]:
    """Scores, prunes and trains.

    Raises:
      UserError: a share that leaves nothing or prunes nothing, no seeds; as `scores_over_training`, `loop.prepare`.
      Diverged: as `loop.epochs`.
    """
    if not 0 < pruned < 1 or min(seeds, scoring_seeds) < 1:
        raise UserError(f"--pruned: {pruned}; it has to lie between 0 and 1, with a seed or more for each purpose")
    scorers = range(seeds, seeds + scoring_seeds)
    scores = early_el2n(config, scorers)
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in NAMES}
    for seed, setup in zip(range(seeds), seeded(config, range(seeds)), strict=True):
        kept = subsets(scores, pruned, seed)
        for name, rows in kept.items():
            runs[name].append(trained_on(setup, rows))
            last = runs[name][-1][-1]
            print(f"seed {seed}, {NAMES[name]}: test accuracy {100 * last['test_accuracy']:.2f} %", flush=True)
    return {
        "config": configs.to_dict(config),
        "pruned": pruned,
        "seeds": list(range(seeds)),
        "scoring_seeds": list(scorers),
        "runs": runs,
        "summary": {name: _summary(runs[name], len(kept[name])) for name in NAMES},
        "pruned_by_class": _pruned_by_class(setup.problem.dataset, kept["el2n"]),
        "el2n_quantiles": {str(q): float(np.quantile(scores, q)) for q in (0, 0.1, pruned, 0.5, 0.9, 1)},
    }


def _pruned_by_class(dataset: Dataset, kept: np.ndarray) -> dict[str, float]:
    """The share of each class that is left out."""
    classes, labels = dataset.classes or (), dataset.y_train
    count, left = (np.bincount(y, minlength=len(classes)) for y in (labels, labels[kept]))
    return dict(zip(classes, (1 - left / count).tolist(), strict=True))


def _summary(runs: list[list[dict[str, Any]]], samples: int) -> dict[str, Any]:
    """At the last step; the standard deviation is that of a sample of runs (ddof 1), None for a single run."""
    last = {key: np.array([rows[-1][key] for rows in runs]) for key in ("test_accuracy", "test_loss", "train_accuracy")}
    means = {f"mean_{key}": float(values.mean()) for key, values in last.items()}
    spread = float(last["test_accuracy"].std(ddof=1)) if len(runs) > 1 else None
    return {"samples": samples, "steps": runs[0][-1]["step"], **means, "sd_test_accuracy": spread}


def show(results: dict[str, Any]) -> None:
    """The table: a line a training set."""
    rows = []
    for name, label in NAMES.items():
        found = results["summary"][name]
        each = " ".join(f"{100 * run[-1]['test_accuracy']:.2f}" for run in results["runs"][name])
        spread = found["sd_test_accuracy"]
        cells = [f"{found['samples']:,}", f"{found['steps']:,}", f"{100 * found['mean_test_accuracy']:.2f} %"]
        cells += ["–" if spread is None else f"{100 * spread:.2f} %", each]
        rows.append([label, *cells, f"{found['mean_test_loss']:.4f}", f"{100 * found['mean_train_accuracy']:.2f} %"])
    columns = ("training set", "samples", "steps", "test accuracy", "s.d.", "each seed (%)", "test loss", "on its own")
    report.table(f"{100 * results['pruned']:.0f} % pruned", columns, rows)


def draw(results: dict[str, Any]) -> Figure:
    """Test accuracy over the steps, every seed, and the share of each class that EL2N prunes."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    curves, classes = figure.subplots(1, 2)
    for (name, label), colour in zip(NAMES.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        runs = results["runs"][name]
        steps = [row["step"] for row in runs[0]]
        values = 100 * np.array([[row["test_accuracy"] for row in run] for run in runs])
        curves.plot(steps, values.T, color=colour, linewidth=0.7, alpha=0.5)
        curves.plot(steps, values.mean(axis=0), color=colour, marker="o", markersize=3, label=label)
    curves.set(xlabel="step", ylabel="test accuracy (%)")
    curves.set_title(f"same number of steps; mean (thick) and each of {len(results['seeds'])} seeds")
    curves.legend(loc="lower right")
    curves.grid(alpha=0.3)
    names, shares = zip(*results["pruned_by_class"].items(), strict=True)
    classes.bar(names, 100 * np.array(shares), color="tab:blue")
    classes.axhline(100 * results["pruned"], color="tab:orange", label="at random")
    classes.set(xlabel="class", ylabel="pruned by EL2N (% of the class)", title="the easiest samples by class")
    classes.legend()
    config = results["config"]
    name, sizes = config["data"]["name"], "-".join(map(str, config["model"]["sizes"]))
    figure.suptitle(f"{100 * results['pruned']:.0f} % of the training samples of {name} left out, {sizes}")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table, writes pruning.json and pruning.png."""
    parser = report.parser(__doc__, CONFIG, "the run on all samples; its seed is replaced")
    parser.add_argument("--pruned", type=float, default=0.3, help="share of the training samples left out")
    parser.add_argument("--seeds", type=int, default=3, help="networks trained on each training set")
    parser.add_argument("--scoring-seeds", type=int, default=5, help="networks that EL2N is averaged over")
    with report.study("pruning", parser, arguments) as study:
        options = study.options
        results = measure(configs.read(options.config), options.pruned, options.seeds, options.scoring_seeds)
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
