"""What does privacy cost a step? An epoch of a private run ÷ an epoch of the same run without [privacy].

Both have the same network, optimiser and mean size of a batch; the private one draws Poisson batches into larger
arrays, clips, and adds noise. Their epochs, compiled as `jaxbp run` compiles them, take turns in one process. Bytes are
those that XLA's buffer assignment states: temporary and output. With --peer the clipped mean of other libraries is
taken too, each in a process of its own beside its own batch gradient, as in experiments.bench.persample; PYTHON is that
of an environment with the packages of experiments/peers/NAME.txt.

Command: python -m experiments.private_step [--rounds 11] [--peer jax_privacy=PYTHON --peer opacus=PYTHON]
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import report
from experiments.bench import persample, timing
from jaxbp.run import config as configs
from jaxbp.run import loop
from jaxbp.run import problem as problems
from jaxbp.run.compute.epoch import epoch
from jaxbp.run.compute.program import first_state
from jaxbp.run.data import Dataset
from jaxbp.run.loop import Setup

RUNS = {  # sizes, mean batch, micro-batches
    "60-1000-10 / 600": ((60, 1000, 10), 600, 8),
    "60-1000-10 / 4800": ((60, 1000, 10), 4800, 8),
    "784-128-10 / 2400": ((784, 128, 10), 2400, 8),
    "784-1000-10 / 600": ((784, 1000, 10), 600, 8),
}
STEPS = 10
PRIVACY = {"max_norm": 1.0, "noise_multiplier": 2.0, "seed": 0}


def setup(sizes: tuple[int, ...], batch_size: int, micro_batches: int, private: bool) -> Setup:
    """A run on random data, of STEPS steps an epoch."""
    rng, samples = np.random.default_rng(0), STEPS * batch_size
    parts = (rng.normal(size=(samples, sizes[0])).astype(np.float32), rng.integers(0, 10, samples, np.int32))
    dataset = Dataset("random", *parts, *(part[:10] for part in parts), tuple("0123456789"), None)
    tables = {
        "data": {"standardize": "none"},
        "model": {"sizes": sizes},
        "optimizer": {"learning_rate": 0.01, "arguments": {"momentum": 0.9}},
        "train": {"batch_size": batch_size, "micro_batches": micro_batches},
        "privacy": PRIVACY if private else {},
    }
    return loop.assemble(problems.pose(configs.validate(tables, "experiments.private_step"), dataset=dataset))


def measure(sizes: tuple[int, ...], batch_size: int, micro_batches: int, rounds: int) -> dict[str, Any]:
    """The ratio of the seconds of an epoch, and the bytes of both."""
    made, calls = {}, []
    for private in (True, False):
        problem, spec, _ = setup(sizes, batch_size, micro_batches, private)
        x, y = problem.on_device("train")
        arguments = (first_state(problem, spec), x, y, jax.random.key(0), 0)
        compiled = jax.jit(epoch, static_argnums=0).lower(spec, *arguments).compile()
        made[private] = timing.bytes_of(compiled)
        calls.append(functools.partial(compiled, *arguments))
    ratio = timing.ratio(*timing.interleaved(calls, (), rounds))
    return {
        "ratio": ratio.value,
        "quartiles": ratio.spread,
        "seconds_a_step": ratio.seconds / STEPS,
        "bytes": made[True],
        "bytes_without": made[False],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, writes private_step.json."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="of both epochs in turn")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    with report.study("private_step", parser, arguments) as study:
        found = {name: measure(*run, study.options.rounds) for name, run in RUNS.items()}
        rows = [
            (
                *(name, f"{1e3 * row['seconds_a_step']:.1f}", f"{row['ratio']:.2f}"),
                *("{:.2f}–{:.2f}".format(*row["quartiles"]), persample.megabytes(row["bytes"])),
                persample.megabytes(row["bytes_without"]),
            )
            for name, row in found.items()
        ]
        columns = ("network / mean batch", "ms", "÷ without [privacy]", "quartiles", "MB", "MB without")
        report.table("a private step", columns, rows)
        peers = {}
        if study.options.peer:
            commands = persample.commands(study.options.peer)
            (name, (sizes, batch, _)), *_ = RUNS.items()
            peers = persample.measure_peers(persample.make_case(sizes, batch), commands, 7, 3)
            persample.show_peers(name, peers)
        study.save({"runs": found, "peers": peers})


if __name__ == "__main__":
    main()
