"""The pictures of a sweep."""

import json
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import NullLocator

from jaxbp.run.problem import SPLITS
from jaxbp.run.report import text
from jaxbp.run.report.figures import fit_vertical, laid_out, marker, over
from jaxbp.run.report.metrics import MemberRow
from jaxbp.run.report.plots import LABELS, UNITS
from jaxbp.run.store.runs import LARGER_IS_BETTER
from jaxbp.run.sweep import scores
from jaxbp.run.sweep.scores import Group

TICKS = 8  # numbers below an axis
WORDS = 80  # members up to which the squares of the heat map have numbers


def curves(found: Sequence[Group], heading: str) -> Figure:
    """The median over seeds and folds, in a band from the lowest to the highest value; a colour a setting."""
    splits, score = ("train", scores.held_out(found)), scores.main_score(found).partition("_")[2]
    members = max(len(g.last) + len(g.diverged) for g in found)
    spread = f"median over {members} {scores.repeated(found)}, band from the lowest to the highest"
    figure = laid_out(f"{heading}\n{spread if members > 1 else 'one seed'}", (11.0, 7.5))
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(found)))
    for row, split in zip(axes, splits, strict=True):
        for axis, name in zip(row, ("loss", score), strict=True):
            for group, colour in zip(found, colours, strict=True):
                _band(axis, group, f"{split}_{name}", colour)
            axis.set(title=f"{SPLITS[split]} set", ylabel=UNITS[name])
            axis.grid(alpha=0.3)
    lived = [row for group in found for rows in group.epochs for row in rows]
    fit_vertical(axes[0, 0], [_value(row, f"{split}_loss") for split in splits for row in lived])
    for axis in axes[1]:
        over(axis, "epoch", range(1, max(len(group.epochs) for group in found) + 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = max(1, min(len(found), 6, 120 // (max(map(len, labels)) + 6)))
    title = ", ".join(map(scores.shown_key, scores.keys(found)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title, fontsize="small")
    return figure


def _band(axis: Axes, group: Group, name: str, colour: np.ndarray) -> None:
    """Of the members that live, epoch by epoch; the legend says how many do not."""
    lived = [(epoch, [_value(row, name) for row in rows]) for epoch, rows in enumerate(group.epochs, 1) if rows]
    members = len(group.last) + len(group.diverged)
    gone = f", {len(group.diverged)} of {members} diverged" if group.diverged else ""
    at, values = [epoch for epoch, _ in lived], [v for _, v in lived]
    label = f"{group.label}{gone}"
    axis.plot(at, [np.median(v) for v in values], color=colour, label=label, marker=marker(at))
    axis.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0)


class Grid(NamedTuple):
    """The last scores of a sweep, laid out over one of its keys and all that else differs.

    values: (rows, columns, members), NaN for a member that diverged and where there is none.
    """

    key: str
    columns: list[Any]
    other: str
    rows: list[str]
    values: np.ndarray
    diverged: list[int]


def grid(found: Sequence[Group]) -> Grid:
    """Over the learning rate, or else the first key with numbers, or else the first; the rows are the other keys."""
    name, varied = scores.main_score(found), _varied(found)
    numeric = [k for k in varied if _are_numbers([group.setting.get(k) for group in found])]
    key = "learning_rate" if "learning_rate" in varied else next(iter(numeric), varied[0])
    columns: list[Any] = list({json.dumps(group.setting.get(key)): group.setting.get(key) for group in found}.values())
    if key in numeric:
        columns.sort()
    others = [k for k in varied if k != key]
    cells: dict[tuple[str, int], list[float]] = {}
    diverged = [0] * len(columns)
    for group in found:
        column = columns.index(group.setting.get(key))
        diverged[column] += len(group.diverged)
        for row in (*group.last, *group.diverged):
            label = ", ".join(text.shown(group.setting.get(k)) for k in others)
            own = ", ".join(map(str, row.repetition.values()))
            cells.setdefault((label or own, column), []).append(_value(row, name))
    rows = list(dict.fromkeys(label for label, _ in cells))
    values = np.full((len(rows), len(columns), max(map(len, cells.values()))), np.nan)
    for (label, column), cell in cells.items():
        values[rows.index(label), column, : len(cell)] = cell
    return Grid(key, columns, ", ".join(others), rows, values, diverged)


def against(found: Sequence[Group], heading: str) -> Figure:
    """The last score against what was swept, a dot a member, and as a heat map of it and what else differs."""
    name = scores.main_score(found)
    unit, drawn = UNITS[name.partition("_")[2]], grid(found)
    title = f"{scores.held_out(found)} set, {'kept' if any(group.final for group in found) else 'last'} epoch"
    figure = laid_out(heading, (11.0, max(4.5, 1.8 + 0.3 * len(drawn.rows))))
    left, right = figure.subplots(1, 2)
    _lines(left, drawn)
    left.set(xlabel=scores.shown_key(drawn.key), ylabel=unit, title=title)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN where all members of a square diverged
        medians = np.nanmedian(drawn.values, axis=2)
    image = _heat_map(right, medians, name)
    names = list(map(text.shown, drawn.columns))
    right.set_xticks(range(len(names)), names, rotation=90 if sum(map(len, names)) > 50 else 0)
    right.set_yticks(range(len(drawn.rows)), drawn.rows)
    members = f", median over the {scores.repeated(found)}" if drawn.other and drawn.values.shape[2] > 1 else ""
    right.set(xlabel=scores.shown_key(drawn.key), ylabel=drawn.other or scores.repeated(found))
    right.set_title(f"{title}{members}; gray: diverged", fontsize="medium")
    figure.colorbar(image, ax=right, label=unit)
    return figure


def _varied(found: Sequence[Group]) -> list[str]:
    """The keys with more than one value."""
    return [k for k in scores.keys(found) if len({json.dumps(group.setting.get(k)) for group in found}) > 1]


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _lines(axis: Axes, drawn: Grid) -> None:
    """A dot a member and a line through the medians; where other keys differ, a colour for each of their values."""
    numbers = _are_numbers(drawn.columns)
    at = np.array(drawn.columns, np.float64) if numbers else np.arange(len(drawn.columns), dtype=np.float64)
    series = drawn.values if drawn.other else drawn.values.transpose(2, 1, 0)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(series))) if drawn.other else ["tab:blue"]
    for label, values, colour in zip(drawn.rows if drawn.other else ["median"], series, colours, strict=True):
        lived = ~np.isnan(values).all(axis=1)
        dots = {"label": "a member", "color": "tab:gray"} if not drawn.other else {"color": colour, "alpha": 0.5}
        axis.plot(np.repeat(at, values.shape[1]), values.ravel(), ".", **dots)
        medians = np.nanmedian(values[lived], axis=1)
        axis.plot(at[lived], medians, color=colour, marker="o", markersize=4, label=label)
    for x, count in zip(at, drawn.diverged, strict=True):
        if count:
            axis.text(x, 0.02, f"{count} diverged", rotation=90, ha="center", transform=axis.get_xaxis_transform())
    if numbers and at.min() > 0:
        axis.set_xscale("log")
        axis.set_xlim(at.min() / 2, at.max() * 2)
    if not numbers or len(at) <= TICKS:
        axis.set_xticks(at, list(map(text.shown, drawn.columns)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    if len(series) <= LABELS:
        axis.legend(fontsize="small", title=drawn.other or None)


def _heat_map(axis: Axes, last: np.ndarray, name: str) -> AxesImage:
    """Bright is good; gray where there is no number."""
    good_is_large = name.partition("_")[2] in LARGER_IS_BETTER
    drawn = axis.imshow(last, cmap="viridis" if good_is_large else "viridis_r", aspect="auto")
    axis.set_facecolor("lightgray")
    middle = (np.nanmin(last) + np.nanmax(last)) / 2
    for (row, column), value in np.ndenumerate(last) if last.size <= WORDS else ():
        dark = value < middle if good_is_large else value > middle
        word = f"{value:.4g}" if np.isfinite(value) else "–"
        axis.text(column, row, word, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return drawn


def _value(row: MemberRow, name: str) -> float:
    """A score of a member in the units in which it is shown; NaN where it has none, as one that diverged."""
    return scores.of(row).get(name, np.nan) * (100 if name.endswith("accuracy") else 1)
