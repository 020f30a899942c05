"""Looking a thing up by its name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(kind: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """table[name], or a ValueError of one line with what was given, the nearest name and all that is allowed.

    Example:
      >>> lookup("colour", "gren", {"red": 1, "green": 2})
      Traceback (most recent call last):
      ValueError: unknown colour 'gren', did you mean 'green'? Allowed: red, green
    """
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}, {nearest(name, table)}? Allowed: {', '.join(table)}")
    return table[name]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """ "did you mean X", X the most similar of the allowed names.

    Example:
      >>> nearest("epoch", ["seed", "epochs"])
      "did you mean 'epochs'"
    """
    return f"did you mean {difflib.get_close_matches(name, list(allowed), n=1, cutoff=0)[0]!r}"
