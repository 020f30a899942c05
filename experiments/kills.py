"""Do runs survive? SIGKILL at random moments, flipped bits and cut files in checkpoints, and what a checkpoint costs.

Kills: a run with checkpoints after every epoch is started again and again and killed, each time at a random moment
after it has taken its folder and, every third time, from then on as soon as a checkpoint is half written. At last it is
left to end, and its params.safetensors and metrics.jsonl are compared, byte by byte, with those of a run that was not
killed. Damage: of two checkpoints the newest gets one bit flipped or one file cut, anywhere; it has to be named and the
other one taken. Cost: seconds of an epoch of MNIST with Adam; a checkpoint is begun after every second one.

Command: python -m experiments.kills [--chains 3] [--kills 6] [--flips 100] [--cuts 50] [--epochs 40] [--out FOLDER]
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import report
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.checkpoint import Checkpoints, Position
from jaxbp.run.config import CheckpointConfig
from jaxbp.run.folder import UNFINISHED

DIGITS = """
[data]
standardize = "global"
[model]
sizes = [64, 128, 64, 10]
[train]
epochs = 150
batch_size = 32
plots = false
[checkpoint]
every = 1
[optimizer]
"""
CONFIGS = {
    "sgd": f"{DIGITS}learning_rate = 0.1",
    "adam, cosine": f"""{DIGITS}name = "adam"
schedule = "cosine_decay_schedule"
schedule_arguments = {{ init_value = 1e-3, decay_steps = 6750 }}""",
    "sgd, recording": f"""{DIGITS}learning_rate = 0.1
[study]
quantities = ["squared_norms", "noise_scale"]
every = 7""",
}
SAME = ("params.safetensors", "metrics.jsonl")
MOMENT = 6.0  # seconds; the moment of a kill is uniform up to here, which is compilation and some epochs


def started(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """`jaxbp run`, without its output."""
    command = [sys.executable, "-m", "jaxbp", "run", str(config), "--train.folder", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Waits for the condition, for the end of the process, or so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.001)


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written: Orbax's folder without its name yet, or a folder without a manifest."""
    names = set(os.listdir(folder / "checkpoints")) if (folder / "checkpoints").exists() else set()
    return any(not name.endswith(".sha256") and f"{name}.sha256" not in names for name in names)


def holds(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has taken the folder."""
    lock = folder / UNFINISHED
    return lock.exists() and lock.read_text() == str(process.pid)


def kill(config: Path, folder: Path, rng: np.random.Generator, in_save: bool) -> dict[str, Any] | None:
    """Starts the run, kills it and says where; None when it came to its end before."""
    process = started(config, folder)
    until(lambda: holds(folder, process), process)
    moment = rng.uniform(0, MOMENT)
    until(lambda: False, process, moment)
    if in_save:
        until(lambda: saving(folder), process)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().count('"train_loss"') if metrics.exists() else 0
    return {"seconds": moment, "epochs": lines, "in_save": saving(folder)}


def survive(name: str, chains: int, kills: int, work: Path) -> dict[str, Any]:
    """Chains of kills of one config, each against the one run that is not killed."""
    config, whole = work / f"{name}.toml", work / f"{name} whole"
    config.write_text(CONFIGS[name])
    started(config, whole).wait()
    found: dict[str, Any] = {"kills": [], "chains": chains, "same": 0}
    for chain in range(chains):
        rng, folder = np.random.default_rng([chain, *name.encode()]), work / f"{name} {chain}"
        for number in range(kills):
            found["kills"].append(kill(config, folder, rng, in_save=number % 3 == 2))
        if (folder / UNFINISHED).exists():
            started(config, folder).wait()
        same = all((folder / file).read_bytes() == (whole / file).read_bytes() for file in SAME)
        found["same"] += same
        print(f"{name}, chain {chain + 1}: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
    found["kills"] = [where for where in found["kills"] if where is not None]
    return found


def damaged(folder: Path, rng: np.random.Generator, cut: bool) -> bool:
    """Flips a bit of a file of the newest checkpoint, or cuts it; whether it is named and the older one is taken."""
    older, newest = sorted(int(path.stem) for path in folder.glob("checkpoints/*.sha256"))
    below = sorted((folder / "checkpoints" / str(newest)).rglob("*"))
    files = [path for path in below if path.is_file()] + [folder / "checkpoints" / f"{newest}.sha256"]
    file = files[rng.integers(len(files))]
    data = bytearray(file.read_bytes())
    place = int(rng.integers(len(data)))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    said: list[str] = []
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        saved = checkpoints.newest(state_of(folder), said.append)
    named = len(said) == 1 and f"step {newest} " in said[0] and (file.name in said[0] or file.suffix == ".sha256")
    return named and saved is not None and saved.position.step == older


def state_of(folder: Path) -> Any:
    """A state of the shape that the run in this folder has."""
    return loop.first(loop.prepare(configs.read(folder / "config.toml"))).state


def damage(run: Path, count: int, cut: bool, work: Path) -> int:
    """How many of so many damages are found."""
    found = 0
    for number in range(count):
        shutil.copytree(run, work / "damaged")
        found += damaged(work / "damaged", np.random.default_rng([cut, number]), cut)
        shutil.rmtree(work / "damaged")
    return found


def cost(epochs: int, work: Path) -> dict[str, float]:
    """Median seconds of an epoch of MNIST with a checkpoint begun before it, and of the others; in turns."""
    config = configs.read(Path(__file__).parent.parent / "configs" / "mnist.toml", ["--train.epochs", str(epochs + 2)])
    config = configs.validate(configs.to_dict(config) | {"optimizer": {"name": "adam", "learning_rate": 1e-3}}, "cost")
    seconds: tuple[list[float], list[float]] = ([], [])
    with Checkpoints(work / "mnist", CheckpointConfig(every=2)) as checkpoints:
        before = time.perf_counter()
        for _, row, state in loop.epochs(loop.prepare(config)):
            now = time.perf_counter()
            if row["epoch"] > 2:  # compilation, and the import of Orbax, which is paid once
                seconds[row["epoch"] % 2].append(now - before)
            before = time.perf_counter()
            if checkpoints.due(row["epoch"]):
                checkpoints.save(Position(row["epoch"], row["step"], 0, np.zeros(2, np.uint32)), state)
    without, with_one = (statistics.median(part) for part in seconds)
    bytes_saved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return {"without": without, "with": with_one, "ratio": with_one / without, "bytes": bytes_saved}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all three parts, prints their tables, writes kills.json."""
    parser = report.parser(__doc__)
    for name, default, text in (
        ("chains", 3, "runs of each config that are killed and end"),
        ("kills", 6, "kills of each"),
        ("flips", 100, "flipped bits"),
        ("cuts", 50, "cut files"),
        ("epochs", 40, "epochs of MNIST"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        killed = {name: survive(name, options.chains, options.kills, work) for name in CONFIGS}
        flips, cuts = (
            {"tried": count, "found": damage(work / "adam, cosine whole", count, cut, work)}
            for count, cut in ((options.flips, False), (options.cuts, True))
        )
        results = {"kills": killed, "flips": flips, "cuts": cuts, "cost": cost(options.epochs, work)}
    show(results)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kills.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(results: dict[str, Any]) -> None:
    """The tables."""
    report.table(
        "runs that are killed",
        ("config", "kills", "in a save", "before an epoch", "runs", "the same bytes"),
        [
            [
                *(name, len(found["kills"]), sum(where["in_save"] for where in found["kills"])),
                *(sum(where["epochs"] == 0 for where in found["kills"]), found["chains"], found["same"]),
            ]
            for name, found in results["kills"].items()
        ],
    )
    report.table(
        "damaged checkpoints",
        ("damage", "tried", "found", "loaded"),
        [
            [text, results[part]["tried"], results[part]["found"], results[part]["tried"] - results[part]["found"]]
            for part, text in (("flips", "one bit flipped"), ("cuts", "one file cut"))
        ],
    )
    found = results["cost"]
    print(f"epoch of MNIST: {found['without']:.3f} s, with a checkpoint {found['with']:.3f} s, × {found['ratio']:.3f}")


if __name__ == "__main__":
    main()
