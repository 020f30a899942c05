"""The [optimizer] table: the lecture's step, an Optax optimiser by its name, or one of `jaxbp.second_order`."""

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbp import losses, second_order
from jaxbp.mlp import MLP, update
from jaxbp.names import nearest
from jaxbp.network import Net, ParamTree
from jaxbp.run.config import Argument, Config, OptimizerConfig, choose
from jaxbp.run.errors import UserError
from jaxbp.second_order import Batch

State = Any
Schedule = Callable[..., Any]
LearningRate = float | jax.Array | Schedule
REFUSALS = (TypeError, ValueError, AttributeError, ArithmeticError)  # what Optax and JAX raise for a bad argument


class Optimizer(NamedTuple):
    """Two pure functions and the learning rate they use.

    init: params ↦ state;  step: (params, grads, state, batch) ↦ (params, state), the batch only for one of the second
    order;  learning_rate: count of steps ↦ η.
    """

    init: Callable[[ParamTree], State]
    step: Callable[..., tuple[ParamTree, State]]
    learning_rate: Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


# By their Optax names. Left out: lbfgs, whose line search evaluates the loss again; noisy_sgd, whose key is not a
# number; optimistic_adam, which is deprecated; sgdr_schedule, which takes a list of tables.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    name: getattr(optax, name)
    for name in (
        *("sgd", "adam", "adamw", "adamax", "adamaxw", "nadam", "nadamw", "radam", "amsgrad", "adabelief", "adan"),
        *("adagrad", "adadelta", "adafactor", "rmsprop", "rprop", "yogi", "novograd", "lamb", "lars", "lion", "sm3"),
        *("sign_sgd", "signum", "fromage", "optimistic_gradient_descent", "optimistic_adam_v2"),
    )
}
SECOND_ORDER: dict[str, Callable[..., Any]] = {
    make.__name__: make for make in (second_order.natural_gradient, second_order.gauss_newton, second_order.kfac)
}
SCHEDULES: dict[str, Callable[..., Any]] = {
    name: getattr(optax, name)
    for name in (
        *("constant_schedule", "linear_schedule", "polynomial_schedule", "exponential_decay", "cosine_decay_schedule"),
        *("warmup_constant_schedule", "warmup_cosine_decay_schedule", "warmup_exponential_decay_schedule"),
        *("cosine_onecycle_schedule", "linear_onecycle_schedule"),
        *("piecewise_constant_schedule", "piecewise_interpolate_schedule"),
    )
}
ALL, EPOCHS = "all", re.compile(r"(\d+\.?\d*|\.\d+) epochs?")  # what may stand for a count of steps
POINTS = 10_000  # steps at which a schedule is looked at before the run


def in_steps(config: OptimizerConfig, steps: int, epochs: int) -> OptimizerConfig:
    """The config for a run of so many epochs of so many steps: "15 epochs" and "all" of a schedule become counts.

    Raises:
      UserError: the schedule becomes negative, or is 0 before the last epoch begins; one that can't be built.
    """
    if config.schedule is None:
        return config
    counted = {name: _counted(value, steps, epochs) for name, value in config.schedule_arguments.items()}
    config = dataclasses.replace(config, schedule_arguments=counted)
    _check_rates(_learning_rate(config), steps, epochs)
    return config


def counts_all(config: OptimizerConfig) -> bool:
    """Whether "all" steps of the run are in the schedule, whose rates are others then in a run of more epochs."""
    values = config.schedule_arguments.values() if config.schedule else ()
    return any(value == ALL or (isinstance(value, dict) and ALL in value) for value in values)


def peak(schedule: str) -> str:
    """The argument of a schedule that is its learning rate: peak_value, or else init_value or value."""
    parameters = inspect.signature(choose("optimizer.schedule", "schedule", schedule, SCHEDULES)).parameters
    return next(name for name in ("peak_value", "init_value", "value") if name in parameters)


def build(config: OptimizerConfig, params: ParamTree, net: Net | None = None) -> Optimizer:
    """The optimiser of a config, tried once on the shapes of params so that a bad argument shows before training.

    Args:
      net: for one of the second order.

    Raises:
      UserError: an unknown optimiser, schedule or argument; an argument of a wrong type; no learning rate, or two.
    """
    optimizer = _built(json.dumps(dataclasses.asdict(config)), net if config.name in SECOND_ORDER else None)
    batch = _two_samples(net, params) if config.name in SECOND_ORDER else None
    try:
        jax.eval_shape(lambda p, batch: optimizer.step(p, p, optimizer.init(p), batch), params, batch)
    except REFUSALS as error:
        raise UserError(f"optimizer.arguments: {config.name} refuses {config.arguments}: {_line(error)}") from None
    return optimizer


def check(config: Config, net: Net, devices: int) -> None:
    """UserError where an optimiser of the second order does not fit the rest of the config."""
    name, train, ours = config.optimizer.name, config.train, config.optimizer
    if name not in SECOND_ORDER:
        return
    refused = {
        f"model.kind: {name} takes curvature, which only an MLP has": not isinstance(net, MLP),
        f"train.memory: {name} needs all layers of a batch at once": train.memory != "store-all",
        f"train.micro_batches: {name} needs a batch as a whole": train.micro_batches > 1,
        f'train.precision: {name} computes in model.dtype, leave out "mixed"': train.precision == "mixed",
        f"mesh: {name} runs on one device": devices > 1,
        f"privacy: {name} looks at more of a sample than its clipped gradient": config.privacy.enabled,
        f"optimizer.weight_decay: {name} has none": bool(ours.weight_decay),
        f"optimizer.clip_norm: {name} has none": bool(ours.clip_norm),
    }
    if fault := next((line for line, found in refused.items() if found), None):
        raise UserError(fault)


def _two_samples(net: Any, params: Any) -> Any:
    dtype, labels = params[0].w.dtype, "label" in losses.get(net.loss).target
    y = jnp.zeros(2, jnp.int32) if labels else jnp.zeros((2, net.sizes[-1]), dtype)
    return jax.eval_shape(lambda: Batch(jnp.zeros((2, net.sizes[0]), dtype), y))


@functools.lru_cache(maxsize=64)
def _built(config: str, net: Net | None) -> Optimizer:
    """The same functions for equal configs, in JSON, which tells 1 from true: they share what JAX has compiled."""
    found = OptimizerConfig(**json.loads(config))
    return with_learning_rate(found, _learning_rate(found), net)


def with_learning_rate(config: OptimizerConfig, learning_rate: LearningRate, net: Net | None = None) -> Optimizer:
    """The optimiser of a config with this learning rate: a number, which may be traced, or a schedule."""
    if make := SECOND_ORDER.get(config.name):
        arguments = {"learning_rate": learning_rate, **config.arguments}
        made = _call("optimizer.arguments", config.name, functools.partial(make, net), arguments)
        return _optax(made, learning_rate, of_batch=True)
    before = _before(config)
    if config.name == "sgd" and not config.arguments:
        return _lecture(before, _schedule(learning_rate))
    make = choose("optimizer.name", "optimizer", config.name, OPTIMIZERS | SECOND_ORDER)
    if config.weight_decay and "weight_decay" in inspect.signature(make).parameters:
        raise UserError(f"optimizer.weight_decay: {config.name} has its own, set optimizer.arguments.weight_decay")
    if "learning_rate" in config.arguments:
        raise UserError("optimizer.arguments.learning_rate: set optimizer.learning_rate or optimizer.schedule instead")
    arguments = {"learning_rate": learning_rate, **config.arguments}
    return _optax(optax.chain(before, _call("optimizer.arguments", config.name, make, arguments)), learning_rate)


def _schedule(learning_rate: LearningRate) -> Schedule:
    return learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)


def _lecture(before: optax.GradientTransformation, learning_rate: Callable[..., Any]) -> Optimizer:
    """w ← w − η ∂ℓ/∂w by `jaxbp.update`; the state is the count of steps and the state of decay and clipping."""

    def step(params: ParamTree, grads: ParamTree, state: State, batch: Batch | None = None) -> tuple[ParamTree, State]:
        count, inner = state
        grads, inner = before.update(grads, inner, params)
        return update(params, grads, learning_rate(count)), (count + 1, inner)

    return Optimizer(lambda params: (jnp.zeros((), jnp.int32), before.init(params)), step, learning_rate)


def _optax(optimizer: Any, learning_rate: LearningRate, of_batch: bool = False) -> Optimizer:
    def step(params: ParamTree, grads: ParamTree, state: State, batch: Batch | None = None) -> tuple[ParamTree, State]:
        updates, state = optimizer.update(grads, state, params, **({"batch": batch} if of_batch else {}))
        return optax.apply_updates(params, updates), state

    return Optimizer(optimizer.init, step, _schedule(learning_rate))


def _before(config: OptimizerConfig) -> optax.GradientTransformation:
    """What happens to the gradient before the optimiser sees it: clipping, then λw added to ∂ℓ/∂w."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=functools.partial(jax.tree.map, lambda p: p.ndim >= 2))
    return optax.chain(clip, decay if config.weight_decay else optax.identity())


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


def _counted(value: Argument, steps: int, epochs: int) -> Argument:
    """Epochs as steps; in a table, where steps are the keys, too."""
    if isinstance(value, dict):
        return {str(_counted(key, steps, epochs)): scale for key, scale in value.items()}
    if value == ALL:
        return epochs * steps
    found = EPOCHS.fullmatch(value) if isinstance(value, str) else None
    return round(float(found[1]) * steps) if found else value


def _check_rates(schedule: LearningRate, steps: int, epochs: int) -> None:
    total = min(steps * epochs, 2**31 - 1)  # Optax counts no further
    whole, last = (np.linspace(low, total - 1, min(total - low, POINTS)) for low in (0, total - steps))
    at = np.unique(np.concatenate([whole, last]).astype(np.int32))
    rates = np.asarray(jax.jit(jax.vmap(_schedule(schedule)))(at))
    lowest = int(rates.argmin())
    if rates[lowest] < -1e-6 * abs(rates).max():  # less is rounding
        where = f"in epoch {at[lowest] // steps + 1}, step {at[lowest] % steps + 1} of {steps}"
        found = f"the learning rate is {rates[lowest]:.3g}"
        raise UserError(f"optimizer.schedule: {found} {where}; it must not be negative")
    end = at[rates > 0].max(initial=-1)
    if end < total - steps:
        reached = f"after epoch {end // steps + 1} of {epochs}"
        raise UserError(f'optimizer.schedule: the learning rate is 0 {reached}; "{ALL}" counts the steps of the run')


def _table(name: str, value: Argument) -> Any:
    """boundaries_and_scales = { 100 = 0.1 }: TOML has text for keys, Optax wants steps."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not key.isdecimal():
            allowed = "a count of steps or '2 epochs' is allowed"
            raise UserError(f"optimizer.schedule_arguments.{name}: got the key {key!r}, {allowed}")
    return {int(key): scale for key, scale in value.items()}


def _call(key: str, name: str, make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(make).parameters
    allowed = f". Allowed: {', '.join(name for name in parameters if name != 'learning_rate')}"
    for argument in arguments:
        if argument not in parameters:
            raise UserError(f"{key}: {name} has no argument {argument!r}{nearest(argument, parameters) or allowed}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{key}: {name} needs {', '.join(missing)}")
    try:
        return make(**arguments)
    except REFUSALS as error:
        raise UserError(f"{key}: {name} refuses {arguments}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
