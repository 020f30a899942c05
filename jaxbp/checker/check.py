"""`check`: the nine checks on one subject, as one report."""

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxbp.checker.data import Domain, Spec, domains, drawn, parse
from jaxbp.checker.network import Checked, name_of, parts
from jaxbp.checker.plan import guarded, searched
from jaxbp.checker.report import CONTRACT, SEVERITY, Report, Row, ordered
from jaxbp.checker.reproduce import assignment, reproducer, smallest
from jaxbp.checker.subject import Rules, subject_of
from jaxbp.checker.trial import Kinks, Settings, Trial, first_use, trial_of

PROBES = {"fast": 2, "full": 5}
KNOWN = "float64", "float32", "bfloat16", "float16"
ALLOWED = {
    "level": PROBES,
    "kinks": ("reference", "left", "right", "subgradient"),
    "order": (1, 2, 3, None),
}


def check(
    fun: Any,
    args: Sequence[Any] | str = (),
    *,
    gradient: Callable[..., Any] | None = None,
    value_and_grad: Callable[..., Any] | None = None,
    vjp: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    jvp: Callable[..., Any] | None = None,
    reference: Callable[..., Any] | None = None,
    wrt: int | Sequence[int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dtypes: Any = None,
    level: Literal["fast", "full"] = "fast",
    seed: int = 0,
    probes: int | None = None,
    kinks: Kinks = "reference",
    domain: Domain = None,
    project: Mapping[int, Callable[..., Any]] | None = None,
    allow_zero: bool | Sequence[int | str] = False,
    accuracy: float | None = None,
    order: Literal[1, 2, 3] | None = None,
) -> Report:
    """Checks a hand-written backward pass against the function that it belongs to.

    The subject is one of

    * a `jax.custom_vjp` or `jax.custom_jvp` function, or a function with some inside: ``check(f, args)``;
    * a scalar function and its gradient: ``check(f, args, gradient=g)`` or ``value_and_grad=vg``, which return what
      `jax.grad` and `jax.value_and_grad` would (also with has_aux), with the same wrt;
    * a function and a forward/backward pair as `jax.custom_vjp.defvjp` takes them: ``check(f, args, vjp=(fwd, bwd))``,
      or a rule as `jax.custom_jvp.defjvp` takes it: ``check(f, args, jvp=rule)``;
    * a `jaxbp.MLP`, `jaxbp.Network`, `jaxbp.Activation` or `jaxbp.Loss`: ``check(net)``. Of an activation and a loss σ″
      and H_ℓ are checked too, of a perceptron at level "full", with its Hessian.

    Nine checks are made; `jaxbp.checker` explains them, the search for points, shapes, dtypes and cotangents, and the
    elementwise bounds, which come from the rounding of the reference itself.

    Args:
      fun: the subject, or the function that the rule differentiates.
      args: example arguments: pytrees of arrays, or a text such as "f32[8,128] i32[8]{0..9}". Their values are one set
        of points; for the arguments in wrt others are drawn. Floating-point arguments outside wrt keep their values
        (masks of 0 and 1 are also tried empty and full); integers are tried over their range. Whole Python numbers,
        texts, callables and typed keys stay as they are. Complex arguments and outputs are checked by their parts.
      gradient, value_and_grad, vjp, jvp: the rule, if fun has none; at most one.
      reference: what autodiff differentiates, or what is differenced if it is NumPy code. Default: fun's own primal.
      wrt: arguments (positions) that the rule differentiates. Default: argument 0 for a gradient, otherwise all with
        floating-point leaves. The others may have None as their cotangent.
      kwargs: keyword arguments of fun, of its gradient and of the reference; they are not differentiated.
      dtypes: the production dtypes, such as ("float32", jnp.bfloat16). Default: those of args, float32, and the shorter
        ones that the rule takes.
      level: "fast" or "full": more points, shapes, dtypes and probes, and higher derivatives.
      seed: of everything drawn.
      probes: directions for each leaf in the adjoint identity and the differences; default 2 (fast), 5 (full).
      kinks: at a kink of the reference the rule must give what autodiff of the reference gives ("reference"; where the
        reference goes through max, min or abs, which split a tie, any value between the sides), or the derivative on
        the "left" or "right" (elementwise functions), or any "subgradient".
      domain: what drawn numbers lie in: (low, high), a name ("positive", "simplex", "spd", …, see
        `jaxbp.checker.data.NAMED`), a function of (key, shape, dtype); or such by argument position or name.
      project: by argument position, a function of (argument, cotangent): only what it keeps of a cotangent counts, such
        as its part in a tangent space.
      allow_zero: arguments, or paths of leaves, whose true gradient may be 0 everywhere; True for all.
      accuracy: how well fun solves what it solves, relative to the largest element: for solvers, iterations,
        quantised rules. Default 0, or 1e-4 where fun has a while_loop.
      order: 2 checks the derivative of the backward pass as well, 3 that one's derivative; default 3 at level "full"
        without accuracy.

    Returns:
      A `Report`; only if every row is a PASS has it ``passed``.

    Raises:
      ValueError, TypeError: arguments that describe no subject.

    Source: the adjoint identity and the Taylor remainder: Griewank & Walther 2008, §3; stochastic arithmetic: Vignes
      1993; differences: Ridders 1982.

    Example:
      >>> cube = jax.custom_vjp(lambda x: x**3)
      >>> cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
      >>> check(cube, "f32[4]").verdict
      'PASS'
      >>> cube.defvjp(lambda x: (x**3, x), lambda x, u: (2 * x**2 * u,))
      >>> check(cube, "f32[4]").failures[0].diagnosis
      'matches after × 1.5'
    """
    given = {name: value for name, value in locals().items() if name not in ("fun", "args")}
    start = time.perf_counter()
    for name, allowed in ALLOWED.items():
        _known(name, given[name], allowed)
    if isinstance(fun, Checked):
        _refuse(fun, {"args": args, **given})
        return _network(fun, start, level=level, seed=seed, probes=probes, dtypes=dtypes)
    with np.errstate(all="ignore"):  # points are there to overflow
        trial = _prepared(fun, args, given)
        rows = _merged(guarded(trial, CONTRACT, searched))
        failed = any(row.verdict != "PASS" for row in rows)
        return Report(
            name=trial.subject.name,
            rows=ordered(rows, first_use(trial) if failed and trial.oracle else {}),
            not_covered=tuple(dict.fromkeys(trial.notes)),
            reproducer=reproducer(fun, args, {"level": level, "seed": seed, **_chosen(given)}) if failed else "",
            smallest=smallest(trial) if failed else "",
            seconds=time.perf_counter() - start,
            seed=seed,
            level=level,
        )


def _prepared(fun: Any, args: Sequence[Any] | str, given: Mapping[str, Any]) -> Trial:
    """What the arguments of `check` describe.

    Raises:
      ValueError: they describe no subject; a gradient, for one, belongs to a scalar function.
    """
    example = parse(args) if isinstance(args, str) else jax.tree.map(_drawable, tuple(args))
    subject, leaves = subject_of(fun, example, Rules(*(given[name] for name in Rules._fields)))
    if not subject.arguments.wrt:
        raise ValueError("nothing to check: the arguments in wrt have no floating-point leaves")
    level, seed = given["level"], given["seed"]
    settings = Settings(
        example=leaves,
        domain=domains(given["domain"], subject.arguments, leaves),
        level=level,
        seed=seed,
        probes=given["probes"] or PROBES[level],
        order=given["order"] or (3 if level == "full" and not given["accuracy"] else 1),
        kinks=given["kinks"],
        dtypes=_names(given["dtypes"]),
        accuracy=given["accuracy"],
        allow_zero=given["allow_zero"],
    )
    rng = np.random.default_rng(seed)
    first = [
        drawn(leaf, domain, "ordinary", rng) if isinstance(leaf, Spec) else np.asarray(leaf)
        for leaf, domain in zip(leaves, settings.domain, strict=True)
    ]
    trial = trial_of(subject, first, settings)
    if subject.kind == "gradient" and (not trial.outputs or trial.outputs[0].shape != ()):
        shapes = [v.shape for v in trial.outputs]
        raise ValueError(f"a gradient needs a scalar function, but {subject.name} returns shapes {shapes}")
    return trial


def _drawable(leaf: Any) -> Any:
    """A shape and dtype without values becomes a `Spec`."""
    return Spec(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not left at their defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(check).parameters.items()}

    def left(name: str, value: Any) -> bool:
        return value is defaults[name] or (isinstance(value, str | int) and value == defaults[name])

    return {name: value for name, value in given.items() if not left(name, value)}


def _refuse(net: Checked, given: Mapping[str, Any]) -> None:
    """A network has its own arguments and rules."""
    for name in _chosen(given):
        if name not in ("level", "seed", "probes", "dtypes"):
            raise ValueError(f"{name} is given, but {type(net).__name__} has its own: leave it out")


def _network(subject: Checked, start: float, **settings: Any) -> Report:
    """One report of all parts of a network: the rule that a wrong gradient would come from is checked before it."""
    found = parts(subject, settings["seed"], settings["level"])
    given = {name: value for name, value in settings.items() if value is not None}
    reports = {part.name: check(part.fun, part.args, **part.options | given) for part in found}
    rows = [dataclasses.replace(row, subject=name) for name, report in reports.items() for row in report.rows]
    notes = [note for report in reports.values() for note in report.not_covered]
    if any("dtypes" in part.options.keys() - given.keys() for part in found):
        notes.append("bfloat16 and float16 of the network as a whole: level='full'; its rules are checked in them")
    failed = any(row.verdict != "PASS" for row in rows)
    again = f"jaxbp.check(net, level={settings['level']!r}, seed={settings['seed']}).raise_if_failed()"

    return Report(
        name=name_of(subject),
        rows=tuple(sorted(rows, key=lambda row: row.verdict == "PASS")),
        not_covered=tuple(dict.fromkeys(notes)),
        reproducer="\n".join(("import jaxbp", assignment(subject), again)) if failed else "",
        seconds=time.perf_counter() - start,
        seed=settings["seed"],
        level=settings["level"],
    )


def _merged(rows: Sequence[Row]) -> list[Row]:
    """The worst row of each check, leaf and dtype."""
    worst: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = row.check, row.path, row.dtype, row.subject
        worst[key] = max(worst.get(key, row), row, key=lambda row: (-SEVERITY.index(row.verdict), row.ratio))
    return list(worst.values())


def _names(dtypes: Any) -> tuple[str, ...]:
    """The production dtypes by name; one may be given alone."""
    if dtypes is None:
        return ()
    several = [dtypes] if isinstance(dtypes, str) or not isinstance(dtypes, Iterable) else dtypes
    names = tuple(dtype if isinstance(dtype, str) else jax.numpy.dtype(dtype).name for dtype in several)
    for name in names:
        _known("dtypes", name, KNOWN)
    return names


def _known(name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"{name} is {value!r}, allowed: {', '.join(str(a) for a in allowed if a is not None)}")
