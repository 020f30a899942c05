"""Lines and tables for a person: at no width is a number cut or a word broken."""

import pytest
from rich.console import Console

from jaxbp.run.report import text

COLUMNS = ("name", *[f"column {k}" for k in range(9)])
ROWS = [[name, *[f"{1.23456789 * 10**k:.9g}" for k in range(9)]] for name in ("a", "日本")]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [10, 40, 80, 200])
def test_every_number_is_whole(terminal: bool, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    text.table(Console(width=width, force_terminal=terminal), COLUMNS, ROWS)
    said = capsys.readouterr().out
    assert "…" not in said
    for number in ROWS[0][1:]:
        assert said.count(number) >= 2
    lines = said.splitlines()
    assert all(len(line) <= width for line in lines) or not terminal or width < 20
    assert ("\n\n" in said.rstrip()) == (terminal and width < 150)  # a second part, below
    assert sum(line.startswith("name") for line in lines) == sum(line.startswith("日本") for line in lines)


def test_a_line_is_broken_between_words_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    line = "digits · softmax_cross_entropy [bold] :smile: " * 3
    text.line(Console(width=30, force_terminal=True), line)
    assert all(word in line.split() for word in capsys.readouterr().out.split())
    text.line(Console(width=30, force_terminal=False), line)
    assert capsys.readouterr().out == line + "\n"
