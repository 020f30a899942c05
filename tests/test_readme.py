"""The README's table of equations: every line it quotes must stand in mlp.py or network.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_quoted_lines_are_in_the_code():
    table = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("## The lecture, line by line")[2]
        .partition("\n## ")[0]
    )
    quoted = re.findall(r"\| `(.+)` \|", table)
    assert len(quoted) == 9
    source = "".join((ROOT / "jaxbp" / name).read_text(encoding="utf-8") for name in ("mlp.py", "network.py"))
    assert [line for line in quoted if line not in source] == []
