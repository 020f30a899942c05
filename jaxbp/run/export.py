"""`jaxbp export`: a trained network as a file that other programs read. Raw inputs go in, as in `jaxbp predict`.

A run's network gets scaled inputs. `folded` puts the scaling into the weights of a perceptron::

    net, params = folded(jaxbp.run.load("runs/digits"))
    module = jaxbp.interop.to_flax(net, params)  # or to_equinox, to_torch, to_onnx
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export

from jaxbp import activations, interop, losses
from jaxbp.mlp import MLP, Affine, Params, wide
from jaxbp.network import dtype_of, layer_of, shapes
from jaxbp.run import targets
from jaxbp.run.data import Projection
from jaxbp.run.errors import UserError
from jaxbp.run.predict import loaded
from jaxbp.run.store import files
from jaxbp.run.store.model import Model


def export(run: Path, out: Path, overwrite: bool = False) -> None:
    """Writes the network of a run in the format of the file's suffix; prints what it takes and how it is read.

    Raises:
      UserError: no run; a network that the format does not know; an output that is there already or can't be written.
    """
    files.check_new(out, tuple(FORMATS), overwrite)
    model = loaded(run)
    text = about(model)
    try:
        content, code = FORMATS[out.suffix](model, text)
    except ValueError as error:
        raise UserError(f"--out: {str(out)!r}: {error}") from None
    with files.writable(f"--out: {str(out)!r}"):
        files.replace(out, content)
    print(f"{text}\n\n{code.format(file=out)}")


def about(model: Model) -> str:
    """What the network of a run takes and gives, once it is exported."""
    loss, shape, outputs = losses.get(model.net.loss).name, _raw_shape(model), shapes(model.net)[1]
    lines = [f"x (N, {', '.join(map(str, shape))}), raw inputs; outputs (N, {', '.join(map(str, outputs))})"]
    if model.columns:
        names = [f"{c.name}={k}" if c.categories else c.name for c in model.columns for k in c.categories or (None,)]
        lines += [f"inputs: {', '.join(names)}"]
    if model.classes and outputs[-1] == 1:
        lines += ["an output above 0 is the class {1}, another one {0}".format(*model.classes)]
    elif model.classes:
        lines += [f"the largest output is that of the class: {', '.join(model.classes)}"]
    elif (kind := targets.kind_of(loss)) is not None:
        lines += [f"the prediction is {kind.name} of the outputs"]
    return "\n".join(lines)


def folded(model: Model) -> tuple[MLP, Params]:
    """A perceptron for raw inputs, with outputs in the units of the targets: the scalings are in w and b.

    First layer: w (x − mean) / scale + b = w′ x + (b − w′ mean), w′ = w / scale. Last layer: scale (w x + b) + mean.
    This is computed in float64; the parameters are float32. A warning on standard error says where that is too coarse.

    Raises:
      ValueError: the network is no perceptron; its inputs are projected; an activation comes before scaled targets.
    """
    net, inputs = model.net, model.inputs
    if not isinstance(net, MLP) or inputs is None:
        raise ValueError("only a multi-layer perceptron can be written so; .stablehlo takes any network")
    if isinstance(inputs, Projection):
        raise ValueError("data.pca divides a sample by its norm, no perceptron does; .stablehlo takes any network")
    layers = [(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in model.params]
    w, b = layers[0]
    layers[0] = (w / inputs.scale, b - w / inputs.scale @ inputs.mean)
    if model.targets is not None:
        (w, b), (mean, scale) = layers[-1], model.targets
        layers[-1] = (scale[:, None] * w, scale * b + mean)
        if net.activations[-1] is not activations.identity and (np.any(mean != 0) or np.any(scale != 1)):
            raise ValueError("an activation comes before the scaled targets; .stablehlo takes any network")
    params = tuple(Affine(jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32)) for w, b in layers)
    _warn_of_rounding(model, net, params)
    return net, params


def _warn_of_rounding(model: Model, net: MLP, params: Params) -> None:
    """Compares with the run's own network, on samples that are spread as its training set was."""
    assert model.inputs is not None
    spread = np.random.default_rng(0).normal(size=(64, net.sizes[0]))
    x = (model.inputs.mean + model.inputs.scale * spread).astype(np.float32)
    want = np.asarray(interop.apply(net, model.params, model.scaled(x)), np.float64)
    want = want if model.targets is None else model.targets.inverse(want)
    if (error := np.abs(interop.apply(net, params, x) - want).max()) > 1e-4 * np.abs(want).max():
        error /= np.abs(want).max()
        print(f"jaxbp: warning: in float32 outputs differ by {error:.0e} of the largest", file=sys.stderr)


def _torch(model: Model, text: str) -> tuple[bytes, str]:
    net, params = folded(model)
    code = f'model = {interop.torch_code(net)}\nmodel.load_state_dict(safetensors.torch.load_file("{{file}}"))'
    return safetensors.numpy.save(interop.to_torch(net, params), metadata={"about": text}), code


def _onnx(model: Model, text: str) -> tuple[bytes, str]:
    exported = interop.to_onnx(*folded(model))
    exported.doc_string = text
    return exported.SerializeToString(), 'onnxruntime.InferenceSession("{file}").run(["output"], {{"x": x}})'


def _stablehlo(model: Model, text: str) -> tuple[bytes, str]:
    import flatbuffers  # noqa: F401 - jax.export needs it, and says so in an ImportError without a name

    (batch,) = jax_export.symbolic_shape("N")
    dtype = jnp.int32 if model.inputs is None else wide(dtype_of(model.params))
    x = jax.ShapeDtypeStruct((batch, *_raw_shape(model)), dtype)
    exported = jax_export.export(jax.jit(functools.partial(_outputs, model)), platforms=("cpu", "cuda", "tpu"))(x)
    return bytes(exported.serialize()), 'jax.export.deserialize(open("{file}", "rb").read()).call(x)'


def _raw_shape(model: Model) -> tuple[int, ...]:
    if isinstance(model.inputs, Projection):
        return (len(model.inputs.directions),)
    return shapes(model.net)[0] if isinstance(model.net, MLP) else model.sample.shape


def _outputs(model: Model, x: jax.Array) -> jax.Array:
    """As `Model.predict` without what a loss makes of it, inside of JAX: scaled, through the network, unscaled."""
    dtype = wide(dtype_of(model.params))
    if model.inputs is not None:
        x = x.reshape(x.shape[0], -1)
        if isinstance(model.inputs, Projection):
            x = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), jnp.finfo(dtype).tiny)
            x = x @ jnp.asarray(model.inputs.directions, dtype)
        x = (x - jnp.asarray(model.inputs.mean, dtype)) / jnp.asarray(model.inputs.scale, dtype)
        x = x.reshape(x.shape[0], *shapes(model.net)[0]).astype(dtype_of(model.params))
    output = jax.vmap(lambda x: layer_of(model.net).forward(model.params, x)[0])(x).astype(dtype)
    if model.targets is None:
        return output
    return output * jnp.asarray(model.targets.scale, dtype) + jnp.asarray(model.targets.mean, dtype)


FORMATS: dict[str, Callable[[Model, str], tuple[bytes, str]]] = {
    ".safetensors": _torch,
    ".onnx": _onnx,
    ".stablehlo": _stablehlo,
}
"""By the suffix: the bytes of the file, and the code that reads it."""
