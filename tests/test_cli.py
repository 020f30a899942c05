"""The command `jaxbp`: in this process where that is enough, in one of its own for terminals, signals and output."""

import io
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import argcomplete
import jax
import numpy as np
import pytest
import safetensors.numpy
from matplotlib import image
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import jaxbp
import jaxbp.run
from jaxbp import cli
from jaxbp.cli import main
from jaxbp.run import loop
from jaxbp.run.compute.epoch import epoch
from jaxbp.run.compute.program import first_state
from jaxbp.run.config import DataConfig, keys, read
from jaxbp.run.data import idx
from jaxbp.run.data import load as load_data
from jaxbp.run.errors import Diverged, UserError
from jaxbp.run.report import metrics
from jaxbp.run.report.metrics import StepRecord
from jaxbp.run.store import runs
from jaxbp.run.store.folder import append
from jaxbp.run.store.model import load

ROOT = Path(__file__).parent.parent
IRIS = """
[data]
name = "iris"
[model]
sizes = [4, 8, 3]
[optimizer]
learning_rate = 0.1
[train]
epochs = 2
batch_size = 50
plots = false
"""
DIABETES = """
[data]
name = "diabetes"
standardize_targets = true
[model]
sizes = [10, 4, 1]
hidden = "tanh"
loss = "squared_error"
[optimizer]
learning_rate = 0.05
[train]
epochs = 2
"""
KEYS = ("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate")
KEYS = (*KEYS, "delta_rms", "gradient_rms")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with x.toml, and no data on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXBP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("JAXBP_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Path("x.toml").write_text(IRIS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax has it
        yield tmp_path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str, status: int = 2, match: str = "") -> str:
        """What the command says on failure: one line, to which the pattern fits."""
        capsys.readouterr()
        assert main(arguments) == status
        return one_line(capsys.readouterr().err, match)

    return run


def one_line(err: str, match: str) -> str:
    assert re.fullmatch(r"jaxbp: [^\n]+\n", err), err
    assert re.search(match, err), err
    return err


def works(*arguments: str) -> None:
    assert main(arguments) == 0


def strict_rows(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as JSON proper, which has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (Path(path) / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def trained(path: str | Path) -> bytes:
    return (Path(path) / "params.safetensors").read_bytes()


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_and_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "iris: 120 training and 30 test samples · 4-8-3 relu, softmax_cross_entropy, 67 parameters" in shown.out
    assert re.search(r"run folder runs.x\nepoch 1/2  train loss [\d.]+  train accuracy [\d.]+ %  test loss ", shown.out)
    assert "\x1b" not in shown.out
    assert {path.name for path in Path("runs/x").iterdir()} == {
        *("config.toml", "metrics.jsonl", "params.safetensors", "provenance.json", "timings.jsonl")
    }
    assert read(Path("runs/x/config.toml")) == read(Path("x.toml"))
    rows = strict_rows("runs/x")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    assert all(tuple(row) == KEYS for row in rows)
    assert all(len(row["delta_rms"]) == len(row["gradient_rms"]) == 2 and row["learning_rate"] == 0.1 for row in rows)
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    provenance = json.loads(Path("runs/x/provenance.json").read_text())
    assert provenance["seed"] == {"data": 0, "train": 0}
    assert provenance["versions"]["jax"] == jax.__version__
    assert provenance["config"] == tomllib.loads(Path("runs/x/config.toml").read_text())
    assert {"started", "command", "platform", "devices", "git_commit"} <= set(provenance)
    # What the metrics say is what the saved network does.
    model, data = load("runs/x"), load_data(DataConfig("iris"))
    assert model.classes == ("setosa", "versicolor", "virginica")
    assert np.mean(model.predict(data.x_test).argmax(axis=1) == data.y_test) == rows[1]["test_accuracy"]


@pytest.mark.production
def test_the_same_config_and_seed_give_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml")
    before = {path.name: path.read_bytes() for path in Path("runs/x").iterdir()}
    works("run", "x.toml")
    assert "run folder runs/x-2" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("runs/x").iterdir()} == before
    works("run", "runs/x/config.toml", "--train.folder", "resolved")
    assert trained("runs/x") == trained("runs/x-2") == trained("resolved")
    assert before["metrics.jsonl"] == Path("resolved/metrics.jsonl").read_bytes()
    timings = [json.loads(line) for line in Path("resolved/timings.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in timings] == [1, 2]
    assert all(row["samples_per_second"] * row["seconds"] == pytest.approx(120) for row in timings)
    works("run", "x.toml", "--train.seed", "1")
    assert trained("runs/x-3") != trained("runs/x")


def test_every_epoch_has_an_order_of_its_own() -> None:
    """Epoch e draws from fold_in(fold_in(key(seed), 0), e), so that a run could go on from any epoch."""
    setup = loop.prepare(read(Path("x.toml"), ["--train.seed", "7"]))
    list(loop.epochs(setup))
    model = setup.problem.model(setup.program.fetch(setup.program.whole))
    key, state = jax.random.fold_in(jax.random.key(7), 0), first_state(setup.problem, setup.spec)
    one_epoch = jax.jit(epoch, static_argnums=0)
    for number in (1, 2):
        order = jax.random.fold_in(key, number)
        state, _ = one_epoch(setup.spec, state, *setup.problem.on_device("train"), order)
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_regression_and_its_scores_against_scikit_learn(capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.metrics import r2_score, root_mean_squared_error

    Path("d.toml").write_text(DIABETES)
    works("run", "d.toml", "--train.folder", "scaled")
    assert {path.name for path in Path("scaled").glob("*.png")} == {
        "layers.png",
        "learning_curves.png",
        "residuals.png",
    }
    works("run", "d.toml", "--train.no-plots", "--train.folder", "raw", "--data.no-standardize-targets",
          "--optimizer.learning-rate", "1e-4")  # fmt: skip
    data = load_data(DataConfig("diabetes"))
    for name in ("scaled", "raw"):
        row, model = strict_rows(name)[-1], load(name)
        for split, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
            output = model.predict(x)
            assert row[f"{split}_rmse"] == pytest.approx(root_mean_squared_error(y, output), rel=1e-5)
            assert row[f"{split}_r2"] == pytest.approx(r2_score(y, output), rel=1e-4)
    assert strict_rows("scaled")[-1]["test_rmse"] < 100  # the targets are between 25 and 346
    np.savez("new.npz", x=data.x_test[:3])
    capsys.readouterr()
    works("predict", "scaled", "--data", "new.npz")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "index,y0"
    guesses = [float(line.split(",")[1]) for line in lines]
    np.testing.assert_array_equal(guesses, load("scaled").predict(data.x_test[:3])[:, 0])


@pytest.mark.slow
def test_losses_of_labels_and_of_numbers() -> None:
    """A loss of numbers takes labels one-hot; label smoothing is part of the training, not of the score."""
    data = load_data(DataConfig("iris"))
    one_hot = np.eye(3)[data.y_test]
    works("run", "x.toml", "--model.loss", "squared_error", "--train.folder", "squares")
    output = load("squares").predict(data.x_test)
    expected = np.mean(np.sum((output - one_hot) ** 2, axis=1) / 2)
    assert strict_rows("squares")[-1]["test_loss"] == pytest.approx(expected, rel=1e-5)
    works("run", "x.toml", "--model.label-smoothing", "0.3", "--train.folder", "smooth")
    works("run", "x.toml", "--train.folder", "sharp")
    assert trained("smooth") != trained("sharp")
    output = load("smooth").predict(data.x_test)
    expected = np.mean(np.log(np.sum(np.exp(output), axis=1)) - np.sum(output * one_hot, axis=1))
    assert strict_rows("smooth")[-1]["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_and_an_optax_optimizer_with_a_schedule() -> None:
    works("run", "x.toml", "--model.dtype", "bfloat16", "--optimizer.name", "adam", "--train.folder", "adam")
    assert {str(layer.w.dtype) for layer in load("adam").params} == {"bfloat16"}
    assert len(strict_rows("adam")) == 2
    works("run", "x.toml", "--optimizer.learning-rate", "None", "--optimizer.schedule", "linear_schedule",
          "--optimizer.schedule-arguments", "init_value", "0.6", "end_value", "0", "transition_steps", "6",
          "--train.folder", "schedule")  # fmt: skip
    rates = [row["learning_rate"] for row in strict_rows("schedule")]  # of the last step of an epoch: 2 and 5
    assert rates == pytest.approx([0.4, 0.1])


def test_plots_and_tensorboard() -> None:
    Path("digits.toml").write_text("[optimizer]\nlearning_rate = 0.1\n[train]\nepochs = 2\nloggers = ['tensorboard']\n")
    works("run", "digits.toml", "--study.quantities", "noise_scale", "squared_norms", "--study.every", "10")
    pictures = {path.name: image.imread(path) for path in Path("runs/digits").glob("*.png")}
    drawn = ("confusion.png", "first_layer.png", "layers.png", "learning_curves.png", "worst.png")
    assert set(pictures) == {*drawn, "noise_scale.png", "recorded.png"}
    for pixels in pictures.values():
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.02
    found = {name: tensorboard(Path("runs/digits/events") / name) for name in ("epochs", "steps")}
    rows = strict_rows("runs/digits")
    epochs, records = ([row for row in rows if name in row] for name in ("train_loss", "batch_loss"))
    for name in ("test_accuracy", "learning_rate"):
        assert found["epochs"][name] == [(r["epoch"], np.float32(r[name])) for r in epochs]
    assert found["epochs"]["delta_rms/layer_2"][1] == (2, np.float32(epochs[1]["delta_rms"][1]))
    steps = found["steps"]["noise_scale/scale"]
    assert steps == [(r["step"], np.float32(r["noise_scale"]["scale"])) for r in records]
    assert [step for step, _ in steps] == [1, 11, 21]
    assert len(found["steps"]["squared_norms/mean_by_layer/layer_2"]) == 3
    assert "epochs = 2" in found["epochs"]["config/text_summary"][0][1]


def test_the_one_score_of_the_test_set_is_in_tensorboard_too() -> None:
    monitored = ("--data.validation", "0.2", "--train.monitor", "validation_loss")
    works("run", "x.toml", *monitored, "--train.loggers", "tensorboard")
    row, found = strict_rows("runs/x")[-1], tensorboard(Path("runs/x/events/epochs"))
    assert found["test_accuracy"] == [(row["epoch"], np.float32(row["test_accuracy"]))]
    assert [epoch for epoch, _ in found["validation_loss"]] == [1, 2] and "best_by" not in found


def tensorboard(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """What an event file says: for each tag its steps and values."""
    [path] = folder.iterdir()
    data, at, found = path.read_bytes(), 0, dict[str, list[tuple[int, Any]]]()
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            text = b"".join(value.tensor.string_val).decode()
            found.setdefault(value.tag, []).append((event.step, text or np.float32(value.simple_value)))
        at += 16 + length
    return found


def test_a_quiet_run_prints_nothing_but_what_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml", "--quiet")
    assert capsys.readouterr() == ("", "")
    assert main(["run", "x.toml", "--quiet", "--train.epochs", "0"]) == 2
    assert "train.epochs: got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--data.validation", "0.2", "--study.quantities", "squared_norms"), 0),
        pytest.param(("--sweep.seeds", "2"), 0, marks=pytest.mark.slow),
        (("--optimizer.learning-rate", "1e30"), 3),
    ],
)
def test_the_log_as_json_has_each_line_of_the_files(
    arguments: tuple[str, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "x.toml", "--log", "json", *arguments]) == status
    first, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"run_folder": "runs/x", "resumed": False}
    assert [line for line in lines if "seconds" not in line] == strict_rows("runs/x")
    assert [line for line in lines if "seconds" in line] == runs.rows(Path("runs/x/timings.jsonl"))


def test_the_log_as_json_of_a_run_that_goes_on(capsys: pytest.CaptureFixture[str], fails: Callable[..., str]) -> None:
    works("run", "x.toml", "--checkpoint.every", "1", "--quiet")
    works("run", "x.toml", "--checkpoint.every", "1", "--train.epochs", "3", "--resume", "--log", "json")
    first, row, timing = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"run_folder": "runs/x", "resumed": True} and row == strict_rows("runs/x")[-1]
    assert timing["epoch"] == 3
    fails("run", "x.toml", "--quiet", "--log", "json", match="argument --log: not allowed with argument --quiet")


def test_a_name_with_brackets_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml", "--train.folder", "a[/b] [red]:smile:")
    assert "run folder a[/b] [red]:smile:\n" in capsys.readouterr().out


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "arguments are required: COMMAND"),
        (["rnu"], "invalid choice: 'rnu' .*run.*predict.*data"),
        (["run"], "which config\\? For example: jaxbp run configs/digits.toml"),
        (["run", "X.toml"], "X.toml: no such file, did you mean 'x.toml'\\?"),
        (["run", "--train.epochs", "3", "x.toml"], "3 is no config; it comes first: jaxbp run CONFIG --train.epochs …"),
        (["run", "x.toml", "--train.epohcs", "3"], "unknown key 'train.epohcs', did you mean 'train.epochs'\\?"),
        (
            ["run", "x.toml", "--data.name", "irs"],
            "x.toml and command line: data.name: 'irs' .* did you mean 'iris'\\?",
        ),
        (["run", "x.toml", "--model.sizes", "5", "3"], "model.sizes: begins with 5, iris has 4 inputs"),
        (["run", "x.toml", "--model.sizes", "4", "2"], "model.sizes: ends with 2, iris has 3 classes"),
        (["run", "x.toml", "--model.scheme", "hee"], "model.scheme: unknown scheme 'hee', did you mean 'he'\\?"),
        (["run", "x.toml", "--model.scheme-std", "1"], 'model.scheme_std: only scheme "normal" has it, scheme is "he"'),
        (["run", "x.toml", "--model.hidden", "rellu"], "model.hidden: unknown activation 'rellu', did you mean 'relu'"),
        (
            ["run", "x.toml", "--optimizer.name", "adamm"],
            "optimizer.name: unknown optimizer 'adamm', did you mean 'adam'",
        ),
        (["run", "x.toml", "--data.standardize-targets"], "data.standardize_targets: true, but iris has classes"),
        (["predict"], "arguments are required: RUN_DIR"),
        (["predict", "here", "--data", "x.npz"], "here: not a run folder"),
        (["predict", "here", "--data", "x.npz", "--batch", "3"], "unknown argument '--batch'"),
        (["data"], "arguments are required: COMMAND"),
        (["data", "import", "mnits", "here"], "'mnits' .* did you mean 'mnist'"),
        (["data", "import", "mnist", "here"], "here: no such file or folder"),
    ],
)
def test_wrong_input_is_one_line(fails: Callable[..., str], arguments: list[str], match: str) -> None:
    fails(*arguments, match=match)
    assert not Path("runs").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ("hinge", "model.loss: hinge takes labels, the targets of diabetes are numbers"),
        ("softmax_cross_entropy", "row 0 of the training targets of diabetes is 85"),
        (
            "kl_divergence",
            "model.loss: kl_divergence takes probabilities, row 0 of the training targets of diabetes is 85",
        ),
    ],
)
def test_losses_that_do_not_fit_a_regression(fails: Callable[..., str], loss: str, match: str) -> None:
    Path("d.toml").write_text(DIABETES)
    fails("run", "d.toml", "--model.loss", loss, match=match)
    fails("run", "d.toml", "--model.sizes", "10", "2", match="model.sizes: ends with 2, diabetes has 1 targets")


@pytest.mark.slow
def test_probabilities_are_targets_of_a_softmax() -> None:
    y = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    np.savez("p.npz", x=np.random.default_rng(1).normal(size=(40, 4)), y=y)
    works("run", "x.toml", "--data.name", "p.npz", "--train.folder", "p")
    assert np.isfinite(strict_rows("p")[-1]["test_loss"])


def test_folders_that_cannot_be_used(fails: Callable[..., str]) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    fails("run", "x.toml", "--train.folder", "full", match="train.folder: full is not empty; name a new folder")
    assert [path.name for path in Path("full").iterdir()] == ["mine.txt"]
    for name in ("x.toml", "x.toml/runs", "y" * 300):
        fails("run", "x.toml", "--train.folder", name, match="train.folder: '.*' can't be written: ")
    fails("run", "x.toml", "--train.folder", "a\0b", match="train.folder: got '.*', a path without a null byte")
    Path("runs").write_text("a file in the way")
    fails("run", "x.toml", match="train.folder: '?runs/x'? can't be written")
    Path("empty").mkdir()
    works("run", "x.toml", "--train.folder", "empty/../empty")
    assert trained("empty")


def test_a_run_that_diverges_at_once(fails: Callable[..., str]) -> None:
    Path("d.toml").write_text(DIABETES)
    fails("run", "d.toml", "--optimizer.learning-rate", "1e30", status=3,
          match=r"diverged: the (loss is (nan|inf)|gradient overflows) at epoch 1, step [23] of 3")  # fmt: skip
    params = safetensors.numpy.load(trained("runs/d"))
    assert all(np.isfinite(array).all() for array in params.values())
    [row] = strict_rows("runs/d")
    assert (row["epoch"], list(row)) == (1, ["epoch", "step", "diverged"])


def test_a_run_that_diverges_later_keeps_what_it_had(fails: Callable[..., str]) -> None:
    """One step an epoch, the rate is sane in the first two and absurd from then on."""
    steps = (
        "--train.batch-size",
        "1000",
        "--optimizer.learning-rate",
        "None",
        "--optimizer.schedule",
        "piecewise_constant_schedule",
        "--optimizer.schedule-arguments={init_value = 0.01, boundaries_and_scales = {3 = 1e27}}",
        "--model.loss",
        "squared_error",
    )
    fails(
        "run",
        "x.toml",
        *steps,
        "--train.epochs",
        "9",
        status=3,
        match=r"diverged: .* (at epoch [456], step 1|after epoch [45])",
    )
    *rows, last = strict_rows("runs/x")
    assert last["diverged"] and last["epoch"] == len(rows) + 1
    assert len(rows) in (3, 4, 5) and [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0]["test_loss"] < 10
    params = safetensors.numpy.load(trained("runs/x"))
    assert all(np.isfinite(array).all() for array in params.values())
    works("run", "x.toml", *steps, "--train.epochs", str(len(rows)), "--train.folder", "short")
    assert trained("short") == trained("runs/x")  # those after the last whole epoch


def test_numbers_that_json_lacks_become_null(folder: Path) -> None:
    found = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": -float("inf")}, "e": 1}
    append(folder / "metrics.jsonl", [StepRecord(1, 2, float("inf"), found)])
    (line,) = strict_rows(folder)
    written = {"a": None, "b": [1.0, None], "c": {"d": None}, "e": 1}
    assert line == {"epoch": 1, "step": 2, "batch_loss": None} | written
    again = metrics.read(line)
    assert isinstance(again, StepRecord) and np.isnan([again.batch_loss, again.quantities["a"]]).all()


def test_every_ending_has_its_status(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(error: BaseException) -> None:
        def run(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(loop, "run", run)

    ends(UserError("no"))
    assert fails("run", "x.toml") == "jaxbp: x.toml: no\n"
    ends(Diverged("the loss is nan"))
    assert fails("run", "x.toml", status=3) == "jaxbp: diverged: the loss is nan; a smaller learning rate may help\n"
    ends(KeyboardInterrupt())
    fails("run", "x.toml", status=130, match="interrupted; nothing was written")
    ends(RuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nDetails"))
    fails("run", "x.toml", match="out of memory: RESOURCE_EXHAUSTED: Out of memory")
    ends(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):  # a bug of ours keeps its traceback
        main(["run", "x.toml"])
    ends(ModuleNotFoundError("No module named 'safetensors'", name="safetensors"))
    fails("run", "x.toml", match=r"the package safetensors is missing: pip install '\.\[run\]' in the clone of jaxbp")
    ends(OSError(28, "No space left on device", "some/file"))
    fails("run", "x.toml", match="some/file: No space left on device")


def test_ctrl_c_says_where_the_measurements_are(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.console.Console.out", interrupt)  # the first line comes when there is a folder
    fails("run", "x.toml", status=130, match="interrupted; what was measured is in runs/x")
    fails(
        "run",
        "x.toml",
        "--sweep.seeds",
        "2",
        "--new",
        status=130,
        match="interrupted; what was measured is in runs/x-2",
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), "JAX finds no such device"),
        (RuntimeError("Unable to initialize backend 'foo': no. (set JAX_PLATFORMS='' to …)"), "Unable .* 'foo': no."),
    ],
)
def test_a_missing_device(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def devices() -> None:
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "foo")
    monkeypatch.setattr(jax, "devices", devices)
    check = ("check", "jaxbp.activations:ACTIVATIONS", "--inputs", "f32[2]")
    for command in (("run", "x.toml"), ("predict", "r", "--data", "x.npz"), ("study", "x.toml"), check):
        fails(*command, match=f"^jaxbp: JAX_PLATFORMS=foo: {said}; JAX_PLATFORMS=cpu works everywhere$")


def test_a_narrow_terminal_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["run", "x.toml", "--train.epochs", "1"]) == 0
    assert b"30 test samples ? 4-8-3 relu" in screen.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `jaxbp run … | head -1`: what has a console finishes its work, what only prints ends."""
    for arguments, status in ((("run", "x.toml"), 0), (("run", "x.toml", "--print-config"), 141)):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w", buffering=1) as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            assert main(arguments) == status
    assert [row["epoch"] for row in strict_rows("runs/x")] == [1, 2] and trained("runs/x")


def test_print_config_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml", "--print-config", "--optimizer.name", "adam", "--train.epochs=7")
    Path("y.toml").write_text(capsys.readouterr().out)
    assert read(Path("y.toml")) == read(Path("x.toml"), ["--optimizer.name=adam", "--train.epochs=7"])
    assert not Path("runs").exists()


def test_what_a_run_wrote_can_be_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml", "--train.folder", "chosen")
    works("run", "chosen/config.toml")
    assert "run folder runs/chosen\n" in capsys.readouterr().out
    works("run", "runs/chosen/config.toml")
    assert trained("chosen") == trained("runs/chosen") == trained("runs/chosen-2")


# --- functions that are checked ---------------------------------------------------------------------------------------

FUNCTIONS = """
import jax
square = jax.custom_vjp(lambda x: x**2)
square.defvjp(lambda x: (x**2, x), lambda x, u: (2 * x * u,))

def wrong_type(x):
    return x + "text"

def divides(x):
    return 1 // 0
"""


def test_what_is_wrong_with_a_function_is_one_line(
    fails: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("functions.py").write_text(FUNCTIONS)
    Path("breaks.py").write_text("import sys\nsys.path.clear()\n1 / 0")
    Path("leaves.py").write_text("raise SystemExit(0)")
    monkeypatch.setattr(sys, "path", [*sys.path])
    fails("check", "leaves:f", match="check: can't import leaves: SystemExit: 0")
    inputs = ("--inputs", "f32[3]")
    fails("check", "functions:squrae", match="functions has no 'squrae', did you mean 'square'\\?")
    fails("check", "functions:square", *inputs, "--wrt", "x", match="--wrt: got 'x', positions such as 0 or 0,2")
    fails("check", "functions:square", "--inputs", "f33[3]", match="check functions:square: unknown dtype 'f33'")
    fails("check", "functions:divides", *inputs, match="ZeroDivisionError: integer .*, at functions.py, line [0-9]+$")
    fails("check", "functions:wrong_type", *inputs, match="TypeError: .*, at functions.py, line [0-9]+$")
    fails("check", "breaks:f", match="check: can't import breaks: ZeroDivisionError: division by zero")


def test_no_command_replaces_a_file_of_the_users(fails: Callable[..., str]) -> None:
    """Every command with every path that it can be given: the file there stays as it is."""
    works("run", "x.toml", "--train.folder", "iris")
    Path("functions.py").write_text(FUNCTIONS)
    x = load_data(DataConfig("iris")).x_test[:2]
    np.savez("new.npz", x=x)
    mine = {name: Path(name) for name in ("mine.csv", "mine.png", "mine.json", "mine/notes.txt")}
    Path("mine").mkdir()
    for path in mine.values():
        path.write_text("mine")
    before = {
        path: path.read_bytes() for path in [*mine.values(), *Path("iris").iterdir(), Path("new.npz")] if path.is_file()
    }
    exists = "exists, --overwrite replaces it|exists; name another file"
    fails("run", "x.toml", "--train.folder", "mine", match="train.folder: mine is not empty")
    fails("run", "x.toml", "--train.folder", "iris", match="train.folder: iris holds a finished run")
    fails("predict", "iris", "--data", "new.npz", "--out", "mine.csv", match=exists)
    fails("predict", "iris", "--data", "new.npz", "--out", "new.npz", match="--out: 'new.npz'")
    fails("study", "iris", "--split", "test", "--out", "mine.csv", match=exists)
    fails("compare", "iris", "iris", "--out", "mine.csv", match=exists)
    fails("trace", "iris", "--sample", "1", "--out", "mine.png", match=exists)
    fails("check", "functions:square", "--inputs", "f32[3]", "--json", "mine.json", match="exists and is no report")
    fails("check", "x.toml", "--json", "iris/metrics.jsonl", match="exists and is no report")
    assert {path: path.read_bytes() for path in before} == before


# --- the public names -------------------------------------------------------------------------------------------------


def test_the_public_names_come_when_they_are_used() -> None:
    for package in (jaxbp, jaxbp.run):
        assert set(package.__all__) <= set(dir(package)) | {"Model", "Run", "load", "train"}
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'MPL'"):
            package.MPL  # noqa: B018
    assert jaxbp.check is jaxbp.checker.check


QUICK = """
import argcomplete, contextlib, io, os, sys
import jaxbp, jaxbp.pytest_plugin
from jaxbp import cli
for line in ("--help", "--version", "run --help", "study --help", "run x.toml --train.epoch 3", "run no.toml", "rnu",
             "run x.toml --print-config", "check x.toml:f", "launch -n 2 -- run x.toml --train.epoch 3"):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main(line.split())
        except SystemExit:
            pass
    heavy = {"jax", "numpy", "rich", "matplotlib", "optax", "sklearn"} & set(sys.modules)
    assert not heavy, (line, heavy)
os.environ["_ARGCOMPLETE"] = "1"
finder = argcomplete.CompletionFinder(cli._parser())
assert finder.rl_complete("run x.toml --train.ep", 0) == "run x.toml --train.epochs "
assert "jax" not in sys.modules
assert jaxbp.MLP((4, 3)).sizes == (4, 3) and "jax" in sys.modules
"""


def test_what_needs_no_jax_imports_none() -> None:
    subprocess.run([sys.executable, "-c", QUICK], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setattr(sys, "argv", ["jaxbp"])

    def completed(line: str) -> list[str]:
        finder = argcomplete.CompletionFinder(cli._parser())
        found = iter(lambda: finder.rl_complete(line, next(states)), None)
        states = itertools.count()
        return [words.removeprefix(line) for words in found]

    assert completed("re") == ["port "] and completed("predict runs/x --pro") == ["mpt", "babilities"]
    assert set(completed("run x.toml --")) >= {
        "log",
        "resume",
        "train.epochs",
        "optimizer.learning-rate",
        "sweep.seeds",
    }
    assert completed("run x.toml --train.epochs 3 --train.b") == ["atch-size "]
    assert completed("run x.toml --log ") == ["text", "json"]


# --- predict and data -------------------------------------------------------------------------------------------------


def test_predict(fails: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml", "--train.folder", "iris")
    x = load_data(DataConfig("iris")).x_test[:5]
    np.savez("new.npz", x=x)
    capsys.readouterr()
    works("predict", "iris", "--data", "new.npz")
    shown, model = capsys.readouterr().out, load("iris")
    assert model.classes is not None
    expected = [f"{i},{model.classes[k]}" for i, k in enumerate(model.predict(x).argmax(axis=1))]
    assert shown.splitlines() == ["index,class", *expected]
    works("predict", "iris", "--data", "new.npz", "--out", "out.csv")
    assert Path("out.csv").read_text() == shown
    assert capsys.readouterr() == ("", "")

    arrays = {"short": x[:, :3], "nan": np.where(np.arange(5)[:, None] == 2, np.nan, x), "text": np.array(["a"])}
    for name, array in arrays.items():
        np.savez(f"{name}.npz", x=array)
    np.savez("z.npz", z=x)
    Path("damaged.npz").write_bytes(Path("new.npz").read_bytes()[:100])
    for name, match in {
        "short": r"short.npz: x has shape \(5, 3\), expected \(N, 4\)",
        "nan": "nan.npz: row 2 of x is not finite",
        "text": "text.npz: x has dtype <U1, expected numbers",
        "z": "z.npz: no array 'x'. There are: z",
        "damaged": "damaged.npz: not an .npz file",
        "no": "no.npz: no such file",
    }.items():
        fails("predict", "iris", "--data", f"{name}.npz", match=match)
    fails("predict", "iris", "--data", "x.toml", match="x.toml: not an .npz file")
    fails("predict", "iris", "--data", "new.npz", "--out", "no/out.csv", match="--out: 'no/out.csv' can't be written")
    assert capsys.readouterr().out == ""


def test_predict_of_a_folder(fails: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 5, 4), np.uint8)
    for i, picture in enumerate(pixels):
        file = Path("pets") / ("cats", "dogs")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    works("run", "x.toml", "--data.name", "pets", "--model.sizes=", "--train.folder", "run")
    Path("runs").mkdir()
    Path("new/below").mkdir(parents=True)
    Path("new/.hidden").write_text("")
    for i, file in enumerate(("new/a.png", "new/below/b.png")):
        Image.fromarray(pixels[i]).save(file)
    capsys.readouterr()
    works("predict", "run", "--data", "new")
    guesses = [("cats", "dogs")[k] for k in load("run").predict(pixels[:2]).argmax(axis=1)]
    rows = [f"new/a.png,{guesses[0]}", f"new/below/b.png,{guesses[1]}"]
    assert capsys.readouterr().out.splitlines() == ["file,class", *rows]
    np.save("new/x.npy", pixels[:2])
    works("predict", "run", "--data", "new")
    assert capsys.readouterr().out.splitlines() == ["index,class", *(f"{i},{name}" for i, name in enumerate(guesses))]
    works("evaluate", "run", "--data", "pets")
    assert "run: 10 samples of pets" in capsys.readouterr().out

    for name, picture in {"flat": pixels[0].reshape(10, 2), "colour": np.zeros((5, 4, 3), np.uint8)}.items():
        Path(name).mkdir()
        Image.fromarray(picture).save(f"{name}/0.png")
    trained_on = "and run was trained on 4 × 5 grayscale; all have to agree"
    fails("predict", "run", "--data", "flat", match=f"flat/0.png is 2 × 10 grayscale, {trained_on}")
    fails("predict", "run", "--data", "colour", match=f"colour/0.png is 4 × 5 RGB, {trained_on}")
    fails("predict", "run", "--data", "runs", match="runs: no x.npy and no image in it")


def test_data_list(capsys: pytest.CaptureFixture[str]) -> None:
    works("data", "list")
    shown = capsys.readouterr().out
    for name in (
        "digits",
        "iris",
        "wine",
        "breast_cancer",
        "diabetes",
        "mnist",
        "fashion_mnist",
        "1,797",
        "70,000",
        "784",
    ):
        assert name in shown
    assert "\x1b" not in shown and shown.count("to be downloaded") == 2


def test_a_download_without_a_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "PAUSE", 0.0)
    assert main(["run", "x.toml", "--data.name", "mnist", "--model.sizes", "784", "10"]) == 2
    *downloads, last = capsys.readouterr().err.splitlines(keepends=True)
    one_line(last, "cannot download mnist: .*`jaxbp data import mnist PATH`")
    assert len(downloads) == 3 and downloads[0].startswith("downloading http://127.0.0.1:9/")
    assert downloads[1:] == [f"that failed; attempt {n} of 3\n" for n in (2, 3)]
    assert not Path("runs").exists()


# --- processes --------------------------------------------------------------------------------------------------------

# A shell that starts pytest in the background has SIGINT ignored, and so have all its children; hence the handler.
COMMAND = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('jaxbp', run_name='__main__', alter_sys=True)"
)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, with the cache folder "cache"."""
    strict = ("PYTHONWARNINGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in strict}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TERM": "xterm-256color", "COLUMNS": "80"}
    environment["XDG_CACHE_HOME"] = str(Path("cache").absolute())
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], **options)


HELP = {
    ("--help",): ("run", "list", "show", "compare", "evaluate", "predict", "data", "--version", "exit status"),
    ("run", "--help"): ("CONFIG", "--resume", "--new", "--train.epochs", "--optimizer.learning-rate"),
    ("run", "x.toml", "--help"): ("--train.epochs 2", "Passes over the training set", "--train.batch-size 50"),
    ("predict", "--help"): ("RUN_DIR", "--data", "--out", "--probabilities"),
    ("list", "--help"): ("FOLDER", "--sort"),
    ("show", "--help"): ("RUN_DIR",),
    ("compare", "--help"): ("RUN", "--by", "--sort", "--out"),
    ("evaluate", "--help"): ("RUN_DIR", "--data"),
    ("data", "--help"): ("list", "describe", "import"),
    ("data", "list", "--help"): ("jaxbp data list",),
    ("data", "import", "--help"): ("NAME", "PATH", "mnist"),
    ("--version",): ("jaxbp ",),
}


@pytest.mark.parametrize("arguments", HELP)
def test_help(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(arguments)
    except SystemExit as stop:  # argparse's own help and version
        status = stop.code
    shown = capsys.readouterr()
    assert (status, shown.err) == (0, "")
    assert [word for word in HELP[arguments] if word not in shown.out] == []


def test_the_help_of_a_run_names_every_key_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    works("run", "x.toml", "--help", "--train.epochs", "12345")
    shown = capsys.readouterr().out
    assert [key for key in keys() if f"  --{key.replace('_', '-')} " not in shown] == []
    assert "  --train.epochs 12345\n      Passes over the training set.\n" in shown


@pytest.mark.slow
def test_processes_without_a_terminal() -> None:
    """A run in plain lines, in float32 without the x64 mode and the strictness that tests have; an error on stderr."""
    run, wrong = start("run", "x.toml"), start("predict", "x")
    out, err = run.communicate(timeout=120)
    assert (err, run.returncode) == ("", 0)
    assert "\x1b" not in out and len(re.findall(r"^epoch \d/2  train loss ", out, re.MULTILINE)) == 2
    assert load("runs/x").params[0].w.dtype == np.float32
    out, err = wrong.communicate(timeout=120)
    assert (out, wrong.returncode) == ("", 2)
    one_line(err, "one of the arguments --data --prompt is required")


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    said = [start("run", "x.toml", "--train.folder", name).communicate(timeout=120)[1] for name in ("first", "second")]
    assert ["cache hit for 'jit_epoch'" in err for err in said] == [False, True]
    assert any(path.name.startswith("jit_epoch-") for path in Path("cache/jaxbp/programs").rglob("*-cache"))
    first, second = (Path(name, "params.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.slow
def test_a_terminal_gets_a_bar_and_float64_its_mode() -> None:
    Path("f64.toml").write_text(IRIS.replace("[model]", "[model]\ndtype = 'float64'\nloss = 'squared_error'"))
    ours, theirs = pty.openpty()
    process = start("run", "f64.toml", stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b"".join(iter(lambda: read_terminal(ours), b""))
    os.close(ours)
    assert process.wait(timeout=30) == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert "\x1b[" in shown.decode()
    assert re.search(
        r"epoch 2/2 ━{10} 0:00:\d\d left 0:00:00 loss [\d.]+ test accuracy [\d.]+ %\s", text
    )  # in 80 columns
    assert not re.search(r"epoch 1/2  train loss", text)  # no line an epoch beside the bar
    row, data = strict_rows("runs/f64")[-1], load_data(DataConfig("iris"))
    errors = load("runs/f64").predict(data.x_test) - np.eye(3)[data.y_test]
    assert row["test_loss"] == pytest.approx(np.mean(np.sum(errors**2, axis=1)) / 2, rel=1e-12)


def read_terminal(file: int) -> bytes:
    """What comes within two minutes; nothing at the end, which Linux reports as an error."""
    try:
        return os.read(file, 65536) if select.select([file], [], [], 120)[0] else b""
    except OSError:
        return b""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured() -> None:
    process = start("run", "x.toml", "--train.epochs", "1000000")
    metrics, end = Path("runs/x/metrics.jsonl"), time.monotonic() + 60
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    one_line(err, "stopped after epoch [0-9]+ of 1000000, saved in runs/x; the same command goes on from there")
    assert "Traceback" not in out
    rows = strict_rows("runs/x")
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 2
    assert load("runs/x").predict(np.zeros((1, 4))).shape == (1, 3)
