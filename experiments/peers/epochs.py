"""How experiments.bench.epoch measures a training loop in a process of its own: the same arrays, network and η.

A peer is a script, `python NAME_epoch.py CASE.npz`. It prints its seconds as JSON. This module imports numpy alone.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """A data set by its name and as scaled arrays, x (N, in), y (N,) labels; relu between the layers; plain SGD."""

    data: str
    x_train: np.ndarray
    x_test: np.ndarray
    y_train: np.ndarray
    y_test: np.ndarray
    sizes: tuple[int, ...]
    learning_rate: float
    batch_size: int
    epochs: int


def write(path: Path, case: Case) -> None:
    """The case as an .npz."""
    np.savez(path, **case._asdict())


def read(path: str) -> Case:
    """The case of an .npz."""
    found = {name: a if a.ndim else a.item() for name, a in np.load(path).items()}
    return Case(**found | {"sizes": tuple(found["sizes"].tolist())})


def tell(seconds: list[float], test_accuracy: float) -> None:
    """Prints what was measured."""
    print(json.dumps({"seconds": seconds, "test_accuracy": test_accuracy}))


def main(build: Callable[[Case], tuple[Callable[[], object], Callable[[], float]]]) -> None:
    """One epoch to warm up, then the measured ones; `build` gives a function that trains one and the test accuracy."""
    case = read(sys.argv[-1])
    epoch, test_accuracy = build(case)
    epoch()
    seconds = []
    for _ in range(case.epochs):
        start = time.perf_counter()
        epoch()
        seconds.append(time.perf_counter() - start)
    tell(seconds, float(test_accuracy()))
