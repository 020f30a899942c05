"""The benchmark: the machine first, then a table for each kind of row, then which targets were missed."""

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import report
from experiments.bench import (
    environments,
    epoch,
    growth,
    machine,
    matmul,
    persample,
    plot,
    startup,
    value_and_grad,
)
from experiments.bench.rows import Row, Settings
from jaxbp.commands import Parser, ended
from jaxbp.run import config
from jaxbp.run.errors import Stopped, UserError

ROWS = {
    "value_and_grad": value_and_grad.rows,
    "epoch": epoch.rows,
    "matmul": matmul.rows,
    "persample": persample.rows,
    "startup": startup.rows,
    "growth": growth.rows,
}


DESCRIPTION = """\
Measures jaxbp against what one would use instead, in interleaved rounds of one run: a table for each kind of row with
ratio, quartiles and target, then the rows beyond their target.

  value_and_grad  time, bytes and compile seconds, beside jax.value_and_grad
  epoch           epochs of MNIST, beside Equinox and scikit-learn; with --peers PyTorch and torch.compile
  matmul          the share of the machine's own matmul peak
  persample       per-sample quantities, beside vmap(jax.grad); with --peers BackPACK, Opacus, jax-privacy and optax
  startup         the import, the first step, a whole run
  growth          time, bytes and compile seconds against batch, width, depth and parameters"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status is 0, or 2 for what `run` refuses."""

    def work() -> None:
        options = _parser().parse_args(arguments)
        run(options.only, options.quick, options.peers, options.json)

    return ended(work)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m experiments.bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="which kinds of rows, see above")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and not the slowest rows")
    parser.add_argument(
        "--peers", action="store_true", help="other libraries too, in environments made in .venv/peers (4 GB)"
    )
    parser.add_argument(
        "--json", metavar="FILE.json", type=Path, help="write the rows, and their picture beside it as .png"
    )
    return parser


def run(only: Sequence[str], quick: bool, peers: bool, file: Path | None) -> None:
    """Measures and prints; writes the rows as JSON after each kind of row, and at the end their picture beside it.

    Raises:
      UserError: an unknown kind of row, a file that can't be written, an environment of a peer that can't be made, or
        nothing could be measured.
      Stopped: by Ctrl-C.
    """
    for name in only:
        config.choose("--only", "row", name, ROWS)
    if file is not None:
        _check_writable(file)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        print(text, flush=True)

    pythons = environments.make_all(print) if peers else {}
    about = _introduction(quick)
    made: list[Row] = []
    with _interruptible(file), _pictured(file, made):
        for name in only or ROWS:
            try:
                found = ROWS[name](Settings(quick, pythons, note))
            except UserError as error:
                note(f"{name} is left out: {error}")
                continue
            made += found
            _print(found)
            if file is not None:
                _save(file, about | {"notes": notes}, made)
    if not made:
        raise UserError("bench: nothing could be measured, see above")
    summary(made)
    if file is not None:
        print(f"{file}, {file.with_suffix('.png')}")


def _introduction(quick: bool) -> dict[str, Any]:
    about, peak = machine.describe(), machine.matmul_peak()
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    print(f"{about['processor']}, {about['cores']} cores, {about['device']}, {about['platform']}")
    print(f"Python {about['python']}, {versions}{', XLA_FLAGS=' if about['xla_flags'] else ''}{about['xla_flags']}")
    print(f"matmul peak: {peak.flops / 1e9:,.0f} GFLOP/s in float32, jnp.matmul of side {peak.side}")
    if about["load"] is not None and about["load"] > about["cores"] / 2:
        print(f"the machine is busy, load {about['load']:.1f}: the ratios are noisy, the seconds too long")
    if quick:
        print("quick: 3 rounds, without the slowest rows: not figures to quote")
    return {"machine": about, "matmul_peak": peak._asdict(), "quick": quick}


def _print(rows: Sequence[Row]) -> None:
    """A table for each kind of row, in the order they come in."""
    for what in dict.fromkeys(row.what for row in rows):
        cells = [
            (
                row.case,
                number(row.value),
                "–".join(map(number, row.spread)) if row.spread else "",
                row.target or "",
                absolute(row),
                row.verdict,
            )
            for row in rows
            if row.what == what
        ]
        report.table(what, ("case", "ratio", "quartiles", "target", "jaxbp", ""), cells)


def summary(rows: Sequence[Row]) -> None:
    """A line for each kind of row, as it stands in experiments/README.md; then the rows beyond their target."""
    cells = []
    for what in dict.fromkeys(row.what for row in rows):
        kind = [row for row in rows if row.what == what]
        values = sorted(row.value for row in kind)
        verdicts = [row.verdict for row in kind]
        targets = "; ".join(dict.fromkeys(str(row.target) for row in kind if row.target))
        counts = [str(verdicts.count(verdict)) if targets else "" for verdict in ("met", "tie", "missed")]
        middle = values[len(values) // 2]
        cells.append((what, len(kind), number(values[0]), number(middle), number(values[-1]), targets, *counts))
    columns = ("ratio", "rows", "least", "median", "most", "target", "met", "tie", "missed")
    report.table("Summary: a tie is beyond its target by less than the rounds scatter", columns, cells)
    for verdict in ("tie", "missed"):
        for row in rows:
            if row.verdict == verdict:
                print(f"{verdict}: {row.what}, {row.case}: {number(row.value)}, target {row.target}")


def absolute(row: Row) -> str:
    """jaxbp's own seconds or bytes."""
    if row.unit == "B":
        return f"{row.absolute / 1e6:,.2f} MB"
    return f"{row.absolute:.3g} s" if row.absolute >= 1 else f"{1e3 * row.absolute:.3g} ms"


def number(value: float) -> str:
    """Four digits where a ratio is near 1, three elsewhere."""
    return f"{value:.3f}" if value < 9.995 else f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"


def _save(file: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    listed = [row._asdict() | {"target": str(row.target or ""), "verdict": row.verdict} for row in rows]
    file.write_text(json.dumps(about | {"rows": listed}, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _pictured(file: Path | None, rows: Sequence[Row]) -> Iterator[None]:
    """The picture of what was measured, however it ends."""
    try:
        yield
    finally:
        if file is not None and rows:
            plot.draw(rows).savefig(file.with_suffix(".png"), dpi=110)


def _check_writable(file: Path) -> None:
    """Before anything is measured."""
    if file.suffix != ".json":
        raise UserError(f"--json: {file}: the name has to end with .json; the picture beside it ends with .png")
    if not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK) or file.is_dir():
        raise UserError(f"--json: {file} can't be written")


@contextlib.contextmanager
def _interruptible(file: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = f"; the tables above are in {file}" if file is not None else ""
        raise Stopped(f"interrupted{kept}", signal.SIGINT) from None
