"""The picture of `jaxbp trace`: forward along the top, δ flowing back along the bottom."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from jaxbp.run.report.figures import fit_vertical, over
from jaxbp.run.study.trace import Outcome

FEW = 5  # bars below which they are as narrow as if there were more
BARS = 32  # vectors up to this length are drawn as bars, longer ones folded into a picture
CELLS = 48  # of a side of a matrix that are drawn; of those that share one, that of the largest size is seen
ENDS = 2  # layers at either end that are drawn; of those between only the norms are


def draw(arrays: Mapping[str, np.ndarray], image: np.ndarray | None, outcome: Outcome, heading: str) -> Figure:
    """A column for each of x⁽⁰⁾, s⁽¹⁾, x⁽¹⁾ …; below it the derivative of ℓ by it, and of the layer's w and b.

    The image is the sample as it was read; without one x⁽⁰⁾ is drawn as the other vectors are. Red is positive, blue
    negative, white 0, each array on its own scale. Of many layers the first and the last are drawn, and the norms of
    all; x⁽ˡ⁾ is not drawn where it is s⁽ˡ⁾.
    """
    layers = sum(name.startswith("s") for name in arrays)
    deep = layers > 2 * ENDS
    names = _shown([name for name in arrays if not name.startswith("∂")], arrays, deep)
    width, height = max(1.75 * (len(names) + 1), 9), 9.6 if deep else 7.8
    figure = Figure(figsize=(width, height))
    figure.suptitle(heading, fontsize="medium", y=1 - 0.1 / height, va="top", parse_math=False)
    places = GridSpec(4 + deep, len(names) + 1, figure, wspace=0.32, hspace=0.75)
    places.update(left=0.7 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.8 / height)
    columns = [[figure.add_subplot(places[row, k]) for row in range(4)] for k in range(len(names) + 1)]
    for column, name in zip(columns, names, strict=False):
        _column(column, name, arrays, image if name == "x⁽⁰⁾" else None, outcome if name[1:] == names[-1][1:] else None)
    if names[-1].startswith("s"):
        both = f"{names[-1]} = x{names[-1][1:]}"
        columns[-2][0].set_title(f"{both}\n{_norm(arrays[names[-1]])}", fontsize="small")
    columns[0][0].set_ylabel("forward →", fontsize="large")
    columns[0][1].set_ylabel("← backward", fontsize="large")
    if deep:
        gap = columns[2 * ENDS + 1][0]
        gap.annotate("⋯", (-0.2, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize="x-large")
        _norms(figure.add_subplot(places[4, :]), arrays, layers)
    _last(columns[-1], outcome)
    return figure


def _shown(names: Sequence[str], arrays: Mapping[str, np.ndarray], deep: bool) -> list[str]:
    chosen = [*names[: 2 * ENDS + 1], *names[-2 * ENDS :]] if deep else list(names)
    last, before = chosen[-1], chosen[-2]
    return chosen[:-1] if np.array_equal(arrays[last], arrays[before], equal_nan=True) else chosen


def _column(
    column: Sequence[Axes],
    name: str,
    arrays: Mapping[str, np.ndarray],
    image: np.ndarray | None,
    outcome: Outcome | None,
) -> None:
    """outcome: for the names of the outputs, where the column is theirs."""
    shape = None if image is None else image.shape
    if image is not None:
        column[0].imshow(image, cmap="gray_r")
        _frame(column[0], f"{name}, as read")
    else:
        _array(column[0], name, arrays[name], outcome=outcome)
    _array(column[1], f"∂ℓ/∂{name}", arrays[f"∂ℓ/∂{name}"], shape, outcome)
    for axis, letter in zip(column[2:], "wb", strict=True):
        parameter = f"∂ℓ/∂{letter}{name[1:]}"
        if name.startswith("s"):
            _array(axis, parameter, arrays[parameter], outcome=outcome)
        else:
            axis.set_axis_off()


def _array(
    axis: Axes, name: str, values: np.ndarray, shape: tuple[int, ...] | None = None, outcome: Outcome | None = None
) -> None:
    """A matrix or a long vector as a picture with its largest size below it, a short vector as bars."""
    if values.ndim == 1 and len(values) <= BARS:
        axis.bar(np.arange(len(values)), values, color=np.where(values < 0, "tab:blue", "tab:red").tolist())
        axis.axhline(0, color="black", linewidth=0.5)
        axis.tick_params(labelsize="x-small")
        if outcome or len(values) < FEW:
            _places(axis, outcome.ticks if outcome else [str(k) for k in range(len(values))])
        if outcome:
            axis.set_xlabel(outcome.axis, fontsize="x-small", labelpad=1)
    else:
        picture = _folded(values, shape) if values.ndim == 1 else _thinned(values)
        axis.imshow(picture, cmap="RdBu_r", norm=_symmetric(picture), interpolation="nearest")
        axis.set_aspect("auto" if values.ndim == 2 else "equal")
        _frame(axis, "")
        axis.set_xlabel(f"max |·| = {np.max(np.abs(values), initial=0):.2g}", fontsize="x-small", labelpad=2)
    axis.set_title(f"{name}\n{_norm(values)}", fontsize="small")


def _norm(values: np.ndarray) -> str:
    return f"‖·‖ = {np.linalg.norm(values):.3g}"


def _places(axis: Axes, names: Sequence[str]) -> None:
    """A tick for each bar; a few bars are as narrow as if there were more."""
    rotation = 90 if max(map(len, names)) > 2 and len(names) > 1 else 0
    axis.set_xticks(range(len(names)), names, fontsize="x-small", rotation=rotation, parse_math=False)
    if len(names) < FEW:
        axis.set_xlim(-2.5, len(names) + 1.5)


def _symmetric(picture: np.ndarray) -> Normalize:
    finite = np.abs(picture[np.isfinite(picture)])
    limit = float(finite.max(initial=0)) or 1.0
    return Normalize(-limit, limit)


def _folded(values: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """The vector row by row in the shape of the image, or in a square whose unused end is NaN, drawn as background."""
    if shape is not None:
        return values.reshape(shape)
    side = int(np.ceil(np.sqrt(len(values))))
    return np.append(values, np.full(-len(values) % side, np.nan)).reshape(-1, side)


def _thinned(matrix: np.ndarray) -> np.ndarray:
    """At most CELLS × CELLS of a matrix: of the numbers that share a cell the one of the largest size."""
    for _ in range(2):
        if len(matrix) > CELLS:
            parts = np.array_split(matrix, CELLS)
            matrix = np.stack([np.take_along_axis(p, np.abs(p).argmax(axis=0)[None], 0)[0] for p in parts])
        matrix = matrix.T
    return matrix


def _last(column: Sequence[Axes], outcome: Outcome) -> None:
    """What is predicted beside the target; what the colours mean."""
    axis, count = column[0], len(outcome.predicted)
    places = np.arange(count)
    if count > BARS:
        axis.plot(places, outcome.predicted, color="tab:gray")
        axis.plot(places, outcome.target, color="black", linewidth=0.6)
    else:
        axis.bar(places, outcome.predicted, color="tab:gray", label="predicted")
        axis.plot(places, outcome.target, "k_", markersize=9, markeredgewidth=2, label="target")
        _places(axis, outcome.ticks)
    axis.tick_params(labelsize="x-small")
    axis.set_title(f"{outcome.name}\nblack: the target", fontsize="small")
    axis.set_xlabel(outcome.axis, fontsize="small")
    for other in column[1:]:
        other.set_axis_off()
    scale, inset = ScalarMappable(Normalize(-1, 1), colormaps["RdBu_r"]), column[1].inset_axes((0.05, 0.5, 0.9, 0.12))
    bar = column[1].figure.colorbar(scale, cax=inset, orientation="horizontal")
    bar.set_ticks([-1, 0, 1], labels=["−max |·|", "0", "max |·|"], fontsize="x-small")
    inset.set_title("blue: negative\nred: positive", fontsize="x-small")


def _norms(axis: Axes, arrays: Mapping[str, np.ndarray], layers: int) -> None:
    """‖x⁽ˡ⁾‖, ‖∂ℓ/∂s⁽ˡ⁾‖ and ‖∂ℓ/∂w⁽ˡ⁾‖ of every layer."""
    found = []
    for begin, style, name in (("x", "o-", "‖x⁽ˡ⁾‖"), ("∂ℓ/∂s", "s-", "‖∂ℓ/∂s⁽ˡ⁾‖"), ("∂ℓ/∂w", "^-", "‖∂ℓ/∂w⁽ˡ⁾‖")):
        norms = [np.linalg.norm(a) for key, a in arrays.items() if key.startswith(begin) and not key.endswith("⁽⁰⁾")]
        norms = norms if begin == "x" else norms[::-1]
        axis.plot(range(1, layers + 1), norms, style, markersize=4, label=name)
        found += norms
    fit_vertical(axis, found)
    axis.set_ylabel("norm")
    axis.legend(fontsize="small")
    over(axis, "layer l", range(1, layers + 1))


def _frame(axis: Axes, title: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize="small")
