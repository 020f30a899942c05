"""`jaxbp report`: runs as one page of HTML that needs no other file. Jinja fills the template page.html.j2."""

import base64
import datetime
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image
from rich.console import Console

from jaxbp.run import compare
from jaxbp.run import evaluate as evaluations
from jaxbp.run.errors import UserError
from jaxbp.run.report import figures, text
from jaxbp.run.store import files, runs
from jaxbp.run.store.runs import Run

MOST_BYTES = 2 * 10**6  # of a page; pictures of later runs are left out beyond
CAPTIONS = {  # of the pictures in a folder, by the last words of their names
    "learning_curves": "Loss and score after each epoch.",
    "layers": "Root mean square of δ and of the gradient in each layer, by epoch.",
    "first_layer": "Weights of the first layer, an image a unit: red positive, blue negative.",
    "confusion": "Confusion matrix of the test set.",
    "residuals": "Predictions and residuals of the test set.",
    "worst": "The test samples with the largest loss: index, label and prediction.",
    "noise_scale": "Noise scale of the gradient, by step.",
    "recorded": "What the steps recorded.",
    "sweep": "Loss and score of the members of the sweep, by epoch.",
    "scores": "Scores of the members of the sweep.",
    "norms": "Norms of the gradients of single samples.",
    "hardest": "The samples with the largest gradients.",
    "easiest": "The samples with the smallest gradients.",
    "class_cosine": "Mean cosine between the gradients of the samples of two classes.",
    "gram_spectrum": "Eigenvalues of the Gram matrix of the gradients.",
}


class Table(NamedTuple):
    """Cells as they are shown; the first of a row is its name."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """An image within the page: its data, its size in pixels and what it shows."""

    source: str
    width: int
    height: int
    caption: str


class Part(NamedTuple):
    """A section of the page."""

    name: str
    lines: list[str]
    tables: list[Table]
    pictures: list[Picture]
    texts: dict[str, str]


def report(places: Sequence[Path], out: Path, overwrite: bool, console: Console) -> None:
    """Writes the page; UserError for a folder without a run, or a file that is there already or can't be written."""
    files.check_new(out, (".html",), overwrite)
    sweeps = [runs.read(place) for place in places if (place / runs.MEMBERS).is_dir()]
    found = [runs.read(path) for path in runs.folders(places)]
    parts = [_comparison(found, sweeps)] if len(found) > 1 else []
    parts += [_part(run) for run in found if run.path.parent.name != runs.MEMBERS]
    parts, left_out = _small(parts)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("page.html.j2")
    now = datetime.datetime.now(datetime.UTC)
    title = "One run" if len(found) == 1 else f"{len(found)} runs"
    page = template.render(title=title, made=f"jaxbp report, {now:%Y-%m-%d %H:%M} UTC", parts=parts)
    with files.writable(f"--out: {str(out)!r}"):
        files.replace(out, page)
    text.line(console, f"{out}: {len(page.encode()):,} bytes" + f", without {left_out} pictures" * bool(left_out))


def _comparison(found: Sequence[Run], sweeps: Sequence[Run]) -> Part:
    """All runs beside each other, and the pictures of their sweeps."""
    compared = compare.comparison(found)
    tables = [_rows("Each run, and the keys in which they differ", compared.rows)]
    if compared.groups:
        tables.append(_rows("Mean ± standard deviation of runs that differ in seed and fold alone", compared.groups))
    pictures = [picture for sweep in sweeps for picture in _pictures(sweep.path)]
    if any(row["epoch"] for row in compared.rows):
        figures.save(compare.curves(compared), content := io.BytesIO())
        pictures.insert(0, _png(content, "Curves of all runs over one another."))
    return Part("Comparison", compared.lines[1:], tables, pictures, {})


def _rows(caption: str, rows: Sequence[compare.Row]) -> Table:
    return Table(caption, list(rows[0]), [[text.cell(*item) for item in row.items()] for row in rows])


def _part(run: Run) -> Part:
    """A run: its scores, on the test set by class, its pictures, config and environment."""
    tables, lines = [], [f"{run.path}: {run.state}, {run.last.get('epoch', 0)} epochs."]
    texts = {
        "Config": (run.path / "config.toml").read_text(encoding="utf-8"),
        "Environment": "\n".join(runs.environment(run)),
    }
    columns, rows = text.scores(run.scores)
    if rows:
        tables.append(Table("Scores", columns, rows))
    try:
        name, measured = evaluations.measured(run.path)
        captions = {"scores": f"On {name}", "classes": "By class", "calibration": "Calibration"}
        captions["confusion"] = "Confusion matrix, a row a label"
        tables += [Table(captions[kind], *evaluations.cells(of)) for kind, of in measured.items()]
    except UserError as error:  # no parameters yet, or data that are not here any more: the rest is worth a page
        lines.append(f"Not evaluated: {error}")
    pictures = _pictures(run.path)
    if not pictures:
        lines.append("It has no pictures.")
    return Part(run.path.resolve().name, lines, tables, pictures, texts)


def _pictures(folder: Path) -> list[Picture]:
    """The pictures of a run, the best known first."""
    found = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".svg"))
    known = {path: caption for name, caption in CAPTIONS.items() for path in found if path.stem.endswith(name)}
    others = {path: f"{path.stem.replace('_', ' ').capitalize()}." for path in found if path not in known}
    return [_picture(*each) for each in (known | others).items()]


def _picture(path: Path, caption: str) -> Picture:
    if path.stem.startswith("study_"):
        caption = f"{path.stem.split('_')[1].capitalize()} set: {caption[0].lower()}{caption[1:]}"
    if path.suffix == ".png":
        return _png(path, caption)
    content = path.read_bytes()
    size = [round(float(number)) for number in re.findall(rb'(?:width|height)="([\d.]+)pt"', content)[:2]]
    width, height = size if len(size) == 2 else (900, 400)
    return Picture(_data("image/svg+xml", content), width, height, caption)


def _png(file: Any, caption: str) -> Picture:
    """With 256 colours: a third of the bytes."""
    image, content = Image.open(file).convert("RGB"), io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(content, "png", optimize=True)
    return Picture(_data("image/png", content.getvalue()), *image.size, caption)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _small(parts: Sequence[Part]) -> tuple[list[Part], int]:
    """The parts with as many pictures as a page holds, and how many are left out."""
    room, left_out, kept = MOST_BYTES - 10**5, 0, []
    for part in parts:
        pictures = []
        for picture in part.pictures:
            room -= len(picture.source)
            if room > 0:
                pictures.append(picture)
        missing = len(part.pictures) - len(pictures)
        said = f"Left out, because a page has 2 MB: {missing} of its pictures. They are in its folder."
        kept.append(part._replace(pictures=pictures, lines=[*part.lines, *[said] * bool(missing)]))
        left_out += missing
    return kept, left_out
