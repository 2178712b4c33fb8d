"""The ``bnb`` plugin: frozen weights of linear modules in bitsandbytes' formats, for training and serving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arctic_plugins import Claim, Finding, LinearSpec, Plugin, Registry, hookimpl
from arctic_plugins_bnb.config import BnBConfig

__all__ = ["BnB"]


class BnB(Plugin):
    """nf4 or int8 for frozen weights; claims ``weight_codec`` of every included linear module."""

    name = "bnb"
    config = BnBConfig
    slots = frozenset({"weight_codec"})

    options: BnBConfig

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.codec("bnb-nf4", "arctic_plugins_bnb.codec:NF4Codec")
        registry.codec("bnb-int8", "arctic_plugins_bnb.codec:Int8Codec")
        registry.exporter("bitsandbytes", "arctic_plugins_bnb.export:BitsAndBytes")

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_plugins_bnb.codec import Int8Codec, NF4Codec

        codec = Int8Codec() if self.options.type == "int8" else NF4Codec(double_quant=self.options.double_quant)
        return [Claim("weight_codec", name, codec) for name in self.options.select(self.name, modules)]

    @classmethod
    @hookimpl
    def diagnose(cls) -> Iterable[Finding]:
        from arctic_plugins_bnb.ops import compiled

        found, cpu = compiled.describe()
        return [Finding("ok" if found else "warning", "kernels", f"CPU: {cpu}; GPU: bitsandbytes'")]
