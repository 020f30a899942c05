"""Which parameters a mesh splits over `model`: `jaxbp.run.compute.mesh` gives them, XLA's partitioner does the rest.

Two maps alternate (out, in), after Megatron-LM (Shoeybi et al. 2019, §3): one that has its output units split feeds one
that has its input units split, and only the second one has to sum over `model`:

    out     w P("model", None)   b P("model")   s⁽ˡ⁾ = w⁽ˡ⁾ x⁽ˡ⁻¹⁾ + b⁽ˡ⁾ needs nothing of the others
    in      w P(None, "model")   b P()          w⁽ˡ⁾ x⁽ˡ⁻¹⁾ is summed over `model`

In an MLP layers 1, 3, … are the first of two. The last, if their count is odd, is whole: its softmax would need a sum
too, for a layer of few units. In a `Chain` two `Dense` are such a pair if only `Elementwise` or `Dropout` is between
them. So are the two maps of `SelfAttention`. Its q, k and v follow one another in the first of them, so XLA exchanges
them between devices once more. All other parameters are whole.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxbp.layers import Chain, Dense, Dropout, Elementwise, Residual, SelfAttention, Tied
from jaxbp.layers.attention import Projections
from jaxbp.mlp import MLP, Affine
from jaxbp.network import Net, layer_of

OUT, IN, WHOLE = Affine(P("model", None), P("model")), Affine(P(None, "model"), P()), Affine(P(), P())  # type: ignore[arg-type]


def param_specs(net: Net, params: Any) -> Any:
    """How each parameter is split: a `PartitionSpec` in the place of each array of `params`."""
    return _of_layer(layer_of(net), params)


def _of_layer(layer: Any, params: Any) -> Any:
    match layer:
        case MLP():
            return (OUT, IN) * (len(params) // 2) + (WHOLE,) * (len(params) % 2)
        case Residual():
            return _of_layer(layer.layer, params)
        case Tied():
            return P(), _of_layer(layer.layer, params[1])
        case SelfAttention():
            return Projections(*map(_with_bias, (OUT, IN), params))
        case Chain():
            specs = list(map(_of_layer, layer.layers, params))
            for pair in _pairs(layer):
                for number, spec in zip(pair, (OUT, IN), strict=True):
                    specs[number] = _with_bias(spec, params[number])
            return tuple(specs)
    return jax.tree.map(lambda leaf: P(), params)


def _with_bias(spec: Affine, params: Any) -> Any:
    return spec if isinstance(params, Affine) else spec.w


def _pairs(chain: Chain) -> list[tuple[int, int]]:
    """The places of two dense layers between which nothing mixes the units; each layer is in one pair."""
    found: list[tuple[int, int]] = []
    first: int | None = None
    for number, layer in enumerate(chain.layers):
        if isinstance(layer, Dense) and first is not None:
            found.append((first, number))
            first = None
        elif isinstance(layer, Dense):
            first = number
        elif not isinstance(layer, Elementwise | Dropout):
            first = None
    return found
