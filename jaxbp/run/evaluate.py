"""`jaxbp evaluate`: how good a trained network is, on its test set or on other samples. scikit-learn does the sums."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxbp import losses
from jaxbp.run import config as configs
from jaxbp.run import problem as problems
from jaxbp.run import targets
from jaxbp.run.data import archive, folders
from jaxbp.run.data.tables import is_table, samples_like
from jaxbp.run.errors import UserError
from jaxbp.run.report import text
from jaxbp.run.store.model import Model, load

BINS = 10  # of the confidence, from 0 to 1
CLASSES_SHOWN = 20  # up to which there is a confusion matrix

Columns = Mapping[str, Sequence[Any] | np.ndarray]
Tables = dict[str, Columns]


def evaluate(run: Path, data: Path | None, console: Console) -> None:
    """Prints the scores of a run on its test set, or on samples of a file; UserError for those that don't fit it."""
    name, found = measured(run, data)
    text.line(console, f"{run}: {name}\n")
    for columns in found.values():
        text.table(console, *cells(columns))


def measured(run: Path, data: Path | None = None) -> tuple[str, Tables]:
    """Of which samples, and the tables."""
    model = load(run)
    name, x, y = _samples(run, model, data)
    try:
        output = model.predict(x)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return f"{len(x):,} samples of {name}", tables(model, output, y)


def cells(columns: Columns) -> tuple[list[str], list[tuple[str, ...]]]:
    """The names of the columns and the rows of a table as they are shown."""
    shown = ([_cell(name, value) for value in column] for name, column in columns.items())
    return [_cell("", name) for name in columns], list(zip(*shown, strict=True))


def tables(model: Model, output: np.ndarray, y: np.ndarray) -> Tables:
    """What `classification` or `regression` says of the outputs of `Model.predict` and what they should be."""
    loss = losses.get(model.net.loss).name
    labels = targets.labels(loss, y)
    if labels is None:
        return {"scores": {name: [value] for name, value in regression(y, output).items()}}
    output = output.reshape(-1, output.shape[-1])  # each position of a sequence counts
    classes = model.classes or tuple(map(str, range(output.shape[1])))
    p = targets.probabilities(loss, output) if model.classes else output
    return classification(labels.ravel(), output, p, classes)


def regression(y: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """RMSE over samples and outputs, mean absolute error, and R² averaged over the outputs; in the targets' units."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    rmse, r2 = np.sqrt(mean_squared_error(y, predicted)), r2_score(y, predicted, force_finite=False)
    return {"rmse": float(rmse), "mae": float(mean_absolute_error(y, predicted)), "r2": float(r2)}


def classification(labels: np.ndarray, output: np.ndarray, p: np.ndarray | None, classes: Sequence[str]) -> Tables:
    """Tables by their columns: scores of all, of each class, the calibration of probabilities p, the confusion matrix.

    ROC AUC is that of a class against the rest, by the outputs where there are no probabilities. Balanced accuracy, F1
    and ROC AUC of all are means over the classes; what a class without samples does not have is NaN, and left out.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    guesses, numbers, ranked = output.argmax(axis=1), range(len(classes)), output if p is None else p
    measured = precision_recall_fscore_support(labels, guesses, labels=numbers, zero_division=np.nan)
    by_class = dict(zip(("precision", "recall", "f1", "samples"), measured, strict=True))
    by_class["roc_auc"] = np.array([_area(labels == k, ranked[:, k]) for k in numbers])
    balanced, f1, area = (_mean(by_class[name]) for name in ("recall", "f1", "roc_auc"))
    total = {"accuracy": [np.mean(guesses == labels)], "balanced_accuracy": [balanced], "f1": [f1], "roc_auc": [area]}
    found: Tables = {"scores": total, "classes": {"class": classes, **by_class}}
    if p is not None:
        found["calibration"] = calibration(p.max(axis=1), guesses == labels)
        _, samples, confidence, accuracy = map(np.asarray, found["calibration"].values())
        total["ece"] = [np.sum(samples * abs(confidence - accuracy)) / len(labels)]
    if len(classes) <= CLASSES_SHOWN:
        matrix = confusion_matrix(labels, guesses, labels=numbers)
        found["confusion"] = {"label \\ prediction": classes, **dict(zip(classes, matrix.T, strict=True))}
    return found


def calibration(confidence: np.ndarray, right: np.ndarray) -> Columns:
    """For bins of the confidence, the largest probability: its mean, and which share of the guesses is right.

    The mean distance of the two over the samples is the expected calibration error (ECE).

    Source: C. Guo, G. Pleiss, Y. Sun and K. Weinberger, *On calibration of modern neural networks*, 2017.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    samples = np.bincount(bins, minlength=BINS)
    there = samples > 0
    means = [np.bincount(bins, values, BINS)[there] / samples[there] for values in (confidence, right)]
    edges = [f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}" for k in np.flatnonzero(there)]
    return {"bin": edges, "samples": samples[there], "confidence": means[0], "accuracy": means[1]}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return text.shown_score(name, value)
    return str(value) if str(value).isprintable() and str(value).strip() else repr(value)  # "\n" of a text


def _area(right: np.ndarray, ranked: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(right, ranked)) if 0 < right.sum() < len(right) else np.nan


def _samples(run: Path, model: Model, data: Path | None) -> tuple[str, np.ndarray, np.ndarray]:
    """What they are called, inputs and targets as they were read."""
    if data is None:
        problem = problems.of_run(run, model)
        return f"the test set of {problem.dataset.name}", *problem.raw("test")
    config = configs.read(run / "config.toml")
    most = targets.most_labels(config.model.loss)
    if model.columns and is_table(data.name):
        x, (y, classes) = samples_like(data, config.data, model.columns, most)
    else:
        raw = (folders if data.is_dir() else archive).read(data, in_place=False, most_labels=most)
        x, y, classes = raw.x_train, raw.y_train, raw.classes
    if bool(classes) != bool(model.classes):
        there, here = ("labels" if of else "numbers" for of in (classes, model.classes))
        raise UserError(f"{data}: y has {there}, {run} was trained on {here}")
    if classes and model.classes:
        return str(data), x, renumbered(f"{data}: y", classes, model.classes)[y]
    if y.shape[1] != model.sample.outputs:
        raise UserError(f"{data}: y has {y.shape[1]} columns, {run} was trained on {model.sample.outputs}")
    return str(data), x, y


def renumbered(where: str, theirs: Sequence[str], ours: Sequence[str]) -> np.ndarray:
    """The numbers of classes among ours, by their names or, where ours are words, by their numbers."""
    numbers = {name: k for k, name in enumerate(ours)}
    if not numeric(ours):
        numbers |= {str(k): k for k in range(len(ours))}
    for name in theirs:
        if name not in numbers:
            raise UserError(f"{where} has the label {name!r}, allowed: {', '.join(ours)}")
    return np.array([numbers[name] for name in theirs], np.int32)


def numeric(classes: Sequence[str]) -> bool:
    """Whether the names of classes are whole numbers."""
    return all(name.removeprefix("-").isdecimal() for name in classes)
