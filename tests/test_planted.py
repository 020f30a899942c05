"""The registry of planted bugs is what it says; that each is wrong where it says is tested with the checker."""

import functools
import re
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from oracles import assert_close
from planted import BUGS, RUNS, SEEDS, SHAPES, Subject
from tiers import one_in

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
    draw = np.random.default_rng(7).normal(size=out.shape)
    return out, pull(jnp.asarray(scale * draw, out.dtype))


@functools.cache
def program(fun, options, dtype):
    """(output, {path: cotangent} of the float leaves that the rule has a gradient for): of the rule and of autodiff.

    One program for all seeds, which takes the arguments in float32 and converts them to dtype.
    """

    @jax.jit
    def run(args, scale):
        subject = Subject(fun, planted.cast(args, dtype), dict(options))
        return [named(subject, f, scale) for f in (planted.as_custom_vjp(subject), planted.reference(subject))]

    return run


def named(subject, fun, scale):
    out, found = pullback(fun, subject.args, scale)
    leaves = [(path, leaf) for path, leaf in jax.tree.leaves_with_path(found) if path[0].idx in planted.wrt(subject)]
    by_path = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if leaf.dtype != jax.dtypes.float0]
    return out, OrderedDict(by_path)  # jit would sort the keys of a dict


def cotangents(subject, dtype=jnp.float64, scale=1.0):
    """What `program` gives, as NumPy arrays."""
    run = program(subject.fun, tuple(subject.options.items()), dtype)
    return jax.tree.map(np.asarray, run(subject.args, scale))


def relative_error(got, want):
    """max|a − b| / max|b|, and infinite where a is not finite."""
    error = np.max(np.abs(got.astype(float) - want.astype(float))) / np.max(np.abs(want.astype(float)))
    return np.inf if np.isnan(error) else error


def wrong_leaves(subject, tolerance=1e-12):
    """Paths of the leaves in which the rule and autodiff differ in f64."""
    (_, got), (_, want) = cotangents(subject)
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
@pytest.mark.parametrize("shape", one_in(3, SHAPES))
def test_the_right_rule_is_right(bug, shape):
    """Autodiff's gradient in f64, leaf by leaf, to the library's 1e-12; and the same value, bit for bit."""
    for seed in SEEDS:
        subject = bug.right(seed, shape)
        assert wrong_leaves(subject) == set(), seed
        (out, _), (want, _) = cotangents(subject)
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
        (got, _), (want, _) = cotangents(subject)
        same_type = (got.shape, got.dtype) == (want.shape, want.dtype)
        assert not same_type or relative_error(np.asarray(got), np.asarray(want)) > 1e-6, (seed, shape)


def test_the_cotangent_has_the_wrong_dtype_and_jax_says_nothing():
    (bug,) = (bug for bug in BUGS if bug.name == "cotangent dtype wrong")
    (_, got), _ = cotangents(bug.build(0, 0), jnp.float32)
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
        pullback(subject.fun, subject.args)
    value, grads = jax.jit(lambda args: pullback(subject.fun, args))(subject.args)
    want, right = jax.jit(lambda args: pullback(DONATED.right(0, 0).fun, args))(subject.args)
    jax.tree.map(np.testing.assert_array_equal, (value, grads), (want, right))


def test_nonlinear_only_where_the_cotangent_is_large():
    for seed, shape in RUNS:
        subject = NONLINEAR.build(seed, shape)
        for scale, is_wrong in ((1e-3, False), (1e3, True)):
            (_, got), (_, want) = cotangents(subject, scale=scale)
            assert bool(relative_error(got["[0]"], want["[0]"]) > 1e-12) is is_wrong


def test_nan_only_at_cotangent_0():
    for seed, shape in RUNS:
        subject = ZERO.build(seed, shape)
        assert wrong_leaves(subject) == set()
        (_, got), _ = cotangents(subject, scale=0.0)
        assert np.isnan(got["[0]"]).all()


@pytest.mark.parametrize("bug", one_in(9, BUGS), ids=str)
def test_flat_functions_for_other_checkers(bug):
    """The same cotangents, of the float leaves that have a rule, in their order."""
    subject = bug.right(0, 0)
    fun, leaves = planted.differentiable(subject._replace(args=planted.cast(subject.args, jnp.float64)))
    out, flat = jax.jit(lambda leaves: pullback(fun, leaves))(leaves)
    (want, by_path), _ = cotangents(subject)
    assert_close((out, list(flat)), (want, list(by_path.values())), 1e-12, bug.name)
