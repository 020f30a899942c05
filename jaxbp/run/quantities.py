"""What is recorded and studied, by name: one table for the config, `jaxbp study`, the command's help and the guides."""

from typing import NamedTuple


class Quantity(NamedTuple):
    """A line on a quantity; whether a run can record it of a batch, and whether `jaxbp study` has it of a split.

    curvature: it takes many gradients, and only an MLP has it; so it is studied where it is asked for.
    """

    meaning: str
    recorded: bool = True
    studied: bool = True
    curvature: bool = False


def _curvature(meaning: str, recorded: bool = False) -> Quantity:
    return Quantity(meaning, recorded, studied=not recorded, curvature=True)


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
    "sharpness": _curvature("the largest eigenvalue of the Hessian and of the Gauss-Newton matrix", recorded=True),
    "hessian_trace": _curvature("the exact trace of each layer's block of the Hessian", recorded=True),
    "gradient_curvature": _curvature("gᵀHg / ‖g‖² of the mean gradient g, H the Hessian", recorded=True),
    "hessian": _curvature("of the mean loss of at most 1,000 samples; picture: its spectrum, by layer"),
    "ggn": _curvature("the same of the Gauss-Newton matrix, for softmax that of Fisher"),
    "ntk": _curvature("picture: the tangent kernel of at most 300 samples, by class, and its eigenvalues"),
    "influence": _curvature("on the loss of the test set; picture: which images help or harm single test images"),
}


def recorded() -> list[str]:
    """The names that a [study] table may have."""
    return [name for name, quantity in QUANTITIES.items() if quantity.recorded]


def studied() -> list[str]:
    """The names that `jaxbp study --quantities` may have."""
    return [name for name, quantity in QUANTITIES.items() if quantity.studied]
