"""`jaxbp predict`."""

import argparse
from pathlib import Path

from jaxbp.commands import start_jax

HELP = "Writes a row a sample: its index, then the predicted class, or the numbers in the units of the targets."


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the data, where to write."""
    parser.add_argument("folder", metavar="RUN_DIR", help="the folder of a finished run")
    parser.add_argument(
        "--data", metavar="FILE.npz", required=True, type=Path, help="its array x, (N, inputs), is read; raw inputs"
    )
    parser.add_argument(
        "--out", metavar="FILE.csv", type=Path, help="where to write the predictions; standard output by default"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists; refused otherwise")


def run(options: argparse.Namespace) -> None:
    """Applies the network."""
    start_jax()
    from jaxbp.run.predict import predict

    predict(Path(options.folder), options.data, options.out, options.overwrite)
