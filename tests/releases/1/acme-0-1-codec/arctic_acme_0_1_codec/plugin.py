"""The plugin ``acme-0-1-codec``: frozen weights in 8 bits, with a scale for each group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arctic_plugins import Claim, LinearSpec, Plugin, Registry, hookimpl

from arctic_acme_0_1_codec.config import Acme01CodecConfig

__all__ = ["Acme01Codec"]


class Acme01Codec(Plugin):
    """Frozen weights in 8 bits, with a scale for each group; claims every included linear module."""

    name = "acme-0-1-codec"
    contracts = frozenset({1})
    config = Acme01CodecConfig
    slots = frozenset({"weight_codec"})

    options: Acme01CodecConfig

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.codec("acme-0-1-codec", "arctic_acme_0_1_codec.codec:Acme01CodecCodec")

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_acme_0_1_codec.codec import Acme01CodecCodec

        codec = Acme01CodecCodec(group_size=self.options.group_size)
        return [Claim("weight_codec", name, codec) for name in self.options.select(self.name, modules)]
