"""A run in two processes of two CPU devices: same numbers, written once, ends when a process is lost, goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxbp.cli import main
from jaxbp.run import problem as problems
from jaxbp.run.compute.epoch import evaluate
from jaxbp.run.host import processes
from jaxbp.run.store.model import load

RUN = ["run", "configs/digits.toml", "--model.dtype", "float64", "--train.no-plots", "--checkpoint.every", "1"]
RUN += ["--train.batch-size", "128"]
EPOCHS = 20  # many more than pass between a checkpoint and the signal that follows it
ENVIRONMENT = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
QUICK = "from jaxbp.run.host import processes; processes.PERIOD, processes.TIMEOUT = 1, 4; import jaxbp.cli as c, sys; "


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a test set of its own, so that no process has to import scikit-learn, which takes it two seconds."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    x, y = load_digits(return_X_y=True)
    np.savez(path, x=x[:1437], y=y[:1437].astype(np.int32), x_test=x[1437:], y_test=y[1437:].astype(np.int32))
    return str(path)


def alone(folder: Path, digits: str, *overrides: str, epochs: int = EPOCHS) -> list[str]:
    """The arguments of a run in one process."""
    return [*RUN, "--data.name", digits, "--train.epochs", str(epochs), "--train.folder", str(folder), *overrides]


def launched(folder: Path, digits: str, *overrides: str, epochs: int = EPOCHS) -> list[str]:
    """The command of a run in two processes."""
    arguments = alone(folder, digits, *overrides, epochs=epochs)
    return [sys.executable, "-m", "jaxbp", "launch", "-n", "2", "--", *arguments]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def begun(folder: Path, process: subprocess.Popen[str]) -> None:
    """Waits for the first checkpoint."""
    end = time.monotonic() + 300
    while not list(folder.glob("checkpoints/*.sha256")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Iterator[tuple[Path, str]]:
    """A run on 2 × 2 devices of two processes that is not disturbed: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("processes") / "whole"
    command = launched(folder, digits, "--mesh.model", "2")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    yield folder, done.stdout


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_device(whole: tuple[Path, str], digits: str, tmp_path: Path) -> None:
    folder, printed = whole
    assert main(alone(tmp_path / "one", digits)) == 0
    for one, two in zip(rows(tmp_path / "one"), rows(folder), strict=True):
        for name in ("train_loss", "test_loss"):
            assert two[name] == pytest.approx(one[name], rel=1e-10)
    assert "2 × 2 cpu in 2 processes" in printed
    assert [printed.count(f"epoch {n}/{EPOCHS}") for n in range(1, EPOCHS + 1)] == [1] * EPOCHS
    assert json.loads((folder / "provenance.json").read_text())["processes"] == 2
    assert len(list(folder.glob("checkpoints/*.sha256"))) == 2


@pytest.mark.slow
def test_a_run_that_lost_a_process_and_was_stopped_ends_with_the_same_bytes(
    whole: tuple[Path, str], digits: str, tmp_path: Path
) -> None:
    """SIGKILL of the second process: the first names it and ends. SIGTERM: both save. Then the run is left to end."""
    folder = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = launched(folder, digits, "--mesh.model", "2")
    arguments = command[command.index("--") + 1 :]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", f"{QUICK} sys.exit(c.main({arguments}))"],
            env=ENVIRONMENT | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(n)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    begun(folder, children[0])
    children[1].kill()
    children[1].communicate()
    said = children[0].communicate(timeout=60)[1]
    assert children[0].returncode == 4
    of_jaxbp = [line for line in said.splitlines() if line.startswith("jaxbp:")]
    assert of_jaxbp == ["jaxbp: process 1 of 2 is gone; the same command goes on from the newest checkpoint"]
    assert (folder / ".unfinished").exists()

    steps = {path.name for path in folder.glob("checkpoints/*.sha256")}
    child = subprocess.Popen(
        launched(folder, digits, "--mesh.model", "2"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while {path.name for path in folder.glob("checkpoints/*.sha256")} <= steps and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)  # SIGINT is ignored below a shell's background job
    printed, said = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGTERM, said
    assert "goes on after epoch" in printed and "[Gloo]" not in printed
    assert said.count("jaxbp: stopped after epoch") == 1

    last = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    for name in ("params.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name


@pytest.mark.slow
def test_a_private_run_in_two_processes_is_that_of_one_device(digits: str, tmp_path: Path) -> None:
    """Without a seed only one of the two draws the noise of the principal directions, which both have."""
    private = ["--data.pca", "30", "--data.standardize", "none", "--model.sizes", "30,32,10", "--privacy.delta", "1e-4"]
    private += ["--privacy.max-norm", "1", "--privacy.noise-multiplier", "2", "--privacy.pca-noise", "4"]
    private += ["--privacy.accountant", "rdp"]
    one, two, secret = (tmp_path / name for name in ("one", "two", "secret"))
    seeded = [*private, "--privacy.seed", "5"]
    assert main(alone(one, digits, *seeded, epochs=3)) == 0
    for command in (launched(two, digits, *seeded, epochs=3), launched(secret, digits, *private, epochs=1)):
        assert subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=300).returncode == 0
    for mine, theirs in zip(rows(one), rows(two), strict=True):
        assert theirs["test_loss"] == pytest.approx(mine["test_loss"], rel=1e-9)
        assert theirs["epsilon"] == mine["epsilon"]
    model = load(secret)
    problem = problems.of_run(secret, model)
    found = evaluate(problem.scored, model.params, *problem.on_device("test")).loss
    assert rows(secret)[0]["test_loss"] == pytest.approx(float(found.mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "1", "--", *RUN], "launch: -n 1; allowed: 2 to 64"),
        (["-n", "2", "--", "data", "list"], "launch: only a run can be several processes"),
        (["-n", "2", "--", "run", "configs/digits.toml", "--train.epoch", "3"], "did you mean 'train.epochs'?"),
        (["-n", "2", "--"], "launch: only a run can be several processes"),
        (["-n", "two", "--", *RUN], "invalid int value"),
    ],
)
def test_a_bad_launch_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_process_that_does_not_know_the_others_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert main([*RUN, "--train.folder", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxbp: JAX_NUM_PROCESSES is '2' and JAX_PROCESS_ID is None; both have to be numbers")
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("1", "process 1 of 1 is gone"),
        ("10\n/job:jax_worker/replica:0/task:9", "processes 9, 10 of 1 are gone"),
    ],
)
def test_who_is_missing_at_a_meeting(names: str, said: str) -> None:
    message = (
        f"Barrier timed out. Id: 3.\n# of tasks: 2/3.\nThe first task: 0. Some timed out task names:\n{names}\n\n\n"
    )
    assert processes._missing(message) == said


def test_in_one_process_nothing_is_exchanged() -> None:
    assert processes.leads() and processes.largest(3, 0) == (3, 0)
    assert (
        processes.on_all(lambda: "a")
        == processes.from_first(lambda: "a")
        == processes.first_then_others(lambda: "a")
        == "a"
    )
    np.testing.assert_array_equal(processes._gather(7), [7])
