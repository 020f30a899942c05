"""Runs of networks that are no MLP: [model] kind, texts, sequences; against autodiff and against the same by hand."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiers import slow

import jaxbp
from jaxbp import losses
from jaxbp.cli import main
from jaxbp.network import Network
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.compute.epoch import moved, order_key
from jaxbp.run.data import text
from jaxbp.run.errors import UserError
from jaxbp.run.store.model import load

TEXT = "the layers of a network are read forward, and their errors backward. " * 12
CHAIN = {
    "kind": "chain",
    "layers": [
        {"kind": "conv2d", "channels": 3, "window": 3, "stride": 2},
        {"kind": "elementwise", "sigma": "tanh"},
        {"kind": "flatten"},
        {"kind": "residual", "layers": [{"kind": "layer_norm"}, {"kind": "dense", "size": 27}]},
        {"kind": "dense", "size": 10},
    ],
}
GPT = {"kind": "gpt", "arguments": {"layers": 1, "heads": 2, "width": 8}}
ALL = 1437  # training samples of digits, and more than the blocks of TEXT


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(TEXT)
    return path


def config(data: dict[str, Any], model: dict[str, Any], **tables: dict[str, Any]) -> configs.Config:
    train = {"epochs": 1, "batch_size": ALL, "plots": False} | tables.pop("train", {})
    optimizer = {"learning_rate": 0.1} | tables.pop("optimizer", {})
    model = {"dtype": "float64"} | model
    return configs.validate(dict(data=data, model=model, optimizer=optimizer, train=train, **tables), source="test")


def trained(asked: configs.Config) -> tuple[loop.Setup, list[Any]]:
    setup = loop.prepare(asked)
    return setup, [row for epoch in loop.epochs(setup) for row in epoch.rows]


def toml(folder: Path, asked: configs.Config) -> str:
    import tomli_w

    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(configs.to_dict(asked)))
    return str(path)


def message(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def mean_loss(net: Network) -> Any:
    def mean(params: Any, x: Any, y: Any) -> Any:
        return jnp.mean(jax.vmap(lambda x, y: losses.get(net.loss).ell(net.layer.forward(params, x)[0], y))(x, y))

    return mean


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *slow(("digits", CHAIN)),
        ("iris", {"kind": "chain", "layers": [{"kind": "dense", "size": 3}]}),
        *slow(
            ("digits", {"kind": "mixer", "arguments": {"patch": 2, "layers": 1, "width": 4, "mixed": 3, "hidden": 5}}),
            ("digits", {"kind": "conv1d", "arguments": {"channels": 3, "hidden": "tanh"}}),
            ("words", GPT),
        ),
    ],
    ids=["chain", "dense", "mixer", "conv1d", "gpt"],
)
def test_a_step_on_the_whole_set_is_one_by_autodiff(name: str, model: dict[str, Any], words: Path) -> None:
    """w − η ∂ℒ/∂w, of a batch that is the whole training set; loss and accuracy are those of the output."""
    asked = config({"name": str(words), "block": 8} if name == "words" else {"name": name}, model)
    setup, [row] = trained(asked)
    net, params, split = setup.problem.net, setup.problem.initial(), setup.problem.on_device("train")
    x, y = split
    if name == "words":  # the blocks of an epoch begin at a place that its key draws; all of them are in the batch
        x, y = (moved(jax.random.fold_in(order_key(0), 1), a) for a in split)
    gradient = jax.jit(jax.grad(mean_loss(net)))(params, x, y)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    after = setup.program.params
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    output = jax.jit(jax.vmap(lambda x: net.layer.forward(after, x)[0]))(split.x)
    np.testing.assert_allclose(row.train.loss, jax.jit(mean_loss(net))(after, *split), rtol=1e-12)
    assert row.train.accuracy == np.mean(np.asarray(output).argmax(axis=-1) == np.asarray(split.y))


@pytest.mark.devices
@pytest.mark.slow
def test_parts_of_a_batch_and_several_devices_change_nothing() -> None:
    """The parameters, with micro-batches and on a mesh, are those of whole batches on one device up to rounding."""
    plain, (row,) = trained(config({"name": "digits"}, CHAIN, train={"batch_size": 400}))
    parts, (other,) = trained(config({"name": "digits"}, CHAIN, train={"batch_size": 400, "micro_batches": 4}))
    mesh, (third,) = trained(config({"name": "digits"}, CHAIN, train={"batch_size": 400}, mesh={"data": 2}))
    for one, two, three in zip(*(jax.tree.leaves(p.program.params) for p in (plain, parts, mesh)), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(three, one, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([other.test.loss, third.test.loss], row.test.loss, rtol=1e-9)
    for rms in ("gradient_rms", "delta_rms"):  # squares are added up in float32
        np.testing.assert_allclose([getattr(r, rms) for r in (other, third)], [getattr(row, rms)] * 2, rtol=1e-6)


@pytest.mark.devices
@pytest.mark.slow
def test_on_a_mesh_and_with_checkpoints_dropout_draws_the_same() -> None:
    """Losses and parameters are those of one device that stores all; and of both in a private run."""
    layers = [*CHAIN["layers"][:3], {"kind": "dropout", "rate": 0.3}, *CHAIN["layers"][3:]]
    model, tables = {**CHAIN, "layers": layers}, {"data": {"name": "digits", "standardize": "none"}}
    for extra in ({}, {"privacy": {"max_norm": 0.1, "noise_multiplier": 1.0, "seed": 1, "delta": 1e-4}}):
        asked = [
            config(tables["data"], model, train={"batch_size": 400, **train}, **extra, **mesh)
            for train, mesh in (({}, {}), ({"memory": {"slots": 2}}, {}), ({}, {"mesh": {"data": 2}}))
        ]
        (plain, [row]), *others = (trained(one) for one in asked)
        for other, [its] in others:
            for a, b in zip(*(jax.tree.leaves(p.program.params) for p in (plain, other)), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(its.test.loss, row.test.loss, rtol=1e-9)


@pytest.mark.slow
def test_dropout_is_drawn_for_each_step_and_not_when_it_is_evaluated(words: Path) -> None:
    """Another seed of the order gives other masks; a network with dropout predicts what one without it does."""
    data, drop = {"name": str(words), "block": 8}, {**GPT, "arguments": {**GPT["arguments"], "dropout": 0.5}}
    with_it, [row] = trained(config(data, drop))
    without, [other] = trained(config(data, GPT))
    assert row.gradient_rms != other.gradient_rms
    _, [same] = trained(config(data, drop))
    assert (same.train, same.test, same.gradient_rms) == (row.train, row.test, row.gradient_rms)
    x = without.problem.on_device("test").x[0]
    params = without.program.params  # nested otherwise: Dropout has no parameters
    leaves = jax.tree.leaves(params)
    dropped = jax.tree.unflatten(jax.tree.structure(with_it.program.params), leaves)
    expected = without.problem.net.layer.forward(params, x)[0]
    np.testing.assert_array_equal(with_it.problem.net.layer.forward(dropped, x)[0], expected)


@pytest.mark.slow
def test_what_a_step_records_is_that_of_formed_gradients(words: Path) -> None:
    """The first step of a batch of the whole set: squared norms by part, noise scale and variance."""
    recorded = {"quantities": ["squared_norms", "noise_scale", "variance", "grand"], "every": 1}
    setup, rows = trained(config({"name": "digits"}, CHAIN, study=recorded))
    x, y = setup.problem.on_device("train")
    net, params = setup.problem.net, setup.problem.initial()
    g = jax.jit(jax.vmap(jax.grad(mean_loss(net)), (None, 0, 0)))(params, x[:, None], y[:, None])
    flat = np.concatenate([np.asarray(leaf).reshape(len(x), -1) for leaf in jax.tree.leaves(g)], axis=1)
    found = rows[0].quantities
    np.testing.assert_allclose(found["squared_norms"]["mean"], np.mean(np.sum(flat**2, axis=1)), rtol=1e-9)
    np.testing.assert_allclose(found["noise_scale"]["trace"], np.sum(np.var(flat, axis=0, ddof=1)), rtol=1e-8)
    for name in ("trace", "squared_gradient"):
        total = sum(found["noise_scale"][f"{name}_by_layer"])
        np.testing.assert_allclose(total, found["noise_scale"][name], rtol=1e-8)
    head = np.concatenate([np.asarray(leaf).reshape(len(x), -1) for leaf in jax.tree.leaves(g[-1])], axis=1)
    np.testing.assert_allclose(found["variance"][-1], np.mean(np.var(head, axis=0, ddof=1)), rtol=1e-8)


# --- from the command line --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chain_from_a_config_to_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, stopped and resumed, predicted, studied: the same parameters and outputs as by hand."""
    run, model = tmp_path / "run", {**CHAIN, "dtype": "float32"}
    path = toml(tmp_path, config({"name": "digits"}, model, train={"batch_size": 128}, checkpoint={"every": 1}))
    assert main(["run", path, "--train.folder", str(run), "--train.epochs", "2"]) == 0
    assert "chain" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main(["run", path, "--train.folder", str(again)]) == 0
    assert main(["run", path, "--train.folder", str(again), "--train.epochs", "2", "--resume"]) == 0
    assert (run / "params.safetensors").read_bytes() == (again / "params.safetensors").read_bytes()
    names = set(safetensors.numpy.load_file(run / "params.safetensors"))
    assert {"layer.1.w", "layer.4.layer.1.gamma", "layer.4.layer.2.b", "layer.5.w", "inputs.mean"} <= names
    model = load(run)
    images = np.load(make_images(tmp_path))["x"]
    output = model.predict(images)
    np.testing.assert_array_equal(output, model.predict(images.reshape(len(images), -1)))
    capsys.readouterr()
    assert main(["predict", str(run), "--data", str(make_images(tmp_path))]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))[1:]
    assert [int(name) for _, name in rows] == output.argmax(axis=1).tolist()
    assert main(["study", str(run), "--split", "test"]) == 0
    table = rows_of(run / "study_test.csv")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    right = np.mean([row["label"] == row["prediction"] for row in table])
    assert right == metrics[-1]["test_accuracy"] > 0.5
    np.testing.assert_allclose(np.mean([float(row["loss"]) for row in table]), metrics[-1]["test_loss"], rtol=1e-5)
    layers = [{"kind": "residual", "layers": [{"kind": "dense", "size": 4}]}, {"kind": "dense", "size": 3}]
    small = {"kind": "chain", "layers": layers, "dtype": "float32"}
    assert main(["check", toml(tmp_path, config({"name": "iris"}, small))]) == 0
    assert "1.1" in (printed := capsys.readouterr().out) and "PASS" in printed
    assert main(["trace", str(run), "--sample", "0"]) == 2
    assert 'its model.kind is "chain"' in capsys.readouterr().err


def make_images(folder: Path) -> Path:
    path = folder / "images.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 17, (5, 8, 8)))
    return path


@pytest.mark.slow
def test_a_text_from_its_file_to_a_new_one(
    tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported, trained, and gone on with: each character is one of the text, and the seed decides which."""
    monkeypatch.setenv("JAXBP_DATA", str(tmp_path / "data"))
    packed = tmp_path / "words.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    path = toml(tmp_path, config({"name": "text", "block": 8}, {**GPT, "dtype": "float32"}, train={"batch_size": 16}))
    assert main(["run", path]) == 2
    assert "jaxbp data import text PATH takes one" in capsys.readouterr().err
    assert main(["data", "import", "text", str(packed)]) == 0
    assert main(["data", "import", "text", str(words)]) == 0  # the same text
    (tmp_path / "other.txt").write_text("another")
    assert main(["data", "import", "text", str(tmp_path / "other.txt")]) == 2
    assert "another text is there" in capsys.readouterr().err
    run = tmp_path / "run"
    assert main(["run", path, "--train.folder", str(run), "--train.epochs", "12", "--train.plots", "yes"]) == 0
    assert (run / "learning_curves.png").exists() and not (run / "confusion.png").exists()
    losses = [json.loads(line)["test_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    shown = []
    for seed in ("0", "0", "1"):
        capsys.readouterr()
        assert main(["predict", str(run), "--prompt", "the layers", "--length", "30", "--seed", seed]) == 0
        shown.append(capsys.readouterr().out.rstrip("\n"))
    assert shown[0] == shown[1] != shown[2]
    assert all(found.startswith("the layers") and len(found) == 40 and set(found) <= set(TEXT) for found in shown)
    assert main(["predict", str(run), "--prompt", "Q"]) == 2
    assert "'Q' is not in the text" in capsys.readouterr().err
    assert main(["study", str(run), "--quantities", "grand"]) == 0
    table = rows_of(run / "study_train.csv")
    assert {"accuracy", "loss", "norm"} <= set(table[0])


@pytest.mark.slow
def test_a_sweep_of_a_chain_is_its_separate_runs(tmp_path: Path) -> None:
    asked = config({"name": "iris"}, {"kind": "chain", "layers": [{"kind": "dense", "size": 3}], "dtype": "float32"})
    path = toml(tmp_path, asked)
    assert main(["run", path, "--sweep.seeds", "2", "--train.folder", str(tmp_path / "sweep")]) == 0
    for seed in (0, 1):
        alone = tmp_path / f"alone{seed}"
        assert main(["run", path, "--train.seed", str(seed), "--train.folder", str(alone)]) == 0
        [member] = (tmp_path / "sweep" / "members").glob(f"seed-{seed}_*")
        ours, theirs = (safetensors.numpy.load_file(folder / "params.safetensors") for folder in (member, alone))
        for name, array in theirs.items():
            np.testing.assert_allclose(ours[name], array, rtol=1e-6, atol=1e-7)


# --- texts and sequences ----------------------------------------------------------------------------------------------


def test_the_blocks_of_a_text_are_its_characters_and_the_next_ones(words: Path) -> None:
    blocks = text.read(configs.DataConfig(str(words), block=8))
    assert blocks.classes == tuple(sorted(set(TEXT)))
    for x, y in ((blocks.x_train, blocks.y_train), (blocks.x_test, blocks.y_test)):
        read = "".join(blocks.classes[i] for i in x.ravel())
        assert (
            read in TEXT and "".join(blocks.classes[i] for i in y.ravel()) == TEXT[TEXT.index(read) + 1 :][: len(read)]
        )
    assert abs(blocks.x_test.size / len(TEXT) - 0.1) < 0.01
    shifted = {int(moved(jax.random.key(seed), jnp.asarray(blocks.x_train))[0, 0]) for seed in range(9)}
    assert len(shifted) > 2


@pytest.mark.slow
def test_sequences_in_an_npz(tmp_path: Path) -> None:
    """Tokens and a label for each position, learned: y is x read backwards, which full attention can see."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (60, 5))
    path = tmp_path / "sequences.npz"
    np.savez(path, x=x, y=x[:, ::-1])
    layers = [
        {"kind": "embedding", "tokens": 4, "channels": 8, "deviation": 1.0},
        {"kind": "position_embedding", "deviation": 1.0},
        {"kind": "residual", "layers": [{"kind": "layer_norm"}, {"kind": "self_attention", "heads": 2}]},
        {"kind": "dense", "size": 4},
    ]
    asked = config({"name": str(path)}, {"kind": "chain", "layers": layers}, train={"epochs": 60, "batch_size": 16})
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies a float by an integer
        setup, rows = trained(
            configs.override(asked, ["--optimizer.name", "adam", "--optimizer.learning_rate", "0.03"])
        )
    assert rows[-1].test.accuracy > 0.9 > 0.5 > rows[0].test.accuracy
    assert setup.problem.net.outputs == (5, 4)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "model", "expected"),
    [
        ({}, {"kind": "gpt"}, "takes (positions,), a sequence of tokens"),
        ({}, {"kind": "lenet5"}, "model.kind: layer 4, Conv"),
        ({}, {"kind": "lenet5", "arguments": {"depth": 3}}, "unknown argument of lenet5 'depth'"),
        ({}, {"kind": "lenet5", "sizes": [64, 10]}, 'model.sizes: kind "lenet5" has none, allowed with: mlp'),
        ({}, {"kind": "lenet5", "bias": "normal"}, 'model.bias: kind "lenet5" has none, allowed with: mlp'),
        ({}, {"kind": "chain"}, 'model.layers: kind "chain" needs layers'),
        ({}, {"arguments": {"layers": 3}}, 'model.arguments: kind "mlp" has none'),
        ({}, {"kind": "chain", "layers": [{"size": 10}]}, "layers[1] needs a kind"),
        ({}, {"kind": "chain", "layers": [{"kind": "dens", "size": 10}]}, "did you mean 'dense'?"),
        ({}, {"kind": "chain", "layers": [{"kind": "dense"}]}, "layers[1] needs size"),
        ({}, {"kind": "chain", "layers": [{"kind": "dense", "width": 10}]}, "unknown argument of layers[1] 'width'"),
        (
            {},
            {"kind": "chain", "layers": [{"kind": "flatten"}, {"kind": "dense", "size": 9}]},
            "end with 9, digits has 10",
        ),
        ({}, {"kind": "chain", "layers": [{"kind": "batch_norm"}]}, "batch norm takes its mean over the samples"),
        ({}, {"kind": "chain", "layers": [{"kind": "residual", "layers": [{"kind": "dense", "size": 3}]}]}, "layer 1"),
        ({"block": 3}, {}, "data.block: 3, but digits is no text"),
    ],
)
def test_what_does_not_fit_is_one_line(data: dict[str, Any], model: dict[str, Any], expected: str) -> None:
    assert expected in message(lambda: loop.prepare(config({"name": "digits", **data}, model)))


@pytest.mark.parametrize(
    ("data", "model", "tables", "expected"),
    [
        ({}, {}, {}, '"mlp" gives one output'),
        ({"block": 2000}, GPT, {}, "data.block: 2000 and the next one, but"),
        ({"standardize_targets": True}, GPT, {}, "a text has classes"),
        pytest.param(
            {}, GPT, {"mesh": {"data": 2}}, "mesh: a text is trained on one device", marks=pytest.mark.devices
        ),
        ({}, {**GPT, "arguments": {"heads": 3, "width": 8}}, {}, "heads"),
    ],
)
def test_what_does_not_fit_a_text_is_one_line(
    words: Path, data: dict[str, Any], model: dict[str, Any], tables: dict[str, Any], expected: str
) -> None:
    asked = config({"name": str(words), "block": 8, **data}, model, **tables)
    assert expected in message(lambda: loop.prepare(asked))


def test_a_text_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\xff")
    assert "not UTF-8 text: byte 3 is 0xff" in message(lambda: text.read(configs.DataConfig(str(path))))


def test_jaxbp_models_are_those_of_the_configs() -> None:
    assert {"mlp", *jaxbp.models.MODELS, "chain"} == set(get_args(configs.Kind))
    assert configs.KINDS_WITH["arguments"] == tuple(jaxbp.models.MODELS)
