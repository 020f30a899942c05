"""Runs from Python: `jaxbp.run.train` is `jaxbp run`, with data and callbacks of whoever calls."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxbp.run
from jaxbp.cli import main
from jaxbp.run.config import Config, DataConfig
from jaxbp.run.data.dataset import from_arrays, load
from jaxbp.run.errors import Diverged, UserError
from jaxbp.run.store import runs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
Y = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 1)
CONFIG: dict[str, Any] = {
    "model": {"sizes": [3, 4, 3]},
    "optimizer": {"learning_rate": 0.5},
    "train": {"epochs": 3, "batch_size": 8, "plots": False},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_it_is_the_run_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes, whether the data are those that the config names or are given."""
    np.savez("d.npz", x=X, y=Y)
    Path("d.toml").write_text(
        '[data]\nname = "d.npz"\n[model]\nsizes = [3, 4, 3]\n[optimizer]\nlearning_rate = 0.5\n'
        "[train]\nepochs = 3\nbatch_size = 8\nplots = false\n"
    )
    assert main(["run", "d.toml", "--train.folder", "command"]) == 0
    capsys.readouterr()
    given = jaxbp.run.train("d.toml", (X, Y))
    assert capsys.readouterr() == ("", "") and given.folder == Path("runs/d")
    for name in ("metrics.jsonl", "params.safetensors"):
        assert (given.folder / name).read_bytes() == Path("command", name).read_bytes()
    assert given.history == runs.rows(Path("command/metrics.jsonl"))
    assert runs.read(given.folder).scores.items() <= given.history[-1].items()


def test_what_a_run_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    run = jaxbp.run.train(CONFIG, (X, Y, X[:10], Y[:10]))
    p = run.predict_proba(X)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_array_equal(run.predict(X), p.argmax(axis=1))
    assert run.score(X[:10], Y[:10]) == run.score(X[:10], Y[:10, None]) == run.history[-1]["test_accuracy"]
    table = run.study(["grand"])
    assert len(table["norm"]) == 40 and (table["norm"] > 0).all()
    assert sorted(table) == ["index", "label", "loss", "norm", "prediction"]
    assert not list(run.folder.glob("study*"))
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=tuple))
    assert run.frame == tuple(run.history)
    shown = run._repr_html_()
    assert "<caption>Model(3-4-3, " in shown and "<caption>runs/arrays-from-python</caption><tr><td>epoch</td>" in shown
    assert f"<tr><td>3</td><td>15</td><td>{run.history[-1]['train_loss']:.5g}</td>" in shown


def test_a_regression_scores_r2() -> None:
    tables = CONFIG | {"model": {"sizes": [3, 1], "loss": "squared_error"}, "optimizer": {"learning_rate": 0.1}}
    y = X @ [1.0, 2.0, 3.0]
    run = jaxbp.run.train(tables, (X, y, X, y))
    assert run.score(X, y) == run.score(X, y[:, None]) == pytest.approx(run.history[-1]["test_r2"], rel=1e-4)
    with pytest.raises(ValueError, match="squared_error has no probabilities of classes"):
        run.predict_proba(X)


def test_callbacks_see_each_epoch_and_their_own_copy_of_the_parameters() -> None:
    seen: list[Any] = []
    run = jaxbp.run.train(CONFIG, (X, Y), callbacks=[lambda row, params: seen.append((row, params))])
    assert [row for row, _ in seen] == run.history and run.folder == Path("runs/arrays-from-python")
    for ours, theirs in zip(jax.tree.leaves(seen[-1][1]), jax.tree.leaves(run.model.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(seen[0][1][0].w, seen[1][1][0].w)


def test_a_callback_that_raises_is_named() -> None:
    def my_callback(row: dict[str, Any], _: Any) -> None:
        if row["epoch"] == 2:
            raise KeyError("a bug of the user's")

    with pytest.raises(KeyError) as caught:
        jaxbp.run.train(CONFIG, (X, Y), callbacks=[my_callback], folder="run")
    [note] = caught.value.__notes__
    assert note.startswith("in the callback ") and note.endswith("my_callback, after epoch 2")
    assert len(runs.rows(Path("run/metrics.jsonl"))) == 2


@pytest.mark.parametrize(
    ("config", "data", "said"),
    [
        (CONFIG, (X,), r"data: got 1 arrays, allowed: \(x, y\), \(x, y, x_test, y_test\) or a dictionary"),
        (CONFIG, {"x": X, "y": Y, "x_val": X}, "data: no array 'y_val', did you mean 'x_val'. There are: x, y, x_val"),
        (CONFIG, {"x": X, "y": Y, "z": X}, "data: unknown array 'z'."),
        (CONFIG, (X, Y[:7]), "arrays-from-python: x has 40 rows and y has 7"),
        (CONFIG | {"modle": {}}, None, "config: unknown key 'modle', did you mean 'model'"),
        (CONFIG | {"sweep": {"seeds": 2}}, None, "sweep: train gives one run"),
        ("no.toml", None, "no.toml: no such file"),
    ],
)
def test_what_does_not_fit(config: Any, data: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        jaxbp.run.train(config, data)
    assert not Path("runs").exists()


def test_a_run_that_diverges_leaves_its_folder() -> None:
    with pytest.raises(Diverged):
        jaxbp.run.train(CONFIG | {"optimizer": {"learning_rate": 1e30}}, (X, Y), folder="bad")
    assert runs.read(Path("bad")).state == "diverged"


def test_what_numpy_makes_an_array_of_is_taken() -> None:
    """As it does of the frames and columns of pandas and polars."""

    class Frame:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return self.values

    ours, theirs = from_arrays(Config().data, (Frame(X), Frame(Y))), from_arrays(Config().data, (X, Y))
    assert all(np.array_equal(a, b) for a, b in zip(ours[1:5], theirs[1:5], strict=True))


def test_a_validation_set_of_its_own() -> None:
    data = {"x": X, "y": Y, "x_val": X[:8], "y_val": Y[:8], "weights": np.ones(40)}
    found = from_arrays(Config().data, data)
    assert found.x_validation is not None and found.weights is not None
    np.testing.assert_array_equal(found.x_validation, X[:8])
    given = jaxbp.run.train(CONFIG, data)
    assert "validation_loss" in given.history[-1] and "test_loss" not in given.history[-1]


def test_classes_with_names_are_scored_by_names_and_by_numbers() -> None:
    iris = {"data": {"name": "iris"}, "model": {"sizes": [4, 3]}, "optimizer": {"learning_rate": 0.1}}
    run = jaxbp.run.train(iris | {"train": {"epochs": 1, "plots": False}})
    data = load(DataConfig("iris"))
    names = run.predict(data.x_test)
    assert set(names) <= {"setosa", "versicolor", "virginica"}
    assert run.score(data.x_test, data.y_test) == run.history[-1]["test_accuracy"]
    assert run.score(data.x_test, names) == 1
    with pytest.raises(UserError, match="y has the label 'rose', allowed: setosa, versicolor, virginica"):
        run.score(data.x_test[:1], ["rose"])
