"""How experiments.bench.peers measures a library in a process of its own: the same arrays, the same rounds.

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
PRIOR, INPUTS = 1.0, 16  # of Laplace's approximation: the precision of the prior, how many inputs have a covariance


class Case(NamedTuple):
    """A network, (w, b) of each layer, σ between them; a batch x (N, ·), y (N,); the bound C of the clipping.

    Images x (N, channels, height, width) go through LeNet-5, tokens (N, T) with labels (N, T) through a GPT, whose
    arrays come in pairs too (see torch_gpt.py); everything else goes through an MLP.
    """

    layers: list[tuple[np.ndarray, np.ndarray]]
    x: np.ndarray
    y: np.ndarray
    max_norm: float = 1.0
    hidden: str = "relu"

    @property
    def tokens(self) -> bool:
        """Whether the samples are sequences of tokens."""
        return self.x.dtype.kind == "i"


class Quantity(NamedTuple):
    """`run` is timed and returns when it is done; `value` gives its result as jaxbp scales it, and is not timed.

    What was drawn at random can't be compared: its value is [].
    """

    run: Callable[[], Any]
    value: Callable[[Any], Sequence[Any]]


def direction(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """v = (V, v_b) of each layer, for products: w upside down, and b upside down plus 1."""
    return [(w[::-1].copy(), b[::-1] + np.ones_like(b)) for w, b in case.layers]


def write(path: Path, case: Case) -> None:
    """The case as an .npz."""
    layers = {f"{letter}{l}": a for l, layer in enumerate(case.layers) for letter, a in zip("wb", layer, strict=True)}
    np.savez(path, x=case.x, y=case.y, max_norm=case.max_norm, hidden=case.hidden, **layers)


def read(path: str) -> Case:
    """The case of an .npz."""
    arrays = np.load(path)
    layers = [(arrays[f"w{l}"], arrays[f"b{l}"]) for l in range((len(arrays.files) - 4) // 2)]
    return Case(layers, arrays["x"], arrays["y"], float(arrays["max_norm"]), str(arrays["hidden"]))


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


def main(
    versions: str,
    quantities: Callable[[Case], dict[str, Quantity]],
    peak: Callable[[Callable[[], Any]], int] | None = None,
) -> None:
    """Runs each quantity twice to warm up, writes its value, measures the rounds and prints JSON.

    `peak` gives the greatest number of bytes that a call has at once beyond those it found.
    """
    arrays, rounds, values = sys.argv[-3:]
    made = quantities(read(arrays))
    found: dict[str, np.ndarray] = {}
    for name, (run, value) in made.items():
        run()
        found |= {f"{name}.{k}": np.asarray(a) for k, a in enumerate(value(run()))}
    np.savez(values, **found)
    calls = [quantity.run for quantity in made.values()]
    told = {"versions": versions, "seconds": dict(zip(made, interleaved(calls, int(rounds)), strict=True))}
    if peak is not None:
        told["bytes"] = {name: peak(call) for name, call in zip(made, calls, strict=True)}
    print(json.dumps(told))
