"""Wrong rules beside their right twins, by the kind of input or property that shows them: a registry for the checker.

A case has one function and two rules for it. What shows the error is rarely a point that N(0, 1) draws: it is a tie, an
empty mask, another length, a huge cotangent, a second call. Nothing here uses jaxbp.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Fun = Callable[..., Any]


class Subject(NamedTuple):
    """One call ``jaxbp.check(fun, args, **options)``."""

    fun: Any
    args: Any
    options: dict[str, Any]


class Case(NamedTuple):
    """A wrong rule and the right one on the same data; both are built anew at each call: some keep a state."""

    name: str
    kind: str
    wrong: Callable[[], Subject]
    right: Callable[[], Subject]


CASES: list[Case] = []


def n(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def ruled(f: Fun, backward: Fun, forward: Fun | None = None, **how: Any) -> Any:
    """f as a custom_vjp function; without a forward the residuals are the arguments."""
    function = jax.custom_vjp(lambda *args: f(*args), **{k: v for k, v in how.items() if k == "nondiff_argnums"})
    rest = {k: v for k, v in how.items() if k == "symbolic_zeros"}
    function.defvjp(forward or (lambda *args: (f(*args), args)), backward, **rest)
    return function


def vjp(kind: str, name: str, args: Fun, f: Fun, right: Fun, wrong: Fun, **options: Any) -> None:
    """A custom_vjp function: backward rules (residuals, cotangent) ↦ a tuple; the residuals are the arguments."""
    build = [lambda b=b: Subject(ruled(f, b), args(), options) for b in (wrong, right)]
    CASES.append(Case(name, kind, *build))


def grad(kind: str, name: str, args: Fun, f: Fun, right: Fun, wrong: Fun, **options: Any) -> None:
    """A scalar function and its gradient by hand."""
    CASES.append(
        Case(name, kind, *[lambda g=g: Subject(f, args(), {"gradient": g, **options}) for g in (wrong, right)])
    )


def whole(kind: str, name: str, args: Fun, wrong: Fun, right: Fun, **options: Any) -> None:
    """Anything else: factories of the whole function."""
    CASES.append(Case(name, kind, *[lambda b=b: Subject(b(), args(), options) for b in (wrong, right)]))


def both(kind: str, name: str, args: Fun, build: Callable[[bool], Subject]) -> None:
    """Anything at all: build(True) is wrong."""
    CASES.append(Case(name, kind, lambda: build(True), lambda: build(False)))


# Outputs of every kind ------------------------------------------------------------------------------------------------

X8 = lambda: (n(0, 8),)  # noqa: E731


def _fft(x: Array) -> Any:
    return jnp.sum(x**2), jnp.fft.fft(x)


def _fft_back(scale: float) -> Fun:
    return lambda r, g: (2 * r[0] * g[0] + scale * jnp.real(jnp.fft.fft(g[1])).astype(r[0].dtype),)


vjp("complex", "cotangent of a complex output dropped", X8, _fft, _fft_back(1.0), _fft_back(0.0))
vjp(
    "complex",
    "fft: ifft in the backward",
    X8,
    jnp.fft.fft,
    lambda r, g: (jnp.real(jnp.fft.fft(g)).astype(r[0].dtype),),
    lambda r, g: (jnp.real(jnp.fft.ifft(g)).astype(r[0].dtype),),
)
vjp(
    "complex",
    "exp(i x) without conj",
    X8,
    lambda x: jnp.exp(1j * x),
    lambda r, g: (jnp.real(1j * jnp.exp(1j * r[0]) * g).astype(r[0].dtype),),
    lambda r, g: (jnp.real(1j * jnp.conj(jnp.exp(1j * r[0])) * g).astype(r[0].dtype),),
)
C4 = lambda: (n(0, 4) + 1j * n(1, 4),)  # noqa: E731
vjp(
    "complex",
    "z² of a complex argument, conjugated",
    C4,
    lambda z: z**2,
    lambda r, g: (2 * r[0] * g,),
    lambda r, g: (2 * jnp.conj(r[0]) * g,),
)
grad(
    "complex",
    "|z|², the imaginary part lost",
    C4,
    lambda z: jnp.sum(jnp.abs(z) ** 2),
    lambda z: 2 * jnp.conj(z),
    lambda z: 2 * jnp.real(z).astype(z.dtype),
)
vjp(
    "complex",
    "√(|z|² + ε): ε forgotten at 0",
    lambda: "c64[4]",
    lambda z: jnp.sqrt(jnp.real(z) ** 2 + jnp.imag(z) ** 2 + 1e-12),
    lambda r, g: ((g * jnp.conj(r[0]) / jnp.sqrt(jnp.abs(r[0]) ** 2 + 1e-12)).astype(r[0].dtype),),
    lambda r, g: ((g * jnp.conj(r[0]) / jnp.abs(r[0])).astype(r[0].dtype),),
)


def _forward_returns(f: Fun, wrong_value: Fun, backward: Fun) -> list[Fun]:
    return [lambda: ruled(f, backward, lambda *a: (wrong_value(*a), a)), lambda: ruled(f, backward)]


whole(
    "integer outputs",
    "argmax + 1 from the forward",
    lambda: (n(0, 4, 5),),
    *_forward_returns(
        lambda x: (x.max(-1), x.argmax(-1)),
        lambda x: (x.max(-1), x.argmax(-1) + 1),
        lambda r, g: (g[0][:, None] * (jnp.arange(5) == r[0].argmax(-1)[:, None]),),
    ),
)
whole(
    "integer outputs",
    "the mask from the forward negated",
    X8,
    *_forward_returns(
        lambda x: (jnp.where(x > 0, x, 0), x > 0),
        lambda x: (jnp.where(x > 0, x, 0), x <= 0),
        lambda r, g: (jnp.where(r[0] > 0, g[0], 0),),
    ),
)
whole(
    "integer outputs",
    "counts from the forward one step late",
    X8,
    *_forward_returns(
        lambda x: (x**2, jnp.cumsum((x > 0).astype(jnp.int32))),
        lambda x: (x**2, jnp.cumsum((x > 0).astype(jnp.int32)) - (x > 0).astype(jnp.int32)),
        lambda r, g: (2 * r[0] * g[0],),
    ),
)
grad(
    "value",
    "the function is twice its reference",
    X8,
    lambda x: 2 * jnp.sum(jnp.sin(x)),
    lambda x: 2 * jnp.cos(x),
    lambda x: jnp.cos(x),
    reference=None,
)
both(
    "value",
    "value_and_grad: value doubled",
    X8,
    lambda bad: Subject(
        lambda x: jnp.sum(jnp.sin(x)),
        X8(),
        {"value_and_grad": lambda x: ((2 if bad else 1) * jnp.sum(jnp.sin(x)), jnp.cos(x))},
    ),
)
both(
    "value",
    "reference= differs in value",
    X8,
    lambda bad: Subject(
        ruled(lambda x: jnp.sin(x) + (0.1 if bad else 0.0), lambda r, g: (g * jnp.cos(r[0]),)),
        X8(),
        {"reference": jnp.sin},
    ),
)
whole(
    "value",
    "auxiliary of the forward stale",
    X8,
    *_forward_returns(
        lambda x: {"y": jnp.sin(x), "norm": jnp.sum(x**2)},
        lambda x: {"y": jnp.sin(x), "norm": jnp.sum(x)},
        lambda r, g: (jnp.cos(r[0]) * g["y"] + 2 * r[0] * g["norm"],),
    ),
)
both(
    "value",
    "primal wrong, forward right, reference right",
    X8,
    lambda bad: Subject(
        ruled(
            (lambda x: 1.01 * jnp.tanh(x)) if bad else jnp.tanh,
            lambda y, g: (g * (1 - y * y),),
            lambda x: (jnp.tanh(x),) * 2,
        ),
        X8(),
        {"reference": jnp.tanh},
    ),
)
both(
    "value",
    "gradient: its auxiliary is counted anew",
    None,
    lambda bad: Subject(
        lambda w: (jnp.sum(w**2), {"positive": jnp.sum(w > 0), "norm": jnp.sum(jnp.abs(w))}),
        X8(),
        {"gradient": lambda w: (2 * w, {"positive": jnp.sum(w > 0) + bad, "norm": jnp.sum(jnp.abs(w))})},
    ),
)
whole(
    "value",
    "forward: divided by the example's 4",
    lambda: "f32[4]",
    *_forward_returns(lambda x: jnp.mean(x**2), lambda x: jnp.sum(x**2) / 4, lambda r, g: (2 * g * r[0] / r[0].size,)),
)

# Ties and kinks -------------------------------------------------------------------------------------------------------


def _pool(x: Array) -> Array:
    return x.reshape(-1, 4).max(-1)


def _pool_first(r: Any, g: Array) -> Any:
    h = r[0].reshape(-1, 4)
    return (((jnp.arange(4) == h.argmax(-1)[:, None]) * g[:, None]).astype(g.dtype).reshape(-1),)


def _pool_all(r: Any, g: Array) -> Any:
    h = r[0].reshape(-1, 4)
    return (((h == h.max(-1, keepdims=True)) * g[:, None]).astype(g.dtype).reshape(-1),)


TIED = lambda: (jnp.asarray([1.0, 1, 0, -1, 2, 2, 2, 0, 3, 1, 0, 0], jnp.float32),)  # noqa: E731
vjp("ties", "max-pool: every tie gets everything, tied example", TIED, _pool, _pool_first, _pool_all)
vjp("ties", "max-pool: every tie gets everything, no ties given", lambda: (n(0, 12),), _pool, _pool_first, _pool_all)
vjp(
    "ties",
    "row maximum: ties get twice their part",
    lambda: "f32[3,4]",
    lambda x: x.max(-1),
    lambda r, g: (((m := r[0] == r[0].max(-1, keepdims=True)) * (g / m.sum(-1))[:, None]).astype(g.dtype),),
    lambda r, g: (
        (
            jnp.where((m := r[0] == r[0].max(-1, keepdims=True)).sum(-1, keepdims=True) > 1, 2, 1)
            * m
            * (g / m.sum(-1))[:, None]
        ).astype(g.dtype),
    ),
)


def _running(x: Array) -> Array:
    return lax.cummax(x, axis=0)


def _running_back(everyone: bool) -> Fun:
    def back(r: Any, g: Array) -> Any:
        x, y = r[0], _running(r[0])
        k = jnp.arange(x.shape[0])
        before = (k[:, None] >= k[None]) & (x[None] == y[:, None])  # [t, s]: s holds the maximum up to t
        if not everyone:
            before &= jnp.cumsum(before, axis=1) == 1
        return (jnp.sum(before * g[:, None], 0).astype(g.dtype),)

    return back


vjp(
    "ties",
    "running maximum: every tie gets everything",
    lambda: "f32[9]",
    _running,
    _running_back(False),
    _running_back(True),
)
vjp(
    "ties",
    "minimum of two: equal arguments both get everything",
    lambda: "f32[6] f32[6]",
    jnp.minimum,
    lambda r, g: (g * (r[0] < r[1]) + g * (r[0] == r[1]) / 2, g * (r[1] < r[0]) + g * (r[0] == r[1]) / 2),
    lambda r, g: (g * (r[0] <= r[1]), g * (r[1] <= r[0])),
)
vjp(
    "ties",
    "norm of the largest: ties counted",
    lambda: "f32[6]",
    lambda x: jnp.max(jnp.abs(x)),
    lambda r, g: (g * jnp.sign(r[0]) * (m := jnp.abs(r[0]) == jnp.max(jnp.abs(r[0]))) / m.sum(),),
    lambda r, g: (g * jnp.sign(r[0]) * (jnp.abs(r[0]) == jnp.max(jnp.abs(r[0]))),),
)
for slope in (2.0, -1.0):
    vjp(
        "kinks",
        f"max(x, 0) with slope {slope} at 0",
        lambda: "f32[9]",
        lambda x: jnp.maximum(x, 0),
        lambda r, g: (jnp.where(r[0] > 0, g, 0),),
        lambda r, g, k=slope: (jnp.where(r[0] > 0, g, jnp.where(r[0] == 0, k * g, 0)),),
    )
for slope in (2.9, -1.5):
    vjp(
        "kinks",
        f"|x| with slope {slope} at 0",
        lambda: "f32[9]",
        jnp.abs,
        lambda r, g: (jnp.sign(r[0]) * g,),
        lambda r, g, k=slope: (jnp.where(r[0] == 0, k * g, jnp.sign(r[0]) * g),),
    )
vjp(
    "kinks",
    "clip with slope 2 at its bounds",
    lambda: "f32[9]",
    lambda x: jnp.clip(x, -1, 1),
    lambda r, g: (jnp.where(jnp.abs(r[0]) < 1, g, 0),),
    lambda r, g: (jnp.where(jnp.abs(r[0]) < 1, g, jnp.where(jnp.abs(r[0]) == 1, 2 * g, 0)),),
)
vjp(
    "kinks",
    "hinge max(0, 1 − x) with slope 3 at 1",
    lambda: "f32[5]",
    lambda x: jnp.maximum(0, 1 - x),
    lambda r, g: (jnp.where(r[0] < 1, -g, 0),),
    lambda r, g: (jnp.where(r[0] < 1, -g, jnp.where(r[0] == 1, 3 * g, 0)),),
)
vjp(
    "kinks",
    "relu6: slope −1 at 6",
    lambda: "f32[5]",
    lambda x: jnp.minimum(jnp.maximum(x, 0), 6),
    lambda r, g: (jnp.where((r[0] > 0) & (r[0] < 6), g, 0),),
    lambda r, g: (jnp.where((r[0] > 0) & (r[0] < 6), g, jnp.where(r[0] == 6, -g, 0)),),
)
vjp(
    "kinks",
    "where(x > 0.3, x, 0): slope kept below the threshold's float",
    lambda: "f32[6]",
    lambda x: jnp.where(x > 0.3, x, 0),
    lambda r, g: (jnp.where(r[0] > 0.3, g, 0),),
    lambda r, g: (jnp.where(r[0] > 0.2999, g, 0),),
)

# Points never tried ---------------------------------------------------------------------------------------------------


def _factor(where: Fun, by: float = 1.5) -> tuple[Fun, Fun]:
    """sin's rule, and the same off by a factor where a condition holds."""
    right = lambda r, g: (g * jnp.cos(r[0]),)  # noqa: E731
    return right, lambda r, g: (g * jnp.cos(r[0]) * jnp.where(where(r[0]), by, 1).astype(g.dtype),)


for name, where in {
    "x > 20": lambda x: x > 20,
    "|x| > 1000": lambda x: jnp.abs(x) > 1000,
    "|x| > 1e6": lambda x: jnp.abs(x) > 1e6,
    "0 < |x| < 1e-5": lambda x: (x != 0) & (jnp.abs(x) < 1e-5),
    "0 < |x| < 1e-12": lambda x: (x != 0) & (jnp.abs(x) < 1e-12),
    "x = 1": lambda x: x == 1,
    "x an integer": lambda x: (x == jnp.round(x)) & (x != 0),
    "x = ½": lambda x: x == 0.5,
    "3.1 < x < 3.2": lambda x: (x > 3.1) & (x < 3.2),
    "−7.25 < x < −7.2": lambda x: (x > -7.25) & (x < -7.2),
}.items():
    vjp("magnitudes", f"sin: 1.5 × where {name}", lambda: "f32[4]", jnp.sin, *_factor(where))


def _rows(condition: Fun, by: float = 1.5) -> tuple[Fun, Fun, Fun]:
    """x ↦ x / √(‖x‖² + 1) a row, and its rule off by a factor in the rows where a condition on the row holds."""
    f = lambda x: x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1)  # noqa: E731

    def right(r: Any, g: Array) -> Any:
        s = jnp.sqrt(jnp.sum(r[0] ** 2, -1, keepdims=True) + 1)
        return (g / s - r[0] * jnp.sum(g * r[0], -1, keepdims=True) / s**3,)

    return f, right, lambda r, g: (right(r, g)[0] * jnp.where(condition(r[0])[:, None], by, 1).astype(g.dtype),)


for name, condition in {
    "a zero row": lambda x: jnp.all(x == 0, -1),
    "a constant row": lambda x: jnp.all(x == x[:, :1], -1) & jnp.any(x != 0, -1),
    "a row equal to the one before": lambda x: jnp.all(x == jnp.roll(x, 1, 0), -1) & jnp.any(x != 0, -1),
    "a large mean": lambda x: jnp.mean(x, -1) > 50 * jnp.std(x, -1) + 1e-3,
    "all of one sign": lambda x: jnp.all(x > 0, -1),
    "a one-hot row": lambda x: jnp.sum(x != 0, -1) == 1,
    "increasing rows": lambda x: jnp.all(jnp.diff(x, axis=-1) > 0, -1),
}.items():
    vjp("rows", f"1.5 × for {name}", lambda: "f32[4,5]", *_rows(condition))
vjp(
    "rows",
    "layer norm: ε outside the root (a constant row)",
    lambda: (n(0, 4, 6),),
    lambda x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5),
    lambda r, g: _norm_back(r[0], g, lambda v: lax.rsqrt(v + 1e-5)),
    lambda r, g: _norm_back(r[0], g, lambda v: 1 / (jnp.sqrt(v) + 1e-5)),
)


def _norm_back(x: Array, g: Array, inverse: Fun) -> Any:
    c = x - x.mean(-1, keepdims=True)
    i = inverse(x.var(-1, keepdims=True))
    y = c * i
    return (i * (g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True)),)


vjp(
    "rows",
    "distance of coincident points: NaN",
    lambda: (n(0, 3, 2), n(1, 3, 2)),
    lambda a, b: jnp.sum((a - b) ** 2, -1) / (1 + jnp.sqrt(jnp.sum((a - b) ** 2, -1) + 1e-12)),
    lambda r, g: _distance_back(*r, g, 1e-12),
    lambda r, g: _distance_back(*r, g, 0.0),
)


def _distance_back(a: Array, b: Array, g: Array, eps: float) -> Any:
    q = jnp.sum((a - b) ** 2, -1)
    s = jnp.sqrt(q + eps)
    d = (g * (1 / (1 + s) - q / (1 + s) ** 2 / (2 * s)))[:, None] * 2 * (a - b)
    return d, -d


def _masked(x: Array, m: Array) -> Array:
    return jnp.sum(x * m) / jnp.maximum(jnp.sum(m), 1)


MASK = lambda: (n(0, 6), jnp.asarray([1, 0, 1, 1, 0, 1], jnp.int32))  # noqa: E731
MASK_TEXT = lambda: "f32[6] i32[6]{0..1}"  # noqa: E731
for name, args in {"given": MASK, "drawn": MASK_TEXT}.items():
    vjp(
        "masks",
        f"masked mean: NaN for an empty mask, {name}",
        args,
        _masked,
        lambda r, g: (g * r[1] / jnp.maximum(jnp.sum(r[1]), 1).astype(g.dtype), None),
        lambda r, g: (g * r[1] / jnp.sum(r[1]).astype(g.dtype), None),
    )
    vjp(
        "masks",
        f"masked mean: 2 × for a full mask, {name}",
        args,
        _masked,
        lambda r, g: (g * r[1] / jnp.maximum(jnp.sum(r[1]), 1).astype(g.dtype), None),
        lambda r, g: (
            g * r[1] / jnp.maximum(jnp.sum(r[1]), 1).astype(g.dtype) * jnp.where(jnp.all(r[1] == 1), 2, 1),
            None,
        ),
    )


def _ignoring(z: Array, y: Array) -> Array:
    nll = jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, jnp.maximum(y, 0)[:, None], -1)[:, 0]
    return jnp.sum(jnp.where(y >= 0, nll, 0))


def _ignoring_back(forget: bool) -> Fun:
    def back(r: Any, g: Array) -> Any:
        z, y = r
        d = jax.nn.softmax(z) - jax.nn.one_hot(jnp.maximum(y, 0), z.shape[-1], dtype=z.dtype)
        return g * (d if forget else jnp.where((y >= 0)[:, None], d, 0)), None

    return back


vjp(
    "masks",
    "the ignored label −1 counts",
    lambda: "f32[4,3] i32[4]{-1..2}",
    _ignoring,
    _ignoring_back(False),
    _ignoring_back(True),
)
vjp(
    "masks",
    "the ignored label −1 counts, none in the example",
    lambda: (n(0, 4, 3), jnp.asarray([0, 1, 2, 1], jnp.int32)),
    _ignoring,
    _ignoring_back(False),
    _ignoring_back(True),
)


def _void(y: Array) -> Array:
    return y == 255


def _segmenting(z: Array, y: Array) -> Array:
    chosen = jnp.take_along_axis(z, jnp.where(_void(y), 0, y)[:, None], -1)[:, 0]
    return jnp.sum(jnp.where(_void(y), 0, jax.nn.logsumexp(z, -1) - chosen))


def _segmenting_back(forget: bool) -> Fun:
    def back(r: Any, g: Array) -> Any:
        z, y = r
        d = jax.nn.softmax(z) - jax.nn.one_hot(jnp.where(_void(y), 0, y), z.shape[-1], dtype=z.dtype)
        return g * (d if forget else jnp.where(_void(y)[:, None], 0, d)), None

    return back


vjp(
    "masks",
    "the ignored label 255 counts, none in the example",
    lambda: (n(0, 4, 3), jnp.asarray([0, 1, 2, 1], jnp.int32)),
    _segmenting,
    _segmenting_back(False),
    _segmenting_back(True),
)
vjp(
    "masks",
    "the ignored label 255 counts, beyond the range that is said",
    lambda: "f32[4,3] i32[4]{0..2}",
    _segmenting,
    _segmenting_back(False),
    _segmenting_back(True),
)


def _take(t: Array, i: Array) -> Array:
    return t[jnp.clip(i, 0, t.shape[0] - 1)]


def _take_back(clip: bool, add: bool) -> Fun:
    def back(r: Any, g: Array) -> Any:
        t, i = r
        i = jnp.clip(i, 0, t.shape[0] - 1) if clip else i
        z = jnp.zeros_like(t).at[i]
        return (z.add(g, mode="drop") if add else z.set(g, mode="drop")), None

    return back


IDS = lambda: (n(0, 5, 2), jnp.asarray([0, 3, 1], jnp.int32))  # noqa: E731
vjp(
    "indices",
    "clamped ids dropped",
    lambda: "f32[5,2] i32[4]{0..9}",
    _take,
    _take_back(True, True),
    _take_back(False, True),
)
vjp("indices", "clamped ids dropped, none in the example", IDS, _take, _take_back(True, True), _take_back(False, True))
vjp(
    "indices",
    "repeated ids set instead of added, none in the example",
    IDS,
    _take,
    _take_back(True, True),
    _take_back(True, False),
)
vjp(
    "indices",
    "the last row is never written",
    lambda: "f32[5,2] i32[3]{0..4}",
    lambda t, i: t[i],
    lambda r, g: (jnp.zeros_like(r[0]).at[r[1]].add(g), None),
    lambda r, g: (jnp.zeros_like(r[0]).at[r[1]].add(g).at[4].set(0), None),
)
vjp(
    "indices",
    "padding id 0 in the example's range, wrong when it comes",
    lambda: (n(0, 5, 2), jnp.asarray([2, 3, 1], jnp.int32)),
    lambda t, i: t[i],
    lambda r, g: (jnp.zeros_like(r[0]).at[r[1]].add(g), None),
    lambda r, g: (jnp.zeros_like(r[0]).at[r[1]].add(g).at[0].set(0), None),
)
vjp(
    "indices",
    "segment sum: an id equal to the number of segments wraps",
    lambda: "f32[6] i32[6]{0..3}",
    lambda x, i: jnp.zeros(3, x.dtype).at[i].add(x, mode="drop"),
    lambda r, g: (jnp.where(r[1] < 3, g[jnp.minimum(r[1], 2)], 0), None),
    lambda r, g: (g[r[1] % 3], None),
)

# Shapes never tried ---------------------------------------------------------------------------------------------------


def _by_shape(condition: Fun, by: float = 1.5) -> tuple[Fun, Fun]:
    right = lambda r, g: (g * jnp.cos(r[0]),)  # noqa: E731
    return right, lambda r, g: (g * jnp.cos(r[0]) * (by if condition(r[0].shape) else 1.0),)


for name, (text, condition) in {
    "a batch of 1": ("f32[4,3]", lambda s: s[0] == 1),
    "an odd batch": ("f32[4,3]", lambda s: s[0] % 2 == 1),
    "a batch above 4": ("f32[4,3]", lambda s: s[0] > 4),
    "length 1": ("f32[8]", lambda s: s[0] == 1),
    "a remainder of blocks of 4": ("f32[8]", lambda s: s[0] % 4 != 0),
    "one more axis": ("f32[3,4]", lambda s: len(s) == 3),
    "one axis less": ("f32[3,4]", lambda s: len(s) == 1),
    "a scalar": ("f32[4]", lambda s: s == ()),
    "N = 1 (N − 1 in the denominator)": ("f32[3,4]", lambda s: s[0] == 1),
}.items():
    vjp("shapes", f"sin: 1.5 × for {name}", lambda text=text: text, jnp.sin, *_by_shape(condition))


def _blocked(x: Array) -> Array:
    return jnp.sum(jnp.sin(x) ** 2)


def _blocked_grad(x: Array, wrong: bool) -> Array:
    g = jnp.sin(2 * x)
    whole_blocks = x.shape[0] // 4 * 4
    return g if not wrong else jnp.concatenate([g[:whole_blocks], jnp.zeros_like(g[whole_blocks:])])


grad(
    "shapes",
    "the remainder of the blocks gets no gradient",
    lambda: "f32[8]",
    _blocked,
    lambda x: _blocked_grad(x, False),
    lambda x: _blocked_grad(x, True),
)
vjp(
    "shapes",
    "mean over the example's N",
    lambda: "f32[6,2]",
    lambda x: jnp.mean(x**2, 0),
    lambda r, g: (2 * r[0] * g / r[0].shape[0],),
    lambda r, g: (2 * r[0] * g / 6,),
)
vjp(
    "shapes",
    "x wᵀ: transposed only for square w",
    lambda: "f32[4,3] f32[2,3]",
    lambda x, w: x @ w.T,
    lambda r, g: (g @ r[1], g.T @ r[0]),
    lambda r, g: (g @ (r[1].T if r[1].shape[0] == r[1].shape[1] else r[1]), g.T @ r[0]),
)
vjp(
    "shapes",
    "softmax: one class is not 0",
    lambda: "f32[4,3]",
    jax.nn.softmax,
    lambda r, g: ((p := jax.nn.softmax(r[0])) * (g - (p * g).sum(-1, keepdims=True)),),
    lambda r, g: ((p := jax.nn.softmax(r[0])) * (g - (p * g).sum(-1, keepdims=True) * (r[0].shape[-1] > 1)),),
)
vjp(
    "shapes",
    "bias: one more axis of x is not summed",
    lambda: "f32[4,3] f32[3]",
    lambda x, b: jnp.tanh(x + b),
    lambda r, g: (d := g * (1 - jnp.tanh(r[0] + r[1]) ** 2), d.reshape(-1, 3).sum(0)),
    lambda r, g: (d := g * (1 - jnp.tanh(r[0] + r[1]) ** 2), d[(0,) * (d.ndim - 2)].reshape(-1, 3).sum(0)),
)

# Dtypes ---------------------------------------------------------------------------------------------------------------


def _scaled(x: Array, w: Array) -> Array:
    return x * w.astype(x.dtype)


BF = jnp.bfloat16
MIXED = lambda: (n(0, 4, 8, dtype=BF), 1 + n(1, 8))  # noqa: E731
vjp(
    "mixed dtypes",
    "dscale in bf16 for a float32 scale",
    MIXED,
    _scaled,
    lambda r, g: (g * r[1].astype(g.dtype), jnp.sum((g * r[0]).astype(jnp.float32), 0).astype(r[1].dtype)),
    lambda r, g: (g * r[1].astype(g.dtype), jnp.sum(g * r[0], 0)),
)
vjp(
    "mixed dtypes",
    "dx in float32 for a bf16 x",
    MIXED,
    _scaled,
    lambda r, g: (g * r[1].astype(g.dtype), jnp.sum((g * r[0]).astype(jnp.float32), 0).astype(r[1].dtype)),
    lambda r, g: (
        g.astype(jnp.float32) * r[1].astype(jnp.float32),
        jnp.sum((g * r[0]).astype(jnp.float32), 0).astype(r[1].dtype),
    ),
)


def _dense(x: Array, w: Array) -> Array:
    return (x.astype(w.dtype) @ w).astype(x.dtype)


def _dense_back(scale: float) -> Fun:
    def back(r: Any, g: Array) -> Any:
        x, w = r
        u = g.astype(w.dtype)
        return (u @ w.T).astype(x.dtype), (x.astype(w.dtype).T @ u) * (scale if x.dtype != w.dtype else 1)

    return back


vjp(
    "mixed dtypes",
    "loss scale left in dw when x is shorter",
    lambda: (n(0, 4, 3, dtype=BF), n(1, 3, 2)),
    _dense,
    _dense_back(1.0),
    _dense_back(1.25),
)
for short in (BF, jnp.float16):
    for factor in (1.1, 0.9):
        vjp(
            "short dtypes",
            f"{factor} × in {jnp.dtype(short).name} only",
            lambda: "f32[32]",
            jnp.sin,
            lambda r, g: (g * jnp.cos(r[0]),),
            lambda r, g, s=short, k=factor: (g * jnp.cos(r[0]) * (k if g.dtype == s else 1),),
        )
vjp(
    "short dtypes",
    "running sum in bf16",
    lambda: (n(0, 512, 2, dtype=BF),),
    lambda x: jnp.sum(x.astype(jnp.float32) ** 2, 0),
    lambda r, g: ((2 * r[0].astype(jnp.float32) * g).astype(r[0].dtype),),
    lambda r, g: (
        (
            2
            * r[0].astype(jnp.float32)
            * lax.scan(lambda c, t: (c + t, None), jnp.zeros((), BF), jnp.full(512, 1 / 512, BF))[0].astype(jnp.float32)
            * g
        ).astype(r[0].dtype),
    ),
)
vjp(
    "short dtypes",
    "bias summed in bf16 one by one",
    lambda: (n(0, 256, 3, dtype=BF) + 1, n(1, 3, dtype=BF)),
    lambda x, b: x + b,
    lambda r, g: (g, jnp.sum(g.astype(jnp.float32), 0).astype(g.dtype)),
    lambda r, g: (g, lax.scan(lambda c, t: (c + t, None), jnp.zeros(3, g.dtype), g)[0] * (1 if g.dtype != BF else 1.3)),
)
vjp(
    "short dtypes",
    "bias of 512 rows summed in bf16 one by one",
    lambda: (n(0, 512, 2, dtype=BF), n(1, 2, dtype=BF)),
    lambda x, b: x + b,
    lambda r, g: (g, jnp.sum(g.astype(jnp.float32), 0).astype(g.dtype)),
    lambda r, g: (g, lax.scan(lambda c, t: (c + t, None), jnp.zeros(2, g.dtype), g)[0]),
)
vjp(
    "short dtypes",
    "float16: a loss scale of 1024 overflows",
    lambda: "f16[4,8] f16[8,6]",
    lambda x, w: x @ w,
    lambda r, g: (g @ r[1].T, r[0].T @ g),
    lambda r, g: ((1024 * g) @ r[1].T / 1024, r[0].T @ g),
)
vjp(
    "magnitudes",
    "float32: x² overflows in the slope of hypot",
    lambda: "f32[5] f32[5]",
    lambda x, y: (m := lax.stop_gradient(jnp.maximum(x, y))) * jnp.sqrt((x / m) ** 2 + (y / m) ** 2),
    lambda r, g: tuple(g * a / ((m := jnp.maximum(*r)) * jnp.sqrt((r[0] / m) ** 2 + (r[1] / m) ** 2)) for a in r),
    lambda r, g: tuple(g * a / jnp.sqrt(r[0] ** 2 + r[1] ** 2) for a in r),
    domain="positive",
)
vjp(
    "short dtypes",
    "float16: x⁴ overflows on the way",
    lambda: (n(0, 8, dtype=jnp.float16) * 40,),
    lambda x: x / jnp.sqrt(1 + (x / 64) ** 2),
    lambda r, g: (g / (s := jnp.sqrt(1 + (r[0] / 64) ** 2)) / s / s,),
    lambda r, g: (g * jnp.where(r[0] ** 4 < jnp.inf, 1, 0) / (s := jnp.sqrt(1 + (r[0] / 64) ** 2)) / s / s,),
)
vjp(
    "short dtypes",
    "float32 only: 1e-3 off",
    lambda: "f32[8]",
    jnp.tanh,
    lambda r, g: (g * (1 - jnp.tanh(r[0]) ** 2),),
    lambda r, g: (g * (1 - jnp.tanh(r[0]) ** 2) * (1.001 if g.dtype == jnp.float32 else 1),),
)

# Cotangents -----------------------------------------------------------------------------------------------------------

COS = lambda r, g: (g * jnp.cos(r[0]),)  # noqa: E731
for name, wrong in {
    "clipped at ±1e8": lambda r, g: (jnp.clip(g, -1e8, 1e8) * jnp.cos(r[0]),),
    "clipped at ±1e12 in the result": lambda r, g: (jnp.clip(g * jnp.cos(r[0]), -1e12, 1e12),),
    "flushed below 1e-10": lambda r, g: (jnp.where(jnp.abs(g) < 1e-10, 0, g) * jnp.cos(r[0]),),
    "NaN swallowed": lambda r, g: (jnp.nan_to_num(g) * jnp.cos(r[0]),),
    "inf made 0": lambda r, g: (jnp.where(jnp.isfinite(g), g, 0) * jnp.cos(r[0]),),
    "NaN swallowed in the result": lambda r, g: (jnp.nan_to_num(g * jnp.cos(r[0])),),
    "absolute value at one-hot": lambda r, g: (jnp.where(jnp.sum(g != 0) == 1, jnp.abs(g), g) * jnp.cos(r[0]),),
    "normalised": lambda r, g: (g / jnp.maximum(jnp.sqrt(jnp.sum(g**2)), 1) * jnp.cos(r[0]) * jnp.maximum(1, 1),),
    "all negative: doubled": lambda r, g: (g * jnp.where(jnp.all(g < 0), 2, 1) * jnp.cos(r[0]),),
    "constant cotangent: doubled": lambda r, g: (g * jnp.where(jnp.all(g == g[0]), 2, 1) * jnp.cos(r[0]),),
}.items():
    vjp("cotangents", f"sin: cotangent {name}", lambda: "f32[4]", jnp.sin, COS, wrong)


def _batched(fun: Fun, wrong: Fun, by: float = 1.5) -> Any:
    mapped = jax.custom_batching.custom_vmap(fun)

    def rule(size: int, batched: Any, *args: Any) -> Any:
        out = jax.vmap(fun, in_axes=[0 if b else None for b in batched], axis_size=size)(*args)
        return out * (by if wrong(batched) else 1.0), True

    mapped.def_vmap(rule)
    return mapped


def vmapped(name: str, args: str, f: Fun, parts: Callable[[Fun], Fun], inner: Fun, wrong: Fun) -> None:
    def build(bad: bool) -> Subject:
        return Subject(ruled(f, parts(_batched(inner, wrong if bad else lambda b: False))), args, {})

    both("vmap", name, None, build)


vmapped(
    "cotangent batched",
    "f32[4]",
    jnp.sin,
    lambda m: lambda r, g: (m(jnp.cos(r[0]), g),),
    lambda c, g: c * g,
    lambda b: b[1],
)
vmapped(
    "cotangent batched alone",
    "f32[4]",
    jnp.sin,
    lambda m: lambda r, g: (m(jnp.cos(r[0]), g),),
    lambda c, g: c * g,
    lambda b: b[1] and not b[0],
)
vmapped(
    "primal batched alone",
    "f32[4]",
    jnp.sin,
    lambda m: lambda r, g: (m(jnp.cos(r[0]), g),),
    lambda c, g: c * g,
    lambda b: b[0] and not b[1],
)
vmapped(
    "ids batched alone",
    "f32[5,2] i32[4]{0..4}",
    lambda t, i: t[i],
    lambda m: lambda r, g: (m(r[0], r[1], g), None),
    lambda t, i, g: jnp.zeros_like(t).at[i].add(g),
    lambda b: b[1] and not b[0],
)
vmapped(
    "argument 1 batched alone",
    "f32[4] f32[4]",
    lambda a, b: jnp.sin(a) * jnp.sin(b),
    lambda m: lambda r, g: (m(jnp.cos(r[0]), jnp.sin(r[1]), g), m(jnp.sin(r[0]), jnp.cos(r[1]), g)),
    lambda a, b, g: a * b * g,
    lambda b: b[1] and not b[0],
)
vmapped(
    "everything batched",
    "f32[4] f32[4]",
    lambda a, b: a * b,
    lambda m: lambda r, g: (m(r[1], g), m(r[0], g)),
    lambda a, g: a * g,
    lambda b: all(b),
)

# Forward mode ---------------------------------------------------------------------------------------------------------


def jvp_ruled(f: Fun, rule: Fun) -> Any:
    function = jax.custom_jvp(lambda *args: f(*args))
    function.defjvp(rule)
    return function


def jvp(kind: str, name: str, args: Fun, f: Fun, right: Fun, wrong: Fun, **options: Any) -> None:
    CASES.append(Case(name, kind, *[lambda b=b: Subject(jvp_ruled(f, b), args(), options) for b in (wrong, right)]))


jvp(
    "custom_jvp",
    "sin: 2 ×",
    lambda: "f32[4]",
    jnp.sin,
    lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0])),
    lambda p, t: (jnp.sin(p[0]), 2 * t[0] * jnp.cos(p[0])),
)
jvp(
    "custom_jvp",
    "x y: one tangent lost",
    lambda: "f32[4] f32[4]",
    lambda x, y: x * y,
    lambda p, t: (p[0] * p[1], t[0] * p[1] + p[0] * t[1]),
    lambda p, t: (p[0] * p[1], t[0] * p[1]),
)
jvp(
    "custom_jvp",
    "value of the rule is not the function's",
    lambda: "f32[4]",
    jnp.sin,
    lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0])),
    lambda p, t: (1.01 * jnp.sin(p[0]), t[0] * jnp.cos(p[0])),
)
jvp(
    "custom_jvp",
    "not linear in the tangent",
    lambda: "f32[4]",
    jnp.sin,
    lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0])),
    lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0]) + 0.1 * t[0] ** 2),
)
jvp(
    "custom_jvp",
    "wrong where x > 20",
    lambda: "f32[4]",
    jnp.sin,
    lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0])),
    lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0]) * jnp.where(p[0] > 20, 1.5, 1).astype(t[0].dtype)),
)
jvp(
    "custom_jvp",
    "log1p(x) differentiated as log",
    lambda: "f32[4]",
    lambda x: jnp.log1p(x**2),
    lambda p, t: (jnp.log1p(p[0] ** 2), 2 * p[0] * t[0] / (1 + p[0] ** 2)),
    lambda p, t: (jnp.log1p(p[0] ** 2), 2 * t[0] / p[0]),
)


def _beside(bad: bool) -> Subject:
    good = ruled(jnp.sin, COS)
    forward = jvp_ruled(jnp.tanh, lambda p, t: (jnp.tanh(p[0]), t[0] * (1 - jnp.tanh(p[0]) ** 2) * (1.1 if bad else 1)))
    return Subject(lambda x: good(x) + forward(x), "f32[5]", {})


def _inside(bad: bool) -> Subject:
    forward = jvp_ruled(jnp.tanh, lambda p, t: (jnp.tanh(p[0]), t[0] * (1 - jnp.tanh(p[0]) ** 2) * (1.1 if bad else 1)))
    return Subject(lambda x, w: ruled(jnp.sin, COS)(forward(x) @ w), (n(0, 3, 4), n(1, 4, 2)), {})


def _one_jvp_of_two(bad: bool) -> Subject:
    first = jvp_ruled(jnp.exp, lambda p, t: (jnp.exp(p[0]), t[0] * jnp.exp(p[0])))
    second = jvp_ruled(jnp.cos, lambda p, t: (jnp.cos(p[0]), (1 if bad else -1) * t[0] * jnp.sin(p[0])))
    return Subject(lambda x: first(second(x)), "f32[5]", {})


both("custom_jvp", "a wrong custom_jvp beside a right custom_vjp", None, _beside)
both("custom_jvp", "a wrong custom_jvp before a right custom_vjp", None, _inside)
both("custom_jvp", "the second of two custom_jvp", None, _one_jvp_of_two)

# Higher order ---------------------------------------------------------------------------------------------------------


def _cut(f: Fun, slope: Fun) -> Callable[[bool], Subject]:
    def build(bad: bool) -> Subject:
        keep = lax.stop_gradient if bad else lambda x: x
        return Subject(ruled(f, lambda r, g: (g * r,), lambda x: (f(x), keep(slope(x)))), "f32[4]", {"level": "full"})

    return build


both("second order", "what is kept is cut off", None, _cut(jnp.sin, jnp.cos))
both("second order", "cut off, tanh", None, _cut(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2))
both(
    "second order",
    "the slope's own derivative wrong",
    None,
    lambda bad: Subject(
        ruled(
            jnp.sin, lambda r, g: (g * (ruled(jnp.cos, lambda r, g: (g * jnp.sin(r[0]) * (1 if bad else -1),)))(r[0]),)
        ),
        "f32[4]",
        {"level": "full"},
    ),
)


both(
    "second order",
    "the cotangent cut off",
    None,
    lambda bad: Subject(
        ruled(lambda x: x**2, lambda r, g: (2 * r[0] * (lax.stop_gradient(g) if bad else g),)),
        "f32[4]",
        {"level": "full"},
    ),
)
both(
    "second order",
    "round trip through an integer",
    None,
    lambda bad: Subject(
        ruled(lambda x: x**2, lambda r, g: (2 * g * ((jnp.round(r[0] * 2**20) / 2**20 + 0 * r[0]) if bad else r[0]),)),
        "f32[4]",
        {"level": "full"},
    ),
)

# State ----------------------------------------------------------------------------------------------------------------

NP8 = lambda: (np.random.default_rng(0).standard_normal(8),)  # noqa: E731


def _np_sin(x: Any) -> float:
    return float(np.sum(np.sin(np.asarray(x))))


def _cached(key: Fun) -> Callable[[bool], Subject]:
    def build(bad: bool) -> Subject:
        cache: dict[Any, Any] = {}
        wrong = lambda x: cache.setdefault(key(x), np.cos(x))  # noqa: E731
        return Subject(_np_sin, NP8(), {"gradient": wrong if bad else np.cos})

    return build


both("state", "NumPy: cached by shape and dtype", None, _cached(lambda x: (x.shape, str(x.dtype))))
both("state", "NumPy: cached by the first element", None, _cached(lambda x: float(np.round(x.flat[0], 0))))
both("state", "NumPy: cached by id", None, _cached(id))


def _in_place(x: Any) -> Any:
    x *= 2
    return x


both(
    "state",
    "NumPy: the gradient overwrites its argument",
    None,
    lambda bad: Subject(lambda x: float(np.sum(x**2)), NP8(), {"gradient": _in_place if bad else lambda x: 2 * x}),
)


def _accumulating(bad: bool) -> Subject:
    total = np.zeros(8)

    def gradient(x: Any) -> Any:
        total[:] = total * bad + np.cos(x)
        return total.copy()

    return Subject(_np_sin, NP8(), {"gradient": gradient})


def _same_buffer(bad: bool) -> Subject:
    buffer = np.zeros(8)

    def gradient(x: Any) -> Any:
        buffer[:] = np.cos(x)
        return buffer if bad else buffer.copy()

    return Subject(_np_sin, NP8(), {"gradient": gradient})


def _counted(bad: bool) -> Subject:
    calls: list[int] = []

    def gradient(x: Any) -> Any:
        calls.append(0)
        return np.cos(x) * (1.1 if bad and len(calls) > 2 else 1)

    return Subject(_np_sin, NP8(), {"gradient": gradient})


both("state", "NumPy: gradients accumulate", None, _accumulating)
both("state", "NumPy: one buffer for every result", None, _same_buffer)
both("state", "NumPy: another result from the third call on", None, _counted)


def _callback_state(bad: bool) -> Subject:
    seen: dict[Any, Any] = {}

    def host(x: Any) -> Any:
        x = np.asarray(x)
        return seen.setdefault((x.shape, str(x.dtype)), np.cos(x)) if bad else np.cos(x)

    def back(r: Any, g: Array) -> tuple[Array]:
        return (g * jax.pure_callback(host, jax.ShapeDtypeStruct(g.shape, g.dtype), r[0], vmap_method="sequential"),)

    return Subject(ruled(jnp.sin, back), "f32[4]", {})


both("state", "callback cached by shape", None, _callback_state)

# NumPy pairs ----------------------------------------------------------------------------------------------------------


def _bent(x: Any, where: Any, by: float) -> Any:
    return np.cos(x) * np.where(where, by, 1)


def numpy(name: str, wrong: Fun, right: Fun = np.cos, f: Fun = _np_sin, style: str = "gradient") -> None:
    both("numpy", name, None, lambda bad: Subject(f, NP8(), {style: wrong if bad else right}))


numpy("1 % off for |x| > 3", lambda x: _bent(x, np.abs(x) > 3, 1.01))
numpy("1 % off for x > 50", lambda x: _bent(x, x > 50, 1.01))
numpy("10 % off for 0 < |x| < 1e-4", lambda x: _bent(x, (x != 0) & (np.abs(x) < 1e-4), 1.1))
numpy("NaN at exactly 0", lambda x: np.cos(x) * x / x)
numpy("off by 1e-7", lambda x: np.cos(x) * (1 + 1e-7))
numpy("the fourth element lost", lambda x: np.where(np.arange(8) == 3, 0, np.cos(x)))
numpy("value doubled", lambda x: (2 * _np_sin(x), np.cos(x)), lambda x: (_np_sin(x), np.cos(x)), style="value_and_grad")
numpy("0.1 % off everywhere", lambda x: 1.001 * np.cos(x))
numpy("sign lost where all are positive", lambda x: np.cos(x) * (-1 if np.all(x > 0) else 1))
numpy("the last element of more than 8 lost", lambda x: np.where(np.arange(x.size) == 8, 0, np.cos(x)))
numpy("float32 result, wrong digits", lambda x: np.float32(np.cos(x)).astype(np.float64))

# Accuracy -------------------------------------------------------------------------------------------------------------


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


vjp(
    "accuracy",
    "softplus: exp / (1 + exp) overflows",
    lambda: "f32[8]",
    _softplus,
    lambda r, g: (g * jax.nn.sigmoid(r[0]),),
    lambda r, g: (g * jnp.exp(r[0]) / (1 + jnp.exp(r[0])),),
)
vjp(
    "accuracy",
    "variance in one pass",
    lambda: (n(0, 4, 32) + 300,),
    lambda x: lax.rsqrt(jnp.var(x, -1) + 1e-5),
    lambda r, g: (
        -(g * lax.rsqrt(jnp.var(r[0], -1) + 1e-5) ** 3)[:, None]
        * (r[0] - r[0].mean(-1, keepdims=True))
        / r[0].shape[-1],
    ),
    lambda r, g: (
        -(g * lax.rsqrt((r[0] ** 2).mean(-1) - r[0].mean(-1) ** 2 + 1e-5) ** 3)[:, None]
        * (r[0] - r[0].mean(-1, keepdims=True))
        / r[0].shape[-1],
    ),
)
vjp(
    "accuracy",
    "elu' as y + 1",
    lambda: "f32[8]",
    lambda x: jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1),  # autodiff of jax.nn.elu cancels as well
    lambda r, g: (g * jnp.where(r[0] > 0, 1, jnp.exp(jnp.minimum(r[0], 0))),),
    lambda r, g: (g * jnp.where(r[0] > 0, 1, jnp.expm1(jnp.minimum(r[0], 0)) + 1),),
)
vjp(
    "accuracy",
    "log-softmax: exp of unshifted logits",
    lambda: "f32[3,4]",
    jax.nn.log_softmax,
    lambda r, g: (g - jax.nn.softmax(r[0]) * g.sum(-1, keepdims=True),),
    lambda r, g: (g - jnp.exp(r[0]) / jnp.exp(r[0]).sum(-1, keepdims=True) * g.sum(-1, keepdims=True),),
)
vjp(
    "accuracy",
    "hypot: squares overflow",
    lambda: "f32[6] f32[6]",
    lambda a, b: jnp.hypot(a, b),
    lambda r, g: (g * (r[0] / (h := jnp.maximum(jnp.hypot(*r), 1e-30))), g * (r[1] / h)),
    lambda r, g: (g * r[0] / (h := jnp.sqrt(r[0] ** 2 + r[1] ** 2)), g * r[1] / h),
    domain=(0.5, 1e30),
)
vjp(
    "accuracy",
    "constants of float16",
    lambda: "f32[8]",
    lambda x: jnp.sin(np.pi * x),
    lambda r, g: (np.pi * g * jnp.cos(np.pi * r[0]),),
    lambda r, g: (3.1406 * g * jnp.cos(np.pi * r[0]),),
)
vjp("accuracy", "1e-9 off", lambda: "f32[8]", jnp.sin, COS, lambda r, g: (g * jnp.cos(r[0]) * (1 + 1e-9),))
vjp(
    "accuracy",
    "through float32 for float64 arguments",
    lambda: (n(0, 8, dtype=np.float32),),
    jnp.exp,
    lambda r, g: (g * jnp.exp(r[0]),),
    lambda r, g: ((g.astype(jnp.float32) * jnp.exp(r[0].astype(jnp.float32))).astype(g.dtype),),
    dtypes=("float64",),
)

# Control flow and devices ---------------------------------------------------------------------------------------------


def nested(name: str, args: Any, around: Callable[[Fun], Fun], **options: Any) -> None:
    """A rule for x³ inside something, wrong by a factor."""

    def build(bad: bool) -> Subject:
        rule = ruled(lambda x: x**3, lambda r, g: ((2.9 if bad else 3) * r[0] ** 2 * g,))
        return Subject(around(rule), args() if callable(args) else args, options)

    both("control flow", name, None, build)


nested(
    "in cond", lambda: (jnp.ones(3) + n(0, 3) / 9,), lambda r: lambda x: lax.cond(x.sum() > 0, r, lambda x: 2 * x, x)
)
nested("in switch", lambda: (jnp.int32(0), jnp.ones(3)), lambda r: lambda i, x: lax.switch(i, [r, jnp.sin], x), wrt=1)
nested("in scan", "f32[3,2]", lambda r: lambda x: lax.scan(lambda c, t: (c + r(t) / 8, c), jnp.zeros_like(x[0]), x))
nested("in fori_loop", "f32[3]", lambda r: lambda x: lax.fori_loop(0, 3, lambda i, c: r(c) / 4, x), domain=(-1.5, 1.5))
nested("in map", "f32[3,2]", lambda r: lambda x: lax.map(r, x))
nested("in vmap", "f32[3,2]", lambda r: jax.vmap(r))
nested("in jit of remat", "f32[3]", lambda r: jax.jit(jax.checkpoint(lambda x: jnp.sin(r(x) / 8))))
nested(
    "in shard_map",
    lambda: (jnp.ones(4),),
    lambda r: jax.shard_map(
        r,
        mesh=jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=jax.sharding.PartitionSpec("n"),
        out_specs=jax.sharding.PartitionSpec("n"),
    ),
)
nested(
    "the branch that is rarely taken", "f32[3]", lambda r: lambda x: lax.cond(x[0] > 150, r, jnp.sin, x), level="full"
)


def _psum(bad: bool) -> Subject:
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    rule = ruled(
        lambda x: lax.psum(jnp.sum(x**2), "n"), lambda r, g: (2 * r[0] * (lax.psum(g, "n") * 2 if bad else g),)
    )
    return Subject(jax.shard_map(rule, mesh=mesh, in_specs=spec("n"), out_specs=spec(), check_vma=False), "f32[4]", {})


both("control flow", "2 psum in shard_map", None, _psum)

# Functions that autodiff does not differentiate -----------------------------------------------------------------------


def _root(a: Array) -> Array:
    def done(s: Any) -> Any:
        return jnp.max(jnp.abs(s[0] - s[1]) / s[0]) > 4 * jnp.finfo(a.dtype).eps

    return lax.while_loop(done, lambda s: (0.5 * (s[0] + a / s[0]), s[0]), (a, a + 1))[0]


def opaque(name: str, args: Any, f: Fun, right: Fun, wrong: Fun, **options: Any) -> None:
    vjp("no autodiff", name, (lambda: args) if not callable(args) else args, f, right, wrong, **options)


opaque(
    "while_loop root: 1 / y",
    lambda: (jnp.asarray([1.0, 2.0, 3.0]),),
    _root,
    lambda r, g: (g / (2 * jnp.sqrt(r[0])),),
    lambda r, g: (g / jnp.sqrt(r[0]),),
    domain=(0.5, 4.0),
)
opaque(
    "while_loop root: 1 % off",
    lambda: (jnp.asarray([1.0, 2.0, 3.0]),),
    _root,
    lambda r, g: (g / (2 * jnp.sqrt(r[0])),),
    lambda r, g: (1.01 * g / (2 * jnp.sqrt(r[0])),),
    domain=(0.5, 4.0),
)


def _host_sin(x: Array) -> Array:
    return jax.pure_callback(
        lambda x: np.sin(np.asarray(x)), jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential"
    )


opaque("callback: cosine's sign", "f32[4]", _host_sin, COS, lambda r, g: (-g * jnp.cos(r[0]),))
opaque(
    "callback with a reference: 1.5 ×",
    "f32[4]",
    _host_sin,
    COS,
    lambda r, g: (1.5 * g * jnp.cos(r[0]),),
    reference=jnp.sin,
)


def _kernel(body: Fun) -> Fun:
    from jax.experimental import pallas as pl

    def call(*args: Array) -> Array:
        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(args[0].shape, args[0].dtype), interpret=True)(*args)

    return call


def _sin_kernel(x: Any, out: Any) -> None:
    out[...] = jnp.sin(x[...])


opaque("Pallas: x instead of cos x", "f32[8]", lambda x: _kernel(_sin_kernel)(x), COS, lambda r, g: (g * r[0],))
opaque(
    "Pallas with a reference: 5 % off",
    "f32[8]",
    lambda x: _kernel(_sin_kernel)(x),
    COS,
    lambda r, g: (1.05 * g * jnp.cos(r[0]),),
    reference=jnp.sin,
)


def _fixed(a: Array) -> Array:
    """z = cos(z) a / 2 by iteration."""
    return lax.while_loop(
        lambda s: jnp.max(jnp.abs(s[0] - s[1])) > 1e-6, lambda s: (0.5 * a * jnp.cos(s[0]), s[0]), (a * 0, a * 0 + 1)
    )[0]


def _fixed_back(r: Any, g: Array, implicit: bool = True) -> Any:
    z = _fixed(r[0])
    slope = 0.5 * jnp.cos(z)
    return (g * slope / (1 + 0.5 * r[0] * jnp.sin(z)) if implicit else g * slope,)


opaque(
    "fixed point: the implicit term missing",
    lambda: (jnp.asarray([0.4, 1.1]),),
    _fixed,
    _fixed_back,
    lambda r, g: _fixed_back(r, g, False),
    domain=(0.2, 1.5),
    accuracy=1e-5,
)

# Any signature --------------------------------------------------------------------------------------------------------


def signature(name: str, build: Callable[[float], Subject]) -> None:
    both("signature", name, None, lambda bad: build(1.5 if bad else 1.0))


signature(
    "Python float argument",
    lambda k: Subject(ruled(lambda x, a: x * a, lambda r, g: (k * g * r[1], jnp.sum(g * r[0]))), (n(0, 3), 0.5), {}),
)


def _nondiff(k: float) -> Subject:
    h = jax.custom_vjp(lambda act, x: act(x), nondiff_argnums=(0,))
    h.defvjp(lambda act, x: (act(x), x), lambda act, x, g: (k * g * jnp.cos(x),))
    return Subject(h, (jnp.sin, n(0, 3)), {})


signature("callable in nondiff_argnums", _nondiff)
signature(
    "text argument",
    lambda k: Subject(lambda x, mode: jnp.sum(x**2), (n(0, 3), "mode"), {"gradient": lambda x, mode: 2 * k * x}),
)
signature(
    "static Python int",
    lambda k: Subject(
        lambda x, m: jnp.sum(x.reshape(m, -1).sum(0) ** 2),
        (jnp.arange(6.0), 2),
        {"gradient": lambda x, m: k * jnp.broadcast_to(2 * x.reshape(m, -1).sum(0), (m, 6 // m)).reshape(-1)},
    ),
)
signature(
    "has_aux",
    lambda k: Subject(
        lambda x: (jnp.sum(x**2), {"norm": jnp.sum(x)}),
        (n(0, 4),),
        {"value_and_grad": lambda x: ((jnp.sum(x**2), {"norm": jnp.sum(x)}), 2 * k * x)},
    ),
)


def _dropout(key: Any, x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


signature(
    "typed key",
    lambda k: Subject(
        ruled(_dropout, lambda r, g: (None, k * _dropout(r[0], g))), (jax.random.key(0), jnp.ones(5)), {}
    ),
)
signature(
    "None in a tree",
    lambda k: Subject(
        lambda p: jnp.sum(p["w"] ** 2),
        ({"w": n(0, 3), "b": None},),
        {"gradient": lambda p: {"w": 2 * k * p["w"], "b": None}},
    ),
)
signature(
    "None at an integer leaf",
    lambda k: Subject(
        lambda p: jnp.sum(p["w"] ** 2) * p["step"],
        ({"w": n(0, 3), "step": jnp.int32(2)},),
        {"gradient": lambda p: {"w": 2 * k * p["w"] * p["step"], "step": None}},
    ),
)
signature(
    "partial",
    lambda k: Subject(
        functools.partial(
            ruled(lambda a, x: jnp.sin(a * x), lambda r, g: (None, k * g * r[0] * jnp.cos(r[0] * r[1]))), jnp.float32(2)
        ),
        (n(0, 3),),
        {},
    ),
)


class _Layer:
    def __init__(self, k: float):
        self.h = ruled(jnp.tanh, lambda r, g: (k * g * (1 - jnp.tanh(r[0]) ** 2),))

    def __call__(self, x: Array) -> Array:
        return self.h(x)

    def method(self, x: Array) -> Array:
        return self.h(x) * 2


signature("method", lambda k: Subject(_Layer(k).method, (n(0, 3),), {}))
signature("callable object", lambda k: Subject(_Layer(k), (n(0, 3),), {}))
signature(
    "static argument of jit",
    lambda k: Subject(
        jax.jit(lambda x, m: ruled(lambda x: x**3, lambda r, g: (3 * k * r[0] ** 2 * g,))(x) * m, static_argnums=1),
        (n(0, 3), 3),
        {},
    ),
)
signature(
    "keyword with a default",
    lambda k: Subject(
        lambda x, *, scale=2.0: scale * ruled(jnp.sin, lambda r, g: (k * g * jnp.cos(r[0]),))(x), (n(0, 3),), {}
    ),
)
signature(
    "symbolic_zeros",
    lambda k: Subject(
        ruled(
            lambda x, y: x * y,
            lambda r, g: (k * g * r[1], g * r[0]),
            lambda x, y: (x.value * y.value, (x.value, y.value)),
            symbolic_zeros=True,
        ),
        "f32[3] f32[3]",
        {},
    ),
)
signature(
    "forward/backward pair",
    lambda k: Subject(jnp.sin, "f32[4]", {"vjp": (lambda x: (jnp.sin(x), x), lambda x, g: (k * g * jnp.cos(x),))}),
)

# Mathematics and contracts --------------------------------------------------------------------------------------------

M3 = lambda: (n(0, 3, 3) + 3 * jnp.eye(3, dtype=np.float32),)  # noqa: E731
vjp(
    "algebra",
    "inverse: not transposed",
    M3,
    jnp.linalg.inv,
    lambda r, g: (-(i := jnp.linalg.inv(r[0])).T @ g @ i.T,),
    lambda r, g: (-(i := jnp.linalg.inv(r[0])) @ g @ i,),
    domain={0: lambda k, s, d: jax.random.normal(k, s, d) + 4 * jnp.eye(3, dtype=d)},
)
vjp(
    "algebra",
    "determinant: cofactors not transposed",
    M3,
    jnp.linalg.det,
    lambda r, g: (g * jnp.linalg.det(r[0]) * jnp.linalg.inv(r[0]).T,),
    lambda r, g: (g * jnp.linalg.det(r[0]) * jnp.linalg.inv(r[0]),),
    domain={0: lambda k, s, d: jax.random.normal(k, s, d) + 4 * jnp.eye(3, dtype=d)},
)
vjp(
    "algebra",
    "trace of a product: transposed",
    lambda: "f32[3,3] f32[3,3]",
    lambda a, b: jnp.trace(a @ b),
    lambda r, g: (g * r[1].T, g * r[0].T),
    lambda r, g: (g * r[1], g * r[0].T),
)
vjp(
    "algebra",
    "sort: permutation not inverted",
    lambda: "f32[7]",
    jnp.sort,
    lambda r, g: (jnp.zeros_like(g).at[jnp.argsort(r[0])].set(g),),
    lambda r, g: (g[jnp.argsort(r[0])],),
    kinks="subgradient",
)
vjp(
    "algebra",
    "repeated heads summed in the wrong order",
    lambda: (n(0, 2, 3, 4),),
    lambda k: jnp.repeat(k, 3, axis=0),
    lambda r, g: (g.reshape(2, 3, 3, 4).sum(1),),
    lambda r, g: (g.reshape(3, 2, 3, 4).sum(0),),
)
vjp(
    "algebra",
    "convolution: kernel not flipped",
    lambda: "f32[8] f32[3]",
    lambda x, k: jnp.convolve(x, k, mode="full"),
    lambda r, g: (jnp.correlate(g, r[1], mode="valid"), jnp.correlate(g, r[0], mode="valid")),
    lambda r, g: (jnp.convolve(g, r[1], mode="valid"), jnp.correlate(g, r[0], mode="valid")),
)
vjp(
    "algebra",
    "cumulative sum: not reversed",
    lambda: "f32[6]",
    jnp.cumsum,
    lambda r, g: (jnp.cumsum(g[::-1])[::-1],),
    lambda r, g: (jnp.cumsum(g),),
)
vjp(
    "algebra",
    "logsumexp with a factor in one term",
    lambda: "f32[5]",
    jax.nn.logsumexp,
    lambda r, g: (g * jax.nn.softmax(r[0]),),
    lambda r, g: (g * jax.nn.softmax(r[0]).at[0].multiply(1.02),),
)
vjp(
    "contract",
    "cotangent not summed over a broadcast axis",
    lambda: (n(0, 4, 3), n(1, 3)),
    lambda x, b: x + b,
    lambda r, g: (g, g.sum(0)),
    lambda r, g: (g, g),
)
vjp(
    "contract",
    "None for a live argument",
    lambda: "f32[3] f32[3]",
    lambda x, y: x * y,
    lambda r, g: (g * r[1], g * r[0]),
    lambda r, g: (g * r[1], None),
)
vjp(
    "contract",
    "swapped",
    lambda: "f32[3] f32[3]",
    lambda x, y: x * jnp.sin(y),
    lambda r, g: (g * jnp.sin(r[1]), g * r[0] * jnp.cos(r[1])),
    lambda r, g: (g * r[0] * jnp.cos(r[1]), g * jnp.sin(r[1])),
)
vjp(
    "contract",
    "cotangent ignored",
    lambda: "f32[4]",
    lambda x: x**2,
    lambda r, g: (2 * r[0] * g,),
    lambda r, g: (2 * r[0] + 0 * g,),
)
vjp(
    "contract",
    "something added to the cotangent",
    lambda: "f32[4]",
    lambda x: x**2,
    lambda r, g: (2 * r[0] * g,),
    lambda r, g: (2 * r[0] * g + 1e-4 * r[0],),
)
vjp(
    "contract",
    "one of two outputs' cotangents lost",
    lambda: "f32[4]",
    lambda x: (jnp.sin(x), x**2),
    lambda r, g: (g[0] * jnp.cos(r[0]) + 2 * r[0] * g[1],),
    lambda r, g: (g[0] * jnp.cos(r[0]),),
)


def _cut_twice(bad: bool) -> Subject:
    """sin, whose slope is a rule of its own with the right slope −sin, which is cut off."""
    keep = lax.stop_gradient if bad else lambda x: x
    slope = ruled(jnp.cos, lambda r, g: (-g * r,), lambda x: (jnp.cos(x), keep(jnp.sin(x))))
    return Subject(ruled(jnp.sin, lambda r, g: (g * slope(r[0]),)), "f32[4]", {"level": "full"})


both("second order", "cut off, in the third derivative", None, _cut_twice)
