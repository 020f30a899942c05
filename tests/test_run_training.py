"""The compiled epoch and evaluation against naive loops, one step after the other, one sample after the other."""

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits
from tiers import one_in

import jaxbp
from jaxbp import MLP, Affine
from jaxbp.run.compute import epoch as epochs
from jaxbp.run.compute.epoch import Evaluation, evaluate
from jaxbp.run.compute.optimizers import Optimizer, build
from jaxbp.run.compute.recording import QUANTITIES, Recording
from jaxbp.run.compute.step import State, StepSpec
from jaxbp.run.config import OptimizerConfig
from jaxbp.run.report import metrics

RATE = 0.3
EPOCH = jax.jit(epochs.epoch, static_argnums=0, donate_argnums=1)
AUTODIFF = jax.jit(oracles.value_and_grad, static_argnums=0)
BY_HAND = jax.jit(jaxbp.value_and_grad, static_argnums=0)


def start(optimizer: Optimizer, params: Any) -> State:
    """A state that owns its buffers: `epoch` takes them away."""
    return jax.tree.map(jnp.copy, State(params, optimizer.init(params), jnp.array(True)))


def problem(
    samples: int, dtype: Any = jnp.float64, loss: str = "softmax_cross_entropy"
) -> tuple[MLP, Any, Any, Any, Optimizer]:
    net = MLP((4, 5, 3), hidden="tanh", loss=loss)
    params, x, y = oracles.data(net, seed=1, batch=samples, dtype=dtype)
    return net, params, x, y, build(OptimizerConfig(learning_rate=RATE), params)


def batches(key: Any, samples: int, size: int) -> list[Any]:
    """The rows of each step, the ragged one included."""
    order = np.asarray(jax.random.permutation(key, samples))
    return [order[i : i + size] for i in range(0, samples, size)]


# --- an epoch ---------------------------------------------------------------------------------------------------------


SOFTMAX, SQUARED = "softmax_cross_entropy", "squared_error"


@pytest.mark.parametrize(
    ("samples", "size", "loss"),
    [
        (10, 4, SOFTMAX),
        (10, 4, SQUARED),
        (10, 1, SQUARED),
        (10, 11, SOFTMAX),
        (1, 2**31 - 1, SQUARED),
    ],
)
def test_an_epoch_is_a_loop_over_batches(samples: int, size: int, loss: str) -> None:
    """Against `jax.grad` and against `jaxbp.value_and_grad`; the last batch is as short as it is."""
    net, params, x, y, optimizer = problem(samples, loss=loss)
    key = jax.random.key(3)
    ours, theirs, losses = params, params, []
    for rows in batches(key, samples, size):
        loss_of_batch, grads = AUTODIFF(net, theirs, x[rows], y[rows])
        losses.append(loss_of_batch)
        theirs = jaxbp.update(theirs, grads, RATE)
        ours = jaxbp.update(ours, BY_HAND(net, ours, x[rows], y[rows])[1], RATE)
    state, steps = EPOCH(StepSpec(net, optimizer, size), start(optimizer, params), x, y, key)
    assert state.alive
    assert_close(state.params, ours, 1e-12)
    assert_close(state.params, theirs, 1e-12)
    assert_close([steps.loss], [jnp.array(losses)], 1e-12)


@pytest.mark.slow
def test_weights_are_those_of_the_mean_of_a_batch() -> None:
    """Σ wₙ ∂ℓₙ / Σ wₙ over the batch, from the gradients of single samples; the loss and δ have no weights."""
    net, params, x, y, optimizer = problem(10)
    weights, key = jnp.asarray(np.random.default_rng(0).uniform(0.2, 3, 10)), jax.random.key(3)
    ours, losses, delta = params, [], []
    for rows in batches(key, 10, 4):
        single, share = oracles.per_sample_gradients(net, ours, x[rows], y[rows]), weights[rows] / weights[rows].sum()
        losses.append(np.mean(jax.jit(oracles.losses, static_argnums=0)(net, ours, x[rows], y[rows])))
        delta.append([np.mean(np.square(layer.b)) for layer in single])
        ours = jaxbp.update(ours, jax.tree.map(lambda g, share=share: jnp.tensordot(share, g, 1), single), RATE)
    state, steps = EPOCH(StepSpec(net, optimizer, 4), start(optimizer, params), x, y, key, 0, weights)
    assert_close(state.params, ours, 1e-12)
    np.testing.assert_allclose(steps.loss, losses, rtol=1e-12)
    np.testing.assert_allclose(steps.delta, delta, rtol=1e-6)


@pytest.mark.slow
def test_two_epochs_go_on_with_the_optimizers_state() -> None:
    net, params, x, y, _ = problem(10)
    pieces = {"init_value": 0.5, "boundaries_and_scales": {"4": 0.1}}
    with jax.numpy_dtype_promotion("standard"):
        optimizer = build(OptimizerConfig(schedule="piecewise_constant_schedule", schedule_arguments=pieces), params)
        expected, state, step = params, start(optimizer, params), 0
        for number in range(2):
            key = jax.random.key(number)
            for rows in batches(key, 10, 4):
                rate = float(np.asarray(optimizer.learning_rate(step)))
                expected = jaxbp.update(expected, BY_HAND(net, expected, x[rows], y[rows])[1], rate)
                step += 1
            state, _ = EPOCH(StepSpec(net, optimizer, 4), state, x, y, key)
    assert_close(state.params, expected, 1e-7)  # the rates are float32


# Adds the number of the step, from 1 on, to every parameter whose gradient is negative.
NUMBERING = Optimizer(
    lambda params: jnp.float64(1),
    lambda params, grads, t, _: (jax.tree.map(lambda p, g: jnp.where(g < 0, p + t, p), params, grads), t + 1),
    lambda t: t,
)


def ranks(samples: int, batch_size: int, key: Any) -> np.ndarray:
    """The number of the step that saw each sample, from 1 on, added up over its visits.

    Sample n is the unit vector eₙ, so that only wₙ has its gradient, which is negative.
    """
    net = MLP((samples, 1), loss="absolute_error")
    params = (Affine(jnp.zeros((1, samples)), jnp.zeros(1)),)
    x, y = jnp.eye(samples), jnp.full((samples, 1), 1e9)
    state, _ = EPOCH(StepSpec(net, NUMBERING, batch_size), start(NUMBERING, params), x, y, key)
    return np.asarray(state.params[0].w[0])


def test_every_sample_is_seen_once_an_epoch_in_another_order_each_time() -> None:
    orders = [ranks(50, 1, jax.random.key(seed)) for seed in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1, 51))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.sum(orders[i] == orders[j]) < 10
    np.testing.assert_array_equal(orders[0], ranks(50, 1, jax.random.key(0)))
    seen = ranks(10, 4, jax.random.key(0))
    np.testing.assert_array_equal(np.sort(seen), [1, 1, 1, 1, 2, 2, 2, 2, 3, 3])


def test_a_ragged_batch_is_not_compiled_again_and_no_epoch_is() -> None:
    net, params, x, y, optimizer = problem(11)
    state, before = start(optimizer, params), EPOCH._cache_size()
    for number in range(3):
        state, _ = EPOCH(StepSpec(net, optimizer, 4), state, x, y, jax.random.key(number))
    assert EPOCH._cache_size() == before + 1


def test_the_state_is_given_away() -> None:
    net, params, x, y, optimizer = problem(10)
    state = start(optimizer, params)
    EPOCH(StepSpec(net, optimizer, 4), state, x, y, jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, x, y)))


# --- divergence -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_everything_before_its_step() -> None:
    net, params, x, y, optimizer = problem(10)
    key = jax.random.key(5)
    steps = batches(key, 10, 2)
    x = x.at[steps[3][1]].set(jnp.nan)
    expected = params
    for rows in steps[:3]:
        expected = jaxbp.update(expected, BY_HAND(net, expected, x[rows], y[rows])[1], RATE)
    state, measured = EPOCH(StepSpec(net, optimizer, 2), start(optimizer, params), x, y, key)
    assert not state.alive
    assert_close(state.params, expected, 1e-12)
    np.testing.assert_array_equal(measured.alive, [True, True, True, False, False])
    assert np.isnan(measured.loss[3])
    assert int(state.optimizer[0]) == 3  # the count of steps taken
    stopped = jax.device_get(state.params)
    again, measured = EPOCH(StepSpec(net, optimizer, 2), state, x, y, jax.random.key(6))
    assert not again.alive and not measured.alive.any()
    assert_same_bits(again.params, stopped)


def test_a_gradient_that_overflows_stops_too_and_one_whose_square_does_goes_on() -> None:
    """w = 0: the loss is ½y² and the gradient −y x, 2e10 times 1e30 or 1e10."""
    net = MLP((2, 1), loss="squared_error")
    params = (Affine(jnp.zeros((1, 2), jnp.float32), jnp.zeros(1, jnp.float32)),)
    optimizer = build(OptimizerConfig(learning_rate=1e-35), params)
    y = jnp.full((2, 1), 2e10, jnp.float32)
    for size, alive in ((1e30, False), (1e15, True)):
        x = jnp.full((2, 2), size, jnp.float32)
        state, measured = EPOCH(StepSpec(net, optimizer, 2), start(optimizer, params), x, y, jax.random.key(0))
        assert bool(state.alive) is bool(measured.alive[0]) is alive
        assert np.isfinite(measured.loss[0]) and not np.isfinite(measured.gradient[0]).any()
        assert np.array_equal(state.params[0].w, params[0].w) is not alive


def test_an_exploding_run_keeps_finite_parameters() -> None:
    net, params, x, y, _ = problem(10, jnp.float32, "squared_error")
    net = MLP(net.sizes, "relu", loss="squared_error")
    optimizer = build(OptimizerConfig(learning_rate=1e6), params)
    state = start(optimizer, params)
    for number in range(5):
        state, _ = EPOCH(StepSpec(net, optimizer, 2), state, x, y, jax.random.key(number))
    assert not state.alive
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_delta_and_gradient_rms_are_those_of_single_samples() -> None:
    """δₙ⁽ˡ⁾ is ∂ℓₙ/∂b⁽ˡ⁾; the gradient is the mean over the batch of ∂ℓₙ/∂(w, b)."""
    net, params, x, y, optimizer = problem(10)
    key = jax.random.key(2)
    _, measured = EPOCH(StepSpec(net, optimizer, 4), start(optimizer, params), x, y, key)
    delta, gradient = [], []
    for rows in batches(key, 10, 4):
        single = oracles.per_sample_gradients(net, params, x[rows], y[rows])
        delta.append([np.mean(np.square(layer.b)) for layer in single])
        means = jax.tree.map(lambda g: jnp.mean(g, axis=0), single)
        gradient.append([np.mean(np.square(np.concatenate([p.w.ravel(), p.b]))) for p in means])
        params = jaxbp.update(params, means, RATE)
    np.testing.assert_allclose(measured.delta, delta, rtol=1e-6)
    np.testing.assert_allclose(measured.gradient, gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics.root_mean(measured.delta), np.sqrt(np.mean(delta, axis=0)), rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_counts_its_samples() -> None:
    """bfloat16 has no 301: a sum of 301 ones in it is 300 or 302, and the mean loss would be off by as much."""
    net, params, x, y, optimizer = problem(301, jnp.bfloat16)
    expected = np.mean(np.asarray(jaxbp.factors(net, params, x, y)[0], np.float64))
    _, measured = EPOCH(StepSpec(net, optimizer, 400), start(optimizer, params), x, y, jax.random.key(0))
    assert measured.loss.dtype == jnp.float32
    np.testing.assert_allclose(measured.loss, [expected], rtol=1e-3)  # 1/301 is 3e-3


@pytest.mark.parametrize(("samples", "loss"), [(1, SQUARED), (1000, SOFTMAX), (1001, SOFTMAX), (2017, SQUARED)])
def test_an_evaluation_is_a_loop_over_samples(samples: int, loss: str) -> None:
    net, params, x, y, _ = problem(samples, loss=loss)
    found = evaluate(net, params, x, y)
    sigmas = oracles.sigmas(net)
    assert_close([found.output], [jax.jit(jax.vmap(lambda x: oracles.network(sigmas, params, x)))(x)], 1e-12)
    assert_close([found.loss], [jax.jit(oracles.losses, static_argnums=0)(net, params, x, y)], 1e-12)


def test_an_evaluation_in_parts_is_one_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    net, params, x, y, _ = problem(17)
    whole = evaluate(net, params, x, y)
    monkeypatch.setattr(epochs, "EVALUATED_AT_ONCE", 5)
    evaluate.clear_cache()
    assert_close(evaluate(net, params, x, y), whole, 1e-14)
    evaluate.clear_cache()


def test_scores_of_labels_and_of_numbers() -> None:
    evaluation = Evaluation(jnp.array([1.0, 3.0]), jnp.array([[0.1, 0.9], [0.8, 0.2]]))
    assert metrics.scores(evaluation, np.array([1, 1]), "hinge", None) == metrics.Scores(2.0, accuracy=0.5)
    assert metrics.root_mean(jnp.array([[9.0], [16.0]])) == [np.sqrt(12.5)]


def test_balanced_accuracy_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)
    output, labels = rng.normal(size=(50, 4)), np.array([0] * 40 + [3] * 7 + [1] * 3)
    found = metrics.balanced_accuracy(Evaluation(jnp.zeros(50), jnp.asarray(output)), labels)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):  # class 2 has no sample
        assert found == pytest.approx(balanced_accuracy_score(labels, output.argmax(axis=1)), rel=1e-12)


def test_rmse_and_r2_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import r2_score, root_mean_squared_error

    from jaxbp.run.data import Scaling

    rng = np.random.default_rng(0)
    y, scaled = rng.normal(size=(20, 3)) * [1, 10, 100], rng.normal(size=(20, 3))
    targets = Scaling.fit(y)
    found = metrics.scores(Evaluation(jnp.zeros(20), jnp.asarray(scaled)), y, "squared_error", targets)
    guesses = scaled * y.std(axis=0) + y.mean(axis=0)
    assert found.rmse == pytest.approx(np.sqrt(np.mean((guesses - y) ** 2)), rel=1e-12)
    assert found.r2 == pytest.approx(r2_score(y, guesses), rel=1e-12)
    one = metrics.scores(Evaluation(jnp.zeros(20), jnp.asarray(scaled[:, :1])), y[:, :1], "squared_error", None)
    assert one.rmse == pytest.approx(root_mean_squared_error(y[:, 0], scaled[:, 0]), rel=1e-12)
    constant = metrics.scores(Evaluation(jnp.zeros(20), jnp.asarray(scaled)), np.ones((20, 3)), "huber", None)
    assert np.isnan(constant.r2)  # of targets without a spread there is none


# --- other devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", one_in(3, [{}, {"mixed": True}, {"schedule": (1, 1), "micro_batches": 2}]))
def test_the_epoch_lowers_for_every_platform(changes: dict[str, Any]) -> None:
    """No device of the other kinds is needed to lower for them; with a record, and with an optimiser of Optax."""
    net, params, x, y, _ = problem(8, jnp.float32)
    recording = None if changes.get("schedule") else Recording(tuple(QUANTITIES), 2)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax has it
        optimizer = build(OptimizerConfig("adam", 0.1), params)
        spec = StepSpec(net, optimizer, 4, recording=recording, **changes)
        jitted = jax.jit(functools.partial(epochs.epoch, spec))
        found = jax.export.export(jitted, platforms=("cpu", "cuda", "tpu"))(
            start(optimizer, params), x, y, jax.random.key(0)
        )
    assert found.platforms == ("cpu", "cuda", "tpu")
