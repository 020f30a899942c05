"""A report's last part: lines of Python that show the failure again, and the smallest case of it."""

import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbp.activations import Activation
from jaxbp.checker.checks import oracle
from jaxbp.checker.network import Checked
from jaxbp.checker.subject import is_float, is_key
from jaxbp.checker.trial import Trial
from jaxbp.mlp import MLP
from jaxbp.network import Network

PRINTED = 64  # numbers; longer arrays go to a file
LEAVES = 3  # of a failing case that are made smaller


def assignment(subject: Checked) -> str:
    """A network, an activation or a loss written again, as far as its parts have names in jaxbp."""
    if isinstance(subject, Network):
        return "# net is what you called check with"
    if isinstance(subject, MLP):
        return f"net = jaxbp.{subject!r}"
    return f"net = jaxbp.{'activations' if isinstance(subject, Activation) else 'losses'}.get({subject.name!r})"


def reproducer(fun: Any, args: Sequence[Any] | str, options: Mapping[str, Any]) -> str:
    """Lines that run: imports, the same arguments, the check with the options."""
    imports = ["import jax, jax.numpy as jnp, jaxbp, numpy as np"]
    stored: dict[str, np.ndarray] = {}
    called = _name(fun, "f", imports)
    words = [f"{name}={_written(value, name, imports, stored)}" for name, value in options.items()]
    written = repr(args) if isinstance(args, str) else _written(tuple(args), "args", imports, stored)
    lines = [f"args = {written}", f"jaxbp.check({', '.join([called, 'args', *words])}).raise_if_failed()"]
    if stored:
        lines.insert(0, f"stored = np.load({str(_saved(stored))!r})")
    head = sorted(dict.fromkeys(imports), key=lambda line: line.startswith("#"))
    return "\n".join(["; ".join(head), *lines])


def _saved(stored: Mapping[str, np.ndarray]) -> Path:
    """The arrays in a file of the temporary folder, named after what is in it."""
    digest = zlib.crc32(b"".join(np.ascontiguousarray(a).tobytes() for a in stored.values()))
    path = Path(tempfile.gettempdir()) / f"jaxbp-check-{digest:08x}.npz"
    kept: dict[str, Any] = {name: a.view(np.uint16) if str(a.dtype) == "bfloat16" else a for name, a in stored.items()}
    np.savez(path, **kept)
    return path


def _written(value: Any, name: str, imports: list[str], stored: dict[str, np.ndarray]) -> str:
    """Python for a value."""

    def again(item: Any, part: Any = "") -> str:
        return _written(item, f"{name}{part}", imports, stored)

    if is_key(value):
        return f"jax.random.wrap_key_data({again(np.asarray(jax.random.key_data(value)))})"
    if hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "__array__"):
        return _array(value, stored)
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"jax.ShapeDtypeStruct({value.shape}, {str(value.dtype)!r})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = ", ".join(f"{field}={again(item)}" for field, item in zip(value._fields, value, strict=True))
        return f"{_name(type(value), type(value).__name__, imports)}({fields})"
    if isinstance(value, tuple | list):
        cells = ", ".join(map(again, value, count()))
        return f"[{cells}]" if isinstance(value, list) else f"({cells}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {again(item, key)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and not np.isfinite(value):
        return f"float({str(value)!r})"
    if callable(value):
        return _name(value, name, imports)
    return repr(value)


def _array(value: Any, stored: dict[str, np.ndarray]) -> str:
    array = np.asarray(value)
    kind = "jnp.asarray" if isinstance(value, jax.Array) else "np.asarray"
    dtype = f"jnp.{array.dtype}" if str(array.dtype) in ("bfloat16",) else repr(str(array.dtype))
    if array.size <= PRINTED:
        numbers = array.astype(np.float64) if is_float(array) else array
        text = repr(numbers.tolist()).replace("nan", "np.nan").replace("inf", "np.inf")
        return f"{kind}({text}, {dtype})" if array.size else f"{kind}(np.zeros({array.shape}), {dtype})"
    name = f"a{len(stored)}"
    stored[name] = array
    loaded = f"stored[{name!r}]"
    return f"{kind}({loaded}.view(jnp.bfloat16))" if dtype == "jnp.bfloat16" else f"{kind}({loaded})"


def _name(fun: Any, fallback: str, imports: list[str]) -> str:
    """How to call a function, with its import if it has one."""
    module, name = getattr(fun, "__module__", None), getattr(fun, "__qualname__", "")
    if name.isidentifier() and module != "__main__" and getattr(sys.modules.get(module or ""), name, None) is fun:
        imports.append(f"from {module} import {name}")
        return name
    own = getattr(fun, "__name__", "")
    called = own if isinstance(own, str) and own.isidentifier() else fallback
    imports.append(f"# {called} is what you called check with")
    return called


def smallest(trial: Trial) -> str:
    """The smallest case: as many numbers of the arguments as possible are 0 or have few digits, and it fails still."""
    if trial.failing is None:
        return ""
    best, dtype = [np.array(a) for a in trial.failing[1]], trial.failing[3]
    changes: list[Callable[[np.ndarray], np.ndarray]] = [
        *(partial(_zeroed, part, parts) for parts in (1, 2) for part in range(parts)),
        _short,
    ]
    for n in trial.subject.arguments.wrt[:LEAVES]:
        for change in changes:
            candidate = [change(a) if m == n else a for m, a in enumerate(best)]
            best = candidate if _fails(trial, candidate) else best
    cells = [f"{path} = {_shown(a)}" for path, a in zip(trial.subject.arguments.paths, best, strict=True)]
    return f"{dtype}: {', '.join(cells)}"


def _fails(trial: Trial, leaves: Sequence[Any]) -> bool:
    assert trial.failing is not None
    regime, _, us, dtype = trial.failing
    try:
        rows = oracle(trial, regime, leaves, us, dtype, trial.truth(leaves, us, dtype))
    except Exception:  # not this one
        return False
    return any(row.verdict == "FAIL" for row in rows)


def _zeroed(part: int, parts: int, a: np.ndarray) -> np.ndarray:
    """One of so many parts of the numbers made 0."""
    zeroed = a.copy()
    zeroed.reshape(-1)[part * a.size // parts : (part + 1) * a.size // parts] = 0
    return zeroed


def _short(a: np.ndarray) -> np.ndarray:
    """Two significant digits."""
    return np.asarray(np.vectorize(lambda x: float(f"{x:.1e}"), otypes=[float])(a.astype(float))).astype(a.dtype)


def _shown(a: np.ndarray) -> str:
    return np.array2string(a.astype(float) if is_float(a) else a, precision=8, threshold=24).replace("\n", "")
