"""The points at which a rule is tried: the caller's own, drawn ones, and those at which functions change their mind.

A rule that agrees with its function at points of N(0, 1) may differ at ties, at whole numbers, in constant rows, for
empty masks and clamped indices, at both sides of a number that either of them compares with. These are tried in turn;
numbers to compare with are read from the jaxprs of function and rule.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from jaxbp.checker.data import REGIMES, Spec, drawn
from jaxbp.checker.jaxpr import literals, reached
from jaxbp.checker.subject import Arguments, is_float

Points = dict[str, list[np.ndarray]]
USUAL = 1.0, -1.0, 0.5, 2.0, -2.0, 3.0, 1e-6, -1e-6, 1e-13, 1e3, -1e3, 1e5, 1e7, -1e7
COUNTS = {"fast": {"boundary": 8, "magnitudes": 3}, "full": {"boundary": 24, "magnitudes": 9}}
LARGE = 2**12  # elements: with more, fewer points


def points(
    arguments: Arguments, leaves: Sequence[Any], level: str, seed: int, domain: list[Any], numbers: "Numbers"
) -> Points:
    """By regime, the array leaves of the arguments. The caller's own values are "given"; a floating-point leaf that is
    not differentiated keeps them, unless only its shape was given or the domain names it.
    """
    rng = np.random.default_rng(seed)
    moves = [domain[n] is not None or isinstance(leaf, Spec) for n, leaf in enumerate(leaves)]
    whole = [_Integers(leaf, *own) for leaf, *own in zip(leaves, numbers.whole, numbers.equal, strict=True)]

    def draw(regime: str) -> list[np.ndarray]:
        return [drawn(leaf, domain[n], regime, rng) if moves[n] else np.asarray(leaf) for n, leaf in enumerate(leaves)]

    def moved(n: int, move: Move, k: int) -> np.ndarray:
        if not is_float(leaves[n]):
            return whole[n](k, rng)
        if not moves[n]:
            return _mask(np.asarray(leaves[n]), k)
        base = drawn(leaves[n], domain[n], "ordinary", rng)
        return base if callable(domain[n]) or not base.size else _kept(move(base, rng), domain[n])

    concrete = not any(isinstance(leaf, Spec) for leaf in leaves)
    found: Points = {"given": [np.asarray(leaf) for leaf in leaves]} if concrete else {}
    found |= {regime: draw(regime) for regime in REGIMES[level]}
    found |= {f"ordinary {k}": draw("ordinary") for k in (2, 3)}
    small = sum(int(np.prod(leaf.shape)) for leaf in leaves) <= LARGE
    for k, (regime, move) in enumerate(_moves(level, numbers.floats)):
        if small or k % 4 == 0:
            found[regime] = [moved(n, move, k) for n in range(len(leaves))]
    first, same = next(iter(found.values())), [n for n in arguments.wrt if moves[n]]
    if small and len({first[n].shape for n in same}) < len(same):
        twins: dict[tuple[int, ...], np.ndarray] = {}
        found["equal arguments"] = [
            twins.setdefault(a.shape, a).astype(a.dtype) if n in same else a for n, a in enumerate(first)
        ]
    return found


def _kept(value: np.ndarray, domain: Any) -> np.ndarray:
    """In the domain, and in float64: 0.7 is another number in float32."""
    with np.errstate(all="ignore"):
        return np.asarray(np.clip(np.asarray(value, np.float64), *(domain or (-np.inf, np.inf))))


Move = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _moves(level: str, numbers: Sequence[float]) -> Iterable[tuple[str, Move]]:
    """Names of points and what makes them from one of N(0, 1)."""
    pool = np.asarray([*_around(numbers), *USUAL])
    for k in range(COUNTS[level]["boundary"]):
        yield f"boundary {k}", partial(_taken, pool, k)
    for k, step in enumerate((1.0, 2.0, 0.5)):
        yield f"whole {k}", partial(_lattice, step)
    for k in range(len(ROWS)):
        yield f"rows {k}", partial(_rows, k)
    for k in range(COUNTS[level]["magnitudes"]):
        yield f"magnitudes {k}", partial(_magnitudes, (12.0, 30.0, 6.0)[k % 3])
    yield "one value", lambda x, rng: np.full(x.shape, float(x.flat[0]))


def _lattice(step: float, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few multiples of a step: ties, zeros, ones, halves."""
    return np.asarray(step * rng.integers(-3, 4, x.shape))


def _magnitudes(reach: float, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some of them the least and the greatest, whose squares are 0 and ∞ in float32."""
    low, high = -reach, min(reach, 20.0)
    return np.asarray(np.sign(x) * 10.0 ** np.clip(1.5 * rng.uniform(low, high, x.shape), low, high))


def _around(numbers: Sequence[float]) -> list[float]:
    """Both sides of every number, the number, and what lies between two of them."""
    ordered = sorted({float(c) for c in numbers if np.isfinite(c) and abs(c) < 1e30})
    found = []
    for c in ordered:
        step = max(abs(c), 1e-6) * 1e-3
        near = [float(np.nextafter(np.float32(c), np.float32(side))) for side in (-np.inf, np.inf)]
        near = near if c else [-1e-37, 1e-37]  # XLA flushes what is next to 0
        found += [c, *near, c - step, c + step, -c, 1.05 * c, 0.95 * c]
    return [*found, *((a + b) / 2 for a, b in pairwise(ordered))]


def _taken(pool: np.ndarray, k: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The next numbers of the pool, each at another place every time; half of the places keep theirs."""
    places = (np.arange(x.size) * 7 + k) % 2 == 0 if x.size > 3 and k % 2 else np.ones(x.size, bool)
    chosen = pool[(np.arange(x.size) + k * x.size) % len(pool)]
    return np.where(places, chosen, x.ravel().astype(float)).reshape(x.shape)


Pattern = Callable[[np.ndarray, np.ndarray, np.random.Generator], Any]
ROWS: tuple[Pattern, ...] = (  # what is made of a row and the one before it
    lambda row, before, rng: 0 * row,
    lambda row, before, rng: np.full(row.shape, row[0]),
    lambda row, before, rng: np.eye(row.size)[rng.integers(row.size)] * row,
    lambda row, before, rng: np.sort(row),
    lambda row, before, rng: np.abs(row),
    lambda row, before, rng: -np.abs(row),
    lambda row, before, rng: before,
    lambda row, before, rng: row / 4 + 100,
    lambda row, before, rng: row * 1e-5,
    lambda row, before, rng: rng.integers(0, 2, row.size),
    lambda row, before, rng: np.sort(row)[::-1],
)


def _rows(k: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each row (along the last axis) of another pattern; a vector is one row."""
    rows = np.array(x, np.float64).reshape(-1, x.shape[-1] if x.ndim else 1)
    for n, row in enumerate(rows):
        rows[n] = ROWS[(n + k) % len(ROWS)](row, rows[n - 1], rng)
    return rows.reshape(x.shape)


def _mask(leaf: np.ndarray, k: int) -> np.ndarray:
    """Weights of 0 and 1 that are not differentiated: none, all, as given. Other numbers stay."""
    if leaf.size and np.all((leaf == 0) | (leaf == 1)):
        return (np.zeros_like(leaf), np.ones_like(leaf), leaf)[k % 3]
    return leaf


class _Integers:
    """What integers and booleans are tried: their ends, one value everywhere, others of their range, and beyond it the
    numbers that the function asks for.

    Given values that are a permutation, or in order, stay so; the range is that of the values, of the numbers that
    these are compared with, and from 0.
    """

    def __init__(self, leaf: Any, whole: Sequence[int], equal: Sequence[int]):
        self.leaf, self.low, self.high = leaf, 0, 1
        self.compared = bool(whole)  # a rule may be made for the one number that is given
        if isinstance(leaf, Spec):
            self.low, self.high = leaf.low, leaf.high
        elif np.size(leaf) and not is_float(leaf) and leaf.dtype.kind != "b":
            values = np.asarray(leaf)
            self.low, self.high = int(values.min()), int(values.max())
            self.high = max([self.high, *(c - 1 for c in whole if self.high < c - 1 <= self.high + 64)])
            self.low = min([0, self.low, *(c for c in whole if -9 < c < 0)])
        self.marks = [c for c in equal if not self.low <= c <= self.high]

    def __call__(self, k: int, rng: np.random.Generator) -> np.ndarray:
        shape, dtype = tuple(self.leaf.shape), np.dtype(self.leaf.dtype)
        concrete = not isinstance(self.leaf, Spec)
        if concrete and not shape and dtype.kind != "b":  # a step, a start, a choice of branch
            value = int(self.leaf)
            return np.asarray((value, 0, value + 1, value + 4)[k % 4 if self.compared else 0]).astype(dtype)
        if concrete and dtype.kind != "b":
            flat = np.sort(np.ravel(self.leaf))
            if np.array_equal(flat, np.arange(flat.size)):
                return rng.permutation(np.ravel(self.leaf)).reshape(shape)
        ways: list[Callable[[], Any]] = [
            lambda: rng.integers(self.low, self.high + 1, shape),
            lambda: np.full(shape, self.low),
            lambda: np.full(shape, self.high),
            lambda: np.full(shape, rng.integers(self.low, self.high + 1)),
            lambda: rng.choice([self.low, self.high, *self.marks], shape),
        ]
        found = ways[k % 5]()
        if concrete and len(shape) == 1 and shape[0] > 2 and np.all(np.diff(np.asarray(self.leaf).astype(int)) >= 0):
            found = np.sort(found)
        return np.asarray(found).astype(dtype)


class Numbers(NamedTuple):
    """What a function compares with: floating-point numbers, and by array argument the whole ones (with what lies
    beyond a clamp) and those of them that are asked for, such as −100 or 255, the label to be ignored.
    """

    floats: list[float]
    whole: list[list[int]]
    equal: list[list[int]]


def numbers_of(jaxprs: Sequence[Any], count: int) -> Numbers:
    """The literals of jaxprs that begin with so many array arguments."""
    floats = dict.fromkeys(float(atom.val) for jaxpr in jaxprs for atom in literals(jaxpr))
    whole: list[list[int]] = [[] for _ in range(count)]
    equal: list[list[int]] = [[] for _ in range(count)]
    for n, jaxpr in product(range(count), jaxprs):
        for equation in reached(jaxpr, [m == n for m in range(len(jaxpr.invars))]):
            found = [int(a.val) for a in equation.invars if hasattr(a, "val") and _is_whole(a.val)]
            beyond = [3, -2] if equation.primitive.name in ("max", "min", "clamp") else []
            whole[n] += [*found, *(c + s for c in found for s in beyond if abs(c) < 1e6)]
            equal[n] += found if equation.primitive.name in ("eq", "ne") else []
    return Numbers([*filter(np.isfinite, floats)], whole, equal)


def _is_whole(value: Any) -> bool:
    return np.shape(value) == () and np.issubdtype(np.asarray(value).dtype, np.integer)
