"""Which influence predicts what happens when training samples are left out?

Softmax regression on 5,000 images of MNIST: 100 networks are trained on random halves of them, at the same time by
vmap, with SGD, η = 0.01, batches of 64 and 20 epochs. A method predicts the loss of a test image by minus the sum of
its scores over the half. The linear datamodeling score (LDS) is Spearman's rank correlation of prediction and loss over
the halves, averaged over 100 test images (S. M. Park et al., *TRAK*, 2023, §2). The benchmark of dattri has no biases,
this network has.

Command: python -m experiments.lds [--config configs/mnist.toml] [--halves 100] [--out FOLDER]
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

import jaxbp
from experiments import report
from jaxbp import MLP, influence, persample
from jaxbp.run import config as configs
from jaxbp.run import data
from jaxbp.run.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "mnist.toml"
NET = MLP((784, 10))
TRAIN, TEST, BATCH, EPOCHS, RATE, DAMPING = 5000, 100, 64, 20, 0.01, 0.01
Split = tuple[jax.Array, jax.Array]


def problem(config: Path) -> tuple[Split, Split]:
    found = data.load(configs.read(config).data)
    if found.image_shape != (28, 28) or found.y_train.dtype.kind != "i":
        raise UserError(f"{config}: this study needs images of 28 × 28 with labels")
    train, test = ((found.x_train, found.y_train), (found.x_test, found.y_test))
    scale = found.x_train.max()
    return tuple(
        (jnp.asarray(x[:n].reshape(n, -1) / scale, jnp.float32), jnp.asarray(y[:n], jnp.int32))
        for (x, y), n in ((train, TRAIN), (test, TEST))
    )  # type: ignore[return-value]


@jax.jit
def trained(rows: jax.Array, key: jax.Array, train: Split) -> Any:
    """Parameters after SGD on these rows of the training set."""
    steps = len(rows) // BATCH

    def step(params: Any, batch: jax.Array) -> tuple[Any, None]:
        return jaxbp.update(params, jaxbp.value_and_grad(NET, params, *(a[batch] for a in train))[1], RATE), None

    def epoch(params: Any, key: jax.Array) -> tuple[Any, None]:
        order = jax.random.permutation(key, rows)[: steps * BATCH].reshape(steps, BATCH)
        return jax.lax.scan(step, params, order)[0], None

    zero = jax.tree.map(jnp.zeros_like, jaxbp.init(NET, key))
    return jax.lax.scan(epoch, zero, jax.random.split(key, EPOCHS))[0]


def scores(params: Any, train: Split, test: Split) -> dict[str, jax.Array]:
    """(N, M) of each method, positive where a training sample helps."""
    f, g = (jaxbp.factors(NET, params, *split)[1] for split in (train, test))
    at = functools.partial(influence.influence_function, NET, params, train, test, DAMPING)
    return {
        "conjugate gradients": at("cg", "hessian").scores,
        "EK-FAC": at("ekfac").scores,
        "LiSSA": at("lissa", "hessian", 300).scores,
        "TRAK, one network": influence.trak(NET, params, train, test, DAMPING * len(train[0])),
        "products of gradients": persample.gram(f, g),
        "their cosines": persample.cosine(f, g),
    }


def lds(score: np.ndarray, halves: np.ndarray, losses: np.ndarray) -> float:
    """halves (S, N) of 0 and 1, losses (S, M)."""
    ranks = [rankdata(a, axis=0) for a in (-(halves @ score), losses)]
    a, b = (r - r.mean(axis=0) for r in ranks)
    return float(np.mean((a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))))


def draw(found: dict[str, float]) -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(found)[::-1], list(found.values())[::-1], color="tab:blue")
    axes.set(xlabel="linear datamodeling score")
    axes.grid(alpha=0.3, axis="x")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, scores, prints the table, writes lds.json and lds.png."""
    parser = report.parser(__doc__, CONFIG, "the data: images of 28 × 28 with labels")
    parser.add_argument("--halves", type=int, default=100, help="how many networks are trained on a half, 2 at least")
    with report.study("lds", parser, arguments) as study:
        if study.options.halves < 2:
            raise UserError(f"--halves: got {study.options.halves}, it should be 2 or more")
        train, test = problem(study.options.config)
        rng = np.random.default_rng(0)
        rows = np.stack([rng.permutation(TRAIN)[: TRAIN // 2] for _ in range(study.options.halves)]).astype(np.int32)
        keys = jax.random.split(jax.random.key(0), len(rows))
        networks = jax.jit(jax.vmap(trained, in_axes=(0, 0, None)))(jnp.asarray(rows), keys, train)
        loss = jax.jit(jax.vmap(lambda params: jaxbp.factors(NET, params, *test)[0]))
        losses = np.asarray(loss(networks), np.float64)
        halves = np.zeros((len(rows), TRAIN))
        np.put_along_axis(halves, rows, 1, axis=1)
        whole = trained(jnp.arange(TRAIN, dtype=jnp.int32), jax.random.key(1), train)
        made = jax.jit(scores)(whole, train, test)
        found = {name: lds(np.asarray(score, np.float64), halves, losses) for name, score in made.items()}
        report.table("LDS", ("method", "here"), [(name, f"{value:.3f}") for name, value in found.items()])
        study.save({"halves": len(rows), "damping": DAMPING, "lds": found}, draw(found))


if __name__ == "__main__":
    main()
