"""Options of the plugin ``acme-0-1-trainer``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import PluginConfig
from pydantic import Field

__all__ = ["Acme01TrainerConfig"]


class Acme01TrainerConfig(PluginConfig):
    """Options under ``acme-0-1-trainer:`` in a recipe."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the previous average in the next one."""
