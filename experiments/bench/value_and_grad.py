"""Value and gradient against jax.value_and_grad of the same network: time, bytes, compile seconds.

Both are compiled and called in turn in one process. Bytes are temporary and output bytes, as XLA's buffer assignment
states them. The compile seconds of a network are those of all its activations: tracing, lowering and XLA.

Command: python -m experiments.bench --only value_and_grad
"""

from experiments.bench import networks, timing
from experiments.bench.rows import Row, Settings, Target

TIME, BYTES, COMPILE = (f"{what} ÷ jax.value_and_grad" for what in ("time", "bytes", "compile seconds"))
AS_AUTODIFF = Target("≤", 1.0)
HIDDEN = tuple(networks.SIGMAS)
COMPILATIONS = 3  # of each activation; 12 of each network


def rows(settings: Settings) -> list[Row]:
    """Three kinds of rows: time and bytes of every network and activation, compile seconds of every network."""
    made = [row for name, shape in networks.NETWORKS.items() for row in _network(name, *shape, settings)]
    return sorted(made, key=lambda row: (TIME, BYTES, COMPILE).index(row.what))


def _network(name: str, sizes: tuple[int, ...], batch: int, settings: Settings) -> list[Row]:
    made, ours_compile, theirs_compile = [], [], []
    for sigma in HIDDEN:
        case = networks.case(sizes, batch, sigma)
        for _ in range(1 if settings.quick else COMPILATIONS):
            ours, a = timing.compiled(case.ours, case.arguments)
            theirs, b = timing.compiled(case.theirs, case.arguments)
            ours_compile.append(a)
            theirs_compile.append(b)
        time = timing.compared(ours, theirs, case.arguments, settings)
        a, b = timing.bytes_of(ours), timing.bytes_of(theirs)
        label = f"{name}, {sigma}"
        made.append(Row(TIME, label, time.value, time.seconds, "s", AS_AUTODIFF, time.spread))
        made.append(Row(BYTES, label, a / b, a, "B", AS_AUTODIFF))
    compiling = timing.ratio(ours_compile, theirs_compile)
    return [*made, Row(COMPILE, f"{name}, all σ", compiling.value, compiling.seconds, "s", None, compiling.spread)]
