"""Options of the plugin ``acme``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import PluginConfig
from pydantic import Field

__all__ = ["AcmeConfig"]


class AcmeConfig(PluginConfig):
    """Options under ``acme:`` in a recipe."""

    tile: Annotated[int, Field(ge=1)] = 1024
    """Number of tokens whose logits are widened to float32 at a time."""
