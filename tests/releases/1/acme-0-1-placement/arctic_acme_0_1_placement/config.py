"""Options of the plugin ``acme-0-1-placement``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["Acme01PlacementConfig"]


class Acme01PlacementConfig(PluginConfig):
    """Options under ``acme-0-1-placement:`` in a recipe."""

    select: tuple[str, ...] = ("**",)
    """Modules whose weights move to files, as dotted names with ``*`` (within a component) and ``**`` (across them)."""
    path: Annotated[str | None, THIS_MACHINE] = None
    """Directory for the files. Left out: ``~/.cache/arctic_plugins/acme-0-1-placement``."""
