"""What a rule may give at a kink of the reference: autodiff's choice, one side, or anything between the sides."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbp.checker.compare import error_over_bound, exceeds, f64
from jaxbp.checker.jaxpr import splits_ties
from jaxbp.checker.subject import Leaves
from jaxbp.checker.trial import NEAR, Kinks, Trial, Truth

PLACES = 48  # elements that are shifted alone
LAST = 64 * 4 * 1.1e-16 / NEAR  # of the spread: a textbook rule is right for arguments rounded anew


class Wanted(NamedTuple):
    """What a leaf should get, within which bound, and what to say if it does not."""

    cotangent: np.ndarray
    bound: np.ndarray
    note: str = ""


def at_kinks(
    trial: Trial, points: Sequence[Any], us: Leaves, dtype: str, got: Sequence[np.ndarray], truth: Truth
) -> list[Wanted]:
    """The wanted cotangents with the convention applied where the reference's sides differ."""
    wanted = [Wanted(want, bound) for want, bound in zip(truth.cotangents, truth.bound, strict=True)]
    wrong = any(exceeds(g, w.cotangent, w.bound) for g, w in zip(got, wanted, strict=True))
    kind = trial.settings.kinks
    if not wrong and kind not in ("left", "right"):
        return wanted
    leaves = [f64(leaf) for leaf in trial.subject.arguments.differentiated(points)]

    def near(shifts: Leaves, moved: float = 0.0, results: float = 0.0) -> list[Leaves]:
        return trial.near(points, us, dtype, shifts, moved, results)

    around = [near([side] * len(leaves))[0] for side in (-1.0, 1.0)]
    if not wrong and not any(np.any(np.abs(a - b) > _smooth(a, b)) for a, b in zip(*around, strict=True)):
        return wanted
    closer = [near([side] * len(leaves))[0] for side in (-1e-5, 1e-5)]
    unit = 0.0 if trial.subject.project else NEAR / 4  # no tangent spaces
    drawn = zip(*near([], moved=unit)[1:], *around, strict=True)
    spread = [(np.array(np.min(leaf, axis=0)), np.array(np.max(leaf, axis=0))) for leaf in drawn]
    kinks = [high - low > _smooth(low, high) for low, high in spread]
    free = kind == "subgradient" or (kind == "reference" and splits_ties(trial.formula.jaxpr))
    slack = 1e-6 if dtype in ("float64", "float32") else 0.05
    fits = free and any(map(np.any, kinks))
    fits = fits and (trial.subject.forward or _in_sum(near, leaves, got, truth, slack))
    inside = [*zip(*near([], results=unit)[1:], strict=True)] if fits else spread
    found = []
    for n, (g, w) in enumerate(zip(got, wanted, strict=True)):
        if np.shape(g) != w.cotangent.shape or not w.cotangent.size:
            found.append(w)
            continue
        low, high = spread[n]
        w = w._replace(bound=w.bound + LAST * np.nan_to_num(high - low, posinf=0.0))
        between = (f64(g) >= low - w.bound) & (f64(g) <= high + w.bound)
        outside = kinks[n] & (error_over_bound(g, w.cotangent, w.bound) > 1) & ~between
        for index in map(tuple, np.argwhere(outside)[:PLACES] if fits and not trial.subject.forward else ()):
            sides = [near(_shift(leaves, n, index, side))[0][n][index] for side in (-1.0, 1.0)]
            low[index], high[index] = min(low[index], *sides), max(high[index], *sides)
        lasts = np.abs(closer[1][n] - closer[0][n]) > np.abs(around[1][n] - around[0][n]) / 2
        chosen = low, high, around[kind == "right"][n], *inside[n]
        found.append(_at_kink(kind, f64(g), w, chosen, slack, fits, lasts))
    return found


def _shift(leaves: Leaves, n: int, index: Any, side: float) -> Leaves:
    shifts = [np.zeros(leaf.shape) for leaf in leaves]
    shifts[n][index] = side
    return shifts


def _smooth(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """By how much the sides of a smooth function may differ so near."""
    size = np.maximum(np.abs(low), np.abs(high))
    return np.asarray(1e-6 * size + 1e-13 * np.max(size, initial=0.0))


def _in_sum(near: Callable[[Leaves], Any], leaves: Leaves, got: Sequence[Any], truth: Truth, slack: float) -> bool:
    """Whether ⟨got, v⟩ is the derivative along every v that leaves ties tied, such as all tied numbers scaled by one
    factor: along these the reference is smooth, whatever its parts are given.
    """
    if any(np.shape(g) != leaf.shape for g, leaf in zip(got, leaves, strict=True)):
        return True
    sizes, counts = np.unique(np.concatenate([np.abs(leaf).ravel() for leaf in leaves]), return_counts=True)
    groups = [np.abs(leaf) >= 0 for leaf in leaves], *([np.abs(a) == c for a in leaves] for c in sizes[counts > 1][:8])
    for group in groups:
        shifts = [np.where(leaf == 0, 1.0, np.sign(leaf)) * chosen for leaf, chosen in zip(leaves, group, strict=True)]
        along = [np.where(leaf == 0, 1.0, np.abs(leaf)) * shift for leaf, shift in zip(leaves, shifts, strict=True)]
        ends = [near([side * shift for shift in shifts])[0] for side in (-1.0, 1.0)]
        low, high = (_inner(end, along) for end in ends)
        size = _inner([np.abs(a) for a in ends[0]], [np.abs(v) for v in along])
        bound = _inner([np.abs(b) for b in truth.bound], [np.abs(v) for v in along])
        smooth = abs(high - low) <= 1e-6 * size
        if smooth and not abs(_inner([f64(g) for g in got], along) - low) <= bound + slack * size:
            return False
    return True


def _inner(a: Leaves, b: Leaves) -> float:
    """⟨a, b⟩, 0 where b is."""
    return float(sum(np.sum(np.where(y == 0, 0, x * y)) for x, y in zip(a, b, strict=True)))


def _at_kink(
    kinks: Kinks, got: np.ndarray, wanted: Wanted, sides: Sequence[Any], slack: float, fits: bool, lasts: np.ndarray
) -> Wanted:
    """At a kink: the chosen side; or got itself if it fits in sum and is between the sides element by element.

    lasts: where the sides differ as much 10⁵ times as near; sin at 1e10 has no kink.

    Where the sides agree with each other and with neither autodiff nor got at the point itself, autodiff split a tie
    inside a smooth function (logaddexp(0, 0) by a max and a where): the derivative is the limit.
    """
    (want, bound, _), (low, high, side, least, most) = wanted, sides
    size, middle = np.maximum(np.abs(low), np.abs(high)), (low + high) / 2
    kink, rounded = high - low > _smooth(low, high), slack * size
    removable = ~kink & (np.abs(want - middle) > _smooth(low, high)) & (error_over_bound(got, want, bound) > 1)
    want, bound = np.where(removable, middle, want), np.where(removable, bound + rounded, bound)
    if kinks in ("left", "right"):
        kink &= lasts
        smooth = high - low < 1e-8 * np.max(size, initial=0.0)  # as where a smooth function goes through 0
        rounded = rounded + np.where(smooth, high - low, 0.0)
        want, bound = np.where(kink, side, want), np.where(kink, bound + rounded, bound)
    elif fits:
        margin = bound + rounded * kink  # beside large numbers a kink is too small to be visible
        between = (got >= np.minimum(low, least) - margin) & (got <= np.maximum(high, most) + margin)
        want = np.where(between, got, want)
    bound = np.where(np.isinf(wanted.bound), np.inf, bound)
    ratio = error_over_bound(got, want, bound)
    explained = kink & (np.abs(got - want) < 100 * (high - low))
    if not np.any(ratio > 1) or not np.all(explained[ratio > 1]):
        return Wanted(want, bound)
    at = np.unravel_index(np.argmax(ratio), ratio.shape)
    note = f"differs only at a kink, whose sides are {low[at]:.6g} and {high[at]:.6g} (kinks={kinks!r})"
    return Wanted(want, bound, note)
