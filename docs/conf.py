"""How Sphinx builds these pages: Markdown by MyST, the reference from the docstrings."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

import peftlite

project = "peftlite"
author = "The peftlite authors"
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "peftlite"
html_copy_source = False
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name` for code, as Markdown does
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False


def literal_blocks(_app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Make an indented block after an empty line literal, as Markdown does: formulas, trees, examples."""
    result: list[str] = []
    inside = False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and not inside and i and not lines[i - 1].strip() and not after_indented(result):
            result += [".. code-block:: text", ""]
        inside = indented or (inside and not line.strip())
        result.append(line)
    lines[:] = result


def after_indented(lines: list[str]) -> bool:
    """Whether the last line with text is indented: then a section such as Raises: goes on, and no block begins."""
    return next((line for line in reversed(lines) if line.strip()), "").startswith("    ")


def setup(app: Sphinx) -> None:
    """Called by Sphinx. Before napoleon (500), which reads the sections."""
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)


version = release = getattr(peftlite, "__version__", "")
