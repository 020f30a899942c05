"""Initial weights: their variance by the papers' formulas, orthogonality, dtypes, names."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxbp
from jaxbp import MLP, initializers

INPUTS, OUTPUTS = 300, 100  # unequal, so that fan-in and fan-out cannot be mistaken for one another
VARIANCE = {  # He et al. 2015, eq. 10; Glorot & Bengio 2010, eq. 12; LeCun et al. 1998, §4.6
    "he": 2 / INPUTS,
    "glorot": 2 / (INPUTS + OUTPUTS),
    "lecun": 1 / INPUTS,
    "normal": 0.01**2,
}
VARIANCE |= {f"{name}_{kind}": VARIANCE[name] for name in ("he", "glorot", "lecun") for kind in ("normal", "uniform")}
WIDE = [jnp.float32, jnp.float64]


def draw(scheme, dtype=jnp.float32, **options):
    return jaxbp.init(MLP((INPUTS, OUTPUTS)), jax.random.key(0), scheme, dtype=dtype, **options)[0]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scheme", VARIANCE)
def test_mean_and_variance(scheme, dtype):
    """30,000 draws: the mean is within 5 standard errors of 0, the variance within 5 √(2/n) of its formula; a normal
    sample has the largest standard error, √(2/n), of the three distributions."""
    w = np.asarray(draw(scheme, dtype).w, np.float64)
    assert abs(w.mean()) <= 5 * np.sqrt(VARIANCE[scheme] / w.size)
    assert abs(w.var() / VARIANCE[scheme] - 1) <= 5 * np.sqrt(2 / w.size)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("sizes", [(8, 8), (12, 5), (5, 12)])
def test_orthogonal(sizes, dtype):
    """w wᵀ = 1 or wᵀ w = 1, whichever is the smaller; ε × width."""
    w = np.asarray(jaxbp.init(MLP(sizes), jax.random.key(0), "orthogonal", dtype=dtype)[0].w)
    gram = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
    np.testing.assert_allclose(gram, np.eye(min(sizes)), atol=max(sizes) * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [*WIDE, jnp.bfloat16])
@pytest.mark.parametrize("scheme", sorted(initializers.WEIGHTS.keys() - {"orthogonal"}))
def test_dtype_of_every_parameter(scheme, dtype):
    layer = draw(scheme, dtype, bias="normal")
    assert (
        layer.w.dtype == layer.b.dtype == dtype and layer.w.shape == (OUTPUTS, INPUTS) and layer.b.shape == (OUTPUTS,)
    )


def test_a_name_without_a_distribution_is_the_normal_one():
    for name in ("he", "glorot", "lecun"):
        np.testing.assert_array_equal(draw(name).w, draw(f"{name}_normal").w)
    np.testing.assert_array_equal(
        draw("he").w, jaxbp.init(MLP((INPUTS, OUTPUTS)), jax.random.key(0))[0].w
    )  # the default


def test_biases():
    """Zero by default; drawn by their own key, so that a bias is not a column of the weights."""
    assert np.all(draw("he").b == 0)
    b = np.asarray(draw("normal", bias="normal").b)
    assert abs(b.std() / 0.01 - 1) <= 5 * np.sqrt(1 / (2 * b.size))  # standard error of a standard deviation
    assert not np.isin(b, np.asarray(draw("normal", bias="normal").w)).any()


def test_a_callable_is_an_initializer():
    layer = draw(jax.nn.initializers.constant(0.5), bias=jax.nn.initializers.ones)
    assert np.all(layer.w == 0.5) and np.all(layer.b == 1)


def test_unknown_names_show_the_nearest():
    with pytest.raises(ValueError, match="unknown scheme 'glorott', did you mean 'glorot'"):
        draw("glorott")
    with pytest.raises(ValueError, match="unknown bias 'zero', did you mean 'zeros'"):
        draw("he", bias="zero")


@pytest.mark.slow
def test_a_deep_network_is_drawn_inside_jit_by_a_program_of_one_layer():
    """A thousand layers took XLA minutes. The draws are those outside of jit, with keys of any kind."""
    draw = jax.jit(jaxbp.init, static_argnums=0)
    programs = [draw.lower(MLP((4,) * layers), jax.random.key(0)).as_text() for layers in (11, 101)]
    assert len({program.count("call @") for program in programs}) == 1  # of the functions that draw
    for impl in ("threefry2x32", "rbg"):
        key = jax.random.key(3, impl=impl)
        oracles.assert_same_bits(draw(MLP((5, 4, 4, 3, 4, 4)), key), jaxbp.init(MLP((5, 4, 4, 3, 4, 4)), key))
