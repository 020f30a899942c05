"""A path in a config names something below the folder that it begins with."""

from pathlib import Path

from jaxbp.run.errors import UserError


def below(key: str, name: str) -> Path:
    """The path that a config names, `~` resolved; from / or ~ on, or from the working folder.

    Raises:
      UserError: it climbs out of there by "..", or holds a null byte.
    """
    if ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{key}: got {name!r}, a path without '..' is allowed")
    if "\0" in name:
        raise UserError(f"{key}: got {name!r}, a path without a null byte is allowed")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~nobody-of-this-name
        raise UserError(f"{key}: got {name!r}: {error}") from None
