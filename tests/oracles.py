"""The naive twins: the same network written with `jax.nn`, `optax` and autodiff, and 80-digit truth from mpmath.

Nothing here calls a forward or a derivative of jaxbp. Kinks differ by convention (jax.nn.leaky_relu′(0) is 1, ours is
0.01): compare on data that hits none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
from mpmath import mpf

from jaxbp import Affine

Array = jax.Array
Params = Sequence[Any]

SIGMAS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda s: s,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "relu6": jax.nn.relu6,
    "elu": jax.nn.elu,
    "celu": jax.nn.celu,
    "selu": jax.nn.selu,
    "gelu": lambda s: jax.nn.gelu(s, approximate=False),
    "gelu_tanh": lambda s: jax.nn.gelu(s, approximate=True),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "log_sigmoid": jax.nn.log_sigmoid,
    "tanh": jnp.tanh,
    "soft_sign": jax.nn.soft_sign,
    "softplus": jax.nn.softplus,
    "hard_tanh": jax.nn.hard_tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "squareplus": jax.nn.squareplus,
}
KINKS = {"relu": [0], "leaky_relu": [0], "relu6": [0, 6], "elu": [0], "celu": [0], "selu": [0], "hard_tanh": [-1, 1]}
KINKS |= {"hard_sigmoid": [-3, 3], "hard_silu": [-3, 3]}


def _softmax_cross_entropy(x: Array, y: Array) -> Array:
    return -jnp.sum((jax.nn.one_hot(y, x.size, dtype=x.dtype) if y.ndim == 0 else y) * jax.nn.log_softmax(x))


def _hinge(x: Array, y: Array) -> Array:
    return jnp.sum(jax.nn.relu(1 + x - x[y])) - 1  # the label's own margin is 1


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "squared_error": lambda x, y: jnp.sum(optax.l2_loss(x, y)),
    "absolute_error": lambda x, y: jnp.sum(jnp.abs(x - y)),
    "huber": lambda x, y: jnp.sum(optax.huber_loss(x, y)),
    "log_cosh": lambda x, y: jnp.sum(optax.log_cosh(x, y)),
    "softmax_cross_entropy": _softmax_cross_entropy,
    "sigmoid_cross_entropy": lambda x, y: jnp.sum(optax.sigmoid_binary_cross_entropy(x, y)),
    "hinge": _hinge,
    "kl_divergence": lambda x, y: jnp.sum(y * (jnp.log(y) - jax.nn.log_softmax(x))),
    "poisson": lambda x, y: jnp.sum(jnp.exp(x) - y * x),
}


def targets(loss: str, rng: np.random.Generator, shape: tuple[int, int], dtype: Any, labels: bool = True) -> Array:
    """Targets (N, C) or (N,) that the loss is meant for: labels, probabilities in (0, 1), counts or numbers."""
    if loss == "hinge" or (loss == "softmax_cross_entropy" and labels):
        return jnp.asarray(rng.integers(shape[1], size=shape[0]))
    if loss in ("softmax_cross_entropy", "kl_divergence"):
        y = rng.dirichlet(np.ones(shape[1]), size=shape[0])
    elif loss == "sigmoid_cross_entropy":
        y = rng.random(shape)
    else:
        y = rng.poisson(2.0, shape) if loss == "poisson" else rng.standard_normal(shape)
    return jnp.asarray(y.astype(dtype))


def data(net: Any, seed: int, batch: int, dtype: Any = jnp.float64, spread: float = 1.5) -> tuple[Params, Array, Array]:
    """Random parameters, biases included (so that no s is exactly 0), inputs, targets. `spread` reaches the kinks.

    Drawn by NumPy: a draw by JAX would be compiled for each shape.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    def affine(inputs: int, outputs: int) -> Affine:
        w = rng.standard_normal((outputs, inputs)) * inputs**-0.5
        return Affine(jnp.asarray(w.astype(dtype)), normal(outputs))

    params = tuple(affine(*widths) for widths in zip(net.sizes, net.sizes[1:], strict=False))
    x = jnp.asarray((spread * rng.standard_normal((batch, net.sizes[0]))).astype(dtype))
    return params, x, targets(net.loss, rng, (batch, net.sizes[-1]), dtype)


def network(sigmas: Sequence[Callable[[Array], Array]], params: Params, x: Array) -> Array:
    """f(x) for one sample."""
    for sigma, (w, b) in zip(sigmas, params, strict=True):
        x = sigma(w @ x + b)
    return x


def sigmas(net: Any) -> list[Callable[[Array], Array]]:
    return [SIGMAS[sigma.name] for sigma in net.activations]


def sample_loss(net: Any, params: Params, x: Array, y: Array) -> Array:
    return LOSSES[net.loss](network(sigmas(net), params, x), y)


def losses(net: Any, params: Params, x: Array, y: Array) -> Array:
    return jax.vmap(lambda x, y: sample_loss(net, params, x, y))(x, y)


def value_and_grad(net: Any, params: Params, x: Array, y: Array) -> tuple[Array, Params]:
    return jax.value_and_grad(lambda params: jnp.mean(losses(net, params, x, y)))(params)


def per_sample_gradients(net: Any, params: Params, x: Array, y: Array) -> Params:
    """∂ℓₙ/∂(w, b), each leaf (N, …)."""
    return jax.vmap(lambda x, y: jax.grad(lambda params: sample_loss(net, params, x, y))(params))(x, y)


# Per-sample quantities, from the gradients themselves ---------------------------------------------------------------
#
# Everything is NumPy in f64 on a matrix of gradients, one row a sample, by the definition: pairs of rows in a loop, not
# the identity between moments that the library uses.

_one_gradient = jax.jit(jax.grad(sample_loss, argnums=1), static_argnums=0)


def gradient_rows(net: Any, params: Params, x: Array, y: Array) -> list[np.ndarray]:
    """The gradient of each sample by jax.grad, in a Python loop and in f64: for each layer (N, out·in + out)."""
    params, x = jax.tree.map(lambda a: a.astype(jnp.float64), (tuple(params), x))
    y = y if y.ndim == 1 else y.astype(jnp.float64)
    samples = [_one_gradient(net, params, x[n], y[n]) for n in range(len(x))]
    return [
        np.array([np.concatenate([np.ravel(leaf) for leaf in sample[layer]]) for sample in samples])
        for layer in range(len(params))
    ]


def like_params(net: Any, rows: Sequence[np.ndarray]) -> Params:
    """(…, out·in + out) of each layer as Affine(w (…, out, in), b (…, out))."""
    pairs = zip(net.sizes, net.sizes[1:], rows, strict=False)
    return tuple(Affine(r[..., : i * o].reshape(*r.shape[:-1], o, i), r[..., i * o :]) for i, o, r in pairs)


def variance(rows: np.ndarray, weights: np.ndarray, unbiased: bool) -> np.ndarray:
    """Σ p (g − ḡ)² (/ (1 − Σ p²)), two passes over the samples."""
    p = weights / np.sum(weights)
    mean = sum(share * g for share, g in zip(p, rows, strict=True))
    spread = sum(share * (g - mean) ** 2 for share, g in zip(p, rows, strict=True))
    return spread / (1 - np.sum(p**2)) if unbiased else spread


def clipped_mean(rows: np.ndarray, bound: float, weights: np.ndarray) -> tuple[np.ndarray, float]:
    total, clipped = np.zeros(rows.shape[1]), 0
    for weight, g in zip(weights, rows, strict=True):
        norm = np.sqrt(np.sum(g**2))
        total += weight * (g * bound / norm if norm > bound else g)
        clipped += norm > bound and weight > 0
    return total / len(rows), clipped / np.sum(weights > 0)


def noise_scale(rows: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """tr Σ as the mean of ½‖gₙ − gₘ‖² over pairs n ≠ m, plainly unbiased, and |G|² = E‖g‖² − tr Σ."""
    p = weights / np.sum(weights)
    pairs = [(n, m) for n in range(len(rows)) for m in range(len(rows)) if n != m]
    share = np.array([p[n] * p[m] for n, m in pairs])
    trace = share @ [np.sum((rows[n] - rows[m]) ** 2) / 2 for n, m in pairs] / np.sum(share)
    squared = p @ np.sum(rows**2, axis=1) - trace
    return squared, trace, trace / squared


def stiffness(rows: np.ndarray, others: np.ndarray, weights: np.ndarray, distinct: bool) -> tuple[float, float]:
    """Weighted means of sign and cosine over all pairs, or over pairs of distinct samples."""
    sign = cosine = total = 0.0
    for n, g in enumerate(rows):
        for m, h in enumerate(others):
            weight = weights[n] * (weights[m] if distinct else 1) * (not distinct or n != m)
            sign += weight * np.sign(g @ h)
            cosine += weight * (g @ h) / np.sqrt((g @ g) * (h @ h))
            total += weight
    return sign / total, cosine / total


# Truth --------------------------------------------------------------------------------------------------------------

mpmath.mp.dps = 80  # elu′(−100) = e⁻¹⁰⁰ is a difference of numbers near −1: 44 digits go


def _tanh_gelu(s: mpf) -> mpf:
    return s * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (s + mpf("0.044715") * s**3))) / 2


def _clip(s: mpf, low: int, high: int) -> mpf:
    return min(max(s, mpf(low)), mpf(high))


SELU = mpf("1.0507009873554804934193349852946"), mpf("1.6732632423543772848170429916717")  # Klambauer et al. 2017, §2

SIGMA_TRUTH: dict[str, Callable[[mpf], mpf]] = {
    "identity": lambda s: s,
    "relu": lambda s: max(s, mpf(0)),
    "leaky_relu": lambda s: s if s > 0 else s / 100,
    "relu6": lambda s: _clip(s, 0, 6),
    "elu": lambda s: s if s > 0 else mpmath.expm1(s),
    "celu": lambda s: s if s > 0 else mpmath.expm1(s),
    "selu": lambda s: SELU[0] * (s if s > 0 else SELU[1] * mpmath.expm1(s)),
    "gelu": lambda s: s * mpmath.ncdf(s),
    "gelu_tanh": _tanh_gelu,
    "silu": lambda s: s / (1 + mpmath.exp(-s)),
    "mish": lambda s: s * mpmath.tanh(mpmath.log1p(mpmath.exp(s))),
    "sigmoid": lambda s: 1 / (1 + mpmath.exp(-s)),
    "log_sigmoid": lambda s: -mpmath.log1p(mpmath.exp(-s)),
    "tanh": mpmath.tanh,
    "soft_sign": lambda s: s / (1 + abs(s)),
    "softplus": lambda s: mpmath.log1p(mpmath.exp(s)),
    "hard_tanh": lambda s: _clip(s, -1, 1),
    "hard_sigmoid": lambda s: _clip(s / 6 + mpf(1) / 2, 0, 1),
    "hard_silu": lambda s: s * _clip(s / 6 + mpf(1) / 2, 0, 1),
    "squareplus": lambda s: (s + mpmath.sqrt(s**2 + 4)) / 2,
}


def truth(f: Callable[[mpf], mpf], points: Any) -> list[mpf]:
    return [f(mpf(float(s))) for s in points]


def absolute_errors(got: Any, want: list[mpf]) -> np.ndarray:
    return np.array([float(abs(mpf(float(g)) - w)) for g, w in zip(got, want, strict=True)])


# Comparison ---------------------------------------------------------------------------------------------------------

worst: dict[str, tuple[float, str]] = {}
"""The largest relative error of a leaf that any comparison saw, by dtype; `test_worst_errors` prints it."""


def leaf_errors(got: Any, want: Any) -> list[float]:
    """max|a − b| / max|b| of every leaf, in f64; a NaN is an infinite error, a 0 wanted must be 0."""
    assert jax.tree.structure(jax.tree.leaves(got)) == jax.tree.structure(jax.tree.leaves(want))

    def error(a: Array, b: Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
        difference, size = np.max(np.abs(a - b), initial=0.0), np.max(np.abs(b), initial=0.0)
        return float(np.nan_to_num(difference / size if size else difference and np.inf, nan=np.inf))

    return [error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]


def record(dtype: str, error: float, what: str) -> None:
    worst[dtype] = max(worst.get(dtype, (0.0, "")), (error, what))


def assert_close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    """Every leaf within `tolerance`, relative to the leaf's largest element; the worst leaf is recorded."""
    errors = leaf_errors(got, want)
    record(str(jax.tree.leaves(got)[0].dtype), max(errors), what)
    assert max(errors) <= tolerance, (
        f"{what}: leaf {int(np.argmax(errors))} is off by {max(errors):.2e} > {tolerance:.2e}"
    )


def assert_same_bits(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def tolerance(dtype: Any, depth: int, width: int) -> float:
    """ε × depth × width: each of `depth` layers adds sums of `width` rounded products; f64: the contract's 1e-12."""
    return 1e-12 if dtype == jnp.float64 else float(jnp.finfo(dtype).eps) * depth * width
