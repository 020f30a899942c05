"""Layers beside the MLP: each forward pass with its hand-derived backward pass, for one sample.

A layer is a frozen, hashable description; its parameters are a pytree beside it. `Chain` and `Residual` make layers of
layers, and an `MLP` is one too, without its loss. With a loss and the shape of a sample a layer is a network:

>>> import jax, jax.numpy as jnp, jaxbp
>>> layer = Chain(Conv2d(6, 5), Elementwise("relu"), MaxPool(2), Flatten(), Dense(10))
>>> net = jaxbp.Network(layer, "softmax_cross_entropy", shape=(28, 28, 1))
>>> params = jax.jit(jaxbp.init, static_argnums=0)(net, jax.random.key(0))
>>> x, y = jnp.ones((5, 28, 28, 1), jnp.float32), jnp.arange(5)
>>> loss, grads = jax.jit(jaxbp.value_and_grad, static_argnums=0)(net, params, x, y)
>>> _, factors = jax.jit(jaxbp.factors, static_argnums=0)(net, params, x, y)
>>> jaxbp.persample.squared_norms(factors).shape
(5,)

A language model is a chain from tokens to (positions, tokens), and its loss is over positions:

>>> block = Residual(Chain(LayerNorm(), SelfAttention(4, causal=True)))
>>> layer = Chain(Embedding(65, 32), PositionEmbedding(), block, LayerNorm(), Dense(65))
>>> net = jaxbp.Network(layer, jaxbp.losses.over_positions("softmax_cross_entropy"), shape=(16,))
>>> net.outputs
(16, 65)

Every layer has three methods::

    init(key, shape, scheme, dtype)    → the parameters, and the shape that one sample has after the layer
    forward(params, x, key=None)       → x of the next layer, and the tape: what backward needs and no more
    backward(params, tape, dl_dx)      → ∂ℓ/∂x of its input, and the factors of its gradient (`jaxbp.factor`), nested
                                         as its parameters are; linear in dl_dx

The x of one sample is (channels,), (positions, channels) or, for convolutions, axes of space and then channels. `init`
raises a ValueError for a shape that the layer cannot take; a `Chain` adds which of its layers it was.
"""

from jaxbp.layers.attention import SelfAttention
from jaxbp.layers.combine import Chain, Layer, Residual, Tied
from jaxbp.layers.convolution import Conv, Conv1d, Conv2d
from jaxbp.layers.dense import Dense, Elementwise
from jaxbp.layers.dropout import Dropout
from jaxbp.layers.embedding import Embedding, PositionEmbedding
from jaxbp.layers.normalization import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from jaxbp.layers.pooling import AveragePool, MaxPool
from jaxbp.layers.shape import Flatten, Patches, Reshape, Transpose

__all__ = [
    "AveragePool",
    "BatchNorm",
    "Chain",
    "Conv",
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
    "Transpose",
]
