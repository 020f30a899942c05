"""The pictures: each opens, has a sensible size, is not blank, and draws without a warning (warnings are errors)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib import pyplot as plt

from jaxbp.run.report import plots

RNG = np.random.default_rng(0)


def looked_at(path: Path) -> np.ndarray:
    """The picture as (height, width, RGB) in 0 … 1, after a look at its size and at how much of it is drawn on."""
    pixels = image.imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert 100 <= height <= 2000 and 400 <= width <= 2000
    assert 0.002 < np.mean(pixels.min(axis=-1) < 0.9) < 0.95
    assert plt.get_fignums() == []  # closed, so that a long session does not fill the memory
    return pixels


def has_colour(pixels: np.ndarray, name: str) -> bool:
    rgb = np.array(plt.matplotlib.colors.to_rgb(name))
    return bool(np.sum(np.abs(pixels - rgb).max(axis=-1) < 0.02) > 20)


def rows(count: int, score: str = "accuracy", layers: int = 2, **values: Any) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            **{f"{split}_loss": 2.0 / epoch for split in ("train", "test")},
            **{f"{split}_{score}": 1 - 0.5 / epoch for split in ("train", "test")},
            "delta_rms": [0.1 / (epoch + layer) for layer in range(layers)],
            "gradient_rms": [0.2 / (epoch + layer) for layer in range(layers)],
        }
        | values
        for epoch in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("score", ["accuracy", "rmse"])
def test_learning_curves(tmp_path: Path, count: int, score: str) -> None:
    data = rows(count, score)
    for row in data:
        row["test_loss"] *= 2
        row[f"test_{score}"] /= 2
    plots.learning_curves(data, tmp_path / "a.png")
    pixels = looked_at(tmp_path / "a.png")
    assert has_colour(pixels, "tab:blue") and has_colour(pixels, "tab:orange")


@pytest.mark.parametrize("loss", [0.0, -3.0, np.nan, np.inf])
def test_learning_curves_of_a_loss_without_a_logarithm(tmp_path: Path, loss: float) -> None:
    """0 of a hinge loss, negative ones of poisson, inf in the last epoch before a run diverges."""
    plots.learning_curves([*rows(3), rows(4)[3] | {"train_loss": loss}], tmp_path / "a.png")
    looked_at(tmp_path / "a.png")
    plots.learning_curves(rows(3, train_loss=loss, test_loss=loss), tmp_path / "b.png")
    looked_at(tmp_path / "b.png")


@pytest.mark.parametrize(("loss", "scale"), [(1.0, "log"), (0.0, "log"), (np.inf, "log"), (-1.0, "linear")])
def test_a_logarithmic_scale_hides_no_loss(loss: float, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(figure: Any, path: Path) -> None:
        assert figure.axes[0].get_yscale() == scale
        plt.close(figure)

    monkeypatch.setattr(plots, "save", check)
    plots.learning_curves([*rows(3), rows(4)[3] | {"test_loss": loss}], Path("unused"))


@pytest.mark.parametrize("layers", [1, 3, 30])
def test_layer_rms(tmp_path: Path, layers: int) -> None:
    plots.layer_rms(rows(5, layers=layers), tmp_path / "a.png")
    looked_at(tmp_path / "a.png")


def test_layer_rms_of_dead_layers(tmp_path: Path) -> None:
    plots.layer_rms(rows(2, delta_rms=[0.0, 0.1], gradient_rms=[0.0, 0.0]), tmp_path / "a.png")
    looked_at(tmp_path / "a.png")


@pytest.mark.parametrize("units", [1, 3, 8, 100])
def test_first_layer(tmp_path: Path, units: int) -> None:
    plots.first_layer(RNG.normal(size=(units, 6)), (2, 3), tmp_path / "a.png")
    pixels = looked_at(tmp_path / "a.png")
    red, _, blue = np.moveaxis(pixels, -1, 0)
    assert (red - blue).max() > 0.3 and (blue - red).max() > 0.3  # both signs


def test_first_layer_of_zeros(tmp_path: Path) -> None:
    plots.first_layer(np.zeros((4, 6)), (2, 3), tmp_path / "a.png")
    looked_at(tmp_path / "a.png")


@pytest.mark.parametrize("count", [1, 5, 24])
def test_worst(tmp_path: Path, count: int) -> None:
    names = [str(n % 10) for n in range(count)]
    plots.worst(RNG.random((count, 64)), names, names[::-1], np.linspace(9, 1, count), (8, 8), tmp_path / "a.png")
    looked_at(tmp_path / "a.png")
