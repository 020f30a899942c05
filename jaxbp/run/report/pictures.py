"""Which pictures a finished run has."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxbp.run.compute.epoch import Evaluation
from jaxbp.run.problem import Problem
from jaxbp.run.report import plots
from jaxbp.run.report.metrics import EpochRow, StepRecord
from jaxbp.run.store.model import Model

WORST = 24  # images in worst.png


def draw(
    problem: Problem,
    model: Model,
    epochs: Sequence[EpochRow],
    records: Sequence[StepRecord],
    test: Evaluation,
    folder: Path,
) -> None:
    """The pictures that the data, the network and what was recorded have, into the folder of the run."""
    plots.learning_curves(epochs, folder / "learning_curves.png")
    plots.layer_rms(epochs, folder / "layers.png")
    if records and "noise_scale" in records[0].quantities:
        plots.noise_scale(records, folder / "noise_scale.png")
    shape = problem.dataset.image_shape
    if shape is None:
        return
    plots.first_layer(np.asarray(model.params[0].w, np.float32), shape, folder / "first_layer.png")
    if model.classes:
        _worst(problem, model.classes, test, shape, folder / "worst.png")


def _worst(problem: Problem, classes: Sequence[str], test: Evaluation, shape: tuple[int, int], path: Path) -> None:
    x, y = problem.raw("test")
    loss = np.asarray(test.loss)
    order = np.argsort(-loss, kind="stable")[:WORST]
    labels = [classes[label] for label in y[order]]
    guesses = [classes[label] for label in np.asarray(test.output)[order].argmax(axis=1)]
    plots.worst(x[order], labels, guesses, loss[order], shape, path)
