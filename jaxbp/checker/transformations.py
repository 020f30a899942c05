"""Check 8: a rule gives the same numbers under every transformation of JAX."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxbp.checker.compare import compared, f64
from jaxbp.checker.data import cast
from jaxbp.checker.report import Row
from jaxbp.checker.rounding import equations
from jaxbp.checker.subject import Leaves, floats
from jaxbp.checker.trial import QUICK, Trial, setting

TRANSFORMATIONS = "transformations"
Points = Sequence[Any]


EAGER = 20  # different operations; level "fast" does not compile more one by one, at 25 ms each


def transformations(
    trial: Trial, points: Points, other: Points, us: Leaves, dtype: str, level: str, eager: bool
) -> list[Row]:
    """8: eager, vmap and scan with remat, and sharded over the devices, against one jitted call after the other."""
    us = [f64(u).astype(dtype) for u in us]
    rows: list[Row] = []
    with setting(dtype):
        pairs = [[jnp.asarray(leaf) for leaf in cast(p, dtype)] for p in (points, other)]  # eager NumPy is not JAX
        if eager:
            for name in ("eager", "eager, called again"):  # a donated buffer would be gone
                rows += _same(trial, name, _pull(trial, us)(pairs[0]), pairs[0], us, dtype)
        batched = _batched(trial, pairs, us, level)
        stacked = [np.stack(pair) for pair in zip(*pairs, strict=True)]
        together = jax.jit(lambda stacked: {name: run(stacked) for name, (run, _) in batched.items()}, **QUICK)
        for name, got in jax.device_get(together(stacked)).items():
            for n, alone in enumerate(batched[name].alone):
                rows += _same(trial, name, [leaf[n] for leaf in got], alone, us, dtype)
        if jax.device_count() > 1:
            rows += _same(trial, "sharded", jax.jit(_pull(trial, us))(_sharded(pairs[0])), pairs[0], us, dtype)
    return rows


def compiles_fast_eagerly(trial: Trial, points: Points, us: Leaves, dtype: str) -> bool:
    """Whether the rule has so few different operations that compiling each on its own is quick."""
    with setting(dtype):
        closed = jax.make_jaxpr(_pull(trial, [f64(u).astype(dtype) for u in us]))(cast(points, dtype))
    found = {(e.primitive.name, *(str(a.aval) for a in e.invars)) for e in equations(closed.jaxpr)}
    return len(found) <= EAGER


def _pull(trial: Trial, us: Leaves) -> Any:
    return lambda points: trial.subject.pullback(list(points), us)[1]


def _same(trial: Trial, name: str, got: Sequence[Any], points: Points, us: Leaves, dtype: str) -> Iterator[Row]:
    """The rows of one transformation against the plain jitted call; both may round, each within the bound."""
    _, want = trial.run(points, us, dtype)
    bounds = trial.bounds(points, us, dtype)
    for path, g, w, bound in zip(trial.paths, got, want, bounds, strict=True):
        yield compared(TRANSFORMATIONS, path, dtype, name, np.asarray(g), f64(w), 2 * bound)


class _Batched(NamedTuple):
    """A function of leaves with a leading axis, and the points that each of its results is at."""

    run: Callable[[Leaves], Leaves]
    alone: Sequence[Points]


def _batched(trial: Trial, pairs: Sequence[Points], us: Leaves, level: str) -> dict[str, _Batched]:
    """vmap and scan over both points; vmap over one argument with the others held, which are the in_axes that a rule
    that mixes samples gets wrong.
    """
    arguments, pull = trial.subject.arguments, _pull(trial, us)
    found = {
        "vmap over all arguments": _Batched(jax.vmap(pull), pairs),
        "scan of remat": _Batched(lambda s: lax.scan(lambda _, p: (None, _remat(trial, p, us)), None, s)[1], pairs),
    }
    several = len(set(arguments.owners)) > 1
    for i in arguments.wrt_arguments[: None if level == "full" else 1] if several else ():
        axes = [0 if owner == i else None for owner in arguments.owners]

        def run(stacked: Leaves, axes: Sequence[int | None] = axes) -> Leaves:
            held = [leaf if axis == 0 else leaf[0] for leaf, axis in zip(stacked, axes, strict=True)]
            mapped: Leaves = jax.vmap(pull, in_axes=(axes,))(held)
            return mapped

        mixed = [b if axis == 0 else a for a, b, axis in zip(*pairs, axes, strict=True)]
        found[f"vmap over argument {i}"] = _Batched(run, (pairs[0], mixed))
    return found


def _remat(trial: Trial, points: Points, us: Leaves) -> Leaves:
    subject = trial.subject
    if subject.kind == "gradient":
        pulled: Leaves = jax.checkpoint(_pull(trial, us))(list(points))
        return pulled
    replaced = subject.arguments.replaced
    run = jax.checkpoint(lambda wrt: floats(subject.rule(*subject.arguments.call(replaced(points, wrt)))))
    return list(jax.vjp(run, subject.arguments.differentiated(points))[1](us)[0])


def _sharded(leaves: Points) -> Leaves:
    """Each leaf split along its first axis over all devices where that divides it, replicated otherwise."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(leaf: Any) -> Any:
        split = leaf.ndim > 0 and leaf.size > 0 and leaf.shape[0] % devices == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("n") if split else PartitionSpec()))

    return [put(leaf) for leaf in leaves]
