"""`jaxbp audit`."""

import argparse
from pathlib import Path

from jaxbp.commands import console, start_jax
from jaxbp.run.errors import UserError

HELP = """\
Tries out what a private run promises: no sample, whatever it is, moves the clipped sum by more than C; and nobody can
tell which of some mislabelled samples, canaries, the run was trained with, better than its ε allows.

RUN_DIR is audited with the parameters it trained; a CONFIG with those it would begin with. For the canaries the run is
trained once more. Exit status: 0 the promise held, 1 it is broken, 2 bad input."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run or config, the canaries, where to draw."""
    parser.add_argument("source", metavar="RUN_DIR|CONFIG", help="the folder of a finished run, or a TOML file")
    parser.add_argument("--canaries", metavar="N", type=int, default=200, help="how many; 200 by default")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="by default RUN_DIR/audit.png or CONFIG_audit.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a figure that exists; refused otherwise")


def run(options: argparse.Namespace) -> int:
    """Prints what was found and draws the canaries."""
    source = Path(options.source)
    out = options.out or (source / "audit.png" if source.is_dir() else Path(f"{source.stem}_audit.png"))
    if out.exists() and not options.overwrite:
        raise UserError(f"--out: {out} exists; name another file or pass --overwrite")
    start_jax()
    from jaxbp.run import audit

    return 0 if audit.audit(source, options.canaries, out, console()) else 1
