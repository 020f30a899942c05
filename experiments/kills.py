"""Do runs survive? SIGKILL at random moments, flipped bits and cut files in checkpoints.

Kills: a run with checkpoints after every epoch is started again and again and killed at a random moment: of the two
seconds after it has taken its folder or, two times of three, after it has measured an epoch; every second time it is
left from then on until a checkpoint is half written. At last it may end, and its params.safetensors and metrics.jsonl
are compared, byte by byte, with those of a run that was not killed. Damage: of two checkpoints the newest gets one bit
flipped or one file cut, anywhere; it has to be named and the other one taken.

Command: python -m experiments.kills [--chains 3] [--kills 6] [--flips 100] [--cuts 50] [--out FOLDER]
"""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import report
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.compute.program import first_state
from jaxbp.run.config import CheckpointConfig
from jaxbp.run.store.checkpoint import Checkpoints
from jaxbp.run.store.folder import UNFINISHED

DIGITS = """
[data]
standardize = "global"
[model]
sizes = [64, 128, 64, 10]
[train]
epochs = 500
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
schedule_arguments = {{ init_value = 1e-3, decay_steps = 22500 }}""",
    "sgd, recording": f"""{DIGITS}learning_rate = 0.1
[study]
quantities = ["squared_norms", "noise_scale"]
every = 7""",
}
SAME = ("params.safetensors", "metrics.jsonl")
MOMENT = 2.0  # seconds; the moment of a kill is uniform up to here


def started(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """`jaxbp run`, its output in a file beside the folder."""
    command = [sys.executable, "-m", "jaxbp", "run", str(config), "--train.folder", str(folder)]
    with open(f"{folder}.out", "wb") as out:
        return subprocess.Popen(command, stdout=out)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Waits for the condition, for the end of the process, or so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.001)


def half_written(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints that were begun, with inodes: a hidden folder without its name, or a folder without a manifest."""
    there = list((folder / "checkpoints").glob("*")) if (folder / "checkpoints").exists() else []
    names = {path.name for path in there}
    begun = [path for path in there if path.suffix != ".sha256" and f"{path.name}.sha256" not in names]
    with contextlib.suppress(FileNotFoundError):  # it has its name by now
        return {(path.name, path.stat().st_ino) for path in begun}
    return set()


def holds(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has taken the folder."""
    lock = folder / UNFINISHED
    return lock.exists() and lock.read_text() == str(process.pid)


def measured(folder: Path) -> int:
    """The epochs that the last process has measured: it prints a line for each."""
    return Path(f"{folder}.out").read_bytes().count(b"\nepoch ")


def kill(config: Path, folder: Path, rng: np.random.Generator, training: bool, in_save: bool) -> dict[str, Any] | None:
    """Starts the run, kills it and says where; None when it came to its end before.

    training: the moment is counted from the first epoch that this process measures, not from its taking the folder.
    """
    left = half_written(folder)  # by an earlier kill
    process = started(config, folder)
    until(lambda: holds(folder, process), process)
    if training:
        until(lambda: measured(folder) > 0, process)
    moment = rng.uniform(0, MOMENT)
    until(lambda: False, process, moment)
    if in_save:
        until(lambda: bool(half_written(folder) - left), process)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    return {"seconds": moment, "epochs": measured(folder), "in_save": bool(half_written(folder) - left)}


def survive(name: str, chains: int, kills: int, work: Path) -> dict[str, Any]:
    """Chains of kills of one config, each against the one run that is not killed."""
    config, whole = work / f"{name}.toml", work / f"{name} whole"
    config.write_text(CONFIGS[name])
    started(config, whole).wait()
    found: dict[str, Any] = {"kills": [], "chains": chains, "same": 0}
    for chain in range(chains):
        rng, folder = np.random.default_rng([chain, *name.encode()]), work / f"{name} {chain}"
        for number in range(kills):
            found["kills"].append(kill(config, folder, rng, number % 3 > 0, number % 2 == 1))
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
    setup = loop.prepare(configs.read(folder / "config.toml"))
    return first_state(setup.problem, setup.spec)


def damage(run: Path, count: int, cut: bool, work: Path) -> int:
    """How many of so many damages are found."""
    found = 0
    for number in range(count):
        shutil.copytree(run, work / "damaged")
        found += damaged(work / "damaged", np.random.default_rng([cut, number]), cut)
        shutil.rmtree(work / "damaged")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both parts, prints their tables, writes kills.json."""
    parser = report.parser(__doc__)
    for name, default, text in (
        ("chains", 3, "runs of each config that are killed and end"),
        ("kills", 6, "kills of each"),
        ("flips", 100, "flipped bits"),
        ("cuts", 50, "cut files"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    with report.study("kills", parser, arguments) as study, tempfile.TemporaryDirectory() as folder:
        work, options = Path(folder), study.options
        killed = {name: survive(name, options.chains, options.kills, work) for name in CONFIGS}
        flips, cuts = (
            {"tried": count, "found": damage(work / "adam, cosine whole", count, cut, work)}
            for count, cut in ((options.flips, False), (options.cuts, True))
        )
        results = {"kills": killed, "flips": flips, "cuts": cuts}
        show(results)
        study.save(results)


def show(results: dict[str, Any]) -> None:
    """The tables."""
    report.table(
        "runs that are killed",
        ("config", "kills", "in a save", "before its first epoch", "runs", "the same bytes"),
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


if __name__ == "__main__":
    main()
