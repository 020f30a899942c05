"""The table of `jaxbp study`, a row a sample: how it is built, written and summed up."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxbp.run.problem import SPLITS
from jaxbp.run.study.measure import CLASSES_SHOWN, Subject

Columns = dict[str, np.ndarray]


def table(subject: Subject, columns: Columns, asked: set[str]) -> Columns:
    """Label and prediction, by the names of the classes or in the units of the targets; then the quantities."""
    model, output = subject.model, columns["output"]
    table: Columns = {"index": np.arange(len(output))}
    if model.classes:
        names = np.array(model.classes)
        table |= {"label": names[subject.y], "prediction": names[output.argmax(axis=1)]}
    else:
        predicted = output.astype(np.float64) if model.targets is None else model.targets.inverse(output)
        for name, values in (("target", subject.y), ("prediction", predicted)):
            table |= {f"{name}{k}": values[:, k] for k in range(values.shape[1])}
    table["loss"] = columns["loss"]
    if "squared_norms" in asked:
        table["squared_norm"] = columns["squared_norm"]
        table |= {f"squared_norm_layer_{k}": column for k, column in enumerate(columns["layers"].T, 1)}
    chosen = {"grand": "norm", "el2n": "el2n", "cosine": "cosine"}
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


def print_summary(subject: Subject, table: Columns, numbers: dict[str, float], console: Console) -> None:
    """Means by class, and the numbers of the split as a whole."""
    summary = Table(
        title=f"{SPLITS[subject.split]} samples: means, where nothing else is said", box=SIMPLE_HEAD, pad_edge=False
    )
    columns = _summary_columns(table)
    for name in ("", "samples", *columns):
        summary.add_column(name, justify="right" if name else "left", no_wrap=True)
    groups = {"all": np.arange(len(table["index"]))}
    classes = subject.model.classes or ()
    if len(classes) <= CLASSES_SHOWN:
        groups = {name: np.flatnonzero(subject.y == k) for k, name in enumerate(classes)} | groups
    for name, rows in groups.items():
        cells = [column(rows) if len(rows) else "" for column in columns.values()]
        summary.add_row(escape(name), f"{len(rows):,}", *cells, end_section=name == list(groups)[-2:][0] != "all")
    console.print(summary)
    for name, number in numbers.items():
        console.out(f"{name} {number:.4g}", highlight=False)


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
