"""`jaxbp audit`: what a private run promises, tried out.

Sensitivity: the step of the run sums the clipped gradients of a batch with one of its samples and without, and with
others in its place. No sample may move the sum by more than C.

Canaries: samples with a wrong label, each of which is in the training set with the chance ½. The run is trained; of the
half of them that are clearest, those with a small loss are guessed to have been there, those with a large one not. With
(ε, δ) privacy a guess is right with the chance e^ε / (1 + e^ε) at most, δ being small. So if v of r are, 95 % sure is
ε ≥ ln p / (1 − p), p the bound of Clopper and Pearson. A larger one than is claimed disproves the claim.

Source: T. Steinke, M. Nasr and M. Jagielski, *Privacy auditing with one (1) training run*, 2023, theorem 5.2.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxbp.mlp import Array, Params
from jaxbp.run import loop
from jaxbp.run import problem as problems
from jaxbp.run.compute.epoch import evaluate
from jaxbp.run.compute.step import Samples, batch_gradient
from jaxbp.run.config import MeshConfig
from jaxbp.run.errors import UserError
from jaxbp.run.loop import Setup
from jaxbp.run.report import text
from jaxbp.run.store import files
from jaxbp.run.study.measure import prepare

VICTIMS = 8  # samples of the batch that are replaced, one after the other
CONFIDENCE = 0.95


class Canaries(NamedTuple):
    """Whether each was in the training set, its loss after training; the guesses; ε as claimed, and its lower bound."""

    inside: np.ndarray
    losses: np.ndarray
    guesses: int
    right: int
    claimed: float
    bound: float


def audit(source: Path, count: int, out: Path, console: Console) -> bool:
    """Prints what was found and draws the canaries; whether the promise held."""
    subject = prepare(source)
    config = subject.problem.config
    if not config.privacy.enabled:
        raise UserError(f"{source}: it has no [privacy] table, so there is no promise to audit")
    alone = dataclasses.replace(config, mesh=MeshConfig())
    setup = loop.assemble(dataclasses.replace(subject.problem, config=alone))
    moved, most = sensitivity(setup, subject.model.params)
    found = canaries(setup, count)
    text.table(console, ("a sample is", "moves the sum by, in C"), [[kind, f"{by:.7f}"] for kind, by in moved.items()])
    text.line(console, f"at most {most:.7f} is allowed: 1 and what the sum of a batch is rounded by")
    proves = f"{found.right} of {found.guesses} guesses are right: ε ≥ {found.bound:.3g}, {CONFIDENCE:.0%} sure"
    text.line(console, f"canaries: {proves}; claimed: ε = {found.claimed:.4g}")
    with files.writable(f"--out: {str(out)!r}"):
        _draw(found, f"{source.resolve().stem} · {setup.problem.title}", out)
    held = all(by <= most for by in moved.values()) and found.bound <= found.claimed
    text.line(console, f"{out}: {'the promise held' if held else 'THE PROMISE IS BROKEN'}")
    return held


def sensitivity(setup: Setup, params: Params) -> tuple[dict[str, float], float]:
    """By how much of C the sum of a batch moves at most, by what a sample is, and how much is allowed.

    Where C is adaptive, its count of norms ≤ C too, in ½.
    """
    spec, (x, y) = setup.spec, setup.problem.on_device("train")
    assert spec.privacy
    bound = spec.privacy.max_norm
    rows = jnp.arange(spec.privacy.capacity) % len(x)
    x, y, ones = x[rows], y[rows], jnp.ones(len(rows), x.dtype)

    @jax.jit
    def totals(x: Array, weights: Array) -> dict[str, Array]:
        found = batch_gradient(spec, params, Samples(x, y, weights, jnp.float32(1)))
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(found.gradient)])
        return {"": flat / bound} | ({} if found.within is None else {"; of norms ≤ C, in ½": 2 * found.within})

    moved: dict[str, float] = {}
    for victim in range(min(VICTIMS, len(rows))):
        without = totals(x, ones.at[victim].set(0))
        others = {"itself": x[victim], "another one": x[victim - 1], "huge": 1e30, "tiny": 1e-30}
        others |= {"NaN": jnp.nan, "∞": jnp.inf}
        for kind, other in others.items():
            for name, total in totals(x.at[victim].set(other), ones).items():
                by = np.linalg.norm(np.asarray(total, np.float64) - np.asarray(without[name], np.float64))
                moved[kind + name] = max(moved.get(kind + name, 0.0), float(by))
    return moved, 1 + 1e-6 + len(rows) * float(jnp.finfo(params[0].w.dtype).eps)


def canaries(setup: Setup, count: int) -> Canaries:
    """Trains the run anew with canaries among its samples, and guesses which."""
    problem, (x, y) = setup.problem, setup.problem.raw("train")
    classes = problem.dataset.classes
    if classes is None or not 8 <= count <= len(x) // 2:
        half = f"8 to {len(x) // 2}, half of the samples"
        allowed = half if classes else "none, for canaries are wrong labels of classes"
        raise UserError(f"--canaries: got {count}, allowed: {allowed}")
    rng = np.random.default_rng(0)
    chosen, inside = rng.permutation(len(x))[:count], rng.random(count) < 0.5
    wrong = (y[chosen] + rng.integers(1, len(classes), count)) % len(classes)
    labels = np.array(y)
    labels[chosen] = wrong
    kept = np.delete(np.arange(len(x)), chosen[~inside])
    dataset = problem.dataset._replace(x_train=x[kept], y_train=labels[kept])
    trained = loop.assemble(problems.pose(problem.config, dataset=dataset))  # a PCA is of the canaries, too
    for _ in loop.epochs(trained):
        pass
    samples = (jnp.asarray(part) for part in trained.problem.scaled(x[chosen], wrong.astype(y.dtype)))
    losses = np.asarray(evaluate(problem.scored, trained.program.whole, *samples).loss)
    order, side = np.argsort(losses), count // 4
    right = int(inside[order[:side]].sum() + (~inside[order[-side:]]).sum())
    assert trained.spec.privacy
    claimed = trained.spec.privacy.epsilon()
    return Canaries(inside, losses, 2 * side, right, claimed, lower_bound(right, 2 * side))


def lower_bound(right: int, guesses: int) -> float:
    """ln p / (1 − p), at least 0: below ε with 95 % confidence."""
    from scipy import stats

    p = stats.beta.ppf(1 - CONFIDENCE, right, guesses - right + 1) if right else 0.5
    return float(np.log(max(p, 0.5) / (1 - max(p, 0.5))))


def _draw(found: Canaries, heading: str, path: Path) -> None:
    """Histograms of the losses, and the share of canaries that were there against that of the others (ROC)."""
    from jaxbp.run.report import figures  # matplotlib takes its time

    figure, (axes,) = figures.panels(1, 2, heading)
    parts = {"in the training set": found.losses[found.inside], "not in it": found.losses[~found.inside]}
    axes[0].hist(list(parts.values()), bins=30, label=list(parts))
    axes[0].set(xlabel="loss of the wrong label", ylabel="canaries")
    cuts = np.sort(found.losses)
    rates = [np.searchsorted(np.sort(part), cuts, side="right") / max(len(part), 1) for part in parts.values()]
    axes[1].plot(rates[1], rates[0], label="loss below a threshold")
    false = np.linspace(0, 1, 200)
    allowed = np.minimum(np.exp(found.claimed) * false, 1 - np.exp(-found.claimed) * (1 - false))
    most = f"the most that ε = {found.claimed:.3g} allows"
    axes[1].plot(false, np.minimum(allowed, 1), "--", color="tab:gray", label=most)
    axes[1].set(xlabel="share of those not in it", ylabel="share of those in the training set")
    for axis in axes:
        axis.legend(fontsize="small")
    figures.save(figure, path)
