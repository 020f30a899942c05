"""Other libraries beside jaxbp: each in a process and an environment of its own, on the same arrays.

The processes alternate with one of jaxbp. What a peer computes is compared with jaxbp's numbers, after its scaling
(stated in its script) is undone.
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench import timing
from experiments.peers import protocol
from experiments.peers.protocol import BATCH, Case, Quantity, write
from jaxbp.run.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "experiments" / "peers"
# PyTorch's float32 norm of a gradient of 2560 × 5120 entries is 9e-4 off the float64 norm of the same entries (4e-5 at
# 1024 × 784): a peer that clips by it, Opacus's fast gradient clipping, carries that rounding.
TOLERANCE = 1e-3


def as_peer(quantities: Callable[[Case], dict[str, Quantity]]) -> None:
    """jaxbp measured as the peers are: what `python -m MODULE as-peer` does. Bytes are XLA's, temporary and output."""
    protocol.main(f"jaxbp, jax {jax.__version__}", quantities, lambda run: timing.bytes_of(run.args[0]))


def quantity(program: Any, arguments: Sequence[Any], value: Callable[[Any], Sequence[Any]]) -> Quantity:
    """Of a compiled program of jaxbp."""
    return Quantity(functools.partial(_done, program, *arguments), value)


def _done(program: Any, *arguments: Any) -> Any:
    return jax.block_until_ready(program(*arguments))


def add_option(parser: argparse.ArgumentParser) -> None:
    """--peer NAME=PYTHON, where PYTHON has experiments/peers/NAME.txt installed."""
    what = "measure this library; PYTHON has experiments/peers/NAME.txt installed"
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=what)


def commands(given: Sequence[str], module: str, kind: str) -> dict[str, list[str]]:
    """Library ↦ the command that measures it, from NAME=PYTHON; jaxbp is the first, as `python -m MODULE as-peer`.

    Raises:
      UserError: there is no script for a library.
    """
    found = {"jaxbp": [sys.executable, "-m", module, "as-peer"]}
    for peer in given:
        name, _, python = peer.partition("=")
        script = SCRIPTS / f"{name}_{kind}.py"
        if not script.exists() or not python:
            allowed = ", ".join(sorted(path.name.removesuffix(f"_{kind}.py") for path in SCRIPTS.glob(f"*_{kind}.py")))
            raise UserError(f"--peer: got {peer}, it should be NAME=PYTHON, NAME one of {allowed}")
        found[name] = [python, str(script)]
    return found


def measure(
    case: Case,
    peers: dict[str, list[str]],
    ours: Mapping[str, Quantity],
    rounds: int,
    alternations: int,
) -> dict[str, dict[str, Any]]:
    """Each library's quantities divided by its own batch gradient, and how far they are from those of jaxbp.

    Args:
      peers: what `commands` gives.
      ours: what jaxbp is measured with; a peer's variant of one is named "quantity (variant)".
      rounds, alternations: of a process, processes of each library.
    """
    found: dict[str, dict[str, Any]] = {name: {"seconds": {}, "relative_error": {}} for name in peers}
    with tempfile.TemporaryDirectory() as folder:
        arrays, computed = Path(folder) / "arrays.npz", Path(folder) / "values.npz"
        write(arrays, case)
        for name in [*peers] * alternations:
            told = run([*peers[name], str(arrays), str(rounds), str(computed)])
            found[name] |= {key: told[key] for key in ("versions", "bytes") if key in told}
            for quantity, seconds in told["seconds"].items():
                found[name]["seconds"].setdefault(quantity, []).extend(seconds)
                with np.load(computed) as archive:
                    got = [archive[file] for file in archive.files if file.rpartition(".")[0] == quantity]
                expected = ours[plain(quantity)].value(ours[plain(quantity)].run())
                error = check(f"{name} {quantity}", relative_error(got, expected), TOLERANCE) if got else None
                found[name]["relative_error"][quantity] = error
    jaxbp = dict(found["jaxbp"]["seconds"])
    for peer in found.values():
        peer["ratio"] = {name: timing.ratio(s, peer["seconds"][BATCH]).value for name, s in peer["seconds"].items()}
        peer["faster"] = {name: timing.ratio(s, jaxbp[plain(name)]) for name, s in peer["seconds"].items()}
        peer["seconds"] = {name: statistics.median(s) for name, s in peer["seconds"].items()}
    return found


def plain(quantity: str) -> str:
    """Without the variant."""
    return quantity.split(" (")[0]


def run(command: list[str]) -> dict[str, Any]:
    """What a process prints as JSON.

    Raises:
      UserError: it failed; with the last line that it wrote.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[:2])}: {done.stderr.strip().rpartition(chr(10))[2]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def relative_error(found: Iterable[Any], expected: Iterable[Any]) -> float:
    """‖found − expected‖ / ‖expected‖ over all arrays."""
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(found, expected, strict=True)]
    return math.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs))


def check(what: str, error: float, allowed: float) -> float:
    """The error, which must be that of rounding."""
    if not error <= allowed:
        raise AssertionError(f"{what}: relative error {error:.1e}, allowed {allowed:.0e}: not the same quantity")
    return error
