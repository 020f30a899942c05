"""Initial weights and biases by their names in the literature; the draws themselves are `jax.nn.initializers`'."""

from collections.abc import Callable

import jax
from jax.nn import initializers

from jaxbp.names import lookup

Initializer = Callable[..., jax.Array]
"""(key, shape, dtype) ↦ an array, as in `jax.nn.initializers`."""

AXES = {"in_axis": 1, "out_axis": 0}  # weights are (out, in)

WEIGHTS: dict[str, Initializer] = {
    "he_normal": initializers.he_normal(**AXES),  # He et al. 2015
    "he_uniform": initializers.he_uniform(**AXES),
    "glorot_normal": initializers.glorot_normal(**AXES),  # Glorot & Bengio 2010
    "glorot_uniform": initializers.glorot_uniform(**AXES),
    "lecun_normal": initializers.lecun_normal(**AXES),  # LeCun et al. 1998
    "lecun_uniform": initializers.lecun_uniform(**AXES),
    "orthogonal": initializers.orthogonal(),  # Saxe et al. 2013
    "normal": initializers.normal(0.01),
}
WEIGHTS |= {name: WEIGHTS[f"{name}_normal"] for name in ("he", "glorot", "lecun")}

BIASES: dict[str, Initializer] = {"zeros": initializers.zeros, "normal": initializers.normal(0.01)}


def weights(scheme: str | Initializer) -> Initializer:
    """The weight initialiser of that name, or the callable that was given; ValueError for an unknown name."""
    return lookup("scheme", scheme, WEIGHTS) if isinstance(scheme, str) else scheme


def biases(scheme: str | Initializer) -> Initializer:
    """The bias initialiser of that name, or the callable that was given; ValueError for an unknown name."""
    return lookup("bias", scheme, BIASES) if isinstance(scheme, str) else scheme
