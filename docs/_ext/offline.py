"""Check that the built pages load nothing from another server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*\b(?:src|srcset|data)=["'](?:https?:)?//[^"']*"""
    r"""|<link\b(?![^>]*rel=["'](?:canonical|next|prev|author)["'])[^>]*\bhref=["'](?:https?:)?//[^"']*"""
    r"""|(?:@import\s+|\burl\()\s*["']?(?:https?:)?//[^"')]*""",
    re.IGNORECASE,
)


def loaded_from_elsewhere(text: str) -> list[str]:
    """Return the elements of an HTML page, or the rules of a style sheet, that load something by an absolute URL."""
    return _LOADED.findall(text)


def _check(app: Sphinx, exception: Exception | None) -> None:
    from sphinx.util import logging

    if exception is None and app.builder.format == "html":
        for path in sorted(Path(app.outdir).rglob("*")):
            if path.suffix in (".html", ".css", ".svg"):
                for found in loaded_from_elsewhere(path.read_text(errors="replace")):
                    logging.getLogger(__name__).warning("%s loads %s", path.relative_to(app.outdir), found)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the check."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
