"""Checks 3, 4, 5, 7 and 9: the cotangent's algebra, autodiff element by element, and what was not exercised."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.compare import arrays, compared, exceeds, f64
from jaxbp.checker.diagnosis import diagnose
from jaxbp.checker.kinks import at_kinks
from jaxbp.checker.report import ADJOINT, ALGEBRA, EDGES, ORACLE, PRODUCTION, Row
from jaxbp.checker.subject import Leaves, Pulled
from jaxbp.checker.trial import QUICK, Trial, Truth, precise

Points = Sequence[Any]
ANOTHER_VALUE = "the forward's value is not the function's"


def algebra(trial: Trial, dtype: str) -> list[Row]:
    """3: the same call gives the same bits; backward(0) is exactly 0; backward is linear at all scales of the dtype."""
    points, us, info = trial.given, trial.dense(), trial.info(dtype)
    top, eps = float(info.max), float(info.eps)
    rows: list[Row] = []
    linear_in = "tangent" if trial.subject.forward else "cotangent"
    nonlinear = f"the rule is not linear in its {linear_in}"

    def pulled(vs: Leaves) -> Leaves:
        return arrays(trial.run(points, vs, dtype).cotangents)

    def compare(regime: str, got: Leaves, want: Leaves, bounds: Leaves, text: str = nonlinear) -> None:
        for path, g, w, bound in zip(trial.paths, got, want, bounds, strict=True):
            rows.append(compared(ALGEBRA, path, dtype, regime, g, w, bound, text))

    first = pulled(us)
    exact = [np.where(np.isnan(g), np.inf, np.finfo(np.float64).tiny) for g in first]  # NaN: outside the domain
    compare("two calls", pulled(us), first, exact, "")
    if trial.subject.kind == "gradient":
        return rows
    text = f"not 0 where the {linear_in} is 0: it is ignored, or something is added to it"
    zeros = [np.zeros(g.shape) for g in first]
    compare("backward(0)", pulled([0 * f64(u) for u in us]), zeros, exact, text)
    given = trial.bounds(points, us, dtype)[0]
    half = max(5, int(np.log2(top) / 2) - 4)
    powers = {min(20, half)} if trial.accuracy else {min(20, half), half}  # a solver takes the squares of its errors
    for scale in (sign * 2.0**power for power in powers for sign, power in ((1, power), (-1, power), (1, -power))):
        scaled = [g / scale for g in pulled([f64(u) * scale for u in us])]
        lost = 64 * float(info.smallest_normal) / min(abs(scale), 1)
        limits = [8 * (4 * b + eps * np.abs(f)) + lost for b, f in zip(given, first, strict=True)]
        limits = [np.where(np.abs(f * scale) > top / 64, np.inf, b) for f, b in zip(first, limits, strict=True)]
        compare(f"{linear_in} × {scale:.0e}", scaled, first, limits)
    rng = np.random.default_rng(trial.settings.seed + 1)
    others = {
        "dense": [rng.standard_normal(np.shape(u)) for u in us],
        "negative": [-np.abs(f64(u)) for u in us],
        "constant": [np.ones(np.shape(u)) for u in us],
        "tiny and huge": [f64(u) * 4.0 ** (np.arange(np.size(u)).reshape(np.shape(u)) % 5 - 2) for u in us],
    }
    for name, vs in others.items():  # B(u + v) = B(u) + B(v); the cotangents u + v are rounded too
        both, second = pulled([f64(u) + v for u, v in zip(us, vs, strict=True)]), pulled(vs)
        parts = [*zip(first, second, given, trial.bounds(points, vs, dtype)[0], strict=True)]
        limits = [8 * (b + c + eps * np.abs(f) + eps * np.abs(s)) for f, s, b, c in parts]
        compare(f"additive, {name}", both, [f + s for f, s, *_ in parts], limits)
    return rows


def not_swallowed(trial: Trial, dtype: str) -> Iterator[Row]:
    """3: what depends on an output with a NaN or ∞ as its cotangent is not finite. Nothing is said of a wrong rule."""
    if trial.subject.kind == "gradient" or trial.failing:
        return
    points, us = trial.given, trial.dense()
    n = int(np.argmax([np.size(u) for u in us]))
    if not np.size(us[n]):
        return
    hot = [np.zeros(np.shape(u)) for u in us]
    hot[n].flat[np.size(us[n]) // 2] = 1.0
    if trial.oracle:
        truth = trial.truth(points, hot, dtype if dtype != "float64" else trial.oracle)
        depends = [np.abs(w) > 4 * b for w, b in zip(truth.cotangents, truth.bound, strict=True)]
    else:
        depends = [np.abs(g) > 0 for g in arrays(trial.run(points, hot, dtype).cotangents)]
    for value in (np.nan, np.inf):
        hot[n].flat[np.size(us[n]) // 2] = value
        try:
            found = arrays(trial.run(points, hot, dtype).cotangents)
        except Exception:  # a rule that refuses such a number does not swallow it
            continue
        pairs = zip(found, depends, strict=True)
        lost: list[Any] = [np.argwhere(live & np.isfinite(g)) if g.shape == live.shape else [] for g, live in pairs]
        if trial.oracle and any(map(len, lost)):
            own = trial.autodiff(points, hot, dtype)[1]  # which may do the same
            lost = [[]] * len(lost) if all(np.all(np.isfinite(g)) for g in own) else lost
        text = f"finite where the cotangent is {value}: an overflow or a mistake further on would go unseen"
        where = f"cotangent {value}"
        for path, g, places in zip(trial.paths, found, lost, strict=True):
            if len(places):
                index = tuple(map(int, places[0]))
                yield Row(ALGEBRA, "FAIL", path, dtype, where, index, float(g[index]), value, np.inf, text)
            else:
                yield Row(ALGEBRA, "PASS", path, dtype, where)


def oracle(trial: Trial, regime: str, points: Points, us: Leaves, dtype: str, truth: Truth) -> list[Row]:
    """4 in float64, 7 in the other dtypes: value and cotangents against float64 autodiff, element by element."""
    check = ORACLE if dtype == "float64" else PRODUCTION
    found = trial.run(points, us, dtype)
    got = found.cotangents
    rows = [*_values(trial, check, regime, dtype, found, truth)]
    if not all(np.all(np.isfinite(v)) for v in truth.value):  # where log is −∞, its slope need not be a number
        defined = [np.where(np.isfinite(g), b, np.inf) for g, b in zip(got, truth.bound, strict=True)]
        truth = dataclasses.replace(truth, bound=defined)
    wrong = any(exceeds(g, w, b) for g, w, b in zip(got, truth.cotangents, truth.bound, strict=True))
    if wrong or any(row.verdict != "PASS" for row in rows):
        if dtype != "float64":
            allowed = _own_errors(trial, points, us, dtype, truth, got)
            if allowed is None:
                return []
            truth = allowed
            rows = [*_values(trial, check, regime, dtype, found, truth)]
        elif trial.traceable:
            own = zip(trial.own(points, dtype)[0], truth.value, strict=True)
            if any(np.any(~np.isfinite(value) & np.isfinite(want)) for value, want in own):  # too large for it
                return []
    if found.others and dtype == trial.strict:  # whole numbers and booleans are the function's, bit for bit
        for n, (v, want) in enumerate(zip(found.others, trial.own(points, dtype)[1], strict=True)):
            rows.append(compared(check, f"other output[{n}]", dtype, regime, f64(v), f64(want), 0.5, ANOTHER_VALUE))
    wanted = at_kinks(trial, points, us, dtype, got, truth)
    for n, (path, (want, bound, note)) in enumerate(zip(trial.paths, wanted, strict=True)):
        if not note and exceeds(got[n], want, bound):
            note = _diagnosis(trial, n, got[n], want, bound, truth, points)
        rows.append(compared(check, path, dtype, regime, got[n], want, bound, note))
    return rows


def _values(trial: Trial, check: str, regime: str, dtype: str, found: Pulled, truth: Truth) -> Iterator[Row]:
    first = len(truth.value) - len(found.value)  # of a gradient only what comes beside it is there
    values = zip(found.value, truth.value[first:], truth.value_bound[first:], strict=True)
    for n, (v, want, bound) in enumerate(values, first):
        name = "output" if len(truth.value) == 1 else f"output[{n}]"
        yield compared(check, name, dtype, regime, v, want, bound, ANOTHER_VALUE)


def constant_gap(trial: Trial, truths: Sequence[Truth]) -> Iterator[Row]:
    """4: a reference has the function's value, too. A difference that is one number everywhere is a mistake; any other
    says that the reference declares a gradient: straight-through, reversal, a surrogate.
    """
    for n in range(len(truths[0].value) if truths else 0):
        gaps = np.concatenate([np.ravel(t.value[n] - t.reference[n]) for t in truths])
        bounds = [t.value_bound[n] + t.reference_bound[n] + 1e-9 * np.abs(t.reference[n]) for t in truths]
        limits = 4 * np.concatenate([np.ravel(bound) for bound in bounds])
        gap = float(np.median(gaps[np.abs(gaps) > limits])) if np.any(np.abs(gaps) > limits) else 0.0
        if gap and not exceeds(np.full(gaps.shape, gap), gaps, limits + 1e-6 * abs(gap)):
            text = f"the function is the reference plus {gap:.6g}"
            yield Row(ORACLE, "FAIL", f"output[{n}]", trial.strict, "", (), gap, 0.0, np.inf, text)
        elif gap:
            trial.notes.append("value of the reference: another than the function's, it declares a gradient")


def _own_errors(trial: Trial, points: Points, us: Leaves, dtype: str, truth: Truth, got: Leaves) -> Truth | None:
    """The truth with bounds that allow what function and reference lose in the dtype themselves; None where the value
    is lost: there the function is outside the range of the dtype.
    """
    value, cotangents = trial.autodiff(points, us, dtype)
    for v, w, b in zip(value, truth.value, truth.value_bound, strict=True):
        if np.any(~np.isfinite(v) | (np.abs(v - w) > 0.05 * np.abs(w) + b)):
            return None

    def widened(bounds: Leaves, found: Leaves, wanted: Leaves) -> Leaves:
        errors = [np.abs(a - w) for a, w in zip(found, wanted, strict=True)]
        return [b + 4 * np.where(np.isnan(e), np.inf, e) for b, e in zip(bounds, errors, strict=True)]

    values, bounds = widened(truth.value_bound, value, truth.value), widened(truth.bound, cotangents, truth.cotangents)
    if any(np.any(b > np.abs(w)) for w, b in zip(truth.value, truth.value_bound, strict=True)):
        bounds = [np.where(np.isfinite(g), b, np.inf) for g, b in zip(got, bounds, strict=True)]  # no digit is certain
    return dataclasses.replace(truth, value_bound=values, bound=bounds)


def _diagnosis(
    trial: Trial, n: int, got: np.ndarray, want: np.ndarray, bound: np.ndarray, truth: Truth, points: Points
) -> str:
    if trial.subject.forward or got.shape != want.shape:  # the row says so
        return ""
    others = {path: want for m, (path, want) in enumerate(zip(trial.paths, truth.cotangents, strict=True)) if m != n}
    argument = f64(points[trial.subject.arguments.wrt[n]])
    lengths = [size for leaf in points for size in np.shape(leaf)]
    return diagnose(f64(got), want, argument, others, lengths, bound)


def biased(trial: Trial, dtype: str, found: Sequence[tuple[Leaves, Truth]]) -> Iterator[Row]:
    """7: one factor a leaf, fitted over all points: rounding has no direction, a wrong factor has."""
    for n, path in enumerate(trial.paths):
        errors, sizes = [], []
        for got, truth in found:
            want, bound = truth.cotangents[n], truth.bound[n]
            if np.shape(got[n]) != want.shape:
                return
            seen = np.isfinite(bound) & (np.abs(f64(got[n]) - want) <= bound) & (np.abs(want) > bound)
            errors.append(((f64(got[n]) - want) / bound * np.sign(want))[seen])
            sizes.append((np.abs(want) / bound)[seen])
        error, size = np.concatenate(errors), np.concatenate(sizes)
        if error.size < 32:
            continue
        factor = float(np.sum(error * size) / np.sum(size**2))
        doubt = float(np.sqrt(np.sum(((error - factor * size) * size) ** 2)) / np.sum(size**2))
        limit = 4 * float(jnp.finfo(found[0][0][n].dtype).eps) + 5 * doubt
        wrong = abs(factor) > limit
        text = f"all of it is off by a factor of about {1 + factor:.3g}: not rounding, which has no direction"
        numbers = (), 1 + factor, 1.0, abs(factor) / limit, text * wrong
        yield Row(PRODUCTION, "FAIL" if wrong else "PASS", path, dtype, "one factor", *numbers)


def adjoint(trial: Trial, points: Points) -> list[Row]:
    """5: ⟨J v, u⟩ = ⟨v, Jᵀ u⟩ in float64, v fresh normalised probes on one leaf at a time."""
    rng = np.random.default_rng(trial.settings.seed + 2)
    us = trial.dense()
    pulled = trial.run(points, us, "float64").cotangents
    truth = trial.truth(points, us, "float64")
    subject, at = trial.subject, trial.cast(points, "float64")
    wrt = subject.arguments.differentiated(at)
    push = jax.jit(
        lambda p, v: jax.jvp(subject.reference_of(p), (subject.arguments.differentiated(p),), (v,))[1], **QUICK
    )
    rows = []
    for n, path in enumerate(trial.paths):
        for _ in range(trial.settings.probes if wrt[n].size else 0):
            v = rng.standard_normal(wrt[n].shape)
            v = trial.projected(points, [v if m == n else 0 * a for m, a in enumerate(wrt)])[n]
            v /= np.linalg.norm(v)
            with precise():
                pushed = push(at, [v if m == n else np.zeros_like(a) for m, a in enumerate(wrt)])
            left = sum(float(np.vdot(f64(u), f64(t))) for u, t in zip(us, pushed, strict=True))
            right = np.vdot(v, f64(pulled[n])) if np.shape(pulled[n]) == v.shape else np.nan
            limit = 64 * np.linalg.norm(v * truth.bound[n]) + 1e-13 * np.linalg.norm(v * truth.cotangents[n])
            rows.append(compared(ADJOINT, path, "float64", "⟨v, Jᵀu⟩", right, f64(left), limit))
    return rows


def vacuity(trial: Trial, truths: Sequence[Truth]) -> list[Row]:
    """9: a leaf whose true gradient was about 0 at every point was not exercised."""
    allow_zero = trial.settings.allow_zero
    prefixes = ("",) if allow_zero is True else tuple(f"[{p}]" if isinstance(p, int) else p for p in allow_zero or ())
    text = "its true gradient is about 0 at every point tried; allow_zero= if that is meant"
    if not truths:
        text = "the function is finite at no point tried; domain= says where it is defined"
    rows = []
    for n, path in enumerate(trial.paths):
        seen = any(np.any(np.isfinite(t.bound[n]) & (np.abs(t.cotangents[n]) > t.bound[n])) for t in truths)
        if seen or path.startswith(prefixes) or (truths and not truths[0].cotangents[n].size):
            rows.append(Row(EDGES, "PASS", path))
        else:
            rows.append(Row(EDGES, "UNEXERCISED", path, diagnosis=text))
    return rows
