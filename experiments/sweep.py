"""What does one program for a whole sweep save, and does it give the numbers of the separate runs?

Three ways to train the members of a [sweep] table: a separate run each; all in one program, taking their turns
(at_once = 1); all in one program, sharing each step by `jax.vmap`. They advance side by side, an epoch of each in turn,
in one process, so that what else the machine does meets all of them. Evaluations and metrics are in every figure. The
separate runs share the compiled evaluation and the start of the process, which is in their favour.

Command: python -m experiments.sweep [--config configs/digits_sweep.toml] [--out FOLDER]
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import report
from jaxbp import mlp
from jaxbp.mlp import Params
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run.config import Config
from jaxbp.run.errors import UserError
from jaxbp.run.report.metrics import EpochRow, MemberRow
from jaxbp.run.sweep import plots as sweep_plots
from jaxbp.run.sweep import scores as sweep_scores
from jaxbp.run.sweep import sweep

CONFIG = Path(__file__).parent.parent / "configs" / "digits_sweep.toml"
SEPARATE, TURNS, VMAP = "separate runs", "one program, in turns", "one program, vmap"


def separate_runs(config: Config) -> Iterator[tuple[Params, list[MemberRow]]]:
    """The members one by one; after each epoch their parameters, stacked, and rows, as `sweep.epochs` gives them."""
    members = sweep.prepare(config).members
    setups = [loop.prepare(member.config) for member in members]
    runs = [loop.epochs(setup) for setup in setups]
    for _ in range(config.train.epochs):
        found = [next(run) for run in runs]
        params = jax.tree.map(lambda *leaves: np.stack(leaves), *(setup.program.params for setup in setups))
        rows = [MemberRow(m.seed, e.row.learning_rate, m.setting, e.row) for m, e in zip(members, found, strict=True)]
        yield params, rows


def one_program(config: Config, at_once: int) -> Iterator[tuple[Params, list[MemberRow]]]:
    """The sweep as `jaxbp run` trains it."""
    table = dataclasses.replace(config.sweep, at_once=at_once)
    [cohort] = sweep.prepare(dataclasses.replace(config, sweep=table)).cohorts
    for epoch in sweep.epochs(cohort):
        yield epoch.params, epoch.rows


def measure(config: Config) -> tuple[dict[str, Any], list[sweep_scores.Group]]:
    """Trains three times; gives the results and, for the picture, what the program in turns measured.

    Raises:
      UserError: a config without a sweep, or one that does not fit.
      Diverged: a separate run did.
    """
    if not config.sweep.enabled or config.train.epochs < 2:
        raise UserError("sweep.seeds, sweep.learning_rate: this study needs one of them, and train.epochs of 2 or more")
    prepared = sweep.prepare(config)
    if len(prepared.cohorts) > 1:
        raise UserError("sweep: this study is about one program: seeds and learning rates only")
    members = len(prepared.members)
    runs = {SEPARATE: separate_runs(config), TURNS: one_program(config, 1), VMAP: one_program(config, members)}
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    lines: dict[str, list[MemberRow]] = {way: [] for way in runs}
    params: dict[str, Params] = {}
    for epoch in range(config.train.epochs):
        for way, run in runs.items():
            started = time.perf_counter()
            params[way], found = next(run)
            seconds[way].append(time.perf_counter() - started)
            lines[way] += found
        print(f"epoch {epoch + 1}: " + ", ".join(f"{way} {s[-1]:.2f} s" for way, s in seconds.items()), flush=True)
    groups = sweep_scores.groups(lines[TURNS])
    results = {
        "config": configs.to_dict(config),
        "members": members,
        "ways": {way: timing(seconds[way], seconds[SEPARATE]) | agreement(way, params, lines) for way in runs},
        "vmap_against_one": sources(),
        "scores": {
            group.label: {name: sweep_scores.statistics(group.last, name) for name in sweep_scores.names(groups)}
            for group in groups
        },
    }
    return results, groups


def timing(seconds: Sequence[float], separate: Sequence[float]) -> dict[str, float]:
    """Compilation is in the first epoch; of the others the median, and the median of the ratio within an epoch."""
    ratios = np.array(separate[1:]) / np.array(seconds[1:])
    return {
        "first_epoch_seconds": seconds[0],
        "epoch_seconds": float(np.median(seconds[1:])),
        "seconds": sum(seconds),
        "times_faster": sum(separate) / sum(seconds),
        "times_faster_without_compilation": float(np.median(ratios)),
    }


def agreement(way: str, params: dict[str, Params], lines: dict[str, list[MemberRow]]) -> dict[str, Any]:
    """With the separate runs after the last epoch: members with the same bits, the largest difference, the scores."""
    ours, theirs = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(p)], axis=1)
        for p in (params[way], params[SEPARATE])
    )
    error = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    scores = [[_test_score(row) for row in lines[w][-len(ours) :]] for w in (way, SEPARATE)]
    return {
        "same_bits": int((ours == theirs).all(axis=1).sum()),
        "median_relative_difference": float(np.median(error)),
        "largest_relative_difference": float(error.max()),
        "same_test_score": sum(a == b for a, b in zip(*scores, strict=True)),
    }


def _test_score(member: MemberRow) -> float | None:
    if not isinstance(member.row, EpochRow):
        return None
    return member.row.test.named()[member.row.test.main]


def sources(members: int = 32, batch: int = 32, wide: int = 128, narrow: int = 64) -> dict[str, float]:
    """What vmap over members changes in a step, piece by piece on random arrays: the largest absolute difference."""

    def draw(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (members, *shape), jnp.float32)

    pieces: dict[str, tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]] = {
        "w x": (lambda w, x: jax.vmap(lambda x: w @ x)(x), (draw(0, wide, narrow), draw(1, batch, narrow))),
        "wᵀ δ": (lambda w, d: jax.vmap(lambda d: w.T @ d)(d), (draw(2, wide, narrow), draw(3, batch, wide))),
        "Σ δ xᵀ": (lambda d, x: d.T @ x, (draw(4, batch, wide), draw(5, batch, narrow))),
        "Σ δ": (mlp.accurate_sum, (draw(6, batch, narrow),)),
        "log softmax": (lambda s: jax.nn.log_softmax(s, axis=-1), (draw(7, batch, 10),)),
    }
    found = {}
    for name, (f, arguments) in pieces.items():
        together, alone = jax.jit(jax.vmap(f))(*arguments), jax.jit(f)
        apart = jnp.stack([alone(*(a[i] for a in arguments)) for i in range(members)])
        found[name] = float(jnp.max(jnp.abs(together - apart)))
    return found


def show(results: dict[str, Any]) -> None:
    """Two tables: the three ways, and the scores by learning rate."""
    columns = ("first epoch, s", "epoch, s", "all, s", "× faster", "without compilation", "same bits", "largest diff.")
    rows = [
        [
            way,
            f"{row['first_epoch_seconds']:.2f}",
            f"{row['epoch_seconds']:.3f}",
            f"{row['seconds']:.1f}",
            f"{row['times_faster']:.2f}",
            f"{row['times_faster_without_compilation']:.2f}",
            f"{row['same_bits']} of {results['members']}",
            f"{row['largest_relative_difference']:.0e}",
            f"{row['same_test_score']} of {results['members']}",
        ]
        for way, row in results["ways"].items()
    ]
    report.table(f"{results['members']} members", ("", *columns, "same test score"), rows)
    pieces = ", ".join(f"{name} {value:.1e}" for name, value in results["vmap_against_one"].items())
    print(f"vmap against one by one, largest absolute difference: {pieces}")
    score = "test_rmse" if "test_rmse" in next(iter(results["scores"].values())) else "test_accuracy"
    scores = [
        [rate, *("–" if v is None else f"{v:.4f}" for v in found[score].values()), f"{found['test_loss']['mean']:.4f}"]
        for rate, found in results["scores"].items()
    ]
    report.table(score.replace("_", " "), ("learning rate", "mean", "s.d.", "min", "max", "test loss"), scores)


def draw(results: dict[str, Any], groups: Sequence[sweep_scores.Group]) -> Figure:
    """The sweep's own picture."""
    config = results["config"]
    network = "-".join(map(str, config["model"]["sizes"]))
    return sweep_plots.curves(groups, f"{config['data']['name']} · {network}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its tables, writes sweep.json and sweep.png."""
    parser = report.parser(__doc__, CONFIG, "the run, with a [sweep] table")
    with report.study("sweep", parser, arguments) as study:
        results, groups = measure(configs.read(study.options.config))
        show(results)
        study.save(results, draw(results, groups))


if __name__ == "__main__":
    main()
