"""The registry of planted bugs is what it says; that each is wrong where it says is tested with the checker."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from planted import BUGS, RUNS, SHAPES

NAMED = (
    "duplicated embedding rows",
    "softmax without row sum",
    "tied weight counted once",
    "broadcast axis not summed",
    "cotangent dtype wrong",
    "None returned",
    "donated buffer read",
    "forward ≠ function",
    "nonlinear in its cotangent",
    "NaN at cotangent 0",
    "cotangents swapped",
)
DONATED, NONLINEAR, ZERO, BROADCAST = (
    next(bug for bug in BUGS if bug.name == name)
    for name in ("donated buffer read", "nonlinear in its cotangent", "NaN at cotangent 0", "broadcast axis not summed")
)
each_bug = pytest.mark.parametrize("bug", BUGS, ids=str)


def pullback(fun, args, scale=1.0):
    """The output and the cotangents for a cotangent drawn once for all."""
    out, pull = jax.vjp(fun, *args)
    rng = np.random.default_rng(7)
    cotangent = jnp.asarray(scale * rng.normal(size=out.shape), out.dtype)
    return out, pull(cotangent)


def cotangents(subject, dtype, rule=True, scale=1.0):
    """(output, {path: cotangent} of the float leaves that the rule has a gradient for), args converted to dtype."""
    args = planted.cast(subject.args, dtype)
    fun = planted.as_custom_vjp(subject) if rule else planted.reference(subject)
    out, found = pullback(fun, args, scale)
    named = jax.tree_util.tree_flatten_with_path(found)[0]
    return out, {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in named
        if path[0].idx in planted.wrt(subject) and leaf.dtype != jax.dtypes.float0
    }


def relative_error(got, want):
    """max|a − b| / max|b|, and infinite where a is not finite."""
    error = np.max(np.abs(got.astype(float) - want.astype(float))) / np.max(np.abs(want.astype(float)))
    return np.inf if np.isnan(error) else error


def wrong_leaves(subject, tolerance=1e-12):
    """Paths of the leaves in which the rule and autodiff differ in f64."""
    (_, got), (_, want) = cotangents(subject, jnp.float64), cotangents(subject, jnp.float64, rule=False)
    assert list(got) == list(want)
    return {path for path in want if relative_error(got[path], want[path]) > tolerance}


def layer(path):
    """l of "[0][l].w", and 0 for an argument that is an array."""
    return int([*re.findall(r"\d+", path), "0"][1])


def test_every_bug_of_the_list_is_there():
    assert {bug.number for bug in BUGS} - {None} == set(range(1, 31))
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    for name in NAMED:
        assert any(bug.name.startswith(name) for bug in BUGS if bug.number is None), name
    assert len(RUNS) == len(set(RUNS)) == 12


@each_bug
def test_the_subject(bug):
    """Wrong and right have the same data, function and style; paths exist; seeds and shapes differ."""
    shapes = []
    for seed, shape in RUNS:
        wrong, right = bug.build(seed, shape), bug.right(seed, shape)
        jax.tree.map(np.testing.assert_array_equal, wrong.args, right.args)
        assert list(wrong.options) == list(right.options)
        shapes.append(str(jax.tree.map(jnp.shape, wrong.args)))
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(wrong.args)[0]]
        assert set(bug.leaf) <= set(paths)
        assert {str(a.dtype) for a in jax.tree.leaves(wrong.args)} <= {"float32", "int32", "bool"}
    assert len(set(shapes)) == len(SHAPES)
    first, second = (jax.tree.leaves(bug.build(seed, 0).args)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert bug.diagnosis is None or re.compile(bug.diagnosis)


@each_bug
def test_the_right_rule_is_right(bug):
    """Autodiff's gradient in f64, leaf by leaf, to the library's 1e-12; and the same value, bit for bit."""
    for seed, shape in RUNS[::5]:
        subject = bug.right(seed, shape)
        assert wrong_leaves(subject) == set(), (seed, shape)
        out, _ = cotangents(subject, jnp.float64)
        want, _ = cotangents(subject, jnp.float64, rule=False)
        np.testing.assert_allclose(out, want, rtol=1e-15, atol=0)


@each_bug
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_right_rule_keeps_the_dtype(bug, dtype):
    """Function and rule take any float dtype and return it, for the value and for every leaf."""
    for shape in SHAPES:
        subject = bug.right(0, shape)
        out, pulled = jax.eval_shape(
            lambda *args, s=subject: pullback(planted.as_custom_vjp(s), args), *planted.cast(subject.args, dtype)
        )
        found = [leaf.dtype for n in planted.wrt(subject) for leaf in jax.tree.leaves(pulled[n])]
        assert {out.dtype, *found} - {jax.dtypes.float0} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.name.startswith("forward ≠")], ids=str)
def test_the_forward_differs(bug):
    for seed, shape in RUNS:
        subject = bug.build(seed, shape)
        (got, _), (want, _) = cotangents(subject, jnp.float64), cotangents(subject, jnp.float64, rule=False)
        same_type = (got.shape, got.dtype) == (want.shape, want.dtype)
        assert not same_type or relative_error(np.asarray(got), np.asarray(want)) > 1e-6, (seed, shape)


def test_the_cotangent_has_the_wrong_dtype_and_jax_says_nothing():
    (bug,) = (bug for bug in BUGS if bug.name == "cotangent dtype wrong")
    _, got = cotangents(bug.build(0, 0), jnp.float32)
    assert [str(leaf.dtype) for leaf in got.values()] == ["bfloat16", "float32", "float32"]


def test_the_cotangent_has_the_wrong_shape():
    subject = BROADCAST.build(0, 0)
    forward, backward = subject.options["vjp"]
    out, residuals = forward(*subject.args)
    dx, dscale = backward(residuals, out)
    assert dx.shape == subject.args[0].shape
    assert dscale.shape == subject.args[0].shape != subject.args[1].shape


def test_the_donated_buffer_is_gone():
    """Eagerly the backward cannot read it; an outer jit drops the donation and hides the bug."""
    subject = DONATED.build(0, 0)
    with pytest.raises(RuntimeError, match=r"deleted"):
        cotangents(subject, jnp.float32)
    value, grads = jax.jit(lambda args: pullback(subject.fun, args))(subject.args)
    want, right = jax.jit(lambda args: pullback(DONATED.right(0, 0).fun, args))(subject.args)
    jax.tree.map(np.testing.assert_array_equal, (value, grads), (want, right))


def test_nonlinear_only_where_the_cotangent_is_large():
    for seed, shape in RUNS:
        subject = NONLINEAR.build(seed, shape)
        for scale, is_wrong in ((1e-3, False), (1e3, True)):
            _, got = cotangents(subject, jnp.float64, scale=scale)
            _, want = cotangents(subject, jnp.float64, rule=False, scale=scale)
            assert bool(relative_error(got["[0]"], want["[0]"]) > 1e-12) is is_wrong


def test_nan_only_at_cotangent_0():
    for seed, shape in RUNS:
        subject = ZERO.build(seed, shape)
        assert wrong_leaves(subject) == set()
        _, got = cotangents(subject, jnp.float64, scale=0.0)
        assert np.isnan(got["[0]"]).all()


def test_flat_functions_for_other_checkers():
    """The same cotangents, of the float leaves that have a rule, in their order."""
    for bug in BUGS:
        subject = bug.right(0, 0)
        fun, leaves = planted.differentiable(subject)
        out, flat = pullback(fun, leaves)
        want, by_path = cotangents(subject, jnp.float32)
        np.testing.assert_array_equal(out, want)
        assert len(flat) == len(by_path)
        for a, b in zip(flat, by_path.values(), strict=True):
            np.testing.assert_array_equal(a, b)
