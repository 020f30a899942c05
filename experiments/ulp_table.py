"""The worst error of every activation and loss in units of the last place (ULP), next to jax.nn's and optax's.

Truth is mpmath's at 80 digits, pointwise on a lattice of ordinary, huge, tiny, subnormal, ±0, ±∞ and NaN values;
σ(±∞) is the limit, σ(NaN) is NaN. The error is |got − truth| ÷ the spacing of the dtype at the truth.

* XLA on the CPU flushes subnormal numbers, intermediate ones as well, to 0: the unit is never less than the smallest
  normal number (f32: 1.2e-38), and at a subnormal s the truth at 0 counts as right as well.
* NaN or ±∞ where the truth is another, or the other way round, is "wrong": counted; the JSON file has the first
  20 points.
* At a kink our σ′ is the slope on the left. Others choose otherwise: their σ′ is not scored at kinks.
* A loss has two figures. The first takes the spacing at the largest of the terms that the truth is the sum of, as
  softmax(x) − y: what a rounded sum can reach. The second takes the spacing at the truth itself.

Command: python -m experiments.ulp_table [--dtype float32|float64|bfloat16] [--points 1000] [--json FILE]
         [--markdown FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

from experiments import report
from jaxbp.activations import ACTIVATIONS
from jaxbp.losses import LOSSES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the truth is the tests'
import oracles

NOTES = {
    "sigmoid": "by design: σ′ is x (1 − x), from x alone, so that a layer keeps one array; absolute error about ε",
    "tanh": "by design: σ′ is (1 − x)(1 + x), from x alone, so that a layer keeps one array; absolute error about ε",
    "gelu": "σ′ is 0 at s = −0.75, where its terms cancel; e^(−s²/2) multiplies the error of its argument by s²/2",
    "gelu_tanh": "σ′ is 0 at s = −0.75, where its terms cancel; the gate multiplies the error of its argument by 2|u|",
    "silu": "σ′ is 0 at s = −1.28, where its terms cancel; σ(s) is flushed to 0 before s multiplies it",
    "mish": "σ′ is 0 at s = −1.19, where its terms cancel; the gate is flushed to 0 before s multiplies it",
    "hard_silu": "jax.nn's σ′ is 0 at s = −1.5, where its terms cancel",
    "softmax_cross_entropy": "exp(x − max) multiplies the error of its argument by |x − max|; a loss or a slope "
    "below ε is lost where it is a difference of numbers near 1, as in jax.nn.log_softmax",
    "hinge": "the plain formula adds the label's own margin, 1, and subtracts it again",
    "kl_divergence": "near 0 the terms cancel",
    "poisson": "eˣ − y is a difference of numbers near y",
    "squared_error": "e² overflows before it is halved, where √max < |e| < √(2 max)",
}


class Score(NamedTuple):
    """The worst finite error in ULP, the point it occurs at, and the points where NaN or ±∞ is wrong."""

    worst: float
    where: str
    wrong: list[str]


def score(errors: list[float], points: list[str]) -> Score:
    finite = [(error, point) for error, point in zip(errors, points, strict=True) if np.isfinite(error)]
    worst, where = max(finite, default=(0.0, ""))
    return Score(worst, where, [point for error, point in zip(errors, points, strict=True) if not np.isfinite(error)])


# Activations --------------------------------------------------------------------------------------------------------


def curves(name: str, s: jax.Array) -> tuple[np.ndarray, ...]:
    """Our σ and σ′, jax.nn's σ and jax.grad of it."""
    sigma, theirs = ACTIVATIONS[name], oracles.SIGMAS[name]

    @jax.jit
    def at(s: jax.Array) -> tuple[jax.Array, ...]:
        x = sigma.sigma(s)
        return x, sigma.dsigma(s, x), theirs(s), jax.vmap(jax.grad(theirs))(s)

    return tuple(np.asarray(curve).astype(float) for curve in at(s))


def truth(name: str, s: np.ndarray, order: int) -> list[Any]:
    """σ or σ′ at every point, None where it is NaN: σ′ of the identity is 1 wherever s is."""
    f = (oracles.SIGMA_TRUTH, oracles.DSIGMA_TRUTH)[order][name]
    constant = name == "identity" and order == 1
    return [None if np.isnan(p) and not constant else f(oracles.exact(0 if np.isnan(p) else p)) for p in s]


def errors(name: str, got: np.ndarray, s: np.ndarray, order: int, size: Any = 0.0) -> list[float]:
    """In ULP at max(|truth|, size); XLA may have flushed a subnormal s to 0, so that σ′(0) is right there as well."""
    points, sizes = s.astype(float), np.broadcast_to(size, s.shape)
    found = [oracles.ulps(*both, s.dtype, at) for *both, at in zip(got, truth(name, points, order), sizes, strict=True)]
    at_zero = truth(name, np.zeros(1), order)[0]
    flushed = np.flatnonzero(np.abs(points) < float(jnp.finfo(s.dtype).tiny))
    for i in flushed if order == 1 else ():
        found[i] = min(found[i], oracles.ulps(got[i], at_zero, s.dtype, sizes[i]))
    return found


def activation_scores(name: str, s: np.ndarray) -> dict[str, Score]:
    """Of σ and σ′, ours and jax.nn's, in the dtype of s."""
    points = s.astype(float)
    value, slope, jax_value, jax_slope = curves(name, jnp.asarray(s))
    labels = [f"{p:.9g}" for p in points]
    flushed = np.where(np.abs(points) < float(jnp.finfo(s.dtype).tiny), 0.0, points)
    smooth = np.flatnonzero(~np.isin(flushed, oracles.KINKS.get(name, [])))
    jax_errors = errors(name, jax_slope, s, 1)
    return {
        "value": score(errors(name, value, s, 0), labels),
        "derivative": score(errors(name, slope, s, 1), labels),
        "jax.nn value": score(errors(name, jax_value, s, 0), labels),
        "jax.nn derivative": score([jax_errors[i] for i in smooth], [labels[i] for i in smooth]),
    }


# Losses -------------------------------------------------------------------------------------------------------------


def batches(name: str, dtype: Any, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """x (N, C) and y: generated ones of five classes at four scales; the lattice for a loss of single elements.

    No logit of a softmax is +∞: softmax has no limit there. −∞ where y is 0 is an impossible class.
    """
    rng = np.random.default_rng(0)
    of_classes = name in ("softmax_cross_entropy", "kl_divergence", "hinge")
    for labels in (True, False) if name == "softmax_cross_entropy" else (True,):
        for scale in (0.1, 3.0, 30.0, 1e4, 1e30) if of_classes else (3.0,):
            x = (scale * rng.standard_normal((max(size // 10, 1), 5))).astype(dtype)
            y = np.asarray(oracles.targets(name, rng, x.shape, dtype, labels))
            yield x, y
            if of_classes:
                impossible = (y + 1) % 5 if y.ndim == 1 else np.full(len(y), 2)
                x[np.arange(len(y)), impossible] = -np.inf
                if y.ndim == 2:
                    y = y.copy()
                    y[:, 2] = 0
                yield x, y
    if not of_classes:
        s = oracles.lattice(dtype, max(size // 4, 1))
        s = s[(s == 0) | (np.abs(s) >= jnp.finfo(dtype).tiny)]  # no NaN, nothing that is flushed to a kink at 0
        for target in {"sigmoid_cross_entropy": (0, 0.25, 1), "poisson": (0, 1, 5)}.get(name, (0, 1, -2.5)):
            yield s[:, None], np.full((s.size, 1), target, dtype)


def reference(name: str) -> Callable[..., Any]:
    return jax.jit(jax.vmap(jax.value_and_grad(oracles.LOSSES[name])))


def exact_target(y: np.ndarray) -> Any:
    return [oracles.exact(b) for b in y] if y.ndim else int(y)


def loss_truth(name: str, x: np.ndarray, y: np.ndarray) -> list[tuple[Any, list[Any]]]:
    """For each sample (truth, largest term) of ℓ, and of every ∂ℓ/∂xᵢ."""

    def summed(terms: list[Any]) -> tuple[Any, Any]:
        return mpmath.fsum(terms), max(map(abs, terms), default=0)

    found = []
    for a, b in zip(x, y, strict=True):
        ell, slopes = oracles.LOSS_TRUTH[name]([oracles.exact(element) for element in a], exact_target(b))
        found.append((summed(ell), [summed(slope) for slope in slopes]))
    return found


def loss_scores(name: str, dtype: Any, size: int) -> dict[str, Score]:
    """Of ℓ and ∂ℓ/∂x, ours and optax's or plain jnp's, in the spacing at the largest term and ("raw") at the truth."""
    ours, theirs = jax.jit(jax.vmap(lambda x, y: (LOSSES[name].ell(x, y), LOSSES[name].dl_dx(x, y)))), reference(name)
    errors: dict[str, list[float]] = {}
    labels: dict[str, list[str]] = {}
    for x, y in batches(name, dtype, size):
        want = loss_truth(name, x, y)
        for who, function in (("", ours), ("optax ", theirs)):
            value, slope = (np.asarray(a).astype(float) for a in function(jnp.asarray(x), jnp.asarray(y)))
            for n, (ell, slopes) in enumerate(want):
                kink = who and name == "absolute_error" and np.any(x[n] == y[n])
                pairs = [("value", value[n], ell), *(("derivative", slope[n, i], w) for i, w in enumerate(slopes))]
                for what, got, (w, largest) in pairs:
                    if not (kink and what == "derivative"):
                        for unit, at in (("", largest), ("raw ", 0)):
                            key = f"{who}{unit}{what}"
                            errors.setdefault(key, []).append(oracles.ulps(got, w, dtype, at))
                            labels.setdefault(key, []).append(f"x = {x[n].tolist()}, y = {y[n].tolist()}")
    return {key: score(errors[key], labels[key]) for key in errors}


# The tables ---------------------------------------------------------------------------------------------------------


def figure(error: float) -> str:
    return f"{error:.2f}" if error < 10 else f"{error:.0f}" if error < 1e4 else f"{error:.0e}"


def cell(scored: Score, raw: Score | None = None, where: bool = True) -> str:
    text = figure(scored.worst) + (f" / {figure(raw.worst)}" if raw else "")
    at = f" at {float(scored.where):.4g}" if where and scored.worst and scored.where else ""
    return text + at + (f", wrong at {len(scored.wrong)}" if scored.wrong else "")


def markdown(activations: dict[str, dict[str, Score]], losses: dict[str, dict[str, Score]], dtype: str) -> str:
    notes = [name for name in NOTES if name in activations | losses]
    mark = {name: f" [{notes.index(name) + 1}]" for name in notes}
    lines = [f"# Rounding of every σ and ℓ\n\nWorst error in ULP, {dtype}. Activations:", ""]
    lines += ["| activation | σ | σ′ | jax.nn σ | jax.nn σ′ |", "| --- | --- | --- | --- | --- |"]
    columns = ("value", "derivative", "jax.nn value", "jax.nn derivative")
    for name, scores in activations.items():
        lines.append(f"| {name}{mark.get(name, '')} | " + " | ".join(cell(scores[key]) for key in columns) + " |")
    lines += ["", "Losses, in the spacing at the largest term / at the truth itself:", ""]
    lines += ["| loss | ℓ | ∂ℓ/∂x | optax or jnp ℓ | optax or jnp ∂ℓ/∂x |", "| --- | --- | --- | --- | --- |"]
    for name, scores in losses.items():
        keys = (("value", "raw value"), ("derivative", "raw derivative"))
        cells = [cell(scores[w + a], scores[w + b], where=False) for w in ("", "optax ") for a, b in keys]
        lines.append(f"| {name}{mark.get(name, '')} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[{i + 1}] {NOTES[name]}.  " for i, name in enumerate(notes))]
    return "\n".join(lines) + "\n"


def listing(scored: Score) -> dict[str, Any]:
    return scored._asdict() | {"wrong": len(scored.wrong), "wrong_at": scored.wrong[:20]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--points", type=int, default=1000, help="of the lattice: 2 × by logarithm, 1 × evenly in ±100")
    parser.add_argument("--json", type=Path, help="write every worst error, its point and the wrong points")
    parser.add_argument("--markdown", type=Path, help="write the printed tables")
    with report.study("ulp_table", parser, None) as study:
        arguments = study.options
        jax.config.update("jax_enable_x64", True)
        start, dtype = time.perf_counter(), jnp.dtype(arguments.dtype)
        s = oracles.lattice(dtype, arguments.points)
        activations = {name: activation_scores(name, s) for name in ACTIVATIONS}
        losses = {name: loss_scores(name, dtype, arguments.points) for name in LOSSES}
        tables = markdown(activations, losses, arguments.dtype)
        print(tables)
        print(f"{s.size} points, {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if arguments.markdown:
            arguments.markdown.write_text(tables)
        if arguments.json:
            listed = {"dtype": arguments.dtype, "points": s.size, "jax": jax.__version__, "mpmath": mpmath.__version__}
            for kind, scored in (("activations", activations), ("losses", losses)):
                listed[kind] = {name: {key: listing(row) for key, row in rows.items()} for name, rows in scored.items()}
            arguments.json.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
