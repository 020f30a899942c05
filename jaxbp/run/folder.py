"""The run folder: which one a run takes, the resolved config, metrics.jsonl, provenance."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tomli_w

from jaxbp.run import config as configs
from jaxbp.run import lock, paths
from jaxbp.run.config import Config, to_dict
from jaxbp.run.errors import UserError

PACKAGES = ("jaxbp", "jax", "jaxlib", "numpy", "optax", "scikit-learn")
METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
UNFINISHED = ".unfinished"  # there from the beginning of a run to its end; locked while a process works on it
How = Literal["auto", "resume", "new"]


class Opened(NamedTuple):
    """The folder of a run; whether a run that was stopped goes on in it."""

    path: Path
    resumed: bool


@contextlib.contextmanager
def opened(config: Config, name: str, data: str, how: How = "auto") -> Iterator[Opened]:
    """The run folder, locked: that of an unfinished run, or a new one with config.toml and provenance.json.

    data: the digest of the data set, which stays the same from the beginning of a run to its end.

    `train.folder` is taken if it is new or empty, or holds an unfinished run, which then goes on. Without it the newest
    of runs/<name>, runs/<name>-2, … is taken if it is unfinished, or else the next. A finished run is never touched.
    "resume" wants an unfinished run, "new" a new folder.

    Raises:
      UserError: the folder holds something else, another process runs in it, it can't be written, or its run began with
        another config, the keys that differ are named, or with other data.
    """
    chosen = config.train.folder
    path = paths.below("train.folder", chosen) if chosen is not None else _numbered(name, how)
    with contextlib.ExitStack() as stack:
        try:
            _check_free(path, how)
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(path / UNFINISHED))
            resumed = (path / "config.toml").exists()
            if resumed:
                _check_same(config, path, data)
            _write(path / "provenance.json", json.dumps(_provenance(config, path, data), indent=2) + "\n")
            if not resumed:
                _write(path / "config.toml", tomli_w.dumps(to_dict(config)))
        except OSError as error:
            raise UserError(f"train.folder: {str(path)!r} can't be written: {error.strerror}") from None
        yield Opened(path, resumed)


def finish(path: Path) -> None:
    """Marks the run as finished: from now on nothing is changed in its folder."""
    (path / UNFINISHED).unlink()


def append(path: Path, *rows: Mapping[str, Any], to: str = METRICS) -> int:
    """More lines of metrics.jsonl, on disk on return: its length. NaN and ±inf, which JSON lacks, become null.

    On an error, such as a full disk, the file is left as it was.
    """
    lines = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows).encode()
    with open(path / to, "ab", buffering=0) as file:
        length = file.tell()
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except BaseException:  # also Ctrl-C
            file.truncate(length)
            raise
        return file.tell()


def rewind(path: Path, length: int, epochs: int) -> list[dict[str, Any]]:
    """Cuts off what was measured after the first epochs; the rows that metrics.jsonl keeps, with NaN for null.

    Raises:
      UserError: the file is shorter than it was.
    """
    metrics, timings = path / METRICS, path / TIMINGS
    kept = metrics.read_bytes()[:length] if metrics.exists() else b""
    if len(kept) < length:
        raise UserError(f"{metrics}: {len(kept)} bytes, when the checkpoint was written it had {length}; begin anew")
    if metrics.exists():
        os.truncate(metrics, length)
    if timings.exists():
        os.truncate(timings, sum(map(len, timings.read_bytes().splitlines(keepends=True)[:epochs])))
    return [_with_nan(json.loads(line)) for line in kept.splitlines()]


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


def _check_free(path: Path, how: How) -> None:
    """Raises unless a run may begin or, where one is unfinished, go on here."""
    unfinished = (path / UNFINISHED).exists()
    if how == "resume" and not unfinished:
        state = "holds no unfinished run" if path.exists() else "does not exist"
        raise UserError(f"--resume: {path} {state}, so there is nothing to resume")
    if how == "new" and unfinished:
        raise UserError(f"train.folder: {path} holds an unfinished run, which stays; name a new folder or remove it")
    if not unfinished and path.is_dir() and any(path.iterdir()):
        holds = "holds a finished run" if (path / "config.toml").exists() else "is not empty"
        raise UserError(f"train.folder: {path} {holds}; name a new folder or remove it")


def _check_same(config: Config, path: Path, data: str) -> None:
    before = configs.read(path / "config.toml")
    may_differ = ("train.folder", "mesh.data", "mesh.model")  # a checkpoint holds whole arrays
    differing = [key for key in configs.keys() if key not in may_differ and _value(before, key) != _value(config, key)]
    if differing:
        changes = ", ".join(f"{key} was {_value(before, key)!r}, now {_value(config, key)!r}" for key in differing)
        raise UserError(f"{path} is unfinished and began with another config: {changes}; --new begins a new run")
    if _begun(path)["data_sha256"] != data:
        now = f"{config.data.name} has changed"
        raise UserError(f"{path} is unfinished and began with other data, data.name: {now}; --new begins a new run")


def _value(config: Config, key: str) -> Any:
    table, _, name = key.partition(".")
    return getattr(getattr(config, table), name)


def _write(path: Path, text: str) -> None:
    """All of it or, when the process is killed, nothing."""
    part = path.with_name(f".{path.name}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def _provenance(config: Config, path: Path, data: str) -> dict[str, Any]:
    """Of a new run; of one that goes on, that of its beginning with one more entry in "resumed"."""
    now: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processes": jax.process_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "git_commit": _git_commit(),
        "seed": {"data": config.data.seed, "train": config.train.seed},
        "data_sha256": data,
    }
    if not (path / "config.toml").exists():
        return now
    begun = _begun(path)
    return begun | {"resumed": [*begun.get("resumed", []), now]}


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
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
