"""Back-propagation by hand, in JAX: forward pass, δ-recursion and gradient step of a multi-layer perceptron.

A name is imported when it is first used: `import jaxbp` alone imports no JAX, so that the command answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxbp import (
        activations,
        checker,
        curvature,
        factor,
        influence,
        initializers,
        kronecker,
        layers,
        losses,
        memory,
        models,
        persample,
        private,
        second_order,
        spectrum,
        tangent_kernel,
    )
    from jaxbp.activations import Activation
    from jaxbp.checker.check import check
    from jaxbp.curvature import r_backward, r_forward
    from jaxbp.interop import apply
    from jaxbp.losses import Loss
    from jaxbp.mlp import MLP, Affine, Factors, Params, Tape, backward, forward, update
    from jaxbp.network import Network, factors, gradient, init, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Activation",
    "Affine",
    "Factors",
    "Loss",
    "Network",
    "Params",
    "Tape",
    "activations",
    "apply",
    "backward",
    "check",
    "checker",
    "curvature",
    "factor",
    "factors",
    "forward",
    "gradient",
    "influence",
    "init",
    "initializers",
    "kronecker",
    "layers",
    "losses",
    "memory",
    "models",
    "persample",
    "private",
    "r_backward",
    "r_forward",
    "second_order",
    "spectrum",
    "tangent_kernel",
    "update",
    "value_and_grad",
]

_MODULES = {"activations", "checker", "curvature", "factor", "influence", "initializers", "kronecker", "layers"}
_MODULES |= {"losses", "memory", "models", "persample", "private", "second_order", "spectrum", "tangent_kernel"}
_HOMES = {"Activation": "activations", "Loss": "losses", "apply": "interop", "check": "checker"}  # the others: mlp
_HOMES |= {"r_forward": "curvature", "r_backward": "curvature"}
_HOMES |= dict.fromkeys(("Network", "factors", "gradient", "init", "value_and_grad"), "network")

if not TYPE_CHECKING:  # a type checker reads the imports above, and finds a name that is not there

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'jaxbp' has no attribute {name!r}")
        if name in _MODULES:
            return importlib.import_module(f"jaxbp.{name}")
        value = getattr(importlib.import_module(f"jaxbp.{_HOMES.get(name, 'mlp')}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__])
