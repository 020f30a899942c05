"""Layers beside the MLP: each forward pass with its hand-derived backward pass, for one sample.

A layer is a frozen, hashable description; its parameters are a pytree beside it. `Chain` and `Residual` make layers of
layers, and an `MLP` is one too. What a layer has to have::

    init(key, shape, scheme, dtype)    → the parameters, and the shape that one sample has after the layer
    forward(params, x, key=None)       → x of the next layer, and the tape: what backward needs and no more
    backward(params, tape, dl_dx)      → ∂ℓ/∂x of its input, and the factors of its gradient (`jaxbp.factor`), nested
                                         as its parameters are; linear in dl_dx

x is (channels,) or (positions, channels), or has as many axes of space as a convolution moves in, the channels last.
A shape that a layer cannot take is a ValueError of `init`; `jaxbp.Network` says there where it happened.

>>> import jax, jax.numpy as jnp
>>> layer = Chain(Dense(4), Elementwise("tanh"), Dense(2))
>>> params, shape = layer.init(jax.random.key(0), (3,))
>>> x, tape = layer.forward(params, jnp.ones(3, jnp.float32))
>>> dl_dx, factors = layer.backward(params, tape, jnp.ones(2, jnp.float32))
>>> shape, dl_dx.shape
((2,), (3,))
"""

from jaxbp.layers.attention import SelfAttention
from jaxbp.layers.combine import Chain, Layer, Residual, Tied
from jaxbp.layers.convolution import Conv1d, Conv2d
from jaxbp.layers.dense import Dense, Elementwise
from jaxbp.layers.dropout import Dropout
from jaxbp.layers.embedding import Embedding, PositionEmbedding
from jaxbp.layers.normalization import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from jaxbp.layers.pooling import AveragePool, MaxPool
from jaxbp.layers.shape import Flatten, Patches, Reshape

__all__ = [
    "AveragePool",
    "BatchNorm",
    "Chain",
    "Conv1d",
    "Conv2d",
    "Dense",
    "Dropout",
    "Elementwise",
    "Embedding",
    "Flatten",
    "GroupNorm",
    "Layer",
    "LayerNorm",
    "MaxPool",
    "Patches",
    "PositionEmbedding",
    "RMSNorm",
    "Reshape",
    "Residual",
    "SelfAttention",
    "Tied",
]
