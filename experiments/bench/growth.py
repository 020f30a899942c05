"""How time, bytes and compile seconds grow with batch, width, depth and the number of parameters, beside autodiff.

Command: python -m experiments.bench --only growth
"""

from experiments.bench import networks, timing
from experiments.bench.rows import Row, Settings

CURVES: dict[str, dict[int, tuple[tuple[int, ...], int]]] = {  # of what ↦ at ↦ sizes, batch
    "batch": {n: ((784, 256, 256, 10), n) for n in (1, 16, 128, 1024, 8192)},
    "width": {n: ((784, n, n, 10), 128) for n in (16, 64, 256, 1024, 4096)},
    "depth": {n: ((128,) * (n + 1), 128) for n in (1, 10, 100, 300, 1000)},  # layers of width 128
    "parameters": {  # three square layers
        n: ((side,) * 4, 32) for n, side in ((10**4, 57), (10**5, 182), (10**6, 577), (10**7, 1825), (10**8, 5773))
    },
}
QUICK_LAYERS = 100  # `--quick` leaves deeper networks out: XLA compiles 1,000 layers for many seconds


def rows(settings: Settings) -> list[Row]:
    """Three rows a point: time, bytes, compile seconds (of one compilation), each ÷ that of jax.value_and_grad."""
    return [
        row
        for curve, points in CURVES.items()
        for at, (sizes, batch) in points.items()
        if not settings.quick or len(sizes) <= QUICK_LAYERS + 1
        for row in _point(curve, at, sizes, batch, settings)
    ]


def _point(curve: str, at: int, sizes: tuple[int, ...], batch: int, settings: Settings) -> list[Row]:
    case = networks.case(sizes, batch)
    ours, our_seconds = timing.compiled(case.ours, case.arguments)
    theirs, their_seconds = timing.compiled(case.theirs, case.arguments)
    time = timing.compared(ours, theirs, case.arguments, settings)
    size = timing.bytes_of(ours)
    label = f"{curve} {at:,}"
    return [
        Row("growth: time ÷ jax", label, time.value, time.seconds, "s", None, time.spread, at),
        Row("growth: bytes ÷ jax", label, size / timing.bytes_of(theirs), size, "B", None, None, at),
        Row("growth: compile seconds ÷ jax", label, our_seconds / their_seconds, our_seconds, "s", None, None, at),
    ]
