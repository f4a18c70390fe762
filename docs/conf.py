"""Sphinx: `make docs`."""

from importlib.metadata import version as installed
from pathlib import Path

from sphinx.application import Sphinx

project = "semiseg"
author = "The semiseg authors"
version = release = installed("semiseg")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "semiseg"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autoclass_content = "both"
default_role = "code"  # docstrings quote names in single backticks

LAYERS = ("methods", "ops", "data", "networks", "engine")
"""In the order in which a reader needs them; modules outside a layer come first."""

PACKAGE = Path(__file__).parents[1] / "src" / "semiseg"


def api_reference() -> str:
    """Markdown: a heading a layer and every public module in it, found from the files, so that none is forgotten."""
    groups = {"": sorted(PACKAGE.glob("*.py")), **{layer: sorted((PACKAGE / layer).glob("*.py")) for layer in LAYERS}}
    lines = []
    for layer, files in groups.items():
        lines += [f"## semiseg.{layer}" if layer else "## semiseg", ""]
        for file in files:
            if not file.stem.startswith("_"):
                name = ".".join(("semiseg", *file.relative_to(PACKAGE).with_suffix("").parts))
                lines += [f"### {name}", "", "```{eval-rst}", f".. automodule:: {name}", "```", ""]
    return "\n".join(lines)


def fill_api_page(app: Sphinx, name: str, source: list[str]) -> None:
    if name == "api":
        source[0] += "\n" + api_reference()


def plain_text(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Outside backticks, a star or a bar in a docstring is a star or a bar."""
    for i, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [part.replace("*", r"\*").replace("|", r"\|") for part in parts[::2]]
        lines[i] = "`".join(parts)


def setup(app: Sphinx) -> None:
    app.connect("source-read", fill_api_page)
    app.connect("autodoc-process-docstring", plain_text, priority=100)  # before napoleon, which writes stars of its own
