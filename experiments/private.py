"""MNIST under differential privacy: PCA-60-1000-10 of Abadi et al. 2016 at ε = 0.5, 2 and 8.

The inputs are the projections on the 60 principal directions of the noisy covariance AᵀA + σ_p (z + zᵀ)/√2. The rows
of A are the images divided by their norms (Abadi et al. 2016, §4). A sample more or less changes AᵀA by a matrix of
norm 1 at most, so this is a Gaussian mechanism of noise σ_p. Then the network is trained until the budget of both
together is spent; ε is of both, by dp-accounting.

Command: python -m experiments.private [--seeds 3] [--out FOLDER]
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np

from experiments import recipe, report
from jaxbp import private
from jaxbp.run import config as configs
from jaxbp.run import data, loop
from jaxbp.run.config import DataConfig
from jaxbp.run.data import Dataset
from jaxbp.run.errors import UserError

CONFIG = Path(__file__).parent / "configs" / "private.toml"
MOST_EPOCHS = 400


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: what it may spend, and how it is trained. pca_noise: σ_p;  noise_multiplier: σ;  max_norm: C."""

    recipe: str
    epsilon: float
    pca_noise: float
    noise_multiplier: float
    batch_size: int
    learning_rate: float
    max_norm: float
    activation: str
    momentum: float


@dataclasses.dataclass(frozen=True)
class Script:
    """The network and its runs."""

    inputs: int
    hidden: int
    delta: float
    runs: tuple[Run, ...]


def principal_directions(x: np.ndarray, count: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """The first `count` principal directions of the rows of norm 1, from the noisy covariance; (D, count)."""
    z = rng.normal(size=(x.shape[1],) * 2)
    covariance = x.T @ x + noise * (z + z.T) / np.sqrt(2)
    return np.asarray(np.linalg.eigh(covariance)[1][:, ::-1][:, :count])


def spent(run: Run, epochs: int, samples: int, delta: float) -> float:
    """ε of the PCA and of so many epochs."""
    steps = epochs * -(-samples // run.batch_size)
    training = private.event(run.noise_multiplier, run.batch_size / samples, steps)
    pca = dp_accounting.GaussianDpEvent(run.pca_noise)
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    return float(accountant.compose(pca).compose(training).get_epsilon(delta))


def most_epochs(run: Run, samples: int, delta: float) -> int:
    """The largest number of epochs within the budget, MOST_EPOCHS at most."""
    low, high = 0, MOST_EPOCHS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(run, middle, samples, delta) <= run.epsilon else (low, middle)
    if low == 0:
        raise UserError(f"ε = {run.epsilon}: not one epoch fits")
    return low


def trained(script: Script, run: Run, seed: int, dataset: Dataset) -> dict[str, Any]:
    """Test accuracy after the last epoch, and ε of all."""
    rng = np.random.default_rng()  # of the noise: no seed
    x, x_test = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (dataset.x_train * 1.0, dataset.x_test * 1.0))
    directions = principal_directions(x, script.inputs, run.pca_noise, rng)
    epochs = most_epochs(run, len(x), script.delta)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pca.npz")
        labels = {"y": dataset.y_train, "y_test": dataset.y_test}
        np.savez(path, x=(x @ directions).astype(np.float32), x_test=(x_test @ directions).astype(np.float32), **labels)
        setup = loop.prepare(configs.validate(_tables(script, run, seed, str(path), epochs), "experiments.private"))
        rows = [epoch.row for epoch in loop.epochs(setup)]
    return {
        "epsilon": spent(run, epochs, len(x), script.delta),
        "epochs": epochs,
        "accuracy": rows[-1].test.accuracy,
        "accuracies": [row.test.accuracy for row in rows],
    }


def _tables(script: Script, run: Run, seed: int, path: str, epochs: int) -> dict[str, Any]:
    momentum = {"momentum": run.momentum} if run.momentum else {}
    return {
        "data": {"name": path, "standardize": {"mean": 0.0, "scale": 0.2}},
        "model": {"sizes": [script.inputs, script.hidden, 10], "hidden": run.activation},
        "optimizer": {"name": "sgd", "learning_rate": run.learning_rate, "arguments": momentum},
        "train": {"epochs": epochs, "batch_size": run.batch_size, "seed": seed, "micro_batches": 4},
        "privacy": {
            "max_norm": run.max_norm,
            "noise_multiplier": run.noise_multiplier,
            "delta": script.delta,
            "accountant": "rdp",  # each epoch; what is reported is that of PLD, with the PCA's
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every run, prints the table, writes private.json."""
    parser = report.parser(__doc__, CONFIG, "the network and its runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--recipe", help="only the runs of this recipe")
    with report.study("private", parser, arguments) as study:
        script = recipe.read(Script, study.options.config)
        dataset, published = data.load(DataConfig("mnist")), report.published("private")
        found: list[dict[str, Any]] = []
        for run in script.runs:
            if study.options.recipe in (None, run.recipe):
                results = [trained(script, run, seed, dataset) for seed in range(study.options.seeds)]
                found.append({"run": dataclasses.asdict(run), "results": results})
                print(run.recipe, run.epsilon, [result["accuracy"] for result in results], flush=True)
        _show(found, published)
        study.save({"runs": found})


def _show(found: list[dict[str, Any]], published: dict[str, Any]) -> None:
    rows = []
    for run, results in ((each["run"], each["results"]) for each in found):
        each = " ".join(f"{100 * result['accuracy']:.2f}" for result in results)
        mean = 100 * float(np.mean([result["accuracy"] for result in results]))
        theirs = published["accuracy"][published["epsilon"].index(run["epsilon"])]
        spent, epochs = results[0]["epsilon"], results[0]["epochs"]
        numbers = [f"{spent:.4f}", run["noise_multiplier"], run["pca_noise"], run["batch_size"], epochs]
        rows.append([run["recipe"], *numbers, f"{mean:.2f} %", each, f"{theirs} %"])
    columns = ("recipe", "ε", "σ", "σ of PCA", "batch", "epochs", "test accuracy", "each seed (%)", "published")
    report.table("MNIST, PCA-60-1000-10, δ = 1e-5 (add-or-remove-one, PLD, Poisson sampling)", columns, rows)


if __name__ == "__main__":
    main()
