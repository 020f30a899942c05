"""The table of `jaxbp study`, a row a sample: how it is built, written and summed up."""

from pathlib import Path

import numpy as np
from rich.console import Console

from jaxbp import losses
from jaxbp.run import targets
from jaxbp.run.problem import SPLITS
from jaxbp.run.report import text
from jaxbp.run.store import files
from jaxbp.run.study.measure import Results, Subject

Columns = dict[str, np.ndarray]
NAMED = 10  # of the samples that are left out
SUMMED = (  # of the summary: a title, the column of the table, what is made of its rows
    *(("loss", "loss", np.mean), ("norm", "norm", np.mean), ("median", "norm", np.median), ("max", "norm", np.max)),
    *(("squared norm", "squared_norm", np.mean), ("EL2N", "el2n", np.mean), ("cosine", "cosine_to_mean", np.mean)),
)


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
    chosen = {"grand": "norm", "el2n": "el2n", "cosine": "cosine_to_mean", "influence": "influence"}
    return table | {column: columns[column] for name, column in chosen.items() if name in asked}


def write_csv(table: Columns, path: Path) -> None:
    """Numbers in as many digits as bring them back exactly."""
    columns = [column.astype(str).tolist() for column in table.values()]
    path.write_text(files.csv_of([list(table), *zip(*columns, strict=True)]), encoding="utf-8")


def write_parquet(table: Columns, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = (column.tolist() if column.dtype.kind == "U" else column for column in table.values())
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(table, map(pyarrow.array, columns), strict=True))), str(path))


def print_summary(subject: Subject, table: Columns, results: Results, console: Console) -> None:
    """Means by class, the numbers of the split as a whole, and which samples are left out of both."""
    classes = subject.classes
    groups = [(name, results.finite & (subject.y == k)) for k, name in enumerate(classes)] + [("all", results.finite)]
    summed = [_summed(table, chosen) for _, chosen in groups]
    rows = [[name, f"{chosen.sum():,}", *of.values()] for (name, chosen), of in zip(groups, summed, strict=True)]
    text.line(console, f"\n{SPLITS[subject.split]} samples: means, where nothing else is said\n")
    text.table(console, ("class" if classes else "", "samples", *summed[-1]), rows)
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


def _summed(table: Columns, rows: np.ndarray) -> dict[str, str]:
    """What the summary says of some rows of the table, by the column's title."""
    found = {}
    if "label" in table:
        right = (table["label"] == table["prediction"])[rows]
        found["correct"] = f"{100 * right.mean():.1f} %" if rows.any() else ""
    for title, name, reduce in SUMMED:
        if name in table and (name != "squared_norm" or "norm" not in table):
            found[title] = f"{reduce(table[name][rows].astype(np.float64)):.3g}" if rows.any() else ""
    return found
