"""Checkpoints of a run: one safetensors file each, and a SHA-256 manifest beside it that says that it is whole.

A checkpoint is written into a hidden folder, which is on disk before it gets its name, checkpoints/<step>/. Then
checkpoints/<step>.sha256 is written, in the format of `sha256sum`, which checks it there: a line a file. Only a folder
with a manifest is a checkpoint: without one the process was killed while it wrote.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from jaxbp.run.config import CheckpointConfig
from jaxbp.run.errors import UserError
from jaxbp.run.store import files

PAUSE = 60.0  # seconds between checkpoints where the config does not say how many epochs
FILE = "state.safetensors"
MANIFEST = ".sha256"
DAMAGED = ".damaged"  # behind the name of a manifest that its files do not fit
Tree = Any


class Position(NamedTuple):
    """Where in a run a checkpoint is: epochs and steps done, length of metrics.jsonl, key of the samples' order."""

    epoch: int
    step: int
    metrics_bytes: int
    key: np.ndarray


class Saved(NamedTuple):
    """A checkpoint as it was read: the state on the host."""

    position: Position
    state: Tree


class Checkpoints:
    """The checkpoints of one run folder; a context manager, which leaves when the last one is on disk.

    `save` copies the state and returns; a thread writes it while the next epoch is computed.
    """

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self._config = config
        self._folder = run / "checkpoints"
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._last = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._worker.shutdown()
        try:
            self.wait()
        except UserError as fault:
            if kind is None:
                raise
            print(f"jaxbp: warning: {fault}", file=sys.stderr)  # what is in flight already is worse

    def due(self, epoch: int) -> bool:
        """Whether the config wants a checkpoint after this epoch."""
        if self._config.every is None:
            return time.monotonic() - self._last >= PAUSE
        return epoch % self._config.every == 0

    def save(self, position: Position, state: Tree) -> None:
        """Begins to write a checkpoint, when the one before is on disk; UserError where that can't be."""
        self.wait()
        # Copied, for the next epoch takes the buffers; in C order, in which safetensors writes every array.
        arrays = {name: np.array(leaf, order="C") for name, leaf in _named(state).items()}
        self._last = time.monotonic()
        self._pending = self._worker.submit(_write, self._folder, self._config.keep, position, arrays)

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk; UserError where it can't be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with files.writable(f"{self._folder}:"):
                pending.result()

    def remove(self) -> None:
        """Removes all of them, and their folder if nothing else is in it."""
        self.wait()
        for step in _steps(self._folder):
            _remove(self._folder / str(step))
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def newest(self, like: Tree, warn: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that is whole, its state in the shape of `like`; None where there is none.

        What a killed process left half written is removed. A damaged checkpoint is named to `warn` and left out.

        Raises:
          UserError: it is whole, but belongs to another network or optimiser.
        """
        _clean(self._folder)
        for step in sorted(_steps(self._folder), reverse=True):
            path = self._folder / str(step)
            if fault := damage(path):
                warn(f"the checkpoint of step {step} is damaged and not used: {fault}")
                os.replace(*_manifests(path))
            else:
                return _read(path, like)
        return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint: the file that is not as its manifest says; None where nothing is."""
    then = _lines(_manifests(path)[0].read_text(encoding="utf-8", errors="replace"))
    now = _lines(manifest(path))
    for name in {**now, **then}:
        if then.get(name) != now.get(name):
            what = "has changed" if name in then else "is not in its manifest"
            return f"{path.parent / name} {what if name in now else 'is missing'}"
    return None


def manifest(path: Path) -> str:
    """The SHA-256 of every file in a folder, as `sha256sum` prints it beside the folder."""
    found = sorted(file for file in path.rglob("*") if not file.is_dir())
    return "".join(f"{_sha256(file)}  {file.relative_to(path.parent).as_posix()}\n" for file in found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, keep: int, position: Position, arrays: dict[str, np.ndarray]) -> None:
    """The folder, then its manifest, then the oldest checkpoints go."""
    path = folder / str(position.step)
    folder.mkdir(exist_ok=True)
    _remove(path)
    where = {f"position.{name}": np.asarray(value) for name, value in position._asdict().items()}
    part = folder / f".{position.step}"
    try:
        part.mkdir()
        (part / FILE).write_bytes(safetensors.numpy.save(where | {f"state.{n}": array for n, array in arrays.items()}))
        files.synced(part / FILE)
        files.synced(part)
        os.rename(part, path)
        files.replace(_manifests(path)[0], manifest(path))
    except OSError:
        _clean(folder)
        raise
    for step in sorted(_steps(folder))[:-keep]:
        _remove(folder / str(step))


def _read(path: Path, like: Tree) -> Saved:
    arrays = safetensors.numpy.load_file(path / FILE)
    epoch, step, metrics_bytes, key = (arrays.pop(f"position.{name}") for name in Position._fields)
    expected = {f"state.{name}": leaf for name, leaf in _named(like).items()}
    shapes, wanted = ({name: (a.shape, str(a.dtype)) for name, a in part.items()} for part in (arrays, expected))
    if shapes != wanted:
        raise UserError(f"{path}: holds another state than this config and these versions of jaxbp and Optax have")
    state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])
    return Saved(Position(int(epoch), int(step), int(metrics_bytes), key), state)


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by their path, "params.0.w" …"""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _lines(text: str) -> dict[str, str]:
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def _manifests(path: Path) -> list[Path]:
    """Of a checkpoint: where its manifest is, and where it is put when the files do not fit it."""
    return [path.with_name(path.name + MANIFEST + suffix) for suffix in ("", DAMAGED)]


def _steps(folder: Path) -> list[int]:
    names = [file.name.removesuffix(MANIFEST) for file in folder.glob(f"*{MANIFEST}")]
    return [int(name) for name in names if name.isdecimal()]


def _clean(folder: Path) -> None:
    """Removes what a killed process left half written, known by its name and content; all else is the user's."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\.[0-9a-f]{8}\.part-\d+\.sha256", path.name):
            path.unlink()
        elif re.fullmatch(r"\.?\d+", path.name) and not any(map(Path.exists, _manifests(path))):
            if path.is_dir() and {file.name for file in path.iterdir()} <= {FILE}:
                _remove(path)


def _remove(path: Path) -> None:
    """The manifest first: from then on it is no checkpoint. A folder with anything else in it stays."""
    for file in (*_manifests(path), path / FILE):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or not there
        path.rmdir()
