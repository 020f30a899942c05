"""The [mesh] table: one run on D × M devices, the batch over `data`, the units of the layers over `model`.

The recursion of jaxbp/mlp.py does not know of it: inputs and parameters come with a `NamedSharding`, XLA's partitioner
does the rest. Parameters alternate (out, in), after Megatron-LM (Shoeybi et al. 2019, §3): a layer that has its output
units split feeds one that has its input units split, and only the second one has to sum over `model`:

    layer 1, 3, …   w P("model", None)   b P("model")   s⁽ˡ⁾ = w⁽ˡ⁾ x⁽ˡ⁻¹⁾ + b⁽ˡ⁾ needs nothing of the others
    layer 2, 4, …   w P(None, "model")   b P()          w⁽ˡ⁾ x⁽ˡ⁻¹⁾ is summed over `model`, (N/D, n_l) numbers
    the last, if their count is odd      whole          its softmax would need a sum too, for a layer of few units

The training set is split over `data`: before an epoch each process lays out the rows that its devices will take, in the
order in which a run on one device takes them. No step then moves a sample, and a device holds N/D of them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbp.mlp import MLP, Affine, Array, Params, init
from jaxbp.run import training
from jaxbp.run.config import Config, MeshConfig
from jaxbp.run.errors import UserError
from jaxbp.run.optimizers import Optimizer
from jaxbp.run.recording import Recording
from jaxbp.run.training import EVALUATED_AT_ONCE, Evaluation, Program, State, Steps
from jaxbp.run.tricks import Tricks

Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Row numbers (n,) ↦ inputs (n, n₀) and targets (n,) or (n, C), on the host."""


class Source(NamedTuple):
    """A training or test set on the host: how many samples, and what reads some of them."""

    samples: int
    read: Read


class Rows(NamedTuple):
    """Samples on the mesh, S batches of B: x (S, B, n₀), y (S, B) or (S, B, C), weights (S, B); B over `data`."""

    x: Array
    y: Array
    weights: Array


def check(config: Config, net: MLP, samples: int) -> None:
    """UserError for a mesh that the devices, the batch or a hidden layer do not fit."""
    (data, model), devices, processes = shape(config.mesh), jax.device_count(), jax.process_count()
    if data * model > devices:
        there = f"there are {devices} devices" if devices > 1 else "there is 1 device"
        raise UserError(f"mesh.data × mesh.model is {data} × {model}, {there}")
    if processes > 1 and data * model < devices:
        have = f"the {processes} processes have {devices} devices, and each process has to have a part"
        raise UserError(f"mesh.data × mesh.model is {data} × {model}, {have}")
    if config.train.micro_batches > 1 and data > 1:
        raise UserError("train.micro_batches: a part would lie on one device of mesh.data: leave out one of the two")
    batch = min(config.train.batch_size, samples)
    if batch % data:
        raise UserError(f"train.batch_size: mesh.data {data} does not divide the {batch} samples of a batch")
    if model > 1 and len(net.sizes) < 3:
        raise UserError(f"mesh.model: {model}, but model.sizes {list(net.sizes)} has no hidden layer to split")
    for size in net.sizes[1:-1] if model > 1 else ():
        if size % model:
            raise UserError(f"model.sizes: mesh.model {model} does not divide the hidden width {size}")


def shape(config: MeshConfig) -> tuple[int, int]:
    """D and M; without `data` D is 1 in one process, and takes all devices in several."""
    every = jax.device_count() // config.model if jax.process_count() > 1 else 1
    return config.data or max(every, 1), config.model


def asked(config: MeshConfig) -> bool:
    """Whether a run is on a mesh: on more than one device or in more than one process."""
    return shape(config) != (1, 1) or jax.process_count() > 1


def build(config: MeshConfig) -> Mesh:
    """The first D · M devices, those of a process beside each other in `model`, where they exchange most."""
    data, model = shape(config)
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


def param_specs(net: MLP) -> tuple[Affine, ...]:
    """How each layer's w (out, in) and b (out,) are split, as `PartitionSpec` in the place of the arrays."""
    out, into, whole = Affine(P("model", None), P("model")), Affine(P(None, "model"), P()), Affine(P(), P())  # type: ignore[arg-type]
    layers = len(net.sizes) - 1
    return (out, into) * (layers // 2) + (whole,) * (layers % 2)


def shardings(mesh: Mesh, net: MLP, tree: Any) -> Any:
    """A `NamedSharding` for each leaf of a state: one that is kept for each parameter, such as a momentum, is split
    like it; all others are whole on every device.
    """
    params = jax.eval_shape(lambda: init(net, jax.random.key(0)))
    specs = dict(jax.tree_util.tree_leaves_with_path(param_specs(net)))
    known = {path: (leaf.shape, specs[path]) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        shape, spec = known.get(path[-2:], (None, P()))
        return NamedSharding(mesh, spec if shape == leaf.shape else P())

    return jax.tree_util.tree_map_with_path(of, tree)


def spread(mesh: Mesh, net: MLP, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` returns, such as initial parameters: each device computes its part, none ever holds the whole."""
    return jax.jit(make, out_shardings=shardings(mesh, net, jax.eval_shape(make, *arguments)))(*arguments)


def put(tree: Any, sharding: Any) -> Any:
    """Arrays that every process has, onto the mesh: each process fills the part that its devices hold."""

    def one(leaf: Any, sharding: NamedSharding) -> Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, sharding)


def host(tree: Any) -> Any:
    """Arrays on the mesh as NumPy arrays in every process, leaf by leaf so that one at a time is whole on a device."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = _whole(NamedSharding(leaf.sharding.mesh, P()))(leaf)  # type: ignore[attr-defined]
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


@functools.cache
def _whole(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)


def lay_out(mesh: Mesh, source: Source, order: np.ndarray, present: np.ndarray) -> Rows:
    """Samples onto the mesh: order (S, B) are their rows in the source, present (S, B) is False for those that fill up.

    A process reads only the rows that its own devices hold.
    """
    read = functools.cache(
        lambda first, last: source.read(order[:, first:last].ravel())
    )  # the M devices of a row share
    example = source.read(order[:1, 0])

    def array(part: int) -> Array:
        shape = (*order.shape, *example[part].shape[1:])

        def fill(index: Any) -> np.ndarray:
            first, last, _ = index[1].indices(shape[1])
            return read(first, last)[part].reshape(len(order), last - first, *shape[2:])

        return jax.make_array_from_callback(shape, NamedSharding(mesh, P(None, "data")), fill)

    weights = put(present.astype(example[0].dtype), NamedSharding(mesh, P(None, "data")))
    return Rows(array(0), array(1), weights)


def compile_epoch(
    mesh: Mesh,
    net: MLP,
    optimizer: Optimizer,
    recording: Recording | None,
    state: State,
    tricks: Tricks,
    rows: Rows,
) -> jax.stages.Compiled:
    """(state, rows, steps done) ↦ (state, steps), `training.epoch` on the mesh; from arrays or their shapes."""
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def epoch(state: State, rows: Rows, done: Array) -> tuple[State, Steps]:
        return training.scan(
            net, optimizer, recording, tricks, state, rows[:2], rows.weights, lambda batch: batch, done
        )

    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    states = shardings(mesh, net, state)
    jitted = jax.jit(epoch, in_shardings=(states, split, whole), out_shardings=(states, whole), donate_argnums=0)
    return jitted.lower(state, rows, jax.ShapeDtypeStruct((), jnp.arange(0).dtype)).compile()


def program(
    mesh: Mesh,
    net: MLP,
    optimizer: Optimizer,
    batch_size: int,
    sources: Mapping[str, Source],
    recording: Recording | None,
    state: State,
    tricks: Tricks,
) -> Program:
    """A run on the mesh; `sources` are the sets "train" and "test", `state` shows the shapes."""
    laid: dict[str, tuple[np.ndarray, Rows]] = {}  # by set: the order of its rows, and they on the mesh

    def lay(name: str, order: Any, present: Any) -> Rows:
        laid.pop(name, None)  # first, so that a device never holds two orders of a set
        laid[name] = np.asarray(order), lay_out(mesh, sources[name], np.asarray(order), np.asarray(present))
        return laid[name][1]

    def epoch(state: State, key: Array, done: int) -> tuple[State, Steps]:
        rows = lay("train", *training.drawn(key, sources["train"].samples, batch_size))
        return compiled(state, rows, put(np.asarray(done, jnp.arange(0).dtype), NamedSharding(mesh, P())))

    def evaluate(net: MLP, params: Params, name: str) -> Evaluation:
        if name not in laid:
            lay(name, *in_order(sources[name].samples, mesh.shape["data"]))
        order, rows = laid[name]
        found = _evaluation(net, NamedSharding(mesh, P()))(put(params, shardings(mesh, net, params)), rows.x, rows.y)
        _, first = np.unique(order.ravel(), return_index=True)  # the first copy of each row
        return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(order.size, *leaf.shape[2:])[first], found)

    order, _ = training.drawn(jax.random.key(0), sources["train"].samples, batch_size)
    compiled = compile_epoch(mesh, net, optimizer, recording, state, tricks, _shapes(sources["train"], order.shape))
    return Program(lambda state: put(state, shardings(mesh, net, state)), host, epoch, evaluate)


def in_order(samples: int, data: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0, 1, 2 … in batches for an evaluation, as `training.drawn` has them; the last is filled up."""
    size = data * -(-min(EVALUATED_AT_ONCE, samples) // data)
    steps = -(-samples // size)
    order = np.arange(steps * size).reshape(steps, size)
    return order % samples, order < samples


def _shapes(source: Source, batches: tuple[int, ...]) -> Rows:
    x, y = (jax.ShapeDtypeStruct((*batches, *part.shape[1:]), part.dtype) for part in source.read(np.zeros(1, int)))
    return Rows(x, y, jax.ShapeDtypeStruct(batches, x.dtype))  # type: ignore[arg-type]


@functools.cache
def _evaluation(net: MLP, out: NamedSharding) -> Callable[[Params, Array, Array], Evaluation]:
    def evaluate(params: Params, x: Array, y: Array) -> Evaluation:
        return jax.lax.map(jax.vmap(functools.partial(training.evaluated, net, params)), (x, y))

    return jax.jit(evaluate, out_shardings=out)
