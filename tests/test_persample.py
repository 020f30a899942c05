"""Every per-sample quantity against its naive twin, a loop of jax.grad over samples, and the scaling contract.

Tolerances. f64: the contract's 1e-11. f32: the twin is computed in f64 from the same f32 numbers, so what is compared
is the error of ours: ε for each of depth × width roundings of the factors, and 4 times that where a quantity is of
fourth order in them.
"""

import functools
import gc
import weakref

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracles import assert_close, assert_same_bits
from tiers import slow

import jaxbp
from jaxbp import MLP, Affine, Factors, persample

NET = MLP((5, 7, 6, 4), hidden=("tanh", "gelu"), loss="softmax_cross_entropy")
HIDDEN, LOSSES = ("relu", "tanh", "gelu"), ("softmax_cross_entropy", "squared_error", "huber")
NETS = [MLP((5, 7, 6, 4), hidden, loss=loss) for hidden, loss in zip(HIDDEN, LOSSES, strict=True)]
NETS += [MLP((5, 7, 6, 4), hidden, loss=loss) for hidden, loss in zip(HIDDEN, LOSSES[1:] + LOSSES[:1], strict=True)]
NETS += [MLP((5, 7, 6, 4), hidden, loss=loss) for hidden, loss in zip(HIDDEN, LOSSES[2:] + LOSSES[:2], strict=True)]
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 3.0])  # N = 7

factors = jax.jit(jaxbp.factors, static_argnums=0)


def tol(dtype, net=NET):
    return 1e-11 if dtype == jnp.float64 else 4 * oracles.tolerance(dtype, len(net.sizes), max(net.sizes))


@functools.cache
def case(net=NET, dtype=jnp.float64, batch=7, seed=0):
    """params, x, y, the factors, and the naive gradients by layer."""
    params, x, y = oracles.data(net, seed, batch, dtype)
    return params, x, y, factors(net, params, x, y)[1], oracles.gradient_rows(net, params, x, y)


def jitted(name, **static):
    """persample.<name>, compiled once for each setting of its keywords."""
    return _jitted(name, tuple(static.items()))


@functools.cache
def _jitted(name, static):
    return jax.jit(functools.partial(getattr(persample, name), **dict(static)))


def whole(rows):
    return np.concatenate(rows, axis=1)


def take(f, rows):
    """The factors of some samples, indexed by NumPy, which compiles nothing."""
    return jax.tree.map(lambda a: np.asarray(a)[rows], f)


# Against the naive twins --------------------------------------------------------------------------------------------


def from_rows(net, reduce):
    return lambda rows, others: oracles.like_params(net, [reduce(r, r2) for r, r2 in zip(rows, others, strict=True)])


def twins(net, bound):
    """name → (ours from two batches' factors and v, the twin from their rows and v's)."""
    p, w = persample, jnp.asarray(WEIGHTS)

    def variances(unbiased, weights):
        return from_rows(net, lambda r, _: oracles.variance(r, weights, unbiased))

    def signal(r, _):
        mean, spread = np.abs(r.mean(0)), np.sqrt(oracles.variance(r, np.ones(len(r)), True))
        return np.divide(mean, spread, where=mean != 0, out=np.zeros_like(mean))  # 0 for a dead relu's rows

    def clip_layers(rows, _):
        pairs = [oracles.clipped_mean(r, bound / 2, WEIGHTS) for r in rows]
        return oracles.like_params(net, [mean for mean, _ in pairs]), tuple(np.array(f) for _, f in pairs)

    def clip(rows, _):
        mean, fraction = oracles.clipped_mean(whole(rows), bound, WEIGHTS)
        layers = np.split(mean, np.cumsum([r.shape[1] for r in rows])[:-1])
        return oracles.like_params(net, layers), np.array(fraction)

    def arrays(values):
        return [np.array(v) for v in values]

    def normed(g):
        return g / np.sqrt(np.sum(g**2, axis=1, keepdims=True))

    return {
        "gradients": (lambda f, g: p.gradients(f), lambda a, b: oracles.like_params(net, a)),
        "mean_gradient": (lambda f, g: p.mean_gradient(f), from_rows(net, lambda r, _: r.mean(0))),
        "squared_norms": (lambda f, g: p.squared_norms(f), lambda a, b: np.sum(whole(a) ** 2, 1)),
        "squared_norms by layer": (
            lambda f, g: p.squared_norms(f, per_layer=True),
            lambda a, b: [np.sum(r**2, 1) for r in a],
        ),
        "dot": (lambda f, g: p.dot(f, p.mean_gradient(g)), lambda a, b: whole(a) @ whole(b).mean(0)),
        "dot by layer": (
            lambda f, g: p.dot(f, p.mean_gradient(g), per_layer=True),
            lambda a, b: [r @ s.mean(0) for r, s in zip(a, b, strict=True)],
        ),
        "gram": (lambda f, g: p.gram(f), lambda a, b: whole(a) @ whole(a).T),
        "gram of two": (lambda f, g: p.gram(f, g), lambda a, b: whole(a) @ whole(b).T),
        "gram by layer": (
            lambda f, g: p.gram(f, g, per_layer=True),
            lambda a, b: [r @ s.T for r, s in zip(a, b, strict=True)],
        ),
        "cosine": (lambda f, g: p.cosine(f), lambda a, b: normed(whole(a)) @ normed(whole(a)).T),
        "cosine of two": (lambda f, g: p.cosine(f, g), lambda a, b: normed(whole(a)) @ normed(whole(b)).T),
        "second_moment": (lambda f, g: p.second_moment(f), from_rows(net, lambda r, _: np.mean(r**2, 0))),
        "second_moment, weighted": (
            lambda f, g: p.second_moment(f, w, 3.0),
            from_rows(net, lambda r, _: WEIGHTS @ r**2 / 3),
        ),
        "variance": (lambda f, g: p.variance(f), variances(True, np.ones(7))),
        "variance, biased": (lambda f, g: p.variance(f, unbiased=False), variances(False, np.ones(7))),
        "variance, weighted": (lambda f, g: p.variance(f, w), variances(True, WEIGHTS)),
        "signal_to_noise": (lambda f, g: p.signal_to_noise(f), from_rows(net, signal)),
        "clipped_mean": (lambda f, g: tuple(p.clipped_mean(f, bound, w)), clip),
        "clipped_mean by layer": (lambda f, g: tuple(p.clipped_mean(f, bound / 2, w, per_layer=True)), clip_layers),
        "noise_scale": (lambda f, g: p.noise_scale(f), lambda a, b: arrays(oracles.noise_scale(whole(a), np.ones(7)))),
        "noise_scale, weighted": (
            lambda f, g: p.noise_scale(f, w),
            lambda a, b: arrays(oracles.noise_scale(whole(a), WEIGHTS)),
        ),
        "noise_scale by layer": (
            lambda f, g: p.noise_scale(f, per_layer=True),
            lambda a, b: [np.array(v) for r in a for v in oracles.noise_scale(r, np.ones(7))],
        ),
        "diversity": (
            lambda f, g: p.diversity(f),
            lambda a, b: np.sum(whole(a) ** 2) / np.sum(whole(a).sum(0) ** 2),
        ),
        "diversity, weighted": (
            lambda f, g: p.diversity(f, w),
            lambda a, b: WEIGHTS @ np.sum(whole(a) ** 2, 1) / np.sum((WEIGHTS @ whole(a)) ** 2),
        ),
        "coherence": (
            lambda f, g: p.coherence(f),
            lambda a, b: np.mean(whole(a) @ whole(a).T) / np.mean(np.sum(whole(a) ** 2, 1)),
        ),
        "stiffness": (
            lambda f, g: p.stiffness(f, weights=w),
            lambda a, b: arrays(oracles.stiffness(whole(a), whole(a), WEIGHTS, True)),
        ),
        "stiffness of two": (
            lambda f, g: p.stiffness(f, g, weights=w),
            lambda a, b: arrays(oracles.stiffness(whole(a), whole(b), WEIGHTS, False)),
        ),
        "grand": (lambda f, g: p.grand(f), lambda a, b: np.sqrt(np.sum(whole(a) ** 2, 1))),
        "el2n": (lambda f, g: p.el2n(f), lambda a, b: np.linalg.norm(a[-1][:, -net.sizes[-1] :], axis=1)),
        "influence": (
            lambda f, g: p.influence([f, g], [g, f], [0.5, jnp.float32(0.25)]),
            lambda a, b: 0.5 * whole(a) @ whole(b).T + 0.25 * whole(b) @ whole(a).T,
        ),
    }


def conditioning(name, rows):
    """How much a relative error of the gradients grows in the quantity, where it is a difference."""
    g = whole(rows)
    if name.startswith(("noise_scale", "diversity", "coherence")):  # ‖ḡ‖² and |G|² can be far below the mean ‖gₙ‖²
        worst = 1.0
        for part in [g, *rows]:
            for weights in (np.ones(7), WEIGHTS):
                squared, trace, _ = oracles.noise_scale(part, weights)
                size = np.mean(np.sum(part**2, 1))
                worst = max(worst, size / abs(squared), size / trace, (size / squared) ** 2)
        return worst
    return 1.0


@jax.jit
def every_quantity(f, g, bound):
    """All of them in one compiled function, the same for each network of these widths."""
    return {name: quantity(f, g) for name, (quantity, _) in twins(NET, bound).items()}


@pytest.mark.parametrize(
    ("net", "dtype"),
    [
        (NETS[1], jnp.float64),
        *slow(*((net, jnp.float64) for net in NETS if net is not NETS[1]), *((net, jnp.float32) for net in NETS[:3])),
    ],
    ids=lambda v: f"{v.hidden}-{v.loss}" if isinstance(v, MLP) else v.__name__,
)
def test_every_quantity_is_its_naive_twin(net, dtype):
    """The bound is about the median norm, which clips some samples and leaves others."""
    _, _, _, f, rows = case(net, dtype)
    _, _, _, other, other_rows = case(net, dtype, seed=1)
    bound = float(np.median(np.linalg.norm(whole(rows), axis=1))) * (1 + 1e-4)  # at the median a rounding would decide
    ours = every_quantity(f, other, bound)
    for name, (_, twin) in twins(net, bound).items():
        want = twin(rows, other_rows)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(ours[name])), name
        assert_close(ours[name], want, tol(dtype, net) * conditioning(name, rows), f"{net} {name}")


def test_the_twins_cover_every_public_quantity():
    named = {name.replace(",", " ").split()[0] for name in twins(NET, 1.0)}
    types = {"Clipped", "NoiseScale", "Stiffness"}
    elsewhere = {
        "gram_matrix",
        "map_chunks",
        *(f"{name}_from_norms" for name in ("noise_scale", "diversity", "coherence")),
    }
    assert named == set(persample.__all__) - types - elsewhere


# The whole range of the dtype --------------------------------------------------------------------------------------


def exact_rows(f):
    """The gradients by layer in x86's 80-bit floats, whose exponents reach ±4932."""
    pairs = [(np.asarray(x, np.longdouble), np.asarray(d, np.longdouble)) for x, d in zip(f.x, f.delta, strict=True)]
    return [np.concatenate([(d[:, :, None] * x[:, None]).reshape(len(x), -1), d], axis=1) for x, d in pairs]


def assert_right(got, want, tolerance, what):
    """As `assert_close` where a leaf's largest number is normal; not finite where it overflows, 0 where it is lost."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, size, info = np.asarray(a, np.longdouble), np.max(np.abs(b), initial=0), jnp.finfo(a.dtype)
        if size > float(info.max) * 0.99:
            assert not np.all(np.isfinite(a)), what
        else:
            error = np.max(np.abs(a - b), initial=0)
            assert error <= tolerance * size + 4 * float(info.tiny), f"{what}: {error} of {size}"


@pytest.mark.parametrize("sizes", [(1, -1), (-1, 1), (-1, -1), (1, 1), (0.6, 0), (0, -0.9)], ids=str)
@pytest.mark.parametrize(("dtype", "power"), [*slow((jnp.float32, 30)), (jnp.float64, 250)])
def test_factors_of_any_size(dtype, power, sizes):
    """x and δ times 10^±30 or 10^±250: right, or ∞ or 0 where the result itself is out of range; a g may be 10⁶⁰."""
    scales = [10.0 ** (power * size) for size in sizes]

    def scaled(seed):
        f = case(dtype=dtype, seed=seed)[3]
        return Factors(*(tuple(a * a.dtype.type(scale) for a in part) for part, scale in zip(f, scales, strict=True)))

    f, g = scaled(0), scaled(1)
    rows, others = exact_rows(f), exact_rows(g)
    bound = float(min(np.median(np.linalg.norm(whole(rows), axis=1)), 10.0**power)) * (1 + 1e-4)
    ours = every_quantity(f, g, bound)
    representable = scales[0] * scales[1] < float(jnp.finfo(dtype).max) / 1e6
    for name, (_, twin) in twins(NET, bound).items():
        if representable or name.split(",")[0].split()[0] not in ("variance", "signal_to_noise", "noise_scale"):
            want = twin(rows, others)
            assert_right(ours[name], want, tol(dtype) * conditioning(name, rows), name)


@pytest.mark.slow
@settings(max_examples=6)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    batch=st.integers(1, 6),
    hidden=st.sampled_from(HIDDEN),
    seed=st.integers(0, 99),
)
def test_any_shape(sizes, batch, hidden, seed):
    net = MLP(sizes, hidden, loss="squared_error")
    params, x, y = oracles.data(net, seed, batch)
    rows = oracles.gradient_rows(net, params, x, y)
    g = whole(rows)

    @jax.jit
    def compute(params, x, y):
        _, f = jaxbp.factors(net, params, x, y)
        p = persample
        return p.gradients(f), p.gram(f), p.squared_norms(f), p.variance(f, unbiased=False)

    gradients, gram, norms, variance = compute(params, x, y)
    assert_close(gradients, oracles.like_params(net, rows), 1e-11, "gradients")
    assert_close(gram, g @ g.T, 1e-11, "gram")
    assert_close(norms, np.sum(g**2, 1), 1e-11, "squared_norms")
    spread = [oracles.variance(r, np.ones(batch), False) for r in rows]
    size = [np.max(np.mean(r**2, 0)) for r in rows]  # a variance may be 0 (N = 1): the error is relative to E[g²]
    for ours, want, scale in zip(variance, spread, size, strict=True):
        ours = np.concatenate([np.ravel(a) for a in ours])
        assert np.max(np.abs(ours - want)) <= 1e-11 * scale


def test_the_vmapped_one_liner_of_the_docstring():
    params, x, y, f, _ = case()
    line = "jax.vmap(lambda x, y: jaxbp.value_and_grad(net, params, x[None], y[None])[1])(x, y)"
    assert line in persample.__doc__
    names = {"jax": jax, "jaxbp": jaxbp, "net": NET, "params": params}
    got = jax.jit(lambda x, y: eval(line, {**names, "x": x, "y": y}))(x, y)
    assert_close(got, jitted("gradients")(f), 1e-12, "vmap")


# Scaling and batches ------------------------------------------------------------------------------------------------

PER_SAMPLE = ("squared_norms", "grand", "el2n", "gradients")


def test_per_layer_sums_are_the_totals():
    params, _, _, f, _ = case()
    for name, arguments in {"squared_norms": (f,), "dot": (f, params), "gram": (f,)}.items():
        layers = jitted(name, per_layer=True)(*arguments)
        assert len(layers) == 3
        assert_close(sum(layers), jitted(name)(*arguments), 1e-13, name)
    layers, total = jitted("noise_scale", per_layer=True)(f), jitted("noise_scale")(f)
    assert_close([sum(field) for field in zip(*layers, strict=True)][:2], list(total)[:2], 1e-12, "noise_scale")


@pytest.mark.slow
def test_one_sample():
    """N = 1: no pair, no spread. The unbiased statistics are undefined, and say so by NaN."""
    _, _, _, f, rows = case(batch=1)
    g = whole(rows)
    assert_close(jitted("gram")(f), g @ g.T, 1e-11, "gram")
    assert_close(jitted("mean_gradient")(f), oracles.like_params(NET, [r[0] for r in rows]), 1e-11, "mean")
    assert_close(jitted("second_moment")(f), oracles.like_params(NET, [r[0] ** 2 for r in rows]), 1e-11, "moment")
    assert_close(jitted("cosine")(f), np.ones((1, 1)), 1e-11, "cosine")
    assert_close([jitted("coherence")(f), jitted("diversity")(f)], [np.array(1.0)] * 2, 1e-11, "alignment")
    assert_same_bits(jitted("stiffness")(f), persample.Stiffness(jnp.zeros(()), jnp.zeros(())))
    zeros = jax.tree.map(jnp.zeros_like, jitted("mean_gradient")(f))
    assert_same_bits(jitted("variance", unbiased=False)(f), zeros)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(jitted("variance")(f)))
    assert all(np.isnan(leaf) for leaf in jitted("noise_scale")(f))
    infinite = jitted("signal_to_noise", unbiased=False)(f)
    assert all(np.isinf(leaf[g != 0]).all() for leaf, g in zip(*map(jax.tree.leaves, (infinite, zeros)), strict=True))


@pytest.mark.slow
def test_unequal_parts_give_the_whole():
    """3 + 4 samples: rows are rows of the 7, sums with normalize_by=7 add up."""
    _, _, _, f, _ = case()
    parts = [take(f, slice(None, 3)), take(f, slice(3, None))]

    @jax.jit
    def by_row(f):
        return {name: getattr(persample, name)(f) for name in PER_SAMPLE}

    @jax.jit
    def sums(f):
        p = persample
        return p.mean_gradient(f, None, 7), p.second_moment(f, None, 7), p.clipped_mean(f, 1.5, None, 7).mean

    joined = jax.tree.map(lambda *a: np.concatenate(a), *map(by_row, parts))
    assert_close(joined, by_row(f), 1e-13, "rows")
    gram = jitted("gram")
    assert_close(np.block([[np.asarray(gram(a, b)) for b in parts] for a in parts]), gram(f), 1e-13, "gram")
    added = jax.tree.map(lambda a, b: np.asarray(a) + np.asarray(b), *map(sums, parts))
    assert_close(added, sums(f), 1e-13, "sums")
    assert_close(sums(f)[0], jitted("mean_gradient")(f), 1e-13, "N is the default divisor")


def reductions(f, weights=None):
    """Every quantity that reduces over samples and takes weights."""
    clipped = persample.clipped_mean(f, 1.5, weights)
    return {
        "mean": persample.mean_gradient(f, weights, 3),
        "second": persample.second_moment(f, weights, 3),
        "clipped": persample.clipped_mean(f, 1.5, weights, 3).mean,
        "fraction": clipped.fraction,
        "clipped by layer": tuple(persample.clipped_mean(f, 1.0, weights, 3, per_layer=True)),
        "variance": persample.variance(f, weights),
        "biased": persample.variance(f, weights, unbiased=False),
        "signal": persample.signal_to_noise(f, weights),
        "noise": persample.noise_scale(f, weights),
        "noise by layer": persample.noise_scale(f, weights, per_layer=True),
        "diversity": persample.diversity(f, weights),
        "coherence": persample.coherence(f, weights),
        "stiffness": persample.stiffness(f, None, weights),
    }


reduce = jax.jit(reductions)


@pytest.mark.parametrize("padding", [0.0, np.nan, np.inf], ids=str)
def test_a_sample_of_weight_zero_is_not_there(padding):
    """A mask leaves what the batch without the masked samples gives, whatever the masked samples hold."""
    _, _, _, f, _ = case()
    kept = np.array([0, 2, 3, 4, 6])
    mask = np.zeros(7)
    mask[kept] = 1
    spoilt = jax.tree.map(lambda a: jnp.where(mask[:, None] == 0, padding, a), f)
    assert_close(reduce(spoilt, mask), reduce(take(f, kept), np.ones(5)), 1e-11, "masked")


def test_a_nan_sample_of_other_weight_shows():
    """And only where it is: its own row, its own row and column of the Gram matrix, every mean."""
    _, _, _, f, _ = case()
    spoilt = Factors(f.x, (*f.delta[:-1], f.delta[-1].at[2, 0].set(jnp.nan)))
    bad = np.arange(7) == 2
    np.testing.assert_array_equal(np.isnan(jitted("squared_norms")(spoilt)), bad)
    np.testing.assert_array_equal(np.isnan(jitted("gram")(spoilt)), bad[:, None] | bad[None])
    for name, result in reduce(spoilt, np.ones(7)).items():
        if name != "fraction":  # counts comparisons
            assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(result)), name


@pytest.mark.parametrize("batch", [0, 7])
def test_an_empty_or_all_masked_batch_gives_zeros(batch):
    _, _, _, f, _ = case()
    for leaf in jax.tree.leaves(reduce(take(f, slice(batch)), np.zeros(batch))):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    empty = take(f, slice(0))
    assert jitted("gram")(empty).shape == (0, 0) and jitted("gram")(f, empty).shape == (7, 0)
    assert jitted("squared_norms")(empty).shape == (0,)


def test_integer_weights_are_copies():
    """Weight k is the sample k times, where copies are all that a statistic sees (not the unbiased ones)."""
    _, _, _, f, _ = case()
    counts = np.array([1, 0, 2, 1, 1, 0, 2])  # 7 in all: the same program
    copies, weights = take(f, np.repeat(np.arange(7), counts)), counts.astype(float)
    names = ("biased", "diversity", "coherence", "second", "mean", "clipped")
    ours, want = reduce(f, weights), reduce(copies, np.ones(7))
    assert_close([ours[name] for name in names], [want[name] for name in names], 1e-11, "copies")


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_repeated_samples_have_no_variance(dtype):
    """E[g²] − ḡ² would leave ε ḡ², so a signal to noise of about √(1/ε); centred factors leave at most (ε g)² of it."""
    _, _, _, f, _ = case(dtype=dtype)
    same = take(f, np.zeros(7, int))
    eps = float(jnp.finfo(dtype).eps)
    names = ("variance", "second_moment", "signal_to_noise", "cosine", "coherence", "diversity")
    got = jax.jit(lambda f: {name: getattr(persample, name)(f) for name in names})(same)
    variance, second, ratio = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(got[name])]) for name in names[:3]
    )
    assert np.all(variance >= 0) and np.all(variance <= (8 * eps) ** 2 * second)
    assert_close([got[n] for n in names[3:]], [np.ones((7, 7)), np.array(1.0), np.array(1 / 7)], tol(dtype), "same")
    np.testing.assert_array_equal(ratio[second == 0], 0)
    assert np.all(ratio[second != 0] >= 0.1 / eps)


def test_variance_keeps_its_digits_beside_a_large_mean():
    """f32, inputs around 1000 with spread 1: E[g²] − ḡ² loses 6 of 7 digits, the centred factors none."""
    rng = np.random.default_rng(0)
    x, delta = (1000 + rng.standard_normal((64, 5))).astype(np.float32), rng.standard_normal((64, 3)) * 1e-3 + 1
    f = Factors((jnp.asarray(x),), (jnp.asarray(delta.astype(np.float32)),))
    rows = np.float64(f.delta[0])[:, :, None] * np.float64(f.x[0])[:, None, :]
    assert_close(jitted("variance")(f)[0].w, rows.var(axis=0, ddof=1), 64 * 2.0**-23, "variance")


def test_variance_sums_to_the_trace():
    _, _, _, f, _ = case()
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(jitted("variance")(f)))
    assert_close(total, jitted("noise_scale")(f).trace, 1e-12, "trace")


def test_a_negative_estimate_is_returned():
    """Two opposite gradients: |G|² = ⟨g₁, g₂⟩ < 0."""
    f = Factors((jnp.ones((2, 1)),), (jnp.array([[1.0], [-2.0]]),))
    squared, trace, scale = persample.noise_scale(f)
    assert (float(squared), float(trace), float(scale)) == (-4.0, 9.0, -2.25)


def test_noise_scale_is_unbiased():
    """Its mean over all 4⁴ batches of 4 drawn from a population of 4 gradients is the population's |G|² and tr Σ."""
    _, _, _, f, rows = case()
    population = whole(rows)[:4]
    batches = np.array(np.meshgrid(*[np.arange(4)] * 4)).reshape(4, -1).T
    estimates = jax.jit(jax.vmap(lambda batch: persample.noise_scale(jax.tree.map(lambda a: a[batch], f))))(batches)
    want = [np.sum(population.mean(0) ** 2), np.sum(population.var(0))]
    assert_close([np.mean(a) for a in estimates[:2]], [np.array(v) for v in want], 1e-11, "unbiased")


def test_integers_among_the_norms_cut_nothing():
    """An int for the first norm made 2.5 samples 2."""
    for first in (13, 13.0, np.int64(13), jnp.int32(13)):
        want = [np.array(v) for v in (19 / 3, 20 / 3, 20 / 19)]  # (2.5 · 9 − 13)/1.5, (13 − 9)/(1 − 1/2.5)
        assert_close(list(persample.noise_scale_from_norms(first, 9, 1, 2.5)), want, 1e-12, "norms")
    assert float(persample.diversity_from_norms(13, 9, 2.5)) == pytest.approx(13 / 9 / 2.5)
    assert float(persample.coherence_from_norms(13, 9)) == pytest.approx(9 / 13)
    assert not any(map(float, (persample.diversity_from_norms(0, 0, 3), persample.coherence_from_norms(0, 0))))


def test_the_trace_keeps_its_digits_where_samples_agree():
    """A spread of 1e-6 beside gradients of 1: E‖g‖² − ‖ḡ‖² has lost 12 of 16 digits, centred factors 6 at most."""
    rng = np.random.default_rng(0)
    f = Factors((1 + 1e-6 * rng.standard_normal((9, 5)),), (1 + 1e-6 * rng.standard_normal((9, 3)),))
    rows = exact_rows(f)[0]
    got = persample.noise_scale(jax.tree.map(jnp.asarray, f))
    assert_close(got.trace, np.array(float(np.sum(rows.var(axis=0, ddof=1)))), 1e-9, "trace")


@pytest.mark.parametrize("weights", [[1, 1e-9, 0], [1e-9, 1, 1e-12], [1e30, 1e21, 1e18], [1e-30, 1e-21, 0]], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_weights_of_any_size(weights, dtype):
    """Shares of 1 and 1e-9: 1 − Σ p² is 2e-9, not 0; and sums of weights neither overflow nor vanish."""
    _, _, _, f, rows = case(batch=3, dtype=dtype)
    w = np.array(weights, np.float64 if dtype == jnp.float64 else np.float32)
    want = [oracles.variance(r.astype(np.longdouble), w.astype(np.longdouble), False) for r in rows]
    p = w.astype(np.longdouble) / np.sum(w.astype(np.longdouble))
    distinct = sum(p[n] * p[m] for n in range(3) for m in range(3) if n != m)
    with jax.numpy_dtype_promotion("standard"):
        got = jitted("variance")(f, jnp.asarray(w))
        stiffness = jitted("stiffness")(f, None, jnp.asarray(w))
    assert_right(got, oracles.like_params(NET, [v / distinct for v in want]), 1e3 * tol(dtype), "variance")
    assert_right(
        list(stiffness),
        [np.array(v) for v in oracles.stiffness(whole(rows), whole(rows), np.asarray(p), True)],
        1e2 * tol(dtype),
        "stiffness",
    )


def test_noise_scale_from_norms_of_two_batch_sizes():
    """|G|² = 3, tr Σ = 8: |G_B|² = 3 + 8/B in expectation, whatever the two sizes are."""
    for small, big in ((1, 2), (4, 16)):
        got = persample.noise_scale_from_norms(3 + 8 / small, 3 + 8 / big, small, big)
        assert_close(list(got), [np.array(3.0), np.array(8.0), np.array(8 / 3)], 1e-12, "norms")


def test_permuted_samples():
    _, _, _, f, _ = case()
    order = np.random.default_rng(0).permutation(7)
    moved = take(f, order)
    for name in PER_SAMPLE:
        assert_close(jitted(name)(moved), take(jitted(name)(f), order), 1e-13, name)
    assert_close(jitted("gram")(moved), jitted("gram")(f)[order][:, order], 1e-13, "gram")
    assert_close(reduce(moved, WEIGHTS[order]), reduce(f, WEIGHTS), 1e-11, "reductions")


# Clipping -----------------------------------------------------------------------------------------------------------


def test_an_infinite_bound_clips_nothing():
    _, _, _, f, _ = case()
    for per_layer in (False, True):
        clipped = jitted("clipped_mean", per_layer=per_layer)(f, jnp.inf)
        assert_same_bits(clipped.mean, jitted("mean_gradient")(f))
        assert not np.any(clipped.fraction)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_clipped_gradient_has_at_most_the_bound(dtype):
    """One sample at a time through clipped_mean; each is clipped or left as it is, and both happen."""
    _, _, _, f, _ = case(dtype=dtype)
    norms = np.asarray(jitted("grand")(f))
    bound = float(np.median(norms))
    clip = jax.jit(jax.vmap(lambda sample: persample.clipped_mean(jax.tree.map(lambda a: a[None], sample), bound)))
    clipped = clip(f)
    leaves = [np.float64(leaf).reshape(7, -1) for leaf in jax.tree.leaves(clipped.mean)]
    got = np.linalg.norm(np.concatenate(leaves, axis=1), axis=1)
    assert np.all(got <= bound * (1 + 1e-6))
    np.testing.assert_array_equal(clipped.fraction, norms > bound)
    assert 0 < np.mean(clipped.fraction) < 1
    np.testing.assert_allclose(got[norms <= bound], norms[norms <= bound], rtol=4e-6)
    np.testing.assert_allclose(got[norms > bound], bound, rtol=4e-6)


def test_replacing_one_sample_moves_the_clipped_mean_by_at_most_2C_over_N():
    """And nearly by that: two opposite gradients beyond the bound reach it."""
    _, _, _, f, _ = case()
    _, _, _, other, _ = case(seed=1)
    bound = 0.5
    clip = jax.jit(lambda f: persample.clipped_mean(f, bound).mean)
    for n in range(7):
        replaced = jax.tree.map(lambda a, b, n=n: a.at[n].set(b[n]), f, other)
        moved = jax.tree.map(jnp.subtract, clip(f), clip(replaced))
        assert np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(moved))) <= 2 * bound / 7 * (1 + 1e-12)
    flipped = Factors(f.x, tuple(delta.at[0].multiply(-1) for delta in f.delta))
    moved = jax.tree.map(jnp.subtract, clip(f), clip(flipped))
    assert float(jitted("grand")(f)[0]) > bound
    np.testing.assert_allclose(np.sqrt(sum(np.sum(a**2) for a in jax.tree.leaves(moved))), 2 * bound / 7, rtol=1e-12)


def test_a_bound_for_each_layer():
    _, _, _, f, rows = case()
    bounds = np.array([np.median(np.linalg.norm(r, axis=1)) for r in rows]) * (1 + 1e-4)
    clipped = jitted("clipped_mean", per_layer=True)(f, bounds)
    want = [oracles.clipped_mean(r, bound, np.ones(7)) for r, bound in zip(rows, bounds, strict=True)]
    assert_close(clipped.mean, oracles.like_params(NET, [mean for mean, _ in want]), 1e-11, "mean")
    np.testing.assert_allclose(np.array(clipped.fraction), [fraction for _, fraction in want])


def test_zero_gradients_and_a_zero_bound():
    """No 0/0: a sample that is fitted perfectly has norm 0, cosine 0, and is not clipped."""
    _, _, _, f, _ = case()
    f = Factors(f.x, tuple(delta.at[1].set(0) for delta in f.delta))
    assert float(jitted("clipped_mean")(f, 0.0).fraction) == pytest.approx(6 / 7)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jitted("clipped_mean")(f, 0.0).mean))
    np.testing.assert_array_equal(jitted("cosine")(f)[1], np.zeros(7))


def test_a_network_of_one_layer_takes_a_bound_for_each_layer():
    f = Factors((jnp.ones((2, 3)),), (jnp.ones((2, 1)),))
    got = [persample.clipped_mean(f, bound, per_layer=True) for bound in (np.array([0.5]), 0.5)]
    assert_same_bits(*got)
    with pytest.raises(ValueError, match=r"max_norm has shape \(1,\), expected \(\)"):
        persample.clipped_mean(f, np.array([0.5]))


def test_a_clipped_gradient_in_bfloat16_has_at_most_the_bound():
    """300 samples alone, as the factors round them; a norm may exceed 1 by 2⁻⁸ in each of two roundings otherwise."""
    rng = np.random.default_rng(0)
    f = Factors(*((jnp.asarray(rng.standard_normal((300, n)), jnp.bfloat16),) for n in (2, 3)))
    clip = jax.vmap(lambda sample: persample.clipped_mean(jax.tree.map(lambda a: a[None], sample), 0.01).mean)
    ((w, b),) = jax.jit(clip)(f)
    norms = np.sqrt(np.sum(np.float64(w) ** 2, (1, 2)) + np.sum(np.float64(b) ** 2, 1))
    assert np.all(norms <= 0.01) and np.all(norms >= 0.0098)


# Dtypes, devices, errors --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_factors_accumulate_in_float32():
    """Everything but gradients is the float32 result of the rounded factors, to float32's digits."""
    params, _, _, f, _ = case(dtype=jnp.float32)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), f)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    names = ("squared_norms", "gram", "cosine", "variance", "second_moment", "noise_scale", "grand", "coherence")

    @jax.jit
    def compute(f):
        return {name: getattr(persample, name)(f) for name in names} | {"dot": persample.dot(f, params)}

    got, want = compute(narrow), compute(rounded)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    for name in names:
        assert_close(got[name], want[name], tol(jnp.float32), name)
    clipped = jitted("clipped_mean")(narrow, 1.0)
    assert clipped.mean[0].w.dtype == jnp.bfloat16 and clipped.fraction.dtype == jnp.float32
    assert_close(clipped.mean, jitted("clipped_mean")(rounded, 1.0).mean, 3 * 2.0**-8, "clipped")


@pytest.mark.devices
@pytest.mark.slow
def test_samples_on_four_devices_give_the_same_numbers():
    _, _, _, f, _ = case(batch=8)
    mesh = Mesh(np.array(jax.devices()), ("n",))
    spread = jax.device_put(f, NamedSharding(mesh, PartitionSpec("n")))
    assert len(spread.x[0].sharding.device_set) == 4
    weights = np.array([1.0, 0, 1, 1, 2, 1, 0, 1])
    assert_close(reduce(spread, weights), reduce(f, weights), 1e-11, "sharded")
    for name in (*PER_SAMPLE, "gram"):
        assert_close(jitted(name)(spread), jitted(name)(f), 1e-12, name)


@pytest.mark.slow
def test_under_vmap():
    """Factors of two batches, stacked."""
    batches = [case()[3], case(seed=1)[3]]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    got = jax.jit(jax.vmap(reductions))(stacked, np.ones((2, 7)))
    assert_close(
        got, jax.tree.map(lambda *a: jnp.stack(a), *(reduce(batch, np.ones(7)) for batch in batches)), 1e-11, "vmap"
    )


def test_el2n_is_the_error_of_the_softmax():
    params, x, y, f, _ = case()
    outputs = jax.vmap(lambda x: oracles.network(oracles.sigmas(NET), params, x))(x)
    want = np.linalg.norm(jax.nn.softmax(outputs) - jax.nn.one_hot(y, 4), axis=1)
    assert_close(persample.el2n(f), want, 1e-12, "el2n")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: persample.clipped_mean(f, -1.0), "max_norm is -1.0, allowed: max_norm ≥ 0"),
        (lambda f: persample.clipped_mean(f, np.nan), "max_norm is nan, allowed: max_norm ≥ 0"),
        (lambda f: persample.clipped_mean(f, np.ones(3)), r"max_norm has shape \(3,\), expected \(\)"),
        (lambda f: persample.clipped_mean(f, np.ones(2), per_layer=True), r"expected \(\) or \(3,\)"),
        (lambda f: persample.clipped_mean(f, 1.0, jnp.ones(6)), r"weights has shape \(6,\), expected \(7,\)"),
        (lambda f: persample.variance(f, jnp.ones((7, 1))), r"weights has shape \(7, 1\)"),
        (lambda f: persample.dot(f, (Affine(jnp.ones((7, 5)), jnp.ones(7)),)), "params has 1 layers"),
        (lambda f: persample.gram(f, Factors(f.x[:2], f.delta[:2])), "not the same network"),
        (lambda f: persample.stiffness(f, None, None, jnp.ones(7)), "other_weights is given without other"),
        (lambda f: persample.influence([f], [f], []), "have 1, 1 and 0 checkpoints"),
        (lambda f: persample.influence([], [], []), "at least one"),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(case()[3])


# A whole data set ---------------------------------------------------------------------------------------------------


def scores(losses, f):
    return {"loss": losses, "norm": persample.grand(f), "delta": f.delta[-1]}


@pytest.mark.parametrize("chunk_size", [4, 11, 100])
def test_chunks_give_what_the_whole_gives(chunk_size):
    """N = 11: ragged, exact and oversized chunks."""
    params, x, y, f, _ = case(batch=11)
    want = scores(factors(NET, params, x, y)[0], f)
    assert_close(persample.map_chunks(scores, NET, params, x, y, chunk_size), want, 1e-13, "chunks")


def test_chunks_of_an_empty_data_set_of_bytes_and_under_jit():
    params, x, y, _, _ = case(batch=11)
    empty = persample.map_chunks(scores, NET, params, x[:0], y[:0], 4)
    assert {name: a.shape for name, a in empty.items()} == {"loss": (0,), "norm": (0,), "delta": (0, 4)}
    pixels = np.random.default_rng(0).integers(0, 255, (11, 5), np.uint8)
    want = persample.map_chunks(scores, NET, params, pixels.astype(np.float64), y, 4)
    assert_same_bits(persample.map_chunks(scores, NET, params, pixels, np.asarray(y), 4), want)
    inside = jax.jit(
        lambda params: persample.map_chunks(lambda losses, f: losses + persample.dot(f, params), NET, params, x, y, 4)
    )
    losses, f = factors(NET, params, x, y)
    assert_close(inside(params), losses + persample.dot(f, params), 1e-13, "a quantity that closes over a tracer")


@pytest.mark.slow
def test_a_quantity_and_its_program_are_forgotten():
    """A lambda in a loop left its program behind at each turn."""
    params, x, y, _, _ = case(batch=11)
    quantities = [lambda losses, _, i=i: losses + i for i in range(3)]
    alive = [weakref.ref(quantity) for quantity in quantities]
    for quantity in quantities:
        persample.map_chunks(quantity, NET, params, x, y, 4)
    del quantity, quantities
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [3, 20])
def test_gram_matrix_in_blocks(chunk_size):
    params, x, y, f, _ = case(batch=11)
    other = oracles.data(NET, 5, 7)[1:]
    between = persample.gram(f, factors(NET, params, *other)[1])
    assert_close(persample.gram_matrix(NET, params, x, y, chunk_size), persample.gram(f), 1e-13, "gram")
    assert_close(persample.gram_matrix(NET, params, x, y, chunk_size, other), between, 1e-13, "between")


@pytest.mark.production
@pytest.mark.slow
def test_chunked_memory_does_not_grow_with_the_data_set():
    """Scratch of the compiled programs at ten times the data. The Gram matrix holds one strip of columns."""
    net = MLP((64, 256, 128, 10))
    params = jaxbp.init(net, jax.random.key(0))

    def scratch(program, samples):
        x, y = jnp.zeros((samples, 64), jnp.float32), jnp.zeros(samples, int)
        return jax.jit(program).lower(params, x, y).compile().memory_analysis().temp_size_in_bytes

    def norms(params, x, y, chunk_size=64):
        return persample.map_chunks(lambda _, f: persample.squared_norms(f), net, params, x, y, chunk_size)

    def products(params, x, y):
        return persample.gram_matrix(net, params, x, y, 64)

    assert scratch(norms, 6400) - scratch(norms, 640) <= 4 * 64
    strip = 64 * (6400 - 640) * 4  # 64 rows × the added columns, float32; computed transposed, so perhaps twice
    assert scratch(products, 6400) - scratch(products, 640) <= 2.1 * strip
    ten_chunks = functools.partial(norms, chunk_size=640)
    assert scratch(ten_chunks, 6400) - scratch(norms, 6400) > 5e5  # so that the bounds above can be missed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size is 0, allowed: chunk_size ≥ 1"),
        ({"x": np.ones((7, 4))}, ValueError, r"x has shape \(7, 4\), expected \(N, 5\)"),
        ({"y": np.full(7, 9)}, ValueError, r"y\[0\] is 9"),
        ({"y": np.ones(7)}, TypeError, "labels have to be integers"),
        ({"quantity": lambda _, f: persample.mean_gradient(f)}, ValueError, r"expected \(3, …\)"),
        ({"quantity": lambda losses, _: jnp.sum(losses)}, ValueError, r"expected \(3, …\)"),
    ],
)
def test_errors_of_the_chunked_map(arguments, error, message):
    params, x, y, _, _ = case()
    call = {"quantity": scores, "x": x, "y": y, "chunk_size": 3, **arguments}
    with pytest.raises(error, match=message):
        persample.map_chunks(net=NET, params=params, **call)
