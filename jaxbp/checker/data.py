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
EVERYWHERE = -np.inf, np.inf

NAMES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "bool": "bool"}
NAMES |= {"c64": "complex64", "c128": "complex128"}
NAMES |= {f"{kind[0]}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
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
    return tuple(jax.tree.unflatten(treedef, [drawn(leaf, None, regime, rng) for leaf in leaves]))


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


def domains(domain: Domain, arguments: Arguments, leaves: Sequence[Any]) -> list[Any]:
    """For each array leaf a pair (low, high) or a function of (key, shape, dtype); None for one that keeps its numbers.

    Raises:
      ValueError: a name or an argument that is not there.
    """
    by_position, rest = {}, EVERYWHERE if isinstance(domain, Mapping) else _range(domain)
    count = max(arguments.owners, default=-1) + 1
    for key, value in domain.items() if isinstance(domain, Mapping) else ():
        position = arguments.names.index(key) if key in arguments.names else key
        if not isinstance(position, int) or not 0 <= position < count:
            known = ", ".join(map(repr, [*range(count), *arguments.names[:count]]))
            raise ValueError(f"domain has {key!r}, the arguments are {known}")
        by_position[position] = _range(value)
    drawn = [n in arguments.wrt or isinstance(leaf, Spec) for n, leaf in enumerate(leaves)]
    return [by_position.get(owner, rest if drawn[n] else None) for n, owner in enumerate(arguments.owners)]


def _range(value: Any) -> Any:
    if value is None or callable(value):
        return value or EVERYWHERE
    if isinstance(value, str):
        return lookup("domain", value, NAMED)
    low, high = value
    if not low < high:
        raise ValueError(f"domain is {value!r}, want a lower end and a higher one")
    return float(low), float(high)


def _drawing(make: Callable[[np.random.Generator, tuple[int, ...]], Any]) -> Draw:
    def draw(key: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        return np.asarray(make(rng, shape)).astype(dtype)

    return draw


NAMED: dict[str, Any] = {
    "real": EVERYWHERE,
    "positive": (np.float64(1e-3), np.inf),
    "negative": (-np.inf, np.float64(-1e-3)),
    "unit": (0.0, 1.0),
    "probability": (1e-6, 1 - 1e-6),
    "simplex": _drawing(lambda rng, s: (e := -np.log(rng.random(s) + 1e-12)) / e.sum(-1, keepdims=True)),
    "unit norm": _drawing(lambda rng, s: (a := rng.standard_normal(s)) / np.linalg.norm(a, axis=-1, keepdims=True)),
    "sorted": _drawing(lambda rng, s: np.sort(rng.standard_normal(s), axis=-1)),
    "symmetric": _drawing(lambda rng, s: ((a := rng.standard_normal(s)) + np.swapaxes(a, -1, -2)) / 2),
    "spd": _drawing(lambda rng, s: (a := rng.standard_normal(s)) @ np.swapaxes(a, -1, -2) / s[-1] + np.eye(s[-1])),
    "orthogonal": _drawing(lambda rng, s: np.linalg.qr(rng.standard_normal(s))[0]),
    "one-hot": _drawing(lambda rng, s: np.eye(s[-1])[rng.standard_normal(s).argmax(-1)]),
    "permutation": _drawing(lambda rng, s: np.argsort(rng.standard_normal(s), axis=-1)),
}


def drawn(leaf: Any, domain: Any, regime: str, rng: np.random.Generator) -> np.ndarray:
    """One array of a regime; a function that is a domain draws its own."""
    shape, dtype = tuple(leaf.shape), leaf.dtype
    if callable(domain):
        found = np.asarray(domain(jax.random.key(int(rng.integers(2**31))), leaf.shape, dtype))
        if found.shape != shape:
            raise ValueError(f"domain: the function gave shape {found.shape}, the argument has {shape}")
        return found
    if is_complex(leaf):
        real, imaginary = (drawn(Spec(shape, np.float64), domain, regime, rng) for _ in range(2))
        return np.asarray(real + 1j * imaginary, dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return rng.integers(2, size=shape).astype(bool)
    if not is_float(leaf):
        return rng.integers(getattr(leaf, "low", 0), getattr(leaf, "high", 1), size=shape, endpoint=True).astype(dtype)
    low, high = domain or EVERYWHERE
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
        value = np.where(rng.random(shape) < 0.5, 0.0, value)
    return np.asarray(value).astype(dtype)


def cast(leaves: Sequence[Any], dtype: Any) -> list[np.ndarray]:
    """The leaves with every floating-point one in this dtype."""
    return [np.asarray(leaf).astype(dtype) if is_float(leaf) else np.asarray(leaf) for leaf in leaves]
