"""What would make a wrong cotangent right: found by trying, on float64 numbers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

import numpy as np

Array = np.ndarray
CLOSE = 1e-6  # relative; a wrong rule that is this close to a transform of the right one is that transform


def diagnose(got: Array, want: Array, argument: Array, others: Mapping[str, Array], lengths: Sequence[int]) -> str:
    """One phrase, or "" if nothing that was tried explains the difference.

    Args:
      got, want: the cotangent of a leaf, in float64.
      argument: the leaf itself: a missing λ w is a multiple of it.
      others: by path, what was wanted for the other leaves: two of them may be swapped.
      lengths: sizes of axes of all the arguments; N is one of them.
    """
    return next(_found(got, want, argument, others, lengths), "")


def _found(
    got: Array, want: Array, argument: Array, others: Mapping[str, Array], lengths: Sequence[int]
) -> Iterator[str]:
    if got.shape != want.shape:
        yield _shapes(got, want)
        return
    if not np.all(np.isfinite(got)):
        yield "NaN or infinite where the reference is finite"
        return
    if not np.any(got):
        yield "all zero: the cotangent is lost (None, stop_gradient, or a term never added)"
        return
    yield from _scaled(got, want, lengths)
    for axes in [*permutations(range(got.ndim))][1:]:
        if _close(got.transpose(axes), want):
            yield f"matches after a transpose {axes}"
    yield from (f"matches what {path} should get: swapped" for path, other in others.items() if _close(got, other))
    yield from _subsets(got, want)
    if argument.shape == got.shape and np.any(argument):
        factor = _ratio(argument, want - got)
        if _close(factor * argument, want - got):
            yield f"differs by {factor:.6g} × the argument itself: an L2 term missing or too much"
    if _close(np.flip(got), want):
        yield "matches after a flip"
    if np.sum(want) and _close(got - np.mean(got), want - np.mean(want)):
        yield f"differs by the same number everywhere, {np.mean(want - got):.6g}: a sum over this leaf is missing"


def _scaled(got: Array, want: Array, lengths: Sequence[int]) -> Iterator[str]:
    factor = _ratio(got, want)
    if not _close(factor * got, want) or abs(factor - 1) < CLOSE:
        return
    if abs(factor + 1) < CLOSE:
        yield "matches after a change of sign"
    for n in sorted({n for n in lengths if n > 1}):
        for name, value in ((f"× N, N = {n}", n), (f"÷ N, N = {n}", 1 / n), (f"× N², N = {n}", n**2)):
            if abs(factor / value - 1) < CLOSE:
                yield f"matches after {name} (the size of an axis)"
    yield f"matches after × {factor:.6g}"


def _subsets(got: Array, want: Array) -> Iterator[str]:
    """Errors that are few, or constant along an axis."""
    wrong = np.abs(got - want) > CLOSE * np.max(np.abs(want), initial=0)
    if 0 < wrong.sum() <= max(1, wrong.size // 8):
        lost = np.all(got[wrong] == 0)
        yield f"{'zero' if lost else 'wrong'} at {wrong.sum()} of {wrong.size} elements only, right elsewhere"
    for axis in range(got.ndim):
        if got.shape[axis] > 1:
            sums = np.broadcast_to(got.sum(axis, keepdims=True), got.shape)
            if _close(sums, want):
                yield f"matches after summing over axis {axis}"


def _shapes(got: Array, want: Array) -> str:
    for axis in range(got.ndim):
        if got.sum(axis).shape == want.shape and _close(got.sum(axis), want):
            return f"shape {got.shape}, want {want.shape}: matches after summing over axis {axis}"
    return f"shape {got.shape}, want {want.shape}"


def _ratio(a: Array, b: Array) -> float:
    """The factor that brings a nearest to b."""
    scale = np.max(np.abs(a), initial=0.0)
    return float(np.sum(a / scale * b) / np.sum((a / scale) ** 2) / scale) if scale else 0.0


def _close(a: Array, b: Array) -> bool:
    size = np.max(np.abs(b), initial=0.0)
    return a.shape == b.shape and bool(size > 0) and bool(np.max(np.abs(a - b), initial=0.0) <= CLOSE * size)
