"""Options of the plugin ``acme-0-1-dispatch``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import THIS_MACHINE, PluginConfig
from pydantic import Field

__all__ = ["Acme01DispatchConfig"]


class Acme01DispatchConfig(PluginConfig):
    """Options under ``acme-0-1-dispatch:`` in a recipe."""

    processes: Annotated[int, Field(ge=1), THIS_MACHINE] = 1
    """Number of processes that together hold one copy of the experts. Must divide the number of processes."""
