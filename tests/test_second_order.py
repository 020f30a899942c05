"""The second-order optimisers: each step against dense matrices in float64, λ against its rule, and in runs."""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from oracles import assert_close

import jaxbp
from jaxbp import MLP, kronecker
from jaxbp.cli import main
from jaxbp.second_order import DECAY, EVERY, Batch, gauss_newton, kfac, natural_gradient

NET = MLP((3, 4, 3), "tanh")
WEIGHTS, COUNT = np.array([1.0, 0.0, 2.0, 1.0, 1.0]), 5.0
RATE, DAMPING = 0.5, 0.3


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


@functools.cache
def case(seed: int = 0) -> tuple[Any, Batch, np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, a batch, and of its mean loss g, G and the empirical F."""
    params, x, y = oracles.data(NET, seed, 5)
    dense, w = oracles.dense(NET, params, x, y), WEIGHTS / COUNT
    g, ggn = w @ dense.gradient, np.einsum("n,npq->pq", w, dense.ggn)
    fisher = np.einsum("n,np,nq->pq", w, dense.gradient, dense.gradient)
    return params, Batch(x.at[1].set(jnp.nan), y, jnp.asarray(WEIGHTS), COUNT), g, ggn, fisher


LOSS = jax.jit(lambda params, batch: jaxbp.value_and_grad(NET, params, *batch)[0])
GRADIENT = jax.jit(lambda params, batch: jaxbp.value_and_grad(NET, params, *batch)[1])


def stepped(optimizer: Any, params: Any, batch: Batch, steps: int = 1) -> tuple[list[Any], list[Any]]:
    """The updates of some steps at the same parameters, and the states; the first state is that before."""
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    updates, states = [], [state]
    for _ in range(steps):
        d, state = update(GRADIENT(params, batch), state, params, batch=batch)
        updates.append(d)
        states.append(state)
    return updates, states


def test_the_natural_gradient_is_that_of_the_dense_fisher_matrix() -> None:
    params, batch, g, _, fisher = case()
    [d], states = stepped(natural_gradient(NET, lambda count: RATE * (count + 1), DAMPING), params, batch)
    assert_close(flat(d), -RATE * np.linalg.solve(fisher + DAMPING * np.eye(len(g)), g), 1e-11, "−η (F + λ)⁻¹ g")
    assert int(states[1]) == 1


def test_gauss_newton_is_that_of_the_dense_matrix() -> None:
    """CG ends where the residual is 10⁻³ of ‖g‖; the condition of G + λ is below 10."""
    params, batch, g, ggn, _ = case()
    [d], _ = stepped(gauss_newton(NET, RATE, DAMPING), params, batch)
    matrix = ggn + DAMPING * np.eye(len(g))
    residual = np.linalg.norm(matrix @ flat(d) / RATE + g)
    assert residual <= 1e-3 * np.linalg.norm(g) < np.linalg.norm(g)
    assert_close(flat(d), -RATE * np.linalg.solve(matrix, g), 1e-2, "−η (G + λ)⁻¹ g")


@functools.cache
def six_steps_of_kfac() -> tuple[list[Any], list[Any]]:
    params, batch, *_ = case()
    return stepped(kfac(NET, 1.0, DAMPING, inverse_every=5, seed=7), params, batch, steps=6)


@pytest.mark.slow
def test_a_step_of_kfac_minimises_the_model_over_its_plane() -> None:
    """Its gradient at d is orthogonal to Δ and to the last step; the first step has Δ alone."""
    params, batch, g, ggn, _ = case()
    updates, states = six_steps_of_kfac()
    for number, d in enumerate(updates[:3]):
        before = states[number]
        grads = GRADIENT(params, batch)
        delta = flat(tuple(block.matvec(v) for block, v in zip(states[number + 1].inverses, grads, strict=True)))
        slope = g + (ggn + float(before.damping) * np.eye(len(g))) @ flat(d)
        size = np.linalg.norm(g)
        assert abs(slope @ delta) <= 1e-9 * size * np.linalg.norm(delta)
        if number:
            last = flat(before.last)
            assert abs(slope @ last) <= 1e-9 * size * np.linalg.norm(last) and np.any(last != 0)


@pytest.mark.slow
def test_the_factors_of_kfac_are_averages_and_the_inverses_are_kept() -> None:
    params, batch, *_ = case()
    _, states = six_steps_of_kfac()
    factors = jax.jit(lambda key: kronecker.kfac(NET, params, *batch[:2], "mc", key, *batch[2:]))
    found = [factors(jax.random.fold_in(jax.random.key(7), i)) for i in range(6)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)
    assert_close(flat(states[6].blocks), flat(mean), 1e-12, "the mean of six, before 0.95 bounds the share of the old")
    same = [bool(np.all(flat(a.inverses) == flat(b.inverses))) for a, b in itertools.pairwise(states[1:])]
    assert same == [False, False, True, True, False]  # steps 1, 2, 3 and the sixth have an inverse of their own


@pytest.mark.parametrize("make", [gauss_newton, pytest.param(kfac, marks=pytest.mark.slow)])
def test_the_damping_follows_the_loss(make: Any) -> None:
    """Less above three quarters of what the model promises, more below a quarter, once in five steps."""
    signs = set()
    for seed, rate, damping in ((0, 1.0, 1.0), (1, 1.0, 1e-3), (2, 1.8, 1e-4)):
        params, batch, g, ggn, _ = case(seed)
        updates, states = stepped(make(NET, rate, damping), params, batch, steps=2)
        d = flat(updates[0])
        model = g @ d + 0.5 * d @ (ggn + damping * np.eye(len(d))) @ d
        after = jax.tree.map(jnp.add, params, updates[0])
        loss = [float(LOSS(p, batch)) for p in (params, after)]
        ratio = (loss[1] - loss[0]) / model if model < 0 else np.nan
        factor = DECAY**EVERY if ratio > 0.75 else DECAY**-EVERY if ratio < 0.25 else 1.0
        assert float(states[1].damping) == pytest.approx(damping * factor, rel=1e-12)
        assert states[2].damping == states[1].damping
        signs.add(factor)
    assert len(signs) > 1  # it went both ways, or stood once


@pytest.mark.parametrize("make", [natural_gradient, gauss_newton, kfac])
def test_a_damping_that_is_not_positive(make: Any) -> None:
    with pytest.raises(ValueError, match=r"damping is 0\.0, allowed: damping > 0"):
        make(NET, 1.0, 0.0)


# --- in runs ----------------------------------------------------------------------------------------------------------

CONFIG = """
[data]
name = "iris"
[model]
sizes = [4, 8, 3]
hidden = "tanh"
[optimizer]
name = "kfac"
learning_rate = 1.0
[train]
epochs = 3
batch_size = 40
plots = false
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(CONFIG)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def losses(folder: str) -> list[float]:
    return [json.loads(line)["train_loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["natural_gradient", "gauss_newton", "kfac"])
def test_a_run_learns(name: str) -> None:
    assert main(["run", "x.toml", "--train.folder", "r", "--optimizer.name", name]) == 0
    found = losses("r")
    assert len(found) == 3 and found[2] < found[0] < 1.0
    again = ["run", "x.toml", "--train.folder", "again", "--optimizer.name", name, "--checkpoint.every", "1"]
    assert main([*again, "--train.epochs", "2"]) == 0 and main([*again, "--resume"]) == 0
    assert Path("again/params.safetensors").read_bytes() == Path("r/params.safetensors").read_bytes()


@pytest.mark.slow
def test_a_sweep_over_rates_is_the_runs() -> None:
    arguments = ["--sweep.learning_rate", "0.5", "1", "--train.folder", "s", "--optimizer.name", "gauss_newton"]
    assert main(["run", "x.toml", *arguments]) == 0
    assert main(["run", "x.toml", "--train.folder", "r", "--optimizer.name", "gauss_newton"]) == 0
    rows = [json.loads(line) for line in Path("s/metrics.jsonl").read_text().splitlines()]
    found = [row["train_loss"] for row in rows if row["learning_rate"] == 1.0]
    np.testing.assert_allclose(found, losses("r"), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.memory", "sqrt"], "train.memory: kfac needs all layers of a batch at once"),
        (["--train.micro-batches", "2"], "train.micro_batches: kfac needs a batch as a whole"),
        (["--train.precision", "mixed"], "train.precision: kfac computes in model.dtype"),
        pytest.param(["--mesh.data", "2"], "mesh: kfac runs on one device", marks=pytest.mark.devices),
        (["--privacy.max-norm", "1", "--privacy.epsilon", "2"], "privacy: kfac looks at more of a sample than its cl"),
        (["--optimizer.weight-decay", "0.1"], "optimizer.weight_decay: kfac has none"),
        (["--optimizer.clip-norm", "1"], "optimizer.clip_norm: kfac has none"),
        (["--optimizer.arguments.dampin", "1"], "kfac has no argument 'dampin', did you mean 'damping'?"),
        (["--optimizer.arguments.damping", "0.0"], "'damping': 0.0}: damping is 0.0, allowed: damping > 0"),
        (["--optimizer.name", "kfacc"], "unknown optimizer 'kfacc', did you mean 'kfac'?"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "x.toml", *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not Path("runs").exists()
