"""The picture of a sweep."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxbp.run.report.plots import log_if_positive, save, whole_epochs
from jaxbp.run.sweep import scores
from jaxbp.run.sweep.scores import Group

UNITS = {"loss": "loss", "accuracy": "accuracy (%)", "rmse": "RMSE (units of the target)"}


def curves(found: Sequence[Group], path: Path) -> None:
    """Draws loss and score of both sets against the epoch into a file."""
    save(draw(found), path)


def draw(found: Sequence[Group]) -> Figure:
    """The median over the seeds, in a band from the lowest to the highest value; a colour a learning rate."""
    score = scores.main_score(found).removeprefix("test_")
    figure = Figure(figsize=(11, 7.5), layout="constrained")  # not of pyplot, which would keep it
    axes = figure.subplots(2, 2, sharex=True)
    colours = colormaps.get_cmap("viridis")(np.linspace(0, 0.9, len(found)))
    for row, split in zip(axes, ("train", "test"), strict=True):
        for axis, name in zip(row, ("loss", score), strict=True):
            for group, colour in zip(found, colours, strict=True):
                _band(axis, group, f"{split}_{name}", colour)
            axis.set(title={"train": "training set", "test": "test set"}[split], ylabel=UNITS[name])
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    whole_epochs(axes.flat)
    members = max(len(g.last) + len(g.diverged) for g in found)
    figure.suptitle(f"median over {members} seeds, band from the lowest to the highest" if members > 1 else "one seed")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(found), 6), title="learning rate")
    return figure


def _band(axis: Axes, group: Group, name: str, colour: np.ndarray) -> None:
    """Of the members that live, epoch by epoch; the legend says how many do not."""
    factor = 100 if name.endswith("accuracy") else 1
    lived = [
        (epoch, [factor * scores.of(row)[name] for row in rows]) for epoch, rows in enumerate(group.epochs, 1) if rows
    ]
    members = len(group.last) + len(group.diverged)
    gone = f", {len(group.diverged)} of {members} diverged" if group.diverged else ""
    at, values = [epoch for epoch, _ in lived], [v for _, v in lived]
    axis.plot(
        at,
        [np.median(v) for v in values],
        color=colour,
        label=f"{group.learning_rate}{gone}",
        marker="o" if len(at) == 1 else "",
    )
    axis.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0)
    if name.endswith("loss"):
        log_if_positive(axis, [x for v in values for x in v])
