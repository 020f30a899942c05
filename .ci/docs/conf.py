"""The pages of `make docs`: README.md, the guides, and the reference from the docstrings. Sphinx reads this file."""

from typing import Any

from sphinx.application import Sphinx

import jaxbp

project, author, release = "jaxbp", "the authors of jaxbp", jaxbp.__version__
html_title, html_theme, html_show_copyright, html_show_sourcelink = f"jaxbp {release}", "furo", False, False

root_doc = "README"
include_patterns = ["README.md", "configs/*.md", "experiments/README.md", "experiments/results/*.md", ".ci/docs/*.rst"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_heading_anchors = 3  # links such as clusters.md#slurm, as on GitHub
napoleon_custom_sections = [("Source", "notes_style"), ("Sources", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # a docstring says shapes and dtypes; ArrayLike would be spelled out as a union of nine
default_role = "code"  # `x` in a docstring is code

CONTENTS = """
```{toctree}
:hidden:
:caption: Guides
configs/README
configs/clusters
experiments/README
```
```{toctree}
:hidden:
:caption: Reference
.ci/docs/api
.ci/docs/persample
.ci/docs/curvature
.ci/docs/checker
.ci/docs/run
.ci/docs/config
```
```{toctree}
:hidden:
:caption: Measurements
:glob:
experiments/results/*
```
"""


def add_contents(app: Sphinx, document: str, source: list[str]) -> None:
    """The list of pages stands at the side: README.md itself is also read where nobody knows the toctree."""
    if document == root_doc:
        source[0] += CONTENTS


def skip(app: Sphinx, kind: str, name: str, member: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of a NamedTuple are in the docstring of their class; of themselves they say "Alias for field number 0"."""
    return True if str(member.__doc__).startswith("Alias for field number") else None


def as_written(app: Sphinx, kind: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """|G|² is a norm, no substitution of reStructuredText; what stands before a colon is no type of an attribute."""
    lines[:] = [line if "`" in line or ">>>" in line else line.replace("|", "\\|") for line in lines]
    if kind == "attribute":
        lines.insert(0, "\\ ")  # nothing, on a line without a colon


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before Napoleon's 500
