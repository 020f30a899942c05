"""Do other libraries compute what an exported network computes here? PyTorch, onnxruntime, Flax, Equinox, jax.export.

Two networks are trained, `configs/digits.toml` and `configs/diabetes.toml`, a regression with scaled targets. They are
exported with their scaling and applied to the raw inputs of the test set. Beside them there is a network for each
activation, with random parameters. A difference is the largest of all outputs, divided by the largest output.
PyTorch also saves its state_dict again, and that has to give the same bits.

Command: python -m experiments.exports [--out FOLDER]
"""

import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import safetensors.numpy

import jaxbp
import jaxbp.run
from experiments import report
from experiments.bench import environments
from jaxbp import MLP, interop
from jaxbp.mlp import Params
from jaxbp.run import config as configs
from jaxbp.run import data
from jaxbp.run.export import FORMATS, folded

ROOT = Path(__file__).parents[1]
RUNS = ("digits", "diabetes")


class Case(NamedTuple):
    """A network, its parameters, inputs, the outputs by jaxbp, and what jax.export made of the run, if it is one."""

    net: MLP
    params: Params
    x: np.ndarray
    want: np.ndarray
    stablehlo: bytes | None


def trained(name: str, folder: Path) -> Case:
    """A run of configs/NAME.toml, with its scaling folded into it; raw inputs."""
    config = configs.read(ROOT / "configs" / f"{name}.toml", ["--train.no-plots"])
    model = jaxbp.run.train(config, folder=folder / name).model
    x = np.asarray(data.load(config.data).x_test, np.float32)
    return Case(*folded(model), x, model.predict(x), FORMATS[".stablehlo"](model, "")[0])


def random(sigma: str) -> Case:
    """A network with the activation in all of its layers."""
    net = MLP((8, 32, 32, 4), sigma, sigma)
    params = jaxbp.init(net, jax.random.key(0), "glorot", "normal")
    x = 3 * np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    return Case(net, params, x, np.asarray(jaxbp.apply(net, params, x)), None)


def here(case: Case) -> dict[str, np.ndarray]:
    """The outputs by the libraries that this process has."""
    session = onnxruntime.InferenceSession(interop.to_onnx(case.net, case.params).SerializeToString())
    x = jnp.asarray(case.x)
    found = {
        "onnxruntime": session.run(["output"], {"x": case.x})[0],
        "Flax": interop.to_flax(case.net, case.params)(x),
        "Equinox": jax.vmap(interop.to_equinox(case.net, case.params))(x),
    }
    if case.stablehlo is not None:
        found["jax.export"] = jax.export.deserialize(bytearray(case.stablehlo)).call(x)
    return {name: np.asarray(output) for name, output in found.items()}


def in_torch(cases: dict[str, Case], folder: Path) -> tuple[dict[str, np.ndarray], list[str], str]:
    """The outputs by PyTorch, the networks whose parameters came back with other bits, and the version."""
    python = environments.make("torch", print)
    for name, case in cases.items():
        (folder / f"{name}.code").write_text(interop.torch_code(case.net), encoding="utf-8")
        safetensors.numpy.save_file(interop.to_torch(case.net, case.params), folder / f"{name}.safetensors")
        np.save(folder / f"{name}.x.npy", case.x)
    script = [python, str(ROOT / "experiments" / "peers" / "torch_exports.py"), str(folder)]
    torch = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    back = {name: safetensors.numpy.load_file(folder / f"{name}.back.safetensors") for name in cases}
    changed = [name for name, case in cases.items() if not _same(interop.from_torch(case.net, back[name]), case.params)]
    return {name: np.load(folder / f"{name}.output.npy") for name in cases}, changed, torch


def _same(got: Params, want: Params) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, exports, prints the table, writes exports.json."""
    parser = report.parser(__doc__)
    with report.study("exports", parser, arguments) as study, tempfile.TemporaryDirectory() as folder:
        cases = {name: trained(name, Path(folder)) for name in RUNS} | {name: random(name) for name in interop.TORCH}
        by_torch, changed, torch = in_torch(cases, Path(folder))
        differences: dict[str, dict[str, Any]] = {}
        for name, case in cases.items():
            outputs = {"PyTorch": by_torch[name], **here(case)}
            scale = float(np.abs(case.want).max())
            differences[name] = {by: float(np.abs(got - case.want).max()) / scale for by, got in outputs.items()}
        columns = ("PyTorch", "onnxruntime", "Flax", "Equinox", "jax.export")
        rows = [(name, *(f"{d[by]:.0e}" if by in d else "" for by in columns)) for name, d in differences.items()]
        report.table("exports", ("network", *columns), rows)
        print(f"parameters with other bits after PyTorch: {', '.join(changed) or 'none'}")
        versions = {"torch": torch} | {
            name: version(name) for name in ("onnx", "onnxruntime", "flax", "equinox", "jax")
        }
        study.save({"versions": versions, "differences": differences, "changed_by_torch": changed})


if __name__ == "__main__":
    main()
