"""The ``lora`` plugin: PEFT's low-rank adapters over frozen weights of any codec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arctic_plugins import Plugin, hookimpl
from arctic_plugins.adapter import ADAPTER, WEIGHTS, base_of, read_adapter, read_any_adapter, whole_tensors
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins_lora.config import CALLED, REFUSED, LoraOptions

__all__ = ["LoRA"]

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``max_lora_rank`` that vLLM accepts (vllm/config/lora.py, 0.32.0)."""

_NOT_IN_VLLM = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "modules_to_save", "trainable_token_indices"),
)


class LoRA(Plugin):
    """PEFT's LoRA over frozen weights: turns the loaded model into a ``PeftModel``, which saves an ordinary adapter."""

    name = "lora"
    config = LoraOptions
    slots = frozenset({"adapter"})
    after = frozenset({"weight_codec", "placement"})

    options: LoraOptions

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Plugin:
        for name in options if isinstance(options, Mapping) else ():
            if (why := REFUSED.get(name)) is not None:
                raise ConfigError(f"plugins.lora.{name} cannot be set: {why}", fix="leave it out")
            if (ours := CALLED.get(name)) is not None:
                raise ConfigError(f"plugins.lora.{name} is not an option", fix=f"it is called {ours} here")
        return super().from_options(options)

    @hookimpl
    def hf_transform_model(self, model: Any) -> Any:
        from arctic_plugins_lora.hf import add_adapter

        return add_adapter(model, self.options)

    @hookimpl
    def hf_training_arguments(self, args: Any) -> None:
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            # Reentrant checkpointing gives no gradient to a layer whose input requires none, and the output of the
            # frozen embedding requires none.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}

    @hookimpl
    def vllm_engine_args(self, checkpoint: Path) -> Mapping[str, Any] | None:
        if not (checkpoint / ADAPTER).is_file():
            return None
        where, merge = checkpoint / ADAPTER, "merge the adapter with 'arctic merge' and serve the result"
        if (kind := read_any_adapter(checkpoint).peft_type) != "LORA":
            raise CheckpointError(f"{where} is {kind}", expected="LoRA or rsLoRA, which vLLM supports", fix=merge)
        config = read_adapter(checkpoint)
        others = [name for name in _NOT_IN_VLLM if getattr(config, name)]
        others += ["bias"] if config.bias != "none" else []
        if others:
            found = f"{where} has {others[0]} {getattr(config, others[0])!r:.60}"
            raise CheckpointError(found, expected="LoRA or rsLoRA, which vLLM supports", fix=merge)
        if (checkpoint / WEIGHTS).is_file() and (whole := whole_tensors(checkpoint)):
            found = f"{checkpoint / WEIGHTS} contains a new {whole[0]}, as after resizing the embedding"
            raise CheckpointError(found, expected="matrices of LoRA only, which vLLM supports", fix=merge)
        rank = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
        if rank > MAX_LORA_RANKS[-1]:
            found, most = f"{checkpoint / ADAPTER} has rank {rank}", f"at most {MAX_LORA_RANKS[-1]} in vLLM"
            raise CheckpointError(found, expected=most, fix="merge the adapter with 'arctic merge'")
        # Training may have given the tokenizer a chat template, and another end of an answer.
        own = {"tokenizer": str(checkpoint)} if (checkpoint / "tokenizer_config.json").is_file() else {}
        return {
            **own,
            "model": base_of(checkpoint),
            "enable_lora": True,
            "max_lora_rank": next(known for known in MAX_LORA_RANKS if known >= rank),
            "lora_modules": [{"name": checkpoint.name, "path": str(checkpoint)}],
        }
