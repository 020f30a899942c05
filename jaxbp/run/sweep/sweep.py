"""`jaxbp run` with a [sweep] table: a run for several seeds and learning rates, in one compiled program.

A member of a sweep is what `jaxbp run --train.seed s --optimizer.learning-rate η` trains: the same initial parameters,
the same order of the samples and, with at_once = 1, the same numbers, bit for bit. Then the members take their turns
within an epoch's program (`lax.map`). With more at once they share each step (`vmap`); XLA's CPU back end gives the
matrix products the same bits then, and another order to the sums over samples (biases) and classes (softmax).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tomli_w
from rich.console import Console

from jaxbp.mlp import Array, Params
from jaxbp.run import loop
from jaxbp.run.compute import mesh as meshes
from jaxbp.run.compute import optimizers
from jaxbp.run.compute.epoch import Evaluation, epoch, evaluate, order_key
from jaxbp.run.compute.program import OneDevice
from jaxbp.run.compute.step import State, Steps
from jaxbp.run.config import Config, SweepConfig, to_dict
from jaxbp.run.data import digest
from jaxbp.run.errors import Diverged, Stopped, UserError
from jaxbp.run.host import signals
from jaxbp.run.loop import Setup
from jaxbp.run.problem import Split
from jaxbp.run.report import metrics, text
from jaxbp.run.report.metrics import Divergence, EpochRow, MemberRow, Row, Timing
from jaxbp.run.report.progress import progress
from jaxbp.run.store import files
from jaxbp.run.store import folder as folders
from jaxbp.run.store.folder import METRICS, TIMINGS, How
from jaxbp.run.store.model import MEMBERS
from jaxbp.run.sweep import scores
from jaxbp.run.sweep.scores import Group


class Member(NamedTuple):
    """One of the separate runs: its config, and what tells it from the others; no learning_rate: a schedule has it."""

    config: Config
    seed: int
    learning_rate: float | None

    @property
    def group(self) -> str:
        """The learning rate, or the name of the schedule: what the members of several seeds have in common."""
        return str(self.config.optimizer.schedule if self.learning_rate is None else self.learning_rate)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"seed-{self.seed}" + ("" if self.learning_rate is None else f"_learning-rate-{self.learning_rate}")


class Sweep(NamedTuple):
    """All that a sweep needs, checked; `setup` is that of the first member."""

    config: Config
    setup: Setup
    members: tuple[Member, ...]


class Inputs(NamedTuple):
    """What differs between members besides their parameters: the key of the order and, if it is swept, η; (M,)."""

    key: Array
    learning_rate: Array | None


class Epoch(NamedTuple):
    """What an epoch gave.

    params: of all members on the host, (M, …); of a diverged one those after its last whole epoch.
    rows: for each member its recorded steps, then its row or, once, why it diverged.
    timing: the seconds of the epoch of all members, their samples a second together.
    """

    params: Params
    rows: list[MemberRow]
    timing: Timing


def run(config: Config, name: str, console: Console, how: How = "auto") -> Path:
    """Trains every member of a sweep and returns the folder, always a new one; `name` names it if the config does not.

    The folder holds config.toml, provenance.json, metrics.jsonl (the lines of a run with `seed` and `learning_rate`; a
    line with `diverged` for a member that did), timings.jsonl, scores.csv, sweep.png, and members/NAME, the run folder
    of each member: config.toml, which trains that one again, and params.safetensors. A sweep that was stopped stays
    marked as unfinished.

    Raises:
      UserError: something in the config does not fit, or the folder can't be written.
      Diverged: all members did.
      Stopped: by SIGTERM or Ctrl-C, after a whole epoch; what was measured is in the folder.
    """
    if how == "resume":
        raise UserError("--resume: a sweep writes no checkpoints; it can only begin again")
    sweep = prepare(config)
    with folders.opened(config, name, digest(sweep.setup.problem.dataset), "new") as folder:
        try:
            text.line(console, f"{describe(sweep)}\nrun folder {folder.path}")
            with files.writable(f"{folder.path}:", after="; what was written before is whole"):
                _train(sweep, folder.path, console)
        except Diverged:
            folder.finish()
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; what was measured is in {folder.path}") from None
        folder.finish()
    return folder.path


def _train(sweep: Sweep, path: Path, console: Console) -> None:
    """Trains to the end; what was measured is in the folder however it ends."""
    config, rows, started = sweep.config, list[MemberRow](), time.perf_counter()
    params = jax.device_get(_initial(sweep))
    try:
        with progress(console, config.train.epochs) as show, signals.deferred() as stop:
            for params, found, timing in epochs(sweep):  # noqa: B007  (the last ones are saved below)
                rows += found
                folders.append(path / TIMINGS, [timing])
                folders.append(path / METRICS, found)
                if measured := [member.row for member in found if isinstance(member.row, EpochRow)]:
                    show(_medians(measured), timing)
                if stop.signal and timing.epoch < config.train.epochs:
                    raise Stopped(f"stopped after epoch {timing.epoch} of {config.train.epochs}", stop.signal)
    finally:
        groups = scores.groups(config, rows)
        _save(sweep, params, groups, path)
    shown = f"{config.train.epochs} epochs, {time.perf_counter() - started:.1f} s of training"
    scores.show(groups, shown, console)
    console.out(scores.best(groups), highlight=False)


def prepare(config: Config) -> Sweep:
    """Reads the data and builds what the members share; UserError for what does not fit together."""
    if meshes.wanted(config.mesh):
        raise UserError("mesh: a [sweep] runs on one device, in one process: leave out one of the two")
    count = config.sweep.seeds * max(1, len(config.sweep.learning_rate))  # more than memory holds are not listed
    setup = loop.prepare(next(_members(config)).config, count)
    return Sweep(config, setup, tuple(_members(config)))


def describe(sweep: Sweep) -> str:
    """The run in one line, the sweep in another."""
    groups = ", ".join(dict.fromkeys(member.group for member in sweep.members))
    first, last, count = sweep.members[0].seed, sweep.members[-1].seed, len(sweep.members)
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    return (
        f"{loop.describe(sweep.setup)}\n"
        f"sweep of {count}: {seeds} × learning rate {groups}; below, medians over the members"
    )


def epochs(sweep: Sweep) -> Iterator[Epoch]:
    """Trains all members; gives what was measured after each epoch.

    Raises:
      Diverged: no member is left.
    """
    (_, spec, program), config = sweep.setup, sweep.config
    assert isinstance(program, OneDevice)  # `prepare` refuses a mesh
    sets = program.sets
    state, members = _start(sweep), _inputs(sweep)
    compiled = jax.jit(_program(sweep), donate_argnums=0).lower(state, members, sets, 1, 0).compile()
    params, alive = jax.device_get((state.params, state.alive))
    count = -(-len(sets["train"].x) // spec.batch_size)
    for number in range(1, config.train.epochs + 1):
        started, done, before = time.perf_counter(), (number - 1) * count, alive
        state, *measured = compiled(state, members, sets, number, done % config.study.every)
        alive = np.array(state.alive)
        seconds = time.perf_counter() - started
        found = jax.device_get(measured)
        rows = list[MemberRow]()
        for i in np.flatnonzero(before):
            steps, evaluations = jax.tree.map(lambda a: a[i], found)  # noqa: B023
            mine = _rows(sweep.setup, steps, evaluations, number)
            alive[i] &= isinstance(mine[-1], EpochRow)
            rows += [_tagged(sweep.members[i], sweep.setup, row) for row in mine]
        params = jax.tree.map(functools.partial(_where, alive), jax.device_get(state.params), params)
        state = state._replace(alive=jnp.asarray(alive))
        samples = int(before.sum()) * len(sets["train"].x)
        yield Epoch(params, rows, Timing(number, seconds, samples / seconds))
        if not alive.any():
            raise Diverged(f"every member of the sweep did; the last ones, {rows[-1].row.line()['diverged']}")


def _program(sweep: Sweep) -> Callable[..., Any]:
    """An epoch of all members and the evaluations after it, as one function of the members' states."""
    problem, spec, _ = sweep.setup

    def program(states: State, inputs: Inputs, sets: dict[str, Split], epoch_number: Array, phase: Array) -> Any:
        def member(argument: tuple[State, Inputs]) -> tuple[State, Steps, dict[str, Evaluation]]:
            state, (key, rate) = argument
            mine = spec
            if rate is not None:  # traced: the optimiser is built from it inside the program
                optimizer = optimizers.with_learning_rate(sweep.config.optimizer, rate)
                mine = dataclasses.replace(spec, optimizer=optimizer)
            state, steps = epoch(mine, state, *sets["train"], jax.random.fold_in(key, epoch_number), phase)
            return state, steps, {name: evaluate(problem.scored, state.params, *split) for name, split in sets.items()}

        at_once = min(sweep.config.sweep.at_once, len(sweep.members))
        return jax.lax.map(member, (states, inputs), batch_size=None if at_once == 1 else at_once)

    return program


def _start(sweep: Sweep) -> State:
    """The states of all members before the first epoch, (M, …)."""
    params = _initial(sweep)
    return State(params, jax.vmap(sweep.setup.spec.optimizer.init)(params), jnp.ones(len(sweep.members), bool))


def _initial(sweep: Sweep) -> Params:
    """Drawn once a seed, as the separate run draws them, and stacked: (M, …)."""
    problem = sweep.setup.problem
    drawn = {m.seed: dataclasses.replace(problem, config=m.config).initial() for m in reversed(sweep.members)}
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(drawn[m.seed] for m in sweep.members))


def _inputs(sweep: Sweep) -> Inputs:
    """η in the dtype of the parameters, in which a number of the config meets the gradient."""
    keys = {m.seed: order_key(m.seed) for m in sweep.members}
    rates = [m.learning_rate for m in sweep.members if m.learning_rate is not None]
    stacked = jnp.stack([keys[m.seed] for m in sweep.members])
    return Inputs(stacked, jnp.asarray(rates, sweep.config.model.dtype) if rates else None)


def _where(alive: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)


# What is asked --------------------------------------------------------------------------------------------------------


def _members(config: Config) -> Iterator[Member]:
    """Seed by seed, each with every learning rate."""
    _check(config)
    for seed in range(config.train.seed, config.train.seed + config.sweep.seeds):
        for rate in config.sweep.learning_rate or (config.optimizer.learning_rate,):
            yield Member(
                dataclasses.replace(
                    config,
                    optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
                    train=dataclasses.replace(config.train, seed=seed, folder=None),
                    sweep=SweepConfig(),
                ),
                seed,
                rate,
            )


def _check(config: Config) -> None:
    rates = config.sweep.learning_rate
    if rates and config.optimizer.schedule is not None:
        raise UserError("sweep.learning_rate: optimizer.schedule gives the learning rate; leave one of them out")
    if len(set(rates)) < len(rates):
        raise UserError(f"sweep.learning_rate: {next(r for r in rates if rates.count(r) > 1)} is there twice")
    if config.train.seed + config.sweep.seeds > 2**32:
        raise UserError(
            f"sweep.seeds: got {config.sweep.seeds}, from train.seed {config.train.seed} on; seeds end at 2³²"
        )
    if config.sweep.at_once > 1 and config.train.memory != "store-all":
        raise UserError("train.memory: members that share a step save nothing by it; leave out sweep.at_once")
    if config.checkpoint.every is not None:
        raise UserError("checkpoint.every: a sweep writes no checkpoints")
    if config.train.tensorboard:
        raise UserError("train.tensorboard: a sweep writes no event files; metrics.jsonl has the numbers")


# What is measured -----------------------------------------------------------------------------------------------------


def _rows(setup: Setup, steps: Steps, evaluations: dict[str, Evaluation], epoch: int) -> list[Row]:
    """A member's rows of an epoch: the recorded steps up to a bad one, then its row or why there is none."""
    done = (epoch - 1) * len(steps.loss)
    rows: list[Row] = [*metrics.records(setup.spec.recording, steps, epoch, done)]
    if (fault := metrics.divergence(steps, evaluations, epoch)) is not None:
        step = min(metrics.first_bad(steps) + 1, len(steps.loss))
        return [*rows, Divergence(epoch, done + step, fault)]
    return [*rows, loop.epoch_row(setup, evaluations, steps, epoch)]


def _tagged(member: Member, setup: Setup, row: Row) -> MemberRow:
    """The row with its member's seed and η; of a schedule, η of the row's step."""
    rate = member.learning_rate
    rate = float(np.asarray(setup.spec.optimizer.learning_rate(row.step - 1))) if rate is None else rate
    return MemberRow(member.seed, rate, row)


def _medians(rows: Sequence[EpochRow]) -> dict[str, float]:
    """The scores of an epoch, over the members."""
    found = [row.scores() for row in rows]
    return {name: float(np.median([scores[name] for scores in found])) for name in found[0]}


def _save(sweep: Sweep, params: Params, groups: Sequence[Group], path: Path) -> None:
    """The run folder of each member, the table and the picture."""
    for i, member in enumerate(sweep.members):
        home = path / MEMBERS / member.name
        home.mkdir(parents=True)
        files.replace(home / "config.toml", tomli_w.dumps(to_dict(member.config)))
        sweep.setup.problem.model(jax.tree.map(lambda a: a[i], params)).save(home)  # noqa: B023
    if scores.names(groups):
        scores.write(groups, path / "scores.csv")
        if sweep.config.train.plots:
            from jaxbp.run.report import figures  # matplotlib takes its time
            from jaxbp.run.sweep import plots

            kind, heading = sweep.config.train.plot_format, f"{path.name} · {sweep.setup.problem.title}"
            figures.save(plots.curves(groups, heading), path / f"sweep.{kind}")
            if len(groups) > 1:
                figures.save(plots.rates(groups, heading), path / f"rates.{kind}")
