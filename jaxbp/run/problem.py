"""What is to be learned: data, network and scaling, without an optimiser. Runs, studies and traces begin here."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import losses
from jaxbp.initializers import BIASES, WEIGHTS, Initializer
from jaxbp.mlp import MLP, Array, wide
from jaxbp.network import Net, ParamTree, check_tokens, init, shapes
from jaxbp.run import config as configs
from jaxbp.run import data, networks, paths, targets
from jaxbp.run.config import Config, ModelConfig, choose
from jaxbp.run.data import Dataset, Projection, Scaling
from jaxbp.run.errors import UserError
from jaxbp.run.host import processes
from jaxbp.run.networks import Sample
from jaxbp.run.store.model import Model, parameters_for

SPLITS = {"train": "training", "validation": "validation", "test": "test"}


class Split(NamedTuple):
    """A set as the loss takes it: inputs scaled, targets scaled or one-hot where need be."""

    x: Array
    y: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A data set, the network that is to learn it, and the scaling of inputs and (of a regression) targets.

    inputs: None of tokens, which are not scaled; a `Projection` with [data] pca.
    """

    config: Config
    dataset: Dataset
    net: Net
    inputs: Scaling | Projection | None
    targets: Scaling | None

    @functools.cached_property
    def scored(self) -> Net:
        """The network with the loss that is reported: without label smoothing."""
        plain = dataclasses.replace(self.config.model, label_smoothing=0.0)
        return networks.network(plain, sample_of(self.config, self.dataset))

    @property
    def title(self) -> str:
        """Data, network and loss in a few words: "digits · 64-32×3-10 relu · softmax_cross_entropy"."""
        name, shown = Path(self.dataset.name).name, networks.title(self.net, self.config.model)
        return f"{name} · {shown} · {self.config.model.loss}"

    @property
    def reported(self) -> tuple[str, ...]:
        """The sets that are scored after each epoch; where there is a validation set, it stands for the test set."""
        reported = self.config.privacy.reported
        return reported if self.dataset.x_validation is None else (*reported[:-1], "validation")

    @functools.cached_property
    def weights(self) -> Array | None:
        """(N,): what each training sample counts in the mean of its batch, its own weight times that of its class.

        None: all count alike. UserError for class weights of samples that have no class, or of other classes.
        """
        found, wanted, y = self.dataset.weights, self.config.train.class_weights, self.dataset.y_train
        if wanted is not None:
            classes = self.dataset.classes or ()
            if not classes or y.ndim > 1:
                raise UserError(f"train.class_weights: a sample of {self.dataset.name} has no class")
            if wanted != "balanced" and len(wanted) != len(classes):
                given = f"{len(wanted)} numbers, {self.dataset.name} has {len(classes)} classes"
                raise UserError(f"train.class_weights: {given}")
            counts = np.bincount(y, minlength=len(classes))
            balanced = len(y) / (np.count_nonzero(counts) * np.maximum(counts, 1))
            of_class = (balanced if wanted == "balanced" else np.array(wanted))[y]
            found = of_class if found is None else found * of_class
        return None if found is None else jnp.asarray(found, wide(self.config.model.dtype))

    def initial(self) -> ParamTree:
        """The parameters that a run begins with: those of another run, or drawn."""
        return self._drawn() if self._taken is None else self._taken

    def _drawn(self) -> ParamTree:
        weights, biases = _initializers(self.config.model)
        key, dtype = jax.random.key(self.config.train.seed), self.config.model.dtype
        return init(self.net, key, weights, biases if isinstance(self.net, MLP) else "zeros", dtype)

    @functools.cached_property
    def _taken(self) -> ParamTree | None:
        """The parameters of the run that the config names; read before anything is traced, or outside of the trace."""
        if self.config.model.parameters is None:
            return None
        folder = paths.named("model.parameters", self.config.model.parameters)
        with jax.ensure_compile_time_eval():
            return parameters_for(folder, jax.eval_shape(self._drawn))

    def model(self, params: ParamTree, best: int | None = None) -> Model:
        """The network with these parameters and the scaling, as it is saved; best: their epoch if it was the best."""
        sample, data = sample_of(self.config, self.dataset), self.dataset
        return Model(self.net, params, self.inputs, self.targets, data.classes, sample, data.columns, best)

    def raw(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of "train", "validation" or "test" as they were read."""
        return getattr(self.dataset, f"x_{split}"), getattr(self.dataset, f"y_{split}")

    def scaled(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """On the host: the inputs scaled; labels one-hot for a loss that takes numbers, targets scaled."""
        dtype = jnp.dtype(self.config.model.dtype)
        shape, (*_, outputs) = shapes(self.net)
        if self.inputs is not None:
            x = self.inputs.apply(x, np.float64 if dtype == np.float64 else np.float32).astype(dtype)
        x = x.reshape(len(x), *shape)
        if self.targets is not None:
            return x, self.targets.apply(y).astype(wide(dtype))
        if losses.get(self.net.loss).target != "array":
            return x, y
        if outputs < len(self.dataset.classes or ()):  # one says whether it is the second class
            return x, y[:, None].astype(dtype)
        return x, (y[:, None] == np.arange(outputs)).astype(dtype)

    def on_device(self, split: str) -> Split:
        """The whole of a set."""
        return Split(*(jnp.asarray(part) for part in self.scaled(*self.raw(split))))


def pose(config: Config, in_place: bool = False, dataset: Dataset | None = None) -> Problem:
    """Reads the data, if they are not given, and fits the scaling. The config of the problem has the sizes of its MLP.

    in_place: leaves on disk what can stay there, see `data.load`.

    Raises:
      UserError: what cannot be read, or data, network and loss that do not fit together.
    """
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    most = targets.most_labels(config.model.loss)
    dataset = dataset or processes.first_then_others(lambda: data.load(config.data, in_place, most))
    sample = sample_of(config, dataset)
    config = dataclasses.replace(config, model=networks.sized(config.model, sample))
    net = networks.network(config.model, sample)
    _check_fit(config, net, dataset)
    _initializers(config.model)  # says what is wrong with them before anything is computed
    inputs: Scaling | Projection | None = None
    if networks.takes_tokens(net):
        dataset = _tokens(net, dataset)
    elif config.data.pca:
        inputs = _projected(config, config.data.pca, dataset.x_train)
    else:
        inputs = Scaling.fit(dataset.x_train, config.data.standardize)
    outputs = None
    if not dataset.classes:
        outputs = Scaling.fit(dataset.y_train, "feature" if config.data.standardize_targets else "none")
    problem = Problem(config, dataset, net, inputs, outputs)
    for split in dataset.splits:
        _check_range(problem, split)
    return problem


def of_run(run: Path, model: Model, dataset: Dataset | None = None) -> Problem:
    """What the model of a run was trained on; UserError for data, read or given, of other classes or scaling."""
    config = configs.read(run / "config.toml")
    problem = pose(config, dataset=dataset)
    if config.privacy.pca_noise:  # which nobody can draw again
        problem = dataclasses.replace(problem, inputs=model.inputs)
    theirs, ours = ((*(of.inputs or ()), *(of.targets or ())) for of in (model, problem))
    same = len(theirs) == len(ours) and all(np.allclose(a, b) for a, b in zip(theirs, ours, strict=True))
    same = same and (model.classes, model.columns) == (problem.dataset.classes, problem.dataset.columns)
    if not same:
        raise UserError(f"{run}: {config.data.name} is not the data that the run was trained on")
    return problem


def sample_of(config: Config, dataset: Dataset) -> Sample:
    """What a network for these data takes."""
    outputs, sizes = len(dataset.classes) if dataset.classes else dataset.y_train.shape[1], config.model.sizes
    if dataset.classes and outputs == 2 and config.model.kind == "mlp" and targets.most_labels(config.model.loss) == 2:
        outputs = sizes[-1] if sizes and sizes[-1] == 2 else 1  # one output says whether it is the second class
    positions = dataset.classes is not None and dataset.y_train.ndim > 1
    pca = config.data.pca
    shape = (pca,) if pca else dataset.image_shape or dataset.x_train.shape[1:]
    return Sample(shape, outputs, positions)


def _projected(config: Config, count: int, x: np.ndarray) -> Projection:
    """On the principal directions, with the noise that the first process draws."""
    how, noise, seed = config.data.standardize, config.privacy.pca_noise or 0.0, config.privacy.seed
    found = processes.on_first(lambda: Projection.fit(x, count, how, noise, seed))
    shapes = ((x.shape[1], count), (count,), (count,))
    like = Projection(*(jax.ShapeDtypeStruct(shape, np.float64) for shape in shapes))  # type: ignore[arg-type]
    return processes.broadcast(found, like)


def _tokens(net: Net, dataset: Dataset) -> Dataset:
    """The data with inputs that an embedding takes: integers, none outside its table."""
    sets = {split: getattr(dataset, f"x_{split}") for split in dataset.splits}
    for split, x in sets.items():
        name = SPLITS[split]
        if x.dtype.kind not in "iu":
            raise UserError(f"data.name: {dataset.name}: the {name} inputs are {x.dtype}, an embedding takes integers")
        try:
            check_tokens(net, x)
        except ValueError as error:
            raise UserError(f"data.name: {dataset.name}: the {name} set: {error}") from None
    return dataset._replace(**{f"x_{split}": x.astype(np.int32) for split, x in sets.items()})


def _check_fit(config: Config, net: Net, dataset: Dataset) -> None:
    if isinstance(net, MLP):
        _check_sizes(config, net, dataset)
    elif shapes(net)[1][-1] != (outputs := sample_of(config, dataset).outputs):
        raise UserError(f"model.layers: end with {shapes(net)[1][-1]}, {dataset.name} has {outputs} outputs")
    if config.data.pca and networks.takes_tokens(net):
        raise UserError("data.pca: tokens have no principal directions: leave it out")
    loss = losses.get(net.loss)
    if not dataset.classes and loss.target == "label":
        raise UserError(f"model.loss: {loss.name} takes labels, the targets of {dataset.name} are numbers")
    if dataset.classes:
        return
    for split in dataset.splits:
        where = f"the {SPLITS[split]} targets of {dataset.name}"
        targets.check(config.model.loss, getattr(dataset, f"y_{split}"), where)
    if config.data.standardize_targets and (kind := targets.kind_of(config.model.loss)):
        raise UserError(f"data.standardize_targets: true, but {config.model.loss} takes {kind.allowed}, as they are")


def _check_sizes(config: Config, net: MLP, dataset: Dataset) -> None:
    inputs = config.data.pca or dataset.x_train.shape[1]
    _, outputs, positions = sample_of(config, dataset)
    if positions:
        raise UserError(f'model.kind: "mlp" gives one output, {dataset.name} has a label for each position; "gpt" fits')
    if net.sizes[0] != inputs:
        has = "data.pca gives" if config.data.pca else f"{dataset.name} has"
        raise UserError(f"model.sizes: begins with {net.sizes[0]}, {has} {inputs} inputs")
    if net.sizes[-1] != outputs:
        count, hint = f"{outputs} targets", ""
        if dataset.classes:
            count = f"{len(dataset.classes)} classes"
            hint = "; one output takes sigmoid_cross_entropy" if net.sizes[-1] == 1 and outputs == 2 else ""
        raise UserError(f"model.sizes: ends with {net.sizes[-1]}, {dataset.name} has {count}{hint}")


def _check_range(problem: Problem, split: str) -> None:
    """UserError that names a row whose scaled numbers the dtype of the network can't hold."""
    (x, y), dtype = problem.raw(split), jnp.dtype(problem.config.model.dtype)
    parts = [("inputs", x, problem.inputs, dtype)] if isinstance(problem.inputs, Scaling) else []
    parts += [("targets", y, problem.targets, jnp.dtype(wide(dtype)))] if problem.targets else []
    for what, values, scaling, held in parts:
        with np.errstate(over="ignore"):
            ends = np.abs(scaling.apply(np.stack([values.min(axis=0), values.max(axis=0)])))
        end, column = np.unravel_index(ends.argmax(), ends.shape)
        if not ends[end, column] <= float(jnp.finfo(held).max):
            row = (values[:, column].argmin, values[:, column].argmax)[end]()
            found = f"row {row} of the {SPLITS[split]} {what} has {values[row, column]:.4g}"
            raise UserError(f"data.name: {problem.dataset.name}: {found}, which scaled is too large for {held.name}")


def _initializers(config: ModelConfig) -> tuple[Initializer, Initializer]:
    """The schemes of weights and biases by their names, with another standard deviation where the config has one."""
    for key, name in (("scheme", config.scheme), ("bias", config.bias)):
        if getattr(config, f"{key}_std") is not None and name != "normal":
            raise UserError(f'model.{key}_std: only {key} "normal" has it, {key} is "{name}"')
    normal = jax.nn.initializers.normal
    weights, biases = choose("model.scheme", "scheme", config.scheme, WEIGHTS), BIASES[config.bias]
    weights = normal(config.scheme_std) if config.scheme_std else weights
    return weights, normal(config.bias_std) if config.bias_std else biases


def drawn(samples: int, most: int) -> np.ndarray:
    """All rows, or so many of them drawn without replacement, seed 0; in their order."""
    return np.sort(np.random.default_rng(0).choice(samples, min(samples, most), replace=False))
