"""[train] loggers, read back with the libraries that they are for; TensorBoard's files are in test_cli.py."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxbp.run
from jaxbp.cli import main
from jaxbp.run.config import Config
from jaxbp.run.report import loggers
from jaxbp.run.store import runs
from jaxbp.run.trained import Run

IRIS: dict[str, dict[str, Any]] = {
    "data": {"name": "iris", "validation": 0.2},
    "model": {"sizes": [4, 3]},
    "optimizer": {"learning_rate": 0.1},
    "train": {"epochs": 4, "batch_size": 50, "plots": False, "monitor": "validation_loss"},
    "study": {"quantities": ["squared_norms"], "every": 3},
    "checkpoint": {"every": 2},
}
Points = list[tuple[int, float]]  # steps and values


class Killed(BaseException):
    """Nothing in the library catches it."""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax has it
        yield tmp_path


def killed_and_trained(name: str) -> Run:
    """A run with a logger that was killed after epoch 3, one after its checkpoint, and then went on to epoch 4."""

    def kill(row: dict[str, Any], params: Any) -> None:
        if row["epoch"] == 3:
            raise Killed

    config = IRIS | {"train": IRIS["train"] | {"loggers": [name]}}
    with pytest.raises(Killed):
        jaxbp.run.train(config, callbacks=[kill], folder="run")
    return jaxbp.run.train(config, folder="run")


def told(run: Run) -> tuple[Points, Points, float]:
    """What metrics.jsonl has: the validation loss by epoch, the mean squared norm by step, the test accuracy."""
    rows = runs.rows(run.folder / "metrics.jsonl")
    norms = [(row["step"], row["squared_norms"]["mean"]) for row in rows if "squared_norms" in row]
    return [(row["epoch"], row["validation_loss"]) for row in run.history], norms, rows[-1]["test_accuracy"]


def test_a_logger_is_told_what_a_run_that_goes_on_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[tuple[int, int, bool]]] = []

    @contextlib.contextmanager
    def logger(folder: Path, config: Config) -> Iterator[loggers.Log]:
        told.append([])
        yield lambda row, values: told[-1].append((row.epoch, row.step, "seconds" in values))

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", logger)
    run = killed_and_trained("tensorboard")
    rows = [(row["epoch"], row["step"], "train_loss" in row) for row in runs.rows(run.folder / "metrics.jsonl")]
    assert told == [rows[:5], rows]  # those of three epochs, and all, with that of the test set


@pytest.mark.slow
def test_mlflow_has_each_row_once_after_a_kill() -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra loggers is no part of dev")
    run = killed_and_trained("mlflow")
    client = mlflow.MlflowClient(tracking_uri=(run.folder / "mlruns").absolute().as_uri())
    [found] = client.search_runs(["0"])

    def points(name: str) -> Points:
        return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]

    losses, norms, accuracy = told(run)
    assert (points("validation_loss"), points("squared_norms/mean")) == (losses, norms)
    assert [step for step, _ in points("seconds")] == [1, 2, 3, 4]
    assert found.data.metrics["test_accuracy"] == accuracy and found.info.status == "FINISHED"
    assert found.data.params["model.sizes"] == "(4, 3)" and found.data.params["data.validation"] == "0.2"
    assert (found.data.tags["run_folder"], found.data.tags["train.epochs"]) == ("run", "4")


@pytest.mark.slow
def test_wandb_has_each_row_once_after_a_kill() -> None:
    pytest.importorskip("wandb", reason="the extra loggers is no part of dev")
    run = killed_and_trained("wandb")
    [path] = run.folder.glob("wandb/offline-run-*/*.wandb")
    found = records(path.read_bytes())
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    losses, norms, accuracy = told(run)
    assert [(row["epoch"], row["validation_loss"]) for row in rows if "validation_loss" in row] == losses
    assert [(row["_step"], row["squared_norms/mean"]) for row in rows if "squared_norms/mean" in row] == norms
    summary = {item.key: json.loads(item.value_json) for record in found for item in record.summary.update}
    assert summary["test_accuracy"] == accuracy


def records(data: bytes) -> list[Any]:
    """Of a file of W&B: a head of 7 bytes, then records as LevelDB logs them, in parts that end with a block."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, block, whole, found = 7, 2**15, b"", []
    while at < len(data):
        if (left := block - at % block) < 7:  # too few for the head of a part
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record in one part, or its last one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_a_logger_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    Path("x.toml").write_text("[data]\nname = 'iris'\n[optimizer]\nlearning_rate = 0.1\n")
    assert main(["run", "x.toml", "--train.loggers", "tensorboard,wandb"]) == 2
    assert "train.loggers: wandb needs the package wandb, which is not installed" in capsys.readouterr().err
    assert not Path("runs").exists()
