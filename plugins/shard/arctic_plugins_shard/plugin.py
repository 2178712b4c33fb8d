"""The ``shard`` plugin: each process keeps a part of every frozen weight, whichever codec encodes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arctic_plugins import Claim, LinearSpec, Plugin, check_patterns, hookimpl, world_size
from arctic_plugins.errors import ConfigError
from arctic_plugins_shard.config import ShardConfig

__all__ = ["Shard"]


class Shard(Plugin):
    """Frozen weights spread over processes; comes before placements that move a process's own bytes elsewhere."""

    name = "shard"
    config = ShardConfig
    slots = frozenset({"placement"})

    options: ShardConfig

    @hookimpl
    def validate(self) -> Iterable[str]:
        size, group = world_size(), self.options.group_size
        if size == 1:
            return [
                (
                    "there is only one process, so nothing is sharded (to start several, use arctic train --nproc, "
                    "torchrun or accelerate launch)"
                )
            ]
        if group is not None and size % group:
            raise ConfigError(
                f"plugins.shard.group_size is {group} with {size} processes",
                expected=f"a divisor of {size}",
                fix="correct it",
            )
        return []

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_plugins_shard.placement import ShardPlacement

        check_patterns("plugins.shard.include", self.options.include, modules)
        placement = ShardPlacement(self.options)
        return [Claim("placement", pattern, placement) for pattern in self.options.include]
