"""Options of the ``shard`` plugin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["ShardConfig"]


class ShardConfig(PluginConfig):
    """Options under ``shard:`` in a recipe."""

    group_size: Annotated[Annotated[int, Field(ge=2)] | None, THIS_MACHINE] = None
    """Number of processes, neighbors by rank, that together hold one copy of the weights, for example the GPUs of a
    node, so that gathers stay within it. Left out: all processes.
    """
    include: tuple[str, ...] = ("**",)
    """Which of the encoded modules to shard: dotted names with ``*`` (within a component) and ``**`` (across
    components).
    """
    prefetch: Annotated[int, Field(ge=0, le=16)] = 1
    """Number of weights to gather ahead of use."""
    timeout: Annotated[float, Field(gt=0)] = 600
    """Seconds that a process waits for the others to reach the same module before it raises an error."""
