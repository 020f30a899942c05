"""The published runs that experiments/ replays: their first epochs on MNIST, and each recipe against a naive twin."""

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.example_libraries import optimizers, stax
from matplotlib import image

from experiments import jax_mnist_classifier as example
from experiments import nielsen, nielsen_overfitting, nielsen_weight_initialization, recipe, report
from experiments.nielsen import Images, Run, Script
from jaxbp import MLP
from jaxbp.run.data import idx
from jaxbp.run.errors import UserError

pytestmark = pytest.mark.slow

needs_mnist = pytest.mark.skipif(not idx.is_local("mnist"), reason="MNIST is not on this machine")


def shortened(script: Script, epochs: int) -> Script:
    return dataclasses.replace(script, runs=tuple(dataclasses.replace(run, epochs=epochs) for run in script.runs))


# --- published figures ------------------------------------------------------------------------------------------------


@needs_mnist
def test_overfitting_begins_as_published_and_a_wrong_constant_does_not() -> None:
    results = nielsen_overfitting.measure(shortened(nielsen.read(nielsen_overfitting.CONFIG), 6), 0.5001)
    right, wrong = results["right"], results["wrong"]
    assert (right["learning_rate"], wrong["learning_rate"]) == (0.5, 0.5001)
    assert (right["rows"], right["rows_equal"], right["counts_equal"]) == (6, 6, 6)
    assert right["largest_cost_difference"] <= 1e-12
    assert (wrong["rows"], wrong["rows_equal"]) == (6, 0) and wrong["largest_cost_difference"] > 1e-5


@needs_mnist
def test_weight_initialization_begins_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "one_epoch.toml"
    config.write_text(nielsen_weight_initialization.CONFIG.read_text().replace("epochs = 30", "epochs = 1"))
    nielsen_weight_initialization.main(["--config", str(config), "--out", str(tmp_path)])
    results = json.loads((tmp_path / "nielsen_weight_initialization.json").read_text())
    # The second run follows one epoch here and thirty in the publication: only its initial weights are the same.
    assert results["right"]["runs"]["default"] == report.published("nielsen_weight_initialization")["default"][:1]
    assert results["right"]["counts"] == 2 and results["config"]["runs"][0]["epochs"] == 1
    picture = image.imread(tmp_path / "nielsen_weight_initialization.png")
    assert picture.shape[0] > 400 and picture.std() > 0.05
    assert re.search(r"\| 0 +\| +9,270 \| +9,270 \|", capsys.readouterr().out)  # published | here


def test_published_tables_are_whole() -> None:
    assert len(nielsen_overfitting.published_rows()) == 13
    counts = report.published("nielsen_weight_initialization")
    assert len(counts["default"]) == len(counts["large"]) == 30
    assert [row[0] for row in report.published("jax_mnist_classifier")["amd"]] == [0, 4, 9]


def test_a_count_or_a_cost_that_is_off_does_not_pass() -> None:
    found = [{} for _ in range(400)]
    for row in nielsen_overfitting.published_rows():
        found[row["epoch"]] = dict(row)
    assert nielsen_overfitting.verdict(nielsen_overfitting.compared(found))["rows_equal"] == 13
    found[3]["test_correct"] += 1
    found[5]["training_cost"] += 2e-12
    verdict = nielsen_overfitting.verdict(nielsen_overfitting.compared(found))
    assert (verdict["rows_equal"], verdict["counts_equal"]) == (11, 12)
    assert verdict["largest_cost_difference"] == pytest.approx(2e-12, rel=1e-3)


# --- Nielsen's recipe against a twin in NumPy -------------------------------------------------------------------------


def small_images(count: int, seed: int) -> Images:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    return Images(jnp.asarray(rng.integers(0, 256, (count, 784), np.uint8)), jnp.asarray(np.eye(10)[labels]))


IMAGES = {"training": small_images(23, 0), "validation": small_images(7, 1), "test": small_images(11, 2)}
ONE_RUN = '[[runs]]\nname = "a"\nepochs = 1\nlearning_rate = 0.5\n'
ARRAYS = {name: (np.asarray(images.x) / 256, np.asarray(images.y)) for name, images in IMAGES.items()}
RUN = Run("first", epochs=2, learning_rate=0.3, sizes=(784, 5, 10), mini_batch=5, monitor=("training_cost",))


def sigmoid(s: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-s)))


class Twin:
    """The book's training, sample by sample; the generators and the order of the list go on from run to run."""

    def __init__(self, seed: int) -> None:
        self.random, self.normal = random.Random(seed), np.random.RandomState(seed)
        self.order = list(range(len(IMAGES["training"].x)))

    def draw(self, sizes: tuple[int, ...], scheme: str) -> None:
        self.b = [self.normal.randn(n, 1)[:, 0] for n in sizes[1:]]
        self.w = [self.normal.randn(n, m) for m, n in itertools.pairwise(sizes)]
        if scheme == "default":
            self.w = [w / np.sqrt(w.shape[1]) for w in self.w]

    def epoch(self, run: Run, order: list[int]) -> None:
        if run.shuffle == "python2":
            for i in range(len(order) - 1, 0, -1):
                j = int(self.random.random() * (i + 1))
                order[i], order[j] = order[j], order[i]
        for start in range(0, len(order), run.mini_batch):
            rows = order[start : start + run.mini_batch]
            sums = [[np.zeros_like(p) for p in ps] for ps in (self.w, self.b)]
            for n in rows:
                for total, part in zip(sums, self.gradient(run, n), strict=True):
                    for i, g in enumerate(part):
                        total[i] += g
            decay, eta = 1 - run.learning_rate * run.regularization / len(order), run.learning_rate / len(rows)
            self.w = [decay * w - eta * g for w, g in zip(self.w, sums[0], strict=True)]
            self.b = [b - eta * g for b, g in zip(self.b, sums[1], strict=True)]

    def gradient(self, run: Run, n: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        activations = [ARRAYS["training"][0][n]]
        for w, b in zip(self.w, self.b, strict=True):
            activations.append(sigmoid(w @ activations[-1] + b))
        a = activations[-1]
        delta = a - ARRAYS["training"][1][n]
        delta = delta * a * (1 - a) if run.cost == "quadratic" else delta
        deltas = [delta]
        for w, x in zip(self.w[:0:-1], activations[-2:0:-1], strict=True):
            deltas.insert(0, (w.T @ deltas[0]) * x * (1 - x))
        return [np.outer(d, x) for d, x in zip(deltas, activations, strict=False)], deltas

    def measure(self, run: Run, name: str, order: list[int]) -> tuple[float, int]:
        rows = order if name == "training" else range(len(ARRAYS[name][0]))
        costs, right = [], 0
        for n in rows:
            a, y = (array[n] for array in ARRAYS[name])
            for w, b in zip(self.w, self.b, strict=True):
                a = sigmoid(w @ a + b)
            entropy = -(y * np.log(a) + (1 - y) * np.log(1 - a)).sum()
            costs.append(((a - y) ** 2).sum() / 2 if run.cost == "quadratic" else entropy)
            right += int(a.argmax() == y.argmax())
        penalty = 0.5 * run.regularization / len(costs) * sum((w**2).sum() for w in self.w)
        return float(np.mean(costs) + penalty), right


MONITORED = ("training_cost", "training_correct", "validation_cost", "validation_correct", "test_cost", "test_correct")


@pytest.mark.parametrize(
    ("cost", "shuffle", "training_images"),
    [("cross_entropy", "python2", None), ("quadratic", "python2", 13), ("quadratic", "none", None)],
)
def test_replay_is_the_books(cost: Any, shuffle: Any, training_images: int | None) -> None:
    """Two runs: the second goes on from both generators and, where it trains on the whole list, from its order."""
    common = {"cost": cost, "shuffle": shuffle, "monitor": MONITORED}
    first = dataclasses.replace(RUN, **common, draws=("default", "large"), regularization=0.7)
    second = dataclasses.replace(RUN, **common, name="second", learning_rate=1.5, training_images=training_images)
    script, twin = Script((first, second), seed=7), Twin(7)
    found = nielsen.figures(script, IMAGES)
    for run in script.runs:
        for scheme in run.draws:
            twin.draw(run.sizes, scheme)
        order = twin.order if run.training_images is None else twin.order[: run.training_images]
        for row in found[run.name]:
            twin.epoch(run, order)
            for name in IMAGES:
                cost_there, right = twin.measure(run, name, order)
                assert row[f"{name}_correct"] == right
                # 784 products in a sum, 10 steps: some 10³ rounding errors of float64, most of which cancel.
                assert row[f"{name}_cost"] == pytest.approx(cost_there, rel=1e-12)


def test_any_other_script_is_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nielsen, "load", lambda: IMAGES)
    path = tmp_path / "wide.toml"
    wide = 'sizes = [784, 7, 5, 10]\nmonitor = ["test_cost", "training_correct"]\n'
    path.write_text(ONE_RUN + wide + ONE_RUN.replace('"a"', '"b"') + 'shuffle = "python3"\n')
    nielsen.main(["--config", str(path), "--out", str(tmp_path)])
    results = json.loads((tmp_path / "wide.json").read_text())
    assert [set(rows[0]) for rows in results["runs"].values()] == [
        {"epoch", "test_cost", "training_correct"},
        {"epoch", "test_correct"},
    ]
    assert image.imread(tmp_path / "wide.png").std() > 0.05
    assert "test_cost | training_correct" in capsys.readouterr().out


def test_python_3_has_another_shuffle() -> None:
    orders = {}
    for name, shuffle in nielsen.SHUFFLES.items():
        orders[name] = list(range(100))
        shuffle(orders[name], random.Random(0))
    assert sorted(orders["python2"]) == sorted(orders["python3"]) == orders["none"] == list(range(100))
    assert orders["python2"] != orders["python3"] != orders["none"]


# --- JAX's example against its own libraries --------------------------------------------------------------------------


def test_parameters_and_steps_are_those_of_the_example() -> None:
    sizes, rng = (6, 5, 4, 3), np.random.default_rng(0)
    images = Images(jnp.asarray(rng.random((10, 6), np.float32)), jnp.asarray(rng.integers(0, 3, 10)))
    constants = example.Example(sizes, 1, batch_size=4, learning_rate=0.1, momentum=0.9, seed=3)
    layers = [layer for size in sizes[1:] for layer in (stax.Dense(size), stax.Relu)]
    init, apply = stax.serial(*layers[:-1], stax.LogSoftmax)
    with jax.threefry_partitionable(False), jax.numpy_dtype_promotion("standard"):
        with jax.enable_x64(False):
            theirs = init(jax.random.PRNGKey(3), (-1, 6))[1]
            ours = example.draw_parameters(sizes, 3)
    for layer, (w, b) in zip(ours, (layer for layer in theirs if layer), strict=True):
        np.testing.assert_array_equal(layer.w, w.T)
        np.testing.assert_array_equal(layer.b, b)
    order = np.random.RandomState(3).permutation(10)
    opt_init, opt_update, opt_params = optimizers.momentum(0.1, mass=0.9)

    @jax.jit
    @jax.grad
    def gradient(params: Any, rows: np.ndarray) -> jax.Array:
        return -jnp.mean(jnp.sum(apply(params, images.x[rows]) * jax.nn.one_hot(images.y[rows], 3), axis=1))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = opt_init(theirs)
        for i, rows in enumerate((order[:4], order[4:8], order[8:])):
            state = opt_update(i, gradient(opt_params(state), rows), state)
        trained = [layer for layer in opt_params(state) if layer]
        net = MLP(sizes, hidden="relu")
        start = example.optax.sgd(0.1, momentum=0.9).init(ours)
        params, _ = example.epoch(net, constants, ours, start, images, jnp.asarray(order))
    for layer, (w, b) in zip(params, trained, strict=True):
        np.testing.assert_allclose(layer.w, w.T, rtol=1e-5, atol=1e-6)  # three steps of float32
        np.testing.assert_allclose(layer.b, b, rtol=1e-5, atol=1e-6)


# --- configs and commands ---------------------------------------------------------------------------------------------


def test_the_configs_hold_the_published_recipes() -> None:
    (run,) = nielsen.read(nielsen_overfitting.CONFIG).runs
    assert (run.draws, run.training_images, run.learning_rate) == (("default", "large"), 1000, 0.5)
    runs = nielsen.read(nielsen_weight_initialization.CONFIG).runs
    assert [(run.draws, run.training_images, run.regularization) for run in runs] == [
        (("default",), None, 5.0),
        (("large",), None, 5.0),
    ]
    assert recipe.read(example.Example, example.CONFIG).sizes == (784, 1024, 1024, 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ONE_RUN.replace("0.5", "-0.5"), "runs.0.learning_rate: got -0.5, input should be greater than 0"),
        (ONE_RUN + "lamda = 1.0\n", "runs.0.lamda: unknown key"),
        (ONE_RUN + 'draws = ["small"]\n', "runs.0.draws.0: got small, input should be 'default' or 'large'"),
        (ONE_RUN + "sizes = [784, 30]\n", "runs.sizes: 'a' begins with 784 and ends with 30; MNIST has 784 inputs"),
        (ONE_RUN * 2, "runs.name: two runs have the same name"),
        (ONE_RUN + "epochs = 2\n", "not a TOML file"),
        (ONE_RUN + "mini_batch = 1979-05-27\n", "not a TOML file of numbers"),
        ("seed = 1\n", "runs: missing"),
    ],
)
def test_a_bad_config_is_one_line(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        nielsen.main(["--config", str(path), "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"nielsen: {path}: {expected}")


def test_a_config_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.toml: can't be read: No such file"):
        recipe.read(Script, tmp_path / "x.toml")


@pytest.mark.parametrize(
    "main", [nielsen_overfitting.main, nielsen_weight_initialization.main, example.main], ids=lambda f: f.__module__
)
def test_without_mnist_the_last_line_says_what_to_do(
    main: Callable[[list[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JAXBP_DATA", str(tmp_path))
    monkeypatch.setenv("JAXBP_MIRROR", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(idx, "PAUSE", 0.0)
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    said = capsys.readouterr().err.splitlines()  # before it come the attempts to download
    assert stop.value.code == 2 and ": cannot download mnist" in said[-1]
    assert "`jaxbp data import mnist PATH`" in said[-1]
