"""How a run shows that it goes on: a bar with the time left on a terminal, a line an epoch elsewhere."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxbp.run.report import text
from jaxbp.run.report.metrics import EpochRow, Timing
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
            name = "test_accuracy" if "test_accuracy" in scores else "test_rmse"  # more would not fit into 80 columns
            loss = scores.get("train_loss", scores["test_loss"])
            shown = f"loss {loss:.4g} {name.replace('_', ' ')} {shown_score(name, scores[name])}"
            bar.update(task, completed=timing.epoch, description=shown)

        yield show


def line(scores: Mapping[str, float], timing: Timing, epochs: int) -> str:
    """An epoch in one line for a person."""
    shown = "  ".join(f"{name.replace('_', ' ')} {shown_score(name, value)}" for name, value in scores.items())
    return f"epoch {timing.epoch}/{epochs}  {shown}"


def summary(console: Console, rows: Sequence[EpochRow], seconds: float) -> None:
    """Prints the last epoch's scores and the best test score that is a number."""
    lines = []
    for name in rows[-1].test.named():
        choose = max if name in LARGER_IS_BETTER else min
        finite = [row for row in rows if math.isfinite(getattr(row.test, name))] or rows
        best = choose(finite, key=lambda row: getattr(row.test, name))
        values = [getattr(getattr(rows[-1], split), name) for split in rows[-1].splits]
        shown = [shown_score(name, value) for value in (*values, getattr(best.test, name))]
        lines.append([name, *shown[:-1], f"{shown[-1]} ({best.epoch})"])
    text.line(console, f"\n{rows[-1].epoch} epochs, {seconds:.1f} s of training")
    text.table(console, ("", *rows[-1].splits, "best test (epoch)"), lines)
