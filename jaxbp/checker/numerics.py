"""Check 6: differences of the reference, which trust no autodiff, with an error bar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxbp.checker.compare import compared, exceeds, f64
from jaxbp.checker.report import NUMERICS, Row
from jaxbp.checker.subject import Leaves, is_float
from jaxbp.checker.trial import Trial, first_line

STEPS = tuple(10.0**-k for k in range(2, 9))
FINE = tuple(10.0**-k for k in range(1, 12))
LARGE = 2e3
Line = Callable[..., list[np.ndarray]]
"""t, y = 0 ↦ f(x + y + t v)."""
NEIGHBOURS = 16  # points at which slopes beside a kink are taken


class _Place(NamedTuple):
    """Where differences are taken, and what the rule gave there."""

    regime: str
    points: Leaves
    pulled: Leaves
    bounds: Leaves


def numerics(trial: Trial, regimes: Mapping[str, Sequence[Any]], us: Leaves, probes: int) -> list[Row]:
    """6: ⟨v, Jᵀu⟩ against a Richardson difference, v on one leaf at a time.

    Where autodiff gives the truth, a regime at which the error bar decides is enough, the others are tried where it is
    too wide; where differences are all there is, every regime has to agree.
    """
    places: list[_Place] = []
    rows: list[Row] = []
    for regime, leaves in regimes.items():
        points = trial.cast(trial.cast(leaves, trial.strict), "float64")  # those that the rule is given
        value = _value(trial, points)
        if not all(np.all(np.isfinite(a)) for a in value):
            continue
        try:
            pulled = trial.run(leaves, us, trial.strict)
        except Exception as error:
            rows.append(Row(NUMERICS, "FAIL", "", "float64", regime, diagnosis=f"raised {first_line(error)}"))
            continue
        if not trial.oracle:  # autodiff compares the values more closely
            rows += _values(trial, regime, points, pulled.value, value[len(value) - len(pulled.value) :])
        places.append(_Place(regime, points, pulled.cotangents, trial.bounds(leaves, us, trial.strict)[0]))
    for n, path in enumerate(trial.paths):
        for probe in range(probes):
            tried: list[Row] = []
            for place in places:
                rng = np.random.default_rng([trial.settings.seed, n, probe])
                found = _rows(trial, us, place, n, path, rng)
                if not trial.oracle and any(row.verdict == "FAIL" for row in found) and _rough(trial, place.points):
                    continue
                tried += found
                if trial.oracle and tried and tried[-1].verdict != "INCONCLUSIVE":
                    break
            decided = [row for row in tried if row.verdict != "INCONCLUSIVE"]
            rows += decided or tried[:1]
    return rows


def _value(trial: Trial, points: Leaves) -> list[np.ndarray]:
    """Of the reference; not finite where it does not take these points, as a NumPy function may outside its domain."""
    try:
        return trial.line(points)
    except Exception:
        return [np.asarray(np.nan)]


def _values(trial: Trial, regime: str, points: Leaves, got: Leaves, wanted: Leaves) -> list[Row]:
    """The values that the rule returns against those of the reference, where rounding leaves these three digits."""
    unit = 1e3 * float(trial.info(trial.strict).eps) + trial.accuracy
    text = "the rule returns another value than the function"
    rows = []
    for n, (value, want) in enumerate(zip(got, wanted, strict=True)):
        size = np.max(np.abs(want), initial=0.0)
        bound = unit * size + unit
        lost = _lost(trial, points, n - len(got), want) if exceeds(value, want, bound) else 0.0
        if lost <= 1e-3 * size:
            rows.append(compared(NUMERICS, f"output[{n}]", trial.strict, regime, value, want, bound + 8 * lost, text))
    return rows


def _lost(trial: Trial, points: Leaves, n: int, want: np.ndarray) -> float:
    """How far an output of the reference moves with arguments that are off by a rounding of their largest number."""
    rng, eps = np.random.default_rng(trial.settings.seed), float(trial.info(trial.differenced).eps)
    sizes = [np.max(np.abs(p), initial=0.0) if is_float(p) else 0 for p in points]
    found = []
    for _ in range(4):
        moved = [p + eps * a * rng.uniform(-2, 2, p.shape) if a else p for p, a in zip(points, sizes, strict=True)]
        found.append(np.max(np.abs(_value(trial, moved)[n] - want), initial=0.0))
    return float(np.nan_to_num(np.max(found), nan=np.inf))


def _rough(trial: Trial, points: Leaves) -> bool:
    """Whether rounding leaves the reference less than three digits: what it is at a step says nothing of its slope."""
    values = _value(trial, points)
    return any(_lost(trial, points, n, v) > 1e-3 * np.max(np.abs(v), initial=0.0) for n, v in enumerate(values))


def _direction(trial: Trial, points: Leaves, n: int, rng: np.random.Generator) -> np.ndarray:
    """A unit vector on the nth differentiated leaf; 0 if nothing is left of it.

    Kinks and jumps are at exact zeros: they stay, and so does what is too large for a step.
    """
    wrt = trial.subject.arguments.wrt
    x = f64(points[wrt[n]])
    small = np.abs(x) < min(LARGE, 1e-4 / float(trial.info(trial.differenced).eps))
    v = rng.standard_normal(x.shape) * ((x != 0) if np.any(x) else 1) * small
    v = trial.projected(points, [v if m == n else 0 * points[p] for m, p in enumerate(wrt)])[n]
    return np.asarray(v / (np.linalg.norm(v) or 1))


def _rows(trial: Trial, us: Leaves, place: _Place, n: int, path: str, rng: np.random.Generator) -> list[Row]:
    position, pulled = trial.subject.arguments.wrt[n], f64(place.pulled[n])
    x, row = f64(place.points[position]), Row(NUMERICS, "FAIL", path, "float64", place.regime)
    if pulled.shape != x.shape:
        return [replace(row, diagnosis=f"shape {pulled.shape}, want {x.shape}")]
    undefined = np.isnan(pulled)
    v = _direction(trial, place.points, n, rng)
    if np.any(undefined):
        v = np.eye(1, x.size, int(np.argmax(undefined))).reshape(x.shape)
    if not np.any(v) or np.any(np.isinf(pulled)):
        return []

    def line(t: float, y: Any = 0.0) -> list[np.ndarray]:
        return trial.line([p + y + t * v if m == position else p for m, p in enumerate(place.points)])

    got = float(np.vdot(v, pulled))
    largest = float(np.max(np.abs(x[v != 0]), initial=0.0))
    reach = max(1e-3, largest) * np.sqrt(v.size)
    if np.isnan(got):
        sides = [_one_sided(line, us, 0.0, side * reach) for side in (1e-6, -1e-6)]
        smooth = abs(sides[0] - sides[1]) <= 1e-3 * (abs(sides[0]) + abs(sides[1])) + 1e-6
        text = "NaN where the function has a derivative"
        return [replace(row, got=got, want=sides[0], ratio=np.inf, diagnosis=text)] * int(smooth)
    noise = _noise(trial, place.points, us, line(0.0))
    eps = float(trial.info(trial.differenced).eps)
    scale = float(np.linalg.norm(pulled * (v != 0)) / np.sqrt(v.size))
    want, bar, step = difference(line, us, reach, noise, 1e-11 * scale, eps)
    scale = scale + abs(want) if np.isfinite(scale) else abs(want)
    row = replace(row, verdict="INCONCLUSIVE", got=got, want=want)
    if not np.isfinite(want + bar) or bar > 1e-3 * scale > 0:
        return [replace(row, diagnosis=f"the error bar of the difference is {bar:.1e}: too wide to decide")]
    unit = float(trial.info(trial.strict).eps)
    allowed = float(np.linalg.norm(v * place.bounds[n])) if np.all(np.isfinite(place.bounds[n])) else np.inf
    bound = 10 * bar + max(1e-9, 16 * unit) * scale + allowed + trial.accuracy * scale
    if abs(got - want) <= bound and np.isfinite(got):
        return [compared(NUMERICS, path, "float64", place.regime, got, f64(want), bound)]
    blur = (noise + float(np.linalg.norm(pulled * (v != 0))) * eps * largest) / step
    beside = 1e-4 * reach * rng.standard_normal((NEIGHBOURS, *x.shape))
    return [_refuted(line, us, row, reach, step, scale, blur, bound, beside)]


def _refuted(
    line: Line, us: Leaves, row: Row, reach: float, step: float, scale: float, blur: float, bound: float, beside: Any
) -> Row:
    """Where got is outside the bound: a kink, a function too rough for the steps, or a wrong rule. What is between the
    slopes of the points beside a kink is right there (Clarke's derivative): of tied elements any may be the greatest.
    """
    got, want = float(row.got or 0.0), float(row.want or 0.0)
    off = abs(got - want)
    for h in FINE:  # in units of the step
        wide, narrow = (_one_sided(line, us, -k * h * step, 2 * k * h * step) for k in (1.0, 0.5))
        fine = (4 * narrow - wide) / 3
        if 9 * blur / h < 0.3 * off < abs(fine - want) - 9 * blur / h:
            return replace(row, diagnosis=f"the difference says {want:.7g}, shorter steps {fine:.7g}")
    sides = [_one_sided(line, us, 0.0, side * reach) for side in (1e-6, -1e-6)]
    gap = abs(sides[0] - sides[1])
    if gap > 1e-2 * scale:
        sides += [_one_sided(partial(line, y=y), us, 0.0, 1e-6 * reach) for y in beside]
        gap = max(sides) - min(sides)
        if min(sides) - 0.05 * gap <= got <= max(sides) + 0.05 * gap:
            return replace(row, verdict="PASS", diagnosis="")
        text = f"at a kink, whose slopes are {min(sides):.7g} and {max(sides):.7g}"
        return replace(row, verdict="FAIL", diagnosis=text)
    slope = _slope(line, us, got)
    text = f"the remainder has slope {slope:.2f} in the step: a right gradient has 2, a wrong one 1" * (slope < 1.5)
    return compared(NUMERICS, row.path, row.dtype, row.regime, got, f64(want), bound, text)


def _noise(trial: Trial, points: Leaves, us: Leaves, at: Sequence[np.ndarray]) -> float:
    """How far rounding may move ⟨u, f⟩."""
    if trial.oracle == "float64":
        spread = [b / 64 for b in trial.truth(points, us, "float64").reference_bound]
        return sum(float(np.linalg.norm(f64(u) * np.minimum(b, 1e300))) for u, b in zip(us, spread, strict=True))
    eps = 4e-16 if trial.oracle else 4e-16 + float(trial.info(trial.differenced).eps)
    return eps * sum(float(np.linalg.norm(f64(u) * a)) for u, a in zip(us, at, strict=True))


def difference(
    line: Line,
    us: Leaves,
    reach: float,
    noise: float = 0.0,
    enough: float = 0.0,
    eps: float = 2.2e-16,
) -> tuple[float, float, float]:
    """d/dt ⟨u, f(x + t v)⟩ at 0 by Richardson extrapolation of central differences, its error bar, and the step.

    Of several step sizes the one with the smallest bar is taken; the bar is what the last extrapolation changed, what
    rounding of the function does (noise), and the distance to the next best step size. Steps are tried until two bars
    are below `enough`, none below √eps of what the function computes in.

    Source: C. Ridders, "Accurate computation of F′(x) and F′(x)F″(x)", Adv. Eng. Softw. 4, 1982.
    """

    def central(h: float) -> tuple[float, float]:
        plus, minus = line(h), line(-h)
        slope = sum(float(np.sum(f64(u) * (a - b))) for u, a, b in zip(us, plus, minus, strict=True)) / (2 * h)
        size = 4e-16 * sum(float(np.linalg.norm(f64(u) * a)) for u, a in zip(us, plus, strict=True))
        return slope, (size + noise) / h

    found: list[tuple[float, float, float]] = []
    for h in (step * reach for step in STEPS if step > eps**0.5):
        (d1, _), (d2, _), (d3, rounded) = central(h), central(h / 2), central(h / 4)
        once, twice = (4 * d2 - d1) / 3, (4 * d3 - d2) / 3
        best = (16 * twice - once) / 15
        found.append((float(np.nan_to_num(abs(best - twice) + rounded, nan=np.inf)), best, h))
        if sum(bar <= enough for bar, *_ in found) >= 2:
            break
    (bar, best, step), (next_bar, next_best, _), *_ = sorted(found)
    return best, bar + min(abs(best - next_best), 10 * next_bar), step


def _change(line: Line, us: Leaves, start: float, end: float) -> float:
    """⟨u, f(x + end v) − f(x + start v)⟩."""
    ends = zip(us, line(end), line(start), strict=True)
    return sum(float(np.sum(f64(u) * (a - b))) for u, a, b in ends)


def _one_sided(line: Line, us: Leaves, start: float, step: float) -> float:
    return _change(line, us, start, start + step) / step


def _slope(line: Line, us: Leaves, got: float) -> float:
    """log₂ of R(h) / R(h/2), R(h) = ⟨u, f(x + h v)⟩ − ⟨u, f(x)⟩ − h ⟨v, Jᵀu⟩, the remainder of Taylor's formula."""

    def remainder(h: float) -> float:
        return abs(_change(line, us, 0.0, h) - h * got)

    return float(np.log2(np.divide(remainder(2e-4), remainder(1e-4))))
