"""The table of `jaxbp study`, a row a sample: how it is built, written and summed up."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxbp import losses
from jaxbp.run import targets
from jaxbp.run.problem import SPLITS
from jaxbp.run.report import text
from jaxbp.run.study.measure import Results, Subject

Columns = dict[str, np.ndarray]
NAMED = 10  # of the samples that are left out


def table(subject: Subject, columns: Columns, asked: set[str]) -> Columns:
    """Label and prediction, by the names of the classes or in the units of the targets; then the quantities.

    Of a sequence, which has a label for each position, the share of right ones instead.
    """
    model, output = subject.model, columns["output"]
    table: Columns = {"index": np.arange(len(output))}
    if model.classes and subject.y.ndim > 1:
        table["accuracy"] = np.mean(output == subject.y, axis=1)
    elif model.classes:
        names = np.array(model.classes)
        guesses = targets.guesses(losses.get(model.net.loss).name, output)
        table |= {"label": names[subject.y], "prediction": names[guesses]}
    else:
        predicted = targets.predicted(losses.get(model.net.loss).name, output, model.targets)
        for name, values in (("target", subject.y), ("prediction", predicted)):
            table |= {f"{name}{k}": values[:, k] for k in range(values.shape[1])}
    table["loss"] = columns["loss"]
    if "squared_norms" in asked:
        table["squared_norm"] = columns["squared_norm"]
        table |= {f"squared_norm_layer_{k}": column for k, column in enumerate(columns["layers"].T, 1)}
    chosen = {"grand": "norm", "el2n": "el2n", "cosine": "cosine", "influence": "influence"}
    return table | {
        "cosine_to_mean" if column == "cosine" else column: columns[column]
        for name, column in chosen.items()
        if name in asked
    }


def write_csv(table: Columns, path: Path) -> None:
    """Numbers in as many digits as bring them back exactly."""
    columns = [column.astype(str).tolist() for column in table.values()]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*columns, strict=True))


def write_parquet(table: Columns, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        name: pyarrow.array(column.tolist() if column.dtype.kind == "U" else column) for name, column in table.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), str(path))


def print_summary(subject: Subject, table: Columns, results: Results, console: Console) -> None:
    """Means by class, the numbers of the split as a whole, and which samples are left out of both."""
    columns = _summary_columns(table)
    groups = [("all", results.finite)]
    classes = subject.classes
    groups = [(name, results.finite & (subject.y == k)) for k, name in enumerate(classes)] + groups
    rows = []
    for name, chosen in groups:
        cells = [column(chosen) if chosen.any() else "" for column in columns.values()]
        rows.append([name, f"{chosen.sum():,}", *cells])
    text.line(console, f"\n{SPLITS[subject.split]} samples: means, where nothing else is said\n")
    text.table(console, ("class" if classes else "", "samples", *columns), rows)
    for name, number in results.numbers.items():
        text.line(console, _line(name, number))
    if not results.finite.all():
        bad = np.flatnonzero(~results.finite)
        which = ", ".join(map(str, bad[:NAMED])) + (", …" if len(bad) > NAMED else "")
        line = f"left out: {len(bad):,} of {len(results.finite):,} samples, their gradients are not finite: {which}"
        text.line(console, line)


def _line(name: str, number: float) -> str:
    if np.isnan(number):
        why = "|G|² can't be seen for the noise" if name.startswith("noise scale") else "not finite"
        return f"{name}: not estimated, {why}"
    return f"{name}: {number:.4g}"


def _summary_columns(table: Columns) -> dict[str, Callable[[np.ndarray], str]]:
    """What the summary says of some rows of the table, by the column's title."""

    def reduced(name: str, reduce: Callable[..., Any]) -> Callable[[np.ndarray], str]:
        return lambda rows: f"{reduce(table[name][rows].astype(np.float64)):.3g}"

    columns: dict[str, Callable[[np.ndarray], str]] = {}
    if "label" in table:
        right = table["label"] == table["prediction"]
        columns["correct"] = lambda rows: f"{100 * right[rows].mean():.1f} %"
    columns["loss"] = reduced("loss", np.mean)
    if "norm" in table:
        columns |= {"norm": reduced("norm", np.mean), "median": reduced("norm", np.median)}
        columns["max"] = reduced("norm", np.max)
    if "squared_norm" in table and "norm" not in table:
        columns["squared norm"] = reduced("squared_norm", np.mean)
    if "el2n" in table:
        columns["EL2N"] = reduced("el2n", np.mean)
    if "cosine_to_mean" in table:
        columns["cosine"] = reduced("cosine_to_mean", np.mean)
    return columns
