"""Looking a thing up by its name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")

ALIASES = {  # what others call it
    **{"xavier": "glorot", "xavier_uniform": "glorot_uniform", "xavier_normal": "glorot_normal"},
    **{"kaiming": "he", "kaiming_uniform": "he_uniform", "kaiming_normal": "he_normal"},
    **{"linear": "identity", "logistic": "sigmoid", "swish": "silu", "leakyrelu": "leaky_relu"},
    **{"mse": "squared_error", "mae": "absolute_error", "cross_entropy": "softmax_cross_entropy"},
    **{"crossentropy": "softmax_cross_entropy", "bce": "sigmoid_cross_entropy", "kl": "kl_divergence"},
    **{"lr": "learning_rate", "beta1": "b1", "beta2": "b2", "batchsize": "batch_size"},
    **{"fashionmnist": "fashion_mnist", "breastcancer": "breast_cancer"},
}


def lookup(kind: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """table[name], or a ValueError of one line with what was given, the nearest name and all that is allowed.

    Example:
      >>> lookup("colour", "gren", {"red": 1, "green": 2})
      Traceback (most recent call last):
      ValueError: unknown colour 'gren', did you mean 'green'? Allowed: red, green
    """
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, table) or '.'} Allowed: {', '.join(table)}")
    return table[name]


def nearest(name: str, allowed: Iterable[str], form: str = "{}") -> str:
    """ ", did you mean X?" where an allowed name X is near, or else nothing; it is said in the form given.

    Near is the same name in other letters, what others call it, the beginning of a longer name, or a slip of the pen.

    Example:
      >>> nearest("epoch", ["seed", "epochs"])
      ", did you mean 'epochs'?"
      >>> nearest("Xavier", ["he", "glorot"])
      ", did you mean 'glorot'?"
      >>> nearest("verbose", ["seed", "epochs"])
      ''
    """
    given, names = _plain(name), {_plain(known): known for known in allowed}
    longer = [known for known in names if known.startswith(f"{given}_")]
    near = [given, ALIASES.get(given, given), *longer[:1], *difflib.get_close_matches(given, names, n=1, cutoff=0.65)]
    return next((f", did you mean {form.format(names[known])!r}?" for known in near if known in names), "")


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


def short(value: object) -> str:
    """repr(value), cut after 60 characters.

    Example:
      >>> short("a" * 100) == f"'{'a' * 59}…"
      True
    """
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
