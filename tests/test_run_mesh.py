"""The [mesh] table on four fake CPU devices: same losses, collectives counted in the HLO, bytes a device."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbp
from experiments.mesh_step import collectives, exchanged, step_seconds
from jaxbp import persample
from jaxbp.cli import main
from jaxbp.layers import LayerNorm
from jaxbp.mlp import MLP, Affine, Params
from jaxbp.network import factors
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.compute import mesh, optimizers, placement
from jaxbp.run.compute.epoch import order_key
from jaxbp.run.compute.program import first_state
from jaxbp.run.compute.step import State, StepSpec
from jaxbp.run.config import MeshConfig, OptimizerConfig
from jaxbp.run.errors import UserError
from jaxbp.run.report.metrics import EpochRow, Row, StepRecord
from jaxbp.run.store.checkpoint import Checkpoints, Position

pytestmark = pytest.mark.devices
SHAPES = [(2, 1), (1, 2), (2, 2), (4, 1)]
RECORDED = {"quantities": ["squared_norms", "noise_scale"], "every": 4}
NET = MLP((784, 256, 256, 10))
BATCH = 128


def trained(devices: tuple[int, int], tables: dict[str, Any]) -> tuple[list[EpochRow], list[StepRecord], Params]:
    """Rows of metrics, records and the parameters of a short run in float64."""
    config = configs.validate(
        {
            "model": {"sizes": [64, 32, 16, 10], "dtype": "float64", **tables.get("model", {})},
            "optimizer": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 1e-3},
            "train": {"epochs": 3, "batch_size": 100},
            "mesh": {"data": devices[0], "model": devices[1]},
            **{name: table for name, table in tables.items() if name != "model"},
        },
        source="test",
    )
    setup = loop.prepare(config)
    rows = [row for epoch in loop.epochs(setup) for row in epoch.rows]
    params = setup.program.fetch(setup.program.whole)
    return (
        [row for row in rows if isinstance(row, EpochRow)],
        [row for row in rows if isinstance(row, StepRecord)],
        params,
    )


def numbers(row: Row) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(row.line())])


@pytest.mark.parametrize(
    ("tables", "shapes"),
    [
        ({"study": RECORDED}, SHAPES),
        (
            {
                "data": {"name": "diabetes", "standardize_targets": True},
                "model": {"sizes": [10, 16, 8, 1], "loss": "huber"},
            },
            [(2, 2)],
        ),
    ],
    ids=["digits", "diabetes"],
)
@pytest.mark.slow
def test_a_mesh_gives_the_losses_of_one_device(tables: dict[str, Any], shapes: list[tuple[int, int]]) -> None:
    """14 × 100 + 37 digits: the last batch is filled up. δ and gradient RMS are sums in float32."""
    rows, recorded, params = trained((1, 1), tables)
    for devices in shapes:
        got, got_recorded, got_params = trained(devices, tables)
        for got_row, row in zip(got, rows, strict=True):
            for got, want in ((got_row.train, row.train), (got_row.test, row.test)):
                assert got.loss == pytest.approx(want.loss, rel=1e-10)
            np.testing.assert_allclose(numbers(got_row), numbers(row), rtol=1e-5)
        for one, other in zip(got_recorded, recorded, strict=True):
            np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-8, atol=1e-10)
        for a, b in zip(jax.tree.leaves(got_params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def compiled_epoch(data: int, model: int, name: str = "sgd") -> jax.stages.Compiled:
    params = jaxbp.init(NET, jax.random.key(0))
    optimizer = optimizers.build(OptimizerConfig(name, 0.1), params)
    state = State(params, optimizer.init(params), jnp.array(True))
    x = jax.ShapeDtypeStruct((3, BATCH, 784), jnp.float32)
    y, weights = (jax.ShapeDtypeStruct((3, BATCH), dtype) for dtype in (jnp.int32, jnp.float32))
    built = mesh.build(MeshConfig(data, model))
    spec = StepSpec(NET, optimizer, BATCH)
    return mesh.compile_epoch(built, spec, state, mesh.Rows(x, y, weights))  # type: ignore[arg-type]


@pytest.mark.production
def test_data_parallel_sums_the_gradient_once_a_step_and_moves_nothing_else() -> None:
    found = collectives(compiled_epoch(4, 1).as_text())
    assert {name for name, _ in found} == {"all-reduce"}
    moved = [shape for _, shapes in found for shape in shapes]
    for shape in ("f32[256,784]", "f32[256,256]", "f32[10,256]"):
        assert moved.count(shape) == 1, found
    assert not any(f",{BATCH}" in shape or f"[{BATCH}," in shape for shape in moved)


@pytest.mark.production
def test_alternating_layers_sum_activations_once_for_each_pair() -> None:
    """s of layer 2, (N, 256), and nothing of layers 1 and 3 but numbers: three layers, one sum over `model`."""
    found = collectives(compiled_epoch(1, 4).as_text())
    assert {name for name, _ in found} == {"all-reduce"}
    moved = [shape for _, shapes in found for shape in shapes]
    large = [s for s in moved if np.prod([int(n) for n in re.findall(r"\d+", s.split("[")[1])]) > BATCH]
    assert large == [f"f32[256,{BATCH}]"], found


@pytest.mark.production
def test_norms_stay_on_their_shard_until_sums_of_a_number_a_sample() -> None:
    """Beside the sum of the forward pass nothing but (N/D,) numbers is summed; no sample leaves its device."""
    built = mesh.build(MeshConfig(2, 2))
    params = jaxbp.init(NET, jax.random.key(0))
    rows = NamedSharding(built, P("data"))
    jitted = jax.jit(
        lambda params, x, y: persample.squared_norms(factors(NET, params, x, y)[1]),
        in_shardings=(mesh.shardings(built, NET, params), rows, rows),
        out_shardings=rows,
    )
    text = jitted.lower(params, jnp.ones((BATCH, 784), jnp.float32), jnp.zeros(BATCH, jnp.int32)).compile().as_text()
    found = collectives(text)
    assert {name for name, _ in found} == {"all-reduce"}
    moved = [shape for _, shapes in found for shape in shapes]
    assert sorted(set(moved)) == ["f32[256,64]", "f32[64]"] and moved.count("f32[256,64]") == 1, found


@pytest.mark.production
@pytest.mark.slow
def test_what_a_device_holds_falls_with_the_mesh() -> None:
    """x and δ as 1/D, and but for layer 2's δ, the last layer's and their x as 1/M too."""
    held = {shape: exchanged(NET, BATCH, shape) for shape in ((1, 1), (2, 1), (1, 2))}
    one = 4 * BATCH * (256 + 256 + 256 + 256 + 10)
    assert held[1, 1]["factors"] == pytest.approx(one, rel=1e-3)  # XLA adds the pointers to its outputs
    assert held[2, 1]["factors"] == pytest.approx(one / 2, rel=1e-3)
    assert held[1, 2]["factors"] < 0.8 * one
    assert held[2, 1]["parameters"] == held[1, 1]["parameters"] == 4 * 269_322
    assert held[1, 2]["parameters"] < 0.51 * held[1, 1]["parameters"]


def test_the_model_of_a_step() -> None:
    """One device exchanges nothing; a ring moves twice the gradient at most; more samples hide more of it."""
    net = MLP((2, 3, 4))  # 9 + 16 parameters
    one, many = (step_seconds(net, 10, devices, 1e9, 1e6, 0.0) for devices in (1, 1000))
    assert one == {"products": pytest.approx(6 * 25 * 10 / 1e9), "sum": 0, "exposed": 0, "efficiency": 1}
    assert many["sum"] == pytest.approx(2 * 0.999 * 4 * 25 / 1e6)
    assert step_seconds(net, 10**6, 1000, 1e9, 1e6, 0.0)["efficiency"] > many["efficiency"]


def test_parameters_and_momenta_are_split() -> None:
    """Layers 1 and 2 fall as 1/M; the last one, 2,570 of 269,322 numbers, and layer 2's bias are whole."""
    state = State(*(jaxbp.init(NET, jax.random.key(0)),) * 2, jnp.array(True))
    for model in (1, 2, 4):
        placed = mesh.put(state, mesh.shardings(mesh.build(MeshConfig(1, model)), NET, state))
        leaves = jax.tree.leaves(placed.optimizer)
        here = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
        assert here == (256 * 784 + 256 + 256 * 256) // model + 256 + 2570


def test_pairs_of_dense_layers_and_attention_are_split() -> None:
    """And nothing between them or beside them; with the momentum of each parameter."""
    out, into, whole = Affine(P("model", None), P("model")), Affine(P(None, "model"), P()), Affine(P(), P())
    gpt = jaxbp.models.gpt((4,), 5, layers=1, heads=2, width=8, dropout=0.5)
    (*tables, _, attention, perceptron, norm, head) = placement.param_specs(gpt, gpt.parameters)
    assert jax.tree.leaves((tables, norm, head)) == [P()] * 6
    assert attention == (LayerNorm().init(None, (4, 8))[0]._replace(gamma=P(), beta=P()), (out, into), ())
    assert perceptron[1:] == (out, (), into, ())
    lenet = jaxbp.models.lenet5((28, 28, 1), 10)
    specs = placement.param_specs(lenet, lenet.parameters)
    *convolutions, first, _, second, _, last = specs
    assert set(jax.tree.leaves(convolutions)) == {P()} and (first, second, last) == (out, into, whole)
    placed = mesh.shardings(mesh.build(MeshConfig(1, 2)), lenet, optax.trace(0.9).init(lenet.parameters))
    assert [place.spec for place in jax.tree.leaves(placed)] == jax.tree.leaves(specs)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 3), "mesh.model: 2 does not divide the 5 units of a layer that it splits"),
        ((3,), "mesh.model: 2, but the network has no attention and no two dense layers to split"),
    ],
)
def test_layers_that_a_mesh_does_not_fit_are_named(sizes: tuple[int, ...], message: str) -> None:
    layers = [{"kind": "dense", "size": size} for size in sizes]
    tables = {"data": {"name": "iris"}, "model": {"kind": "chain", "layers": layers}}
    train = {"optimizer": {"learning_rate": 0.1}, "train": {"batch_size": 32}}
    with pytest.raises(UserError, match=message):
        loop.prepare(configs.validate({**tables, **train, "mesh": {"model": 2}}, source="test"))


@pytest.mark.slow
def test_a_gpt_on_a_mesh_is_that_of_one_device(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, (200, 5))
    np.savez(tmp_path / "tokens.npz", x=tokens[:, :-1], y=tokens[:, 1:])
    gpt = {"kind": "gpt", "sizes": None, "arguments": {"layers": 1, "heads": 2, "width": 8}}
    tables = {"data": {"name": str(tmp_path / "tokens.npz")}, "model": gpt}
    rows, _, params = trained((1, 1), tables)
    got, _, got_params = trained((2, 2), tables)
    np.testing.assert_allclose(numbers(got[-1]), numbers(rows[-1]), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_a_run_on_four_devices_goes_on_on_one_or_two(tmp_path: Path) -> None:
    """Three epochs in one go on one device, and one epoch on 2 × 2 followed by two on another mesh."""
    whole = trained((1, 1), {})[2]
    config = configs.validate(
        {
            "model": {"sizes": [64, 32, 16, 10], "dtype": "float64"},
            "optimizer": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 1e-3},
            "train": {"epochs": 3, "batch_size": 100},
            "mesh": {"data": 2, "model": 2},
        },
        source="test",
    )
    setup = loop.prepare(config)
    next(loop.epochs(setup))
    with Checkpoints(tmp_path, config.checkpoint) as checkpoints:
        checkpoints.save(Position(1, 15, 0, np.zeros(2, np.uint32)), setup.program.state())
        checkpoints.wait()
        for data, model in ((1, 1), (2, 1)):
            setup = loop.prepare(dataclasses.replace(config, mesh=MeshConfig(data, model)))
            saved = checkpoints.newest(first_state(setup.problem, setup.spec), pytest.fail)
            assert saved is not None
            list(loop.epochs(setup, loop.ResumePoint(1, saved.position.step, order_key(0), saved.state)))
            params = setup.program.fetch(setup.program.whole)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--mesh.data", "8"], "mesh.data × mesh.model is 8 × 1, there are 4 devices"),
        (["--mesh.data", "3"], "train.batch_size: mesh.data 3 does not divide the 32 samples of a batch"),
        (["--mesh.model", "3"], "model.sizes: mesh.model 3 does not divide the hidden width 128"),
        (["--mesh.model", "2", "--model.sizes", "64", "10"], "has no hidden layer to split"),
        (["--mesh.data", "2", "--sweep.seeds", "2"], "mesh: a [sweep] runs on one device, in one process"),
        (["--mesh.data", "2", "--train.micro-batches", "2"], "train.micro_batches: a part would lie on one device"),
        (["--mesh.data", "0"], "mesh.data: got 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["run", "configs/digits.toml", "--train.folder", str(folder), *overrides]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not folder.exists()
