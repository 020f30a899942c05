"""`jaxbp.check`: every planted bug is found and named, what is right passes, a report helps the one who reads it."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generated
import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
import real_world
from tiers import one_in

import jaxbp
from jaxbp import losses
from jaxbp.checker import checks, inputs
from jaxbp.checker.diagnosis import diagnose
from jaxbp.checker.network import _rules, layer_errors, parts
from jaxbp.checker.numerics import difference
from jaxbp.checker.report import CheckFailed, Report, Row
from jaxbp.checker.search import _moves, numbers_of
from jaxbp.cli import main


def custom(fun: Callable[..., Any], forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    ruled = jax.custom_vjp(lambda *args: fun(*args))
    ruled.defvjp(forward, backward)
    return ruled


def cube_with(backward: Callable[..., Any]) -> Any:
    return custom(lambda x: x**3, lambda x: (x**3, x), backward)


CUBE = cube_with(lambda x, u: (3 * x**2 * u,))


# Samples of planted bugs and right rules; all of them: experiments/checker_tables.py --------------------------------


@pytest.mark.parametrize("bug", one_in(48, planted.BUGS[::-16]), ids=str)
def test_planted_bug(bug: planted.Bug) -> None:
    """Caught; the first line of the report names a leaf where the error enters; the diagnosis is the right one."""
    subject = bug.build(*planted.RUNS[planted.BUGS.index(bug) % len(planted.RUNS)])
    report = jaxbp.check(subject.fun, subject.args, **subject.options)
    assert report.verdict == "FAIL", report
    assert not bug.leaf or report.failures[0].path in bug.leaf, report
    if bug.diagnosis is not None:
        assert any(re.search(bug.diagnosis, row.diagnosis) for row in report.failures), report


@pytest.mark.slow
@pytest.mark.parametrize("case", real_world.CASES[2::8], ids=lambda case: case.name)
def test_rule_in_use(case: real_world.Case) -> None:
    report = jaxbp.check(case.fun, case.args, **case.options)
    assert report.verdict == case.expected, report


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, 32, 8))
def test_right_rule(number: int) -> None:
    subject = generated.custom_vjp(number, seed=1)
    report = jaxbp.check(subject.fun, subject.args, **subject.options)
    assert report.passed, f"{subject.name}: {report}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*jaxbp.activations.ACTIVATIONS][::5])
def test_activation(name: str) -> None:
    report = jaxbp.check(jaxbp.activations.get(name))
    assert report.passed, str(report)


@pytest.mark.slow
def test_slopes_where_they_are_no_kinks() -> None:
    """An infinity has no other side, and a slope that goes through 0 is no kink."""
    for name in ("leaky_relu", "hard_silu"):
        report = jaxbp.check(jaxbp.activations.get(name), dtypes="float32")
        assert report.passed, str(report)


def test_a_margin_has_no_left() -> None:
    """The hinge loss where a margin is exactly 0: its slope is that of one side, and the label moves the other way."""
    margins, *_ = _rules([], losses.get("hinge"), (2,), seed=3)
    assert jaxbp.check(margins.fun, margins.args, seed=3, **margins.options).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "seed"),
    [
        (jaxbp.MLP((8, 16, 16, 4), "relu"), 0),
        (jaxbp.MLP((6, 6, 10, 8), ("relu", "gelu"), "leaky_relu", "kl_divergence"), 48594486),
    ],
    ids=["no unit of one layer decides for the next", "autodiff is right where both sides have another slope"],
)
def test_a_sample_of_zeros_is_at_the_kinks_of_all_layers(net: jaxbp.MLP, seed: int) -> None:
    (apply,) = (part for part in parts(net, seed, "fast") if part.name == "apply")
    assert jaxbp.check(apply.fun, apply.args, seed=seed, **apply.options).verdict != "FAIL"


def test_numbers_that_xla_takes_for_0_are_not_tried() -> None:
    """Beside the least number that a function compares with."""
    tiny = float(np.finfo(np.float32).tiny)
    around = dict(_moves("fast", [tiny]))["boundary 0"](np.zeros(64), np.random.default_rng(0))
    found = np.abs(around.astype(np.float32))
    assert np.float32(tiny) in found and np.all((found == 0) | (found >= tiny))


@pytest.mark.slow
def test_second_derivatives_by_hand() -> None:
    """σ″ beside σ, and the Hessian of a network, which level "full" adds; each once wrong."""
    bent = jaxbp.Activation("bent", jnp.sin, lambda s, x: jnp.cos(s), d2sigma=lambda s, x: jnp.sin(s))
    report = jaxbp.check(bent, dtypes="float32")
    assert {(row.subject, row.path) for row in report.failures} == {("second derivatives", "[0]['σ′ bent']")}
    for hidden, verdict in (("tanh", "PASS"), (bent, "FAIL")):
        *_, hessian = parts(jaxbp.MLP((2, 2, 2), hidden), 0, "full")
        assert hessian.name == "hvp"
        assert jaxbp.check(hessian.fun, hessian.args, dtypes=("float32",), **hessian.options).verdict == verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", [*jaxbp.losses.LOSSES][::3])
def test_loss(name: str) -> None:
    report = jaxbp.check(jaxbp.losses.get(name))
    assert report.passed, str(report)


def test_whole_numbers_are_tried_where_they_are_compared() -> None:
    """The label of what does not count is no token, and a step is compared with nothing."""

    def loss(table: Any, tokens: Any, labels: Any, step: Any) -> Any:
        return jnp.sum(jnp.where(labels == -7, 0.0, table[jnp.clip(tokens, 0, 4)])) * step

    ids = jnp.zeros(3, jnp.int32)
    numbers = numbers_of([jax.make_jaxpr(jax.jit(loss))(jnp.ones(5), ids, ids, 2).jaxpr], 4)
    assert numbers.equal == [[], [], [-7], []]
    assert -7 in numbers.whole[2] and {0, 4} <= {*numbers.whole[1]} and -7 not in numbers.whole[1]
    assert numbers.whole[3] == []


def test_complex_arguments_can_be_said_as_text() -> None:
    (z,) = inputs("c64[3]", "zeros")
    assert (z.shape, z.dtype) == ((3,), np.complex64)
    assert np.any(z.real != 0) and np.any(z.imag != 0)


@pytest.mark.slow
def test_a_linear_solve_is_checked_in_float64() -> None:
    logdet = custom(
        lambda a: jnp.linalg.slogdet(a)[1],
        lambda a: (jnp.linalg.slogdet(a)[1], a),
        lambda a, u: (u * jnp.linalg.inv(a),),
    )
    report = jaxbp.check(logdet, "f32[2,2]")
    assert (report.failures[0].check, report.failures[0].dtype) == ("float64 oracle", "float64")
    assert "transpose" in report.failures[0].diagnosis


@pytest.mark.slow
def test_a_mask_is_no_kink() -> None:
    """At an empty mask the function is smooth in x, whatever it is for another mask."""
    masked = custom(
        lambda x, m: jnp.sum(jnp.where(m > 0, jnp.abs(x), 0.0)),
        lambda x, m: (jnp.sum(jnp.where(m > 0, jnp.abs(x), 0.0)), (x, m)),
        lambda r, u: (u * jnp.sign(r[0]), None),
    )
    report = jaxbp.check(masked, (jnp.arange(1.0, 5.0), jnp.ones(4)), wrt=0)
    assert report.verdict == "FAIL"
    assert not [row for row in report.failures if "kink" in row.diagnosis]


# What a report says --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_whose_own_activation_is_wrong_is_told_so_first() -> None:
    sine = jaxbp.Activation("sine", jnp.sin, lambda s, x: -jnp.cos(s))
    report = jaxbp.check(jaxbp.MLP((3, 4, 2), hidden=sine), dtypes="float32")
    first = report.failures[0]
    assert (first.subject, first.path) == ("rules", "[0]['σ sine']")
    assert "sign" in " ".join(row.diagnosis for row in report.failures if row.path == first.path)
    assert {row.subject for row in report.failures} == {"rules", "apply", "value_and_grad"}


def test_the_message_of_a_failure_its_reproducer_and_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaf, index, got, want, error ÷ bound, diagnosis; three lines that raise the same."""
    (tmp_path / "cubes.py").write_text(
        "import jax\ncube = jax.custom_vjp(lambda x: x**3)\n"
        "cube.__module__, cube.__name__, cube.__qualname__ = __name__, 'cube', 'cube'\n"
        "cube.defvjp(lambda x: (x**3, x), lambda x, u: (2 * x**2 * u,))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import cubes  # type: ignore[import-not-found]

    report = jaxbp.check(cubes.cube, "f32[4]")
    with pytest.raises(CheckFailed, match=r"jaxbp.check cube: FAIL") as raised:
        report.raise_if_failed()
    line = str(raised.value).splitlines()[1]
    assert re.search(r"FAIL .*\[0\]\[\d\].*got .*, want .*, error ÷ bound", line)
    assert "matches after × 1.5" in str(raised.value)
    assert len(report.reproducer.splitlines()) == 3
    with pytest.raises(CheckFailed):
        exec(report.reproducer, {})
    del sys.modules["cubes"]
    found = json.loads(report.json())
    assert (found["verdict"], found["passed"]) == ("FAIL", False)
    assert set(found["rows"][0]) == {field for field in Row.__dataclass_fields__}


def test_json_has_no_nan() -> None:
    row = Row("float64 oracle", "FAIL", "[0]", got=float("nan"), want=float("inf"), ratio=float("inf"))
    text = Report("f", (row,), (), "", 0.0, 0, "fast").json()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["rows"][0]["got"] == "nan"


def test_a_report_of_1000_leaves_stays_readable() -> None:
    rows = tuple(Row("float64 oracle", "FAIL", f"[0][{n}].w", got=1.0, want=2.0, ratio=9.0) for n in range(1000))
    text = str(Report("deep", rows, (), "", 0.0, 0, "fast"))
    assert len(text.splitlines()) < 60
    assert "980 more rows" in text
    passed = tuple(Row("float64 oracle", "PASS", row.path, ratio=0.5) for row in rows)
    assert len(str(Report("deep", passed, (), "", 0.0, 0, "fast")).splitlines()) == 2


def test_nothing_checked_is_no_pass() -> None:
    assert not Report("f", (), (), "", 0.0, 0, "fast").passed


# The checks, one at a time -------------------------------------------------------------------------------------------


def verdicts(report: Report, check: str) -> set[str]:
    return {row.verdict for row in report.rows if row.check == check}


def test_a_function_without_a_rule_is_not_exercised() -> None:
    report = jaxbp.check(jnp.sin, "f32[4]")
    assert report.verdict == "UNEXERCISED"
    assert verdicts(report, "provenance") == {"UNEXERCISED"}


@pytest.mark.slow
def test_a_leaf_without_gradient_is_not_exercised_unless_that_is_meant() -> None:
    lost = custom(lambda x, y: x + 0 * y, lambda x, y: (x + 0 * y, None), lambda _, u: (u, 0 * u))
    report = jaxbp.check(lost, "f32[3] f32[3]", dtypes="float32")
    assert [(row.verdict, row.path) for row in report.failures] == [("UNEXERCISED", "[1]")]
    assert jaxbp.check(lost, "f32[3] f32[3]", allow_zero=[1], dtypes="float32").passed
    assert jaxbp.check(lost, "f32[3] f32[3]", allow_zero=["[1]"], dtypes="float32").passed


@pytest.mark.slow
def test_a_reference_in_numpy_is_served_by_differences_and_the_report_says_what_is_missing() -> None:
    def smooth(x: Any) -> Any:
        return np.sum(np.sin(np.asarray(x)) ** 2)

    right = jaxbp.check(smooth, "f64[5]", gradient=lambda x: 2 * np.sin(x) * np.cos(x))
    assert right.passed, right
    assert verdicts(right, "independent numerics") == {"PASS"}
    assert any(note.startswith(checks.ORACLE) for note in right.not_covered)
    slightly = jaxbp.check(smooth, "f64[5]", gradient=lambda x: 2.002 * np.sin(x) * np.cos(x))
    assert verdicts(slightly, "independent numerics") == {"FAIL"}
    wrong = jaxbp.check(smooth, "f64[5]", gradient=lambda x: 3 * np.sin(x) * np.cos(x))
    assert verdicts(wrong, "independent numerics") == {"FAIL"}
    assert "the remainder has slope 1." in wrong.failures[0].diagnosis


@pytest.mark.slow
def test_the_report_says_when_it_ran_nothing_eagerly() -> None:
    def many(x: Any) -> Any:
        return sum(jnp.sum(jnp.sin(x[:n])) for n in range(1, 9))

    ruled = custom(many, lambda x: jax.vjp(many, x), lambda pull, u: pull(u))
    fast, full = (jaxbp.check(ruled, "f32[8]", level=level, dtypes="float32") for level in ("fast", "full"))  # type: ignore[arg-type]
    assert fast.passed and full.passed, f"{fast}{full}"
    assert [any("eager" in note for note in report.not_covered) for report in (fast, full)] == [True, False]


@pytest.mark.slow
def test_second_order() -> None:
    """The gradient is right; what is kept for it is cut off from the arguments, so its derivative is wrong."""
    cut = custom(
        lambda x: jnp.sin(x),
        lambda x: (jnp.sin(x), jax.lax.stop_gradient(jnp.cos(x))),
        lambda cosine, u: (cosine * u,),
    )
    assert jaxbp.check(cut, "f32[4]", dtypes="float32").passed
    report = jaxbp.check(cut, "f32[4]", order=2, dtypes="float32")
    assert {row.subject for row in report.failures} == {"second derivative"}
    assert jaxbp.check(CUBE, "f32[4]", order=3, dtypes="float32").passed
    cosine = custom(jnp.cos, lambda x: (jnp.cos(x), jax.lax.stop_gradient(jnp.sin(x))), lambda sine, u: (-sine * u,))
    cut_later = custom(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, u: (u * cosine(x),))
    report = jaxbp.check(cut_later, "f32[4]", order=3, dtypes="float32")
    assert {row.subject for row in report.failures} == {"third derivative"}


@pytest.mark.slow
def test_a_reference_declares_a_gradient_unless_it_is_off_by_a_number() -> None:
    through = custom(jnp.round, lambda x: (jnp.round(x), None), lambda _, u: (u,))
    report = jaxbp.check(through, "f32[4]", reference=lambda x: x)
    assert report.passed, report
    assert any("declares a gradient" in note for note in report.not_covered)
    shifted = custom(lambda x: jnp.sin(x) + 0.1, lambda x: (jnp.sin(x) + 0.1, x), lambda x, u: (jnp.cos(x) * u,))
    report = jaxbp.check(shifted, "f32[4]", reference=jnp.sin)
    assert (report.verdict, report.failures[0].diagnosis) == ("FAIL", "the function is the reference plus 0.1")


KINKS = {"left": 0.0, "right": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("side", [*KINKS])
def test_the_convention_at_a_kink(side: str) -> None:
    """relu with the slope of one side at exactly 0: right by that convention, wrong by the other."""
    slope = KINKS[side]
    relu = custom(
        lambda x: jnp.where(x > 0, x, 0),
        lambda x: (jnp.where(x > 0, x, 0), x),
        lambda x, u: (jnp.where(x > 0, u, jnp.where(x == 0, slope * u, 0)),),
    )
    assert jaxbp.check(relu, "f32[9]", kinks=side, dtypes="float32").passed  # type: ignore[arg-type]
    assert jaxbp.check(relu, "f32[9]", kinks="subgradient", dtypes="float32").passed
    others: Any = {"left": "right", "right": "left"}[side]
    other = jaxbp.check(relu, "f32[9]", kinks=others, dtypes="float32")
    assert "only at a kink" in other.failures[0].diagnosis


@pytest.mark.slow
def test_a_kink_is_not_blamed_for_an_error_far_larger_than_it() -> None:
    """Numbers so large that sin is rough at the distance at which the sides of a kink are looked at."""
    wrong = custom(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, u: (u * jnp.cos(x) * (1 + (x > 1e6).astype(x.dtype)),))
    report = jaxbp.check(wrong, "f32[4]")
    assert report.verdict == "FAIL"
    assert not any("kink" in row.diagnosis for row in report.failures), report


@pytest.mark.slow
def test_the_domain() -> None:
    root = custom(jnp.sqrt, lambda x: (jnp.sqrt(x),) * 2, lambda y, u: (u / (2 * y),))
    assert jaxbp.check(root, (jnp.asarray([1.0, 2.0], jnp.float32),), domain=(0.1, 5.0)).passed


def test_what_is_drawn_and_not_differentiated_lies_in_the_domain_too() -> None:
    rule = custom(lambda x, a: x * jnp.abs(a), lambda x, a: (x * jnp.abs(a), a), lambda a, u: (u * a, None))
    assert jaxbp.check(rule, "f32[4], f32[4]", wrt=(0,), domain="positive", dtypes="float32").passed


def test_arguments_of_unequal_domains_are_not_made_equal() -> None:
    rule = custom(lambda x, a: x * jnp.abs(a), lambda x, a: (x * jnp.abs(a), (x, a)), lambda r, u: (u * r[1], u * r[0]))
    assert jaxbp.check(rule, "f32[4], f32[4]", domain={0: (-3.0, 3.0), 1: (0.5, 5.0)}, dtypes="float32").passed


def test_what_is_between_the_slopes_beside_a_kink_is_right() -> None:
    """Of a difference of two maxima: each may choose its own argument, which no one-sided slope shows."""

    def function(x: np.ndarray) -> float:
        return float(max(x[0], x[1]) - max(x[0], x[2]))

    def gradient(x: np.ndarray) -> np.ndarray:
        first, second = float(x[0] >= x[1]), float(x[0] > x[2])
        return np.array([first - second, 1 - first, second - 1])

    assert jaxbp.check(function, (np.zeros(3),), gradient=gradient).verdict != "FAIL"
    wrong = jaxbp.check(function, (np.zeros(3),), gradient=lambda x: 2 * gradient(x))
    assert wrong.verdict == "FAIL"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": {"y": (0.0, 1.0)}}, "domain has 'y', the arguments are 0, 'x'"),
        ({"domain": "positiv"}, "did you mean 'positive'"),
        ({"domain": (1.0, 0.0)}, "want a lower end and a higher one"),
    ],
    ids=["argument", "name", "ends"],
)
def test_a_domain_that_is_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxbp.check(lambda x: x, "f32[2]", reference=lambda x: x, **options)


def test_what_a_rule_raises_becomes_a_row() -> None:
    def broken(x: Any, u: Any) -> Any:
        raise KeyError("lost")

    report = jaxbp.check(cube_with(broken), "f32[4]")
    assert (report.verdict, report.failures[0].check) == ("FAIL", "contract")
    assert "KeyError: 'lost'" in report.failures[0].diagnosis


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["rounding.with_spread", "jaxpr.bound"])
def test_a_fault_of_the_checker_is_none_of_the_function(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"jaxbp.checker.{broken}", lambda *args: 1 / 0)
    report = jaxbp.check(CUBE, "f32[4]")
    assert report.verdict == "INCONCLUSIVE"
    assert "the checker cannot evaluate" in report.failures[0].diagnosis
    assert not any("JAX cannot differentiate" in note for note in report.not_covered)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["bfloat16", (jnp.bfloat16,)], ids=["text", "type"])
def test_dtypes_as_texts_or_types(dtypes: Any) -> None:
    report = jaxbp.check(CUBE, "f32[4]", dtypes=dtypes)
    assert {row.dtype for row in report.rows if row.check == "production dtype"} == {"bfloat16"}


def test_a_difference_and_its_error_bar() -> None:
    value, bar, _ = difference(lambda t: [np.exp(np.asarray(1 + t))], [np.ones(())], 1.0)
    assert abs(value - np.e) <= bar < 1e-9


A = np.random.default_rng(0).normal(size=(3, 3))


@pytest.mark.parametrize(
    ("got", "phrase"),
    [
        (-A, "change of sign"),
        (A / 4, "× N, N = 4"),
        (A * 1.25, "matches after × 0.8"),
        (A.T, "transpose"),
        (0 * A, "all zero"),
        (np.where(np.arange(9).reshape(3, 3) == 4, 0, A), "zero at 1 of 9"),
        (A + 0.1 * np.arange(9).reshape(3, 3), "× the argument itself"),
        (np.full((3, 3), np.nan), "NaN"),
        (A + A**2, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "got",
)
def test_diagnosis(got: np.ndarray, phrase: str) -> None:
    argument = np.arange(9.0).reshape(3, 3)
    found = diagnose(got, A, argument, {}, [4])
    assert phrase in found if phrase else found == ""


def test_the_errors_of_each_layer() -> None:
    """Of a few ULPs in either dtype; 4 quantities a layer, the last layer first."""
    errors = layer_errors(jaxbp.MLP((6, 8, 5, 3), hidden="tanh"))
    assert [(row.layer, row.quantity) for row in errors][::4] == [("3", "∂ℓ/∂x"), ("2", "∂ℓ/∂x"), ("1", "∂ℓ/∂x")]
    assert all(0 <= error < 16 for row in errors for error in (row.float64, row.float32))
    assert any(row.float32 > 0 for row in errors)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "slow"}, "level is 'slow', allowed: fast, full"),
        ({"kinks": "up"}, "kinks is 'up', allowed: reference, left, right, subgradient"),
        ({"order": 4}, "order is 4, allowed: 1, 2, 3"),
        ({"dtypes": ("float8",)}, "dtypes is 'float8', allowed: float64, float32, bfloat16, float16"),
        ({"wrt": 4}, r"wrt has 4, but the arguments with floating-point leaves are \[0\]"),
        ({"gradient": jnp.cos, "value_and_grad": jnp.cos}, "give one of gradient, value_and_grad and vjp"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split()[0],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxbp.check.__wrapped__(CUBE, "f32[4]", **options)  # past the type checks that only these tests have


def test_a_network_has_its_own_arguments() -> None:
    net = jaxbp.MLP((3, 2))
    for options in ({"args": "f32[8]"}, {"reference": jnp.cos}, {"domain": (0.0, 1.0)}, {"wrt": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is given, but MLP has its own: leave it out"):
            jaxbp.check(net, **options)
    with pytest.raises(ValueError, match="wrt is given, but Network has its own: leave it out"):
        jaxbp.check(jaxbp.Network(jaxbp.layers.Dense(2), "squared_error", (3,)), wrt=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f32[2] x", "'x' is no array"),
        ("f31[2]", "did you mean"),
        ("i32[2]{3..1}", "the range 3..1 is empty"),
    ],
    ids=["no array", "dtype", "range"],
)
def test_wrong_inputs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inputs(text)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_network_of_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "iris.toml"
    config.write_text('data.name = "iris"\nmodel.sizes = [4, 5, 3]\n[optimizer]\nlearning_rate = 0.1\n')
    assert main(["check", str(config), "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    assert "∂ℓ/∂w" in out
    assert "PASS" in out
    assert json.loads((tmp_path / "report.json").read_text())["passed"]


MODULE = """
import jax, jax.numpy as jnp
@jax.custom_vjp
def cube(x): return x**3
cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
def energy(x): return jnp.sum(x**2) / 2
def gradient(x): return x
def wrong(x): return 2 * x
def root(x): return jnp.sqrt(x)
def fwd(x): return jnp.sqrt(x), x
def bwd(x, u): return (u / (2 * jnp.sqrt(x)),)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "printed"),
    [
        (["mine_:cube", "--inputs", "f32[3]"], 0, "PASS"),
        (["mine_:energy", "--inputs", "f32[3]", "--gradient", "mine_:gradient"], 0, "PASS"),
        (["mine_:energy", "--inputs", "f32[3]", "--gradient", "mine_:wrong"], 1, "matches after × 0.5"),
        (["mine_:energy", "--inputs", "f32[3]"], 1, "no custom rule ran"),
        (["mine_:root", "--inputs", "f32[3]", "--vjp", "mine_:fwd,mine_:bwd", "--domain", "x=0.1..5"], 0, "PASS"),
        (["mine_:cube", "--inputs", "f32[3]", "--domain", "y=positive"], 2, "domain has 'y'"),
        (["mine_:cube", "--inputs", "f32[3]", "--domain", "1..b"], 2, "two numbers such as 0.1..5"),
        (["mine_:cube", "--inputs", "f32[3]", "--allow-zero", "x"], 2, "positions such as 0 or 0,2"),
        (["mine_:cube", "--inputs", "f32[3]", "--dtypes", "float8"], 2, "dtypes is 'float8'"),
        (["mine_:cube"], 2, "what does it take?"),
        (["mine_:cube", "--inputs", "f32[3"], 2, "no array"),
        (["mine_:square", "--inputs", "f32[3]"], 2, "has no 'square'"),
        (["nowhere_:f", "--inputs", "f32[3]"], 2, "can't import nowhere_"),
        (["nothing"], 2, "can't import nothing"),
        (["configs/none.toml"], 2, "none.toml"),
        (["mine_:cube", "--inputs", "f32[3]", "--json", "no/such/folder.json"], 2, "can't be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_function_of_a_module(
    arguments: list[str],
    status: int,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine_.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert main(["check", *arguments]) == status
    captured = capsys.readouterr()
    assert printed in captured.out + captured.err
    if status == 2:
        assert len(captured.err.strip().splitlines()) == 1
    sys.modules.pop("mine_", None)
