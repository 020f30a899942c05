"""The network in other programs: `apply` in those that JAX differentiates, and a perceptron in other libraries.

`apply` is a `jax.custom_vjp` function: any JAX program that differentiates it runs the hand-derived backward. The other
functions hand an `MLP` with its parameters to PyTorch, ONNX, Flax or Equinox and take the parameters back. The outputs
agree to rounding. The loss stays behind.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbp.activations import ACTIVATIONS, Activation
from jaxbp.mlp import MLP, Affine, Array, Params, Tape
from jaxbp.network import Net, ParamTree, as_input, check_parameters, layer_of, totals
from jaxbp.shapes import check_params, check_shape


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


# --- PyTorch ----------------------------------------------------------------------------------------------------------

TORCH = {
    **{"identity": "Identity()", "relu": "ReLU()", "leaky_relu": "LeakyReLU(0.01)", "relu6": "ReLU6()"},
    **{"elu": "ELU()", "celu": "CELU()", "selu": "SELU()", "gelu": "GELU()", "gelu_tanh": 'GELU("tanh")'},
    **{"silu": "SiLU()", "mish": "Mish()", "sigmoid": "Sigmoid()", "log_sigmoid": "LogSigmoid()", "tanh": "Tanh()"},
    **{"soft_sign": "Softsign()", "softplus": "Softplus()", "hard_tanh": "Hardtanh()"},
    **{"hard_sigmoid": "Hardsigmoid()", "hard_silu": "Hardswish()"},
}
"""The module of torch.nn for each σ; squareplus has none."""


def torch_code(net: MLP) -> str:
    """The network in Python: an `nn.Sequential`, whose `load_state_dict` takes what `to_torch` gives, as tensors.

    Raises:
      ValueError: PyTorch has no module for an activation.

    Example:
      >>> torch_code(MLP((4, 8, 3)))
      'nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))'
    """
    modules = [
        f"nn.Linear({n_in}, {n_out}), nn.{_named(sigma, 'PyTorch', TORCH)}"
        for n_in, n_out, sigma in zip(net.sizes, net.sizes[1:], net.activations, strict=False)
    ]
    return f"nn.Sequential({', '.join(modules).removesuffix(', nn.Identity()')})"


def to_torch(net: MLP, params: Params) -> dict[str, np.ndarray]:
    """The parameters by their names in that `nn.Sequential`, for `safetensors.numpy.save_file`.

    Example:
      >>> from jaxbp import init
      >>> net = MLP((4, 8, 3))
      >>> list(to_torch(net, init(net, jax.random.key(0))))
      ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    check_params(net.sizes, params)
    layers = enumerate(params)
    return {f"{2 * l}.{name}": np.asarray(a) for l, (w, b) in layers for name, a in (("weight", w), ("bias", b))}


def from_torch(net: MLP, tensors: Mapping[str, Any]) -> Params:
    """The parameters of an `nn.Sequential` of `nn.Linear` and σ: its state_dict(), or `safetensors.numpy.load_file`.

    Raises:
      ValueError: a name that no nn.Linear has, or one that is missing; a wrong number of layers; a wrong shape.
    """
    layers = sorted(int(name.removesuffix(".weight")) for name in tensors if re.fullmatch(r"\d+\.weight", name))
    names = [(f"{l}.weight", f"{l}.bias") for l in layers]
    if odd := {name for pair in names for name in pair} ^ set(tensors):
        fault = "not expected" if min(odd) in tensors else "missing"
        raise ValueError(f"{min(odd)!r} is {fault}: every nn.Linear has N.weight and N.bias, N its place")
    return _checked(net, [(tensors[w], tensors[b]) for w, b in names])


# --- Flax and Equinox -------------------------------------------------------------------------------------------------


def to_flax(net: MLP, params: Params) -> Any:
    """An `nnx.Sequential` of `nnx.Linear` and σ, for x (…, n₀). Flax has to be installed."""
    from flax import nnx

    check_params(net.sizes, params)
    layers: list[Any] = []
    for (w, b), sigma in zip(params, net.activations, strict=True):
        linear = nnx.Linear(w.shape[1], w.shape[0], rngs=nnx.Rngs(0))
        linear.kernel, linear.bias = nnx.Param(w.T), nnx.Param(b)
        layers += [linear, sigma.sigma]
    return nnx.Sequential(*layers)


def from_flax(net: MLP, module: Any) -> Params:
    """The parameters of an `nnx.Sequential`; ValueError where its `nnx.Linear` do not fit the network."""
    from flax import nnx

    linears: list[Any] = [layer for layer in module.layers if isinstance(layer, nnx.Linear)]
    return _checked(net, [(linear.kernel[...].T, linear.bias[...]) for linear in linears])


def to_equinox(net: MLP, params: Params) -> Any:
    """An `equinox.nn.Sequential` of `Linear` and `Lambda`, for one sample x (n₀,). Equinox has to be installed."""
    import equinox

    check_params(net.sizes, params)
    layers: list[Any] = []
    for (w, b), sigma in zip(params, net.activations, strict=True):
        linear = equinox.nn.Linear(w.shape[1], w.shape[0], key=jax.random.key(0))
        linear = equinox.tree_at(lambda linear: (linear.weight, linear.bias), linear, (w, b))
        layers += [linear, equinox.nn.Lambda(sigma.sigma)]
    return equinox.nn.Sequential(layers)


def from_equinox(net: MLP, module: Any) -> Params:
    """The parameters of an `equinox.nn.Sequential`; ValueError where its `Linear` do not fit the network."""
    import equinox

    linears = [layer for layer in module.layers if isinstance(layer, equinox.nn.Linear)]
    return _checked(net, [(linear.weight, linear.bias) for linear in linears])


def _checked(net: MLP, layers: Sequence[tuple[Any, Any]]) -> Params:
    params = tuple(Affine(jnp.asarray(w), jnp.asarray(b)) for w, b in layers)
    check_params(net.sizes, params)
    return params


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _clip(low: float, high: float) -> str:
    bounds = f"low = Constant <value_float = {low}> () high = Constant <value_float = {high}> ()"
    return f"{bounds} x = Clip (s, low, high)"


OPERATORS = {
    **{"identity": "Identity", "relu": "Relu", "leaky_relu": "LeakyRelu <alpha = 0.01>", "elu": "Elu", "celu": "Celu"},
    **{"selu": "Selu", "gelu": "Gelu", "gelu_tanh": 'Gelu <approximate = "tanh">', "mish": "Mish"},
    **{"sigmoid": "Sigmoid", "tanh": "Tanh", "soft_sign": "Softsign", "softplus": "Softplus"},
    **{"hard_sigmoid": "HardSigmoid <alpha = 0.16666666666666666, beta = 0.5>", "hard_silu": "HardSwish"},
}
ONNX = {name: f"x = {operator} (s)" for name, operator in OPERATORS.items()} | {
    "relu6": _clip(0.0, 6.0),
    "hard_tanh": _clip(-1.0, 1.0),
    "silu": "p = Sigmoid (s) x = Mul (s, p)",
    "log_sigmoid": "t = Neg (s) y = Softplus (t) x = Neg (y)",
    # max(s, 0) + 2 / (|s| + √(s² + 4)): nothing cancels where s < 0
    "squareplus": """two = Constant <value_float = 2.0> () four = Constant <value_float = 4.0> ()
        square = Mul (s, s) sum = Add (square, four) root = Sqrt (sum) size = Abs (s)
        below = Add (size, root) small = Div (two, below) large = Relu (s) x = Add (large, small)""",
}
"""s ↦ x = σ(s) in the text form of ONNX."""


def to_onnx(net: MLP, params: Params) -> Any:
    """An `onnx.ModelProto` in float32, x (N, n₀) ↦ output (N, n_L): Gemm, and σ as a function of the domain jaxbp.

    The package onnx has to be installed. The operators are those of opset 20; onnxruntime 1.17 and later know them.

    Raises:
      ValueError: an activation of yours; a parameter has a wrong shape.
    """
    import onnx

    check_params(net.sizes, params)
    bodies = {sigma.name: _named(sigma, "ONNX", ONNX) for sigma in net.activations}
    names = ["x", *(f"x{l}" for l in range(1, len(params))), "output"]
    layers = [
        f"s{l} = Gemm <transB = 1> ({names[l - 1]}, w{l}, b{l}) {names[l]} = jaxbp.{sigma.name} (s{l})"
        for l, sigma in enumerate(net.activations, 1)
    ]
    head = '<ir_version: 10, opset_import: ["": 20, "jaxbp": 1], producer_name: "jaxbp">'
    graph = f"mlp (float[N, {net.sizes[0]}] x) => (float[N, {net.sizes[-1]}] output) {{ {' '.join(layers)} }}"
    sigmas = [f'<domain: "jaxbp", opset_import: ["": 20]> {name} (s) => (x) {{ {bodies[name]} }}' for name in bodies]
    model = onnx.parser.parse_model("\n".join([head, graph, *sigmas]))
    arrays = [(f"{name}{l}", a) for l, affine in enumerate(params, 1) for name, a in zip("wb", affine, strict=True)]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a, np.float32), name) for name, a in arrays)
    return model


def _named(sigma: Activation, where: str, table: Mapping[str, str]) -> str:
    """What the activation is there; one of yours may have the name of another."""
    if sigma.name not in table or ACTIVATIONS.get(sigma.name) is not sigma:
        raise ValueError(f"{where} has no activation {sigma.name!r}, allowed: {', '.join(table)}")
    return table[sigma.name]
