"""`jaxbp check`."""

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxbp.commands import console, start_jax
from jaxbp.names import nearest
from jaxbp.run.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from jaxbp.checker.report import Report

HELP = """\
Proves the network of a config, a function with a hand-written backward pass, or every custom_vjp and custom_jvp of a
package or a file, against autodiff. Importing what is named is the only code it executes.

  jaxbp check configs/digits.toml
  jaxbp check package.module:function --inputs 'f32[8,128] i32[8]{0..9}'
  jaxbp check package --arguments arguments.toml
  jaxbp check --watch file.py

Of a package's rule the arguments come from --arguments, its docstring, its hints and defaults, or from trying shapes.
Exit status: 0 all passed, 1 something failed or was not exercised, 2 usage."""
RULES = {
    "gradient": "the function's hand-written gradient, if it has no custom rule",
    "value_and_grad": "the same, returning (value, gradient)",
    "jvp": "its rule as jax.custom_jvp.defjvp takes it",
    "reference": "the function that autodiff differentiates instead",
}
POINTS = "inputs", "wrt", "vjp", "domain", "kinks", "order", "allow_zero", "accuracy", "dtypes"  # of a function only


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is checked, on which inputs, how thoroughly."""
    parser.add_argument("target", metavar="CONFIG|MODULE:FUNCTION|PACKAGE|FILE", help="what is checked, see above")
    parser.add_argument("--inputs", metavar="SPEC", help="what the function takes: 'f32[8,128] i32[8]{0..9}'")
    parser.add_argument("--wrt", metavar="I,J", help="arguments that the rule differentiates, from 0; by default all")
    for rule, text in RULES.items():
        parser.add_argument(f"--{rule.replace('_', '-')}", metavar="MODULE:FUNCTION", help=text)
    parser.add_argument("--vjp", metavar="FWD,BWD", help="the pair of MODULE:FUNCTION that defvjp takes")
    parser.add_argument(
        "--domain", metavar="D", help="of drawn points: 0.1..5, a name (positive, simplex, spd, …), x=D,y=D"
    )
    parser.add_argument("--dtypes", metavar="D,E", help="the production dtypes: float32,bfloat16")
    parser.add_argument("--kinks", choices=("reference", "left", "right", "subgradient"), help="what a kink may give")
    parser.add_argument("--order", type=int, choices=(1, 2, 3), help="2: the derivative of the backward pass too; or 3")
    parser.add_argument("--allow-zero", metavar="I,J", help="arguments whose gradient may be 0 everywhere, or all")
    parser.add_argument("--accuracy", type=float, metavar="A", help="how well the function solves what it solves: 1e-6")
    parser.add_argument("--level", choices=("fast", "full"), default="fast", help="how many points and probes")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the report as JSON; an earlier one is replaced")
    parser.add_argument("--format", choices=("text", "github"), default="text", help="github: annotations of its code")
    parser.add_argument("--arguments", metavar="FILE", type=Path, help="a TOML that tells the arguments of rules")
    parser.add_argument("--watch", action="store_true", help="check a file again whenever it changes, until Ctrl-C")


def run(options: argparse.Namespace) -> int:
    """Prints the report, or those of all rules of a package or a file; 1 unless everything passed."""
    path, of_function = Path(options.target), ":" in options.target
    if options.json and options.json.is_file() and not _is_report(options.json):
        raise UserError(f"--json {options.json}: exists and is no report of jaxbp check; name another file")
    if path.suffix != ".toml" and not of_function:
        _refused(options, (*RULES, *POINTS), "is for package.module:function, see --arguments")
        if options.watch and path.suffix != ".py":
            raise UserError(f"check {options.target}: --watch is for a file, such as rules.py")
        from jaxbp.commands import rules

        return rules.run(options)
    _refused(options, ("arguments", "watch"), "is for a package or a file")
    *tables, report = (_of_function(options),) if of_function else _of_config(path, options)
    screen = console(options.format == "text")
    for part in (*tables, report):
        screen.print(part)
    if options.format == "github":
        print(*_annotations(options.target, report), sep="\n")
    write(options.json, report.json())
    return 0 if report.passed else 1


def _is_report(file: Path) -> bool:
    """Whether an earlier command wrote the file: a report may be replaced, nothing else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and bool({"rows", "rules"} & set(found))


def write(file: Path | None, text: str) -> None:
    """Writes what --json asks for."""
    if file:
        try:
            file.write_text(text)
        except OSError as error:
            raise UserError(f"--json {file}: can't be written: {error.strerror}") from None


def _refused(options: argparse.Namespace, names: "Sequence[str]", why: str) -> None:
    extra = [name.replace("_", "-") for name in names if getattr(options, name)]
    if extra:
        raise UserError(f"check {options.target}: --{extra[0]} {why}")


def _annotations(target: str, report: "Report") -> list[str]:
    """The annotations of one report, at the function, or at the first line of the config."""
    from jaxbp.checker.finder import Rule, place
    from jaxbp.checker.survey import Entry, annotations

    file, line = place(imported(target)) if ":" in target else (target, 1)
    return annotations({"rules": [Entry(Rule(target, "", (), file, line), report.verdict, report=report).json()]})


def _of_config(path: Path, options: argparse.Namespace) -> "tuple[Table, Report]":
    """The errors of the network of a config, layer by layer, and its report."""
    _refused(options, (*RULES, *POINTS), "is for package.module:function, a config has its own")
    from rich.table import Table

    from jaxbp.checker.check import check
    from jaxbp.checker.network import layer_errors
    from jaxbp.run import config as configs
    from jaxbp.run.networks import network
    from jaxbp.run.problem import pose

    config = configs.read(path)
    start_jax()
    net = network(config.model) if config.model.sizes else pose(config).net  # made for the shape of its data
    report = check(net, level=options.level, seed=options.seed, dtypes=(config.model.dtype,))
    table = Table(title="largest error in ULPs of the largest element")
    for column in ("layer", "quantity", "float64", "float32"):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    for row in layer_errors(net, options.seed):
        table.add_row(row.layer, row.quantity, f"{row.float64:.2f}", f"{row.float32:.2f}")
    return table, report


def _of_function(options: argparse.Namespace) -> "Report":
    """The report of package.module:function.

    Raises:
      UserError: a name that can't be imported, a bad --inputs or --wrt, a function that raises.
    """
    target = options.target
    fun = imported(target)
    from jaxbp.checker.check import check
    from jaxbp.checker.network import Checked

    if options.inputs is None and not isinstance(fun, Checked):
        raise UserError(f"check {target}: what does it take? For example: --inputs 'f32[8,128] f32[128]'")
    given = {name: value for name in RULES if (value := getattr(options, name))}
    rules = {name: imported(value) for name, value in given.items()}
    rules |= _points(options)
    start_jax()
    try:
        return check(fun, options.inputs or (), level=options.level, seed=options.seed, **rules)
    except Exception as error:
        if where := _in_modules(error, [name.partition(":")[0] for name in (target, *given.values())]):
            raise UserError(f"check {target}: {_said(error)}, at {where}") from None
        if isinstance(error, ValueError | TypeError):  # of the checker itself: what it was given describes no subject
            raise UserError(f"check {target}: {error}") from None
        raise


def imported(target: str) -> Any:
    """The object that "package.module:name" names; the current folder is searched first, as python -m does.

    Raises:
      UserError: another form, no such module or name, or the module can't be imported.
    """
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise UserError(f"check: {target!r} is no config (a .toml file) and no package.module:function")
    try:
        with searched_first(os.getcwd()):
            found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        said = error if isinstance(error, ImportError) else _said(error)
        raise UserError(f"check: can't import {module}: {said}") from None
    if not hasattr(found, name):
        raise UserError(f"check: {module} has no {name!r}{nearest(name, vars(found))}")
    return getattr(found, name)


@contextlib.contextmanager
def searched_first(folder: str) -> "Iterator[None]":
    """Modules are searched in this folder first."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # a module may have changed the list
            sys.path.remove(folder)


def _points(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `check` that are texts here."""
    found = {name: getattr(options, name) for name in ("kinks", "order", "accuracy") if getattr(options, name)}
    if wrt := _positions("wrt", options.wrt):
        found["wrt"] = wrt[0] if len(wrt) == 1 else wrt
    if options.allow_zero:
        found["allow_zero"] = options.allow_zero == "all" or _positions("allow-zero", options.allow_zero)
    if options.dtypes:
        found["dtypes"] = tuple(options.dtypes.split(","))
    if options.vjp:
        found["vjp"] = tuple(imported(name) for name in options.vjp.split(","))
        if len(found["vjp"]) != 2:
            raise UserError(f"--vjp: got {options.vjp!r}, want two names: module:forward,module:backward")
    if options.domain:
        named = [part.strip().rpartition("=") for part in options.domain.split(",")]
        by_argument = {int(name) if name.isdigit() else name: _range(text) for name, _, text in named}
        found["domain"] = by_argument.get("", by_argument)
    return found


def _range(text: str) -> str | tuple[float, float]:
    """The two ends of a text such as 0.1..5; any other text is the name of a domain."""
    low, dots, high = text.partition("..")
    try:
        return (float(low), float(high)) if dots else text
    except ValueError:
        raise UserError(f"--domain: got {text!r}, two numbers such as 0.1..5 are allowed") from None


def _positions(name: str, text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--{name}: got {text!r}, positions such as 0 or 0,2 are allowed") from None


def _said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _in_modules(error: Exception, modules: list[str]) -> str:
    """Where in one of the modules an exception comes from: "file.py, line 3"; nothing if from none of them."""
    files = {getattr(sys.modules[module], "__file__", None) for module in modules}
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{Path(places[-1].filename).name}, line {places[-1].lineno}" if places else ""
