"""What came out of a sweep: the last scores of its members, by learning rate, over the seeds."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from jaxbp.run import metrics
from jaxbp.run.config import Config

Line = dict[str, Any]
COLUMNS = ("learning_rate", "score", "members", "diverged", "mean", "sd", "min", "max")


class Group(NamedTuple):
    """The members of one learning rate (or of the schedule, then by its name), in all the lines of metrics.jsonl.

    epochs: for each epoch the rows of the members that lived to its end;  diverged: the lines of those that did not.
    """

    learning_rate: str
    epochs: list[list[Line]]
    diverged: list[Line]

    @property
    def last(self) -> list[Line]:
        """The rows of the last epoch: one for each member that lives."""
        return self.epochs[-1]


def groups(config: Config, lines: Sequence[Line]) -> list[Group]:
    """The lines of a sweep by learning rate, in its order."""
    named: dict[str, list[Line]] = {}
    for line in lines:
        named.setdefault(config.optimizer.schedule or str(line["learning_rate"]), []).append(line)
    count = max((line["epoch"] for line in lines), default=0)
    return [
        Group(
            name,
            [[line for line in found if is_row(line) and line["epoch"] == epoch] for epoch in range(1, count + 1)],
            [line for line in found if "diverged" in line],
        )
        for name, found in named.items()
    ]


def is_row(line: Line) -> bool:
    """Whether a line has the scores of an epoch; the others are recorded steps and members that diverged."""
    return "train_loss" in line


def names(found: Sequence[Group]) -> list[str]:
    """The scores: train_loss, train_accuracy, test_loss, …"""
    row = next((row for group in found for rows in group.epochs for row in rows), {})
    return [name for name in row if metrics.is_score(name)]


def write(found: Sequence[Group], path: Path) -> None:
    """A line a learning rate and score, of the members that live; s.d. is that of a sample, divided by n − 1."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for group in found:
            for name in names(found):
                counts = (len(group.last), len(group.diverged))
                table.writerow((group.learning_rate, name, *counts, *statistics(group.last, name).values()))


def table(found: Sequence[Group], title: str) -> Table:
    """The test score for a person, over the members that live, and the mean of the test loss."""
    score = main_score(found)
    shown = Table(title=f"{title}, {score.replace('_', ' ')} over the seeds")
    for column in ("learning rate", "diverged", "mean", "s.d.", "min", "max", "test loss"):
        shown.add_column(column, justify="right")
    for group in found:
        cells = [_cell(score, value) for value in statistics(group.last, score).values()]
        gone = f"{len(group.diverged)} of {len(group.last) + len(group.diverged)}" if group.diverged else ""
        loss = _cell("test_loss", statistics(group.last, "test_loss")["mean"])
        shown.add_row(group.learning_rate, gone, *cells, loss)
    return shown


def best(found: Sequence[Group]) -> str:
    """The learning rate with the best mean of the test score, and the best member."""
    score = main_score(found)
    choose: Callable[..., Any] = min if score.endswith("rmse") else max
    group = choose((g for g in found if g.last), key=lambda g: statistics(g.last, score)["mean"])
    row = choose((row for g in found for row in g.last), key=lambda row: row[score])
    shown = score.replace("_", " ")
    return (
        f"best mean {shown}: {_cell(score, statistics(group.last, score)['mean'])}, learning rate {group.learning_rate}"
        f"\nbest member: {_cell(score, row[score])}, seed {row['seed']}, learning rate {row['learning_rate']}"
    )


def main_score(found: Sequence[Group]) -> str:
    """test_accuracy, or test_rmse of a regression."""
    return "test_rmse" if "test_rmse" in names(found) else "test_accuracy"


def statistics(rows: Sequence[Line], name: str) -> dict[str, float | None]:
    """mean, sd, min and max over the rows; None where there are too few of them."""
    values = np.array([row[name] for row in rows], np.float64)
    if not values.size:
        return dict.fromkeys(("mean", "sd", "min", "max"))
    sd = float(values.std(ddof=1)) if values.size > 1 else None
    return {"mean": float(values.mean()), "sd": sd, "min": float(values.min()), "max": float(values.max())}


def _cell(name: str, value: float | None) -> str:
    return "–" if value is None else metrics.format_score(name, value)
