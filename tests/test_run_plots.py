"""The pictures: what stands on their axes and in their words, and that they draw without a warning.

Warnings are errors. Most are laid out and not painted, which takes most of the time.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from test_run_targets import posed

from jaxbp.run.compute.epoch import Evaluation
from jaxbp.run.report import figures, pictures, plots
from jaxbp.run.report.metrics import EpochRow, Scores, StepRecord

RNG = np.random.default_rng(0)
HEAD = "digits-2 · my $data$.npz · 64-10 relu · softmax_cross_entropy"  # dollars are no mathematics


def drawn(figure: Figure) -> Figure:
    """The figure, after it was laid out."""
    figure.draw_without_rendering()
    return figure


def words(figure: Figure) -> str:
    """All that is written in a figure that was drawn."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def ticks(axis: Any, which: str = "x") -> list[str]:
    """The labels that are drawn within the axis."""
    low, high = sorted(getattr(axis, f"get_{which}lim")())
    found = getattr(axis, f"{which}axis").get_major_ticks()
    return [tick.label1.get_text() for tick in found if low <= tick.get_loc() <= high and tick.label1.get_text()]


def rows(count: int, score: str = "accuracy", layers: int = 2, **values: Any) -> list[EpochRow]:
    """A run of so many epochs; values replace the fields of its last row."""
    found = []
    for epoch in range(1, count + 1):
        own = {score: 1 - 0.5 / epoch} | ({"r2": 0.5} if score == "rmse" else {})
        rms = [0.1 / (epoch + layer) for layer in range(layers)]
        found.append(EpochRow(epoch, 9 * epoch, Scores(2.0 / epoch, **own), Scores(3.0 / epoch, **own), 0.1, rms, rms))
    return [*found[:-1], EpochRow(**vars(found[-1]) | values)]


# --- learning curves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "expected"), [(1, ["1"]), (2, ["1", "2"]), (40, ["1", "40"])])
def test_epochs_begin_at_the_first_and_end_at_the_last_one(count: int, expected: list[str]) -> None:
    figure = drawn(plots.learning_curves(rows(count), HEAD))
    for axis in figure.axes:
        shown = ticks(axis)
        assert [shown[0], shown[-1]][-len(expected) :] == expected and all(label.isdigit() for label in shown)
        assert axis.get_xlim()[0] > -1 and axis.get_xlabel() == "epoch"
        assert all(line.get_marker() == "o" for line in axis.lines) == (count == 1)


def test_the_heading_is_that_of_the_run_and_the_best_epoch_is_marked() -> None:
    found = rows(4)
    found[2] = EpochRow(**vars(found[2]) | {"test": Scores(1.0, accuracy=0.98)})
    figure = drawn(plots.learning_curves(found, HEAD))
    assert HEAD in words(figure) and "best test: 98.00 %, epoch 3" in words(figure)
    figure = drawn(plots.learning_curves(rows(4, "rmse"), HEAD))
    assert "best test: 0.5, epoch 1" in words(figure) and figure.axes[1].get_ylabel() == "RMSE (units of the target)"


def test_the_epoch_that_is_kept_has_a_line() -> None:
    found = [dataclasses.replace(row, test=None, validation=row.test) for row in rows(4)]
    figure = drawn(plots.learning_curves(found, HEAD, kept=3))
    for axis in figure.axes:
        [line] = [line for line in axis.lines if line.get_label() == "kept: epoch 3"]
        assert line.get_xdata() == [3, 3]
        assert {"train", "validation"} <= {line.get_label() for line in axis.lines}
    assert "best validation: 87.50 %, epoch 4" in words(figure) and "test" not in words(figure)


@pytest.mark.parametrize("loss", [0.0, -3.0, np.nan, np.inf])
def test_a_loss_without_a_logarithm(loss: float) -> None:
    """0 of a hinge loss, negative ones of poisson, inf in the last epoch before a run diverges."""
    bad = Scores(loss, accuracy=0.5)
    figure = drawn(plots.learning_curves(rows(3, train=bad, test=bad), HEAD))
    assert figure.axes[0].get_yscale() == ("linear" if loss < 0 else "log")
    figure = drawn(plots.learning_curves(rows(1, train=bad, test=bad), HEAD))
    assert ("no finite value" in words(figure)) == (not np.isfinite(loss))


def test_scores_that_are_no_numbers() -> None:
    bad = Scores(np.nan, rmse=np.nan, r2=np.nan)
    assert words(drawn(plots.learning_curves(rows(1, "rmse", train=bad, test=bad), HEAD))).count("no finite value") == 2


def test_less_than_a_decade_has_plain_numbers() -> None:
    figure = drawn(plots.learning_curves(rows(5), HEAD))  # losses from 0.4 to 3
    assert {"0.5", "1", "2"} <= set(ticks(figure.axes[0], "y"))


def test_a_schedule_has_a_panel() -> None:
    figure = drawn(plots.learning_curves(rows(3, learning_rate=0.01), HEAD))
    assert [axis.get_title() for axis in figure.axes][2:] == ["learning rate"]
    assert len(drawn(plots.learning_curves(rows(3), HEAD)).axes) == 2


@pytest.mark.parametrize(("layers", "named"), [(1, 1), (9, 9), (30, 9)])
def test_layers(layers: int, named: int) -> None:
    left, right = drawn(plots.layer_rms(rows(5, layers=layers), HEAD)).axes
    legend = right.get_legend()
    assert left.get_legend() is None and len(legend.get_texts()) == named
    assert legend.get_window_extent().x0 >= right.get_window_extent().x1  # beside the curves, not over them
    assert len({(line.get_color(), line.get_linestyle()) for line in map(_style, left.lines)}) == layers


def _style(line: Any) -> Any:
    line.set_color(tuple(line.get_color()))
    return line


def test_dead_layers() -> None:
    drawn(plots.layer_rms(rows(2, delta_rms=[0.0, 0.1], gradient_rms=[0.0, 0.0]), HEAD))


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "said"), [(3, "all 3 units"), (100, "units 1 to 64 of 100")])
def test_the_first_layer(units: int, said: str) -> None:
    figure = drawn(plots.first_layer(RNG.normal(size=(units, 6)), (2, 3), HEAD))
    assert said in words(figure) and "red positive" in words(figure)
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high < 0


def test_the_first_layer_of_zeros() -> None:
    drawn(plots.first_layer(np.zeros((4, 6)), (2, 3), HEAD))


@pytest.mark.parametrize("count", [1, 24])
def test_the_worst_can_be_traced_and_wrong_ones_are_red(count: int) -> None:
    names = ["Ankle boot, brown" if n == 0 else "b" for n in range(count)]
    index = list(range(100, 100 + count))
    figure = drawn(plots.images(RNG.random((count, 8, 8)), index, names, ["b"] * count, np.ones(count), "worst", HEAD))
    captions = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert captions["100: Ankle boot… → b\n1"] == "tab:red"
    assert count == 1 or captions["123: b → b\n1"] == "black"


def test_images_fill_their_figure() -> None:
    """No more than an inch beside and above them."""
    figure = plots.images(RNG.random((24, 28, 28)), list(range(24)), ["a"] * 24, ["a"] * 24, np.ones(24), "worst", HEAD)
    width, height = figure.get_size_inches()
    box = figure.axes[0].get_position()
    assert width * (1 - box.width) < 1 and height * (1 - box.height) < 1


# --- what the network makes of the test set ---------------------------------------------------------------------------


def test_confusion() -> None:
    figure = drawn(plots.confusion(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["cat", "d$og$"], HEAD))
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["1", "1", "2"]  # a 0 is left out
    assert ticks(left) == ["cat", "d$og$"] and (left.get_xlabel(), left.get_ylabel()) == ("prediction", "label")
    assert ticks(right, "y") == ["d$og$ (n = 2)", "cat (n = 2)"][::-1]
    recall, precision = (line.get_xdata().tolist() for line in right.lines)
    assert recall == [50, 100] and precision == [100, pytest.approx(200 / 3)]


def test_a_class_that_nobody_predicts_has_no_precision() -> None:
    figure = drawn(plots.confusion(np.array([0, 1]), np.array([0, 0]), ["a", "b"], HEAD))
    assert np.isnan(figure.axes[1].lines[1].get_xdata()).tolist() == [False, True]


def test_residuals() -> None:
    y = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    axes = drawn(plots.residuals(y, y + np.array([0.5, -1.0]), HEAD)).axes
    assert [axis.get_ylabel() for axis in axes][:3] == ["prediction 0", "prediction − target", "prediction 1"]
    np.testing.assert_allclose(axes[3].lines[1].get_ydata(), -1)
    np.testing.assert_allclose(axes[0].lines[1].get_xdata(), [1, 2, 3])
    assert len(drawn(plots.residuals(np.zeros((9000, 9)), np.ones((9000, 9)), HEAD)).axes) == 2 * plots.OUTPUTS_SHOWN


# --- what a run records -----------------------------------------------------------------------------------------------

SUMMARY = {"mean": 2.0, "min": 0.0, "q25": 1.0, "median": 2.0, "q75": 3.0, "max": 4.0}


def records(count: int, **quantities: Any) -> list[StepRecord]:
    return [StepRecord(1, 5 * i + 1, np.nan if i == 3 else 1.0, quantities) for i in range(count)]


@pytest.mark.parametrize("count", [1, 6])
def test_recorded_quantities(count: int) -> None:
    found = {
        "squared_norms": SUMMARY | {"mean_by_layer": [1.0, 1.0]},
        "variance": [1.0, 2.0],
        "stiffness": {"sign": -0.1, "cosine": np.nan},
        "coherence": 0.3,
        "noise_scale": {"trace": 1.0},
    }
    figure = plots.recorded(records(count, **found), HEAD)
    assert figure is not None
    named = [axis.get_title() for axis in drawn(figure).axes if axis.get_title()]
    assert named == ["squared norms", "variance", "stiffness", "coherence"]  # the noise scale has a picture of its own
    assert "median; quartiles; extremes" in words(figure) and "layer 2" in words(figure) and "cosine" in words(figure)
    assert plots.recorded(records(1, noise_scale={}), HEAD) is None


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (23, 1), (100, 2)])
def test_a_noise_scale_of_few_records_is_dots(count: int, lines: int) -> None:
    found = [
        StepRecord(1, i, np.nan if i == 3 else 1.0, {"noise_scale": {"trace": 2.0, "squared_gradient": (-1.0) ** i}})
        for i in range(1, count + 1)
    ]
    figure = drawn(plots.noise_scale(found, HEAD))
    left = figure.axes[0]
    assert len(left.lines) == lines and left.lines[0].get_linestyle() == "None"
    assert (left.get_legend() is not None) == (lines == 2) and "averaged over 1\n" not in words(figure)
    assert f"{-(-count // 2)} of {count} batches too small to see |G|²" in words(figure)
    assert figure.axes[1].get_title() == "mean loss of the same batches, as it is trained on"


def test_noise_scales_are_ratios_of_means() -> None:
    values = [(2.0, 1.0), (4.0, -1.0), (6.0, 3.0), (np.nan, 1.0)]
    found = [StepRecord(1, 1, 1.0, {"noise_scale": {"trace": a, "squared_gradient": b}}) for a, b in values]
    np.testing.assert_allclose(plots.noise_scales(found, 1), [2, np.nan, 2, np.nan])
    np.testing.assert_allclose(plots.noise_scales(found, 3), [np.nan, 4, 5, 3])  # 6/0, 12/3, 10/2 · 2/3 …


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_png_and_an_svg_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    for kind in ("png", "svg"):
        paths = [tmp_path / f"{name}.{kind}" for name in "ab"]
        for path in paths:
            figures.save(plots.layer_rms(rows(2), "a 例 of a script that the font lacks"), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    height, width, _ = image.imread(tmp_path / "a.png").shape
    assert 300 < height < 600 < width < 1300
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


@pytest.mark.slow
def test_the_backend_of_the_caller_stays() -> None:
    """In a process of its own, for the tests have a backend."""
    code = (
        "import matplotlib, sys; matplotlib.use('svg')\n"
        "from jaxbp.run.report import pictures\nfrom jaxbp.run.study import pictures, trace_plots\n"
        "from jaxbp.run.sweep import plots\n"
        "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- which pictures there are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "y", "last"),
    [
        ("softmax_cross_entropy", np.tile([0.25, 0.75], (10, 1)), "confusion"),  # accuracy is its score, so these too
        ("squared_error", np.tile([0.25, 0.75], (10, 1)), "residuals"),
        ("hinge", np.arange(10) % 2, "confusion"),
    ],
)
def test_the_pictures_of_a_run_that_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, y: np.ndarray, last: str
) -> None:
    problem = posed(tmp_path, loss, y)
    train = dataclasses.replace(problem.config.train, plot_format="svg")
    problem = dataclasses.replace(problem, config=dataclasses.replace(problem.config, train=train))
    saved: dict[str, Figure] = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: saved.update({path.name: drawn(figure)}))
    test = Evaluation(jnp.ones(2), jnp.ones((2, 2)))
    score = "rmse" if last == "residuals" else "accuracy"
    pictures.draw(problem, problem.model(problem.initial()), rows(2, score), [], test, Path("runs/a"), "diverged: why")
    assert list(saved) == ["learning_curves.svg", "layers.svg", f"{last}.svg"]
    for figure in saved.values():
        assert figure.get_suptitle() == f"a · d.npz · 4-3-2 relu · {loss}\ndiverged: why"
