"""Inputs on their principal directions: [data] pca.

The rows of A are the training inputs, each divided by its norm. V are the eigenvectors of AᵀA with the largest
eigenvalues. A private run takes those of the symmetric part of AᵀA + σ z, z ~ N(0, 1) for each element. A sample more
or less changes AᵀA by aaᵀ, whose Frobenius norm is 1 at most. So this is a Gaussian mechanism of the multiplier σ, and
what is made of it alone, its symmetric part and V, costs nothing more.

Source: M. Abadi et al., *Deep learning with differential privacy*, 2016, §4; C. Dwork et al., *Analyze Gauss*, 2014.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxbp.run.data.scaling import Scaling, chunks
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory


class Projection(NamedTuple):
    """x ↦ (Vᵀ x/‖x‖ − mean) / scale; directions: V, (D, K) float64;  mean, scale: (K,), as of `Scaling`."""

    directions: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]

    @classmethod
    def fit(
        cls, values: np.ndarray, count: int, how: str | Mapping[Any, float], noise: float = 0.0, seed: int | None = None
    ) -> "Projection":
        """`count` directions, of the `products` of (N, D) values, and the scaling of those by `Scaling.fit`.

        Raises:
          UserError: more directions than there are, or more inputs than memory has room for.
        """
        inputs = values.shape[1]
        memory.check(f"data.pca: the products of {inputs} inputs with each other need", 5 * 8 * inputs**2)
        eigenvalues, vectors = np.linalg.eigh(products(values, noise, seed))
        there = inputs if noise else int(np.sum(eigenvalues > inputs * np.finfo(float).eps * eigenvalues[-1]))
        if count > there:
            raise UserError(f"data.pca: got {count}, the inputs have {there} directions")
        directions = np.ascontiguousarray(vectors[:, ::-1][:, :count])  # safetensors writes the bytes as they lie
        return cls(directions, *Scaling.fit(np.concatenate([unit(part) @ directions for part in chunks(values)]), how))

    def apply(self, values: np.ndarray, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
        """Of (N, D) values, computed in float64 and returned as `dtype`."""
        scaling = Scaling(self.mean, self.scale)
        return np.concatenate([scaling.apply(unit(part) @ self.directions, dtype) for part in chunks(values)])


def products(values: np.ndarray, noise: float = 0.0, seed: int | None = None) -> np.ndarray:
    """AᵀA + σ (z + zᵀ)/2, (D, D);  noise: σ;  seed: of z, for tests; None: the operating system's."""
    found = sum((part.T @ part for part in map(unit, chunks(values))), np.zeros((values.shape[1],) * 2))
    z = np.random.default_rng(seed).normal(size=found.shape)
    return found + noise * (z + z.T) / 2


def unit(values: np.ndarray) -> np.ndarray:
    """Each row divided by its norm; a row of zeros stays. Divided by its largest number first, no square overflows."""
    values = values.astype(np.float64)
    largest = np.abs(values).max(axis=1, keepdims=True)
    rows = values / np.where(largest == 0, 1, largest)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)
