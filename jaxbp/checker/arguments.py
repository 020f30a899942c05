"""The arguments of a rule that was found by its name: told in a TOML, or found out by trying shapes without numbers."""

import dataclasses
import importlib
import inspect
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.check import check
from jaxbp.checker.data import NAMES, SPEC, Spec, drawn, parse, text_of
from jaxbp.checker.finder import Rule
from jaxbp.checker.subject import Rules, split, subject_of

SHAPES = ("f32[4]", "f32[3,4]", "f32[]", "f32[4,4]", "f32[3]", "i32[3]{0..2}", "f32[2,3,4]", "i32[]{0..2}")
DOMAINS = (None, (0.05, 0.95), (1.05, 4.0), (-4.0, -0.05))  # tried in turn, until the function is finite
TRIES = 200
DRAWS = 5  # at which it has to be
SIZES = (3, 4, 2, 5, 6)  # of the named axes of a jaxtyping annotation
STATIC: dict[Any, Any] = {int: 1, bool: False, float: 0.5}  # by hint, arguments that are no data
SCALARS: dict[Any, tuple[str, ...]] = {int: ("i32[]{0..2}",), float: ("f32[]",)}
OPTIONS = frozenset(inspect.signature(check).parameters) - {"fun", "args", "level", "seed"}


@dataclasses.dataclass(frozen=True)
class Call:
    """How to check a rule: the callable, its arguments, the options of `jaxbp.check`, all as one line of text."""

    fun: Any
    args: tuple[Any, ...] | str
    options: Mapping[str, Any]
    text: str


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The arguments that a TOML tells, by the name of the rule::

        ["jax.nn:relu"]
        args = ["f32[8]"]                       # arrays, values, tables and lists of them, "package.module:name"
        kinks = "subgradient"                   # options of jaxbp.check, see there

        ["package.module:_solve"]
        through = "package.module:solve"        # a function that calls the rule, checked in its place
        args = ["f32[4,4]", { tol = 1e-6 }]

        ["package.module:attention"]
        skip = "needs a GPU"

    Raises:
      ValueError: no TOML, a rule that is no table, an unknown key, a rule without arguments.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(str(error)) from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f'{name} is no table, write ["package.module:{name}"]')
        if unknown := sorted(set(table) - OPTIONS - {"args", "through", "skip"}):
            allowed = ", ".join(["args", "through", "skip", *sorted(OPTIONS)])
            raise ValueError(f"{name} has {unknown[0]!r}, allowed: {allowed}")
        if not ("skip" in table or isinstance(table.get("args"), list)):
            raise ValueError(f"{name} has no list of args, for example args = ['f32[8]']")
    return tables


def told(rule: Rule, table: Mapping[str, Any]) -> Call:
    """The call that a table of the TOML describes.

    Raises:
      ValueError, ImportError, AttributeError: a text that names nothing.
    """
    fun = named(table["through"]) if "through" in table else rule.calls[-1]
    args = tuple(_value(entry) for entry in table["args"])
    options = {key: _option(key, value) for key, value in table.items() if key in OPTIONS}
    shown = [f"{key}={value!r}" for key, value in table.items() if key not in ("args", "skip")]
    return Call(fun, _as_text(args), options, ", ".join([*map(str, table["args"]), *shown]))


def named(text: str) -> Any:
    """The object that "package.module:name" or "package.module:Class.name" names."""
    module, _, name = text.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _value(entry: Any) -> Any:
    """An entry of args: an array to be drawn, an object by its name, a tree of entries, or the value itself."""
    if isinstance(entry, dict):
        return {key: _value(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return tuple(map(_value, entry))
    if not isinstance(entry, str):
        return entry
    if SPEC.fullmatch(entry):
        return parse(entry)[0]
    return named(entry) if ":" in entry else entry


def _as_text(args: tuple[Any, ...]) -> tuple[Any, ...] | str:
    """The arguments as the text that `check` takes, where they are all arrays: so a report can print them."""
    return " ".join(map(text_of, args)) if all(isinstance(a, Spec) for a in args) else args


def _option(key: str, value: Any) -> Any:
    """An option of `check`: what names a function is looked up, the positions of a domain are numbers."""
    if key in ("reference", "gradient", "value_and_grad", "jvp"):
        return named(value)
    if key == "vjp":
        return tuple(map(named, value))
    if key == "domain" and isinstance(value, dict):
        return {int(n) if n.isdecimal() else n: _option(key, bounds) for n, bounds in value.items()}
    return tuple(value) if key == "domain" and isinstance(value, list) else value


def found_out(rule: Rule) -> Call | None:
    """The first arguments with which the rule, or what wraps it, runs backward without numbers; None if there are none.

    They come from the docstring (if it has a text such as "f32[8,128] i32[8]{0..9}"), from hints and defaults, and from
    `SHAPES`. The domain is the first of `DOMAINS` where the function is finite.
    """
    for fun in rule.calls:
        for args in itertools.islice(_tries(fun, rule), TRIES):
            if _runs_backward(fun, args):
                domain = _domain(fun, args)
                options = {} if domain is None else {"domain": domain}
                shown = [text_of(a) if isinstance(a, Spec) else repr(a) for a in args]
                shown += [f"{key}={value!r}" for key, value in options.items()]
                return Call(fun, _as_text(args), options, ", ".join(shown))
    return None


def _tries(fun: Any, rule: Rule) -> Iterator[tuple[Any, ...]]:
    """Arguments to try: those of the docstring, the same array for all, then all combinations."""
    documented = [parse(match[0])[0] for match in SPEC.finditer(fun.__doc__ or "") if match["dtype"] in NAMES]
    if documented:
        yield tuple(documented)
    fixed = getattr(rule.calls[0], "nondiff_argnums", ()) if fun is rule.calls[0] else ()
    choices = _choices(fun, fixed)
    if choices is not None:
        combinations = itertools.product(*choices)
        yield from sorted(itertools.islice(combinations, 10 * TRIES), key=lambda args: len(set(map(repr, args))))


def _choices(fun: Any, fixed: Sequence[int]) -> list[list[Any]] | None:
    """For each argument without a default what it may be; None if nothing can be said of one."""
    try:
        parameters = _signature(fun).parameters.values()
    except (TypeError, ValueError):  # code that is not Python's
        return None
    sizes: dict[str, int] = {}
    choices: list[list[Any]] = []
    for n, parameter in enumerate(parameters):
        hint = parameter.annotation if isinstance(parameter.annotation, type) else None
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is not parameter.empty:  # nothing that follows needs a value
            break
        if parameter.kind is parameter.KEYWORD_ONLY or (n in fixed and hint not in STATIC):
            return None
        if n in fixed:
            choices.append([STATIC[hint]])
        elif hasattr(hint, "dim_str"):
            choices.append([_of_jaxtyping(hint, sizes)])
        else:
            choices.append([parse(text)[0] for text in SCALARS.get(hint, SHAPES)])
    return choices


def _signature(fun: Any) -> inspect.Signature:
    try:
        return inspect.signature(fun, eval_str=True)
    except NameError:  # a hint that is imported for type checkers alone
        return inspect.signature(fun)


def _of_jaxtyping(hint: Any, sizes: dict[str, int]) -> Spec:
    """The array of a hint such as Float[Array, "n 3"]: an axis of the same name has the same size everywhere."""
    shape = []
    for axis in hint.dim_str.split():
        if axis.startswith(("*", "...")):
            continue
        name = axis.lstrip("#?").partition("=")[2] or axis.lstrip("#?")
        shape.append(int(name) if name.isdecimal() else sizes.setdefault(name, SIZES[len(sizes) % len(SIZES)]))
    known = [dtype for dtype in ("float32", "int32", "bool") if dtype in hint.dtypes]
    return Spec(tuple(shape), jnp.dtype(known[0] if known else "float32"))


def _runs_backward(fun: Any, args: Sequence[Any]) -> bool:
    """Whether the function takes these arguments and gives numbers whose cotangents can be pulled back."""
    try:
        subject, leaves = subject_of(fun, args, Rules())
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
        pulled = jax.eval_shape(lambda p: subject.pullback(p, subject.outputs(fun, p)[0]), structs)
        return bool(subject.arguments.wrt and pulled.value)
    except Exception:  # any function says in its own way that it takes other arguments
        return False


def _domain(fun: Any, args: Sequence[Any]) -> tuple[float, float] | None:
    """Where the function is finite, as far as a few draws show; None if everywhere, or nowhere."""
    rng = np.random.default_rng(0)
    for bounds in DOMAINS:
        draws = [
            [jnp.asarray(drawn(a, bounds, "ordinary", rng)) if isinstance(a, Spec) else a for a in args]
            for _ in range(DRAWS)
        ]
        try:
            values = [split(fun(*draw))[0] for draw in draws]
        except Exception:  # what the function raises, `check` meets again and reports
            return None
        if all(np.all(np.isfinite(leaf)) for value in values for leaf in value):
            return bounds
    return None
