"""The planted bugs: wrong backward passes, each a small change to the right one, that a gradient checker must catch.

A `Bug` builds its subject for a seed and a shape, wrong and right on the same data, and the data carry what the bug
needs in order to show: exact zeros, soft labels that do not sum to 1, masked rows, as many samples as units.

The bugs of a network are one `Rule` each: a multi-layer perceptron with dropout, masked rows and an L2 term, whose
backward pass is a sequence of named steps; a bug replaces one of them. The bugs of a single function are a (forward,
backward) pair beside the right pair.

Nothing here uses jaxbp. Right rules are accurate element by element, also in float32 (sech² rather than 1 − tanh²), so
that a checker which looks at single elements may be strict. Code is strict about dtype and rank promotion.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
SEEDS, SHAPES = range(4), range(3)
RUNS = tuple((seed, shape) for shape in SHAPES for seed in SEEDS)


class Subject(NamedTuple):
    """What a checker is called with: ``check(fun, args, **options)``.

    fun is a `jax.custom_vjp` function and options is empty, or fun is plain and options holds ``value_and_grad``,
    ``gradient`` (both for argument 0) or ``vjp``, a pair (forward, backward).
    """

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A wrong rule and the right one.

    Args:
      number: in the list of numbered bugs, None for the others; 20 and some of the others come in several variants.
      name, description: a short name, unique; what is wrong.
      build, right: (seed, shape) ↦ the subject with the wrong and with the right rule, on the same data.
      leaf: the paths (`jax.tree_util.keystr` in the tuple of arguments) where the error enters: a report names one of
        these first. Other leaves may be wrong as its consequence. Empty where no argument is to blame.
      diagnosis: a regular expression that a report's diagnosis should match, None where none is to be expected.
    """

    number: int | None
    name: str
    description: str
    build: Callable[[int, int], Subject]
    right: Callable[[int, int], Subject]
    leaf: tuple[str, ...]
    diagnosis: str | None = None

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.number} {self.name}"


def cast(args: Any, dtype: Any) -> Any:
    """The float leaves in `dtype`, the others as they are."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, args)


def reference(subject: Subject) -> Callable[..., Any]:
    """The function that autodiff differentiates: without its custom rule."""
    return subject.fun.fun if isinstance(subject.fun, jax.custom_vjp) else subject.fun


def wrt(subject: Subject) -> tuple[int, ...]:
    """The arguments that the rule has a gradient for."""
    only_first = {"value_and_grad", "gradient"} & set(subject.options)
    return (0,) if only_first else tuple(range(len(subject.args)))


def as_custom_vjp(subject: Subject) -> Callable[..., Any]:
    """The subject as a `jax.custom_vjp` function of all its arguments; those not in `wrt` get zero cotangents."""
    if not subject.options:
        return subject.fun
    if "vjp" in subject.options:
        return with_rule(subject.fun, *subject.options["vjp"])
    fun, rule = subject.fun, subject.options.get("value_and_grad")
    rule = rule or (lambda *args: (fun(*args), subject.options["gradient"](*args)))

    def backward(grads: Any, cotangent: Array) -> tuple[Any, ...]:
        scaled = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), grads)
        return scaled, *[None] * (len(subject.args) - 1)

    return with_rule(fun, rule, backward)


def differentiable(subject: Subject) -> tuple[Callable[..., Any], list[Array]]:
    """The subject as a custom_vjp function of flat float arrays, and these: for checkers that take nothing else."""
    fun = as_custom_vjp(subject)
    leaves, structure = jax.tree.flatten(subject.args)
    counts = [len(jax.tree.leaves(arg)) for arg in subject.args]
    owner = np.repeat(np.arange(len(counts)), counts)
    chosen = [k for k, a in enumerate(leaves) if owner[k] in wrt(subject) and jnp.issubdtype(a.dtype, jnp.floating)]

    def flat(*arrays: Array) -> Any:
        given = dict(zip(chosen, arrays, strict=True))
        return fun(*jax.tree.unflatten(structure, [given.get(k, a) for k, a in enumerate(leaves)]))

    return flat, [leaves[k] for k in chosen]


def with_rule(fun: Callable[..., Any], forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """fun as a new custom_vjp function with this rule."""
    ruled = jax.custom_vjp(lambda *args: fun(*args))
    ruled.defvjp(forward, backward)
    return ruled


# The network: forward, loss, and the backward pass as steps ----------------------------------------------------------


class Layer(NamedTuple):
    """w (out, in) and b (out,)."""

    w: Array
    b: Array


class Batch(NamedTuple):
    """x (N, n₀), y (N, C); keep: what dropout keeps of each hidden layer, (N, width); rows: the rows that count."""

    x: Array
    y: Array
    keep: tuple[Array, ...]
    rows: Array


class Trace(NamedTuple):
    """Of the forward pass: layer l, from 0 on, computes s[l] from x[l]; its output after dropout is x[l + 1]."""

    params: tuple[Layer, ...]
    batch: Batch
    x: tuple[Array, ...]
    s: tuple[Array, ...]


class Sigma(NamedTuple):
    """σ and σ′, both functions of s."""

    f: Callable[[Array], Array]
    df: Callable[[Array], Array]


class Loss(NamedTuple):
    """ℓ of each row, (N,), and ∂ℓ/∂z, (N, C)."""

    ell: Callable[[Array, Array], Array]
    dl_dz: Callable[[Array, Array], Array]


def sech2(s: Array) -> Array:
    """tanh′(s) = 1/cosh²(s), without overflow and without cancellation."""
    e = jnp.exp(-2 * jnp.abs(s))
    return 4 * e / (1 + e) ** 2


def gelu_slope(s: Array) -> Array:
    """(s Φ(s))′ = Φ(s) + s φ(s)."""
    return jax.lax.erfc(-s / 2**0.5) / 2 + s * jnp.exp(-(s**2) / 2) / (2 * np.pi) ** 0.5


def gelu_tanh_slope(s: Array) -> Array:
    """The derivative of ½ s (1 + tanh u), u = √(2/π) (s + 0.044715 s³)."""
    c = (2 / np.pi) ** 0.5
    u = c * (s + 0.044715 * s**3)
    return (1 + jnp.tanh(u)) / 2 + s * sech2(u) * c * (1 + 3 * 0.044715 * s**2) / 2


def slope_where(condition: Array, s: Array, otherwise: float) -> Array:
    """1 where the condition holds, in the dtype of s."""
    return jnp.where(condition, 1.0, otherwise).astype(s.dtype)


TANH = Sigma(jnp.tanh, sech2)
SIGMOID = Sigma(jax.nn.sigmoid, lambda s: jax.nn.sigmoid(s) * jax.nn.sigmoid(-s))
RELU = Sigma(jax.nn.relu, lambda s: slope_where(s > 0, s, 0.0))
LEAKY = Sigma(lambda s: jnp.where(s > 0, s, 0.2 * s), lambda s: slope_where(s > 0, s, 0.2))
GELU = Sigma(lambda s: jax.nn.gelu(s, approximate=False), gelu_slope)

CROSS_ENTROPY = Loss(
    lambda z, y: -jnp.sum(y * jax.nn.log_softmax(z), axis=1),
    lambda z, y: jax.nn.softmax(z) * jnp.sum(y, axis=1, keepdims=True) - y,
)
SQUARED = Loss(
    lambda z, y: jnp.sum((z - y) ** 2, axis=1) / 2,
    lambda z, y: z - y,
)


def output(rule: "Rule", t: Trace) -> Array:
    """δ of the last layer, which is linear."""
    return rule.loss.dl_dz(t.s[-1], t.batch.y)


def mean(t: Trace, delta: Array) -> Array:
    """The mean over the rows that count."""
    return jnp.where(t.batch.rows[:, None], delta, 0) / jnp.sum(t.batch.rows.astype(delta.dtype))


def through(t: Trace, l: int, grad: Layer) -> Array:
    """The weights that δ of layer l goes back through; `grad` is the gradient just computed for that layer."""
    return t.params[l].w


def slope(rule: "Rule", t: Trace, l: int) -> Array:
    """σ′ of hidden layer l."""
    return rule.sigma.df(t.s[l])


def dropped(rule: "Rule", t: Trace, l: int, a: Array) -> Array:
    """Inverted dropout of hidden layer l, of its output as of that output's derivative."""
    return jnp.where(t.batch.keep[l], a / (1 - rule.rate), 0)


def weight_gradient(t: Trace, l: int, delta: Array) -> Array:
    """∂/∂w of layer l."""
    return delta.T @ t.x[l]


def bias_gradient(t: Trace, l: int, delta: Array) -> Array:
    """∂/∂b of layer l."""
    return jnp.sum(delta, axis=0)


def penalty(rule: "Rule", layer: Layer) -> Layer:
    """The gradient of ½λ‖w‖²; biases have no penalty."""
    return Layer(rule.l2 * layer.w, jnp.zeros_like(layer.b))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A network (σ, ℓ, λ, the rate of dropout) and its backward pass, in steps that can be replaced one at a time."""

    sigma: Sigma = TANH
    loss: Loss = CROSS_ENTROPY
    l2: float = 0.0
    rate: float = 0.0
    output: Callable[["Rule", Trace], Array] = output
    mean: Callable[[Trace, Array], Array] = mean
    through: Callable[[Trace, int, Layer], Array] = through
    slope: Callable[["Rule", Trace, int], Array] = slope
    undropped: Callable[["Rule", Trace, int, Array], Array] = dropped
    dw: Callable[[Trace, int, Array], Array] = weight_gradient
    db: Callable[[Trace, int, Array], Array] = bias_gradient
    penalty: Callable[["Rule", Layer], Layer] = penalty

    def trace(self, params: tuple[Layer, ...], batch: Batch) -> Trace:
        """The forward pass, in the dtype of the parameters."""
        dtype = params[0].w.dtype
        batch = batch._replace(x=batch.x.astype(dtype), y=batch.y.astype(dtype))
        t = Trace(params, batch, (batch.x,), ())
        for l, (w, b) in enumerate(params):
            s = t.x[l] @ w.T + b[None]
            x = dropped(self, t, l, self.sigma.f(s)) if l < len(params) - 1 else s
            t = t._replace(x=(*t.x, x), s=(*t.s, s))
        return t

    def value(self, t: Trace) -> Array:
        """The mean loss and the penalty."""
        losses = jnp.where(t.batch.rows, self.loss.ell(t.s[-1], t.batch.y), 0)
        norm = sum(jnp.sum(layer.w**2) for layer in t.params)
        return jnp.sum(losses) / jnp.sum(t.batch.rows.astype(losses.dtype)) + self.l2 / 2 * norm

    def gradient(self, t: Trace) -> tuple[Layer, ...]:
        """The backward pass."""
        delta, grads = self.mean(t, self.output(self, t)), []
        for l in reversed(range(len(t.params))):
            grads.append(Layer(self.dw(t, l, delta), self.db(t, l, delta)))
            if l > 0:
                dl_dx = delta @ self.through(t, l, grads[-1])
                delta = self.slope(self, t, l - 1) * self.undropped(self, t, l - 1, dl_dx)
        penalties = tuple(self.penalty(self, layer) for layer in t.params)
        return jax.tree.map(jnp.add, tuple(reversed(grads)), penalties)


# Data of the networks -------------------------------------------------------------------------------------------------

Params = tuple[Layer, ...]
ANY = (((3, 5, 4, 2), 6), ((8, 16, 16, 5), 16), ((20, 32, 24, 10), 32))  # sizes, N
SQUARE = (((4, 4, 4, 4), 4), ((8, 8, 8, 8), 8), ((24, 24, 24, 24), 24))  # every width is N, too
RECTANGULAR = (((5, 4, 4, 3), 6), ((7, 9, 9, 4), 16), ((20, 32, 32, 10), 32))  # only the middle layer is square


def f32(a: Any) -> Array:
    """Data are float32, so that they are the same numbers in float32 and in float64."""
    return jax.device_put(np.asarray(a).astype(np.float32))


def labels(rng: np.random.Generator, sizes: tuple[int, ...], rows: int) -> tuple[Params, Batch]:
    """Ordinary parameters and inputs, one-hot labels, everything kept, every row counts."""
    params = tuple(
        Layer(f32(rng.normal(size=(o, i)) / i**0.5), f32(0.3 * rng.normal(size=o))) for i, o in pairwise(sizes)
    )
    y = np.eye(sizes[-1])[rng.integers(sizes[-1], size=rows)]
    keep = tuple(jax.device_put(np.ones((rows, width), bool)) for width in sizes[1:-1])
    return params, Batch(f32(rng.normal(size=(rows, sizes[0]))), f32(y), keep, jax.device_put(np.ones(rows, bool)))


def confident(rng: np.random.Generator, sizes: tuple[int, ...], rows: int) -> tuple[Params, Batch]:
    """Logits far apart, so that some labels have a small probability."""
    (*hidden, last), batch = labels(rng, sizes, rows)
    return (*hidden, last._replace(w=6 * last.w)), batch


def soft_labels(rng: np.random.Generator, sizes: tuple[int, ...], rows: int) -> tuple[Params, Batch]:
    """Labels that are not negative and sum to anything but 1."""
    params, batch = labels(rng, sizes, rows)
    return params, batch._replace(y=f32(rng.uniform(0.1, 1.0, size=(rows, sizes[-1]))))


def outlier(rng: np.random.Generator, sizes: tuple[int, ...], rows: int) -> tuple[Params, Batch]:
    """Targets of a regression, the first of them far off."""
    params, batch = labels(rng, sizes, rows)
    y = rng.normal(size=(rows, sizes[-1]))
    y[0] = 8.0
    return params, batch._replace(y=f32(y))


def half_kept(rng: np.random.Generator, sizes: tuple[int, ...], rows: int) -> tuple[Params, Batch]:
    """Dropout of about one half."""
    params, batch = labels(rng, sizes, rows)
    return params, batch._replace(keep=tuple(jax.device_put(rng.random(k.shape) < 0.5) for k in batch.keep))


def masked_rows(rng: np.random.Generator, sizes: tuple[int, ...], rows: int) -> tuple[Params, Batch]:
    """The last third of the rows does not count."""
    params, batch = labels(rng, sizes, rows)
    return params, batch._replace(rows=jnp.arange(rows) < rows - rows // 3)


def exact_zeros(rng: np.random.Generator, sizes: tuple[int, ...], rows: int) -> tuple[Params, Batch]:
    """Every other row is 0 and so is every other bias of the first layer: there s is 0. So it is in the first unit of
    the second layer, whose other units are alive.
    """
    (first, second, *rest), batch = labels(rng, sizes, rows)
    first = first._replace(b=first.b.at[::2].set(0))
    second = Layer(second.w.at[0].set(0), (1 + jnp.abs(second.b)).at[0].set(0))
    return (first, second, *rest), batch._replace(x=batch.x.at[::2].set(0))


# The bugs of a network ------------------------------------------------------------------------------------------------

DRAW = Callable[[np.random.Generator, tuple[int, ...], int], tuple[Params, Batch]]
MIDDLE = ("[0][1].w", "[0][1].b")  # an error of δ on its way down enters at the last hidden layer
LAST = ("[0][2].w", "[0][2].b")  # an error of the output's δ
WEIGHTS = tuple(f"[0][{l}].w" for l in range(3))
BIASES = tuple(f"[0][{l}].b" for l in range(3))


def network_bug(
    number: int,
    name: str,
    description: str,
    right: Rule,
    wrong: Rule,
    leaf: tuple[str, ...],
    diagnosis: str | None = None,
    shapes: tuple[Any, ...] = ANY,
    data: DRAW = labels,
    style: str = "value_and_grad",
) -> Bug:
    """A bug of the network's gradient with respect to its parameters, argument 0."""

    def builder(rule: Rule) -> Callable[[int, int], Subject]:
        rules = {
            "value_and_grad": lambda params, batch: (
                (t := rule.trace(params, batch)) and rule.value(t),
                rule.gradient(t),
            ),
            "gradient": lambda params, batch: rule.gradient(rule.trace(params, batch)),
        }

        def fun(params: Params, batch: Batch) -> Array:
            return rule.value(rule.trace(params, batch))

        def build(seed: int, shape: int) -> Subject:
            return Subject(fun, data(np.random.default_rng((seed, shape)), *shapes[shape]), {style: rules[style]})

        return build

    return Bug(number, name, description, builder(wrong), builder(right), leaf, diagnosis)


def only(layer: int, wrong: Callable[[Trace, int, Array], Array], right: Callable[[Trace, int, Array], Array]) -> Any:
    """A step that is wrong in one layer."""
    return lambda t, l, delta: (wrong if l == layer else right)(t, l, delta)


def updated_weights(t: Trace, l: int, grad: Layer) -> Array:
    """w after a gradient step with η = 0.1."""
    return t.params[l].w - 0.1 * grad.w


def bfloat16_sum(t: Trace, l: int, delta: Array) -> Array:
    """Σₙ δₙ xₙᵀ, the running sum kept in bfloat16."""

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + jnp.outer(*pair).astype(total.dtype), None

    start = jnp.zeros((delta.shape[1], t.x[l].shape[1]), jnp.bfloat16)
    return jax.lax.scan(add, start, (delta, t.x[l]))[0].astype(delta.dtype)


def through_log_plus_epsilon(rule: Rule, t: Trace) -> Array:
    """∂/∂z of −Σ y log(p + ε), p = softmax(z)."""
    p = jax.nn.softmax(t.s[-1])
    dl_dp = -t.batch.y / (p + 1e-7)
    return p * (dl_dp - jnp.sum(p * dl_dp, axis=1, keepdims=True))


NET = Rule()
SIGMOID_NET, RELU_NET, LEAKY_NET, GELU_NET = (Rule(sigma=sigma) for sigma in (SIGMOID, RELU, LEAKY, GELU))
REGRESSION, DECAY, DROPOUT = Rule(loss=SQUARED), Rule(l2=1e-4), Rule(rate=0.5)

# fmt: off
NETWORK_BUGS = (
    network_bug(1, "missing transpose", "δ goes back through w instead of wᵀ; layers are square",
                NET, replace(NET, through=lambda t, l, grad: t.params[l].w.T), MIDDLE, shapes=SQUARE),
    network_bug(2, "dw transposed", "the gradient of one square weight is x δᵀ instead of δ xᵀ",
                NET, replace(NET, dw=only(1, lambda t, l, delta: t.x[l].T @ delta, weight_gradient)),
                ("[0][1].w",), "transpose", shapes=RECTANGULAR),
    network_bug(3, "slope at x", "σ′ is taken at x = σ(s) instead of s",
                NET, replace(NET, slope=lambda rule, t, l: rule.sigma.df(t.x[l + 1])), MIDDLE),
    network_bug(4, "slope of another layer", "σ′ at s of the layer below",
                NET, replace(NET, slope=lambda rule, t, l: rule.sigma.df(t.s[max(l - 1, 0)])), MIDDLE, shapes=SQUARE),
    network_bug(5, "slope missing", "δ is not multiplied by σ′",
                SIGMOID_NET, replace(SIGMOID_NET, slope=lambda rule, t, l: jnp.ones_like(t.s[l])), MIDDLE),
    network_bug(6, "1/N missing", "the gradient of the sum instead of the mean",
                NET, replace(NET, mean=lambda t, delta: delta), LAST, "[×÷]"),
    network_bug(7, "1/N twice", "the mean is taken twice",
                NET, replace(NET, mean=lambda t, delta: mean(t, mean(t, delta))), LAST, "×"),
    network_bug(8, "another layer's w", "δ goes back through w of the layer below",
                NET, replace(NET, through=lambda t, l, grad: t.params[l - 1].w), MIDDLE, shapes=SQUARE),
    network_bug(9, "another layer's x", "dw takes the input of the layer below",
                NET, replace(NET, dw=only(1, lambda t, l, delta: delta.T @ t.x[l - 1], weight_gradient)),
                ("[0][1].w",), shapes=SQUARE),
    network_bug(10, "bias over the wrong axis", "db sums over the units instead of the samples, as many as units",
                NET, replace(NET, db=only(1, lambda t, l, delta: jnp.sum(delta, axis=1), bias_gradient)),
                ("[0][1].b",), shapes=SQUARE),
    network_bug(11, "bias mean", "db is the mean over the samples instead of the sum",
                NET, replace(NET, db=lambda t, l, delta: jnp.mean(delta, axis=0)), BIASES, "×"),
    network_bug(12, "bias element lost", "the last element of one db is 0",
                NET, replace(NET, db=only(1, lambda t, l, delta: bias_gradient(t, l, delta).at[-1].set(0),
                                          bias_gradient)), ("[0][1].b",)),
    network_bug(13, "label axis swapped", "yᵀ instead of y; as many classes as samples",
                NET, replace(NET, output=lambda rule, t: rule.loss.dl_dz(t.s[-1], t.batch.y.T)), LAST, shapes=SQUARE),
    network_bug(14, "sign of δ", "y − p instead of p − y",
                NET, replace(NET, output=lambda rule, t: -output(rule, t)), LAST, "sign", style="gradient"),
    network_bug(15, "dropout mask not re-applied", "δ goes through the units that were dropped, and is not scaled",
                DROPOUT, replace(DROPOUT, undropped=lambda rule, t, l, a: a), MIDDLE, data=half_kept),
    network_bug(16, "L2 missing", "λw is missing, λ = 1e-4",
                DECAY, replace(DECAY, penalty=lambda rule, layer: jax.tree.map(jnp.zeros_like, layer)),
                WEIGHTS, "L2", style="gradient"),
    network_bug(17, "L2 on biases", "λb is added to db, λ = 1e-4",
                DECAY, replace(DECAY, penalty=lambda rule, layer: jax.tree.map(lambda p: rule.l2 * p, layer)),
                BIASES, "L2"),
    network_bug(18, "w after the update", "δ goes back through w − 0.1 dw",
                NET, replace(NET, through=updated_weights), MIDDLE),
    network_bug(19, "tanh-GELU slope", "the derivative of the tanh approximation with the exact GELU forward",
                GELU_NET, replace(GELU_NET, slope=lambda rule, t, l: gelu_tanh_slope(t.s[l])), MIDDLE),
    network_bug(20, "slope off by 1 %", "σ′ × 1.01",
                NET, replace(NET, slope=lambda rule, t, l: 1.01 * slope(rule, t, l)), MIDDLE, "×"),
    network_bug(20, "slope off by 0.1 %", "σ′ × 1.001",
                NET, replace(NET, slope=lambda rule, t, l: 1.001 * slope(rule, t, l)), MIDDLE, "×"),
    network_bug(21, "dw accumulated in bfloat16", "the running sum over the samples is in bfloat16",
                NET, replace(NET, dw=bfloat16_sum), WEIGHTS),
    network_bug(22, "ε in the log", "∂ℓ/∂z of −Σ y log(p + 1e-7)",
                NET, replace(NET, output=through_log_plus_epsilon), LAST, data=confident),
    network_bug(23, "leaky slope lost", "the slope of leaky ReLU below 0 is 0 instead of 0.2",
                LEAKY_NET, replace(LEAKY_NET, slope=lambda rule, t, l: RELU.df(t.s[l])), MIDDLE),
    network_bug(24, "clip left in δ", "the output's δ is clipped to ± 2, a target is farther off",
                REGRESSION, replace(REGRESSION, output=lambda rule, t: jnp.clip(output(rule, t), -2, 2)), LAST,
                data=outlier),
    network_bug(28, "relu′(0) = 1", "the slope of ReLU at exactly 0 is 1, that of jax.nn.relu 0",
                RELU_NET, replace(RELU_NET, slope=lambda rule, t, l: slope_where(t.s[l] >= 0, t.s[l], 0.0)),
                (*MIDDLE, "[0][0].b"), data=exact_zeros),
    network_bug(29, "labels assumed to sum to 1", "p − y instead of p Σy − y, with soft labels",
                NET, replace(NET, output=lambda rule, t: jax.nn.softmax(t.s[-1]) - t.batch.y), LAST, data=soft_labels),
    network_bug(30, "masked rows counted", "the mean divides by all rows, the loss by those that count",
                NET, replace(NET, mean=lambda t, delta: jnp.where(t.batch.rows[:, None], delta, 0) / len(delta)),
                LAST, "×", data=masked_rows),
)
# fmt: on


# The bugs of a single function ----------------------------------------------------------------------------------------

Forward = Callable[..., tuple[Any, Any]]
Backward = Callable[[Any, Any], tuple[Any, ...]]
ARRAYS = ((7,), (4, 6), (3, 5, 8))
MATRICES = ((5, 3, 4), (4, 4, 4), (16, 8, 12))  # N, in, out


def function_bug(
    name: str,
    description: str,
    fun: Callable[..., Any],
    right: tuple[Forward, Backward],
    wrong: tuple[Forward, Backward],
    data: Callable[[np.random.Generator, int], tuple[Any, ...]],
    leaf: tuple[str, ...],
    diagnosis: str | None = None,
    style: str = "custom_vjp",
    number: int | None = None,
) -> Bug:
    """A bug of a function's pullback, as a custom_vjp function or, with style "vjp", as a pair."""

    def builder(pair: tuple[Forward, Backward]) -> Callable[[int, int], Subject]:
        subject = (fun, {"vjp": pair}) if style == "vjp" else (with_rule(fun, *pair), {})

        def build(seed: int, shape: int) -> Subject:
            return Subject(subject[0], data(np.random.default_rng((seed, shape)), shape), subject[1])

        return build

    return Bug(number, name, description, builder(wrong), builder(right), leaf, diagnosis)


def one_array(rng: np.random.Generator, shape: int) -> tuple[Array]:
    """N(0, 1)."""
    return (f32(rng.normal(size=ARRAYS[shape])),)


def two_arrays(rng: np.random.Generator, shape: int) -> tuple[Array, Array]:
    """Two of the same shape."""
    return f32(rng.normal(size=ARRAYS[shape])), f32(rng.normal(size=ARRAYS[shape]))


def huge_array(rng: np.random.Generator, shape: int) -> tuple[Array]:
    """× 200: exp overflows in float32 and not in float64."""
    s = np.clip(200 * rng.normal(size=ARRAYS[shape]), -600, 600)
    s.flat[0] = 300
    return (f32(s),)


def negative_array(rng: np.random.Generator, shape: int) -> tuple[Array]:
    """From where 1 + expm1(s) has no digit left in float32 up to positive."""
    s = rng.uniform(-20, 3, size=ARRAYS[shape])
    s.flat[:2] = -16, 1
    return (f32(s),)


def affine_data(rng: np.random.Generator, shape: int) -> tuple[Array, Array, Array]:
    """w (out, in), b (out,), x (N, in)."""
    rows, inputs, outputs = MATRICES[shape]
    w, b, x = (rng.normal(size=size) for size in ((outputs, inputs), outputs, (rows, inputs)))
    return f32(w / inputs**0.5), f32(b), f32(x)


def regression_data(rng: np.random.Generator, shape: int) -> tuple[Array, Array, Array, Array]:
    """w, b, x and targets y (N, out)."""
    rows, _, outputs = MATRICES[shape]
    return *affine_data(rng, shape), f32(rng.normal(size=(rows, outputs)))


def weight_data(rng: np.random.Generator, shape: int) -> tuple[Array, Array]:
    """w (out, in), x (N, in)."""
    w, _, x = affine_data(rng, shape)
    return w, x


def row_data(rng: np.random.Generator, shape: int) -> tuple[Array, Array]:
    """x (N, in), a row (in,)."""
    _, _, x = affine_data(rng, shape)
    return x, f32(rng.normal(size=x.shape[1]))


def embedding_data(rng: np.random.Generator, shape: int) -> tuple[Array, Array]:
    """A table (V, d) and N indices of which the first two are the same."""
    rows, inputs, outputs = MATRICES[shape]
    ids = rng.integers(outputs, size=rows)
    ids[1] = ids[0]
    return f32(rng.normal(size=(outputs, inputs))), jax.device_put(ids.astype(np.int32))


def saved(fun: Callable[..., Any]) -> Forward:
    """The forward that keeps its arguments and nothing else."""
    return lambda *args: (fun(*args), args)


def squared_loss(w: Array, b: Array, x: Array, y: Array) -> Array:
    """The mean over n of ½‖w xₙ + b − yₙ‖²."""
    return jnp.sum((x @ w.T + b[None] - y) ** 2) / (2 * len(x))


def squared_loss_backward(res: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    w, b, x, y = res
    delta = g * (x @ w.T + b[None] - y) / len(x)
    return delta.T @ x, jnp.sum(delta, axis=0), delta @ w, -delta


def softplus(s: Array) -> Array:
    """log(1 + eˢ)."""
    return jnp.logaddexp(s, 0)


def naive_softplus_backward(res: tuple[Array], g: Array) -> tuple[Array]:
    (s,) = res
    return (g * jnp.exp(s) / (1 + jnp.exp(s)),)


def elu(s: Array) -> Array:
    """eˢ − 1 below 0, whose derivative autodiff finds without cancellation; that of jax.nn.elu is ELU′ as x + 1."""
    return jnp.where(s > 0, s, jnp.exp(jnp.minimum(s, 0)) - 1)


def elu_backward(res: tuple[Array], g: Array) -> tuple[Array]:
    (s,) = res
    return (g * jnp.where(s > 0, 1, jnp.exp(jnp.minimum(s, 0))),)


def elu_backward_from_output(res: tuple[Array], g: Array) -> tuple[Array]:
    (s,) = res
    return (g * jnp.where(s > 0, 1, elu(s) + 1),)


def lookup(table: Array, ids: Array) -> Array:
    """The rows of the table."""
    return table[ids]


def integer_cotangent(ids: Array) -> np.ndarray:
    """What JAX wants for an integer argument."""
    return np.zeros(ids.shape, jax.dtypes.float0)


def lookup_backward(res: tuple[Array, Array], g: Array) -> tuple[Array, np.ndarray]:
    table, ids = res
    return jnp.zeros_like(table).at[ids].add(g), integer_cotangent(ids)


def lookup_backward_set(res: tuple[Array, Array], g: Array) -> tuple[Array, np.ndarray]:
    table, ids = res
    return jnp.zeros_like(table).at[ids].set(g), integer_cotangent(ids)


def softmax_forward(z: Array) -> tuple[Array, Array]:
    p = jax.nn.softmax(z)
    return p, p


def softmax_backward(p: Array, g: Array) -> tuple[Array]:
    return (p * (g - jnp.sum(p * g, axis=-1, keepdims=True)),)


def autoencoder(w: Array, x: Array) -> Array:
    """tanh(x wᵀ) w: one weight, used twice."""
    return jnp.tanh(x @ w.T) @ w


def autoencoder_backward(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    w, x = res
    s = x @ w.T
    delta = (g @ w.T) * sech2(s)
    return delta.T @ x + jnp.tanh(s).T @ g, delta @ w


def autoencoder_backward_decoder(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    w, x = res
    return jnp.tanh(x @ w.T).T @ g, autoencoder_backward(res, g)[1]


def scale_rows(x: Array, scale: Array) -> Array:
    """x (N, in) times a row (in,)."""
    return x * scale[None]


def scale_rows_backward(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, scale = res
    return g * scale[None], jnp.sum(g * x, axis=0)


def scale_rows_backward_unsummed(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, scale = res
    return g * scale[None], g * x


def scale_rows_backward_first(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, scale = res
    return g * scale[None], (g * x)[0]


def affine(w: Array, b: Array, x: Array) -> Array:
    """x wᵀ + b."""
    return x @ w.T + b[None]


def affine_backward(res: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    w, _, x = res
    return g.T @ x, jnp.sum(g, axis=0), g @ w


def affine_backward_bfloat16(res: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    dw, db, dx = affine_backward(res, g)
    return dw.astype(jnp.bfloat16), db, dx


def affine_backward_none(res: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    return *affine_backward(res, g)[:2], None


def tanh_layer(w: Array, x: Array) -> Array:
    """tanh(x wᵀ)."""
    return jnp.tanh(x @ w.T)


def tanh_layer_forward(w: Array, x: Array) -> tuple[Array, tuple[Array, ...]]:
    s = x @ w.T
    return jnp.tanh(s), (w, x, s)


tanh_in_place = jax.jit(jnp.tanh, donate_argnums=0)


def tanh_layer_forward_in_place(w: Array, x: Array) -> tuple[Array, tuple[Array, ...]]:
    s = x @ w.T
    return tanh_in_place(s), (w, x, s)  # s is gone when the backward reads it, unless an outer jit dropped the donation


def tanh_layer_backward(res: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    w, x, s = res
    delta = g * sech2(s)
    return delta.T @ x, delta @ w


def gelu_forward_tanh(s: Array) -> tuple[Array, tuple[Array]]:
    return jax.nn.gelu(s, approximate=True), (s,)


def gelu_backward(res: tuple[Array], g: Array) -> tuple[Array]:
    (s,) = res
    return (g.astype(s.dtype) * gelu_slope(s),)


def gelu_forward_bfloat16(s: Array) -> tuple[Array, tuple[Array]]:
    return GELU.f(s).astype(jnp.bfloat16), (s,)


def square_norm(x: Array) -> Array:
    """½‖x‖² of the last axis."""
    return jnp.sum(x**2, axis=-1) / 2


def square_norm_forward_keepdims(x: Array) -> tuple[Array, tuple[Array]]:
    return jnp.sum(x**2, axis=-1, keepdims=True) / 2, (x,)


def square_norm_backward(res: tuple[Array], g: Array) -> tuple[Array]:
    (x,) = res
    return (g.reshape(*x.shape[:-1], 1) * x,) if x.ndim > 1 else (g.reshape(()) * x,)


def tanh_backward(res: tuple[Array], g: Array) -> tuple[Array]:
    (s,) = res
    return (g * sech2(s),)


def tanh_backward_clipped(res: tuple[Array], g: Array) -> tuple[Array]:
    return tanh_backward(res, jnp.clip(g, -1, 1))


def tanh_backward_normalized(res: tuple[Array], g: Array) -> tuple[Array]:
    size = jnp.sqrt(jnp.sum(g**2))
    return (tanh_backward(res, g / size)[0] * size,)


def product(a: Array, b: Array) -> Array:
    """a b²."""
    return a * b**2


def product_backward(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = res
    return g * b**2, 2 * g * a * b


# fmt: off
FUNCTION_BUGS = (
    function_bug("cotangent ignored", "the backward of a loss takes its incoming cotangent for 1",
                 squared_loss, (saved(squared_loss), squared_loss_backward),
                 (saved(squared_loss), lambda res, g: squared_loss_backward(res, jnp.ones_like(g))),
                 regression_data, ("[0]", "[1]", "[2]", "[3]"), "cotangent", number=25),
    function_bug("naive softplus′", "eˢ/(1 + eˢ), which is inf/inf for large s",
                 softplus, (saved(softplus), lambda res, g: (g * jax.nn.sigmoid(res[0]),)),
                 (saved(softplus), naive_softplus_backward), huge_array, ("[0]",), number=26),
    function_bug("ELU′ as x + 1", "from the output, which is near −1: no digit is left",
                 elu, (saved(elu), elu_backward), (saved(elu), elu_backward_from_output),
                 negative_array, ("[0]",), number=27),
    function_bug("duplicated embedding rows", "`set` instead of `add`: of a row looked up twice one cotangent is lost",
                 lookup, (saved(lookup), lookup_backward), (saved(lookup), lookup_backward_set),
                 embedding_data, ("[0]",)),
    function_bug("softmax without row sum", "p ⊙ g instead of p ⊙ (g − Σ p g)",
                 jax.nn.softmax, (softmax_forward, softmax_backward), (softmax_forward, lambda p, g: (p * g,)),
                 one_array, ("[0]",), style="vjp"),
    function_bug("tied weight counted once", "the encoder's part of the gradient is missing",
                 autoencoder, (saved(autoencoder), autoencoder_backward),
                 (saved(autoencoder), autoencoder_backward_decoder), weight_data, ("[0]",), style="vjp"),
    function_bug("broadcast axis not summed", "the cotangent of a row has the shape of the matrix",
                 scale_rows, (saved(scale_rows), scale_rows_backward),
                 (saved(scale_rows), scale_rows_backward_unsummed), row_data, ("[1]",), "sum", style="vjp"),
    function_bug("broadcast axis not summed, first row", "the cotangent of a row is that of the matrix's first row",
                 scale_rows, (saved(scale_rows), scale_rows_backward), (saved(scale_rows), scale_rows_backward_first),
                 row_data, ("[1]",)),
    function_bug("cotangent dtype wrong", "dw is returned in bfloat16, which JAX takes without a word",
                 affine, (saved(affine), affine_backward), (saved(affine), affine_backward_bfloat16),
                 affine_data, ("[0]",), "dtype"),
    function_bug("None returned", "for x, a live argument: every gradient upstream vanishes",
                 affine, (saved(affine), affine_backward), (saved(affine), affine_backward_none),
                 affine_data, ("[2]",), "None"),
    function_bug("donated buffer read", "the residual s was donated to tanh in the forward",
                 tanh_layer, (tanh_layer_forward, tanh_layer_backward),
                 (tanh_layer_forward_in_place, tanh_layer_backward), weight_data, (), "donated|deleted"),
    function_bug("forward ≠ function, value", "the forward computes tanh-GELU, the function and the rule exact GELU",
                 GELU.f, (saved(GELU.f), gelu_backward), (gelu_forward_tanh, gelu_backward),
                 one_array, (), "forward|primal|value"),
    function_bug("forward ≠ function, dtype", "the forward returns bfloat16",
                 GELU.f, (saved(GELU.f), gelu_backward), (gelu_forward_bfloat16, gelu_backward),
                 one_array, (), "dtype"),
    function_bug("forward ≠ function, shape", "the forward keeps the axis that the function sums over",
                 square_norm, (saved(square_norm), square_norm_backward),
                 (square_norm_forward_keepdims, square_norm_backward), one_array, (), "shape"),
    function_bug("nonlinear in its cotangent", "the cotangent is clipped to ± 1",
                 jnp.tanh, (saved(jnp.tanh), tanh_backward), (saved(jnp.tanh), tanh_backward_clipped),
                 one_array, ("[0]",), "linear|cotangent"),
    function_bug("NaN at cotangent 0", "the cotangent is divided by its norm and multiplied by it again",
                 jnp.tanh, (saved(jnp.tanh), tanh_backward), (saved(jnp.tanh), tanh_backward_normalized),
                 one_array, ("[0]",), "NaN|cotangent"),
    function_bug("cotangents swapped", "of two arguments with the same shape",
                 product, (saved(product), product_backward),
                 (saved(product), lambda res, g: product_backward(res, g)[::-1]),
                 two_arrays, ("[0]", "[1]"), "swapped"),
)
# fmt: on

BUGS = tuple(sorted((*NETWORK_BUGS, *FUNCTION_BUGS), key=lambda bug: (bug.number is None, bug.number or 0)))
