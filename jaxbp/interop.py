"""The network as a `jax.custom_vjp` function: any JAX program that differentiates it runs the hand-derived backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbp.mlp import MLP, Array, Tape
from jaxbp.network import Net, ParamTree, as_input, check_parameters, layer_of, totals
from jaxbp.shapes import check_shape


def apply(net: Net, params: ParamTree, x: ArrayLike) -> Array:
    """f(x; w, b) for a batch, differentiable with respect to params and x by the hand-derived backward pass.

    It composes with jit, vmap, grad, grad of grad, scan, Optax and modules of Flax and Equinox. The gradient is the sum
    over the batch. A factor 1/N is in it only if the caller's loss is a mean.

    The parameters are a field of an Equinox module as they are, and ``self.param("mlp", lambda key: init(net, key))``
    makes them in Flax Linen. In Flax NNX, see below, each array is an ``nnx.Param``.

    Forward mode does not go through `jax.custom_vjp`: `jax.jvp` and `jax.jacfwd` of `apply` raise a TypeError. Use them
    on `forward`, which is plain JAX.

    Args:
      net, params: the network and its parameters; the loss of the network plays no part.
      x: inputs, (…, n₀), of a `Network` (…, shape…), with any leading axes; cast to the parameters' dtype.

    Returns:
      Outputs, (…, n_L), of a `Network` (…, outputs…), in the parameters' dtype. Nothing is dropped out.

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
    shape, outputs, dtype = check_parameters(net, params)
    x = as_input(net, x, dtype)
    check_shape("x", x.shape[max(x.ndim - len(shape), 0) :], shape)
    axes = x.shape[: x.ndim - len(shape)]
    return _apply(net, params, x.reshape(-1, *shape)).reshape(*axes, *outputs)


def _apply_forward(net: Net, params: ParamTree, x: Array) -> tuple[Array, Any]:
    layer = layer_of(net)
    output, tape = jax.vmap(lambda x: layer.forward(params, x))(x)
    if isinstance(net, MLP):
        kept = (s if sigma.needs_s else None for sigma, s in zip(net.activations, tape.s, strict=True))
        tape = Tape(tape.x, tuple(kept))  # type: ignore[arg-type]
    return output, (params, tape, jnp.zeros(0, x.dtype))


def _apply_backward(net: Net, residuals: Any, dl_dx: Array) -> tuple[ParamTree, Array | None]:
    params, tape, like_x = residuals
    dl_dx, factors = jax.vmap(lambda tape, dl_dx: layer_of(net).backward(params, tape, dl_dx))(tape, dl_dx)
    return totals(factors), dl_dx if jnp.issubdtype(like_x.dtype, jnp.floating) else None  # tokens have no derivative


def _output(net: Net, params: ParamTree, x: Array) -> Array:
    return _apply_forward(net, params, x)[0]


_apply = jax.custom_vjp(_output, nondiff_argnums=(0,))
_apply.defvjp(_apply_forward, _apply_backward)
