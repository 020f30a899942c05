"""The pictures of a run. Each function takes numbers and a heading, and gives a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxbp.run.report.figures import COLOURS, fit_vertical, gallery, laid_out, marker, over, panels, short
from jaxbp.run.report.metrics import EpochRow, StepRecord
from jaxbp.run.report.text import shown_score
from jaxbp.run.store.runs import LARGER_IS_BETTER

UNITS = {"loss": "loss", "accuracy": "accuracy (%)", "rmse": "RMSE (units of the target)"}
UNITS_SHOWN = 64  # of the first layer
DIGITS = 12  # classes up to which a matrix of classes has numbers in its squares
OUTPUTS_SHOWN = 3  # of a regression
POINTS = 5000  # of a scatter plot
LINE_FROM = 40  # records of a noise scale from which on means over several of them are drawn
STYLES = ("-", "--", "-.", ":")
LABELS = 12  # of lines in one legend


def learning_curves(rows: Sequence[EpochRow], heading: str, kept: int | None = None) -> Figure:
    """Loss and score of the sets against the epoch, with a line at the one that is kept; η where a schedule has it."""
    score, rates = getattr(rows[0], rows[0].held_out).main, [row.learning_rate for row in rows]
    figure, (axes,) = panels(1, 2 + (len(set(rates)) > 1), heading)
    epochs = [row.epoch for row in rows]
    for axis, name in zip(axes, ("loss", score), strict=False):
        for split in rows[0].splits:
            axis.plot(epochs, _scores(rows, split, name), color=COLOURS[split], label=split, marker=marker(rows))
        if kept is not None:
            axis.axvline(kept, color="tab:gray", linestyle="--", linewidth=1, label=f"kept: epoch {kept}")
        axis.set_ylabel(UNITS[name])
    _mark_best(axes[1], rows, score)
    fit_vertical(axes[0], [_scores(rows, split, "loss") for split in rows[0].splits])
    axes[0].set_title("mean loss of a sample")
    axes[1].set_title({"accuracy": "share classified correctly", "rmse": "root mean square error"}[score])
    for axis in axes[2:]:
        axis.plot(epochs, rates, color="tab:gray", label="η of the last step")
        axis.set(title="learning rate", ylabel="η")
    for axis in axes:
        axis.legend(fontsize="small")
        over(axis, "epoch", epochs)
    return figure


def _scores(rows: Sequence[EpochRow], split: str, name: str) -> np.ndarray:
    """In the units in which they are shown."""
    return np.array([getattr(getattr(row, split), name) for row in rows]) * (100 if name == "accuracy" else 1)


def _mark_best(axis: Axes, rows: Sequence[EpochRow], score: str) -> None:
    held_out = rows[0].held_out
    values = _scores(rows, held_out, score)
    if not np.isfinite(values).any():
        fit_vertical(axis, values)
        return
    best = int(np.nanargmax(values) if score in LARGER_IS_BETTER else np.nanargmin(values))
    shown = shown_score(score, getattr(getattr(rows[best], held_out), score))
    label = f"best {held_out}: {shown}, epoch {rows[best].epoch}"
    axis.plot(rows[best].epoch, values[best], "o", color=COLOURS[held_out], markerfacecolor="none", label=label)


def layer_rms(rows: Sequence[EpochRow], heading: str) -> Figure:
    """The RMS of δ and of the gradient of each layer against the epoch, on a logarithmic scale."""
    titles = {"delta_rms": "δ = ∂ℓ/∂s of a sample", "gradient_rms": "gradient of the mean loss of a batch"}
    titles = {name: title for name, title in titles.items() if getattr(rows[0], name) is not None}
    figure, (axes,) = panels(1, len(titles), heading, right=1.15)
    epochs = [row.epoch for row in rows]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = np.array([getattr(row, name) for row in rows])
        _line_a_layer(axis, epochs, values)
        axis.set(ylabel="root mean square", title=title)
        fit_vertical(axis, values)
        over(axis, "epoch", epochs)
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _line_a_layer(axis: Axes, at: Sequence[int], values: np.ndarray) -> None:
    """Of (steps, L) values; neighbours differ in colour and in style, and at most 9 of the layers are named."""
    layers = values.shape[1]
    named = np.unique(np.linspace(0, layers - 1, min(layers, 9)).round())
    for layer, colour in enumerate(colormaps["viridis"](np.linspace(0, 0.9, layers))):
        label = f"layer {layer + 1}" if layer in named else None
        style = STYLES[layer % 4] if layers <= 9 else "-"
        axis.plot(at, values[:, layer], style, color=colour, label=label, marker=marker(at))


def first_layer(w: np.ndarray, image_shape: tuple[int, int], heading: str) -> Figure:
    """The weights of the first units of layer 1 as images; red is positive, blue negative, one scale for all."""
    shown = w[:UNITS_SHOWN].reshape(-1, *image_shape)
    count = len(shown)
    units = f"units 1 to {count} of {len(w)}" if count < len(w) else f"all {count} units"
    captions = [str(unit) for unit in range(1, count + 1)]
    title = f"weights w⁽¹⁾ of the first layer, {units}"
    return gallery(shown, captions, [False] * count, title, heading, colour_bar="weight")


def images(
    x: np.ndarray,
    index: Sequence[int],
    labels: Sequence[str],
    guesses: Sequence[str],
    values: Sequence[float] | np.ndarray,
    title: str,
    heading: str,
) -> Figure:
    """The images (K, height, width) in the order given, with index, label, prediction and a value; red: wrong."""
    columns = zip(index, labels, guesses, values, strict=True)
    captions = [f"{i}: {short(label)} → {short(guess)}\n{value:.3g}" for i, label, guess, value in columns]
    return gallery(x, captions, [a != b for a, b in zip(labels, guesses, strict=True)], title, heading)


def confusion(labels: np.ndarray, guesses: np.ndarray, classes: Sequence[str], heading: str) -> Figure:
    """How many samples of each class were taken for which, and precision and recall of each class."""
    count = len(classes)
    matrix = np.zeros((count, count), np.int64)
    np.add.at(matrix, (labels, guesses), 1)
    sizes, taken, right = matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal()
    side = max(3.6, 0.36 * count + 1.4)
    figure = laid_out(heading, (2 * side + 2.2, side + 1.0))
    axes = figure.subplots(1, 2, width_ratios=(1, 0.7))
    words = [f"{n:,}" if n else "" for n in matrix.flat]
    class_matrix(axes[0], matrix / np.maximum(sizes, 1)[:, None], classes, "Blues", (0.0, 1.0), words)
    axes[0].set(xlabel="prediction", ylabel="label", title="test samples; colour: share of the label")
    for name, of, style, face in (("recall", sizes, "o", "tab:blue"), ("precision", taken, "d", "none")):
        share = np.divide(100 * right, of, out=np.full(count, np.nan), where=of > 0)
        axes[1].plot(share, np.arange(count), style, color="tab:blue", markerfacecolor=face, label=name)
    names = [f"{name} (n = {n:,})" for name, n in zip(classes, sizes, strict=True)]
    axes[1].set_yticks(np.arange(count), names, parse_math=False)
    axes[1].set(ylim=(count - 0.5, -0.5), xlabel="%", title="recall: of the label, precision: of the prediction")
    axes[1].title.set_fontsize("medium")
    axes[0].title.set_fontsize("medium")
    axes[1].grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    return figure


def class_matrix(
    axis: Axes, values: np.ndarray, classes: Sequence[str], cmap: str, limits: tuple[float, float], words: Sequence[str]
) -> Any:
    """Squares of two classes, with words in them where there are few classes; gives what a colour bar takes."""
    drawn = axis.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1])
    for ((a, b), value), word in zip(np.ndenumerate(values), words, strict=True):
        if word and len(classes) <= DIGITS:
            dark = abs(value) > 0.6 * limits[1]
            axis.text(b, a, word, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    places = range(len(classes))
    axis.set_xticks(places, classes, rotation=90 if max(map(len, classes)) > 3 else 0, parse_math=False)
    axis.set_yticks(places, classes, parse_math=False)
    return drawn


def residuals(y: np.ndarray, predicted: np.ndarray, heading: str) -> Figure:
    """Prediction against target and residual against prediction, of the first outputs, (N, C) in their units."""
    chosen = slice(None, None, -(-len(y) // POINTS))
    outputs = min(y.shape[1], OUTPUTS_SHOWN)
    figure, axes = panels(outputs, 2, heading)
    for k, (left, right) in enumerate(axes):
        target, guess = y[chosen, k], predicted[chosen, k]
        name = f" {k}" if y.shape[1] > 1 else ""
        ends = [min(target.min(), np.nanmin(guess)), max(target.max(), np.nanmax(guess))]
        left.plot(ends, ends, color="black", linewidth=0.8)
        left.set(xlabel=f"target{name}", ylabel=f"prediction{name}", title="test set; line: prediction = target")
        right.axhline(0, color="black", linewidth=0.8)
        right.set(xlabel=f"prediction{name}", ylabel="prediction − target", title="residuals of the test set")
        left.plot(target, guess, ".", color="tab:blue", alpha=0.5)
        right.plot(guess, guess - target, ".", color="tab:blue", alpha=0.5)
        for axis in (left, right):
            axis.title.set_fontsize("medium")
            axis.grid(alpha=0.3)
    return figure


def recorded(records: Sequence[StepRecord], heading: str) -> Figure | None:
    """A panel for each recorded quantity against the step; the noise scale has a picture of its own."""
    names = [name for name in records[0].quantities if name != "noise_scale"]
    if not names:
        return None
    columns = min(3, len(names))
    figure, axes = panels(-(-len(names) // columns), columns, heading, (4.4, 3.1))
    steps = [row.step for row in records]
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        _quantity(axis, steps, [row.quantities[name] for row in records])
        axis.set_title(name.replace("_", " "), fontsize="medium")
        over(axis, "step", steps)
    return figure


def _quantity(axis: Axes, steps: Sequence[int], values: Sequence[Any]) -> None:
    """A number, numbers by name, a number a layer, or a summary of the samples of a batch, step by step."""
    if isinstance(values[0], Mapping) and "q25" in values[0]:
        columns = {name: np.array([v[name] for v in values]) for name in ("min", "q25", "median", "q75", "max")}
        axis.fill_between(steps, columns["min"], columns["max"], color="tab:blue", alpha=0.12, linewidth=0)
        axis.fill_between(steps, columns["q25"], columns["q75"], color="tab:blue", alpha=0.3, linewidth=0)
        axis.plot(steps, columns["median"], color="tab:blue", marker=marker(steps), label="median; quartiles; extremes")
        fit_vertical(axis, np.stack(list(columns.values())))
        axis.legend(fontsize="x-small")
    elif isinstance(values[0], Mapping):
        for name, style in zip(values[0], STYLES, strict=False):
            axis.plot(steps, [v[name] for v in values], style, label=name.replace("_", " "), marker=marker(steps))
        axis.legend(fontsize="x-small")
    elif isinstance(values[0], Sequence):
        _line_a_layer(axis, steps, np.array(values))
        fit_vertical(axis, values)
        axis.legend(fontsize="x-small")
    else:
        axis.plot(steps, values, color="tab:blue", marker=marker(steps))
        fit_vertical(axis, values)


def noise_scale(recorded: Sequence[StepRecord], heading: str) -> Figure:
    """The noise scale of the recorded steps, beside the loss of their batches, against the step."""
    steps = [row.step for row in recorded]
    figure, (axes,) = panels(1, 2, heading)
    single, many = noise_scales(recorded, 1), len(recorded) >= LINE_FROM
    size, alpha = (3.0, 0.4) if many else (6.0, 1.0)
    axes[0].plot(steps, single, ".", color="tab:gray", alpha=alpha, markersize=size, label="of one batch")
    if many:
        window = 1 + 2 * max(len(recorded) // 40, 2)
        label = f"tr Σ and |G|² averaged over {window}"
        axes[0].plot(steps, noise_scales(recorded, window), color="tab:blue", label=label)
        axes[0].legend(fontsize="small")
    unseen = int(np.isnan(single).sum())
    note = f"; {unseen:,} of {len(single):,} batches too small to see |G|²" if unseen else ""
    axes[0].set_title(f"noise scale tr Σ / |G|² of {len(single):,} batches{note}", fontsize="small")
    axes[0].set_ylabel("samples")
    losses = np.array([row.batch_loss for row in recorded], np.float64)
    axes[1].plot(steps, losses, color="tab:blue", marker=marker(recorded))
    axes[1].set_ylabel("loss")
    axes[1].set_title("mean loss of the same batches, as it is trained on", fontsize="small")
    for axis, values in zip(axes, (single, losses), strict=True):
        fit_vertical(axis, values)
        over(axis, "step", steps)
    return figure


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


def compared(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], heading: str) -> Figure:
    """Loss and score of several runs over one another, from their labels and rows: a colour a label."""
    labels, names = list(dict.fromkeys(label for label, _ in curves)), {name for _, rows in curves for name in rows[-1]}
    held_out = "validation" if "validation_loss" in names else "test"
    score = "accuracy" if f"{held_out}_accuracy" in names else "rmse"
    colours = dict(zip(labels, colormaps["viridis"](np.linspace(0, 0.9, len(labels))), strict=True))
    figure = laid_out(f"{heading}\nsolid: {held_out} set, dashed: training set", (11.0, 5.0))
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("loss", score), strict=True):
        drawn = []
        for label, rows in curves:
            for split, style in ((held_out, "-"), ("train", "--")):
                found = [row.get(f"{split}_{name}") for row in rows]
                values = np.array(found, np.float64) * (100 if name == "accuracy" else 1)  # None becomes NaN
                drawn += values.tolist()
                at = [row["epoch"] for row in rows]
                shown = label if split == held_out else None
                axis.plot(at, values, style, color=colours[label], label=shown, marker=marker(rows), linewidth=1)
        if name == "loss":
            fit_vertical(axis, drawn)
        axis.set_ylabel(UNITS[name])
        over(axis, "epoch", sorted({row["epoch"] for _, rows in curves for row in rows}))
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    if len(labels) <= LABELS:
        columns = min(len(labels), 4)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize="small")
    return figure
