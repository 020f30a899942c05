"""A run on one device. `mesh.OnMesh` has the same methods: from `loop.prepare` on, both look alike.

A program owns the state of the training: it makes or places it, an epoch takes it away and gives the next one, and it
is fetched to the host only to be saved.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxbp.mlp import Array, wide
from jaxbp.network import ParamTree, dtype_of
from jaxbp.run.compute.epoch import Evaluation, epoch, evaluate
from jaxbp.run.compute.step import State, Steps, StepSpec
from jaxbp.run.config import Config
from jaxbp.run.problem import Problem, Split


class OneDevice:
    """The data live on the device, an epoch is one compiled program.

    whole: the parameters after the last whole epoch, see `keep`.
    """

    in_place: ClassVar[bool] = False  # whether samples may stay on disk until a device takes them
    whole: ParamTree

    def __init__(self, problem: Problem, spec: StepSpec) -> None:
        self._problem, self._spec = problem, spec

    @functools.cached_property
    def sets(self) -> dict[str, Split]:
        """The sets on the device, from the first use on."""
        return {name: self._problem.on_device(name) for name in self._problem.dataset.splits}

    @staticmethod
    def check(config: Config, problem: Problem) -> None:
        """UserError for a config that the devices do not fit: one device fits all."""

    @staticmethod
    def devices(config: Config) -> str:
        """The devices, for a person: "cpu"."""
        return jax.devices()[0].device_kind

    def begin(self, saved: State | None = None) -> None:
        """Makes the initial state, or takes one that was saved, while another thread compiles the epoch for it."""
        make = functools.partial(first_state, self._problem, self._spec)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), jax.eval_shape(make))
        jitted = jax.jit(epoch, static_argnums=0, donate_argnums=1)
        lowered = jitted.lower(self._spec, shapes, *self.sets["train"], jax.random.key(0), 0, self._problem.weights)
        with ThreadPoolExecutor(1) as other:  # XLA holds no Python lock
            compiled = other.submit(lowered.compile)
            state = make() if saved is None else saved
            self._state = jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), state)  # a copy, not weakly typed
            self.keep()
            self._compiled = compiled.result()

    def epoch(self, key: Array, done: int) -> Steps:
        """Trains for an epoch in the order drawn from the key, `done` steps after the first one."""
        self.whole = jax.tree.map(jnp.copy, self.whole)  # the epoch takes the state away
        self._state, steps = self._compiled(self._state, *self.sets["train"], key, done, self._problem.weights)
        return steps

    def keep(self) -> None:
        """Says that the epoch was a whole one: `whole` are its parameters."""
        self.whole = self._state.params

    @property
    def params(self) -> ParamTree:
        """The parameters after the last epoch."""
        return self._state.params

    def evaluate(self, params: ParamTree, split: str) -> Evaluation:
        """Loss and output of every sample of a set, such as "test"."""
        return evaluate(self._problem.scored, params, *self.sets[split])

    def fetch(self, tree: Any) -> Any:
        """Arrays on the devices as NumPy arrays; all processes call it, and each gets the whole."""
        return jax.device_get(tree)

    def state(self) -> State:
        """The state after the last epoch, fetched."""
        return self.fetch(self._state)


def first_state(problem: Problem, spec: StepSpec) -> State:
    """The state that a run begins with."""
    return begun(spec, problem.initial())


def begun(spec: StepSpec, params: ParamTree) -> State:
    """The state that a run begins with from these parameters."""
    norm = None
    if spec.privacy and spec.privacy.adaptive:
        norm = jnp.asarray(spec.privacy.max_norm, wide(dtype_of(params)))
    return State(params, spec.optimizer.init(params), jnp.array(True), norm)
