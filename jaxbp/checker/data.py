"""The points at which a rule is tried: the caller's own, and drawn ones that reach kinks, overflow and underflow."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.subject import Arguments, is_complex, is_float
from jaxbp.names import lookup

Draw = Callable[[Any, tuple[int, ...], Any], Any]
Range = tuple[float, float] | str | Draw
Domain = Range | Mapping[int | str, Range] | None

NAMES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "bool": "bool"}
NAMES |= {"c64": "complex64", "c128": "complex128"}
NAMES |= {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}
SPEC = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,\s]*)\](?:\{(?P<low>-?\d+)\.\.(?P<high>-?\d+)\})?")
SCALES = {"ordinary": 1.0, "zeros": 1.0, "large": 200.0, "tiny": 1e-3, "wide": 1.0, "× 8": 8.0}
REGIMES = {"fast": ("ordinary", "zeros", "large", "× 8"), "full": tuple(SCALES)}


@dataclasses.dataclass(frozen=True)
class Spec:
    """An array to be drawn: shape, dtype and, for integers, the range (both ends included)."""

    shape: tuple[int, ...]
    dtype: Any
    low: int = 0
    high: int = 1


def parse(text: str) -> tuple[Spec, ...]:
    """The arrays that a text such as "f32[8,128] i32[8]{0..9}" describes.

    Raises:
      ValueError: text that is no such list, an unknown dtype, an empty range.

    Example:
      >>> parse("f32[2,3] i32[2]{0..9}")[1]
      Spec(shape=(2,), dtype=dtype('int32'), low=0, high=9)
    """
    specs, rest = [], text.strip()
    while rest:
        match = SPEC.match(rest)
        if match is None:
            raise ValueError(f"inputs: {rest!r} is no array, write for example f32[8,128] or i32[8]{{0..9}}")
        dtype = jnp.dtype(lookup("dtype", match["dtype"], NAMES))
        shape = tuple(int(size) for size in match["shape"].replace(" ", "").split(",") if size)
        low, high = int(match["low"] or 0), int(match["high"] or 1)
        if low > high:
            raise ValueError(f"inputs: the range {low}..{high} is empty")
        specs.append(Spec(shape, dtype, low, high))
        rest = rest[match.end() :].lstrip(" ,")
    return tuple(specs)


def inputs(spec: Any, regime: str = "ordinary", seed: int = 0) -> tuple[Any, ...]:
    """Arguments for `check`, drawn: the ones a report's reproducer starts from.

    Args:
      spec: a text such as "f32[8,128] i32[8]{0..9}", or a tuple of trees whose leaves are such texts of one array.
      regime: "ordinary" N(0, 1), "zeros" (half of the numbers exactly 0), "× 8", "large" (× 200), "tiny" (× 10⁻³),
        "wide" (magnitudes from 10⁻⁴ to 10³).
      seed: of the draw.

    Raises:
      ValueError: a spec or a regime that is none.

    Example:
      >>> [a.shape for a in inputs("f32[2,3] f32[3]")]
      [(2, 3), (3,)]
    """
    lookup("regime", regime, SCALES)
    tree = parse(spec) if isinstance(spec, str) else jax.tree.map(lambda text: parse(text)[0], tuple(spec))
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng([seed, sorted(SCALES).index(regime)])
    return tuple(jax.tree.unflatten(treedef, [_draw(leaf, regime, rng, (-np.inf, np.inf)) for leaf in leaves]))


def text_of(leaf: Any) -> str:
    """A leaf as `parse` reads it.

    Example:
      >>> text_of(np.zeros((2, 3), np.float32))
      'f32[2,3]'
    """
    short = {name: text for text, name in NAMES.items()}[str(leaf.dtype)]
    ends = (leaf.low, leaf.high) if isinstance(leaf, Spec) else (np.min(leaf), np.max(leaf)) if np.size(leaf) else ()
    bounds = f"{{{int(ends[0])}..{int(ends[1])}}}" if short[0] in "iu" and ends else ""
    return f"{short}[{','.join(map(str, leaf.shape))}]{bounds}"


def domains(domain: Domain, arguments: Arguments) -> list[Any]:
    """For each array leaf a pair (low, high) or a function of (key, shape, dtype).

    Raises:
      ValueError: a name or an argument that is not there.
    """
    everything = -np.inf, np.inf
    if not isinstance(domain, Mapping):
        return [_range(domain, everything) if n in arguments.wrt else None for n in range(len(arguments.owners))]
    count = max(arguments.owners, default=-1) + 1
    by_position = {}
    for key, value in domain.items():
        position = arguments.names.index(key) if key in arguments.names else key
        if not isinstance(position, int) or not 0 <= position < count:
            known = ", ".join(map(repr, [*range(count), *arguments.names[:count]]))
            raise ValueError(f"domain has {key!r}, the arguments are {known}")
        by_position[position] = _range(value, everything)
    return [
        by_position.get(owner, everything if n in arguments.wrt else None) for n, owner in enumerate(arguments.owners)
    ]


def _range(value: Any, everything: tuple[float, float]) -> Any:
    if value is None or callable(value):
        return value or everything
    if isinstance(value, str):
        return lookup("domain", value, NAMED)
    low, high = value
    if not low < high:
        raise ValueError(f"domain is {value!r}, want a lower end and a higher one")
    return float(low), float(high)


def drawn(leaf: Any, domain: Any, regime: str, rng: np.random.Generator) -> np.ndarray:
    """One array of a regime; a function that is a domain draws its own."""
    if not callable(domain):
        return _draw(leaf, regime, rng, domain or (-np.inf, np.inf))
    key = jax.random.key(int(rng.integers(2**31)))
    found = np.asarray(domain(key, leaf.shape, leaf.dtype))
    if found.shape != tuple(leaf.shape):
        raise ValueError(f"domain: the function gave shape {found.shape}, the argument has {tuple(leaf.shape)}")
    return found


def _symmetric(key: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    a = _normal(key, shape)
    return np.asarray((a + np.swapaxes(a, -1, -2)) / 2).astype(dtype)


def _spd(key: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    a = _normal(key, shape)
    return np.asarray(a @ np.swapaxes(a, -1, -2) / shape[-1] + np.eye(shape[-1])).astype(dtype)


def _normal(key: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist()).standard_normal(shape)


def _exponential(key: Any, shape: tuple[int, ...]) -> np.ndarray:
    return -np.log(np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist()).random(shape) + 1e-12)


NAMED: dict[str, Any] = {
    "real": (-np.inf, np.inf),
    "positive": (np.float64(1e-3), np.inf),
    "negative": (-np.inf, np.float64(-1e-3)),
    "unit": (0.0, 1.0),
    "probability": (1e-6, 1 - 1e-6),
    "simplex": lambda k, s, d: ((e := _exponential(k, s)) / e.sum(-1, keepdims=True)).astype(d),
    "unit norm": lambda k, s, d: ((a := _normal(k, s)) / np.linalg.norm(a, axis=-1, keepdims=True)).astype(d),
    "sorted": lambda k, s, d: np.sort(_normal(k, s), axis=-1).astype(d),
    "symmetric": _symmetric,
    "spd": _spd,
    "orthogonal": lambda k, s, d: np.linalg.qr(_normal(k, s))[0].astype(d),
    "one-hot": lambda k, s, d: np.eye(s[-1])[_normal(k, s).argmax(-1)].astype(d),
    "permutation": lambda k, s, d: np.argsort(_normal(k, s), axis=-1).astype(d),
}


def _draw(leaf: Any, regime: str, rng: np.random.Generator, domain: tuple[float, float]) -> np.ndarray:
    shape, dtype = tuple(leaf.shape), leaf.dtype
    if is_complex(leaf):
        real, imaginary = (_draw(Spec(shape, np.float64), regime, rng, domain) for _ in range(2))
        return np.asarray(real + 1j * imaginary, dtype)
    if not is_float(leaf):
        if jnp.issubdtype(dtype, jnp.bool_):
            return rng.integers(2, size=shape).astype(bool)
        return rng.integers(getattr(leaf, "low", 0), getattr(leaf, "high", 1), size=shape, endpoint=True).astype(dtype)
    low, high = domain
    if regime == "zeros" and not low <= 0 <= high:
        regime = "ordinary"
    size = SCALES[regime] * np.abs(rng.standard_normal(shape))
    if regime == "wide":
        size = 10.0 ** rng.uniform(-4, 3, shape)
    sign = np.where(rng.random(shape) < 0.5, -1.0, 1.0)
    if np.isfinite(low) and np.isfinite(high):
        value = rng.uniform(low, high, shape)
    elif np.isfinite(low) or np.isfinite(high):
        value = low + size if np.isfinite(low) else high - size
    else:
        value = sign * size
    if regime == "zeros":
        value = np.where((rng.random(shape) < 0.5) & (low <= 0 <= high), 0.0, value)
    return np.asarray(value).astype(dtype)


def cast(leaves: Sequence[Any], dtype: Any) -> list[np.ndarray]:
    """The leaves with every floating-point one in this dtype."""
    return [np.asarray(leaf).astype(dtype) if is_float(leaf) else np.asarray(leaf) for leaf in leaves]
