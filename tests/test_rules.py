"""`jaxbp check` of a package and of a file: which rules it finds, with which arguments, what it says, when it ends."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import checker_libraries
from jaxbp.checker import Report, Row, arguments, finder
from jaxbp.cli import main

RULES = """
import functools
import jax
import jax.numpy as jnp

@jax.custom_vjp
def cube(x):
    return x**3
cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))

@jax.custom_jvp
def _log(x):
    return jnp.log(x)
_log.defjvp(lambda x, t: (jnp.log(x[0]), t[0] / x[0]))

@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(x, n: int):
    return x**n
power.__wrapped__.defjvp(lambda n, x, t: (x[0]**n, n * x[0]**(n - 1) * t[0]))

def dense(w, x):
    return w @ x
dense_rule = jax.custom_vjp(dense)
dense_rule.defvjp(lambda w, x: (w @ x, (w, x)), lambda r, u: (jnp.outer(u, r[1]), r[0].T @ u))

class Layer:
    rule = staticmethod(dense_rule)
    @staticmethod
    def make(f):
        inner = jax.custom_vjp(lambda x: f(x))
        inner.defvjp(lambda x: (f(x), x), lambda x, u: (u,))
        return lambda x: inner(x)

wrapped = Layer.make(jnp.sin)
bound = functools.partial(Layer.make(jnp.cos))
table = {"tan": Layer.make(jnp.tan)}
relu = jax.nn.relu
"""
CUBE = """@jax.custom_vjp
def cube(x):
    return x**3
cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
"""
UNKNOWN = """@jax.custom_vjp
def unknown(x, *, name):
    return x
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with rules, with a module that cannot be imported, and with two that must not be."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "ruled"
    (folder / "tests").mkdir(parents=True)
    (folder / "inner.py").write_text(RULES)
    (folder / "__init__.py").write_text("from ruled.inner import cube")
    (folder / "broken.py").write_text("import nowhere_")
    for name in ("__main__", "tests/__init__", "tests/test_more"):
        (folder / f"{name}.py").write_text("raise SystemExit")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ruled", "rules_")]:
        del sys.modules[name]


def names(package: str) -> list[str]:
    modules, failed = finder.modules(package)
    assert failed == ["ruled.broken: ModuleNotFoundError: No module named 'nowhere_'"]
    return [rule.name for rule in finder.rules(modules)]


def test_every_rule_that_a_name_leads_to_is_found(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its most public name, once; rules of other packages are not."""
    monkeypatch.syspath_prepend(package.parent)
    found = ["bound", "dense_rule", "table.tan", "wrapped", "_log", "power"]
    assert sorted(names("ruled")) == sorted(["ruled:cube", *(f"ruled.inner:{name}" for name in found)])
    by_name = {rule.name: rule for rule in finder.rules(finder.modules("ruled")[0])}
    cube = by_name["ruled:cube"]
    assert (cube.kind, Path(cube.file), cube.line) == ("custom_vjp", package / "inner.py", 6)
    assert by_name["ruled.inner:power"].kind == "custom_jvp"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x): return x", "f32[4]"),
        ("def f(w, x): return w @ x", "f32[4], f32[4]"),
        ("def f(w, x): return jnp.reshape(w @ x, 3)", "f32[3,4], f32[4]"),
        ("def f(x): return jnp.trace(x) / x.shape[0]", "f32[3,4]"),
        ("def f(x): return jnp.log(x)", "f32[4], domain=(0.05, 0.95)"),
        ("def f(x, *, scale=2.0): return scale * x", "f32[4]"),
        ("def f(x, ids): return x[ids]", "f32[4], i32[3]{0..2}"),
        ("def f(x: float, n: int): return x * jnp.float32(n)", "f32[], i32[]{0..2}"),
        ("def f(x, y):\n '''Takes f32[5], then f32[2].'''\n return x[:2] * y", "f32[5], f32[2]"),
        ("def f(x: Float[Array, 'n 2'], y: Int[Array, '*b n']): return x[y]", "f32[3,2], i32[3]{0..1}"),
        ("def f(x, *, name): return x", None),
        ("def f(x): return jnp.round(x).astype(int)", None),
    ],
)
def test_arguments_are_found_out(source: str, found: str | None) -> None:
    scope: dict[str, Any] = {}
    exec("import jax.numpy as jnp\nfrom jax import Array\nfrom jaxtyping import Float, Int\n" + source, scope)
    call = arguments.found_out(finder.Rule("m:f", "custom_vjp", (scope["f"],), "", 0))
    assert (call and call.text) == found


TOML = """
["ruled.inner:_log"]
args = ["f32[2]"]
domain = [1.0, 2.0]
["ruled:cube"]
args = ["f32[4]"]
["ruled.inner:dense_rule"]
args = ["f32[4,4]", "f32[4]"]
["ruled.inner:wrapped"]
skip = "needs more"
["ruled.inner:table.tan"]
skip = "needs more"
["ruled.inner:bound"]
through = "ruled.inner:nothing"
args = ["f32[2]"]
"""


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `jaxbp.check` is called with; it fails what is named cube and passes all others, at once."""
    calls = []

    def check(fun: Any, args: Any, **options: Any) -> Report:
        calls.append((fun.__name__, args, options))
        rows = (Row("contract", "PASS"),)
        if fun.__name__ == "cube":
            rows = (Row("float64 oracle", "FAIL", "[0]", index=(1,), got=2.0, want=3.0, diagnosis="× 1.5"), *rows)
        return Report(fun.__name__, rows, (), "", 0.0, options["seed"], options["level"])

    monkeypatch.setattr("jaxbp.checker.survey.check", check)
    return calls


def test_a_package(package: Path, checked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    """A line a rule; the counts keep apart what did not pass for different reasons; the JSON says the same."""
    Path("told.toml").write_text(TOML)
    assert main(["check", "ruled", "--arguments", "told.toml", "--json", "all.json", "--seed", "3"]) == 1
    out = capsys.readouterr().out
    assert "PASS ruled.inner:_log (custom_jvp): f32[2], domain=[1.0, 2.0]\n" in out
    assert "skipped ruled.inner:wrapped (custom_vjp): needs more\n" in out
    assert "not exercised ruled.inner:bound (custom_vjp): its arguments: AttributeError" in out
    assert "PASS ruled.inner:power (custom_jvp): f32[4], 1\n" in out
    assert "FAIL ruled:cube (custom_vjp): f32[4]\n  jaxbp.check cube: FAIL" in out
    assert "not imported: ruled.broken: ModuleNotFoundError: No module named 'nowhere_'\n" in out
    whole = json.loads(Path("all.json").read_text())
    verdicts = {"PASS": 3, "UNEXERCISED": 0, "INCONCLUSIVE": 0, "FAIL": 1, "not exercised": 1, "skipped": 2}
    assert whole["counts"] == {"found": 7, "checked": 4, **verdicts}
    assert not whole["passed"] and whole["rules"][0]["report"]["seed"] == 3
    assert ("_log", "f32[2]", {"level": "fast", "seed": 3, "domain": (1.0, 2.0)}) in checked


def test_annotations(package: Path, checked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    Path("rules_.py").write_text("import jax\n" + CUBE + UNKNOWN)
    assert main(["check", "rules_.py", "--format", "github"]) == 1
    failed = "::error file=rules_.py,line=2,title=rules_%3Acube::FAIL float64 oracle [0][1]: got 2.0, want 3.0%0A× 1.5"
    unknown = (
        "::notice file=rules_.py,line=6,title=rules_%3Aunknown::not exercised: its arguments could not be found out"
    )
    assert capsys.readouterr().out.splitlines() == [failed, unknown]


def test_a_file_of_rules_that_pass(package: Path, checked: list[tuple[Any, ...]]) -> None:
    Path("rules_.py").write_text("import jax\n" + CUBE.replace("cube", "third"))
    assert main(["check", "rules_.py", "--level", "full"]) == 0
    assert [(name, options["level"]) for name, _, options in checked] == [("third", "full")]
    Path("rules_.py").write_text("")
    assert main(["check", "rules_.py"]) == 1  # no rule was proven


def test_watch(package: Path, checked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    """The file is checked again after a change alone; what is wrong with it is one line; Ctrl-C ends it without one."""
    file = Path("rules_.py")
    contents = ["def f(:", None, "1 / 0", "raise SystemExit", "import jax\n" + CUBE.replace("cube", "third"), None]

    def edit(seconds: float) -> None:
        if not contents:
            raise KeyboardInterrupt
        content = contents.pop(0)
        file.unlink(missing_ok=True) if content is None else file.write_text(content)

    file.write_text("import jax\n" + CUBE)
    options = ["check", "--watch", "rules_.py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", edit)
        assert main(options) == 0
    assert [name for name, *_ in checked] == ["cube", "third"]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "jaxbp: check: rules_.py, line 1: invalid syntax",
        "jaxbp: check: can't run rules_.py: ZeroDivisionError: division by zero",
        "jaxbp: check: can't run rules_.py: SystemExit: ",
    ]
    assert [line for line in printed.out.splitlines() if line.startswith("rules_.py: 1 found")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere_"], "check: can't import nowhere_: No module named 'nowhere_'"),
        (["no.py"], "check no.py: No such file or directory"),
        (["--watch", "no.py"], "check --watch no.py: there is no such file"),
        (["--watch", "ruled"], "check ruled: --watch is for a file, such as rules.py"),
        (["ruled", "--inputs", "f32[2]"], "check ruled: --inputs is for package.module:function, see --arguments"),
        (["x.toml", "--arguments", "told.toml"], "check x.toml: --arguments is for a package or a file"),
        (["ruled", "--arguments", "no.toml"], "--arguments no.toml: No such file or directory"),
        (["ruled", "--arguments", "1"], "--arguments told.toml: Expected '=' after a key in a key/value pair"),
        (["ruled", "--arguments", "a = 1"], 'a is no table, write ["package.module:a"]'),
        (["ruled", "--arguments", "[a]\narg = 1"], "a has 'arg', allowed: args, through, skip, accuracy, allow_zero, "),
        (["ruled", "--arguments", "[a]\nargs = 'f32[8]'"], "a has no list of args, for example args = ['f32[8]']"),
        (
            ["ruled", "--arguments", "['ruled:cub']\nskip = ''"],
            "ruled has no rule 'ruled:cub', did you mean 'ruled:cube'?",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_checked_is_one_line(
    options: list[str], message: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if options[1:2] == ["--arguments"] and not options[2].endswith(".toml"):
        Path("told.toml").write_text(options[2])
        options = [*options[:2], "told.toml"]
    assert main(["check", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# The table of libraries ----------------------------------------------------------------------------------------------


def test_the_arguments_of_libraries_name_what_there_is() -> None:
    for name, table in arguments.read(checker_libraries.CONFIG).items():
        assert name.startswith(tuple(checker_libraries.PACKAGES.values())), name
        for text in (table.get("through", ""), table.get("reference", "")):
            assert not text.startswith(("experiments.", "jax.")) or callable(arguments.named(text)), text


def test_the_page_of_libraries(package: Path, checked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts by library; what did not pass has its first cause, and the finding about it."""
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr("importlib.metadata.version", lambda library: "1.2")
    monkeypatch.setitem(checker_libraries.PACKAGES, "ruled", "ruled")
    skip = {"skip": "needs more"}
    told = {"ruled:cube": {"args": ["f32[4]"]}} | {f"ruled.inner:{name}": skip for name in ("_log", "power", "wrapped")}
    told |= {f"ruled.inner:{name}": skip for name in ("bound", "dense_rule", "table.tan")}
    found = checker_libraries.survey("ruled", told)
    page = checker_libraries.page({"ruled": found}, {"ruled:cube": "Fault: 2 for 3."})
    assert "| ruled | 1.2 | 7 | 1 | 0 | 0 | 0 | 1 | 0 | 6 | 1 | 0 | 0 |" in page
    assert "- `ruled:cube`: Fault: 2 for 3. float64 oracle [0][1]: got 2, want 3, error ÷ bound 0" in page
    assert "## skipped\n\n- `ruled.inner:_log`: needs more" in page
