"""What came out of a sweep: the last scores of its members, by what was swept, over the seeds and folds."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jaxbp.run.report import text
from jaxbp.run.report.metrics import Divergence, EpochRow, FinalRow, MemberRow
from jaxbp.run.report.text import shown, shown_score
from jaxbp.run.store import files

COLUMNS = ("score", "members", "diverged", "mean", "sd", "min", "max")


class Group(NamedTuple):
    """The members of one setting: all seeds and folds of it.

    setting: the values of what is swept, by dotted keys, or the learning rate (of a schedule, its name);
    epochs: for each epoch the rows of the members that lived to its end;  diverged: the others';
    final: of members with a validation set the rows of the test set.
    """

    setting: dict[str, Any]
    epochs: list[list[MemberRow]]
    diverged: list[MemberRow]
    final: list[MemberRow]

    @property
    def last(self) -> list[MemberRow]:
        """Of each member that lives the row of its last epoch.

        Of one that was tested the row of the epoch that it keeps, with the scores of the test set.
        """
        rows = {(m.seed, m.fold): m for m in itertools.chain(*self.epochs, self.diverged)}
        for tested in self.final:
            kept = next(m for m in self.epochs[tested.row.epoch - 1] if m.repetition == tested.repetition)
            row = dataclasses.replace(kept.row, test=tested.row.test)  # type: ignore[arg-type,union-attr]
            rows[tested.seed, tested.fold] = dataclasses.replace(kept, row=row)
        return [member for member in rows.values() if isinstance(member.row, EpochRow)]

    @property
    def label(self) -> str:
        """The values of the setting in a few words: "adam, 0.1"."""
        return ", ".join(map(shown, self.setting.values()))


def groups(rows: Sequence[MemberRow]) -> list[Group]:
    """The rows of a sweep by setting, in its order."""
    found: dict[str, list[MemberRow]] = {}
    for row in rows:
        found.setdefault(json.dumps(row.setting), []).append(row)
    settings = []
    for mine in found.values():
        diverged = [member for member in mine if isinstance(member.row, Divergence)]
        final = [member for member in mine if isinstance(member.row, FinalRow)]
        settings.append(Group(mine[0].setting, _by_epoch(mine), diverged, final))
    return settings


def _by_epoch(rows: Sequence[MemberRow]) -> list[list[MemberRow]]:
    measured = [member for member in rows if isinstance(member.row, EpochRow)]
    return [[m for m in measured if m.row.epoch == e] for e in range(1, max(m.row.epoch for m in rows) + 1)]


def shown_key(key: str) -> str:
    """A dotted key for a person; the learning rate by its name."""
    return key.replace("_", " ") if key == "learning_rate" else key


def titled(setting: Mapping[str, Any]) -> str:
    """Keys and values: "optimizer.name adam, learning rate 0.1"."""
    return ", ".join(f"{shown_key(key)} {shown(value)}" for key, value in setting.items())


def keys(found: Sequence[Group]) -> list[str]:
    """What the settings of the groups give values to."""
    return list(dict.fromkeys(key for group in found for key in group.setting))


def repeated(found: Sequence[Group]) -> str:
    """What the members of a group differ in: "seeds", "folds" or "seeds and folds"."""
    own = [member.repetition for group in found for member in (*itertools.chain(*group.epochs), *group.diverged)]
    several = [key for key in ("seed", "fold") if len({repetition.get(key) for repetition in own}) > 1]
    return " and ".join(f"{key}s" for key in several or ["seed"])


def names(found: Sequence[Group]) -> list[str]:
    """The scores: train_loss, train_accuracy, test_loss, …"""
    measured = next((of(member) for group in found for rows in group.epochs for member in rows), {})
    tested = next((of(member) for group in found if group.final for member in group.last), {})
    return list(measured | tested)


def of(member: MemberRow) -> dict[str, float]:
    """The scores of a member after an epoch, by their names."""
    return member.row.scores() if isinstance(member.row, EpochRow) else {}


def write(found: Sequence[Group], path: Path) -> None:
    """A line a setting and score, of the members that live; s.d. is that of a sample, divided by n − 1."""
    rows: list[Sequence[object]] = [(*keys(found), *COLUMNS)]
    for group in found:
        setting = [shown(group.setting[key]) if key in group.setting else "" for key in keys(found)]
        for name in names(found):
            counts = (len(group.last), len(group.diverged))
            rows.append((*setting, name, *counts, *statistics(group.last, name).values()))
    files.replace(path, files.csv_of(rows))


def show(found: Sequence[Group], title: str, console: Console) -> None:
    """Prints the main score for a person, over the members that live, and the means of its loss and of the test."""
    score, split, rows = main_score(found), held_out(found), []
    means = [f"{split}_loss", *([f"test_{score.partition('_')[2]}"] if split == "validation" else [])]
    for group in found:
        cells = [shown_score(score, value) for value in statistics(group.last, score).values()]
        gone = f"{len(group.diverged)} of {len(group.last) + len(group.diverged)}" if group.diverged else ""
        rows.append([group.label, gone, *cells, *(shown_score(n, statistics(group.last, n)["mean"]) for n in means)])
    text.line(console, f"\n{title}, {score.replace('_', ' ')} over the {repeated(found)}\n")
    swept = ", ".join(map(shown_key, keys(found)))
    columns = (swept, "diverged", "mean", "s.d.", "min", "max", *(name.replace("_", " ") for name in means))
    text.table(console, columns, rows)


def best(found: Sequence[Group]) -> str:
    """The setting with the best mean of the main score, and the best member."""
    score = main_score(found)
    choose: Callable[..., Any] = min if score.endswith("rmse") else max
    group = choose((g for g in found if g.last), key=lambda g: statistics(g.last, score)["mean"])
    row = choose((row for g in found for row in g.last), key=lambda row: of(row)[score])
    name = score.replace("_", " ")
    return (
        f"best mean {name}: {shown_score(score, statistics(group.last, score)['mean'])}, {titled(group.setting)}"
        f"\nbest member: {shown_score(score, of(row)[score])}, {titled(row.repetition | row.setting)}"
    )


def held_out(found: Sequence[Group]) -> str:
    """The set by which the members are compared: "validation" where they have one, or else "test"."""
    return "validation" if "validation_loss" in names(found) else "test"


def main_score(found: Sequence[Group]) -> str:
    """test_accuracy, or test_rmse of a regression; with a validation set those of that."""
    split = held_out(found)
    return f"{split}_rmse" if f"{split}_rmse" in names(found) else f"{split}_accuracy"


def statistics(rows: Sequence[MemberRow], name: str) -> dict[str, float | None]:
    """mean, sd, min and max over the rows; None where there are too few of them."""
    values = np.array([of(row)[name] for row in rows if name in of(row)], np.float64)
    if not values.size:
        return dict.fromkeys(("mean", "sd", "min", "max"))
    sd = float(values.std(ddof=1)) if values.size > 1 else None
    return {"mean": float(values.mean()), "sd": sd, "min": float(values.min()), "max": float(values.max())}
