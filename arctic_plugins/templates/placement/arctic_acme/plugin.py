"""The plugin ``acme``: frozen weights, of any codec, in files that are mapped while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from arctic_plugins import Claim, LinearSpec, Plugin, cache_directory, check_patterns, hookimpl

from arctic_acme.config import AcmeConfig

__all__ = ["Acme"]


class Acme(Plugin):
    """Frozen weights in files, which are mapped while they are used; claims the selected modules."""

    name = "acme"
    contracts = frozenset({1})
    config = AcmeConfig
    slots = frozenset({"placement"})
    after = frozenset({"placement"})  # it leaves no bytes for another placement

    options: AcmeConfig

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_acme.placement import AcmePlacement

        check_patterns(f"plugins.{self.name}.select", self.options.select, modules)
        directory = Path(self.options.path) if self.options.path else cache_directory(self.name)
        placement = AcmePlacement(directory)  # one object for the whole model
        return [Claim("placement", pattern, placement) for pattern in self.options.select]
