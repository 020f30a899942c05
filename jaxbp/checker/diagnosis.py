"""What would make a wrong cotangent right: found by trying, on float64 numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations

import numpy as np

Array = np.ndarray
CLOSE = 1e-6  # relative; a wrong rule that is this close to a transform of the right one is that transform


def diagnose(
    got: Array,
    want: Array,
    argument: Array,
    others: Mapping[str, Array],
    lengths: Sequence[int],
    bound: Array | float = 0.0,
) -> str:
    """One phrase, or "" if nothing that was tried explains the difference.

    A phrase has to explain all of the error: what is left after the change is within the bound, or a thousandth of it.

    Args:
      got, want: the cotangent of a leaf, in float64, of one shape.
      argument: the leaf itself: a missing λ w is a multiple of it.
      others: by path, what was wanted for the other leaves: two of them may be swapped.
      lengths: sizes of axes of all the arguments; N is one of them.
      bound: what rounding may do to each element.
    """
    if not np.all(np.isfinite(got[np.isfinite(want)])):
        return "NaN or infinite where the reference is finite"
    if not np.all(np.isfinite(want)):
        return ""
    if not np.any(got):
        return "all zero: the cotangent is lost (None, stop_gradient, a lost term, an overflow)" if np.any(want) else ""
    return next(_found(got, want, argument, others, lengths, bound), "")


Explains = Callable[[Array], bool]


def _found(
    got: Array, want: Array, argument: Array, others: Mapping[str, Array], lengths: Sequence[int], bound: Array | float
) -> Iterator[str]:
    error = want - got
    left = np.maximum(np.where(np.isfinite(bound), bound, 0.0), 1e-3 * np.max(np.abs(error), initial=0.0))
    live = int(np.sum(np.abs(want) > left))  # the numbers that tell something

    def explains(changed: Array) -> bool:
        return changed.shape == want.shape and bool(np.all(np.abs(changed - want) <= left))

    yield from _scaled(got, want, lengths, explains, live)
    if live < 2:
        return  # of one number nothing can be told
    for axes in [*permutations(range(got.ndim))][1:]:
        if explains(got.transpose(axes)):
            yield f"matches after a transpose {axes}"
    yield from (f"matches what {path} should get: swapped" for path, other in others.items() if _close(got, other))
    yield from _subsets(got, want, explains)
    size = np.abs(argument)
    if argument.shape == got.shape and np.sum(size > CLOSE * np.max(size, initial=0.0)) > 1:
        factor = _ratio(argument, error)
        if explains(got + factor * argument):
            yield f"differs by {factor:.6g} × the argument itself, as if an L2 term were missing or too much"
    if explains(np.flip(got)):
        yield "matches after a flip"
    if live > 3 and explains(got + np.mean(error)) and np.std(error) < 1e-3 * abs(np.mean(error)):
        yield f"differs by the same number everywhere, {np.mean(error):.6g}: a term is missing"


def _scaled(got: Array, want: Array, lengths: Sequence[int], explains: Explains, live: int) -> Iterator[str]:
    factor = _ratio(got, want)
    if not explains(factor * got) or factor == 1:
        return
    if abs(factor + 1) < CLOSE:
        yield "matches after a change of sign"
    for n in sorted({n for n in lengths if n > 2}):  # a factor of 2 has many causes
        for name, value in ((f"× N, N = {n}", n), (f"÷ N, N = {n}", 1 / n), (f"× N², N = {n}", n**2)):
            if abs(factor / value - 1) < CLOSE:
                yield f"matches after {name} (the size of an axis)"
    if live > 1:
        yield f"matches after × {factor:.6g}" if abs(factor - 1) > 1e-5 else f"matches after × (1 {factor - 1:+.3g})"


def _subsets(got: Array, want: Array, explains: Explains) -> Iterator[str]:
    """Errors that are few, or constant along an axis."""
    live = (want != 0) | (got != 0)
    wrong = np.abs(got - want) > CLOSE * np.max(np.abs(want), initial=0)
    if live.sum() >= 8 and 0 < wrong.sum() <= live.sum() // 8:
        lost = np.all(got[wrong] == 0)
        yield f"{'zero' if lost else 'wrong'} at {wrong.sum()} of {wrong.size} elements only, right elsewhere"
    for axis in range(got.ndim):
        if got.shape[axis] > 1 and explains(np.broadcast_to(got.sum(axis, keepdims=True), got.shape)):
            yield f"matches after summing over axis {axis}"


def _ratio(a: Array, b: Array) -> float:
    """The factor that brings a nearest to b."""
    scale = np.max(np.abs(a), initial=0.0)
    return float(np.sum(a / scale * b) / np.sum((a / scale) ** 2) / scale) if scale else 0.0


def _close(a: Array, b: Array) -> bool:
    size = np.max(np.abs(b), initial=0.0)
    return a.shape == b.shape and bool(size > 0) and bool(np.max(np.abs(a - b), initial=0.0) <= CLOSE * size)
