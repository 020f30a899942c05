"""The ways in which a command can end badly; `jaxbp.cli` turns each into one line and an exit status."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Something the user can mend: a bad key, value, file or folder. One line; the command exits with 2."""


class Diverged(Exception):
    """The loss became NaN or infinite. One line that says where; the command exits with 3.

    rows: what was recorded in the epoch before it.
    """

    def __init__(self, message: str, rows: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class Lost(Exception):
    """Another process of the run is gone. One line that names it; the command exits with 4."""


class Stopped(Exception):
    """A signal ended the run after a whole epoch, which is saved. One line; the command exits with 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
