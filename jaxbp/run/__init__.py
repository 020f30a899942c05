"""The whole of `jaxbp run CONFIG` on one page.

A run goes through these rooms, in this order. Each room is a folder here; a file is one concern::

    config.py         a TOML file and the command line's options, `overrides`, → one frozen, checked `Config`
    data/             the samples that it names, split into training and test set → `Dataset`, `Scaling`
    networks.py       the [model] table → an `MLP`, or a `Network` of other layers
    problem.py        data, network and scaling, checked against each other → `Problem`; studies and traces begin here
    compute/          how it is learned: `optimizers`; `step`, described by one static `StepSpec`; `epoch`, a compiled
                      scan of steps; the program that owns the state, `program.OneDevice` or `mesh.OnMesh`
    loop.py           prepare → train, epoch by epoch → write the results
    store/            what is kept: `folder.RunFolder`, with its lock; `checkpoint`; the trained `model`; `files`
    report/           what is said: `metrics`, the rows of metrics.jsonl; `progress`; `loggers`; `plots`; `page`, HTML
    host/             where it runs: the other `processes`, `launch`; `signals`; `memory`
    study/ sweep/     `jaxbp study` and `jaxbp trace`; a run for many seeds, learning rates and other values
    predict.py        a trained network on new data; evaluate.py, how good it is there; export.py, in other programs
    compare.py        runs beside each other, read by store/runs.py; trained.py, all of it from Python;
                      estimators.py, scikit-learn's interface

From a batch down. `loop.epochs` asks the program for an epoch. The program calls one compiled function, `epoch.epoch`:
it draws the order of the samples from a key and scans `step.step` over the batches. A step takes the mean gradient of
its batch from `jaxbp.memory`, which runs forward and backward pass of the layers, then updates the parameters. What the
steps measured comes back as arrays (`Steps`), what the epoch reached as an `Evaluation` of each set; `report.metrics`
makes the rows of them. Parameters stay on the device until they are saved.

With a validation set each epoch is scored on it in the place of the test set. The test set is looked at once, at the
end, with the parameters of the best epoch, which `monitor` follows from row to row and a checkpoint keeps.

Four things are decided once:

- one device or a mesh: by the class of program that `loop.prepare` takes;
- which process writes: in `RunFolder`, whose methods all processes call and the first one carries out;
- what a step is: in `StepSpec`, the one static argument of everything compiled;
- what a row of metrics.jsonl is: in the types of `report/metrics.py`.

The folder of a run holds config.toml (resolved), provenance.json, metrics.jsonl (the source of truth: a line an epoch,
before it a line a recorded step), timings.jsonl, params.safetensors and, of the best epoch, best.safetensors,
checkpoints/ and the pictures. The file .unfinished is there, and locked, while the run trains.

How it ends: `loop.run` returns the folder, or raises one of `errors.py`: `UserError` (exit status 2), `Diverged` (3),
`Lost` (4), `Stopped` (128 + the signal). What was measured is on disk in each case. What a run leaves is used so::

    import jaxbp.run
    model = jaxbp.run.load("runs/digits")
    output = model.predict(x)
    run = jaxbp.run.train("configs/digits.toml", data=(x, y))  # the same from Python, with data of your own
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxbp.run.store.model import Model, load
    from jaxbp.run.trained import Run, train

__all__ = ["Model", "Run", "load", "train"]

if not TYPE_CHECKING:  # imported when it is first used: the command line is read without JAX

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'jaxbp.run' has no attribute {name!r}")
        module = "store.model" if name in ("Model", "load") else "trained"
        return getattr(importlib.import_module(f"jaxbp.run.{module}"), name)
