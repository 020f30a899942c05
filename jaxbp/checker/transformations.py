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
from jaxbp.checker.report import Row
from jaxbp.checker.subject import Leaves, split
from jaxbp.checker.trial import QUICK, Trial, first_line

TRANSFORMATIONS = "transformations"
Points = Sequence[Any]
EAGER = 20  # different operations; level "fast" does not compile more one by one, at 25 ms each
BATCHING = frozenset({"custom_vmap_call"}) | OPAQUE  # operations that say themselves what vmap does


def transformations(trial: Trial, points: Points, other: Points, us: Leaves, dtype: str, level: str) -> list[Row]:
    """8: eager, vmap and scan with remat, and sharded over the devices, against one jitted call after the other.

    Also what was left out: what JAX cannot do with the rule (NotImplementedError) is not the rule's fault.
    """
    rows: list[Row] = []
    eager = level == "full" or _compiles_fast_eagerly(trial)
    if not eager:
        trial.notes.append(f"transformations, eager: more than {EAGER} different operations; level='full' runs them")
    if jax.device_count() == 1:
        trial.notes.append("sharding: one device; XLA_FLAGS=--xla_force_host_platform_device_count=4 makes four")
    rng = np.random.default_rng(trial.seed + 5)
    cotangents = [trial.rounded(u, dtype) for u in (us, [f64(u) + rng.standard_normal(np.shape(u)) for u in us])]
    if trial.subject.kind == "gradient":
        cotangents[1] = cotangents[0]
    with trial.setting(dtype):
        pairs = [[jnp.asarray(leaf) for leaf in trial.cast(p, dtype)] for p in (points, other)]  # NumPy is not JAX
        runs: dict[str, Callable[[], Iterator[Row]]] = {
            "vmap and scan": lambda: _together(trial, pairs, cotangents, dtype)
        }
        if eager:
            runs["eager"] = lambda: _eagerly(trial, pairs, cotangents, dtype)
        if jax.device_count() > 1 and not {"shard_map"} & primitives(trial.rule_in(dtype)):  # that has its own mesh
            runs["sharded"] = lambda: _apart(trial, pairs[0], cotangents[0], dtype)
        for name, run in runs.items():
            try:
                rows += run()
            except NotImplementedError as error:
                trial.notes.append(f"transformations, {name}: {first_line(error)}")
    return rows


def _apart(trial: Trial, points: Points, us: Leaves, dtype: str) -> Iterator[Row]:
    return _same(trial, "sharded", jax.jit(_pull(trial))(_sharded(points), us), points, us, dtype)


def _eagerly(trial: Trial, pairs: Sequence[Points], cotangents: Sequence[Leaves], dtype: str) -> Iterator[Row]:
    """A donated buffer would be gone, and what is cached by shape or identity stale."""
    pull = _pull(trial)
    for name, n in (("eager", 0), ("eager, called again", 0), ("eager, other values", 1), ("eager, a third time", 0)):
        fresh = [jnp.array(leaf) for leaf in pairs[n]] if "third" in name or n else pairs[n]
        yield from _same(trial, name, pull(fresh, cotangents[n]), pairs[n], cotangents[n], dtype)


def _together(trial: Trial, pairs: Sequence[Points], cotangents: Sequence[Leaves], dtype: str) -> Iterator[Row]:
    """All transformations that batch, in one program."""
    batched = _batched(trial, pairs, cotangents)
    together = jax.jit(lambda *stacked: {name: run(*stacked) for name, (run, _) in batched.items()}, **QUICK)
    stacked = ([np.stack(pair) for pair in zip(*both, strict=True)] for both in (pairs, cotangents))
    for name, got in jax.device_get(together(*stacked)).items():
        for n, (alone, us) in enumerate(batched[name].alone):
            yield from _same(trial, name, [leaf[n] for leaf in got], alone, us, dtype)


def _compiles_fast_eagerly(trial: Trial) -> bool:
    """Whether the rule has so few different operations that compiling each on its own is quick."""
    found = {(e.primitive.name, *(str(a.aval) for a in e.invars)) for e in equations(trial.rule_in(trial.main))}
    return len(found) <= EAGER


def _pull(trial: Trial) -> Any:
    def pull(points: Points, us: Leaves) -> Leaves:
        found = trial.subject.pullback(list(points), us)
        return [*found.cotangents, *found.value]

    return pull


def _same(trial: Trial, name: str, got: Sequence[Any], points: Points, us: Leaves, dtype: str) -> Iterator[Row]:
    """The rows of one transformation against the plain jitted call; both may round, each within the bound."""
    want = trial.run(points, us, dtype)
    cotangents = trial.projected(points, [np.asarray(g) for g in got[: len(want.cotangents)]])
    values = [np.asarray(v) for v in got[len(want.cotangents) :]]  # none from remat
    names = [f"output[{n}]" for n in range(len(values))]
    bounds = trial.bounds(points, us, dtype)
    parts = zip((trial.paths, names), (cotangents, values), (want.cotangents, want.value), bounds, strict=True)
    for row in (row for part in parts for row in zip(*part, strict=False)):
        path, g, w, bound = row
        yield compared(TRANSFORMATIONS, path, dtype, name, g, f64(w), 2 * bound)


class _Batched(NamedTuple):
    """A function of leaves and cotangents with a leading axis, and what each of its results is at."""

    run: Callable[[Leaves, Leaves], Leaves]
    alone: Sequence[tuple[Points, Leaves]]


def _batched(trial: Trial, pairs: Sequence[Points], us: Sequence[Leaves]) -> dict[str, _Batched]:
    """vmap and scan over both points; and, where an operation says itself what vmap does with it, vmap over one
    argument or the cotangent with the others held, which are the in_axes that such a rule gets wrong.
    """
    arguments, pull = trial.subject.arguments, _pull(trial)
    both = list(zip(pairs, us, strict=True))
    found = {"vmap over all arguments": _Batched(jax.vmap(pull), both)}
    if not trial.subject.forward:
        found["scan of remat"] = _Batched(
            lambda s, u: lax.scan(lambda _, p: (None, _remat(trial, *p)), None, (s, u))[1], both
        )
    if not BATCHING & primitives(trial.rule_in(trial.main)):
        return found
    chosen = {f"argument {i}": {i} for i in dict.fromkeys(arguments.owners)} | {"the arguments": set(arguments.owners)}
    cases = {f"vmap over {name} alone": (owners, False) for name, owners in chosen.items()}
    cases["vmap over the cotangent alone"] = (set(), True)
    cases |= {f"vmap over {name} and the cotangent": (owners, True) for name, owners in chosen.items()}
    if trial.subject.kind == "gradient":
        cases = {name: case for name, case in cases.items() if not case[1]}
    for name, (owners, with_us) in cases.items():
        axes = [0 if owner in owners else None for owner in arguments.owners]

        def run(stacked: Leaves, us: Leaves, axes: Any = axes, with_us: bool = with_us) -> Leaves:
            held = [leaf if axis == 0 else leaf[0] for leaf, axis in zip(stacked, axes, strict=True)]
            mapped: Leaves = jax.vmap(pull, in_axes=(axes, 0 if with_us else None))(
                held, us if with_us else [u[0] for u in us]
            )
            return mapped

        mixed = [b if axis == 0 else a for a, b, axis in zip(*pairs, axes, strict=True)]
        found[name] = _Batched(run, ((pairs[0], us[0]), (mixed, us[1] if with_us else us[0])))
    return found


def _remat(trial: Trial, points: Points, us: Leaves) -> Leaves:
    subject = trial.subject
    if subject.kind == "gradient":
        pulled: Leaves = jax.checkpoint(_pull(trial))(list(points), us)
        return pulled
    replaced = subject.arguments.replaced
    run = jax.checkpoint(lambda wrt: split(subject.rule(*subject.arguments.call(replaced(points, wrt))))[0])
    return list(jax.vjp(run, subject.arguments.differentiated(points))[1](us)[0])


def _sharded(leaves: Points) -> Leaves:
    """Each leaf split along its first axis over all devices where that divides it, replicated otherwise."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(leaf: Any) -> Any:
        split = leaf.ndim > 0 and leaf.size > 0 and leaf.shape[0] % devices == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("n") if split else PartitionSpec()))

    return [put(leaf) for leaf in leaves]
