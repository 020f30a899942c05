"""MNIST under differential privacy at ε = 0.5, 2 and 8: PCA-60-1000-10 of Abadi et al. 2016, as then and as today.

Fashion-MNIST at ε = 3 too, by --config experiments/configs/private_fashion.toml.

"2016" has the published lots, learning rate, C and noise, and as many epochs as ε allows. "today" has tanh, larger
batches, momentum and a learning rate that falls; its noise is what ε allows. ε is of the principal directions and
of all steps together, by privacy loss distributions. Batches and noise come from the operating system, so that no
number comes back to its last digit; a seed decides the initial weights alone.

Command: python -m experiments.private [--seeds 3] [--recipe NAME] [--epsilon 2.0] [--config FILE]
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import recipe, report
from jaxbp.private import Accounting
from jaxbp.run import config as configs
from jaxbp.run import data, loop
from jaxbp.run import problem as problems
from jaxbp.run.config import Config, DataConfig
from jaxbp.run.data import Dataset

CONFIG = Path(__file__).parent / "configs" / "private.toml"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run; a published one has the noise_multiplier σ of its steps, another one spends ε.

    pca_noise: σ of the PCA;  max_norm: C;  decay: whether the learning rate falls to 0, as a half cosine.
    """

    recipe: str
    epsilon: float
    pca_noise: float
    epochs: int
    batch_size: int
    learning_rate: float
    max_norm: float
    activation: str
    momentum: float = 0.0
    decay: bool = False
    noise_multiplier: float | None = None


@dataclasses.dataclass(frozen=True)
class Script:
    """The data, the network and its runs."""

    data: str
    inputs: int
    hidden: int
    delta: float
    runs: tuple[Run, ...]


def config_of(script: Script, run: Run, samples: int, seed: int) -> Config:
    """The run as `jaxbp run` takes it; ε of each epoch is by Rényi divergences, which takes no time."""
    steps = run.epochs * -(-samples // run.batch_size)
    accounting = Accounting(run.batch_size / samples, steps, script.delta, pca_noise=run.pca_noise)
    rate: dict[str, Any] = {"learning_rate": run.learning_rate}
    if run.decay:
        arguments = {"init_value": run.learning_rate, "decay_steps": "all"}
        rate = {"schedule": "cosine_decay_schedule", "schedule_arguments": arguments}
    tables = {
        "data": {"name": script.data, "pca": script.inputs, "standardize": {"mean": 0.0, "scale": 0.2}},
        "model": {"sizes": [script.inputs, script.hidden, 10], "hidden": run.activation},
        "optimizer": rate | ({"arguments": {"momentum": run.momentum}} if run.momentum else {}),
        "train": {"epochs": run.epochs, "batch_size": run.batch_size, "seed": seed, "micro_batches": 8},
        "privacy": {
            "max_norm": run.max_norm,
            "noise_multiplier": run.noise_multiplier or accounting.noise_multiplier(run.epsilon),
            "pca_noise": run.pca_noise,
            "delta": script.delta,
            "accountant": "rdp",
        },
    }
    return configs.validate(tables, "experiments.private")


def trained(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What was spent, and the test accuracy after each epoch."""
    setup = loop.assemble(problems.pose(config, dataset=dataset))
    assert setup.spec.privacy
    accounting, noise = setup.spec.privacy.accounting, setup.spec.privacy.noise_multiplier
    return {
        "epsilon": dataclasses.replace(accounting, accountant="pld").epsilon(noise),
        "noise_multiplier": noise,
        "steps": accounting.steps,
        "accuracies": [epoch.row.test.accuracy for epoch in loop.epochs(setup)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every run, prints the table, writes NAME.json for the config NAME.toml."""
    parser = report.parser(__doc__, CONFIG, "the network and its runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--recipe", help="only the runs of this recipe")
    parser.add_argument("--epsilon", type=float, help="only the runs of this ε")
    with report.study("private", parser, arguments) as study:
        options, script = study.options, recipe.read(Script, study.options.config)
        dataset, found = data.load(DataConfig(script.data)), list[dict[str, Any]]()
        for run in script.runs:
            if options.recipe not in (None, run.recipe) or options.epsilon not in (None, run.epsilon):
                continue
            configured = [config_of(script, run, len(dataset.x_train), seed) for seed in range(options.seeds)]
            found.append({"run": dataclasses.asdict(run), "results": [trained(c, dataset) for c in configured]})
            print(run.recipe, run.epsilon, *(result["accuracies"][-1] for result in found[-1]["results"]), flush=True)
        published = report.published("private").get(script.data, {"epsilon": [], "accuracy": []})
        _show(script, found, dict(zip(published["epsilon"], published["accuracy"], strict=True)))
        results = {"script": dataclasses.asdict(script) | {"runs": None}, "runs": found}
        study._replace(name=options.config.stem).save(results)


def _show(script: Script, found: list[dict[str, Any]], published: dict[float, float]) -> None:
    rows = []
    for run, results in ((each["run"], each["results"]) for each in found):
        last = [100 * result["accuracies"][-1] for result in results]
        theirs = f"{published[run['epsilon']]} %" if run["epsilon"] in published else ""
        spent = max(result["epsilon"] for result in results)
        numbers = [f"{spent:.4f}", f"{results[0]['noise_multiplier']:.3g}", run["pca_noise"], results[0]["steps"]]
        scores = [f"{np.mean(last):.2f} %", " ".join(f"{score:.2f}" for score in last)]
        rows.append([run["recipe"], *numbers, *scores, theirs])
    columns = ("recipe", "ε", "σ", "σ of PCA", "steps", "test accuracy", "each seed (%)", "published")
    title = f"{script.data}, {script.inputs}-{script.hidden}-10, δ = {script.delta:g} (add-or-remove-one, PLD, Poisson)"
    report.table(title, columns, rows)


if __name__ == "__main__":
    main()
