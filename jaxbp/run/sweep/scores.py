"""What came out of a sweep: the last scores of its members, by learning rate, over the seeds."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jaxbp.run.config import Config
from jaxbp.run.report import text
from jaxbp.run.report.metrics import Divergence, EpochRow, MemberRow
from jaxbp.run.report.progress import shown_score
from jaxbp.run.store import files

COLUMNS = ("learning_rate", "score", "members", "diverged", "mean", "sd", "min", "max")


class Group(NamedTuple):
    """The members of one learning rate (or of the schedule, then by its name).

    epochs: for each epoch the rows of the members that lived to its end;  diverged: the others'.
    """

    learning_rate: str
    epochs: list[list[MemberRow]]
    diverged: list[MemberRow]

    @property
    def last(self) -> list[MemberRow]:
        """The rows of the last epoch: one for each member that lives."""
        return self.epochs[-1]


def groups(config: Config, rows: Sequence[MemberRow]) -> list[Group]:
    """The rows of a sweep by learning rate, in its order."""
    named: dict[str, list[MemberRow]] = {}
    for row in rows:
        named.setdefault(config.optimizer.schedule or str(row.learning_rate), []).append(row)
    count = max((member.row.epoch for member in rows), default=0)
    return [
        Group(
            name,
            [[m for m in found if isinstance(m.row, EpochRow) and m.row.epoch == e] for e in range(1, count + 1)],
            [member for member in found if isinstance(member.row, Divergence)],
        )
        for name, found in named.items()
    ]


def names(found: Sequence[Group]) -> list[str]:
    """The scores: train_loss, train_accuracy, test_loss, …"""
    return list(next((of(member) for group in found for rows in group.epochs for member in rows), {}))


def of(member: MemberRow) -> dict[str, float]:
    """The scores of a member after an epoch, by their names."""
    return member.row.scores() if isinstance(member.row, EpochRow) else {}


def write(found: Sequence[Group], path: Path) -> None:
    """A line a learning rate and score, of the members that live; s.d. is that of a sample, divided by n − 1."""
    with files.replaced(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for group in found:
            for name in names(found):
                counts = (len(group.last), len(group.diverged))
                table.writerow((group.learning_rate, name, *counts, *statistics(group.last, name).values()))


def show(found: Sequence[Group], title: str, console: Console) -> None:
    """Prints the test score for a person, over the members that live, and the mean of the test loss."""
    score, rows = main_score(found), []
    for group in found:
        cells = [_cell(score, value) for value in statistics(group.last, score).values()]
        gone = f"{len(group.diverged)} of {len(group.last) + len(group.diverged)}" if group.diverged else ""
        loss = _cell("test_loss", statistics(group.last, "test_loss")["mean"])
        rows.append([group.learning_rate, gone, *cells, loss])
    text.line(console, f"\n{title}, {score.replace('_', ' ')} over the seeds\n")
    text.table(console, ("learning rate", "diverged", "mean", "s.d.", "min", "max", "test loss"), rows)


def best(found: Sequence[Group]) -> str:
    """The learning rate with the best mean of the test score, and the best member."""
    score = main_score(found)
    choose: Callable[..., Any] = min if score.endswith("rmse") else max
    group = choose((g for g in found if g.last), key=lambda g: statistics(g.last, score)["mean"])
    row = choose((row for g in found for row in g.last), key=lambda row: of(row)[score])
    shown = score.replace("_", " ")
    return (
        f"best mean {shown}: {_cell(score, statistics(group.last, score)['mean'])}, learning rate {group.learning_rate}"
        f"\nbest member: {_cell(score, of(row)[score])}, seed {row.seed}, learning rate {row.learning_rate}"
    )


def main_score(found: Sequence[Group]) -> str:
    """test_accuracy, or test_rmse of a regression."""
    return "test_rmse" if "test_rmse" in names(found) else "test_accuracy"


def statistics(rows: Sequence[MemberRow], name: str) -> dict[str, float | None]:
    """mean, sd, min and max over the rows; None where there are too few of them."""
    values = np.array([of(row)[name] for row in rows], np.float64)
    if not values.size:
        return dict.fromkeys(("mean", "sd", "min", "max"))
    sd = float(values.std(ddof=1)) if values.size > 1 else None
    return {"mean": float(values.mean()), "sd": sd, "min": float(values.min()), "max": float(values.max())}


def _cell(name: str, value: float | None) -> str:
    return "–" if value is None else shown_score(name, value)
