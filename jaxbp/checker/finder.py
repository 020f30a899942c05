"""Finds the rules of a package or a file: every `jax.custom_vjp` and `jax.custom_jvp` that a name leads to."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import pkgutil
import re
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxbp.checker.trial import first_line

NOT_WALKED = re.compile("__main__|conftest|tests?|test_.*|.*_test")
DEPTH = 6  # of wrappers around a rule: a class, a static method, a jit, a partial, a closure


@dataclasses.dataclass(frozen=True)
class Rule:
    """A custom rule, the name that leads to it, and where its function is written.

    Args:
      name: "package.module:function" or "package.module:Class.method"; of several names the most public, the shortest.
      kind: "custom_vjp" or "custom_jvp".
      calls: the rule itself, then what wraps it (a partial, a method, a function around it), the nearest first.
      file, line: of the function.
    """

    name: str
    kind: str
    calls: tuple[Callable[..., Any], ...]
    file: str
    line: int


def modules(package: str) -> tuple[list[types.ModuleType], list[str]]:
    """An importable package and all modules below it; and a line for each that cannot be imported.

    Raises:
      ImportError: the package itself cannot be imported, or what its import raises.
    """
    found, failed = [importlib.import_module(package)], []
    for name in _below(found[0]):
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                found.append(importlib.import_module(name))
        except (Exception, SystemExit) as error:  # a module may need anything: a GPU, another package
            failed.append(f"{name}: {first_line(error)}")
    return found, failed


def _below(package: types.ModuleType) -> Iterator[str]:
    """The names of all modules below a package, from its folders, without tests and __main__, which would run."""
    folders = [(package.__name__, list(getattr(package, "__path__", ())))]
    while folders:
        parent, path = folders.pop(0)
        for module in pkgutil.iter_modules(path):
            name = f"{parent}.{module.name}"
            if NOT_WALKED.fullmatch(module.name):
                continue
            yield name
            if module.ispkg:
                folders.append((name, [str(Path(folder) / module.name) for folder in path]))


def rules(found: list[types.ModuleType]) -> list[Rule]:
    """The rules that are written in the package of the first module, by name. A rule that a function makes anew at each
    call has no name and is not found.
    """
    package = found[0].__name__
    best: dict[int, Rule] = {}
    for module in found:
        for attribute, value in list(vars(module).items()):
            for path, calls in _inside(value, (attribute,), (), package):
                rule = calls[-1]
                name = f"{module.__name__}:{'.'.join(path)}"
                if id(rule) not in best or _rank(name) < _rank(best[id(rule)].name):
                    source = next(part for part in _sources(calls) if _written_in(part, package))
                    best[id(rule)] = Rule(name, type(rule).__name__, calls[::-1], *place(source))
    return sorted(best.values(), key=lambda rule: rule.name)


Found = Iterator[tuple[tuple[str, ...], tuple[Any, ...]]]


def _inside(value: Any, path: tuple[str, ...], around: tuple[Any, ...], package: str) -> Found:
    """(path, callables from the outermost to the rule) for each rule in an object."""
    if len(around) > DEPTH or any(value is outer for outer in around):
        return
    if _is_rule(value):
        calls = (*(outer for outer in around if callable(outer) and not isinstance(outer, type)), value)
        if any(_written_in(part, package) for part in _sources(calls)):
            yield path, calls
        return
    for name, part in _parts(value, package):
        yield from _inside(part, (*path, name) if name else path, (*around, value), package)


def _parts(value: Any, package: str) -> list[tuple[str, Any]]:
    """What may hold a rule: (its name, or "" where it goes by the holder's; the part)."""
    if isinstance(value, types.ModuleType):  # it is walked by itself
        return []
    if isinstance(value, type):
        return list(vars(value).items()) if _written_in(value, package) else []
    if isinstance(value, staticmethod | classmethod):
        return [("", value.__func__)]
    if isinstance(value, functools.partial):
        return [("", value.func)]
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items() if callable(part)]
    if isinstance(value, list | tuple):
        return [(str(n), part) for n, part in enumerate(value) if callable(part)]
    if isinstance(value, types.FunctionType):
        return [("", part) for part in (getattr(value, "__wrapped__", None), *_closed_over(value)) if callable(part)]
    wrapped = inspect.getattr_static(value, "__wrapped__", None)
    if wrapped is None:  # an object of a library that keeps a rule, such as equinox.filter_custom_vjp
        return [("", part) for part in getattr(value, "__dict__", {}).values() if _is_rule(part)]
    return [("", value.__wrapped__)]


def _is_rule(value: Any) -> bool:
    return isinstance(value, jax.custom_vjp | jax.custom_jvp)


def _closed_over(fun: Any) -> list[Any]:
    """The values of the names that a function takes from the one around it, as far as they have any."""
    found = []
    for cell in getattr(fun, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def _sources(calls: Sequence[Any]) -> list[Any]:
    """The functions that may say where a rule is written: its own, or what a library's function in its place calls."""
    holder = vars(calls[-2]).values() if len(calls) > 1 and hasattr(calls[-2], "__dict__") else ()
    return [part for part in (calls[-1].fun, *_closed_over(calls[-1].fun), *holder) if callable(part)]


def _written_in(value: Any, package: str) -> bool:
    module = str(getattr(inspect.unwrap(value), "__module__", None))
    return module == package or module.startswith(f"{package}.")


def _rank(name: str) -> tuple[int, int, str]:
    parts = name.replace(":", ".").split(".")
    return sum(part.startswith("_") for part in parts), len(parts), name


def place(fun: Any) -> tuple[str, int]:
    """The file and the line where a function, or the function of a rule, is written; ("", 0) if it is not Python."""
    code = getattr(inspect.unwrap(fun), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)
