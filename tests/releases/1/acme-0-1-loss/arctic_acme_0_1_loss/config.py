"""Options of the plugin ``acme-0-1-loss``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import PluginConfig
from pydantic import Field

__all__ = ["Acme01LossConfig"]


class Acme01LossConfig(PluginConfig):
    """Options under ``acme-0-1-loss:`` in a recipe."""

    tile: Annotated[int, Field(ge=1)] = 1024
    """Number of tokens whose logits are widened to float32 at a time."""
