"""A trained network together with its scaling and class names, as a file: safetensors, no pickle."""

import html
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxbp import activations, losses
from jaxbp.mlp import MLP, Affine, Params, forward
from jaxbp.run import config as configs
from jaxbp.run import targets
from jaxbp.run.config import Config, ModelConfig, choose
from jaxbp.run.data import Scaling
from jaxbp.run.errors import UserError
from jaxbp.run.store import files
from jaxbp.shapes import check_params

FILE = "params.safetensors"
MEMBERS = "members"  # of a sweep, a run folder each
UNFINISHED = ".unfinished"  # there from the beginning of a run to its end; locked while a process works on it


class Model(NamedTuple):
    """f(x; w, b) on raw inputs.

    inputs scales x, targets unscales the output of a regression; classes are the names behind the labels.
    """

    net: MLP
    params: Params
    inputs: Scaling
    targets: Scaling | None
    classes: tuple[str, ...] | None

    def predict(self, x: np.ndarray) -> np.ndarray:
        """For raw inputs (N, n₀) the network's output (N, n_L); a regression's prediction in the units of its targets.

        A regression predicts the mean of the target that its loss stands for: eˣ with poisson, σ(x) with
        sigmoid_cross_entropy, softmax(x) with softmax_cross_entropy and kl_divergence, or else the output x.

        Raises:
          ValueError: x has a wrong shape; a row of x, or what the network makes of it, is not finite in its dtype.
        """
        x = np.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.net.sizes[0]:
            raise ValueError(f"x has shape {x.shape}, expected (N, {self.net.sizes[0]})")
        dtype = self.params[0].w.dtype
        with np.errstate(over="ignore"):
            scaled = jnp.asarray(self.inputs.apply(x, np.float64), dtype)
        _check_finite(scaled, f"row {{}} of x, scaled, is too large for {dtype}")
        output = np.asarray(_outputs(self.net, self.params, scaled), np.float64)
        _check_finite(output, "the network's output for row {} of x is not finite")
        return output if self.classes else targets.predicted(losses.get(self.net.loss).name, output, self.targets)

    def __repr__(self) -> str:
        """In one line: widths, loss and how many parameters, not the parameters."""
        loss, count = losses.get(self.net.loss).name, sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Model({'-'.join(map(str, self.net.sizes))}, {loss}, {count:,} parameters)"

    def _repr_html_(self) -> str:
        """A row a layer, for a notebook."""
        rows = [("layer", "w", "activation", "parameters")]
        for layer, ((w, b), sigma) in enumerate(zip(self.params, self.net.activations, strict=True), 1):
            rows += [(str(layer), " × ".join(map(str, w.shape)), sigma.name, f"{w.size + b.size:,}")]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in map(html.escape, row))}</tr>" for row in rows)
        return f"<table><caption>{html.escape(repr(self))}</caption>{body}</table>"

    def save(self, folder: Path) -> None:
        """Writes params.safetensors: layer.1.w … layer.L.b, the scalings, and the class names as metadata."""
        tensors = {
            f"layer.{i}.{k}": np.asarray(v) for i, p in enumerate(self.params, 1) for k, v in p._asdict().items()
        }
        scalings = {"inputs": self.inputs} | ({"targets": self.targets} if self.targets else {})
        tensors |= {f"{name}.{k}": v for name, scaling in scalings.items() for k, v in scaling._asdict().items()}
        files.replace(folder / FILE, safetensors.numpy.save(tensors, metadata={"classes": json.dumps(self.classes)}))


def _check_finite(values: np.ndarray | jax.Array, fault: str) -> None:
    """ValueError that names the first row with a NaN or an infinity."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(values)).all(axis=1))
    if bad.size:
        raise ValueError(fault.format(bad[0]))


@jax.jit(static_argnums=0)
def _outputs(net: MLP, params: Params, x: jax.Array) -> jax.Array:
    return jax.lax.map(lambda x: forward(net, params, x).x[-1], x, batch_size=1000)


def network(config: ModelConfig) -> MLP:
    """The MLP of a [model] table.

    Raises:
      UserError: an unknown activation or loss, a wrong number of hidden activations, label smoothing of another loss.
    """
    loss: Any = config.loss
    choose("model.loss", "loss", config.loss, losses.LOSSES)
    choose("model.output", "activation", config.output, activations.ACTIVATIONS)
    for name in (config.hidden,) if isinstance(config.hidden, str) else config.hidden:
        choose("model.hidden", "activation", name, activations.ACTIVATIONS)
    if config.label_smoothing and config.loss != "softmax_cross_entropy":
        raise UserError(f"model.label_smoothing: only softmax_cross_entropy has it, the loss is {config.loss}")
    if config.label_smoothing:
        loss = losses.smoothed_softmax_cross_entropy(config.label_smoothing)
    try:
        return MLP(config.sizes, config.hidden, config.output, loss)
    except ValueError as error:
        raise UserError(f"model.hidden: {error}") from None


def finished(folder: Path) -> bool:
    """Whether the run in the folder has ended; one that was stopped may go on, with other parameters."""
    return not (folder / UNFINISHED).exists()


def load(folder: str | Path) -> Model:
    """The trained network of a run folder; one in float64 turns JAX's x64 mode on.

    Raises:
      UserError: the folder holds no finished run, or its files are damaged.
    """
    folder = Path(folder)
    if member := next(iter(sorted(folder.glob(f"{MEMBERS}/*/{FILE}"))), None):
        raise UserError(f"{folder}: a sweep; name one of its members, such as {member.parent}")
    if not (folder / FILE).is_file() or not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: not a run folder: needs config.toml and {FILE}")
    config: Config = configs.read(folder / "config.toml")
    net = network(config.model)
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    try:
        with safetensors.safe_open(folder / FILE, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            classes = json.loads(file.metadata()["classes"])
        params = tuple(
            Affine(jnp.asarray(tensors[f"layer.{i}.w"]), jnp.asarray(tensors[f"layer.{i}.b"]))
            for i in range(1, len(net.sizes))
        )
        check_params(net.sizes, params)
        inputs = Scaling(tensors["inputs.mean"], tensors["inputs.scale"])
        targets = Scaling(tensors["targets.mean"], tensors["targets.scale"]) if "targets.mean" in tensors else None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / FILE}: damaged: {error}") from None
    return Model(net, params, inputs, targets, tuple(classes) if classes else None)
