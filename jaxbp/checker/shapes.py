"""Other shapes: a rule for any batch, length or rank that its function takes must be right for those too."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from jaxbp.checker.checks import oracle
from jaxbp.checker.compare import f64
from jaxbp.checker.data import Spec, drawn
from jaxbp.checker.report import Row
from jaxbp.checker.subject import Leaves, is_float
from jaxbp.checker.trial import QUICK, Trial, trial_of

COUNT = {"fast": 10, "full": 16}
LARGE = 400  # equations of the reference: with more, two shapes
Shapes = list[tuple[int, ...]]


def other_shapes(trial: Trial, domain: list[Any], level: str) -> list[Row]:
    """4 at other shapes, in the rule's most precise dtype: a size replaced wherever it occurs, an axis more or less.

    What the function itself does not take is left out; where the rule raises, the report says so. All shapes are one
    program; where a rule differs there from autodiff, the shape is tried again with all that bounds rounding.
    """
    count = COUNT[level] if len(trial.formula.jaxpr.eqns) < LARGE else 2
    taken: list[tuple[Leaves, Leaves]] = []
    for shapes in _candidates(trial):
        if len(taken) == count:
            break
        try:
            leaves = _filled(trial, shapes, domain)
            us = _cotangents(trial, leaves)
            if leaves[0].ndim != trial.given[0].ndim and not _same_function(trial, leaves):
                continue
        except Exception:  # the function does not take these shapes
            continue
        try:
            with trial.setting(trial.strict):
                jax.eval_shape(trial.subject.pullback, trial.cast(leaves, trial.strict), us)
        except Exception as error:
            trial.notes.append(f"{_text(leaves)}: the rule raised {type(error).__name__}")
            continue
        taken.append((leaves, us))
    if not taken:
        return []
    rows: list[Row] = []
    for (leaves, us), differs in zip(taken, _differences(trial, taken), strict=True):
        proven = any(row.verdict == "FAIL" for row in rows)
        if differs and not proven:
            rows += _confirmed(trial, leaves, us)
        elif not differs:
            rows += [Row("float64 oracle", "PASS", path, trial.strict, _text(leaves)) for path in trial.paths]
    return rows


def _differences(trial: Trial, taken: Sequence[tuple[Leaves, Leaves]]) -> list[bool]:
    """Whether rule and autodiff differ by more than rounding might explain."""

    def both(points: Any) -> Any:
        return [(trial.subject.pullback(p, u).cotangents, trial.subject.truth(p, u)[1:]) for p, u in points]

    with trial.setting(trial.strict), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = jax.jit(both, **QUICK)([(trial.cast(leaves, trial.strict), us) for leaves, us in taken])
    unit = 64 * float(trial.info(trial.strict).eps)
    answers = []
    for got, (value, want) in found:
        finite = all(np.all(np.isfinite(f64(v))) for v in value)
        pairs = [(f64(g), f64(w)) for g, w in zip(got, want, strict=True)]
        answers.append(finite and not all(_close(g, w, unit) for g, w in pairs))
    return answers


def _close(got: np.ndarray, want: np.ndarray, unit: float) -> bool:
    limit = unit * np.max(np.abs(want), initial=0.0)
    return got.shape == want.shape and bool(np.all(np.abs(got - want) <= limit))


def _confirmed(trial: Trial, leaves: Leaves, us: Leaves) -> list[Row]:
    other = trial_of(trial.subject, leaves, trial.kinks, trial.seed, trial.accuracy)
    other.strict = trial.strict
    return oracle(other, _text(leaves), leaves, us, trial.strict, other.truth(leaves, us, trial.strict))


def _same_function(trial: Trial, leaves: Leaves) -> bool:
    """Whether the function at another rank is what it was, on the parts of an array that has an axis more."""
    more = leaves if leaves[0].ndim > trial.given[0].ndim else trial.given
    first = (0,) * abs(leaves[0].ndim - trial.given[0].ndim)
    points = trial.cast(more, trial.strict)
    run = jax.jit(lambda p: trial.subject.reference_of(p)(trial.subject.arguments.differentiated(p)), **QUICK)
    with trial.setting(trial.strict), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        try:
            whole, part = run(points)[0], run([a[first] for a in points])[0]
        except Exception:  # it does not take this rank
            return False
    return bool(np.allclose(whole[first], part, rtol=1e-3, atol=1e-3 * float(np.max(np.abs(part), initial=0.0))))


def _text(leaves: Leaves) -> str:
    return "shapes " + " ".join(str(list(leaf.shape)).replace(" ", "") for leaf in leaves)


def _cotangents(trial: Trial, leaves: Leaves) -> Leaves:
    """N(0, 1) for the outputs at these shapes; raises where function or reference do not take them."""
    subject, points = trial.subject, trial.cast(leaves, trial.strict)
    with trial.setting(trial.strict), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        like = jax.eval_shape(lambda p: subject.reference_of(p)(subject.arguments.differentiated(p)), points)
    if subject.kind == "gradient":
        if like[0].shape != ():
            raise ValueError("no scalar")
        return [np.full(v.shape, float(n == 0), v.dtype) for n, v in enumerate(like)]
    rng = np.random.default_rng(trial.seed)
    return [rng.standard_normal(v.shape).astype(v.dtype) for v in like]


def _candidates(trial: Trial) -> Iterator[Shapes]:
    """In turn, a few of each kind: another rank for elementwise functions, sizes replaced wherever they occur, two
    sizes made equal. The first axis of the first leaf is the one that varies most.
    """
    if trial.subject.arguments.has_complex:
        return
    shapes = [tuple(leaf.shape) for leaf in trial.given]
    whole = [leaf.shape for leaf in trial.given if not is_float(leaf)]
    sizes = list(dict.fromkeys(size for shape in (whole if any(whole) else shapes) for size in shape if size))[:3]
    ranks: list[Shapes] = []
    if len(set(shapes)) == 1 and shapes[0] and [tuple(v.shape) for v in trial.outputs] == shapes[:1]:
        ranks = [[shape] * len(shapes) for shape in (shapes[0][1:], (3, *shapes[0]), (), (2, 3, *shapes[0]))]
        ranks = ranks if _same_function(trial, [a[0] for a in trial.given]) else []  # the first axis is one of samples
    squares = dict.fromkeys(pair for shape in shapes for pair in pairwise(shape) if pair[0] != pair[1])
    equal: list[Shapes] = [_resized(shapes, {a: b}) for a, b in squares]
    for make in (lambda d: 1, lambda d: 2 * d + 3, lambda d: d + 1, lambda d: 2):
        yield from (_resized(shapes, {size: make(size)}) for size in sizes if make(size) != size)
        yield from ranks + equal[:2]
        ranks, equal = [], equal[2:]


def _resized(shapes: Shapes, sizes: Mapping[int, int]) -> Shapes:
    return [tuple(sizes.get(size, size) for size in shape) for shape in shapes]


def _filled(trial: Trial, shapes: Shapes, domain: list[Any]) -> list[np.ndarray]:
    """N(0, 1), or the caller's values repeated where they are not differentiated."""
    rng = np.random.default_rng(trial.seed)
    leaves = []
    for leaf, shape, bounds in zip(trial.given, shapes, domain, strict=True):
        if is_float(leaf) and bounds is not None:
            leaves.append(drawn(Spec(shape, leaf.dtype), bounds, "ordinary", rng))
        else:
            leaves.append(np.resize(np.asarray(leaf), shape))
    return leaves
