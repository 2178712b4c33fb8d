"""Docstrings as plain text, for commands and editors that show them."""

from __future__ import annotations

import re

__all__ = ["first_paragraph", "paragraphs"]

_ROLE = re.compile(r":[a-z:]+:`(?:[^`<]*<)?~?([^`>]+)>?`")


def paragraphs(docstring: str | None) -> list[str]:
    """Return the paragraphs, one line each, without reStructuredText's roles, literals and directives."""
    texts = [" ".join(text.split()) for text in re.split(r"\n\s*\n", docstring or "")]
    plain = (_ROLE.sub(_target, text).replace("``", "") for text in texts if not text.startswith(".. "))
    return [text for text in plain if text]


def first_paragraph(docstring: str | None) -> str:
    """Return the first of the :func:`paragraphs`, or an empty string."""
    return next(iter(paragraphs(docstring)), "")


def _target(role: re.Match[str]) -> str:
    """Return what a role shows: the whole name, or its last part if it begins with ``~``."""
    return role[1].rpartition(".")[2] if "`~" in role[0] or "<~" in role[0] else role[1]
