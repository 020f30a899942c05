"""Which pictures a study has."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxbp.run.problem import SPLITS
from jaxbp.run.report import figures
from jaxbp.run.report import plots as report_plots
from jaxbp.run.report.metrics import StepRecord
from jaxbp.run.study import curvature, plots
from jaxbp.run.study.curvature import Influence
from jaxbp.run.study.measure import Results, Subject
from jaxbp.run.study.table import Columns

IMAGES = 24  # in the pictures of the hardest and the easiest
HELPFUL, HARMFUL = 4, 3  # training images beside a test image, in a row of eight


def drawn(
    subject: Subject, columns: Columns, results: Results, quantities: Sequence[str], recorded: Sequence[StepRecord]
) -> Iterator[tuple[str, Figure]]:
    """The pictures that the quantities have, by name; those by class only where there are few classes."""
    heading = f"{subject.source.resolve().stem}, {subject.state} · {subject.problem.title}"
    classes, what = subject.classes, f"{SPLITS[subject.split]} samples"
    if "grand" in quantities:
        norm = columns["norm"]
        groups = {name: norm[subject.y == k] for k, name in enumerate(classes)} if classes else {"": norm}
        yield "norms", plots.norms(groups, what, heading)
        yield from _images(subject, columns, what, heading)
    if results.class_cosine is not None:
        yield "class_cosine", plots.class_cosine(results.class_cosine, classes, what, heading)
    if results.eigenvalues is not None and results.eigenvalues.size:
        yield "gram_spectrum", plots.gram_spectrum(results.eigenvalues, len(subject.x), what, heading)
    for kind, spectrum in results.spectra.items():
        name = curvature.KINDS[kind]
        yield kind, plots.spectrum(spectrum, min(len(subject.x), curvature.SAMPLES), name, what, heading)
    if results.kernel is not None:
        matrix, rows = results.kernel
        yield "ntk", plots.kernel(matrix, subject.y[rows] if classes else None, classes, what, heading)
    if results.influence is not None:
        yield from _influence(subject, results.influence, heading)
    if "noise_scale" in quantities and recorded:
        yield "noise_scale", report_plots.noise_scale(recorded, heading)


def _influence(subject: Subject, found: Influence, heading: str) -> Iterator[tuple[str, Figure]]:
    """For each of some test images the training images that help it most, then those that harm it most."""
    shape, (x, y) = subject.problem.dataset.image_shape, subject.problem.raw("test")
    if shape is None or len(shape) > 2 or not subject.classes:
        return
    images, captions, red = [], [], []
    for test, scores in zip(found.tests, found.on_samples.T, strict=True):
        finite = np.flatnonzero(np.isfinite(scores))
        order = finite[np.argsort(-scores[finite], kind="stable")]
        chosen = [*order[:HELPFUL], *order[-HARMFUL:][::-1]]
        images += [x[test], *subject.x[chosen]]
        captions += [f"test {test}\n{subject.classes[y[test]]}"]
        captions += [f"{row}: {subject.classes[subject.y[row]]}\n{scores[row]:+.2g}" for row in chosen]
        red += [False, *(bool(scores[row] < 0) for row in chosen)]
    title = "a test image, the training images that help it most, and (red) those that harm it most"
    yield "influence", figures.gallery(np.reshape(images, (-1, *shape)), captions, red, title, heading)


def _images(subject: Subject, columns: Columns, what: str, heading: str) -> Iterator[tuple[str, Figure]]:
    """Those with the largest and the smallest gradients that are finite."""
    shape, norm = subject.problem.dataset.image_shape, columns["norm"]
    finite = np.flatnonzero(np.isfinite(norm))
    if shape is None or len(shape) > 2 or not finite.size:
        return
    for name, sign in (("hardest", -1), ("easiest", 1)):
        rows = finite[np.argsort(sign * norm[finite], kind="stable")[:IMAGES]]
        index, labels, guesses, norms = (columns[k][rows].tolist() for k in ("index", "label", "prediction", "norm"))
        title = f"the {name} {what}: index: label → prediction, gradient norm; red: wrong"
        images = subject.x[rows].reshape(-1, *shape)
        yield name, report_plots.images(images, index, labels, guesses, norms, title, heading)
