"""Measures the checker: planted bugs caught, false alarms, verdicts on rules in use.

Run from the repository, with the extra [dev] installed: ``python -m experiments.checker_tables mutations`` (half an
hour), ``false-alarms`` (half an hour), ``wrong-rules`` (20 minutes) or ``real-world`` (20 seconds). Writes
experiments/results/checker_<table>.md.

The same mutants go through `jax.test_util.check_grads` and `chex.assert_numerical_grads`, in reverse mode, the one that
a custom_vjp function has, and with their other defaults; whatever they raise counts as caught.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import chex
import jax
from jax.test_util import check_grads

import jaxbp
from experiments import report

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT.parent / "tests")]

import generated  # noqa: E402
import planted  # noqa: E402
import real_world  # noqa: E402
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
    """By kind: the wrong rules that are caught at level fast, the verdicts on their right twins, and what crashes."""
    columns = ("PASS", "FAIL", "INCONCLUSIVE or UNEXERCISED", "crash")
    yield table_head(
        "kind", "wrong rules caught", "wrong rules that crash", *(f"right twins: {name}" for name in columns)
    )
    for kind in dict.fromkeys(case.kind for case in wrong_rules.CASES):
        cases = [case for case in wrong_rules.CASES if case.kind == kind]
        wrong = [_verdict(case.wrong) for case in cases]
        right = [_verdict(case.right) for case in cases]
        other = len(cases) - sum(right.count(name) for name in ("PASS", "FAIL", "crash"))
        counts = (right.count("PASS"), right.count("FAIL"), other, right.count("crash"))
        yield table_row(kind, f"{wrong.count('FAIL')} of {len(cases)}", wrong.count("crash"), *counts)


def _verdict(build: Callable[[], wrong_rules.Subject]) -> str:
    """Of a subject at level fast; "crash" where an exception leaves the checker."""
    subject = build()
    try:
        return str(jaxbp.check(subject.fun, subject.args, **subject.options).verdict)
    except Exception:  # whatever it is, a report belongs in its place
        return "crash"


def table_head(*names: str) -> str:
    return f"{table_row(*names)}\n{table_row(*['---'] * len(names))}"


def table_row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


TABLES = {
    "mutations": mutations,
    "false-alarms": false_alarms,
    "real-world": real,
    "wrong-rules": registry_of_wrong_rules,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes and prints one table."""
    parser = report.parser(__doc__)
    parser.add_argument("table", choices=TABLES)
    with report.study("checker_tables", parser, arguments) as study:
        table = study.options.table
        with (study.options.out / f"checker_{table.replace('-', '_')}.md").open("w", encoding="utf-8") as file:
            head = f"# The checker: {table.replace('-', ' ')}\n\n{TABLES[table].__doc__}"
            for line in chain([head, f"JAX {jax.__version__}, {jax.default_backend()}.\n"], TABLES[table]()):
                print(line, file=file, flush=True)
                print(line, flush=True)


if __name__ == "__main__":
    main()
