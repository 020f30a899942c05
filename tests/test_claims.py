"""The lecture's claims in experiments/: counts against XLA's, the Jacobian against autodiff, theory against samples."""

import doctest
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

import jaxbp
from experiments import activation_memory, backward_cost, chain_rule, mean_field, recipe, report, vanishing_gradients
from jaxbp.run import data
from jaxbp.run.config import DataConfig
from jaxbp.run.data import idx

pytestmark = pytest.mark.slow

STUDIES = (activation_memory, backward_cost, chain_rule, vanishing_gradients)
needs_mnist = pytest.mark.skipif(not idx.is_local("mnist"), reason="MNIST is not on this machine")


@pytest.mark.parametrize("module", [*STUDIES, mean_field], ids=lambda module: module.__name__)
def test_the_examples(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


# --- twice more expensive ---------------------------------------------------------------------------------------------


def test_the_exact_ratios_are_the_published_ones() -> None:
    config = recipe.read(backward_cost.Settings, backward_cost.CONFIG)
    here = {
        network: round(backward_cost.exact_ratio(backward_cost.sizes_of(network)), 3) for network in config.networks
    }
    assert here == report.published("backward_cost")["ratios"]


@pytest.mark.parametrize("network", ["784-500-150-10", "300×4-10"])
def test_xla_counts_the_same_operations(network: str) -> None:
    sizes = backward_cost.sizes_of(network)
    compiled, _ = backward_cost.programs(jaxbp.MLP(sizes), batch_size=64)
    flops = {name: program.cost_analysis()["flops"] for name, program in compiled.items()}
    exact = backward_cost.exact_ratio(sizes)
    # Beside the products XLA counts some elementwise operations a unit, a few against 2 n₀ of its product: below 1 %.
    assert flops["backward"] / flops["forward"] == pytest.approx(exact, rel=0.01)
    assert flops["both"] / flops["forward"] - 1 == pytest.approx(exact, rel=0.01)


# --- all the activations ----------------------------------------------------------------------------------------------


def test_the_bytes_of_storing_all_grow_by_two_arrays_a_layer_and_others_less() -> None:
    config = activation_memory.Settings(width=64, batch_size=512, depths=(4, 9, 16), hidden="relu", slots=4)
    results = activation_memory.measure(config)
    one = results["bytes_of_an_array"]
    assert one == 512 * 64 * 4
    for row in results["rows"]:
        assert row["tape"] == (2 * row["depth"] + 1) * one and row["inputs"] == row["depth"] * one
        for name in activation_memory.LABELS:
            assert row[name]["bytes"] == pytest.approx(row[name]["theory_bytes"], abs=1.5 * one)
    first, _, last = results["rows"]
    assert last["store_all"]["bytes"] - first["store_all"]["bytes"] == pytest.approx(2 * 12 * one, rel=0.01)
    for name in ("segments", "revolve"):
        assert last[name]["bytes"] < 0.5 * last["store_all"]["bytes"]


# --- the chain rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["tanh", "relu"])
def test_the_product_of_the_layers_jacobians_is_the_networks(hidden: str) -> None:
    net = jaxbp.MLP((9, 17, 12, 5), hidden)
    params = jaxbp.init(net, jax.random.key(0), bias="normal", dtype=jnp.float64)
    found = chain_rule.disagreement(net, params, jnp.linspace(-1.0, 2, 9))
    assert len(found) == 2 and max(found.values()) <= 1e-12


CHAIN = chain_rule.Settings(width=100, depths=(1, 4), seeds=4, tanh_q=0.1)


def test_an_orthogonal_linear_network_keeps_every_length() -> None:
    np.testing.assert_allclose(chain_rule.singular_values(8, "identity", "orthogonal", CHAIN), 1, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 4])
def test_gaussian_products_follow_the_fuss_catalan_law(depth: int) -> None:
    here = chain_rule.measured(chain_rule.singular_values(depth, "identity", "gaussian", CHAIN))
    for name in ("75 %", "median", "25 %"):
        assert here[name] == pytest.approx(chain_rule.fuss_catalan(depth, chain_rule.QUANTILES[name]), rel=0.1)
    assert chain_rule.fuss_catalan(depth, 1) ** 2 == pytest.approx((depth + 1) ** (depth + 1) / depth**depth)


@pytest.mark.parametrize("weights", ["orthogonal", "gaussian"])
def test_the_spread_of_a_tanh_networks_singular_values(weights: Any) -> None:
    here = chain_rule.measured(chain_rule.singular_values(4, "tanh", weights, CHAIN))
    theory = chain_rule.theory(4, "tanh", weights, CHAIN)
    assert here["variance"] == pytest.approx(theory["variance"], rel=0.25)  # 0.16 and 4.16
    assert here["mean_square"] == pytest.approx(1, rel=0.25)


# --- vanishing gradients ----------------------------------------------------------------------------------------------


@needs_mnist
def test_the_medians_of_a_few_seeds_lie_in_the_published_bands() -> None:
    mnist = data.load(DataConfig("mnist"))
    x, y = jnp.asarray(mnist.x_train[:200], jnp.float64) / 256, jnp.asarray(mnist.y_train[:200])
    config = vanishing_gradients.Bands(width=30, hidden_layers=(3,), images=200, seeds=20)
    published = report.published("vanishing_gradients")
    for layers in config.hidden_layers:
        norms = vanishing_gradients.mean_delta_norms(layers, config, x, y)
        medians = [*np.median(norms, axis=0), np.median(norms[:, -1] / norms[:, 0])]
        rows = vanishing_gradients.published_rows(layers, published)
        for median, (what, _, band) in zip(medians, rows, strict=True):
            assert band and band[0] < median < band[1], what


@pytest.mark.parametrize(("hidden", "scheme"), [("tanh", "he"), ("relu", "he"), ("relu", "normal")])
def test_delta_shrinks_as_mean_field_theory_says(hidden: str, scheme: str) -> None:
    config = vanishing_gradients.MeanField("256×12-10", (hidden,), (scheme,), samples=50, seeds=6, between=(10, 2))
    (found,) = vanishing_gradients.against_theory(config)
    # Of log ‖δ‖² the s.d. is about √(5/n) a layer and network (Hanin and Nica 2018): √(5/256/8/6) = 2 % for the factor.
    assert found["here_factor"] == pytest.approx(found["theory_factor"], rel=0.06)
    if hidden != "tanh":  # its q is not at the fixed point after two layers
        assert found["theory_factor"] == pytest.approx(found["chi_at_fixed_point"], rel=0.01)


# --- the commands -----------------------------------------------------------------------------------------------------

SMALL = {
    activation_memory: 'width = 8\nbatch_size = 32\ndepths = [2, 5]\nhidden = "tanh"\nslots = 2\n',
    backward_cost: 'networks = ["12-8×2-3"]\nhidden = "relu"\nloss = "hinge"\nbatch_size = 4\nrounds = 2\n',
    chain_rule: "width = 12\ndepths = [1, 3]\nseeds = 2\ntanh_q = 0.1\n",
    vanishing_gradients: "[bands]\nwidth = 8\nhidden_layers = [1, 2]\nimages = 20\nseeds = 3\n[mean_field]\n"
    'sizes = "16×4-10"\nhidden = ["tanh"]\nschemes = ["he"]\nsamples = 5\nseeds = 2\nbetween = [3, 2]\n',
}


@pytest.mark.parametrize("study", STUDIES, ids=lambda module: module.NAME)
def test_the_command_writes_a_table_results_and_a_picture(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if study is vanishing_gradients and not idx.is_local("mnist"):
        pytest.skip("MNIST is not on this machine")
    config = tmp_path / "small.toml"
    config.write_text(SMALL[study])
    study.main(["--config", str(config), "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{study.NAME}.json").read_text())
    assert results["seconds"] > 0 and results["config"]
    picture = image.imread(tmp_path / f"{study.NAME}.png")
    assert picture.shape[0] > 400 and picture.std() > 0.05
    assert "|-----" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("study", "old", "new", "expected"),
    [
        (activation_memory, '"tanh"', '"tan"', "activation_memory: hidden: unknown activation 'tan', did you mean"),
        (backward_cost, "8×2", "8x2", "backward_cost: networks: '12-8x2-3', expected widths such as"),
        (backward_cost, "8×2", "0", "backward_cost: 12-0-3: sizes has 0, every size"),
        (chain_rule, "seeds = 2", "seeds = 2\nseed = 2", "chain_rule: {path}: seed: unknown key"),
        (vanishing_gradients, "seeds = 3", "seeds = 0", "vanishing_gradients: {path}: bands.seeds: got 0, "),
        (vanishing_gradients, "[3, 2]", "[2, 3]", "vanishing_gradients: mean_field.between: (2, 3), expected an up"),
        (
            vanishing_gradients,
            '["he"]',
            '["hee"]',
            "vanishing_gradients: mean_field: unknown scheme 'hee', did you mean 'he'?",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    study: Any, old: str, new: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.toml"
    config.write_text(SMALL[study].replace(old, new))
    main: Callable[[list[str]], None] = study.main
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(config), "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith(expected.format(path=config))
