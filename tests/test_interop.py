"""`apply` in other people's programs: transformations, Optax, Flax, Equinox, memory, custom σ and ℓ.

And perceptrons there and back: ONNX as onnxruntime computes it, Flax, Equinox.
PyTorch itself is in experiments/exports.py.
"""

import textwrap
from pathlib import Path

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import optax
import oracles
import pytest
import safetensors.numpy
from flax import linen, nnx
from oracles import assert_close, assert_same_bits, tolerance
from tiers import one_in

import jaxbp
from jaxbp import MLP, Activation, Affine, Loss, interop
from jaxbp.activations import ACTIVATIONS

NET = MLP((4, 6, 5, 3), hidden=("tanh", "gelu"), output="softplus", loss="squared_error")
WIDE = [jnp.float64, jnp.float32]
in_both_dtypes = pytest.mark.parametrize("dtype", one_in(2, WIDE))


def tol(dtype):
    return tolerance(dtype, len(NET.sizes), max(NET.sizes))


def naive(params, x):
    """The batch output, x (…, n₀), by autodiff's network."""
    return jnp.vectorize(lambda x: oracles.network(oracles.sigmas(NET), params, x), signature="(i)->(o)")(x)


def objective(f):
    """A scalar that depends on every output in its own way."""
    return lambda params, x: jnp.sum(jnp.sin(f(params, x)) ** 2)


def ours(params, x):
    return jaxbp.apply(NET, params, x)


@pytest.mark.parametrize(
    ("leading", "dtype"), [((5,), jnp.float32), *((leading, jnp.float64) for leading in [(), (2, 3), (0,)])]
)
def test_value_and_both_gradients(leading, dtype):
    """With respect to params and x, any leading axes, under jit."""
    params, x, _ = oracles.data(NET, seed=0, batch=int(np.prod(leading)), dtype=dtype)
    x = x.reshape(*leading, 4)

    @jax.jit
    def run(params, x):
        return [(f(params, x), jax.grad(objective(f), (0, 1))(params, x)) for f in (ours, naive)]

    got, want = run(params, x)
    assert got[0].shape == (*leading, 3) and got[1][1].shape == x.shape
    assert_close(got, want, tol(dtype), "apply")


def test_vmap_over_inputs_and_over_networks():
    """vmap of grad with a batch of inputs is the per-sample gradients; with a stack of networks an ensemble."""
    params, x, _ = oracles.data(NET, seed=1, batch=3)
    stack = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), params)

    @jax.jit
    def run(params, stack, x):
        grads = [jax.grad(objective(f)) for f in (ours, naive)]
        return [(jax.vmap(g, (None, 0))(params, x), jax.vmap(g, (0, None))(stack, x)) for g in grads]

    assert_close(*run(params, stack, x), 1e-12, "vmap")


def test_hessian_vector_product_and_mixed_derivative():
    """Gradient of a gradient, reverse over reverse; the second derivative of the oracle by the same road."""
    params, x, _ = oracles.data(NET, seed=2, batch=3)
    v = jax.tree.map(jnp.cos, params)

    @jax.jit
    def run(params, x):
        def along(f, params, x):
            grads = jax.grad(objective(f))(params, x)
            return sum(jnp.vdot(g, t) for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(v), strict=True))

        return [jax.grad(along, (1, 2))(f, params, x) for f in (ours, naive)]

    assert_close(*run(params, x), 4e-12, "Hv")  # twice as deep, and again


def test_inside_scan():
    """A recurrence x ← f(x) of a square network, differentiated through five steps."""
    net = MLP((3, 5, 3), hidden="tanh", output="tanh", loss="squared_error")
    params, x, _ = oracles.data(net, seed=3, batch=2)

    def final(f):
        return lambda params: jnp.sum(jax.lax.scan(lambda x, _: (f(params, x), None), x, length=5)[0] ** 2)

    def by_autodiff(params, x):
        return jax.vmap(lambda x: oracles.network([jnp.tanh, jnp.tanh], params, x))(x)

    got, want = (jax.jit(jax.grad(final(f)))(params) for f in (lambda p, x: jaxbp.apply(net, p, x), by_autodiff))
    assert_close(got, want, 1e-12, "scan")


def test_remat():
    params, x, _ = oracles.data(NET, seed=4, batch=2)
    got = jax.jit(jax.grad(objective(jax.checkpoint(ours))))(params, x)
    assert_close(got, jax.jit(jax.grad(objective(naive)))(params, x), 1e-12, "checkpoint")


@in_both_dtypes
def test_optax_training_step(dtype):
    """Three steps of Adam end where the oracle's end. Adam's first steps divide g by |g|: errors of g are relative."""
    params, x, y = oracles.data(NET, seed=5, batch=8, dtype=dtype)
    adam = optax.adam(1e-2)

    def train(f):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: jnp.mean((f(params, x) - y) ** 2))(params)
            updates, state = adam.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, adam.init(params)), length=3)[0][0]

    with jax.numpy_dtype_promotion("standard"):  # Optax is not strict about its step count
        got, want = jax.jit(lambda: [train(f) for f in (ours, naive)])()
    assert_close(got, want, tol(dtype), "adam")
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))


def test_in_an_equinox_module():
    class Model(equinox.Module):
        params: tuple
        scale: jax.Array

        def __call__(self, x):
            return self.scale * jaxbp.apply(NET, self.params, x)

    params, x, _ = oracles.data(NET, seed=6, batch=3)
    grads = equinox.filter_jit(equinox.filter_grad(lambda model: jnp.sum(model(x) ** 2)))(Model(params, jnp.array(2.0)))
    want = jax.jit(jax.grad(lambda params: jnp.sum((2 * naive(params, x)) ** 2)))(params)
    assert_close(grads.params, want, 1e-12, "equinox")


def test_in_a_flax_linen_module():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            params = self.param("mlp", lambda key: jaxbp.init(NET, key, dtype=jnp.float64))
            return jaxbp.apply(NET, params, x)

    _, x, _ = oracles.data(NET, seed=7, batch=3)
    variables = Model().init(jax.random.key(0), x)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(Model().apply(v, x) ** 2)))(variables)["params"]["mlp"]
    want = jax.jit(jax.grad(lambda params: jnp.sum(naive(params, x) ** 2)))(variables["params"]["mlp"])
    assert_close(grads, want, 1e-12, "linen")


@pytest.mark.slow
def test_in_a_flax_nnx_module():
    """The class that the docstring of apply shows, trained for a step by nnx.Optimizer."""
    lines = jaxbp.apply.__doc__.splitlines()
    first = next(i for i, line in enumerate(lines) if "class Model" in line)
    names = {"jax": jax, "jaxbp": jaxbp, "nnx": nnx}
    exec(textwrap.dedent("\n".join(lines[first : first + 7])), names)
    model = names["Model"](NET, jax.random.key(8))
    start = jaxbp.init(NET, jax.random.key(8))
    x = oracles.data(NET, seed=8, batch=3, dtype=jnp.float32)[1]
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(model, nnx.jit(nnx.grad(lambda model: jnp.sum(model(x) ** 2)))(model))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(naive(params, x) ** 2)))(start)
    stepped = jax.tree.map(lambda p: p[...], model.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    assert_close(stepped, jaxbp.update(start, grads, 0.1), 1e-5, "nnx")


def test_forward_mode_is_refused_by_apply_and_given_by_forward():
    params, x, _ = oracles.data(NET, seed=9, batch=2)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: ours(params, x), (x,), (x,))

    @jax.jit
    def run(x):
        by_forward = jax.vmap(lambda x: jaxbp.forward(NET, params, x).x[-1])
        return [jax.jvp(f, (x,), (jnp.cos(x),))[1] for f in (by_forward, lambda x: naive(params, x))]

    assert_close(*run(x), 1e-12, "jvp")


@pytest.mark.parametrize(("sigma", "kept"), [("relu", 1), ("tanh", 1), ("sigmoid", 1), ("gelu", 2)])
def test_what_stays_in_memory_between_forward_and_backward(sigma, kept):
    """params, x⁽⁰⁾ and one array a layer, as jax.grad keeps; two where σ′ reads s. In elements of the vjp."""
    sizes, batch = (11, 13, 17, 19), 23
    net = MLP(sizes, sigma, output="identity", loss="squared_error")
    params, x, _ = oracles.data(net, seed=0, batch=batch, dtype=jnp.float32)
    vjp = jax.jit(lambda params, x: jax.vjp(lambda params, x: jaxbp.apply(net, params, x), params, x)[1])(params, x)
    held = sum(leaf.size for leaf in jax.tree.leaves(vjp))
    assert held == sum(leaf.size for leaf in jax.tree.leaves(params)) + batch * (11 + kept * (13 + 17) + 19)


gradient = jax.jit(jax.grad(objective(ours)))


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.float64, np.float32])
def test_input_of_another_dtype(kind):
    """Cast to the parameters' float32; the gradient with respect to x comes back in x's own dtype if it is a float."""
    params, x, _ = oracles.data(NET, seed=10, batch=2, dtype=jnp.float32)
    x = np.abs(np.round(3 * np.asarray(x))).astype(kind)
    oracles.assert_same_bits(gradient(params, x), gradient(params, jnp.asarray(x, jnp.float32)))
    if np.issubdtype(kind, np.floating):
        assert jax.eval_shape(jax.grad(objective(ours), 1), params, x).dtype == kind


def test_your_own_activation_and_loss():
    """By their objects, through every function: σ(s) = s², ℓ = Σ (x − y)⁴."""
    square = Activation("square", lambda s: s**2, lambda s, x: 2 * s)
    quartic = Loss("quartic", lambda x, y: jnp.sum((x - y) ** 4), lambda x, y: 4 * (x - y) ** 3)
    net = MLP((4, 5, 3), hidden=square, loss=quartic)
    params, x, _ = oracles.data(MLP((4, 5, 3), loss="squared_error"), seed=11, batch=3)
    y = jnp.zeros((3, 3))

    def mean(params):
        (w1, b1), (w2, b2) = params
        out = (x @ w1.T + b1[None]) ** 2 @ w2.T + b2[None]
        return jnp.mean(jnp.sum((out - y) ** 4, axis=1))

    want = jax.jit(jax.value_and_grad(mean))(params)
    assert_close(jax.jit(jaxbp.value_and_grad, static_argnums=0)(net, params, x, y), want, 1e-12, "own σ and ℓ")
    by_apply = jax.grad(lambda params: jnp.mean(jnp.sum((jaxbp.apply(net, params, x) - y) ** 4, axis=1)))
    assert_close(jax.jit(by_apply)(params), want[1], 1e-12, "own σ")


def test_gradient_of_apply_is_value_and_grad():
    """The factor 1/N comes with the caller's loss."""
    params, x, y = oracles.data(NET, seed=12, batch=5)

    @jax.jit
    def run(params):
        def mean(params):
            return jnp.mean(jax.vmap(oracles.LOSSES["squared_error"])(ours(params, x), y))

        return jax.value_and_grad(mean)(params), jaxbp.value_and_grad(NET, params, x, y)

    assert_close(*run(params), 1e-12, "apply")


# --- a perceptron in other libraries ----------------------------------------------------------------------------------


def by_onnxruntime(model, x):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["output"], {"x": x})[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_in_onnx(name):
    """Where σ(s) goes to 0 its operator may cancel, so an error is measured by max(1, |s|); 4 ULP of float32."""
    s = np.linspace(-30, 30, 2001, dtype=np.float32)[:, None]
    one = (Affine(jnp.ones((1, 1), jnp.float32), jnp.zeros(1, jnp.float32)),)
    got = by_onnxruntime(interop.to_onnx(MLP((1, 1), output=name, loss="squared_error"), one), s)
    error = np.abs(got - np.asarray(oracles.SIGMAS[name](jnp.asarray(s, jnp.float64))))
    assert got.dtype == np.float32 and np.max(error / np.maximum(1, np.abs(s))) <= 4 * 2.0**-23


@pytest.mark.slow
def test_a_network_in_onnx_flax_and_equinox():
    params, x, _ = oracles.data(NET, seed=13, batch=7, dtype=jnp.float32)
    want = naive(params, x)
    assert_close(by_onnxruntime(interop.to_onnx(NET, params), np.asarray(x)), want, tol(jnp.float32), "onnx")
    flax, in_equinox = interop.to_flax(NET, params), interop.to_equinox(NET, params)
    assert_close(nnx.jit(flax)(x), want, tol(jnp.float32), "flax")
    assert_close(jax.jit(jax.vmap(in_equinox))(x), want, tol(jnp.float32), "equinox")
    assert_same_bits(interop.from_flax(NET, flax), params)
    assert_same_bits(interop.from_equinox(NET, in_equinox), params)
    with pytest.raises(ValueError, match=r"params has 3 layers, sizes \(4, 3\) has 1"):
        interop.from_equinox(MLP((4, 3)), in_equinox)


def test_pytorchs_names_there_and_back(tmp_path: Path):
    """nn.Sequential numbers its modules; more than ten are not in the order of their names."""
    net = MLP((4, 6, 5, 6, 5, 6, 5, 3), hidden="tanh")
    params = oracles.data(net, seed=14, batch=1, dtype=jnp.float32)[0]
    tensors = interop.to_torch(net, params)
    assert [(name, a.shape) for name, a in tensors.items()][-4:] == [
        *(("10.weight", (5, 6)), ("10.bias", (5,)), ("12.weight", (3, 5)), ("12.bias", (3,)))
    ]
    assert interop.torch_code(net).split(", nn.")[10::2] == ["Linear(6, 5)", "Linear(5, 3))"]
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    assert_same_bits(interop.from_torch(net, safetensors.numpy.load_file(tmp_path / "x.safetensors")), params)


def test_what_is_no_sequential_of_linears_is_named():
    tensors = {"0.weight": np.zeros((8, 4)), "0.bias": np.zeros(8), "2.weight": np.zeros((3, 8)), "2.bias": np.zeros(3)}
    cases = [
        ({"fc.weight": np.zeros(1)}, "'fc.weight' is not expected"),
        ({"1.running_mean": np.zeros(8)}, "'1.running_mean' is not expected"),
        ({"4.weight": np.zeros((3, 3))}, "'4.bias' is missing: every nn.Linear has N.weight and N.bias"),
        ({"2.bias": np.zeros(4)}, r"b of layer 2 has shape \(4,\), expected \(3,\)"),
    ]
    for more, fault in cases:
        with pytest.raises(ValueError, match=fault):
            interop.from_torch(MLP((4, 8, 3)), tensors | more)


def test_an_activation_that_they_lack_is_refused():
    """Also one of yours that is called as one of ours."""
    square = Activation("relu", lambda s: s**2, lambda s, x: 2 * s)
    params = oracles.data(MLP((4, 3)), seed=0, batch=1)[0]
    with pytest.raises(ValueError, match=r"ONNX has no activation 'relu', allowed: identity, "):
        interop.to_onnx(MLP((4, 3), output=square), params)
    with pytest.raises(ValueError, match=r"PyTorch has no activation 'squareplus', allowed: identity, "):
        interop.torch_code(MLP((4, 3), output="squareplus"))
    assert set(interop.ONNX) == set(interop.TORCH) | {"squareplus"} == set(ACTIVATIONS)
