"""The pictures of `jaxbp study`. Each function takes numbers and writes one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from jaxbp.run.report import plots
from jaxbp.run.report.plots import noise_scale, save

__all__ = ["class_cosine", "gram_spectrum", "images", "noise_scale", "norms"]

BINS = 60
DIGITS = 12  # classes up to which the cosines are printed in their squares


def norms(groups: Mapping[str, np.ndarray], what: str, path: Path) -> None:
    """Histograms of the gradients' norms, one below the other by class, on one logarithmic axis; a line at the median.

    Norms of 0, which that axis has no place for, are counted beside the name.
    """
    everything = np.concatenate(list(groups.values()))
    positive = everything[everything > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    high = high if high > low else 2 * low
    bins = int(np.clip(np.sqrt(len(everything) / len(groups)), 20, BINS))
    edges = np.geomspace(low, high, bins + 1)
    edges[[0, -1]] = low * (1 - 1e-6), high * (1 + 1e-6)  # rounded the other way
    height = 4 if len(groups) == 1 else 1.5 + 0.6 * len(groups)
    figure, rows = plt.subplots(
        len(groups), 1, figsize=(8, height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, values) in zip(rows[:, 0], groups.items(), strict=True):
        shown, zeros = values[values > 0], int(np.sum(values == 0))
        axis.hist(shown, edges.tolist(), color="tab:blue", alpha=0.6)
        if values.size and np.median(values) > 0:
            axis.axvline(float(np.median(values)), color="tab:red", linewidth=1)
        label = f"{name}{f' ({zeros:,} are 0)' if zeros else ''}"
        axis.text(0.01, 0.9, label.strip(), transform=axis.transAxes, va="top", fontsize="small")
        axis.grid(alpha=0.3)
    rows[-1, 0].set(xscale="log", xlabel="norm of the gradient ‖gₙ‖ over all parameters; red: the median")
    figure.supylabel(f"{what} in a bin", fontsize="medium")
    figure.suptitle(f"gradient norms of {len(everything):,} {what}{', by class' if len(groups) > 1 else ''}")
    save(figure, path)


def images(
    x: np.ndarray, rows: Mapping[str, Sequence[Any]], title: str, image_shape: tuple[int, int], path: Path
) -> None:
    """Images in the order given, with index, label, prediction (where there are any) and norm."""
    columns = (rows["index"], rows["label"], rows["prediction"], rows["norm"])
    captions = [f"{i}: {label} → {guess}\n{norm:.3g}" for i, label, guess, norm in zip(*columns, strict=True)]
    plots.samples(x, captions, title, image_shape, path)


def class_cosine(cosines: np.ndarray, classes: Sequence[str], what: str, path: Path) -> None:
    """The mean cosine between the gradients of the samples of two classes; red is positive, blue negative."""
    limit = float(np.nanmax(np.abs(cosines), initial=0)) or 1.0
    size = max(5.5, 2.5 + 0.45 * len(classes))
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    drawn = axis.imshow(cosines, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for (a, b), value in np.ndenumerate(cosines):
        if len(classes) <= DIGITS and np.isfinite(value):
            axis.text(
                b, a, f"{round(value, 2) + 0:.2f}", ha="center", va="center", fontsize=7, color=_ink(value, limit)
            )
    places = range(len(classes))
    axis.set_xticks(places, classes, rotation=90 if max(map(len, classes)) > 3 else 0)
    axis.set_yticks(places, classes)
    axis.set(xlabel="class of m", ylabel="class of n", title=f"mean cos(gₙ, gₘ) over pairs n ≠ m of {what}")
    figure.colorbar(drawn, ax=axis, shrink=0.8, label="mean cosine")
    save(figure, path)


def gram_spectrum(eigenvalues: np.ndarray, samples: int, what: str, path: Path) -> None:
    """The eigenvalues of the Gram matrix / n, those of the second moment of the gradients, largest first."""
    count = len(eigenvalues)
    resolution = float(eigenvalues.max(initial=0)) * count * np.finfo(np.float32).eps
    shown = eigenvalues[eigenvalues > resolution]
    some = "" if count == samples else f" {count:,} of"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    axes[0].plot(np.arange(1, len(shown) + 1), shown, color="tab:blue", marker=".", markersize=4)
    axes[0].set(xlabel="rank", ylabel="eigenvalue (squared norm)", title="eigenvalues of (⟨gₙ, gₘ⟩)ₙₘ / n")
    if shown.size:
        axes[0].set(xscale="log", yscale="log")
    share = 100 * np.cumsum(eigenvalues) / (eigenvalues.sum() or 1.0)
    axes[1].plot(np.arange(1, count + 1), share, color="tab:blue", marker=".", markersize=4)
    axes[1].set(xlabel="rank", ylabel="share of the trace (%)", title="the largest eigenvalues together", ylim=(0, 102))
    if count > 1:
        axes[1].set_xscale("log")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"gradients of{some} {samples:,} {what}{', drawn at random' if some else ''}", fontsize="medium")
    save(figure, path)


def _ink(value: float, limit: float) -> str:
    return "white" if abs(value) > 0.7 * limit else "black"
