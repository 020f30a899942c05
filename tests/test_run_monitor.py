"""Validation, the best epoch, early stopping, weights: in a run, on a mesh, in a sweep."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxbp.cli import main
from jaxbp.run import monitor, problem
from jaxbp.run.compute.program import OneDevice
from jaxbp.run.config import TrainConfig, read
from jaxbp.run.report import metrics, pictures
from jaxbp.run.report.metrics import EpochRow, FinalRow, Scores
from jaxbp.run.store.model import load
from jaxbp.run.study import measure, trace

IRIS = """
[data]
name = "iris"
validation = 0.2
[model]
sizes = [4, 8, 3]
[optimizer]
learning_rate = 0.1
[train]
epochs = 40
batch_size = 50
patience = 2
min_delta = 0.03
plots = false
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with x.toml."""
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(IRIS)
    yield tmp_path


def run(*arguments: str, to: str = "run") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run that has to end well."""
    assert main(["run", "x.toml", "--train.folder", to, *arguments]) == 0
    return [json.loads(line) for line in Path(to, "metrics.jsonl").read_text().splitlines()]


def row(epoch: int, loss: float, accuracy: float = 0.5) -> EpochRow:
    train, validation = Scores(9.0, accuracy=0.0), Scores(loss, accuracy=accuracy)
    return EpochRow(epoch, 3 * epoch, train, None, 0.1, [], [], validation=validation)


# --- which epoch, and when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "min_delta", "best", "over_at"),
    [
        ([3, 2, 1], 0.0, 3, None),
        ([3, 2, 2, 2, 1], 0.0, 2, 4),  # as good is not better
        ([3, 2, 1.9, 1.8, 1.4], 0.5, 2, 4),  # better than the best by more than min_delta, not than the one before
        ([3, 2, 1.5, 1.6, 1], 0.5, 2, 4),  # by min_delta is not by more
        ([math.nan, 2, math.nan, 3], 0.0, 2, 4),
        ([math.nan, math.nan, 1], 0.0, None, 2),
        ([math.inf, 5], 0.0, 2, None),
    ],
)
def test_a_run_stops_when_patience_is_over(
    losses: list[float], min_delta: float, best: int | None, over_at: int | None
) -> None:
    config = TrainConfig(patience=2, min_delta=min_delta)
    found: monitor.Best | None = None
    stopped = None
    for epoch, loss in enumerate(losses, 1):
        found = monitor.kept(config, row(epoch, float(loss)), (np.full(1, epoch),), found)
        if monitor.over(config, found, epoch):
            stopped = epoch
            break
    assert (found and found.row.epoch, stopped) == (best, over_at)
    assert found is None or found.params[0] == best
    rows = [row(epoch, float(loss)) for epoch, loss in enumerate(losses[:stopped], 1)]
    assert monitor.best_of(config, rows) == (found and found.row)


def test_the_name_of_a_score_says_whether_more_is_better() -> None:
    rows = [row(1, 3.0, 0.5), row(2, 2.0, 0.9), row(3, 1.0, 0.7)]
    for name, best in (("validation_accuracy", 2), ("validation_loss", 3), ("train_loss", 1)):
        assert monitor.best_of(TrainConfig(monitor=name), rows).epoch == best
    assert monitor.best_of(TrainConfig(), rows) is None
    assert not monitor.over(TrainConfig(monitor="validation_loss"), None, 1000)  # no patience is all of it


def test_rows_come_back_from_their_lines() -> None:
    final = FinalRow(3, 9, 5, True, Scores(0.5, accuracy=0.9), "validation_loss")
    last = FinalRow(5, 15, 5, False, Scores(0.5, rmse=1.0, r2=0.1))
    for found in (row(2, 1.0), final, last):
        assert metrics.read(json.loads(json.dumps(found.line()))) == found


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_stops_early_tests_its_best_epoch_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate, evaluated = OneDevice.evaluate, list[str]()
    drawn = list[Any]()

    def counted(self: OneDevice, params: Any, split: str) -> Any:
        evaluated.append(split)
        return evaluate(self, params, split)

    monkeypatch.setattr(OneDevice, "evaluate", counted)
    monkeypatch.setattr(pictures, "draw", lambda *arguments: drawn.append(arguments[-3:]))
    *rows, final = run("--train.plots", "yes")
    epoch, epochs = final["epoch"], len(rows)
    assert evaluated == ["train", "validation"] * epochs + ["test"]
    assert final["stopped_early"] and (final["epochs"], epoch) == (epochs, epochs - 2) and epochs < 40
    assert all(set(row) >= {"train_loss", "validation_loss"} and "test_loss" not in row for row in rows)
    said = (
        f"stopped early after epoch {epochs}; the test set was scored with the parameters of epoch {epoch}, the best by"
    )
    assert f"{said} validation_loss\n" in capsys.readouterr().out
    [(test, folder, ended)] = drawn
    assert len(test.loss) == 30 and folder == Path("run") and ended.startswith(said)
    run("--train.epochs", str(epoch), "--train.patience", "None", "--train.min-delta", "0", to="shorter")
    saved, wanted = map(safetensors.numpy.load_file, ("run/best.safetensors", "shorter/params.safetensors"))
    assert all((saved[key] == wanted[key]).all() for key in wanted)
    posed, model = problem.pose(read(Path("run/config.toml"))), load("run")
    x, y = posed.raw("test")
    assert np.mean(model.predict(x).argmax(axis=1) == y) == final["test_accuracy"]
    assert model.best == epoch and f"parameters of epoch {epoch}, the best" in repr(model)


@pytest.mark.slow
def test_predict_study_and_trace_take_the_best_parameters_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    *_, final = run("--train.epochs", "6")
    Path("first.toml").write_text(IRIS.replace("validation = 0.2", ""))
    np.savez("new.npz", x=np.ones((2, 4)))
    assert main(["predict", "run", "--data", "new.npz"]) == 0
    assert f"jaxbp: run: with the parameters of epoch {final['epoch']}, the best\n" in capsys.readouterr().err
    subject = measure.prepare(Path("run"), "validation")
    assert subject.state == f"as trained, epoch {final['epoch']}, the best" and len(subject.x) == 24
    found = trace.measure(subject.net, subject.model.params, *(part[3] for part in subject.data))
    title = trace._title(subject, 3, found)
    assert title.startswith(f"run, epoch {final['epoch']}, the best · iris") and "validation sample 3" in title
    assert main(["study", "first.toml", "--split", "validation"]) == 2
    assert "--split: first.toml has no validation set" in capsys.readouterr().err


def test_validation_alone_keeps_the_last_epoch() -> None:
    *rows, final = run("--train.patience", "None", "--train.min-delta", "0", "--train.epochs", "2")
    assert (final["epoch"], final["epochs"], final["stopped_early"]) == (2, 2, False) and "best_by" not in final
    assert len(rows) == 2 and not Path("run/best.safetensors").exists() and load("run").best is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            ["--data.validation", "None"],
            "train.patience: there is no validation set; data.validation = 0.1 takes one",
        ),
        (["--train.patience", "None"], "train.min_delta: 0.03, but no score is monitored: set train.patience"),
        (
            ["--train.monitor", "val_loss"],
            "train.monitor: unknown score 'val_loss'.* Allowed: train_loss, train_accuracy",
        ),
        (["--train.monitor", "validation_acuracy"], "did you mean 'validation_accuracy'"),
        (["--train.monitor", "test_loss"], "train.monitor: unknown score 'test_loss'"),
        (
            ["--data.validation", "0.01"],
            "data.validation: 0.01 leaves 118 of 120 samples to train with and 2 to validate",
        ),
        (["--model.parameters", "a\nb"], r"model.parameters: 'a\\nb' is no folder"),
        (["--model.parameters", "x" * 10_000], "model.parameters: 'xxx.* is no folder"),
        (["--model.parameters", "."], "model.parameters: .: not a run folder"),
        (["--model.parameters", "nowhere"], "model.parameters: 'nowhere' is no folder of a run"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "x.toml", *arguments]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"jaxbp: [^\n]+\n", said) and re.search(match, said), said
    assert not Path("runs").exists()


# --- a mesh and a sweep -----------------------------------------------------------------------------------------------


@pytest.mark.devices
@pytest.mark.slow
def test_a_mesh_stops_at_the_same_epoch() -> None:
    """With class weights, on two devices whose batches are filled up: 96 samples in batches of 20."""
    weighted = ("--train.class-weights", "balanced", "--train.monitor", "validation_balanced_accuracy")
    weighted += ("--train.batch-size", "20", "--train.patience", "4")
    one, mesh = run(*weighted, to="one"), run(*weighted, "--mesh.data", "2", to="mesh")
    assert [row["epoch"] for row in mesh] == [row["epoch"] for row in one] and one[-1]["stopped_early"]
    for name in ("test_loss", "test_balanced_accuracy"):
        assert mesh[-1][name] == pytest.approx(one[-1][name], rel=1e-4)
    assert load("mesh").best == one[-1]["epoch"] and one[-1]["best_by"] == "validation_balanced_accuracy"


@pytest.mark.production
def test_a_member_of_a_sweep_is_the_separate_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Two learning rates that stop at different epochs: lines, last and best parameters, bit for bit."""
    weighted = ("--train.class-weights", "1,2,3")
    lines, counts = run(*weighted, "--sweep.learning-rate", "0.1,0.3"), set()
    shown = capsys.readouterr().out
    assert "validation accuracy over the seeds" in shown and "test accuracy" in shown
    assert "best mean validation accuracy" in shown
    for rate in (0.1, 0.3):
        member, alone = Path(f"run/members/seed-0_learning-rate-{rate}"), f"alone-{rate}"
        tag = {"seed": 0, "learning_rate": rate}
        rows = run(*weighted, "--optimizer.learning-rate", str(rate), to=alone)
        assert [line for line in lines if line | tag == line] == [row | tag for row in rows]
        for name in ("params.safetensors", "best.safetensors"):
            assert (member / name).read_bytes() == Path(alone, name).read_bytes()
        counts.add(rows[-1]["epochs"])
    assert len(counts) == 2
    table = Path("run/scores.csv").read_text()
    assert "validation_loss" in table and "test_accuracy" in table


# --- parameters of another run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    run("--train.epochs", "4", to="first")
    begin = load("first")
    run("--train.epochs", "1", "--optimizer.learning-rate", "0", "--model.parameters", "first", to="second")
    for ours, theirs in zip(jax.tree.leaves(load("second").params), jax.tree.leaves(begin.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert "parameters of first" in capsys.readouterr().out
    for sizes, layer in (("4,9,3", r"layer.1.w is \(8, 4\) float32, and \(9, 4\) float32 in"), ("4,3", "layer.1.w is")):
        assert main(["run", "x.toml", "--model.parameters", "first", "--model.sizes", sizes]) == 2
        assert re.search(f"model.parameters: first: {layer}", capsys.readouterr().err)


# --- weights ----------------------------------------------------------------------------------------------------------


def unbalanced() -> np.ndarray:
    """Writes d.npz with 30 samples of class 0, 12 of class 1 and 6 of class 2, and a weight each."""
    rng, y = np.random.default_rng(0), np.repeat([0, 1, 2], [30, 12, 6])
    weights = rng.uniform(0.5, 2, 48)
    np.savez("d.npz", x=rng.normal(size=(48, 4)) + y[:, None], y=y, weights=weights)
    return weights


def test_balanced_class_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_sample_weight

    own = unbalanced()
    for config, names in (
        (TrainConfig(class_weights="balanced"), "balanced"),
        (TrainConfig(class_weights=(1.0, 2.0, 5.0)), {0: 1, 1: 2, 2: 5}),
    ):
        posed = problem.pose(replace(read(Path("x.toml"), ["--data.name", "d.npz"]), train=config))
        y = posed.raw("train")[1]
        order = np.array([np.flatnonzero((np.load("d.npz")["x"] == x).all(axis=1))[0] for x in posed.raw("train")[0]])
        np.testing.assert_allclose(posed.weights, own[order] * compute_sample_weight(names, y), rtol=1e-6)
    assert problem.pose(read(Path("x.toml"))).weights is None


WEIGHTS, BALANCED = "--train.class-weights", ("--train.class-weights", "balanced")
DIABETES = ("--data.name", "diabetes", "--model.sizes", "10,1", "--model.loss", "squared_error")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([WEIGHTS, "1,2"], "train.class_weights: 2 numbers, iris has 3 classes"),
        ([WEIGHTS, "1,2,0"], "train.class_weights: got 0"),
        ([WEIGHTS, "balancd"], "train.class_weights: got 'balancd'"),
        ([*BALANCED, "--study.quantities", "grand"], "train.class_weights: .study. is for samples that count alike"),
        ([*BALANCED, "--privacy.max-norm", "1", "--privacy.epsilon", "1"], "train.class_weights: .privacy. is for"),
        ([*BALANCED, *DIABETES], "train.class_weights: a sample of diabetes has no class"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    test_what_does_not_fit_is_one_line(arguments, match, capsys)
