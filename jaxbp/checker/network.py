"""The checker pointed at jaxbp's own parts: an activation, a loss, a whole network, and its errors layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import activations, curvature, losses, mlp, network
from jaxbp.activations import Activation
from jaxbp.checker.compare import f64
from jaxbp.checker.data import cast
from jaxbp.checker.trial import precise
from jaxbp.interop import apply
from jaxbp.layers import Chain
from jaxbp.losses import Loss
from jaxbp.mlp import MLP, Array, Params, forward
from jaxbp.network import Net, Network, ParamTree

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


class LayerError(NamedTuple):
    """The largest error of one layer's quantity, in units in the last place of its largest element.

    layer: counted from 1; 4.2 is the second one within the fourth.
    """

    layer: str
    quantity: str
    float64: float
    float32: float


def name_of(subject: Net | Activation | Loss) -> str:
    """Of a report."""
    if isinstance(subject, Network):
        return f"Network {subject.shape} → {subject.outputs}"
    return f"MLP{subject.sizes}" if isinstance(subject, MLP) else subject.name


def parts(subject: Net | Activation | Loss, seed: int, level: str) -> list[Part]:
    """What there is to check in a network: σ′ and ∂ℓ/∂x, the backward pass behind `apply`, and the mean gradient.

    In place of σ′ a `Network` has the backward pass of each of its layers. At level "full" of a perceptron also σ″,
    H_ℓ and the Hessian times a vector, where there is one; of an activation or a loss they are always checked.
    """
    if isinstance(subject, Activation):
        return _rules([subject])
    if isinstance(subject, Loss):
        return _rules([], subject, (CLASSES,), seed)
    loss, outputs = losses.get(subject.loss), network.shapes(subject)[1]
    params, x, y = example(subject, seed)
    layers = [_layers(subject, params, x[0], seed)] if isinstance(subject, Network) else []
    sigmas = [*dict.fromkeys(subject.activations)] if isinstance(subject, MLP) else []

    def output(params: ParamTree, x: Array) -> Array:
        outputs: Array = jax.vmap(lambda x: network.layer_of(subject).forward(params, x)[0])(x)
        return outputs

    def mean_loss(params: ParamTree, x: Array, y: Array) -> Array:
        return jnp.mean(jax.vmap(loss.ell)(output(params, x), y))

    gradient = {"value_and_grad": lambda params, x, y: network.value_and_grad(subject, params, x, y)}
    rules, *second = _rules(sigmas, loss, outputs, seed)
    return [
        *layers,
        rules,
        Part("apply", lambda params, x: apply(subject, params, x), (params, x), {"reference": output}),
        Part("value_and_grad", mean_loss, (params, x, y), gradient),
        *(second if level == "full" else []),
        *([_hessian(subject, mean_loss, params, x, y)] if level == "full" and _is_curved(subject) else []),
    ]


def _is_curved(net: Net) -> TypeGuard[MLP]:
    """Whether there is a Hessian by hand."""
    known = isinstance(net, MLP) and all(sigma.d2sigma for sigma in net.activations)
    return known and losses.get(net.loss).hvp is not None


def _hessian(net: MLP, mean_loss: Callable[..., Array], params: ParamTree, x: Array, y: Array) -> Part:
    """The R-passes as the backward pass of the gradient: the Hessian is symmetric."""

    def gradient(params: ParamTree, x: Array, y: Array) -> ParamTree:
        found: ParamTree = jax.grad(mean_loss)(params, x, y)
        return found

    def forward_rule(params: ParamTree, x: Array, y: Array) -> tuple[ParamTree, Any]:
        return gradient(params, x, y), (params, x, y)

    def backward_rule(residuals: Any, v: ParamTree) -> tuple[ParamTree, None, None]:
        params, x, y = residuals
        return curvature.hvp(net, params, x, y, v), None, None

    return Part("hvp", gradient, (params, x, y), {"vjp": (forward_rule, backward_rule), "wrt": (0,)})


def _layers(net: Network, params: ParamTree, x: Array, seed: int) -> Part:
    """The layers of a chain as one function, for one sample, each at what the layers before it make of x.

    A layer that comes again is there once. Dropout draws from one key.
    """
    layers, own_params = (net.layer.layers, params) if isinstance(net.layer, Chain) else ((net.layer,), (params,))
    key, chosen, own, inputs, seen = jax.random.key(seed), {}, {}, {}, set()
    for number, (layer, params) in enumerate(zip(layers, own_params, strict=True), 1):
        name = f"layer {number}, {type(layer).__name__}"
        if (layer, x.shape) not in seen and any(map(_is_float, jax.tree.leaves((params, x)))):
            chosen[name], own[name], inputs[name] = layer, params, x
        seen.add((layer, x.shape))
        x = layer.forward(params, x, key)[0]

    def passed(own: ParamTree, inputs: dict[str, Array]) -> dict[str, tuple[Array, Any]]:
        return {name: layer.forward(own[name], inputs[name], key) for name, layer in chosen.items()}

    def values(own: ParamTree, inputs: dict[str, Array]) -> dict[str, Array]:
        return {name: y for name, (y, _) in passed(own, inputs).items()}

    def forward_rule(own: ParamTree, inputs: dict[str, Array]) -> tuple[Any, Any]:
        found = passed(own, inputs)
        return {name: y for name, (y, _) in found.items()}, (own, {name: tape for name, (_, tape) in found.items()})

    def backward_rule(residuals: Any, dl_dy: dict[str, Array]) -> tuple[ParamTree, ParamTree]:
        own, tapes = residuals
        pulled = {name: layer.backward(own[name], tapes[name], dl_dy[name]) for name, layer in chosen.items()}
        batches = {name: jax.tree.map(lambda a: a[None], factors) for name, (_, factors) in pulled.items()}
        dl_dx = {name: dl_dx if _is_float(inputs[name]) else None for name, (dl_dx, _) in pulled.items()}
        return {name: network.totals(batch) for name, batch in batches.items()}, dl_dx

    return Part("layers", values, (own, inputs), {"vjp": (forward_rule, backward_rule)})


def _is_float(a: Array) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.floating))


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


class Rule(NamedTuple):
    """A function by hand: its point, (x, y) ↦ value, (x or None, value, y, u) ↦ cotangent of x; y: a loss's target."""

    point: Array
    value: Callable[..., Array]
    backward: Callable[..., Array]
    y: Array | None = None
    forgets: bool = False  # the backward is not given x


def _rules(
    sigmas: Sequence[Activation], loss: Loss | None = None, outputs: tuple[int, ...] = (), seed: int = 0
) -> list[Part]:
    """Every σ on a lattice and ℓ of one sample for each kind of target; then σ′ and ∂ℓ/∂x of those with curvature.

    The backward is u ⊙ σ′(s) and u ∂ℓ/∂x, at a kink with the slope on the left; then u ⊙ σ″(s) and H_ℓ u.
    """
    s, first, second = jnp.asarray(LATTICE), {}, {}
    known: Any = loss
    for sigma in sigmas:
        first[f"σ {sigma.name}"] = _slope(sigma, s)
        if sigma.d2sigma not in (None, activations.no_curvature):
            second[f"σ′ {sigma.name}"] = _curvature(sigma, s)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(outputs).astype(np.float32))
    for target in _targets(loss, (1, *outputs), seed) if loss else ():
        y, name = jnp.asarray(target[0]), f"{known.name}, {'label' if target.ndim == len(outputs) else 'array'} y"
        first[f"ℓ {name}"] = Rule(x, known.ell, lambda x, _, y, u: u * known.dl_dx(x, y), y)
        if known.hvp is not None:
            second[f"∂ℓ/∂x {name}"] = Rule(x, known.dl_dx, lambda x, _, y, u: known.hvp(x, y, u), y)
    zero = [f"[0]['{name}']" for name, rule in first.items() if rule.y is not None and outputs[-1] == 1]
    flat = [f"[0]['{name}']" for name in second if name.split(",")[0].split()[1] in LINEAR]
    return [
        _joined("rules", first, {"kinks": "left", "allow_zero": zero}),
        *([_joined("second derivatives", second, {"allow_zero": [*zero, *flat]})] if second else []),
    ]


def _slope(sigma: Activation, s: Array) -> Rule:
    return Rule(s, lambda s, _: sigma.sigma(s), lambda s, x, _, u: u * sigma.dsigma(s, x), None, not sigma.needs_s)


def _curvature(sigma: Any, s: Array) -> Rule:
    def slope(s: Array, _: None) -> Array:
        found: Array = sigma.dsigma(s, sigma.sigma(s))
        return found

    return Rule(s, slope, lambda s, _, __, u: u * sigma.d2sigma(s, sigma.sigma(s)))


def _joined(name: str, rules: dict[str, Rule], options: dict[str, Any]) -> Part:
    """The rules as the leaves of one function: what there is to compile does not grow with their number."""
    points = {name: rule.point for name, rule in rules.items()}
    targets = {name: rule.y for name, rule in rules.items() if rule.y is not None}

    def values(points: dict[str, Array], targets: dict[str, Array]) -> dict[str, Array]:
        return {name: rule.value(points[name], targets.get(name)) for name, rule in rules.items()}

    def forward_rule(points: dict[str, Array], targets: dict[str, Array]) -> tuple[Any, Any]:
        x = values(points, targets)
        return x, ({name: None if rules[name].forgets else s for name, s in points.items()}, x, targets)

    def backward_rule(residuals: Any, u: dict[str, Array]) -> tuple[Any, None]:
        s, x, targets = residuals
        return {name: rule.backward(s[name], x[name], targets.get(name), u[name]) for name, rule in rules.items()}, None

    return Part(name, values, (points, targets), {"vjp": (forward_rule, backward_rule), "wrt": (0,), **options})


def _targets(loss: Loss, shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Labels and, or, probabilities: numbers that every loss on arrays takes."""
    rng = np.random.default_rng(seed)
    labels, numbers = (
        rng.integers(shape[-1], size=shape[:-1]),
        rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32),
    )
    return [*([] if loss.target == "array" else [labels]), *([] if loss.target == "label" else [numbers])]


def layer_errors(net: Net, seed: int = 0) -> list[LayerError]:
    """Errors of ∂ℓ/∂x⁽ˡ⁾, ∂ℓ/∂s⁽ˡ⁾, ∂ℓ/∂w⁽ˡ⁾, ∂ℓ/∂b⁽ˡ⁾ against float64 autodiff at that point, last layer first.

    Of a `Network` they are those of the gradient of each parameter. ℓ is summed over a batch of 5. An error is
    max |got − want| in units in the last place of max |want|; in float64 the oracle rounds as well.

    Example:
      >>> [row.quantity for row in layer_errors(MLP((3, 2), loss="squared_error"))]
      ['∂ℓ/∂x', '∂ℓ/∂s', '∂ℓ/∂w', '∂ℓ/∂b']
    """
    data = example(net, seed)
    leaves, treedef = jax.tree.flatten(data)
    if isinstance(net, MLP):
        by_hand, by_autodiff, names = _by_hand, _by_autodiff, [*_quantities(net)]
    else:
        by_hand, by_autodiff = _gradient, _gradient_by_autodiff  # type: ignore[assignment]
        names = [_named(path) for path, _ in jax.tree.leaves_with_path(data[0])]

    def run(compute: Callable[..., Any], points: list[Any]) -> list[Any]:
        found = jax.jit(lambda leaves: compute(net, *jax.tree.unflatten(treedef, leaves)))(points)
        return jax.tree.leaves(found)

    errors = []
    with precise():
        for dtype in ("float64", "float32"):
            points = cast(leaves, dtype)
            pairs = zip(run(by_hand, points), run(by_autodiff, cast(points, "float64")), strict=True)
            errors.append([_ulps(got, want, dtype) for got, want in pairs])
    rows = [LayerError(*name, *both) for name, *both in zip(names, *errors, strict=True)]
    return sorted(rows, key=lambda row: [-int(number) for number in row.layer.split(".")])


def _quantities(net: MLP) -> Iterator[tuple[str, str]]:
    for layer in range(1, len(net.sizes)):
        yield from ((str(layer), f"∂ℓ/∂{letter}") for letter in "xswb")


def _named(path: tuple[Any, ...]) -> tuple[str, str]:
    """The layer and the gradient of a parameter of a `Network`; one that has no name is its layer's w."""
    numbers = [str(key.idx + 1) for key in path if hasattr(key, "idx")]
    fields = [key.name for key in path if hasattr(key, "name")]
    return ".".join(numbers or "1"), f"∂ℓ/∂{'.'.join(fields) or 'w'}"


def _gradient(net: Network, params: ParamTree, x: Array, y: Array) -> ParamTree:
    """Σₙ ∂ℓₙ/∂(the parameters) as jaxbp computes it, and below by autodiff."""
    return network.totals(network.factors(net, params, x, y)[1])


def _gradient_by_autodiff(net: Network, params: ParamTree, x: Array, y: Array) -> ParamTree:
    def total(params: ParamTree) -> Array:
        outputs = jax.vmap(lambda x: net.layer.forward(params, x)[0])(x)
        return jnp.sum(jax.vmap(losses.get(net.loss).ell)(outputs, y))

    return jax.grad(total)(params)


def _by_hand(net: MLP, params: Params, x: Array, y: Array) -> list[tuple[Array, ...]]:
    """The four quantities of each layer as jaxbp computes them."""
    outputs = jax.vmap(lambda x: forward(net, params, x).x[-1])(x)
    dl_dx = jax.vmap(losses.get(net.loss).dl_dx)(outputs, y)
    _, f = network.factors(net, params, x, y)
    pushed = [delta @ layer.w for delta, layer in zip(f.delta[1:], params[1:], strict=True)]
    return [(dx, ds, *sums) for dx, ds, sums in zip([*pushed, dl_dx], f.delta, mlp.outer_sums(f), strict=True)]


def _by_autodiff(net: MLP, params: Params, x: Array, y: Array) -> list[tuple[Array, ...]]:
    """The same by adding a 0 to each x⁽ˡ⁾ and s⁽ˡ⁾ and differentiating with respect to it."""

    def total(params: Params, at_x: list[Array], at_s: list[Array]) -> Array:
        out = x
        for (w, b), sigma, zero_x, zero_s in zip(params, net.activations, at_x, at_s, strict=True):
            out = sigma.sigma(out @ w.T + b + zero_s) + zero_x
        return jnp.sum(jax.vmap(losses.get(net.loss).ell)(out, y))

    zeros = [jnp.zeros((len(x), size), x.dtype) for size in net.sizes[1:]]
    grads, dl_dx, dl_ds = jax.grad(total, argnums=(0, 1, 2))(params, zeros, zeros)
    return [(dx, ds, g.w, g.b) for dx, ds, g in zip(dl_dx, dl_ds, grads, strict=True)]


def _ulps(got: Array, want: Array, dtype: str) -> float:
    largest = np.max(np.abs(f64(want)), initial=0.0)
    return float(np.max(np.abs(f64(got) - f64(want))) / float(np.spacing(np.asarray(largest, dtype))))
