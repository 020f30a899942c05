"""Interleaved timings, compile seconds and bytes of compiled programs."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench.rows import Settings
from experiments.peers import protocol

Program = Callable[..., Any]


class Ratio(NamedTuple):
    """Of seconds a and b taken in the same rounds: the median of a/b, its quartiles, and the median of a."""

    value: float
    spread: tuple[float, float]
    seconds: float


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    each = np.array(a) / np.array(b)
    low, high = np.quantile(each, (0.25, 0.75))
    return Ratio(statistics.median(each.tolist()), (float(low), float(high)), statistics.median(a))


def call(program: Program, arguments: Sequence[Any]) -> Callable[[], Any]:
    """The program on its arguments, which returns when it is done."""
    return lambda: jax.block_until_ready(program(*arguments))


def seconds(run: Callable[[], Any]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(programs: Sequence[Program], arguments: Sequence[Any], rounds: int) -> list[list[float]]:
    """Seconds of each call, in rounds of all; each round begins with another one. One round before that warms up."""
    calls = [call(program, arguments) for program in programs]
    for run in calls:
        run()
    return protocol.interleaved(calls, rounds)


def compared(ours: Program, theirs: Program, arguments: Sequence[Any], settings: Settings) -> Ratio:
    """The time of one program ÷ that of the other."""
    once = sum(seconds(call(program, arguments)) for program in (ours, theirs))
    return ratio(*interleaved((ours, theirs), arguments, settings.rounds(once)))


def compiled(program: Program, arguments: Sequence[Any]) -> tuple[Any, float]:
    """The compiled program, and the seconds from Python to it: tracing, lowering, XLA; nothing is remembered."""
    jax.clear_caches()
    start = time.perf_counter()
    made = jax.jit(program).lower(*arguments).compile()
    return made, time.perf_counter() - start


def bytes_of(program: Any) -> int:
    """What a compiled program allocates: temporary and output bytes, as XLA's buffer assignment states them."""
    memory = program.memory_analysis()
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)
