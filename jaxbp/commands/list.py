"""`jaxbp list`."""

import argparse
from pathlib import Path
from typing import Any

from jaxbp.commands import console
from jaxbp.run.errors import UserError

HELP = """\
Lists the runs in a folder, or the members of a sweep: when each began (UTC), how it ended, data, network, epochs, the
scores after the last epoch, and the seconds that the epochs took."""
SCORES = ("validation_accuracy", "validation_rmse", "test_accuracy", "test_rmse")
COLUMNS = ("run", "started", "state", "data", "network", "epochs", *SCORES, "seconds")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Where the runs are, and their order."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=Path("runs"), help="runs by default")
    parser.add_argument(
        "--sort", metavar="COLUMN", default="started", help="of a score the best first; started by default"
    )


def run(options: argparse.Namespace) -> None:
    """Prints a line a run."""
    from jaxbp.run.report import text
    from jaxbp.run.store import runs

    found = [_row(path) for path in runs.folders([options.folder])]
    rows = runs.ordered([{name: row.get(name) for name in COLUMNS} for row in found], options.sort)
    columns = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    text.table(console(), columns, [[text.cell(name, row[name]) for name in columns] for row in rows])


def _row(path: Path) -> dict[str, Any]:
    """A damaged folder does not hide the others."""
    from jaxbp.run.report import text
    from jaxbp.run.store import runs

    try:
        run, timings = runs.read(path), runs.rows(path / runs.TIMINGS)
    except UserError:
        return {"run": path.name, "state": "damaged"}
    sweep = f", sweep of {run.members}" if run.members else ""
    model, kind = run.config.get("model", {}), run.config.get("model", {}).get("kind", "mlp")
    network = f"{text.shown(model.get('sizes'))} {text.shown(model.get('hidden'))}"
    return {
        "run": path.name,
        "started": run.provenance.get("started", "")[:16].replace("T", " ") or None,
        "state": f"{run.state}{sweep}",
        "data": Path(run.config.get("data", {}).get("name", "")).name,
        "network": network if kind == "mlp" else kind,
        "epochs": run.last.get("epochs", run.last.get("epoch")),
        "seconds": round(sum(row.get("seconds", 0) for row in timings), 1) if timings else None,
        **{name: run.scores[name] for name in SCORES if name in run.scores},
    }
