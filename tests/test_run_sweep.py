"""A sweep against the separate runs of its members: parameters bit for bit, lines of metrics.jsonl, what it refuses."""

import csv
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from matplotlib import image
from tiers import slow

from jaxbp.cli import main
from jaxbp.run import config as configs
from jaxbp.run.compute import step as steps
from jaxbp.run.problem import pose
from jaxbp.run.report.metrics import Divergence, EpochRow, MemberRow, Scores
from jaxbp.run.store import runs
from jaxbp.run.sweep import plots as sweep_plots
from jaxbp.run.sweep import scores as sweep_scores
from jaxbp.run.sweep import sweep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `pytest`, unlike `python -m pytest`, does not
from experiments import sweep as study

MOMENTUM = ("--optimizer.arguments", "momentum", "0.9", "--optimizer.weight-decay", "0.1")
ADAM = ("--optimizer.name", "adam", "--model.dtype", "bfloat16", "--optimizer.clip-norm", "1.0")
PRIVATE = ("--privacy.max-norm", "1", "--privacy.noise-multiplier", "1", "--data.standardize", "none")
FILES = ("config.toml", "provenance.json", "metrics.jsonl", "timings.jsonl", "scores.csv", "sweep.png", "scores.png")
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


@pytest.fixture
def iris(tmp_path: Path) -> Path:
    path = tmp_path / "iris.toml"
    path.write_text(IRIS)
    return path


def jaxbp(capsys: pytest.CaptureFixture[str], config: Path, *options: str) -> tuple[int, str]:
    """Exit status and what was printed of `jaxbp run`, into the folder "run" beside the config."""
    status = main(["run", str(config), "--train.folder", str(config.with_name("run")), *options])
    shown = capsys.readouterr()
    return status, shown.err if status else shown.out


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def separate(member: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """The run of a member's own config.toml, and what it said when it diverged."""
    alone = member.parents[2] / f"alone-{member.name}"
    main(["run", str(member / "config.toml"), "--train.folder", str(alone)])
    return alone, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rates", "died"),
    [
        (("--study.quantities", "squared_norms", "--model.label-smoothing", "0.1"), ("0.03", "0.3", "1e+30"), 1),
        *slow((MOMENTUM, ("0.3",), 0), (ADAM, ("0.1",), 0)),
    ],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.production
def test_a_member_is_the_separate_run_bit_for_bit(
    iris: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], rates: tuple[str, ...], died: int
) -> None:
    """Parameters, metrics, records; a learning rate of 1e30 diverges and does not touch its neighbours."""
    with jax.numpy_dtype_promotion("standard"):  # Adam in bfloat16
        status, _ = jaxbp(capsys, iris, *options, "--train.seed", "5", "--sweep.learning-rate", ",".join(rates))
        assert status == 0
        members = sorted((iris.parent / "run" / "members").iterdir())
        assert [m.name for m in members] == [f"seed-5_learning-rate-{rate}" for rate in rates]
        ours, seen = lines(iris.parent / "run"), 0
        for member, rate in zip(members, map(float, rates), strict=True):
            alone, error = separate(member, capsys)
            assert (member / "params.safetensors").read_bytes() == (alone / "params.safetensors").read_bytes()
            tag = {"seed": 5, "learning_rate": rate}
            mine = [line for line in ours if line | tag == line]
            diverged = [line["diverged"] for line in mine if "diverged" in line]
            assert mine == [line | tag for line in lines(alone)]
            assert lines(member) == lines(alone)
            assert (f"diverged: {diverged[0]};" in error) if diverged else (error == "")
            seen += len(diverged)
        assert seen == died


@pytest.mark.production
def test_members_of_other_keys_are_the_separate_runs(iris: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept = ("--sweep.model.sizes", "[[4,8,3],[4,3]]", "--sweep.optimizer.learning-rate", "0.1,0.2")
    assert jaxbp(capsys, iris, *swept)[0] == 0
    members = sorted((iris.parent / "run" / "members").iterdir())
    assert [m.name for m in members] == [
        f"seed-0_learning-rate-{rate}_model.sizes-{sizes}" for rate in (0.1, 0.2) for sizes in ("4-3", "4-8-3")
    ]
    for member in members[::3]:
        alone, _ = separate(member, capsys)
        assert (member / "params.safetensors").read_bytes() == (alone / "params.safetensors").read_bytes()


@pytest.mark.slow
def test_a_sweep_over_other_keys(iris: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two keys of a table in the config: what is written of them, and that it is read again."""
    iris.write_text(IRIS.replace("plots = false", "") + "[sweep]\ntrain.batch_size = [60, 120]\n")
    status, shown = jaxbp(capsys, iris, "--sweep.optimizer.clip-norm", "none,1e-3", "--train.epochs", "1")
    folder = iris.parent / "run"
    assert status == 0 and "sweep of 4: seed 0 × optimizer.clip_norm none, 0.001 × train.batch_size 60, 120" in shown
    assert "best member: " in shown and ", optimizer.clip_norm none, train.batch_size 60\n" in shown
    again = configs.read(folder / "config.toml")
    assert again.sweep.values() == {"train.batch_size": (60, 120), "optimizer.clip_norm": (None, 1e-3)}
    settings = [(line["optimizer.clip_norm"], line["train.batch_size"]) for line in lines(folder)]
    assert settings == [(None, 60), (None, 120), (1e-3, 60), (1e-3, 120)]
    with open(folder / "scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["score"] == "test_loss"]
    assert [row["optimizer.clip_norm"] for row in rows] == ["none", "none", "0.001", "0.001"]
    assert [float(row["mean"]) for row in rows] == [line["test_loss"] for line in lines(folder)]
    own = [configs.read(member / "config.toml") for member in (folder / "members").iterdir()]
    assert {(c.optimizer.clip_norm, c.train.batch_size) for c in own} == set(settings)
    assert all(image.imread(folder / f"{name}.png").std() > 0.02 for name in ("sweep", "scores"))


def test_what_is_written_of_other_keys(iris: Path, tmp_path: Path) -> None:
    """Seeds and learning rates of two batch sizes: the lines of metrics.jsonl, scores.csv and the best member."""
    swept = ("--sweep.train.batch-size", "60,120", "--sweep.seeds", "2", "--sweep.learning-rate", "0.1,0.2")
    found = sweep.prepare(configs.read(iris, swept))
    assert [len(cohort.members) for cohort in found.cohorts] == [4, 4]
    settings = [m.setting for m in found.members]
    assert settings[1] == {"train.batch_size": 60, "learning_rate": 0.2}
    assert found.members[1].name == "seed-0_learning-rate-0.2_train.batch_size-60"
    rows = [
        dataclasses.replace(row(m.learning_rate or 0, m.seed, 1, 0.1 * i), setting=m.setting)
        for i, m in enumerate(found.members)
    ]
    assert list(rows[5].line().items())[:3] == [("seed", 0), ("learning_rate", 0.2), ("train.batch_size", 120)]
    groups = sweep_scores.groups(rows)
    assert "best member: 70.00 %, seed 1, train.batch_size 120, learning rate 0.2" in sweep_scores.best(groups)
    sweep_scores.write(groups, tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        table = [r for r in csv.DictReader(file) if r["score"] == "test_accuracy"]
    assert [(r["train.batch_size"], r["learning_rate"]) for r in table] == [
        ("60", "0.1"),
        ("60", "0.2"),
        ("120", "0.1"),
        ("120", "0.2"),
    ]
    assert [float(r["mean"]) for r in table] == pytest.approx([0.1, 0.2, 0.5, 0.6])
    laid_out = sweep_plots.grid(groups)
    assert (laid_out.key, laid_out.columns, laid_out.other) == ("learning_rate", [0.1, 0.2], "train.batch_size")
    np.testing.assert_allclose(laid_out.values.mean(axis=2), [[10, 20], [50, 60]])
    figure = sweep_plots.against(groups, "the sweep")
    figure.draw_without_rendering()
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == laid_out.rows == ["60", "120"]


def test_the_folds_of_a_cross_validation(iris: Path) -> None:
    """Each is a cohort with all seeds; mean and s.d. of a setting are over folds and seeds, whichever died."""
    found = sweep.prepare(configs.read(iris, ("--sweep.folds", "2", "--sweep.seeds", "2")))
    assert [(m.fold, m.seed) for c in found.cohorts for m in c.members] == [
        *(("1/2", 0), ("1/2", 1)),
        *(("2/2", 0), ("2/2", 1)),
    ]
    assert found.members[2].name == "seed-0_learning-rate-0.1_fold-2-2"
    assert found.members[2].config.data.validation == "2/2"
    assert "sweep of 4: seeds 0 to 1 × 2 folds × learning rate 0.1" in sweep.describe(found)
    (_, y_first), (_, y_second) = (c.setup.problem.raw("validation") for c in found.cohorts)
    assert len(y_first) == len(y_second) == 60
    rows = [dataclasses.replace(row(0.1, m.seed, 1, 0.1 * i), fold=m.fold) for i, m in enumerate(found.members)]
    rows += [dataclasses.replace(gone(0.1, 1, 2), fold="1/2")]
    (group,) = sweep_scores.groups(rows)
    assert sweep_scores.statistics(group.last, "test_accuracy")["mean"] == pytest.approx((0 + 0.2 + 0.3) / 3)
    assert sweep_scores.repeated([group]) == "seeds and folds"
    assert sweep_scores.best([group]).endswith("best member: 30.00 %, seed 1, fold 2/2, learning rate 0.1")
    assert rows[3].line() | {"seed": 1, "fold": "2/2"} == rows[3].line()


def test_a_schedule_is_swept_by_its_peak(iris: Path) -> None:
    schedule = ("--sweep.learning-rate", "0.1,0.2", "--optimizer.learning-rate=", "--optimizer.schedule")
    decays = ("cosine_decay_schedule", "--optimizer.schedule-arguments", "{init_value = 9, decay_steps = 'all'}")
    warms = ("warmup_constant_schedule", "--optimizer.schedule-arguments", "{init_value = 0, warmup_steps = 3}")
    with jax.numpy_dtype_promotion("standard"):
        found = sweep.prepare(configs.read(iris, (*schedule, *decays)))
        warmed = sweep.prepare(configs.read(iris, (*schedule, *warms))).members[0]
        rates = [cohort.setup.spec.optimizer.learning_rate(0) for cohort in found.cohorts]
    assert rates == pytest.approx([0.1, 0.2])
    assert [member.config.optimizer.schedule_arguments["init_value"] for member in found.members] == [0.1, 0.2]
    assert warmed.config.optimizer.schedule_arguments == {"init_value": 0, "peak_value": 0.1, "warmup_steps": 3}
    assert warmed.name == "seed-0_optimizer.schedule_arguments.peak_value-0.1"


def test_members_whose_names_would_be_too_long_have_numbers(iris: Path) -> None:
    wide = str([[4, *[8] * width, 3] for width in (1, 100)])
    found = sweep.prepare(configs.read(iris, ("--sweep.model.sizes", wide)))
    assert [member.name for member in found.members] == ["member-1", "member-2"]


@pytest.mark.slow
def test_members_at_once_agree_with_their_turns(iris: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vmap in float64: sums in another order, nothing else; 4 of 6 at once leaves a rest of 2."""
    options = ("--model.dtype", "float64", "--sweep.seeds", "3", "--sweep.learning-rate", "0.1", "3e38")
    assert jaxbp(capsys, iris, *options)[0] == 0
    (tmp_path / "run").rename(tmp_path / "turns")
    assert jaxbp(capsys, iris, *options, "--sweep.at-once", "4")[0] == 0
    for turns in sorted((tmp_path / "turns" / "members").iterdir()):
        vmapped = tmp_path / "run" / "members" / turns.name
        a, b = (safetensors.numpy.load_file(folder / "params.safetensors") for folder in (turns, vmapped))
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-14 * max(1, np.abs(a[name]).max()))
    assert [line.get("diverged") for line in lines(tmp_path / "turns")] == [
        line.get("diverged") for line in lines(tmp_path / "run")
    ]


@pytest.mark.slow
def test_the_step_is_traced_as_often_for_many_members_as_for_one(iris: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program, however many members; no epoch traces it again."""
    calls: list[int] = []
    found = steps.batch_gradient

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return found(*arguments)

    monkeypatch.setattr(steps, "batch_gradient", counted)
    traced = []
    for seeds in ("1", "5"):
        calls.clear()
        overrides = ("--train.epochs", "3", "--sweep.seeds", seeds, "--sweep.learning-rate", "0.1")
        (cohort,) = sweep.prepare(configs.read(iris, overrides)).cohorts
        assert len(list(sweep.epochs(cohort))) == 3
        traced.append(len(calls))
    assert 0 < traced[0] == traced[1]


@pytest.mark.slow
def test_seeds_alone_keep_the_schedule(iris: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iris.write_text(
        IRIS.replace("learning_rate = 0.1", 'schedule = "linear_schedule"')
        + "[optimizer.schedule_arguments]\ninit_value = 0.5\nend_value = 0.0\ntransition_steps = 4\n"
        + "[sweep]\nseeds = 2\n"
    )
    with jax.numpy_dtype_promotion("standard"):
        status, shown = jaxbp(capsys, iris)
        members = sorted((iris.parent / "run" / "members").iterdir())
        assert [m.name for m in members] == ["seed-0", "seed-1"]
        alone, _ = separate(members[1], capsys)
        assert (members[1] / "params.safetensors").read_bytes() == (alone / "params.safetensors").read_bytes()
    assert status == 0 and "learning rate linear_schedule" in shown
    rates = {(line["epoch"], line["learning_rate"]) for line in lines(iris.parent / "run")}
    assert len(rates) == 2 and max(rate for _, rate in rates) < 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sweep.seeds", "0"), "sweep.seeds: got 0, it should be greater than or equal to 1"),
        (("--sweep.at-once", "0"), "sweep.at_once: got 0, it should be greater than or equal to 1"),
        (("--sweep.learning-rate", "0.1,-1"), "sweep.learning_rate: got -1, it should be greater than or equal to 0"),
        (("--sweep.learning-rate", "0.1,inf"), "sweep.learning_rate: got inf, it should be a finite number"),
        (("--sweep.learning-rate", "0.1;0.2"), "sweep.learning_rate: got '0.1;0.2', it should be a valid array"),
        (("--sweep.learning-rate",), "--sweep.learning-rate: a value is missing"),
        (("--sweep.learning-rates", "1"), "unknown key 'sweep.learning_rates', did you mean 'sweep.learning_rate'?"),
        (("--sweep.learning-rate", "0.1,0.10"), "sweep.learning_rate: 0.1 is there twice"),
        (("--sweep.seeds", "2", "--train.seed", str(2**32 - 1)), "sweep.seeds: got 2, from train.seed 4294967295 on"),
        (("--sweep.seeds", str(2**31 - 1)), "sweep: 2,147,483,647 members, at most 10,000 are allowed"),
        (("--sweep.folds", "1"), "sweep.folds: got 1, it should be greater than or equal to 2"),
        (("--sweep.folds", "5000", "--sweep.seeds", "3"), "sweep: 15,000 members, at most 10,000 are allowed"),
        (
            ("--sweep.folds", "5", "--data.validation", "0.1"),
            "sweep.folds: 5, but data.validation is 0.1; leave one of them out",
        ),
        (
            ("--sweep.folds", "5", "--sweep.data.validation", "0.1,0.2"),
            "sweep.data.validation: sweep.folds gives it a fold; leave one of them out",
        ),
        (
            ("--sweep.folds", "41"),
            "sweep, fold 1/41: data.validation: 1/41: iris has 40 training samples of class 'setosa', fewer than folds",
        ),
        (("--sweep.seeds", "2", "--checkpoint.every", "1"), "checkpoint.every: a sweep writes no checkpoints"),
        (
            ("--sweep.seeds", "2", "--sweep.at-once", "2", "--train.memory", "sqrt"),
            "train.memory: members that share a step save nothing by it; leave out sweep.at_once",
        ),
        (("--sweep.seeds", "2", "--resume"), "so there is nothing to resume"),
        (
            ("--sweep.seeds", "2", "--resume", *PRIVATE),
            "--resume: a private sweep can only begin again: what a member has spent is spent",
        ),
        (("--sweep.seeds", "2", "--train.loggers", "mlflow"), "train.loggers: a sweep has none"),
        (
            ("--sweep.learning-rate", "0.1", "--optimizer.schedule", "linear_schedule"),
            "init_value 0.1: optimizer.learning_rate: set it or optimizer.schedule; both are set",
        ),
        (("--sweep.learning-rate", "0.1", "--optimizer.name", "adm"), "unknown optimizer 'adm', did you mean 'adam'?"),
        (("--sweep.optimizer.name", "sgd,adm"), "sweep, optimizer.name adm: optimizer.name: unknown optimizer 'adm'"),
        (("--sweep.optimizer.nam", "sgd"), "sweep: unknown key 'optimizer.nam', did you mean 'optimizer.name'?"),
        (("--sweep.optimizer.name", "[]"), "sweep.optimizer.name: got [], it needs at least 1 item"),
        (("--sweep.optimizer.name", "sgd,sgd"), "sweep.optimizer.name: sgd is there twice"),
        (
            ("--sweep.train.batch-size", "50,0"),
            "sweep: train.batch_size: got 0, it should be greater than or equal to 1",
        ),
        (("--sweep.model.sizes", "4,8,3"), "sweep: model.sizes: got 4, it should be a valid array"),
        (
            ("--sweep.model.sizes", "[[4,3],[4,2]]"),
            "sweep, model.sizes 4-2: model.sizes: ends with 2, iris has 3 classes",
        ),
        (("--sweep.optimizer.arguments.b1", "0.5"), "arguments.b1 0.5: optimizer.arguments: sgd has no argument 'b1'"),
        (
            ("--sweep.train.folder", "a,b"),
            "sweep.train.folder: it can't be swept, for it belongs to the sweep as a whole",
        ),
        (
            ("--sweep.mesh.data", "1,2"),
            "sweep.mesh.data: it can't be swept: a sweep runs on one device and writes no ch",
        ),
        (
            ("--sweep.seeds", "2", "--sweep.train.seed", "1,5"),
            "sweep.train.seed: sweep.seeds counts on from train.seed",
        ),
        (
            ("--sweep.learning-rate", "0.1", "--sweep.optimizer.learning-rate", "0.2"),
            "sweep.optimizer.learning_rate: sweep.learning_rate is the same; leave one of them out",
        ),
        (
            ("--sweep.train.memory", "store-all,sqrt", "--sweep.at-once", "2"),
            "sweep, train.memory sqrt: train.memory: members that share a step save nothing by it",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    iris: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    status, shown = jaxbp(capsys, iris, *options)
    assert (status, shown.count("\n")) == (2, 1)
    assert expected in shown
    assert not (iris.parent / "run").exists()


@pytest.mark.parametrize("given", [("0.1,0.2",), ("0.1", "0.2"), ("0.1,", "0.2"), ("0.1, 0.2",)])
def test_learning_rates_come_with_commas_or_blanks(iris: Path, given: tuple[str, ...]) -> None:
    assert configs.read(iris, ("--sweep.learning-rate", *given)).sweep.learning_rate == (0.1, 0.2)


def test_the_folder_of_a_sweep(iris: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it holds; that predict takes a member, and says so of the sweep; that the config runs again."""
    iris.write_text(IRIS.replace("plots = false", "") + "[sweep]\nseeds = 2\nlearning_rate = [0.1, 1e30]\n")
    status, shown = jaxbp(capsys, iris)
    folder = iris.parent / "run"
    assert status == 0 and "2 of 2" in shown and "best member: " in shown
    names = {path.name for path in folder.iterdir()}
    assert names == {*FILES, "members"}
    assert configs.read(folder / "config.toml").sweep == configs.SweepConfig(seeds=2, learning_rate=(0.1, 1e30))
    assert all(image.imread(folder / f"{name}.png").std() > 0.02 for name in ("sweep", "scores"))
    last = [line["test_accuracy"] for line in lines(folder) if line["epoch"] == 2 and "diverged" not in line]
    with open(folder / "scores.csv", newline="") as file:
        table = {(row["learning_rate"], row["score"]): row for row in csv.DictReader(file)}
    row = table["0.1", "test_accuracy"]
    assert (row["members"], row["diverged"], float(row["mean"])) == ("2", "0", pytest.approx(np.mean(last)))
    assert (float(row["sd"]), float(row["max"])) == (pytest.approx(np.std(last, ddof=1)), max(last))
    assert list(table["1e+30", "test_accuracy"].values())[2:] == ["0", "2", "", "", "", ""]

    np.savez(iris.with_name("new.npz"), x=np.ones((3, 4)))
    data = ("--data", str(iris.with_name("new.npz")))
    assert main(["predict", str(folder / "members" / "seed-1_learning-rate-0.1"), *data]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    for command in (("predict", str(folder), *data), ("study", str(folder)), ("trace", str(folder), "--sample", "1")):
        assert main(list(command)) == 2
        error = capsys.readouterr().err
        assert (
            error
            == f"jaxbp: {folder}: a sweep; name one of its members, such as {folder}/members/seed-0_learnin"
            + ("g-rate-0.1\n")
        )


def test_a_sweep_of_which_nothing_is_left(iris: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 3; the members keep the parameters that they began with."""
    status, shown = jaxbp(capsys, iris, "--sweep.seeds", "2", "--sweep.learning-rate", "1e30")
    assert status == 3 and shown.startswith("jaxbp: diverged: every member of the sweep did") and "epoch 1" in shown
    assert [line["seed"] for line in lines(iris.parent / "run") if "diverged" in line] == [0, 1]
    for member in (iris.parent / "run" / "members").iterdir():
        problem = pose(configs.read(member / "config.toml"))
        problem.model(problem.initial()).save(iris.parent)
        assert (member / "params.safetensors").read_bytes() == (iris.parent / "params.safetensors").read_bytes()


def test_a_stopped_sweep_keeps_its_last_whole_epoch(
    iris: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    after = []
    epochs = sweep.epochs

    def stopped(found: sweep.Cohort) -> Any:
        for epoch in epochs(found):
            after.append(epoch.params)
            os.kill(os.getpid(), signal.SIGTERM)
            yield epoch

    monkeypatch.setattr(sweep, "epochs", stopped)
    status, shown = jaxbp(capsys, iris, "--sweep.seeds", "2")
    assert (status, shown) == (143, "jaxbp: stopped after epoch 1 of 2\n")
    assert [(line["seed"], line["epoch"]) for line in lines(iris.parent / "run")] == [(0, 1), (1, 1)]
    for i in range(2):
        folder = iris.parent / "run" / "members" / f"seed-{i}_learning-rate-0.1"
        saved = safetensors.numpy.load_file(folder / "params.safetensors")
        np.testing.assert_array_equal(saved["layer.1.w"], after[0][0].w[i])
        assert runs.read(folder).state == "unfinished"


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_ends_with_the_same_bytes(
    iris: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cross-validation with early stopping, stopped in its second fold: the first one is not trained again."""
    options = ("--sweep.folds", "3", "--sweep.seeds", "2", "--train.patience", "2", "--train.epochs", "4")
    assert jaxbp(capsys, iris, *options)[0] == 0
    whole = (iris.parent / "run").rename(iris.with_name("whole"))
    epochs, trained = sweep.epochs, []

    def stopped(found: sweep.Cohort) -> Any:
        trained.append(found.members[0].fold)
        for epoch in epochs(found):
            yield epoch
            if trained == ["1/3", "2/3"]:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sweep, "epochs", stopped)
    assert jaxbp(capsys, iris, *options)[0] == 143
    assert jaxbp(capsys, iris, *options, "--train.epochs", "5")[1].endswith(
        "is a sweep: train.epochs was 4, now 5; --new, or another train.folder, begins a new run\n"
    )
    status, shown = jaxbp(capsys, iris, *options)
    assert status == 0 and "goes on after 1 of 3 parts" in shown
    assert trained == ["1/3", "2/3", "2/3", "3/3"]
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) == 5 + 6 * 4 and files == sorted(
        path.relative_to(iris.parent / "run") for path in (iris.parent / "run").rglob("*") if path.is_file()
    )
    for file in files:
        if file.name not in ("provenance.json", "timings.jsonl"):
            assert (iris.parent / "run" / file).read_bytes() == (whole / file).read_bytes(), file


def row(rate: float, seed: int, epoch: int, score: float, name: str = "accuracy") -> MemberRow:
    train, test = (Scores(loss, **{name: score}) for loss in (1.0, 2.0))
    return MemberRow(seed, rate, {"learning_rate": rate}, EpochRow(epoch, epoch, train, test, rate, [], []))


def gone(rate: float, seed: int, epoch: int) -> MemberRow:
    return MemberRow(seed, rate, {"learning_rate": rate}, Divergence(epoch, epoch, "…"))


def test_scores_by_hand() -> None:
    """0.1: two seeds; 0.3: one of them diverged in epoch 2; 9.0: both, in epoch 1."""
    read = [row(r, s, 1, 0.1) for r, s in ((0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1))]
    read += [row(0.1, 0, 2, 0.5), row(0.1, 1, 2, 0.7), row(0.3, 0, 2, 0.65), gone(0.3, 1, 2), gone(9.0, 0, 1)]
    found = sweep_scores.groups(read)
    assert [(g.label, len(g.last), len(g.diverged)) for g in found] == [
        ("0.1", 2, 0),
        ("0.3", 1, 1),
        ("9.0", 0, 1),
    ]
    assert sweep_scores.statistics(found[0].last, "test_accuracy") == pytest.approx(
        {"mean": 0.6, "sd": 0.02**0.5, "min": 0.5, "max": 0.7}
    )
    assert sweep_scores.statistics(found[1].last, "test_accuracy")["sd"] is None
    said = "best mean test accuracy: 65.00 %, learning rate 0.3\nbest member: 70.00 %, seed 1, learning rate 0.1"
    assert sweep_scores.best(found) == said
    errors = [row(0.1, 0, 1, 5.0, "rmse"), row(0.3, 0, 1, 4.0, "rmse")]
    assert "best mean test rmse: 4, learning rate 0.3" in sweep_scores.best(sweep_scores.groups(errors))


@pytest.mark.parametrize("name", ["accuracy", "rmse"])
@pytest.mark.parametrize(("seeds", "epochs"), [(1, 1), (5, 20)])
def test_the_pictures(name: str, seeds: int, epochs: int) -> None:
    read = [
        row(rate, seed, epoch, rate * epoch / (30 + seed), name)
        for rate in (0.1, 0.9)
        for seed in range(seeds)
        for epoch in range(1, epochs + 1)
    ]
    found = sweep_scores.groups([*read, gone(0.9, seeds, 1)])
    curves, rates = sweep_plots.curves(found, "the sweep"), sweep_plots.against(found, "the sweep")
    for figure in (curves, rates):
        figure.draw_without_rendering()
        assert "the sweep" in figure.get_suptitle()
    (train_loss, train, test_loss, test), legend = curves.axes, curves.legends[0]
    assert train.get_ylim() == test.get_ylim() and train_loss.get_ylim() == test_loss.get_ylim()
    assert [label.get_text() for label in legend.get_texts()] == ["0.1", f"0.9, 1 of {seeds + 1} diverged"]
    against, heat = rates.axes[:2]
    assert (against.get_xlabel(), against.get_xscale()) == ("learning rate", "log")
    assert [label.get_text() for label in heat.get_xticklabels()] == ["0.1", "0.9"]
    assert [label.get_text() for label in heat.get_yticklabels()] == [str(seed) for seed in range(seeds + 1)]
    drawn = np.ma.filled(heat.images[0].get_array(), np.nan)
    factor = 100 if name == "accuracy" else 1
    assert drawn[0, 1] == pytest.approx(factor * 0.9 * epochs / 30) and np.isnan(drawn[seeds, 1])
    assert "1 diverged" in [text.get_text() for text in against.texts]


@pytest.mark.slow
def test_the_study(iris: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iris.write_text(IRIS + "[sweep]\nseeds = 2\n")
    study.main(["--config", str(iris), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [way["same_bits"] for way in found["ways"].values()][:2] == [2, 2]
    assert found["ways"][study.VMAP]["largest_relative_difference"] < 1e-5  # 6 steps in float32
    assert all(way["same_test_score"] == 2 for way in found["ways"].values())
    assert image.imread(tmp_path / "sweep.png").std() > 0.02
    iris.write_text(IRIS)
    with pytest.raises(SystemExit) as stop:
        study.main(["--config", str(iris), "--out", str(tmp_path / "none")])
    assert stop.value.code == 2 and "sweep.seeds" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
