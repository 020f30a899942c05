"""The shapes and dtypes that the docstrings promise, checked by jaxtyping on one network: a letter is one length
in a call."""

# ruff: noqa: F722, F821 (jaxtyping's shapes are strings, not forward references)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Array, Float, Float32, Int, Key, TypeCheckError, jaxtyped

import jaxbp
from jaxbp import MLP, Affine, Factors, Tape

NET = MLP((3, 4, 2))
typed = jaxtyped(typechecker=beartype)


@typed
def init(
    key: Key[Array, ""],
) -> tuple[Float32[Array, "4 3"], Float32[Array, "4"], Float32[Array, "2 4"], Float32[Array, "2"]]:
    return tuple(leaf for layer in jaxbp.init(NET, key) for leaf in layer)


@typed
def parameters(params: tuple) -> tuple[Float[Array, "h i"], Float[Array, "h"], Float[Array, "o h"], Float[Array, "o"]]:
    assert all(type(layer) is Affine for layer in params) and type(params) is tuple
    return tuple(leaf for layer in params for leaf in layer)


@typed
def forward(
    params: tuple, x: Float[Array, "i"]
) -> tuple[tuple[Float[Array, "i"], Float[Array, "h"], Float[Array, "o"]], tuple[Float[Array, "h"], Float[Array, "o"]]]:
    tape = jaxbp.forward(NET, params, x)
    assert type(tape) is Tape
    return tuple(tape)


@typed
def backward(params: tuple, tape: Tape, dl_dx: Float[Array, "o"]) -> tuple[Float[Array, "h"], Float[Array, "o"]]:
    return jaxbp.backward(NET, params, tape, dl_dx)


@typed
def factors(
    params: tuple, x: Float[Array, "n i"], y: Int[Array, "n"] | Float[Array, "n o"]
) -> tuple[
    Float[Array, "n"], tuple[Float[Array, "n i"], Float[Array, "n h"]], tuple[Float[Array, "n h"], Float[Array, "n o"]]
]:
    losses, both = jaxbp.factors(NET, params, x, y)
    assert type(both) is Factors
    return losses, *both


@typed
def value_and_grad(
    params: tuple, x: Float[Array, "n i"], y: Int[Array, "n"], weights: Float[Array, "n"]
) -> Float[Array, ""]:
    loss, grads = jaxbp.value_and_grad(NET, params, x, y, weights)
    parameters(grads)
    return loss


@typed
def apply(params: tuple, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
    return jaxbp.apply(NET, params, x)


@pytest.fixture(scope="module", params=[jnp.float32, jnp.float64])
def params(request):
    init(jax.random.key(0))
    return jaxbp.init(NET, jax.random.key(0), dtype=request.param)


def test_shapes_of_one_sample(params):
    """Traced, not run: shapes and dtypes are all that is looked at here."""

    def check(params, x):
        parameters(params)
        forward(params, x)
        return backward(params, jaxbp.forward(NET, params, x), jnp.ones(2, x.dtype))

    jax.eval_shape(check, params, jnp.ones(3, params[0].w.dtype))


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_shapes_of_a_batch(params, kind):
    """N = 5 differs from every width, so that no letter can be satisfied by another axis."""
    labels, dtype = jnp.zeros(5, int), params[0].w.dtype

    def check(params, x, y):
        losses, xs, deltas = factors(params, x, y)
        assert losses.dtype == dtype and all(a.dtype == dtype for a in (*xs, *deltas))
        value_and_grad(params, x, labels, jnp.ones(5))
        parameters(jaxbp.gradient(jaxbp.factors(NET, params, x, y)[1], jnp.ones(5)))
        parameters(jaxbp.update(params, params, 0.1))
        return losses

    jax.eval_shape(check, params, jnp.ones((5, 3)), labels if kind == "labels" else jnp.ones((5, 2)))


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (0,)])
def test_shapes_of_apply(params, leading):
    assert jax.eval_shape(apply, params, jnp.ones((*leading, 3))).dtype == params[0].w.dtype


def test_the_annotations_do_check():
    """A wrapper that promises the wrong shape fails, so the tests above can."""

    @typed
    def wrong(x: Float[Array, "n i"]) -> Float[Array, "i n"]:
        return x

    with pytest.raises(TypeCheckError):
        wrong(jnp.ones((5, 3)))


@pytest.mark.parametrize("array", [np.ones((5, 3)), np.ones((5, 3), np.float32), np.ones((5, 3), np.uint8)])
def test_numpy_arrays_are_welcome(params, array):
    losses, _ = jax.eval_shape(lambda params: jaxbp.factors(NET, params, array, np.zeros(5, np.int64)), params)
    assert losses.shape == (5,)
