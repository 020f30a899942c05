"""What run folders say: `jaxbp list`, `show` and `compare`, on folders as runs leave them."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from matplotlib import image
from scipy import stats

from jaxbp.cli import main
from jaxbp.run import compare
from jaxbp.run.config import Config, override, to_dict
from jaxbp.run.errors import UserError
from jaxbp.run.report.metrics import Divergence, EpochRow, Scores, StepRecord, Timing
from jaxbp.run.store import runs
from jaxbp.run.store.folder import append

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(path: str, *options: str, accuracies: Sequence[float] = (0.5, 0.75), started: str = "2026-01-01") -> Path:
    """A run folder as a finished run leaves it: two layers, an epoch for each test accuracy."""
    folder = Path(path)
    folder.mkdir(parents=True)
    config = override(Config(), ["--optimizer.learning-rate", "0.1", *options])
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(config)))
    (folder / "provenance.json").write_text(
        json.dumps({"started": f"{started}T10:00:00+00:00", "versions": {"jax": "1"}})
    )
    for epoch, accuracy in enumerate(accuracies, 1):
        train, test = Scores(0.5, accuracy=0.9), Scores(1 / epoch, accuracy=accuracy)
        append(folder / "metrics.jsonl", [StepRecord(epoch, epoch, 1.0, {"noise_scale": 2.0})])
        append(folder / "metrics.jsonl", [EpochRow(epoch, epoch, train, test, 0.1, [1.0, 1.0], [1.0, 1.0])])
        append(folder / "timings.jsonl", [Timing(epoch, 1.5, 100.0)])
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that a command prints."""
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with status 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.removeprefix("jaxbp: ").rstrip()


# --- what a folder says -----------------------------------------------------------------------------------------------


def test_a_folder_says_how_its_run_ended() -> None:
    finished, going, bad, empty = (made(f"runs/{name}") for name in ("finished", "going", "bad", "empty"))
    (going / ".unfinished").touch()
    append(bad / "metrics.jsonl", [StepRecord(3, 3, float("nan"), {}), Divergence(3, 3, "the loss is nan")])
    (empty / "metrics.jsonl").unlink()
    found = {path.name: runs.read(path) for path in (finished, going, bad, empty)}
    assert {name: run.state for name, run in found.items()} == {
        **{"finished": "finished", "going": "unfinished", "bad": "diverged", "empty": "finished"}
    }
    expected = {"train_loss": 0.5, "train_accuracy": 0.9, "test_loss": 0.5, "test_accuracy": 0.75}
    assert found["finished"].scores == found["bad"].scores == expected
    assert found["empty"].scores == {}
    assert found["finished"].config["optimizer"]["learning_rate"] == 0.1


def test_the_last_epoch_is_found_behind_many_records_and_before_half_a_line() -> None:
    folder = made("run")
    append(folder / "metrics.jsonl", [StepRecord(3, step, 1.0, {"x": "y" * 99}) for step in range(600)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "ste')
    assert (folder / "metrics.jsonl").stat().st_size > (runs.TAILS[1] or 0)
    assert runs.read(folder).last["epoch"] == 2


def test_a_private_run_shows_what_epsilon_does_not_cover_if_it_was_asked_for() -> None:
    folder = made("run", accuracies=())
    row = EpochRow(1, 1, Scores(0.5, accuracy=0.9), Scores(0.6, accuracy=0.8), 0.1, [1.0], [1.0], epsilon=1.0)
    append(folder / "metrics.jsonl", [row])
    assert runs.read(folder).scores == row.scores()


def test_damaged_files_are_named() -> None:
    folder = made("run")
    for line in ("no", "3", "{}"):
        (folder / "metrics.jsonl").write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"^run/metrics.jsonl: damaged: "):
            runs.read(folder)
    (folder / "provenance.json").write_text("{")
    with pytest.raises(UserError, match=r"^run/provenance.json: damaged: "):
        runs.read(folder)
    (folder / "provenance.json").write_text("{}")
    (folder / "config.toml").write_text("a = ")
    with pytest.raises(UserError, match=r"^run/config.toml: damaged: "):
        runs.read(folder)


# --- list -------------------------------------------------------------------------------------------------------------


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    made("runs/late", started="2026-03-01")
    made("runs/early", "--data.name", "iris", "--model.sizes", "4,3", accuracies=(0.5,), started="2026-01-01")
    (made("runs/going", accuracies=(), started="2026-02-01") / ".unfinished").touch()
    made("runs/broken", started="2026-04-01").joinpath("config.toml").write_text("a = ")
    made("runs/swept", started="2026-05-01").joinpath("members/seed-0").mkdir(parents=True)
    head, _, *rows, _ = shown(capsys, "list")
    assert head.split() == ["run", "started", "state", "data", "network", "epochs", "test_accuracy", "seconds"]
    assert [row.split()[0] for row in rows] == ["early", "going", "late", "swept", "broken"]
    cells = ["early", "2026-01-01", "10:00", "finished", "iris", "4-3", "relu", "1", "50.00", "%", "1.5"]
    assert rows[0].split() == cells
    assert "unfinished" in rows[1] and "finished, sweep of 1" in rows[3] and rows[4].split() == ["broken", "damaged"]
    _, _, *rows, _ = shown(capsys, "list", "runs", "--sort", "test_accuracy")
    assert [row.split()[0] for row in rows[:2]] == ["late", "early"]
    assert "unknown column 'sconds', did you mean 'seconds'?" in fault(capsys, "list", "--sort", "sconds")
    assert fault(capsys, "list", "nowhere") == "nowhere: no such folder"
    Path("bare").mkdir()
    assert fault(capsys, "list", "bare") == "bare: there is no run in it"


def test_members_of_a_sweep_have_no_dates(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in "10":
        member = made(f"runs/swept/members/seed-{seed}", "--train.seed", seed)
        (member / "provenance.json").unlink(), (member / "timings.jsonl").unlink()
    head, _, *rows, _ = shown(capsys, "list", "runs/swept")
    assert head.split() == ["run", "state", "data", "network", "epochs", "test_accuracy"]
    assert [row.split()[0] for row in rows] == ["seed-0", "seed-1"]


def test_to_list_and_to_compare_needs_no_jax() -> None:
    made("runs/a"), made("runs/b", "--train.seed", "1")
    code = """
import sys
from jaxbp import cli
for line in ("list", "show runs/a", "compare runs --out x.csv"):
    assert cli.main(line.split()) == 0, line
    assert not {"jax", "matplotlib", "scipy", "sklearn"} & set(sys.modules), line
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


# --- show -------------------------------------------------------------------------------------------------------------


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    folder = made("run", "--model.loss", "squared_error")
    (folder / "layers.png").touch()
    lines = shown(capsys, "show", "run")
    assert lines[0] == "run: finished, 2 epochs"
    assert [line.split() for line in lines if line.startswith("accuracy")] == [["accuracy", "90.00", "%", "75.00", "%"]]
    assert {'  loss = "squared_error"', "  started: 2026-01-01T10:00:00+00:00", "  versions.jax: 1"} <= set(lines)
    assert lines[-2:] == ["  run/layers.png", ""]
    assert fault(capsys, "show", "nowhere") == "nowhere: not a run folder: it has no config.toml"


# --- compare ----------------------------------------------------------------------------------------------------------


def seeds(name: str, accuracies: tuple[float, ...], *options: str) -> None:
    for seed, accuracy in enumerate(accuracies):
        made(f"runs/{name}-{seed}", "--train.seed", str(seed), *options, accuracies=(0.1, accuracy))


def test_runs_beside_each_other_by_the_keys_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    made("a"), made("b", "--optimizer.arguments.momentum", "0.9", accuracies=(0.9,))
    head, _, *rows, _ = shown(capsys, "compare", "a", "b")
    scores = ["train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    assert head.split() == ["run", "epoch", "optimizer.arguments.momentum", *scores]
    assert [row.split() for row in rows] == [
        ["a", "2", "0.5", "90.00", "%", "0.5", "75.00", "%"],
        ["b", "1", "0.9", "0.5", "90.00", "%", "1", "90.00", "%"],
    ]
    _, _, first, *_ = shown(capsys, "compare", "a", "b", "--sort", "test_accuracy")
    assert first.startswith("b ")


def test_groups_of_seeds_and_the_paired_test(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (0.90, 0.92, 0.91, 0.89), (0.95, 0.96, 0.97, 0.95)
    seeds("slow", first)
    seeds("fast", second, "--optimizer.name", "adam")
    (made("runs/x", "--train.seed", "9", accuracies=(0.0,)) / ".unfinished").touch()
    lines = shown(capsys, "compare", "runs")
    groups = [line.split() for line in lines if line.startswith(("adam  ", "sgd  "))]
    assert [[row[0], row[1], *row[-5:]] for row in groups] == [
        ["adam", "4", "95.75", "%", "±", "0.96", "%"],
        ["sgd", "4", "90.50", "%", "±", "1.29", "%"],
    ]
    p = stats.ttest_rel(second, first).pvalue
    error = np.std(np.subtract(second, first), ddof=1) / 2
    expected = f"test accuracy differs by 5.25 % ± {100 * error:.2f} % (s.e.) over 4 seeds in common, p = {p:.2g}"
    assert lines[-1] == f"{expected}, paired t-test: adam is better"


def test_folds_are_grouped_as_seeds_are(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sgd", "adam"):
        for fold, accuracy in (("1/2", 0.8), ("2/2", 0.9)):
            options = ("--data.validation", fold, "--optimizer.name", name)
            made(f"runs/{name}-{fold[0]}", *options, accuracies=(accuracy,))
    lines = shown(capsys, "compare", "runs")
    groups = [line.split() for line in lines if line.startswith(("adam  ", "sgd  "))]
    assert [[row[0], row[1], *row[-5:]] for row in groups] == [
        [n, "2", "85.00", "%", "±", "7.07", "%"] for n in ("adam", "sgd")
    ]
    assert "in each of 2 pairs of runs that agree in all else" in lines[-1]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ((0.5, 0.7, 0.6), (0.6, 0.6, 0.61), "chance may explain it"),
        (
            (0.5, 0.6),
            (0.625, 0.725),
            "12.50 % in each of 2 seeds in common: without a spread there is no test",
        ),
        ((0.5, 0.6), (0.5, 0.6), "0.00 % in each of 2 seeds in common: without a spread there is no test"),
    ],
)
def test_what_is_said_of_a_difference(first: tuple[float, ...], second: tuple[float, ...], said: str) -> None:
    groups = {
        name: [{"train.seed": seed, "test_accuracy": value} for seed, value in enumerate(values)]
        for name, values in (("a", first), ("b", second))
    }
    assert compare.paired(groups, ["train.seed"]).endswith(said)


def test_a_smaller_error_is_better_and_only_pairs_count() -> None:
    groups: dict[str, list[compare.Row]] = {
        "a": [{"train.seed": seed, "test_rmse": value} for seed, value in ((0, 1.0), (1, 1.1), (2, 1.05), (7, 0.0))],
        "b": [{"train.seed": seed, "test_rmse": value} for seed, value in ((0, 2.0), (1, 2.1), (2, 2.15), (8, 9.0))],
    }
    line = compare.paired(groups, ["train.seed"])
    assert line.startswith("test rmse differs by 1.033 ± 0.03333 (s.e.) over 3 seeds in common")
    assert line.endswith("a is better")
    assert compare.paired({"a": groups["a"][3:], "b": groups["b"]}, ["train.seed"]) == (
        "0 seeds in common: a paired test takes two"
    )


def test_groups_by_a_key_pair_what_agrees_in_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    for rate in ("0.1", "0.2", "0.3"):
        for name, accuracy in (("sgd", 0.8), ("adam", 0.82 + float(rate) / 100)):
            made(
                f"runs/{name}-{rate}",
                "--optimizer.learning-rate",
                rate,
                "--optimizer.name",
                name,
                accuracies=(accuracy,),
            )
    lines = shown(capsys, "compare", "runs", "--by", "optimizer.name")
    assert "over 3 pairs of runs that agree in all else" in lines[-1] and lines[-1].endswith("adam is better")
    assert "--by: unknown key 'optimizer.nam', did you mean 'optimizer.name'?" in fault(
        capsys, "compare", "runs", "--by", "optimizer.nam"
    )


def test_the_table_as_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    made("runs/a", "--model.sizes", "64,64,10"), made("runs/b", "--model.sizes", "64,10")
    for name in ("t.csv", "t.json", "t.md", "t.png"):
        shown(capsys, "compare", "runs", "--out", name)
    rows: list[dict[str, Any]] = json.loads(Path("t.json").read_text())
    assert [(row["run"], row["model.sizes"], row["test_accuracy"]) for row in rows] == [
        ("runs/a", [64, 64, 10], 0.75),
        ("runs/b", [64, 10], 0.75),
    ]
    assert list(rows[0])[:3] == ["run", "state", "epoch"]
    with open("t.csv", newline="") as file:
        assert [row["model.sizes"] for row in csv.DictReader(file)] == ["64-64-10", "64-10"]
    assert "| runs/b | finished | 2 | 64-10 |" in Path("t.md").read_text()
    pixels = image.imread("t.png")
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.02
    before = Path("t.png").read_bytes()
    shown(capsys, "compare", "runs", "--out", "t.png", "--overwrite")
    assert Path("t.png").read_bytes() == before


def test_what_cannot_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    made("a", accuracies=()), made("b", accuracies=())
    assert fault(capsys, "compare", "a").startswith("compare: a is one run, it takes two")
    assert fault(capsys, "compare", "a", "no") == "no: no such folder"
    assert "should end in .csv or .json" in fault(capsys, "compare", "a", "b", "--out", "x.txt")
    Path("x.csv").write_text("mine")
    assert "--out: 'x.csv' exists" in fault(capsys, "compare", "a", "b", "--out", "x.csv")
    assert Path("x.csv").read_text() == "mine"
    assert main(["compare", "a", "b", "--out", "x.png"]) == 2
    assert capsys.readouterr().err == "jaxbp: --out: none of these runs has an epoch to draw\n"
    assert not Path("x.png").exists()
