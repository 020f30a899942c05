"""Does back-propagation by hand train what autodiff trains? JAX's example mnist_classifier.py, run by jaxbp in float32.

784-1024-1024-10 with ReLU on MNIST, momentum 0.9, batches of 128, parameters and order drawn as the example draws them.
NVIDIA and AMD have published its accuracies on their GPUs; they have to be within 1e-3 here. The published runs differ
by up to 1e-4 from each other: float32 sums are rounded in another order on each device.

Source: jax-ml/jax, examples/mnist_classifier.py.

Command: python -m experiments.jax_mnist_classifier [--config CONFIG] [--out FOLDER]
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from jax.nn import initializers
from matplotlib.figure import Figure
from pydantic import Field

import jaxbp
from experiments import recipe, report
from jaxbp import MLP, Affine, Params
from jaxbp.run import data
from jaxbp.run.config import STRICT, Count, DataConfig, NonNegative, Positive, Seed
from jaxbp.run.errors import UserError

CONFIG = Path(__file__).parent / "configs" / "jax_mnist_classifier.toml"
NAME = "jax_mnist_classifier"
COLUMNS = {"nvidia": "NVIDIA", "amd": "AMD"}
TOLERANCE = 1e-3
Array = jax.Array


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Example:
    """The constants of the example."""

    sizes: Annotated[tuple[Count, ...], Field(min_length=2)]
    """Widths; the hidden layers are ReLU, the last is log-softmax."""
    epochs: Count
    """Passes over the 60,000 training images."""
    batch_size: Count
    """Images a step; the last step of an epoch takes what is left."""
    learning_rate: Positive
    """Step size."""
    momentum: NonNegative
    """v ← momentum · v + ∂ℒ/∂w, w ← w − step size · v."""
    seed: Seed
    """Of the parameters and of the order."""


class Images(NamedTuple):
    """Pixels (N, 784), float32, and labels (N,)."""

    x: Array
    y: Array


def load() -> tuple[Images, Images]:
    """Training and test set, pixels ÷ 255 in float32.

    Raises:
      UserError: MNIST is neither there nor to be downloaded.
    """
    mnist = data.load(DataConfig("mnist"))
    x_train, x_test = (jnp.asarray(x / np.float32(255)) for x in (mnist.x_train, mnist.x_test))
    return Images(x_train, jnp.asarray(mnist.y_train)), Images(x_test, jnp.asarray(mnist.y_test))


def draw_parameters(sizes: Sequence[int], seed: int) -> Params:
    """As stax draws them: one key a layer, activations counted; w Glorot-normal as (in, out), b normal with 0.01.

    Before JAX 0.5 random bits were drawn in another order, which the published runs have.
    """
    with jax.threefry_partitionable(False):
        key, layers = jax.random.PRNGKey(seed), []
        for inputs, outputs in itertools.pairwise(sizes):
            key, of_layer = jax.random.split(key)
            key, _ = jax.random.split(key)  # the activation's
            of_weights, of_biases = jax.random.split(of_layer)
            w = initializers.glorot_normal()(of_weights, (inputs, outputs), jnp.float32)
            layers.append(Affine(w.T, initializers.normal(1e-2)(of_biases, (outputs,), jnp.float32)))
    return tuple(layers)


@functools.partial(jax.jit, static_argnames=("net", "example"))
def epoch(net: MLP, example: Example, params: Params, state: Any, images: Images, order: Array) -> tuple[Params, Any]:
    """One pass over the images in their order, the last batch shorter."""
    optimizer = optax.sgd(example.learning_rate, momentum=example.momentum)

    def step(carry: tuple[Params, Any], rows: Array) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        _, grads = jaxbp.value_and_grad(net, params, images.x[rows], images.y[rows])
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    whole = len(order) // example.batch_size * example.batch_size
    carry, _ = jax.lax.scan(step, (params, state), order[:whole].reshape(-1, example.batch_size))
    return carry if whole == len(order) else step(carry, order[whole:])[0]


@functools.partial(jax.jit, static_argnames="net")
def accuracy(net: MLP, params: Params, images: Images) -> Array:
    """The share of images classified right, float32 as the example has it."""
    outputs = jaxbp.apply(net, params, images.x)
    return jnp.mean((jnp.argmax(outputs, axis=1) == images.y).astype(jnp.float32))


def train(example: Example, training: Images, test: Images) -> Iterator[dict[str, Any]]:
    """Trains, and gives both accuracies after each epoch."""
    net = MLP(example.sizes, hidden="relu", loss="softmax_cross_entropy")
    params = draw_parameters(example.sizes, example.seed)
    state = optax.sgd(example.learning_rate, momentum=example.momentum).init(params)
    orders = np.random.RandomState(example.seed)
    for i in range(example.epochs):
        started = time.perf_counter()
        order = jnp.asarray(orders.permutation(len(training.x)))
        params, state = epoch(net, example, params, state, training, order)
        shares = {
            name: float(accuracy(net, params, images)) for name, images in (("training", training), ("test", test))
        }
        yield {"epoch": i, **{f"{name}_accuracy": share for name, share in shares.items()}} | {
            "seconds": time.perf_counter() - started
        }


def measure(example: Example) -> dict[str, Any]:
    """Trains, and compares with both published columns.

    Raises:
      UserError: a network that does not fit MNIST; as `load`.
    """
    if (example.sizes[0], example.sizes[-1]) != (784, 10):
        raise UserError(f"sizes: {list(example.sizes)}; MNIST has 784 inputs and 10 classes")
    rows = []
    for row in train(example, *load()):
        rows.append(row)
        shares = f"training {row['training_accuracy']:.6f}, test {row['test_accuracy']:.4f}"
        print(f"epoch {row['epoch']}: {shares}, {row['seconds']:.1f} s", flush=True)
    compared, figures = [], report.published(NAME)
    for (epoch, *nvidia), (_, *amd) in zip(figures["nvidia"], figures["amd"], strict=True):
        if epoch < len(rows):
            here = [rows[epoch][key] for key in figures["columns"][1:]]
            errors = [abs(a - b) for published in (nvidia, amd) for a, b in zip(here, published, strict=True)]
            compared.append({"epoch": epoch, "here": here, "nvidia": nvidia, "amd": amd, "largest_error": max(errors)})
    return {"config": dataclasses.asdict(example), "compared": compared, "epochs": rows}


def show(results: dict[str, Any]) -> None:
    """The table: published | here."""
    rows = []
    for row in results["compared"]:
        sides = (row["nvidia"], row["amd"], row["here"])
        shares = [[f"{side[0]:.6f}" for side in sides], [f"{side[1]:.4f}" for side in sides]]
        rows.append([row["epoch"], *shares[0], *shares[1], f"{row['largest_error']:.0e}"])
    names = (*COLUMNS.values(), "here")
    columns = ("epoch", *(f"{split}, {name}" for split in ("training", "test") for name in names), "largest error")
    report.table("accuracy, published by NVIDIA and AMD | here", columns, rows)
    close = sum(row["largest_error"] <= TOLERANCE for row in results["compared"])
    seconds = sum(row["seconds"] for row in results["epochs"])
    print(f"{close} of {len(rows)} epochs within {TOLERANCE:g} of both, {seconds:.0f} s")


def draw(results: dict[str, Any]) -> Figure:
    """The accuracies over the epochs with the published points."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    for i, (name, colour) in enumerate((("training", "tab:blue"), ("test", "tab:orange"))):
        values = [100 * row[f"{name}_accuracy"] for row in results["epochs"]]
        axis.plot(range(1, len(values) + 1), values, color=colour, label=f"{name}, here")
        for (key, vendor), marker in zip(COLUMNS.items(), "sx", strict=True):
            points = [(row["epoch"] + 1, 100 * row[key][i]) for row in results["compared"]]
            axis.plot(
                *zip(*points, strict=True), marker, mfc="none", markersize=8, color=colour, label=f"{name}, {vendor}"
            )
    config = results["config"]
    axis.set(xlabel="epochs trained", ylabel="classified right (%)")
    axis.set_title(f"JAX's mnist_classifier.py by hand: {'-'.join(map(str, config['sizes']))}, float32")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2, loc="lower right")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example, prints its table, writes jax_mnist_classifier.json and jax_mnist_classifier.png."""
    parser = report.parser(__doc__, CONFIG, "the constants of the example")
    with report.study(NAME, parser, arguments) as study:
        results = measure(recipe.read(Example, study.options.config))
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
