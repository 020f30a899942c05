"""Checks 1 and 2: what a rule returns has the right form, and it is the rule that returns it."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.report import Row
from jaxbp.checker.rounding import primitives
from jaxbp.checker.subject import floats, is_float
from jaxbp.checker.trial import Trial

CONTRACT, PROVENANCE = "contract", "provenance"


def contract(trial: Trial, points: Sequence[Any]) -> list[Row]:
    """1: tree, shape and dtype of every cotangent; None for a live argument; the forward's output is the function's."""
    subject = trial.subject
    rows = list(_pair(trial, points)) if isinstance(subject.rule, jax.custom_vjp) else []
    if rows:  # JAX refuses some of what is wrong there, and would say so for all leaves at once
        return rows
    pulled = _pulled(trial, points)
    for path, g, a in zip(trial.paths, pulled, subject.arguments.differentiated(points), strict=True):
        text = _difference(g, a) if trial.traceable or np.shape(g) != a.shape else ""
        rows.append(Row(CONTRACT, "FAIL" if text else "PASS", path, str(a.dtype), diagnosis=text))
    return rows


def _pulled(trial: Trial, points: Sequence[Any]) -> list[Any]:
    """The cotangents, as shapes and dtypes where JAX can trace the rule."""
    subject = trial.subject
    if not trial.traceable:
        return subject.pullback(list(points), [])[1]
    cotangents = []
    if subject.kind == "vjp":
        value = jax.eval_shape(lambda p: floats(subject.function(*subject.arguments.call(p))), list(points))
        cotangents = [jnp.ones(v.shape, v.dtype) for v in value]
    return list(jax.eval_shape(subject.pullback, list(points), cotangents)[1])


def _pair(trial: Trial, points: Sequence[Any]) -> Iterator[Row]:
    """What JAX lets through: a forward whose output is another than the function's, None, a cotangent's wrong dtype."""
    rule: Any = trial.subject.rule
    arguments = trial.subject.arguments
    args = arguments.call(points)
    dynamic = [i for i in range(len(args)) if i not in rule.nondiff_argnums]

    def whole(arrays: dict[int, Any]) -> list[Any]:
        return [arrays.get(i, arg) for i, arg in enumerate(args)]

    def run(arrays: dict[int, Any]) -> Any:
        value, residuals = rule.fwd(*whole(arrays))
        u = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype if is_float(v) else jax.dtypes.float0), value)
        return value, rule.bwd(*(args[i] for i in rule.nondiff_argnums), residuals, u)

    given = {i: args[i] for i in dynamic}
    own = jax.eval_shape(lambda arrays: rule.__wrapped__(*whole(arrays)), given)
    value, cotangents = jax.eval_shape(run, given)
    text = _tree_difference(value, own)
    if text:
        yield Row(CONTRACT, "FAIL", "output", diagnosis=f"the forward's output is not the function's: {text}")
    if not isinstance(cotangents, tuple | list) or len(cotangents) != len(dynamic):
        yield Row(CONTRACT, "FAIL", diagnosis=f"the backward must return a tuple of {len(dynamic)} cotangents")
        return
    for i, cotangent in zip(dynamic, cotangents, strict=True):
        if i in arguments.wrt_arguments:
            yield from _argument(i, args[i], cotangent)


def _argument(i: int, argument: Any, cotangent: Any) -> Iterator[Row]:
    """None or a wrong structure, shape or dtype in the cotangent of argument i."""
    located = jax.tree_util.tree_flatten_with_path(argument)[0]
    got = jax.tree.leaves(cotangent, is_leaf=lambda leaf: leaf is None)
    if cotangent is None:
        got = [None] * len(located)
    if len(got) != len(located):
        yield Row(
            CONTRACT, "FAIL", f"[{i}]", diagnosis=f"{len(got)} cotangent leaves for {len(located)} argument leaves"
        )
        return
    for (keys, leaf), g in zip(located, got, strict=True):
        text = _mismatch(leaf, g) if hasattr(leaf, "dtype") else ""
        if text:
            yield Row(CONTRACT, "FAIL", f"[{i}]{jax.tree_util.keystr(keys)}", str(leaf.dtype), diagnosis=text)


def _mismatch(leaf: Any, g: Any) -> str:
    """What is wrong with the cotangent g of a leaf, or "". An integer leaf may have None, float0 or its own dtype."""
    if not is_float(leaf):
        wrong = g is not None and g.dtype not in (jax.dtypes.float0, leaf.dtype)
        return f"dtype {g.dtype} for an integer argument, want float0 or None" if wrong else ""
    if g is None:
        return "None returned for a live argument: its gradient becomes 0; leave it out of wrt if that is meant"
    return _difference(g, leaf)


def _difference(got: Any, want: Any) -> str:
    """In shape or dtype, or ""."""
    shape, dtype = np.shape(got), getattr(got, "dtype", type(got).__name__)
    text = []
    if shape != want.shape:
        summed = len(shape) >= len(want.shape) and np.broadcast_shapes(shape, want.shape) == shape
        advice = " (an axis that the function broadcasts must be summed)" if summed else ""
        text = [f"shape {shape}, want {want.shape}{advice}"]
    return ", ".join([*text, *([f"dtype {dtype}, want {want.dtype}"] if dtype != want.dtype else [])])


def _tree_difference(got: Any, want: Any) -> str:
    """The first difference in structure, shape or dtype, or ""."""
    structures = [str(jax.tree.structure(tree)) for tree in (got, want)]
    if structures[0] != structures[1]:
        return f"a tree {structures[0]}, want {structures[1]}"
    found = (_difference(g, w) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    return next(filter(None, found), "")


def provenance(trial: Trial, points: Sequence[Any]) -> list[Row]:
    """2: the custom rule really runs. A function without one is autodiff: there must be another reference for it."""
    subject = trial.subject
    if subject.kind == "gradient":
        return [Row(PROVENANCE, "PASS", diagnosis="the gradient was called as it is")]
    closed = jax.make_jaxpr(lambda p: subject.rule(*subject.arguments.call(p)))(list(points))
    if {"custom_vjp_call", "custom_jvp_call"} & set(primitives(closed.jaxpr)) or not subject.own_reference:
        return [Row(PROVENANCE, "PASS")]
    text = "no custom rule ran: autodiff would be compared with itself; give reference="
    return [Row(PROVENANCE, "UNEXERCISED", diagnosis=text)]
