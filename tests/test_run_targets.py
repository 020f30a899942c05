"""What a loss says of its targets: which are allowed, in which units scores and predictions are."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w
from test_run_model import message, saved

from jaxbp import Affine
from jaxbp.run import problem as problems
from jaxbp.run import targets
from jaxbp.run.compute.epoch import Evaluation
from jaxbp.run.config import Config, DataConfig, ModelConfig, to_dict
from jaxbp.run.data import Scaling
from jaxbp.run.networks import Sample, network
from jaxbp.run.predict import predict
from jaxbp.run.report import metrics
from jaxbp.run.store.model import FILE, UNFINISHED, Model

RNG = np.random.default_rng(0)
LOGITS = np.array([[0.0, 2.0], [-3.0, 1.0]])


def posed(folder: Path, loss: str, y: np.ndarray, x: np.ndarray | None = None, **data: Any) -> problems.Problem:
    """The problem of ten samples with these targets."""
    path = folder / "d.npz"
    x = RNG.normal(size=(10, 4)) if x is None else x
    np.savez(path, x=x, y=y)
    config = Config(model=ModelConfig(hidden_sizes=(3,), loss=loss), data=DataConfig(str(path), **data))
    return problems.pose(config)


# --- which targets a loss takes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "bad", "said"),
    [
        ("sigmoid_cross_entropy", [-1.0, 1.0], "takes numbers from 0 to 1, row "),
        ("sigmoid_cross_entropy", [0.0, 1.5], "takes numbers from 0 to 1, row "),
        ("poisson", [-0.5, 3.0], "takes counts, none below 0, row "),
        ("softmax_cross_entropy", [0.3, 0.3], "takes probabilities, row "),
        ("kl_divergence", [-0.5, 1.5], "takes probabilities, row "),
    ],
)
@pytest.mark.parametrize("row", range(10))
def test_a_row_outside_the_domain_of_the_loss(tmp_path: Path, loss: str, bad: list[float], said: str, row: int) -> None:
    """One bad row, in the training set or in the test set."""
    y = np.tile([0.25, 0.75], (10, 1))
    y[row] = bad
    shown = ", ".join(f"{v:g}" for v in bad)
    found = message(lambda: posed(tmp_path, loss, y))
    assert found.startswith(f"model.loss: {loss} {said}")
    assert found.endswith(f" targets of {tmp_path}/d.npz is {shown}; squared_error takes any numbers")


@pytest.mark.parametrize("loss", ["squared_error", "absolute_error", "huber", "log_cosh"])
def test_the_other_losses_take_any_number(tmp_path: Path, loss: str) -> None:
    assert posed(tmp_path, loss, RNG.normal(size=(10, 2))).targets is not None
    assert loss not in targets.KINDS


@pytest.mark.parametrize(
    ("labels", "outputs", "said"),
    [
        ([1, 2, 3], 4, "ends with 4, d.npz has 3 classes"),
        ([0, 1], 1, "ends with 1, d.npz has 2 classes; one output takes sigmoid_cross_entropy"),
        ([0, 1, 2], 2, "ends with 2, d.npz has 3 classes"),
    ],
)
def test_why_a_number_of_classes_does_not_fit(tmp_path: Path, labels: list[int], outputs: int, said: str) -> None:
    np.savez(tmp_path / "d.npz", x=RNG.normal(size=(12, 4)), y=np.resize(labels, 12))
    config = Config(model=ModelConfig((4, outputs)), data=DataConfig(str(tmp_path / "d.npz")))
    assert message(lambda: problems.pose(config)).replace(f"{tmp_path}/", "") == f"model.sizes: {said}"


@pytest.mark.parametrize("loss", targets.KINDS)
def test_targets_of_a_domain_are_not_standardised(tmp_path: Path, loss: str) -> None:
    y = np.tile([0.25, 0.75], (10, 1))
    assert message(lambda: posed(tmp_path, loss, y, standardize_targets=True)).startswith(
        f"data.standardize_targets: true, but {loss} takes "
    )


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("poisson", np.exp(LOGITS)),
        ("sigmoid_cross_entropy", 1 / (1 + np.exp(-LOGITS))),
        ("softmax_cross_entropy", np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)),
        ("softmax_cross_entropy(label_smoothing=0.1)", np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)),
        ("kl_divergence", np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)),
        ("squared_error", LOGITS * 2 + 1),
    ],
)
def test_a_prediction_is_the_mean_of_the_target(loss: str, expected: np.ndarray) -> None:
    scaling = Scaling(np.ones(2), np.full(2, 2.0)) if loss == "squared_error" else Scaling(np.zeros(2), np.ones(2))
    np.testing.assert_allclose(targets.predicted(loss, LOGITS, scaling), expected, rtol=1e-14)


def test_predictions_at_the_ends_of_the_dtype() -> None:
    ends = np.array([[-1e300, 1e300], [800.0, -800.0]])
    assert targets.predicted("sigmoid_cross_entropy", ends, None).tolist() == [[0, 1], [1, 0]]
    assert targets.predicted("softmax_cross_entropy", ends, None).tolist() == [[0, 1], [1, 0]]
    assert targets.predicted("poisson", ends, None).tolist() == [[0, np.inf], [np.inf, 0]]


def test_a_well_fitted_poisson_regression_has_a_good_r2() -> None:
    """Scores compare rates with counts, not their logarithms."""
    rate = np.exp(RNG.normal(size=(200, 1)) + 1)
    y = RNG.poisson(rate).astype(np.float64)
    found = metrics.scores(Evaluation(jnp.zeros(200), jnp.asarray(np.log(rate))), y, "poisson", None)
    assert found.rmse == pytest.approx(np.sqrt(np.mean((rate - y) ** 2))) and found.r2 is not None and found.r2 > 0.5


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "kl_divergence"])
def test_probabilities_have_an_accuracy(loss: str) -> None:
    y = np.array([[0.0, 1.0], [0.4, 0.6]])
    evaluation = Evaluation(jnp.array([1.0, 3.0]), jnp.array([[0.1, 0.9], [0.8, 0.2]]))
    assert metrics.scores(evaluation, y, loss, None) == metrics.Scores(2.0, accuracy=0.5)


@pytest.mark.parametrize("value", [0.1, 0.5, 1e-30, 3e10])
def test_a_constant_column_has_no_r2(value: float) -> None:
    y = np.full((89, 1), value)
    assert np.isnan(metrics.scores(Evaluation(jnp.zeros(89), jnp.asarray(y) * 2), y, "squared_error", None).r2)


# --- two classes and one output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[-1, 1], [-1.0, 1.0], [0.0, 1.0], ["no", "yes"], [False, True]])
@pytest.mark.parametrize("sizes", [None, (4, 3, 1)])
def test_one_output_says_whether_it_is_the_second_class(
    tmp_path: Path, labels: list[Any], sizes: tuple[int, ...] | None
) -> None:
    np.savez(tmp_path / "d.npz", x=RNG.normal(size=(10, 4)), y=np.array(labels * 5))
    model = ModelConfig(sizes, loss="sigmoid_cross_entropy", hidden_sizes=None if sizes else (3,))
    problem = problems.pose(Config(DataConfig(str(tmp_path / "d.npz")), model))
    y = problem.dataset.y_train
    assert problem.net == network(ModelConfig((4, 3, 1), loss="sigmoid_cross_entropy"))
    np.testing.assert_array_equal(problem.on_device("train").y, y[:, None])
    logits = np.where(y == 1, 0.5, -0.5)[:, None]
    logits[0] *= -1
    evaluation = Evaluation(jnp.zeros(8), jnp.asarray(logits))
    assert metrics.scores(evaluation, y, "sigmoid_cross_entropy", None).accuracy == 7 / 8


def test_predict_names_the_class_of_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path)
    net = network(ModelConfig((4, 1), loss="sigmoid_cross_entropy"))
    params = (Affine(jnp.array([[0.0, 1.0, 0.0, 0.0]]), jnp.array([0.0])),)
    Model(net, params, model.inputs, None, model.classes, Sample((4,), 1, positions=False)).save(tmp_path)
    table = to_dict(Config(model=ModelConfig((4, 1), loss="sigmoid_cross_entropy")))
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    np.savez(tmp_path / "x.npz", x=[[0, 12.0, 0, 0], [0, -8.0, 0, 0]])
    predict(tmp_path, tmp_path / "x.npz", None)
    assert capsys.readouterr().out == "index,class\n0,yés\n1,no\n"


def test_two_outputs_for_two_classes_stay_possible(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=RNG.normal(size=(10, 4)), y=np.array([0, 1] * 5))
    model = ModelConfig((4, 2), loss="sigmoid_cross_entropy")
    problem = problems.pose(Config(DataConfig(str(tmp_path / "d.npz")), model))
    assert problem.on_device("test").y.tolist() == np.eye(2)[problem.dataset.y_test].tolist()


# --- the range of the dtype -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e39, -1e300])
@pytest.mark.parametrize("row", [0, 9])
def test_a_sample_that_the_dtype_cannot_hold(tmp_path: Path, value: float, row: int) -> None:
    """In whichever set the split puts it."""
    x, y = RNG.normal(size=(10, 4)), RNG.normal(size=(10, 1))
    x[row, 2] = value
    found = message(lambda: posed(tmp_path, "squared_error", y, x, standardize="none"))
    assert f" inputs has {value:.4g}, which scaled is too large for float32" in found and "row " in found
    y[row] = value
    assert f" targets has {value:.4g}, which" in message(lambda: posed(tmp_path, "squared_error", y))


def test_predict_names_a_row_that_is_too_large(tmp_path: Path) -> None:
    model, x = saved(tmp_path), np.ones((3, 4))
    params = jax.tree.map(lambda leaf: leaf * 1e3, model.params)
    large = model._replace(params=params, net=network(ModelConfig((4, 3, 2))))  # relu, which lets large numbers through
    for value, said in (
        (1e300, "row 2 of x, scaled, is too large for float32"),
        (3e37, "for row 2 of x is not finite"),
    ):
        x[2, 1] = value
        with pytest.raises(ValueError, match=said):
            large.predict(x)


def test_one_hot_rows_are_not_those_of_an_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity of 65,536 classes has 17 GB."""
    monkeypatch.delattr(np, "eye")
    found = posed(tmp_path, "squared_error", np.array([0, 1] * 5))
    y = np.array([0, 65535] * 5)
    dataset = found.dataset._replace(y_train=y, y_test=y, classes=tuple(map(str, range(65536))))
    model = ModelConfig((4, 65536), loss="squared_error")
    many = problems.pose(Config(model=model), dataset=dataset)
    one_hot = np.asarray(many.scaled(dataset.x_test, y[:2])[1])
    assert one_hot.shape == (2, 65536) and one_hot.sum() == one_hot[:, [0, -1]].sum() == 2


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict_replaces_nothing_unasked(tmp_path: Path) -> None:
    saved(tmp_path)
    data, out = tmp_path / "x.npz", tmp_path / "out.csv"
    np.savez(data, x=np.zeros((2, 4)))
    for path in (data, tmp_path / FILE):
        before = path.read_bytes()
        for overwrite in (False, True):
            said = message(lambda path=path, overwrite=overwrite: predict(tmp_path, data, path, overwrite))
            assert said == f"--out: {str(path)!r} should end in .csv"
        assert path.read_bytes() == before
    predict(tmp_path, data, out)
    first = out.read_text()
    out.write_text("mine")
    assert message(lambda: predict(tmp_path, data, out)) == f"--out: {str(out)!r} exists, --overwrite replaces it"
    assert out.read_text() == "mine"
    predict(tmp_path, data, out, overwrite=True)
    assert out.read_text() == first and not list(tmp_path.glob(".*part*"))
    assert "can't be written" in message(lambda: predict(tmp_path, data, tmp_path / "no" / "a.csv"))


def test_predict_of_an_unfinished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    (tmp_path / UNFINISHED).touch()
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 4)))
    predict(tmp_path, tmp_path / "x.npz", None)
    assert capsys.readouterr().err == f"jaxbp: warning: {tmp_path} is unfinished; these are its parameters so far\n"


# --- what a notebook shows of a model ---------------------------------------------------------------------------------


def test_a_model_is_shown_in_short(tmp_path: Path) -> None:
    model: Model = saved(tmp_path)
    assert repr(model) == "Model(4-3-2, softmax_cross_entropy, 23 parameters)"
    shown = model._repr_html_()
    assert shown.startswith("<table>") and "<td>3 × 4</td><td>tanh</td><td>15</td>" in shown


def test_a_title_says_data_network_and_loss(tmp_path: Path) -> None:
    found = posed(tmp_path, "squared_error", RNG.normal(size=(10, 2)))
    assert found.title == "d.npz · 4-3-2 relu · squared_error"
