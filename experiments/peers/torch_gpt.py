"""The GPT of `jaxbp.models.gpt` in PyTorch, of modules that the peers know: embeddings, layer norms, affine maps."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

HEADS = 4


def gpt(layers: list[tuple[np.ndarray, np.ndarray]], sigma: Callable[[], nn.Module]) -> nn.Sequential:
    """The two tables, then six pairs a block: norm, q k v, their output, norm, up, down; at the end norm and head.

    It gives the outputs at the positions of all samples one below the other, (N · T, tokens). `parameters()` is in the
    order of `layers`.
    """
    (tokens, positions), *rest = layers
    count, width = tokens.shape
    modules: list[nn.Module] = [Tables(count, *positions.shape)]
    for _ in range(len(rest) // 6):
        perceptron = nn.Linear(width, 4 * width), sigma(), nn.Linear(4 * width, width)
        modules += [Residual(nn.LayerNorm(width), Attention(width)), Residual(nn.LayerNorm(width), *perceptron)]
    model = nn.Sequential(*modules, nn.LayerNorm(width), nn.Linear(width, count), nn.Flatten(0, 1))
    flat = [torch.from_numpy(array) for pair in layers for array in pair]
    model.load_state_dict(dict(zip(model.state_dict(), flat, strict=True)))
    return model


class Tables(nn.Module):
    """The rows of the tokens plus those of their positions."""

    def __init__(self, tokens: int, positions: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(positions, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        of_each = torch.arange(ids.shape[1]).repeat(len(ids), 1)  # Opacus looks for the samples along the first axis
        return self.tokens(ids) + self.positions(of_each)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x)


class Attention(nn.Module):
    """Causal, with q, k and v by one affine map; PyTorch's own function computes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))
