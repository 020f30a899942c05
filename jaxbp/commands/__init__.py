"""What all commands have in common: arguments, output, devices and the way they end."""

import argparse
import contextlib
import hashlib
import io
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
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


def start_jax() -> None:
    """Has JAX look for its devices, so that a missing one is one line, and keep what it compiles for the next command.

    The programs lie in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR where that is set. The folder may be
    deleted at any time.

    Raises:
      UserError: there is no device of the kind that JAX_PLATFORMS names.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with contextlib.suppress(OSError):  # a home that can't be written: the next command compiles again
            _programs().mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(_programs()))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(" (set JAX")[0] or "JAX finds no such device"
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX_PLATFORMS={asked}: {reason}; JAX_PLATFORMS=cpu works everywhere") from None


def _programs() -> Path:
    """A folder for each kind of processor: machines that differ may share the cache folder, but not their programs."""
    import pooch

    kind = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return Path(pooch.os_cache("jaxbp")) / "programs" / hashlib.sha256(kind.encode()).hexdigest()[:12]
