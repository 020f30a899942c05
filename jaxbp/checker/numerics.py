"""Check 6: differences of the reference, which trust no autodiff, with an error bar."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbp.checker.compare import compared, f64
from jaxbp.checker.data import cast
from jaxbp.checker.report import Row
from jaxbp.checker.subject import Leaves, floats
from jaxbp.checker.trial import QUICK, Trial, precise

NUMERICS = "independent numerics"
STEPS = 1e-2, 1e-3, 1e-4, 1e-6
Line = Callable[[float], list[np.ndarray]]
"""t ↦ f(x + t v)."""


class Difference(NamedTuple):
    """d/dt ⟨u, f(x + t v)⟩ at 0 and its error bar."""

    value: float
    bar: float


def numerics(trial: Trial, regimes: Mapping[str, Sequence[Any]], us: Leaves, probes: int) -> list[Row]:
    """6: ⟨v, Jᵀu⟩ against a Richardson difference, v on one leaf at a time.

    Where the error bar is too wide to decide at one regime's points, the next regime's are tried.
    """
    arguments = trial.subject.arguments
    function = trial.subject.function if trial.subject.own_reference else trial.subject.reference
    run = lambda p: floats(function(*arguments.call(p)))  # noqa: E731
    rows = []
    with precise():
        value = jax.jit(run, **QUICK) if trial.differentiable else run
        points = {regime: cast(leaves, "float64") for regime, leaves in regimes.items()}
        pulled = {regime: trial.run(leaves, us, "float64")[1] for regime, leaves in points.items()}
        for n, (path, position) in enumerate(zip(trial.paths, arguments.wrt, strict=True)):
            for probe in range(probes if points[next(iter(points))][position].size else 0):
                found: list[Row] = []
                for regime, leaves in points.items():
                    rng = np.random.default_rng([trial.seed, n, probe])
                    found.append(_row(value, leaves, position, us, pulled[regime][n], rng, path, regime))
                    if found[-1].verdict != "INCONCLUSIVE":
                        break
                rows.append(found[-1] if found[-1].verdict != "INCONCLUSIVE" else found[0])
    return rows


def _row(
    value: Callable[[Leaves], Any],
    points: Leaves,
    position: int,
    us: Leaves,
    pulled: np.ndarray,
    rng: np.random.Generator,
    path: str,
    regime: str,
) -> Row:
    v = rng.standard_normal(points[position].shape)
    v *= (points[position] != 0) if np.any(points[position]) else 1  # kinks and jumps are at exact zeros: they stay
    v /= np.linalg.norm(v)
    if np.shape(pulled) != v.shape:
        return Row(NUMERICS, "FAIL", path, "float64", regime, diagnosis=f"shape {np.shape(pulled)}, want {v.shape}")
    got = float(np.vdot(v, f64(pulled)))

    def line(t: float) -> list[np.ndarray]:
        return [f64(out) for out in value([p + t * v if n == position else p for n, p in enumerate(points)])]

    reach = max(1e-3, float(np.max(np.abs(points[position]), initial=0.0))) * np.sqrt(v.size)
    want, bar = difference(line, us, reach)
    scale = np.linalg.norm(f64(pulled)) / np.sqrt(v.size) + abs(want)
    if not np.isfinite(want + bar) or bar > 1e-3 * scale > 0:
        text = f"the error bar of the difference is {bar:.1e}: too wide to decide"
        return Row(NUMERICS, "INCONCLUSIVE", path, "float64", regime, (), got, want, 0.0, text)
    slope, bound = _slope(line, us, got), 10 * bar + 1e-7 * scale
    if abs(got - want) > bound and slope > 1.9:  # the steps of the difference crossed a kink, those of the slope do not
        text = f"the difference says {want:.7g}, the remainder's slope {slope:.2f} says that {got:.7g} is right"
        return Row(NUMERICS, "INCONCLUSIVE", path, "float64", regime, (), got, want, 0.0, text)
    text = f"the remainder has slope {slope:.2f} in the step: a right gradient has 2, a wrong one 1"
    return compared(NUMERICS, path, "float64", regime, got, f64(want), bound, text)


def difference(line: Line, us: Leaves, reach: float) -> Difference:
    """d/dt ⟨u, f(x + t v)⟩ at 0 by Richardson extrapolation of central differences.

    Of several step sizes the one with the smallest bar is taken; the bar is what the last extrapolation changed, what
    float64 rounds, and the distance to the next best step size.

    Source: C. Ridders, "Accurate computation of F′(x) and F′(x)F″(x)", Adv. Eng. Softw. 4, 1982.
    """

    def central(h: float) -> tuple[float, float]:
        plus, minus = line(h), line(-h)
        slope = sum(float(np.sum(f64(u) * (a - b))) for u, a, b in zip(us, plus, minus, strict=True)) / (2 * h)
        return slope, 4e-16 * sum(float(np.linalg.norm(f64(u) * a)) for u, a in zip(us, plus, strict=True)) / h

    found = []
    with np.errstate(all="ignore"):
        for h in (step * reach for step in STEPS):
            (d1, _), (d2, _), (d3, noise) = central(h), central(h / 2), central(h / 4)
            once, twice = (4 * d2 - d1) / 3, (4 * d3 - d2) / 3
            best = (16 * twice - once) / 15
            found.append((float(np.nan_to_num(abs(best - twice) + noise, nan=np.inf)), best))
    (bar, best), (next_bar, next_best), *_ = sorted(found)
    return Difference(best, bar + min(abs(best - next_best), 10 * next_bar))


def _slope(line: Line, us: Leaves, got: float) -> float:
    """log₂ of R(h) / R(h/2), R(h) = ⟨u, f(x + h v)⟩ − ⟨u, f(x)⟩ − h ⟨v, Jᵀu⟩, the remainder of Taylor's formula."""

    def remainder(h: float) -> float:
        change = sum(float(np.sum(f64(u) * (a - b))) for u, a, b in zip(us, line(h), line(0.0), strict=True))
        return abs(change - h * got)

    with np.errstate(all="ignore"):
        return float(np.log2(np.divide(remainder(2e-4), remainder(1e-4))))
