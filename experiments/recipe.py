"""Reads the config of an experiment that is not a run of `jaxbp run`: TOML → a frozen dataclass of its own."""

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from jaxbp.run.errors import UserError

Recipe = TypeVar("Recipe")


def read(kind: type[Recipe], path: Path) -> Recipe:
    """The file as a `kind`; every type and range is checked, no value is converted to another type.

    Raises:
      UserError: the file can't be read or is not TOML; the first key that is unknown, missing or has a wrong value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(values), strict=True)  # JSON: arrays as tuples
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_describe(error.errors()[0])}") from None
    except (ValueError, TypeError) as error:  # TypeError: a date, which JSON does not have
        raise UserError(f"{path}: not a TOML file of numbers, text, arrays and tables: {error}") from None


def _describe(error: Any) -> str:
    """A pydantic error as "runs.0.epochs: got 0, input should be greater than or equal to 1"."""
    key, given = ".".join(str(part) for part in error["loc"]), str(error["input"])
    if error["type"] in ("missing", "unexpected_keyword_argument"):
        return f"{key}: {'missing' if error['type'] == 'missing' else 'unknown key'}"
    shown = given if len(given) <= 60 else f"{given[:60]}…"
    return f"{key}: got {shown}, {error['msg'][:1].lower()}{error['msg'][1:]}"
