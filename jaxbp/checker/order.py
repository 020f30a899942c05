"""The derivative of the backward pass: ⟨v, B(x; u)⟩ is a scalar function of x and u, and has a gradient of its own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.compare import compared, f64
from jaxbp.checker.report import Row
from jaxbp.checker.subject import Leaves
from jaxbp.checker.trial import QUICK, Trial, first_line

SECOND = "second derivative"


def second_order(trial: Trial, regimes: Mapping[str, Sequence[Any]], us: Leaves) -> list[Row]:
    """Its gradient through the rule against that through the reference, at drawn points, where there are no kinks."""
    if not (trial.traceable and trial.oracle):
        trial.notes.append("order 2: rule and reference must be JAX code")
        return []
    dtype = trial.strict if trial.oracle == "float64" else trial.main
    rng = np.random.default_rng(trial.seed + 4)
    vs = [rng.standard_normal(leaf.shape) for leaf in trial.subject.arguments.differentiated(trial.given)]
    subject = trial.subject
    pullbacks = (lambda p, u: subject.pullback(p, u).cotangents), (lambda p, u: subject.truth(p, u)[2])
    program = jax.jit(lambda p, u: [_gradient(trial, pull, vs)(p, u) for pull in pullbacks], **QUICK)
    rows: list[Row] = []
    for regime, leaves in regimes.items():
        try:
            with trial.setting(dtype):
                got, want = program(trial.cast(leaves, dtype), trial.rounded(us, dtype))
        except Exception as error:  # a rule that cannot be differentiated is right at order 1
            trial.notes.append(f"order 2: {first_line(error)}")
            return []
        paths = [*trial.paths, *(f"cotangent {n}" for n in range(len(us)))]
        for path, g, w in zip(paths, got, want, strict=True):
            if np.all(np.isfinite(f64(w))):
                eps = float(trial.info(dtype).eps)
                limit = 2e3 * eps**0.75 * (np.max(np.abs(f64(w)), initial=0.0) + np.abs(f64(w))) + 1e3 * eps
                row = compared("float64 oracle", path, dtype, regime, g, f64(w), limit + trial.accuracy)
                rows.append(dataclasses.replace(row, subject=SECOND))
    return rows


def _gradient(trial: Trial, pull: Callable[[Leaves, Leaves], Leaves], vs: Leaves) -> Callable[[Leaves, Leaves], Leaves]:
    arguments = trial.subject.arguments

    def along(wrt: Leaves, leaves: Leaves, u: Leaves) -> Any:
        pulled = pull(arguments.replaced(leaves, wrt), u)
        return sum(jnp.sum(jnp.asarray(v, g.dtype) * g) for v, g in zip(vs, pulled, strict=True))

    def run(leaves: Leaves, u: Leaves) -> Leaves:
        dx, du = jax.grad(along, argnums=(0, 2))(arguments.differentiated(leaves), leaves, u)
        return [*dx, *(du if trial.subject.kind == "vjp" else (0 * d for d in du))]

    return run
