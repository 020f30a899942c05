"""Other shapes: a rule for any batch, length or rank that its function takes must be right for those too."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbp.checker.checks import oracle
from jaxbp.checker.compare import f64
from jaxbp.checker.data import Spec, drawn
from jaxbp.checker.jaxpr import equations
from jaxbp.checker.numerics import numerics
from jaxbp.checker.report import ORACLE, Row
from jaxbp.checker.subject import Leaves, is_float
from jaxbp.checker.trial import QUICK, Trial, lenient, trial_of

COUNT = {"fast": 10, "full": 16}
EQUATIONS = 800  # of all shapes together: of a long function fewer are tried
HOSTS = 4  # shapes of NumPy code
Shapes = list[tuple[int, ...]]


class _Case(NamedTuple):
    """Leaves of other shapes with cotangents; for another rank, what has to be the same function: see `_parts`."""

    leaves: Leaves
    us: Leaves
    parts: list[tuple[Leaves, Leaves]]


def other_shapes(trial: Trial) -> list[Row]:
    """4 at other shapes, in the rule's most precise dtype: a size replaced wherever it occurs, an axis more or less.

    What the function itself does not take is left out; where the rule raises, the report says so. All shapes are one
    program; where a rule differs there from autodiff, the shape is tried again with all that bounds rounding. NumPy
    code is tried so at once.
    """
    length = len([*equations(trial.formula.jaxpr)]) if trial.traceable else EQUATIONS // HOSTS
    count = min(COUNT[trial.settings.level], max(2, EQUATIONS // (length + 1)))
    taken: list[_Case] = []
    for shapes in _candidates(trial):
        if len(taken) == count:
            break
        try:
            case = _case(trial, _filled(trial, shapes))
        except Exception:  # the function does not take these shapes
            continue
        try:
            got = _pulled(trial, case)
        except Exception as error:
            trial.notes.append(f"{_text(case.leaves)}: the rule raised {type(error).__name__}")
            continue
        if [*map(np.shape, got)] != [*map(np.shape, trial.subject.arguments.differentiated(case.leaves))]:
            trial.notes.append(f"{_text(case.leaves)}: the rule gives other shapes")  # made for those of the example
            continue
        taken.append(case)
    rows: list[Row] = []
    for case, differs in zip(taken, _differences(trial, taken) if taken else [], strict=True):
        if not differs:
            rows += [Row(ORACLE, "PASS", path, trial.strict, _text(case.leaves)) for path in trial.paths]
        elif not any(row.verdict == "FAIL" for row in rows):
            rows += _confirmed(trial, case)
    return rows


def _pulled(trial: Trial, case: _Case) -> Leaves:
    """Cotangents, or their shapes if that is enough."""
    if not trial.traceable:
        return trial.run(case.leaves, case.us, trial.strict).cotangents
    with trial.setting(trial.strict):
        return list(jax.eval_shape(trial.subject.pullback, case.leaves, case.us).cotangents)


def _case(trial: Trial, leaves: Leaves) -> _Case:
    """With cotangents N(0, 1); raises where function or reference do not take these shapes."""

    def shapes(points: Leaves) -> list[Any]:
        if not trial.traceable:
            return dataclasses.replace(trial, given=points, _programs={}).outputs
        with trial.setting(trial.strict), lenient():
            return list(jax.eval_shape(trial.subject.referred, points))

    parts = _parts(trial, leaves)
    like = shapes(leaves)
    if not all(v.size for v in like) and all(v.size for v in trial.outputs):
        raise ValueError("an empty output")  # of a window larger than its input: XLA has no transpose of it
    for _, part in parts:
        shapes(part)
    if trial.subject.kind == "gradient":
        if like[0].shape != ():
            raise ValueError("no scalar")
        return _Case(leaves, [np.full(v.shape, float(n == 0), v.dtype) for n, v in enumerate(like)], parts)
    rng = np.random.default_rng(trial.settings.seed)
    return _Case(leaves, [rng.standard_normal(v.shape).astype(v.dtype) for v in like], parts)


def _parts(trial: Trial, leaves: Leaves) -> list[tuple[Leaves, Leaves]]:
    """Arrays and the first part, along their first axes, of those that have another rank: of the example, whose first
    axis has to be one of samples, and of these leaves.
    """
    given = trial.cast(trial.given, trial.strict)
    steps = [a.ndim - b.ndim for a, b in zip(leaves, given, strict=True)]
    count = max(map(abs, steps))
    both = ((given, 1), (leaves if max(steps) > 0 else given, count)) if count else ()
    return [(more, [a[(0,) * n] if step else a for a, step in zip(more, steps, strict=True)]) for more, n in both]


def _differences(trial: Trial, taken: Sequence[_Case]) -> list[bool]:
    """Whether rule and autodiff differ by more than rounding might explain, as far as that can be asked at once."""
    if not trial.traceable:
        return [True] * len(taken)
    subject = trial.subject

    def both(p: Leaves, u: Leaves) -> tuple[Leaves, Leaves, Leaves]:
        pulled, (own, value, want) = subject.pullback(p, u), subject.truth(p, u)
        first = len(own or value) - len(pulled.value)
        return value, [*pulled.value, *pulled.cotangents], [*(own or value)[first:], *want]

    def all_of(cases: Any) -> Any:
        return [(*both(p, u), [[subject.referred(a)[0] for a in pair] for pair in parts]) for p, u, parts in cases]

    with trial.setting(trial.strict), lenient():
        found = jax.jit(all_of, **QUICK)(taken)
    unit = 64 * float(trial.info(trial.strict).eps)
    answers = []
    for value, got, want, parts in found:
        seen = all(np.all(np.isfinite(f64(v))) for v in value)
        seen = seen and all(_close(f64(f64(a)[(0,) * (a.ndim - b.ndim)]), f64(b), 1e-3) for a, b in parts)
        answers.append(seen and not all(_close(f64(g), f64(w), unit) for g, w in zip(got, want, strict=True)))
    return answers


def _close(got: np.ndarray, want: np.ndarray, unit: float) -> bool:
    return got.shape == want.shape and bool(np.all(np.abs(got - want) <= unit * np.max(np.abs(want), initial=0.0)))


def _confirmed(trial: Trial, case: _Case) -> list[Row]:
    leaves, us, _ = case
    other = trial_of(trial.subject, leaves, trial.settings)
    other.strict = trial.strict
    if other.oracle:
        return oracle(other, _text(leaves), leaves, us, trial.strict, other.truth(leaves, us, trial.strict))
    return [row for row in numerics(other, {_text(leaves): leaves}, us, 1) if row.verdict != "INCONCLUSIVE"]


def _text(leaves: Leaves) -> str:
    return "shapes " + " ".join(str(list(leaf.shape)).replace(" ", "") for leaf in leaves)


def _candidates(trial: Trial) -> Iterator[Shapes]:
    """In turn, a few of each kind: another rank of what has the output's shape, sizes replaced wherever they occur,
    two sizes made equal. The first axis of the first leaf is the one that varies most.
    """
    if trial.subject.arguments.has_complex:
        return
    shapes = [tuple(leaf.shape) for leaf in trial.given]
    whole = [leaf.shape for leaf in trial.given if not is_float(leaf)]
    sizes = list(dict.fromkeys(size for shape in (whole if any(whole) else shapes) for size in shape if size))[:3]
    ranks: list[Shapes] = []
    outputs = [tuple(v.shape) for v in trial.outputs]
    if len(outputs) == 1 and outputs[0] and outputs[0] in shapes:
        others = outputs[0][1:], (3, *outputs[0]), (), (2, 3, *outputs[0])
        ranks = [[other if shape == outputs[0] else shape for shape in shapes] for other in others]
    squares = dict.fromkeys(pair for shape in shapes for pair in pairwise(shape) if pair[0] != pair[1] and all(pair))
    equal: list[Shapes] = [_resized(shapes, {a: b}) for a, b in squares]
    for make in (lambda d: 1, lambda d: 2 * d + 3, lambda d: d + 1, lambda d: 2):
        yield from (_resized(shapes, {size: make(size)}) for size in sizes if make(size) != size)
        yield from ranks + equal[:2]
        ranks, equal = [], equal[2:]


def _resized(shapes: Shapes, sizes: Mapping[int, int]) -> Shapes:
    return [tuple(sizes.get(size, size) for size in shape) for shape in shapes]


def _filled(trial: Trial, shapes: Shapes) -> Leaves:
    """Drawn where there is a domain, or the caller's values repeated, in the dtype that is tried."""
    rng = np.random.default_rng(trial.settings.seed)
    leaves = []
    for leaf, shape, bounds in zip(trial.given, shapes, trial.settings.domain, strict=True):
        if is_float(leaf) and bounds is not None:
            leaves.append(drawn(Spec(shape, leaf.dtype), bounds, "ordinary", rng))
        else:
            leaves.append(np.resize(np.asarray(leaf), shape))
    return trial.cast(leaves, trial.strict)
