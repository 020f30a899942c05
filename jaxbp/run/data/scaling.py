"""Inputs and targets to mean 0 and standard deviation 1."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxbp.run.errors import UserError

CHUNK = 2**22  # numbers converted to float64 at a time (32 MiB)


class Scaling(NamedTuple):
    """x ↦ (x − mean) / scale by columns; both are (D,) float64. Fit it on the training set only."""

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, values: np.ndarray, how: str | Mapping[Any, float] = "feature") -> "Scaling":
        """Mean and standard deviation (ddof 0) of (N, D) values; a column that is constant keeps scale 1.

        how: "feature", "global" or "none"; or `mean` and `scale` themselves.

        Raises a UserError when a column is too large for its variance to be a float64.
        """
        if how == "none":
            return cls(np.zeros(values.shape[1]), np.ones(values.shape[1]))
        if isinstance(how, Mapping):
            return cls(*(np.full(values.shape[1], how[name]) for name in ("mean", "scale")))
        axis = 0 if how == "feature" else None
        with np.errstate(over="ignore", invalid="ignore"):
            mean = values.mean(axis, dtype=np.float64)
            variances = np.sum([np.square(part - mean).sum(axis=0) for part in chunks(values)], axis=0) / len(values)
            scale = np.sqrt(variances if how == "feature" else variances.mean())
        if not np.isfinite(mean + scale).all():
            raise UserError(f"can't standardise: the variance of values up to {np.abs(values).max():.3g} overflows")
        # The mean of N equal numbers is rounded: they would be divided by that error, or be as large as it is.
        low, constant = values.min(axis), values.max(axis) == values.min(axis)
        mean, scale = np.where(constant, low, mean), np.where(constant | (scale == 0), 1.0, scale)
        return cls(*(np.broadcast_to(array, values.shape[1:]).copy() for array in (mean, scale)))

    def apply(self, values: np.ndarray, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
        """(values − mean) / scale of (N, D) values, computed in float64 and returned as `dtype`."""
        scaled = [((part - self.mean) / self.scale).astype(dtype) for part in chunks(values)]
        return np.concatenate(scaled)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """scaled · scale + mean: predictions (N, C) in the units of the targets."""
        return np.asarray(scaled) * self.scale + self.mean


def chunks(values: np.ndarray) -> list[np.ndarray]:
    """Views of a few rows each: MNIST is 47 MB of bytes, and 376 MB as float64; a mapped array may not fit at all."""
    return np.array_split(values, max(1, math.ceil(values.size / CHUNK)))
