"""`jaxbp study`: per-sample gradients over a whole data set: a table, a summary, pictures."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from jaxbp import losses
from jaxbp.run import config as configs
from jaxbp.run.config import Config, choose
from jaxbp.run.errors import UserError
from jaxbp.run.problem import SPLITS
from jaxbp.run.quantities import QUANTITIES, studied
from jaxbp.run.report import metrics
from jaxbp.run.report.metrics import StepRecord
from jaxbp.run.store import files
from jaxbp.run.store.folder import METRICS
from jaxbp.run.store.model import load
from jaxbp.run.study.measure import CLASSES_SHOWN, Results, Subject, measure, prepare
from jaxbp.run.study.table import Columns, print_summary, table, write_csv, write_parquet

WRITERS = {".csv": write_csv, ".parquet": write_parquet}
PICTURES = ("norms", "hardest", "easiest", "class_cosine", "noise_scale", "gram_spectrum")
IMAGES = 24  # in the pictures of the hardest and the easiest


class Request(NamedTuple):
    """The arguments of `jaxbp study`; None: all quantities that fit, a table named after source and split."""

    source: Path
    split: str = "train"
    quantities: Sequence[str] | None = None
    out: Path | None = None
    chunk: int = 1000
    overwrite: bool = False


def study(request: Request, console: Console) -> Path:
    """Measures, writes the table and the pictures, prints the summary; returns the path of the table.

    The files are made in a hidden folder beside the table and moved when all are there, the table last.

    Raises:
      UserError: an unknown split or quantity, one that does not fit the loss; no finished run, a bad config; a table of
        an unknown kind, in a place that can't be written, or where there is one already.
    """
    _check(request)
    out = request.out or _default_out(request)
    write = choose("--out", "extension", out.suffix, WRITERS)
    taken = next((path for path in (out, *_pictures(out).values()) if path.exists()), None)
    if taken is not None and not request.overwrite:
        raise UserError(f"--out: {taken} exists; name another file or pass --overwrite")
    subject = prepare(request.source, _config(request.source), request.split)
    names = _fitting(subject, request.quantities)
    recorded = _recorded(request.source)
    console.out(_describe(subject, request.source, names), highlight=False)
    results = measure(subject, names, request.chunk)
    columns = table(subject, results.columns, set(names))
    with (
        files.writable(f"--out: {str(out)!r}"),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".study-") as staging,
    ):
        staged = Path(staging) / out.name
        write(columns, staged)
        _draw(subject, columns, results, names, recorded, _pictures(staged))
        written = _moved(staged, out)
    print_summary(subject, columns, results.numbers, console)
    console.out(f"{out}, {', '.join(written[1:]) if written[1:] else 'no pictures'}", highlight=False)
    return out


def _moved(staged: Path, out: Path) -> list[str]:
    """Moves what is there, the table last; the names, the table first. Pictures of an older table go."""
    made = [path.name for path in (out, *_pictures(out).values())]
    written = [name for name in made if staged.with_name(name).exists()]
    for name in reversed(written):
        os.replace(staged.with_name(name), out.with_name(name))
    for picture in _pictures(out).values():
        if picture.name not in written:
            picture.unlink(missing_ok=True)
    return written


def _check(request: Request) -> None:
    choose("--split", "split", request.split, SPLITS)
    for name in request.quantities or ():
        choose("--quantities", "quantity", name, {name: QUANTITIES[name] for name in studied()})
    if not 1 <= request.chunk < 2**31:
        raise UserError(f"--chunk: got {request.chunk}, it should be from 1 to 2³¹ − 1")


def _config(source: Path) -> Config:
    """The config of a run, or the one named."""
    if not source.is_dir():
        return configs.read(source)
    load(source)  # says what is missing in a folder that is no run's
    return configs.read(source / "config.toml")


def _default_out(request: Request) -> Path:
    name = f"study_{request.split}.csv"
    return request.source / name if request.source.is_dir() else Path(f"{request.source.stem}_{name}")


def _pictures(out: Path) -> dict[str, Path]:
    return {name: out.with_name(f"{out.stem}_{name}.png") for name in PICTURES}


def _fitting(subject: Subject, asked: Sequence[str] | None) -> list[str]:
    """The quantities asked for, or all that fit."""
    loss = losses.get(subject.net.loss).name
    sigma = subject.net.activations[-1].name
    fits = loss == "softmax_cross_entropy" and sigma == "identity"
    if asked and "el2n" in asked and not fits:
        raise UserError(
            f"--quantities: el2n needs the loss softmax_cross_entropy of the output identity, here {loss} of {sigma}"
        )
    return [name for name in studied() if (name in asked if asked else name != "el2n" or fits)]


def _recorded(source: Path) -> list[StepRecord]:
    """The steps of a run that recorded its noise scale."""
    path = source / METRICS
    if not path.is_file():
        return []
    try:
        rows = [metrics.read(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return [row for row in rows if isinstance(row, StepRecord) and "noise_scale" in row.quantities]


def _describe(subject: Subject, source: Path, quantities: Sequence[str]) -> str:
    trained = "as trained" if source.is_dir() else "at initialisation, untrained"
    samples = f"{len(subject.x):,} {SPLITS[subject.split]} samples of {subject.problem.dataset.name}"
    network = f"{'-'.join(map(str, subject.net.sizes))} {trained}"
    return f"{source}: {network} · {samples} · {losses.get(subject.net.loss).name} · {', '.join(quantities)}"


def _draw(
    subject: Subject,
    columns: Columns,
    results: Results,
    quantities: Sequence[str],
    recorded: Sequence[StepRecord],
    to: dict[str, Path],
) -> None:
    """The pictures that the quantities have, without their table where there are too many classes."""
    from jaxbp.run.study import plots  # matplotlib takes its time

    classes, what = subject.model.classes, f"{SPLITS[subject.split]} samples"
    shown = classes if classes and len(classes) <= CLASSES_SHOWN else None
    if "grand" in quantities:
        norm = columns["norm"]
        plots.norms(
            {name: norm[subject.y == k] for k, name in enumerate(shown)} if shown else {"": norm}, what, to["norms"]
        )
        for name, sign in (("hardest", -1), ("easiest", 1)):
            rows = np.argsort(sign * norm, kind="stable")[:IMAGES]
            _draw_images(
                subject, columns, rows, f"the {name} {what}: index, label → prediction, gradient norm", to[name]
            )
    if results.class_cosine is not None and classes:
        plots.class_cosine(results.class_cosine, classes, what, to["class_cosine"])
    if results.eigenvalues is not None:
        plots.gram_spectrum(results.eigenvalues, len(subject.x), what, to["gram_spectrum"])
    if "noise_scale" in quantities and recorded:
        plots.noise_scale(recorded, to["noise_scale"])


def _draw_images(subject: Subject, columns: Columns, rows: np.ndarray, title: str, path: Path) -> None:
    from jaxbp.run.study import plots

    if subject.problem.dataset.image_shape:
        chosen = {name: columns[name][rows].tolist() for name in ("index", "label", "prediction", "norm")}
        plots.images(subject.x[rows], chosen, title, subject.problem.dataset.image_shape, path)
