"""What all pictures share: a figure under its heading, axes that read well, images side by side, a file.

A figure is no figure of pyplot: the backend of whoever calls stays as it is, and nothing has to be closed.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

COLOURS = {"train": "tab:blue", "validation": "tab:green", "test": "tab:orange"}
PLAIN_RATIO = 30  # a logarithmic axis over less than that has plain numbers: 0.2, 0.5, 1
NAME_LENGTH = 11  # of a class below an image


def panels(
    rows: int, columns: int, heading: str, size: tuple[float, float] = (5.0, 3.4), right: float = 0.25
) -> tuple[Figure, np.ndarray]:
    """A figure of so many axes, each about `size` inches, with `right` inches beside them; no layout to be solved."""
    lines = heading.count("\n") + 1
    top, bottom, left, between = 0.35 + 0.2 * lines, 0.55, 0.8, (0.8, 0.85)
    width, height = columns * size[0] + right - 0.25, rows * size[1] + top
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    inner = (width - left - right) / columns, (height - top - bottom) / rows
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=between[0] / (inner[0] - between[0] * (columns - 1) / columns),
        hspace=between[1] / (inner[1] - between[1] * (rows - 1) / rows),
    )
    figure.suptitle(heading, fontsize="medium", y=1 - 0.1 / height, va="top", parse_math=False)
    return figure, axes


def laid_out(heading: str, size: tuple[float, float]) -> Figure:
    """A figure whose layout is solved, for names of any length beside its axes; that takes twice the time."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(heading, fontsize="medium", parse_math=False)
    return figure


def save(figure: Figure, path: Path | io.BytesIO) -> None:
    """Writes a PNG or, where the suffix says so, an SVG: the same bytes each time."""
    kind = "svg" if isinstance(path, Path) and path.suffix == ".svg" else "png"
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "jaxbp"}):
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a class name in a script that the font lacks
        figure.savefig(path, dpi=110, format=kind, metadata={"Date": None} if kind == "svg" else None)


def over(axis: Axes, name: str, values: Sequence[int]) -> None:
    """Names the horizontal axis, over epochs, steps or layers: a grid, and ticks at the ends and between them."""
    axis.set_xlabel(name)
    axis.grid(alpha=0.3)
    first, last = values[0], values[-1]
    span = last - first
    near = 0.1 * span
    ticks = [int(t) for t in MaxNLocator(7, integer=True).tick_values(first, last) if first + near < t < last - near]
    axis.set_xticks(sorted({first, *ticks, last}))
    axis.set_xlim(first - (0.03 * span or 1), last + (0.03 * span or 1))


def fit_vertical(axis: Axes, values: npt.ArrayLike) -> None:
    """A logarithmic scale, unless a value is negative (poisson has such losses) or all are 0.

    Where no value is finite, words say so. Over less than PLAIN_RATIO the numbers at its ticks are plain ones.
    """
    numbers = np.asarray(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        axis.text(0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", va="center")
        axis.set_yticks([])
    elif finite.min() >= 0 and finite.max() > 0:
        axis.set_yscale("log")
        ratio = finite.max() / finite[finite > 0].min()
        if ratio < PLAIN_RATIO:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if ratio > 4 else MaxNLocator(6))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def marker(values: Sequence[object]) -> str:
    """A dot where there is nothing to draw a line to."""
    return "o" if len(values) == 1 else ""


def gallery(
    images: np.ndarray, captions: Sequence[str], red: Sequence[bool], title: str, heading: str, colour_bar: str = ""
) -> Figure:
    """Images (K, height, width) in rows of at most 8, drawn as one, each below its caption, which may be red.

    With a colour bar, which is named, red is positive, blue negative, and 0 is white.
    """
    canvas, places = _laid_out(images, max(caption.count("\n") + 1 for caption in captions))
    width = max(1.2 * min(8, len(images)), 6.5)
    height = width * canvas.shape[0] / canvas.shape[1]
    whole = width + 0.2 + 1.2 * bool(colour_bar), height + 0.8
    figure = Figure(figsize=whole)
    axis = figure.add_axes((0.1 / whole[0], 0.1 / whole[1], width / whole[0], height / whole[1]))
    axis.set_axis_off()
    axis.set_title(title, fontsize="medium")
    figure.suptitle(heading, fontsize="medium", y=1 - 0.1 / whole[1], va="top", parse_math=False)
    limit = float(np.nanmax(np.abs(canvas), initial=0)) or 1.0
    if colour_bar:
        drawn = axis.imshow(canvas, cmap="RdBu_r", vmin=-limit, vmax=limit)
        bar = figure.add_axes(((width + 0.25) / whole[0], 0.3 / whole[1], 0.2 / whole[0], 0.6 * height / whole[1]))
        figure.colorbar(drawn, cax=bar, label=f"{colour_bar}: red positive, blue negative")
    else:
        axis.imshow(canvas, cmap="gray_r")
    for (x, y), caption, is_red in zip(places, captions, red, strict=True):
        text = axis.text(x, y, caption, ha="center", va="bottom", fontsize=7.5, color="tab:red" if is_red else "black")
        text.set_parse_math(False)
    return figure


def _laid_out(images: np.ndarray, lines: int) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """The images on one canvas, NaN between them, and where the middle of the foot of each caption is."""
    count, height, width = images.shape
    columns, above, gap = min(8, count), int(np.ceil(0.14 * lines * width)), max(1, width // 12)
    canvas = np.full((-(-count // 8) * (above + height), columns * (width + gap) - gap), np.nan)
    places = []
    for k, image in enumerate(images):
        top, left = k // 8 * (above + height) + above, k % 8 * (width + gap)
        canvas[top : top + height, left : left + width] = image
        places.append((left + width / 2 - 0.5, top - 0.6))
    return canvas, places


def short(name: str) -> str:
    """A class name that fits below an image."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
