"""The fixture `check_gradient` in a pytest of its own: what it says, which options hold."""

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import jax
import pytest

class Passed:
    passed = True

def test_wrong(check_gradient):
    ruled = jax.custom_vjp(lambda x: x**3)
    ruled.defvjp(lambda x: (x**3, x), lambda x, u: (u[:1],))
    check_gradient(ruled, "f32[3]", level="fast")

@pytest.fixture
def options(monkeypatch):
    found = []
    monkeypatch.setattr("jaxbp.checker.check", lambda *args, **options: found.append(options) or Passed())
    return found

def test_command_line(options, check_gradient):
    assert isinstance(check_gradient(len), Passed)
    check_gradient(len, level="fast")
    assert options == [{"level": "full"}, {"level": "fast"}]

@pytest.mark.gradient(level="fast", seed=1)
class TestMarked:
    @pytest.mark.gradient(seed=2, probes=1)
    def test_nearest(self, options, check_gradient):
        check_gradient(len, probes=3)
        assert options == [{"level": "fast", "seed": 2, "probes": 3}]
"""


def test_the_fixture(pytester: pytest.Pytester) -> None:
    """A failure shows the test's line, the first cause, and the whole report as a section of its own."""
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("--strict-markers", "--gradient-level", "full")
    result.assert_outcomes(failed=1, passed=2)
    shown = [
        '>*check_gradient(ruled, "f32?3?", level="fast")',
        "E *CheckFailed: jaxbp.check *: FAIL *",
        "*Captured gradient call*",
        "*FAIL contract*",
        "reproduce:",
    ]
    result.stdout.fnmatch_lines(shown)


def test_an_unknown_level(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--gradient-level", "slow")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--gradient-level: invalid choice: 'slow'*"])
