"""The ``fp8`` plugin: frozen weights of linear modules in FP8, for training and serving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from arctic_plugins import Claim, Finding, LinearSpec, Plugin, Registry, hookimpl, matches
from arctic_plugins.errors import ClaimError
from arctic_plugins_fp8.config import FP8Config, FP8Format

__all__ = ["FP8"]


class FP8(Plugin):
    """FP8 codec for frozen weights; claims ``weight_codec`` of every included linear module."""

    name = "fp8"
    config = FP8Config
    slots = frozenset({"weight_codec"})

    options: FP8Config

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.codec("fp8", "arctic_plugins_fp8.codec:FP8Codec")
        registry.widening_linear("arctic_plugins_fp8.kernels:widening_linear")
        registry.exporter("compressed-tensors", "arctic_plugins_fp8.export:CompressedTensors")
        registry.exporter("fp8-block", "arctic_plugins_fp8.export:FP8Block")
        registry.exporter("deepspeedfp", "arctic_plugins_fp8.deepspeedfp:DeepSpeedFPExporter")
        registry.converter("deepspeedfp", "arctic_plugins_fp8.deepspeedfp:DeepSpeedFPConverter")

    @hookimpl
    def claim(self, model_config: Any, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_plugins_fp8.codec import FP8Codec

        wanted = self.options.select(self.name, modules)
        for pattern in self.options.formats:
            if not any(matches(pattern, name) for name in wanted):
                raise ClaimError(
                    f"plugins.fp8.formats '{pattern}' matches no module that is encoded",
                    fix="correct it, or 'include' and 'exclude'",
                )
        formats = {name: self._format(name) for name in wanted}
        return [
            Claim("weight_codec", name, FP8Codec(**form.model_dump(include=set(FP8Format.model_fields))))
            for name, form in formats.items()
        ]

    @classmethod
    @hookimpl
    def diagnose(cls) -> Iterable[Finding]:
        from arctic_plugins_fp8 import kernels

        compiled, sentence = kernels.describe()
        return [Finding("ok" if compiled else "warning", "kernels", sentence)]

    def _format(self, name: str) -> FP8Format:
        found = {pattern: form for pattern, form in self.options.formats.items() if matches(pattern, name)}
        if any(form != next(iter(found.values())) for form in found.values()):
            raise ClaimError(
                f"plugins.fp8.formats {' and '.join(map(repr, found))} both match {name}",
                expected="one format",
                fix="narrow one of them",
            )
        return next(iter(found.values()), self.options)
