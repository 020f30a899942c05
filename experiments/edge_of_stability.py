"""Does gradient descent settle where its step size is on the verge of being too large?

Full-batch gradient descent on the squared error: the largest eigenvalue of the Hessian rises to 2/η, above which a
quadratic would diverge, and stays near it (J. Cohen et al., *Gradient descent on neural networks typically occurs at
the edge of stability*, 2021). Here 2,000 images of 14 × 14, means of squares of four pixels from 0 to 1 less the mean
image, go through 196-32-10 with tanh, for three step sizes. The eigenvalue comes from 40 products of
`jaxbp.curvature.linearized` in `jaxbp.spectrum.eigenpairs`.

Command: python -m experiments.edge_of_stability [--config configs/fashion_mnist.toml] [--steps 3000] [--out FOLDER]
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxbp
from experiments import report
from jaxbp import MLP, curvature, spectrum
from jaxbp.run import config as configs
from jaxbp.run import data
from jaxbp.run.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "mnist.toml"
NET = MLP((196, 32, 10), "tanh", loss="squared_error")
SAMPLES, EVERY, PRODUCTS = 2000, 50, 40
RATES = (0.15, 0.2, 0.3)


def problem(config: Path) -> tuple[jax.Array, jax.Array]:
    """Inputs (2000, 196) without their mean, and one-hot labels."""
    found = data.load(configs.read(config).data)
    if found.image_shape != (28, 28) or found.y_train.dtype.kind != "i":
        raise UserError(f"{config}: this study needs images of 28 × 28 with labels")
    x = found.x_train[:SAMPLES].reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196)
    return jnp.asarray((x - x.mean(axis=0)) / 255, jnp.float32), jax.nn.one_hot(
        found.y_train[:SAMPLES], 10, dtype=jnp.float32
    )


@functools.partial(jax.jit, static_argnames="steps")
def descent(x: jax.Array, y: jax.Array, rate: jax.Array, steps: int) -> dict[str, jax.Array]:
    """Every EVERY steps the loss, the largest eigenvalue of the Hessian and its residual."""
    start = jaxbp.init(NET, jax.random.key(0), "lecun")

    def step(params: Any, _: None) -> tuple[Any, None]:
        return jaxbp.update(params, jaxbp.value_and_grad(NET, params, x, y)[1], rate), None

    def some(params: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
        matrix = curvature.linearized(NET, params, x, y)
        top = spectrum.eigenpairs(matrix, params, 1, jax.random.key(1), PRODUCTS)
        loss = jaxbp.value_and_grad(NET, params, x, y)[0]
        found = {"loss": loss, "sharpness": top.values[0], "residual": top.residuals[0]}
        return jax.lax.scan(step, params, None, EVERY)[0], found

    return jax.lax.scan(some, start, None, steps // EVERY)[1]


def summary(rate: float, found: dict[str, list[float]]) -> dict[str, float]:
    """λη/2 at the start, and its least and greatest in the last third of the steps."""
    stability = np.array(found["sharpness"]) * rate / 2
    last = stability[-len(stability) // 3 :]
    return {"start": float(stability[0]), "least": float(last.min()), "greatest": float(last.max())}


def draw(runs: dict[float, dict[str, list[float]]], steps: int, what: str) -> Figure:
    """Sharpness with the lines 2/η, and the loss."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    sharpness, loss = figure.subplots(1, 2)
    at = np.arange(0, steps // EVERY) * EVERY
    for (rate, found), colour in zip(runs.items(), ("tab:blue", "tab:orange", "tab:green"), strict=True):
        sharpness.plot(at, found["sharpness"], color=colour, label=f"η = {rate:g}")
        sharpness.axhline(2 / rate, color=colour, linestyle="--", linewidth=0.8)
        loss.plot(at, found["loss"], color=colour)
    sharpness.set(xlabel="step", ylabel="largest eigenvalue of the Hessian; dashed: 2/η")
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    sharpness.legend()
    for axes in (sharpness, loss):
        axes.grid(alpha=0.3)
    figure.suptitle(f"full-batch gradient descent, {what}")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Descends, prints the table, writes edge_of_stability.json and edge_of_stability.png."""
    parser = report.parser(__doc__, CONFIG, "the data: images of 28 × 28 with labels")
    parser.add_argument("--steps", type=int, default=3000, help=f"of each run, {EVERY} at least")
    with report.study("edge_of_stability", parser, arguments) as study:
        if study.options.steps < EVERY:
            raise UserError(f"--steps: got {study.options.steps}, it should be {EVERY} or more")
        (x, y), runs = problem(study.options.config), {}
        for rate in RATES:
            found = descent(x, y, jnp.float32(rate), study.options.steps)
            runs[rate] = {name: np.asarray(values, np.float64).tolist() for name, values in found.items()}
            print(f"η = {rate:g}: largest eigenvalue {runs[rate]['sharpness'][-1]:.3g}, 2/η = {2 / rate:g}", flush=True)
        rows = {rate: summary(rate, found) for rate, found in runs.items()}
        cells = [[f"{rate:g}", *(f"{v:.2f}" for v in row.values())] for rate, row in rows.items()]
        report.table("λη/2", ("η", "start", "least of the last third", "greatest"), cells)
        name = configs.read(study.options.config).data.name
        results = {"data": name, "summary": rows, "runs": runs}
        study.save(results, draw(runs, study.options.steps, f"{name} at 14 × 14, 196-32-10 tanh, squared error"))


if __name__ == "__main__":
    main()
