"""Seconds of an epoch on MNIST, 784-256-256-10, plain SGD, at three batch sizes, beside other loops.

jaxbp runs what `jaxbp run` does in an epoch: the compiled scan with its metrics of δ and gradient. The others are
plain loops over shuffled batches: Equinox with optax, scikit-learn's MLPClassifier, PyTorch and torch.compile
(`--peers`). Each runs in a process of its own, in turn, because the idle threads of the one slow the other. A process
trains one epoch to warm up (compilation is in it), then measures; all of them print the test accuracy they reached.

Command: python -m experiments.bench --only epoch --peers
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import timing
from experiments.bench.rows import Row, Settings, Target
from experiments.peers import epochs as protocol
from jaxbp.run import config, data, loop
from jaxbp.run.config import DataConfig

DATA, SIZES, LEARNING_RATE = "mnist", (784, 256, 256, 10), 0.1
PACKAGES = {"Equinox": "equinox", "scikit-learn": "sklearn"}  # loops that run in jaxbp's own environment
BATCHES = (32, 128, 512)
ALTERNATIONS, EPOCHS = 2, 6  # processes of each loop, and epochs that a process measures
FASTER = {("PyTorch", 128): Target("≥", 1.5)}
ROOT = Path(__file__).parents[2]
PEERS = ROOT / "experiments" / "peers"


def rows(settings: Settings) -> list[Row]:
    """How many times faster jaxbp is, for every batch size and loop."""
    loops = commands(settings)
    return [row for batch in BATCHES for row in _batch(batch, loops, settings)]


def commands(settings: Settings) -> dict[str, list[str]]:
    """Loop ↦ its command; those that are not installed here are left out, and said."""
    found = {"jaxbp": [sys.executable, "-m", "experiments.bench.epoch", "as-peer"]}
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(package):
            found[name] = [sys.executable, str(PEERS / f"{package}_epoch.py")]
        else:
            settings.note(f"epoch: {name} is left out: it is not installed")
    if "torch" in settings.peers:
        script = [settings.peers["torch"], str(PEERS / "torch_epoch.py")]
        found |= {"PyTorch": script, "torch.compile": [*script, "--compile"]}
    return found


def _batch(batch: int, loops: dict[str, list[str]], settings: Settings) -> list[Row]:
    alternations, epochs = (1, 2) if settings.quick else (ALTERNATIONS, EPOCHS)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    accuracy: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.npz"
        protocol.write(case, _case(batch, epochs))
        for name in [*loops] * alternations:
            told = _told(name, [*loops[name], str(case)], settings) if name in seconds else None
            if told is None:
                seconds.pop(name, None)
                continue
            seconds[name] += told["seconds"]
            accuracy[name] = told["test_accuracy"]
    reached = ", ".join(f"{name} {accuracy[name]:.2%}" for name in seconds)
    settings.note(f"epoch: batch {batch}, test accuracy after {epochs + 1} epochs: {reached}")
    ours = seconds.pop("jaxbp")
    made = []
    for name, theirs in seconds.items():
        faster, own = timing.ratio(theirs, ours), timing.ratio(ours, theirs).seconds
        target, label = FASTER.get((name, batch)), f"{'-'.join(map(str, SIZES))} / {batch}"
        made.append(Row(f"epoch: × faster than {name}", label, faster.value, own, "s", target, faster.spread))
    return made


def _case(batch: int, epochs: int) -> protocol.Case:
    """The same scaled arrays for all, so that a peer need not know our data."""
    dataset = data.load(DataConfig(DATA))
    scaling = data.Scaling.fit(dataset.x_train, "global")
    x_train, x_test = (scaling.apply(x, np.float32) for x in (dataset.x_train, dataset.x_test))
    labels = (dataset.y_train, dataset.y_test)
    return protocol.Case(DATA, x_train, x_test, *labels, SIZES, LEARNING_RATE, batch, epochs)


def _told(name: str, command: list[str], settings: Settings) -> dict[str, Any] | None:
    """What the process of a loop prints as JSON; None, said in a line, for a peer that does not work here."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and name != "jaxbp":
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        settings.note(f"epoch: {name} is left out: {reason}")
        return None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _as_peer(path: str) -> None:
    """jaxbp's own process."""
    case = protocol.read(path)
    tables = {
        "data": {"name": case.data, "standardize": "global"},
        "model": {"sizes": list(case.sizes)},
        "optimizer": {"name": "sgd", "learning_rate": case.learning_rate},
        "train": {"epochs": case.epochs + 1, "batch_size": case.batch_size},
    }
    found = list(loop.epochs(loop.prepare(config.validate(tables, source="experiments.bench.epoch"))))
    protocol.tell([epoch.timing.seconds for epoch in found[1:]], found[-1].row.test.accuracy)


if __name__ == "__main__":
    _as_peer(sys.argv[2])
