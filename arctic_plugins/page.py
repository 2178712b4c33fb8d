"""Reports as one self-contained HTML page: without scripts or anything that a browser would fetch.

Whoever writes one requires ``jinja2``, and ``matplotlib`` for figures.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["svg", "write_page"]

STYLE = Path(__file__).with_name("page.css")


def write_page(template: Path, path: Path, **values: Any) -> None:
    """Render a Jinja template to ``path``.

    Args:
        template: the template's file. ``{{ style }}`` inserts the style that all pages share.
        path: the page, which is overwritten.
        values: what the template uses. Text is escaped; figures from :func:`svg` are not.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup(STYLE.read_text("utf-8"))  # noqa: S704 - a file of this package
    page = environment.from_string(template.read_text("utf-8")).render(style=style, **values)
    path.write_text(page, encoding="utf-8")


def svg(figure: Figure) -> Any:
    """Return ``figure`` as an SVG element that :func:`write_page` inserts as it is. matplotlib escapes its texts."""
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])  # noqa: S704 - written by matplotlib
