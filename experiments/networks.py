"""What do other networks than the perceptron reach? Published figures, by runs of the configs in configs/.

Each run is `jaxbp run CONFIG` with a few options. It is trained in this process, and its last epoch is compared. The
loss of the text is the mean over all characters of the held-out tenth; nanoGPT averages 20 random batches of it.

Sources: A. Karpathy, nanoGPT, README, "I only have a macbook"; zalandoresearch/fashion-mnist, its table of results;
S. Greydanus and D. Kobak, *Scaling down deep learning with MNIST-1D*, 2024.

Command: python -m experiments.networks [--only NAME] [--text PATH] [--out FOLDER]
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments import report
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.report.progress import line

CONFIGS = Path(__file__).parents[1] / "configs"


class Run(NamedTuple):
    """A config, options that change it, the score that is compared, and in which units it is shown."""

    config: str
    options: tuple[str, ...]
    score: str


RUNS = {
    "LeNet-5, MNIST": Run("lenet5.toml", (), "test_accuracy"),
    "LeNet-5, Fashion-MNIST": Run(
        "lenet5.toml", ("--data.name", "fashion_mnist", "--train.epochs", "20"), "test_accuracy"
    ),
    "convolutions, MNIST-1D": Run("mnist1d.toml", (), "test_accuracy"),
    "GPT, tiny Shakespeare": Run("shakespeare.toml", (), "test_loss"),
}


def measure(run: Run, options: Sequence[str], console: Console) -> dict[str, Any]:
    """Trains; the score of every epoch, the steps and the seconds."""
    config = configs.read(CONFIGS / run.config, [*run.options, *options])
    setup, started, scores = loop.prepare(config), time.perf_counter(), []
    console.out(loop.describe(setup), highlight=False)
    for epoch in loop.epochs(setup):
        console.out(line(epoch.row.scores(), epoch.timing, config.train.epochs), highlight=False)
        scores.append(epoch.row.scores()[run.score])
    seconds = time.perf_counter() - started
    return {"score": run.score, "scores": scores, "steps": epoch.row.step, "training_seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints the table, writes networks.json."""
    parser = report.parser(__doc__)
    parser.add_argument("--only", choices=RUNS, help="one of the runs")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare, if it is not imported")
    parser.add_argument("--mnist1d", type=Path, default=Path("mnist1d.npz"), help="see configs/mnist1d.toml")
    with report.study("networks", parser, arguments) as study:
        published, console, results = report.published("networks"), Console(), {}
        for name in [study.options.only] if study.options.only else RUNS:
            given = {"shakespeare.toml": study.options.text, "mnist1d.toml": study.options.mnist1d}
            path = given.get(RUNS[name].config)
            results[name] = measure(RUNS[name], ["--data.name", str(path)] if path else [], console)
        rows = [
            (name, found["score"], f"{found['scores'][-1]:.4g}", published[name], found["steps"],
             f"{found['training_seconds']:.0f}")
            for name, found in results.items()
        ]  # fmt: skip
        report.table("networks", ("run", "score", "here", "published", "steps", "seconds"), rows)
        study.save({"runs": results})


if __name__ == "__main__":
    main()
