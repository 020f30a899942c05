"""A trained network together with its scaling and class names, as a file: safetensors, no pickle."""

import html
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxbp import losses
from jaxbp.mlp import MLP
from jaxbp.names import short
from jaxbp.network import Net, ParamTree, check_parameters, check_tokens, dtype_of, init, layer_of, shapes
from jaxbp.run import config as configs
from jaxbp.run import networks, targets
from jaxbp.run.data import Projection, Scaling, tables
from jaxbp.run.data.tables import Column, Columns
from jaxbp.run.errors import UserError
from jaxbp.run.networks import Sample
from jaxbp.run.store import files
from jaxbp.run.store.runs import FILE, MEMBERS, UNFINISHED

Kind = TypeVar("Kind", Scaling, Projection)
BEST = "best.safetensors"  # the parameters after the best epoch


class Model(NamedTuple):
    """f(x; w, b) on raw inputs.

    inputs scales or projects x, where it isn't tokens; targets unscales the output of a regression; classes are the
    names behind the labels; sample is what the network was built for; columns are those of a table, if it learned one;
    best is the epoch that the parameters are of, if they are the best ones of a run and not the last.
    """

    net: Net
    params: ParamTree
    inputs: Scaling | Projection | None
    targets: Scaling | None
    classes: tuple[str, ...] | None
    sample: Sample
    columns: Columns | None = None
    best: int | None = None

    def predict(self, x: Any) -> np.ndarray:
        """For raw inputs (N, n₀) the network's output (N, n_L); a regression's prediction in the units of its targets.

        Images may keep their shape. Of a sequence of tokens (N, T) the output is (N, T, C). Where a table was
        learned, x may be a `pyarrow.Table` or a data frame of pandas or polars with its columns, in any order.

        One output x for two classes is given as −x and x, so that the larger one and σ(x) are those of a class.

        A regression predicts the mean of the target that its loss stands for: eˣ with poisson, σ(x) with
        sigmoid_cross_entropy, softmax(x) with softmax_cross_entropy and kl_divergence, or else the output x.

        Raises:
          ValueError: x has a wrong shape; a row of x, or what the network makes of it, is not finite in its dtype.
          UserError: a table without one of the columns, or with a value that can't be one of it.
        """
        if self.columns is not None and hasattr(x, "__arrow_c_stream__"):
            x = tables.inputs("x", x, self.columns)
        scaled = self.scaled(np.asarray(x))
        output = np.asarray(_outputs(self.net, self.params, scaled), np.float64)
        _check_finite(output, "the network's output for row {} of x is not finite")
        if self.classes and output.shape[-1] < len(self.classes):
            return np.concatenate([-output, output], axis=1)
        return output if self.classes else targets.predicted(losses.get(self.net.loss).name, output, self.targets)

    def scaled(self, x: np.ndarray) -> jax.Array:
        """Raw inputs as the network takes them; ValueError as for `predict`."""
        shape, width = shapes(self.net)[0], math.prod(self.sample.shape)
        if isinstance(self.inputs, Projection):
            width = len(self.inputs.directions)
        known = [known for known in ((width,), self.sample.shape, shape) if math.prod(known) == width]
        if x.shape[1:] not in known:
            shown = dict.fromkeys(f"(N, {', '.join(map(str, sizes))})" for sizes in known[:2])
            raise ValueError(f"x has shape {x.shape}, expected {' or '.join(shown)}")
        x = x.reshape(len(x), width)
        if self.inputs is None:
            check_tokens(self.net, x)
            return jnp.asarray(x, np.int32)
        dtype = dtype_of(self.params)
        with np.errstate(over="ignore"):
            scaled = jnp.asarray(self.inputs.apply(x, np.float64), dtype)
        _check_finite(scaled, f"row {{}} of x, scaled, is too large for {jnp.dtype(dtype)}")
        return scaled.reshape(len(x), *shape)

    def __repr__(self) -> str:
        """In one line: widths or layers, loss and how many parameters, not the parameters."""
        loss, count = losses.get(self.net.loss).name, sum(leaf.size for leaf in jax.tree.leaves(self.params))
        shown = "-".join(map(str, self.net.sizes)) if isinstance(self.net, MLP) else f"{self.net.layer}"
        epoch = f" of epoch {self.best}, the best" if self.best else ""
        return f"Model({shown}, {loss}, {count:,} parameters{epoch})"

    def _repr_html_(self) -> str:
        """A row a layer, for a notebook."""
        rows: list[tuple[str, ...]] = [("layer", "w", "activation", "parameters")]
        if isinstance(self.net, MLP):
            for layer, ((w, b), sigma) in enumerate(zip(self.params, self.net.activations, strict=True), 1):
                rows += [(str(layer), " × ".join(map(str, w.shape)), sigma.name, f"{w.size + b.size:,}")]
        else:
            rows = [("parameter", "shape", "parameters")]
            for name, leaf in _named(self.params).items():
                rows += [(name, " × ".join(map(str, leaf.shape)), f"{leaf.size:,}")]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in map(html.escape, row))}</tr>" for row in rows)
        return f"<table><caption>{html.escape(repr(self))}</caption>{body}</table>"

    def save(self, folder: Path) -> None:
        """Writes params.safetensors: layer.1.w … layer.L.b, the scalings; the class names and the sample as metadata.

        In other networks than an MLP a layer may have other parameters: layer.3.layer.1.qkv.w.
        The best parameters go to best.safetensors, with their epoch.
        """
        tensors = {name: np.asarray(leaf) for name, leaf in _named(self.params).items()}
        for name, scaling in (("inputs", self.inputs), ("targets", self.targets)):
            tensors |= {f"{name}.{k}": v for k, v in scaling._asdict().items()} if scaling else {}
        known: dict[str, Any] = {"classes": self.classes}
        is_row = isinstance(self.net, MLP) and len(self.sample.shape) == 1
        known |= {} if is_row else {"sample": self.sample}
        known |= {"columns": self.columns} if self.columns else {}
        names, values = " and ".join(known), list(known.values())  # together, because two of metadata have no order
        metadata = {names: json.dumps(values if len(values) > 1 else values[0])}
        tensors |= {"epoch": np.array(self.best)} if self.best else {}
        files.replace(folder / (BEST if self.best else FILE), safetensors.numpy.save(tensors, metadata=metadata))


def _named(params: ParamTree) -> dict[str, Any]:
    """The leaves by name, "layer.1.w": numbers count from 1 and are those of the layers."""

    def name(path: tuple[Any, ...]) -> str:
        keys = (f"layer.{key.idx + 1}" if hasattr(key, "idx") else key.name for key in path)
        return ".".join(keys) or "layer.1"

    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _check_finite(values: np.ndarray | jax.Array, fault: str) -> None:
    """ValueError that names the first row with a NaN or an infinity."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(values)).reshape(len(values), math.prod(values.shape[1:])).all(axis=1))
    if bad.size:
        raise ValueError(fault.format(bad[0]))


@jax.jit(static_argnums=0)
def _outputs(net: Net, params: ParamTree, x: jax.Array) -> jax.Array:
    at_once = 1000 if isinstance(net, MLP) else 100
    return jax.lax.map(lambda x: layer_of(net).forward(params, x)[0], x, batch_size=at_once)


def finished(folder: Path) -> bool:
    """Whether the run in the folder has ended; one that was stopped may go on, with other parameters."""
    return not (folder / UNFINISHED).exists()


def load(folder: str | Path) -> Model:
    """The trained network of a run folder, with the best parameters if the run kept them, or else with the last ones.

    One in float64 turns JAX's x64 mode on.

    Raises:
      UserError: the folder holds no finished run, or its files are damaged.
    """
    folder = Path(folder)
    if member := next(iter(sorted(folder.glob(f"{MEMBERS}/*/{FILE}"))), None):
        raise UserError(f"{folder}: a sweep; name one of its members, such as {member.parent}")
    if not (folder / FILE).is_file() or not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: not a run folder: needs config.toml and {FILE}")
    config = configs.read(folder / "config.toml")
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    path = folder / BEST if (folder / BEST).exists() else folder / FILE
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            [(names, values)] = (file.metadata() or {}).items()
        known = json.loads(values)
        known = dict(zip(names.split(" and "), known if " and " in names else [known], strict=True))
        if config.model.kind == "mlp" and "sample" not in known:
            sizes = config.model.sizes or (0,)
            sample = Sample(sizes[:1], sizes[-1], positions=False)
        else:
            shape, *rest = known["sample"]
            sample = Sample(tuple(shape), *rest)
        net = networks.network(config.model, sample)
        expected = jax.eval_shape(lambda: init(net, jax.random.key(0)))
        params = jax.tree.unflatten(jax.tree.structure(expected), [jnp.asarray(tensors[n]) for n in _named(expected)])
        check_parameters(net, params)
        inputs = _saved(Projection, tensors, "inputs") or _saved(Scaling, tensors, "inputs")
        targets = _saved(Scaling, tensors, "targets")
        if inputs is None and not networks.takes_tokens(net):
            raise KeyError("inputs.mean")
        best = int(tensors["epoch"]) if path.name == BEST else None
        classes = tuple(known["classes"]) if known["classes"] else None
        columns = tuple(Column(name, tuple(words), mean) for name, words, mean in known.get("columns", ()))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return Model(net, params, inputs, targets, classes, sample, columns or None, best)


def parameters_for(folder: Path, like: ParamTree) -> ParamTree:
    """The trained parameters of a run folder, see `load`, for a network whose parameters are like these.

    Raises:
      UserError: as `load`, or for the first parameter of another shape or dtype.
    """
    if not os.path.isdir(folder):
        raise UserError(f"model.parameters: {short(str(folder))} is no folder of a run")
    try:
        found, wanted = _named(load(folder).params), _named(like)
    except UserError as error:
        raise UserError(f"model.parameters: {error}") from None
    theirs, ours = ({name: f"{a.shape} {a.dtype}" for name, a in part.items()} for part in (found, wanted))
    for name in (name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)):
        has, needs = theirs.get(name, "not there"), ours.get(name, "not there")
        raise UserError(f"model.parameters: {folder}: {name} is {has}, and {needs} in this network")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def _saved(kind: type[Kind], tensors: dict[str, np.ndarray], name: str) -> Kind | None:
    """The one of this name, if it was saved."""
    first, *_ = kind._fields
    return kind(*(tensors[f"{name}.{k}"] for k in kind._fields)) if f"{name}.{first}" in tensors else None
