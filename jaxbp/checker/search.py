"""The points at which a rule is tried: the caller's own, drawn ones, and those at which functions change their mind.

A rule that agrees with its function at points of N(0, 1) may differ at ties, at whole numbers, in constant rows, for
empty masks and clamped indices, at both sides of a number that either of them compares with. These are tried in turn;
numbers to compare with are read from the jaxprs of function and rule, or from the code where there is no jaxpr.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxbp.checker.data import REGIMES, Spec, drawn
from jaxbp.checker.jaxpr import equations, literals
from jaxbp.checker.subject import Arguments, is_float

Points = dict[str, list[np.ndarray]]
USUAL = 1.0, -1.0, 0.5, 2.0, -2.0, 3.0, 1e-6, -1e-6, 1e-13, 1e3, -1e3, 1e5, 1e7, -1e7
ROWS = "zero constant one-hot increasing positive negative repeated offset small ties decreasing".split()
COUNTS = {"fast": {"boundary": 8, "magnitudes": 3}, "full": {"boundary": 24, "magnitudes": 9}}
LARGE = 2**15  # elements: with more, fewer points


def points(
    arguments: Arguments, leaves: Sequence[Any], level: str, seed: int, domain: list[Any], numbers: "Numbers"
) -> Points:
    """By regime, the array leaves of the arguments. The caller's own values are "given"; a floating-point leaf that is
    not differentiated keeps them, unless only its shape was given or the domain names it.
    """
    rng = np.random.default_rng(seed)
    concrete = not any(isinstance(leaf, Spec) for leaf in leaves)
    found: Points = {"given": [np.asarray(leaf) for leaf in leaves]} if concrete else {}
    moves = [domain[n] is not None or isinstance(leaf, Spec) for n, leaf in enumerate(leaves)]
    for regime in REGIMES[level]:
        found[regime] = [
            drawn(leaf, domain[n], regime, rng) if moves[n] else np.asarray(leaf) for n, leaf in enumerate(leaves)
        ]
    for k in range(2, 4):
        found[f"ordinary {k}"] = [
            drawn(leaf, domain[n], "ordinary", rng) if moves[n] else np.asarray(leaf) for n, leaf in enumerate(leaves)
        ]
    small = sum(int(np.prod(leaf.shape)) for leaf in leaves) <= LARGE
    whole = [_Integers(leaf, numbers.whole) for leaf in leaves]
    for k, (regime, move) in enumerate(_moves(level, numbers.floats)):
        if not small and k % 4:
            continue
        point = []
        for n, leaf in enumerate(leaves):
            if not is_float(leaf):
                point.append(whole[n](k, rng))
            elif not moves[n]:
                point.append(_mask(np.asarray(leaf), k))
            else:
                base = drawn(leaf, domain[n], "ordinary", rng)
                point.append(base if callable(domain[n]) or not base.size else _kept(move(base, rng), domain[n]))
        found[regime] = point
    if not small:
        return found
    return found | _coincident(arguments, leaves, found, moves)


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
    for k, name in enumerate(ROWS):
        yield f"rows {name}", partial(_rows, k)
    for k in range(COUNTS[level]["magnitudes"]):
        yield f"magnitudes {k}", partial(_magnitudes, (12.0, 30.0, 6.0)[k % 3])
    yield "one value", lambda x, rng: np.full(x.shape, float(x.flat[0]))


def _lattice(step: float, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few multiples of a step: ties, zeros, ones, halves."""
    return np.asarray(step * rng.integers(-3, 4, x.shape))


def _magnitudes(reach: float, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(np.sign(x) * 10.0 ** rng.uniform(-reach, min(reach, 20.0), x.shape))


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


def _rows(k: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each row (along the last axis) of another pattern; a vector is one row."""
    rows = np.array(x, np.float64).reshape(-1, x.shape[-1] if x.ndim else 1)
    for n, row in enumerate(rows):
        name = ROWS[(n + k) % len(ROWS)]
        if name == "zero":
            row[:] = 0
        elif name == "constant":
            row[:] = row[0]
        elif name == "one-hot":
            row[:] = np.eye(len(row))[rng.integers(len(row))] * row
        elif name in ("increasing", "decreasing"):
            row[:] = np.sort(row)[:: 1 if name == "increasing" else -1]
        elif name in ("positive", "negative"):
            row[:] = np.abs(row) * (1 if name == "positive" else -1)
        elif name == "repeated":
            rows[n] = rows[n - 1]
        elif name == "offset":
            row[:] = row / 4 + 100
        elif name == "small":
            row[:] = row * 1e-5
        elif name == "ties":
            row[:] = rng.integers(0, 2, len(row))
    return rows.reshape(x.shape)


def _mask(leaf: np.ndarray, k: int) -> np.ndarray:
    """Weights of 0 and 1 that are not differentiated: none, all, as given. Other numbers stay."""
    if leaf.size and np.all((leaf == 0) | (leaf == 1)):
        return (np.zeros_like(leaf), np.ones_like(leaf), leaf)[k % 3]
    return leaf


class _Integers:
    """What integers and booleans are tried: their ends, one value everywhere, others of their range.

    Given values that are a permutation, or in order, stay so; the range is that of the values, of the numbers that the
    function compares integers with, and from 0.
    """

    def __init__(self, leaf: Any, numbers: Sequence[int]):
        self.leaf, self.low, self.high = leaf, 0, 1
        self.marks: list[int] = []  # such as −100, the label to be ignored
        if isinstance(leaf, Spec):
            self.low, self.high = leaf.low, leaf.high
        elif np.size(leaf) and not is_float(leaf) and leaf.dtype.kind != "b":
            values = np.asarray(leaf)
            self.low, self.high = int(values.min()), int(values.max())
            self.high = max([self.high, *(c - 1 for c in numbers if self.high < c - 1 <= self.high + 64)])
            self.low = min([0, self.low, *(c for c in numbers if -9 < c < 0)])
            self.marks = [c for c in numbers if c <= -9]

    def __call__(self, k: int, rng: np.random.Generator) -> np.ndarray:
        shape, dtype = tuple(self.leaf.shape), np.dtype(self.leaf.dtype)
        concrete = not isinstance(self.leaf, Spec)
        if concrete and not shape and dtype.kind != "b":  # a step, a start, a choice of branch
            value = int(self.leaf)
            return np.asarray((value, 0, value + 1, value + 4)[k % 4]).astype(dtype)
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


def _coincident(arguments: Arguments, leaves: Sequence[Any], found: Points, moves: Sequence[bool]) -> Points:
    """Differentiated arguments of one shape with equal values; and the given rows in another order, repeated."""
    first = next(iter(found.values()))
    same = [n for n in arguments.wrt if moves[n]]
    more: Points = {}
    if any(leaves[a].shape == leaves[b].shape for a in same for b in same if a < b):
        equal = list(first)
        for n in same:
            twin = next(m for m in same if leaves[m].shape == leaves[n].shape)
            equal[n] = first[twin].astype(first[n].dtype)
        more["equal arguments"] = equal
    return more


class Numbers(NamedTuple):
    """What a function compares with: floating-point numbers, and whole ones (with what lies beyond a clamp)."""

    floats: list[float]
    whole: list[int]


def numbers_of(jaxprs: Iterable[Any]) -> Numbers:
    """The literals of jaxprs."""
    floats: list[float] = []
    whole: list[int] = []
    for jaxpr in jaxprs:
        floats += [float(atom.val) for atom in literals(jaxpr)]
        for equation in equations(jaxpr):
            found = [int(a.val) for a in equation.invars if hasattr(a, "val") and _is_whole(a.val)]
            beyond = [3, -2] if equation.primitive.name in ("max", "min", "clamp") else []
            whole += [*found, *(c + s for c in found for s in beyond if abs(c) < 1e6)]
    return Numbers(list(dict.fromkeys(c for c in floats if np.isfinite(c))), list(dict.fromkeys(whole)))


def _is_whole(value: Any) -> bool:
    return np.shape(value) == () and np.issubdtype(np.asarray(value).dtype, np.integer)


def numbers_in_code(functions: Iterable[Any], depth: int = 3) -> list[float]:
    """The numbers written in Python functions and in those that they refer to."""
    found: list[float] = []
    for function in functions:
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        constants = [c for c in code.co_consts if isinstance(c, int | float) and not isinstance(c, bool)]
        found += [float(c) for c in constants if abs(c) < 1e30]
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        inner = [f for f in (*cells, *(function.__globals__.get(name) for name in code.co_names)) if callable(f)]
        if depth:
            found += numbers_in_code(inner, depth - 1)
    return list(dict.fromkeys(found))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (raises where the cell is empty)
    except ValueError:
        return False
    return True
