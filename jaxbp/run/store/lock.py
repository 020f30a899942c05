"""One process a run folder: a file that is locked while a process runs there. The system unlocks it when that dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from jaxbp.run.errors import UserError


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Makes the file if need be and locks it; it stays when the lock is gone, unless whoever holds it unlinks it.

    Raises:
      UserError: another process holds it, or has just unlinked it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # no child process inherits it
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode() or "?"
            raise UserError(f"{path.parent}: another process, {holder}, runs in this folder") from None
        if not path.exists() or not os.path.samestat(os.stat(path), os.fstat(descriptor)):
            raise UserError(f"{path.parent}: another process has just finished the run in this folder")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)
