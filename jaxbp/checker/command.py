"""The command `jaxbp check`."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from jaxbp.activations import Activation
from jaxbp.checker.check import check
from jaxbp.checker.network import layer_errors
from jaxbp.checker.report import Report
from jaxbp.losses import Loss
from jaxbp.mlp import MLP
from jaxbp.run.errors import UserError

RULES = ("gradient", "value_and_grad", "reference")


def check_config(path: Path, level: str, seed: int, console: Any) -> Report:
    """Proves the network of a config and prints its errors layer by layer."""
    from rich.table import Table

    from jaxbp.run import config as configs
    from jaxbp.run.store.model import network

    config = configs.read(path)
    net = network(config.model)
    report = check(net, level=level, seed=seed, dtypes=(config.model.dtype,))  # type: ignore[arg-type]
    table = Table(title="largest error in ULPs of the largest element")
    for column in ("layer", "quantity", "float64", "float32"):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    for row in layer_errors(net, seed):
        table.add_row(str(row.layer), row.quantity, f"{row.float64:.2f}", f"{row.float32:.2f}")
    console.print(table)
    return report


def check_function(
    target: str, inputs: str | None, wrt: str | None, rules: dict[str, str], level: str, seed: int
) -> Report:
    """Proves package.module:function; importing that module is the only code of the user's that is executed by name.

    Raises:
      UserError: a name that can't be imported, a bad --inputs or --wrt.
    """
    fun = imported(target)
    own = isinstance(fun, MLP | Activation | Loss)
    if inputs is None and not own:
        raise UserError(f"check {target}: what does it take? For example: --inputs 'f32[8,128] f32[128]'")
    options = {name: imported(value) for name, value in rules.items()}
    try:
        positions = [int(part) for part in wrt.split(",")] if wrt else None
        chosen = positions[0] if positions and len(positions) == 1 else positions
        return check(fun, inputs or (), wrt=chosen, level=level, seed=seed, **options)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise UserError(f"check {target}: {error}") from None


def imported(target: str) -> Any:
    """The object that "package.module:name" names; the current folder is searched first, as python -m does."""
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise UserError(f"check: {target!r} is no config (a .toml file) and no package.module:function")
    sys.path[:0] = [os.getcwd()]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"check: can't import {module}: {error}") from None
    finally:
        del sys.path[0]
    if not hasattr(found, name):
        raise UserError(f"check: {module} has no {name!r}")
    return getattr(found, name)


def run(options: Any, console: Any) -> bool:
    """The command; whether everything passed."""
    rules = {name: getattr(options, name) for name in RULES if getattr(options, name)}
    path = Path(options.target)
    if path.suffix == ".toml":
        extra = [name.replace("_", "-") for name in (*rules, "inputs", "wrt") if getattr(options, name)]
        if extra:
            raise UserError(f"check {path}: --{extra[0]} is for package.module:function, a config has its own")
        report = check_config(path, options.level, options.seed, console)
    else:
        report = check_function(options.target, options.inputs, options.wrt, rules, options.level, options.seed)
    console.print(report)
    if options.json:
        _write(Path(options.json), report)
    return report.passed


def _write(path: Path, report: Report) -> None:
    try:
        path.write_text(report.json())
    except OSError as error:
        raise UserError(f"--json {path}: can't be written: {error.strerror}") from None
