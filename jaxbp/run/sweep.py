"""`jaxbp run` with a [sweep] table: a run for several seeds and learning rates, in one compiled program.

A member of a sweep is what `jaxbp run --train.seed s --optimizer.learning-rate η` trains: the same initial parameters,
the same order of the samples and, with at_once = 1, the same numbers, bit for bit. Then the members take their turns
within an epoch's program (`lax.map`). With more at once they share each step (`vmap`); XLA's CPU back end gives the
matrix products the same bits then, and another order to the sums over samples (biases) and classes (softmax).
"""

import dataclasses
import functools
import inspect
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
from jaxbp.run import folder, loop, metrics, optimizers, progress, recording, signals, sweep_scores, training, tricks
from jaxbp.run import mesh as meshes
from jaxbp.run.config import Config, SweepConfig, to_dict
from jaxbp.run.data import digest
from jaxbp.run.errors import Diverged, Stopped, UserError
from jaxbp.run.folder import How
from jaxbp.run.loop import Setup, Split
from jaxbp.run.model import MEMBERS
from jaxbp.run.recording import Recording
from jaxbp.run.sweep_scores import Group
from jaxbp.run.training import Evaluation, State, Steps


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
    lines: of metrics.jsonl: for each member its recorded steps, then its row or, once, why it diverged.
    timing: of timings.jsonl: the seconds of the epoch of all members, their samples a second together.
    """

    params: Params
    lines: list[dict[str, Any]]
    timing: dict[str, Any]


def run(config: Config, name: str, console: Console, how: How = "auto") -> Path:
    """Trains every member of a sweep and returns the folder, always a new one; `name` names it if the config does not.

    The folder holds config.toml, provenance.json, metrics.jsonl (the lines of a run with `seed` and `learning_rate`; a
    line with `diverged` for a member that did), timings.jsonl, scores.csv, sweep.png, and members/NAME, the run folder
    of each member: config.toml, which trains that one again, and params.safetensors.

    Raises:
      UserError: something in the config does not fit, or the folder can't be written.
      Diverged: all members did.
      Stopped: by SIGTERM or Ctrl-C, after a whole epoch; what was measured is in the folder.
    """
    if how == "resume":
        raise UserError("--resume: a sweep writes no checkpoints; it can only begin again")
    sweep = prepare(config)
    with folder.opened(config, name, digest(sweep.setup.dataset), "new") as opened:
        path = opened.path
        console.out(f"{describe(sweep)}\nrun folder {path}", highlight=False)  # brackets in a name are no markup
        try:
            _train(sweep, path, console)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror}; what was written before is whole") from None
        finally:
            folder.finish(path)
    return path


def _train(sweep: Sweep, path: Path, console: Console) -> None:
    """Trains to the end; what was measured is in the folder however it ends."""
    config, lines = sweep.config, list[dict[str, Any]]()
    params, started = jax.device_get(_initial(sweep)), time.perf_counter()
    try:
        with progress.shown(console, config.train.epochs) as show, signals.noted() as stop:
            for params, found, timing in epochs(sweep):  # noqa: B007  (the last ones are saved below)
                lines += found
                folder.append(path, timing, to=folder.TIMINGS)
                folder.append(path, *found)
                if rows := [line for line in found if sweep_scores.is_row(line)]:
                    show(_medians(rows) | timing)
                if stop.signal and timing["epoch"] < config.train.epochs:
                    raise Stopped(f"stopped after epoch {timing['epoch']} of {config.train.epochs}", stop.signal)
    finally:
        groups = sweep_scores.groups(config, lines)
        _save(sweep, params, groups, path)
    shown = f"{config.train.epochs} epochs, {time.perf_counter() - started:.1f} s of training"
    console.print(sweep_scores.table(groups, shown))
    console.out(sweep_scores.best(groups), highlight=False)


def prepare(config: Config) -> Sweep:
    """Reads the data and builds what the members share; UserError for what does not fit together."""
    if meshes.asked(config.mesh):
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
    setup, config, study = sweep.setup, sweep.config.train, sweep.config.study
    record = Recording(study.quantities, study.every) if study.quantities else None
    state, members = _start(sweep), _inputs(sweep)
    program = jax.jit(_program(sweep, record), donate_argnums=0)
    compiled = program.lower(state, members, setup.train, setup.test, 1, 0).compile()
    params, alive = jax.device_get((state.params, state.alive))
    steps = -(-len(setup.train.x) // config.batch_size)
    for epoch in range(1, config.epochs + 1):
        started, done, before = time.perf_counter(), (epoch - 1) * steps, alive
        state, *measured = compiled(state, members, setup.train, setup.test, epoch, done % study.every)
        alive = np.asarray(state.alive)
        seconds = time.perf_counter() - started
        params = jax.tree.map(functools.partial(_where, alive), jax.device_get(state.params), params)
        found = jax.device_get(measured)
        samples = int(before.sum()) * len(setup.train.x)
        lines = []
        for i in np.flatnonzero(before):
            mine, evaluations = jax.tree.map(lambda a: a[i], found)  # noqa: B023
            for line in _lines(setup, record, mine, evaluations, epoch):
                lines.append(_tagged(sweep.members[i], setup, line))
        yield Epoch(params, lines, {"epoch": epoch, "seconds": seconds, "samples_per_second": samples / seconds})
        if not alive.any():
            raise Diverged(f"every member of the sweep did; the last ones, {lines[-1]['diverged']}")


def _program(sweep: Sweep, record: Recording | None) -> Callable[..., Any]:
    """An epoch of all members and the evaluations after it, as one function of the members' states."""
    setup, config = sweep.setup, sweep.config
    net, evaluated = setup.model.net, dataclasses.replace(setup.model.net, loss=config.model.loss)

    def program(states: State, inputs: Inputs, train: Split, test: Split, epoch: Array, phase: Array) -> Any:
        def member(argument: tuple[State, Inputs]) -> tuple[State, Steps, dict[str, Evaluation]]:
            state, (key, rate) = argument
            key = jax.random.fold_in(key, epoch)
            optimizer = setup.optimizer
            if rate is not None:  # traced: the optimiser is built from it inside the program
                optimizer = optimizers.with_learning_rate(config.optimizer, rate)
            one_epoch = inspect.unwrap(
                training.epoch
            )  # not jitted by itself: an optimiser that holds a tracer is no key
            state, steps = one_epoch(net, optimizer, config.train.batch_size, state, *train, key, record, phase, chosen)
            after = {name: training.evaluate(evaluated, state.params, *split) for name, split in splits}
            return state, steps, after

        chosen = tricks.tricks(config.train, net)
        splits = (("train", train), ("test", test))
        at_once = min(config.sweep.at_once, len(sweep.members))
        return jax.lax.map(member, (states, inputs), batch_size=None if at_once == 1 else at_once)

    return program


def _start(sweep: Sweep) -> State:
    """The states of all members before the first epoch, (M, …)."""
    params = _initial(sweep)
    return State(params, jax.vmap(sweep.setup.optimizer.init)(params), jnp.ones(len(sweep.members), bool))


def _initial(sweep: Sweep) -> Params:
    """Drawn once a seed, as the separate run draws them, and stacked: (M, …)."""
    drawn = {m.seed: loop.initial(sweep.setup.model.net, m.config) for m in reversed(sweep.members)}
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(drawn[m.seed] for m in sweep.members))


def _inputs(sweep: Sweep) -> Inputs:
    """η in the dtype of the parameters, in which a number of the config meets the gradient."""
    keys = {m.seed: loop.order_key(m.seed) for m in sweep.members}
    rates = [m.learning_rate for m in sweep.members if m.learning_rate is not None]
    dtype = sweep.setup.model.params[0].w.dtype
    return Inputs(jnp.stack([keys[m.seed] for m in sweep.members]), jnp.asarray(rates, dtype) if rates else None)


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


def _lines(
    setup: Setup, record: Recording | None, measured: Steps, evaluations: dict[str, Evaluation], epoch: int
) -> Iterator[dict[str, Any]]:
    """A member's lines of an epoch: the recorded steps up to a bad one, then its row or why there is none."""
    steps, bad = len(measured.loss), loop.first_bad(measured)
    if record is not None:
        yield from recording.rows(
            record, measured.recorded, np.asarray(measured.loss)[: bad + 1], epoch, (epoch - 1) * steps
        )
    if bad < steps:
        where = {"epoch": epoch, "step": (epoch - 1) * steps + bad + 1}
        yield where | {"diverged": loop.divergence(measured, epoch)}
    else:
        yield loop.epoch_row(setup, evaluations, measured, epoch)


def _tagged(member: Member, setup: Setup, line: dict[str, Any]) -> dict[str, Any]:
    """The line with its member's seed and η; of a schedule, η of the line's step."""
    rate = member.learning_rate
    rate = float(np.asarray(setup.optimizer.learning_rate(line["step"] - 1))) if rate is None else rate
    return {"seed": member.seed, "learning_rate": rate} | line | {"learning_rate": rate}


def _medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of an epoch, over the members."""
    names = [name for name in rows[0] if metrics.is_score(name)]
    return {name: float(np.median([row[name] for row in rows])) for name in names}


def _save(sweep: Sweep, params: Params, groups: Sequence[Group], path: Path) -> None:
    """The run folder of each member, the table and the picture."""
    for i, member in enumerate(sweep.members):
        home = path / MEMBERS / member.name
        home.mkdir(parents=True)
        (home / "config.toml").write_text(tomli_w.dumps(to_dict(member.config)), encoding="utf-8")
        sweep.setup.model._replace(params=jax.tree.map(lambda a: a[i], params)).save(home)  # noqa: B023
    if sweep_scores.names(groups):
        sweep_scores.write(groups, path / "scores.csv")
        if sweep.config.train.plots:
            from jaxbp.run import sweep_plots  # matplotlib takes its time

            sweep_plots.curves(groups, path / "sweep.png")
