"""TensorBoard event files, if the config asks for them: what metrics.jsonl has, by epoch."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxbp.run.report.metrics import EpochRow, Timing

Write = Callable[[EpochRow, Timing], None]


@contextlib.contextmanager
def events(path: Path | None, begun: int) -> Iterator[Write]:
    """Gives the function that writes an epoch, after `begun` of them; one that does nothing where there is no path."""
    if path is None:
        yield lambda row, timing: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(path), purge_step=begun + 1) as writer:

        def write(row: EpochRow, timing: Timing) -> None:
            values = {name: v for name, v in (row.line() | timing.line()).items() if name not in ("epoch", "step")}
            for name, value in (scalar for item in values.items() for scalar in _scalars(*item)):
                writer.add_scalar(name, value, row.epoch)

        yield write


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    """A list of a number a layer becomes name/layer_1 …"""
    if isinstance(value, list):
        return [(f"{name}/layer_{i}", v) for i, v in enumerate(value, 1)]
    return [(name, float(value))]
