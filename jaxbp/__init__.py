"""Back-propagation by hand, in JAX: forward pass, δ-recursion and gradient step of a multi-layer perceptron."""

from jaxbp import activations, checker, initializers, losses, memory, persample
from jaxbp.activations import Activation
from jaxbp.checker import check
from jaxbp.interop import apply
from jaxbp.losses import Loss
from jaxbp.mlp import (
    MLP,
    Affine,
    Factors,
    Params,
    Tape,
    backward,
    factors,
    forward,
    gradient,
    init,
    update,
    value_and_grad,
)

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Activation",
    "Affine",
    "Factors",
    "Loss",
    "Params",
    "Tape",
    "activations",
    "apply",
    "backward",
    "check",
    "checker",
    "factors",
    "forward",
    "gradient",
    "init",
    "initializers",
    "losses",
    "memory",
    "persample",
    "update",
    "value_and_grad",
]
