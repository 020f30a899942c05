"""`jaxbp predict`: a trained network on new data, as CSV."""

import csv
import os
import sys
from pathlib import Path

import numpy as np

from jaxbp.run.data.archive import arrays
from jaxbp.run.errors import UserError
from jaxbp.run.store import files
from jaxbp.run.store.model import Model, finished, load


def predict(run: Path, data: Path, out: Path | None, overwrite: bool = False) -> None:
    """Writes a row a sample: index, then the predicted class, or the numbers of a regression in the targets' units.

    Raises:
      UserError: no run, no array x in the file, an x that does not fit the network, an output that is there already or
        can't be written.
    """
    files.check_new(out, (".csv",), overwrite)
    model = load(run)
    if not finished(run):
        print(f"jaxbp: warning: {run} is unfinished; these are its parameters so far", file=sys.stderr)
    x = _read(data)
    try:
        output = model.predict(x)
    except ValueError as error:
        raise UserError(f"{data}: {error}") from None
    rows = _rows(model, output)
    if out is None:
        _print(rows)
        return
    with files.writable(f"--out: {str(out)!r}"), files.replaced(out) as part:
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def _print(rows: list[list[object]]) -> None:
    try:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _rows(model: Model, output: np.ndarray) -> list[list[object]]:
    if model.classes:
        return [["index", "class"], *([i, model.classes[k]] for i, k in enumerate(output.argmax(axis=1)))]
    return [
        ["index", *(f"y{k}" for k in range(output.shape[1]))],
        *([i, *row] for i, row in enumerate(output.tolist())),
    ]


def _read(path: Path) -> np.ndarray:
    x = arrays(path, ["x"])["x"]
    if x.dtype.kind not in "fiub":
        raise UserError(f"{path}: x has dtype {x.dtype}, expected numbers")
    bad = np.argwhere(~np.isfinite(x))
    if bad.size:
        raise UserError(f"{path}: row {bad[0][0]} of x is not finite (NaN or infinite)")
    return x.reshape(len(x), -1) if x.ndim > 2 else x
