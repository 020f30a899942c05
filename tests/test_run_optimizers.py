"""The [optimizer] table: every optimiser and schedule steps; decay, clipping and rates against formulas; its errors."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import assert_close, assert_same_bits
from tiers import one_in

from jaxbp import MLP, Affine, init, update
from jaxbp.run.compute.optimizers import OPTIMIZERS, SCHEDULES, Optimizer, build, in_steps
from jaxbp.run.config import OptimizerConfig, read
from jaxbp.run.errors import UserError

PARAMS = init(MLP((4, 3, 2)), jax.random.key(0), bias="normal", dtype=jnp.float64)
GRADS = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), PARAMS)


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Optax promotes dtypes and ranks freely; the lecture's step has its strict test."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def stepped(optimizer: Optimizer, params: Any = PARAMS, grads: Any = GRADS, steps: int = 1) -> Any:
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = jax.jit(optimizer.step)(params, grads, state)
    return params


def message(**values: Any) -> str:
    """The message of the UserError for these values: one line."""
    with pytest.raises(UserError) as caught:
        build(OptimizerConfig(**values), PARAMS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf))) for leaf in jax.tree.leaves(tree))))


# --- every name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", one_in(6, list(OPTIMIZERS)))
def test_every_optimizer_takes_a_finite_step(name: str) -> None:
    params, grads = (jax.tree.map(lambda p: p.astype(jnp.float32), tree) for tree in (PARAMS, GRADS))
    after = stepped(build(OptimizerConfig(name, learning_rate=0.01), params), params, grads, steps=2)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, params)
    assert all(np.isfinite(p).all() and p.dtype == jnp.float32 for p in jax.tree.leaves(after))
    assert any(np.any(p != q) for p, q in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True))


def test_the_common_names_are_there() -> None:
    assert {"sgd", "adam", "adamw", "rmsprop", "lion", "adagrad", "lamb"} <= set(OPTIMIZERS)
    assert {"cosine_decay_schedule", "linear_schedule", "exponential_decay", "piecewise_constant_schedule"} <= set(
        SCHEDULES
    )
    assert not {"lbfgs", "noisy_sgd", "scale_by_learning_rate"} & set(OPTIMIZERS)


def test_the_tables_are_all_that_optax_has() -> None:
    """It fails when Optax has something new: take it into the table, or leave it out and say why."""
    public = {name for name in dir(optax) if name[0].islower() and callable(getattr(optax, name))}
    rates = {name for name in public if "learning_rate" in inspect.signature(getattr(optax, name)).parameters}
    rates -= {name for name in rates if name.startswith("scale_by_")}
    assert rates - {"lbfgs", "noisy_sgd", "optimistic_adam"} == set(OPTIMIZERS)
    schedules = {name for name in public if name.endswith("_schedule")} | {"exponential_decay"}
    assert schedules - {"sgdr_schedule", "scale_by_schedule"} == set(SCHEDULES)


def test_equal_configs_share_their_functions() -> None:
    """An optimiser is a static argument of the compiled epoch: another one would be compiled again."""
    one, two = (OptimizerConfig("sgd", 0.1, {"momentum": 0.9, "nesterov": True}) for _ in range(2))
    assert build(one, PARAMS) == build(two, PARAMS)
    assert build(one, PARAMS) != build(OptimizerConfig("sgd", 0.1, {"momentum": 0.9, "nesterov": 1}), PARAMS)
    assert build(one, PARAMS) != build(OptimizerConfig("sgd", 0.2, {"momentum": 0.9, "nesterov": True}), PARAMS)


def sample_arguments(name: str) -> dict[str, Any]:
    """A value for every argument without a default."""
    values = {"interpolate_type": "linear"} | dict.fromkeys(("init_value", "peak_value", "value", "decay_rate"), 0.5)
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    return {
        n: values.get(n, 0.1 if n.endswith(("value", "rate")) else 2 if n in ("power", "warmup_steps") else 10)
        for n in needed
    }


@pytest.mark.parametrize("name", one_in(4, list(SCHEDULES)))
def test_every_schedule_gives_a_rate_and_takes_a_step(name: str) -> None:
    optimizer = build(OptimizerConfig(schedule=name, schedule_arguments=sample_arguments(name)), PARAMS)
    rates = np.array([float(np.asarray(optimizer.learning_rate(step))) for step in range(12)])
    after = stepped(optimizer, steps=2)
    assert np.isfinite(rates).all() and (rates >= 0).all() and rates.max() > 0
    assert_close(after, update(PARAMS, GRADS, rates[:2].sum()), 1e-6)  # a schedule is computed in float32


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_sgd_is_the_lectures_step_and_optax_sgd(dtype: Any) -> None:
    params, grads = (jax.tree.map(lambda p: p.astype(dtype), tree) for tree in (PARAMS, GRADS))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        after = stepped(build(OptimizerConfig("sgd", learning_rate=0.1), params), params, grads)
    assert_same_bits(after, jax.jit(update)(params, grads, 0.1))
    tool = optax.sgd(0.1)
    updates, _ = jax.jit(tool.update)(grads, tool.init(params), params)
    assert_close(after, optax.apply_updates(params, updates), float(2 * jnp.finfo(dtype).eps))


def test_arguments_reach_optax() -> None:
    after = stepped(build(OptimizerConfig("sgd", 0.1, {"momentum": 0.5, "nesterov": False}), PARAMS), steps=2)
    assert_close(after, update(PARAMS, GRADS, 0.1 * (1 + 1.5)), 1e-12)  # v₁ = g, v₂ = ½ g + g


def test_weight_decay_adds_to_the_weights_only() -> None:
    decayed = tuple(Affine(g.w + 0.3 * p.w, g.b) for g, p in zip(GRADS, PARAMS, strict=True))
    lecture = stepped(build(OptimizerConfig("sgd", 0.1, weight_decay=0.3), PARAMS))
    assert_close(lecture, update(PARAMS, decayed, 0.1), 1e-14)
    momentum = stepped(build(OptimizerConfig("sgd", 0.1, {"momentum": 0.9}, weight_decay=0.3), PARAMS))
    assert_close(momentum, update(PARAMS, decayed, 0.1), 1e-14)
    adam = stepped(build(OptimizerConfig("adam", 0.1, weight_decay=0.3), PARAMS))  # the first step: m̂ = g, v̂ = g²
    # 1 − β₂ = 0.001 loses three digits, and Optax takes βᵗ in float32
    assert_close(adam, jax.tree.map(lambda p, g: p - 0.1 * g / (abs(g) + 1e-8), PARAMS, decayed), 1e-4)
    plain = stepped(build(OptimizerConfig("adam", 0.1), PARAMS))
    assert_same_bits([layer.b for layer in adam], [layer.b for layer in plain])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_clipping_bounds_the_norm_over_all_parameters(name: str) -> None:
    seen = []

    def clipped(clip: float) -> Any:
        after = stepped(build(OptimizerConfig("sgd", 1.0, clip_norm=clip), PARAMS))
        return jax.tree.map(lambda p, q: p - q, PARAMS, after)

    size = norm(GRADS)
    for clip in (size / 100, size / 2, size * 0.999):
        seen.append(clipped(clip))
        assert norm(seen[-1]) == pytest.approx(clip, rel=1e-6) and norm(seen[-1]) <= clip * (1 + 1e-6)
        assert_close(seen[-1], jax.tree.map(lambda g, clip=clip: g * (clip / size), GRADS), 1e-6)
    free = {clip: stepped(build(OptimizerConfig(name, 0.1, clip_norm=clip), PARAMS)) for clip in (None, size * 1.001)}
    assert_same_bits(free[None], free[size * 1.001])


def test_clipping_comes_before_decay() -> None:
    clip = norm(GRADS) / 10
    expected = tuple(Affine(g.w / 10 + 0.3 * p.w, g.b / 10) for g, p in zip(GRADS, PARAMS, strict=True))
    after = stepped(build(OptimizerConfig("sgd", 0.1, weight_decay=0.3, clip_norm=clip), PARAMS))
    assert_close(after, update(PARAMS, expected, 0.1), 1e-6)


def test_rates_of_schedules_at_steps() -> None:
    def rate(step: int, name: str, **arguments: Any) -> float:
        optimizer = build(OptimizerConfig(schedule=name, schedule_arguments=arguments), PARAMS)
        return float(np.asarray(optimizer.learning_rate(step)))

    cosine = {"init_value": 0.4, "decay_steps": 100}
    for step in (0, 25, 50, 100, 1000):
        expected = 0.2 * (1 + np.cos(np.pi * min(step, 100) / 100))
        assert rate(step, "cosine_decay_schedule", **cosine) == pytest.approx(expected, abs=1e-7)
    pieces = {"init_value": 1.0, "boundaries_and_scales": {"10": 0.5, "20": 0.1}}
    got = [rate(step, "piecewise_constant_schedule", **pieces) for step in (0, 9, 11, 19, 21, 99)]
    assert got == pytest.approx([1, 1, 0.5, 0.5, 0.05, 0.05])
    decay = {"init_value": 1.0, "transition_steps": 10, "decay_rate": 0.5}
    assert rate(20, "exponential_decay", **decay) == pytest.approx(0.25)
    assert float(np.asarray(build(OptimizerConfig(learning_rate=0.3), PARAMS).learning_rate(7))) == 0.3


COSINE, PIECES, LINEAR = "cosine_decay_schedule", "piecewise_constant_schedule", "linear_schedule"


def counted(name: str, arguments: dict[str, Any], epochs: int = 4) -> dict[str, Any]:
    """The arguments of a schedule in a run with epochs of 10 steps."""
    config = OptimizerConfig(schedule=name, schedule_arguments=arguments)
    return in_steps(config, steps=10, epochs=epochs).schedule_arguments


def test_schedules_in_epochs() -> None:
    for text, steps in (("all", 40), ("4 epochs", 40), ("5.5 epochs", 55), (".25 epochs", 2), ("1 epoch", 10), (7, 7)):
        config = {"init_value": 0.1, "end_value": 0.01, "transition_steps": text}
        assert counted(LINEAR, config) == config | {"transition_steps": steps}
    assert counted(COSINE, {"init_value": 0.1, "decay_steps": "all"}, 31)["decay_steps"] == 310
    for name, steps, same in (("mnist", 469, 7035), ("fashion_mnist", 469, 7035), ("diabetes", 12, 1920)):
        config = read(Path(__file__).parents[1] / "configs" / f"{name}.toml")
        assert in_steps(config.optimizer, steps, config.train.epochs).schedule_arguments["decay_steps"] == same
    pieces = counted(PIECES, {"init_value": 0.1, "boundaries_and_scales": {"2 epochs": 0.5, "35": 0.5}})
    assert pieces["boundaries_and_scales"] == {"20": 0.5, "35": 0.5}
    warm = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": "1 epoch", "decay_steps": "all"}
    assert counted("warmup_cosine_decay_schedule", warm) == warm | {"warmup_steps": 10, "decay_steps": 40}
    constant = OptimizerConfig(learning_rate=0.1)
    assert in_steps(constant, 10, 4) is constant


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            COSINE,
            {"init_value": 0.1, "decay_steps": "1.5 epochs"},
            "is 0 after epoch 2 of 4; .all. counts the steps of the run",
        ),
        (COSINE, {"init_value": 0.1, "decay_steps": 30}, "is 0 after epoch 3 of 4; "),
        (LINEAR, {"init_value": 0.0, "end_value": 0.0, "transition_steps": "all"}, "is 0 after epoch 0 of 4; "),
        (
            LINEAR,
            {"init_value": 0.3, "end_value": -0.1, "transition_steps": "all"},
            "is -0.09 in epoch 4, step 10 of 10",
        ),
    ],
)
def test_a_schedule_that_ends_early_or_goes_uphill(name: str, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        counted(name, arguments)
    assert str(caught.value).startswith("optimizer.schedule: the learning rate is ")


def test_a_long_run_is_not_looked_at_step_by_step() -> None:
    config = OptimizerConfig(schedule=COSINE, schedule_arguments={"init_value": 0.1, "decay_steps": 2**31 - 1})
    assert in_steps(config, steps=1000, epochs=2**31 - 1) == config


@pytest.mark.parametrize("name", ["sgd", "sign_sgd"])
def test_the_rate_of_a_step_is_that_of_the_steps_before_it(name: str) -> None:
    """The first step has rate(0), for the lecture's step and for Optax's."""
    pieces = {"init_value": 1.0, "boundaries_and_scales": {"1": 0.5, "2": 0.5}}
    optimizer = build(OptimizerConfig(name, schedule="piecewise_constant_schedule", schedule_arguments=pieces), PARAMS)
    rates = [float(np.asarray(optimizer.learning_rate(step))) for step in range(4)]
    assert len(set(rates)) > 1
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    assert_close(stepped(optimizer, grads=ones, steps=4), update(PARAMS, ones, sum(rates)), 1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "optimizer.learning_rate: set it or optimizer.schedule; neither is set"),
        (
            {"learning_rate": 0.1, "schedule": "constant_schedule", "schedule_arguments": {"value": 1}},
            "optimizer.learning_rate: set it or optimizer.schedule; both are set",
        ),
        ({"name": "adamm", "learning_rate": 0.1}, "optimizer.name: unknown optimizer 'adamm', did you mean 'adam'?"),
        ({"name": "lbfgs", "learning_rate": 0.1}, "optimizer.name: unknown optimizer 'lbfgs'"),
        ({"name": "__class__", "learning_rate": 0.1}, "optimizer.name: unknown optimizer '__class__'"),
        (
            {"schedule": "cosine"},
            "optimizer.schedule: unknown schedule 'cosine', did you mean 'cosine_decay_schedule'?",
        ),
        (
            {"name": "adam", "learning_rate": 0.1, "arguments": {"beta1": 0.9}},
            "optimizer.arguments: adam has no argument 'beta1', did you mean 'b1'?",
        ),
        (
            {"name": "sgd", "learning_rate": 0.1, "arguments": {"momentun": 0.9}},
            "optimizer.arguments: sgd has no argument 'momentun', did you mean 'momentum'?",
        ),
        (
            {"name": "adam", "learning_rate": 0.1, "arguments": {"b1": "x"}},
            "optimizer.arguments: adam refuses {'b1': 'x'}",
        ),
        ({"name": "radam", "learning_rate": 0.1, "arguments": {"b2": True}}, "optimizer.arguments: radam refuses {"),
        (
            {"name": "adam", "learning_rate": 0.1, "arguments": {"learning_rate": 0.1}},
            "optimizer.arguments.learning_rate: set optimizer.learning_rate or optimizer.schedule instead",
        ),
        (
            {"name": "adamw", "learning_rate": 0.1, "weight_decay": 0.1},
            "optimizer.weight_decay: adamw has its own, set optimizer.arguments.weight_decay",
        ),
        (
            {"schedule": "cosine_decay_schedule", "schedule_arguments": {"init_value": 0.1}},
            "optimizer.schedule_arguments: cosine_decay_schedule needs decay_steps",
        ),
        (
            {"schedule": "cosine_decay_schedule", "schedule_arguments": {"init_value": 0.1, "decay_step": 1}},
            "optimizer.schedule_arguments: cosine_decay_schedule has no argument 'decay_step', did you mean 'decay_st",
        ),
        (
            {"schedule": "cosine_decay_schedule", "schedule_arguments": {"init_value": 0.1, "decay_steps": "x"}},
            "optimizer.schedule_arguments: cosine_decay_schedule refuses {'init_value': 0.1, 'decay_steps': 'x'}: ",
        ),
        (
            {"schedule": "cosine_decay_schedule", "schedule_arguments": {"init_value": "x", "decay_steps": 3}},
            "optimizer.schedule_arguments: cosine_decay_schedule refuses {'init_value': 'x', 'decay_steps': 3}: ",
        ),
        (
            {
                "schedule": "linear_onecycle_schedule",
                "schedule_arguments": {"transition_steps": 9, "peak_value": 1, "div_factor": 0},
            },
            "optimizer.schedule_arguments: linear_onecycle_schedule refuses {",
        ),
        (
            {
                "schedule": "piecewise_constant_schedule",
                "schedule_arguments": {"init_value": 1, "boundaries_and_scales": {"x": 1.0}},
            },
            "optimizer.schedule_arguments.boundaries_and_scales: got the key 'x', a count of steps or '2 epochs' is",
        ),
        (
            {
                "schedule": "piecewise_constant_schedule",
                "schedule_arguments": {"init_value": 1, "boundaries_and_scales": 3},
            },
            "optimizer.schedule_arguments: piecewise_constant_schedule refuses {",
        ),
    ],
)
def test_errors_are_one_line(values: dict[str, Any], expected: str) -> None:
    assert message(**values).startswith(expected)
