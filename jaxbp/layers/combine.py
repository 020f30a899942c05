"""Layers of layers."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp.factor import Gather, Shared, Sum
from jaxbp.layers.dense import Scheme
from jaxbp.layers.embedding import Embedding
from jaxbp.mlp import Array

Shape = tuple[int, ...]


@runtime_checkable
class Layer(Protocol):
    """What a layer has to have; see the text of `jaxbp.layers`."""

    def init(self, key: Array, shape: Shape, scheme: Scheme = ..., dtype: DTypeLike = ...) -> tuple[Any, Shape]: ...
    def forward(self, params: Any, x: Array, key: Array | None = None) -> tuple[Array, Any]: ...
    def backward(self, params: Any, tape: Any, dl_dx: Array) -> tuple[Array, Any]: ...


class Chain:
    """f_L ∘ … ∘ f_1: the layers one after the other, and backward the last one first.

    Args:
      layers: first to last.
      first: their place in a longer chain of which they are a part, so that dropout draws what it draws there.

    Raises:
      TypeError: what is no layer.

    Example:
      >>> from jaxbp.layers import Dense, Elementwise
      >>> Chain(Dense(4), Elementwise("relu"), Dense(2)).init(jax.random.key(0), (3,))[1]
      (2,)
    """

    def __init__(self, *layers: Any, first: int = 0) -> None:  # whatever is no layer is named
        for number, layer in enumerate(layers, start=1):
            if not isinstance(layer, Layer):
                raise TypeError(f"layer {number} is {layer!r}, expected a layer of jaxbp.layers")
        self.layers: tuple[Layer, ...] = layers
        self.first = first

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.layers))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and (self.layers, self.first) == (other.layers, other.first)

    def __hash__(self) -> int:
        return hash((Chain, self.layers, self.first))

    def init(
        self, key: Array, shape: Shape, scheme: Scheme = "he", dtype: DTypeLike = jnp.float32
    ) -> tuple[tuple[Any, ...], Shape]:
        params = []
        for number, layer in enumerate(self.layers, start=1):
            try:
                found, after = layer.init(jax.random.fold_in(key, number - 1), shape, scheme, dtype)
            except ValueError as error:
                raise ValueError(f"layer {number}, {layer}, gets {shape}: {error}") from None
            params.append(found)
            shape = after
        return tuple(params), shape

    def forward(self, params: tuple[Any, ...], x: Array, key: Array | None = None) -> tuple[Array, tuple[Any, ...]]:
        tapes = []
        for number, (layer, layer_params) in enumerate(zip(self.layers, params, strict=True), self.first):
            x, tape = layer.forward(layer_params, x, None if key is None else jax.random.fold_in(key, number))
            tapes.append(tape)
        return x, tuple(tapes)

    def backward(self, params: tuple[Any, ...], tapes: tuple[Any, ...], dl_dx: Array) -> tuple[Array, tuple[Any, ...]]:
        factors = []
        for layer, layer_params, tape in reversed(list(zip(self.layers, params, tapes, strict=True))):
            dl_dx, factor = layer.backward(layer_params, tape, dl_dx)
            factors.append(factor)
        return dl_dx, tuple(reversed(factors))


@dataclasses.dataclass(frozen=True)
class Residual:
    """x + f(x); ∂ℓ/∂x comes back along both ways.

    Example:
      >>> from jaxbp.layers import Dense
      >>> Residual(Dense(3)).init(jax.random.key(0), (5, 3))[1]
      (5, 3)
    """

    layer: Layer

    def init(
        self, key: Array, shape: Shape, scheme: Scheme = "he", dtype: DTypeLike = jnp.float32
    ) -> tuple[Any, Shape]:
        params, after = self.layer.init(key, shape, scheme, dtype)
        if after != shape:
            raise ValueError(f"it adds x to what it computes, which is {after}")
        return params, shape

    def forward(self, params: Any, x: Array, key: Array | None = None) -> tuple[Array, Any]:
        y, tape = self.layer.forward(params, x, key)
        return x + y, tape

    def backward(self, params: Any, tape: Any, dl_dx: Array) -> tuple[Array, Any]:
        through, factors = self.layer.backward(params, tape, dl_dx)
        return dl_dx + through, factors


@dataclasses.dataclass(frozen=True)
class Tied:
    """An embedding E whose rows are also the weights of the output: x = E[ids], h = f(x), logits = h Eᵀ.

    E is used twice: its gradient is the sum of that of the rows read and that of the output.

    Source: O. Press and L. Wolf, *Using the output embedding to improve language models*, 2017.

    Example:
      >>> from jaxbp.layers import Dense
      >>> Tied(Embedding(65, 8), Dense(8)).init(jax.random.key(0), (5,))[1]
      (5, 65)
    """

    embedding: Embedding
    layer: Layer

    def init(
        self, key: Array, shape: Shape, scheme: Scheme = "he", dtype: DTypeLike = jnp.float32
    ) -> tuple[tuple[Any, Any], Shape]:
        keys = jax.random.split(key)
        table, inner = self.embedding.init(keys[0], shape, scheme, dtype)
        params, after = self.layer.init(keys[1], inner, scheme, dtype)
        if after != inner:
            raise ValueError(f"the rows of its table are multiplied by {after}, expected {inner}")
        return (table, params), (*shape, self.embedding.tokens)

    def forward(self, params: tuple[Any, Any], ids: Array, key: Array | None = None) -> tuple[Array, Any]:
        table, inner = params
        x, _ = self.embedding.forward(table, ids)
        h, tape = self.layer.forward(inner, x, key)
        return h @ table.T, (ids, tape, h)

    def backward(self, params: tuple[Any, Any], tape: Any, dl_ds: Array) -> tuple[Array, tuple[Sum, Any]]:
        (table, inner), (ids, inner_tape, h) = params, tape
        dl_dx, factors = self.layer.backward(inner, inner_tape, dl_ds @ table)
        read = Gather(ids, dl_dx, len(table))
        return jnp.zeros(ids.shape, dl_dx.dtype), (Sum((read, Shared(h, dl_ds, bias=False))), factors)
