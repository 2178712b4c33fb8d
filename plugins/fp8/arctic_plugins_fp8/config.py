"""Options of the ``fp8`` plugin."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from arctic_plugins.plugin import PluginConfig

__all__ = ["FP8Config"]


class FP8Config(PluginConfig):
    """What stands under ``fp8:`` in a recipe."""

    bits: Literal[8] = 8
    """Bits of a weight; 8 is e4m3."""
    group_size: Literal["channel"] | Annotated[int, Field(ge=32, le=512)] = "channel"
    """Weights that share a scale: one output channel, or this many along the input dimension."""
    include: tuple[str, ...] = ("**",)
    """Modules to encode, as dotted names with ``*`` (within a component) and ``**`` (across components)."""
    exclude: tuple[str, ...] = ("lm_head", "**.lm_head", "**.router", "**.gate", "score")
    """Modules to leave alone, even when included. The default spares output heads and routers."""
