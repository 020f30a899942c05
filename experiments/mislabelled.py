"""Which per-sample score finds mislabelled samples? MNIST with 10 % of its training labels flipped at random.

A network is trained on the flipped labels. After each epoch every training sample is scored by its loss (the baseline),
EL2N, GraNd and self-influence; a good score ranks the flipped samples first. Scores are averaged over networks that
differ in initialisation and order of the samples, as Paul et al. do, and compared early in training.

  EL2N, GraNd      M. Paul et al., Deep learning on a data diet, 2021, definitions 2.1 and 2.2
  self-influence   G. Pruthi et al., Estimating training data influence by tracing gradient descent, 2020, §3.2:
                   the sum of η ‖g‖² over checkpoints, here the ends of the epochs so far

Command: python -m experiments.mislabelled [--config configs/mnist_mislabelled.toml] [--flipped 0.1] [--seeds 5]
         [--early 2] [--out FOLDER]
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from experiments import report
from jaxbp import losses, persample
from jaxbp.mlp import Array, Factors
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.config import Config
from jaxbp.run.errors import UserError
from jaxbp.run.loop import Setup

CONFIG = Path(__file__).parent.parent / "configs" / "mnist_mislabelled.toml"
CHUNK = 1000
NAMES = {"loss": "loss", "el2n": "EL2N", "grand": "GraNd", "self_influence": "self-influence"}


def flip_labels(y: np.ndarray, classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels, round(share · N) of them moved to another class drawn uniformly, and (N,) which ones were."""
    rng = np.random.default_rng(seed)
    flipped = np.zeros(len(y), bool)
    flipped[rng.choice(len(y), round(share * len(y)), replace=False)] = True
    moved = (y + rng.integers(1, classes, len(y))) % classes
    return np.where(flipped, moved, y).astype(y.dtype), flipped


def share_found(scores: np.ndarray, flipped: np.ndarray, inspected: float) -> float:
    """The share of the flipped samples that are among the round(inspected · N) with the highest scores."""
    top = np.argsort(-scores, kind="stable")[: round(inspected * len(scores))]
    return float(flipped[top].sum() / flipped.sum())


def seeded(config: Config, seeds: Sequence[int]) -> Iterator[Setup]:
    """The same run with other initial parameters and another order of the samples."""
    for seed in seeds:
        yield loop.prepare(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)))


def scores_over_training(setup: Setup) -> tuple[dict[str, np.ndarray], float]:
    """Every score after 0, 1, …, E epochs, (E + 1, N) each, and the test accuracy reached.

    Raises:
      UserError: not a network whose output δ is softmax − label, for which EL2N is defined.
    """
    problem, program = setup.problem, setup.program
    net, smoothing = problem.net, problem.config.model.label_smoothing
    if losses.get(net.loss).name != "softmax_cross_entropy" or net.activations[-1].name != "identity" or smoothing:
        raise UserError("model.loss: EL2N needs softmax_cross_entropy of the output identity, without label smoothing")
    train = problem.on_device("train")
    found = [persample.map_chunks(_scores, net, problem.initial(), *train, CHUNK)]
    influence = [np.zeros(len(train.x))]
    for epoch in loop.epochs(setup):
        found.append(persample.map_chunks(_scores, net, program.params, *train, CHUNK))
        influence.append(influence[-1] + epoch.row.learning_rate * np.asarray(found[-1]["grand"], np.float64) ** 2)
    stacked = {name: np.stack([np.asarray(scores[name]) for scores in found]) for name in found[0]}
    return stacked | {"self_influence": np.stack(influence)}, float(epoch.row.test.accuracy or 0)


def _scores(loss: Array, f: Factors) -> dict[str, Array]:
    return {"loss": loss, "el2n": persample.el2n(f), "grand": persample.grand(f)}


def quality(scores: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """Of scores (S, N) of S networks: of their average, and of a network alone (mean over the networks)."""
    average, alone = scores.mean(axis=0), [float(roc_auc_score(flipped, row)) for row in scores]
    return {
        "auc": float(roc_auc_score(flipped, average)),
        "found_in_top_10_percent": share_found(average, flipped, 0.1),
        "found_in_top_20_percent": share_found(average, flipped, 0.2),
        "auc_of_one_network": float(np.mean(alone)),
    }


class Trained(NamedTuple):
    """What S networks make of flipped labels.

    scores: (S, E + 1, N) by name;  accuracy: (S,), of the test set;  flipped, input_norms: (N,).
    """

    scores: dict[str, np.ndarray]
    accuracy: list[float]
    flipped: np.ndarray
    input_norms: np.ndarray


def train(config: Config, share: float, seeds: Sequence[int]) -> Trained:
    """The same flipped labels for a network of each seed."""
    networks, accuracies = [], []
    for seed, setup in zip(seeds, seeded(config, seeds), strict=True):
        dataset = setup.problem.dataset
        labels, flipped = flip_labels(dataset.y_train, len(dataset.classes or ()), share, seed=0)
        noisy = dataclasses.replace(setup.problem, dataset=dataset._replace(y_train=labels))
        scores, accuracy = scores_over_training(loop.assemble(noisy))
        print(f"seed {seed}: test accuracy {100 * accuracy:.2f} %", flush=True)
        networks.append(scores)
        accuracies.append(accuracy)
    stacked = {name: np.stack([scores[name] for scores in networks]) for name in NAMES}
    return Trained(stacked, accuracies, flipped, np.linalg.norm(np.asarray(noisy.on_device("train").x), axis=1))


def measure(config: Config, share: float, seeds: int, early: int) -> dict[str, Any]:
    """Trains on flipped labels and judges every score after every epoch.

    Raises:
      UserError: a share or an epoch that does not exist, and as `scores_over_training`, `loop.prepare`.
      Diverged: as `loop.epochs`.
    """
    _check(config, share, seeds, early)
    trained = train(config, share, range(seeds))
    scores, flipped, inspected = trained.scores, trained.flipped, np.linspace(0, min(2 * share, 1), 81)
    averages = {name: scores[name][:, early].mean(axis=0) for name in NAMES}
    initial = scores["grand"][:, 0].mean(axis=0)
    return {
        "config": configs.to_dict(config),
        "samples": len(flipped),
        "flipped": int(flipped.sum()),
        "seeds": list(range(seeds)),
        "early_epoch": early,
        "test_accuracy": trained.accuracy,
        "by_epoch": {name: _by_epoch(name, scores[name], flipped) for name in NAMES},
        "inspected": inspected.tolist(),
        "found_early": {name: [share_found(averages[name], flipped, part) for part in inspected] for name in NAMES},
        "rank_correlation_of_initial_grand_and_input_norm": float(spearmanr(initial, trained.input_norms).statistic),
    }


def _by_epoch(name: str, scores: np.ndarray, flipped: np.ndarray) -> list[dict[str, float]]:
    """Of scores (S, E + 1, N); self-influence has no checkpoint before the first epoch."""
    first = 1 if name == "self_influence" else 0
    return [{"epoch": e, **quality(scores[:, e], flipped)} for e in range(first, scores.shape[1])]


def _check(config: Config, share: float, seeds: int, early: int) -> None:
    if not 0 < share < 1:
        raise UserError(f"--flipped: {share}; it has to lie between 0 and 1")
    if seeds < 1 or not 1 <= early <= config.train.epochs:
        raise UserError(f"--early {early}, --seeds {seeds}: allowed: epochs 1 to {config.train.epochs}, a seed or more")


def show(results: dict[str, Any]) -> None:
    """The table: early and at the end."""
    last = len(results["by_epoch"]["loss"]) - 1
    rows = [
        [name, at["epoch"], f"{at['auc']:.4f}"]
        + [f"{100 * at[f'found_in_top_{part}_percent']:.1f} %" for part in (10, 20)]
        + [f"{at['auc_of_one_network']:.4f}"]
        for epoch in dict.fromkeys((results["early_epoch"], last))
        for key, name in NAMES.items()
        for at in results["by_epoch"][key]
        if at["epoch"] == epoch
    ]
    columns = ("score", "epochs", "AUC", "found in top 10 %", "found in top 20 %", "AUC of one network")
    title = f"{results['flipped']:,} of {results['samples']:,} labels flipped; averages of {len(results['seeds'])}"
    report.table(title, columns, rows)
    correlation = results["rank_correlation_of_initial_grand_and_input_norm"]
    start = results["by_epoch"]["grand"][0]["auc"]
    print(f"at initialisation GraNd has AUC {start:.3f} and rank correlation {correlation:.2f} with ‖x‖")


def draw(results: dict[str, Any]) -> Figure:
    """The flips found early against the samples inspected, and 1 − AUC by epoch, of the average and of one network."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    found, areas = figure.subplots(1, 2)
    inspected, percent = 100 * np.array(results["inspected"]), 100 * results["flipped"] / results["samples"]
    for i, (name, label) in enumerate(NAMES.items()):
        rows = results["by_epoch"][name][-results["config"]["train"]["epochs"] :]  # not at initialisation
        epochs = [row["epoch"] for row in rows]
        found.plot(inspected, 100 * np.array(results["found_early"][name]), color=f"C{i}", label=label)
        areas.plot(epochs, [1 - row["auc"] for row in rows], color=f"C{i}", marker="o", markersize=3, label=label)
        areas.plot(epochs, [1 - row["auc_of_one_network"] for row in rows], color=f"C{i}", linestyle=":")
    found.plot(inspected, np.minimum(100 * inspected / percent, 100), color="0.6", linestyle="--", label="perfect")
    found.set(xlabel="samples inspected, highest score first (%)", ylabel="flipped labels found (%)")
    found.set(xlim=(percent / 2, 3 * percent / 2), ylim=(45, 102))
    found.set_title(f"after epoch {results['early_epoch']}, scores averaged over {len(results['seeds'])} networks")
    areas.set(xlabel="epoch", ylabel="1 − area under the ROC curve", yscale="log")
    areas.set_title("after each epoch (dotted: a network alone)")
    for axis in (found, areas):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    name, sizes = results["config"]["data"]["name"], "-".join(map(str, results["config"]["model"]["sizes"]))
    figure.suptitle(f"finding the {percent:.0f} % of the labels of {name} that were flipped, {sizes}")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table, writes mislabelled.json and mislabelled.png."""
    parser = report.parser(__doc__, CONFIG, "the run; its seed is replaced")
    parser.add_argument("--flipped", type=float, default=0.1, help="share of the training labels")
    parser.add_argument("--seeds", type=int, default=5, help="networks that are averaged over")
    parser.add_argument("--early", type=int, default=2, help="epochs after which the table and the left panel score")
    with report.study("mislabelled", parser, arguments) as study:
        options = study.options
        results = measure(configs.read(options.config), options.flipped, options.seeds, options.early)
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
