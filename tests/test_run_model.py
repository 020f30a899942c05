"""A trained network as a file: what is saved comes back, what is damaged says so, and nothing is unpickled."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tomli_w
from oracles import assert_same_bits

from jaxbp import MLP, Affine
from jaxbp.run.config import Config, ModelConfig, to_dict
from jaxbp.run.data import Scaling
from jaxbp.run.errors import UserError
from jaxbp.run.networks import Sample, network, sized
from jaxbp.run.predict import predict
from jaxbp.run.store import model as models
from jaxbp.run.store.model import FILE, Model, load

INPUTS = Scaling(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 10.0, 0.1, 2.0]))
TARGETS = Scaling(np.array([100.0, -5.0]), np.array([7.0, 0.5]))
X = np.random.default_rng(0).normal(size=(5, 4)) * INPUTS.scale + INPUTS.mean


def saved(
    folder: Path, dtype: Any = "float32", targets: Scaling | None = None, loss: str = "softmax_cross_entropy"
) -> Model:
    """A model of random parameters, saved with its config as a run does it."""
    config = ModelConfig((4, 3, 2), "tanh", loss=loss, dtype=dtype)
    net = network(config)
    rng = np.random.default_rng(1)
    params = tuple(
        Affine(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((outputs, inputs), (outputs,))))
        for inputs, outputs in ((4, 3), (3, 2))
    )
    model = Model(
        net, params, INPUTS, targets, None if targets else ("no", "yés"), Sample(net.sizes[:1], net.sizes[-1], False)
    )
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(Config(model=config))), encoding="utf-8")
    model.save(folder)
    return model


def message(call: Callable[[], object]) -> str:
    """The message of the UserError that `call` raises: one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("targets", [None, TARGETS])
def test_a_saved_model_comes_back(tmp_path: Path, dtype: str, targets: Scaling | None) -> None:
    model = saved(tmp_path, dtype, targets, "squared_error" if targets else "softmax_cross_entropy")
    again = load(tmp_path)
    assert (again.net, again.classes) == (model.net, model.classes)
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {jnp.dtype(dtype)}
    assert_same_bits(again.params, model.params)
    assert_same_bits([again.inputs, again.targets], [model.inputs, model.targets])
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert load(str(tmp_path)).net == model.net


@pytest.mark.parametrize("targets", [None, TARGETS])
def test_predict_takes_and_gives_raw_units(tmp_path: Path, targets: Scaling | None) -> None:
    model = saved(tmp_path, "float64", targets, "squared_error" if targets else "softmax_cross_entropy")
    (w1, b1), (w2, b2) = jax.device_get(model.params)
    expected = np.tanh((X - INPUTS.mean) / INPUTS.scale @ w1.T + b1) @ w2.T + b2
    expected = expected if targets is None else expected * TARGETS.scale + TARGETS.mean
    np.testing.assert_allclose(load(tmp_path).predict(X), expected, rtol=1e-12)


def test_predict_of_many_of_one_and_of_no_sample(tmp_path: Path) -> None:
    model = saved(tmp_path, "float64")
    many = np.tile(X, (401, 1))  # 2005, no multiple of the 1000 that are computed at once
    np.testing.assert_allclose(model.predict(many), np.tile(model.predict(X), (401, 1)), rtol=1e-12)
    np.testing.assert_allclose(model.predict(X[:1]), model.predict(X)[:1], rtol=1e-12)
    assert model.predict(X[:0]).shape == (0, 2)


@pytest.mark.parametrize("shape", [(4,), (5, 3), (5, 4, 1), ()])
def test_predict_of_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(.*\), expected \(N, 4\)"):
        saved(tmp_path).predict(np.zeros(shape))


def test_saving_leaves_nothing_else_and_the_same_bytes(tmp_path: Path) -> None:
    model = saved(tmp_path)
    first = (tmp_path / FILE).read_bytes()
    model.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "config.toml"}


def test_loading_float64_turns_the_x64_mode_on(tmp_path: Path) -> None:
    model = saved(tmp_path, "float64")
    jax.config.update("jax_enable_x64", False)
    try:
        again = load(tmp_path)
        assert jax.config.jax_enable_x64
        assert_same_bits(again.params, model.params)
    finally:
        jax.config.update("jax_enable_x64", True)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_plain_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length, a JSON header and numbers: nothing that a reader could execute, and nothing of ours unpickles."""
    saved(tmp_path, targets=TARGETS, loss="squared_error")
    content = (tmp_path / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["classes"]) is None
    assert set(header) == {
        *("layer.1.w", "layer.1.b", "layer.2.w", "layer.2.b", "inputs.mean", "inputs.scale"),
        *("targets.mean", "targets.scale"),
    }
    assert header["layer.1.w"]["shape"] == [3, 4] and header["layer.1.w"]["dtype"] == "F32"
    assert len(content) == 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load(tmp_path)
    np.savez(tmp_path / "x.npz", x=X)
    predict(tmp_path, tmp_path / "x.npz", tmp_path / "out.csv")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / FILE).write_bytes(pickle.dumps({"layer.1.w": X}))
    assert message(lambda: load(tmp_path)).startswith(f"{tmp_path / FILE}: damaged: ")
    np.savez(tmp_path / "x.npz", x=np.array([{}], dtype=object))
    saved(tmp_path)
    assert "Object arrays cannot be loaded" in message(lambda: predict(tmp_path, tmp_path / "x.npz", None))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    broken = [content[:length] for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1)]
    broken += [b"\xff" * 100, content[:20] + b"\x00" * 40 + content[60:], content + b"\x00"]
    for damaged in broken:
        (tmp_path / FILE).write_bytes(damaged)
        assert message(lambda: load(tmp_path)).startswith(f"{tmp_path / FILE}: damaged: ")


@pytest.mark.parametrize("name", ["layer.1.w", "layer.2.b", "inputs.mean", "targets.scale"])
def test_a_file_without_a_tensor_is_one_line(tmp_path: Path, name: str) -> None:
    saved(tmp_path, targets=TARGETS, loss="squared_error")
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    tensors.pop(name)
    safetensors.numpy.save_file(tensors, tmp_path / FILE, metadata={"classes": "null"})
    assert message(lambda: load(tmp_path)).startswith(f"{tmp_path / FILE}: damaged: ")


def test_a_file_without_metadata_or_of_another_network_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    safetensors.numpy.save_file(tensors, tmp_path / FILE)
    assert message(lambda: load(tmp_path)).startswith(f"{tmp_path / FILE}: damaged: ")
    saved(tmp_path)
    (tmp_path / "config.toml").write_text("[model]\nsizes = [4, 7, 2]")
    assert "w of layer 1 has shape (3, 4), expected (7, 4)" in message(lambda: load(tmp_path))


def test_not_a_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "no"):
        assert (
            message(lambda folder=folder: load(folder)) == f"{folder}: not a run folder: needs config.toml and {FILE}"
        )
    saved(tmp_path)
    (tmp_path / "config.toml").unlink()
    assert "not a run folder" in message(lambda: load(tmp_path))


# --- the network of a config ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModelConfig(hidden="rellu"), "model.hidden: unknown activation 'rellu', did you mean 'relu'? Allowed: "),
        (ModelConfig(hidden=("tanhh",)), "model.hidden: unknown activation 'tanhh', did you mean 'tanh'? Allowed: "),
        (ModelConfig(output="identitty"), "model.output: unknown activation 'identitty', did you mean 'identity'?"),
        (ModelConfig(loss="softmax"), "model.loss: unknown loss 'softmax', did you mean 'softmax_cross_entropy'?"),
        (
            ModelConfig((64, 64, 10), hidden=("relu", "relu")),
            "model.hidden: hidden has 2 activations, sizes (64, 64, 10) has 1 hidden",
        ),
        (
            ModelConfig(loss="hinge", label_smoothing=0.1),
            "model.label_smoothing: only softmax_cross_entropy has it, the loss is hinge",
        ),
    ],
)
def test_a_wrong_network_is_one_line(config: ModelConfig, expected: str) -> None:
    assert message(lambda: network(config)).startswith(expected)


@pytest.mark.parametrize(
    ("hidden_sizes", "sizes"), [(None, (12, 64, 3)), ((), (12, 3)), ((5,), (12, 5, 3)), ((5, 4), (12, 5, 4, 3))]
)
def test_hidden_sizes_stand_between_those_of_the_data(
    hidden_sizes: tuple[int, ...] | None, sizes: tuple[int, ...]
) -> None:
    """The config has the sizes then, so that it runs again as written."""
    sample = Sample((3, 4), 3, positions=False)
    found = sized(ModelConfig(hidden_sizes=hidden_sizes), sample)
    assert found == ModelConfig(sizes) == sized(found, sample)
    assert sized(ModelConfig(kind="gpt"), sample) == ModelConfig(kind="gpt")
    if hidden_sizes is not None:
        said = message(lambda: sized(ModelConfig(sizes, hidden_sizes=hidden_sizes), sample))
        assert said == "model.hidden_sizes: model.sizes has them, too: leave out one of the two"


def test_networks() -> None:
    assert network(ModelConfig((3, 2))) == MLP((3, 2))
    config = ModelConfig((3, 5, 4, 2), ("tanh", "relu"), "sigmoid", "squared_error")
    assert network(config) == MLP((3, 5, 4, 2), ("tanh", "relu"), "sigmoid", "squared_error")
    smoothed: Any = network(ModelConfig((3, 2), label_smoothing=0.2)).loss
    assert smoothed.name == "softmax_cross_entropy(label_smoothing=0.2)"
    assert models.FILE == "params.safetensors"
