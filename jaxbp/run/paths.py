"""Paths that a config or an option names."""

from pathlib import Path

from jaxbp.run.errors import UserError


def named(key: str, name: str) -> Path:
    """The path of this name, `~` resolved, from the working folder on.

    It may lie anywhere, also above by "..": what protects a user's files is that a run folder has to be new, empty or
    an unfinished run of the same config, and that no command replaces a file unasked.

    Raises:
      UserError: it holds a null byte, or begins with the folder of a user that is not there.
    """
    if "\0" in name:
        raise UserError(f"{key}: got {name!r}, a path without a null byte is allowed")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~nobody-of-this-name
        raise UserError(f"{key}: got {name!r}: {error}") from None
