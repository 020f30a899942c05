"""Labels of any kind, as numbers from 0 on: text, booleans, integers, floats that are whole numbers."""

from typing import NamedTuple

import numpy as np

from jaxbp.run.errors import UserError

MAX_CLASSES = 2**16  # more different labels are identifiers, or numbers
SHOWN = 10  # classes in an error


class Targets(NamedTuple):
    """(N,) int32 labels with classes, (N, T) of them where each position has one, or (N, C) float64 targets without."""

    y: np.ndarray
    classes: tuple[str, ...] | None


def numbered(where: str, labels: np.ndarray) -> Targets:
    """Labels (N,) as numbers; the classes are those that occur, in their order.

    Raises:
      UserError: more classes than MAX_CLASSES; `where` names the labels.

    Example:
      >>> numbered("y", np.array([3.0, -1.0, 3.0]))
      Targets(y=array([1, 0, 1], dtype=int32), classes=('-1', '3'))
    """
    found, y = np.unique(labels, return_inverse=True)
    check_count(where, len(found))
    return Targets(y.astype(np.int32), tuple(map(_name, found.tolist())))


def check_count(where: str, classes: int) -> None:
    """Raises unless there may be so many classes."""
    if classes > MAX_CLASSES:
        raise UserError(f"{where} has {classes:,} different labels; allowed: {MAX_CLASSES:,}")


def are_labels(y: np.ndarray, most: int) -> bool:
    """Whether numbers (N,) are whole ones, at most so many different ones."""
    return most > 0 and bool(np.all(y == np.floor(y))) and len(np.unique(y)) <= most


def like(where: str, train: Targets, test: Targets) -> Targets:
    """The labels of a test set by the numbers that they have in the training set; UserError for one that it lacks."""
    assert train.classes is not None and test.classes is not None
    number = {name: k for k, name in enumerate(train.classes)}
    y = np.array([number.get(name, -1) for name in test.classes], np.int32)[test.y]
    if (y < 0).any():
        row = int(y.argmin())
        there = ", ".join(train.classes[:SHOWN]) + (", …" if len(train.classes) > SHOWN else "")
        raise UserError(f"{where}: row {row} is the label {test.classes[test.y[row]]}; y has {there}")
    return Targets(y, train.classes)


def _name(label: object) -> str:
    if isinstance(label, bytes):
        return label.decode(errors="replace")
    return str(int(label)) if isinstance(label, float) else str(label)
