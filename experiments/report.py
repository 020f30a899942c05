"""What the experiments share: the command line, a table, and results/NAME.json with NAME.png beside it."""

import argparse
import contextlib
import json
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from jaxbp.run.errors import Diverged, UserError

RESULTS = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent / "published.toml"


class Study(NamedTuple):
    """An experiment that runs: its name, its command line, when it began."""

    name: str
    options: argparse.Namespace
    started: float

    def save(self, results: dict[str, Any], figure: Figure | None = None) -> None:
        """Writes NAME.json, with the seconds it took, and NAME.png if there is a figure."""
        save(self.options.out, self.name, results | {"seconds": time.perf_counter() - self.started}, figure)


def parser(doc: str, config: Path | None = None, what: str = "") -> argparse.ArgumentParser:
    """The command line of an experiment: its docstring is the help; --out is the folder of its JSON and PNG."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the PNG")
    if config is not None:
        made.add_argument("--config", type=Path, default=config, help=what)
    return made


@contextlib.contextmanager
def study(name: str, parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Iterator[Study]:
    """Reads the command line; what the user can mend, a divergence (status 2) and Ctrl-C (130) end it in one line."""
    options = parser.parse_args(arguments)
    try:
        yield Study(name, options, time.perf_counter())
    except (UserError, Diverged) as error:
        parser.exit(2, f"{name}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{name}: interrupted\n")


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


def save(folder: Path, name: str, results: dict[str, Any], figure: Figure | None = None) -> None:
    """Writes NAME.json and, of a figure, NAME.png, and prints where."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.json"]
    written[0].write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if figure is not None:
        written.append(folder / f"{name}.png")
        figure.savefig(written[1], dpi=120)
    Console().out(", ".join(map(str, written)), highlight=False)
