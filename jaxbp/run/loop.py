"""`jaxbp run`: from a config to a run folder."""

import contextlib
import dataclasses
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
from jaxbp.mlp import MLP, Array, init, wide
from jaxbp.run import data, folder, metrics, optimizers, progress, recording, training
from jaxbp.run.config import Config, ModelConfig, choose
from jaxbp.run.data import Dataset, Scaling
from jaxbp.run.errors import Diverged, UserError
from jaxbp.run.model import Model, network
from jaxbp.run.optimizers import Optimizer
from jaxbp.run.recording import Recording
from jaxbp.run.training import Evaluation, State

WORST = 24  # images in worst.png


class Split(NamedTuple):
    """The training or the test set on the device: inputs scaled, targets as the loss takes them."""

    x: Array
    y: Array


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


def run(config: Config, name: str, console: Console) -> Path:
    """Trains the network of a config and returns the run folder; `name` names it where the config does not.

    The folder holds config.toml, provenance.json, metrics.jsonl (a line an epoch and, before it, one for each of its
    recorded steps), params.safetensors and the plots. It holds what was measured so far, and the parameters after the
    last whole epoch, when the run is interrupted.

    Raises:
      UserError: something in the config does not fit, or the folder can't be written; then nothing was trained.
      Diverged: the loss or the gradient of a step was not finite.
    """
    setup = prepare(config)
    path = folder.create(config, name)
    console.out(f"{describe(setup)}\nrun folder {path}", highlight=False)  # brackets in a name are no markup
    rows, recorded = log = Log([], [])
    model, started = setup.model, time.perf_counter()
    try:
        with progress.shown(console, config.train.epochs) as show, _event_files(config, path) as write:
            for model, row in epochs(setup, recorded):  # noqa: B007  (the last one is saved below)
                rows.append(row)
                folder.append(path, *(r for r in recorded if r["epoch"] == row["epoch"]), row)
                write(row)
                show(row)
    finally:
        model.save(path)
        if unwritten := [r for r in recorded if r["epoch"] > len(rows)]:  # of the epoch in which the run diverged
            folder.append(path, *unwritten)
        if config.train.plots and rows:
            draw(setup, model, log, path)
    console.print(progress.summary(rows, time.perf_counter() - started))
    return path


def prepare(config: Config) -> Setup:
    """Reads the data and builds network, parameters and optimiser; UserError for what does not fit together."""
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    dataset = data.load(config.data)
    net = network(config.model)
    _check_fit(net, dataset)
    inputs = Scaling.fit(dataset.x_train, config.data.standardize)
    targets = None
    if not dataset.classes:
        targets = Scaling.fit(dataset.y_train, "feature" if config.data.standardize_targets else "none")
    for name in config.study.quantities:
        choose("study.quantities", "quantity", name, recording.QUANTITIES)
    weights, biases = _initializers(config.model)
    params = init(net, jax.random.key(config.train.seed), weights, biases, config.model.dtype)
    model = Model(net, params, inputs, targets, dataset.classes)
    optimizer = optimizers.build(config.optimizer, params)
    train = _split(model, dataset.x_train, dataset.y_train)
    return Setup(config, dataset, model, optimizer, train, _split(model, dataset.x_test, dataset.y_test))


def epochs(setup: Setup, recorded: list[dict[str, Any]] | None = None) -> Iterator[tuple[Model, dict[str, Any]]]:
    """Trains; gives the model and its metrics after each epoch, and raises Diverged after one with a bad step.

    Adds what the [study] table records to `recorded`, a line a step, before it gives the epoch.
    """
    config, (net, params, *_) = setup.config.train, setup.model
    state = State(params, setup.optimizer.init(params), jnp.array(True))
    state = jax.tree.map(jnp.copy, state)  # the epoch takes its state away (donation); the initial model stays
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    steps = -(-len(setup.train.x) // config.batch_size)
    study = setup.config.study
    record = Recording(study.quantities, study.every) if study.quantities and recorded is not None else None
    arguments = (net, setup.optimizer, config.batch_size)
    compiled = training.epoch.lower(*arguments, state, *setup.train, key, record, 0).compile()
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        done = (epoch - 1) * steps
        phase = done % study.every  # an int32, however long the run
        state, measured = compiled(state, *setup.train, jax.random.fold_in(key, epoch), phase)
        alive = bool(state.alive)
        seconds = time.perf_counter() - started
        model = setup.model._replace(params=jax.device_get(state.params))
        loss, gradient = np.asarray(measured.loss), np.asarray(measured.gradient)
        bad = steps if alive else int(np.flatnonzero(~(np.isfinite(loss) & np.isfinite(gradient).all(axis=1)))[0])
        if record is not None and recorded is not None:
            recorded += recording.rows(record, measured.recorded, loss[: bad + 1], epoch, done)
        if not alive:
            found = "the gradient overflows" if np.isfinite(loss[bad]) else f"the loss is {loss[bad]}"
            raise Diverged(f"{found} at epoch {epoch}, step {bad + 1} of {steps}")
        row: dict[str, Any] = {"epoch": epoch, "step": epoch * steps}
        for name in ("train", "test"):
            row |= metrics.scores(name, _evaluate(setup, model, name), _raw_targets(setup, name), model.targets)
        row |= {
            "learning_rate": float(np.asarray(setup.optimizer.learning_rate(epoch * steps - 1))),
            **metrics.layers(measured),
        }
        yield model, row | {"seconds": seconds, "samples_per_second": len(setup.train.x) / seconds}


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
        evaluation = _evaluate(setup, model, "test")
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
        f"{config.model.dtype} · {config.optimizer.name} · {jax.devices()[0].device_kind}"
    )


def _evaluate(setup: Setup, model: Model, name: str) -> Evaluation:
    net = dataclasses.replace(model.net, loss=setup.config.model.loss)  # without label smoothing
    return training.evaluate(net, model.params, *getattr(setup, name))


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


def _are_probabilities(y: np.ndarray) -> bool:
    return bool(np.all(y >= 0) and np.allclose(y.sum(axis=1), 1))


def _split(model: Model, x: np.ndarray, y: np.ndarray) -> Split:
    """On the device, once: the inputs scaled; labels one-hot for a loss that takes numbers, targets scaled."""
    dtype = model.params[0].w.dtype
    scaled = jnp.asarray(model.inputs.apply(x, np.float64 if dtype == np.float64 else np.float32), dtype)
    if model.targets is not None:
        return Split(scaled, jnp.asarray(model.targets.apply(y), wide(dtype)))
    if losses.get(model.net.loss).target == "array":
        return Split(scaled, jax.nn.one_hot(y, model.net.sizes[-1], dtype=dtype))
    return Split(scaled, jnp.asarray(y))


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
def _event_files(config: Config, path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives the function that writes the numbers of an epoch as TensorBoard events, if the config asks for them."""
    if not config.train.tensorboard:
        yield lambda row: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(path / "events")) as events:

        def write(row: dict[str, Any]) -> None:
            for name, value in (scalar for item in row.items() for scalar in _scalars(*item)):
                events.add_scalar(name, value, row["epoch"])

        yield write


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    """A list of a number a layer becomes name/layer_1 …"""
    if isinstance(value, list):
        return [(f"{name}/layer_{i}", v) for i, v in enumerate(value, 1)]
    return [(name, float(value))]
