"""scikit-learn's MLPClassifier: `partial_fit` is one epoch over shuffled batches. Plain SGD, no weight decay."""

from collections.abc import Callable

import epochs
import numpy as np
from sklearn.neural_network import MLPClassifier


def build(case: epochs.Case) -> tuple[Callable[[], object], Callable[[], float]]:
    model = MLPClassifier(
        case.sizes[1:-1],
        solver="sgd",
        alpha=0.0,
        batch_size=case.batch_size,
        learning_rate_init=case.learning_rate,
        momentum=0.0,
        nesterovs_momentum=False,
        random_state=0,
    )
    classes = np.arange(case.sizes[-1])
    return (
        lambda: model.partial_fit(case.x_train, case.y_train, classes=classes),
        lambda: model.score(case.x_test, case.y_test),
    )


if __name__ == "__main__":
    epochs.main(build)
