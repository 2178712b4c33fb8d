"""Options of the plugin ``acme``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import ModulePatterns
from pydantic import Field

__all__ = ["AcmeConfig"]


class AcmeConfig(ModulePatterns):
    """Options under ``acme:`` in a recipe."""

    group_size: Annotated[int, Field(ge=1)] = 64
    """Number of neighboring weights in a row that share a scale."""
