"""`jaxbp study`: per-sample gradients over a whole data set: a table, a summary, pictures."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxbp import losses
from jaxbp.layers import Chain
from jaxbp.mlp import MLP
from jaxbp.network import Net
from jaxbp.run.config import choose
from jaxbp.run.data import Dataset
from jaxbp.run.errors import UserError
from jaxbp.run.problem import SPLITS
from jaxbp.run.quantities import QUANTITIES, studied
from jaxbp.run.report import metrics, text
from jaxbp.run.report.metrics import StepRecord
from jaxbp.run.store import files, runs
from jaxbp.run.study.measure import Subject, measure, prepare
from jaxbp.run.study.table import Columns, print_summary, table, write_csv, write_parquet

WRITERS = {".csv": write_csv, ".parquet": write_parquet}
CHUNK = 1000  # samples at a time
PICTURES = (
    *("norms", "hardest", "easiest", "class_cosine", "noise_scale", "gram_spectrum"),
    *("hessian", "ggn", "ntk", "influence"),
)


def study(
    source: Path,
    console: Console,
    split: str = "train",
    quantities: Sequence[str] | None = None,
    out: Path | None = None,
    chunk: int = CHUNK,
    overwrite: bool = False,
) -> Path:
    """Measures a split of a run or config, writes table and pictures, prints the summary; the path of the table.

    The files are made in a hidden folder beside the table and moved when all are there, the table last.

    quantities: None: all that fit;  out: None: named after source and split.

    Raises:
      UserError: an unknown split or quantity, one that does not fit the loss; no finished run, a bad config; a table of
        an unknown kind, in a place that can't be written, or where there is one already.
    """
    name = f"study_{split}.csv"
    out = out or (source / name if source.is_dir() else Path(f"{source.stem}_{name}"))
    write = choose("--out", "extension", out.suffix, WRITERS)
    subject = prepare(source, split)
    names, recorded = _fitting(subject, quantities, chunk), _recorded(source)
    kind = subject.problem.config.train.plot_format
    made = _made(out, kind, overwrite)
    samples = f"{len(subject.x):,} {SPLITS[split]} samples"
    text.line(console, f"{source}, {subject.state}: {subject.problem.title} · {samples} · {', '.join(names)}")
    results = measure(subject, names, chunk)
    columns = table(subject, results.columns, set(names))
    with (
        files.writable(f"--out: {str(out)!r}"),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".study-") as staging,
    ):
        from jaxbp.run.report import figures  # matplotlib takes its time
        from jaxbp.run.study import pictures

        staged = Path(staging) / out.name
        write(columns, staged)
        for picture, figure in pictures.drawn(subject, columns, results, names, recorded):
            figures.save(figure, _path_of(picture, staged, kind))
        written = _moved(staged.parent, made)
    print_summary(subject, columns, results, console)
    text.line(console, f"{out}, {', '.join(written[1:]) or 'no pictures'}")
    return out


def columns(source: Path, split: str, quantities: Sequence[str] | None, dataset: Dataset | None) -> Columns:
    """The table of a run alone, not written; of other data than the config names, where they are given."""
    subject = prepare(source, split, dataset)
    names = _fitting(subject, quantities, CHUNK)
    return table(subject, measure(subject, names, CHUNK).columns, set(names))


def _made(out: Path, kind: str, overwrite: bool) -> list[Path]:
    """The table, and every picture that there may be; UserError where one of them is there already."""
    made = [out, *(_path_of(picture, out, kind) for picture in PICTURES)]
    taken = next((path for path in made if path.exists()), None)
    if taken is not None and not overwrite:
        raise UserError(f"--out: {taken} exists; name another file or pass --overwrite")
    return made


def _path_of(picture: str, out: Path, kind: str) -> Path:
    return out.with_name(f"{out.stem}_{picture}.{kind}")


def _moved(staging: Path, made: Sequence[Path]) -> list[str]:
    """Moves what is there, the table last; the names, the table first. Pictures of an older table go."""
    written = [path for path in made if (staging / path.name).exists()]
    for path in reversed(written):
        os.replace(staging / path.name, path)
    for picture in made[1:]:
        if picture not in written:
            picture.unlink(missing_ok=True)
    return [path.name for path in written]


def _fitting(subject: Subject, asked: Sequence[str] | None, chunk: int) -> list[str]:
    """The quantities asked for, or all that fit; UserError for one that does not, or for an impossible chunk."""
    for name in asked or ():
        choose("--quantities", "quantity", name, {name: QUANTITIES[name] for name in studied()})
    if not 1 <= chunk < 2**31:
        raise UserError(f"--chunk: got {chunk}, it should be from 1 to 2³¹ − 1")
    loss, last = losses.get(subject.net.loss).name, _last(subject.net)
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
