"""`jaxbp run` with a [sweep] table: a run for several seeds, learning rates and values of any other key.

Members that differ in seed and learning rate only are a cohort, one compiled program, in which they take their turns
within an epoch (`lax.map`): the numbers are those of the separate runs, bit for bit. With more at_once they share each
step (`vmap`); XLA's CPU back end gives the matrix products the same bits then, and another order to the sums over
samples (biases) and classes (softmax). Another value of any other key makes another cohort, and so does each fold, and
each learning rate of a schedule, whose numbers are compiled in. Cohorts train one after the other.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tomli_w
from rich.console import Console

from jaxbp.mlp import Array
from jaxbp.network import ParamTree
from jaxbp.run import data, loop, monitor, targets
from jaxbp.run import problem as problems
from jaxbp.run.compute import mesh as meshes
from jaxbp.run.compute import optimizers, privacy
from jaxbp.run.compute.epoch import Evaluation, epoch, evaluate, run_key
from jaxbp.run.compute.program import OneDevice, begun
from jaxbp.run.compute.step import State, Steps
from jaxbp.run.config import Config, to_dict
from jaxbp.run.data import Dataset
from jaxbp.run.errors import Diverged, Stopped, UserError
from jaxbp.run.host import signals
from jaxbp.run.loop import Setup
from jaxbp.run.monitor import Best
from jaxbp.run.problem import Problem, Split
from jaxbp.run.report import metrics, text
from jaxbp.run.report.metrics import EpochRow, MemberRow, Row, Timing
from jaxbp.run.report.progress import progress
from jaxbp.run.store import files, runs
from jaxbp.run.store import folder as folders
from jaxbp.run.store.folder import How, RunFolder, Told
from jaxbp.run.store.runs import MEMBERS, METRICS, TIMINGS, UNFINISHED
from jaxbp.run.sweep import scores
from jaxbp.run.sweep.members import Member, named, title, together
from jaxbp.run.sweep.scores import Group


class Cohort(NamedTuple):
    """Members that differ in seed and learning rate only; `setup` is that of the first one.

    at_once: how many of them share a step.
    """

    setup: Setup
    members: tuple[Member, ...]
    at_once: int


class Sweep(NamedTuple):
    """All that a sweep needs, checked; the data sets are those that its members train on."""

    config: Config
    cohorts: tuple[Cohort, ...]
    datasets: tuple[Dataset, ...]

    @property
    def members(self) -> list[Member]:
        """Of all cohorts."""
        return [member for cohort in self.cohorts for member in cohort.members]


class Inputs(NamedTuple):
    """What differs between members besides their parameters: the key of the order and, if it is swept, η; (M,)."""

    key: Array
    learning_rate: Array | None


class Epoch(NamedTuple):
    """What an epoch gave.

    params: of all members on the host, (M, …); of a diverged one those after its last whole epoch.
    rows: for each member its recorded steps, then its row or, once, why it diverged.
    timing: the seconds of the epoch of all members, their samples a second together.
    best: the best epoch of each member, where a score is monitored.
    """

    params: ParamTree
    rows: list[MemberRow]
    timing: Timing
    best: Sequence[Best | None]


def run(config: Config, name: str, console: Console, how: How = "auto", told: Told = lambda line: None) -> Path:
    """Trains every member of a sweep and returns the folder; `name` names it if the config does not.

    The folder holds what that of a run does, its lines with `seed`, `learning_rate` and what else is swept, one with
    `diverged` for a member that did; scores.csv, sweep.png, scores.png; and members/NAME, the run folder of each. A
    sweep that was stopped goes on with the cohorts that it had not trained to their ends, and ends as if it had not
    been, unless it is private. Until then it is marked as unfinished, and so are their members.

    Raises:
      UserError: something in the config does not fit, or the folder can't be written.
      Diverged: all members did.
      Stopped: by SIGTERM or Ctrl-C, after a whole epoch; what was measured is in the folder.
    """
    is_private = config.privacy.enabled or bool(config.sweep.privacy)
    if is_private and how == "resume":
        raise UserError("--resume: a private sweep can only begin again: what a member has spent is spent")
    sweep = prepare(config)
    specs = [cohort.setup.spec for cohort in sweep.cohorts]
    private = [spec.privacy.provenance() for spec in specs if spec.privacy]
    digests = [privacy.UNRECORDED] if private else dict.fromkeys(map(data.digest, sweep.datasets))
    known = {"each_member": private} if private else {}
    with folders.opened(config, name, ", ".join(digests), "new" if is_private else how, known, told) as folder:
        try:
            text.line(console, f"{describe(sweep)}\nrun folder {folder.path}")
            with files.writable(f"{folder.path}:", after="; what was written before is whole"):
                _train(sweep, folder, console)
        except Diverged:
            folder.finish()
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; what was measured is in {folder.path}") from None
        folder.finish()
    return folder.path


def _train(sweep: Sweep, folder: RunFolder, console: Console) -> None:
    """Trains cohort by cohort to the end; what was measured is in the folder however it ends."""
    kept, started = _kept(sweep, folder.path), time.perf_counter()
    rows = list(itertools.chain(*kept))
    if kept:
        text.line(console, f"goes on after {len(kept)} of {len(sweep.cohorts)} parts")
    try:
        with signals.deferred(not console.quiet) as stop:
            for number, cohort in enumerate(sweep.cohorts[len(kept) :], len(kept) + 1):
                if len(sweep.cohorts) > 1:
                    which = f"{number} of {len(sweep.cohorts)}: {title(cohort.members[0])}"
                    text.line(console, f"\n{which}\n{loop.describe(cohort.setup)}")
                _train_cohort(cohort, rows, folder, console, stop)
                if stop.signal and number < len(sweep.cohorts):
                    raise Stopped(f"stopped after {number} of {len(sweep.cohorts)} parts", stop.signal)
    finally:
        groups = scores.groups(rows)
        _report(sweep, groups, folder.path)
    if not any(group.last for group in groups):
        raise Diverged(f"every member of the sweep did; the last ones, {rows[-1].row.line()['diverged']}")
    epochs = " or ".join(dict.fromkeys(str(member.config.train.epochs) for member in sweep.members))
    scores.show(groups, f"{epochs} epochs, {time.perf_counter() - started:.1f} s of training", console)
    console.out(scores.best(groups), highlight=False)


def _train_cohort(
    cohort: Cohort, rows: list[MemberRow], folder: RunFolder, console: Console, stop: signals.Stop
) -> None:
    """Trains and saves a cohort, whose rows become more of the sweep's; Stopped after an epoch before its last one."""
    count, params = cohort.setup.problem.config.train.epochs, jax.device_get(_initial(cohort))
    before = len(rows)
    best: Sequence[Best | None] = [None] * len(cohort.members)
    try:
        with progress(console, count) as show:
            for params, found, timing, best in epochs(cohort):  # noqa: B007  (the last ones are saved below)
                rows += found
                folder.append(found, timing)
                if measured := [member.row for member in found if isinstance(member.row, EpochRow)]:
                    show(_medians(measured), timing)
                if stop.signal and timing.epoch < count:
                    raise Stopped(f"stopped after epoch {timing.epoch} of {count}", stop.signal)
    finally:
        _save(cohort, params, best, rows[before:], folder.path)
    for member in cohort.members:
        (folder.path / MEMBERS / member.name / UNFINISHED).unlink()


def _kept(sweep: Sweep, path: Path) -> list[list[MemberRow]]:
    """The rows of each cohort that was trained to its end before the sweep was stopped; those of others are cut off."""
    kept = []
    for cohort in sweep.cohorts:
        homes = [path / MEMBERS / member.name for member in cohort.members]
        if any((home / UNFINISHED).exists() or not home.exists() for home in homes):
            break
        pairs = [(m, line) for m, home in zip(cohort.members, homes, strict=True) for line in runs.rows(home / METRICS)]
        kept.append([_tagged(member, cohort.setup, metrics.read(line)) for member, line in pairs])
    folders.cut(path / METRICS, sum(map(len, kept)))
    folders.cut(path / TIMINGS, sum(max(row.row.epoch for row in rows) for rows in kept))
    return kept


def prepare(config: Config) -> Sweep:
    """Reads the data and builds what the members share; UserError for what does not fit together.

    Every member is looked at as a whole config, so that nothing is trained before all of them are right.
    """
    _check(config)
    datasets: dict[str, Dataset] = {}
    cohorts = []
    for members in named(list(together(config))):
        first = members[0].config
        try:
            most = targets.most_labels(first.model.loss)
            if (key := f"{first.data} {most}") not in datasets:
                datasets[key] = data.load(first.data, most_labels=most)
            problem = problems.pose(first, dataset=datasets[key])
            setup = loop.assemble(problem, OneDevice, len(members))
            if config.sweep.at_once > 1 and first.train.memory != "store-all":
                raise UserError("train.memory: members that share a step save nothing by it; leave out sweep.at_once")
            cohorts.append(Cohort(setup, members, config.sweep.at_once))
        except UserError as error:
            which = title(members[0])
            raise UserError(f"sweep, {which}: {error}" if which else str(error)) from None
    posed = [cohort.setup.problem for cohort in cohorts]
    if len({targets.labels(p.config.model.loss, p.raw("test")[1]) is None for p in posed}) > 1:
        raise UserError("sweep: some members have an accuracy and some an RMSE, which can't be compared")
    if len({p.dataset.splits for p in posed}) > 1:
        raise UserError("sweep: some members have a validation set and some have none, so they can't be compared")
    return Sweep(config, tuple(cohorts), tuple(datasets.values()))


def describe(sweep: Sweep) -> str:
    """The sweep in one line, below the run where there is one cohort."""
    members, swept = sweep.members, dict[str, dict[str, None]]()
    for member in members:
        for key, value in member.setting.items():
            swept.setdefault(scores.shown_key(key), {})[text.shown(value)] = None
    seeds = list(dict.fromkeys(str(member.seed) for member in members))
    shown = f"seeds {seeds[0]} to {seeds[-1]}" if seeds[1:] else f"seed {seeds[0]}"
    folds = dict.fromkeys(member.fold for member in members)
    parts = [shown] + [f"{len(folds)} folds"] * (len(folds) > 1)
    parts += [f"{key} {', '.join(values)}" for key, values in swept.items()]
    sweeps = f"sweep of {len(members)}: {' × '.join(parts)}; below, medians over the members"
    return sweeps if len(sweep.cohorts) > 1 else f"{loop.describe(sweep.cohorts[0].setup)}\n{sweeps}"


def epochs(cohort: Cohort) -> Iterator[Epoch]:
    """Trains the members of a cohort, until none of them is left; gives what was measured after each epoch."""
    (problem, spec, _), config = cohort.setup, cohort.setup.problem.config
    sets = {name: problem.on_device(name) for name in problem.dataset.splits}
    state, members = jax.vmap(functools.partial(begun, spec))(_initial(cohort)), _inputs(cohort)
    compiled = jax.jit(_program(cohort), donate_argnums=0).lower(state, members, sets, 1, 0).compile()
    params, alive = jax.device_get((state.params, state.alive))
    best: list[Best | None] = [None] * len(cohort.members)
    count = -(-len(sets["train"].x) // spec.batch_size)
    for number in range(1, config.train.epochs + 1):
        started, done, before = time.perf_counter(), (number - 1) * count, alive
        state, *measured = compiled(state, members, sets, number, done % config.study.every)
        alive = np.array(state.alive)
        seconds = time.perf_counter() - started
        new, found = jax.device_get((state.params, measured))
        over = np.zeros_like(alive)
        rows = list[MemberRow]()
        for i in np.flatnonzero(before):
            steps, evaluations = jax.tree.map(lambda a: a[i], found)  # noqa: B023
            mine = _rows(cohort.setup, steps, evaluations, number)
            if isinstance(row := mine[-1], EpochRow):
                own = jax.tree.map(lambda a: a[i], new)  # noqa: B023
                best[i] = monitor.kept(config.train, row, own, best[i])
                over[i] = monitor.over(config.train, best[i], number)
                mine += _tested(problem, sets, own, best[i], number) if over[i] or number == config.train.epochs else []
            else:
                alive[i] = False
            rows += [_tagged(cohort.members[i], cohort.setup, row) for row in mine]
        params = jax.tree.map(functools.partial(_where_alive, alive), new, params)
        alive &= ~over
        state = state._replace(alive=jnp.asarray(alive))
        samples = int(before.sum()) * len(sets["train"].x)
        yield Epoch(params, rows, Timing(number, seconds, samples / seconds), best)
        if not alive.any():
            return


def _tested(problem: Problem, sets: dict[str, Split], params: ParamTree, best: Best | None, epochs: int) -> list[Row]:
    """Of a member with a validation set that came to its end: the row of the test set."""
    if "test" in problem.reported:
        return []
    test = evaluate(problem.scored, best.params if best else params, *sets["test"])
    return [loop.final_row(problem, test, best.row if best else None, epochs)]


def _program(cohort: Cohort) -> Callable[..., Any]:
    """An epoch of all members and the evaluations after it, as one function of the members' states."""
    (problem, spec, _), config = cohort.setup, cohort.setup.problem.config

    def program(states: State, inputs: Inputs, sets: dict[str, Split], epoch_number: Array, phase: Array) -> Any:
        def member(argument: tuple[State, Inputs]) -> tuple[State, Steps, dict[str, Evaluation]]:
            state, (key, rate) = argument
            mine = spec
            if rate is not None:  # traced: the optimiser is built from it inside the program
                optimizer = optimizers.with_learning_rate(config.optimizer, rate, spec.net)
                mine = dataclasses.replace(spec, optimizer=optimizer)
            order = jax.random.fold_in(key, epoch_number)
            state, steps = epoch(mine, state, *sets["train"], order, phase, problem.weights)
            reported = {name: sets[name] for name in problem.reported}
            return state, steps, {n: evaluate(problem.scored, state.params, *split) for n, split in reported.items()}

        at_once = min(cohort.at_once, len(cohort.members))
        return jax.lax.map(member, (states, inputs), batch_size=None if at_once == 1 else at_once)

    return program


def _initial(cohort: Cohort) -> ParamTree:
    """Drawn once a seed, as the separate run draws them, and stacked: (M, …)."""
    problem = cohort.setup.problem
    drawn = {m.seed: dataclasses.replace(problem, config=m.config).initial() for m in reversed(cohort.members)}
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(drawn[m.seed] for m in cohort.members))


def _inputs(cohort: Cohort) -> Inputs:
    """η in the dtype of the parameters, in which a number of the config meets the gradient."""
    rates = [m.learning_rate for m in cohort.members if m.learning_rate is not None]
    stacked = jnp.stack([run_key(m.config) for m in cohort.members])
    return Inputs(stacked, jnp.asarray(rates, cohort.setup.problem.config.model.dtype) if rates else None)


def _where_alive(alive: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)


# What is asked --------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    if meshes.wanted(config.mesh):
        raise UserError("mesh: a [sweep] runs on one device, in one process: leave out one of the two")
    if config.train.seed + config.sweep.seeds > 2**32:
        found = f"got {config.sweep.seeds}, from train.seed {config.train.seed} on"
        raise UserError(f"sweep.seeds: {found}; seeds end at 2³²")
    if config.checkpoint.every is not None:
        raise UserError("checkpoint.every: a sweep writes no checkpoints")
    if config.train.loggers:
        raise UserError("train.loggers: a sweep has none; metrics.jsonl has the numbers")


# What is measured -----------------------------------------------------------------------------------------------------


def _rows(setup: Setup, steps: Steps, evaluations: dict[str, Evaluation], epoch: int) -> list[Row]:
    """A member's rows of an epoch: the recorded steps up to a bad one, then its row or why there is none."""
    done = (epoch - 1) * len(steps.loss)
    rows: list[Row] = [*metrics.records(setup.spec.recording, steps, epoch, done)]
    ended = metrics.divergence(steps, evaluations, epoch, done)
    return [*rows, ended or loop.epoch_row(setup, evaluations, steps, epoch)]


def _tagged(member: Member, setup: Setup, row: Row) -> MemberRow:
    """The row with its member's seed and η; of a schedule, η of the row's step."""
    rate = member.learning_rate
    rate = float(np.asarray(setup.spec.optimizer.learning_rate(row.step - 1))) if rate is None else rate
    if isinstance(row, EpochRow):
        row = dataclasses.replace(row, learning_rate=rate)  # setup is that of the first member
    return MemberRow(member.seed, rate, member.setting, row, member.fold)


def _medians(rows: Sequence[EpochRow]) -> dict[str, float]:
    """The scores of an epoch, over the members."""
    found = [row.shown() for row in rows]
    return {name: float(np.median([scores[name] for scores in found])) for name in found[0]}


def _save(
    cohort: Cohort, params: ParamTree, best: Sequence[Best | None], rows: Sequence[MemberRow], path: Path
) -> None:
    """The run folder of each member, with its last and its best parameters and its own rows."""
    problem = cohort.setup.problem
    measured: dict[str, list[Row]] = {}
    for row in rows:
        measured.setdefault(f"{row.seed} {row.setting}", []).append(row.row)
    for i, member in enumerate(cohort.members):
        home = path / MEMBERS / member.name
        home.mkdir(parents=True, exist_ok=True)
        (home / UNFINISHED).touch()
        config = dataclasses.replace(member.config, model=problem.config.model)  # with all sizes
        files.replace(home / "config.toml", tomli_w.dumps(to_dict(config)))
        problem.model(jax.tree.map(lambda a: a[i], params)).save(home)  # noqa: B023
        if found := best[i]:
            problem.model(found.params, found.row.epoch).save(home)
        (home / METRICS).unlink(missing_ok=True)  # of a cohort that was stopped before
        folders.append(home / METRICS, measured.get(f"{member.seed} {member.setting}", []))


def _report(sweep: Sweep, groups: Sequence[Group], path: Path) -> None:
    if not scores.names(groups):
        return
    scores.write(groups, path / "scores.csv")
    if sweep.config.train.plots:
        from jaxbp.run.report import figures  # matplotlib takes its time
        from jaxbp.run.sweep import plots

        problems = [cohort.setup.problem for cohort in sweep.cohorts]
        titles = {problem.title for problem in problems}
        shown = titles if len(titles) == 1 else {Path(problem.dataset.name).name for problem in problems}
        kind, heading = sweep.config.train.plot_format, f"{path.name} · {', '.join(sorted(shown))}"
        figures.save(plots.curves(groups, heading), path / f"sweep.{kind}")
        if len(groups) > 1 and any(group.last for group in groups):
            figures.save(plots.against(groups, heading), path / f"scores.{kind}")
