"""What one waits for before anything is learned: the import, the first step, a whole run. Each in new processes.

Command: python -m experiments.bench --only startup
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.bench import timing
from experiments.bench.rows import ROUNDS, Row, Settings, Target
from experiments.peers import protocol

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "digits.toml"  # what `make run` trains
ADDED = Target("≤", 0.2)
IMPORTS = """
import json, time
start = time.perf_counter()
import jax
between = time.perf_counter()
import jaxbp
print(json.dumps([between - start, time.perf_counter() - between]))
"""
STEP = """
import jax, jax.numpy as jnp
{definitions}
x = jax.random.normal(jax.random.key(1), (128, 784), jnp.float32)
y = jnp.arange(128) % 10
@jax.jit
def step(params):
    loss, grads = value_and_grad(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss
jax.block_until_ready(step(params))
"""
OURS = """
import jaxbp
net = jaxbp.MLP((784, 256, 256, 10))
params = jaxbp.init(net, jax.random.key(0))
value_and_grad = lambda params, x, y: jaxbp.value_and_grad(net, params, x, y)
"""
PLAIN = """
he, keys = jax.nn.initializers.he_normal(in_axis=1, out_axis=0), jax.random.split(jax.random.key(0), 3)
shapes = ((256, 784), (256, 256), (10, 256))
params = [(he(key, shape, jnp.float32), jnp.zeros(shape[0])) for key, shape in zip(keys, shapes)]
def loss(params, x, y):
    *hidden, (w, b) = params
    for v, c in hidden:
        x = jax.nn.relu(x @ v.T + c)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w.T + b), y[:, None], axis=1))
value_and_grad = jax.value_and_grad(loss)
"""


def rows(settings: Settings) -> list[Row]:
    """Seconds that the import adds; the first step beside plain JAX; a whole run of configs/digits.toml."""
    rounds = 2 if settings.quick else ROUNDS
    imports = [json.loads(python("-c", IMPORTS)) for _ in range(rounds)]
    jax_seconds = statistics.median(seconds for seconds, _ in imports)
    added = timing.ratio([seconds for _, seconds in imports], [1] * rounds)
    programs = [STEP.format(definitions=definitions) for definitions in (OURS, PLAIN)]
    step = timing.ratio(*protocol.interleaved([lambda p=p: python("-c", p) for p in programs], rounds))
    runs = [timing.seconds(_run) for _ in range(rounds)]
    whole = timing.ratio(runs, [1] * rounds)
    label = f"beside the {jax_seconds:.2f} s of jax"
    network = "784-256-256-10 / 128, the whole process"
    return [
        Row("import jaxbp: seconds more than import jax", label, added.value, added.value, "s", ADDED, added.spread),
        Row("first step ÷ plain JAX", network, step.value, step.seconds, "s", None, step.spread),
        Row(
            "whole run, seconds", f"jaxbp run configs/{CONFIG.name}", whole.value, whole.value, "s", None, whole.spread
        ),
    ]


def python(*arguments: str) -> str:
    """What this Python prints, started in the clone."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def _run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        python("-m", "jaxbp", "run", str(CONFIG), "--train.folder", f"{folder}/run")
