"""Checks 3, 4, 5, 7 and 9: the cotangent's algebra, float64 autodiff element by element, and what was not exercised."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.compare import arrays, compared, error_over_bound, exceeds, f64
from jaxbp.checker.data import cast
from jaxbp.checker.diagnosis import diagnose
from jaxbp.checker.report import Row
from jaxbp.checker.subject import Leaves
from jaxbp.checker.trial import QUICK, Trial, Truth, precise

ALGEBRA, ORACLE, ADJOINT, PRODUCTION, EDGES = (
    "cotangent algebra",
    "float64 oracle",
    "adjoint identity",
    "production dtype",
    "edges and vacuity",
)
Points = Sequence[Any]


def algebra(trial: Trial, points: Points, us: Leaves, dtype: str) -> list[Row]:
    """3: the same call gives the same bits; backward(0) is exactly 0; backward is linear, also at 2^±20."""

    def pulled(vs: Leaves) -> Leaves:
        return arrays(trial.run(points, vs, dtype)[1])

    first = pulled(us)
    exact = [np.full((), np.finfo(np.float64).tiny)] * len(first)
    rows = [*_rows(ALGEBRA, trial, dtype, "two calls", pulled(us), first, exact)]
    if trial.subject.kind == "gradient":
        return rows
    text = "not 0 where the cotangent is 0: it is ignored, or something is added to it"
    zeros = [np.zeros(g.shape) for g in first]
    rows += _rows(ALGEBRA, trial, dtype, "backward(0)", pulled([0 * f64(u) for u in us]), zeros, exact, text)
    rng = np.random.default_rng(trial.seed + 1)
    vs = [rng.standard_normal(np.shape(u)) for u in us]
    second, both = pulled(vs), pulled([2 * f64(u) + v for u, v in zip(us, vs, strict=True)])
    bounds = zip(trial.bounds(points, us, dtype), trial.bounds(points, vs, dtype), strict=True)
    limits = [_linear_bound(dtype, *parts) for parts in zip(first, second, bounds, strict=True)]
    sums, text = [2 * a + b for a, b in zip(first, second, strict=True)], "backward is not linear in its cotangent"
    rows += _rows(ALGEBRA, trial, dtype, "additive", both, sums, limits, text)
    for scale in (2.0**20, 2.0**-20):
        scaled = [g / scale for g in pulled([f64(u) * scale for u in us])]
        lost = 64 * float(jnp.finfo(dtype).smallest_normal) / min(scale, 1)
        wide = [limit + lost for limit in limits]
        rows += _rows(ALGEBRA, trial, dtype, f"cotangent × {scale:.0e}", scaled, first, wide, text)
    return rows


def _linear_bound(dtype: str, a: Any, b: Any, bounds: tuple[Any, Any]) -> np.ndarray:
    """Of B(2u + v) − 2B(u) − B(v): the cotangents 2u + v are rounded too."""
    rounded = float(jnp.finfo(dtype).eps) * (2 * np.abs(a) + np.abs(b))
    return np.asarray(8 * (2 * bounds[0] + bounds[1] + rounded))


def oracle(trial: Trial, regime: str, points: Points, us: Leaves, dtype: str, truth: Truth) -> list[Row]:
    """4 in float64, 7 in the other dtypes: value and cotangents against float64 autodiff, element by element."""
    check = ORACLE if dtype == "float64" else PRODUCTION
    value, got = trial.run(points, us, dtype)
    rows = []
    for n, v in enumerate(value):
        name = "output" if len(value) == 1 else f"output[{n}]"
        text = "the forward's value is not the function's"
        rows.append(compared(check, name, dtype, regime, v, truth.value[n], truth.value_bound[n], text))
    wanted = [Wanted(want, bound) for want, bound in zip(truth.cotangents, truth.bound, strict=True)]
    if trial.kinks in ("left", "right") or any(exceeds(g, *w[:2]) for g, w in zip(got, wanted, strict=True)):
        wanted = _at_kinks(trial, points, us, dtype, got, wanted)
    for n, path in enumerate(trial.paths):
        note = wanted[n].note
        if not note and exceeds(got[n], wanted[n].cotangent, wanted[n].bound):
            note = _diagnosis(trial, n, got[n], truth, points)
        rows.append(compared(check, path, dtype, regime, got[n], wanted[n].cotangent, wanted[n].bound, note))
    return rows


class Wanted(NamedTuple):
    """What a leaf should get, within which bound, and what to say if it does not."""

    cotangent: np.ndarray
    bound: np.ndarray
    note: str = ""


def _at_kinks(
    trial: Trial, points: Points, us: Leaves, dtype: str, got: Sequence[np.ndarray], wanted: Sequence[Wanted]
) -> list[Wanted]:
    """The wanted cotangents with the convention applied where the reference's sides differ."""
    low, high = trial.sides(points, us, dtype)
    sides = trial.side(points, us, dtype, 1.0 if trial.kinks == "right" else -1.0)
    noise = trial.truth(cast(points, dtype), [f64(u).astype(dtype) for u in us], "float64").bound
    return [
        _at_kink(trial, f64(g), w, lo, hi, side, 2 * rounded) if np.shape(g) == lo.shape else w
        for g, w, lo, hi, side, rounded in zip(got, wanted, low, high, sides, noise, strict=True)
    ]


def _at_kink(
    trial: Trial, got: np.ndarray, wanted: Wanted, low: np.ndarray, high: np.ndarray, side: np.ndarray, noise: Any
) -> Wanted:
    """At a kink: the chosen side; or got itself if it is between the sides (or as far beyond) and that is allowed.

    Where the sides agree with each other and not with autodiff at the point itself, autodiff split a tie inside a
    smooth function (logaddexp(0, 0) by a max and a where): the derivative is the limit.
    """
    want, bound, _ = wanted
    size = np.maximum(np.abs(low), np.abs(high))
    visible = np.maximum(1e-6 * size, noise)
    kink, middle = high - low > visible, (low + high) / 2
    removable = ~kink & (np.abs(want - middle) > visible)
    want, bound = np.where(removable, middle, want), np.where(removable, bound + 1e-7 * size, bound)
    if trial.kinks in ("left", "right"):
        want, bound = np.where(kink, side, want), np.where(kink, bound + 1e-6 * size, bound)
    elif trial.kinks == "subgradient" or trial.splits_ties:
        between = (got >= 2 * low - high) & (got <= 2 * high - low)
        want = np.where(kink & between, got, want)
    ratio = error_over_bound(got, want, bound)
    if not np.any(ratio > 1) or not np.all(kink[ratio > 1]):
        return Wanted(want, bound)
    at = np.unravel_index(np.argmax(ratio), ratio.shape)
    note = f"differs only at a kink, whose sides are {low[at]:.6g} and {high[at]:.6g} (kinks={trial.kinks!r})"
    return Wanted(want, bound, note)


def _diagnosis(trial: Trial, n: int, got: np.ndarray, truth: Truth, points: Points) -> str:
    others = {path: want for m, (path, want) in enumerate(zip(trial.paths, truth.cotangents, strict=True)) if m != n}
    argument = f64(points[trial.subject.arguments.wrt[n]])
    lengths = [size for leaf in points for size in np.shape(leaf)]
    with np.errstate(all="ignore"):
        return diagnose(f64(got), truth.cotangents[n], argument, others, lengths)


def adjoint(trial: Trial, points: Points, us: Leaves, probes: int) -> list[Row]:
    """5: ⟨J v, u⟩ = ⟨v, Jᵀ u⟩ in float64, v fresh normalised probes on one leaf at a time."""
    rng = np.random.default_rng(trial.seed + 2)
    _, pulled = trial.run(points, us, "float64")
    truth = trial.truth(points, us, "float64")
    wrt = cast(trial.subject.arguments.differentiated(points), "float64")
    rows = []
    push = _pushforward(trial, cast(points, "float64"))
    for n, path in enumerate(trial.paths):
        for _ in range(probes if wrt[n].size else 0):
            v = rng.standard_normal(wrt[n].shape)
            v /= np.linalg.norm(v)
            pushed = push([v if m == n else np.zeros_like(a) for m, a in enumerate(wrt)])
            left = sum(float(np.vdot(f64(u), f64(t))) for u, t in zip(us, pushed, strict=True))
            right = np.vdot(v, f64(pulled[n])) if np.shape(pulled[n]) == v.shape else np.nan
            limit = 64 * np.linalg.norm(v * truth.bound[n]) + 1e-13 * np.linalg.norm(v * truth.cotangents[n])
            rows.append(compared(ADJOINT, path, "float64", "⟨v, Jᵀu⟩", right, f64(left), limit))
    return rows


def _pushforward(trial: Trial, points: Leaves) -> Callable[[Leaves], Leaves]:
    """v ↦ J v by forward-mode autodiff of the reference."""
    arguments = trial.subject.arguments
    run = jax.jit(lambda p, v: jax.jvp(trial.subject.reference_of(p), (arguments.differentiated(p),), (v,))[1], **QUICK)

    def push(tangents: Leaves) -> Leaves:
        with precise():
            return list(run(points, tangents))

    return push


def vacuity(trial: Trial, truths: Sequence[Truth], allow_zero: bool | Sequence[int | str]) -> list[Row]:
    """9: a leaf whose true gradient was about 0 at every point was not exercised."""
    prefixes = ("",) if allow_zero is True else tuple(f"[{p}]" if isinstance(p, int) else p for p in allow_zero or ())
    rows = []
    for n, path in enumerate(trial.paths):
        allowed = path.startswith(prefixes) if prefixes else False
        seen = any(np.any(np.isfinite(t.bound[n]) & (np.abs(t.cotangents[n]) > t.bound[n])) for t in truths)
        if seen or allowed or not truths[0].cotangents[n].size:
            rows.append(Row(EDGES, "PASS", path))
        else:
            text = "its true gradient is about 0 at every point tried; allow_zero= if that is meant"
            rows.append(Row(EDGES, "UNEXERCISED", path, diagnosis=text))
    return rows


def _rows(
    check: str, trial: Trial, dtype: str, regime: str, got: Leaves, want: Leaves, bounds: Leaves, text: str = ""
) -> Iterator[Row]:
    for path, g, w, bound in zip(trial.paths, got, want, bounds, strict=True):
        yield compared(check, path, dtype, regime, g, w, bound, text)
