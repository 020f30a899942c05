"""`jaxbp evaluate`."""

import argparse
from pathlib import Path

from jaxbp.commands import console, start_jax

HELP = """\
How good a trained network is, on the test set of its run or on other samples: accuracy, precision, recall, F1 and ROC
AUC by class, calibration and confusion matrix; of a regression RMSE, mean absolute error and R²."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the samples."""
    parser.add_argument("folder", metavar="RUN_DIR", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "--data",
        metavar="PATH",
        type=Path,
        help="an .npz with x and y, a table with the columns of the run, or a folder; the test set by default",
    )


def run(options: argparse.Namespace) -> None:
    """Prints the tables."""
    start_jax()
    from jaxbp.run.evaluate import evaluate

    evaluate(options.folder, options.data, console())
