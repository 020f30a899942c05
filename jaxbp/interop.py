"""The network as a `jax.custom_vjp` function: any JAX program that differentiates it runs the hand-derived backward."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp.mlp import MLP, Array, Factors, Params, Tape, backward, forward, outer_sums
from jaxbp.shapes import check_params, check_shape


def apply(net: MLP, params: Params, x: ArrayLike) -> Array:
    """f(x; w, b) for a batch, differentiable with respect to params and x by the hand-derived backward pass.

    It composes with jit, vmap, grad, grad of grad, scan, Optax and modules of Flax and Equinox. The gradient is the sum
    over the batch. A factor 1/N is in it only if the caller's loss is a mean.

    The parameters are a field of an Equinox module as they are, and ``self.param("mlp", lambda key: init(net, key))``
    makes them in Flax Linen. In Flax NNX, see below, each array is an ``nnx.Param``.

    Forward mode does not go through `jax.custom_vjp`: `jax.jvp` and `jax.jacfwd` of `apply` raise a TypeError. Use them
    on `forward`, which is plain JAX.

    Args:
      net, params: the network and its parameters; the loss of the network plays no part.
      x: inputs, (…, n₀) with any leading axes; cast to the parameters' dtype.

    Returns:
      Outputs, (…, n_L), in the parameters' dtype.

    Raises:
      ValueError: x or a parameter has a wrong shape.

    In a Flax NNX module each array becomes an ``nnx.Param``, and is read with ``[...]``; then ``nnx.Optimizer`` works::

        class Model(nnx.Module):
            def __init__(self, net, key):
                self.net, self.params = net, nnx.data(jax.tree.map(nnx.Param, jaxbp.init(net, key)))

            def __call__(self, x):
                is_param = lambda leaf: isinstance(leaf, nnx.Param)
                return jaxbp.apply(self.net, jax.tree.map(lambda p: p[...], self.params, is_leaf=is_param), x)

    Example:
      >>> net = MLP((3, 4, 1), hidden="tanh")
      >>> from jaxbp import init
      >>> params = init(net, jax.random.key(0))
      >>> grads = jax.grad(lambda params: jnp.mean(apply(net, params, jnp.ones((5, 3))) ** 2))(params)
      >>> jax.tree.map(jnp.shape, grads)
      (Affine(w=(4, 3), b=(4,)), Affine(w=(1, 4), b=(1,)))
    """
    check_params(net.sizes, params)
    x = jnp.asarray(x, params[0].w.dtype)
    check_shape("x", x.shape[-1:], net.sizes[:1])
    return _apply(net, params, x.reshape(-1, net.sizes[0])).reshape(*x.shape[:-1], net.sizes[-1])


def _apply_forward(net: MLP, params: Params, x: Array) -> tuple[Array, tuple[Params, Tape]]:
    tape = jax.vmap(lambda x: forward(net, params, x))(x)
    kept = (s if sigma.needs_s else None for sigma, s in zip(net.activations, tape.s, strict=True))
    return tape.x[-1], (params, Tape(tape.x, tuple(kept)))  # type: ignore[arg-type]


def _apply_backward(net: MLP, residuals: tuple[Params, Tape], dl_dx: Array) -> tuple[Params, Array]:
    params, tape = residuals
    deltas = jax.vmap(lambda tape, dl_dx: backward(net, params, tape, dl_dx))(tape, dl_dx)
    return outer_sums(Factors(tape.x[:-1], deltas)), deltas[0] @ params[0].w  # ∂ℓ/∂x⁽⁰⁾ = (w⁽¹⁾)ᵀ δ⁽¹⁾


def _output(net: MLP, params: Params, x: Array) -> Array:
    return _apply_forward(net, params, x)[0]


_apply = jax.custom_vjp(_output, nondiff_argnums=(0,))
_apply.defvjp(_apply_forward, _apply_backward)
