"""The ways in which a command can end badly; `outcome` turns each into one line and an exit status."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Something the user can mend: a bad key, value, file or folder. One line; the command exits with 2."""


class Diverged(Exception):
    """The loss became NaN or infinite. One line that says where; the command exits with 3.

    rows: what its epoch recorded, and last the row that says why it ended.
    """

    def __init__(self, message: str, rows: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class Lost(Exception):
    """Another process of the run is gone. One line that names it; the command exits with 4."""


class Stopped(Exception):
    """A signal ended the run; the line says what is saved. The command exits with 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for an exception; one that nobody expected is raised again."""
    match error:
        case UserError():
            return 2, str(error)
        case Diverged():
            return 3, f"diverged: {error}; a smaller learning rate may help"
        case Lost():
            return 4, f"{error}; the same command goes on from the newest checkpoint"
        case Stopped():
            return 128 + error.signal, str(error)
        case KeyboardInterrupt():
            return 130, str(error) or "interrupted"
        case ModuleNotFoundError() if error.name == "dp_accounting":
            return 2, str(error)
        case ModuleNotFoundError() if error.name and not error.name.startswith(("jaxbp", "experiments")):
            extra = "export" if error.name in ("flatbuffers", "onnx") else "run"
            return 2, f"the package {error.name} is missing: pip install '.[{extra}]' in the clone of jaxbp installs it"
        case OSError() if error.filename is not None and error.strerror:
            return 2, f"{error.filename}: {error.strerror}"
    if "RESOURCE_EXHAUSTED" in str(error):  # XLA's word for it
        reason = str(error).partition("\n")[0]
        return 2, f"out of memory: {reason}; smaller model.sizes or train.batch_size (study: --chunk) need less"
    raise error
