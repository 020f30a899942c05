"""Runs that survive: kills, signals, damaged checkpoints, a full disk, two processes on one folder, bad input."""

import contextlib
import fcntl
import json
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiers import one_in

from experiments import bad_input, kills
from jaxbp.cli import main
from jaxbp.run import loop
from jaxbp.run.compute.program import OneDevice, first_state
from jaxbp.run.compute.step import State
from jaxbp.run.config import CheckpointConfig, read
from jaxbp.run.data import npz
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory as room
from jaxbp.run.host import signals
from jaxbp.run.store import checkpoint, folder, runs
from jaxbp.run.store.checkpoint import Checkpoints, Position, damage
from jaxbp.run.sweep import sweep

IRIS = """
[data]
name = "iris"
[model]
sizes = [4, 8, 3]
[optimizer]
{optimizer}
[train]
epochs = 5
batch_size = 50
plots = false
[checkpoint]
every = 2
"""
SGD, ADAM = "learning_rate = 0.1", 'name = "adam"\nschedule = "cosine_decay_schedule"\nschedule_arguments = {cosine}'
OPTIMIZERS = {
    "sgd": SGD,
    "adam, cosine": ADAM.format(cosine="{ init_value = 0.1, decay_steps = 15 }"),
    "sgd, recording": f'{SGD}\n[study]\nquantities = ["squared_norms", "noise_scale"]\nevery = 2',
}
SEED_1 = ("--train.seed", "1")
SAME = ("metrics.jsonl", "params.safetensors")


class Killed(BaseException):
    """Nothing in the library catches it: what is on disk then is what a SIGKILL leaves."""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with x.toml."""
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(IRIS.format(optimizer=SGD))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax has it
        yield tmp_path


def run(*arguments: str, status: int = 0) -> None:
    assert main(["run", "x.toml", *arguments]) == status


def killed(function: Any, name: str, number: int, *arguments: str, after: bool = False) -> None:
    """Runs until the function is called for the number-th time, and no further."""
    calls = 0
    original = getattr(function, name)

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise Killed
        result = original(*args, **options)
        if calls == number:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(function, name, call)
        main(["run", "x.toml", *arguments])


def contents(path: str) -> list[bytes]:
    return [(Path(path) / name).read_bytes() for name in SAME]


def refused(capsys: pytest.CaptureFixture[str], match: str, *arguments: str) -> None:
    capsys.readouterr()
    run(*arguments, status=2)
    said = capsys.readouterr().err
    assert re.fullmatch(r"jaxbp: [^\n]+\n", said) and re.search(match, said), said


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", one_in(3, list(OPTIMIZERS)))
def test_a_run_that_was_killed_ends_as_one_that_was_not(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In a step that writes, before it and after it: three kills, one after the other, of one run."""
    Path("x.toml").write_text(IRIS.format(optimizer=OPTIMIZERS[optimizer]))
    run("--train.folder", "whole")
    chosen = ("--train.folder", "killed")
    if optimizer == "sgd":
        killed(folder, "append", 2, *chosen)  # no checkpoint yet
    killed(folder, "append", 6, *chosen, after=True)  # epoch 3 is measured, the checkpoint is of epoch 2
    assert sorted(path.name for path in Path("killed/checkpoints").iterdir()) == ["6", "6.sha256"]
    capsys.readouterr()
    killed(loop, "_write_results", 1, *chosen)  # all is trained, nothing is written
    run(*chosen)
    shown = capsys.readouterr().out
    assert "goes on after epoch 2, step 6" in shown and "goes on after epoch 4" in shown
    assert contents("killed") == contents("whole")
    timings = [json.loads(line)["epoch"] for line in Path("killed/timings.jsonl").read_text().splitlines()]
    assert timings == [1, 2, 3, 4, 5]
    assert len(json.loads(Path("killed/provenance.json").read_text())["resumed"]) == 2 + (optimizer == "sgd")
    assert not Path("killed/.unfinished").exists()


@pytest.mark.slow
def test_a_run_that_stops_early_goes_on_with_its_best_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    """Kills before the best epoch, after it, at the end and between the test and the results; then one more try."""
    files = (*SAME, "best.safetensors")
    early = ("--data.validation", "0.2", "--train.patience", "3", "--train.min-delta", "0.03")
    early += ("--train.epochs", "40", "--checkpoint.every", "1", "--train.folder")
    run(*early, "whole")
    whole = [(Path("whole") / name).read_bytes() for name in files]
    final = json.loads(whole[0].splitlines()[-1])
    assert final["stopped_early"] and 3 < final["epoch"] == final["epochs"] - 3
    for number in (2, final["epoch"] - 3, 2):
        killed(folder.RunFolder, "checkpoint", number, *early, "killed", after=True)
    killed(loop, "_conclude", 1, *early, "killed")  # all is trained
    killed(loop, "_write_results", 1, *early, "killed")  # and tested
    capsys.readouterr()
    run(*early, "killed")
    assert f"goes on after epoch {final['epochs']}," in capsys.readouterr().out
    assert [(Path("killed") / name).read_bytes() for name in files] == whole
    run(*early, "killed", "--train.epochs", "60", "--resume")  # it has stopped, so it is no longer
    assert [(Path("killed") / name).read_bytes() for name in files] == whole


def test_a_kill_in_the_middle_of_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is there, its manifest is not; and half of one. What is the user's stays, behind a link too."""
    run("--train.folder", "whole")
    killed(loop, "_write_results", 1, "--train.folder", "x")
    Path("x/checkpoints/12.sha256").unlink()
    Path("x/checkpoints").rename("elsewhere")
    Path("x/checkpoints").symlink_to(Path("elsewhere").absolute())
    Path("x/checkpoints/.15").mkdir()
    Path("x/checkpoints/.15/state.safetensors").write_text("half a st")
    Path("x/checkpoints/.0123abcd.part-12.sha256").write_text("half a manif")
    for mine in ("notes.txt", "2024", ".3", "thesis/9.txt", "9/plan.txt"):
        Path("x/checkpoints", mine).parent.mkdir(exist_ok=True)
        Path("x/checkpoints", mine).write_text("mine")
    with Checkpoints(Path("x"), CheckpointConfig()) as checkpoints:
        saved = checkpoints.newest(kills.state_of(Path("x")), pytest.fail)
    assert saved is not None and saved.position[:2] == (2, 6)
    left = [".3", "2024", "6", "6.sha256", "9", "notes.txt", "thesis"]
    assert sorted(path.name for path in Path("x/checkpoints").iterdir()) == left
    run("--train.folder", "x")
    assert all(Path("x/checkpoints", mine).read_text() == "mine" for mine in ("notes.txt", "thesis/9.txt", "2024"))
    assert contents("x") == contents("whole")


@pytest.mark.slow
def test_real_kills_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the fifty and more of experiments/kills.py, the last one in a save; then 6 flips and 4 cuts."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    config = IRIS.format(optimizer=SGD).replace("epochs = 5", "epochs = 40").replace("every = 2", "every = 1")
    monkeypatch.setattr(kills, "CONFIGS", {"sgd": config})
    monkeypatch.setattr(kills, "MOMENT", 1.0)
    found = kills.survive("sgd", 1, 3, tmp_path)
    assert found["same"] == 1 and len(found["kills"]) >= 1
    assert kills.damage(tmp_path / "sgd whole", 6, False, tmp_path) == 6
    assert kills.damage(tmp_path / "sgd whole", 4, True, tmp_path) == 4


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved_twice(path: str = "x") -> Any:
    """Two checkpoints, of steps 3 and 6, whose parameters differ; the state."""
    state = state_of("x.toml")
    with Checkpoints(Path(path), CheckpointConfig(keep=2)) as checkpoints:
        Path(path).mkdir()
        for epoch in (1, 2, 3):
            params = jax.tree.map(lambda p: p + epoch, state.params)  # noqa: B023
            position = Position(epoch, 3 * epoch, 100 * epoch, np.array([1, epoch], np.uint32))
            checkpoints.save(position, state._replace(params=params))
    return state


def state_of(config: str, *overrides: str) -> State:
    setup = loop.prepare(read(Path(config), overrides))
    return first_state(setup.problem, setup.spec)


def newest(state: Any, warn: Callable[[str], None] = pytest.fail) -> checkpoint.Saved | None:
    with Checkpoints(Path("x"), CheckpointConfig()) as checkpoints:
        return checkpoints.newest(state, warn)


def test_a_checkpoint_holds_state_and_position_and_the_newest_are_kept() -> None:
    state = saved_twice()
    assert sorted(path.name for path in Path("x/checkpoints").iterdir()) == ["6", "6.sha256", "9", "9.sha256"]
    saved = newest(state)
    assert saved is not None and saved.position[:3] == (3, 9, 300)
    np.testing.assert_array_equal(saved.position.key, [1, 3])
    assert jax.tree.structure(saved.state) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(saved.state.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs + 3)
        assert ours.dtype == theirs.dtype
    command = ["sha256sum", "--check", "--quiet", "6.sha256", "9.sha256"]
    assert subprocess.run(command, cwd="x/checkpoints", capture_output=True).returncode == 0


@pytest.mark.parametrize("how", ["missing file", "added file", "empty manifest"])
def test_damage_is_named_and_the_checkpoint_before_is_used(how: str) -> None:
    state = saved_twice()
    if how == "missing file":
        Path("x/checkpoints/9/state.safetensors").unlink()
    elif how == "added file":
        Path("x/checkpoints/9/more").write_text("more")
    else:
        Path("x/checkpoints/9.sha256").write_text("")
    named = {"missing file": "9/state.safetensors is missing", "added file": "9/more is not in its manifest"}
    said: list[str] = []
    saved = newest(state, said.append)
    assert saved is not None and saved.position.step == 6
    assert len(said) == 1 and "step 9 is damaged" in said[0] and named.get(how, "9/") in said[0]
    again = newest(state)  # it is not looked at twice
    assert again is not None and again.position.step == 6
    assert damage(Path("x/checkpoints/6")) is None


def test_when_all_are_damaged_the_run_begins_again(capsys: pytest.CaptureFixture[str]) -> None:
    run("--train.folder", "whole")
    killed(loop, "_write_results", 1, "--train.folder", "x")
    for manifest in Path("x/checkpoints").glob("*.sha256"):
        manifest.write_text(manifest.read_text().replace("a", "b"))
    capsys.readouterr()
    run("--train.folder", "x")
    shown = capsys.readouterr()
    assert shown.err.count("jaxbp: warning: the checkpoint of step") == 2
    assert "no checkpoint: begins again" in shown.out
    assert contents("x") == contents("whole")


def test_a_checkpoint_of_another_network_is_refused() -> None:
    saved_twice()
    other = state_of("x.toml", "--model.sizes", "4", "9", "3")
    with pytest.raises(UserError, match="checkpoints/9: holds another state"):
        newest(other)


def test_without_a_count_of_epochs_a_checkpoint_is_due_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Checkpoints(Path("x"), CheckpointConfig()) as checkpoints:
        assert not checkpoints.due(1)
        now = 61.0
        assert checkpoints.due(2)
    with Checkpoints(Path("x"), CheckpointConfig(every=3)) as checkpoints:
        assert [epoch for epoch in range(1, 8) if checkpoints.due(epoch)] == [3, 6]


# --- which folder -----------------------------------------------------------------------------------------------------


def test_a_run_takes_the_newest_folder_if_it_is_unfinished(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "--resume: runs/x does not exist, so there is nothing to resume", "--resume")
    assert not Path("runs").exists()
    run()
    whole = contents("runs/x")
    refused(
        capsys, "--resume: runs/x is finished, so .* resume; a train.epochs of more than 5 trains it lo", "--resume"
    )
    refused(capsys, "train.folder: runs/x holds a finished run; name a new", "--train.folder", "runs/x")
    killed(folder, "append", 6)
    assert Path("runs/x-2/.unfinished").exists()
    refused(
        capsys,
        r"runs/x-2 is unfinished and began with another config: train.batch_size was 50, now 6, train.seed was 0",
        *("--train.batch-size", "6", "--train.seed", "1"),
    )
    refused(capsys, "runs/x-2 holds an unfinished run, which stays; name", "--new", "--train.folder", "runs/x-2")
    run("--resume")
    assert contents("runs/x-2") == contents("runs/x") == whole
    killed(folder, "append", 1)
    run("--new", "--train.epochs", "1")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["x", "x-2", "x-3", "x-4"]
    assert Path("runs/x-3/.unfinished").exists() and not Path("runs/x-4/.unfinished").exists()


@pytest.mark.parametrize("optimizer", one_in(2, ["sgd", "sgd, recording"]))
def test_a_finished_run_is_trained_longer(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From its checkpoint of epoch 2; then, unfinished, it is given one epoch more. The bytes of all at once."""
    Path("x.toml").write_text(IRIS.format(optimizer=OPTIMIZERS[optimizer]))
    run("--train.folder", "whole", "--train.epochs", "5")
    run("--train.epochs", "3")
    before = contents("runs/x")
    refused(capsys, "runs/x began with another config: train.seed was 0", "--train.epochs", "4", "--resume", *SEED_1)
    assert contents("runs/x") == before and not Path("runs/x/.unfinished").exists()
    killed(folder, "append", 4, "--train.epochs", "4", "--resume")  # epoch 4 is measured, but for its row
    assert read(Path("runs/x/config.toml")).train.epochs == 4
    refused(capsys, "train.epochs: got 2, runs/x has 3 already; --new, or", "--train.epochs", "2")
    capsys.readouterr()
    run("--train.epochs", "5")
    assert "goes on after epoch 2" in capsys.readouterr().out
    assert contents("runs/x") == contents("whole")
    assert read(Path("runs/x/config.toml")) == read(Path("whole/config.toml"))
    assert runs.read(Path("runs/x")).config["train"]["epochs"] == 5


def test_a_schedule_that_counts_all_steps_is_not_trained_longer(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.toml").write_text(IRIS.format(optimizer=ADAM.format(cosine='{ init_value = 0.1, decay_steps = "all" }')))
    killed(folder, "append", 3)
    said = (
        "runs/x is unfinished and began with another learning rate: train.epochs was 5, now 6, and the schedule counts"
    )
    refused(capsys, said, "--train.epochs", "6")


def test_another_number_of_cores_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """XLA splits sums over its threads, so the promise of the same bytes is for the same number of them."""
    killed(folder, "append", 6)
    begun = json.loads(Path("runs/x/provenance.json").read_text())
    Path("runs/x/provenance.json").write_text(json.dumps(begun | {"cores": 1000}))
    capsys.readouterr()
    run()
    said = capsys.readouterr().err
    assert said.startswith("jaxbp: warning: runs/x began on 1000 cores and goes on on ") and said.count("\n") == 1


@pytest.mark.slow
def test_data_that_changed_since_the_run_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3
    np.savez("mine.npz", x=x, y=y)
    mine = ("--data.name", "mine.npz")
    run(*mine, "--train.folder", "whole")
    killed(folder, "append", 6, *mine)
    np.savez("mine.npz", x=x + np.eye(60, 4) * 1e-12, y=y)
    before = Path("runs/x/metrics.jsonl").read_bytes()
    refused(capsys, "runs/x is unfinished and began with other data, data.name: mine.npz has changed", *mine)
    assert Path("runs/x/metrics.jsonl").read_bytes() == before
    np.savez("mine.npz", x=x, y=y)
    run(*mine)
    assert contents("runs/x") == contents("whole")


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_in_its_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its members are saved: what was measured of them is measured again, and not twice there."""
    two = ("--sweep.seeds", "2", "--checkpoint.every", "None", "--train.epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(folder.RunFolder, "finish", lambda self: None)
        killed(sweep, "_save", 1, *two)
    left = Path("runs/x/metrics.jsonl").read_bytes()
    refused(capsys, "runs/x is unfinished and began with another config", *two, "--resume", *SEED_1)
    assert Path("runs/x/metrics.jsonl").read_bytes() == left
    run(*two)
    assert "run folder runs/x\n" in capsys.readouterr().out
    assert Path("runs/x/metrics.jsonl").read_bytes() == left and not Path("runs/x/.unfinished").exists()
    assert [runs.read(member).state for member in Path("runs/x/members").iterdir()] == ["finished"] * 2
    refused(capsys, "--resume: runs/x is finished, so there is nothing to resume", "--resume", *two)


def test_a_name_of_dots_stays_below_runs() -> None:
    Path("...toml").write_text(Path("x.toml").read_text())
    assert main(["run", "...toml", "--train.epochs", "1"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["run"]


def test_a_diverged_run_is_finished() -> None:
    run("--optimizer.learning-rate", "1e30", "--model.loss", "squared_error", status=3)
    assert not Path("runs/x/.unfinished").exists()


def test_two_processes_in_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    killed(folder, "append", 6)
    before = Path("runs/x/metrics.jsonl").read_bytes()
    with open("runs/x/.unfinished", "r+") as lock:
        lock.truncate()
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(capsys, "runs/x: another process, 4711, runs in this folder")
    assert Path("runs/x/metrics.jsonl").read_bytes() == before


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_epoch_and_saves(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--train.folder", "whole", "--checkpoint.every", "None")
    original = OneDevice.evaluate

    def evaluate(*arguments: Any) -> Any:
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))
        signal.raise_signal(number)
        monkeypatch.setattr(OneDevice, "evaluate", original)
        return original(*arguments)

    before = [signal.getsignal(number) for number in signals.SIGNALS]
    if before[0] is signal.SIG_IGN:  # a shell that started pytest in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(OneDevice, "evaluate", evaluate)
    run("--checkpoint.every", "None", status=status)
    said = capsys.readouterr().err
    assert said == "jaxbp: stopped after epoch 1 of 5, saved in runs/x; the same command goes on from there\n"
    assert Path("runs/x/params.safetensors").exists() and Path("runs/x/checkpoints/3.sha256").exists()
    signal.signal(signal.SIGINT, before[0])
    run("--checkpoint.every", "None")
    assert contents("runs/x") == contents("whole")
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


# --- full disk and memory ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process can become larger: as with a full disk, writing fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("every", "where"), [("None", ""), ("2", "/checkpoints")])
def test_what_was_written_before_a_full_disk_stays_readable(
    every: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """3,000 bytes: the metrics of ten epochs, or a checkpoint, half written. One line; no thread prints another."""
    network = ("--model.sizes", "4", "128", "3", "--train.epochs", "12", "--checkpoint.every", every)
    run("--train.folder", "whole", *network)
    with files_up_to(3000):
        refused(capsys, f"runs/x{where}: can't be written: File too large", *network)
    rows = [json.loads(line) for line in Path("runs/x/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)) and rows
    assert [path.name for path in Path("runs/x").rglob("*") if "part" in path.name or "tmp" in path.name] == []
    assert not list(Path("runs/x").glob("checkpoints/*")) and not Path("runs/x/.params.safetensors").exists()
    run(*network)
    assert contents("runs/x") == contents("whole")


def test_a_network_and_data_that_do_not_fit_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(capsys, r"model.sizes: parameters, gradient, the state of sgd need 12 EB of memory, .* are available",
            "--model.sizes", "4", "1000000000", "1000000000", "3")  # fmt: skip
    np.savez("big.npz", x=np.zeros((50, 4)), y=np.arange(50) % 3)
    assert npz.size(Path("big.npz"), ["x", "y", "z"]) == 50 * 4 * 8 + 50 * 8
    monkeypatch.setattr(room, "available", lambda: 1999)
    refused(capsys, "big.npz: its arrays need 2 kB of memory, 1.999 kB are available", "--data.name", "big.npz")
    monkeypatch.setattr(room, "available", lambda: 2000)
    refused(capsys, "train.batch_size: .* need ", "--data.name", "big.npz")
    sizes = ("--model.sizes", "4", "256", "64", "3")  # more bytes than the samples
    params, batch = 4 * (4 * 256 + 256 + 256 * 64 + 64 + 64 * 3 + 3), 4 * 50 * 256
    momentum, adam = ("--optimizer.arguments", "momentum", "0.9"), ("--optimizer.name", "adam")
    for state, optimizer in ((0, ()), (1, momentum), (2, adam)):
        monkeypatch.setattr(room, "available", lambda state=state: (3 + state) * params - 1)
        refused(capsys, "model.sizes: parameters, gradient, the state of (sgd|adam) need", *sizes, *optimizer)
        monkeypatch.setattr(room, "available", lambda state=state: (3 + state) * params + 8 + 2 * batch)
        loop.prepare(read(Path("x.toml"), [*sizes, *optimizer]))
    monkeypatch.setattr(room, "available", lambda: 2 * 5 * params - 1)
    sweep_of_two = ("--sweep.seeds", "2", "--checkpoint.every", "None", *sizes, *adam)
    refused(capsys, "parameters, gradient, the state of adam, 2 times, need", *sweep_of_two)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mutated_configs_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 inputs, by other seeds than the 2,400 of experiments/bad_input.py, which traces the step too."""
    monkeypatch.setattr(bad_input, "traced", lambda *_: None)
    x64 = jax.config.jax_enable_x64
    try:
        counts = ((bad_input.try_config, 110), (bad_input.try_npz, 20), (bad_input.try_idx, 20))
        tries = [(f, 10_000 + seed) for f, count in counts for seed in range(count)]
        outcomes = {(f.__name__, seed): f(seed) for f, seed in tries}
    finally:
        jax.config.update("jax_enable_x64", x64)
    wrong = {key: (found, said) for key, (found, said) in outcomes.items() if found not in ("runs", "refused")}
    assert wrong == {}
    refusals = [key for key, (found, _) in outcomes.items() if found == "refused"]
    assert 100 < len(refusals) < 150
