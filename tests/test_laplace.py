"""`jaxbp predict --laplace`: a line against Bayesian linear regression in closed form, labels, and its errors."""

import csv
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxbp.cli import main
from jaxbp.run import laplace
from jaxbp.run.store.model import load

LINE = """
[data]
name = "line.npz"
standardize = "none"
[model]
sizes = [1, 1]
loss = "squared_error"
[optimizer]
learning_rate = 0.5
[train]
epochs = 60
plots = false
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (40, 1))
    np.savez("line.npz", x=x, y=3 * x + 1 + rng.normal(scale=0.2, size=x.shape), x_test=x[:5], y_test=x[:5])
    np.savez("new.npz", x=np.array([[0.0], [4.0]]))
    Path("line.toml").write_text(LINE)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def predicted(*arguments: str) -> list[dict[str, str]]:
    assert main(["predict", "r", "--data", "new.npz", "--laplace", "--out", "p.csv", *arguments]) == 0
    return list(csv.DictReader(Path("p.csv").read_text().splitlines()))


@pytest.mark.slow
def test_a_line_is_bayesian_linear_regression() -> None:
    """One layer under the squared error: its Kronecker block is the Gauss-Newton matrix itself. f32: 1e-3."""
    assert main(["run", "line.toml", "--train.folder", "r"]) == 0
    rows, model, data = predicted(), load("r"), np.load("line.npz")
    x, new = (np.concatenate([a, np.ones_like(a)], axis=1) for a in (data["x"], np.array([[0.0], [4.0]])))
    w = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model.params)]).astype(np.float64)
    noise = np.mean((x @ w - data["y"][:, 0]) ** 2)
    gram = x.T @ x / noise

    def evidence(prior: float) -> float:
        return -prior * (w @ w) - np.linalg.slogdet(np.eye(2) + gram / prior)[1]

    prior = max(laplace.PRIORS, key=evidence)
    covariance = np.linalg.inv(gram + prior * np.eye(2))
    expected = np.sqrt(np.einsum("ni,ij,nj->n", new, covariance, new) + noise)
    np.testing.assert_allclose([float(row["sd0"]) for row in rows], expected, rtol=1e-3)
    np.testing.assert_allclose([float(row["y0"]) for row in rows], new @ w, rtol=1e-5)
    assert expected[1] > 1.02 * expected[0] > 0.1  # further from the samples it is less sure


@pytest.mark.slow
def test_probabilities_are_less_extreme_than_those_of_the_network() -> None:
    options = ["--data.name", "iris", "--model.sizes", "4,8,3", "--model.loss", "softmax_cross_entropy"]
    assert main(["run", "line.toml", *options, "--optimizer.learning-rate", "0.1", "--train.folder", "r"]) == 0
    new = np.random.default_rng(0).normal(3, 1.5, (20, 4))
    np.savez("new.npz", x=new)
    rows, output = predicted(), load("r").predict(new)
    names = [name for name in rows[0] if name.startswith("p ")]
    p = np.array([[float(row[name]) for name in names] for row in rows])
    plain = np.exp(output) / np.exp(output).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
    assert np.all(p.max(axis=1) < plain.max(axis=1) + 1e-6) and np.mean(plain.max(axis=1) - p.max(axis=1)) > 0.01
    assert [row["class"] for row in rows] == [names[k][2:] for k in p.argmax(axis=1)]


@pytest.mark.parametrize(
    ("options", "arguments", "expected"),
    [
        (["--model.loss", "huber"], [], "it is for labels with softmax_cross_entropy, and squared_error; r has huber"),
        ([], ["--prompt"], "--laplace: it is for --data"),
    ],
)
def test_what_it_is_not_for(
    options: list[str], arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "line.toml", "--train.folder", "r", "--train.epochs", "1", *options]) == 0
    source = ["--prompt", "a"] if arguments else ["--data", "new.npz"]
    capsys.readouterr()
    assert main(["predict", "r", *source, "--laplace"]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
