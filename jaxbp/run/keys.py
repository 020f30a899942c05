"""Nested tables by dotted keys, "optimizer.arguments.momentum" say; which keys a [sweep] treats by themselves."""

import copy
from collections.abc import Mapping
from typing import Any

LEARNING_RATE, SEED = "optimizer.learning_rate", "train.seed"
FIXED = ("train.folder", "train.plots", "train.plot_format", "train.loggers")
"""What belongs to the sweep as a whole."""


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted keys.

    Example:
      >>> flat({"optimizer": {"name": "sgd", "arguments": {"momentum": 0.9}}, "sweep": {}})
      {'optimizer.name': 'sgd', 'optimizer.arguments.momentum': 0.9}
    """
    values: dict[str, Any] = {}
    for name, value in tables.items():
        key = f"{prefix}{name}"
        values |= flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return values


def put(tables: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables with values at dotted keys.

    Example:
      >>> put({"train": {"epochs": 3}}, {"train.epochs": 5, "train.memory.slots": 8})
      {'train': {'epochs': 5, 'memory': {'slots': 8}}}
    """
    found = copy.deepcopy(dict(tables))
    for key, value in values.items():
        *path, last = key.split(".")
        table = found
        for name in path:
            if not isinstance(table.get(name), dict):
                table[name] = {}
            table = table[name]
        table[last] = value
    return found
