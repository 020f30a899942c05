"""TensorBoard event files, if the config asks for them: what metrics.jsonl has, and the config as a text.

They are two runs of TensorBoard, for each has an axis of its own: "epochs", and "steps" with what [study] records.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from jaxbp.run.config import Config, to_dict
from jaxbp.run.report.metrics import Row, StepRecord, Timing

Write = Callable[[Sequence[Row], Timing | None], None]


@contextlib.contextmanager
def events(path: Path | None, config: Config, begun: int, done: int) -> Iterator[Write]:
    """Gives the function that writes the rows of an epoch, or the last one; it does nothing where there is no path.

    begun, done: epochs and steps after which the run goes on; what an earlier process wrote after them is cut off.
    """
    if path is None:
        yield lambda rows, timing: None
        return
    from tensorboardX import SummaryWriter

    with contextlib.ExitStack() as stack:
        epochs = stack.enter_context(SummaryWriter(str(path / "epochs"), purge_step=begun + 1))
        steps = epochs
        if config.study.quantities:
            steps = stack.enter_context(SummaryWriter(str(path / "steps"), purge_step=done + 1))
        indented = tomli_w.dumps(to_dict(config)).replace("\n", "\n    ")  # code, in Markdown
        epochs.add_text("config", f"    {indented}", begun + 1)

        def write(rows: Sequence[Row], timing: Timing | None) -> None:
            for row in rows:
                writer, at = (steps, row.step) if isinstance(row, StepRecord) else (epochs, row.epoch)
                for name, value in _scalars(row.line()):
                    writer.add_scalar(name, value, at)
            if timing is not None:
                for name, value in _scalars(timing.line()):
                    epochs.add_scalar(name, value, timing.epoch)

        yield write


def _scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line but for its epoch and step; of a list name/layer_1 …, of a table name/key."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/layer_{i}", float(v)) for i, v in enumerate(value, 1))
        elif name not in ("epoch", "step") and not isinstance(value, str):
            yield f"{prefix}{name}", float(value)
