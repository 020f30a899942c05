"""Seconds of a training epoch on MNIST, 784-256-256-10, batch 128, plain SGD: jaxbp against a plain PyTorch loop.

Each runs in a process of its own, in turn, because the idle threads of the one slow the other. A process trains one
epoch to warm up (compilation is in it) and then measures; both print their seconds and the test accuracy reached.

Command: python -m experiments.bench_epoch --torch-python PYTHON [--rounds 4] [--epochs 3], where PYTHON is that of a
virtual environment with experiments/peers/torch.txt installed. MNIST must have been imported or downloaded.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxbp.run import config, data, loop

LEARNING_RATE = 0.1


def jaxbp_epochs(epochs: int) -> dict[str, Any]:
    """What `jaxbp run` does in an epoch: the compiled scan with all its metrics of δ and gradient."""
    tables = {
        "data": {"name": "mnist", "standardize": "global"},
        "model": {"sizes": [784, 256, 256, 10]},
        "optimizer": {"name": "sgd", "learning_rate": LEARNING_RATE},
        "train": {"epochs": epochs + 1, "batch_size": 128},
    }
    rows = [epoch.row for epoch in loop.epochs(loop.prepare(config.validate(tables, source="bench_epoch")))]
    return {"seconds": [row["seconds"] for row in rows[1:]], "test_accuracy": rows[-1]["test_accuracy"]}


def write_arrays(path: Path) -> None:
    """The same scaled arrays for the peer, so that it need not know our data."""
    dataset = data.load(data.DataConfig("mnist"))
    scaling = data.Scaling.fit(dataset.x_train, "global")
    arrays = {split: scaling.apply(getattr(dataset, split), np.float32) for split in ("x_train", "x_test")}
    np.savez(path, y_train=dataset.y_train, y_test=dataset.y_test, **arrays)


def run(command: list[str]) -> dict[str, Any]:
    """A process that prints JSON."""
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def main() -> None:
    """Alternates the two and prints both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="the Python of the environment with PyTorch")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="measured epochs of a process")
    parser.add_argument("--only-jaxbp", action="store_true", help="measure jaxbp here and print JSON")
    options = parser.parse_args()
    if options.only_jaxbp:
        print(json.dumps(jaxbp_epochs(options.epochs)))
        return
    if not options.torch_python:
        parser.error("--torch-python is needed")
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "mnist.npz"
        write_arrays(arrays)
        ours = [sys.executable, "-m", "experiments.bench_epoch", "--only-jaxbp", "--epochs", str(options.epochs)]
        peer = Path(__file__).parent / "peers" / "torch_epoch.py"
        theirs = [options.torch_python, str(peer), str(arrays), str(options.epochs), str(LEARNING_RATE)]
        found: dict[str, list[float]] = {"jaxbp": [], "torch": []}
        for _ in range(options.rounds):
            for name, command in (("jaxbp", ours), ("torch", theirs)):
                time.sleep(1)
                result = run(command)
                found[name] += result["seconds"]
                print(f"{name}: {result['seconds']}, test accuracy {result['test_accuracy']:.4f}", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(
        f"medians of {len(found['jaxbp'])} epochs: {medians}; torch / jaxbp {medians['torch'] / medians['jaxbp']:.2f}"
    )


if __name__ == "__main__":
    main()
