"""Options of the plugin ``acme-0-1-codec``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import ModulePatterns
from pydantic import Field

__all__ = ["Acme01CodecConfig"]


class Acme01CodecConfig(ModulePatterns):
    """Options under ``acme-0-1-codec:`` in a recipe."""

    group_size: Annotated[int, Field(ge=1)] = 64
    """Number of neighboring weights in a row that share a scale."""
