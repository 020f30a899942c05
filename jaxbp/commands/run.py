"""`jaxbp run`."""

import argparse
import dataclasses
import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxbp.commands import console, start_jax
from jaxbp.run.errors import UserError, outcome
from jaxbp.run.overrides import HELP as OVERRIDES

if TYPE_CHECKING:
    from jaxbp.run.config import Config

HELP = f"""\
Trains the network of a config, a TOML file, and writes a run folder. `jaxbp run CONFIG --help` lists all keys.

A run that was stopped goes on when the same command is given again, from its newest checkpoint: the newest folder of
runs/CONFIG, runs/CONFIG-2 … is taken if it is unfinished, or else the next one begun. With --resume and a larger
--train.epochs a finished run is trained longer. On a terminal the output has no colours where NO_COLOR is set.

{OVERRIDES}
`jaxbp --help` has the exit statuses."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What stands beside the overrides."""
    parser.usage = f"{parser.prog} CONFIG [options] [--KEY VALUE …]"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a TOML file, such as configs/digits.toml")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_const", dest="how", const="resume", help="go on: begin no new run")
    which.add_argument("--new", action="store_const", dest="how", const="new", help="begin a new run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and train nothing")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--quiet", action="store_true", help="print nothing but warnings and what goes wrong")
    said.add_argument(
        "--log",
        choices=("text", "json"),
        default="text",
        help="json: a line that names the run folder, then the lines of metrics.jsonl and timings.jsonl as they come",
    )
    parser.add_argument("-h", "--help", action="store_true", help="this text; after CONFIG with the values of its keys")
    parser.set_defaults(how="auto", overrides=[], usage=parser.format_help)
    if "_ARGCOMPLETE" in os.environ:
        _add_keys(parser)


def run(options: argparse.Namespace) -> None:
    """Trains, or prints what it would do."""
    if options.help:
        print(f"{options.usage()}\n{_listing(options)}")
        return
    config = configured(options)
    if options.print_config:
        import tomli_w

        from jaxbp.run.config import to_dict

        print(tomli_w.dumps(to_dict(config)), end="")
        return
    try:
        _train(config, options)
    except KeyboardInterrupt as error:  # it says which folder, if there is one
        raise KeyboardInterrupt(str(error) or "interrupted; nothing was written") from None


def configured(options: argparse.Namespace) -> "Config":
    """The config that is asked for.

    Raises:
      UserError: there is none, or something in it is wrong.
    """
    from jaxbp.run import config as configs

    if options.config is None:
        raise UserError("command line: which config? For example: jaxbp run configs/digits.toml")
    path = Path(options.config)
    if options.overrides and path.suffix != ".toml" and not path.exists():
        first = options.overrides[0]
        raise UserError(f"command line: {path} is no config; it comes first: jaxbp run CONFIG {first} …")
    return configs.read(path, options.overrides)


def _train(config: "Config", options: argparse.Namespace) -> None:
    from jaxbp.run import loop
    from jaxbp.run.host import processes
    from jaxbp.run.sweep import sweep

    path = Path(options.config)
    name = path.resolve().parent.name if path.name == "config.toml" else path.stem  # that of a run is in its folder
    with processes.joined(outcome):
        start_jax()
        screen = console(processes.leads() and not options.quiet)
        shown = screen if options.log == "text" else console(False)

        def told(line: Mapping[str, Any]) -> None:
            if options.log == "json":
                screen.out(json.dumps(line), highlight=False)

        try:
            (sweep if config.sweep.enabled else loop).run(config, name, shown, options.how, told=told)
        except UserError as error:
            raise UserError(f"{path}{' and command line' if options.overrides else ''}: {error}") from None


def _add_keys(parser: argparse.ArgumentParser) -> None:
    """Every key as an option, for a shell that completes it."""
    from jaxbp.run import config as configs

    for table in dataclasses.fields(configs.Config):
        for key, text in configs.documented(table.type).items():  # type: ignore[arg-type]
            about = textwrap.shorten(text, 80, placeholder=" …")
            parser.add_argument(f"--{table.name}.{key.replace('_', '-')}", nargs="*", help=about)


def _listing(options: argparse.Namespace) -> str:
    """Every key with its value and what it means."""
    from jaxbp.run import config as configs

    config = configured(options) if options.config else configs.Config()
    lines: list[str] = []
    for table in dataclasses.fields(config):
        values = getattr(config, table.name)
        lines += [f"[{table.name}] {type(values).__doc__}"]
        for key, text in configs.documented(type(values)).items():
            lines += [f"  --{table.name}.{key.replace('_', '-')} {_shown(getattr(values, key))}"]
            lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """As an override takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "[]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
