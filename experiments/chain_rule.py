"""The chain rule: a network's Jacobian is the product of its layers' Jacobians. What is left of it after 64 layers?

J = J⁽ᴸ⁾ … J⁽¹⁾ with J⁽ˡ⁾ = diag(σ′(s⁽ˡ⁾)) w⁽ˡ⁾, from the tape of one `jaxbp.forward`. It is compared with what autodiff
says, `jax.jacrev` of `jaxbp.apply` and `jax.jacfwd` of `jaxbp.forward`, and then taken apart: its singular values at
initialisation against depth, linear and tanh, for Gaussian weights (variance σ_w²/n) and orthogonal ones (σ_w times an
orthogonal matrix).

Theory, for a width n → ∞. Let μₖ = E[σ′(√q z)²ᵏ], z normal, q the variance of s, the same in each layer:
* mean s² = (σ_w² μ₁)ᴸ = χᴸ; where χ = 1, var s² = L (μ₂/μ₁² − 1) for orthogonal weights, L μ₂/μ₁² for Gaussian ones
  (Pennington et al. 2017, §2.4);
* linear, orthogonal: every singular value is 1 (Saxe et al. 2013, §3);
* linear, Gaussian: s² follows the Fuss–Catalan law, whose quantiles are known at every depth (K. Penson and K.
  Życzkowski, Product of Ginibre matrices, 2011); it is (L + 1)^(L + 1) / Lᴸ at most.
The tanh networks are on the critical line: σ_w² = 1/μ₁ and σ_b² = q − σ_w² E[tanh(√q z)²] at the q of the config.

All in float64. Singular values below ε n s_max are rounding, and left out.

Sources: A. Saxe et al., Exact solutions to the nonlinear dynamics of learning in deep linear neural networks, 2013;
J. Pennington et al., Resurrecting the sigmoid in deep learning through dynamical isometry, 2017.

Command: python -m experiments.chain_rule [--config CONFIG] [--out FOLDER]
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.nn import initializers
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxbp
from experiments import mean_field, recipe, report
from jaxbp.run.config import STRICT

NAME = "chain_rule"
CONFIG = Path(__file__).parent / "configs" / f"{NAME}.toml"
QUANTILES = {"largest": 1.0, "75 %": 0.75, "median": 0.5, "25 %": 0.25}
HIDDEN = ("identity", "tanh")
Weights = Literal["orthogonal", "gaussian"]
TITLES = {"identity": "linear", "tanh": "tanh", "orthogonal": "orthogonal", "gaussian": "Gaussian"}


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Settings:
    """experiments/configs/chain_rule.toml."""

    width: pydantic.PositiveInt
    depths: tuple[pydantic.PositiveInt, ...]
    seeds: pydantic.PositiveInt
    tanh_q: pydantic.PositiveFloat


def jacobian(net: jaxbp.MLP, params: jaxbp.Params, x: jax.Array) -> jax.Array:
    """J = J⁽ᴸ⁾ … J⁽¹⁾, (n_L, n₀), J⁽ˡ⁾ = diag(σ′(s⁽ˡ⁾)) w⁽ˡ⁾."""
    tape = jaxbp.forward(net, params, x)
    product = jnp.eye(net.sizes[0], dtype=x.dtype)
    for (w, _), sigma, s, after in zip(params, net.activations, tape.s, tape.x[1:], strict=True):
        product = sigma.dsigma(s, after)[:, None] * (w @ product)
    return product


def disagreement(net: jaxbp.MLP, params: jaxbp.Params, x: jax.Array) -> dict[str, float]:
    """‖product − autodiff‖ / ‖autodiff‖, Frobenius: reverse mode through `apply`, forward mode through `forward`."""
    product = jacobian(net, params, x)
    autodiff = {
        "jacrev(apply)": jax.jacrev(lambda x: jaxbp.apply(net, params, x))(x),
        "jacfwd(forward)": jax.jacfwd(lambda x: jaxbp.forward(net, params, x).x[-1])(x),
    }
    return {name: float(jnp.linalg.norm(product - J) / jnp.linalg.norm(J)) for name, J in autodiff.items()}


class Variances(NamedTuple):
    """σ_w², σ_b², and q, the variance of s in every layer."""

    w: float
    b: float
    q: float


def variances(hidden: str, config: Settings) -> Variances:
    """On the critical line of tanh; 1 and 0 for a linear network."""
    if hidden == "identity":
        return Variances(1.0, 0.0, 1.0)
    return Variances(*mean_field.critical(hidden, config.tanh_q), config.tanh_q)


def initial(net: jaxbp.MLP, key: jax.Array, weights: Weights, at: Variances) -> jaxbp.Params:
    """Weights of variance σ_w²/n, or σ_w times an orthogonal matrix; biases of variance σ_b²."""
    gaussian, orthogonal = (at.w / net.sizes[0]) ** 0.5, at.w**0.5
    draw = {"gaussian": initializers.normal(gaussian), "orthogonal": initializers.orthogonal(orthogonal)}[weights]
    return jaxbp.init(net, key, draw, initializers.normal(at.b**0.5), jnp.float64)


def singular_values(depth: int, hidden: str, weights: Weights, config: Settings) -> np.ndarray:
    """Of `seeds` networks, each at a normal input whose variance makes that of s⁽¹⁾ q, (seeds, n)."""
    net = jaxbp.MLP((config.width,) * (depth + 1), hidden, output=hidden)
    at = variances(hidden, config)
    scale = ((at.q - at.b) / at.w) ** 0.5

    values = []
    for key in jax.random.split(jax.random.key(depth), config.seeds):
        key_x, key_params = jax.random.split(key)
        x = scale * jax.random.normal(key_x, (config.width,), jnp.float64)
        # Not inside jit: compiled for 64 layers at once, the draws would take a minute; layer by layer they are cached.
        values.append(_singular_values(net, initial(net, key_params, weights, at), x))
    return np.stack(values)


@functools.partial(jax.jit, static_argnums=0)
def _singular_values(net: jaxbp.MLP, params: jaxbp.Params, x: jax.Array) -> jax.Array:
    return jnp.linalg.svd(jacobian(net, params, x), compute_uv=False)


def fuss_catalan(depth: int, quantile: float, points: int = 200_001) -> float:
    """The quantile of s, a singular value of a product of L = depth square Gaussian matrices of variance 1/n, n → ∞.

    s² = sin((L+1)φ)^(L+1) / (sin φ sin(Lφ)^L) falls from its largest value to 0 while φ goes from 0 to π/(L+1), and has
    the density sin²φ sin(Lφ)^(L−1) / (π sin((L+1)φ)^L) there (Penson and Życzkowski 2011). Times s² it is the density
    of ln s²: sin φ sin((L+1)φ) / (π sin(Lφ)).

    Example:
      >>> round(fuss_catalan(1, 1.0), 6), round(fuss_catalan(1, 0.5), 3)  # the quarter-circle law
      (2.0, 0.808)
    """
    L = depth
    phi = np.linspace(0, np.pi / (L + 1), points + 1)[:-1] + np.pi / (L + 1) / points / 2
    log_square = (L + 1) * np.log(np.sin((L + 1) * phi)) - np.log(np.sin(phi)) - L * np.log(np.sin(L * phi))
    density = np.sin(phi) * np.sin((L + 1) * phi) / (np.pi * np.sin(L * phi))
    larger = np.cumsum(density * -np.gradient(log_square, phi))  # P(ln s² > log_square), up to its scale
    return float(np.exp(np.interp(1 - quantile, larger / larger[-1], log_square) / 2))


def theory(depth: int, hidden: str, weights: str, config: Settings) -> dict[str, float | None]:
    """Mean and variance of s², and the quantiles of s, where they are known."""
    mu_1, mu_2 = (float(mean_field.slope_moment(hidden, variances(hidden, config).q, k)) for k in (1, 2))
    variance = depth * (mu_2 / mu_1**2 - (weights == "orthogonal"))
    found: dict[str, float | None] = {"mean_square": 1.0, "variance": variance, **dict.fromkeys(QUANTILES)}
    found["condition"] = 1.0 if (hidden, weights) == ("identity", "orthogonal") else None
    if hidden == "identity":
        law = {name: 1.0 if weights == "orthogonal" else fuss_catalan(depth, q) for name, q in QUANTILES.items()}
        found |= law
    return found


def measured(values: np.ndarray) -> dict[str, Any]:
    """The same, averaged over the networks (quantiles of s: geometric); the condition number, where it is resolved."""
    resolution = float(np.finfo(values.dtype).eps * values.shape[1] * values.max())
    found: dict[str, Any] = {"resolution": resolution}
    found["mean_square"] = float((values**2).mean())
    found["variance"] = float((values**2).var(axis=1).mean() / (values**2).mean() ** 2)
    for name, q in QUANTILES.items():
        quantile = float(np.exp(np.log(np.quantile(values, q, axis=1)).mean()))
        found[name] = quantile if quantile > resolution else None
    smallest = values.min()
    condition = float(np.exp(np.log(values.max(axis=1) / np.maximum(values.min(axis=1), smallest)).mean()))
    return found | {"condition": condition if smallest > resolution else None}


def measure(config: Settings) -> dict[str, Any]:
    """Agreement with autodiff at each depth, and the singular values of the four kinds of network."""
    checks = []
    for depth in config.depths:
        net = jaxbp.MLP((config.width,) * (depth + 1), "tanh", output="tanh")
        params = initial(net, jax.random.key(depth), "gaussian", variances("tanh", config))
        checks.append({"depth": depth, **disagreement(net, params, jnp.linspace(-1.0, 1, config.width))})
        print(f"depth {depth}: compared with autodiff", flush=True)
    kinds = []
    for hidden in HIDDEN:
        for weights in get_args(Weights):
            rows = []
            for depth in config.depths:
                here = measured(singular_values(depth, hidden, weights, config))
                rows.append({"depth": depth, "theory": theory(depth, hidden, weights, config), "here": here})
            kinds.append({"hidden": hidden, "weights": weights, "rows": rows})
            print(f"{TITLES[hidden]}, {TITLES[weights]}: singular values", flush=True)
    return {"config": dataclasses.asdict(config), "checks": checks, "kinds": kinds}


def _pair(row: dict[str, Any], key: str) -> str:
    """ "theory | here"."""
    shown = ["–" if value is None else f"{value:.3g}" for value in (row["theory"].get(key), row["here"][key])]
    return " / ".join(shown)


def show(results: dict[str, Any]) -> None:
    """Two tables: agreement with autodiff, and theory beside what was measured."""
    names = [name for name in results["checks"][0] if name != "depth"]
    rows = [[check["depth"], *(f"{check[name]:.1e}" for name in names)] for check in results["checks"]]
    report.table("product of the layers' Jacobians: relative error against autodiff, tanh", ("depth", *names), rows)
    keys = {
        "mean_square": "mean s²",
        "variance": "var s²",
        "largest": "largest s",
        "median": "median s",
        "condition": "condition",
    }
    lines = [
        [f"{TITLES[kind['hidden']]}, {TITLES[kind['weights']]}", row["depth"], *(_pair(row, key) for key in keys)]
        for kind in results["kinds"]
        for row in kind["rows"]
    ]
    columns = ("network", "depth", *(f"{label}: theory / here" for label in keys.values()))
    report.table(f"singular values s of the Jacobian, width {results['config']['width']}", columns, lines)


def draw(results: dict[str, Any]) -> Figure:
    """Quantiles of the singular values for the four kinds, and the variance of their squares."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels, right = figure.subfigures(1, 2, width_ratios=(2, 1.15))
    axes = panels.subplots(2, 2, sharex=True, sharey=True)
    for axis, kind in zip(axes.flat, results["kinds"], strict=True):
        _draw_quantiles(axis, kind)
    for axis in axes[-1]:
        axis.set_xlabel("depth")
    for axis in axes[:, 0]:
        axis.set_ylabel("singular value of the Jacobian")
    axes[0, 1].legend(loc="lower left", fontsize="small")
    _draw_variance(right.subplots(), results["kinds"])
    config = results["config"]
    figure.suptitle(f"J⁽ᴸ⁾ … J⁽¹⁾ at initialisation, width {config['width']}, {config['seeds']} networks at each depth")
    return figure


def _draw_quantiles(axis: Axes, kind: dict[str, Any]) -> None:
    depths = [row["depth"] for row in kind["rows"]]
    for (name, _), colour in zip(QUANTILES.items(), ("tab:red", "tab:orange", "tab:blue", "tab:green"), strict=True):
        here = [np.nan if row["here"][name] is None else row["here"][name] for row in kind["rows"]]
        axis.plot(depths, here, "o", color=colour, markersize=5, label=name)
        known = [row["theory"][name] for row in kind["rows"]]
        if None not in known:
            axis.plot(depths, known, color=colour, linewidth=1.2, label="theory" if name == "largest" else None)
    axis.set(
        xscale="log", yscale="log", ylim=(1e-13, 1e3), title=f"{TITLES[kind['hidden']]}, {TITLES[kind['weights']]}"
    )
    axis.set_xticks(depths, [str(depth) for depth in depths], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _draw_variance(axis: Axes, kinds: Sequence[dict[str, Any]]) -> None:
    for i, kind in enumerate(kinds):
        label = f"{TITLES[kind['hidden']]}, {TITLES[kind['weights']]}"
        depths = [row["depth"] for row in kind["rows"]]
        if kind["rows"][-1]["theory"]["variance"] == 0:
            worst = max(row["here"]["variance"] for row in kind["rows"])
            axis.plot([], [], " ", label=f"{label}: 0, here ≤ {worst:.0e}")
            continue
        axis.plot(depths, [row["here"]["variance"] for row in kind["rows"]], "o", color=f"C{i}", label=label)
        axis.plot(depths, [row["theory"]["variance"] for row in kind["rows"]], color=f"C{i}", linewidth=1.2)
    axis.set(xscale="log", yscale="log", xlabel="depth", title="variance of s² (mean s² = 1); lines: theory")
    axis.set_xticks(depths, [str(depth) for depth in depths], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its tables, writes chain_rule.json and chain_rule.png."""
    parser = report.parser(__doc__, CONFIG, "width, depths, seeds")
    with report.study(NAME, parser, arguments) as study, jax.enable_x64(True):
        results = measure(recipe.read(Settings, study.options.config))
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
