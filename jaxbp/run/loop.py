"""`jaxbp run`: from a config to a run folder."""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxbp import losses
from jaxbp.initializers import BIASES, WEIGHTS, Initializer
from jaxbp.mlp import MLP, Array, Params, init, wide
from jaxbp.run import data, folder, metrics, optimizers, processes, progress, recording, room, signals, training, tricks
from jaxbp.run import mesh as meshes
from jaxbp.run.checkpoint import Checkpoints, Position, Saved
from jaxbp.run.config import Config, MeshConfig, ModelConfig, choose
from jaxbp.run.data import Dataset, Scaling
from jaxbp.run.errors import Diverged, Stopped, UserError
from jaxbp.run.folder import How, Opened
from jaxbp.run.mesh import Source
from jaxbp.run.model import Model, network
from jaxbp.run.optimizers import Optimizer
from jaxbp.run.recording import Recording
from jaxbp.run.training import Evaluation, Program, State, Steps

WORST = 24  # images in worst.png
Samples = Array | np.ndarray


class Split(NamedTuple):
    """The training or the test set on the device: inputs scaled, targets as the loss takes them.

    In a run on a mesh they are on the host as they were read; `mesh.lay_out` scales the rows a device takes.
    """

    x: Samples
    y: Samples


class Log(NamedTuple):
    """What a run measured, as the lines of metrics.jsonl: a line an epoch, a line a recorded step."""

    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]


class Setup(NamedTuple):
    """All that a run needs, checked before anything is written."""

    config: Config
    dataset: Dataset
    model: Model
    optimizer: Optimizer
    train: Split
    test: Split


class Begin(NamedTuple):
    """Where training begins: after how many epochs, with which state; each epoch's order is drawn from the key."""

    epoch: int
    key: Array
    state: State


class Epoch(NamedTuple):
    """After an epoch: the model on the host, the metrics, and the state, which the next epoch takes away."""

    model: Model
    row: dict[str, Any]
    state: State


def run(config: Config, name: str, console: Console, how: How = "auto") -> Path:
    """Trains the network of a config and returns the run folder; `name` names it where the config does not.

    A run that was stopped goes on from its newest checkpoint, see `folder.opened`, and ends as if it had not been: with
    the same metrics.jsonl (a line an epoch and, before it, one for each of its recorded steps) and the same
    params.safetensors. Beside them are config.toml, provenance.json, timings.jsonl, the plots and the checkpoints.

    Raises:
      UserError: something in the config does not fit, or the folder can't be written.
      Diverged: the loss or the gradient of a step was not finite.
      Stopped: by SIGTERM or Ctrl-C, after a whole epoch, which is saved.
    """
    setup = processes.together(lambda: prepare(config))
    with contextlib.ExitStack() as stack:

        def enter() -> Opened:
            return stack.enter_context(folder.opened(config, name, data.digest(setup.dataset), how))

        opened = processes.shared(enter)
        path = opened.path
        console.out(f"{describe(setup)}\nrun folder {path}", highlight=False)  # brackets in a name are no markup
        try:
            with _writable(path):
                _train(setup, opened, console)
        except Diverged:
            processes.by_first(lambda: folder.finish(path))
            raise
        processes.by_first(lambda: folder.finish(path))
    return path


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}; what was written before is whole") from None


def _train(setup: Setup, opened: Opened, console: Console) -> None:
    """Trains to the end, from where the run was stopped; what was measured is in the folder however it ends."""
    path, config = opened.path, setup.config
    started = time.perf_counter()
    with Checkpoints(path, config.checkpoint) as checkpoints, signals.noted(processes.leads()) as stop:
        begin, log = _resume(setup, path, checkpoints, console) if opened.resumed else (first(setup), Log([], []))
        model = setup.model._replace(params=meshes.host(begin.state.params))
        try:
            with (
                progress.shown(console, config.train.epochs, begin.epoch) as show,
                _event_files(config, path, begin.epoch) as write,
            ):
                for model, row, state in epochs(setup, log.steps, begin):  # noqa: B007  (the last one is written below)
                    stopped, due = processes.largest(stop.signal or 0, checkpoints.due(row["epoch"]))
                    stopped *= row["epoch"] < config.train.epochs
                    whole = meshes.host(state) if stopped or due else None
                    processes.by_first(functools.partial(_keep, path, log, row, checkpoints, begin.key, whole))
                    write(row)
                    show(row)
                    if stopped:
                        processes.by_first(checkpoints.wait)
                        at = f"epoch {row['epoch']} of {config.train.epochs}"
                        raise Stopped(
                            f"stopped after {at}, saved in {path}; the same command goes on from there", stopped
                        )
        except KeyboardInterrupt:  # perhaps in this process alone
            if processes.leads():
                _write_results(setup, model, log, path)
            raise
        except (Diverged, Stopped):
            processes.by_first(functools.partial(_write_results, setup, model, log, path))
            raise
        processes.by_first(functools.partial(_write_results, setup, model, log, path))
    if log.epochs:
        console.print(progress.summary(log.epochs, time.perf_counter() - started))


def _resume(setup: Setup, path: Path, checkpoints: Checkpoints, console: Console) -> tuple[Begin, Log]:
    """Where the newest checkpoint was written, and what was measured until then; what was measured later is cut off."""
    like = jax.eval_shape(functools.partial(_beginning, setup.optimizer), setup.model.params)

    def read() -> tuple[Saved | None, list[dict[str, Any]]]:
        saved = checkpoints.newest(like, lambda fault: print(f"jaxbp: warning: {fault}", file=sys.stderr))
        where = saved.position if saved else Position(0, 0, 0, np.zeros(0))
        return saved, folder.rewind(path, where.metrics_bytes, where.epoch)

    saved, rows = processes.shared(read)
    if saved is None:
        console.out("unfinished, without a checkpoint: begins again", highlight=False)
        return first(setup), Log([], [])
    epoch, step, _, key = saved.position
    console.out(f"unfinished: goes on after epoch {epoch}, step {step}", highlight=False)
    log = Log([row for row in rows if "batch_loss" not in row], [row for row in rows if "batch_loss" in row])
    state = saved.state if meshes.asked(setup.config.mesh) else _own(saved.state)
    return Begin(epoch, jax.random.wrap_key_data(jnp.asarray(key)), state), log


def _keep(path: Path, log: Log, row: dict[str, Any], checkpoints: Checkpoints, key: Array, state: State | None) -> None:
    """Writes what an epoch measured and, if there is one, begins to write the state after it."""
    with _writable(path):
        length = _append(path, log, row)
    if state is not None:
        checkpoints.save(Position(row["epoch"], row["step"], length, np.asarray(jax.random.key_data(key))), state)


def _append(path: Path, log: Log, row: dict[str, Any]) -> int:
    """Writes what an epoch measured; the length of metrics.jsonl. Times are apart: it is the same in every run."""
    folder.append(path, {name: row[name] for name in ("epoch", *metrics.TIMINGS)}, to=folder.TIMINGS)
    log.epochs.append({name: value for name, value in row.items() if name not in metrics.TIMINGS})
    return folder.append(path, *(r for r in log.steps if r["epoch"] == row["epoch"]), log.epochs[-1])


def _write_results(setup: Setup, model: Model, log: Log, path: Path) -> None:
    with _writable(path):
        if unwritten := [r for r in log.steps if r["epoch"] > len(log.epochs)]:  # of the epoch that diverged
            folder.append(path, *unwritten)
        model.save(path)
        if setup.config.train.plots and log.epochs:
            draw(setup, model, log, path)


def prepare(config: Config, members: int = 1) -> Setup:
    """Reads the data and builds network, parameters and optimiser; UserError for what does not fit together.

    members: of a sweep, which train at the same time.
    """
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    dataset = processes.in_turn(lambda: data.load(config.data, in_place=meshes.asked(config.mesh)))
    net = network(config.model)
    _check_fit(net, dataset)
    inputs = Scaling.fit(dataset.x_train, config.data.standardize)
    targets = None
    if not dataset.classes:
        targets = Scaling.fit(dataset.y_train, "feature" if config.data.standardize_targets else "none")
    for name in config.study.quantities:
        choose("study.quantities", "quantity", name, recording.QUANTITIES)
    tricks.check(config, len(dataset.x_train))
    make = functools.partial(initial, net, config)
    shapes = jax.eval_shape(make)
    optimizer = optimizers.build(config.optimizer, shapes)
    state = jax.eval_shape(optimizer.init, shapes)
    processes.together(lambda: _check_room(config, shapes, state, dataset, members))
    if meshes.asked(config.mesh):
        meshes.check(config, net, len(dataset.x_train))
        params = meshes.spread(meshes.build(config.mesh), net, make)
    else:
        params = make()
    model = Model(net, params, inputs, targets, dataset.classes)
    train, test = (dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)
    if meshes.asked(config.mesh):
        return Setup(config, dataset, model, optimizer, Split(*train), Split(*test))
    return Setup(config, dataset, model, optimizer, _on_device(model, *train), _on_device(model, *test))


def initial(net: MLP, config: Config) -> Params:
    """The parameters that a run begins with."""
    weights, biases = _initializers(config.model)
    return init(net, jax.random.key(config.train.seed), weights, biases, config.model.dtype)


def first(setup: Setup) -> Begin:
    """The beginning of a run."""
    config, model = setup.config, setup.model
    state = functools.partial(_beginning, setup.optimizer)
    if meshes.asked(config.mesh):
        state = functools.partial(meshes.spread, meshes.build(config.mesh), model.net, state)
    return Begin(0, order_key(config.train.seed), _own(state(model.params)))


def _beginning(optimizer: Optimizer, params: Params) -> State:
    return State(params, optimizer.init(params), jnp.array(True))


def _own(state: State) -> State:
    """A copy on the device, for the epoch takes its state away (donation).

    No leaf is weakly typed: a checkpoint does not know which were, and the same program has to go on from it.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), state)


def epochs(setup: Setup, recorded: list[dict[str, Any]] | None = None, begin: Begin | None = None) -> Iterator[Epoch]:
    """Trains; gives the model and its metrics after each epoch, and raises Diverged after one with a bad step.

    Adds what the [study] table records to `recorded`, a line a step, before it gives the epoch.
    """
    config = setup.config.train
    begun, key, state = begin or first(setup)
    steps = -(-len(setup.train.x) // config.batch_size)
    study = setup.config.study
    record = Recording(study.quantities, study.every) if study.quantities and recorded is not None else None
    program = _program(setup, record, state)
    state = program.place(state)
    for epoch in range(begun + 1, config.epochs + 1):
        started = time.perf_counter()
        done = (epoch - 1) * steps
        phase = done % study.every  # an int32, however long the run
        state, measured = program.epoch(state, jax.random.fold_in(key, epoch), phase)
        alive = bool(state.alive)
        seconds = time.perf_counter() - started
        model = setup.model._replace(params=program.host(state.params))
        bad = first_bad(measured)
        if record is not None and recorded is not None:
            recorded += recording.rows(record, measured.recorded, np.asarray(measured.loss)[: bad + 1], epoch, done)
        if not alive:
            raise Diverged(divergence(measured, epoch))
        evaluations = {name: program.evaluate(_scored(setup), model.params, name) for name in ("train", "test")}
        row = epoch_row(setup, evaluations, measured, epoch)
        row |= {"seconds": seconds, "samples_per_second": len(setup.train.x) / seconds}
        yield Epoch(model, row, state)


def order_key(seed: int) -> Array:
    """The key of the order of the samples; epoch e, from 1 on, draws from ``fold_in(key, e)``."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def first_bad(measured: Steps) -> int:
    """The first step of an epoch whose loss or gradient is not finite; the count of steps where there is none."""
    finite = np.isfinite(np.asarray(measured.loss)) & np.isfinite(np.asarray(measured.gradient)).all(axis=1)
    return len(finite) if finite.all() else int(np.argmin(finite))


def divergence(measured: Steps, epoch: int) -> str:
    """What was found in the first bad step of an epoch, and where."""
    bad, loss = first_bad(measured), np.asarray(measured.loss)
    found = "the gradient overflows" if np.isfinite(loss[bad]) else f"the loss is {loss[bad]}"
    return f"{found} at epoch {epoch}, step {bad + 1} of {len(loss)}"


def epoch_row(setup: Setup, evaluations: dict[str, Evaluation], measured: Steps, epoch: int) -> dict[str, Any]:
    """A line of metrics.jsonl, without seconds, from the evaluations "train" and "test" and the steps of an epoch."""
    step = epoch * len(measured.loss)
    row: dict[str, Any] = {"epoch": epoch, "step": step}
    for name in ("train", "test"):
        row |= metrics.scores(name, evaluations[name], _raw_targets(setup, name), setup.model.targets)
    rate = float(np.asarray(setup.optimizer.learning_rate(step - 1)))
    return row | {"learning_rate": rate, **metrics.layers(measured)}


def draw(setup: Setup, model: Model, log: Log, path: Path) -> None:
    """The plots of a run, into its folder."""
    from jaxbp.run import plots

    plots.learning_curves(log.epochs, path / "learning_curves.png")
    plots.layer_rms(log.epochs, path / "layers.png")
    if log.steps and "noise_scale" in log.steps[0]:
        plots.noise_scale(log.steps, path / "noise_scale.png")
    if setup.dataset.image_shape is None:
        return
    plots.first_layer(np.asarray(model.params[0].w, np.float32), setup.dataset.image_shape, path / "first_layer.png")
    if model.classes:
        test = _on_device(model, setup.dataset.x_test, setup.dataset.y_test)
        evaluation = training.evaluate(_scored(setup), model.params, *test)
        order = np.argsort(-np.asarray(evaluation.loss), kind="stable")[:WORST]
        labels = [model.classes[label] for label in setup.dataset.y_test[order]]
        guesses = [model.classes[label] for label in np.asarray(evaluation.output)[order].argmax(axis=1)]
        images, worst_losses = setup.dataset.x_test[order], np.asarray(evaluation.loss)[order]
        plots.worst(images, labels, guesses, worst_losses, setup.dataset.image_shape, path / "worst.png")


def describe(setup: Setup) -> str:
    """Network, data, optimiser and device in one line."""
    net, config = setup.model.net, setup.config
    parameters = sum(p.size for p in jax.tree.leaves(setup.model.params))
    return (
        f"{setup.dataset.name}: {len(setup.train.x):,} training and {len(setup.test.x):,} test samples · "
        f"{'-'.join(map(str, net.sizes))} {config.model.hidden}, {config.model.loss}, {parameters:,} parameters in "
        f"{config.model.dtype} · {config.optimizer.name} · {_devices(config.mesh)}"
    )


def _devices(config: MeshConfig) -> str:
    kind, (data, model), count = jax.devices()[0].device_kind, meshes.shape(config), jax.process_count()
    if not meshes.asked(config):
        return kind
    return f"{data} × {model} {kind}" + (f" in {count} processes" if count > 1 else "")


def _program(setup: Setup, record: Recording | None, state: State) -> Program:
    net, optimizer, batch_size = setup.model.net, setup.optimizer, setup.config.train.batch_size
    how = tricks.tricks(setup.config.train, net)
    sets = {"train": setup.train, "test": setup.test}
    if not meshes.asked(setup.config.mesh):
        return training.one_device(net, optimizer, batch_size, sets, record, state, how)  # type: ignore[arg-type]

    sources = {name: Source(len(split.x), functools.partial(_rows, setup.model, split)) for name, split in sets.items()}
    return meshes.program(meshes.build(setup.config.mesh), net, optimizer, batch_size, sources, record, state, how)


def _scored(setup: Setup) -> MLP:
    """The network with the loss that is reported: without label smoothing."""
    return dataclasses.replace(setup.model.net, loss=setup.config.model.loss)


def _raw_targets(setup: Setup, name: str) -> np.ndarray:
    return np.asarray(getattr(setup.dataset, f"y_{name}"))


def _check_fit(net: MLP, dataset: Dataset) -> None:
    inputs = dataset.x_train.shape[1]
    outputs = len(dataset.classes) if dataset.classes else dataset.y_train.shape[1]
    if net.sizes[0] != inputs:
        raise UserError(f"model.sizes: begins with {net.sizes[0]}, {dataset.name} has {inputs} inputs")
    if net.sizes[-1] != outputs:
        kind = "classes" if dataset.classes else "targets"
        raise UserError(f"model.sizes: ends with {net.sizes[-1]}, {dataset.name} has {outputs} {kind}")
    loss = losses.get(net.loss)
    if not dataset.classes and loss.target == "label":
        raise UserError(f"model.loss: {loss.name} takes labels, the targets of {dataset.name} are numbers")
    probabilities = loss.target == "label or array" or loss.name == "kl_divergence"
    if not dataset.classes and probabilities and not _are_probabilities(dataset.y_train):
        raise UserError(f"model.loss: {loss.name} takes probabilities, the targets of {dataset.name} are numbers")


def _check_room(config: Config, params: Params, state: Any, dataset: Dataset, members: int) -> None:
    """The samples; initial and trained parameters, a gradient, the optimiser's state; a batch's widest layer and δ."""
    samples, split = len(dataset.x_train), min(meshes.shape(config.mesh)[0], jax.process_count())
    inputs = (dataset.x_train.size + dataset.x_test.size) // split * params[0].w.dtype.itemsize
    room.check(f"data.name: the samples of {dataset.name}, scaled, need", inputs)
    rows = min(config.train.batch_size, samples) // config.train.micro_batches
    batch = rows * max(config.model.sizes) * params[0].w.dtype.itemsize
    wanted = members * (3 * room.of_tree(params) + room.of_tree(state))
    what = f"parameters, gradient, the state of {config.optimizer.name}" + f", {members} times," * (members > 1)
    room.check(f"model.sizes: {what} need", wanted)
    room.check(f"train.batch_size: {what} and a batch need", wanted + 2 * batch)


def _are_probabilities(y: np.ndarray) -> bool:
    return bool(np.all(y >= 0) and np.allclose(y.sum(axis=1), 1))


def _on_device(model: Model, x: np.ndarray, y: np.ndarray) -> Split:
    return Split(*(jnp.asarray(part) for part in _scaled(model, x, y)))


def _rows(model: Model, split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _scaled(model, np.asarray(split.x[rows]), np.asarray(split.y[rows]))


def _scaled(model: Model, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """On the host: the inputs scaled; labels one-hot for a loss that takes numbers, targets scaled."""
    dtype = model.params[0].w.dtype
    x = model.inputs.apply(x, np.float64 if dtype == np.float64 else np.float32).astype(dtype)
    if model.targets is not None:
        return x, model.targets.apply(y).astype(wide(dtype))
    return x, np.eye(model.net.sizes[-1], dtype=dtype)[y] if losses.get(model.net.loss).target == "array" else y


def _initializers(config: ModelConfig) -> tuple[Initializer, Initializer]:
    """Those of jaxbp by their names, with another standard deviation where the config has one."""
    for key, name in (("scheme", config.scheme), ("bias", config.bias)):
        if getattr(config, f"{key}_std") is not None and name != "normal":
            raise UserError(f'model.{key}_std: only {key} "normal" has it, {key} is "{name}"')
    normal = jax.nn.initializers.normal
    weights = (
        normal(config.scheme_std) if config.scheme_std else choose("model.scheme", "scheme", config.scheme, WEIGHTS)
    )
    biases = normal(config.bias_std) if config.bias_std else BIASES[config.bias]
    return weights, biases


@contextlib.contextmanager
def _event_files(config: Config, path: Path, begun: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives the function that writes the numbers of an epoch as TensorBoard events, if the config asks for them."""
    if not config.train.tensorboard or not processes.leads():
        yield lambda row: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(path / "events"), purge_step=begun + 1) as events:

        def write(row: dict[str, Any]) -> None:
            for name, value in (scalar for item in row.items() for scalar in _scalars(*item)):
                events.add_scalar(name, value, row["epoch"])

        yield write


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    """A list of a number a layer becomes name/layer_1 …"""
    if isinstance(value, list):
        return [(f"{name}/layer_{i}", v) for i, v in enumerate(value, 1)]
    return [(name, float(value))]
