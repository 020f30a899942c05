"""`jaxbp trace`."""

import argparse
from pathlib import Path

from jaxbp.commands import console, start_jax

HELP = "Shows one sample on its way through a trained network and back: a table of every layer, and a figure."


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the sample, where to write."""
    parser.add_argument("folder", metavar="RUN_DIR", help="the folder of a finished run")
    parser.add_argument("--sample", metavar="N", type=int, required=True, help="its index in the split, from 0")
    parser.add_argument("--split", metavar="train|validation|test", default="test", help="test by default")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="the figure; by default RUN_DIR/trace_SPLIT_N.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a figure that exists; refused otherwise")


def run(options: argparse.Namespace) -> None:
    """Prints the table and draws the figure."""
    start_jax()
    from jaxbp.run.study import trace

    trace.trace(Path(options.folder), options.sample, console(), options.split, options.out, options.overwrite)
