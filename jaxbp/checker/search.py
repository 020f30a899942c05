"""The points at which a rule is tried: the caller's own, drawn ones, and those at which functions change their mind.

A rule that agrees with its function at points of N(0, 1) may differ at ties, at whole numbers, in constant rows, for
empty masks and clamped indices, at both sides of a number that either of them compares with. These are tried in turn;
numbers to compare with are read from the jaxprs of function and rule.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from jaxbp.checker.data import EVERYWHERE, REGIMES, Spec, drawn
from jaxbp.checker.jaxpr import literals, reached
from jaxbp.checker.subject import is_float
from jaxbp.checker.trial import Trial

Points = dict[str, list[np.ndarray]]
USUAL = 1.0, -1.0, 0.5, 2.0, -2.0, 3.0, 1e-6, -1e-6, 1e-13, 1e3, -1e3, 1e5, 1e7, -1e7
COUNTS = {"fast": {"boundary": 8, "magnitudes": 3}, "full": {"boundary": 24, "magnitudes": 9}}
LARGE, HUGE = 2**12, 2**16  # elements: with more, fewer points


def points(trial: Trial) -> Points:
    """By regime, the array leaves of the arguments. The caller's own values are "given"; a floating-point leaf that is
    not differentiated keeps them, unless only its shape was given or the domain names it.
    """
    leaves, domain, level = trial.settings.example, trial.settings.domain, trial.settings.level
    rng, numbers = np.random.default_rng(trial.settings.seed), _numbers(trial)
    moves = [domain[n] is not None or isinstance(leaf, Spec) for n, leaf in enumerate(leaves)]

    def draw(regime: str) -> list[np.ndarray]:
        return [drawn(leaf, domain[n], regime, rng) if moves[n] else np.asarray(leaf) for n, leaf in enumerate(leaves)]

    def moved(n: int, move: Move, k: int) -> np.ndarray:
        if not is_float(leaves[n]):
            return _whole(leaves[n], numbers.whole[n], numbers.equal[n], k, rng)
        if not moves[n]:
            return _mask(np.asarray(leaves[n]), k)
        base = drawn(leaves[n], domain[n], "ordinary", rng)
        if callable(domain[n]) or not base.size:
            return base
        placed = np.asarray(move(base, rng), np.float64)  # 0.7 is another number in float32
        return np.asarray(np.clip(placed, *(domain[n] or EVERYWHERE)))

    concrete = not any(isinstance(leaf, Spec) for leaf in leaves)
    found: Points = {"given": [np.asarray(leaf) for leaf in leaves]} if concrete else {}
    found |= {regime: draw(regime) for regime in REGIMES[level]}
    size = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    small, every = size <= LARGE, 1 if size <= LARGE else 4 if size <= HUGE else 16
    found |= {f"ordinary {k}": draw("ordinary") for k in (2, 3) if size <= HUGE}
    for k, (regime, move) in enumerate(_moves(level, numbers.floats)):
        if k % every == 0:
            found[regime] = [moved(n, move, k) for n in range(len(leaves))]
    first, same = next(iter(found.values())), [n for n in trial.subject.arguments.wrt if moves[n]]
    kinds = {n: (first[n].shape, str(domain[n])) for n in same}  # those that may be equal
    if small and len({*kinds.values()}) < len(same):
        twins: dict[Any, np.ndarray] = {}
        found["equal arguments"] = [
            twins.setdefault(kinds[n], a).astype(a.dtype) if n in same else a for n, a in enumerate(first)
        ]
    return found


Move = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _moves(level: str, numbers: Sequence[float]) -> Iterable[tuple[str, Move]]:
    """Names of points and what makes them from one of N(0, 1)."""
    pool = np.asarray([*filter(_normal, _around(numbers)), *USUAL])
    for k in range(COUNTS[level]["boundary"]):
        yield f"boundary {k}", partial(_taken, pool, k)
    for k, step in enumerate((1.0, 2.0, 0.5)):  # ties, zeros, ones, halves
        yield f"whole {k}", partial(lambda step, x, rng: step * rng.integers(-3, 4, x.shape), step)
    for k in range(len(ROWS)):
        yield f"rows {k}", partial(_rows, k)
    for k in range(COUNTS[level]["magnitudes"]):
        yield f"magnitudes {k}", partial(_magnitudes, (12.0, 30.0, 6.0)[k % 3])
    yield "one value", lambda x, rng: np.full(x.shape, float(x.flat[0]))


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


def _normal(number: float) -> bool:
    """Not one that XLA takes for 0: it has no subnormal numbers, of float64 or of float32."""
    rounded: list[Any] = [np.float32(number), np.float64(number)]
    return all(a == 0 or abs(a) >= np.finfo(a.dtype).tiny for a in rounded)


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


def _whole(leaf: Any, whole: Sequence[int], equal: Sequence[int], k: int, rng: np.random.Generator) -> np.ndarray:
    """The kth thing that integers or booleans are tried as: their ends, one value everywhere, others of their range,
    and beyond it the numbers that the function asks for.

    Given values that are a permutation, or in order, stay so; the range is that of the values, of the numbers that
    these are compared with, and from 0.
    """
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    low, high = getattr(leaf, "low", 0), getattr(leaf, "high", 1)
    if not isinstance(leaf, Spec) and dtype.kind != "b":
        if not shape:  # a step, a start, a choice of branch; a rule may be made for the one number that is given
            value = int(leaf)
            return np.asarray((value, 0, value + 1, value + 4)[k % 4 if whole else 0]).astype(dtype)
        values = np.ravel(leaf)
        if np.array_equal(np.sort(values), np.arange(values.size)):
            return rng.permutation(values).reshape(shape)
        low, high = int(values.min()), int(values.max())
        high = max([high, *(c - 1 for c in whole if high < c - 1 <= high + 64)])
        low = min([0, low, *(c for c in whole if -9 < c < 0)])
    ways: list[Callable[[], Any]] = [
        lambda: rng.integers(low, high + 1, shape),
        lambda: np.full(shape, low),
        lambda: np.full(shape, high),
        lambda: np.full(shape, rng.integers(low, high + 1)),
        lambda: rng.choice([low, high, *(c for c in equal if not low <= c <= high)], shape),
    ]
    found = np.asarray(ways[k % 5]())
    if len(shape) == 1 and shape[0] > 2 and not isinstance(leaf, Spec) and np.all(np.diff(np.asarray(leaf, int)) >= 0):
        found = np.sort(found)
    return found.astype(dtype)


class Numbers(NamedTuple):
    """What a function compares with: floating-point numbers, and by array argument the whole ones (with what lies
    beyond a clamp) and those of them that are asked for, such as −100 or 255, the label to be ignored.
    """

    floats: list[float]
    whole: list[list[int]]
    equal: list[list[int]]


def _numbers(trial: Trial) -> Numbers:
    """Of function and rule."""
    found: list[Any] = []
    with contextlib.suppress(Exception):  # NumPy code has no jaxpr
        found.append(trial.formula.jaxpr)
    with contextlib.suppress(Exception):
        found.append(trial.rule_in(trial.main))
    return numbers_of(found, len(trial.given))


def numbers_of(jaxprs: Sequence[Any], count: int) -> Numbers:
    """The literals of jaxprs that begin with so many array arguments."""
    floats = dict.fromkeys(float(atom.val) for jaxpr in jaxprs for atom in literals(jaxpr))
    whole: list[list[int]] = [[] for _ in range(count)]
    equal: list[list[int]] = [[] for _ in range(count)]
    for n, jaxpr in product(range(count), jaxprs):
        for equation in reached(jaxpr, [m == n for m in range(len(jaxpr.invars))]):
            values = [np.asarray(a.val) for a in equation.invars if hasattr(a, "val")]
            found = [int(a) for a in values if a.shape == () and np.issubdtype(a.dtype, np.integer)]
            beyond = [3, -2] if equation.primitive.name in ("max", "min", "clamp") else []
            whole[n] += [*found, *(c + s for c in found for s in beyond if abs(c) < 1e6)]
            equal[n] += found if equation.primitive.name in ("eq", "ne") else []
    return Numbers([*filter(np.isfinite, floats)], whole, equal)
