"""The command `jaxbp`: each of its commands is a module of jaxbp.commands, which adds its own arguments."""

import importlib
import os
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from jaxbp import __version__
from jaxbp.commands import Parser, ended
from jaxbp.names import short
from jaxbp.run.errors import UserError

COMMANDS = {
    "run": "train the network of a config",
    "launch": "a run in several processes of this machine",
    "list": "the runs in a folder, a line each",
    "show": "one run: its config, scores, environment and pictures",
    "compare": "runs beside each other: what differs, and their scores",
    "report": "one page about runs: a file of HTML",
    "evaluate": "a trained network on a test set: scores by class",
    "predict": "apply a trained network to new data",
    "export": "a trained network as a file for PyTorch, ONNX or JAX",
    "check": "prove a backward pass against autodiff",
    "study": "per-sample gradients over a whole data set",
    "audit": "what a private run promises, tried out",
    "trace": "one sample through a trained network and back: a table and a figure",
    "data": "list the data sets, import one from files at hand",
}

EPILOG = """\
exit status:
  0    done
  1    a check did not pass
  2    bad input, said in one line
  3    the loss became NaN or infinite
  4    another process of the run is gone
  130  Ctrl-C
  141  nobody reads the output
  143  SIGTERM

completion, in the file that your shell reads first:
  bash, zsh  eval "$(register-python-argcomplete jaxbp)"
  fish       register-python-argcomplete --shell fish jaxbp | source"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    return ended(lambda: _command(arguments))


def _command(arguments: Sequence[str] | None) -> int | None:
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)  # tells the shell what may come next, and ends the process
    options, overrides = parser.parse_known_args(arguments)
    if "overrides" in options:
        options.overrides = overrides
    elif overrides:
        raise UserError(f"command line: unknown argument {short(overrides[0])}, see --help")
    status: int | None = options.run(options)
    return status


def _parser() -> Parser:
    about, layout = "Back-propagation by hand, in JAX.", RawDescriptionHelpFormatter
    parser = Parser(prog="jaxbp", description=about, epilog=EPILOG, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"jaxbp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        command = importlib.import_module(f"jaxbp.commands.{name}")  # small: what it needs is imported when it runs
        added = commands.add_parser(
            name,
            help=line,
            description=command.HELP,
            formatter_class=layout,
            allow_abbrev=False,
            add_help=name != "run",  # which lists the keys of its config too
        )
        command.arguments(added)
        added.set_defaults(run=command.run)
    return parser
