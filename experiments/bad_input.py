"""What does bad input do? Mutated configs, IDX files and .npz files, each given to the command `jaxbp`.

A config or .npz file that is refused has to give exit status 2 and one line that begins with "jaxbp: ", and no run
folder; the others run: the step is traced but not trained. A config with one value replaced is refused with that
value's key in the line, or another key of the config that does not fit it. Nothing may end in a traceback or take more
than LIMIT seconds. A mutated IDX file has to be refused by `jaxbp data import`, for its SHA-256 is another.

Command: python -m experiments.bad_input [--configs 2000] [--files 200] [--out FOLDER]
"""

import contextlib
import copy
import gzip
import hashlib
import io
import os
import re
import signal
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import tomli_w

from experiments import report
from jaxbp import cli
from jaxbp.activations import ACTIVATIONS
from jaxbp.initializers import WEIGHTS
from jaxbp.losses import LOSSES
from jaxbp.run import loop
from jaxbp.run.compute.epoch import epoch
from jaxbp.run.compute.optimizers import OPTIMIZERS, SCHEDULES
from jaxbp.run.compute.program import first_state
from jaxbp.run.compute.recording import QUANTITIES
from jaxbp.run.config import Config, keys, to_dict
from jaxbp.run.data import dataset, idx

LIMIT = 60  # seconds for one input
EXPECTED = ("refused", "runs")
BASE: dict[str, dict[str, Any]] = {
    **to_dict(Config()),
    "data": {"name": "iris", "test_fraction": 0.2, "seed": 0, "standardize": "global"},
    "model": {"sizes": [4, 8, 3], "hidden": "relu", "loss": "softmax_cross_entropy", "dtype": "float32"},
    "optimizer": {"name": "adam", "arguments": {"b1": 0.8}, "schedule": "cosine_decay_schedule"}
    | {"schedule_arguments": {"init_value": 0.1, "decay_steps": "all"}},
    "study": {"quantities": ["squared_norms"], "every": 2},
}
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 10**30, 10**400),
    *(0.0, -0.5, 0.5, 1.0, 1e-300, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *(True, False, "", " ", "relu", "sgd", "ünïcödé ∂ℓ/∂x", "\u202e", "\U0001f600", "\x00", "a\nb", "x" * 10_000),
    *("../x", "../x.npz", "/", "/etc/passwd", "~", ".", "..", "con.npz", "[red]", "{0}", "%s", "$(reboot)"),
    *([], [0], [4, 3], [4, 2**31 - 1, 3], [4, 10**9, 10**9, 3], ["relu"], [[4], [3]], [4.5, 3], [""], [True] * 3),
    *([4, 8, 3] * 100, {}, {"a": 1}, {"b1": "x"}, {"b1": [1]}, {"": {}}, {"init_value": -1.0}, {"1": 1.0}),
)
PLAUSIBLE: dict[str, Sequence[Any]] = {
    "data.name": (*dataset.BUNDLED, "mnist", "../iris", "irsi"),
    "model.sizes": ([4, 3], [4, 10**5, 3], [4, 10**6, 10**6, 3], [4, 2**31 - 1, 3], [4, *[2] * 40, 3], [4, 8, 2], [4]),
    "model.hidden": (*ACTIVATIONS, ["relu", "tanh"], []),
    "model.output": tuple(ACTIVATIONS),
    "model.loss": tuple(LOSSES),
    "model.scheme": tuple(WEIGHTS),
    "model.dtype": ("float64", "bfloat16", "float16", "int8"),
    "optimizer.name": tuple(OPTIMIZERS),
    "optimizer.arguments": ({"b1": 1.0}, {"b1": 7}, {"b1": True}, {"b2": "x"}, {"momentum": 0.9}, {"nesterov": True}),
    "optimizer.schedule": tuple(SCHEDULES),
    "optimizer.schedule_arguments": ({"init_value": 0}, {"init_value": 1e308, "decay_steps": 0}, {"decay_steps": -1}),
    "train.batch_size": (1, 2**31 - 1, 2**31, 0),
    "study.quantities": [[name] for name in QUANTITIES],
}
NAMES = ("", " ", "épochs", "Epochs", "epoch", "folder", "data", "train", "__class__", "a.b", "x" * 3000, "0", "-")


def deep(rng: np.random.Generator) -> bytes:
    """Arrays, tables or dotted keys within one another, hundreds or ten thousands deep."""
    depth = int(rng.choice([100, 1000, 20_000]))
    return [
        f"[train]\nepochs = {'[' * depth}{']' * depth}\n",
        f"[data]\nname = {'{a = ' * depth}1{'}' * depth}\n",
        f"[train{'.a' * depth}]\nx = 1\n",
        f"[optimizer.arguments]\n{'a.' * depth}b = 1\n",
    ][rng.integers(4)].encode()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes cut out, put in, doubled or overwritten; all but random bytes; or nothing at all."""
    kind, a, b = rng.integers(7), *sorted(int(i) for i in rng.integers(0, len(data) + 1, 2))
    noise = rng.bytes(int(rng.integers(1, 40)))
    return (data[:a], data[:a] + data[b:], data[:a] + noise + data[a:], data[:b] + data[a:], rng.bytes(300), b"",
            data[:a] + noise + data[a + len(noise) :])[kind]  # fmt: skip


def mutated_config(rng: np.random.Generator) -> tuple[bytes, str | None]:
    """A config and the key whose value was replaced, if that is all that was done."""
    tables = copy.deepcopy(BASE)
    kind = rng.integers(10)
    if kind < 5:
        key = str(rng.choice(keys()))
        table, _, name = key.partition(".")
        values = PLAUSIBLE.get(key, VALUES) if kind < 2 else VALUES
        if kind == 2:  # of the right type
            values = [value for value in VALUES if type(value) is type(tables[table].get(name))] or VALUES
        tables[table][name] = values[rng.integers(len(values))]
        return tomli_w.dumps(tables).encode("utf-8", "surrogatepass"), f"{table}.{name}"
    if kind < 7:
        where = tables if kind == 5 else tables[str(rng.choice(list(tables)))]
        where[str(rng.choice(NAMES))] = VALUES[rng.integers(len(VALUES))]
        return tomli_w.dumps(tables).encode("utf-8", "surrogatepass"), None
    if kind == 7:
        return deep(rng), None
    return damaged(tomli_w.dumps(tables).encode(), rng), None


def mutated_npz(rng: np.random.Generator) -> bytes:
    """Of a good file: other shapes, types and values, a header that lies, or damaged bytes."""
    y = np.arange(60) % 3
    arrays: dict[str, Any] = {"x": rng.normal(size=(60, 4)), "y": y}
    name, kind = ("x", "y")[rng.integers(2)], rng.integers(8)
    if kind < 3:
        odd = (
            np.zeros(0),
            np.float64(1),
            np.zeros((60, 0)),
            np.full(60, np.nan),
            np.array(["a"] * 60),
            np.zeros(60, "O"),
        )
        odd = (
            *odd,
            np.zeros((60, 2, 2, 2)),
            -np.ones(60, int),
            np.full(60, 2**40),
            np.zeros(60, complex),
            y[:7],
            y > 0,
        )
        odd = (*odd, np.zeros(60, [("a", int)]), np.zeros(60, "M8[s]"), np.full((60, 4), 1e308), np.ones((60, 4), "f2"))
        arrays[name] = odd[rng.integers(len(odd))]
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **arrays)
    if kind < 3:
        return file.getvalue()
    if kind == 3:  # as long in digits, so that the header keeps its length; the checksum of the archive is wrong then
        return file.getvalue().replace(
            b"(60, 4)", (b"(90000000000000, 4)", b"(-1, 4)", b"(6, 40)", b"(60 4)")[rng.integers(4)]
        )
    if kind == 4:
        return header_lies(arrays, name, rng)
    return damaged(file.getvalue(), rng)


def header_lies(arrays: dict[str, Any], name: str, rng: np.random.Generator) -> bytes:
    """An archive that is sound, in which the header of one array promises more than there is."""
    import zipfile

    shape = ((10**13, 4), (60, 10**10), (2**62, 4), (61, 4), (-3, 4), (3.5, 4), "x")[rng.integers(7)]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            header: dict[str, Any] = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
            header |= {"shape": shape} if key == name else {}
            text = (repr(header) + " " * 40 + "\n").encode()
            member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes())
            archive.writestr(f"{key}.npy", member.getvalue())
    return out.getvalue()


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def traced(setup: loop.Setup, *_: Any) -> None:
    """Instead of training: the step with everything it records goes through JAX's tracing."""
    problem, spec, _ = setup
    state = first_state(problem, spec)
    jax.jit(epoch, static_argnums=0).lower(spec, state, *problem.on_device("train"), jax.random.key(0))


def outcome(arguments: Sequence[str], folder: Path) -> tuple[str, str]:
    """ "runs", "refused" or what is wrong; and what was printed on standard error."""
    err = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(loop, "_train", traced))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(limited(LIMIT))
            status = cli.main(arguments)
    except (Exception, SystemExit):
        return "traceback", traceback.format_exc()
    finally:
        jax.config.update("jax_enable_x64", False)  # a run in float64 turns it on
    if status == 130:
        raise KeyboardInterrupt
    said = err.getvalue()
    if status == 0:
        return ("runs", said) if not said else ("runs and complains", said)
    if status != 2 or not re.fullmatch(r"jaxbp: [^\n]+\n", said):
        return f"status {status}, {said.count(chr(10))} lines", said
    return ("a run folder is left", said) if any(folder.iterdir()) else ("refused", said)


@contextlib.contextmanager
def working_in() -> Iterator[Path]:
    """A new empty folder, with another beside it for the input."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as parent:
        work, given = Path(parent) / "work", Path(parent) / "given"
        work.mkdir()
        given.mkdir()
        os.chdir(work)
        try:
            yield given
        finally:
            os.chdir(before)


def try_config(seed: int) -> tuple[str, str]:
    """The outcome of a mutated config; wrong too if one value was replaced and the line names no key."""
    text, key = mutated_config(np.random.default_rng(seed))
    with working_in() as given:
        (given / "x.toml").write_bytes(text)
        found, said = outcome(["run", str(given / "x.toml")], Path.cwd())
    if found == "refused" and key is not None and not any(name in said for name in keys()):
        return "names no key", f"{key}: {said}"
    return found, said


def try_npz(seed: int) -> tuple[str, str]:
    """The outcome of a run on a mutated .npz file."""
    with working_in() as given:
        tables = {"data": {"name": str(given / "x.npz")}, "model": {"sizes": [4, 8, 3]}}
        (given / "x.toml").write_text(tomli_w.dumps(tables | {"optimizer": {"learning_rate": 0.1}}))
        (given / "x.npz").write_bytes(mutated_npz(np.random.default_rng(seed)))
        return outcome(["run", str(given / "x.toml")], Path.cwd())


def try_idx(seed: int) -> tuple[str, str]:
    """The outcome of an import of four small IDX files, one of which is mutated; it may not be taken."""
    rng = np.random.default_rng(seed)
    shapes = ((50, 4, 4), (50,), (10, 4, 4), (10,))
    whole = [
        struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + rng.bytes(int(np.prod(shape))) for shape in shapes
    ]
    files = [
        idx.IdxFile(old.name, shape, hashlib.sha256(data).hexdigest())
        for old, shape, data in zip(idx.SOURCES["mnist"].files, shapes, whole, strict=True)
    ]
    source = idx.SOURCES["mnist"]._replace(files=tuple(files))
    bad, zipped = int(rng.integers(4)), bool(rng.integers(2))
    with working_in() as given, mock.patch.dict(idx.SOURCES, mnist=source):
        with mock.patch.dict(os.environ, JAXBP_DATA=str(Path.cwd() / "data")):
            for number, (file, data) in enumerate(zip(files, whole, strict=True)):
                data = gzip.compress(data, mtime=0) if zipped else data
                data = damaged(data, rng) if number == bad else data
                (given / f"{file.name}{'.gz' * zipped}").write_bytes(data)
            found, said = outcome(["data", "import", "mnist", str(given)], Path.cwd())
            taken = idx.is_local("mnist") and [(idx.folder_of("mnist") / f.name).read_bytes() for f in files] != whole
    return ("taken although it differs", said) if taken else (found, said)


def tried(name: str, attempt: Callable[[int], tuple[str, str]], count: int) -> Iterator[str]:
    """The outcomes of so many inputs; what is wrong is printed."""
    for seed in range(count):
        found, said = attempt(seed)
        if found not in EXPECTED:
            print(f"{name} {seed}: {found}: {said[:2000]}", flush=True)
        yield found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all, prints a table of the outcomes and each that is wrong, writes bad_input.json."""
    parser = report.parser(__doc__)
    parser.add_argument("--configs", type=int, default=2000, help="mutated configs")
    parser.add_argument("--files", type=int, default=200, help="mutated IDX files, and .npz files")
    with report.study("bad_input", parser, arguments) as study:
        results: dict[str, Any] = {}
        for name, attempt, count in (
            ("configs", try_config, study.options.configs),
            ("npz files", try_npz, study.options.files),
            ("IDX files", try_idx, study.options.files),
        ):
            outcomes = list(tried(name, attempt, count))
            results[name] = {"tried": count, "outcomes": dict(Counter(outcomes))}
        rows = [
            [name, found["tried"], *(found["outcomes"].get(key, 0) for key in EXPECTED),
             sum(n for o, n in found["outcomes"].items() if o not in EXPECTED)]
            for name, found in results.items()
        ]  # fmt: skip
        report.table("bad input", ("input", "tried", "one line, exit 2", "runs", "traceback, hang or other"), rows)
        study.save(results)


if __name__ == "__main__":
    main()
