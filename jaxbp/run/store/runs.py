"""Run folders as others find them: their names, configs, states and rows. No JAX: thousands are read in a moment."""

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxbp.run.errors import UserError
from jaxbp.run.keys import flat

FILE, METRICS, TIMINGS = "params.safetensors", "metrics.jsonl", "timings.jsonl"
MEMBERS = "members"  # of a sweep, a run folder each
UNFINISHED = ".unfinished"  # there from the beginning of a run to its end; locked while a process works on it
TAILS = (2**11, 2**16, None)  # bytes at the end of metrics.jsonl in which the last epoch is looked for; None: in all
SCORES = ("train_", "validation_", "test_")  # what the names of scores begin with
LARGER_IS_BETTER = ("accuracy", "r2", "balanced_accuracy")  # and end with


class Run(NamedTuple):
    """A run folder.

    config: the tables of config.toml;  state: finished, unfinished or diverged;  last: the row of the
    last epoch, or of the best one with the row that ends the run, {} before there is one;  members: how many a sweep
    has, which has no last epoch of its own;  provenance: when it began, with which versions, on what, {} of a member.
    """

    path: Path
    config: dict[str, dict[str, Any]]
    state: str
    last: dict[str, Any]
    members: int
    provenance: dict[str, Any]

    @property
    def scores(self) -> dict[str, float | None]:
        """train_loss, train_accuracy … test_accuracy of the last epoch; None is NaN or an infinity."""
        return {name: value for name, value in self.last.items() if name.startswith(SCORES)}


def read(path: Path) -> Run:
    """The run in a folder; UserError where there is none, or one of its files is damaged."""
    if not (path / "config.toml").is_file():
        raise UserError(f"{path}: not a run folder: it has no config.toml")
    provenance = path / "provenance.json"
    began = _parsed(provenance, json.loads) if provenance.is_file() else {}
    config = began.pop("config", None) or _parsed(path / "config.toml", tomllib.loads)  # TOML takes ten times as long
    members = len(os.listdir(path / MEMBERS)) if (path / MEMBERS).is_dir() else 0
    end = [] if members else _last(path / METRICS)
    state = "diverged" if any("diverged" in row for row in end) else "finished"
    final = next((row for row in end if "stopped_early" in row), {})
    epochs = [row | row.get("unprotected", {}) for row in end if is_epoch(row)]
    last = next((row for row in epochs if row["epoch"] == final.get("epoch", row["epoch"])), {}) | final
    state = "unfinished" if (path / UNFINISHED).exists() else state
    return Run(path, config, state, last, members, began)


def environment(run: Run) -> list[str]:
    """What provenance.json says, a line a key."""
    found = flat(run.provenance).items()
    return [f"{key}: {' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in found]


def folders(places: Iterable[Path]) -> list[Path]:
    """The run folders in these places: runs, sweeps, whose members count, and folders of runs; UserError for others."""
    found: list[Path] = []
    for place in places:
        inside = place / MEMBERS if (place / MEMBERS).is_dir() else place
        own = [inside] if (inside / "config.toml").is_file() else [path.parent for path in inside.glob("*/config.toml")]
        if not own:
            raise UserError(f"{place}: {'there is no run in it' if place.exists() else 'no such folder'}")
        found += sorted(own)
    return found


def rows(path: Path, length: int | None = None) -> list[dict[str, Any]]:
    """The lines of a file of rows, or those that its last `length` bytes hold; none where there is no file.

    A last line that a killed process left half written does not count.

    Raises:
      UserError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        cut = max(0, os.fstat(file.fileno()).st_size - length) if length is not None else 0
        file.seek(cut)
        lines = file.read().split(b"\n")[1 if cut else 0 : -1]
    try:
        found = list(map(dict, json.loads(b"[%b]" % b",".join(lines))))  # at once: a call a line takes twice the time
        if any("epoch" not in row for row in found):
            raise ValueError("a line without an epoch")
        return found
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None


def is_epoch(row: Mapping[str, Any]) -> bool:
    """Whether a row is that of an epoch: no recorded step, and none of those with which a run ends."""
    return not row.keys() & {"batch_loss", "diverged", "stopped_early"}


def _parsed(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        return dict(parse(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged: {error}") from None


def _last(path: Path) -> list[dict[str, Any]]:
    """The rows at the end of metrics.jsonl, the last one first: that of the epoch with which the run ended is there."""
    for length in TAILS:
        end = rows(path, length)[::-1]
        if any(row["epoch"] in (end[0]["epoch"], end[0]["epoch"] - 1) for row in end if is_epoch(row)):
            break
    return end


def ordered(rows: Sequence[Mapping[str, Any]], column: str) -> list[Mapping[str, Any]]:
    """The rows of a table by one of its columns: of a score the best first; rows without a value stand last.

    Raises:
      UserError: there is no such column.
    """
    if column not in rows[0]:
        from jaxbp.run.config import choose  # takes its time

        choose("--sort", "column", column, rows[0])
    there = [row for row in rows if row[column] is not None]
    numbers = all(isinstance(row[column], int | float) for row in there)
    best = column.startswith(SCORES) and column.endswith(LARGER_IS_BETTER)
    there.sort(key=lambda row: row[column] if numbers else str(row[column]), reverse=best)
    return [*there, *(row for row in rows if row[column] is None)]
