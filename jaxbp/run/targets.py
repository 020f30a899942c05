"""What a loss says of its targets: which numbers are allowed, which are labels, what the network's output means."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxbp.losses import LOSSES
from jaxbp.run.data import Scaling
from jaxbp.run.data.labels import MAX_CLASSES
from jaxbp.run.errors import UserError


class Kind(NamedTuple):
    """Of targets.

    allowed: in words;  fits: (N, C) ↦ (N,), whether a row is allowed;  mean: x⁽ᴸ⁾ ↦ E[y], in the units of the targets,
    and its name.
    """

    allowed: str
    fits: Callable[[np.ndarray], np.ndarray]
    mean: Callable[[np.ndarray], np.ndarray]
    name: str


def _are_probabilities(y: np.ndarray) -> np.ndarray:
    return np.all(y >= 0, axis=1) & np.isclose(y.sum(axis=1), 1)


def _are_shares(y: np.ndarray) -> np.ndarray:
    return np.all((y >= 0) & (y <= 1), axis=1)


def _are_counts(y: np.ndarray) -> np.ndarray:
    return np.all(y >= 0, axis=1)


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


PROBABILITIES = Kind("probabilities", _are_probabilities, _softmax, "softmax")
SHARES = Kind("numbers from 0 to 1", _are_shares, lambda x: 1 / (1 + np.exp(-x)), "σ")
COUNTS = Kind("counts, none below 0", _are_counts, np.exp, "exp")

KINDS = {
    "softmax_cross_entropy": PROBABILITIES,
    "kl_divergence": PROBABILITIES,
    "sigmoid_cross_entropy": SHARES,
    "poisson": COUNTS,
}
"""By the name of the loss. The others take any numbers, and x⁽ᴸ⁾ itself is what they predict."""


def kind_of(loss: str) -> Kind | None:
    """By the name of a loss, also one with label smoothing or over positions; None where any numbers are allowed."""
    return KINDS.get(loss.partition("(")[0].removeprefix("mean of ").removesuffix(" over positions"))


def check(loss: str, y: np.ndarray, where: str) -> None:
    """UserError that names the first row of (N, C) targets which the loss does not take; `where` names the targets."""
    kind = kind_of(loss)
    if kind is None:
        return
    wrong = np.flatnonzero(~kind.fits(y))
    if wrong.size:
        row = ", ".join(f"{v:.4g}" for v in y[wrong[0]][:4]) + (", …" if y.shape[1] > 4 else "")
        found = f"row {wrong[0]} of {where} is {row}"
        raise UserError(f"model.loss: {loss} takes {kind.allowed}, {found}; squared_error takes any numbers")


def most_labels(loss: str) -> int:
    """How many different whole numbers are labels, where they could be targets of a regression, too."""
    if kind_of(loss) is SHARES:
        return 2
    return MAX_CLASSES if loss in LOSSES and LOSSES[loss].target != "array" else 0


def labels(loss: str, y: np.ndarray) -> np.ndarray | None:
    """The labels (N,), or (N, T); also those of the largest probability; None where targets are other numbers."""
    if y.dtype.kind == "i":
        return y
    return y.argmax(axis=1) if kind_of(loss) is PROBABILITIES else None


def guesses(loss: str, output: np.ndarray) -> np.ndarray:
    """The labels (N,) that outputs (N, C) stand for: the largest one; of one output for two classes σ(x) > ½."""
    if kind_of(loss) is SHARES and output.shape[1] == 1:
        return (output[:, 0] > 0).astype(np.int32)
    return output.argmax(axis=1)


def predicted(loss: str, output: np.ndarray, scaling: Scaling | None) -> np.ndarray:
    """The prediction of a regression in the units of its targets, float64: eˣ, σ(x), softmax(x) or x, unscaled."""
    output = np.asarray(output, np.float64)
    if (kind := kind_of(loss)) is not None:
        with np.errstate(over="ignore"):  # eˣ is ∞ from x = 710 on, and σ(x) 0 from −710 on
            return kind.mean(output)
    return output if scaling is None else scaling.inverse(output)


def probabilities(loss: str, output: np.ndarray) -> np.ndarray | None:
    """Of each class, from the outputs (…, C) of a network that learned labels: softmax(x), or σ(x) each by itself.

    None where the loss has none, as hinge and squared_error.
    """
    kind = kind_of(loss)
    return kind.mean(output) if kind and kind is not COUNTS else None
