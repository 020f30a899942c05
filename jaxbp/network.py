"""A batch: the one forward and backward pass that everything calls, and the scaling contract.

δ and every per-sample quantity belong to ℓₙ, the loss of one sample, and are never divided by N; 1/N appears once, in
the mean. Weights are the one way to mask, weight or clip a sample. What is passed here is a network: an `MLP`, or a
`Network`, which is any layer with a loss.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbp import factor, initializers, losses, mlp
from jaxbp.factor import FactorTree
from jaxbp.layers import Chain, Embedding, Layer, Tied
from jaxbp.losses import Loss
from jaxbp.mlp import MLP, Array, weighted, wide
from jaxbp.shapes import check_params, check_shape, check_targets, uncut

ParamTree = Any
"""The parameters of a network: L of `Affine` for an MLP, a tree of arrays, nested as the layers are, for others."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A layer and the loss of what it computes, for samples of one shape. Hashable, as an `MLP` is.

    Args:
      layer: of `jaxbp.layers`, such as a `Chain`; an `MLP` is one too.
      loss: a name or a `Loss`. Where a sample's output has positions, (positions, C), as a language model's has, it has
        to be made by `jaxbp.losses.over_positions`. A sample is then a whole sequence.
      shape: of one sample, without the sample axis.

    Raises:
      ValueError: shapes that do not fit between two layers (the layer is named, what it gets and what it takes); a loss
        over positions where there are none, or none where there are.

    Example:
      >>> from jaxbp.layers import Chain, Conv2d, Dense, Elementwise, Flatten, MaxPool
      >>> layer = Chain(Conv2d(6, 5), Elementwise("relu"), MaxPool(2), Flatten(), Dense(10))
      >>> Network(layer, "softmax_cross_entropy", shape=(28, 28, 1)).outputs
      (10,)
    """

    layer: Any
    loss: str | Loss
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        loss = losses.get(self.loss)
        if not isinstance(self.layer, Layer):
            raise TypeError(f"layer is {self.layer!r}, expected a layer of jaxbp.layers, such as a Chain of them")
        if loss.positions != (len(self.outputs) == 2) or len(self.outputs) > 2:
            fits = "(T, C), of a sequence" if loss.positions else "(C,): Flatten() and Dense(C) at the end give it"
            hint = "; jaxbp.losses.over_positions(loss) takes a sequence" if len(self.outputs) == 2 else ""
            raise ValueError(f"{loss.name}: the layer gives {self.outputs}, expected {fits}{hint}")

    @functools.cached_property
    def outputs(self) -> tuple[int, ...]:
        """The shape of the output of one sample."""
        return self._described[1]

    @property
    def parameters(self) -> ParamTree:
        """The parameters as shapes and dtypes."""
        return self._described[0]

    @functools.cached_property
    def _described(self) -> tuple[Any, tuple[int, ...]]:
        """The parameters as shapes and dtypes, and the shape of the output."""
        found: list[tuple[int, ...]] = []

        def params() -> Any:
            made, shape = self.layer.init(jax.random.key(0), self.shape)
            found.append(shape)
            return made

        shapes = jax.eval_shape(params)
        return shapes, found[0]


Net = MLP | Network


def init(
    net: Net,
    key: Array,
    scheme: str | initializers.Initializer = "he",
    bias: str | initializers.Initializer = "zeros",
    dtype: DTypeLike = jnp.float32,
) -> ParamTree:
    """Initial parameters: of an MLP by `jaxbp.mlp.init`, of a `Network` by its layers.

    Args:
      net: the network.
      key, scheme, dtype: as for `jaxbp.mlp.init`. A layer may have a scheme of its own, and embeddings have.
      bias: as there for an MLP; elsewhere b is 0.

    Returns:
      A pytree; for an MLP L of `Affine`.

    Raises:
      ValueError: an unknown scheme or bias; a bias that is not zeros where layers set their own.
      TypeError: a number instead of a key.

    Example:
      >>> params = init(MLP((784, 256, 10)), jax.random.key(0))
      >>> jax.tree.map(jnp.shape, params)
      (Affine(w=(256, 784), b=(256,)), Affine(w=(10, 256), b=(10,)))
    """
    if isinstance(net, MLP):
        return mlp.init(net, key, scheme, bias, dtype)
    if not isinstance(net, Network):
        raise TypeError(f"net is {net!r}, expected an MLP or a jaxbp.Network(layer, loss, shape)")
    if bias != "zeros":
        raise ValueError(f"bias is {bias!r}, allowed: 'zeros', for the layers of a Network")
    return net.layer.init(mlp.checked_key(key), net.shape, scheme, dtype)[0]


def factors(
    net: Net, params: ParamTree, x: ArrayLike, y: ArrayLike, key: Array | None = None
) -> tuple[Array, FactorTree]:
    """The losses of a batch and the factors of every sample's gradient, from one forward and one backward pass.

    Args:
      net, params: the network and its parameters.
      x: inputs, (N, n₀), of a `Network` (N, shape…); cast to the parameters' dtype.
      y: targets: (N, n_L) numbers or (N,) integer labels, as the loss has it; of a loss over positions (N, T) labels.
      key: for dropout, each sample draws from its own; without one there is none.

    Returns:
      ℓₙ, (N,), in float32 at least; and `Factors`, whose δ belong to ℓₙ (no 1/N anywhere). Of a `Network` a tree of
      factors instead, nested as its parameters are: `jaxbp.factor` says which kinds there are.

    Raises:
      ValueError: a wrong shape (both are shown); a label out of range (its row is named; inside jit, where it cannot be
        seen, its loss and deltas are NaN).
      TypeError: labels that are not integers.

    Example:
      >>> net = MLP((3, 4, 2))
      >>> losses, f = factors(net, mlp.init(net, jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros(5, int))
      >>> losses.shape, [x.shape for x in f.x], [delta.shape for delta in f.delta]
      ((5,), [(5, 3), (5, 4)], [(5, 4), (5, 2)])
    """
    x, y = checked_batch(net, params, x, y)
    return scaled_factors(net, params, x, y, jnp.ones(len(x), wide(dtype_of(params))), key)


def gradient(factors: FactorTree, weights: ArrayLike | None = None, normalize_by: ArrayLike | None = None) -> ParamTree:
    """The mean gradient Σₙ weightsₙ ∂ℓₙ/∂(w, b) / N.

    Args:
      factors: of a batch of N samples.
      weights: (N,), ones by default; a sample of weight 0 does not count, not even as NaN.
      normalize_by: the divisor, the static batch length N by default; where it is 0 the result is 0.

    Returns:
      Like the parameters, L of `Affine` for an MLP, in the dtype of the factors.

    Raises:
      ValueError: weights has a wrong shape.

    Example:
      >>> net = MLP((3, 4, 2))
      >>> _, f = factors(net, init(net, jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros(5, int))
      >>> jax.tree.map(jnp.shape, gradient(f, weights=jnp.array([1.0, 1.0, 1.0, 0.0, 0.0]), normalize_by=3))
      (Affine(w=(4, 3), b=(4,)), Affine(w=(2, 4), b=(2,)))
    """
    scale = mean_weights(weights, factor.batch(factors), normalize_by, wide(factor.dtype(factors)))
    if weights is not None:
        factors = factor.where(scale != 0, factors)
    return totals(factor.times(factors, scale))


def value_and_grad(
    net: Net,
    params: ParamTree,
    x: ArrayLike,
    y: ArrayLike,
    weights: ArrayLike | None = None,
    normalize_by: ArrayLike | None = None,
    key: Array | None = None,
) -> tuple[Array, ParamTree]:
    """The mean loss Σₙ weightsₙ ℓₙ / N over a batch and its hand-derived gradient.

    The gradient is that of ``gradient(factors(net, params, x, y)[1], weights, normalize_by)``; here weightsₙ/N enters
    at ∂ℓ/∂x⁽ᴸ⁾, in which the recursion is linear, because that array is the smallest.

    Args:
      net, params: the network and its parameters.
      x, y: inputs (N, n₀) and targets, as for `factors`.
      weights, normalize_by: as for `gradient`.
      key: for dropout, as for `factors`.

    Returns:
      The loss, a scalar in float32 at least, and the gradient, like the parameters and in the parameters' dtype.

    Raises:
      ValueError, TypeError: as `factors`; weights of a wrong shape.

    Example:
      >>> net = MLP((3, 4, 2))
      >>> params = init(net, jax.random.key(0))
      >>> loss, grads = value_and_grad(net, params, jnp.zeros((5, 3)), jnp.zeros(5, int))
      >>> loss  # ln 2
      Array(0.6931472, dtype=float32)
    """
    x, y = checked_batch(net, params, x, y)
    scale = mean_weights(weights, len(x), normalize_by, wide(dtype_of(params)))
    if weights is not None and jnp.issubdtype(x.dtype, jnp.floating):
        x = weighted((scale != 0).astype(x.dtype), x)
    values, scaled = scaled_factors(net, params, x, y, scale, key)
    return jnp.sum(weighted(scale, values)), totals(scaled)


def layer_of(net: Net) -> Any:
    """The network without its loss: a layer of `jaxbp.layers`."""
    return net if isinstance(net, MLP) else net.layer


def shapes(net: Net) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one sample's input and output."""
    return (net.sizes[:1], net.sizes[-1:]) if isinstance(net, MLP) else (net.shape, net.outputs)


def by_layer(net: Net, tree: Any) -> list[Any]:
    """Of a tree that is nested as the parameters are, what belongs to each layer that has any; those of a chain."""
    layers = tree if isinstance(layer_of(net), MLP | Chain) else (tree,)
    return [part for part in layers if jax.tree.leaves(part)]


def totals(factors: FactorTree) -> ParamTree:
    """Σₙ gₙ, like the parameters."""
    return factor.like(factors, [factor.total(part) for part in factor.parts(factors)])


def checked_batch(net: Net, params: ParamTree, x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """x and y as arrays of the parameters' dtype (labels and tokens keep theirs), checked."""
    shape, outputs, dtype = check_parameters(net, params)
    x, y = as_input(net, x, dtype), uncut(y)
    check_shape("x", x.shape, ("N", *shape))
    check_tokens(net, x)
    check_targets(losses.get(net.loss), y, len(x), outputs)
    return x, jnp.asarray(y, wide(dtype) if y.ndim == len(outputs) + 1 else None)


def as_input(net: Net, x: ArrayLike, dtype: DTypeLike) -> Array:
    """x in the dtype of the parameters; what may be tokens, the integers of a `Network`, in their own."""
    x = uncut(x)
    return jnp.asarray(x, None if isinstance(net, Network) and jnp.issubdtype(x.dtype, jnp.integer) else dtype)


def check_parameters(net: Net, params: ParamTree) -> tuple[tuple[int, ...], tuple[int, ...], DTypeLike]:
    """The shapes of one sample's input and output, and the dtype of the parameters, which are checked."""
    if isinstance(net, MLP):
        check_params(net.sizes, params)
    else:
        check_like("params", params, net.parameters)
    return *shapes(net), dtype_of(params)


def check_like(name: str, tree: ParamTree, expected: ParamTree) -> None:
    """ValueError unless the tree has this structure and these shapes; TypeError unless all of it are floats."""
    if str(jax.tree.structure(tree)) != str(jax.tree.structure(expected)):
        raise ValueError(f"{name} is not nested as the layers are: {jax.tree.structure(tree)}")
    for (path, leaf), want in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        check_shape(f"{name}{jax.tree_util.keystr(path)}", leaf.shape, want.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name}{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, expected a float")


def check_tokens(net: Net, x: Array | np.ndarray) -> None:
    """ValueError for a token that is not in the table of the embedding, if that is where x goes, named by its place.

    Inside jit there is no value to look at; there a token out of range makes output, loss and gradient NaN.
    """
    count = tokens_of(net)
    if count and not isinstance(x, jax.core.Tracer) and x.dtype.kind in "iu":
        tokens = np.asarray(x)
        bad = np.argwhere((tokens < 0) | (tokens >= count))
        if len(bad):
            place = ", ".join(map(str, bad[0]))
            raise ValueError(f"x[{place}] is {tokens[tuple(bad[0])]}, expected a token in 0 … {count - 1}")


def tokens_of(net: Net) -> int:
    """How many tokens there are, where inputs are tokens, because an embedding is the first layer; otherwise 0."""
    layer = layer_of(net)
    while isinstance(layer, Chain) and layer.layers:
        layer = layer.layers[0]
    table = layer.embedding if isinstance(layer, Tied) else layer
    return table.tokens if isinstance(table, Embedding) else 0


def dtype_of(params: ParamTree) -> DTypeLike:
    """The dtype of the parameters."""
    dtype: DTypeLike = jax.tree.leaves(params)[0].dtype
    return dtype


def scaled_factors(
    net: Net, params: ParamTree, x: Array, y: Array, scale: Array, key: Array | None = None
) -> tuple[Array, FactorTree]:
    """ℓₙ and the factors of scaleₙ ℓₙ; scale is (N,)."""
    values, _, factors = passed(layer_of(net), losses.get(net.loss), params, x, y, scale, keys_of(key, len(x)))
    return values, factors


def keys_of(key: Array | None, batch: int) -> Array | None:
    """A key for each sample, if there is one."""
    return None if key is None else jax.random.split(key, batch)


def passed(
    layer: Any, loss: Loss, params: ParamTree, x: Array, y: Array, scale: Array, keys: Array | None
) -> tuple[Array, Array, FactorTree]:
    """ℓₙ, and of scaleₙ ℓₙ ∂ℓ/∂x⁽⁰⁾ and the factors."""

    def sample(x: Array, y: Array, scale: Array, key: Array | None) -> tuple[Array, Array, FactorTree]:
        x, tape = layer.forward(params, x, key)
        output = x.astype(wide(x.dtype))
        dl_dx = weighted(scale, loss.dl_dx(output, y)).astype(x.dtype)  # ∂ℓ/∂x⁽ᴸ⁾, from the definition of ℓ
        return loss.ell(output, y), *layer.backward(params, tape, dl_dx)

    return jax.vmap(sample)(x, y, scale, keys)


def mean_weights(weights: ArrayLike | None, batch: int, normalize_by: ArrayLike | None, dtype: DTypeLike) -> Array:
    """weightsₙ / N, (N,): the factor of sample n in the mean; 0 where N is 0."""
    weights = jnp.ones(batch, dtype) if weights is None else jnp.asarray(weights, dtype)
    check_shape("weights", weights.shape, (batch,))
    divisor = jnp.asarray(batch if normalize_by is None else normalize_by, dtype)
    return jnp.where(divisor == 0, 0, weights / jnp.where(divisor == 0, 1, divisor))
