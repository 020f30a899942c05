"""`jaxbp predict`: a trained network on new data, as CSV."""

import contextlib
import csv
import os
import sys
from pathlib import Path

import numpy as np

from jaxbp.run.data.archive import arrays
from jaxbp.run.errors import UserError
from jaxbp.run.store.model import Model, load


def predict(run: Path, data: Path, out: Path | None) -> None:
    """Writes a row a sample: index, then the predicted class, or the numbers of a regression in the targets' units.

    Raises:
      UserError: no finished run, no array x in the file, an x that does not fit the network, an output that can't be
        written.
    """
    model = load(run)
    x = _read(data)
    try:
        output = model.predict(x)
    except ValueError as error:
        raise UserError(f"{data}: {error}") from None
    try:
        with open(out, "w", newline="", encoding="utf-8") if out else contextlib.nullcontext(sys.stdout) as file:
            csv.writer(file, lineterminator="\n").writerows(_rows(model, output))
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(f"--out: {out} can't be written: {error.strerror}") from None


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
