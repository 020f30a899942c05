"""`jaxbp report`."""

import argparse
from pathlib import Path

from jaxbp.commands import console, start_jax

HELP = """\
One page about one run or several, to read, print and send: a file of HTML that needs no other file and no network.

Of each run: scores, scores by class and calibration on the test set, its pictures and those of its studies, config and
environment. Of several, and of a sweep, first the comparison that `jaxbp compare` makes."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and the file."""
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a run folder, a sweep: its members, or a folder of runs"
    )
    parser.add_argument("--out", metavar="FILE.html", type=Path, default=Path("report.html"), help="report.html")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists; refused otherwise")


def run(options: argparse.Namespace) -> None:
    """Writes the page."""
    start_jax()
    from jaxbp.run.report.page import report

    report(options.runs, options.out, options.overwrite, console())
