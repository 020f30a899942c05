"""`jaxbp show`."""

import argparse
from pathlib import Path

from jaxbp.commands import console

HELP = "One run: how it ended, its scores after the last epoch, its config, its environment and its pictures."


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("folder", metavar="RUN_DIR", type=Path, help="the folder of a run, a sweep or a member of one")


def run(options: argparse.Namespace) -> None:
    """Prints a section on each of them."""
    from jaxbp.run.report import text
    from jaxbp.run.store import runs

    out, found = console(), runs.read(options.folder)
    ended = f"a sweep of {found.members}" if found.members else f"{found.last.get('epoch', 0)} epochs"
    text.line(out, f"{found.path}: {found.state}, {ended}\n")
    columns, rows = text.scores(found.scores)
    if rows:
        text.table(out, columns, rows)
    config = (found.path / "config.toml").read_text(encoding="utf-8")
    parts = {"config": config.splitlines(), "environment": runs.environment(found)}
    parts["pictures"] = [str(path) for path in sorted(found.path.iterdir()) if path.suffix in (".png", ".svg")]
    for name, lines in parts.items():
        text.line(out, "\n".join((f"{name}", *(f"  {line}".rstrip() for line in lines), "")))
