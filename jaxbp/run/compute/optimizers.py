"""The [optimizer] table: the lecture's step, or an Optax optimiser by its name."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbp.mlp import Params, update
from jaxbp.names import nearest
from jaxbp.run.config import Argument, OptimizerConfig, choose
from jaxbp.run.errors import UserError

State = Any
Schedule = Callable[..., Any]
LearningRate = float | jax.Array | Schedule
REFUSALS = (TypeError, ValueError, AttributeError, ArithmeticError)  # what Optax and JAX raise for a bad argument


class Optimizer(NamedTuple):
    """Two pure functions and the learning rate they use.

    init: params ↦ state;  step: (params, grads, state) ↦ (params, state);  learning_rate: count of steps ↦ η.
    """

    init: Callable[[Params], State]
    step: Callable[[Params, Params, State], tuple[Params, State]]
    learning_rate: Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


def _public(names: list[str], condition: Callable[[str, Any], bool]) -> dict[str, Callable[..., Any]]:
    found = {name: getattr(optax, name) for name in names if name[0].islower()}
    return {name: f for name, f in found.items() if callable(f) and condition(name, f)}


# An optimiser is what has a learning rate. Left out: lbfgs, whose line search evaluates the loss again, noisy_sgd,
# whose key is not a number, and optimistic_adam, which is deprecated.
OPTIMIZERS = _public(
    sorted(set(dir(optax)) - {"lbfgs", "noisy_sgd", "optimistic_adam"}),
    lambda name, f: "learning_rate" in inspect.signature(f).parameters and not name.startswith("scale_by"),
)
# sgdr_schedule is left out because it takes a list of tables; join_schedules takes functions.
SCHEDULES = _public(
    sorted(set(dir(optax)) - {"sgdr_schedule", "scale_by_schedule"}),
    lambda name, f: name.endswith("_schedule") or name == "exponential_decay",
)


def build(config: OptimizerConfig, params: Params) -> Optimizer:
    """The optimiser of a config, tried once on the shapes of params so that a bad argument shows before training.

    Raises:
      UserError: an unknown optimiser, schedule or argument; an argument of a wrong type; no learning rate, or two.
    """
    optimizer = with_learning_rate(config, _learning_rate(config))
    try:
        jax.eval_shape(lambda params: optimizer.step(params, params, optimizer.init(params)), params)
    except REFUSALS as error:
        raise UserError(f"optimizer.arguments: {config.name} refuses {config.arguments}: {_line(error)}") from None
    return optimizer


def with_learning_rate(config: OptimizerConfig, learning_rate: LearningRate) -> Optimizer:
    """The optimiser of a config with this learning rate: a number, which may be traced, or a schedule."""
    before = _before(config)
    if _is_lecture(config):
        return _lecture(before, _schedule(learning_rate))
    make = choose("optimizer.name", "optimizer", config.name, OPTIMIZERS)
    if config.weight_decay and "weight_decay" in inspect.signature(make).parameters:
        raise UserError(f"optimizer.weight_decay: {config.name} has its own, set optimizer.arguments.weight_decay")
    if "learning_rate" in config.arguments:
        raise UserError("optimizer.arguments.learning_rate: set optimizer.learning_rate or optimizer.schedule instead")
    arguments = {"learning_rate": learning_rate, **config.arguments}
    return _optax(optax.chain(before, _call("optimizer.arguments", config.name, make, arguments)), learning_rate)


def _schedule(learning_rate: LearningRate) -> Schedule:
    return learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)


def _is_lecture(config: OptimizerConfig) -> bool:
    return config.name == "sgd" and not config.arguments


def _lecture(before: optax.GradientTransformation, learning_rate: Callable[..., Any]) -> Optimizer:
    """w ← w − η ∂ℓ/∂w by `jaxbp.update`; the state is the count of steps and the state of decay and clipping."""

    def step(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        count, inner = state
        grads, inner = before.update(grads, inner, params)
        return update(params, grads, learning_rate(count)), (count + 1, inner)

    return Optimizer(lambda params: (jnp.zeros((), jnp.int32), before.init(params)), step, learning_rate)


def _optax(optimizer: optax.GradientTransformation, learning_rate: LearningRate) -> Optimizer:
    def step(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Optimizer(optimizer.init, step, _schedule(learning_rate))


def _before(config: OptimizerConfig) -> optax.GradientTransformation:
    """What happens to the gradient before the optimiser sees it: clipping, then λw added to ∂ℓ/∂w."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = (
        optax.add_decayed_weights(config.weight_decay, mask=_weights_only) if config.weight_decay else optax.identity()
    )
    return optax.chain(clip, decay)


def _weights_only(params: Params) -> Any:
    return jax.tree.map(lambda p: p.ndim == 2, params)


def _learning_rate(config: OptimizerConfig) -> LearningRate:
    if (config.schedule is None) == (config.learning_rate is None):
        both = "neither is" if config.schedule is None else "both are"
        raise UserError(f"optimizer.learning_rate: set it or optimizer.schedule; {both} set")
    if config.learning_rate is not None:
        return config.learning_rate
    name = str(config.schedule)
    make = choose("optimizer.schedule", "schedule", name, SCHEDULES)
    arguments = {key: _table(key, value) for key, value in config.schedule_arguments.items()}
    schedule: Callable[..., Any] = _call("optimizer.schedule_arguments", name, make, arguments)
    try:
        jax.eval_shape(schedule, jnp.zeros((), jnp.int32))
    except REFUSALS as error:
        raise UserError(f"optimizer.schedule_arguments: {name} refuses {arguments}: {_line(error)}") from None
    return schedule


def _table(name: str, value: Argument) -> Any:
    """boundaries_and_scales = { 100 = 0.1 }: TOML has text for keys, Optax wants steps."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not key.isdecimal():
            raise UserError(f"optimizer.schedule_arguments.{name}: got the key {key!r}, a key must be a count of steps")
    return {int(key): scale for key, scale in value.items()}


def _call(key: str, name: str, make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(make).parameters
    for argument in arguments:
        if argument not in parameters:
            raise UserError(f"{key}: {name} has no argument {argument!r}, {nearest(argument, parameters)}?")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{key}: {name} needs {', '.join(missing)}")
    try:
        return make(**arguments)
    except REFUSALS as error:
        raise UserError(f"{key}: {name} refuses {arguments}: {_line(error)}") from None


def _line(error: Exception) -> str:
    """The first line of an exception's message."""
    return str(error).strip().partition("\n")[0]
