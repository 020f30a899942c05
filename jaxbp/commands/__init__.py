"""What all commands have in common: arguments, output, devices and the way they end."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxbp.run.errors import UserError, outcome

if TYPE_CHECKING:
    from rich.console import Console


class Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"command line: {message}, see {self.prog} --help")


def ended(work: Callable[[], int | None]) -> int:
    """Does the work of a command: its exit status; what went wrong is one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow encoding has no · and no ℓ
    try:
        try:
            return work() or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has had enough
        drop_output()
        return 141
    except (Exception, KeyboardInterrupt) as error:
        status, line = outcome(error)
        print(f"jaxbp: {line}", file=sys.stderr)
        return status


def drop_output() -> None:
    """Sends standard output nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(speaks: bool = True) -> "Console":
    """Standard output for text, tables and bars; when its reader goes away, the work goes on in silence."""
    from rich.console import Console

    class Unbroken(Console):
        def on_broken_pipe(self) -> None:  # rich would end the command
            drop_output()

    return Unbroken(quiet=not speaks)


def find_devices() -> None:
    """Has JAX look for its devices, so that a missing one is one line.

    Raises:
      UserError: there is no device of the kind that JAX_PLATFORMS names.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(" (set JAX")[0] or "JAX finds no such device"
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX_PLATFORMS={asked}: {reason}; JAX_PLATFORMS=cpu works everywhere") from None
