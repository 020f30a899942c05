"""Convolutions over one and over two axes of space."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp import initializers
from jaxbp.factor import Convolved, Padding, Window, convolve, convolve_transposed
from jaxbp.layers.dense import Scheme
from jaxbp.mlp import Affine, Array

Size = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Conv:
    """s_p = Σ_k w_k x at p · stride + k · dilation − low, plus b: the window at every position p of space.

    x is (space…, in), s (positions…, out). w is (out, in / groups, window…).

    Args:
      channels: out.
      window: its size along each axis.
      stride, dilation: along each axis.
      padding: zeros around x: "valid" for none, "same" for as many positions as there are inputs (at stride 1, an odd
        window), or (low, high) along each axis.
      groups: of channels, each of which sees its own inputs only.

    Raises:
      ValueError: sizes that do not fit each other; "same" with an even window or a stride.
    """

    channels: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | Padding
    dilation: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        if self.channels % self.groups:
            raise ValueError(f"{self.channels} channels can't be split into {self.groups} groups")
        if isinstance(self.padding, str) and self.padding not in ("valid", "same"):
            raise ValueError(f"padding is {self.padding!r}, allowed: valid, same, or (low, high) for each axis")
        if self.padding == "same" and (any(k % 2 == 0 for k in self.window) or any(s != 1 for s in self.stride)):
            raise ValueError(
                f"padding 'same' with a window of {self.window} and strides {self.stride}, "
                "allowed: odd windows and strides of 1, or (low, high) for each axis"
            )

    @property
    def geometry(self) -> Window:
        """Sizes as `jaxbp.factor` needs them."""
        sizes = zip(self.window, self.dilation, strict=True)
        around = {"valid": 0, "same": 1}
        padding = (
            tuple((around[self.padding] * (k - 1) * apart // 2,) * 2 for k, apart in sizes)
            if isinstance(self.padding, str)
            else self.padding
        )
        return Window(self.window, self.stride, padding, self.dilation, self.groups)

    def init(
        self, key: Array, shape: tuple[int, ...], scheme: Scheme = "he", dtype: DTypeLike = jnp.float32
    ) -> tuple[Affine, tuple[int, ...]]:
        if len(shape) != len(self.window) + 1:
            raise ValueError(f"it takes ({'height, width' if len(self.window) == 2 else 'length'}, channels)")
        if shape[-1] % self.groups:
            raise ValueError(f"its {shape[-1]} input channels can't be split into {self.groups} groups")
        w = initializers.weights(scheme)(key, (self.channels, shape[-1] // self.groups, *self.window), dtype)
        after = jax.eval_shape(lambda x: convolve(x, w, self.geometry), jax.ShapeDtypeStruct((1, *shape), dtype)).shape
        if 0 in after:
            raise ValueError(f"its window of {self.window} is larger than the input")
        return Affine(w, jnp.zeros(self.channels, dtype)), after[1:]

    # fmt: off
    def forward(self, params: Affine, x: Array, key: Array | None = None) -> tuple[Array, Array]:
        w, b = params
        x = x.astype(w.dtype)
        return convolve(x[None], w, self.geometry)[0] + b.reshape(*(1,) * (x.ndim - 1), -1), x

    def backward(self, params: Affine, x: Array, dl_ds: Array) -> tuple[Array, Convolved]:
        dl_dx = convolve_transposed(dl_ds[None], params.w, self.geometry, x.shape[:-1])[0]
        return dl_dx, Convolved(x, dl_ds, self.geometry)
    # fmt: on


def Conv1d(
    channels: int,
    window: int,
    stride: int = 1,
    padding: str | Padding = "valid",
    dilation: int = 1,
    groups: int = 1,
) -> Conv:
    """A convolution over x (length, in), see `Conv`.

    Example:
      >>> Conv1d(8, 5, stride=2).init(jax.random.key(0), (40, 1))[1]
      (18, 8)
    """
    return Conv(channels, (window,), (stride,), padding, (dilation,), groups)


def Conv2d(
    channels: int,
    window: Size,
    stride: Size = 1,
    padding: str | Padding = "valid",
    dilation: Size = 1,
    groups: int = 1,
) -> Conv:
    """A convolution over x (height, width, in), see `Conv`; one number is for both axes.

    Example:
      >>> Conv2d(6, 5, padding="same").init(jax.random.key(0), (28, 28, 1))[1]
      (28, 28, 6)
    """
    return Conv(channels, both(window), both(stride), padding, both(dilation), groups)


def both(size: Size) -> tuple[int, ...]:
    """One number for the two axes of space."""
    return (size, size) if isinstance(size, int) else tuple(size)
