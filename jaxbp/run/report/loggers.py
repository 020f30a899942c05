"""[train] loggers: what metrics.jsonl and timings.jsonl have, and the config, in the files of other programs.

All of it lies in the run folder, and nothing is sent anywhere. Scores have the epoch as their axis, and what [study]
records has the step. A run that goes on first tells each logger the rows that it kept, so that all of them are there
once: TensorBoard hides what it had, MLflow, which deletes nothing, takes what it lacks, and W&B begins its files again
under the same id.
"""

import contextlib
import importlib.util
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import tomli_w

from jaxbp.run.config import Config, to_dict
from jaxbp.run.errors import Stopped, UserError
from jaxbp.run.host import processes
from jaxbp.run.keys import flat
from jaxbp.run.report.metrics import EpochRow, FinalRow, Row, StepRecord, Timing
from jaxbp.run.store import runs
from jaxbp.run.store.folder import MAY_DIFFER, RunFolder

Tell = Callable[[Sequence[Row], Timing | None], None]
Log = Callable[[Row, Mapping[str, float]], None]
"""Of a row and its numbers by their names."""

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
MOST_METRICS = 1000  # that MLflow takes at once


def check(config: Config) -> None:
    """UserError for a logger whose package is missing."""
    for name in config.train.loggers:
        if importlib.util.find_spec(package := PACKAGES[name]) is None:
            raise UserError(f"train.loggers: {name} needs the package {package}, which is not installed")


@contextlib.contextmanager
def opened(folder: RunFolder, config: Config) -> Iterator[Tell]:
    """Gives the function that tells the loggers the rows of an epoch and its time, or the last row."""
    with contextlib.ExitStack() as stack:
        names = dict.fromkeys(config.train.loggers if processes.leads() else ())
        logs = [stack.enter_context(LOGGERS[name](folder.path, config)) for name in names]

        def tell(rows: Sequence[Row], timing: Timing | None) -> None:
            for row in rows if logs else ():
                values = dict(_scalars(row.line()))
                if timing is not None and isinstance(row, EpochRow):
                    values |= _scalars(timing.line())
                for log in logs:
                    log(row, values)

        timings = {line["epoch"]: Timing(**line) for line in runs.rows(folder.path / runs.TIMINGS)}
        for epoch, rows in itertools.groupby(folder.rows, lambda row: row.epoch):
            tell(list(rows), timings.get(epoch))
        yield tell


@contextlib.contextmanager
def _tensorboard(folder: Path, config: Config) -> Iterator[Log]:
    """Two runs of TensorBoard, for each has an axis of its own: events/epochs and events/steps."""
    from tensorboardX import SummaryWriter

    with contextlib.ExitStack() as stack:
        epochs = stack.enter_context(SummaryWriter(str(folder / "events" / "epochs"), purge_step=1))
        steps = epochs
        if config.study.quantities:
            steps = stack.enter_context(SummaryWriter(str(folder / "events" / "steps"), purge_step=1))
        indented = tomli_w.dumps(to_dict(config)).replace("\n", "\n    ")  # code, in Markdown
        epochs.add_text("config", f"    {indented}", 1)

        def log(row: Row, values: Mapping[str, float]) -> None:
            writer, at = (steps, row.step) if isinstance(row, StepRecord) else (epochs, row.epoch)
            for name, value in values.items():
                writer.add_scalar(name, value, at)

        yield log


@contextlib.contextmanager
def _mlflow(folder: Path, config: Config) -> Iterator[Log]:
    """A run in MLflow's file store mlruns/: the config as parameters, or as tags where a run may go on with another."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it is read when mlflow is imported
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow asks for it, because it has other stores, too
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(tracking_uri=(folder / "mlruns").absolute().as_uri())
    found = client.search_runs(["0"])
    run = (found[0] if found else client.create_run("0", run_name=folder.name)).info.run_id
    values = {key: str(value) for key, value in flat(to_dict(config)).items()}
    params = [Param(key, value) for key, value in values.items() if key not in MAY_DIFFER]
    tags = [RunTag(key, value) for key, value in values.items() if key in MAY_DIFFER]
    client.log_batch(run, params=params, tags=[RunTag("run_folder", str(folder)), *tags])
    client.update_run(run, "RUNNING")
    known = {key: max(m.step for m in client.get_metric_history(run, key)) for key in client.get_run(run).data.metrics}

    def log(row: Row, values: Mapping[str, float]) -> None:
        now, at = int(1000 * time.time()), row.step if isinstance(row, StepRecord) else row.epoch
        new = [Metric(name, value, now, at) for name, value in values.items() if at > known.get(name, 0)]
        for first in range(0, len(new), MOST_METRICS):
            client.log_batch(run, new[first : first + MOST_METRICS])

    try:
        yield log
    except BaseException as error:
        client.set_terminated(run, "KILLED" if isinstance(error, (Stopped, KeyboardInterrupt)) else "FAILED")
        raise
    client.set_terminated(run)


@contextlib.contextmanager
def _wandb(folder: Path, config: Config) -> Iterator[Log]:
    """An offline run of W&B in wandb/, for `wandb sync`; the score of the final test is in its summary.

    Its axis is the step. W&B cannot add to an offline run: of two folders with one id, the second replaces the first.
    """
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # it is read when wandb is imported
    import wandb

    earlier = sorted(folder.glob("wandb/offline-run-*-jaxbp*"))  # and none that is somebody else's
    quiet = wandb.Settings(silent=True, console="off", reinit="create_new", x_disable_stats=True)
    run = wandb.init(
        project="jaxbp",
        name=folder.name,
        id=earlier[0].name.rpartition("-")[2] if earlier else f"jaxbp{secrets.token_hex(8)}",
        dir=folder,
        mode="offline",
        config=to_dict(config),
        settings=quiet,
    )
    for replaced in earlier:
        shutil.rmtree(replaced)

    def log(row: Row, values: Mapping[str, float]) -> None:
        if isinstance(row, FinalRow):
            run.summary.update(dict(values))
        else:
            run.log({"epoch": row.epoch, **values}, step=row.step)

    try:
        yield log
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


LOGGERS: dict[str, Callable[[Path, Config], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}


def _scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line but for its epoch and step; of a list name/layer_1 …, of a table name/key."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/layer_{i}", float(v)) for i, v in enumerate(value, 1))
        elif name not in ("epoch", "step") and not isinstance(value, str):
            yield f"{prefix}{name}", float(value)
