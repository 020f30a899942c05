"""scikit-learn's interface: `MLPClassifier` and `MLPRegressor` fit into pipelines, searches and calibration.

A fit trains as `jaxbp run` does and writes nothing. What the arguments do not say, `config` may: tables of a run's
config, such as ``{"train": {"memory": "sqrt"}, "optimizer": {"weight_decay": 1e-4}}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from jaxbp.run import config as configs
from jaxbp.run import loop, targets
from jaxbp.run import problem as problems
from jaxbp.run.data.dataset import from_arrays
from jaxbp.run.store.model import Model

ROWS = 256  # are predicted at once, the last ones filled up: what a row gives does not depend on the others


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """What both have in common: the arguments, the training, the outputs."""

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (64,),
        hidden: str | Sequence[str] = "relu",
        optimizer: str = "adam",
        learning_rate: float = 0.01,
        epochs: int = 100,
        batch_size: int = 32,
        config: Mapping[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        self.hidden_sizes = hidden_sizes
        self.hidden = hidden
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.config = config
        self.random_state = random_state

    def _trained(self, x: np.ndarray, y: np.ndarray, outputs: int, loss: str) -> None:
        """Trains; the network and the rows of its epochs are model_ and history_."""
        hidden = self.hidden if isinstance(self.hidden, str) else list(self.hidden)
        sizes = [x.shape[1], *self.hidden_sizes, outputs]
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        tables: dict[str, dict[str, Any]] = {
            "data": {"name": "arrays", "standardize_targets": loss == "squared_error"},
            "model": {"sizes": sizes, "hidden": hidden, "loss": loss},
            "optimizer": {"name": self.optimizer, "learning_rate": self.learning_rate},
            "train": {"epochs": self.epochs, "batch_size": self.batch_size, "seed": seed},
        }
        given = self.config or {}
        tables |= {name: tables.get(name, {}) | dict(table) for name, table in given.items()}
        config = configs.validate(tables, type(self).__name__)
        dataset = from_arrays(config.data, (x, y, x[:1], y[:1]))  # the test set is one sample, and no test
        setup = loop.assemble(problems.pose(config, dataset=dataset))
        self.history_, best = list[dict[str, Any]](), None
        for epoch in loop.epochs(setup):
            row, best = epoch.row.line(), epoch.best
            self.history_.append({name: value for name, value in row.items() if not name.startswith("test_")})
        params = best.params if best else setup.program.whole
        self.model_: Model = setup.problem.model(setup.program.fetch(params), best.row.epoch if best else None)

    def _outputs(self, x: Any) -> np.ndarray:
        check_is_fitted(self)
        x = validate_data(self, x, reset=False, dtype=np.float64)
        filled = np.concatenate([x, np.zeros((-len(x) % ROWS, x.shape[1]))])
        blocks = np.split(filled, len(filled) // ROWS)
        return np.concatenate([self.model_.predict(block) for block in blocks])[: len(x)]


class MLPClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A perceptron with softmax and cross-entropy, for labels of any kind.

    Args:
      hidden_sizes, hidden: widths and activation of the hidden layers; the data decide about the others.
      optimizer, learning_rate, epochs, batch_size: as in a config.
      config: further tables of a config; they win over the other arguments.
      random_state: of the initial parameters and the order of the samples.

    A fitted one has classes_, model_, a `jaxbp.run.Model`, and history_, the row of each epoch.

    Example:
      >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), ["low", "low", "high", "high"]
      >>> fitted = MLPClassifier(optimizer="sgd", learning_rate=0.5, random_state=0).fit(x, y)
      >>> [str(name) for name in fitted.predict(x)]
      ['low', 'low', 'high', 'high']
    """

    def fit(self, X: Any, y: Any) -> "MLPClassifier":
        """Trains on samples (N, D) and their labels (N,)."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"MLPClassifier: y has one class, {self.classes_[0]}; a classifier takes at least 2")
        self._trained(X, labels, len(self.classes_), "softmax_cross_entropy")
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, (N, C), in the order of classes_."""
        p = targets.probabilities("softmax_cross_entropy", self._outputs(X))
        assert p is not None
        return p

    def predict(self, X: Any) -> np.ndarray:
        """The label of each sample."""
        outputs = self._outputs(X)
        return np.asarray(self.classes_[outputs.argmax(axis=1)])


class MLPRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A perceptron with ½‖x − y‖², for one target or several; they are standardised while it trains.

    The arguments are those of `MLPClassifier`.

    Example:
      >>> x = np.linspace(-1, 1, 64)[:, None]
      >>> fitted = MLPRegressor(optimizer="sgd", learning_rate=0.05, random_state=0).fit(x, x[:, 0] ** 2)
      >>> fitted.score(x, x[:, 0] ** 2) > 0.95
      True
    """

    def fit(self, X: Any, y: Any) -> "MLPRegressor":
        """Trains on samples (N, D) and their targets (N,) or (N, C)."""
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1).astype(np.float64)
        self._trained(X, y, y.shape[1], "squared_error")
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The targets, in the shape of a sample of y."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat else outputs

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
