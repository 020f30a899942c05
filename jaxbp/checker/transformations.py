"""Check 8: a rule gives the same numbers under every transformation of JAX."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxbp.checker.compare import compared, f64
from jaxbp.checker.jaxpr import OPAQUE, equations, primitives
from jaxbp.checker.report import TRANSFORMATIONS, Row
from jaxbp.checker.subject import Leaves
from jaxbp.checker.trial import QUICK, Trial, first_line

Points = Sequence[Any]
_Pull = Callable[[Points, Leaves], Leaves]
EAGER = 20  # different operations; level "fast" does not compile more one by one, at 25 ms each
BATCHING = frozenset({"custom_vmap_call"}) | OPAQUE  # operations that say themselves what vmap does


class _Point(NamedTuple):
    """Where the rule is called: its arguments and cotangents."""

    leaves: Points
    us: Leaves


def transformations(trial: Trial, other: Points, dtype: str) -> list[Row]:
    """8: eager, vmap and scan with remat, and sharded over the devices, against one jitted call after the other.

    Also what was left out: what JAX cannot do with the rule (NotImplementedError) is not the rule's fault.
    """
    rows: list[Row] = []
    kinds = {(e.primitive.name, *(str(a.aval) for a in e.invars)) for e in equations(trial.rule_in(trial.main))}
    eager = trial.settings.level == "full" or len(kinds) <= EAGER
    if not eager:
        trial.notes.append(f"transformations, eager: more than {EAGER} different operations; level='full' runs them")
    if jax.device_count() == 1:
        trial.notes.append("sharding: one device; XLA_FLAGS=--xla_force_host_platform_device_count=4 makes four")
    us, rng = trial.dense(), np.random.default_rng(trial.settings.seed + 5)
    other_us = us if trial.subject.kind == "gradient" else [u + rng.standard_normal(np.shape(u)) for u in us]
    with trial.setting(dtype):
        first, second = (
            _Point([jnp.asarray(leaf) for leaf in trial.cast(leaves, dtype)], trial.rounded(cotangents, dtype))
            for leaves, cotangents in ((trial.given, us), (other, other_us))
        )
        runs: dict[str, Callable[[Trial, _Point, _Point, str], Iterator[Row]]] = {"vmap and scan": _together}
        if eager:
            runs["eager"] = _eagerly
        if jax.device_count() > 1 and "shard_map" not in primitives(trial.rule_in(dtype)):  # that has its own mesh
            runs["sharded"] = _apart
        for name, run in runs.items():
            try:
                rows += run(trial, first, second, dtype)
            except NotImplementedError as error:
                trial.notes.append(f"transformations, {name}: {first_line(error)}")
    return rows


def _apart(trial: Trial, first: _Point, second: _Point, dtype: str) -> Iterator[Row]:
    """Each leaf split along its first axis over all devices where that divides it, replicated otherwise."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(leaf: Any) -> Any:
        split = leaf.ndim > 0 and leaf.size > 0 and leaf.shape[0] % devices == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("n") if split else PartitionSpec()))

    got = jax.jit(_pull(trial))([put(leaf) for leaf in first.leaves], first.us)
    return _same(trial, "sharded", got, first, dtype)


def _eagerly(trial: Trial, first: _Point, second: _Point, dtype: str) -> Iterator[Row]:
    """A donated buffer would be gone, and what is cached by shape or identity stale."""
    again, other = (point._replace(leaves=[jnp.array(leaf) for leaf in point.leaves]) for point in (first, second))
    calls = {"eager": first, "eager, called again": first, "eager, other values": other, "eager, a third time": again}
    for name, point in calls.items():
        yield from _same(trial, name, _pull(trial)(*point), point, dtype)


def _together(trial: Trial, first: _Point, second: _Point, dtype: str) -> Iterator[Row]:
    """All transformations that batch, in one program."""
    batched = _batched(trial, first, second)
    together = jax.jit(lambda *stacked: {name: run(*stacked) for name, (run, _) in batched.items()}, **QUICK)
    stacked = ([np.stack(pair) for pair in zip(*both, strict=True)] for both in zip(first, second, strict=True))
    for name, got in jax.device_get(together(*stacked)).items():
        for n, point in enumerate((first, batched[name][1])):
            yield from _same(trial, name, [leaf[n] for leaf in got], point, dtype)


def _pull(trial: Trial) -> _Pull:
    def pull(leaves: Points, us: Leaves) -> Leaves:
        found = trial.subject.pullback(list(leaves), us)
        return [*found.cotangents, *found.value]

    return pull


def _same(trial: Trial, name: str, got: Sequence[Any], point: _Point, dtype: str) -> Iterator[Row]:
    """The rows of one transformation against the plain jitted call; both may round, each within the bound."""
    want = trial.run(*point, dtype)
    cotangents = trial.projected(point.leaves, [np.asarray(g) for g in got[: len(want.cotangents)]])
    values = [np.asarray(v) for v in got[len(want.cotangents) :]]  # none from remat
    names = [f"output[{n}]" for n in range(len(values))]
    bounds = trial.bounds(*point, dtype)
    parts = zip((trial.paths, names), (cotangents, values), (want.cotangents, want.value), bounds, strict=True)
    for row in (row for part in parts for row in zip(*part, strict=False)):
        path, g, w, bound = row
        yield compared(TRANSFORMATIONS, path, dtype, name, g, f64(w), 2 * bound)


def _batched(trial: Trial, first: _Point, second: _Point) -> dict[str, tuple[_Pull, _Point]]:
    """What takes leaves and cotangents with a leading axis, and the second point that its results are at.

    vmap and scan over both points; and, where an operation says itself what vmap does with it, vmap over one argument
    or the cotangent with the others held, which are the in_axes that such a rule gets wrong.
    """
    owners, pull = trial.subject.arguments.owners, _pull(trial)
    found = {"vmap over all arguments": (jax.vmap(pull), second)}
    if not trial.subject.forward:
        scan = lambda s, u: lax.scan(lambda _, p: (None, _remat(trial, *p)), None, (s, u))[1]  # noqa: E731
        found["scan of remat"] = (scan, second)
    if not BATCHING & primitives(trial.rule_in(trial.main)):
        return found
    chosen = {f"argument {i}": {i} for i in dict.fromkeys(owners)} | {"the arguments": set(owners)}
    cases: dict[str, tuple[set[int], bool]] = {f"vmap over {name} alone": (own, False) for name, own in chosen.items()}
    if trial.subject.kind != "gradient":
        cases["vmap over the cotangent alone"] = (set(), True)
        cases |= {f"vmap over {name} and the cotangent": (own, True) for name, own in chosen.items()}
    for name, (mapped, with_us) in cases.items():
        axes = [0 if owner in mapped else None for owner in owners]

        def run(leaves: Points, us: Leaves, axes: Any = axes, with_us: bool = with_us) -> Leaves:
            held = [leaf if axis == 0 else leaf[0] for leaf, axis in zip(leaves, axes, strict=True)]
            over = jax.vmap(pull, in_axes=(axes, 0 if with_us else None))
            return list(over(held, us if with_us else [u[0] for u in us]))

        mixed = [b if axis == 0 else a for a, b, axis in zip(first.leaves, second.leaves, axes, strict=True)]
        found[name] = (run, _Point(mixed, second.us if with_us else first.us))
    return found


def _remat(trial: Trial, leaves: Points, us: Leaves) -> Leaves:
    subject = trial.subject
    if subject.kind == "gradient":
        pulled: Leaves = jax.checkpoint(_pull(trial))(list(leaves), us)
        return pulled
    replaced = subject.arguments.replaced
    run = jax.checkpoint(lambda wrt: subject.outputs(subject.rule, replaced(leaves, wrt))[0])
    return list(jax.vjp(run, subject.arguments.differentiated(leaves))[1](us)[0])
