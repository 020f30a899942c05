"""Which keys a [sweep] varies: its tables of lists, and dotted keys such as "optimizer.arguments.momentum"."""

import copy
from collections.abc import Mapping
from typing import Any

LEARNING_RATE, SEED = "optimizer.learning_rate", "train.seed"
FIXED = ("train.folder", "train.plots", "train.plot_format", "train.tensorboard")
"""What belongs to the sweep as a whole."""


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """The lists of nested tables by their dotted keys.

    Example:
      >>> flat({"optimizer": {"name": ["sgd", "adam"], "arguments": {"momentum": [0.5, 0.9]}}})
      {'optimizer.name': ('sgd', 'adam'), 'optimizer.arguments.momentum': (0.5, 0.9)}
    """
    found: dict[str, tuple[Any, ...]] = {}
    for name, values in tables.items():
        inner = flat(values, f"{prefix}{name}.") if isinstance(values, Mapping) else {f"{prefix}{name}": tuple(values)}
        found |= inner
    return found


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
