"""Options of the ``shard`` plugin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["ShardConfig"]


class ShardConfig(PluginConfig):
    """What stands under ``shard:`` in a recipe."""

    group_size: Annotated[Annotated[int, Field(ge=2)] | None, THIS_MACHINE] = None
    """Processes that hold one copy of the weights together, neighbours by rank: the GPUs of a node, for gathers inside
    it. Left out: all.
    """
    include: tuple[str, ...] = ("**",)
    """Modules to shard, of those that are encoded: dotted names with ``*`` (within a component) and ``**`` (across
    components).
    """
    prefetch: Annotated[int, Field(ge=0, le=16)] = 1
    """Weights that are gathered ahead."""
    timeout: Annotated[float, Field(gt=0)] = 600
    """Seconds after which a process that waits for the others to come to the same module gives up with an error."""
