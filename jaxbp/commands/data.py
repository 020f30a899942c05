"""`jaxbp data list` and `jaxbp data import`."""

import argparse
from pathlib import Path

from jaxbp.commands import console

HELP = "Lists the data sets, or imports one from files at hand."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Two commands."""
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = actions.add_parser("list", help="the data sets, their sizes and where they are")
    listing.set_defaults(action=_list)
    importing = actions.add_parser("import", help="take a data set from files instead of downloading it")
    importing.add_argument("name", metavar="NAME", help="mnist, fashion_mnist or text")
    importing.add_argument(
        "path", metavar="PATH", help="a folder or archive with the four IDX files, gzipped or not; of text a file"
    )
    importing.set_defaults(action=_import)


def run(options: argparse.Namespace) -> None:
    """One of the two."""
    options.action(options)


def _list(_: argparse.Namespace) -> None:
    from jaxbp.run import data
    from jaxbp.run.report import text

    rows = [["" if v is None else f"{v:,}" if isinstance(v, int) else v for v in row] for row in data.describe()]
    text.table(console(), data.DataRow._fields, rows)


def _import(options: argparse.Namespace) -> None:
    from jaxbp.run import data

    path = Path(options.path)
    found = data.text.import_file(path) if options.name == data.text.NAME else data.import_files(options.name, path)
    print(f"{options.name} is in {found}")
