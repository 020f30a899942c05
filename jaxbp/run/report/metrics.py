"""The rows of metrics.jsonl and timings.jsonl, what they are computed from, and how a score is shown.

A file has one JSON object a line, the keys and values of which are the `line()` of a row. A NaN or an infinity, which
JSON lacks, is null there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.run import targets
from jaxbp.run.compute.epoch import Evaluation
from jaxbp.run.compute.recording import Recording
from jaxbp.run.compute.step import Steps
from jaxbp.run.data import Scaling
from jaxbp.run.problem import SPLITS


class Scores(NamedTuple):
    """Of a set: the mean loss of a sample; for labels and probabilities the accuracy, for numbers RMSE and R².

    Accuracy: how often the largest output is that of the label, or of the largest probability.
    RMSE = √(mean of the squared errors over samples and outputs), in the units of the targets as they were read;
    R² = 1 − Σ(y − ŷ)² / Σ(y − ȳ)², averaged over the outputs; NaN where a column of targets is constant.
    ŷ is the mean of the target that the loss stands for, such as eˣ of poisson.
    Balanced accuracy, with class weights alone: the mean of the accuracies of the classes that have samples.
    """

    loss: float
    accuracy: float | None = None
    rmse: float | None = None
    r2: float | None = None
    balanced_accuracy: float | None = None

    def named(self) -> dict[str, float]:
        """The scores that there are."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def main(self) -> str:
        """The name of the score that one looks at first."""
        return "rmse" if self.accuracy is None else "accuracy"


@dataclasses.dataclass(frozen=True)
class EpochRow:
    """After an epoch: scores of the sets, η of its last step, the RMS of δ⁽ˡ⁾ and of the gradient by layer.

    epsilon: what a private run has spent. What that does not cover, of the training set, is there if it was asked for.
    validation: stands for test where there is a validation set;  max_norm: an adaptive C, which its noise protects.
    """

    epoch: int
    step: int
    train: Scores | None
    test: Scores | None
    learning_rate: float
    delta_rms: list[float] | None
    gradient_rms: list[float]
    epsilon: float | None = None
    validation: Scores | None = None
    max_norm: float | None = None

    def scores(self) -> dict[str, float]:
        """train_loss, train_accuracy … test_r2, or validation_r2."""
        return {f"{split}_{name}": v for split in self.splits for name, v in getattr(self, split).named().items()}

    def shown(self) -> dict[str, float]:
        """The scores, and the ε of a private run."""
        return self.scores() | ({} if self.epsilon is None else {"ε": self.epsilon})

    @property
    def splits(self) -> list[str]:
        """The sets that have scores."""
        return [split for split in SPLITS if getattr(self, split) is not None]

    @property
    def held_out(self) -> str:
        """The set by which one judges: "validation" where there is one, or else "test"."""
        return self.splits[-1]

    def line(self) -> dict[str, Any]:
        rest = {name: getattr(self, name) for name in ("learning_rate", "delta_rms", "gradient_rms")}
        found = {"epoch": self.epoch, "step": self.step, **self.scores(), **rest}
        if self.epsilon is None:
            return found
        unprotected = {name: found.pop(name) for name in list(found) if name.startswith(("train_", "delta_"))}
        found |= {"epsilon": self.epsilon} | ({} if self.max_norm is None else {"max_norm": self.max_norm})
        return found | ({} if self.train is None else {"unprotected": unprotected})


@dataclasses.dataclass(frozen=True)
class FinalRow:
    """At the end of a run with a validation set: the scores of the test set, which is looked at only then.

    epoch, step: of the parameters, the best ones by a score or the last ones;  epochs: how many were trained;
    stopped_early: whether more were asked for;  best_by: the score that was monitored, if one was.
    """

    epoch: int
    step: int
    epochs: int
    stopped_early: bool
    test: Scores
    best_by: str | None = None

    def line(self) -> dict[str, Any]:
        head = {name: getattr(self, name) for name in ("epoch", "step", "epochs", "stopped_early", "best_by")}
        scores = {f"test_{name}": value for name, value in self.test.named().items()}
        return {name: value for name, value in head.items() if value is not None} | scores

    def describe(self) -> str:
        """Whether the run stopped early, and with which parameters the test set was scored."""
        stopped = f"stopped early after epoch {self.epochs}; " if self.stopped_early else ""
        which = "the last one" if self.best_by is None else f"the best by {self.best_by}"
        return f"{stopped}the test set was scored with the parameters of epoch {self.epoch}, {which}"


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What [study] records before a step: the loss of its batch, and the quantities by their names."""

    epoch: int
    step: int
    batch_loss: float
    quantities: dict[str, Any]

    def line(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step, "batch_loss": self.batch_loss, **self.quantities}


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Why a run, or a member of a sweep, ended before its end."""

    epoch: int
    step: int
    diverged: str

    def line(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Row = EpochRow | StepRecord | Divergence | FinalRow


@dataclasses.dataclass(frozen=True)
class MemberRow:
    """A row of one member of a sweep, with its seed, its fold and its η (that of the row's step, under a schedule).

    setting: the values of all that is swept besides seed and fold, by dotted keys, and of the learning rate if nothing
    is.
    """

    seed: int
    learning_rate: float
    setting: dict[str, Any]
    row: Row
    fold: str | None = None

    @property
    def repetition(self) -> dict[str, Any]:
        """Which one of its setting it is: its seed and, where it is cross-validated, its fold."""
        return {"seed": self.seed} | ({} if self.fold is None else {"fold": self.fold})

    def line(self) -> dict[str, Any]:
        own = self.repetition | {"learning_rate": self.learning_rate}
        return own | self.setting | self.row.line() | own


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long an epoch took. In a file of its own, for it differs from run to run."""

    epoch: int
    seconds: float
    samples_per_second: float

    def line(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read(line: Mapping[str, Any]) -> Row:
    """A row of a run from its line in the file, with NaN for null."""
    values = _each(lambda v: math.nan if v is None else v, line)
    if "diverged" in values:
        return Divergence(**values)
    if "stopped_early" in values:
        found = _taken(values, "test")
        return FinalRow(**found, **values)
    head = {name: values.pop(name) for name in ("epoch", "step")}
    if "batch_loss" in values:
        return StepRecord(**head, batch_loss=values.pop("batch_loss"), quantities=values)
    unprotected = values.pop("unprotected", {})
    values = {"delta_rms": None, "train": None, "test": None} | values | unprotected
    found = _taken(values, *SPLITS)
    return EpochRow(**head, **(values | found))


def _taken(values: dict[str, Any], *splits: str) -> dict[str, Any]:
    """The scores of sets, by set, taken out of the values of a line."""
    found = {
        split: {name: values.pop(f"{split}_{name}") for name in Scores._fields if f"{split}_{name}" in values}
        for split in splits
    }
    return {split: Scores(**scores) for split, scores in found.items() if scores}


def plain(value: Any) -> Any:
    """The value with None for each number that JSON lacks."""
    return _each(lambda v: None if isinstance(v, float) and not math.isfinite(v) else v, value)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """With every leaf of the value changed; `jax.tree.map` would sort the keys."""
    if isinstance(value, Mapping):
        return {key: _each(change, item) for key, item in value.items()}
    return [_each(change, item) for item in value] if isinstance(value, list) else change(value)


def scores(evaluation: Evaluation, y: np.ndarray, loss: str, scaling: Scaling | None) -> Scores:
    """Scores of a set from its evaluation and its targets as they were read: labels (N,), (N, T) or numbers (N, C)."""
    mean_loss = float(jnp.mean(evaluation.loss))
    if (labels := targets.labels(loss, y)) is not None:
        output = np.asarray(evaluation.output)
        guesses = output if y.ndim > 1 and y.dtype.kind == "i" else targets.guesses(loss, output)
        return Scores(mean_loss, accuracy=float(np.mean(guesses == labels)))
    errors = targets.predicted(loss, np.asarray(evaluation.output), scaling) - y
    constant = y.max(axis=0) == y.min(axis=0)  # the sum of its rounded deviations from its mean may not be 0
    spread = np.where(constant, np.nan, np.sum((y - y.mean(axis=0)) ** 2, axis=0))
    r2 = 1 - np.sum(errors**2, axis=0) / spread
    return Scores(mean_loss, rmse=float(np.sqrt(np.mean(errors**2))), r2=float(np.mean(r2)))


def balanced_accuracy(evaluation: Evaluation, labels: np.ndarray) -> float:
    """The mean over the classes that have samples of the share of them classified correctly."""
    right, counts = np.asarray(evaluation.output).argmax(axis=1) == labels, np.bincount(labels)
    return float(np.mean(np.bincount(labels, right)[counts > 0] / counts[counts > 0]))


def divergence(steps: Steps, evaluations: dict[str, Evaluation], epoch: int, done: int) -> Divergence | None:
    """What was not finite in an epoch, and where; None where all was. `done` counts the steps before the epoch."""
    bad, loss = first_bad(steps), np.asarray(steps.loss)
    if bad < len(loss):
        found = "the gradient overflows" if np.isfinite(loss[bad]) else f"the loss is {loss[bad]}"
        fault = f"{found} at epoch {epoch}, step {bad + 1} of {len(loss)}"
        return Divergence(epoch, done + bad + 1, fault)
    split = next(iter(evaluations))
    after = float(jnp.mean(evaluations[split].loss))
    if np.isfinite(after):
        return None
    return Divergence(epoch, done + len(loss), f"the loss of the {SPLITS[split]} set is {after} after epoch {epoch}")


def first_bad(steps: Steps) -> int:
    """The first step of an epoch whose loss or gradient is not finite; the count of steps where there is none."""
    alive = np.asarray(steps.alive)
    return len(alive) if alive.all() else int(np.argmin(alive))


def records(recording: Recording | None, steps: Steps, epoch: int, done: int) -> list[StepRecord]:
    """What an epoch recorded, up to a bad step; `done` counts the steps before the epoch.

    A record belongs to the parameters before its step.
    """
    if recording is None:
        return []
    arrays = {name: jax.tree.map(np.asarray, steps.recorded[name]) for name in recording.quantities}  # not sorted
    loss, lived = np.asarray(steps.loss), first_bad(steps) + 1

    def row(i: int) -> StepRecord:
        values = {name: jax.tree.map(lambda array: array[i].tolist(), arrays[name]) for name in arrays}
        return StepRecord(epoch, done + i + 1, float(loss[i]), values)

    return [row(i) for i in range(-done % recording.every, min(lived, len(loss)), recording.every)]


def root_mean(squares: jax.Array | np.ndarray) -> list[float]:
    """The root of the mean over an epoch's steps of mean squares by layer, (S, L)."""
    return np.sqrt(np.mean(np.asarray(squares), axis=0)).tolist()
