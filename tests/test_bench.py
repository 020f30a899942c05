"""The benchmark: its rows on networks small enough for a test; the numbers themselves are experiments."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib import image

from experiments.bench import (
    command,
    environments,
    epoch,
    growth,
    machine,
    matmul,
    networks,
    peers,
    persample,
    value_and_grad,
)
from experiments.bench.rows import Row, Settings, Target
from experiments.peers import protocol
from jaxbp.run.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TINY = ((4, 8, 3), 5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks of a few numbers, and JAX's own promotion: the programs beside jaxbp are written as users write them."""
    monkeypatch.setattr(networks, "NETWORKS", {"4-8-3 / 5": TINY})
    monkeypatch.setattr(value_and_grad, "HIDDEN", ("tanh",))
    monkeypatch.setattr(machine, "SIDES", (16,))
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # which would have every small program compiled again
    monkeypatch.setattr(matmul, "NETWORK", "4-8-3 / 5")
    monkeypatch.setattr(growth, "CURVES", {"batch": {n: ((4, 8, 3), n) for n in (2,)}})
    monkeypatch.setattr(persample, "NETWORKS", {"4-8-3 / 5": TINY})
    machine.matmul_peak.cache_clear()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    machine.matmul_peak.cache_clear()


def test_the_rows_their_json_and_their_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    only = ("value_and_grad", "matmul", "growth")
    assert command.main(["--quick", "--only", *only, "--json", str(file)]) == 0
    written: dict[str, Any] = json.loads(file.read_text())
    assert written["machine"]["packages"]["jax"] == jax.__version__ and written["quick"] is True
    assert written["matmul_peak"]["side"] == 16 and written["matmul_peak"]["flops"] > 0
    rows = written["rows"]
    assert [row["what"].split(" ")[0] for row in rows] == ["time", "bytes", "compile", *["share"] * 2, *["growth:"] * 3]
    assert all(row["value"] > 0 and row["absolute"] > 0 for row in rows)
    for row in rows:
        assert row["spread"] is None or row["spread"][0] <= row["value"] <= row["spread"][1]
    assert [row["at"] for row in rows if row["at"]] == [2, 2, 2]
    for row in rows[:2]:
        spread = row["spread"] and tuple(row["spread"])
        assert row["verdict"] == Row("", "", row["value"], 1.0, "s", Target("≤", 1.0), spread).verdict != ""
    assert rows[2]["verdict"] == ""
    picture = image.imread(file.with_suffix(".png"))
    assert picture.shape[0] > 400 and picture.std() > 0.05
    printed = capsys.readouterr().out
    assert printed.startswith(written["machine"]["processor"]) and "matmul peak: " in printed
    assert "| 4-8-3 / 5, tanh |" in printed and "| bytes ÷ jax.value_and_grad           |    1 |" in printed


@pytest.mark.parametrize(
    ("value", "spread", "target", "verdict", "excess"),
    [
        (1.0, (0.9, 1.1), Target("≤", 1.0), "met", 1.0),
        (1.5, (0.9, 1.6), Target("≤", 1.0), "tie", 1.5),
        (1.5, (1.4, 1.6), Target("≤", 1.0), "missed", 1.5),
        (1.5, None, Target("≤", 1.0), "missed", 1.5),
        (2.0, (1.0, 3.0), Target("≥", 1.5), "met", 0.75),
        (1.2, (1.0, 1.6), Target("≥", 1.5), "tie", 1.25),
        (1.2, (1.0, 1.4), Target("≥", 1.5), "missed", 1.25),
    ],
)
def test_verdicts(
    value: float, spread: tuple[float, float] | None, target: Target, verdict: str, excess: float
) -> None:
    assert Row("what", "case", value, 1.0, "s", target, spread).verdict == verdict
    assert target.excess(value) == pytest.approx(excess)


def test_the_summary_counts_and_names_what_is_beyond_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    at_most = Target("≤", 1.0)
    command.summary(
        [Row("time", name, value, 1.0, "s", at_most, (1.0, 9.0)) for name, value in (("a", 0.5), ("b", 1.5))]
        + [Row("time", "c", 12.0, 1.0, "s", at_most), Row("whole", "d", 123.4, 1.0, "s")]
    )
    printed = capsys.readouterr().out
    assert "| time  |    3 | 0.500 |  1.500 | 12.0 |    ≤ 1 |   1 |   1 |      1 |" in printed
    assert printed.endswith("tie: time, b: 1.500, target ≤ 1\nmissed: time, c: 12.0, target ≤ 1\n")


def test_flops_by_hand() -> None:
    # 5 samples: forward 2·5·2·3 + 2·5·3·4, ∂ℓ/∂w as many, ∂ℓ/∂x only of the second layer.
    assert matmul.flops((2, 3, 4), 5) == 2 * (60 + 120) + 120


def test_rounds_are_more_where_they_are_cheap() -> None:
    assert [Settings().rounds(seconds) for seconds in (1e-4, 0.1, 10)] == [41, 20, 11]
    assert Settings(quick=True).rounds(1e-4) == 3


def test_per_sample_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persample, "TARGETS", {"clipped_mean": persample.TARGETS["clipped_mean"]})
    rows = persample.rows(Settings(quick=True))
    assert [str(row.target) for row in rows] == ["≤ 1.1", "≥ 50", "≥ 100"]
    assert all(row.case == "clipped_mean, 4-8-3 / 5" and row.value > 0 for row in rows)
    assert all(row.spread is None or row.spread[0] <= row.value <= row.spread[1] for row in rows)


def test_another_library_is_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was drawn is not compared. A library whose numbers are twice too large measures something else."""

    def quantities(factor: int) -> Callable[[protocol.Case], dict[str, protocol.Quantity]]:
        made = {protocol.BATCH: 1, "sum": factor, "sum (fast)": factor}
        compared = lambda k: protocol.Quantity(lambda: None, lambda _: [k * case.x, k * case.layers[0][0]])  # noqa: E731
        return lambda case: (
            {name: compared(k) for name, k in made.items()} | {"sum (drawn)": compared(1)._replace(value=lambda _: [])}
        )

    def run(command: list[str]) -> Any:
        monkeypatch.setattr(sys, "argv", command)
        protocol.main("a version", quantities(int(command[0])), lambda call: 7)
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(peers, "run", run)
    case = protocol.Case([(np.ones((3, 4)), np.ones(3))], np.ones((5, 4)), np.ones(5), hidden="tanh")
    right = {"jaxbp": ["1"], "right": ["1"]}
    found = peers.measure(case, right, quantities(1)(case), rounds=2, alternations=2)["right"]
    assert found["versions"] == "a version" and found["bytes"] == dict.fromkeys(found["ratio"], 7)
    assert found["relative_error"] == {protocol.BATCH: 0, "sum": 0, "sum (fast)": 0, "sum (drawn)": None}
    with pytest.raises(AssertionError, match=r"^wrong sum: relative error"):
        peers.measure(case, {"jaxbp": ["1"], "wrong": ["2"]}, quantities(1)(case), rounds=2, alternations=1)


@pytest.mark.parametrize("given", ["lapack=python", "backpack"])
def test_a_library_without_a_script_is_one_line(given: str) -> None:
    with pytest.raises(UserError, match=f"^--peer: got {given}, it should be NAME=PYTHON, NAME one of backpack, "):
        persample.commands([given])


def test_epochs_in_processes_and_a_peer_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch, "DATA", "digits")
    monkeypatch.setattr(epoch, "SIZES", (64, 32, 10))
    monkeypatch.setattr(epoch, "BATCHES", (16,))
    monkeypatch.setattr(epoch, "PACKAGES", {"scikit-learn": "sklearn", "Flax": "no_such_package"})
    notes: list[str] = []
    rows = epoch.rows(Settings(True, {"torch": sys.executable}, notes.append))
    if "torch" not in sys.modules:  # it is no dependency, and not installed here
        assert [note for note in notes if "left out" in note] == [
            "epoch: Flax is left out: it is not installed",
            "epoch: PyTorch is left out: ModuleNotFoundError: No module named 'torch'",
            "epoch: torch.compile is left out: ModuleNotFoundError: No module named 'torch'",
        ]
    (row,) = rows
    assert row.what == "epoch: × faster than scikit-learn" and row.case == "64-32-10 / 16" and row.value > 0
    *_, reached = notes
    assert reached.startswith("epoch: batch 16, test accuracy after 3 epochs: jaxbp 9")
    accuracies = [float(word.rstrip("%,")) for word in reached.split() if "%" in word]
    assert len(accuracies) == 2 and min(accuracies) > 80  # all of them have learned the same data


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "value_and_grd"], "--only: unknown row 'value_and_grd', did you mean 'value_and_grad'? Allowed: v"),
        (["--json", "no/such/folder.json"], "--json: no/such/folder.json can't be written"),
        (["--json", "table.txt"], "--json: table.txt: the name has to end with .json"),
        (["--round", "3"], "command line: unrecognized arguments: --round 3, see "),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"jaxbp: {expected}") and said.err.count("\n") == 1 and not said.out


def test_the_environment_of_a_peer_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []

    def pretend(name: str, arguments: list[str]) -> None:
        done.append(arguments)
        (tmp_path / "peers" / name).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "peers")
    monkeypatch.setattr(environments, "_checked", pretend)
    said: list[str] = []
    pythons = environments.make_all(said.append)
    assert list(pythons) == list(environments.STEPS) and len(said) == len(pythons)
    installs = [arguments for arguments in done if "install" in arguments]
    assert len(installs) == sum(map(len, environments.STEPS.values()))
    for name in ("torch", "opacus", "backpack"):  # PyTorch first: other forms of it are gigabytes
        assert environments.STEPS[name][0] == ("-r", "torch.txt")
    done.clear()
    assert environments.make_all(said.append) == pythons and not done
    monkeypatch.setitem(environments.STEPS, "optax", (("-r", "optax.txt"), ("numpy",)))
    environments.make("optax", said.append)
    assert len(done) == 3  # venv and two installations


def test_an_environment_that_cannot_be_made_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^--peers: the environment of x can't be made: no such thing$"):
        environments._checked("x", [sys.executable, "-c", "import sys; sys.exit('no such thing')"])
