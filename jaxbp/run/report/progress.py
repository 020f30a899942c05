"""How a run shows that it goes on: a bar with the time left on a terminal, a line an epoch elsewhere."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxbp.run.report import text
from jaxbp.run.report.metrics import EpochRow, FinalRow, Timing
from jaxbp.run.report.text import shown_score
from jaxbp.run.store.runs import LARGER_IS_BETTER

Show = Callable[[Mapping[str, float], Timing], None]
"""Shows the scores of an epoch, by their names in metrics.jsonl, and its time."""


@contextlib.contextmanager
def progress(console: Console, epochs: int, begun: int = 0) -> Iterator[Show]:
    """Gives the function that shows an epoch; `begun` epochs are done."""
    if not console.is_terminal:
        yield lambda scores, timing: console.out(line(scores, timing, epochs), highlight=False)
        return
    columns = (
        *(TextColumn("epoch"), MofNCompleteColumn(), BarColumn(10), TimeElapsedColumn(), TextColumn("left")),
        *(TimeRemainingColumn(), TextColumn("{task.description}")),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=epochs, completed=begun)

        def show(scores: Mapping[str, float], timing: Timing) -> None:
            held_out = "test" if "test_loss" in scores else "validation"
            name = f"{held_out}_{'accuracy' if f'{held_out}_accuracy' in scores else 'rmse'}"  # more would not fit
            loss = scores.get("train_loss", scores[f"{held_out}_loss"])
            shown = f"loss {loss:.4g} {name.replace('_', ' ')} {shown_score(name, scores[name])}"
            bar.update(task, completed=timing.epoch, description=shown)

        yield show


def line(scores: Mapping[str, float], timing: Timing, epochs: int) -> str:
    """An epoch in one line for a person."""
    shown = "  ".join(f"{name.replace('_', ' ')} {shown_score(name, value)}" for name, value in scores.items())
    return f"epoch {timing.epoch}/{epochs}  {shown}"


def summary(console: Console, rows: Sequence[EpochRow], seconds: float, final: FinalRow | None = None) -> None:
    """Prints the last epoch's scores, the best ones of the set that is not trained on, and those of the final test."""
    last, held_out = rows[-1], rows[-1].held_out
    lines = []
    for name in getattr(last, held_out).named():
        values = [row.scores()[f"{held_out}_{name}"] for row in rows]
        choose = max if name in LARGER_IS_BETTER else min
        best = choose(filter(math.isfinite, values), default=values[0])
        shown = [shown_score(name, last.scores()[f"{split}_{name}"]) for split in last.splits]
        tested = [shown_score(name, getattr(final.test, name))] if final else []
        lines.append([name, *shown, f"{shown_score(name, best)} ({rows[values.index(best)].epoch})", *tested])
    text.line(console, f"\n{last.epoch} epochs, {seconds:.1f} s of training")
    text.table(console, ("", *last.splits, f"best {held_out} (epoch)", *(["test"] if final else [])), lines)
    if final:
        text.line(console, final.describe())
