"""`jaxbp check` of all rules of a package or a file, once or after each change."""

import argparse
import contextlib
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxbp.commands import console, start_jax
from jaxbp.commands.check import searched_first, write
from jaxbp.names import nearest
from jaxbp.run.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from jaxbp.checker.finder import Rule
    from jaxbp.checker.survey import Survey

PAUSE = 0.5  # seconds between two looks at a watched file


def run(options: argparse.Namespace) -> int:
    """Prints a line a rule, as it is checked, with the reports of those that did not pass; 1 unless all passed."""
    start_jax()
    from jaxbp.checker.arguments import read

    try:
        told = read(options.arguments) if options.arguments else {}
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--arguments {options.arguments}: {reason}") from None
    with searched_first(os.getcwd()):
        if options.watch:
            return watch(Path(options.target), lambda: _once(options, told))
        return 0 if _once(options, told).passed else 1


def watch(file: Path, once: Callable[[], object]) -> int:
    """Checks a file now and after each change, until Ctrl-C; what is wrong with the file is one line.

    Raises:
      UserError: there is no such file.
    """
    if not file.is_file():
        raise UserError(f"check --watch {file}: there is no such file")
    try:
        for _ in _versions(file):
            try:
                once()
            except UserError as error:
                print(f"jaxbp: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        pass
    return 0


def _versions(file: Path) -> Iterator[bytes]:
    """The bytes of a file whenever they are others; an editor may take it away for a moment."""
    last = None
    while True:
        with contextlib.suppress(FileNotFoundError):
            if (now := file.read_bytes()) != last:
                last = now
                yield now
        time.sleep(PAUSE)


def _once(options: argparse.Namespace, told: "Mapping[str, Mapping[str, Any]]") -> "Survey":
    from jaxbp.checker.survey import Survey, annotations, examined

    package, rules, failed = _rules(options.target)
    ours = {name for name in told if name.startswith((f"{package}:", f"{package}."))}
    if unknown := sorted(ours - {rule.name for rule in rules}):
        near = nearest(unknown[0], [rule.name for rule in rules])
        raise UserError(f"--arguments {options.arguments}: {package} has no rule {unknown[0]!r}{near}")
    screen = console(options.format == "text")
    entries = []
    for rule in rules:
        entries.append(examined(rule, told.get(rule.name), options.level, options.seed))
        screen.out(str(entries[-1]), highlight=False)
    survey = Survey(options.target, tuple(entries), tuple(failed))
    for line in (*(f"not imported: {line}" for line in failed), survey):
        screen.out(str(line), highlight=False)
    write(options.json, survey.json())
    if options.format == "github":
        print(*annotations(json.loads(survey.json())), sep="\n", flush=True)
    return survey


def _rules(target: str) -> "tuple[str, list[Rule], list[str]]":
    """The name of the package or the file's module, its rules, and a line for each module that cannot be imported.

    Raises:
      UserError: no such file or package, or what its import raises.
    """
    from jaxbp.checker.finder import modules, rules
    from jaxbp.checker.trial import first_line

    file = Path(target)
    failed: list[str] = []
    try:
        if file.suffix == ".py":
            found = [_module_of(file)]
        else:
            found, failed = modules(target)
    except OSError as error:
        raise UserError(f"check {target}: {error.strerror or error}") from None
    except SyntaxError as error:
        raise UserError(f"check: {error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        what = f"can't run {target}" if file.suffix == ".py" else f"can't import {target}"
        raise UserError(f"check: {what}: {error if isinstance(error, ImportError) else first_line(error)}") from None
    return found[0].__name__, rules(found), failed


def _module_of(file: Path) -> types.ModuleType:
    """A Python file, executed anew as a module of its name; its folder is searched for what it imports.

    Raises:
      whatever the file does.
    """
    taken = file.stem in sys.modules and getattr(sys.modules[file.stem], "__file__", None) != str(file)
    module = types.ModuleType(f"{file.stem}_file" if taken else file.stem)
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses, for one, look themselves up
    with searched_first(str(file.parent)):
        exec(compile(file.read_bytes(), file, "exec"), module.__dict__)
    return module
