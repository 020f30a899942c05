"""`jaxbp data list`, `jaxbp data describe` and `jaxbp data import`."""

import argparse
from pathlib import Path

from jaxbp.commands import console

HELP = "Lists the data sets, says what is understood of a table, or imports a data set from files at hand."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Three commands."""
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = actions.add_parser("list", help="the data sets, their sizes and where they are")
    listing.set_defaults(action=_list)
    describing = actions.add_parser("describe", help="what is understood of a table, and what looks wrong in it")
    describing.add_argument("file", metavar="FILE", type=Path, help="a .csv, .tsv, .parquet, .feather or .arrow")
    describing.add_argument("--target", metavar="NAME", action="append", default=[], help="the column to be learned")
    describing.add_argument("--decimal", choices=[".", ","], default=".", help="the decimal point of a .csv or .tsv")
    describing.set_defaults(action=_describe)
    importing = actions.add_parser("import", help="take a data set from files instead of downloading it")
    importing.add_argument("name", metavar="NAME", help="mnist, fashion_mnist or text")
    importing.add_argument(
        "path", metavar="PATH", help="a folder or archive with the four IDX files, gzipped or not; of text a file"
    )
    importing.set_defaults(action=_import)


def run(options: argparse.Namespace) -> None:
    """One of the three."""
    options.action(options)


def _list(_: argparse.Namespace) -> None:
    from jaxbp.run import data
    from jaxbp.run.report import text

    rows = [["" if v is None else f"{v:,}" if isinstance(v, int) else v for v in row] for row in data.describe()]
    text.table(console(), data.DataRow._fields, rows)


def _describe(options: argparse.Namespace) -> None:
    from jaxbp.run.data import description
    from jaxbp.run.report import text

    (rows, lines), to = description.describe(options.file, options.target, options.decimal), console()
    text.table(to, description.TITLES, rows)
    text.line(to, "\n".join(lines))


def _import(options: argparse.Namespace) -> None:
    from jaxbp.run import data

    path = Path(options.path)
    found = data.text.import_file(path) if options.name == data.text.NAME else data.import_files(options.name, path)
    print(f"{options.name} is in {found}")
