"""jaxbp in pytest: a fixture that checks a hand-written backward pass, and shows the whole report if it is wrong::

    def test_cube(check_gradient):
        check_gradient(cube, "f32[8]")

    @pytest.mark.gradient(level="full", domain=(0.1, 10))       # options of jaxbp.check, for all checks of the test
    def test_log(check_gradient):
        check_gradient(my_log, "f32[8]", order=2)

`pytest --gradient-level full` is for all checks that say no level. The report of a failure is a section of its test.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from jaxbp.checker import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "how thorough check_gradient is where a test does not say (default: fast)"
    parser.getgroup("jaxbp").addoption("--gradient-level", choices=("fast", "full"), default="fast", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gradient(**options): options of jaxbp.check for the check_gradient fixture")


@pytest.fixture
def check_gradient(request: pytest.FixtureRequest) -> "Callable[..., Report]":
    """`jaxbp.check(fun, args, **options)` as an assertion: it returns the report, or raises `CheckFailed`, an
    AssertionError whose message is the first cause. Its own options go before those of the marker, the nearest marker's
    before the others', and these before --gradient-level.
    """
    chosen: dict[str, Any] = {"level": request.config.getoption("--gradient-level")}
    for marker in reversed([*request.node.iter_markers("gradient")]):
        chosen |= marker.kwargs

    def checked(fun: Any, args: Any = (), **options: Any) -> "Report":
        __tracebackhide__ = True  # the test's own line is shown, not this one
        from jaxbp.checker import CheckFailed, check

        report = check(fun, args, **chosen | options)
        if not report.passed:
            lines = str(report).splitlines()
            request.node.add_report_section("call", "gradient", "\n".join(lines))
            raise CheckFailed("\n".join(lines[:2]))
        return report

    return checked
