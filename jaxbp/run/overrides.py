"""Options of the command line that change a config: any key of any table, also inside arguments."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxbp.names import nearest, short
from jaxbp.run.errors import UserError

HELP = """\
Any key can be overridden, with - or _ in it, after CONFIG; the last value counts:
  --train.epochs 3, --train.epochs=3            sets a key
  --model.sizes 64,32,10 or 64 32 10            sets a list; [64, 32, 10] does too
  --train.plots no, --train.no-plots            true, false, yes or no; --train.plots alone is yes
  --optimizer.arguments.momentum=0.9            sets or adds one argument
  --optimizer.arguments b1=0.8 or '{b1 = 0.8}'  replaces all arguments; {} clears them
  --train.folder= or --train.folder none        clears a key, or one argument
  --sweep.optimizer.name sgd,adam               a sweep over any key; lists as '[[64,10],[64,8,10]]'
"""
FLAGS = ("resume", "new", "print-config", "quiet", "log")  # of the command, beside the keys
WORDS = {"": None, "none": None, "true": True, "yes": True, "false": False, "no": False}

Tables = dict[str, dict[str, Any]]
Fits = Callable[[str, str, Any], bool]
"""Whether a table's key may have a value."""


def applied(config: Tables, options: Sequence[str], fits: Fits) -> Tables:
    """The tables of a config with the values that options such as ``--train.epochs 3`` give.

    Of what the words of an option may mean, the key takes the first that fits; where none does, `config.validate` says
    what is allowed.

    Raises:
      UserError: an unknown key, an option without a value, a word that belongs to no option.
    """
    tables = {name: dict(table) for name, table in config.items()}
    for option, words in _split(options):
        _set(tables, option, words, fits)
    return tables


def unknown(key: str, tables: Mapping[str, Iterable[str]]) -> str:
    """What is said about a key that is not there."""
    table, _, name = key.rpartition(".")
    if re.match(r"sweep\.(mesh|checkpoint)\b", key):
        return f"{key}: it can't be swept: a sweep runs on one device and writes no checkpoints"
    if key == "train.tensorboard":
        return f'unknown key {key!r}: train.loggers takes its place, a list such as ["tensorboard"]'
    if table in tables:
        near, allowed = nearest(name, tables[table], f"{table}.{{}}"), tables[table]
        if table == "optimizer" and not near:
            near = f", did you mean 'optimizer.arguments.{name}'?"
    else:
        elsewhere = [f"{known}.{name}" for known in tables if name in tables[known]]
        near = f", did you mean {elsewhere[0]!r}?" if elsewhere else nearest(table or name, [*tables, *FLAGS])
        allowed = tables
    shown = key if len(key) <= 60 else f"{key[:60]}…"
    return f"unknown key {shown!r}{near or '. Allowed: ' + ', '.join(allowed)}"


def _split(options: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with its words; ``--key=`` has one empty word, ``--key`` has none."""
    found: list[tuple[str, list[str]]] = []
    for word in options:
        if re.match(r"--\w", word):
            option, equals, value = word[2:].partition("=")
            found.append((option, [value] if equals else []))
        elif found and (word[:1] != "-" or _numbers(word)):
            found[-1][1].append(word)
        else:
            raise UserError(f"command line: unknown argument {short(word)}, see --help")
    return found


def _set(tables: Tables, option: str, words: list[str], fits: Fits) -> None:
    key = option.replace("-", "_")
    table, _, path = key.partition(".")
    name, *inner = path.split(".")
    known = tables.get(table, {})
    if name not in known and name.startswith("no_") and not words and fits(table, name[3:], False):
        known[name[3:]] = False
        return
    if name not in known:
        raise UserError(f"command line: {unknown(key, tables)}")
    values = [_put(known[name], inner, reading) for reading in (_readings(words) if words else [True])]
    fitting = [value for value in values if fits(table, name, value)]
    if not words and not fitting:
        raise UserError(f"command line: --{option}: a value is missing")
    known[name] = [*fitting, *values][0]


def _put(before: Any, inner: Sequence[str], value: Any) -> Any:
    """The value, or the table `before` with the value at a key inside it; None takes that key away."""
    if not inner:
        return value
    first, *rest = inner
    table = dict(before) if isinstance(before, dict) else {}
    old = table.pop(first, None)
    return table if value is None and not rest else table | {first: _put(old, rest, value)}


def _readings(words: Sequence[str]) -> list[Any]:
    """What words may mean, the likeliest first: a value of TOML, a word, a number, a table, a list, a text."""
    text = " ".join(words).strip()
    items = [item for item in re.split(r"[,\s]+", re.sub(r"\s*=\s*", "=", text).strip("[{ ,}]")) if item]
    scalars, listed = list(map(_scalar, items)), len(items) > 1 or text.startswith("[")
    pairs = [item.split("=", 1) for item in items]
    tables = [{_key(key): _scalar(value) for key, value in pairs}] if items and all("=" in i for i in items) else []
    alternating = {_key(key): value for key, value in zip(items[::2], scalars[1::2], strict=False)}
    return [*_values(text), *tables, *([scalars, text] if listed else [text, scalars]), alternating]


def _scalar(text: str) -> Any:
    return [*_values(text), text][0]


def _key(text: str) -> str:
    return text.strip("'\"").replace("-", "_")


def _values(text: str) -> list[Any]:
    words = [WORDS[text.lower()]] if text.lower() in WORDS else []
    return [*words, *_toml(text), *_numbers(text)]


def _toml(text: str) -> list[Any]:
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return []
    return [found["value"]] if len(found) == 1 else []


def _numbers(text: str) -> list[float]:
    try:
        return [float(text)]  # .1 and 1. are no TOML
    except ValueError:
        return []
