"""Memory: what does not fit is refused before it is allocated."""

import contextlib
import math
import os
from pathlib import Path

import jax

from jaxbp.run.errors import UserError

CGROUP = Path("/sys/fs/cgroup")


def check(what: str, wanted: int) -> None:
    """Raises a UserError when so many bytes of host memory are not available; the line begins with `what`."""
    there = available()
    if wanted > there:
        raise UserError(f"{what} {_shown(wanted)} of memory, {_shown(there)} are available")


def available() -> int:
    """Bytes that this process can still take: the system's estimate, or less where its control group has a limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all that is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def of_tree(tree: object) -> int:
    """Bytes of the arrays, or of the shapes, in a pytree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shown(count: int) -> str:
    """1234567 ↦ "1.2 MB"."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
    power = min((len(str(max(count, 0))) - 1) // 3, len(units) - 1)
    return f"{count / 10 ** (3 * power):.4g} {units[power]}"
