"""The naive twins: the same network written with `jax.nn`, `optax` and autodiff, and 80-digit truth from mpmath.

Nothing here calls a forward or a derivative of jaxbp. Kinks differ by convention (jax.nn.leaky_relu′(0) is 1, ours is
0.01): compare on data that hits none.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
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
        return jax.device_put(rng.integers(shape[1], size=shape[0]))
    if loss in ("softmax_cross_entropy", "kl_divergence"):
        y = rng.dirichlet(np.ones(shape[1]), size=shape[0])
    elif loss == "sigmoid_cross_entropy":
        y = rng.random(shape)
    else:
        y = rng.poisson(2.0, shape) if loss == "poisson" else rng.standard_normal(shape)
    return jax.device_put(y.astype(dtype))


def data(net: Any, seed: int, batch: int, dtype: Any = jnp.float64, spread: float = 1.5) -> tuple[Params, Array, Array]:
    """Random parameters, biases included (so that no s is exactly 0), inputs, targets. `spread` reaches the kinks.

    Drawn by NumPy, and put on the device as they are: JAX would compile a draw, and jnp.asarray, for each shape.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return jax.device_put(rng.standard_normal(shape).astype(dtype))

    def affine(inputs: int, outputs: int) -> Affine:
        w = rng.standard_normal((outputs, inputs)) * inputs**-0.5
        return Affine(jax.device_put(w.astype(dtype)), normal(outputs))

    params = tuple(affine(*widths) for widths in zip(net.sizes, net.sizes[1:], strict=False))
    x = jax.device_put((spread * rng.standard_normal((batch, net.sizes[0]))).astype(dtype))
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


# Curvature, dense and by autodiff -------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """Of every sample: gradient (N, P), Hessian (N, P, P), Jacobian (N, C, P) and H_ℓ (N, C, C), in the order of
    `ravel_pytree` of the parameters."""

    gradient: np.ndarray
    hessian: np.ndarray
    jacobian: np.ndarray
    output_hessian: np.ndarray

    @property
    def ggn(self) -> np.ndarray:
        return np.einsum("ncp,ncd,ndq->npq", self.jacobian, self.output_hessian, self.jacobian)


@functools.partial(jax.jit, static_argnums=0)
def _dense(net: Any, params: Params, x: Array, y: Array) -> Any:
    flat, unflatten = ravel_pytree(tuple(params))

    def sample(x: Array, y: Array) -> Any:
        def loss(flat: Array) -> Array:
            return sample_loss(net, unflatten(flat), x, y)

        def outputs(flat: Array) -> Array:
            return network(sigmas(net), unflatten(flat), x)

        output_hessian = jax.hessian(lambda out: LOSSES[net.loss](out, y))(outputs(flat))
        return jax.grad(loss)(flat), jax.hessian(loss)(flat), jax.jacrev(outputs)(flat), output_hessian

    return jax.vmap(sample)(x, y)


def dense(net: Any, params: Params, x: Array, y: Array) -> Dense:
    return Dense(*map(np.asarray, _dense(net, params, x, y)))


# Truth --------------------------------------------------------------------------------------------------------------

mpmath.mp.dps = 80  # elu′(−100) = e⁻¹⁰⁰ is a difference of numbers near −1: 44 digits go


def _logistic(s: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-s))


def _tanh_gelu_gate(s: mpf) -> mpf:
    """½(1 + tanh u) as σ(2u), which does not cancel."""
    return _logistic(2 * mpmath.sqrt(2 / mpmath.pi) * (s + mpf("0.044715") * s**3))


def _clip(s: mpf, low: int, high: int) -> mpf:
    return min(max(s, mpf(low)), mpf(high))


def _gelu_cdf(s: mpf) -> mpf:
    """Φ(s). mpmath's erfc takes no argument beyond the doubles; Φ(−10⁴) is 0 in all of them."""
    return mpmath.ncdf(_clip(s, -(10**4), 10**4))


SELU = mpf("1.0507009873554804934193349852946"), mpf("1.6732632423543772848170429916717")  # Klambauer et al. 2017, §2

SIGMA_TRUTH: dict[str, Callable[[mpf], mpf]] = {
    "identity": lambda s: s,
    "relu": lambda s: max(s, mpf(0)),
    "leaky_relu": lambda s: s if s > 0 else s / 100,
    "relu6": lambda s: _clip(s, 0, 6),
    "elu": lambda s: s if s > 0 else mpmath.expm1(s),
    "celu": lambda s: s if s > 0 else mpmath.expm1(s),
    "selu": lambda s: SELU[0] * (s if s > 0 else SELU[1] * mpmath.expm1(s)),
    "gelu": lambda s: s * _gelu_cdf(s),
    "gelu_tanh": lambda s: s * _tanh_gelu_gate(s),
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
    "squareplus": lambda s: (s + mpmath.sqrt(s**2 + 4)) / 2 if s > 0 else 2 / (mpmath.sqrt(s**2 + 4) - s),
}


def _between(s: mpf, low: float, high: float) -> mpf:
    """The slope of clip, the one on the left at a kink."""
    return mpf(low < s <= high)


def _tanh_gelu_slope(s: mpf) -> mpf:
    steep = 2 * mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * mpf("0.044715") * s**2)
    return _tanh_gelu_gate(s) * (1 + s * steep * _tanh_gelu_gate(-s))


def _mish_slope(s: mpf) -> mpf:
    softplus = mpmath.log1p(mpmath.exp(s))
    return mpmath.tanh(softplus) + s * _logistic(s) * mpmath.sech(softplus) ** 2


# Closed forms: a difference quotient has no digits left where σ′ is 1e-300, nor does it know a kink's left side.
DSIGMA_TRUTH: dict[str, Callable[[mpf], mpf]] = {
    "identity": lambda s: mpf(1),
    "relu": lambda s: mpf(s > 0),
    "leaky_relu": lambda s: mpf(1) if s > 0 else mpf(1) / 100,
    "relu6": lambda s: _between(s, 0, 6),
    "elu": lambda s: mpmath.exp(min(s, 0)),
    "celu": lambda s: mpmath.exp(min(s, 0)),
    "selu": lambda s: SELU[0] * (mpf(1) if s > 0 else SELU[1] * mpmath.exp(s)),
    "gelu": lambda s: _gelu_cdf(s) + s * mpmath.npdf(s),
    "gelu_tanh": _tanh_gelu_slope,
    "silu": lambda s: _logistic(s) * (1 + s * _logistic(-s)),
    "mish": _mish_slope,
    "sigmoid": lambda s: _logistic(s) * _logistic(-s),
    "log_sigmoid": lambda s: _logistic(-s),
    "tanh": lambda s: mpmath.sech(s) ** 2,
    "soft_sign": lambda s: 1 / (1 + abs(s)) ** 2,
    "softplus": _logistic,
    "hard_tanh": lambda s: _between(s, -1, 1),
    "hard_sigmoid": lambda s: _between(s, -3, 3) / 6,
    "hard_silu": lambda s: mpf(0) if s <= -3 else mpf(1) if s > 3 else (2 * s + 3) / 6,
    "squareplus": lambda s: SIGMA_TRUTH["squareplus"](s) / mpmath.sqrt(s**2 + 4),
}


def _gelu_tanh_second(s: mpf) -> mpf:
    p, q, c = _tanh_gelu_gate(s), _tanh_gelu_gate(-s), 2 * mpmath.sqrt(2 / mpmath.pi)
    steep = c * (1 + 3 * mpf("0.044715") * s**2)
    return p * q * (2 * steep + 6 * c * mpf("0.044715") * s**2 + s * steep**2 * (q - p))


def _mish_second(s: mpf) -> mpf:
    softplus, p = mpmath.log1p(mpmath.exp(s)), _logistic(s)
    return mpmath.sech(softplus) ** 2 * p * (2 + s * (_logistic(-s) - 2 * p * mpmath.tanh(softplus)))


# σ″, at a kink the limit from the left; 0 where none is given.
D2SIGMA_TRUTH: dict[str, Callable[[mpf], mpf]] = {
    **dict.fromkeys(SIGMA_TRUTH, lambda s: mpf(0)),
    "elu": lambda s: mpmath.exp(s) if s <= 0 else mpf(0),
    "celu": lambda s: mpmath.exp(s) if s <= 0 else mpf(0),
    "selu": lambda s: SELU[0] * SELU[1] * mpmath.exp(s) if s <= 0 else mpf(0),
    "gelu": lambda s: mpmath.npdf(s) * (2 - s**2),
    "gelu_tanh": _gelu_tanh_second,
    "silu": lambda s: _logistic(s) * _logistic(-s) * (2 + s * (_logistic(-s) - _logistic(s))),
    "mish": _mish_second,
    "sigmoid": lambda s: _logistic(s) * _logistic(-s) * (_logistic(-s) - _logistic(s)),
    "log_sigmoid": lambda s: -_logistic(s) * _logistic(-s),
    "tanh": lambda s: -2 * mpmath.tanh(s) * mpmath.sech(s) ** 2,
    "soft_sign": lambda s: (-2 if s > 0 else 2) / (1 + abs(s)) ** 3,
    "softplus": lambda s: _logistic(s) * _logistic(-s),
    "hard_silu": lambda s: _between(s, -3, 3) / 3,
    "squareplus": lambda s: 2 / mpmath.sqrt(s**2 + 4) ** 3,
}

Terms = list[mpf]
"""A truth as the terms whose sum it is: where they cancel, the largest says how many digits a rounded sum can have."""


def _elementwise(ell: Callable[[mpf, mpf], Terms], slope: Callable[[mpf, mpf], Terms]) -> Any:
    def terms(x: list[mpf], y: list[mpf]) -> tuple[Terms, list[Terms]]:
        pairs = list(zip(x, y, strict=True))
        return [term for pair in pairs for term in ell(*pair)], [slope(*pair) for pair in pairs]

    return terms


def _softmax_terms(x: list[mpf], p: list[mpf]) -> tuple[Terms, list[Terms]]:
    """Of Σ p (ln Σ exp(x − max) − (x − max)). Σ exp is at least 1 and rounded before its logarithm: 1 is a term."""
    total, largest = mpmath.fsum(p), max(x)
    exponentials = [mpmath.exp(a - largest) for a in x]
    norm = mpmath.fsum(exponentials)
    ell = [total, -total, total * mpmath.log(norm), *(-b * (a - largest) for a, b in zip(x, p, strict=True) if b)]
    return ell, [[total * e / norm, -b] for e, b in zip(exponentials, p, strict=True)]


def _softmax_cross_entropy_terms(x: list[mpf], y: Any) -> tuple[Terms, list[Terms]]:
    return _softmax_terms(x, y if isinstance(y, list) else [mpf(i == y) for i in range(len(x))])


def _kl_terms(x: list[mpf], y: list[mpf]) -> tuple[Terms, list[Terms]]:
    ell, slopes = _softmax_terms(x, y)
    return [*ell, *(b * mpmath.log(b) for b in y if b)], slopes


def _hinge_terms(x: list[mpf], y: int) -> tuple[Terms, list[Terms]]:
    """A margin is made of 1, xᵢ and x_y."""
    others = [i for i in range(len(x)) if i != y and 1 + x[i] - x[y] > 0]
    slopes = [[mpf(i in others)] for i in range(len(x))]
    slopes[y] = [-mpf(len(others))]
    return [term for i in others for term in (mpf(1), x[i], -x[y])], slopes


LOSS_TRUTH: dict[str, Callable[[list[mpf], Any], tuple[Terms, list[Terms]]]] = {
    "squared_error": _elementwise(lambda x, y: [(x - y) ** 2 / 2], lambda x, y: [x - y]),
    "absolute_error": _elementwise(lambda x, y: [abs(x - y)], lambda x, y: [mpf(1 if x > y else -1)]),
    "huber": _elementwise(
        lambda x, y: [(x - y) ** 2 / 2 if abs(x - y) <= 1 else abs(x - y) - mpf(1) / 2],
        lambda x, y: [_clip(x - y, -1, 1)],
    ),
    "log_cosh": _elementwise(  # e + ln(1 + e⁻²ᵉ) − ln 2, or, where the three cancel, from cosh e = 1 + 2 sinh²(e/2)
        lambda x, y: [
            mpmath.log1p(2 * mpmath.sinh((x - y) / 2) ** 2)
            if abs(x - y) < 1
            else abs(x - y) + mpmath.log1p(mpmath.exp(-2 * abs(x - y))) - mpmath.log(2)
        ],
        lambda x, y: [mpmath.tanh(x - y)],
    ),
    "softmax_cross_entropy": _softmax_cross_entropy_terms,
    "sigmoid_cross_entropy": _elementwise(  # as for x > 0: softplus(x) − x y = softplus(−x) + x (1 − y)
        lambda x, y: [mpmath.log1p(mpmath.exp(-abs(x))), x * (1 - y) if x > 0 else -x * y],
        lambda x, y: [1 - y, -_logistic(-x)] if x > 0 else [_logistic(x), -y],
    ),
    "hinge": _hinge_terms,
    "kl_divergence": _kl_terms,
    "poisson": _elementwise(lambda x, y: [mpmath.exp(x), -y * x], lambda x, y: [mpmath.exp(x), -y]),
}


def truth(f: Callable[[mpf], mpf], points: Any) -> list[mpf]:
    return [f(mpf(float(s))) for s in points]


def absolute_errors(got: Any, want: list[mpf]) -> np.ndarray:
    return np.array([float(abs(mpf(float(g)) - w)) for g, w in zip(got, want, strict=True)])


# Units in the last place --------------------------------------------------------------------------------------------


def exact(s: Any) -> mpf:
    """The number as mpmath holds it; ±∞ as ±10⁴⁰⁰, beyond every dtype, so that a formula gives the limit."""
    s = float(s)
    return mpmath.sign(s) * mpf(10) ** 400 if np.isinf(s) else mpf(s)


@functools.cache
def _limits(dtype: Any) -> tuple[mpf, mpf, int]:
    """From where on a number rounds to ∞, the smallest normal number, the bits of the fraction."""
    info = jnp.finfo(dtype)
    half_spacing = mpf(2) ** (int(info.maxexp) - int(info.nmant) - 2)
    return mpf(float(info.max)) + half_spacing, mpf(float(info.tiny)), int(info.nmant)


def ulps(got: Any, want: mpf | None, dtype: Any, size: mpf | int = 0) -> float:
    """|got − want| ÷ the spacing of the dtype at max(|want|, size); ∞ where got is NaN or ±∞ and want is not, or the
    other way round. `want` None is NaN.

    XLA on the CPU flushes subnormals, intermediate ones as well, to 0: the unit is never less than the smallest normal
    number, so that a result lost to flushing counts for less than 1 and a lost factor for what it was multiplied with.
    """
    got, (overflow, tiny, bits) = float(got), _limits(np.dtype(dtype))
    if want is None or np.isnan(got):
        return 0.0 if want is None and np.isnan(got) else np.inf
    overflows = abs(want) >= overflow
    if overflows or np.isinf(got):
        return 0.0 if overflows and np.isinf(got) and np.sign(got) == mpmath.sign(want) else np.inf
    unit = max(mpmath.ldexp(1, mpmath.mag(max(abs(want), abs(size), tiny)) - 1 - bits), tiny)
    return float(abs(mpf(got) - want) / unit)


def lattice(dtype: Any, size: int) -> np.ndarray:
    """±`size` numbers spaced by their logarithm over all of the dtype, `size` evenly in ±100, neighbourhoods of the
    kinks and zeros of the piecewise activations, subnormals, ±0, ±∞, NaN. Sorted, none twice, in the dtype."""
    info = jnp.finfo(dtype)
    powers = np.linspace(float(info.minexp), float(info.maxexp) - 1e-3, size)
    near = np.array([c + sign * 2.0**-k for c in (-3, -1.5, -1, 1, 3, 6) for sign in (-1, 1) for k in range(1, 60)])
    tiny = float(info.smallest_subnormal) * np.array([1, 3, 1 << (int(info.nmant) - 1)])
    root = 1.2 * 2.0 ** (int(info.maxexp) // 2)  # its square overflows, half its square does not
    ends = [0.0, 1.0, 1.5, 3.0, 6.0, 1e20, float(info.tiny), float(info.max), root, *tiny]
    points = [
        2.0**powers,
        -(2.0**powers),
        np.linspace(-100, 100, size),
        near,
        ends,
        np.negative(ends),
        [-np.inf, np.inf],
    ]
    with np.errstate(under="ignore"):
        rounded = np.concatenate(points).astype(dtype)
    return np.array([*(np.unique(rounded.astype(float)) + 0.0), -0.0, np.nan]).astype(dtype)


# Comparison ---------------------------------------------------------------------------------------------------------


def leaf_errors(got: Any, want: Any) -> list[float]:
    """max|a − b| / max|b| of every leaf, in f64; a NaN is an infinite error, a 0 wanted must be 0."""
    assert jax.tree.structure(jax.tree.leaves(got)) == jax.tree.structure(jax.tree.leaves(want))

    def error(a: Array, b: Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
        difference, size = np.max(np.abs(a - b), initial=0.0), np.max(np.abs(b), initial=0.0)
        return float(np.nan_to_num(difference / size if size else difference and np.inf, nan=np.inf))

    return [error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]


def assert_close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    """Every leaf within `tolerance`, relative to the leaf's largest element."""
    errors = leaf_errors(got, want)
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
