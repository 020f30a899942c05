"""The pictures of `jaxbp study`. Each function takes numbers and a heading, and gives a figure."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from jaxbp.run.report.figures import laid_out, panels, short
from jaxbp.run.report.plots import class_matrix
from jaxbp.run.study.curvature import Spectrum

BINS = 60


def norms(groups: Mapping[str, np.ndarray], what: str, heading: str) -> Figure:
    """Histograms of the gradients' norms, one below the other by class, on one logarithmic axis; a line at the median.

    Norms of 0 and those that are not finite, which that axis has no place for, are counted beside the name.
    """
    everything = np.concatenate(list(groups.values()))
    drawn = everything[np.isfinite(everything) & (everything > 0)]
    low, high = (drawn.min(), drawn.max()) if drawn.size else (0.1, 1.0)
    high = high if high > low else 2 * low
    bins = int(np.clip(np.sqrt(len(everything) / len(groups)), 20, BINS))
    edges = np.geomspace(low, high, bins + 1)
    edges[[0, -1]] = low * (1 - 1e-6), high * (1 + 1e-6)  # rounded the other way
    height = 4 if len(groups) == 1 else 1.5 + 0.6 * len(groups)
    by_class = ", by class" if len(groups) > 1 else ""
    title = f"{heading}\ngradient norms of {len(everything):,} {what}{by_class}"
    figure = Figure(figsize=(8, height))
    figure.suptitle(title, fontsize="medium", y=1 - 0.1 / height, va="top", parse_math=False)
    rows = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.6 / height, top=1 - 0.7 / height, hspace=0.25)
    for axis, (name, values) in zip(rows[:, 0], groups.items(), strict=True):
        axis.hist(values[np.isfinite(values) & (values > 0)], edges.tolist(), color="tab:blue", alpha=0.6)
        median = np.median(values[np.isfinite(values)]) if np.isfinite(values).any() else 0
        if median > 0:
            axis.axvline(float(median), color="tab:red", linewidth=1)
        text = {"va": "top", "fontsize": "small", "parse_math": False, "transform": axis.transAxes}
        axis.text(0.01, 0.9, _counted(name, values), **text)
        axis.grid(alpha=0.3)
    rows[-1, 0].set(xscale="log", xlabel="norm of the gradient ‖gₙ‖ over all parameters; red: the median")
    rows[-1, 0].xaxis.set_minor_locator(NullLocator())  # ten axes of them take most of the time
    figure.supylabel(f"{what} in a bin", fontsize="medium")
    return figure


def _counted(name: str, values: np.ndarray) -> str:
    """The class, how many samples it has, and how many of them the axis has no place for."""
    zeros, bad = int(np.sum(values == 0)), int(np.sum(~np.isfinite(values)))
    notes = [f"n = {len(values):,}", *[f"{zeros:,} are 0"] * bool(zeros), *[f"{bad:,} not finite"] * bool(bad)]
    return f"{name} ({', '.join(notes)})".strip()


def class_cosine(cosines: np.ndarray, classes: Sequence[str], what: str, heading: str) -> Figure:
    """The mean cosine between the gradients of the samples of two classes; red is positive, blue negative."""
    limit = float(np.nanmax(np.abs(cosines), initial=0)) or 1.0
    size = max(5.5, 2.5 + 0.45 * len(classes))
    figure = laid_out(heading, (size + 1, size + 0.3))
    axis = figure.subplots()
    words = [f"{round(value, 2) + 0:.2f}" if np.isfinite(value) else "" for value in cosines.flat]
    drawn = class_matrix(axis, cosines, classes, "RdBu_r", (-limit, limit), words)
    axis.set(xlabel="class of m", ylabel="class of n")
    axis.set_title(f"mean cos(gₙ, gₘ) over pairs n ≠ m of {what}", fontsize="medium")
    figure.colorbar(drawn, ax=axis, shrink=0.8, label="mean cosine")
    return figure


def _ranked(axis: Axes, values: np.ndarray, unit: str, title: str) -> None:
    axis.plot(np.arange(1, len(values) + 1), values, color="tab:blue", marker=".", markersize=4)
    axis.set(xlabel="rank", ylabel=unit)
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.3)


def gram_spectrum(eigenvalues: np.ndarray, samples: int, what: str, heading: str) -> Figure:
    """The eigenvalues of the Gram matrix / n, those of the second moment of the gradients, largest first."""
    count = len(eigenvalues)
    resolution = float(eigenvalues.max(initial=0)) * count * np.finfo(np.float32).eps
    shown = eigenvalues[eigenvalues > resolution]
    some = "" if count == samples else f" {count:,} of"
    of = f"gradients of{some} {samples:,} {what}{', drawn at random' if some else ''}"
    figure, (axes,) = panels(1, 2, f"{heading}\n{of}")
    _ranked(axes[0], shown, "eigenvalue (squared norm)", "eigenvalues of the Gram matrix (⟨gₙ, gₘ⟩)ₙₘ / n")
    if shown.size:
        axes[0].set(xscale="log", yscale="log")
    share = 100 * np.cumsum(eigenvalues) / (eigenvalues.sum() or 1.0)
    _ranked(axes[1], share, "share of the trace (%)", "the largest eigenvalues together")
    axes[1].set(ylim=(0, 102), xscale="log" if count > 1 else "linear")
    return figure


def spectrum(found: Spectrum, samples: int, name: str, what: str, heading: str) -> Figure:
    """The density of the eigenvalues with a band of two standard errors; the largest ones and their share by layer."""
    figure, (axes,) = panels(1, 2, f"{heading}\n{name} of the mean loss of {samples:,} {what}")
    density, count = found.density, len(found.eigenvalues)
    low, high = (np.maximum(density.value + sign * 2 * density.error, 1e-12) for sign in (-1, 1))
    axes[0].fill_between(density.at, low, high, color="tab:blue", alpha=0.3, linewidth=0, label="± 2 standard errors")
    axes[0].plot(density.at, np.maximum(density.value, 1e-12), color="tab:blue", label="mean over probes")
    axes[0].set(xlabel="eigenvalue", ylabel="density", yscale="log")
    axes[0].set_ylim(bottom=max(float(density.value.max()) * 1e-7, 1e-12))
    axes[0].set_title(f"its spectral density, {len(density.nodes)} probes", fontsize="medium")
    axes[0].legend(fontsize="small")
    axes[1].plot(np.arange(1, count + 1), found.eigenvalues, "o", color="black", markersize=4, label="eigenvalue")
    axes[1].set(xlabel="rank", ylabel="eigenvalue", xticks=range(1, count + 1))
    axes[1].set_ylim(bottom=min(0, 1.1 * float(found.eigenvalues[-1])))
    axes[1].set_title("the largest eigenvalues; bars: share of the vector by layer", fontsize="medium")
    share, foot = axes[1].twinx(), np.zeros(count)
    colours = colormaps["viridis"](np.linspace(0.1, 0.95, found.shares.shape[1]))
    for layer, (column, colour) in enumerate(zip(found.shares.T, colours, strict=True), 1):
        share.bar(np.arange(1, count + 1), column, 0.8, foot, color=colour, alpha=0.5, label=f"layer {layer}")
        foot = foot + column
    share.set_ylim(0, 1)
    share.set_yticks([])
    axes[1].set_zorder(share.get_zorder() + 1)
    axes[1].patch.set_visible(False)
    share.legend(fontsize="x-small", loc="upper right")
    return figure


def kernel(matrix: np.ndarray, labels: np.ndarray | None, classes: Sequence[str], what: str, heading: str) -> Figure:
    """The tangent kernel, its rows ordered by class if there are labels, and its eigenvalues."""
    count = len(matrix)
    figure, (axes,) = panels(1, 2, f"{heading}\ntangent kernel of {count:,} {what}, summed over the outputs")
    drawn = axes[0].imshow(matrix, cmap="viridis", interpolation="nearest")
    figure.colorbar(drawn, ax=axes[0], shrink=0.9)
    axes[0].set_title("Θ(xₙ, xₘ)" + ", by class" * (labels is not None), fontsize="medium")
    if labels is not None:
        edges = np.flatnonzero(np.diff(labels, prepend=-1))
        middles = (edges + np.append(edges[1:], count)) / 2
        names = [short(classes[labels[edge]]) for edge in edges]
        axes[0].set_xticks(middles, names, rotation=90, fontsize="small", parse_math=False)
        axes[0].set_yticks(middles, names, fontsize="small", parse_math=False)
        for edge in edges[1:]:
            axes[0].axhline(edge - 0.5, color="white", linewidth=0.4)
            axes[0].axvline(edge - 0.5, color="white", linewidth=0.4)
    values = np.linalg.eigvalsh(matrix)[::-1]
    shown = values[values > values[0] * count * np.finfo(np.float32).eps]
    _ranked(axes[1], shown, "eigenvalue", "its eigenvalues")
    axes[1].set(xscale="log", yscale="log")
    return figure
