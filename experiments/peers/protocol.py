"""How experiments.bench.persample measures a library in a process of its own: the same arrays, the same rounds.

A peer is a script, `python NAME_persample.py ARRAYS.npz ROUNDS VALUES.npz`. It prints its seconds as JSON and writes
what it computed. It runs where neither jaxbp nor what jaxbp needs is installed, so this module imports numpy alone.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH = "value_and_grad"  # the quantity that all others are divided by


class Case(NamedTuple):
    """A network, (w, b) of each layer, relu between them; a batch x (N, in), y (N,); the bound C of the clipping."""

    layers: list[tuple[np.ndarray, np.ndarray]]
    x: np.ndarray
    y: np.ndarray
    max_norm: float


class Quantity(NamedTuple):
    """`run` is timed and returns when it is done; `value` gives its result as jaxbp scales it, and is not timed."""

    run: Callable[[], Any]
    value: Callable[[Any], Sequence[Any]]


def write(path: Path, case: Case) -> None:
    """The case as an .npz."""
    layers = {f"{letter}{l}": a for l, layer in enumerate(case.layers) for letter, a in zip("wb", layer, strict=True)}
    np.savez(path, x=case.x, y=case.y, max_norm=case.max_norm, **layers)


def read(path: str) -> Case:
    """The case of an .npz."""
    arrays = np.load(path)
    layers = [(arrays[f"w{l}"], arrays[f"b{l}"]) for l in range((len(arrays.files) - 3) // 2)]
    return Case(layers, arrays["x"], arrays["y"], float(arrays["max_norm"]))


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call, in rounds of all; each round begins with another one."""
    seconds: list[list[float]] = [[] for _ in calls]
    for n in range(rounds):
        for k in range(len(calls)):
            which = (n + k) % len(calls)
            start = time.perf_counter()
            calls[which]()
            seconds[which].append(time.perf_counter() - start)
    return seconds


def main(versions: str, quantities: Callable[[Case], dict[str, Quantity]]) -> None:
    """Runs each quantity twice to warm up, writes its value, measures the rounds and prints JSON."""
    arrays, rounds, values = sys.argv[-3:]
    made = quantities(read(arrays))
    found: dict[str, np.ndarray] = {}
    for name, (run, value) in made.items():
        run()
        found |= {f"{name}.{k}": np.asarray(a) for k, a in enumerate(value(run()))}
    np.savez(values, **found)
    seconds = interleaved([quantity.run for quantity in made.values()], int(rounds))
    print(json.dumps({"versions": versions, "seconds": dict(zip(made, seconds, strict=True))}))
