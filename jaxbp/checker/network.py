"""The checker pointed at jaxbp's own parts: an activation, a loss, a whole network, and its errors layer by layer."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import activations, curvature, losses, mlp, network
from jaxbp.activations import Activation
from jaxbp.checker.compare import f64
from jaxbp.checker.data import cast
from jaxbp.checker.subject import is_float
from jaxbp.checker.trial import precise
from jaxbp.interop import apply
from jaxbp.layers import Chain
from jaxbp.losses import Loss
from jaxbp.mlp import MLP, Array, Params
from jaxbp.network import Net, Network, ParamTree

Checked = Net | Activation | Loss
BATCH = 5
CLASSES = 4
LINEAR = ("identity", "absolute_error", "hinge")  # σ and ℓ in pieces: σ″ and H_ℓ are 0
LATTICE = np.array([0.0, -0.0, 0.1, 0.5, 0.9, 1.0, 2.5, 3.0, 6.0, 10.0, 20.0, 80.0, 1e-4, 1e-30, 1e4, 1e10])
LATTICE = np.concatenate([LATTICE, -LATTICE]).astype(np.float32)


class Part(NamedTuple):
    """One subject of a network's check: its name and the arguments of `check`."""

    name: str
    fun: Any
    args: Sequence[Any]
    options: dict[str, Any]


class Pair(NamedTuple):
    """A function by hand: forward(a, b) ↦ (value, residuals), backward(residuals, u) ↦ cotangents of a and b."""

    a: Any
    b: Any  # None if there is none
    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., tuple[Any, Any]]


class LayerError(NamedTuple):
    """The largest error of one layer's quantity, in units in the last place of its largest element.

    layer: counted from 1; 4.2 is the second one within the fourth.
    """

    layer: str
    quantity: str
    float64: float
    float32: float


def name_of(subject: Checked) -> str:
    """Of a report."""
    if isinstance(subject, Network):
        return f"Network {subject.shape} → {subject.outputs}"
    return f"MLP{subject.sizes}" if isinstance(subject, MLP) else subject.name


def parts(subject: Checked, seed: int, level: str) -> list[Part]:
    """What there is to check in a network: σ′ and ∂ℓ/∂x, the backward pass behind `apply`, and the mean gradient.

    In place of σ′ a `Network` has the backward pass of each of its layers. At level "full" of a perceptron also σ″,
    H_ℓ and the Hessian times a vector, where there is one; of an activation or a loss they are always checked.
    """
    if isinstance(subject, Activation):
        return _rules([subject])
    if isinstance(subject, Loss):
        return _rules([], subject, (CLASSES,), seed)
    outputs, (params, x, y) = network.shapes(subject)[1], example(subject, seed)
    layers = [_layers(subject, params, x[0], seed)] if isinstance(subject, Network) else []
    sigmas = [*dict.fromkeys(subject.activations)] if isinstance(subject, MLP) else []

    def mean_loss(params: ParamTree, x: Array, y: Array) -> Array:
        return jnp.mean(_ell(subject, params, x, y))

    dtypes = {"dtypes": "float32"} if level == "fast" else {}  # its rules, or layers, are checked in the shorter ones
    reference = {"reference": lambda params, x: _outputs(subject, params, x), **dtypes}
    gradient = {"value_and_grad": lambda params, x, y: network.value_and_grad(subject, params, x, y), **dtypes}
    rules = _rules(sigmas, losses.get(subject.loss), outputs, seed)
    found = [
        *layers,
        *(rule for rule in rules if level == "full" or rule.name != "second derivatives"),
        Part("apply", lambda params, x: apply(subject, params, x), (params, x), reference),
        Part("value_and_grad", mean_loss, (params, x, y), gradient),
    ]
    known = all(sigma.d2sigma for sigma in sigmas) and losses.get(subject.loss).hvp is not None
    if level == "full" and isinstance(subject, MLP) and known:
        found.append(_hessian(subject, mean_loss, params, x, y))
    return found


def _outputs(net: Net, params: ParamTree, x: Array) -> Array:
    outputs: Array = jax.vmap(lambda x: network.layer_of(net).forward(params, x)[0])(x)
    return outputs


def _ell(net: Net, params: ParamTree, x: Array, y: Array) -> Array:
    return jax.vmap(losses.get(net.loss).ell)(_outputs(net, params, x), y)


def _hessian(net: MLP, mean_loss: Callable[..., Array], *data: Any) -> Part:
    """The R-passes as the backward pass of the gradient: the Hessian is symmetric."""
    gradient = jax.grad(mean_loss)

    def backward(kept: Any, v: ParamTree) -> tuple[ParamTree, None, None]:
        params, x, y = kept
        return curvature.hvp(net, params, x, y, v), None, None

    return Part("hvp", gradient, data, {"vjp": (lambda *data: (gradient(*data), data), backward), "wrt": (0,)})


def _layers(net: Network, params: ParamTree, x: Array, seed: int) -> Part:
    """The layers of a chain as one function, for one sample, each at what the layers before it make of x.

    A layer that comes again is there once. Dropout draws from one key.
    """
    layers, own_params = (net.layer.layers, params) if isinstance(net.layer, Chain) else ((net.layer,), (params,))
    key, pairs, seen = jax.random.key(seed), {}, set()
    for number, (layer, params) in enumerate(zip(layers, own_params, strict=True), 1):
        if (layer, x.shape) not in seen and any(map(is_float, jax.tree.leaves((params, x)))):
            pairs[f"layer {number}, {type(layer).__name__}"] = _layer(layer, params, x, key)
        seen.add((layer, x.shape))
        x = layer.forward(params, x, key)[0]
    return _joined("layers", pairs, {})


def _layer(layer: Any, params: ParamTree, x: Array, key: Array) -> Pair:
    has_gradient = is_float(x)  # tokens have none

    def forward(params: ParamTree, x: Array) -> tuple[Array, Any]:
        y, tape = layer.forward(params, x, key)
        return y, (params, tape)

    def backward(residuals: Any, dl_dy: Array) -> tuple[ParamTree, Array | None]:
        dl_dx, factors = layer.backward(*residuals, dl_dy)
        return network.totals(jax.tree.map(lambda a: a[None], factors)), dl_dx if has_gradient else None

    return Pair(params, x, forward, backward)


def example(net: Net, seed: int) -> tuple[ParamTree, Array, Array]:
    """Parameters with random biases, N(0, 1) inputs or tokens, and targets of the kind that the loss takes; N = 5."""
    rng = np.random.default_rng(seed)  # a draw by JAX would be compiled for each shape
    (shape, outputs), tokens = network.shapes(net), network.tokens_of(net)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    def drawn(leaf: jax.ShapeDtypeStruct) -> Array:
        inputs = leaf.size / leaf.shape[0]
        return normal(*leaf.shape) * (2 / inputs) ** 0.5 if len(leaf.shape) > 1 else normal(*leaf.shape) / 2

    params = jax.tree.map(drawn, jax.eval_shape(lambda: network.init(net, jax.random.key(0))))
    y = _targets(losses.get(net.loss), (BATCH, *outputs), seed)[0]
    x = jnp.asarray(rng.integers(tokens, size=(BATCH, *shape))) if tokens else normal(BATCH, *shape)
    return params, x, jnp.asarray(y)


def _rules(
    sigmas: Sequence[Activation], loss: Loss | None = None, outputs: tuple[int, ...] = (), seed: int = 0
) -> list[Part]:
    """Every σ on a lattice and ℓ of one sample for each kind of target; then σ′ and ∂ℓ/∂x of those with curvature.

    The backward is u ⊙ σ′(s) and u ∂ℓ/∂x, at a kink with the slope on the left; then u ⊙ σ″(s) and H_ℓ u. A margin of
    the hinge loss has no left: it grows with one number and falls with another.
    """
    first, second = {}, {}
    known: Any = loss
    for sigma in sigmas:
        first[f"σ {sigma.name}"] = _slope(sigma)
        if sigma.d2sigma not in (None, activations.no_curvature):
            second[f"σ′ {sigma.name}"] = _curvature(sigma)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(outputs).astype(np.float32))
    for target in _targets(loss, (1, *outputs), seed) if loss else ():
        y, name = jnp.asarray(target[0]), f"{known.name}, {'label' if target.ndim == len(outputs) else 'array'} y"
        first[f"ℓ {name}"] = Pair(
            x, y, lambda x, y: (known.ell(x, y), (x, y)), lambda kept, u: (u * known.dl_dx(*kept), None)
        )
        if known.hvp is not None:
            second[f"∂ℓ/∂x {name}"] = Pair(
                x, y, lambda x, y: (known.dl_dx(x, y), (x, y)), lambda kept, u: (known.hvp(*kept, u), None)
            )
    zero = [f"[0]['{name}']" for name, pair in first.items() if pair.b is not None and outputs[-1] == 1]
    flat = [f"[0]['{name}']" for name in second if name.split(",")[0].split()[1] in LINEAR]
    margins = {name: first.pop(name) for name in [*first] if name.startswith("ℓ hinge,")}
    found: list[tuple[str, dict[str, Pair], dict[str, Any]]] = [
        ("rules", first, {"kinks": "left", "allow_zero": zero}),
        ("margins", margins, {"kinks": "subgradient", "allow_zero": zero}),
        ("second derivatives", second, {"allow_zero": [*zero, *flat]}),
    ]
    return [_joined(name, pairs, {"wrt": (0,), **options}) for name, pairs, options in found if pairs]


def _slope(sigma: Activation) -> Pair:
    def forward(s: Array, _: None) -> tuple[Array, Any]:
        x = sigma.sigma(s)
        return x, (s if sigma.needs_s else None, x)

    return Pair(jnp.asarray(LATTICE), None, forward, lambda kept, u: (u * sigma.dsigma(*kept), None))


def _curvature(sigma: Any) -> Pair:
    def forward(s: Array, _: None) -> tuple[Array, Array]:
        return sigma.dsigma(s, sigma.sigma(s)), s

    return Pair(jnp.asarray(LATTICE), None, forward, lambda s, u: (u * sigma.d2sigma(s, sigma.sigma(s)), None))


def _joined(name: str, pairs: dict[str, Pair], options: dict[str, Any]) -> Part:
    """The pairs as the leaves of one function: what there is to compile does not grow with their number."""
    first = {name: pair.a for name, pair in pairs.items()}
    second = {name: pair.b for name, pair in pairs.items() if pair.b is not None}

    def passed(first: dict[str, Any], second: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        found = {name: pair.forward(first[name], second.get(name)) for name, pair in pairs.items()}
        return {name: value for name, (value, _) in found.items()}, {name: kept for name, (_, kept) in found.items()}

    def pulled(residuals: dict[str, Any], u: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        found = {name: pair.backward(residuals[name], u[name]) for name, pair in pairs.items()}
        return {name: da for name, (da, _) in found.items()}, {name: found[name][1] for name in second}

    return Part(name, lambda *points: passed(*points)[0], (first, second), {"vjp": (passed, pulled), **options})


def _targets(loss: Loss, shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Labels and, or, probabilities: numbers that every loss on arrays takes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(shape[-1], size=shape[:-1])
    numbers = rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)
    return [*([] if loss.target == "array" else [labels]), *([] if loss.target == "label" else [numbers])]


class _OfLayer(NamedTuple):
    """∂ℓ/∂ each of these."""

    x: Array
    s: Array
    w: Array
    b: Array


def layer_errors(net: Net, seed: int = 0) -> list[LayerError]:
    """Errors of ∂ℓ/∂x⁽ˡ⁾, ∂ℓ/∂s⁽ˡ⁾, ∂ℓ/∂w⁽ˡ⁾, ∂ℓ/∂b⁽ˡ⁾ against float64 autodiff at that point, last layer first.

    Of a `Network` they are those of the gradient of each parameter. ℓ is summed over a batch of 5. An error is
    max |got − want| in units in the last place of max |want|; in float64 the oracle rounds as well.

    Example:
      >>> [row.quantity for row in layer_errors(MLP((3, 2), loss="squared_error"))]
      ['∂ℓ/∂x', '∂ℓ/∂s', '∂ℓ/∂w', '∂ℓ/∂b']
    """
    leaves, treedef = jax.tree.flatten(example(net, seed))
    rules: Any = (_by_hand, _by_autodiff) if isinstance(net, MLP) else (_gradient, _gradient_by_autodiff)

    def errors(dtype: str) -> Any:
        points = cast(leaves, dtype)
        got, want = map(run, rules, (points, cast(points, "float64")))
        return jax.tree.map(partial(_ulps, dtype), got, want)

    def run(rule: Callable[..., Any], points: list[Any]) -> Any:
        return jax.jit(lambda leaves: rule(net, *jax.tree.unflatten(treedef, leaves)))(points)

    with precise():
        long, short = jax.tree.leaves_with_path(errors("float64")), jax.tree.leaves(errors("float32"))
    rows = [LayerError(*_named(path), a, b) for (path, a), b in zip(long, short, strict=True)]
    return sorted(rows, key=lambda row: [-int(number) for number in row.layer.split(".")])


def _named(path: tuple[Any, ...]) -> tuple[str, str]:
    """The layer and the gradient of a parameter of a `Network`; one that has no name is its layer's w."""
    numbers = [str(key.idx + 1) for key in path if hasattr(key, "idx")]
    fields = [key.name for key in path if hasattr(key, "name")]
    return ".".join(numbers or "1"), f"∂ℓ/∂{'.'.join(fields) or 'w'}"


def _gradient(net: Network, params: ParamTree, x: Array, y: Array) -> ParamTree:
    """Σₙ ∂ℓₙ/∂(the parameters) as jaxbp computes it, and below by autodiff."""
    return network.totals(network.factors(net, params, x, y)[1])


def _gradient_by_autodiff(net: Network, params: ParamTree, x: Array, y: Array) -> ParamTree:
    return jax.grad(lambda params: jnp.sum(_ell(net, params, x, y)))(params)


def _by_hand(net: MLP, params: Params, x: Array, y: Array) -> list[_OfLayer]:
    """The four quantities of each layer as jaxbp computes them."""
    dl_dx = jax.vmap(losses.get(net.loss).dl_dx)(_outputs(net, params, x), y)
    _, f = network.factors(net, params, x, y)
    pushed = [delta @ layer.w for delta, layer in zip(f.delta[1:], params[1:], strict=True)]
    parts = zip([*pushed, dl_dx], f.delta, mlp.outer_sums(f), strict=True)
    return [_OfLayer(dx, ds, *sums) for dx, ds, sums in parts]


def _by_autodiff(net: MLP, params: Params, x: Array, y: Array) -> list[_OfLayer]:
    """The same by adding a 0 to each x⁽ˡ⁾ and s⁽ˡ⁾ and differentiating with respect to it."""

    def total(params: Params, at_x: list[Array], at_s: list[Array]) -> Array:
        out = x
        for (w, b), sigma, zero_x, zero_s in zip(params, net.activations, at_x, at_s, strict=True):
            out = sigma.sigma(out @ w.T + b + zero_s) + zero_x
        return jnp.sum(jax.vmap(losses.get(net.loss).ell)(out, y))

    zeros = [jnp.zeros((len(x), size), x.dtype) for size in net.sizes[1:]]
    grads, dl_dx, dl_ds = jax.grad(total, argnums=(0, 1, 2))(params, zeros, zeros)
    return [_OfLayer(dx, ds, *g) for dx, ds, g in zip(dl_dx, dl_ds, grads, strict=True)]


def _ulps(dtype: str, got: Array, want: Array) -> float:
    largest = np.max(np.abs(f64(want)), initial=0.0)
    return float(np.max(np.abs(f64(got) - f64(want))) / float(np.spacing(np.asarray(largest, dtype))))
