"""The picture of the rows: every row with a target beside it, and the growth curves."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bench.rows import Row

COLORS = {"met": "#0b6e4f", "tie": "#ccbb44", "missed": "#cc3311"}
GROWTH = {
    "growth: time ÷ jax": "seconds a gradient",
    "growth: bytes ÷ jax": "temporary and output MB",
    "growth: compile seconds ÷ jax": "seconds to compile",
}
TICKS = (1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 5, 10, 100)
CURVES = {"batch": "samples", "width": "units a layer", "depth": "layers", "parameters": "parameters"}


def draw(rows: Sequence[Row]) -> Figure:
    """Above, a dot a row: how far from its target. Below, time, bytes and compile seconds of jaxbp and of jax."""
    judged = [row for row in rows if row.target]
    grown = [row for row in rows if row.at is not None]
    kinds = list(dict.fromkeys(row.what for row in judged))
    heights = ([0.33 * len(kinds) + 1.2] if judged else []) + ([7.5] if grown else [])
    figure = Figure(figsize=(13.3, max(sum(heights), 2)), layout="constrained")
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0] if heights else ())
    if judged:
        _targets(next(parts).subplots(), judged, kinds)
    if grown:
        _growth(next(parts).subplots(len(GROWTH), len(CURVES), sharex="col", sharey="row"), grown)
    return figure


def _targets(ax: Axes, rows: Sequence[Row], kinds: Sequence[str]) -> None:
    for row in rows:
        assert row.target is not None
        ax.plot(row.target.excess(row.value), kinds.index(row.what), "o", color=COLORS[row.verdict], alpha=0.6)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.45), max(high, 2.2))
    ax.set_xticks([x for x in TICKS if ax.get_xlim()[0] <= x <= ax.get_xlim()[1]])
    ax.minorticks_off()
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    ax.set_xlabel("times too slow or too large: left of 1 the target is reached")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.spines[["top", "right"]].set_visible(False)
    for verdict, color in COLORS.items():
        ax.plot([], [], "o", color=color, label=verdict)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _growth(axes: Sequence[Sequence[Axes]], rows: Sequence[Row]) -> None:
    for line, (what, label) in zip(axes, GROWTH.items(), strict=True):
        for ax, (curve, unit) in zip(line, CURVES.items(), strict=True):
            points = [row for row in rows if row.what == what and row.case.startswith(curve)]
            at = [row.at for row in points]
            scale = 1e-6 if points and points[0].unit == "B" else 1
            ax.plot(at, [scale * row.absolute for row in points], "o-", color=COLORS["met"], label="jaxbp")
            theirs = [scale * row.absolute / row.value for row in points]
            ax.plot(at, theirs, "x--", color="#888888", label="jax.value_and_grad")
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
            if what == list(GROWTH)[-1]:
                ax.set_xlabel(unit)
        line[0].set_ylabel(label)
    axes[0][0].legend(fontsize=8)
