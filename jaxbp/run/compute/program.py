"""How a run computes: on one device, here, or on several, see mesh.py. A `Program` owns the state of the training.

`loop` asks once whether there is a mesh, by the class that it takes; from then on both look alike.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.mlp import Array, Params
from jaxbp.run.compute import epoch as epochs
from jaxbp.run.compute.epoch import Evaluation
from jaxbp.run.compute.step import State, Steps, StepSpec
from jaxbp.run.config import Config
from jaxbp.run.problem import Problem


class Measured(NamedTuple):
    """What an epoch gave: its steps and, if all of them were finite, the evaluation of both sets after it."""

    steps: Steps
    evaluations: dict[str, Evaluation]


class Program(Protocol):
    """What `loop` needs of a way to compute."""

    in_place: ClassVar[bool]
    """Whether samples may stay on disk until a device takes them."""
    whole: Params
    """The parameters after the last whole epoch, on the devices."""

    def __init__(self, problem: Problem, spec: StepSpec) -> None: ...

    @staticmethod
    def check(config: Config, problem: Problem) -> None:
        """UserError for a config that the devices do not fit."""

    @staticmethod
    def devices(config: Config) -> str:
        """The devices, for a person."""

    def begin(self, saved: State | None = None) -> None:
        """Makes the initial state, or places one that was saved, and compiles."""

    def epoch(self, key: Array, done: int) -> Measured:
        """Trains for an epoch in the order drawn from the key, `done` steps after the first, and evaluates."""

    def evaluate(self, split: str) -> Evaluation:
        """The parameters after the last whole epoch on "train" or "test"."""

    def fetch(self, tree: Any) -> Any:
        """Arrays on the devices as NumPy arrays; all processes call it, and each gets the whole."""

    def state(self) -> State:
        """The state after the last epoch, fetched."""


class OneDevice:
    """The whole run on one device: its data live there, an epoch is one compiled program."""

    in_place: ClassVar[bool] = False
    whole: Params

    def __init__(self, problem: Problem, spec: StepSpec) -> None:
        self._problem, self._spec = problem, spec
        self._sets = {name: problem.on_device(name) for name in ("train", "test")}

    @staticmethod
    def check(config: Config, problem: Problem) -> None:
        """One device fits every config."""

    @staticmethod
    def devices(config: Config) -> str:
        """Its kind, such as "cpu"."""
        return jax.devices()[0].device_kind

    def begin(self, saved: State | None = None) -> None:
        """Makes the initial state, or takes a saved one, and compiles the epoch for it."""
        state = first_state(self._problem, self._spec) if saved is None else saved
        # A copy without weak types: the epoch takes its buffers away, and the program is the same after a resume.
        self._state = jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), state)
        self.whole = self._state.params
        jitted = jax.jit(epochs.epoch, static_argnums=0, donate_argnums=1)
        self._compiled = jitted.lower(self._spec, self._state, *self._sets["train"], jax.random.key(0), 0).compile()

    def epoch(self, key: Array, done: int) -> Measured:
        """Trains for an epoch and evaluates; `whole` changes only when all of it was finite."""
        self.whole = jax.tree.map(jnp.copy, self._state.params)  # the epoch takes the state away
        self._state, steps = self._compiled(self._state, *self._sets["train"], key, done)
        if not bool(self._state.alive):
            return Measured(steps, {})
        return accepted(self, self._state.params, steps)

    def evaluate(self, split: str) -> Evaluation:
        """Loss and output of every sample of a set."""
        return epochs.evaluate(self._problem.scored, self.whole, *self._sets[split])

    def fetch(self, tree: Any) -> Any:
        """The arrays in host memory."""
        return jax.device_get(tree)

    def state(self) -> State:
        """The state after the last epoch, in host memory."""
        return self.fetch(self._state)


def first_state(problem: Problem, spec: StepSpec) -> State:
    """The state that a run begins with."""
    params = problem.initial()
    return State(params, spec.optimizer.init(params), jnp.array(True))


def accepted(program: Program, params: Params, steps: Steps) -> Measured:
    """Evaluates parameters and keeps them as `whole`, unless the training loss is not finite any more."""
    before, program.whole = program.whole, params
    evaluations = {split: program.evaluate(split) for split in ("train", "test")}
    if not np.isfinite(np.asarray(evaluations["train"].loss)).all():
        program.whole = before
    return Measured(steps, evaluations)
