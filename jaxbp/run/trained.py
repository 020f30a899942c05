"""Runs from Python: `train`, and the run that it gives."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxbp import losses
from jaxbp.run import config as configs
from jaxbp.run import loop, targets
from jaxbp.run.data import Dataset
from jaxbp.run.data.dataset import from_arrays
from jaxbp.run.errors import UserError
from jaxbp.run.evaluate import numeric, regression, renumbered
from jaxbp.run.loop import Callback
from jaxbp.run.store import runs
from jaxbp.run.store.folder import How
from jaxbp.run.store.model import Model, load
from jaxbp.run.study.table import Columns

ARRAYS = "arrays-from-python"  # the data.name of a run that was given its data


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    folder: what `jaxbp run` writes;  model: as `jaxbp.run.load` gives it;  history: of each epoch its row of
    metrics.jsonl;  dataset: what it was trained on, where that was given as arrays.
    """

    folder: Path
    model: Model
    history: list[dict[str, Any]]
    dataset: Dataset | None

    @property
    def frame(self) -> Any:
        """The history as a DataFrame of pandas, which has to be installed."""
        import pandas

        return pandas.DataFrame(self.history)

    def _repr_html_(self) -> str:
        names = [name for name, value in self.history[0].items() if isinstance(value, int | float)]
        values = ([row.get(name, "") for name in names] for row in self.history)
        rows = [names, *([f"{v:.5g}" if isinstance(v, float) else str(v) for v in row] for row in values)]
        body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
        return f"{self.model._repr_html_()}<table><caption>{html.escape(str(self.folder))}</caption>{body}</table>"

    def predict(self, x: Any) -> np.ndarray:
        """The class of each sample, a number where their names are numbers; of a regression the targets (N, C)."""
        output = self.model.predict(x)
        if not self.model.classes:
            return output
        names = np.array(self.model.classes)
        return (names.astype(int) if numeric(self.model.classes) else names)[output.argmax(axis=-1)]

    def predict_proba(self, x: Any) -> np.ndarray:
        """The probability of each class, (N, C); ValueError where the loss has none."""
        loss = losses.get(self.model.net.loss).name
        p = targets.probabilities(loss, self.model.predict(x)) if self.model.classes else None
        if p is None:
            raise ValueError(f"{loss} has no probabilities of classes")
        return p

    def score(self, x: Any, y: Any) -> float:
        """The accuracy, y by names or numbers; of a regression R², averaged over the outputs."""
        output, y = self.model.predict(x), np.asarray(y)
        if not self.model.classes:
            return regression(y.reshape(output.shape), output)["r2"]
        names, which = np.unique(y, return_inverse=True)
        labels = renumbered("y", list(map(str, names)), self.model.classes)[which]
        return float(np.mean(labels.reshape(output.shape[:-1]) == output.argmax(axis=-1)))

    def study(self, quantities: Sequence[str] | None = None, split: str = "train") -> Columns:
        """Per-sample quantities of a split by their names, one row a sample: the table of `jaxbp study`."""
        from jaxbp.run.study import study

        return study.columns(self.folder, split, quantities, self.dataset)


def train(
    config: configs.Config | Mapping[str, Any] | str | Path,
    data: Sequence[Any] | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
) -> Run:
    """Trains the network of a config as `jaxbp run` does, and prints nothing.

    Args:
      config: tables with their keys, the path of a TOML file, or a `Config`.
      data: (x, y), (x, y, x_test, y_test) or a dictionary with the names of an .npz, x_val and y_val among them,
        instead of what [data] names: anything that NumPy makes arrays of, such as columns of pandas or polars. Text,
        booleans and integers in y are classes; other numbers make a regression.
      callbacks: called after every epoch with its row of metrics.jsonl and the parameters, a copy. What one raises ends
        the run; a note on the exception names it.
      folder: the run folder, as train.folder: a new one, or that of an unfinished run, which goes on. None: the next of
        runs/NAME, NAME that of the file or of the data.

    Raises:
      UserError: something in the config does not fit, or the folder can't be written.
      Diverged: the loss or a gradient was not finite; what was measured is in the folder.

    Example:
      >>> import tempfile
      >>> iris = {"data": {"name": "iris"}, "model": {"sizes": [4, 3]}, "optimizer": {"learning_rate": 0.1}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     run = train(iris | {"train": {"epochs": 2, "plots": False}}, folder=folder)
      >>> [row["epoch"] for row in run.history], run.predict([[5.1, 3.5, 1.4, 0.2]]).shape
      ([1, 2], (1,))
    """
    found = configs.read(Path(config)) if isinstance(config, str | Path) else config
    found = found if isinstance(found, configs.Config) else configs.validate(dict(found), "config")
    if found.sweep.enabled:
        raise UserError("sweep: train gives one run; jaxbp run trains a sweep")
    dataset = None
    if data is not None:
        found = dataclasses.replace(found, data=dataclasses.replace(found.data, name=ARRAYS))
        dataset = from_arrays(found.data, data, targets.most_labels(found.model.loss))
    if folder is not None:
        found = dataclasses.replace(found, train=dataclasses.replace(found.train, folder=str(folder)))
    name = Path(config if isinstance(config, str | Path) else found.data.name).stem
    how: How = "new" if found.train.folder is None else "auto"
    path = loop.run(found, name, Console(quiet=True), how, dataset, callbacks)
    history = [row for row in runs.rows(path / runs.METRICS) if runs.is_epoch(row)]
    return Run(path, load(path), history, dataset)
