"""Every layer: its forward pass against a formula, its backward pass and every per-sample quantity against autodiff."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tiers import one_in

import jaxbp
from experiments import layers as study
from jaxbp import Network, factor, losses, models, persample
from jaxbp.checker.network import layer_errors
from jaxbp.layers import (
    AveragePool,
    BatchNorm,
    Chain,
    Conv1d,
    Conv2d,
    Dense,
    Dropout,
    Elementwise,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Patches,
    PositionEmbedding,
    Reshape,
    Residual,
    RMSNorm,
    SelfAttention,
    Tied,
)

over = losses.over_positions
CROSS_ENTROPY = "softmax_cross_entropy"
BLOCK = (
    Residual(Chain(LayerNorm(), SelfAttention(2, causal=True))),
    Residual(Chain(LayerNorm(), Dense(16), Elementwise("gelu"), Dense(8, bias=False))),
)
NETS = {
    "dense": Network(Chain(Dense(4), Elementwise("tanh"), Dense(3, bias=False)), CROSS_ENTROPY, (5,)),
    "positions": Network(Chain(Dense(4), Elementwise("tanh"), Dense(3, bias=False)), over("squared_error"), (6, 5)),
    "one position": Network(Chain(Dense(4), LayerNorm(), Dense(3)), over("squared_error", "sum"), (1, 5)),
    "conv2d": Network(
        Chain(
            *(Conv2d(4, 3, stride=(2, 1), padding=((1, 0), (2, 1)), dilation=(1, 2)), Elementwise("tanh")),
            *(MaxPool(2, 1), Flatten(), Dense(3)),
        ),
        CROSS_ENTROPY,
        (7, 8, 2),
    ),
    "groups": Network(
        Chain(Conv2d(4, 3, padding="same", groups=2), GroupNorm(2), AveragePool((2, 3)), Flatten(), Dense(3)),
        "squared_error",
        (6, 6, 2),
    ),
    "conv1d": Network(Chain(Reshape((13, 2)), Conv1d(4, 5, stride=2), Flatten(), Dense(3)), CROSS_ENTROPY, (26,)),
    "norms": Network(
        Chain(Dense(6), LayerNorm(), Elementwise("tanh"), RMSNorm(), GroupNorm(3), Dense(3)),
        over(CROSS_ENTROPY, padding=-1),
        (4, 5),
    ),
    "patches": Network(Chain(Patches(2), Dense(8), SelfAttention(4), Flatten(), Dense(3)), CROSS_ENTROPY, (4, 6, 1)),
    "embedding": Network(Chain(Embedding(7, 4), Flatten(), Dense(3)), CROSS_ENTROPY, (5,)),
    "gpt": Network(Tied(Embedding(7, 8), Chain(PositionEmbedding(), *BLOCK, LayerNorm())), over(CROSS_ENTROPY), (5,)),
    "mixer": models.mixer((4, 4, 1), 3, patch=2, layers=1, width=3, mixed=2, hidden=5),
    "mlp": Network(Chain(Flatten(), jaxbp.MLP((6, 4, 3), "tanh")), CROSS_ENTROPY, (2, 3)),
}
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5])
N = len(WEIGHTS)


@functools.cache
def data(name: str, batch: int = N) -> tuple[Any, jax.Array, jax.Array]:
    """Random parameters, inputs and targets in float64."""
    net, rng = NETS[name], np.random.default_rng(0)
    shapes = net.parameters
    params = jax.tree.map(lambda a: jax.device_put(0.4 * rng.standard_normal(a.shape) + (a.ndim == 1)), shapes)
    tokens = name in ("gpt", "embedding")
    x = rng.integers(0, 7, (batch, *net.shape)) if tokens else rng.standard_normal((batch, *net.shape))
    loss, outputs = losses.get(net.loss), net.outputs
    if "label" in loss.target:
        y = rng.integers(-1 if loss.padding else 0, outputs[-1], (batch, *outputs[:-1]))
    else:
        y = rng.standard_normal((batch, *outputs))
    return params, jax.device_put(x), jax.device_put(y)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def rows(tree: Any) -> np.ndarray:
    """A tree of (N, …) as (N, parameters)."""
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1)


@functools.cache
def by_autodiff(name: str) -> np.ndarray:
    """(N, parameters): the gradient of every sample."""
    net = NETS[name]

    def sample(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses.get(net.loss).ell(net.layer.forward(params, x)[0], y)

    return rows(jax.jit(jax.vmap(jax.grad(sample), (None, 0, 0)))(*data(name)))


def quantities(net: Network, params: Any, x: jax.Array, y: jax.Array) -> dict[str, Any]:
    p, (values, f) = persample, jaxbp.factors(net, params, x, y)
    return {
        "losses": values,
        "loss and gradient": jaxbp.value_and_grad(net, params, x, y, WEIGHTS),
        "mean_gradient": p.mean_gradient(f, WEIGHTS),
        "gradients": p.gradients(f),
        "squared_norms": p.squared_norms(f, per_layer=True),
        "gram": p.gram(f),
        "cosine": p.cosine(f),
        "dot": p.dot(f, params),
        "second_moment": p.second_moment(f, WEIGHTS),
        "variance": p.variance(f),
        "signal_to_noise": p.signal_to_noise(f),
        "clipped_mean": p.clipped_mean(f, 0.7, WEIGHTS),
        "noise_scale": p.noise_scale(f),
        "coherence": p.coherence(f),
    }


compute = jax.jit(quantities, static_argnums=0)


def close(got: Any, want: np.ndarray, what: str) -> None:
    error = np.max(np.abs(flat(got) - np.ravel(want)))
    assert error <= 1e-11 * np.max(np.abs(want)), f"{what}: {error}"


QUICK = ("conv2d",)
REST = [pytest.param(name, marks=pytest.mark.slow) for name in NETS if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *REST])
def test_every_quantity_is_that_of_autodiff(name: str) -> None:
    net, g = NETS[name], by_autodiff(name)
    got, params = compute(net, *data(name)), flat(data(name)[0])
    assert jax.tree.structure(got["gradients"]) == jax.tree.structure(data(name)[0])
    norms, mean, weighted = np.linalg.norm(g, axis=1), g.mean(0), WEIGHTS @ g / N
    trace = np.sum((g - mean) ** 2) / (N - 1)
    close(rows(got["gradients"]), g, "gradients")
    close(got["loss and gradient"][0], WEIGHTS @ np.asarray(got["losses"]) / N, "loss")
    close(got["loss and gradient"][1], weighted, "value_and_grad")
    close(got["mean_gradient"], weighted, "mean_gradient")
    close(sum(got["squared_norms"]), norms**2, "squared_norms")
    close(got["gram"], g @ g.T, "gram")
    close(got["cosine"], g @ g.T / np.outer(norms, norms), "cosine")
    close(got["dot"], g @ params, "dot")
    close(got["second_moment"], WEIGHTS @ g**2 / N, "second_moment")
    close(got["variance"], g.var(0, ddof=1), "variance")
    close(got["clipped_mean"].mean, (WEIGHTS * np.minimum(1, 0.7 / norms)) @ g / N, "clipped_mean")
    assert float(got["clipped_mean"].fraction) == np.mean(norms[WEIGHTS != 0] > 0.7)
    close([got["noise_scale"].trace, got["noise_scale"].squared_gradient], [trace, mean @ mean - trace / N], "noise")
    close(got["coherence"], mean @ mean / np.mean(norms**2), "coherence")
    ratios, seen = flat(got["signal_to_noise"]), np.abs(mean) > 1e-9 * np.max(np.abs(mean))
    close(ratios[seen], np.abs(mean[seen]) / np.sqrt(g.var(0, ddof=1)[seen]), "signal_to_noise")


@pytest.mark.parametrize("name", one_in(2, ["groups", "gpt"]))
def test_apply_differentiates_by_hand_also_to_its_input(name: str) -> None:
    net, (params, x, _) = NETS[name], data(name)

    def loss(params: Any, x: jax.Array, apply: Any) -> jax.Array:
        return jnp.sum(jnp.sin(apply(params, x)))

    def plain(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: net.layer.forward(params, x)[0])(x)

    wrt = 0 if name == "gpt" else (0, 1)  # tokens have no derivative
    ours, autodiff = (
        jax.jit(jax.grad(functools.partial(loss, apply=apply), wrt))(params, x)
        for apply in (lambda params, x: jaxbp.apply(net, params, x), plain)
    )
    close(ours, flat(autodiff), name)
    assert jaxbp.apply(net, params, x[:2].reshape(2, 1, *net.shape)).shape == (2, 1, *net.outputs)


@pytest.mark.parametrize("name", one_in(2, ["conv2d", "gpt"]))
def test_parts_chunks_and_masks_give_the_whole(name: str) -> None:
    """3 + 1 samples; one sample; a sample of weight 0 that is not finite, or has other tokens, is not there."""
    net, (params, x, y) = NETS[name], data(name)
    norms = np.sum(by_autodiff(name) ** 2, axis=1)
    found = persample.map_chunks(squared_norms, net, params, x, y, chunk_size=3)
    close(found, norms, "chunks of 3 and 1")
    close(persample.map_chunks(squared_norms, net, params, x[:1], y[:1], chunk_size=1), norms[:1], "one sample")
    spoilt = x.at[1].set(3 if name == "gpt" else jnp.nan)
    loss, grads = jax.jit(jaxbp.value_and_grad, static_argnums=0)(net, params, spoilt, y, WEIGHTS)
    close(grads, WEIGHTS @ by_autodiff(name) / N, "a sample of weight 0")
    assert np.isfinite(loss)


def squared_norms(_: jax.Array, f: Any) -> jax.Array:
    return persample.squared_norms(f)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv2d", "gpt", "norms"])
def test_gradients_of_any_size(name: str) -> None:
    """δ times 10^±150: what overflows on the way, or underflows, is right in the end."""
    net, g = NETS[name], by_autodiff(name)
    _, f = jaxbp.factors(net, *data(name))
    for size in (1e150, 1e-150):
        scaled = factor.times(f, jnp.full(N, size))
        close(jax.jit(persample.grand)(scaled), size * np.linalg.norm(g, axis=1), "grand")
        close(jax.jit(persample.cosine)(scaled), g @ g.T / np.outer(*[np.linalg.norm(g, axis=1)] * 2), "cosine")
        clipped = jax.jit(persample.clipped_mean)(scaled, 0.7 * size).mean
        close(clipped, size * np.mean(g * np.minimum(1, 0.7 / np.linalg.norm(g, axis=1))[:, None], axis=0), "clipped")


@pytest.mark.slow
def test_dropout_draws_once_a_sample_and_the_backward_pass_uses_the_same_mask() -> None:
    net = Network(Chain(Dense(64), Dropout(0.25), Dense(3)), CROSS_ENTROPY, (5,))
    params, x, y = jaxbp.init(net, jax.random.key(0), dtype=jnp.float64), jnp.ones((2, 5)), jnp.zeros(2, int)
    key = jax.random.key(1)
    _, f = jaxbp.factors(net, params, x, y, key)
    dropped = [np.asarray(f[2].x[n] == 0) for n in range(2)]
    assert not np.array_equal(*dropped) and 0.1 < np.mean(dropped) < 0.4

    def loss(params: Any) -> jax.Array:
        keys = jax.random.split(key, 2)
        outputs = jax.vmap(lambda x, key: net.layer.forward(params, x, key)[0])(x, keys)
        return jnp.mean(jax.vmap(losses.get(CROSS_ENTROPY).ell)(outputs, y))

    close(jaxbp.value_and_grad(net, params, x, y, key=key)[1], flat(jax.grad(loss)(params)), "gradient")
    close(jaxbp.value_and_grad(net, params, x, y)[1], flat(jaxbp.gradient(jaxbp.factors(net, params, x, y)[1])), "none")


@pytest.mark.production
def test_large_scores_of_attention_are_finite() -> None:
    """Where the softmax's numbers and their maximum were rounded differently, it was ∞ / ∞ in a compiled program."""
    rng = np.random.default_rng(0)
    layer, x = SelfAttention(2), jnp.asarray(1e3 * rng.standard_normal((6, 4)), jnp.float32)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x.shape)[0])
    params = jax.tree.map(lambda a: jnp.asarray(1e3 * rng.standard_normal(a.shape), jnp.float32), shapes)
    assert np.isfinite(jax.jit(lambda params, x: layer.forward(params, x)[0])(params, x)).all()


def test_what_is_dropped_does_not_depend_on_x64() -> None:
    x, key = np.ones(64, np.float32), jax.random.key(0)
    masks = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            masks.append(np.asarray(Dropout(0.5).forward((), jnp.asarray(x), key)[0]))
    assert 0 < np.mean(masks[0] == 0) < 1
    np.testing.assert_array_equal(*masks)


# --- the forward passes against formulas ------------------------------------------------------------------------------


def of(layer: Any, x: np.ndarray, seed: int = 0) -> tuple[Any, jax.Array]:
    params, _ = layer.init(jax.random.key(seed), x.shape, dtype=jnp.float64)
    return params, layer.forward(params, jnp.asarray(x))[0]


def test_what_the_layers_compute() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 8))
    params, s = of(SelfAttention(2, causal=True), x)
    params = jax.tree.map(np.array, params)
    q, k, v = (part.reshape(5, 2, 4) for part in np.split(x @ params.qkv.w.T + params.qkv.b, 3, axis=1))
    weights = np.exp(np.einsum("thd,shd->hts", q, k) / 2) * np.tri(5)
    z = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).reshape(5, 8)
    close(s, z @ params.out.w.T + np.asarray(params.out.b), "attention")
    close(of(LayerNorm(), x)[1], (x - x.mean(1)[:, None]) / np.sqrt(x.var(1) + 1e-5)[:, None], "LayerNorm")
    close(of(RMSNorm(), x)[1], x / np.sqrt(np.mean(x**2, 1) + 1e-6)[:, None], "RMSNorm")
    groups = x.reshape(5, 2, 4)
    mean, var = groups.mean((0, 2)), groups.var((0, 2))
    close(of(GroupNorm(2), x)[1], (groups - mean[:, None]) / np.sqrt(var + 1e-5)[:, None], "GroupNorm")
    image = rng.standard_normal((6, 6, 2))
    tiles = image.reshape(3, 2, 3, 2, 2)
    close(of(MaxPool(2), image)[1], tiles.max((1, 3)), "MaxPool")
    close(of(AveragePool(2), image)[1], tiles.mean((1, 3)), "AveragePool")
    close(of(Patches(2), image)[1], tiles.transpose(0, 2, 1, 3, 4), "Patches")
    params, s = of(Conv2d(4, 3, stride=2, padding=((1, 1), (0, 2)), groups=2), image)
    want = [
        lax.conv_general_dilated(image[None, :, :, g : g + 1], params.w[2 * g : 2 * g + 2], (2, 2), ((1, 1), (0, 2)),
                                 dimension_numbers=("NHWC", "OIHW", "NHWC"))[0]
        for g in range(2)
    ]  # fmt: skip
    close(s, np.concatenate(want, axis=-1), "Conv2d in groups")


def test_ties_go_to_the_first_of_the_largest() -> None:
    layer, x = MaxPool(2), jnp.zeros((2, 2, 1))
    _, tape = layer.forward((), x)
    assert layer.backward((), tape, jnp.ones((1, 1, 1)))[0].ravel().tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(2, 9, 9), (9, 2, 3)])
def test_norms_from_pairs_of_positions_and_from_formed_gradients(positions: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    f = factor.Shared(*(jnp.asarray(rng.standard_normal((3, positions, n))) for n in (inputs, outputs)))
    assert factor.pairs_are_cheaper(positions, inputs, outputs) == (positions == 2)
    close(factor.squared_norm(f), np.sum(rows(factor.gradients(f)) ** 2, axis=1), "squared_norm")


@pytest.mark.parametrize("tokens", [4, 40])
def test_norms_of_weights_that_are_used_twice(tokens: int) -> None:
    """By pairs of positions where there are many tokens, and from the formed gradient; tokens that repeat."""
    rng = np.random.default_rng(0)
    delta, x, dl_ds = (jnp.asarray(rng.standard_normal((3, 5, n))) for n in (9, 9, tokens))
    uses = factor.Gather(jnp.asarray(rng.integers(0, 4, (3, 5))), delta, tokens), factor.Shared(x, dl_ds, bias=False)
    f = factor.Sum(uses)
    assert factor.pairs_are_cheaper(5, 9, tokens) == (tokens == 40)
    norms = np.sum(rows(factor.gradients(f)) ** 2, axis=1)
    close(factor.squared_norm(f), norms, "squared_norm")
    close(persample.squared_norms((f,)), norms, "squared_norms")


# --- planted bugs -----------------------------------------------------------------------------------------------------


def lost_flip(layer: Any, params: Any, x: Any, dl_ds: Any) -> Any:
    return layer.backward(params._replace(w=jnp.flip(params.w, (2, 3))), x, dl_ds)


def lost_stride(layer: Any, params: Any, x: Any, dl_ds: Any) -> Any:
    dense = jnp.zeros(x.shape[:-1] + dl_ds.shape[-1:]).at[: len(dl_ds), : dl_ds.shape[1]].set(dl_ds)
    return Conv2d(2, 3, padding="same").backward(params, x, dense)[0], layer.backward(params, x, dl_ds)[1]


def padded_by_one_more(layer: Any, params: Any, x: Any, dl_ds: Any) -> Any:
    dl_dx, f = layer.backward(params, x, dl_ds)
    return jnp.roll(dl_dx, 1, 0), f


def softmax_without_row_sum(layer: Any, params: Any, tape: Any, dl_dy: Any) -> Any:
    tape_in, (q, k, v), a, tape_out = tape
    right, (qkv, out) = layer.backward(params, tape, dl_dy)
    _, (other, _) = layer.backward(params, (tape_in, (q, k, v - v.mean(1, keepdims=True)), a, tape_out), dl_dy)
    return right, type(params)(dataclasses.replace(qkv, delta=other.delta + 0.1 * qkv.delta), out)


def mask_lost(layer: Any, params: Any, tape: Any, dl_dy: Any) -> Any:
    tape_in, qkv, a, tape_out = tape
    return layer.backward(params, (tape_in, qkv, a + (a == 0).astype(a.dtype) / len(a[0]), tape_out), dl_dy)


def without_mean_terms(layer: Any, params: Any, tape: Any, dl_dx: Any) -> Any:
    _, inverse = tape
    return inverse * dl_dx * params.gamma, layer.backward(params, tape, dl_dx)[1]


def scale_of_one_position(layer: Any, params: Any, tape: Any, dl_dx: Any) -> Any:
    x_hat, _ = tape
    through, _ = layer.backward(params, tape, dl_dx)
    return through, factor.Whole(type(params)(dl_dx[0] * x_hat[0], dl_dx.sum(0)))


def set_for_add(layer: Any, table: Any, ids: Any, dl_dx: Any) -> Any:
    dl_dids, _ = layer.backward(table, ids, dl_dx)
    return dl_dids, factor.Whole(jnp.zeros(table.shape).at[ids].set(dl_dx))


def tied_counted_once(layer: Any, params: Any, tape: Any, dl_ds: Any) -> Any:
    dl_dids, (both, inner) = layer.backward(params, tape, dl_ds)
    return dl_dids, (factor.Sum(both.uses[1:]), inner)


def dropped_by_another_mask(layer: Any, params: Any, mask: Any, dl_dx: Any) -> Any:
    return layer.backward(params, jnp.roll(mask, 1), dl_dx)


def residual_lost(layer: Any, params: Any, tape: Any, dl_dx: Any) -> Any:
    return layer.layer.backward(params, tape, dl_dx)


def every_tie(layer: Any, params: Any, tape: Any, dl_dx: Any) -> Any:
    first, shape = tape
    return layer.backward(params, (jnp.zeros_like(first), shape), dl_dx)


def mean_not_divided(layer: Any, params: Any, shape: Any, dl_dx: Any) -> Any:
    return 4 * layer.backward(params, shape, dl_dx)[0], ()


def bias_of_one_position(layer: Any, params: Any, x: Any, dl_ds: Any) -> Any:
    dl_dx, _ = layer.backward(params, x, dl_ds)
    return dl_dx, factor.Whole(type(params)(dl_ds.T @ x, dl_ds[0]))


ATTENTION, STRIDED = SelfAttention(2, causal=True), Conv2d(2, 3, stride=2, padding=((1, 1), (1, 1)))
PLANTED = {
    lost_flip: (Conv2d(2, 3), (5, 5, 2)),
    lost_stride: (STRIDED, (6, 6, 2)),
    padded_by_one_more: (Conv2d(2, 3, padding="same"), (5, 5, 2)),
    softmax_without_row_sum: (ATTENTION, (5, 4)),
    mask_lost: (ATTENTION, (5, 4)),
    without_mean_terms: (LayerNorm(), (5, 4)),
    scale_of_one_position: (LayerNorm(), (5, 4)),
    set_for_add: (Embedding(3, 4), (5,)),
    tied_counted_once: (Tied(Embedding(3, 4), Dense(4)), (5,)),
    dropped_by_another_mask: (Dropout(0.5), (8,)),
    residual_lost: (Residual(Dense(4)), (5, 4)),
    every_tie: (MaxPool(2), (4, 4, 2)),
    mean_not_divided: (AveragePool(2), (4, 4, 2)),
    bias_of_one_position: (Dense(3), (5, 4)),
}


def as_rule(layer: Any, backward: Any, like_x: Any) -> Any:
    """The layer of one sample as a `jax.custom_vjp` function, with this backward pass."""

    def forward(params: Any, x: Any) -> Any:
        return layer.forward(params, x, jax.random.key(0))

    @jax.custom_vjp
    def rule(params: Any, x: Any) -> Any:
        return forward(params, x)[0]

    def pull(residuals: Any, dl_dx: Any) -> Any:
        params, tape = residuals
        dl_dx, factors = backward(layer, params, tape, dl_dx)
        one = jax.tree.map(lambda a: a[None], factors)
        sums = factor.like(one, [factor.total(part) for part in factor.parts(one)])
        return sums, None if jnp.issubdtype(like_x.dtype, jnp.integer) else dl_dx

    def push(params: Any, x: Any) -> Any:
        x, tape = forward(params, x)
        return x, (params, tape)

    rule.defvjp(push, pull)
    return rule


def checked(layer: Any, shape: tuple[int, ...], backward: Any, **options: Any) -> Any:
    """The report on a layer with this backward pass."""
    params, _ = layer.init(jax.random.key(0), shape, "normal", jnp.float32)
    params = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape), params)
    x = jnp.arange(5) % 3 if isinstance(layer, Embedding | Tied) else jax.random.normal(jax.random.key(2), shape)

    def reference(params: Any, x: Any) -> Any:
        return layer.forward(params, x, jax.random.key(0))[0]

    return jaxbp.check(as_rule(layer, backward, x), (params, x), reference=reference, **options)


@pytest.mark.slow
@pytest.mark.parametrize("layer", dict(PLANTED.values()), ids=lambda layer: type(layer).__name__)
def test_the_checker_sees_nothing_wrong_in_a_layer(layer: Any) -> None:
    report = checked(layer, dict(PLANTED.values())[layer], lambda layer, *rest: layer.backward(*rest))
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.__name__)
def test_the_checker_sees_a_planted_bug(bug: Any) -> None:
    assert checked(*PLANTED[bug], bug, dtypes=("float32",)).verdict == "FAIL"


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A layer with a planted bug."""

    layer: Any
    bug: Any

    def init(self, *arguments: Any) -> Any:
        return self.layer.init(*arguments)

    def forward(self, *arguments: Any) -> Any:
        return self.layer.forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        return self.bug(self.layer, *arguments)


def images(first: Any) -> Network:
    return Network(Chain(first, Flatten(), Dense(2)), CROSS_ENTROPY, (4, 4, 2))


def tokens(attention: Any) -> Network:
    layer = Chain(Embedding(5, 4), Residual(Chain(LayerNorm(), attention)), Dense(5))
    return Network(layer, over(CROSS_ENTROPY), (6,))


@pytest.mark.slow
def test_check_says_which_layer_of_a_network_is_wrong() -> None:
    """A right network from the command line is test_run_networks.py::test_a_chain_from_a_config_to_a_study."""
    wrong = jaxbp.check(images(Wrong(Conv2d(2, 3), lost_flip)), dtypes="float32")
    assert wrong.verdict == "FAIL" and {row.subject for row in wrong.failures} >= {"layers", "apply"}
    assert all("layer 1, Wrong" in row.path for row in wrong.failures if row.subject == "layers" and row.path)
    assert "# net is what you called check with" in wrong.reproducer


def test_the_errors_of_each_parameter_of_a_network() -> None:
    errors = layer_errors(tokens(SelfAttention(2)))
    places = ["3", "3", "2.2", "2.2", "2.2", "2.2", "2.1", "2.1", "1"]
    named = ["w", "b", "qkv.w", "qkv.b", "out.w", "out.b", "gamma", "beta", "w"]
    assert [row.layer for row in errors] == places and [row.quantity for row in errors] == [f"∂ℓ/∂{n}" for n in named]
    assert all(row.float64 < 64 and row.float32 < 64 for row in errors) and any(row.float32 > 0 for row in errors)


@pytest.mark.slow
def test_the_study_of_what_layers_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its numbers are of the same gradient, in float32; the table has every program."""
    monkeypatch.setattr(study, "NETWORKS", {"GPT": (lambda: models.gpt((4,), 5, layers=1, heads=2, width=8), 3)})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        study.main(["--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "layers.json").read_text())["networks"]["GPT"]
    assert found["apart"] < 1e-5 and found["parameters"] == 5 * 8 + 4 * 8 + 872 + 16 + 45
    assert len(found["programs"]) == 6 and set(found["programs"]) > {study.AUTODIFF, study.CHECKPOINTS, study.VMAP}
    assert all(program["scratch"] > 0 and program["flop"] > 0 for program in found["programs"].values())


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    r"layer 2, Conv2d|layer 2, Conv\(.*gets \(784,\): it takes \(height, width, channels\)": lambda: Network(
        Chain(Flatten(), Conv2d(6, 5)), CROSS_ENTROPY, (28, 28, 1)
    ),
    r"layer 1, SelfAttention.*its 9 channels can't be shared by 2 heads": lambda: Network(
        Chain(SelfAttention(2)), over(CROSS_ENTROPY), (5, 9)
    ),
    r"padding 'same' with a window of \(4, 4\).*allowed: odd windows": lambda: Conv2d(6, 4, padding="same"),
    r"5 channels can't be split into 2 groups": lambda: Conv2d(5, 3, groups=2),
    r"its window of \(9, 9\) is larger than the input": lambda: Network(
        Chain(Conv2d(6, 9), Flatten(), Dense(2)), CROSS_ENTROPY, (8, 8, 1)
    ),
    r"Residual.*it adds x to what it computes, which is \(5, 4\)": lambda: Network(
        Chain(Residual(Dense(4))), over(CROSS_ENTROPY), (5, 3)
    ),
    r"layer 1, Reshape.*gets \(5,\): it takes 6 numbers": lambda: Network(Chain(Reshape((2, 3))), CROSS_ENTROPY, (5,)),
    r"gives \(5, 3\), expected \(C,\): Flatten\(\) and .*; jaxbp.losses.over_positions\(loss\) takes a": lambda: (
        Network(Dense(3), CROSS_ENTROPY, (5, 3))
    ),
    r"over positions: the layer gives \(3,\), expected \(T, C\), of a sequence": lambda: Network(
        Dense(3), over(CROSS_ENTROPY), (5,)
    ),
    r"gives \(24, 24, 6\), expected \(C,\): Flatten\(\) and Dense\(C\) at the end give it$": lambda: Network(
        Chain(Conv2d(6, 5)), CROSS_ENTROPY, (28, 28, 1)
    ),
    "batch norm takes its mean over the samples.*use LayerNorm or GroupNorm": BatchNorm,
    "rate is 1.0, allowed: 0 ≤ rate < 1": lambda: Dropout(1.0),
    r"x\[1, 2\] is 7, expected a token in 0 … 6": lambda: jaxbp.factors(
        NETS["gpt"], data("gpt")[0], data("gpt")[1].at[1, 2].set(7), data("gpt")[2]
    ),
    r"y\[0, 1\] is 9, expected a label in 0 … 6": lambda: jaxbp.factors(
        NETS["gpt"], *data("gpt")[:2], data("gpt")[2].at[0, 1].set(9)
    ),
    r"x has shape \(4, 6\), expected \(N, 5\)": lambda: jaxbp.factors(
        NETS["gpt"], data("gpt")[0], jnp.zeros((4, 6), int), data("gpt")[2]
    ),
    r"params is not nested as the layers are": lambda: jaxbp.factors(NETS["gpt"], (), *data("gpt")[1:]),
    "bias is 'normal', allowed: 'zeros'": lambda: jaxbp.init(NETS["gpt"], jax.random.key(0), bias="normal"),
    "reduction is 'max', allowed: mean, sum": lambda: over(CROSS_ENTROPY, "max"),
    "padding is -1, and squared_error has no labels": lambda: over("squared_error", padding=-1),
    "the last layer's factors are Whole, EL2N": lambda: persample.el2n((factor.Whole(jnp.ones((4, 3))),)),
}


@pytest.mark.parametrize("message", WRONG)
def test_refused_in_one_line(message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        WRONG[message]()
    assert "\n" not in str(caught.value)


def test_what_is_no_layer_is_named() -> None:
    for message, wrong in {
        "layer 2 is 'relu', expected a layer of jaxbp.layers": lambda: Chain(Dense(3), "relu"),
        "layer is .*, expected a layer of jaxbp.layers, such as a Chain": lambda: Network(
            [Dense(3)], CROSS_ENTROPY, (5,)
        ),
    }.items():
        with pytest.raises(TypeError, match=message):
            wrong()


def test_a_token_out_of_range_inside_jit_is_nan() -> None:
    params, x, y = data("embedding")
    values, _ = jax.jit(jaxbp.factors, static_argnums=0)(NETS["embedding"], params, x.at[1, 2].set(7), y)
    assert np.isnan(values).tolist() == [False, True, False, False]


def test_a_network_is_static_and_says_what_it_is() -> None:
    twin = dataclasses.replace(NETS["conv2d"])
    assert twin == NETS["conv2d"] and hash(twin) == hash(NETS["conv2d"])
    assert repr(Chain(Dense(2), Flatten())) == "Chain(Dense(size=2, bias=True, scheme=None), Flatten())"
