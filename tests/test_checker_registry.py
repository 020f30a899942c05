"""A sample of the registries of wrong and right rules; all: python -m experiments.checker_tables wrong-rules."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
import right_rules
import wrong_rules
from tiers import one_in

import jaxbp
from jaxbp.checker.report import Report

WRONG, RIGHT = wrong_rules.CASES[8::24], [*wrong_rules.CASES[14::60], *right_rules.CASES[::20]]


def checked(build: Callable[[], wrong_rules.Subject], **options: Any) -> Report:
    """Of a subject that is built, too, as its author runs JAX."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        subject = build()
        return jaxbp.check(subject.fun, subject.args, **subject.options, **options)


@pytest.mark.parametrize("case", one_in(13, WRONG), ids=lambda case: case.name)
def test_a_wrong_rule_is_caught(case: wrong_rules.Case) -> None:
    report = checked(case.wrong)
    assert report.verdict == "FAIL", report


@pytest.mark.parametrize("case", one_in(14, RIGHT), ids=lambda case: case.name)
def test_a_right_rule_is_not_accused(case: right_rules.Case) -> None:
    report = checked(case.right)
    assert report.verdict == "PASS", report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TD semi-gradient as the reference", "learned step size"])
def test_second_derivatives_are_not_compared_where_the_reference_stops_gradients(name: str) -> None:
    [case] = (case for case in right_rules.CASES if case.name == name)
    report = checked(case.right, order=2, dtypes="float32")
    assert report.verdict == "PASS" and any("stops gradients" in note for note in report.not_covered), report


@pytest.mark.slow
def test_a_third_derivative_that_the_reference_loses() -> None:
    """Of |z|² it is 0; autodiff's, by way of |z|, is what rounding leaves of terms as large as 1/|z|."""
    [case] = (case for case in wrong_rules.CASES if case.name == "|z|², the imaginary part lost")
    assert checked(case.right, level="full").verdict == "PASS"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("a reduction of two arrays", "fast"),
        ("pseudo-inverse", "fast"),
        ("log-determinant by LU", "full"),
        ("log-determinant by QR", "fast"),
        ("8-bit backward", "full"),
        ("square root of SPD matrices", "full"),
    ],
)
def test_a_right_rule_that_was_accused(name: str, level: str) -> None:
    """Reductions by a function; singular matrices; slopes of infinite outputs; higher derivatives of what is quantised,
    and of a projection.
    """
    [case] = (case for case in right_rules.CASES if case.name == name)
    report = checked(case.right, level=level)
    assert report.verdict == "PASS", report


def test_the_registries() -> None:
    """At least 150 wrong rules, three of each kind, each named once; the right twin is another function."""
    kinds = [case.kind for case in wrong_rules.CASES]
    assert len(kinds) >= 150
    assert all(kinds.count(kind) >= 3 for kind in kinds)
    for cases in (wrong_rules.CASES, right_rules.CASES):
        assert len({(case.kind, case.name) for case in cases}) == len(cases)
    for case in wrong_rules.CASES[::20]:
        wrong, right = case.wrong(), case.right()
        assert wrong.fun is not right.fun or wrong.options != right.options
