"""The plugin ``acme-0-1-placement``: frozen weights, of any codec, in files that are mapped while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from arctic_plugins import Claim, LinearSpec, Plugin, cache_directory, check_patterns, hookimpl

from arctic_acme_0_1_placement.config import Acme01PlacementConfig

__all__ = ["Acme01Placement"]


class Acme01Placement(Plugin):
    """Frozen weights in files, which are mapped while they are used; claims the selected modules."""

    name = "acme-0-1-placement"
    contracts = frozenset({1})
    config = Acme01PlacementConfig
    slots = frozenset({"placement"})
    after = frozenset({"placement"})  # it leaves no bytes for another placement

    options: Acme01PlacementConfig

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_acme_0_1_placement.placement import Acme01PlacementPlacement

        check_patterns(f"plugins.{self.name}.select", self.options.select, modules)
        directory = Path(self.options.path) if self.options.path else cache_directory(self.name)
        placement = Acme01PlacementPlacement(directory)  # one object for the whole model
        return [Claim("placement", pattern, placement) for pattern in self.options.select]
