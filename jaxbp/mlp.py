"""Back-propagation in a multi-layer perceptron, as Fleuret's lecture 3.6 derives it.

The code is written for one sample, as the lecture is; `jax.vmap` adds the axis n of the samples. Weights are (out, in),
so that ``w @ x`` is the lecture's w⁽ˡ⁾x⁽ˡ⁻¹⁾. The einsum letters are n sample, i input, o output.

XLA accumulates a bfloat16 product in float32 and rounds it once (tests/test_mlp.py measures it). It is not asked to by
``preferred_element_type``: its CPU back end in JAX 0.10 refuses some of those products.

Source: F. Fleuret, *Deep Learning* (EE-559 / 14x050), lecture 3.6, "Back-propagation".
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbp import activations, initializers, losses
from jaxbp.activations import Activation
from jaxbp.losses import Loss
from jaxbp.shapes import check_params, check_shape, shown, table

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MLP:
    """The static part of a network: f(x; w, b) and its loss ℓ. Hashable, so that it can be a static argument of jit.

    Args:
      sizes: (n₀, …, n_L), the widths of the input, of the hidden layers and of the output; L = len(sizes) − 1 layers.
      hidden: σ of the hidden layers: a name or an `Activation`, or a sequence of L − 1 of them.
      output: σ of the last layer, elementwise.
      loss: a name or a `Loss`.

    Raises:
      ValueError: a size that is not a positive integer, fewer than two sizes, an unknown name, a wrong number of
        hidden activations.
      TypeError: sizes that are not a sequence; a function where an `Activation` or a `Loss` is expected.

    Example:
      >>> net = MLP(sizes=(784, 256, 10), hidden="relu", loss="softmax_cross_entropy")
      >>> [sigma.name for sigma in net.activations]
      ['relu', 'identity']
    """

    sizes: tuple[int, ...]
    hidden: str | Activation | Sequence[str | Activation] = "relu"
    output: str | Activation = "identity"
    loss: str | Loss = "softmax_cross_entropy"

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, Iterable) or isinstance(self.sizes, str):
            raise TypeError(f"sizes is {self.sizes!r}, expected all widths in one sequence, such as MLP((4, 8, 3))")
        for field, value in (("hidden", self.hidden), ("output", self.output), ("loss", self.loss)):
            if callable(value):
                example = "jaxbp.Loss(name, ell, dl_dx)" if field == "loss" else "jaxbp.Activation(name, sigma, dsigma)"
                raise TypeError(f"{field} is a function, expected a name or, with its derivative, a {example}")
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not isinstance(self.hidden, str | Activation):
            object.__setattr__(self, "hidden", tuple(self.hidden))
        if len(self.sizes) < 2:
            raise ValueError(f"sizes is {self.sizes}, it needs at least an input and an output size")
        for size in self.sizes:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"sizes has {size!r}, every size must be a positive integer")
        losses.get(self.loss)  # raises for a name that is unknown, and so does the next line
        self.activations  # noqa: B018

    @functools.cached_property
    def activations(self) -> tuple[Activation, ...]:
        """σ of each of the L layers."""
        layers = len(self.sizes) - 1
        hidden = (self.hidden,) * (layers - 1) if isinstance(self.hidden, str | Activation) else self.hidden
        if len(hidden) != layers - 1:
            raise ValueError(f"hidden has {len(hidden)} activations, sizes {self.sizes} has {layers - 1} hidden layers")
        return tuple(activations.get(sigma) for sigma in (*hidden, self.output))

    def init(
        self,
        key: Array,
        shape: tuple[int, ...],
        scheme: str | initializers.Initializer = "he",
        dtype: DTypeLike = jnp.float32,
    ) -> tuple["Params", tuple[int, ...]]:
        """As a layer, see `jaxbp.layers`: the parameters, and the shape of the output."""
        if tuple(shape) != self.sizes[:1]:
            raise ValueError(f"it takes {self.sizes[:1]}")
        return init(self, key, scheme, dtype=dtype), self.sizes[-1:]

    def forward(self, params: "Params", x: Array, key: Array | None = None) -> tuple[Array, "Tape"]:
        """As a layer: f(x; w, b) and the tape."""
        tape = forward(self, params, x)
        return tape.x[-1], tape

    def backward(self, params: "Params", tape: "Tape", dl_dx: Array) -> tuple[Array, "Factors"]:
        """As a layer: ∂ℓ/∂x⁽⁰⁾ = (w⁽¹⁾)ᵀ δ⁽¹⁾, and the factors."""
        deltas = backward(self, params, tape, dl_dx)
        return params[0].w.T @ deltas[0], Factors(tape.x[:-1], deltas)


class Affine(NamedTuple):
    """The parameters of one layer: w (out, in) and b (out,)."""

    w: Array
    b: Array


Params = tuple[Affine, ...]
Tree = TypeVar("Tree")


class Tape(NamedTuple):
    """What the forward pass computed: x⁽⁰⁾ … x⁽ᴸ⁾ and s⁽¹⁾ … s⁽ᴸ⁾."""

    x: tuple[Array, ...]
    s: tuple[Array, ...]

    def __repr__(self) -> str:
        return shown(self)

    def _repr_html_(self) -> str:
        return table(self)


class Factors(NamedTuple):
    """The factors of every sample's gradient: x⁽⁰⁾ … x⁽ᴸ⁻¹⁾, each (N, in), and δ⁽¹⁾ … δ⁽ᴸ⁾, each (N, out).

    δ⁽ˡ⁾ = ∂ℓₙ/∂s⁽ˡ⁾ belongs to the loss of one sample and is never divided by N.
    """

    x: tuple[Array, ...]
    delta: tuple[Array, ...]

    def __repr__(self) -> str:
        return shown(self)

    def _repr_html_(self) -> str:
        return table(self)


def init(
    net: MLP,
    key: Array,
    scheme: str | initializers.Initializer = "he",
    bias: str | initializers.Initializer = "zeros",
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Initial parameters.

    Args:
      net: the network.
      key: a key of `jax.random.key`; layer l draws from ``fold_in(key, l)``.
      scheme: how w is drawn: he, glorot or lecun (each _normal, the default, or _uniform; the normal ones are truncated
        at two standard deviations), orthogonal, normal (standard deviation 0.01), or an initialiser such as
        ``jax.nn.initializers.normal(0.1)``.
      bias: how b is drawn: zeros, normal (standard deviation 0.01), or an initialiser.
      dtype: of all parameters.

    Returns:
      L of `Affine`, a plain pytree.

    Raises:
      ValueError: an unknown scheme or bias.
      TypeError: a number instead of a key.

    Example:
      >>> params = init(MLP((784, 256, 10)), jax.random.key(0))
      >>> jax.tree.map(jnp.shape, params)
      (Affine(w=(256, 784), b=(256,)), Affine(w=(10, 256), b=(10,)))
    """
    key = checked_key(key)
    draw_w, draw_b = initializers.weights(scheme), initializers.biases(bias)
    shapes = list(zip(net.sizes[1:], net.sizes, strict=False))

    def draw(layer: ArrayLike, shape: tuple[int, int]) -> Affine:
        key_w, key_b = jax.random.split(jax.random.fold_in(key, layer))
        return Affine(w=draw_w(key_w, shape, dtype), b=draw_b(key_b, shape[:1], dtype))

    if not isinstance(key, jax.core.Tracer):
        return tuple(draw(layer, shape) for layer, shape in enumerate(shapes))
    params: dict[int, Affine] = {}
    for shape in set(shapes):
        layers = [layer for layer, other in enumerate(shapes) if other == shape]
        params |= zip(layers, initializers.in_a_loop(functools.partial(draw, shape=shape), layers), strict=False)
    return tuple(params[layer] for layer in range(len(shapes)))


def forward(net: MLP, params: Params, x: ArrayLike) -> Tape:
    """The forward pass for one sample: s⁽ˡ⁾ = w⁽ˡ⁾ x⁽ˡ⁻¹⁾ + b⁽ˡ⁾, x⁽ˡ⁾ = σ(s⁽ˡ⁾).

    Plain differentiable JAX: forward mode (`jax.jvp`, `jax.jacfwd`) goes through it.

    Args:
      net, params: the network and its parameters.
      x: x⁽⁰⁾, (n₀,); cast to the parameters' dtype. Matrix products accumulate in float32 at least.

    Raises:
      ValueError: x or a parameter has a wrong shape.

    Example:
      >>> net = MLP((3, 4, 2))
      >>> tape = forward(net, init(net, jax.random.key(0)), jnp.ones(3))
      >>> [x.shape for x in tape.x], [s.shape for s in tape.s]
      ([(3,), (4,), (2,)], [(4,), (2,)])
    """
    check_params(net.sizes, params)
    x = jnp.asarray(x, params[0].w.dtype)
    check_shape("x", x.shape, net.sizes[:1])
    # fmt: off
    xs, ss = [x], []                                                    # x⁽⁰⁾ = x
    for (w, b), sigma in zip(params, net.activations, strict=True):
        s = w @ x + b                                                   # s⁽ˡ⁾ = w⁽ˡ⁾ x⁽ˡ⁻¹⁾ + b⁽ˡ⁾
        x = sigma.sigma(s)                                              # x⁽ˡ⁾ = σ(s⁽ˡ⁾)
        ss.append(s)
        xs.append(x)
    return Tape(tuple(xs), tuple(ss))                                   # f(x; w, b) = x⁽ᴸ⁾
    # fmt: on


def backward(net: MLP, params: Params, tape: Tape, dl_dx: ArrayLike) -> tuple[Array, ...]:
    """The backward pass for one sample: ∂ℓ/∂s⁽ˡ⁾ = ∂ℓ/∂x⁽ˡ⁾ ⊙ σ′(s⁽ˡ⁾), ∂ℓ/∂x⁽ˡ⁻¹⁾ = (w⁽ˡ⁾)ᵀ ∂ℓ/∂s⁽ˡ⁾.

    Linear in dl_dx. The gradients follow: ∂ℓ/∂w⁽ˡ⁾ = δ⁽ˡ⁾ (x⁽ˡ⁻¹⁾)ᵀ, ∂ℓ/∂b⁽ˡ⁾ = δ⁽ˡ⁾, ∂ℓ/∂x⁽⁰⁾ = (w⁽¹⁾)ᵀ δ⁽¹⁾.

    Args:
      net, params: the network and its parameters.
      tape: what `forward` returned for the sample.
      dl_dx: ∂ℓ/∂x⁽ᴸ⁾, (n_L,); cast to the parameters' dtype.

    Returns:
      δ⁽¹⁾ … δ⁽ᴸ⁾ with δ⁽ˡ⁾ = ∂ℓ/∂s⁽ˡ⁾, first layer first.

    Raises:
      ValueError: dl_dx or a parameter has a wrong shape.

    Example:
      >>> net = MLP((3, 4, 2), loss="squared_error")
      >>> params = init(net, jax.random.key(0))
      >>> tape = forward(net, params, jnp.ones(3))
      >>> [delta.shape for delta in backward(net, params, tape, dl_dx=tape.x[-1] - 1)]
      [(4,), (2,)]
    """
    check_params(net.sizes, params)
    dl_dx = jnp.asarray(dl_dx, params[0].w.dtype)
    check_shape("dl_dx", dl_dx.shape, net.sizes[-1:])
    # σ′ is computed from the tape. Without the barrier XLA also keeps what σ and σ′ share, for gelu three parts of erfc
    # a layer, though computing them again from s takes no longer.
    ss = jax.lax.optimization_barrier(tape.s)
    # fmt: off
    deltas = []
    for (w, _), sigma, s, x in reversed(list(zip(params, net.activations, ss, tape.x[1:], strict=True))):
        dl_ds = dl_dx * sigma.dsigma(s, x)                              # ∂ℓ/∂s⁽ˡ⁾ = ∂ℓ/∂x⁽ˡ⁾ ⊙ σ′(s⁽ˡ⁾)
        dl_dx = w.T @ dl_ds                                             # ∂ℓ/∂x⁽ˡ⁻¹⁾ = (w⁽ˡ⁾)ᵀ ∂ℓ/∂s⁽ˡ⁾
        deltas.append(dl_ds)
    return tuple(reversed(deltas))
    # fmt: on


def outer_sums(factors: Factors) -> Params:
    """Σₙ ∂ℓₙ/∂w⁽ˡ⁾ = Σₙ δₙ⁽ˡ⁾ (xₙ⁽ˡ⁻¹⁾)ᵀ and Σₙ ∂ℓₙ/∂b⁽ˡ⁾ = Σₙ δₙ⁽ˡ⁾, layer by layer; dtype kept."""
    # fmt: off
    return tuple(
        Affine(w=delta.T @ x,                                           # no,ni->oi
               b=accurate_sum(delta))                                   # no->o
        for x, delta in zip(factors.x, factors.delta, strict=True)
    )
    # fmt: on


def update(params: Tree, grads: Tree, learning_rate: ArrayLike) -> Tree:
    """The gradient step w ← w − η ∂ℓ/∂w, b ← b − η ∂ℓ/∂b, on any pytree; dtypes are kept.

    Args:
      params, grads: two pytrees of the same structure.
      learning_rate: η, a number or a scalar array.

    Example:
      >>> update({"w": jnp.float32(1.0)}, {"w": jnp.float32(2.0)}, learning_rate=0.25)
      {'w': Array(0.5, dtype=float32)}
    """
    eta = jnp.asarray(learning_rate)
    stepped: Tree = jax.tree.map(lambda p, g: p - eta.astype(p.dtype) * g, params, grads)  # w ← w − η ∂ℓ/∂w
    return stepped


def checked_key(key: Array) -> Array:
    """The key; TypeError for a number."""
    if isinstance(key, int):
        raise TypeError(f"key is {key}, expected a key of jax.random, such as jax.random.key({key})")
    return key


def accurate_sum(a: Array) -> Array:
    """The sum over the samples in the array's dtype, accumulated in float32 at least."""
    return jnp.sum(a, axis=0, dtype=wide(a.dtype)).astype(a.dtype)


def wide(dtype: DTypeLike) -> DTypeLike:
    """The dtype that sums and losses are computed in: float32 for bfloat16, otherwise the same.

    Not `jnp.promote_types`, which refuses two float dtypes where a program forbids implicit promotion.
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def weighted(scale: Array, a: Array) -> Array:
    """scaleₙ aₙ, and 0 where scaleₙ is 0 even if aₙ is NaN; a is (N, ·) or (N,), or one sample's with its scale."""
    scale = jnp.expand_dims(scale, tuple(range(scale.ndim, a.ndim)))
    return jnp.where(scale == 0, 0, scale.astype(a.dtype) * a)
