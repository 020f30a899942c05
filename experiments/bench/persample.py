"""Time and memory of the per-sample quantities: against one batch gradient, vmap(jax.grad) and other libraries.

Every program here is compiled and starts from the parameters, a batch and its labels: forward and backward are in it.
They are called in turn, in rounds that each begin with another one, and a ratio is the median over the rounds of the
ratio within a round. The fast programs are timed in rounds of their own; vmap(jax.grad), which writes N × parameters
numbers, in rounds of two with jaxbp's program of the same quantity. Scratch is XLA's temporary bytes.

A peer runs in a process and an environment of its own, on the same arrays; see `experiments.bench.peers`.

GraNd is ‖gₙ‖ of all 60,000 training samples of MNIST, which must have been imported or downloaded.

`python -m experiments.bench --only persample` measures the quantities that have a target; this command measures all of
them, and GraNd:
python -m experiments.bench.persample [--rounds 41] [--peer NAME=PYTHON …], NAME one of opacus, backpack,
jax_privacy, optax: PYTHON has experiments/peers/NAME.txt installed.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxbp
from experiments import report
from experiments.bench import peers as libraries
from experiments.bench import timing
from experiments.bench.networks import autodiff_loss
from experiments.bench.peers import check, relative_error
from experiments.bench.rows import Row, Settings, Target
from experiments.bench.timing import interleaved
from experiments.peers import protocol
from jaxbp import Factors, Params, persample
from jaxbp.run import data
from jaxbp.run.config import DataConfig
from jaxbp.run.errors import UserError

NETWORKS = {  # sizes, batch
    "784-256-256-10 / 128": ((784, 256, 256, 10), 128),
    "784-1024-1024-10 / 128": ((784, 1024, 1024, 10), 128),
    "5120-2560-1280 / 32": ((5120, 2560, 1280), 32),
}
QUANTITIES = ("squared_norms", "clipped_mean", "gram", "second_moment", "variance", "dot", "noise_scale", "gradients")
LESS_SCRATCH = 100  # of the clipped mean, beside vmap(jax.grad)
TARGETS = {"squared_norms": (0.7, 7), "clipped_mean": (1.1, 50), "gram": (1.4, 50), "second_moment": (2.0, 50)}
GRAND_NETWORK, GRAND_CHUNK = (784, 256, 256, 10), 1000
TOLERANCE = 1e-4  # float32 in another order of summation; Opacus's 1e-6 beside a norm is below it
BATCH = protocol.BATCH
COMPARED = {BATCH, "squared_norms", "clipped_mean", "second_moment", "variance", "gradients"}  # with other libraries

Program = Callable[..., Any]


# The programs ---------------------------------------------------------------------------------------------------------


def make_case(sizes: tuple[int, ...], batch: int) -> protocol.Case:
    """Random inputs and labels, He's parameters; C is the median norm, so that half of the samples are clipped."""
    net = jaxbp.MLP(sizes)
    params = jax.jit(jaxbp.init, static_argnums=0)(net, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, sizes[0]), jnp.float32)
    y = jax.random.randint(jax.random.key(2), (batch,), 0, sizes[-1])
    norms = jax.jit(lambda params: persample.grand(jaxbp.factors(net, params, x, y)[1]))(params)
    return protocol.Case(
        [(np.asarray(w), np.asarray(b)) for w, b in params], *map(np.asarray, (x, y)), float(jnp.median(norms))
    )


def arguments_of(case: protocol.Case) -> tuple[Any, ...]:
    """(params, x, y, v): v is the direction of `dot`, other than the parameters, which would share their products."""
    params = tuple(jaxbp.Affine(jnp.asarray(w), jnp.asarray(b)) for w, b in case.layers)
    direction = jax.tree.map(lambda a: jnp.flip(a, axis=0) + 1, params)
    return params, jnp.asarray(case.x), jnp.asarray(case.y), direction


def sizes_of(case: protocol.Case) -> tuple[int, ...]:
    return (case.x.shape[1], *(len(b) for _, b in case.layers))


def hand_written(case: protocol.Case) -> dict[str, Program]:
    """Each quantity from the factors."""
    return quantities_of(jaxbp.MLP(sizes_of(case)), case.max_norm)


def quantities_of(net: jaxbp.MLP | jaxbp.Network, max_norm: float) -> dict[str, Program]:
    of: dict[str, Callable[[Factors, Params], Any]] = {
        "squared_norms": lambda f, v: persample.squared_norms(f),
        "clipped_mean": lambda f, v: persample.clipped_mean(f, max_norm),
        "gram": lambda f, v: persample.gram(f),
        "second_moment": lambda f, v: persample.second_moment(f),
        "variance": lambda f, v: persample.variance(f),
        "dot": persample.dot,
        "noise_scale": lambda f, v: persample.noise_scale(f),
        "gradients": lambda f, v: persample.gradients(f),
    }
    batch = {BATCH: lambda params, x, y, v: jaxbp.value_and_grad(net, params, x, y)}
    return batch | {name: from_factors(net, quantity) for name, quantity in of.items()}


def from_factors(net: jaxbp.MLP | jaxbp.Network, quantity: Callable[[Factors, Params], Any]) -> Program:
    return lambda params, x, y, v: quantity(jaxbp.factors(net, params, x, y)[1], v)


def vmapped(case: protocol.Case) -> dict[str, Program]:
    """Each quantity as one computes it from the gradients g of vmap(jax.grad), leaves (N, …)."""
    samples, one = len(case.x), jax.grad(autodiff_loss("relu"))
    add = lambda tree: sum(jax.tree.leaves(tree))  # noqa: E731
    rows = lambda g: jax.tree.map(lambda a: a.reshape(samples, -1), g)  # noqa: E731
    norms = lambda g: add(jax.tree.map(lambda a: jnp.sum(a**2, axis=1), rows(g)))  # noqa: E731

    def clipped_mean(g: Params, v: Params) -> Any:
        factor = jnp.minimum(1, case.max_norm / jnp.sqrt(norms(g))) / samples
        return jax.tree.map(lambda a: jnp.tensordot(factor, a, axes=1), g)

    def noise_scale(g: Params, v: Params) -> Any:
        big = add(jax.tree.map(lambda a: jnp.sum(jnp.mean(a, axis=0) ** 2), g))
        return persample.noise_scale_from_norms(jnp.mean(norms(g)), big, 1, samples)

    of: dict[str, Callable[[Params, Params], Any]] = {
        "squared_norms": lambda g, v: norms(g),
        "clipped_mean": clipped_mean,
        "gram": lambda g, v: add(jax.tree.map(lambda a: a @ a.T, rows(g))),
        "second_moment": lambda g, v: jax.tree.map(lambda a: jnp.mean(a**2, axis=0), g),
        "variance": lambda g, v: jax.tree.map(lambda a: jnp.var(a, axis=0, ddof=1), g),
        "dot": lambda g, v: add(jax.tree.map(lambda a, b: a @ b.ravel(), rows(g), v)),
        "noise_scale": noise_scale,
        "gradients": lambda g, v: g,
    }
    grads = lambda params, x, y: jax.vmap(lambda x, y: one(params, x[None], y[None]))(x, y)  # noqa: E731
    return {name: from_gradients(grads, quantity) for name, quantity in of.items()}


def from_gradients(grads: Program, quantity: Callable[[Params, Params], Any]) -> Program:
    return lambda params, x, y, v: quantity(grads(params, x, y), v)


def compiled(programs: dict[str, Program], arguments: tuple[Any, ...]) -> dict[str, Any]:
    return {name: jax.jit(program).lower(*arguments).compile() for name, program in programs.items()}


def scratch(program: Any) -> int:
    """Temporary bytes of a compiled program."""
    return int(program.memory_analysis().temp_size_in_bytes)


# Measurements ---------------------------------------------------------------------------------------------------------


def values(name: str, result: Any) -> list[Any]:
    """The arrays that are compared: of the gradients, those of four samples; of the noise scale, |G|² and tr Σ, of
    which |G|² alone, a small difference on random data, has no digits to compare, and nor has their ratio.
    """
    result = result[:2] if name == "noise_scale" else result
    result = result[1] if name == BATCH else result.mean if isinstance(result, persample.Clipped) else result
    return [a[:4] if name == "gradients" else a for a in jax.tree.leaves(result)]


def cancelled(expected: Iterable[Any], norms: Any, direction: Params) -> float:
    """‖(⟨gₙ, v⟩)ₙ‖ / (‖(‖gₙ‖)ₙ‖ ‖v‖): the error of a product is relative to the sizes of its factors."""
    products = math.sqrt(sum(np.sum(np.asarray(a, float) ** 2) for a in expected))
    length = math.sqrt(sum(np.sum(np.asarray(v, float) ** 2) for v in jax.tree.leaves(direction)))
    return products / (math.sqrt(float(np.sum(np.asarray(norms, float)))) * length)


def measure(
    case: protocol.Case, rounds: int, slow_rounds: int, quantities: Iterable[str] = QUANTITIES
) -> dict[str, dict[str, Any]]:
    """jaxbp's quantities beside its batch gradient, and beside vmap(jax.grad); the quartiles of both ratios."""
    arguments, wanted = arguments_of(case), {BATCH, "squared_norms", *quantities}
    ours, theirs = (
        compiled({name: program for name, program in programs(case).items() if name in wanted}, arguments)
        for programs in (hand_written, vmapped)
    )
    fast = {name: program for name, program in ours.items() if name != "gradients"}  # it fills the caches of the next
    seconds = dict(zip(fast, interleaved(list(fast.values()), arguments, rounds), strict=True))
    found: dict[str, dict[str, Any]] = {BATCH: {"seconds": statistics.median(seconds[BATCH])}}
    for name, slow in theirs.items():
        expected = values(name, slow(*arguments))
        error = relative_error(values(name, ours[name](*arguments)), expected)
        if name == "dot":
            error *= cancelled(expected, ours["squared_norms"](*arguments), arguments[-1])
        batch, a, b = interleaved((ours[BATCH], ours[name], slow), arguments, slow_rounds)
        alone = timing.ratio(*((seconds[name], seconds[BATCH]) if name in seconds else (a, batch)))
        speedup = timing.ratio(b, a)
        found[name] = {
            "seconds": alone.seconds,
            "ratio": alone.value,
            "ratio_quartiles": alone.spread,
            "vmap_seconds": speedup.seconds,
            "vmap_ratio": timing.ratio(b, batch).value,
            "speedup": speedup.value,
            "speedup_quartiles": speedup.spread,
            "scratch_bytes": scratch(ours[name]),
            "vmap_scratch_bytes": scratch(slow),
            "relative_error": check(name, error, TOLERANCE),
        }
    return found | {BATCH: found[BATCH] | {"scratch_bytes": scratch(ours[BATCH])}}


def measure_peers(
    case: protocol.Case, peers: dict[str, list[str]], rounds: int, alternations: int
) -> dict[str, dict[str, Any]]:
    """Each library's quantities, see `experiments.bench.peers`."""
    return libraries.measure(case, peers, as_peer(case), rounds, alternations)


def as_peer(case: protocol.Case) -> dict[str, protocol.Quantity]:
    """jaxbp measured as the peers are."""
    arguments = arguments_of(case)
    programs = {name: program for name, program in hand_written(case).items() if name in COMPARED}
    return {
        name: libraries.quantity(program, arguments, functools.partial(values, name))
        for name, program in compiled(programs, arguments).items()
    }


def commands(given: Sequence[str]) -> dict[str, list[str]]:
    """Library ↦ the command that measures its per-sample quantities, from NAME=PYTHON."""
    return libraries.commands(given, "experiments.bench.persample", "persample")


def measure_grand() -> dict[str, float] | None:
    """Seconds of ‖gₙ‖ over MNIST's training set, with the compilation and without; None, said in a line, without it."""
    try:
        dataset = data.load(DataConfig("mnist"))
    except UserError as error:
        print(f"GraNd is left out: {str(error).splitlines()[0]}")
        return None
    x = jnp.asarray(data.Scaling.fit(dataset.x_train, "global").apply(dataset.x_train, np.float32))
    y, net = jnp.asarray(dataset.y_train), jaxbp.MLP(GRAND_NETWORK)
    params = jaxbp.init(net, jax.random.key(0))
    quantity = lambda losses, f: persample.grand(f)  # noqa: E731
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(persample.map_chunks(quantity, net, params, x, y, GRAND_CHUNK))
        seconds.append(time.perf_counter() - start)
    return {"samples": len(x), "chunk": GRAND_CHUNK, "first": seconds[0], "compiled": statistics.median(seconds[1:])}


# Rows of `python -m experiments.bench`


def rows(settings: Settings) -> list[Row]:
    """The quantities with a target, on every network (the smallest, if quick); beside the peers that are given."""
    fast, slow = (settings.rounds(seconds) for seconds in (0.05, 1))
    made = []
    for name, shape in list(NETWORKS.items())[: 1 if settings.quick else None]:
        case = make_case(*shape)
        made += _own_rows(name, measure(case, fast, slow, TARGETS))
        peers = [
            f"{peer}={python}"
            for peer, python in settings.peers.items()
            if (libraries.SCRIPTS / f"{peer}_persample.py").exists()
        ]
        if peers:
            made += _peer_rows(name, measure_peers(case, commands(peers), 3 if settings.quick else 6, 2))
    return sorted(made, key=lambda row: "faster than " in row.what and "vmap" not in row.what)


def _own_rows(network: str, found: dict[str, dict[str, Any]]) -> list[Row]:
    made = []
    for name, (most, least) in TARGETS.items():
        row, label = found[name], f"{name}, {network}"
        spread, faster = row["ratio_quartiles"], row["speedup_quartiles"]
        made.append(Row("÷ one batch gradient", label, row["ratio"], row["seconds"], "s", Target("≤", most), spread))
        what, target = "× faster than vmap(jax.grad)", Target("≥", least)
        made.append(Row(what, label, row["speedup"], row["seconds"], "s", target, faster))
    ours, theirs = (found["clipped_mean"][key] for key in ("scratch_bytes", "vmap_scratch_bytes"))
    what, target = "× less scratch than vmap(jax.grad)", Target("≥", LESS_SCRATCH)
    return [*made, Row(what, f"clipped_mean, {network}", theirs / ours, ours, "B", target)]


def _peer_rows(network: str, found: dict[str, dict[str, Any]]) -> list[Row]:
    ours = found["jaxbp"]["seconds"]
    return [
        Row(
            f"× faster than {peer['versions']}",
            f"{quantity}, {network}",
            faster.value,
            ours[libraries.plain(quantity)],
            "s",
            None,
            faster.spread,
        )
        for name, peer in found.items()
        if name != "jaxbp"
        for quantity, faster in peer["faster"].items()
    ]


# What is shown --------------------------------------------------------------------------------------------------------


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def times_less(found: dict[str, float]) -> str:
    less = found["vmap_scratch_bytes"] / found["scratch_bytes"]
    return f"{less:,.0f}" if less >= 10 else f"{less:.1f}"


def verdict(name: str, found: dict[str, float]) -> str:
    """The targets, ÷ batch gradient and × faster than vmap(jax.grad), and whether they are met."""
    if name not in TARGETS:
        return ""
    most, least = TARGETS[name]
    missed = [text for text, bad in (("time", found["ratio"] > most), ("speed-up", found["speedup"] < least)) if bad]
    return f"≤ {most}, ≥ {least} ×: " + (f"{' and '.join(missed)} missed" if missed else "met")


def show(name: str, found: dict[str, dict[str, float]]) -> None:
    batch = found[BATCH]
    title = f"{name}: batch gradient {1e3 * batch['seconds']:.2f} ms, scratch {megabytes(batch['scratch_bytes'])} MB"
    columns = ("quantity", "ms", "÷ batch", "vmap ms", "× faster", "scratch MB", "vmap MB", "× less", "target")
    rows = [
        (
            quantity,
            f"{1e3 * row['seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{1e3 * row['vmap_seconds']:,.0f}",
            f"{row['speedup']:.1f}",
            megabytes(row["scratch_bytes"]),
            megabytes(row["vmap_scratch_bytes"]),
            times_less(row) if quantity != "gradients" else "",
            verdict(quantity, row),
        )
        for quantity, row in found.items()
        if quantity != BATCH
    ]
    report.table(title, columns, rows)


def show_peers(name: str, peers: dict[str, dict[str, Any]]) -> None:
    rows = [
        (
            quantity,
            peer["versions"],
            f"{1e3 * seconds:.2f}",
            f"{peer['ratio'][quantity]:.2f}",
            f"{peer['relative_error'][quantity]:.0e}",
        )
        for quantity, peer, seconds in sorted(
            ((quantity, peer, s) for peer in peers.values() for quantity, s in peer["seconds"].items()),
            key=lambda row: [BATCH, *QUANTITIES].index(libraries.plain(row[0])),
        )
    ]
    report.table(name, ("quantity", "library", "ms", "÷ own batch gradient", "relative error"), rows)


COLORS = {
    "jaxbp": "#0b6e4f",
    "vmap(jax.grad)": "#b0b0b0",
    "backpack": "#4477aa",
    "opacus": "#ee6677",
    "opacus (fast gradient clipping)": "#f4b6bd",
    "jax_privacy": "#ccbb44",
    "jax_privacy (whole batch)": "#e6dfa6",
    "optax": "#aa3377",
}
LABELS = {
    "backpack": "BackPACK",
    "opacus": "Opacus (ghost clipping)",
    "opacus (fast gradient clipping)": "Opacus (fast gradient clipping)",
    "jax_privacy": "jax-privacy (microbatches of 1)",
    "jax_privacy (whole batch)": "jax-privacy (whole batch)",
}


def bars_of(network: dict[str, Any], quantity: str) -> dict[str, float]:
    """Library ↦ the quantity's time ÷ that library's batch gradient."""
    ours = network["quantities"][quantity]
    bars = {"jaxbp": ours["ratio"], "vmap(jax.grad)": ours["vmap_ratio"]}
    for name, peer in network["peers"].items():
        for key, value in peer["ratio"].items():
            if libraries.plain(key) == quantity and name != "jaxbp":
                bars[name + key.removeprefix(quantity)] = value
    return {name: bars[name] for name in COLORS if name in bars}


def draw(networks: dict[str, dict[str, Any]]) -> Figure:
    """One panel a network, one group a quantity, one bar a library."""
    figure = Figure(figsize=(13.3, 3.1 * len(networks) + 1.1), layout="constrained")
    axes = figure.subplots(len(networks), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (name, network) in zip(axes, networks.items(), strict=True):
        for group, quantity in enumerate(QUANTITIES):
            bars = bars_of(network, quantity)
            for k, (library, value) in enumerate(bars.items()):
                at = group + (k - (len(bars) - 1) / 2) * 0.13
                ax.bar(at, value, 0.13, color=COLORS[library])
                ax.text(
                    at,
                    value * 1.08,
                    f"{value:.2g}" if value < 100 else f"{value:.0f}",
                    ha="center",
                    fontsize=7,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2},
                )
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_yscale("log")
        ax.set_ylim(0.3, 3000)
        ax.set_ylabel("time ÷ own batch gradient")
        ax.set_title(
            f"{name} samples, {1e3 * network['quantities'][BATCH]['seconds']:.2g} ms a batch gradient of jaxbp",
            fontsize=10,
            loc="left",
        )
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(QUANTITIES)), [name.replace("_", " ") for name in QUANTITIES])
    shown = [name for name in COLORS if any(name in bars_of(n, q) for n in networks.values() for q in QUANTITIES)]
    handles = [axes[0].bar(0, 0, color=COLORS[name]) for name in shown]
    names = [LABELS.get(name, name) for name in shown]
    figure.suptitle("Per-sample quantities, forward and backward included: 1 is one batch gradient of the same library")
    figure.legend(handles, names, loc="outside lower center", ncols=math.ceil(len(names) / 2), frameon=False)
    return figure


def options() -> argparse.Namespace:
    parser = report.parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=41, help="rounds of the fast programs")
    parser.add_argument("--slow-rounds", type=int, default=11, help="rounds with vmap(jax.grad)")
    libraries.add_option(parser)
    parser.add_argument("--peer-rounds", type=int, default=7, help="rounds of a peer's process")
    parser.add_argument("--alternations", type=int, default=3, help="processes of each peer")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the tables and writes bench_persample.json and .png."""
    if sys.argv[1:2] == ["as-peer"]:
        libraries.as_peer(as_peer)
        return
    chosen = options()
    peers = commands(chosen.peer)
    grand = measure_grand()
    if grand:
        print(f"GraNd of {grand['samples']:,} samples: {grand['first']:.2f} s, compiled {grand['compiled']:.2f} s")
    rounds = {key: getattr(chosen, key) for key in ("rounds", "slow_rounds", "peer_rounds", "alternations")}
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **rounds, "grand": grand}
    networks: dict[str, dict[str, Any]] = {}
    for name, shape in NETWORKS.items():
        if chosen.only not in name:
            continue
        case = make_case(*shape)
        networks[name] = {"quantities": measure(case, chosen.rounds, chosen.slow_rounds), "peers": {}}
        show(name, networks[name]["quantities"])
        if chosen.peer:
            networks[name]["peers"] = measure_peers(case, peers, chosen.peer_rounds, chosen.alternations)
            show_peers(name, networks[name]["peers"])
        report.save(chosen.out, "bench_persample", results | {"networks": networks}, draw(networks))


if __name__ == "__main__":
    main()
