"""Lines and tables for a person: no word is broken, no number is ever cut."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from jaxbp.run.store.runs import SCORES

GAP = "  "


def table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints the rows under their columns: the first column to the left, the others to the right.

    What a terminal has no room for stands below, with the first column again. Without a terminal there is room.
    """
    widths = [max(map(cell_len, column)) for column in zip(columns, *rows, strict=True)]
    for block in _blocks(widths, console.width if console.is_terminal else None):
        chosen = [[row[k] for k in block] for row in (columns, *rows)]
        room = [widths[k] for k in block]
        lines = [GAP.join(_padded(*cell) for cell in zip(row, room, block, strict=True)) for row in chosen]
        rule = "─" * max(map(cell_len, lines))
        console.out("\n".join(row.rstrip() for row in (lines[0], rule, *lines[1:], "")), highlight=False)


def line(console: Console, text: str) -> None:
    """Prints a line, broken between words where a terminal ends; brackets are no markup."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)


def shown(value: Any) -> str:
    """A value of a key in a few words: 64-32-10, none.

    Example:
      >>> [shown(value) for value in (0.1, "adam", [64, 32, 10], None, {"slots": 8})]
      ['0.1', 'adam', '64-32-10', 'none', 'slots = 8']
    """
    match value:
        case list() | tuple():
            return "-".join(map(shown, value))
        case dict():
            return ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items()) or "{}"
        case None | bool():
            return str(value).lower()
    return str(value)


def shown_score(name: str, value: float | None) -> str:
    """A score in the digits one reads, accuracies in per cent; a dash where there is none."""
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"


def scores(values: Mapping[str, float | None]) -> tuple[list[str], list[list[str]]]:
    """The scores of a run as a table: its columns are the sets, its rows the names of the scores."""
    splits = [split for split in SCORES if f"{split}loss" in values]
    names = [name.removeprefix(splits[-1]) for name in values if name.startswith(splits[-1])] if splits else []
    rows = [[name, *(shown_score(name, values.get(f"{of}{name}")) for of in splits)] for name in names]
    return ["", *(split.rstrip("_") for split in splits)], rows


def cell(name: str, value: Any) -> str:
    """A value of a table, by the name of its column; nothing where there is none."""
    if value is None:
        return ""
    return shown_score(name, value) if name.startswith(SCORES) else shown(value)


def _blocks(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """The columns of each part of the table, the first one in all of them."""
    blocks = [[0]]
    for k in range(1, len(widths)):
        taken = sum(widths[i] + len(GAP) for i in blocks[-1]) + widths[k]
        if width is not None and taken > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(k)
    return blocks


def _padded(cell: str, width: int, column: int) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if column else cell + space
