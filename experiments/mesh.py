"""A run on several devices and in several processes: same losses, what is exchanged, what a device holds, a process
that dies, and what follows for 1,000 devices.

Losses: three epochs of digits and of MNIST in float64 on D × M fake CPU devices, and on 2 × 2 of two processes, beside
one device. Exchange: the collectives in the compiled epoch, and the bytes of a device by XLA's buffer assignment.
Death: one of the processes is killed by SIGKILL after a checkpoint; the time until all have ended; the same command
again, and the bytes of its parameters beside those of an undisturbed run. Other mesh: a run stopped on 2 × 2 devices
goes on on fewer. Plan: the time of a sum over two processes is measured and put into `mesh_step.step_seconds`.

Command: python -m experiments.mesh [--epochs 3] [--out FOLDER]
"""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import mesh_step, report
from experiments.bench import machine
from jaxbp.run.errors import UserError
from jaxbp.run.store.model import FILE

CONFIGS = Path(__file__).parent.parent / "configs"
LOSSES = ("train_loss", "test_loss")
SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))


def command(config: str, folder: Path, shape: tuple[int, int], count: int, *overrides: str) -> list[str]:
    """`jaxbp run` in so many processes."""
    on = ["--mesh.data", str(shape[0]), "--mesh.model", str(shape[1])]
    run = ["run", str(CONFIGS / config), "--train.no-plots", "--train.folder", str(folder), *on, *overrides]
    return [sys.executable, "-m", "jaxbp", *(["launch", "-n", str(count), "--"] if count > 1 else []), *run]


def started(arguments: Sequence[str], devices: int) -> subprocess.Popen[str]:
    """A process with so many fake CPU devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finished(process: subprocess.Popen[str]) -> str:
    """What it printed; UserError where it ended badly."""
    printed, said = process.communicate(timeout=1200)
    if process.returncode:
        raise UserError(f"a run ended with {process.returncode}: {said.strip().splitlines()[-1:]}")
    return printed


def losses(config: str, epochs: int, work: Path) -> list[dict[str, Any]]:
    """A row a mesh: the largest relative difference of a loss from one device, and median seconds of an epoch."""
    rows: list[dict[str, Any]] = []
    one: list[dict[str, Any]] = []
    for shape, count in (*((shape, 1) for shape in SHAPES), ((2, 2), 2)):
        folder = work / f"{config} {shape} {count}"
        overrides = ("--train.epochs", str(epochs), "--model.dtype", "float64")
        devices = math.prod(shape) // count
        finished(started(command(config, folder, shape, count, *overrides), devices))
        found, timings = (lines(folder / name) for name in ("metrics.jsonl", "timings.jsonl"))
        one = one or found
        rows.append(
            {
                **{"config": config, "data": shape[0], "model": shape[1], "processes": count},
                "difference": max(abs(a[k] / b[k] - 1) for a, b in zip(found, one, strict=True) for k in LOSSES),
                "seconds": statistics.median(row["seconds"] for row in timings),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def death(victim: int, count: int, epochs: int, work: Path) -> dict[str, Any]:
    """Kills one of the processes after the first checkpoint, and gives the command again."""
    options = ("--train.epochs", str(epochs), "--checkpoint.every", "1")
    whole, folder = work / f"whole {count}", work / f"without {victim} of {count}"
    if not whole.exists():
        finished(started(command("digits.toml", whole, (count, 1), count, *options), 1))
    arguments = command("digits.toml", folder, (count, 1), count, *options)
    run = started(arguments, 1)
    _checkpoint_in(folder, run)
    os.kill(_pid(run.pid, victim), signal.SIGKILL)
    began = time.perf_counter()
    said = run.communicate(timeout=120)[1]
    seconds = time.perf_counter() - began
    finished(started(arguments, 1))
    same = all((whole / name).read_bytes() == (folder / name).read_bytes() for name in (FILE, "metrics.jsonl"))
    named = [line for line in said.splitlines() if line.startswith(f"jaxbp: process {victim} of {count} ")]
    return {"victim": victim, "processes": count, "seconds": seconds, "named": len(named), "same": same}


def _pid(parent: int, number: int) -> int:
    """The child that is process `number` of the run."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"JAX_PROCESS_ID={number}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise UserError(f"process {number} of the run is not there")


def _checkpoint_in(folder: Path, process: subprocess.Popen[str]) -> None:
    """Waits for the first one."""
    while not any(folder.glob("checkpoints/*.sha256")):
        if process.poll() is not None:
            raise UserError(f"{folder.name}: ended without a checkpoint: {process.communicate()[1][-300:]}")
        time.sleep(0.01)


def other_mesh(epochs: int, work: Path) -> list[dict[str, Any]]:
    """Stops a run on 2 × 2 devices after a checkpoint and goes on on others: difference of the parameters from one."""
    from safetensors.numpy import load_file

    options = ("--train.epochs", str(epochs), "--checkpoint.every", "1", "--model.dtype", "float64")
    finished(started(command("digits.toml", work / "one", (1, 1), 1, *options), 1))
    rows = []
    for shape, count in (((1, 1), 1), ((2, 1), 1), ((1, 2), 1), ((2, 1), 2)):
        folder = work / f"other {shape} {count}"
        run = started(command("digits.toml", folder, (2, 2), 1, *options), 4)
        _checkpoint_in(folder, run)
        run.send_signal(signal.SIGTERM)
        if run.wait(timeout=120) != 128 + signal.SIGTERM:
            raise UserError(f"{folder.name}: was not stopped: {run.communicate()[1][-300:]}")
        printed = finished(started(command("digits.toml", folder, shape, count, *options), math.prod(shape) // count))
        after = re.search(r"goes on after epoch (\d+)", printed)
        one, other = (load_file(path / FILE) for path in (work / "one", folder))
        worst = max(float(np.max(np.abs(one[k] - other[k])) / np.max(np.abs(one[k]))) for k in one)
        rows.append(
            {
                **{"data": shape[0], "model": shape[1], "processes": count},
                **{"stopped_after": int(after[1]) if after else None, "difference": worst},
            }
        )
    return rows


def show(results: dict[str, Any]) -> None:
    """The tables."""
    on = ("config", "D × M", "processes")
    report.table(
        "losses of three epochs beside one device, float64",
        (*on, "largest difference", "s an epoch"),
        [
            (
                *(row["config"], f"{row['data']} × {row['model']}", row["processes"]),
                *(f"{row['difference']:.1e}", f"{row['seconds']:.2f}"),
            )
            for row in results["losses"]
        ],
    )
    report.table(
        "a step in float32",
        ("network / batch", "D × M", "sums", "moved, MB", "parameters, MB", "x and δ, MB", "scratch, MB"),
        [
            (
                *(f"{'-'.join(map(str, row['sizes']))} / {row['batch']}", f"{row['data']} × {row['model']}"),
                row["sums"],
                *(f"{row[name] / 1e6:.3f}" for name in ("moved", "parameters", "factors", "scratch")),
            )
            for row in results["exchanged"]
        ],
    )
    report.table(
        "a process is killed",
        ("killed", "of", "s until all have ended", "lines that name it", "then the same bytes"),
        [
            (row["victim"], row["processes"], f"{row['seconds']:.1f}", row["named"], "yes" if row["same"] else "no")
            for row in results["deaths"]
        ],
    )
    report.table(
        "stopped on 2 × 2 devices, gone on elsewhere",
        ("D × M", "processes", "stopped after epoch", "largest difference of parameters"),
        [
            (f"{row['data']} × {row['model']}", row["processes"], row["stopped_after"], f"{row['difference']:.1e}")
            for row in results["other_mesh"]
        ],
    )
    show_plan(results)


def show_plan(results: dict[str, Any]) -> None:
    """The share of a step in which a device computes, by the model of `mesh_step`, and what was measured for it."""
    report.table(
        f"{'-'.join(map(str, mesh_step.WIDE.sizes))}: the share of a step in which a device computes",
        ("of", "samples a device", *map(str, mesh_step.DEVICES)),
        [
            (kind, batch, *(f"{100 * row['efficiency']:.0f} %" for row in results["plan"] if _is(row, kind, batch)))
            for kind in ("accelerators", "this machine")
            for batch in mesh_step.SAMPLES
        ],
    )
    here = results["here"]
    print(
        f"this machine: {here['flops'] / 1e9:.0f} GFLOP/s, {here['bandwidth'] / 1e9:.2f} GB/s and "
        f"{1e6 * here['latency']:.0f} µs between two processes"
    )


def _is(row: dict[str, Any], kind: str, batch: int) -> bool:
    return bool(row["of"] == kind and row["batch"] == batch)


def draw(results: dict[str, Any]) -> Figure:
    """What a device holds by mesh; the efficiency of the plan by devices."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    held, efficiency = figure.subplots(1, 2)
    rows = [row for row in results["exchanged"] if tuple(row["sizes"]) == mesh_step.WIDE.sizes]
    at = np.arange(len(rows))
    for i, (name, label) in enumerate((("parameters", "parameters"), ("factors", "x and δ"), ("moved", "moved"))):
        held.bar(at + 0.27 * (i - 1), [row[name] / 1e6 for row in rows], 0.25, label=f"{label}, MB")
    held.set_xticks(at, [f"{row['data']} × {row['model']}" for row in rows])
    held.set(xlabel="D × M", title=f"{'-'.join(map(str, mesh_step.WIDE.sizes))} / {mesh_step.WIDE_BATCH}: a device")
    for kind, style in (("accelerators", "-"), ("this machine", "--")):
        for number, batch in enumerate(mesh_step.SAMPLES):
            shares = [100 * row["efficiency"] for row in results["plan"] if _is(row, kind, batch)]
            efficiency.plot(
                mesh_step.DEVICES, shares, style, color=f"C{number}", marker=".", label=f"{kind}, {batch} a device"
            )
    efficiency.set(xscale="log", xlabel="devices", ylabel="% of a step spent in products", ylim=(0, 103), title="plan")
    held.legend(fontsize="small")
    efficiency.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    for axes in (held, efficiency):
        axes.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all of it, prints the tables, writes mesh.json and mesh.png."""
    parser = report.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the comparisons of losses")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # read when the first device is asked for
    with report.study("mesh", parser, arguments) as study, tempfile.TemporaryDirectory() as folder:
        work, epochs = Path(folder), study.options.epochs
        here = {"flops": machine.matmul_peak().flops, **dict(sorted(mesh_step.exchange_seconds().items()))}
        networks = ((mesh_step.NET, mesh_step.BATCH), (mesh_step.WIDE, mesh_step.WIDE_BATCH))
        results: dict[str, Any] = {
            "here": here,
            "plan": mesh_step.plan(here),
            "exchanged": [mesh_step.exchanged(net, batch, shape) for net, batch in networks for shape in SHAPES],
            "deaths": [death(*which, 60, work) for which in ((1, 2), (0, 2), (2, 4))],
            "other_mesh": other_mesh(60, work),
            "losses": [row for name in ("digits.toml", "mnist.toml") for row in losses(name, epochs, work)],
        }
        show(results)
        study.save(results, draw(results))


if __name__ == "__main__":
    main()
