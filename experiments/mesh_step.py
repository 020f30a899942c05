"""What a step on a mesh exchanges and a device holds, by the compiled program; the model of a step on many devices.

experiments/mesh.py prints both.
"""

import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp
from jaxbp.mlp import MLP
from jaxbp.network import factors
from jaxbp.run.compute import mesh, optimizers
from jaxbp.run.compute.step import State, StepSpec
from jaxbp.run.config import MeshConfig, OptimizerConfig
from jaxbp.run.errors import UserError
from jaxbp.run.host import processes

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
FLOPS, BANDWIDTH, LATENCY = 4e14, 5e10, 1e-5  # assumed of an accelerator: FLOP/s reached, bytes/s and seconds of a link
DEVICES = (1, 2, 8, 64, 256, 1000)
SAMPLES = (128, 1024, 16384)  # of a batch, on one device
NET, BATCH = MLP((784, 256, 256, 10)), 128
WIDE, WIDE_BATCH = MLP((784, 2048, 2048, 2048, 10)), 1024


def collectives(text: str) -> list[tuple[str, list[str]]]:
    """(name, shapes of what it moves) of each collective in compiled HLO."""
    found = re.finditer(rf" = (.*?) ({COLLECTIVES})\(", text)
    return [(m[2], re.findall(r"\w+\[[\d,]*\]", m[1])) for m in found]


def exchanged(net: MLP, batch: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Of a step in float32: collectives, bytes they move, and bytes of a device for parameters and for (x, δ)."""
    built, params = mesh.build(MeshConfig(*shape)), jax.eval_shape(lambda: jaxbp.init(net, jax.random.key(0)))
    optimizer = optimizers.build(OptimizerConfig("sgd", 0.1), params)
    state = State(params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.bool_))  # type: ignore[arg-type]
    x, y = jax.ShapeDtypeStruct((2, batch, net.sizes[0]), jnp.float32), jax.ShapeDtypeStruct((2, batch), jnp.int32)
    rows = mesh.Rows(x, y, jax.ShapeDtypeStruct((2, batch), jnp.float32))  # type: ignore[arg-type]
    compiled = mesh.compile_epoch(built, StepSpec(net, optimizer, batch), state, rows)
    moved = collectives(compiled.as_text() or "")
    sizes = [4 * math.prod(map(int, re.findall(r"\d+", s.split("[")[1]))) for _, shapes in moved for s in shapes]
    split, data = mesh.shardings(built, net, params), jax.sharding.PartitionSpec("data")
    given = (split, *(jax.sharding.NamedSharding(built, data),) * 2)
    held = jax.jit(lambda *a: factors(net, *a)[1], in_shardings=given).lower(params, _one(x), _one(y)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend here has it
    return {
        **{"sizes": list(net.sizes), "batch": batch, "data": shape[0], "model": shape[1]},
        **{"collectives": sorted({name for name, _ in moved}), "sums": len(sizes), "moved": sum(sizes)},
        "parameters": sum(_shard_bytes(p, s) for p, s in zip(*map(jax.tree.leaves, (params, split)), strict=True)),
        "factors": _output_bytes(held) - 4 * net.sizes[0] * batch // shape[0],  # x⁽⁰⁾ is the data, not an activation
        "scratch": int(memory.temp_size_in_bytes),
    }


def _one(batches: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype)


def _shard_bytes(leaf: Any, sharding: jax.sharding.Sharding) -> int:
    return int(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)


def _output_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return int(memory.output_size_in_bytes)


def exchange_seconds() -> dict[str, float]:
    """Seconds of a sum over two processes, of few and of many numbers: the latency and the bytes/s of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = []
    for number in range(2):
        about = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
        about["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
        environment, clone = os.environ | about, Path(__file__).parent.parent
        script = "from experiments import mesh_step; mesh_step.exchange()"
        command = [sys.executable, "-c", script]
        pair.append(subprocess.Popen(command, env=environment, cwd=clone, stdout=subprocess.PIPE))
    printed = [child.communicate(timeout=300)[0].decode() for child in pair]
    if any(child.returncode for child in pair):
        raise UserError("the sum over two processes could not be measured")
    found: dict[str, float] = json.loads(printed[0].splitlines()[-1])
    return found


def exchange() -> None:
    """One of the two processes of `exchange_seconds`."""
    with processes.joined(lambda error: (1, str(error))):
        built = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        split, whole = (
            jax.sharding.NamedSharding(built, jax.sharding.PartitionSpec(*axis)) for axis in (("data",), ())
        )
        summed = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
        seconds = {}
        for size in (1, 2**24):
            ones = np.ones((1, size), np.float32)
            x = jax.make_array_from_process_local_data(split, ones, (2, size))
            taken = []
            for _ in range(21):
                began = time.perf_counter()
                summed(x).block_until_ready()
                taken.append(time.perf_counter() - began)
            seconds[size] = statistics.median(taken[1:])
        if processes.leads():
            print(json.dumps({"latency": seconds[1] / 2, "bandwidth": 4 * 2**24 / (seconds[2**24] - seconds[1])}))


def step_seconds(
    net: MLP, batch: int, devices: int, flops: float, bandwidth: float, latency: float
) -> dict[str, float]:
    """The model of a step on D devices, `batch` samples on each: matrix products, and a ring that sums the gradient.

    products 6 P b / F;  sum 2 (D − 1)/D · 4 P / W + 2 (D − 1) α;  exposed: what can't hide behind the backward pass, of
    the layer whose gradient comes last, the first, or what is longer than the backward pass, 2/3 of the products.
    """
    parameters = sum(m * n + n for m, n in zip(net.sizes, net.sizes[1:], strict=False))
    last = (net.sizes[0] + 1) * net.sizes[1] / parameters
    products = 6 * parameters * batch / flops
    total = 8 * parameters * (devices - 1) / devices / bandwidth + 2 * (devices - 1) * latency * (devices > 1)
    exposed = max(total * last, total - 2 / 3 * products)
    return {"products": products, "sum": total, "exposed": exposed, "efficiency": products / (products + exposed)}


def plan(here: dict[str, float]) -> list[dict[str, Any]]:
    """`step_seconds` of the wide network, for accelerators and for machines like this one."""
    kinds = {"accelerators": (FLOPS, BANDWIDTH, LATENCY), "this machine": tuple(here.values())}
    return [
        {"of": kind, "batch": batch, "devices": devices, **step_seconds(WIDE, batch, devices, *figures)}
        for kind, figures in kinds.items()
        for batch in SAMPLES
        for devices in DEVICES
    ]
