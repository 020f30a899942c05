"""`jaxbp study`."""

import argparse
from pathlib import Path

from jaxbp.commands import console, start_jax
from jaxbp.run.quantities import QUANTITIES

HELP = """\
Per-sample gradients over a whole data set: a table with a row a sample, a summary by class, and pictures beside the
table.

RUN_DIR is studied with the parameters it trained; a CONFIG with those it would begin with. The loss is that of the
config without label smoothing. A row has the index in the split, label, prediction and loss. The quantities:

""" + "\n".join(f"  {name:14} {quantity.meaning}" for name, quantity in QUANTITIES.items() if quantity.studied)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run or config, what of it, where to write."""
    parser.add_argument("source", metavar="RUN_DIR|CONFIG", help="the folder of a finished run, or a TOML file")
    parser.add_argument(
        "--quantities", metavar="NAME", nargs="+", help="which ones, see above; by default all that fit"
    )
    parser.add_argument("--split", metavar="train|validation|test", default="train", help="train by default")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the table, .csv or .parquet; by default RUN_DIR/study_SPLIT.csv, or CONFIG_study_SPLIT.csv here",
    )
    parser.add_argument(
        "--chunk", metavar="N", type=int, default=1000, help="samples at a time, bounds the memory; 1000 by default"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist; refused otherwise")


def run(options: argparse.Namespace) -> None:
    """Writes the table, the summary and the pictures."""
    start_jax()
    from jaxbp.run.study import study

    wanted = options.split, options.quantities, options.out, options.chunk, options.overwrite
    study.study(Path(options.source), console(), *wanted)
