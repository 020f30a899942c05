"""What does a checkpoint after every epoch cost? Epochs of MNIST with a checkpoint begun before them, and without.

A checkpoint is begun after every second epoch and written while the next one is computed: so the epochs of one run take
turns, and their medians compare `[checkpoint] every = 1` with none. What the save takes from the loop itself, the copy
of the state, is counted with the epoch after it.

Command: python -m experiments.checkpoint_cost [--epochs 40] [--out FOLDER]
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import report
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.config import CheckpointConfig, Config
from jaxbp.run.store.checkpoint import Checkpoints, Position

CONFIG = Path(__file__).parent.parent / "configs" / "mnist.toml"
WARM = 4  # epochs, for the compilation
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.05},
    "sgd, momentum": {"learning_rate": 0.05, "arguments": {"momentum": 0.9}},
    "adam": {"name": "adam", "learning_rate": 1e-3},
}


def cost(config: Config) -> dict[str, Any]:
    """Seconds of the epochs of a run, with a checkpoint begun before them and without."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as run, Checkpoints(Path(run), CheckpointConfig(every=2)) as checkpoints:
        before = time.perf_counter()
        setup = loop.prepare(config)
        for epoch in loop.epochs(setup):
            row = epoch.row
            if row.epoch > WARM:
                seconds["with" if row.epoch % 2 else "without"].append(time.perf_counter() - before)
            before = time.perf_counter()
            if checkpoints.due(row.epoch):
                state = setup.program.state()
                checkpoints.save(Position(row.epoch, row.step, 0, np.zeros(2, np.uint32)), state)
    without, with_one = (statistics.median(part) for part in seconds.values())
    count = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return {"without": without, "with": with_one, "ratio": with_one / without, "bytes": count, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes checkpoint_cost.json."""
    parser = report.parser(__doc__, CONFIG, "the run; its optimiser is replaced")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each optimiser that are measured")
    with report.study("checkpoint_cost", parser, arguments) as study:
        epochs = WARM + study.options.epochs
        values = configs.to_dict(configs.read(study.options.config, ["--train.epochs", str(epochs)]))
        results = {
            name: cost(configs.validate(values | {"optimizer": optimizer}, str(study.options.config)))
            for name, optimizer in OPTIMIZERS.items()
        }
        rows = [
            [name, f"{f['bytes'] / 1e6:.1f} MB", f"{f['without']:.3f} s", f"{f['with']:.3f} s", f"{f['ratio']:.3f}"]
            for name, f in results.items()
        ]
        report.table("a checkpoint every epoch", ("optimiser", "state", "epoch without", "with", "ratio"), rows)
        study.save(results)


if __name__ == "__main__":
    main()
