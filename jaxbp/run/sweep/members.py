"""The members of a sweep: the configs of the separate runs, in groups that one compiled program trains."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxbp.run import config as configs
from jaxbp.run import keys
from jaxbp.run.compute import optimizers
from jaxbp.run.config import Config, SweepConfig
from jaxbp.run.errors import UserError
from jaxbp.run.report import text
from jaxbp.run.sweep import scores

LONGEST_NAME = 200  # of a member's folder; the file systems end at 255


class Member(NamedTuple):
    """One of the separate runs: its config, and what tells it from the others.

    learning_rate: None where a schedule has it;  setting: the values of all that is swept besides seed and fold, by
    dotted keys, or the learning rate;  name: of its folder.
    """

    config: Config
    seed: int
    learning_rate: float | None
    setting: dict[str, Any]
    name: str = ""

    @property
    def fold(self) -> str | None:
        """Of the training samples the part that it validates with, if it is cross-validated: "2/5"."""
        validation = self.config.data.validation
        return validation if isinstance(validation, str) else None


def together(config: Config) -> Iterator[list[Member]]:
    """The members that share a program: fold by fold, and in each seed by seed, each with every learning rate.

    Raises:
      UserError: a member's config is not right.
    """
    folds = config.sweep.folds
    if folds is None:
        yield from _of_fold(config)
        return
    if config.data.validation is not None:
        raise UserError(f"sweep.folds: {folds}, but data.validation is {config.data.validation}; leave one of them out")
    for number in range(1, folds + 1):
        data = dataclasses.replace(config.data, validation=f"{number}/{folds}")
        yield from _of_fold(dataclasses.replace(config, data=data))


def _of_fold(config: Config) -> Iterator[list[Member]]:
    swept = config.sweep.values()
    rates = swept.pop(keys.LEARNING_RATE, ())
    seeds = swept.pop(keys.SEED, range(config.train.seed, config.train.seed + config.sweep.seeds))
    for values in itertools.product(*swept.values()):
        own = dict(zip(swept, values, strict=True))
        schedule = own.get("optimizer.schedule", config.optimizer.schedule)
        if not (rates and schedule):
            yield list(_members(config, own, seeds, rates))
            continue
        key = f"optimizer.schedule_arguments.{optimizers.peak(schedule)}"
        if key in own:
            raise UserError(f"sweep.{key}: sweep.learning_rate is the same with {schedule}; leave one of them out")
        for rate in rates:
            yield list(_members(config, own | {key: rate}, seeds, ()))


def _members(config: Config, own: dict[str, Any], seeds: Sequence[int], rates: Sequence[float]) -> Iterator[Member]:
    """Of one cohort, whose values of other keys are its `own`."""
    tables = keys.put(dataclasses.asdict(dataclasses.replace(config, sweep=SweepConfig())), own)
    found = configs.validate(tables, f"sweep, {scores.titled(own)}") if own else config
    shown = {} if rates or own else {"learning_rate": found.optimizer.schedule or found.optimizer.learning_rate}
    for seed in seeds:
        for rate in rates or (found.optimizer.learning_rate,):
            optimizer = dataclasses.replace(found.optimizer, learning_rate=rate)
            train = dataclasses.replace(found.train, seed=seed, folder=None)
            member = dataclasses.replace(found, optimizer=optimizer, train=train, sweep=SweepConfig())
            yield Member(member, seed, rate, own | ({"learning_rate": rate} if rates else shown))


def named(groups: Sequence[Sequence[Member]]) -> list[tuple[Member, ...]]:
    """Each with a name for its folder: what it has of its own or, where that is too long or not unique, its number."""
    names = [_name(member) for group in groups for member in group]
    if len(set(names)) < len(names) or max(map(len, names)) > LONGEST_NAME:
        names = [f"member-{number}" for number in range(1, len(names) + 1)]
    left = iter(names)
    return [tuple(member._replace(name=next(left)) for member in group) for group in groups]


def _name(member: Member) -> str:
    parts: dict[str, Any] = {"seed": member.seed, "learning-rate": member.learning_rate, "fold": member.fold}
    parts = {key: value for key, value in parts.items() if value is not None}
    parts |= {key: value for key, value in member.setting.items() if key != "learning_rate"}
    return "_".join(f"{k}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', text.shown(v)).strip('-')}" for k, v in parts.items())


def title(member: Member) -> str:
    """What tells its group from the others: "fold 2/5, optimizer.name adam"."""
    fold = {} if member.fold is None else {"fold": member.fold}
    return scores.titled(fold | {key: value for key, value in member.setting.items() if key != "learning_rate"})
