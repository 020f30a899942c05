"""Networks that are known by a name: each is a `jaxbp.Network` for samples of a shape.

>>> gpt((64,), 65).outputs
(64, 65)
"""

from collections.abc import Callable

from jaxbp import losses
from jaxbp.layers import (
    AveragePool,
    Chain,
    Conv1d,
    Conv2d,
    Dense,
    Dropout,
    Elementwise,
    Embedding,
    Flatten,
    Layer,
    LayerNorm,
    Patches,
    PositionEmbedding,
    Reshape,
    Residual,
    SelfAttention,
    Transpose,
)
from jaxbp.losses import Loss
from jaxbp.network import Network

CROSS_ENTROPY = "softmax_cross_entropy"


def lenet5(shape: tuple[int, ...], outputs: int, loss: str | Loss = CROSS_ENTROPY, hidden: str = "tanh") -> Network:
    """Of images (28, 28, channels): two convolutions with mean pooling and three dense layers, the last one linear.

    All maps of the second convolution are connected and the pooling has no weights, other than in the source.

    Args:
      shape, outputs, loss: of a sample, numbers of the output, of one sample.
      hidden: the activation.

    Raises:
      ValueError: images that are too small.

    Source: Y. LeCun et al., *Gradient-based learning applied to document recognition*, 1998, §II-B.

    Example:
      >>> lenet5((28, 28, 1), 10).outputs
      (10,)
    """
    sigma = Elementwise(hidden)
    layer = Chain(
        *(Conv2d(6, 5, padding="same"), sigma, AveragePool(2), Conv2d(16, 5), sigma, AveragePool(2)),
        *(Flatten(), Dense(120), sigma, Dense(84), sigma, Dense(outputs)),
    )
    return Network(layer, loss, shape)


def conv1d(
    shape: tuple[int, ...], outputs: int, loss: str | Loss = CROSS_ENTROPY, channels: int = 25, hidden: str = "relu"
) -> Network:
    """Of signals (positions, channels): three convolutions of stride 2 and one dense layer.

    Args:
      shape, outputs, loss: of a sample, numbers of the output, of one sample.
      channels, hidden: of each convolution, its activation.

    Raises:
      ValueError: signals of fewer than 3 positions.

    Source: S. Greydanus and D. Kobak, *Scaling down deep learning with MNIST-1D*, 2024, §3.

    Example:
      >>> conv1d((40, 1), 10).outputs
      (10,)
    """
    sigma, pad = Elementwise(hidden), ((1, 1),)
    convolutions = [Conv1d(channels, window, 2, pad) for window in (5, 3, 3)]
    layer = Chain(*(part for convolution in convolutions for part in (convolution, sigma)), Flatten(), Dense(outputs))
    return Network(layer, loss, shape)


def mixer(
    shape: tuple[int, ...],
    outputs: int,
    loss: str | Loss = CROSS_ENTROPY,
    patch: int = 4,
    layers: int = 2,
    width: int = 64,
    mixed: int = 32,
    hidden: int = 256,
) -> Network:
    """Of images (height, width, channels): perceptrons over the patches and over the channels in turn, then the mean.

    Args:
      shape, outputs, loss: of a sample, numbers of the output, of one sample.
      patch, layers, width: the side of a patch, how many layers, the channels of a patch.
      mixed, hidden: the widths of the perceptrons over patches and over channels.

    Raises:
      ValueError: a height or width that is no multiple of the patch.

    Source: I. Tolstikhin et al., *MLP-Mixer: an all-MLP architecture for vision*, 2021, §2.

    Example:
      >>> mixer((28, 28, 1), 10).outputs
      (10,)
    """
    _, (count, _) = Patches(patch).init(None, shape)
    block: tuple[Layer, ...] = (
        Residual(Chain(LayerNorm(), Transpose(), *_perceptron(mixed, count), Transpose())),
        Residual(Chain(LayerNorm(), *_perceptron(hidden, width))),
    )
    mean = (Reshape((count, 1, width)), AveragePool((count, 1)), Flatten())
    layer = Chain(Patches(patch), Dense(width), *block * layers, LayerNorm(), *mean, Dense(outputs))
    return Network(layer, loss, shape)


def gpt(
    shape: tuple[int, ...],
    outputs: int,
    loss: str | Loss = CROSS_ENTROPY,
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    dropout: float = 0.0,
) -> Network:
    """Of tokens (positions,): a decoder in the manner of GPT-2, with a head of its own.

    Args:
      shape: (positions,).
      outputs: how many tokens there are.
      loss: of one position; the network's is its mean over the positions.
      layers, heads, width, dropout: as usual; a layer has attention and a perceptron of 4 · width.

    Raises:
      ValueError: a width that is no multiple of the heads.

    Source: A. Radford et al., *Language models are unsupervised multitask learners*, 2019, §2.3.

    Example:
      >>> gpt((64,), 65, layers=1).outputs
      (64, 65)
    """
    drop = (Dropout(dropout),) if dropout else ()
    block: tuple[Layer, ...] = (
        Residual(Chain(LayerNorm(), SelfAttention(heads, causal=True), *drop)),
        Residual(Chain(LayerNorm(), *_perceptron(4 * width, width, "gelu_tanh"), *drop)),
    )
    tables = (Embedding(outputs, width), PositionEmbedding(), *drop)
    layer = Chain(*tables, *block * layers, LayerNorm(), Dense(outputs))
    return Network(layer, losses.over_positions(loss), shape)


def _perceptron(hidden: int, width: int, sigma: str = "gelu") -> tuple[Dense, Elementwise, Dense]:
    return Dense(hidden), Elementwise(sigma), Dense(width)


MODELS: dict[str, Callable[..., Network]] = {"lenet5": lenet5, "conv1d": conv1d, "mixer": mixer, "gpt": gpt}
