"""The ``rope`` plugin: a longer context through RoPE scaling, written to the config that both hosts read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from arctic_plugins import Plugin, Registry, hookimpl
from arctic_plugins_rope.config import RoPEConfig

__all__ = ["RoPE"]


class RoPE(Plugin):
    """RoPE scaling, written to the config. Checkpoints keep it there, so hosts do not need the plugin again."""

    name = "rope"
    config = RoPEConfig
    slots = frozenset({"rope"})

    options: RoPEConfig

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.rope_type("ntk", "arctic_plugins_rope.scaling:ntk")

    @hookimpl
    def hf_configure_model(self, config: Any) -> None:
        from arctic_plugins import process_registry
        from arctic_plugins_rope.scaling import configure

        configure(self.options, config, process_registry().rope_types())

    @hookimpl
    def validate(self, model_config: Any) -> Iterable[str]:
        if self.options.type == "dynamic":
            length = int(model_config.max_position_embeddings * model_config.rope_parameters["factor"])
            differ = f"below {length} tokens their results differ; 'ntk' is the same in both"
            return [
                (
                    "type 'dynamic' follows the length of the text in transformers, but always uses the longest length "
                    f"in vLLM: {differ}"
                )
            ]
        if self.options.type == "longrope":
            original = model_config.rope_parameters["original_max_position_embeddings"]
            unless = f"unless max_model_len is at most {original}"
            return [
                (
                    f"type 'longrope' divides by short_factor up to {original} tokens in transformers, but always by "
                    f"long_factor in vLLM {unless}"
                )
            ]
        return []
