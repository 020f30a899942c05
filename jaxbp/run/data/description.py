"""`jaxbp data describe`: what is understood of a table, and what looks wrong in it, before anything is trained."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbp.names import short
from jaxbp.run.config import DataConfig
from jaxbp.run.data import dataset, tables
from jaxbp.run.data.labels import MAX_CLASSES
from jaxbp.run.errors import UserError

TITLES = ("column", "kind", "values", "missing")
FEW = 20  # different numbers, up to which those of a target may be labels
SHOWN = 5  # categories of a column


class Facts(NamedTuple):
    """Of a column. kind: "number", "category" or, where it can't be an input, "refused", and why.

    codes: numbers from 0 on that are equal where the values are;  different: how many there are.
    """

    name: str
    column: Any
    kind: str
    why: str
    codes: np.ndarray
    different: int

    @property
    def is_identifier(self) -> bool:
        """Whether each row has a text or a whole number of its own."""
        is_rounded = str(self.column.type).startswith(("half", "float", "double", "decimal"))
        return not is_rounded and self.different == len(self.codes) > 1


def describe(path: Path, targets: Sequence[str] = (), decimal: str = ".") -> tuple[list[list[str]], list[str]]:
    """What `jaxbp run` understands of a table: a row of TITLES for each column; lines on rows, targets, suspicions.

    Raises:
      UserError: a file that can't be read; a target that it does not have.
    """
    table = tables.read(path, decimal)
    tables.check_names(path, table, "--target", targets)
    facts = [_facts(path, table, name) for name in table.column_names]
    goals, others = [of for of in facts if of.name in targets], [of for of in facts if of.name not in targets]
    suspicious = [line for of in others for line in _suspicions(of, goals)]
    if goals:
        suspicious += _duplicates(path, goals, [of.name for of in others if of.why or of.is_identifier], decimal)
    lines = [f"{len(table):,} rows", *(f"target {goal.name}: {_target(goal)}" for goal in goals)]
    rows = [[of.name, of.kind, _values(of), f"{tables.missing_in(of.column):,}"] for of in facts]
    return rows, lines + [f"suspicious: {line}" for line in suspicious]


def _facts(path: Path, table: Any, name: str) -> Facts:
    column, why = table[name], ""
    try:
        [found] = tables.columns_of(path, table.select([name]), may_miss=True)
        kind = "category" if found.categories else "number"
    except UserError as error:
        kind, why = "refused", str(error).removeprefix(f"{path}: ")
    codes = tables.plain(column).combine_chunks().dictionary_encode("encode").indices.to_numpy().astype(np.int64)
    return Facts(name, column, kind, why, codes, int(codes.max()) + 1)


def _values(of: Facts) -> str:
    """The range of numbers; of categories the most frequent ones."""
    import pyarrow.compute as pc

    if of.kind == "refused":
        return f"{of.different:,} different"
    if of.kind == "number":
        ends = pc.min_max(of.column).as_py().values()
        return f"{' to '.join(f'{end:.6g}' for end in ends)}, {of.different:,} different"
    counts = pc.value_counts(tables.texts(of.column).drop_null()).to_pylist()
    ordered = sorted((-count["counts"], count["values"]) for count in counts)
    shown = ", ".join(f"{' '.join(name.split())} {-count:,}" for count, name in ordered[:SHOWN])
    return f"{len(ordered):,} different: {shown}{', …' if len(ordered) > SHOWN else ''}"


def _target(goal: Facts) -> str:
    if goal.kind == "number":
        few = "; whole numbers are classes for softmax_cross_entropy" if goal.different <= FEW else ""
        return f"a regression, {_values(goal)}{few}"
    return f"classes, {_values(goal)}"


def _suspicions(of: Facts, goals: Sequence[Facts]) -> Iterator[str]:
    name = f"column {of.name!r}"
    if of.why:
        yield of.why
        return
    if of.different == 1:
        yield f"{name} is constant"
    if of.is_identifier:
        yield f"{name} is different in every row; data.drop leaves an identifier out"
    words = [word for word in tables.categories_of(of.column) if word] if of.kind == "category" else []
    no_numbers = [word for word in words if not tables.is_number(word)]
    if 0 < 2 * len(no_numbers) < len(words):
        yield f"{name} is text because of {short(no_numbers[0])}; most of its values are numbers"
    for goal in goals:
        pairs = len(np.unique(of.codes * goal.different + goal.codes))
        if pairs == of.different == goal.different and 1 < pairs < len(of.codes):
            yield f"{name} tells the target {goal.name!r}: each of its values goes with one of the target's"


def _duplicates(path: Path, goals: Sequence[Facts], left_out: Sequence[str], decimal: Any) -> Iterator[str]:
    """Rows with the same inputs, without the columns that are left out, as a run splits them into its two sets."""
    names = tuple(goal.name for goal in goals)
    config = DataConfig(str(path), target=names, drop=tuple(left_out), missing="mean", decimal=decimal)
    try:
        found = dataset.load(config, most_labels=MAX_CLASSES if goals[0].different <= FEW else 0)
    except UserError as error:
        yield str(error).removeprefix(f"{path}: ")
        return
    hashes = [[hash(row.tobytes()) for row in getattr(found, x)] for x in ("x_train", "x_test")]  # rows are large
    train, test = set(hashes[0]), hashes[1]
    if twice := len(goals[0].codes) - len(train | set(test)):
        both = sum(row in train for row in test)
        trained_on = f"{both:,} of {len(test):,} test samples are trained on"
        but = f" but for {', '.join(left_out)}" if left_out else ""
        yield f"{twice:,} rows repeat the inputs of another one{but}, {trained_on}"
