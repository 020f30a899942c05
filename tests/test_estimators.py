"""scikit-learn's interface of runs: its own list of checks, and what pipelines and searches need."""

import pickle
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import jaxbp
from jaxbp.activations import ACTIVATIONS
from jaxbp.losses import LOSSES
from jaxbp.run.errors import UserError
from jaxbp.run.estimators import MLPClassifier, MLPRegressor


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


OPTIONAL = {"check_array_api_input", "check_classifier_data_not_an_array", "check_regressor_data_not_an_array"}
"""Checks of scikit-learn that skip themselves without pandas and an array API."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.filterwarnings("ignore")  # many checks look for warnings, which are errors in this suite
def test_scikit_learn_finds_nothing_to_complain_about(kind: type) -> None:
    results = check_estimator(kind((), learning_rate=0.1, epochs=20), on_fail=None)
    assert len(results) > 45
    found = {result["check_name"]: result["status"] for result in results if result["status"] != "passed"}
    assert {name: status for name, status in found.items() if name not in OPTIONAL} == {}


@pytest.mark.slow
def test_in_a_pipeline_and_a_search() -> None:
    """The labels keep their names; a further table of a config is one of the arguments that are searched."""
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    pipe = make_pipeline(StandardScaler(), MLPClassifier((), learning_rate=0.1, epochs=10, random_state=0))
    configs = [{"optimizer": {"weight_decay": decay}} for decay in (0.0, 1e-3)]
    search = GridSearchCV(pipe, {"mlpclassifier__config": configs}, cv=2).fit(x, names)
    assert search.best_score_ > 0.8 and set(search.predict(x)) <= set(names)
    fitted = search.best_estimator_[-1]
    p = search.predict_proba(x)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_array_equal(fitted.classes_[p.argmax(axis=1)], search.predict(x))
    assert [row["epoch"] for row in fitted.history_] == [*range(1, 11)]
    assert fitted.history_[-1]["train_loss"] < fitted.history_[0]["train_loss"]
    assert not any(name.startswith("test") for name in fitted.history_[0])


@pytest.mark.slow
def test_a_regression_of_several_targets_in_their_units() -> None:
    x = np.random.default_rng(0).standard_normal((64, 2))
    y = 100 + 5 * x @ [[1.0, 2.0], [3.0, 4.0]]
    fitted = MLPRegressor((), learning_rate=0.1, epochs=60, random_state=1).fit(x, y)
    assert fitted.predict(x).shape == (64, 2) and fitted.score(x, y) > 0.999


@pytest.mark.slow
def test_a_fit_that_stops_early_has_the_best_parameters() -> None:
    x, y = load_iris(return_X_y=True)
    how = {"data": {"validation": 0.4}, "train": {"patience": 2}}
    fitted = MLPClassifier((16,), learning_rate=0.3, epochs=60, config=how, random_state=0).fit(x, y)
    losses = [row["validation_loss"] for row in fitted.history_]
    assert len(losses) == np.argmin(losses) + 1 + 2 < 60 and fitted.model_.best == np.argmin(losses) + 1


def test_what_does_not_fit_is_said() -> None:
    x, y = np.zeros((4, 1)), [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"optimizer.name.*did you mean 'adam'"):
        MLPClassifier(optimizer="adm").fit(x, y)
    with pytest.raises(UserError, match=r"MLPClassifier: unknown key 'train.epoch'"):
        MLPClassifier(config={"train": {"epoch": 3}}).fit(x, y)
    with pytest.raises(ValueError, match=r"y has one class, 1"):
        MLPClassifier().fit(x, [1, 1, 1, 1])


def test_a_network_can_be_pickled() -> None:
    for name in ACTIVATIONS:
        for loss in LOSSES:
            net = jaxbp.MLP((3, 4, 2), hidden=name, loss=loss)
            assert pickle.loads(pickle.dumps(net)) == net
