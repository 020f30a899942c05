"""The experiments about memory and precision, in small: every program has the same gradient, and what is written."""

import json
from pathlib import Path

import pytest
from matplotlib import image

from experiments import memory_tricks, precision

pytestmark = pytest.mark.slow

DIGITS = """
[data]
name = "digits"
[model]
sizes = [64, 10]
[optimizer]
learning_rate = 0.1
[train]
epochs = 1
"""


def test_every_program_has_the_same_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_tricks, "SLOTS", {6: (2,)})
    monkeypatch.setattr(memory_tricks, "PARTS", (4,))
    memory_tricks.main(["--depths", "6", "--width", "4", "--batch", "8", "--rounds", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "memory_tricks.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert {"store-all", "√L", "2 slots", "4 micro-batches", "jax.checkpoint, √L, scan"} < set(rows)
    assert max(row["largest_difference"] for row in rows.values()) < 1e-5
    assert rows["store-all"]["largest_difference"] == 0 and rows["store-all"]["time_ratio"] == 1
    assert rows["2 slots"]["inputs_held"] == 3
    assert image.imread(tmp_path / "memory_tricks.png").std() > 0.05
    assert "| 2 slots " in capsys.readouterr().out


def test_precision_trains_the_same_seed_in_three_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.toml"
    path.write_text(DIGITS)
    precision.main(["--config", str(path), "--seeds", "1", "--out", str(tmp_path)])
    losses = {w: f["test_loss"] for w, f in json.loads((tmp_path / "precision.json").read_text())["summary"].items()}
    assert abs(losses["mixed"] / losses["float32"] - 1) < 0.05 and losses["mixed"] != losses["float32"]
    assert image.imread(tmp_path / "precision.png").std() > 0.05
    assert "| mixed " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "options", "said"),
    [
        (memory_tricks.main, ["--batch", "24"], "--batch: a multiple of 16"),
        (precision.main, ["--seeds", "0"], "--seeds: got 0, it should be 1 or more"),
        (precision.main, ["--config", "none.toml"], "precision: none.toml: no such file"),
    ],
)
def test_what_does_not_fit_is_said(
    capsys: pytest.CaptureFixture[str], main: object, options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)  # type: ignore[operator]
    assert stop.value.code == 2 and said in capsys.readouterr().err
