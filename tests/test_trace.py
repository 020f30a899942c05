"""`jaxbp trace`: the numbers against `jax.grad`, the figure, and what is refused in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from matplotlib.text import Text
from rich.console import Console
from tiers import slow

import jaxbp
from jaxbp.cli import main
from jaxbp.run.study import trace, trace_plots

CONFIG = """
[data]
name = "digits"
[model]
sizes = [64, 12, 40, 10]
[optimizer]
learning_rate = 0.1
[train]
epochs = 1
plots = false
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    (folder / "c.toml").write_text(CONFIG, encoding="utf-8")
    assert main(["run", str(folder / "c.toml"), "--train.folder", str(folder / "run")]) == 0
    return folder / "run"


def test_every_derivative_is_that_of_autodiff() -> None:
    net = jaxbp.MLP((5, 4, 3), "tanh")
    params = jaxbp.init(net, jax.random.key(0), bias="normal", dtype=jnp.float64)
    x, y = jax.random.normal(jax.random.key(1), (5,), jnp.float64), jnp.asarray(2)

    def loss(params: jaxbp.Params, nudges: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(params[0].w @ x + params[0].b + nudges[0]) + nudges[1]
        output = params[1].w @ hidden + params[1].b + nudges[2]
        return -jax.nn.log_softmax(output)[y]

    nudges = (jnp.zeros(4), jnp.zeros(4), jnp.zeros(3))
    (grads, (ds1, dx1, ds2), dx0), want_loss = jax.grad(loss, (0, 1, 2))(params, nudges, x), loss(params, nudges, x)
    found = trace.measure(net, params, x, y)
    got = (found.gradient, found.dl_ds, found.dl_dx, found.loss)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15),
        got,
        (grads, (ds1, ds2), (dx0, dx1, ds2), want_loss),
    )


def test_a_table_and_a_figure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run), "--sample", "7"]) == 0
    printed = capsys.readouterr().out
    for name in ("x⁽⁰⁾", "s⁽³⁾", "∂ℓ/∂x⁽⁰⁾", "∂ℓ/∂s⁽¹⁾", "∂ℓ/∂w⁽²⁾", "∂ℓ/∂b⁽³⁾", "12×64", "test sample 7"):
        assert name in printed
    assert printed.splitlines()[0].startswith("run · digits · 64-12-40-10 relu · softmax_cross_entropy · test sample 7")
    assert "…" not in printed and "-0 " not in printed
    assert np.ptp(image.imread(run / "trace_test_7.png")[..., :3]) > 0.9
    assert main(["trace", str(run), "--sample", "7"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_picture_is_there_when_nobody_reads_the_table(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(trace.text, "table", gone)
    with pytest.raises(BrokenPipeError):
        trace.trace(run, 9, Console(quiet=True), out=run / "t.svg")
    assert b"<svg" in (run / "t.svg").read_bytes()


@pytest.mark.slow
def test_an_unfinished_run_is_called_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / ".unfinished").touch()
    (run / "trace_test_8.png").touch()
    assert main(["trace", str(run), "--sample", "8", "--overwrite"]) == 0
    (run / ".unfinished").unlink()
    assert (run / "trace_test_8.png").stat().st_size > 0
    assert capsys.readouterr().out.startswith("run (unfinished) · digits")


# --- the figure -------------------------------------------------------------------------------------------------------


def traced(sizes: tuple[int, ...], output: str = "identity") -> dict[str, np.ndarray]:
    net = jaxbp.MLP(sizes, "tanh", output)
    params = jaxbp.init(net, jax.random.key(0), dtype=jnp.float64)
    found = trace.measure(net, params, jnp.arange(sizes[0], dtype=jnp.float64), jnp.asarray(0))
    return dict(trace.quantities(found))


def picture(arrays: dict[str, np.ndarray], names: Sequence[str], **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The figure, laid out, and its axes by the first line of their titles."""
    target = np.arange(len(names)) == 1
    outcome = trace.Outcome("softmax(x)", np.full(len(names), 0.5), target.astype(float), "class", names)
    figure = trace_plots.draw(arrays, None, outcome._replace(**changes), "the run")
    figure.draw_without_rendering()
    return figure, {axis.get_title().split("\n")[0]: axis for axis in figure.axes}


def test_the_outputs_have_their_names_and_the_prediction_its_target() -> None:
    figure, axes = picture(traced((3, 4, 2)), ["cat", "do$g$"])
    assert "s⁽²⁾ = x⁽²⁾" in axes and "x⁽²⁾" not in axes  # the same numbers are drawn once
    for name in ("s⁽²⁾ = x⁽²⁾", "∂ℓ/∂s⁽²⁾", "∂ℓ/∂b⁽²⁾", "softmax(x)"):
        assert [label.get_text() for label in axes[name].get_xticklabels()] == ["cat", "do$g$"], name
        assert axes[name].get_xlabel() == "class"
    assert axes["softmax(x)"].lines[0].get_ydata().tolist() == [0, 1]
    assert "black: the target" in axes["softmax(x)"].get_title()
    written = [text.get_text() for text in figure.findobj(Text)]
    assert "blue: negative\nred: positive" in written and "the run" in written
    assert axes["∂ℓ/∂w⁽¹⁾"].get_xlabel().startswith("max |·| = ")


def test_an_output_that_is_no_identity_is_drawn_too() -> None:
    _, axes = picture(traced((3, 4, 2), "sigmoid"), ["a", "b"])
    assert {"s⁽²⁾", "x⁽²⁾", "∂ℓ/∂x⁽²⁾"} <= set(axes)


def test_one_output_is_a_narrow_bar() -> None:
    arrays = {name: a[:1] if name in ("s⁽²⁾", "x⁽²⁾", "∂ℓ/∂s⁽²⁾") else a for name, a in traced((3, 4, 2)).items()}
    _, axes = picture(arrays, ["0"], axis="output")
    (bar,) = axes["∂ℓ/∂s⁽²⁾"].patches
    assert bar.get_width() < np.ptp(axes["∂ℓ/∂s⁽²⁾"].get_xlim()) / 4
    assert [label.get_text() for label in axes["∂ℓ/∂s⁽²⁾"].get_xticklabels()] == ["0"]


@pytest.mark.parametrize(("layers", "columns", "panels"), [(4, 8, 0), (5, 8, 1), (20, 8, 1)])
@pytest.mark.slow
def test_many_layers_stay_on_a_slide(layers: int, columns: int, panels: int) -> None:
    figure, axes = picture(traced((3, *[3] * layers)), ["a", "b", "c"])
    width, height = figure.get_size_inches()
    assert width < 18 and height < 10 and width / height < 2.3
    assert sum(title.startswith(("x⁽", "s⁽")) for title in axes) == columns
    norms = [axis for axis in figure.axes if axis.get_xlabel() == "layer l"]
    assert len(norms) == panels
    for axis in norms:
        assert [len(line.get_xdata()) for line in axis.lines] == [layers] * 3
        assert axis.lines[2].get_ydata()[0] == np.linalg.norm(traced((3, *[3] * layers))["∂ℓ/∂w⁽¹⁾"])


def test_thin_lines_of_a_large_matrix_are_seen() -> None:
    matrix = np.zeros((300, 784))
    matrix[17, 400], matrix[200, 3] = 5.0, -7.0
    thinned = trace_plots._thinned(matrix)
    assert thinned.shape == (48, 48) and (thinned.min(), thinned.max()) == (-7, 5)


@pytest.mark.slow
def test_a_trace_that_is_not_finite_is_drawn() -> None:
    picture({name: np.full_like(a, np.nan) for name, a in traced((3, 40, 2)).items()}, ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sample", "-1"], "--sample: got -1, the test set has samples 0 to"),
        (["--sample", "100000"], "--sample: got 100000"),
        (["--sample", "0", "--split", "tset"], "--split"),
        (["--sample", "0", "--out", "a.jpg"], "--out: 'a.jpg' should end in .png or .svg"),
        *slow((["--sample", "0", "--out", "absent/a.png"], "--out: 'absent/a.png' can't be written")),
    ],
)
def test_refused_in_one_line(run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path), "--sample", "0"]) == 2
    assert "not a run folder" in capsys.readouterr().err
