"""[train] monitor, patience and min_delta: which epoch of a run was the best, and when a run stops early.

All of it follows from the rows of the epochs. So a run that goes on has to keep the parameters of the best epoch only.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxbp.network import ParamTree
from jaxbp.run import targets
from jaxbp.run.config import TrainConfig, choose
from jaxbp.run.errors import UserError
from jaxbp.run.problem import Problem
from jaxbp.run.report.metrics import EpochRow
from jaxbp.run.store.runs import LARGER_IS_BETTER


class Best(NamedTuple):
    """The row of the best epoch so far, and the parameters after it."""

    row: EpochRow
    params: ParamTree


def score_of(config: TrainConfig) -> str | None:
    """The name of the score that is monitored, if one is."""
    return config.monitor or (config.patience and "validation_loss") or None


def check(problem: Problem) -> None:
    """UserError where there is no validation set, no such score, or nothing to compare by min_delta."""
    train, name = problem.config.train, score_of(problem.config.train)
    if name is None:
        if train.min_delta:
            raise UserError(f"train.min_delta: {train.min_delta}, but no score is monitored: set train.patience")
        return
    if "validation" not in problem.dataset.splits:
        key = "patience" if train.patience else "monitor"
        raise UserError(f"train.{key}: there is no validation set; data.validation = 0.1 takes one")
    labels = targets.labels(problem.config.model.loss, problem.raw("validation")[1])
    names: tuple[str, ...] = ("loss", "rmse", "r2") if labels is None else ("loss", "accuracy")
    names += ("balanced_accuracy",) if train.class_weights else ()
    choose("train.monitor", "score", name, dict.fromkeys(f"{split}_{n}" for split in problem.reported for n in names))


def better(config: TrainConfig, row: EpochRow, best: EpochRow | None) -> bool:
    """Whether the score of an epoch is better than the best one so far, by more than min_delta; a NaN never is."""
    name = score_of(config)
    if name is None:
        return False
    sign = 1 if name.partition("_")[2] in LARGER_IS_BETTER else -1
    before = sign * best.scores()[name] + config.min_delta if best else -math.inf
    return sign * row.scores()[name] > before


def best_of(config: TrainConfig, rows: Sequence[EpochRow]) -> EpochRow | None:
    """The best epoch of a run; None where nothing is monitored."""
    best = None
    for row in rows:
        best = row if better(config, row, best) else best
    return best


def kept(config: TrainConfig, row: EpochRow, params: ParamTree, best: Best | None) -> Best | None:
    """The best epoch so far, after one more with these parameters; they are copied, for the next epoch takes them."""
    if not better(config, row, best.row if best else None):
        return best
    return Best(row, jax.tree.map(lambda leaf: leaf.copy(), params))


def over(config: TrainConfig, best: Best | None, epoch: int) -> bool:
    """Whether the run stops early after this epoch: `patience` epochs have passed without a better one."""
    return config.patience is not None and epoch - (best.row.epoch if best else 0) >= config.patience
