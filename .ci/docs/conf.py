"""The pages of `make docs`: README.md, the guides, and the reference from the docstrings. Sphinx reads this file."""

from sphinx.application import Sphinx

import jaxbp

project, author, release = "jaxbp", "the authors of jaxbp", jaxbp.__version__
html_title, html_theme, html_show_copyright = f"jaxbp {release}", "furo", False
html_theme_options = {"navigation_with_keys": True}

root_doc = "README"
include_patterns = ["README.md", "configs/*.md", "experiments/README.md", "experiments/results/*.md", ".ci/docs/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_heading_anchors = 3  # links such as clusters.md#slurm, as on GitHub
napoleon_custom_sections = [("Source", "notes_style"), ("Sources", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
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
:caption: Measurements
:glob:
experiments/results/*
```
```{toctree}
:hidden:
:caption: Reference
:maxdepth: 1
.ci/docs/api
.ci/docs/persample
.ci/docs/checker
.ci/docs/run
.ci/docs/config
```
"""


def add_contents(app: Sphinx, document: str, source: list[str]) -> None:
    """The list of pages stands at the side: README.md itself is also read where nobody knows the toctree."""
    if document == root_doc:
        source[0] += CONTENTS


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect("source-read", add_contents)
