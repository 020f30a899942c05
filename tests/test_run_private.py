"""The [privacy] table: what a private run computes on every path, spends, writes, keeps to itself and refuses."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close
from tiers import one_in

from jaxbp import MLP, private
from jaxbp.cli import main
from jaxbp.private import Accounting, AdaptiveNorm
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.compute import privacy
from jaxbp.run.compute.epoch import drawn
from jaxbp.run.compute.optimizers import build
from jaxbp.run.compute.privacy import Privacy
from jaxbp.run.compute.program import begun
from jaxbp.run.compute.step import Samples, StepSpec, batch_gradient, step
from jaxbp.run.config import OptimizerConfig
from jaxbp.run.errors import UserError

IRIS = """
[data]
name = "iris"
standardize = { mean = 3.5, scale = 2.0 }
[model]
sizes = [4, 8, 8, 3]
hidden = "tanh"
[optimizer]
learning_rate = 0.5
[train]
epochs = 3
batch_size = 30
plots = false
[privacy]
max_norm = 1.0
noise_multiplier = 1.5
delta = 1e-3
accountant = "rdp"
seed = 1
"""
ADAPTIVE = {"adaptive": {"quantile": 0.6, "learning_rate": 0.5, "count_noise": 4.0}}
SECRET = ("--privacy.seed", "none")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(IRIS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(*arguments: str, status: int = 0, folder: str = "run") -> None:
    assert main(["run", "x.toml", "--train.folder", folder, *arguments]) == status


def rows(folder: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def same(one: str, other: str) -> bool:
    files = ("metrics.jsonl", "params.safetensors")
    return all(Path(one, name).read_bytes() == Path(other, name).read_bytes() for name in files)


# --- sensitivity ------------------------------------------------------------------------------------------------------

NET = MLP((4, 7, 5, 6, 3), "tanh")
BOUND, SAMPLES, FOLLOWS = 0.3, 8, AdaptiveNorm(0.5, 0.2, 5.0)
PATHS: dict[str, dict[str, Any]] = {
    "store-all": {},
    "checkpoints": {"schedule": ((2, 1), 1)},
    "parts of a batch": {"micro_batches": 4},
    "checkpoints, parts of a batch": {"schedule": (2, 2), "micro_batches": 2},
    "layers by themselves": {"per_layer": BOUND / 2},
    "layers by themselves, checkpoints": {"per_layer": BOUND / 2, "schedule": (2, 2)},
    "mixed": {"mixed": True},
}


@functools.cache
def spec_of(path: str) -> StepSpec:
    changes = dict(PATHS[path])
    apart = changes.pop("per_layer", None)
    bare = Privacy(BOUND, apart, 1.0, 1, SAMPLES, Accounting(0.1, 9, 1e-5), None if apart else FOLLOWS)
    optimizer = build(OptimizerConfig(learning_rate=0.1), oracles.data(NET, seed=1, batch=SAMPLES)[0])
    return StepSpec(NET, optimizer, SAMPLES, privacy=bare, **changes)


@functools.cache
def summed(path: str) -> Any:
    """x, y, weights ↦ the clipped sum and the count of norms of a batch, as the run's own step has them, compiled."""
    spec, params = spec_of(path), oracles.data(NET, seed=1, batch=SAMPLES)[0]
    if spec.mixed:
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    @jax.jit
    def total(x: jax.Array, y: jax.Array, weights: jax.Array) -> Any:
        found = batch_gradient(spec, params, Samples(x.astype(params[0].w.dtype), y, weights, jnp.float32(1)))
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(found.gradient)])
        return flat, jnp.zeros(()) if found.within is None else found.within

    return lambda *batch: map(np.asarray, total(*batch))


@pytest.mark.parametrize("path", one_in(4, list(PATHS)))
def test_no_sample_moves_the_sum_by_more_than_the_bound(path: str) -> None:
    """Whatever it is replaced by: nothing, NaN, an infinity, a huge or a tiny sample, one that is there already."""
    _, x, y = oracles.data(NET, seed=1, batch=SAMPLES)
    x, ones = x.astype(jnp.float32 if path == "mixed" else x.dtype), jnp.ones(SAMPLES)
    alone, counted = summed(path)(x, y, ones.at[2].set(0.0))
    assert np.linalg.norm(alone) > BOUND  # the others are there
    for other in (x[2], jnp.nan, jnp.inf, 1e30, 1e3, 1e-30, x[0]):
        found, count = summed(path)(x.at[2].set(other), y, ones)
        moved = np.linalg.norm(found - alone)
        assert moved <= BOUND * (1 + (1e-6 if path != "mixed" else SAMPLES * 2**-23))
        assert abs(count - counted) == (0 if "themselves" in path or not np.all(np.isfinite(other)) else 0.5)
        if other is jnp.nan or other is jnp.inf:
            assert moved == 0


@pytest.mark.slow
def test_every_path_has_the_same_sum() -> None:
    _, x, y = oracles.data(NET, seed=1, batch=SAMPLES)
    weights = jnp.ones(SAMPLES).at[-1].set(0.0)
    whole, apart = (list(summed(path)(x, y, weights)) for path in ("store-all", "layers by themselves"))
    for path in PATHS:
        if path != "mixed":
            want = apart if "themselves" in path else whole
            assert_close(list(summed(path)(x, y, weights)), want, 1e-12)


@pytest.mark.slow
def test_an_adaptive_bound_follows_the_norms_of_the_batch() -> None:
    """C ← C exp(−η (b̃ − γ)), b̃ from norms of naive gradients and the noise of the key; C is a part of the state."""
    params, x, y = oracles.data(NET, seed=1, batch=SAMPLES)
    norms = np.linalg.norm(np.concatenate(oracles.gradient_rows(NET, params, x, y), axis=1), axis=1)
    state = begun(spec_of("store-all"), params)._replace(max_norm=jnp.asarray(np.median(norms)))
    stepped, key = jax.jit(step, static_argnums=0), jax.random.key(3)
    for count in (SAMPLES, 5, 0):
        weights = jnp.arange(SAMPLES) < count
        after, steps = stepped(spec_of("store-all"), state, (x, y, weights.astype(x.dtype)), None, key)
        z = float(jax.random.normal(jax.random.split(key, 3)[2], dtype=float))
        share = 0.5 + sum(np.sign(state.max_norm - norms[:count]) / 2) + FOLLOWS.count_noise * z
        assert after.max_norm == pytest.approx(float(state.max_norm) * np.exp(-0.2 * (share - 0.5)), rel=1e-12)
        assert steps.max_norm == after.max_norm
        state = state._replace(max_norm=after.max_norm)


def trained(**tables: dict[str, Any]) -> Any:
    config = configs.read(Path("x.toml"))
    values = {name: table | tables.get(name, {}) for name, table in configs.to_dict(config).items()}
    values["model"]["dtype"] = "float64"
    setup = loop.prepare(configs.validate(values, "test"))
    found = list(loop.epochs(setup))
    return setup.program.fetch(setup.program.whole), found


@pytest.mark.devices
@pytest.mark.slow
@pytest.mark.parametrize(
    "tables",
    [
        {"train": {"micro_batches": 3}},
        {"mesh": {"data": 2, "model": 2}},
        {"train": {"memory": "sqrt"}},
        {"train": {"memory": {"slots": 1}}, "mesh": {"data": 4}, "privacy": ADAPTIVE},
        {"train": {"micro_batches": 3}, "privacy": ADAPTIVE},
    ],
)
def test_a_run_draws_the_same_batches_and_noise_on_every_path(tables: dict[str, Any]) -> None:
    """With the seed of the table; sums are rounded in another order."""
    params, epochs = trained(**tables)
    plain, plain_epochs = trained(privacy=tables.get("privacy", {}))
    assert_close(params, plain, 1e-9)
    for name in ("epsilon", "max_norm"):
        assert [getattr(epoch.row, name) for epoch in epochs] == [getattr(epoch.row, name) for epoch in plain_epochs]


@pytest.mark.slow
def test_an_adaptive_bound_costs_the_gradients_more_noise_and_no_epsilon() -> None:
    """One that does not move is the run whose σ is σ_Δ; ε is that of σ."""
    still = {"adaptive": {"learning_rate": 1e-30, "count_noise": 2.0}}
    params, epochs = trained(privacy=still)
    plain, _ = trained(privacy={"noise_multiplier": AdaptiveNorm(0.5, 1e-30, 2.0).gradient_noise(1.5)})
    assert_close(params, plain, 1e-12)
    assert [epoch.row.max_norm for epoch in epochs] == [1.0] * 3
    assert epochs[-1].row.epsilon == private.epsilon(1.5, 0.25, 12, 1e-3, "rdp")


# --- what a run writes and says ---------------------------------------------------------------------------------------


def test_a_private_run(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    said = capsys.readouterr()
    steps = [row["step"] for row in rows()]
    assert steps == [4, 8, 12]  # 120 samples, batches of 30 on average
    spent = [private.epsilon(1.5, 0.25, step, 1e-3, "rdp") for step in steps]
    assert [row["epsilon"] for row in rows()] == spent
    for row in rows():
        assert set(row) == {
            *("epoch", "step", "test_loss", "test_accuracy", "learning_rate", "gradient_rms", "epsilon")
        }
    line = f"ε = {spent[-1]:.4g} at δ = 0.001 (add-or-remove-one, RDP accountant) after 12 steps of Poisson sampling"
    assert said.out.count(f"private: {line} with q = 0.25, σ = 1.5, C = 1") == 2
    assert "train loss" not in said.out and "ε" in said.out
    provenance = json.loads(Path("run/provenance.json").read_text())
    event = eval(provenance["privacy"]["event"], vars(dp_accounting))
    assert event == Accounting(0.25, 12, 1e-3).event(1.5)
    assert dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-3) == provenance["privacy"]["epsilon"]
    assert "ε" in provenance["data_sha256"]
    assert re.search(r"warning: privacy\.seed: 1: whoever knows it can take the noise away", said.err)


@pytest.mark.slow
def test_what_no_noise_protects_is_there_when_it_is_asked_for_and_marked(capsys: pytest.CaptureFixture[str]) -> None:
    run("--privacy.unprotected", "true", "--train.plots", "true", "--train.loggers", "tensorboard")
    run("--train.plots", "true", folder="plain")
    assert set(rows()[-1]["unprotected"]) == {"train_loss", "train_accuracy", "delta_rms"}
    assert "train_loss" not in rows()[-1] and "unprotected" not in rows("plain")[-1]
    assert Path("run/params.safetensors").read_bytes() == Path("plain/params.safetensors").read_bytes()
    assert Path("plain/learning_curves.png").exists() and Path("plain/layers.png").exists()


@pytest.mark.slow
def test_an_epsilon_gives_the_noise() -> None:
    run("--privacy.noise-multiplier", "none", "--privacy.epsilon", "2")
    assert 2 * (1 - 1e-4) < rows()[-1]["epsilon"] <= 2


@pytest.mark.slow
def test_without_a_seed_nobody_can_draw_the_noise_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a finished run no file holds the key; a stopped one keeps it in its checkpoint."""
    key = bytes(range(7, 15))
    with monkeypatch.context() as patch:
        patch.setattr(os, "urandom", lambda count: key[:count])
        run(*SECRET, "--checkpoint.every", "1", folder="one")
        run(*SECRET, folder="two")
    assert same("one", "two")
    assert not any(key in file.read_bytes() for file in Path("one").rglob("*") if file.is_file())
    assert not Path("one/checkpoints").exists()
    run(*SECRET, folder="three")
    assert not same("one", "three")


def test_the_padded_batch_is_the_poisson_batch_of_its_law() -> None:
    """The sizes of a run's batches have mean q N and its variance, and are never as large as their arrays."""
    setup = loop.prepare(configs.read(Path("x.toml"), ["--train.epochs", "200"]))
    plan = setup.spec.privacy
    batches = [drawn(jax.random.key(seed), 120, 30, plan) for seed in range(100)]
    sizes = np.concatenate([np.asarray(present).sum(axis=1) for _, present in batches])
    assert sizes.mean() == pytest.approx(30, abs=5 * np.sqrt(22.5 / 400))
    assert sizes.var() == pytest.approx(22.5, rel=5 * np.sqrt(2 / 400))
    assert sizes.max() < plan.capacity < 100


class Killed(BaseException):
    """Nothing in the library catches it."""


@pytest.mark.slow
def test_a_resumed_run_neither_repeats_noise_nor_loses_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it forget C, where that is adaptive."""
    original, calls = loop._keep, []
    options = (*SECRET, "--checkpoint.every", "1", "--privacy.adaptive", "{learning_rate = 1.0}")

    def keep(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "urandom", lambda count: bytes(count))
        run(*options, folder="whole")
        patch.setattr(loop, "_keep", keep)
        run(*options, folder="killed")
    run(*options, folder="killed")  # the key comes from the checkpoint
    assert same("whole", "killed")
    assert len({row["max_norm"] for row in rows("whole")}) == 3


@pytest.mark.slow
def test_members_of_a_sweep_are_the_separate_runs() -> None:
    adaptive = ("--privacy.adaptive.quantile", "0.5")
    run("--sweep.seeds", "2", "--sweep.privacy.noise-multiplier", "1.0,2.0", *adaptive, folder="sweep")
    member = next(Path("sweep/members").glob("seed-1*2.0*"))
    assert main(["run", str(member / "config.toml"), "--train.folder", "alone"]) == 0
    assert (member / "params.safetensors").read_bytes() == Path("alone/params.safetensors").read_bytes()
    mine = [row for row in rows("sweep") if row["seed"] == 1 and row["privacy.noise_multiplier"] == 2.0]
    for name in ("epsilon", "max_norm"):
        assert [row[name] for row in mine] == [row[name] for row in rows("alone")]


def test_members_without_a_seed_have_keys_of_their_own() -> None:
    config = configs.read(Path("x.toml"), list(SECRET))
    keys = [jax.random.key_data(privacy.secret(config)).tolist() for _ in range(3)]
    assert len({tuple(key) for key in keys}) == 3


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--privacy.max-norm", "none"], "privacy.max_norm: set it; noise protects clipped gradients only"),
        (["--privacy.epsilon", "1"], "privacy.epsilon: set it or privacy.noise_multiplier; both are set"),
        (["--privacy.noise-multiplier", "none"], "privacy.epsilon: set it or privacy.noise_multiplier; neither is set"),
        (
            ["--privacy.noise-multiplier", "none", "--privacy.epsilon", "0.001"],
            "privacy.epsilon is 0.001",
        ),
        (["--privacy.sampling", "fixed"], "privacy.sampling: got 'fixed', it should be 'poisson'"),
        (["--privacy.adaptive.quantile", "1.5"], "privacy.adaptive.quantile is 1.5, allowed: between 0 and 1"),
        (
            ["--privacy.adaptive.count-noise", "0.7"],
            "privacy.adaptive.count_noise is 0.7, allowed: more than half of noise_multiplier, 1.5",
        ),
        (["--privacy.adaptive.share", "0.5"], "privacy.adaptive"),
        (
            ["--privacy.adaptive.quantile", "0.5", "--privacy.per-layer"],
            "privacy.adaptive: it is of one C for all layers: leave out privacy.per_layer",
        ),
        (["--study.quantities", "grand"], "study.quantities: they are of single samples, which [privacy] hides"),
        (["--privacy.adjacency", "replace-one"], 'privacy.accountant "rdp" has no adjacency "replace-one"'),
        (["--data.standardize", "global"], "data.standardize: global comes from all training samples"),
        (["--model.dtype", "bfloat16"], 'model.dtype: "bfloat16" rounds sums of gradients'),
    ],
)
def test_what_does_not_fit_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*options, status=2)
    shown = capsys.readouterr().err
    assert re.fullmatch(r"jaxbp: [^\n]+\n", shown) and said in shown
    assert not Path("run").exists()


def test_networks_and_data_that_it_does_not_fit() -> None:
    config = configs.read(Path("x.toml"))
    chain = dataclasses.replace(config.model, kind="chain")
    apart = dataclasses.replace(config.privacy, per_layer=True)
    with pytest.raises(UserError, match=r"^privacy\.per_layer: only layers of model\.kind"):
        privacy.plan(dataclasses.replace(config, model=chain, privacy=apart), 120, 1)
    text = dataclasses.replace(config.data, name="x.txt")
    with pytest.raises(UserError, match=r"^privacy: a text is cut at other places in each epoch"):
        privacy.plan(dataclasses.replace(config, data=text), 120, 1)


@pytest.mark.slow
def test_another_network_is_the_perceptron_that_it_is() -> None:
    """A chain of the perceptron's layers draws the same batches and noise; its layers draw other initial weights."""
    values = configs.to_dict(configs.read(Path("x.toml")))
    hidden = [{"kind": "dense", "size": 8}, {"kind": "elementwise", "sigma": "tanh"}]
    values["model"] = {"kind": "chain", "layers": [*hidden, *hidden, {"kind": "dense", "size": 3}]}
    setup = loop.prepare(configs.validate(values, "test"))
    mlp = loop.prepare(configs.read(Path("x.toml")))
    assert setup.spec.privacy == mlp.spec.privacy
    one, two, three = mlp.problem.initial()
    x, y = mlp.problem.on_device("train")
    batch = Samples(x[:40], y[:40], jnp.ones(40), jnp.float32(30))
    found = batch_gradient(setup.spec, (one, (), two, (), three), batch).gradient
    want = batch_gradient(mlp.spec, (one, two, three), batch).gradient
    assert_close(jax.tree.leaves(found), jax.tree.leaves(want), 1e-6)
    assert list(loop.epochs(setup))[-1].row.epsilon == pytest.approx(2.569, abs=1e-3)


def test_a_delta_that_allows_to_publish_a_sample_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    privacy.plan(configs.read(Path("x.toml"), ["--privacy.delta", "0.01"]), 120, 1)
    assert "warning: privacy.delta: 0.01 is not below 1/N = 0.0083" in capsys.readouterr().err


def test_a_run_ends_with_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    capsys.readouterr()
    run("--train.epochs", "5", "--resume", status=2)
    assert "is private: train.epochs was 3, now 5, and what it spends is settled" in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    run(status=2)
    assert "jaxbp: the package dp_accounting is missing: pip install '.[private]'" in capsys.readouterr().err
