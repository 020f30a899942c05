"""What the experiments share: the command line, a table, and results/NAME.json with NAME.png beside it."""

import argparse
import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent / "published.toml"


def parser(doc: str) -> argparse.ArgumentParser:
    """The command line of an experiment: its docstring is the help; --out is the folder of its JSON and PNG."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the PNG")
    return made


def published(study: str) -> dict[str, Any]:
    """The published figures of a study: its table of published.toml."""
    figures: dict[str, Any] = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))[study]
    return figures


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a Markdown table, as it stands in experiments/README.md; the first column is text."""
    made = Table(title=title, title_justify="left", box=MARKDOWN)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    Console(width=160).print(made)


def save(folder: Path, name: str, results: dict[str, Any], figure: Figure) -> None:
    """Writes NAME.json and NAME.png, and prints where."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=120)
    Console().out(f"{folder / name}.json, {folder / name}.png", highlight=False)
