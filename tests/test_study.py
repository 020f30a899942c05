"""`jaxbp study` and the [study] table, against per-sample gradients by `jax.grad`, one batch after the other."""

import csv
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pyarrow.parquet
import pytest
from matplotlib import image
from rich.console import Console

import jaxbp
from jaxbp import MLP, persample
from jaxbp.cli import main
from jaxbp.run.compute import recording
from jaxbp.run.compute.epoch import epoch as one_epoch
from jaxbp.run.compute.optimizers import build
from jaxbp.run.compute.recording import Recording
from jaxbp.run.compute.step import State, StepSpec
from jaxbp.run.config import OptimizerConfig
from jaxbp.run.quantities import QUANTITIES, studied
from jaxbp.run.report import metrics, plots
from jaxbp.run.study import curvature
from jaxbp.run.study import measure as study
from jaxbp.run.study import plots as study_plots
from jaxbp.run.study import table as tables

pytestmark = pytest.mark.slow  # all of them need a run and its study, which take 12 s

DIGITS = """
[data]
name = "digits"
[model]
sizes = [64, 16, 10]
label_smoothing = 0.1
[optimizer]
learning_rate = 0.1
[train]
epochs = 2
plots = false
[study]
quantities = ["noise_scale", "squared_norms"]
every = 5
"""
IRIS = DIGITS.replace("digits", "iris").replace("[64, 16, 10]", "[4, 5, 3]")
DIABETES = """
[data]
name = "diabetes"
standardize_targets = true
[model]
sizes = [10, 4, 1]
loss = "squared_error"
[optimizer]
learning_rate = 0.1
"""
PICTURES = ("norms", "hardest", "easiest", "class_cosine", "noise_scale", "gram_spectrum")
EPOCH = jax.jit(one_epoch, static_argnums=0, donate_argnums=1)
AUTODIFF = jax.jit(oracles.value_and_grad, static_argnums=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs, and the run of one of them."""
    folder = tmp_path_factory.mktemp("study")
    for name, text in {"digits": DIGITS, "iris": IRIS, "diabetes": DIABETES}.items():
        (folder / f"{name}.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "digits.toml", "--train.folder", "run"]) == 0
        assert main(["study", "run"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(home)
    yield
    assert not list(home.rglob(".study-*"))  # nothing half-written stays


def table(path: str) -> dict[str, np.ndarray]:
    with open(path, newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return {
        name: np.array(column, str if name in ("label", "prediction") else float) for name, column in columns.items()
    }


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path, "metrics.jsonl").read_text().splitlines()]


def subject(split: str = "train") -> study.Subject:
    return study.prepare(Path("run"), split)


@functools.partial(jax.jit, static_argnums=0)
def gradients_by_sample(net: MLP, params: Any, x: Any, y: Any) -> Any:
    return jax.vmap(lambda x, y: AUTODIFF(net, params, x[None], y[None])[1])(x, y)


def flat_gradients(net: MLP, params: Any, x: Any, y: Any) -> np.ndarray:
    """(N, parameters) by `jax.grad`, a sample at a time."""
    grads = gradients_by_sample(net, params, x, y)
    return np.concatenate([np.asarray(g, np.float64).reshape(len(x), -1) for g in jax.tree.leaves(grads)], axis=1)


# --- recording --------------------------------------------------------------------------------------------------------


FEW, ONE = ("squared_norms", "noise_scale"), ("diversity",)  # which steps are recorded does not depend on what


@pytest.mark.parametrize(
    ("samples", "size", "every", "names"),
    [(10, 4, 2, tuple(recording.QUANTITIES)), (10, 4, 1, FEW), (10, 3, 3, ONE)],
)
def test_records_are_the_quantities_of_the_batches(samples: int, size: int, every: int, names: tuple[str, ...]) -> None:
    """Two epochs; the last batch is shorter, and the samples that fill it up do not count: f64, so 1e-10."""
    net = MLP((4, 5, 3), hidden="tanh")
    params, x, y = oracles.data(net, seed=1, batch=samples, dtype=jnp.float64)
    optimizer = build(OptimizerConfig(learning_rate=0.3), params)
    state = jax.tree.map(jnp.copy, State(params, optimizer.init(params), jnp.array(True)))
    record = Recording(names, every)
    spec = StepSpec(net, optimizer, size, recording=record)
    step, steps = 0, -(-samples // size)
    for epoch in (1, 2):
        key = jax.random.key(epoch)
        state, measured = EPOCH(spec, state, x, y, key, step % every)
        found = {row.step: row.line() for row in metrics.records(record, measured, epoch, step)}
        assert list(found) == [s + 1 for s in range(step, step + steps) if s % every == 0]
        order = np.asarray(jax.random.permutation(key, samples))
        for start in range(0, samples, size):
            step += 1
            batch = order[start : start + size]
            if row := found.get(step):
                assert set(names) <= set(row)
                assert_records(row, net, params, x[batch], y[batch])
            params = jaxbp.update(params, AUTODIFF(net, params, x[batch], y[batch])[1], 0.3)


@functools.partial(jax.jit, static_argnums=0)
def by_persample(net: MLP, params: Any, x: Any, y: Any) -> tuple[Any, dict[str, Any]]:
    loss, f = jaxbp.factors(net, params, x, y)
    names = ("noise_scale", "stiffness", "diversity", "coherence", "variance")
    return loss, {name: getattr(persample, name)(f) for name in names}


def assert_records(row: dict[str, Any], net: MLP, params: Any, x: Any, y: Any) -> None:
    loss, expected = by_persample(net, params, x, y)
    squared = (flat_gradients(net, params, x, y) ** 2).sum(axis=1)
    error = np.asarray(jax.nn.softmax(f_output(net, params, x)) - jax.nn.one_hot(y, 3))
    summaries = {"squared_norms": squared, "grand": np.sqrt(squared), "el2n": np.sqrt((error**2).sum(axis=1))}
    for name, values in ((name, values) for name, values in summaries.items() if name in row):
        quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        got = [row[name][key] for key in ("mean", "min", "q25", "median", "q75", "max")]
        np.testing.assert_allclose(got, [values.mean(), *quartiles], rtol=1e-10)
    if "squared_norms" in row:
        np.testing.assert_allclose(sum(row["squared_norms"]["mean_by_layer"]), squared.mean(), rtol=1e-10)
    for name in {"noise_scale", "stiffness"} & set(row):
        for key, value in expected[name]._asdict().items():
            np.testing.assert_allclose(row[name][key], float(value), rtol=1e-8, atol=1e-12, err_msg=key)
    for name in {"diversity", "coherence"} & set(row):
        np.testing.assert_allclose(row[name], float(expected[name]), rtol=1e-10)
    for layer, got in zip(expected["variance"], row.get("variance", ()), strict="variance" in row):
        np.testing.assert_allclose(got, np.concatenate([np.ravel(layer.w), layer.b]).mean(), rtol=1e-8)
    np.testing.assert_allclose(row["batch_loss"], float(jnp.mean(loss)), rtol=1e-10)
    if "sharpness" in row:
        assert_curvature(row, net, params, x, y)


def assert_curvature(row: dict[str, Any], net: MLP, params: Any, x: Any, y: Any) -> None:
    """Lanczos in as many steps as there are parameters is exact."""
    dense = oracles.dense(net, params, x, y)
    hessian, g = dense.hessian.mean(axis=0), dense.gradient.mean(axis=0)
    for kind, matrix in (("hessian", hessian), ("ggn", dense.ggn.mean(axis=0))):
        largest = np.linalg.eigvalsh(matrix)[-1]
        assert abs(row["sharpness"][kind] - largest) <= row["sharpness"][f"{kind}_residual"] + 1e-9 * largest
    np.testing.assert_allclose(row["gradient_curvature"], g @ hessian @ g / (g @ g), rtol=1e-8)
    layers = np.split(np.diag(hessian), [(net.sizes[0] + 1) * net.sizes[1]])
    np.testing.assert_allclose(row["hessian_trace"], [layer.sum() for layer in layers], rtol=1e-8)


def f_output(net: MLP, params: Any, x: Any) -> Any:
    return jax.vmap(lambda x: jaxbp.forward(net, params, x).x[-1])(x)


def test_the_curvature_of_a_batch() -> None:
    """A batch that is filled up with a sample of weight 0."""
    net = MLP((3, 4, 2), hidden="tanh")
    params, x, y = oracles.data(net, seed=2, batch=5, dtype=jnp.float64)
    grads = AUTODIFF(net, params, x, y)[1]
    filled = [jnp.concatenate([a, a[:1]]) for a in (x, y)]
    weights, f = jnp.array([1.0] * 5 + [0.0]), jaxbp.factors(net, params, *filled)[1]
    batch = recording.Batch(net, params, *filled, f, grads, weights, jnp.float64(5))
    names = tuple(recording.CURVATURE)
    found = jax.jit(functools.partial(recording.record, Recording(names, 1)))(batch)
    assert_curvature(jax.tree.map(np.asarray, found), net, params, x, y)


def test_steps_that_do_not_record_hold_nan() -> None:
    net = MLP((4, 5, 3))
    params, x, y = oracles.data(net, seed=1, batch=6, dtype=jnp.float32)
    optimizer = build(OptimizerConfig(learning_rate=0.3), params)
    state = jax.tree.map(jnp.copy, State(params, optimizer.init(params), jnp.array(True)))
    spec = StepSpec(net, optimizer, 2, recording=Recording(("diversity",), 2))
    _, measured = EPOCH(spec, state, x, y, jax.random.key(0), 1)
    assert np.isnan(measured.recorded["diversity"]).tolist() == [True, False, True]


def test_a_run_writes_its_records_before_the_line_of_the_epoch() -> None:
    rows = lines("run")
    assert [row["step"] for row in rows] == [1, 6, 11, 12, 16, 21, 24]  # 12 steps an epoch
    assert [row["epoch"] for row in rows] == [1, 1, 1, 1, 2, 2, 2]
    assert list(rows[0]) == ["epoch", "step", "batch_loss", "noise_scale", "squared_norms"]
    assert "train_loss" in rows[3] and "noise_scale" not in rows[3]
    assert all(row["squared_norms"]["min"] <= row["squared_norms"]["median"] for row in rows if "squared_norms" in row)


def test_recording_leaves_the_training_as_it_is() -> None:
    """To rounding: the compiler may fuse the step in another way."""
    assert main(["run", "digits.toml", "--train.folder", "plain", "--study.quantities="]) == 0
    assert [row["step"] for row in lines("plain")] == [12, 24]
    with_records, without = (jaxbp.run.load(folder).params for folder in ("run", "plain"))
    for a, b in zip(jax.tree.leaves(with_records), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_run_that_diverges_keeps_its_records(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--optimizer.learning-rate", "1e30", "--train.batch-size", "20", "--study.every", "1"]
    assert main(["run", "iris.toml", "--train.folder", "bad", *arguments]) == 3
    step = int(capsys.readouterr().err.split(" step ")[1].split()[0])
    assert [row["step"] for row in lines("bad")] == [*range(1, step + 1), step]
    assert lines("bad")[-1]["diverged"].startswith(("the loss is", "the gradient overflows"))


def test_an_unknown_quantity_in_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "iris.toml", "--train.folder", "never", "--study.quantities", "noise"]) == 2
    said = capsys.readouterr().err
    assert "study.quantities: unknown quantity 'noise', did you mean 'noise_scale'? Allowed: squared_norms, " in said
    assert said.count("\n") == 1 and not Path("never").exists()


# --- a whole data set -------------------------------------------------------------------------------------------------


def test_the_table_is_what_autodiff_says() -> None:
    """float32 through two layers of up to 64 products: 1e-4 of each value, of the largest one for cosines."""
    rows, s = table("run/study_train.csv"), subject()
    assert list(rows) == [
        *("index", "label", "prediction", "loss", "squared_norm", "squared_norm_layer_1", "squared_norm_layer_2"),
        *("norm", "el2n", "cosine_to_mean"),
    ]
    net = MLP((64, 16, 10))  # the loss without label smoothing
    gradients = flat_gradients(net, s.model.params, *s.data)
    norms = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(rows["norm"], norms, rtol=1e-4)
    np.testing.assert_allclose(rows["squared_norm"], norms**2, rtol=2e-4)
    np.testing.assert_allclose(rows["squared_norm_layer_1"] + rows["squared_norm_layer_2"], norms**2, rtol=2e-4)
    mean = gradients.mean(axis=0)
    np.testing.assert_allclose(rows["cosine_to_mean"], gradients @ mean / norms / np.linalg.norm(mean), atol=1e-4)
    output = f_output(net, s.model.params, s.data.x)
    error = jax.nn.softmax(output) - jax.nn.one_hot(s.data.y, 10, dtype=jnp.float32)
    np.testing.assert_allclose(rows["el2n"], np.linalg.norm(error, axis=1), rtol=1e-4)
    np.testing.assert_allclose(
        rows["loss"], -jax.nn.log_softmax(output)[np.arange(len(s.y)), s.y], rtol=1e-4, atol=1e-6
    )
    assert rows["index"].tolist() == list(range(1437)) and rows["label"].tolist() == [str(k) for k in s.y]
    assert rows["prediction"].tolist() == [str(k) for k in s.model.predict(s.x).argmax(axis=1)]


@pytest.mark.parametrize("chunk", [7, 5000])
def test_what_is_measured_of_the_whole_split(chunk: int) -> None:
    s = subject("test")
    results = study.measure(s, [name for name in studied() if not QUANTITIES[name].curvature], chunk)
    gradients = flat_gradients(s.net, s.model.params, *s.data)
    count, squared, mean = (
        len(gradients),
        (gradients**2).sum(axis=1).mean(),
        gradients.mean(axis=0) @ gradients.mean(axis=0),
    )
    trace, signal = gradients.var(axis=0, ddof=1).sum(), (count * mean - squared) / (count - 1)
    expected = [trace / signal, trace, signal, squared / mean / count, mean / squared]
    np.testing.assert_allclose(list(results.numbers.values()), expected, rtol=1e-3)
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert results.class_cosine is not None and results.eigenvalues is not None
    for a, b in [(0, 0), (3, 8), (8, 3), (9, 9)]:
        pairs = cosines[np.ix_(s.y == a, s.y == b)]
        exact = pairs.mean() if a != b else pairs[~np.eye(len(pairs), dtype=bool)].mean()
        np.testing.assert_allclose(results.class_cosine[a, b], exact, atol=1e-5)
    spectrum = np.linalg.eigvalsh(gradients @ gradients.T)[::-1] / count
    np.testing.assert_allclose(results.eigenvalues, spectrum, atol=1e-5 * spectrum[0])


def test_a_class_with_one_or_no_sample_has_no_pair() -> None:
    s = subject()
    few = np.concatenate([np.flatnonzero(s.y == 1)[:3], np.flatnonzero(s.y == 2)[:1]])
    data = type(s.data)(s.data.x[few], s.data.y[few])
    cosine = study.measure(s._replace(data=data, x=s.x[few], y=s.y[few]), ["cosine"], 10).class_cosine
    assert cosine is not None
    assert np.argwhere(np.isfinite(cosine)).tolist() == [[1, 1], [1, 2], [2, 1]]


def test_pictures_of_a_run() -> None:
    for name in PICTURES:
        pixels = image.imread(f"run/study_train_{name}.png")[..., :3]
        assert min(pixels.shape[:2]) >= 200 and max(pixels.shape[:2]) <= 2000
        assert 0.002 < np.mean(pixels.min(axis=-1) < 0.9) < 0.95, name


def test_the_same_bytes_again_and_parquet_holds_the_same_numbers(tmp_path: Path) -> None:
    assert main(["study", "run", "--out", str(tmp_path / "a.parquet")]) == 0
    for name in PICTURES:
        assert (tmp_path / f"a_{name}.png").read_bytes() == Path(f"run/study_train_{name}.png").read_bytes()
    stored = pyarrow.parquet.read_table(str(tmp_path / "a.parquet")).to_pydict()
    rows = table("run/study_train.csv")
    assert list(stored) == list(rows)
    for name, column in rows.items():
        values = np.array(stored[name], np.float32 if column.dtype.kind == "f" else None)
        assert np.array_equal(values, column.astype(values.dtype)), name


def test_a_regression_at_initialisation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "diabetes.toml", "--split", "test", "--chunk", "10"]) == 0
    said = capsys.readouterr().out
    assert "at initialisation, untrained" in said and "89" in said and "correct" not in said
    rows = table("diabetes_study_test.csv")
    assert list(rows)[:4] == ["index", "target0", "prediction0", "loss"] and "el2n" not in rows
    s = study.prepare(Path("diabetes.toml"), "test")
    np.testing.assert_allclose(rows["target0"], s.y[:, 0])
    np.testing.assert_allclose(rows["prediction0"], s.model.predict(s.x)[:, 0], rtol=1e-5)
    norms = np.linalg.norm(flat_gradients(s.net, s.model.params, *s.data), axis=1)
    np.testing.assert_allclose(rows["norm"], norms, rtol=1e-4)
    assert {path.name for path in Path().glob("diabetes_study*")} == {
        *("diabetes_study_test.csv", "diabetes_study_test_norms.png", "diabetes_study_test_gram_spectrum.png")
    }


def test_one_hot_targets_of_another_loss() -> None:
    Path("squared.toml").write_text(IRIS.replace("label_smoothing = 0.1", 'loss = "squared_error"'))
    assert main(["study", "squared.toml", "--quantities", "cosine", "squared_norms", "--out", "s.csv"]) == 0
    assert set(table("s.csv")["label"]) == {"setosa", "versicolor", "virginica"} and "norm" not in table("s.csv")


def test_the_curvature_of_a_split() -> None:
    """Spectra against the dense matrices of the mean loss, in float32; influences add up over the test samples."""
    s = study.prepare(Path("iris.toml"))
    found = study.measure(s, ["hessian", "ggn", "ntk", "influence"], 50)
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), s.model.params)
    dense = oracles.dense(s.net, wide, jnp.asarray(s.data.x, jnp.float64), s.data.y)
    for kind in ("hessian", "ggn"):
        values, vectors = np.linalg.eigh(getattr(dense, kind).mean(axis=0))
        of = found.spectra[kind]
        np.testing.assert_allclose(of.eigenvalues[:3], values[::-1][:3], rtol=1e-3)
        np.testing.assert_allclose(of.shares[0, 0], np.sum(vectors[:25, -1] ** 2), rtol=1e-2)
        np.testing.assert_allclose(of.shares.sum(axis=1), 1, rtol=1e-4)
        assert found.numbers[f"largest eigenvalue of the {curvature.KINDS[kind]}"] == of.eigenvalues[0]
    assert found.kernel is not None and found.influence is not None
    matrix, rows = found.kernel
    assert np.all(np.diff(s.y[rows]) >= 0) and np.linalg.eigvalsh(matrix)[0] > -1e-4 * matrix.max()
    losses, test = np.arange(30.0), s.problem.on_device("test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature, "TESTS", 30)
        single = curvature.influence(s.net, s.model.params, s.data, test, losses, 7)
    np.testing.assert_array_equal(single.tests, np.arange(30)[::-1])
    scale = np.abs(single.on_samples).max()
    np.testing.assert_allclose(single.on_samples.mean(axis=1), found.columns["influence"], atol=1e-4 * scale)


def test_the_pictures_of_the_curvature(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["hessian", "ggn", "ntk", "influence"]
    assert main(["study", "run", "--quantities", *asked, "--out", "curved.csv"]) == 0
    assert "largest eigenvalue of the Hessian: " in capsys.readouterr().out
    assert {path.name for path in Path().glob("curved_*")} == {f"curved_{name}.png" for name in asked}
    assert np.isfinite(table("curved.csv")["influence"]).all()


# --- the command ------------------------------------------------------------------------------------------------------


def errors() -> dict[str, tuple[list[str], str]]:
    return {
        "quantity": (
            ["run", "--quantities", "grant"],
            "unknown quantity 'grant', did you mean 'grand'? Allowed: squared",
        ),
        "split": (
            ["run", "--split", "tset"],
            "unknown split 'tset', did you mean 'test'? Allowed: train, validation, test",
        ),
        "chunk": (["run", "--chunk", "0"], "--chunk: got 0"),
        "no number": (["run", "--chunk", "many"], "invalid int value: 'many'"),
        "extension": (["run", "--out", "a.xlsx"], "unknown extension '.xlsx'"),
        "no folder": (["run", "--out", "nowhere/a.csv"], "'nowhere/a.csv' can't be written: No such file or directory"),
        "a file": (["run", "--out", "iris.toml/a.csv"], "can't be written"),
        "is there": (["run"], "run/study_train.csv exists; name another file or pass --overwrite"),
        "no source": (["gone.toml"], "gone.toml: no such file"),
        "no run": ([".", "--out", "a.csv"], "not a run folder: needs config.toml and params.safetensors"),
        "el2n": (
            ["diabetes.toml", "--quantities", "el2n"],
            "el2n needs the loss softmax_cross_entropy of the output id",
        ),
        "influence": (["run", "--split", "test", "--quantities", "influence"], "influence is that of training samples"),
        "argument": (["run", "--qantities", "grand"], "unknown argument '--qantities'"),
        "missing": ([], "RUN_DIR|CONFIG"),
    }


@pytest.mark.parametrize("name", errors())
def test_errors_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = errors()[name]
    before = sorted(Path().rglob("*"))
    assert main(["study", *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.startswith("jaxbp: ") and said.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_data_that_changed_since_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 3
    np.savez(tmp_path / "d.npz", x=x, y=y)
    overrides = ["--data.name", str(tmp_path / "d.npz"), "--train.folder", str(tmp_path / "r"), "--study.quantities="]
    assert main(["run", "iris.toml", *overrides]) == 0
    np.savez(tmp_path / "d.npz", x=x + 1, y=y)
    assert main(["study", str(tmp_path / "r")]) == 2
    assert "is not the data that the run was trained on" in capsys.readouterr().err


def test_nothing_is_written_unless_all_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_plots, "gram_spectrum", fail)
    assert main(["study", "run", "--out", str(tmp_path / "a.csv")]) == 130
    assert not list(tmp_path.iterdir())


def test_in_a_process_of_its_own() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxbp", "study", "run", "--quantities", "el22n"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("jaxbp: --quantities: unknown quantity 'el22n', did you mean 'el2n'?")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def diverged(home: Path) -> Path:
    """A run whose parameters give some samples gradients that overflow."""
    folder = home / "diverged"
    shutil.copytree(home / "run", folder, ignore=lambda *_: [name for name in _[1] if name.startswith("study")])
    model = jaxbp.run.load(folder)
    last = model.params[-1]
    large = last.w.at[3].mul(2e38)
    model._replace(params=(*model.params[:-1], last._replace(w=large))).save(folder)
    return folder


def test_samples_that_are_not_finite_are_named_and_the_rest_is_written(
    diverged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(diverged), "--split", "test"]) == 0
    rows = table(str(diverged / "study_test.csv"))
    bad = np.flatnonzero(~np.isfinite(rows["norm"]))
    assert 0 < len(bad) < len(rows["norm"]) == 360
    said = capsys.readouterr().out
    shown = ", ".join(map(str, bad[:10])) + ", …" * (len(bad) > 10)
    assert f"left out: {len(bad)} of 360 samples, their gradients are not finite: {shown}\n" in said
    assert (diverged / "study_test_norms.png").exists()


def test_the_whole_is_that_of_the_finite_samples() -> None:
    """A sample of NaN changes nothing but its own row."""
    s = subject("test")
    x, raw = s.data.x.at[5].set(jnp.nan), np.delete(np.arange(360), 5)
    asked = ["cosine", "noise_scale", "diversity", "coherence", "gram"]
    found = study.measure(s._replace(data=s.data._replace(x=x)), asked, 100)
    rest = s._replace(data=type(s.data)(s.data.x[raw], s.data.y[raw]), x=s.x[raw], y=s.y[raw])
    expected = study.measure(rest, asked, 100)
    assert np.flatnonzero(~found.finite).tolist() == [5]
    assert found.numbers == pytest.approx(expected.numbers, rel=1e-4)
    np.testing.assert_allclose(found.columns["cosine_to_mean"][raw], expected.columns["cosine_to_mean"], atol=1e-5)
    np.testing.assert_allclose(found.class_cosine, expected.class_cosine, atol=1e-5)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, atol=1e-5 * expected.eigenvalues[0])


def test_norms_whose_squares_overflow_have_the_cosines_of_those_that_do_not() -> None:
    """The network is homogeneous without biases, and the targets are nothing beside its outputs."""
    s = study.prepare(Path("diabetes.toml"))
    found = [
        study.measure(s._replace(data=s.data._replace(x=s.data.x * 2.0**power)), ["cosine", "coherence"], 100)
        for power in (30, 58)
    ]
    assert np.isinf(found[1].columns["squared_norm"]).mean() > 0.5 and np.isfinite(found[1].columns["norm"]).all()
    np.testing.assert_allclose(found[1].columns["cosine_to_mean"], found[0].columns["cosine_to_mean"], atol=1e-5)
    assert found[1].numbers == pytest.approx(found[0].numbers, rel=1e-5)
    assert 0 < found[1].numbers["coherence ‖mean g‖² / mean ‖g‖²"] < 1


def test_gradients_of_zero_have_no_diversity() -> None:
    """As in persample: 0, not NaN; infinite where only their sum is 0."""
    zero = (jaxbp.Affine(np.zeros((1, 1)), np.zeros(1)),)
    name = "diversity Σ ‖g‖² / ‖Σ g‖²"
    assert study._numbers({"diversity"}, np.zeros(3), zero) == {name: 0.0}
    assert study._numbers({"diversity"}, np.ones(3), zero) == {name: np.inf}


def test_a_noise_scale_that_the_noise_hides_is_not_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    mean = (jaxbp.Affine(np.full((1, 1), 0.1), np.zeros(1)),)
    numbers = study._numbers({"noise_scale"}, np.ones(4), mean)
    assert np.isnan(numbers["noise scale tr Σ / |G|² (samples)"]) and numbers["|G|²"] < 0
    results = study.Results({}, np.ones(360, bool), numbers)
    tables.print_summary(subject("test"), {"index": np.arange(360), "loss": np.ones(360)}, results, Console())
    said = capsys.readouterr().out
    assert "noise scale tr Σ / |G|² (samples): not estimated, |G|² can't be seen for the noise\n" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_no_number_of_the_summary_is_cut(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {name: np.full(360, 0.123456) for name in ("loss", "norm", "squared_norm", "el2n", "cosine_to_mean")}
    columns = {"index": np.arange(360), "label": np.array(["0"]), "prediction": np.array(["0"])} | numbers
    columns |= {name: np.resize(columns[name], 360) for name in ("label", "prediction")}
    results = study.Results({}, np.ones(360, bool), {})
    tables.print_summary(subject("test"), columns, results, Console(width=40, force_terminal=terminal))
    said = capsys.readouterr().out
    assert "…" not in said and said.count("0.123") == 6 * 11
    assert max(map(len, said.splitlines())) <= 40 or not terminal


def test_an_unfinished_run_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("run", tmp_path / "r")
    (tmp_path / "r" / ".unfinished").touch()
    assert main(["study", str(tmp_path / "r"), "--quantities", "squared_norms", "--out", str(tmp_path / "s.csv")]) == 0
    assert f"{tmp_path / 'r'}, as trained so far, unfinished: digits" in capsys.readouterr().out


def test_overwriting_removes_the_pictures_of_the_earlier_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "again.csv", "--overwrite", "--quantities"]
    assert main(["study", "run", *out, "gram"]) == 0
    assert main(["study", "run", *out, "grand"]) == 0
    said = capsys.readouterr().out
    assert "run, as trained: digits · 64-16-10 relu · softmax_cross_entropy · 1,437 training samples · grand\n" in said
    assert "again.csv, again_norms.png, again_hardest.png, again_easiest.png" in said and "\x1b" not in said
    assert {path.stem for path in Path().glob("again*")} == {"again", "again_norms", "again_hardest", "again_easiest"}
    np.testing.assert_allclose(table("again.csv")["norm"], table("run/study_train.csv")["norm"], rtol=1e-5)


def test_help_names_every_quantity(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in studied())


# --- its pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0], [1e-30, 1e30], [np.nan, np.inf, 1.0]])
def test_norms_without_a_spread(values: list[float]) -> None:
    figure = study_plots.norms({"a": np.array(values), "b": np.array([])}, "samples", "the run")
    figure.draw_without_rendering()
    first, second = (axis.texts[0].get_text() for axis in figure.axes)
    notes = {0.0: ", 2 are 0", np.inf: ", 2 not finite"}.get(values[1] if len(values) > 1 else 2.0, "")
    assert (first, second) == (f"a (n = {len(values)}{notes})", "b (n = 0)")


@pytest.mark.parametrize("eigenvalues", [[0.0], [1.0], [0.0, 0.0], [2.0, 1.0, -1e-9]])
def test_spectra_without_a_logarithm(eigenvalues: list[float]) -> None:
    figure = study_plots.gram_spectrum(np.array(eigenvalues), 5, "samples", "the run")
    figure.draw_without_rendering()
    assert "Gram matrix" in figure.axes[0].get_title() and figure.axes[1].lines[0].get_ydata()[-1] <= 100


def test_the_hardest_have_an_index_and_wrong_ones_are_red() -> None:
    rows = [7, 8], ["a", "b"], ["a", "a"], [2.0, 1.0]
    figure = plots.images(np.ones((2, 4, 4)), *rows, "title", "the run")
    captions = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert captions == {"7: a → a\n2": "black", "8: b → a\n1": "tab:red"}
