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

    out, found, environment = console(), runs.read(options.folder), runs.provenance(options.folder)
    ended = f"a sweep of {found.members}" if found.members else f"{found.last.get('epoch', 0)} epochs"
    text.line(out, f"{found.path}: {found.state}, {ended}\n")
    splits = [split for split in runs.SCORES if f"{split}loss" in found.scores]
    names = [name.removeprefix(splits[-1]) for name in found.scores if name.startswith(splits[-1])] if splits else []
    rows = [[name, *(text.shown_score(name, found.scores.get(f"{of}{name}")) for of in splits)] for name in names]
    if rows:
        text.table(out, ("", *(split.rstrip("_") for split in splits)), rows)
    config = (found.path / "config.toml").read_text(encoding="utf-8")
    parts = {"config": config.splitlines(), "environment": [f"{k}: {v}" for k, v in runs.flat(environment).items()]}
    parts["pictures"] = [str(path) for path in sorted(found.path.iterdir()) if path.suffix in (".png", ".svg")]
    for name, lines in parts.items():
        text.line(out, "\n".join((f"{name}", *(f"  {line}".rstrip() for line in lines), "")))
