"""The derivatives of the backward pass: ⟨v, B(x; u)⟩ is a scalar function of x and u, and has gradients of its own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.compare import compared, f64
from jaxbp.checker.report import ORACLE, Row
from jaxbp.checker.subject import Leaves
from jaxbp.checker.trial import QUICK, Trial, first_line

NAMES = {2: "second derivative", 3: "third derivative"}
Pull = Callable[[Leaves, Leaves], Leaves]
"""(leaves, cotangents) ↦ cotangents of the differentiated leaves, and whatever else."""


def higher_orders(trial: Trial, regimes: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Gradients through the rule against those through the reference, at drawn points, where there are no kinks."""
    subject = trial.subject
    why_not = ""
    if not (trial.traceable and trial.oracle):
        why_not = "rule and reference must be JAX code"
    elif "stop_gradient" in trial.operations:
        why_not = "the reference stops gradients; its second derivative need not be that of the rule"
    elif subject.project:
        why_not = "a projection says which part of the first derivative counts, and no more"
    if why_not:
        trial.notes.append(f"order 2: {why_not}")
        return []
    rng = np.random.default_rng(trial.settings.seed + 4)
    vs = [rng.standard_normal(leaf.shape) for leaf in subject.arguments.differentiated(trial.given)]
    pulls: list[Pull] = [lambda p, u: subject.pullback(p, u).cotangents, lambda p, u: subject.truth(p, u)[2]]
    rows: list[Row] = []
    for n in range(2, trial.settings.order + 1):
        pulls = [_gradient(trial, pull, vs) for pull in pulls]
        try:
            rows += [dataclasses.replace(row, subject=NAMES[n]) for row in _compared(trial, pulls, regimes)]
        except Exception as error:  # a rule that cannot be differentiated is right at order 1
            trial.notes.append(f"order {n}: {first_line(error)}")
            break
    return rows


def _compared(trial: Trial, pulls: Sequence[Pull], regimes: Mapping[str, Sequence[Any]]) -> list[Row]:
    dtype = trial.strict if trial.oracle == "float64" else trial.main
    eps, us = float(trial.info(dtype).eps), trial.rounded(trial.dense(), dtype)
    program = jax.jit(lambda p, u: [pull(p, u) for pull in pulls], **QUICK)
    paths = [*trial.paths, *(f"cotangent {n}" for n in range(len(us)))]
    rows = []
    for regime, leaves in regimes.items():
        with trial.setting(dtype):
            here = trial.cast(leaves, dtype)
            got, want = program(here, us)
            _, nearby = program([_next_to(leaf, eps) for leaf in here], us)  # differs by what the reference loses
        for path, g, w, v in zip(paths, got, map(f64, want), map(f64, nearby), strict=True):
            if np.all(np.isfinite(w)):
                lost = np.max(np.abs(w - v), initial=0.0)
                limit = 2e3 * eps**0.75 * (np.max(np.abs(w), initial=0.0) + np.abs(w)) + 1e3 * eps + 10 * lost
                rows.append(compared(ORACLE, path, dtype, regime, g, w, limit + trial.accuracy))
    return rows


def _next_to(leaf: Any, eps: float) -> Any:
    return leaf * (1 + 8 * eps) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _gradient(trial: Trial, pull: Pull, vs: Leaves) -> Pull:
    """Of ⟨v, what is pulled back⟩."""
    arguments = trial.subject.arguments

    def along(wrt: Leaves, leaves: Leaves, u: Leaves) -> Any:
        pulled = pull(arguments.replaced(leaves, wrt), u)
        return sum(jnp.sum(jnp.asarray(v, g.dtype) * g) for v, g in zip(vs, pulled, strict=False))

    def run(leaves: Leaves, u: Leaves) -> Leaves:
        dx, du = jax.grad(along, argnums=(0, 2))(arguments.differentiated(leaves), leaves, u)
        return [*dx, *(du if trial.subject.kind == "vjp" else (0 * d for d in du))]

    return run
