"""The largest number, or the mean, of every window."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxbp.layers.convolution import both
from jaxbp.layers.shape import shape_of
from jaxbp.mlp import Array

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows over the axes of space, of each channel alone; what no whole window covers is left out.

    Args:
      size: along each axis.
      stride: from one window to the next.
    """

    size: Sizes
    stride: Sizes

    def after(self, shape: Sizes) -> Sizes:
        """The shape of the windows of x."""
        if len(shape) != len(self.size) + 1:
            raise ValueError(f"it takes {len(self.size)} axes of space and the channels")
        if any(n < k for n, k in zip(shape, self.size, strict=False)):
            raise ValueError(f"its window of {self.size} is larger than the input")
        return *((n - k) // step + 1 for n, k, step in zip(shape, self.size, self.stride, strict=False)), shape[-1]

    def taken(self, x: Array) -> Iterator[Array]:
        """x at the first place of every window, at its second place, row by row; each is (positions…, channels)."""
        positions = self.after(x.shape)
        for place in itertools.product(*map(range, self.size)):
            ends = (k + (n - 1) * step + 1 for k, n, step in zip(place, positions, self.stride, strict=False))
            yield lax.slice(x, (*place, 0), (*ends, x.shape[-1]), (*self.stride, 1))

    def put(self, parts: list[Array], shape: Sizes) -> Array:
        """The transpose of `taken`: each part goes back to its place, and what meets there is added up."""
        x, zero = jnp.zeros(shape, parts[0].dtype), jnp.zeros((), parts[0].dtype)
        for place, part in zip(itertools.product(*map(range, self.size)), parts, strict=True):
            steps = zip(place, part.shape, self.stride, shape, strict=False)
            edges = [(k, size - k - (n - 1) * step - 1, step - 1) for k, n, step, size in steps]
            x = x + lax.pad(part, zero, [*edges, (0, 0, 0)])
        return x


def _windows(window: int | Sizes, stride: int | Sizes | None) -> Windows:
    """Of a layer: one number is for two axes, and without a stride the windows touch."""
    return Windows(both(window), both(window if stride is None else stride))


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """The largest number of every window. Of equal ones the first, row by row, takes ∂ℓ/∂x.

    Example:
      >>> import jax
      >>> MaxPool(2).init(jax.random.key(0), (28, 28, 6))[1]
      (14, 14, 6)
    """

    window: int | Sizes
    stride: int | Sizes | None = None

    def init(self, key: Array, shape: Sizes, scheme: Any = None, dtype: Any = None) -> tuple[tuple[()], Sizes]:
        return (), _windows(self.window, self.stride).after(shape)

    def forward(self, params: tuple[()], x: Array, key: Array | None = None) -> tuple[Array, Any]:
        places = jnp.stack(list(_windows(self.window, self.stride).taken(x)))
        return jnp.max(places, axis=0), (jnp.argmax(places, axis=0), shape_of(x))

    def backward(self, params: tuple[()], tape: Any, dl_dx: Array) -> tuple[Array, tuple[()]]:
        windows, (first, shape) = _windows(self.window, self.stride), tape
        parts = [jnp.where(first == k, dl_dx, jnp.zeros((), dl_dx.dtype)) for k in range(math.prod(windows.size))]
        return windows.put(parts, shape.shape[1:]), ()


@dataclasses.dataclass(frozen=True)
class AveragePool:
    """The mean of every window.

    Example:
      >>> import jax
      >>> AveragePool(2).init(jax.random.key(0), (28, 28, 6))[1]
      (14, 14, 6)
    """

    window: int | Sizes
    stride: int | Sizes | None = None

    def init(self, key: Array, shape: Sizes, scheme: Any = None, dtype: Any = None) -> tuple[tuple[()], Sizes]:
        return (), _windows(self.window, self.stride).after(shape)

    def forward(self, params: tuple[()], x: Array, key: Array | None = None) -> tuple[Array, Any]:
        places = list(_windows(self.window, self.stride).taken(x))
        return sum(places[1:], places[0]) / len(places), shape_of(x)

    def backward(self, params: tuple[()], shape: Array, dl_dx: Array) -> tuple[Array, tuple[()]]:
        windows = _windows(self.window, self.stride)
        count = math.prod(windows.size)
        return windows.put([dl_dx / count] * count, shape.shape[1:]), ()
