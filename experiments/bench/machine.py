"""The machine: what it is, and how many multiplications and additions a second it reaches in its best product."""

import functools
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.bench import timing

PACKAGES = ("jaxbp", "jax", "jaxlib", "numpy", "optax", "scikit-learn")
SIDES = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
LONG_ENOUGH = 0.25  # seconds; larger products are not tried


class Product(NamedTuple):
    """jnp.matmul of two squares of this side, in float32, and its FLOP/s."""

    side: int
    flops: float


def describe() -> dict[str, Any]:
    """Processor, device, versions, and the load when the benchmark began."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


@functools.cache
def matmul_peak(repetitions: int = 5) -> Product:
    """The best square product: sides are tried until one takes a quarter of a second."""
    found = []
    for side in SIDES:
        run = timing.call(jax.jit(jnp.matmul), squares(side))
        run()
        seconds = min(timing.seconds(run) for _ in range(repetitions))
        found.append(Product(side, 2 * side**3 / seconds))
        if seconds > LONG_ENOUGH:
            break
    return max(found, key=lambda product: product.flops)


def squares(side: int) -> tuple[jax.Array, jax.Array]:
    """Two of them, normal numbers."""
    a, b = (jax.random.normal(jax.random.key(k), (side, side), jnp.float32) for k in range(2))
    return a, b


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
