"""`jaxbp predict`: a trained network on new data, as CSV; or a text that it goes on with."""

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import losses
from jaxbp.network import Net, ParamTree, layer_of
from jaxbp.run import config as configs
from jaxbp.run import laplace, targets
from jaxbp.run.data import folders, tables
from jaxbp.run.data.archive import arrays, flat
from jaxbp.run.errors import UserError
from jaxbp.run.store import files
from jaxbp.run.store.model import Model, finished, load

Rows = Sequence[Sequence[object]]


def predict(
    run: Path,
    data: Path,
    out: Path | None,
    overwrite: bool = False,
    certainty: Literal["probabilities", "laplace"] | None = None,
) -> None:
    """Writes a row a sample: its index, or the file of an image, then its class, or the numbers in the targets' units.

    Of a sequence there is a class for each position. `certainty` adds how sure that is: the network's own probability
    of each class, or what `jaxbp.run.laplace` makes of it.

    Raises:
      UserError: no run, no array x, image or column of the run in the data, an x that does not fit the network, an
        output that is there already or can't be written.
    """
    files.check_new(out, (".csv",), overwrite)
    model = loaded(run)
    name, names, x = _samples(run, model, data)
    found = laplace.posterior(run, model) if certainty == "laplace" else None
    rows: Rows
    try:
        if found is not None:
            rows = [laplace.header(model), *laplace.rows(model, found, x)]
        else:
            rows = (_probable_rows if certainty else _rows)(model, model.predict(x))
    except ValueError as error:
        raise UserError(f"{data}: {error}") from None
    rows = [[name, *rows[0]], *([name, *row] for name, row in zip(names, rows[1:], strict=True))]
    if out is None:
        _print(rows)
        return
    with files.writable(f"--out: {str(out)!r}"), files.replaced(out) as part:
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def goes_on(run: Path, prompt: str, length: int, seed: int) -> str:
    """The text that a network which was trained on one goes on with: `length` characters, drawn one after the other.

    Each is drawn from the network's own probabilities for the last T characters, T those of a sample.

    Raises:
      UserError: no run, one that was not trained on a text, a character that is not in it.
    """
    model = loaded(run)
    if not (model.sample.positions and model.inputs is None and model.classes):
        raise UserError(f"--prompt: {run} was not trained on a text")
    if not prompt or length < 1:
        raise UserError(
            "--prompt: it needs a character at least" if length > 0 else f"--length: got {length}, at least 1"
        )
    number = {name: i for i, name in enumerate(model.classes)}
    if unknown := [character for character in prompt if character not in number]:
        raise UserError(f"--prompt: {unknown[0]!r} is not in the text that {run} was trained on")
    size, keys = model.sample.shape[0], jax.random.split(jax.random.key(seed), length)
    known = [number[character] for character in prompt[-size:]]
    window = jnp.array([*known, *[0] * (size - len(known))], jnp.int32)
    _, drawn = _drawn(model.net, model.params, window, jnp.int32(len(known)), keys)
    return prompt + "".join(model.classes[i] for i in np.asarray(drawn))


def loaded(run: Path) -> Model:
    """The model of a run; says on standard error which parameters it has, if they are not those of its end."""
    model = load(run)
    if not finished(run):
        print(f"jaxbp: warning: {run} is unfinished; these are its parameters so far", file=sys.stderr)
    if model.best:
        print(f"jaxbp: {run}: with the parameters of epoch {model.best}, the best", file=sys.stderr)
    return model


@jax.jit(static_argnums=0)
def _drawn(net: Net, params: ParamTree, window: jax.Array, count: jax.Array, keys: jax.Array) -> Any:
    """Draws a token for each key; `count` of the window's tokens are known, later ones change nothing before them."""

    def draw(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
        window, count = carry
        token = jax.random.categorical(key, layer_of(net).forward(params, window)[0][count - 1]).astype(window.dtype)
        full = count == len(window)
        window = jnp.where(full, jnp.roll(window, -1), window).at[jnp.where(full, count - 1, count)].set(token)
        return (window, jnp.minimum(count + 1, len(window))), token

    return jax.lax.scan(draw, (window, count), keys)


def _print(rows: Rows) -> None:
    try:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _rows(model: Model, output: np.ndarray) -> Rows:
    if model.classes and output.ndim > 2:
        names = np.array(model.classes)[output.argmax(axis=2)].tolist()
        return [[f"y{t}" for t in range(output.shape[1])], *names]
    if model.classes:
        return [["class"], *([model.classes[k]] for k in output.argmax(axis=1))]
    return [[f"y{k}" for k in range(output.shape[1])], *output.tolist()]


def _probable_rows(model: Model, output: np.ndarray) -> Rows:
    p = targets.probabilities(losses.get(model.net.loss).name, output)
    if not model.classes or p is None or p.ndim > 2:
        needed = "a label a sample, and softmax_cross_entropy or sigmoid_cross_entropy"
        raise UserError(f"--probabilities: it takes {needed}")
    return [laplace.header(model), *([model.classes[row.argmax()], *row.tolist()] for row in p)]


def _samples(run: Path, model: Model, data: Path) -> tuple[str, Sequence[object], np.ndarray]:
    """The name of the first column and what is in it, a row each, and the inputs."""
    if data.is_dir() and not (data / "x.npy").is_file():
        files, pixels = folders.images(data, model.sample.shape, str(run))
        return "file", files, flat(pixels)
    x = _table(run, model, data) if tables.is_table(data.name) else _read(data)
    return "index", range(len(x)), x


def _table(run: Path, model: Model, path: Path) -> np.ndarray:
    """The inputs of a table, which may lack the target and has its columns in any order."""
    if model.columns is None:
        raise UserError(f"{path}: {run} was not trained on a table; it takes an .npz with an array x")
    decimal = configs.read(run / "config.toml").data.decimal
    x = tables.inputs(path, tables.read(path, decimal), model.columns)
    if np.isnan(x).any():
        row = np.isnan(x).any(axis=1).argmax()
        raise UserError(f"{path}: row {row} has a missing number, and the run has no mean for it")
    return x


def _read(path: Path) -> np.ndarray:
    x = folders.array(path / "x.npy") if path.is_dir() else arrays(path, ["x"])["x"]
    if x.dtype.kind not in "fiub":
        raise UserError(f"{path}: x has dtype {x.dtype}, expected numbers")
    bad = np.argwhere(~np.isfinite(x))
    if bad.size:
        raise UserError(f"{path}: row {bad[0][0]} of x is not finite (NaN or infinite)")
    return flat(x) if x.ndim > 2 else x
