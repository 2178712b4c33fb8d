"""The plugin ``acme``: frozen weights in 8 bits, with a scale for each group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arctic_plugins import Claim, LinearSpec, Plugin, Registry, hookimpl

from arctic_acme.config import AcmeConfig

__all__ = ["Acme"]


class Acme(Plugin):
    """Frozen weights in 8 bits, with a scale for each group; claims every included linear module."""

    name = "acme"
    contracts = frozenset({1})
    config = AcmeConfig
    slots = frozenset({"weight_codec"})

    options: AcmeConfig

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.codec("acme", "arctic_acme.codec:AcmeCodec")

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_acme.codec import AcmeCodec

        codec = AcmeCodec(group_size=self.options.group_size)
        return [Claim("weight_codec", name, codec) for name in self.options.select(self.name, modules)]
