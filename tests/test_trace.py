"""`jaxbp trace`: the numbers against `jax.grad`, the figure, and what is refused in one line."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

import jaxbp
from jaxbp.cli import main
from jaxbp.run.study import trace

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
    assert np.ptp(image.imread(run / "trace_test_7.png")[..., :3]) > 0.9
    assert main(["trace", str(run), "--sample", "7"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["trace", str(run), "--sample", "7", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sample", "-1"], "--sample: got -1, the test set has samples 0 to"),
        (["--sample", "100000"], "--sample: got 100000"),
        (["--sample", "0", "--split", "tset"], "--split"),
        (["--sample", "0", "--out", "a.jpg"], "--out: 'a.jpg' should end in .png"),
        (["--sample", "0", "--out", "absent/a.png"], "--out: 'absent/a.png' can't be written"),
    ],
)
def test_refused_in_one_line(run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path), "--sample", "0"]) == 2
    assert "not a run folder" in capsys.readouterr().err
