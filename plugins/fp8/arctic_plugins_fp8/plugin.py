"""The ``fp8`` plugin: frozen weights of linear modules become FP8 bytes, in training and in serving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from arctic_plugins import Claim, Finding, LinearSpec, Plugin, Registry, hookimpl
from arctic_plugins.claims import matches
from arctic_plugins.errors import ClaimError
from arctic_plugins_fp8.config import FP8Config

__all__ = ["FP8"]


class FP8(Plugin):
    """Claims ``weight_codec`` of every included linear module."""

    name = "fp8"
    config = FP8Config
    slots = frozenset({"weight_codec"})

    options: FP8Config

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.codec("fp8", "arctic_plugins_fp8.codec:FP8Codec")

    @hookimpl
    def claim(self, model_config: Any, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_plugins_fp8.codec import FP8Codec

        for pattern in self.options.include:
            if not any(matches(pattern, name) for name in modules):
                raise ClaimError(f"plugins.fp8.include '{pattern}' matches no linear module of this model", fix=f"the model has {_examples(modules)}")
        codec = FP8Codec(bits=self.options.bits, group_size=self.options.group_size)
        return [Claim("weight_codec", name, codec) for name, spec in modules.items() if self._wants(name, spec)]

    @classmethod
    @hookimpl
    def diagnose(cls) -> Iterable[Finding]:
        return [Finding("ok", "kernels", "reference kernels in torch, on every device")]

    def _wants(self, name: str, spec: LinearSpec) -> bool:
        if not any(matches(pattern, name) for pattern in self.options.include) or any(matches(pattern, name) for pattern in self.options.exclude):
            return False
        if spec.tied:
            raise ClaimError(
                f"plugins.fp8 includes {name}, whose weight is shared with the embedding", expected="a weight of its own", fix="add it to 'exclude'"
            )
        return True


def _examples(modules: Mapping[str, LinearSpec]) -> str:
    return ", ".join([*list(modules)[:3], "..."])
