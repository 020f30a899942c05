"""The picture of `jaxbp trace`: forward along the top, δ flowing back along the bottom."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from jaxbp.run.report.plots import save

BARS = 32  # vectors up to this length are drawn as bars, longer ones folded into a picture


def draw(arrays: Mapping[str, np.ndarray], image: np.ndarray | None, title: str, path: Path) -> None:
    """A column for each of x⁽⁰⁾, s⁽¹⁾, x⁽¹⁾ …; below it the derivative of ℓ by it, and of the layer's w and b.

    The image is the sample as it was read; without one x⁽⁰⁾ is drawn as the other vectors are. Red is positive, blue
    negative, white 0, each array on its own scale.
    """
    forwards = [name for name in arrays if not name.startswith("∂")]
    figure, axes = plt.subplots(
        4, len(forwards), figsize=(max(2.1 * len(forwards), 8), 8.4), layout="constrained", squeeze=False
    )
    for column, name in zip(axes.T, forwards, strict=True):
        shape = image.shape if image is not None and name == forwards[0] else None
        if shape is not None:
            column[0].imshow(image, cmap="gray_r")
            _frame(column[0], f"{name}, as read")
        else:
            _array(column[0], name, arrays[name], None)
        _array(column[1], f"∂ℓ/∂{name}", arrays[f"∂ℓ/∂{name}"], shape)
        for axis, letter in zip(column[2:], "wb", strict=True):
            parameter = f"∂ℓ/∂{letter}{name[1:]}"
            if name.startswith("s"):
                _array(axis, parameter, arrays[parameter], None)
            else:
                axis.axis("off")
    axes[0, 0].set_ylabel("forward →", fontsize="large")
    axes[1, 0].set_ylabel("← backward", fontsize="large")
    figure.suptitle(title)
    save(figure, path)


def _array(axis: Axes, name: str, values: np.ndarray, shape: tuple[int, ...] | None) -> None:
    """A matrix or a long vector as a picture, a short vector as bars; the norm stands in the title."""
    if values.ndim == 1 and len(values) <= BARS:
        axis.bar(np.arange(len(values)), values, color=np.where(values < 0, "tab:blue", "tab:red").tolist())
        axis.axhline(0, color="black", linewidth=0.5)
        axis.tick_params(labelsize="x-small")
    else:
        picture = _folded(values, shape) if values.ndim == 1 else values
        limit = float(np.nanmax(np.abs(picture))) or 1.0
        axis.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_aspect("auto" if values.ndim == 2 else "equal")
        _frame(axis, "")
    axis.set_title(f"{name}\n‖·‖ = {np.linalg.norm(values):.3g}", fontsize="medium")


def _folded(values: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """The vector row by row in the shape of the image, or in a square whose unused end is NaN, drawn as background."""
    if shape is not None:
        return values.reshape(shape)
    side = int(np.ceil(np.sqrt(len(values))))
    return np.append(values, np.full(-len(values) % side, np.nan)).reshape(-1, side)


def _frame(axis: Axes, title: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize="medium")
