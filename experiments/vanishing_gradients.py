"""How gradients vanish at initialisation: Nielsen's networks over 200 seeds, and 50 layers beside mean-field theory.

Bands: 784-30×L-10, sigmoid, cross-entropy, weights of variance 1/in and biases of variance 1; ‖mean over the samples of
δ⁽ˡ⁾‖ of each hidden layer on MNIST, and the ratio of the last to the first. Published are the figures of one network,
of an unknown seed, and percentiles over 200 seeds of another program.

Mean field: ‖δ⁽ˡ⁾‖² of one sample falls by χ₁ = σ_w² E[σ′(√q z)²] in a layer, q the variance of s⁽ˡ⁾ there (Schoenholz
et al. 2017). The line in the picture is the product of these layer by layer, from the recursion of q that begins with
each sample's own ‖x‖²; the table has χ₁ at the fixed point q* (q after 200 layers), and the factor of a layer, on
average between two layers far from both ends: that of the line, and that measured. ‖δ‖² is averaged over samples and
networks. In float64: a δ of 10⁻⁸⁰ would be 0 in float32.

Sources: M. Nielsen, Neural Networks and Deep Learning, chapter 5; S. Schoenholz et al., Deep information propagation,
2017, §4.

Command: python -m experiments.vanishing_gradients [--config CONFIG] [--out FOLDER]
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.nn import initializers
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxbp
from experiments import mean_field, recipe, report
from experiments.backward_cost import sizes_of
from jaxbp.names import lookup
from jaxbp.run import data
from jaxbp.run.config import STRICT, DataConfig
from jaxbp.run.errors import UserError

NAME = "vanishing_gradients"
CONFIG = Path(__file__).parent / "configs" / f"{NAME}.toml"
PERCENTILES = (5, 50, 95)
COLOURS = {"normal": "tab:red", "glorot": "tab:blue", "he": "tab:green"}
DEFAULT = {  # Nielsen's default initialiser
    "scheme": initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0),
    "bias": initializers.normal(1.0),
}
VARIANCES = {  # of w, from the widths of its layer
    "normal": lambda inputs, outputs: 0.01**2,
    "glorot": lambda inputs, outputs: 2 / (inputs + outputs),
    "he": lambda inputs, outputs: 2 / inputs,
}


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Bands:
    """[bands]"""

    width: pydantic.PositiveInt
    hidden_layers: tuple[pydantic.PositiveInt, ...]
    images: pydantic.PositiveInt
    seeds: pydantic.PositiveInt


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class MeanField:
    """[mean_field]"""

    sizes: str
    hidden: tuple[str, ...]
    schemes: tuple[str, ...]
    samples: pydantic.PositiveInt
    seeds: pydantic.PositiveInt
    between: tuple[pydantic.PositiveInt, pydantic.PositiveInt]


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Settings:
    """experiments/configs/vanishing_gradients.toml."""

    bands: Bands
    mean_field: MeanField


# --- Nielsen's networks -----------------------------------------------------------------------------------------------


def mean_delta_norms(layers: int, config: Bands, x: jax.Array, y: jax.Array) -> np.ndarray:
    """‖meanₙ δₙ⁽ˡ⁾‖ of the hidden layers of each seed, (seeds, layers): vmapped over the seeds, one program."""
    sizes = (x.shape[1], *(config.width,) * layers, 10)
    net = jaxbp.MLP(sizes, "sigmoid", loss="sigmoid_cross_entropy")  # δ⁽ᴸ⁺¹⁾ = σ(s) − y, as in the book
    targets = jax.nn.one_hot(y, 10, dtype=x.dtype)

    def norms(key: jax.Array) -> jax.Array:
        _, f = jaxbp.factors(net, jaxbp.init(net, key, **DEFAULT, dtype=x.dtype), x, targets)
        return jnp.stack([jnp.linalg.norm(jnp.mean(delta, axis=0)) for delta in f.delta[:-1]])

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return np.asarray(jax.jit(jax.vmap(norms))(keys))


def bands(config: Bands) -> dict[str, Any]:
    """Percentiles over the seeds of each layer and of the ratio last to first, by the number of hidden layers.

    Raises:
      UserError: MNIST is neither here nor to be downloaded.
    """
    mnist = data.load(DataConfig("mnist"))
    x = jnp.asarray(mnist.x_train[: config.images], jnp.float64) / 256  # as in the book
    y = jnp.asarray(mnist.y_train[: config.images])
    found = {}
    for layers in config.hidden_layers:
        norms = mean_delta_norms(layers, config, x, y)
        ratios = norms[:, -1] / norms[:, 0]
        found[str(layers)] = {
            "layers": np.percentile(norms, PERCENTILES, axis=0).T.tolist(),
            "ratio": np.percentile(ratios, PERCENTILES).tolist(),
            "norms": norms.tolist(),
        }
        print(f"{layers} hidden layers: {config.seeds} seeds", flush=True)
    return found


def published_rows(layers: int, published: dict[str, Any]) -> list[tuple[str, float, list[float] | None]]:
    """(what, the published figure, the published band or None) of each hidden layer, then of the ratio."""
    L = str(layers)
    band: list[list[float] | None] = [None] * layers
    band[0], band[-1] = published["first_layer"][L], published["last_layer"][L]
    if L in published["middle_layer"]:
        band[1] = published["middle_layer"][L]
    rows = [(_delta(l), published["published"][L][l - 1], band[l - 1]) for l in range(1, layers + 1)]
    return [*rows, ("last / first", published["ratio"][L], published["ratio_band"][L])]


def _delta(layer: int) -> str:
    return f"δ⁽{str(layer).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}⁾"


# --- mean field -------------------------------------------------------------------------------------------------------


def squared_delta_norms(net: jaxbp.MLP, scheme: str, x: jax.Array, seeds: int) -> np.ndarray:
    """‖δₙ⁽ˡ⁾‖² averaged over the samples, (seeds, layers)."""
    drawn = (jaxbp.init(net, jax.random.key(seed), scheme, dtype=x.dtype) for seed in range(seeds))
    return np.stack([_squared_delta_norms(net, params, x) for params in drawn])


@functools.partial(jax.jit, static_argnums=0)
def _squared_delta_norms(net: jaxbp.MLP, params: jaxbp.Params, x: jax.Array) -> jax.Array:
    _, f = jaxbp.factors(net, params, x, jnp.arange(len(x)) % net.sizes[-1])
    return jnp.stack([jnp.mean(jnp.sum(delta**2, axis=1)) for delta in f.delta])


def predicted(sizes: Sequence[int], hidden: str, scheme: str, x: np.ndarray) -> np.ndarray:
    """E‖δ⁽ˡ⁾‖² / E‖δ⁽ᴸ⁾‖², (L,): with n⁽ˡ⁾ Var(w⁽ˡ⁺¹⁾) in place of σ_w², which is the same where all widths are."""
    var = [VARIANCES[scheme](*pair) for pair in itertools.pairwise(sizes)]
    q = sizes[0] * var[0] * np.mean(x**2, axis=1)  # of s⁽¹⁾, sample by sample
    factors = []
    for size, var_w in zip(sizes[1:-1], var[1:], strict=True):
        factors.append(size * var_w * mean_field.slope_moment(hidden, q))  # χ₁⁽ˡ⁾
        q = size * var_w * mean_field.second_moment(hidden, q)
    products = np.cumprod(factors[::-1], axis=0)[::-1]
    return np.append(products.mean(axis=1), 1.0)


def layer_factor(squares: np.ndarray, between: tuple[int, int]) -> float:
    """The factor by which ‖δ‖² changes in a layer, on average from the upper of two layers to the lower."""
    upper, lower = between
    return float((squares[lower - 1] / squares[upper - 1]) ** (1 / (upper - lower)))


def check(config: MeanField) -> None:
    """Before anything is measured.

    Raises:
      UserError: an unknown activation or scheme, layers that the network has not.
    """
    sizes = sizes_of(config.sizes)
    if not len(sizes) - 1 > config.between[0] > config.between[1]:
        layers = len(sizes) - 2
        raise UserError(f"mean_field.between: {config.between}, expected an upper and a lower one of {layers} layers")
    try:
        for hidden in config.hidden:
            jaxbp.MLP(sizes, hidden)
        for scheme in config.schemes:
            lookup("scheme", scheme, VARIANCES)
    except ValueError as error:
        raise UserError(f"mean_field: {error}") from None


def against_theory(config: MeanField) -> list[dict[str, Any]]:
    """The profile of ‖δ⁽ˡ⁾‖² for each activation and scheme, measured and predicted."""
    sizes = sizes_of(config.sizes)
    x = jax.random.normal(jax.random.key(0), (config.samples, sizes[0]), jnp.float64)
    found = []
    for hidden, scheme in itertools.product(config.hidden, config.schemes):
        squares = squared_delta_norms(jaxbp.MLP(sizes, hidden), scheme, x, config.seeds)
        here, theory = squares.mean(axis=0), predicted(sizes, hidden, scheme, np.asarray(x))
        var_w = sizes[1] * VARIANCES[scheme](sizes[1], sizes[2])
        q = mean_field.fixed_point(hidden, var_w)
        found.append(
            {
                **{"hidden": hidden, "scheme": scheme, "var_w": var_w, "fixed_point_q": q},
                "chi_at_fixed_point": var_w * float(mean_field.slope_moment(hidden, q)),
                "theory": (theory / theory[-1]).tolist(),
                "here": (here / here[-1]).tolist(),
                "theory_factor": layer_factor(theory, config.between),
                "here_factor": layer_factor(here, config.between),
                "here_factor_of_a_network": [layer_factor(row, config.between) for row in squares],
            }
        )
        print(f"{hidden}, {scheme}: measured", flush=True)
    return found


# --- table and picture ------------------------------------------------------------------------------------------------


def _band(band: Sequence[float] | None) -> str:
    return "–" if band is None else f"{band[0]:.4g} – {band[-1]:.4g}"


def show(results: dict[str, Any], published: dict[str, Any]) -> None:
    """Two tables: published beside here, and theory beside here."""
    rows = []
    for layers, found in results["bands"].items():
        here = [*found["layers"], found["ratio"]]
        if layers in published["published"]:
            known = published_rows(int(layers), published)
        else:
            known = [(_delta(l), None, None) for l in range(1, int(layers) + 1)] + [("last / first", None, None)]
        for (what, figure, band), percentiles in zip(known, here, strict=True):
            median = f"{percentiles[1]:.4g}"
            rows.append([layers, what, "–" if figure is None else figure, _band(band), median, _band(percentiles)])
    columns = ("hidden layers", "", "published", "published 5 – 95 %", "median here", "here 5 – 95 %")
    report.table(f"‖mean δ⁽ˡ⁾‖ at initialisation, {results['config']['bands']['seeds']} seeds", columns, rows)
    upper, lower = results["config"]["mean_field"]["between"]
    rows = [
        [found["hidden"], found["scheme"], f"{found['var_w']:.4g}", f"{found['fixed_point_q']:.4f}"]
        + [f"{found[key]:.4g}" for key in ("chi_at_fixed_point", "theory_factor", "here_factor")]
        + [f"{found[key][0] ** 0.5:.2e}" for key in ("theory", "here")]
        for found in results["mean_field"]
    ]
    columns = ("σ", "scheme", "σ_w²", "q*", "χ₁ at q*", "χ₁: theory", "here", "‖δ⁽¹⁾‖/‖δ⁽ᴸ⁾‖: theory", "here")
    sizes = results["config"]["mean_field"]["sizes"]
    report.table(f"{sizes}: ‖δ⁽ˡ⁾‖² changes by χ₁ in a layer, measured from layer {upper} to {lower}", columns, rows)


def draw(results: dict[str, Any], published: dict[str, Any]) -> Figure:
    """Above, Nielsen's networks; below, 50 layers and the theory, a panel an activation."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    config = results["config"]
    top.suptitle(
        f"784-{config['bands']['width']}×L-10, sigmoid, {config['bands']['seeds']} seeds: the first layer learns least"
    )
    axes = top.subplots(1, len(results["bands"]), sharey=True, squeeze=False)[0]
    for axis, (layers, found) in zip(axes, results["bands"].items(), strict=True):
        _draw_bands(axis, layers, found, published)
    axes[0].set_ylabel("‖mean δ⁽ˡ⁾‖")
    axes[0].legend(fontsize="small", loc="upper left")
    bottom.suptitle(f"{config['mean_field']['sizes']}: δ of a sample on its way back, and what χ₁ predicts")
    axes = bottom.subplots(1, len(config["mean_field"]["hidden"]), sharey=True, squeeze=False)[0]
    for axis, hidden in zip(axes, config["mean_field"]["hidden"], strict=True):
        _draw_profiles(axis, hidden, [found for found in results["mean_field"] if found["hidden"] == hidden])
    axes[0].set_ylabel("‖δ⁽ˡ⁾‖ / ‖δ⁽ᴸ⁾‖")
    return figure


def _draw_bands(axis: Axes, layers: str, found: dict[str, Any], published: dict[str, Any]) -> None:
    low, median, high = np.array(found["layers"]).T
    at = np.arange(1, int(layers) + 1)
    axis.vlines(at, low, high, color="tab:blue", alpha=0.35, linewidth=12, label="5 – 95 % of the seeds, here")
    axis.plot(at, median, "_", color="tab:blue", markersize=16, markeredgewidth=2, label="median, here")
    if layers in published["published"]:
        for l, (_, _, band) in enumerate(published_rows(int(layers), published)[:-1], 1):
            if band:
                error = {"fmt": " ", "color": "tab:orange", "capsize": 5, "linewidth": 1.5}
                label = "5 – 95 %, published" if l == 1 else None
                axis.errorbar([l], band[:1], [[0], [band[1] - band[0]]], **error, label=label)
        axis.plot(at, published["published"][layers], "D", color="tab:orange", label="one network, published")
    axis.set(yscale="log", xlabel="hidden layer l", title=f"L = {layers}: last / first {found['ratio'][1]:.3g}")
    axis.set_xticks(at)
    axis.set_xlim(0.5, int(layers) + 0.5)
    axis.grid(alpha=0.3)


def _draw_profiles(axis: Axes, hidden: str, profiles: Sequence[dict[str, Any]]) -> None:
    for found in profiles:
        layers, colour = np.arange(1, len(found["here"]) + 1), COLOURS[found["scheme"]]
        label = f"{found['scheme']}, σ_w² = {found['var_w']:.3g}: χ₁ = {found['chi_at_fixed_point']:.3g}"
        axis.plot(layers, np.sqrt(found["here"]), ".", color=colour, markersize=6, label=label)
        axis.plot(layers, np.sqrt(found["theory"]), color=colour, linewidth=1.2)
    axis.set(yscale="log", xlabel="layer l", title=hidden, ylim=(1e-75, 1e7))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right", title="dots: here; lines: theory", title_fontsize="small")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its tables, writes vanishing_gradients.json and vanishing_gradients.png."""
    parser = report.parser(__doc__, CONFIG, "networks and seeds")
    published = report.published(NAME)
    with report.study(NAME, parser, arguments) as study, jax.enable_x64(True):
        config = recipe.read(Settings, study.options.config)
        check(config.mean_field)
        found = {"bands": bands(config.bands), "mean_field": against_theory(config.mean_field)}
        results = {"config": dataclasses.asdict(config), **found}
        show(results, published)
        study.save(results, draw(results, published))


if __name__ == "__main__":
    main()
