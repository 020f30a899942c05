"""The run folder: which one a run takes, what is in it, and who writes there.

In a run of several processes all of them have a `RunFolder`, and all call its methods; the first process reads and
writes, and its errors are raised in all.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tomli_w

from jaxbp.run import config as configs
from jaxbp.run import paths
from jaxbp.run.compute import optimizers
from jaxbp.run.config import Config, to_dict
from jaxbp.run.errors import UserError
from jaxbp.run.host import processes
from jaxbp.run.report import metrics
from jaxbp.run.report.metrics import EpochRow, MemberRow, Row, StepRecord, Timing
from jaxbp.run.store import files, lock, runs
from jaxbp.run.store.checkpoint import Checkpoints, Position, Saved
from jaxbp.run.store.model import Model, load
from jaxbp.run.store.runs import FILE, METRICS, TIMINGS, UNFINISHED

PACKAGES = ("jaxbp", "jax", "jaxlib", "numpy", "optax", "scikit-learn")
NEW = "--new, or another train.folder, begins a new run"
GIT_SECONDS = 10  # a repository on a slow disk holds no run up for longer
MAY_DIFFER = ("train.folder", "train.epochs", "mesh.data", "mesh.model")  # in a run that goes on
How = Literal["auto", "resume", "new"]
Told = Callable[[Mapping[str, Any]], None]
"""Of a line, as soon as it is on disk."""


class RunFolder:
    """The folder of a run while it trains.

    rows: what metrics.jsonl holds, as far as this process knows: all of it in the first one.
    """

    def __init__(self, path: Path, resumed: bool, checkpoints: Checkpoints, told: Told) -> None:
        self.path, self.resumed = path, resumed
        self.rows: list[Row] = []
        self._checkpoints, self._told = checkpoints, told
        told({"run_folder": str(path), "resumed": resumed})

    @property
    def epochs(self) -> list[EpochRow]:
        """The rows of the epochs."""
        return [row for row in self.rows if isinstance(row, EpochRow)]

    @property
    def records(self) -> list[StepRecord]:
        """The rows of the recorded steps."""
        return [row for row in self.rows if isinstance(row, StepRecord)]

    def append(self, rows: Sequence[Row | MemberRow], timing: Timing | None = None) -> None:
        """More rows of metrics.jsonl, and the time that they took; of a sweep `rows` does not keep them."""

        def write() -> None:
            if timing is not None:
                append(self.path / TIMINGS, [timing])
            append(self.path / METRICS, rows)
            self.rows += [row for row in rows if not isinstance(row, MemberRow)]

        self._on_first(write)
        for row in [*rows, *([timing] if timing else [])]:
            self._told(metrics.plain(row.line()))

    def due(self, epoch: int) -> bool:
        """Whether a checkpoint is to be written after this epoch; the clocks of two processes may differ."""
        return self._checkpoints.due(epoch)

    def checkpoint(self, epoch: int, step: int, key: jax.Array, state: Any, wait: bool) -> None:
        """Begins to write a checkpoint of a state on the host, after the rows that are there; may wait for its end."""

        def write() -> None:
            length = (self.path / METRICS).stat().st_size
            self._checkpoints.save(Position(epoch, step, length, np.asarray(jax.random.key_data(key))), state)
            if wait:
                self._checkpoints.wait()

        self._on_first(write)

    def newest(self, like: Any) -> Saved | None:
        """The newest whole checkpoint, in every process; what was measured after it is cut off. None without any."""
        saved: Saved | None = None

        def read() -> list[Any] | None:
            nonlocal saved
            saved = self._checkpoints.newest(like, lambda fault: print(f"jaxbp: warning: {fault}", file=sys.stderr))
            where = saved.position if saved else Position(0, 0, 0, np.zeros(0))
            self.rows = rewind(self.path, where.metrics_bytes, where.epoch)
            return [*where[:3], where.key.tolist()] if saved else None

        position = processes.from_first(read)
        if position is None:
            return None
        epoch, step, length, key = position
        state = processes.broadcast(saved.state if saved else None, like)
        return Saved(Position(epoch, step, length, np.array(key, np.uint32)), state)

    def save(self, model: Model) -> None:
        """Writes params.safetensors, or best.safetensors of the best parameters."""
        self._on_first(lambda: model.save(self.path))

    def inputs(self, model: Model) -> Any:
        """The model's inputs as the run began with them; when it begins, the model is saved."""
        self._on_first(lambda: None if (self.path / FILE).exists() else model.save(self.path))
        return processes.broadcast(processes.on_first(lambda: load(self.path).inputs), model.inputs)

    def draw(self, pictures: Callable[[Path], None]) -> None:
        """Has the pictures drawn into the folder."""
        self._on_first(lambda: pictures(self.path))

    def forget(self) -> None:
        """Removes the checkpoints, which hold the key of a private run."""
        self._on_first(self._checkpoints.remove)

    def finish(self) -> None:
        """Marks the run as finished: from now on nothing is changed in its folder."""
        self._on_first((self.path / UNFINISHED).unlink)

    def _on_first(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except OSError as error:
                reason = f"can't be written: {error.strerror}; what was written before is whole"
                raise UserError(f"{self.path}: {reason}") from None

        processes.on_first(guarded)


@contextlib.contextmanager
def opened(
    config: Config,
    name: str,
    data: str,
    how: How = "auto",
    known: Mapping[str, Any] | None = None,
    told: Told = lambda line: None,
) -> Iterator[RunFolder]:
    """The run folder, locked: that of an unfinished run, or a new one with config.toml and provenance.json.

    data: the digest of the data set, which stays the same from the beginning of a run to its end.
    known: what provenance.json has besides.
    told: is given a line that names the folder, then each row as it is written.

    `train.folder` is taken if it is new or empty, or holds an unfinished run, which then goes on. Without it the newest
    of runs/<name>, runs/<name>-2, … is taken if it is unfinished, or else the next. "resume" wants a run that is
    unfinished or, with a larger train.epochs, finished; else a finished one is never touched. "new" wants a new folder.
    config.toml names no folder, so that it can be run again.

    Raises:
      UserError: the folder holds something else, another process runs in it, it can't be written, or its run began with
        another config, the keys that differ are named, or with other data.
    """
    with contextlib.ExitStack() as stack:
        path, resumed = processes.from_first(lambda: _taken(stack, config, name, data, how, known or {}))
        checkpoints = stack.enter_context(Checkpoints(Path(path), config.checkpoint))
        yield RunFolder(Path(path), resumed, checkpoints, told)


def _taken(
    stack: contextlib.ExitStack, config: Config, name: str, data: str, how: How, known: Mapping[str, Any]
) -> tuple[str, bool]:
    """The folder, locked until the stack ends; whether a run goes on there."""
    chosen = config.train.folder
    path = paths.named("train.folder", chosen) if chosen is not None else _numbered(name, how)
    with files.writable(f"train.folder: {str(path)!r}"):
        _check_free(config, path, data, how)
        path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock.held(path / UNFINISHED))
        resumed = (path / "config.toml").exists()
        if resumed:
            _check_same(config, path, data)
            _warn_of_cores(path)
        begun = configs.read(path / "config.toml") if resumed else None
        again = dataclasses.replace(config, train=dataclasses.replace(config.train, folder=None))
        if begun is not None and begun.train.epochs == config.train.epochs:
            again = begun
        provenance = _provenance(config, path, data, known) | {"config": to_dict(again)}
        files.replace(path / "provenance.json", json.dumps(provenance, indent=2) + "\n")
        if again is not begun:
            files.replace(path / "config.toml", tomli_w.dumps(to_dict(again)))
    return str(path), resumed


def append(path: Path, rows: Sequence[Row | Timing | MemberRow]) -> None:
    """More lines of a file, on disk on return. On an error, such as a full disk, the file is left as it was."""
    if not rows:
        return
    lines = "".join(json.dumps(metrics.plain(row.line()), allow_nan=False) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        length = file.tell()
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except BaseException:  # also Ctrl-C
            file.truncate(length)
            raise


def rewind(path: Path, length: int, epochs: int) -> list[Row]:
    """Cuts off what was measured after the first epochs; the rows that metrics.jsonl keeps.

    Raises:
      UserError: the file is shorter than it was.
    """
    metrics_file, timings = path / METRICS, path / TIMINGS
    kept = metrics_file.read_bytes()[:length] if metrics_file.exists() else b""
    if len(kept) < length:
        raise UserError(
            f"{metrics_file}: {len(kept)} bytes, when the checkpoint was written it had {length}; begin anew"
        )
    if metrics_file.exists():
        os.truncate(metrics_file, length)
    cut(timings, epochs)
    return [metrics.read(json.loads(line)) for line in kept.splitlines()]


def cut(path: Path, lines: int) -> None:
    """Cuts off what a file, if it is there, has after its first lines."""
    if path.exists():
        os.truncate(path, sum(map(len, path.read_bytes().splitlines(keepends=True)[:lines])))


def _numbered(name: str, how: How) -> Path:
    """The newest of runs/<name>, runs/<name>-2, … if it is unfinished or must be resumed; or else the next one."""
    name = name.strip(".") or "run"  # "..": the parent
    folders = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, sys.maxsize))
    newest = None
    for folder in folders:
        if not os.path.lexists(folder):
            break
        newest = folder
    taken = newest is not None and how != "new" and (how == "resume" or (newest / UNFINISHED).exists())
    return newest if newest is not None and taken else folder


def _check_free(config: Config, path: Path, data: str, how: How) -> None:
    """Raises unless a run may begin or, where one is unfinished or is to be longer, go on here."""
    unfinished, begun = (path / UNFINISHED).exists(), (path / "config.toml").exists()
    if how == "resume" and not unfinished:
        if not begun:
            state = "holds no run" if path.exists() else "does not exist"
            raise UserError(f"--resume: {path} {state}, so there is nothing to resume")
        if config.train.epochs <= (trained := configs.read(path / "config.toml").train.epochs):
            longer = f"a train.epochs of more than {trained} trains it longer"
            raise UserError(f"--resume: {path} is finished, so there is nothing to resume; {longer}")
        _check_same(config, path, data)
        return
    if how == "new" and unfinished:
        raise UserError(f"train.folder: {path} holds an unfinished run, which stays; name a new folder or remove it")
    if not unfinished and path.is_dir() and any(path.iterdir()):
        holds = "holds a finished run" if begun else "is not empty"
        raise UserError(f"train.folder: {path} {holds}; name a new folder or remove it")


def _check_same(config: Config, path: Path, data: str) -> None:
    before, now = configs.read(path / "config.toml"), config.train.epochs
    differing = [key for key in configs.keys() if key not in MAY_DIFFER and _value(before, key) != _value(config, key)]
    which = f"{path} is unfinished and" if (path / UNFINISHED).exists() else str(path)
    if differing:
        changes = ", ".join(f"{key} was {_value(before, key)!r}, now {_value(config, key)!r}" for key in differing)
        raise UserError(f"{which} began with another config: {changes}; {NEW}")
    if _begun(path)["data_sha256"] != data:
        changed = f"{config.data.name} has changed"
        raise UserError(f"{which} began with other data, data.name: {changed}; {NEW}")
    if now != before.train.epochs and optimizers.counts_all(config.optimizer):
        change = f"train.epochs was {before.train.epochs}, now {now}, and the schedule counts all steps of the run"
        raise UserError(f"{which} began with another learning rate: {change}; {NEW}")
    if now != before.train.epochs and config.privacy.enabled:
        change = f"train.epochs was {before.train.epochs}, now {now}, and what it spends is settled"
        raise UserError(f"{which} is private: {change}; {NEW}")
    if now != before.train.epochs and config.sweep.enabled:
        raise UserError(f"{which} is a sweep: train.epochs was {before.train.epochs}, now {now}; {NEW}")
    if not config.sweep.enabled and now < (done := _epochs_in(path)):
        raise UserError(f"train.epochs: got {now}, {path} has {done} already; {NEW}")


def _epochs_in(path: Path) -> int:
    """How many epochs are in metrics.jsonl."""
    return sum(map(runs.is_epoch, runs.rows(path / METRICS)))


def _value(config: Config, key: str) -> Any:
    table, _, name = key.partition(".")
    return getattr(getattr(config, table), name)


def _provenance(config: Config, path: Path, data: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Of a new run; of one that goes on, that of its beginning with one more entry in "resumed"."""
    now: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processes": jax.process_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "cores": _cores(),
        "git_commit": _git_commit(),
        "seed": {"data": config.data.seed, "train": config.train.seed},
        "data_sha256": data,
        **known,
    }
    if not (path / "config.toml").exists():
        return now
    begun = _begun(path)
    return begun | {"resumed": [*begun.get("resumed", []), now]}


def _cores() -> int:
    """The cores that this process may use: XLA has a thread for each, and splits large sums over them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warn_of_cores(path: Path) -> None:
    before = _begun(path).get("cores", _cores())
    if before != _cores():
        change = f"began on {before} cores and goes on on {_cores()}"
        print(f"jaxbp: warning: {path} {change}: the last digits may differ", file=sys.stderr)


def _begun(path: Path) -> dict[str, Any]:
    begun: dict[str, Any] = json.loads((path / "provenance.json").read_text(encoding="utf-8"))
    return begun


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working directory, with "-dirty" behind it; None outside a repository or without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
