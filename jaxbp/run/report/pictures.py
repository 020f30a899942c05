"""Which pictures a finished run has."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxbp.mlp import MLP
from jaxbp.run import targets
from jaxbp.run.compute.epoch import Evaluation
from jaxbp.run.problem import Problem
from jaxbp.run.report import figures, plots
from jaxbp.run.report.metrics import EpochRow, StepRecord
from jaxbp.run.store.model import Model

WORST = 24  # images in the picture of the worst
CLASSES_SHOWN = 50  # up to which there is a confusion matrix


def draw(
    problem: Problem,
    model: Model,
    epochs: Sequence[EpochRow],
    records: Sequence[StepRecord],
    test: Evaluation | None,
    folder: Path,
    ended: str = "",
) -> None:
    """The pictures that the data, the network and what was recorded have, into the folder of the run.

    test: None while the test set is not to be looked at yet.
    ended: why the run did not come to its end, if it did not; stands in the headings.
    """
    heading = f"{folder.name} · {problem.title}" + f"\n{ended}" * bool(ended)
    kind = problem.config.train.plot_format
    drawn = _of_rows(epochs, records, model.best, heading), _of_the_network(problem, model, test, heading)
    for name, figure in itertools.chain(*drawn):
        figures.save(figure, folder / f"{name}.{kind}")


def _of_rows(
    epochs: Sequence[EpochRow], records: Sequence[StepRecord], kept: int | None, heading: str
) -> Iterator[tuple[str, Figure]]:
    yield "learning_curves", plots.learning_curves(epochs, heading, kept)
    yield "layers", plots.layer_rms(epochs, heading)
    if records and "noise_scale" in records[0].quantities:
        yield "noise_scale", plots.noise_scale(records, heading)
    if records and (figure := plots.recorded(records, heading)):
        yield "recorded", figure


def _of_the_network(
    problem: Problem, model: Model, test: Evaluation | None, heading: str
) -> Iterator[tuple[str, Figure]]:
    """Of the first layer, and of what the network makes of the test set."""
    shape, (x, y) = problem.dataset.image_shape, problem.raw("test")
    if shape is not None and len(shape) == 2 and isinstance(model.net, MLP) and not problem.config.data.pca:
        yield "first_layer", plots.first_layer(np.asarray(model.params[0].w, np.float32), shape, heading)
    if test is None:
        return
    loss, output = np.asarray(test.loss), np.asarray(test.output, np.float64)
    labels = targets.labels(problem.config.model.loss, y)
    if labels is not None and labels.ndim > 1:
        return
    if labels is None:
        predicted = targets.predicted(problem.config.model.loss, output, model.targets)
        yield "residuals", plots.residuals(y, predicted, heading)
        return
    classes = model.classes or tuple(map(str, range(output.shape[1])))
    guesses = targets.guesses(problem.config.model.loss, output)
    if len(classes) <= CLASSES_SHOWN:
        yield "confusion", plots.confusion(labels, guesses, classes, heading)
    if shape is not None and len(shape) == 2:
        order = np.argsort(-loss, kind="stable")[:WORST]
        true, guessed = ([classes[k] for k in which[order]] for which in (labels, guesses))
        title = "test images with the largest loss: index: label → prediction, loss; red: wrong"
        drawn = x[order].reshape(-1, *shape), order.tolist(), true, guessed, loss[order]
        yield "worst", plots.images(*drawn, title, heading)
