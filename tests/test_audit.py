"""`jaxbp audit`: it is content with a right step, and not with one whose clipping or noise is gone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib import image
from tiers import slow

from jaxbp import persample, private
from jaxbp.cli import main
from jaxbp.run import audit, loop
from jaxbp.run import config as configs

DIGITS = """
[data]
name = "digits"
standardize = { mean = 8.0, scale = 6.0 }
[model]
sizes = [64, 256, 10]
hidden = "relu"
[optimizer]
learning_rate = 0.1
arguments = { momentum = 0.9 }
[train]
epochs = 40
batch_size = 128
[privacy]
max_norm = 10.0
epsilon = 2.0
accountant = "rdp"
seed = 0
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("digits.toml").write_text(DIGITS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    """0.05^(1/100) for 100 right guesses of 100; half of them right prove nothing."""
    p = 0.05 ** (1 / 100)
    assert audit.lower_bound(100, 100) == pytest.approx(np.log(p / (1 - p)))
    assert audit.lower_bound(50, 100) == audit.lower_bound(0, 100) == 0


@pytest.mark.slow
def test_a_right_run_keeps_its_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "digits.toml"]) == 0
    said = capsys.readouterr().out
    assert "the promise held" in said and "claimed: ε = 2" in said
    assert image.imread("digits_audit.png").std() > 0.05
    assert main(["audit", "digits.toml"]) == 2
    assert "digits_audit.png exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["clipping", "noise"])
def test_a_run_without_clipping_or_noise_breaks_it(
    gone: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without clipping the sensitivity says so, without noise the canaries. Programs that were compiled with it go."""
    jax.clear_caches()
    if gone == "noise":
        monkeypatch.setattr(private, "noisy", lambda tree, deviation, key: tree)
    else:
        unclipped = lambda f, bound, *rest: persample.clipped_mean(f, 1e6, *reversed(rest[:2])).mean  # noqa: E731
        monkeypatch.setattr(private, "clipped_mean", unclipped)
    assert main(["audit", "digits.toml"]) == 1
    assert "THE PROMISE IS BROKEN" in capsys.readouterr().out
    jax.clear_caches()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"privacy": {}}, "it has no [privacy] table, so there is no promise to audit"),
        *slow(({"train": {"epochs": 1}}, "--canaries: got 4, allowed: 8 to 718, half of the samples")),
    ],
)
def test_what_can_not_be_audited_is_one_line(
    table: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = configs.to_dict(configs.read(Path("digits.toml"))) | table
    import tomli_w

    Path("other.toml").write_text(tomli_w.dumps(tables))
    assert main(["audit", "other.toml", "--canaries", "4"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_sensitivity_of_a_small_run_in_float32() -> None:
    less = ["--train.memory", "sqrt", "--train.micro-batches", "2"]
    config = configs.read(Path("digits.toml"), [*less, "--privacy.adaptive.quantile", "0.5"])
    setup = loop.prepare(dataclasses.replace(config))
    moved, most = audit.sensitivity(setup, setup.problem.initial())
    assert moved["NaN"] == moved["∞"] == 0 and 0.99 < moved["itself"] <= most < 1.0001
    assert {by for kind, by in moved.items() if kind.endswith("; of norms ≤ C, in ½")} == {0.0, 1.0}
