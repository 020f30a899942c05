"""The checker pointed at jaxbp's own parts: an activation, a loss, a whole network, and its errors layer by layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp import losses, mlp, network
from jaxbp.activations import Activation
from jaxbp.checker.compare import f64
from jaxbp.checker.data import cast
from jaxbp.checker.trial import precise
from jaxbp.interop import apply
from jaxbp.losses import Loss
from jaxbp.mlp import MLP, Affine, Array, Params, forward

BATCH = 5
CLASSES = 4
LATTICE = np.array([0.0, -0.0, 0.1, 0.5, 0.9, 1.0, 2.5, 3.0, 6.0, 10.0, 20.0, 80.0, 1e-4, 1e-30, 1e4, 1e10])
LATTICE = np.concatenate([LATTICE, -LATTICE]).astype(np.float32)


class Part(NamedTuple):
    """One subject of a network's check: its name and the arguments of `check`."""

    name: str
    fun: Any
    args: Sequence[Any]
    options: dict[str, Any]


class LayerError(NamedTuple):
    """The largest error of one layer's quantity, in units in the last place of its largest element; l counts from 1."""

    layer: int
    quantity: str
    float64: float
    float32: float


def parts(subject: MLP | Activation | Loss, seed: int) -> list[Part]:
    """What there is to check in a network: σ′ and ∂ℓ/∂x, the backward pass behind `apply`, and the mean gradient."""
    if isinstance(subject, Activation):
        return [_rules([subject])]
    if isinstance(subject, Loss):
        return [_rules([], subject, CLASSES, seed)]
    loss = losses.get(subject.loss)
    params, x, y = example(subject, seed)

    def output(params: Params, x: Array) -> Array:
        return jax.vmap(lambda x: forward(subject, params, x).x[-1])(x)

    def mean_loss(params: Params, x: Array, y: Array) -> Array:
        return jnp.mean(jax.vmap(loss.ell)(output(params, x), y))

    gradient = {"value_and_grad": lambda params, x, y: network.value_and_grad(subject, params, x, y)}
    return [
        _rules([*dict.fromkeys(subject.activations)], loss, subject.sizes[-1], seed),
        Part("apply", lambda params, x: apply(subject, params, x), (params, x), {"reference": output}),
        Part("value_and_grad", mean_loss, (params, x, y), gradient),
    ]


def example(net: MLP, seed: int) -> tuple[Params, Array, Array]:
    """Parameters with random biases, N(0, 1) inputs and targets of the kind that the loss takes; N = 5."""
    rng = np.random.default_rng(seed)  # a draw by JAX would be compiled for each shape

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    params = tuple(
        Affine(w=normal(outputs, inputs) * (2 / inputs) ** 0.5, b=normal(outputs) / 2)
        for inputs, outputs in zip(net.sizes, net.sizes[1:], strict=False)
    )
    y = _targets(losses.get(net.loss), (BATCH, net.sizes[-1]), seed)[0]
    return params, normal(BATCH, net.sizes[0]), jnp.asarray(y)


def _rules(sigmas: Sequence[Activation], loss: Loss | None = None, outputs: int = 0, seed: int = 0) -> Part:
    """Every σ on a lattice and ℓ of one sample for each kind of target, as the leaves of one function: what there is
    to compile does not grow with the number of activations.

    Its backward is u ⊙ σ′(s) and u ∂ℓ/∂x; at a kink the slope is that on the left.
    """
    points: dict[str, Array] = {f"σ {sigma.name}": jnp.asarray(LATTICE) for sigma in sigmas}
    targets: dict[str, Array] = {}
    for y in _targets(loss, (1, outputs), seed) if loss else ():
        kind = "label" if y.ndim == 1 else "array"
        targets[f"ℓ {loss.name}, {kind} y"] = jnp.asarray(y[0])  # type: ignore[union-attr]
    x = np.random.default_rng(seed).standard_normal(outputs).astype(np.float32)
    points |= {name: jnp.asarray(x) for name in targets}

    def values(points: dict[str, Array], targets: dict[str, Array]) -> dict[str, Array]:
        found = {f"σ {sigma.name}": sigma.sigma(points[f"σ {sigma.name}"]) for sigma in sigmas}
        return found | {name: loss.ell(points[name], y) for name, y in targets.items()}  # type: ignore[union-attr]

    def forward_rule(points: dict[str, Array], targets: dict[str, Array]) -> tuple[Any, Any]:
        x = values(points, targets)
        s = {name: None for name in x} | {name: s for name, s in points.items() if name not in forgotten}
        return x, (s, x, targets)

    def backward_rule(residuals: Any, dl_dx: dict[str, Array]) -> tuple[Any, None]:
        s, x, targets = residuals
        slopes = {name: sigma.dsigma(s[name], x[name]) for sigma in sigmas for name in (f"σ {sigma.name}",)}
        slopes |= {name: loss.dl_dx(s[name], y) for name, y in targets.items()}  # type: ignore[union-attr]
        return {name: dl_dx[name] * slope for name, slope in slopes.items()}, None

    forgotten = {f"σ {sigma.name}" for sigma in sigmas if not sigma.needs_s}
    single = [name for name in targets if outputs == 1]
    allow_zero = [f"[0]['{name}']" for name in single]
    options = {"vjp": (forward_rule, backward_rule), "wrt": (0,), "kinks": "left", "allow_zero": allow_zero}
    return Part("rules", values, (points, targets), options)


def _targets(loss: Loss, shape: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Labels and, or, probabilities: numbers that every loss on arrays takes."""
    rng = np.random.default_rng(seed)
    labels, numbers = (
        rng.integers(shape[1], size=shape[0]),
        rng.dirichlet(np.ones(shape[1]), shape[0]).astype(np.float32),
    )
    return [*([] if loss.target == "array" else [labels]), *([] if loss.target == "label" else [numbers])]


def layer_errors(net: MLP, seed: int = 0) -> list[LayerError]:
    """Errors of ∂ℓ/∂x⁽ˡ⁾, ∂ℓ/∂s⁽ˡ⁾, ∂ℓ/∂w⁽ˡ⁾, ∂ℓ/∂b⁽ˡ⁾ against float64 autodiff at that point, last layer first.

    ℓ is summed over a batch of 5. An error is max |got − want| in units in the last place of max |want|; in float64 the
    oracle rounds as well.

    Example:
      >>> [row.quantity for row in layer_errors(MLP((3, 2), loss="squared_error"))]
      ['∂ℓ/∂x', '∂ℓ/∂s', '∂ℓ/∂w', '∂ℓ/∂b']
    """
    leaves, treedef = jax.tree.flatten(example(net, seed))
    found = {}
    with precise():
        for dtype in ("float64", "float32"):
            points = cast(leaves, dtype)
            got = jax.jit(lambda leaves: _by_hand(net, *jax.tree.unflatten(treedef, leaves)))(points)
            want = jax.jit(lambda leaves: _by_autodiff(net, *jax.tree.unflatten(treedef, leaves)))(
                cast(points, "float64")
            )
            found[dtype] = [
                [_ulps(g, w, dtype) for g, w in zip(*pair, strict=True)] for pair in zip(got, want, strict=True)
            ]
    quantities = "∂ℓ/∂x", "∂ℓ/∂s", "∂ℓ/∂w", "∂ℓ/∂b"
    return [
        LayerError(layer, quantity, wide, single)
        for layer, (wides, singles) in reversed([*enumerate(zip(*found.values(), strict=True), 1)])
        for quantity, wide, single in zip(quantities, wides, singles, strict=True)
    ]


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
