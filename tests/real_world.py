"""Rules that people really use, and the verdict each deserves: JAX's own, Optax's, those of JAX's documentation.

A case is one call ``jaxbp.check(fun, args, **options)``. The references are plain formulas written for this file; every
verdict is confirmed in tests/test_generated.py by f64 autodiff of the reference, without the checker.
"""

import itertools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array


class Case(NamedTuple):
    """One call and its verdict, "PASS" or "FAIL", with the reason."""

    name: str
    fun: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    expected: str
    why: str


def draw(seed: int, *shape: int, dtype: Any = jnp.float32) -> Array:
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


# References ---------------------------------------------------------------------------------------------------------


def relu(x: Array) -> Array:
    return jnp.where(x > 0, x, 0)


def silu(x: Array) -> Array:
    return 0.5 * x * (1 + jnp.tanh(x / 2))


def logsumexp(x: Array) -> Array:
    top = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(x - top), axis=-1)) + top[..., 0]


def fenchel_young(scores: Array, targets: Array) -> Array:
    return logsumexp(scores) - jnp.sum(scores * targets, axis=-1)


LABELS = ((1, 2), (1, 1))


def ctc(logits: Array) -> Array:
    """−ln of the summed probability of every path that collapses to the labels, by enumeration (Graves et al. 2006)."""
    batch, steps, classes = logits.shape
    log_p = logits - logsumexp(logits)[..., None]

    def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(k for k, _ in itertools.groupby(path) if k)

    def loss(n: int) -> Array:
        paths = [p for p in itertools.product(range(classes), repeat=steps) if collapsed(p) == LABELS[n]]
        return -logsumexp(jnp.sum(log_p[n][jnp.arange(steps), jnp.asarray(paths)], axis=1))

    return jnp.stack([loss(n) for n in range(batch)])


def optax_ctc(logits: Array) -> Array:
    """Optax mixes f32 and the logits' dtype, which strict promotion forbids."""
    zeros = jnp.zeros(logits.shape[:2], logits.dtype), jnp.zeros((2, 2), logits.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return optax.losses.ctc_loss(logits, zeros[0], jnp.asarray(LABELS, jnp.int32), zeros[1]).astype(logits.dtype)


# Rules --------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def sin_times(x: Array, y: Array) -> Array:
    """The first example of JAX's documentation of custom_vjp."""
    return jnp.sin(x) * y


sin_times.defvjp(
    lambda x, y: (jnp.sin(x) * y, (jnp.cos(x), jnp.sin(x), y)),
    lambda kept, g: (kept[0] * g * kept[2], kept[1] * g),
)


@jax.custom_vjp
def clip_gradient(low: Array, high: Array, x: Array) -> Array:
    return x


clip_gradient.defvjp(
    lambda low, high, x: (x, (low, high)),
    lambda kept, g: (jnp.zeros_like(kept[0]), jnp.zeros_like(kept[1]), jnp.clip(g, *kept)),
)


@jax.custom_vjp
def straight_through(x: Array) -> Array:
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def reversed_gradient(x: Array) -> Array:
    """Ganin and Lempitsky 2015: the identity forward, −1 backward."""
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def observed(x: Array) -> Array:
    """JAX's documentation puts a debugger into such a backward pass."""
    return x


observed.defvjp(lambda x: (x, x), lambda x, g: (g,))


@jax.custom_jvp
def log1pexp(x: Array) -> Array:
    return jnp.log(1 + jnp.exp(x))


log1pexp.defjvp(lambda primals, tangents: (log1pexp(*primals), (1 - 1 / (1 + jnp.exp(primals[0]))) * tangents[0]))


@jax.custom_jvp
def rational_root(x: Array) -> Array:
    """x / (1 + √x), whose derivative at 0 is 1 by convention."""
    return x / (1 + jnp.sqrt(x))


rational_root.defjvp(
    lambda primals, tangents: (
        rational_root(*primals),
        (jnp.sqrt(primals[0]) + 2) / (2 * (jnp.sqrt(primals[0]) + 1) ** 2) * tangents[0],
    )
)


@jax.custom_vjp
def babylonian(a: Array, guess: Array) -> Array:
    """√a as the fixed point of x ↦ (x + a/x) / 2; the backward pass is the implicit function theorem's."""
    return jax.lax.fori_loop(0, 30, lambda _, x: 0.5 * (x + a / x), guess)


def _babylonian_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, x = kept
    slope = 0.5 * (1 - a / (x * x))  # ∂/∂x of the iteration, 0 at the fixed point
    adjoint = jax.lax.fori_loop(0, 10, lambda _, u: g + slope * u, g)
    return adjoint * 0.5 / x, jnp.zeros_like(x)


def _babylonian_forward(a: Array, guess: Array) -> tuple[Array, tuple[Array, Array]]:
    root = babylonian(a, guess)
    return root, (a, root)


babylonian.defvjp(_babylonian_forward, _babylonian_backward)


@jax.custom_vjp
def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


cross_entropy.defvjp(
    lambda x, y: (cross_entropy(x, y), (x, y)),
    lambda kept, g: (
        g[:, None] * (jax.nn.softmax(kept[0]) - jax.nn.one_hot(kept[1], kept[0].shape[1], dtype=kept[0].dtype)),
        None,
    ),
)


@jax.custom_vjp
def safe_divide(x: Array, y: Array) -> Array:
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _safe_divide_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, y = kept
    inverse = jnp.where(y == 0, 0, 1 / jnp.where(y == 0, 1, y))
    return g * inverse, -g * x * inverse * inverse


safe_divide.defvjp(lambda x, y: (safe_divide(x, y), (x, y)), _safe_divide_backward)


def safe_root(x: Array) -> Array:
    """Σ√x with 0 and slope 0 where x ≤ 0: the inner `where` keeps the infinite slope away."""
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0))


def trapped_root(x: Array) -> Array:
    """The same values with one `where`: the gradient is 0 · ∞ = NaN at 0."""
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0))


def through(x: Array) -> Array:
    """The straight-through estimator as an expression."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def determinant(a: Array) -> Array:
    """3 × 3, along the first row."""
    minors = [a[1, (i + 1) % 3] * a[2, (i + 2) % 3] - a[1, (i + 2) % 3] * a[2, (i + 1) % 3] for i in range(3)]
    return a[0, 0] * minors[0] + a[0, 1] * minors[1] + a[0, 2] * minors[2]


def near_identity(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return 3 * jnp.eye(3, dtype=dtype) + jax.random.uniform(key, shape, dtype, -0.5, 0.5)


def far_from_zero(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """0 or between ½ and 2: the quotient jumps at 0, and overflows near it."""
    keep, size = jax.random.split(key)
    y = jax.random.uniform(size, shape, dtype, 0.5, 2.0)
    return jnp.where(jax.random.bernoulli(keep, 0.75, shape), y, 0)


DENSE = nn.Dense(3)
LINEAR = eqx.nn.Linear(4, 3, key=jax.random.key(0), dtype=jnp.float32)
X = draw(0, 4, 5).at[0, 0].set(0).at[1, 2].set(0)
POSITIVE = jnp.abs(X) + 0.5
PROBABILITIES = jax.nn.softmax(draw(1, 4, 5))
LIMITS = (jnp.float32(-0.1), jnp.float32(0.1), X)

CASES = [
    Case("jax.nn.relu", jax.nn.relu, (X,), {"reference": relu}, "PASS", "0 at 0, as the reference's where"),
    Case("jax.nn.silu", jax.nn.silu, (X,), {"reference": silu}, "PASS", "the product rule"),
    Case("jax.nn.logsumexp", lambda x: jax.nn.logsumexp(x, axis=-1), (X,), {"reference": logsumexp}, "PASS", "softmax"),
    Case(
        "optax fenchel-young",
        optax.losses.make_fenchel_young_loss(jax.nn.logsumexp),
        (X, PROBABILITIES),
        {"reference": fenchel_young, "wrt": (0, 1)},
        "PASS",
        "softmax − targets, and −scores",
    ),
    Case(
        "optax ctc_loss",
        optax_ctc,
        (draw(2, 2, 4, 3),),
        {"reference": ctc, "domain": (-10.0, 10.0)},
        "PASS",
        "the sum over all paths; labels with and without a repetition, log(0) as −1e5",
    ),
    Case("jax docs: sin(x) y", sin_times, (X, 2 * X + 1), {"domain": (-10.0, 10.0)}, "PASS", "the first example"),
    Case("jax docs: clip_gradient", clip_gradient, LIMITS, {"wrt": 2}, "FAIL", "its function is the identity, slope 1"),
    Case("jax docs: a backward to look into", observed, (X,), {}, "PASS", "the identity"),
    Case(
        "jax docs: log1pexp",
        log1pexp,
        (X,),
        {"reference": lambda x: jnp.logaddexp(x, 0), "domain": (-3.0, 80.0)},
        "PASS",
        "beyond the domain exp overflows and 1 − 1/(1 + eˣ) cancels",
    ),
    Case(
        "jax docs: x / (1 + sqrt x)",
        rational_root,
        (POSITIVE,),
        {"reference": lambda x: jnp.sqrt(x) - 1 + 1 / (1 + jnp.sqrt(x)), "domain": (0.01, 100.0)},
        "PASS",
        "the reference is the same function divided out; at 0 only the rule has a slope",
    ),
    Case(
        "jax docs: fixed point",
        babylonian,
        (POSITIVE, jnp.ones_like(POSITIVE)),
        {"reference": lambda a, guess: jnp.sqrt(a) + 0 * guess, "domain": (0.25, 4.0), "allow_zero": (1,)},
        "PASS",
        "implicit differentiation; the guess has no influence",
    ),
    Case("straight-through", straight_through, (X,), {}, "FAIL", "the slope of round is 0, the rule says 1"),
    Case(
        "straight-through, declared",
        straight_through,
        (X,),
        {"reference": lambda x: x},
        "PASS",
        "declared to have the identity's gradient; its values are round's",
    ),
    Case("straight-through, as an expression", through, (X,), {"reference": lambda x: x}, "PASS", "declared as well"),
    Case("gradient reversal", reversed_gradient, (X,), {}, "FAIL", "the sign"),
    Case("gradient reversal, declared", reversed_gradient, (X,), {"reference": lambda x: -x}, "PASS", "declared"),
    Case(
        "optax cross entropy, rule by hand",
        cross_entropy,
        (X, jnp.asarray([0, 4, 1, 1], jnp.int32)),
        {},
        "PASS",
        "softmax − one-hot; labels get no cotangent",
    ),
    Case(
        "safe division",
        safe_divide,
        (X, jnp.asarray([[0.5, 0, 2, 1, 0.75]] * 4, jnp.float32)),
        {"domain": {1: far_from_zero}},
        "PASS",
        "0 where the divisor is 0, in the value and in both gradients",
    ),
    Case(
        "safe root",
        safe_root,
        (jnp.asarray([0.0, 1.0, 4.0, 0.25], jnp.float32),),
        {"gradient": lambda x: jnp.where(x > 0, 0.5 / jnp.sqrt(jnp.where(x > 0, x, 1)), 0), "domain": (0.0, 100.0)},
        "PASS",
        "0 at 0 by the reference's convention",
    ),
    Case(
        "root behind one where",
        safe_root,
        (jnp.asarray([0.0, 1.0, 4.0, 0.25], jnp.float32),),
        {"gradient": jax.grad(trapped_root), "domain": (0.0, 100.0)},
        "FAIL",
        "NaN at 0: the branch not taken has an infinite slope",
    ),
    Case(
        "xlogy",
        jax.scipy.special.xlogy,
        (X, POSITIVE),
        {"reference": lambda x, y: x * jnp.log(y), "wrt": (0, 1), "domain": {1: (0.1, 10.0)}},
        "PASS",
        "where y > 0 it is the plain product, x = 0 included",
    ),
    Case(
        "jnp.linalg.norm",
        lambda x: jnp.linalg.norm(x, axis=1),
        (POSITIVE,),
        {"reference": lambda x: jnp.sqrt(jnp.einsum("ni,ni->n", x, x)), "domain": (0.1, 10.0)},
        "PASS",
        "x / ‖x‖, away from the kink at 0",
    ),
    Case(
        "jnp.linalg.det",
        jnp.linalg.det,
        (draw(6, 3, 3) / 4 + 3 * np.eye(3, dtype=np.float32),),
        {"reference": determinant, "domain": {0: near_identity}},
        "PASS",
        "the cofactors",
    ),
    Case(
        "jnp.logaddexp",
        jnp.logaddexp,
        (X, X[::-1]),
        {"reference": lambda a, b: jnp.where(a > b, a, b) + jnp.log1p(jnp.exp(-jnp.where(a > b, a - b, b - a)))},
        "PASS",
        "a half each at a tie",
    ),
    Case(
        "jax.checkpoint",
        jax.checkpoint(lambda x: jnp.tanh(x) ** 2),
        (X,),
        {"reference": lambda x: jnp.tanh(x) ** 2},
        "PASS",
        "",
    ),
    Case(
        "flax Dense",
        DENSE.apply,
        ({"params": {"kernel": draw(3, 5, 3), "bias": draw(4, 3)}}, X),
        {"reference": lambda p, x: x @ p["params"]["kernel"] + p["params"]["bias"][None], "wrt": (0, 1)},
        "PASS",
        "an affine map",
    ),
    Case(
        "equinox Linear",
        lambda layer, x: jax.vmap(layer)(x),
        (LINEAR, draw(5, 2, 4)),
        {"reference": lambda layer, x: jnp.einsum("oi,ni->no", layer.weight, x) + layer.bias[None], "wrt": (0, 1)},
        "PASS",
        "an affine map whose parameters are a module",
    ),
]
