"""What do layers beside the MLP cost? Gradients and per-sample quantities, beside autodiff of the same network.

Each network is one of `jaxbp.models` or a chain of layers; autodiff differentiates its forward pass. Six programs are
compiled and called in turn in one process: jax.value_and_grad, jaxbp.value_and_grad, the same with √L checkpoints, all
per-sample norms, the clipped mean, and the norms by vmap(jax.grad), which is left out for the largest network. Forward
and backward pass are in each.
A ratio is the median over the rounds of the ratio within a round. Scratch is XLA's temporary bytes, FLOP are its count.

Other libraries, on LeNet-5 and the smaller GPT: see `experiments.bench.peers`. Bytes are there those that a call
allocates at once.

Command: python -m experiments.layers [--rounds 15] [--only NAME] [--out FOLDER]; with --peer NAME=PYTHON … it measures
other libraries instead, NAME one of opacus, backpack
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp
from experiments import report
from experiments.bench import peers, timing
from experiments.bench import persample as bench_persample
from experiments.peers.protocol import Case, Quantity
from jaxbp import Network, losses, memory, models, persample
from jaxbp.layers import (
    Chain,
    Conv2d,
    Dense,
    Elementwise,
    Flatten,
    LayerNorm,
    MaxPool,
    Patches,
    PositionEmbedding,
    Residual,
    SelfAttention,
)

AUTODIFF, OURS, CHECKPOINTS, NORMS, CLIPPED, VMAP = (
    *("jax.value_and_grad", "jaxbp.value_and_grad", "jaxbp.memory.value_and_grad", "norms", "clipped mean"),
    "norms by vmap(jax.grad)",
)


def convolutions() -> Network:
    """Four convolutions of 32 and 64 channels."""
    relu = Elementwise("relu")
    layer = Chain(
        *(Conv2d(32, 3, padding="same"), relu, Conv2d(32, 3, padding="same"), relu, MaxPool(2)),
        *(Conv2d(64, 3, padding="same"), relu, Conv2d(64, 3, padding="same"), relu, MaxPool(2)),
        *(Flatten(), Dense(10)),
    )
    return Network(layer, "softmax_cross_entropy", (32, 32, 3))


def patches() -> Network:
    """A small encoder of images: patches of 4 × 4, two blocks of full attention."""
    block = (
        Residual(Chain(LayerNorm(), SelfAttention(4))),
        Residual(Chain(LayerNorm(), Dense(256), Elementwise("gelu"), Dense(64))),
    )
    layer = Chain(Patches(4), Dense(64), PositionEmbedding(), *block * 2, LayerNorm(), Flatten(), Dense(10))
    return Network(layer, "softmax_cross_entropy", (28, 28, 1))


LENET, GPT = "LeNet-5 / 128", "GPT 4 × 128, T 64 / 32"
NETWORKS = {  # network, batch
    LENET: (lambda: models.lenet5((28, 28, 1), 10), 128),
    "4 convolutions / 32": (convolutions, 32),
    "patches / 64": (patches, 64),
    GPT: (lambda: models.gpt((64,), 65), 32),
    "GPT 6 × 384, T 256 / 8": (lambda: models.gpt((256,), 65, layers=6, heads=6, width=384), 8),
}
FORMED = 1_000_000  # parameters, up to which the norms are also taken by vmap(jax.grad)


def batch_of(net: Network, samples: int) -> tuple[Any, jax.Array, jax.Array]:
    """Parameters, random inputs or tokens, random labels."""
    key_x, key_y = jax.random.split(jax.random.key(1))
    params = jax.jit(jaxbp.init, static_argnums=0)(net, jax.random.key(0))
    y = jax.random.randint(key_y, (samples, *net.outputs[:-1]), 0, net.outputs[-1])
    if len(net.shape) == 1:
        return params, jax.random.randint(key_x, (samples, *net.shape), 0, net.outputs[-1]), y
    return params, jax.random.normal(key_x, (samples, *net.shape), jnp.float32), y


def programs_of(net: Network, small: bool) -> dict[str, timing.Program]:
    """(params, x, y) ↦ each of what is compared."""

    def sample(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses.get(net.loss).ell(net.layer.forward(params, x)[0], y)

    def mean(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(sample, (None, 0, 0))(params, x, y))

    def norms(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        g = jax.vmap(jax.grad(sample), (None, 0, 0))(params, x, y)
        return sum(jnp.sum(a.reshape(len(a), -1) ** 2, axis=1) for a in jax.tree.leaves(g))

    factors = lambda *arguments: jaxbp.factors(net, *arguments)[1]  # noqa: E731
    schedule = memory.segments(len(net.parameters))
    programs = {
        AUTODIFF: jax.value_and_grad(mean),
        OURS: lambda *arguments: jaxbp.value_and_grad(net, *arguments),
        CHECKPOINTS: lambda *arguments: memory.value_and_grad(net, *arguments, schedule),
        NORMS: lambda *arguments: persample.squared_norms(factors(*arguments)),
        CLIPPED: lambda *arguments: persample.clipped_mean(factors(*arguments), 1.0).mean,
    }
    return programs | ({VMAP: norms} if small else {})


def measure(net: Network, samples: int, rounds: int) -> dict[str, Any]:
    """Ratios, bytes and FLOP of every program, and how far the two gradients are apart."""
    arguments = batch_of(net, samples)
    count = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
    programs = programs_of(net, count <= FORMED)
    made = {name: timing.compiled(program, arguments)[0] for name, program in programs.items()}
    seconds = dict(zip(made, timing.interleaved(list(made.values()), arguments, rounds), strict=True))
    theirs, ours = (jax.tree.leaves(made[name](*arguments)[1]) for name in (AUTODIFF, OURS))
    apart = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in zip(theirs, ours, strict=True))
    found = {
        name: {
            "ratio": timing.ratio(seconds[name], seconds[AUTODIFF])._asdict(),
            "scratch": int(program.memory_analysis().temp_size_in_bytes),
            "flop": float(program.cost_analysis()["flops"]),
        }
        for name, program in made.items()
    }
    return {"parameters": count, "apart": apart, "programs": found}


# Other libraries -----------------------------------------------------------------------------------------------------

FLATTENED = (5, 5, 16)  # height, width, channels before LeNet-5's dense layers


def channels_first(leaves: Sequence[Any]) -> list[np.ndarray]:
    """w, b, … as PyTorch has them: it flattens channels before height and width."""
    size = math.prod(FLATTENED)
    return [
        np.moveaxis(np.reshape(a, (*a.shape[:-1], *FLATTENED)), -1, -3).reshape(a.shape)
        if a.ndim and a.shape[-1] == size
        else np.asarray(a)
        for a in leaves
    ]


def make_case(network: str) -> Case:
    """LENET or GPT as it is measured above; C is the median norm."""
    made, samples = NETWORKS[network]
    net = made()
    params, x, y = batch_of(net, samples)
    norms = jax.jit(lambda params, x, y: persample.grand(jaxbp.factors(net, params, x, y)[1]))(params, x, y)
    arrays = channels_first(jax.tree.leaves(params))
    layers = list(zip(arrays[::2], arrays[1::2], strict=True))
    x = np.moveaxis(np.asarray(x), -1, 1) if network == LENET else np.asarray(x)
    hidden = "tanh" if network == LENET else "gelu_tanh"
    return Case(layers, x, np.asarray(y), float(jnp.median(norms)), hidden)


def as_peer(case: Case) -> dict[str, Quantity]:
    """jaxbp measured as the peers are; the parameters and the batch are those that `make_case` has written."""
    made, samples = NETWORKS[GPT if case.tokens else LENET]
    net = made()
    arguments = batch_of(net, samples)
    arguments = *arguments, arguments[0]
    programs = bench_persample.quantities_of(net, case.max_norm)
    compiled = bench_persample.compiled({n: programs[n] for n in programs if n in bench_persample.COMPARED}, arguments)
    value = lambda name, result: channels_first(bench_persample.values(name, result))  # noqa: E731
    return {name: peers.quantity(p, arguments, functools.partial(value, name)) for name, p in compiled.items()}


def compare(study: report.Study) -> None:
    """Measures the other libraries alone, writes layers_peers.json."""
    commands, found = peers.commands(study.options.peer, "experiments.layers", "persample"), {}
    for network in (LENET, GPT):
        case = make_case(network)
        found[network] = peers.measure(case, commands, as_peer(case), rounds=15, alternations=1)
        show_peers(network, found[network])
    study._replace(name="layers_peers").save(found)


def show_peers(network: str, found: dict[str, dict[str, Any]]) -> None:
    rows = [
        (
            *(name, library["versions"], f"{1e3 * library['seconds'][name]:.1f}", f"{ratio:.2f}"),
            *(f"{library['bytes'][name] / 1e6:.1f}", f"{library['relative_error'][name]:.0e}"),
        )
        for library in found.values()
        for name, ratio in library["ratio"].items()
    ]
    report.table(network, ("quantity", "library", "ms", "÷ own gradient", "MB", "relative difference"), sorted(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes layers.json."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of all programs in turn")
    parser.add_argument("--only", choices=NETWORKS, help="one of the networks")
    peers.add_option(parser)
    with report.study("layers", parser, arguments) as study:
        if study.options.peer:
            return compare(study)
        chosen = {study.options.only: NETWORKS[study.options.only]} if study.options.only else NETWORKS
        results = {name: measure(made(), batch, study.options.rounds) for name, (made, batch) in chosen.items()}
        rows = [
            (
                *(f"{name}: {program}", f"{1e3 * f['ratio']['seconds']:.1f}", f"{f['ratio']['value']:.2f}"),
                *(f"{low:.2f}–{high:.2f}" for low, high in [f["ratio"]["spread"]]),
                *(f"{f['flop'] / result['programs'][AUTODIFF]['flop']:.2f}", f"{f['scratch'] / 1e6:.1f}"),
            )
            for name, result in results.items()
            for program, f in result["programs"].items()
        ]
        columns = ("network / batch", "ms", "÷ jax.value_and_grad", "quartiles", "FLOP ÷", "scratch MB")
        report.table("layers", columns, rows)
        study.save({"networks": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["as-peer"]:
        peers.as_peer(as_peer)
    else:
        main()
