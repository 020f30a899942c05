"""Checks of arguments: what passes, what does not, and the message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbp
from jaxbp import MLP, Affine, losses, memory, persample
from jaxbp.shapes import check_labels, check_params, check_shape, check_targets

CROSS_ENTROPY, SQUARED, HINGE = map(losses.get, ("softmax_cross_entropy", "squared_error", "hinge"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 3), [("N", 3)]), ((0, 3), [("N", 3)]), ((), [()]), ((5,), [(5, 2), (5,)]), ((7, 8), [("N", "C")])],
)
def test_a_shape_that_fits(shape, expected):
    check_shape("x", shape, *expected)


@pytest.mark.parametrize(
    ("shape", "expected", "message"),
    [
        ((5, 4), [("N", 3)], r"x has shape \(5, 4\), expected \(N, 3\)"),
        ((3,), [("N", 3)], r"x has shape \(3,\), expected \(N, 3\)"),
        ((1, 5, 3), [("N", 3)], r"x has shape \(1, 5, 3\), expected \(N, 3\)"),
        ((), [(3,)], r"x has shape \(\), expected \(3,\)"),
        ((4,), [(5, 2), (5,)], r"x has shape \(4,\), expected \(5, 2\) or \(5,\)"),
    ],
)
def test_a_shape_that_does_not(shape, expected, message):
    with pytest.raises(ValueError, match=message):
        check_shape("x", shape, *expected)


def test_parameters():
    """A transposed square layer cannot be seen; every other misfit names its layer, from 1 on, as in the lecture."""
    good = (Affine(np.ones((4, 3)), np.ones(4)), Affine(np.ones((2, 4)), np.ones(2)))
    check_params((3, 4, 2), good)
    with pytest.raises(ValueError, match=r"params has 2 layers, sizes \(3, 4\) has 1"):
        check_params((3, 4), good)
    with pytest.raises(ValueError, match=r"w of layer 2 has shape \(2, 4\), expected \(2, 5\)"):
        check_params((3, 5, 2), (Affine(np.ones((5, 3)), np.ones(5)), good[1]))
    with pytest.raises(ValueError, match=r"b of layer 1 has shape \(4, 1\), expected \(4,\)"):
        check_params((3, 4, 2), (Affine(np.ones((4, 3)), np.ones((4, 1))), good[1]))


@pytest.mark.parametrize(
    ("loss", "y", "error"),
    [
        (CROSS_ENTROPY, np.zeros(5, int), None),
        (CROSS_ENTROPY, np.ones((5, 2), np.float32), None),
        (CROSS_ENTROPY, np.zeros((5, 1), int), ValueError),  # the axis that everyone forgets to squeeze
        (CROSS_ENTROPY, np.zeros(5), TypeError),
        (CROSS_ENTROPY, np.zeros(5, bool), TypeError),
        (HINGE, np.zeros(5, np.uint8), None),
        (HINGE, np.ones((5, 2)), ValueError),
        (SQUARED, np.ones((5, 2)), None),
        (SQUARED, np.zeros(5, int), ValueError),
        (SQUARED, np.ones((2, 5)), ValueError),
        (SQUARED, np.ones((4, 2)), ValueError),
    ],
)
def test_targets(loss, y, error):
    if error is None:
        check_targets(loss, jnp.asarray(y), 5, 2)
    else:
        with pytest.raises(error, match=r"^y "):
            check_targets(loss, jnp.asarray(y), 5, 2)


def test_square_batch_of_labels_is_labels():
    """N = C: (5,) labels and (5, 5) numbers cannot be mistaken for one another."""
    check_targets(CROSS_ENTROPY, jnp.zeros(5, int), 5, 5)
    check_targets(CROSS_ENTROPY, jnp.zeros((5, 5)), 5, 5)


@pytest.mark.parametrize(("labels", "row"), [([0, 1, 2], 2), ([-1, 1, 5], 0), ([1, 255, 0], 1)])
def test_first_bad_label_is_named(labels, row):
    with pytest.raises(ValueError, match=rf"^y\[{row}\] is {labels[row]}, expected a label in 0 … 1$"):
        check_labels(jnp.array(labels), 2)


@pytest.mark.parametrize("label", [2**32 + 1, -(2**32), 2**63 - 1])
def test_labels_are_looked_at_before_they_are_cut_to_32_bits(label):
    """Without x64, as users have it, JAX makes 2³² + 1 a 1. Wherever labels enter."""
    net = MLP((3, 4, 2))
    with jax.enable_x64(False):
        params, x = jaxbp.init(net, jax.random.key(0)), np.ones((2, 3))
        enter = [
            lambda y: jaxbp.factors(net, params, x, y),
            lambda y: jaxbp.value_and_grad(net, params, x, y),
            lambda y: memory.value_and_grad(net, params, x, y, 2),
            lambda y: memory.each_layer(jaxbp.gradient, net, params, x, y, 2),
            lambda y: persample.map_chunks(lambda losses, _: losses, net, params, x, y, 2),
            lambda y: persample.gram_matrix(net, params, x, y, 2),
            lambda y: persample.gram_matrix(net, params, x, np.array([0, 1]), 2, other=(x, y)),
        ]
        for function in enter:
            with pytest.raises(ValueError, match=rf"^y\[1\] is {label}, expected a label in 0 … 1$"):
                function(np.array([0, label]))


def test_integers_are_not_cut_on_their_way_to_floats():
    """2⁴⁰ as an input or a target is 2⁴⁰ in float32, not its last 32 bits, 0."""
    net, big = MLP((1, 1), loss="squared_error"), np.array([[2**40]])
    params = (Affine(jnp.ones((1, 1), jnp.float32), jnp.zeros(1, jnp.float32)),)
    zero = np.zeros((1, 1), np.float32)
    with jax.enable_x64(False):
        scores = [
            persample.map_chunks(lambda losses, _: losses, net, params, *data, 1) for data in ((big, zero), (zero, big))
        ]
        assert float(jaxbp.apply(net, params, big)[0, 0]) == 2.0**40
        assert [float(a[0]) for a in scores] == [2.0**79] * 2
        assert [float(jaxbp.factors(net, params, *data)[0][0]) for data in ((big, zero), (zero, big))] == [2.0**79] * 2


def test_integer_parameters_are_refused():
    """x = 0.5 would be cut to 0."""
    params = (Affine(np.ones((2, 3), int), np.ones(2)),)
    with pytest.raises(TypeError, match="w of layer 1 has dtype int64, expected a float"):
        jaxbp.forward(MLP((3, 2)), params, np.full(3, 0.5))


def test_labels_that_start_at_1():
    with pytest.raises(ValueError, match=r"^y\[2\] is 3, expected a label in 0 … 2: labels start at 0, not at 1$"):
        check_labels(np.array([1, 2, 3]), 3)
    with pytest.raises(TypeError, match=r"^y holds labels and has dtype float64, labels have to be integers in 0 … 2$"):
        check_labels(np.array([0.0, 1.0, 2.0]), 3)


def test_labels_are_not_looked_at_inside_jit():
    """Neither an error nor a transfer to the host; an empty batch has no bad label."""
    assert jax.jit(lambda y: (check_labels(y, 2), y)[1])(jnp.array([7]))[0] == 7
    check_labels(jnp.zeros(0, int), 2)


def test_parameters_without_names():
    """A list of plain (w, b) tuples, as other libraries have it, is refused by name."""
    with pytest.raises(TypeError, match=r"params has a layer .* expected a jaxbp.Affine"):
        check_params((3, 4), [(np.ones((4, 3)), np.ones(4))])
