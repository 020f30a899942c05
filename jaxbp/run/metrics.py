"""What is measured each epoch, and how it is shown."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbp.run.data import Scaling
from jaxbp.run.training import Evaluation, Steps

TIMINGS = ("seconds", "samples_per_second")
"""Of an epoch, kept in a file of their own: they differ from run to run."""


def scores(split: str, evaluation: Evaluation, y: np.ndarray, targets: Scaling | None) -> dict[str, float]:
    """<split>_loss, the mean over the samples; for labels (N,) <split>_accuracy, for numbers (N, C) <split>_rmse, _r2.

    RMSE = √(mean of the squared errors over samples and outputs), in the units of the targets as they were read;
    R² = 1 − Σ(y − ŷ)² / Σ(y − ȳ)², averaged over the outputs.
    """
    found = {f"{split}_loss": float(jnp.mean(evaluation.loss))}
    output = np.asarray(evaluation.output, np.float64)
    if y.ndim == 1:
        return found | {f"{split}_accuracy": float(np.mean(output.argmax(axis=1) == y))}
    errors = (output if targets is None else targets.inverse(output)) - y
    spread = np.sum((y - y.mean(axis=0)) ** 2, axis=0)
    unexplained = np.sum(errors**2, axis=0)
    r2 = 1 - np.divide(unexplained, spread, out=np.full_like(spread, np.nan), where=spread > 0)
    return found | {f"{split}_rmse": float(np.sqrt(np.mean(errors**2))), f"{split}_r2": float(np.mean(r2))}


def layers(steps: Steps) -> dict[str, list[float]]:
    """delta_rms and gradient_rms by layer: the root of the mean square over the epoch's steps."""
    return {
        "delta_rms": np.sqrt(np.mean(np.asarray(steps.delta), axis=0)).tolist(),
        "gradient_rms": np.sqrt(np.mean(np.asarray(steps.gradient), axis=0)).tolist(),
    }


def line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in one line for a person."""
    shown = [f"{name.replace('_', ' ')} {format_score(name, row[name])}" for name in row if is_score(name)]
    return f"epoch {row['epoch']}/{epochs}  {'  '.join(shown)}  {row['samples_per_second']:,.0f} samples/s"


def is_score(name: str) -> bool:
    """Whether a metric belongs to the training or the test set."""
    return name.startswith(("train_", "test_"))


def format_score(name: str, value: float) -> str:
    """A score in the digits one reads: accuracies in per cent."""
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"
