"""Layers that only move numbers: their backward pass moves them back."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxbp.mlp import Array


def shape_of(x: Array) -> Array:
    """An array without numbers, (0, shape…): a tape is a pytree of arrays, and this is how it remembers a shape."""
    return jnp.zeros((0, *x.shape), x.dtype)


@dataclasses.dataclass(frozen=True)
class Reshape:
    """x with the same numbers in another shape, row by row.

    Example:
      >>> Reshape((28, 28, 1)).init(None, (784,))
      ((), (28, 28, 1))
    """

    shape: tuple[int, ...]

    def init(
        self, key: Array | None, shape: tuple[int, ...], scheme: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"it takes {math.prod(self.shape)} numbers")
        return (), tuple(self.shape)

    def forward(self, params: tuple[()], x: Array, key: Array | None = None) -> tuple[Array, Array]:
        return x.reshape(self.shape), shape_of(x)

    def backward(self, params: tuple[()], shape: Array, dl_dx: Array) -> tuple[Array, tuple[()]]:
        return dl_dx.reshape(shape.shape[1:]), ()


@dataclasses.dataclass(frozen=True)
class Flatten:
    """x as one row of numbers.

    Example:
      >>> Flatten().init(None, (5, 5, 16))
      ((), (400,))
    """

    def init(
        self, key: Array | None, shape: tuple[int, ...], scheme: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        return (), (math.prod(shape),)

    def forward(self, params: tuple[()], x: Array, key: Array | None = None) -> tuple[Array, Array]:
        return x.reshape(-1), shape_of(x)

    def backward(self, params: tuple[()], shape: Array, dl_dx: Array) -> tuple[Array, tuple[()]]:
        return dl_dx.reshape(shape.shape[1:]), ()


@dataclasses.dataclass(frozen=True)
class Transpose:
    """x (positions, channels) as (channels, positions).

    Example:
      >>> Transpose().init(None, (16, 49))
      ((), (49, 16))
    """

    def init(
        self, key: Array | None, shape: tuple[int, ...], scheme: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        if len(shape) != 2:
            raise ValueError("it takes (positions, channels)")
        return (), shape[::-1]

    def forward(self, params: tuple[()], x: Array, key: Array | None = None) -> tuple[Array, tuple[()]]:
        return x.T, ()

    def backward(self, params: tuple[()], tape: tuple[()], dl_dx: Array) -> tuple[Array, tuple[()]]:
        return dl_dx.T, ()


@dataclasses.dataclass(frozen=True)
class Patches:
    """An image (height, width, channels) as a sequence of its square patches, (patches, size · size · channels).

    Example:
      >>> Patches(7).init(None, (28, 28, 1))
      ((), (16, 49))
    """

    size: int

    def init(
        self, key: Array | None, shape: tuple[int, ...], scheme: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        if len(shape) != 3 or shape[0] % self.size or shape[1] % self.size:
            raise ValueError(f"it takes (height, width, channels), height and width multiples of {self.size}")
        return (), (shape[0] * shape[1] // self.size**2, self.size**2 * shape[2])

    def forward(self, params: tuple[()], x: Array, key: Array | None = None) -> tuple[Array, Array]:
        height, width, channels = x.shape
        tiles = x.reshape(height // self.size, self.size, width // self.size, self.size, channels)
        return jnp.swapaxes(tiles, 1, 2).reshape(-1, self.size**2 * channels), shape_of(x)

    def backward(self, params: tuple[()], shape: Array, dl_dx: Array) -> tuple[Array, tuple[()]]:
        height, width, channels = shape.shape[1:]
        tiles = dl_dx.reshape(height // self.size, width // self.size, self.size, self.size, channels)
        return jnp.swapaxes(tiles, 1, 2).reshape(height, width, channels), ()
