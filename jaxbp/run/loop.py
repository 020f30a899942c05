"""`jaxbp run`: from a config to a run folder."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxbp.mlp import MLP, Array
from jaxbp.network import Network, ParamTree, shapes
from jaxbp.run import data, monitor
from jaxbp.run import problem as problems
from jaxbp.run.compute import mesh as meshes
from jaxbp.run.compute import optimizers, privacy, recording
from jaxbp.run.compute import step as steps
from jaxbp.run.compute.epoch import Evaluation, run_key
from jaxbp.run.compute.mesh import OnMesh
from jaxbp.run.compute.program import OneDevice, first_state
from jaxbp.run.compute.step import State, Steps, StepSpec
from jaxbp.run.config import Config
from jaxbp.run.data import Dataset
from jaxbp.run.errors import Diverged, Stopped
from jaxbp.run.host import memory, processes, signals
from jaxbp.run.monitor import Best
from jaxbp.run.networks import takes_tokens, title
from jaxbp.run.problem import Problem
from jaxbp.run.report import loggers, metrics, text
from jaxbp.run.report.metrics import EpochRow, FinalRow, Row, Timing
from jaxbp.run.report.progress import progress, summary
from jaxbp.run.store import folder as folders
from jaxbp.run.store.folder import How, RunFolder, Told

Program = OneDevice | OnMesh
Callback = Callable[[dict[str, Any], ParamTree], None]
"""Of the row of an epoch, as metrics.jsonl has it, and the parameters after it."""


class Setup(NamedTuple):
    """All that a run needs, checked before anything is written."""

    problem: Problem
    spec: StepSpec
    program: Program


class ResumePoint(NamedTuple):
    """Where a run that was stopped goes on: after how many epochs and steps, with which key, state and best epoch."""

    epoch: int
    step: int
    key: Array
    state: State
    best: Best | None = None


class Epoch(NamedTuple):
    """After an epoch: its rows of metrics.jsonl, its own last; its time, evaluations, the run's key, the best epoch."""

    rows: list[Row]
    timing: Timing
    evaluations: dict[str, Evaluation]
    key: Array
    best: Best | None = None

    @property
    def row(self) -> EpochRow:
        """The row of the epoch."""
        return self.rows[-1]  # type: ignore[return-value]


Reached = Epoch | ResumePoint | None
"""How far a run came: to an epoch, or to where it went on; None before its first epoch."""


def run(
    config: Config,
    name: str,
    console: Console,
    how: How = "auto",
    dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    told: Told = lambda line: None,
) -> Path:
    """Trains the network of a config and returns the run folder; `name` names it where the config does not.

    dataset: instead of the one that the config names;  callbacks: are called after every epoch;  told: see
    `folder.opened`.

    A run that was stopped goes on from its newest checkpoint, see `folder.opened`, and ends as if it had not been: with
    the same metrics.jsonl (a line an epoch and, before it, one for each of its recorded steps; with a validation set a
    last one of the test), the same params.safetensors and, where a score is monitored, the same best.safetensors.
    Beside them are config.toml, provenance.json, timings.jsonl, the plots and the checkpoints.

    Raises:
      UserError: something in the config does not fit, or the folder can't be written.
      Diverged: the loss or the gradient of a step was not finite, or the training loss after an epoch.
      Stopped: by SIGTERM or Ctrl-C, after a whole epoch, which is saved.
    """
    setup = processes.on_all(lambda: prepare(config, dataset))
    config = setup.problem.config
    private = setup.spec.privacy
    digest = privacy.UNRECORDED if private else data.digest(setup.problem.dataset)
    known = private.provenance() if private else {}
    with folders.opened(config, name, digest, how, known, told) as folder:
        try:
            if config.data.pca:
                setup = _with_inputs(setup, folder)
            text.line(console, f"{describe(setup)}\nrun folder {folder.path}")
            _train(setup, folder, console, callbacks)
        except Diverged:
            _finish(setup, folder)
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; what was measured is in {folder.path}") from None
        _finish(setup, folder)
    return folder.path


def _with_inputs(setup: Setup, folder: RunFolder) -> Setup:
    """With the projection that the run began with: the noise of a private one is drawn once."""
    problem = dataclasses.replace(setup.problem, inputs=folder.inputs(setup.problem.model(setup.problem.initial())))
    return setup._replace(problem=problem, program=type(setup.program)(problem, setup.spec))


def _finish(setup: Setup, folder: RunFolder) -> None:
    if setup.spec.privacy:
        folder.forget()
    folder.finish()


def prepare(config: Config, dataset: Dataset | None = None) -> Setup:
    """Reads the data and builds network and optimiser; UserError for what does not fit together."""
    kind = OnMesh if meshes.wanted(config.mesh) else OneDevice  # nobody asks again
    return assemble(problems.pose(config, kind.in_place, dataset), kind)


def assemble(problem: Problem, kind: type[Program] = OneDevice, members: int = 1) -> Setup:
    """The step and the program that a problem is learned with; UserError for what its config does not fit.

    members: of a sweep, which train at the same time.
    """
    config = problem.config
    recording.check(config.study.quantities, problem.net)
    loggers.check(config)
    samples = len(problem.dataset.x_train)
    steps.check(config, samples)
    kind.check(config, problem)
    monitor.check(problem)
    if problem.weights is not None:
        steps.check_weighted(config)
    shapes = jax.eval_shape(problem.initial)
    count = -(-samples // config.train.batch_size)
    devices = meshes.shape(config.mesh)
    optimizers.check(config, problem.net, math.prod(devices))
    counted = optimizers.in_steps(config.optimizer, count, config.train.epochs)
    optimizer = optimizers.build(counted, shapes, problem.net)
    private = privacy.plan(config, samples, devices[0])
    spec = steps.spec(config, problem.net, optimizer, private)
    state = jax.eval_shape(optimizer.init, shapes)
    processes.on_all(lambda: _check_memory(problem, shapes, state, members))
    return Setup(problem, spec, kind(problem, spec))


def epochs(setup: Setup, begin: ResumePoint | None = None) -> Iterator[Epoch]:
    """Trains, until the last epoch or [train] patience is over; gives what was measured after each epoch.

    The parameters are `setup.program.whole`.

    Raises:
      Diverged: after an epoch with a bad step, or with a training loss that is not finite.
    """
    problem, spec, program = setup
    train, key = problem.config.train, begin.key if begin else run_key(problem.config)
    program.begin(begin.state if begin else None)
    samples, best = len(problem.dataset.x_train), begin.best if begin else None
    count = -(-samples // spec.batch_size)
    for epoch in range(begin.epoch + 1 if begin else 1, train.epochs + 1):
        if monitor.over(train, best, epoch - 1):
            return
        started, done = time.perf_counter(), (epoch - 1) * count
        phase = done % problem.config.study.every  # an int32, however long the run
        measured = program.epoch(jax.random.fold_in(key, epoch), phase)
        alive = bool(measured.alive[-1])
        seconds = time.perf_counter() - started
        evaluations = {name: program.evaluate(program.params, name) for name in problem.reported if alive}
        records: list[Row] = [*metrics.records(spec.recording, measured, epoch, done)]
        if (fault := metrics.divergence(measured, evaluations, epoch, done)) is not None:
            raise Diverged(fault.diverged, [*records, fault])
        program.keep()
        row = epoch_row(setup, evaluations, measured, epoch)
        best = monitor.kept(train, row, program.params, best)
        yield Epoch([*records, row], Timing(epoch, seconds, samples / seconds), evaluations, key, best)


def _train(setup: Setup, folder: RunFolder, console: Console, callbacks: Sequence[Callback]) -> None:
    """Trains to the end, from where the run was stopped; what was measured is in the folder however it ends."""
    config, started = setup.problem.config, time.perf_counter()
    begin = _resumed(setup, folder, console) if folder.resumed else None
    begun = begin.epoch if begin else 0
    reached: Reached = begin
    with (
        signals.deferred(not console.quiet) as stop,
        progress(console, config.train.epochs, begun) as show,
        loggers.opened(folder, config) as tell,
    ):
        try:
            for reached in epochs(setup, begin):
                stopped = _keep(setup, folder, reached, stop.signal or 0)
                tell(reached.rows, reached.timing)
                show(reached.row.shown(), reached.timing)
                for callback in callbacks:
                    _call(callback, reached.row, setup.program)
                if stopped:
                    at = f"epoch {reached.row.epoch} of {config.train.epochs}"
                    line = f"stopped after {at}, saved in {folder.path}; the same command goes on from there"
                    raise Stopped(line, stopped)
            tested = _tested(setup, reached)
            tell([tested[0]] if tested else [], None)
        except KeyboardInterrupt:  # perhaps in this process alone, and perhaps before there was anything
            if isinstance(reached, Epoch) and jax.process_count() == 1:
                _write_results(setup, folder, reached)
            raise
        except Diverged as error:
            folder.append(error.rows)
            _write_results(setup, folder, reached, f"diverged: {error}; these are the epochs before")
            raise
        except Stopped:
            _write_results(setup, folder, reached)
            raise
    _conclude(setup, folder, reached, tested)
    final = tested[0] if tested else None
    if folder.epochs:
        summary(console, folder.epochs, time.perf_counter() - started, final)
        if private := setup.spec.privacy:
            text.line(console, private.describe())


def _call(callback: Callback, row: EpochRow, program: Program) -> None:
    try:
        callback(row.line(), program.fetch(program.whole))
    except Exception as error:
        error.add_note(f"in the callback {getattr(callback, '__qualname__', callback)}, after epoch {row.epoch}")
        raise


def _tested(setup: Setup, reached: Reached) -> tuple[FinalRow, Evaluation] | None:
    """The last row of a run with a validation set, which looks at the test set only now, and the evaluation."""
    problem, program = setup.problem, setup.program
    assert reached is not None  # a run has an epoch at least
    if "test" in problem.reported:
        return None
    best = reached.best
    test = program.evaluate(best.params if best else program.whole, "test")
    epochs = reached.row.epoch if isinstance(reached, Epoch) else reached.epoch
    return final_row(problem, test, best.row if best else None, epochs), test


def _conclude(setup: Setup, folder: RunFolder, reached: Reached, tested: tuple[FinalRow, Evaluation] | None) -> None:
    """Writes the results of a run that came to its end."""
    if tested is None:
        _write_results(setup, folder, reached)
        return
    final, test = tested
    folder.append([final])
    _write_results(setup, folder, reached, final.describe(), test)


def _keep(setup: Setup, folder: RunFolder, epoch: Epoch, signal: int) -> int:
    """Writes what an epoch measured and, where one is due, a checkpoint; the signal that ends the run now, or 0."""
    row = epoch.row
    stopped, due = processes.largest(signal, folder.due(row.epoch))
    stopped *= row.epoch < setup.problem.config.train.epochs
    folder.append(epoch.rows, epoch.timing)
    if stopped or due:
        folder.checkpoint(row.epoch, row.step, epoch.key, _state(setup, epoch.best), wait=bool(stopped))
    return stopped


def _state(setup: Setup, best: Best | None) -> State:
    """The state on the host; where a score is monitored with the best parameters, or the present ones before those."""
    state = setup.program.state()
    if monitor.score_of(setup.problem.config.train) is None:
        return state
    return state._replace(best=setup.program.fetch(best.params) if best else state.params)


def _write_results(
    setup: Setup, folder: RunFolder, reached: Reached, ended: str = "", test: Evaluation | None = None
) -> None:
    """The parameters after the last whole epoch and the best one, and the pictures, whose headings say how it ended."""
    problem, program = setup.problem, setup.program
    model = problem.model(program.fetch(program.whole))
    folder.save(model)
    if reached and (best := reached.best):
        model = problem.model(program.fetch(best.params), best.row.epoch)
        folder.save(model)
    if not problem.config.train.plots or not processes.from_first(lambda: len(folder.epochs)):
        return
    if "test" in problem.reported:
        test = reached.evaluations["test"] if isinstance(reached, Epoch) else program.evaluate(program.whole, "test")

    def draw(path: Path) -> None:
        from jaxbp.run.report import pictures  # matplotlib takes its time

        pictures.draw(problem, model, folder.epochs, folder.records, test, path, ended)

    folder.draw(draw)


def _resumed(setup: Setup, folder: RunFolder, console: Console) -> ResumePoint | None:
    """Where the newest checkpoint was written; what was measured later is cut off."""
    train, like = setup.problem.config.train, jax.eval_shape(lambda: first_state(setup.problem, setup.spec))
    saved = folder.newest(like if monitor.score_of(train) is None else like._replace(best=like.params))
    if saved is None:
        console.out("no checkpoint: begins again", highlight=False)
        return None
    epoch, step, _, key = saved.position
    console.out(f"goes on after epoch {epoch}, step {step}", highlight=False)
    row = processes.from_first(lambda: (found := monitor.best_of(train, folder.epochs)) and found.line())
    best = Best(metrics.read(row), saved.state.best) if row else None  # type: ignore[arg-type]
    state = saved.state._replace(best=None)
    return ResumePoint(epoch, step, jax.random.wrap_key_data(jnp.asarray(key)), state, best)


def epoch_row(setup: Setup, evaluations: dict[str, Evaluation], steps: Steps, epoch: int) -> EpochRow:
    """The row of an epoch, from the evaluations of the sets and the steps."""
    step = epoch * len(steps.loss)
    found = {split: _scores(setup.problem, split, evaluation) for split, evaluation in evaluations.items()}
    rate = float(np.asarray(setup.spec.optimizer.learning_rate(step - 1)))
    delta, gradient = map(metrics.root_mean, (steps.delta, steps.gradient))
    train, test, delta_rms = found.get("train"), found.get("test"), delta if "train" in found else None
    spent = setup.spec.privacy.epsilon(step) if setup.spec.privacy else None
    norm = None if steps.max_norm is None else float(steps.max_norm[-1])
    return EpochRow(epoch, step, train, test, rate, delta_rms, gradient, spent, found.get("validation"), norm)


def final_row(problem: Problem, test: Evaluation, best: EpochRow | None, epochs: int) -> FinalRow:
    """The row of the test set, evaluated with the parameters of the best epoch or, where there is none, of the last."""
    train, epoch = problem.config.train, best.epoch if best else epochs
    scores, step = _scores(problem, "test", test), epoch * -(-len(problem.dataset.x_train) // train.batch_size)
    return FinalRow(epoch, step, epochs, epochs < train.epochs, scores, monitor.score_of(train) if best else None)


def _scores(problem: Problem, split: str, evaluation: Evaluation) -> metrics.Scores:
    """Of a set; with class weights the balanced accuracy, too."""
    y = problem.raw(split)[1]
    found = metrics.scores(evaluation, y, problem.config.model.loss, problem.targets)
    if problem.config.train.class_weights is None:
        return found
    return found._replace(balanced_accuracy=metrics.balanced_accuracy(evaluation, y))


def describe(setup: Setup) -> str:
    """Network, data, optimiser and device in one line; what a private run spends in another one."""
    problem, config = setup.problem, setup.problem.config
    dataset, net = problem.dataset, problem.net
    shown = (
        f"{'-'.join(map(str, net.sizes))} {config.model.hidden}" if isinstance(net, MLP) else title(net, config.model)
    )
    private = f"\n{setup.spec.privacy.describe()}" if setup.spec.privacy else ""
    parameters = sum(p.size for p in jax.tree.leaves(jax.eval_shape(problem.initial)))
    *sets, test = (f"{len(problem.raw(split)[0]):,} {problems.SPLITS[split]}" for split in dataset.splits)
    begins = f" of {config.model.parameters}" if config.model.parameters else ""
    return (
        f"{dataset.name}: {', '.join(sets)} and {test} samples · "
        f"{shown}, {config.model.loss}, {parameters:,} parameters{begins} in {config.model.dtype} · "
        f"{config.optimizer.name} · {setup.program.devices(config)}{private}"
    )


def _check_memory(problem: Problem, params: ParamTree, state: Any, members: int) -> None:
    """The samples, targets and outputs; parameters twice, or with the best ones, a gradient, the optimiser's state; a
    batch and its δ.
    """
    config, dataset = problem.config, problem.dataset
    split = min(meshes.shape(config.mesh)[0], jax.process_count())
    samples, itemsize = sum(len(problem.raw(s)[0]) for s in dataset.splits), jnp.dtype(config.model.dtype).itemsize
    outputs, net = shapes(problem.net)[1], problem.net
    numbers = dataset.x_train.shape[1] + 2 * (outputs[-1] if len(outputs) == 1 else outputs[0])
    inputs = samples * numbers // split * itemsize
    memory.check(f"data.name: the samples of {dataset.name}, scaled, need", inputs)
    rows = min(config.train.batch_size, len(dataset.x_train)) // config.train.micro_batches
    widest = max(net.sizes) if isinstance(net, MLP) else _forward_numbers(net)
    batch = rows * widest * itemsize
    copies = 3 if monitor.score_of(config.train) is None else 4
    wanted = members * (copies * memory.of_tree(params) + memory.of_tree(state))
    what = f"parameters, gradient, the state of {config.optimizer.name}" + f", {members} times," * (members > 1)
    memory.check(f"model.{'sizes' if isinstance(net, MLP) else 'kind'}: {what} need", wanted)
    memory.check(f"train.batch_size: {what} and a batch need", wanted + 2 * batch)


def _forward_numbers(net: Network) -> int:
    """How many numbers the forward pass of a sample keeps."""
    sample = jax.ShapeDtypeStruct(net.shape, jnp.int32 if takes_tokens(net) else jnp.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.layer.forward, net.parameters, sample)))
