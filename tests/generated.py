"""Correct hand-written gradients by the thousand, generated from a seed: what a checker must be silent about.

`networks` are multi-layer perceptrons in every form a checker takes, `rules` are `jax.custom_vjp` functions. A subject
is the arguments of one call ``jaxbp.check(fun, args, **options)``. A reference here is written with jax.numpy formulas
alone, batch first; it calls nothing of jaxbp. Its branches are `jnp.where`, so that its own derivative at a kink is the
slope that the rule declares; its derivative neither cancels nor overflows in f64 at large inputs.

Few structures, many values: compiling is what costs, so the subjects of one structure share their functions (the very
objects) and their shapes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles

import jaxbp

Array = jax.Array
Options = dict[str, Any]


class Subject(NamedTuple):
    """One call of the checker. The name is family/…/dtype/number."""

    name: str
    fun: Any
    args: tuple[Any, ...]
    options: Options


DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f64": jnp.float64}


def normal(rng: np.random.Generator, dtype: Any, *shape: int, scale: float = 1.0) -> Array:
    return converted(scale * rng.standard_normal(shape), dtype)


def converted(a: Any, dtype: Any) -> Array:
    """By NumPy, and put on the device as it is: JAX would compile a conversion for each shape."""
    return jax.device_put(np.asarray(a).astype(dtype))


def wide_dtype(dtype: Any) -> Any:
    """f32 at least: a loss is not computed in bf16."""
    return jnp.float32 if dtype == jnp.bfloat16 else dtype


def wide(x: Array) -> Array:
    """x in f32 at least."""
    return x.astype(wide_dtype(x.dtype))


# Networks: plain references -----------------------------------------------------------------------------------------


def _where(condition: Array, yes: Any, no: Any) -> Array:
    return jnp.where(condition, yes, no)


def _elu(scale: float, alpha: float) -> Callable[[Array], Array]:
    return lambda s: scale * _where(s > 0, s, alpha * jnp.expm1(_where(s > 0, 0, s)))


def _soft_sign(s: Array) -> Array:
    """s / (1 + |s|) as ±(1 − e^(−log1p|s|)): the quotient's derivative is a difference that cancels for large |s|."""
    size = jnp.expm1(-jnp.log1p(_where(s > 0, s, -s)))
    return _where(s > 0, -size, size)


def _squareplus(s: Array) -> Array:
    root = jnp.sqrt(s * s + 4)
    return _where(s > 0, (s + root) / 2, 2 / (root - _where(s > 0, -s, s)))


SIGMAS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda s: s,
    "relu": lambda s: _where(s > 0, s, 0),
    "leaky_relu": lambda s: _where(s > 0, s, 0.01 * s),
    "relu6": lambda s: _where(s > 6, 6, _where(s > 0, s, 0)),
    "elu": _elu(1.0, 1.0),
    "celu": _elu(1.0, 1.0),
    "selu": _elu(1.0507009873554805, 1.6732632423543772),
    "gelu": lambda s: 0.5 * s * jax.scipy.special.erfc(-s * 0.7071067811865476),
    "gelu_tanh": lambda s: s / (1 + jnp.exp(-jnp.clip(1.5957691216057308 * (s + 0.044715 * s**3), -700, 700))),
    "silu": lambda s: s * 0.5 * (1 + jnp.tanh(s / 2)),
    "mish": lambda s: s * jnp.tanh(jnp.logaddexp(s, 0)),
    "sigmoid": lambda s: 0.5 * (1 + jnp.tanh(s / 2)),
    "log_sigmoid": lambda s: -jnp.logaddexp(-s, 0),
    "tanh": lambda s: jnp.tanh(s),
    "soft_sign": _soft_sign,
    "softplus": lambda s: jnp.logaddexp(s, 0),
    "hard_tanh": lambda s: _where(s > 1, 1, _where(s > -1, s, -1)),
    "hard_sigmoid": lambda s: _where(s > 3, 1, _where(s > -3, s / 6 + 0.5, 0)),
    "hard_silu": lambda s: _where(s > 3, s, _where(s > -3, s * (s / 6 + 0.5), 0)),
    "squareplus": _squareplus,
}
FLAT = ("relu", "relu6", "hard_tanh", "hard_sigmoid", "hard_silu")  # derivative 0 on a half-line: a unit can be dead


def _magnitude(e: Array) -> Array:
    return _where(e > 0, e, -e)


def _log_softmax(x: Array) -> Array:
    shifted = x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))


def _cross_entropy(x: Array, y: Array) -> Array:
    log_p = _log_softmax(x)
    return -jnp.take_along_axis(log_p, y[:, None], axis=1)[:, 0] if y.ndim == 1 else -jnp.sum(y * log_p, axis=1)


def _hinge(x: Array, y: Array) -> Array:
    margin = 1 + x - jnp.take_along_axis(x, y[:, None], axis=1)
    other = jnp.arange(x.shape[1], dtype=y.dtype)[None, :] != y[:, None]
    return jnp.sum(_where(other & (margin > 0), margin, 0), axis=1)


def _huber(x: Array, y: Array) -> Array:
    e = _magnitude(x - y)
    return jnp.sum(_where(e > 1, e - 0.5, 0.5 * e * e), axis=1)


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "squared_error": lambda x, y: 0.5 * jnp.einsum("nc,nc->n", x - y, x - y),
    "absolute_error": lambda x, y: jnp.sum(_magnitude(x - y), axis=1),
    "huber": _huber,
    "log_cosh": lambda x, y: jnp.sum(jnp.logaddexp(x - y, y - x) - 0.6931471805599453, axis=1),
    "softmax_cross_entropy": _cross_entropy,
    "sigmoid_cross_entropy": lambda x, y: jnp.sum(jnp.logaddexp(x, 0) - x * y, axis=1),
    "hinge": _hinge,
    "kl_divergence": lambda x, y: jnp.sum(y * jnp.log(y) - y * _log_softmax(x), axis=1),
    "poisson": lambda x, y: jnp.sum(jnp.exp(x) - y * x, axis=1),
}
BOUNDED = ("tanh", "soft_sign", "hard_tanh", "log_sigmoid")  # outputs whose exponential cannot overflow: for poisson


def plain_output(net: jaxbp.MLP, params: Any, x: Array) -> Array:
    """f(x) of a batch by einsum: n sample, i input, o output."""
    for sigma, layer in zip(net.activations, params, strict=True):
        x = SIGMAS[sigma.name](jnp.einsum("oi,ni->no", layer.w, x) + layer.b[None, :])
    return x


def plain_losses(net: jaxbp.MLP, params: Any, x: Array, y: Array) -> Array:
    output = wide(plain_output(net, params, x))
    return LOSSES[net.loss](output, y if y.ndim == 1 else y.astype(output.dtype))


# Networks: the forms a network is handed to the checker in ----------------------------------------------------------


class Structure(NamedTuple):
    """What the subjects of one structure share: everything but the values."""

    number: int
    style: str
    net: jaxbp.MLP
    dtype: str
    batch: int
    labels: bool


def _as_network(structure: Structure, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], Options]:
    return structure.net, (), {"dtypes": (DTYPES[structure.dtype],), "seed": int(rng.integers(2**31))}


def _data(structure: Structure, rng: np.random.Generator) -> tuple[Any, Array, Array]:
    net, dtype = structure.net, DTYPES[structure.dtype]
    params, x, _ = oracles.data(net, int(rng.integers(2**31)), structure.batch, jnp.float64)
    y = oracles.targets(net.loss, rng, (structure.batch, net.sizes[-1]), np.float64, structure.labels)
    y = converted(y, jnp.int32 if y.ndim == 1 else wide_dtype(dtype))
    return jax.tree.map(lambda a: converted(a, dtype), params), converted(x, dtype), y


@functools.cache
def _mean_loss(net: jaxbp.MLP) -> Callable[..., Array]:
    return lambda params, x, y: jnp.mean(plain_losses(net, params, x, y))


@functools.cache
def _library(net: jaxbp.MLP) -> Callable[..., Any]:
    return lambda params, x, y: jaxbp.value_and_grad(net, params, x, y)


@functools.cache
def _from_factors(net: jaxbp.MLP) -> Callable[..., Any]:
    return lambda params, x, y: jaxbp.gradient(jaxbp.factors(net, params, x, y)[1])


def _as_value_and_grad(structure: Structure, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], Options]:
    return _mean_loss(structure.net), _data(structure, rng), {"value_and_grad": _library(structure.net)}


def _as_gradient(structure: Structure, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], Options]:
    return _mean_loss(structure.net), _data(structure, rng), {"gradient": _from_factors(structure.net)}


@functools.cache
def _weighted(net: jaxbp.MLP) -> tuple[Callable[..., Array], Callable[..., Any]]:
    def loss(params: Any, x: Array, y: Array, weights: Array) -> Array:
        losses = plain_losses(net, params, x, y)
        return jnp.sum(_where(weights == 0, 0, weights.astype(losses.dtype) * losses)) / 3

    return loss, lambda params, x, y, weights: jaxbp.value_and_grad(net, params, x, y, weights, normalize_by=3)


def _as_weighted(structure: Structure, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], Options]:
    loss, by_hand = _weighted(structure.net)
    params, x, y = _data(structure, rng)
    weights = converted(rng.permutation([1.0, *rng.choice([0.0, 0.5, 1.0], structure.batch - 1)]), wide_dtype(x.dtype))
    return loss, (params, x, y, weights), {"value_and_grad": by_hand}


@functools.cache
def _output_function(net: jaxbp.MLP) -> Callable[..., Array]:
    return functools.partial(plain_output, net)


@functools.cache
def _pullback(net: jaxbp.MLP) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        tape = jax.vmap(lambda x: jaxbp.forward(net, params, x))(x)
        return tape.x[-1], (params, tape)

    def backward(residuals: Any, cotangent: Array) -> tuple[Any, Array]:
        params, tape = residuals
        deltas = jax.vmap(lambda tape, dl_dx: jaxbp.backward(net, params, tape, dl_dx))(tape, cotangent)
        grads = [
            jaxbp.Affine(jnp.einsum("no,ni->oi", d, x), jnp.sum(d, 0)) for d, x in zip(deltas, tape.x[:-1], strict=True)
        ]
        return tuple(grads), deltas[0] @ params[0].w

    return forward, backward


def _as_pullback(structure: Structure, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], Options]:
    params, x, _ = _data(structure, rng)
    return _output_function(structure.net), (params, x), {"vjp": _pullback(structure.net)}


@functools.cache
def _applied(net: jaxbp.MLP) -> Callable[..., Array]:
    return lambda params, x: jaxbp.apply(net, params, x)


def _as_custom_vjp(structure: Structure, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], Options]:
    params, x, _ = _data(structure, rng)
    options = {"reference": _output_function(structure.net), "wrt": (0, 1)}
    return _applied(structure.net), (params, x), options


# Networks written by hand, each differently from jaxbp: a loss and its gradient -------------------------------------


def column_major(p: Any, x: Array, y: Array) -> Array:
    """w is (in, out): x w, one hidden layer, the mean of ½‖·‖²."""
    e = wide(jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None]) - y
    return 0.5 * jnp.sum(e * e) / len(x)


def column_major_gradient(p: Any, x: Array, y: Array) -> Any:
    h = jnp.tanh(x @ p["w1"] + p["b1"][None])
    d2 = ((wide(h @ p["w2"] + p["b2"][None]) - y) / len(x)).astype(x.dtype)
    d1 = (d2 @ p["w2"].T) * (1 - h) * (1 + h)
    return {"w1": x.T @ d1, "b1": jnp.sum(d1, 0), "w2": h.T @ d2, "b2": jnp.sum(d2, 0)}


def no_bias(p: Any, x: Array, y: Array) -> Array:
    """Two weights in a list, ReLU, the sum over the batch."""
    e = wide(_where(x @ p[0].T > 0, x @ p[0].T, 0) @ p[1].T) - y
    return 0.5 * jnp.sum(e * e)


def no_bias_gradient(p: Any, x: Array, y: Array) -> Any:
    h = jnp.maximum(x @ p[0].T, 0)
    d2 = (wide(h @ p[1].T) - y).astype(x.dtype)
    d1 = _where(h > 0, d2 @ p[1], 0)
    return [d1.T @ x, d2.T @ h]


def decayed(p: Any, x: Array, y: Array) -> Array:
    """Softmax regression with ½λ‖w‖², biases left out; λ = 0.01."""
    penalty = 0.005 * jnp.sum(wide(p["w"]) ** 2)
    return -jnp.sum(y * _log_softmax(wide(x @ p["w"] + p["b"][None]))) / len(x) + penalty


def decayed_gradient(p: Any, x: Array, y: Array) -> Any:
    q = jnp.sum(y, 1, keepdims=True) * jax.nn.softmax(wide(x @ p["w"] + p["b"][None]))
    delta = ((q - y) / len(x)).astype(x.dtype)
    return {"w": x.T @ delta + 0.01 * p["w"], "b": jnp.sum(delta, 0)}


def masked(p: Any, x: Array, y: Array, mask: Array) -> Array:
    """The mean over the rows that count."""
    e = wide(jnp.tanh(x @ p["w1"]) @ p["w2"]) - y
    return 0.5 * jnp.sum(mask[:, None] * e * e) / jnp.sum(mask)


def masked_gradient(p: Any, x: Array, y: Array, mask: Array) -> Any:
    h = jnp.tanh(x @ p["w1"])
    d2 = (mask[:, None] / jnp.sum(mask) * (wide(h @ p["w2"]) - y)).astype(x.dtype)
    return {"w1": x.T @ ((d2 @ p["w2"].T) * (1 - h) * (1 + h)), "w2": h.T @ d2}


def dropped(p: Any, x: Array, y: Array, keep: Array) -> Array:
    """Inverted dropout whose mask is an argument; a unit is kept with probability 0.8."""
    e = wide((keep / 0.8 * jax.nn.softplus(x @ p["w1"])) @ p["w2"]) - y
    return 0.5 * jnp.sum(e * e) / len(x)


def dropped_gradient(p: Any, x: Array, y: Array, keep: Array) -> Any:
    s = x @ p["w1"]
    h = keep / 0.8 * jax.nn.softplus(s)
    d2 = ((wide(h @ p["w2"]) - y) / len(x)).astype(x.dtype)
    return {"w1": x.T @ (keep / 0.8 * jax.nn.sigmoid(s) * (d2 @ p["w2"].T)), "w2": h.T @ d2}


def tied(p: Any, x: Array) -> Array:
    """An autoencoder wᵀ tanh(w x + b) + c: w counts twice."""
    e = wide(jnp.tanh(x @ p["w"].T + p["b"][None]) @ p["w"] + p["c"][None]) - wide(x)
    return 0.5 * jnp.sum(e * e) / len(x)


def tied_gradient(p: Any, x: Array) -> Any:
    h = jnp.tanh(x @ p["w"].T + p["b"][None])
    d2 = ((wide(h @ p["w"] + p["c"][None]) - wide(x)) / len(x)).astype(x.dtype)
    d1 = (d2 @ p["w"].T) * (1 - h) * (1 + h)
    return {"w": d1.T @ x + h.T @ d2, "b": jnp.sum(d1, 0), "c": jnp.sum(d2, 0)}


def residual(p: Any, x: Array, y: Array) -> Array:
    """x + w₂ tanh(w₁ x), read out by v."""
    e = wide((x + jnp.tanh(x @ p["w1"].T) @ p["w2"].T) @ p["v"].T) - y
    return 0.5 * jnp.sum(e * e) / len(x)


def residual_gradient(p: Any, x: Array, y: Array) -> Any:
    h = jnp.tanh(x @ p["w1"].T)
    z = x + h @ p["w2"].T
    d3 = ((wide(z @ p["v"].T) - y) / len(x)).astype(x.dtype)
    d2 = d3 @ p["v"]
    d1 = (d2 @ p["w2"]) * (1 - h) * (1 + h)
    return {"w1": d1.T @ x, "w2": d2.T @ h, "v": d3.T @ z}


def gated(p: Any, x: Array, y: Array) -> Array:
    """A gated linear unit, (w₁ x) ⊙ σ(w₂ x), read out by v (Dauphin et al. 2017)."""
    e = wide(((x @ p["w1"].T) * jax.nn.sigmoid(x @ p["w2"].T)) @ p["v"].T) - y
    return 0.5 * jnp.sum(e * e) / len(x)


def gated_gradient(p: Any, x: Array, y: Array) -> Any:
    s1, s2 = x @ p["w1"].T, x @ p["w2"].T
    gate = jax.nn.sigmoid(s2)
    d = ((wide((s1 * gate) @ p["v"].T) - y) / len(x)).astype(x.dtype)
    dh = d @ p["v"]
    return {"w1": (dh * gate).T @ x, "w2": (dh * s1 * gate * jax.nn.sigmoid(-s2)).T @ x, "v": d.T @ (s1 * gate)}


def flat(theta: Array, x: Array, y: Array) -> Array:
    """Logistic regression whose parameters are one vector (w, b); y in {0, 1}."""
    s = wide(x @ theta[:-1] + theta[-1])
    return jnp.sum(jnp.logaddexp(s, 0) - y * s) / len(x)


def flat_gradient(theta: Array, x: Array, y: Array) -> Array:
    delta = ((jax.nn.sigmoid(wide(x @ theta[:-1] + theta[-1])) - y) / len(x)).astype(x.dtype)
    return jnp.concatenate([x.T @ delta, jnp.sum(delta)[None]])


VARIANTS: dict[str, tuple[Callable[..., Array], Callable[..., Any]]] = {
    "column-major": (column_major, column_major_gradient),
    "no-bias": (no_bias, no_bias_gradient),
    "decayed": (decayed, decayed_gradient),
    "masked": (masked, masked_gradient),
    "dropped": (dropped, dropped_gradient),
    "tied": (tied, tied_gradient),
    "residual": (residual, residual_gradient),
    "gated": (gated, gated_gradient),
    "flat": (flat, flat_gradient),
}


def _variant_params(name: str, i: int, h: int, o: int, draw: Callable[..., Array]) -> Any:
    """Parameters of a variant with i inputs, h hidden units, o outputs."""
    if name == "flat":
        return draw(i + 1)
    if name == "no-bias":
        return [draw(h, i), draw(o, h)]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "column-major": {"w1": (i, h), "b1": (h,), "w2": (h, o), "b2": (o,)},
        "decayed": {"w": (i, o), "b": (o,)},
        "tied": {"w": (h, i), "b": (h,), "c": (i,)},
        "residual": {"w1": (h, i), "w2": (i, h), "v": (o, i)},
        "gated": {"w1": (h, i), "w2": (h, i), "v": (o, h)},
    }
    return {leaf: draw(*shape) for leaf, shape in shapes.get(name, {"w1": (i, h), "w2": (h, o)}).items()}


@functools.cache
def _valued(loss: Callable[..., Array], gradient: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (loss(*args), gradient(*args))


def _as_variant(structure: Structure, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], Options]:
    name, (i, h, o), dtype, batch = structure.style, structure.net.sizes, DTYPES[structure.dtype], structure.batch
    loss, by_hand = VARIANTS[name]
    params = _variant_params(name, i, h, o, functools.partial(normal, rng, dtype, scale=0.7))
    x, y = normal(rng, dtype, batch, i), normal(rng, wide_dtype(dtype), batch, o)
    mask = rng.permutation([1.0, *rng.integers(2, size=batch - 1)])
    dirichlet, keep = rng.dirichlet(np.ones(o), batch), rng.random((batch, h)) < 0.8
    keep[0] = True
    data = {
        "decayed": (x, converted(dirichlet, y.dtype)),
        "masked": (x, y, converted(mask, y.dtype)),
        "dropped": (x, y, converted(keep, dtype)),
        "tied": (x,),
        "flat": (x, converted(rng.integers(2, size=batch), y.dtype)),
    }
    options = {"gradient": by_hand} if structure.number % 2 else {"value_and_grad": _valued(loss, by_hand)}
    return loss, (params, *data.get(name, (x, y))), options


STYLES: dict[str, Callable[[Structure, np.random.Generator], tuple[Any, tuple[Any, ...], Options]]] = {
    "network": _as_network,
    "value_and_grad": _as_value_and_grad,
    "pullback": _as_pullback,
    "custom_vjp": _as_custom_vjp,
    "gradient": _as_gradient,
    "weighted": _as_weighted,
    **dict.fromkeys(VARIANTS, _as_variant),
}
_ORDER = ("network", "value_and_grad", "pullback", "", "value_and_grad", "network", "pullback", "", "custom_vjp", "")
_ORDER += ("network", "value_and_grad", "pullback", "", "gradient", "weighted", "network", "", "value_and_grad", "")


def _net(rng: np.random.Generator) -> jaxbp.MLP:
    """A network that is unlikely to be dead: narrow layers are smooth, at most one layer is flat on a side."""
    depth, loss = int(rng.integers(1, 5)), str(rng.choice(list(LOSSES)))
    widths = [int(rng.integers(1, 17)) for _ in range(depth + 1)]
    smooth = [name for name in SIGMAS if name not in FLAT]
    hidden = [str(rng.choice(smooth)) for _ in range(depth - 1)]
    if hidden:
        flat = int(rng.integers(len(hidden)))
        hidden[flat], widths[flat + 1] = str(rng.choice(list(SIGMAS))), max(widths[flat + 1], 6)
    outputs = BOUNDED if loss == "poisson" else ("identity", "identity", "tanh", "sigmoid", "softplus", "leaky_relu")
    widths[-1] = max(widths[-1], 2)  # softmax of one class is constant
    return jaxbp.MLP(tuple(widths), hidden, str(rng.choice(outputs)), loss)


@functools.cache
def _structure(number: int, seed: int) -> Structure:
    rng = np.random.default_rng((seed, number))
    style = (
        _ORDER[number % len(_ORDER)]
        or list(VARIANTS)[
            (_ORDER[: number % len(_ORDER)].count("") + number // len(_ORDER) * _ORDER.count("")) % len(VARIANTS)
        ]
    )
    dtype = str(rng.choice(list(DTYPES), p=[0.5, 0.25, 0.25]))
    net = jaxbp.MLP(tuple(int(n) for n in rng.integers((2, 4, 2), (9, 13, 6))), "tanh", loss="squared_error")
    net = net if style in VARIANTS else _net(rng)
    return Structure(number, style, net, dtype, int(rng.integers(1, 7)), bool(rng.integers(2)))


def _network_name(structure: Structure, number: int) -> str:
    net = structure.net
    sigmas = "-".join(sigma.name for sigma in net.activations)
    form = "" if structure.style in VARIANTS else f"{sigmas}/{net.loss}/"
    return f"{structure.style}/{form}{'x'.join(map(str, net.sizes))}/N{structure.batch}/{structure.dtype}/{number}"


STRUCTURES = 100


def network(number: int, seed: int) -> Subject:
    """The correct network of this number; the 100 structures take turns."""
    structure = _structure(number % STRUCTURES, seed)
    fun, args, options = STYLES[structure.style](structure, np.random.default_rng((seed, number, 1)))
    return Subject(_network_name(structure, number), fun, args, options)


def networks(count: int, seed: int) -> Iterator[Subject]:
    """The first `count` networks."""
    return (network(number, seed) for number in range(count))


# Rules: jax.custom_vjp functions -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two leaves of one argument."""

    left: Array
    right: Array


Draw = Callable[..., Array]
Built = tuple[Any, tuple[Any, ...], Options]


def rule(primal: Any, backward: Any, nondiff: tuple[int, ...] = ()) -> Any:
    """A custom_vjp function that keeps its differentiable arguments: backward(*nondiff, arguments, cotangent)."""
    fun = jax.custom_vjp(primal, nondiff_argnums=nondiff)
    kept = lambda args: tuple(a for i, a in enumerate(args) if i not in nondiff)  # noqa: E731
    fun.defvjp(lambda *args: (primal(*args), kept(args)), backward)
    return fun


def _unary(primal: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Any:
    return rule(primal, lambda args, g: (g * derivative(args[0]),))


def _sech2(x: Array) -> Array:
    e = jnp.exp(-2 * jnp.abs(x))
    return 4 * e / ((1 + e) * (1 + e))


# A domain is where the primal's own derivative neither overflows nor cancels: 1 − tanh² does, sech² does not.
ELEMENTWISE: dict[str, tuple[Any, tuple[float, float] | None]] = {
    "tanh": (_unary(jnp.tanh, _sech2), (-4.0, 4.0)),
    "sigmoid": (_unary(jax.nn.sigmoid, lambda x: jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)), (-800.0, 4.0)),
    "softplus": (_unary(lambda x: jnp.logaddexp(x, 0), jax.nn.sigmoid), None),
    "square": (_unary(lambda x: x * x, lambda x: 2 * x), None),
    "cube": (_unary(lambda x: x * x * x, lambda x: 3 * x * x), None),
    "arctan": (_unary(jnp.arctan, lambda x: 1 / (1 + x * x)), None),
    "log_cosh": (_unary(lambda x: jnp.logaddexp(x, -x), jnp.tanh), (0.1, 1e3)),
    "sin": (_unary(jnp.sin, jnp.cos), (-1.0, 1.0)),
    "exp": (_unary(jnp.exp, jnp.exp), (-20.0, 20.0)),
    "log": (_unary(jnp.log, lambda x: 1 / x), (1e-3, 1e3)),
    "sqrt": (_unary(jnp.sqrt, lambda x: 0.5 / jnp.sqrt(x)), (1e-3, 1e3)),
    "log1p": (_unary(jnp.log1p, lambda x: 1 / (1 + x)), (0.0, 1e3)),
    "reciprocal": (_unary(lambda x: 1 / x, lambda x: -1 / (x * x)), (0.1, 10.0)),
    "gauss": (_unary(lambda x: jnp.exp(-x * x), lambda x: -2 * x * jnp.exp(-x * x)), (-1.0, 1.0)),
}
KINKS: dict[str, tuple[Any, str]] = {
    "relu": (_unary(lambda x: jnp.where(x > 0, x, 0), lambda x: (x > 0).astype(x.dtype)), "reference"),
    "abs": (_unary(jnp.abs, jnp.sign), "reference"),
    "clip": (_unary(lambda x: jnp.clip(x, -0.7, 0.9), lambda x: ((x > -0.7) & (x < 0.9)).astype(x.dtype)), "reference"),
    "hinge": (_unary(lambda x: jnp.maximum(1 - x, 0), lambda x: -(x < 1).astype(x.dtype)), "reference"),
    "maximum-0": (_unary(lambda x: jnp.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)), "reference"),
    "maximum-1": (_unary(lambda x: jnp.maximum(x, 0), lambda x: (x >= 0).astype(x.dtype)), "reference"),
    "shrink": (
        _unary(
            lambda x: jnp.where(jnp.abs(x) > 0.5, x - 0.5 * jnp.sign(x), 0), lambda x: _indicator(jnp.abs(x) > 0.5, x)
        ),
        "reference",
    ),
    "left": (_unary(lambda x: jnp.where(x >= 0, x, 0), lambda x: _indicator(x > 0, x)), "left"),
    "right": (_unary(lambda x: jnp.where(x > 0, x, 0), lambda x: _indicator(x >= 0, x)), "right"),
    "subgradient": (
        _unary(jnp.abs, lambda x: jnp.where(x == 0, jnp.asarray(0.25, x.dtype), jnp.sign(x))),
        "subgradient",
    ),
}


def _indicator(condition: Array, x: Array) -> Array:
    return condition.astype(x.dtype)


def elementwise(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    fun, domain = list(ELEMENTWISE.values())[number % len(ELEMENTWISE)]
    x = draw(3, 5)
    return fun, (x if domain is None else jnp.clip(x if domain[0] < 0 else jnp.abs(x), *domain),), {"domain": domain}


def kinks(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    fun, convention = list(KINKS.values())[number % len(KINKS)]
    return fun, (draw(4, 4).at[0, 0].set(0),), {"kinks": convention}


Axes = tuple[int, ...]


def _ties(x: Array, top: Array, axes: Axes) -> Array:
    """1/ties at each of the largest elements, as autodiff of jnp.max shares the cotangent."""
    tied = (x == top).astype(x.dtype)
    return tied / jnp.sum(tied, axes, keepdims=True)


def _scaled_norm(x: Array, axes: Axes) -> Array:
    """√Σx² whose squares neither overflow nor underflow; 0, and slope 0, where x is 0."""
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True))
    top = jnp.where(top == 0, 1, top)
    squares = jnp.sum((x / top) ** 2, axes, keepdims=True)
    return top * jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _norm_gradient(x: Array, n: Array, axes: Axes) -> Array:
    return jnp.where(n > 0, x / jnp.where(n > 0, n, 1), 0)


REDUCTIONS: dict[str, tuple[Callable[[Array, Axes], Array], Callable[[Array, Array, Axes], Array]]] = {
    "sum": (lambda x, axes: jnp.sum(x, axes, keepdims=True), lambda x, out, axes: jnp.ones_like(x)),
    "mean": (
        lambda x, axes: jnp.mean(x, axes, keepdims=True),
        lambda x, out, axes: jnp.full_like(x, out.size / x.size),
    ),
    "max": (lambda x, axes: jnp.max(x, axes, keepdims=True), _ties),
    "min": (lambda x, axes: jnp.min(x, axes, keepdims=True), _ties),
    "logsumexp": (
        lambda x, axes: jax.nn.logsumexp(x, axes, keepdims=True),
        lambda x, out, axes: jax.nn.softmax(x, axes),
    ),
    "norm": (_scaled_norm, _norm_gradient),
}


@functools.cache
def _reduction(name: str, axes: Axes, keepdims: bool) -> Any:
    reduce, slope = REDUCTIONS[name]

    def primal(x: Array) -> Array:
        out = reduce(x, axes)
        return out if keepdims else jnp.squeeze(out, axes)

    def backward(args: Any, g: Array) -> Any:
        (x,) = args
        return ((g if keepdims else jnp.expand_dims(g, axes)) * slope(x, reduce(x, axes), axes),)

    return rule(primal, backward)


def reductions(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    axes = ((0,), (1,), (2,), (0, 2), (0, 1, 2))[int(rng.integers(5))]
    return _reduction(list(REDUCTIONS)[number % len(REDUCTIONS)], axes, bool(rng.integers(2))), (draw(3, 4, 2),), {}


def _prod_gradient(x: Array) -> Array:
    """∏ of the other columns, without a division: an element may be 0."""
    columns = [jnp.prod(jnp.delete(x, i, axis=1), axis=1) for i in range(x.shape[1])]
    return jnp.stack(columns, axis=1)


_PROD = rule(lambda x: jnp.prod(x, axis=1), lambda args, g: (g[:, None] * _prod_gradient(args[0]),))


def product(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    return _PROD, (draw(3, 3),), {}


def _unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    axes = tuple(i for i, (a, b) in enumerate(zip(g.shape, shape, strict=True)) if a != b)
    return jnp.sum(g, axes, keepdims=True)


BROADCASTS: dict[str, Any] = {
    "add": rule(lambda x, b: x + b, lambda args, g: (g, _unbroadcast(g, args[1].shape))),
    "multiply": rule(lambda x, b: x * b, lambda args, g: (g * args[1], _unbroadcast(g * args[0], args[1].shape))),
    "divide": rule(
        lambda x, b: x / b,
        lambda args, g: (g / args[1], _unbroadcast(-g * args[0] / (args[1] * args[1]), args[1].shape)),
    ),
    "scalar": rule(lambda x, b: x * jnp.ravel(b)[0], lambda args, g: _first_only(*args, g)),
}


def _first_only(x: Array, b: Array, g: Array) -> tuple[Array, Array]:
    return g * jnp.ravel(b)[0], jnp.zeros(b.size, b.dtype).at[0].set(jnp.sum(g * x)).reshape(b.shape)


def broadcasting(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    name = list(BROADCASTS)[number % len(BROADCASTS)]
    shape = ((1, 4, 1), (3, 1, 1), (1, 1, 2), (3, 1, 2), (1, 4, 2), (1, 1, 1))[int(rng.integers(6))]
    b = jnp.abs(draw(*shape)) + 1 if name == "divide" else draw(*shape)
    return BROADCASTS[name], (draw(3, 4, 2), b), {"domain": {1: (0.5, 8.0)}} if name == "divide" else {}


_GATHER = rule(
    lambda table, i: table[i],
    lambda args, g: (jnp.zeros_like(args[0]).at[args[1]].add(g), None),
)
_GATHER_FLOAT0 = rule(
    lambda table, i: table[i],
    lambda args, g: (jnp.zeros_like(args[0]).at[args[1]].add(g), np.zeros(args[1].shape, jax.dtypes.float0)),
)
_ALONG = rule(
    lambda x, i: jnp.take_along_axis(x, i[:, None], axis=1)[:, 0],
    lambda args, g: (jnp.zeros_like(args[0]).at[jnp.arange(len(args[1])), args[1]].set(g), None),
)
_LABELS = rule(
    lambda x, i: _cross_entropy(x, i),
    lambda args, g: (g[:, None] * (jax.nn.softmax(args[0]) - jax.nn.one_hot(args[1], 5, dtype=args[0].dtype)), None),
)
_SEGMENTS = rule(
    lambda x, i: jax.ops.segment_sum(x, i, num_segments=7),
    lambda args, g: (g[args[1]], None),
)
_CHOOSE = rule(
    lambda x, i: jnp.where((i % 2 == 0)[:, None], x, -x),
    lambda args, g: (jnp.where((args[1] % 2 == 0)[:, None], g, -g), None),
)
INTEGERS = {"gather": _GATHER, "float0": _GATHER_FLOAT0, "along": _ALONG, "labels": _LABELS}
INTEGERS |= {"segments": _SEGMENTS, "choose": _CHOOSE}


def integers(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    name = list(INTEGERS)[number % len(INTEGERS)]
    return INTEGERS[name], (draw(4, 5), converted(rng.integers(4, size=4), jnp.int32)), {}


_DICT = rule(
    lambda p: {"product": p["a"] * p["b"], "total": jnp.sum(p["a"])},
    lambda args, g: ({"a": g["product"] * args[0]["b"] + g["total"], "b": g["product"] * args[0]["a"]},),
)
_TUPLE = rule(
    lambda p: (p[0] + p[1][0], p[1][0] * p[1][0]),
    lambda args, g: ((g[0], (g[0] + 2 * args[0][1][0] * g[1],)),),
)
_PAIR = rule(
    lambda p, c: Pair(p.left * c, p.right - p.left),
    lambda args, g: (Pair(g.left * args[1] - g.right, g.right), jnp.sum(g.left * args[0].left)),
)
_EMPTY = rule(
    lambda p: p["a"] * p["a"] + jnp.sum(p["empty"]),
    lambda args, g: ({"a": 2 * args[0]["a"] * g, "empty": jnp.zeros_like(args[0]["empty"])},),
)


def pytrees(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    a, b = draw(3, 2), draw(3, 2)
    calls: list[Built] = [
        (_DICT, ({"a": a, "b": b},), {}),
        (_TUPLE, ((a, (b,)),), {}),
        (_PAIR, (Pair(a, b), draw()), {}),
        (_EMPTY, ({"a": a, "empty": draw(0, 2)},), {}),
    ]
    return calls[number % len(calls)]


NOOPS = {
    "identity": rule(lambda x: x, lambda args, g: (g,)),
    "reshape": rule(lambda x: x.reshape(-1), lambda args, g: (g.reshape(args[0].shape),)),
    "transpose": rule(lambda x: x.T, lambda args, g: (g.T,)),
    "flip": rule(lambda x: x[::-1], lambda args, g: (g[::-1],)),
    "pad": rule(lambda x: jnp.pad(x, 1), lambda args, g: (g[1:-1, 1:-1],)),
    "negate": rule(lambda x: -x, lambda args, g: (-g,)),
}


def noops(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    return list(NOOPS.values())[number % len(NOOPS)], (draw(3, 4),), {}


PRODUCTS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "matmul": (rule(lambda a, b: a @ b, lambda args, g: (g @ args[1].T, args[0].T @ g)), ((3, 4), (4, 2))),
    "batched": (
        rule(
            lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
            lambda args, g: (jnp.einsum("bik,bjk->bij", g, args[1]), jnp.einsum("bij,bik->bjk", args[0], g)),
        ),
        ((2, 3, 4), (2, 4, 2)),
    ),
    "bilinear": (
        rule(
            lambda x, a, y: x @ (a @ y),
            lambda args, g: (
                g * (args[1] @ args[2]),
                g * jnp.einsum("i,j->ij", args[0], args[2]),
                g * (args[1].T @ args[0]),
            ),
        ),
        ((3,), (3, 4), (4,)),
    ),
    "quadratic": (
        rule(
            lambda x, a: x @ (a @ x),
            lambda args, g: (
                g * (args[1] @ args[0] + args[1].T @ args[0]),
                g * jnp.einsum("i,j->ij", args[0], args[0]),
            ),
        ),
        ((4,), (4, 4)),
    ),
    "outer": (
        rule(lambda x, y: jnp.einsum("i,j->ij", x, y), lambda args, g: (g @ args[1], g.T @ args[0])),
        ((3,), (4,)),
    ),
    "trace": (
        rule(lambda a, b: jnp.einsum("ij,ji->", a, b), lambda args, g: (g * args[1].T, g * args[0].T)),
        ((3, 4), (4, 3)),
    ),
}


def products(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    fun, shapes = list(PRODUCTS.values())[number % len(PRODUCTS)]
    return fun, tuple(draw(*shape) for shape in shapes), {}


_POWER = rule(lambda n, x: x**n, lambda n, args, g: (g * n * args[0] ** (n - 1),), nondiff=(0,))
_LEAKY = rule(
    lambda x, slope: jnp.where(x > 0, x, slope * x),
    lambda slope, args, g: (jnp.where(args[0] > 0, g, slope * g),),
    (1,),
)
_AXIS = rule(
    lambda x, axis: jnp.cumsum(x, axis),
    lambda axis, args, g: (jnp.flip(jnp.cumsum(jnp.flip(g, axis), axis), axis),),
    (1,),
)


def nondiff(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    x = draw(3, 4)
    calls: list[Built] = [
        (_POWER, (int(rng.integers(2, 4)), x), {"wrt": 1}),
        (_LEAKY, (x, 0.1), {"wrt": 0}),
        (_AXIS, (x, int(rng.integers(2))), {"wrt": 0}),
    ]
    return calls[number % len(calls)]


_SINCOS = rule(lambda x: (jnp.sin(x), jnp.cos(x)), lambda args, g: (g[0] * jnp.cos(args[0]) - g[1] * jnp.sin(args[0]),))
_SUM_AND_SQUARES = rule(
    lambda x: (jnp.sum(x), x * x), lambda args, g: (jnp.full_like(args[0], 1) * g[0] + 2 * args[0] * g[1],)
)
_WITH_INDEX = rule(
    lambda x: (jnp.sum(x, 1), jnp.argmax(x, 1)), lambda args, g: (jnp.broadcast_to(g[0][:, None], args[0].shape),)
)


def outputs(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    fun = (_SINCOS, _SUM_AND_SQUARES, _WITH_INDEX)[number % 3]
    return fun, (draw(3, 4),), {"domain": (-1.0, 1.0)} if fun is _SINCOS else {}


_UNUSED = rule(lambda x, y: x * x, lambda args, g: (2 * args[0] * g, jnp.zeros_like(args[1])))
_SCALAR = rule(lambda x, c: c * x, lambda args, g: (args[1] * g, args[0] * g))


def unused(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    return _UNUSED, (draw(3), draw(2, 2)), {"allow_zero": (1,)}


def scalars(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    return _SCALAR, (draw(), draw()), {}


def _pool(x: Array) -> Array:
    return jnp.max(x.reshape(2, 2, 3, 2), axis=(1, 3), keepdims=True)


def _pool_backward(args: Any, g: Array) -> Any:
    windows = args[0].reshape(2, 2, 3, 2)
    return ((g[:, None, :, None] * _ties(windows, _pool(args[0]), (1, 3))).reshape(4, 6),)


_MAX_POOL = rule(lambda x: _pool(x)[:, 0, :, 0], _pool_backward)
_SORT = rule(
    lambda x: jnp.sort(x),
    lambda args, g: (jnp.zeros_like(g).at[jnp.argsort(args[0])].set(g),),
)


def _standardized(x: Array) -> tuple[Array, Array]:
    centred = x - jnp.mean(x, 1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, 1, keepdims=True) + 1e-3)
    return centred * inverse, inverse


def _standardize_backward(args: Any, g: Array) -> Any:
    x, inverse = _standardized(args[0])
    return (inverse * (g - jnp.mean(g, 1, keepdims=True) - x * jnp.mean(g * x, 1, keepdims=True)),)


_STANDARDIZE = rule(lambda x: _standardized(x)[0], _standardize_backward)


def _softmax_backward(args: Any, g: Array) -> Any:
    p = jax.nn.softmax(args[0])
    return (p * (g - jnp.sum(p * g, -1, keepdims=True)),)


_SOFTMAX = rule(lambda x: jax.nn.softmax(x), _softmax_backward)


def windows(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    return (_MAX_POOL, (draw(4, 6),), {}) if number % 2 else (_SORT, (draw(6),), {})


def cancelling(number: int, draw: Draw, rng: np.random.Generator) -> Built:
    """Right, but terms of opposite sign are summed: an element may be far smaller than what it is rounded from."""
    return (_STANDARDIZE, _SOFTMAX)[number % 2], (draw(3, 5),), {"domain": (-8.0, 8.0)}


FAMILIES: dict[str, Callable[[int, Draw, np.random.Generator], Built]] = {
    family.__name__: family
    for family in (
        *(elementwise, broadcasting, reductions, integers, pytrees, kinks, products, noops, nondiff, outputs),
        *(unused, scalars, windows, cancelling, product),
    )
}
_WEIGHTS = (4, 3, 4, 3, 2, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1)  # how often a family comes in a round of 32
_ROUND = [family for family, weight in zip(FAMILIES, _WEIGHTS, strict=True) for _ in range(weight)]


def custom_vjp(number: int, seed: int) -> Subject:
    """The correct custom_vjp function of this number; the families take turns."""
    rng = np.random.default_rng((seed, number, 2))
    families = [_ROUND[n * 13 % len(_ROUND)] for n in range(number + 1)]  # 13 is prime to 32: every family early
    family, seen = families[-1], families[:-1].count(families[-1])
    dtype = str(rng.choice(list(DTYPES), p=[0.5, 0.25, 0.25]))
    fun, args, options = FAMILIES[family](seen, functools.partial(normal, rng, DTYPES[dtype]), rng)
    return Subject(f"{family}/{dtype}/{number}", fun, args, options)


def rules(count: int, seed: int) -> Iterator[Subject]:
    """The first `count` custom_vjp functions."""
    return (custom_vjp(number, seed) for number in range(count))
