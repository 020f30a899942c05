"""`jaxbp trace`: one sample through a trained network and back, in numbers and one figure in the lecture's layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxbp import losses
from jaxbp.mlp import MLP, Affine, Array, Params, Tape, backward, forward, wide
from jaxbp.run import targets
from jaxbp.run.errors import UserError
from jaxbp.run.problem import SPLITS
from jaxbp.run.report import text
from jaxbp.run.store import files
from jaxbp.run.store.model import finished, load
from jaxbp.run.study.measure import Subject, prepare


class Outcome(NamedTuple):
    """What the network says of the sample.

    name: of the numbers, "softmax(x⁽³⁾)" say;  predicted, target: (C,), in the same units;
    axis: "class" or "output";  ticks: names of the outputs.
    """

    name: str
    predicted: np.ndarray
    target: np.ndarray
    axis: str
    ticks: Sequence[str]


class Trace(NamedTuple):
    """All that the two passes compute for one sample.

    tape: x⁽⁰⁾ … x⁽ᴸ⁾ and s⁽¹⁾ … s⁽ᴸ⁾;  loss: ℓ;  dl_dx: ∂ℓ/∂x⁽⁰⁾ … ∂ℓ/∂x⁽ᴸ⁾;  dl_ds: δ⁽¹⁾ … δ⁽ᴸ⁾;
    gradient: ∂ℓ/∂w⁽ˡ⁾ and ∂ℓ/∂b⁽ˡ⁾.
    """

    tape: Tape
    loss: Array
    dl_dx: tuple[Array, ...]
    dl_ds: tuple[Array, ...]
    gradient: Params


def trace(
    run: Path, sample: int, console: Console, split: str = "test", out: Path | None = None, overwrite: bool = False
) -> Path:
    """Prints the table and draws the figure of one sample; returns the path of the figure.

    out: None: RUN_DIR/trace_SPLIT_SAMPLE.png, or .svg as the config has it.

    Raises:
      UserError: no finished run, no such sample, a figure that exists or can't be written.
    """
    load(run)  # says what is missing in a folder that is no run's
    subject = prepare(run, split)
    if not isinstance(subject.net, MLP):
        raise UserError(f'{run}: a trace is of an MLP, its model.kind is "{subject.problem.config.model.kind}"')
    if not 0 <= sample < len(subject.x):
        raise UserError(f"--sample: got {sample}, the {split} set has samples 0 to {len(subject.x) - 1}")
    kind = subject.problem.config.train.plot_format
    out = out or run / f"trace_{split}_{sample}.{kind}"
    files.check_new(out, (".png", ".svg"), overwrite)
    found = measure(subject.net, subject.model.params, *(part[sample] for part in subject.data))
    title = _title(subject, sample, found)
    _draw(found, subject, sample, title, out)
    _print(found, title, console)
    console.out(str(out), highlight=False)
    return out


def measure(net: MLP, params: Params, x: Array, y: Array) -> Trace:
    """Forward and backward pass of one sample, line by line as `jaxbp.forward` and `jaxbp.backward` state them."""
    loss = losses.get(net.loss)
    tape = forward(net, params, x)
    output = tape.x[-1].astype(wide(x.dtype))
    y = y if jnp.issubdtype(y.dtype, jnp.integer) else y.astype(output.dtype)
    last = loss.dl_dx(output, y).astype(x.dtype)  # ∂ℓ/∂x⁽ᴸ⁾, from the definition of ℓ
    dl_ds = backward(net, params, tape, last)
    dl_dx = tuple(w.T @ delta for (w, _), delta in zip(params, dl_ds, strict=True))  # ∂ℓ/∂x⁽ˡ⁻¹⁾ = (w⁽ˡ⁾)ᵀ ∂ℓ/∂s⁽ˡ⁾
    gradient = tuple(
        Affine(w=jnp.outer(delta, before), b=delta)  # ∂ℓ/∂w⁽ˡ⁾ = ∂ℓ/∂s⁽ˡ⁾ (x⁽ˡ⁻¹⁾)ᵀ, ∂ℓ/∂b⁽ˡ⁾ = ∂ℓ/∂s⁽ˡ⁾
        for delta, before in zip(dl_ds, tape.x[:-1], strict=True)
    )
    return Trace(tape, loss.ell(output, y), (*dl_dx, last), dl_ds, gradient)


def quantities(found: Trace) -> list[tuple[str, np.ndarray]]:
    """Every array by its name, in the order in which the passes compute them."""
    forwards = [("x⁽⁰⁾", found.tape.x[0])]
    for layer, (s, x) in enumerate(zip(found.tape.s, found.tape.x[1:], strict=True), 1):
        forwards += [(f"s{_up(layer)}", s), (f"x{_up(layer)}", x)]
    backwards = []
    layers = list(enumerate(zip(found.dl_dx[1:], found.dl_ds, found.gradient, strict=True), 1))
    for layer, (dl_dx, dl_ds, (w, b)) in reversed(layers):
        backwards += [(f"∂ℓ/∂x{_up(layer)}", dl_dx), (f"∂ℓ/∂s{_up(layer)}", dl_ds)]
        backwards += [(f"∂ℓ/∂w{_up(layer)}", w), (f"∂ℓ/∂b{_up(layer)}", b)]
    everything = [*forwards, *backwards, ("∂ℓ/∂x⁽⁰⁾", found.dl_dx[0])]
    return [(name, np.asarray(jax.device_get(a), np.float64)) for name, a in everything]


def _up(layer: int) -> str:
    return f"⁽{str(layer).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}⁾"


def _title(subject: Subject, sample: int, found: Trace) -> str:
    loss = float(found.loss) + 0.0  # no -0
    run = f"{subject.source.resolve().name}{'' if finished(subject.source) else ' (unfinished)'}"
    run += f", epoch {subject.model.best}, the best" if subject.model.best else ""
    head = f"{run} · {subject.problem.title} · {SPLITS[subject.split]} sample {sample} · ℓ = {loss:.4g}"
    if subject.model.classes:
        [guess] = targets.guesses(losses.get(subject.net.loss).name, np.asarray(found.tape.x[-1])[None])
        label = int(subject.y[sample])
        return f"{head} · label {subject.model.classes[label]}, predicted {subject.model.classes[guess]}"
    outcome = _outcome(found, subject, sample)
    pairs = (", ".join(f"{v:.4g}" for v in values[:4]) for values in (outcome.target, outcome.predicted))
    more = ", …" if len(outcome.target) > 4 else ""
    return f"{head} · target {next(pairs)}{more}, predicted {next(pairs)}{more}"


def _outcome(found: Trace, subject: Subject, sample: int) -> Outcome:
    """Prediction and target in the units of the targets; of labels probabilities where the loss knows of some."""
    output, loss, last = np.asarray(found.tape.x[-1], np.float64)[None], subject.net.loss, _up(len(found.dl_ds))
    kind, classes = targets.kind_of(losses.get(loss).name), subject.model.classes
    name = f"{kind.name}(x{last})" if kind else f"x{last}"
    if classes is None:
        predicted = targets.predicted(losses.get(loss).name, output, subject.model.targets)[0]
        outputs = [str(k) for k in range(len(predicted))]
        return Outcome(name if kind else "prediction", predicted, subject.y[sample], "output", outputs)
    label, predicted = np.arange(len(classes)) == subject.y[sample], kind.mean(output)[0] if kind else output[0]
    if len(predicted) < len(classes):  # one output for two classes
        predicted = np.append(1 - predicted, predicted)
    return Outcome(name, predicted, label.astype(np.float64), "class", classes)


def _print(found: Trace, title: str, console: Console) -> None:
    rows = []
    for name, a in quantities(found):
        numbers = (f"{v + 0.0:.4g}" for v in (np.linalg.norm(a), a.mean(), a.min(), a.max()))
        rows.append([name, "×".join(map(str, a.shape)), *numbers, f"{np.mean(a == 0):.1%}"])
    text.line(console, title)
    text.table(console, ("quantity", "shape", "norm", "mean", "min", "max", "zeros"), rows)


def _draw(found: Trace, subject: Subject, sample: int, title: str, out: Path) -> None:
    from jaxbp.run.report import figures  # matplotlib takes its time
    from jaxbp.run.study import trace_plots

    shape = subject.problem.dataset.image_shape
    image = None if shape is None or len(shape) > 2 else np.asarray(subject.x[sample], np.float64).reshape(shape)
    with files.writable(f"--out: {str(out)!r}"), files.replaced(out) as part:
        outcome = _outcome(found, subject, sample)
        figures.save(trace_plots.draw(dict(quantities(found)), image, outcome, title), part)
