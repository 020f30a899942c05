"""`jaxbp compare`."""

import argparse
from pathlib import Path

from jaxbp.commands import console

HELP = """\
Runs beside each other: a row a run with the keys in which their configs differ and the scores after the last epoch.

Runs that differ in seed and fold alone are a group, with mean ± standard deviation. Two groups are compared by a paired
t-test of the runs that agree in all else: the p-value is the chance of such a difference where there is none."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, how they are grouped and sorted, where to write."""
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a run folder, a sweep: its members, or a folder of runs"
    )
    parser.add_argument("--by", metavar="KEY", help="group by this key alone, such as optimizer.name")
    parser.add_argument("--sort", metavar="COLUMN", help="of a score the best first; in the order given by default")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the rows as .csv, .json or .md; as .png the curves over one another"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists; refused otherwise")


def run(options: argparse.Namespace) -> None:
    """Prints the tables."""
    from jaxbp.run.compare import compare

    compare(options.runs, options.by, options.sort, options.out, options.overwrite, console())
