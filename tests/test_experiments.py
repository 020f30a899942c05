"""The studies in experiments/: what they select and rank, against cases done by hand, and each of them on digits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from experiments import (
    autoencoder,
    closed_forms,
    curvature,
    edge_of_stability,
    gpt_noise_scale,
    layers,
    lds,
    mislabelled,
    noise_scale,
    private,
    private_step,
    pruning,
    recipe,
)
from experiments.peers import protocol
from jaxbp import MLP, Affine, models
from jaxbp.private import Accounting
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.compute.epoch import evaluate
from jaxbp.run.config import Config
from jaxbp.run.loop import Setup
from jaxbp.run.report.metrics import StepRecord

pytestmark = pytest.mark.slow

DIGITS = """
[data]
name = "digits"
standardize = "global"
[model]
sizes = [64, 32, 10]
[optimizer]
learning_rate = 0.2
[train]
epochs = 2
batch_size = 32
[study]
quantities = ["noise_scale"]
every = 2
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "digits.toml"
    written.write_text(DIGITS)
    return written


@pytest.fixture
def config(path: Path) -> Config:
    return configs.read(path)


# --- mislabelled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10])
def test_flipping_moves_exactly_the_share_to_other_classes(classes: int) -> None:
    y = (np.arange(3000) % classes).astype(np.int32)
    labels, flipped = mislabelled.flip_labels(y, classes, 0.1, seed=0)
    assert flipped.sum() == 300
    np.testing.assert_array_equal(labels != y, flipped)
    assert labels.dtype == y.dtype and labels.min() >= 0 and labels.max() < classes
    # Each of the other classes is as likely: with 300 flips none of them stays away (probability 10⁻¹³ at most).
    assert set((labels - y)[flipped] % classes) == set(range(1, classes))


def test_the_seed_decides_which_labels_are_flipped() -> None:
    y = np.zeros(1000, np.int32)
    first, again, other = (mislabelled.flip_labels(y, 10, 0.1, seed)[1] for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(("inspected", "expected"), [(0.0, 0.0), (0.1, 0.5), (0.2, 0.5), (0.3, 1.0), (1.0, 1.0)])
def test_share_found_in_a_ranking_done_by_hand(inspected: float, expected: float) -> None:
    scores = np.array([3.0, 10, 5, 9, 4, 8, 1, 2, 7, 6])
    flipped = np.isin(scores, [10, 8])  # first and third
    assert mislabelled.share_found(scores, flipped, inspected) == expected


def test_quality_is_of_the_average_and_of_each_network() -> None:
    flipped = np.arange(10) < 2
    right, wrong = np.where(flipped, 3.0, 0), np.where(flipped, 0.0, 1)  # their average ranks as the first does
    found = mislabelled.quality(np.stack([right, wrong]), flipped)
    assert found["auc"] == 1 and found["auc_of_one_network"] == 0.5
    assert (found["found_in_top_10_percent"], found["found_in_top_20_percent"]) == (0.5, 1)


def test_the_scores_are_those_of_softmax_and_of_every_checkpoint(path: Path) -> None:
    halved = "schedule = 'piecewise_constant_schedule'\nschedule_arguments.init_value = 0.2"
    path.write_text(
        DIGITS.replace("learning_rate = 0.2", f"{halved}\nschedule_arguments.boundaries_and_scales.46 = 0.5")
    )
    with jax.numpy_dtype_promotion("standard"):  # as Optax's schedules have it
        _compare_scores(loop.prepare(configs.read(path)))


def _compare_scores(setup: Setup) -> None:
    scores, accuracy = mislabelled.scores_over_training(setup)
    assert {name: array.shape for name, array in scores.items()} == dict.fromkeys(mislabelled.NAMES, (3, 1437))
    rows, train = [epoch.row for epoch in loop.epochs(setup)], setup.problem.on_device("train")
    assert accuracy == rows[-1].test.accuracy
    evaluation = evaluate(setup.problem.net, setup.program.params, *train)
    error = jax.nn.softmax(evaluation.output) - jax.nn.one_hot(train.y, 10, dtype=jnp.float32)
    # δ is a difference of numbers up to 1, each from sums of at most 64 products: absolute error of some ε · 64.
    close = {"rtol": 1e-5, "atol": 64 * float(np.finfo(np.float32).eps)}
    np.testing.assert_allclose(scores["el2n"][2], np.linalg.norm(np.asarray(error), axis=1), **close)
    np.testing.assert_allclose(scores["loss"][2], evaluation.loss, **close)
    rates = [row.learning_rate for row in rows]
    assert rates == pytest.approx([0.2, 0.1])  # each checkpoint has its own
    summed = sum(rate * scores["grand"][i].astype(np.float64) ** 2 for i, rate in enumerate(rates, 1))
    np.testing.assert_allclose(scores["self_influence"][2], summed, rtol=1e-12)
    assert (scores["self_influence"][0] == 0).all()


# --- noise scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("records", "windows"), [(1, 1), (1, 40), (5, 3), (4690, 25), (30, 1000)])
def test_windows_cover_every_record_once(records: int, windows: int) -> None:
    edges = noise_scale.window_edges(records, windows)
    assert edges[0] == 0 and edges[-1] == records
    assert (np.diff(edges) > 0).all() and len(edges) <= windows + 1


def record(step: int, trace: float, squared_gradient: float) -> StepRecord:
    scale = {"trace": trace, "squared_gradient": squared_gradient}
    return StepRecord(1, step, float(step), {"noise_scale": scale})


def test_a_window_averages_before_it_divides() -> None:
    found = noise_scale.averaged([record(1, 2.0, 1.0), record(4, 4.0, -0.5), record(16, 6.0, 2.5)])
    assert found == pytest.approx({"step": 4, "loss": 7, "noise_scale": 4})  # 12 / 3; the ratios are 2, −8 and 2.4
    assert noise_scale.averaged([record(1, 2.0, -1.0), record(2, 2.0, 0.5)])["noise_scale"] is None


GPT = """
[data]
name = "words.txt"
block = 8
[model]
kind = "gpt"
arguments = { layers = 1, heads = 2, width = 4 }
[optimizer]
learning_rate = 0.1
[train]
epochs = 1
batch_size = 12
"""


def test_the_noise_scale_of_some_layers_is_the_ratio_of_their_sums() -> None:
    recorded = [
        StepRecord(1, step, 0.0, {"noise_scale": {"trace_by_layer": t, "squared_gradient_by_layer": g}})
        for step, (t, g) in enumerate([([2.0, 6.0], [1.0, 2.0]), ([4.0, 6.0], [2.0, 1.0]), ([1.0, 1.0], [0.5, -2.0])])
    ]
    found = gpt_noise_scale.windows(recorded, ["normalisation", "attention"], 2)
    assert [found[kind][0] for kind in ("all", "normalisation", "attention")] == [3.0, 2.0, 4.0]
    assert np.isnan(gpt_noise_scale.windows(recorded, ["attention"] * 2, 1)["all"]).tolist() == [False, False, True]


def test_the_study_of_a_gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("the noise of a gradient is what its samples do not agree on. " * 20)
    (tmp_path / "gpt.toml").write_text(GPT)
    results = run(gpt_noise_scale.main, "gpt_noise_scale", tmp_path / "gpt.toml", "--window", "2", "--rounds", "1")
    kinds = ["tables and head"] * 2 + ["normalisation", *["attention"] * 2, "normalisation", *["perceptron"] * 2]
    assert results["kinds"] == [*kinds, "normalisation", "tables and head"]
    assert len(results["noise_scale"]["all"]) == len(results["step"]) > 3
    assert results["slowdown"]["value"] > 0


# --- pruning ----------------------------------------------------------------------------------------------------------


def test_the_easiest_are_pruned_or_as_many_at_random() -> None:
    scores = np.random.default_rng(0).permutation(1000) / 1000
    kept, other = (pruning.subsets(scores, 0.3, seed) for seed in (0, 1))
    assert {name: len(set(rows)) for name, rows in kept.items()} == {"all": 1000, "el2n": 700, "random": 700}
    assert scores[kept["el2n"]].min() == 0.3
    assert (kept["el2n"] == other["el2n"]).all() and (kept["random"] != other["random"]).any()
    # The mean of 700 of 1000 evenly spaced numbers drawn without replacement has the standard deviation 0.006.
    assert abs(scores[kept["random"]].mean() - 0.5) < 0.03


def test_fewer_samples_are_trained_on_for_as_many_steps(config: Config) -> None:
    setup = loop.prepare(config)  # 1,437 samples: 45 steps an epoch
    few = pruning.trained_on(setup, np.arange(480))  # 15 steps an epoch
    assert [row["step"] for row in few] == [15, 30, 45, 60, 75, 90]
    everything = pruning.trained_on(setup, np.arange(1437))
    assert everything[-1]["step"] == 90
    assert few[-1]["train_loss"] < everything[-1]["train_loss"]  # its own training set, seen three times as often


def test_the_steps_of_the_pruning_config_come_out_even() -> None:
    config = configs.read(pruning.CONFIG)
    all_steps, pruned_steps = (samples // config.train.batch_size for samples in (60_000, 42_000))
    assert all_steps * config.train.epochs % pruned_steps == 0
    assert config.optimizer.schedule_arguments["decay_steps"] == all_steps * config.train.epochs


# --- the commands -----------------------------------------------------------------------------------------------------


def run(main: Callable[[list[str]], None], name: str, path: Path, *options: str) -> dict[str, Any]:
    """The JSON that the command wrote; its picture has been read as well."""
    out = path.parent / "out"
    main(["--config", str(path), "--out", str(out), *options])
    assert {file.name for file in out.iterdir()} == {f"{name}.json", f"{name}.png"}
    picture = image.imread(out / f"{name}.png")
    assert picture.shape[0] > 400 and picture.std() > 0.05
    results: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    assert results["config"]["data"]["name"] in ("digits", "words.txt") and results["seconds"] > 0
    return results


def test_mislabelled(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(mislabelled.main, "mislabelled", path, "--seeds", "2")
    assert (results["samples"], results["flipped"], results["seeds"]) == (1437, 144, [0, 1])
    for rows in results["by_epoch"].values():
        assert rows[-1]["epoch"] == 2
        assert rows[-1]["auc"] > 0.9  # a score of the labels before they were flipped is at 0.5
        assert rows[-1]["found_in_top_10_percent"] <= rows[-1]["found_in_top_20_percent"]
    assert abs(results["by_epoch"]["el2n"][0]["auc"] - 0.5) < 0.15  # at initialisation no score knows anything
    assert "| self-influence |      2 |" in capsys.readouterr().out


def test_noise_scale(path: Path) -> None:
    results = run(noise_scale.main, "noise_scale", path, "--windows", "4")
    assert results["records"] == 45 and [row["epoch"] for row in results["epochs"]] == [1, 2]
    whole = results["training_set"]
    assert [row["step"] for row in whole] == [0, 45, 90]
    assert whole[2]["noise_scale"] > 3 * whole[0]["noise_scale"] > 0  # it grows while the loss falls
    assert whole[2]["train_loss"] < results["windows"][0]["loss"]


def test_pruning(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(pruning.main, "pruning", path, "--seeds", "2", "--scoring-seeds", "1")
    assert (results["seeds"], results["scoring_seeds"]) == ([0, 1], [2])
    found = results["summary"]
    assert {name: row["samples"] for name, row in found.items()} == {"all": 1437, "el2n": 1006, "random": 1006}
    assert {name: row["steps"] for name, row in found.items()} == {"all": 90, "el2n": 96, "random": 96}
    each = [runs[-1]["test_accuracy"] for runs in results["runs"]["random"]]
    assert found["random"]["mean_test_accuracy"] == pytest.approx(sum(each) / 2)
    assert found["random"]["sd_test_accuracy"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    shares = list(results["pruned_by_class"].values())
    assert len(shares) == 10 and abs(np.mean(shares) - 0.3) < 0.02  # the classes of digits have nearly the same size
    assert "| pruned at random      |   1,006 |" in capsys.readouterr().out


def images(samples: int, classes: int = 10) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(samples)
    y = rng.integers(classes, size=samples)
    x = np.eye(classes)[y] @ rng.uniform(size=(classes, 784)) + 0.1 * rng.normal(size=(samples, 784))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)


def test_the_edge_of_stability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sharpness is that of the initial parameters, and gradient descent has begun."""
    x, y = images(40)
    x, y = x[:, :196] / 4, jax.nn.one_hot(y, 10, dtype=jnp.float32)
    monkeypatch.setattr(edge_of_stability, "problem", lambda config: (x, y))
    edge_of_stability.main(["--steps", "100", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "edge_of_stability.json").read_text())
    run = found["runs"]["0.2"]
    assert len(run["loss"]) == 2 and run["loss"][1] < run["loss"][0]
    assert found["summary"]["0.2"]["start"] == pytest.approx(0.1 * run["sharpness"][0])
    assert run["residual"][0] < 1e-3 * run["sharpness"][0] and (tmp_path / "edge_of_stability.png").exists()


def test_the_linear_datamodeling_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 for the losses themselves, for a sample that helps lowers a loss; one of the methods sees it."""
    halves = np.random.default_rng(0).permuted(np.tile([0.0, 1.0], (30, 10)), axis=1)
    score = np.random.default_rng(1).normal(size=(20, 3))
    assert lds.lds(score, halves, -(halves @ score)) == pytest.approx(1)
    assert lds.lds(-score, halves, -(halves @ score)) == pytest.approx(-1)
    for name, value in {"TRAIN": 128, "EPOCHS": 3, "problem": lambda config: (images(128), images(8))}.items():
        monkeypatch.setattr(lds, name, value)
    lds.main(["--halves", "12", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "lds.json").read_text())["lds"]
    assert len(found) == 6 and all(-1 <= value <= 1 for value in found.values()) and max(found.values()) > 0.3


def test_closed_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of theory to rounding; the kernel's eigenvalues and loss of every step."""
    monkeypatch.setattr(closed_forms, "LARGEST", 3)
    x, y = jax.random.normal(jax.random.key(0), (7, 4), jnp.float64), jnp.arange(7) % 3
    regression = closed_forms.softmax_regression(x, y, 3)
    assert regression["difference"] < 1e-12 and regression["rank"] == 2 * 5 and regression["parameters"] == 15
    assert closed_forms.rank((3, 2, 2), samples=3) == {"rank": 3, "bound": 3, "parameters": 14}
    assert max(closed_forms.deep_linear((3, 2, 2), samples=4).values()) < 1e-14
    kernel = closed_forms.kernel_over_training((4, 5, 3), x, y, (0, 3))
    assert [len(values) for values in kernel["eigenvalues"]] == [7, 7] and kernel["loss"][1] < kernel["loss"][0]


def test_flattened_images_with_channels_first() -> None:
    """PyTorch's dense layer gives the same of channels, height, width."""
    size = layers.FLATTENED
    x, w = (np.random.default_rng(0).normal(size=shape) for shape in (size, (3, np.prod(size))))
    moved, b = layers.channels_first([w, np.zeros(3)])
    np.testing.assert_allclose(moved @ np.moveaxis(x, -1, 0).ravel(), w @ x.ravel(), rtol=1e-12)
    assert b.shape == (3,)


def test_a_gpt_for_other_libraries(tmp_path: Path) -> None:
    """Its arrays come in pairs, in the order of PyTorch's parameters: tables, norm, q k v, output, norm, up, down."""
    net, tokens = models.gpt((4,), 5, layers=1, width=8), np.zeros((3, 4), np.int32)
    arrays = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(net.parameters)]
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    protocol.write(tmp_path / "case.npz", protocol.Case(pairs, tokens, tokens, hidden="gelu_tanh"))
    case = protocol.read(str(tmp_path / "case.npz"))
    block = [((8,), (8,)), ((24, 8), (24,)), ((8, 8), (8,)), ((8,), (8,)), ((32, 8), (32,)), ((8, 32), (8,))]
    assert [(w.shape, b.shape) for w, b in case.layers] == [((5, 8), (4, 8)), *block, ((8,), (8,)), ((5, 8), (5,))]
    assert case.tokens and not case._replace(x=np.zeros((3, 4))).tokens


def test_evidence_with_the_biases_apart() -> None:
    """Inputs of mean 0 have no products with the bias; one layer's K-FAC of equal samples is exact."""
    x, net, y = jax.random.normal(jax.random.key(0), (1, 4), jnp.float64), MLP((4, 3)), jnp.zeros(2, int)
    params = (Affine(jax.random.normal(jax.random.key(1), (3, 4), jnp.float64), jnp.ones(3)),)
    centred = curvature.evidences(net, params, jnp.concatenate([x, -x]), y)
    assert float(centred["apart"]) == pytest.approx(float(centred["joined"]), rel=1e-12)
    equal = curvature.evidences(net, params, jnp.concatenate([x, x]), y)
    assert float(equal["exact"]) == pytest.approx(float(equal["joined"]), rel=1e-12)
    assert float(equal["apart"]) < float(equal["joined"]) - 1e-3


def test_an_autoencoder_is_tuned_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(config: Path, samples: int, to: Path) -> None:
        x = np.random.default_rng(0).uniform(size=(samples, 12)).astype(np.float32)
        np.savez(to, x=x, y=x, x_test=x[:9], y_test=x[:9])

    small = {"images": written, "SIZES": [12, 4, 12], "BATCH": 20}
    small["GRIDS"] = {name: values[2:4] for name, values in autoencoder.GRIDS.items()}
    for name, value in small.items():
        monkeypatch.setattr(autoencoder, name, value)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax has it
        autoencoder.main(["--epochs", "2", "--samples", "60", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "autoencoder.json").read_text())["optimizers"]
    seconds = found["kfac"]["epochs"][-1]["seconds"]
    for name, run in found.items():
        best = min((loss, i) for i, loss in enumerate(run["grid"]) if loss is not None)
        assert run["values"] == autoencoder.GRIDS[name][best[1]]
        assert run["epochs"][0]["train_loss"] == pytest.approx(best[0])
        assert len(run["epochs"]) == 2 if name == "kfac" else run["epochs"][-1]["seconds"] >= seconds


@pytest.mark.parametrize(
    ("main", "change", "options", "expected"),
    [
        (mislabelled.main, ("", ""), ["--flipped", "1.5"], "mislabelled: --flipped: 1.5; it has to lie between 0 and"),
        (mislabelled.main, ("", ""), ["--early", "3"], "mislabelled: --early 3, --seeds 5: allowed: epochs 1 to 2, a"),
        (mislabelled.main, ("[64, 32, 10]", '[64, 10]\nloss = "hinge"'), [], "mislabelled: model.loss: EL2N needs"),
        (mislabelled.main, ("[64, 32, 10]", "[64, 10]\nlabel_smoothing = 0.1"), [], "mislabelled: model.loss: EL2N"),
        (noise_scale.main, ('["noise_scale"]', '["grand"]'), [], "noise_scale: study.quantities: this study needs"),
        (pruning.main, ("", ""), ["--pruned", "0"], "pruning: --pruned: 0.0; it has to lie between 0 and 1"),
        (pruning.main, ("digits", "digit"), [], "pruning: data.name: 'digit' is not a data set"),
    ],
)
def test_what_does_not_fit_is_one_line(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], None],
    change: tuple[str, str],
    options: list[str],
    expected: str,
) -> None:
    path.write_text(DIGITS.replace(*change, 1))
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(path), "--out", str(path.parent), *options])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(expected) and said.count("\n") == 1


def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(noise_scale, "measure", interrupted)
    with pytest.raises(SystemExit) as stop:
        noise_scale.main([])
    assert stop.value.code == 130 and capsys.readouterr().err == "noise_scale: interrupted\n"


def test_without_mnist_the_last_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAXBP_DATA", str(tmp_path))
    monkeypatch.setenv("JAXBP_MIRROR", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SystemExit) as stop:
        noise_scale.main(["--out", str(tmp_path)])
    said = capsys.readouterr().err.splitlines()  # before it come the attempts to download
    assert stop.value.code == 2 and said[-1].startswith("noise_scale: cannot download mnist")
    assert "`jaxbp data import mnist PATH`" in said[-1]


# --- private ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["private", "private_fashion"])
def test_private_runs_spend_their_budget_and_no_more(name: str) -> None:
    script = recipe.read(private.Script, private.CONFIG.with_stem(name))
    for run in script.runs:
        privacy = private.config_of(script, run, 60_000, seed=0).privacy
        assert privacy.noise_multiplier and privacy.seed is None
        steps = run.epochs * -(-60_000 // run.batch_size)
        accounting = Accounting(run.batch_size / 60_000, steps, script.delta, pca_noise=run.pca_noise)
        assert 0.99 * run.epsilon < accounting.epsilon(privacy.noise_multiplier) <= run.epsilon


def test_private_runs_of_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "private.toml"
    config.write_text(
        """
        data = "digits"
        inputs = 20
        hidden = 16
        delta = 1e-4
        [[runs]]
        recipe = "small"
        epsilon = 8.0
        pca_noise = 4.0
        epochs = 15
        batch_size = 200
        learning_rate = 10.0
        max_norm = 0.2
        activation = "tanh"
        momentum = 0.9
        decay = true
        """
    )
    with jax.numpy_dtype_promotion("standard"):  # as Optax's schedules have it
        private.main(["--config", str(config), "--seeds", "1", "--out", str(tmp_path)])
    [found] = json.loads((tmp_path / "private.json").read_text())["runs"]
    [result] = found["results"]
    assert 7.9 < result["epsilon"] <= 8 and len(result["accuracies"]) == 15 and result["accuracies"][-1] > 0.7
    assert "digits, 20-16-10" in capsys.readouterr().out


def test_a_private_step_beside_the_same_one_without_privacy() -> None:
    found = private_step.measure((6, 5, 10), 20, 4, rounds=2)
    assert found["ratio"] > 0 and found["bytes"] > found["bytes_without"] > 0
