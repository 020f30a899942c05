"""`check`: the nine checks on one subject, as one report."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.activations import Activation
from jaxbp.checker import checks
from jaxbp.checker.contract import CONTRACT, PROVENANCE, contract, provenance
from jaxbp.checker.data import Domain, Spec, cast, parse, points, text_of
from jaxbp.checker.network import parts
from jaxbp.checker.numerics import NUMERICS, numerics
from jaxbp.checker.report import SEVERITY, Report, Row, ordered
from jaxbp.checker.subject import Leaves, Pullback, Subject, is_float, subject_of
from jaxbp.checker.transformations import EAGER, TRANSFORMATIONS, compiles_fast_eagerly, transformations
from jaxbp.checker.trial import Kinks, Trial, Truth, first_use, outputs_like, setting, trial_of
from jaxbp.losses import Loss
from jaxbp.mlp import MLP
from jaxbp.network import Network

PROBES = {"fast": 2, "full": 5}
Regimes = dict[str, Leaves]


def check(
    fun: Any,
    args: Sequence[Any] | str = (),
    *,
    gradient: Callable[..., Any] | None = None,
    value_and_grad: Callable[..., Any] | None = None,
    vjp: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    reference: Callable[..., Any] | None = None,
    wrt: int | Sequence[int] | None = None,
    dtypes: Sequence[Any] | None = None,
    level: Literal["fast", "full"] = "fast",
    seed: int = 0,
    probes: int | None = None,
    kinks: Kinks = "reference",
    domain: Domain = None,
    allow_zero: bool | Sequence[int | str] = False,
    order: Literal[1, 2] = 1,
) -> Report:
    """Checks a hand-written backward pass against the function that it belongs to.

    The subject is one of

    * a `jax.custom_vjp` function, or a function with one inside: ``check(f, args)``;
    * a scalar function and its gradient: ``check(f, args, gradient=g)`` or ``value_and_grad=vg``, which return what
      `jax.grad` and `jax.value_and_grad` would, with the same wrt;
    * a function and a forward/backward pair as `jax.custom_vjp.defvjp` takes them: ``check(f, args, vjp=(fwd, bwd))``;
    * a `jaxbp.MLP`, `jaxbp.Activation` or `jaxbp.Loss`: ``check(net)``.

    Nine checks: contract, provenance of the rule, algebra of the cotangent, elementwise float64 autodiff oracle,
    adjoint identity, independent numerics, production dtype, transformations, edges and vacuity. Bounds are
    elementwise and come from the rounding of the reference itself (see `jaxbp.checker.rounding`), never from a size.

    Args:
      fun: the subject, or the function that the rule differentiates.
      args: example arguments: pytrees of arrays, or a text such as "f32[8,128] i32[8]{0..9}". Their values are one set
        of points; for the arguments in wrt others are drawn: N(0, 1), with exact zeros, × 200, and at level "full"
        × 10⁻³ and of all magnitudes. Arguments outside wrt keep their values.
      gradient, value_and_grad, vjp: the rule, if fun has none; at most one.
      reference: what autodiff differentiates, or what is differenced if it is NumPy code. Default: fun's own primal.
      wrt: arguments (positions) that the rule differentiates. Default: argument 0 for a gradient, otherwise all with
        floating-point leaves. The others may have None as their cotangent.
      dtypes: the production dtypes, such as ("float32", jnp.bfloat16). Default: those of args, and float32.
      level: "fast" or "full": more points, cotangents and probes.
      seed: of everything drawn.
      probes: directions for each leaf in the adjoint identity and the differences; default 2 (fast), 5 (full).
      kinks: at a kink of the reference the rule must give what autodiff of the reference gives ("reference"; where the
        reference goes through max, min or abs, which split a tie, any value between the sides), or the derivative on
        the "left" or "right" (elementwise functions), or any "subgradient".
      domain: (low, high) that drawn numbers lie in, or by argument position such a pair or a function of (key, shape,
        dtype).
      allow_zero: arguments, or paths of leaves, whose true gradient may be 0 everywhere; True for all.
      order: 2 checks the derivative of the backward pass as well.

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
    start = time.perf_counter()
    _known("level", level, PROBES)
    _known("kinks", kinks, ("reference", "left", "right", "subgradient"))
    _known("order", order, (1, 2))
    if isinstance(fun, Network):
        raise TypeError("fun is a Network: check lambda params, x: jaxbp.apply(net, params, x) at (params, x)")
    if isinstance(fun, MLP | Activation | Loss):
        own: dict[str, Any] = {"args": args or None, "gradient": gradient, "value_and_grad": value_and_grad, "vjp": vjp}
        own |= {"reference": reference, "wrt": wrt, "domain": domain}
        if given := [name for name, value in own.items() if value is not None]:
            raise ValueError(f"{given[0]} is given, but {type(fun).__name__} has its own: leave it out")
        return _network(fun, start, level=level, seed=seed, probes=probes, dtypes=dtypes)
    args = jax.tree.map(_drawable, parse(args) if isinstance(args, str) else tuple(args))
    subject, leaves = subject_of(fun, args, gradient, value_and_grad, vjp, reference, wrt)
    if not subject.arguments.wrt:
        raise ValueError("nothing to check: the arguments in wrt have no floating-point leaves")
    regimes = points(subject.arguments, leaves, level, seed, domain)
    first = next(iter(regimes.values()))
    trial = trial_of(subject, first, kinks, seed)
    settings = _Settings(level, seed, probes or PROBES[level], allow_zero, _dtypes(leaves, dtypes))
    rows, not_covered = _nine_checks(trial, regimes, settings)
    if order == 2:
        rows, not_covered = _with_second_order(trial, regimes, settings, rows, not_covered)
    merged = _merged(rows)
    failed = any(row.verdict != "PASS" for row in merged)
    return Report(
        name=subject.name,
        rows=ordered(merged, first_use(subject, first) if failed and trial.differentiable else {}),
        not_covered=tuple(not_covered),
        reproducer=_reproducer(subject, args, level, seed) if failed else "",
        seconds=time.perf_counter() - start,
        seed=seed,
        level=level,
    )


def _network(subject: MLP | Activation | Loss, start: float, **settings: Any) -> Report:
    """One report of all parts of a network: the rule that a wrong gradient would come from is checked before it."""
    found = parts(subject, settings["seed"])
    reports = {part.name: check(part.fun, part.args, **part.options, **settings) for part in found}
    rows = [dataclasses.replace(row, subject=name) for name, report in reports.items() for row in report.rows]
    notes = [note for report in reports.values() for note in report.not_covered]
    failed = [row for row in rows if row.verdict != "PASS"]
    again = f"jaxbp.check(net, level={settings['level']!r}, seed={settings['seed']}).raise_if_failed()"
    return Report(
        name=getattr(subject, "name", f"MLP{getattr(subject, 'sizes', '')}"),
        rows=(*failed, *(row for row in rows if row.verdict == "PASS")),
        not_covered=tuple(dict.fromkeys(notes)),
        reproducer="\n".join(("import jaxbp", f"net = {_expression(subject)}", again)) if failed else "",
        seconds=time.perf_counter() - start,
        seed=settings["seed"],
        level=settings["level"],
    )


def _expression(subject: MLP | Activation | Loss) -> str:
    """How to write the subject again, as far as its parts have names in jaxbp."""
    if isinstance(subject, MLP):
        return f"jaxbp.{subject!r}"
    return f"jaxbp.{'activations' if isinstance(subject, Activation) else 'losses'}.get({subject.name!r})"


class _Settings(NamedTuple):
    level: str
    seed: int
    probes: int
    allow_zero: bool | Sequence[int | str]
    dtypes: tuple[str, ...]


def _nine_checks(trial: Trial, regimes: Regimes, settings: _Settings) -> tuple[list[Row], list[str]]:
    """The rows of all checks and what was left out. After a rule of a wrong form nothing else is said."""
    given, main = next(iter(regimes.values())), settings.dtypes[0]
    rows: list[Row] = []
    for dtype in settings.dtypes:
        with setting(dtype):
            rows += _guarded(CONTRACT, contract, trial, cast(given, dtype))
    if any(row.verdict == "FAIL" and (not row.path or "shape" in row.diagnosis) for row in rows):
        return rows, ["the other checks, after a broken contract"]
    with setting(main):
        rows += _guarded(PROVENANCE, provenance, trial, cast(given, main))
    us = _cotangents(trial, given, settings)
    dense = us["dense"]
    rows += _guarded(checks.ALGEBRA, checks.algebra, trial, given, dense, main)
    if trial.differentiable:
        more, notes = _by_autodiff(trial, regimes, us, settings)
        rows += more
    else:
        lost = "float64 oracle, adjoint identity, production dtype, edges and vacuity"
        notes = [f"{lost}: JAX cannot differentiate the reference"]
    tried = {regime: regimes[regime] for regime in ("ordinary", next(iter(regimes)), "tiny") if regime in regimes}
    rows += _guarded(NUMERICS, numerics, trial, tried, dense, settings.probes)
    if not trial.traceable:
        return rows, [*notes, "transformations: the rule is not JAX code"]
    other = regimes.get("ordinary", given)
    eager = settings.level == "full" or compiles_fast_eagerly(trial, given, dense, main)
    if not eager:
        notes.append(f"transformations, eager: more than {EAGER} different operations; level='full' runs them")
    rows += _guarded(TRANSFORMATIONS, transformations, trial, given, other, dense, main, settings.level, eager)
    if jax.device_count() == 1:
        notes.append("sharding: one device; XLA_FLAGS=--xla_force_host_platform_device_count=4 makes four")
    return rows, notes


def _by_autodiff(
    trial: Trial, regimes: Regimes, us: dict[str, Leaves], settings: _Settings
) -> tuple[list[Row], list[str]]:
    """Checks 4, 5, 7 and 9, for which JAX must be able to differentiate the reference."""
    rows, truths, notes = _oracles(trial, regimes, us, settings)
    smooth = _smooth(trial, regimes, us["dense"])
    rows += _guarded(checks.ADJOINT, checks.adjoint, trial, smooth, us["dense"], settings.probes)
    return [*rows, *checks.vacuity(trial, truths, settings.allow_zero)], notes


def _smooth(trial: Trial, regimes: Regimes, us: Leaves) -> Leaves:
    """Points where probes hit no kink that a caller chose on purpose: drawn ones, if the function is defined there."""
    drawn = regimes.get("ordinary")
    if drawn is not None and all(np.all(np.isfinite(v)) for v in trial.truth(drawn, us, "float64").value):
        return drawn
    return next(iter(regimes.values()))


def _guarded(check: str, run: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """The rows of a check, or one FAIL with what the rule raised: it is a user's code, anything may come."""
    try:
        return run(*args)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        return [Row(check, "FAIL", diagnosis=f"raised {type(error).__name__}: {reason}")]


def _cotangents(trial: Trial, given: Leaves, settings: _Settings) -> dict[str, Leaves]:
    """By name: dense N(0, 1); 1 at one output, 0 elsewhere; 0 but for one leaf. A gradient has the cotangent 1."""
    like = outputs_like(trial, given)
    if trial.subject.kind == "gradient":
        return {"dense": [np.ones(())]}
    rng = np.random.default_rng(settings.seed + 3)
    found = {"dense": [rng.standard_normal(v.shape) for v in like]}
    for n, v in enumerate(like):
        if len(like) > 1:
            found[f"only output {n}"] = [u if m == n else np.zeros_like(u) for m, u in enumerate(found["dense"])]
        for index in rng.permutation(int(np.prod(v.shape)))[: 2 if settings.level == "fast" else 8]:
            hot = [np.zeros(w.shape) for w in like]
            hot[n].flat[index] = 1.0
            found[f"one-hot {n}.{index}"] = hot
    return found


def _oracles(
    trial: Trial, regimes: Regimes, us: dict[str, Leaves], settings: _Settings
) -> tuple[list[Row], list[Truth], list[str]]:
    """Checks 4 and 7 at every point; all cotangents at the first points, the dense one at the others."""
    rows: list[Row] = []
    truths: list[Truth] = []
    notes: list[str] = []
    for n, (regime, leaves) in enumerate(regimes.items()):
        for name, u in us.items() if n == 0 or settings.level == "full" else [("dense", us["dense"])]:
            for dtype in dict.fromkeys(("float64", *settings.dtypes)):
                truth = trial.truth(leaves, u, dtype)
                if not all(np.all(np.isfinite(v)) for v in truth.value) and regime != "given":
                    notes.append(f"{regime}: the function is not finite there; domain= says where it is defined")
                    continue
                truths.append(truth)
                where = regime if name == "dense" else f"{regime}, cotangent {name}"
                check = checks.ORACLE if dtype == "float64" else checks.PRODUCTION
                rows += _guarded(check, checks.oracle, trial, where, leaves, u, dtype, truth)
    return rows, truths, list(dict.fromkeys(notes))


def _with_second_order(
    trial: Trial, regimes: Regimes, settings: _Settings, rows: list[Row], notes: list[str]
) -> tuple[list[Row], list[str]]:
    """⟨v, Jᵀu⟩ is a scalar function of the arguments: its gradient through the rule against that of the reference."""
    if not (trial.traceable and trial.differentiable):
        return rows, [*notes, "order 2: rule and reference must be JAX code"]
    arguments, given = trial.subject.arguments, next(iter(regimes.values()))
    us = _cotangents(trial, given, settings)["dense"]
    rng = np.random.default_rng(settings.seed + 4)
    vs = [rng.standard_normal(leaf.shape) for leaf in arguments.differentiated(given)]

    def along(pullback: Pullback) -> Callable[..., Any]:
        def inner(*leaves: Any) -> Any:
            dtype = arguments.differentiated(leaves)[0].dtype
            pulled = pullback(list(leaves), [jnp.asarray(u, dtype) for u in us])[1]
            return sum(jnp.sum(jnp.asarray(v, g.dtype) * g) for v, g in zip(vs, pulled, strict=True))

        return inner

    truth, rule = along(trial.subject.truth), along(trial.subject.pullback)
    report = check(
        truth,
        given,
        gradient=jax.grad(rule, arguments.wrt),
        wrt=arguments.wrt,
        dtypes=("float64",),
        kinks=trial.kinks,
        seed=settings.seed,
        allow_zero=True,
    )
    names = {f"[{n}]": path for n, path in enumerate(arguments.paths)}
    for row in report.rows:
        rows.append(dataclasses.replace(row, path=names.get(row.path, row.path), subject="second derivative"))
    return rows, [*notes, *(f"order 2, {note}" for note in report.not_covered)]


def _merged(rows: Sequence[Row]) -> list[Row]:
    """The worst row of each check, leaf and dtype."""
    worst: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = row.check, row.path, row.dtype, row.subject
        worst[key] = max(worst.get(key, row), row, key=lambda row: (-SEVERITY.index(row.verdict), row.ratio))
    return list(worst.values())


def _dtypes(leaves: Leaves, dtypes: Sequence[Any] | None) -> tuple[str, ...]:
    """The production dtypes, the first one that of the example arguments."""
    if dtypes is not None:
        names = tuple(dtype if isinstance(dtype, str) else jnp.dtype(dtype).name for dtype in dtypes)
        for name in names:
            _known("dtypes", name, ("float64", "float32", "bfloat16", "float16"))
        return names
    return tuple(dict.fromkeys([*(str(leaf.dtype) for leaf in leaves if is_float(leaf)), "float32"]))


def _drawable(leaf: Any) -> Any:
    """A shape and dtype without values becomes a `Spec`."""
    return Spec(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _known(name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"{name} is {value!r}, allowed: {', '.join(map(str, allowed))}")


def _reproducer(subject: Subject, args: Sequence[Any], level: str, seed: int) -> str:
    """Three lines that run: the import of what is checked, arguments of the same shapes, the check."""
    rule = subject.rule if subject.kind == "gradient" else subject.function
    module, name = getattr(rule, "__module__", None), getattr(rule, "__qualname__", "")
    importable = module not in (None, "__main__") and name.isidentifier()
    source = (
        f"from {module} import {name}"
        if importable
        else f"# {name or 'the function'} is defined where you called check"
    )
    spec = jax.tree.map(text_of, tuple(args))
    called = subject.name if subject.name.isidentifier() else "f"
    style = f", {'value_and_grad' if subject.has_value else 'gradient'}={name}" if subject.kind == "gradient" else ""
    return "\n".join(
        (
            f"import jaxbp, jaxbp.checker; {source}",
            f"args = jaxbp.checker.inputs({spec!r}, seed={seed})",
            f"jaxbp.check({called}, args{style}, level={level!r}, seed={seed}).raise_if_failed()",
        )
    )
