"""`jaxbp export`: given raw inputs, what is exported computes what `predict` does."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import oracles
import pytest
import safetensors
import safetensors.numpy
import tomli_w

import jaxbp
from jaxbp import MLP, interop
from jaxbp.cli import main
from jaxbp.layers import Chain, Dense, Elementwise, Flatten, LayerNorm
from jaxbp.network import Network
from jaxbp.run import export
from jaxbp.run.config import Config, ModelConfig, to_dict
from jaxbp.run.data import Projection, Scaling
from jaxbp.run.data.tables import Column
from jaxbp.run.networks import Sample
from jaxbp.run.store.model import Model

RNG = np.random.default_rng(0)
INPUTS = Scaling(np.array([100.0, -2, 0, 5]), np.array([50.0, 0.1, 1, 2]))
X = (INPUTS.mean + INPUTS.scale * RNG.normal(size=(9, 4))).astype(np.float32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def model(output: str = "identity", loss: str = "softmax_cross_entropy", outputs: int = 3, **fields: Any) -> Model:
    net = MLP((4, 6, outputs), "tanh", output, loss)
    params = oracles.data(MLP((4, 6, outputs)), seed=1, batch=1, dtype=jnp.float32)[0]
    sample = Sample((4,), outputs, positions=False)
    return Model(net, params, **{"inputs": INPUTS, "targets": None, "classes": None, "sample": sample} | fields)


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def by_onnx(content: bytes, x: np.ndarray) -> Any:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(["output"], {"x": x})[0]


def by_numpy(content: bytes, x: np.ndarray) -> np.ndarray:
    """What PyTorch does with 0.weight, 0.bias, 2.weight …, of a network with tanh."""
    tensors = safetensors.numpy.load(content)
    for index in (0, 2):
        x = x @ tensors[f"{index}.weight"].T + tensors[f"{index}.bias"]
        x = np.tanh(x) if index == 0 else x
    return x


def by_jax(content: bytes, x: np.ndarray) -> Any:
    return jax.export.deserialize(bytearray(content)).call(x)


READERS: dict[str, Callable[[bytes, np.ndarray], Any]] = {
    ".safetensors": by_numpy,
    ".onnx": by_onnx,
    ".stablehlo": by_jax,
}
MODELS = {
    "classes": model(classes=("a", "b", "c")),
    "a regression, scaled": model(loss="squared_error", targets=Scaling(np.array([7.0, 0, 1]), np.array([3.0, 1, 9]))),
}


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("name", MODELS)
def test_raw_inputs_give_what_predict_gives(name: str, suffix: str) -> None:
    content, _ = export.FORMATS[suffix](MODELS[name], "")
    close(READERS[suffix](content, X), MODELS[name].predict(X))


def test_other_networks_and_projected_inputs_are_functions_of_jax() -> None:
    """Any number of samples, in the shape that they were read in."""
    layer = Chain(Flatten(), Dense(6), LayerNorm(), Elementwise("relu"), Dense(3))
    net = Network(layer, "softmax_cross_entropy", shape=(2, 2, 1))
    params = jaxbp.init(net, jax.random.key(0))
    images = Model(net, params, INPUTS, None, ("a", "b", "c"), Sample((2, 2), 3, positions=False))
    directions = np.linalg.qr(RNG.normal(size=(5, 4)))[0]
    projected = model(classes=("a", "b", "c"), inputs=Projection(directions, np.full(4, 0.1), np.full(4, 0.5)))
    for trained, x in ((images, X.reshape(-1, 2, 2)), (projected, RNG.normal(size=(9, 5)).astype(np.float32))):
        content, _ = export.FORMATS[".stablehlo"](trained, "")
        for part in (x, x[:1]):
            close(by_jax(content, part), trained.predict(part))
        with pytest.raises(ValueError, match=r"\.stablehlo takes any network"):
            export.folded(trained)


def test_flax_with_the_scaling_of_a_run() -> None:
    trained = MODELS["a regression, scaled"]
    close(interop.to_flax(*export.folded(trained))(X), trained.predict(X))


def test_what_is_said_of_outputs() -> None:
    one = {"outputs": 1, "loss": "sigmoid_cross_entropy"}
    assert export.about(MODELS["classes"]).splitlines() == [
        *("x (N, 4), raw inputs; outputs (N, 3)", "the largest output is that of the class: a, b, c")
    ]
    assert export.about(model(**one, classes=("no", "yes"))).endswith(
        "an output above 0 is the class yes, another one no"
    )
    assert export.about(model(loss="poisson")).endswith("the prediction is exp of the outputs")
    columns = (Column("size", (), 0.5), Column("sex", ("f", "m", None)))
    assert export.about(model(loss="squared_error", columns=columns)).endswith("inputs: size, sex=f, sex=m, sex=None")


def test_what_float32_cannot_hold_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds since 1970 which differ by a few."""
    export.folded(model(inputs=INPUTS._replace(mean=np.array([1.7e9, 0, 0, 0]))))
    assert "jaxbp: warning: in float32 outputs differ by " in capsys.readouterr().err
    export.folded(MODELS["classes"])
    assert capsys.readouterr().err == ""


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trained, run = MODELS["classes"], Path("run")
    run.mkdir()
    (run / "config.toml").write_text(tomli_w.dumps(to_dict(Config(model=ModelConfig((4, 6, 3), "tanh")))))
    trained.save(run)
    for suffix, reader in READERS.items():
        assert main(["export", "run", "--out", f"net{suffix}"]) == 0
        shown = capsys.readouterr()
        assert f'net{suffix}"' in shown.out and "of the class: a, b, c\n" in shown.out and shown.err == ""
        close(reader(Path(f"net{suffix}").read_bytes(), X), trained.predict(X))
    with safetensors.safe_open("net.safetensors", "numpy") as file:
        assert file.metadata() == {"about": export.about(trained)}
    monkeypatch.setitem(sys.modules, "onnx", None)
    for out, fault in [
        ("net.onnx", "--out: 'net.onnx' exists, --overwrite replaces it"),
        ("net.pt", "--out: 'net.pt' should end in .safetensors or .onnx or .stablehlo"),
        ("no/net.safetensors", "--out: 'no/net.safetensors' can't be written: No such file or directory"),
        ("new.onnx", "the package onnx is missing: pip install '.[export]' in the clone of jaxbp installs it"),
    ]:
        assert main(["export", "run", "--out", out]) == 2
        assert capsys.readouterr().err == f"jaxbp: {fault}\n"


def test_a_network_that_a_format_lacks_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "loaded", lambda run: model("squareplus", "absolute_error"))
    assert main(["export", "run", "--out", "net.safetensors"]) == 2
    fault = "jaxbp: --out: 'net.safetensors': PyTorch has no activation 'squareplus', allowed: identity, relu, "
    assert capsys.readouterr().err.startswith(fault) and not Path("net.safetensors").exists()
    with pytest.raises(ValueError, match="an activation comes before the scaled targets"):
        export.folded(model("tanh", "squared_error", targets=Scaling(np.zeros(3), np.full(3, 2.0))))
