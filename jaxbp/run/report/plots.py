"""The pictures of a run. Each function takes numbers and writes one PNG."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxbp.run.report.metrics import EpochRow, StepRecord

COLOURS = {"train": "tab:blue", "test": "tab:orange"}


def learning_curves(rows: Sequence[EpochRow], path: Path) -> None:
    """Loss and score of the training and the test set against the epoch."""
    score = rows[0].test.main
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("loss", score), strict=True):
        for split, colour in COLOURS.items():
            values = np.array([getattr(getattr(row, split), name) for row in rows])
            values = 100 * values if name == "accuracy" else values
            axis.plot([row.epoch for row in rows], values, color=colour, label=split, marker=_marker(rows))
        axis.set(
            xlabel="epoch", ylabel={"accuracy": "accuracy (%)", "rmse": "RMSE (units of the target)"}.get(name, name)
        )
        axis.grid(alpha=0.3)
        axis.legend()
    log_if_positive(axes[0], [getattr(row, split).loss for row in rows for split in COLOURS])
    axes[0].set_title("mean loss of a sample")
    axes[1].set_title({"accuracy": "share classified correctly", "rmse": "root mean square error"}[score])
    whole_epochs(axes)
    save(figure, path)


def layer_rms(rows: Sequence[EpochRow], path: Path) -> None:
    """The RMS of δ and of the gradient of each layer against the epoch, on a logarithmic scale."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"delta_rms": "δ = ∂ℓ/∂s of a sample", "gradient_rms": "gradient of the mean loss of a batch"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = np.array([getattr(row, name) for row in rows])
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, values.shape[1]))
        for layer, colour in enumerate(colours):
            axis.plot(
                [row.epoch for row in rows],
                values[:, layer],
                color=colour,
                label=f"layer {layer + 1}",
                marker=_marker(rows),
            )
        axis.set(xlabel="epoch", ylabel="root mean square", title=title)
        log_if_positive(axis, values)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small", ncols=1 + values.shape[1] // 12)
    whole_epochs(axes)
    save(figure, path)


def first_layer(w: np.ndarray, image_shape: tuple[int, int], path: Path) -> None:
    """The weights of the first units of layer 1 as images; red is positive, blue negative, one scale for all."""
    shown = w[:64].reshape(-1, *image_shape)
    limit = float(np.abs(shown).max()) or 1.0
    figure, axes = grid(len(shown), "weights w⁽¹⁾ of the first layer, a unit each")
    for axis, image in zip(axes, shown, strict=False):
        drawn = axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="weight")
    save(figure, path)


def worst(
    x: np.ndarray,
    labels: Sequence[str],
    predicted: Sequence[str],
    losses: np.ndarray,
    image_shape: tuple[int, int],
    path: Path,
) -> None:
    """The images given, in the order given, with label, prediction and loss; the caller sorts by loss."""
    captions = [f"{label} → {guess}\n{loss:.3g}" for label, guess, loss in zip(labels, predicted, losses, strict=True)]
    samples(x, captions, "test images with the largest loss: label → prediction, loss", image_shape, path)


def samples(x: np.ndarray, captions: Sequence[str], title: str, image_shape: tuple[int, int], path: Path) -> None:
    """Images in the order given, each with its caption."""
    figure, axes = grid(len(x), title, size=1.25)
    for axis, image, caption in zip(axes, x, captions, strict=False):
        axis.imshow(image.reshape(image_shape), cmap="gray_r")
        axis.set_title(caption, fontsize=7)
    save(figure, path)


def noise_scale(recorded: Sequence[StepRecord], path: Path) -> None:
    """The noise scale of the recorded steps, beside the loss of their batches, against the step."""
    steps = np.array([row.step for row in recorded])
    window = 1 + 2 * (len(recorded) // 40)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    single = noise_scales(recorded, 1)
    axes[0].plot(steps, single, ".", color="tab:gray", alpha=0.4, markersize=3, label="of one batch")
    axes[0].plot(steps, noise_scales(recorded, window), color="tab:blue", label=f"tr Σ and |G|² averaged over {window}")
    axes[0].set(xlabel="step", ylabel="samples", title="noise scale tr Σ / |G|²")
    log_if_positive(axes[0], single)
    unseen = int(np.isnan(single).sum())
    note = f"; {unseen} of {len(single)} batches too small to see |G|²" if unseen else ""
    axes[0].legend(fontsize="small", title=f"{len(single)} records{note}", title_fontsize="x-small")
    losses = np.array([row.batch_loss for row in recorded], np.float64)
    axes[1].plot(steps, losses, color="tab:blue", marker=_marker(recorded))
    axes[1].set(xlabel="step", ylabel="loss", title="mean loss of a sample, of the same batches")
    log_if_positive(axes[1], losses)
    for axis in axes:
        axis.grid(alpha=0.3)
    whole_epochs(axes)
    save(figure, path)


def grid(count: int, title: str, size: float = 0.9) -> tuple[Figure, list[Axes]]:
    columns = min(8, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(size * columns + 1, 6), size * rows + 0.8), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(title)
    return figure, list(axes.flat)


def log_if_positive(axis: Axes, values: npt.ArrayLike) -> None:
    """A logarithmic scale, unless a value is negative (poisson has such losses) or all are 0."""
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    if finite.size and finite.min() >= 0 and finite.max() > 0:
        axis.set_yscale("log")


def _marker(rows: Sequence[Any]) -> str:
    return "o" if len(rows) == 1 else ""


def whole_epochs(axes: Iterable[Axes]) -> None:
    """No ticks between the epochs."""
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def noise_scales(recorded: Sequence[StepRecord], window: int) -> np.ndarray:
    """tr Σ / |G|² from means of both over `window` records (the ratio is biased); NaN where |G|² comes out negative."""
    parts = [[row.quantities["noise_scale"][key] for row in recorded] for key in ("trace", "squared_gradient")]
    trace, gradient = (_running_mean(np.array(part, np.float64), window) for part in parts)
    return np.divide(trace, gradient, out=np.full_like(trace, np.nan), where=gradient > 0)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Of the values that are numbers, around each place; narrower at both ends."""
    known, ones = np.nan_to_num(values), np.isfinite(values).astype(np.float64)
    places = np.arange(len(values))
    first, last = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    total, count = (np.concatenate([[0], np.cumsum(a)]) for a in (known, ones))
    counts = count[last] - count[first]
    return np.divide(total[last] - total[first], counts, out=np.full(len(values), np.nan), where=counts > 0)
