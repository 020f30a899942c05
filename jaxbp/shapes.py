"""What the public functions check before they compute: shapes always, values where there are any (not inside jit).

And how tuples of arrays are shown to people.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbp.losses import Loss


def uncut(a: ArrayLike) -> jax.Array | np.ndarray:
    """The array as it is given: JAX, outside its x64 mode, cuts 64-bit integers to 32 bits before they are seen."""
    return a if isinstance(a, jax.Array) else np.asarray(a)


def check_shape(name: str, shape: Sequence[int], *expected: Sequence[int | str]) -> None:
    """ValueError unless the shape is one of those expected; a letter stands for any length.

    Example:
      >>> check_shape("x", (7, 5), ("N", 3))
      Traceback (most recent call last):
      ValueError: x has shape (7, 5), expected (N, 3)
    """

    def fits(pattern: Sequence[int | str]) -> bool:
        return len(shape) == len(pattern) and all(
            isinstance(p, str) or p == n for n, p in zip(shape, pattern, strict=True)
        )

    if not any(fits(pattern) for pattern in expected):
        shown = " or ".join(f"({', '.join(map(str, pattern))}{',' * (len(pattern) == 1)})" for pattern in expected)
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {shown}")


def check_params(sizes: tuple[int, ...], params: Sequence[Any]) -> None:
    """TypeError or ValueError unless params holds L layers of w (out, in) and b (out,), all floats."""
    if not all(hasattr(layer, "w") and hasattr(layer, "b") for layer in params):
        raise TypeError("params has a layer without the fields w and b, expected a jaxbp.Affine for each layer")
    if len(params) != len(sizes) - 1:
        raise ValueError(f"params has {len(params)} layers, sizes {sizes} has {len(sizes) - 1}")
    for layer, ((w, b), inputs, outputs) in enumerate(zip(params, sizes, sizes[1:], strict=False), start=1):
        check_shape(f"w of layer {layer}", w.shape, (outputs, inputs))
        check_shape(f"b of layer {layer}", b.shape, (outputs,))
        for name, leaf in (("w", w), ("b", b)):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{name} of layer {layer} has dtype {leaf.dtype}, expected a float: x would be cut to it"
                )


def check_targets(loss: Loss, y: jax.Array | np.ndarray, batch: int, outputs: int | tuple[int, ...]) -> None:
    """ValueError unless y is what the loss takes: (N, C) numbers, (N,) integer labels in 0 … C − 1, or either.

    Over positions (N, T, C) and (N, T); `outputs` is then (T, C).
    """
    *positions, classes = (outputs,) if isinstance(outputs, int) else outputs
    expected: list[tuple[int, ...]] = [(batch, *positions, classes)] if "array" in loss.target else []
    if "label" in loss.target:
        expected.append((batch, *positions))
    check_shape(f"y of {loss.name}", y.shape, *expected)
    if y.ndim == 1 + len(positions):
        check_labels(y, classes, loss.padding)


def check_labels(y: jax.Array | np.ndarray, classes: int, padding: int | None = None) -> None:
    """TypeError for labels that are not integers, ValueError for one out of range: the first bad one is named.

    Inside jit there is no value to look at; there a label out of range makes loss and gradient NaN.
    """
    if y.dtype.kind not in "iu":
        raise TypeError(f"y holds labels and has dtype {y.dtype}, labels have to be integers in 0 … {classes - 1}")
    if isinstance(y, jax.core.Tracer):
        return
    labels = np.asarray(y)
    bad = np.argwhere(((labels < 0) | (labels >= classes)) & (True if padding is None else labels != padding))
    if len(bad):
        first = tuple(bad[0].tolist())
        hint = ": labels start at 0, not at 1" if labels.min() == 1 and labels.max() == classes else ""
        where = ", ".join(map(str, first))
        raise ValueError(f"y[{where}] is {labels[first]}, expected a label in 0 … {classes - 1}{hint}")


def arrays_of(fields: Any) -> dict[str, list[str]]:
    """The arrays of each field of a NamedTuple as dtype[shape]; whatever else a tree may hold as it is."""
    return {
        name: [f"{a.dtype}{list(a.shape)}" if hasattr(a, "dtype") else repr(a) for a in arrays]
        for name, arrays in fields._asdict().items()
    }


def shown(fields: Any) -> str:
    arrays = (f"{name}=({', '.join(found)})" for name, found in arrays_of(fields).items())
    return f"{type(fields).__name__}({', '.join(arrays)})"


def table(fields: Any) -> str:
    """HTML, a row for the arrays of each layer."""
    columns = arrays_of(fields)
    rows = [tuple(columns), *itertools.zip_longest(*columns.values(), fillvalue="")]
    return "<table>" + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows) + "</table>"
