"""The pictures of a sweep."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from jaxbp.run.report import metrics
from jaxbp.run.report.figures import fit_vertical, laid_out, marker, whole_numbers
from jaxbp.run.report.plots import UNITS
from jaxbp.run.sweep import scores
from jaxbp.run.sweep.scores import Group

WORDS = 80  # members up to which the squares of the heat map have numbers


def curves(found: Sequence[Group], heading: str) -> Figure:
    """The median over the seeds, in a band from the lowest to the highest value; a colour a learning rate."""
    score = scores.main_score(found).removeprefix("test_")
    members = max(len(g.last) + len(g.diverged) for g in found)
    seeds = f"median over {members} seeds, band from the lowest to the highest" if members > 1 else "one seed"
    figure = laid_out(f"{heading}\n{seeds}", (11.0, 7.5))
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(found)))
    for row, split in zip(axes, ("train", "test"), strict=True):
        for axis, name in zip(row, ("loss", score), strict=True):
            for group, colour in zip(found, colours, strict=True):
                _band(axis, group, f"{split}_{name}", colour)
            axis.set(title={"train": "training set", "test": "test set"}[split], ylabel=UNITS[name])
            axis.grid(alpha=0.3)
    lived = [row for group in found for rows in group.epochs for row in rows]
    fit_vertical(axes[0, 0], [_value(row, f"{split}_loss") for split in ("train", "test") for row in lived])
    for axis in axes[1]:
        axis.set_xlabel("epoch")
        whole_numbers(axis, range(1, max(len(group.epochs) for group in found) + 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(found), 6), title="learning rate")
    return figure


def _band(axis: Axes, group: Group, name: str, colour: np.ndarray) -> None:
    """Of the members that live, epoch by epoch; the legend says how many do not."""
    lived = [(epoch, [_value(row, name) for row in rows]) for epoch, rows in enumerate(group.epochs, 1) if rows]
    members = len(group.last) + len(group.diverged)
    gone = f", {len(group.diverged)} of {members} diverged" if group.diverged else ""
    at, values = [epoch for epoch, _ in lived], [v for _, v in lived]
    label = f"{group.learning_rate}{gone}"
    axis.plot(at, [np.median(v) for v in values], color=colour, label=label, marker=marker(at))
    axis.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0)


def rates(found: Sequence[Group], heading: str) -> Figure:
    """The last test score against the learning rate, a dot a member, and member by member, seed × learning rate."""
    name = scores.main_score(found)
    unit = UNITS[name.removeprefix("test_")]
    seeds = sorted({row.seed for group in found for row in (*group.last, *group.diverged)})
    last = np.full((len(seeds), len(found)), np.nan)
    for column, group in enumerate(found):
        for row in group.last:
            last[seeds.index(row.seed), column] = _value(row, name)
    figure = laid_out(heading, (11.0, max(4.5, 1.8 + 0.3 * len(seeds))))
    left, right = figure.subplots(1, 2)
    _against_rate(left, found, last)
    left.set(xlabel="learning rate", ylabel=unit, title="test set, last epoch")
    drawn = _heat_map(right, last, name)
    names = [group.learning_rate for group in found]
    right.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 5 else 0)
    right.set_yticks(range(len(seeds)), [str(seed) for seed in seeds])
    right.set(xlabel="learning rate", ylabel="seed", title="test set, last epoch; gray: diverged")
    figure.colorbar(drawn, ax=right, label=unit)
    return figure


def _against_rate(axis: Axes, found: Sequence[Group], last: np.ndarray) -> None:
    """Of the scores (seeds, rates), NaN for a member that diverged."""
    rate = np.array([float(group.learning_rate) for group in found])
    order = np.argsort(rate)
    order = order[~np.isnan(last[:, order]).all(axis=0)]
    axis.plot(np.repeat(rate, len(last)), last.T.ravel(), ".", color="tab:gray", label="a seed")
    medians = np.nanmedian(last[:, order], axis=0)
    axis.plot(rate[order], medians, color="tab:blue", marker="o", markersize=4, label="median")
    for at, group in zip(rate, found, strict=True):
        if group.diverged:
            gone = f"{len(group.diverged)} diverged"
            axis.text(at, 0.02, gone, rotation=90, ha="center", transform=axis.get_xaxis_transform())
    axis.set_xscale("log" if rate.min() > 0 else "symlog")
    axis.set_xlim(rate.min() / 2, rate.max() * 2)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _heat_map(axis: Axes, last: np.ndarray, name: str) -> AxesImage:
    """Bright is good; gray where there is no number."""
    good_is_large = name.removeprefix("test_") in metrics.LARGER_IS_BETTER
    drawn = axis.imshow(last, cmap="viridis" if good_is_large else "viridis_r", aspect="auto")
    axis.set_facecolor("lightgray")
    middle = (np.nanmin(last) + np.nanmax(last)) / 2
    for (row, column), value in np.ndenumerate(last) if last.size <= WORDS else ():
        dark = value < middle if good_is_large else value > middle
        word = f"{value:.4g}" if np.isfinite(value) else "–"
        axis.text(column, row, word, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return drawn


def _value(row: metrics.MemberRow, name: str) -> float:
    """A score of a member in the units in which it is shown."""
    return scores.of(row)[name] * (100 if name.endswith("accuracy") else 1)
