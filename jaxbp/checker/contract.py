"""Checks 1 and 2: what a rule returns has the right form, and it is the rule that returns it."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.jaxpr import primitives
from jaxbp.checker.report import CONTRACT, PROVENANCE, Row
from jaxbp.checker.subject import is_data, is_inexact
from jaxbp.checker.trial import Trial


def contract(trial: Trial, dtype: str) -> list[Row]:
    """1: tree, shape and dtype of every cotangent; None for a live argument; the forward's output is the function's."""
    subject, points = trial.subject, trial.cast(trial.given, dtype)
    has_pair = isinstance(subject.rule, jax.custom_vjp) and not getattr(subject.rule, "symbolic_zeros", False)
    rows = list(_pair(trial, points)) if has_pair and trial.traceable else []
    if rows:  # JAX refuses some of what is wrong there, and would say so for all leaves at once
        return rows
    hosted = all(isinstance(leaf, np.ndarray) for leaf in trial.settings.example)
    if subject.kind == "gradient" and (hosted or not trial.traceable):
        rows = list(_alone(trial, points, dtype))
    us = trial.rounded([np.ones(v.shape) for v in trial.inputs], dtype)
    if trial.traceable:
        pulled = jax.eval_shape(lambda p, u: subject.pullback(p, u).cotangents, list(points), us)
    else:
        pulled = subject.pullback([jnp.asarray(a) if subject.kind == "vjp" else np.array(a) for a in points], us)[1]
    for path, g, a in zip(trial.paths, pulled, subject.arguments.differentiated(points), strict=True):
        free = not trial.traceable and g is not None and np.shape(g) == a.shape  # NumPy computes in any dtype
        text = "" if free else _mismatch(a, g)
        rows.append(Row(CONTRACT, "FAIL" if text else "PASS", path, str(a.dtype), diagnosis=text))
    return rows


def _alone(trial: Trial, points: Sequence[Any], dtype: str) -> Iterator[Row]:
    """A rule that runs as it is leaves its arguments and its earlier results alone, and remembers nothing."""
    wrt = trial.subject.arguments.wrt
    copies = [np.array(a) for a in points]
    moved = [np.array(a * 1.5 + 0.25 if n in wrt else a).astype(a.dtype) for n, a in enumerate(copies)]

    def run(leaves: Sequence[Any]) -> list[Any]:
        return [g for g in trial.subject.pullback(list(leaves), [])[1] if g is not None]

    def differ(some: Sequence[Any], others: Sequence[Any]) -> bool:
        return any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(some, others, strict=True))

    def row(text: str) -> Row:
        return Row(CONTRACT, "FAIL", "", dtype, diagnosis=text)

    first = run(copies)
    kept = [np.array(g) for g in first]
    if differ(copies, points):
        yield row("the gradient overwrites its arguments")
    later = [np.array(g) for g in run(moved)]
    if differ(kept, first):
        yield row("a later call overwrites the result of an earlier one")
    if any(differ(kept, run([np.array(a) for a in points])) for _ in range(3)):
        yield row("the same arguments give another result in a later call")
    for a, b in zip(copies, moved, strict=True):
        a[...] = b
    if differ(later, run(copies)):
        yield row("an array with other numbers gives the result of its earlier ones: it is remembered by its id")


def _pair(trial: Trial, points: Sequence[Any]) -> Iterator[Row]:
    """What JAX lets through: a forward whose output is another than the function's, None, a cotangent's wrong dtype."""
    rule: Any = trial.subject.rule
    arguments = trial.subject.arguments
    dynamic = [i for i in range(len(arguments.call(points))) if i not in rule.nondiff_argnums]

    def run(leaves: Sequence[Any]) -> Any:
        args = arguments.call(leaves)
        value, residuals = rule.fwd(*args)
        u = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype if is_inexact(v) else jax.dtypes.float0), value)
        cotangents = rule.bwd(*(args[i] for i in rule.nondiff_argnums), residuals, u)
        return rule.__wrapped__(*args), value, cotangents, jax.tree.map(lambda a: a if is_data(a) else None, args)

    own, value, cotangents, args = jax.eval_shape(run, list(points))
    trees = [str(jax.tree.structure(tree)) for tree in (value, own)]
    texts = [f"a tree {trees[0]}, want {trees[1]}"]
    if trees[0] == trees[1]:
        texts = [_difference(v, w) for v, w in zip(jax.tree.leaves(value), jax.tree.leaves(own), strict=True)]
    if text := next(filter(None, texts), ""):
        yield Row(CONTRACT, "FAIL", "output", diagnosis=f"the forward's output is not the function's: {text}")
    if not isinstance(cotangents, tuple | list) or len(cotangents) != len(dynamic):
        yield Row(CONTRACT, "FAIL", diagnosis=f"the backward must return a tuple of {len(dynamic)} cotangents")
        return
    for i, cotangent in zip(dynamic, cotangents, strict=True):
        if i in arguments.wrt_arguments:
            yield from _argument(i, args[i], cotangent)


def _argument(i: int, argument: Any, cotangent: Any) -> Iterator[Row]:
    """None or a wrong structure, shape or dtype in the cotangent of argument i."""
    located = jax.tree_util.tree_flatten_with_path(argument, is_leaf=lambda leaf: leaf is None)[0]
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
    if not is_inexact(leaf):
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


def provenance(trial: Trial) -> list[Row]:
    """2: the custom rule really runs. A function without one is autodiff: there must be another reference for it."""
    if trial.subject.kind == "gradient" or not trial.traceable:
        return [Row(PROVENANCE, "PASS", diagnosis="the gradient was called as it is")]
    found = primitives(trial.rule_of_function.jaxpr)
    if {"custom_vjp_call", "custom_jvp_call"} & found or not trial.subject.own_reference:
        return [Row(PROVENANCE, "PASS")]
    text = "no custom rule ran: autodiff would be compared with itself; give reference="
    return [Row(PROVENANCE, "UNEXERCISED", diagnosis=text)]
