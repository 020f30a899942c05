"""The [mesh] table: one run on D × M devices, the batch over `data`, the units of the layers over `model`.

The recursion of jaxbp/mlp.py does not know of it: inputs and parameters come with a `NamedSharding`, XLA's partitioner
does the rest. `placement` says which parameters are split.

The training set is split over `data`: before an epoch each process lays out the rows that its devices will take, in the
order in which a run on one device takes them. No step then moves a sample, and a device holds N/D of them.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbp.mlp import MLP, Array
from jaxbp.network import Net, Network, ParamTree, init
from jaxbp.run.compute.epoch import EVALUATED_AT_ONCE, Evaluation, drawn, evaluated, scan
from jaxbp.run.compute.placement import param_specs
from jaxbp.run.compute.program import first_state
from jaxbp.run.compute.step import State, Steps, StepSpec
from jaxbp.run.config import Config, MeshConfig
from jaxbp.run.data import text
from jaxbp.run.errors import UserError
from jaxbp.run.problem import Problem


class Rows(NamedTuple):
    """Samples on the mesh, S batches of B: x (S, B, n₀), y (S, B) or (S, B, C), weights (S, B); B over `data`."""

    x: Array
    y: Array
    weights: Array


class OnMesh:
    """A run on the mesh of its config, with the methods of `program.OneDevice`."""

    in_place: ClassVar[bool] = True
    whole: ParamTree

    def __init__(self, problem: Problem, spec: StepSpec) -> None:
        self._problem, self._spec = problem, spec
        self._mesh = build(problem.config.mesh)
        self._laid: dict[str, tuple[np.ndarray, Rows]] = {}  # of each set: which row is in each place, (S, B); the rows

    @staticmethod
    def check(config: Config, problem: Problem) -> None:
        """UserError for a mesh that the devices, the batch or a hidden layer do not fit."""
        if problem.weights is not None and problem.inputs is None:
            raise UserError("mesh: tokens with weights are trained on one device")
        _check_devices(config.mesh)
        _check_sizes(config, problem.net, len(problem.dataset.x_train))

    @staticmethod
    def devices(config: Config) -> str:
        """Such as "2 × 1 cpu in 2 processes"."""
        (data, model), count = shape(config.mesh), jax.process_count()
        return f"{data} × {model} {jax.devices()[0].device_kind}" + (f" in {count} processes" if count > 1 else "")

    def begin(self, saved: State | None = None) -> None:
        """Makes the initial state, each device its part, or places a saved one, and compiles the epoch for it."""
        net = self._problem.net
        make = functools.partial(first_state, self._problem, self._spec)
        self._state = spread(self._mesh, net, make) if saved is None else put(saved, shardings(self._mesh, net, saved))
        self.keep()
        order, _ = self._drawn(jax.random.key(0))
        sample = self._reader("train")(np.zeros(1, int))
        x, y = (jax.ShapeDtypeStruct((*order.shape, *part.shape[1:]), part.dtype) for part in sample)
        rows = Rows(x, y, jax.ShapeDtypeStruct(order.shape, x.dtype))  # type: ignore[arg-type]
        self._compiled = compile_epoch(self._mesh, self._spec, self._state, rows)

    def epoch(self, key: Array, done: int) -> Steps:
        self.whole = jax.tree.map(jnp.copy, self.whole)  # the epoch takes the state away
        (_, rows), whole = self._lay("train", *self._drawn(key)), NamedSharding(self._mesh, P())
        before = put(np.asarray(done, jnp.arange(0).dtype), whole)
        self._state, steps = self._compiled(self._state, rows, before, put(jax.random.key_data(key), whole))
        return steps

    def keep(self) -> None:
        self.whole = self._state.params

    @property
    def params(self) -> ParamTree:
        return self._state.params

    def evaluate(self, params: ParamTree, split: str) -> Evaluation:
        """Loss and output of every sample of a set, in the order of the set, on the host of every process."""
        if split not in self._laid:
            self._lay(split, *in_order(len(self._problem.raw(split)[0]), self._mesh.shape["data"]))
        order, rows = self._laid[split]
        found = _evaluation(self._problem.scored, NamedSharding(self._mesh, P()))(params, rows.x, rows.y)
        _, first = np.unique(order.ravel(), return_index=True)  # the first copy of each row
        return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(order.size, *leaf.shape[2:])[first], found)

    def fetch(self, tree: Any) -> Any:
        """The arrays in host memory, leaf by leaf so that one at a time is whole on a device."""

        def one(leaf: Any) -> np.ndarray:
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
                leaf = _whole(NamedSharding(self._mesh, P()))(leaf)
            return np.asarray(leaf)

        return jax.tree.map(one, tree)

    def state(self) -> State:
        """The state after the last epoch, in host memory."""
        return self.fetch(self._state)

    def _drawn(self, key: Array) -> tuple[Array, Array]:
        (x, _), spec = self._problem.raw("train"), self._spec
        return drawn(key, len(x), spec.batch_size, spec.privacy, self._problem.weights)

    def _lay(self, split: str, order: Any, present: Any) -> tuple[np.ndarray, Rows]:
        self._laid.pop(split, None)  # first, so that a device never holds two orders of a set
        order = np.asarray(order)
        self._laid[split] = order, lay_out(self._mesh, self._reader(split), order, np.asarray(present))
        return self._laid[split]

    def _reader(self, split: str) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        x, y = self._problem.raw(split)
        return lambda rows: self._problem.scaled(np.asarray(x[rows]), np.asarray(y[rows]))


def shape(config: MeshConfig) -> tuple[int, int]:
    """D and M; without `data` D is 1 in one process, and takes all devices in several."""
    every = jax.device_count() // config.model if jax.process_count() > 1 else 1
    return config.data or max(every, 1), config.model


def wanted(config: MeshConfig) -> bool:
    """Whether a run is on a mesh: on more than one device or in more than one process."""
    return shape(config) != (1, 1) or jax.process_count() > 1


def build(config: MeshConfig) -> Mesh:
    """The first D · M devices, those of a process beside each other in `model`, where they exchange most."""
    data, model = shape(config)
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


def shardings(mesh: Mesh, net: Net, tree: Any) -> Any:
    """A `NamedSharding` for each leaf of a state: one that is kept for each parameter, such as a momentum, is split
    like it; all others are whole on every device.
    """
    params = jax.eval_shape(lambda: init(net, jax.random.key(0)))
    specs = dict(jax.tree_util.tree_leaves_with_path(param_specs(net, params)))
    known = {path: (leaf.shape, specs[path]) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        ends = (path[start:] for start in range(len(path)))  # such as a momentum's: its own, then the parameter's
        shape, spec = next((known[end] for end in ends if end in known), (None, P()))
        return NamedSharding(mesh, spec if shape == leaf.shape else P())

    return jax.tree_util.tree_map_with_path(of, tree)


def spread(mesh: Mesh, net: Net, make: Callable[..., Any], *arguments: Any) -> Any:
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


@functools.cache
def _whole(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)


def lay_out(
    mesh: Mesh, read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], order: np.ndarray, present: np.ndarray
) -> Rows:
    """Samples onto the mesh: order (S, B) are their row numbers, present (S, B) is False for those that fill up.

    `read` gives inputs and targets of row numbers (n,). A process reads only the rows that its own devices hold.
    """
    part_of = functools.cache(lambda first, last: read(order[:, first:last].ravel()))  # the M devices of a row share
    example = read(order[:1, 0])

    def array(part: int) -> Array:
        shape = (*order.shape, *example[part].shape[1:])

        def fill(index: Any) -> np.ndarray:
            first, last, _ = index[1].indices(shape[1])
            return part_of(first, last)[part].reshape(len(order), last - first, *shape[2:])

        return jax.make_array_from_callback(shape, NamedSharding(mesh, P(None, "data")), fill)

    weights = put(present.astype(example[0].dtype), NamedSharding(mesh, P(None, "data")))
    return Rows(array(0), array(1), weights)


def compile_epoch(mesh: Mesh, spec: StepSpec, state: State, rows: Rows) -> jax.stages.Compiled:
    """(state, rows, steps done, words of the key) ↦ (state, steps), `epoch.epoch` on the mesh; from shapes too."""
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def epoch(state: State, rows: Rows, done: Array, words: Array) -> tuple[State, Steps]:
        key = jax.random.wrap_key_data(words)
        return scan(spec, state, rows[:2], rows.weights, lambda batch: batch, done, key)

    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    states = shardings(mesh, spec.net, state)
    places = (states, split, whole, whole)
    jitted = jax.jit(epoch, in_shardings=places, out_shardings=(states, whole), donate_argnums=0)
    done, words = jax.eval_shape(lambda: (jnp.arange(0).sum(), jax.random.key_data(jax.random.key(0))))
    return jitted.lower(state, rows, done, words).compile()


def in_order(samples: int, data: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0, 1, 2 … in batches for an evaluation, as `epoch.drawn` has them; the last is filled up."""
    size = data * -(-min(EVALUATED_AT_ONCE, samples) // data)
    steps = -(-samples // size)
    order = np.arange(steps * size).reshape(steps, size)
    return order % samples, order < samples


@functools.cache
def _evaluation(net: Net, out: NamedSharding) -> Callable[[ParamTree, Array, Array], Evaluation]:
    def evaluate(params: ParamTree, x: Array, y: Array) -> Evaluation:
        return jax.lax.map(jax.vmap(functools.partial(evaluated, net, params)), (x, y))

    return jax.jit(evaluate, out_shardings=out)


def _check_devices(config: MeshConfig) -> None:
    (data, model), devices, processes = shape(config), jax.device_count(), jax.process_count()
    if data * model > devices:
        there = f"there are {devices} devices" if devices > 1 else "there is 1 device"
        raise UserError(f"mesh.data × mesh.model is {data} × {model}, {there}")
    if processes > 1 and data * model < devices:
        have = f"the {processes} processes have {devices} devices, and each process has to have a part"
        raise UserError(f"mesh.data × mesh.model is {data} × {model}, {have}")


def _check_sizes(config: Config, net: Net, samples: int) -> None:
    data, model = shape(config.mesh)
    if text.is_text(config.data.name):
        raise UserError("mesh: a text is trained on one device, for its blocks move from epoch to epoch")
    if config.train.micro_batches > 1 and data > 1:
        raise UserError("train.micro_batches: a part would lie on one device of mesh.data: leave out one of the two")
    batch = min(config.train.batch_size, samples)
    if batch % data and not config.privacy.enabled:  # whose batches are filled up
        raise UserError(f"train.batch_size: mesh.data {data} does not divide the {batch} samples of a batch")
    if not isinstance(net, MLP):
        if model > 1:
            _check_split(net, model)
        return
    if model > 1 and len(net.sizes) < 3:
        raise UserError(f"mesh.model: {model}, but model.sizes {list(net.sizes)} has no hidden layer to split")
    for size in net.sizes[1:-1] if model > 1 else ():
        if size % model:
            raise UserError(f"model.sizes: mesh.model {model} does not divide the hidden width {size}")


def _check_split(net: Network, model: int) -> None:
    leaves, specs = jax.tree.leaves(net.parameters), jax.tree.leaves(param_specs(net, net.parameters))
    split = [(leaf.shape, spec.index("model")) for leaf, spec in zip(leaves, specs, strict=True) if any(spec)]
    if not split:
        raise UserError(f"mesh.model: {model}, but the network has no attention and no two dense layers to split")
    for sizes, axis in split:
        if sizes[axis] % model:
            raise UserError(f"mesh.model: {model} does not divide the {sizes[axis]} units of a layer that it splits")
