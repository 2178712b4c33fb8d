"""The ``lora`` plugin: PEFT's low-rank adapters over frozen weights of any codec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arctic_plugins import Plugin, hookimpl
from arctic_plugins.errors import CheckpointError
from arctic_plugins.provenance import read_json
from arctic_plugins_lora.config import LoraOptions

__all__ = ["LoRA"]

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``max_lora_rank`` that vLLM takes (vllm/config/lora.py, 0.32.0)."""


class LoRA(Plugin):
    """Transforms the loaded model into a ``PeftModel``; what it saves is an ordinary PEFT adapter."""

    name = "lora"
    config = LoraOptions
    slots = frozenset({"adapter"})
    after = frozenset({"weight_codec", "placement"})

    options: LoraOptions

    @hookimpl
    def hf_transform_model(self, model: Any) -> Any:
        from arctic_plugins_lora.hf import add_adapter

        return add_adapter(model, self.options)

    @hookimpl
    def hf_training_arguments(self, args: Any) -> None:
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            # Reentrant checkpointing gives no gradient to a layer whose input needs none, and the frozen embedding's output needs none.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}

    @hookimpl
    def vllm_engine_args(self, checkpoint: Path) -> Mapping[str, Any] | None:
        adapter = checkpoint / "adapter_config.json"
        if not adapter.is_file():
            return None
        config = read_json(adapter)
        if type(config.get("r")) is not int:
            raise CheckpointError(f"{adapter} has r {config.get('r')!r}", expected="a rank", fix="save the adapter again")
        if not config.get("base_model_name_or_path"):
            raise CheckpointError(f"{adapter} names no base model", fix="set its base_model_name_or_path")
        if config["r"] > MAX_LORA_RANKS[-1]:
            raise CheckpointError(f"{adapter} has rank {config['r']}", expected=f"at most {MAX_LORA_RANKS[-1]} in vLLM", fix="merge the adapter")
        return {
            "model": config["base_model_name_or_path"],
            "enable_lora": True,
            "max_lora_rank": next(rank for rank in MAX_LORA_RANKS if rank >= config["r"]),
            "lora_modules": [f"{checkpoint.name}={checkpoint}"],
        }
