"""What a reader is shown: the notebooks run; the pages of `make docs` are built without a warning, their links work."""

import json
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["tour", "per_sample_study"])
def test_notebooks_run(name: str) -> None:
    """Every code cell, in one namespace and with JAX as a reader has it; the cells assert what they show."""
    notebook = json.loads((ROOT / "experiments" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, object] = {}
    codes = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, code in enumerate(codes, start=1):
            exec(compile(code, f"{name}.ipynb, code cell {number}", "exec"), namespace)
    assert plt.get_fignums()
    plt.close("all")


class Links(HTMLParser):
    """The ids of a page and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value and not urllib.parse.urlparse(value).scheme:
                self.targets.add(value)


def test_pages_are_built_and_no_link_is_broken(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", ".ci/docs", "-d", tmp_path, ".", tmp_path / "docs"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    pages = {page: Links(page) for page in (tmp_path / "docs").rglob("*.html")}
    assert {page.stem for page in pages} >= {"README", "clusters", "api", "persample", "checker", "bench"}
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            path, _, fragment = urllib.parse.unquote(target).partition("#")
            linked = (page.parent / path.partition("?")[0]).resolve() if path else page
            if not linked.exists() or (fragment and linked in pages and fragment not in pages[linked].ids):
                broken.append(f"{page.name}: {target}")
    assert broken == []
