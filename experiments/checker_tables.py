"""Measures the checker: planted bugs caught, false alarms, verdicts on rules in use.

Run from the repository, with the extra [dev] installed: ``python -m experiments.checker_tables mutations`` (half an
hour), ``false-alarms`` (half an hour), ``wrong-rules`` and ``right-rules`` (10 minutes each), ``wrong-rules-others`` (5
minutes, with PyTorch beside) or ``real-world`` (20 seconds). Writes experiments/results/checker_<table>.md.

The same mutants go through `jax.test_util.check_grads` and `chex.assert_numerical_grads`, in reverse mode, the one that
a custom_vjp function has, and with their other defaults; whatever they raise counts as caught.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

import jaxbp
from experiments import report
from jaxbp.checker.trial import precise

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT.parent / "tests")]

import generated  # noqa: E402
import planted  # noqa: E402
import real_world  # noqa: E402
import right_rules  # noqa: E402
import wrong_rules  # noqa: E402

Caught = Callable[[planted.Subject], bool]


def by_check(subject: planted.Subject) -> bool:
    return not jaxbp.check(subject.fun, subject.args, **subject.options).passed


def by(checker: Callable[..., None], **options: Any) -> Caught:
    """Whether a checker of flat functions raises."""

    def caught(subject: planted.Subject) -> bool:
        fun, leaves = planted.differentiable(subject)
        try:
            checker(fun, leaves, order=1, **options)
        except Exception as error:  # any kind of complaint is one
            logging.debug("%s", error)
            return True
        return False

    return caught


def gradcheck(fun: Callable[..., Any], leaves: Sequence[jax.Array], order: int) -> None:
    """`torch.autograd.gradcheck` of a flat function of JAX, in float64, as it asks for."""
    import torch

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *xs: Any) -> Any:
            out, ctx.pullback = jax.vjp(fun, *(jnp.asarray(x.detach().numpy()) for x in xs))
            ctx.tree = jax.tree.structure(out)
            found = tuple(torch.from_numpy(np.array(a)) for a in jax.tree.leaves(out))
            return found[0] if len(found) == 1 else found

        @staticmethod
        def backward(ctx: Any, *us: Any) -> Any:
            cotangents = jax.tree.unflatten(ctx.tree, [jnp.asarray(u.numpy()) for u in us])
            return tuple(torch.from_numpy(np.array(g)) for g in ctx.pullback(cotangents))

    with precise():
        torch.autograd.gradcheck(Rule.apply, [torch.tensor(np.asarray(a, float), requires_grad=True) for a in leaves])


CHECKERS: dict[str, Caught] = {
    "jaxbp.check": by_check,
    "check_grads": by(check_grads, modes=["rev"]),
    "chex": by(chex.assert_numerical_grads, modes=["rev"]),
}


def mutations() -> Iterable[str]:
    """Caught of 12 runs (4 seeds × 3 shapes) for each bug, and the same for the right rules, where 0 is wanted."""
    yield table_head(
        "bug", *(f"{name}: wrong rule" for name in CHECKERS), *(f"{name}: right rule" for name in CHECKERS)
    )
    for bug in planted.BUGS:
        wrong, right = ([build(*run) for run in planted.RUNS] for build in (bug.build, bug.right))
        counts = [sum(map(caught, subjects)) for subjects in (wrong, right) for caught in CHECKERS.values()]
        yield table_row(bug, *(f"{count}/{len(planted.RUNS)}" for count in counts))


def false_alarms() -> Iterable[str]:
    """How many of the generated correct subjects do not pass, and which."""
    yield table_head("subjects", "not passed")
    for name, subjects in (
        ("generated networks", generated.networks(1000, 0)),
        ("generated custom_vjp functions", generated.rules(200, 0)),
    ):
        bad = []
        for count, subject in enumerate(subjects, 1):
            if not jaxbp.check(subject.fun, subject.args, **subject.options).passed:
                bad.append(subject.name)
            if count % 50 == 0:
                print(count, len(bad), file=sys.stderr, flush=True)
        yield table_row(f"{count} {name}", f"{len(bad)} {', '.join(bad)}")


def real() -> Iterable[str]:
    """The verdict on each rule in use, and the one that is right."""
    yield table_head("rule", "verdict", "right")
    for case in real_world.CASES:
        yield table_row(case.name, jaxbp.check(case.fun, case.args, **case.options).verdict, case.expected)


def registry_of_wrong_rules() -> Iterable[str]:
    """By kind: wrong rules caught at both levels, right twins that pass, which are not as they should be, seconds."""
    yield table_head(
        "kind", "caught, fast", "caught, full", "right twins that pass", "not caught or accused", "seconds"
    )
    for kind in dict.fromkeys(case.kind for case in wrong_rules.CASES):
        cases = [case for case in wrong_rules.CASES if case.kind == kind]
        fast, full, right = [], [], []
        seconds: list[float] = []
        for case in cases:
            for found, build, level in (
                (fast, case.wrong, "fast"),
                (full, case.wrong, "full"),
                (right, case.right, "fast"),
            ):
                subject = build()
                report = jaxbp.check(subject.fun, subject.args, **{"level": level, **subject.options})
                found.append(report.verdict == ("PASS" if found is right else "FAIL"))
                seconds.append(report.seconds)
        ours = zip(cases, fast, full, right, strict=True)
        bad = [case.name for case, *found in ours if not all(found)]
        counts = [f"{sum(found)} of {len(cases)}" for found in (fast, full, right)]
        yield table_row(kind, *counts, ", ".join(bad), f"{np.median(seconds):.1f} (median), {max(seconds):.1f} (most)")


def others() -> Iterable[str]:
    """By kind: wrong rules at which other checkers raise, and right twins at which they do, of those that they take:
    floating-point arrays, and functions of JAX.
    """
    peers = {name: caught for name, caught in CHECKERS.items() if name != "jaxbp.check"}
    peers["torch gradcheck"] = by(gradcheck)
    yield table_head("kind", "taken", *(f"{name}: {rule} rule" for name in peers for rule in ("wrong", "right")))
    for kind in dict.fromkeys(case.kind for case in wrong_rules.CASES):
        cases = [case for case in wrong_rules.CASES if case.kind == kind]
        taken = [case for case in cases if takes(case.right())]
        builds = [case.wrong for case in taken], [case.right for case in taken]
        counts = [sum(caught(as_planted(build())) for build in part) for caught in peers.values() for part in builds]
        yield table_row(kind, f"{len(taken)} of {len(cases)}", *counts)


def takes(subject: wrong_rules.Subject) -> bool:
    """Whether a checker of flat functions can call the function."""
    try:
        fun, leaves = planted.differentiable(as_planted(subject))
        jax.vjp(fun, *leaves)
    except Exception as error:  # whatever a function says to other arguments, or a rule in NumPy to JAX
        logging.debug("%s", error)
        return False
    return True


def as_planted(subject: wrong_rules.Subject) -> planted.Subject:
    """With its arguments drawn, and no options but its rule."""
    args = jaxbp.checker.inputs(subject.args) if isinstance(subject.args, str) else subject.args
    rule = {name: subject.options[name] for name in ("gradient", "value_and_grad", "vjp") if name in subject.options}
    return planted.Subject(subject.fun, args, rule)


def registry_of_right_rules() -> Iterable[str]:
    """By kind: right rules that pass at both levels, and which do not."""
    yield table_head("kind", "pass, fast", "pass, full", "accused")
    for kind in dict.fromkeys(case.kind for case in right_rules.CASES):
        cases = [case for case in right_rules.CASES if case.kind == kind]
        found = [
            [
                jaxbp.check(s.fun, s.args, **{"level": level, **s.options}).verdict
                for s in [case.right() for case in cases]
            ]
            for level in ("fast", "full")
        ]
        bad = [f"{case.name} ({a}, {b})" for case, a, b in zip(cases, *found, strict=True) if {a, b} != {"PASS"}]
        yield table_row(kind, *(f"{level.count('PASS')} of {len(cases)}" for level in found), ", ".join(bad))


def table_head(*names: str) -> str:
    return f"{table_row(*names)}\n{table_row(*['---'] * len(names))}"


def table_row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


TABLES = {
    "mutations": mutations,
    "false-alarms": false_alarms,
    "real-world": real,
    "wrong-rules": registry_of_wrong_rules,
    "wrong-rules-others": others,
    "right-rules": registry_of_right_rules,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes and prints one table."""
    parser = report.parser(__doc__)
    parser.add_argument("table", choices=TABLES)
    with report.study("checker_tables", parser, arguments) as study:
        table = study.options.table
        with (study.options.out / f"checker_{table.replace('-', '_')}.md").open("w", encoding="utf-8") as file:
            head = f"# The checker: {table.replace('-', ' ')}\n\n{inspect.cleandoc(str(TABLES[table].__doc__))}"
            for line in chain([head, f"JAX {jax.__version__}, {jax.default_backend()}.\n"], TABLES[table]()):
                print(line, file=file, flush=True)
                print(line, flush=True)


if __name__ == "__main__":
    main()
