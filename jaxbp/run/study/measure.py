"""Per-sample quantities of a split of a problem, with initial or trained parameters."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import persample
from jaxbp.factor import FactorTree
from jaxbp.mlp import MLP, Array, Params, wide
from jaxbp.network import Net, ParamTree, factors, gradient
from jaxbp.run import config as configs
from jaxbp.run import problem as problems
from jaxbp.run.compute.epoch import evaluate
from jaxbp.run.data import Dataset
from jaxbp.run.errors import UserError
from jaxbp.run.problem import SPLITS, Problem, Split, drawn
from jaxbp.run.store.model import Model, finished, load
from jaxbp.run.study import curvature
from jaxbp.run.study.curvature import Influence, Spectrum

OF_THE_MEAN = {"cosine", "noise_scale", "diversity", "coherence"}  # those that need the mean gradient of the split
CLASSES_SHOWN = 20  # in the summary and the pictures; with more classes only what concerns all samples is shown
GRAM_SAMPLES = 1000


class Subject(NamedTuple):
    """A problem, a network with parameters, and a split: as it was read and, on the device, as the loss takes it."""

    source: Path
    problem: Problem
    model: Model
    split: str
    data: Split
    x: np.ndarray
    y: np.ndarray

    @property
    def net(self) -> Net:
        """The network with the loss of the config, without label smoothing."""
        return self.problem.scored

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, where samples are shown by class: each has one label, and there are few classes."""
        names = self.model.classes or ()
        return names if self.y.ndim == 1 and len(names) <= CLASSES_SHOWN else ()

    @property
    def state(self) -> str:
        """Which parameters the network has."""
        if not self.source.is_dir():
            return "at initialisation, untrained"
        epoch = f", epoch {self.model.best}, the best" if self.model.best else ""
        return ("as trained" if finished(self.source) else "as trained so far, unfinished") + epoch


@dataclasses.dataclass
class Results:
    """The columns by their names, of all samples; what was asked of the split as a whole.

    finite: (N,), whether a sample's gradient is; what is said of the split as a whole leaves out the others.
    numbers: by a line that says what each is;  class_cosine: (C, C) mean cosines;  eigenvalues: of the Gram matrix;
    spectra: by the names of `curvature.KINDS`;  kernel: the tangent kernel and its rows;  influence: of all samples.
    """

    columns: dict[str, np.ndarray]
    finite: np.ndarray
    numbers: dict[str, float]
    class_cosine: np.ndarray | None = None
    eigenvalues: np.ndarray | None = None
    spectra: dict[str, Spectrum] = dataclasses.field(default_factory=dict)
    kernel: tuple[np.ndarray, np.ndarray] | None = None
    influence: Influence | None = None


def prepare(source: Path, split: str = "train", dataset: Dataset | None = None) -> Subject:
    """The split of the data that a run or config names, with the trained or the initial network, on one device.

    Raises:
      UserError: no such split; no finished run; a config that does not fit its data; other data than those of the run.
    """
    configs.choose("--split", "split", split, SPLITS)
    if source.is_dir():
        model = load(source)
        problem = problems.of_run(source, model, dataset)
    else:
        problem = problems.pose(configs.read(source))
        model = problem.model(problem.initial())
    if split not in problem.dataset.splits:
        raise UserError(f"--split: {source} has no {split} set")
    return Subject(source, problem, model, split, problem.on_device(split), *problem.raw(split))


def measure(subject: Subject, quantities: Sequence[str], chunk: int) -> Results:
    """All quantities of a split, never with the factors of more than `chunk` samples at a time."""
    net, params, (x, y) = subject.net, subject.model.params, subject.data
    asked = set(quantities)
    mean, finite = None, np.ones(len(x), bool)
    if asked & OF_THE_MEAN:
        mean = _mean(subject, finite, chunk)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(mean)):
            finite = np.isfinite(jax.device_get(_per_sample(net, params, None, x, y, chunk)["norm"]))
            mean = _mean(subject, finite, chunk)
    direction = None if mean is None else _direction(mean)
    columns = jax.device_get(_per_sample(net, params, direction, x, y, chunk, "el2n" in asked))
    columns["output"] = np.asarray(evaluate(net, params, x, y).output)
    finite = np.isfinite(columns["norm"])
    numbers = {} if mean is None else _numbers(asked, columns["norm"][finite].astype(np.float64) ** 2, mean)
    found = Results(columns, finite, numbers)
    if "cosine" in asked and subject.classes:
        found.class_cosine = _class_cosine(subject, columns["norm"], chunk)
    if "gram" in asked:
        found.eigenvalues = _spectrum(subject, np.flatnonzero(finite), chunk)
    if asked & set(curvature.NAMES):
        _add_curvature(subject, found, asked, chunk)
    return found


def _add_curvature(subject: Subject, found: Results, asked: set[str], chunk: int) -> None:
    net, params, data = cast(MLP, subject.net), cast(Params, subject.model.params), subject.data  # `study` has looked
    for kind in (kind for kind in curvature.KINDS if kind in asked):
        found.spectra[kind] = of = curvature.spectrum_of(net, params, data, kind)
        name = f"largest eigenvalue of the {curvature.KINDS[kind]}"
        found.numbers |= {name: float(of.eigenvalues[0]), f"{name}, residual": float(of.residuals[0])}
    if "ntk" in asked:
        found.kernel = curvature.kernel(net, params, data, subject.y if subject.classes else None)
    if "influence" in asked:
        test = subject.problem.on_device("test")
        losses = np.asarray(evaluate(net, params, *test).loss)
        found.influence = curvature.influence(net, params, data, test, losses, chunk)
        found.columns["influence"] = found.influence.on_the_set


def _mean(subject: Subject, counted: np.ndarray, chunk: int) -> ParamTree:
    weights = counted / max(int(counted.sum()), 1)
    return jax.tree.map(lambda a: a[0], _sums(subject, np.zeros(len(counted), np.int32), weights, 1, chunk))


def _spectrum(subject: Subject, rows: np.ndarray, chunk: int) -> np.ndarray | None:
    """The eigenvalues of the Gram matrix / n of the rows, or of GRAM_SAMPLES of them; None where it overflows."""
    x, y = subject.data
    rows = rows[drawn(len(rows), GRAM_SAMPLES)]
    matrix = np.asarray(persample.gram_matrix(subject.net, subject.model.params, x[rows], y[rows], chunk), np.float64)
    return np.linalg.eigvalsh(matrix)[::-1] / max(len(rows), 1) if np.isfinite(matrix).all() else None


@functools.partial(jax.jit, static_argnames=("net", "chunk", "el2n"))
def _per_sample(
    net: Net, params: ParamTree, direction: ParamTree | None, x: Array, y: Array, chunk: int, el2n: bool = False
) -> dict[str, Any]:
    """Every column, (N,) or (N, ·); the cosine with the mean gradient where its direction is given."""

    def quantity(loss: Array, f: FactorTree) -> dict[str, Any]:
        layers = persample.squared_norms(f, per_layer=True)
        norm = persample.grand(f)
        found = {"loss": loss, "norm": norm, "squared_norm": norm**2, "layers": jnp.stack(layers, axis=1)}
        found |= {"el2n": persample.el2n(f)} if el2n else {}
        if direction is not None:
            slope = persample.dot(f, direction)  # ‖gₙ‖ cos
            found["cosine_to_mean"] = jnp.where(norm == 0, 0, slope / jnp.where(norm == 0, 1, norm))
        return found

    return persample.map_chunks(quantity, net, params, x, y, chunk)


def _direction(mean: ParamTree) -> ParamTree:
    """The mean gradient divided by its norm, whose square may overflow where JAX has float32; zeros of zeros."""
    wider = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), mean)
    length = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(wider))) or 1.0
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf / length, like.dtype), wider, mean)


def _sums(subject: Subject, group: np.ndarray, weights: np.ndarray, groups: int, chunk: int) -> ParamTree:
    """Σ weightsₙ gₙ over the samples of each group, like the parameters with a leading axis of the groups.

    A chunk holds samples of one group, and is filled up with samples of weight 0: one pass for all groups.
    """
    size = min(chunk, max(int(np.bincount(group).max()), 1))
    rows, filled, owner = [], [], []
    for g in range(groups):
        members = np.flatnonzero(group == g).astype(np.int32)
        places = -(-len(members) // size) * size
        own = np.where(np.arange(places) < len(members), np.resize(weights[members], places), 0)
        rows.append(np.resize(members, places).reshape(-1, size))
        filled.append(own.reshape(-1, size))
        owner += [g] * (places // size)
    batches = np.concatenate(rows), np.concatenate(filled), np.array(owner, np.int32)
    return _scan_sums(subject.net, subject.model.params, *subject.data, jax.tree.map(jnp.asarray, batches), groups)


@functools.partial(jax.jit, static_argnames=("net", "groups"))
def _scan_sums(net: Net, params: ParamTree, x: Array, y: Array, batches: tuple[Array, ...], groups: int) -> ParamTree:
    def add(sums: ParamTree, batch: tuple[Array, ...]) -> tuple[ParamTree, None]:
        rows, weights, group = batch
        _, f = factors(net, params, x[rows], y[rows])
        summed = gradient(f, weights, normalize_by=1)
        return jax.tree.map(lambda total, part: total.at[group].add(part.astype(total.dtype)), sums, summed), None

    zeros = jax.tree.map(lambda p: jnp.zeros((groups, *p.shape), wide(p.dtype)), params)
    return jax.lax.scan(add, zeros, batches)[0]


def _class_cosine(subject: Subject, norm: np.ndarray, chunk: int) -> np.ndarray:
    """Mean of cos(gₙ, gₘ) over n of class a and m ≠ n of class b, (C, C): products of sums of unit gradients.

    NaN where there is no pair; a gradient of 0 has the cosine 0, as in `persample.cosine`. Those that are not finite
    are left out.
    """
    count, labels, finite = len(subject.classes), subject.y, np.isfinite(norm)
    inverse = np.divide(1, norm, out=np.zeros(len(norm)), where=finite & (norm > 0))
    sums = _sums(subject, labels, inverse, count, chunk)
    flat = [np.asarray(leaf, np.float64).reshape(count, -1) for leaf in jax.tree.leaves(sums)]
    products = sum((leaf @ leaf.T for leaf in flat), np.zeros((count, count)))
    sizes = np.bincount(labels[finite], minlength=count).astype(np.float64)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    products -= np.diag(np.bincount(labels, inverse > 0, minlength=count))  # cos(gₙ, gₙ) = 1
    return np.divide(products, pairs, out=np.full_like(products, np.nan), where=pairs > 0)


def _numbers(asked: set[str], squared_norm: np.ndarray, mean: ParamTree) -> dict[str, float]:
    """The quantities of the split as a whole, from the mean of ‖gₙ‖² and the norm of the mean gradient.

    In float64, which JAX has only in its x64 mode, and as `persample.noise_scale_from_norms` and its neighbours do it.
    """
    small, samples = float(squared_norm.mean()) if squared_norm.size else float("nan"), len(squared_norm)
    big = sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in jax.tree.leaves(mean))
    found: dict[str, float] = {}
    if "noise_scale" in asked and samples > 1:
        trace, squared = (small - big) / (1 - 1 / samples), (samples * big - small) / (samples - 1)
        scale = trace / squared if squared > 0 else float("nan")  # noise hides |G|²
        found |= {"noise scale tr Σ / |G|² (samples)": scale, "tr Σ": trace, "|G|²": squared}
    if "diversity" in asked:
        found["diversity Σ ‖g‖² / ‖Σ g‖²"] = small / (samples * big) if big else (float("inf") if small else 0.0)
    if "coherence" in asked:
        found["coherence ‖mean g‖² / mean ‖g‖²"] = big / small if small else 0.0
    return found
