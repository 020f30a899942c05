"""How a run shows that it goes on: a bar with the time left on a terminal, a line an epoch elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxbp.run import metrics

Show = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def shown(console: Console, epochs: int, begun: int = 0) -> Iterator[Show]:
    """Gives the function that shows the metrics of an epoch; `begun` epochs are done."""
    if not console.is_terminal:
        yield lambda row: console.out(metrics.line(row, epochs), highlight=False)
        return
    columns = (
        *(TextColumn("epoch"), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("left")),
        *(TimeRemainingColumn(), TextColumn("{task.description}")),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=epochs, completed=begun)

        def show(row: dict[str, Any]) -> None:
            name = "test_accuracy" if "test_accuracy" in row else "test_rmse"  # more would not fit into 80 columns
            score = f"{name.replace('_', ' ')} {metrics.format_score(name, row[name])}"
            progress.update(task, advance=1, description=score)

        yield show


def summary(rows: list[dict[str, Any]], seconds: float) -> Table:
    """The last epoch's scores and the best test score, as a table."""
    table = Table(title=f"{rows[-1]['epoch']} epochs, {seconds:.1f} s of training")
    for column in ("", "train", "test", "best test (epoch)"):
        table.add_column(column, justify="right" if column else "left")
    for name in [name.removeprefix("train_") for name in rows[-1] if name.startswith("train_")]:
        best = (max if name in ("accuracy", "r2") else min)(rows, key=lambda row: row[f"test_{name}"])
        train, test, top = (
            metrics.format_score(name, row[key])
            for row, key in ((rows[-1], f"train_{name}"), (rows[-1], f"test_{name}"), (best, f"test_{name}"))
        )
        table.add_row(name, train, test, f"{top} ({best['epoch']})")
    return table
