"""`jaxbp study`: per-sample gradients over a whole data set: a table, a summary, pictures."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from jaxbp import losses
from jaxbp.layers import Chain
from jaxbp.mlp import MLP
from jaxbp.network import Net
from jaxbp.run import config as configs
from jaxbp.run.config import Config, choose
from jaxbp.run.data import Dataset
from jaxbp.run.errors import UserError
from jaxbp.run.problem import SPLITS
from jaxbp.run.quantities import QUANTITIES, studied
from jaxbp.run.report import metrics, text
from jaxbp.run.report.metrics import StepRecord
from jaxbp.run.store import files, runs
from jaxbp.run.store.model import load
from jaxbp.run.study.measure import Results, Subject, measure, prepare
from jaxbp.run.study.table import Columns, print_summary, table, write_csv, write_parquet

WRITERS = {".csv": write_csv, ".parquet": write_parquet}
PICTURES = (
    *("norms", "hardest", "easiest", "class_cosine", "noise_scale", "gram_spectrum"),
    *("hessian", "ggn", "ntk", "influence"),
)


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
    config = _config(request.source)
    made = [out, *_pictures(out, config.train.plot_format).values()]
    taken = next((path for path in made if path.exists()), None)
    if taken is not None and not request.overwrite:
        raise UserError(f"--out: {taken} exists; name another file or pass --overwrite")
    subject = prepare(request.source, config, request.split)
    names = _fitting(subject, request.quantities)
    recorded = _recorded(request.source)
    described = _describe(subject, request.source, names)
    text.line(console, described)
    results = measure(subject, names, request.chunk)
    columns = table(subject, results.columns, set(names))
    with (
        files.writable(f"--out: {str(out)!r}"),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".study-") as staging,
    ):
        staged = Path(staging) / out.name
        write(columns, staged)
        _draw(subject, columns, results, names, recorded, _pictures(staged, config.train.plot_format))
        written = _moved(staged.parent, made)
    print_summary(subject, columns, results, console)
    pictures = ", ".join(written[1:]) or "no pictures"
    text.line(console, f"{out}, {pictures}")
    return out


def columns(request: Request, dataset: Dataset | None = None) -> Columns:
    """The table of a run alone, not written; of other data than the config names, where they are given."""
    _check(request)
    subject = prepare(request.source, _config(request.source), request.split, dataset)
    names = _fitting(subject, request.quantities)
    return table(subject, measure(subject, names, request.chunk).columns, set(names))


def _draw(
    subject: Subject,
    columns: Columns,
    results: Results,
    names: Sequence[str],
    recorded: Sequence[StepRecord],
    to: dict[str, Path],
) -> None:
    from jaxbp.run.report import figures  # matplotlib takes its time
    from jaxbp.run.study import pictures

    heading = f"{subject.source.resolve().stem}, {subject.state} · {subject.problem.title}"
    for name, figure in pictures.drawn(subject, columns, results, names, recorded, heading):
        figures.save(figure, to[name])


def _moved(staging: Path, made: Sequence[Path]) -> list[str]:
    """Moves what is there, the table last; the names, the table first. Pictures of an older table go."""
    written = [path for path in made if (staging / path.name).exists()]
    for path in reversed(written):
        os.replace(staging / path.name, path)
    for picture in made[1:]:
        if picture not in written:
            picture.unlink(missing_ok=True)
    return [path.name for path in written]


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


def _pictures(out: Path, kind: str) -> dict[str, Path]:
    return {name: out.with_name(f"{out.stem}_{name}.{kind}") for name in PICTURES}


def _fitting(subject: Subject, asked: Sequence[str] | None) -> list[str]:
    """The quantities asked for, or all that fit."""
    loss = losses.get(subject.net.loss).name
    last = _last(subject.net)
    fits = loss == "softmax_cross_entropy" and last in ("identity", "dense")
    if asked and "el2n" in asked and not fits:
        needed = "el2n needs the loss softmax_cross_entropy of the output identity, or of a dense layer"
        raise UserError(f"--quantities: {needed}, here {loss} of {last}")
    curved = [name for name in asked or () if QUANTITIES[name].curvature]
    if curved and not isinstance(subject.net, MLP):
        raise UserError(f'--quantities: {curved[0]} is curvature, which only model.kind "mlp" has')
    if "influence" in curved and subject.split != "train":
        raise UserError("--quantities: influence is that of training samples, --split train")
    if asked:
        return [name for name in studied() if name in asked]
    return [name for name in studied() if not QUANTITIES[name].curvature and (name != "el2n" or fits)]


def _last(net: Net) -> str:
    """The activation of the output of an MLP, or the last layer of another network."""
    if isinstance(net, MLP):
        return net.activations[-1].name
    last = net.layer.layers[-1] if isinstance(net.layer, Chain) else net.layer
    return type(last).__name__.lower()


def _recorded(source: Path) -> list[StepRecord]:
    """The steps of a run that recorded its noise scale."""
    path = source / runs.METRICS
    try:
        rows = [metrics.read(row) for row in runs.rows(path)]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return [row for row in rows if isinstance(row, StepRecord) and "noise_scale" in row.quantities]


def _describe(subject: Subject, source: Path, quantities: Sequence[str]) -> str:
    samples = f"{len(subject.x):,} {SPLITS[subject.split]} samples"
    return f"{source}, {subject.state}: {subject.problem.title} · {samples} · {', '.join(quantities)}"
