"""`jaxbp study`: per-sample gradients over a whole data set: a table, a summary, pictures."""

import csv
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxbp import losses, persample
from jaxbp.mlp import MLP, Array, Factors, Params, factors, gradient, wide
from jaxbp.run import config as configs
from jaxbp.run import loop, study_plots
from jaxbp.run.config import Config, MeshConfig, choose
from jaxbp.run.errors import UserError
from jaxbp.run.loop import Samples, Setup, Split
from jaxbp.run.model import Model, load

SPLITS = {"train": "training", "test": "test"}
QUANTITIES = dict.fromkeys(
    ("squared_norms", "grand", "el2n", "cosine", "noise_scale", "diversity", "coherence", "gram")
)
OF_THE_MEAN = {"cosine", "noise_scale", "diversity", "coherence"}  # those that need the mean gradient of the split
CLASSES_SHOWN = 20  # in the summary and the pictures; with more classes only what concerns all samples is shown
GRAM_SAMPLES = 1000
PICTURES = ("norms", "hardest", "easiest", "class_cosine", "noise_scale", "gram_spectrum")


class Request(NamedTuple):
    """The arguments of `jaxbp study`; None: all quantities that fit, a table named after source and split."""

    source: Path
    split: str = "train"
    quantities: Sequence[str] | None = None
    out: Path | None = None
    chunk: int = 1000
    overwrite: bool = False


class Subject(NamedTuple):
    """A network, its parameters and a split: as it was read and, on the device, as the loss takes it."""

    setup: Setup
    model: Model
    net: MLP
    split: str
    data: Split
    x: np.ndarray
    y: np.ndarray


class Results(NamedTuple):
    """The table by columns; numbers of the split as a whole; (C, C) mean cosines and eigenvalues, where asked for."""

    table: dict[str, np.ndarray]
    numbers: dict[str, float]
    class_cosine: np.ndarray | None
    eigenvalues: np.ndarray | None


def study(request: Request, console: Console) -> Path:
    """Measures, writes the table and the pictures, prints the summary; returns the path of the table.

    The files are made in a hidden folder beside the table and moved when all are there, the table last.

    Raises:
      UserError: an unknown split or quantity, one that does not fit the loss; no finished run, a bad config; a table of
        an unknown kind, in a place that can't be written, or where there is one already.
    """
    _check(request)
    out = request.out or _default_out(request)
    write = choose("--out", "extension", out.suffix, {".csv": _write_csv, ".parquet": _write_parquet})
    taken = next((path for path in (out, *_pictures(out).values()) if path.exists()), None)
    if taken is not None and not request.overwrite:
        raise UserError(f"--out: {taken} exists; name another file or pass --overwrite")
    config = _config(request.source)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".study-") as staging:
            subject = prepare(request.source, config, request.split)
            names = _fitting(subject, request.quantities)
            console.out(_describe(subject, request.source, names), highlight=False)
            results = measure(subject, names, request.chunk)
            staged = Path(staging) / out.name
            write(results.table, staged)
            _draw(subject, results, names, _recorded(request.source), _pictures(staged))
            made = [path.name for path in (out, *_pictures(out).values())]  # the table first
            written = [name for name in made if staged.with_name(name).exists()]
            for name in reversed(written):
                os.replace(staged.with_name(name), out.with_name(name))
            for picture in _pictures(out).values():  # of an earlier table that this one replaced
                if picture.name not in written:
                    picture.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out: {str(out)!r} can't be written: {error.strerror}") from None
    _print_summary(subject, results, console)
    console.out(f"{out}, {_listed(written[1:])}", highlight=False)
    return out


def prepare(source: Path, config: Config, split: str = "train") -> Subject:
    """The split of the data that a run or config names, with the trained or the initial network.

    Raises:
      UserError: no finished run, a config that does not fit its data, data that are not those of the run any more.
    """
    setup = loop.prepare(dataclasses.replace(config, mesh=MeshConfig()))  # a study is made on one device
    model = load(source) if source.is_dir() else setup.model
    scaled = zip(
        (*model.inputs, *(model.targets or ())), (*setup.model.inputs, *(setup.model.targets or ())), strict=True
    )
    if model.classes != setup.model.classes or not all(np.allclose(a, b) for a, b in scaled):
        raise UserError(f"{source}: {config.data.name} is not the data that the run was trained on")
    net = dataclasses.replace(model.net, loss=config.model.loss)  # without label smoothing
    data = setup.train if split == "train" else setup.test
    x, y = (getattr(setup.dataset, f"{name}_{split}") for name in "xy")
    return Subject(setup, model, net, split, data, x, y)


def measure(subject: Subject, quantities: Sequence[str], chunk: int) -> Results:
    """All quantities of a split, never with the factors of more than `chunk` samples at a time."""
    net, params, (x, y) = subject.net, subject.model.params, subject.data
    asked = set(quantities)
    mean = None
    if asked & OF_THE_MEAN:
        everything = np.full(len(x), 1 / len(x))
        mean = jax.tree.map(lambda a: a[0], _sums(net, params, x, y, np.zeros(len(x), np.int32), everything, 1, chunk))
    columns = jax.device_get(_per_sample(net, params, mean, x, y, chunk))
    numbers = {} if mean is None else _numbers(asked, columns["squared_norm"].astype(np.float64), mean)
    class_cosine = eigenvalues = None
    if "cosine" in asked and subject.model.classes and len(subject.model.classes) <= CLASSES_SHOWN:
        class_cosine = _class_cosine(subject, columns["norm"], chunk)
    if "gram" in asked:
        rows = gram_rows(len(x))
        matrix = persample.gram_matrix(net, params, x[rows], y[rows], chunk)
        eigenvalues = np.linalg.eigvalsh(np.asarray(matrix, np.float64))[::-1] / len(rows)
    return Results(_table(subject, columns, asked), numbers, class_cosine, eigenvalues)


def gram_rows(samples: int) -> np.ndarray:
    """The rows of the Gram matrix: all samples, or GRAM_SAMPLES of them drawn without replacement, seed 0."""
    count = min(samples, GRAM_SAMPLES)
    return np.sort(np.random.default_rng(0).choice(samples, count, replace=False))


# What is computed -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("net", "chunk"))
def _per_sample(net: MLP, params: Params, mean: Params | None, x: Array, y: Array, chunk: int) -> dict[str, Any]:
    """Every column, (N,) or (N, ·); the cosine with the mean gradient where that is given."""

    def quantity(loss: Array, f: Factors) -> dict[str, Any]:
        layers = persample.squared_norms(f, per_layer=True)
        norm = persample.grand(f)
        found = {"loss": loss, "output": _outputs(net, params, f), "norm": norm, "squared_norm": norm**2}
        found |= {"layers": jnp.stack(layers, axis=1), "el2n": persample.el2n(f)}
        return found if mean is None else found | {"cosine": _cosine(f, mean, norm)}

    return persample.map_chunks(quantity, net, params, x, y, chunk)


def _outputs(net: MLP, params: Params, f: Factors) -> Array:
    """x⁽ᴸ⁾ from x⁽ᴸ⁻¹⁾, which the factors hold."""
    w, b = params[-1]
    return net.activations[-1].sigma(f.x[-1] @ w.T + b[None]).astype(wide(w.dtype))


def _cosine(f: Factors, mean: Params, norm: Array) -> Array:
    length = jnp.sqrt(sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(mean)), jnp.zeros((), norm.dtype)))
    scale = norm * length
    return jnp.where(scale == 0, 0, persample.dot(f, mean) / jnp.where(scale == 0, 1, scale))


def _sums(
    net: MLP,
    params: Params,
    x: Samples,
    y: Samples,
    group: np.ndarray,
    weights: np.ndarray,
    groups: int,
    chunk: int,
) -> Params:
    """Σ weightsₙ gₙ over the samples of each group, like the parameters with a leading axis of the groups.

    A chunk holds samples of one group, and is filled up with samples of weight 0: one pass for all groups.
    """
    size = min(chunk, max(int(np.bincount(group).max()), 1))
    rows, filled, owner = [], [], []
    for g in range(groups):
        members = np.flatnonzero(group == g).astype(np.int32)
        places = -(-len(members) // size) * size
        rows.append(np.resize(members, places).reshape(-1, size))
        filled.append(
            np.where(np.arange(places) < len(members), np.resize(weights[members], places), 0).reshape(-1, size)
        )
        owner += [g] * (places // size)
    batches = np.concatenate(rows), np.concatenate(filled), np.array(owner, np.int32)
    return _scan_sums(net, params, x, y, jax.tree.map(jnp.asarray, batches), groups)


@functools.partial(jax.jit, static_argnames=("net", "groups"))
def _scan_sums(net: MLP, params: Params, x: Array, y: Array, batches: tuple[Array, ...], groups: int) -> Params:
    def add(sums: Params, batch: tuple[Array, ...]) -> tuple[Params, None]:
        rows, weights, group = batch
        _, f = factors(net, params, x[rows], y[rows])
        summed = gradient(f, weights, normalize_by=1)
        return jax.tree.map(lambda total, part: total.at[group].add(part.astype(total.dtype)), sums, summed), None

    zeros = jax.tree.map(lambda p: jnp.zeros((groups, *p.shape), wide(p.dtype)), params)
    return jax.lax.scan(add, zeros, batches)[0]


def _class_cosine(subject: Subject, norm: np.ndarray, chunk: int) -> np.ndarray:
    """Mean of cos(gₙ, gₘ) over n of class a and m ≠ n of class b, (C, C): products of sums of unit gradients.

    NaN where there is no pair; a gradient of 0 has the cosine 0, as in `persample.cosine`.
    """
    count, labels = len(subject.model.classes or ()), subject.y
    inverse = np.divide(1, norm, out=np.zeros(len(norm)), where=norm > 0)
    sums = _sums(subject.net, subject.model.params, *subject.data, labels, inverse, count, chunk)
    flat = [np.asarray(leaf, np.float64).reshape(count, -1) for leaf in jax.tree.leaves(sums)]
    products = sum((leaf @ leaf.T for leaf in flat), np.zeros((count, count)))
    sizes = np.bincount(labels, minlength=count).astype(np.float64)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    products -= np.diag(np.bincount(labels, norm > 0, minlength=count))  # cos(gₙ, gₙ) = 1
    return np.divide(products, pairs, out=np.full_like(products, np.nan), where=pairs > 0)


def _numbers(asked: set[str], squared_norm: np.ndarray, mean: Params) -> dict[str, float]:
    """The quantities of the split as a whole, from the mean of ‖gₙ‖² and the norm of the mean gradient."""
    small, samples = float(squared_norm.mean()), len(squared_norm)
    big = sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in jax.tree.leaves(mean))
    found: dict[str, float] = {}
    if "noise_scale" in asked and samples > 1:
        # In float64, which JAX has only in its x64 mode: persample.noise_scale_from_norms(small, big, 1, samples).
        trace, squared = (small - big) / (1 - 1 / samples), (samples * big - small) / (samples - 1)
        scale = trace / squared if squared else float("nan")
        found |= {"noise scale tr Σ / |G|² (samples)": scale, "tr Σ": trace, "|G|²": squared}
    if "diversity" in asked:
        found["diversity Σ ‖g‖² / ‖Σ g‖²"] = small / (samples * big) if big else float("nan")
    if "coherence" in asked:
        found["coherence ‖mean g‖² / mean ‖g‖²"] = big / small if small else 0.0
    return found


def _table(subject: Subject, columns: dict[str, np.ndarray], asked: set[str]) -> dict[str, np.ndarray]:
    """Label and prediction, by the names of the classes or in the units of the targets; then the quantities."""
    model, output = subject.model, columns["output"]
    table: dict[str, np.ndarray] = {"index": np.arange(len(output))}
    if model.classes:
        names = np.array(model.classes)
        table |= {"label": names[subject.y], "prediction": names[output.argmax(axis=1)]}
    else:
        predicted = output.astype(np.float64) if model.targets is None else model.targets.inverse(output)
        for name, values in (("target", subject.y), ("prediction", predicted)):
            table |= {f"{name}{k}": values[:, k] for k in range(values.shape[1])}
    table["loss"] = columns["loss"]
    if "squared_norms" in asked:
        table["squared_norm"] = columns["squared_norm"]
        table |= {f"squared_norm_layer_{k}": column for k, column in enumerate(columns["layers"].T, 1)}
    chosen = {"grand": "norm", "el2n": "el2n", "cosine": "cosine"}
    return table | {
        "cosine_to_mean" if column == "cosine" else column: columns[column]
        for name, column in chosen.items()
        if name in asked
    }


# What is asked --------------------------------------------------------------------------------------------------------


def _check(request: Request) -> None:
    choose("--split", "split", request.split, SPLITS)
    for name in request.quantities or ():
        choose("--quantities", "quantity", name, QUANTITIES)
    if not 1 <= request.chunk < 2**31:
        raise UserError(f"--chunk: got {request.chunk}, it should be from 1 to 2³¹ − 1")


def _config(source: Path) -> Config:
    if not source.is_dir():
        return configs.read(source)
    load(source)  # says what is missing in a folder that is no run's
    return configs.read(source / "config.toml")


def _default_out(request: Request) -> Path:
    name = f"study_{request.split}.csv"
    return request.source / name if request.source.is_dir() else Path(f"{request.source.stem}_{name}")


def _pictures(out: Path) -> dict[str, Path]:
    return {name: out.with_name(f"{out.stem}_{name}.png") for name in PICTURES}


def _fitting(subject: Subject, asked: Sequence[str] | None) -> list[str]:
    """The quantities asked for, or all that fit."""
    loss = losses.get(subject.net.loss).name
    sigma = subject.net.activations[-1].name
    fits = loss == "softmax_cross_entropy" and sigma == "identity"
    if asked and "el2n" in asked and not fits:
        raise UserError(
            f"--quantities: el2n needs the loss softmax_cross_entropy of the output identity, here {loss} of {sigma}"
        )
    return [name for name in QUANTITIES if name in asked] if asked else [n for n in QUANTITIES if n != "el2n" or fits]


def _recorded(source: Path) -> list[dict[str, Any]]:
    """The steps of a run that recorded its noise scale."""
    path = source / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return [row for row in rows if "noise_scale" in row]


# What is shown --------------------------------------------------------------------------------------------------------


def _describe(subject: Subject, source: Path, quantities: Sequence[str]) -> str:
    trained = "as trained" if source.is_dir() else "at initialisation, untrained"
    samples = f"{len(subject.x):,} {SPLITS[subject.split]} samples of {subject.setup.dataset.name}"
    network = f"{'-'.join(map(str, subject.net.sizes))} {trained}"
    return f"{source}: {network} · {samples} · {losses.get(subject.net.loss).name} · {', '.join(quantities)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "no pictures"


def _draw(
    subject: Subject, results: Results, quantities: Sequence[str], recorded: list[dict[str, Any]], to: dict[str, Path]
) -> None:
    """The pictures that the quantities have, without their table where there are too many classes."""
    table, classes, what = results.table, subject.model.classes, f"{SPLITS[subject.split]} samples"
    shown = classes if classes and len(classes) <= CLASSES_SHOWN else None
    if "grand" in quantities:
        groups = {name: table["norm"][subject.y == k] for k, name in enumerate(shown)} if shown else {"": table["norm"]}
        study_plots.norms(groups, what, to["norms"])
        for name, sign in (("hardest", -1), ("easiest", 1)):
            rows = np.argsort(sign * table["norm"], kind="stable")[: loop.WORST]
            _draw_images(subject, table, rows, f"the {name} {what}: index, label → prediction, gradient norm", to[name])
    if results.class_cosine is not None and classes:
        study_plots.class_cosine(results.class_cosine, classes, what, to["class_cosine"])
    if results.eigenvalues is not None:
        study_plots.gram_spectrum(results.eigenvalues, len(subject.x), what, to["gram_spectrum"])
    if "noise_scale" in quantities and recorded:
        study_plots.noise_scale(recorded, to["noise_scale"])


def _draw_images(subject: Subject, table: dict[str, np.ndarray], rows: np.ndarray, title: str, path: Path) -> None:
    if subject.setup.dataset.image_shape:
        chosen = {name: table[name][rows].tolist() for name in ("index", "label", "prediction", "norm")}
        study_plots.images(subject.x[rows], chosen, title, subject.setup.dataset.image_shape, path)


def _print_summary(subject: Subject, results: Results, console: Console) -> None:
    table = results.table
    summary = Table(
        title=f"{SPLITS[subject.split]} samples: means, where nothing else is said", box=SIMPLE_HEAD, pad_edge=False
    )
    columns = _summary_columns(table)
    for name in ("", "samples", *columns):
        summary.add_column(name, justify="right" if name else "left", no_wrap=True)
    groups = {"all": np.arange(len(table["index"]))}
    classes = subject.model.classes or ()
    if len(classes) <= CLASSES_SHOWN:
        groups = {name: np.flatnonzero(subject.y == k) for k, name in enumerate(classes)} | groups
    for name, rows in groups.items():
        cells = [column(rows) if len(rows) else "" for column in columns.values()]
        summary.add_row(escape(name), f"{len(rows):,}", *cells, end_section=name == list(groups)[-2:][0] != "all")
    console.print(summary)
    for name, number in results.numbers.items():
        console.out(f"{name} {number:.4g}", highlight=False)


def _summary_columns(table: dict[str, np.ndarray]) -> dict[str, Callable[[np.ndarray], str]]:
    """What the summary says of some rows of the table, by the column's title."""

    def reduced(name: str, reduce: Callable[..., Any]) -> Callable[[np.ndarray], str]:
        return lambda rows: f"{reduce(table[name][rows].astype(np.float64)):.3g}"

    columns: dict[str, Callable[[np.ndarray], str]] = {}
    if "label" in table:
        right = table["label"] == table["prediction"]
        columns["correct"] = lambda rows: f"{100 * right[rows].mean():.1f} %"
    columns["loss"] = reduced("loss", np.mean)
    if "norm" in table:
        columns |= {"norm": reduced("norm", np.mean), "median": reduced("norm", np.median)}
        columns["max"] = reduced("norm", np.max)
    if "squared_norm" in table and "norm" not in table:
        columns["squared norm"] = reduced("squared_norm", np.mean)
    if "el2n" in table:
        columns["EL2N"] = reduced("el2n", np.mean)
    if "cosine_to_mean" in table:
        columns["cosine"] = reduced("cosine_to_mean", np.mean)
    return columns


def _write_csv(table: dict[str, np.ndarray], path: Path) -> None:
    """Numbers in as many digits as bring them back exactly."""
    columns = [column.astype(str).tolist() for column in table.values()]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*columns, strict=True))


def _write_parquet(table: dict[str, np.ndarray], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        name: pyarrow.array(column.tolist() if column.dtype.kind == "U" else column) for name, column in table.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), str(path))
