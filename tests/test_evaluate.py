"""`jaxbp evaluate` against scikit-learn and by hand, `jaxbp predict --probabilities`; a network that nobody trained."""

import csv
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from sklearn import metrics

from jaxbp import losses
from jaxbp.cli import main
from jaxbp.run import config as configs
from jaxbp.run import data as data_sets
from jaxbp.run import problem as problems
from jaxbp.run import targets
from jaxbp.run.evaluate import _cell, calibration, classification, regression
from jaxbp.run.store.model import load

RNG = np.random.default_rng(0)


def made(name: str, *options: str) -> Path:
    """The folder of a run that has parameters and a config: those with which it began."""
    config = configs.override(configs.Config(), ["--optimizer.learning-rate", "0.1", *options])
    problem = problems.pose(config)
    Path(name).mkdir()
    Path(name, "config.toml").write_text(tomli_w.dumps(configs.to_dict(config)))
    problem.model(problem.initial()).save(Path(name))
    return Path(name)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err.removeprefix("jaxbp: ").rstrip()


# --- the sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 11])
def test_scores_by_class_are_scikit_learns(classes: int) -> None:
    p = RNG.dirichlet(np.ones(classes), 200)
    labels = RNG.integers(0, classes, 200)
    found = classification(labels, np.log(p), p, [f"c{k}" for k in range(classes)])
    guesses = p.argmax(axis=1)
    report = metrics.classification_report(labels, guesses, output_dict=True)
    for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"), ("samples", "support")):
        expected = [report[str(k)][theirs] for k in range(classes)]
        np.testing.assert_allclose(found["classes"][ours], expected)
    scores = {name: value for name, [value] in found["scores"].items()}
    assert scores["accuracy"] == metrics.accuracy_score(labels, guesses)
    assert scores["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, guesses))
    area = metrics.roc_auc_score(labels, p[:, 1] if classes == 2 else p, multi_class="ovr")
    assert scores["roc_auc"] == pytest.approx(area)
    head, *columns = found["confusion"].values()
    assert list(head) == [f"c{k}" for k in range(classes)]
    np.testing.assert_array_equal(np.transpose(columns), metrics.confusion_matrix(labels, guesses))


def test_a_class_without_samples_is_left_out_of_the_means() -> None:
    labels, output = np.array([0, 0, 1, 1]), np.array([[2.0, 1, 0], [1, 2, 0], [0, 2, 1], [0, 1, 0]])
    found = classification(labels, output, None, "abc")
    assert np.isnan([found["classes"][name][2] for name in ("precision", "recall", "roc_auc")]).all()
    assert found["scores"]["balanced_accuracy"] == pytest.approx([0.75])
    assert found["scores"]["roc_auc"][0] == pytest.approx(metrics.roc_auc_score(labels, output[:, 1]) / 2 + 0.5)
    assert "calibration" not in found and "ece" not in found["scores"]


def test_the_calibration_of_three_bins_by_hand() -> None:
    confidence, right = np.array([0.55, 0.58, 0.91, 1.0]), np.array([True, False, True, True])
    found = calibration(confidence, right)
    assert found["bin"] == ["0.5 to 0.6", "0.9 to 1.0"] and found["samples"].tolist() == [2, 2]
    np.testing.assert_allclose(found["confidence"], [0.565, 0.955])
    np.testing.assert_allclose(found["accuracy"], [0.5, 1.0])
    p = np.stack([1 - confidence, confidence], axis=1)
    [ece] = classification(right.astype(int), p, p, "ab")["scores"]["ece"]
    assert ece == pytest.approx((2 * 0.065 + 2 * 0.045) / 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_are_those_of_the_loss_also_over_positions(smoothing: float) -> None:
    loss, x = losses.smoothed_softmax_cross_entropy(smoothing), RNG.normal(size=(2, 5, 3))
    expected = np.exp(x) / np.exp(x).sum(axis=2, keepdims=True)
    for name in (loss.name, losses.over_positions(loss).name):
        np.testing.assert_allclose(targets.probabilities(name, x), expected)
    np.testing.assert_allclose(targets.probabilities("sigmoid_cross_entropy", x), 1 / (1 + np.exp(-x)))
    assert targets.probabilities("hinge", x) is targets.probabilities("poisson", x) is None


def test_classes_that_cannot_be_printed_are_quoted() -> None:
    assert [_cell("", name) for name in ("a", "\n", " ", "b c")] == ["a", r"'\n'", "' '", "b c"]


def test_a_regression() -> None:
    y = RNG.normal(size=(50, 2))
    predicted = y + RNG.normal(size=(50, 2))
    found = regression(y, predicted)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((y - predicted) ** 2)))
    assert found["mae"] == pytest.approx(np.mean(np.abs(y - predicted)))
    assert found["r2"] == pytest.approx(metrics.r2_score(y, predicted))


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_on_its_test_set_and_on_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("iris", "--data.name", "iris", "--model.sizes", "4,3")
    data = data_sets.load(configs.DataConfig("iris"))
    np.savez("x.npz", x=data.x_test, y=data.y_test)
    assert main(["evaluate", "iris"]) == 0
    own = capsys.readouterr().out.splitlines()
    assert main(["evaluate", "iris", "--data", "x.npz"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert own[0] == "iris: 30 samples of the test set of iris"
    assert own[1:] == shown[1:]
    accuracy = np.mean(load(run).predict(data.x_test).argmax(axis=1) == data.y_test)
    assert own[4].split()[:2] == [f"{100 * accuracy:.2f}", "%"]
    assert [line.split()[0] for line in own[8:11]] == ["setosa", "versicolor", "virginica"]
    for name, arrays, said in (
        ("many", {"y": data.y_test + 1}, "many.npz: y has the label '3', allowed: setosa, versicolor, virginica"),
        ("floats", {"y": data.y_test + 0.5}, "floats.npz: y has numbers, iris was trained on labels"),
        ("narrow", {"x": data.x_test[:, :3]}, r"narrow.npz: x has shape (30, 3), expected (N, 4)"),
    ):
        np.savez(f"{name}.npz", **{"x": data.x_test, "y": data.y_test} | arrays)
        assert fault(capsys, "evaluate", "iris", "--data", f"{name}.npz") == said


def test_a_regression_in_the_units_of_its_targets(capsys: pytest.CaptureFixture[str]) -> None:
    loss = ("--model.loss", "squared_error", "--data.standardize-targets")
    run = made("diabetes", "--data.name", "diabetes", "--model.sizes", "10,1", *loss)
    assert main(["evaluate", "diabetes"]) == 0
    data = data_sets.load(configs.DataConfig("diabetes"))
    expected = metrics.root_mean_squared_error(data.y_test, load(run).predict(data.x_test))
    assert f"{expected:.4g}" in capsys.readouterr().out
    np.savez("wide.npz", x=data.x_test, y=np.tile(data.y_test, 2))
    assert fault(capsys, "evaluate", "diabetes", "--data", "wide.npz") == (
        "wide.npz: y has 2 columns, diabetes was trained on 1"
    )
    assert "--probabilities: it takes a label a sample" in fault(
        capsys, "predict", "diabetes", "--data", "wide.npz", "--probabilities"
    )


def test_predict_with_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("iris", "--data.name", "iris", "--model.sizes", "4,3")
    x = data_sets.load(configs.DataConfig("iris")).x_test[:5]
    np.savez("x.npz", x=x)
    assert main(["predict", "iris", "--data", "x.npz", "--probabilities"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    p = np.array([[float(row[f"p {name}"]) for name in ("setosa", "versicolor", "virginica")] for row in rows])
    output = np.exp(load(run).predict(x))
    np.testing.assert_allclose(p, output / output.sum(axis=1, keepdims=True), rtol=1e-12)
    assert [row["class"] for row in rows] == [("setosa", "versicolor", "virginica")[k] for k in p.argmax(axis=1)]
