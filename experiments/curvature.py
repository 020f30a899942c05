"""What does curvature cost, and is it what theory says?

Time: each quantity ÷ jaxbp.value_and_grad of the same batch, for 784-256-256-10 and 784-1024-1024-10, relu, N = 128,
beside a lower bound: the matrix products that it cannot do without, counted in those of the gradient. Beside the
Hessian stand jax.jvp of jax.grad and, for repeated products, jax.linearize of jax.grad, which keeps its tape as well.
Programs are compiled and called in turn in one process; a ratio is the median over rounds of the ratio in a round.
What is kept is an argument of its program, ours and autodiff's. Scratch is XLA's temporary bytes.

Other libraries: the same networks with tanh, so that σ″ is not 0; see `experiments.bench.peers`.
Laplace's approximation is compared there too: the evidence, also of a network small enough for a dense matrix, and the
covariance of outputs, whose posterior is kept.

Width: the tangent kernel of a relu network with one hidden layer and inputs at 60°, beside its limit for infinite
width, 0.942331 (the arc-cosine kernels of Cho and Saul 2009, Jacot et al. 2018): mean and spread over 40 seeds.

Command: python -m experiments.curvature [--rounds 15] [--out FOLDER]; with --peer NAME=PYTHON … it measures other
libraries instead, NAME one of curvlinops, backpack, kfac_jax, somax, laplace_torch
"""

import functools
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxbp
from experiments import report
from experiments.bench import peers, timing
from experiments.peers.protocol import BATCH, INPUTS, PRIOR, Case, Quantity, direction
from jaxbp import MLP, Affine, curvature, influence, kronecker
from jaxbp.kronecker import Eigen, Kronecker
from jaxbp.tangent_kernel import ntk

SIZES, SAMPLES = ((784, 256, 256, 10), (784, 1024, 1024, 10)), 128
SMALL = (64, 32, 32, 10)
WIDTHS, SEEDS = (16, 64, 256, 1024), 40
GRADIENT, JVP, LINEARIZE = "gradient", "jax.jvp of jax.grad", "jax.linearize of jax.grad, kept"


def bounds(sizes: tuple[int, ...]) -> dict[str, float]:
    """Products ÷ those of a gradient, 3 − u; u is the first layer's share of the parameters."""
    shares = [i * o for i, o in itertools.pairwise(sizes)]
    total, classes = sum(shares), sizes[-1]
    u = shares[0] / total
    factors = sum(a * a for a in sizes[:-1]) / total, sum(b * b for b in sizes[1:]) / total
    cost = {
        **{"Hv": 8 - 5 * u, "Hv, kept": 6 - 4 * u, "Gv": 5 - 2 * u, "Gv, kept": 4 - 2 * u},
        **{"all vᵀHₙv, kept": 3 - 2 * u, "all vᵀGₙv, kept": 2 - u},
        **{"diag G": classes * (1 - u) + 2, "diag G, mc": 3 - u},
        "K-FAC empirical": 2 - u + sum(factors),
        "K-FAC mc": 2 - u + sum(factors),
        "K-FAC exact": 1 + classes * (1 - u) + factors[0] + classes * factors[1],
        "trace kernel": 1
        + classes * (1 - u)
        + SAMPLES * sum(sizes[:-1]) / total
        + SAMPLES * classes * sum(sizes[1:]) / total,
    }
    return {name: products / (3 - u) for name, products in cost.items()}


def programs(net: MLP, params: Any, x: jax.Array, y: jax.Array, v: Any) -> dict[str, "functools.partial[Any]"]:
    """Each quantity as a compiled program, `func`, with its arguments."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs = jax.vmap(lambda x: jaxbp.forward(net, params, x).x[-1])(x)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1))

    hvp = lambda params, x, y, v: jax.jvp(lambda p: jax.grad(loss)(p, x, y), (params,), (v,))[1]  # noqa: E731
    found = {name: compiled(program, params, x, y, v) for name, program in (quantities(net) | {JVP: hvp}).items()}
    for kind, letter in (("hessian", "H"), ("ggn", "G")):
        operator = jax.jit(functools.partial(curvature.linearized, net, kind=kind))(params, x, y)
        found[f"{letter}v, kept"] = compiled(lambda operator, v: operator(v), operator, v)
        found[f"all vᵀ{letter}ₙv, kept"] = compiled(lambda operator, v: operator.quadratic(v), operator, v)
    linear = jax.jit(lambda params, x, y: jax.linearize(lambda p: jax.grad(loss)(p, x, y), params)[1])(params, x, y)
    return found | {LINEARIZE: compiled(lambda linear, v: linear(v), linear, v)}


def quantities(net: MLP) -> dict[str, timing.Program]:
    """(params, x, y, v) ↦ each quantity."""

    def with_net(function: Any, *more: Any, direction: bool = True) -> timing.Program:
        return lambda params, x, y, v: function(net, params, x, y, *([v] if direction else []), *more)

    return {
        GRADIENT: lambda params, x, y, v: jaxbp.value_and_grad(net, params, x, y),
        "Hv": with_net(curvature.hvp),
        "Gv": with_net(curvature.ggn_vp),
        "empirical Fv": with_net(curvature.fisher_vp),
        "diag G": with_net(curvature.diag_ggn, direction=False),
        "diag G, mc": with_net(curvature.diag_ggn, "mc", jax.random.key(0), direction=False),
        "K-FAC empirical": with_net(kronecker.kfac, "empirical", direction=False),
        "K-FAC mc": with_net(kronecker.kfac, "mc", jax.random.key(0), direction=False),
        "K-FAC exact": with_net(kronecker.kfac, direction=False),
        "trace kernel": lambda params, x, y, v: ntk(net, params, x, kind="trace"),
    }


def compiled(program: timing.Program, *arguments: Any) -> "functools.partial[Any]":
    return functools.partial(jax.jit(program).lower(*arguments).compile(), *arguments)


def batch(sizes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Random inputs and labels."""
    x = jax.random.uniform(jax.random.key(2), (SAMPLES, sizes[0]))
    return x, jax.random.randint(jax.random.key(3), (SAMPLES,), 0, sizes[-1])


def measure(sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Ratios, bounds and bytes of one network, and how far Hv is from autodiff's."""
    net = MLP(sizes)
    params, v = (jaxbp.init(net, jax.random.key(seed)) for seed in (0, 1))
    made, bound = programs(net, params, *batch(sizes), v), bounds(sizes)
    seconds = dict(zip(made, timing.interleaved(list(made.values()), (), rounds), strict=True))
    pairs = zip(*(jax.tree.leaves(made[name]()) for name in ("Hv", JVP)), strict=True)
    return {
        "apart": max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs),
        "programs": {
            name: timing.ratio(seconds[name], seconds[GRADIENT])._asdict()
            | {"bound": bound.get(name), "scratch": int(program.func.memory_analysis().temp_size_in_bytes)}
            for name, program in made.items()
        },
    }


# Other libraries ----------------------------------------------------------------------------------------------------


def make_case(sizes: tuple[int, ...]) -> Case:
    params, (x, y) = jaxbp.init(MLP(sizes), jax.random.key(0)), batch(sizes)
    return Case([(np.asarray(w), np.asarray(b)) for w, b in params], np.asarray(x), np.asarray(y), hidden="tanh")


def apart(blocks: Sequence[Kronecker]) -> tuple[Eigen, ...]:
    """With the bias as a block of its own, as the other libraries have it: without Σ x in A."""
    block_diag = lambda a: jax.scipy.linalg.block_diag(a[:-1, :-1], a[-1:, -1:])  # noqa: E731
    return tuple(Kronecker(block_diag(a), b).eigh() for a, b in blocks)


def laplace(net: MLP, params: Any, x: jax.Array, y: jax.Array) -> dict[str, "functools.partial[Any]"]:
    """Laplace's approximation as compiled programs: the evidence, and the covariance of outputs at a kept posterior."""
    blocks = lambda params, x, y: apart(kronecker.kfac(net, params, x, y))  # noqa: E731
    evidence = functools.partial(influence.log_evidence, net, prior=PRIOR)
    factored = lambda params, x, y: evidence(params, x, y, blocks=blocks(params, x, y))  # noqa: E731
    covariance = functools.partial(influence.predictive_variance, net, count=len(x), prior=PRIOR)
    return {
        "log evidence": compiled(evidence, params, x, y),
        "log evidence, K-FAC": compiled(factored, params, x, y),
        "output covariance, K-FAC": compiled(covariance, params, x[:INPUTS], jax.jit(blocks)(params, x, y)),
    }


@functools.partial(jax.jit, static_argnums=0)
def evidences(net: MLP, params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """The exact evidence and those by Kronecker factors."""
    factors = kronecker.kfac(net, params, x, y)
    joined = tuple(block.eigh() for block in factors)
    blocks = {"exact": None, "apart": apart(factors), "joined": joined, "EK-FAC": kronecker.ekfac(net, params, x, y)}
    return {name: influence.log_evidence(net, params, x, y, PRIOR, found) for name, found in blocks.items()}


def arguments_of(case: Case) -> tuple[MLP, Any, jax.Array, jax.Array]:
    net = MLP((case.x.shape[1], *(len(b) for _, b in case.layers)), hidden=case.hidden)
    params = tuple(Affine(*map(jnp.asarray, layer)) for layer in case.layers)
    return net, params, jnp.asarray(case.x), jnp.asarray(case.y)


def as_peer(case: Case) -> dict[str, Quantity]:
    """jaxbp measured as the peers are; K-FAC's factors without the 1 of the bias."""
    net, params, x, y = arguments_of(case)
    v = tuple(Affine(*map(jnp.asarray, layer)) for layer in direction(case))

    def value(name: str, result: Any) -> list[Any]:
        if name == BATCH:
            return jax.tree.leaves(result[1])
        if name.startswith("K-FAC"):
            return [f for a, b in result for f in (a[:-1, :-1], b)]
        return jax.tree.leaves(result)

    programs = quantities(net)
    programs = {BATCH: programs.pop(GRADIENT)} | {name: programs[name] for name in programs if name != "trace kernel"}
    made = {name: compiled(program, params, x, y, v) for name, program in programs.items()}
    made |= laplace(net, params, x, y)
    return {name: peers.quantity(p.func, p.args, functools.partial(value, name)) for name, p in made.items()}


def show_peers(network: str, found: dict[str, dict[str, Any]]) -> None:
    rows = [
        (name, *(_cell(library, name) for library in found.values()))
        for name in found["jaxbp"]["seconds"]
        if name != BATCH
    ]
    report.table(f"{network}, tanh", ("quantity", *found), rows)


def compare(study: report.Study) -> None:
    """Measures the other libraries alone, writes curvature_peers.json."""
    commands = peers.commands(study.options.peer, "experiments.curvature", "curvature")
    found, evidence = {}, {}
    for sizes in (SMALL, *SIZES):
        network, case = "-".join(map(str, sizes)), make_case(sizes)
        found[network] = peers.measure(case, commands, as_peer(case), rounds=15, alternations=1)
        show_peers(network, found[network])
        evidence[network] = {name: float(value) for name, value in evidences(*arguments_of(case)).items()}
    rows = [(network, *(f"{value:.1f}" for value in of.values())) for network, of in evidence.items()]
    report.table("log evidence, by jaxbp", ("network", *evidence[network]), rows)
    study._replace(name="curvature_peers").save({"networks": found, "evidence": evidence})


def _cell(library: dict[str, Any], quantity: str) -> str:
    if quantity not in library["ratio"]:
        return ""
    error = library["relative_error"][quantity]
    return f"{library['ratio'][quantity]:.2f}" + (f" ({error:.0e})" if error else "")


# A wide network -----------------------------------------------------------------------------------------------------


def limit(cosine: float = 0.5) -> float:
    """κ₁ + ρ κ₀ of the arc-cosine kernels κ₀ = (π − θ)/π and κ₁ = (sin θ + (π − θ) cos θ)/π."""
    angle = math.acos(cosine)
    k0, k1 = (math.pi - angle) / math.pi, (math.sin(angle) + (math.pi - angle) * cosine) / math.pi
    return k1 + cosine * k0


def kernel(width: int, seeds: int) -> np.ndarray:
    """Θ(x, x′) of networks w ~ N(0, 2/n) with the scale of the limit: layer l's kernel times 2/n⁽ˡ⁻¹⁾."""
    net, n = MLP((2, width, 1), loss="squared_error"), (2, width)
    x = jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])  # ‖x‖² = n₀/2

    def one(key: jax.Array) -> jax.Array:
        shapes, keys = ((width, 2), (1, width)), jax.random.split(key)
        ws = [jax.random.normal(k, s, x.dtype) * (2 / s[1]) ** 0.5 for k, s in zip(keys, shapes, strict=True)]
        layers = ntk(net, tuple(Affine(w, jnp.zeros(len(w), w.dtype)) for w in ws), x, None, "trace", True, "weights")
        return sum(2 / i * layer[0, 1] for i, layer in zip(n, layers, strict=True))

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds)))


def picture(rows: dict[int, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    means, spreads = (np.array([row[name] for row in rows.values()]) for name in ("mean", "spread"))
    axes.fill_between(list(rows), means - spreads, means + spreads, alpha=0.3)
    axes.plot(list(rows), means, marker="o", label=f"mean and spread of {SEEDS} seeds")
    axes.axhline(limit(), color="black", linestyle="--", label="limit")
    axes.set(xscale="log", xlabel="width", ylabel="tangent kernel at 60°")
    axes.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, writes curvature.json and curvature.png."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of all programs in turn")
    peers.add_option(parser)
    with report.study("curvature", parser, arguments) as study:
        if study.options.peer:
            return compare(study)
        networks = {"-".join(map(str, sizes)): measure(sizes, study.options.rounds) for sizes in SIZES}
        rows = [
            (
                f"{network}: {name}",
                f"{f['value']:.2f}",
                "–".join(f"{q:.2f}" for q in f["spread"]),
                f"{f['bound']:.2f}" if f["bound"] else "",
                f"{f['scratch'] / result['programs'][GRADIENT]['scratch']:.2f}",
            )
            for network, result in networks.items()
            for name, f in result["programs"].items()
        ]
        report.table("time ÷ gradient", ("network: quantity", "ratio", "quartiles", "bound", "scratch ÷"), rows)
        kernels = {width: kernel(width, SEEDS) for width in WIDTHS}
        widths = {width: {"mean": float(k.mean()), "spread": float(k.std(ddof=1))} for width, k in kernels.items()}
        columns = [(width, f"{row['mean']:.3f}", f"{row['spread']:.3f}") for width, row in widths.items()]
        report.table(f"tangent kernel, limit {limit():.6f}", ("width", "mean", "spread"), columns)
        study.save({"networks": networks, "limit": limit(), "widths": widths}, picture(widths))


if __name__ == "__main__":
    if sys.argv[1:2] == ["as-peer"]:
        peers.as_peer(as_peer)
    else:
        main()
