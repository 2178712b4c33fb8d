"""The documentation site, built by ``make docs``.

The source directory is the repository, so that the site has the repository's layout: a relative link that works where
the repository is browsed works in the site too, and a link to a file that is not a page is a link to a copy of it.
"""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))
_about = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]

project = _about["name"]
version = release = _about["version"]
author = "the authors of arctic-plugins"
copyright = author  # noqa: A001 - Sphinx's name

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "plugins/*/README.md", "integrations/*/README.md", "examples/*/README.md"]
include_patterns += ["tests/*/README.md", "benchmarks/**README.md"]
exclude_patterns = [".*", "build", "dist", "out"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "offline",
    "reference",
]

myst_heading_anchors = 4  # the anchors that GitHub gives to headings
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # those of other libraries are not this reference
napoleon_numpy_docstring = False
nitpicky = True  # a reference to a name that does not exist is an error

smartquotes = False  # options begin with two hyphens

html_theme = "furo"
html_title = f"arctic-plugins {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_extra_path = ["_site"]
html_copy_source = False
