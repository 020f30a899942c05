"""What is to be learned: data, network and scaling, without an optimiser. Runs, studies and traces begin here."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import losses
from jaxbp.initializers import BIASES, WEIGHTS, Initializer
from jaxbp.mlp import MLP, Array, Params, init, wide
from jaxbp.run import data
from jaxbp.run.config import Config, ModelConfig, choose
from jaxbp.run.data import Dataset, Scaling
from jaxbp.run.errors import UserError
from jaxbp.run.host import processes
from jaxbp.run.store.model import Model, network

SPLITS = {"train": "training", "test": "test"}


class Split(NamedTuple):
    """The training or the test set as the loss takes it: inputs scaled, targets scaled or one-hot where need be."""

    x: Array
    y: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A data set, the network that is to learn it, and the scaling of inputs and (of a regression) targets."""

    config: Config
    dataset: Dataset
    net: MLP
    inputs: Scaling
    targets: Scaling | None

    @functools.cached_property
    def scored(self) -> MLP:
        """The network with the loss that is reported: without label smoothing."""
        return dataclasses.replace(self.net, loss=self.config.model.loss)

    def initial(self) -> Params:
        """The parameters that a run begins with."""
        weights, biases = _initializers(self.config.model)
        return init(self.net, jax.random.key(self.config.train.seed), weights, biases, self.config.model.dtype)

    def model(self, params: Params) -> Model:
        """The network with these parameters and the scaling, as it is saved."""
        return Model(self.net, params, self.inputs, self.targets, self.dataset.classes)

    def raw(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of "train" or "test" as they were read."""
        return getattr(self.dataset, f"x_{split}"), getattr(self.dataset, f"y_{split}")

    def scaled(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """On the host: the inputs scaled; labels one-hot for a loss that takes numbers, targets scaled."""
        dtype = jnp.dtype(self.config.model.dtype)
        x = self.inputs.apply(x, np.float64 if dtype == np.float64 else np.float32).astype(dtype)
        if self.targets is not None:
            return x, self.targets.apply(y).astype(wide(dtype))
        return x, np.eye(self.net.sizes[-1], dtype=dtype)[y] if losses.get(self.net.loss).target == "array" else y

    def on_device(self, split: str) -> Split:
        """The whole of a set."""
        return Split(*(jnp.asarray(part) for part in self.scaled(*self.raw(split))))


def pose(config: Config, in_place: bool = False) -> Problem:
    """Reads the data and fits the scaling; `in_place` leaves on disk what can stay there, see `data.load`.

    Raises:
      UserError: what cannot be read, or data, network and loss that do not fit together.
    """
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    dataset = processes.first_then_others(lambda: data.load(config.data, in_place))
    net = network(config.model)
    _check_fit(net, dataset)
    _initializers(config.model)  # says what is wrong with them before anything is computed
    inputs = Scaling.fit(dataset.x_train, config.data.standardize)
    targets = None
    if not dataset.classes:
        targets = Scaling.fit(dataset.y_train, "feature" if config.data.standardize_targets else "none")
    return Problem(config, dataset, net, inputs, targets)


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


def _initializers(config: ModelConfig) -> tuple[Initializer, Initializer]:
    """The schemes of weights and biases by their names, with another standard deviation where the config has one."""
    for key, name in (("scheme", config.scheme), ("bias", config.bias)):
        if getattr(config, f"{key}_std") is not None and name != "normal":
            raise UserError(f'model.{key}_std: only {key} "normal" has it, {key} is "{name}"')
    normal = jax.nn.initializers.normal
    weights = (
        normal(config.scheme_std) if config.scheme_std else choose("model.scheme", "scheme", config.scheme, WEIGHTS)
    )
    biases = normal(config.bias_std) if config.bias_std else BIASES[config.bias]
    return weights, biases
