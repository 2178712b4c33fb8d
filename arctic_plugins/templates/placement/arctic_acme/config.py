"""Options of the plugin ``acme``."""

from __future__ import annotations

from typing import Annotated

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["AcmeConfig"]


class AcmeConfig(PluginConfig):
    """Options under ``acme:`` in a recipe."""

    select: tuple[str, ...] = ("**",)
    """Modules whose weights move to files, as dotted names with ``*`` (within a component) and ``**`` (across them)."""
    path: Annotated[str | None, THIS_MACHINE] = None
    """Directory for the files. Left out: ``~/.cache/arctic_plugins/acme``."""
