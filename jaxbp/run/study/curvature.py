"""The curvature in `jaxbp study`: spectra, the tangent kernel, the influence of training samples. Of an MLP alone."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import persample, spectrum
from jaxbp.curvature import linearized
from jaxbp.factor import FactorTree
from jaxbp.kronecker import ekfac
from jaxbp.mlp import MLP, Array, Params
from jaxbp.network import value_and_grad
from jaxbp.run.problem import Split, drawn
from jaxbp.tangent_kernel import ntk

KINDS = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}
NAMES = (*KINDS, "ntk", "influence")
SAMPLES = 1000  # of the split, whose mean loss the matrices belong to
KERNEL_SAMPLES = 300
LARGEST, PRODUCTS, PROBES = 10, 60, 6  # eigenvalues; matrix products for them and for each probe of a density
TESTS = 4  # samples whose influences are shown
DAMPING = 0.1  # × the mean eigenvalue of a layer's block, as Grosse et al. (2023) take it


class Spectrum(NamedTuple):
    """The largest eigenvalues, (k,), with their residuals, each layer's share of their vectors (k, L), the density."""

    eigenvalues: Any
    residuals: Any
    shares: Any
    density: spectrum.Density


class Influence(NamedTuple):
    """g_testᵀ (G + λ)⁻¹ gₙ of every training sample, positive where it helps.

    on_the_set: on the mean loss of the test set, (N,);  on_samples: on single ones, (N, K);  tests: which these are,
    those with the largest loss.
    """

    on_the_set: np.ndarray
    on_samples: np.ndarray
    tests: np.ndarray


def spectrum_of(net: MLP, params: Params, data: Split, kind: str) -> Spectrum:
    """The spectrum of the matrix of the mean loss of at most SAMPLES rows."""
    rows = drawn(len(data.x), SAMPLES)
    return jax.device_get(_spectrum(net, kind, params, data.x[rows], data.y[rows]))


@functools.partial(jax.jit, static_argnames=("net", "kind"))
def _spectrum(net: MLP, kind: str, params: Params, x: Array, y: Array) -> Any:
    matrix, (first, second) = linearized(net, params, x, y, kind), jax.random.split(jax.random.key(0))
    count = min(LARGEST, PRODUCTS, sum(leaf.size for leaf in jax.tree.leaves(params)))
    values, vectors, residuals = spectrum.eigenpairs(matrix, params, count, first, PRODUCTS)
    shares = [sum(jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in layer) for layer in vectors]
    density = spectrum.spectral_density(matrix, params, second, PROBES, PRODUCTS)
    return Spectrum(values, residuals, jnp.stack(shares, axis=1), density)


def kernel(net: MLP, params: Params, data: Split, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The trace kernel of at most KERNEL_SAMPLES rows, those of a class side by side; and these rows."""
    rows = drawn(len(data.x), KERNEL_SAMPLES)
    if labels is not None:
        rows = rows[np.argsort(labels[rows], kind="stable")]
    return np.asarray(ntk(net, params, data.x[rows], kind="trace"), np.float64), rows


def influence(net: MLP, params: Params, train: Split, test: Split, losses: np.ndarray, chunk: int) -> Influence:
    """Of all training samples, with the EK-FAC of at most SAMPLES of them in the place of G.

    Args:
      losses: of the test samples; the TESTS largest that are finite say which of them are looked at one by one.
    """
    tests = np.argsort(-np.where(np.isfinite(losses), losses, -np.inf), kind="stable")[:TESTS]
    rows = drawn(len(train.x), SAMPLES)
    directions = _directions(net, params, Split(train.x[rows], train.y[rows]), test, jnp.asarray(tests))
    found = np.asarray(_scores(net, params, directions, *train, chunk), np.float64)
    return Influence(found[:, 0], found[:, 1:], tests)


@functools.partial(jax.jit, static_argnames=("net",))
def _directions(net: MLP, params: Params, train: Split, test: Split, tests: Array) -> Any:
    """(G + λ)⁻¹ g of the test set, then of each test sample; with a leading axis."""
    blocks = ekfac(net, params, *train)

    def solved(x: Array, y: Array) -> Params:
        g = value_and_grad(net, params, x, y)[1]
        return tuple(block.solve(v, DAMPING * jnp.mean(block.values)) for block, v in zip(blocks, g, strict=True))

    singles = jax.lax.map(lambda sample: solved(*(a[None] for a in sample)), (test.x[tests], test.y[tests]))
    return jax.tree.map(lambda whole, each: jnp.concatenate([whole[None], each]), solved(*test), singles)


@functools.partial(jax.jit, static_argnames=("net", "chunk"))
def _scores(net: MLP, params: Params, directions: Params, x: Array, y: Array, chunk: int) -> Any:
    def quantity(_: Array, f: FactorTree) -> Array:
        return jax.vmap(lambda u: persample.dot(f, u), out_axes=1)(directions)

    return persample.map_chunks(quantity, net, params, x, y, chunk)
