"""Replays training runs of Nielsen's book step by step in float64: same random numbers, same order, same updates.

A config is a script of the book: a seed, and the runs that follow each other. Both random generators go on from run to
run, and so does the order of the training list where a run trains on the whole of it.

Source: M. Nielsen, Neural Networks and Deep Learning, chapters 1 and 3 (network.py, network2.py of its repository).

Command: python -m experiments.nielsen --config CONFIG [--out FOLDER]
         Its results have the name of the config; no published figures are needed.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from pydantic import Field

import jaxbp
from experiments import recipe, report
from jaxbp import MLP, Affine, Params
from jaxbp.run import data
from jaxbp.run.config import STRICT, Count, DataConfig, NonNegative, Positive, Seed
from jaxbp.run.errors import UserError

Array = jax.Array
TRAINING = 50_000  # of the 60,000 training images; the last 10,000 are the validation set

Monitored = Literal[
    *("training_cost", "training_correct", "validation_cost", "validation_correct", "test_cost", "test_correct")
]


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Run:
    """One call of the book's SGD."""

    name: str
    """Of the run, in tables and results."""
    epochs: Count
    """Passes over the training list."""
    learning_rate: Positive
    """η."""
    sizes: Annotated[tuple[Count, ...], Field(min_length=2)] = (784, 30, 10)
    """Widths of the layers, all of them sigmoid."""
    cost: Literal["cross_entropy", "quadratic"] = "cross_entropy"
    """−Σ [y ln a + (1−y) ln(1−a)], or ½ ‖a − y‖²."""
    draws: Annotated[tuple[Literal["default", "large"], ...], Field(min_length=1)] = ("default",)
    """Initial parameters, drawn one after the other; the last are trained. Weights of "default" are divided by √in."""
    training_images: Annotated[int, Field(ge=1, le=TRAINING)] | None = None
    """The first so many of the training list, as a list of their own; None: the list itself."""
    shuffle: Literal["python2", "python3", "none"] = "python2"
    """Whose random.shuffle reorders the list at the start of each epoch."""
    mini_batch: Count = 10
    """Images a step; the last step of an epoch takes what is left."""
    regularization: NonNegative = 0.0
    """λ: the cost has ½(λ/n)Σ‖w‖² besides."""
    monitor: Annotated[tuple[Monitored, ...], Field(min_length=1)] = ("test_correct",)
    """What is measured after each epoch: costs, or counts of images classified right."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Script:
    """Runs that share two random generators and a training list."""

    runs: Annotated[tuple[Run, ...], Field(min_length=1)]
    """In their order."""
    seed: Seed = 12345678
    """Of both generators."""


class Images(NamedTuple):
    """Bytes (N, 784) and one-hot labels (N, 10)."""

    x: Array
    y: Array


def load() -> dict[str, Images]:
    """MNIST as the book splits it, on the device; turns JAX's x64 mode on.

    Raises:
      UserError: MNIST is neither there nor to be downloaded.
    """
    jax.config.update("jax_enable_x64", True)
    mnist = data.load(DataConfig("mnist"))
    x, y = jnp.asarray(mnist.x_train), jax.nn.one_hot(mnist.y_train, 10, dtype=jnp.float64)
    return {
        "training": Images(x[:TRAINING], y[:TRAINING]),
        "validation": Images(x[TRAINING:], y[TRAINING:]),
        "test": Images(jnp.asarray(mnist.x_test), jax.nn.one_hot(mnist.y_test, 10, dtype=jnp.float64)),
    }


def network(run: Run) -> MLP:
    """Sigmoid units everywhere. The cross-entropy takes the last s: δ⁽ᴸ⁾ = a − y without a division."""
    if run.cost == "quadratic":
        return MLP(run.sizes, hidden="sigmoid", output="sigmoid", loss="squared_error")
    return MLP(run.sizes, hidden="sigmoid", output="identity", loss="sigmoid_cross_entropy")


def draw(sizes: Sequence[int], scheme: str, generator: np.random.RandomState) -> Params:
    """All biases, then all weights, standard normal; weights of the default scheme divided by √in."""
    biases = [generator.randn(out) for out in sizes[1:]]
    weights = [generator.randn(out, ins) for ins, out in itertools.pairwise(sizes)]
    scales = [np.sqrt(ins) if scheme == "default" else 1.0 for ins in sizes]
    layers = zip(weights, scales, biases, strict=False)
    return tuple(Affine(jnp.asarray(w / scale), jnp.asarray(b)) for w, scale, b in layers)


def shuffle_python2(order: list[int], generator: random.Random) -> None:
    """random.shuffle as Python 2 has it; Python 3 draws bits instead of the floats of random.random."""
    for i in reversed(range(1, len(order))):
        j = int(generator.random() * (i + 1))
        order[i], order[j] = order[j], order[i]


SHUFFLES: dict[str, Callable[[list[int], random.Random], None]] = {
    "python2": shuffle_python2,
    "python3": lambda order, generator: generator.shuffle(order),
    "none": lambda order, generator: None,
}


def pixels(images: Array) -> Array:
    """Bytes ÷ 256, exact in float32 and in float64."""
    return images.astype(jnp.float64) / 256


@functools.partial(jax.jit, static_argnames=("net", "mini_batch"))
def epoch(
    net: MLP, mini_batch: int, params: Params, images: Images, order: Array, learning_rate: ArrayLike, decay: ArrayLike
) -> Params:
    """Steps through the images in their order: w ← (1 − ηλ/n) w − η ∂ℒ/∂w, b ← b − η ∂ℒ/∂b; decay is 1 − ηλ/n."""

    def step(params: Params, rows: Array) -> tuple[Params, None]:
        _, grads = jaxbp.value_and_grad(net, params, pixels(images.x[rows]), images.y[rows])
        decayed = tuple(Affine(decay * w, b) for w, b in params)
        return jaxbp.update(decayed, grads, learning_rate), None

    whole = len(order) // mini_batch * mini_batch
    params, _ = jax.lax.scan(step, params, order[:whole].reshape(-1, mini_batch))
    return params if whole == len(order) else step(params, order[whole:])[0]


@functools.partial(jax.jit, static_argnames="net")
def evaluate(net: MLP, params: Params, images: Images, regularization: ArrayLike) -> tuple[Array, Array]:
    """The cost, mean ℓ + ½(λ/n)Σ‖w‖² with n the number of these images, and how many are classified right."""
    outputs = jaxbp.apply(net, params, pixels(images.x))
    losses = jax.vmap(jaxbp.losses.get(net.loss).ell)(outputs, images.y)
    squares = sum(jnp.sum(w**2) for w, _ in params)
    right = jnp.argmax(outputs, axis=1) == jnp.argmax(images.y, axis=1)
    return jnp.mean(losses) + 0.5 * regularization / len(losses) * squares, jnp.sum(right)


def replay(script: Script, images: dict[str, Images]) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Trains run after run, and gives what is monitored after each epoch."""
    shuffles, normals = random.Random(script.seed), np.random.RandomState(script.seed)
    whole = list(range(len(images["training"].x)))
    for run in script.runs:
        net, params = network(run), [draw(run.sizes, scheme, normals) for scheme in run.draws][-1]
        order = whole if run.training_images is None else whole[: run.training_images]
        trained = Images(*(array[np.array(order)] for array in images["training"]))
        decay = 1 - run.learning_rate * run.regularization / len(order)
        for i in range(run.epochs):
            SHUFFLES[run.shuffle](order, shuffles)
            rows = jnp.asarray(order)
            params = epoch(net, run.mini_batch, params, images["training"], rows, run.learning_rate, decay)
            yield run, {"epoch": i, **monitored(run, net, params, {**images, "training": trained})}


def monitored(run: Run, net: MLP, params: Params, images: dict[str, Images]) -> dict[str, Any]:
    """The figures that the run monitors: costs as floats, counts as integers."""
    names = dict.fromkeys(key.rpartition("_")[0] for key in run.monitor)
    found = {name: evaluate(net, params, images[name], run.regularization) for name in names}
    figures: dict[str, Any] = {}
    for key in run.monitor:
        name, _, kind = key.rpartition("_")
        figures[key] = float(found[name][0]) if kind == "cost" else int(found[name][1])
    return figures


def figures(script: Script, images: dict[str, Images]) -> dict[str, list[dict[str, Any]]]:
    """What each run monitored, by its name: a row an epoch. Prints some ten rows a run as they come."""
    found: dict[str, list[dict[str, Any]]] = {run.name: [] for run in script.runs}
    for run, row in replay(script, images):
        found[run.name].append(row)
        if row["epoch"] % max(1, run.epochs // 10) == 0 or row["epoch"] == run.epochs - 1:
            shown = ", ".join(f"{key} {value:.6g}" for key, value in row.items())
            print(f"{run.name}, η = {run.learning_rate:g}: {shown}", flush=True)
    return found


def with_learning_rate(script: Script, learning_rate: float) -> Script:
    """The same script with another η in all its runs."""
    runs = tuple(dataclasses.replace(run, learning_rate=learning_rate) for run in script.runs)
    return dataclasses.replace(script, runs=runs)


def read(path: Path) -> Script:
    """The script of a config.

    Raises:
      UserError: as `recipe.read`; a network that does not fit MNIST; two runs of the same name.
    """
    script = recipe.read(Script, path)
    for run in script.runs:
        if (run.sizes[0], run.sizes[-1]) != (784, 10):
            ends = f"begins with {run.sizes[0]} and ends with {run.sizes[-1]}"
            raise UserError(f"{path}: runs.sizes: {run.name!r} {ends}; MNIST has 784 inputs and 10 classes")
    if len({run.name for run in script.runs}) < len(script.runs):
        raise UserError(f"{path}: runs.name: two runs have the same name")
    return script


def draw_curves(script: Script, found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Every monitored figure of every run over the epochs trained: costs left, shares classified right beside."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = dict(zip(("cost", "correct"), figure.subplots(1, 2), strict=True))
    for run in script.runs:
        for key in run.monitor:
            name, _, kind = key.rpartition("_")
            images = 10_000 if name != "training" else run.training_images or TRAINING
            values = [row[key] if kind == "cost" else 100 * row[key] / images for row in found[run.name]]
            marker = "." if run.epochs <= 60 else ""
            axes[kind].plot(range(1, run.epochs + 1), values, marker=marker, label=f"{run.name}, {name}")
    axes["cost"].set(xlabel="epochs trained", ylabel="cost")
    axes["correct"].set(xlabel="epochs trained", ylabel="classified right (%)")
    for axis in axes.values():
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Replays a config, prints a table a run, writes NAME.json and NAME.png, NAME that of the config."""
    parser = report.parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the script to replay")
    with report.study("nielsen", parser, arguments) as study:
        script = read(study.options.config)
        found = figures(script, load())
        for run in script.runs:
            report.table(run.name, ("epoch", *run.monitor), [list(row.values()) for row in found[run.name]])
        results = {"config": dataclasses.asdict(script), "runs": found}
        study._replace(name=study.options.config.stem).save(results, draw_curves(script, found))


if __name__ == "__main__":
    main()
