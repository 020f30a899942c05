"""The checks in their order, on the points, cotangents and dtypes that are found for a subject."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxbp.checker import checks, report
from jaxbp.checker.contract import contract, provenance
from jaxbp.checker.jaxpr import primitives
from jaxbp.checker.numerics import numerics
from jaxbp.checker.order import higher_orders
from jaxbp.checker.report import Row, Verdict
from jaxbp.checker.search import HUGE, Points, points
from jaxbp.checker.shapes import other_shapes
from jaxbp.checker.subject import Leaves
from jaxbp.checker.transformations import transformations
from jaxbp.checker.trial import FAULT, MIXED, Trial, Truth, first_line, trial_of

SMOOTH = "ordinary", "large", "wide"  # regimes without ties on purpose
USUAL = "given", "ordinary", "zeros"  # those in a dtype that nobody asked for: its range is not the rule's business
PROVEN = 3  # points at which a leaf is wrong: after these the search stops


def searched(trial: Trial) -> list[Row]:
    """The rows of all checks; what was left out is in the notes of the trial.

    Of a rule for forward mode tangents come first, then cotangents if the rule can be transposed.
    """
    if not _is_forward(trial):
        return _cotangents_checked(trial)
    rows = _tangents_checked(trial)
    try:
        trial.rule_in(trial.main)
    except Exception as error:  # a rule that uses a loop, say, is right in forward mode and has no other
        trial.notes.append(f"reverse mode: {first_line(error)}")
        return rows
    return [*rows, *_cotangents_checked(trial)]


def _is_forward(trial: Trial) -> bool:
    """Whether the rules under test are of custom_jvp functions only."""
    if not trial.subject.hides_jvp or trial.subject.kind != "vjp":
        return False
    try:
        found = primitives(trial.rule_of_function.jaxpr)
    except Exception:  # the contract check says what is wrong
        return False
    return "custom_jvp_call" in found and "custom_vjp_call" not in found


def _tangents_checked(trial: Trial) -> list[Row]:
    forward = trial_of(dataclasses.replace(trial.subject, forward=True), trial.given, trial.settings)
    main = trial.main
    rows = guarded(forward, report.ALGEBRA, checks.algebra, main)
    regimes = points(forward)
    if forward.oracle:
        rows += _oracles(forward, regimes, trial.settings.dtypes or (main,))[0]
    else:
        trial.notes.append(f"float64 oracle of tangents: {forward.why_not}")
    rows += guarded(forward, report.ALGEBRA, checks.not_swallowed, main)
    rows += _transformed(forward, regimes, main)
    trial.notes += forward.notes
    trial.failing = forward.failing
    return rows


def _cotangents_checked(trial: Trial) -> list[Row]:
    """After a rule of a wrong form nothing else is said. Where a check raises, the others go on."""
    settings = trial.settings
    main = settings.dtypes[0] if settings.dtypes else trial.main
    rows, dtypes = _contracts(trial)
    if any(row.verdict == "FAIL" and (not row.path or "shape" in row.diagnosis) for row in rows):
        trial.notes = ["the other checks, after a broken contract"]
        return rows
    rows += guarded(trial, report.PROVENANCE, provenance)
    regimes = points(trial)
    rows += guarded(trial, report.ALGEBRA, checks.algebra, main)
    if trial.oracle:
        rows += _by_autodiff(trial, regimes, dtypes)
    else:
        lost = "float64 oracle, adjoint identity, production dtype, edges and vacuity"
        trial.notes.append(f"{lost}: {trial.why_not}")
        rows += [Row(report.ORACLE, "INCONCLUSIVE", diagnosis=trial.why_not)] * trial.why_not.startswith(FAULT)
    rows += guarded(trial, report.ALGEBRA, checks.not_swallowed, main)
    rows += _by_differences(trial, regimes, rows)
    if settings.order > 1:
        smooth = {name: regimes[name] for name in ("ordinary", "tiny") if name in regimes}
        rows += guarded(trial, report.ORACLE, higher_orders, smooth)
    else:
        trial.notes.append("higher derivatives: order=2" + " or level='full'" * (settings.level == "fast"))
    if (trial.oracle or not trial.traceable) and trial.failing is None:
        rows += guarded(trial, report.ORACLE, other_shapes)
    return [*rows, *_transformed(trial, regimes, main)]


def _transformed(trial: Trial, regimes: Points, main: str) -> list[Row]:
    if not trial.traceable:
        trial.notes.append("transformations: the rule cannot be traced by JAX")
        return []
    other = regimes.get("ordinary", trial.given)
    return guarded(trial, report.TRANSFORMATIONS, transformations, other, main, verdict="FAIL")


def _contracts(trial: Trial) -> tuple[list[Row], tuple[str, ...]]:
    """Check 1 in every dtype, and the dtypes in which the rule runs.

    A dtype that the caller neither gave nor asked for is left out if the rule does not take it.
    """
    asked = trial.settings.dtypes
    wanted = asked or (trial.main,)
    rows: list[Row] = []
    taken = list(wanted)
    for dtype in wanted:
        rows += _contract_in(trial, dtype)
    for dtype in () if asked else _extra(trial):
        found = _contract_in(trial, dtype)
        if all(row.verdict == "PASS" for row in found):
            taken.append(dtype)
        else:
            trial.notes.append(f"{dtype}: the rule is not made for it ({found[0].diagnosis or found[-1].diagnosis})")
    if trial.strict not in wanted:
        found = _contract_in(trial, trial.strict)
        if all(row.verdict == "PASS" for row in found):
            rows += found
        else:
            trial.strict = wanted[0]
    if trial.strict != "float64":
        trial.notes.append(f"float64 oracle: function or rule computes in {trial.strict} at most")
    return rows, tuple(taken)


def _contract_in(trial: Trial, dtype: str) -> list[Row]:
    with trial.setting(dtype):
        return guarded(trial, report.CONTRACT, contract, dtype, verdict="FAIL")


def _extra(trial: Trial) -> tuple[str, ...]:
    """Dtypes beside those of the example; what solves to some accuracy may not end, or not solve, in shorter ones."""
    if trial.main == MIXED or not trial.traceable or not trial.oracle or trial.waits or trial.accuracy:
        return ()
    shorter = () if trial.subject.arguments.has_complex else ("bfloat16", "float16")
    return tuple(dtype for dtype in ("float32", *shorter) if dtype != trial.main)


def _by_autodiff(trial: Trial, regimes: Points, dtypes: Sequence[str]) -> list[Row]:
    """Checks 4, 5, 7 and 9, for which JAX must be able to differentiate the reference."""
    rows, truths = _oracles(trial, regimes, dtypes)
    if trial.strict == trial.oracle == "float64" and "while" not in trial.operations:
        rows += guarded(trial, report.ADJOINT, checks.adjoint, _smooth(trial, regimes))
    else:
        trial.notes.append("adjoint identity: not in float64")
    return [*rows, *checks.vacuity(trial, truths)]


def _smooth(trial: Trial, regimes: Points) -> Leaves:
    """Points where probes hit no kink that a caller chose on purpose: drawn ones, if the function is defined there."""
    drawn = regimes.get("ordinary")
    if drawn is not None and all(np.all(np.isfinite(v)) for v in trial.truth(drawn, trial.dense(), "float64").value):
        return drawn
    return next(iter(regimes.values()))


def _by_differences(trial: Trial, regimes: Points, rows: list[Row]) -> list[Row]:
    """Check 6. Where autodiff agrees with the rule, differences alone do not make it wrong, and they say nothing where
    they go through a stop_gradient.
    """
    usual = ("ordinary", next(iter(regimes)), "tiny")
    tried = regimes if not trial.oracle else {name: regimes[name] for name in usual if name in regimes}
    found = guarded(trial, report.NUMERICS, numerics, tried, trial.dense(), trial.settings.probes)
    if not trial.oracle or any(row.verdict == "FAIL" for row in rows):
        return found
    if "stop_gradient" in trial.operations and any(row.verdict != "PASS" for row in found):
        trial.notes.append(f"{report.NUMERICS}: they go through a stop_gradient of the function")
        return [row for row in found if row.verdict == "PASS"]
    return [
        dataclasses.replace(row, verdict="INCONCLUSIVE") if row.verdict == "FAIL" else row
        for row in found
        if row.verdict != "INCONCLUSIVE" or row.got is None
    ]


def guarded(
    trial: Trial, check: str, run: Callable[..., Iterable[Row]], *args: object, verdict: Verdict = "INCONCLUSIVE"
) -> list[Row]:
    """The rows of a check, or one row with what it raised: it calls a user's code, so anything may come.

    INCONCLUSIVE, unless nothing but the rule can have raised it.
    """
    rows: list[Row] = []
    try:
        rows.extend(run(trial, *args))
    except Exception as error:
        trial.notes.append(f"{check}: it could not be completed")
        rows.append(Row(check, verdict, diagnosis=f"raised {first_line(error)}"))
    return rows


def _cotangents(trial: Trial) -> dict[str, Leaves]:
    """By name: dense N(0, 1); all 1, as a mean has it, where sums grow long; −1 or 1 at one output, 0 elsewhere; 0 but
    for one leaf. That of a gradient is 1.
    """
    like, found = trial.inputs, {"dense": trial.dense()}
    if trial.subject.kind == "gradient":
        return found
    found["constant"] = [np.ones(v.shape) for v in like]
    rng = np.random.default_rng(trial.settings.seed + 6)
    count = 8 if trial.settings.level == "full" else 1 if _huge(trial) else 2
    for n, v in enumerate(like):
        if len(like) > 1:
            found[f"only output {n}"] = [u if m == n else np.zeros_like(u) for m, u in enumerate(found["dense"])]
        for k, index in enumerate(rng.permutation(int(np.prod(v.shape)))[:count]):
            hot = [np.zeros(w.shape) for w in like]
            hot[n].flat[index] = (-1.0, 1.0)[k % 2]
            found[f"one-hot {n}.{index}"] = hot
    return found


def _huge(trial: Trial) -> bool:
    return sum(map(np.size, trial.given)) > HUGE


def _oracles(trial: Trial, regimes: Points, dtypes: Sequence[str]) -> tuple[list[Row], list[Truth]]:
    """Checks 4 and 7 at every point; all cotangents at the first points, the dense one at the others."""
    rows: list[Row] = []
    truths: list[Truth] = []
    usual = {name: leaves for name, leaves in regimes.items() if name.startswith(USUAL)}
    for dtype in dict.fromkeys((trial.strict, *dtypes)):
        if dtype in (trial.strict, trial.main, "float32", *trial.settings.dtypes):
            check = report.ORACLE if dtype == "float64" else report.PRODUCTION
            rows += guarded(trial, check, _oracle_in, dtype, regimes, truths)
            continue
        try:
            rows += _oracle_in(trial, dtype, usual, truths)
        except Exception as error:  # what XLA has no form of in a dtype that nobody asked for
            trial.notes.append(f"{dtype}: {first_line(error)}")
    return rows, truths


def _oracle_in(trial: Trial, dtype: str, regimes: Points, truths: list[Truth]) -> Iterator[Row]:
    """In one dtype, until the rule is proven wrong; the truths are kept."""
    wrong, failed, pooled = 0, "", []
    for regime, leaves, name, u in _tried(trial, regimes, dtype):
        if regime == failed:  # the dense cotangent has said it
            continue
        truth = trial.truth(leaves, u, dtype)
        if not any(np.any(np.isfinite(v)) for v in truth.value):
            if regime in ("ordinary", "zeros", "large"):
                trial.notes.append(f"{regime}: the function is not finite there; domain= says where it is defined")
            continue
        truths.append(truth)
        where = regime if name == "dense" else f"{regime}, cotangent {name}"
        found = checks.oracle(trial, where, leaves, u, dtype, truth)
        yield from found
        if dtype not in ("float64", "float32") and name == "dense" and regime.startswith(SMOOTH):
            pooled.append((trial.run(leaves, u, dtype).cotangents, truth))
        if any(row.verdict == "FAIL" for row in found):
            wrong, failed = wrong + 1, regime
            trial.failing = trial.failing or (where, leaves, u, dtype)
        if wrong >= PROVEN:
            return
    if dtype == trial.strict:
        yield from checks.constant_gap(trial, truths)
    if pooled and not wrong and not trial.accuracy:
        yield from checks.biased(trial, dtype, pooled)


def _tried(trial: Trial, regimes: Points, dtype: str) -> Iterator[tuple[str, Leaves, str, Leaves]]:
    us, dense = _cotangents(trial), [("dense", trial.dense())]
    first = dense if _huge(trial) and dtype not in ("float64", "float32") else us.items()
    for n, (regime, leaves) in enumerate(regimes.items()):
        if dtype not in ("float64", "float32") and regime.startswith("magnitudes"):
            continue  # hardly one of these is a number in the shorter dtypes
        for name, u in first if n == 0 else dense:
            yield regime, leaves, name, u
