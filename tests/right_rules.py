"""Right rules in the styles that people really write, which a checker must not accuse: a registry.

float32 inside, float16, conventions at kinks, auxiliary outputs, None, control flow, stop_gradient, solvers, manifolds.
Nothing here uses jaxbp.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from wrong_rules import Array, Fun, Subject, jvp_ruled, n, ruled


class Case(NamedTuple):
    name: str
    kind: str
    right: Callable[[], Subject]


CASES: list[Case] = []


def vjp(kind: str, name: str, args: Fun, f: Fun, backward: Fun, forward: Fun | None = None, **options: Any) -> None:
    CASES.append(Case(name, kind, lambda: Subject(ruled(f, backward, forward), args(), options)))


def by(kind: str, name: str, rule: str, args: Fun, f: Fun, hand: Any, **options: Any) -> None:
    """A function with a rule by hand: rule is the option's name."""
    CASES.append(Case(name, kind, lambda: Subject(f, args(), {rule: hand, **options})))


def whole(kind: str, name: str, build: Callable[[], Subject]) -> None:
    CASES.append(Case(name, kind, build))


BF, F32, F16 = jnp.bfloat16, jnp.float32, jnp.float16
COS = lambda r, g: (g * jnp.cos(r[0]),)  # noqa: E731

# float32 inside -------------------------------------------------------------------------------------------------------


def rms(x: Array, w: Array) -> Array:
    y = x.astype(F32)
    return (y * lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)).astype(x.dtype) * w


def rms_back(res: Any, g: Array) -> Any:
    x, w = res
    y = x.astype(F32)
    r = lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
    gw = (g * w).astype(F32)
    dx = r * (gw - y * r * r * jnp.mean(gw * y, -1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(g * (y * r).astype(x.dtype), 0).astype(w.dtype)


vjp("float32 inside", "RMSNorm, f32", lambda: (n(0, 4, 8), 1 + n(1, 8)), rms, rms_back)
vjp("float32 inside", "RMSNorm, bf16", lambda: (n(0, 4, 8, dtype=BF), n(1, 8, dtype=BF)), rms, rms_back)
vjp(
    "float32 inside",
    "RMSNorm, f32, dtypes given",
    lambda: (n(0, 4, 8), 1 + n(1, 8)),
    rms,
    rms_back,
    dtypes=("float32",),
)


def dense(x: Array, w: Array, b: Array) -> Array:
    return (x.astype(F32) @ w + b).astype(x.dtype)


def dense_back(r: Any, g: Array) -> Any:
    x, w, b = r
    g = g.astype(F32)
    return (g @ w.T).astype(x.dtype), (x.astype(F32).T @ g).astype(w.dtype), g.sum(0).astype(b.dtype)


vjp(
    "float32 inside",
    "dense, bf16 x, f32 parameters",
    lambda: (n(0, 4, 3, dtype=BF), n(1, 3, 2), n(2, 2)),
    dense,
    dense_back,
)


def scores(q: Array, k: Array) -> Array:
    return jax.nn.softmax(jnp.matmul(q, k.T, preferred_element_type=F32), -1).astype(q.dtype)


def scores_back(r: Any, g: Array) -> Any:
    q, k = r
    p = jax.nn.softmax(jnp.matmul(q, k.T, preferred_element_type=F32), -1)
    g = g.astype(F32)
    ds = (p * (g - (p * g).sum(-1, keepdims=True))).astype(q.dtype)
    return jnp.matmul(ds, k).astype(q.dtype), jnp.matmul(ds.T, q).astype(k.dtype)


vjp("float32 inside", "attention scores", lambda: (n(0, 3, 4), n(1, 5, 4)), scores, scores_back)
TABLE = np.linspace(0.5, 1.5, 4, dtype=np.float32)
vjp("float32 inside", "NumPy float32 constants", lambda: "f32[4]", lambda x: x * TABLE, lambda r, g: (g * TABLE,))


def leaky_sum(x: Array) -> Array:
    return lax.scan(lambda c, t: ((d := 0.5 * c + t), d), jnp.zeros(x.shape[1], F32), x)[1]


vjp(
    "float32 inside",
    "float32 scan carry",
    lambda: (n(0, 5, 3),),
    leaky_sum,
    lambda r, g: (lax.scan(lambda c, t: ((d := 0.5 * c + t), d), jnp.zeros(g.shape[1], F32), g, reverse=True)[1],),
)


def asserts(x: Array) -> Array:
    assert x.dtype == F32, "float32 only"
    return jnp.sin(x)


vjp("float32 inside", "an assertion on the dtype", lambda: (n(0, 4),), asserts, COS)
for text in ("f16[8]", "bf16[8]"):
    vjp("short dtypes", f"2 x, {text}", lambda t=text: t, lambda x: 2 * x, lambda r, g: (2 * g,))
    vjp("short dtypes", f"sin, {text}", lambda t=text: t, jnp.sin, COS)
vjp("short dtypes", "sin, dtypes float16", lambda: "f32[8]", jnp.sin, COS, dtypes=("float16",))
vjp("short dtypes", "x³ of f16", lambda: "f16[8]", lambda x: x**3, lambda r, g: (3 * r[0] ** 2 * g,))
vjp(
    "short dtypes",
    "mean of squares",
    lambda: "f16[64]",
    lambda x: jnp.mean(x**2),
    lambda r, g: (2 * r[0] * g / r[0].size,),
)

# Saturation and accuracy ----------------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


for seed in (3, 5):
    vjp(
        "saturation",
        f"textbook softmax, {seed}",
        lambda s=seed: (n(s, 3, 5),),
        softmax,
        lambda p, g: (p * (g - (p * g).sum(-1, keepdims=True)),),
        lambda x: ((p := softmax(x)), p),
        seed=seed,
    )
vjp(
    "saturation",
    "tanh, 1 − y²",
    lambda: "f32[8]",
    jnp.tanh,
    lambda y, g: (g * (1 - y * y),),
    lambda x: (jnp.tanh(x),) * 2,
)
vjp(
    "saturation",
    "sigmoid, y (1 − y)",
    lambda: "f32[8]",
    jax.nn.sigmoid,
    lambda y, g: (g * y * (1 - y),),
    lambda x: ((y := jax.nn.sigmoid(x)), y),
)
vjp(
    "saturation",
    "log-softmax",
    lambda: "f32[3,4]",
    jax.nn.log_softmax,
    lambda r, g: (g - jax.nn.softmax(r[0]) * g.sum(-1, keepdims=True),),
)
vjp(
    "saturation",
    "sin(1e4 x)",
    lambda: "f32[8]",
    lambda x: jnp.sin(1e4 * x),
    lambda r, g: (1e4 * g * jnp.cos(1e4 * r[0]),),
)
vjp("saturation", "1e12 + x", lambda: "f32[8]", lambda x: 1e12 + x, lambda r, g: (g,))
vjp(
    "saturation",
    "norm over rows",
    lambda: "f32[4,3]",
    lambda x: jnp.sqrt(jnp.sum(x**2, -1) + 1e-3),
    lambda r, g: (g[:, None] * r[0] / jnp.sqrt(jnp.sum(r[0] ** 2, -1, keepdims=True) + 1e-3),),
)
whole(
    "saturation",
    "xlog1py, removable",
    lambda: Subject(
        jax.scipy.special.xlog1py, (n(0, 6), jnp.abs(n(0, 6)) + 0.3), {"domain": {1: (-0.9, 10.0)}, "seed": 3}
    ),
)


def ill(key: Any, shape: Any, dtype: Any) -> Any:
    q = np.linalg.qr(np.random.default_rng(int(jax.random.key_data(key)[-1])).standard_normal(shape))[0]
    return q @ np.diag(10.0 ** np.linspace(-5, 5, 5)) @ q.T


vjp(
    "saturation",
    "log det, condition 1e10",
    lambda: (ill(jax.random.key(0), (5, 5), None),),
    lambda a: jnp.linalg.slogdet(a)[1],
    lambda r, g: (g * jnp.linalg.inv(r[0]).T,),
    domain={0: ill},
    dtypes=("float64",),
)


def deep(layers: int, width: int) -> Subject:
    ws = [n(k + 100, width, width) / width**0.5 for k in range(layers)]

    def f(ws: Any, x: Array) -> Array:
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    def by_hand(ws: Any, x: Array) -> Any:
        hs = [x]
        for w in ws:
            hs.append(jnp.tanh(hs[-1] @ w))
        d, gs = 2 * hs[-1], []
        for w, a, b in zip(ws[::-1], hs[-2::-1], hs[:0:-1], strict=True):
            d = d * (1 - b * b)
            gs.append(a.T @ d)
            d = d @ w.T
        return jnp.sum(hs[-1] ** 2), gs[::-1]

    return Subject(f, (ws, n(99, 4, width)), {"value_and_grad": by_hand})


vjp(
    "saturation",
    "log Σ exp: posteriors from the sums themselves",
    lambda: "f32[4] f32[5]",
    lambda x, y: jax.nn.logsumexp(x) + jax.nn.logsumexp(y),
    lambda r, g: tuple(
        g * jnp.exp(a + jax.nn.logsumexp(b) - (jax.nn.logsumexp(a) + jax.nn.logsumexp(b))) for a, b in (r, r[::-1])
    ),
)
whole("saturation", "tanh network, 5 layers", lambda: deep(5, 8))
whole("saturation", "tanh network, 12 layers", lambda: deep(12, 8))

# Kinks and ties by some convention ------------------------------------------------------------------------------------

for k in (0.0, 0.5, 1.0):
    vjp(
        "kinks",
        f"max(x, 0), slope {k} at 0",
        lambda: "f32[9]",
        lambda x: jnp.maximum(x, 0),
        lambda r, g, k=k: (jnp.where(r[0] > 0, g, jnp.where(r[0] == 0, k * g, 0)),),
    )
for k in (-1.0, 0.0, 1.0):
    vjp(
        "kinks",
        f"|x|, slope {k} at 0",
        lambda: "f32[9]",
        jnp.abs,
        lambda r, g, k=k: (jnp.where(r[0] == 0, k * g, jnp.sign(r[0]) * g),),
    )
vjp(
    "kinks",
    "clip, slope 1 at its bounds",
    lambda: "f32[9]",
    lambda x: jnp.clip(x, -1, 1),
    lambda r, g: (jnp.where(jnp.abs(r[0]) <= 1, g, 0),),
)
vjp(
    "kinks",
    "max-pool, the last of the tied",
    lambda: "f32[12]",
    lambda x: x.reshape(-1, 4).max(-1),
    lambda r, g: (
        ((jnp.arange(4) == 3 - r[0].reshape(-1, 4)[:, ::-1].argmax(-1)[:, None]) * g[:, None])
        .astype(g.dtype)
        .reshape(-1),
    ),
)
vjp(
    "kinks",
    "sort, stable",
    lambda: "f32[7]",
    jnp.sort,
    lambda r, g: (jnp.zeros_like(g).at[jnp.argsort(r[0])].set(g),),
    kinks="subgradient",
)
vjp(
    "kinks",
    "median of three",
    lambda: "f32[3]",
    lambda x: jnp.sort(x)[1],
    lambda r, g: (jnp.zeros_like(r[0]).at[jnp.argsort(r[0])[1]].set(g),),
    kinks="subgradient",
)
vjp("kinks", "jax.nn.relu", lambda: "f32[6]", jax.nn.relu, lambda r, g: (jnp.where(r[0] > 0, g, 0),))
vjp(
    "kinks",
    "maximum of two arguments, the first wins",
    lambda: "f32[6] f32[6]",
    jnp.maximum,
    lambda r, g: (jnp.where(r[0] >= r[1], g, 0), jnp.where(r[0] >= r[1], 0, g)),
)

# Signatures -----------------------------------------------------------------------------------------------------------

VALUE = lambda x: (jnp.sum(x**2), {"norm": jnp.sqrt(jnp.sum(x**2))})  # noqa: E731
by("signature", "has_aux", "value_and_grad", lambda: (n(0, 4),), VALUE, lambda x: (VALUE(x), 2 * x))
by("signature", "has_aux, gradient", "gradient", lambda: (n(0, 4),), VALUE, lambda x: (2 * x, VALUE(x)[1]))
by(
    "signature",
    "None beside arrays",
    "gradient",
    lambda: ({"w": n(0, 3), "b": None},),
    lambda p: jnp.sum(p["w"] ** 2),
    lambda p: {"w": 2 * p["w"], "b": None},
)
by(
    "signature",
    "None at an integer leaf",
    "gradient",
    lambda: ({"w": n(0, 3), "step": jnp.int32(2)},),
    lambda p: jnp.sum(p["w"] ** 2) * p["step"],
    lambda p: {"w": 2 * p["w"] * p["step"], "step": None},
)
by(
    "signature",
    "keyword arguments",
    "gradient",
    lambda: (n(0, 3),),
    lambda x, *, scale: scale * jnp.sum(x**2),
    lambda x, *, scale: 2 * scale * x,
    kwargs={"scale": 3.0},
)
by(
    "signature",
    "text argument",
    "gradient",
    lambda: (n(0, 3), "sum"),
    lambda x, mode: jnp.sum(x**2),
    lambda x, mode: 2 * x,
)
by(
    "signature",
    "static whole number",
    "gradient",
    lambda: (jnp.arange(6.0), 2),
    lambda x, m: jnp.sum(x.reshape(m, -1).sum(0) ** 2),
    lambda x, m: jnp.tile(2 * x.reshape(m, -1).sum(0), m),
)
by(
    "signature",
    "two arguments of three",
    "gradient",
    lambda: (n(0, 3), n(1, 3), n(2, 3)),
    lambda x, y, z: jnp.sum(x * y * z),
    lambda x, y, z: (y * z, x * y),
    wrt=(0, 2),
)
by(
    "signature",
    "forward/backward pair",
    "vjp",
    lambda: "f32[4]",
    jnp.sin,
    (lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),)),
)
by("signature", "jvp by hand", "jvp", lambda: "f32[4]", jnp.sin, lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0])))


def drop(key: Any, x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


for name, key in {"typed": jax.random.key, "raw": jax.random.PRNGKey}.items():
    vjp(
        "signature",
        f"dropout, {name} key",
        lambda key=key: (key(0), jnp.ones(5)),
        drop,
        lambda r, g: (None, drop(r[0], g)),
    )
vjp("signature", "Python float", lambda: (n(0, 3), 0.5), lambda x, a: x * a, lambda r, g: (g * r[1], jnp.sum(g * r[0])))
whole(
    "signature",
    "partial",
    lambda: Subject(
        functools.partial(
            ruled(lambda a, x: jnp.sin(a * x), lambda r, g: (None, g * r[0] * jnp.cos(r[0] * r[1]))), jnp.float32(2)
        ),
        (n(0, 3),),
        {},
    ),
)
whole(
    "signature",
    "jit with a static number",
    lambda: Subject(
        jax.jit(lambda x, m: ruled(lambda x: x**3, lambda r, g: (3 * r[0] ** 2 * g,))(x) * m, static_argnums=1),
        (n(0, 3), 3),
        {},
    ),
)


def symbolic(r: Any, g: Any) -> Any:
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros_like(r[0]), jnp.zeros_like(r[1])
    return g * r[1], g * r[0]


whole(
    "signature",
    "symbolic_zeros",
    lambda: Subject(
        ruled(lambda x, y: x * y, symbolic, lambda x, y: (x.value * y.value, (x.value, y.value)), symbolic_zeros=True),
        "f32[3] f32[3]",
        {},
    ),
)
vjp(
    "signature",
    "empty leaf",
    lambda: (n(0, 0, 3), n(1, 2)),
    lambda x, y: jnp.sum(x) + y**2,
    lambda r, g: (jnp.zeros_like(r[0]) + jnp.sum(g) * 0, 2 * r[1] * g),
)
vjp("signature", "scalar", lambda: (jnp.float32(0.7),), jnp.sin, COS)
vjp(
    "signature",
    "integer argument",
    lambda: "f32[5,2] i32[3]{0..4}",
    lambda t, i: t[i],
    lambda r, g: (jnp.zeros_like(r[0]).at[r[1]].add(g), None),
)
vjp(
    "signature",
    "dictionary of outputs",
    lambda: "f32[4]",
    lambda x: {"a": jnp.sin(x), "n": jnp.argmax(x)},
    lambda r, g: (g["a"] * jnp.cos(r[0]),),
)
vjp(
    "signature",
    "complex argument",
    lambda: (n(0, 4) + 1j * n(1, 4),),
    lambda z: z**3,
    lambda r, g: (3 * r[0] ** 2 * g,),
)
vjp("signature", "fft", lambda: (n(0, 8),), jnp.fft.rfft, lambda r, g: jax.vjp(jnp.fft.rfft, r[0])[1](g))

# Control flow ---------------------------------------------------------------------------------------------------------

CUBE = ruled(lambda x: x**3, lambda r, g: (3 * r[0] ** 2 * g,))
SPEC = jax.sharding.PartitionSpec


def mesh() -> Any:
    return jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))


whole(
    "control flow",
    "cond",
    lambda: Subject(lambda x: lax.cond(x.sum() > 0, CUBE, lambda x: 2 * x, x), (jnp.ones(3),), {}),
)
whole(
    "control flow",
    "switch",
    lambda: Subject(lambda i, x: lax.switch(i, [CUBE, jnp.sin], x), (jnp.int32(0), jnp.ones(3)), {"wrt": 1}),
)
whole(
    "control flow",
    "shard_map",
    lambda: Subject(jax.shard_map(CUBE, mesh=mesh(), in_specs=SPEC("n"), out_specs=SPEC("n")), (jnp.ones(4),), {}),
)
whole(
    "control flow",
    "scan",
    lambda: Subject(lambda x: lax.scan(lambda c, t: (c + CUBE(t), c), jnp.zeros_like(x[0]), x), "f32[3,2]", {}),
)
whole("control flow", "vmap and jit", lambda: Subject(jax.jit(jax.vmap(CUBE)), "f32[3,2]", {}))

# stop_gradient --------------------------------------------------------------------------------------------------------


def td(w: Array, s: Array, s2: Array, r: Array) -> Array:
    return 0.5 * (r + 0.9 * lax.stop_gradient(jnp.tanh(s2 @ w)) - jnp.tanh(s @ w)) ** 2


def td_gradient(w: Array, s: Array, s2: Array, r: Array) -> Array:
    v = jnp.tanh(s @ w)
    return -(r + 0.9 * jnp.tanh(s2 @ w) - v) * (1 - v * v) * s


TD = lambda: (n(0, 4), n(1, 4), n(2, 4), jnp.float32(0.3))  # noqa: E731
by("stop_gradient", "TD semi-gradient", "gradient", TD, td, td_gradient)
by(
    "stop_gradient",
    "TD semi-gradient as the reference",
    "gradient",
    TD,
    lambda w, s, s2, r: 0.5 * (r + 0.9 * jnp.tanh(s2 @ w) - jnp.tanh(s @ w)) ** 2,
    td_gradient,
    reference=td,
)
by(
    "stop_gradient",
    "VQ-VAE losses",
    "gradient",
    lambda: (n(0, 4), n(1, 4)),
    lambda z, e: jnp.sum((lax.stop_gradient(z) - e) ** 2) + 0.25 * jnp.sum((z - lax.stop_gradient(e)) ** 2),
    lambda z, e: (0.5 * (z - e), 2 * (e - z)),
    wrt=(0, 1),
)


def lsq(x: Array, s: Array) -> Array:
    q = x / s
    return s * (q + lax.stop_gradient(jnp.round(q) - q))


vjp(
    "stop_gradient",
    "learned step size",
    lambda: (n(0, 6), jnp.float32(0.3)),
    lambda x, s: s * jnp.round(x / s),
    lambda r, g: (g, jnp.sum(g * (jnp.round(r[0] / r[1]) - r[0] / r[1]))),
    reference=lsq,
    domain={1: (0.2, 0.5)},
)

by(
    "float32 inside",
    "NumPy model that keeps its data in float32",
    "gradient",
    lambda: (np.linspace(-1, 1, 3, dtype=np.float32),),
    lambda w: np.sum(np.tanh(np.eye(5, 3, dtype=np.float32) @ np.asarray(w, np.float32)) ** 2),
    lambda w: np.eye(3, dtype=np.float32) @ (2 * (t := np.tanh(np.asarray(w, np.float32))) * (1 - t * t)),
)
vjp(
    "signature",
    "None and a counter among the parameters",
    lambda: ({"w": n(0, 4), "average": None, "step": jnp.asarray(3)}, n(1, 4)),
    lambda p, x: jnp.sum(jnp.sin(p["w"] * x)),
    lambda r, g: (
        {"w": g * jnp.cos(r[0]["w"] * r[1]) * r[1], "average": None, "step": None},
        g * jnp.cos(r[0]["w"] * r[1]) * r[0]["w"],
    ),
)

# Recomputed ----------------------------------------------------------------------------------------------------------


def coupled(a: Array, b: Array, w: Array) -> tuple[Array, Array]:
    for k in range(3):
        a = a + jnp.tanh(w[k] * b)
        b = b + jnp.sin(a)
    return a, b


def coupled_back(res: Any, g: Any) -> Any:
    (a, b, w), (ga, gb), slopes = res, g, []
    for k in reversed(range(3)):
        b = b - jnp.sin(a)
        ga = ga + gb * jnp.cos(a)
        t = jnp.tanh(w[k] * b)
        a = a - t
        slopes.append(jnp.sum(ga * (1 - t * t) * b))
        gb = gb + ga * (1 - t * t) * w[k]
    return ga, gb, jnp.stack(slopes[::-1])


vjp(
    "approximate",
    "activations from the output, 1e-5",
    lambda: (n(0, 4), n(1, 4), n(2, 3)),
    coupled,
    coupled_back,
    lambda a, b, w: (y := coupled(a, b, w), (*y, w)),
    domain=(-2.0, 2.0),
    accuracy=1e-5,
)

# Not JAX code, not differentiable by JAX, approximate -----------------------------------------------------------------

vjp(
    "not jittable",
    "Python if on a value",
    lambda: "f32[4]",
    jnp.sin,
    lambda r, g: (g * jnp.cos(r[0]) if float(jnp.max(jnp.abs(g))) > 0 else 0 * g,),
)
vjp(
    "not jittable",
    "NumPy in the backward",
    lambda: "f32[4]",
    jnp.sin,
    lambda r, g: (jnp.asarray(np.asarray(g) * np.cos(np.asarray(r[0]))),),
)


def linear(c: Array, t: Array) -> Array:
    return jax.custom_derivatives.linear_call(lambda c, t: c * t, lambda c, u: c * u, c, t)


whole(
    "not jittable",
    "linear_call, no vmap",
    lambda: Subject(jvp_ruled(jnp.sin, lambda p, t: (jnp.sin(p[0]), linear(jnp.cos(p[0]), t[0]))), "f32[4]", {}),
)
X8 = lambda: (np.random.default_rng(0).standard_normal(8),)  # noqa: E731
by("numpy", "sum of sines", "gradient", X8, lambda x: float(np.sum(np.sin(x))), np.cos)
by(
    "numpy",
    "value and gradient",
    "value_and_grad",
    X8,
    lambda x: float(np.sum(np.sin(x))),
    lambda x: (float(np.sum(np.sin(x))), np.cos(x)),
)
by(
    "numpy",
    "Rosenbrock",
    "gradient",
    X8,
    lambda x: float(np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)),
    lambda x: (
        np.concatenate([-400 * x[:-1] * (x[1:] - x[:-1] ** 2) - 2 * (1 - x[:-1]), [0]])
        + np.concatenate([[0], 200 * (x[1:] - x[:-1] ** 2)])
    ),
)
by("numpy", "absolute values", "gradient", X8, lambda x: float(np.sum(np.abs(x))), np.sign)


def babylon(a: Array) -> Array:
    return lax.while_loop(
        lambda s: jnp.abs(s[0] - s[1]).max() > 1e-6 * s[0].max(), lambda s: (0.5 * (s[0] + a / s[0]), s[0]), (a, a + 1)
    )[0]


vjp(
    "no autodiff",
    "Babylonian root",
    lambda: (jnp.asarray([1.0, 2.0, 3.0]),),
    babylon,
    lambda y, g: (g / (2 * y),),
    lambda a: ((y := babylon(a)), y),
    domain=(0.5, 4.0),
)
whole("no autodiff", "expi", lambda: Subject(jax.scipy.special.expi, "f32[4]", {"domain": (0.1, 20.0)}))


def host(x: Array) -> Array:
    return jax.pure_callback(
        lambda x: np.sin(np.asarray(x)), jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential"
    )


vjp("no autodiff", "callback", lambda: "f32[4]", host, COS)
vjp("no autodiff", "callback with a reference", lambda: "f32[4]", host, COS, reference=jnp.sin)
W = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * 0.3


def repeated(step: Fun, z: Array) -> Array:
    return lax.fori_loop(0, 14, lambda _, z: step(z), z)


def fixed(x: Array) -> Array:
    return repeated(lambda z: jnp.tanh(jnp.asarray(W, x.dtype) @ z + x), jnp.zeros_like(x))


def fixed_back(r: Any, g: Array) -> Any:
    _, z = r
    j = (1 - z * z)[:, None] * jnp.asarray(W, z.dtype)
    return (repeated(lambda v: g + j.T @ v, g) * (1 - z * z),)


vjp(
    "approximate",
    "fixed point, right to 1e-4",
    lambda: (n(1, 4),),
    fixed,
    fixed_back,
    lambda x: ((z := fixed(x)), (x, z)),
    domain=(-1.0, 1.0),
    accuracy=1e-2,
)
vjp(
    "approximate",
    "8-bit backward",
    lambda: "f32[4]",
    jnp.sin,
    lambda r, g: (g * jnp.round(jnp.cos(r[0]) * 127) / 127,),
    accuracy=1e-2,
)


def root(a: Array) -> Array:
    w, v = jnp.linalg.eigh((a + a.T) / 2)
    return (v * jnp.sqrt(w)) @ v.T


def root_back(s: Array, g: Array) -> Any:
    w, v = jnp.linalg.eigh(s)
    return (v @ ((v.T @ g @ v) / (w[:, None] + w[None])) @ v.T,)


vjp(
    "manifolds",
    "square root of SPD matrices",
    lambda: "f32[3,3]",
    root,
    root_back,
    lambda a: ((s := root(a)), s),
    domain="spd",
    project={0: lambda a, g: (g + g.T) / 2},
)
vjp("domains", "sqrt without a domain", lambda: "f32[8]", jnp.sqrt, lambda r, g: (g / (2 * jnp.sqrt(r[0])),))
vjp("domains", "log without a domain", lambda: "f32[8]", jnp.log, lambda r, g: (g / r[0],))
vjp("domains", "log of positive numbers", lambda: "f32[8]", jnp.log, lambda r, g: (g / r[0],), domain="positive")
vjp(
    "domains",
    "entropy of probabilities",
    lambda: "f32[5]",
    lambda p: -jnp.sum(p * jnp.log(p)),
    lambda r, g: (-g * (jnp.log(r[0]) + 1),),
    domain="simplex",
)
vjp("domains", "arcsin", lambda: "f32[5]", jnp.arcsin, lambda r, g: (g / jnp.sqrt(1 - r[0] ** 2),), domain=(-0.9, 0.9))


def added_twice(x: Array) -> Array:
    """Σ x and Σ 2x in one reduction, which JAX does not differentiate."""
    zero = jnp.zeros((), x.dtype)
    first, second = lax.reduce((x, 2 * x), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))
    return first + second


vjp(
    "no autodiff",
    "a reduction of two arrays",
    lambda: "f32[4]",
    added_twice,
    lambda r, g: (3 * g * jnp.ones_like(r[0]),),
)

# singular and nearly singular matrices, at which a factorization keeps no digit of some elements
for name, function in {
    "pseudo-inverse": jnp.linalg.pinv,
    "log-determinant by LU": jnp.linalg.slogdet,
    "log-determinant by QR": functools.partial(jnp.linalg.slogdet, method="qr"),
}.items():
    whole("linear algebra", name, functools.partial(Subject, function, "f32[3,3]", {}))
