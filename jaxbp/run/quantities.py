"""The per-sample quantities by name: one table for the config, `jaxbp study`, the command's help and the guides."""

from typing import NamedTuple


class Quantity(NamedTuple):
    """A line on a quantity; whether a run can record it of a batch, and whether `jaxbp study` has it of a split."""

    meaning: str
    recorded: bool = True
    studied: bool = True


QUANTITIES = {
    "squared_norms": Quantity("the squared norm of a sample's gradient, over all parameters and by layer"),
    "grand": Quantity("the norm, GraNd; pictures: its histogram by class, the hardest and the easiest images"),
    "el2n": Quantity("the norm of the error, softmax − label; only for softmax_cross_entropy"),
    "cosine": Quantity("the cosine with the mean gradient; picture: the mean cosine class by class", recorded=False),
    "noise_scale": Quantity("tr Σ / |G|², in samples: how many of them a batch needs; picture: over training"),
    "diversity": Quantity("Σ ‖g‖² / ‖Σ g‖²"),
    "coherence": Quantity("‖mean g‖² / mean ‖g‖²"),
    "stiffness": Quantity("the mean cosine of two samples' gradients, and how often it is positive", studied=False),
    "variance": Quantity("the variance over the samples, the mean over a layer's parameters", studied=False),
    "gram": Quantity("picture: the eigenvalues of the Gram matrix of at most 1,000 samples", recorded=False),
}


def recorded() -> list[str]:
    """The names that a [study] table may have."""
    return [name for name, quantity in QUANTITIES.items() if quantity.recorded]


def studied() -> list[str]:
    """The names that `jaxbp study --quantities` may have."""
    return [name for name, quantity in QUANTITIES.items() if quantity.studied]
