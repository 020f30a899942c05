"""The elementwise comparison that every check ends in: error ÷ bound, and the row of a leaf's worst element."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbp.checker.report import Row


def compared(
    check: str, path: str, dtype: str, regime: str, got: Any, want: Any, bound: Any, diagnosis: str = ""
) -> Row:
    """The row of a leaf's worst element; PASS if |got − want| ≤ bound everywhere. A diagnosis is kept if it fails."""
    if np.shape(got) != np.shape(want):
        return Row(check, "FAIL", path, dtype, regime, diagnosis=f"shape {np.shape(got)}, want {np.shape(want)}")
    if not np.size(want):
        return Row(check, "PASS", path, dtype, regime)
    ratio = error_over_bound(got, want, bound)
    index = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    numbers = tuple(map(int, index)), float(f64(got)[index]), float(f64(want)[index]), float(ratio[index])
    if ratio[index] > 1:
        return Row(check, "FAIL", path, dtype, regime, *numbers, diagnosis)
    return Row(check, "PASS", path, dtype, regime, *numbers)


def error_over_bound(got: Any, want: Any, bound: Any) -> np.ndarray:
    """|got − want| ÷ bound, elementwise; 0 where the reference itself is not finite, ∞ where only got is not."""
    got, want = f64(got), f64(want)
    ratio = np.abs(got - want) / bound
    ratio = np.where((got == want) | ~np.isfinite(want) | np.isinf(bound), 0.0, ratio)
    return np.where(np.isnan(ratio), np.inf, ratio)


def exceeds(got: Any, want: Any, bound: Any) -> bool:
    """Whether any element is off by more than its bound, or the shape is another."""
    return np.shape(got) != np.shape(want) or bool(np.any(error_over_bound(got, want, bound) > 1))


def f64(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64)


def arrays(leaves: Sequence[Any]) -> list[np.ndarray]:
    return [f64(leaf) for leaf in leaves]
