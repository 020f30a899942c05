"""[data] pca: inputs on their principal directions, with noise in a private run, and the same ones ever after."""

from pathlib import Path
from typing import Any

import dp_accounting
import jax
import numpy as np
import pytest
from test_run_private import Killed

from jaxbp.cli import main
from jaxbp.private import Accounting
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run import problem as problems
from jaxbp.run.data import Projection, Scaling
from jaxbp.run.data import projection as projections
from jaxbp.run.store.model import load

IRIS = """
[data]
name = "iris"
pca = 3
[model]
sizes = [3, 5, 3]
[optimizer]
learning_rate = 0.5
[train]
epochs = 3
batch_size = 30
plots = false
"""
PRIVATE = (
    *("--data.standardize", "none", "--privacy.max-norm", "1.0", "--privacy.noise-multiplier", "1.5"),
    *("--privacy.delta", "1e-3", "--privacy.accountant", "rdp", "--privacy.pca-noise", "4.0"),
)
VALUES = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7) + 1


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(IRIS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(*arguments: str, status: int = 0, folder: str = "run") -> None:
    assert main(["run", "x.toml", "--train.folder", folder, *arguments]) == status


# --- the directions ---------------------------------------------------------------------------------------------------


def test_the_directions_are_those_of_the_rows_of_norm_1() -> None:
    rows = VALUES / np.linalg.norm(VALUES, axis=1, keepdims=True)
    right = np.linalg.svd(rows)[2].T
    fitted = Projection.fit(VALUES, 4, "feature")
    found = fitted.directions
    np.testing.assert_allclose(np.abs(np.sum(found * right[:, :4], axis=0)), 1, rtol=1e-12)
    scaled = fitted.apply(VALUES)
    np.testing.assert_allclose(scaled, Scaling.fit(rows @ found).apply(rows @ found), rtol=1e-9, atol=1e-12)
    assert fitted.apply(VALUES, np.float32).dtype == np.float32


def test_no_row_has_a_norm_above_1_and_none_moves_the_products_by_more() -> None:
    """Whatever it is: the sensitivity that the noise is for."""
    odd = [np.zeros(6), np.full(6, 1e300), np.full(6, 1e-310), [-1e308, 1e-308, 0, 0, 0, 0], VALUES[0]]
    for row in odd:
        moved = projections.products(np.vstack([VALUES, row])) - projections.products(VALUES)
        assert np.linalg.norm(moved) <= 1 + 1e-13
        assert np.linalg.norm(moved) == pytest.approx(float(np.any(row)), rel=1e-13)
    assert np.linalg.norm(projections.unit(np.full((1, 4), -128, np.int8))) == pytest.approx(1)


def test_the_noise_is_the_symmetric_part_of_that_of_a_gaussian_mechanism() -> None:
    """Of σ z it leaves the variance σ² on the diagonal and σ²/2 beside it."""
    found = projections.products(np.zeros((2, 300)), 3.0, seed=0)
    np.testing.assert_array_equal(found, found.T)
    beside, diagonal = found[np.triu_indices(300, 1)], np.diag(found)
    assert np.var(beside) == pytest.approx(9 / 2, rel=5 * np.sqrt(2 / beside.size))
    assert np.var(diagonal) == pytest.approx(9, rel=5 * np.sqrt(2 / 300))
    assert np.any(found != projections.products(np.zeros((2, 300)), 3.0))


def test_many_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = projections.products(VALUES)
    monkeypatch.setattr("jaxbp.run.data.scaling.CHUNK", 40)
    np.testing.assert_allclose(projections.products(VALUES), whole, rtol=1e-13)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_predicts_with_the_directions_that_it_was_trained_with(capsys: pytest.CaptureFixture[str]) -> None:
    run("--train.epochs", "1")
    problem, model = problems.pose(configs.read(Path("run/config.toml"))), load("run")
    x, _ = problem.on_device("test")
    assert isinstance(model.inputs, Projection) and x.shape[1:] == (3,)
    output = np.asarray(jax.vmap(lambda x: x @ model.params[0].w.T)(x))
    np.testing.assert_allclose(np.asarray(model.scaled(problem.raw("test")[0]) @ model.params[0].w.T), output)
    np.savez("new.npz", x=problem.raw("test")[0])
    assert main(["predict", "run", "--data", "new.npz"]) == 0
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), expected \(N, 4\)"):
        model.predict(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.pca", "5", "--model.sizes", "5,3"], "data.pca: got 5, the inputs have 4 directions"),
        (["--data.pca", "2"], "model.sizes: begins with 3, data.pca gives 2 inputs"),
        (["--data.name", "digits", "--data.pca", "64", "--model.sizes", "64,10"], "the inputs have 60 directions"),
        (["--privacy.pca-noise", "1"], "privacy.max_norm: set it"),
        (
            [*PRIVATE, "--privacy.pca-noise", "none"],
            "privacy.pca_noise: it goes with data.pca, which takes all samples",
        ),
        ([*PRIVATE, "--data.pca", "none", "--model.sizes", "4,3"], "privacy.pca_noise: it goes with data.pca"),
        (
            [*PRIVATE, "--privacy.noise-multiplier", "none", "--privacy.epsilon", "0.5"],
            "privacy.epsilon is 0.5, too little for 12 steps after the PCA, whatever their noise",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*options, status=2)
    shown = capsys.readouterr().err.splitlines()
    assert said in shown[-1] and not Path("run").exists()


def test_epsilon_is_of_the_directions_and_of_the_steps() -> None:
    plan = loop.prepare(configs.read(Path("x.toml"), PRIVATE)).spec.privacy
    pca = dp_accounting.GaussianDpEvent(4.0)
    for count in (4, 12):
        steps = Accounting(0.25, count, 1e-3, "rdp").event(1.5)
        both = dp_accounting.rdp.RdpAccountant().compose(pca).compose(steps).get_epsilon(1e-3)
        assert plan.epsilon(count) == pytest.approx(both, rel=1e-12)
    told = plan.provenance()["privacy"]
    event = eval(told["event"], vars(dp_accounting))
    assert dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-3) == told["epsilon"] == plan.epsilon()
    assert "after a PCA with σ = 4 and 12 steps of Poisson sampling" in plan.describe()


@pytest.mark.slow
def test_noise_that_is_looked_for_leaves_room_for_the_directions() -> None:
    accounting = Accounting(1.0, 50, 1e-5, pca_noise=4.0)
    noise = accounting.noise_multiplier(3.0)
    assert 3.0 * (1 - 1e-3) < accounting.epsilon(noise) <= 3.0
    assert noise > Accounting(1.0, 50, 1e-5).noise_multiplier(3.0)


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_directions_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise comes from no seed, so that they could not be drawn again."""
    original, calls = loop._keep, []

    def keep(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_keep", keep)
        run(*PRIVATE, "--checkpoint.every", "1")
    begun = load("run").inputs
    run(*PRIVATE, "--checkpoint.every", "1")
    ended = load("run").inputs
    assert begun is not None and ended is not None
    for a, b in zip(begun, ended, strict=True):
        np.testing.assert_array_equal(a, b)
    run(*PRIVATE, folder="other")
    assert not np.allclose(np.abs(load("other").inputs[0]), np.abs(ended[0]))


@pytest.mark.slow
def test_study_and_audit_take_the_directions_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run(*PRIVATE)
    assert main(["study", "run"]) == 0
    assert main(["audit", "run", "--canaries", "20"]) == 0
    assert "the promise held" in capsys.readouterr().out


@pytest.mark.slow
def test_a_member_of_a_sweep_is_the_separate_run() -> None:
    run(*PRIVATE, "--privacy.seed", "3", "--sweep.seeds", "2", folder="sweep")
    member = next(Path("sweep/members").glob("seed-1*"))
    assert main(["run", str(member / "config.toml"), "--train.folder", "alone"]) == 0
    assert (member / "params.safetensors").read_bytes() == Path("alone/params.safetensors").read_bytes()


@pytest.mark.devices
@pytest.mark.slow
def test_a_mesh_has_the_same_directions() -> None:
    run(*PRIVATE, "--privacy.seed", "3", "--model.dtype", "float64", folder="one")
    run(*PRIVATE, "--privacy.seed", "3", "--model.dtype", "float64", "--mesh.data", "2", folder="mesh")
    for a, b in zip(jax.tree.leaves(load("one").params), jax.tree.leaves(load("mesh").params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(load("one").inputs[0], load("mesh").inputs[0])
